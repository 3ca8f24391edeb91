"""What a received cache may contain: the tables that cachepipe and diskcache create, nothing else (C12).

A cache may come from anyone. Triggers and views in its files would run inside every statement.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Sequence

from cachepipe.errors import FormatError, StoreError
from cachepipe.stores.tables import FORMAT, SCHEMA, SHELF_SCHEMA

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
    """Return the schema of a ledger, which is empty for a new one.

    Raises:
        FormatError: when a newer version made it.
        StoreError: when it holds anything that this version does not create, such as triggers and views.
    """
    found, known = ledger.execute(_MADE).fetchall(), _ledger_schema()
    strange = [name for name, sql in found if known.get(name) != sql and not _OF_SQLITE.fullmatch(sql)]
    if ("meta", known["meta"]) in found and "meta" not in strange:
        check_format(ledger, where, empty=True)
    _refuse(strange, where, "ledger")
    return {name for name, _ in found}


def check_shelf(shelf: sqlite3.Connection, where: str) -> set[str]:
    """Return the schema of the samples file, which is empty for a new one.

    Raises:
        StoreError: when it holds anything that diskcache does not create; see `check_ledger`.
    """
    found = shelf.execute(_MADE).fetchall()
    known = (_OF_DISKCACHE, _OF_SQLITE)
    strange = [
        name for name, sql in found if sql != SHELF_SCHEMA and not any(each.fullmatch(sql) for each in known)
    ]
    _refuse(strange, where, "file of samples")
    return {name for name, _ in found}


def _refuse(strange: Sequence[str], where: str, what: str) -> None:
    if strange:
        shown = ", ".join(sorted(map(repr, strange)))
        raise StoreError(
            f"the cache {where} cannot be used: its {what} holds {shown:.200}, which cachepipe does not "
            "create and which may do anything. Restore the file, or use another folder"
        )


def check_format(ledger: sqlite3.Connection, where: str, *, empty: bool = False) -> None:
    """Refuse a ledger in a format that this version cannot read; an ``empty`` one may have no format."""
    row = ledger.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None and empty:
        return
    if row is None or row[0] != FORMAT:
        raise FormatError(
            f"the cache {where} has format {None if row is None else row[0]!r}; this version of cachepipe "
            f"reads format {FORMAT}. Use the version that wrote it, or another folder"
        )
