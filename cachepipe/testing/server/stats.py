"""What a mock server counts."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, NamedTuple

__all__ = ["LogEntry", "MockStats"]


class LogEntry(NamedTuple):
    """One request after its end: its arrival (Unix time), its question and its outcome."""

    time: float
    path: str
    status: int
    n: int
    stream: bool
    fault: str | None
    seconds: float


class MockStats:
    """What a server has served since it started, or since the last reset.

    Attributes:
        requests: All requests, except those under ``/mock``.
        by_path: The number of requests by path and status. A status of 0 is a connection that the
            server dropped, 499 one that the client left. Unknown paths count as ``"other"``.
        samples_generated: Choices (or embeddings) that the model generated.
        samples_delivered: Those of them that were sent completely, in a valid reply.
        tokens_in: Tokens of the answered prompts.
        tokens_out: Tokens of all generated samples.
        streams: Requests answered by a stream.
        faults: The number of faults by kind.
        in_flight: Requests that are being answered.
        max_in_flight: The largest number of them at once.
        connections: Open connections.
        max_connections: The largest number of them at once.
        log: The latest requests, oldest first.
    """

    def __init__(self, log_size: int = 10_000) -> None:
        self.in_flight = 0
        self.connections = 0
        self.log: deque[LogEntry] = deque(maxlen=log_size)
        self.reset()

    def reset(self) -> None:
        """Count from zero; requests in flight and open connections stay counted."""
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
            f"<MockStats {self.requests} requests, {self.in_flight} in flight, "
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
