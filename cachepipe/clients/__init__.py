"""Drop-in clients: the SDKs' own classes with a cache, each imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachepipe.clients.anthropic import Anthropic as Anthropic
    from cachepipe.clients.anthropic import AsyncAnthropic as AsyncAnthropic
    from cachepipe.clients.info import Info as Info
    from cachepipe.clients.openai import AsyncAzureOpenAI as AsyncAzureOpenAI
    from cachepipe.clients.openai import AsyncOpenAI as AsyncOpenAI
    from cachepipe.clients.openai import AzureOpenAI as AzureOpenAI
    from cachepipe.clients.openai import OpenAI as OpenAI
    from cachepipe.clients.together import AsyncTogether as AsyncTogether
    from cachepipe.clients.together import Together as Together

_WHERE = {
    "Anthropic": "cachepipe.clients.anthropic",
    "AsyncAnthropic": "cachepipe.clients.anthropic",
    "AsyncAzureOpenAI": "cachepipe.clients.openai",
    "AsyncOpenAI": "cachepipe.clients.openai",
    "AsyncTogether": "cachepipe.clients.together",
    "AzureOpenAI": "cachepipe.clients.openai",
    "Info": "cachepipe.clients.info",
    "OpenAI": "cachepipe.clients.openai",
    "Together": "cachepipe.clients.together",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - a list of strings all the same


def __getattr__(name: str) -> Any:
    """Import a client at its first use: each needs its SDK."""
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module 'cachepipe.clients' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
