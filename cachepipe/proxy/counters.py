"""What a proxy has done since it was started: counted by namespace, shown as JSON and to Prometheus."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cachepipe import prices, wire
from cachepipe.clients.exchange import Kept
from cachepipe.proxy.upstream import Caller
from cachepipe.typedefs import Response

Outcome = Literal["hit", "miss", "partial", "passed", "left", "error", "refused"]
"""How a request ended: all from the cache, none, some; passed through; its client gone; error; refused."""

_MOST: Final = 1000  # namespaces that are counted by themselves
_USAGES: Final = 20_000  # samples whose usage is remembered, a quarter of a kilobyte each
_LONGEST: Final = 200  # characters of a label that are a namespace's own
_OTHERS: Final = "(others)"
_UNIT: Final = 1000  # tokens of which a price is asked
_NONE: Final = "(none)"
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 25.0, 100.0)

Seller = tuple[str | None, str]
"""A model, and the URL where it answers."""

_NOBODY: Final[Seller] = (None, "")


@dataclass
class Tokens:
    """Token counts, as the samples' usage tells them."""

    prompt: int = 0
    completion: int = 0
    total: int = 0
    cached: int = 0

    def add(self, prompt: int, completion: int, total: int, cached: int) -> None:
        """Add counts; the cached tokens are those of the prompt that a provider's own cache had."""
        self.prompt += prompt
        self.completion += completion
        self.total += total
        self.cached += cached


@dataclass
class Account:
    """Tokens that were spent, or saved: by who sells them."""

    sold: dict[Seller, Tokens] = field(default_factory=dict)

    def add(self, seller: Seller, prompt: int, completion: int, total: int, cached: int) -> None:
        """Add counts."""
        tokens = self.sold.get(seller)
        if tokens is None:
            tokens = self.sold[seller] = Tokens()
        tokens.add(prompt, completion, total, cached)

    def join(self, other: Account) -> None:
        """Add all of another account."""
        for seller, tokens in other.sold.items():
            self.add(seller, tokens.prompt, tokens.completion, tokens.total, tokens.cached)

    @property
    def tokens(self) -> Tokens:
        """All of them."""
        tokens = Tokens()
        for each in self.sold.values():
            tokens.add(each.prompt, each.completion, each.total, each.cached)
        return tokens


class _Usage(NamedTuple):
    """The tokens of a sample, whether its prompt was billed with it, and the model that it names."""

    prompt: int
    completion: int
    total: int
    cached: int
    billed: bool
    model: str | None


def _usage(kept: Kept) -> _Usage:
    sample: dict[str, Any] = kept.value
    usage: Any = sample.get("usage")
    model = sample.get("model")
    model = model if isinstance(model, str) else None
    try:  # as most say it
        prompt, completion, total = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") or 0 if details else 0
    except (AttributeError, KeyError, TypeError):
        logical, _ = wire.usage_totals([sample])
        prompt, completion = logical["prompt_tokens"], logical["completion_tokens"]
        total, cached = logical["total_tokens"], logical["cached_tokens"]
    if not type(prompt) is type(completion) is type(total) is type(cached) is int:
        return _Usage(0, 0, 0, 0, True, model)
    return _Usage(prompt, completion, total, cached, wire.bills_prompt(sample), model)


class Prices:
    """Unit prices, looked up once for each model and URL: a look takes longer than many hits.

    A model whose long prompts cost more is counted at the price of short ones.
    """

    def __init__(self) -> None:
        self._known: dict[Seller, tuple[float, float, float] | None] = {}
        self._wanted: set[Seller] = set()

    def seller(self, model: str | None, url: str) -> Seller:
        """Return whose price to look up; from a certain number of them on, nobody's."""
        seller = (model, url)
        if seller not in self._known and seller not in self._wanted:
            if len(self._known) + len(self._wanted) >= _MOST:
                return _NOBODY
            self._wanted.add(seller)
        return seller

    def learn(self) -> None:
        """Look up what is wanted; it blocks, and may be called from any thread."""
        for seller in list(self._wanted):
            each = (
                {"prompt_tokens": _UNIT},
                {"prompt_tokens": _UNIT, "cached_tokens": _UNIT},
                {"completion_tokens": _UNIT},
            )
            costs = [prices.cost_of(counts, *seller) for counts in each]
            known = [cost / _UNIT for cost in costs if cost is not None]
            self._known[seller] = (known[0], known[1], known[2]) if len(known) == 3 else None
            self._wanted.discard(seller)

    def total(self, sold: Mapping[Seller, Tokens]) -> dict[str, Any]:
        """Return the cost in US dollars of what has a known price, None without any; and the other tokens."""
        cost, unpriced = None, 0
        for seller, tokens in sold.items():
            price = self._known.get(seller)
            if price is None:
                unpriced += tokens.total
                continue
            fresh = tokens.prompt - tokens.cached
            parts = fresh * price[0] + tokens.cached * price[1] + tokens.completion * price[2]
            cost = parts + (cost or 0.0)
        return {"cost": cost, "unpriced": unpriced}


