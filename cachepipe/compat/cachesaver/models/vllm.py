"""CacheSaver's clients of vLLM servers."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client


class AsyncVLLM(Client):
    """`cachepipe.clients.AsyncVLLM` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncVLLM(**kwargs)


class VLLM(Client):
    """`cachepipe.clients.VLLM` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.VLLM(**kwargs)
