"""What becomes of a draw: events go in, effects come out (C5, C6, C7, C8).

`DrawState` is a state machine without I/O. Each event is a method that returns the effects to perform, in
order; ``cachepipe.cache.drawing`` performs them. The rules:

- The draw's own indices are fixed by its claim before generation starts (C5).
- A sample is delivered only after it was stored, or when storing it failed (C7).
- A sample that was generated on the draw's behalf is delivered with ``cached`` false (C6).
- A draw that fails or is left while a sample is missing is undone: its hold ends and its occurrence number is
  given back. Once all samples are stored it stands, delivered or not (C8).
- The error of a call fails the draws that the call was made for. Draws that waited for its samples claim once
  more, together; an error of that second call is theirs (C8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple


class Fill(NamedTuple):
    """Take the stored samples of the last grant at these positions."""

    positions: Sequence[int]


class Await(NamedTuple):
    """Wait for samples that others generate."""

    indices: Sequence[int]


class StopWaiting(NamedTuple):
    """Stop waiting for samples that others generate."""

    indices: Sequence[int]


class Generate(NamedTuple):
    """Generate the samples of these indices, in this order."""

    indices: Sequence[int]


class FreeLeases(NamedTuple):
    """Release the leases of samples that will not come, then tell their waiters.

    Attributes:
        indices: the indices.
        error: the error of their call, or None.
        last: whether that call was the second and last try for the waiters.
    """

    indices: Sequence[int]
    error: BaseException | None = None
    last: bool = False


class Wake(NamedTuple):
    """Tell the waiters of an index, the ``place``, that its sample is stored, or will not come there."""

    place: int
    stored: bool


class ClaimAgain(NamedTuple):
    """Claim the draw once more."""


class Waste(NamedTuple):
    """Count samples that were generated and will not be delivered.

    Attributes:
        positions: the positions of those that the draw has.
        others: the number of further ones.
    """

    positions: Sequence[int] = ()
    others: int = 0


class GiveBack(NamedTuple):
    """Give the occurrence number back, so that a retry is the same draw."""


class Release(NamedTuple):
    """Release the hold, then tell the caller. The ledger undoes an incomplete draw that nobody holds.

    Attributes:
        complete: whether all samples came.
        error: what to tell the caller; None tells nothing.
    """

    complete: bool
    error: BaseException | None = None


class Withdraw(NamedTuple):
    """Stop the calls that were made for this draw, unless others wait for their samples."""


class Cancel(NamedTuple):
    """Cancel the caller: the call that it waits for was stopped from outside."""


class Deliver(NamedTuple):
    """Hand the samples to the caller."""


Effect = (
    Fill
    | Await
    | StopWaiting
    | Generate
    | FreeLeases
    | Wake
    | ClaimAgain
    | Waste
    | GiveBack
    | Release
    | Withdraw
    | Cancel
    | Deliver
)
Effects = Sequence[Effect]

_CLAIM: Final = (ClaimAgain(),)
_DELIVER: Final = (Deliver(),)
_NOTHING: Final = ()
_NONE: Any = frozenset()  # most draws wait for nobody: a set is made when the first index comes


class DrawState:
    """The state of one draw.

    Args:
        n: how many samples it wants.
        stored: False for a draw that is not in the ledger: its samples are generated for its caller alone.

    Attributes:
        complete: whether all of its samples have come.
        ended: whether it failed or was left.
        indices: the index of each position, as it was granted last.
        missing: the positions that lack a sample, by index.
        cached: by position, False once the sample was generated on this draw's behalf (C6).
        generated: how many were generated on its behalf.
        awaited: the indices that others generate.
        making: the indices that are generated on this draw's behalf.
        held: the segments of the draw that it holds.
    """

    __slots__ = (
        "awaited",
        "cached",
        "complete",
        "ended",
        "generated",
        "held",
        "indices",
        "joined",
        "making",
        "missing",
        "n",
        "retried",
        "stored",
    )

    def __init__(self, n: int, *, stored: bool = True) -> None:
        self.n = n
        self.stored = stored
        self.complete = self.ended = False
        self.indices: Sequence[int] = ()
        self.missing: dict[int, int] = {}
        self.cached = [True] * n
        self.generated = 0
        self.awaited: set[int] = _NONE
        self.making: set[int] = _NONE
        self.held: tuple[int, ...] = ()
        self.joined = False  # whether others hold the draw too
        self.retried = False  # whether a call that it waited for has failed

    # Claims.

    def unsaved(self) -> Effects:
        """Begin a draw that the ledger does not record: all of its samples are generated."""
        self.missing = {-1 - position: position for position in range(self.n)}
        self.making = set(self.missing)
        return (Generate(list(self.missing)),)

    def granted(
        self,
        indices: Sequence[int],
        samples: Sequence[Any],
        mine: Sequence[int],
        held: tuple[int, ...] = (),
        *,
        joined: bool = False,
    ) -> Effects:
        """Learn what a claim was granted.

        Args:
            indices: the index of each position.
            samples: the sample of each position, or None where it is not stored.
            mine: the indices that this draw must generate; it awaits the other missing ones.
            held: the segments of the draw that the claim holds.
            joined: whether others hold the draw too.
        """
        self.joined = self.joined or joined
        self.held = tuple({*self.held, *held}) if self.held else held
        if self.ended:
            return (*self._released(), FreeLeases(mine)) if mine else self._released()
        if None not in samples and not self.generated:
            self.indices, self.missing = indices, {}
            return [Fill([*range(self.n)]), *self._completed()]
        fill = self._lay(indices, samples)
        if mine:
            self.making = {*self.making, *mine}
        steps = ((Fill, fill), (Await, self._wait()), (Generate, mine))
        effects: list[Effect] = [kind(which) for kind, which in steps if which]
        return effects if self.missing else [*effects, *self._completed()]

    def _lay(self, indices: Sequence[int], samples: Sequence[Any]) -> list[int]:
        """Take over what was granted; return the positions whose samples are stored.

        What was generated for this draw before, under a claim that lost a lease, stays where it is.
        """
        self.indices = indices
        self.missing = {}
        stored = []
        for position, cached in enumerate(self.cached):
            if cached and samples[position] is None:
                self.missing[indices[position]] = position
            elif cached:
                stored.append(position)
        return stored

    def _wait(self) -> list[int]:
        """Note and return the missing indices that others generate, except those already awaited."""
        wait = [index for index in self.missing if index not in self.making and index not in self.awaited]
        if wait:
            self.awaited = {*self.awaited, *wait}
        return wait

    def spoiled(self, mine: Sequence[int], error: BaseException) -> Effects:
        """Learn that the effects of a grant were not performed: one of its samples cannot be read."""
        if self.ended:
            return _NOTHING
        self.complete = False
        self.making -= {*mine}
        return (*((FreeLeases(mine),) if mine else ()), *self.broken(error))

    def broken(self, error: BaseException) -> Effects:
        """Learn that the draw cannot go on, such as when its claim fails."""
        return _NOTHING if self.ended else self._undone(error)

    # Samples that come, and samples that do not.

    def committed(self, index: int, *, kept: bool) -> Effects:
        """Learn that a sample of a call was stored: at its index, or as an extra if its lease was lost."""
        self.making -= {index}
        if kept:
            return (Wake(index, stored=True),)
        lost = (Waste(others=1), Wake(index, stored=False))
        return lost if self.complete or self.ended else (*lost, *_CLAIM)

    def unstored(self, index: int) -> Effects:
        """Learn that a sample of a call could not be stored; it is paid for, so it is delivered."""
        self.making -= {index}
        return (FreeLeases([index]),)

    def takes(self, index: int) -> int | None:
        """Return the position that lacks the sample of an index which has come; None if no position does."""
        self.awaited -= {index}
        return None if self.complete or self.ended else self.missing.get(index)

    def filled(self, index: int) -> Effects:
        """Learn that a sample which was generated for this draw is in its place."""
        position = self.missing.pop(index)
        self.cached[position] = False
        self.generated += 1
        return _NOTHING if self.missing else self._completed()

    def arrived(self, index: int) -> Effects:
        """Learn that a sample which others generated is in its place."""
        del self.missing[index]
        return _NOTHING if self.missing else self._completed()

    def absent(self, index: int, error: BaseException | None = None, *, last: bool = False) -> Effects:
        """Learn that a sample which others should have generated will not come.

        Args:
            index: its index.
            error: the error of its call; None if the call was stopped.
            last: whether that call was the second and last try for those who waited.
        """
        self.awaited -= {index}
        if self.complete or self.ended or index not in self.missing:
            return _NOTHING
        if error is not None and last and self.retried:
            return self._undone(error)
        self.retried = self.retried or error is not None
        return _CLAIM

    def unheard(self) -> Effects:
        """Learn that those who should have generated the awaited samples are gone, or take too long."""
        if self.complete or self.ended:
            return _NOTHING
        waited, self.awaited = self.awaited, _NONE
        return (StopWaiting(list(waited)), *_CLAIM)

    def failed(self, indices: Sequence[int], error: BaseException | None) -> Effects:
        """Learn that samples of this draw will not come: their call failed, or was stopped (None)."""
        self.making -= {*indices}
        freed = (FreeLeases(indices, error, self.retried),)
        if self.complete or self.ended:
            return freed
        if error is None:
            return (*freed, Cancel(), *self.left())
        return (*freed, *self._undone(error))

    # Ends.

    def left(self) -> Effects:
        """Learn that the caller has gone. A draw that is complete stands; its number is free again."""
        if self.ended:
            return _NOTHING
        if self.complete:
            self.ended = True
            return (Waste(self._own()), GiveBack())
        return (*self._undone(None), Withdraw())

    def _completed(self) -> Effects:
        self.complete = True
        return (Release(complete=True), *_DELIVER) if self.joined and self.held else _DELIVER

    def _undone(self, error: BaseException | None) -> Effects:
        self.ended = True
        stop = (StopWaiting(list(self.awaited)),) if self.awaited else ()
        ends = (Waste(self._own()), *stop, GiveBack(), Release(complete=False, error=error))
        return ends if self.stored else (*ends, Withdraw())  # nobody else can use what comes

    def _released(self) -> Effects:
        return (Release(complete=False),)

    def _own(self) -> list[int]:
        """Return the positions of the samples that were generated on this draw's behalf."""
        return [position for position, cached in enumerate(self.cached) if not cached]
