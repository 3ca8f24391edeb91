"""The clock of the limits, and calls on event loops at a time. Tests use a clock that they move by hand."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from cachepipe import loops


class Clock:
    """The machine's monotonic clock; a subclass may have another time (``cachepipe.testing.FakeClock``)."""

    def now(self) -> float:
        """Return the time in seconds since some fixed moment."""
        return time.monotonic()

    def call_at(self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], None]) -> Any:
        """Call back on a loop at a time; return a handle with a method ``cancel``."""
        return loop.call_later(max(0.0, when - self.now()), callback)

    async def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
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
"""The default clock."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, or None."""
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call back on a loop: at once if it runs in this thread, and never if it is closed."""
    if running_loop() is loop:
        callback()
    else:
        with contextlib.suppress(
            RuntimeError
        ):  # the loop is closed, and with it everything that waited on it
            loop.call_soon_threadsafe(callback)


@dataclass(slots=True, eq=False)
class _Timer:
    when: float = math.inf
    handle: Any = None


class Alarm:
    """Calls back on event loops at a time, whichever thread sets it.

    Args:
        clock: the clock.
        lock: the lock under which ``set`` is called. The callback is called under it too.
        callback: is called at the time.
    """

    def __init__(self, clock: Clock, lock: AbstractContextManager[Any], callback: Callable[[], None]) -> None:
        self._clock = clock
        self._lock = lock
        self._callback = callback
        self._timers: dict[asyncio.AbstractEventLoop, _Timer] = {}

    def set(self, loops: Iterable[asyncio.AbstractEventLoop], when: float) -> None:
        """Call back at a time, or before, on these loops and on all for which the alarm is set."""
        for loop in {*loops, *self._timers}:
            if loop.is_closed():
                self._timers.pop(loop, None)
                continue
            timer = self._timers.setdefault(loop, _Timer())
            if when < timer.when:
                timer.when = when
                call_on(loop, partial(self._start, loop))

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            timer = self._timers.get(loop)
            if timer is None:  # it was due meanwhile
                return
            if timer.handle is not None:
                timer.handle.cancel()
            timer.handle = self._clock.call_at(loop, timer.when, partial(self._due, loop))

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._timers.pop(loop, None) is not None:
                self._callback()
