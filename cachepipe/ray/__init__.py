"""Ray: a stage for Ray Data, and a pool of actors, whose workers share one cache.

The id of a row or request says which draw it is, wherever and however often it is asked. So a task that Ray
repeats on another node, or a second pass over data in another order, gets the same samples.

Every name is imported when it is first used; all but the settings need Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cachepipe import lazy

if TYPE_CHECKING:
    from cachepipe.ray.data import Stage as Stage
    from cachepipe.ray.data import ask as ask
    from cachepipe.ray.pool import Pool as Pool
    from cachepipe.ray.pool import RequestError as RequestError
    from cachepipe.ray.rows import Rows as Rows
    from cachepipe.ray.settings import RaySettings as RaySettings
    from cachepipe.ray.totals import Summary as Summary
    from cachepipe.ray.totals import summary as summary

_HOMES: Final = {
    "Pool": "cachepipe.ray.pool",
    "RaySettings": "cachepipe.ray.settings",
    "RequestError": "cachepipe.ray.pool",
    "Rows": "cachepipe.ray.rows",
    "Stage": "cachepipe.ray.data",
    "Summary": "cachepipe.ray.totals",
    "ask": "cachepipe.ray.data",
    "summary": "cachepipe.ray.totals",
}

__all__ = ["Pool", "RaySettings", "RequestError", "Rows", "Stage", "Summary", "ask", "summary"]

if not TYPE_CHECKING:  # else type checkers would take any name for one of the package
    __getattr__, __dir__ = lazy.names(__name__, _HOMES)
