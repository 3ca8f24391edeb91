"""The runs of a proxy with several worker processes: one process counts, and the workers ask it.

Equal requests of a run may come to different workers, and must get different numbers (C1). So the main
process holds the runs (`RunServer`), and the workers hold none: a worker that is killed loses no count, and
the draws that it held are given back like those of clients that have left. `SharedRuns` in a worker offers
what `cachepipe.proxy.idempotency.ProxyRuns` does. Each question to the main process is one message and one
answer on a socket of the machine, which takes some 30 microseconds; notes need no answer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from cachepipe.contract.draws import Claimant, Draw, Identity
from cachepipe.contract.intervals import IntervalSet
from cachepipe.errors import CachepipeError
from cachepipe.proxy.frames import FrameReader, frame
from cachepipe.proxy.http_exchange import NEVER_AGAIN, Refusal
from cachepipe.proxy.idempotency import ProxyRun, ProxyRuns, RequestCounter
from cachepipe.runs import Occurrences

_KNOWN: Final = 1024  # runs that a worker remembers; it asks again for others
_REFUSED: Final = "refused"


class MainProcessGone(CachepipeError):  # noqa: N818 - names what happened
    """The main process of the proxy has ended, and with it the count of requests."""


def refusal_of(refused: Refusal) -> list[Any]:
    """Return the answer of the main process that refuses a request."""
    return [_REFUSED, refused.status, refused.code, refused.message, NEVER_AGAIN not in refused.pairs]


def answer_or_refusal(answer: list[Any]) -> list[Any]:
    """Return an answer of the main process.

    Raises:
        Refusal: when it refuses the request.
    """
    if answer[:1] == [_REFUSED]:
        status, code, message, again = answer[1:]
        raise Refusal(status, code, message, () if again else [NEVER_AGAIN])
    return answer


# In the main process.


class RunServer:
    """Holds the runs of a proxy, and answers the messages of its workers.

    Args:
        reply: sends an answer to a worker.
    """

    def __init__(self, reply: Callable[[int, Any], None]) -> None:
        self.runs = ProxyRuns()
        self._reply = reply
        self._known: weakref.WeakValueDictionary[int, ProxyRun] = weakref.WeakValueDictionary()
        self._ended: list[ProxyRun] = []  # until the next runs begin, for requests that have them already
        self._requests: dict[tuple[int, int], RequestCounter] = {}
        self._lent: dict[int, int] = {}  # by run, the worker that claims in memory
        self._waiting: dict[int, deque[tuple[int, str, str]]] = {}

    def begin(self, *namespaces: str | None) -> None:
        """Begin a new run of every namespace, or of one.

        Raises:
            Refusal: when too many namespaces have runs of their own.
        """
        self._ended = [run for run in self._known.values() if run not in self._ended]
        if namespaces:
            self.runs.begin_of(*namespaces)
        else:
            self.runs.begin()

    def gone(self, worker: int) -> None:
        """Learn that a worker has ended: its clients have left, and its draws are given back (C8)."""
        for name in [name for name in self._requests if name[0] == worker]:
            self._requests.pop(name).unanswered()
        for number, waiting in self._waiting.items():
            self._waiting[number] = deque(one for one in waiting if one[0] != worker)
        for number in [number for number, holder in self._lent.items() if holder == worker]:
            self._lend_next(number)

    def take(self, worker: int, message: Sequence[Any]) -> None:
        """Take a message of a worker."""
        kind, *arguments = message
        try:
            self._takes[kind](self, worker, *arguments)
        except Refusal as refused:
            self._reply(worker, refusal_of(refused))

    def _run(self, worker: int, namespace: str | None, name: str | None) -> None:
        run = self.runs.run(namespace, name)
        self._known[run.number] = run
        self._reply(worker, [run.number, run.counted.name])

    def _of(self, number: int) -> ProxyRun:
        """Return a run by its number.

        Raises:
            Refusal: when two others have begun since the request got it.
        """
        run = self._known.get(number)
        if run is None:
            raise Refusal(503, "run_over", "the run of this request has ended meanwhile; try again")
        return run

    def _count(self, worker: int, number: int, *identity: str) -> None:
        counted = self._of(number).counted
        self._reply(worker, [counted.take(Identity(*identity)), counted.replays])

    def _count_back(self, worker: int, number: int, *draw: Any) -> None:  # noqa: ARG002 - all take it
        run = self._known.get(number)
        if run is not None:
            run.counted.give_back(Draw(*draw))

    def _open(
        self, worker: int, number: int, request: int, retry: bool, key: str, claimant: Any, keys: Any
    ) -> None:
        counter = self._of(number).request(Claimant(*claimant), keys, retry=retry, key=key)
        self._requests[worker, request] = counter
        self._reply(worker, [])

    def _draw(self, worker: int, number: int, request: int, retry: bool, *identity: str) -> None:
        counter = self._requests.get((worker, request))
        if counter is None:
            counter = self._requests[worker, request] = RequestCounter(self._of(number), retry=retry)
        self._reply(worker, [counter.take(Identity(*identity)), counter.run.counted.replays])

    def _undone(self, worker: int, request: int, *draw: Any) -> None:
        if (worker, request) in self._requests:
            self._requests[worker, request].give_back(Draw(*draw))

    def _left(self, worker: int, request: int) -> None:
        if (worker, request) in self._requests:
            self._requests[worker, request].left()

    def _end(self, worker: int, request: int, how: str) -> None:
        counter = self._requests.pop((worker, request), None)
        if counter is None:
            return
        if how == "delivered":
            counter.delivered()
        elif how == "unanswered":
            counter.unanswered()
        else:
            counter.ended()

    def _borrow(self, worker: int, number: int, namespace: str, key: str) -> None:
        """Lend the indices that are claimed in memory; one worker at a time has those of a run."""
        if self._lent.setdefault(number, worker) == worker:
            run = self._known.get(number)
            self._reply(worker, [] if run is None else [*run.counted.taken(namespace, key)])
        else:
            self._waiting.setdefault(number, deque()).append((worker, namespace, key))

    def _restore(self, worker: int, number: int, sets: Any) -> None:  # noqa: ARG002 - all take it
        run = self._known.get(number)
        if run is not None:
            for namespace, key, intervals in sets:
                run.counted.taken(namespace, key).replace(map(tuple, intervals))
        self._lend_next(number)

    def _lend_next(self, number: int) -> None:
        del self._lent[number]
        waiting = self._waiting.get(number)
        if waiting:
            worker, namespace, key = waiting.popleft()
            self._borrow(worker, number, namespace, key)
        else:
            self._waiting.pop(number, None)

    _takes: ClassVar[Mapping[str, Callable[..., None]]] = {
        "run": _run,
        "count": _count,
        "count back": _count_back,
        "open": _open,
        "draw": _draw,
        "undone": _undone,
        "left": _left,
        "end": _end,
        "borrow": _borrow,
        "restore": _restore,
    }


# In a worker.


class Link:
    """A worker's connection to the main process. Any thread may use it.

    Args:
        connection: a blocking socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()
        self._lock = threading.RLock()  # a finaliser may give a number back while an answer is awaited

    def tell(self, *message: Any) -> None:
        """Send a message that has no answer."""
        with self._lock, contextlib.suppress(OSError):  # without a main process, nobody needs it
            self._connection.sendall(frame(message))

    def ask(self, *message: Any) -> list[Any]:
        """Send a message, and return the answer.

        Raises:
            Refusal: when the main process refuses the request.
            MainProcessGone: when it has ended.
        """
        with self._lock:
            try:
                self._connection.sendall(frame(message))
                answer = self._received()
            except OSError:
                answer = None
        if answer is None:
            raise MainProcessGone("the main process of this proxy has ended; start the proxy again")
        return answer_or_refusal(answer)

    def _received(self) -> list[Any] | None:
        while data := self._connection.recv(65_536):
            for answer in self._reader.feed(data):
                return answer  # type: ignore[no-any-return]  # there is one answer to each question
        return None


