"""Reads the entries of a shared store from the rows of their keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry, EntrySegment, ordered
from cachepipe.contract.intervals import IntervalSet, covered
from cachepipe.stores import tables
from cachepipe.stores.entries import in_order, read_sample
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import Rows
from cachepipe.stores.remote.rows import DrawRow


def listed_in(key: str, found: Rows) -> list[int]:
    """Return the listed indices of a key."""
    return [index for interval in _set(key, rows.LISTED, found) for index in range(*interval)]


def entry(key: str, found: Rows, samples: Iterable[tuple[int, bytes]]) -> Entry:
    """Return the entry of a question.

    Args:
        key: its key.
        found: all rows of the key but the samples.
        samples: the index and the row of each sample.

    Raises:
        DamagedCache: when a row is not what was written.
    """

    def content(name: bytes) -> bytes:
        return rows.unpack(key, name, found[name])

    why = {
        index: rows.load_why(key, name, content(name))[1]
        for index in rows.indices_in(found, rows.WHY)
        for name in [rows.numbered(rows.WHY, index)]
    }
    read = (read_sample(key, index, (tables.RAW, None, row), why) for index, row in samples)
    known = [sample for sample in read if sample is not None]
    names = {sample.index: sample.id for sample in known}
    draws: dict[Draw, list[EntrySegment]] = {}
    for name in found:
        if name.startswith(rows.DRAW):
            row = DrawRow.loads(key, name, content(name))
            draws[rows.draw_of(key, name)] = [
                EntrySegment(
                    segment.position,
                    tuple(map(names.get, segment.indices)),
                    segment.stamp,
                    row.generated[number],
                    segment.place,
                    number,
                )
                for number, segment in row.segments.items()
            ]
    taken = [_set(key, name, found) for name in found if name.startswith(rows.TAKEN)]
    used = covered(sorted(itertools.chain(_set(key, rows.LISTED, found), *taken)))
    users = sorted(rows.decoded(name[len(rows.USE) :]) for name in found if name.startswith(rows.USE))
    scope = rows.loads(key, rows.KNOWN, content(rows.KNOWN))[0]
    document = content(rows.QUESTION)
    return Entry(key, scope, document, ordered(known), in_order(draws), users, used)


def _set(key: str, name: bytes, found: Rows) -> IntervalSet:
    return rows.load_set(key, name, rows.unpack(key, name, found[name])) if name in found else IntervalSet()
