"""CacheSaver's path of the cacher."""

from __future__ import annotations

from cachepipe.stages import AsyncCacher

__all__ = ["AsyncCacher"]
