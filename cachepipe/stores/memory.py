"""A store in memory that is gone with its last reference: for tests, and for deduplication only."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.stores.base import (
    Bought,
    DrawInfo,
    Grant,
    KeyInfo,
    NamespaceInfo,
    Note,
    Process,
    Sample,
    State,
    StoredQuestion,
)
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

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw that the ledger holds whole, else None."""
        with self._lock:
            return super().recall(draw, n)

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of it is stored, else None."""
        with self._lock:
            return super().replay(draw, n, taken)

    def status(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Return for each (key, index) whether its sample is stored, generated elsewhere or here, or free."""
        with self._lock:
            return super().status(wanted)

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample, or None."""
        with self._lock:
            return super().generator(key, index)

    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key; None if it does not exist or was discarded."""
        with self._lock:
            return super().sample(key, index)

    def question(self, key: str) -> StoredQuestion | None:
        """Return the question of a key."""
        with self._lock:
            return super().question(key)

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar."""
        with self._lock:
            return super().similar(question)

    def keys(self, prefix: str = "", **wanted: Any) -> Iterator[KeyInfo]:
        """Iterate over the keys that start with a prefix, as they are now."""
        with self._lock:
            return iter(list(super().keys(prefix, **wanted)))

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index, as they are now; discarded ones are left out."""
        with self._lock:
            return iter(list(super().samples(key)))

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, as they are now; ``namespace`` is a label."""
        with self._lock:
            return iter(list(super().draws(key, namespace)))

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, as they are now; the shared draws are left out."""
        with self._lock:
            return iter(list(super().namespaces()))

    def sums(self) -> Iterator[Note]:
        """Iterate over the sums of the runs, as they are now, and over what they have left unreported."""
        with self._lock:
            return iter(list(super().sums()))

    def bought(self) -> Iterator[Bought]:
        """Iterate over all samples, as they are now, the discarded ones too."""
        with self._lock:
            return iter(list(super().bought()))

    def totals(self) -> dict[str, int]:
        """Return how many keys, samples, pending samples, draws, namespaces and discards there are."""
        with self._lock:
            return super().totals()
