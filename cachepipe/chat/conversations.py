"""Messages and conversations, in an order that chat models accept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self, TypeAlias, runtime_checkable

from cachepipe import jsontext, terminal
from cachepipe.typedefs import by_value

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""

_OPENING: Final = ("system", "developer")
_COLOURS: Final = {"system": "35", "developer": "35", "user": "32", "assistant": "34", "tool": "33"}
_CONTENTS: Final = (str, list, tuple, type(None))
_WIDTH: Final = 80


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: ``"system"``, ``"developer"``, ``"user"``, ``"assistant"`` or ``"tool"``.
        content: the text, or a list of parts such as texts and images; None for an assistant that only
            calls tools.
        name: the name of the participant, if several have the same role.
        tool_calls: the calls of tools that an assistant makes, as the provider's JSON has them.
        tool_call_id: the call that a tool's message answers.

    Raises:
        ValueError: for a role that does not exist.
        TypeError: for an invalid content.
    """

    role: str
    content: str | list[dict[str, Any]] | None
    name: str | None = field(default=None, kw_only=True)
    tool_calls: list[dict[str, Any]] | None = field(default=None, kw_only=True)
    tool_call_id: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"the role of a message is one of {', '.join(ROLES)}; got {self.role!r:.100}")
        content: Any = self.content
        if content is None and self.role != "assistant":
            raise TypeError(f"the content of a message by {self.role!r} is a string; got None")
        self._check("the content of a message is a string or a list of parts", _CONTENTS, content)
        if isinstance(content, list | tuple):
            part = "a part of a message's content is a mapping such as {'type': 'text', ...}"
            self._check(part, Mapping, *content)
            object.__setattr__(self, "content", by_value(list(content)))
        self._check("name of a message is a string", str | None, self.name)
        self._check("tool_call_id of a message is a string", str | None, self.tool_call_id)
        calls = list(self.tool_calls or ())
        self._check("a call of a tool is a mapping with 'id' and 'function'", Mapping, *calls)
        object.__setattr__(self, "tool_calls", by_value(calls) or None)  # providers refuse an empty list
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message by 'tool' answers a call: give it tool_call_id=")

    @staticmethod
    def _check(expected: str, kind: Any, *items: Any) -> None:
        for item in items:
            if not isinstance(item, kind):
                raise TypeError(f"{expected}; got {item!r:.100}")

    def __repr__(self) -> str:
        fields = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        shown = ", ".join(f"{name}={value!r}" for name, value in fields if value is not None)
        return f"Message({shown})"

    def __hash__(self) -> int:
        return hash((self.role, self.text, self.tool_call_id))

    @property
    def text(self) -> str:
        """The text of the content; for a list of parts, of its text parts; empty if there is none."""
        return text_of(self.content)

    @classmethod
    def of(cls, said: Sayable) -> Self:
        """Convert a message, a mapping, an SDK's message, or ``"role:content"`` to a message.

        Empty fields of a mapping are dropped; a model's refusal becomes the content.

        Raises:
            ValueError: for a text that does not begin with a role and a colon.
            TypeError: for anything else.
        """
        if isinstance(said, cls):
            return said
        if isinstance(said, str):
            return cls._of_text(said)
        if not isinstance(said, Mapping | type) and isinstance(said, Dumped):
            said = said.model_dump(exclude_none=True)
        if not isinstance(said, Mapping):
            raise TypeError(f"a message is a Message, a mapping or a text 'role:content'; got {said!r:.100}")
        if "role" not in said:
            raise ValueError(f"a message as a mapping has a 'role' and a 'content'; got {said!r:.100}")
        return cls._of_fields(said)

    @classmethod
    def _of_fields(cls, said: Mapping[str, Any]) -> Self:
        names = cls.__dataclass_fields__
        given = {"content": None, **{name: value for name, value in said.items() if value or name in names}}
        refusal = given.pop("refusal", None)
        if given["content"] is None:
            given["content"] = refusal
        if unknown := [str(name) for name in given if name not in names]:
            raise ValueError(f"a message has {', '.join(sorted(names))}; got {', '.join(unknown)}")
        return cls(**given)

    @classmethod
    def _of_text(cls, said: str) -> Self:
        role, colon, content = said.partition(":")
        if not colon or role not in ROLES:
            raise ValueError(
                f"a message as text begins with its role and a colon, such as 'user:Hello'; got {said!r:.100}"
            )
        return cls(role, content)

    def to_dict(self) -> dict[str, Any]:
        """Return the message as a provider takes it, without fields that are None, except the content."""
        return {
            name: by_value(value)
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None or name == "content"
        }


@runtime_checkable
class Dumped(Protocol):
    """A message of an SDK, which is a pydantic model."""

    def model_dump(self, *, exclude_none: bool = ...) -> dict[str, Any]:
        """Return its fields."""
        ...


Sayable: TypeAlias = Message | Mapping[str, Any] | str | Dumped
"""The arguments that `Message.of` accepts."""


