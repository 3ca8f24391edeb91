"""CacheSaver's clients of Anthropic."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client


class AsyncAnthropic(Client):
    """`cachepipe.clients.AsyncAnthropic` with CacheSaver's parameters."""

    _several = True

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncAnthropic(**kwargs)


class Anthropic(Client):
    """`cachepipe.clients.Anthropic` with CacheSaver's parameters."""

    _several = True

    def _make(self, **kwargs: Any) -> Any:
        return clients.Anthropic(**kwargs)
