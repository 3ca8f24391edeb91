"""Does appending to a list of 2,000 samples of 1 KB cost more than to one of 10, and more than diskcache?

Sixteen lists of each length lie in one cache; a round appends eight samples to each, in turn. The short
lists are new in each round; the long ones grow by a few in a hundred over a run. ``--large`` adds
four lists of 20,000.

An append is what a miss writes: a claim, which puts the index into the ledger and takes its lease, and a
commit of the sample, each in a transaction of its own (*one at a time*) or 64 to a transaction. The
floor is diskcache's ``set`` of the same bytes in a cache with as many rows, one at a time and 64 to a
``transact``. A last entry is a whole miss of the pipeline around a model that answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

import cachepipe
from benchmarks import data, floors
from benchmarks.harness import Entry, Sizes, Table, equal, expect
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question, question
from cachepipe.errors import FreshIds
from cachepipe.stores import DiskStore
from cachepipe.stores.base import Claim, Commit, Store
from cachepipe.typedefs import Request, Response

SHORT, LONG, LONGEST = 10, 2000, 20_000
GROUP = 64
_FILL = 512
_ids = itertools.count()


class _Lists:
    """Lists of one length in a store: what is appended to them next, and what they should hold."""

    def __init__(self, store: Store, name: str, lists: int, length: int) -> None:
        self.store = store
        self.requests = [data.request(data.question(f"{name} {number}")) for number in range(lists)]
        self.questions: list[Question] = [question(request, "benchmark") for request in self.requests]
        self.lengths = [length] * lists
        append(store, itertools.islice(itertools.cycle(self.questions), lists * length), _FILL)

    def turns(self, count: int) -> list[int]:
        """Return which list gets the next sample, for so many samples."""
        return [number % len(self.questions) for number in range(count)]

    def grown(self, added: list[str]) -> None:
        """Check that the samples added last are at the ends of the lists, and that nothing else is there."""
        per_list = len(added) // len(self.questions)
        for place, asked in enumerate(self.questions):
            samples = list(self.store.samples(asked.key))
            self.lengths[place] += per_list
            expect(
                len(samples) == self.lengths[place],
                f"a list has {len(samples)} samples and should have {self.lengths[place]}",
            )
            equal(
                [orjson.loads(sample.payload) for sample in samples[-per_list:]],
                added[place :: len(self.questions)],
            )


def _applied(store: Store, operations: list[Any]) -> list[Any]:
    results = store.apply_now(operations)
    if results is None:
        raise RuntimeError("somebody else writes to the benchmark's cache")
    return results


def append(store: Store, asked: Iterator[Question] | list[Question], group: int) -> list[str]:
    """Append a sample to the list of each question, so many to a transaction; return the samples."""
    waiting = iter(asked)
    added = []
    while some := list(itertools.islice(waiting, group)):
        numbers = [str(next(_ids)) for _ in some]
        claims = [
            Claim(Draw(label("growth"), each.key, number, 0), 1, each, number)
            for each, number in zip(some, numbers, strict=True)
        ]
        grants = _applied(store, claims)
        values = [_SAMPLE + number for number in numbers]
        meta = {"at": 0.0, "call": "benchmark", "s": 0.0}
        _applied(
            store,
            [
                Commit(each.key, grant.mine[0], orjson.dumps(value), meta)
                for each, grant, value in zip(some, grants, values, strict=True)
            ],
        )
        added += values
    return added


_SAMPLE = data.text("sample", data.SIZE - 8)


class _Appender:
    """A model whose samples are all different."""

    cache_scope = "benchmark"

    async def request(self, request: Request) -> Response:
        return Response([_SAMPLE + str(next(_ids)) for _ in range(request.n)])


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield a table for each way to append."""
    lists = 16
    count = sizes.pick(128, 32)
    lengths = [SHORT, sizes.pick(LONG, 20), *([LONGEST] if sizes.large else [])]
    with warnings.catch_warnings(), contextlib.closing(DiskStore(folder / "cache")) as store:
        long = {
            length: _Lists(store, f"of {length}", 4 if length == LONGEST else lists, length)
            for length in lengths[1:]
        }
        rows = sum(sum(known.lengths) for known in long.values())
        floors.make_diskcache(
            folder / "diskcache", ((f"fill/{number}", _SAMPLE.encode()) for number in range(rows))
        )
        await store.apply([])  # lets the writer's thread move the log into the file
        with floors.open_diskcache(folder / "diskcache") as cache:
            async with cachepipe.OnlineAPI(_Appender(), store) as pipeline:
                # New ids on old questions are what makes a miss of an old list.
                warnings.simplefilter("ignore", FreshIds)
                yield [
                    Table(
                        "claim and commit, one at a time",
                        _transactions(store, cache, long, lists, count, 1),
                    ),
                    Table(
                        f"claim and commit, {GROUP} to a transaction",
                        _transactions(store, cache, long, lists, count, GROUP),
                    ),
                    Table("a miss of the pipeline, one at a time", _misses(pipeline, long, lists, count)),
                ]


