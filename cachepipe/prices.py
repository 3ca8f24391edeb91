"""What tokens cost, by the table of ``genai-prices``: pip install 'cachepipe[prices]'.

The table is that package's, with its date; nothing is fetched. Without the package, and for models and
servers that it does not know, the cost is None: unknown is not nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any


@functools.lru_cache(maxsize=1)
def _table() -> Any:
    """Return the package that knows prices, or None."""
    try:
        import genai_prices  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        return None
    return genai_prices


def cost_of(counts: Mapping[str, int | None], model: Any, url: str) -> float | None:
    """Return the cost of tokens in US dollars, or None where that is not known.

    Args:
        counts: as in `cachepipe.wire.usage_totals`: ``prompt_tokens`` with the ``cached_tokens`` among
            them, and ``completion_tokens``.
        model: the model that the answer names, whatever the server takes for one.
        url: where the request went, which tells the provider.
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
        return float(table.calc_price(usage, model, provider_api_url=url).total_price)
    except (LookupError, ValueError):  # servers tell odd things
        return None
