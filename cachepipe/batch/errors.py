"""Errors of a run: those that prevent it, and what a result says about a failed request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import unquote

from cachepipe import jsontext, outages
from cachepipe.errors import (
    BadAnswer,
    BudgetExceeded,
    CacheMiss,
    CachepipeError,
    ShortAnswer,
    StoreError,
    UnkeyableValue,
    UnknownCost,
)

_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ShortAnswer, "short_answer"),
    (BadAnswer, "bad_answer"),
    (StoreError, "store_error"),
    (UnkeyableValue, "bad_request"),
    (BudgetExceeded, "budget_exceeded"),
    (UnknownCost, "unknown_cost"),
)
_NAMES: Final = (("Timeout", "timeout"), ("Connection", "connection_error"))  # of classes of other packages
_SHORTEST: Final = 6  # characters of a credential that is worth hiding


class BatchFileError(CachepipeError):
    """An input that cannot be run, or an output that cannot be written; nothing was asked."""


def described(error: BaseException) -> tuple[str, str, dict[str, Any] | None]:
    """Return an error's code, its message, and the response if the provider sent one."""
    message = _writable(str(error)) or type(error).__name__
    status, answer = outages.status_of(error), getattr(error, "response", None)
    if status is not None and answer is not None:
        return _refusal(error, status, answer, message)
    if isinstance(error, CacheMiss):
        return "cache_miss", f"{error.reason}.", None
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, message, None
    if (cause := str(error.__cause__ or "")) and not outages.is_connection_error(error):
        message = f"{message} {_writable(cause)}"
    name = type(error).__name__
    return next((code for part, code in _NAMES if part in name), name), message, None


def _refusal(
    error: BaseException, status: int, answer: Any, message: str
) -> tuple[str, str, dict[str, Any] | None]:
    """Return what `described` does, for a response of the provider with an error status."""
    try:
        body = jsontext.read(answer.content)
    except ValueError:
        body = answer.text
    inner = body.get("error") if isinstance(body, dict) else None
    code = None
    if isinstance(inner, dict):
        code = inner.get("code") or inner.get("type")
        code = inner.get("status", code) if isinstance(code, int) else code  # Google's name of the status
        if isinstance(inner.get("message"), str):
            message = f"{inner['message']} {outages.advice_on(error)}".rstrip()
    response = {
        "status_code": status,
        "request_id": answer.headers.get("x-request-id", ""),
        "body": jsontext.shown(body),
    }
    return str(code or f"http_{status}"), message, response


def _writable(text: str) -> str:
    """Return a text that UTF-8 can encode; a path, for example, may contain bytes that are not text."""
    return text.encode(errors="backslashreplace").decode()


class Secrets:
    """Credentials that must never be written or shown: keys, and the credentials in URLs.

    Args:
        urls: URLs that may contain credentials.
        keys: API keys.
        shortest: the length in characters from which on a credential is hidden.
    """

    def __init__(
        self, urls: Sequence[str | None], keys: Sequence[str | None], *, shortest: int = _SHORTEST
    ) -> None:
        found = {key for key in keys if isinstance(key, str)}
        for url in urls:
            credentials = (url or "").rpartition("@")[0].rpartition("//")[2]
            found |= {f"{credentials}@", *credentials.split(":", 1)}
        found |= {unquote(secret) for secret in found}
        self._found = sorted((secret for secret in found if len(secret) >= shortest), key=len, reverse=True)

    def hidden(self, value: Any) -> Any:
        """Return a JSON value with asterisks for each credential in its texts; numbers stay as they are."""
        if isinstance(value, str):
            for secret in self._found:
                value = value.replace(secret, "***")
        elif isinstance(value, list):
            return [self.hidden(item) for item in value]
        elif isinstance(value, dict):
            return {self.hidden(name): self.hidden(item) for name, item in value.items()}
        return value
