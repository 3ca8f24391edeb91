"""Cache, deduplicate and replay calls to language models, with samples that stay independent.

A frozen ``Request`` moves through async stages (a deduplicator, a cacher on disk, a batcher) to a
model, and each ``Response`` says for every sample whether it was cached and whether it was merged.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachepipe.clients.info import info as info
    from cachepipe.clients.wrapping import wrap as wrap
    from cachepipe.context import using as using
    from cachepipe.conversations import Conversation as Conversation
    from cachepipe.conversations import Message as Message
    from cachepipe.errors import (
        BadAnswer as BadAnswer,
    )
    from cachepipe.errors import (
        BatchMismatch as BatchMismatch,
    )
    from cachepipe.errors import (
        CacheMiss as CacheMiss,
    )
    from cachepipe.errors import (
        CachepipeError as CachepipeError,
    )
    from cachepipe.errors import (
        CachepipeWarning as CachepipeWarning,
    )
    from cachepipe.errors import (
        EvictionDisabled as EvictionDisabled,
    )
    from cachepipe.errors import (
        FormatError as FormatError,
    )
    from cachepipe.errors import (
        FreshIds as FreshIds,
    )
    from cachepipe.errors import (
        NotStorable as NotStorable,
    )
    from cachepipe.errors import (
        NotStored as NotStored,
    )
    from cachepipe.errors import (
        ReadOnlyStore as ReadOnlyStore,
    )
    from cachepipe.errors import (
        SharedDraw as SharedDraw,
    )
    from cachepipe.errors import (
        ShortAnswer as ShortAnswer,
    )
    from cachepipe.errors import (
        StageClosed as StageClosed,
    )
    from cachepipe.errors import (
        StoreError as StoreError,
    )
    from cachepipe.errors import (
        StoreLocked as StoreLocked,
    )
    from cachepipe.errors import (
        UnkeyableValue as UnkeyableValue,
    )
    from cachepipe.errors import (
        UnsafeRow as UnsafeRow,
    )
    from cachepipe.pipelines import (
        LocalAPI as LocalAPI,
    )
    from cachepipe.pipelines import (
        OnlineAPI as OnlineAPI,
    )
    from cachepipe.pipelines import (
        OrderedLocalAPI as OrderedLocalAPI,
    )
    from cachepipe.runs import run as run
    from cachepipe.stages import (
        AsyncBatcher as AsyncBatcher,
    )
    from cachepipe.stages import (
        AsyncCacher as AsyncCacher,
    )
    from cachepipe.stages import (
        AsyncDeduplicator as AsyncDeduplicator,
    )
    from cachepipe.stages import (
        RequestReorderer as RequestReorderer,
    )
    from cachepipe.stages import (
        Stats as Stats,
    )
    from cachepipe.stores import DiskStore as DiskStore
    from cachepipe.stores import MemoryStore as MemoryStore
    from cachepipe.stores import open_store as open_store
    from cachepipe.typedefs import (
        Batch as Batch,
    )
    from cachepipe.typedefs import (
        BatchRequestModel as BatchRequestModel,
    )
    from cachepipe.typedefs import (
        Request as Request,
    )
    from cachepipe.typedefs import (
        Response as Response,
    )
    from cachepipe.typedefs import (
        SingleRequestModel as SingleRequestModel,
    )

__version__ = "0.1.0"

_HOMES = {
    "cachepipe.clients.info": ("info",),
    "cachepipe.clients.wrapping": ("wrap",),
    "cachepipe.context": ("using",),
    "cachepipe.conversations": ("Conversation", "Message"),
    "cachepipe.errors": (
        "BadAnswer",
        "BatchMismatch",
        "CacheMiss",
        "CachepipeError",
        "CachepipeWarning",
        "EvictionDisabled",
        "FormatError",
        "FreshIds",
        "NotStorable",
        "NotStored",
        "ReadOnlyStore",
        "SharedDraw",
        "ShortAnswer",
        "StageClosed",
        "StoreError",
        "StoreLocked",
        "UnkeyableValue",
        "UnsafeRow",
    ),
    "cachepipe.pipelines": ("LocalAPI", "OnlineAPI", "OrderedLocalAPI"),
    "cachepipe.runs": ("run",),
    "cachepipe.stages": ("AsyncBatcher", "AsyncCacher", "AsyncDeduplicator", "RequestReorderer", "Stats"),
    "cachepipe.stores": ("DiskStore", "MemoryStore", "open_store"),
    "cachepipe.typedefs": ("Batch", "BatchRequestModel", "Request", "Response", "SingleRequestModel"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - a list of strings all the same


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import cachepipe`` stays light."""
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module 'cachepipe' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
