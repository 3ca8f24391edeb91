"""Spans and metrics of calls to providers, after OpenTelemetry's semantic conventions for generative AI.

They are made if the program has imported OpenTelemetry, as programs that export spans do; otherwise the only
cost of a call is one look-up. Cache hits create no span. Prompts and answers are not recorded.

Spans are named ``{operation} {model}`` and have the kind CLIENT; the metrics are
``gen_ai.client.operation.duration`` in seconds and ``gen_ai.client.token.usage`` in tokens.
"""

from __future__ import annotations

import contextvars
import sys
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from cachepipe.errors import BadAnswer
from cachepipe.outages import status_of
from cachepipe.wire.usage import model_in, token_counts, usage_in

_OPERATIONS: Final = {
    "chat completions": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "generate content": "generate_content",
    "embed content": "embeddings",
    "text generation": "text_completion",
    "feature extraction": "embeddings",
}
_PROVIDERS: Final = {
    "anthropic.com": "anthropic",
    "azure.com": "azure.ai.openai",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "cohere.ai": "cohere",
    "cohere.com": "cohere",
    "together.ai": "together_ai",
    "together.xyz": "together_ai",
    "groq.com": "groq",
    "mistral.ai": "mistral_ai",
    "deepseek.com": "deepseek",
    "x.ai": "x_ai",
    "perplexity.ai": "perplexity",
}
_PARAMETERS: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
}
_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS: Final = tuple(4**power for power in range(14))


class _Tools:
    """The tracer and the instruments; found once."""

    def __init__(self) -> None:
        from opentelemetry import metrics, trace  # noqa: PLC0415 - only for programs that have it

        self.kind = trace.SpanKind.CLIENT
        self.error = trace.Status(trace.StatusCode.ERROR)
        self.tracer = trace.get_tracer("cachepipe")
        meter = metrics.get_meter("cachepipe")
        self.duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="Duration of calls to models.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.usage = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens used by calls to models.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )


_tools: _Tools | None = None


def wanted() -> bool:
    """Return True if the program may export spans and metrics."""
    return "opentelemetry" in sys.modules


def begin(
    api: str, url: str, body: Mapping[str, Any], context: contextvars.Context | None = None
) -> CallSpan | None:
    """Begin the span of a call; None if nothing would export it.

    Args:
        api: the name of the API, as `cachepipe.wire` has it.
        url: the URL of the call.
        body: the body of the call.
        context: the caller's context, with the parent span; default is the current one.
    """
    global _tools  # noqa: PLW0603 - found once, when a program has it
    if not wanted():
        return None
    if _tools is None:
        try:
            _tools = _Tools()
        except (ImportError, TypeError):  # OpenTelemetry is incomplete, or older than these arguments
            return None
    if context is None:
        return CallSpan(_tools, api, url, body)
    return context.copy().run(CallSpan, _tools, api, url, body)


class CallSpan:
    """A call to a provider, from its beginning to its end."""

    def __init__(self, tools: _Tools, api: str, url: str, body: Mapping[str, Any]) -> None:
        self._tools = tools
        self._ended = False
        self._begun = time.perf_counter()
        model = body.get("model")
        model = model if isinstance(model, str) else None
        self._shared = _endpoint_attributes(api, url, model)
        name = f"{self._shared['gen_ai.operation.name']} {model}" if model is not None else api
        attributes = {**self._shared, **_request_attributes(body)}
        self._span = tools.tracer.start_span(name, kind=tools.kind, attributes=attributes)

    def end(self, answer: Mapping[str, Any] | None = None, *, error: BaseException | None = None) -> None:
        """End the span. Idempotent.

        Args:
            answer: the provider's answer; its usage, model and finish reasons are recorded.
            error: the error of the call, if it failed.
        """
        if self._ended:
            return
        self._ended = True
        seconds = time.perf_counter() - self._begun
        answer = answer or {}
        failure = _failure(error, answer)
        tokens, model = token_counts(usage_in(answer)), model_in(answer)
        told: dict[str, Any] = {
            "gen_ai.response.id": answer.get("id", answer.get("responseId")),
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": _reasons(answer),
            "gen_ai.usage.input_tokens": tokens["prompt_tokens"],
            "gen_ai.usage.output_tokens": tokens["completion_tokens"],
        }
        self._span.set_attributes({name: value for name, value in told.items() if value})
        shared = dict(self._shared)
        if isinstance(model, str):
            shared["gen_ai.response.model"] = model
        if failure is not None:
            shared["error.type"] = failure
            self._span.set_attribute("error.type", failure)
            self._span.set_status(self._tools.error)
        self._tools.duration.record(seconds, shared)
        for kind in ("input", "output"):
            if count := told[f"gen_ai.usage.{kind}_tokens"]:
                self._tools.usage.record(count, {**shared, "gen_ai.token.type": kind})
        self._span.end()


def _endpoint_attributes(api: str, url: str, model: str | None) -> dict[str, Any]:
    """Return the attributes that the span and the metrics of a call share."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    providers = (name for end, name in _PROVIDERS.items() if host == end or host.endswith(f".{end}"))
    attributes = {
        "gen_ai.operation.name": _OPERATIONS.get(api, api.replace(" ", "_")),
        "gen_ai.provider.name": next(providers, "openai"),
        "server.address": host,
        "server.port": parts.port or {"http": 80, "https": 443}.get(parts.scheme),
        "gen_ai.request.model": model,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _request_attributes(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes for the parameters of a request."""
    attributes: dict[str, Any] = {
        f"gen_ai.request.{name}": body[field]
        for field, name in _PARAMETERS.items()
        if type(body.get(field)) in (int, float)
    }
    stop = body.get("stop", body.get("stop_sequences"))
    stops = [stop] if isinstance(stop, str) else stop
    if stops and isinstance(stops, list) and all(isinstance(each, str) for each in stops):
        attributes["gen_ai.request.stop_sequences"] = stops
    if isinstance(body.get("n"), int) and body["n"] != 1:
        attributes["gen_ai.request.choice.count"] = body["n"]
    return attributes


def _failure(error: BaseException | None, answer: Mapping[str, Any]) -> str | None:
    """Return the type of a call's failure: the status or the class of its error; None if it did not fail."""
    if error is None:
        return BadAnswer.__qualname__ if answer.get("error") else None
    status = status_of(error)
    return type(error).__qualname__ if status is None else str(status)


def _reasons(answer: Mapping[str, Any]) -> list[str] | None:
    """Return why the samples of an answer ended, in the provider's words."""
    choices = answer.get("choices", answer.get("candidates"))
    listed = choices if isinstance(choices, list) else []
    given = [
        choice.get("finish_reason", choice.get("finishReason"))
        for choice in listed
        if isinstance(choice, Mapping)
    ]
    reasons = [reason for reason in [*given, answer.get("stop_reason")] if isinstance(reason, str)]
    return reasons or None
