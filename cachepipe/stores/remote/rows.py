"""How the rows of a shared store are written, for all engines.

Each row is bound to its place by a digest of the key, the field and its content (C12). A row that is damaged,
or was moved to another place, is refused when it is read. Samples have the form that they have on disk.

| field | row |
| --- | --- |
| ``k`` | the scope of the question, and when it was first asked |
| ``q`` | the question |
| ``L`` | the listed indices |
| ``c`` | the number of the last change of a stored draw, as it was announced |
| ``t/NAMESPACE`` | the indices that the namespace has taken |
| ``d/PLACE/NAMESPACE`` | a draw: its indices, its segments, and the claimants that joined it |
| ``o/PLACE`` | the earliest namespaces of a draw (C3) |
| ``p/INDEX`` | the lease of the process that generates the sample |
| ``s/INDEX`` | the sample |
| ``w/INDEX`` | when the sample was discarded, and why |
| ``u/NAMESPACE`` | when the namespace first used the shared draw |
| ``m/NAMESPACE`` | what a run, which is the key, has noted |
| ``b/NAMESPACE`` | what was spent and reserved of the namespace's budget |
| ``x/ID`` | what a command has removed |
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import orjson
from xxhash import xxh3_64_digest

from cachepipe.contract.allotment import Discarded, Segment, indices_of
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.schedule import Place
from cachepipe.errors import DamagedCache
from cachepipe.stores import tables
from cachepipe.stores.base import Sample
from cachepipe.stores.remote.engine import DIGEST, FIELD

_Sums = TypeVar("_Sums")

KNOWN: Final = b"k"
QUESTION: Final = b"q"
LISTED: Final = b"L"
CHANGED: Final = b"c"
TAKEN: Final = b"t/"
DRAW: Final = b"d/"
FIRST: Final = b"o/"
WHY: Final = b"w/"
USE: Final = b"u/"
SUMS: Final = b"m/"
BUDGET: Final = b"b/"
REMOVAL: Final = b"x/"

_FIELDS: Final = 4096  # fields of draws and namespaces that are remembered

MOST_FIRST: Final = 4
"""The number of earliest namespaces that are kept for a draw."""


def encoded(text: str) -> bytes:
    """Return a text as bytes; a lone surrogate is a character like any other."""
    return text.encode("utf-8", "surrogatepass")


def decoded(written: bytes) -> str:
    """Return the text of `encoded` bytes."""
    return written.decode("utf-8", "surrogatepass")


# Fields.


@functools.lru_cache(_FIELDS)
def taken_field(namespace: str) -> bytes:
    """Return the field of what a namespace has taken."""
    return TAKEN + encoded(namespace)


def place_of(draw: Draw) -> bytes:
    """Return what the same draws of all namespaces have in common, in the form of fields."""
    return encoded(f"{draw.request_id}\0{draw.occurrence}\0{draw.replicate}")


@functools.lru_cache(_FIELDS)
def draw_field(draw: Draw) -> bytes:
    """Return the field of a draw."""
    return b"%b%b\0%b" % (DRAW, place_of(draw), encoded(draw.namespace))


def draw_of(key: str, name: bytes) -> Draw:
    """Return the draw that has a field."""
    try:
        request_id, occurrence, replicate, namespace = decoded(name[len(DRAW) :]).rsplit("\0", 3)
        return Draw(namespace, key, request_id, int(occurrence), replicate)
    except ValueError as error:
        raise _damaged(key, name) from error


@functools.lru_cache(_FIELDS)
def first_field(draw: Draw) -> bytes:
    """Return the field of the earliest namespaces of a draw."""
    return FIRST + place_of(draw)


def _draw_beside(name: bytes, namespace: str) -> bytes:
    """Return the field of the draw of a namespace, from the field of the earliest namespaces."""
    return b"%b%b\0%b" % (DRAW, name[len(FIRST) :], encoded(namespace))


def named_field(row: bytes) -> bytes | None:
    """Return the field of the draw to follow, which the row of the earliest namespaces names, or None."""
    named = row[DIGEST : row.find(b"\n", DIGEST)]
    return bytes.fromhex(named[1:].decode()) if named.startswith(FIELD) else None


def numbered(prefix: bytes, index: int) -> bytes:
    """Return the field with a prefix and a number."""
    return b"%b%d" % (prefix, index)


# Rows.


def pack(key: str, name: bytes, content: bytes) -> bytes:
    """Return the row of a field."""
    return _digest(key, name, content) + content


def unpack(key: str, name: bytes, row: bytes) -> bytes:
    """Return the content of a row.

    Raises:
        DamagedCache: when the row is not what was written there.
    """
    content = row[DIGEST:]
    if _digest(key, name, content) != row[:DIGEST]:
        raise _damaged(key, name)
    return content


def _digest(key: str, name: bytes, content: bytes) -> bytes:
    return xxh3_64_digest(b"%b\0%b\0%b" % (key.encode("utf-8", "surrogatepass"), name, content))


def _damaged(key: str, name: bytes) -> DamagedCache:
    return DamagedCache(f"the row {decoded(name)!r} of key {key} is damaged. Restore the store from a copy")


def dumps(value: Any) -> bytes:
    """Return a value as JSON; any text can be written."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate
        return json.dumps(value, separators=(",", ":")).encode()


