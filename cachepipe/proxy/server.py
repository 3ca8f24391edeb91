"""The proxy as a server: uvicorn, with what it leaves open closed, in a process or a thread of one's own."""

from __future__ import annotations

import asyncio
import contextlib
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
from cachepipe.proxy.settings import BadSettings, Settings

try:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.server import HANDLED_SIGNALS
except ImportError as error:  # pragma: no cover - it is in the extra
    raise ImportError("the proxy needs more packages: pip install 'cachepipe[proxy]'") from error

_HEAD: Final = 65_536  # bytes of a request's line and headers
_HEAD_SECONDS: Final = 30.0
_IDLE_SECONDS: Final = 75


class _Unframed(int):
    """The length that is expected of a body which ends with its connection: whatever comes."""

    def __sub__(self, other: int) -> Self:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


_UNFRAMED: Final = _Unframed(1 << 62)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, for strangers.

    Heads have a limit and come in time, targets are paths, answers are taken in time or thrown away.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head = 0  # bytes that may be of a head
        self._in_head = True
        self._late: TimerHandle | None = None
        self._stalled: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give a new connection so long for the head of its first request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        self._stop_looking()
        super().connection_lost(exc)

    # A client that takes nothing.

    def pause_writing(self) -> None:
        """Look from time to time whether the client takes what is written, also once nothing is to follow."""
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        """Go on writing."""
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
        """Close an idle connection, whatever of its last answer was never taken."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    # Heads.

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
        """Take bytes; what is no HTTP is answered with 400 and the end of the connection."""
        if self.transport.is_closing() or self.parser is None:
            return
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > _HEAD and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                b"content-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_head = True
        self._await_head()

    def on_headers_complete(self) -> None:
        """Begin to serve a request whose head is whole.

        Raises:
            ValueError: when it names another server; the connection is then ended.
        """
        self._stop_waiting()
        self._in_head, self._head = False, 0
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ValueError("requests are HTTP/1.1")
        if not self.url.startswith(b"/") or self.url.startswith(b"//"):
            raise ValueError("a request names a path")
        if sum(name == b"host" for name, _ in self.headers) > 1:
            raise ValueError("a request names one host")
        lengths = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        if len(lengths) > 1:
            raise ValueError("the length of a body is told once")
        if lengths and lengths[0][0] == b"transfer-encoding" and lengths[0][1].strip().lower() != b"chunked":
            raise ValueError("a body is chunked, and no more")
        super().on_headers_complete()
        if version == "1.0":  # knows no chunks
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UNFRAMED


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
                http=Protocol,
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

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at a signal, and then end as a server that was asked to: with the exit code 0."""
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and finish those that are there."""
        self.proxy.stopping()
        await super().shutdown(sockets)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(settings: Settings) -> socket.socket:
    """Return a socket that listens where the settings say.

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
            f"{settings.host}:{settings.port} cannot be listened on: {error}; give another --host or --port"
        ) from error
    listener.set_inheritable(False)
    return listener


def _hush() -> None:
    """Let the proxy's own log speak of what uvicorn notices too, such as answers that were broken off."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def serve(settings: Settings, told: Callable[[str], None] | None = None) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM), then finish what is in flight.

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
    try:
        with warnings.catch_warnings():
            warnings.showwarning = proxy.log.warned
            Server(proxy, told).run(sockets=[listener])
    finally:
        listener.close()


@contextlib.contextmanager
def running(settings: Settings, log: Callable[[Mapping[str, Any]], None] | None = None) -> Iterator[Server]:
    """Run a proxy on a loop of its own, in a thread, while the context is entered.

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
