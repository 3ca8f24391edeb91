"""The main process of a proxy with several workers: accepts connections, passes them on, and keeps the runs.

The main process opens no cache and reads no request. It passes each connection to the worker with the
fewest, so connections that no worker has yet survive the death of a worker. It holds the runs, because equal
requests that come to different workers must get different numbers; see `cachepipe.proxy.shared_runs`. It has
one thread, and forks its workers: a replacement has nothing to import.
"""

from __future__ import annotations

import gc
import math
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Final, NoReturn

from cachepipe.errors import CachepipeError
from cachepipe.proxy import worker as worker_process
from cachepipe.proxy.counters import Prices, Totals
from cachepipe.proxy.frames import FrameReader, frame
from cachepipe.proxy.http_exchange import Refusal
from cachepipe.proxy.log import RequestLog
from cachepipe.proxy.server import listen, url_of
from cachepipe.proxy.settings import ProxySettings
from cachepipe.proxy.shared_runs import RunServer, refusal_of

_BACKLOG: Final = 2048
_PAUSES: Final = (0.0, 1.0, 2.0, 5.0, 10.0)  # seconds until a worker that did not start is replaced
_ACCEPT_PAUSE: Final = 0.1  # seconds without accepting after the system has refused to
_FIXED: Final = ("cache", "host", "port", "workers", "durability")
"""The settings that a reload does not change."""


class WorkerFailed(CachepipeError):  # noqa: N818 - names what happened
    """A worker process could not be started."""


@dataclass(eq=False)
class _Worker:
    """A worker process, as the main process sees it.

    Attributes:
        pid: its process.
        control: the socket for connections, orders and counts.
        link: the socket for the runs.
        settings: the settings of all workers when it was started.
        replaces: the worker that stops once this one is ready.
        connections: how many it has.
        ready: whether it has started.
        retiring: whether it gets no more connections.
        counts: its last report.
        failure: why it could not start.
    """

    pid: int
    control: socket.socket
    link: socket.socket
    settings: ProxySettings
    replaces: _Worker | None = None
    connections: int = 0
    ready: bool = False
    retiring: bool = False
    counts: dict[str, Any] | None = None
    failure: str | None = None
    orders: FrameReader = field(default_factory=FrameReader)
    questions: FrameReader = field(default_factory=FrameReader)
    unsent: deque[tuple[bytes, socket.socket | None]] = field(default_factory=deque)

    @property
    def serves(self) -> bool:
        """Whether it gets connections."""
        return self.ready and not self.retiring


@dataclass(eq=False)
class _Gathering:
    """What all workers are asked, until each has answered or ended."""

    awaited: set[int]
    then: Callable[[list[Any]], None]
    answers: list[Any] = field(default_factory=list)

    def take(self, pid: int, answer: Any = None) -> bool:
        """Take an answer, or learn that a worker has ended; return True once none is left to wait for."""
        if pid in self.awaited:
            self.awaited.remove(pid)
            if answer is not None:
                self.answers.append(answer)
        if not self.awaited:
            self.then(self.answers)
        return not self.awaited


