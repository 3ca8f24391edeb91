"""Sets of indices as maximal intervals ``[start, stop)``.

The usual set is one interval, and the lowest free index costs one look however many are in the set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

Interval = tuple[int, int]


class IndexSet(Protocol):
    """A set of indices, wherever it is kept."""

    def interval_at(self, at: int) -> Interval | None:
        """Return the first interval ``[start, stop)`` whose stop is above ``at``."""
        ...

    def __contains__(self, index: int, /) -> bool: ...


class MutableIndexSet(IndexSet, Protocol):
    """A set of indices that can be changed."""

    def add(self, index: int) -> None:
        """Put an index into the set; one that is in it already changes nothing."""
        ...

    def remove(self, index: int) -> None:
        """Take an index out of the set; one that is not in it changes nothing."""
        ...


class IntervalSet:
    """A set of indices in memory. Iterating over it gives its intervals, which make an equal set."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self.replace(intervals)

    def replace(self, intervals: Iterable[Interval]) -> None:
        """Hold these intervals instead."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in intervals:
            self._starts.append(start)
            self._stops.append(stop)

    def __iter__(self) -> Iterator[Interval]:
        return zip(self._starts, self._stops, strict=True)

    def intervals(self) -> list[Interval]:
        """Return the intervals, in order."""
        return [*zip(self._starts, self._stops, strict=True)]

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, index: int, /) -> bool:
        stops = self._stops
        place = bisect_right(stops, index)
        return place < len(stops) and self._starts[place] <= index

    def interval_at(self, at: int) -> Interval | None:
        """Return the first interval ``[start, stop)`` whose stop is above ``at``."""
        stops = self._stops
        place = bisect_right(stops, at)
        return (self._starts[place], stops[place]) if place < len(stops) else None

    def add(self, index: int) -> None:
        """Put an index into the set; one that is in it already changes nothing."""
        starts, stops = self._starts, self._stops
        place = bisect_right(stops, index)
        if place < len(starts) and starts[place] <= index:
            return
        after = place < len(starts) and starts[place] == index + 1
        before = place > 0 and stops[place - 1] == index
        if before and after:
            stops[place - 1] = stops[place]
            del starts[place], stops[place]
        elif before:
            stops[place - 1] = index + 1
        elif after:
            starts[place] = index
        else:
            starts.insert(place, index)
            stops.insert(place, index + 1)

    def remove(self, index: int) -> None:
        """Take an index out of the set; one that is not in it changes nothing."""
        starts, stops = self._starts, self._stops
        place = bisect_right(stops, index)
        if place < len(starts) and starts[place] <= index:
            left = split((starts[place], stops[place]), index)
            starts[place : place + 1] = [interval[0] for interval in left]
            stops[place : place + 1] = [interval[1] for interval in left]


class Union:
    """The indices that are in either of two sets; changes go to the first one."""

    __slots__ = ("_one", "_other", "add", "remove")

    def __init__(self, one: MutableIndexSet, other: IndexSet) -> None:
        self._one = one
        self._other = other
        self.add = one.add
        self.remove = one.remove

    def __contains__(self, index: int, /) -> bool:
        return index in self._one or index in self._other

    def interval_at(self, at: int) -> Interval | None:
        """Return the first interval of either set whose stop is above ``at``."""
        one, other = self._one.interval_at(at), self._other.interval_at(at)
        if one is None or other is None:
            return one or other
        return min(one, other)


def intervals_of(indices: IndexSet) -> Iterator[Interval]:
    """Iterate over the intervals of a set, in order."""
    found = indices.interval_at(0)
    while found is not None:
        yield found
        found = indices.interval_at(found[1])


def covered(intervals: Iterable[Interval]) -> IntervalSet:
    """Return the indices that are in any of some intervals, which come in the order of their starts."""
    found: list[Interval] = []
    for start, stop in intervals:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return IntervalSet(found)


def spans(indices: Iterable[int]) -> list[Interval]:
    """Return the intervals of some indices."""
    found: list[Interval] = []
    for index in sorted(indices):
        if found and index <= found[-1][1]:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def merged(intervals: Sequence[Interval], index: int) -> tuple[list[Interval], Interval]:
    """Return which intervals an added index replaces, and the interval that replaces them.

    Args:
        intervals: intervals of the set, with those that touch the index; others do not matter.
        index: the index to add, in no interval yet.
    """
    start, stop, gone = index, index + 1, []
    for interval in intervals:
        if interval[1] == index or interval[0] == index + 1:
            gone.append(interval)
            start, stop = min(start, interval[0]), max(stop, interval[1])
    return gone, (start, stop)


def split(interval: Interval, index: int) -> list[Interval]:
    """Return the intervals that are left of one when an index is taken out of it."""
    return [part for part in ((interval[0], index), (index + 1, interval[1])) if part[0] < part[1]]


def changes(old: Iterable[Interval], new: Iterable[Interval]) -> tuple[list[Interval], list[Interval]]:
    """Return the intervals that are only in the old ones, and those that are only in the new ones."""
    before, after = dict.fromkeys(old), dict.fromkeys(new)
    return (
        [interval for interval in before if interval not in after],
        [interval for interval in after if interval not in before],
    )
