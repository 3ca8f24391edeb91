"""The proxy as a server: uvicorn with stricter limits, in a process or a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import signal
import socket
import threading
import warnings
from asyncio.events import TimerHandle
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Final, Self

from cachepipe.errors import CachepipeError
from cachepipe.proxy.app import Proxy
from cachepipe.proxy.body_cache import ParsedBody
from cachepipe.proxy.head_cache import HEAD, ParsedHead, is_plain, split_head
from cachepipe.proxy.headers import named_by_connection
from cachepipe.proxy.http_exchange import KEEP_ALIVE, ONE_MESSAGE
from cachepipe.proxy.settings import BadSettings, ProxySettings

try:
    import httptools
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
    from uvicorn.server import HANDLED_SIGNALS
except ImportError as error:  # pragma: no cover - it is in the extra
    needed = f"the proxy needs {error.name}: pip install 'cachepipe[proxy]'"
    raise ImportError(needed, name=error.name) from error

_HEAD: Final = 65_536  # bytes of a request's line and headers
_HEAD_SECONDS: Final = 30.0
_IDLE_SECONDS: Final = 75
_END: Final = b"\r\n\r\n"
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_BODY_SECONDS: Final = 1.0  # a body that takes longer goes the ordinary way


class _Unframed(int):
    """The expected length of a body that ends with its connection: any."""

    def __sub__(self, other: int) -> Self:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


_UNFRAMED: Final = _Unframed(1 << 62)


class _Gathered:
    """A stand-in for a transport that gathers the parts of one answer, to write them together."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> None:
        self._parts.append(part)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))


