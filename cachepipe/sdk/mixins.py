"""Makes cached clients of the SDKs' classes: two mixins, and the SDK's signatures with our parameters."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import operator
import sys
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, Final, Self

from cachepipe import context, outages, wire
from cachepipe.errors import UnknownCost
from cachepipe.flow.flow import Flow, Passage
from cachepipe.portal import in_portal, run_now, submit
from cachepipe.providers import info, presets
from cachepipe.providers.exchange import CLOSING_SECONDS, CacheView
from cachepipe.providers.generation import Answer
from cachepipe.providers.presets import Preset
from cachepipe.providers.responses import BodySource, Received
from cachepipe.sdk import fast_path, http, internals
from cachepipe.sdk.calls import ClientCall, SyncClientCall, body_of, receiving
from cachepipe.sdk.options import CacheOptions

_OPTIONS: Final = typing.get_type_hints(CacheOptions)
_DEFAULTS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(_OPTIONS),
    "mode": "read-write",
    "repeat": "fresh",
    "ordered": False,
}
OURS: Final = tuple(_OPTIONS)
"""The parameters of a cached client in addition to the SDK's."""
_CACHESAVERS: Final = {
    "cachedir": "use cache=, which takes the same folder",
    "batch_size": "calls go out as they come, and equal ones together. "
    "For batches write OnlineAPI(OpenAIModel(...), cache, batch_size=...)",
}
"""The parameters of CacheSaver's clients, and what to write instead."""

_OPENAIS: Final = ("organization", "project")
"""The parameters that OpenAI's SDK takes from the environment, and that no other provider may learn."""

_responses: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "cachepipe_responses", default=None
)
"""Gets the response of an uncached call, for the flow control to learn from."""


def _end(passage: Passage, responses: Sequence[Any], result: Any) -> None:
    """Report the end of a call: for a stream, when it has been read."""
    response = responses[-1] if responses else None
    usage = getattr(result, "usage", None)
    if response is None:
        passage.end(usage=usage)
    else:
        headers = response.headers
        http.when_read(response, functools.partial(passage.end, usage=usage, headers=headers))


class Viewing:
    """A client with a view of a cache.

    Attributes:
        _preset: the provider that the class is for; None for any.
    """

    _preset: ClassVar[Preset | None] = None
    _cachepipe: CacheView

    @property
    def _max_n(self) -> int | None:
        """The largest ``n`` that the provider honours, if it is known."""
        return None if self._preset is None else self._preset.max_n

    def in_namespace(self, namespace: str | None) -> Self:
        """Return this client in another namespace; the two share connections, cache and calls in flight."""
        return self._viewing(self._cachepipe.sharing(namespace=namespace))

    def in_replicate(self, replicate: str | int | None) -> Self:
        """Return this client in another replicate; the two share connections, cache and calls in flight."""
        return self._viewing(self._cachepipe.sharing(replicate=replicate))

    def _viewing(self, view: CacheView) -> Self:
        client: Any = self
        twin: Self = client.copy(cache=view)
        return twin


