"""What of a draw is undone when its claimants fail or leave (C8).

What one claim added to a draw stands or falls as a whole. It stands once all of it is stored, or what was
delivered of it; it falls when nobody who holds it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from cachepipe.contract.allotment import laid


class Piece(NamedTuple):
    """A part of a draw as the ledger holds it.

    Attributes:
        number: its place among the parts, in order of writing.
        position: the position of its first index.
        indices: its indices.
        claim: equal for the parts that one claim has added.
        standing: how many of its indices, from the first, were delivered while others were missing.
    """

    number: int
    position: int
    indices: Sequence[int]
    claim: object
    standing: int


def settled(pieces: Sequence[Piece], missing: Callable[[int], bool]) -> int:
    """Return how many parts of a draw, from the first, no failure undoes any more.

    What one claim added is settled when all of it is stored. What was added after something that is not
    settled counted on that, and is not settled either.

    Args:
        pieces: the parts, in order of writing.
        missing: returns True for an index without a sample.
    """
    for place, piece in enumerate(pieces):
        if any(missing(index) for index in piece.indices):
            earlier = enumerate(pieces[: place + 1])
            return next(first for first, other in earlier if other.claim == piece.claim)
    return len(pieces)


def fallen(
    pieces: Sequence[Piece],
    released: Collection[int],
    missing: Callable[[int], bool],
    held: Callable[[Piece], bool],
) -> list[Piece]:
    """Return the parts to undo: of those that were released, and of what dead claimants have laid on them.

    Args:
        pieces: the parts that are left, in order of writing.
        released: the numbers of the parts that a claimant has just let go.
        missing: returns True for an index without a sample.
        held: returns True if a live claimant holds a part.
    """
    visible = laid((piece.position, piece.indices) for piece in pieces)
    decided = {index for piece in pieces if piece.number in released for index in piece.indices}
    decided.intersection_update(visible)
    first = settled(pieces, lambda index: index in decided and missing(index))
    found: list[Piece] = []
    for piece in pieces[first:]:
        stands = 0 < len(piece.indices) == piece.standing
        if not stands and (found or piece.number in released) and not held(piece):
            found.append(piece)
    return found
