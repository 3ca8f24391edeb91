"""Requests and answers of `/v1/responses`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cachepipe.testing.ngram import flatten, tokenise
from cachepipe.testing.server.answers import EventStream, ModelAnswer, named_event, part_of, token_entries
from cachepipe.testing.server.calls import (
    ModelCall,
    integer,
    json_format,
    messages_of,
    sampling,
)
from cachepipe.testing.server.tools import tool_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.refusals import RefusalError
    from cachepipe.testing.server.settings import Settings

__all__ = ["error_event", "read", "stream", "write"]


def read(body: Mapping[str, Any], settings: Settings, _model: NGramModel) -> ModelCall:
    """Return the call in the body of a response. The server keeps no state: it reads only the input."""
    arguments = sampling(body, settings, "max_output_tokens")
    given = body.get("input")
    items: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else _items(given)
    if body.get("instructions"):
        items = [{"role": "system", "content": str(body["instructions"])}, *items]
    context = flatten(items)
    include = body.get("include")
    listed = isinstance(include, list) and "message.output_text.logprobs" in include
    shape = body.get("text")
    arguments.update(json_format(shape.get("format") if isinstance(shape, dict) else shape, "text.format"))
    arguments.update(tool_of(body, settings, "parameters"))
    return ModelCall(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        alternatives=integer(body, "top_logprobs", 0, 20, 0) if listed or body.get("top_logprobs") else None,
    )


def write(answer: ModelAnswer, *, whole: bool = True) -> dict[str, Any]:
    """Return the body of a response."""
    call = answer.call
    status = _status(answer) if whole else "in_progress"
    usage = {
        "input_tokens": call.tokens_in,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.tokens_out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.tokens_in + answer.tokens_out,
    }
    return {
        "id": f"resp_{answer.identity}",
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": call.body.get("instructions"),
        "max_output_tokens": call.body.get("max_output_tokens"),
        "metadata": call.body.get("metadata") or {},
        "model": call.model,
        "output": [_item(answer)] if whole and answer.choices else [],
        "parallel_tool_calls": True,
        "previous_response_id": call.body.get("previous_response_id"),
        "store": False,
        "temperature": call.temperature,
        "text": call.body.get("text") or {"format": {"type": "text"}},
        "tool_choice": call.body.get("tool_choice") or "auto",
        "tools": call.body.get("tools") or [],
        "top_p": call.top_p,
        "usage": usage if whole else None,
    }


def stream(answer: ModelAnswer) -> EventStream:
    """Return a response as a stream of events."""
    number = 0

    def event(kind: str, **values: Any) -> bytes:
        nonlocal number
        number += 1
        return named_event({"type": f"response.{kind}", "sequence_number": number - 1, **values})

    started = write(answer, whole=False)
    content = [event("created", response=started), event("in_progress", response=started)]
    ending: list[bytes] = []
    if answer.choices:
        text = answer.choices[0].text
        item = _item(answer)
        place = {"item_id": item["id"], "output_index": 0}
        content.append(event("output_item.added", output_index=0, item=_item(answer, whole=False)))
        if answer.call.tool is not None:
            content += [
                event("function_call_arguments.delta", **place, delta=piece)
                for piece in answer.choices[0].pieces
            ]
            done = {**place, "name": answer.call.tool, "arguments": text}
            ending.append(event("function_call_arguments.done", **done))
        else:
            place["content_index"] = 0
            content.append(event("content_part.added", **place, part=_text_part(answer, whole=False)))
            for position, piece in enumerate(answer.choices[0].pieces):
                logprobs = _logprobs(answer, slice(position, position + 1))
                content.append(event("output_text.delta", **place, delta=piece, logprobs=logprobs))
            logprobs = _logprobs(answer)
            ending.append(event("output_text.done", **place, text=text, logprobs=logprobs))
            ending.append(event("content_part.done", **place, part=_text_part(answer)))
        ending.append(event("output_item.done", output_index=0, item=item))
    body = write(answer)
    ending.append(event(body["status"], response=body))
    return EventStream(content, ending)


def error_event(refusal: RefusalError, number: int) -> bytes:
    """Return an error in a stream, with the number of events before it."""
    values = {"code": "server_error", "message": refusal.message, "param": None}
    return named_event({"type": "error", "sequence_number": number, **values})


def _item(answer: ModelAnswer, *, whole: bool = True) -> dict[str, Any]:
    """Return the one output item of a response: a message, or a call of the required tool."""
    choice = answer.choices[0]
    status = _status(answer) if whole else "in_progress"
    if answer.call.tool is not None:
        return {
            "type": "function_call",
            "id": f"fc_{answer.identity}",
            "call_id": f"call_{answer.identity}",
            "name": answer.call.tool,
            "arguments": choice.text if whole else "",
            "status": status,
        }
    return {
        "type": "message",
        "id": f"msg_{answer.identity}",
        "role": "assistant",
        "status": status,
        "content": [_text_part(answer)] if whole else [],
    }


def _text_part(answer: ModelAnswer, *, whole: bool = True) -> dict[str, Any]:
    choice = answer.choices[0]
    return {
        "type": "output_text",
        "text": choice.text if whole else "",
        "annotations": [],
        "logprobs": _logprobs(answer) if whole else [],
    }


def _logprobs(answer: ModelAnswer, only: slice = slice(None)) -> list[dict[str, Any]]:
    call = answer.call
    if call.alternatives is None or call.schema is not None:
        return []
    return token_entries(part_of(answer.choices[0].sample, only), call.alternatives)


def _status(answer: ModelAnswer) -> str:
    cut = any(choice.sample.finish_reason == "length" for choice in answer.choices)
    return "incomplete" if cut and answer.call.schema is None else "completed"


def _items(value: object) -> list[Mapping[str, Any]]:
    """Return the input items of a response as messages; other items become messages of their text."""
    messages: list[Mapping[str, Any]] = []
    for item in messages_of(value, "input"):
        if item.get("type", "message") == "message":
            messages.append(item)
        else:
            told = item.get("output", item.get("arguments", item.get("summary", "")))
            text = told if isinstance(told, str) else orjson.dumps(told).decode()
            messages.append({"role": "tool", "content": f"{item.get('name', '')}({text})"})
    return messages
