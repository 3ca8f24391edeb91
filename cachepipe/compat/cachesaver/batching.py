"""CacheSaver's path of the batcher."""

from __future__ import annotations

from cachepipe.stages import AsyncBatcher

__all__ = ["AsyncBatcher"]
