"""Interleaved rounds of things to time, their medians, and ratios between what one round measured.

A benchmark is a module with ``tables``, an async context manager: it builds what is needed and yields
``Table``s. Each has ``Entry``s, which take turns: A B C, A B C … So what the machine does meanwhile
falls on all of them, and a ratio of two entries is the median of the ratios within the rounds.

Around each timed region, and never in it, an entry prepares its input and checks what came back.

What is measured runs on one core, and the servers that it asks run on the others (``measure_on_one_core``,
``leave_that_core``). A table whose references vary too much is measured again (``steadiest``).
"""

from __future__ import annotations

import datetime as dt
import gc
import importlib.metadata
import inspect
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
NOISY = 0.2
"""A reference whose rounds vary by more than this share makes a table worth measuring again."""

TRIES = 3
"""How often a noisy table is measured at most."""
_CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []

_UNITS = {"µs": 1e6, "ms": 1e3}
_PACKAGES = ("cachepipe", "diskcache", "orjson", "openai")


class WrongAnswer(Exception):  # noqa: N818 - says what it is
    """What came back is not what should have; its time is worth nothing."""


def expect(condition: bool, sentence: str) -> None:
    """Raise ``WrongAnswer`` unless a condition holds; unlike ``assert``, under ``python -O`` too."""
    if not condition:
        raise WrongAnswer(sentence)


