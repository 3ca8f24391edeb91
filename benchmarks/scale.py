"""What do a hit, a miss, opening, ``cachepipe stats`` and ``cachepipe ls`` cost at 1,000,000 samples?

Two caches: one of 10,000 samples over 2,000 keys, one of 1,000,000 over 200,000. In each, two namespaces have
drawn five samples of half of the keys, in the order of the keys, and two more have drawn one of every
second key: at the larger size each has 100,000 draws. The questions asked are spread over the whole cache.

The reference is the same at 10,000. What is asked is the same number of questions at both, of 1 KB with an
answer of 1 KB. ``stats`` and ``ls`` are whole processes; their floor is ``cachepipe --version``.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson

import cachepipe
from benchmarks import data
from benchmarks.harness import ROOT, Entry, Goals, Role, Sizes, Table, equal, expect
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import question
from cachepipe.errors import FreshIds
from cachepipe.stores import DiskStore
from cachepipe.stores.base import Claim, Commit, Store
from cachepipe.typedefs import Request, Response

PER_KEY = 5
SMALL, LARGE = 10_000, 1_000_000
_GROUP = 512
_ids = itertools.count()


def asked(number: int | str, request_id: str | None = None, namespace: str | None = None) -> data.ChatRequest:
    """Return a request for the question of a number, cheaply made: there are many."""
    prompt = [{"role": "system", "content": data.SYSTEM}, {"role": "user", "content": f"{number}: {_LONG}"}]
    return data.request(
        {"prompt": prompt, "temperature": 0.7, "max_completion_tokens": 400}, request_id, namespace
    )


_LONG = data.text("question", 800)
_ANSWER = data.text("answer", data.SIZE - 10)


def answer(number: int, position: int) -> str:
    """Return the sample at a position of a question's list."""
    return f"{number}/{position}: {_ANSWER}"


