"""Hugging Face's inference clients with a cache: chats, text generation and feature extraction are cached.

``client = HuggingFace("meta-llama/Llama-3.1-8B-Instruct", cache="caches/exp", namespace="run-1")``

The SDK chooses the provider, makes the request and parses the answer. In between, all of its tasks call one
method, which sends the request; that method asks the cache first. All other tasks work as in the SDK.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from cachepipe import context, outages, wire
from cachepipe.errors import UnknownCost
from cachepipe.flow.flow import Flow
from cachepipe.portal import in_portal, run_now, submit
from cachepipe.providers import info
from cachepipe.providers.exchange import CLOSING_SECONDS, CacheView
from cachepipe.providers.generation import Answer
from cachepipe.providers.responses import BodySource, Received
from cachepipe.replaying import NO_KEY
from cachepipe.sdk import http, internals
from cachepipe.sdk.calls import CallInThread, SdkCall, asks_of, plain
from cachepipe.sdk.mixins import OURS, Viewing, sign_constructor, taken_from, view_with
from cachepipe.sdk.options import CacheOptions

try:
    import huggingface_hub
except ImportError as error:
    raise ImportError(
        "the cached Hugging Face clients need huggingface_hub: pip install 'cachepipe[huggingface]'"
    ) from error

_APIS: Final[Mapping[str, wire.Api | None]] = {
    "conversational": None,
    "text-generation": wire.TEXT_GENERATION,
    "feature-extraction": wire.FEATURE_EXTRACTION,
}
"""The tasks that are cached, each with its API where the URL does not tell."""
_NOTED: Final = ("chat_completion", "text_generation", "feature_extraction")
"""The methods of these tasks."""
_SETTINGS: Final = ("model", "provider", "token", "timeout", "headers", "cookies")
"""The attributes of a client that a copy may change."""
_ROUTED: Final = f"hf_{NO_KEY}"
"""Stands for the token of a client that replays without one; it makes the SDK use the hub's router."""

_records: contextvars.ContextVar[list[info.Record] | None] = contextvars.ContextVar(
    "cachepipe_hub_records", default=None
)
"""Gets the record of the call that a method has made."""