class Supervisor:
    """The main process of a proxy with several workers.

    Args:
        settings: the settings of the proxy.
        listener: the socket to listen on, bound to its address.
        reload: returns the settings for new workers after SIGHUP.
    """

    def __init__(
        self,
        settings: ProxySettings,
        listener: socket.socket,
        reload: Callable[[], ProxySettings] | None = None,
    ) -> None:
        self.settings = settings
        self._listener = listener
        listener.setblocking(False)
        self._log = RequestLog(settings.log)
        self._reload = reload
        self._workers: dict[int, _Worker] = {}  # by process
        self._runs = RunServer(self._reply)
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._gatherings: dict[int, _Gathering] = {}
        self._asked = 0
        self._ended: Totals | None = None  # the counts of workers that have ended
        self._prices = Prices(settings.given_prices)
        self._failures = 0  # workers that did not start, since one has
        self._failure: str | None = None  # why the last one did not
        self._begun = self._stopping = self._accepts = False
        self._signals: deque[int] = deque()

    # The loop.

    def run(self, on_listening: Callable[[str], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM comes, then let the workers finish what is in flight.

        Args:
            on_listening: is called once with the server's address when all workers are ready.

        Raises:
            WorkerFailed: when the workers cannot be started.
        """
        with self._signals_handled(), self._quotas_shared():
            try:
                for _ in range(self.settings.workers):
                    self._start()
                while not all(worker.ready for worker in self._workers.values()):
                    self._turn()
                    self._check_start()
                if not self._stopping:
                    self._begin(on_listening)
                while self._workers or not self._stopping:
                    self._turn()
            finally:
                self._kill()
                self._selector.close()

    def _check_start(self) -> None:
        if not self._stopping and len(self._workers) < self.settings.workers:
            raise WorkerFailed(self._failure or "a worker process has ended before it was ready")

    def _begin(self, on_listening: Callable[[str], None] | None) -> None:
        self._listener.listen(_BACKLOG)
        if on_listening is not None:
            on_listening(url_of(self._listener))
        self._begun = True
        self._check_accepting()

    def _turn(self) -> None:
        """Wait for something to happen, and handle it."""
        wait = None
        if self._timers:
            wait = max(0.0, min(at for at, _ in self._timers) - time.monotonic())
        for key, mask in self._selector.select(wait):
            handle, *arguments = key.data
            if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # else another event has closed it
                handle(*arguments, mask)
        while self._signals:
            self._handle(self._signals.popleft())
        now = time.monotonic()
        due = [call for at, call in self._timers if at <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for call in due:
            call()

    # Signals.

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        waking, woken = socket.socketpair()
        waking.setblocking(False)
        before = {
            number: signal.signal(number, lambda number, _: self._signals.append(number))
            for number in handled
        }
        fd = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, (lambda _: woken.recv(4096),))
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            waking.close()
            woken.close()

    def _note_signal(self, number: int, _frame: object) -> None:
        self._signals.append(number)

    def _handle(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._replace_all()
        elif self._stopping:
            if number == signal.SIGINT:
                self._tell_all("give up")
        else:
            self._stop()

    def _stop(self) -> None:
        self._stopping = True
        self._timers.clear()
        self._accept_no_more()
        self._listener.close()
        self._tell_all("stop")

    def _replace_all(self) -> None:
        """Replace all workers by new ones, with the settings of now (SIGHUP)."""
        if self._stopping:
            return
        if self._reload is not None:
            try:
                fresh = self._reload().checked()
            except CachepipeError as error:
                self._log.event("error", f"the settings were not loaded again: {error}")
                return
            self.settings = replace(fresh, **{name: getattr(self.settings, name) for name in _FIXED})
            self._share_quotas()
        for worker in list(self._workers.values()):
            self._replace(worker)

    # Quotas. Each worker would have those of the settings for itself.

    @contextmanager
    def _quotas_shared(self) -> Iterator[None]:
        self._folder = tempfile.mkdtemp(prefix="cachepipe-proxy-")
        try:
            self._share_quotas()
            yield
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _share_quotas(self) -> None:
        for upstream in self.settings.upstreams:
            if upstream.flow is not None:
                upstream.flow.limits.share(self._folder)

    def _of_one(self) -> ProxySettings:
        """Return the settings of one worker: its share of what is limited for all."""
        settings, number = self.settings, self.settings.workers
        return replace(
            settings,
            max_connections=math.ceil(settings.max_connections / number),
            max_calls=math.ceil(settings.max_calls / number),
        )

    # Workers.

    def _start(self, replaces: _Worker | None = None) -> None:
        """Start a worker; the one that it replaces stops when it is ready."""
        control, its_control = socket.socketpair()
        link, its_link = socket.socketpair()
        settings = self._of_one()
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # so that collections in the workers leave the pages of this process shared
        pid = os.fork()
        if not pid:
            control.close()
            link.close()
            self._become_worker(settings, its_control, its_link)
        its_control.close()
        its_link.close()
        control.setblocking(False)
        worker = self._workers[pid] = _Worker(pid, control, link, self.settings, replaces)
        self._selector.register(control, selectors.EVENT_READ, (self._on_control, worker))
        self._selector.register(link, selectors.EVENT_READ, (self._on_link, worker))

    def _replace(self, worker: _Worker) -> None:
        """Start another worker instead of one, which stops once the other one is ready."""
        if worker.serves and not any(each.replaces is worker for each in self._workers.values()):
            self._start(worker)

    def _start_again(self, replaces: _Worker | None) -> None:
        """Start a worker after another one could not be started or has ended."""
        needed = len(self._workers) < self.settings.workers
        if needed or (replaces is not None and replaces.pid in self._workers):
            self._start(replaces)

    def _become_worker(
        self, settings: ProxySettings, control: socket.socket, link: socket.socket
    ) -> NoReturn:
        """Run a worker in this process, which was just forked, and end it."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for each in self._workers.values():
                each.control.close()
                each.link.close()
            self._selector.close()
            self._listener.close()
            worker_process.run(settings, control, link)
            code = 0
        except BaseException:  # noqa: BLE001 - the process ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _gone(self, worker: _Worker) -> None:
        """Learn that a worker has ended; start another one if it was not to end."""
        if self._workers.pop(worker.pid, None) is None:
            return
        for channel in (worker.control, worker.link):
            self._selector.unregister(channel)
            channel.close()
        _, status = os.waitpid(worker.pid, 0)
        for _, connection in worker.unsent:
            if connection is not None:
                connection.close()
        self._runs.gone(worker.pid)
        self._count_ended(worker)
        for number, gathering in list(self._gatherings.items()):
            if gathering.take(worker.pid):
                del self._gatherings[number]
        if not self._stopping and not worker.retiring:
            self._lost(worker, os.waitstatus_to_exitcode(status))

    def _lost(self, worker: _Worker, code: int) -> None:
        """Start another worker instead of one that was not to end."""
        how = f"was killed by signal {-code}" if code < 0 else f"has ended with the exit code {code}"
        if worker.failure is not None:
            how = f"could not start: {worker.failure}"
        self._failure = worker.failure
        self._failures = 0 if worker.ready else self._failures + 1
        if self._begun:
            self._log.event("error", f"the worker process {worker.pid} {how}; another one replaces it")
            self._after(
                _PAUSES[min(self._failures, len(_PAUSES) - 1)], partial(self._start_again, worker.replaces)
            )
        self._check_accepting()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + seconds, call))

    def _kill(self) -> None:
        """End the workers that are left, as this process ends."""
        for worker in list(self._workers.values()):
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            worker.control.close()
            worker.link.close()

    def _count_ended(self, worker: _Worker) -> None:
        if worker.counts is None:
            return
        counts = Totals.load(worker.counts, self._prices)
        counts.in_flight = counts.background = 0
        counts.running = dict.fromkeys(counts.running, 0)
        if self._ended is None:
            self._ended = counts
        else:
            self._ended.join(counts)

    # Connections.

    def _check_accepting(self) -> None:
        """Accept connections while a worker takes them."""
        wanted = self._begun and not self._stopping and any(each.serves for each in self._workers.values())
        if wanted and not self._accepts:
            self._accepts = True
            self._selector.register(self._listener, selectors.EVENT_READ, (self._accept,))
        elif not wanted:
            self._accept_no_more()

    def _accept_no_more(self) -> None:
        if self._accepts:
            self._accepts = False
            self._selector.unregister(self._listener)

    def _accept(self, _mask: int) -> None:
        """Accept connections, and pass each to the worker with the fewest."""
        while self._accepts:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:  # such as too many open files
                self._log.event("error", f"connections cannot be accepted: {error}")
                self._accept_no_more()
                self._after(_ACCEPT_PAUSE, self._check_accepting)
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            worker = min(
                (each for each in self._workers.values() if each.serves), key=lambda each: each.connections
            )
            worker.connections += 1
            self._send(worker, frame(["connection"]), connection)

    # Messages.

    def _tell_all(self, *message: Any) -> None:
        for worker in list(self._workers.values()):
            worker.retiring = True
            self._send(worker, frame(message))

    def _send(self, worker: _Worker, message: bytes, connection: socket.socket | None = None) -> None:
        worker.unsent.append((message, connection))
        self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        """Send what a worker takes now; the rest once it takes more."""
        try:
            while worker.unsent:
                message, connection = worker.unsent[0]
                if connection is None:
                    sent = worker.control.send(message)
                else:
                    sent = socket.send_fds(worker.control, [message], [connection.fileno()])
                    connection.close()
                worker.unsent.popleft()
                if sent < len(message):
                    worker.unsent.appendleft((message[sent:], None))
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which reading says too
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        self._selector.modify(worker.control, wanted, (self._on_control, worker))

    def _reply(self, pid: int, answer: Any) -> None:
        """Answer a question about a run."""
        if pid in self._workers:
            with suppress(OSError):
                self._workers[pid].link.sendall(frame(answer))

    def _on_link(self, worker: _Worker, _mask: int) -> None:
        try:
            data = worker.link.recv(65_536)
        except OSError:
            data = b""
        if not data:
            self._gone(worker)
            return
        for message in worker.questions.feed(data):
            self._runs.take(worker.pid, message)

    def _on_control(self, worker: _Worker, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(worker)
        if not mask & selectors.EVENT_READ:
            return
        try:
            data = worker.control.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(worker)
            return
        for kind, *arguments in worker.orders.feed(data):
            self._takes[kind](self, worker, *arguments)

    def _take_ready(self, worker: _Worker) -> None:
        worker.ready = True
        self._failures = 0
        replaced = worker.replaces
        worker.replaces = None
        if replaced is not None and replaced.pid in self._workers:
            replaced.retiring = True
            self._send(replaced, frame(["stop"]))
        if worker.settings is not self.settings:  # they were loaded again while it started
            self._replace(worker)
        self._check_accepting()

    def _take_failed(self, worker: _Worker, failure: str) -> None:
        worker.failure = failure

    def _take_retire(self, worker: _Worker) -> None:
        if not self._stopping:
            self._replace(worker)

    def _take_closed(self, worker: _Worker) -> None:
        worker.connections -= 1

    def _take_counts(self, worker: _Worker, counts: dict[str, Any]) -> None:
        worker.counts = counts

    def _take_gathered(self, worker: _Worker, number: int, answer: Any) -> None:
        gathering = self._gatherings.get(number)
        if gathering is not None and gathering.take(worker.pid, answer):
            del self._gatherings[number]

    def _take_question(self, worker: _Worker, number: int, kind: str, *arguments: Any) -> None:
        """Take a question that needs all workers."""
        if kind == "begin":
            try:
                self._runs.begin(*arguments)
            except Refusal as refused:
                self._send(worker, frame(["answer", number, refusal_of(refused)]))
                return
            self._gather("forget", lambda _: self._send(worker, frame(["answer", number, []])))
        else:
            ended = [] if self._ended is None else [self._ended.dump()]
            self._gather(
                "count", lambda counts: self._send(worker, frame(["answer", number, [*counts, *ended]]))
            )

    def _gather(self, order: str, then: Callable[[list[Any]], None]) -> None:
        """Ask all workers for something, and pass their answers on together."""
        self._asked += 1
        ready = [worker for worker in self._workers.values() if worker.ready]
        self._gatherings[self._asked] = _Gathering({worker.pid for worker in ready}, then)
        for worker in ready:
            self._send(worker, frame([order, self._asked]))

    _takes: ClassVar[Mapping[str, Callable[..., None]]] = {
        "ready": _take_ready,
        "failed": _take_failed,
        "retire": _take_retire,
        "closed": _take_closed,
        "counts": _take_counts,
        "gathered": _take_gathered,
        "ask": _take_question,
    }


def serve(
    settings: ProxySettings,
    on_listening: Callable[[str], None] | None = None,
    reload: Callable[[], ProxySettings] | None = None,
) -> None:
    """Serve with several worker processes until this one receives SIGINT or SIGTERM.

    Args:
        settings: the settings of the proxy.
        on_listening: is called once with the server's address when all workers are ready.
        reload: returns the settings for new workers, which replace the old ones after SIGHUP.

    Raises:
        BadSettings: when it cannot be started with these settings.
        WorkerFailed: when the workers cannot be started, such as when the cache cannot be opened.
    """
    settings = settings.checked()
    listener = listen(settings)
    try:
        Supervisor(settings, listener, reload).run(on_listening)
    finally:
        listener.close()
