"""Batch files: requests in, answers out in the same order; a rerun pays for nothing twice.

Each input line is one of OpenAI's batch requests, or an object with ``prompt`` or ``messages``. The file is
read twice: first to find all mistakes before any call is made, then to ask. A line's draw is identified by
its question and its occurrence, the number of earlier lines with the same question. So a rerun replays what
was answered and asks only for the rest, even if lines were inserted, deleted, moved or given other ids.

The results are written to a file beside the output, which replaces the output once it is complete. So the
output is never half a result, and running the same command again continues a run that was killed: what was
paid for is in the cache. An error never replaces a result: if a line fails and the earlier output holds a
result of the same draw, the new output keeps that result.

Memory is bounded: a run holds a few input lines per request in flight, and a digest of each id in a temporary
database on disk.

Every name is imported when it is first used, so that the command line shows its help quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cachepipe.batch.errors import BatchFileError as BatchFileError
    from cachepipe.batch.report import Report as Report
    from cachepipe.batch.runner import run_file as run_file
    from cachepipe.batch.settings import BatchSettings as BatchSettings
    from cachepipe.batch.settings import Stop as Stop

_HOMES: Final = {
    "BatchFileError": "errors",
    "BatchSettings": "settings",
    "Report": "report",
    "Stop": "settings",
    "run_file": "runner",
}

__all__ = ["BatchFileError", "BatchSettings", "Report", "Stop", "run_file"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"cachepipe.batch has no {name!r}; it has {', '.join(_HOMES)}")
    value = getattr(import_module(f"cachepipe.batch.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
