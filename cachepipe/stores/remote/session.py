"""One process's use of a shared store: its lease, its stamps, and its transactions.

A transaction reads the rows of each key, decides on them, and swaps them if they are still current. If they
are not, it decides again. The swap of one key does not wait for that of another.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Never, Protocol, TypeGuard, TypeVar

from cachepipe.contract.allotment import choose, lowest_listed_free
from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import NOBODY
from cachepipe.contract.intervals import IntervalSet
from cachepipe.errors import StoreError, StoreUnreachable
from cachepipe.stores import operations
from cachepipe.stores.base import (
    Adopt,
    AdoptSums,
    BeginSum,
    Claim,
    Commit,
    Discard,
    Drop,
    EndSum,
    Erase,
    Grant,
    Note,
    NotePlace,
    OfBudget,
    Operation,
    Process,
    RecordRemoval,
    ReleaseHold,
    Reserve,
    Result,
    Settle,
    Withdraw,
)
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.book import LASTING, Book, Known, StoredDraw, ledger
from cachepipe.stores.remote.copies import Copies
from cachepipe.stores.remote.engine import (
    DIGEST,
    PENDING,
    SAMPLE,
    Conflict,
    Engine,
    Read,
    Rows,
    Swap,
    Unreachable,
)
from cachepipe.stores.remote.failovers import Watch
from cachepipe.stores.remote.local import LocalCopy
from cachepipe.stores.remote.made import MadeDraws
from cachepipe.stores.remote.recent import Recent

LEASE: Final = 3.0
"""Seconds for which a lease lasts unless it is renewed, which happens three times as often."""
PATIENCE: Final = 30.0
"""Seconds to wait for an engine that does not answer."""

_REMEMBERED: Final = 4096  # keys whose rows are remembered
_ROWS: Final = 32  # rows of a key that are remembered longer than for one transaction
_ALIVE_FOR: Final = 0.25  # seconds for which a process that was found alive counts as alive
_PAUSES: Final = (0.02, 1.0)  # seconds between two tries of an engine that does not answer: first, last
_TURN: Final = 0.001  # seconds between two tries of a key that is reserved for another process
_GUESSES: Final = 64  # samples that are read ahead for the claims of a key and namespace
_CONTENDED: Final = 1.0  # seconds for which a key counts as contended after a process has lost a race for it
_TRIES: Final = 20  # times that an error is checked on rows of one moment

BUDGETS: Final = "budgets"
"""Stands for a run in the key under which all budgets are."""
REMOVALS: Final = "removals"
"""Likewise for the records of what was removed."""
RUN: Final = "~"
"""The beginning of the keys under which the sums of runs are; those of questions begin otherwise."""

_T = TypeVar("_T")


class SessionEnded(StoreError):  # noqa: N818 - says what the session is
    """The session cannot be used any more."""


class _WouldWait(Exception):  # noqa: N818 - says what it would do
    """The engine must be asked, and the caller cannot wait."""


class User(Protocol):
    """A store that uses a session."""

    def reached(self) -> None:
        """Learn that the engine answers again."""
        ...


def patiently(
    ask: Callable[[], _T],
    where: str,
    patience: float,
    sleep: Callable[[float], None] = time.sleep,
    ended: threading.Event | None = None,
    for_nobody: float = math.inf,
) -> _T:
    """Return what an engine answers; ask again while it does not answer.

    Args:
        ask: asks the engine.
        where: says where the engine is.
        patience: seconds to wait.
        sleep: waits for some seconds.
        ended: is set when it is not worth waiting any more.
        for_nobody: seconds to wait if there is no sign of a server.

    Raises:
        StoreUnreachable: when it has not answered for too long.
    """
    began = time.monotonic()
    pause, last = _PAUSES
    while True:
        try:
            return ask()
        except Unreachable as error:
            most = patience if error.there else min(patience, for_nobody)
            if time.monotonic() + pause > began + most or (ended is not None and ended.is_set()):
                raise StoreUnreachable(
                    f"the store at {where} has not answered for {most:g} s: {error}"
                ) from error
            sleep(pause)
            pause = min(2 * pause, last)


class Session:
    """One process's use of a shared store.

    Args:
        engine: the engine.
        patience: seconds to wait for an engine that does not answer.
        lease: seconds for which a lease lasts unless it is renewed.
        copies: the copies on this machine, if there are any.
        renews: whether threads renew the lease and follow the copies; a test does so itself.
        sleep: waits for some seconds.

    Attributes:
        local: the copies as this process uses them.
        last_lease: the latest lease of this process; 0 if it had none.
        recent: what this process has written lately.
        watch: watches the servers, which may lose that.
        ended: whether the last store that used the session was closed.
        expects_new: whether the draws that were claimed last were new, and so probably the next ones.
        guesses: whether claims are decided on what is remembered: that would have been right the last time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        patience: float = PATIENCE,
        lease: float = LEASE,
        copies: Copies | None = None,
        renews: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.engine = engine
        self.patience = patience
        self.seconds = lease
        self._renews = renews
        self._sleep = sleep
        self.ended = False
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        self._begin()
        self.local = None if copies is None else LocalCopy(engine, copies, self, follows=renews)
        self._offset = self.asked(engine.now) - time.time_ns() // 1000
        _sessions.add(self)

    def _begin(self) -> None:
        """Begin without a lease: at first, and in a forked child, which is a process of its own."""
        self._lock = threading.Lock()
        self._leasing = threading.Lock()
        self._remembered: OrderedDict[str, Known] = OrderedDict()
        self._contended: OrderedDict[str, float] = OrderedDict()  # until when, by key
        self._swapping: set[str] = set()  # keys that loops are swapping
        self._made = MadeDraws()
        self._lease: int | None = None
        self.last_lease = 0
        self._before: set[int] = set()  # leases of this process that have ended
        self._others: dict[int, tuple[Process, float]] = {}  # by lease, and when they were found alive
        self._dead: set[int] = {NOBODY}
        self._greatest = 0
        self._stamping = threading.Lock()
        self.recent = Recent()
        self.watch = Watch(self.recent)
        self.expects_new = True
        self.guesses = False
        self._ended = threading.Event()

    def inherit(self) -> None:
        """Begin again in a forked child."""
        self._begin()
        self.engine.inherit()
        if self.local is not None:
            self.local.inherit()

    def join(self, user: User) -> None:
        """Note that a store uses the session.

        Raises:
            SessionEnded: when the last store that used it was closed.
        """
        with self._leasing:
            if self.ended:
                raise SessionEnded(f"the cache {self.engine.where} was closed; open it again")
            self._users.add(user)

    def leave(self, user: User) -> None:
        """Note that a store does not use the session any more; the last one ends it."""
        with self._leasing:
            self._users.discard(user)
            self.ended = not self._users
        if self.ended:
            self._close()

    def reached(self) -> None:
        """Tell the stores that the engine answers again."""
        for user in list(self._users):
            user.reached()

    def _close(self) -> None:
        """End the lease and close the connections."""
        if self.local is not None:
            self.local.close()
        self._ended.set()
        with self._leasing:
            lease, self._lease = self._lease, None
        try:
            if lease is not None:
                self.engine.close_lease(lease)
        except (Unreachable, StoreError):
            pass  # it ends by itself
        self.engine.close()

    # The engine.

    def asked(self, ask: Callable[[], _T]) -> _T:
        """Return what the engine answers; ask again while it does not answer.

        Raises:
            StoreUnreachable: when it has not answered for too long.
        """
        return patiently(ask, self.engine.where, self.patience, self._doubt, self._ended)

    def _doubt(self, seconds: float) -> None:
        """Wait for an engine that has not answered; another server may take over meanwhile."""
        self.watch.doubted = True
        self._sleep(seconds)

    # This process, and others.

    def now(self) -> int:
        """Return the store's time in microseconds since 1970."""
        return time.time_ns() // 1000 + self._offset

    def stamp(self) -> int:
        """Return a stamp that is greater than every stamp seen so far."""
        with self._stamping:
            self._greatest = max(self.now(), self._greatest + 1)
            return self._greatest

    def see(self, stamp: int) -> None:
        """Take note of a stamp."""
        if stamp > self._greatest:
            with self._stamping:
                self._greatest = max(self._greatest, stamp)

    def lease(self) -> int:
        """Return this process's lease; begin one if there is none."""
        lease = self._lease
        if lease is None:
            with self._leasing:
                if self._lease is None:
                    name = f"{socket.gethostname()}-{os.getpid()}"
                    self._lease = self.asked(partial(self.engine.open_lease, name, self.seconds))
                    self.last_lease = self._lease
                    if self._renews:
                        renewing = _Renewal(weakref.ref(self), self._ended, self.seconds / 3)
                        threading.Thread(target=renewing, name="cachepipe-lease", daemon=True).start()
                lease = self._lease
        return lease

    def current(self, lease: int) -> int:
        """Return this process's lease for one that it had before; another lease unchanged."""
        return self.lease() if lease in self._before else lease

    @property
    def open_lease(self) -> int | None:
        """This process's lease, or None if there is none now."""
        return self._lease

    def renew(self) -> bool:
        """Renew the lease; if it has ended, the next transaction begins another. Return False without one."""
        with self._leasing:
            lease = self._lease
            if lease is not None and not self.engine.renew_lease(lease, self.seconds):
                self._before.add(lease)
                self._lease = None
        return self._lease is not None

    def is_own(self, lease: int) -> bool:
        """Return True if a lease is this process's, or was."""
        return lease == self._lease or lease in self._before

    def is_other(self, lease: int) -> bool:
        """Return True if a lease is that of another process, which is alive."""
        return not self.is_own(lease) and self.alive(lease)

    def alive(self, lease: int) -> bool:
        """Return True if the process of a lease is alive; once it was dead, it stays dead."""
        return self.is_own(lease) or self.process(lease) is not None

    def process(self, lease: int) -> Process | None:
        """Return the other process that has a lease, or None if it is dead."""
        self.ask_about([lease])
        process, _ = self._others.get(lease, (None, 0.0))
        return process

    def ask_about(self, leases: Iterable[int]) -> None:
        """Find out, in one round trip, which other processes are alive, as far as that is not known."""
        unknown = self.unknown(leases)
        if not unknown:
            return
        for lease, name in zip(unknown, self.asked(lambda: self.engine.holders(unknown)), strict=True):
            if name is None:
                self._dead.add(lease)
                self._others.pop(lease, None)
            else:
                self._others[lease] = (Process(name), time.monotonic())

    def unknown(self, leases: Iterable[int]) -> list[int]:
        """Return those of the leases of which it is not known whether their processes are alive."""
        recent = time.monotonic() - _ALIVE_FOR
        return sorted(
            lease
            for lease in {*leases} - self._dead
            if not self.is_own(lease) and self._others.get(lease, (None, 0.0))[1] < recent
        )

    # Reading.

    def book(self, key: str, found: Rows | None = None, fields: Iterable[bytes] = ()) -> Book:
        """Return the rows of a key: those that are remembered, or those that were just read together.

        Args:
            key: the key.
            found: what was read.
            fields: the fields that were read.
        """
        lately = found is not None
        known: Known = dict(self._remembered.get(key, ())) if found is None else dict.fromkeys(fields)
        known |= found or {}
        read_all = partial(self._read_all, key)
        return Book(key, known, partial(self._read, key), read_all, self, whole=lately, lately=lately)

    def _read(self, key: str, fields: Sequence[bytes]) -> Rows:
        return self.asked(lambda: self.engine.read([Read(key, fields)]))[0]

    def _read_all(self, key: str) -> Rows:
        return self.asked(lambda: self.engine.rows_of([key]))[0]

    def guess(self, key: str, asked: Sequence[Operation], *, waits: bool = True) -> Book | None:
        """Return what is remembered of a key as if it were all there is; None if that is not worth trying.

        Without a race, a process that makes new draws of a key knows all that decides about them, and a key
        of which it knows nothing is new. So one round trip is enough if the guess is right.

        Args:
            key: the key.
            asked: the operations.
            waits: whether the engine may be asked for more; otherwise that raises `_WouldWait`.
        """
        if not self.guesses or not all(map(_only_reads, asked)):
            return None
        if key in self._swapping or self._is_contended(key):
            return None
        known = dict(self.remembered(key))
        if not waits:
            return Book(key, known, _wait, _wait, _Unwaiting(self), whole=True, guess=True)
        read_all = partial(self._read_all, key)
        return Book(key, known, partial(self._read, key), read_all, self, whole=True, guess=True)

    def judge(self, book: Book, asked: Sequence[Operation]) -> None:
        """Note whether a guess would have been right, from the rows that were read instead."""
        if all(map(_only_reads, asked)) and book.name not in self._swapping:
            names = [name for claim in asked for name in _fields_of(claim.draw)]  # type: ignore[union-attr]  # all are claims
            self.guesses = _agree(self.remembered(book.name), book.known, names)

    def is_stale(self, key: str, book: Book, current: Rows) -> bool:
        """Return True if what is remembered of a key is not current: another process has swapped it."""
        known = self.remembered(key)
        return any(name in known and current.get(name) != known[name] for name in book.shown)

    def books(self, reads: Sequence[Read]) -> list[Book]:
        """Return the rows of keys, read in one round trip."""
        pages = self.asked(lambda: self.engine.read(reads))
        return [self.book(read.key, page, read.fields) for read, page in zip(reads, pages, strict=True)]

    def read_to_write(self, reads: Sequence[Read]) -> list[Rows]:
        """Return the rows of keys that are probably to be swapped, read in one round trip.

        A key that is contended is first reserved, as a decision on its rows would be in vain if another
        process swapped them meanwhile. Only one is: nobody waits for a key while it keeps others waiting.
        """
        contended = len(reads) == 1 and self._is_contended(reads[0].key)
        while contended:
            page = self.asked(lambda: self.engine.read_in_turn(reads[0], self.lease()))
            if page is not None:
                return [page]
            self.pause()
        return self.asked(lambda: self.engine.read(reads))

    def _is_contended(self, key: str) -> bool:
        return self._contended.get(key, 0.0) > time.monotonic()

    def lost_race(self, key: str) -> None:
        """Note that another process has swapped a key meanwhile, or has reserved it."""
        self._contended.pop(key, None)
        self._contended[key] = time.monotonic() + _CONTENDED
        if len(self._contended) > _REMEMBERED:
            self._contended.popitem(last=False)

    # Transactions.

    def transact(self, asked: Sequence[Operation]) -> list[Result | StoreError]:
        """Perform operations; those of one key are one transaction.

        Returns:
            The result of each operation, or the error of those that were refused after others were performed.

        Raises:
            StoreError: when an operation is refused; then none was performed.
        """
        known = self._copied(asked)
        left = [operation for place, operation in enumerate(asked) if place not in known]
        results: list[Result | StoreError] = []
        if left:
            with self._lock:
                results = _Transaction(self, left).run()
            if self.local is not None:
                self.local.learn(left, results)
        rest = iter(results)
        return [known[place] if place in known else next(rest) for place in range(len(asked))]

    def _copied(self, asked: Sequence[Operation]) -> dict[int, Grant]:
        """Return the grants of claims, by place, that copies on this machine answer."""
        local = self.local
        if local is None or not any(map(_only_reads, asked)) or any(map(_may_change, asked)):
            return {}
        if not local.ready():
            return {}
        return {
            place: grant
            for place, operation in enumerate(asked)
            if _only_reads(operation) and (grant := local.recall(operation.draw, operation.n)) is not None
        }

    def edit(self, key: str, edit: Callable[[Book], None]) -> None:
        """Change the rows of a key in another way than operations do; announce the change.

        Args:
            key: the key.
            edit: changes the rows; it is called again if others change them meanwhile.

        Raises:
            StoreError: when others change them all the time.
        """
        read = Read(key, [rows.KNOWN, rows.LISTED, rows.CHANGED], pending=True)
        with self._lock:
            for _ in range(_TRIES):
                [book] = self.books([read])
                edit(book)
                swap = book.swap(fair=False)
                if swap is None:
                    return
                book.announced(self.announce([key])[0])
                who = self.lease()
                [answer] = self.asked(lambda swap=swap, who=who: self.engine.swap([swap], who))  # type: ignore[misc]
                self.remember(key, None)
                if not isinstance(answer, Conflict):
                    return
        raise StoreError(f"key {key} is changed all the time by others; try again")

    def again(self, book: Book, current: Rows) -> Book:
        """Return the rows of a key whose swap has met a conflict.

        Args:
            book: the rows that were used.
            current: those of them that exist.
        """
        known = {**book.known, **dict.fromkeys(book.shown), **current}
        if known.get(rows.CHANGED) != book.known.get(rows.CHANGED):  # samples may be discarded or deleted
            known = {name: row for name, row in known.items() if not name.startswith(SAMPLE)}
        read_all = partial(self._read_all, book.name)
        return Book(book.name, known, partial(self._read, book.name), read_all, self, whole=book.whole)

    def pause(self) -> None:
        """Wait while a key is reserved for another process."""
        self._sleep(_TURN * (0.5 + random.random()))  # noqa: S311 - spreads the processes

    def recall(self, draws: Sequence[tuple[Draw, int]]) -> list[Grant | None]:
        """Return for each draw its first n samples if all of its samples are stored, after one round trip."""
        names = [rows.draw_field(draw) for draw, _ in draws]
        reads = [
            Read(draw.key, [rows.CHANGED, name], [name]) for (draw, _), name in zip(draws, names, strict=True)
        ]
        pages = self.asked(lambda: self.engine.read(reads))
        return [self.recalled(draw, n, page) for (draw, n), page in zip(draws, pages, strict=True)]

    def look(self, claims: Sequence[Claim]) -> list[Grant | bool]:
        """Return for each claim its grant if the draw is known, else whether a sample may be at hand."""
        reads = [*map(_look_at, claims)]
        pages = self.asked(lambda: self.engine.read(reads))
        return [self._looked(claim, page) for claim, page in zip(claims, pages, strict=True)]

    def foretell(self, claims: Sequence[Claim]) -> list[bool] | None:
        """Return for each claim whether a sample may be at hand, if no draw of them can be known; else None.

        Nothing is read. If a namespace had no draw of a key when this process first looked, then the later
        draws are its own, which it counts, or those of processes that are alive with it. Such a process may
        have made the same draw, or may have stored a sample, since the rows of the key were last seen; then
        the claim finds this.
        """
        found: list[bool] = []
        for claim in claims:
            draw = claim.draw
            known = self.remembered(draw.key)
            if self._made.may_hold(draw) or rows.taken_field(draw.namespace) not in known:
                return None
            found.append(_has_free(draw, known))
        for claim in claims:
            self._made.add(claim.draw)
        return found

    def look_soon(self, claims: Sequence[Claim], then: Callable[[list[Grant | bool] | None], object]) -> bool:
        """Look as `look` does, on the running event loop and without waiting.

        Args:
            claims: the claims.
            then: gets what `look` returns in a later turn of the loop; None if only `look` can find it out.

        Returns:
            False if this is not possible now.
        """

        def interpret(pages: list[Rows] | None) -> None:
            found: list[Grant | bool] | None = None
            if pages is not None:
                # Whatever fails here is tried again by `look`, which may ask the engine for more.
                with contextlib.suppress(StoreError, _WouldWait):
                    found = [
                        self._looked(claim, page, waits=False)
                        for claim, page in zip(claims, pages, strict=True)
                    ]
            if found is not None:
                self.expects_new = not any(isinstance(each, Grant) for each in found)
            then(found)

        return self.engine.read_soon([*map(_look_at, claims)], interpret)

    def _looked(self, claim: Claim, found: Rows, *, waits: bool = True) -> Grant | bool:
        draw = claim.draw
        if rows.draw_field(draw) in found:
            return self.recalled(draw, claim.n, found, waits=waits) or True
        if rows.taken_field(draw.namespace) not in found:
            self._made.begin(draw)
        self._made.add(draw)
        return _has_free(draw, found)

    def claim_soon(self, claims: Sequence[Claim], then: Callable[[list[Any]], object]) -> bool:
        """Claim on the running event loop and without waiting, if a guess will probably do.

        Args:
            claims: the claims.
            then: gets, in a later turn of the loop, the grant or the error of each claim; None for those that
                must be claimed in another way. They may have been granted, as if by an earlier try.

        Returns:
            False if this is not possible now.
        """
        lease = self._lease
        if lease is None or not (self.expects_new and self.guesses):
            return False
        transaction = _Transaction(self, claims)
        try:
            swaps = transaction.guessed()
        except (StoreError, _WouldWait):
            return False
        if swaps is None:
            return False

        def answered(found: Sequence[Conflict | Rows | None] | None) -> None:
            self._swapping.difference_update(swaps)
            later = {key: self._remembered.get(key) for key in swaps}
            results = transaction.answered(swaps, found)
            for key, known in later.items():
                if (
                    known is not None and known is not before[key]
                ):  # a thread has swapped the key after the loop
                    self.remember(key, known)
            if self.local is not None:
                pairs = [pair for pair in zip(claims, results, strict=True) if pair[1] is not None]
                self.local.learn([claim for claim, _ in pairs], [result for _, result in pairs])
            then(results)

        before = {key: self._remembered.get(key) for key in swaps}
        self._swapping.update(swaps)
        begun = self.engine.swap_soon([swap for _, swap in swaps.values()], lease, answered)
        if not begun:
            self._swapping.difference_update(swaps)
        return begun

    def recalled(self, draw: Draw, n: int, found: Rows, *, waits: bool = True) -> Grant | None:
        """Return the first n samples of a draw if all of them are stored, else None.

        Args:
            draw: the draw.
            n: how many samples.
            found: the row of the draw and those of its samples, read at one moment.
            waits: whether to ask the engine which processes are alive.

        Raises:
            _WouldWait: when the engine must be asked, and is not.
        """
        stored = StoredDraw(draw, found, self)
        grant = operations.recall(stored, n) if stored.segments else None
        if grant is not None:
            leases = {segment.lease for segment in stored.segments}
            if not waits and self.unknown(leases):
                raise _WouldWait
            grant.shared = any(map(self.is_other, leases))
            if self.local is not None:
                self.local.keep(draw, found)
        return grant

    def commit_for(self, commit: Commit, lease: int) -> Result | StoreError:
        """Commit a sample that was generated under a lease, which has probably ended.

        It gets its place if nobody else generates it.
        """
        with self._lock:
            adopted = lease not in self._before
            self._before.add(lease)
            try:
                return _Transaction(self, [commit]).run()[0]
            finally:
                if adopted:
                    self._before.discard(lease)

    def announce(self, keys: Sequence[str]) -> list[int]:
        """Announce a change of each key; return their numbers."""
        numbers = self.asked(lambda: self.engine.announce(keys))
        if self.local is not None:
            self.local.forget(zip(numbers, keys, strict=True))
        return numbers

    def remembered(self, key: str) -> Known:
        """Return the rows of a key that are remembered."""
        return self._remembered.get(key, {})

    def remember(self, key: str, known: Known | None) -> None:
        """Remember the rows of a key after a transaction, or nothing of it."""
        before = self._remembered.pop(key, None)
        if known is not None:
            if before:
                lasting = [each for each in before.items() if each[0][:2] in LASTING and each[0] not in known]
                known = {**dict(lasting[-_ROWS:]), **known}
            self._remembered[key] = known
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)


