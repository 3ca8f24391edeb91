"""Cache, deduplicate and replay calls to language models, with samples that stay independent.

A frozen ``Request`` moves through async stages (a deduplicator, a cacher on disk, a batcher) to a
model, and each ``Response`` says for every sample whether it was cached and whether it was merged.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachepipe.chat.answers import TextCompletion as TextCompletion
    from cachepipe.chat.answers import TokenLogProb as TokenLogProb
    from cachepipe.chat.chat import Chat as Chat
    from cachepipe.chat.chat import ToolLoopError as ToolLoopError
    from cachepipe.chat.completions import (
        CompletionsFailed as CompletionsFailed,
    )
    from cachepipe.chat.completions import (
        generate_text_completion as generate_text_completion,
    )
    from cachepipe.chat.completions import (
        generate_text_completion_for_conversation as generate_text_completion_for_conversation,
    )
    from cachepipe.chat.completions import (
        generate_text_completion_for_conversation_sync as generate_text_completion_for_conversation_sync,
    )
    from cachepipe.chat.completions import (
        generate_text_completion_sync as generate_text_completion_sync,
    )
    from cachepipe.chat.completions import (
        generate_text_completions as generate_text_completions,
    )
    from cachepipe.chat.completions import (
        generate_text_completions_for_conversations as generate_text_completions_for_conversations,
    )
    from cachepipe.chat.completions import (
        generate_text_completions_for_conversations_sync as generate_text_completions_for_conversations_sync,
    )
    from cachepipe.chat.completions import (
        generate_text_completions_sync as generate_text_completions_sync,
    )
    from cachepipe.chat.conversations import Conversation as Conversation
    from cachepipe.chat.conversations import Message as Message
    from cachepipe.chat.history import History as History
    from cachepipe.chat.sessions import Session as Session
    from cachepipe.chat.tables import from_jsonl as from_jsonl
    from cachepipe.chat.tables import side_by_side as side_by_side
    from cachepipe.chat.tables import to_dataframe as to_dataframe
    from cachepipe.chat.tables import to_jsonl as to_jsonl
    from cachepipe.context import using as using
    from cachepipe.errors import (
        BadAnswer as BadAnswer,
    )
    from cachepipe.errors import (
        BatchMismatch as BatchMismatch,
    )
    from cachepipe.errors import (
        BudgetExceeded as BudgetExceeded,
    )
    from cachepipe.errors import (
        BundleError as BundleError,
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
        DamagedCache as DamagedCache,
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
        ImportRefused as ImportRefused,
    )
    from cachepipe.errors import (
        LayerIgnored as LayerIgnored,
    )
    from cachepipe.errors import (
        LostSamples as LostSamples,
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
        RepeatedCell as RepeatedCell,
    )
    from cachepipe.errors import (
        SecretsFound as SecretsFound,
    )
    from cachepipe.errors import (
        SharedDraw as SharedDraw,
    )
    from cachepipe.errors import (
        SharedReplicates as SharedReplicates,
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
        TooManySamples as TooManySamples,
    )
    from cachepipe.errors import (
        UnkeyableValue as UnkeyableValue,
    )
    from cachepipe.errors import (
        UnknownCost as UnknownCost,
    )
    from cachepipe.errors import (
        UnsafeRow as UnsafeRow,
    )
    from cachepipe.errors import (
        WaitingForOthers as WaitingForOthers,
    )
    from cachepipe.experiments import Experiment as Experiment
    from cachepipe.experiments import experiment as experiment
    from cachepipe.figures import stats as stats
    from cachepipe.flow import (
        AsyncLimiter as AsyncLimiter,
    )
    from cachepipe.flow import (
        AsyncRetrier as AsyncRetrier,
    )
    from cachepipe.flow import (
        Budget as Budget,
    )
    from cachepipe.flow import (
        Limits as Limits,
    )
    from cachepipe.flow import (
        Retries as Retries,
    )
    from cachepipe.parallel import alcall as alcall
    from cachepipe.parallel import lcall as lcall
    from cachepipe.pipelines import (
        LocalAPI as LocalAPI,
    )
    from cachepipe.pipelines import (
        OnlineAPI as OnlineAPI,
    )
    from cachepipe.pipelines import (
        OrderedLocalAPI as OrderedLocalAPI,
    )
    from cachepipe.prices import Prices as Prices
    from cachepipe.providers.info import info as info
    from cachepipe.removing import compact as compact
    from cachepipe.removing import discard as discard
    from cachepipe.removing import forget as forget
    from cachepipe.removing import prune as prune
    from cachepipe.runs import run as run
    from cachepipe.sdk.wrapping import wrap as wrap
    from cachepipe.services import Service as Service
    from cachepipe.services import Services as Services
    from cachepipe.sharing import export as export
    from cachepipe.sharing import import_ as import_
    from cachepipe.sharing import merge as merge
    from cachepipe.sharing import sync as sync
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
    from cachepipe.verifying import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "cachepipe.parallel": ("alcall", "lcall"),
    "cachepipe.prices": ("Prices",),
    "cachepipe.providers.info": ("info",),
    "cachepipe.sdk.wrapping": ("wrap",),
    "cachepipe.context": ("using",),
    "cachepipe.experiments": ("Experiment", "experiment"),
    "cachepipe.chat.conversations": ("Conversation", "Message"),
    "cachepipe.errors": (
        "BadAnswer",
        "BatchMismatch",
        "BudgetExceeded",
        "BundleError",
        "CacheMiss",
        "CachepipeError",
        "CachepipeWarning",
        "DamagedCache",
        "EvictionDisabled",
        "FormatError",
        "FreshIds",
        "ImportRefused",
        "LayerIgnored",
        "LostSamples",
        "NotStorable",
        "NotStored",
        "ReadOnlyStore",
        "RepeatedCell",
        "SecretsFound",
        "SharedDraw",
        "SharedReplicates",
        "ShortAnswer",
        "StageClosed",
        "StoreError",
        "StoreLocked",
        "TooManySamples",
        "UnkeyableValue",
        "UnknownCost",
        "UnsafeRow",
        "WaitingForOthers",
    ),
    "cachepipe.flow": ("AsyncLimiter", "AsyncRetrier", "Budget", "Limits", "Retries"),
    "cachepipe.pipelines": ("LocalAPI", "OnlineAPI", "OrderedLocalAPI"),
    "cachepipe.figures": ("stats",),
    "cachepipe.verifying": ("verify",),
    "cachepipe.removing": ("compact", "discard", "forget", "prune"),
    "cachepipe.runs": ("run",),
    "cachepipe.services": ("Service", "Services"),
    "cachepipe.chat.sessions": ("Session",),
    "cachepipe.sharing": ("export", "import_", "merge", "sync"),
    "cachepipe.stages": ("AsyncBatcher", "AsyncCacher", "AsyncDeduplicator", "RequestReorderer", "Stats"),
    "cachepipe.stores": ("DiskStore", "MemoryStore", "open_store"),
    "cachepipe.chat.chat": ("Chat", "ToolLoopError"),
    "cachepipe.chat.answers": ("TextCompletion", "TokenLogProb"),
    "cachepipe.chat.completions": (
        "CompletionsFailed",
        "generate_text_completion",
        "generate_text_completion_for_conversation",
        "generate_text_completion_for_conversation_sync",
        "generate_text_completion_sync",
        "generate_text_completions",
        "generate_text_completions_for_conversations",
        "generate_text_completions_for_conversations_sync",
        "generate_text_completions_sync",
    ),
    "cachepipe.chat.history": ("History",),
    "cachepipe.chat.tables": ("from_jsonl", "side_by_side", "to_dataframe", "to_jsonl"),
    "cachepipe.typedefs": ("Batch", "BatchRequestModel", "Request", "Response", "SingleRequestModel"),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - a list of strings all the same

# IPython calls these; programs do not.
_WHERE |= dict.fromkeys(("load_ipython_extension", "unload_ipython_extension"), "cachepipe.notebook")


if not TYPE_CHECKING:  # else type checkers would take any name for one of the package

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that ``import cachepipe`` stays light."""
        module = _WHERE.get(name)
        if module is None:
            for elsewhere in () if name.startswith("_") else ("cachepipe.clients", "cachepipe.models"):
                if name in importlib.import_module(elsewhere).__all__:
                    # Python replaces the message of an AttributeError in ``from cachepipe import …``.
                    raise ImportError(f"{name} is in {elsewhere}: from {elsewhere} import {name}")
            raise AttributeError(f"module 'cachepipe' has no attribute {name!r}")
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
