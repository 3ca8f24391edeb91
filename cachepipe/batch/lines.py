"""What a line of a batch file asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cachepipe import jsontext, wire
from cachepipe.batch.settings import BatchSettings
from cachepipe.bounds import check_n
from cachepipe.errors import TooManySamples
from cachepipe.models.openai import ENDPOINTS

SETTINGS: Final = frozenset(
    {"model", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop"}
)
"""The fields that are part of what a line with a prompt or messages asks."""

_DEEPEST: Final = 250  # levels of a line
_GEMINI: Final = (wire.GENERATE_CONTENT, wire.EMBED_CONTENT)
_CONFIGS: Final = ("generationConfig", "generation_config")  # where the settings are in a body for Gemini
_LIMITS: Final = frozenset({"max_tokens", "max_completion_tokens"})  # a line that has one gets no other
_COMPLETION: Final = {name: name for name in ("model", "temperature", "seed", "max_tokens")}
_TEXT_GENERATION: Final = {"temperature": "temperature", "max_new_tokens": "max_tokens", "seed": "seed"}
_SETTINGS_OF: Final[Mapping[wire.Api, Mapping[str, str]]] = {
    wire.CHAT: {**_COMPLETION, "max_completion_tokens": "max_completion_tokens"},
    wire.COMPLETIONS: _COMPLETION,
    wire.RESPONSES: {"model": "model", "temperature": "temperature", "max_output_tokens": "max_tokens"},
    wire.EMBEDDINGS: {"model": "model"},
    wire.MODERATIONS: {"model": "model"},
    wire.GENERATE_CONTENT: {"temperature": "temperature", "maxOutputTokens": "max_tokens", "seed": "seed"},
    wire.EMBED_CONTENT: {},
    wire.TEXT_GENERATION: _TEXT_GENERATION,
    wire.GENERATE_TEXT: _TEXT_GENERATION,
    wire.FEATURE_EXTRACTION: {},
}
"""The fields that a run's settings fill in, by API, each with the name of the setting."""


