"""CacheSaver's path of the reorderer."""

from __future__ import annotations

from cachepipe.stages import RequestReorderer

__all__ = ["RequestReorderer"]
