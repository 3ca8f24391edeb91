"""What the floors read and write with: one SQLite file, and one diskcache, with the same 1 KB rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

import diskcache

_TABLES = """
CREATE TABLE samples(id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB NOT NULL);
CREATE TABLE ledger(
    namespace TEXT NOT NULL, key TEXT NOT NULL, request_id TEXT NOT NULL, sample INTEGER NOT NULL,
    PRIMARY KEY(namespace, key, request_id)) WITHOUT ROWID;
"""
READ = "SELECT value FROM samples WHERE key = ?"
WRITE = "INSERT INTO ledger VALUES(?, ?, ?, 0)"


def connect(path: Path) -> sqlite3.Connection:
    """Open an SQLite file as a durable cache would: WAL, NORMAL, each statement its own transaction."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def make_sqlite(path: Path, rows: Mapping[str, bytes]) -> None:
    """Write a file with a row per key, found by a unique index."""
    connection = connect(path)
    connection.executescript(_TABLES)
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO samples(key, value) VALUES(?, ?)", rows.items())
    connection.execute("CREATE UNIQUE INDEX samples_key ON samples(key)")
    connection.execute("COMMIT")
    connection.close()


def open_diskcache(folder: Path) -> diskcache.Cache:
    """Open a diskcache that evicts nothing, as cachepipe's is."""
    return diskcache.Cache(str(folder), eviction_policy="none", cull_limit=0)


def make_diskcache(folder: Path, rows: Iterable[tuple[str, bytes]]) -> None:
    """Write a diskcache with a row per key."""
    with open_diskcache(folder) as cache, cache.transact():
        for key, value in rows:
            cache.set(key, value)
