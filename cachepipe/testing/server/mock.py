"""The server as tests, demos and benchmarks use it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cachepipe.testing.ngram import default_model
from cachepipe.testing.server.connection import HttpConnection
from cachepipe.testing.server.responder import Responder
from cachepipe.testing.server.settings import Settings
from cachepipe.testing.server.stats import MockStats
from cachepipe.testing.server.traffic import Traffic

if TYPE_CHECKING:
    from cachepipe.testing.ngram import NGramModel

__all__ = ["MockServer", "run_server"]


class MockServer:
    """A model server for tests, demos and benchmarks, which listens within its context.

    Use it with ``async with`` in a running event loop, or with ``with MockServer.in_thread(…)`` from
    code without one. Its properties may be used from any thread.

    Args:
        settings: The settings.
        host: The interface to listen on.
        port: The port, 0 for any free one.
        model: The model that answers; by default the built-in one.
        clock: The monotonic clock, in seconds, of the rate limit.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: NGramModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = settings or Settings()
        self.model = model or default_model()
        self.stats = MockStats(settings.log_size)
        self._host, self._port = host, port
        self._responder = Responder(settings, model=self.model, stats=self.stats, clock=clock)
        self._traffic = Traffic(self.stats)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: asyncio.Server | None = None

    def __repr__(self) -> str:
        where = self.base_url if self._listener is not None else "not listening"
        return f"<MockServer {where}, {self.stats.requests} requests, {self.stats.in_flight} in flight>"

    @property
    def url(self) -> str:
        """The address of the server without ``/v1``, as Anthropic's and newer Together clients expect it."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        """The address of the server with ``/v1``, as OpenAI's client and Together's before 2 expect it."""
        return f"{self.url}/v1"

    @property
    def port(self) -> int:
        """The port on which it listens; before it listens, the requested one."""
        return self._port

    @property
    def settings(self) -> Settings:
        """The settings. New settings take effect with the next request.

        A script starts again when it is another object, the rate limit when `rate` or `burst` changes, and
        the sequence of samples when `seed` changes.
        """
        return self._responder.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        if self._loop is None or _running_loop() is self._loop:
            self._responder.apply(settings)
        else:
            asyncio.run_coroutine_threadsafe(self._apply(settings), self._loop).result()

    async def _apply(self, settings: Settings) -> None:
        self._responder.apply(settings)

    async def until(self, condition: Callable[[MockStats], bool]) -> None:
        """Wait, in the server's own loop, until the counters meet a condition.

        With ``paused=True``, a test can hold several requests in flight without a clock:
        ``await server.until(lambda stats: stats.in_flight == 5)``.
        """
        await self._traffic.until(condition)

    def wait_until(self, condition: Callable[[MockStats], bool], timeout: float = 10.0) -> None:
        """Wait, in another thread than the server's, until the counters meet a condition.

        Raises:
            TimeoutError: If they do not within `timeout` seconds.
        """
        if self._loop is None:
            raise RuntimeError("The mock server is not listening; enter its context before waiting for it.")
        future = asyncio.run_coroutine_threadsafe(self.until(condition), self._loop)
        try:
            future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(
                f"The condition was not met in {timeout} s; it stands at {self.stats}."
            ) from None

    async def start(self) -> None:
        """Listen."""
        if self._listener is not None:
            raise RuntimeError("The mock server is listening already; make another one instead.")
        self._loop, self._traffic.closing = asyncio.get_running_loop(), False
        self._listener = await self._loop.create_server(
            lambda: HttpConnection(self._responder, self._traffic), self._host, self._port, backlog=4096
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and close every connection; requests in flight are dropped."""
        if self._listener is not None:
            self._traffic.closing = True
            self._listener.close()
            closing = [connection.close() for connection in list(self._traffic.connections)]
            await asyncio.gather(*closing)
            await self._listener.wait_closed()
            self._listener = self._loop = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @classmethod
    @contextlib.contextmanager
    def in_thread(
        cls,
        settings: Settings | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: NGramModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Iterator[Self]:
        """Run a server on its own event loop, in a daemon thread, within the context."""
        server = cls(settings, host=host, port=port, model=model, clock=clock)
        started = threading.Event()
        failures: list[BaseException] = []
        stopping: list[Callable[[], object]] = []

        async def serve() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            async with server:
                stopping.append(lambda: loop.call_soon_threadsafe(stop.set))
                started.set()
                await stop.wait()

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                failures.append(error)
            finally:
                started.set()

        thread = threading.Thread(target=run, name="cachepipe-mock-server", daemon=True)
        thread.start()
        started.wait()
        if failures:
            raise failures[0]
        try:
            yield server
        finally:
            stopping[0]()
            thread.join()
        if failures:
            raise failures[0]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def run_server(
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Settings | None = None,
    *,
    ready: Callable[[MockServer], object] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then close and return.

    Args:
        host: The interface to listen on.
        port: The port, 0 for any free one.
        settings: How the server behaves.
        ready: Called with the server once it listens.
    """
    asyncio.run(_serve(host, port, settings, ready))


async def _serve(
    host: str, port: int, settings: Settings | None, ready: Callable[[MockServer], object] | None
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with MockServer(settings, host=host, port=port) as server:
        if ready is not None:
            ready(server)
        await stop.wait()
