"""Requests and answers of Groq's `/openai/v1/chat/completions`: chat completions with fields of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from cachepipe.testing.server import chat
from cachepipe.testing.server.answers import EventStream, data_event, wants_usage
from cachepipe.testing.server.refusals import RefusalError, error_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.answers import ModelAnswer
    from cachepipe.testing.server.calls import ModelCall
    from cachepipe.testing.server.settings import Settings

__all__ = ["HEADERS", "error", "error_event", "read", "stream", "write"]

HEADERS: Final = (
    (b"x-ratelimit-limit-requests", b"14400"),
    (b"x-ratelimit-limit-tokens", b"18000"),
    (b"x-ratelimit-remaining-requests", b"14399"),
    (b"x-ratelimit-remaining-tokens", b"17900"),
    (b"x-ratelimit-reset-requests", b"6s"),
    (b"x-ratelimit-reset-tokens", b"0.333333333s"),
)
"""What each answer says about its limits: requests per day, tokens per minute."""


def read(body: Mapping[str, Any], settings: Settings, model: NGramModel) -> ModelCall:
    """Return the call in a body. Raise `RefusalError` for more than one choice."""
    if body.get("n") not in {None, 1}:
        raise RefusalError(400, "'n' : number must be at most 1")
    return chat.read(body, settings, model)


def _named(answer: ModelAnswer) -> dict[str, Any]:
    return {"id": f"req_{answer.identity}"}


def _usage(answer: ModelAnswer) -> dict[str, Any]:
    """Return the usage, with the seconds that Groq reports."""
    seconds = {"queue_time": 0.01, "prompt_time": 0.001, "completion_time": 0.1, "total_time": 0.101}
    return {**answer.usage, **seconds}


def write(answer: ModelAnswer) -> dict[str, Any]:
    """Return the body of a chat completion."""
    body = chat.write(answer)
    for choice in body["choices"]:
        del choice["message"]["refusal"]
    return {**body, "usage": _usage(answer), "x_groq": _named(answer)}


def stream(answer: ModelAnswer) -> EventStream:
    """Return a chat completion as a stream of events: the first and the last one have the field `x_groq`."""
    content, ending = chat.stream(answer)
    content[0] = _with(content[0], x_groq=_named(answer))
    ending[0] = _with(ending[0], x_groq={**_named(answer), "usage": _usage(answer)})
    if wants_usage(answer.call):
        ending[1] = _with(ending[1], usage=_usage(answer))
    return EventStream(content, ending)


def _with(event: bytes, **fields: Any) -> bytes:
    return data_event({**orjson.loads(event.removeprefix(b"data: ")), **fields})


def error(refusal: RefusalError) -> dict[str, Any]:
    """Return the body of an error: with a code only if there is one, and without the parameter's name."""
    told = error_object(refusal)["error"]
    return {"error": {name: told[name] for name in ("message", "type", "code") if told[name] is not None}}


def error_event(refusal: RefusalError, _number: int) -> bytes:
    """Return an error in a stream."""
    return b"event: error\n" + data_event(error(refusal))