def _with(store: Store, long: dict[int, _Lists], lists: int) -> Iterator[tuple[int, Callable[[int], _Lists]]]:
    """Yield each length, and what gives a round its lists of that length."""
    names = itertools.count()
    yield SHORT, lambda _: _Lists(store, f"short {next(_ids)} {next(names)}", lists, SHORT)
    for length, known in long.items():
        yield length, lambda _, known=known: known  # type: ignore[misc]


def _goals(length: int, name: str, **others: float | None) -> dict[str, float | None]:
    goals = dict(others)
    if length != SHORT:
        goals[name.format(SHORT)] = 1.2
    return goals


def _transactions(
    store: Store, cache: Any, long: dict[int, _Lists], lists: int, count: int, group: int
) -> list[Entry]:
    def set_rows(_: Any) -> list[tuple[str, bytes]]:
        rows = []
        for _ in range(0, count, group):
            with cache.transact() if group > 1 else contextlib.nullcontext():
                for _ in range(group):
                    number = next(_ids)
                    row = (f"list/{number}", orjson.dumps(_SAMPLE + str(number)))
                    cache.set(*row)
                    rows.append(row)
        return rows

    def rows_right(rows: list[tuple[str, bytes]], _: Any) -> None:
        equal([cache[key] for key, _ in rows], [value for _, value in rows])

    def appended(some: _Lists) -> list[str]:
        return append(store, [some.questions[place] for place in some.turns(count)], group)

    def right(added: list[str], some: _Lists) -> None:
        some.grown(added)

    floor = "diskcache set" if group == 1 else f"diskcache set, {GROUP} to a transact"
    name = "append to a list of {:,}"
    goal = None if group == 1 else 2.0
    return [
        Entry(floor, set_rows, rows_right, count, "floor"),
        *(
            Entry(
                name.format(length),
                appended,
                right,
                count,
                against=_goals(length, name, **{floor: goal}),
                prepare=prepare,
            )
            for length, prepare in _with(store, long, lists)
        ),
    ]


def _misses(pipeline: cachepipe.OnlineAPI, long: dict[int, _Lists], lists: int, count: int) -> list[Entry]:
    def prepared(made: Callable[[int], _Lists]) -> Callable[[int], tuple[_Lists, list[data.ChatRequest]]]:
        def prepare(number: int) -> tuple[_Lists, list[data.ChatRequest]]:
            some = made(number)
            # The namespace has drawn all that there is, under ids of its own: each request needs a new one.
            asked = [
                dataclasses.replace(some.requests[place], request_id=str(next(_ids)), namespace="growth")
                for place in some.turns(count)
            ]
            return some, asked

        return prepare

    async def ask(asked: tuple[_Lists, list[data.ChatRequest]]) -> list[Response]:
        return [await pipeline.request(request) for request in asked[1]]

    def right(got: list[Response], asked: tuple[_Lists, list[data.ChatRequest]]) -> None:
        expect(all(response.cached == [False] for response in got), "an answer was no miss")
        asked[0].grown([response.data[0] for response in got])

    name = "miss on a list of {:,}"
    return [
        Entry(name.format(length), ask, right, count, against=_goals(length, name), prepare=prepared(made))
        for length, made in _with(pipeline.store, long, lists)
    ]
