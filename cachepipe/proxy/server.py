"""The proxy as a server: uvicorn, in a process or a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import encodings.idna  # noqa: F401 - the first call upstream would import it
import gc
import logging
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Final

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from cachepipe.addresses import in_url, name_for_others
from cachepipe.errors import CachepipeError
from cachepipe.proxy.app import Proxy
from cachepipe.proxy.http_protocol import HttpProtocol
from cachepipe.proxy.log import RequestLog
from cachepipe.proxy.settings import BadSettings, ProxySettings

_IDLE_SECONDS: Final = 75
_COLLECTIONS: Final = (1_000, 5, 500)
"""New objects until the youngest are collected, and such collections until the next older ones are.

With the defaults of Python, each tenth collection of the young stops all requests for some milliseconds, and
one of all objects for tens of them. What requests leave behind is free without a collection, but for a few
cycles.
"""


class Server(uvicorn.Server):
    """A server for one proxy.

    Args:
        proxy: the application.
        on_listening: is called once with the server's address when it listens.
    """

    protocol: type[HttpProtocol] = HttpProtocol

    def __init__(self, proxy: Proxy, on_listening: Callable[[str], None] | None = None) -> None:
        settings = proxy.settings
        super().__init__(
            uvicorn.Config(
                proxy,
                http=self.protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.max_connections + 1,  # it counts the asking connection
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) or 1,
                backlog=2048,
            )
        )
        self.proxy = proxy
        self.url = ""
        self._on_listening = on_listening
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
            self.url = url_of(sockets[0])
            if self._on_listening is not None:
                try:
                    self._on_listening(self.url)
                except BaseException:
                    await self.shutdown(sockets)  # a loop with open sockets may not close
                    raise

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop at a signal; at a second Ctrl-C, give up what is in flight."""
        super().handle_exit(sig, frame)
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self.proxy.give_up)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and finish those in flight."""
        self.proxy.stopping()
        await super().shutdown(sockets)


def url_of(listener: socket.socket) -> str:
    """Return the URL of a proxy that listens on a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{in_url(name_for_others(host))}:{port}"


def listen(settings: ProxySettings) -> socket.socket:
    """Return a socket that listens at the address in the settings.

    Raises:
        BadSettings: when it cannot.
    """
    host = settings.host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
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


def silence_uvicorn() -> None:
    """Pass uvicorn's own messages, such as interrupted answers, to the proxy's log."""
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def keep_pauses_short() -> None:
    """Let garbage collection skip what start-up made, and run less often.

    A full collection that visits all modules stops every request for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


def serve(settings: ProxySettings, on_listening: Callable[[str], None] | None = None) -> None:
    """Serve until the process receives SIGINT or SIGTERM, then finish what is in flight.

    Args:
        settings: the settings of the proxy.
        on_listening: is called once with the server's address when it listens.

    Raises:
        BadSettings: when it cannot be started with these settings.
        StoreError: when the cache cannot be opened.
    """
    silence_uvicorn()
    proxy = Proxy(settings)
    listener = listen(settings)

    def listening(url: str) -> None:
        keep_pauses_short()
        if on_listening is not None:
            on_listening(url)

    try:
        with logged(proxy.log):
            Server(proxy, listening).run(sockets=[listener])
    finally:
        listener.close()


@contextlib.contextmanager
def logged(log: RequestLog) -> Iterator[None]:
    """Write what the library logs and warns of to the log of a proxy, within a context."""
    logger, handler = logging.getLogger("cachepipe"), log.handler()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = log.warned
            yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def running(
    settings: ProxySettings, log: Callable[[Mapping[str, Any]], None] | None = None
) -> Iterator[Server]:
    """Run a proxy on its own loop, in a thread, within a context.

    Args:
        settings: the settings of the proxy.
        log: takes the log entries.

    Raises:
        BadSettings: when it cannot be started with these settings.
        StoreError: when the cache cannot be opened.
    """
    silence_uvicorn()
    listening = threading.Event()
    failures: list[BaseException] = []
    server = Server(Proxy(settings, log), lambda _: listening.set())
    listener = listen(settings)

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
