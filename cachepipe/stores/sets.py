"""Sets of indices as rows of the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from cachepipe.contract.intervals import Interval, IntervalSet, merged, split
from cachepipe.stores import tables


class SmallSet(IntervalSet):
    """A set of indices in memory, with its rows in the ledger.

    Args:
        place: the numbers of its owner and its key.
        label: the label of its owner.
        key: its key.
        rows: its rows.
        changed: where it puts itself when it changes, by its place.

    Attributes:
        written: the intervals in the ledger.
    """

    __slots__ = ("_changed", "_place", "key", "label", "written")

    def __init__(
        self,
        place: tuple[int, int],
        label: str,
        key: str,
        rows: Sequence[tuple[int, int, bytes]],
        changed: dict[tuple[int, int], SmallSet],
    ) -> None:
        self._place = place
        self.label = label
        self.key = key
        self._changed = changed
        self._starts, self._stops = [], []
        for start, stop, digest in rows:
            tables.check_interval(label, key, start, stop, digest)
            self._starts.append(start)
            self._stops.append(stop)
        self.written: list[Interval] = self.intervals() if rows else []

    def add(self, index: int) -> None:
        """Put an index into the set."""
        IntervalSet.add(self, index)
        self._changed[self._place] = self

    def remove(self, index: int) -> None:
        """Take an index out of the set."""
        IntervalSet.remove(self, index)
        self._changed[self._place] = self


class LargeSet:
    """A set of indices in the ledger: each access is a statement. For readers and for sets of many intervals.

    Args:
        ledger: a connection to the ledger.
        owner: the number and the label of its owner; the label of `LISTED` is empty.
        key: the number of the key, and the key.
    """

    __slots__ = ("_key", "_label", "_ledger", "_where")

    def __init__(self, ledger: sqlite3.Connection, owner: tuple[int, str], key: tuple[int, str]) -> None:
        self._ledger = ledger
        self._where = (owner[0], key[0])
        self._label, self._key = owner[1], key[1]

    def __contains__(self, index: int, /) -> bool:
        interval = self.interval_at(index)
        return interval is not None and interval[0] <= index

    def interval_at(self, at: int) -> Interval | None:
        """Return the first interval whose stop is above ``at``."""
        row = self._ledger.execute(tables.INTERVAL_AT, (*self._where, at)).fetchone()
        return None if row is None else self._checked(row)

    def add(self, index: int) -> None:
        """Put an index into the set."""
        rows = self._ledger.execute(tables.INTERVALS_NEAR, (*self._where, index)).fetchall()
        near = [self._checked(row) for row in rows]
        if any(start <= index < stop for start, stop in near):
            return
        gone, interval = merged(near, index)
        self._rewrite(gone, [interval])

    def remove(self, index: int) -> None:
        """Take an index out of the set."""
        interval = self.interval_at(index)
        if interval is not None and interval[0] <= index:
            self._rewrite([interval], split(interval, index))

    def _checked(self, row: tuple[int, int, bytes]) -> Interval:
        tables.check_interval(self._label, self._key, *row)
        return row[0], row[1]

    def _rewrite(self, old: list[Interval], new: list[Interval]) -> None:
        self._ledger.executemany(tables.DROP_INTERVAL, [(*self._where, stop) for _, stop in old])
        self._ledger.executemany(
            tables.PUT_INTERVAL,
            [
                (*self._where, stop, start, tables.interval_digest(self._label, self._key, start, stop))
                for start, stop in new
            ],
        )
