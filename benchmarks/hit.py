"""What does a hit from disk cost, when 2,000 questions of 1 KB are asked again, and beside which floor?

Three cases. A *known draw* is a rerun: the ledger has it, so nothing is written. A *new draw* is
another namespace that asks what is stored: its ledger row is durable before the answer is given, for
one request at a time (*alone*) and for 64 at once (*in crowds*).

Floor of a known draw: the SHA-256 of the request as sorted JSON, diskcache's ``get`` of that key as
bytes, and the parsing of what it gives. Floor of a new draw: one SQLite row read and one ledger row
written in one WAL file, without a key and without parsing; 64 of them to a transaction for crowds.
With ``--peers``, CacheSaver's pipeline around a model that answers at once, in a process of its own.
Controls: the same over a dict and an SQLite row, the floor of a new draw with key and parsing, the
bare model call, and ``asyncio.gather`` over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson

import cachepipe
from benchmarks import data, floors
from benchmarks.harness import Entry, Goals, Sizes, Table, Timed, equal, expect
from benchmarks.peers import TITLES, Worker, workers
from cachepipe.contract.draws import label
from cachepipe.typedefs import Batch, Response

CROWD = 64
_PEER = TITLES["cachesaver-pipeline"]


class _Hits:
    """The cache with its questions and answers, and the folders that floors read."""

    def __init__(self, folder: Path, count: int, *, chat: bool = True) -> None:
        folder.mkdir()
        self.folder = folder
        self.questions = [data.question(str(number), chat=chat) for number in range(count)]
        self.known = data.requests(self.questions, "known")
        self.answers = [data.answer(request) for request in self.known]
        self.model = data.InstantModel(data.answers_of(self.known))
        self.keys = [data.key(asked) for asked in self.questions]
        self.rows = {key: orjson.dumps(answer) for key, answer in zip(self.keys, self.answers, strict=True)}
        floors.make_sqlite(folder / "floor.db", self.rows)
        floors.make_diskcache(folder / "diskcache", self.rows.items())

    async def fill(self) -> None:
        async with self.open(self.folder / "cache") as pipeline:
            await asyncio.gather(*map(pipeline.request, self.known))
        self.model.calls = 0

    def open(self, folder: Path) -> cachepipe.OnlineAPI:
        return cachepipe.OnlineAPI(self.model, folder)

    # What is right.

    def values(self, got: list[Any], _prepared: Any) -> None:
        equal(got, self.answers)

    def responses(self, got: list[Response], _prepared: Any) -> None:
        equal([response.data for response in got], [[answer] for answer in self.answers])
        expect(all(response.cached == [True] for response in got), "an answer was not from the cache")
        expect(self.model.calls == 0, "the model was called")


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield the three cases."""
    count = sizes.pick(2000, 130)
    hits = _Hits(folder / "chat", count)
    strings = _Hits(folder / "string", count, chat=False)
    await hits.fill()
    await strings.fill()
    with (
        workers(["cachesaver-pipeline"] if "cachesaver" in sizes.peers else []) as there,
        floors.open_diskcache(hits.folder / "diskcache") as opened,
        contextlib.closing(floors.connect(hits.folder / "floor.db")) as connection,
    ):
        async with hits.open(hits.folder / "cache") as chat, strings.open(strings.folder / "cache") as string:
            yield [
                Table(
                    "a known draw, one at a time",
                    [*_known(hits, opened, connection, chat, strings, string), *_peer(hits, there, 1)],
                ),
                Table("a new draw, alone", [*_new(hits, strings, 1), *_peer(hits, there, 1, new=True)]),
                Table(
                    f"a new draw, in crowds of {CROWD}",
                    [*_new(hits, strings, CROWD), *_peer(hits, there, CROWD, new=True)],
                ),
            ]


