"""Stores that many machines share: one logic over engines, such as Valkey.

`store.py` is the store, `session.py` performs transactions, `book.py` shows the rows of a key to
``cachepipe.stores.operations``, `rows.py` writes rows, and `engine.py` says what an engine offers.
"""

from __future__ import annotations

from typing import Final

SCHEMES: Final = {
    "valkey": "valkey",
    "redis": "valkey",
    "valkeys": "valkeys",
    "rediss": "valkeys",
    "unix": "unix",
    "valkey+cluster": "valkey",
    "valkeys+cluster": "valkeys",
}
"""The schemes of URLs, and what the client calls them."""


def is_url(cache: str) -> bool:
    """Return True if the name of a cache is the URL of a shared store."""
    return cache.partition("://")[0] in SCHEMES and "://" in cache


def shown(url: str) -> str:
    """Return a URL without its credentials."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