@dataclass
class Conversation:
    """Messages in the order in which they were said.

    Attributes:
        messages: the messages. You may change the list freely; only `add_message` checks the order.
    """

    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        given: Any = self.messages
        if isinstance(given, str | bytes | Mapping | Message) or not isinstance(given, Iterable):
            raise TypeError(f"the messages of a conversation are a list; got {given!r:.100}")
        self.messages = [Message.of(message) for message in given]

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def add_message(self, message: Sayable) -> Self:
        """Add a message at the end, if its role may come next; return the conversation.

        Raises:
            ValueError: when another role was expected; the message says which.
        """
        message = Message.of(message)
        expected = self.expected_roles()
        if message.role not in expected:
            after = f"after a message by {self.messages[-1].role!r}" if self.messages else "at the start"
            wanted = " or ".join(map(repr, expected))
            raise ValueError(
                f"{after} a conversation expects a message by {wanted}; got one by {message.role!r}"
            )
        if message.role == "tool":
            self.check_open(message.tool_call_id)
        self.messages.append(message)
        return self

    def expected_roles(self) -> tuple[str, ...]:
        """Return the roles that the next message may have.

        Instructions open a conversation; then user and assistant take turns. An assistant may speak
        right after the instructions. Calls of tools are answered before anything else is said.
        """
        last = self.messages[-1].role if self.messages else None
        if last is None:
            return (*_OPENING, "user")
        if last in _OPENING:
            return (*_OPENING, "user", "assistant")
        if self.open_calls():
            return ("tool",)
        return ("user",) if last == "assistant" else ("assistant",)

    def open_calls(self) -> list[str]:
        """Return the ids of the last calls of tools that no message has answered yet."""
        answered = set()
        for message in reversed(self.messages):
            if message.role == "assistant":
                called = [str(call.get("id")) for call in message.tool_calls or ()]
                return [identifier for identifier in called if identifier not in answered]
            answered.add(message.tool_call_id)
        return []

    def check_open(self, identifier: str | None) -> None:
        """Raise an error if no open call of a tool has this id.

        Raises:
            ValueError: for any other id.
        """
        if identifier not in (calls := self.open_calls()):
            known = ", ".join(map(repr, calls)) or "none"
            raise ValueError(f"no open call of a tool has the id {identifier!r}; open are {known}")

    def copy(self) -> Self:
        """Return an independent conversation with the same messages."""
        return type(self)(list(self.messages))

    def to_messages(self) -> list[dict[str, Any]]:
        """Return the messages as a provider takes them."""
        return [message.to_dict() for message in self.messages]

    def to_json(self) -> str:
        """Return the conversation as JSON on one line: ``{"messages": […]}``."""
        return jsontext.dumps({"messages": self.to_messages()}).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the conversation in a JSON text: ``{"messages": […]}``, or the list alone.

        Raises:
            ValueError: when the text is not a conversation.
        """
        value = json.loads(text)
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise ValueError(  # noqa: TRY004 - it is the text that is wrong
                f'a conversation as JSON is {{"messages": [...]}} or a list; got {text!r:.100}'
            )
        try:
            return cls(messages)
        except TypeError as error:
            raise ValueError(f"the JSON text has an invalid message: {error}") from error

    def to_jsonl(self) -> str:
        """Return the conversation with one message per line, as JSON."""
        return "".join(f"{jsontext.dumps(message.to_dict()).decode()}\n" for message in self.messages)

    @classmethod
    def from_jsonl(cls, lines: str | bytes | Iterable[str | bytes]) -> Self:
        """Return the conversation in lines with one message each; empty lines are ignored.

        Args:
            lines: a text, or an open file.

        Raises:
            ValueError: for a line that is not a message; it names the line.
        """
        if isinstance(lines, bytes):
            lines = lines.decode()
        if isinstance(lines, str):
            lines = lines.split("\n")  # JSON may contain the other line separators
        messages = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    messages.append(Message.of(_mapping(json.loads(line))))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"line {number} is not a message: {error}") from error
        return cls(messages)

    def to_pretty_string(self, *, color: bool | None = None) -> str:
        """Return the conversation in readable form, with separators and a colour for each role.

        Args:
            color: whether to use colours; None uses them on a terminal without NO_COLOR.
        """
        color = terminal.shows_colours(color)
        blocks = []
        for message in self.messages:
            codes = _COLOURS[message.role]
            name = f" ({terminal.visible(message.name)})" if message.name else ""
            head = f"── {message.role}{name} "
            head += "─" * max(_WIDTH - len(head), 2)
            lines = [terminal.coloured(head, f"1;{codes}", color=color)]
            lines += [
                terminal.coloured(terminal.visible(text, lines=True), codes, color=color)
                for text in _shown(message)
            ]
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.to_pretty_string(color=False)


def text_of(content: Any) -> str:
    """Return the text of a content; for a list of parts, of its text parts; empty if there is none."""
    if isinstance(content, str):
        return content
    parts = (part for part in content or () if isinstance(part, Mapping))
    return "".join(str(part.get("text") or "") for part in parts)


def _shown(message: Message) -> Iterator[str]:
    """Iterate over the contents of a message, including non-text parts and tool calls."""
    if isinstance(message.content, str):
        yield message.content
    for part in message.content if isinstance(message.content, list) else ():
        yield str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]"
    for call in message.tool_calls or ():
        function = call.get("function") or {}
        yield f"→ {function.get('name')}({function.get('arguments', '')})"


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected an object; got {value!r:.100}")
    return value
