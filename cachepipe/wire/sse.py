"""Server-sent events: reads them from any chunks, writes them, and records them until the answer is complete.

A stream that ends early is never taken for a complete one (C7).

The reader keeps the original bytes of each event. So a proxy can pass a stream on event by event, hold the
terminal event back until the sample is stored, and leave out usage that its client has not asked for.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import orjson

from cachepipe import jsontext
from cachepipe.wire.errors import BadAnswer

DONE = b"data: [DONE]\n\n"
"""The terminal event of OpenAI's chat and completions."""

IDENTITIES = frozenset({"role", "id", "type", "format"})
"""The strings that deltas repeat and do not extend; OpenRouter repeats the format of reasoning."""
_PIECE = re.compile(r"\S+\s*|\s+")
_BOM = b"\xef\xbb\xbf"
_RANDOM = re.compile(rb'"obfuscation": ?("[A-Za-z0-9]*"\})\Z')
"""The end of an event of OpenAI whose length is hidden by random letters."""
_RANDOM_END = re.compile(rb'"[A-Za-z0-9]*"\}')


class ServerEvent(NamedTuple):
    """One event: its original bytes, its name (mostly empty) and its data, lines joined by newlines."""

    raw: bytes
    name: str
    data: bytes


class EventReader:
    """Cuts a byte stream into events, whatever its chunks and line ends.

    The bytes of all events together are the bytes that were fed. A comment belongs to the event after it, and
    a blank line without data is an event without data.
    """

    def __init__(self) -> None:
        self._partial: list[bytes] = []  # pieces of an incomplete line
        self._raw: list[bytes] = []  # lines of an incomplete event
        self._name = b""
        self._data: list[bytes] = []
        self._after_return = False  # a newline that follows belongs to the line before
        self._fresh = True

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """Return the events that end within this chunk."""
        if chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") and not self._holds:
            events = self._plain(chunk)
            if events is not None:
                return events
        if self._after_return and chunk:
            self._after_return = False
            if chunk.startswith(b"\n"):
                self._raw.append(b"\n")
                chunk = chunk[1:]
        if b"\n" not in chunk and b"\r" not in chunk:
            if chunk:
                self._partial.append(chunk)
            return []
        self._partial.append(chunk)
        lines = b"".join(self._partial).splitlines(keepends=True)
        self._partial.clear()
        self._after_return = chunk.endswith(b"\r")
        if not chunk.endswith((b"\n", b"\r")):
            self._partial.append(lines.pop())
        return [event for line in lines if (event := self._line(line)) is not None]

    @property
    def _holds(self) -> bool:
        """Whether an event has begun."""
        return bool(self._partial or self._raw or self._after_return)

    def _plain(self, chunk: bytes) -> list[ServerEvent] | None:
        """Return the events of a chunk of whole events with one line of data each; None for other chunks."""
        parts = chunk[:-2].split(b"\n\n")
        if b"\r" in chunk or chunk.count(b"\n") != 2 * len(parts):
            return None
        if len(parts) > 1 and not all(part.startswith(b"data: ") for part in parts):
            return None
        self._fresh = False
        return [ServerEvent(part + b"\n\n", "", part[6:]) for part in parts]

    def close(self) -> list[ServerEvent]:
        """Return the rest at the end of the stream as an event, although its blank line is missing."""
        if self._partial:
            self._line(b"".join(self._partial))
            self._partial.clear()
        return [self._event()] if self._raw else []

    def rest(self) -> bytes:
        """Remove the bytes of an incomplete event and return them."""
        held = b"".join([*self._raw, *self._partial])
        for kept in (self._raw, self._partial, self._data):
            kept.clear()
        return held

    def _line(self, line: bytes) -> ServerEvent | None:
        self._raw.append(line)
        line = line.rstrip(b"\r\n")
        if self._fresh:
            self._fresh = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._event()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value
        return None

    def _event(self) -> ServerEvent:
        event = ServerEvent(b"".join(self._raw), self._name.decode(errors="replace"), b"\n".join(self._data))
        self._raw.clear()
        self._data.clear()
        self._name = b""
        return event


class StreamEvent(NamedTuple):
    """One event of a recorded stream, which is passed on.

    Attributes:
        raw: its bytes.
        terminal: whether it completes the answer: store the samples before you pass it on.
        without_usage: its bytes without the usage that ``include_usage`` asks for; empty if it contains
            nothing else, None if it contains no such usage.
    """

    raw: bytes
    terminal: bool = False
    without_usage: bytes | None = None


