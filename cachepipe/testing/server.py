"""A model server on the loopback interface that speaks OpenAI's protocol and Anthropic's messages.

What answers is the n-gram model of `cachepipe.testing.ngram`: real, random, and of a known distribution.
What surrounds it can be set: latency, rate limits and the faults that real providers show. The
server counts what it serves, so a test can say what a cache has saved.

    async with MockServer(Settings(latency=0.05)) as server:
        client = AsyncOpenAI(base_url=server.base_url, api_key="any")

The layers, top to bottom: settings and counters; calls (what a body asks for, checked); dialects (what
an answer looks like in each protocol); the server (which answer, when, and counted how); the
connection (bytes, through h11). Only the last two know that time passes.

The order of things for one request: key, rate limit, fault, validation, sampling, latency, writing. So
samples are drawn in order of arrival, and a server with a seed answers the same sequence of requests
with the same sequence of samples, whatever the latency.

Over HTTP: ``GET`` and ``POST /mock/settings`` (a JSON object of `Settings` to change), ``GET
/mock/stats``, ``POST /mock/reset``. For one request alone, headers override the settings: x-mock-latency,
x-mock-latency-per-token, x-mock-stream-delay, and x-mock-fault with a fault in any form that
`Fault.parse` takes, or ``none``.

Parameters that the model has no use for (penalties, `top_k`, `logit_bias` …) are accepted and ignored.
So is the name of the model, except that it takes part in seeding, and unless `any_model` is false.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import math
import secrets
import signal
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields, replace
from email.utils import formatdate
from http import HTTPStatus
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast
from urllib.parse import unquote

import h11
import orjson

from cachepipe.testing.ngram import NGramModel, Sample, default_model, embed, flatten, generator, tokenise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

__all__ = ["FAULTS", "Fault", "LogEntry", "MockServer", "Settings", "Stats", "run_server"]

FAULTS: Final[Mapping[str, str]] = {
    "rate_limit": "429 with Retry-After",
    "error": "500",
    "unavailable": "503 with Retry-After",
    "status": "the status given as `status`",
    "drop": "the connection closes before any byte",
    "cut": "the connection closes in mid-answer",
    "truncate": "a stream ends in good order but without finish_reason or [DONE]; otherwise as cut",
    "short": "fewer choices than asked: `keep` of them, by default one too few",
    "error_200": "an error object under status 200, or an error event in mid-stream",
    "malformed": "status 200 and broken JSON",
}
"""The kinds of faults, and what the client sees of each."""

_logger: Final = logging.getLogger(__name__)
_SECONDS: Final = "a number of seconds, 0 or more"
_FAULT_STATUS: Final = {"rate_limit": 429, "error": 500, "unavailable": 503, "status": 500}
_FRAGMENT: Final = 16  # characters of JSON in an event of a stream
_FINGERPRINT: Final = "fp_ngram_1"
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = (b"content-type", b"text/event-stream; charset=utf-8")
_DONE: Final = b"data: [DONE]\n\n"


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to fail a request to a model.

    Attributes:
        kind: One of `FAULTS`.
        probability: How often it strikes, where it is not scripted.
        status: The HTTP status of kind ``"status"``.
        retry_after: Seconds to announce in Retry-After; by default 1 where the kind announces any.
        keep: How many choices a short reply keeps.
        after: How many events a broken stream delivers; by default half of those with content.
        path: The fault strikes only requests whose path contains this, where it is not scripted.
        message: What the error says.
    """

    kind: str
    probability: float = 1.0
    status: int | None = None
    retry_after: float | None = None
    keep: int | None = None
    after: int | None = None
    path: str = ""
    message: str = "This failure was asked for in the settings of the mock server."

    def __post_init__(self) -> None:
        _check("kind", self.kind, f"one of {', '.join(FAULTS)}", self.kind in FAULTS)
        share = self.probability
        _check("probability", share, "a number from 0 to 1", _is_number(share) and 0 <= share <= 1)
        status = self.status
        good = status is None or (_is_integer(status) and 400 <= status <= 599)
        _check("status", status, "a whole number from 400 to 599, or None", good)
        wait = self.retry_after
        _check("retry_after", wait, _SECONDS, wait is None or _is_seconds(wait))
        for name in ("keep", "after"):
            value = getattr(self, name)
            _check(name, value, "a whole number, 0 or more, or None", value is None or _is_count(value, 0))
        for name in ("path", "message"):
            _check(name, getattr(self, name), "a string", isinstance(getattr(self, name), str))

    @classmethod
    def parse(cls, value: object) -> Fault:
        """Return the fault that a short form means.

        A kind (``"drop"``), a status (``503``), either with a probability (``"drop:0.1"``), or the
        fields by name (``{"kind": "short", "keep": 1}``).
        """
        if isinstance(value, Fault):
            return value
        if isinstance(value, dict):
            _known_names("fault", value, cls)
            return cls(**value)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            kind, _, probability = str(value).partition(":")
            try:
                share = float(probability or 1.0)
            except ValueError:
                raise ValueError(f"A fault's probability is a number, not {probability!r}.") from None
            if kind.isdecimal():
                return cls(kind="status", status=int(kind), probability=share)
            return cls(kind=kind, probability=share)
        raise ValueError(f"A fault is a kind, a status or an object with a kind, not {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a mock server behaves; may be replaced while it runs.

    Attributes:
        latency: Seconds before an answer (of a stream: before its first event).
        latency_per_token: Seconds more for each token of the longest choice, so that long answers
            take longer; in a stream, between its events.
        stream_delay: Seconds between the events of a stream.
        paused: While true, requests are taken in but none is answered.
        faults: What strikes by chance: each is tried in turn, with its probability.
        script: What strikes the next requests to a model, one entry each; None lets one pass.
            While there is a script, `faults` rest.
        max_n: The largest `n` (and `best_of`) that is not refused with 400.
        max_tokens: The length where every answer ends, and the limit of requests that set none.
        rate: Requests per second to let through; beyond that they get 429.
        burst: How many may come at once when the limit has rested; by default the rate, rounded up.
        api_key: The only key to accept; any, or none, when not set.
        seed: Makes the samples of unseeded requests, and the faults, a repeatable sequence.
        uses_tools: Whether a tool that is offered is called; else only one that is demanded is. Of several,
            the first that the conversation has not called yet.
        models: The models that are listed.
        any_model: Whether other names are answered too; else they get 404, as from a real server.
        dimensions: The length of an embedding that does not ask for one.
        max_body: The largest request body in bytes; larger ones get 413.
        log_size: How many requests the log remembers.
    """

    latency: float = 0.0
    latency_per_token: float = 0.0
    stream_delay: float = 0.0
    paused: bool = False
    faults: tuple[Fault, ...] = ()
    script: tuple[Fault | None, ...] = ()
    max_n: int = 128
    max_tokens: int = 512
    rate: float | None = None
    burst: int | None = None
    api_key: str | None = field(default=None, repr=False)
    seed: int | None = None
    uses_tools: bool = False
    models: tuple[str, ...] = ("ngram-1", "ngram-1-embedding")
    any_model: bool = True
    dimensions: int = 256
    max_body: int = 16 * 2**20
    log_size: int = 10_000

    def __post_init__(self) -> None:
        for name in ("latency", "latency_per_token", "stream_delay"):
            _check(name, getattr(self, name), _SECONDS, _is_seconds(getattr(self, name)))
        for name in ("max_n", "max_tokens", "dimensions", "max_body"):
            _check(name, getattr(self, name), "a whole number, 1 or more", _is_count(getattr(self, name), 1))
        rate, burst, seed, key = self.rate, self.burst, self.seed, self.api_key
        good = rate is None or (_is_number(rate) and 0 < rate < math.inf)
        _check("rate", rate, "a number of requests per second above 0, or None", good)
        _check("burst", burst, "a whole number, 1 or more, or None", burst is None or _is_count(burst, 1))
        _check("seed", seed, "a whole number or None", seed is None or _is_integer(seed))
        _check("api_key", "something else", "a string or None", key is None or isinstance(key, str))
        for name in ("paused", "uses_tools", "any_model"):
            _check(name, getattr(self, name), "true or false", isinstance(getattr(self, name), bool))
        _check("log_size", self.log_size, "a whole number, 0 or more", _is_count(self.log_size, 0))
        for name in ("faults", "script", "models"):
            _check(name, getattr(self, name), "a list", isinstance(getattr(self, name), (list, tuple)))
        # Short forms become faults once; a tuple that is complete stays the same object, by which
        # the server knows a script that it has begun from a new one.
        object.__setattr__(self, "faults", _complete(self.faults, Fault))
        object.__setattr__(self, "script", _complete(self.script, (Fault, type(None))))
        object.__setattr__(self, "models", tuple(map(str, self.models)))

    def updated(self, changes: Mapping[str, Any]) -> Settings:
        """Return the settings with the named fields changed, as ``POST /mock/settings`` does.

        Raises:
            ValueError: If a name is no setting, or a value is none for it.
        """
        _known_names("setting", changes, type(self))
        return replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        """Return the settings by name; of the key only whether there is one."""
        values = asdict(self)
        values["api_key"] = self.api_key is not None
        return values


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise ValueError(f"{name} is {expected}, not {value!r}.")


def _complete(values: Sequence[Any], kinds: Any) -> tuple[Any, ...]:
    """Return a tuple of faults (None stays None), the very one given if it is that already."""
    if isinstance(values, tuple) and all(isinstance(value, kinds) for value in values):
        return values
    return tuple(value if isinstance(value, kinds) else Fault.parse(value) for value in values)


def _known_names(what: str, values: Iterable[str], kind: type[Any]) -> None:
    names = [item.name for item in fields(kind)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"There is no {what} {', '.join(unknown)}; there are {', '.join(names)}.")


# --------------------------------------------------------------------------------------------------
# Counters
# --------------------------------------------------------------------------------------------------


class LogEntry(NamedTuple):
    """One request as it ended: when it arrived (Unix time), what it asked, and what became of it."""

    time: float
    path: str
    status: int
    n: int
    stream: bool
    fault: str | None
    seconds: float


class Stats:
    """What a server has served since it started, or since the last reset.

    Attributes:
        requests: All requests, except those under ``/mock``.
        by_path: How often each path got each status. A status of 0 stands for a connection that the
            server dropped, 499 for one that the client left. Paths that do not exist count as ``"other"``.
        samples_generated: Choices (or embeddings) that the model made.
        samples_delivered: Those of them that were sent to the end in a reply that is in order.
        tokens_in: Tokens of the prompts answered.
        tokens_out: Tokens of all samples generated.
        streams: Requests answered by a stream.
        faults: How often each kind of fault struck.
        in_flight: Requests being answered now.
        max_in_flight: The most there were at once.
        connections: Connections open now.
        max_connections: The most there were at once.
        log: The latest requests, oldest first.
    """

    def __init__(self, log_size: int = 10_000) -> None:
        self.in_flight = 0
        self.connections = 0
        self.log: deque[LogEntry] = deque(maxlen=log_size)
        self.reset()

    def reset(self) -> None:
        """Count from zero. What is under way goes on being under way."""
        self.requests = 0
        self.by_path: dict[str, Counter[int]] = {}
        self.samples_generated = 0
        self.samples_delivered = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self.streams = 0
        self.faults: Counter[str] = Counter()
        self.max_in_flight = self.in_flight
        self.max_connections = self.connections
        self.log.clear()

    def __repr__(self) -> str:
        return (
            f"<Stats {self.requests} requests, {self.in_flight} in flight, "
            f"{self.samples_delivered} of {self.samples_generated} samples delivered>"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counters by name, the log as a list of objects."""
        return {
            "requests": self.requests,
            "by_path": {
                path: {str(status): count for status, count in sorted(counts.items())}
                for path, counts in sorted(self.by_path.items())
            },
            "samples_generated": self.samples_generated,
            "samples_delivered": self.samples_delivered,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "streams": self.streams,
            "faults": dict(sorted(self.faults.items())),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": self.connections,
            "max_connections": self.max_connections,
            "log": [entry._asdict() for entry in list(self.log)],
        }


class _Bucket:
    """A token bucket: `take` gives 0.0 when a request may pass, else the seconds until one may."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._level, self._since = float(burst), clock()

    def take(self) -> float:
        now = self._clock()
        self._level = min(float(self.burst), self._level + (now - self._since) * self.rate)
        self._since = now
        if self._level >= 1.0 - 1e-9:
            self._level -= 1.0
            return 0.0
        return (1.0 - self._level) / self.rate


# --------------------------------------------------------------------------------------------------
# Calls: what a body asks for, checked
# --------------------------------------------------------------------------------------------------


class _RefusalError(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What any of the protocols may ask of the model.

    `contexts` are the prompts as the model reads them, each to be answered `n` times. `alternatives` is
    None without log probabilities, else how many top tokens to list. `schema` is set where an
    answer is to be JSON, `tool` where it is to be a call of that function.
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


def _bad(param: str, expected: str, value: object) -> _RefusalError:
    shown = orjson.dumps(value).decode()
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return _RefusalError(400, f"Expected {param} to be {expected}, but got {shown}.", param=param)


def _integer(
    body: Mapping[str, Any], name: str, low: int, high: int | None, default: int | None
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if not _is_integer(value) or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise _bad(name, f"an integer, {limits}", value)
    return cast("int", value)


def _number(body: Mapping[str, Any], name: str, high: float) -> float:
    value = body.get(name)
    if value is None:
        return 1.0
    if not _is_number(value) or not 0.0 <= value <= high:
        raise _bad(name, f"a number from 0 to {high:g}", value)
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _bad(name, "true or false", value)
    return value


def _name_of_model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _bad("model", "the name of a model", model)
    return model


def _stops(body: Mapping[str, Any], name: str, most: int) -> tuple[str, ...]:
    value = body.get(name)
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else value
    if (
        not isinstance(stops, (list, tuple))
        or len(stops) > most
        or not all(isinstance(s, str) for s in stops)
    ):
        raise _bad(name, f"a string or a list of up to {most} strings", value)
    return tuple(stop for stop in stops if stop)


def _messages(value: object, param: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _bad(param, "a list of at least one message", value)
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise _bad(f"{param}[{number}]", "an object with role and content", message)
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise _bad(f"{param}[{number}].content", "a string or a list of parts", content)
        if isinstance(content, list) and not all(isinstance(part, (str, dict)) for part in content):
            raise _bad(f"{param}[{number}].content", "a list of objects with a type", content)
        if not isinstance(message.get("role", "user"), str):
            raise _bad(f"{param}[{number}].role", "a string", message["role"])
    return value


def _n_of(body: Mapping[str, Any], settings: Settings, name: str = "n") -> int:
    value = _integer(body, name, 1, None, 1) or 1
    if value > settings.max_n:
        raise _RefusalError(
            400,
            f"Expected {name} to be at most {settings.max_n}, but got {value}. Ask several times instead.",
            param=name,
            code="integer_above_max_value",
        )
    return value


def _sampling(body: Mapping[str, Any], settings: Settings, *limits: str) -> dict[str, Any]:
    """Return the arguments of `_Call` that all of OpenAI's endpoints write alike."""
    max_tokens = settings.max_tokens
    for name in limits:
        max_tokens = min(max_tokens, _integer(body, name, 1, None, max_tokens) or max_tokens)
    return {
        "body": body,
        "model": _name_of_model(body),
        "temperature": _number(body, "temperature", 2.0),
        "top_p": _number(body, "top_p", 1.0),
        "max_tokens": max_tokens,
        "seed": _integer(body, "seed", -(2**63), 2**64 - 1, None),
        "stream": _flag(body, "stream"),
    }


def _tool(body: Mapping[str, Any], settings: Settings, schema_field: str) -> dict[str, Any]:
    """Return `tool` and `schema` of the tool that is to be called, if one is."""
    choice = body.get("tool_choice") or "auto"
    wanted, kind = None, choice
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = choice.get("name") or (function.get("name") if isinstance(function, dict) else None)
        kind = choice.get("type")
    forced = wanted is not None or kind in ("required", "any")
    if not forced and not (kind == "auto" and settings.uses_tools):
        return {}
    tools = [tool.get("function", tool) for tool in body.get("tools") or () if isinstance(tool, dict)]
    tools = [tool for tool in tools if wanted in {None, tool.get("name")}]
    if forced and not tools:
        raise _bad("tool_choice", "one of the tools given in tools", body.get("tool_choice"))
    called = set(_called(body.get("messages", body.get("input"))))
    left = [tool for tool in tools if tool.get("name") not in called] or (tools[-1:] if forced else [])
    if not left:
        return {}
    return {"tool": str(left[0].get("name")), "schema": left[0].get(schema_field) or {"type": "object"}}


def _called(messages: object) -> Iterator[object]:
    """Yield the names of the tools that a conversation has called, in any of the protocols."""
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        blocks = message.get("content")
        for item in [message, *(blocks if isinstance(blocks, list) else ())]:
            if isinstance(item, dict) and item.get("type") in ("function_call", "tool_use"):
                yield item.get("name")
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            yield function.get("name") if isinstance(function, dict) else None


def _json_format(value: object, param: str) -> dict[str, Any]:
    """Return `schema` where a response format demands JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(param, "an object with a type", value)
    if value.get("type") == "json_object":
        return {"schema": {"type": "object", "properties": {"answer": {"type": "string"}}}}
    if value.get("type") == "json_schema":
        inner = value.get("json_schema")
        return {"schema": (inner if isinstance(inner, dict) else value).get("schema") or {"type": "object"}}
    return {}


def _chat_call(body: Mapping[str, Any], settings: Settings) -> _Call:
    arguments = _sampling(body, settings, "max_tokens", "max_completion_tokens")
    context = flatten(_messages(body.get("messages"), "messages"))
    wanted = body.get("logprobs")
    alternatives: int | None
    if _is_integer(wanted):  # Together's form: a number of alternatives
        alternatives = _integer(body, "logprobs", 0, 20, 0)
    else:
        alternatives = (_integer(body, "top_logprobs", 0, 20, 0)) if _flag(body, "logprobs") else None
        if alternatives is None and body.get("top_logprobs"):
            raise _bad("logprobs", "true when top_logprobs is set", wanted)
    arguments.update(_json_format(body.get("response_format"), "response_format"))
    arguments.update(_tool(body, settings, "parameters"))
    return _Call(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        n=_n_of(body, settings),
        stop=_stops(body, "stop", 4),
        alternatives=alternatives,
    )


def _texts(value: object, param: str, model: NGramModel) -> tuple[list[str], int]:
    """Return the texts of a prompt or an input in any of its four forms, and how many tokens they have."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _bad(param, "a string, a list of strings, or one or several lists of token ids", value)
    if all(isinstance(item, str) for item in value):
        return value, sum(len(tokenise(item)) for item in value)
    lists = [value] if all(_is_integer(item) for item in value) else value
    if all(isinstance(ids, list) and ids and all(map(_is_integer, ids)) for ids in lists):
        return [model.decode(ids) for ids in lists], sum(map(len, lists))
    raise _bad(param, "a string, a list of strings, or one or several lists of token ids", value)


def _completion_call(body: Mapping[str, Any], settings: Settings, model: NGramModel) -> _Call:
    arguments = _sampling(body, settings, "max_tokens")
    contexts, tokens_in = _texts(body.get("prompt", ""), "prompt", model)
    n = _n_of(body, settings)
    best_of = _n_of(body, settings, "best_of") if body.get("best_of") is not None else n
    if best_of < n:
        raise _bad("best_of", f"at least n, which is {n}", best_of)
    if best_of > n and arguments["stream"]:
        raise _bad("stream", "false when best_of is greater than n", True)
    alternatives = _integer(body, "logprobs", 0, 20, None)
    if _flag(body, "echo") and alternatives is not None:
        raise _bad("echo", "false when logprobs is set; the prompt has none here", True)
    return _Call(
        **arguments,
        contexts=contexts,
        tokens_in=tokens_in,
        n=n,
        best_of=best_of,
        stop=_stops(body, "stop", 4),
        alternatives=alternatives,
    )


def _responses_call(body: Mapping[str, Any], settings: Settings) -> _Call:
    """Return what a response is asked of. No state is kept: the input is all that is looked at."""
    arguments = _sampling(body, settings, "max_output_tokens")
    given = body.get("input")
    items: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else _items(given)
    if body.get("instructions"):
        items = [{"role": "system", "content": str(body["instructions"])}, *items]
    context = flatten(items)
    include = body.get("include")
    listed = isinstance(include, list) and "message.output_text.logprobs" in include
    shape = body.get("text")
    arguments.update(_json_format(shape.get("format") if isinstance(shape, dict) else shape, "text.format"))
    arguments.update(_tool(body, settings, "parameters"))
    return _Call(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        alternatives=_integer(body, "top_logprobs", 0, 20, 0) if listed or body.get("top_logprobs") else None,
    )


def _items(value: object) -> list[Mapping[str, Any]]:
    """Return the input items of a response as messages; an item that is none counts by its text."""
    messages: list[Mapping[str, Any]] = []
    for item in _messages(value, "input"):
        if item.get("type", "message") == "message":
            messages.append(item)
        else:
            told = item.get("output", item.get("arguments", item.get("summary", "")))
            text = told if isinstance(told, str) else orjson.dumps(told).decode()
            messages.append({"role": "tool", "content": f"{item.get('name', '')}({text})"})
    return messages


def _messages_call(body: Mapping[str, Any], settings: Settings) -> _Call:
    if body.get("max_tokens") is None:
        raise _bad("max_tokens", "set", None)
    _number(body, "temperature", 1.0)  # before the others' higher limit is named
    arguments = _sampling(body, settings, "max_tokens")
    messages: list[Mapping[str, Any]] = _messages(body.get("messages"), "messages")
    if body.get("system"):
        messages = [*_messages([{"role": "system", "content": body["system"]}], "system"), *messages]
    context = flatten(messages)
    shape = body.get("output_config")
    shape = shape.get("format") if isinstance(shape, dict) else body.get("output_format")
    arguments.update(_json_format(shape, "output_config.format"))
    arguments.update(_tool(body, settings, "input_schema"))
    return _Call(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        stop=_stops(body, "stop_sequences", 8191),
    )


def _instance(schema: object, text: str, root: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a small value that fits a JSON schema, with the text wherever a string is wanted.

    Types, properties, items, enumerations, constants, alternatives and local references are
    followed; bounds and patterns are not.
    """
    if not isinstance(schema, dict) or depth > 16:
        return text
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step, {}) if isinstance(target, dict) else {}
        return _instance(target, text, root, depth + 1)
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return _instance(schema[name][0], text, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][len(text) % len(schema["enum"])]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: _instance(inner, text, root, depth + 1) for name, inner in properties.items()}
    if kind == "array":
        return [_instance(schema.get("items") or {}, text, root, depth + 1)]
    plain = {"integer": len(text), "number": len(text) / 2, "boolean": len(text) % 2 == 0, "null": None}
    return plain.get(kind, text)


# --------------------------------------------------------------------------------------------------
# Dialects: what an answer looks like
# --------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """One sample as a client gets it: its text (or arguments), cut into the pieces of a stream."""

    sample: Sample
    text: str
    pieces: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """Everything a dialect needs to word an answer."""

    call: _Call
    choices: Sequence[_Choice]
    identity: str
    created: int
    tokens_out: int

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens as OpenAI's older endpoints count them."""
        tokens_in = self.call.tokens_in
        return {
            "prompt_tokens": tokens_in,
            "completion_tokens": self.tokens_out,
            "total_tokens": tokens_in + self.tokens_out,
        }


class _Stream(NamedTuple):
    """A stream in two parts: the events that bring content, and those that say that it is whole."""

    content: list[bytes]
    ending: list[bytes]


def _data(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _event(value: Mapping[str, Any]) -> bytes:
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"


def _choice(call: _Call, sample: Sample) -> _Choice:
    if call.schema is not None:
        text = orjson.dumps(_instance(call.schema, sample.text, call.schema)).decode()
        return _Choice(sample, text, [text[at : at + _FRAGMENT] for at in range(0, len(text), _FRAGMENT)])
    pieces = list(sample.tokens)
    if pieces and sample.stop is not None:  # the last token may reach beyond the stop sequence
        pieces[-1] = sample.text[sum(map(len, pieces[:-1])) :]
    return _Choice(sample, sample.text, pieces)


def _token_entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _entries(sample: Sample, alternatives: int) -> list[dict[str, Any]]:
    """Return one entry per token with its log probability and the most probable alternatives."""
    return [
        {
            **_token_entry(token, logprob),
            "top_logprobs": [
                _token_entry(*pair)
                for pair in zip(table.tokens[:alternatives], table.logarithms[:alternatives], strict=True)
            ],
        }
        for token, logprob, table in zip(sample.tokens, sample.logprobs, sample.tables, strict=True)
    ]


def _chat_logprobs(call: _Call, sample: Sample, only: slice = slice(None)) -> dict[str, Any] | None:
    if call.alternatives is None or call.schema is not None:
        return None
    part = _part(sample, only)
    logprobs: dict[str, Any] = {"content": _entries(part, call.alternatives), "refusal": None}
    if _is_integer(call.body.get("logprobs")):  # what Together's client reads
        logprobs.update(tokens=part.tokens, token_logprobs=part.logprobs)
    return logprobs


def _part(sample: Sample, only: slice) -> Sample:
    return replace(
        sample, tokens=sample.tokens[only], logprobs=sample.logprobs[only], tables=sample.tables[only]
    )


def _chat_finish(call: _Call, choice: _Choice) -> str:
    if call.tool is not None:
        return "tool_calls"
    return choice.sample.finish_reason if call.schema is None else "stop"  # JSON is always whole


def _tool_calls(answer: _Answer, index: int, choice: _Choice) -> list[dict[str, Any]]:
    function = {"name": answer.call.tool, "arguments": choice.text}
    return [{"id": f"call_{answer.identity}{index}", "type": "function", "function": function}]


def _chat_head(answer: _Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.identity}",
        "object": kind,
        "created": answer.created,
        "model": answer.call.model,
        "system_fingerprint": _FINGERPRINT,
    }


def _chat_body(answer: _Answer) -> dict[str, Any]:
    choices = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if answer.call.tool is not None:
            message.update(content=None, tool_calls=_tool_calls(answer, index, choice))
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _chat_logprobs(answer.call, choice.sample),
                "finish_reason": _chat_finish(answer.call, choice),
            }
        )
    return {**_chat_head(answer, "chat.completion"), "choices": choices, "usage": answer.usage}


