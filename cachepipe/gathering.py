"""Gathers what comes in one turn of the event loop, or within a window, and acts on it together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Gathering(Generic[T]):
    """Items that wait for others, until their turn or window ends or somebody cuts it short.

    Args:
        loop: the event loop.
        act: gets the items that have gathered, once they are complete.

    Attributes:
        items: the items that wait, in order.
    """

    __slots__ = ("_act", "_loop", "_timer", "items")

    def __init__(self, loop: asyncio.AbstractEventLoop, act: Callable[[list[T]], object]) -> None:
        self.items: list[T] = []
        self._loop = loop
        self._act = act
        self._timer: asyncio.Handle | None = None

    def __bool__(self) -> bool:
        return bool(self.items)

    def add(self, *items: T, window: float = 0.0, turns: int = 1) -> None:
        """Add items. The first ones decide how long all wait.

        Args:
            items: the items.
            window: seconds to wait for others; 0 waits for turns of the loop.
            turns: how many turns of the loop to wait.
        """
        self.items += items
        if self._timer is not None:
            return
        if window:
            self._timer = self._loop.call_later(window, self.cut)
        else:
            self._wait(turns)

    def _wait(self, turns: int) -> None:
        if turns > 1:
            self._timer = self._loop.call_soon(self._wait, turns - 1)
        else:
            self._timer = self._loop.call_soon(self.cut)

    def cut(self) -> None:
        """Act on what has gathered now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        items, self.items = self.items, []
        if items:
            self._act(items)
