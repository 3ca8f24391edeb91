"""Requests and answers of `/v1/messages`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from cachepipe.testing.ngram import flatten, tokenise
from cachepipe.testing.server.answers import EventStream, ModelAnswer, SampledChoice, named_event
from cachepipe.testing.server.calls import (
    ModelCall,
    bad,
    json_format,
    messages_of,
    number,
    sampling,
    stops,
)
from cachepipe.testing.server.tools import tool_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.refusals import RefusalError
    from cachepipe.testing.server.settings import Settings

__all__ = ["error", "error_event", "read", "stream", "write"]

_ERROR_KINDS: Final = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def read(body: Mapping[str, Any], settings: Settings, _model: NGramModel) -> ModelCall:
    """Return the call in the body of a message."""
    if body.get("max_tokens") is None:
        raise bad("max_tokens", "set", None)
    number(body, "temperature", 1.0)  # Anthropic's limit is lower than that of the others
    arguments = sampling(body, settings, "max_tokens")
    messages: list[Mapping[str, Any]] = messages_of(body.get("messages"), "messages")
    if body.get("system"):
        messages = [*messages_of([{"role": "system", "content": body["system"]}], "system"), *messages]
    context = flatten(messages)
    shape = body.get("output_config")
    shape = shape.get("format") if isinstance(shape, dict) else body.get("output_format")
    arguments.update(json_format(shape, "output_config.format"))
    arguments.update(tool_of(body, settings, "input_schema"))
    return ModelCall(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        stop=stops(body, "stop_sequences", 8191),
    )


def write(answer: ModelAnswer, *, whole: bool = True) -> dict[str, Any]:
    """Return the body of a message."""
    blocks = [_block(answer, choice) for choice in answer.choices]
    return {
        "id": f"msg_{answer.identity}",
        "type": "message",
        "role": "assistant",
        "model": answer.call.model,
        "content": blocks if whole else [],
        "stop_reason": _stop_reason(answer) if whole else None,
        "stop_sequence": answer.choices[0].sample.stop if whole and answer.choices else None,
        "usage": {
            "input_tokens": answer.call.tokens_in,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": answer.tokens_out if whole else 0,
        },
    }


def stream(answer: ModelAnswer) -> EventStream:
    """Return a message as a stream of events."""
    content = [named_event({"type": "message_start", "message": write(answer, whole=False)})]
    ending: list[bytes] = []
    for index, choice in enumerate(answer.choices):
        block = _block(answer, choice)
        tool = answer.call.tool is not None
        if tool:
            block["input"] = {}
        else:
            block["text"] = ""
        content.append(named_event({"type": "content_block_start", "index": index, "content_block": block}))
        content.append(named_event({"type": "ping"}))
        for piece in choice.pieces:
            delta = (
                {"type": "input_json_delta", "partial_json": piece}
                if tool
                else {"type": "text_delta", "text": piece}
            )
            content.append(named_event({"type": "content_block_delta", "index": index, "delta": delta}))
        ending.append(named_event({"type": "content_block_stop", "index": index}))
    body = write(answer)
    delta = {"stop_reason": body["stop_reason"], "stop_sequence": body["stop_sequence"]}
    usage = {"output_tokens": answer.tokens_out}
    ending.append(named_event({"type": "message_delta", "delta": delta, "usage": usage}))
    return EventStream(content, [*ending, named_event({"type": "message_stop"})])


def error(refusal: RefusalError) -> dict[str, Any]:
    """Return the body of an error as Anthropic writes it."""
    kind = _ERROR_KINDS.get(refusal.status)
    if kind is None:
        kind = "invalid_request_error" if refusal.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def error_event(refusal: RefusalError, _number: int) -> bytes:
    """Return an error in a stream."""
    return named_event(error(refusal))


def _block(answer: ModelAnswer, choice: SampledChoice) -> dict[str, Any]:
    if answer.call.tool is None:
        return {"type": "text", "text": choice.text}
    return {
        "type": "tool_use",
        "id": f"toolu_{answer.identity}",
        "name": answer.call.tool,
        "input": orjson.loads(choice.text),
    }


def _stop_reason(answer: ModelAnswer) -> str | None:
    if not answer.choices:
        return None
    sample = answer.choices[0].sample
    if answer.call.tool is not None:
        return "tool_use"
    if sample.finish_reason == "length" and answer.call.schema is None:  # JSON is always whole
        return "max_tokens"
    return "end_turn" if sample.stop is None else "stop_sequence"