class HubCall(SdkCall):
    """A call of one of Hugging Face's clients that the cache may answer.

    Args:
        client: the client.
        parameters: the SDK's own description of the request.
        parts: the other arguments of `Exchange`.
    """

    def __init__(self, client: Any, parameters: Any, **parts: Any) -> None:
        self.parameters = parameters
        super().__init__(client, **parts)

    @classmethod
    def of(cls, client: Any, parameters: Any, *, stream: bool) -> Self | None:
        """Return a request of the SDK as a call, or None if it cannot be cached."""
        view, using = client._cachepipe, context.current()  # noqa: SLF001 - it is ours
        mode = using.mode_of(view.mode)
        api, body = _api_of(parameters), parameters.json
        if mode == "bypass" or view.shared_store.closed or api is None or not isinstance(body, Mapping):
            return None
        body = api.received(parameters.url, plain(body))
        asks = asks_of(api, body, stream=stream)
        if not asks:
            return None
        return cls(
            client,
            parameters,
            url=parameters.url,
            headers=wire.answer_headers(parameters.headers),
            api=api,
            body=body,
            asks=asks,
            stream=stream,
            alone=False,
            mode=mode,
            claimant=using.claimant(view.namespace, view.replicate),
            ordered=cls.check_order(using.ordered_of(view.ordered)),
        )

    def arguments(self, body: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
        """Return the arguments of the client's ``_receive``; see `SdkCall.arguments`."""
        url, body = self.api.sent(self.url, body)
        return {"parameters": dataclasses.replace(self.parameters, url=url, json=body), "stream": stream}


class SyncHubCall(CallInThread, HubCall):
    """A call of a synchronous client."""


def _api_of(parameters: Any) -> wire.Api | None:
    """Return the API of a request of the SDK; None if it is not cached."""
    if parameters.task not in _APIS or parameters.data is not None:
        return None
    by_url, by_task = wire.api_for("POST", parameters.url), _APIS[parameters.task]
    if by_task is None or (by_url is not None and by_url not in wire.INFERENCE):
        return by_url
    return by_url if by_url is not None and by_url.name == by_task.name else by_task


class CachedInference(Viewing):
    """Goes in front of a class of Hugging Face's, as `AsyncCachedInference` or `SyncCachedInference`.

    Its methods are coroutines that serve both kinds of clients; see `cachepipe.sdk.mixins.Cached`.

    Attributes:
        _call_class: the class of the client's calls.
        _settled: returns an awaitable of the result of a step: of its coroutine, or of its result.
        _observed: makes the HTTP client tell of its responses; a step.
        _within_limits: makes a call within the limits of a flow control; a step.
        _lines: returns the lines of a response.
    """

    _call_class: type[HubCall]
    _settled: Callable[[Any], Awaitable[Any]]
    _observed: Callable[[], Any]
    _within_limits: Callable[..., Any]
    _lines: Callable[[BodySource], Any]

    def copy(self, **changes: Any) -> Self:
        """Return a client with the same settings except those given; the two share connections and cache.

        Args:
            changes: parameters of the cache, and ``model``, ``provider``, ``token``, ``timeout``, ``headers``
                and ``cookies``.

        Raises:
            TypeError: for any other name.
        """
        ours = {name: changes.pop(name) for name in OURS if name in changes}
        if unknown := changes.keys() - set(_SETTINGS):
            raise TypeError(
                f"copy() takes no {', '.join(sorted(unknown))}; it takes {', '.join(_SETTINGS)}, "
                f"and {', '.join(OURS)}"
            )
        twin = copy.copy(self)
        vars(twin).update(changes)
        twin._cachepipe = view_with(self._cachepipe, ours)  # noqa: SLF001 - it is ours
        return twin

    async def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> Any:
        """Return the body of the answer, or the lines of its stream, from the cache or not."""
        call = self._call_class.of(self, request_parameters, stream=stream)
        if call is None:
            return await self._uncached(super(), request_parameters, stream=stream)
        answer: Answer = call.known() or await self._settled(call.answer())
        if (records := _records.get()) is not None and answer.kept:
            records[:] = [call.record]
        content = answer.content
        if not stream:
            return content
        return self._lines(content if isinstance(content, BodySource) else BodySource([content]))

    async def _uncached(self, sdk: Any, parameters: Any, *, stream: bool) -> Any:
        """Make an uncached call; if it may generate something, within the service's limits.

        Raises:
            UnknownCost: when a budget is set and it may generate something.
        """
        view = self._cachepipe
        if view.budget is not None and _api_of(parameters) is not None:
            raise UnknownCost(
                "a budget is set, and this call was not made: it is not cached, so what it costs cannot be "
                "counted. Make it with a client without a budget"
            )

        def make() -> Any:
            return internals.hub_post(sdk, parameters, stream=stream)

        if view.flow is None:
            return await self._settled(make())
        namespace = context.current().namespace_of(view.namespace)
        body = parameters.json if isinstance(parameters.json, Mapping) else {}
        limited = self._within_limits(view.flow, make, body=body, namespace=namespace, max_retries=None)
        passage, result = await self._settled(limited)
        passage.end()
        return result

    async def _receive(self, parameters: Any, *, stream: bool) -> Received:
        """Make a call through the SDK and return its response; the body of a stream is unread."""
        sdk: Any = super()
        await self._settled(self._observed())
        responses: list[Any] = []
        token = internals.hub_responses.set(responses)
        try:
            result = await self._settled(internals.hub_post(sdk, parameters, stream=stream))
        except Exception as error:
            outages.failed(error, parameters.url)
            raise
        finally:
            internals.hub_responses.reset(token)
        outages.reached(parameters.url)
        return Received(responses[-1], {}, b"" if stream else result)


class AsyncCachedInference(CachedInference):
    """Goes in front of the asynchronous class."""

    _call_class = HubCall

    def _settled(self, step: Awaitable[Any]) -> Awaitable[Any]:
        """Return the step itself: it is an awaitable."""
        return step

    async def _observed(self) -> None:
        internals.observe(await internals.hub_session(self), _note_soon)

    def _within_limits(self, flow: Flow, make: Callable[[], Any], **about: Any) -> Any:
        """Return a coroutine that makes a call within the limits of a flow control."""
        return flow.call(make, **about)

    @staticmethod
    async def _lines(source: BodySource) -> AsyncIterator[str]:
        response = http.streaming(internals.hub_library(), source, asynchronous=True)
        try:
            async for line in response.aiter_lines():
                yield line.strip()  # as the SDK does
        finally:
            await response.aclose()

    async def close(self, *, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight, then close the connections, also those of copies.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left; a
                stream that has not ended by then is not cached.
        """
        await self._cachepipe.shared_store.close(timeout)
        sdk: Any = super()
        await sdk.close()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SyncCachedInference(CachedInference):
    """Goes in front of the synchronous class."""

    _call_class = SyncHubCall
    _inner_post = run_now(CachedInference._inner_post)  # noqa: SLF001 - its own base
    _receive = run_now(CachedInference._receive)  # noqa: SLF001 - its own base

    async def _settled(self, step: Any) -> Any:
        """Return the result of a step, which is there already."""
        return step

    def _observed(self) -> None:
        internals.observe(huggingface_hub.get_session(), _note)

    def _within_limits(self, flow: Flow, make: Callable[[], Any], **about: Any) -> Any:
        """Make a call within the limits of a flow control, in this thread."""
        return flow.call_in_thread(make, wait=in_portal, **about)

    @staticmethod
    def _lines(source: BodySource) -> Iterator[str]:
        response = http.streaming(internals.hub_library(), source, asynchronous=False)
        try:
            yield from response.iter_lines()
        finally:
            response.close()

    def close(self, *, timeout: float = CLOSING_SECONDS) -> None:
        """Wait for what is in flight, then close the connections; see `AsyncCachedInference.close`."""
        view = self._cachepipe
        if not view.shared_store.closed and not sys.is_finalizing():
            submit(view.shared_store.close(timeout)).result()
        sdk: Any = super()
        sdk.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _note(response: Any) -> None:
    """Note a response to a call of a cached client in this thread."""
    if (responses := internals.hub_responses.get()) is not None:
        responses.append(response)


async def _note_soon(response: Any) -> None:
    _note(response)


def noting(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of the SDK's methods such that `cachepipe.info` knows its result."""

    async def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        records: list[info.Record] = []
        token = _records.set(records)
        try:
            result = await self._settled(own(self, *arguments, **options))
        finally:
            _records.reset(token)
        if records:
            info.note(result, records[0])
        return result

    made = noted if inspect.iscoroutinefunction(inspect.unwrap(own)) else run_now(noted)
    functools.update_wrapper(made, own)
    return made


def equip(kind: Any, sdk: Any) -> None:
    """Give a class the SDK's constructor with our parameters, and methods that note their results for `info`.

    Args:
        kind: our class.
        sdk: the SDK's class that it is a subclass of.
    """

    def construct(self: Any, *arguments: Any, **options: Any) -> None:
        ours = taken_from(options, type(self))
        kind._call_class.check_order(ours["ordered"])  # noqa: SLF001 - it is ours
        sdk.__init__(self, *arguments, **options)
        replays = context.current().mode_of(ours["mode"]) == "replay"
        if replays and self.token is None and huggingface_hub.get_token() is None:
            self.token = _ROUTED
        self._cachepipe = CacheView.of(ours.pop("cache"), **ours)

    sign_constructor(construct, sdk, kind)
    kind.__init__ = construct
    note_results(kind, sdk)


def note_results(kind: Any, sdk: Any) -> None:
    """Give a class methods that note their results for `cachepipe.info`."""
    for name in _NOTED:
        setattr(kind, name, noting(getattr(sdk, name)))


@functools.lru_cache(maxsize=64)
def cached_class(sdk: Any) -> Any:
    """Return the cached subclass of a class of clients."""
    mixin = AsyncCachedInference if internals.is_async_hub_client(sdk) else SyncCachedInference
    about = {"__doc__": sdk.__doc__, "__module__": sdk.__module__, "__qualname__": sdk.__qualname__}
    made = type(sdk.__name__, (mixin, sdk), about)
    note_results(made, sdk)
    return made


class _Options(CacheOptions, total=False):
    provider: Any
    token: str | None
    timeout: float | None
    headers: dict[str, str] | None
    cookies: dict[str, str] | None
    bill_to: str | None
    base_url: str | None
    api_key: str | None


class AsyncHuggingFace(AsyncCachedInference, huggingface_hub.AsyncInferenceClient):
    """``huggingface_hub.AsyncInferenceClient`` with a cache.

    ``chat_completion`` (also as ``chat.completions.create``), ``text_generation`` and ``feature_extraction``
    are cached. Other tasks work as in the SDK.

    Args:
        model: the model, or the URL of a server.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: limits and retries the client's calls, which still go to the client's own URL.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        ordered: hand over the answers in the order of the first run, one at a time, so that a rerun of a
            program with concurrent tasks takes the same course; for asynchronous clients.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``. A call that may exceed it raises ``cachepipe.BudgetExceeded``.
    """

    if TYPE_CHECKING:

        def __init__(self, model: str | None = None, **options: Unpack[_Options]) -> None: ...


class HuggingFace(SyncCachedInference, huggingface_hub.InferenceClient):
    """``huggingface_hub.InferenceClient`` with a cache; any number of threads may use it.

    See `AsyncHuggingFace`.
    """

    if TYPE_CHECKING:

        def __init__(self, model: str | None = None, **options: Unpack[_Options]) -> None: ...


class _AskedError(Exception):
    """Carries the request that a client would have sent."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request = request


class _Asking(huggingface_hub.InferenceClient):
    def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> Any:  # noqa: ARG002 - as in the SDK
        raise _AskedError(request_parameters)


def chat_request_of(**arguments: Any) -> Any:
    """Return the request that ``chat_completion`` would send to the hub's router, without sending it.

    It has the attributes ``url``, ``headers`` and ``json``.

    Args:
        arguments: those of the method, with a ``model``.

    Raises:
        TypeError: when the SDK takes no such argument.
        ValueError: when it refuses one.
    """
    try:
        _Asking(token=_ROUTED).chat_completion(**arguments)
    except _AskedError as asked:
        return dataclasses.replace(asked.request, json=plain(asked.request.json))
    raise AssertionError("the SDK has sent nothing")


for _kind, _sdk in (
    (AsyncHuggingFace, huggingface_hub.AsyncInferenceClient),
    (HuggingFace, huggingface_hub.InferenceClient),
):
    equip(_kind, _sdk)
