"""Facts about a response, kept beside it: the response itself stays as the SDK makes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachepipe import markup
from cachepipe.accounting import Account, Delivered, usage_of
from cachepipe.contract.draws import Claimant
from cachepipe.contract.keys import Question
from cachepipe.prices import TABLE, Prices
from cachepipe.typedefs import Response


@dataclass(frozen=True)
class Info:
    """Describes where the samples of a response came from.

    Attributes:
        key: the key of the question; of several questions, of the first.
        keys: the key of each question of the request.
        namespace: the namespace that drew the samples.
        request_id: the request id of the draw.
        replicate: the replicate of the draw.
        complete: whether all samples are known; for a stream, once it has ended.
        cached: per sample, False exactly if it was generated on this request's behalf.
        duplicated: per sample, whether it was merged into the equal requests of its namespace that were
            served in the same turn of the event loop, and is not their first sample.
        indices: per sample, its index in the sample list of its key; None while it is not known.
        as_asked: what the request would have cost alone, in one call: its prompt once, and all samples.
        billed: what the request paid for: the samples that were generated on its behalf, and the prompt of
            each call that gave it its first sample.
        sums: ``as_asked`` and ``billed`` by model, for their prices.
        prices: the prices of tokens: those of the client's budget, else the table.

    ``as_asked`` and ``billed`` hold token counts by name (``prompt_tokens``, ``completion_tokens``,
    ``total_tokens``, ``cached_tokens``, ``reasoning_tokens``), the number of ``samples``, and the number of
    ``unknown`` samples, which came without usage and are in no count of tokens.
    """

    key: str
    keys: tuple[str, ...]
    namespace: str | None
    request_id: str | None
    replicate: str | int | None = None
    complete: bool = True
    cached: tuple[bool, ...] = ()
    duplicated: tuple[bool, ...] = ()
    indices: tuple[int, ...] | None = None
    as_asked: Mapping[str, int] = field(default_factory=dict)
    billed: Mapping[str, int] = field(default_factory=dict)
    sums: Delivered = field(default_factory=Delivered, repr=False, compare=False)
    prices: Prices = field(default=TABLE, repr=False, compare=False)

    @property
    def saved(self) -> dict[str, int]:
        """What the cache and merged calls have saved: ``as_asked`` less ``billed``."""
        return {name: count - self.billed.get(name, 0) for name, count in self.as_asked.items()}

    @property
    def as_asked_cost(self) -> float | None:
        """The price of ``as_asked`` in US dollars; None if a part of it is unknown."""
        return self._cost(self.sums.as_asked)

    @property
    def billed_cost(self) -> float | None:
        """The price of ``billed`` in US dollars; None if a part of it is unknown."""
        return self._cost(self.sums.billed)

    @property
    def saved_cost(self) -> float | None:
        """The price of ``saved`` in US dollars; None if a part of it is unknown."""
        whole, billed = self.as_asked_cost, self.billed_cost
        return None if whole is None or billed is None else whole - billed

    def _repr_html_(self) -> str:
        facts = ("key", "namespace", "request_id", "replicate")
        told = [(name.replace("_", " "), getattr(self, name)) for name in facts]
        if not self.complete:
            return markup.table([*told, ("complete", "no")])
        told.append(("cached", f"{sum(self.cached)} of {len(self.cached)}"))
        kinds = ("as_asked", "billed", "saved")
        sums = [
            (name.replace("_", " "), *(getattr(self, kind)[name] for kind in kinds)) for name in self.billed
        ]
        costs = [getattr(self, f"{kind}_cost") for kind in kinds]
        if None not in costs:
            sums.append(("US dollars", *costs))
        return markup.table(told) + markup.table(sums, ("", *(kind.replace("_", " ") for kind in kinds)))

    def _cost(self, account: Account) -> float | None:
        if not self.complete:
            return None
        cost, unpriced = account.cost(self.prices.cost_of)
        return None if unpriced else cost


def per_sample(responses: Sequence[Response]) -> dict[str, tuple[Any, ...]]:
    """Return the flags and the known indices of all samples of responses, by the name of the field."""
    return {
        name: tuple(value for response in responses for value in getattr(response, name) or ())
        for name in ("cached", "duplicated", "indices")
    }


class Record:
    """The facts about a request that are known so far."""

    def __init__(self, questions: Sequence[Question], claimant: Claimant, url: str, prices: Prices) -> None:
        self.questions = questions
        self.url = url
        self.prices = prices
        self.claimant = claimant
        self.responses: Sequence[Response] | None = None
        self.later: Callable[[], Sequence[Response]] | None = None
        """Makes the responses at the first use."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key of each question."""
        return tuple(question.key for question in self.questions)

    def info(self) -> Info:
        """Return the facts that are known now."""
        responses, keys = self.responses, self.keys
        if responses is None and self.later is not None:
            responses = self.responses = self.later()
        if responses is None:
            return Info(keys[0], keys, *self.claimant, complete=False)
        facts: dict[str, Any] = per_sample(responses)
        if any(response.indices is None for response in responses):
            facts["indices"] = None
        sums = Delivered()
        for response in responses:
            usages = [usage_of(sample.value) for sample in response.data]
            sums.add(usages, response.cached or [False] * len(usages), self.url)
        facts |= {"as_asked": sums.as_asked.counts(), "billed": sums.billed.counts(), "sums": sums}
        facts["prices"] = self.prices
        return Info(keys[0], keys, *self.claimant, **facts)


_records: dict[int, tuple[weakref.ref[Any], Record]] = {}


def note(thing: Any, record: Record) -> None:
    """Keep the record of a response while the response exists; it is not changed and need not be hashable."""
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
    """Return where the samples of a client's response came from; None if the cache did not answer the call.

    Args:
        response: the result of a call: a model, a stream, or a raw response.
    """
    for thing in (response, getattr(response, "http_response", None), getattr(response, "response", None)):
        entry = _records.get(id(thing))
        if entry is not None and entry[0]() is thing:
            return entry[1].info()
    return None
