"""The ledger's tables inside one transaction: an engine of ``cachepipe.stores.ledger``.

Small sets of indices stay in memory while no other connection writes (SQLite's ``data_version`` shows it),
and new rows are gathered and written at the end, many per statement. So a thousand draws claimed at once cost
a few statements, and a lone draw of a known key costs three reads and two inserts. Reading ahead changes no
decision.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from cachepipe.accounting import RunSums
from cachepipe.contract.allotment import Discarded, Segment
from cachepipe.contract.budgets import Purse
from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import IntervalSet, MutableIndexSet, Union, changes, intervals_of
from cachepipe.contract.keys import Question
from cachepipe.errors import DamagedCache, StoreError
from cachepipe.stores import entries, tables
from cachepipe.stores.base import Claim, Operation, Result, Sample
from cachepipe.stores.ledger import DrawRows, KeyRows, Ledger
from cachepipe.stores.operations import perform
from cachepipe.stores.sets import LargeSet, SmallSet
from cachepipe.stores.tables import FEW, LISTED, ROWS, SEGMENT, SMALL, SegmentRow, pack, read_sample, unpack

_REMEMBERED = 20_000  # keys, namespaces and sets remembered between transactions, half a kilobyte each
_SEVERAL = 8  # if there are more claims than this, their rows, sets and samples are read ahead together

Place = tuple[int, str, int, str]
"""A draw apart from its namespace, as the ledger writes it: key, request id, occurrence, replicate."""


class SqlLedger(Ledger):
    """The rows of all keys on a store's connections, and what is remembered of them between transactions.

    What is remembered is invalid once another connection has written.

    Args:
        leased: returns the name of this process's lease.
        lives: returns True if the process of a lease, by its id and name, is alive.
        shared: returns True if one of some leases is that of another live process.
        check_files: raises an error if the files are gone.
        written: the ids of keys that readers have seen; they never change.
    """

    ledger: sqlite3.Connection
    shelf: sqlite3.Connection

    def __init__(
        self,
        leased: Callable[[], str],
        lives: Callable[[int, str], bool],
        shared: Callable[[set[int]], bool],
        check_files: Callable[..., None],
        written: dict[str, int],
    ) -> None:
        self._leased, self._lives, self._shared, self._check_files = leased, lives, shared, check_files
        self._written = written
        self._version = -1
        self._deleted = 0  # the greatest number of a key that was deleted
        self.own_lease: int | None = None
        self.reaped = 0.0
        self.now = 0.0
        self.greatest_stamp = 0
        """The greatest stamp that was seen, in microseconds since 1970."""
        self.written_stamp = 0
        """The greatest stamp of a row of the ledger that this process has written."""
        self.written_sample: str | None = None
        """The name of the sample that this process has stored last."""
        self._ids: dict[str, int] = {}
        self._namespaces: dict[str, int] = {}
        self._labels: dict[int, str] = {LISTED: ""}
        self._sets: dict[tuple[int, int], SmallSet | None] = {}
        self._changed: dict[tuple[int, int], SmallSet] = {}
        """Sets with changes that are not written yet."""
        self._grown: list[tuple[int, int]] = []
        """Sets that have grown too large for memory; the current transaction still uses them."""
        self.found: dict[Place, list[SegmentRow]] = {}
        self.seen: dict[tuple[str, int], Sample | Discarded] = {}
        self._gather()

    def _gather(self) -> None:
        """Begin to gather rows."""
        self._questions: list[tuple[int, str, str | None, bytes, float]] = []
        self.intervals: list[tuple[int, int, int, int, bytes]] = []
        self.segments: list[tuple[Any, ...]] = []
        self.pending: list[tuple[int, int, int]] = []
        self.uses: list[tuple[int, int, float]] = []
        self._gathered: tuple[tuple[str, list[Any]], ...] = (
            ("INSERT INTO keys VALUES(?, ?, ?, ?, ?)", self._questions),
            (tables.PUT_INTERVAL, self.intervals),
            (tables.PUT_SEGMENT, self.segments),
            ("INSERT INTO pending VALUES(?, ?, ?)", self.pending),
            ("INSERT OR IGNORE INTO uses VALUES(?, ?, ?)", self.uses),
        )
        self._new_keys: set[int] = set()
        self.begun: set[int] = set()  # new keys whose first samples are claimed
        self.touched: set[Place] = set()  # draws with gathered segments

    def forget(self) -> None:
        """Forget everything: a transaction was rolled back, or another connection has written."""
        self.own_lease = None
        self._labels = {LISTED: ""}
        for known in (self._ids, self._namespaces, self._sets, self._changed, self.found, self.seen):
            known.clear()
        self._grown.clear()
        self._gather()

    def run(
        self, ledger: sqlite3.Connection, shelf: sqlite3.Connection, operations: Sequence[Operation]
    ) -> list[Result]:
        """Perform operations after ``BEGIN IMMEDIATE``; return their results, before the COMMIT."""
        self.ledger, self.shelf = ledger, shelf
        self.now = time.time()
        self.greatest_stamp = max(int(self.now * 1e6) - 1, self.greatest_stamp)
        version = ledger.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version or len(self._sets) > _REMEMBERED or len(self._ids) > _REMEMBERED:
            self.forget()
            self._version = version
            row = ledger.execute("SELECT value FROM meta WHERE name = 'deleted'").fetchone()
            self._deleted = 0 if row is None else int(row[0])
        if self._grown:
            self._sets.update(dict.fromkeys(self._grown))
            self._grown.clear()
        results = perform(self, operations)
        self.flush()
        if self.found:
            self.found.clear()
        if self.seen:
            self.seen.clear()
        return results

    # Rows that are read ahead.

    def prepare(self, claims: Sequence[Claim]) -> Sequence[int]:
        """Read ahead for many claims; return the leases of dead processes, ten times a second at most."""
        if len(claims) >= _SEVERAL:
            self._read_ahead(claims)
        now = time.monotonic()
        return () if now - self.reaped < 0.1 else self._dead(now)

    def _read_ahead(self, claims: Sequence[Claim]) -> None:
        """Read the rows, sets and samples that the claims will probably need, in a few statements."""
        self.intern([claim.question.key for claim in claims])
        known = self._ids
        old = [claim for claim in claims if known.get(claim.draw.key)]
        if len(old) < _SEVERAL:
            return
        self.found = {_place(known[claim.draw.key], claim.draw): [] for claim in old}
        wanted = list(self.found)
        for at in range(0, len(wanted), ROWS):
            values: list[Any] = [value for place in wanted[at : at + ROWS] for value in place]
            values += [None] * (4 * ROWS - len(values))
            for row in self.ledger.execute(tables.DRAWS, values):
                self.found[row[:4]].append(SegmentRow._make(row[4:]))
        self._read_sets_ahead(old)
        self._read_samples_ahead(old)

    def _read_sets_ahead(self, claims: Sequence[Claim]) -> None:
        """Read the list of each key, and what the namespaces of the claims have taken."""
        known, sets = self._ids, self._sets
        owners: dict[int, dict[int, str]] = {LISTED: {}}
        for claim in claims:
            name = claim.draw.key
            owners[LISTED][known[name]] = name
            owners.setdefault(self.namespace(claim.draw.namespace), {})[known[name]] = name
        for owner, names in owners.items():
            rows: dict[int, list[tuple[int, int, bytes]]] = {
                key: [] for key in names if (owner, key) not in sets
            }
            if len(rows) >= _SEVERAL:
                for key, *row in self.ledger.execute(tables.SETS, (owner, orjson.dumps([*rows]).decode())):
                    rows[key].append(tuple(row))
                for key, found in rows.items():
                    self._remember(owner, key, names[key], found, self.label(owner))

    def _read_samples_ahead(self, claims: Sequence[Claim]) -> None:
        """Read the samples that claims will probably get: their own, the coupled, or the first free."""
        wanted: dict[str, tuple[str, int]] = {}
        for claim in claims:
            draw = claim.draw
            if claim.n <= FEW:
                for index in self._probable(draw, claim.n):
                    wanted[f"{draw.key}/{index}"] = (draw.key, index)
        names = orjson.dumps([*wanted]).decode()
        for name, mode, filename, value in self.shelf.execute(tables.SAMPLES, (names,)):
            self.seen[wanted[name]] = tables.parse_sample(*wanted[name], mode, filename, value)

    def _probable(self, draw: Draw, n: int) -> Sequence[int]:
        """Return the indices that a draw whose rows were read ahead will probably get."""
        key, namespace = self._ids[draw.key], self.namespace(draw.namespace)
        if rows := self.found[_place(key, draw)]:
            others = {row.namespace: row for row in reversed(rows)}
            row = others.get(namespace) or tables.earliest(others.values())
            if row.position == 0:
                return unpack(row.indices)[:n]
        taken = self.set_of(namespace, key, draw.key).interval_at(0)
        first = 0 if taken is None or taken[0] else taken[1]
        return range(first, first + n)

    # The rows of keys and draws.

    def claimed(self, claim: Claim) -> DrawRows:
        """Return the rows of the draw that claims; store its question if it is new."""
        draw = claim.draw
        key = self._asked(claim.question)
        if key in self._new_keys:
            if key not in self.begun:
                return _NewDraw(self, key, draw)
            self.flush()
        rows = _Draw(self, key, draw)
        if claim.avoid is not None:
            rows.taken = Union(rows.taken, claim.avoid)
        return rows

    def draw(self, draw: Draw) -> DrawRows:
        """Return the rows of a draw of a known key; the segments are read at once."""
        self.flush()
        return _Draw(self, self.known(draw.key), draw)

    def key(self, name: str) -> KeyRows:
        """Return the rows of a key.

        Raises:
            StoreError: when nobody has asked the question.
        """
        self.flush()
        return _Key(self, self.known(name), name)

    def read(self, query: str, values: tuple[Any, ...]) -> list[SegmentRow]:
        """Return the rows of a statement on segments."""
        return list(map(SegmentRow._make, self.ledger.execute(query, values)))

    def read_draw(self, where: tuple[int, str, int, str, int], name: str, whose: str) -> list[SegmentRow]:
        """Return the first rows of a draw, over all namespaces; read the sets that its claim needs with them.

        Args:
            where: the place of the draw, and its namespace.
            name: its key.
            whose: the label of the namespace.
        """
        key, namespace, sets = where[0], where[4], self._sets
        if (namespace, key) in sets:
            return self.read(f"{tables.DRAW} LIMIT {FEW + 1}", where[:4])
        rows: list[SegmentRow] = []
        found: dict[int, list[tuple[int, int, bytes]]] = {namespace: [], LISTED: []}
        for row in self.ledger.execute(tables.DRAW_AND_SETS, where):
            if row[1] is None:
                found[row[0]].append((row[2], row[3], row[8]))
            else:
                rows.append(SegmentRow._make(row))
        for (owner, intervals), label in zip(found.items(), (whose, ""), strict=True):
            if (owner, key) not in sets:
                self._remember(owner, key, name, intervals, label)
        return rows

    def saw(self, row: SegmentRow) -> None:
        """Continue after the stamp of a row."""
        try:
            self.greatest_stamp = max(self.greatest_stamp, row.stamp)
        except TypeError as error:
            raise tables.damaged_row("a stamp that is not a number") from error

    def first(self, place: Place) -> int | None:
        """Return the earliest namespace of a draw that has many rows, and note it.

        None if all of the rows belong to the key's shared draw, which has no namespace.
        """
        row = self.ledger.execute(f"SELECT namespace FROM firsts{tables.PLACE}", place).fetchone()
        if row is None:
            rows = self.read(f"{tables.OTHERS} ORDER BY stamp, namespace LIMIT 1", (*place, -1))
            if not rows:
                return None
            row = rows[0]
            self.ledger.execute("INSERT INTO firsts VALUES(?, ?, ?, ?, ?)", (*place, row[0]))
        return int(row[0])

    # Samples.

    def store(self, key: str, sample: Sample) -> bool:
        """Store a sample, durably; return False if there is one at its index."""
        self._check_files(deleted=True)
        return self._put([(key, sample)])

    def store_pending(self, samples: Sequence[tuple[str, Sample]]) -> bool:
        """Store samples that this process generates; return False, and change nothing, if it does not."""
        self.flush()
        self._check_files(deleted=True)
        self.intern([key for key, _ in samples])
        lease = self.lease()
        pending = [(self.known(key), sample.index, lease) for key, sample in samples]
        self.ledger.execute("SAVEPOINT commits")
        gone = self.ledger.executemany(tables.UNPEND, pending).rowcount
        stored = gone == len(samples) and self._put(samples)
        if not stored:
            self.ledger.execute("ROLLBACK TO commits")
        self.ledger.execute("RELEASE commits")
        return stored

    def _put(self, samples: Sequence[tuple[str, Sample]], *, anyway: bool = False) -> bool:
        """Write rows to the samples file, durably.

        Returns:
            Whether they were written: if not all of them are new, only ``anyway``.
        """
        self.seen.clear()
        self.shelf.execute("BEGIN IMMEDIATE")
        rows = []
        for key, sample in samples:
            name = f"{key}/{sample.index}"
            rows.append((name, self.now, self.now, tables.sample_row(name, sample)))
        put = self.shelf.executemany(tables.PUT_ANYWAY if anyway else tables.PUT, rows).rowcount
        if put != len(samples):
            self.shelf.execute("ROLLBACK")
            return False
        self.shelf.execute("COMMIT")
        self.written_sample = name
        return True

    def put(self, samples: Sequence[tuple[str, Sample]]) -> None:
        """Store samples with their keys, durably, at indices that are free.

        What is stored there is not listed: a process that was killed has left it.
        """
        self._check_files(deleted=True)
        self._put(samples, anyway=True)

    # What is removed.

    def erase(self, samples: Sequence[tuple[KeyRows, int, str]]) -> None:
        """Discard samples, each with its key and the reason; their headers stay, and their content goes."""
        if not samples:
            return
        self.flush()
        self._check_files(deleted=True)
        self.seen.clear()
        self.shelf.execute("BEGIN IMMEDIATE")
        for rows, index, why in samples:
            name = f"{rows.name}/{index}"
            row = self.shelf.execute(tables.GET_DAMAGED, (name,)).fetchone()
            gone = tables.erased_row(name, b"" if row is None else row[2] or b"")
            self.shelf.execute(tables.PUT_ANYWAY, (name, self.now, self.now, gone))
            discarded = (self.known(rows.name), index, self.now, why)
            self.ledger.execute("INSERT OR IGNORE INTO discards VALUES(?, ?, ?, ?)", discarded)
        self.shelf.execute("COMMIT")

    def delete(self, keys: Sequence[KeyRows]) -> list[bool]:
        """Delete all rows of keys that have no draws; return for each whether that was possible now.

        The samples go first, and the ledger is written later. So the sample of the last checkpoint stays,
        until the ledger notes another one: without it, the cache would not be opened after a kill.
        """
        if not keys:
            return []
        self.flush()
        self._check_files(deleted=True)
        self.seen.clear()
        noted = self._noted_sample({rows.name for rows in keys})
        gone = [rows for rows in keys if rows.name != noted]
        if gone:
            self.shelf.execute("BEGIN IMMEDIATE")
            for rows in gone:
                names = [
                    (f"{rows.name}/{index}",) for each in intervals_of(rows.listed) for index in range(*each)
                ]
                self.shelf.executemany("DELETE FROM Cache WHERE key = ? AND raw = 1", names)
            self.shelf.execute("COMMIT")
        for rows in gone:
            self._delete(rows.name)
        return [rows.name != noted for rows in keys]

    def _noted_sample(self, keys: set[str]) -> str | None:
        """Return which of some keys has the sample of the last checkpoint; the next time none of them has."""
        if self.written_sample is not None and self.written_sample.rpartition("/")[0] in keys:
            self.written_sample = None
        row = self.ledger.execute("SELECT value FROM meta WHERE name = 'sample'").fetchone()
        if row is None or (key := str(row[0]).rpartition("/")[0]) not in keys:
            return None
        earlier = self.shelf.execute(tables.EARLIER, (row[0],))
        name = next((name for (name,) in earlier if name.rpartition("/")[0] not in keys), None)
        if name is None:
            self.ledger.execute("DELETE FROM meta WHERE name = 'sample'")
        else:
            self.ledger.execute("UPDATE meta SET value = ? WHERE name = 'sample'", (name,))
        return key

    def _delete(self, name: str) -> None:
        """Delete the rows of a key; other processes may still know its number, which no other key gets."""
        number = self.known(name)
        for table in ("intervals", "firsts", "uses", "discards", "holders"):
            self.ledger.execute(f"DELETE FROM {table} WHERE key = ?", (number,))
        self.ledger.execute("DELETE FROM keys WHERE id = ?", (number,))
        self._deleted = max(self._deleted, number)
        self.ledger.execute("INSERT OR REPLACE INTO meta VALUES('deleted', ?)", (self._deleted,))
        self._ids.pop(name, None)
        self._written.pop(name, None)
        for place in [place for place in self._sets if place[1] == number]:
            del self._sets[place]

    def removals(self) -> list[dict[str, Any]]:
        """Return the records of what is removed."""
        found = self.ledger.execute("SELECT id, document, digest FROM removals").fetchall()
        return [tables.read_sums(orjson.loads, name, tables.REMOVAL, *row) for name, *row in found]

    def put_removal(self, name: str, document: bytes) -> None:
        """Write the record of what is removed, by its id."""
        digest = tables.sums_digest(name, tables.REMOVAL, document)
        row = (name, self.stamp(), document, digest)
        self.ledger.execute("INSERT OR REPLACE INTO removals VALUES(?, ?, ?, ?)", row)

    # Entries of other caches.

    def entries(self, keys: Sequence[str]) -> list[Entry | None]:
        """Return all that is held of some questions; None for each that is not known."""
        self.flush()
        self.intern(list(keys))
        known = [key for key in keys if self._ids.get(key) != 0]
        found = {entry.key: entry for entry in entries.of_keys(self.ledger, self.shelf, known)}
        return [found.get(key) for key in keys]

    def adopted(self, entry: Entry) -> KeyRows:
        """Return the rows of an entry's key; store its question if it is new."""
        for segments in entry.draws.values():
            for segment in segments:
                self.greatest_stamp = max(self.greatest_stamp, segment.stamp)
        number = self._asked(Question(entry.key, entry.scope, entry.document), entry.first_stamp() / 1e6)
        if number in self._new_keys:
            self.begun.add(number)
            self._remember(LISTED, number, entry.key, [], "")
            for draw in entry.draws:
                self._remember(self.namespace(draw.namespace), number, entry.key, [], draw.namespace)
        return _Key(self, number, entry.key)

    def inserting(self, draw: Draw) -> DrawRows:
        """Return the rows of a draw of another cache; of a new key nothing is read."""
        number = self._ids.get(draw.key)
        return _Insertion(self, number, draw) if number in self._new_keys else self.draw(draw)

    # Sums.

    def sums(self, run: str, namespace: str) -> RunSums:
        """Return what a run has noted in a namespace, by its label."""
        query = "SELECT document, digest FROM sums WHERE run = ? AND namespace = ?"
        found = self.ledger.execute(query, (run, namespace)).fetchone()
        return tables.read_sums(RunSums.loads, run, namespace, *found) if found else RunSums()

    def put_sums(self, run: str, namespace: str, sums: RunSums) -> None:
        """Write these sums."""
        document = sums.dumps()
        digest = tables.sums_digest(run, namespace, document)
        self.ledger.execute(tables.ADD_SUMS, (run, namespace, self.stamp(), document, digest))

    def purse(self, namespace: str) -> Purse:
        """Return what a namespace, by its label, has spent of its budget."""
        query = "SELECT document, digest FROM budgets WHERE namespace = ?"
        found = self.ledger.execute(query, (namespace,)).fetchone()
        return tables.read_sums(tables.load_purse, tables.BUDGET, namespace, *found) if found else Purse()

    def put_purse(self, namespace: str, purse: Purse) -> None:
        """Write it."""
        document = tables.dump_purse(purse)
        digest = tables.sums_digest(tables.BUDGET, namespace, document)
        self.ledger.execute("INSERT OR REPLACE INTO budgets VALUES(?, ?, ?)", (namespace, document, digest))

    # Sets.

    def set_of(self, owner: int, key: int, name: str) -> MutableIndexSet:
        """Return a set of indices of a key."""
        place = (owner, key)
        sets = self._sets
        if place not in sets:
            rows = self.ledger.execute(tables.ONE_SET, (key, owner)).fetchall()
            self._remember(owner, key, name, rows, self.label(owner))
        known = sets[place]
        if known is None:
            return LargeSet(self.ledger, (owner, self.label(owner)), (key, name))
        return known

    def drop_set(self, owner: int, key: int) -> None:
        """Forget a set whose rows were deleted."""
        self._sets.pop((owner, key), None)

    def _remember(
        self, owner: int, key: int, name: str, rows: list[tuple[int, int, bytes]], label: str
    ) -> None:
        place, small = (owner, key), len(rows) <= SMALL
        self._sets[place] = SmallSet(place, label, name, rows, self._changed) if small else None

    # What is gathered, and written many rows to a statement.

    def flush(self) -> None:
        """Write what is gathered, so that statements see it."""
        for query, rows in self._gathered:
            if rows:
                self.ledger.executemany(query, rows)
                rows.clear()
        self._new_keys.clear()
        self.begun.clear()
        self.touched.clear()
        if self._changed:
            self._flush_sets()

    def _flush_sets(self) -> None:
        gone: list[tuple[int, int, int]] = []
        new: list[tuple[int, int, int, int, bytes]] = []
        for place, known in self._changed.items():
            intervals = added = known.intervals()
            if known.written:
                old, added = changes(known.written, intervals)
                gone += [(*place, stop) for _, stop in old]
            known.written = intervals
            for start, stop in added:
                digest = tables.interval_digest(known.label, known.key, start, stop)
                new.append((*place, stop, start, digest))
            if len(intervals) > SMALL:
                self._grown.append(place)
        self._changed.clear()
        if gone:
            self.ledger.executemany(tables.DROP_INTERVAL, gone)
        if new:
            self.ledger.executemany(tables.PUT_INTERVAL, new)

    # Interned ids.

    def intern(self, keys: list[str]) -> None:
        """Look up the ids of many keys in one statement."""
        known = self._ids
        unknown = [key for key in keys if key not in known]
        if len(unknown) > _SEVERAL:
            rows = self.ledger.execute(
                "SELECT key, id FROM keys WHERE key IN (SELECT value FROM json_each(?))",
                (orjson.dumps(unknown).decode(),),
            )
            known.update(rows)
            for key in unknown:
                known.setdefault(key, 0)

    def _asked(self, question: Question, at: float | None = None) -> int:
        """Return the id of a question's key; a new one is written with the rows that are gathered.

        Args:
            question: the question.
            at: when it was first asked, in seconds since 1970; by default now.
        """
        known = self._ids
        key = known.get(question.key)
        if key is None:
            key = self._written.get(question.key)
        if key is None or 0 < key <= self._deleted:
            key = self._id_of(question.key)
            self._written.pop(question.key, None)  # readers look it up again
        if not key:
            if self._questions:
                key = self._questions[-1][0] + 1
            else:
                row = self.ledger.execute("SELECT max(id) FROM keys").fetchone()
                key = max(row[0] or 0, self._deleted) + 1
            self._questions.append((key, question.key, question.scope, question.document, at or self.now))
            self._new_keys.add(key)
        known[question.key] = key
        return key

    def known(self, name: str) -> int:
        """Return the id of a key.

        Raises:
            StoreError: when nobody has asked the question.
        """
        key = self._ids.get(name) or self._id_of(name)
        if not key:
            raise StoreError(f"the cache knows no key {name}; claim a draw of it first")
        self._ids[name] = key
        return key

    def _id_of(self, name: str) -> int:
        row = self.ledger.execute("SELECT id FROM keys WHERE key = ?", (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def namespace(self, label: str) -> int:
        """Return the number of a namespace; it gets one if it is new."""
        known = self._namespaces
        namespace = known.get(label)
        if namespace is None:
            self.ledger.execute("INSERT OR IGNORE INTO namespaces VALUES(NULL, ?)", (label,))
            row = self.ledger.execute("SELECT id FROM namespaces WHERE label = ?", (label,)).fetchone()
            namespace = known[label] = int(row[0])
            self._labels[namespace] = label
        return namespace

    def label(self, namespace: int) -> str:
        """Return the label of a namespace."""
        label = self._labels.get(namespace)
        if label is None:
            row = self.ledger.execute("SELECT label FROM namespaces WHERE id = ?", (namespace,)).fetchone()
            if row is None:
                raise DamagedCache(
                    f"the ledger has a draw of namespace number {namespace}, but no such namespace. Restore "
                    "the cache from a copy"
                )
            label = self._labels[namespace] = str(row[0])
        return label

    # Leases and stamps.

    def stamp(self) -> int:
        """Return a stamp that is greater than every stamp seen so far."""
        self.greatest_stamp += 1
        return self.greatest_stamp

    def author(self) -> tuple[int, int]:
        """Return this process's lease and a new stamp."""
        self.greatest_stamp += 1
        return self.own_lease or self.lease(), self.greatest_stamp

    def lease(self) -> int:
        """Return this process's lease; begin one if there is none."""
        lease = self.own_lease
        if lease is None:
            name = self._leased()
            self.ledger.execute("INSERT OR IGNORE INTO leases VALUES(NULL, ?, ?, NULL)", (name, self.now))
            row = self.ledger.execute("SELECT id FROM leases WHERE name = ?", (name,)).fetchone()
            lease = self.own_lease = int(row[0])
        return lease

    def alive(self, lease: int) -> bool:
        """Return True if the process of a lease is alive. Once it was dead, it stays dead."""
        row = self.ledger.execute(
            "SELECT name FROM leases WHERE id = ? AND ended IS NULL", (lease,)
        ).fetchone()
        return row is not None and self._lives(lease, row[0])

    def made_by_others(self, leases: set[int]) -> bool:
        """Return True if one of the leases is that of another live process."""
        return self._shared(leases)

    def _dead(self, now: float) -> Sequence[int]:
        """Return the leases of dead processes that are not ended yet."""
        self.reaped = now
        self._check_files()
        others = self.ledger.execute(
            "SELECT id, name FROM leases WHERE ended IS NULL AND id != ?", (self.lease(),)
        ).fetchall()
        return [lease for lease, name in others if not self._lives(lease, name)]

    def pending_of(self, lease: int) -> Iterator[tuple[KeyRows, int]]:
        """Iterate over what the process of a lease was generating."""
        query = "SELECT p.key, k.key, p.sample FROM pending p JOIN keys k ON k.id = p.key WHERE p.lease = ?"
        for number, name, index in self.ledger.execute(query, (lease,)).fetchall():
            yield _Key(self, number, name), index

    def end(self, lease: int) -> None:
        """End the lease of a dead process: delete what it was generating and holding."""
        for query in ("DELETE FROM pending WHERE lease = ?", "DELETE FROM holders WHERE lease = ?"):
            self.ledger.execute(query, (lease,))
        self.ledger.execute("UPDATE leases SET ended = ? WHERE id = ?", (self.now, lease))


def _place(key: int, draw: Draw) -> Place:
    return key, draw.request_id, draw.occurrence, draw.replicate


class _Key(KeyRows):
    """One key inside a transaction."""

    __slots__ = ("_in", "listed", "name", "number")

    def __init__(self, ledger: SqlLedger, number: int, name: str) -> None:
        self._in = ledger
        self.number = number
        self.name = name
        self.listed = ledger.set_of(LISTED, number, name)

    def sample(self, index: int) -> Sample | Discarded | None:
        seen = self._in.seen
        sample = seen.get((self.name, index)) if seen else None
        return read_sample(self._in.shelf, self.name, index) if sample is None else sample

    def has_row(self, index: int) -> bool:
        return self._row(index) is not None

    def _row(self, index: int) -> tuple[Any, ...] | None:
        """Return the row of a sample, which may hold anything."""
        row: tuple[Any, ...] | None
        row = self._in.shelf.execute(tables.GET_DAMAGED, (f"{self.name}/{index}",)).fetchone()
        return row

    def discard(self, index: int, why: str) -> None:
        name, now, row = f"{self.name}/{index}", self._in.now, self._row(index)
        if not tables.is_discarded(self.name, index, row):
            self._in.seen.clear()
            gone = tables.discarded_row(name, b"" if row is None else row[2] or b"")
            self._in.shelf.execute(tables.PUT_ANYWAY, (name, now, now, gone))
        self._execute("INSERT OR IGNORE INTO discards VALUES(?, ?, ?, ?)", self.number, index, now, why)

    def drawn(self) -> IntervalSet:
        found = IntervalSet()
        for (indices,) in self._execute("SELECT indices FROM segments WHERE key = ?", self.number):
            for index in unpack(indices):
                found.add(index)
        return found

    def users(self) -> list[str]:
        query = "SELECT n.label FROM uses u JOIN namespaces n ON n.id = u.namespace WHERE u.key = ?"
        return [label for (label,) in self._execute(query, self.number)]

    def makers(self, namespace: str) -> tuple[set[int], set[int]]:
        place = (self.number, self._in.namespace(namespace))
        query = "SELECT DISTINCT lease, token IS NOT NULL FROM segments WHERE key = ? AND namespace = ?"
        found = self._execute(query, *place).fetchall()
        query = "SELECT DISTINCT lease FROM holders WHERE key = ? AND namespace = ?"
        holders = {lease for (lease,) in self._execute(query, *place)}
        return holders.union(lease for lease, holds in found if holds), {lease for lease, _ in found}

    def withdraw(self, namespace: str) -> None:
        number = self._in.namespace(namespace)
        place = (self.number, number)
        for table in ("segments", "holders", "firsts", "uses"):
            self._execute(f"DELETE FROM {table} WHERE key = ? AND namespace = ?", *place)
        self._execute("DELETE FROM intervals WHERE key = ? AND owner = ?", *place)
        self._in.drop_set(number, self.number)

    def pending(self, index: int) -> int | None:
        query = "SELECT lease FROM pending WHERE key = ? AND sample = ?"
        row = self._execute(query, self.number, index).fetchone()
        return None if row is None else int(row[0])

    def pend(self, index: int) -> None:
        self._in.pending.append((self.number, index, self._in.lease()))

    def unpend(self, index: int) -> None:
        self._execute("DELETE FROM pending WHERE key = ? AND sample = ?", self.number, index)

    def _execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement, which sees everything that was written."""
        self._in.flush()
        return self._in.ledger.execute(query, values)


class _Draw(_Key, DrawRows):
    """One draw inside a transaction."""

    __slots__ = ("_draw", "_others", "_where", "is_new", "segments", "taken")

    _others: list[SegmentRow] | None

    def __init__(self, ledger: SqlLedger, number: int, draw: Draw) -> None:
        """Read the segments, and those of other namespaces if they are few, or the earliest is known."""
        namespace = ledger.namespace(draw.namespace)
        self._in = ledger
        self.number = number
        self.name = draw.key
        self.is_new = False
        self._draw = draw
        place = (number, draw.request_id, draw.occurrence, draw.replicate)
        self._where = where = (*place, namespace)
        if place in ledger.touched:
            ledger.flush()
        rows = ledger.found.get(place)
        if rows is None:
            rows = ledger.read_draw(where, draw.key, draw.namespace)
        self.taken = ledger.set_of(namespace, number, draw.key)
        self.listed = ledger.set_of(LISTED, number, draw.key)
        few = len(rows) <= FEW
        if not few:
            rows = ledger.read(tables.OWN_AND_FIRST, where)
        own: list[SegmentRow] = []
        others: list[SegmentRow] = []
        for row in rows:
            (own if row[0] == namespace else others).append(row)
        self._others = others if few or others else None
        self.segments = tables.segments_of(draw, own) if own else []

    def others(self) -> Sequence[Segment]:
        rows, where, ledger = self._others, self._where, self._in
        if rows is None:
            first = ledger.first(where[:4])
            if first == where[4]:
                rows = ledger.read(f"{tables.OTHERS} ORDER BY namespace, number", where)
            else:
                rows = ledger.read(tables.OWN, (*where[:4], first))
        if rows:
            shared = ledger.namespace(SHARED)
            if len(rows) > 1 or rows[0].namespace == shared:
                rows = [row for row in rows if row.namespace != shared]
        if not rows:
            return ()
        earliest = rows[0] if len(rows) == 1 else tables.earliest(rows)
        if len(rows) > 1:
            rows = [row for row in rows if row.namespace == earliest.namespace]
        ledger.saw(earliest)
        return tables.segments_of(Draw(ledger.label(earliest.namespace), *self._draw[1:]), rows)

    def add(self, segment: Segment, generated: int) -> None:
        number, position, chosen, lease, token, stamp, standing, _ = segment
        indices, noted = pack(chosen), tables.write_place(segment.place)
        digest = tables.segment_digest(self._draw, number, position, indices, stamp, noted)
        written = (number, position, indices, lease, token, generated, stamp, standing, digest, noted)
        row = (*self._where, *written)
        ledger, place = self._in, self._where[:4]
        ledger.segments.append(row)
        ledger.written_stamp = stamp
        ledger.touched.add(place)
        ledger.found.pop(place, None)

    def insert(self, segment: Segment, generated: int) -> None:
        self._insert(segment, generated)
        self._execute(f"DELETE FROM firsts{tables.PLACE}", *self._where[:4])

    def _insert(self, segment: Segment, generated: int) -> None:
        written = self._in.written_stamp
        self.add(segment, generated)
        self._in.written_stamp = max(written, segment.stamp)
        for index in segment.indices:
            self.taken.add(index)

    def replace(self, segment: Segment) -> None:
        indices, noted = pack(segment.indices), tables.write_place(segment.place)
        digest = tables.segment_digest(self._draw, *segment[:2], indices, segment.stamp, noted)
        changed = (indices, segment.token, segment.standing, digest, noted)
        columns = "indices = ?, token = ?, standing = ?, digest = ?, place = ?"
        self._change(f"UPDATE segments SET {columns}", segment, *changed)

    def drop(self, segment: Segment) -> None:
        self._change("DELETE FROM segments", segment)
        self._execute(f"DELETE FROM firsts{tables.PLACE} AND namespace = ?", *self._where)

    def _change(self, query: str, segment: Segment, *values: Any) -> None:
        self._in.found.pop(self._where[:4], None)
        self._execute(query + SEGMENT, *values, *self._where, segment.number)

    def hold(self, number: int, token: str) -> None:
        holder = (self._holder(token), self._in.lease())
        query = "INSERT OR IGNORE INTO holders VALUES(?, ?, ?, ?, ?, ?, ?, ?)"
        self._execute(query, *self._where, number, *holder)

    def unhold(self, number: int, token: str) -> bool:
        query = f"DELETE FROM holders{SEGMENT} AND token = ?"
        return self._execute(query, *self._where, number, self._holder(token)).rowcount > 0

    def _holder(self, token: str) -> str:
        """Return a claimant's token that is unique among all processes."""
        return f"{self._in.lease()}-{token}"

    def holders(self, number: int) -> Iterator[int]:
        query = f"SELECT lease FROM holders{SEGMENT}"
        return (lease for (lease,) in self._execute(query, *self._where, number))

    def use(self, namespace: str) -> None:
        self._in.uses.append((self.number, self._in.namespace(namespace), self._in.now))


class _NewDraw(_Draw):
    """The first draw of a new key: nothing is read, and its rows are put together at once."""

    __slots__ = ()

    def __init__(self, ledger: SqlLedger, number: int, draw: Draw) -> None:
        self._in = ledger
        self.number = number
        self.name = draw.key
        self._draw = draw
        namespace = ledger.namespace(draw.namespace)
        self._where = (number, draw.request_id, draw.occurrence, draw.replicate, namespace)
        self.is_new = True

    def begin(self, segment: Segment) -> None:
        ledger, key, stop = self._in, self.number, len(segment.indices)
        ledger.begun.add(key)
        self.add(segment, stop)
        ledger.pending += [(key, index, segment.lease) for index in segment.indices]
        for owner, label in ((LISTED, ""), (self._where[4], self._draw.namespace)):
            digest = tables.interval_digest(label, self.name, 0, stop)
            ledger.intervals.append((owner, key, stop, 0, digest))


class _Insertion(_NewDraw):
    """A draw of another cache, of a key that is new here: no namespace is noted as its earliest."""

    __slots__ = ()

    def __init__(self, ledger: SqlLedger, number: int, draw: Draw) -> None:
        super().__init__(ledger, number, draw)
        self.taken = ledger.set_of(self._where[4], number, draw.key)

    def insert(self, segment: Segment, generated: int) -> None:
        self._insert(segment, generated)
