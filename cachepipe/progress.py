"""A progress bar, in terminals and notebooks only."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, Protocol

_WIDTH: Final = 40  # characters of the bar in a notebook
_REFRESH: Final = 0.1  # seconds
_BAR_FROM: Final = 64  # columns of a terminal


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
    from rich.progress import (  # noqa: PLC0415 - likewise
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = _Counts()
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[told]}"),
    ]
    if console.width >= _BAR_FROM:  # in a narrower terminal, the numbers need the space
        columns.insert(1, BarColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, told="")

        def tick_bar(*, cached: bool = False, failed: bool = False) -> None:
            progress.update(task, advance=1, told=counts.added(cached=cached, failed=failed))

        yield tick_bar


@contextlib.contextmanager
def _in_notebook(total: int, label: str) -> Iterator[Tick]:
    """Show a line of text below the cell, which needs no widgets."""
    display: Any = importlib.import_module("IPython.display").display
    counts, lock = _Counts(), threading.Lock()
    shown = 0.0

    def line(told: str) -> dict[str, str]:
        filled = _WIDTH * counts.done // total
        bar = "█" * filled + "░" * (_WIDTH - filled)
        return {"text/plain": f"{label} {bar} {counts.done}/{total}{told and f'  {told}'}"}

    handle = display(line(""), raw=True, display_id=True)

    def tick(*, cached: bool = False, failed: bool = False) -> None:
        nonlocal shown
        with lock:
            told = counts.added(cached=cached, failed=failed)
            now = time.monotonic()
            if now - shown >= _REFRESH or counts.done == total:
                shown = now
                handle.update(line(told), raw=True)

    yield tick


class _Counts:
    """The number done, and how many of them were hits or failed."""

    def __init__(self) -> None:
        self.done = self.cached = self.failed = 0

    def added(self, *, cached: bool, failed: bool) -> str:
        """Count one more; return the numbers of hits and failures in words."""
        self.done += 1
        self.cached += cached
        self.failed += failed
        told = []
        if self.cached:
            told.append(f"{self.cached} hit{'s' * (self.cached != 1)}")
        if self.failed:
            told.append(f"{self.failed} failed")
        return ", ".join(told)
