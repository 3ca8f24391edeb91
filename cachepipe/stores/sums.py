"""Sums of what was delivered (C6): gathered in memory, added up and written in the background.

A delivery costs an entry in a queue. A thread sums what has gathered and writes it a few seconds later, or at
once when it is much; closing a pipeline or client, and the end of the interpreter, write the rest. So the
sums lack what a killed process has delivered in its last seconds. What was spent is read from the samples
themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeVar

import orjson

from cachepipe.accounting import Account, RunSums, Statement, is_name, sold_in, usage_sold
from cachepipe.contract.draws import label
from cachepipe.errors import StoreError
from cachepipe.stores.base import AdoptSums, Grant, Note, Store

SECONDS: Final = 2.0
"""How long after a delivery the sums are written."""
MOST: Final = 4096
"""When this many deliveries have gathered, they are summed at once."""
_STORED: Final = b'"stamp":'  # what only the header of a stored sample has
KEPT: Final = b'{"kept":true,'
"""The beginning of the header of a sample that is kept on this machine until its store answers."""
_RESERVED: Final = b'"reserved":['  # in the header of a sample whose call has reserved a part of a budget

_T = TypeVar("_T")
What = Literal["delivered", "taken back", "lost"]
_TIMES: Final[dict[What, int]] = {"delivered": 1, "taken back": -1}


class Delivery(NamedTuple):
    """What became of samples.

    Attributes:
        run: the name of the run.
        namespace: the label of the namespace.
        scope: the scope of the question.
        headers: the header of each sample; empty where nothing is known.
        cached: per sample, False if it was generated on the request's behalf; None if no sample was.
        what: whether they were delivered, or taken back because the response did not reach its caller, or
            lost: neither stored nor delivered.
    """

    run: str
    namespace: str
    scope: str | None
    headers: tuple[bytes, ...]
    cached: tuple[bool, ...] | None = None
    what: What = "delivered"


_Place = tuple[str, str, str | None]
"""A run, the label of a namespace and the scope of a question."""


def is_stored(header: bytes) -> bool:
    """Return True if a header is that of a sample that is stored, or is kept until it can be."""
    return _STORED in header or header.startswith(KEPT)


class Deliveries:
    """What was delivered from a store and is not in its sums yet. May be added to from any thread.

    Args:
        store: the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept = not store.read_only
        self._begin()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Deliveries {len(self._waiting) + sum(map(len, self._known.values()))} not yet summed>"

    def _begin(self) -> None:
        self._waiting: deque[Delivery] = deque()
        self._known: dict[_Place, deque[bytes]] = {}
        self._idle = True
        self._hurry = threading.Event()

    def add(self, delivery: Delivery) -> None:
        """Add a delivery to the sums, soon; a store that cannot be written has none."""
        if self._kept:
            self._waiting.append(delivery)
            if self._idle or len(self._waiting) == MOST:
                self._wake()

    def add_known(self, run: str, namespace: str, scope: str | None, grant: Grant) -> None:
        """Add a delivery of samples that were all there; see ``add``.

        The usual one is a header in a queue: nothing that the garbage collector has to look at.
        """
        samples = grant.samples
        if len(samples) != 1 or samples[0] is None:
            self.add(known(run, namespace, scope, grant))
        elif self._kept:
            headers = self._known.get((run, namespace, scope))
            if headers is None:
                headers = self._known.setdefault((run, namespace, scope), deque())
            headers.append(samples[0].header)
            if self._idle or len(headers) == MOST:
                self._wake()

    def _wake(self) -> None:
        """Schedule the writing of what has gathered: soon, or at once if it is much."""
        if not self._idle:
            self._hurry.set()
            return
        self._idle = False
        try:
            threading.Thread(target=self._work, name="cachepipe-sums", daemon=True).start()
        except RuntimeError:  # the interpreter ends, or there are too many threads
            self._idle = True

    def _work(self) -> None:
        self._hurry.wait(SECONDS)
        self._hurry.clear()
        self._idle = True  # before the queue is emptied: what comes later starts another thread
        with contextlib.suppress(StoreError):  # it was closed
            if notes := self._sums():
                self._store.apply_soon(notes)

    async def write(self) -> None:
        """Write what has gathered; return when it is written."""
        with contextlib.suppress(StoreError):  # the store was closed before its users were
            if notes := self._sums():
                await self._store.apply(notes)
        self._hurry.set()

    def write_now(self) -> None:
        """Write what has gathered when the interpreter ends, when no loop runs any more."""
        with contextlib.suppress(StoreError, RuntimeError):  # no thread can be started any more
            if (notes := self._sums()) and self._store.apply_now(notes) is None:
                self._store.apply_soon(notes)

    def inherit(self) -> None:
        """Begin again in a forked child: the parent writes what has gathered."""
        self._begin()

    def _sums(self) -> list[Note]:
        """Take what has gathered; return its sums by run and namespace."""
        notes: dict[tuple[str, str], Note] = {}

        def note_of(run: str, namespace: str) -> Note:
            note = notes.get((run, namespace))
            if note is None:
                note = notes[run, namespace] = Note(run, namespace)
            return note

        for run, namespace, scope, headers, cached, what in _taken(self._waiting):
            note, usages = note_of(run, namespace), [usage_sold(sold_in(header)) for header in headers]
            if what == "lost":
                note.unreported.spend(usages, scope or "")
            else:
                flags, stored = cached or [True] * len(usages), list(map(is_stored, headers))
                note.delivered.add(usages, flags, scope or "", times=_TIMES[what], stored=stored)
        for place, waiting in list(self._known.items()):
            taken = _taken(waiting)
            if not taken:  # and none came since the last time, so no thread still uses it
                del self._known[place]
                continue
            run, namespace, scope = place
            note_of(run, namespace).delivered.add_hits(taken, scope or "")
        return list(notes.values())


