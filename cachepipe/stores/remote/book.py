"""The rows of one key inside a transaction, as ``cachepipe.stores.operations`` sees them.

A `Book` reads rows when they are needed, notes which of them it has shown, and collects what is to be
written. Nothing is written here: the session swaps the rows if those that were shown are still current.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from cachepipe.accounting import RunSums
from cachepipe.contract.allotment import Discarded, Segment, answers_alike
from cachepipe.contract.budgets import Purse
from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import Interval, IntervalSet, Union, intervals_of
from cachepipe.contract.schedule import LAST
from cachepipe.errors import StoreError
from cachepipe.stores import tables
from cachepipe.stores.base import Claim, Sample, new_id, place_of
from cachepipe.stores.ledger import DrawRows, DrawView, KeyRows, Ledger
from cachepipe.stores.remote import entries, rows
from cachepipe.stores.remote.engine import DIGEST, PENDING, SAMPLE, Read, Rows, Swap
from cachepipe.stores.remote.rows import DrawRow, FirstRow

Known = dict[bytes, bytes | None]
"""Rows by field, as they were last seen; None where there was no row."""

_KEPT = frozenset({rows.KNOWN, rows.LISTED, rows.CHANGED, rows.TAKEN, PENDING, rows.SUMS})
"""The fields, or beginnings of fields, whose rows the next transaction of a key probably needs."""

_KEPT_IF_USED = frozenset({rows.DRAW, rows.FIRST})
"""Likewise, if a transaction has used them: the same draw of another namespace may come next."""

LASTING = frozenset({rows.TAKEN, rows.DRAW, rows.FIRST})
"""Likewise, even after a transaction that did not use them."""


class Process(Protocol):
    """What a transaction needs to know about processes and time."""

    def lease(self) -> int:
        """Return this process's lease; begin one if there is none."""
        ...

    def current(self, lease: int) -> int:
        """Return this process's lease for one that it had before; another lease unchanged."""
        ...

    def alive(self, lease: int) -> bool:
        """Return True if the process of a lease is alive."""
        ...

    def now(self) -> int:
        """Return the store's time in microseconds since 1970."""
        ...

    def ask_about(self, leases: Iterable[int]) -> None:
        """Find out which of some processes are alive, together."""
        ...

    def stamp(self) -> int:
        """Return a stamp that is greater than every stamp seen so far."""
        ...

    def see(self, stamp: int) -> None:
        """Take note of a stamp."""
        ...


