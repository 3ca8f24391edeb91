"""What does the schedule (C11) cost: with ``ordered=True``, beside ``ordered=False`` on the same store?

Hits are known draws, one at a time, in batches of 64, and in gathers of 2, 16, 64 and 1,000; and new draws,
one at a time. The schedule hands over the answers of a gather one by one, in a turn of the event loop each.
Misses go through ``OpenAIModel`` to a server on the loopback interface that answers at once, 1,000 in flight.

Both pipelines use one store object, because two stores would look at each other's leases. The reference of
each table is the same work with ``ordered=False``. The times are the processor's, because a hit waits for
nothing else. Misses wait for the server, so their table also has the time on the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cachepipe
from benchmarks import data
from benchmarks.harness import Entry, Goals, Role, Sizes, Table, Timed, equal, expect
from benchmarks.peers import Server
from cachepipe.contract.draws import label
from cachepipe.models.openai import OpenAIModel
from cachepipe.stores import DiskStore
from cachepipe.typedefs import Batch, Request, Response

CROWD = 64
_REFERENCE = "ordered=False"
_Asking = Callable[[cachepipe.OnlineAPI, list[Request]], Any]


class _Pipelines:
    """Two pipelines on one store, without and with the schedule."""

    def __init__(self, model: Any, store: DiskStore) -> None:
        self.store = store
        self.of = {
            name: cachepipe.OnlineAPI(model, store, ordered=name != _REFERENCE)
            for name in (_REFERENCE, "ordered=True")
        }
        self._elapsed: dict[str, float] = {}  # seconds that the last round took

    async def close(self) -> None:
        for pipeline in self.of.values():
            await pipeline.close()

    def entries(
        self,
        asking: _Asking,
        prepare: Callable[[], list[Request]],
        check: Callable[[list[Response], list[Request]], None],
        count: int,
        goal: float | None,
    ) -> list[Entry]:
        """Return an entry for each pipeline; ``asking`` makes a round's requests, in a run of its own."""

        def entry(name: str) -> Entry:
            async def call(requests: list[Request]) -> Timed:
                with cachepipe.run():
                    start, began = time.process_time(), time.perf_counter()
                    got = await asking(self.of[name], requests)
                    seconds, self._elapsed[name] = time.process_time() - start, time.perf_counter() - began
                    return Timed(seconds, got)

            role, against = _compared(name, _REFERENCE, goal)
            return Entry(name, call, check, count, role, against, prepare=lambda _: prepare())

        return [entry(name) for name in self.of]

    def elapsed(self, count: int, goal: float | None) -> list[Entry]:
        """Return an entry for each pipeline that shows the time on the clock of the same round."""

        def entry(name: str) -> Entry:
            role, against = _compared(f"{name}, elapsed", f"{_REFERENCE}, elapsed", goal)
            return Entry(
                f"{name}, elapsed",
                lambda _: Timed(self._elapsed[name], None),
                lambda _got, _prepared: None,
                count,
                role,
                against,
            )

        return [entry(name) for name in self.of]