def known(run: str, namespace: str, scope: str | None, grant: Grant, what: What = "delivered") -> Delivery:
    """Return the delivery of samples that were all there."""
    headers = tuple([sample.header for sample in grant.samples if sample is not None])
    return Delivery(run, namespace, scope, headers, None, what)


def _taken(waiting: deque[_T]) -> list[_T]:
    """Take everything out of a queue; another thread may do so at the same time."""
    taken: list[_T] = []
    with contextlib.suppress(IndexError):
        for _ in range(len(waiting)):
            taken.append(waiting.popleft())  # noqa: PERF401 - what was taken before an error counts
    return taken


_all: weakref.WeakSet[Deliveries] = weakref.WeakSet()
_of_stores: weakref.WeakValueDictionary[int, Deliveries] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def deliveries_of(store: Store) -> Deliveries:
    """Return the `Deliveries` of a store, which all its users in this process share."""
    with _lock:
        deliveries = _of_stores.get(id(store))
        if deliveries is None:
            deliveries = _of_stores[id(store)] = Deliveries(store)
        return deliveries


@atexit.register
def write_all() -> None:
    """Write what has gathered in this process."""
    for deliveries in list(_all):
        deliveries.write_now()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - the parent may have held it while forking
    _lock = threading.Lock()
    for deliveries in list(_all):
        deliveries.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass
class RunStatement:
    """What a run has cost and saved in one namespace.

    Attributes:
        run: the name of the run; empty for samples that name none.
        namespace: the label of the namespace.
        statement: the sums.
        first: when the first sample that it generated was stored, in seconds since 1970; None if it generated
            none.
        last: when the last one was.
    """

    run: str
    namespace: str
    statement: Statement = field(default_factory=Statement)
    first: float | None = None
    last: float | None = None

    def saw(self, stamps: Iterable[float]) -> None:
        """Take note of when samples were stored."""
        seen = [stamp for stamp in (self.first, self.last, *stamps) if stamp is not None]
        self.first, self.last = min(seen, default=None), max(seen, default=None)


def statements(store: Store) -> dict[str, Statement]:
    """Return what a cache has cost and saved, by the label of the namespace.

    Raises:
        DamagedCache: when the sums are not what was written.
    """
    found: dict[str, Statement] = {}
    for run in run_statements(store):
        found.setdefault(run.namespace, Statement()).join(run.statement)
    return found


def run_statements(store: Store) -> list[RunStatement]:
    """Return what the runs of a cache have cost and saved in each namespace, the oldest first.

    Runs that have generated nothing come first.

    Raises:
        DamagedCache: when the sums are not what was written.
    """
    found: dict[tuple[str, str], RunStatement] = {}

    def of(run: str, namespace: str) -> RunStatement:
        place = (run, namespace)
        if place not in found:
            found[place] = RunStatement(run, namespace)
        return found[place]

    for noted in itertools.chain(store.sums(), removed(store)):
        statement = of(noted.run, noted.namespace).statement
        statement.delivered.join(noted.sums.delivered)
        statement.spent.join(noted.sums.delivered.unstored)
        statement.spent.join(noted.sums.unreported)
    waiting: dict[tuple[str, str, str | None, bool], list[bytes]] = {}
    stamps: dict[tuple[str, str], list[float]] = {}
    bought = store.bought()
    while each := list(itertools.islice(bought, MOST)):
        for scope, header, held in each:
            run, namespace, stamp = made_for(header)
            waiting.setdefault((run, namespace, scope, held), []).append(header)
            if stamp is not None:
                stamps.setdefault((run, namespace), []).append(stamp)
        for (run, namespace, scope, held), headers in waiting.items():
            statement = of(run, namespace).statement
            statement.spent.add_all(headers, scope or "")
            if held:
                statement.held.add_all(headers, scope or "")
        for place, seen in stamps.items():
            of(*place).saw(seen)
        waiting.clear()
        stamps.clear()
    return sorted(found.values(), key=lambda run: run.first or 0.0)


