"""Prices of tokens, from the table of ``genai-prices``: pip install 'cachepipe[prices]'.

The table is that of the installed package; nothing is downloaded. Without the package, and for models and
servers that it does not know, the cost is None, which means unknown.

The URL decides the provider. Behind another host, such as a proxy or a gateway, the name of the model does:
a provider's own name (``gpt-4o-mini``), or one with the provider in front (``openai/gpt-4o-mini``). A model
with a size in its name (``gpt-oss-20b``) can be served by anyone, so only the URL decides its price.

`Prices` puts prices of one's own before the table, for example from a file.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from cachepipe.errors import CachepipeError

_UNIT: Final = 1000  # tokens for which a price is looked up
_SIZED: Final = re.compile(r"(?<![a-z0-9])(\d+x)?\d+(\.\d+)?b(?![a-z0-9])", re.IGNORECASE)
_DATED: Final = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8})$")
_MILLION: Final = 1_000_000
_PRICED: Final = ("prompt", "cached", "completion")
_FIELDS: Final = (*_PRICED, "max_tokens")
_BATCHES: Final = "/batches"
_OF_BATCHES: Final = 0.5  # what a batch costs, of the price of the same calls; it differs for few models

HOW_TO_GIVE: Final = (
    'Give prices in a file, --prices FILE: {"MODEL": {"prompt": 0.15, "completion": 0.6, '
    '"max_tokens": 16384}}, in US dollars per million tokens, and the largest number of tokens of an answer'
)
"""How a user gives a price that the table lacks."""


class BadPrices(CachepipeError, ValueError):  # noqa: N818 - names the thing at fault
    """A file or a mapping of prices is not valid."""


@functools.lru_cache(maxsize=1)
def _table() -> Any:
    """Return the package with the prices, or None."""
    try:
        import genai_prices  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        return None
    return genai_prices


def cost_of(counts: Mapping[str, int | None], model: Any, url: str) -> float | None:
    """Return the cost of the tokens of one call in US dollars, or None if it is unknown.

    Args:
        counts: as in `cachepipe.accounting`: ``prompt_tokens`` with the ``cached_tokens`` among them, and
            ``completion_tokens``.
        model: the model in the answer.
        url: the URL of the request.
    """
    table = _table()
    if table is None or not isinstance(model, str):
        return None
    try:
        usage = table.Usage(
            input_tokens=counts.get("prompt_tokens") or 0,
            cache_read_tokens=counts.get("cached_tokens") or 0,
            output_tokens=counts.get("completion_tokens") or 0,
        )
    except ValueError:  # some servers report impossible counts
        return None
    for name, provider in _sold_as(table, model, url):
        try:
            return float(table.calc_price(usage, name, **provider).total_price)
        except LookupError:
            continue
        except ValueError:
            return None
    return None


def _sold_as(table: Any, model: str, url: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the names under which the table may have a model, each with its provider or URL."""
    undated = _DATED.sub("", model)
    names = [model] if undated == model else [model, undated]
    at_url = {"provider_api_url": url}
    yield from ((name, at_url) for name in names)
    if _knows(table, None, url) or _SIZED.search(model):
        return
    for name in names:
        provider, mark, own = name.partition("/")
        if not mark:
            yield name, {}
            yield name, {"provider_id": "openai"}  # the table finds OpenAI's embeddings only this way
            continue
        yield own, {"provider_id": provider}
        if _knows(table, provider, None):
            yield name, {"provider_id": "openrouter"}


def _knows(table: Any, provider: str | None, url: str | None) -> bool:
    """Return True if the table has prices of a provider, by its name or URL."""
    try:
        table.data_snapshot.get_snapshot().find_provider(None, provider, url)
    except LookupError:
        return False
    return True


class UnitPrices(NamedTuple):
    """The prices of a token in US dollars, by its kind."""

    prompt: float
    cached: float
    completion: float


@functools.lru_cache(maxsize=4096)
def unit_prices(model: str | None, url: str) -> UnitPrices | None:
    """Return the prices of a token of a small call, or None if they are unknown."""
    each = (
        {"prompt_tokens": _UNIT},
        {"prompt_tokens": _UNIT, "cached_tokens": _UNIT},
        {"completion_tokens": _UNIT},
    )
    costs = [cost_of(counts, model, url) for counts in each]
    known = [cost / _UNIT for cost in costs if cost is not None]
    return UnitPrices(*known) if len(known) == len(each) else None


def is_batch(url: str) -> bool:
    """Return True for the URL at which batches are bought, as ``https://api.openai.com/v1/batches``."""
    return url.partition("?")[0].endswith(_BATCHES)