def _wants_usage(call: _Call) -> bool:
    options = call.body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _in_turn(answer: _Answer) -> Iterator[tuple[int, _Choice, int, str]]:
    """Yield index, choice, position and piece of all choices, token by token as a real server would."""
    for position in range(max((len(choice.pieces) for choice in answer.choices), default=0)):
        for index, choice in enumerate(answer.choices):
            if position < len(choice.pieces):
                yield index, choice, position, choice.pieces[position]


def _chat_stream(answer: _Answer) -> _Stream:
    call = answer.call
    head = _chat_head(answer, "chat.completion.chunk")
    if _wants_usage(call):
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], finish: str | None, logprobs: object) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _data({**head, "choices": [choice]})

    first = {"role": "assistant", "content": None if call.tool else "", "refusal": None}
    content = [chunk(index, first, None, None) for index in range(len(answer.choices))]
    for index, choice, position, piece in _in_turn(answer):
        delta: dict[str, Any] = {"content": piece}
        if call.tool is not None:
            part: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
            if position == 0:  # the first says what is called, and how the call is named
                part = {"index": 0, **_tool_calls(answer, index, choice)[0]}
                part["function"]["arguments"] = piece
            delta = {"tool_calls": [part]}
        logprobs = _chat_logprobs(call, choice.sample, slice(position, position + 1))
        content.append(chunk(index, delta, None, logprobs))
    ending = [chunk(i, {}, _chat_finish(call, choice), None) for i, choice in enumerate(answer.choices)]
    if _wants_usage(call):
        ending.append(_data({**head, "choices": [], "usage": answer.usage}))
    return _Stream(content, [*ending, _DONE])