class LineError(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch file.

    Attributes:
        number: its line in the file, from 1.
        custom_id: its name, which no other line of the file has.
        named: whether the line gives that name; otherwise it is the line's number.
        api: the API that it asks.
        url: the path that it asks; an empty one for a line that gives none.
        body: the body of the request.
        asks: the questions in the body.
        carried: fields that are copied to its result.
        refusal: why nothing is asked for it, or None.
    """

    number: int
    custom_id: str
    named: bool
    api: wire.Api
    url: str
    body: Mapping[str, Any]
    asks: tuple[wire.Ask, ...]
    carried: Mapping[str, Any]
    refusal: TooManySamples | None = None


def parse_line(text: bytes, number: int, settings: BatchSettings) -> Line:
    """Return the request of a line.

    Args:
        text: the line.
        number: its place in the file, from 1.
        settings: the settings of the run; they fill in what the line leaves out.

    Raises:
        ValueError: when it holds no valid request; the message says what was expected.
    """
    fields = _fields(text)
    name, custom_id = named(fields, number)
    api, body, used = _asked(fields)
    not_carried = {*used, name} - {"task_id"}
    carried = {field: value for field, value in fields.items() if field not in not_carried}
    url = fields["url"] if "url" in used else ""
    _fill(settings, api, body)
    if "model" not in body and api not in (wire.MODERATIONS, *wire.INFERENCE):
        raise LineError("it names no model, and --model is not given")
    try:
        asks = api.split(body)
    except wire.BadRequest as error:
        raise LineError(str(error)) from error
    if not asks[0].cacheable:
        raise LineError(f"it cannot be run from a file: {asks[0].reason}")
    refusal = None
    try:
        check_n(asks[0].n, len(asks))
    except TooManySamples as error:  # it is this line's result
        refusal, asks = error, tuple(ask._replace(n=1) for ask in asks)
    return Line(number, custom_id, name is not None, api, url, body, asks, carried, refusal)


def _fields(text: bytes) -> dict[str, Any]:
    """Return the fields of a line."""
    try:
        fields = jsontext.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(f"it is not valid JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise LineError(str(error)) from error
    if not isinstance(fields, dict):
        raise LineError(f"it must be a JSON object; got {fields!r:.80}")
    try:
        orjson.dumps([[fields]])  # as deep as a result holds what is carried along
    except TypeError as error:  # or it holds long integers or lone surrogates
        if _nests_deeper(fields, _DEEPEST):
            raise LineError(
                f"it is nested too deeply; at most {_DEEPEST} levels can be sent and written"
            ) from error
    return fields


def _nests_deeper(value: Any, levels: int) -> bool:
    """Return True if a JSON value nests more than this number of levels."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return not levels or any(_nests_deeper(item, levels - 1) for item in items)


def named(fields: Mapping[str, Any], number: int) -> tuple[str | None, str]:
    """Return the field with the id of a line, and the id; without such a field, None and the line number.

    Raises:
        LineError: when the id is neither a string nor a whole number.
    """
    for name in ("custom_id", "id", "task_id"):
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise LineError(f"{name} must be a string; got {value!r:.80}")
        return name, str(value)
    return None, str(number)


def _asked(fields: Mapping[str, Any]) -> tuple[wire.Api, dict[str, Any], frozenset[str]]:
    """Return the API that a line asks, the body, and the fields that are not carried along."""
    if "url" in fields or "method" in fields:
        body = fields.get("body")
        if not isinstance(body, dict):
            raise LineError(f"its body must be a JSON object; got {body!r:.80}")
        api = _api(fields)
        return api, dict(api.received(fields["url"], body)), frozenset({"method", "url", "body"})
    body = {name: value for name, value in fields.items() if name in SETTINGS and value is not None}
    name, body["messages"] = _messages(fields)
    return wire.CHAT, body, frozenset({name})


def _messages(fields: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the field that holds the messages or the prompt of a line, and the messages."""
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise LineError(f"messages must be a list of messages; got {messages!r:.80}")
        return "messages", messages
    if "prompt" not in fields:
        raise LineError(
            "it holds no request: neither prompt, nor messages, nor method, url and body; "
            f"it has {', '.join(sorted(fields)) or 'no fields'}"
        )
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise LineError(f"prompt must be a string; got {prompt!r:.80}. A list of messages goes into messages")
    return "prompt", [{"role": "user", "content": prompt}]


def _api(fields: Mapping[str, Any]) -> wire.Api:
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise LineError(f"method must be POST; got {method!r:.80}")
    is_path = isinstance(url, str) and url.startswith("/") and "?" not in url
    api = wire.api_for("POST", url) if isinstance(url, str) and is_path else None
    if api is None or api not in (*ENDPOINTS, *_GEMINI, *wire.INFERENCE):
        known = ", ".join(f"/v1{endpoint}" for endpoint in ENDPOINTS.values())
        known += ", /v1beta/models/MODEL:generateContent or :embedContent for Gemini, or /models/MODEL, "
        known += "/models/MODEL/pipeline/feature-extraction, /generate or /embed for Hugging Face"
        raise LineError(f"url must be one of {known}; got {url!r:.80}. The server is --base-url")
    return api


def _fill(settings: BatchSettings, api: wire.Api, body: dict[str, Any]) -> None:
    """Add the settings of the run that a body lacks, where the API has them."""
    if api is wire.GENERATE_CONTENT:
        place = next((name for name in _CONFIGS if name in body), _CONFIGS[0])
        given = body.get(place) or {}
        if not isinstance(given, dict):
            raise LineError(f"{place} must be a JSON object; got {given!r:.80}")
        body[place] = config = dict(given)
        _add(settings, api, config)
        if settings.n != 1 and not {"candidateCount", "candidate_count"} & config.keys():
            config["candidateCount"] = settings.n
        return
    fields = body
    if api in (wire.TEXT_GENERATION, wire.GENERATE_TEXT):
        given = body.get("parameters") or {}
        if not isinstance(given, dict):
            raise LineError(f"parameters must be a JSON object; got {given!r:.80}")
        fields = body["parameters"] = dict(given)
    _add(settings, api, fields)
    if settings.n == 1 or api.function:
        return
    if api.max_n == 1:
        raise LineError(
            f"{api.name} gives one answer per request, and n is {settings.n}; "
            "repeat the line under other custom_ids"
        )
    if body.get("n") is None:
        body["n"] = settings.n


def _add(settings: BatchSettings, api: wire.Api, fields: dict[str, Any]) -> None:
    """Add the settings of the run that fields of a body lack."""
    limited = not _LIMITS.isdisjoint(fields)
    for name, setting in _SETTINGS_OF[api].items():
        value = getattr(settings, setting)
        if value is not None and not (limited and name in _LIMITS):
            fields.setdefault(name, value)
