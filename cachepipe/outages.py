"""Unreachable servers: reports each outage once, at its first failure, with the server's URL.

The report goes to the logger ``cachepipe.outages``, and so to standard error if no logging is set up.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

_logger = logging.getLogger(__name__)
_KINDS: Final = frozenset({"APIConnectionError", "TransportError", "ClientConnectionError", "Timeout"})
_UNREACHED: Final = frozenset(
    {
        "ClientConnectorError",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionRefusedError",
        "OSError",
        "gaierror",
    }
)
_ENDINGS: Final = (
    "/chat/completions",
    "/completions",
    "/responses",
    "/embeddings",
    "/moderations",
    "/messages",
)

_down: set[str] = set()
_lock = threading.Lock()


def is_connection_error(error: BaseException | None) -> bool:
    """Return True if a call did not reach the server, or no answer came back in time."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return not _KINDS.isdisjoint(base.__name__ for base in type(error).__mro__)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status code of an adapter's error, whichever library it is from."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):  # the last one is that of google-genai
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 100 <= value < 600:
                return value
    return None


def failed(error: BaseException, url: str = "", *, wait: float | None = None) -> None:
    """Report a call that failed, if it is the first of an outage.

    Args:
        error: its error; only connection errors begin an outage.
        url: the URL of the call; default is the URL in the error.
        wait: seconds until the next attempt, if known.
    """
    if not is_connection_error(error):
        return
    where = public_url(url) or url_of(error)
    with _lock:
        if _origin(where) in _down:
            return
        _down.add(_origin(where))
    server = f"the server at {where}" if where else "the model"
    again = "" if wait is None else f"; the next attempt is in {wait:.1f} s"
    _logger.warning("%s %s: %s%s", server, _trouble(error), _reason(error), again)


def reached(url: str) -> None:
    """Note that a server has answered, so that its next outage is reported."""
    if _down:
        with _lock:
            _down.discard(_origin(public_url(url)))


def explain(error: BaseException) -> None:
    """Add the URL, or what is wrong with it, to the message of an SDK's error."""
    message = getattr(error, "message", None)
    if not isinstance(message, str):
        return
    if is_connection_error(error):
        reason = _reason(error)
        told = f"{message.rstrip('.')}: {url_of(error)} {_trouble(error)}"
        told += "." if reason == message else f" ({reason})."
    elif advice := advice_on(error):
        told = f"{message} {advice}"
    else:
        return
    if url_of(error) not in message:
        error.message = told  # type: ignore[attr-defined]
        error.args = (told, *error.args[1:])


def advice_on(error: BaseException) -> str:
    """Return what is wrong with the URL of a call that got status 404; empty if unknown."""
    if status_of(error) != 404 or "model" in str(getattr(error, "code", None)):
        return ""
    return advice_for(url_of(error))


def advice_for(url: str) -> str:
    """Return what is wrong with the URL of an endpoint that does not exist; empty if unknown."""
    base = url
    for ending in _ENDINGS:
        base = base.removesuffix(ending)
        if base != url:
            break
    again = next((ending for ending in _ENDINGS if base.endswith(ending)), "")
    if again:
        return f"{url} is not there: the base URL must end before {again}."
    if base.endswith("/v1/v1"):
        return f"{url} is not there: leave /v1 out of the base URL, since this client adds it."
    if base != url and not urlsplit(base).path:
        return f"{url} is not there: base URLs usually end in /v1; try {base}/v1."
    return ""


def url_of(error: BaseException) -> str:
    """Return the URL of the failed call, without credentials and query; empty if unknown."""
    try:
        return public_url(str(getattr(getattr(error, "request", None), "url", "")))
    except RuntimeError:  # an error of httpx's that has no request
        return ""


def public_url(url: Any) -> str:
    """Return a URL with its scheme, host, port and path only."""
    parts = urlsplit(str(url))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else ""


def _origin(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and its causes, back to the first one."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _trouble(error: BaseException) -> str:
    """Return what happened to a server, as part of a sentence."""
    kinds = {type(one).__name__ for one in _causes(error)}
    reached = _UNREACHED.isdisjoint(kinds)
    return "has not answered in time, or broke off" if reached else "cannot be reached"


def _reason(error: BaseException) -> str:
    """Return why a connection failed, in the words of the first cause."""
    *_, first = _causes(error)
    if isinstance(first, OSError) and first.errno is not None:
        return os.strerror(first.errno) if first.errno > 0 else str(first.strerror)
    return str(first) or type(first).__name__


class OutageReports:
    """A mixin for an SDK's client class that reports failed attempts which the SDK retries."""

    def _calculate_retry_timeout(self, *arguments: Any, **options: Any) -> float:
        sdk: Any = super()
        wait: float = sdk._calculate_retry_timeout(*arguments, **options)  # noqa: SLF001 - where all SDKs come by
        error = sys.exc_info()[1]
        if error is not None:
            failed(error, wait=wait)
        return wait


@functools.cache
def reporting(kind: type) -> Any:
    """Return a subclass of an SDK's client class that reports outages."""
    return type(kind.__name__, (OutageReports, kind), {})
