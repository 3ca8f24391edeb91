"""One of several worker processes of a proxy: serves the connections that the main process passes to it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from cachepipe.errors import CachepipeError
from cachepipe.proxy.app import Proxy
from cachepipe.proxy.counters import Prices, Totals
from cachepipe.proxy.frames import FrameReader, frame
from cachepipe.proxy.http_protocol import HttpProtocol
from cachepipe.proxy.server import Server, keep_pauses_short, logged, silence_uvicorn
from cachepipe.proxy.settings import ProxySettings
from cachepipe.proxy.shared_runs import Link, MainProcessGone, SharedRuns, answer_or_refusal

_REPORT_SECONDS: Final = 1.0
"""Seconds between reports of the counts; a killed worker loses the counts since its last one."""
_CONNECTIONS: Final = 64  # connections that are taken from the main process at once


class _Protocol(HttpProtocol):
    """The protocol of a connection, which tells the main process when the connection ends."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the main process, which counts connections."""
        super().connection_lost(exc)
        worker = self._proxy.workers
        if isinstance(worker, Worker):
            worker.tell("closed")


class Worker(Server):
    """A server for the connections that the main process accepts.

    Args:
        settings: the settings of the proxy.
        control: a socket to the main process for connections, orders and counts.
        link: another one, for the runs.

    Attributes:
        runs: the runs, which the main process holds.
    """

    protocol = _Protocol

    def __init__(self, settings: ProxySettings, control: socket.socket, link: socket.socket) -> None:
        self.runs = SharedRuns(Link(link))
        super().__init__(Proxy(settings, workers=self))
        control.setblocking(False)
        self._control = control
        self._reader = FrameReader()
        self._descriptors: deque[int] = deque()
        self._unsent = b""
        self._asked: dict[int, asyncio.Future[list[Any]]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reported: dict[str, Any] = {}

    # Startup and shutdown.

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - as in uvicorn
        """Take connections from the main process."""
        await super().startup([])
        keep_pauses_short()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._control, self._read)
        self._in_task(self._report())
        self.tell("ready")

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: ARG002 - as in uvicorn
        """Ask the main process at a signal for a replacement; it then says when to stop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.tell, "retire")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - as in uvicorn
        """Finish what is in flight, and report the last counts."""
        await super().shutdown([])
        self._report_counts()
        for task in self._tasks:
            task.cancel()

    def _in_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Messages.

    def tell(self, *message: Any) -> None:
        """Send a message to the main process."""
        self._unsent += frame(message)
        self._send()

    def _send(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._unsent = self._unsent[self._control.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # the main process has ended; reading says so too
            self._unsent = b""
        if self._unsent:
            loop.add_writer(self._control, self._send)
        else:
            loop.remove_writer(self._control)

    async def _ask(self, *message: Any) -> list[Any]:
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        self.tell("ask", number, *message)
        try:
            return answer_or_refusal(await asked)
        finally:
            del self._asked[number]

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 65_536, _CONNECTIONS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        if not data:
            self._main_process_ended()
            return
        for kind, *arguments in self._reader.feed(data):
            self._takes[kind](self, *arguments)

    def _main_process_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control)
        for asked in self._asked.values():
            asked.set_exception(MainProcessGone("the main process of this proxy has ended"))
        self._stop()

    def _take_connection(self) -> None:
        self._in_task(self._serve_connection(self._descriptors.popleft()))

    async def _serve_connection(self, descriptor: int) -> None:
        """Serve a connection that the main process has accepted."""
        connection = socket.socket(fileno=descriptor)
        connection.setblocking(False)

        def protocol() -> Any:
            return self.protocol(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
        except OSError:  # the client has gone meanwhile
            connection.close()
            self.tell("closed")

    def _answer(self, number: int, answer: list[Any]) -> None:
        asked = self._asked.get(number)
        if asked is not None and not asked.done():
            asked.set_result(answer)

    def _forget(self, number: int) -> None:
        self.runs.forget()
        self.tell("gathered", number, None)

    def _count(self, number: int) -> None:
        self.tell("gathered", number, self.proxy.counters.dump())

    def _stop(self) -> None:
        self.should_exit = True

    def _give_up(self) -> None:
        self.should_exit = self.force_exit = True
        self.proxy.give_up()

    _takes: ClassVar[Mapping[str, Callable[..., None]]] = {
        "connection": _take_connection,
        "answer": _answer,
        "forget": _forget,
        "count": _count,
        "stop": _stop,
        "give up": _give_up,
    }

    # What all workers have in common.

    async def begin_run(self, *namespaces: str | None) -> None:
        """Begin a new run of every namespace, or of one.

        Raises:
            Refusal: when too many namespaces have runs of their own.
        """
        await self._ask("begin", *namespaces)

    async def totals(self, prices: Prices) -> Totals:
        """Return the counts of all workers, and of those that have ended."""
        first, *others = [Totals.load(each, prices) for each in await self._ask("count")]
        for other in others:
            first.join(other)
        return first

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self._report_counts()

    def _report_counts(self) -> None:
        counts = self.proxy.counters.dump()
        if counts != self._reported:
            self._reported = counts
            self.tell("counts", counts)


def run(settings: ProxySettings, control: socket.socket, link: socket.socket) -> None:
    """Answer requests until the main process says to stop, or has ended.

    Args:
        settings: the settings of the proxy; its limits are those of this worker.
        control: a socket to the main process for connections, orders and counts.
        link: another one, for the runs.
    """
    silence_uvicorn()
    worker = Worker(settings, control, link)
    try:
        with logged(worker.proxy.log):
            worker.run()
    except CachepipeError as error:
        control.setblocking(True)
        with contextlib.suppress(OSError):
            control.sendall(frame(["failed", str(error)]))