@dataclass
class Counts:
    """What was done for one namespace.

    Attributes:
        namespace: the namespace; None is one like any other.
        requests: requests that ended, by how.
        hits: samples that were there, or were generated for another request.
        misses: samples generated on behalf of the request that got them.
        spent: tokens that were paid for.
        saved: tokens that the cache, and merging calls, have saved.
        last: when the last request ended, in seconds since 1970.
    """

    namespace: str | None = None
    requests: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    spent: Account = field(default_factory=Account)
    saved: Account = field(default_factory=Account)
    last: float = 0.0

    def as_json(self, known: Prices) -> dict[str, Any]:
        """Return the counts by name, with what the tokens cost where that is known."""
        accounts = {
            name: {**asdict(account.tokens), **known.total(account.sold)}
            for name, account in (("spent", self.spent), ("saved", self.saved))
        }
        return {
            "namespace": self.namespace,
            "requests": dict(self.requests),
            "hits": self.hits,
            "misses": self.misses,
            **accounts,
            "last": self.last,
        }


def _labelled(namespace: str) -> str:
    """Return a namespace as a label, none for two of them: in quotes where it could be taken for `_NONE`."""
    encoded = namespace.encode(errors="backslashreplace")
    text = encoded.decode()
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"
    return f'"{text}"' if text[:1] in ("(", '"') and namespace != _OTHERS else text


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
        self.prices = Prices()
        self._usages: dict[tuple[str, int], _Usage] = {}
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

    def drew(self, namespace: str | None, responses: Sequence[Response], url: str) -> None:
        """Count what a request was given; the URL is the one that it would go to."""
        counts = self.of(namespace)
        for response in responses:
            indices = response.indices or (None,) * len(response.data)
            for sample, cached, index in zip(response.data, response.cached or (), indices, strict=True):
                if cached and index is not None and response.key is not None:
                    self.hit(namespace, response.key, index, sample, url)
                    continue
                usage = _usage(sample)
                seller = self.prices.seller(usage.model, url)
                if cached:
                    counts.hits += 1
                    counts.saved.add(seller, usage.prompt, usage.completion, usage.total, usage.cached)
                elif usage.billed:
                    counts.misses += 1
                    counts.spent.add(seller, usage.prompt, usage.completion, usage.total, usage.cached)
                else:  # its prompt was billed with another sample
                    counts.misses += 1
                    counts.spent.add(seller, 0, usage.completion, usage.total - usage.prompt, 0)
                    counts.saved.add(seller, usage.prompt, 0, usage.prompt, usage.cached)

    def hit(self, namespace: str | None, key: str, index: int, sample: Kept, url: str) -> None:
        """Count a sample that was there, by its place: its usage is read once."""
        usage = self._usages.get((key, index))
        if usage is None:
            if len(self._usages) >= _USAGES:
                self._usages.clear()
            usage = self._usages[key, index] = _usage(sample)
        counts = self.of(namespace)
        counts.hits += 1
        seller = self.prices.seller(usage.model, url)
        counts.saved.add(seller, usage.prompt, usage.completion, usage.total, usage.cached)

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
            totals.spent.join(counts.spent)
            totals.saved.join(counts.saved)
        total = totals.as_json(self.prices)
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
            "namespaces": [counts.as_json(self.prices) for counts in each],
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
            name = _NONE if namespace is None else _labelled(namespace)
            for outcome, number in counts.requests.items():
                requests.add_metric((name, outcome), number)
            samples.add_metric((name, "cache"), counts.hits)
            samples.add_metric((name, "upstream"), counts.misses)
            for fate, counted in (("spent", counts.spent.tokens), ("saved", counts.saved.tokens)):
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
