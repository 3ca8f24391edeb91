"""How much of a budget is left: what was spent, and what calls in flight have reserved.

Amounts are whole nano-dollars. ``spent`` is what the stored rows of a namespace sum up to, plus what was
settled since they were summed. A reservation belongs to the lease of its process, and ends with it; then the
rows are summed again, because that process may have stored samples that it has not settled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

NANO = 1_000_000_000
"""Nano-dollars in a dollar."""


def nanos(dollars: float) -> int:
    """Return an amount in nano-dollars, rounded up."""
    return math.ceil(dollars * NANO)


@dataclass
class Purse:
    """What a namespace has spent and reserved.

    Attributes:
        summed: what the rows summed up to, less what had been settled when the sum began.
        settled: what calls have settled, over all processes and time.
        held: what the calls in flight of each process have reserved, by lease.
    """

    summed: int = 0
    settled: int = 0
    held: dict[int, int] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        """What was spent."""
        return self.summed + self.settled

    @property
    def reserved(self) -> int:
        """What calls in flight have reserved."""
        return sum(self.held.values())

    def sum_up(self, found: int, *, alone: bool) -> None:
        """Take the sum of the rows; where others spend too, it only raises what is spent.

        Args:
            found: the sum, less what had been settled before the rows were read.
            alone: whether no other process has reserved anything.
        """
        self.summed = found if alone else max(found, self.summed)

    def settle(self, lease: int, reserved: int, spent: int) -> None:
        """End a reservation, and note what its call has cost."""
        self.settled += spent
        left = self.held.pop(lease, 0) - reserved
        if left > 0:
            self.held[lease] = left

    def reserve(self, lease: int, amount: int, limit: int) -> bool:
        """Reserve an amount if it fits within the limit; return whether it was reserved."""
        if self.spent + self.reserved + amount > limit:
            return False
        self.held[lease] = self.held.get(lease, 0) + amount
        return True
