"""A file on this machine with copies of what a shared store holds: complete draws, each with its samples.

The file is a SQLite database that the processes of this machine share. It holds rows as the engine has them,
with their digests, so a damaged copy is not used. Nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import orjson
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from cachepipe.contract.draws import Draw
from cachepipe.errors import DamagedCache, StoreError
from cachepipe.stores import folders, leases, mounts
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import CHANGES, Changes

_FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS draws(
    place INTEGER PRIMARY KEY, key INTEGER NOT NULL, used INTEGER NOT NULL, rows BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS draws_key ON draws(key);
CREATE INDEX IF NOT EXISTS draws_used ON draws(used);
CREATE TABLE IF NOT EXISTS changes(key INTEGER PRIMARY KEY, number INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS leases(lease INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS state(place INTEGER PRIMARY KEY, row BLOB NOT NULL);
"""
"""Keys and draws are named by digests: what a row holds is bound to its place by the digest in the row."""

_GET: Final = "SELECT key, used, rows FROM draws WHERE place = ?"
_PUT: Final = "INSERT OR REPLACE INTO draws VALUES (?, ?, ?, ?)"
_TOUCH: Final = "UPDATE draws SET used = ? WHERE place = ?"
_CURRENT: Final = "SELECT number FROM changes WHERE key = ?"
_CHANGE: Final = (
    "INSERT INTO changes VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET number = max(number, excluded.number)"
)
_OLDEST: Final = (
    "DELETE FROM draws WHERE place IN "
    "(SELECT place FROM draws ORDER BY used LIMIT (SELECT 1 + count(*) / 20 FROM draws))"
)

_HALF: Final = 1 << 63
_STATE: Final = b"state"
_LOCK_TIMEOUT: Final = 5.0  # seconds to wait for another process that writes
_USED: Final = 3600  # seconds for which a copy counts as just used
_ROOM: Final = 0.9  # the share of its size that the file keeps when it is full
_UNUSED: Final = 30 * 24 * 3600.0  # seconds after which a file that no process has opened is deleted
_ENDINGS: Final = ("", "-wal", "-shm")  # of the files of a database
_FILE: Final = re.compile(r"([0-9a-f]{16}-\d+)-(\d+)\.db")
"""The name of a file: the store's digest with the format, and how many files came before it."""


class Copy(NamedTuple):
    """A copy of a complete draw.

    Attributes:
        draw: the draw.
        row: its row.
        samples: the rows of its samples, by position.
        changed: the number of the last change of its key when they were read.
        leases: the leases of the processes that made it.
    """

    draw: Draw
    row: bytes
    samples: Sequence[bytes]
    changed: int
    leases: Collection[int]

    @property
    def size(self) -> int:
        """The number of bytes of the rows."""
        return len(self.row) + sum(map(len, self.samples))


class _State(NamedTuple):
    """What a file knows of its store.

    Attributes:
        identity: identifies the store.
        epoch: the epoch of the engine.
        number: the number of the last change that it knows.
        generation: how many times all copies were forgotten.
    """

    identity: str
    epoch: str
    number: int
    generation: int


_FAULTS: Final = (sqlite3.Error, OSError, StoreError, TypeError, ValueError)
"""What a file raises that cannot be used."""


class Unusable(Exception):  # noqa: N818 - says what the file is
    """The file cannot be used; the message says why.

    Attributes:
        damaged: whether another file may take its place.
    """

    def __init__(self, why: str, *, damaged: bool = False) -> None:
        super().__init__(why)
        self.damaged = damaged


def _unusable(error: Exception) -> Unusable:
    """Return our error for one of the file's."""
    damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    return Unusable(str(error), damaged=damaged or isinstance(error, DamagedCache | TypeError | ValueError))