class _Transaction:
    """Operations, performed key by key.

    Args:
        session: the session.
        asked: the operations.
    """

    def __init__(self, session: Session, asked: Sequence[Operation]) -> None:
        self._session = session
        self._asked = asked
        self._results: list[Any] = [None] * len(asked)
        self._places: dict[str, list[int]] = {}
        for place, operation in enumerate(asked):
            self._places.setdefault(key_of(operation), []).append(place)

    def run(self) -> list[Result | StoreError]:
        """Perform the operations; return their results."""
        session = self._session
        if not session.expects_new:
            self._grant_known()
            if not self._places:
                return self._results
            swaps = self._decided(self._begin([*self._places]))
        else:
            guesses = {key: session.guess(key, self._of(key)) for key in self._places}
            guessed = [book for book in guesses.values() if book is not None]
            swaps = self._decided([*guessed, *self._begin([key for key in guesses if guesses[key] is None])])
        try:
            while swaps:
                swaps = self._swap(swaps)
        except StoreUnreachable as error:
            for key in swaps:
                self._fail(key, error)
        return self._results

    def _of(self, key: str) -> list[Operation]:
        return [self._asked[place] for place in self._places[key]]

    def guessed(self) -> dict[str, tuple[Book, Swap]] | None:
        """Decide without asking the engine; return what is to be swapped, or None if that is not possible.

        Raises:
            StoreError: when that is not possible either.
            _WouldWait: likewise.
        """
        swaps: dict[str, tuple[Book, Swap]] = {}
        for key in self._places:
            asked = self._of(key)
            book = self._session.guess(key, asked, waits=False)
            if book is None:
                return None
            self._results_of(key, operations.perform(ledger(book), asked))
            swap = book.swap(fair=True)
            if swap is None or swap.changes:
                return None
            swaps[key] = book, swap
        self._number(book for book, _ in swaps.values() if book.begins)
        return swaps

    def answered(
        self, swaps: Mapping[str, tuple[Book, Swap]], found: Sequence[Conflict | Rows | None] | None
    ) -> list[Any]:
        """Return the results after swaps that were tried once; None for operations that were not performed.

        Args:
            swaps: what `guessed` has returned.
            found: the answer to each, or None without answers.
        """
        if found is None:
            return [None] * len(self._asked)
        for (key, (book, swap)), answer in zip(swaps.items(), found, strict=True):
            if isinstance(answer, Conflict) or not self._performed(book, swap, answer or {}):
                if isinstance(answer, Conflict):
                    self._lost(book, answer)
                self._session.guesses = False
                for place in self._places[key]:
                    self._results[place] = None
        return self._results

    # Reading.

    def _grant_known(self) -> None:
        """Grant the claims of known draws, for which their rows are enough."""
        reads: list[Read] = []
        for key, places in self._places.items():
            claims = [self._asked[place] for place in places]
            if all(map(_only_reads, claims)):
                fields = [*dict.fromkeys([rows.draw_field(claim.draw) for claim in claims])]  # type: ignore[union-attr]  # all are claims
                reads.append(Read(key, [rows.CHANGED, *fields], fields))
        if reads:
            session = self._session
            self._read(reads, session.asked(lambda: session.engine.read(reads)))

    def _read(self, reads: Sequence[Read], pages: Sequence[Rows]) -> list[tuple[Read, Rows]]:
        """Grant the claims of known draws; return what was read of the other keys."""
        session = self._session
        found = [each for each in zip(reads, pages, strict=True) if not self._granted(*each)]
        session.expects_new = any(type(each) is Claim for read, _ in found for each in self._of(read.key))
        return found

    def _granted(self, read: Read, page: Rows) -> bool:
        """Return True if the operations of a key only claim known draws, which are then granted."""
        places, grants = self._places[read.key], []
        for place in places:
            claim = self._asked[place]
            if not _only_reads(claim):
                return False
            grant = self._session.recalled(claim.draw, claim.n, page)
            if grant is None:
                return False
            grants.append(grant)
        for place, grant in zip(places, grants, strict=True):
            self._results[place] = grant
        del self._places[read.key]
        return True

    def _begin(self, keys: Iterable[str]) -> list[Book]:
        """Return the books of keys, with what their operations will probably need.

        Claims that prove to be of known draws are granted instead.
        """
        session = self._session
        books: dict[str, Book] = {}
        reads: list[Read] = []
        for key in keys:
            read = _plan(session, key, self._of(key))
            if read is None:
                books[key] = session.book(key)
            else:
                reads.append(read)
        if reads:
            guessed = session.expects_new
            pages = session.read_to_write(reads)
            read_now = {
                read.key: session.book(read.key, page, read.fields) for read, page in self._read(reads, pages)
            }
            for book in read_now.values():
                session.judge(book, self._of(book.name))
            self._read_more(read_now, guessed=guessed)
            books |= read_now
        return list(books.values())

    def _read_more(self, books: dict[str, Book], *, guessed: bool) -> None:
        """Read the samples that claims will probably be granted, and the draws that they follow (C3)."""
        session = self._session
        reads: list[Read] = []
        for key, book in books.items():
            read = _more(book, self._of(key), session.remembered(key) if guessed else None)
            if read is not None:
                reads.append(read)
        if not reads:
            return
        for read, page in zip(reads, session.asked(lambda: session.engine.read(reads)), strict=True):
            books[read.key].learn(dict.fromkeys(read.fields) | page)

    # Deciding and writing.

    def _decided(self, books: Iterable[Book]) -> dict[str, tuple[Book, Swap]]:
        """Decide on the rows of keys; return what is to be swapped."""
        swaps: dict[str, tuple[Book, Swap]] = {}
        for each in books:
            book, swap = self._decide(each)
            if swap is None:
                self._session.remember(book.name, book.written())
            else:
                swaps[book.name] = book, swap
        return swaps

    def _decide(self, book: Book) -> tuple[Book, Swap | None]:
        """Perform the operations of a key on its rows; return what is to be swapped."""
        asked = self._of(book.name)
        fair = any(type(operation) is Claim for operation in asked)
        for _ in range(_TRIES):
            try:
                results = operations.perform(ledger(book), asked)
                swap = book.swap(fair=fair)
            except StoreError:
                if book.lately:
                    raise
                book = self._session.books([book.all_used()])[0]  # the rows may not be of one moment
                continue
            self._results_of(book.name, results)
            return book, swap
        raise StoreError(f"key {book.name} is changed all the time by others; try again")

    def _results_of(self, key: str, results: Sequence[Result]) -> None:
        for place, result in zip(self._places[key], results, strict=True):
            self._results[place] = result

    def _swap(self, swaps: dict[str, tuple[Book, Swap]]) -> dict[str, tuple[Book, Swap]]:
        """Swap rows; return what is to be swapped next, where others were faster."""
        session = self._session
        who = session.lease()
        wanted = [swap for _, swap in swaps.values()]
        self._announce([book for book, swap in swaps.values() if swap.changes])
        self._number(book for book, _ in swaps.values() if book.begins)
        found = session.asked(lambda: session.engine.swap(wanted, who))
        again: dict[str, tuple[Book, Swap]] = {}
        wrong: list[str] = []  # keys whose guesses were wrong
        waits = False
        for (key, (book, swap)), answer in zip(list(swaps.items()), found, strict=True):
            if not isinstance(answer, Conflict):
                if self._performed(book, swap, answer or {}):
                    del swaps[key]  # whatever happens to the others
                else:
                    wrong.append(key)
                continue
            waits = waits or answer.wait
            self._lost(book, answer)
            if book.guess:
                wrong.append(key)
                continue
            if (next_swap := self._again(session.again(book, answer.rows))) is not None:
                again[key] = next_swap
        if waits:
            session.pause()
        return again | self._guessed_wrong(wrong)

    def _lost(self, book: Book, conflict: Conflict) -> None:
        """Take note of a conflict; a wrong guess without a race is corrected."""
        session, key = self._session, book.name
        if conflict.wait or not book.guess or session.is_stale(key, book, conflict.rows):
            session.lost_race(key)
        if book.guess:
            session.remember(key, book.corrected(conflict.rows))

    def _performed(self, book: Book, swap: Swap, found: Rows) -> bool:
        """Take note of a swap that was performed; put the samples that it wanted into the grants.

        Return False if one of them is not there any more.
        """
        session, key = self._session, book.name
        try:
            samples = book.fulfil(found)
        except StoreError as error:
            self._fail(key, error)
            return True
        session.remember(key, book.written())
        if samples is None:
            return False
        if not key.startswith(RUN):
            session.recent.note(key, swap, book.ids())
        if book.guess:
            session.expects_new = bool(swap.puts)
        for place in self._places[key] if samples else ():
            grant = self._results[place]
            grant.samples = [each and samples.get(each.index, each) for each in grant.samples]
        return True

    def _guessed_wrong(self, keys: Sequence[str]) -> dict[str, tuple[Book, Swap]]:
        """Decide on rows that are read instead; return what is to be swapped next."""
        if not keys:
            return {}
        try:
            books = self._begin(keys)
        except StoreUnreachable:
            raise
        except StoreError as error:
            if len(keys) > 1:  # the others may be without fault
                return {name: swap for key in keys for name, swap in self._guessed_wrong([key]).items()}
            self._fail(keys[0], error)
            return {}
        self._session.guesses = False
        again = {book.name: self._again(book) for book in books}
        return {key: swap for key, swap in again.items() if swap is not None}

    def _announce(self, books: Sequence[Book]) -> None:
        """Announce what is about to change, so that copies of it are not used any more."""
        if books:
            numbers = self._session.announce([book.name for book in books])
            for book, number in zip(books, numbers, strict=True):
                book.announced(number)

    def _number(self, books: Iterable[Book]) -> None:
        """Write the number of the last known change of a question that was deleted and is asked anew.

        Without it, machines that have learnt of the removal would take the new rows for those before it.
        """
        local = self._session.local
        if local is not None:
            for book in books:
                if number := local.changed(book.name):
                    book.announced(number)

    def _again(self, book: Book) -> tuple[Book, Swap] | None:
        """Decide again on current rows; return what is to be swapped, or None if that is nothing."""
        try:
            book, swap = self._decide(book)
        except StoreUnreachable:
            raise
        except StoreError as error:
            self._fail(book.name, error)
            return None
        if swap is None:
            self._session.remember(book.name, book.written())
            return None
        return book, swap

    def _fail(self, key: str, error: StoreError) -> None:
        for place in self._places.get(key, ()):  # what was granted stays so
            self._results[place] = error
        self._session.remember(key, None)


