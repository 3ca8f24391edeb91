"""Copies of complete draws of a shared store on this machine, which are answered without a round trip.

A complete draw is answered in the same way for ever, unless its key is changed: a sample is discarded, the
draw is refreshed or removed, or its place is noted. The store announces such changes (`Changes`), so a copy
is used only if this process has asked for the changes since the current run began, and within the last few
seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from cachepipe import runs
from cachepipe.contract.allotment import indices_of
from cachepipe.contract.draws import Draw
from cachepipe.errors import DamagedCache, NoLocalCopy, StoreError, UnsafeRow, warn
from cachepipe.stores import operations
from cachepipe.stores.base import Claim, Commit, Committed, Grant, Operation, Result
from cachepipe.stores.remote import book, rows
from cachepipe.stores.remote.book import Known, StoredDraw
from cachepipe.stores.remote.copies import Copies, Copy, Unusable
from cachepipe.stores.remote.engine import SAMPLE, Engine, Read, Rows, Unreachable

TRUSTED: Final = 3.0
"""Seconds for which copies are used without asking for changes."""

_PERIOD: Final = 1.0  # seconds between two questions for changes, while copies are used
_PAGE: Final = 64  # draws that are read or written together
_QUEUED: Final = 10_000  # draws that wait to be copied; others are copied when they are asked for again
_QUEUED_BYTES: Final = 64_000_000
_LARGEST: Final = 4_000_000  # bytes of a draw that is copied
_AWAITED: Final = 4096  # keys with draws that are not complete yet


class Process(book.Process, Protocol):
    """What copies need to know about this process and others."""

    def is_own(self, lease: int) -> bool:
        """Return True if a lease is this process's, or was."""
        ...


