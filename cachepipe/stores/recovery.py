"""Repairs a cache at opening if a process did not close it (C12)."""

from __future__ import annotations

import sqlite3

from cachepipe.stores import tables
from cachepipe.stores.sets import LargeSet
from cachepipe.stores.tables import LISTED


def relist(ledger: sqlite3.Connection, shelf: sqlite3.Connection, since: int) -> int:
    """Make the list of samples agree with the samples, for rows written since a checkpoint.

    When a machine stops, either file may lose its last rows. A listed sample that is lost is removed from the
    list, so that it is generated again; a stored sample that is not listed is listed again.

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
    for name, mode, filename, value in _latest(ledger, shelf):
        key_name, _, number = str(name).rpartition("/")
        known = ledger.execute("SELECT id FROM keys WHERE key = ?", (key_name,)).fetchone()
        if known is None or not number.isdecimal():
            continue
        listed = LargeSet(ledger, (LISTED, ""), (known[0], key_name))
        row = (mode, filename, value)
        if int(number) not in listed and not tables.is_discarded(key_name, int(number), row):
            listed.add(int(number))  # also a damaged one: it is an error for those who need it
    return lost


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