def _compared(name: str, reference: str, goal: float | None) -> tuple[Role, Goals]:
    return ("control", {}) if name == reference else ("subject", {reference: goal})


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield the cases."""
    with contextlib.closing(DiskStore(folder / "cache")) as store, Server() as server:
        hits = _Hits(store, sizes.pick(1000, 70))
        misses = _Misses(store, server, sizes.pick(1000, 10))
        await hits.fill()
        yield [*hits.tables(), *misses.tables()]
        await hits.pipelines.close()
        await misses.pipelines.close()
        await misses.model.close()


class _Hits:
    """Stored questions and their answers."""

    def __init__(self, store: DiskStore, count: int) -> None:
        self.questions = [data.question(str(number)) for number in range(count)]
        self.known = data.requests(self.questions, "known")
        self.answers = [[data.answer(request)] for request in self.known]
        self.model = data.InstantModel(data.answers_of(self.known))
        self.pipelines = _Pipelines(self.model, store)
        self._namespaces = (f"new {number}" for number in itertools.count())

    async def fill(self) -> None:
        await asyncio.gather(*map(self.pipelines.of[_REFERENCE].request, self.known))
        self.model.calls = 0

    def tables(self) -> list[Table]:
        rerun, new, count = self._rerun, self._new, len(self.known)
        crowds = sorted({min(crowd, count) for crowd in (2, 16, CROWD, 1000)})
        entries = self.pipelines.entries
        return [
            Table("a known draw, one at a time", entries(_one_by_one, rerun, self._right, count, 1.05)),
            Table("a new draw, one at a time", entries(_one_by_one, new, self._drawn, count, 1.05)),
            Table(
                f"known draws, batch_request of {CROWD}", entries(_batches, rerun, self._right, count, 1.05)
            ),
            *(
                Table(
                    f"known draws, gathers of {crowd:,}",
                    entries(_gathers(crowd), rerun, self._right, count, 1.5 if crowd == CROWD else None),
                )
                for crowd in crowds
            ),
        ]

    def _rerun(self) -> list[Request]:
        return [*self.known]

    def _new(self) -> list[Request]:
        return [*data.requests(self.questions, next(self._namespaces))]

    def _right(self, got: list[Response], _: list[Request]) -> None:
        equal([response.data for response in got], self.answers)
        expect(all(response.cached == [True] for response in got), "an answer was not from the cache")
        expect(self.model.calls == 0, "the model was called")

    def _drawn(self, got: list[Response], asked: list[Request]) -> None:
        self._right(got, asked)
        drawn = sum(1 for _ in self.pipelines.store.draws(namespace=label(asked[0].namespace)))
        expect(drawn == len(asked), f"the ledger has {drawn} of {len(asked)} draws")


class _Misses:
    """Questions that are new in each round."""

    def __init__(self, store: DiskStore, server: Server, count: int) -> None:
        self.server, self.count = server, count
        self.model = OpenAIModel("a-model", base_url=server.base_url, api_key="none", timeout=120)
        self.pipelines = _Pipelines(self.model, store)
        self._series = itertools.count()

    def tables(self) -> list[Table]:
        asking, entries, count = _gathers(self.count), self.pipelines.entries, self.count
        return [
            Table(
                f"misses through OpenAIModel, {count:,} in flight",
                [
                    *entries(asking, self._asked, self._right, count, 1.1),
                    *self.pipelines.elapsed(count, 1.1),
                ],
            )
        ]

    def _asked(self) -> list[Request]:
        series = next(self._series)
        self.server.reset()
        return [*data.requests([data.question(f"{series} {place}") for place in range(self.count)], "miss")]

    def _right(self, got: list[Response], _: list[Request]) -> None:
        calls = self.server.reset()["calls"]
        expect(calls == self.count, f"{calls} calls were made for {self.count} misses")
        expect(all(response.cached == [False] for response in got), "an answer was no miss")
        expect(len({response.data[0] for response in got}) == self.count, "an answer came twice")


async def _one_by_one(pipeline: cachepipe.OnlineAPI, requests: list[Request]) -> list[Response]:
    return [await pipeline.request(request) for request in requests]


async def _batches(pipeline: cachepipe.OnlineAPI, requests: list[Request]) -> list[Response]:
    got: list[Response] = []
    for start in range(0, len(requests), CROWD):
        got += await pipeline.batch_request(Batch(requests[start : start + CROWD]))
    return got


def _gathers(crowd: int) -> _Asking:
    async def gathers(pipeline: cachepipe.OnlineAPI, requests: list[Request]) -> list[Response]:
        got: list[Response] = []
        for start in range(0, len(requests), crowd):
            got += await asyncio.gather(*map(pipeline.request, requests[start : start + crowd]))
        return got

    return gathers
