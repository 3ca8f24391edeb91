"""Run benchmarks, or show what earlier runs found: ``python -m benchmarks [names…] [options]``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from benchmarks import peers, report
from benchmarks.harness import (
    NOISY,
    ROOT,
    Sizes,
    Table,
    WrongAnswer,
    counted,
    machine,
    measure_on_one_core,
    noisy,
    once,
    steadiest,
)

NAMES = (
    "hit",
    "client",
    "miss",
    "ordered",
    "spend",
    "crowd",
    "growth",
    "imports",
    "memory",
    "scale",
    "sharing",
    "proxy",
    "shared",
    "contention",
    "capacity",
)
RESULTS = ROOT / "benchmarks" / "results"
_COLUMNS = ("", "role", "median", "spread", "against", "times", "goal")


def main() -> int:
    """Return the exit code: 1 when a wrong answer came back."""
    options = _options()
    names = list(dict.fromkeys(options.names)) or list(NAMES)
    try:
        if options.plot:
            from benchmarks import plot  # noqa: PLC0415 - draws what there is

            print(plot.draw(RESULTS))
        elif options.goals:
            print(report.write_goals(RESULTS, ROOT / "benchmarks" / "README.md"))
        elif options.compare:
            return report.compare(*options.compare)
        elif options.check:
            asyncio.run(_check(names))
        else:
            measure_on_one_core()
            asyncio.run(_measure(names, options))
    except WrongAnswer as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure cachepipe against floors and peers of the same run."
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="rounds after the warm-up (default 15)")
    parser.add_argument("--peers", action="store_true", help="measure other caches too; installs them")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="write the figures to a file; without a name to results/DATE.json",
    )
    parser.add_argument("--large", action="store_true", help="measure the sizes that take long, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where large caches are made and found")
    parser.add_argument("--size", type=int, help="the questions of sharing (default 200,000; at least 100)")
    parser.add_argument("--check", action="store_true", help="run each once, tiny, without timing")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the committed results")
    parser.add_argument(
        "--goals", action="store_true", help="write the goals of the newest results into benchmarks/README.md"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="compare the ratios of two results; exit with 1 where they differ by more than a fifth",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.size is not None and options.size < 100:
        parser.error(f"--size is at least 100; got {options.size}")
    if options.rounds < 1:
        parser.error(f"--rounds is at least 1; got {options.rounds}")
    return options


def _tables(name: str, sizes: Sizes, folder: Path) -> Any:
    return importlib.import_module(f"benchmarks.{name}").tables(sizes, folder)


async def _check(names: list[str]) -> None:
    for name in names:
        with _folder() as folder:
            async with _tables(name, Sizes(check=True), folder) as tables:
                entries = 0
                for table in tables:
                    entries += len(table.entries)
                    if isinstance(table, Table):
                        for entry in table.entries:
                            await once(entry, 0)
                    else:
                        _exact(await counted(table))
        print(f"{name}: the answers of {entries} entries are right")


def _exact(tallied: dict[str, Any]) -> None:
    """Raise ``WrongAnswer`` when a figure that does not depend on the machine is not what it should be."""
    for entry in tallied["entries"]:
        for goal in entry["goals"]:
            if "to" not in goal and "sign" not in goal and not goal["holds"]:
                column, title = goal["column"], tallied["title"]
                raise WrongAnswer(
                    f"{title}: {column} of {entry['name']} is {entry['figures'][column]} and should be "
                    f"{goal['goal']:g}"
                )


async def _measure(names: list[str], options: argparse.Namespace) -> None:
    notes = machine()
    there, missing = peers.available() if options.peers else ({}, {})
    figures: dict[str, Any] = {
        "machine": notes,
        "rounds": options.rounds,
        "peers": {**there, **{name: f"not installable: {why}" for name, why in missing.items()}},
        "benchmarks": {},
    }
    versions = ", ".join(f"{name} {version}" for name, version in (notes["versions"] | there).items())
    print(
        f"{notes['date']} · {notes['python']} · {notes['cpus']} CPUs, {notes['cpu']} · "
        f"load {notes['load']} · SQLite {notes['sqlite']} · {versions} · {options.rounds} rounds"
    )
    for name, why in missing.items():
        print(f"{name} is not measured; it cannot be installed: {why}")
    sizes = Sizes(large=options.large, peers=tuple(there), keep=options.keep, size=options.size)
    for name in names:
        with _folder() as folder:
            async with _tables(name, sizes, folder) as tables:
                for table in tables:
                    if isinstance(table, Table):
                        measured = await steadiest(table, options.rounds)
                    else:
                        measured = await counted(table)
                    figures["benchmarks"].setdefault(name, []).append(measured)
                    _print(name, measured)
                    if options.json is not None:  # what comes next takes minutes, and may fail
                        _write(options.json, figures)


def _write(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures; for the folder of results, to its file of the day."""
    if path == RESULTS:
        path = RESULTS / f"{figures['machine']['date'].partition(' ')[0]}.json"
    path.write_text(_dumped(figures), encoding="utf-8")
    print(f"\nwritten to {path}", flush=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cachepipe-benchmark-", ignore_cleanup_errors=True) as folder:
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
    faster = ratio["kind"] == "times faster"
    told = f"{ratio['ratio']:.2f}{' x faster' if faster else ''}"
    if ratio["goal"] is None:
        return ratio["to"], told, ""
    sign = "≥" if faster else "≤"
    return ratio["to"], told, f"{sign} {ratio['goal']:g}: {_verdict(ratio)}"


def _verdict(goal: dict[str, Any]) -> str:
    return "holds" if goal["holds"] else "missed"


def _counts(tallied: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for entry in tallied["entries"]:
        figures = entry["figures"]
        cells = [f"{figures[column]:,}" if column in figures else "" for column in tallied["columns"]]
        told = [
            f"{goal['column']} ≤ {goal['goal']:g} x {goal['to']}: {goal['ratio']:.2f}, {_verdict(goal)}"
            if "to" in goal
            else f"{goal['column']} {goal.get('sign', '=')} {goal['goal']:g}: {_verdict(goal)}"
            for goal in entry["goals"]
        ]
        yield (entry["name"], entry["role"], *cells, "; ".join(told))


def _print(name: str, measured: dict[str, Any]) -> None:
    title = f"{name}: {measured['title']}"
    if "columns" in measured:
        columns: tuple[str, ...] = ("", "role", *measured["columns"], "goals")
        rows = list(_counts(measured))
        right = range(2, len(columns) - 1)
    else:
        columns, rows = _COLUMNS, list(_rows(measured))
        right = (2, 3, 5)  # type: ignore[assignment]
    if sys.stdout.isatty():
        _print_rich(title, columns, rows, right)
    else:
        table = [columns, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
        print(f"\n{title}\n")
        for row in table:
            cells = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
    for peer, why in measured["failed"].items():
        print(f"{peer} failed: {why[:200]}")
    for reference in noisy(measured):
        print(
            f"noisy: the rounds of {reference!r} vary by more than {NOISY:.0%}, "
            f"in each of {measured['measured']} measurements"
        )


def _print_rich(
    title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], right: Container[int]
) -> None:
    import rich.table  # noqa: PLC0415 - only on a terminal
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = rich.table.Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place in right else "left")
    for row in rows:
        style = "red" if "missed" in row[-1] else "green" if "holds" in row[-1] else ""
        table.add_row(*row[:-1], Text(row[-1], style))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
