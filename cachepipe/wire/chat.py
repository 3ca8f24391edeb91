"""OpenAI's chat completions, also of Together and other compatible servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from cachepipe.wire.base import Sample, objects, text_of
from cachepipe.wire.choices import ChoicesApi, Lane
from cachepipe.wire.sse import settled

_STREAMED = ("reasoning_content", "reasoning", "content", "refusal")
"""The strings of a message that are streamed in pieces, in the order in which models generate them."""


class ChatApi(ChoicesApi):
    """``POST …/chat/completions``."""

    name = "chat completions"
    content = "message"
    delta = "delta"
    no_delta: ClassVar[Mapping[str, Any]] = {}
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def delta_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the message in a streamed choice, without Together's token ids."""
        delta: dict[str, Any] = part.get("delta") or {}
        if "token_id" in delta:
            return {name: value for name, value in delta.items() if name != "token_id"}
        return delta

    def settle(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the message from the merged deltas."""
        message: dict[str, Any] = {"role": "assistant", **settled(content)}
        calls = message.get("tool_calls")
        if calls:
            calls.sort(key=lambda call: call.get("index") or 0)
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"} for call in calls
            ]
        return message

    def _deltas(self, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Lane]]:
        first = dict(content)
        lanes: list[Lane] = []
        for name in _STREAMED:
            text = content.get(name)
            if isinstance(text, str):
                first[name] = ""
                lanes.append((_string_of(name), text))
            elif name == "content" and isinstance(text, list) and _is_mixed(text):
                del first[name]
                lanes += map(_part_of, [None, *text], text)
        calls = content.get("tool_calls")
        if calls and objects(calls) == calls:
            first["tool_calls"] = [{"index": number, **_opened(call)} for number, call in enumerate(calls)]
            for number, call in enumerate(calls):
                lanes.append((_arguments_of(number), _arguments(call)))
        return first, lanes

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        choice = sample["choices"][0]
        message = choice["message"]
        content = message.get("content")
        text = (
            text_of(content)
            or "".join(text_of(part.get("text")) for part in objects(content))
            or text_of(message.get("refusal"))
            or "\n".join(_call_text(call) for call in objects(message.get("tool_calls")))
        )
        return text, choice.get("finish_reason")


def _arguments(call: Any) -> str:
    """Return the arguments of a function call, or an empty string if they are not a text."""
    function = call.get("function")
    return text_of(function.get("arguments")) if isinstance(function, Mapping) else ""


def _opened(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first delta of a tool call: without the arguments, which follow."""
    return {**call, "function": {**call["function"], "arguments": ""}} if _arguments(call) else call


def _is_mixed(parts: list[Any]) -> bool:
    """Return True for a content with text parts and others; servers stream its text as strings."""
    return len(objects(parts)) == len(parts) and len({_is_text(part) for part in parts}) > 1


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.keys() == {"type", "text"} and isinstance(part["text"], str)


def _part_of(before: Any, part: Any) -> Lane:
    """Return the lane of a part of a content: a text is streamed as strings, unless a text precedes it."""
    if _is_text(part) and part["text"] and not _is_text(before):
        return _string_of("content"), part["text"]
    return _string_of("content"), [[part]]


def _string_of(name: str) -> Callable[[Any], Any]:
    return lambda piece: {name: piece}


def _arguments_of(number: int) -> Callable[[str], Any]:
    return lambda piece: {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function") or call.get("custom")
    if not isinstance(function, Mapping):
        return text_of(call.get("type"))
    return f"{function.get('name')}({function.get('arguments') or function.get('input') or ''})"


CHAT = ChatApi()