class SharedRuns:
    """The runs of a proxy, as one of its workers sees them.

    Args:
        link: the connection to the main process.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._requests = itertools.count()
        self.run = functools.lru_cache(_KNOWN)(self._run)
        """Return the run of a request; see `ProxyRuns.run`."""

    def _run(self, namespace: str | None, name: str | None) -> SharedRun:
        number, called = self._link.ask("run", namespace, name)
        return SharedRun(self._link, number, called, self._requests)

    def forget(self) -> None:
        """Ask the main process for runs again, as new ones have begun."""
        self.run.cache_clear()


class SharedRun:
    """A run, as a worker sees it.

    Attributes:
        counted: what the run has counted.
    """

    def __init__(self, link: Link, number: int, name: str, requests: Iterator[int]) -> None:
        self.link = link
        self.number = number
        self.counted = SharedOccurrences(link, number, name)
        self._requests = requests

    def request(
        self, claimant: Claimant, questions: Sequence[str], *, retry: bool = False, key: str | None = None
    ) -> SharedRequest:
        """Return the counter of a request; see `ProxyRun.request`."""
        return SharedRequest(self, next(self._requests), claimant, questions, retry=retry, key=key)


class SharedOccurrences(Occurrences):
    """The memory of a run, which asks the main process for numbers and for claims in memory.

    Args:
        link: the connection to the main process.
        number: the number of the run.
        name: its name.
    """

    def __init__(self, link: Link, number: int, name: str) -> None:
        super().__init__(one_program=False)
        self.name = name
        self._link = link
        self._number = number
        self._replays = False
        self._borrowed = _Borrowed(link, number)
        self.replaying = self._borrowed  # type: ignore[assignment]  # used as a lock

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        number, self._replays = self._link.ask("count", self._number, *identity)
        return number  # type: ignore[no-any-return]  # the main process sends an integer

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw that was not delivered."""
        self._link.tell("count back", self._number, *draw)

    def note(self, *, replays: bool) -> None:
        """Note whether any worker has claims in memory only."""
        self._replays = replays

    @property
    def replays(self) -> bool:
        """Whether there are claims in memory only, of any worker."""
        return self._replays

    def taken(self, namespace: str, key: str) -> IntervalSet:
        """Return the indices that claims outside the ledger have taken.

        The caller may add to them within ``replaying``.
        """
        return self._borrowed.taken(namespace, key)

    def first_time(self, what: str) -> bool:
        """Return True if this is the run's first call for a subject: for warnings given once.

        Two workers make the same draw only if one of them answers a retry, so this is no reason to warn.
        """
        return what != "shared draw" and super().first_time(what)


