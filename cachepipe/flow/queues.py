"""The queue of the calls that wait for a model: fair between namespaces. Pure.

It uses start-time fair queueing (Goyal et al. 1996). The calls of one namespace form a *line*. The first call
of each line has a tag: the virtual time at which its namespace would have its turn. The lowest tag goes
first. So a namespace that wants little waits for about one call of each other namespace, however many calls
these have queued.

A call gets its tag when it becomes the first of its line. So a call that gives up before has cost its line
nothing.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

_MANY = 1000  # lines from which on empty ones are removed


class Place:
    """A place in a queue.

    Args:
        loop: the event loop of the caller.
        number: grows from place to place; it decides between equal tags.
        rank: 0 in a line; places with a higher rank go before all lines, the highest first.

    Attributes:
        left: whether the caller has given up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int, rank: int) -> None:
        self.loop = loop
        self.number = number
        self.rank = rank
        self.line: _Line[Any] | None = None
        self.left = False

    @property
    def gone(self) -> bool:
        """Whether nobody waits for this place any more."""
        return self.left or self.loop.is_closed()

    @property
    def order(self) -> tuple[int, float, int]:
        """The order of the first places of queues."""
        return -self.rank, 0.0 if self.line is None else self.line.start, self.number

    def __lt__(self, other: Place) -> bool:
        return self.order < other.order


T = TypeVar("T", bound=Place)


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """The calls of one namespace, in order.

    Attributes:
        start: the tag of its first call.
        finish: the tag of the call after the last one that was let go.
        waiting: the calls.
    """

    start: float = 0.0
    finish: float = 0.0
    waiting: deque[T] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """The calls that wait for one model."""

    def __init__(self) -> None:
        self.lines: dict[str | None, _Line[T]] = {}
        self._ahead: list[T] = []  # a heap of the places that go before all lines
        self._heads: list[tuple[float, int, _Line[T]]] = []  # a heap of the lines that are not empty, by tag
        self._many = _MANY

    def __iter__(self) -> Iterator[T]:
        """Iterate over all calls that wait, in no order."""
        yield from (place for place in self._ahead if not place.gone)
        for _, _, line in self._heads:
            yield from (place for place in line.waiting if not place.gone)

    def add(self, place: T, namespace: str | None, virtual: float) -> None:
        """Add a call.

        Args:
            place: its place.
            namespace: the namespace of the call.
            virtual: the virtual time.
        """
        if place.rank:
            heapq.heappush(self._ahead, place)
            return
        line = place.line = self._line(namespace, virtual)
        line.waiting.append(place)
        if len(line.waiting) == 1:
            line.start = max(virtual, line.finish)
            heapq.heappush(self._heads, (line.start, place.number, line))

    def first(self) -> T | None:
        """Return the call that goes next, or None."""
        while self._ahead:
            if not self._ahead[0].gone:
                return self._ahead[0]
            heapq.heappop(self._ahead)
        while self._heads:
            line = self._heads[0][2]
            while line.waiting and line.waiting[0].gone:
                line.waiting.popleft()
            if line.waiting:
                return line.waiting[0]
            heapq.heappop(self._heads)
        return None

    def pop(self, cost: float) -> None:
        """Remove the call that `first` has returned, at a cost to its line in virtual time."""
        if self._ahead:
            heapq.heappop(self._ahead)
            return
        line = self._heads[0][2]
        line.waiting.popleft()
        line.finish = line.start + cost
        if line.waiting:
            line.start = line.finish
            heapq.heapreplace(self._heads, (line.start, line.waiting[0].number, line))
        else:
            heapq.heappop(self._heads)

    def _line(self, namespace: str | None, virtual: float) -> _Line[T]:
        """Return the line of a namespace; now and then, remove the lines that are over."""
        line = self.lines.get(namespace)
        if line is None:
            if len(self.lines) >= self._many:
                self.lines = {
                    name: line for name, line in self.lines.items() if line.waiting or line.finish > virtual
                }
                self._many = max(_MANY, 2 * len(self.lines))
            line = self.lines[namespace] = _Line()
        return line
