"""Checks that the parts of a cache belong together (C12).

The ledger and the samples file carry one identity, and each notes how much the other held at the last
checkpoint. A part that is missing, emptied, foreign or older than that is refused at opening. Otherwise draws
would be replayed with samples that they never got, or bought again.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Any

from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores import tables
from cachepipe.stores.base import Sample

LEDGER = "ledger.cache.db"
SHELF = "cache.db"

_Notes = dict[str, Any]

_PUT_META = "INSERT INTO meta VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value"
_PUT_SHELF = "INSERT INTO cachepipe VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET value = excluded.value"


def check_parts(ledger: sqlite3.Connection, shelf: sqlite3.Connection, where: str) -> None:
    """Raise an error if a ledger and samples do not belong together.

    Args:
        ledger: a connection to the ledger, whose tables exist.
        shelf: a connection to the samples.
        where: the folder, for the message.

    Raises:
        DamagedCache: when a part is lost, foreign or older than the other part notes.
    """
    ours = _meta(ledger)
    theirs = _noted(shelf)
    for part, noted in ((LEDGER, ours), (SHELF, theirs or {})):
        if type(noted.get("stamp", 0)) is not int:
            raise _mismatch(where, part, "its checkpoint is damaged", "the rest")
    if theirs is None:
        if ours.get("identity") is None:
            return  # a new cache
        if shelf_is_new(shelf) and not ledger.execute("SELECT 1 FROM intervals LIMIT 1").fetchone():
            return  # the process that created it was killed in between
        raise _mismatch(where, SHELF, "its samples are lost", LEDGER)
    if ours.get("identity") is None:
        raise _mismatch(where, LEDGER, "the ledger that says who drew them is lost", SHELF)
    if ours["identity"] != theirs.get("identity"):
        raise _mismatch(where, f"{LEDGER} and {SHELF}", "they are of two different caches", "the same copy")
    _check_noted(ledger, shelf, ours, theirs, where)


def _check_noted(
    ledger: sqlite3.Connection, shelf: sqlite3.Connection, ours: _Notes, theirs: _Notes, where: str
) -> None:
    """Raise an error if a part lacks what the other part noted at the last checkpoint."""
    sample = ours.get("sample")
    if sample is not None and shelf.execute(tables.GET, (sample,)).fetchone() is None:
        raise _mismatch(where, SHELF, f"it lacks samples that the ledger has seen, such as {sample}", LEDGER)
    if theirs.get("stamp", 0) > ours.get("stamp", 0) and theirs["stamp"] > _greatest(ledger):
        raise _mismatch(where, LEDGER, "it lacks draws that were made before the last checkpoint", SHELF)


def sign(ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> None:
    """Give a new cache its identity; one that has its own keeps it."""
    identity = _meta(ledger).get("identity")
    if identity is None:
        identity = secrets.token_hex(16)
        ledger.execute("INSERT INTO meta VALUES('identity', ?)", (identity,))
    if _noted(shelf) is None:
        shelf.execute("BEGIN IMMEDIATE")
        if shelf.execute("SELECT 1 FROM sqlite_master WHERE name = 'cachepipe'").fetchone() is None:
            shelf.execute(tables.SHELF_SCHEMA)
        shelf.execute(_PUT_SHELF, ("identity", identity))
        shelf.execute("COMMIT")


def shelf_is_new(shelf: sqlite3.Connection) -> bool:
    """Return True if a samples file holds no sample of cachepipe."""
    found = shelf.execute("SELECT name FROM sqlite_master WHERE name = 'Cache'").fetchone()
    if found is None:
        return True
    query = "SELECT 1 FROM Cache WHERE raw = 1 AND key GLOB 'k[0-9]*-*/*' LIMIT 1"
    return shelf.execute(query).fetchone() is None


def is_signed(shelf: sqlite3.Connection) -> bool:
    """Return True if a samples file carries the identity of a cache."""
    return _noted(shelf) is not None


def checkpoint(ledger: sqlite3.Connection, shelf: sqlite3.Connection, stamp: int, sample: str | None) -> None:
    """Note how much both parts hold, once it is on the disk.

    Args:
        ledger: a connection to the ledger.
        shelf: a connection to the samples.
        stamp: the greatest stamp of a row of the ledger.
        sample: the name of the latest sample, if there is one; another process may have deleted it.
    """
    ledger.execute("BEGIN IMMEDIATE")
    try:
        if stamp > _meta(ledger).get("stamp", 0):
            ledger.execute(_PUT_META, ("stamp", stamp))
            shelf.execute(_PUT_SHELF, ("stamp", stamp))
        if sample is not None and shelf.execute(tables.GET, (sample,)).fetchone() is not None:
            ledger.execute(_PUT_META, ("sample", sample))
    finally:
        ledger.execute("COMMIT")


def checkpointed(ledger: sqlite3.Connection) -> int:
    """Return the greatest stamp of a row of the ledger at the last checkpoint."""
    return int(_meta(ledger).get("stamp", 0))


def greatest_stamp(ledger: sqlite3.Connection, shelf: sqlite3.Connection, *, unclean: bool) -> int:
    """Return the greatest stamp that a cache holds.

    Args:
        ledger: a connection to the ledger.
        shelf: a connection to the samples.
        unclean: whether a process has ended without a checkpoint; then all rows are read.
    """
    stamp = checkpointed(ledger)
    if unclean:
        stamp = max(stamp, _greatest(ledger))
    row = shelf.execute("SELECT key, mode, filename, value FROM Cache ORDER BY rowid DESC LIMIT 1").fetchone()
    if row is not None:
        key, _, index = str(row[0]).rpartition("/")
        try:
            sample = tables.parse_sample(key, int(index), *row[1:])
        except (ValueError, UnsafeRow, DamagedCache):
            return stamp  # somebody else's row
        if isinstance(sample, Sample):
            stamp = max(stamp, int(sample.meta["stamp"]))
    return stamp


def _meta(ledger: sqlite3.Connection) -> dict[str, Any]:
    return dict(ledger.execute("SELECT name, value FROM meta"))


def _noted(shelf: sqlite3.Connection) -> dict[str, Any] | None:
    """Return what a samples file notes about its cache, or None."""
    if shelf.execute("SELECT 1 FROM sqlite_master WHERE name = 'cachepipe'").fetchone() is None:
        return None
    noted = dict(shelf.execute("SELECT name, value FROM cachepipe"))
    return noted if "identity" in noted else None


def _greatest(ledger: sqlite3.Connection) -> int:
    return int(ledger.execute("SELECT coalesce(max(CAST(stamp AS INTEGER)), 0) FROM segments").fetchone()[0])


def _mismatch(where: str, what: str, why: str, beside: str) -> DamagedCache:
    return DamagedCache(
        f"the cache {where} cannot be used: {what} does not belong to the rest; {why}. Restore {what} from "
        f"where {beside} came from; to begin anew, name another folder"
    )