class _Unwaiting:
    """A process as `Session` shows it, for those who cannot wait for the engine.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.now, self.stamp, self.see = session.now, session.stamp, session.see

    def lease(self) -> int:
        """Return this process's lease."""
        return self._session.open_lease or _wait()

    def current(self, lease: int) -> int:
        """Return this process's lease for one that it had before; another lease unchanged."""
        return lease if lease == self._session.open_lease or not self._session.is_own(lease) else self.lease()

    def alive(self, lease: int) -> bool:
        """Return True if the process of a lease is alive."""
        self.ask_about([lease])
        return self._session.alive(lease)

    def ask_about(self, leases: Iterable[int]) -> None:
        """Do nothing if it is known which processes are alive."""
        if self._session.unknown(leases):
            _wait()


def _wait(*_arguments: Any) -> Never:
    raise _WouldWait


def _agree(remembered: Known, found: Known, names: Iterable[bytes]) -> bool:
    """Return True if rows that were read are as a guess would have had them.

    Args:
        remembered: the rows that were remembered.
        found: the rows that were read.
        names: the fields that new draws add.
    """
    if remembered.get(rows.KNOWN) is None:
        as_before = found.get(rows.KNOWN) is None
    else:
        as_before = all(found.get(name, row) == row for name, row in remembered.items())
    return as_before and all(found.get(name) == remembered.get(name) for name in names)