class Cached(Viewing, outages.OutageReports):
    """Goes in front of a client's class, as `AsyncCached` or `SyncCached`.

    Its methods are coroutines that serve both kinds of clients. In a synchronous client they never wait,
    because what they await is there already, and `run_now` makes plain methods of them.

    Attributes:
        _call_class: the class of the client's calls.
        _settled: returns an awaitable of the result of a step: of its coroutine, or of its result.
        _within_limits: makes a call within the limits of a flow control; a step.
        _read: reads the body of a response; a step.
    """

    _call_class: type[ClientCall]
    _settled: Callable[[Any], Awaitable[Any]]
    _within_limits: Callable[..., Any]
    _read: Callable[[Any], Any]

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        observed = fast_path.observed.get()
        if observed is not None:
            observed.learn(cast_to, options, stream=stream)
        how = {"stream": stream, "stream_cls": stream_cls}
        call = self._call_class.of(self, cast_to, options, **how)
        if call is not None:
            return await self._parsed(call, call.known() or await self._settled(call.answer()))
        sdk: Any = super()
        token = receiving.set(None)
        try:
            with self._explaining():
                return await self._uncached(sdk.request, cast_to, options, **how)
        finally:
            receiving.reset(token)

    async def _parsed(self, call: ClientCall, answer: Answer) -> Any:
        """Return what the SDK makes of an answer."""
        received = call.received(answer)
        result = await self._settled(internals.process(super(), received.response, received.details))
        if call.kept:
            info.note(result, call.record)
        return result

    async def _uncached(self, request: Any, cast_to: Any, options: Any, **how: Any) -> Any:
        """Make an uncached call; if it may generate something, within the service's limits.

        Raises:
            UnknownCost: when a budget is set and it may generate something.
        """
        if self._cachepipe.budget is not None and wire.api_for(options.method, str(options.url)) is not None:
            raise UnknownCost(
                "a budget is set, and this call was not made: it is not cached, so what it costs cannot be "
                "counted. Make it with a client without a budget"
            )
        flow = self._limiting(options)
        if flow is None:
            return await self._settled(request(cast_to, options, **how))
        once = internals.sent_once(options)
        responses: list[Any] = []
        token = _responses.set(responses)
        try:
            passage, result = await self._settled(
                self._within_limits(flow, lambda: request(cast_to, once, **how), **self._passing(options))
            )
        finally:
            _responses.reset(token)
        _end(passage, responses, result)
        return result

    async def _receive(self, cast_to: Any, options: Any, **how: Any) -> Any:
        """Make a call through the SDK and return its response as it arrives."""
        sdk: Any = super()
        token = receiving.set(self)
        try:
            with self._explaining():
                return await self._settled(sdk.request(cast_to, options, **how))
        finally:
            receiving.reset(token)

    async def _process_response(self, *, response: Any, **details: Any) -> Any:
        if receiving.get() is self:
            return await self._as_received(response, details, stream=details["stream"])
        if (responses := _responses.get()) is not None:
            responses[:] = [response]
        return await self._settled(internals.process(super(), response, details))

    async def _as_received(self, response: Any, details: dict[str, Any], *, stream: bool) -> Received:
        """Return a response before the SDK parses it, with its body unless the caller wants a stream."""
        if stream:
            return Received(response, details)
        if not http.unread(response):
            return Received(response, details, response.content)
        content = await self._settled(self._read(response))
        return Received(http.handed_on(self, response, BodySource([content])), details, content)

    @contextlib.contextmanager
    def _explaining(self, *, reached: bool = True) -> Iterator[None]:
        """Add the URL to errors of calls, and report each outage of the server.

        Args:
            reached: whether the absence of an error means that the server was reached.
        """
        client: Any = self
        try:
            yield
        except Exception as error:
            outages.explain(error)
            raise
        if reached:
            outages.reached(f"{client.base_url}")

    def _limiting(self, options: Any) -> Flow | None:
        """Return the flow control of an uncached call, if the call may generate something."""
        return self._cachepipe.flow if options.method.lower() == "post" else None

    def _passing(self, options: Any) -> dict[str, Any]:
        """Return the arguments for the flow control of a call."""
        namespace = context.current().namespace_of(self._cachepipe.namespace)
        body = body_of(options) or {}
        return {"body": body, "namespace": namespace, "max_retries": internals.own_retries(self, options)}


