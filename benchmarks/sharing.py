"""How fast are ``export``, ``import``, ``sync`` and ``verify``, and does their memory grow with the cache?

A cache holds questions of 1 KB, each with one answer of 1 KB and one draw, 10,000 against 200,000. Each
operation is a process of its own: its figures are the samples per second of its processor time, threads
included, and the peak of what is resident. An import is measured into an empty cache, and again into the
cache that has it all. A sync copies to an empty cache, and again.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks import data
from benchmarks.harness import Count, Sizes, Tally, expect
from benchmarks.memory import fill, peak_of
from cachepipe import export, import_, sync
from cachepipe.stores.verify import verify

_URL = "http://127.0.0.1:1/v1"  # nobody calls it
_STEPS = ("export", "import", "import again", "sync", "sync again", "verify")
_GOALS = {"export": 10_000, "import": 10_000, "verify": 20_000}  # samples per second


def _step(name: str, folder: Path) -> int:
    """Do one step; return how many samples it handled."""
    cache, bundle = folder / "cache", folder / "cache.cachepipe"
    steps: dict[str, Callable[[], int]] = {
        "export": lambda: export(cache, bundle).counts["samples"],
        "import": lambda: import_(bundle, folder / "imported").samples,
        "import again": lambda: import_(bundle, folder / "imported").same,
        "sync": lambda: sync(cache, folder / "synced")[1].samples,
        "sync again": lambda: sync(cache, folder / "synced")[1].same,
        "verify": lambda: _verified(folder / "imported"),
    }
    return steps[name]()


def _verified(cache: Path) -> int:
    report = verify(cache)
    expect(report.whole, f"verify found {[*report.problems]}")
    return report.counts["samples"]


def _measure(name: str, folder: Path) -> None:
    """Do one step, then print how many samples it handled, and the seconds of processor time."""
    begun = time.process_time()
    samples = _step(name, folder)
    print(orjson.dumps([samples, time.process_time() - begun]).decode())


def _lines(number: int) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the lines of a batch file of so many different questions, each with its answer."""
    for each in range(number):
        line = {"custom_id": str(each), "prompt": data.text(f"question {each}:", 900)}
        yield orjson.dumps(line), orjson.dumps(data.text(f"answer {each}:"))


class _Caches:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def figures(self, name: str, samples: int) -> dict[str, float]:
        """Return the figures of a step; the steps before it have been done."""
        folder = self._folder / str(samples)
        if not folder.exists():
            folder.mkdir()
            await fill(folder / "cache", _lines(samples), _URL)
        told, most = peak_of([sys.executable, "-m", "benchmarks.sharing", name, str(folder)])
        handled, seconds = orjson.loads(told)
        expect(handled == samples, f"{name} handled {handled} of {samples} samples")
        return {"peak, MB": round(most, 1), "samples/s": round(samples / seconds)}


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield a tally of each step."""
    caches = _Caches(folder)
    few, many = sizes.pick(10_000, 100), sizes.pick(200_000, 200)
    yield [
        Tally(name, ["peak, MB", "samples/s"], [*_pair(caches, name, few, many, check=sizes.check)])
        for name in _STEPS
    ]


def _pair(caches: _Caches, name: str, few: int, many: int, *, check: bool) -> Iterator[Count]:
    """Yield a small and a large cache; the large one should need little more memory, and be as fast."""
    yield Count(f"{few:,} samples", lambda: caches.figures(name, few), "control")
    goals: dict[str, Any] = {} if check else {"peak, MB": (1.5, f"{few:,} samples")}
    if goals and name in _GOALS:
        goals["samples/s"] = ("≥", _GOALS[name])
    yield Count(f"{many:,} samples", lambda: caches.figures(name, many), "subject", goals)


if __name__ == "__main__":
    _measure(sys.argv[1], Path(sys.argv[2]))
