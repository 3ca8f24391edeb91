"""The samples in flight in this process: which loop generates them, and which draws wait for them."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from cachepipe.stores.base import Sample


class Maker(Protocol):
    """Generates samples: the write queue of a loop."""

    loop: asyncio.AbstractEventLoop

    def claims(self, key: str) -> bool:
        """Return True if it may be about to generate samples of a key. Thread-safe."""
        ...


Told = Callable[[int, "Sample | None", "BaseException | None", bool], None]
"""A thread-safe callback: gets an index, its sample or the reason for its absence, and if no try is left."""


class Board:
    """The samples in flight in this process, with those who wait for them: one per store, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int], Maker] = {}
        self._waiting: dict[tuple[str, int], list[tuple[object, Told]]] = {}
        self._makers: weakref.WeakSet[Maker] = weakref.WeakSet()

    def join(self, lane: Maker) -> None:
        """Note a lane that may generate samples."""
        with self._lock:
            self._makers.add(lane)

    def anyone_claims(self, key: str) -> bool:
        """Return True if a lane may still announce samples of a key: its loop may be busy."""
        with self._lock:
            makers = list(self._makers)
        return any(lane.claims(key) for lane in makers if not lane.loop.is_closed())

    def announce(self, lane: Maker, key: str, indices: Iterable[int]) -> None:
        """Note that a lane generates these samples."""
        for index in indices:
            self._made[key, index] = lane

    def maker(self, key: str, index: int) -> Maker | None:
        """Return the lane that generates a sample, if its loop is open."""
        lane = self._made.get((key, index))
        return None if lane is None or lane.loop.is_closed() else lane

    def wait(self, key: str, index: int, waiter: object, told: Told) -> None:
        """Note that a waiter waits for a sample."""
        with self._lock:
            self._waiting.setdefault((key, index), []).append((waiter, told))

    def unwait(self, key: str, indices: Iterable[int], waiter: object) -> None:
        """Note that a waiter does not wait for these samples any more."""
        with self._lock:
            for index in indices:
                left = [pair for pair in self._waiting.get((key, index), ()) if pair[0] is not waiter]
                if left:
                    self._waiting[key, index] = left
                else:
                    self._waiting.pop((key, index), None)

    def anyone_waits(self, key: str, indices: Iterable[int]) -> bool:
        """Return True if anyone waits for one of these samples."""
        with self._lock:
            return any((key, index) in self._waiting for index in indices)

    def anyone_waits_for(self, key: str) -> bool:
        """Return True if anyone waits for a sample of a key."""
        with self._lock:
            return any(place[0] == key for place in self._waiting)

    def settle(
        self,
        key: str,
        index: int,
        sample: Sample | None,
        error: BaseException | None = None,
        *,
        last: bool = False,
    ) -> None:
        """Notify the waiters that a sample is stored, or that its generation failed.

        Args:
            key: the key of its question.
            index: its index.
            sample: the sample, or None.
            error: the error of its call, if the call failed.
            last: whether that call was the second and last try for the waiters.
        """
        with self._lock:
            self._made.pop((key, index), None)
            if not self._waiting:
                return
            waiting = self._waiting.pop((key, index), ())
        for _, told in waiting:
            told(index, sample, error, last)


_boards: weakref.WeakValueDictionary[str, Board] = weakref.WeakValueDictionary()
_boards_lock = threading.Lock()


def _after_fork() -> None:
    """Clear the boards in a forked child: its parent's calls and waiters are not its own."""
    global _boards_lock  # noqa: PLW0603 - the parent may have held it while forking
    _boards_lock = threading.Lock()
    for board in list(_boards.values()):
        board.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def board_of(identity: str) -> Board:
    """Return the board of a store, by the store's identity."""
    with _boards_lock:
        board = _boards.get(identity)
        if board is None:
            board = _boards[identity] = Board()
        return board
