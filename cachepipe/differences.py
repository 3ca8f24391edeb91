"""Compares two questions, to explain why the cache does not have a question.

Everything here is pure. Documents are canonical JSON, as in `cachepipe.contract.keys.Question`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from cachepipe import jsontext

_TEXTS: Final = ("system", "instructions", "messages", "prompt", "input", "hash")
"""The fields with texts; all others are settings."""
_SAID: Final = 40  # characters of the start and end of a text that are compared
_SHOWN: Final = 60  # characters of a value
_AROUND: Final = 12  # characters that are shown before the first difference of two texts
_SHORT: Final = 2000  # characters of a text in which dates are looked for
_MOST: Final = 4  # differences that a sentence lists
_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logprobs": False,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "truncation": "disabled",
        "echo": False,
    }
)
"""What providers use for a setting that a request leaves out; null is another way to leave it out."""
_MONTH: Final = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?"
    r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_WEEKDAY: Final = r"(?:(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?,? )?"
_TIME: Final = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp][Mm])?(?:Z|[+-]\d{2}:?\d{2})?"
_DATE: Final = re.compile(
    rf"{_WEEKDAY}(?:\d{{4}}-\d{{2}}-\d{{2}}|\d{{1,2}}[./]\d{{1,2}}[./]\d{{2,4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH},? \d{{4}}|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}})"
    rf"(?:[T ,]+{_TIME})?|{_TIME}"
)

Kind = Literal["host", "default", "date", "order"]
_KINDS: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        "host": "another host",
        "default": "the default, written out in one of them",
        "date": "another date or time",
        "order": "the same names in another order",
    }
)
_OF_KIND: Final = 0.5  # the size of a difference that leaves what is asked as it is


class NoValue:
    """Stands for a field that a question does not have."""

    def __repr__(self) -> str:
        return "nothing"


NO_VALUE: Final = NoValue()


class Difference(NamedTuple):
    """One difference between two questions.

    Attributes:
        path: the path of the value, such as ``scope``, ``temperature`` or ``messages[1].content``.
        asked: the value in the request's question; `NO_VALUE` if it has none.
        stored: the value in the stored question, likewise.
    """

    path: str
    asked: Any
    stored: Any

    def __str__(self) -> str:
        kind = self.kind
        if kind == "order":
            return f"{self.path} ({_KINDS[kind]})"
        told = "" if kind is None else f"{_KINDS[kind]}; "
        asked, stored = self.asked, self.stored
        if isinstance(asked, str) and isinstance(stored, str):
            asked, stored = _parting(asked, stored)
        return f"{self.path} ({told}asked: {_shown(asked)}, stored: {_shown(stored)})"

    @property
    def kind(self) -> Kind | None:
        """What kind of difference it is, if it is one that leaves what is asked as it is.

        ``"host"``: the scopes are one path at two hosts. ``"default"``: one question writes a default out.
        ``"date"``: the texts differ in dates and times only. ``"order"``: the same names in another order.
        """
        asked, stored = self.asked, self.stored
        if isinstance(asked, dict | list) and asked == stored:
            return "order"
        if isinstance(asked, NoValue) or isinstance(stored, NoValue):
            given = stored if isinstance(asked, NoValue) else asked
            default = _DEFAULTS.get(self.path)
            is_default = (type(given) is bool) == (type(default) is bool) and given == default
            return "default" if given is None or (default is not None and is_default) else None
        if not isinstance(asked, str) or not isinstance(stored, str):
            return None
        if self.path == "scope":
            path = _path_of(asked)
            return "host" if path is not None and path == _path_of(stored) else None
        return "date" if _undated(asked) == _undated(stored) else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; a value that is missing is left out."""
        values = {"asked": self.asked, "stored": self.stored}
        known = {name: value for name, value in values.items() if not isinstance(value, NoValue)}
        return {"path": self.path, "kind": self.kind, **known}

    @property
    def size(self) -> float:
        """The size of the difference: 1, or, for texts, from 1 to 2, the less they have in common.

        Half for one that has a `kind`.
        """
        if self.kind is not None:
            return _OF_KIND
        if not isinstance(self.asked, str) or not isinstance(self.stored, str) or self.path == "scope":
            return 1.0
        same = _same_start(self.asked, self.stored) + _same_start(self.asked[::-1], self.stored[::-1])
        longest = max(len(self.asked), len(self.stored), 1)
        return 2.0 - min(same / longest, 1.0)


