"""Tables of HTML for notebooks. All text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from cachepipe import terminal


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Return a table of values; None is an empty cell, and the first of each row is a heading.

    Args:
        rows: the rows.
        head: the headings of the columns.
    """
    top = "".join(f"<th>{_shown(name)}</th>" for name in head)
    lines = [
        (f"<th>{_shown(first)}</th>", *(f"<td>{_shown(value)}</td>" for value in rest))
        for first, *rest in rows
    ]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f"<table>{top and f'<thead><tr>{top}</tr></thead>'}<tbody>{body}</tbody></table>"


def figures(counts: Iterable[tuple[str, float]]) -> str:
    """Return a table of figures by name."""
    return table((name.replace("_", " "), value) for name, value in counts)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return escape(terminal.visible(text, lines=True)).replace("\n", "<br>")