class Book:
    """The rows of one key.

    Args:
        name: the key.
        known: rows that were read before.
        read: reads the rows of fields.
        read_all: reads all rows but the samples; it is slow.
        process: this process.
        guess: whether other rows are taken to be missing, without reading them, and listed samples that are
            not known to be pending to be stored. The swap finds out whether that is so.

    Attributes:
        whole: whether all pending indices are among the known rows.
        lately: whether the known rows were read together, and nothing else was used.
    """

    def __init__(
        self,
        name: str,
        known: Known,
        read: Callable[[Sequence[bytes]], Rows],
        read_all: Callable[[], Rows],
        process: Process,
        *,
        whole: bool = False,
        lately: bool = False,
        guess: bool = False,
    ) -> None:
        self.name = name
        self.known = known
        self.process = process
        self.whole = whole
        self.lately = lately
        self.guess = guess
        self.read_all = read_all
        self._read = read
        self._shown: dict[bytes, bytes | None] = {}
        self._puts: Rows = {}
        self._deletes: dict[bytes, None] = {}
        self._sets: dict[bytes, StoredSet] = {}
        self._draws: dict[bytes, DrawRow] = {}
        self._firsts: dict[bytes, FirstRow] = {}
        self._changed: dict[bytes, Draw] = {}
        self._samples: dict[int, Sample | Discarded] = {}
        self._wanted: list[bytes] = []
        self._all_shown = False
        self._withdrawn = False

    # Reading.

    def row(self, name: bytes) -> bytes | None:
        """Return the row of a field, as it is or as it will be written."""
        if name in self._puts:
            return self._puts[name]
        if name in self._deletes:
            return None
        return self._show(name)

    def _show(self, name: bytes) -> bytes | None:
        """Return the row of a field as it is; note that it was shown."""
        row = self._stored(name)
        # What a sample holds decides nothing; whether there is one does.
        if row is None or not name.startswith(SAMPLE):
            self._shown[name] = None if row is None else row[:DIGEST]
        return row

    def _stored(self, name: bytes) -> bytes | None:
        if name not in self.known and not self.guess and not self._is_missing(name):
            self.lately = False
            self.known[name] = self._read([name]).get(name)
        return self.known.get(name)

    def _is_missing(self, name: bytes) -> bool:
        """Return True if the known rows show that there is no such row: a pending index has no sample yet."""
        if name.startswith(SAMPLE):
            return self.known.get(PENDING + name[len(SAMPLE) :]) is not None
        return self.whole and name.startswith(PENDING)

    def content(self, name: bytes) -> bytes | None:
        """Return the content of a row."""
        row = self.row(name)
        return None if row is None else rows.unpack(self.name, name, row)

    def indices(self, name: bytes) -> StoredSet:
        """Return the set of indices in a field."""
        found = self._sets.get(name)
        if found is None:
            found = self._sets[name] = StoredSet(self, name)
        return found

    def draw(self, draw: Draw) -> DrawRow:
        """Return the row of a draw; call `change` before it is changed."""
        name = rows.draw_field(draw)
        found = self._draws.get(name)
        if found is None:
            content = self.content(name)
            found = DrawRow() if content is None else _load_draw(self.process, self.name, name, content)
            self._draws[name] = found
        return found

    def sample(self, index: int) -> Sample | Discarded | None:
        """Return the sample at an index, `DISCARDED`, or None."""
        found = self._samples.get(index)
        if found is None:
            name = rows.numbered(SAMPLE, index)
            if self.guess and self._is_stored(index, name):
                self._wanted.append(name)
                found = self._samples[index] = Sample(index, "", b"", b"")  # `fulfil` brings the real one
                return found
            row = self.row(name)
            if row is None:
                return None
            found = self._samples[index] = _load_sample(self.process, self.name, index, row)
        return found

    def _is_stored(self, index: int, name: bytes) -> bool:
        """Return True if a sample that was not read is probably stored."""
        known = name in self.known or name in self._puts or self._is_missing(name)
        return not known and index in self.indices(rows.LISTED)

    def fulfil(self, found: Rows) -> dict[int, Sample] | None:
        """Take the samples that the swap wanted; return them by index, or None if one is missing by now."""
        samples: dict[int, Sample] = {}
        for name in self._wanted:
            index, row = int(name[len(SAMPLE) :]), found.get(name)
            sample = None if row is None else _load_sample(self.process, self.name, index, row)
            if not isinstance(sample, Sample):
                return None
            samples[index] = sample
        self._samples.update(samples)
        return samples

    def author(self, index: int) -> int | None:
        """Return the lease of the process that generates a sample, or None."""
        name = rows.numbered(PENDING, index)
        content = self.content(name)
        return None if content is None else self.process.current(rows.load_lease(self.name, name, content))

    def generating(self) -> dict[int, int]:
        """Return the lease of the process that generates each pending index, as far as they are known."""
        names = [name for name in {*self.known, *self._puts} if name.startswith(PENDING)]
        found = {index: self.author(index) for index in rows.indices_in(names, PENDING)}
        return {index: lease for index, lease in found.items() if lease is not None}

    def show_all(self) -> list[bytes]:
        """Note that all rows but samples were shown, and that there are no others; return their fields."""
        if not self._all_shown:
            found = self.read_all()
            agree = all(found.get(name) == row for name, row in self.known.items() if name[:2] != SAMPLE)
            lately = self.lately and agree  # then all of it was so when it was read again
            self.learn({**found})
            self.lately, self._all_shown = lately, True
            for name in self._names(self.known):
                self._show(name)
        return [
            name
            for name in self._names({**self.known, **self._puts, **dict.fromkeys(self._changed)})
            if name in self._changed or self.row(name) is not None
        ]

    @staticmethod
    def _names(names: Iterable[bytes]) -> list[bytes]:
        return [name for name in names if not name.startswith((PENDING, SAMPLE))]

    def draws(self) -> dict[Draw, DrawRow]:
        """Return the rows of all draws."""
        found = [rows.draw_of(self.name, name) for name in self.show_all() if name.startswith(rows.DRAW)]
        return {draw: self.draw(draw) for draw in found}

    def users(self) -> list[str]:
        """Return the labels of the namespaces that use the shared draw."""
        return [rows.decoded(name[len(rows.USE) :]) for name in self.show_all() if name.startswith(rows.USE)]

    # Writing.

    def put(self, name: bytes, content: bytes) -> None:
        """Write the content of a row."""
        self.put_row(name, rows.pack(self.name, name, content))

    def put_row(self, name: bytes, row: bytes) -> None:
        """Write a row."""
        self._deletes.pop(name, None)
        self._puts[name] = row

    def delete(self, name: bytes) -> None:
        """Delete a row."""
        self._puts.pop(name, None)
        self._deletes[name] = None

    def put_sample(self, sample: Sample) -> None:
        """Write a sample."""
        self.put_row(rows.numbered(SAMPLE, sample.index), rows.dump_sample(self.name, sample))
        self._samples[sample.index] = sample

    def put_why(self, index: int, why: str) -> None:
        """Record that and why a sample is discarded, unless that is recorded."""
        name = rows.numbered(rows.WHY, index)
        if self.row(name) is None:
            self.put(name, rows.dump_why(self.process.now() / 1e6, why))

    def discard(self, index: int) -> None:
        """Mark a sample as discarded; keep its bytes."""
        name = rows.numbered(SAMPLE, index)
        self.put_row(name, rows.dump_discarded(self.name, index, self.row(name)))
        self._samples.pop(index, None)

    def erase(self, index: int) -> None:
        """Delete the content of a sample; keep its header."""
        name = rows.numbered(SAMPLE, index)
        self.put_row(name, rows.dump_erased(self.name, index, self.row(name)))
        self._samples.pop(index, None)

    def delete_all(self) -> None:
        """Delete all rows: there are no draws."""
        listed = [index for each in intervals_of(self.indices(rows.LISTED)) for index in range(*each)]
        names = [*self.show_all(), *(rows.numbered(SAMPLE, index) for index in listed)]
        self._sets.clear()
        self._draws.clear()
        self._firsts.clear()
        self._changed.clear()
        self._samples.clear()
        for name in names:
            self.delete(name)

    def withdraw(self, namespace: str) -> None:
        """Delete what a namespace has taken and used; its draws have no segments any more."""
        self._withdrawn = True
        taken = rows.taken_field(namespace)
        self._sets.pop(taken, None)
        for name in (taken, rows.USE + rows.encoded(namespace)):
            if self.row(name) is not None:
                self.delete(name)

    def change(self, draw: Draw) -> DrawRow:
        """Return the row of a draw, which is written in the end."""
        self._changed[rows.draw_field(draw)] = draw
        return self.draw(draw)

    def first(self, draw: Draw) -> FirstRow:
        """Return the earliest namespaces of a draw."""
        name = rows.first_field(draw)
        found = self._firsts.get(name)
        if found is None:
            content = self.content(name)
            found = FirstRow() if content is None else FirstRow.loads(self.name, name, content)
            self._firsts[name] = found
        return found

    def put_first(self, draw: Draw, row: FirstRow) -> None:
        """Write the earliest namespaces of a draw."""
        name = rows.first_field(draw)
        if row.namespaces or row.more:
            self.put(name, row.dumps(name))
        else:
            self.delete(name)

    def swap(self, *, fair: bool) -> Swap | None:
        """Return what is to be written; None if nothing is, and what was shown was read at one moment."""
        for name, draw in self._changed.items():
            found = self.draw(draw)
            if found.segments:
                self.put(name, found.dumps())
            else:
                self.delete(name)
        for name, indices in self._sets.items():
            indices.write(name)
        if not self._puts and not self._deletes and self.lately:
            return None
        wakes = any(name.startswith(PENDING) for name in self._deletes)
        changes = self._changes()
        if changes or self._changed:
            self._show(rows.CHANGED)  # what was read must not be removed meanwhile, nor changed twice
        deletes, whole = [*self._deletes], self._count() if self._all_shown else None
        nonce = new_id().encode()
        return Swap(
            self.name, nonce, fair, self._shown, self._puts, deletes, wakes, changes, whole, self._wanted
        )

    def _count(self) -> int:
        """Return how many rows there are but samples and pending indices."""
        return sum(self._shown[name] is not None for name in self._names(self._shown))

    def _changes(self) -> bool:
        """Return True if a draw that may have been answered before is answered otherwise afterwards."""
        if any(self.known.get(name) is not None for name in self._puts if name.startswith(SAMPLE)):
            return True  # it is discarded, or deleted
        if self._withdrawn:
            return True
        return any(self._answers_otherwise(name, draw) for name, draw in self._changed.items())

    def _answers_otherwise(self, name: bytes, draw: Draw) -> bool:
        row = self.known.get(name)
        if row is None:
            return False
        before = DrawRow.loads(self.name, name, rows.unpack(self.name, name, row))
        return not answers_alike([*before.segments.values()], [*self.draw(draw).segments.values()])

    @property
    def begins(self) -> bool:
        """Whether the question is asked for the first time, or anew after it was deleted."""
        return rows.KNOWN in self._puts and self.known.get(rows.KNOWN) is None

    def announced(self, number: int) -> None:
        """Note the number of the change that the swap makes."""
        self.put(rows.CHANGED, rows.dump_change(number))

    def ids(self) -> dict[int, str]:
        """Return the ids of the samples that were shown, by index."""
        return {index: each.id for index, each in self._samples.items() if isinstance(each, Sample)}

    def written(self) -> Known:
        """Return the known rows after the swap that are worth remembering."""
        left = {**self.known, **self._puts, **dict.fromkeys(self._deletes)}
        used = {**self._shown, **self._puts}
        return {
            name: row
            for name, row in left.items()
            if name[:2] in _KEPT or (name[:2] in _KEPT_IF_USED and name in used)
        }

    def corrected(self, current: Rows) -> Known:
        """Return the rows that are worth remembering after a conflict, with the current ones that it told."""
        left = {**self.known, **dict.fromkeys(self._shown), **current}
        return {name: row for name, row in left.items() if name[:2] in _KEPT | LASTING}

    @property
    def shown(self) -> Iterable[bytes]:
        """The fields whose rows were shown."""
        return self._shown.keys()

    def learn(self, known: Known) -> None:
        """Add rows that were read later than the others."""
        self.known = {**known, **self.known}
        self.lately = False

    def all_used(self) -> Read:
        """Return what reads all known rows at one moment."""
        fields = [name for name in self.known if not name.startswith(PENDING)]
        return Read(self.name, fields, pending=True)

    def entry(self) -> Entry | None:
        """Return all that is held of the question, and note that all of it was shown; None if it is new."""
        if self.row(rows.KNOWN) is None:
            return None
        self.learn({**self.read_all()})
        names = [name for name in self.known if not name.startswith((PENDING, SAMPLE))]
        found = {name: row for name in names if (row := self.row(name)) is not None}
        fields = [rows.numbered(SAMPLE, index) for index in entries.listed_in(self.name, found)]
        if unknown := [name for name in fields if name not in self.known]:
            self.learn({**dict.fromkeys(unknown), **self._read(unknown)})
        samples = [(int(name[len(SAMPLE) :]), row) for name in fields if (row := self.row(name)) is not None]
        return entries.entry(self.name, found, samples)

    # Looking ahead: what is looked at is not thereby shown.

    def followed(self, draw: Draw) -> bytes | None:
        """Return the field of the draw that another one follows, if it is named and its row is not known."""
        name = rows.first_field(draw)
        row = self.known.get(name)
        if row is None:
            return None
        named = rows.named_field(row)
        return None if named is None or named in self.known else named

    def authors(self) -> set[int]:
        """Return the leases of the processes that generate pending indices, as far as they are known."""
        pending = [
            (name, row) for name, row in self.known.items() if row is not None and name.startswith(PENDING)
        ]
        leases = [
            rows.load_lease(self.name, name, rows.unpack(self.name, name, row)) for name, row in pending
        ]
        return {*map(self.process.current, leases)}

    def lists(self, index: int) -> bool:
        """Return True if an index is listed."""
        row = self.known.get(rows.LISTED)
        if row is None:
            return False
        return index in rows.load_set(self.name, rows.LISTED, rows.unpack(self.name, rows.LISTED, row))


