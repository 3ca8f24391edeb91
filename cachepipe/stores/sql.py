"""A store whose ledger and samples are SQLite tables.

Two files, each in WAL mode: ``ledger.cache.db`` holds small rows that one transaction must see together, and
diskcache's ``cache.db`` the samples, one row each, never rewritten. A commit puts the samples down
first, while it holds the ledger's write lock, and then takes their indices out of ``pending``; so an
index that is neither pending nor stored has no sample, whenever a process was killed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Sequence

from cachepipe import forks
from cachepipe.errors import StoreError
from cachepipe.stores import identity, tables
from cachepipe.stores.base import Adopt, Operation, Result
from cachepipe.stores.queued import Queued
from cachepipe.stores.reading import SqlReader
from cachepipe.stores.tables import locked
from cachepipe.stores.transaction import SqlLedger
from cachepipe.stores.writer import Locked, Writer

_CHECKPOINT_ROWS = 4000  # written rows after which the writer thread moves the WAL into the file

_stores: weakref.WeakSet[SqlStore] = weakref.WeakSet()


_forking: list[SqlStore] = []


def _before_fork() -> None:
    """Wait for the transactions under way before the process forks, and allow no new ones."""
    _forking[:] = list(_stores)
    for store in _forking:
        store._lock.acquire()  # noqa: SLF001 - of this module


def _after_fork_in_parent() -> None:
    for store in _forking:
        store._lock.release()  # noqa: SLF001 - of this module
    _forking.clear()


def _after_fork_in_child() -> None:
    """Close what was inherited, before anything is opened.

    While an inherited connection is open, SQLite treats the parent's locks as locks of this process, and a
    new connection to the same file would take no locks of its own.
    """
    for store in _forking:
        store._inherit()  # noqa: SLF001 - of this module
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


class SqlStore(SqlReader, Queued):
    """A store whose ledger and samples are SQLite tables.

    Subclasses define how the two files are opened, and which processes are alive.
    """

    read_only = False
    why_read_only = ""
    wait_for_others: float | None = None

    def __init__(self) -> None:
        self._reset()
        _stores.add(self)
        self._opens()

    # What subclasses provide.

    def _lease_name(self) -> str:
        """Return the name of this process's lease; create the lease if there is none."""
        raise NotImplementedError

    def _check_files(self, *, deleted: bool = False) -> None:
        """Raise a ``StoreError`` if the files are gone, or not where others look for them.

        Args:
            deleted: only if they are gone: what was paid for is stored in files that were moved.
        """

    def _end_lease(self) -> None:
        """Note in the ledger that this process's lease has ended."""

    # Connections. A forked child opens its own: connections of SQLite must not cross a fork.

    def _reset(self) -> None:
        self._begin_reading()
        self._lock = threading.Lock()
        self._writing: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
        self._checkpointing: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
        self._opened: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = Writer(self)
        self._ledger = SqlLedger(
            self._lease_name, self._lives, self._shared, self._check_files, self._key_ids
        )
        self._rows = 0

    def _inherit(self) -> None:
        """Begin again in a forked child."""
        closed = self._closed
        for connection in self._opened:
            connection.close()
        self._close_readers()
        self._reset()
        self._closed = closed

    def _writable(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        self._check()
        if self.read_only:
            raise StoreError(f"the cache {self.identity} cannot be written: {self.why_read_only}")
        if self._writing is None:
            self._writing = self._open(write=True)
            self._opened += self._writing
        return self._writing

    # Applying operations.

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction; return None at once if that would have to wait."""
        if self._writer.busy or not self._lock.acquire(blocking=False):
            return None
        try:
            results = self._transact(operations)
        except Locked:
            return None
        finally:
            self._lock.release()
        if self._rows > _CHECKPOINT_ROWS:
            self._writer.wake()
        return results

    def write(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations in one transaction, on the calling thread.

        Raises:
            Locked: when another connection writes.
        """
        with self._lock:
            return self._transact(operations)

    def _transact(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations; the caller holds the lock."""
        ledger, shelf = self._writable()
        try:
            if self._ledger.own_lease is None and any(isinstance(each, Adopt) for each in operations):
                # If a kill leaves samples that the ledger does not know, this lease tells so.
                self._perform(ledger, shelf, (), leased=True)
            results = self._perform(ledger, shelf, operations)
        except sqlite3.OperationalError as error:
            if locked(error):
                raise Locked from error
            raise StoreError(f"the cache {self.identity} could not be written: {error}") from error
        except tables.UNREADABLE as error:
            raise StoreError(f"the cache {self.identity} is damaged: {error}") from error
        except OSError as error:
            raise StoreError(f"the cache {self.identity} could not be written: {error}") from error
        self._rows += len(operations)
        return results

    def _perform(
        self,
        ledger: sqlite3.Connection,
        shelf: sqlite3.Connection,
        operations: Sequence[Operation],
        *,
        leased: bool = False,
    ) -> list[Result]:
        """Perform operations in one transaction, or none of them; also begin a lease if ``leased``."""
        ledger.execute("BEGIN IMMEDIATE")
        try:
            results = self._ledger.run(ledger, shelf, operations)
            if leased:
                self._ledger.lease()
            ledger.execute("COMMIT")
        except BaseException:
            if shelf.in_transaction:
                shelf.execute("ROLLBACK")
            if ledger.in_transaction:
                ledger.execute("ROLLBACK")
            self._ledger.forget()
            raise
        return results

    def tidy(self) -> None:
        """Make a checkpoint if enough was written, on connections of its own, so that no caller waits."""
        if self._rows > _CHECKPOINT_ROWS:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Move the rows of the write-ahead logs into the files, unless readers are in the way."""
        self._rows = 0
        if self._checkpointing is None:
            try:
                self._checkpointing = self._open(write=True)
            except sqlite3.Error:  # no more files may be opened, or the folder has gone: it can wait
                return
            self._opened += self._checkpointing
        stamp, sample = self._ledger.written_stamp, self._ledger.written_sample
        with contextlib.suppress(sqlite3.OperationalError):  # others write: it is for the next checkpoint
            for connection in self._checkpointing:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            if self._writing is not None:
                with self._lock:  # what is written through another connection would make this process forget
                    identity.checkpoint(*self._writing, stamp, sample)

    def close(self) -> None:
        """Write what is queued, end the lease and close the connections."""
        if self._closed or self._fork != forks.count:
            self._closed = True
            return
        self._writer.stop()
        if self._rows and not self.read_only:
            self.checkpoint()
        with self._lock:
            self._closed = True
            self._end_lease()
            for connection in self._opened:
                connection.close()
            self._opened.clear()
            self._close_readers()
