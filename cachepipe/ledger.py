"""Which indices a draw gets: the rules of the sampling contract, without any I/O.

A store keeps, per key, the set of indices that are *listed* (a sample is stored or being generated)
and, per namespace and key, the set of indices that are *taken*. Both are kept as maximal runs
``[start, stop)``, so that the usual set is one run, and the lowest free index costs one look-up
however many are taken.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

LISTED = 0
"""The owner of the set of listed indices; namespaces have positive numbers."""


class Draw(NamedTuple):
    """The identity of one request's claim on samples.

    Attributes:
        namespace: the namespace's label (see ``label``).
        key: the key of the question.
        request_id: the request's id; a missing one is the empty string.
        occurrence: how many requests with the same first three came before it in this run.
    """

    namespace: str
    key: str
    request_id: str
    occurrence: int


SHARED = "*"
"""The label of the one draw per key that ``repeat="same"`` shares, outside all namespaces."""


def label(namespace: str | None) -> str:
    """Return how the ledger writes a namespace: None and the empty string are two of them."""
    return "-" if namespace is None else "=" + namespace


def namespace_of(written: str) -> str | None:
    """Return the namespace that a label stands for."""
    return written[1:] if written.startswith("=") else None


class Book(Protocol):
    """The sets of one key as a store shows them inside a transaction."""

    def run_at(self, owner: int, at: int) -> tuple[int, int] | None:
        """Return the first run ``[start, stop)`` of the owner's set whose stop is above ``at``."""
        ...


class Runs:
    """A set of indices in memory, as maximal runs; it iterates over them, and is made of them again."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        ordered = list(runs)
        self._starts = [start for start, _ in ordered]
        self._stops = [stop for _, stop in ordered]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def run_at(self, at: int) -> tuple[int, int] | None:
        """Return the first run whose stop is above ``at``."""
        place = bisect_right(self._stops, at)
        return (self._starts[place], self._stops[place]) if place < len(self._stops) else None

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
            starts[place : place + 1] = [run[0] for run in left]
            stops[place : place + 1] = [run[1] for run in left]


def lowest_listed_free(book: Book, namespace: int) -> int | None:
    """Return the lowest index that is listed and that the namespace has not taken."""
    at = 0
    while (listed := book.run_at(LISTED, at)) is not None:
        at = max(at, listed[0])
        while at < listed[1]:
            taken = book.run_at(namespace, at)
            if taken is None or taken[0] > at:
                return at
            at = taken[1]
    return None


def lowest_new(book: Book, namespace: int) -> int:
    """Return the lowest index that is neither listed nor taken by the namespace."""
    at = 0
    while True:
        listed = book.run_at(LISTED, at)
        if listed is not None and listed[0] <= at:
            at = listed[1]
        taken = book.run_at(namespace, at)
        if taken is None or taken[0] > at:
            if listed is None or listed[0] > at:
                return at
            continue
        at = taken[1]


def is_in(book: Book, owner: int, index: int) -> bool:
    """Tell whether an index is in an owner's set."""
    run = book.run_at(owner, index)
    return run is not None and run[0] <= index


def choose(book: Book, namespace: int, coupled: int | None, *, new: bool = False) -> int:
    """Return the index that the next position of a draw gets (C3, C4).

    The coupled index, which the same draw of the earliest other namespace has at this position, is
    preferred while it is listed and free here; then the lowest listed free index; only when there is
    none an index that has to be generated, the coupled one if it is free.

    Args:
        book: the sets of the key.
        namespace: whose draw it is.
        coupled: the index to prefer, or None.
        new: take an index that is not listed in any case (mode ``refresh``).
    """
    if not new:
        free = coupled is not None and not is_in(book, namespace, coupled)
        if free and coupled is not None and is_in(book, LISTED, coupled):
            return coupled
        index = lowest_listed_free(book, namespace)
        if index is not None:
            return index
        if free and coupled is not None:
            return coupled
    return lowest_new(book, namespace)


def merged(runs: Sequence[tuple[int, int]], index: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return which runs an added index replaces, and the run that replaces them.

    Args:
        runs: the runs that contain ``index - 1`` or ``index + 1``, or neither.
        index: the index to add, in no run yet.
    """
    start, stop, gone = index, index + 1, []
    for run in runs:
        if run[1] == index or run[0] == index + 1:
            gone.append(run)
            start, stop = min(start, run[0]), max(stop, run[1])
    return gone, (start, stop)


def split(run: tuple[int, int], index: int) -> list[tuple[int, int]]:
    """Return the runs that are left of a run when an index is taken out of it."""
    return [part for part in ((run[0], index), (index + 1, run[1])) if part[0] < part[1]]


def laid(segments: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
    """Return a draw's indices by position from its segments in order of writing.

    A later segment overrides an earlier one where they overlap: so a sample discarded on record, or
    a refreshed draw, is replaced without any old row being rewritten. One without indices ends the draw
    where it stands: what lay beyond belongs to it no more.
    """
    positions: list[int] = []
    for start, indices in segments:
        if start > len(positions):
            continue  # it lay on something that is gone; no claim leaves such a gap
        positions[start : start + len(indices) if indices else None] = indices
    return positions


def settled(parts: Sequence[tuple[object, Sequence[int]]], missing: Callable[[int], bool]) -> int:
    """Return how many parts of a draw, from the first, are settled: no failure undoes them any more (C8).

    What one claim added stands or falls as a whole, so it is settled when all of it is stored. What was
    added after something that is not settled counted on that, and is not settled either.

    Args:
        parts: per segment, in order of writing, what tells its claim, and its indices.
        missing: tells whether an index has no sample yet.
    """
    for place, (claim, indices) in enumerate(parts):
        if any(missing(index) for index in indices):
            return next(first for first, (other, _) in enumerate(parts[: place + 1]) if other == claim)
    return len(parts)