def loads(key: str, name: bytes, content: bytes) -> Any:
    """Return the value of JSON in a row.

    Raises:
        DamagedCache: when it is not JSON.
    """
    try:
        return orjson.loads(content)
    except ValueError:
        pass
    try:
        return json.loads(content)
    except ValueError as error:
        raise _damaged(key, name) from error


def dump_set(indices: IntervalSet) -> bytes:
    """Return the content of a row with a set of indices."""
    return b" ".join(b"%d-%d" % interval for interval in indices)


def load_set(key: str, name: bytes, content: bytes) -> IntervalSet:
    """Return the set of indices in a row."""
    try:
        intervals = [part.split(b"-") for part in content.split()]
        return IntervalSet((int(start), int(stop)) for start, stop in intervals)
    except ValueError as error:
        raise _damaged(key, name) from error


@dataclass(slots=True)
class DrawRow:
    """The row of a draw.

    Attributes:
        segments: its segments by number, in order of writing.
        generated: by number, how many indices of the segment were to be generated for the draw.
        holders: the number of a segment, the lease and the token of each claimant that joined.
    """

    segments: dict[int, Segment] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)
    holders: list[tuple[int, int, str]] = field(default_factory=list)

    def dumps(self) -> bytes:
        """Return the content of the row; the indices of the draw come first, for the engine."""
        indices = ",".join(map(str, indices_of(self.segments.values())))
        segments = [
            [self.generated[number], *segment[:-1], None if segment.place is None else [*segment.place]]
            for number, segment in self.segments.items()
        ]
        return b"%b\n%b" % (indices.encode(), dumps([segments, self.holders]))

    @classmethod
    def loads(cls, key: str, name: bytes, content: bytes) -> DrawRow:
        """Return the row with this content."""
        row = cls()
        try:
            written, holders = loads(key, name, content[content.index(b"\n") + 1 :])
            for generated, *values in written:
                segment = _segment(values)
                row.segments[segment.number] = segment
                row.generated[segment.number] = generated
            row.holders = [(number, lease, token) for number, lease, token in holders]
        except (ValueError, TypeError) as error:
            raise _damaged(key, name) from error
        return row

    @staticmethod
    def segments_in(key: str, name: bytes, content: bytes) -> list[Segment]:
        """Return only the segments of the row with this content."""
        try:
            written, _ = loads(key, name, content[content.index(b"\n") + 1 :])
            return [_segment(values) for _, *values in written]
        except (ValueError, TypeError) as error:
            raise _damaged(key, name) from error


def _segment(values: list[Any]) -> Segment:
    """Return the segment with these values, as they were written."""
    if values[-1] is not None:
        values[-1] = Place(*values[-1])
    return Segment._make(values)


