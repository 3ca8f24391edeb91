"""Adapters: a provider's calls, or a model on this machine, as models of pipelines.

Every name is imported when it is first used, so ``import cachepipe.models`` needs no SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cachepipe import lazy

if TYPE_CHECKING:
    from cachepipe.models.anthropic import AnthropicModel as AnthropicModel
    from cachepipe.models.gemini import GeminiModel as GeminiModel
    from cachepipe.models.openai import OpenAIModel as OpenAIModel
    from cachepipe.models.together import TogetherModel as TogetherModel
    from cachepipe.models.transformers import TransformersModel as TransformersModel

# Public name: the module that it lives in. A new adapter gets a line here.
_HOMES: Final = {
    "AnthropicModel": "cachepipe.models.anthropic",
    "GeminiModel": "cachepipe.models.gemini",
    "OpenAIModel": "cachepipe.models.openai",
    "TogetherModel": "cachepipe.models.together",
    "TransformersModel": "cachepipe.models.transformers",
}

__all__ = ["AnthropicModel", "GeminiModel", "OpenAIModel", "TogetherModel", "TransformersModel"]

if not TYPE_CHECKING:  # else type checkers would take any name for one of the package
    __getattr__, __dir__ = lazy.names(__name__, _HOMES)
