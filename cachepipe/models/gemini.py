"""Gemini's generateContent as a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Unpack

from cachepipe import wire
from cachepipe.models.connection import ConnectionSettings
from cachepipe.models.openai import OpenAIModel
from cachepipe.providers.presets import PRESETS
from cachepipe.typedefs import Request

_BESIDE: Final = frozenset(
    {"tools", "toolConfig", "safetySettings", "systemInstruction", "cachedContent", "generationConfig"}
)
"""The fields of a body that are not part of its ``generationConfig``."""
_ROLES: Final = {"assistant": "model"}


class GeminiModel(OpenAIModel):
    """A model behind Gemini's API.

    The ``prompt`` of a request is a string, a list of messages in OpenAI's form, or a list of Gemini's
    contents. Messages of the system become the ``systemInstruction``. The other fields of a request are
    written as Gemini's API has them: ``tools``, ``toolConfig``, ``safetySettings``, ``systemInstruction`` and
    ``cachedContent`` go into the body, all others (``temperature``, ``maxOutputTokens``, ``seed`` …) into
    its ``generationConfig``. A sample that came through `cachepipe.clients.Gemini` or a proxy is a hit
    here, and the other way round. The calls go through the HTTP client of the openai package, and raise its
    errors.

    Args:
        model: the name of the model, such as ``"gemini-2.5-flash"``.
        max_n: the largest number of candidates that the model returns in one call; default is that of the
            API.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            answers; by default it holds their text.
        settings: those of `OpenAIModel`. The default of ``base_url`` is ``GEMINI_BASE_URL``, then Google, and
            the default of ``api_key`` is ``GEMINI_API_KEY``, then ``GOOGLE_API_KEY``.
    """

    def __init__(
        self,
        model: str,
        *,
        max_n: int | None = None,
        raw: bool = False,
        **settings: Unpack[ConnectionSettings],
    ) -> None:
        if not isinstance(model, str) or not model:
            raise TypeError(f"model is the name of a model, such as 'gemini-2.5-flash'; got {model!r:.200}")
        if settings.get("client") is None and settings.get("base_url") is None:
            settings["base_url"] = PRESETS["Gemini"].base_url
        super().__init__(
            model, endpoint=f"/v1/models/{model}:generateContent", max_n=max_n, raw=raw, **settings
        )

    def _asking(self, body: dict[str, Any], n: int) -> dict[str, Any]:
        return self.api.merge_body([body], n)

    def _body(self, request: Request) -> dict[str, Any]:
        fields = super()._body(request)
        if fields.pop("model") != self.model:
            raise wire.BadRequest(f"this model is {self.model}; make another GeminiModel for another model")
        prompt = fields.pop(self.api.listed or "input")
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(said, list) or not all(isinstance(each, Mapping) for each in said):
            raise TypeError(f"a prompt is a string, or a list of messages or contents; got {prompt!r:.200}")
        system = [each for each in said if each.get("role") == "system"]
        body: dict[str, Any] = {"contents": [_content(each) for each in said if each not in system]}
        if system:
            parts = [part for each in system for part in _content(each)["parts"]]
            body["systemInstruction"] = {"parts": parts, "role": "user"}  # the role that the SDK writes
        config = fields.pop("generationConfig", {})
        body |= {name: value for name, value in fields.items() if name in _BESIDE}
        config |= {name: value for name, value in fields.items() if name not in _BESIDE}
        body = {**body, "generationConfig": config} if config else body
        return dict(self.api.received(self.endpoint, body))


def _content(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message as a content; a content unchanged.

    Raises:
        BadRequest: for a message whose content is not a text.
    """
    if "parts" in said:
        return said
    text, role = said.get("content"), said.get("role", "user")
    if not isinstance(text, str) or said.keys() - {"role", "content"}:
        raise wire.BadRequest(
            f"a message holds a role and a text here; write others as Gemini's contents; got {said!r:.200}"
        )
    return {"parts": [{"text": text}], "role": _ROLES.get(role, role)}