@dataclass(slots=True)
class FirstRow:
    """The earliest namespaces of a draw.

    Attributes:
        namespaces: the lowest stamp of the draw in each, and the namespace's label; the earliest first.
        more: whether there are later ones that are not named.
    """

    namespaces: list[tuple[int, str]] = field(default_factory=list)
    more: bool = False

    @classmethod
    def of(cls, begun: Iterable[tuple[int, str]]) -> FirstRow:
        """Return the row for a draw with these lowest stamps and labels."""
        found = sorted(begun)
        return cls(found[:MOST_FIRST], len(found) > MOST_FIRST)

    def agrees(self, begun: Collection[tuple[int, str]]) -> bool:
        """Return True if the row says which of the namespaces with these lowest stamps are the earliest."""
        named = {label for _, label in self.namespaces}
        others = [one for one in begun if one[1] not in named]
        return (
            named <= {label for _, label in begun}
            and self.namespaces == sorted(self.namespaces)
            and (self.more or not others)
            and not (self.namespaces and others and min(others) < self.namespaces[-1])
        )

    def dumps(self, name: bytes) -> bytes:
        """Return the content of the row of a field; the draw to follow comes first, for the engine."""
        draws = [_draw_beside(name, label) for _, label in self.namespaces[:1]]
        return b"%b\n%b" % (
            b"".join(FIELD + draw.hex().encode() for draw in draws),
            dumps([self.namespaces, self.more]),
        )

    @classmethod
    def loads(cls, key: str, name: bytes, content: bytes) -> FirstRow:
        """Return the row with this content."""
        try:
            namespaces, more = loads(key, name, content[content.index(b"\n") + 1 :])
            return cls([(stamp, label) for stamp, label in namespaces], more)
        except (ValueError, TypeError) as error:
            raise _damaged(key, name) from error


def dump_change(number: int) -> bytes:
    """Return the content of the row with the number of the last change."""
    return b"%d" % number


def load_change(key: str, row: bytes | None) -> int:
    """Return the number of the last change in a row; 0 if there is no row."""
    if row is None:
        return 0
    try:
        return int(unpack(key, CHANGED, row))
    except ValueError as error:
        raise _damaged(key, CHANGED) from error


def dump_why(at: float, why: str) -> bytes:
    """Return the content of the row that says when a sample was discarded, and why."""
    return dumps([at, why])


def load_why(key: str, name: bytes, content: bytes) -> tuple[float, str]:
    """Return when a sample was discarded, and why."""
    try:
        at, why = loads(key, name, content)
        return float(at), str(why)
    except (ValueError, TypeError) as error:
        raise _damaged(key, name) from error


def dump_sample(key: str, sample: Sample) -> bytes:
    """Return the row of a sample."""
    return tables.sample_row(f"{key}/{sample.index}", sample)


def load_sample(key: str, index: int, row: bytes) -> Sample | Discarded:
    """Return the sample in a row, or `DISCARDED`."""
    return tables.parse_sample(key, index, tables.RAW, None, row)


def header_in(key: str, index: int, row: bytes) -> tuple[bytes, bool]:
    """Return the header of a sample in a row, and whether the sample was discarded."""
    return tables.header_of(key, index, tables.RAW, None, row)


def dump_discarded(key: str, index: int, row: bytes | None) -> bytes:
    """Return the row of a sample that is discarded from now on."""
    return tables.discarded_row(f"{key}/{index}", row or b"")


def dump_erased(key: str, index: int, row: bytes | None) -> bytes:
    """Return the row of a sample that is deleted from now on; its header stays."""
    return tables.erased_row(f"{key}/{index}", row or b"")


def dump_lease(lease: int) -> bytes:
    """Return the content of the row of a pending index."""
    return b"%d" % lease


def load_lease(key: str, name: bytes, content: bytes) -> int:
    """Return the lease in the row of a pending index."""
    try:
        return int(content)
    except ValueError as error:
        raise _damaged(key, name) from error


def indices_in(rows: Iterable[bytes], prefix: bytes) -> list[int]:
    """Return the numbers of the fields with a prefix, in order."""
    numbers = [name[len(prefix) :] for name in rows if name.startswith(prefix)]
    return sorted(int(number) for number in numbers if number.isdigit())


def load_sums(loads: Callable[[bytes], _Sums], key: str, name: bytes, content: bytes) -> _Sums:
    """Return the sums in a row, as ``loads`` reads them."""
    try:
        return loads(content)
    except (ValueError, TypeError, LookupError) as error:
        raise _damaged(key, name) from error
