"""The HTTP/1.1 protocol of the proxy: uvicorn's with stricter limits, and a fast path for known heads."""

from __future__ import annotations

import asyncio
import functools
from asyncio.events import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from typing import Any, Final, Self

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cachepipe.proxy.app import Proxy
from cachepipe.proxy.body_cache import ParsedBody
from cachepipe.proxy.head_cache import HEAD, ParsedHead, is_plain, split_head
from cachepipe.proxy.headers import named_by_connection
from cachepipe.proxy.http_exchange import CONNECTION, KEEP_ALIVE

_MOST_HEAD: Final = 65_536  # bytes of a request's line and headers
_HEAD_SECONDS: Final = 30.0
_END: Final = b"\r\n\r\n"
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_BODY_SECONDS: Final = 1.0  # a body that takes longer is parsed the normal way


class _Timer:
    """A timer that can be started and stopped again and again."""

    def __init__(self) -> None:
        self._handle: TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(
        self, loop: AbstractEventLoop, seconds: float, call: Callable[..., None], *arguments: Any
    ) -> None:
        self.stop()
        self._handle = loop.call_later(seconds, call, *arguments)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class _Unframed(int):
    """The expected length of a body that ends with its connection: equal to any length."""

    def __sub__(self, other: int) -> Self:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


_UNFRAMED: Final = _Unframed(1 << 62)