def _completion_logprobs(call: _Call, sample: Sample, only: slice = slice(None)) -> dict[str, Any] | None:
    if call.alternatives is None:
        return None
    part = _part(sample, only)
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


def _completion_head(answer: _Answer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answer.identity}",
        "object": "text_completion",
        "created": answer.created,
        "model": answer.call.model,
        "system_fingerprint": _FINGERPRINT,
    }


def _echoed(call: _Call, index: int) -> str:
    return call.contexts[index // call.n] if call.body.get("echo") is True else ""


def _completion_body(answer: _Answer) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": _echoed(answer.call, index) + choice.text,
            "logprobs": _completion_logprobs(answer.call, choice.sample),
            "finish_reason": choice.sample.finish_reason,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {**_completion_head(answer), "choices": choices, "usage": answer.usage}


def _completion_stream(answer: _Answer) -> _Stream:
    call = answer.call
    head = _completion_head(answer)
    if _wants_usage(call):
        head["usage"] = None

    def chunk(index: int, text: str, finish: str | None, logprobs: object) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return _data({**head, "choices": [choice]})

    echoes = [(index, _echoed(call, index)) for index in range(len(answer.choices))]
    content = [chunk(index, text, None, None) for index, text in echoes if text]
    for index, choice, position, piece in _in_turn(answer):
        logprobs = _completion_logprobs(call, choice.sample, slice(position, position + 1))
        content.append(chunk(index, piece, None, logprobs))
    ending = [chunk(i, "", choice.sample.finish_reason, None) for i, choice in enumerate(answer.choices)]
    if _wants_usage(call):
        ending.append(_data({**head, "choices": [], "usage": answer.usage}))
    return _Stream(content, [*ending, _DONE])


def _responses_item(answer: _Answer, *, whole: bool = True) -> dict[str, Any]:
    """Return the one output item of a response: a message, or a call of the tool that was demanded."""
    choice = answer.choices[0]
    status = _responses_status(answer) if whole else "in_progress"
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
        "content": [_responses_part(answer)] if whole else [],
    }


