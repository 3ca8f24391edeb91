"""Requests and answers of `/v1/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachepipe.testing.server.answers import (
    DONE,
    FINGERPRINT,
    EventStream,
    ModelAnswer,
    data_event,
    part_of,
    pieces_in_turn,
    wants_usage,
)
from cachepipe.testing.server.calls import ModelCall, bad, flag, integer, n_of, sampling, stops, texts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import DrawnText, NGramModel
    from cachepipe.testing.server.settings import Settings

__all__ = ["read", "stream", "write"]


def read(body: Mapping[str, Any], settings: Settings, model: NGramModel) -> ModelCall:
    """Return the call in the body of a text completion."""
    arguments = sampling(body, settings, "max_tokens")
    contexts, tokens_in = texts_of(body.get("prompt", ""), "prompt", model)
    n = n_of(body, settings)
    best_of = n_of(body, settings, "best_of") if body.get("best_of") is not None else n
    if best_of < n:
        raise bad("best_of", f"at least n, which is {n}", best_of)
    if best_of > n and arguments["stream"]:
        raise bad("stream", "false when best_of is greater than n", True)
    alternatives = integer(body, "logprobs", 0, 20, None)
    if flag(body, "echo") and alternatives is not None:
        raise bad("echo", "false when logprobs is set; the prompt has none here", True)
    return ModelCall(
        **arguments,
        contexts=contexts,
        tokens_in=tokens_in,
        n=n,
        best_of=best_of,
        stop=stops(body, "stop", 4),
        alternatives=alternatives,
    )


def _head(answer: ModelAnswer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answer.identity}",
        "object": "text_completion",
        "created": answer.created,
        "model": answer.call.model,
        "system_fingerprint": FINGERPRINT,
    }


def write(answer: ModelAnswer) -> dict[str, Any]:
    """Return the body of a text completion."""
    choices = [
        {
            "index": index,
            "text": _echoed(answer.call, index) + choice.text,
            "logprobs": _logprobs(answer.call, choice.sample),
            "finish_reason": choice.sample.finish_reason,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {**_head(answer), "choices": choices, "usage": answer.usage}


def stream(answer: ModelAnswer) -> EventStream:
    """Return a text completion as a stream of events."""
    call = answer.call
    head = _head(answer)
    if wants_usage(call):
        head["usage"] = None

    def chunk(index: int, text: str, finish: str | None, logprobs: object) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return data_event({**head, "choices": [choice]})

    echoes = [(index, _echoed(call, index)) for index in range(len(answer.choices))]
    content = [chunk(index, text, None, None) for index, text in echoes if text]
    for index, choice, position, piece in pieces_in_turn(answer):
        logprobs = _logprobs(call, choice.sample, slice(position, position + 1))
        content.append(chunk(index, piece, None, logprobs))
    ending = [chunk(i, "", choice.sample.finish_reason, None) for i, choice in enumerate(answer.choices)]
    if wants_usage(call):
        ending.append(data_event({**head, "choices": [], "usage": answer.usage}))
    return EventStream(content, [*ending, DONE])


def _logprobs(call: ModelCall, sample: DrawnText, only: slice = slice(None)) -> dict[str, Any] | None:
    if call.alternatives is None:
        return None
    part = part_of(sample, only)
    offset = sum(map(len, sample.tokens[: only.start or 0]))
    offsets = []
    for token in part.tokens:
        offsets.append(offset)
        offset += len(token)
    tops = []
    for token, logprob, table in zip(part.tokens, part.logprobs, part.tables, strict=True):
        pairs = zip(table.tokens[: call.alternatives], table.logarithms[: call.alternatives], strict=True)
        tops.append({**dict(pairs), token: logprob})
    return {
        "tokens": part.tokens,
        "token_logprobs": part.logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _echoed(call: ModelCall, index: int) -> str:
    return call.contexts[index // call.n] if call.body.get("echo") is True else ""
