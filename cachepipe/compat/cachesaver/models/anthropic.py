"""CacheSaver's clients of Anthropic; ``n=3`` makes three calls, and returns a list."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client, taken_n

__all__ = ["Anthropic", "AsyncAnthropic"]


class AsyncAnthropic(Client):
    """`cachepipe.clients.AsyncAnthropic` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncAnthropic(**kwargs)

    def _calls_for(self, arguments: dict[str, Any]) -> int | None:
        return taken_n(arguments)


class Anthropic(AsyncAnthropic):
    """`cachepipe.clients.Anthropic` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.Anthropic(**kwargs)
