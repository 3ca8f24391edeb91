"""Which indices a draw gets, for claims and replays alike (C1, C2, C3, C4).

A key's sample list is the set of *listed* indices: a sample is stored or being generated. Per namespace, the
set of *taken* indices holds what its draws were given. A draw keeps the indices that the ledger holds for it;
each further position gets the index that the same draw of the earliest other namespace has there, if that
is listed and free, else the lowest listed free index, else a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from cachepipe.contract.intervals import IndexSet, MutableIndexSet
from cachepipe.contract.schedule import Place


class Discarded:
    """Stands for a sample that was discarded on record."""


DISCARDED = Discarded()


class Segment(NamedTuple):
    """Indices that one claim added to a draw, at successive positions.

    Attributes:
        number: its place among the segments of the draw, in order of writing.
        position: the position of its first index in the draw.
        indices: its indices.
        lease: identifies the process that wrote it.
        token: the claimant that holds it; None once it does not hold it any more.
        stamp: the stamp of its writing.
        standing: how many of its indices, from the first, were delivered while others were missing.
        place: the place in the schedule that the draw has noted, if any (C11).
    """

    number: int
    position: int
    indices: Sequence[int]
    lease: int
    token: str | None
    stamp: int
    standing: int = 0
    place: Place | None = None

    @property
    def claim(self) -> tuple[int, str | None, int]:
        """Equal for the segments that one claim has added."""
        return self.lease, self.token, self.stamp


_LAID = attrgetter("position", "indices")
"""What `laid` needs of a segment."""


class KeyView(Protocol):
    """One key as a store shows it to one draw, as of one moment."""

    @property
    def listed(self) -> IndexSet:
        """The indices whose samples are stored or being generated."""
        ...

    @property
    def taken(self) -> MutableIndexSet:
        """The indices that the draw's namespace has taken."""
        ...

    def others(self) -> Sequence[Segment]:
        """Return the segments of the same draw in the earliest other namespace."""
        ...

    def sample(self, index: int) -> Any:
        """Return the sample at an index, `DISCARDED`, or None if there is no sample."""
        ...

    def lease(self, index: int) -> bool:
        """Take the lease of an index without a sample; return False if a live process has it."""
        ...


class Allotment(NamedTuple):
    """What a draw gets.

    Attributes:
        indices: one per position.
        samples: per position, the sample if it is stored.
        to_generate: the indices that this claimant is to generate; the other missing ones are awaited.
        kept: how many positions the ledger held before, replaced ones among them.
        replaced: the positions among these whose sample was discarded and which got another index.
        place: the place that the draw inherits from the draw that it is coupled to, if that has noted one.
    """

    indices: list[int]
    samples: list[Any]
    to_generate: list[int]
    kept: int
    replaced: Sequence[int]
    place: Place | None = None


def allot(
    view: KeyView,
    held: Sequence[int],
    n: int,
    *,
    refresh: bool = False,
    couple: bool = True,
    stored_only: bool = False,
) -> Allotment | None:
    """Return what a draw of ``n`` samples gets.

    Args:
        view: the key, as the store shows it to this draw. The function takes and leases there what it allots.
        held: the indices that the ledger holds for the draw, by position.
        n: how many samples are wanted.
        refresh: replace what the ledger holds by samples that are not listed yet.
        couple: whether the draw follows other namespaces; the shared draw does not.
        stored_only: give up, and return None, at the first sample that is not stored (mode ``replay``).
    """
    indices = list(held[:n])
    kept = 0 if refresh else len(indices)
    samples: list[Any] = []
    to_generate: list[int] = []
    replaced: list[int] = []
    others: Sequence[Segment] = ()
    coupled: Sequence[int] | None = None if couple and not refresh else ()
    follows = False  # whether a position got its coupled index
    for position in range(n):
        sample: Any = DISCARDED
        if position < kept:
            sample = view.sample(indices[position])
            if sample is DISCARDED:
                replaced.append(position)
        while sample is DISCARDED:
            if coupled is None:
                others = view.others()
                coupled = indices_of(others)
            preferred = coupled[position] if position < len(coupled) else None
            index = choose(view.listed, view.taken, preferred, new=refresh)
            follows = follows or index == preferred
            view.taken.add(index)  # it stays taken also if its sample is discarded
            indices[position : position + 1] = [index]
            sample = view.sample(index) if index in view.listed else None
        if sample is None:
            if stored_only:
                return None
            if view.lease(indices[position]):
                to_generate.append(indices[position])
        samples.append(sample)
    place = noted_place(others, n) if follows else None
    return Allotment(indices, samples, to_generate, kept, replaced, place)