def _has_free(draw: Draw, found: Mapping[bytes, bytes | None]) -> bool:
    """Return True if a listed sample is free for a draw, by the rows of its key."""
    listed, taken = (
        rows.load_set(draw.key, name, b"" if row is None else rows.unpack(draw.key, name, row))
        for name in (rows.LISTED, rows.taken_field(draw.namespace))
        for row in [found.get(name)]
    )
    return lowest_listed_free(listed, taken) is not None


def _look_at(claim: Claim) -> Read:
    """Return what shows whether the draw of a claim is known, and else whether a sample may be at hand."""
    draw = claim.draw
    name = rows.draw_field(draw)
    return Read(draw.key, [rows.CHANGED, rows.LISTED, rows.taken_field(draw.namespace), name], [name])


def _only_reads(operation: Operation) -> TypeGuard[Claim]:
    """Return True for a claim that writes nothing if its draw is known."""
    return type(operation) is Claim and not operation.refresh and operation.user is None


def _may_change(operation: Operation) -> bool:
    """Return True if an operation may change what a claim behind it gets."""
    changes = isinstance(operation, Discard | Erase | NotePlace | Withdraw)
    return changes or (isinstance(operation, Claim) and operation.refresh)


def key_of(operation: Operation) -> str:
    """Return the key whose rows an operation changes; the sums of a run have one of their own."""
    if isinstance(operation, Claim | ReleaseHold | NotePlace):
        return operation.draw.key
    if isinstance(operation, OfBudget):
        return f"{RUN}{BUDGETS}"
    if isinstance(operation, RecordRemoval):
        return f"{RUN}{REMOVALS}"
    return f"{RUN}{operation.run}" if isinstance(operation, Note | AdoptSums) else operation.key


