"""Reads the entries of a store whose ledger and samples are SQLite tables."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import orjson

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment, ordered
from cachepipe.contract.intervals import IntervalSet
from cachepipe.stores import tables
from cachepipe.stores.base import without_origin

_KEYS: Final = "SELECT id, key, CAST(scope AS TEXT), CAST(document AS BLOB) FROM keys"
_AMONG: Final = " WHERE key IN (SELECT value FROM json_each(?)) ORDER BY key"
_DRAWN: Final = (
    " AND (EXISTS (SELECT 1 FROM segments s JOIN namespaces n ON n.id = s.namespace WHERE s.key = keys.id"
    " AND n.label IN (SELECT value FROM json_each(?2))) OR EXISTS (SELECT 1 FROM uses u JOIN namespaces n"
    " ON n.id = u.namespace WHERE u.key = keys.id AND n.label IN (SELECT value FROM json_each(?2))))"
)
_IN_ORDER: Final = "FROM json_each(?) j CROSS JOIN"
"""Rows of the questions in a list, of numbers or keys, with the place of each question in it."""
_SEGMENTS: Final = (
    "SELECT j.key, n.label, s.request_id, s.occurrence, s.replicate, s.number, s.position, s.indices,"
    f" s.generated, s.stamp, s.digest, s.place {_IN_ORDER} segments s JOIN namespaces n ON n.id = s.namespace"
    " WHERE s.key = j.value"
    " ORDER BY j.key, s.request_id, s.occurrence, s.replicate, s.namespace, s.number"
)
_SAMPLES: Final = (
    f"SELECT j.key, c.key, c.mode, c.filename, c.value {_IN_ORDER} Cache c INDEXED BY Cache_key_raw"
    " ON c.raw = 1 AND c.key > j.value || '/' AND c.key < j.value || '0' ORDER BY j.key"
)
_DISCARDS: Final = (
    f"SELECT j.key, d.sample, d.why {_IN_ORDER} discards d WHERE d.key = j.value ORDER BY j.key"
)
_USERS: Final = (
    f"SELECT j.key, n.label {_IN_ORDER} uses u JOIN namespaces n ON n.id = u.namespace"
    " WHERE u.key = j.value ORDER BY j.key"
)
_LISTED: Final = (
    f"SELECT j.key, i.start, i.stop {_IN_ORDER} intervals i WHERE i.owner = {tables.LISTED}"
    " AND i.key = j.value ORDER BY j.key, i.stop"
)
_TOGETHER: Final = 128  # questions whose rows one statement reads


@contextlib.contextmanager
def unmapped(*connections: sqlite3.Connection) -> Iterator[None]:
    """Read without mapping files into memory, as all of a large file would be resident in each thread."""
    query = "PRAGMA main.mmap_size"
    sizes = [connection.execute(query).fetchone() for connection in connections]
    for connection in connections:
        connection.execute(f"{query} = 0")
    try:
        yield
    finally:
        with contextlib.suppress(sqlite3.ProgrammingError):  # the store was closed meanwhile
            for connection, size in zip(connections, sizes, strict=True):
                if size is not None:  # a database in memory has no size
                    connection.execute(f"{query} = {size[0]}")


def of_keys(ledger: sqlite3.Connection, shelf: sqlite3.Connection, keys: Sequence[str]) -> Iterator[Entry]:
    """Iterate over the entries of the keys that are known, in their order.

    Raises:
        DamagedCache: when a row is not what was written.
    """
    wanted = sorted({*keys})
    for at in range(0, len(wanted), _TOGETHER):
        names = orjson.dumps(wanted[at : at + _TOGETHER]).decode()
        yield from _entries(ledger, shelf, ledger.execute(f"{_KEYS}{_AMONG}", (names,)).fetchall(), sets=True)


def entries(
    ledger: sqlite3.Connection, shelf: sqlite3.Connection, namespaces: Collection[str] | None, after: str
) -> Iterator[Entry]:
    """Iterate over the entries of all questions, to be copied; see ``Store.entries``.

    What is in memory does not grow with their number.
    """
    query, values = f"{_KEYS} WHERE key > ?1", []
    if namespaces is not None:
        query += _DRAWN
        values.append(orjson.dumps([*namespaces]).decode())
    query += f" ORDER BY key LIMIT {_TOGETHER}"
    # Each page is a statement of its own: one that stays open would keep the logs of the files growing.
    while page := ledger.execute(query, (after, *values)).fetchall():
        yield from _entries(ledger, shelf, page, sets=False)
        after = page[-1][1]


def _entries(
    ledger: sqlite3.Connection, shelf: sqlite3.Connection, page: Sequence[Any], *, sets: bool
) -> Iterator[Entry]:
    """Iterate over the entries of the questions on a page, with the indices that are used if ``sets``."""
    numbers = orjson.dumps([number for number, _, _, _ in page]).decode()
    # Read the ledger first, because a commit writes the sample before the ledger.
    segments, discards, users = (
        _Rows(ledger.execute(query, (numbers,))) for query in (_SEGMENTS, _DISCARDS, _USERS)
    )
    listed = _Rows(ledger.execute(_LISTED, (numbers,)) if sets else iter(()))
    samples = _Rows(shelf.execute(_SAMPLES, (orjson.dumps([key for _, key, _, _ in page]).decode(),)))
    for place, (_, key, scope, document) in enumerate(page):
        why = {index: reason for _, index, reason in discards.of(place)}
        found = []
        for _, name, *row in samples.of(place):
            index = name[len(key) + 1 :]
            if index.isdecimal():
                sample = read_sample(key, int(index), row, why)
                if sample is not None:
                    found.append(sample)
        names = {sample.index: sample.id for sample in found}
        rows = segments.of(place)
        used = None
        if sets:
            used = IntervalSet((start, stop) for _, start, stop in listed.of(place))
            for index in itertools.chain(names, (index for row in rows for index in tables.unpack(row[7]))):
                used.add(index)
        labels = sorted(label for _, label in users.of(place))
        yield Entry(key, scope, document, ordered(found), _draws(key, rows, names), labels, used)


class _Rows:
    """Rows that begin with the place of their question, in the order of the places."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def of(self, place: int) -> list[Any]:
        """Return the rows of a question; they are asked for in the order of the places."""
        found = []
        row = self._next
        while row is not None and row[0] == place:
            found.append(row)
            row = next(self._rows, None)
        self._next = row
        return found


