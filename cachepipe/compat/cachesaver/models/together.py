"""CacheSaver's clients of Together AI."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client


class AsyncTogether(Client):
    """`cachepipe.clients.AsyncTogether` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncTogether(**kwargs)


class Together(Client):
    """`cachepipe.clients.Together` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.Together(**kwargs)