def _plan(session: Session, key: str, asked: Sequence[Operation]) -> Read | None:
    """Return what the operations of a key will probably need; None if that is remembered."""
    known = session.remembered(key)
    fields: dict[bytes, None] = {}
    follow: dict[bytes, None] = {}
    for operation in asked:
        match operation:
            case Claim(draw=draw, user=user):
                fields[rows.taken_field(draw.namespace)] = None
                name = rows.draw_field(draw)
                fields[name] = follow[name] = None
                if not draw.shared:
                    name = rows.first_field(draw)
                    fields[name] = follow[name] = None
                if user is not None:
                    fields[rows.USE + rows.encoded(user)] = None
            case ReleaseHold(draw=draw):
                fields.update(dict.fromkeys((rows.draw_field(draw), rows.taken_field(draw.namespace))))
                follow[rows.draw_field(draw)] = None
            case Note(namespace=namespace) | AdoptSums(namespace=namespace):
                name = rows.SUMS + rows.encoded(namespace)
                if name not in known:
                    fields[name] = None
            case _:
                fields.update(dict.fromkeys(_needed(operation)))
    if not fields and known:
        return None
    if session.expects_new:
        guesses = _likely(key, known, asked)
        fields.update(dict.fromkeys(rows.numbered(SAMPLE, index) for index in guesses))
    return Read(key, [rows.KNOWN, rows.LISTED, rows.CHANGED, *fields], [*follow], pending=True)


