"""OpenAI's chat completions, as Together and every compatible server speak them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from cachepipe.wire.base import Sample
from cachepipe.wire.choices import ChoicesApi, Lane
from cachepipe.wire.errors import BadAnswer
from cachepipe.wire.sse import settled

_STREAMED = ("reasoning_content", "reasoning", "content", "refusal")
"""The strings of a message that are streamed piece by piece, in the order in which models make them."""


class ChatApi(ChoicesApi):
    """``POST …/chat/completions``."""

    name = "chat completions"
    content = "message"
    delta = "delta"
    no_delta: ClassVar[Mapping[str, Any]] = {}
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def delta_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return what a streamed choice adds to its message, without the token ids of Together's."""
        if "message" in part:
            raise BadAnswer("a chunk of the stream holds a whole message where a delta was expected")
        delta: dict[str, Any] = part.get("delta") or {}
        if "token_id" in delta:
            return {name: value for name, value in delta.items() if name != "token_id"}
        return delta

    def settle(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the message that the deltas made."""
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
        calls = content.get("tool_calls")
        if calls and isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
            first["tool_calls"] = [{"index": number, **_opened(call)} for number, call in enumerate(calls)]
            for number, call in enumerate(calls):
                lanes.append((_arguments_of(number), _arguments(call)))
        return first, lanes

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        choice = sample["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal")
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text if isinstance(part, Mapping))
        if not text and message.get("tool_calls"):
            text = "\n".join(_call_text(call) for call in message["tool_calls"])
        return text or "", choice.get("finish_reason")


def _arguments(call: Any) -> str:
    """Return the arguments of a function call, empty where it has none that are text."""
    function = call.get("function")
    text = function.get("arguments") if isinstance(function, Mapping) else None
    return text if isinstance(text, str) else ""


def _opened(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool call as its first delta has it: complete but for the arguments that follow."""
    return {**call, "function": {**call["function"], "arguments": ""}} if _arguments(call) else call


def _string_of(name: str) -> Callable[[str], Any]:
    return lambda piece: {name: piece}


def _arguments_of(number: int) -> Callable[[str], Any]:
    return lambda piece: {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function") or call.get("custom") or {}
    return f"{function.get('name')}({function.get('arguments') or function.get('input') or ''})"


CHAT = ChatApi()
