"""A store in a folder: samples in a diskcache, the ledger in an SQLite file beside them.

Any number of processes may use one folder at once. Rows are diskcache's own, so that its tools can
read them, and raw bytes, so that nothing is ever unpickled; nothing is ever evicted.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import diskcache

from cachepipe import forks
from cachepipe.errors import (
    DamagedCache,
    EvictionDisabled,
    LostSamples,
    NoCache,
    ReadOnlyStore,
    StoreError,
    warn,
)
from cachepipe.stores import folders, identity, leases, mounts, recovery
from cachepipe.stores.base import Operation, Result
from cachepipe.stores.received import check_format, check_ledger, check_shelf
from cachepipe.stores.sql import SqlStore
from cachepipe.stores.tables import SCHEMA, UNREADABLE

Durability = Literal["process", "full"]

# diskcache's own repair removes files whose path lacks the name of its database.
_LEDGER, _SHELF = identity.LEDGER, identity.SHELF
_DISKCACHE = {**diskcache.DEFAULT_SETTINGS, **diskcache.core.METADATA}
# Settings in a received file have no effect.
_OURS = {**diskcache.DEFAULT_SETTINGS, "eviction_policy": "none", "cull_limit": 0}
_LARGE = 16 << 20  # bytes of a write-ahead log above which opening makes a checkpoint
_CHECKED = 256 << 20  # bytes of a file up to which all of it is checked after a process did not close it
_MAPPED = 16 << 20  # bytes of a file that a connection reads through memory; all of it is resident in the end


class DiskStore(SqlStore):
    """The samples and the ledger of one folder.

    Args:
        cache: the folder, which is created if it does not exist (private to the user), or an open
            ``diskcache.Cache``: its folder is used, and the caller closes it.
        durability: ``"process"`` survives the death of any process; ``"full"`` waits for the disk at
            each commit, and so survives a crash of the machine.
        wait_for_others: seconds to wait for a sample that another live process generates; then it is
            generated here as well, and the later one of the two is kept as an extra. None waits as long as
            that process lives, also while it is stopped.
        read_only: never write; None detects whether the folder can be written.

    Raises:
        StoreError: when the folder cannot be created or opened, is not a cache, or would be written on a
            network file system.
        FormatError: when a newer version wrote it.
    """

    def __init__(
        self,
        cache: str | os.PathLike[str] | diskcache.Cache,
        *,
        durability: Durability = "process",
        wait_for_others: float | None = None,
        read_only: bool | None = None,
    ) -> None:
        if isinstance(cache, diskcache.FanoutCache | diskcache.Deque | diskcache.Index):
            raise TypeError(f"a cache is a folder or a diskcache.Cache; got a {type(cache).__name__}")
        if durability not in ("process", "full"):
            raise ValueError(f"durability is 'process' or 'full'; got {durability!r}")
        if wait_for_others is not None and not wait_for_others >= 0:
            raise ValueError(f"wait_for_others is a number of seconds, at least 0; got {wait_for_others!r}")
        self.wait_for_others = wait_for_others
        theirs = cache if isinstance(cache, diskcache.Cache) else None
        folder = theirs.directory if theirs is not None else os.fspath(cache)
        self.folder = folders.expanded(folder)
        self.identity = f"disk:{self.folder}"
        self.durability = durability
        self._ledger_path = str(self.folder / _LEDGER)
        self._holding: leases.Lease | None = None
        self._inode: int | None = None
        self._theirs = None if theirs is None else weakref.ref(theirs)
        self.why_read_only = "it was opened with read_only=True" if read_only else ""
        with self._opening():
            if read_only is None:
                self.why_read_only = _why_read_only(self.folder)
            if not self.why_read_only:
                mounts.check_local("the cache", self.folder, mounts.REMEDIES)
            folders.check_files(self.folder, _SHELF, _LEDGER)
        self.read_only = bool(self.why_read_only)
        super().__init__()
        if self.read_only:
            self._check_readable()
            if not read_only:
                warn(
                    f"the cache {self.folder} cannot be written ({self.why_read_only}): it serves hits, but "
                    "does not store new samples",
                    ReadOnlyStore,
                )
            return
        with self._opening():
            self._make(theirs)
        self._inode = _inode(self._ledger_path)
        if any(_size(self.folder / f"{name}-wal") > _LARGE for name in (_SHELF, _LEDGER)):
            self._rows = _LARGE
            self._writer.wake()  # other processes have left much in the logs

    def __repr__(self) -> str:
        return f"<DiskStore {self.folder}{' read-only' if self.read_only else ''}>"

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def size(self) -> int:
        """Return the size of all files below the folder; files that vanish meanwhile count as 0."""
        total = 0
        for file in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file() and not file.is_symlink():
                    total += file.stat().st_size
        return total

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """Turn the system's and SQLite's errors into ours."""
        try:
            yield
        except (OSError, *UNREADABLE) as error:
            raise StoreError(f"the cache folder {self.folder} cannot be opened: {error}") from error

    def _make(self, theirs: diskcache.Cache | None) -> None:
        """Create the folder and its files if they are missing, one process at a time."""
        made = folders.make(self.folder)
        if made or not any(self.folder.iterdir()) or (self.folder / _SHELF).exists():
            folders.make_private(self.folder)
        with leases.alone(self.folder):
            for name in (_SHELF, _LEDGER):
                # SQLite gives its side files the permissions of the database. A file that is there is not
                # opened: closing it would drop the locks that SQLite holds on it anywhere in this process.
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self._make_shelf(theirs)
            ledger, shelf = self._connect(_LEDGER), self._connect(_SHELF)
            try:
                known = check_ledger(ledger, str(self.folder))
                if not known or not ledger.execute("SELECT 1 FROM meta").fetchone():
                    self._check_no_samples(shelf)
                    ledger.execute("PRAGMA journal_mode = WAL")
                    ledger.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                check_format(ledger, str(self.folder))
                identity.check_parts(ledger, shelf, str(self.folder))
                identity.sign(ledger, shelf)
                self._recover(ledger, shelf)
            finally:
                ledger.close()
                shelf.close()
        if self.durability == "full":
            for folder in {self.folder, *(each.parent for each in made)}:
                folders.sync(folder)

    def _make_shelf(self, theirs: diskcache.Cache | None) -> None:
        shelf = self._connect(_SHELF)
        try:
            there = check_shelf(shelf, str(self.folder))
            settings = dict(shelf.execute("SELECT key, value FROM Settings")) if "Settings" in there else {}
            whole = "Settings_size_delete" in there  # which diskcache makes last
            if whole and (settings.get("eviction_policy"), settings.get("cull_limit")) != ("none", 0):
                shelf.execute(
                    "INSERT OR REPLACE INTO Settings VALUES('eviction_policy', 'none'), ('cull_limit', 0)"
                )
        finally:
            shelf.close()
        if not whole:
            if unknown := set(settings) - set(_DISKCACHE):
                shown = ", ".join(sorted(map(repr, unknown)))
                raise StoreError(
                    f"the cache {self.folder} cannot be used: {_SHELF} holds settings that diskcache does "
                    f"not have: {shown:.200}. Restore the file, or use another folder"
                )
            diskcache.Cache(str(self.folder), timeout=60, **_OURS).close()
        policy = settings.get("eviction_policy")
        if policy not in (None, "none"):
            warn(
                f"the diskcache in {self.folder} had the eviction policy {policy!r}, which deletes paid "
                "samples when it grows; it is now 'none'. Open it with eviction_policy='none' yourself",
                EvictionDisabled,
            )
        if theirs is not None:
            theirs.reset("eviction_policy", "none", update=False)
            theirs.reset("cull_limit", 0, update=False)

    def _recover(self, ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> None:
        """Continue after the greatest stamp, and repair what processes that did not close have left.

        When a machine stops, one of the two files may lose the rows since the last checkpoint. A lost sample
        is generated again, with a warning. A sample that is missing in the list only is listed again.
        """
        query = "SELECT id, name FROM leases WHERE ended IS NULL"
        dead = {lease for lease, name in ledger.execute(query) if not self._lease_alive(name)}
        since = identity.checkpointed(ledger)
        self._ledger.greatest_stamp = identity.greatest_stamp(ledger, shelf, unclean=bool(dead))
        if not dead:
            return
        for connection, name in ((ledger, _LEDGER), (shelf, _SHELF)):
            if _size(self.folder / name) <= _CHECKED:
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise DamagedCache(
                        f"the cache {self.folder} is damaged: SQLite says of {name}: {found}. Restore the "
                        "cache from a copy, or run `cachepipe verify` to see what can be used"
                    )
        ledger.execute("BEGIN IMMEDIATE")
        lost = 0 if self.durability == "full" else recovery.unlist(ledger, shelf, since)
        unknown = recovery.relist(ledger, shelf)
        ledger.execute("COMMIT")
        if lost:
            warn(
                f"the cache {self.folder} has lost {lost} samples: the machine stopped before they were "
                "on the disk. They are generated again when they are asked for. With durability='full' "
                "no sample is lost",
                LostSamples,
            )
        if unknown:
            warn(
                f"the cache {self.folder} held {unknown} samples of questions that its ledger does not know, "
                "and they were removed: an import, merge or sync was killed, or the machine stopped. Repeat "
                "what was killed",
                LostSamples,
            )

    def _check_no_samples(self, shelf: sqlite3.Connection) -> None:
        """Refuse to create a ledger beside samples of a lost ledger: all would be bought again."""
        if identity.is_signed(shelf) or not identity.shelf_is_new(shelf):
            raise DamagedCache(
                f"the cache {self.folder} has samples, but its ledger, which says who drew them, is missing. "
                f"Restore its {_LEDGER} from where {_SHELF} came from; to begin anew, name another folder"
            )

    def _check_readable(self) -> None:
        if not self.folder.exists():
            raise NoCache(
                f"there is no cache to read in {self.folder}: the folder does not exist. Check the path, or "
                "fill it first with mode='read-write'"
            )
        missing = [name for name in (_LEDGER, _SHELF) if not (self.folder / name).exists()]
        if missing:
            kind = NoCache if len(missing) == 2 else StoreError
            raise kind(
                f"the folder {self.folder} cannot be read as a cache: it has no {' and no '.join(missing)}. "
                "Check the path; if it was a cache of cachepipe's, restore the file"
            )
        try:
            ledger, shelf = self._readable()
            check_shelf(shelf, str(self.folder))
            check_ledger(ledger, str(self.folder))
            check_format(ledger, str(self.folder))
            identity.check_parts(ledger, shelf, str(self.folder))
        except UNREADABLE as error:
            raise StoreError(
                f"the folder {self.folder} cannot be read as a cache: {error}. Check the path, or open it "
                "first in a process that may write"
            ) from error

    def _connect(self, name: str) -> sqlite3.Connection:
        return connect(self.folder / name)

    def _open(self, *, write: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        pair: list[sqlite3.Connection] = []
        hows: list[str] = []
        for name in (_LEDGER, _SHELF):
            how = ""
            if self.read_only:
                try:
                    connection, how = connect_to_read(self.folder / name)
                except StoreError:
                    for other in pair:
                        other.close()
                    raise
            else:
                connection = self._connect(name)
                full = self.durability == "full"
                connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
                connection.execute("PRAGMA wal_autocheckpoint = 0")
                connection.execute(f"PRAGMA mmap_size = {_MAPPED}")
            if write:
                connection.execute("PRAGMA busy_timeout = 0")
            else:
                connection.execute("PRAGMA query_only = 1")
            pair.append(connection)
            hows.append(how)
        if not write:
            pair[1].execute("ATTACH ? AS ledger", (f"{(self.folder / _LEDGER).as_uri()}{hows[0]}",))
        return pair[0], pair[1]

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction; return None at once if that would have to wait.

        With ``durability="full"`` it would wait for the disk.
        """
        return None if self.durability == "full" else super().apply_now(operations)

    def _inherit(self) -> None:
        theirs = None if self._theirs is None else self._theirs()
        if theirs is not None:
            theirs.close()  # diskcache opens it again by itself
        super()._inherit()

    def _check_files(self, *, deleted: bool = False) -> None:
        if deleted:
            gone = self._holding is not None and self._holding.deleted()
        else:
            gone = _inode(self._ledger_path) != self._inode
        if not gone:
            return
        raise StoreError(
            f"the cache folder {self.folder} was moved or deleted while it was open: samples that are stored "
            "now would be lost, or not found. Move it back, or open the cache again"
        )

    def compact(self) -> tuple[int, int]:
        """Rewrite both files without the space that was freed in them; others may read meanwhile.

        Returns:
            The bytes of the files and their logs, before and after.

        Raises:
            StoreError: when another process writes to the cache, or the disk is full.
        """
        self._check()
        if self.read_only:
            raise StoreError(f"the cache {self.folder} cannot be written: {self.why_read_only}")
        self._check_alone()
        before = self._bytes()
        with leases.alone(self.folder), self._lock:
            try:
                for name in (_SHELF, _LEDGER):
                    with contextlib.closing(self._connect(name)) as connection:
                        connection.execute("VACUUM")
                        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.OperationalError as error:
                raise StoreError(
                    f"the cache {self.folder} could not be compacted: {error}. It is unchanged; its disk "
                    "needs as much free space as the cache takes, and no other process may write to it"
                ) from error
        return before, self._bytes()

    def _bytes(self) -> int:
        return sum(_size(self.folder / f"{name}{log}") for name in (_SHELF, _LEDGER) for log in ("", "-wal"))

    def _check_alone(self) -> None:
        """Raise an error if another process has drawn from the cache, and may write to it."""
        ledger, _ = self._readable()
        open_leases = ledger.execute("SELECT name FROM leases WHERE ended IS NULL").fetchall()
        for (name,) in open_leases:
            if name != self._own_lease_name() and self._lease_alive(name):
                raise StoreError(
                    f"the process {leases.process(name).name} writes to the cache {self.folder}, and would "
                    "have to wait. End it before you compact the cache"
                )

    # Leases.

    def _lease_name(self) -> str:
        if self._holding is None or self._holding.fork != forks.count:
            self._holding = leases.hold(self.folder)
        return self._holding.name

    def _own_lease_name(self) -> str | None:
        return leases.own(self.folder)

    def _lease_alive(self, name: str) -> bool:
        return leases.alive(self.folder, name)

    def _end_lease(self) -> None:
        holding, self._holding = self._holding, None
        if holding is None or holding.fork != forks.count or not holding.release():
            return
        with contextlib.suppress(sqlite3.Error, StoreError):  # else the next process that claims ends it
            if self._writing is not None:
                self._writing[0].execute(
                    "UPDATE leases SET ended = ? WHERE name = ?"
                    " AND NOT EXISTS (SELECT 1 FROM pending WHERE lease = leases.id)"
                    " AND NOT EXISTS (SELECT 1 FROM holders WHERE lease = leases.id)",
                    (time.time(), holding.name),
                )


