"""OpenAI's responses: one answer per call, streamed as numbered events with types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cachepipe.wire.base import (
    RESPONSES_AS_WRITTEN,
    RESPONSES_TRANSPORT,
    Ask,
    Body,
    OneAnswerApi,
    Sample,
    objects,
    text_of,
)
from cachepipe.wire.errors import BadAnswer
from cachepipe.wire.sse import Finish, Kind, ServerEvent, StreamRecorder, pieces, read_object, typed_event

_ANSWERS = ("completed", "incomplete", None)
_TEXTS = {
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
    "mcp_call": ("arguments", "mcp_call_arguments"),
    "code_interpreter_call": ("code", "code_interpreter_call_code"),
}
"""By the type of output item: the field that is streamed in pieces, and the name of its events."""
_PARTS = {
    "output_text": ("text", "output_text"),
    "refusal": ("refusal", "refusal"),
    "reasoning_text": ("text", "reasoning_text"),
}
"""The same by the type of content part."""


class _ResponseRecorder(StreamRecorder):
    """Waits for the terminal event, which contains the whole response."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self._items: dict[int, dict[str, Any]] = {}
        self._response: dict[str, Any] = {}

    def _take(self, event: ServerEvent) -> Kind:
        value = read_object(event)
        kind = value.get("type") or event.name
        if kind in ("response.failed", "response.cancelled"):
            raise BadAnswer(f"the stream ended with {kind}: {value!r:.500}")
        if kind in ("response.completed", "response.incomplete"):
            self._response = value["response"]
            return "terminal"
        if kind == "response.output_item.done":
            self._items[value["output_index"]] = value["item"]
        self.started = self.started or kind.endswith(".delta") or kind == "response.output_item.done"
        return ""

    def _whole(self) -> dict[str, Any]:
        if self._response.get("output") in (None, []):  # some servers send only the items before
            return {**self._response, "output": [item for _, item in sorted(self._items.items())]}
        return self._response


class ResponsesApi(OneAnswerApi):
    """``POST …/responses``."""

    name = "responses"
    transport = RESPONSES_TRANSPORT
    as_written = RESPONSES_AS_WRITTEN
    _recorder = _ResponseRecorder
    output = "output"
    parts = "items"

    def _parted(self, body: Body) -> tuple[dict[str, Any], dict[str, Any]]:
        question, transport = super()._parted(body)
        if "store" in question and question["store"] in (None, True):  # absent counts as true
            transport["store"] = question.pop("store")
        return question, transport

    def _uncacheable(self, question: Body, transport: Body) -> str:
        options = transport.get("prompt_cache_options")
        if question.get("background"):
            return "it runs in the background and is polled"
        if question.get("conversation") is not None:
            return "it adds to a conversation that the server keeps"
        if any(map(_container_of, _tools(question))):
            return "it works in a container that the server keeps"
        if isinstance(options, Mapping) and options.get("prewarm"):
            return "it prepares the provider's cache and generates nothing"
        return ""

    def _check(self, body: Body) -> None:
        if body.get("status") not in _ANSWERS:
            raise BadAnswer(f"the response has status {body['status']!r:.100}; it is not an answer")

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:
        """Return the events of a stream with this sample; see `Api.stream`."""
        whole = self.answer(samples, ask)
        for number, event in enumerate(_events(whole)):
            event["sequence_number"] = number
            yield typed_event(event)

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        texts = []
        for item in sample["output"]:
            field = _TEXTS.get(text_of(item.get("type")))
            if field is not None:
                texts.append(f"{item.get('name') or item['type']}({item.get(field[0]) or ''})")
            elif item.get("type") == "message":
                parts = objects(item.get("content"))
                texts += [text_of(part.get("text")) or text_of(part.get("refusal")) for part in parts]
        details = sample.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, Mapping) else None
        return "\n".join(texts), reason or sample.get("status")


def _tools(question: Body) -> Sequence[Any]:
    """Return the tools of a question, or an empty list if they are not a list."""
    tools = question.get("tools")
    return tools if isinstance(tools, list | tuple) else ()


def _container_of(tool: Any) -> str:
    """Return the id of the container that a tool uses, or an empty string if it gets a new one."""
    if not isinstance(tool, Mapping):
        return ""
    environment = tool.get("environment")
    shell = environment.get("container_id") if isinstance(environment, Mapping) else None
    return text_of(tool.get("container")) or text_of(shell)


def _events(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the events of a response's stream, without their numbers."""
    status = whole.get("status") or "completed"
    begun = {**whole, "status": "in_progress", "output": []}
    for name in ("completed_at", "incomplete_details", "usage"):
        if name in begun:
            begun[name] = None
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(whole["output"]):
        yield from _item_events(index, item)
    yield {"type": f"response.{status}", "response": whole}


def _item_events(index: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    place = {"item_id": item.get("id") or "", "output_index": index}
    opened = {**item, "status": "in_progress"} if "status" in item else dict(item)
    for name in ("content", "summary"):
        if isinstance(item.get(name), list):
            opened[name] = []
    field, kind = _TEXTS.get(text_of(item.get("type")), ("", ""))
    if isinstance(item.get(field), str):
        opened[field] = ""
    yield {"type": "response.output_item.added", "output_index": index, "item": opened}
    for number, part in enumerate(objects(item.get("summary"))):
        at = {**place, "summary_index": number}
        yield {"type": "response.reasoning_summary_part.added", **at, "part": {**part, "text": ""}}
        yield from _text_events("reasoning_summary_text", "text", text_of(part.get("text")), at)
        yield {"type": "response.reasoning_summary_part.done", **at, "part": part}
    for number, part in enumerate(objects(item.get("content"))):
        yield from _part_events({**place, "content_index": number}, part)
    if isinstance(item.get(field), str):
        yield from _text_events(kind, field, item[field], place)
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _part_events(place: dict[str, Any], part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    field, kind = _PARTS.get(text_of(part.get("type")), ("", ""))
    opened = dict(part)
    if field:
        opened[field] = ""
    for name in ("annotations", "logprobs"):
        if part.get(name):
            opened[name] = []
    yield {"type": "response.content_part.added", **place, "part": opened}
    if field:
        yield from _text_events(kind, field, text_of(part.get(field)), place, part)
    yield {"type": "response.content_part.done", **place, "part": part}


def _text_events(
    kind: str, field: str, text: str, place: dict[str, Any], part: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Return the events of one text in pieces, with its log probabilities and annotations."""
    part = part or {}
    logprobs = objects(part.get("logprobs"))
    listed = {"logprobs": logprobs} if kind == "output_text" else {}
    tokens = [text_of(entry.get("token")) for entry in logprobs]
    if tokens and "".join(tokens) == text:
        parts = [(token, [entry]) for token, entry in zip(tokens, logprobs, strict=True)]
    else:
        parts = [(piece, []) for piece in pieces(text)]
    for piece, own in parts:
        yield {"type": f"response.{kind}.delta", **place, "delta": piece, **dict.fromkeys(listed, own)}
    for number, annotation in enumerate(objects(part.get("annotations"))):
        added = {"annotation_index": number, "annotation": annotation}
        yield {"type": "response.output_text.annotation.added", **place, **added}
    yield {"type": f"response.{kind}.done", **place, field: text, **listed}


RESPONSES = ResponsesApi()
