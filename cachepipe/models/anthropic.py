"""Anthropic's messages as a model, through its own SDK: one sample per call."""

from __future__ import annotations

from typing import Any, Final

from cachepipe import wire
from cachepipe.models.openai import EagerConnection, OpenAIModel
from cachepipe.typedefs import Request

MESSAGES: Final = "/v1/messages"
"""Where plain requests go."""


class _Connection(EagerConnection):
    package = "anthropic"
    client_name = "AsyncAnthropic"


class AnthropicModel(OpenAIModel):
    """A model behind Anthropic's API.

    It takes what `OpenAIModel` takes: the fields of a request go into the body. Messages that begin with one
    of the system's are sent with its content as ``system``, unless the request has a field of that name.
    The API gives one sample per call, so a request for n samples is n calls at once. A sample that came
    through a client of `cachepipe.sdk` or a proxy is a hit here, and the other way round.
    Errors are those of the anthropic package.

    Args:
        model: the name of the model, for requests that have no field of that name.
        max_tokens: the most tokens of an answer, for requests that have no field of that name. The API
            demands one of the two.
        client: an ``anthropic.AsyncAnthropic`` (or a subclass) to use; it stays the caller's to close.
        base_url: where the API is; default is ``ANTHROPIC_BASE_URL``, then Anthropic.
        api_key: default is what the SDK finds; without one there are replays only.
        timeout: seconds for one attempt of a call; default is the SDK's.
        max_retries: how often the SDK repeats a failed call; default is the SDK's.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            messages, or else their text.
    """

    _connection_class = _Connection

    def __init__(
        self,
        model: str | None = None,
        *,
        max_tokens: int | None = None,
        client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        raw: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        super().__init__(
            model,
            client=client,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            endpoint=MESSAGES,
            raw=raw,
        )

    def _path(self, endpoint: str) -> str:
        path = super()._path(endpoint)
        return path if path.startswith("/v1/") else f"/v1{path}"

    def _body(self, request: Request) -> dict[str, Any]:
        """Return the body of a plain request."""
        body = super()._body(request)
        first = body["messages"][0] if body["messages"] else None
        if isinstance(first, dict) and first.get("role") == "system" and "system" not in body:
            body["system"] = first.get("content")
            body["messages"] = body["messages"][1:]
        if self.max_tokens is not None:
            body.setdefault("max_tokens", self.max_tokens)
        if "max_tokens" not in body:
            raise wire.BadRequest(
                "Anthropic's API demands max_tokens: make it AnthropicModel(max_tokens=...), "
                "or a field of the request"
            )
        return body