class Copies:
    """The copies of one store on this machine. Every method is thread-safe.

    Args:
        folder: the folder of the file; it is made.
        identity: identifies the store.
        megabytes: the size of the file from which on the copies that were used longest ago are deleted. If
            all files of the folder are larger, opening this one deletes those of other stores.

    Raises:
        Unusable: when the file cannot be opened or made.
    """

    def __init__(self, folder: Path, identity: str, megabytes: float) -> None:
        self._folder = folder.resolve()
        self._identity = identity
        self._bytes = int(megabytes * 1e6)
        self._name = f"{xxh3_64_hexdigest(identity.encode())}-{_FORMAT}"
        self._touched: set[int] = set()
        self._begin()
        self._open()

    def _begin(self) -> None:
        self._lock = threading.Lock()  # of the connection that reads
        self._writing = threading.Lock()
        self._connections: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
        self._closed = False

    # The file.

    def _open(self) -> None:
        if (mount := mounts.network_mount(self._folder)) is not None:
            raise Unusable(f"{self._folder} is on a network file system ({mount.kind} at {mount.point})")
        with _ours():
            folders.make(self._folder)
            folders.make_private(self._folder)
            found = self._folder.stat()
        if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077):
            raise Unusable(f"{self._folder} is not private to this user")
        try:
            with _ours(), leases.alone(self._folder):
                if self._connections is None:  # another thread was not faster
                    self._connect(self._path(self._latest()))
                    with contextlib.suppress(OSError):
                        self._tidy()
        except Unusable as error:
            if not error.damaged:
                raise
            self._connect_another()

    def _latest(self) -> int:
        """Return the number of the latest file: one that is damaged is replaced by one with another name."""
        found = [match for path in self._folder.iterdir() if (match := _FILE.fullmatch(path.name))]
        return max([int(match[2]) for match in found if match[1] == self._name], default=0)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number}.db"

    def _connect(self, path: Path) -> None:
        folders.check_files(self._folder, path.name)
        self._number = int(path.stem.rpartition("-")[2])
        reading, writing = (
            sqlite3.connect(path, timeout=_LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            for _ in range(2)
        )
        reading.text_factory = writing.text_factory = bytes  # a damaged row may have text
        try:
            writing.execute("PRAGMA journal_mode = WAL")
            writing.execute("PRAGMA synchronous = NORMAL")
            writing.executescript(_SCHEMA)
            self._state(writing)
        except BaseException:
            reading.close()
            writing.close()
            raise
        self._connections = reading, writing

    def replace(self) -> None:
        """Begin another file instead of a damaged one, unless another process has done so.

        Raises:
            Unusable: when that is not possible.
        """
        self._disconnect()
        self._connect_another()

    def _connect_another(self) -> None:
        with _ours(), leases.alone(self._folder):
            damaged, latest = self._number, self._latest()
            self._connect(self._path(max(latest, damaged + 1)))
            _unlink(self._path(damaged))  # no later file has this name

    def _tidy(self) -> None:
        """Delete other files that no process uses: old ones, replaced ones, and what is too much together.

        The caller holds the lock of the folder, so no process opens a file meanwhile.
        """
        own = self._path(self._number)
        os.utime(own)
        found = {path: _stat(path) for path in self._folder.iterdir() if _FILE.fullmatch(path.name)}
        total = sum(size for _, size in found.values())
        others = sorted((used, path) for path, (used, _) in found.items() if path != own)
        for used, path in others:
            due = used < time.time() - _UNUSED or path.name.startswith(f"{self._name}-")
            if (due or total > self._bytes) and _is_unused(path):
                _unlink(path)
                total -= found[path][1]

    def _opened(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Return the connections that read and write; a forked child opens its own."""
        if self._connections is None:
            if self._closed:
                raise Unusable("it was closed")
            self._open()
        assert self._connections is not None  # noqa: S101 - it was opened
        return self._connections

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        self._disconnect()

    def _disconnect(self) -> None:
        with self._writing, self._lock:
            connections, self._connections = self._connections, None
            for connection in connections or ():
                connection.close()

    def inherit(self) -> None:
        """Leave the connections to the parent, in a forked child."""
        _inherited.append(self._connections)
        self._begin()

    def _state(self, connection: sqlite3.Connection) -> _State:
        row = connection.execute("SELECT row FROM state").fetchone()
        if row is None:
            return _State(self._identity, "", -1, 0)
        state = _State(*orjson.loads(rows.unpack("", _STATE, row[0])))
        if state.identity != self._identity:
            raise Unusable("it belongs to another store")
        return state

    def _put_state(self, connection: sqlite3.Connection, state: _State) -> None:
        row = rows.pack("", _STATE, orjson.dumps([*state]))
        connection.execute("INSERT OR REPLACE INTO state VALUES (0, ?)", (row,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _ours(), self._writing:
            connection = self._opened()[1]
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    # Copies.

    def get(self, draw: Draw, name: bytes) -> tuple[bytes, list[bytes]] | None:
        """Return the row of a draw, by its field, and those of its samples; None without a whole copy.

        Raises:
            Unusable: when the file cannot be read.
        """
        key = rows.encoded(draw.key)
        place = xxh3_64_intdigest(b"%b\0%b" % (key, name)) - _HALF
        try:  # what `_ours` does, in a fraction of its time
            with self._lock:
                found = self._opened()[0].execute(_GET, (place,)).fetchone()
        except _FAULTS as error:
            raise _unusable(error) from error
        if found is None or found[0] != xxh3_64_intdigest(key) - _HALF:
            return None
        if type(found[1]) is int and found[1] < time.time() - _USED:
            self._touched.add(place)
        return _unpacked(found[2])

    @property
    def touched(self) -> bool:
        """Whether copies were used whose use `put` has to note."""
        return bool(self._touched)

    def put(self, copies: Iterable[Copy], generation: int) -> None:
        """Add copies, unless their keys were changed after they were read.

        Args:
            copies: the copies.
            generation: the generation of the file when they were read.

        Raises:
            Unusable: when the file cannot be written.
        """
        now = int(time.time())
        with self._transaction() as connection:
            touched, self._touched = self._touched, set()
            connection.executemany(_TOUCH, [(now, each) for each in touched])
            if self._state(connection).generation != generation:
                return
            made_by: set[int] = set()
            for copy in copies:
                key = rows.encoded(copy.draw.key)
                number = xxh3_64_intdigest(key) - _HALF
                changed = connection.execute(_CURRENT, (number,)).fetchone()
                if changed is not None and changed[0] > copy.changed:
                    continue
                name = rows.draw_field(copy.draw)
                place = xxh3_64_intdigest(b"%b\0%b" % (key, name)) - _HALF
                connection.execute(_PUT, (place, number, now, _packed([copy.row, *copy.samples])))
                made_by.update(copy.leases)
            connection.executemany("INSERT OR IGNORE INTO leases VALUES (?)", [(each,) for each in made_by])
            full = _size(connection) > self._bytes
        while full:  # in several transactions, so that others can write
            with self._transaction() as connection:
                deleted = connection.execute(_OLDEST).rowcount
                full = deleted > 0 and _size(connection) > _ROOM * self._bytes

    # Changes.

    def known(self) -> int | None:
        """Return the number of the last change that the file knows; None if it is new.

        Raises:
            Unusable: when the file cannot be read.
        """
        with _ours(), self._lock:
            state = self._state(self._opened()[0])
        return None if state.number < 0 else state.number

    def learn(self, changes: Changes, since: int | None) -> int | None:
        """Forget the copies of changed keys, or all of them if changes were missed.

        Args:
            changes: the changes of the store.
            since: the number that they were asked from, or None.

        Returns:
            The generation of the file; None if more must be asked, from `known` on.

        Raises:
            Unusable: when the file cannot be written.
        """
        with self._transaction() as connection:
            state = self._state(connection)
            if since is None:
                last = changes.keys[-1][0] if changes.keys else 0
                if state.number >= 0:
                    return None  # another process was faster
                self._apply(connection, changes.keys)
                state = state._replace(epoch=changes.epoch, number=last)
            elif state.epoch != changes.epoch or not _follow(changes, since):
                for table in ("draws", "changes", "leases"):
                    connection.execute(f"DELETE FROM {table}")
                self._put_state(connection, state._replace(number=-1, generation=state.generation + 1))
                return None
            else:
                new = [change for change in changes.keys if change[0] > state.number]
                if not new:
                    return state.generation
                self._apply(connection, new)
                state = state._replace(number=new[-1][0])
                connection.execute("DELETE FROM changes WHERE number <= ?", (state.number - CHANGES,))
            self._put_state(connection, state)
            return state.generation

    def forget(self, changes: Iterable[tuple[int, str]]) -> None:
        """Forget the copies of keys that are about to be changed.

        Raises:
            Unusable: when the file cannot be written.
        """
        with self._transaction() as connection:
            self._apply(connection, changes)

    def changed(self, key: str) -> int:
        """Return the number of the last change of a key that the file knows; 0 if it knows none.

        Raises:
            Unusable: when the file cannot be read.
        """
        name = xxh3_64_intdigest(rows.encoded(key)) - _HALF
        with _ours(), self._lock:
            found = self._opened()[0].execute(_CURRENT, (name,)).fetchone()
        return 0 if found is None else int(found[0])

    @staticmethod
    def _apply(connection: sqlite3.Connection, changes: Iterable[tuple[int, str]]) -> None:
        for number, key in changes:
            name = xxh3_64_intdigest(rows.encoded(key)) - _HALF
            connection.execute(_CHANGE, (name, number))
            connection.execute("DELETE FROM draws WHERE key = ?", (name,))

    # Leases.

    def leases(self) -> list[int]:
        """Return the leases of the processes that made draws, and that are not known to be dead.

        Raises:
            Unusable: when the file cannot be read.
        """
        with _ours(), self._lock:
            return [lease for [lease] in self._opened()[0].execute("SELECT lease FROM leases")]

    def dead(self, leases: Collection[int]) -> None:
        """Note that the processes of leases are dead.

        Raises:
            Unusable: when the file cannot be written.
        """
        with self._transaction() as connection:
            connection.executemany("DELETE FROM leases WHERE lease = ?", [(lease,) for lease in leases])


_inherited: list[object] = []
"""Connections of the parent of a forked child: closing them here could block for ever."""


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """Raise our error for those of a file."""
    try:
        yield
    except _FAULTS as error:
        raise _unusable(error) from error


def _stat(path: Path) -> tuple[float, int]:
    """Return when a database was written or opened last, and its size; zeros if it has gone."""
    used, size = 0.0, 0
    for ending in _ENDINGS:
        with contextlib.suppress(OSError):
            found = Path(f"{path}{ending}").lstat()
            used, size = max(used, found.st_mtime), size + found.st_size
    return used, size


def _is_unused(path: Path) -> bool:
    """Return True if no connection to a database is open, in any process."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    except sqlite3.DatabaseError:
        return True  # nobody can use it
    else:
        return True
    finally:
        connection.close()


def _unlink(path: Path) -> None:
    """Delete the files of a database."""
    for ending in _ENDINGS:
        with contextlib.suppress(OSError):
            Path(f"{path}{ending}").unlink()


def _size(connection: sqlite3.Connection) -> int:
    """Return the number of bytes in use."""
    [[count], [free], [size]] = [
        connection.execute(f"PRAGMA {name}").fetchone()
        for name in ("page_count", "freelist_count", "page_size")
    ]
    return int((count - free) * size)


def _follow(changes: Changes, since: int) -> bool:
    """Return True if no change is missing after a number that is known."""
    if not changes.keys:
        return since == 0
    first = changes.keys[0][0]
    return first == since or (since == 0 and first == 1)


def _packed(parts: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{1 + len(parts)}I", len(parts), *map(len, parts)) + b"".join(parts)


def _unpacked(blob: bytes) -> tuple[bytes, list[bytes]] | None:
    """Return the first of several rows and the others; None if they are damaged."""
    try:
        [count] = struct.unpack_from("<I", blob)
        lengths = struct.unpack_from(f"<{count}I", blob, 4)
    except (struct.error, TypeError):
        return None
    parts: list[bytes] = []
    at = 4 + 4 * count
    for length in lengths:
        parts.append(blob[at : at + length])
        at += length
    return (parts[0], parts[1:]) if parts else None
