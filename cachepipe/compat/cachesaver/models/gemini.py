"""CacheSaver's clients of Gemini; ``n=3`` stands for ``candidate_count`` in the config."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client, taken_n

__all__ = ["AsyncGemini", "Gemini"]


class AsyncGemini(Client):
    """`cachepipe.clients.AsyncGemini` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncGemini(**kwargs)

    def _calls_for(self, arguments: dict[str, Any]) -> int | None:
        n = taken_n(arguments)
        if n is not None:
            config = arguments.get("config") or {}
            count = {"candidate_count": n}
            arguments["config"] = (
                {**config, **count} if isinstance(config, dict) else config.model_copy(update=count)
            )
        return None


class Gemini(AsyncGemini):
    """`cachepipe.clients.Gemini` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.Gemini(**kwargs)
