"""The wire layer: the formats of providers' requests, answers and event streams, as pure functions.

Each API is an object whose methods take and return JSON values and bytes. Nothing here opens a connection,
runs on a loop or imports an SDK. Clients, the proxy and batch files all use it, so that a sample from one
of them is a hit on every other.

    api = api_for("POST", url)
    asks = api.split(body)                    # one per question; usually only one
    key = provider_question(
        scope_of(url), question_document(asks[0], headers), as_written=api.as_written
    )
    samples = api.samples(upstream_answer)    # one per choice, each a complete answer
    api.answer(samples, asks[0])              # joins samples to an answer
"""

from __future__ import annotations

import functools

from cachepipe.wire.base import (
    ANSWER_HEADERS,
    Api,
    Ask,
    Body,
    Sample,
    answer_headers,
    azure_kinds,
    azure_url,
    bills_prompt,
    by_question,
    marked,
    question_document,
    scope_of,
)
from cachepipe.wire.chat import CHAT
from cachepipe.wire.completions import COMPLETIONS
from cachepipe.wire.embeddings import EMBEDDINGS, MODERATIONS
from cachepipe.wire.errors import BadAnswer, BadRequest, MixedAnswer
from cachepipe.wire.gemini import EMBED_CONTENT, GENERATE_CONTENT, METHODS
from cachepipe.wire.inference import FEATURE_EXTRACTION, GENERATE_TEXT, TEXT_GENERATION, inference_at
from cachepipe.wire.messages import MESSAGES
from cachepipe.wire.responses import RESPONSES
from cachepipe.wire.sse import EventReader, StreamEvent, StreamRecorder, pieces
from cachepipe.wire.usage import model_in, reported_cost, token_counts, usage_in

__all__ = [
    "ANSWER_HEADERS",
    "APIS",
    "CHAT",
    "COMPLETIONS",
    "EMBEDDINGS",
    "EMBED_CONTENT",
    "FEATURE_EXTRACTION",
    "GENERATE_CONTENT",
    "GENERATE_TEXT",
    "INFERENCE",
    "MESSAGES",
    "MODERATIONS",
    "RESPONSES",
    "TEXT_GENERATION",
    "Api",
    "Ask",
    "BadAnswer",
    "BadRequest",
    "Body",
    "EventReader",
    "MixedAnswer",
    "Sample",
    "StreamEvent",
    "StreamRecorder",
    "answer_headers",
    "api_for",
    "azure_kinds",
    "azure_url",
    "bills_prompt",
    "by_question",
    "marked",
    "model_in",
    "named_scope",
    "pieces",
    "question_document",
    "reported_cost",
    "scope_of",
    "token_counts",
    "usage_in",
]

INFERENCE: tuple[Api, ...] = (TEXT_GENERATION, GENERATE_TEXT, FEATURE_EXTRACTION)
"""Hugging Face's own APIs. They also have other URLs than those by which they are known."""
APIS: tuple[Api, ...] = (
    *(CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, MODERATIONS, MESSAGES),
    *INFERENCE,
    *(GENERATE_CONTENT, EMBED_CONTENT),
)
"""Every API that can be cached."""

_BY_ENDING: dict[str, Api] = {
    "completions": COMPLETIONS,
    "responses": RESPONSES,
    "embeddings": EMBEDDINGS,
    "moderations": MODERATIONS,
    "messages": MESSAGES,
}
_OTHERS = frozenset({"fim", "agents"})
"""The path segments before ``/completions`` in APIs of Mistral that answer in another form."""


def api_for(method: str, url: str) -> Api | None:
    """Return the API that a request goes to, by the end of its URL or path; None if it is not cached.

    Only requests that create an answer are cached: no GET, no ``/responses/{id}``, no messages of an
    assistant's thread.
    """
    if method.upper() != "POST":
        return None
    *before, last = url.partition("?")[0].partition("#")[0].rstrip("/").split("/")
    parent = before[-1] if before else ""
    if last == "completions" and parent == "chat":
        return CHAT
    if parent in _OTHERS or (last == "messages" and "threads" in before):
        return None
    method = last.rpartition(":")[2] if ":" in last else ""
    return _BY_ENDING.get(last) or METHODS.get(method) or inference_at([*before, last])


@functools.lru_cache(maxsize=256)
def named_scope(scope: str | None, here: str, api: Api) -> tuple[str, Api | None]:
    """Return the scope of a request's keys, and the API if the document must name it.

    It does where the scope does not contain the API, because equal bodies to two APIs are two questions. Chat
    completions are never named.

    Args:
        scope: the user's setting: an endpoint's URL as listings show it, a base URL, any other name, or
            None for the endpoint that receives the request.
        here: the scope of that endpoint.
        api: the API that receives the request.

    Raises:
        BadRequest: when the scope is a URL that cannot be read.
    """
    if scope is None or scope == here:
        return here, None if api_for("POST", here) is api else api
    if not scope.lower().startswith(("http://", "https://")):
        return scope, None if api.name == "chat completions" else api
    url, mark, query = scope_of(scope).partition("?")
    known = api_for("POST", url)
    if known is not api and api in INFERENCE:
        return f"{url}{mark}{query}", api
    if known is not api:
        base = url if known is None else url.removesuffix(_ending(url))
        ending = _ending(here.partition("?")[0])
        if api is MESSAGES:  # base URLs may contain the version or not
            base = f"{base.removesuffix('/v1')}/v1"
        url = f"{base}{ending}"
    return f"{url}{mark}{query}", None


def _ending(url: str) -> str:
    """Return the part of an endpoint's URL that follows the base URL."""
    *_, folder, name = url.split("/")
    ending = f"/{folder}/{name}" if ":" in name else f"/{name}"
    return "/chat/completions" if url.endswith("/chat/completions") else ending
