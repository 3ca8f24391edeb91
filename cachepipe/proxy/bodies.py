"""The bodies of requests, read as they are meant: numbers keep their digits, and only JSON is JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

import orjson

_LONG_NUMBER: Final = re.compile(rb"\d{19}")  # orjson reads longer ones as floats


def read_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a body is; None when it is none, as for NaN, other encodings and lists."""
    value: Any = None
    try:
        value = orjson.loads(content) if _LONG_NUMBER.search(content) is None else _loads(content)
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
