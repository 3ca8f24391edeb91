"""Entries as JSON lines, and back.

| line | content |
| --- | --- |
| ``question`` | the key, the scope, the document, and the namespaces that use the shared draw |
| ``sample`` | the id, the index at which it was generated, the header, and the value |
| ``draw`` | who drew, and the segments: position, ids, stamp, number generated, place |

The lines of a question follow one another: its samples in order, then its draws. A text of JSON that a parser
might change is written as a string, so that each byte comes back.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import orjson

from cachepipe.contract import keys
from cachepipe.contract.draws import SHARED, Draw, label, namespace_of
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment, ordered
from cachepipe.contract.schedule import Place
from cachepipe.errors import BundleError, StoreError

_NEWLINE: Final = orjson.OPT_APPEND_NEWLINE
_MOST: Final = 1 << 53  # numbers below it are the same in every reader of JSON
_OURS: Final = f"{keys.FORMAT}-"
_ID: Final = re.compile(r"[!#-\[\]-~]{1,200}")  # without quotes and backslashes
_NAMES: Final = {str, type(None)}
_KEY: Final = re.compile(r"k[0-9]+-[0-9a-f]{64}")


# Writing.


class EntryLines(NamedTuple):
    """An entry as lines.

    Attributes:
        lines: the lines, each with its end.
        document: the value of the document; None if a strict parser does not read it.
        headers: the headers of the samples that a strict parser reads.
    """

    lines: list[bytes]
    document: dict[str, Any] | None
    headers: list[dict[str, Any]]


def lines_of(entry: Entry) -> EntryLines:
    """Return the lines of an entry.

    Raises:
        StoreError: when it holds a text that JSON in UTF-8 cannot represent.
    """
    written, document = _embedded(entry.document)
    question = {"question": entry.key, "scope": entry.scope, "document": written}
    if entry.users:
        question["users"] = list(map(namespace_of, entry.users))
    lines, headers = [question], []
    for sample in entry.samples:
        header, parsed = _embedded(sample.header)
        if parsed is not None:
            headers.append(parsed)
        line = {"sample": sample.id, "index": sample.origin, "header": header}
        if sample.discarded is not None:
            line["discarded"] = sample.discarded
        else:
            name, line[name] = _value(sample.payload)
        lines.append(line)
    lines += (_draw_line(*drawn) for drawn in entry.draws.items())
    try:
        return EntryLines([orjson.dumps(line, option=_NEWLINE) for line in lines], document, headers)
    except TypeError as error:
        raise StoreError(
            f"a question cannot be exported: {error}. Its namespace, request id or scope holds half of a "
            "character (a lone surrogate)"
        ) from error


def _draw_line(draw: Draw, segments: list[EntrySegment]) -> dict[str, Any]:
    line: dict[str, Any] = {"draw": draw.request_id}
    if draw.shared:
        line |= {"namespace": SHARED, "shared": True}
    else:
        line["namespace"] = namespace_of(draw.namespace)
    line["replicate"] = namespace_of(draw.replicate)
    line["occurrence"] = draw.occurrence
    line["segments"] = [
        [position, samples, stamp, generated, place and [*place]]
        for position, samples, stamp, generated, place, _ in segments
    ]
    return line


def _embedded(text: bytes) -> tuple[Any, dict[str, Any] | None]:
    """Return what stands for an object of JSON in a line, itself if its bytes come back; and its value."""
    try:
        value = orjson.loads(text)
        if type(value) is dict and orjson.dumps(value) == text:
            return orjson.Fragment(text), value
    except (TypeError, ValueError):
        pass
    return text.decode(errors="surrogateescape"), None


def _value(payload: bytes) -> tuple[str, Any]:
    """Return the name and the value of the field that holds a payload."""
    try:
        if orjson.dumps(orjson.loads(payload)) == payload:
            return "value", orjson.Fragment(payload)
    except (TypeError, ValueError):
        pass
    try:
        return "text", payload.decode()
    except UnicodeDecodeError:
        return "base64", base64.b64encode(payload).decode()


# Reading.


class Lines:
    """Reads the lines of a bundle; every value is checked.

    Args:
        where: the name of the bundle, for errors.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def entries(self, content: bytes, *, checked: bool = False) -> Iterator[Entry]:
        """Iterate over the entries in the lines of a chunk.

        Args:
            content: the lines.
            checked: whether these lines have been read before without an error.

        Raises:
            BundleError: when a line is not what cachepipe writes.
        """
        text = b""
        try:
            entry: Entry | None = None
            for text in content.split(b"\n")[:-1]:
                line = orjson.loads(text)
                if "question" in line:
                    if entry is not None:
                        yield entry if checked else _complete(entry)
                    entry = _question(line, checked=checked)
                elif entry is None:
                    raise ValueError("it comes before any question")  # noqa: TRY301 - as those of the parts
                elif "sample" in line:
                    entry.samples.append(_sample(line, checked=checked))
                else:
                    draw, segments = _draw(line, entry.key, checked=checked)
                    _check(draw not in entry.draws, "the draw comes twice")
                    entry.draws[draw] = segments
            if entry is not None:
                yield entry if checked else _complete(entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._refused(text, error) from error

    def refused(self, error: Exception) -> BundleError:
        """Return the error for content that cachepipe never writes."""
        return BundleError(f"the bundle {self._where} cannot be used: {error}, which cachepipe never writes")

    def _refused(self, text: bytes, error: Exception) -> BundleError:
        told = f"no field {error}" if isinstance(error, KeyError) else error
        return self.refused(ValueError(f"it has the line {text[:80]!r} ({told})"))


def _question(line: dict[str, Any], *, checked: bool) -> Entry:
    key, scope, document = line["question"], line["scope"], _text(line["document"])
    users = [_label(name) for name in line["users"]] if "users" in line else []
    if not checked:
        _check(type(key) is str and _KEY.fullmatch(key) is not None, "the key has another form")
        _check(scope is None or type(scope) is str, "the scope is not a string")
        ours = key.startswith(_OURS)
        _check(not ours or keys.digest(scope, document) == key, "the key is another")
        _check(users == sorted({*users}), "the users are not in order")
    return Entry(key, scope, document, users=users)


def _sample(line: dict[str, Any], *, checked: bool) -> EntrySample:
    name, origin, header, why = line["sample"], line["index"], line["header"], line.get("discarded")
    text = _text(header)
    if not checked:
        _check(type(name) is str and _ID.fullmatch(name) is not None, "the id has another form")
        known = header if type(header) is dict else orjson.loads(text)
        _check(
            text.startswith(b'{"id":"%b","stamp":' % name.encode())
            and known["id"] == name
            and "origin" not in known,
            "the header is of another sample",
        )
        _check_numbers(known["stamp"], origin)
        _check(why is None or type(why) is str, "the reason is not a string")
    return EntrySample(name, origin, text, b"" if why is not None else _payload(line), why)


def _payload(line: dict[str, Any]) -> bytes:
    if "value" in line:
        return _copied(orjson.dumps(line["value"]))
    if "text" in line:
        text: str = line["text"]
        return text.encode()
    try:
        return base64.b64decode(line["base64"], validate=True)
    except binascii.Error as error:
        raise ValueError("it is not base64") from error


def _draw(line: dict[str, Any], key: str, *, checked: bool) -> tuple[Draw, list[EntrySegment]]:
    request_id, occurrence = line["draw"], line["occurrence"]
    namespace = SHARED if line.get("shared") is True else _label(line["namespace"])
    draw = Draw(namespace, key, request_id, occurrence, _label(line["replicate"]))
    segments = [
        EntrySegment(
            position, tuple(names), stamp, generated, None if place is None else Place(*place), number
        )
        for number, (position, names, stamp, generated, place) in enumerate(line["segments"])
    ]
    if not checked:
        _check(type(request_id) is str, "the request id is not a string")
        _check_numbers(occurrence)
        _check(bool(segments), "the draw is empty")
        _check(all(type(names) is list for _, names, *_ in line["segments"]), "it has no list of ids")
        length = 0
        for position, names, stamp, generated, place, _ in segments:
            _check_numbers(position, stamp, generated, *(place or ()))
            _check(position <= length, "a segment begins after the end of the draw")
            _check({*map(type, names)} <= _NAMES, "it has other things than ids")
            _check(generated <= len(names), "more samples generated than drawn")
            length = max(length, position + len(names))
    return draw, segments


def _complete(entry: Entry) -> Entry:
    """Return an entry whose samples and draws fit together."""
    samples, draws = entry.samples, entry.draws
    known = {sample.id for sample in samples}
    if len(samples) > 1:
        _check(len(known) == len(samples), "two samples have one id")
        _check(samples == ordered(samples), "the samples are not in order")
    _check(len(draws) < 2 or list(draws) == sorted(draws), "the draws are not in order")
    taken: dict[str, set[str | None]] = {}
    for draw, segments in draws.items():
        mine: set[str | None] = set()
        for segment in segments:
            names = {*segment.samples}
            _check(
                len(names) == len(segment.samples) or not _repeats(segment.samples),
                "a draw has a sample twice",
            )
            mine |= names
        mine.discard(None)
        _check(mine <= known, "a draw has a sample that is not there")
        others = taken.setdefault(draw.namespace, mine)
        if others is not mine:
            _check(others.isdisjoint(mine), "two draws of a namespace share a sample")
            others |= mine
    return entry


def _repeats(names: Sequence[str | None]) -> bool:
    """Return True if a sample is named twice; any number of samples may be missing."""
    there = [name for name in names if name is not None]
    return len({*there}) < len(there)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _check_numbers(*values: Any) -> None:
    for value in values:
        if type(value) is not int or not 0 <= value < _MOST:
            raise ValueError(f"{value!r:.40} is not a number from 0 to 2**53")


def _label(name: Any) -> str:
    _check(name is None or type(name) is str, "a name is not a string")
    return label(name)


def _text(embedded: Any) -> bytes:
    """Return the text of JSON that `_embedded` has written."""
    if type(embedded) is str:
        return embedded.encode(errors="surrogateescape")
    _check(type(embedded) is dict, "it is not an object")
    return _copied(orjson.dumps(embedded))


def _copied(text: bytes) -> bytes:
    """Return a copy, since orjson returns its output in a buffer that is many times larger."""
    return b"%b" % text
