"""Makes cached clients of the SDKs' classes: two mixins, and the SDK's signatures with our parameters."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, Final, Self

from cachepipe import context, outages
from cachepipe.flow.flow import Flow, Passage
from cachepipe.portal import in_portal, submit
from cachepipe.providers import info
from cachepipe.providers.exchange import CLOSING_SECONDS, Answer, Surface
from cachepipe.providers.responses import BodySource, Received
from cachepipe.sdk import fast_path, internals
from cachepipe.sdk.calls import ClientCall, SyncClientCall, body_of, receiving
from cachepipe.typedefs import Mode, Repeat

OURS: Final = ("cache", "namespace", "mode", "scope", "repeat", "service")
"""The parameters of a cached client in addition to the SDK's."""
NO_KEY: Final = "none-needed-to-replay"
"""The API key of a client in replay mode if the caller gives none."""

_OPTIONS: Final[Mapping[str, tuple[Any, Any]]] = {
    "cache": (Any, None),
    "namespace": (str | None, None),
    "mode": (Mode, "read-write"),
    "scope": (str | None, None),
    "repeat": (Repeat, "fresh"),
    "service": (Any, None),
}


_CACHESAVERS: Final = {
    "cachedir": "use cache=, which takes the same folder",
    "batch_size": "calls go out as they come, and equal ones together. "
    "For batches write OnlineAPI(OpenAIModel(...), cache, batch_size=...)",
}
"""The parameters of CacheSaver's clients, and what to write instead."""

_arriving: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "cachepipe_arriving", default=None
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
        internals.when_read(response, functools.partial(passage.end, usage=usage, headers=headers))


class _Cached(outages.OutageReports):
    """What synchronous and asynchronous clients have in common."""

    _cachepipe: Surface

    def in_namespace(self, namespace: str | None) -> Self:
        """Return this client in another namespace; the two share connections, cache and calls in flight."""
        client: Any = self
        twin: Self = client.copy(cache=self._cachepipe.named(namespace))
        return twin

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


