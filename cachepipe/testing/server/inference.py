"""Requests and answers of Hugging Face's own routes: `/models/{id}` and its siblings."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING, Any, Final

from cachepipe.testing.ngram import embed, tokenise
from cachepipe.testing.server.answers import EventStream, ModelAnswer, SampledChoice, data_event
from cachepipe.testing.server.calls import ModelCall, bad, integer, json_format, n_of, sampling, stops
from cachepipe.testing.server.embeddings import EmbeddingCall

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.refusals import RefusalError
    from cachepipe.testing.server.settings import Settings

__all__ = [
    "EMBEDDINGS",
    "LISTED",
    "PATHS",
    "WHOLE",
    "body_of",
    "error",
    "error_event",
    "known_path",
    "read",
    "read_embeddings",
    "stream",
    "write",
    "write_embeddings",
    "write_list",
]

_STREAM: Final = "/generate_stream"
_EMBED: Final = "/embed"
LISTED: Final = ("/models/{id}", "/")
"""The paths whose answer is a list with one text."""
WHOLE: Final = ("/generate", _STREAM)
"""The paths whose answer is the text itself."""
EMBEDDINGS: Final = ("/models/{id}/pipeline/feature-extraction", _EMBED)
PATHS: Final = frozenset({*LISTED, *WHOLE, *EMBEDDINGS})

_OF_MODEL: Final = re.compile(r"(?:/hf-inference)?/models/([^/:]+(?:/[^/:]+)?)")
_MOST_TEXTS: Final = 1024
_FINISH: Final = {"length": "length", "stop": "eos_token"}
_KINDS: Final = {422: "validation", 429: "overloaded", 424: "generation"}


def known_path(path: str) -> str:
    """Return a path with `{id}` in place of a model, and a chat with a model as the path of chats."""
    for ending in ("/pipeline/feature-extraction", "/v1/chat/completions", ""):
        if path.endswith(ending) and _OF_MODEL.fullmatch(path.removesuffix(ending)):
            return ending if "chat" in ending else f"/models/{{id}}{ending}"
    return path


def body_of(path: str, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request with what its target says: the model, and whether to stream."""
    model = _OF_MODEL.match(target)
    whole = {**body, "model": model[1] if model else "ngram-1"}
    return {**whole, "stream": path == _STREAM} if path in WHOLE else whole


def read(body: Mapping[str, Any], settings: Settings, _model: NGramModel) -> ModelCall:
    """Return the call in the body of a request for a text."""
    text = body.get("inputs")
    if not isinstance(text, str) or not text:
        raise bad("inputs", "a text that is not empty", text)
    parameters = body.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise bad("parameters", "an object", parameters)
    fields = {**parameters, "model": body["model"], "stream": body.get("stream")}
    grammar = parameters.get("grammar")
    if isinstance(grammar, dict) and grammar.get("type") in ("json", "json_schema"):
        grammar = {"type": "json_schema", "schema": grammar.get("value")}
    return ModelCall(
        **{**sampling(fields, settings, "max_new_tokens"), "body": body},
        **json_format(grammar, "grammar"),
        contexts=(text,),
        tokens_in=len(tokenise(text)),
        best_of=n_of(parameters, settings, "best_of"),
        stop=stops(parameters, "stop", 4),
    )


def write(answer: ModelAnswer) -> dict[str, Any]:
    """Return the generated text, with details if the request asks for them."""
    [choice] = answer.choices
    whole: dict[str, Any] = {"generated_text": _text(answer.call, choice)}
    if _parameters(answer.call).get("details"):
        whole["details"] = {
            "finish_reason": _finish(choice),
            "generated_tokens": answer.tokens_out,
            "seed": answer.call.seed,
            "prefill": [],
            "tokens": _tokens(choice),
        }
    return whole


def write_list(answer: ModelAnswer) -> list[dict[str, Any]]:
    """Return the generated text in a list."""
    return [write(answer)]


def stream(answer: ModelAnswer) -> EventStream:
    """Return the generated text as a stream: an event for each token, the last one with the whole text."""
    [choice] = answer.choices
    tokens = _tokens(choice) or [_token("", 0.0)]
    events: list[dict[str, Any]] = [
        {"index": index, "token": token, "generated_text": None, "details": None}
        for index, token in enumerate(tokens, 1)
    ]
    details = {
        "finish_reason": _finish(choice),
        "generated_tokens": answer.tokens_out,
        "input_length": answer.call.tokens_in,
        "seed": answer.call.seed,
    }
    events[-1] |= {"generated_text": _text(answer.call, choice), "details": details}
    *content, last = map(data_event, events)
    return EventStream(content, [last])


def _parameters(call: ModelCall) -> Mapping[str, Any]:
    return call.body.get("parameters") or {}


def _text(call: ModelCall, choice: SampledChoice) -> str:
    prompt = call.contexts[0] if _parameters(call).get("return_full_text") else ""
    return prompt + choice.text


def _finish(choice: SampledChoice) -> str:
    return "stop_sequence" if choice.sample.stop is not None else _FINISH[choice.sample.finish_reason]


def _tokens(choice: SampledChoice) -> list[dict[str, Any]]:
    logprobs = choice.sample.logprobs
    if len(logprobs) != len(choice.pieces):  # JSON that fits a schema
        logprobs = (0.0,) * len(choice.pieces)
    return [_token(piece, logprob) for piece, logprob in zip(choice.pieces, logprobs, strict=True)]


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"id": zlib.crc32(text.encode()) % 50_000, "text": text, "logprob": logprob, "special": False}


def read_embeddings(body: Mapping[str, Any], settings: Settings, path: str) -> EmbeddingCall:
    """Return the texts to embed in a body."""
    inputs = body.get("inputs")
    texts = [inputs] if isinstance(inputs, str) else inputs
    if (
        not isinstance(texts, list)
        or not 0 < len(texts) <= _MOST_TEXTS
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise bad("inputs", f"a text, or a list of 1 to {_MOST_TEXTS} texts, none of them empty", inputs)
    size = integer(body, "dimensions", 1, 4096, settings.dimensions) or settings.dimensions
    alone = isinstance(inputs, str) and path != _EMBED
    return EmbeddingCall(body["model"], texts, sum(len(tokenise(text)) for text in texts), size, alone=alone)


def write_embeddings(call: EmbeddingCall, count: int) -> list[Any]:
    """Return the embeddings of the first `count` texts, or of the only one."""
    vectors = [embed(text, call.size).tolist() for text in call.texts[:count]]
    return vectors[0] if call.alone else vectors


def error(refusal: RefusalError) -> dict[str, Any]:
    """Return the body of an error as Hugging Face's servers write it."""
    return {"error": refusal.message, "error_type": _KINDS.get(refusal.status, refusal.kind)}


def error_event(refusal: RefusalError, _number: int) -> bytes:
    """Return an error in a stream of events."""
    return data_event(error(refusal))
