"""What does a miss cost beside the call that it makes: many at once, one by one, and through the client?

At once: the model sleeps 50 ms, as one that answers from far away; the floor is ``asyncio.gather``
over the bare model, and a control writes the 1,000 answers to a diskcache in one transaction after it.
Requests are chat messages; one entry has strings of the same length instead.
In crowds of 1,000 and of 20,000 the model answers at once, so that only the overhead is left; the larger
crowd's misses should cost about the same each.
One by one: the model answers at once, so that only the overhead is left; the floor is the bare call
with diskcache's ``get`` before and ``set`` after it.

Through the drop-in client, the floor is the bare client against the same server, with 100 and with 1,000 in
flight, and answers at once or after 50 ms. Each client is a process of its own (see ``worker.py``); the
server counts what it was asked.

After each round of the others, and before the pipeline is closed, another process replays all draws
without a model and counts the rows with diskcache: what was delivered is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson

import cachepipe
from benchmarks import data, floors
from benchmarks.client import asks
from benchmarks.harness import ROOT, Entry, Goals, Role, Sizes, Table, Timed, equal, expect
from benchmarks.peers import Server, Worker, workers
from cachepipe.typedefs import Batch, Request, Response

DELAY = 0.05


class _SlowModel(data.InstantModel):
    async def request(self, request: Request) -> Response:
        await asyncio.sleep(DELAY)
        return await super().request(request)


class _Misses:
    def __init__(self, folder: Path, model: type[data.InstantModel], questions: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.questions = questions
        self.requests = data.requests(questions, "miss")
        self.model = model(data.answers_of(self.requests))
        self.answers = [data.answer(request) for request in self.requests]

    def pipeline(self, number: int) -> cachepipe.OnlineAPI:
        self.model.calls = 0
        return cachepipe.OnlineAPI(self.model, self.folder / f"cache-{number}")

    def diskcache(self, number: int) -> Any:
        self.model.calls = 0
        return floors.open_diskcache(self.folder / f"diskcache-{number}")

    # What is right.

    def bare(self, got: list[Response], _: Any) -> None:
        equal([response.data for response in got], [[answer] for answer in self.answers])

    def stored(self, got: list[str], cache: Any) -> None:
        equal(got, self.answers)
        rows = [orjson.loads(cache[data.key(asked)]) for asked in self.questions]
        cache.close()
        shutil.rmtree(cache.directory)
        equal(rows, self.answers)

    async def durable(self, got: list[Response], pipeline: cachepipe.OnlineAPI) -> None:
        folder = pipeline.store.folder  # type: ignore[attr-defined]
        calls = self.model.calls
        read = _read_elsewhere(folder, self.questions)
        await pipeline.close()
        shutil.rmtree(folder)
        self.bare(got, None)
        expect(all(response.cached == [False] for response in got), "an answer was no miss")
        count = len(self.answers)
        expect(calls == count, f"the model was called {calls} times for {count} misses")
        expect(read["rows"] == count, f"another process sees {read['rows']} of {count} rows")
        equal(read["answers"], self.answers)


def _read_elsewhere(folder: Path, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what another process reads in a cache folder that is still open here."""
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.reader", str(folder)],
        input=json.dumps({"questions": questions, "namespace": "miss"}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    expect(told.returncode == 0, f"another process could not read the cache: {told.stderr}")
    read: dict[str, Any] = json.loads(told.stdout)
    return read


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield the cases."""
    count = sizes.pick(1000, 70)
    questions = [data.question(str(number)) for number in range(count)]
    strings = [data.question(str(number), chat=False) for number in range(count)]
    many = [data.question(str(number)) for number in range(sizes.pick(20_000, 300))]
    slow = _Misses(folder, _SlowModel, questions)
    slow_strings = _Misses(folder, _SlowModel, strings)
    alone = _Misses(folder, data.InstantModel, questions)
    crowd = _Misses(folder, data.InstantModel, many)
    with Server() as server, workers(["bare", "cachepipe", *sizes.peers]) as there:
        through = [
            _Through(there, server, folder, in_flight, delay, sizes.pick(max(in_flight, 500), 10))
            for in_flight, delay in ((100, 0.0), (100, DELAY), (1000, DELAY))
        ]
        yield [
            Table(f"{count:,} at once around a model that sleeps 50 ms", _at_once(slow, slow_strings), "ms"),
            Table("in crowds around a model that answers at once", _crowds(alone, crowd)),
            Table("one at a time around a model that answers at once", _alone(alone)),
            *(each.table() for each in through),
        ]


def _gathering(misses: _Misses) -> Callable[[cachepipe.OnlineAPI], Any]:
    async def gathered(pipeline: cachepipe.OnlineAPI) -> list[Response]:
        return await asyncio.gather(*map(pipeline.request, misses.requests))

    return gathered


def _at_once(misses: _Misses, strings: _Misses) -> list[Entry]:
    async def bare(_: Any) -> list[Response]:
        return await asyncio.gather(*map(misses.model.request, misses.requests))

    async def bare_and_rows(cache: Any) -> list[str]:
        got = await asyncio.gather(*map(misses.model.request, misses.requests))
        with cache.transact():
            for asked, response in zip(misses.questions, got, strict=True):
                cache.set(data.key(asked), orjson.dumps(response.data[0]))
        return [response.data[0] for response in got]

    async def batched(pipeline: cachepipe.OnlineAPI) -> list[Response]:
        return await pipeline.batch_request(Batch([*misses.requests]))

    floor = "bare model, asyncio.gather"
    goals: dict[str, float | None] = {floor: 1.6}
    return [
        Entry(floor, bare, misses.bare, role="floor"),
        Entry(
            "bare model, then one diskcache transact",
            bare_and_rows,
            misses.stored,
            role="control",
            against={floor: None},
            prepare=misses.diskcache,
        ),
        Entry("misses", _gathering(misses), misses.durable, against=goals, prepare=misses.pipeline),
        Entry(
            "misses, their prompts strings",
            _gathering(strings),
            strings.durable,
            against=goals,
            prepare=strings.pipeline,
        ),
        Entry("misses, batch_request", batched, misses.durable, against=goals, prepare=misses.pipeline),
    ]


def _crowds(*crowds: _Misses) -> list[Entry]:
    def entry(misses: _Misses, against: Goals) -> Entry:
        count = len(misses.requests)
        call, prepare = _gathering(misses), misses.pipeline
        return Entry(f"{count:,} at once", call, misses.durable, count, against=against, prepare=prepare)

    small, large = crowds
    first = entry(small, {})
    return [first, entry(large, {first.name: 2.0})]


def _alone(misses: _Misses) -> list[Entry]:
    count = len(misses.requests)

    async def bare(_: Any) -> list[Response]:
        return [await misses.model.request(request) for request in misses.requests]

    async def get_and_set(cache: Any) -> list[str]:
        got = []
        for asked, request in zip(misses.questions, misses.requests, strict=True):
            key = data.key(asked)
            if cache.get(key) is None:
                value = (await misses.model.request(request)).data[0]
                cache.set(key, orjson.dumps(value))
                got.append(value)
        return got

    async def ask(pipeline: cachepipe.OnlineAPI) -> list[Response]:
        return [await pipeline.request(request) for request in misses.requests]

    floor = "key + diskcache get + bare model + diskcache set"
    return [
        Entry("bare model", bare, misses.bare, count, "control"),
        Entry(floor, get_and_set, misses.stored, count, "floor", prepare=misses.diskcache),
        Entry("miss", ask, misses.durable, count, against={floor: None}, prepare=misses.pipeline),
    ]


class _Through:
    """Misses through clients: new questions in each round, so many in flight."""

    def __init__(
        self,
        there: dict[str, Worker],
        server: Server,
        folder: Path,
        in_flight: int,
        delay: float,
        count: int,
    ) -> None:
        self.there, self.server, self.folder = there, server, folder
        self.in_flight, self.delay, self.count = in_flight, delay, count

    def table(self) -> Table:
        bare = self.there["bare"].title
        least = 1.3 if self.in_flight == 100 else 1.0
        peers: dict[str, float | None] = {worker.title: None for worker in self.there.values()}
        faster = {**peers, bare: least}
        del faster["cachepipe"]
        return Table(
            f"through the client, {self.in_flight:,} in flight, answered after {self.delay * 1000:.0f} ms",
            [
                self._entry(
                    worker,
                    "floor" if name == "bare" else "subject" if name == "cachepipe" else "peer",
                    faster if name == "cachepipe" else {},
                )
                for name, worker in self.there.items()
            ],
        )

    def _entry(self, worker: Worker, role: Role, faster: Goals) -> Entry:
        def prepare(number: int) -> list[dict[str, Any]]:
            self.server.delay(self.delay)
            where = self.folder / f"{worker.name}-{self.in_flight}-{self.delay}"
            worker.call("open", folder=str(where), base_url=self.server.base_url, in_flight=self.in_flight)
            worker.ask(asks(2, 2, f"round {number}, before"), in_flight=2)  # what is made with the first call
            self.server.reset()
            return asks(self.count, 2, f"round {number}")

        def call(wanted: list[dict[str, Any]]) -> Timed:
            return worker.ask(wanted, in_flight=self.in_flight)

        def right(got: list[list[str]], _: Any) -> None:
            told = self.server.reset()
            expect(told["calls"] == self.count, f"{told['calls']} calls were made for {self.count} misses")
            expect(len({text for texts in got for text in texts}) == self.count, "an answer came twice")

        return Entry(worker.title, call, right, self.count, role, faster=faster, prepare=prepare)
