"""Run all benchmarks or some: ``python -m benchmarks [names…] [--rounds N] [--json FILE] [--check]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import NOISY, Sizes, WrongAnswer, machine, measure, noisy, once

NAMES = ("hit", "miss", "growth", "imports")
_COLUMNS = ("", "role", "median", "spread", "against", "times", "goal")


def main() -> int:
    """Return the exit code: 1 when a wrong answer came back."""
    options = _options()
    names = list(dict.fromkeys(options.names)) or list(NAMES)
    try:
        if options.check:
            asyncio.run(_check(names))
        else:
            asyncio.run(_measure(names, options))
    except WrongAnswer as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure cachepipe against floors of the same run."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="rounds after the warm-up (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--large", action="store_true", help="measure the sizes that take long, too")
    parser.add_argument("--check", action="store_true", help="run each once, tiny, without timing")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.rounds < 1:
        parser.error(f"--rounds is at least 1; got {options.rounds}")
    return options


async def _check(names: list[str]) -> None:
    for name in names:
        with _folder() as folder:
            async with importlib.import_module(f"benchmarks.{name}").tables(
                Sizes(check=True), folder
            ) as tables:
                entries = [entry for table in tables for entry in table.entries]
                for entry in entries:
                    await once(entry, 0)
        print(f"{name}: the answers of {len(entries)} entries are right")


async def _measure(names: list[str], options: argparse.Namespace) -> None:
    notes = machine()
    figures: dict[str, Any] = {"machine": notes, "rounds": options.rounds, "benchmarks": {}}
    versions = ", ".join(f"{name} {version}" for name, version in notes["versions"].items())
    print(
        f"{notes['date']} · {notes['python']} · {notes['cpus']} CPUs, {notes['cpu']} · "
        f"load {notes['load']} · SQLite {notes['sqlite']} · {versions} · {options.rounds} rounds"
    )
    for name in names:
        with _folder() as folder:
            module = importlib.import_module(f"benchmarks.{name}")
            async with module.tables(Sizes(large=options.large), folder) as tables:
                for table in tables:
                    measured = await measure(table, options.rounds)
                    figures["benchmarks"].setdefault(name, []).append(measured)
                    _print(name, measured)
    if options.json is not None:
        options.json.write_text(_dumped(figures), encoding="utf-8")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cachepipe-benchmark-") as folder:
        yield Path(folder)


def _dumped(figures: dict[str, Any]) -> str:
    """Return JSON whose lists of numbers take one line each."""
    import re  # noqa: PLC0415 - only for files

    written = json.dumps(figures, indent=1, ensure_ascii=False)
    return re.sub(r"\[[\d\s.,]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", written) + "\n"


# Tables.


def _rows(measured: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for entry in measured["entries"]:
        figures = (
            entry["name"],
            entry["role"],
            f"{entry['median']:,.1f} {measured['unit']}",
            f"{entry['spread']:.0%}",
        )
        for ratio in entry["ratios"] or [None]:
            yield (*figures, *_compared(ratio))
            figures = ("", "", "", "")


def _compared(ratio: dict[str, Any] | None) -> tuple[str, str, str]:
    if ratio is None:
        return "", "", ""
    if ratio["goal"] is None:
        return ratio["to"], f"{ratio['ratio']:.2f}", ""
    return (
        ratio["to"],
        f"{ratio['ratio']:.2f}",
        f"≤ {ratio['goal']:g}: {'holds' if ratio['holds'] else 'missed'}",
    )


def _print(name: str, measured: dict[str, Any]) -> None:
    title = f"{name}: {measured['title']}"
    if sys.stdout.isatty():
        _print_rich(title, measured)
    else:
        rows = [_COLUMNS, *_rows(measured)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        print(f"\n{title}\n")
        for row in rows:
            cells = [
                cell.rjust(width) if column in (2, 3, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
    for reference in noisy(measured):
        print(f"noisy: the rounds of {reference!r} vary by more than {NOISY:.0%}; measure again")


def _print_rich(title: str, measured: dict[str, Any]) -> None:
    import rich.table  # noqa: PLC0415 - only on a terminal
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = rich.table.Table(title=title, title_justify="left")
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if place in (2, 3, 5) else "left")
    for row in _rows(measured):
        style = "red" if row[-1].endswith("missed") else "green" if row[-1].endswith("holds") else ""
        table.add_row(*row[:-1], Text(row[-1], style))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
