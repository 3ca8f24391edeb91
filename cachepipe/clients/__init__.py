"""Drop-in clients: the SDKs' own classes with a cache, each imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachepipe import lazy
from cachepipe.providers import presets

if TYPE_CHECKING:
    from cachepipe.models.hf_transformers import AsyncHFTransformers as AsyncHFTransformers
    from cachepipe.models.hf_transformers import HFTransformers as HFTransformers
    from cachepipe.providers.info import Info as Info
    from cachepipe.sdk.anthropic import Anthropic as Anthropic
    from cachepipe.sdk.anthropic import AsyncAnthropic as AsyncAnthropic
    from cachepipe.sdk.gemini import AsyncGemini as AsyncGemini
    from cachepipe.sdk.gemini import Gemini as Gemini
    from cachepipe.sdk.groq import AsyncGroq as AsyncGroq
    from cachepipe.sdk.groq import Groq as Groq
    from cachepipe.sdk.huggingface import AsyncHuggingFace as AsyncHuggingFace
    from cachepipe.sdk.huggingface import HuggingFace as HuggingFace
    from cachepipe.sdk.openai import AsyncAzureOpenAI as AsyncAzureOpenAI
    from cachepipe.sdk.openai import AsyncOpenAI as AsyncOpenAI
    from cachepipe.sdk.openai import AzureOpenAI as AzureOpenAI
    from cachepipe.sdk.openai import OpenAI as OpenAI
    from cachepipe.sdk.presets import *  # noqa: F403 - a client for each row of the table
    from cachepipe.sdk.together import AsyncTogether as AsyncTogether
    from cachepipe.sdk.together import Together as Together

_NAMES = {
    "cachepipe.models.hf_transformers": ("AsyncHFTransformers", "HFTransformers"),
    "cachepipe.providers.info": ("Info",),
    "cachepipe.sdk.anthropic": ("Anthropic", "AsyncAnthropic"),
    "cachepipe.sdk.gemini": ("AsyncGemini", "Gemini"),
    "cachepipe.sdk.groq": ("AsyncGroq", "Groq"),
    "cachepipe.sdk.huggingface": ("AsyncHuggingFace", "HuggingFace"),
    "cachepipe.sdk.openai": ("AsyncAzureOpenAI", "AsyncOpenAI", "AzureOpenAI", "OpenAI"),
    "cachepipe.sdk.presets": tuple(presets.compatible()),
    "cachepipe.sdk.together": ("AsyncTogether", "Together"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_WHERE)  # noqa: PLE0605 - a list of strings all the same

if not TYPE_CHECKING:  # else type checkers would take any name for one of the package
    __getattr__, __dir__ = lazy.names(__name__, _WHERE)