def wasted_by(store: Store, run: str) -> Account:
    """Return what a run has spent on samples that no namespace holds; this reads every sample.

    Raises:
        DamagedCache: when the sums are not what was written.
    """
    wasted = Account()
    for each in run_statements(store):
        if each.run == run:
            wasted.join(each.statement.accounts()["wasted"])
    return wasted


class SpentRows(NamedTuple):
    """What the rows of a namespace have cost.

    Attributes:
        rest: the sums of the rows that are not told apart.
        apart: those of the others, by the calls that reserved for them.
    """

    rest: Account
    apart: dict[tuple[str, ...], Account]


def spent_rows(store: Store, namespace: str, calls: Collection[str], since: float) -> SpentRows:
    """Return what was spent in a namespace.

    Args:
        store: the store.
        namespace: the label of the namespace.
        calls: the calls whose rows are told apart, of those that have reserved something.
        since: seconds since 1970; rows that were written later are told apart too.

    Raises:
        DamagedCache: when the sums are not what was written.
    """
    found = SpentRows(Account(), {})
    for noted in store.sums():
        if noted.namespace == namespace:
            found.rest.join(noted.sums.delivered.unstored)
            found.rest.join(noted.sums.unreported)
    calls = frozenset(calls)
    waiting: dict[str | None, list[bytes]] = {}
    bought = store.bought()
    while each := list(itertools.islice(bought, MOST)):
        for scope, header, _ in each:
            _, whose, stamp = made_for(header)
            if whose != namespace:
                continue
            reserved = reserved_for(header)
            if reserved and ((stamp or 0.0) >= since or not calls.isdisjoint(reserved)):
                found.apart.setdefault(reserved, Account()).add_all([header], scope or "")
            else:
                waiting.setdefault(scope, []).append(header)
        for scope, headers in waiting.items():
            found.rest.add_all(headers, scope or "")
        waiting.clear()
    for noted in removed(store):  # last: what is deleted meanwhile counts twice rather than never
        if noted.namespace == namespace:
            found.rest.join(noted.sums.unreported)
    return found


def reserved_for(header: bytes) -> tuple[str, ...]:
    """Return the calls that reserved a part of a budget for a stored sample."""
    if _RESERVED not in header:
        return ()
    try:
        calls = orjson.loads(header).get("reserved")
    except (ValueError, AttributeError):
        return ()
    return tuple(filter(is_name, calls)) if isinstance(calls, list) else ()


def removed(store: Store) -> Iterator[AdoptSums]:
    """Iterate over what the samples of deleted questions have cost, from the records of the removals."""
    for record in store.removals():
        for run, namespace, account in (*record["spent"], *deleted_by(store, record)):
            yield AdoptSums(run, namespace, RunSums(unreported=Account.of(account)))


def deleted_by(store: Store, record: Mapping[str, Any]) -> list[list[Any]]:
    """Return what the questions have cost that a command noted last, as far as it has deleted them.

    Args:
        store: the store.
        record: the record of the command, which was perhaps stopped.
    """
    gone: list[list[Any]] = []
    for key, name, sums in record["deleting"]:
        entry = store.entry(key)
        if entry is None or all(sample.id != name for sample in entry.samples):
            gone += sums
    return gone


def made_for(header: bytes) -> tuple[str, str, float | None]:
    """Return the run and the label of the namespace that a sample was generated for, and when it was stored.

    The label is that of None if nothing says so.
    """
    try:
        meta = orjson.loads(header)
        run, namespace, stamp = meta.get("run"), meta.get("namespace"), meta.get("stamp")
    except (ValueError, AttributeError):
        return "", label(None), None
    return (
        run if isinstance(run, str) else "",
        namespace if isinstance(namespace, str) else label(None),
        stamp / 1e6 if isinstance(stamp, int) else None,
    )