def _peer(hits: _Hits, there: dict[str, Worker], in_flight: int, *, new: bool = False) -> list[Entry]:
    """Return the entry of CacheSaver's pipeline around a model that answers at once, if it is measured."""
    worker = there.get("cachesaver-pipeline")
    if worker is None:
        return []
    wanted = [{"messages": asked["prompt"], "n": 1} for asked in hits.questions]
    namespaces = itertools.count()

    def opened(_: int) -> None:
        worker.call(
            "open", folder=str(hits.folder / "peer"), base_url="", in_flight=in_flight
        )  # another run: its cursors are in memory

    def call(_: Any) -> Timed:
        return worker.ask(wanted, f"new {next(namespaces)}" if new else "known", in_flight)

    def right(got: list[list[str]], _: Any) -> None:
        equal(got, [[f"answer to {asked['prompt'][-1]['content']}"] for asked in hits.questions])

    opened(0)
    worker.ask(wanted, "known")
    return [Entry(worker.title, call, right, len(wanted), "peer", prepare=opened)]


def _replaying(hits: _Hits) -> Callable[[cachepipe.OnlineAPI], Any]:
    async def replay(pipeline: cachepipe.OnlineAPI) -> list[Response]:
        with cachepipe.run():
            return [await pipeline.request(request) for request in hits.known]

    return replay


def _known(
    hits: _Hits,
    opened: Any,
    connection: sqlite3.Connection,
    pipeline: cachepipe.OnlineAPI,
    strings: _Hits,
    string_pipeline: cachepipe.OnlineAPI,
) -> list[Entry]:
    count = len(hits.questions)
    loads = orjson.loads

    def from_dict(_: Any) -> list[Any]:
        return [loads(hits.rows[data.key(asked)]) for asked in hits.questions]

    def from_sqlite(_: Any) -> list[Any]:
        execute = connection.execute
        return [loads(execute(floors.READ, (data.key(asked),)).fetchone()[0]) for asked in hits.questions]

    def from_diskcache(cache: Any) -> list[Any]:
        return [loads(cache.get(data.key(asked))) for asked in hits.questions]

    async def bare(_: Any) -> list[Any]:
        return [(await hits.model.request(request)).data[0] for request in hits.known]

    async def build_and_replay(_: Any) -> list[Response]:
        with cachepipe.run():
            return [
                await pipeline.request(data.request(asked, str(place), "known"))
                for place, asked in enumerate(hits.questions)
            ]

    def bare_right(got: list[Any], _: Any) -> None:
        equal(got, hits.answers)
        hits.model.calls = 0

    def closed(got: list[Any], cache: Any) -> None:
        cache.close()
        equal(got, hits.answers)

    async def ended(got: list[Response], asked: cachepipe.OnlineAPI) -> None:
        await asked.close()
        hits.responses(got, asked)

    floor, cold = "key + diskcache bytes", "key + diskcache bytes, just opened"
    return [
        Entry("bare model call", bare, bare_right, count, "control"),
        Entry("key + dict + loads", from_dict, hits.values, count, "control"),
        Entry("key + sqlite row", from_sqlite, hits.values, count, "control"),
        Entry(floor, from_diskcache, hits.values, count, "floor", prepare=lambda _: opened),
        Entry(
            "known draw",
            _replaying(hits),
            hits.responses,
            count,
            against={floor: 2.0},
            faster={_PEER: 20.0},
            prepare=lambda _: pipeline,
        ),
        Entry(
            "known draw, its prompt a string",
            _replaying(strings),
            strings.responses,
            count,
            against={floor: 2.0},
            prepare=lambda _: string_pipeline,
        ),
        Entry(
            "known draw, its Request built too",
            build_and_replay,
            hits.responses,
            count,
            against={floor: None},
        ),
        Entry(
            cold,
            from_diskcache,
            closed,
            count,
            "floor",
            prepare=lambda _: floors.open_diskcache(hits.folder / "diskcache"),
        ),
        Entry(
            "known draw, cache just opened",
            _replaying(hits),
            ended,
            count,
            against={cold: 2.0},
            prepare=lambda _: hits.open(hits.folder / "cache"),
        ),
    ]


