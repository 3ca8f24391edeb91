"""What requests cost, in tokens: billed, as asked and saved, as the contract defines them (C6).

*Billed* is what a request paid for: its samples with ``cached`` false, and a call's prompt once, with the
call's first sample. *As asked* is what the request would have cost alone, as it was written, in one call.
*Saved* is as asked less billed. *Spent* is everything that was generated: what was billed, and what reached
no request (`Account.spend`). *Wasted* is the part of spent that no namespace holds. The usage of a sample is
recorded in its header (`noted`), so that stored rows can be summed without parsing answers. Where the answer
says what its call has cost, that is its price. Nothing here does I/O; the caller passes a function that knows
the prices of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

import orjson

from cachepipe.wire import bills_prompt, model_in, reported_cost, token_counts, usage_in
from cachepipe.wire.usage import COUNTS

NAMES: Final = (*COUNTS, "samples", "unknown")
"""The sums: tokens by kind, samples, and samples without usage."""

_SUMS: Final = (*NAMES, "nanos")
"""The sums in stored rows: also what providers say that calls have cost, in billionths of a US dollar."""
_REPORTED: Final = "#reported"
"""Ends the URLs of samples with such a cost; their tokens have no price."""

_OF_PROMPT: Final = ("prompt_tokens", "cached_tokens")
_MOST: Final = 1 << 40  # tokens of one sample above which its usage cannot be right
_MOST_NANOS: Final = 10**15
_LONGEST: Final = 200  # characters of a name in a header
SOLD: Final = b'"sold":'  # the last field of a header: what was sold, to whom a price belongs
_USAGE: Final = b',"usage":['  # the last field of what was sold

_DELIVERED: Final = ("as_asked", "billed", "unstored")  # the sums of `Delivered` that are written

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
        url: where the call went; None if it went where the question is asked.
        nanos: what its provider says that it has cost, in billionths of a US dollar; None if it does not.
    """

    model: str | None
    counts: Mapping[str, int] | None
    first: bool
    url: str | None = None
    nanos: int | None = None


def usage_of(sample: Mapping[str, Any]) -> Usage:
    """Return the usage of a stored sample."""
    model, counts = model_in(sample), token_counts(usage_in(sample))
    known = {name: counts[name] or 0 for name in COUNTS}
    return Usage(
        model if isinstance(model, str) else None,
        None if counts["total_tokens"] is None or not _are_counts([*known.values()]) else known,
        bills_prompt(sample),
        nanos=reported_cost(usage_in(sample)),
    )


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < _MOST for value in values)


def noted(sample: Mapping[str, Any], url: str | None = None, asked: Any = None) -> dict[str, Any]:
    """Return what is recorded beside a provider's sample: what it has used, and what may decide its price.

    Args:
        sample: the sample.
        url: where the call went, unless the scope of the question says so.
        asked: the model that was asked, for answers that name none.
    """
    usage = usage_of(sample)
    model = asked if usage.model is None else usage.model
    reported = usage_in(sample)
    tier = sample.get("service_tier") or (reported.get("service_tier") if type(reported) is dict else None)
    note = {"tier": tier, "fingerprint": sample.get("system_fingerprint")}
    sold = {
        "model": model if is_name(model) else None,
        "url": url,
        "first": None if usage.first else False,
        "nanos": usage.nanos,
        "usage": None if usage.counts is None else [*usage.counts.values()],
    }
    return {
        **{name: value for name, value in note.items() if is_name(value)},
        "sold": {name: value for name, value in sold.items() if value is not None},
    }


def is_name(value: Any) -> bool:
    """Return True if a value from elsewhere is a name that a sample's header can hold."""
    return type(value) is str and 0 < len(value) <= _LONGEST and (value.isascii() or value.isprintable())


def sold_in(header: bytes) -> bytes:
    """Return the part of a sample's header that says what was sold; equal parts are equal usages."""
    place = header.rfind(SOLD)
    return header[place + len(SOLD) : -1] if place >= 0 else b""


@functools.lru_cache(maxsize=4096)
def usage_sold(sold: bytes) -> Usage:
    """Return the usage that ``sold_in`` has found; of what cannot be read, nothing is known."""
    try:
        found = orjson.loads(sold) if sold else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return Usage(None, None, first=True)
    model, url, usage = found.get("model"), found.get("url"), found.get("usage")
    nanos = found.get("nanos")
    counts = usage if isinstance(usage, list) and len(usage) == len(COUNTS) and _are_counts(usage) else None
    return Usage(
        model if isinstance(model, str) else None,
        None if counts is None else dict(zip(COUNTS, counts, strict=True)),
        found.get("first") is not False,
        url if isinstance(url, str) else None,
        nanos if type(nanos) is int and 0 <= nanos < _MOST_NANOS else None,
    )


def _numbers(written: Sequence[bytes]) -> list[int] | None:
    """Return the counts of many samples, one behind the other; None if one of them must be read by itself."""
    try:
        numbers = orjson.loads(b"[%b]" % b",".join(written))
    except ValueError:
        return None
    ints = set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < _MOST
    return numbers if ints and len(numbers) == len(COUNTS) * len(written) else None


