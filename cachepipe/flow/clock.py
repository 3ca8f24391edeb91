"""Time as the limits see it: read from, waited for and, in tests, moved by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from cachepipe import loops


class Clock:
    """The machine's monotonic clock; a subclass may tell another time (``cachepipe.testing.FakeClock``)."""

    def now(self) -> float:
        """Return the time in seconds since some fixed moment."""
        return time.monotonic()

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], None]) -> Any:
        """Call back on a loop at a time; return a handle with a method ``cancel``."""
        return loop.call_later(max(0.0, when - self.now()), callback)

    async def sleep(self, seconds: float) -> None:
        """Return so many seconds later."""
        loop = loops.running()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        handle = self.call_at(loop, self.now() + seconds, wake)
        try:
            await woken
        finally:
            handle.cancel()


CLOCK = Clock()
"""The clock of whoever is given no other."""
