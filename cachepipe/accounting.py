"""What requests cost, in tokens: billed, as asked and saved, as the contract defines them (C6).

*Billed* is what a request paid for: its samples with ``cached`` false, and a call's prompt once, with the
call's first sample. *As asked* is what the request would have cost alone, as it was written, in one call.
*Saved* is as asked less billed. *Spent* is everything that was generated: what was billed, and what reached
no request (`Account.spend`). Nothing here does I/O; the caller passes a function that knows prices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from cachepipe.wire import bills_prompt, token_counts
from cachepipe.wire.usage import COUNTS

NAMES: Final = (*COUNTS, "samples", "unknown")
"""The sums: tokens by kind, samples, and samples without usage."""

_OF_PROMPT: Final = ("prompt_tokens", "cached_tokens")

Seller = tuple[str | None, str]
"""A model, and its URL."""

Price = Callable[[Mapping[str, int], str | None, str], float | None]
"""A function that returns the cost in US dollars of tokens of a model at a URL, or None if it is unknown."""


class Usage(NamedTuple):
    """The usage of one sample.

    Attributes:
        model: the model in the sample.
        counts: its tokens by kind, including its call's whole prompt; None if its provider reports none.
        first: whether the prompt of its call was billed with it.
    """

    model: str | None
    counts: Mapping[str, int] | None
    first: bool


def usage_of(sample: Mapping[str, Any]) -> Usage:
    """Return the usage of a stored sample."""
    model, counts = sample.get("model"), token_counts(sample.get("usage"))
    known = {name: counts[name] or 0 for name in COUNTS}
    return Usage(
        model if isinstance(model, str) else None,
        None if counts["total_tokens"] is None else known,
        bills_prompt(sample),
    )


class Account:
    """Sums of token counts, by model and URL."""

    def __init__(self) -> None:
        self.sold: dict[Seller, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"<Account {self.counts()['total_tokens']} tokens>"

    def add(self, usage: Usage, url: str, *, prompt: bool) -> None:
        """Add a sample.

        Args:
            usage: the usage of the sample.
            url: the URL of its endpoint.
            prompt: whether its prompt counts.
        """
        sums = self._sums((usage.model, url))
        sums["samples"] += 1
        counts = usage.counts
        if counts is None:
            sums["unknown"] += 1
            return
        for name, count in counts.items():
            sums[name] += count
        if not prompt:
            sums["total_tokens"] -= counts["prompt_tokens"]
            for name in _OF_PROMPT:
                sums[name] -= counts[name]

    def spend(self, usages: Iterable[Usage], url: str) -> None:
        """Add samples that were generated: the prompt of a call counts with its first sample."""
        for usage in usages:
            self.add(usage, url, prompt=usage.first)

    def join(self, other: Account, sign: int = 1) -> None:
        """Add another account, or subtract it."""
        for seller, counts in other.sold.items():
            sums = self._sums(seller)
            for name, count in counts.items():
                sums[name] += sign * count

    def counts(self) -> dict[str, int]:
        """Return the sums over all models and URLs."""
        return {name: sum(sums[name] for sums in self.sold.values()) for name in NAMES}

    def cost(self, price: Price) -> tuple[float | None, int]:
        """Return the cost of the samples with a price (None if there are none), and the number of the others.

        A sample without usage has no price either.
        """
        cost: float | None = None if self.sold else 0.0
        unpriced = 0
        for (model, url), sums in self.sold.items():
            part = price(sums, model, url)
            unpriced += sums["samples"] if part is None else sums["unknown"]
            if part is not None and not 0 < sums["unknown"] == sums["samples"]:
                cost = part + (cost or 0.0)
        return cost, unpriced

    def as_dict(self, price: Price) -> dict[str, Any]:
        """Return the sums by name, with their ``cost`` and how many samples are ``unpriced``."""
        cost, unpriced = self.cost(price)
        return {**self.counts(), "cost": cost, "unpriced": unpriced}

    def _sums(self, seller: Seller) -> dict[str, int]:
        sums = self.sold.get(seller)
        if sums is None:
            sums = self.sold[seller] = dict.fromkeys(NAMES, 0)
        return sums


@dataclass
class Delivered:
    """The sums of what was delivered.

    Attributes:
        as_asked: what each request would have cost alone, as it was written, in one call.
        billed: what the requests paid for.
    """

    as_asked: Account = field(default_factory=Account)
    billed: Account = field(default_factory=Account)

    @property
    def saved(self) -> Account:
        """As asked less billed."""
        saved = Account()
        saved.join(self.as_asked)
        saved.join(self.billed, -1)
        return saved

    def add(self, usages: Sequence[Usage], cached: Sequence[bool], url: str) -> None:
        """Add the samples that one question of a request received.

        Args:
            usages: the usage of each sample.
            cached: per sample, False if it was generated on the request's behalf.
            url: the URL of the endpoint.
        """
        prompt = True  # it counts once, with the first sample that has usage
        for usage, hit in zip(usages, cached, strict=True):
            self.as_asked.add(usage, url, prompt=prompt)
            prompt = prompt and usage.counts is None
            if not hit:
                self.billed.add(usage, url, prompt=usage.first)

    def join(self, other: Delivered) -> None:
        """Add all of other sums."""
        self.as_asked.join(other.as_asked)
        self.billed.join(other.billed)

    def accounts(self) -> dict[str, Account]:
        """Return the sums by name."""
        return {"as_asked": self.as_asked, "billed": self.billed, "saved": self.saved}