class StoredSet:
    """A set of indices in a row: read when it is first used, and written in the end if it has changed."""

    __slots__ = ("_before", "_book", "_indices", "_name")

    def __init__(self, book: Book, name: bytes) -> None:
        self._book = book
        self._name = name
        self._indices: IntervalSet | None = None
        self._before = b""

    def _read(self) -> IntervalSet:
        if self._indices is None:
            self._before = self._book.content(self._name) or b""
            self._indices = rows.load_set(self._book.name, self._name, self._before)
        return self._indices

    def interval_at(self, at: int) -> Interval | None:
        """Return the first interval whose stop is above ``at``."""
        return self._read().interval_at(at)

    def __contains__(self, index: int, /) -> bool:
        return index in self._read()

    def add(self, index: int) -> None:
        """Put an index into the set."""
        self._read().add(index)

    def remove(self, index: int) -> None:
        """Take an index out of the set."""
        self._read().remove(index)

    def write(self, name: bytes) -> None:
        """Write the set if it has changed."""
        if self._indices is None:
            return
        content = rows.dump_set(self._indices)
        if content == self._before:
            return
        if content:
            self._book.put(name, content)
        else:
            self._book.delete(name)


class _Rows(DrawRows):
    """The rows of a key and, if a draw is given, of the draw."""

    def __init__(self, book: Book, draw: Draw | None = None, avoid: IntervalSet | None = None) -> None:
        self._book = book
        self.name = book.name
        self.listed = book.indices(rows.LISTED)
        if draw is not None:
            self._draw = draw
            taken = book.indices(rows.taken_field(draw.namespace))
            self.taken = taken if avoid is None else Union(taken, avoid)
            self.segments = list(book.draw(draw).segments.values())
            for place, segment in enumerate(self.segments):
                lease = book.process.current(segment.lease)
                if lease != segment.lease:
                    self.segments[place] = segment._replace(lease=lease)

    # The key.

    def sample(self, index: int) -> Sample | Discarded | None:
        return self._book.sample(index)

    def has_row(self, index: int) -> bool:
        return self._book.row(rows.numbered(SAMPLE, index)) is not None

    def pending(self, index: int) -> int | None:
        return self._book.author(index)

    def pend(self, index: int) -> None:
        self._book.put(rows.numbered(PENDING, index), rows.dump_lease(self._book.process.lease()))

    def unpend(self, index: int) -> None:
        self._book.delete(rows.numbered(PENDING, index))

    def discard(self, index: int, why: str) -> None:
        self._book.put_why(index, why)
        self._book.discard(index)

    def drawn(self) -> IntervalSet:
        found = IntervalSet()
        for row in self._book.draws().values():
            for segment in row.segments.values():
                for index in segment.indices:
                    found.add(index)
        return found

    def makers(self, namespace: str) -> tuple[set[int], set[int]]:
        holders: set[int] = set()
        makers: set[int] = set()
        current = self._book.process.current
        for draw, row in self._book.draws().items():
            if draw.namespace == namespace:
                holders.update(current(lease) for _, lease, _ in row.holders)
                for segment in row.segments.values():
                    makers.add(current(segment.lease))
                    if segment.token is not None:
                        holders.add(current(segment.lease))
        return holders, makers

    def withdraw(self, namespace: str) -> None:
        for draw, row in self._book.draws().items():
            if draw.namespace == namespace:
                own = _Rows(self._book, draw)
                for segment in [*row.segments.values()]:
                    own.drop(segment)
        self._book.withdraw(namespace)

    def users(self) -> list[str]:
        return self._book.users()

    # The draw.

    def others(self) -> Sequence[Segment]:
        first = self._book.first(self._draw)
        labels = [label for _, label in first.namespaces if label != self._draw.namespace]
        if not labels and first.more:
            labels = [label for _, label in self._found() if label != self._draw.namespace]
        if not labels:
            return ()
        return list(self._book.draw(self._draw._replace(namespace=labels[0])).segments.values())

    def _found(self) -> list[tuple[int, str]]:
        """Return the lowest stamp and the label of each namespace that has made the draw, in order."""
        place = rows.DRAW + rows.place_of(self._draw) + b"\0"
        found = [
            rows.draw_of(self.name, name).namespace
            for name in self._book.read_all()
            if name.startswith(place)
        ]
        stamps = [
            (
                min(
                    segment.stamp
                    for segment in self._book.draw(self._draw._replace(namespace=label)).segments.values()
                ),
                label,
            )
            for label in found
            if label != SHARED
        ]
        return sorted(stamps)

    def add(self, segment: Segment, generated: int) -> None:
        row = self._book.change(self._draw)
        if not row.segments and not self._draw.shared:
            self._begun(segment)
        row.segments[segment.number] = segment
        row.generated[segment.number] = generated

    def insert(self, segment: Segment, generated: int) -> None:
        self.add(segment, generated)
        for index in segment.indices:
            self.taken.add(index)

    def _begun(self, segment: Segment) -> None:
        """Note that the namespace has made the draw; it may be earlier than the namespaces that are named."""
        first = self._book.first(self._draw)
        begun = (segment.stamp, self._draw.namespace)
        if first.more and begun > max(first.namespaces, default=(0, "")):
            return
        first.namespaces = sorted([*first.namespaces, begun])
        first.more = first.more or len(first.namespaces) > rows.MOST_FIRST
        del first.namespaces[rows.MOST_FIRST :]
        self._book.put_first(self._draw, first)

    def replace(self, segment: Segment) -> None:
        self._book.change(self._draw).segments[segment.number] = segment

    def drop(self, segment: Segment) -> None:
        row = self._book.change(self._draw)
        del row.segments[segment.number]
        if row.segments or self._draw.shared:
            return
        first = self._book.first(self._draw)
        left = [one for one in first.namespaces if one[1] != self._draw.namespace]
        if len(left) < len(first.namespaces):
            first.namespaces = left
            self._book.put_first(self._draw, first)

    def hold(self, number: int, token: str) -> None:
        held = (number, self._book.process.lease(), token)
        if held not in self._book.draw(self._draw).holders:
            self._book.change(self._draw).holders.append(held)

    def unhold(self, number: int, token: str) -> bool:
        current, lease = self._book.process.current, self._book.process.lease()
        held = self._book.draw(self._draw).holders
        left = [one for one in held if (one[0], current(one[1]), one[2]) != (number, lease, token)]
        if len(left) == len(held):
            return False
        self._book.change(self._draw).holders = left
        return True

    def holders(self, number: int) -> Iterable[int]:
        current = self._book.process.current
        return [current(lease) for of, lease, _ in self._book.draw(self._draw).holders if of == number]

    def use(self, namespace: str) -> None:
        name = rows.USE + rows.encoded(namespace)
        if self._book.row(name) is None:
            self._book.put(name, rows.dumps(self._book.process.now() / 1e6))


