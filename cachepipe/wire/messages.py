"""Anthropic's messages, also in beta: one answer per call, streamed in blocks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cachepipe import jsontext
from cachepipe.wire.base import (
    ANTHROPIC_AS_WRITTEN,
    ANTHROPIC_TRANSPORT,
    Ask,
    Body,
    OneAnswerApi,
    Sample,
    objects,
)
from cachepipe.wire.errors import BadAnswer
from cachepipe.wire.sse import (
    Finish,
    Kind,
    ServerEvent,
    StreamRecorder,
    joined,
    pieces,
    read_object,
    typed_event,
)

_TOLD_LAST = ("stop_reason", "stop_sequence", "stop_details", "container")
"""The fields of a message that are known only at its end."""
_CUT_OFF = frozenset({"max_tokens", "model_context_window_exceeded"})
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"?|[{}\[\],]', re.DOTALL)  # of JSON: a text, a bracket or a comma
_CLOSING = {"{": "}", "[": "]"}
_COUNTED_LAST = ("output_tokens", "output_tokens_details", "server_tool_use")
"""The fields of its usage that are known only at its end."""


class _MessageRecorder(StreamRecorder):
    """Assembles a message from the events of its blocks."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self._message: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, dict[str, list[str]]] = {}

    def _take(self, event: ServerEvent) -> Kind:
        value = read_object(event)
        match value.get("type") or event.name:
            case "message_start":
                self._message = value["message"]
            case "content_block_start":
                self.started = True
                self._begin(value["index"], value["content_block"])
            case "content_block_delta":
                self._add(value["index"], value["delta"])
            case "message_delta":
                self._tell(value)
            case "message_stop":
                return "terminal"
        return ""

    def _begin(self, index: int, block: dict[str, Any]) -> None:
        self._blocks[index] = block
        self._parts[index] = {}
        if block.get("type") == "fallback":  # another model has taken over and answered
            self._message["model"] = block["to"]["model"]

    def _add(self, index: int, delta: dict[str, Any]) -> None:
        """Read a delta: strings are appended, and so are citations; counts are ignored."""
        block, parts = self._blocks[index], self._parts[index]
        for name, value in delta.items():
            if name == "citation":
                block["citations"] = [*(block.get("citations") or ()), value]
            elif name != "type" and isinstance(value, str):
                parts.setdefault(name, []).append(value)

    def _tell(self, value: dict[str, Any]) -> None:
        """Read the fields at the end; their counts are totals, so they replace the earlier ones."""
        told = {name: item for name, item in value.items() if name not in ("type", "delta", "usage")}
        _replace(self._message, {**told, **(value.get("delta") or {})})
        if value.get("usage"):
            self._message["usage"] = usage = dict(self._message.get("usage") or {})
            _replace(usage, value["usage"])

    def _whole(self) -> dict[str, Any]:
        for index, parts in self._parts.items():
            block = self._blocks[index]
            for name, texts in parts.items():
                text = joined(texts)
                if name != "partial_json":
                    block[name] = (block.get(name) or "") + text
                elif text:
                    block["input"] = self._input(text)
        return {**self._message, "content": [block for _, block in sorted(self._blocks.items())]}

    def _input(self, text: str) -> Any:
        """Return the input of a tool call; if the token limit has cut it off, its complete members."""
        try:
            return jsontext.loads(text.encode(errors="surrogatepass"))
        except ValueError as error:
            if self._message.get("stop_reason") in _CUT_OFF:
                return whole_members(text)
            raise BadAnswer(f"the input of a tool call is not valid JSON: {text!r:.200}") from error


class MessagesApi(OneAnswerApi):
    """``POST …/messages``."""

    name = "messages"
    transport = ANTHROPIC_TRANSPORT
    as_written = ANTHROPIC_AS_WRITTEN
    _recorder = _MessageRecorder
    output = "content"
    parts = "blocks"

    def _uncacheable(self, question: Body, transport: Body) -> str:  # noqa: ARG002 - responses need it
        container = question.get("container")
        kept = container.get("id") if isinstance(container, Mapping) else container
        return "it works in a container that the server keeps" if kept else ""

    def _check(self, body: Body) -> None:
        if isinstance(body.get("content"), list) and body.get("stop_reason") is None:
            raise BadAnswer("the message has no stop_reason; it is not a whole answer")

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:
        """Return the events of a stream with this sample; see `Api.stream`."""
        whole = self.answer(samples, ask)
        told = {name: whole[name] for name in _TOLD_LAST if name in whole}
        begun = {**whole, "content": [], **dict.fromkeys(told)}
        usage = whole.get("usage")
        last: dict[str, Any] = {}
        if isinstance(usage, Mapping):
            last = {name: usage[name] for name in _COUNTED_LAST if usage.get(name) is not None}
            begun["usage"] = {**usage, "output_tokens": 0} if "output_tokens" in usage else usage
        yield typed_event({"type": "message_start", "message": begun})
        for index, block in enumerate(whole["content"]):
            opened, deltas = _opened(block)
            yield typed_event({"type": "content_block_start", "index": index, "content_block": opened})
            for delta in deltas:
                yield typed_event({"type": "content_block_delta", "index": index, "delta": delta})
            yield typed_event({"type": "content_block_stop", "index": index})
        yield typed_event({"type": "message_delta", "delta": told, "usage": last})
        yield typed_event({"type": "message_stop"})

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        texts = []
        for block in sample["content"]:
            if isinstance(block.get("text"), str):
                texts.append(block["text"])
            elif "input" in block:
                texts.append(f"{block.get('name')}({jsontext.dumps(block['input']).decode()})")
        return "\n".join(texts), sample.get("stop_reason")


def _replace(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, item in new.items():
        if item is not None or name not in into:
            into[name] = item


def whole_members(text: str) -> Any:
    """Return the value of a JSON object that was cut off, without its incomplete member."""
    closing, whole = "", "{}"
    for found in _TOKEN.finditer(text):
        mark = found[0]
        if mark == ",":
            whole = text[: found.start()] + closing
        elif mark in "{[}]":
            closing = _CLOSING[mark] + closing if mark in _CLOSING else closing[1:]
            whole = text[: found.end()] + closing
    # What ends with a digit may have lost the next one; anything else that parses is whole.
    for candidate in (whole,) if text[-1:].isdigit() else (text + closing, whole):
        with contextlib.suppress(ValueError):
            return jsontext.loads(candidate.encode(errors="surrogatepass"))
    raise BadAnswer(f"the input of a tool call is not valid JSON: {text!r:.200}")


def _opened(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as its first event has it, and the deltas that follow."""
    opened = dict(block)
    deltas: list[dict[str, Any]] = []
    kind = block.get("type")
    if kind in ("text", "thinking") and isinstance(block.get(kind), str):
        opened[kind] = ""
        deltas += [{"type": f"{kind}_delta", kind: piece} for piece in pieces(block[kind])]
        if kind == "text" and objects(block.get("citations")):
            opened["citations"] = []
            deltas += [{"type": "citations_delta", "citation": citation} for citation in block["citations"]]
        if kind == "thinking" and isinstance(block.get("signature"), str):
            opened["signature"] = ""
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
    elif isinstance(block.get("input"), Mapping):
        opened["input"] = {}
        deltas += _input_deltas(block["input"])
    return opened, deltas


def _input_deltas(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the deltas of a tool call's input; an empty one has one delta."""
    parts = pieces(jsontext.dumps(value).decode()) if value else [""]
    return [{"type": "input_json_delta", "partial_json": piece} for piece in parts]


MESSAGES = MessagesApi()