class _Borrowed:
    """Indices that are claimed in memory: this worker alone has them within the context."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number
        self._lock = threading.RLock()  # a finaliser may give back while it is held
        self._depth = 0
        self._sets: dict[tuple[str, str], IntervalSet] = {}

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._restore()
        self._lock.release()

    def taken(self, namespace: str, key: str) -> IntervalSet:
        with self._lock:
            place = namespace, key
            taken = self._sets.get(place)
            if taken is None:
                taken = IntervalSet(map(tuple, self._link.ask("borrow", self._number, *place)))
                self._sets[place] = taken
            if not self._depth:
                self._restore()
            return taken

    def _restore(self) -> None:
        sets, self._sets = self._sets, {}
        if sets:
            changed = [[namespace, key, list(taken)] for (namespace, key), taken in sets.items()]
            self._link.tell("restore", self._number, changed)


class SharedRequest:
    """One request in a run that the main process holds; see `RequestCounter`.

    Attributes:
        run: the run.
        attaches: whether it may be another attempt of an earlier request.
    """

    def __init__(
        self,
        run: SharedRun,
        number: int,
        claimant: Claimant,
        questions: Sequence[str],
        *,
        retry: bool,
        key: str | None,
    ) -> None:
        self.run = run
        self.attaches = retry or key is not None
        self._number = number
        self._retry = retry
        self._open = False
        if key is not None:
            run.link.ask("open", run.number, number, retry, key, list(claimant), list(questions))
            self._open = True

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of this request's draw."""
        run, self._open = self.run, True
        number, replays = run.link.ask("draw", run.number, self._number, self._retry, *identity)
        run.counted.note(replays=replays)
        return number  # type: ignore[no-any-return]  # the main process sends an integer

    def give_back(self, draw: Draw) -> None:
        """Take back the occurrence number of a draw that was undone."""
        self.run.link.tell("undone", self._number, *draw)

    def left(self) -> None:
        """Note that the client has gone while its draw continues."""
        self.run.link.tell("left", self._number)

    def delivered(self) -> None:
        """Note that the client has received its answer."""
        self._end("delivered")

    def unanswered(self) -> None:
        """Note that this request ended without an answer: the next matching request gets its draw."""
        self._end("unanswered")

    def ended(self) -> None:
        """Note that no part of this request is in flight any more."""
        self._end("ended")

    def _end(self, how: str) -> None:
        if self._open:
            self._open = False
            self.run.link.tell("end", self._number, how)
