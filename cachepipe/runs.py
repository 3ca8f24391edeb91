"""Runs: what counts the occurrences of equal requests, and when counting begins anew.

A run lasts from the opening of the first pipeline or client on a store in this process until none is
open; ``with cachepipe.run():`` begins another. A forked child is another process, so another run.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from cachepipe import forks
from cachepipe.ledger import Draw, Runs

Identity = tuple[str, str, str]
"""The label of a namespace, a key and a request id."""


_SEVERAL = 20  # draws before anything is said about most of them
_TOUCHED = 100_000  # places remembered; by then all has been said


class Occurrences:
    """One run's memory of one store. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[Identity, int] = {}
        self._returned: dict[Identity, list[int]] = {}
        self._taken: dict[tuple[str, str], Runs] = {}
        self._touched: set[tuple[str, str]] = set()
        self._fresh_ids = 0
        self._warned: set[str] = set()
        self.used: set[tuple[str, str]] = set()
        """The shared draws whose use by a namespace is on record."""

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        with self._lock:
            returned = self._returned.get(identity)
            if returned:
                number = heapq.heappop(returned)
                if not returned:
                    del self._returned[identity]
                return number
            number = self._next.get(identity, 0)
            self._next[identity] = number + 1
            return number

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw that was not delivered: its retry is the same draw."""
        identity = (draw.namespace, draw.key, draw.request_id)
        with self._lock:
            heapq.heappush(self._returned.setdefault(identity, []), draw.occurrence)

    @property
    def replays(self) -> bool:
        """Whether there are claims which live in memory only."""
        return bool(self._taken)

    def taken(self, namespace: str, key: str) -> Runs:
        """Return the indices that claims which live in memory only have taken."""
        with self._lock:
            return self._taken.setdefault((namespace, key), Runs())

    def count(self, draw: Draw, *, fresh_id: bool) -> bool:
        """Count a draw; tell, once, when most of the run's have new request ids on old keys.

        Only the first draw of each namespace and key counts: replicates within one run are no sign.
        """
        place = (draw.namespace, draw.key)
        if place in self._touched or len(self._touched) > _TOUCHED:
            return False
        with self._lock:
            self._touched.add(place)
            self._fresh_ids += fresh_id
            few = len(self._touched) < _SEVERAL or self._fresh_ids * 2 <= len(self._touched)
        return not few and self.first_time("fresh ids")

    def first_time(self, what: str) -> bool:
        """Tell whether this run asks about something for the first time: for warnings given once."""
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
        with self._lock:
            return self._stores.setdefault(store, Occurrences())


_current: ContextVar[Run | None] = ContextVar("cachepipe_run", default=None)
_lock = threading.Lock()
_open: dict[str, set[weakref.ref[Any]]] = {}
_runs: dict[str, Occurrences] = {}


@contextlib.contextmanager
def run() -> Iterator[Run]:
    """Begin another run: inside the block, equal requests are counted from the front again.

    It follows tasks and threads as context variables do.
    """
    begun = Run()
    token = _current.set(begun)
    try:
        yield begun
    finally:
        _current.reset(token)


def opened(store: str, user: object) -> None:
    """Note that a pipeline or client uses a store. It counts until ``closed`` or no longer referenced."""
    with _lock:
        users = _open.setdefault(store, set())
        if not users:
            _runs[store] = Occurrences()
        users.add(weakref.ref(user, lambda reference: _gone(store, reference)))
        _open[store] = users  # a finaliser may have run in between, and found the set empty


def closed(store: str, user: object) -> None:
    """Note that a pipeline or client uses a store no longer."""
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
    """Return the memory of the run that a call made now belongs to."""
    own = _current.get()
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
    for store in _runs:
        _runs[store] = Occurrences()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
