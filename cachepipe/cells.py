"""Cells of notebooks: what the requests that are made inside a cell have in common.

The extension (`cachepipe.notebook`) begins and ends cells. Without the extension, and outside notebooks, no
cell exists.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any


class Cell:
    """One execution of a cell.

    Args:
        request_id: the default request id inside the cell.
        run: the run of its requests, a `cachepipe.runs.Run`.

    Attributes:
        depth: the number of executions under way: the cell itself, and those that it has started.
    """

    __slots__ = ("depth", "request_id", "run")

    def __init__(self, request_id: str | None, run: Any) -> None:
        self.request_id = request_id
        self.run = run
        self.depth = 1


_own: ContextVar[Cell | None] = ContextVar("cachepipe_cell", default=None)
_executing: Cell | None = None
"""The cell that is being executed: for threads, which do not inherit context variables."""
loaded = False
"""Whether the extension is loaded; if not, requests need not look for a cell."""


def current() -> Cell | None:
    """Return the cell in which this task was started; in a thread, the cell that is being executed."""
    return _own.get() or _executing


def own() -> Cell | None:
    """Return the cell of this context."""
    return _own.get()


def begin(cell: Cell) -> None:
    """Begin a cell in this context; tasks keep the cell in which they were started."""
    global _executing  # noqa: PLW0603 - threads have nothing else in common
    _own.set(cell)
    _executing = cell


def end() -> None:
    """End the cell that is being executed, in this context or in that of a task."""
    global _executing  # noqa: PLW0603 - as above
    _own.set(None)
    _executing = None


def request_id_of(own_id: str | None) -> str | None:
    """Return a request's own id, or the cell's id for a request without one."""
    cell = None if own_id or not loaded else current()
    return own_id if cell is None or cell.request_id is None else cell.request_id


def inputs() -> list[str]:
    """Return the texts that IPython has executed, the current one last; none elsewhere."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)  # never import it here
    shell = get_ipython and get_ipython()
    return list(getattr(shell and shell.history_manager, "input_hist_raw", ()))


def runs_again(since: int) -> bool:
    """Return True if IPython executes a text again, and the extension is not loaded.

    Args:
        since: the number of texts at the beginning of the run.
    """
    *before, text = inputs()[max(since - 1, 0) :] or [""]
    return not loaded and text in before
