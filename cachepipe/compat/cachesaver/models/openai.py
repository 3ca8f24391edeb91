"""CacheSaver's clients of OpenAI."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client


class AsyncOpenAI(Client):
    """`cachepipe.clients.AsyncOpenAI` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncOpenAI(**kwargs)


class OpenAI(Client):
    """`cachepipe.clients.OpenAI` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.OpenAI(**kwargs)
