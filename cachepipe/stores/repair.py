"""What ``cachepipe verify --repair`` does: only what loses nothing, or is on record (C12).

A sample that is damaged or missing is discarded on record, so that it is generated anew; its bytes stay in
the file. Indexes are rebuilt from their tables. A damaged row of the ledger stays, because no other row says
what it held.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cachepipe.contract.draws import SHARED
from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores import identity, mounts, tables
from cachepipe.stores.base import Commit, Discard, Operation, Store
from cachepipe.stores.disk import DiskStore, connect
from cachepipe.stores.sets import LargeSet
from cachepipe.stores.tables import LISTED
from cachepipe.stores.verify import LOST_LEASES, WRONG_FIRSTS, IntegrityReport, Progress, unseen, verify

_MOST: Final = 100_000
"""The most missing samples that are discarded: a ledger that lists more is hardly a real one."""

_PENDING: Final = (
    "SELECT k.key, p.sample, p.lease NOT IN (SELECT id FROM leases WHERE ended IS NULL)"
    " FROM pending p JOIN keys k ON k.id = p.key"
)

NOTHING_SAYS_WHY: Final = "it was discarded, and nothing says why"
"""The reason of a discard whose record is missing or damaged."""

_AT_ONCE: Final = 500  # discards in one transaction


def can_repair(report: IntegrityReport) -> bool:
    """Return True if the cache may be written: not if it is damaged in ways that writing may make worse."""
    kinds = report.problems.keys()
    return "file" not in kinds and ("parts" not in kinds or "index" in kinds)


def repair(folder: Path, progress: Progress = unseen) -> IntegrityReport:
    """Repair what can be repaired in the cache of a folder; return what a check finds then.

    Raises:
        StoreError: when the cache cannot be opened or written.
    """
    mounts.check_local("the cache", folder, "Copy it to a local disk, and repair the copy")
    report = verify(folder)
    if not can_repair(report):
        return report
    if "index" in report.problems:
        _rebuild_indexes(folder)
        report = verify(folder)
        if {"file", "parts", "index"} & report.problems.keys():
            return report
    with contextlib.closing(DiskStore(folder, read_only=False)) as store:
        report = verify(folder)  # opening it has done some of the work if a process did not close it
        _edit_ledger(folder, report)
        asyncio.run(discard(store, report))
    return verify(folder, progress)


# Indexes.


def _rebuild_indexes(folder: Path) -> None:
    """Rebuild the indexes of both files; a name that a table has lost is taken from its index."""
    for name in (identity.LEDGER, identity.SHELF):
        with contextlib.closing(connect(folder / name)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                if name == identity.SHELF:
                    _restore_names(connection)
                connection.execute("REINDEX")
                connection.execute("COMMIT")
            except sqlite3.DatabaseError:  # it stays as it is, and the report says so
                connection.execute("ROLLBACK")


def _restore_names(shelf: sqlite3.Connection) -> None:
    """Give rows the names that the index has for them, if their digests fit these names."""
    names = list(_lost_names(shelf))
    if not names:
        return
    indexes = shelf.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'Cache'"
    ).fetchall()
    for index, _ in indexes:  # SQLite would look for the old names in them
        shelf.execute(f'DROP INDEX "{index}"')
    shelf.executemany("UPDATE Cache SET key = ?, raw = 1 WHERE rowid = ?", names)
    for _, sql in indexes:
        shelf.execute(sql)


def _lost_names(shelf: sqlite3.Connection) -> Iterator[tuple[str, int]]:
    rows = shelf.execute("SELECT rowid, key FROM Cache INDEXED BY Cache_key_raw WHERE raw = 1")
    for rowid, name in rows:
        row = shelf.execute(
            "SELECT key, raw, mode, filename, value FROM Cache NOT INDEXED WHERE rowid = ?", (rowid,)
        ).fetchone()
        if row is not None and row[:2] != (name, 1):
            key, _, index = str(name).rpartition("/")
            with contextlib.suppress(DamagedCache, UnsafeRow, ValueError):
                tables.parse_sample(key, int(index), *row[2:])
                yield name, rowid


# Samples.


async def discard(store: Store, report: IntegrityReport) -> None:
    """Discard what is damaged or missing, and complete discards that one of the files lacks."""
    discards = list(_discards(store, report))
    for start in range(0, len(discards), _AT_ONCE):
        await store.apply(discards[start : start + _AT_ONCE])


def _discards(store: Store, report: IntegrityReport) -> Iterator[Operation]:
    for key, index in report.damaged:
        if store.question(key) is not None:
            yield Discard(key, index, "cachepipe verify found it damaged")
    left = _MOST
    for key, start, stop in report.absent:
        if stop - start <= left:
            left -= stop - start
            for index in range(start, stop):
                yield Discard(key, index, "cachepipe verify found it missing")
    for key, index in report.discards:
        yield Discard(key, index, NOTHING_SAYS_WHY)


async def list_again(store: Store, report: IntegrityReport) -> None:
    """List stored samples again; a cache in a folder does so in its ledger."""
    for key, index in report.unlisted:
        sample = store.sample(key, index)
        if sample is not None:
            await store.apply([Commit(key, index, sample.payload, {}, sample.id)])


# The ledger.


def _edit_ledger(folder: Path, report: IntegrityReport) -> None:
    """List stored samples again, free what nobody generates, and drop wrong notes."""
    with contextlib.closing(connect(folder / identity.LEDGER)) as ledger:
        ledger.execute("BEGIN IMMEDIATE")
        for name, index in report.unlisted:
            listed = _list_of(ledger, name)
            if listed is not None:
                listed.add(index)
        with contextlib.closing(connect(folder / identity.SHELF)) as shelf:
            for name, index, lost in ledger.execute(_PENDING).fetchall():
                listed = _list_of(ledger, name)
                if listed is not None:
                    stored = shelf.execute(tables.GET, (f"{name}/{index}",)).fetchone() is not None
                    (listed.remove if lost and not stored else listed.add)(index)
        ledger.execute(f"DELETE FROM {LOST_LEASES}")
        ledger.execute(f"DELETE FROM {WRONG_FIRSTS}", (SHARED,))
        ledger.execute("COMMIT")


def _list_of(ledger: sqlite3.Connection, name: str) -> LargeSet | None:
    row = ledger.execute("SELECT id FROM keys WHERE key = ?", (name,)).fetchone()
    return None if row is None else LargeSet(ledger, (LISTED, ""), (row[0], name))