def equal(got: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Raise ``WrongAnswer`` unless two sequences are equal; says where they differ first."""
    expect(len(got) == len(wanted), f"{len(got)} results came back where {len(wanted)} were due")
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        expect(one == other, f"result {place} is {one!r:.80} and should be {other!r:.80}")


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        check: tiny sizes, to see that the code works.
        large: the sizes that take long too.
        peers: the other caches to measure in the same run, each in a process of its own environment.
        keep: a folder whose caches are used again, or None.
        size: the number of questions where a benchmark takes it from the caller, or None for its own.
    """

    check: bool = False
    large: bool = False
    peers: tuple[str, ...] = ()
    keep: Path | None = None
    size: int | None = None

    def pick(self, full: int, tiny: int) -> int:
        """Return the size that is wanted."""
        return tiny if self.check else full


Goals = dict[str, float | None]
Role = Literal["floor", "control", "subject", "peer"]


@dataclass(frozen=True)
class Timed:
    """What a call returns that was timed elsewhere, such as in a worker's process."""

    seconds: float
    result: Any


def _nothing(_round: int) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Entry:
    """One thing to time.

    Attributes:
        name: what it is, in a few words; other entries refer to it by that.
        call: what is timed; gets what ``prepare`` returned. A coroutine function is awaited.
        check: gets what ``call`` returned and what ``prepare`` returned; raises ``WrongAnswer``.
        operations: how many operations a call is; times are given per operation.
        role: a floor is what no cache on disk can do without, a control shows one part of the cost,
            a subject is cachepipe, a peer is another cache.
        against: entries of the same table to divide by, with the goal (at most so many times), or None.
        faster: entries of the same table that are divided by this one, with the goal (at least so many
            times), or None; those that are not in the table are left out.
        prepare: called before each round with its number, which no other round has; round 0 warms up.
    """

    name: str
    call: Callable[[Any], Any]
    check: Callable[[Any, Any], Any]
    operations: int = 1
    role: Role = "subject"
    against: Goals = field(default_factory=dict)
    faster: Goals = field(default_factory=dict)
    prepare: Callable[[int], Any] = _nothing


@dataclass(frozen=True)
class Table:
    """Entries that are measured together, and the question that they answer."""

    title: str
    entries: list[Entry]
    unit: Literal["µs", "ms"] = "µs"


@dataclass(frozen=True)
class Count:
    """One thing whose figures are counted, not timed.

    Attributes:
        name: what it is.
        count: returns its figures by column.
        role: as an entry's.
        goals: columns that should be exactly so much; or at most, or at least, so much, as ``("≤", so much)``
            or ``("≥", so much)``; or at most so many times what another row has, as ``(so many, name of the
            row)``.
    """

    name: str
    count: Callable[[], Any]
    role: Role = "subject"
    goals: dict[str, float | tuple[str, float] | tuple[float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """Counts that belong together; each is made once."""

    title: str
    columns: list[str]
    entries: list[Count]


def measure_on_one_core() -> None:
    """Keep this process, and those that it starts, on one core, where the system allows that."""
    _move(os.getpid(), _CORES[:1])


def leave_that_core(pid: int) -> None:
    """Move a process that answers to the cores on which nothing is measured."""
    _move(pid, _CORES[1:])


def use_all_cores(pid: int) -> None:
    """Let a process run on any core, because several such processes are measured together."""
    _move(pid, _CORES)


def _move(pid: int, cores: list[int]) -> None:
    """Bind each thread of a process to cores; with fewer than two cores there is nothing to choose."""
    if len(_CORES) > 1:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


async def counted(tally: Tally) -> dict[str, Any]:
    """Return a tally's figures, as JSON can hold them."""
    figures: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for entry in tally.entries:
        try:
            figures[entry.name] = await _settled(entry.count())
        except (WrongAnswer, RuntimeError) as wrong:
            if entry.role != "peer":
                raise WrongAnswer(f"{entry.name}: {wrong}") from wrong
            failed[entry.name] = str(wrong)
    return {
        "title": tally.title,
        "columns": tally.columns,
        "failed": failed,
        "entries": [
            {
                "name": entry.name,
                "role": entry.role,
                "figures": figures[entry.name],
                "goals": [
                    _reached(column, goal, entry.name, figures) for column, goal in entry.goals.items()
                ],
            }
            for entry in tally.entries
            if entry.name in figures
        ],
    }


def _reached(column: str, goal: Any, name: str, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    value = figures[name][column]
    if isinstance(goal, tuple) and isinstance(goal[0], str):
        sign, bound = goal
        holds = value <= bound if sign == "≤" else value >= bound
        return {"column": column, "goal": bound, "sign": sign, "holds": holds}
    if isinstance(goal, tuple):
        factor, other = goal
        ratio = value / figures[other][column]
        return {
            "column": column,
            "to": other,
            "ratio": round(ratio, 3),
            "goal": factor,
            "holds": ratio <= factor,
        }
    return {"column": column, "goal": goal, "holds": value == goal}


async def once(entry: Entry, number: int) -> float:
    """Run an entry once and check what came back; return the seconds that it took."""
    prepared = await _settled(entry.prepare(number))
    gc.collect()
    start = time.perf_counter()
    result = entry.call(prepared)
    if inspect.isawaitable(result):
        result = await result
    seconds = time.perf_counter() - start
    if isinstance(result, Timed):
        seconds, result = result.seconds, result.result
    try:
        await _settled(entry.check(result, prepared))
    except WrongAnswer as wrong:
        raise WrongAnswer(f"{entry.name}: {wrong}") from wrong
    return seconds


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def steadiest(table: Table, rounds: int) -> dict[str, Any]:
    """Measure a table, and measure it again while it is noisy; return the figures that vary least.

    The figures say how often the table was measured.
    """
    least, seen = float("inf"), 0
    for seen in range(1, TRIES + 1):
        measured = await measure(table, rounds, first=(seen - 1) * (rounds + 1))
        varied = max((entry["spread"] for entry in _references(measured)), default=0.0)
        if varied < least:
            least, steady = varied, measured
        if not noisy(measured):
            break
    return {**steady, "measured": seen}


async def measure(table: Table, rounds: int, first: int = 0) -> dict[str, Any]:
    """Return a table's figures, as JSON can hold them, from so many rounds after one that warms up.

    A peer that fails is left out from then on, and the reason is told. ``first`` is the number of the round
    that warms up.
    """
    times: dict[str, list[float]] = {entry.name: [] for entry in table.entries}
    failed: dict[str, str] = {}
    for number in range(first, first + rounds + 1):
        for entry in table.entries:
            if entry.name in failed:
                continue
            try:
                seconds = await once(entry, number)
            except (WrongAnswer, RuntimeError) as wrong:
                if entry.role != "peer":
                    raise
                failed[entry.name] = str(wrong).removeprefix(f"{entry.name}: ")
                del times[entry.name]
                continue
            if number > first:
                times[entry.name].append(seconds / entry.operations * _UNITS[table.unit])
    return {
        "title": table.title,
        "unit": table.unit,
        "failed": failed,
        "entries": [
            {
                "name": entry.name,
                "role": entry.role,
                "operations": entry.operations,
                "median": round(statistics.median(times[entry.name]), 3),
                "spread": round(spread(times[entry.name]), 3),
                "ratios": [
                    *(
                        _ratio(times[entry.name], times[other], other, goal)
                        for other, goal in entry.against.items()
                    ),
                    *(
                        _ratio(times[other], times[entry.name], other, goal, least=True)
                        for other, goal in entry.faster.items()
                        if other in times
                    ),
                ],
                "rounds": [round(value, 3) for value in times[entry.name]],
            }
            for entry in table.entries
            if entry.name in times
        ],
    }


def _ratio(
    one: list[float], other: list[float], name: str, goal: float | None, *, least: bool = False
) -> dict[str, Any]:
    ratio = statistics.median(mine / theirs for mine, theirs in zip(one, other, strict=True))
    return {
        "to": name,
        "kind": "times faster" if least else "times",
        "ratio": round(ratio, 3),
        "goal": goal,
        "holds": None if goal is None else ratio >= goal if least else ratio <= goal,
    }


def spread(times: Sequence[float]) -> float:
    """Return how far apart the rounds are but for the best and worst tenth, as a share of their median."""
    if len(times) < 2:
        return 0.0
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(times)


def noisy(measured: dict[str, Any]) -> list[str]:
    """Return the entries that others are divided by and whose rounds varied too much."""
    return [entry["name"] for entry in _references(measured) if entry["spread"] > NOISY]


def _references(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries by which other entries of a table are divided; for a tally, no entries."""
    if "columns" in measured:
        return []
    used = {ratio["to"] for entry in measured["entries"] for ratio in entry["ratios"]}
    return [entry for entry in measured["entries"] if entry["name"] in used]


def machine() -> dict[str, Any]:
    """Return what somebody who reads the figures later wants to know of where they come from."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "sqlite": sqlite3.sqlite_version,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _commit() -> str | None:
    try:
        told = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
