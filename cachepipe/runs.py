"""Runs: count the occurrences of equal requests, until counting starts again.

A run lasts from the opening of the first pipeline or client on a store in this process until none is
open; ``with cachepipe.run():`` begins another. A forked child is another process, so another run.

Memory is bounded: a run keeps the most recently used identities in memory, and the others in a temporary
file, with about 30 bytes each.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
import sqlite3
import sys
import threading
import time
import weakref
from bisect import insort
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import orjson

from cachepipe import cells, forks
from cachepipe.contract.draws import Draw, Identity
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.overlap import NamespaceOverlap
from cachepipe.errors import StoreError

KEPT: Final = 50_000
"""The number of identities that a run keeps in memory; about 300 bytes each."""
_PART: Final = 256  # identities that move to the file at once: about a millisecond
_SEVERAL: Final = 20  # draws before anything is said about most of them
_TOUCHED: Final = 20_000  # places remembered; by then all has been said
_STREAK: Final = 4  # new draws in a row after which the next one is expected to be new
_USED: Final = 50_000  # uses of shared draws remembered; one that is forgotten is looked up again

_K = TypeVar("_K", bound=tuple[str, ...])
_V = TypeVar("_V")


class Spilling(dict[_K, _V]):
    """A mapping with a limited number of entries in memory, and older ones in a temporary file.

    Reading a missing entry loads it. Callers call ``trim`` after setting an entry. Entries are never deleted;
    they are set to the value of a new entry instead. Not thread-safe.

    Args:
        new: returns the value of an entry that was never set.
        dump: converts a value for SQLite.
        load: converts it back.
        kept: the number of entries in memory.
    """

    def __init__(
        self, new: Callable[[], _V], dump: Callable[[_V], Any], load: Callable[[Any], _V], kept: int
    ) -> None:
        super().__init__()
        self._new, self._dump, self._load = new, dump, load
        self.kept = kept
        self._file: sqlite3.Connection | None = None

    def __missing__(self, key: _K) -> _V:
        if self._file is None:
            return self._new()
        try:
            row = self._file.execute("SELECT value FROM spilled WHERE digest = ?", (_digest(key),)).fetchone()
        except sqlite3.Error as error:
            raise StoreError(
                f"the counts of this run cannot be read from its temporary file: {error}. Begin another run"
            ) from error
        return self._new() if row is None else self._load(row[0])

    def trim(self) -> None:
        """Move the oldest entries to the file, if there are too many in memory."""
        if len(self) <= self.kept:
            return
        oldest = list(itertools.islice(self, _PART))
        rows = sorted((_digest(key), self._dump(self[key])) for key in oldest)
        try:
            with self._opened() as file:
                file.execute("BEGIN")
                file.executemany("INSERT OR REPLACE INTO spilled VALUES (?, ?)", rows)
        except sqlite3.Error:  # no room for it: they stay where they are
            self.kept = sys.maxsize
            return
        for key in oldest:
            del self[key]

    def _opened(self) -> sqlite3.Connection:
        if self._file is None:
            # The empty name is a file of SQLite's own, which is gone when it is closed.
            file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            file.execute("PRAGMA journal_mode = MEMORY")
            file.execute("CREATE TABLE spilled (digest BLOB PRIMARY KEY, value) WITHOUT ROWID")
            self._file = file
            _files[id(self)] = self
        return self._file

    @property
    def spilled(self) -> bool:
        """Whether anything has moved to the file."""
        return self._file is not None

    def inherit(self) -> None:
        """Leave the file to the parent process, in a forked child, where closing it could block for ever."""
        _inherited.append(self._file)
        self._file = None


_files: weakref.WeakValueDictionary[int, Spilling[Any, Any]] = weakref.WeakValueDictionary()
_inherited: list[Any] = []


def _digest(key: tuple[str, ...]) -> bytes:
    """Return a 16-byte digest of strings, whatever they contain."""
    text = ":".join((*map(str, map(len, key)), *key))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Recent(set[tuple[str, str]]):
    """A set that is cleared when it gets large."""

    def add(self, place: tuple[str, str]) -> None:
        if len(self) >= _USED:
            self.clear()
        super().add(place)


_newest = float("-inf")


def newest() -> float:
    """Return when the newest run of this process began, by ``time.monotonic``."""
    return _newest


class Occurrences:
    """The memory of one run about one store. Every method is thread-safe.

    Args:
        kept: the number of identities in memory.
        one_program: whether all draws are of one program, so that its namespaces can be compared.

    Attributes:
        name: the name of the run, drawn at random; a run with several stores has one for each.
        expects_new: whether its next draw is probably new, so that a claim is better than a look.
        inputs: the number of texts that IPython had executed when the run began; 0 elsewhere.
    """

    def __init__(self, kept: int = KEPT, *, one_program: bool = True) -> None:
        global _newest  # noqa: PLW0603 - this is the place that keeps it
        _newest = time.monotonic()
        self.name = secrets.token_hex(8)
        self.expects_new = False
        self._new_in_a_row = 0
        self.inputs = len(cells.inputs())
        self._lock = threading.Lock()
        self._next: Spilling[Identity, int] = Spilling(int, int, int, kept)
        self._returned: dict[Identity, list[int]] = {}  # ascending, all below the next
        self._taken: Spilling[tuple[str, str], IntervalSet] = Spilling(
            IntervalSet,
            lambda taken: orjson.dumps(list(taken)),
            lambda row: IntervalSet(orjson.loads(row)),
            kept,
        )
        self._touched: set[tuple[str, str]] = set()
        self._told = False
        self._fresh_ids = 0
        self._warned: set[str] = set()
        self.replaying = threading.RLock()  # a finaliser may give back while it is held
        """Held by threads that replay concurrently, while they take indices in memory."""
        self.overlap = NamespaceOverlap() if one_program else NamespaceOverlap(0)
        """Compares the draws of namespaces."""
        self.used: set[tuple[str, str]] = _Recent()
        """Shared draws whose use by a namespace is on record: those used last."""

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        counted = self._next
        with self._lock:
            if self._returned and (returned := self._returned.get(identity)):
                number = returned.pop(0)
                if not returned:
                    del self._returned[identity]
                return number
            number = counted[identity]
            counted[identity] = number + 1
            if len(counted) > counted.kept:
                counted.trim()
            return number

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw that was not delivered: its retry is the same draw."""
        identity = draw.identity
        with self._lock:
            number, returned = draw.occurrence, self._returned.get(identity, [])
            following = self._next[identity]
            if number + 1 < following:
                insort(returned, number)
            elif number + 1 == following:
                while returned and returned[-1] == number - 1:
                    number = returned.pop()
                self._next[identity] = number
                if not number and not self._next.spilled:
                    del self._next[identity]
                self._next.trim()
            if returned:
                self._returned[identity] = returned
            else:
                self._returned.pop(identity, None)

    def claimed(self, *, new: bool) -> None:
        """Note whether a draw that was claimed was new in the ledger."""
        self._new_in_a_row = self._new_in_a_row + 1 if new else 0
        self.expects_new = self._new_in_a_row >= _STREAK

    @property
    def replays(self) -> bool:
        """Whether there are claims in memory only."""
        return bool(self._taken)

    def taken(self, namespace: str, key: str) -> IntervalSet:
        """Return the indices that claims outside the ledger have taken; the caller may add to them."""
        place = (namespace, key)
        with self._lock:
            taken = self._taken[place]
            self._taken.pop(place, None)
            self._taken[place] = taken  # the newest now
            self._taken.trim()
            return taken

    def count(self, draw: Draw, *, fresh_id: bool) -> bool:
        """Count a draw; return True once, when most draws of the run have new request ids on old keys.

        Only the first draw of each namespace and key counts, because replicates within a run are normal.
        """
        if self._told:
            return False
        place = (draw.namespace, draw.key)
        if place in self._touched:
            return False
        with self._lock:
            self._touched.add(place)
            self._fresh_ids += fresh_id
            few = len(self._touched) < _SEVERAL or self._fresh_ids * 2 <= len(self._touched)
            if not few or len(self._touched) >= _TOUCHED:
                self._told = True
                self._touched = set()
        return not few and self.first_time("fresh ids")

    def first_time(self, what: str) -> bool:
        """Return True if this is the run's first call for a subject: for warnings given once."""
        with self._lock:
            if what in self._warned:
                return False
            self._warned.add(what)
            return True


