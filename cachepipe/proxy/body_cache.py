"""A cache of parsed request bodies; numbers keep all of their digits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cachepipe import jsontext, wire
from cachepipe.contract.keys import Question

_QUESTION: Final = 5000
_PER_BYTE: Final = 12


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """A parsed request body. Equal requests share it, so it must not be changed.

    Attributes:
        body: the body.
        asks: the questions in it.
        questions: the questions with their keys.
        single: whether it asks for one sample of one question, without a stream.
    """

    body: dict[str, Any]
    asks: Sequence[wire.Ask]
    questions: list[Question]
    single: bool = False


class BodyCache:
    """The most recently used parsed bodies, since an evaluation asks the same questions repeatedly.

    Args:
        size: the approximate number of bytes of memory that they may use.
        largest: the largest number of bytes of a body that is kept.
    """

    def __init__(self, size: int = 128 << 20, largest: int = 32 << 10) -> None:
        self._size = size
        self._largest = largest
        self._held = 0
        self._read: OrderedDict[tuple[Any, ...], ParsedBody] = OrderedDict()

    def get(self, name: tuple[Any, ...]) -> ParsedBody | None:
        """Return a parsed body by its name, whose last item is the body itself; None if it is unknown."""
        read = self._read.get(name)
        if read is not None:
            self._read.move_to_end(name)
        return read

    def put(self, name: tuple[Any, ...], read: ParsedBody) -> None:
        """Keep a parsed body, and drop the least recently used ones if there are too many."""
        if len(name[-1]) > self._largest or name in self._read:
            return
        self._read[name] = read
        self._held += _weight(name, read)
        while self._held > self._size:
            self._held -= _weight(*self._read.popitem(last=False))


def _weight(name: tuple[Any, ...], read: ParsedBody) -> int:
    """Return the approximate number of bytes of memory of a parsed body: its text, values and questions."""
    return _QUESTION * len(read.questions) + _PER_BYTE * len(name[-1])


def read_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a body; None if it is something else, such as a list or another encoding.

    Raises:
        LongInteger: when it holds an integer of more digits than can be keyed.
    """
    try:
        content.decode()
        value = jsontext.loads(content)
    except jsontext.LongInteger:
        raise
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
