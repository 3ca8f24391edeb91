"""The log of a proxy: one line of JSON per request, without keys, headers or queries.

It holds no texts either, except those that the reasons of misses quote if they are asked for.
"""

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

from cachepipe.contract.draws import Claimant
from cachepipe.errors import CachepipeWarning
from cachepipe.proxy.paths import Destination

_DELAY: Final = 0.05  # seconds that lines are gathered
_ERRORS: Final = frozenset({"error", "refused"})
_CALLS: Final = _ERRORS | {"miss", "partial", "passed", "left"}
_LEVELS: Final = {"all": _CALLS | {"hit"}, "calls": _CALLS, "errors": _ERRORS, "off": frozenset[str]()}


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

    def request(
        self,
        outcome: str,
        method: str,
        destination: Destination | None,
        claimant: Claimant,
        status: int,
        begun: float,
        size: int,
        **facts: Any,
    ) -> None:
        """Write the entry of a request that has ended, if the level includes its outcome.

        Args:
            outcome: how it ended.
            method: its method.
            destination: the parts of its path; None if the path is not valid.
            claimant: who draws.
            status: the status of the answer.
            begun: when it began, in seconds of ``time.perf_counter``.
            size: bytes of the answer's body.
            facts: further fields.
        """
        if outcome in self._wanted:
            self._write(
                {
                    "at": round(time.time(), 3),
                    "method": method,
                    "path": None if destination is None else destination.rest,
                    "upstream": None if destination is None else destination.upstream,
                    "namespace": claimant.namespace,
                    "replicate": claimant.replicate,
                    "status": status,
                    "outcome": outcome,
                    "ms": round((time.perf_counter() - begun) * 1000, 1),
                    "bytes": size,
                    **facts,
                }
            )

    def failed(self, what: str, error: BaseException) -> None:
        """Write an internal error: where it was raised, without its message."""
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
        shows = isinstance(error, OSError) or type(error).__module__.startswith("cachepipe")
        says = str(error)[:300] if shows else ""
        self.event("error", what, error=type(error).__name__, says=says, where=where)

    def warned(self, message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """Write a warning of cachepipe, for example that an answer could not be stored; see `warnings`."""
        if not issubclass(category, CachepipeWarning):
            self._other_warning(message, category, *where, **more)
            return
        self.event("warning", str(message)[:500], warning=category.__name__)

    def event(self, level: str, message: str, at: float | None = None, **facts: Any) -> None:
        """Write an entry that belongs to no request."""
        self._write({"at": round(at or time.time(), 3), "level": level, "message": message, **facts})

    def handler(self) -> logging.Handler:
        """Return a handler for the library's own log, for example that an upstream cannot be reached."""
        handler = logging.Handler()
        handler.emit = self._logged  # type: ignore[method-assign]
        return handler

    def _logged(self, record: logging.LogRecord) -> None:
        self.event(record.levelname.lower(), record.getMessage()[:500], record.created)

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
