"""Anthropic's messages as a model, through its own SDK: one sample per call."""

from __future__ import annotations

from typing import Any, Final, Unpack

from cachepipe import wire
from cachepipe.models.connection import ConnectionSettings, EagerConnection
from cachepipe.models.openai import OpenAIModel
from cachepipe.typedefs import Request

MESSAGES: Final = "/v1/messages"
"""Where requests go."""


class AnthropicModel(OpenAIModel):
    """A model behind Anthropic's API.

    It takes what `OpenAIModel` takes: the fields of a request go into the body. If the first message is one
    of the system, its content is sent as ``system``, unless the request has a field of that name. The API
    returns one sample per call, so a request for n samples is n calls at once. A sample that came through a
    client of `cachepipe.clients` or a proxy is a hit here, and the other way round. Errors are those of the
    anthropic package.

    Args:
        model: the name of the model, for requests that have no field of that name.
        max_tokens: the most tokens of an answer, for requests that have no field of that name. The API
            requires one of the two.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            messages; by default it holds their text.
        settings: those of `OpenAIModel`. The ``client`` is an ``anthropic.AsyncAnthropic``, the default of
            ``base_url`` is ``ANTHROPIC_BASE_URL``, then Anthropic, and the default of ``api_key`` is what the
            SDK finds; without a key there are replays only.
    """

    _connect = (EagerConnection, "anthropic", "AsyncAnthropic")

    def __init__(
        self,
        model: str | None = None,
        *,
        max_tokens: int | None = None,
        raw: bool = False,
        **settings: Unpack[ConnectionSettings],
    ) -> None:
        self.max_tokens = max_tokens
        super().__init__(model, endpoint=MESSAGES, raw=raw, **settings)

    def _path(self, endpoint: str) -> str:
        path = super()._path(endpoint)
        return path if path.startswith("/v1/") else f"/v1{path}"

    def _body(self, request: Request) -> dict[str, Any]:
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