Kind = Literal["", "terminal"] | bytes
"""The kind of an event: ordinary, terminal, or, for one with usage, its bytes without the usage."""
Finish = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""A function that returns the samples of a complete answer."""


class StreamRecorder(ABC):
    """Assembles the answer in a stream, while the stream is passed on.

    It reads everything that the SDKs' own stream helpers read, so that the answers of unusual servers are
    cached too. If its answer would differ from theirs, there are no samples.

    `feed` never raises: an invalid stream is still passed on, and gives no samples.

    Attributes:
        started: whether content has arrived.
        ended: whether the terminal event has arrived, even if the answer is not complete.
        done: whether the stream has announced its end, as with OpenAI's ``[DONE]``.
        overflowed: whether the answer exceeds the limit; the stream is then passed on unread.
        error: the reason why there will be no samples, or None.
    """

    _may_lack_terminal: ClassVar[bool] = False
    """Whether an answer shows that it is complete, so that its terminal event may be missing."""

    def __init__(self, finish: Finish) -> None:
        self.overflowed = False
        self._most: int | None = None
        self._size = 0
        self.started = False
        self.ended = False
        self.done = False
        self.error: BadAnswer | None = None
        self._finish = finish
        self._samples: list[dict[str, Any]] | None = None
        self._reader = EventReader()

    def __repr__(self) -> str:
        states = {"complete": self.complete, "failed": self.error, "started": self.started}
        state = next((name for name, holds in states.items() if holds), "waiting")
        return f"<{type(self).__name__} {state}>"

    @property
    def complete(self) -> bool:
        """Whether the terminal event has arrived and the answer is complete."""
        return self._samples is not None

    def within(self, most: int) -> Self:
        """Set the largest number of bytes of an answer; return the recorder."""
        self._most = most
        return self

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        """Return the events that end within this chunk, to pass them on."""
        self._size += len(chunk)
        if self._most is not None and self._size > self._most and not self.ended:
            self.overflowed = True
            self.error = self.error or BadAnswer(
                f"the stream has more than {self._most} bytes; it is passed on and not cached"
            )
            return [StreamEvent(self._reader.rest() + chunk)]
        return [self._record(event) for event in self._reader.feed(chunk)]

    def close(self, *, in_order: bool = False) -> list[StreamEvent]:
        """Return the rest of the events at the end of the stream.

        Args:
            in_order: whether the body is known to be complete, by its length or its last chunk. Some
                servers leave out OpenAI's ``[DONE]``. Their answer is complete if its body is complete
                and each choice has its reason to finish.
        """
        events = [self._record(event) for event in self._reader.close()]
        if self.complete or self.error is not None:
            return events
        if in_order and self._may_lack_terminal:
            self.done = self.ended = True
            self._attempt(self._conclude, b"its end")
        else:
            self.error = BadAnswer("the stream ended before its terminal event; it is not a whole answer")
        return events

    def samples(self) -> list[dict[str, Any]]:
        """Return the samples, equal to those of the same answer without a stream.

        Raises:
            BadAnswer: when the stream is incomplete or invalid.
        """
        if self._samples is None:
            raise self.error or BadAnswer("the stream has not come to its terminal event; feed it to its end")
        return self._samples

    def _record(self, event: ServerEvent) -> StreamEvent:
        if event.data.startswith(b"[DONE]"):
            self.done = self.ended = True
        if not event.data or self._samples is not None or self.error is not None:
            return StreamEvent(event.raw)
        if self._continues(event):
            return StreamEvent(event.raw)
        kind = self._attempt(partial(self._take, event), event.data)
        if kind == "terminal":
            self.ended = True
            self._attempt(self._conclude, event.data)
        return StreamEvent(event.raw, self.complete, kind if isinstance(kind, bytes) else None)

    def _attempt(self, step: Callable[[], Kind], data: bytes) -> Kind:
        """Return the result of a step; note the error if it fails."""
        try:
            return step()
        except BadAnswer as error:
            self.error = error
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.error = BadAnswer(f"an event of the stream has an unknown form: {data!r:.200}")
            self.error.__cause__ = error
        return ""

    def _conclude(self) -> Kind:
        self._samples = self._finish(self._whole())
        return "terminal"

    def _continues(self, event: ServerEvent) -> bool:  # noqa: ARG002 - some recorders know such events
        """Read an event if it equals the one before it except for its text; return False for other events."""
        return False

    @abstractmethod
    def _take(self, event: ServerEvent) -> Kind:
        """Read an event with data; return its kind."""

    @abstractmethod
    def _whole(self) -> dict[str, Any]:
        """Return the complete answer."""


def read_object(event: ServerEvent) -> dict[str, Any]:
    """Return the JSON object that is the data of an event.

    Raises:
        BadAnswer: when the data is not a JSON object, or is an error.
    """
    try:
        value = jsontext.loads(event.data)
    except ValueError as error:
        raise BadAnswer(f"an event of the stream is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadAnswer(f"an event of the stream must hold a JSON object; got {value!r:.200}")
    if event.name == "error" or "error" in (value.get("type"), value.get("object")) or value.get("error"):
        raise BadAnswer(f"the stream brought an error: {value!r:.500}")
    return value


def data_event(value: Any) -> bytes:
    """Return an event without a name."""
    return b"data: " + jsontext.dumps(value) + b"\n\n"


def typed_event(value: dict[str, Any]) -> bytes:
    """Return an event that is named after the type of its data."""
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + jsontext.dumps(value) + b"\n\n"


def pieces(text: str) -> list[str]:
    """Return the words of a text, each with the blanks after it; joined, they are the text."""
    return _PIECE.findall(text)


class _Text:
    """A string that grows by parts, which are joined only once."""

    __slots__ = ("parts",)

    def __init__(self, part: str) -> None:
        self.parts = [part]


class TextTemplate:
    """The bytes of an event around its text, so that events which differ only in the text need no parsing.

    Args:
        before: the bytes before the text.
        after: the bytes after the text.
        parts: the text so far, to which further parts are appended.
    """

    __slots__ = ("_after", "_before", "_parts", "_random")

    def __init__(self, before: bytes, after: bytes, parts: list[str]) -> None:
        found = _RANDOM.search(after)
        self._random = found is not None
        self._before = before
        self._after = after if found is None else after[: found.start(1)]
        self._parts = parts

    @classmethod
    def of(cls, data: bytes, name: str, text: Any) -> Self | None:
        """Return the template of an event; None if the place of the text in it is not certain.

        Args:
            data: the data of the event.
            name: the field with the text.
            text: what the text has become so far, with the part of this event as the last one.
        """
        field = b'"%b":' % name.encode()
        if not isinstance(text, _Text) or data.count(field) != 1:
            return None
        start = data.index(field) + len(field)
        start += data[start : start + 1] == b" "
        part = text.parts[-1]
        for written in (json.dumps(part, ensure_ascii=False), json.dumps(part)):
            literal = written.encode(errors="surrogatepass")
            if data.startswith(literal, start):
                return cls(data[:start], data[start + len(literal) :], text.parts)
        return None

    def take(self, data: bytes) -> bool:
        """Append the text of an event if it equals the first one otherwise, and the text is not empty."""
        after, start = self._after, len(self._before)
        if not data.startswith(self._before):
            return False
        if self._random:
            end = data.rfind(after)
            if end < start or not _RANDOM_END.fullmatch(data, end + len(after)):
                return False
        elif data.endswith(after):
            end = len(data) - len(after)
        else:
            return False
        try:
            text = orjson.loads(data[start:end])
        except ValueError:
            return False
        if type(text) is not str or not text:
            return False
        self._parts.append(text)
        return True


def merge(into: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """Merge a delta into the earlier ones and return them; `settled` converts the result to plain values.

    Strings are appended, except identities and repeated names. Numbers are replaced. Mappings are merged by
    name. Lists are merged by the index of their entries if there is one, else appended. A content that begins
    as text and continues in parts, or the other way round, becomes a list of parts. Null changes nothing.

    Raises:
        BadAnswer: when a value changes its type, so that the whole value is ambiguous.
    """
    for name, value in delta.items():
        before = into.get(name)
        if isinstance(before, _Text) and not isinstance(value, str) and not any(before.parts):
            before = None  # an empty string announces content of any kind
        if value is None:
            into.setdefault(name, None)
        elif name in IDENTITIES and isinstance(value, str):
            into[name] = value or before or value
        elif isinstance(value, str):
            into[name] = _appended(name, before, value)
        else:
            into[name] = _merged(name, before, value)
    return into


def _merged(name: str, before: Any, value: Any) -> Any:
    """Return a value and its continuation as one value."""
    match before, value:
        case None | list(), dict() | list() if name == "tool_calls":
            return _with_calls(before or [], value)
        case None | dict(), dict():
            return merge(before or {}, value)
        case None | list(), list():
            return _with_items(before or [], value)
        case _Text(), list() if name == "content":
            return _in_parts(before, value)
        case None | int() | float(), _:
            return value
    raise _changed(name)


def _in_parts(text: _Text, parts: list[Any]) -> Any:
    """Return a content that begins as a text and continues in parts."""
    if not all(isinstance(part, dict) for part in parts):
        raise _changed("content")
    return [_text_part(text), *parts] if parts else text


def _appended(name: str, before: Any, value: str) -> Any:
    if isinstance(before, _Text):
        if name != "name" or value != "".join(before.parts):  # some servers repeat a function's name
            before.parts.append(value)
        return before
    if before is None or before == []:
        return _Text(value)
    if not value:
        return before
    if name == "content" and isinstance(before, list):
        return _with_text(before, value)
    raise _changed(name)


def _with_text(parts: list[Any], value: str) -> list[Any]:
    """Append a text to the last part of a content, or as a new part."""
    last = parts[-1]
    if isinstance(last, dict) and isinstance(last.get("text"), _Text):
        last["text"].parts.append(value)
    else:
        parts.append(_text_part(_Text(value)))
    return parts


def _text_part(text: _Text) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _changed(name: str) -> BadAnswer:
    return BadAnswer(f"{name!r} changed its kind in mid-stream; what it is as a whole cannot be told")


def _with_items(items: list[Any], deltas: list[Any]) -> list[Any]:
    """Append items to a list; if they have an index, merge each into the latest item that it continues."""
    if not any(isinstance(delta, dict) and "index" in delta for delta in deltas):
        items.extend(deltas)
        return items
    for delta in deltas:
        _merge_into(items, _continued(items, delta), delta)
    return items


def _with_calls(calls: list[Any], value: dict[str, Any] | list[Any]) -> list[Any]:
    """Merge each delta into the tool call that it continues, or append it as a new call.

    Some servers give all calls the index 0, or leave out the index, the id or both.
    """
    deltas, earlier = value if isinstance(value, list) else [value], len(calls)
    for delta in deltas:
        call = _named_call(calls, delta, alone=len(deltas) == 1)
        together = any(call is one for one in calls[earlier:])
        if call is not None and _is_next_call(delta, call, together=together):
            call = None
        _merge_into(calls, call, delta)
    return calls


def _named_call(calls: list[Any], delta: dict[str, Any], *, alone: bool) -> Any:
    """Return the call with the index or id of a delta; the latest one if the delta has neither."""
    if delta.get("index") is not None:
        return _continued(calls, delta)
    if identity := delta.get("id"):
        return next((call for call in reversed(calls) if call.get("id") == identity), None)
    if not alone and not _name_of(delta):
        raise BadAnswer("several parts of tool calls have neither an index nor an id nor a name")
    return calls[-1] if calls else None


def _merge_into(entries: list[Any], entry: dict[str, Any] | None, delta: dict[str, Any]) -> None:
    if entry is None:
        entry = {}
        entries.append(entry)
    merge(entry, delta)


def _continued(entries: list[Any], delta: dict[str, Any]) -> Any:
    """Return the latest entry that a delta continues, or None."""
    return next((entry for entry in reversed(entries) if _continues(delta, entry)), None)


def _continues(delta: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Return True if a delta has the index of an entry, and no other id or type."""
    return (
        entry.get("index") == delta.get("index")
        and delta.get("id") in (None, "", entry.get("id"))
        and (not entry.get("type") or delta.get("type") in (None, "", entry["type"]))
    )