class LocalCopy:
    """The copies of a shared store on this machine, as one process uses and adds to them. Thread-safe.

    A thread adds copies, and asks for changes while copies are used.

    Args:
        engine: the engine of the store.
        copies: the file.
        process: this process.
        follows: whether a thread does so; a test calls `follow` itself.
    """

    def __init__(self, engine: Engine, copies: Copies, process: Process, *, follows: bool = True) -> None:
        self._engine = engine
        self._copies = copies
        self._process = process
        self._follows = follows
        self._left_out = False
        self._begin()

    def _begin(self) -> None:
        self._condition = threading.Condition()
        self._syncing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._used = False
        self._synced = float("-inf")  # when the latest changes were asked for
        self._failed = float("-inf")  # when the engine did not answer
        self._generation = -1
        self._alive: frozenset[int] = frozenset()  # leases of other processes
        self._queue: dict[Draw, Copy | None] = {}  # those without a copy are read from the store
        self._bytes = 0
        self._awaited: OrderedDict[str, set[Draw]] = OrderedDict()

    def inherit(self) -> None:
        """Begin again in a forked child."""
        self._copies.inherit()
        self._begin()

    # Answers.

    @property
    def current(self) -> bool:
        """Whether copies may be used: no change of them can have been missed."""
        return self._synced >= max(runs.newest(), time.monotonic() - TRUSTED)

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw that was copied, if copies may be used; else None."""
        if self._left_out:
            return None
        self._used = True
        if self._thread is None:
            self._start()
        if not self.current:
            return None
        try:
            return self._recalled(draw, n)
        except Unusable as error:
            self._fail(error)
        except (DamagedCache, UnsafeRow):
            pass  # the store has the draw
        return None

    def _recalled(self, draw: Draw, n: int) -> Grant | None:
        name = rows.draw_field(draw)
        found = self._copies.get(draw, name)
        if found is None:
            return None
        row, samples = found
        known: Known = {name: row}
        stored = StoredDraw(draw, known, self._process)
        for index, sample in zip(indices_of(stored.segments), samples, strict=False):
            known[rows.numbered(SAMPLE, index)] = sample
        grant = operations.recall(stored, n)
        if grant is not None and self._alive:
            leases = {segment.lease for segment in stored.segments} & self._alive
            grant.shared = not all(map(self._process.is_own, leases))
        return grant

    def ready(self) -> bool:
        """Return True if copies may be used; ask for changes first if that is due."""
        if self._left_out:
            return False
        return self.current or (self._may_ask() and self.sync())

    @property
    def lapsed(self) -> bool:
        """Whether copies may be used as soon as somebody has asked for changes: a run has begun, or so."""
        return not (self._left_out or self.current) and self._may_ask()

    def _may_ask(self) -> bool:
        """Return False shortly after the engine has not answered."""
        return time.monotonic() > self._failed + _PERIOD

    # Changes.

    def sync(self) -> bool:
        """Ask for changes, and forget the copies of what was changed; return False if that fails."""
        asked = time.monotonic()
        with self._syncing:
            if max(self._synced, self._failed) >= asked:
                return self._synced >= asked  # another thread did so meanwhile, or tried to
            began = time.monotonic()
            try:
                generation = None
                while generation is None:
                    since = self._copies.known()
                    generation = self._copies.learn(self._engine.changes(since), since)
                self._ask_about()
            except Unreachable:
                self._failed = time.monotonic()
                return False
            except (StoreError, Unusable) as error:
                self._fail(error)
                return False
            if generation != self._generation:
                with self._condition:
                    self._queue.clear()  # what was read before may have been lost
                    self._bytes = 0
            self._generation = generation
            self._synced = began
            return True

    def _ask_about(self) -> None:
        """Find out which of the processes that made draws are alive."""
        leases = [lease for lease in self._copies.leases() if not self._process.is_own(lease)]
        names = self._engine.holders(leases) if leases else []
        self._alive = frozenset(lease for lease, name in zip(leases, names, strict=True) if name is not None)
        if dead := {*leases} - self._alive:
            self._copies.dead(dead)

    def forget(self, changes: Iterable[tuple[int, str]]) -> None:
        """Forget the copies of keys that this process is about to change."""
        if not self._left_out:
            try:
                self._copies.forget(changes)
            except Unusable as error:
                self._fail(error)

    def changed(self, key: str) -> int:
        """Return the number of the last change of a key that this machine knows; 0 if it knows none."""
        if not self._left_out:
            try:
                return self._copies.changed(key)
            except Unusable as error:
                self._fail(error)
        return 0

    # What is to be copied.

    def keep(self, draw: Draw, found: Rows) -> None:
        """Copy a complete draw.

        Args:
            draw: the draw.
            found: the rows of its key, as of one moment: of the draw, its samples, and the last change.
        """
        if not self._left_out and (copy := _copy_of(draw, found, self._process)) is not None:
            self._enqueue(draw, copy)

    def copy(self, draw: Draw) -> None:
        """Read a draw that is probably complete from the store, later and together with others; copy it."""
        if not self._left_out:
            self._enqueue(draw, None)

    def learn(self, asked: Iterable[Operation], results: Iterable[Result | StoreError]) -> None:
        """Copy the draws that operations have completed."""
        if self._left_out:
            return
        for operation, result in zip(asked, results, strict=True):
            if isinstance(operation, Claim) and isinstance(result, Grant):
                if None in result.samples:
                    self._await(operation.draw)
                else:
                    self.copy(operation.draw)
            elif isinstance(operation, Commit) and isinstance(result, Committed):
                for draw in self._awaited.pop(operation.key, ()):
                    self.copy(draw)

    def _await(self, draw: Draw) -> None:
        """Note that a draw will be complete when samples of its key are committed."""
        with self._condition:
            self._awaited.setdefault(draw.key, set()).add(draw)
            if len(self._awaited) > _AWAITED:
                self._awaited.popitem(last=False)

    def _enqueue(self, draw: Draw, copy: Copy | None) -> None:
        with self._condition:
            if copy is None:
                if draw not in self._queue and len(self._queue) < _QUEUED:
                    self._queue[draw] = None
            elif len(self._queue) < _QUEUED and self._bytes < _QUEUED_BYTES:
                earlier = self._queue.get(draw)
                self._queue[draw] = copy
                self._bytes += copy.size - (0 if earlier is None else earlier.size)
            if len(self._queue) >= _PAGE:
                self._condition.notify()
        if self._thread is None:
            self._start()

    # The thread.

    def _start(self) -> None:
        with self._condition:
            if self._follows and self._thread is None and not self._ended and not self._left_out:
                self._thread = threading.Thread(target=self._work, name="cachepipe-local", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._ended or len(self._queue) >= _PAGE, _PERIOD)
                used, self._used = self._used, False
                if self._ended or self._left_out or not (used or self._queue):
                    self._thread = None
                    return
            self.follow(used=used)

    def follow(self, *, used: bool = True) -> None:
        """Copy what is queued; ask for changes if copies were used.

        Args:
            used: whether copies were used since the last time.
        """
        due = not self.current or time.monotonic() - self._synced >= _PERIOD / 2
        if due and (used or self._generation < 0):
            self.sync()
        while self._queue and self._generation >= 0 and not self._left_out:
            with self._condition:
                page = {draw: self._queue.pop(draw) for draw in [*islice(self._queue, _PAGE)]}
                self._bytes -= sum(copy.size for copy in page.values() if copy is not None)
            if not self._add(page):
                return
        if self._copies.touched and not self._left_out:
            self._add({})

    def _add(self, page: Mapping[Draw, Copy | None]) -> bool:
        """Copy draws; return False if the store does not answer."""
        generation = self._generation
        try:
            copies = [copy for copy in page.values() if copy is not None]
            copies += self._read([draw for draw, copy in page.items() if copy is None])
            self._copies.put(copies, generation)
        except (Unreachable, StoreError):
            return False
        except Unusable as error:
            self._fail(error)
            return False
        return True

    def _read(self, draws: Sequence[Draw]) -> list[Copy]:
        """Return copies of the draws that are complete, read from the store."""
        names = [rows.draw_field(draw) for draw in draws]
        reads = [
            Read(draw.key, [name, rows.CHANGED], [name]) for draw, name in zip(draws, names, strict=True)
        ]
        found: list[Copy] = []
        for draw, page in zip(draws, self._engine.read(reads) if reads else (), strict=True):
            copy = _copy_of(draw, page, self._process)
            if copy is not None:
                found.append(copy)
            elif rows.draw_field(draw) in page:
                self._await(draw)
        return found

    def _fail(self, error: Exception) -> None:
        """Begin another file if this one is damaged; otherwise go on without copies."""
        with contextlib.suppress(Unusable):
            if isinstance(error, Unusable) and error.damaged:
                self._copies.replace()
                self._synced = float("-inf")
                return
        self._left_out = True
        leave_out(self._engine.where, error)

    def close(self) -> None:
        """Copy what is queued, as far as the store answers, and end the thread."""
        with self._condition:
            self._ended = True
            thread = self._thread
            self._condition.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._queue:
            self.follow(used=False)
        self._copies.close()


def copies_in(folder: Path, engine: Engine, megabytes: float) -> Copies | None:
    """Return the copies of an engine's store in a folder; warn, and return None, if it cannot be used.

    Args:
        folder: the folder.
        engine: the engine.
        megabytes: see `Copies`.
    """
    try:
        return Copies(folder, engine.identity, megabytes)
    except Unusable as error:
        leave_out(engine.where, error)
        return None


def leave_out(where: str, error: Exception) -> None:
    """Warn that a store is used without a local copy."""
    warn(
        f"the store at {where} is used without a local copy: {error}. Name a folder on a local disk with "
        "CACHEPIPE_LOCAL=DIR, or switch the copy off with CACHEPIPE_LOCAL=off",
        NoLocalCopy,
    )


def _copy_of(draw: Draw, found: Rows, process: Process) -> Copy | None:
    """Return a copy of a draw; None if it is not complete, damaged or too large."""
    row = found.get(rows.draw_field(draw))
    if row is None:
        return None
    try:
        stored = StoredDraw(draw, found, process)
        indices = indices_of(stored.segments)
        if operations.recall(stored, len(indices)) is None:
            return None
        changed = rows.load_change(draw.key, found.get(rows.CHANGED))
    except (DamagedCache, UnsafeRow):
        return None
    samples = [found[rows.numbered(SAMPLE, index)] for index in indices]
    copy = Copy(draw, row, samples, changed, {segment.lease for segment in stored.segments})
    return copy if copy.size <= _LARGEST else None