def _needed(operation: Operation) -> list[bytes]:
    """Return the fields that an operation needs, apart from claims and what is frequent beside them."""
    fields: list[bytes] = []
    match operation:
        case NotePlace(draw=draw):
            fields = [rows.draw_field(draw)]
        case Discard(index=index):
            fields = [rows.numbered(SAMPLE, index)]
        case Erase(indices=indices) | Drop(indices=indices):
            fields = [rows.CHANGED, *(rows.numbered(SAMPLE, index) for index in indices)]
        case Withdraw():
            fields = [rows.CHANGED]  # what is remembered would not do
        case Adopt(entry=entry):
            # The indices that its samples get if the question is new.
            fields = [rows.numbered(SAMPLE, sample.origin) for sample in entry.samples]
            fields += [name for draw in entry.draws for name in _fields_of(draw)]
        case Reserve() | Settle() | BeginSum() | EndSum():
            fields = [rows.BUDGET + rows.encoded(operation.namespace)]
        case RecordRemoval(id=name):
            fields = [rows.REMOVAL + name.encode()]
    return fields


def _fields_of(draw: Draw) -> list[bytes]:
    """Return the fields that change when a draw is added."""
    names = [rows.taken_field(draw.namespace), rows.draw_field(draw)]
    return names if draw.shared else [*names, rows.first_field(draw)]


