"""A progress bar for people: in terminals and notebooks, and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Tick(Protocol):
    """Tell that one more is done."""

    def __call__(self, *, cached: bool = False, failed: bool = False) -> None:
        """Count one that was cached, failed, or neither. May be called from any thread."""
        ...


def _silent(*, cached: bool = False, failed: bool = False) -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown(total: int, label: str, *, show: bool = True) -> Iterator[Tick]:
    """Show how many of a total are done, how many were cached, and the time left, on standard error.

    Args:
        total: how many there are.
        label: what they are, in a word.
        show: False shows nothing, as does standard error that is no terminal outside a notebook.
    """
    if not show or not total:
        yield _silent
        return
    from rich.console import Console  # noqa: PLC0415 - only for people

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _silent
        return
    from rich.progress import (  # noqa: PLC0415 - likewise
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = {"cached": 0, "failed": 0}
    told = TextColumn("[dim]{task.fields[told]}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        told,
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, told="")

        def tick(*, cached: bool = False, failed: bool = False) -> None:
            counts["cached"] += cached
            counts["failed"] += failed
            told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            progress.update(task, advance=1, told=told)

        yield tick