def _responses_part(answer: _Answer, *, whole: bool = True) -> dict[str, Any]:
    choice = answer.choices[0]
    return {
        "type": "output_text",
        "text": choice.text if whole else "",
        "annotations": [],
        "logprobs": _responses_logprobs(answer) if whole else [],
    }


def _responses_logprobs(answer: _Answer, only: slice = slice(None)) -> list[dict[str, Any]]:
    call = answer.call
    if call.alternatives is None or call.schema is not None:
        return []
    return _entries(_part(answer.choices[0].sample, only), call.alternatives)


def _responses_status(answer: _Answer) -> str:
    cut = any(choice.sample.finish_reason == "length" for choice in answer.choices)
    return "incomplete" if cut and answer.call.schema is None else "completed"


def _responses_body(answer: _Answer, *, whole: bool = True) -> dict[str, Any]:
    call = answer.call
    status = _responses_status(answer) if whole else "in_progress"
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
        "output": [_responses_item(answer)] if whole and answer.choices else [],
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


def _responses_stream(answer: _Answer) -> _Stream:
    """Return the events of a response; every one has a number and says which item it belongs to."""
    number = 0

    def event(kind: str, **values: Any) -> bytes:
        nonlocal number
        number += 1
        return _event({"type": f"response.{kind}", "sequence_number": number - 1, **values})

    started = _responses_body(answer, whole=False)
    content = [event("created", response=started), event("in_progress", response=started)]
    ending: list[bytes] = []
    if answer.choices:
        text = answer.choices[0].text
        item = _responses_item(answer)
        place = {"item_id": item["id"], "output_index": 0}
        content.append(event("output_item.added", output_index=0, item=_responses_item(answer, whole=False)))
        if answer.call.tool is not None:
            content += [
                event("function_call_arguments.delta", **place, delta=piece)
                for piece in answer.choices[0].pieces
            ]
            done = {**place, "name": answer.call.tool, "arguments": text}
            ending.append(event("function_call_arguments.done", **done))
        else:
            place["content_index"] = 0
            content.append(event("content_part.added", **place, part=_responses_part(answer, whole=False)))
            for position, piece in enumerate(answer.choices[0].pieces):
                logprobs = _responses_logprobs(answer, slice(position, position + 1))
                content.append(event("output_text.delta", **place, delta=piece, logprobs=logprobs))
            logprobs = _responses_logprobs(answer)
            ending.append(event("output_text.done", **place, text=text, logprobs=logprobs))
            ending.append(event("content_part.done", **place, part=_responses_part(answer)))
        ending.append(event("output_item.done", output_index=0, item=item))
    body = _responses_body(answer)
    ending.append(event(body["status"], response=body))
    return _Stream(content, ending)


