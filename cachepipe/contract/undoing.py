"""Which parts of a draw are undone when its claimants fail or leave (C8).

What one claim added to a draw stands once all of it is stored; what was delivered of it always stands. The
rest is undone when nobody holds it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from cachepipe.contract.allotment import Segment, indices_of


def settled(segments: Sequence[Segment], missing: Callable[[int], bool]) -> int:
    """Return how many segments of a draw, counted from the first, no failure can undo any more.

    What one claim added is settled when all of it is stored. What was added after an unsettled segment relies
    on that segment, and is not settled either.

    Args:
        segments: the segments, in order of writing.
        missing: returns True for an index without a sample.
    """
    for place, segment in enumerate(segments):
        if any(missing(index) for index in segment.indices):
            earlier = enumerate(segments[: place + 1])
            return next(first for first, other in earlier if other.claim == segment.claim)
    return len(segments)


def fallen(
    segments: Sequence[Segment],
    released: Collection[int],
    missing: Callable[[int], bool],
    held: Callable[[Segment], bool],
) -> list[Segment]:
    """Return the segments to undo: released ones, and later ones that dead claimants have added.

    Args:
        segments: the segments that are left, in order of writing.
        released: the numbers of the segments that a claimant has just let go.
        missing: returns True for an index without a sample.
        held: returns True if a live claimant holds a segment.
    """
    decided = set().union(*(segment.indices for segment in segments if segment.number in released))
    decided.intersection_update(indices_of(segments))
    first = settled(segments, lambda index: index in decided and missing(index))
    found: list[Segment] = []
    for segment in segments[first:]:
        stands = 0 < len(segment.indices) == segment.standing
        if not stands and (found or segment.number in released) and not held(segment):
            found.append(segment)
    return found
