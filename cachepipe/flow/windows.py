"""Quotas over sliding intervals: how much was used of one within the last so many seconds.

What is used counts until it is certain that it lies an interval back as the provider sees it. The provider
sees a request when it arrives, which is not known here: after it was let go, and before its answer came.
So a use ends an interval after the call has ended, or, where that takes long, an interval after the
time that a request may be on its way. Then no interval, wherever it begins, holds more than the quota.
"""

from __future__ import annotations

import heapq
import itertools
import math


class Use:
    """What one call uses of one window."""

    __slots__ = ("amount", "expires", "gone")

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self.expires = math.inf
        self.gone = False


class Window:
    """A quota of ``limit`` units over any ``interval`` seconds. Pure: it is told the time.

    Args:
        limit: how many units; a use of more counts as this many, and so goes alone.
        interval: seconds.
    """

    def __init__(self, limit: float, interval: float) -> None:
        self.limit = limit
        self.interval = interval
        self.used = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Use]] = []
        self._uses = 0

    def __repr__(self) -> str:
        return f"<Window {self.used:g} of {self.limit:g} in {self.interval:g} s>"

    def wait(self, amount: float, now: float) -> float:
        """Return 0 when so much may be used now, else in how many seconds it is worth asking again.

        Infinity means: when a call has ended, or its use has changed.
        """
        heap = self._heap
        while heap and (heap[0][2].gone or heap[0][0] <= now):
            expires, _, use = heapq.heappop(heap)
            if not use.gone and expires <= now:
                self._end(use)
        if self.used + min(amount, self.limit) <= self.limit * (1 + 1e-12):
            return 0.0
        return heap[0][0] - now if heap else math.inf

    def take(self, amount: float) -> Use:
        """Use so much from now on, until `expire` says when it ends."""
        use = Use(min(amount, self.limit))
        self.used += use.amount
        self._uses += 1
        return use

    def expire(self, use: Use, at: float) -> None:
        """Let a use end at a time, unless it is to end before."""
        if not use.gone and at < use.expires:
            use.expires = at
            heapq.heappush(self._heap, (at, next(self._order), use))

    def correct(self, use: Use, amount: float) -> None:
        """Let a use be of another amount than was thought."""
        if not use.gone:
            self.used += amount - use.amount
            use.amount = amount

    def give_back(self, use: Use) -> None:
        """Let a use never have been."""
        if not use.gone:
            self._end(use)

    def _end(self, use: Use) -> None:
        use.gone = True
        self._uses -= 1
        self.used = self.used - use.amount if self._uses else 0.0  # what was rounded off does not add up
