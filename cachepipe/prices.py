"""Prices of tokens, from the table of ``genai-prices``: pip install 'cachepipe[prices]'.

The table is that of the installed package; nothing is downloaded. Without the package, and for models and
servers that it does not know, the cost is None, which means unknown.

The URL decides the provider. Behind another host, such as a proxy or a gateway, the name of the model does:
a provider's own name (``gpt-4o-mini``), or one with the provider in front (``openai/gpt-4o-mini``). A model
with a size in its name (``gpt-oss-20b``) can be served by anyone, so only the URL decides its price.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

_UNIT: Final = 1000  # tokens for which a price is looked up
_SIZED: Final = re.compile(r"(?<![a-z0-9])(\d+x)?\d+(\.\d+)?b(?![a-z0-9])", re.IGNORECASE)
_DATED: Final = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{8})$")


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
