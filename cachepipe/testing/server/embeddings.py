"""Requests and answers of `/v1/embeddings`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachepipe.testing.ngram import embed
from cachepipe.testing.server.calls import bad, integer, model_name, texts_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.settings import Settings

__all__ = ["EmbeddingCall", "read", "write"]


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """The texts to embed. `alone` is set if the answer is one vector and not a list."""

    model: str
    texts: Sequence[str]
    tokens_in: int
    size: int
    base64: bool = False
    alone: bool = False


def read(body: Mapping[str, Any], settings: Settings, model: NGramModel) -> EmbeddingCall:
    """Return the texts to embed in a body."""
    texts, tokens_in = texts_of(body.get("input"), "input", model)
    if not all(texts):
        raise bad("input", "text that is not empty", body.get("input"))
    name = model_name(body)
    size = integer(body, "dimensions", 1, 4096, settings.dimensions) or settings.dimensions
    encoding = body.get("encoding_format") or "float"
    if encoding not in {"float", "base64"}:
        raise bad("encoding_format", "float or base64", encoding)
    return EmbeddingCall(name, texts, tokens_in, size, encoding == "base64")


def write(call: EmbeddingCall, count: int) -> dict[str, Any]:
    """Return the embeddings of the first `count` texts."""
    data = []
    for index, text in enumerate(call.texts[:count]):
        vector = embed(text, call.size)
        value = base64.b64encode(vector.tobytes()).decode() if call.base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = {"prompt_tokens": call.tokens_in, "total_tokens": call.tokens_in}
    return {"object": "list", "data": data, "model": call.model, "usage": usage}