def first(n: int) -> list[int]:
    """Return what ``allot`` gives the first draw of a key: indices from the front, all to be generated."""
    return list(range(n))


def choose(listed: IndexSet, taken: IndexSet, preferred: int | None, *, new: bool = False) -> int:
    """Return the index that the next position of a draw gets (C3, C4).

    Args:
        listed: the indices whose samples are stored or being generated.
        taken: the indices that the namespace has taken.
        preferred: the coupled index, or None. If it is free and listed, it is chosen first; if it is free and
            not listed, it is chosen when no listed index is free.
        new: always take an index that is not listed (mode ``refresh``).
    """
    if not new:
        free = preferred is not None and preferred not in taken
        if free and preferred in listed:  # type: ignore[operator]  # if free, it is not None
            return preferred  # type: ignore[return-value]
        index = lowest_listed_free(listed, taken)
        if index is not None:
            return index
        if free:
            return preferred  # type: ignore[return-value]
    return lowest_new(listed, taken)


def lowest_listed_free(listed: IndexSet, taken: IndexSet) -> int | None:
    """Return the lowest index that is listed and not taken."""
    at = 0
    while (interval := listed.interval_at(at)) is not None:
        at = max(at, interval[0])
        while at < interval[1]:
            other = taken.interval_at(at)
            if other is None or other[0] > at:
                return at
            at = other[1]
    return None


def lowest_new(listed: IndexSet, taken: IndexSet) -> int:
    """Return the lowest index that is neither listed nor taken."""
    at = 0
    while True:
        interval = listed.interval_at(at)
        if interval is not None and interval[0] <= at:
            at = interval[1]
        other = taken.interval_at(at)
        if other is None or other[0] > at:
            if interval is None or interval[0] > at:
                return at
            continue
        at = other[1]


def added(allotment: Allotment, n: int, held: int, *, refresh: bool) -> list[tuple[int, list[int]]]:
    """Return the segments that a claim adds to a draw, each as a position and the indices from there.

    Args:
        allotment: what the draw got.
        n: how many samples it wanted.
        held: how many positions the ledger held before.
        refresh: whether the claim replaces the whole draw.
    """
    indices, kept = allotment.indices, allotment.kept
    segments = [(position, [indices[position]]) for position in allotment.replaced]
    if kept < n:
        segments.append((kept, indices[kept:]))
    if refresh and held > n:
        segments.append((n, []))
    return segments


def laid(segments: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
    """Return a draw's indices by position from its segments in order of writing.

    A later segment overrides an earlier one where they overlap: so a sample discarded on record, or a
    refreshed draw, is replaced without rewriting a row. A segment without indices ends the draw at its
    position: what lay beyond no longer belongs to the draw.

    Args:
        segments: the position and the indices of each.
    """
    positions: list[int] = []
    for start, indices in segments:
        if start > len(positions):
            continue  # the segment before it is gone; no claim leaves such a gap
        positions[start : start + len(indices) if indices else None] = indices
    return positions


def indices_of(segments: Collection[Segment]) -> list[int]:
    """Return a draw's indices by position; see ``laid``."""
    if len(segments) == 1:  # the usual draw
        (segment,) = segments
        return [*segment.indices] if segment.position == 0 else []
    return laid(map(_LAID, segments))


def noted_place(segments: Iterable[Segment], n: int) -> Place | None:
    """Return the latest place that the first n positions of a draw have noted; None if they noted none."""
    latest: Place | None = None
    for each in segments:
        place = each.place
        if place is not None and each.position < n and (latest is None or place > latest):
            latest = place
    return latest


def answers_alike(before: Sequence[Segment], after: Sequence[Segment]) -> bool:
    """Return True if a draw is answered as before, where it is answered at all.

    It may have got further positions. If it has lost some, they were undone, so nobody was given them.
    """
    held, holds = indices_of(before), indices_of(after)
    common = min(len(held), len(holds))
    noted = {each.position for each in (*before, *after) if each.place is not None}
    return held[:common] == holds[:common] and all(
        noted_place(before, position + 1) == noted_place(after, position + 1)
        for position in noted
        if position < common
    )