def read_sample(key: str, index: int, row: Any, why: dict[int, str]) -> EntrySample | None:
    """Return the sample in a row for other caches; None for a discarded one that cannot be read any more.

    Args:
        key: the key of its question.
        index: its index.
        row: the mode, the file name and the value of its row.
        why: why samples were discarded, by index.

    Raises:
        DamagedCache: when the row is not what was written there.
        UnsafeRow: when cachepipe did not write it.
    """
    header, payload, gone = tables.parts_of(key, index, *row)
    if gone and not header:
        return None
    header, noted = without_origin(header)
    origin = index if noted is None else noted
    name = header[7 : header.find(b'"', 7)].decode()
    reason = why.get(index, "") if gone else None
    return EntrySample(name, origin, header, b"" if gone else payload, reason, index)


def _draws(key: str, rows: list[Any], names: dict[int, str]) -> dict[Draw, list[EntrySegment]]:
    """Return the segments of draws, in the order of the draws."""
    found: dict[Draw, list[EntrySegment]] = {}
    for _, namespace, request_id, occurrence, replicate, *row in rows:
        number, position, indices, generated, stamp, digest, place = row
        draw = Draw(namespace, key, request_id, occurrence, replicate)
        tables.check_segment(draw, number, position, indices, stamp, digest, place)
        samples = tuple(map(names.get, tables.unpack(indices)))
        segment = EntrySegment(position, samples, stamp, generated, tables.read_place(place), number)
        found.setdefault(draw, []).append(segment)
    return in_order(found)


def in_order(draws: dict[Draw, list[EntrySegment]]) -> dict[Draw, list[EntrySegment]]:
    """Return draws in the order of their identities."""
    return {draw: draws[draw] for draw in sorted(draws)} if len(draws) > 1 else draws