class Account:
    """Sums of token counts, by model and URL."""

    def __init__(self) -> None:
        self.sold: dict[Seller, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"<Account {self.counts()['total_tokens']} tokens>"

    def add(self, usage: Usage, url: str, *, prompt: bool, times: int = 1, samples: int = 1) -> None:
        """Add the usage of one sample, or the sum of the usage of several.

        Args:
            usage: the usage.
            url: the URL of the endpoint.
            prompt: whether the prompt counts.
            times: how often it is added; -1 takes it off.
            samples: the number of samples in the sum.
        """
        counts = usage.counts
        place, nanos = usage.url or url, None if counts is None else usage.nanos
        sums = self._sums((usage.model, place if nanos is None else place + _REPORTED))
        sums["samples"] += times * samples
        sums["nanos"] += times * (nanos or 0)
        if counts is None:
            sums["unknown"] += times
            return
        for name, count in counts.items():
            sums[name] += times * count
        if not prompt:
            sums["total_tokens"] -= times * counts["prompt_tokens"]
            for name in _OF_PROMPT:
                sums[name] -= times * counts[name]

    def add_all(self, headers: Iterable[bytes], url: str, *, prompts: bool = False) -> None:
        """Add samples by their headers: the same as `add` for each, in a fraction of the time.

        Args:
            headers: the header of each sample.
            url: the URL of their endpoint.
            prompts: whether the prompt of each counts; by default that of a call counts with its first
                sample.
        """
        alike: dict[bytes, list[bytes]] = {}
        for header in headers:
            start, end = header.rfind(SOLD), header.rfind(_USAGE)
            written = header[end + len(_USAGE) : -3]
            if 0 <= start < end and header.endswith(b"]}}") and written.count(b",") == len(COUNTS) - 1:
                alike.setdefault(header[start + len(SOLD) : end], []).append(written)
            else:
                self._add_sold(sold_in(header), url, prompts=prompts)
        for sold, counts in alike.items():
            numbers = _numbers(counts)
            if numbers is None:
                for written in counts:
                    self._add_sold(b"%b%b%b]}" % (sold, _USAGE, written), url, prompts=prompts)
                continue
            usage = usage_sold(sold + b"}")
            sums = {name: sum(numbers[place :: len(COUNTS)]) for place, name in enumerate(COUNTS)}
            nanos = None if usage.nanos is None else usage.nanos * len(counts)
            whole = Usage(usage.model, sums, usage.first, usage.url, nanos)
            self.add(whole, url, prompt=prompts or usage.first, samples=len(counts))

    def _add_sold(self, sold: bytes, url: str, *, prompts: bool) -> None:
        usage = usage_sold(sold)
        self.add(usage, url, prompt=prompts or usage.first)

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
            part = sums["nanos"] / 1e9 if url.endswith(_REPORTED) else price(sums, model, url)
            unpriced += sums["samples"] if part is None else sums["unknown"]
            if part is not None and not 0 < sums["unknown"] == sums["samples"]:
                cost = part + (cost or 0.0)
        return cost, unpriced

    def as_dict(self, price: Price) -> dict[str, Any]:
        """Return the sums by name, with their ``cost`` and how many samples are ``unpriced``."""
        cost, unpriced = self.cost(price)
        return {**self.counts(), "cost": cost, "unpriced": unpriced}

    def of_seller(self, seller: Seller) -> Account:
        """Return the sums of one model at one URL."""
        part = Account()
        for each in (seller, (seller[0], seller[1] + _REPORTED)):
            if each in self.sold:
                part.sold[each] = self.sold[each]
        return part

    def rows(self) -> list[list[Any]]:
        """Return the sums as JSON can hold them: a model, a URL and the counts in the order of ``_SUMS``."""
        return [[*seller, *(sums[name] for name in _SUMS)] for seller, sums in self.sold.items()]

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]]) -> Self:
        """Return the account that ``rows`` has written.

        Raises:
            ValueError: when it is something else.
        """
        account = cls()
        for model, url, *counts in rows:
            known = isinstance(model, str | None) and isinstance(url, str)
            if not known or any(type(count) is not int for count in counts):
                raise ValueError(
                    f"sums are a model, a URL and whole numbers; got {[model, url, *counts]!r:.200}"
                )
            account.sold[model, url] = dict(zip(_SUMS, counts, strict=True))
        return account

    def dumps(self) -> bytes:
        """Return the sums as JSON."""
        return orjson.dumps(self.rows())

    @classmethod
    def loads(cls, document: bytes) -> Self:
        """Return the account that ``dumps`` has written."""
        return cls.of(orjson.loads(document))

    def __sub__(self, other: Account) -> Account:
        rest = Account()
        rest.join(self)
        rest.join(other, -1)
        return rest

    def _sums(self, seller: Seller) -> dict[str, int]:
        sums = self.sold.get(seller)
        if sums is None:
            sums = self.sold[seller] = dict.fromkeys(_SUMS, 0)
        return sums


