"""The samples in flight in this process: which loop generates them, and which draws wait for them."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

from cachepipe.cache.turns import Line
from cachepipe.loops import PerLoop
from cachepipe.stores.base import Sample


class Maker(Protocol):
    """Generates samples: the write queue of a loop."""

    loop: asyncio.AbstractEventLoop

    def claims(self, key: str) -> bool:
        """Return True if it may be about to generate samples of a key. Thread-safe."""
        ...


class Waiter(Protocol):
    """Waits for samples: a draw."""

    def told(self, index: int, sample: Sample | None, error: BaseException | None, last: bool) -> None:
        """Learn what became of a sample; see `InFlight.settle`. Thread-safe."""
        ...


class InFlight:
    """The samples in flight in this process, with those who wait for them: one per store, for all threads.

    Attributes:
        lines: the requests of each loop whose answers are handed over in order.
    """

    def __init__(self) -> None:
        self.lines = PerLoop(Line)
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int], Maker] = {}
        self._waiting: dict[tuple[str, int], list[Waiter]] = {}
        self._makers: weakref.WeakSet[Maker] = weakref.WeakSet()

    def join(self, maker: Maker) -> None:
        """Note that a write queue may generate samples."""
        with self._lock:
            self._makers.add(maker)

    def anyone_claims(self, key: str) -> bool:
        """Return True if samples of a key may still be announced: a loop may be busy."""
        with self._lock:
            makers = list(self._makers)
        return any(maker.claims(key) for maker in makers if not maker.loop.is_closed())

    def announce(self, maker: Maker, key: str, indices: Iterable[int]) -> None:
        """Note which write queue generates these samples."""
        for index in indices:
            self._made[key, index] = maker

    def maker(self, key: str, index: int) -> Maker | None:
        """Return the write queue that generates a sample, if its loop is open."""
        maker = self._made.get((key, index))
        return None if maker is None or maker.loop.is_closed() else maker

    def wait(self, key: str, index: int, waiter: Waiter) -> None:
        """Note that a waiter waits for a sample."""
        with self._lock:
            self._waiting.setdefault((key, index), []).append(waiter)

    def unwait(self, key: str, indices: Iterable[int], waiter: Waiter) -> None:
        """Note that a waiter does not wait for these samples any more."""
        with self._lock:
            for index in indices:
                left = [one for one in self._waiting.get((key, index), ()) if one is not waiter]
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
        for waiter in waiting:
            waiter.told(index, sample, error, last)


_registries: weakref.WeakValueDictionary[str, InFlight] = weakref.WeakValueDictionary()
_registries_lock = threading.Lock()


def _after_fork() -> None:
    """Clear the registries in a forked child: its parent's calls and waiters are not its own."""
    global _registries_lock  # noqa: PLW0603 - the parent may have held it while forking
    _registries_lock = threading.Lock()
    for registry in list(_registries.values()):
        registry.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_flight_of(identity: str) -> InFlight:
    """Return the registry of a store, by the store's identity."""
    with _registries_lock:
        registry = _registries.get(identity)
        if registry is None:
            registry = _registries[identity] = InFlight()
        return registry