def _path_of(scope: str) -> str | None:
    """Return the path and query of a URL, without the version of the API; None for another scope."""
    try:
        parts = urlsplit(scope)
    except ValueError:
        return None
    return f"{parts.path.rpartition('/v1/')[2]}?{parts.query}" if parts.netloc else None


def loaded(document: bytes) -> Any:
    """Return the content of a document, or None if it cannot be read."""
    try:
        return jsontext.loads(document)
    except ValueError:
        return None


def asked_in(document: Any) -> dict[str, Any]:
    """Return the fields of a document: a provider's body, or the fields of a request."""
    if not isinstance(document, dict):
        return {}
    fields = document.get("body", document.get("fields"))
    return fields if isinstance(fields, dict) else {k: v for k, v in document.items() if k == "hash"}


def settings_in(document: Any) -> dict[str, Any]:
    """Return the settings of a document by name, with its headers."""
    found = {name: value for name, value in asked_in(document).items() if name not in _TEXTS}
    if isinstance(document, dict) and document.get("headers"):
        found["headers"] = document["headers"]
    return found


def differences(
    asked_scope: str | None, asked: bytes, stored_scope: str | None, stored: bytes
) -> list[Difference]:
    """Return the differences between a request's question and a stored one, the scope first."""
    found = [] if asked_scope == stored_scope else [Difference("scope", asked_scope, stored_scope)]
    if asked == stored:
        return found
    one, other = loaded(asked), loaded(stored)
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = _flat(one), _flat(other)
    return [*found, *_differing("", one, other)]


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document with its fields at the top level."""
    rest = {name: value for name, value in document.items() if name not in ("body", "fields", "hash")}
    return {**asked_in(document), **rest}


def _differing(path: str, one: Any, other: Any) -> Iterator[Difference]:
    if type(one) is type(other) is dict:
        yield from _differing_fields(path, one, other)
    elif type(one) is type(other) is list:
        spelled = list(map(repr, one)), list(map(repr, other))
        head = _same_start(*spelled)
        tail = _same_start(spelled[0][head:][::-1], spelled[1][head:][::-1])
        left, right = one[head : len(one) - tail], other[head : len(other) - tail]
        for place, values in enumerate(itertools.zip_longest(left, right, fillvalue=NO_VALUE), head):
            yield from _differing(f"{path}[{place}]", *values)
    elif (type(one), one) != (type(other), other):
        yield Difference(path or "the question", one, other)


def _differing_fields(path: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    for name in one | other:
        inner = f"{path}.{name}" if path else name
        yield from _differing(inner, one.get(name, NO_VALUE), other.get(name, NO_VALUE))
    if one == other and list(one) != list(other):
        yield Difference(path or "the fields", one, other)


def described(found: list[Difference]) -> str:
    """Return differences as the end of a sentence: "differs in …"."""
    parts = [str(difference) for difference in found[:_MOST]]
    if len(found) > _MOST:
        parts.append(f"{len(found) - _MOST} more")
    return "; ".join(parts)


def _parting(one: str, other: str) -> tuple[str, str]:
    """Return two texts from shortly before their first difference."""
    begin = max(_same_start(one, other) - _AROUND, 0)
    return ("…" if begin else "") + one[begin:], ("…" if begin else "") + other[begin:]


def _same_start(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the common prefix of two texts or lists of texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | NoValue) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# Traits: a stored question may be similar to a question if they share one.


def traits(document: bytes) -> list[int]:
    """Return hashes that similar questions share, the most specific first; valid in this process only.

    They are made from the whole document, all of its texts, its last text, the start and the end of that
    text, and its first text. Case, blanks and, in short texts, dates are ignored.
    """
    read = loaded(document)
    said = [" ".join(_undated(text).casefold().split()) for text in _texts(read)]
    found: list[tuple[Any, ...]] = [("whole", document)]
    if said:
        last = said[-1]
        found += [("all", *said), ("last", last), ("start", last[:_SAID]), ("end", last[-_SAID:])]
    if len(said) > 1:
        found.append(("first", said[0]))
    if not said and read is not None:
        found.append(("names", *sorted(asked_in(read))))
    return [hash(trait) for trait in found]


def _undated(text: str) -> str:
    """Return a text without dates and times, if it is short."""
    return _DATE.sub("", text) if len(text) <= _SHORT else text


def _texts(document: Any) -> list[str]:
    """Return the texts of a document in order, without the roles and types of messages."""
    fields = asked_in(document)
    return [text for name in _TEXTS if name in fields for text in strings(fields[name])]


def strings(value: Any) -> Iterator[str]:
    """Iterate over all texts in a value, except the roles and types of messages and parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in ("role", "type"):
                yield from strings(item)
