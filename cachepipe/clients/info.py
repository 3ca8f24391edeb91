"""What can be told of a response beside the response itself, which stays as the SDK makes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cachepipe import prices, wire
from cachepipe.typedefs import Response


class Spent(NamedTuple):
    """The token counts of the samples of one model: of all, and of those that the request was billed."""

    model: str | None
    url: str
    usage: Mapping[str, int]
    billed: Mapping[str, int]


@dataclass(frozen=True)
class Info:
    """Where the samples of a response came from.

    Attributes:
        key: the key of the question; of several questions, of the first.
        keys: the key of each question of the request.
        namespace: the namespace that drew the samples.
        request_id: the request id of the draw.
        complete: whether all samples are there; a stream's are when it has come to its end.
        cached: per sample, False exactly when it was generated on this request's behalf.
        duplicated: per sample, whether it was merged into the equal requests of its namespace that were
            served in the same turn of the event loop, and is not the first sample of theirs.
        indices: per sample, its index in the sample list of its key; None while that is not known.
        usage: token counts of all samples, as if each had been asked for alone.
        billed: token counts of those that were generated on this request's behalf.
        spent: both by model, for their price.
    """

    key: str
    keys: tuple[str, ...]
    namespace: str | None
    request_id: str | None
    complete: bool = True
    cached: tuple[bool, ...] = ()
    duplicated: tuple[bool, ...] = ()
    indices: tuple[int, ...] | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    billed: Mapping[str, int] = field(default_factory=dict)
    spent: tuple[Spent, ...] = field(default=(), repr=False)

    @property
    def saved(self) -> dict[str, int]:
        """The token counts that the cache has saved: those of ``usage`` less those of ``billed``."""
        return {name: count - self.billed.get(name, 0) for name, count in self.usage.items()}

    @property
    def cost(self) -> float | None:
        """The price of ``usage`` in US dollars; None where it is not known (see `cachepipe.prices`)."""
        return self._sum([prices.cost_of(spent.usage, spent.model, spent.url) for spent in self.spent])

    @property
    def billed_cost(self) -> float | None:
        """The price of ``billed`` in US dollars; None where it is not known."""
        return self._sum([prices.cost_of(spent.billed, spent.model, spent.url) for spent in self.spent])

    @property
    def saved_cost(self) -> float | None:
        """What the cache has saved in US dollars; None where that is not known."""
        whole, billed = self.cost, self.billed_cost
        return None if whole is None or billed is None else whole - billed

    def _sum(self, costs: Sequence[float | None]) -> float | None:
        known = [cost for cost in costs if cost is not None]
        return sum(known) if costs and len(known) == len(costs) and not self.usage["unknown"] else None


class Record:
    """What is known of a request so far."""

    def __init__(
        self, keys: tuple[str, ...], namespace: str | None, request_id: str | None, url: str
    ) -> None:
        self.keys = keys
        self.url = url
        self.namespace = namespace
        self.request_id = request_id
        self.responses: Sequence[Response] | None = None
        self.later: Callable[[], Sequence[Response]] | None = None
        """What makes the responses when somebody wants to know."""

    def info(self) -> Info:
        """Return what is known now."""
        responses = self.responses
        if responses is None and self.later is not None:
            responses = self.responses = self.later()
        if responses is None:
            return Info(self.keys[0], self.keys, self.namespace, self.request_id, complete=False)
        samples = [sample.value for response in responses for sample in response.data]
        cached = tuple(flag for response in responses for flag in response.cached or ())
        known = all(response.indices is not None for response in responses)
        new = [sample for sample, flag in zip(samples, cached, strict=True) if not flag]
        usage, _ = wire.usage_totals(samples)
        _, billed = wire.usage_totals(new)
        models = dict.fromkeys(sample.get("model") for sample in samples)
        spent = tuple(
            Spent(
                model,
                self.url,
                wire.usage_totals([sample for sample in samples if sample.get("model") == model])[0],
                wire.usage_totals([sample for sample in new if sample.get("model") == model])[1],
            )
            for model in models
        )
        return Info(
            self.keys[0],
            self.keys,
            self.namespace,
            self.request_id,
            cached=cached,
            duplicated=tuple(flag for response in responses for flag in response.duplicated or ()),
            indices=tuple(index for response in responses for index in response.indices or ())
            if known
            else None,
            usage=usage,
            billed=billed,
            spent=spent,
        )


_records: dict[int, tuple[weakref.ref[Any], Record]] = {}


def note(thing: Any, record: Record) -> None:
    """Note where a response came from, for as long as it lives; it is not touched, or need be hashable."""
    name = id(thing)

    def gone(reference: weakref.ref[Any]) -> None:
        entry = _records.get(name)
        if entry is not None and entry[0] is reference:
            del _records[name]

    try:
        _records[name] = (weakref.ref(thing, gone), record)
    except TypeError:  # None, a string or a list: the answer to an unusual `cast_to`
        return


def info(response: Any) -> Info | None:
    """Return where the samples of a client's response came from; None for what no cached call returned.

    Args:
        response: what a call returned: a model, a stream, or a raw response.
    """
    for thing in (response, getattr(response, "http_response", None), getattr(response, "response", None)):
        entry = _records.get(id(thing))
        if entry is not None and entry[0]() is thing:
            return entry[1].info()
    return None
