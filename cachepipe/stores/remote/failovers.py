"""Notices that a server of a shared store has taken over from another one, and writes again what is missing.

A replica that takes over may lack the last writes of its primary. Each process keeps what it has written
lately (`Recent`), and compares it with what the new server has. A sample goes back to its index if this
process still generates it there. All else is added as the entry of another cache is: nothing is overwritten,
and what is there is recognised by its id.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Final, Protocol

from cachepipe.contract.allotment import Segment
from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment, ordered
from cachepipe.errors import FailedOver, StoreError, StoreUnreachable, warn
from cachepipe.stores.base import Adopt, Adopted, Commit, Committed, Operation, ReleaseLease, Result
from cachepipe.stores.entries import read_sample
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import DIGEST, PENDING, SAMPLE, Engine, Read, Rows
from cachepipe.stores.remote.recent import SECONDS, Page, Recent
from cachepipe.stores.remote.rows import DrawRow
from cachepipe.stores.tables import RAW

OWED: Final = 120
"""The number of times that a process looks whether a draw can be stored again: its sample may yet come."""

_PAGE: Final = 100  # keys whose rows are read in one round trip


class Writer(Protocol):
    """What writes rows again: a session."""

    engine: Engine
    recent: Recent
    watch: Watch

    def transact(self, asked: Sequence[Operation]) -> list[Result | StoreError]:
        """Perform operations; those of one key are one transaction."""
        ...

    def is_own(self, lease: int) -> bool:
        """Return True if a lease is this process's, or was."""
        ...

    def now(self) -> int:
        """Return the store's time in microseconds since 1970."""
        ...


class Watch:
    """Watches the servers of a store.

    Args:
        recent: what this process has written lately.

    Attributes:
        doubted: whether a server did not answer since the last look: another one may have taken over.
        due: whether rows are to be compared.
        took_over: the servers that have taken over since somebody was told.
        others: those that were restarted or replaced.
        owed: the keys with draws that could not be stored again yet.
    """

    def __init__(self, recent: Recent) -> None:
        self.doubted = False
        self.due = False
        self.took_over: list[str] = []
        self.others: list[str] = []
        self.owed: set[str] = set()
        self.alone = threading.Lock()
        self._recent = recent
        self._known: set[str] = set()  # all histories that were seen
        self._left = 0

    def look(self, engine: Engine) -> bool:
        """Look whether a server may have lost writes; return True if something is to be done about it.

        Raises:
            Unreachable: when a server does not answer.
        """
        servers = engine.servers()
        new = [server for server in servers if server.history not in self._known]
        if self._known and new:
            for server in new:
                (self.took_over if server.before in self._known else self.others).append(server.where)
            self._left = OWED
            self.due = self._recent.held = True
        self._known.update(server.history for server in servers)
        self.doubted = False
        return self.due or bool(self.owed)

    def tried(self, owed: Collection[str]) -> None:
        """Note that rows were compared, and which keys have draws that could not be stored again yet."""
        self.due = False
        self._left -= 1
        self.owed = {*owed} if self._left > 0 else set()
        self._recent.held = bool(self.owed)


@dataclass(slots=True)
class Mended:
    """What was done about lost rows.

    Attributes:
        samples: how many samples were stored again.
        draws: how many draws were stored again.
        owed: the keys with draws that cannot be stored again yet.
        waiting: how many such draws there are.
        different: how many draws contradict what is there now.
    """

    samples: int = 0
    draws: int = 0
    owed: set[str] = field(default_factory=set)
    waiting: int = 0
    different: int = 0


def mend(session: Writer) -> None:
    """Write again what a failover has lost of this process's latest writes; warn once per failover.

    Raises:
        Unreachable: when the store does not answer; what is missing is written later.
        StoreUnreachable: likewise.
    """
    watch = session.watch
    if watch.doubted:
        watch.look(session.engine)
    if not (watch.due or watch.owed) or not watch.alone.acquire(blocking=False):
        return
    try:
        only = None if watch.due else watch.owed
        mended = Mended()
        pages = iter(session.recent.pages(only).items())
        while page := list(islice(pages, _PAGE)):
            _mend(session, page, mended)
        watch.tried(mended.owed)
        took_over, others = watch.took_over, watch.others
        watch.took_over, watch.others = [], []
    finally:
        watch.alone.release()
    if took_over or (others and (mended.samples or mended.draws or mended.waiting or mended.different)):
        warn(_told(session, took_over, others, mended), FailedOver)


