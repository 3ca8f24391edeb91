"""Gemini's clients with a cache: change the import, and every answer that can be cached is.

``client = Gemini(cache="caches/exp", namespace="run-1")``

google-genai makes all calls through one object that a client and its parts share. The cache is there, below
the conversion of contents and configurations and the parsing of answers, and above the retries. So keys are
made from what would be sent, and parsed answers, automatic function calling, chats and streams are the SDK's
own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

try:
    from google import genai
    from google.genai import client as genai_client
except ImportError as error:
    raise ImportError(
        "the cached Gemini clients need google-genai: pip install 'cachepipe[gemini]'"
    ) from error

from cachepipe import context, outages, wire
from cachepipe.errors import StageClosed, UnknownCost
from cachepipe.portal import in_portal, submit
from cachepipe.providers import info
from cachepipe.providers.exchange import CLOSING_SECONDS, CacheView, id_header
from cachepipe.providers.generation import Answer, Made
from cachepipe.providers.responses import BodySource, Received
from cachepipe.replaying import NO_KEY
from cachepipe.sdk import http, internals
from cachepipe.sdk.calls import CallInThread, SdkCall, asks_of
from cachepipe.sdk.mixins import Viewing, sign_constructor, taken_from, view_with
from cachepipe.sdk.options import CacheOptions
from cachepipe.sdk.wrapping import check_uncached, check_unchanged
from cachepipe.typedefs import Ordered

_SDK: Any = genai.Client  # tools may replace it later
_JSON = {"content-type": "application/json; charset=UTF-8"}


class _Answered(NamedTuple):
    """The call that has answered last in this context.

    Attributes:
        record: the facts about its answer; None if the cache did not answer it.
        response: the HTTP response of a stream.
    """

    record: info.Record | None = None
    response: Any = None


_UNKNOWN = _Answered()
_answered: contextvars.ContextVar[_Answered] = contextvars.ContextVar("cachepipe_answered", default=_UNKNOWN)


class GeminiCall(SdkCall):
    """One call of a client that the cache may answer.

    Args:
        client: the object that makes the calls.
        request: the SDK's own description of the request.
        http_options: the options of the call.
        parts: the other arguments of `Exchange`.
    """

    half = "async"

    def __init__(self, client: Any, request: Any, http_options: Any, **parts: Any) -> None:
        self.request = request
        self.http_options = http_options
        super().__init__(client, url=request.url, headers=request.headers, **parts)
        self.max_retries = internals.google_retries(client, http_options)

    @classmethod
    def of(cls, client: Any, request: Any, http_options: Any, *, stream: bool) -> Self | None:
        """Return a request of the SDK as a call, or None if it cannot be cached.

        Raises:
            StageClosed: when the cache was closed.
        """
        view, using = client._cachepipe, context.current()  # noqa: SLF001 - it is ours
        mode = using.mode_of(view.mode)
        api = wire.api_for(request.method, request.url)
        if mode == "bypass" or api is None or not isinstance(request.data, Mapping):
            return None
        body = api.received(request.url, request.data)
        asks = asks_of(api, body, stream=stream)
        if not asks:
            return None
        if view.shared_store.closed:
            raise StageClosed("the cache of this client was closed with it; make another client")
        client._cachepipe_halves.add(cls.half)  # noqa: SLF001 - it is ours
        return cls(
            client,
            request,
            http_options,
            api=api,
            body=body,
            asks=asks,
            stream=stream,
            alone=http_options is not None,
            mode=mode,
            claimant=using.claimant(view.namespace, view.replicate),
            ordered=cls.check_order(using.ordered_of(view.ordered)),
        )

    def arguments(self, body: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
        """Return the arguments of the client's ``_receive``; see `SdkCall.arguments`."""
        url, data = self.api.sent(self.url, body)
        headers = dict(self.request.headers)  # the SDK adds credentials to them
        request = dataclasses.replace(self.request, url=url, data=dict(data), headers=headers)
        once = self.view.service is not None
        return {"request": request, "http_options": self.http_options, "stream": stream, "once": once}

    def received(self, answer: Answer) -> Any:
        """Return an answer as the SDK's ``HttpResponse``."""
        arrived, content = answer.arrived, answer.content
        record = self.record if answer.kept else None
        if isinstance(content, BodySource):
            headers = _JSON if arrived is None else dict(arrived.response.headers)
            library = internals.google_library(self.client)
            request = library.Request("POST", self.url.partition("?")[0])
            response = http.streaming(library, content, self.half == "async", request=request)
            weakref.finalize(response, content.leave).atexit = False  # a stream that nobody reads or closes
            _answered.set(_Answered(record, response))
            return internals.google_response(headers, response)
        _answered.set(_Answered(record))
        if arrived is not None:
            return arrived.response
        named = {} if answer.made_by is None else {id_header(self.api): answer.made_by}
        return internals.google_response({**_JSON, **named}, [content.decode()])


