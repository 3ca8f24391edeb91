"""Questions, samples and draws of a cache as JSON, for the command line and the proxy."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import urlsplit

from cachepipe import jsontext, wire
from cachepipe.contract.draws import namespace_of
from cachepipe.differences import asked_in, loaded
from cachepipe.errors import CachepipeError
from cachepipe.stores.base import DrawInfo, KeyInfo, Sample, StoredQuestion
from cachepipe.values import Codec, shown

_TEXTS: Final = ("messages", "prompt", "input", "contents", "content", "inputs", "hash")
_OBJECTS: Final = {
    "chat.completion": "/chat/completions",
    "text_completion": "/completions",
    "response": "/responses",
    "message": "/messages",
}
"""What answers of providers call themselves, and where they come from."""
_FIELDS: Final = {"generated_text": "/generate", "embeddings": "/embed"}
"""The fields of answers from Hugging Face's own routes, which do not call themselves anything."""


_SAID: Final = frozenset({"content", "parts"})


def document_of(question: StoredQuestion | None) -> Any:
    """Return the content of a stored question; None if it cannot be read."""
    return None if question is None else loaded(question.document)


def key_fields(info: KeyInfo, document: Any, prompt: int) -> dict[str, Any]:
    """Return a line of a listing of questions.

    Args:
        info: the key.
        document: the content of the question.
        prompt: the largest number of characters of the prompt.
    """
    return {**asdict(info), "model": model_in(document), "prompt": prompt_in(document)[:prompt]}


def draw_fields(info: DrawInfo) -> dict[str, Any]:
    """Return a draw, and the samples that it was given."""
    draw = info.draw
    return {
        "namespace": namespace_of(draw.namespace),
        "shared": draw.shared,
        "request_id": draw.request_id,
        "replicate": namespace_of(draw.replicate),
        "occurrence": draw.occurrence,
        "indices": list(info.indices),
        "generated": info.generated,
        "at": info.at,
    }


def sample_fields(sample: Sample, scope: str | None) -> dict[str, Any]:
    """Return a sample: its header, its value, and the summary of a provider's answer, else None."""
    meta = loaded(sample.header)
    value = told = None
    with suppress(ValueError, CachepipeError):  # damaged, or an instance of a class that is not known here
        value = told = shown(sample.payload)
        value = Codec().decode(sample.payload)
    return {
        "index": sample.index,
        "id": sample.id,
        "meta": meta if isinstance(meta, dict) else {},
        "summary": _summary(value, scope),
        "value": told,
    }


def _summary(value: Any, scope: str | None) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    known = _OBJECTS.get(str(value.get("object") or value.get("type")))
    if known is None:
        known = next((path for name, path in _FIELDS.items() if name in value), "")
    api = wire.api_for("POST", urlsplit(scope or "").path) or wire.api_for("POST", known)
    if api is None:
        return None
    try:
        return api.summary(value)
    except (CachepipeError, AttributeError, TypeError, ValueError, LookupError):
        return None  # another adapter's answer under a provider's name


def known_scope(scope: str) -> str:
    """Return a scope in the cache's spelling: a URL without credentials."""
    try:
        return wire.scope_of(scope)
    except wire.BadRequest:  # the name of an adapter
        return scope


def model_in(document: Any) -> str | None:
    """Return the model that a question names, or None."""
    model = asked_in(document).get("model")
    return model if isinstance(model, str) else None


def prompt_in(document: Any) -> str:
    """Return the prompt: the text, or the user's last message."""
    asked = asked_in(document)
    for name in _TEXTS:
        if asked.get(name) is not None:
            return text_of(_last_said(asked[name]))
    return text_of(asked) if asked else ""


def _last_said(value: Any) -> Any:
    """Return the content of the user's last message, else of the last message; other values unchanged."""
    if isinstance(value, list):
        said = [_with_content(item) for item in value if isinstance(item, dict) and {*item} & _SAID]
        users = [item for item in said if item.get("role") == "user"]
        if said:
            return (users or said)[-1]["content"]
    return _with_content(value)["content"] if isinstance(value, dict) and "parts" in value else value


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its content under OpenAI's name, if it has Gemini's."""
    return message if "content" in message else {"role": "user", **message, "content": message["parts"]}


def text_of(content: Any) -> str:
    """Return the text of a content: a string, the texts of its parts, or else its JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        return "\n".join(
            part["text"] if isinstance(part.get("text"), str) else f"[{part.get('type', 'part')}]"
            for part in content
        )
    return jsontext.dumps(content).decode()
