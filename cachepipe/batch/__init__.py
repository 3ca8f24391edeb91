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

from typing import TYPE_CHECKING, Final

from cachepipe import lazy

if TYPE_CHECKING:
    from cachepipe.batch.errors import BatchFileError as BatchFileError
    from cachepipe.batch.explanation import Explanation as Explanation
    from cachepipe.batch.explanation import explain_request as explain_request
    from cachepipe.batch.plan import Plan as Plan
    from cachepipe.batch.planner import plan_file as plan_file
    from cachepipe.batch.report import Report as Report
    from cachepipe.batch.runner import run_file as run_file
    from cachepipe.batch.settings import BatchSettings as BatchSettings
    from cachepipe.batch.settings import Stop as Stop

_HOMES: Final = {
    "BatchFileError": "cachepipe.batch.errors",
    "BatchSettings": "cachepipe.batch.settings",
    "Explanation": "cachepipe.batch.explanation",
    "Plan": "cachepipe.batch.plan",
    "Report": "cachepipe.batch.report",
    "Stop": "cachepipe.batch.settings",
    "explain_request": "cachepipe.batch.explanation",
    "plan_file": "cachepipe.batch.planner",
    "run_file": "cachepipe.batch.runner",
}

__all__ = [
    "BatchFileError",
    "BatchSettings",
    "Explanation",
    "Plan",
    "Report",
    "Stop",
    "explain_request",
    "plan_file",
    "run_file",
]

if not TYPE_CHECKING:  # else type checkers would take any name for one of the package
    __getattr__, __dir__ = lazy.names(__name__, _HOMES)
