"""The stages. Each works alone around any model, and each is an async context manager."""

from cachepipe.cache.cache import Stats
from cachepipe.stage import Stage
from cachepipe.stages.batcher import AsyncBatcher
from cachepipe.stages.cacher import AsyncCacher
from cachepipe.stages.deduplicator import AsyncDeduplicator
from cachepipe.stages.reorderer import RequestReorderer

__all__ = ["AsyncBatcher", "AsyncCacher", "AsyncDeduplicator", "RequestReorderer", "Stage", "Stats"]