def _is_next_call(delta: dict[str, Any], call: dict[str, Any], *, together: bool) -> bool:
    """Return True if a delta is a new call, although it has the index of the call before it, or no index.

    It is a new call if it has a function name and arguments, and the call before has complete arguments. A
    delta without index and id is also a new call if it has another function name, because only the names of
    calls with an index are sent in pieces, or if it has arguments and is in one list with the call before it.

    Args:
        delta: the delta.
        call: the call before it.
        together: whether the two are in one list.

    Raises:
        BadAnswer: when it is ambiguous whether a function without arguments is called again.
    """
    name, before = _name_of(delta), _name_of(call)
    if not name or not before:
        return False
    arguments, earlier = delta["function"].get("arguments"), call["function"].get("arguments")
    if delta.get("index") is None and not delta.get("id"):
        if settled(before) != name or (together and arguments is not None):
            return True
        if arguments == "" and not settled(earlier):
            raise BadAnswer(f"the function {name!r} is named twice; it may have been called once or twice")
    begins = arguments.startswith("{") if isinstance(arguments, str) else isinstance(arguments, dict)
    return begins and _is_whole(earlier)


def _name_of(call: dict[str, Any]) -> Any:
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _is_whole(arguments: Any) -> bool:
    """Return True if the arguments of a call are a complete JSON object."""
    if not isinstance(arguments, _Text) or not arguments.parts[-1].endswith("}"):
        return isinstance(arguments, dict)
    try:
        jsontext.loads("".join(arguments.parts).encode(errors="surrogatepass"))
    except ValueError:
        return False
    return True


def joined(parts: Sequence[str]) -> str:
    """Return the joined parts of a text; two halves of a character become one."""
    return jsontext.mended("".join(parts), "surrogatepass")


def settled(value: Any) -> Any:
    """Return a merged value with its growing strings joined."""
    if isinstance(value, _Text):
        return joined(value.parts)
    if isinstance(value, dict):
        return {name: settled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [settled(item) for item in value]
    return value


def extend(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """Append the lists of a mapping to the earlier ones, as for log probabilities."""
    for name, value in delta.items():
        before = into.get(name)
        if isinstance(before, list) and isinstance(value, list):
            before.extend(value)
        elif value is not None or name not in into:
            into[name] = value
