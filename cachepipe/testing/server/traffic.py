"""The open connections of a server, its requests in flight, and the tasks that wait for its counters."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cachepipe.testing.server.dialects import DIALECTS, EMBEDDINGS, MODELS, unprefixed
from cachepipe.testing.server.stats import LogEntry, MockStats

if TYPE_CHECKING:
    from cachepipe.testing.server.connection import HttpConnection
    from cachepipe.testing.server.replies import HttpReply, HttpRequest

__all__ = ["Traffic"]

_KNOWN: Final = frozenset({*DIALECTS, EMBEDDINGS, MODELS})


class Traffic:
    """Counts connections and requests and wakes tasks that wait for a count, on one event loop.

    Attributes:
        stats: The counters.
        connections: The open connections.
        closing: True once no more connections are accepted.
    """

    def __init__(self, stats: MockStats) -> None:
        self.stats = stats
        self.connections: set[HttpConnection] = set()
        self.closing = False
        self._watchers: list[tuple[Callable[[MockStats], bool], asyncio.Event]] = []

    async def until(self, condition: Callable[[MockStats], bool]) -> None:
        """Wait until the counters meet a condition."""
        while not condition(self.stats):
            event = asyncio.Event()
            self._watchers.append((condition, event))
            await event.wait()

    def opened(self, connection: HttpConnection) -> None:
        """Count a new connection."""
        self.connections.add(connection)
        self.stats.connections += 1
        self.stats.max_connections = max(self.stats.max_connections, self.stats.connections)
        self._changed()

    def closed(self, connection: HttpConnection) -> None:
        """Count a closed connection."""
        self.connections.discard(connection)
        self.stats.connections -= 1
        self._changed()

    def begun(self, request: HttpRequest) -> None:
        """Count a request that is being answered."""
        if _controls(request):
            return
        stats = self.stats
        stats.requests += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        self._changed()

    def ended(self, request: HttpRequest, reply: HttpReply, status: int) -> None:
        """Count a request that was answered, or that its client left (status 499)."""
        if _controls(request):
            return
        stats, path = self.stats, request.path
        if path not in _KNOWN:
            path = unprefixed(path)
        if path not in _KNOWN:
            path = f"{MODELS}/{{id}}" if path.startswith(f"{MODELS}/") else "other"
        stats.in_flight -= 1
        stats.by_path.setdefault(path, Counter())[status] += 1
        if status == 200:
            stats.samples_delivered += reply.samples
        seconds = time.perf_counter() - request.since
        stats.log.append(LogEntry(request.arrived, path, status, reply.n, reply.stream, reply.fault, seconds))
        self._changed()

    def _changed(self) -> None:
        """Wake the tasks whose condition the counters meet now."""
        if self._watchers:
            met = [watcher for watcher in self._watchers if watcher[0](self.stats)]
            for watcher in met:
                self._watchers.remove(watcher)
                watcher[1].set()


def _controls(request: HttpRequest) -> bool:
    """Return True for a request that controls the mock server; those are not counted."""
    return request.path.startswith("/mock/")
