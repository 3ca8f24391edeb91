"""CacheSaver's clients of vLLM."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client

__all__ = ["VLLM", "AsyncVLLM"]


class AsyncVLLM(Client):
    """`cachepipe.clients.AsyncVLLM` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncVLLM(**kwargs)


class VLLM(Client):
    """`cachepipe.clients.VLLM` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.VLLM(**kwargs)