def _stop_reason(answer: _Answer) -> str | None:
    if not answer.choices:
        return None
    sample = answer.choices[0].sample
    if answer.call.tool is not None:
        return "tool_use"
    if sample.finish_reason == "length" and answer.call.schema is None:  # JSON is always whole
        return "max_tokens"
    return "end_turn" if sample.stop is None else "stop_sequence"


def _messages_block(answer: _Answer, choice: _Choice) -> dict[str, Any]:
    if answer.call.tool is None:
        return {"type": "text", "text": choice.text}
    return {
        "type": "tool_use",
        "id": f"toolu_{answer.identity}",
        "name": answer.call.tool,
        "input": orjson.loads(choice.text),
    }


def _messages_body(answer: _Answer, *, whole: bool = True) -> dict[str, Any]:
    blocks = [_messages_block(answer, choice) for choice in answer.choices]
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


def _messages_stream(answer: _Answer) -> _Stream:
    content = [_event({"type": "message_start", "message": _messages_body(answer, whole=False)})]
    ending: list[bytes] = []
    for index, choice in enumerate(answer.choices):
        block = _messages_block(answer, choice)
        tool = answer.call.tool is not None
        if tool:
            block["input"] = {}
        else:
            block["text"] = ""
        content.append(_event({"type": "content_block_start", "index": index, "content_block": block}))
        content.append(_event({"type": "ping"}))
        for piece in choice.pieces:
            delta = (
                {"type": "input_json_delta", "partial_json": piece}
                if tool
                else {"type": "text_delta", "text": piece}
            )
            content.append(_event({"type": "content_block_delta", "index": index, "delta": delta}))
        ending.append(_event({"type": "content_block_stop", "index": index}))
    body = _messages_body(answer)
    delta = {"stop_reason": body["stop_reason"], "stop_sequence": body["stop_sequence"]}
    usage = {"output_tokens": answer.tokens_out}
    ending.append(_event({"type": "message_delta", "delta": delta, "usage": usage}))
    return _Stream(content, [*ending, _event({"type": "message_stop"})])


class _Dialect(NamedTuple):
    """An endpoint of a model: how to read a call, and how to word an answer whole or as a stream."""

    read: Callable[[Mapping[str, Any], Settings, NGramModel], _Call]
    body: Callable[[_Answer], dict[str, Any]]
    stream: Callable[[_Answer], _Stream]


_DIALECTS: Final[Mapping[str, _Dialect]] = {
    "/v1/chat/completions": _Dialect(lambda b, s, _: _chat_call(b, s), _chat_body, _chat_stream),
    "/v1/completions": _Dialect(_completion_call, _completion_body, _completion_stream),
    "/v1/responses": _Dialect(lambda b, s, _: _responses_call(b, s), _responses_body, _responses_stream),
    "/v1/messages": _Dialect(lambda b, s, _: _messages_call(b, s), _messages_body, _messages_stream),
}
_ANTHROPIC_KINDS: Final = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _error_body(path: str, refusal: _RefusalError) -> dict[str, Any]:
    """Return the error object in the shape of the protocol that the path belongs to."""
    if path == "/v1/messages":
        kind = _ANTHROPIC_KINDS.get(refusal.status)
        if kind is None:
            kind = "invalid_request_error" if refusal.status < 500 else "api_error"
        return {"type": "error", "error": {"type": kind, "message": refusal.message}}
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def _error_event(path: str, refusal: _RefusalError, number: int) -> bytes:
    if path == "/v1/messages":
        return _event(_error_body(path, refusal))
    if path == "/v1/responses":
        values = {"code": "server_error", "message": refusal.message, "param": None}
        return _event({"type": "error", "sequence_number": number, **values})
    return _data(_error_body(path, refusal))


# --------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Reply:
    """What to write, when, and what to count once it is written.

    `parts` is the whole body, or the events of a stream. With `broken`, the connection closes after
    the last part, as if more were to come; with `status` 0 it closes without a byte. What is `held` waits
    while the server is paused.
    """

    status: int
    parts: Sequence[bytes]
    headers: list[tuple[bytes, bytes]]
    stream: bool = False
    broken: bool = False
    held: bool = False
    delay: float = 0.0
    pace: float = 0.0
    samples: int = 0
    n: int = 1
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """One HTTP request, read to its end."""

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    body: bytes
    arrived: float
    since: float