class _Gathered:
    """A stand-in for a transport that gathers the head and the body of an answer, to write them together."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> None:
        self._parts.append(part)

    def close(self) -> None:
        self.flush()
        self.transport.close()

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self.transport.write(b"".join(parts))


class _Cycle(RequestResponseCycle):
    """A request with a known head and body; the head of its answer is written with the first of the body."""

    async def send(self, message: Any) -> None:
        transport: Any = self.transport
        if message["type"] == "http.response.start":
            transport = self.transport = _Gathered(transport)  # type: ignore[assignment]
            await super().send(message)
            return
        await super().send(message)
        if isinstance(transport, _Gathered):
            transport.flush()
            self.transport = transport.transport


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, hardened for untrusted clients.

    It limits the size and the time of heads, accepts only paths as targets, and drops answers that a client
    does not read in time.

    Attributes:
        lost: whether the connection has ended.
        leaving: functions that are called when it ends.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_size = 0  # bytes of the head that is being parsed
        self._in_head = True
        self._head_pieces = bytearray()  # the part of a head that is not parsed yet
        self._tail = b""  # the last bytes that came
        self._since_body = 0  # bytes parsed since the last byte of a body
        self._resuming = False  # whether the parser is given a head that was parsed before
        self._head_timer = _Timer()
        self._stall_timer = _Timer()
        self._proxy: Proxy = self.config.app  # type: ignore[assignment]
        self._at_start = True  # whether the parser is between two requests
        self._head_name: bytes | None = None  # the name of the head that the parser is given
        self._held = bytearray()  # a known head, while its body arrives
        self._awaited = 0  # the length of the known head and its body
        self._body_timer = _Timer()
        self._used = 0.0  # when a request was last answered at once
        self.lost = False
        self.leaving: set[Callable[[], None]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the head of a new connection's first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and tell those who wait for that."""
        self._head_timer.stop()
        self._stall_timer.stop()
        self._take_held()
        super().connection_lost(exc)
        self.lost = True
        for leave in list(self.leaving):
            leave()

    # Clients that do not read.

    def pause_writing(self) -> None:
        """Check from time to time that the client reads what is written, also after the last byte."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Continue writing."""
        self._stall_timer.stop()
        super().resume_writing()

    def _watch_reading(self) -> None:
        patience = self._proxy.settings.client_timeout
        left = self.transport.get_write_buffer_size()
        self._stall_timer.start(self.loop, patience, self._check_reading, left)

    def _check_reading(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_reading()
        else:  # closing would wait until the client has read everything
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its last answer was not read completely."""
        left = self._used + self.timeout_keep_alive - self.loop.time()
        if left > 0 or self._held:  # a request was answered at once since the timer was set
            self._wait_idle(left if left > 0 else _BODY_SECONDS)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # Heads.

    def _start_head_timer(self) -> None:
        if not self._head_timer.runs:
            self._head_timer.start(self.loop, _HEAD_SECONDS, self._close_late)

    def _close_late(self) -> None:
        self._head_timer.stop()
        if not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Take bytes; answer bytes that are not HTTP with 400, and close the connection."""
        if self.transport.is_closing() or self.parser is None:
            return
        if self._held:
            self._held += data
            if len(self._held) < self._awaited:
                return
            data = self._take_held()
        if not (self._at_start and self._at_once(data)):
            self._parse(data)

    def _at_once(self, data: bytes) -> bool:
        """Answer a request with a known head, or wait for its body; otherwise parse it."""
        begun = None if self._is_busy() else split_head(data)
        if begun is None:
            return False
        head = self._proxy.heads.get(begun.name)
        if head is None:
            self._head_name = begun.name
            return False
        missing = begun.end + begun.size - len(data)
        if missing > 0:
            self._head_timer.stop()
            self._held += data
            self._awaited = begun.end + begun.size
            self._body_timer.start(self.loop, _BODY_SECONDS, self._parse_held)
            return True
        if missing < 0 or len(self.connections) > self._proxy.settings.max_connections:
            return False
        written = self._proxy.at_once(head, data[begun.end :], self)
        if written is None:
            return False
        self._head_timer.stop()
        if isinstance(written, ParsedBody):
            self._serve_parsed(head, written)
        else:
            self._write_at_once(written)
        return True

    def _write_at_once(self, written: bytes) -> None:
        self._used = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_idle(self.timeout_keep_alive)
        self.transport.write(written)

    def _is_busy(self) -> bool:
        """Return True while an earlier answer is not complete, or the client does not read it."""
        cycle = self.cycle
        return (cycle is not None and not cycle.response_complete) or self.flow.write_paused

    def _serve_parsed(self, head: ParsedHead, body: ParsedBody) -> None:
        """Begin to serve a request with a known head and body, as if they had been parsed."""
        self._unset_keepalive_if_required()
        scope: Any = {"type": "http", "http_version": "1.1", CONNECTION: self, **head.scope}
        self.cycle = _Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        app: Any = functools.partial(self._proxy.serve_parsed, head, body)
        task = self.loop.create_task(self.cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _take_held(self) -> bytes:
        """Return the bytes of the request whose body arrives, and forget them."""
        self._body_timer.stop()
        held, self._held = bytes(self._held), bytearray()
        return held

    def _parse_held(self) -> None:
        held = self._take_held()
        if held and not self.transport.is_closing():
            self._parse(held)

    def _wait_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def shutdown(self) -> None:
        """Close the connection once the requests that have begun are answered."""
        self._parse_held()
        super().shutdown()

    def _parse(self, data: bytes) -> None:
        self._at_start = False
        if self._in_head:
            data = self._gathered_head(data)
            if not data:
                return
        else:
            self._tail = data[-3:]
        self._unset_keepalive_if_required()
        self._since_body += len(data)
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserError:
            if self._head_size > _MOST_HEAD:
                self._refuse_head()
            else:
                self.send_400_response("Invalid HTTP request received.")
            return
        self._head_name = None
        if not self._at_start and not self._in_head and self._since_body > _MOST_HEAD:
            self._refuse_head()

    def _gathered_head(self, data: bytes) -> bytes:
        """Return the bytes of a head to parse now, or none yet.

        The parser gets the first piece at once, and then the end of the head or as many bytes as it has had.
        So its cost is linear in the size of the head, however many pieces the head comes in.
        """
        ends = _END in self._tail + data
        self._tail = (self._tail + data)[-3:]
        self._head_pieces += data
        if not ends and self._since_body + len(self._head_pieces) > _MOST_HEAD:
            self._refuse_head()
            return b""
        if not ends and len(self._head_pieces) < self._since_body:
            return b""
        pieces, self._head_pieces = bytes(self._head_pieces), bytearray()
        return pieces

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                b"content-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()

    def _feed(self, data: memoryview) -> None:
        """Parse bytes, and ignore an offer to change to another protocol (RFC 9110, 7.8)."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self.scope["method"] == "CONNECT":  # the proxy refuses it, and what follows is not HTTP
                    return
                data = data[upgrade.args[0] :]
                self._resume()
            else:
                return

    def _resume(self) -> None:
        """Continue with the body of a request if the parser has stopped after the head."""
        framing = b"".join(b"%b: %b\r\n" % pair for pair in self.headers if pair[0] in _FRAMING)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._resuming = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        finally:
            self._resuming = False

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._resuming:
            return
        super().on_message_begin()
        self._at_start = False
        self._in_head = True
        self._head_size = self._since_body = 0
        self._start_head_timer()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        if not self._resuming:
            self._count(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; ignore the trailers of a body."""
        if self._in_head and not self._resuming:
            self._count(len(name) + len(value) + 3)
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > _MOST_HEAD:
            raise ValueError(f"the head of a request must not have more than {_MOST_HEAD} bytes")

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._since_body = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Begin to serve a request once its head is complete.

        Raises:
            ValueError: when it names another server; the connection is then closed.
        """
        if self._resuming:
            return
        self._head_timer.stop()
        self._in_head = False
        self._since_body = 0
        version, named = self.parser.get_http_version(), dict(self.headers)
        self._check_head(version, named)
        if self._head_name is not None and b"content-length" in named:
            self._remember_head(self._head_name)
        self._head_name = None
        keeps = self.parser.should_keep_alive() and b"close" not in named_by_connection(self.headers)
        self.scope[CONNECTION] = self  # type: ignore[typeddict-unknown-key]
        if version == "1.0" and keeps:
            self.scope[KEEP_ALIVE] = True  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        if version == "1.0":  # knows no chunks
            self.cycle.keep_alive = keeps
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UNFRAMED

    def _check_head(self, version: str, named: dict[bytes, bytes]) -> None:
        """Raise an error for a head that another server may read differently."""
        names = [name for name, _ in self.headers]
        if version not in ("1.0", "1.1"):
            raise ValueError("requests must be HTTP/1.1")
        if not self.url.startswith(b"/"):
            raise ValueError("the target of a request must be a path")
        if names.count(b"host") > 1:
            raise ValueError("a request must name one host")
        if sum(map(names.count, _FRAMING)) > 1:
            raise ValueError("a request must state the length of its body only once")
        if named.get(b"transfer-encoding", b"chunked").strip().lower() != b"chunked":
            raise ValueError("a body must have no other transfer encoding than chunked")

    def _remember_head(self, name: bytes) -> None:
        """Cache the parsed head, unless a header concerns the connection."""
        parser = self.parser
        if (
            is_plain(name)
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
            and not self.expect_100_continue
        ):
            self.scope[HEAD] = name  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        """Note that a request is complete."""
        if self.parser.should_upgrade() and self.scope["method"] != "CONNECT":
            return  # its body follows
        super().on_message_complete()
        self._at_start = True
        self._since_body = 0