class Run:
    """A run of its own, begun by ``with cachepipe.run():``; it covers every store."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._fork = forks.count
        self._lock = threading.Lock()
        self._stores: dict[str, Occurrences] = {}

    def of(self, store: str) -> Occurrences:
        """Return this run's memory of a store, by the store's identity."""
        if self._fork != forks.count:
            self._begin()
        occurrences = self._stores.get(store)
        if occurrences is None:
            with self._lock:
                occurrences = self._stores.setdefault(store, self._made(store))
        return occurrences

    def _made(self, store: str) -> Occurrences:  # noqa: ARG002 - subclasses use it
        return Occurrences()


_current: ContextVar[Run | None] = ContextVar("cachepipe_run", default=None)
_lock = threading.Lock()
_open: dict[str, set[weakref.ref[Any]]] = {}
_runs: dict[str, Occurrences] = {}


@contextlib.contextmanager
def run() -> Iterator[Run]:
    """Begin another run: inside the block, equal requests are counted from the start again.

    The run follows tasks and threads as context variables do.
    """
    with within(Run()) as begun:
        yield begun


@contextlib.contextmanager
def within(begun: Run) -> Iterator[Run]:
    """Make the requests inside the block part of an existing run."""
    token = _current.set(begun)
    try:
        yield begun
    finally:
        _current.reset(token)


def opened(store: str, user: object) -> None:
    """Note that a pipeline or client uses a store, until ``closed`` is called or it is not referenced."""
    with _lock:
        users = _open.setdefault(store, set())
        if not users:
            _runs[store] = Occurrences()
        users.add(weakref.ref(user, lambda reference: _gone(store, reference)))
        _open[store] = users  # a finaliser may have run in between, and found the set empty


def closed(store: str, user: object) -> None:
    """Note that a pipeline or client does not use a store any more."""
    _gone(store, weakref.ref(user))


def _gone(store: str, reference: weakref.ref[Any]) -> None:
    # A finaliser may run in the middle of ``opened``, so this takes no lock; each step is atomic.
    users = _open.get(store)
    if users is not None:
        for known in list(users):
            if known is reference or (known() is not None and known() is reference()):
                users.discard(known)
        if not users:
            _open.pop(store, None)
            _runs.pop(store, None)


def current(store: str) -> Occurrences:
    """Return the memory of the current run."""
    own = _current.get()
    if own is None and cells.loaded and (cell := cells.current()) is not None:
        own = cell.run
    if own is not None:
        return own.of(store)
    occurrences = _runs.get(store)
    if occurrences is None:
        with _lock:
            occurrences = _runs.setdefault(store, Occurrences())
    return occurrences


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - the parent may have held it while forking
    _lock = threading.Lock()
    for spilling in list(_files.values()):
        spilling.inherit()
    for store in _runs:
        _runs[store] = Occurrences()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
