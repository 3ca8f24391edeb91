"""The endpoints that a model answers, by their paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cachepipe.testing.server import (
    chat,
    completions,
    embeddings,
    gemini,
    groq,
    inference,
    messages,
    responses,
)
from cachepipe.testing.server.answers import data_event
from cachepipe.testing.server.refusals import RefusalError, error_object

if TYPE_CHECKING:
    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.answers import EventStream, ModelAnswer
    from cachepipe.testing.server.calls import ModelCall
    from cachepipe.testing.server.embeddings import EmbeddingCall
    from cachepipe.testing.server.settings import Settings

__all__ = [
    "DIALECTS",
    "EMBEDDERS",
    "EMBEDDINGS",
    "MODELS",
    "Dialect",
    "dialect_of",
    "known_path",
    "unprefixed",
]

EMBEDDINGS: Final = "/v1/embeddings"
MODELS: Final = "/v1/models"
_GROQ: Final = "/openai"
"""What Groq has before `/v1`."""
_ELSEWHERE: Final = re.compile(r"^(?:/v1beta)?/openai(?:/deployments/[^/]+)?(?=/(?!v1/|deployments/))")
"""What Azure, and Gemini where it speaks OpenAI's protocol, have in place of `/v1`."""


def _error_event(refusal: RefusalError, _number: int) -> bytes:
    return data_event(error_object(refusal))


class Dialect(NamedTuple):
    """How an endpoint reads calls and writes answers and errors, whole or as streams.

    An error in a stream also gets the number of events before it. A dialect that says in its errors when to
    try again sends no headers with it. `headers` are those of every answer.
    """

    read: Callable[[Mapping[str, Any], Settings, NGramModel], ModelCall]
    write: Callable[[ModelAnswer], dict[str, Any] | list[Any]]
    stream: Callable[[ModelAnswer], EventStream]
    error: Callable[[RefusalError], dict[str, Any]] = error_object
    error_event: Callable[[RefusalError, int], bytes] = _error_event
    error_headers: bool = True
    headers: Sequence[tuple[bytes, bytes]] = ()


_GEMINI: Final = Dialect(
    gemini.read, gemini.write, gemini.stream, gemini.error, gemini.error_event, error_headers=False
)

_INFERENCE: Final = Dialect(
    inference.read, inference.write, inference.stream, inference.error, inference.error_event
)

DIALECTS: Final[Mapping[str, Dialect]] = {
    "/v1/chat/completions": Dialect(chat.read, chat.write, chat.stream),
    "/v1/completions": Dialect(completions.read, completions.write, completions.stream),
    "/v1/responses": Dialect(
        responses.read, responses.write, responses.stream, error_event=responses.error_event
    ),
    "/v1/messages": Dialect(
        messages.read, messages.write, messages.stream, messages.error, messages.error_event
    ),
    f"{_GROQ}/v1/chat/completions": Dialect(
        groq.read, groq.write, groq.stream, groq.error, groq.error_event, headers=groq.HEADERS
    ),
    **dict.fromkeys((gemini.GENERATE, gemini.STREAM, gemini.COUNT, *gemini.EMBEDDINGS), _GEMINI),
    **dict.fromkeys((*inference.WHOLE, *inference.EMBEDDINGS), _INFERENCE),
    **dict.fromkeys(inference.LISTED, _INFERENCE._replace(write=inference.write_list)),
}


class Embedder(NamedTuple):
    """How an endpoint reads texts to embed, and writes the first embeddings."""

    read: Callable[[Mapping[str, Any], Settings, NGramModel, str], EmbeddingCall]
    write: Callable[[EmbeddingCall, int, str], dict[str, Any] | list[Any]]


EMBEDDERS: Final[Mapping[str, Embedder]] = {
    EMBEDDINGS: Embedder(
        lambda body, settings, model, _: embeddings.read(body, settings, model),
        lambda call, count, _: embeddings.write(call, count),
    ),
    **dict.fromkeys(
        gemini.EMBEDDINGS,
        Embedder(
            lambda body, settings, _, path: gemini.read_embeddings(body, settings, path),
            gemini.write_embeddings,
        ),
    ),
    **dict.fromkeys(
        inference.EMBEDDINGS,
        Embedder(
            lambda body, settings, _, path: inference.read_embeddings(body, settings, path),
            lambda call, count, _: inference.write_embeddings(call, count),
        ),
    ),
}


def known_path(path: str) -> str:
    """Return the path of an endpoint under its usual name: without models, deployments and projects."""
    return inference.known_path(gemini.known_path(_ELSEWHERE.sub("/v1", path)))


def unprefixed(path: str) -> str:
    """Return a path without Groq's prefix, for the endpoints that are the same behind it."""
    return path.removeprefix(_GROQ)


def dialect_of(path: str) -> Dialect:
    """Return the dialect of a path; other paths have the errors of chat completions."""
    return DIALECTS.get(path, DIALECTS["/v1/chat/completions"])
