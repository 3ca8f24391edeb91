"""CacheSaver's clients of Hugging Face."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client

__all__ = ["AsyncHuggingFace", "AsyncInferenceClient", "HuggingFace", "InferenceClient"]


class AsyncHuggingFace(Client):
    """`cachepipe.clients.AsyncHuggingFace` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncHuggingFace(**kwargs)


class HuggingFace(Client):
    """`cachepipe.clients.HuggingFace` with CacheSaver's parameters."""

    def _make(self, **kwargs: Any) -> Any:
        return clients.HuggingFace(**kwargs)


AsyncInferenceClient = AsyncHuggingFace
InferenceClient = HuggingFace
