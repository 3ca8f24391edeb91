"""Draws ``results/peers.svg`` of the newest results that have peers: speed of a hit, and what is paid for."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WIDTH, _NAMES, _BAR, _STEP = 760, 170, 470, 24
_OURS, _THEIRS = "#2563eb", "#94a3b8"
_STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #475569 } .title { font-weight: 600 }"
    " @media (prefers-color-scheme: dark) { text { fill: #cbd5e1 } }"
)


def draw(results: Path) -> Path:
    """Write the plot; return its path.

    Raises:
        SystemExit: when no results have what it shows.
    """
    for path in sorted(results.glob("*.json"), reverse=True):
        figures = json.loads(path.read_text(encoding="utf-8"))
        panels = [*_panels(figures["benchmarks"])]
        if figures.get("peers") and panels:
            drawn = results / "peers.svg"
            drawn.write_text(_svg(panels, path.stem), encoding="utf-8")
            return drawn
    raise SystemExit("no results have peers; run `python -m benchmarks client spend --peers --json` first")


_Panel = tuple[str, list[tuple[str, float, str]]]


def _panels(benchmarks: dict[str, Any]) -> Iterator[_Panel]:
    """Yield a title and (name, value, its text) per bar, for each panel whose table was measured."""
    for table in benchmarks.get("client", []):
        if table["title"].startswith("a known draw, cache just opened, 2 "):
            rates = [
                (entry["name"], 1e6 / entry["median"])
                for entry in table["entries"]
                if entry["role"] in ("peer", "subject")
            ]
            yield (
                "hits per second, one at a time, from disk",
                [(name, rate, f"{rate:,.0f}") for name, rate in rates],
            )
    for table in benchmarks.get("spend", []):
        for start, column, least, title in (
            ("100 prompts x 10 draws", "rerun distinct", 0, "different samples on a rerun of 1,000 draws"),
            ("100 requests for 5", "samples", 0, "samples paid for where 200 are missing"),
            # Who pays for fewer has given the same sample to draws that were to be independent.
            ("4 processes", "samples", 100, "samples paid for by 4 processes that need 100 independent ones"),
        ):
            if table["title"].startswith(start):
                counts = [(entry["name"], entry["figures"][column]) for entry in table["entries"]]
                counts = [(name, count) for name, count in counts if count >= least]
                yield title, [(name, count, f"{count:,}") for name, count in counts]


def _svg(panels: list[_Panel], date: str) -> str:
    lines: list[str] = []
    top = 20
    for title, bars in panels:
        lines.append(f'<text class="title" x="8" y="{top}">{html.escape(title)}</text>')
        top += 10
        most = max(value for _, value, _ in bars) or 1
        for name, value, told in sorted(bars, key=lambda bar: bar[0] != "cachepipe"):
            width = max(value / most * _BAR, 1)
            colour = _OURS if name == "cachepipe" else _THEIRS
            lines += [
                f'<text x="{_NAMES - 8}" y="{top + 14}" text-anchor="end">{html.escape(name)}</text>',
                f'<rect x="{_NAMES}" y="{top + 2}" width="{width:.1f}" height="16" rx="2" fill="{colour}"/>',
                f'<text x="{_NAMES + width + 6:.1f}" y="{top + 14}">{told}</text>',
            ]
            top += _STEP
        top += 30
    lines.append(f'<text x="8" y="{top - 8}">measured {date}; python -m benchmarks --peers</text>')
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" '
        f'viewBox="0 0 {_WIDTH} {top}" role="img">\n<style>{_STYLE}</style>\n{body}\n</svg>\n'
    )
