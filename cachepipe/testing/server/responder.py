"""Which answer, error or fault a request gets.

Key, rate limit, fault, validation and sampling are decided when a request arrives, however late its reply is
written. The rate limit has the only clock.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote

import orjson

from cachepipe.testing.ngram import generator
from cachepipe.testing.server import gemini, inference
from cachepipe.testing.server.answers import ModelAnswer, choice_of
from cachepipe.testing.server.dialects import DIALECTS, EMBEDDERS, EMBEDDINGS, MODELS, unprefixed
from cachepipe.testing.server.faults import choices_left, events_left, reply_instead, spoil
from cachepipe.testing.server.refusals import RefusalError, retry_after
from cachepipe.testing.server.replies import HttpReply, HttpRequest, json_reply, refused, stream_reply
from cachepipe.testing.server.settings import Fault, Settings

if TYPE_CHECKING:
    from cachepipe.testing.ngram import DrawnText, NGramModel
    from cachepipe.testing.server.calls import ModelCall
    from cachepipe.testing.server.stats import MockStats

__all__ = ["Responder"]

_logger: Final = logging.getLogger(__name__)


class Responder:
    """The decisions of a mock server.

    Attributes:
        model: Samples the answers.
        stats: Counts faults, samples and tokens.
        settings: The current settings; `apply` replaces them.
        running: Set unless the server is paused.
    """

    def __init__(
        self, settings: Settings, *, model: NGramModel, stats: MockStats, clock: Callable[[], float]
    ) -> None:
        self.model, self.stats, self.settings = model, stats, settings
        self.running = asyncio.Event()
        self._clock = clock
        self._script: deque[Fault | None] = deque()
        self._bucket: _TokenBucket | None = None
        self._identities = secrets.token_hex(6)
        self._count = 0
        self._random = Random()  # noqa: S311 - samples, not secrets
        self._chance = Random()  # noqa: S311 - faults, not secrets
        self._begin_script()
        self._begin_limit()
        self._begin_sequence()
        self._pause_or_run()

    def apply(self, settings: Settings) -> None:
        """Replace the settings; restart the script, the rate limit and the sequence if theirs changed."""
        old, self.settings = self.settings, settings
        if settings.script is not old.script:
            self._begin_script()
        if (settings.rate, settings.burst) != (old.rate, old.burst):
            self._begin_limit()
        if settings.seed != old.seed:
            self._begin_sequence()
        if settings.log_size != self.stats.log.maxlen:
            self.stats.log = deque(self.stats.log, settings.log_size)
        self._pause_or_run()

    def reply(self, request: HttpRequest) -> HttpReply:
        """Return the reply to a request."""
        self._count += 1
        identity = f"{self._identities}{self._count:08x}"
        try:
            reply = self._routed(request, identity)
        except RefusalError as refusal:
            reply = refused(request.path, refusal)
        except Exception as error:
            # The checks do not cover every body; this error says more than a client that hangs.
            _logger.exception("The mock server failed on a request to %s.", request.path)
            message = f"The mock server cannot read this request: {type(error).__name__}: {error}."
            reply = refused(request.path, RefusalError(500, message, kind="server_error"))
        label = f"req_{identity}".encode()
        reply.headers += ((b"x-request-id", label), (b"request-id", label))
        return reply

    # -- what settings restart ----------------------------------------------------------------------

    def _begin_script(self) -> None:
        self._script = deque(self.settings.script)

    def _begin_limit(self) -> None:
        rate, burst = self.settings.rate, self.settings.burst
        self._bucket = _TokenBucket(rate, burst or math.ceil(rate), self._clock) if rate else None

    def _begin_sequence(self) -> None:
        seed = self.settings.seed
        if seed is not None:
            self._random = generator(seed, "samples")
            self._chance = generator(seed, "faults")
            self._identities = f"{generator(seed, 'identities').getrandbits(48):012x}"
            self._count = 0

    def _pause_or_run(self) -> None:
        if self.settings.paused:
            self.running.clear()
        else:
            self.running.set()

    # -- routes -------------------------------------------------------------------------------------

    def _routed(self, request: HttpRequest, identity: str) -> HttpReply:
        self._authorise(request)
        path = unprefixed(request.path)
        if request.path in DIALECTS or path == EMBEDDINGS:
            request.allow("POST")
            return self._modelled(request, identity)
        if path == MODELS or path.startswith(f"{MODELS}/"):
            request.allow("GET")
            return self._listed(unquote(path.removeprefix(MODELS).removeprefix("/")))
        if path.startswith("/mock/"):
            return self._controlled(request)
        raise _unknown_path(request)

    def _controlled(self, request: HttpRequest) -> HttpReply:
        """Return the reply to a request that controls the mock server itself."""
        match request.path:
            case "/mock/stats":
                request.allow("GET")
                return json_reply(self.stats.as_json())
            case "/mock/settings":
                request.allow("GET", "POST")
                if request.method == "POST":
                    self._change(request.json())
                return json_reply(self.settings.as_json())
            case "/mock/reset":
                request.allow("POST")
                self.stats.reset()
                return json_reply({"reset": True})
        raise _unknown_path(request)

    def _authorise(self, request: HttpRequest) -> None:
        expected = self.settings.api_key
        if expected is None:
            return
        bearer = request.headers.get(b"authorization", b"")
        given = bearer[7:] if bearer[:7].lower() == b"bearer " else request.headers.get(b"x-api-key", b"")
        given = given or request.headers.get(b"x-goog-api-key") or _key_in(request.target)
        if not hmac.compare_digest(given.strip(), expected.encode()):
            raise RefusalError(
                401,
                "Expected the API key that the mock server was set up with, but got "
                f"{'another one' if given else 'none'}. Send it as Authorization: Bearer, as x-api-key, or "
                "as x-goog-api-key.",
                code="invalid_api_key",
            )

    def _change(self, changes: Mapping[str, Any]) -> None:
        try:
            self.apply(self.settings.updated(changes))
        except (ValueError, TypeError) as error:
            raise RefusalError(400, str(error)) from error

    def _listed(self, name: str) -> HttpReply:
        entries = [
            {"id": model, "object": "model", "created": 0, "owned_by": "cachepipe"}
            for model in self.settings.models
        ]
        if not name:
            return json_reply({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == name:
                return json_reply(entry)
        raise _unknown_model(name, self.settings)

    # -- answers of the model -----------------------------------------------------------------------

    def _modelled(self, request: HttpRequest, identity: str) -> HttpReply:
        """Return the answer of the model, or the fault that replaces or spoils it."""
        self._limit()
        fault = self._fault(request)
        settings = self._settings_for(request)
        reply = None
        if fault is not None:
            self.stats.faults[fault.kind] += 1
            reply = reply_instead(fault, request.path)
        if reply is None:
            try:
                reply = self._answered(request, settings, identity, fault)
            except RefusalError as refusal:
                reply = refused(request.path, refusal)
            else:
                if fault is not None:
                    spoil(reply, fault, request.path)
        reply.fault = fault.kind if fault is not None else None
        reply.delay = max(reply.delay, settings.latency)
        reply.held = True
        return reply

    def _limit(self) -> None:
        if self._bucket is None or (wait := self._bucket.take()) == 0.0:
            return
        raise RefusalError(
            429,
            f"Expected at most {self._bucket.rate:g} requests per second. Try again in {wait:.3f} s.",
            kind="requests",
            code="rate_limit_exceeded",
            headers=(
                *retry_after(wait),
                (b"x-ratelimit-limit-requests", str(self._bucket.burst).encode()),
                (b"x-ratelimit-remaining-requests", b"0"),
                (b"x-ratelimit-reset-requests", f"{wait:.3f}s".encode()),
            ),
        )

    def _fault(self, request: HttpRequest) -> Fault | None:
        """Return the fault of a request: from its header, else from the script, else by chance."""
        wanted = request.headers.get(b"x-mock-fault")
        if wanted is not None:
            return _fault_of_header(wanted)
        if self._script:
            return self._script.popleft()
        for fault in self.settings.faults:
            if fault.path in request.path and self._chance.random() < fault.probability:
                return fault
        return None

    def _settings_for(self, request: HttpRequest) -> Settings:
        """Return the settings, with those that the headers of this request override."""
        changes = {}
        for name in ("latency", "latency_per_token", "stream_delay"):
            value = request.headers.get(b"x-mock-" + name.replace("_", "-").encode())
            if value is not None:
                try:
                    changes[name] = float(value)
                except ValueError:
                    raise RefusalError(400, f"Expected x-mock-{name} to be a number of seconds.") from None
        try:
            return self.settings.updated(changes) if changes else self.settings
        except ValueError as error:
            raise RefusalError(400, str(error)) from error

    def _answered(
        self, request: HttpRequest, settings: Settings, identity: str, fault: Fault | None
    ) -> HttpReply:
        body = request.json()
        path = unprefixed(request.path)
        if path.startswith("/v1/models/"):
            body = gemini.body_of(path, request.target, body)
        elif path in inference.PATHS:
            body = inference.body_of(path, request.target, body)
        name = body.get("model")
        if not settings.any_model and isinstance(name, str) and name not in settings.models:
            raise _unknown_model(name, settings)
        if path in EMBEDDERS:
            return self._embedded(body, settings, fault, path)
        dialect = DIALECTS[request.path]
        call = dialect.read(body, settings, self.model)
        if path == gemini.COUNT:
            return json_reply({"totalTokens": call.tokens_in})
        wanted = call.n * len(call.contexts)
        samples, tokens_out = self._samples(call, choices_left(wanted, fault))
        choices = [choice_of(call, sample) for sample in samples]
        answer = ModelAnswer(call, choices, identity, int(request.arrived), tokens_out)
        self.stats.tokens_in += call.tokens_in
        if call.stream:
            self.stats.streams += 1
            events = events_left(dialect.stream(answer), fault, request.path)
            reply = stream_reply(events, array=bool(body.get("array")))
            reply.broken = fault is not None and fault.kind == "cut"
            reply.pace = settings.stream_delay + settings.latency_per_token
        else:
            longest = max((len(sample.tokens) for sample in samples), default=0)
            reply = json_reply(dialect.write(answer))
            reply.delay = settings.latency + longest * settings.latency_per_token
        reply.headers += dialect.headers
        reply.n, reply.samples = wanted, len(samples)
        return reply

    def _embedded(
        self, body: Mapping[str, Any], settings: Settings, fault: Fault | None, path: str
    ) -> HttpReply:
        embedder = EMBEDDERS[path]
        call = embedder.read(body, settings, self.model, path)
        count = choices_left(len(call.texts), fault)
        reply = json_reply(embedder.write(call, count, path))
        reply.n, reply.samples = len(call.texts), count
        self.stats.samples_generated += count
        self.stats.tokens_in += call.tokens_in
        return reply

    def _samples(self, call: ModelCall, count: int) -> tuple[list[DrawnText], int]:
        """Return the first `count` samples of a call, prompt by prompt, and the number of their tokens."""
        samples: list[DrawnText] = []
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

    def _randomness(self, call: ModelCall, context: str, index: int) -> Random:
        """Return the random numbers for a choice: with a seed, always the same ones for the same choice.

        They do not depend on `n` and `max_tokens`, so a larger `n` gives the same choices and more, and a
        larger `max_tokens` the same words and more. They depend on the context, with its nonces.
        """
        if call.seed is None:
            return self._random
        return generator(call.seed, call.model, context, call.temperature, call.top_p, index)


class _TokenBucket:
    """The rate limit: `take` returns 0.0 when a request may pass, else the seconds until one may."""

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


def _key_in(target: str) -> bytes:
    """Return the API key in the query of a request, as Google takes it."""
    return parse_qs(target.partition("?")[2]).get("key", [""])[-1].encode()


def _fault_of_header(value: bytes) -> Fault | None:
    if value == b"none":
        return None
    try:
        return Fault.parse(orjson.loads(value) if value[:1] == b"{" else value.decode())
    except (ValueError, TypeError) as error:
        raise RefusalError(400, str(error), param="x-mock-fault") from error


def _mean_logprob(sample: DrawnText) -> float:
    return math.fsum(sample.logprobs) / max(1, len(sample.logprobs))


def _unknown_model(name: str, settings: Settings) -> RefusalError:
    known = f"There is no model {name!r} here; there are {', '.join(settings.models)}."
    return RefusalError(404, known, param="model", code="model_not_found")


def _unknown_path(request: HttpRequest) -> RefusalError:
    whole = [path for path in (*DIALECTS, EMBEDDINGS, MODELS) if path.startswith("/v1/") and "{" not in path]
    told = f"There is nothing at {request.method} {request.path}. Known paths: {', '.join(whole)} …"
    return RefusalError(404, told, code="unknown_url")