class MockServer:
    """A model server for tests, demos and benchmarks, listening while its context is entered.

    Use it with ``async with`` in a running event loop, or with ``with MockServer.in_thread(…)`` from
    code that has none. Its properties may be used from any thread.

    Args:
        settings: How it behaves.
        host: The interface to listen on.
        port: The port, 0 for any free one.
        model: What answers; the model of the shipped text when not given.
        clock: The monotonic clock, in seconds, of the rate limit.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: NGramModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model or default_model()
        self.stats = Stats((settings or Settings()).log_size)
        self._host, self._port, self._clock = host, port, clock
        self._settings = Settings()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._running = asyncio.Event()  # cleared while paused
        self._stopping = False
        self._watchers: list[tuple[Callable[[Stats], bool], asyncio.Event]] = []
        self._script: deque[Fault | None] = deque()
        self._bucket: _Bucket | None = None
        self._identities = secrets.token_hex(6)
        self._count = 0
        self._random = Random()  # noqa: S311 - samples, not secrets
        self._chance = Random()  # noqa: S311 - faults, not secrets
        self._apply(settings or Settings(), first=True)

    def __repr__(self) -> str:
        where = self.base_url if self._listener is not None else "not listening"
        return f"<MockServer {where}, {self.stats.requests} requests, {self.stats.in_flight} in flight>"

    @property
    def url(self) -> str:
        """The address of the server without ``/v1``, as Anthropic's and newer Together clients want it."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        """The address of the server with ``/v1``, as OpenAI's client and Together's before 2 want it."""
        return f"{self.url}/v1"

    @property
    def port(self) -> int:
        """The port it listens on; before it does, the one it was given."""
        return self._port

    @property
    def settings(self) -> Settings:
        """How the server behaves. Assigning other settings takes effect with the next request.

        A script begins anew when it is another object, the rate limit when `rate` or `burst` changes,
        the sequence of samples when `seed` does.
        """
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        if self._loop is None or _running_loop() is self._loop:
            self._apply(settings)
        else:
            asyncio.run_coroutine_threadsafe(self._apply_soon(settings), self._loop).result()

    async def until(self, condition: Callable[[Stats], bool]) -> None:
        """Wait, in the server's own loop, until the counters meet a condition.

        With ``paused=True`` this is how to hold several requests in flight at once without a clock:
        ``await server.until(lambda stats: stats.in_flight == 5)``.
        """
        while not condition(self.stats):
            event = asyncio.Event()
            self._watchers.append((condition, event))
            await event.wait()

    def wait_until(self, condition: Callable[[Stats], bool], timeout: float = 10.0) -> None:
        """Wait, in another thread than the server's, until the counters meet a condition.

        Raises:
            TimeoutError: If they do not within `timeout` seconds.
        """
        if self._loop is None:
            raise RuntimeError("The mock server is not listening; enter its context before waiting for it.")
        future = asyncio.run_coroutine_threadsafe(self.until(condition), self._loop)
        try:
            future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(
                f"The condition was not met in {timeout} s; it stands at {self.stats}."
            ) from None

    async def start(self) -> None:
        """Listen."""
        if self._listener is not None:
            raise RuntimeError("The mock server is listening already; make another one instead.")
        self._loop, self._stopping = asyncio.get_running_loop(), False
        self._listener = await self._loop.create_server(
            lambda: _Connection(self), self._host, self._port, backlog=4096
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the door and every connection; requests in flight are dropped."""
        if self._listener is not None:
            self._stopping = True
            self._listener.close()
            closing = [connection.close() for connection in list(self._connections)]
            await asyncio.gather(*closing)
            await self._listener.wait_closed()
            self._listener = self._loop = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @classmethod
    @contextlib.contextmanager
    def in_thread(
        cls,
        settings: Settings | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: NGramModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Iterator[Self]:
        """Run a server on an event loop of its own, in a daemon thread, while the context is entered."""
        server = cls(settings, host=host, port=port, model=model, clock=clock)
        started = threading.Event()
        failures: list[BaseException] = []
        stopping: list[Callable[[], object]] = []

        async def serve() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            async with server:
                stopping.append(lambda: loop.call_soon_threadsafe(stop.set))
                started.set()
                await stop.wait()

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                failures.append(error)
            finally:
                started.set()

        thread = threading.Thread(target=run, name="cachepipe-mock-server", daemon=True)
        thread.start()
        started.wait()
        if failures:
            raise failures[0]
        try:
            yield server
        finally:
            stopping[0]()
            thread.join()
        if failures:
            raise failures[0]

    # -- what happens to a request ------------------------------------------------------------------

    def _apply(self, settings: Settings, *, first: bool = False) -> None:
        old, self._settings = self._settings, settings
        if first or settings.script is not old.script:
            self._script = deque(settings.script)
        if first or (settings.rate, settings.burst) != (old.rate, old.burst):
            burst = settings.burst or math.ceil(settings.rate or 1)
            self._bucket = _Bucket(settings.rate, burst, self._clock) if settings.rate else None
        if settings.seed is not None and (first or settings.seed != old.seed):
            self._random = generator(settings.seed, "samples")
            self._chance = generator(settings.seed, "faults")
            self._identities = f"{generator(settings.seed, 'identities').getrandbits(48):012x}"
            self._count = 0
        if settings.log_size != self.stats.log.maxlen:
            self.stats.log = deque(self.stats.log, settings.log_size)
        if settings.paused:
            self._running.clear()
        else:
            self._running.set()

    async def _apply_soon(self, settings: Settings) -> None:
        self._apply(settings)

    def _changed(self) -> None:
        """Wake those who wait for what the counters say now."""
        if self._watchers:
            met = [watcher for watcher in self._watchers if watcher[0](self.stats)]
            for watcher in met:
                self._watchers.remove(watcher)
                watcher[1].set()

    def _identity(self) -> str:
        self._count += 1
        return f"{self._identities}{self._count:08x}"

    def _reply(self, request: _Request) -> _Reply:
        """Return the answer to a request. It is decided on arrival, whenever it may be written."""
        identity = self._identity()
        try:
            reply = self._routed(request, identity)
        except _RefusalError as refusal:
            reply = _refused(request.path, refusal)
        except Exception as error:
            # Bodies can be odd in more ways than are checked; a hanging client would tell less.
            _logger.exception("The mock server failed on a request to %s.", request.path)
            message = f"The mock server cannot read this request: {type(error).__name__}: {error}."
            reply = _refused(request.path, _RefusalError(500, message, kind="server_error"))
        label = f"req_{identity}".encode()
        reply.headers += ((b"x-request-id", label), (b"request-id", label))
        return reply

    def _routed(self, request: _Request, identity: str) -> _Reply:
        path, method = request.path, request.method
        self._authorise(request)
        if path in _DIALECTS or path == "/v1/embeddings":
            _allow(method, "POST")
            return self._modelled(request, identity)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _allow(method, "GET")
            return self._listed(unquote(path.removeprefix("/v1/models").removeprefix("/")))
        if path == "/mock/stats":
            _allow(method, "GET")
            return _json_reply(self.stats.as_json())
        if path == "/mock/settings":
            _allow(method, "GET", "POST")
            if method == "POST":
                self._change(_parsed(request.body))
            return _json_reply(self.settings.as_json())
        if path == "/mock/reset":
            _allow(method, "POST")
            self.stats.reset()
            return _json_reply({"reset": True})
        known = ", ".join([*_DIALECTS, "/v1/embeddings", "/v1/models", "/mock/stats", "/mock/settings"])
        raise _RefusalError(
            404, f"There is nothing at {method} {path}. Known paths: {known}.", code="unknown_url"
        )

    def _authorise(self, request: _Request) -> None:
        expected = self.settings.api_key
        if expected is None:
            return
        bearer = request.headers.get(b"authorization", b"")
        given = bearer[7:] if bearer[:7].lower() == b"bearer " else request.headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(given.strip(), expected.encode()):
            raise _RefusalError(
                401,
                "Expected the API key that the mock server was set up with, but got "
                f"{'another one' if given else 'none'}. Send it as Authorization: Bearer, or as x-api-key.",
                code="invalid_api_key",
            )

    def _change(self, changes: Mapping[str, Any]) -> None:
        try:
            self._apply(self.settings.updated(changes))
        except (ValueError, TypeError) as error:
            raise _RefusalError(400, str(error)) from error

    def _listed(self, name: str) -> _Reply:
        entries = [
            {"id": model, "object": "model", "created": 0, "owned_by": "cachepipe"}
            for model in self.settings.models
        ]
        if not name:
            return _json_reply({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == name:
                return _json_reply(entry)
        raise self._unknown(name)

    def _unknown(self, name: str) -> _RefusalError:
        """Return the refusal of a model that is not there."""
        known = f"There is no model {name!r} here; there are {', '.join(self.settings.models)}."
        return _RefusalError(404, known, param="model", code="model_not_found")

    def _modelled(self, request: _Request, identity: str) -> _Reply:
        """Return the answer of the model, or the fault that comes instead."""
        self._limit()
        fault = self._fault(request)
        settings = self._for(request)
        reply = None
        if fault is not None:
            self.stats.faults[fault.kind] += 1
            reply = _refused_by(fault, request.path)
        if reply is None:
            try:
                body = _parsed(request.body)
                name = body.get("model")
                if not settings.any_model and isinstance(name, str) and name not in settings.models:
                    raise self._unknown(name)
                if request.path == "/v1/embeddings":
                    reply = self._embedded(body, settings, fault)
                else:
                    reply = self._answered(request, body, settings, identity, fault)
            except _RefusalError as refusal:
                reply = _refused(request.path, refusal)
            else:
                if fault is not None:
                    _spoil(reply, fault, request.path)
        reply.fault = fault.kind if fault is not None else None
        reply.delay = max(reply.delay, settings.latency)
        reply.held = True
        return reply

    def _limit(self) -> None:
        if self._bucket is None or (wait := self._bucket.take()) == 0.0:
            return
        burst = self._bucket.burst
        raise _RefusalError(
            429,
            f"Expected at most {self._bucket.rate:g} requests per second. Try again in {wait:.3f} s.",
            kind="requests",
            code="rate_limit_exceeded",
            headers=(
                *_retry_after(wait),
                (b"x-ratelimit-limit-requests", str(burst).encode()),
                (b"x-ratelimit-remaining-requests", b"0"),
                (b"x-ratelimit-reset-requests", f"{wait:.3f}s".encode()),
            ),
        )

    def _fault(self, request: _Request) -> Fault | None:
        """Return what is to strike this request: what it asks for, else the script, else chance."""
        wanted = request.headers.get(b"x-mock-fault")
        if wanted is not None:
            if wanted == b"none":
                return None
            try:
                value = orjson.loads(wanted) if wanted[:1] == b"{" else wanted.decode()
                return Fault.parse(value)
            except (ValueError, TypeError) as error:
                raise _RefusalError(400, str(error), param="x-mock-fault") from error
        if self._script:
            return self._script.popleft()
        for fault in self.settings.faults:
            if fault.path in request.path and self._chance.random() < fault.probability:
                return fault
        return None

    def _for(self, request: _Request) -> Settings:
        """Return the settings with what the headers of this request override."""
        changes = {}
        for name in ("latency", "latency_per_token", "stream_delay"):
            value = request.headers.get(b"x-mock-" + name.replace("_", "-").encode())
            if value is not None:
                try:
                    changes[name] = float(value)
                except ValueError:
                    raise _RefusalError(400, f"Expected x-mock-{name} to be a number of seconds.") from None
        try:
            return self.settings.updated(changes) if changes else self.settings
        except ValueError as error:
            raise _RefusalError(400, str(error)) from error

    def _embedded(self, body: Mapping[str, Any], settings: Settings, fault: Fault | None) -> _Reply:
        texts, tokens = _texts(body.get("input"), "input", self.model)
        if not all(texts):
            raise _bad("input", "text that is not empty", body.get("input"))
        name = _name_of_model(body)
        size = _integer(body, "dimensions", 1, 4096, settings.dimensions) or settings.dimensions
        encoding = body.get("encoding_format") or "float"
        if encoding not in {"float", "base64"}:
            raise _bad("encoding_format", "float or base64", encoding)
        data = []
        for index, text in enumerate(texts[: _kept_of(len(texts), fault)]):
            vector = embed(text, size)
            value = base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        self.stats.samples_generated += len(data)
        self.stats.tokens_in += tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        reply = _json_reply({"object": "list", "data": data, "model": name, "usage": usage})
        reply.n, reply.samples = len(texts), len(data)
        return reply

    def _answered(
        self,
        request: _Request,
        body: Mapping[str, Any],
        settings: Settings,
        identity: str,
        fault: Fault | None,
    ) -> _Reply:
        dialect = _DIALECTS[request.path]
        call = dialect.read(body, settings, self.model)
        wanted = call.n * len(call.contexts)
        samples, tokens_out = self._samples(call, _kept_of(wanted, fault))
        choices = [_choice(call, sample) for sample in samples]
        answer = _Answer(call, choices, identity, int(request.arrived), tokens_out)
        self.stats.tokens_in += call.tokens_in
        longest = max((len(sample.tokens) for sample in samples), default=0)
        if not call.stream:
            reply = _json_reply(dialect.body(answer))
            reply.delay = settings.latency + longest * settings.latency_per_token
        else:
            self.stats.streams += 1
            parts = dialect.stream(answer)
            headers = [_SSE, (b"cache-control", b"no-cache")]
            reply = _Reply(
                status=200, parts=_broken(parts, fault, request.path), headers=headers, stream=True
            )
            reply.broken = fault is not None and fault.kind == "cut"
            reply.pace = settings.stream_delay + settings.latency_per_token
        reply.n, reply.samples = wanted, len(samples)
        return reply

    def _samples(self, call: _Call, count: int) -> tuple[list[Sample], int]:
        """Return the first `count` samples of a call, prompt by prompt, and all tokens generated."""
        samples: list[Sample] = []
        tokens_out = 0
        for context in call.contexts:
            wanted = min(call.n, count - len(samples))
            if wanted <= 0:
                break
            drawn = [
                self.model.sample(
                    context,
                    self._randomness(call, context, index),
                    temperature=call.temperature,
                    top_p=call.top_p,
                    max_tokens=call.max_tokens,
                    stop=call.stop,
                )
                for index in range(call.best_of if call.best_of > call.n else wanted)
            ]
            self.stats.samples_generated += len(drawn)
            tokens_out += sum(len(sample.tokens) for sample in drawn)
            if call.best_of > call.n:
                drawn.sort(key=_mean_logprob, reverse=True)
            samples += drawn[:wanted]
        self.stats.tokens_out += tokens_out
        return samples, tokens_out

    def _randomness(self, call: _Call, context: str, index: int) -> Random:
        """Return what a choice is drawn with: with a seed, its own numbers, whatever else is asked for.

        Neither `n` nor `max_tokens` takes part, so more choices begin with the same ones, and a
        longer answer with the same words. The context does, nonces included.
        """
        if call.seed is None:
            return self._random
        return generator(call.seed, call.model, context, call.temperature, call.top_p, index)


def _mean_logprob(sample: Sample) -> float:
    return math.fsum(sample.logprobs) / max(1, len(sample.logprobs))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise _RefusalError(
            405,
            f"Expected {' or '.join(allowed)} here, but got {method}.",
            code="method_not_allowed",
            headers=((b"allow", ", ".join(allowed).encode()),),
        )


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _RefusalError(
            400, f"Expected a JSON object as the body, but could not parse it: {error}."
        ) from error
    if not isinstance(value, dict):
        raise _RefusalError(400, f"Expected a JSON object as the body, but got {type(value).__name__}.")
    return value


def _retry_after(seconds: float) -> tuple[tuple[bytes, bytes], ...]:
    """Return the time to wait in whole seconds, as HTTP wants it, and in the SDKs' finer header."""
    return (
        (b"retry-after", str(math.ceil(seconds)).encode()),
        (b"retry-after-ms", str(math.ceil(seconds * 1000)).encode()),
    )


def _json_reply(value: object, status: int = 200) -> _Reply:
    return _Reply(status=status, parts=[orjson.dumps(value)], headers=[_JSON])


def _refused(path: str, refusal: _RefusalError) -> _Reply:
    reply = _json_reply(_error_body(path, refusal), refusal.status)
    reply.headers += refusal.headers
    return reply


def _fault_refusal(fault: Fault) -> _RefusalError:
    status = fault.status or _FAULT_STATUS.get(fault.kind, 500)
    retry_after = fault.retry_after
    if retry_after is None and status in {429, 503}:
        retry_after = 1.0
    kinds = {429: ("requests", "rate_limit_exceeded")}
    kind, code = kinds.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    headers = () if retry_after is None else _retry_after(retry_after)
    return _RefusalError(status, fault.message, kind=kind, code=code, headers=headers)


def _refused_by(fault: Fault, path: str) -> _Reply | None:
    """Return the reply of a fault that leaves nothing of the answer, or None if it only spoils one."""
    if fault.kind == "drop":
        return _Reply(status=0, parts=[], headers=[], broken=True)
    return _refused(path, _fault_refusal(fault)) if fault.kind in _FAULT_STATUS else None


def _kept_of(count: int, fault: Fault | None) -> int:
    """Return how many of so many choices the fault leaves."""
    if fault is None or fault.kind != "short":
        return count
    return min(count, count - 1 if fault.keep is None else fault.keep)


def _spoil(reply: _Reply, fault: Fault, path: str) -> None:
    """Do to an answer that is no stream what the fault says; nothing of it then counts as delivered."""
    if fault.kind == "short":
        return
    reply.samples = 0
    if reply.stream:
        return
    whole = reply.parts[0]
    if fault.kind in {"cut", "truncate"}:
        # The length announced is that of the whole answer, so the client can tell that some is missing.
        reply.headers.append((b"content-length", str(len(whole)).encode()))
        reply.parts = [whole[: len(whole) // 2]]
        reply.broken = True
    elif fault.kind == "malformed":
        reply.parts = [whole[: len(whole) * 2 // 3]]
    else:
        reply.parts = [orjson.dumps(_error_body(path, _fault_refusal(fault)))]


def _broken(stream: _Stream, fault: Fault | None, path: str) -> list[bytes]:
    """Return the events that a client gets to see of a stream."""
    if fault is None or fault.kind == "short":
        return stream.content + stream.ending
    after = (len(stream.content) + 1) // 2 if fault.after is None else fault.after
    content = stream.content[:after]
    if fault.kind == "malformed":
        following = stream.content[after:] or stream.ending
        return [*content, following[0][: len(following[0]) * 2 // 3] + b"\n\n", *following[1:]]
    if fault.kind == "error_200":
        return [*content, _error_event(path, _fault_refusal(fault), after)]
    return content


# --------------------------------------------------------------------------------------------------
# The connection
# --------------------------------------------------------------------------------------------------

_BACKLOG: Final = 256 * 1024  # bytes that a client may send ahead of the answer to its last request
_LINGER: Final = 2.0  # seconds that a client has to read why it was refused before it is cut off
_KNOWN: Final = frozenset({*_DIALECTS, "/v1/embeddings", "/v1/models"})


class _Connection(asyncio.Protocol):
    """One connection: h11 says what came in and frames what goes out, one request after the other."""

    def __init__(self, server: MockServer) -> None:
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self._head: h11.Request | None = None
        self._arrived = (0.0, 0.0)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._answering: tuple[_Request, _Reply] | None = None
        self._task: asyncio.Task[None] | None = None
        self._discarding = False

    async def close(self) -> None:
        """Close the connection and wait until it is."""
        if self._transport is not None:
            self._transport.abort()
            await self._closed

    # -- what asyncio calls -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio has set TCP_NODELAY on the socket already.
        self._transport = cast("asyncio.Transport", transport)
        server = self._server
        server._connections.add(self)  # noqa: SLF001 - one piece in two classes
        if server._stopping:  # noqa: SLF001 - it was accepted just before the door was closed
            self._transport.abort()
        stats = server.stats
        stats.connections += 1
        stats.max_connections = max(stats.max_connections, stats.connections)
        server._changed()  # noqa: SLF001

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio names it
        self._transport = None
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        if self._answering is not None:
            self._done(499)
        self._server.stats.connections -= 1
        self._server._connections.discard(self)  # noqa: SLF001
        self._server._changed()  # noqa: SLF001
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        self._http.receive_data(data)
        if self._answering is None:
            self._advance()
        elif len(self._http.trailing_data[0]) > _BACKLOG and self._transport is not None:
            self._transport.pause_reading()

    # -- requests -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take in what has arrived, up to a request that has to wait for its answer."""
        try:
            while self._answering is None and self._transport is not None and not self._discarding:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self._take(event)
        except h11.RemoteProtocolError as error:
            self._reject(_RefusalError(error.error_status_hint, f"This is not HTTP as expected: {error}."))

    def _take(self, event: h11.Event | type[h11.NEED_DATA | h11.PAUSED]) -> None:
        if isinstance(event, h11.Data):
            self._size += len(event.data)
            if self._too_large(self._size):
                return
            self._body.append(bytes(event.data))
        elif isinstance(event, h11.Request):
            self._head = event
            self._arrived = (time.time(), time.perf_counter())
            self._body, self._size = [], 0
            self._headers = dict(event.headers)
            if self._too_large(int(self._headers.get(b"content-length", b"0"))):
                return
            if self._http.they_are_waiting_for_100_continue and self._transport is not None:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                self._transport.write(self._http.send(go_on) or b"")
        elif isinstance(event, h11.EndOfMessage):
            self._dispatch()
        elif self._transport is not None:  # the client has closed its side
            self._transport.close()

    def _too_large(self, size: int) -> bool:
        limit = self._server.settings.max_body
        if size > limit:
            self._reject(
                _RefusalError(413, f"Expected a body of at most {limit} bytes, but got {size} or more.")
            )
        return size > limit

    def _reject(self, refusal: _RefusalError) -> None:
        """Answer a request that was not read to its end; the connection cannot be used after that."""
        if self._transport is None:
            return
        path = self._path()
        reply = _refused(path, refusal)
        if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            reply.headers.append((b"connection", b"close"))
            self._begin(_Request("", path, {}, b"", *self._arrived), reply)
            self._transport.write(self._whole(reply))
            self._done(reply.status)
        # What the client still sends is read and forgotten: closing at once would reset the
        # connection, and with it the answer that the client has not read yet.
        self._discarding = True
        asyncio.get_running_loop().call_later(_LINGER, self._transport.close)

    def _path(self) -> str:
        return self._head.target.partition(b"?")[0].decode("ascii", "replace") if self._head else ""

    def _dispatch(self) -> None:
        head = self._head
        if head is None:  # h11 gives no end without a beginning
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        request = _Request(head.method.decode(), self._path(), self._headers, body, *self._arrived)
        reply = self._server._reply(request)  # noqa: SLF001
        self._begin(request, reply)
        if reply.delay or reply.pace or (reply.held and not self._server._running.is_set()):  # noqa: SLF001
            self._task = asyncio.get_running_loop().create_task(self._later(reply))
        elif self._transport is not None:
            if reply.status:
                whole = self._whole(reply)
                self._done(reply.status)  # first, so that whoever has the answer finds it counted
                self._transport.write(whole)
            self._finish(reply)

    async def _later(self, reply: _Reply) -> None:
        """Write a reply when its time has come, event by event if it has a pace."""
        if reply.delay:
            await asyncio.sleep(reply.delay)
        if reply.held:
            await self._server._running.wait()  # noqa: SLF001
        if reply.status and not reply.pace:
            whole = self._whole(reply)
            self._done(reply.status)
            self._write(whole)
        elif reply.status:
            self._write(self._start(reply))
            for number, part in enumerate(reply.parts):
                if number:
                    await asyncio.sleep(reply.pace)
                await self._writable.wait()
                if number == len(reply.parts) - 1:
                    self._done(reply.status)
                self._write(self._http.send(h11.Data(data=part)) or b"")
            if not reply.broken:
                self._write(self._http.send(h11.EndOfMessage()) or b"")
        self._task = None
        self._finish(reply)
        self._advance()

    # -- replies ------------------------------------------------------------------------------------

    def _begin(self, request: _Request, reply: _Reply) -> None:
        self._answering = (request, reply)
        if not request.path.startswith("/mock/"):
            stats = self._server.stats
            stats.requests += 1
            stats.in_flight += 1
            stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
            self._server._changed()  # noqa: SLF001

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _start(self, reply: _Reply) -> bytes:
        headers = [*reply.headers, (b"date", _date(int(time.time())))]
        if not reply.stream and not reply.broken:
            headers.append((b"content-length", str(len(reply.parts[0])).encode()))
        reason = _REASONS.get(reply.status, b"")
        return self._http.send(h11.Response(status_code=reply.status, headers=headers, reason=reason)) or b""

    def _whole(self, reply: _Reply) -> bytes:
        """Return head and body in one piece, to be sent in one."""
        head = self._start(reply)
        body = reply.parts[0] if len(reply.parts) == 1 else b"".join(reply.parts)
        if self._head is not None and self._head.method == b"HEAD":
            body = b""
        content = self._http.send(h11.Data(data=body)) or b""
        if reply.broken:
            return head + content
        return head + content + (self._http.send(h11.EndOfMessage()) or b"")

    def _finish(self, reply: _Reply) -> None:
        """Count what was written, and make the connection ready for the next request."""
        self._done(reply.status)
        transport = self._transport
        if transport is None:
            return
        if reply.broken or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            transport.close()
            return
        self._http.start_next_cycle()
        self._head = None
        transport.resume_reading()

    def _done(self, status: int) -> None:
        """Count the request that was being answered."""
        if self._answering is None:
            return
        request, reply = self._answering
        self._answering = None
        if request.path.startswith("/mock/"):
            return
        stats = self._server.stats
        stats.in_flight -= 1
        path = request.path
        if path not in _KNOWN:
            path = "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
        stats.by_path.setdefault(path, Counter())[status] += 1
        if status == 200:
            stats.samples_delivered += reply.samples
        seconds = time.perf_counter() - request.since
        stats.log.append(LogEntry(request.arrived, path, status, reply.n, reply.stream, reply.fault, seconds))
        self._server._changed()  # noqa: SLF001


_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_dates: dict[int, bytes] = {}


def _date(second: int) -> bytes:
    """Return the time as HTTP writes it, formatted once a second."""
    if second not in _dates:
        _dates.clear()
        _dates[second] = formatdate(second, usegmt=True).encode()
    return _dates[second]


# --------------------------------------------------------------------------------------------------
# On the command line
# --------------------------------------------------------------------------------------------------


def run_server(
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Settings | None = None,
    *,
    ready: Callable[[MockServer], object] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then close and return.

    Args:
        host: The interface to listen on.
        port: The port, 0 for any free one.
        settings: How the server behaves.
        ready: Called with the server once it listens.
    """
    asyncio.run(_serve(host, port, settings, ready))


async def _serve(
    host: str, port: int, settings: Settings | None, ready: Callable[[MockServer], object] | None
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with MockServer(settings, host=host, port=port) as server:
        if ready is not None:
            ready(server)
        await stop.wait()
