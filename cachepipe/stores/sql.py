"""The ledger in SQLite beside the samples in diskcache's table: claims, commits and their undoing.

Two files, each in WAL mode: ``ledger.db`` holds small rows that one transaction must see together, and
diskcache's ``cache.db`` the samples, one row each, never rewritten. A commit puts the samples down
first, while it holds the ledger's write lock, and then takes their indices out of ``pending``; so an
index that is neither pending nor stored has no sample, whoever was killed when.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import itertools
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from cachepipe.errors import FormatError, StoreError, UnsafeRow
from cachepipe.keys import Question
from cachepipe.ledger import (
    LISTED,
    SHARED,
    Draw,
    Runs,
    choose,
    is_in,
    laid,
    lowest_new,
    merged,
    namespace_of,
    split,
)
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Discard,
    DrawInfo,
    Forgo,
    Grant,
    KeyInfo,
    Leave,
    NamespaceInfo,
    Operation,
    Result,
    Sample,
    State,
    StoredQuestion,
)

FORMAT = 1
"""The version of the tables below; a ledger with a higher one is refused."""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES('format', {FORMAT});
CREATE TABLE IF NOT EXISTS namespaces(id INTEGER PRIMARY KEY, label TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS keys(id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS questions(
    key INTEGER PRIMARY KEY, scope TEXT, document BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS segments(
    id INTEGER PRIMARY KEY, key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL,
    namespace INTEGER NOT NULL, position INTEGER NOT NULL, indices NOT NULL,
    lease INTEGER NOT NULL, generated INTEGER NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS segments_by_draw ON segments(key, request_id, occurrence, namespace);
CREATE INDEX IF NOT EXISTS segments_by_age ON segments(key, request_id, occurrence);
CREATE TABLE IF NOT EXISTS spans(
    owner INTEGER NOT NULL, key INTEGER NOT NULL, stop INTEGER NOT NULL, start INTEGER NOT NULL,
    PRIMARY KEY(owner, key, stop)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending(
    key INTEGER NOT NULL, sample INTEGER NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, sample)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holders(
    segment INTEGER NOT NULL, token TEXT NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(segment, token)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, at REAL NOT NULL, ended REAL);
CREATE INDEX IF NOT EXISTS leases_open ON leases(id, name) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS uses(
    key INTEGER NOT NULL, namespace INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY(key, namespace)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS discards(
    key INTEGER NOT NULL, sample INTEGER NOT NULL, at REAL NOT NULL, why TEXT NOT NULL,
    PRIMARY KEY(key, sample)) WITHOUT ROWID;
"""

# The rows that diskcache's own ``set`` would write: raw bytes under a text key, no expiry.
_RAW = 1
_PUT = (
    "INSERT INTO Cache(key, raw, store_time, expire_time, access_time, access_count, tag, size, mode,"
    f" filename, value) VALUES(?, 1, ?, NULL, ?, 0, NULL, 0, {_RAW}, NULL, ?)"
    " ON CONFLICT(key, raw) DO NOTHING"
)
_GET = "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1"

_DISCARDED = b"-"  # opens the row of a discarded sample; a live one opens with its header's brace
_ALIVE_FOR = 0.25  # seconds for which a lease that was found alive is taken to be so
_LOCK_TIMEOUT = 60.0  # seconds to wait for a lock that another process holds
_CHECKPOINT_ROWS = 2000  # written rows after which the writer thread moves the WAL into the file
_IDS = 200_000  # interned keys and namespaces kept in memory