@dataclass
class Delivered:
    """The sums of what was delivered.

    Attributes:
        requests: how many questions of requests were answered.
        as_asked: what each request would have cost alone, as it was written, in one call.
        billed: what the requests paid for.
        unstored: the part of billed that could not be stored.
    """

    requests: int = 0
    as_asked: Account = field(default_factory=Account)
    billed: Account = field(default_factory=Account)
    unstored: Account = field(default_factory=Account)

    @property
    def saved(self) -> Account:
        """As asked less billed."""
        return self.as_asked - self.billed

    def add(
        self,
        usages: Sequence[Usage],
        cached: Sequence[bool],
        url: str,
        *,
        times: int = 1,
        stored: Sequence[bool] = (),
    ) -> None:
        """Add the samples that one question of a request received.

        Args:
            usages: the usage of each sample.
            cached: per sample, False if it was generated on the request's behalf.
            url: the URL of the endpoint.
            times: how often it received them; -1 takes a delivery back.
            stored: per sample, whether it is stored; by default all are.
        """
        self.requests += times
        prompt = True  # it counts once, with the first sample that has usage
        for place, (usage, hit) in enumerate(zip(usages, cached, strict=True)):
            self.as_asked.add(usage, url, prompt=prompt, times=times)
            prompt = prompt and usage.counts is None
            if not hit:
                self.billed.add(usage, url, prompt=usage.first, times=times)
                if stored and not stored[place]:
                    self.unstored.add(usage, url, prompt=usage.first, times=times)

    def add_hits(self, headers: Sequence[bytes], url: str) -> None:
        """Add questions that received one stored sample each; see `Account.add_all`."""
        self.requests += len(headers)
        self.as_asked.add_all(headers, url, prompts=True)

    def join(self, other: Delivered) -> None:
        """Add all of other sums."""
        self.requests += other.requests
        self.as_asked.join(other.as_asked)
        self.billed.join(other.billed)
        self.unstored.join(other.unstored)

    def accounts(self) -> dict[str, Account]:
        """Return the sums by name."""
        return {"as_asked": self.as_asked, "billed": self.billed, "saved": self.saved}


@dataclass
class RunSums:
    """What a run has noted in a namespace: only the cache in which it runs adds to it.

    Attributes:
        delivered: the sums of what was delivered.
        unreported: samples that were generated, and neither stored nor delivered.
        notes: how many notes are in the sums. Of two copies, the one with more notes is the later one.
    """

    delivered: Delivered = field(default_factory=Delivered)
    unreported: Account = field(default_factory=Account)
    notes: int = 0

    def add(self, delivered: Delivered, unreported: Account) -> None:
        """Add a note."""
        self.delivered.join(delivered)
        self.unreported.join(unreported)
        self.notes += 1

    def dumps(self) -> bytes:
        """Return the sums as JSON."""
        each = {name: getattr(self.delivered, name) for name in _DELIVERED} | {"unreported": self.unreported}
        rows = {name: account.rows() for name, account in each.items()}
        return orjson.dumps({"notes": self.notes, "requests": self.delivered.requests, **rows})

    @classmethod
    def loads(cls, document: bytes) -> Self:
        """Return the sums that ``dumps`` has written.

        Raises:
            ValueError: when it is something else; so do ``KeyError`` and ``TypeError``.
        """
        found = orjson.loads(document)
        delivered = {name: Account.of(found[name]) for name in _DELIVERED}
        unreported = Account.of(found["unreported"])
        return cls(Delivered(int(found["requests"]), **delivered), unreported, int(found["notes"]))


@dataclass
class Statement:
    """What a cache has cost and saved for one namespace, or for all, derived from its rows.

    Attributes:
        delivered: the sums of what was delivered.
        spent: the samples that were generated for its requests.
        held: those of them that a namespace holds.
    """

    delivered: Delivered = field(default_factory=Delivered)
    spent: Account = field(default_factory=Account)
    held: Account = field(default_factory=Account)

    def join(self, other: Statement) -> None:
        """Add all of another statement."""
        self.delivered.join(other.delivered)
        self.spent.join(other.spent)
        self.held.join(other.held)

    def accounts(self) -> dict[str, Account]:
        """Return the sums by name."""
        return {**sums(self.spent, self.delivered), "wasted": self.spent - self.held}


def sums(spent: Account, delivered: Delivered) -> dict[str, Account]:
    """Return the sums of what was spent and of what was delivered, by name."""
    return {"spent": spent, **delivered.accounts(), "unreported": spent - delivered.billed}


def by_model(accounts: Mapping[str, Account], price: Price) -> list[dict[str, Any]]:
    """Return sums by model and URL, the dearest first: rows of ``model``, ``url`` and each sum by name."""
    sold = [seller for account in accounts.values() for seller in account.sold]
    sellers = dict.fromkeys((model, url.removesuffix(_REPORTED)) for model, url in sold)
    rows: list[dict[str, Any]] = []
    for seller in sellers:
        parts = {name: account.of_seller(seller).as_dict(price) for name, account in accounts.items()}
        rows.append({"model": seller[0], "url": seller[1], **parts})
    return sorted(rows, key=lambda row: -row["spent"]["total_tokens"])
