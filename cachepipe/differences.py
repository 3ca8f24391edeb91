"""Compares two questions, to explain why the cache does not have a question.

Everything here is pure. Documents are canonical JSON, as in `cachepipe.contract.keys.Question`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from cachepipe import jsontext

_TEXTS: Final = ("system", "instructions", "messages", "prompt", "input", "hash")
"""The fields with texts; all others are settings."""
_SAID: Final = 40  # characters of the start and end of a text that are compared
_SHOWN: Final = 60  # characters of a value
_AROUND: Final = 12  # characters that are shown before the first difference of two texts
_MOST: Final = 4  # differences that a sentence lists


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
        if isinstance(self.asked, dict | list) and self.asked == self.stored:
            return f"{self.path} (the same names in another order)"
        asked, stored = self.asked, self.stored
        if isinstance(asked, str) and isinstance(stored, str):
            asked, stored = _parting(asked, stored)
        return f"{self.path} (asked: {_shown(asked)}, stored: {_shown(stored)})"

    @property
    def size(self) -> float:
        """The size of the difference: 1, or, for texts, from 1 to 2, the less they have in common."""
        if not isinstance(self.asked, str) or not isinstance(self.stored, str) or self.path == "scope":
            return 1.0
        same = _same_start(self.asked, self.stored) + _same_start(self.asked[::-1], self.stored[::-1])
        longest = max(len(self.asked), len(self.stored), 1)
        return 2.0 - min(same / longest, 1.0)


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
    text, and its first text. Case and blanks are ignored.
    """
    read = loaded(document)
    said = [" ".join(text.casefold().split()) for text in _texts(read)]
    found: list[tuple[Any, ...]] = [("whole", document)]
    if said:
        last = said[-1]
        found += [("all", *said), ("last", last), ("start", last[:_SAID]), ("end", last[-_SAID:])]
    if len(said) > 1:
        found.append(("first", said[0]))
    if not said and read is not None:
        found.append(("names", *sorted(asked_in(read))))
    return [hash(trait) for trait in found]


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