class AsyncCached(Cached):
    """Goes in front of an asynchronous client's class."""

    _call_class = ClientCall
    _read: Any = operator.methodcaller("aread")

    def _settled(self, step: Awaitable[Any]) -> Awaitable[Any]:
        """Return the step itself: it is an awaitable."""
        return step

    def _within_limits(self, flow: Flow, make: Callable[[], Any], **about: Any) -> Any:
        """Return a coroutine that makes a call within the limits of a flow control."""
        return flow.call(make, **about)

    async def close(self, *, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight, then close the connections, also those of copies, as the SDK does.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left; a
                stream that has not ended by then is not cached.
        """
        await self._cachepipe.shared_store.close(timeout)
        sdk: Any = super()
        await sdk.close()


class SyncCached(Cached):
    """Goes in front of a synchronous client's class."""

    _call_class = SyncClientCall
    _read: Any = operator.methodcaller("read")
    request = run_now(Cached.request)
    _receive = run_now(Cached._receive)  # noqa: SLF001 - its own base
    _process_response = run_now(Cached._process_response)  # noqa: SLF001 - its own base

    async def _settled(self, step: Any) -> Any:
        """Return the result of a step, which is there already."""
        return step

    def _within_limits(self, flow: Flow, make: Callable[[], Any], **about: Any) -> Any:
        """Make a call within the limits of a flow control, in this thread."""
        return flow.call_in_thread(make, wait=in_portal, **about)

    def close(self, *, timeout: float = CLOSING_SECONDS) -> None:
        """Wait for what is in flight, then close the connections; see `AsyncCached.close`."""
        view = getattr(self, "_cachepipe", None)
        if view is not None and not view.shared_store.closed and not sys.is_finalizing():
            submit(view.shared_store.close(timeout)).result()
        sdk: Any = super()
        sdk.close()


def equip(kind: Any, sdk: Any, *, credentials: Mapping[str, str], error: type[Exception]) -> None:
    """Give a class the SDK's constructor and ``copy``, with our parameters after the SDK's own.

    They are made at import, so that they have the parameters of the installed version.

    Args:
        kind: our class.
        sdk: the SDK's class that it is a subclass of.
        credentials: placeholders for a client in replay mode without credentials.
        error: what the SDK raises for a client without credentials.
    """
    copies = (signature(base.copy).parameters for base in sdk.__mro__)  # a subclass may take anything
    missing: Any = next(taken["max_retries"].default for taken in copies if "max_retries" in taken)
    made = _constructor(sdk, credentials, error)
    sign_constructor(made, sdk, kind)
    kind.__init__ = made
    made = _copier(sdk, missing)
    may_miss = {name: hint if hint is Any else hint | type(missing) for name, hint in _OPTIONS.items()}
    _sign(made, sdk.copy, {name: (hint, missing) for name, hint in may_miss.items()}, kind)
    kind.copy = kind.with_options = made
    kind._preset = presets.of_sdk(internals.package_of(sdk))  # noqa: SLF001 - it is ours
    fast_path.equip(kind, sdk)


def sign_constructor(made: Callable[..., None], sdk: Any, kind: type) -> None:
    """Give a constructor the signature of the SDK's, followed by our parameters."""
    _sign(made, sdk.__init__, {name: (hint, _DEFAULTS[name]) for name, hint in _OPTIONS.items()}, kind)


def _constructor(sdk: Any, credentials: Mapping[str, str], error: type[Exception]) -> Callable[..., None]:
    """Return a constructor with our parameters; the arguments are those of `equip`."""

    def construct(self: Any, **options: Any) -> None:
        ours = taken_from(options, type(self))
        cache, service = ours.pop("cache"), ours["service"]
        view = cache if isinstance(cache, CacheView) else None
        self._call_class.check_order(ours["ordered"] if view is None else view.ordered)
        replays = context.current().mode_of(ours["mode"] if view is None else view.mode) == "replay"
        if view is None and hasattr(service, "client_options"):
            its = service.client_options(internals.package_of(sdk), replays=replays)
            options = _with_service(options, its)
        preset = self._preset
        if preset is None or preset.sdk != "openai":
            _begin_sdk(self, sdk, options, credentials if replays else {}, error)
        else:
            sdk.__init__(self, **_with_preset(options, preset, error, replays=replays))
            for name in _OPENAIS:
                setattr(self, name, options.get(name))
        self._cachepipe = CacheView.of(cache, **ours) if view is None else view
        if options.get("http_client") is None:
            http.ease_probes(self)

    return construct


def taken_from(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Take our parameters out of a constructor's options, and return them with their defaults.

    Raises:
        TypeError: for a parameter of CacheSaver's clients, with what to write instead.
    """
    for name in _CACHESAVERS.keys() & options.keys():
        raise TypeError(f"{kind.__name__} takes no {name}=; {_CACHESAVERS[name]}")
    return {name: options.pop(name, default) for name, default in _DEFAULTS.items()}


def view_with(view: CacheView, changes: dict[str, Any]) -> CacheView:
    """Return the view of a client's copy.

    Args:
        view: the view of the client.
        changes: the parameters of ours that were given to ``copy``.
    """
    cache = changes.pop("cache", None)
    if isinstance(cache, CacheView):
        return cache
    if cache is not None:
        return CacheView.of(cache, **{name: getattr(view, name) for name in OURS[1:]} | changes)
    return view.changed(**changes)


def _begin_sdk(client: Any, sdk: Any, options: Any, placeholders: Any, error: type[Exception]) -> None:
    """Call the SDK's constructor, with placeholders if the caller gave no credentials."""
    try:
        sdk.__init__(client, **options)
    except error:
        if not placeholders or any(options.get(name) is not None for name in placeholders):
            raise
        sdk.__init__(client, **{**options, **placeholders})


def _with_preset(
    options: Mapping[str, Any], preset: Preset, error: type[Exception], *, replays: bool
) -> dict[str, Any]:
    """Return the options of a client of OpenAI's SDK for another provider.

    Args:
        options: the options that the caller gave.
        preset: the provider.
        error: what the SDK raises for a client without credentials.
        replays: whether the client will make no calls, so that it needs no key.
    """
    made = {**options}
    if made.get("base_url") is None:
        made["base_url"] = preset.base_url
    if made.get("api_key") is None:  # the SDK would take OpenAI's key
        try:
            made["api_key"] = preset.found_key(needed=not replays)
        except ValueError as missing:
            raise error(str(missing)) from None
    return made


def _with_service(options: Mapping[str, Any], its: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a client, with those of its service where the caller gave none."""
    given = {name: value for name, value in options.items() if value is not None}
    if "default_headers" in its:
        its["default_headers"] |= given.pop("default_headers", {})
    if "azure_endpoint" in given:  # Azure's clients take one of the two
        del its["base_url"]
    return {**its, **given}


def _copier(sdk: Any, missing: Any) -> Callable[..., Any]:
    """Return a ``copy`` method with our parameters; the default of each is ``missing``."""

    def copy(self: Any, **options: Any) -> Any:
        changes = {name: value for name in OURS if (value := options.pop(name, missing)) is not missing}
        view = view_with(self._cachepipe, changes)
        extra = {**options.pop("_extra_kwargs", {}), "cache": view}
        return sdk.copy(self, **options, _extra_kwargs=extra)

    return copy


def _sign(made: Callable[..., Any], like: Callable[..., Any], own: Mapping[str, Any], kind: type) -> None:
    """Give a function the name, annotations and signature of another, followed by our parameters."""
    functools.update_wrapper(made, like, updated=())
    del made.__wrapped__  # type: ignore[attr-defined]  # its signature is not that of the other
    made.__qualname__ = f"{kind.__name__}.{like.__name__}"
    made.__module__ = kind.__module__
    try:
        hints = typing.get_type_hints(like)
    except NameError:  # a name that the SDK imports for type checkers only
        hints = dict(like.__annotations__)
    returned = {"return": hints.pop("return")} if "return" in hints else {}
    added = {name: annotation for name, (annotation, _) in own.items()}
    made.__annotations__ = {**hints, **added, **returned}
    parameters = list(signature(like).parameters.values())
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters]
    rest = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in own.items()
    ]
    parameters += rest
    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # as documented
