"""How much memory do ``cachepipe run`` and a long run take, and does it grow with their length?

``cachepipe run`` is a process of its own; its peak is the resident set that the system counts, with the pages
of the cache's files that are mapped. Lines are prompts of 1 KB whose answers of 1 KB are in the cache, 10,000
against 1,000,000; and misses, which a server on the loopback interface answers at once, 2,000 against 20,000.

A long run draws different questions from one pipeline, each once: new draws of stored samples in a process of
its own. What counts is what is resident at the end, and by how much that grows per draw.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

import cachepipe
from benchmarks import data
from benchmarks.harness import ROOT, Count, Sizes, Tally, expect
from benchmarks.peers import Server
from cachepipe.batch import BatchSettings, run_file
from cachepipe.batch.lines import parse_line
from cachepipe.contract.draws import Draw, label
from cachepipe.models.openai import OpenAIModel
from cachepipe.providers.exchange import questions_of
from cachepipe.stores import DiskStore, MemoryStore
from cachepipe.stores.base import Claim, Commit, new_meta
from cachepipe.typedefs import Request, Response

NAMESPACE, SCOPE, MODEL = "memory", "benchmark", "mock"
_PROMPT = data.text("question", 900)
_GROUP = 100


def _line(number: int) -> bytes:
    """Return a line of a batch file."""
    return orjson.dumps({"custom_id": str(number), "prompt": f"{number}: {_PROMPT}"})


def _write(path: Path, lines: range) -> None:
    with path.open("wb") as file:
        file.writelines(_line(number) + b"\n" for number in lines)


async def fill(folder: Path, lines: Iterable[tuple[bytes, bytes]], base_url: str) -> None:
    """Write what a run of a batch file would have left in a cache, with the store's own verbs.

    Args:
        folder: the folder of the cache.
        lines: the lines of the file, each with the payload of its answer.
        base_url: where the answers come from.
    """
    model = OpenAIModel(MODEL, base_url=base_url, api_key="none")
    settings = BatchSettings(model=MODEL)
    meta = new_meta("benchmark", 1.5, "benchmark", label(NAMESPACE))
    left = iter(lines)
    with contextlib.closing(DiskStore(folder)) as store:
        while some := list(itertools.islice(left, _GROUP)):
            asked = [parse_line(line, number, settings) for number, (line, _) in enumerate(some)]
            questions = [
                questions_of(line.api, line.asks, model.cache_scope, {}, scope=SCOPE)[0] for line in asked
            ]
            claims = [Claim(Draw(label(NAMESPACE), each.key, "", 0), 1, each, "fill") for each in questions]
            await store.apply(claims)
            await store.apply(
                [
                    Commit(each.key, 0, payload, meta)
                    for each, (_, payload) in zip(questions, some, strict=True)
                ]
            )


async def _payload(base_url: str) -> bytes:
    """Return an answer as a run stores it."""
    with tempfile.TemporaryDirectory() as folder:
        source, store = Path(folder) / "in.jsonl", MemoryStore()
        _write(source, range(1))
        await run_file(
            source, Path(folder) / "out.jsonl", model=MODEL, base_url=base_url, api_key="none", cache=store
        )
        [info] = store.keys()
        return next(iter(store.samples(info.key))).payload


_MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(used.ru_maxrss))
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""


def peak_of(command: Sequence[str]) -> tuple[bytes, float]:
    """Return what a process wrote, and its peak of memory in MB.

    A small process starts it: what is resident where a process was started counts for its own peak.
    """
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder) / "peak"
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(figure), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=False,
        )
        expect(done.returncode == 0, f"{command[2]} ended with exit status {done.returncode}")
        peak = int(figure.read_text(encoding="ascii"))
    return done.stdout, peak / (1e6 if sys.platform == "darwin" else 1e3)


class _Runs:
    def __init__(self, folder: Path, keep: Path, server: Server) -> None:
        self.folder, self.keep, self.server = folder, keep, server

    async def _filled(self, lines: int) -> Path:
        """Return the folder of a cache that has answered the first lines."""
        cache = self.keep / f"run-{lines}"
        if not (cache / "filled").exists():
            shutil.rmtree(cache, ignore_errors=True)
            url = self.server.base_url
            payload = await _payload(url)
            await fill(cache, ((_line(number), payload) for number in range(lines)), url)
            (cache / "filled").touch()
        return cache

    async def hits(self, lines: int) -> dict[str, float]:
        cache = await self._filled(lines)
        self.server.reset()
        return self._run(cache, lines, calls=0)

    def misses(self, lines: int) -> dict[str, float]:
        cache = self.folder / f"misses-{lines}"
        self.server.reset()
        figures = self._run(cache, lines, calls=lines)
        shutil.rmtree(cache)
        return figures

    def _command(self, name: str, cache: Path, lines: int, *more: str) -> tuple[Any, float]:
        """Return what a command printed about so many lines, and its peak of memory in MB."""
        source = self.folder / "in.jsonl"
        _write(source, range(lines))
        options = {
            "--cache": str(cache),
            "--namespace": NAMESPACE,
            "--scope": SCOPE,
            "--model": MODEL,
            "--base-url": self.server.base_url,
        }
        words = [word for option in options.items() for word in option]
        told, peak = peak_of(
            [sys.executable, "-m", "cachepipe", name, str(source), *words, "--json", *more],
        )
        return orjson.loads(told), peak

    def _run(self, cache: Path, lines: int, *, calls: int) -> dict[str, float]:
        target = self.folder / "out.jsonl"
        os.environ["CACHEPIPE_BENCHMARK_KEY"] = "none"
        key = ("--api-key-env", "CACHEPIPE_BENCHMARK_KEY")
        report, peak = self._command("run", cache, lines, "--output", str(target), *key, "--quiet")
        expect(
            (report["done"], report["failed"], report["calls"]) == (lines, 0, calls),
            f"of {lines} lines {report['done']} were done in {report['calls']} calls",
        )
        with target.open("rb") as written:
            ids = [orjson.loads(line)["custom_id"] for line in written]
        expect(ids == [*map(str, range(lines))], "the results are not those of the lines, in their order")
        return {"peak, MB": round(peak, 1), "µs a line": round(report["seconds"] / lines * 1e6, 1)}


def _drawn(folder: Path, draws: int) -> dict[str, float]:
    told, peak = peak_of([sys.executable, "-m", "benchmarks.memory", str(folder), str(draws)])
    resident = float(told)
    shutil.rmtree(folder)
    return {"at the end, MB": round(resident, 1), "peak, MB": round(peak, 1)}


class _Answering:
    cache_scope = SCOPE

    async def request(self, request: Request) -> Response:
        return Response([f"answer to {request.prompt}"] * request.n)


async def _draw(folder: str, draws: int) -> None:
    """Draw so many different questions, then print the MB that are resident."""
    async with cachepipe.OnlineAPI(_Answering(), folder) as pipeline:
        for start in range(0, draws, _GROUP):
            numbers = range(start, min(start + _GROUP, draws))
            got = await asyncio.gather(
                *(
                    pipeline.request(Request(f"question {number}", request_id=str(number)))
                    for number in numbers
                )
            )
            wanted = [[f"answer to question {number}"] for number in numbers]
            expect([response.data for response in got] == wanted, "an answer is another question's")
        print(_resident())


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield a tally of runs of files, and one of draws where the system tells what is resident."""
    keep = folder if sizes.keep is None or sizes.check else sizes.keep / "memory"
    keep.mkdir(parents=True, exist_ok=True)
    columns = ["peak, MB", "µs a line"]
    with Server() as server:
        runs = _Runs(folder, keep, server)
        yield [
            Tally(
                "cachepipe run, all lines hits",
                columns,
                [*_pair(runs.hits, "lines", sizes.pick(10_000, 100), sizes.pick(1_000_000, 300), sizes)],
            ),
            Tally(
                "cachepipe run, all lines misses",
                columns,
                [*_pair(runs.misses, "lines", sizes.pick(2000, 30), sizes.pick(20_000, 60), sizes)],
            ),
            *([_draws(folder, sizes)] if sys.platform == "linux" else []),
        ]


def _draws(folder: Path, sizes: Sizes) -> Tally:
    few, many = sizes.pick(100_000, 100), sizes.pick(500_000, 200)

    def count(draws: int) -> dict[str, float]:
        return _drawn(folder / f"draws-{draws}", draws)

    return Tally(
        "draws of different questions from one pipeline",
        ["at the end, MB", "peak, MB"],
        [*_pair(count, "draws", few, many, sizes)],
    )


def _pair(count: Any, what: str, few: int, many: int, sizes: Sizes) -> Iterator[Count]:
    """Yield a short and a long run; the long one should need little more."""
    yield Count(f"{few:,} {what}", lambda: count(few), "control")
    goals: dict[str, Any] = {} if sizes.check else {"peak, MB": (1.5, f"{few:,} {what}")}
    yield Count(f"{many:,} {what}", lambda: count(many), "subject", goals)


if __name__ == "__main__":
    asyncio.run(_draw(sys.argv[1], int(sys.argv[2])))
