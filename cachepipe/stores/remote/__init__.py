"""Stores that many machines share: one logic over engines, such as Valkey and PostgreSQL.

`store.py` is the store, `session.py` performs transactions, `book.py` shows the rows of a key to
``cachepipe.stores.operations``, `rows.py` writes rows, and `engine.py` says what an engine offers.
"""

from __future__ import annotations

import re
from typing import Final

SCHEMES: Final = {
    "valkey": "valkey",
    "redis": "valkey",
    "valkeys": "valkeys",
    "rediss": "valkeys",
    "unix": "unix",
    "valkey+cluster": "valkey",
    "valkeys+cluster": "valkeys",
    "postgresql": "postgresql",
    "postgres": "postgresql",
}
"""The schemes of URLs, and what the client calls them."""

_PASSWORDS: Final = re.compile(r"([?&][a-z]*password=)[^&]*")
"""Options of a URL with a password; they are refused, and the error shows the URL."""


def is_url(cache: str) -> bool:
    """Return True if the name of a cache is the URL of a shared store."""
    return cache.partition("://")[0] in SCHEMES and "://" in cache


def shown(url: str) -> str:
    """Return a URL without its credentials."""
    scheme, _, rest = url.partition("://")
    return _PASSWORDS.sub(r"\1…", f"{scheme}://{rest.rpartition('@')[2]}")
