"""What a mock server counts."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple

__all__ = ["LogEntry", "Stats"]


class LogEntry(NamedTuple):
    """One request as it ended: when it arrived (Unix time), what it asked, and what became of it."""

    time: float
    path: str
    status: int
    n: int
    stream: bool
    fault: str | None
    seconds: float


class Stats:
    """What a server has served since it started, or since the last reset.

    Attributes:
        requests: All requests, except those under ``/mock``.
        by_path: How often each path got each status. A status of 0 stands for a connection that the
            server dropped, 499 for one that the client left. Paths that do not exist count as ``"other"``.
        samples_generated: Choices (or embeddings) that the model made.
        samples_delivered: Those of them that were sent to the end in a reply that is in order.
        tokens_in: Tokens of the prompts answered.
        tokens_out: Tokens of all samples generated.
        streams: Requests answered by a stream.
        faults: How often each kind of fault struck.
        in_flight: Requests being answered now.
        max_in_flight: The most there were at once.
        connections: Connections open now.
        max_connections: The most there were at once.
        log: The latest requests, oldest first.
    """

    def __init__(self, log_size: int = 10_000) -> None:
        self.in_flight = 0
        self.connections = 0
        self.log: deque[LogEntry] = deque(maxlen=log_size)
        self.reset()

    def reset(self) -> None:
        """Count from zero. What is under way goes on being under way."""
        self.requests = 0
        self.by_path: dict[str, Counter[int]] = {}
        self.samples_generated = 0
        self.samples_delivered = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self.streams = 0
        self.faults: Counter[str] = Counter()
        self.max_in_flight = self.in_flight
        self.max_connections = self.connections
        self.log.clear()

    def __repr__(self) -> str:
        return (
            f"<Stats {self.requests} requests, {self.in_flight} in flight, "
            f"{self.samples_delivered} of {self.samples_generated} samples delivered>"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counters by name, the log as a list of objects."""
        return {
            "requests": self.requests,
            "by_path": {
                path: {str(status): count for status, count in sorted(counts.items())}
                for path, counts in sorted(self.by_path.items())
            },
            "samples_generated": self.samples_generated,
            "samples_delivered": self.samples_delivered,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "streams": self.streams,
            "faults": dict(sorted(self.faults.items())),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": self.connections,
            "max_connections": self.max_connections,
            "log": [entry._asdict() for entry in list(self.log)],
        }