def cost_by_unit(counts: Mapping[str, int], price: UnitPrices | None) -> float | None:
    """Return the cost of tokens of many calls at unit prices, or None if they are unknown."""
    if price is None:
        return None
    cached = counts["cached_tokens"]
    fresh = counts["prompt_tokens"] - cached
    return fresh * price.prompt + cached * price.cached + counts["completion_tokens"] * price.completion


def cost_of_sum(counts: Mapping[str, int], model: str | None, url: str) -> float | None:
    """Return the cost of tokens of many calls in US dollars, or None if it is unknown.

    If a price depends on the length of the prompt, the price of short prompts is used.
    """
    return cost_by_unit(counts, unit_prices(model, url))


def max_tokens(model: str | None, url: str) -> int | None:
    """Return the size of a model's context, which no answer exceeds, or None if it is unknown."""
    table = _table()
    if table is None or model is None:
        return None
    snapshot = table.data_snapshot.get_snapshot()
    for name, where in _sold_as(table, model, url):
        try:
            _, found = snapshot.find_provider_model(
                name, None, where.get("provider_id"), where.get("provider_api_url")
            )
        except LookupError:
            continue
        if found.context_window:
            return int(found.context_window)
    return None


class Prices:
    """Prices of tokens: those that are given, else those of the table.

    Args:
        given: by the name of the model, with or without its date, the US dollars per million tokens:
            ``prompt``, ``completion``, and ``cached`` for prompt tokens that the provider had cached (default
            is ``prompt``). ``max_tokens`` is the largest number of tokens of an answer.

    Raises:
        BadPrices: when a price is not valid.
    """

    def __init__(self, given: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self._given: dict[str, UnitPrices] = {}
        self._limits: dict[str, int] = {}
        for model, fields in (given or {}).items():
            self._add(model, fields)

    def __repr__(self) -> str:
        return f"<Prices of {', '.join(self._given) or 'the table'}>"

    def _add(self, model: str, fields: Mapping[str, float]) -> None:
        what = f"the prices of {model!r:.80}"
        if not isinstance(fields, Mapping) or not {*fields} <= {*_FIELDS}:
            raise BadPrices(f"{what} hold {', '.join(_FIELDS)}; got {fields!r:.200}")
        for name, value in fields.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MILLION:
                raise BadPrices(f"{what}: {name} is a number, at least 0; got {value!r:.80}")
        if "prompt" in fields or "completion" in fields:
            if "prompt" not in fields:
                raise BadPrices(f"{what} lack the price of the prompt; got {fields!r:.200}")
            prompt, completion = fields["prompt"], fields.get("completion", 0.0)
            each = (prompt, fields.get("cached", prompt), completion)
            self._given[model] = UnitPrices(*(price / _MILLION for price in each))
        if "max_tokens" in fields:
            self._limits[model] = int(fields["max_tokens"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the prices in a JSON file, an object in the form of ``given``.

        Raises:
            BadPrices: when it cannot be read, or is not valid.
        """
        try:
            given = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise BadPrices(f"the prices in {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadPrices(f"the prices in {path} are not valid JSON: {error}. {HOW_TO_GIVE}") from error
        if not isinstance(given, dict):
            raise BadPrices(f"the prices in {path} are not an object by model. {HOW_TO_GIVE}")
        return cls(given)

    def _own(self, model: str | None) -> UnitPrices | None:
        """Return the given prices of a model, or None."""
        return None if model is None else self._given.get(model, self._given.get(_DATED.sub("", model)))

    def unit(self, model: str | None, url: str) -> UnitPrices | None:
        """Return the prices of a token of a small call, or None if they are unknown."""
        own = self._own(model)
        found = unit_prices(model, url) if own is None else own
        if found is None or not is_batch(url):
            return found
        return UnitPrices(*(price * _OF_BATCHES for price in found))

    def cost_of(self, counts: Mapping[str, int], model: str | None, url: str) -> float | None:
        """Return the cost of the tokens of one call in US dollars, as the function `cost_of` does."""
        own = self._own(model)
        if own is None and not is_batch(url):
            return cost_of(counts, model, url)
        return cost_by_unit(counts, self.unit(model, url))

    def cost_of_sum(self, counts: Mapping[str, int], model: str | None, url: str) -> float | None:
        """Return the cost of tokens in US dollars, as the function `cost_of_sum` does."""
        return cost_by_unit(counts, self.unit(model, url))

    def max_tokens(self, model: str | None, url: str) -> int | None:
        """Return the largest number of tokens of an answer of a model, or None if it is unknown."""
        if model is None:
            return None
        own = self._limits.get(model, self._limits.get(_DATED.sub("", model)))
        return max_tokens(model, url) if own is None else own


TABLE: Final = Prices()
"""The prices of the table."""
