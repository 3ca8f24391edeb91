"""The goals of earlier runs as a table for the README, and how far the ratios of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import noisy

APART = 1.2
"""Ratios of two runs that differ by more than this factor do not agree."""

_BEGIN, _END = "<!-- goals -->\n", "<!-- end of goals -->\n"


def newest(results: Path) -> Path:
    """Return the newest file of results in a folder.

    Raises:
        SystemExit: the folder has none.
    """
    paths = sorted(results.glob("*.json"))
    if not paths:
        raise SystemExit("there are no results; run `python -m benchmarks --json` first")
    return paths[-1]


def write_goals(results: Path, readme: Path) -> str:
    """Write the table of goals of the newest results between its marks in a README; return how many hold.

    Raises:
        SystemExit: there are no results.
    """
    path = newest(results)
    figures = json.loads(path.read_text(encoding="utf-8"))
    rows = [*_goals(figures["benchmarks"])]
    before, _, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    readme.write_text(f"{before}{_BEGIN}{goals(figures, path.name)}{_END}{after}", encoding="utf-8")
    return f"{sum(row[-1] for row in rows)} of {len(rows)} goals hold, by {path.name}"


def goals(figures: dict[str, Any], name: str) -> str:
    """Return the goals of a run as Markdown, with the machine that they were measured on."""
    machine = figures["machine"]
    rows = [*_goals(figures["benchmarks"])]
    lines = [
        "",
        f"[`results/{name}`](results/{name}): {machine['date']}, {machine['python']}, {machine['cpus']} CPUs",
        f"({machine['cpu']}), SQLite {machine['sqlite']}, {figures['rounds']} rounds,",
        f"commit {machine['commit']}, load {machine['load']} at the start.",
        f"{sum(row[-1] for row in rows)} of {len(rows)} goals hold. A tilde marks the tables that are noisy.",
        "",
        "| goal | entry | figure | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {goal} | {entry} | {figure} | {'holds' if holds else '**missed**'} |"
        for goal, entry, figure, holds in rows
    ]
    return "\n".join([*lines, "", ""])


def _goals(benchmarks: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each goal, the entry that it is for, the figure that was measured, and whether the goal holds."""
    for name, tables in benchmarks.items():
        for table in tables:
            title = f"`{name}`, {table['title']}{' ~' if noisy(table) else ''}"
            medians = {each["name"]: each.get("median") for each in table["entries"]}
            for entry in table["entries"]:
                for goal in entry.get("goals", []):
                    yield f"{title}: {_count_bound(goal)}", entry["name"], _count(entry, goal), goal["holds"]
                for ratio in entry.get("ratios", []):
                    if ratio["goal"] is not None:
                        times = f"{entry['median']:,.4g} and {medians[ratio['to']]:,.4g} {table['unit']}"
                        figure = f"{ratio['ratio']:.2f} ({times})"
                        yield f"{title}: {_ratio_bound(ratio)}", entry["name"], figure, ratio["holds"]


def _ratio_bound(ratio: dict[str, Any]) -> str:
    if ratio["kind"] == "times faster":
        return f"≥ {ratio['goal']:g} x faster than {ratio['to']}"
    return f"≤ {ratio['goal']:g} x {ratio['to']}"


def _count_bound(goal: dict[str, Any]) -> str:
    if "to" in goal:
        return f"{goal['column']} ≤ {goal['goal']:g} x {goal['to']}"
    return f"{goal['column']} {goal.get('sign', '=')} {goal['goal']:,g}"


def _count(entry: dict[str, Any], goal: dict[str, Any]) -> str:
    figure = f"{entry['figures'][goal['column']]:,}"
    return f"{goal['ratio']:.2f} ({figure})" if "to" in goal else figure


@dataclass(frozen=True)
class _Ratio:
    """A ratio that was measured, and whether its table was noisy."""

    value: float
    noisy: bool


def compare(one: Path, other: Path) -> int:
    """Print the ratios that two runs do not agree on; return the exit code: 1 when there are any."""
    first, second = (_ratios(json.loads(path.read_text(encoding="utf-8"))) for path in (one, other))
    shared = [*(first.keys() & second.keys())]
    apart = sorted(
        (max(first[key].value, second[key].value) / min(first[key].value, second[key].value), key)
        for key in shared
        if min(first[key].value, second[key].value) > 0
    )[::-1]
    for factor, key in apart:
        if factor > APART:
            marked = " ~" if first[key].noisy or second[key].noisy else ""
            values = f"{first[key].value:8.2f} {second[key].value:8.2f}"
            print(f"{values}  x {factor:.2f}{marked}  {' · '.join(key)}")
    disagree = sum(factor > APART for factor, _ in apart)
    print(f"{len(shared) - disagree} of {len(shared)} ratios agree within a fifth")
    return 1 if disagree else 0


def _ratios(figures: dict[str, Any]) -> dict[tuple[str, ...], _Ratio]:
    return {
        (name, table["title"], entry["name"], ratio["to"]): _Ratio(ratio["ratio"], bool(noisy(table)))
        for name, tables in figures["benchmarks"].items()
        for table in tables
        for entry in table["entries"]
        for ratio in entry.get("ratios", [])
    }
