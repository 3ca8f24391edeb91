"""A progress bar, in terminals and notebooks only."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_WIDTH: Final = 40  # characters of the bar in a notebook
_REFRESH: Final = 0.1  # seconds
_EVERY: Final = 100  # items to an update of a count
BAR_FROM: Final = 64
"""The columns of the narrowest terminal with a bar."""


class Tick(Protocol):
    """A function to call when one more is done."""

    def __call__(self, *, cached: bool = False, failed: bool = False) -> None:
        """Count an item that was cached, failed, or neither. Thread-safe."""
        ...


def _silent(*, cached: bool = False, failed: bool = False) -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown(total: int, label: str, *, show: bool = True) -> Iterator[Tick]:
    """Show the number done of a total, the number of hits, and the time left, on standard error.

    Args:
        total: the total number.
        label: a word for the items.
        show: False shows nothing. Outside terminals and notebooks nothing is shown either.
    """
    if not show or not total:
        yield _silent
        return
    from rich.console import Console  # noqa: PLC0415 - only for terminals

    console = Console(stderr=True)
    if console.is_jupyter:
        with _in_notebook(total, label) as tick:
            yield tick
        return
    if not console.is_terminal:
        yield _silent
        return
    with bar() as progress:
        task = progress.add_task(label, total=total, told="")
        yield _Counter(lambda done, told: progress.update(task, completed=done, told=told))


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str, int], None]]:
    """Show what is being done, and how many items are done, on a terminal.

    Returns:
        What is called with both. Outside terminals, nothing is shown.
    """
    from rich.console import Console  # noqa: PLC0415 - only when it is needed

    if not Console(stderr=True).is_terminal:
        yield lambda _doing, _done: None
        return
    with bar(transient=True) as progress:
        task = progress.add_task("reading", total=None, told="")
        last = ("", 0)

        def show(doing: str, done: int) -> None:
            nonlocal last
            if doing != last[0] or done >= last[1] + _EVERY:
                last = doing, done
                progress.update(task, description=doing, completed=done)

        yield show


def bar(*, transient: bool = False) -> Progress:
    """Return a bar on standard error, a terminal. Its tasks have a field ``told``, a text after the numbers.

    Args:
        transient: whether the bar disappears when it is stopped.
    """
    from rich.console import Console  # noqa: PLC0415 - only for terminals
    from rich.progress import (  # noqa: PLC0415 - likewise
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[told]}"),
    ]
    if console.width >= BAR_FROM:  # in a narrower terminal, the numbers need the space
        columns[1:2] = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=transient)


@contextlib.contextmanager
def _in_notebook(total: int, label: str) -> Iterator[Tick]:
    """Show a bar of HTML below the cell, or a line of text where HTML is not shown; it needs no widgets."""
    display: Any = importlib.import_module("IPython.display").display
    shown = 0.0

    def line(done: int, told: str) -> dict[str, str]:
        filled = _WIDTH * done // total
        bar = "█" * filled + "░" * (_WIDTH - filled)
        figures = f"{done}/{total}{told and f'  {told}'}"
        html = f"{escape(label)} <progress value='{done}' max='{total}'></progress> {figures}"
        return {"text/plain": f"{label} {bar} {figures}", "text/html": html}

    handle = display(line(0, ""), raw=True, display_id=True)

    def update(done: int, told: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _REFRESH or done == total:
            shown = now
            handle.update(line(done, told), raw=True)

    yield _Counter(update)


class _Counter:
    """Counts the items that are done, and how many of them were hits or failed.

    Args:
        show: shows the number of items that are done, and the numbers of hits and failures in words.
    """

    def __init__(self, show: Callable[[int, str], object]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._done = self._cached = self._failed = 0

    def __call__(self, *, cached: bool = False, failed: bool = False) -> None:
        """Count an item."""
        with self._lock:
            self._done += 1
            self._cached += cached
            self._failed += failed
            told = []
            if self._cached:
                told.append(f"{self._cached} hit{'s' * (self._cached != 1)}")
            if self._failed:
                told.append(f"{self._failed} failed")
            self._show(self._done, ", ".join(told))
