"""The counts of a proxy since its start, by namespace, as JSON and for Prometheus."""

from __future__ import annotations

import hashlib
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from cachepipe import prices
from cachepipe.accounting import Account, Delivered, Seller, Usage, by_model, sums
from cachepipe.outages import public_url
from cachepipe.providers.generation import Kept
from cachepipe.proxy.upstream import UpstreamClient
from cachepipe.typedefs import Response

Outcome = Literal["hit", "miss", "partial", "passed", "left", "error", "refused"]
"""How requests end: all samples from the cache, none, some; passed through; client gone; error; refused."""

_MOST: Final = 1000  # namespaces with counts of their own
_LONGEST: Final = 200  # characters of a namespace in a label; longer ones end with a digest
_OTHERS: Final = "(others)"
_NONE: Final = "(none)"
_DELIVERED: Final = ("as_asked", "billed", "unstored")  # the accounts of `Delivered`
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 25.0, 100.0, math.inf)

_NOBODY: Final[Seller] = (None, "")


class Prices:
    """Unit prices, looked up once for each model and URL, because a look-up takes longer than many hits.

    If a model charges more for long prompts, the price of short ones is used.

    Args:
        given: the prices; None for the table.

    Attributes:
        given: those prices.
    """

    def __init__(self, given: prices.Prices | None = None) -> None:
        self.given = given or prices.TABLE
        self._known: dict[Seller, prices.UnitPrices | None] = {}
        self._wanted: set[Seller] = set()

    def seller(self, model: str | None, url: str) -> Seller:
        """Return the model and URL whose price to look up; `_NOBODY` if there are too many."""
        seller = (model, url)
        if seller not in self._known and seller not in self._wanted:
            if len(self._known) + len(self._wanted) >= _MOST:
                return _NOBODY
            self._wanted.add(seller)
        return seller

    def learn(self) -> None:
        """Look up the missing prices. Blocks. Thread-safe."""
        for seller in list(self._wanted):
            self._known[seller] = self.given.unit(*seller)
            self._wanted.discard(seller)

    def cost(self, counts: Mapping[str, int], model: str | None, url: str) -> float | None:
        """Return the cost in US dollars of token counts, or None if a price was not looked up."""
        return prices.cost_by_unit(counts, self._known.get((model, url)))


