"""What an answer says about limits: its status, when to try again, and how much of a quota is left."""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ALONE = "x-ratelimit-{}"
_MINUTE = 60.0
_FORMS = (
    ("requests", "x-ratelimit-{}-requests", None),  # OpenAI, Groq, xAI
    ("tokens", "x-ratelimit-{}-tokens", None),
    ("requests", "anthropic-ratelimit-requests-{}", None),
    ("tokens", "anthropic-ratelimit-tokens-{}", None),
    ("requests", "x-ratelimit-{}-req-minute", _MINUTE),  # Mistral, which does not say when it is reset
    ("requests", "x-ratelimit-{}-requests-minute", _MINUTE),
    ("tokens", "x-ratelimit-{}-tokens-minute", _MINUTE),  # Mistral, Cerebras
    ("requests", "x-ratelimit-{}-requests-day", None),  # Cerebras
    ("requests", _ALONE, None),  # OpenRouter, Together
)
"""What headers say (``limit``, ``remaining``, ``reset``), and the time of a reset that they leave out."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_LONGEST = 86400.0  # seconds; a longer time is taken for this one


class Hint(NamedTuple):
    """What is left of a provider's quota.

    Attributes:
        kind: ``"requests"`` or ``"tokens"``.
        limit: the whole quota, or None.
        remaining: the part that is left.
        reset: seconds until the whole quota is available again.
    """

    kind: str
    limit: float | None
    remaining: float
    reset: float


def headers_of(error: BaseException | None) -> Mapping[str, Any] | None:
    """Return the headers about limits of the answer in an error, whichever library it is from."""
    for source in (getattr(error, "response", None), error):
        headers = getattr(source, "headers", None)
        if headers is not None and hasattr(headers, "items"):
            return {**_retry_info(error), **in_any_case(headers)}
    return _retry_info(error) or None


def _retry_info(error: BaseException | None) -> dict[str, str]:
    """Return the time to wait in an error of Google's, as the header that other providers send.

    It is in the error's ``RetryInfo``: google-genai's errors hold the body as ``details``, the proxy's as
    ``content``.
    """
    body = getattr(error, "details", None)
    if body is None and b"google.rpc.RetryInfo" in (content := getattr(error, "content", b"") or b""):
        with contextlib.suppress(ValueError):
            body = json.loads(content)
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    told = body.get("error", body) if isinstance(body, Mapping) else {}
    details = told.get("details") if isinstance(told, Mapping) else None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, Mapping) and str(detail.get("@type")).endswith("google.rpc.RetryInfo"):
            seconds = _duration(str(detail.get("retryDelay")))
            if seconds is not None:
                return {"retry-after": f"{seconds:g}"}
    return {}


def in_any_case(headers: Any) -> Mapping[str, Any]:
    """Return the headers about limits and retries, by lower-case name."""
    return {
        lower: value
        for name, value in headers.items()
        if isinstance(name, str) and ("ratelimit" in (lower := name.lower()) or "retry" in lower)
    }


def retry_after(headers: Mapping[str, Any] | None, wall: float | None = None) -> float | None:
    """Return the seconds to wait that an answer asks for in ``retry-after-ms`` or ``Retry-After``.

    Args:
        headers: the headers of the answer, by lower-case name; see `in_any_case`.
        wall: the time in seconds since 1970, to which a date is compared; default is now.
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
    """Return what the headers of an answer say about what is left of quotas.

    It reads OpenAI's ``x-ratelimit-remaining-requests`` and ``…-tokens``, which other providers use too;
    Anthropic's ``anthropic-ratelimit-requests-remaining``; the same with the window in the name, as Mistral
    and Cerebras write it; and ``x-ratelimit-remaining`` alone.
    """
    if headers is None:
        return []
    found: dict[str, Hint] = {}
    for kind, form, window in _FORMS:
        if kind in found or (form == _ALONE and found):
            continue
        hint = _hint(headers, kind, form, window, wall)
        if hint is not None:
            found[kind] = hint
    return list(found.values())


def _hint(
    headers: Mapping[str, Any], kind: str, form: str, window: float | None, wall: float | None
) -> Hint | None:
    limit, remaining, reset = (headers.get(form.format(what)) for what in ("limit", "remaining", "reset"))
    left, seconds = _number(remaining), window if reset is None else _reset(reset, wall)
    return None if left is None or seconds is None else Hint(kind, _number(limit), left, seconds)


def _reset(value: Any, wall: float | None) -> float | None:
    """Return the seconds in ``6m0s``, ``120ms`` or a number, or until a Unix time or an ISO date."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    here = time.time() if wall is None else wall
    number = _number(text)
    if number is None:
        number = _duration(text)
        if number is None:
            try:
                moment = dt.datetime.fromisoformat(text)
            except ValueError:
                return None
            number = (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp() - here
    elif number > 1e12:
        number = number / 1000 - here  # milliseconds since 1970
    elif number > 1e9:
        number -= here
    return min(max(number, 0.0), _LONGEST)


def _duration(text: str) -> float | None:
    """Return the seconds in a text such as ``6m0s``, or None for another text."""
    parts = _DURATION.findall(text)
    if not parts or "".join(map("".join, parts)) != text:
        return None
    return sum(float(amount) * _UNITS[unit] for amount, unit in parts)


def _number(value: Any) -> float | None:
    """Return a header's value as a number of at least 0; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
