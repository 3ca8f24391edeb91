"""Quotas, and the sliding windows that keep them. Pure: the time is passed to them.

A use counts until it lies an interval back as the provider sees it. The provider counts a request when it
arrives, at an unknown moment after the call was let go and before its answer came. So a use expires one
interval after the end of the call, or, if the call takes long, one interval after the latest time at which
the request can have arrived. Then no interval, wherever it begins, contains more than the quota.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


def is_number(value: Any) -> bool:
    """Return True for a number other than NaN; booleans are not numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


@dataclass(frozen=True)
class Quota:
    """The largest use of an endpoint or a model within any interval.

    Attributes:
        max_requests: calls per interval; None is no limit.
        max_tokens: tokens per interval, those of prompts and of answers together; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
    """

    max_requests: float | None = None
    max_tokens: float | None = None
    interval: float = 60.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value >= 1):
                raise ValueError(f"{name} is a number, at least 1, or None for no limit; got {value!r}")
        if not (is_number(self.interval) and 0 < self.interval < math.inf):
            raise ValueError(f"interval is a number of seconds above 0; got {self.interval!r}")

    def __str__(self) -> str:
        limits = {"requests": self.max_requests, "tokens": self.max_tokens}
        parts = [f"{limit:g} {name}" for name, limit in limits.items() if limit is not None]
        words = f"{' and '.join(parts)} per {self.interval:g} s" if parts else "no quota"
        return words if self.max_concurrency is None else f"{words}, {self.max_concurrency} at once"

    @classmethod
    def of(cls, value: Quota | Mapping[str, Any]) -> Quota:
        """Return a quota, which may be given as a mapping of its fields.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(value, Quota):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or any(name not in names for name in value):
            raise TypeError(f"the limits of a model are a mapping of {', '.join(names)}; got {value!r:.100}")
        return cls(**value)

    def windows(self) -> list[Window]:
        """Return the windows that keep this quota."""
        limits = ((self.max_requests, False), (self.max_tokens, True))
        return [Window(limit, self.interval, of_tokens=kind) for limit, kind in limits if limit is not None]


@dataclass(slots=True, eq=False)
class Use:
    """What one call uses of one window."""

    amount: float
    expires: float = math.inf
    gone: bool = False


class Window:
    """A limit on the units that are used within any interval.

    Args:
        limit: the number of units. A use of more counts as this many, so it goes alone.
        interval: seconds.
        of_tokens: whether the units are tokens, and not calls.
    """

    def __init__(self, limit: float, interval: float, *, of_tokens: bool = False) -> None:
        self.limit = limit
        self.interval = interval
        self.of_tokens = of_tokens
        self.used = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Use]] = []
        self._uses = 0

    def __repr__(self) -> str:
        return f"<Window {self.used:g} of {self.limit:g} in {self.interval:g} s>"

    def wait(self, amount: float, now: float) -> float:
        """Return 0 if this amount may be used now, else the seconds after which to ask again.

        Infinity means: when a call has ended or its use has changed.
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
        """Use an amount from now on, until `expire` sets its end."""
        use = Use(min(amount, self.limit))
        self.used += use.amount
        self._uses += 1
        return use

    def expire(self, use: Use, at: float) -> None:
        """End a use at a time, unless it ends earlier."""
        if not use.gone and at < use.expires:
            use.expires = at
            heapq.heappush(self._heap, (at, next(self._order), use))

    def correct(self, use: Use, amount: float) -> None:
        """Change the amount of a use from the estimated to the true one."""
        if not use.gone:
            self.used += amount - use.amount
            use.amount = amount

    def give_back(self, use: Use) -> None:
        """Remove a use, as if it had never been."""
        if not use.gone:
            self._end(use)

    def _end(self, use: Use) -> None:
        use.gone = True
        self._uses -= 1
        self.used = self.used - use.amount if self._uses else 0.0  # rounding errors do not add up


def longest_wait(windows: Iterable[Window], tokens: float, now: float) -> float:
    """Return the seconds until a call with so many tokens fits into all windows, as `Window.wait` does."""
    return max((window.wait(tokens if window.of_tokens else 1, now) for window in windows), default=0.0)


def take_all(windows: Iterable[Window], tokens: float) -> list[tuple[Window, Use]]:
    """Use one call with so many tokens in all windows."""
    return [(window, window.take(tokens if window.of_tokens else 1)) for window in windows]
