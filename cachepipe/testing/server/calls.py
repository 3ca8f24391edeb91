"""Reads and checks request bodies: the parts that several dialects write alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import orjson

from cachepipe.testing.ngram import tokenise
from cachepipe.testing.server.refusals import RefusalError
from cachepipe.testing.server.settings import is_integer, is_number

if TYPE_CHECKING:
    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.settings import Settings

__all__ = [
    "ModelCall",
    "bad",
    "flag",
    "integer",
    "json_format",
    "messages_of",
    "model_name",
    "n_of",
    "number",
    "sampling",
    "stops",
    "texts_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """A call of the model, from any of the protocols.

    `contexts` are the prompts as the model reads them; each is answered `n` times. `alternatives` is
    the number of most probable tokens to list, or None without log probabilities. `schema` is set if the
    answer is JSON, and `tool` if it is a call of that function.
    """

    body: Mapping[str, Any]
    model: str
    contexts: Sequence[str]
    tokens_in: int
    n: int = 1
    best_of: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int
    stop: Sequence[str] = ()
    seed: int | None = None
    alternatives: int | None = None
    stream: bool = False
    schema: Mapping[str, Any] | None = None
    tool: str | None = None


def bad(param: str, expected: str, value: object) -> RefusalError:
    """Return the refusal of a parameter that is not as expected."""
    shown = orjson.dumps(value).decode()
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return RefusalError(400, f"Expected {param} to be {expected}, but got {shown}.", param=param)


def integer(
    body: Mapping[str, Any], name: str, low: int, high: int | None, default: int | None
) -> int | None:
    """Return an integer parameter, or the default if it is missing. Raise `RefusalError` for others."""
    value = body.get(name)
    if value is None:
        return default
    if not is_integer(value) or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise bad(name, f"an integer, {limits}", value)
    return cast("int", value)


def number(body: Mapping[str, Any], name: str, high: float) -> float:
    """Return a number parameter, or 1.0 if it is missing. Raise `RefusalError` for anything else."""
    value = body.get(name)
    if value is None:
        return 1.0
    if not is_number(value) or not 0.0 <= value <= high:
        raise bad(name, f"a number from 0 to {high:g}", value)
    return float(value)


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return a boolean parameter, or False if it is missing. Raise `RefusalError` for anything else."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise bad(name, "true or false", value)
    return value


def model_name(body: Mapping[str, Any]) -> str:
    """Return the name of the model. Raise `RefusalError` if it is missing."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise bad("model", "the name of a model", model)
    return model


def stops(body: Mapping[str, Any], name: str, most: int) -> tuple[str, ...]:
    """Return the stop sequences. Raise `RefusalError` for more than `most`."""
    value = body.get(name)
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, (list, tuple))
        or len(stops) > most
        or not all(isinstance(s, str) for s in stops)
    ):
        raise bad(name, f"a string or a list of up to {most} strings", value)
    return tuple(stop for stop in stops if stop)


def messages_of(value: object, param: str) -> list[Mapping[str, Any]]:
    """Return a list of messages. Raise `RefusalError` for anything else."""
    if not isinstance(value, list) or not value:
        raise bad(param, "a list of at least one message", value)
    for number, message in enumerate(value):
        _check_message(message, f"{param}[{number}]")
    return value


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise bad(where, "an object with role and content", message)
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise bad(f"{where}.content", "a string or a list of parts", content)
    if isinstance(content, list) and not all(isinstance(part, (str, dict)) for part in content):
        raise bad(f"{where}.content", "a list of objects with a type", content)
    if not isinstance(message.get("role", "user"), str):
        raise bad(f"{where}.role", "a string", message["role"])


def n_of(body: Mapping[str, Any], settings: Settings, name: str = "n") -> int:
    """Return the number of choices. Raise `RefusalError` above the server's limit."""
    value = integer(body, name, 1, None, 1) or 1
    if value > settings.max_n:
        raise RefusalError(
            400,
            f"Expected {name} to be at most {settings.max_n}, but got {value}. Ask several times instead.",
            param=name,
            code="integer_above_max_value",
        )
    return value


def sampling(body: Mapping[str, Any], settings: Settings, *limits: str) -> dict[str, Any]:
    """Return the arguments of `ModelCall` that all of OpenAI's endpoints write alike."""
    max_tokens = settings.max_tokens
    for name in limits:
        max_tokens = min(max_tokens, integer(body, name, 1, None, max_tokens) or max_tokens)
    return {
        "body": body,
        "model": model_name(body),
        "temperature": number(body, "temperature", 2.0),
        "top_p": number(body, "top_p", 1.0),
        "max_tokens": max_tokens,
        "seed": integer(body, "seed", -(2**63), 2**64 - 1, None),
        "stream": flag(body, "stream"),
    }


def json_format(value: object, param: str) -> dict[str, Any]:
    """Return `schema` if the response format is JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(param, "an object with a type", value)
    if value.get("type") == "json_object":
        return {"schema": {"type": "object", "properties": {"answer": {"type": "string"}}}}
    if value.get("type") == "json_schema":
        inner = value.get("json_schema")
        return {"schema": (inner if isinstance(inner, dict) else value).get("schema") or {"type": "object"}}
    return {}


def texts_of(value: object, param: str, model: NGramModel) -> tuple[list[str], int]:
    """Return the texts of a prompt or input in any of its four forms, and their number of tokens."""
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list) and items:
        if all(isinstance(item, str) for item in items):
            return items, sum(len(tokenise(item)) for item in items)
        lists = [items] if all(map(is_integer, items)) else items
        if all(map(_is_ids, lists)):
            return [model.decode(ids) for ids in lists], sum(map(len, lists))
    raise bad(param, "a string, a list of strings, or one or several lists of token ids", value)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_integer, value))