_stores: weakref.WeakSet[SqlStore] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Write what is still queued when the interpreter ends."""
    for store in list(_stores):
        store.close()


class Locked(Exception):  # noqa: N818 - internal: says that a write would have to wait
    """Another connection is writing."""


class _Discarded:
    """Stands for a sample that was discarded on record."""


_GONE = _Discarded()


def _locked(error: sqlite3.OperationalError) -> bool:
    return (error.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def pack(indices: Sequence[int]) -> int | str:
    """Return how the ledger writes indices: one as a number, several as text."""
    return indices[0] if len(indices) == 1 else ",".join(map(str, indices))


def unpack(written: int | str) -> list[int]:
    """Return the indices that the ledger wrote."""
    return [written] if isinstance(written, int) else [int(part) for part in written.split(",")]


class SqlStore:
    """A store whose ledger and samples are SQLite tables.

    Subclasses say how the two files are opened, and which processes live.
    """

    identity: str
    read_only = False
    why_read_only = ""

    def __init__(self) -> None:
        self._reset()
        _stores.add(self)

    # What subclasses provide.

    def _open(self, *, write: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Return connections to the ledger and to the samples, in autocommit mode, without busy time-out."""
        raise NotImplementedError

    def _lease_name(self) -> str:
        """Return the name of this process's lease, made if there is none."""
        raise NotImplementedError

    def _lease_alive(self, name: str) -> bool:
        """Tell whether the process behind a lease lives."""
        raise NotImplementedError

    def _lease_swept(self, name: str) -> None:
        """Forget a lease whose process is dead."""

    # Connections. A forked child begins anew: SQLite's must not cross a fork.

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._writing: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
        self._checkpointing: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
        self._reading = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = _Writer(self)
        self._key_ids: dict[str, int] = {}
        self._namespace_ids: dict[str, int] = {}
        self._lease: int | None = None
        self._leases: dict[int, tuple[bool, float]] = {}
        self._rows = 0

    def _writable(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        self._check()
        if self.read_only:
            raise StoreError(f"the cache {self.identity} cannot be written: {self.why_read_only}")
        if self._writing is None:
            self._writing = self._open(write=True)
            self._opened += self._writing
        return self._writing

    def _readable(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        pair: tuple[sqlite3.Connection, sqlite3.Connection] | None
        if self._pid == os.getpid() and (pair := getattr(self._reading, "pair", None)) is not None:
            return pair
        self._check()
        pair = self._reading.pair = self._open(write=False)
        self._opened += pair
        return pair

    def _check(self) -> None:
        if self._pid != os.getpid():
            self._reset()
        if self._closed:
            raise StoreError(f"the cache {self.identity} was closed; open it again")

    # Applying operations.

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction, or return None at once if that would wait."""
        if self._pid != os.getpid():
            self._reset()
        if self._writer.busy or not self._lock.acquire(blocking=False):
            return None
        try:
            results = self.transact(operations)
        except Locked:
            return None
        finally:
            self._lock.release()
        if self._rows > _CHECKPOINT_ROWS:
            self._writer.wake()
        return results

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations in one transaction on the writer thread, with what else has gathered."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Result]] = loop.create_future()

        def settle(results: list[Result] | Exception) -> None:
            if future.done():
                return
            if isinstance(results, Exception):
                future.set_exception(results)
            else:
                future.set_result(results)

        def done(results: list[Result] | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(settle, results)

        self._check()
        self._writer.put(operations, done)
        return await future

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations on the writer thread, without anyone waiting."""
        if not self._closed:
            self._check()
            self._writer.put(operations, lambda _results: None)

    def transact(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations in one transaction; the caller holds the lock.

        Raises:
            Locked: when another connection writes.
            StoreError: when SQLite refuses for another reason (disk full, read-only, damaged …).
        """
        ledger, shelf = self._writable()
        try:
            ledger.execute("BEGIN IMMEDIATE")
            try:
                results = _Transaction(self, ledger, shelf).apply(operations)
                ledger.execute("COMMIT")
            except BaseException:
                if shelf.in_transaction:
                    shelf.execute("ROLLBACK")
                if ledger.in_transaction:
                    ledger.execute("ROLLBACK")
                self._forget_ids()
                raise
        except sqlite3.OperationalError as error:
            if _locked(error):
                raise Locked from error
            raise StoreError(f"the cache {self.identity} could not be written: {error}") from error
        except sqlite3.DatabaseError as error:
            raise StoreError(f"the cache {self.identity} is damaged: {error}") from error
        return results

    def checkpoint(self) -> None:
        """Move what the write-ahead logs hold into the files, as far as no reader is in the way.

        On connections of its own, so that nobody who writes meanwhile has to wait.
        """
        self._rows = 0
        if self._checkpointing is None:
            self._checkpointing = self._open(write=True)
            self._opened += self._checkpointing
        for connection in self._checkpointing:
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _forget_ids(self) -> None:
        self._key_ids.clear()
        self._namespace_ids.clear()
        self._lease = None

    # Reading.

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw that the ledger holds whole, else None."""
        ledger, shelf = self._readable()
        ids = self._ids(ledger, draw)
        if ids is None:
            return None
        rows = ledger.execute(
            "SELECT position, indices, lease FROM segments WHERE key = ? AND request_id = ?"
            " AND occurrence = ? AND namespace = ? ORDER BY id",
            (ids[0], draw.request_id, draw.occurrence, ids[1]),
        ).fetchall()
        if not rows:
            return None
        indices = laid((row[0], unpack(row[1])) for row in rows)[:n]
        if len(indices) < n:
            return None
        samples: list[Sample | None] = []
        for index in indices:
            sample = _read(shelf, draw.key, index)
            if type(sample) is not Sample:
                return None
            samples.append(sample)
        return Grant(indices, samples, shared=self._shared(ledger, {row[2] for row in rows}))

    def replay(self, draw: Draw, n: int, taken: Runs) -> Grant | None:
        """Return what a claim would get if all of it is stored, else None."""
        ledger, shelf = self._readable()
        key = self._key_id(ledger, draw.key)
        if key is None:
            return None
        namespace = self._namespace_id(ledger, draw.namespace)
        book = _Book(ledger, key, taken)
        owner = -1 if namespace is None else namespace
        rows = ledger.execute(
            "SELECT position, indices FROM segments WHERE key = ? AND request_id = ? AND occurrence = ?"
            " AND namespace = ? ORDER BY id",
            (key, draw.request_id, draw.occurrence, owner),
        )
        held = laid((position, unpack(written)) for position, written in rows)[:n]
        coupled = _earliest(ledger, key, draw, owner)
        indices: list[int] = []
        samples: list[Sample | None] = []
        for position in range(n):
            index = held[position] if position < len(held) else -1
            sample = _GONE if index < 0 else _read(shelf, draw.key, index)
            while sample is _GONE:
                index = choose(book, owner, coupled[position] if position < len(coupled) else None)
                book.taken.add(index)
                sample = _read(shelf, draw.key, index)
            if not isinstance(sample, Sample):
                return None
            indices.append(index)
            samples.append(sample)
        for index in indices:
            taken.add(index)
        return Grant(indices, samples)

    def glance(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Tell of each (key, index) whether its sample is stored, being generated, or neither."""
        ledger, shelf = self._readable()
        states: list[State] = []
        for key, index in wanted:
            # Pending before the sample: whoever commits does it the other way round.
            row = ledger.execute(
                "SELECT l.id, l.name, l.ended FROM pending p JOIN leases l ON l.id = p.lease"
                " WHERE p.key = (SELECT id FROM keys WHERE key = ?) AND p.sample = ?",
                (key, index),
            ).fetchone()
            if type(_read(shelf, key, index)) is Sample:
                states.append("stored")
            elif row is not None and row[1] == self._own_lease_name():
                states.append("ours")
            elif row is not None and self._lives(*row):
                states.append("pending")
            else:
                states.append("free")
        return states

    def keys(self, prefix: str = "") -> Iterator[KeyInfo]:
        """Iterate over the keys that start with a prefix, in order of their first request."""
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT k.key, q.scope, q.at,"
            " (SELECT coalesce(sum(stop - start), 0) FROM spans WHERE owner = 0 AND key = k.id),"
            " (SELECT count(*) FROM pending WHERE key = k.id),"
            " (SELECT count(DISTINCT owner) FROM spans WHERE key = k.id AND owner > 0),"
            " (SELECT count(*) FROM discards WHERE key = k.id)"
            " FROM keys k JOIN questions q ON q.key = k.id WHERE substr(k.key, 1, ?) = ? ORDER BY k.id",
            (len(prefix), prefix),
        )
        for key, scope, at, listed, pending, namespaces, discards in rows:
            yield KeyInfo(key, scope, at, listed - pending - discards, pending, namespaces)

    def question(self, key: str) -> StoredQuestion | None:
        """Return what was asked under a key."""
        ledger, _ = self._readable()
        row = ledger.execute(
            "SELECT q.scope, q.document, q.at FROM keys k JOIN questions q ON q.key = k.id WHERE k.key = ?",
            (key,),
        ).fetchone()
        return None if row is None else StoredQuestion(key, row[0], row[1], row[2])

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index; discarded ones are left out."""
        ledger, shelf = self._readable()
        runs = ledger.execute(
            "SELECT start, stop FROM spans WHERE owner = 0 AND key = (SELECT id FROM keys WHERE key = ?)"
            " ORDER BY stop",
            (key,),
        ).fetchall()
        for index in itertools.chain.from_iterable(range(start, stop) for start, stop in runs):
            sample = _read(shelf, key, index)
            if isinstance(sample, Sample):
                yield sample

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, in order of their making; ``namespace`` is a label."""
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT n.label, k.key, s.request_id, s.occurrence, s.position, s.indices, s.generated, s.at"
            " FROM segments s JOIN namespaces n ON n.id = s.namespace JOIN keys k ON k.id = s.key"
            " WHERE (? IS NULL OR k.key = ?) AND (? IS NULL OR n.label = ?)"
            " ORDER BY s.key, s.request_id, s.occurrence, s.namespace, s.id",
            (key, key, namespace, namespace),
        )
        for identity, group in itertools.groupby(rows, key=lambda row: row[:4]):
            parts = list(group)
            indices = laid((row[4], unpack(row[5])) for row in parts)
            yield DrawInfo(Draw(*identity), tuple(indices), sum(row[6] for row in parts), parts[0][7])

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, in order of their first draw; the shared draws are left out."""
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT n.label,"
            " (SELECT count(*) FROM (SELECT DISTINCT key, request_id, occurrence FROM segments"
            "  WHERE namespace = n.id)),"
            " (SELECT coalesce(sum(stop - start), 0) FROM spans WHERE owner = n.id),"
            " (SELECT coalesce(sum(generated), 0) FROM segments WHERE namespace = n.id)"
            " FROM namespaces n WHERE n.label != ? ORDER BY n.id",
            (SHARED,),
        )
        for written, draws, samples, generated in rows:
            yield NamespaceInfo(namespace_of(written), draws, samples, generated)

    def totals(self) -> dict[str, int]:
        """Return how many keys, samples, pending samples, draws, namespaces and discards there are."""
        ledger, _ = self._readable()
        row = ledger.execute(
            "SELECT (SELECT count(*) FROM keys),"
            " (SELECT coalesce(sum(stop - start), 0) FROM spans WHERE owner = 0),"
            " (SELECT count(*) FROM pending),"
            " (SELECT count(*) FROM (SELECT DISTINCT key, request_id, occurrence, namespace FROM segments)),"
            " (SELECT count(*) FROM namespaces WHERE label != ?), (SELECT count(*) FROM discards)",
            (SHARED,),
        ).fetchone()
        keys, listed, pending, draws, namespaces, discards = row
        return {
            "keys": keys,
            "samples": listed - pending - discards,
            "pending": pending,
            "draws": draws,
            "namespaces": namespaces,
            "discarded": discards,
        }

    def close(self) -> None:
        """Write what is queued, end the lease and close the connections."""
        if self._closed or self._pid != os.getpid():
            self._closed = True
            return
        self._writer.stop()
        with self._lock:
            self._closed = True
            self._end_lease()
            for connection in self._opened:
                connection.close()
            self._opened.clear()

    def _end_lease(self) -> None:
        """Note in the ledger that this process's lease has ended."""

    # Interned ids; only rows of finished transactions are remembered by readers.

    def _ids(self, ledger: sqlite3.Connection, draw: Draw) -> tuple[int, int] | None:
        key = self._key_ids.get(draw.key) or self._key_id(ledger, draw.key)
        if key is None:
            return None
        namespace = self._namespace_ids.get(draw.namespace) or self._namespace_id(ledger, draw.namespace)
        return None if namespace is None else (key, namespace)

    def _key_id(self, ledger: sqlite3.Connection, key: str) -> int | None:
        return _interned(self._key_ids, ledger, "SELECT id FROM keys WHERE key = ?", key)

    def _namespace_id(self, ledger: sqlite3.Connection, label: str) -> int | None:
        return _interned(self._namespace_ids, ledger, "SELECT id FROM namespaces WHERE label = ?", label)

    # Leases.

    def _shared(self, ledger: sqlite3.Connection, leases: set[int]) -> bool:
        """Tell whether another live process is among the leases that made a draw."""
        for lease in leases:
            if lease == self._lease:
                continue
            known = self._leases.get(lease)
            if known is not None and (not known[0] or time.monotonic() - known[1] < 1.0):
                if known[0]:
                    return True
                continue
            row = ledger.execute("SELECT id, name, ended FROM leases WHERE id = ?", (lease,)).fetchone()
            if row is not None and row[1] != self._own_lease_name() and self._lives(*row):
                return True
        return False

    def _own_lease_name(self) -> str | None:
        return None

    def _lives(self, lease: int, name: str, ended: float | None) -> bool:
        """Tell whether a lease's process lives; the dead stay dead, the living are asked again."""
        known = self._leases.get(lease)
        now = time.monotonic()
        if known is not None and (not known[0] or now - known[1] < _ALIVE_FOR):
            return known[0]
        lives = ended is None and self._lease_alive(name)
        self._leases[lease] = (lives, now)
        return lives


def _interned(ids: dict[str, int], ledger: sqlite3.Connection, query: str, text: str) -> int | None:
    row = ledger.execute(query, (text,)).fetchone()
    if row is None:
        return None
    if len(ids) >= _IDS:
        ids.clear()
    identifier: int = row[0]
    ids[text] = identifier
    return identifier


def _read(shelf: sqlite3.Connection, key: str, index: int) -> Sample | _Discarded | None:
    """Return the sample at an index of a key's list, a mark when it was discarded, None without one.

    Raises:
        UnsafeRow: when the row is not one that cachepipe wrote, such as a pickle.
    """
    row = shelf.execute(_GET, (f"{key}/{index}",)).fetchone()
    if row is None:
        return None
    mode, filename, value = row
    if mode != _RAW or filename is not None or type(value) is not bytes:
        raise UnsafeRow(
            f"sample {index} of key {key} is stored in diskcache's mode {mode}, which may be a pickle; "
            "cachepipe stores raw bytes only and never unpickles. Delete the row, or restore the cache"
        )
    if value.startswith(_DISCARDED):
        return _GONE
    end = value.find(b"\n")
    identifier = value[7 : value.find(b'"', 7)]
    if end < 0 or not value.startswith(b'{"id":"'):
        raise UnsafeRow(f"sample {index} of key {key} is not in cachepipe's form; restore the cache")
    return Sample(index, identifier.decode(), value[end + 1 :], value[:end])


def _earliest(ledger: sqlite3.Connection, key: int, draw: Draw, owner: int) -> list[int]:
    """Return the indices of the same draw in the earliest namespace other than the owner."""
    row = ledger.execute(
        "SELECT namespace FROM segments INDEXED BY segments_by_age WHERE key = ? AND request_id = ?"
        " AND occurrence = ? AND namespace != ? ORDER BY id LIMIT 1",
        (key, draw.request_id, draw.occurrence, owner),
    ).fetchone()
    if row is None:
        return []
    rows = ledger.execute(
        "SELECT position, indices FROM segments WHERE key = ? AND request_id = ? AND occurrence = ?"
        " AND namespace = ? ORDER BY id",
        (key, draw.request_id, draw.occurrence, row[0]),
    )
    return laid((position, unpack(written)) for position, written in rows)


class _Book:
    """The sets of one key as the ledger shows them, with what this process has taken besides."""

    def __init__(self, ledger: sqlite3.Connection, key: int, taken: Runs | None = None) -> None:
        self._ledger = ledger
        self._key = key
        self._besides = taken
        self.taken = Runs()

    def run_at(self, owner: int, at: int) -> tuple[int, int] | None:
        """Return the first run of the owner's set whose stop is above ``at``."""
        run: tuple[int, int] | None = self._ledger.execute(
            "SELECT start, stop FROM spans WHERE owner = ? AND key = ? AND stop > ? ORDER BY stop LIMIT 1",
            (owner, self._key, at),
        ).fetchone()
        if owner != LISTED and self._besides is not None:
            for other in (self._besides.run_at(at), self.taken.run_at(at)):
                if other is not None and (run is None or other[0] < run[0]):
                    run = other
        return run


class _Transaction:
    """One transaction on the ledger, with the samples that it puts down."""

    def __init__(self, store: SqlStore, ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> None:
        self._store = store
        self._ledger = ledger
        self._shelf = shelf
        self._new: dict[tuple[str, int], Sample] = {}
        self._now = time.time()
        self._reaped = False
        self._mine: int | None = None

    def apply(self, operations: Sequence[Operation]) -> list[Result]:
        results: list[Result] = []
        for operation in operations:
            match operation:
                case Claim():
                    results.append(self._claim(operation))
                case Commit():
                    results.append(self._commit(operation))
                case Forgo():
                    results.append(self._forgo(operation))
                case Leave():
                    results.append(self._leave(operation))
                case Discard():
                    results.append(self._discard(operation))
        if self._new:
            self._shelf.execute("BEGIN IMMEDIATE")
            self._shelf.executemany(
                _PUT,
                [
                    (f"{key}/{index}", self._now, self._now, sample.header + b"\n" + sample.payload)
                    for (key, index), sample in self._new.items()
                ],
            )
            self._shelf.execute("COMMIT")
        self._store._rows += len(operations) + len(self._new)  # noqa: SLF001 - its own transaction
        return results

    # The verbs.

    def _claim(self, claim: Claim) -> Grant:
        draw, n = claim.draw, claim.n
        self._reap_the_dead()
        key = self._key(claim.question)
        namespace = self._namespace(draw.namespace)
        if claim.user is not None:
            self._ledger.execute(
                "INSERT OR IGNORE INTO uses VALUES(?, ?, ?)", (key, self._namespace(claim.user), self._now)
            )
        book = _Book(self._ledger, key)
        rows = self._segments(key, namespace, draw)
        indices = laid((row[1], unpack(row[2])) for row in rows)[:n]
        fresh_id = (
            not rows
            and bool(draw.request_id)
            and draw.namespace != SHARED
            and book.run_at(namespace, 0) is not None
        )
        old = 0 if claim.refresh else len(indices)
        samples: list[Sample | None] = []
        coupled: list[int] | None = None
        replaced: list[int] = []
        for position in range(n):
            sample = self._sample(draw.key, indices[position]) if position < old else _GONE
            if position < old and sample is _GONE:
                replaced.append(position)
            while sample is _GONE:
                if coupled is None:
                    coupled = _earliest(self._ledger, key, draw, namespace)
                preferred = coupled[position] if position < len(coupled) else None
                index = choose(book, namespace, preferred, new=claim.refresh)
                self._add(namespace, key, index)  # a discarded one stays taken: nothing comes back to it
                sample = self._sample(draw.key, index)
                indices[position : position + 1] = [index]
            samples.append(sample if isinstance(sample, Sample) else None)
        mine = [
            index
            for index, sample in zip(indices, samples, strict=True)
            if sample is None and self._gain(book, key, index)
        ]
        lease = self._lease() if rows or old < n or replaced or mine else 0
        added = []
        for position in replaced:
            added.append(self._write(key, namespace, draw, position, [indices[position]], lease, 0))
        if old < n:
            added.append(self._write(key, namespace, draw, old, indices[old:], lease, len(mine)))
        held: tuple[int, ...] = ()
        if None in samples:
            held = (*(row[0] for row in rows if self._incomplete(key, draw.key, unpack(row[2]))), *added)
            self._ledger.executemany(
                "INSERT OR IGNORE INTO holders VALUES(?, ?, ?)",
                [(segment, claim.token, lease) for segment in held],
            )
        shared = bool(rows) and self._store._shared(self._ledger, {row[3] for row in rows})  # noqa: SLF001
        return Grant(indices, samples, mine, held, n - old + len(replaced), fresh_id, shared)

    def _commit(self, commit: Commit) -> Committed:
        key = self._key_of(commit.key)
        header = orjson.dumps({"id": commit.id, **commit.meta})
        index = commit.index
        kept = index is not None and self._still_ours(key, commit, index)
        if index is None or not kept:
            index = lowest_new(_Book(self._ledger, key), LISTED)
            while self._sample(commit.key, index) is not None:
                self._add(LISTED, key, index)  # stored, but not noted: its writer was killed in between
                index = lowest_new(_Book(self._ledger, key), LISTED)
            self._add(LISTED, key, index)
        sample = Sample(index, commit.id, commit.payload, header)
        self._new[commit.key, index] = sample
        return Committed(sample, kept)

    def _still_ours(self, key: int, commit: Commit, index: int) -> bool:
        """Take a committed index out of ``pending``; tell whether the lease on it was still ours."""
        gone = self._ledger.execute(
            "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
        ).rowcount
        there = self._sample(commit.key, index)
        if isinstance(there, Sample):
            return there.id == commit.id  # written before, by a transaction that was cut short
        if gone:
            return there is None
        pending = self._ledger.execute(
            "SELECT 1 FROM pending WHERE key = ? AND sample = ?", (key, index)
        ).fetchone()
        if pending is None and there is None:
            if not is_in(_Book(self._ledger, key), LISTED, index):
                self._add(LISTED, key, index)
            return True
        return False

    def _forgo(self, forgo: Forgo) -> None:
        key = self._key_of(forgo.key)
        for index in forgo.indices:
            gone = self._ledger.execute(
                "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
            ).rowcount
            if gone and self._sample(forgo.key, index) is None:
                self._remove(LISTED, key, index)

    def _leave(self, leave: Leave) -> None:
        """End a hold. An incomplete draw that nobody else holds gives back what it had added (C8)."""
        held = []
        for segment in leave.held:
            if self._ledger.execute(
                "DELETE FROM holders WHERE segment = ? AND token = ?", (segment, leave.token)
            ).rowcount:
                held.append(segment)
        if leave.complete:
            return
        key = self._key_of(leave.draw.key)
        namespace = self._namespace(leave.draw.namespace)
        undoing = False
        for segment in sorted(held):
            row = self._ledger.execute("SELECT indices FROM segments WHERE id = ?", (segment,)).fetchone()
            if row is None or self._held_by_others(segment):
                continue
            indices = unpack(row[0])
            undoing = undoing or self._incomplete(key, leave.draw.key, indices)
            if undoing:
                self._ledger.execute("DELETE FROM segments WHERE id = ?", (segment,))
                for index in indices:
                    self._remove(namespace, key, index)

    def _discard(self, discard: Discard) -> None:
        key = self._key_of(discard.key)
        name = f"{discard.key}/{discard.index}"
        there = _read(self._shelf, discard.key, discard.index)
        if there is None:
            raise StoreError(f"there is no sample {discard.index} of key {discard.key} to discard")
        if there is not _GONE:
            self._shelf.execute(
                "UPDATE Cache SET value = CAST(? || value AS BLOB) WHERE key = ? AND raw = 1",
                (_DISCARDED, name),
            )
        self._ledger.execute(
            "INSERT OR IGNORE INTO discards VALUES(?, ?, ?, ?)", (key, discard.index, self._now, discard.why)
        )

    # Rows.

    def _segments(self, key: int, namespace: int, draw: Draw) -> list[Any]:
        return self._ledger.execute(
            "SELECT id, position, indices, lease FROM segments WHERE key = ? AND request_id = ?"
            " AND occurrence = ? AND namespace = ? ORDER BY id",
            (key, draw.request_id, draw.occurrence, namespace),
        ).fetchall()

    def _write(
        self,
        key: int,
        namespace: int,
        draw: Draw,
        position: int,
        indices: list[int],
        lease: int,
        generated: int,
    ) -> int:
        cursor = self._ledger.execute(
            "INSERT INTO segments VALUES(NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key,
                draw.request_id,
                draw.occurrence,
                namespace,
                position,
                pack(indices),
                lease,
                generated,
                self._now,
            ),
        )
        assert cursor.lastrowid is not None  # noqa: S101 - an INSERT has one
        return cursor.lastrowid

    def _gain(self, book: _Book, key: int, index: int) -> bool:
        """Take the lease of an index without a sample, unless a live process has it."""
        if (
            self._ledger.execute(
                "INSERT OR IGNORE INTO pending VALUES(?, ?, ?)", (key, index, self._lease())
            ).rowcount
            == 0
        ):
            return False
        if not is_in(book, LISTED, index):
            self._add(LISTED, key, index)
        return True

    def _incomplete(self, key: int, name: str, indices: Sequence[int]) -> bool:
        return any(self._sample(name, index) is None for index in indices)

    def _held_by_others(self, segment: int) -> bool:
        rows = self._ledger.execute(
            "SELECT l.id, l.name, l.ended FROM holders h JOIN leases l ON l.id = h.lease WHERE h.segment = ?",
            (segment,),
        ).fetchall()
        return any(row[0] == self._lease() or self._store._lives(*row) for row in rows)  # noqa: SLF001

    def _sample(self, key: str, index: int) -> Sample | _Discarded | None:
        return self._new.get((key, index)) or _read(self._shelf, key, index)

    # Sets.

    def _add(self, owner: int, key: int, index: int) -> None:
        near = self._ledger.execute(
            "SELECT start, stop FROM spans WHERE owner = ? AND key = ? AND stop >= ? ORDER BY stop LIMIT 2",
            (owner, key, index),
        ).fetchall()
        gone, run = merged(near, index)
        for _, stop in gone:
            self._ledger.execute(
                "DELETE FROM spans WHERE owner = ? AND key = ? AND stop = ?", (owner, key, stop)
            )
        self._ledger.execute("INSERT INTO spans VALUES(?, ?, ?, ?)", (owner, key, run[1], run[0]))

    def _remove(self, owner: int, key: int, index: int) -> None:
        run = _Book(self._ledger, key).run_at(owner, index)
        if run is None or run[0] > index:
            return
        self._ledger.execute(
            "DELETE FROM spans WHERE owner = ? AND key = ? AND stop = ?", (owner, key, run[1])
        )
        for start, stop in split(run, index):
            self._ledger.execute("INSERT INTO spans VALUES(?, ?, ?, ?)", (owner, key, stop, start))

    # Interned ids.

    def _key(self, question: Question) -> int:
        ids = self._store._key_ids  # noqa: SLF001 - its own transaction
        key = ids.get(question.key) or self._store._key_id(self._ledger, question.key)  # noqa: SLF001
        if key is None:
            cursor = self._ledger.execute("INSERT INTO keys VALUES(NULL, ?)", (question.key,))
            key = ids[question.key] = cursor.lastrowid or 0
            self._ledger.execute(
                "INSERT INTO questions VALUES(?, ?, ?, ?)",
                (key, question.scope, question.document, self._now),
            )
        return key

    def _key_of(self, name: str) -> int:
        key = self._store._key_ids.get(name) or self._store._key_id(self._ledger, name)  # noqa: SLF001
        if key is None:
            raise StoreError(f"the cache knows no key {name}; claim a draw of it before committing to it")
        return key

    def _namespace(self, written: str) -> int:
        ids = self._store._namespace_ids  # noqa: SLF001 - its own transaction
        namespace = ids.get(written) or self._store._namespace_id(self._ledger, written)  # noqa: SLF001
        if namespace is None:
            cursor = self._ledger.execute("INSERT INTO namespaces VALUES(NULL, ?)", (written,))
            namespace = ids[written] = cursor.lastrowid or 0
        return namespace

    # Leases.

    def _lease(self) -> int:
        if self._mine is None:
            store = self._store
            if store._lease is None:  # noqa: SLF001 - its own transaction
                name = store._lease_name()  # noqa: SLF001
                self._ledger.execute(
                    "INSERT OR IGNORE INTO leases VALUES(NULL, ?, ?, NULL)", (name, self._now)
                )
                row = self._ledger.execute("SELECT id FROM leases WHERE name = ?", (name,)).fetchone()
                store._lease = row[0]  # noqa: SLF001
            self._mine = store._lease  # noqa: SLF001
        assert self._mine is not None  # noqa: S101 - set above
        return self._mine

    def _reap_the_dead(self) -> None:
        """Free what processes that have died were generating, and end their holds."""
        if self._reaped:
            return
        self._reaped = True
        mine = self._lease()
        for lease, name in self._ledger.execute(
            "SELECT id, name FROM leases WHERE ended IS NULL AND id != ?", (mine,)
        ).fetchall():
            if self._store._lives(lease, name, None):  # noqa: SLF001 - its own transaction
                continue
            for key, name_of_key, index in self._ledger.execute(
                "SELECT p.key, k.key, p.sample FROM pending p JOIN keys k ON k.id = p.key WHERE p.lease = ?",
                (lease,),
            ).fetchall():
                if self._sample(name_of_key, index) is None:
                    self._remove(LISTED, key, index)
            self._ledger.execute("DELETE FROM pending WHERE lease = ?", (lease,))
            self._ledger.execute("DELETE FROM holders WHERE lease = ?", (lease,))
            self._ledger.execute("UPDATE leases SET ended = ? WHERE id = ?", (self._now, lease))
            self._store._lease_swept(name)  # noqa: SLF001


class _Writer:
    """The thread that writes when the loop must not wait, what has gathered as one transaction."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store
        self._queue: collections.deque[
            tuple[Sequence[Operation], Callable[[list[Result] | Exception], None]]
        ] = collections.deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._checkpoint = False
        self.busy = False

    def put(self, operations: Sequence[Operation], done: Callable[[list[Result] | Exception], None]) -> None:
        """Queue operations; ``done`` gets their results, or the error, in the writer's thread."""
        with self._condition:
            self._queue.append((operations, done))
            self.busy = True
            self._start()

    def wake(self) -> None:
        """Let the thread make a checkpoint when it has nothing to write."""
        with self._condition:
            self._checkpoint = True
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="cachepipe-writer", daemon=True)
            self._thread.start()
        self._condition.notify()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        with self._condition:
            self._stopping = True
            thread = self._thread
            self._condition.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._stopping and not self._checkpoint:
                    self.busy = False
                    self._condition.wait()
                items = list(self._queue)
                self._queue.clear()
                if not items and self._stopping:
                    self.busy = False
                    return
            if items:
                self._write(items)
            if self._store._rows > _CHECKPOINT_ROWS:  # noqa: SLF001 - the store's own thread
                self._store.checkpoint()
            self._checkpoint = False

    def _write(
        self, items: list[tuple[Sequence[Operation], Callable[[list[Result] | Exception], None]]]
    ) -> None:
        try:
            results = self._transact([operation for operations, _ in items for operation in operations])
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
            if len(items) == 1:
                items[0][1](error)
                return
            for item in items:  # one of them is at fault: the others go on without it
                self._write([item])
            return
        start = 0
        for operations, done in items:
            done(results[start : start + len(operations)])
            start += len(operations)

    def _transact(self, operations: Sequence[Operation]) -> list[Result]:
        until = time.monotonic() + _LOCK_TIMEOUT
        pause = 0.0005
        while True:
            try:
                with self._store._lock:  # noqa: SLF001 - the store's own thread
                    return self._store.transact(operations)
            except Locked:
                if time.monotonic() > until:
                    raise StoreError(
                        f"the cache {self._store.identity} has been locked by another process for "
                        f"{_LOCK_TIMEOUT:.0f} s; see which one writes there, then try again"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 2, 0.02)


def check_format(ledger: sqlite3.Connection, where: str) -> None:
    """Refuse a ledger whose format this version does not know."""
    row = ledger.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None or not isinstance(row[0], int) or row[0] > FORMAT:
        raise FormatError(
            f"the cache {where} has format {None if row is None else row[0]!r}; this version of cachepipe "
            f"reads formats up to {FORMAT}. Install a newer cachepipe, or use another folder"
        )
