"""What a proxy has done since it was started: counted by namespace, shown as JSON and to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import orjson
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cachepipe import wire
from cachepipe.proxy.upstream import Caller
from cachepipe.typedefs import Response

Outcome = Literal["hit", "miss", "partial", "passed", "error", "refused"]
"""How a request ended: all from the cache, none, some; passed through; with an error; or refused here."""

_MOST: Final = 1000  # namespaces that are counted by themselves
_OTHERS: Final = "(others)"
_NONE: Final = "(none)"
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 25.0, 100.0)


@dataclass
class Tokens:
    """Token counts, as the samples' usage tells them."""

    prompt: int = 0
    completion: int = 0
    total: int = 0

    def add(self, prompt: int, completion: int, total: int) -> None:
        """Add counts."""
        self.prompt += prompt
        self.completion += completion
        self.total += total


def _tokens(payload: bytes) -> tuple[int, int, int, bool]:
    """Return the tokens of a sample: prompt, completion, total; and whether its prompt was billed with it."""
    sample = orjson.loads(payload)
    usage = sample.get("usage")
    try:  # as most say it
        prompt, completion, total = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
    except (KeyError, TypeError):
        logical, _ = wire.usage_totals([sample])
        prompt, completion = logical["prompt_tokens"], logical["completion_tokens"]
        total = logical["total_tokens"]
    if not type(prompt) is type(completion) is type(total) is int:
        return 0, 0, 0, True
    return prompt, completion, total, wire.bills_prompt(sample)


@dataclass
class Counts:
    """What was done for one namespace.

    Attributes:
        namespace: the namespace; None is one like any other.
        requests: requests that ended, by how.
        hits: samples that were there, or were generated for another request.
        misses: samples generated on behalf of the request that got them.
        spent: tokens that were paid for.
        saved: tokens that the cache has saved.
        last: when the last request ended, in seconds since 1970.
    """

    namespace: str | None = None
    requests: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    spent: Tokens = field(default_factory=Tokens)
    saved: Tokens = field(default_factory=Tokens)
    last: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the counts by name."""
        return asdict(self)


class Counters:
    """The counts of a proxy.

    Args:
        caller: its connections, which count the calls.
        clock: tells the time in seconds since 1970.
    """

    def __init__(self, caller: Caller, clock: Any = time.time) -> None:
        self.caller = caller
        self.clock = clock
        self.started: float = clock()
        self.in_flight = 0
        self.background = 0
        self.namespaces: dict[str | None, Counts] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        self.seconds = Histogram(
            "cachepipe_proxy_call_seconds",
            "Seconds from a request's arrival to its last byte, of those that were not hits.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def of(self, namespace: str | None) -> Counts:
        """Return the counts of a namespace; from a certain number of them on, those of all others."""
        counts = self.namespaces.get(namespace)
        if counts is None:
            if len(self.namespaces) >= _MOST:
                namespace = _OTHERS
            counts = self.namespaces.setdefault(namespace, Counts(namespace))
        return counts

    def ended(self, namespace: str | None, outcome: Outcome) -> Counts:
        """Count the end of a request."""
        counts = self.of(namespace)
        counts.requests[outcome] = counts.requests.get(outcome, 0) + 1
        counts.last = self.clock()
        return counts

    def drew(self, namespace: str | None, responses: Sequence[Response]) -> None:
        """Count what a request was given."""
        counts = self.of(namespace)
        for response in responses:
            for sample, cached in zip(response.data, response.cached or (), strict=True):
                if cached:
                    counts.hits += 1
                    counts.saved.add(*_tokens(sample.payload)[:3])
                else:
                    counts.misses += 1
                    prompt, completion, total, billed = _tokens(sample.payload)
                    shared = 0 if billed else prompt
                    counts.spent.add(prompt - shared, completion, total - shared)
                    counts.saved.add(shared, 0, shared)

    def as_json(self) -> dict[str, Any]:
        """Return all counts: totals, and per namespace the latest first."""
        each = sorted(self.namespaces.values(), key=lambda counts: -counts.last)
        totals = Counts()
        for counts in each:
            totals.hits += counts.hits
            totals.misses += counts.misses
            totals.last = max(totals.last, counts.last)
            for outcome, number in counts.requests.items():
                totals.requests[outcome] = totals.requests.get(outcome, 0) + number
            for name in ("spent", "saved"):
                part: Tokens = getattr(counts, name)
                getattr(totals, name).add(part.prompt, part.completion, part.total)
        total = totals.as_json()
        del total["namespace"]
        return {
            "started": self.started,
            "in_flight": self.in_flight,
            "background": self.background,
            "upstreams": [
                {"name": name, "calls": calls, "in_flight": self.caller.in_flight[name]}
                for name, calls in self.caller.calls.items()
            ],
            "total": total,
            "namespaces": [counts.as_json() for counts in each],
        }

    # Prometheus.

    def metrics(self) -> bytes:
        """Return the counts in Prometheus' text format."""
        text: bytes = generate_latest(self.registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """Iterate over the counts as Prometheus has them."""
        requests = CounterMetricFamily(
            "cachepipe_proxy_requests", "Requests that ended, by how.", labels=("namespace", "outcome")
        )
        samples = CounterMetricFamily(
            "cachepipe_proxy_samples",
            "Samples delivered, from the cache or generated for the request.",
            labels=("namespace", "from"),
        )
        tokens = CounterMetricFamily(
            "cachepipe_proxy_tokens", "Tokens spent and saved.", labels=("namespace", "of", "fate")
        )
        for namespace, counts in self.namespaces.items():
            name = _NONE if namespace is None else namespace.encode(errors="replace").decode()
            for outcome, number in counts.requests.items():
                requests.add_metric((name, outcome), number)
            samples.add_metric((name, "cache"), counts.hits)
            samples.add_metric((name, "upstream"), counts.misses)
            for fate, counted in (("spent", counts.spent), ("saved", counts.saved)):
                tokens.add_metric((name, "prompt", fate), counted.prompt)
                tokens.add_metric((name, "completion", fate), counted.completion)
        calls = CounterMetricFamily("cachepipe_proxy_calls", "Calls to an upstream.", labels=("upstream",))
        running = GaugeMetricFamily(
            "cachepipe_proxy_calls_in_flight", "Calls to an upstream now.", labels=("upstream",)
        )
        for name, number in self.caller.calls.items():
            calls.add_metric((name,), number)
            running.add_metric((name,), self.caller.in_flight[name])
        flight = GaugeMetricFamily("cachepipe_proxy_requests_in_flight", "Requests now.")
        flight.add_metric((), self.in_flight)
        background = GaugeMetricFamily(
            "cachepipe_proxy_abandoned_in_flight", "Answers being fetched whose client has gone."
        )
        background.add_metric((), self.background)
        yield from (requests, samples, tokens, calls, running, flight, background)
