"""How demands become calls, and what short and refused calls teach (C4, C8).

Demands for one question that come together share calls with the summed ``n``, cut by the model's limit. A
merged call that is refused, times out or is answered short is repeated as its callers wrote it before anyone
sees an error, and the limit is lowered. A model that returns fewer samples than asked is asked for the rest
until a call brings nothing new three times in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

PATIENCE: Final = 3
"""After this many calls in a row that bring nothing new, a model is given up."""

REFUSED: Final = frozenset({400, 413, 422})
"""The status codes of calls that may have been refused because they were merged."""


class HasSlots(Protocol):
    """What a caller wants: a sample for each of its slots, in their order."""

    slots: Sequence[int]


D = TypeVar("D", bound=HasSlots)

Piece = tuple[D, Sequence[int]]
"""Slots of a demand that travel in one call."""


class Answered(NamedTuple, Generic[D]):
    """What follows from the answer of a call.

    Attributes:
        given: per piece, how many of the samples it gets, in order.
        extra: how many samples nobody has asked for.
        missing: the pieces that still lack samples.
        separately: whether these are asked for in calls of their own, as their callers wrote them.
        gives_up: whether the model is given up, because it has brought nothing too often.
        limit: the new limit on ``n``; None leaves the limit as it is.
    """

    given: Sequence[int]
    extra: int = 0
    missing: Sequence[Piece[D]] = ()
    separately: bool = False
    gives_up: bool = False
    limit: int | None = None


def cut(demands: Sequence[D], limit: int | None) -> list[list[Piece[D]]]:
    """Return the pieces of the calls that together ask for what is demanded, each within the limit."""
    if limit is None or (len(demands) == 1 and len(demands[0].slots) <= limit):
        return [[(demand, demand.slots) for demand in demands]]
    calls: list[list[Piece[D]]] = []
    pieces: list[Piece[D]] = []
    room = limit
    for demand in demands:
        slots, at = demand.slots, 0
        while at < len(slots):
            part = slots[at : at + room]
            pieces.append((demand, part))
            at += len(part)
            room -= len(part)
            if not room:
                calls.append(pieces)
                pieces, room = [], limit
    if pieces:
        calls.append(pieces)
    return calls


def largest(pieces: Sequence[Piece[D]]) -> int:
    """Return how many samples the largest piece of a call asks for: what the limit is lowered to."""
    return max(len(slots) for _, slots in pieces)


def answered(pieces: Sequence[Piece[D]], brought: int, empty: int) -> Answered[D]:
    """Return what becomes of a call that was answered.

    Args:
        pieces: what it asked for.
        brought: how many samples it has brought.
        empty: how many calls in a row before this one have brought nothing for these pieces.
    """
    given: list[int] = []
    missing: list[Piece[D]] = []
    left = brought
    for demand, slots in pieces:
        got = min(left, len(slots))
        given.append(got)
        left -= got
        if got < len(slots):
            missing.append((demand, slots[got:]))
    if not missing:
        return Answered(given, left)
    if len(pieces) > 1:
        return Answered(given, left, missing, separately=True, limit=max(brought, largest(pieces)))
    return Answered(given, left, missing, gives_up=not brought and empty + 1 >= PATIENCE)


def repeats(pieces: Sequence[Piece[D]], *, timed_out: bool, status: object) -> bool:
    """Return True if a call that failed is repeated as its callers wrote it.

    Args:
        pieces: what it asked for.
        timed_out: whether it took too long.
        status: the HTTP status code that it was refused with, if there is one.
    """
    return len(pieces) > 1 and (timed_out or status in REFUSED)


def is_mergeable(seed: object, best_of: object) -> bool:
    """Return True if draws of a question may share calls, and its calls may be cut at will (C4).

    With a seed, the samples of a merged call would differ from those of the calls that were asked for. With
    ``best_of``, the number of samples is part of the question.
    """
    return seed is None and best_of is None


class Limit:
    """How many samples one call may ask for.

    Args:
        wish: the number that the stages above the model prefer, for demands that may be cut and merged.
    """

    __slots__ = ("lowered", "wish")

    def __init__(self, wish: int | None) -> None:
        self.wish = wish
        self.lowered: int | None = None

    def of(self, own: int | None, *, mergeable: bool = True) -> int | None:
        """Return the limit, given the model's own one.

        Demands that may be cut and merged are also limited by the wish and by what calls have taught.
        """
        if not mergeable or (self.wish is None and self.lowered is None):
            return own
        return min(limit for limit in (own, self.wish, self.lowered) if limit)

    def lower(self, limit: int) -> None:
        """Note what a call has taught; it holds for the rest of the run."""
        self.lowered = limit if self.lowered is None else min(limit, self.lowered)
