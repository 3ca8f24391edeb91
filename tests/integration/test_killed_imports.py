"""Imports killed for real, midway: the cache is sound, and the same import completes it (C7, C12)."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
from itertools import count
from pathlib import Path

import forked
import pytest
from profiles import sized

from cachepipe import DiskStore, LostSamples, OnlineAPI, Request, Response, verify
from cachepipe.contract.keys import question
from cachepipe.removing import discard
from cachepipe.sharing import export, opened

SCRIPT = """
import os, signal, socket, sqlite3, sys, warnings
warnings.simplefilter("ignore")  # of the server, which may lose a second
from cachepipe import importers, sharing
from cachepipe.importers import adding

kind, target, at, *sources = sys.argv[1:]
steps = []

def step(what):
    steps.append(what)
    if at in (what, str(len(steps))):
        os.kill(os.getpid(), signal.SIGKILL)

class Deadly(sqlite3.Connection):
    what = ""

    def executemany(self, sql, *arguments):
        self.what = " of samples" if sql.startswith("INSERT INTO Cache(") else self.what
        return super().executemany(sql, *arguments)

    def execute(self, sql, *arguments):
        if sql != "COMMIT":
            return super().execute(sql, *arguments)
        what, self.what = self.what, ""
        step(f"before a commit{what}")
        result = super().execute(sql, *arguments)
        step(f"after a commit{what}")
        return result

send = socket.socket.sendall

def deadly(self, *arguments):
    step("send")
    return send(self, *arguments)

if "://" in target:
    socket.socket.sendall = deadly
else:
    connect = sqlite3.connect
    sqlite3.connect = lambda *a, **k: connect(*a, factory=Deadly, **k)
sharing._BATCH = adding._TOGETHER = 2  # questions of a transaction
if kind == "bundle":
    sharing.import_(sources[0], target)
elif kind == "batch":
    importers.import_batch(sources[0], sources[1:], target, namespace="x")
else:
    importers.import_cachesaver(sources[0], sources[1], target)
for what in steps:
    print(what)
"""
CACHESAVER = Path(__file__).parents[1] / "data" / "cachesaver" / "cache"


class Model:
    """Gives each sample a number of its own."""

    cache_scope = "model"

    def __init__(self):
        self.numbers = count()

    async def request(self, request):
        return Response([f"{request.prompt} {next(self.numbers)}" for _ in range(request.n)])


async def fill(cache, *asked):
    async with OnlineAPI(Model(), cache) as pipeline:
        for prompt, n, namespace in asked:
            await pipeline.request(Request(prompt, n=n, namespace=namespace))


def chat(text):
    return {"model": "ngram-1", "messages": [{"role": "user", "content": text}]}


def result(name, text):
    message = {"role": "assistant", "content": text}
    body = {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
    response = {"status_code": 200, "body": body}
    return {"id": f"row-{name}", "custom_id": name, "error": None, "response": response}


def lines_of(path, items):
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    return str(path)


def bundle_in(folder):
    """A bundle of five questions, of which two namespaces have drawn, with a discarded sample."""
    source = folder / "source"
    asyncio.run(fill(source, *((f"q{i % 5}", 1 + i % 3, f"run-{i % 2}") for i in range(10))))
    discard(source, question(Request("q3"), "model").key, 0, "a refusal")
    export(source, folder / "bundle")
    return [str(folder / "bundle")]


def batch_in(folder):
    """A batch of nine requests, some of which ask the same, and its results."""
    asked = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": chat(f"question {i // 2}"),
        }
        for i in range(9)
    ]
    results = [result(str(i), f"answer {i}") for i in range(9)]
    return [lines_of(folder / "in.jsonl", asked), lines_of(folder / "out.jsonl", results)]


def cachesaver_in(folder):
    """A folder of CacheSaver, and the requests of four of its entries."""
    asked = [
        {**chat("Name a city."), "temperature": 0.7},
        {**chat("Name a river."), "max_tokens": 40, "stop": ["x", "y"]},
        {**chat("Name a lake."), "max_tokens": 20},
        {**chat("Name a sea."), "max_tokens": 20},
    ]
    return [str(CACHESAVER), lines_of(folder / "requests.jsonl", [{"kwargs": each} for each in asked])]


def contents(cache):
    """What a cache holds beside its own question: by key, the samples, and the draws by the ids of theirs."""
    with opened(cache) as store:
        return {
            entry.key: (
                [(sample.id, sample.header, sample.payload, sample.discarded) for sample in entry.samples],
                {
                    draw: [segment._replace(number=0) for segment in each]
                    for draw, each in entry.draws.items()
                },
                entry.users,
            )
            for entry in store.entries()
            if entry.key != question(Request("mine"), "model").key
        }


SOURCES = {"bundle": bundle_in, "batch": batch_in, "cachesaver": cachesaver_in}


def run(*arguments):
    """Run the script in a process of its own; return its exit code, its output and its errors."""
    words = [sys.executable, "-W", "error", "-c", SCRIPT, *arguments]
    done = forked.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["folder", "server"])
def new(request, tmp_path):
    """A function that makes a cache with a sample of its own, and returns its folder or URL."""
    if request.param == "server":
        new_url = request.getfixturevalue("new_valkey_url")
    else:
        numbers = count()
        new_url = lambda: str(tmp_path / f"cache {next(numbers)}")  # noqa: E731

    def make():
        cache = new_url()
        asyncio.run(fill(cache, ("mine", 1, "mine")))
        return cache

    return make


@pytest.mark.parametrize("kind", SOURCES)
def test_c7_an_import_that_was_killed_leaves_a_sound_cache_and_the_same_import_completes_it(
    kind, new, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    sources = SOURCES[kind](tmp_path)

    def imported(cache, at):
        code, told, errors = run(kind, cache, str(at), *sources)
        assert code == (-signal.SIGKILL if at else 0), errors
        return told

    whole, told = new(), []
    steps = imported(whole, 0).splitlines()
    last = len(steps) - 4  # a server is asked for much before it gets anything
    if "send" not in steps:  # of the last transaction, the samples are there and the ledger is not
        last = len(steps) - steps[::-1].index("after a commit of samples")
    for number in sized([last], sorted({*range(1, last, max(1, last // 10)), last})):
        cache = new()
        imported(cache, number)
        told.append(contents(cache))
        assert verify(cache).problems == {}, number
        imported(cache, 0)
        assert verify(cache).problems == {}, number
        assert contents(cache) == contents(whole)
    assert any(each and each != contents(whole) for each in told)  # it was killed midway


def test_c12_what_a_killed_import_has_left_is_removed_when_the_cache_is_opened(tmp_path):
    sources, cache = bundle_in(tmp_path), str(tmp_path / "cache")
    asyncio.run(fill(cache, ("mine", 1, "mine")))
    code, _, errors = run("bundle", cache, "after a commit of samples", *sources)
    assert code == -signal.SIGKILL, errors
    rows = sqlite3.connect(tmp_path / "cache" / "cache.db")
    count_rows = "SELECT count(*) FROM Cache"
    [(left,)] = rows.execute(count_rows)
    assert left > 1
    with pytest.warns(LostSamples, match=f"held {left - 1} samples of questions that its"):
        DiskStore(cache).close()
    assert rows.execute(count_rows).fetchall() == [(1,)]
    rows.close()
    assert verify(cache).problems == {}
