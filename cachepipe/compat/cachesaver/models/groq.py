"""CacheSaver's clients of Groq."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client

__all__ = ["AsyncGroq", "Groq"]


class AsyncGroq(Client):
    """`cachepipe.clients.AsyncGroq` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncGroq(**kwargs)


class Groq(Client):
    """`cachepipe.clients.Groq` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.Groq(**kwargs)
