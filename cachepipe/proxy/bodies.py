"""The bodies of requests, read as they are meant: numbers keep their digits, and only JSON is JSON."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cachepipe import wire
from cachepipe.keys import Question

_ZEROS: Final = bytes(0x30 if byte in b"0123456789" else byte for byte in range(256))
_QUESTION: Final = 5000
_PER_BYTE: Final = 12
_LONG_NUMBER: Final = (
    b"0" * 19
)  # orjson reads whole numbers of so many digits as floats, if they are too large


@dataclass(frozen=True, slots=True)
class Read:
    """A request's body as it was read; shared between equal requests, so nobody changes it.

    Attributes:
        body: the body.
        asks: what it asks.
        questions: the questions with their keys.
        single: whether it asks for one sample of one question, and for no stream.
    """

    body: dict[str, Any]
    asks: Sequence[wire.Ask]
    questions: list[Question]
    single: bool = False


class Memory:
    """The bodies read last: an evaluation asks the same questions again and again.

    Args:
        size: bytes of memory that they may take, about.
        largest: bytes of the largest body that is remembered.
    """

    def __init__(self, size: int = 128 << 20, largest: int = 32 << 10) -> None:
        self._size = size
        self._largest = largest
        self._held = 0
        self._read: OrderedDict[tuple[Any, ...], Read] = OrderedDict()

    def get(self, name: tuple[Any, ...]) -> Read | None:
        """Return what was read of a body; its name ends with its bytes."""
        read = self._read.get(name)
        if read is not None:
            self._read.move_to_end(name)
        return read

    def put(self, name: tuple[Any, ...], read: Read) -> None:
        """Remember what was read of a body, in place of the one that was used longest ago."""
        if len(name[-1]) > self._largest or name in self._read:
            return
        self._read[name] = read
        self._held += _weight(name, read)
        while self._held > self._size:
            self._held -= _weight(*self._read.popitem(last=False))


def _weight(name: tuple[Any, ...], read: Read) -> int:
    """Return about how many bytes of memory a body takes that was read: its text, values and questions."""
    return _QUESTION * len(read.questions) + _PER_BYTE * len(name[-1])


def read_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a body is; None when it is none, as for NaN, other encodings and lists."""
    value: Any = None
    try:
        value = _loads(content) if _LONG_NUMBER in content.translate(_ZEROS) else orjson.loads(content)
    except ValueError:
        try:
            value = _loads(content)  # lone surrogates
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    return value if isinstance(value, dict) else None


def _loads(content: bytes) -> Any:
    return json.loads(content.decode(), parse_constant=_no_number, parse_float=_number)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number
