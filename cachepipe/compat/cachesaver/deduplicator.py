"""CacheSaver's path of the deduplicator."""

from __future__ import annotations

from cachepipe.stages import AsyncDeduplicator

__all__ = ["AsyncDeduplicator"]