class _Cycle(RequestResponseCycle):
    """A request with a known head and body; an answer in one message is written in one piece."""

    async def send(self, message: Any) -> None:
        if not message.get(ONE_MESSAGE):
            await super().send(message)
            return
        transport = self.transport
        gathered: Any = _Gathered(transport)
        self.transport = gathered
        try:
            start: Any = {**message, "type": "http.response.start"}
            await super().send(start)
            await super().send({"type": "http.response.body", "body": message["body"]})
            gathered.flush()
        finally:
            self.transport = transport


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, hardened for untrusted clients.

    It limits the size and the time of heads, accepts only paths as targets, and drops answers that a client
    does not read in time.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head = 0  # bytes of the head that is being parsed
        self._in_head = True
        self._pieces = bytearray()  # of a head, not parsed yet
        self._tail = b""  # the last bytes that came
        self._silent = 0  # bytes parsed since the last of a body
        self._resuming = False  # the parser is given a head that was parsed before
        self._late: TimerHandle | None = None
        self._stalled: TimerHandle | None = None
        self._proxy: Proxy = self.config.app  # type: ignore[assignment]
        self._between = True  # the parser has no part of a request
        self._name: bytes | None = None  # of the head that it is given
        self._held = bytearray()  # a head that was served before, while its body comes
        self._awaited = 0  # bytes that it and its body have together
        self._patience: TimerHandle | None = None
        self._used = 0.0  # when a request was last answered at once

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the head of a new connection's first request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_waiting()
        self._stop_looking()
        self._let_go()
        super().connection_lost(exc)

    # A client that takes nothing.

    def pause_writing(self) -> None:
        """Check from time to time that the client reads what is written, also after the last byte."""
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        """Continue writing."""
        self._stop_looking()
        super().resume_writing()

    def _look_again(self) -> None:
        self._stop_looking()
        patience = self.config.app.settings.client_timeout  # type: ignore[union-attr]  # a proxy
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(patience, self._look, left)

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._look_again()
        else:  # closing would wait until all is taken
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its last answer was not read completely."""
        left = self._used + self.timeout_keep_alive - self.loop.time()
        if left > 0 or self._held:  # it was used without the timer's knowledge
            self._wait_idle(left if left > 0 else _BODY_SECONDS)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # HeadCache.

    def _await_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(_HEAD_SECONDS, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
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
            data = self._let_go()
        if not (self._between and self._at_once(data)):
            self._parse(data)

    def _at_once(self, data: bytes) -> bool:
        """Answer a request with a known head, or wait for its body; otherwise parse it."""
        cycle = self.cycle
        if (cycle is not None and not cycle.response_complete) or self.flow.write_paused:
            return False
        begun = split_head(data)
        if begun is None:
            return False
        head = self._proxy.heads.get(begun.name)
        if head is None:
            self._name = begun.name
            return False
        missing = begun.end + begun.size - len(data)
        if missing > 0:
            self._stop_waiting()
            self._held += data
            self._awaited = begun.end + begun.size
            self._patience = self.loop.call_later(_BODY_SECONDS, self._too_slow)
            return True
        if missing < 0 or len(self.connections) > self._proxy.settings.max_connections:
            return False
        written = self._proxy.at_once(head, data[begun.end :], self)
        if written is None:
            return False
        self._stop_waiting()
        if isinstance(written, ParsedBody):
            self._go_on(head, written)
            return True
        self._used = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_idle(self.timeout_keep_alive)
        self.transport.write(written)
        return True

    def _go_on(self, head: ParsedHead, read: ParsedBody) -> None:
        """Begin to serve a request with a known head and body, as if they had been parsed."""
        self._unset_keepalive_if_required()
        scope: Any = {"type": "http", "http_version": "1.1", ONE_MESSAGE: True, **head.scope}
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
        app: Any = functools.partial(self._proxy.go_on, head, read)
        task = self.loop.create_task(self.cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _let_go(self) -> bytes:
        """Return the held bytes, and hold none."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        held, self._held = bytes(self._held), bytearray()
        return held

    def _too_slow(self) -> None:
        held = self._let_go()
        if held and not self.transport.is_closing():
            self._parse(held)

    def _wait_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def shutdown(self) -> None:
        """Close the connection once the requests that have begun are answered."""
        if self._held:
            self._parse(self._let_go())
        super().shutdown()

    def _parse(self, data: bytes) -> None:
        self._between = False
        if self._in_head:
            data = self._gathered(data)
            if not data:
                return
        else:
            self._tail = data[-3:]
        self._unset_keepalive_if_required()
        self._silent += len(data)
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserError:
            if self._head > _HEAD:
                self._refuse_head()
            else:
                self.send_400_response("Invalid HTTP request received.")
            return
        self._name = None
        if not self._between and not self._in_head and self._silent > _HEAD:  # chunk extensions, trailers
            self._refuse_head()

    def _gathered(self, data: bytes) -> bytes:
        """Return the bytes of a head to parse now, or none yet.

        The parser gets the first piece at once, and then the end of the head or as many bytes as it has had.
        So its cost is linear in the size of the head, however many pieces the head comes in.
        """
        ends = _END in self._tail + data
        self._tail = (self._tail + data)[-3:]
        self._pieces += data
        if not ends and self._silent + len(self._pieces) > _HEAD:
            self._refuse_head()
            return b""
        if not ends and len(self._pieces) < self._silent:
            return b""
        pieces, self._pieces = bytes(self._pieces), bytearray()
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
                if self.scope["method"] == "CONNECT":  # it is refused, and what follows is not HTTP
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
        self._between = False
        self._in_head = True
        self._head = self._silent = 0
        self._await_head()

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
        self._head += size
        if self._head > _HEAD:
            raise ValueError(f"the head of a request must not have more than {_HEAD} bytes")

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._silent = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Begin to serve a request once its head is complete.

        Raises:
            ValueError: when it names another server; the connection is then closed.
        """
        if self._resuming:
            return
        self._stop_waiting()
        self._in_head = False
        self._silent = 0
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ValueError("requests must be HTTP/1.1")
        if not self.url.startswith(b"/"):
            raise ValueError("the target of a request must be a path")
        if sum(name == b"host" for name, _ in self.headers) > 1:
            raise ValueError("a request must name one host")
        lengths = [pair for pair in self.headers if pair[0] in _FRAMING]
        if len(lengths) > 1:
            raise ValueError("a request must state the length of its body only once")
        if lengths and lengths[0][0] == b"transfer-encoding" and lengths[0][1].strip().lower() != b"chunked":
            raise ValueError("a body must have no other transfer encoding than chunked")
        if self._name is not None and [name for name, _ in lengths] == [b"content-length"]:
            self._learn(self._name)
        self._name = None
        keeps = self.parser.should_keep_alive() and b"close" not in named_by_connection(self.headers)
        if version == "1.0" and keeps:
            self.scope[KEEP_ALIVE] = True  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        if version == "1.0":  # knows no chunks
            self.cycle.keep_alive = keeps
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UNFRAMED

    def _learn(self, name: bytes) -> None:
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
        self._between = True
        self._silent = 0


class Server(uvicorn.Server):
    """A server for one proxy.

    Args:
        proxy: the application.
        told: is called once with the server's address when it listens.
    """

    def __init__(self, proxy: Proxy, told: Callable[[str], None] | None = None) -> None:
        settings = proxy.settings
        super().__init__(
            uvicorn.Config(
                proxy,
                http=HttpProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.max_connections + 1,  # it counts the one that asks
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) or 1,
                backlog=2048,
            )
        )
        self.proxy = proxy
        self.url = ""
        self._told = told
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at a signal, with the exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await self.proxy.startup()
        try:
            await super()._serve(sockets)
        finally:
            await self.proxy.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if sockets and self.started:
            self.url = _url(sockets[0])
            if self._told is not None:
                self._told(self.url)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop at a signal; at a second Ctrl-C, give up what is in flight."""
        super().handle_exit(sig, frame)
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self.proxy.hurry)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and finish those in flight."""
        self.proxy.stopping()
        await super().shutdown(sockets)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(settings: ProxySettings) -> socket.socket:
    """Return a socket that listens at the address in the settings.

    Raises:
        BadSettings: when it cannot.
    """
    host = settings.host.strip("[]")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, settings.port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise BadSettings(
            f"cannot listen on {settings.host}:{settings.port}: {error}; give another --host or --port"
        ) from error
    listener.set_inheritable(False)
    return listener


def _hush() -> None:
    """Pass uvicorn's own messages, such as interrupted answers, to the proxy's log."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def serve(settings: ProxySettings, told: Callable[[str], None] | None = None) -> None:
    """Serve until the process receives SIGINT or SIGTERM, then finish what is in flight.

    Args:
        settings: how the proxy is set.
        told: is called once with the server's address when it listens.

    Raises:
        BadSettings: when it cannot be started so.
        StoreError: when the cache cannot be opened.
    """
    for name in ("httpx2", "httpcore2"):  # they would log URLs, in whose queries some show their keys
        logging.getLogger(name).setLevel(logging.WARNING)
    _hush()
    proxy = Proxy(settings)
    listener = listen(settings)
    logger, handler = logging.getLogger("cachepipe"), proxy.log.handler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = proxy.log.warned
            Server(proxy, told).run(sockets=[listener])
    finally:
        logger.removeHandler(handler)
        listener.close()


@contextlib.contextmanager
def running(
    settings: ProxySettings, log: Callable[[Mapping[str, Any]], None] | None = None
) -> Iterator[Server]:
    """Run a proxy on its own loop, in a thread, within a context.

    Args:
        settings: how it is set.
        log: takes what is logged.

    Raises:
        BadSettings: when it cannot be started so.
        StoreError: when the cache cannot be opened.
    """
    _hush()
    listener = listen(settings)
    listening = threading.Event()
    failures: list[BaseException] = []
    try:
        server = Server(Proxy(settings, log), lambda _: listening.set())
    except BaseException:
        listener.close()
        raise

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except BaseException as error:  # noqa: BLE001 - it is raised where it can be heard
            failures.append(error)
        finally:
            listener.close()
            listening.set()

    thread = threading.Thread(target=run, name="cachepipe-proxy", daemon=True)
    thread.start()
    listening.wait()
    try:
        if failures:
            raise failures[0]
        yield server
    finally:
        server.should_exit = True
        thread.join()
    if failures:
        raise CachepipeError("the proxy has failed") from failures[0]
