"""How much of a budget is left: what was spent, and what calls in flight have reserved.

Amounts are whole nano-dollars. A call reserves an amount, and its reservation is settled when its samples
are stored. So at every moment the stored rows and the reservations are at least what was spent. A sum of the
rows takes time, while calls go on. Each row names the calls that reserved for it, so that the sum counts a
call once that is settled meanwhile, or not yet. A reservation belongs to the lease of its process. When that
process has ended, the rows must be summed again, because it may have stored samples that it has not settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from cachepipe.contract.entries import NOBODY

NANO = 1_000_000_000
"""Nano-dollars in a dollar."""

RowCost = tuple[Sequence[str], int]
"""The calls that reserved for some rows, and what the rows have cost."""


def nanos(dollars: float) -> int:
    """Return an amount in nano-dollars, rounded up."""
    return math.ceil(dollars * NANO)


@dataclass
class Purse:
    """What a namespace has spent and reserved.

    Attributes:
        counted: what was spent, less ``recent``.
        held: what calls have reserved, by call: the lease of its process, and the amount.
        recent: what the calls have cost that were settled while a sum was under way, by call.
        sums: the sums of the rows that are under way, and the lease of the process of each.
        overtaken: those of them during which another sum has ended, which may have counted later rows.
    """

    counted: int = 0
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    recent: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    overtaken: set[str] = field(default_factory=set)

    @property
    def spent(self) -> int:
        """What was spent."""
        return self.counted + sum(self.recent.values())

    @property
    def reserved(self) -> int:
        """What calls in flight have reserved."""
        return sum(amount for _, amount in self.held.values())

    def reserve(self, call: str, lease: int, amount: int, limit: int) -> bool:
        """Reserve an amount if it fits within the limit; return whether it was reserved."""
        if self.spent + self.reserved + amount > limit:
            return False
        if amount:
            self.held[call] = (lease, amount)
        return True

    def settle(self, call: str, spent: int) -> None:
        """Replace the reservation of a call by what the call has cost.

        If its process was taken for dead, a sum may have counted its rows or not: the cost is then held for a
        dead process, so that the rows are summed again.
        """
        if call in self.held and self.held[call][0] != NOBODY:
            del self.held[call]
            self.recent[call] = spent
            self._fold()
        elif spent and call not in self.recent:
            self.held[call] = (NOBODY, spent)

    def of_dead(self, alive: Callable[[int], bool]) -> list[str]:
        """Forget the sums of dead processes; return the calls of dead processes that hold something."""
        for name in [name for name, lease in self.sums.items() if not alive(lease)]:
            self.drop_sum(name)
        dead = {lease for lease, _ in self.held.values() if not alive(lease)}
        return [call for call, (lease, _) in self.held.items() if lease in dead]

    def begin_sum(self, name: str, lease: int) -> list[str]:
        """Begin a sum of the rows, and return the calls that it must count separately.

        It must also tell apart the rows that are written from now on.
        """
        self.sums[name] = lease
        return [*self.held, *self.recent]

    def end_sum(
        self, name: str, rest: int, apart: Sequence[RowCost], ended: Collection[str], *, alone: bool
    ) -> None:
        """Take a sum of the rows.

        Where others spend too it only raises what is spent, because what could not be stored is noted late.
        A sum that another one has overtaken only raises it too.

        Args:
            name: the sum.
            rest: what all rows have cost that are not told apart.
            apart: what the others have cost, by the calls that reserved for them.
            ended: the calls whose processes were dead when the sum began: they hold nothing any more.
            alone: whether no other process has reserved anything.
        """
        for call in ended:
            self.held.pop(call, None)
        open_calls = self.held.keys() | self.recent.keys()
        found = rest + sum(cost for calls, cost in apart if open_calls.isdisjoint(calls))
        lowers = alone and name not in self.overtaken
        self.counted = found if lowers else max(found, self.counted)
        self.overtaken.update(self.sums)
        self.drop_sum(name)

    def drop_sum(self, name: str) -> None:
        """Note that a sum has ended."""
        self.sums.pop(name, None)
        self.overtaken.discard(name)
        self._fold()

    def _fold(self) -> None:
        """Forget which calls were settled, unless a sum is under way."""
        if not self.sums:
            self.counted = self.spent
            self.recent.clear()
