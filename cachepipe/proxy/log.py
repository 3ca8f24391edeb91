"""The log of a proxy: one line of JSON per request, without keys, headers, queries or texts."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from cachepipe.errors import CachepipeWarning
from cachepipe.proxy.http_exchange import HttpExchange
from cachepipe.proxy.paths import Destination

_DELAY: Final = 0.05  # seconds that lines are gathered
_LEVELS: Final = {
    "all": frozenset({"hit", "miss", "partial", "passed", "left", "error", "refused"}),
    "calls": frozenset({"miss", "partial", "passed", "left", "error", "refused"}),
    "errors": frozenset({"error", "refused"}),
    "off": frozenset[str](),
}


class RequestLog:
    """Writes the log entries of requests.

    Args:
        level: which entries to write: ``"all"``, ``"calls"``, ``"errors"`` or ``"off"``.
        write: takes each entry; None for lines on standard error.
    """

    def __init__(self, level: str, write: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._wanted = _LEVELS[level]
        self._write = write if write is not None else self._gather
        self._lines: list[bytes] = []
        self._other_warning: Callable[..., None] = warnings.showwarning

    @staticmethod
    def seconds(http: HttpExchange) -> float:
        """Return how long a request has taken so far."""
        return time.perf_counter() - http.begun

    def request(
        self, http: HttpExchange, destination: Destination | None, namespace: str | None, outcome: str
    ) -> None:
        """Write the entry of a request that has ended."""
        if outcome not in self._wanted:
            return
        self._write(
            {
                "at": round(time.time(), 3),
                "method": http.method,
                "path": destination.rest if destination is not None else None,
                "upstream": destination.upstream if destination is not None else None,
                "namespace": namespace,
                "status": http.status,
                "outcome": outcome,
                "ms": round(self.seconds(http) * 1000, 1),
                "bytes": http.sent,
                **http.facts,
            }
        )

    def hit(self, destination: Destination, namespace: str | None, key: str, size: int, begun: float) -> None:
        """Write the entry of a request that was answered at once."""
        if "hit" not in self._wanted:
            return
        self._write(
            {
                "at": round(time.time(), 3),
                "method": "POST",
                "path": destination.rest,
                "upstream": destination.upstream,
                "namespace": namespace,
                "status": 200,
                "outcome": "hit",
                "ms": round((time.perf_counter() - begun) * 1000, 1),
                "bytes": size,
                "key": key,
            }
        )

    def failed(self, what: str, error: BaseException) -> None:
        """Write an internal error: where it was raised, without its message."""
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
        message = (
            str(error)[:300]
            if isinstance(error, OSError) or type(error).__module__.startswith("cachepipe")
            else ""
        )
        self._write(
            {
                "at": round(time.time(), 3),
                "level": "error",
                "message": what,
                "error": type(error).__name__,
                "says": message,
                "where": where,
            }
        )

    def warned(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """Write a warning of cachepipe, for example that an answer could not be stored; see `warnings`."""
        if not issubclass(category, CachepipeWarning):
            self._other_warning(message, category, *where, **more)
            return
        self._write(
            {
                "at": round(time.time(), 3),
                "level": "warning",
                "message": str(message)[:500],
                "warning": category.__name__,
            }
        )

    def handler(self) -> logging.Handler:
        """Return a handler for the library's own log, for example that an upstream cannot be reached."""
        handler = logging.Handler()
        handler.emit = self._logged  # type: ignore[method-assign]
        return handler

    def _logged(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        self._write({"at": round(record.created, 3), "level": level, "message": record.getMessage()[:500]})

    def _gather(self, event: Mapping[str, Any]) -> None:
        self._lines.append(orjson.dumps(event, default=repr, option=orjson.OPT_APPEND_NEWLINE))
        if len(self._lines) == 1:
            try:
                asyncio.get_running_loop().call_later(_DELAY, self.flush)
            except RuntimeError:
                self.flush()

    def flush(self) -> None:
        """Write the collected lines."""
        lines, self._lines = self._lines, []
        if lines:
            sys.stderr.write(b"".join(lines).decode(errors="replace"))
            sys.stderr.flush()
