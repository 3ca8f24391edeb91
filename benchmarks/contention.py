"""How long do processes take that draw from one key of a shared store at the same time?

Four processes of their own each make 200 new draws of one question in one namespace, 50 in flight, with a
model that answers at once: in order, and with ``ordered=False``. A Valkey server of its own runs on loopback.
Each round has a new question. What comes back is checked: 800 samples, and none was given twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cachepipe
from benchmarks import data
from benchmarks.harness import Entry, Sizes, Table, Timed, expect, use_all_cores
from benchmarks.shared import valkey_server

PROCESSES = 4


class _Model:
    """Answers at once with texts that no other process gives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._given = 0

    async def request(self, request: Any) -> cachepipe.Response:
        """Return new texts."""
        first = self._given
        self._given += request.n
        return cachepipe.Response([f"{self._name} {number}" for number in range(first, self._given)])

    async def batch_request(self, batch: Any) -> list[cachepipe.Response]:
        """Return the response to each request."""
        return [await self.request(request) for request in batch.requests]


async def draw(url: str, name: str, *, ordered: bool) -> None:
    """Make draws for each line of the input, ``[question, draws, in flight]``; write seconds and texts."""
    async with cachepipe.OnlineAPI(_Model(name), url, scope="contention", ordered=ordered) as pipeline:
        print(flush=True)
        while line := sys.stdin.readline():
            text, count, in_flight = json.loads(line)
            left = iter(range(count))
            texts: list[str] = []
            question = data.question(text)

            async def work(asked: dict[str, Any], numbers: Iterator[int], found: list[str]) -> None:
                for number in numbers:
                    each = data.request(asked, request_id=f"{name} {number}", namespace="one")
                    found += (await pipeline.request(each)).data

            start = time.perf_counter()
            await asyncio.gather(*[work(question, left, texts) for _ in range(in_flight)])
            print(json.dumps([time.perf_counter() - start, texts]), flush=True)


class _Workers:
    """Processes that draw when they are told to."""

    def __init__(self, url: str, *, ordered: bool) -> None:
        code = (
            "import asyncio, sys; from benchmarks.contention import draw; "
            "asyncio.run(draw(*sys.argv[1:3], ordered=sys.argv[3] == '1'))"
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, url, str(number), str(int(ordered))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(PROCESSES)
        ]
        for process in self._processes:
            use_all_cores(process.pid)
        for process in self._processes:
            self._heard(process)

    @staticmethod
    def _heard(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        expect(bool(line), "a process that draws has ended")
        return line

    def draw(self, text: str, count: int, in_flight: int) -> Timed:
        """Have each process make draws of a question; return the longest time, and all texts."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps([text, count, in_flight])}\n")
            process.stdin.flush()
        told = [json.loads(self._heard(process)) for process in self._processes]
        return Timed(max(seconds for seconds, _ in told), [each for _, texts in told for each in texts])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate(timeout=20)


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield the table: the time until all processes have made their draws."""
    count, in_flight = sizes.pick(200, 4), sizes.pick(50, 2)
    with valkey_server(folder) as server, contextlib.ExitStack() as stack:
        url, entries = f"valkey://{server.host}:{server.port}/0", []
        for ordered in (True, False):
            name = "in order" if ordered else "ordered=False"
            workers = stack.enter_context(contextlib.closing(_Workers(url, ordered=ordered)))

            def call(text: str, workers: _Workers = workers) -> Timed:
                return workers.draw(text, count, in_flight)

            def prepare(number: int, name: str = name) -> str:
                return f"contended {name} {number}"

            entries.append(Entry(name, call, _checked(PROCESSES * count), prepare=prepare))
        title = f"{PROCESSES} processes, {count} draws each of one key, {in_flight} in flight"
        yield [Table(title, entries, "ms")]


def _checked(count: int) -> Any:
    def check(texts: list[str], _: Any) -> None:
        expect(len({*texts}) == len(texts) == count, "a sample was given twice, or is missing")

    return check
