"""The event loop that the asynchronous parts run on, and what each loop has of its own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def running() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        RuntimeError: when no asyncio loop runs here, as under trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "this part of cachepipe needs asyncio, and no asyncio event loop runs here; is this trio? Start "
            "the program with asyncio.run(...) or anyio.run(..., backend='asyncio'), or use a synchronous "
            "client in a thread, as by trio.to_thread.run_sync(...)"
        ) from None


class PerLoop(Generic[T]):
    """Makes a value for each event loop that asks for one, and forgets those of closed loops.

    Args:
        make: makes the value of a loop.
        forgotten: gets each value that is forgotten.
    """

    def __init__(
        self, make: Callable[[asyncio.AbstractEventLoop], T], forgotten: Callable[[T], object] | None = None
    ) -> None:
        self._make = make
        self._forgotten = forgotten
        self._values: dict[asyncio.AbstractEventLoop, T] = {}
        self._last: tuple[asyncio.AbstractEventLoop | None, T | None] = None, None

    def of(self, loop: asyncio.AbstractEventLoop) -> T:
        """Return the value of a loop."""
        last, value = self._last
        if last is loop and value is not None:
            return value
        value = self._values.get(loop)
        if value is None:
            for old in list(self._values):  # without a lock, which a fork could leave locked
                if old.is_closed():
                    gone = self._values.pop(old, None)
                    if gone is not None and self._forgotten is not None:
                        self._forgotten(gone)
            value = self._values[loop] = self._make(loop)
        self._last = loop, value
        return value

    def known(self, loop: asyncio.AbstractEventLoop) -> T | None:
        """Return the value of a loop, or None if it has none."""
        return self._values.get(loop)

    def all(self) -> list[T]:
        """Return the values of all loops that are not forgotten."""
        return list(self._values.values())


class OwnHandles:
    """What cachepipe itself has scheduled on a loop that does not concern the program.

    Args:
        loop: the event loop.

    Attributes:
        count: how many callbacks of its own are scheduled for the next turn.
        steps: how many lines of requests that wait for quiet look again in the next turn.
        ready: what is ready to run on the loop; None if this cannot be read.
    """

    __slots__ = ("_loop", "count", "ready", "steps")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.count = self.steps = 0
        # asyncio has no public test for an idle loop. Other loops, such as uvloop's, show no such queue.
        ready = getattr(loop, "_ready", None)
        self.ready = ready if isinstance(ready, deque) else None

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the next turn of the loop."""
        self.count += 1
        self._loop.call_soon(self._call, function, *arguments)

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        self.count -= 1
        function(*arguments)

    @property
    def alone(self) -> bool:
        """Whether nothing else is known to be ready to run on the loop, and no line waits for quiet.

        An eager task runs before the tasks after it exist, so with a task factory this is never known.
        """
        ready = self.ready
        return ready is not None and len(ready) <= self.count and self._loop.get_task_factory() is None


_own_handles = PerLoop(OwnHandles)


def own_handles(loop: asyncio.AbstractEventLoop) -> OwnHandles:
    """Return what cachepipe itself has scheduled on a loop."""
    return _own_handles.of(loop)
