"""Writes what follows from the table of providers and from that of doors: python tests/stubs.py.

These are the stub, for type checkers, of the clients that are made from rows, and the tables of
docs/providers.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import doors

from cachepipe import wire
from cachepipe.providers import presets

_ROOT = Path(__file__).parent.parent
STUB = _ROOT / "cachepipe" / "sdk" / "presets.pyi"
PAGE = _ROOT / "docs" / "providers.md"


def text():
    """What the stub holds."""
    classes = [
        f"class {name}({'AsyncOpenAI' if name.startswith('Async') else 'OpenAI'}): ..."
        for name in sorted(presets.compatible())
    ]
    head = "# Made by tests/stubs.py from the table in cachepipe/providers/presets.py."
    return "\n".join([head, "", "from cachepipe.sdk.openai import AsyncOpenAI, OpenAI", "", *classes, ""])


def page(old):
    """The page of the documentation with the tables of the code."""
    tables = iter((providers(), doors.table()))
    told = re.sub(r"(?:^\|.*\n)+", lambda _: f"{next(tables)}\n", old, flags=re.MULTILINE)
    assert next(tables, None) is None
    return told


def providers():
    """The providers as a table: each with its URL, its key and how many samples it gives in a call."""
    rows = ["| client | base URL | API key | `n` of a call |", "|---|---|---|---|"]
    for row in presets.PRESETS.values():
        most = row.max_n or (wire.MESSAGES if row.protocol == "anthropic" else wire.CHAT).max_n
        needed = "" if row.needs_key else ", if it needs one"
        rows.append(f"| `{row.name}` | `{row.url}` | `{row.key}`{needed} | {most} |")
    return "\n".join(rows)


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