def fill(store: Store, samples: int) -> None:
    """Write so many samples, and the draws of four namespaces, with the store's own verbs."""
    keys = samples // PER_KEY
    meta = {"at": 0.0, "call": "benchmark", "s": 0.0}
    for some in _grouped(range(keys), _GROUP // PER_KEY):
        questions = [question(asked(number), "benchmark") for number in some]
        grants = _applied(
            store,
            [
                Claim(Draw(label(_first(number, keys)), each.key, str(number), 0), PER_KEY, each, "fill")
                for number, each in zip(some, questions, strict=True)
            ],
        )
        _applied(
            store,
            [
                Commit(each.key, index, orjson.dumps(answer(number, index)), meta)
                for number, each, grant in zip(some, questions, grants, strict=True)
                for index in grant.mine
            ],
        )
        _applied(
            store,
            [
                Claim(Draw(label(namespace), each.key, str(number), 0), 1, each, "fill")
                for number, each in zip(some, questions, strict=True)
                if not number % 2
                for namespace in ("third", "fourth")
            ],
        )


def _first(number: int, keys: int) -> str:
    return "first" if number < keys // 2 else "second"


def _grouped(numbers: range, size: int) -> Any:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _applied(store: Store, operations: list[Any]) -> list[Any]:
    results = store.apply_now(operations)
    if results is None:  # the writer's thread makes a checkpoint or writes
        raise RuntimeError("somebody else writes to the benchmark's cache")
    return results


class _Appender:
    """A model whose samples are all different."""

    cache_scope = "benchmark"

    async def request(self, request: Request) -> Response:
        return Response([f"new {next(_ids)}" for _ in range(request.n)])


class _Cache:
    """One size: its folder, and the questions that are asked of it."""

    def __init__(self, folder: Path, samples: int, count: int) -> None:
        self.folder = folder / str(samples)
        self.name = f"{samples:,} samples"
        self.keys = samples // PER_KEY
        self.numbers = [*range(0, self.keys, max(self.keys // count, 1))][:count]
        done = self.folder / "filled"
        if not done.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.closing(DiskStore(self.folder)) as store:
                fill(store, samples)
            done.touch()
        self.known = self.requests()

    def requests(self, namespace: str | None = None) -> list[data.ChatRequest]:
        """Return a request for each number; in the namespace that has drawn it first when none is named."""
        return [asked(number, str(number), namespace or _first(number, self.keys)) for number in self.numbers]

    @contextlib.asynccontextmanager
    async def pipeline(self) -> AsyncIterator[cachepipe.OnlineAPI]:
        async with cachepipe.OnlineAPI(_Appender(), self.folder) as pipeline:
            yield pipeline

    def right(self, got: list[Response], _: Any) -> None:
        equal([response.data for response in got], [[answer(number, 0)] for number in self.numbers])
        expect(all(response.cached == [True] for response in got), "an answer was not from the cache")


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield the tables; the caches are built first, which takes minutes, or found in ``--keep``."""
    where = folder if sizes.keep is None or sizes.check else sizes.keep / "scale"
    where.mkdir(parents=True, exist_ok=True)
    count = sizes.pick(2000, 40)
    small = _Cache(where, sizes.pick(SMALL, 200), count)
    large = _Cache(where, sizes.pick(LARGE, 600), count)
    async with small.pipeline() as one, large.pipeline() as other:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FreshIds)  # new ids on old questions are what a miss is here
            yield [
                Table("a known draw, one at a time", _pair(_hit, (small, one), (large, other))),
                Table("a new draw, alone", _pair(_draw, (small, one), (large, other))),
                Table("a miss of a new question, one at a time", _pair(_miss, (small, one), (large, other))),
                Table(
                    "opening the cache, a hit, closing it", _pair(_open, (small, one), (large, other)), "ms"
                ),
                Table("whole processes of the command line", _commands(small, large), "ms"),
            ]


_Sized = tuple[_Cache, cachepipe.OnlineAPI]


def _pair(entry: Callable[..., Entry], small: _Sized, large: _Sized) -> list[Entry]:
    """Return the entry at both sizes: the smaller one is what the larger is divided by."""
    return [entry(*small, "floor", {}), entry(*large, "subject", {small[0].name: 2.0})]


def _hit(cache: _Cache, pipeline: cachepipe.OnlineAPI, role: Role, goals: Goals) -> Entry:
    async def ask(_: Any) -> list[Response]:
        with cachepipe.run():
            return [await pipeline.request(request) for request in cache.known]

    return Entry(cache.name, ask, cache.right, len(cache.known), role, goals)


def _draw(cache: _Cache, pipeline: cachepipe.OnlineAPI, role: Role, goals: Goals) -> Entry:
    async def ask(requests: list[data.ChatRequest]) -> list[Response]:
        return [await pipeline.request(request) for request in requests]

    def prepare(_: int) -> list[data.ChatRequest]:
        return cache.requests(f"new {uuid.uuid4()}")  # a kept cache has the namespaces of earlier runs

    return Entry(cache.name, ask, cache.right, len(cache.known), role, goals, prepare=prepare)


def _miss(cache: _Cache, pipeline: cachepipe.OnlineAPI, role: Role, goals: Goals) -> Entry:
    async def ask(requests: list[data.ChatRequest]) -> list[Response]:
        return [await pipeline.request(request) for request in requests]

    def prepare(_: int) -> list[data.ChatRequest]:
        run = uuid.uuid4()
        return [asked(f"{run} {number}", str(number), "misses") for number in range(len(cache.known))]

    def right(got: list[Response], _: Any) -> None:
        expect(all(response.cached == [False] for response in got), "an answer was no miss")
        expect(len({response.data[0] for response in got}) == len(got), "two answers are one sample")

    return Entry(cache.name, ask, right, len(cache.known), role, goals, prepare=prepare)


def _open(cache: _Cache, _: cachepipe.OnlineAPI, role: Role, goals: Goals) -> Entry:
    async def ask(request: data.ChatRequest) -> Response:
        async with cachepipe.OnlineAPI(_Appender(), DiskStore(cache.folder)) as pipeline:
            with cachepipe.run():
                response = await pipeline.request(request)
            pipeline.store.close()  # type: ignore[attr-defined]
        return response

    def right(got: Response, _: Any) -> None:
        expect((got.data, got.cached) == ([answer(cache.numbers[-1], 0)], [True]), f"{got!r:.80} is no hit")

    return Entry(cache.name, ask, right, 1, role, goals, prepare=lambda _: cache.known[-1])


def _commands(small: _Cache, large: _Cache) -> list[Entry]:
    floor = "cachepipe path"
    entries = [_command(floor, ["path"], small, "floor", {})]
    for words in (["stats"], ["ls", "--limit", "20"], ["ls", "--namespace", "third", "--limit", "20"]):
        names = [f"cachepipe {' '.join(words)}, {cache.name}" for cache in (small, large)]
        entries.append(_command(names[0], words, small, "control", {floor: None}))
        entries.append(_command(names[1], words, large, "subject", {names[0]: None, floor: None}))
    return entries


def _command(name: str, words: list[str], cache: _Cache, role: Role, goals: Goals) -> Entry:
    def call(_: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cachepipe", *words, "--json", "--cache", str(cache.folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    def right(got: subprocess.CompletedProcess[str], _: Any) -> None:
        expect(got.returncode == 0, f"it failed: {got.stderr}")
        told = [orjson.loads(line) for line in got.stdout.splitlines()]
        if words[0] == "ls":
            expect(
                [info["samples"] for info in told] == [PER_KEY] * len(told) != [], "ls lists something else"
            )
        elif words[0] == "stats":
            drawn = {each["namespace"]: each["draws"] for each in told[0]["namespaces"]}
            expect(drawn["third"] == drawn["first"] == cache.keys // 2, f"stats counts {drawn}")

    return Entry(name, call, right, 1, role, goals)
