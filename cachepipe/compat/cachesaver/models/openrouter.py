"""CacheSaver's clients of OpenRouter."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client

__all__ = ["AsyncOpenRouter", "OpenRouter"]


class AsyncOpenRouter(Client):
    """`cachepipe.clients.AsyncOpenRouter` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncOpenRouter(**kwargs)


class OpenRouter(Client):
    """`cachepipe.clients.OpenRouter` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.OpenRouter(**kwargs)
