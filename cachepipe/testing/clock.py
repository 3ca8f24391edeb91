"""A clock that stands still until a test moves it, for code that takes a `cachepipe.flow.Clock`."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from cachepipe.flow.clock import Clock
from cachepipe.loops import own_handles

_TURNS = 20  # turns of the loop at each moment, for the tasks that were woken


class _Handle:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock(Clock):
    """A clock moved by hand: ``await clock.advance(5)`` calls back in order what is due within five seconds.

    Args:
        now: the initial time in seconds.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None], _Handle]] = []

    def __repr__(self) -> str:
        return f"<FakeClock at {self._now:g} s>"

    def now(self) -> float:
        """Return the time in seconds."""
        return self._now

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], None]) -> _Handle:  # noqa: ARG002 - `advance` calls
        """Call back once the clock has been moved to a time."""
        handle = _Handle()
        heapq.heappush(self._due, (max(when, self._now), next(self._order), callback, handle))
        return handle

    @property
    def next_due(self) -> float | None:
        """The time of the next callback, or None."""
        while self._due and self._due[0][3].cancelled:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    async def advance(self, seconds: float) -> None:
        """Move the clock, with a stop at each time at which a callback is due."""
        end = self._now + seconds
        await self.settle()
        while (due := self.next_due) is not None and due <= end:
            self._now = due
            while self._due and self._due[0][0] <= due:
                _, _, callback, handle = heapq.heappop(self._due)
                if not handle.cancelled:
                    callback()
            await self.settle()
        self._now = end
        await self.settle()

    async def settle(self) -> None:
        """Give the event loop some turns without moving the clock. They count as quiet (C11)."""
        loop = asyncio.get_running_loop()
        for _ in range(_TURNS):
            turn = loop.create_future()
            own_handles(loop).call_soon(turn.set_result, None)
            await turn
