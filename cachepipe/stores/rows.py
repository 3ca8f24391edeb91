"""How the ledger and the samples are written: the tables, and the form of their rows."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from cachepipe.errors import FormatError, StoreError, UnsafeRow
from cachepipe.stores.base import Sample

FORMAT = 1
"""The version of the tables below; a ledger with a higher one is refused."""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES('format', {FORMAT});
CREATE TABLE IF NOT EXISTS namespaces(id INTEGER PRIMARY KEY, label TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS keys(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, scope TEXT, document BLOB NOT NULL, at REAL NOT NULL);
-- A draw's indices by position, in parts; a later part overrides an earlier one. What one claim added, alike
-- in lease, token and time, stands or is undone as one: mostly a single part, more beside replaced samples.
-- ``standing``: how many of them were delivered while the rest was missing, and so are never undone.
CREATE TABLE IF NOT EXISTS segments(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, namespace INTEGER NOT NULL,
    part INTEGER NOT NULL, position INTEGER NOT NULL, indices NOT NULL, lease INTEGER NOT NULL,
    token TEXT, generated INTEGER NOT NULL, at REAL NOT NULL, standing INTEGER NOT NULL,
    PRIMARY KEY(key, request_id, occurrence, namespace, part)) WITHOUT ROWID;
-- The earliest namespace of a draw that many namespaces have made: later ones are coupled to it.
CREATE TABLE IF NOT EXISTS firsts(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, namespace INTEGER NOT NULL,
    PRIMARY KEY(key, request_id, occurrence)) WITHOUT ROWID;
-- Sets of indices as maximal runs: owner 0 is what is listed, a namespace what it has taken.
CREATE TABLE IF NOT EXISTS spans(
    owner INTEGER NOT NULL, key INTEGER NOT NULL, stop INTEGER NOT NULL, start INTEGER NOT NULL,
    PRIMARY KEY(owner, key, stop)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending(
    key INTEGER NOT NULL, sample INTEGER NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, sample)) WITHOUT ROWID;
-- Who has joined a segment that somebody else wrote, while it was incomplete.
CREATE TABLE IF NOT EXISTS holders(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, namespace INTEGER NOT NULL,
    part INTEGER NOT NULL, token TEXT NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, request_id, occurrence, namespace, part, token)) WITHOUT ROWID;
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
RAW = 1
PUT = (
    "INSERT INTO Cache(key, raw, store_time, expire_time, access_time, access_count, tag, size, mode,"
    f" filename, value) VALUES(?, 1, ?, NULL, ?, 0, NULL, 0, {RAW}, NULL, ?)"
    " ON CONFLICT(key, raw) DO NOTHING"
)
GET = "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1"

DISCARDED = b"-"
"""Opens the row of a discarded sample; a live one opens with its header's brace."""

_HEADER = b'{"id":"'


class Discarded:
    """Stands for a sample that was discarded on record."""


GONE = Discarded()


_OF_DISKCACHE = re.compile(
    r"CREATE TABLE (Cache|Settings) ?\([\w ,]+\)"
    r"|CREATE (UNIQUE )?INDEX Cache_\w+ ON Cache ?\(\w+(, \w+)*\)"
    r"|CREATE TRIGGER Settings_\w+ AFTER (INSERT|UPDATE|DELETE) ON Cache FOR EACH ROW BEGIN"
    r" UPDATE Settings SET value = value( [+-] (1|NEW\.size|OLD\.size))+ WHERE key = \"(count|size)\"; END"
)


_OF_SQLITE = re.compile(r"CREATE TABLE sqlite_(stat[0-9]|sequence)\([\w,]+\)")
_MADE = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"


@functools.cache
def _ledger_schema() -> dict[str, str]:
    ledger = sqlite3.connect(":memory:")
    ledger.executescript(SCHEMA)
    found = dict(ledger.execute(_MADE))
    ledger.close()
    return found