def _new(hits: _Hits, strings: _Hits, crowd: int) -> list[Entry]:
    count = len(hits.questions)
    loads = orjson.loads
    crowds = [range(start, min(start + crowd, count)) for start in range(0, count, crowd)]

    def copy_of_floor(number: int) -> sqlite3.Connection:
        path = hits.folder / f"copy-{number}.db"
        shutil.copyfile(hits.folder / "floor.db", path)
        connection = floors.connect(path)
        connection.execute(floors.READ, ("",)).fetchone()
        return connection

    def rows(connection: sqlite3.Connection) -> list[Any]:
        execute = connection.execute
        values = []
        for places in crowds:
            execute("BEGIN IMMEDIATE")
            for place in places:
                key = hits.keys[place]
                values.append(execute(floors.READ, (key,)).fetchone()[0])
                execute(floors.WRITE, ("new", key, str(place)))
            execute("COMMIT")
        return values

    def keyed_rows(connection: sqlite3.Connection) -> list[Any]:
        execute = connection.execute
        values = []
        for places in crowds:
            execute("BEGIN IMMEDIATE")
            for place in places:
                key = data.key(hits.questions[place])
                values.append(loads(execute(floors.READ, (key,)).fetchone()[0]))
                execute(floors.WRITE, ("new", key, str(place)))
            execute("COMMIT")
        return values

    async def bare(_: Any) -> list[Any]:
        values = []
        for places in crowds:
            values += await asyncio.gather(*[hits.model.request(hits.known[place]) for place in places])
        return [response.data[0] for response in values]

    def bare_right(got: list[Any], _: Any) -> None:
        equal(got, hits.answers)
        hits.model.calls = 0

    def written(decode: Callable[[bytes], Any]) -> Callable[[list[Any], sqlite3.Connection], None]:
        def check(got: list[Any], connection: sqlite3.Connection) -> None:
            drawn = connection.execute("SELECT count(*) FROM ledger WHERE namespace = 'new'").fetchone()[0]
            _remove(connection)
            equal([decode(value) for value in got], hits.answers)
            expect(drawn == count, f"the ledger has {drawn} of {count} draws")

        return check

    floor = "sqlite row + ledger row"
    keyed = f"key + {floor} + loads"
    entries = [
        Entry(floor, rows, written(loads), count, "floor", prepare=copy_of_floor),
        Entry(keyed, keyed_rows, written(lambda value: value), count, "control", prepare=copy_of_floor),
    ]
    if crowd == 1:
        goals: Goals = {floor: 3.0, keyed: None}
    else:
        goals = {floor: 1.7, keyed: None}
        entries.append(Entry("asyncio.gather over the bare model", bare, bare_right, count, "control"))
        entries.append(_draw("new draw, batch_request", hits, crowd, goals, batch=True))
    return [
        *entries,
        _draw("new draw", hits, crowd, goals, faster={_PEER: 7.0}),
        _draw("new draw, its prompt a string", strings, crowd, goals),
    ]


def _draw(
    name: str,
    hits: _Hits,
    crowd: int,
    goals: Goals,
    *,
    batch: bool = False,
    faster: Goals | None = None,
) -> Entry:
    """Return the entry in which a second namespace asks all questions of a copy of the filled cache."""
    count = len(hits.questions)

    def prepare(number: int) -> tuple[cachepipe.OnlineAPI, list[data.ChatRequest]]:
        copy = hits.folder / f"copy-{number}"
        shutil.copytree(hits.folder / "cache", copy)
        return hits.open(copy), data.requests(hits.questions, "new")

    async def draw(prepared: tuple[cachepipe.OnlineAPI, list[data.ChatRequest]]) -> list[Response]:
        pipeline, requests = prepared
        if crowd == 1:
            return [await pipeline.request(request) for request in requests]
        got: list[Response] = []
        for start in range(0, count, crowd):
            some = requests[start : start + crowd]
            if batch:
                got += await pipeline.batch_request(Batch([*some]))
            else:
                got += await asyncio.gather(*map(pipeline.request, some))
        return got

    async def check(
        got: list[Response], prepared: tuple[cachepipe.OnlineAPI, list[data.ChatRequest]]
    ) -> None:
        pipeline, _ = prepared
        drawn = sum(1 for _ in pipeline.store.draws(namespace=label("new")))
        await pipeline.close()
        shutil.rmtree(pipeline.store.folder)  # type: ignore[attr-defined]
        hits.responses(got, None)
        expect(drawn == count, f"the ledger has {drawn} of {count} draws")

    return Entry(name, draw, check, count, against=goals, faster=faster or {}, prepare=prepare)


def _remove(connection: sqlite3.Connection) -> None:
    path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
    connection.close()
    path.unlink()
