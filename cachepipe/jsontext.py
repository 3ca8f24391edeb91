"""Reads and writes JSON: integers keep their digits; every answer that the SDKs accept can be read (C9).

The SDKs read answers with the standard library, which accepts NaN, infinities, lone surrogates and
integers of up to 4,300 digits. orjson is many times faster, but refuses the first three and reads
integers beyond 64 bits as floats. So orjson reads and writes JSON that both treat alike, and the standard
library all other JSON.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final, Literal

import orjson

MOST_DIGITS: Final = 4300
"""The largest number of digits of an integer: Python's own limit for reading one."""

_ZEROS: Final = bytes(0x30 if byte in b"0123456789" else byte for byte in range(256))
_LONG_NUMBER: Final = b"0" * 19  # orjson reads integers of so many digits as floats, if they are too large

_DEEPEST: Final = 250  # levels that orjson writes; it reads more


class LongInteger(ValueError):  # noqa: N818 - names the thing at fault
    """A JSON text has an integer of more than 4,300 digits."""


class Verbatim(dict[str, Any]):
    """A JSON object with its original text, which a strict parser would refuse or change.

    Attributes:
        text: the text.
    """

    text: str = ""


def loads(content: bytes) -> Any:
    """Return the value of a JSON text as the SDKs read it.

    Raises:
        ValueError: when Python cannot read it as JSON, or it nests too deep.
    """
    return _loaded(content)[0]


def read(content: bytes) -> Any:
    """Return the value of a JSON text as `loads` does; an object that strict parsers refuse is `Verbatim`."""
    value, strict = _loaded(content)
    shallow = strict and content.count(b"[") + content.count(b"{") <= _DEEPEST
    if shallow or type(value) is not dict or is_strict(value):
        return value
    try:
        text = content.decode()
    except UnicodeDecodeError:  # its value, in ASCII, says the same
        return value
    whole = Verbatim(value)
    whole.text = text
    return whole


def _loaded(content: bytes) -> tuple[Any, bool]:
    """Return the value of a JSON text, and whether orjson has read it."""
    if _LONG_NUMBER not in content.translate(_ZEROS):
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(content), True
    try:
        return json.loads(content, parse_int=_integer), False
    except RecursionError:
        raise ValueError("it nests too deep") from None


def dumps(value: Any) -> bytes:
    """Return the JSON of a value, from which `loads` reads an equal value; for a `Verbatim` object, its text.

    Raises:
        TypeError: when it contains a value without a JSON form.
        ValueError: when it contains itself.
    """
    if type(value) is Verbatim:
        return value.text.encode()
    try:
        text = orjson.dumps(value)
    except TypeError:
        pass
    else:
        if _is_whole(text, value):
            return text
    return json.dumps(value, separators=(",", ":")).encode()


def is_strict(value: Any) -> bool:
    """Return True if every JSON parser reads an equal value from the JSON of this value."""
    try:
        return type(value) is not Verbatim and _is_whole(orjson.dumps(value), value)
    except TypeError:
        return False


def shown(value: Any) -> Any:
    """Return a value for cachepipe's JSON output: itself if it is strict, else ``{"raw": "<its text>"}``."""
    return value if is_strict(value) else {"raw": dumps(value).decode()}


def valid(value: Any) -> Any:
    """Return a value for JSON that is read back: itself, or its text if it contains NaN or infinities."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return shown(value)
    return value


def mended(text: str, lone: Literal["replace", "surrogatepass"] = "replace") -> str:
    """Return a text in which two halves of a character are one, and a lone surrogate is U+FFFD.

    Args:
        text: the text.
        lone: with ``"surrogatepass"``, lone surrogates stay.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", lone)
    return text


def _is_whole(text: bytes, value: Any) -> bool:
    """Return True if orjson's JSON represents a value completely; orjson writes NaN as null."""
    return b"null" not in text or bool(orjson.loads(text) == value)


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise LongInteger(f"it has an integer of more than {MOST_DIGITS:,} digits; write it as a string")
    return int(digits)
