"""Requests and answers of `/v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachepipe.testing.ngram import flatten, tokenise
from cachepipe.testing.server.answers import (
    DONE,
    FINGERPRINT,
    EventStream,
    ModelAnswer,
    SampledChoice,
    data_event,
    part_of,
    pieces_in_turn,
    token_entries,
    wants_usage,
)
from cachepipe.testing.server.calls import (
    ModelCall,
    bad,
    flag,
    integer,
    json_format,
    messages_of,
    n_of,
    sampling,
    stops,
)
from cachepipe.testing.server.settings import is_integer
from cachepipe.testing.server.tools import tool_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import DrawnText, NGramModel
    from cachepipe.testing.server.settings import Settings

__all__ = ["read", "stream", "write"]


def read(body: Mapping[str, Any], settings: Settings, _model: NGramModel) -> ModelCall:
    """Return the call in the body of a chat completion."""
    arguments = sampling(body, settings, "max_tokens", "max_completion_tokens")
    context = flatten(messages_of(body.get("messages"), "messages"))
    wanted = body.get("logprobs")
    alternatives: int | None
    if is_integer(wanted):  # Together's form: a number of alternatives
        alternatives = integer(body, "logprobs", 0, 20, 0)
    else:
        alternatives = (integer(body, "top_logprobs", 0, 20, 0)) if flag(body, "logprobs") else None
        if alternatives is None and body.get("top_logprobs"):
            raise bad("logprobs", "true when top_logprobs is set", wanted)
    arguments.update(json_format(body.get("response_format"), "response_format"))
    arguments.update(tool_of(body, settings, "parameters"))
    return ModelCall(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        n=n_of(body, settings),
        stop=stops(body, "stop", 4),
        alternatives=alternatives,
    )


def _head(answer: ModelAnswer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.identity}",
        "object": kind,
        "created": answer.created,
        "model": answer.call.model,
        "system_fingerprint": FINGERPRINT,
    }


def write(answer: ModelAnswer) -> dict[str, Any]:
    """Return the body of a chat completion."""
    choices = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if answer.call.tool is not None:
            message.update(content=None, tool_calls=_tool_calls(answer, index, choice))
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(answer.call, choice.sample),
                "finish_reason": _finish(answer.call, choice),
            }
        )
    return {**_head(answer, "chat.completion"), "choices": choices, "usage": answer.usage}


def stream(answer: ModelAnswer) -> EventStream:
    """Return a chat completion as a stream of events."""
    call = answer.call
    head = _head(answer, "chat.completion.chunk")
    if wants_usage(call):
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], finish: str | None, logprobs: object) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data_event({**head, "choices": [choice]})

    first = {"role": "assistant", "content": None if call.tool else "", "refusal": None}
    content = [chunk(index, first, None, None) for index in range(len(answer.choices))]
    for index, choice, position, piece in pieces_in_turn(answer):
        delta: dict[str, Any] = {"content": piece}
        if call.tool is not None:
            part: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
            if position == 0:  # the first event has the function's name and the id of the call
                part = {"index": 0, **_tool_calls(answer, index, choice)[0]}
                part["function"]["arguments"] = piece
            delta = {"tool_calls": [part]}
        logprobs = _logprobs(call, choice.sample, slice(position, position + 1))
        content.append(chunk(index, delta, None, logprobs))
    ending = [chunk(i, {}, _finish(call, choice), None) for i, choice in enumerate(answer.choices)]
    if wants_usage(call):
        ending.append(data_event({**head, "choices": [], "usage": answer.usage}))
    return EventStream(content, [*ending, DONE])


def _logprobs(call: ModelCall, sample: DrawnText, only: slice = slice(None)) -> dict[str, Any] | None:
    if call.alternatives is None or call.schema is not None:
        return None
    part = part_of(sample, only)
    logprobs: dict[str, Any] = {"content": token_entries(part, call.alternatives), "refusal": None}
    if is_integer(call.body.get("logprobs")):  # what Together's client reads
        logprobs.update(tokens=part.tokens, token_logprobs=part.logprobs)
    return logprobs


def _finish(call: ModelCall, choice: SampledChoice) -> str:
    if call.tool is not None:
        return "tool_calls"
    return choice.sample.finish_reason if call.schema is None else "stop"  # JSON is always whole


def _tool_calls(answer: ModelAnswer, index: int, choice: SampledChoice) -> list[dict[str, Any]]:
    function = {"name": answer.call.tool, "arguments": choice.text}
    return [{"id": f"call_{answer.identity}{index}", "type": "function", "function": function}]