class SyncGeminiCall(CallInThread, GeminiCall):
    """A call of the synchronous half of a client."""

    half = "sync"

    def __init__(self, client: Any, *arguments: Any, **parts: Any) -> None:
        super().__init__(client, *arguments, **parts)
        self.receive = client._receive_in_thread  # noqa: SLF001 - it is ours


class CachedApi:
    """Goes in front of the class of the object that makes a client's calls.

    Attributes:
        _cachepipe_origin: the object that this one was copied from; the two share connections.
        _cachepipe_halves: the halves of the client that have asked the cache: ``"sync"`` and ``"async"``.
    """

    _cachepipe: CacheView
    _cachepipe_origin: Any = None
    _cachepipe_halves: set[str]

    def _request(self, http_request: Any, http_options: Any = None, stream: bool = False) -> Any:
        call = SyncGeminiCall.of(self, http_request, http_options, stream=stream)
        if call is not None:
            return call.received(call.known() or call.answer())
        _answered.set(_UNKNOWN)
        sdk: Any = super()
        flow = self._limiting(http_request)
        with _explaining(http_request.url):
            if flow is None:
                return sdk._request(http_request, http_options, stream)  # noqa: SLF001 - its own base
            once = functools.partial(internals.google_once(sdk, False), http_request, stream)
            about = self._passing(http_request, http_options)
            passage, response = flow.call_in_thread(once, wait=in_portal, **about)
        return _ending(Made(passage, None, _as_received(response, stream=stream)), response, stream=stream)

    async def _async_request(self, http_request: Any, http_options: Any = None, stream: bool = False) -> Any:
        call = GeminiCall.of(self, http_request, http_options, stream=stream)
        if call is not None:
            return call.received(call.known() or await call.answer())
        _answered.set(_UNKNOWN)
        sdk: Any = super()
        flow = self._limiting(http_request)
        with _explaining(http_request.url):
            if flow is None:
                return await sdk._async_request(http_request, http_options, stream)  # noqa: SLF001 - its own base
            once = functools.partial(internals.google_once(sdk, True), http_request, stream)
            passage, response = await flow.call(once, **self._passing(http_request, http_options))
        return _ending(Made(passage, None, _as_received(response, stream=stream)), response, stream=stream)

    def _receive_in_thread(self, request: Any, http_options: Any, *, stream: bool, once: bool) -> Received:
        """Make a call through the SDK and return its response as it arrives."""
        sdk: Any = super()
        with _explaining(request.url):
            if once:
                response = internals.google_once(sdk, False)(request, stream)
            else:
                response = sdk._request(request, http_options, stream)  # noqa: SLF001 - its own base
        return _as_received(response, stream=stream)

    async def _receive(self, request: Any, http_options: Any, *, stream: bool, once: bool) -> Received:
        """Make a call through the SDK and return its response as it arrives."""
        sdk: Any = super()
        with _explaining(request.url):
            if once:
                response = await internals.google_once(sdk, True)(request, stream)
            else:
                response = await sdk._async_request(request, http_options, stream)  # noqa: SLF001 - its own base
        return _as_received(response, stream=stream)

    def _limiting(self, request: Any) -> Any:
        """Return the flow control of an uncached call, if the call may generate something.

        Raises:
            UnknownCost: when a budget is set and it may generate something.
        """
        view = self._cachepipe
        if view.budget is not None and wire.api_for(request.method, request.url) is not None:
            raise UnknownCost(
                "a budget is set, and this call was not made: it is not cached, so what it costs cannot be "
                "counted. Make it with a client without a budget"
            )
        return view.flow if request.method.lower() == "post" else None

    def _passing(self, request: Any, http_options: Any) -> dict[str, Any]:
        """Return the arguments for the flow control of a call."""
        namespace = context.current().namespace_of(self._cachepipe.namespace)
        body = request.data if isinstance(request.data, Mapping) else {}
        retries = internals.google_retries(self, http_options)
        return {"body": body, "namespace": namespace, "max_retries": retries}

    # What the SDK's parts call.

    def request_streamed(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        """Iterate over the chunks of a stream; see the SDK."""
        sdk: Any = super()
        chunks = sdk.request_streamed(*arguments, **options)
        answered = None
        try:
            for chunk in chunks:
                answered = answered or _answered.get()
                _answered.set(answered)
                yield chunk
        finally:
            chunks.close()
            if answered is not None and answered.response is not None:
                answered.response.close()

    async def async_request_streamed(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        """Return the chunks of a stream; see the SDK."""
        sdk: Any = super()
        chunks = await sdk.async_request_streamed(*arguments, **options)
        return _noted(chunks, _answered.get())

    def _verify_response(self, response_model: Any) -> None:
        sdk: Any = super()
        sdk._verify_response(response_model)  # noqa: SLF001 - its own base
        if (record := _answered.get().record) is not None:
            info.note(response_model, record)

    def __del__(self) -> None:
        if self._cachepipe_origin is None:  # else the connections are in use
            sdk: Any = super()
            sdk.__del__()


async def _noted(chunks: Any, answered: _Answered) -> AsyncIterator[Any]:
    """Iterate over the chunks of a stream, and note for each which call it belongs to."""
    try:
        async for chunk in chunks:
            _answered.set(answered)
            yield chunk
    finally:
        await chunks.aclose()


@contextlib.contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Report each outage of the server."""
    try:
        yield
    except Exception as error:
        outages.failed(error, url)
        outages.explain(error)
        raise
    outages.reached(url)


def _as_received(response: Any, *, stream: bool) -> Received:
    """Return the SDK's response, with its body unless it is a stream."""
    if not stream:
        return Received(response, {}, (response.response_stream or [""])[0].encode())
    body = response.response_stream
    return Received(body if hasattr(body, "aiter_bytes") else http.ForeignResponse(body), {})


def _ending(made: Made, response: Any, *, stream: bool) -> Any:
    """Return the response of an uncached call, and report when it has been read."""
    if stream and hasattr(response.response_stream, "aiter_bytes"):
        http.when_read(response.response_stream, made.end)
    else:
        made.end_with(b"" if stream else (response.response_stream or [""])[0].encode())
    return response


class _CachedClient(Viewing):
    """What both halves of a client have in common.

    Attributes:
        _cachepipe_origin: the client that this one was copied from; the two share connections.
    """

    _cachepipe_origin: Any = None

    @property
    def _cachepipe(self) -> CacheView:  # type: ignore[override]  # it belongs to the object that makes the calls
        view: CacheView = internals.api_of(self)._cachepipe  # noqa: SLF001 - it is ours
        return view

    def copy(self, **changes: Unpack[CacheOptions]) -> Self:
        """Return this client with other settings of the cache; the two share connections."""
        return self._viewing(view_with(self._cachepipe, dict(changes)))

    def _viewing(self, view: CacheView) -> Self:
        twin: Self = viewing(self, view)
        return twin

    async def _close_half(self, half: str, timeout: float) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight; close the cache unless the other half of the client uses it."""
        halves = internals.api_of(self)._cachepipe_halves  # noqa: SLF001 - it is ours
        halves.discard(half)
        store = self._cachepipe.shared_store
        await (store.drain(timeout) if halves else store.close(timeout))


class CachedClient(_CachedClient):
    """Goes in front of the class of a client."""

    def close(self, *, timeout: float = CLOSING_SECONDS) -> None:
        """Wait for what is in flight, then close the connections of synchronous calls, also those of copies.

        The cache is closed too, unless ``aio`` has used it and is still open.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left.
        """
        if not sys.is_finalizing() and not self._cachepipe.shared_store.closed:
            submit(self._close_half("sync", timeout)).result()
        sdk: Any = super()
        sdk.close()

    def __del__(self) -> None:
        if self._cachepipe_origin is None:  # else the connections are in use
            with contextlib.suppress(Exception):  # as the SDK does
                internals.api_of(self).close()


class CachedAsyncClient(_CachedClient):
    """Goes in front of the class of a client's asynchronous half."""

    async def aclose(self, *, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight, then close the connections of asynchronous calls, also those of copies.

        The cache is closed too, unless the synchronous half has used it and is still open.

        Args:
            timeout: the longest time in seconds to wait for the rest of streams that their readers left.
        """
        if not self._cachepipe.shared_store.closed:
            await self._close_half("async", timeout)
        sdk: Any = super()
        await sdk.aclose()

    def __del__(self) -> None:
        """Close nothing, because copies share the cache and the connections. Version 3.0 of the SDK would."""


class Gemini(CachedClient, genai.Client):
    """``google.genai.Client`` with a cache, for any number of threads; ``aio`` is its asynchronous half.

    Args:
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: the endpoint and its limits, such as ``cachepipe.Services.Gemini(max_requests=50)``; the
            service then schedules and retries calls, not the SDK.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        ordered: for `AsyncGemini` only: hand over the answers in the order of the first run, one at a time,
            so that a rerun of a program with concurrent tasks takes the same course.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``. A call that may exceed it raises ``cachepipe.BudgetExceeded``.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


class AsyncGemini(CachedAsyncClient, genai_client.AsyncClient):
    """The asynchronous half of ``google.genai.Client`` (its ``aio``) with a cache. See `Gemini`.

    It takes the parameters of `Gemini`. Its attribute ``aio`` is the client itself, for programs that use
    ``google.genai.Client(...).aio``.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...

    @property
    def aio(self) -> Self:
        """The client itself."""
        return self


class _Options(CacheOptions, total=False):
    enterprise: bool | None
    vertexai: bool | None
    api_key: str | None
    credentials: Any
    project: str | None
    location: str | None
    debug_config: Any
    http_options: Any


def check_wrappable(client: Any, ordered: Ordered) -> None:
    """Refuse a client that cannot be copied, and an order that it cannot keep.

    Raises:
        TypeError: for a client with a cache or with a replaced method.
        ValueError: when answers are to be handed over in order, and the client has a synchronous half.
    """
    check_uncached(client)
    check_unchanged(internals.replaced_in(client))
    if internals.google_kind(type(client)) == "Client":
        SyncGeminiCall.check_order(ordered)


def _construct(self: Any, **options: Any) -> None:
    _begin(self, options)


def _construct_async(self: Any, **options: Any) -> None:
    owner = object.__new__(Gemini)
    _begin(owner, options, kind=AsyncGemini)
    vars(self).update(vars(owner.aio))
    self._cachepipe_origin = owner  # it has the synchronous connections


def _begin(client: Any, options: dict[str, Any], kind: type = Gemini) -> None:
    """Begin a new client."""
    ours = taken_from(options, kind)
    cache, service = ours.pop("cache"), ours["service"]
    view = cache if isinstance(cache, CacheView) else None
    if kind is Gemini:
        SyncGeminiCall.check_order(ours["ordered"] if view is None else view.ordered)
    replays = context.current().mode_of(ours["mode"] if view is None else view.mode) == "replay"
    if view is None and hasattr(service, "client_options"):
        options = _with_service(options, service.client_options("google", replays=replays))
    try:
        _SDK.__init__(client, **options)
    except ValueError:
        named = ("api_key", "credentials", "vertexai", "enterprise")
        if not replays or any(options.get(name) is not None for name in named):
            raise
        _SDK.__init__(client, **{**options, "api_key": NO_KEY})
    view = CacheView.of(cache, **ours) if view is None else view
    _equip(internals.api_of(client), view)
    _make_cached(client.aio)


def _with_service(options: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a client, with those of its service where the caller gave none."""
    given = {name: value for name, value in options.items() if value is not None}
    own = given.get("http_options") or {}
    own = own if isinstance(own, Mapping) else own.model_dump(exclude_none=True)
    named = {"base_url": its["base_url"], "headers": its.get("default_headers")}
    given["http_options"] = {**{name: value for name, value in named.items() if value}, **own}
    if not given.keys() & {"api_key", "credentials", "vertexai", "enterprise", "project"}:
        given["api_key"] = its["api_key"]
    return given


def _equip(api: Any, view: CacheView) -> None:
    """Give a cache to the object that makes a client's calls."""
    if view.service is not None:
        # The service's token counter may import it in a thread, and google-genai reads half of it meanwhile.
        with contextlib.suppress(ImportError):
            importlib.import_module("requests")
    api._cachepipe, api._cachepipe_halves = view, set()  # noqa: SLF001 - it is ours
    _make_cached(api)


def _make_cached(part: Any) -> None:
    """Make a client of the SDK, or the object that makes its calls, use the cache."""
    kind: Any = type(part)
    part.__class__ = _cached_class(kind)


@functools.lru_cache(maxsize=64)
def _cached_class(kind: Any) -> Any:
    """Return the cached subclass of a class of the SDK, or of one of its subclasses."""
    name = internals.google_kind(kind)
    mixin: Any = {"Client": CachedClient, "AsyncClient": CachedAsyncClient}.get(name, CachedApi)
    if kind is genai_client.AsyncClient:
        return AsyncGemini
    about = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (mixin, kind), about)


def viewing(client: Any, view: CacheView) -> Any:
    """Return a copy of a client of the SDK, with a cache. The two share connections."""
    old = internals.api_of(client)
    new = object.__new__(type(old))
    vars(new).update(vars(old))
    new._cachepipe_origin = old
    if isinstance(old, CachedApi):
        new._cachepipe = view
    else:
        _equip(new, view)
    twin = internals.rebound(client, old, new)
    for each in (twin, getattr(twin, "aio", None)):
        if each is not None and not isinstance(each, _CachedClient):
            _make_cached(each)
    twin._cachepipe_origin = client  # noqa: SLF001 - it is ours
    return twin


class _AskedError(Exception):
    """Carries the request that a client would have sent."""

    def __init__(self, request: Any) -> None:
        super().__init__()
        self.request = request


def request_of(**arguments: Any) -> Any:
    """Return the request that ``models.generate_content`` would send, without sending it.

    It has the attributes ``url``, ``headers`` and ``data``.

    Args:
        arguments: those of the method.

    Raises:
        ValueError: when the SDK refuses the arguments.
    """

    def keep(request: Any, *_: Any, **__: Any) -> None:
        raise _AskedError(request)

    client = _SDK(api_key=NO_KEY, vertexai=False)
    internals.api_of(client)._request = keep  # noqa: SLF001 - where the SDK sends a request
    try:
        client.models.generate_content(**arguments)
    except _AskedError as asked:
        return asked.request
    finally:
        client.close()
    raise AssertionError("the SDK has sent nothing")


for _kind, _made in ((Gemini, _construct), (AsyncGemini, _construct_async)):
    _kind.__init__ = _made  # type: ignore[method-assign]  # it has the SDK's signature
    sign_constructor(_made, _SDK, _kind)
