"""Repairs a cache at opening if a process did not close it (C12)."""

from __future__ import annotations

import sqlite3

from cachepipe.stores import tables
from cachepipe.stores.sets import LargeSet
from cachepipe.stores.tables import LISTED


def unlist(ledger: sqlite3.Connection, shelf: sqlite3.Connection, since: int) -> int:
    """Remove listed samples that a machine lost when it stopped, so that they are generated again.

    Args:
        ledger: a connection to the ledger, in a transaction that writes.
        shelf: a connection to the samples.
        since: the greatest stamp of the ledger at the checkpoint.

    Returns:
        How many samples were lost.
    """
    lost = 0
    drawn = ledger.execute(
        "SELECT k.id, k.key, s.indices FROM segments s JOIN keys k ON k.id = s.key WHERE s.stamp > ?",
        (since,),
    ).fetchall()
    for key, name, written in drawn:
        listed = LargeSet(ledger, (LISTED, ""), (key, name))
        for index in tables.unpack(written):
            if index in listed and not _pending(ledger, key, index):
                found = shelf.execute(tables.GET, (f"{name}/{index}",)).fetchone()
                if found is None:
                    listed.remove(index)
                    lost += 1
    return lost


def relist(ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> int:
    """List the samples since the last checkpoint that are stored and not listed.

    The process that stored them was killed before it wrote the ledger, or the machine lost the ledger's last
    rows. Samples of questions that the ledger does not know are deleted, because nobody could find them.

    Args:
        ledger: a connection to the ledger, in a transaction that writes.
        shelf: a connection to the samples.

    Returns:
        How many samples were deleted.
    """
    strays: list[tuple[str]] = []
    for name, mode, filename, value in _latest(ledger, shelf):
        key_name, _, number = str(name).rpartition("/")
        if not number.isdecimal():
            continue
        known = ledger.execute("SELECT id FROM keys WHERE key = ?", (key_name,)).fetchone()
        if known is None:
            strays.append((name,))
            continue
        listed = LargeSet(ledger, (LISTED, ""), (known[0], key_name))
        row = (mode, filename, value)
        if int(number) not in listed and not tables.is_discarded(key_name, int(number), row):
            listed.add(int(number))  # also a damaged one: it is an error for those who need it
    if strays:
        shelf.execute("BEGIN IMMEDIATE")
        shelf.executemany("DELETE FROM Cache WHERE key = ? AND raw = 1", strays)
        shelf.execute("COMMIT")
    return len(strays)


def _pending(ledger: sqlite3.Connection, key: int, index: int) -> bool:
    query = "SELECT 1 FROM pending WHERE key = ? AND sample = ?"
    return ledger.execute(query, (key, index)).fetchone() is not None


def _latest(ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> sqlite3.Cursor:
    """Return the rows of the samples that were stored since the last checkpoint."""
    noted = ledger.execute("SELECT value FROM meta WHERE name = 'sample'").fetchone()
    return shelf.execute(
        "SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key GLOB 'k[0-9]*-*/*' AND rowid >"
        " ifnull((SELECT rowid FROM Cache WHERE key = ? AND raw = 1), 0)",
        noted or (None,),
    )