def connect(path: Path, *, uri: str = "") -> sqlite3.Connection:
    """Return a connection to one file of a cache, in autocommit mode."""
    connection = sqlite3.connect(
        f"{path.as_uri()}{uri}", uri=True, timeout=60, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def connect_to_read(path: Path) -> tuple[sqlite3.Connection, str]:
    """Return a connection that only reads one file of a cache, and the options of its URI.

    On a network file system, nobody may write to the file meanwhile: it is read without locks.

    Raises:
        StoreError: when the latest rows are in a log beside the file, which cannot be read where nothing can
            be written: the rows would seem missing.
    """
    if mounts.network_mount(path.parent) is None:
        how = "?mode=ro"
        connection = connect(path, uri=how)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # SQLite cannot create its side files
            connection.close()
        else:
            return connection, how
    if _size(path.with_name(f"{path.name}-wal")):
        raise StoreError(
            f"the cache {path.parent} cannot be read where nothing can be written: {path.name}-wal holds "
            "rows that were not moved into the file, because a process writes them now or was killed. When "
            "no process uses the cache, open a copy of it once where it may be written, on a local disk"
        )
    how = "?immutable=1"
    return connect(path, uri=how), how


def _inode(path: str) -> int | None:
    """Return the identity of the file at a path, or None if there is no file."""
    try:
        return os.stat(path).st_ino  # noqa: PTH116 - a string is what there is
    except OSError:
        return None


def _size(path: Path) -> int:
    """Return the size of a file, or 0 if there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _why_read_only(folder: Path) -> str:
    """Return why a folder cannot be written, or an empty string."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        raise StoreError(f"a cache is a folder; {folder} is a file")
    for name in (_SHELF, _LEDGER):
        path = folder / name
        if path.exists() and not os.access(path, os.W_OK):
            return f"no permission to write {path.name}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "no permission to write to the folder"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
