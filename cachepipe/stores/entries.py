"""Reads the entries of a store whose ledger and samples are SQLite tables."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Collection, Iterator
from typing import Any, Final

import orjson

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment, ordered
from cachepipe.contract.intervals import IntervalSet
from cachepipe.stores import tables

_ORIGIN: Final = b',"origin":'

_KEYS: Final = "SELECT id, key, CAST(scope AS TEXT), CAST(document AS BLOB) FROM keys"
_DRAWN: Final = (
    " AND (EXISTS (SELECT 1 FROM segments s JOIN namespaces n ON n.id = s.namespace WHERE s.key = keys.id"
    " AND n.label IN (SELECT value FROM json_each(?2))) OR EXISTS (SELECT 1 FROM uses u JOIN namespaces n"
    " ON n.id = u.namespace WHERE u.key = keys.id AND n.label IN (SELECT value FROM json_each(?2))))"
)
_SEGMENTS: Final = (
    "SELECT n.label, s.request_id, s.occurrence, s.replicate, s.number, s.position, s.indices, s.generated,"
    " s.stamp, s.digest, s.place FROM segments s JOIN namespaces n ON n.id = s.namespace WHERE s.key = ?"
    " ORDER BY s.request_id, s.occurrence, s.replicate, s.namespace, s.number"
)
_SAMPLES: Final = "SELECT key, mode, filename, value FROM Cache WHERE raw = 1 AND key > ? AND key < ?"
_DISCARDS: Final = "SELECT sample, why FROM discards WHERE key = ?"
_USERS: Final = "SELECT n.label FROM uses u JOIN namespaces n ON n.id = u.namespace WHERE u.key = ?"
_LISTED: Final = "SELECT start, stop FROM intervals WHERE owner = ? AND key = ? ORDER BY stop"
_NONE: Final = "SELECT NOT EXISTS (SELECT 1 FROM discards) AND NOT EXISTS (SELECT 1 FROM uses)"


def entry(ledger: sqlite3.Connection, shelf: sqlite3.Connection, number: int) -> Entry:
    """Return the entry of the question with a number.

    Raises:
        DamagedCache: when a row is not what was written.
    """
    row = ledger.execute(f"{_KEYS} WHERE id = ?", (number,)).fetchone()
    return _entry(ledger, shelf, *row)


def entries(
    ledger: sqlite3.Connection, shelf: sqlite3.Connection, namespaces: Collection[str] | None, after: str
) -> Iterator[Entry]:
    """Iterate over the entries of all questions; see ``Store.entries``."""
    query, values = f"{_KEYS} WHERE key > ?1", [after]
    if namespaces is not None:
        query += _DRAWN
        values.append(orjson.dumps([*namespaces]).decode())
    plain: bool | None = None
    for row in ledger.execute(f"{query} ORDER BY key", values):
        if plain is None:  # as of the same moment as all rows
            plain = bool(ledger.execute(_NONE).fetchone()[0])
        yield _entry(ledger, shelf, *row, plain=plain)


def _entry(
    ledger: sqlite3.Connection,
    shelf: sqlite3.Connection,
    number: int,
    key: str,
    scope: str | None,
    document: bytes,
    *,
    plain: bool = False,
) -> Entry:
    """Return an entry; a ``plain`` ledger has no discards and no uses of shared draws."""
    why = {} if plain else dict(ledger.execute(_DISCARDS, (number,)).fetchall())
    users = () if plain else ledger.execute(_USERS, (number,)).fetchall()
    segments = ledger.execute(_SEGMENTS, (number,)).fetchall()
    listed = ledger.execute(_LISTED, (tables.LISTED, number)).fetchall()
    samples = []
    for name, *row in shelf.execute(_SAMPLES, (f"{key}/", f"{key}0")):
        index = name[len(key) + 1 :]
        if index.isdecimal():
            sample = read_sample(key, int(index), row, why)
            if sample is not None:
                samples.append(sample)
    names = {sample.index: sample.id for sample in samples}
    used = IntervalSet(listed)
    for index in names:
        used.add(index)
    draws = _draws(key, segments, names, used)
    return Entry(key, scope, document, ordered(samples), draws, sorted(name for (name,) in users), used)


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
    origin = index
    at = header.rfind(_ORIGIN)
    if at >= 0 and (digits := header[at + len(_ORIGIN) : -1]).isdigit():
        origin, header = int(digits), header[:at] + b"}"
    name = header[7 : header.find(b'"', 7)].decode()
    reason = why.get(index, "") if gone else None
    return EntrySample(name, origin, header, b"" if gone else payload, reason, index)


def _draws(
    key: str, rows: list[Any], names: dict[int, str], used: IntervalSet
) -> dict[Draw, list[EntrySegment]]:
    """Return the segments of draws, in the order of the draws; add their indices to those that are used."""
    found: dict[Draw, list[EntrySegment]] = {}
    for whose, group in itertools.groupby(rows, key=lambda row: row[:4]):
        namespace, request_id, occurrence, replicate = whose
        draw = Draw(namespace, key, request_id, occurrence, replicate)
        segments = []
        for *_, number, position, indices, generated, stamp, digest, place in group:
            tables.check_segment(draw, number, position, indices, stamp, digest, place)
            chosen = tables.unpack(indices)
            samples = tuple(map(names.get, chosen))
            for index in chosen:
                if index not in names:
                    used.add(index)
            segments.append(
                EntrySegment(position, samples, stamp, generated, tables.read_place(place), number)
            )
        found[draw] = segments
    return in_order(found)


def in_order(draws: dict[Draw, list[EntrySegment]]) -> dict[Draw, list[EntrySegment]]:
    """Return draws in the order of their identities."""
    return {draw: draws[draw] for draw in sorted(draws)}
