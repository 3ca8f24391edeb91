"""An event loop for tests whose time jumps to the next timer, so that waiting for timers takes no time."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

__all__ = ["VirtualTimeLoop"]

_PATIENCE = 20.0  # real seconds to wait for a thread or a socket when no timer is left
_JUMP = 0.5  # virtual seconds; before a longer jump, threads get real time to act
_JUMP_PATIENCE = 0.25  # real seconds that they get


class _Selector(selectors.SelectSelector):
    """A selector that passes the time instead of waiting for it."""

    def __init__(self, turn: float) -> None:
        super().__init__()
        self.now = 0.0
        self._turn = turn

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; if nothing is, move the time on to the next timer."""
        self.now += self._turn
        if timeout is None:
            ready = super().select(_PATIENCE)
            if not ready:
                raise RuntimeError(
                    "all tasks wait, and no timer is left that could wake one; a test waits for an event "
                    "that never happens"
                )
            return ready
        ready = super().select(_JUMP_PATIENCE if timeout > _JUMP else 0)
        if not ready:
            self.now += max(timeout - self._turn, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when nothing else is left to do.

    ``await asyncio.sleep(3600)`` returns at once and in its turn, so a test with random latencies takes no
    time and repeats exactly. Threads and sockets work, but they take hardly any virtual time. Use it with
    ``asyncio.Runner(loop_factory=VirtualTimeLoop)``.

    Args:
        turn: virtual seconds that a turn of the loop takes. With 0, no timer ends while a task that never
            waits is running.
    """

    def __init__(self, turn: float = 0.0) -> None:
        self._moved: Any = _Selector(turn)
        super().__init__(self._moved)

    def time(self) -> float:
        """Return the virtual time in seconds; it is 0 at first."""
        now: float = self._moved.now
        return now