def _told(session: Writer, took_over: list[str], others: list[str], mended: Mended) -> str:
    at = datetime.fromtimestamp(session.now() / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    where, names = session.engine.where, ", ".join(took_over or others)
    server = "the server" if names == where else f"the server {names} of the cache"
    what = "took over from another one" if took_over else "was restarted or replaced"
    more = ""
    if mended.waiting:
        more += f" It stores {mended.waiting} more draws as soon as their samples are there."
    if mended.different:
        more += f" {mended.different} draws are lost: others got their samples, or they were made again."
    return (
        f"{server} at {where} {what}; noticed at {at}. It may lack the last writes that were confirmed. Of "
        f"what this process wrote in the last {SECONDS:.0f} s, it has stored {mended.samples} samples and "
        f"{mended.draws} draws again.{more} What processes wrote that have ended since may be lost."
    )


def _mend(session: Writer, pages: Sequence[tuple[str, Page]], mended: Mended) -> None:
    """Write again what is missing of some keys."""
    reads = [Read(key, [*_fields(key, page)], pending=True) for key, page in pages]
    found = session.engine.read(reads)
    lost = [_Lost(session, key, page, there) for (key, page), there in zip(pages, found, strict=True)]
    done = _performed(session, [operation for each in lost for operation in each.unpended()])
    mended.samples += sum(type(result) is Committed for result in done)
    for each in lost:
        _adopt(session, each, mended)


def _adopt(session: Writer, lost: _Lost, mended: Mended) -> None:
    """Add the samples and draws of a key that are missing, except for draws that others have made anew."""
    entry, waiting = lost.entry()
    if waiting:
        mended.owed.add(lost.key)
        mended.waiting += waiting
    while entry is not None and (entry.samples or entry.draws):
        [result] = _performed(session, [Adopt(entry)])
        if not isinstance(result, Adopted) or result.altered:
            return
        if not result.different:
            mended.samples += result.samples
            mended.draws += result.draws
            return
        mended.different += len(result.different)
        for draw in result.different:
            del entry.draws[draw]


def _performed(session: Writer, operations: Sequence[Operation]) -> list[Result | StoreError]:
    """Return the results of operations.

    Raises:
        StoreUnreachable: when the store does not answer.
    """
    results = session.transact(operations) if operations else []
    for result in results:
        if isinstance(result, StoreUnreachable):
            raise result
    return results


def _fields(key: str, page: Page) -> Iterator[bytes]:
    """Iterate over the fields to read: those that were written, and the samples of the draws."""
    indices = {index for draw in _draws(key, page.rows).values() for each in draw for index in each.indices}
    names = dict.fromkeys([rows.KNOWN, *page.rows])
    names.update(dict.fromkeys(rows.numbered(SAMPLE, index) for index in sorted(indices)))
    return iter(names)


def _draws(key: str, found: Rows) -> dict[Draw, list[Segment]]:
    return {
        rows.draw_of(key, name): list(_draw_row(key, name, row).segments.values())
        for name, row in found.items()
        if name.startswith(rows.DRAW)
    }


def _draw_row(key: str, name: bytes, row: bytes) -> DrawRow:
    return DrawRow.loads(key, name, rows.unpack(key, name, row))


class _Lost:
    """What is missing of a key.

    Args:
        session: this process's use of the store.
        key: the key.
        page: what was written.
        there: what is there of it, with the pending indices.
    """

    def __init__(self, session: Writer, key: str, page: Page, there: Rows) -> None:
        self.key = key
        self._page = page
        self._there = there
        self._own = {
            index
            for index in rows.indices_in(there, PENDING)
            if session.is_own(self._author(rows.numbered(PENDING, index)))
        }
        self._stored = dict(self._samples(there))
        names = {sample.id for sample in self._stored.values()}
        written = dict(self._samples(page.rows))
        self._missing = {index: each for index, each in written.items() if each.id not in names}

    def _author(self, name: bytes) -> int:
        return rows.load_lease(self.key, name, rows.unpack(self.key, name, self._there[name]))

    def _samples(self, found: Rows) -> Iterator[tuple[int, EntrySample]]:
        for index in rows.indices_in(found, SAMPLE):
            row = (RAW, None, found[rows.numbered(SAMPLE, index)])
            sample = read_sample(self.key, index, row, {})
            if sample is not None:
                yield index, sample

    def unpended(self) -> Iterator[Commit | ReleaseLease]:
        """Iterate over what ends the pending indices that this process had ended before."""
        for index in sorted(self._page.ended & self._own):
            sample = self._missing.pop(index, None)
            if sample is None:
                yield ReleaseLease(self.key, [index])
                continue
            self._stored[index] = sample
            meta = rows.loads(self.key, rows.numbered(SAMPLE, index), sample.header)
            del meta["id"]  # its stamp overrides the new one
            yield Commit(self.key, index, sample.payload, meta, sample.id)

    def entry(self) -> tuple[Entry | None, int]:
        """Return the missing samples and draws, and how many draws lack a sample.

        There is no entry if the question is missing, and another process must write it again.
        """
        question = self._page.rows if rows.KNOWN in self._page.rows else self._there
        draws: dict[Draw, list[EntrySegment]] = {}
        waiting = 0
        present = {sample.id for sample in (*self._stored.values(), *self._missing.values())}
        ids = {index: sample.id for index, sample in self._stored.items()}
        ids |= {index: sample.id for index, sample in self._missing.items()} | self._page.ids
        given: set[tuple[str, str | None]] = set()
        for name, row in self._page.rows.items():
            if not name.startswith(rows.DRAW) or self._there.get(name, b"")[:DIGEST] == row[:DIGEST]:
                continue
            draw, written = rows.draw_of(self.key, name), _draw_row(self.key, name, row)
            segments = [
                EntrySegment(
                    each.position,
                    tuple(map(ids.get, each.indices)),
                    each.stamp,
                    written.generated[number],
                    each.place,
                    number,
                )
                for number, each in written.segments.items()
            ]
            names = {(draw.namespace, one) for each in segments for one in each.samples}
            if not {one for _, one in names} <= present:
                waiting += name not in self._there
            elif names.isdisjoint(given):
                given |= names
                draws[draw] = segments
        if rows.KNOWN not in question:
            return None, waiting or 1
        scope = rows.loads(self.key, rows.KNOWN, rows.unpack(self.key, rows.KNOWN, question[rows.KNOWN]))[0]
        document = b""
        if rows.QUESTION in question:
            document = rows.unpack(self.key, rows.QUESTION, question[rows.QUESTION])
        return Entry(self.key, scope, document, ordered(self._missing.values()), draws), waiting
