"""How fast are ``export``, ``import``, ``sync``, ``verify`` and ``plan``, and does their memory grow?

A cache holds different questions of 1 KB, each with one answer of 1 KB and one draw: 200,000 (or ``--size``)
against a twentieth of it. Each step is a process of its own. Its figures are the questions per second on the
clock and of its processor time, threads included, and the peak of what is resident. The clock includes the
waits for the disk, and for a processor on a machine that others use too.

An import is measured into an empty cache, and again into the cache that has it all. A sync copies to an empty
cache, and again; these two and the second import handle a quarter of the questions. A plan reads a batch file
with all questions, the first half of which another cache has answered.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks import data
from benchmarks.harness import Count, Sizes, Tally, expect, use_all_cores
from benchmarks.memory import MODEL, NAMESPACE, SCOPE, fill, peak_of
from cachepipe import export, import_, sync
from cachepipe.batch import plan_file
from cachepipe.stores.verify import verify

_URL = "http://127.0.0.1:1/v1"  # nobody calls it
_STEPS = ("export", "import", "verify", "plan", "import again", "sync", "sync again")
_QUARTER = ("import again", "sync", "sync again")
_GOALS = {"export": 10_000, "import": 10_000, "verify": 20_000, "plan": 200_000 / 60}  # questions per second
_MADE = {"import": ("imported",), "sync": ("synced",)}
_COLUMNS = ["peak, MB", "a second", "a second of processor"]


def _step(name: str, folder: Path) -> int:
    """Do one step; return how many samples it handled."""
    cache, bundle = folder / "cache", folder / "cache.cachepipe"
    steps: dict[str, Callable[[], int]] = {
        "export": lambda: export(cache, bundle, overwrite=True).counts["samples"],
        "import": lambda: import_(bundle, folder / "imported").samples,
        "import again": lambda: import_(bundle, folder / "imported").same,
        "sync": lambda: sync(cache, folder / "synced")[1].samples,
        "sync again": lambda: sync(cache, folder / "synced")[1].same,
        "verify": lambda: _verified(folder / "imported"),
        "plan": lambda: _planned(folder),
    }
    return steps[name]()


def _verified(cache: Path) -> int:
    report = verify(cache)
    expect(report.whole, f"verify found {[*report.problems]}")
    return report.counts["samples"]


def _planned(folder: Path) -> int:
    plan = plan_file(
        folder / "in.jsonl",
        model=MODEL,
        base_url=_URL,
        cache=folder / "half",
        namespace=NAMESPACE,
        scope=SCOPE,
    )
    expect(plan.to_buy == plan.requests - plan.requests // 2, f"{plan.to_buy} samples are to buy")
    return plan.requests


def _measure(name: str, folder: Path) -> None:
    """Do one step; print how many questions it handled, and the seconds on the clock and of processor."""
    begun = time.perf_counter(), time.process_time()
    handled = _step(name, folder)
    seconds = time.perf_counter() - begun[0], time.process_time() - begun[1]
    print(orjson.dumps([handled, *seconds]).decode())


def _lines(number: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the lines of a batch file of so many different questions, each with its answer."""
    for each in range(number):
        line = {"custom_id": str(each), "prompt": data.text(f"question {each}:", 900)}
        yield orjson.dumps(line), orjson.dumps(data.text(f"answer {each}:"))


async def _filled(cache: Path, questions: int) -> None:
    """Make a cache that has answered so many questions, unless it is there."""
    done = cache.with_suffix(".filled")
    if not done.exists():
        shutil.rmtree(cache, ignore_errors=True)
        await fill(cache, _lines(questions), _URL)
        done.touch()


class _Caches:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def figures(self, name: str, questions: int) -> dict[str, float]:
        """Return the figures of a step; the steps before it have been done."""
        folder = self._folder / str(questions)
        await _filled(folder / "cache", questions)
        if name == "plan":
            await _filled(folder / "half", questions // 2)
            with (folder / "in.jsonl").open("wb") as file:
                file.writelines(b"%b\n" % line for line, _ in _lines(questions))
        for left in _MADE.get(name, ()):  # by a run before, whose caches are used again
            shutil.rmtree(folder / left, ignore_errors=True)
        if name in _QUARTER and not (folder / "imported").exists():
            for before in ("export", "import"):
                _step(before, folder)
        told, most = peak_of([sys.executable, "-m", "benchmarks.sharing", name, str(folder)])
        handled, wall, processor = orjson.loads(told)
        expect(handled == questions, f"{name} handled {handled} of {questions} questions")
        return dict(
            zip(_COLUMNS, (round(most, 1), round(handled / wall), round(handled / processor)), strict=True)
        )


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield a tally of each step. The steps may use several threads, and so all cores."""
    use_all_cores(os.getpid())
    caches = _Caches(folder if sizes.keep is None or sizes.check else sizes.keep / "sharing")
    many = sizes.pick(sizes.size or 200_000, 400)
    yield [
        Tally(
            name, _COLUMNS, [*_pair(caches, name, many // 20, many // 4 if name in _QUARTER else many, sizes)]
        )
        for name in _STEPS
    ]


def _pair(caches: _Caches, name: str, few: int, many: int, sizes: Sizes) -> Iterator[Count]:
    """Yield a small and a large cache; the large one should need little more memory."""
    yield Count(f"{few:,} questions", lambda: caches.figures(name, few), "control")
    goals: dict[str, Any] = {} if sizes.check else {"peak, MB": (1.5, f"{few:,} questions")}
    if goals and name in _GOALS:
        goals["a second"] = ("≥", round(_GOALS[name]))
    yield Count(f"{many:,} questions", lambda: caches.figures(name, many), "subject", goals)


if __name__ == "__main__":
    _measure(sys.argv[1], Path(sys.argv[2]))