def _likely(key: str, known: Known, asked: Sequence[Operation]) -> list[int]:
    """Return the indices that new draws would be granted if the known rows were current, at most some."""

    def load(name: bytes) -> IntervalSet:
        row = known.get(name)
        return IntervalSet() if row is None else rows.load_set(key, name, row[DIGEST:])

    wanted: dict[str, int] = {}
    for operation in asked:
        if type(operation) is Claim and known.get(rows.draw_field(operation.draw)) is None:
            namespace = operation.draw.namespace
            wanted[namespace] = wanted.get(namespace, 0) + operation.n
    if not wanted:
        return []
    if rows.LISTED not in known:  # nothing is known of the key
        return [*range(min(max(wanted.values()), _GUESSES))]
    listed = load(rows.LISTED)
    found: dict[int, None] = {}
    for namespace, n in wanted.items():
        taken = load(rows.taken_field(namespace))
        for _ in range(min(n, _GUESSES)):
            index = choose(listed, taken, None)
            taken.add(index)
            found[index] = None
    return list(found)


def _more(book: Book, asked: Sequence[Operation], guessed: Known | None) -> Read | None:
    """Return what claims need beyond what was read first; None if that is nothing.

    Args:
        book: the rows that were read.
        asked: the operations.
        guessed: the rows by which samples were read with them, or None.
    """
    known = book.known
    new = [
        operation.draw
        for operation in asked
        if type(operation) is Claim and known.get(rows.draw_field(operation.draw)) is None
    ]
    followed = [name for draw in new if not draw.shared and (name := book.followed(draw)) is not None]
    fields = dict.fromkeys(followed)
    sets = {rows.LISTED, *[rows.taken_field(draw.namespace) for draw in new]}
    if guessed is None or any(known.get(name) != guessed.get(name) for name in sets):
        for index in _likely(book.name, known, asked):
            name, pending = rows.numbered(SAMPLE, index), rows.numbered(PENDING, index)
            if name not in known and pending not in known and book.lists(index):
                fields[name] = None
    return Read(book.name, [*fields], followed) if fields else None


class _Renewal:
    """Renews the lease of a session until the session ends.

    Args:
        session: the session.
        ended: is set when it ends.
        seconds: the time between two renewals.
    """

    def __init__(self, session: weakref.ref[Session], ended: threading.Event, seconds: float) -> None:
        self._session = session
        self._ended = ended
        self._seconds = seconds

    def __call__(self) -> None:
        away = False
        seconds = 0.0  # the first look at the servers is for comparison
        while not self._ended.wait(seconds):
            seconds = self._seconds
            session = self._session()
            if session is None:
                return
            try:
                renewed = session.renew()
                changed = session.watch.look(session.engine)
            except Exception:  # noqa: BLE001 - whatever a client raises while a server is replaced
                away = True  # it is tried again, and begun anew if it has ended meanwhile
                continue
            if away or changed:
                session.reached()
            if not renewed:
                return
            away = False
            del session


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork() -> None:
    for session in list(_sessions):
        session.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
