"""What a provider says of its limits: in how long to come again, and how much is left."""

from __future__ import annotations

import datetime as dt
import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_LONGEST = 86400.0  # seconds that are believed


class Hint(NamedTuple):
    """What is left of a provider's quota.

    Attributes:
        kind: ``"requests"`` or ``"tokens"``.
        limit: the whole quota, or None.
        remaining: what is left of it.
        reset: seconds until all of it is back.
    """

    kind: str
    limit: float | None
    remaining: float
    reset: float


def headers_of(error: BaseException | None) -> Mapping[str, Any] | None:
    """Return what the answer that an error stands for says of limits, whichever library it is from."""
    for source in (getattr(error, "response", None), error):
        headers = getattr(source, "headers", None)
        if headers is not None and hasattr(headers, "items"):
            return in_any_case(headers)
    return None


def in_any_case(headers: Any) -> Mapping[str, Any]:
    """Return what headers say of limits and retries by lower-case name: each look into others is a search."""
    return {
        lower: value
        for name, value in headers.items()
        if isinstance(name, str) and ("ratelimit" in (lower := name.lower()) or "retry" in lower)
    }


def retry_after(headers: Mapping[str, Any] | None, wall: float | None = None) -> float | None:
    """Return the seconds that an answer asks to wait for, by ``retry-after-ms`` or ``Retry-After``.

    Args:
        headers: those of the answer, by lower-case name; see `in_any_case`.
        wall: the time in seconds since 1970, for a date; default is now.
    """
    if headers is None:
        return None
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, _LONGEST)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None:
        return min(seconds, _LONGEST)
    if not isinstance(value, str):
        return None
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return min(max(0.0, moment.timestamp() - (time.time() if wall is None else wall)), _LONGEST)


def hints(headers: Mapping[str, Any] | None, wall: float | None = None) -> list[Hint]:
    """Return what the headers of an answer say of what is left.

    Understood are OpenAI's ``x-ratelimit-remaining-requests`` and its like for tokens, which others have
    taken over; Anthropic's ``anthropic-ratelimit-requests-remaining``; and ``x-ratelimit-remaining`` alone.
    """
    if headers is None:
        return []
    found = []
    for kind in ("requests", "tokens"):
        for form in (f"x-ratelimit-{{}}-{kind}", f"anthropic-ratelimit-{kind}-{{}}"):
            hint = _hint(headers, kind, form, wall)
            if hint is not None:
                found.append(hint)
                break
    if not found:
        hint = _hint(headers, "requests", "x-ratelimit-{}", wall)
        if hint is not None:
            found.append(hint)
    return found


def _hint(headers: Mapping[str, Any], kind: str, form: str, wall: float | None) -> Hint | None:
    remaining = _number(headers.get(form.format("remaining")))
    reset = _reset(headers.get(form.format("reset")), wall)
    if remaining is None or reset is None:
        return None
    return Hint(kind, _number(headers.get(form.format("limit"))), remaining, reset)


def _reset(value: Any, wall: float | None) -> float | None:
    """Return in how many seconds: from ``6m0s``, ``120ms``, a number, a Unix time or an ISO date."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    here = time.time() if wall is None else wall
    number = _number(text)
    if number is not None:
        if number > 1e12:
            number = number / 1000 - here  # milliseconds since 1970
        elif number > 1e9:
            number -= here
    else:
        parts = _DURATION.findall(text)
        if parts and "".join(amount + unit for amount, unit in parts) == text:
            number = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
        else:
            try:
                moment = dt.datetime.fromisoformat(text)
            except ValueError:
                return None
            number = (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp() - here
    return min(max(number, 0.0), _LONGEST)


def _number(value: Any) -> float | None:
    """Return a header's value as a number, 0 or more; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
