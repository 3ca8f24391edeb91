"""A store in memory that is gone with its last reference: for tests, and for deduplication only."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator

from cachepipe.contract.draws import Draw
from cachepipe.stores.base import Grant
from cachepipe.stores.sql import SqlStore
from cachepipe.stores.tables import SCHEMA

_SHELF = """
CREATE TABLE Cache(
    rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL, expire_time REAL, access_time REAL,
    access_count INTEGER, tag BLOB, size INTEGER, mode INTEGER, filename TEXT, value BLOB);
CREATE UNIQUE INDEX Cache_key_raw ON Cache(key, raw);
"""


class MemoryStore(SqlStore):
    """The ledger and the samples in memory, under the same rules as on disk."""

    def __init__(self) -> None:
        self.identity = f"memory:{secrets.token_hex(8)}"
        self._keep = self._open(write=True)  # the tables live as long as a connection to them
        self._keep[0].executescript(SCHEMA)
        self._keep[1].executescript(_SHELF)
        super().__init__()

    def __repr__(self) -> str:
        return f"<MemoryStore {self.totals()['samples']} samples>"

    def _open(self, *, write: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        ledger, shelf = (
            sqlite3.connect(
                self._uri(name), uri=True, timeout=0, isolation_level=None, check_same_thread=False
            )
            for name in ("ledger", "shelf")
        )
        if not write:
            shelf.execute(f"ATTACH '{self._uri('ledger')}' AS ledger")
        return ledger, shelf

    def _uri(self, name: str) -> str:
        return f"file:{self.identity}-{name}?mode=memory&cache=shared"

    def checkpoint(self) -> None:
        """Do nothing: there is no log."""
        self._rows = 0

    def _lease_name(self) -> str:
        return self.identity

    def _own_lease_name(self) -> str | None:
        return self.identity

    def _lease_alive(self, name: str) -> bool:
        return name == self.identity

    # SQLite's shared memory has no snapshots, so a reader must not look into a transaction.

    _has_snapshots = False

    @contextlib.contextmanager
    def _reading_rows(self) -> Iterator[None]:
        with self._lock, super()._reading_rows():
            yield

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw if all of them are stored, else None."""
        with self._lock:
            return super().recall(draw, n)
