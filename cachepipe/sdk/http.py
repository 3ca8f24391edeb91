"""HTTP responses for the SDKs to parse: made from samples, or handed on with the body of a recording.

The SDKs run on two HTTP libraries with the same classes, ``httpx2`` and ``httpx``.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import importlib
import inspect
import select
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from cachepipe.providers.responses import BodySource
from cachepipe.sdk.internals import RAW, http_of

_DROPPED = frozenset({"content-length", "transfer-encoding", "content-encoding"})
"""Headers that describe the bytes on the wire, not the decoded bytes."""


def library_of(client: Any) -> Any:
    """Return the HTTP library that a client runs on, ``httpx2`` or ``httpx``."""
    return _library_of(http_of(client).__class__, client.base_url.__class__)


@functools.lru_cache(maxsize=64)
def _library_of(http: Any, url: Any) -> Any:
    roots = (kind.__module__.partition(".")[0] for kind in (*http.__mro__, url))
    return importlib.import_module(next(root for root in roots if root in ("httpx2", "httpx")))


def unread(response: Any) -> bool:
    """Return True if the body of a response was not read yet."""
    try:
        response.content  # noqa: B018 - it raises
    except RuntimeError:  # the HTTP library's ResponseNotRead
        return True
    return False


def made_response(
    client: Any, url: str, options: Any, content: bytes | BodySource, named: Mapping[str, str]
) -> Any:
    """Return a response without a call, with the request that it would have answered.

    Its headers contain its type and, if known, the id of the call that made its samples: ``named``. It needs
    neither credentials nor the SDK's preparations.
    """
    library = library_of(client)
    request = library.Request(options.method.upper(), url, headers=_call_headers(options))
    raw = request.headers.get(RAW)
    headers = {"content-type": "application/json", **named}
    if isinstance(content, bytes) and raw != "stream":
        response = library.Response(200, headers=headers, content=content, request=request)
    else:
        if isinstance(content, bytes):
            content = BodySource([content])
        else:
            headers["content-type"] = "text/event-stream; charset=utf-8"
        response = streaming(library, content, _is_async(client), headers=headers, request=request)
    response.elapsed = dt.timedelta(0)
    return response


def streaming(library: Any, source: BodySource, asynchronous: bool, **parts: Any) -> Any:
    """Return a response with status 200 that reads its body from a source.

    Args:
        library: the HTTP library.
        source: its body.
        asynchronous: whether it is read on an event loop.
        parts: the other arguments of the library's ``Response``.
    """
    response = library.Response(200, stream=_body_class(library, asynchronous)(source), **parts)
    _watch_closing(response, source.closing)
    return response


def handed_on(client: Any, response: Any, source: BodySource) -> Any:
    """Return a response like the one that arrived, with a body from a source."""
    began = time.monotonic()

    def ended() -> None:
        whole = reference()
        if whole is not None:
            whole.elapsed = _elapsed(response, began)

    made = library_of(client).Response(
        response.status_code,
        headers=[pair for pair in response.headers.multi_items() if pair[0].lower() not in _DROPPED],
        stream=_body(client, source, ended),
        request=response.request,
        extensions=response.extensions,
    )
    reference = weakref.ref(made)
    _watch_closing(made, source.closing)
    made.history = response.history
    weakref.finalize(made, source.leave).atexit = False  # a stream that nobody reads or closes
    return made


def when_read(response: Any, end: Callable[[], None]) -> None:
    """Call a function once a response has been read to its end, was closed, or is not referenced any more.

    Args:
        response: the HTTP response.
        end: the function, which may be called more than once; it must not refer to the response.
    """
    if response.is_closed:
        end()
        return
    _watch_closing(response, closed=end)
    weakref.finalize(response, end).atexit = False


def _nothing() -> None:
    pass


def _watch_closing(
    response: Any, closing: Callable[[], None] = _nothing, closed: Callable[[], None] = _nothing
) -> None:
    """Call functions before and after a response is closed, also by the HTTP library or more than once."""
    reference = weakref.ref(response)

    @contextlib.contextmanager
    def watched() -> Iterator[Any]:
        closing()
        try:
            yield reference()
        finally:
            closed()

    def close() -> None:
        with watched() as whole:
            if whole is not None:
                type(whole).close(whole)

    async def aclose() -> None:
        with watched() as whole:
            if whole is not None:
                await type(whole).aclose(whole)

    response.close, response.aclose = close, aclose


def _call_headers(options: Any) -> dict[str, str]:
    """Return the headers of one call, without those that it removes."""
    headers = options.headers
    if not isinstance(headers, Mapping):
        return {}
    return {name: value for name, value in headers.items() if isinstance(value, str)}


def _elapsed(response: Any, began: float) -> dt.timedelta:
    """Return how long a response took; for one that is still being read, the time since it began."""
    try:
        elapsed: dt.timedelta = response.elapsed
    except RuntimeError:
        return dt.timedelta(seconds=time.monotonic() - began)
    return elapsed


@functools.lru_cache(maxsize=8)
def _body_class(library: Any, asynchronous: bool) -> Callable[..., Any]:
    """Return the class of bodies for the responses of a kind of client.

    A body is read either synchronously or asynchronously, like one that has arrived.
    """

    class Body:
        def __init__(self, source: BodySource, ended: Callable[[], None] = _nothing) -> None:
            self.source = source
            self.ended = ended

    class SyncBody(Body, library.SyncByteStream):  # type: ignore[misc]  # chosen at run time
        def __iter__(self) -> Iterator[bytes]:
            return self.source.read()

        def close(self) -> None:
            self.source.leave()
            self.ended()

    class AsyncBody(Body, library.AsyncByteStream):  # type: ignore[misc]  # likewise
        def __aiter__(self) -> AsyncIterator[bytes]:
            return self.source.aread()

        async def aclose(self) -> None:
            await self.source.aleave()
            self.ended()

    return AsyncBody if asynchronous else SyncBody


def _body(client: Any, *arguments: Any) -> Any:
    return _body_class(library_of(client), _is_async(client))(*arguments)


def _is_async(client: Any) -> bool:
    return isinstance(http_of(client), library_of(client).AsyncClient)


def ease_probes(client: Any) -> None:
    """Make the probes of idle connections cheap, in an asynchronous HTTP client that the SDK has made.

    The pool probes each idle connection whenever a call begins or ends. After a large transaction many
    connections are idle, and finding the socket, which never changes, takes most of a probe's time.
    """
    backend = http_of(client)
    for name in ("_transport", "_pool", "_network_backend"):
        backend = getattr(backend, name, None)
    connect = getattr(backend, "connect_tcp", None)
    if not inspect.iscoroutinefunction(connect):
        return

    async def connect_tcp(*arguments: Any, **options: Any) -> Any:
        return _eased(await connect(*arguments, **options))

    backend.connect_tcp = connect_tcp


def _eased(stream: Any) -> Any:
    """Return a connection that looks its socket up once, with or without TLS."""
    about, start_tls, socket = stream.get_extra_info, stream.start_tls, stream.get_extra_info("socket")
    if not hasattr(select, "poll") or socket is None or socket.fileno() < 0:
        return stream
    poller = select.poll()
    poller.register(socket.fileno(), select.POLLIN)

    def get_extra_info(info: str) -> Any:
        if info == "is_readable":
            return socket.fileno() < 0 or bool(poller.poll(0))
        return about(info)

    async def started_tls(*arguments: Any, **options: Any) -> Any:
        return _eased(await start_tls(*arguments, **options))

    stream.get_extra_info, stream.start_tls = get_extra_info, started_tls
    return stream


class ForeignResponse:
    """A streamed response of requests or aiohttp, with the methods of the other HTTP libraries."""

    http_version = "HTTP/1.1"

    def __init__(self, response: Any) -> None:
        self.response = response
        self.headers = response.headers
        self.is_closed = False

    def iter_bytes(self) -> Iterator[bytes]:
        """Iterate over the body in a thread."""
        chunks: Iterator[bytes] = self.response.iter_content(chunk_size=512)  # as google-genai reads it
        return chunks

    async def aiter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the body on a loop."""
        async for chunk in self.response.content.iter_any():
            yield chunk

    def close(self) -> None:
        """Close the connection."""
        self.is_closed = True
        self.response.close()

    async def aclose(self) -> None:
        """Release the connection; aiohttp closes it unless the body was read to its end."""
        self.is_closed = True
        self.response.release()
