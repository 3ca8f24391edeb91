"""CacheSaver's clients of models of ``transformers`` on this machine."""

from __future__ import annotations

from typing import Any

from cachepipe import clients
from cachepipe.compat.cachesaver.calls import Client

__all__ = ["AsyncHFTransformers", "HFTransformers"]


class AsyncHFTransformers(Client):
    """`cachepipe.clients.AsyncHFTransformers` with CacheSaver's parameters."""

    _batches = True

    def _make(self, **kwargs: Any) -> Any:
        return clients.AsyncHFTransformers(**kwargs)


class HFTransformers(Client):
    """`cachepipe.clients.HFTransformers` with CacheSaver's parameters."""

    _batches = True

    def _make(self, **kwargs: Any) -> Any:
        return clients.HFTransformers(**kwargs)