class _Ledger(Ledger):
    """The rows of one key, or of the sums of one run, as a transaction changes them."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._process = book.process

    def lease(self) -> int:
        return self._process.lease()

    def alive(self, lease: int) -> bool:
        return self._process.alive(self._process.current(lease))

    def made_by_others(self, leases: set[int]) -> bool:
        own = self._process.lease()
        others = {self._process.current(lease) for lease in leases} - {own}
        return any(map(self._process.alive, others))

    def pending_of(self, lease: int) -> Iterable[tuple[_Rows, int]]:
        key = _Rows(self._book)
        return [(key, index) for index, of in self._book.generating().items() if of == lease]

    def end(self, lease: int) -> None:
        for index, of in self._book.generating().items():
            if of == lease:
                self._book.delete(rows.numbered(PENDING, index))

    def stamp(self) -> int:
        return self._process.stamp()

    def author(self) -> tuple[int, int]:
        return self._process.lease(), self._process.stamp()

    def prepare(self, claims: Sequence[Claim]) -> Iterable[int]:  # noqa: ARG002 - the session has read it
        leases = self._book.authors()
        self._process.ask_about(leases)
        return sorted(lease for lease in leases if not self._process.alive(lease))

    def claimed(self, claim: Claim) -> _Rows:
        question = claim.question
        found = _Rows(self._book, claim.draw, claim.avoid)
        found.is_new = self._asked(question.scope, question.document, self._process.now() / 1e6)
        return found

    def _asked(self, scope: str | None, document: bytes, at: float) -> bool:
        """Store a question if it is new; return True if it is."""
        book = self._book
        is_new = book.row(rows.KNOWN) is None
        if is_new:
            book.put(rows.KNOWN, rows.dumps([scope, at]))
            book.put(rows.QUESTION, document)
        return is_new

    def entries(self, keys: Sequence[str]) -> list[Entry | None]:
        return [self._book.entry() for _ in keys]  # the book has one key

    def adopted(self, entry: Entry) -> _Rows:
        for segments in entry.draws.values():
            for segment in segments:
                self._process.see(segment.stamp)
        at = entry.first_stamp() / 1e6 or self._process.now() / 1e6
        self._asked(entry.scope, entry.document, at)
        return _Rows(self._book)

    def put(self, samples: Sequence[tuple[str, Sample]]) -> None:
        for _, sample in samples:
            self._book.put_sample(sample)

    def draw(self, draw: Draw) -> _Rows:
        return _Rows(self._book, draw)

    def key(self, name: str) -> _Rows:
        if self._book.row(rows.KNOWN) is None:
            raise StoreError(f"the cache knows no key {name}; claim a draw of it first")
        return _Rows(self._book)

    def store(self, key: str, sample: Sample) -> bool:  # noqa: ARG002 - the book has one key
        if self._book.row(rows.numbered(SAMPLE, sample.index)) is not None:
            return False
        self._book.put_sample(sample)
        return True

    def store_pending(self, samples: Sequence[tuple[str, Sample]]) -> bool:
        indices = [sample.index for _, sample in samples]
        lease = self._process.lease()
        if len({*indices}) < len(indices) or any(self._book.author(index) != lease for index in indices):
            return False
        for _, sample in samples:
            self._book.delete(rows.numbered(PENDING, sample.index))
            self._book.put_sample(sample)
        return True

    # What is removed.

    def erase(self, samples: Sequence[tuple[KeyRows, int, str]]) -> None:
        for _, index, why in samples:  # the book has one key
            self._book.put_why(index, why)
            self._book.erase(index)

    def delete(self, keys: Sequence[KeyRows]) -> list[bool]:
        for _ in keys:  # the book has one key
            self._book.delete_all()
        return [True] * len(keys)

    def removals(self) -> list[dict[str, Any]]:
        names = [name for name in self._book.show_all() if name.startswith(rows.REMOVAL)]
        return [rows.loads(self._book.name, name, self._book.content(name) or b"") for name in names]

    def put_removal(self, name: str, document: bytes) -> None:
        self._book.put(rows.REMOVAL + name.encode(), document)

    # Sums: the key is a run.

    def sums(self, run: str, namespace: str) -> RunSums:  # noqa: ARG002 - the book has one run
        name = rows.SUMS + rows.encoded(namespace)
        content = self._book.content(name)
        return RunSums() if content is None else rows.load_sums(RunSums.loads, self._book.name, name, content)

    def put_sums(self, run: str, namespace: str, sums: RunSums) -> None:  # noqa: ARG002 - likewise
        self._book.put(rows.SUMS + rows.encoded(namespace), sums.dumps())

    # Budgets: all are under one key.

    def purse(self, namespace: str) -> Purse:
        name = rows.BUDGET + rows.encoded(namespace)
        content = self._book.content(name)
        if content is None:
            return Purse()
        return rows.load_sums(tables.load_purse, self._book.name, name, content)

    def put_purse(self, namespace: str, purse: Purse) -> None:
        self._book.put(rows.BUDGET + rows.encoded(namespace), tables.dump_purse(purse))


class StoredDraw(DrawView):
    """A draw, as its row and those of its samples show it; all else is missing.

    Args:
        draw: the draw.
        known: these rows.
        process: this process.
    """

    __slots__ = ("_known", "_process", "name", "segments")

    def __init__(self, draw: Draw, known: Mapping[bytes, bytes | None], process: Process) -> None:
        self.name = draw.key
        self._known = known
        self._process = process
        name = rows.draw_field(draw)
        row = known.get(name)
        self.segments = []
        if row is not None:
            self.segments = DrawRow.segments_in(draw.key, name, rows.unpack(draw.key, name, row))
            for segment in self.segments:
                process.see(segment.stamp)

    def sample(self, index: int) -> Sample | Discarded | None:
        """Return the sample at an index, `DISCARDED`, or None."""
        row = self._known.get(rows.numbered(SAMPLE, index))
        return None if row is None else _load_sample(self._process, self.name, index, row)

    def others(self) -> Sequence[Segment]:
        """Return no segments."""
        return ()


def _load_draw(process: Process, key: str, name: bytes, content: bytes) -> DrawRow:
    """Return the row of a draw, whose stamps the process has then seen."""
    found = DrawRow.loads(key, name, content)
    for segment in found.segments.values():
        process.see(segment.stamp)
    return found


def _load_sample(process: Process, key: str, index: int, row: bytes) -> Sample | Discarded:
    """Return the sample in a row, whose stamp the process has then seen, or `DISCARDED`."""
    found = rows.load_sample(key, index, row)
    if isinstance(found, Sample) and (place := place_of(found.header)) is not LAST:
        process.see(place.stamp)
    return found


def view(book: Book, draw: Draw) -> DrawRows:
    """Return the rows of a draw and of its key, as operations see them."""
    return _Rows(book, draw)


def ledger(book: Book) -> Ledger:
    """Return the rows of one key, or of the sums of one run, as operations change them."""
    return _Ledger(book)