def check_ledger(ledger: sqlite3.Connection, where: str) -> set[str]:
    """Return what a ledger consists of, which is empty for a new one.

    Raises:
        FormatError: when a newer version made it.
        StoreError: when it holds anything that this version does not make, such as triggers and views:
            these would run inside every statement.
    """
    found, known = ledger.execute(_MADE).fetchall(), _ledger_schema()
    strange = [name for name, sql in found if known.get(name) != sql and not _OF_SQLITE.fullmatch(sql)]
    if ("meta", known["meta"]) in found and "meta" not in strange:
        check_format(ledger, where, empty=True)
    _refuse(strange, where, "ledger")
    return {name for name, _ in found}


def check_shelf(shelf: sqlite3.Connection, where: str) -> set[str]:
    """Return what the file of samples consists of, which is empty for a new one.

    Raises:
        StoreError: when it holds anything that diskcache does not make; see `check_ledger`.
    """
    found = shelf.execute(_MADE).fetchall()
    known = (_OF_DISKCACHE, _OF_SQLITE)
    strange = [name for name, sql in found if not any(each.fullmatch(sql) for each in known)]
    _refuse(strange, where, "file of samples")
    return {name for name, _ in found}


def _refuse(strange: Sequence[str], where: str, what: str) -> None:
    if strange:
        shown = ", ".join(sorted(map(repr, strange)))
        raise StoreError(
            f"the cache {where} cannot be used: its {what} holds {shown:.200}, "
            "which cachepipe does not make and which may do anything. Restore the file, or use another folder"
        )


def check_format(ledger: sqlite3.Connection, where: str, *, empty: bool = False) -> None:
    """Refuse a ledger whose format this version does not know; it may say none yet if ``empty``."""
    row = ledger.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None and empty:
        return
    if row is None or not isinstance(row[0], int) or row[0] > FORMAT:
        raise FormatError(
            f"the cache {where} has format {None if row is None else row[0]!r}; this version of cachepipe "
            f"reads formats up to {FORMAT}. Install a newer cachepipe, or use another folder"
        )


def locked(error: sqlite3.OperationalError) -> bool:
    """Tell whether SQLite refused because another connection writes."""
    return (error.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def pack(indices: Sequence[int]) -> int | str:
    """Return how the ledger writes indices: one as a number, several as text."""
    return indices[0] if len(indices) == 1 else ",".join(map(str, indices))


def unpack(written: int | str) -> list[int]:
    """Return the indices that the ledger wrote."""
    if type(written) is int:
        return [written]
    return [int(part) for part in str(written).split(",")] if written else []


def read_sample(shelf: sqlite3.Connection, key: str, index: int) -> Sample | Discarded | None:
    """Return the sample at an index of a key's list, a mark when it was discarded, None without one.

    Raises:
        UnsafeRow: when the row is not one that cachepipe wrote, such as a pickle.
    """
    row = shelf.execute(GET, (f"{key}/{index}",)).fetchone()
    return None if row is None else parse_sample(key, index, *row)


def parse_sample(key: str, index: int, mode: Any, filename: Any, value: Any) -> Sample | Discarded:
    """Return the sample that a row of diskcache's table holds, or the mark of a discarded one."""
    if mode != RAW or filename is not None or type(value) is not bytes:
        raise UnsafeRow(
            f"sample {index} of key {key} is stored in diskcache's mode {mode}, which may be a pickle; "
            "cachepipe stores raw bytes only and never unpickles. Delete the row, or restore the cache"
        )
    if value.startswith(_HEADER):
        end = value.find(b"\n")
        identifier = value[7 : value.find(b'"', 7)]
        if end > 0 and identifier.isascii():
            return Sample(index, identifier.decode(), value[end + 1 :], value[:end])
    if value.startswith(DISCARDED):
        return GONE
    raise UnsafeRow(f"sample {index} of key {key} is not in cachepipe's form; restore the cache")