@dataclass
class Counts:
    """The counts of one namespace.

    Attributes:
        namespace: the namespace; None is one like any other.
        requests: requests that ended, by outcome.
        hits: samples that were stored, or generated for another request.
        misses: samples generated on behalf of the request that got them.
        delivered: tokens of the answered requests: as asked, billed and saved.
        spent: tokens of all samples that calls for the namespace's requests have returned.
        last: when the last request ended, in seconds since 1970.
    """

    namespace: str | None = None
    requests: Counter[str] = field(default_factory=Counter)
    hits: int = 0
    misses: int = 0
    delivered: Delivered = field(default_factory=Delivered)
    spent: Account = field(default_factory=Account)
    last: float = 0.0

    def join(self, other: Counts) -> None:
        """Add the counts of another namespace."""
        for outcome, number in other.requests.items():
            self.requests[outcome] += number
        self.hits += other.hits
        self.misses += other.misses
        self.delivered.join(other.delivered)
        self.spent.join(other.spent)
        self.last = max(self.last, other.last)

    def accounts(self) -> dict[str, Account]:
        """Return the sums of tokens by name."""
        return sums(self.spent, self.delivered)

    def dump(self) -> dict[str, Any]:
        """Return the counts as JSON can hold them; see `load`."""
        delivered = self.delivered
        sums = {name: getattr(delivered, name).rows() for name in _DELIVERED}
        return {
            "namespace": self.namespace,
            "requests": self.requests,
            "hits": self.hits,
            "misses": self.misses,
            "delivered": [delivered.requests, sums],
            "spent": self.spent.rows(),
            "last": self.last,
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> Self:
        """Return the counts that ``dump`` has written."""
        requests, sums = dumped["delivered"]
        delivered = Delivered(requests, **{name: Account.of(sums[name]) for name in _DELIVERED})
        counted = Counter(dumped["requests"])
        spent = Account.of(dumped["spent"])
        plain = {name: dumped[name] for name in ("namespace", "hits", "misses", "last")}
        return cls(requests=counted, delivered=delivered, spent=spent, **plain)

    def as_json(self, known: Prices) -> dict[str, Any]:
        """Return the counts by name, with the cost of the tokens if it is known."""
        return {
            "namespace": self.namespace,
            "requests": dict(self.requests),
            "hits": self.hits,
            "misses": self.misses,
            **{name: account.as_dict(known.cost) for name, account in self.accounts().items()},
            "last": self.last,
        }


def _label_of(namespace: str) -> str:
    """Return a namespace as a unique label, in quotes if it would look like `_NONE`."""
    encoded = namespace.encode(errors="backslashreplace")
    text = encoded.decode()
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"
    return f'"{text}"' if text[:1] in ("(", '"') and namespace != _OTHERS else text


class Durations:
    """How long requests took: how many there are in each interval of `_SECONDS`, and their sum."""

    def __init__(self, counts: Sequence[int] = (0,) * len(_SECONDS), total: float = 0.0) -> None:
        self.counts = list(counts)
        self.total = total

    def observe(self, seconds: float) -> None:
        """Add a request."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def join(self, other: Durations) -> None:
        """Add the requests of others."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def metric(self) -> Metric:
        """Return the durations in Prometheus' form."""
        buckets: list[tuple[str, float]] = []
        number = 0
        for most, count in zip(_SECONDS, self.counts, strict=True):
            number += count
            buckets.append((str(floatToGoString(most)), number))  # type: ignore[no-untyped-call]
        return HistogramMetricFamily(
            "cachepipe_proxy_call_seconds",
            "Seconds from a request's arrival to its last byte, of those that were not hits.",
            buckets=buckets,
            sum_value=self.total,
        )


class Totals:
    """The counts of a proxy, or of several worker processes of it.

    Attributes:
        prices: the prices of tokens.
        started: when the counting began, in seconds since 1970.
        calls: calls made, by upstream.
        running: calls in flight, by upstream.
        in_flight: requests in flight.
        background: calls in flight for clients that have gone.
        namespaces: the counts by namespace.
        seconds: how long requests took that were not hits.
    """

    def __init__(
        self, prices: Prices, started: float, calls: dict[str, int], running: dict[str, int]
    ) -> None:
        self.prices = prices
        self.started = started
        self.calls = calls
        self.running = running
        self.in_flight = 0
        self.background = 0
        self.namespaces: dict[str | None, Counts] = {}
        self.seconds = Durations()

    def dump(self) -> dict[str, Any]:
        """Return the counts as JSON can hold them; see `load`."""
        plain = ("started", "calls", "running", "in_flight", "background")
        return {
            **{name: getattr(self, name) for name in plain},
            "namespaces": [counts.dump() for counts in self.namespaces.values()],
            "seconds": [self.seconds.counts, self.seconds.total],
        }

    @classmethod
    def load(cls, dumped: Mapping[str, Any], prices: Prices) -> Totals:
        """Return the counts that ``dump`` has written, in this process or in another one."""
        made = Totals(prices, dumped["started"], dumped["calls"], dumped["running"])
        made.in_flight, made.background = dumped["in_flight"], dumped["background"]
        for each in dumped["namespaces"]:
            counts = made.namespaces[each["namespace"]] = Counts.load(each)
            for account in (counts.spent, counts.delivered.as_asked):
                for model, url in account.sold:
                    prices.seller(model, url)
        made.seconds = Durations(*dumped["seconds"])
        return made

    def join(self, other: Totals) -> None:
        """Add the counts of another process."""
        self.started = min(self.started, other.started)
        self.in_flight += other.in_flight
        self.background += other.background
        for mine, theirs in ((self.calls, other.calls), (self.running, other.running)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number
        for namespace, counts in other.namespaces.items():
            self.of(namespace).join(counts)
        self.seconds.join(other.seconds)

    def of(self, namespace: str | None) -> Counts:
        """Return the counts of a namespace; further namespaces share one entry."""
        counts = self.namespaces.get(namespace)
        if counts is None:
            if len(self.namespaces) >= _MOST:
                namespace = _OTHERS
            counts = self.namespaces.setdefault(namespace, Counts(namespace))
        return counts

    def as_json(self) -> dict[str, Any]:
        """Return all counts: totals, and per namespace the latest first."""
        each = sorted(self.namespaces.values(), key=lambda counts: -counts.last)
        totals = Counts()
        for counts in each:
            totals.join(counts)
        total = totals.as_json(self.prices)
        del total["namespace"]
        total["models"] = by_model(totals.accounts(), self.prices.cost)
        return {
            "started": self.started,
            "in_flight": self.in_flight,
            "background": self.background,
            "upstreams": [
                {"name": name, "calls": calls, "in_flight": self.running[name]}
                for name, calls in self.calls.items()
            ],
            "total": total,
            "namespaces": [counts.as_json(self.prices) for counts in each],
        }

    # Prometheus.

    def metrics(self) -> bytes:
        """Return the counts in Prometheus' text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """Iterate over the counts in Prometheus' form."""
        requests = CounterMetricFamily(
            "cachepipe_proxy_requests", "Requests that ended, by outcome.", labels=("namespace", "outcome")
        )
        samples = CounterMetricFamily(
            "cachepipe_proxy_samples",
            "Samples delivered, from the cache or generated for the request.",
            labels=("namespace", "from"),
        )
        tokens = CounterMetricFamily(
            "cachepipe_proxy_tokens",
            "Tokens spent, billed, as asked, saved (as asked less billed), unreported (spent less billed).",
            labels=("namespace", "of", "sum"),
        )
        costs = GaugeMetricFamily(
            "cachepipe_proxy_cost_dollars",
            "US dollars spent, billed, as asked, saved and unreported, of the samples whose price is known.",
            labels=("namespace", "sum"),
        )
        for namespace, counts in self.namespaces.items():
            name = _NONE if namespace is None else _label_of(namespace)
            for outcome, number in counts.requests.items():
                requests.add_metric((name, outcome), number)
            samples.add_metric((name, "cache"), counts.hits)
            samples.add_metric((name, "upstream"), counts.misses)
            for word, account in counts.accounts().items():
                sums = account.counts()
                cost, _ = account.cost(self.prices.cost)
                if cost is not None:
                    costs.add_metric((name, word), cost)
                tokens.add_metric((name, "prompt", word), sums["prompt_tokens"])
                tokens.add_metric((name, "completion", word), sums["completion_tokens"])
        calls = CounterMetricFamily("cachepipe_proxy_calls", "Calls to an upstream.", labels=("upstream",))
        running = GaugeMetricFamily(
            "cachepipe_proxy_calls_in_flight", "Calls to an upstream in flight.", labels=("upstream",)
        )
        for name, number in self.calls.items():
            calls.add_metric((name,), number)
            running.add_metric((name,), self.running[name])
        flight = GaugeMetricFamily(
            "cachepipe_proxy_requests_in_flight", "Requests now.", value=self.in_flight
        )
        background = GaugeMetricFamily(
            "cachepipe_proxy_abandoned_in_flight",
            "Calls in flight for clients that have gone.",
            value=self.background,
        )
        each = requests, samples, tokens, costs, calls, running, flight, background
        yield from (self.seconds.metric(), *each)


class Counters(Totals):
    """The counts of this process.

    Args:
        client: its connections, which count the calls.
        given: the prices of tokens; None for the table.
        clock: tells the time in seconds since 1970.
    """

    def __init__(
        self, client: UpstreamClient, given: prices.Prices | None = None, clock: Any = time.time
    ) -> None:
        super().__init__(Prices(given), clock(), client.calls, client.in_flight)
        self.clock = clock

    def ended(self, namespace: str | None, outcome: Outcome) -> Counts:
        """Count the end of a request; return the counts of its namespace."""
        counts = self.of(namespace)
        counts.requests[outcome] += 1
        counts.last = self.clock()
        return counts

    def received(self, namespace: str | None, responses: Sequence[Response], url: str) -> None:
        """Count the samples that a request received; the URL is the upstream's."""
        counts = self.of(namespace)
        for response in responses:
            cached = response.cached or [False] * len(response.data)
            self._deliver(counts, response.data, cached, url)

    def hit(self, namespace: str | None, sample: Kept, url: str) -> None:
        """Count a request that received a stored sample, and its end."""
        self._deliver(self.ended(namespace, "hit"), (sample,), (True,), url)

    def spend(self, namespace: str | None, usages: Sequence[Usage], url: str) -> None:
        """Count the samples of a call for a request, whichever request gets them."""
        usages, url = self._priced(usages, url)
        self.of(namespace).spent.spend(usages, url)

    def _deliver(self, counts: Counts, samples: Sequence[Kept], cached: Sequence[bool], url: str) -> None:
        counts.hits += sum(cached)
        counts.misses += len(cached) - sum(cached)
        usages, url = self._priced([sample.usage for sample in samples], url)
        counts.delivered.add(usages, cached, url)

    def _priced(self, usages: Sequence[Usage], url: str) -> tuple[Sequence[Usage], str]:
        """Return usages and the URL for their sums; no URL if too many models were counted.

        The URL has no query, which may hold a key.
        """
        url = public_url(url)
        for usage in usages:
            if self.prices.seller(usage.model, usage.url or url) == _NOBODY:
                return [each._replace(model=None, url=None) for each in usages], ""
        return usages, url