class AsyncCached(_Cached):
    """Goes in front of an asynchronous client's class."""

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        sdk: Any = super()
        taught = fast_path.lesson.get()
        if taught is not None:
            taught.learn(cast_to, options, stream=stream)
        call = ClientCall.of(self, self._cachepipe, cast_to, options, stream=stream, stream_cls=stream_cls)
        if call is None:
            token = receiving.set(None)
            try:
                with self._explaining():
                    return await self._uncached(sdk.request, cast_to, options, stream, stream_cls)
            finally:
                receiving.reset(token)
        answer = call.known()
        if answer is None:
            answer = await call.drawn()
        return await self._processed(call, answer)

    async def _processed(self, call: ClientCall, answer: Answer) -> Any:
        """Return what the SDK makes of an answer."""
        sdk: Any = super()
        arrived = call.arrived(answer)
        result = await sdk._process_response(response=arrived.response, **arrived.details)  # noqa: SLF001 - see seam
        if call.kept:
            info.note(result, call.record)
        return result

    async def _uncached(self, request: Any, cast_to: Any, options: Any, stream: bool, stream_cls: Any) -> Any:
        """Make an uncached call; if it may generate something, within the service's limits."""
        flow = self._limiting(options)
        if flow is None:
            return await request(cast_to, options, stream=stream, stream_cls=stream_cls)
        once = internals.sent_once(options)
        responses: list[Any] = []
        token = _arriving.set(responses)
        try:
            passage, result = await flow.call(
                lambda: request(cast_to, once, stream=stream, stream_cls=stream_cls), **self._passing(options)
            )
        finally:
            _arriving.reset(token)
        _end(passage, responses, result)
        return result

    async def _receive(self, cast_to: Any, options: Any, *, stream: bool, stream_cls: Any) -> Any:
        """Make a call through the SDK and return its response as it arrives."""
        sdk: Any = super()
        token = receiving.set(self)
        try:
            with self._explaining():
                return await sdk.request(cast_to, options, stream=stream, stream_cls=stream_cls)
        finally:
            receiving.reset(token)

    async def _process_response(
        self,
        *,
        cast_to: Any,
        options: Any,
        response: Any,
        stream: bool,
        stream_cls: Any,
        retries_taken: int = 0,
    ) -> Any:
        details = {
            "cast_to": cast_to,
            "options": options,
            "stream": stream,
            "stream_cls": stream_cls,
            "retries_taken": retries_taken,
        }
        if receiving.get() is not self:
            if (responses := _arriving.get()) is not None:
                responses[:] = [response]
            sdk: Any = super()
            return await sdk._process_response(response=response, **details)  # noqa: SLF001 - see seam
        if stream:
            return Received(response, details)
        if not internals.unread(self, response):
            return Received(response, details, response.content)
        content = await response.aread()
        return Received(internals.handed_on(self, response, BodySource([content])), details, content)

    async def close(self, *, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight, then close the connections, also those of copies, as the SDK does.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left; a
                stream that has not ended by then is not cached.
        """
        await self._cachepipe.backing.close(timeout)
        sdk: Any = super()
        await sdk.close()


class SyncCached(_Cached):
    """Goes in front of a synchronous client's class."""

    def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        sdk: Any = super()
        taught = fast_path.lesson.get()
        if taught is not None:
            taught.learn(cast_to, options, stream=stream)
        call = SyncClientCall.of(
            self, self._cachepipe, cast_to, options, stream=stream, stream_cls=stream_cls
        )
        if call is None:
            token = receiving.set(None)
            try:
                with self._explaining():
                    return self._uncached(sdk.request, cast_to, options, stream, stream_cls)
            finally:
                receiving.reset(token)
        answer = call.known()
        if answer is None:
            answer = call.wait()
        return self._processed(call, answer)

    def _processed(self, call: ClientCall, answer: Answer) -> Any:
        """Return what the SDK makes of an answer."""
        sdk: Any = super()
        arrived = call.arrived(answer)
        result = sdk._process_response(response=arrived.response, **arrived.details)  # noqa: SLF001 - see seam
        if call.kept:
            info.note(result, call.record)
        return result

    def _uncached(self, request: Any, cast_to: Any, options: Any, stream: bool, stream_cls: Any) -> Any:
        """Make an uncached call; if it may generate something, within the service's limits."""
        flow = self._limiting(options)
        if flow is None:
            return request(cast_to, options, stream=stream, stream_cls=stream_cls)
        once = internals.sent_once(options)
        responses: list[Any] = []
        token = _arriving.set(responses)
        try:
            passage, result = flow.call_in_thread(
                lambda: request(cast_to, once, stream=stream, stream_cls=stream_cls),
                wait=in_portal,
                **self._passing(options),
            )
        finally:
            _arriving.reset(token)
        _end(passage, responses, result)
        return result

    def _receive(self, cast_to: Any, options: Any, *, stream: bool, stream_cls: Any) -> Any:
        """Make a call through the SDK and return its response as it arrives."""
        sdk: Any = super()
        token = receiving.set(self)
        try:
            with self._explaining():
                return sdk.request(cast_to, options, stream=stream, stream_cls=stream_cls)
        finally:
            receiving.reset(token)

    def _process_response(
        self,
        *,
        cast_to: Any,
        options: Any,
        response: Any,
        stream: bool,
        stream_cls: Any,
        retries_taken: int = 0,
    ) -> Any:
        details = {
            "cast_to": cast_to,
            "options": options,
            "stream": stream,
            "stream_cls": stream_cls,
            "retries_taken": retries_taken,
        }
        if receiving.get() is not self:
            if (responses := _arriving.get()) is not None:
                responses[:] = [response]
            sdk: Any = super()
            return sdk._process_response(response=response, **details)  # noqa: SLF001 - see seam
        if stream:
            return Received(response, details)
        if not internals.unread(self, response):
            return Received(response, details, response.content)
        content = response.read()
        return Received(internals.handed_on(self, response, BodySource([content])), details, content)

    def close(self, *, timeout: float = CLOSING_SECONDS) -> None:
        """Wait for what is in flight, then close the connections, also those of copies, as the SDK does.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left; a
                stream that has not ended by then is not cached.
        """
        surface = getattr(self, "_cachepipe", None)
        if surface is not None and not surface.backing.closed and not sys.is_finalizing():
            submit(surface.backing.close(timeout)).result()
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

    def __init__(self: Any, **options: Any) -> None:  # noqa: N807 - it becomes the constructor
        for name in _CACHESAVERS.keys() & options.keys():
            raise TypeError(f"{kind.__name__} takes no {name}=; {_CACHESAVERS[name]}")
        ours = {name: options.pop(name, default) for name, (_, default) in _OPTIONS.items()}
        cache = ours.pop("cache")
        surface = cache if isinstance(cache, Surface) else None
        replays = (surface.mode if surface is not None else ours["mode"]) == "replay"
        if surface is None and hasattr(ours["service"], "client_options"):
            given = {name: value for name, value in options.items() if value is not None}
            its = ours["service"].client_options(internals.package_of(sdk), replays=replays)
            if "default_headers" in its:
                its["default_headers"] |= given.pop("default_headers", {})
            options = {**its, **given}
        try:
            sdk.__init__(self, **options)
        except error:
            if not replays or any(options.get(name) is not None for name in credentials):
                raise
            sdk.__init__(self, **{**options, **credentials})
        self._cachepipe = Surface.of(cache, **ours) if surface is None else surface
        if options.get("http_client") is None:
            internals.ease_probes(self)

    def copy(self: Any, **options: Any) -> Any:
        changes = {name: options.pop(name) for name in OURS if options.get(name, missing) is not missing}
        options = {name: value for name, value in options.items() if name not in OURS}
        cache = changes.pop("cache", None)
        surface = self._cachepipe
        if isinstance(cache, Surface):
            surface = cache
        elif cache is not None:
            kept = {name: getattr(surface, name) for name in OURS[1:]}
            surface = Surface.of(cache, **{**kept, **changes})
        else:
            surface = surface.changed(**changes)
        extra = {**options.pop("_extra_kwargs", {}), "cache": surface}
        return sdk.copy(self, **options, _extra_kwargs=extra)

    _sign(__init__, sdk.__init__, _OPTIONS, kind)
    kind.__init__ = __init__
    own = {
        name: (annotation if annotation is Any else annotation | type(missing), missing)
        for name, (annotation, _) in _OPTIONS.items()
    }
    _sign(copy, sdk.copy, own, kind)
    kind.copy = kind.with_options = copy
    fast_path.equip(kind, sdk)


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
