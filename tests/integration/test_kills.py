"""Processes killed for real, at every point that matters; then the work is run again (C1, C2, C7)."""

from __future__ import annotations

import asyncio
import collections
import json
import sqlite3
import subprocess
import sys

import forked
import pytest
from profiles import sized

import cachepipe
from cachepipe import DiskStore, OnlineAPI, Request, Response
from cachepipe.contract.draws import label

WARNINGS = ["-W", "error", "-W", "ignore:most requests"]

SCRIPT = """
import asyncio, itertools, json, os, signal, sqlite3, sys
where, at, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
at_call, at_statement, at_commit, after_commit = (itertools.count(1) for _ in range(4))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(sqlite3.Connection):
    def _step(self, run, sql, *arguments):
        commit = sql == "COMMIT"
        if where == "statement" and next(at_statement) == at:
            die()
        if where == "before commit" and commit and next(at_commit) == at:
            die()
        result = run(sql, *arguments)
        if where == "after commit" and commit and next(after_commit) == at:
            die()
        return result

    def execute(self, sql, *arguments):
        return self._step(super().execute, sql, *arguments)

    def executemany(self, sql, *arguments):
        return self._step(super().executemany, sql, *arguments)

connect = sqlite3.connect
sqlite3.connect = lambda *a, **k: connect(*a, factory=Deadly, **k)

from cachepipe import OnlineAPI, Request, Response

class Model:
    max_n = 2
    async def request(self, request):
        call = next(at_call)
        if where == "call" and call == at:
            die()
        for _ in range(call % 3):
            await asyncio.sleep(0)
        return Response([f"{request.prompt}/{call}/{i}" for i in range(request.n + call % 2)])

async def main():
    pipeline = OnlineAPI(Model(), folder)
    async def one(prompt, n, request_id, namespace):
        answer = await pipeline.request(Request(prompt, n=n, request_id=request_id, namespace=namespace))
        print(json.dumps([prompt, n, request_id, namespace, answer.data]), flush=True)
    for wave in range(9):
        await asyncio.gather(
            *(
                one(f"q{i % 3}", 1 + i % 3, str(wave // 2), namespace)
                for i in range(3)
                for namespace in ("x", "y")
            )
        )
    await pipeline.close()
    if where == "never":
        print(json.dumps([next(count) - 1 for count in (at_call, at_commit)]), flush=True)
asyncio.run(main())
"""

WAVES = [
    [(f"q{i % 3}", 1 + i % 3, str(wave // 2), namespace) for i in range(3) for namespace in ("x", "y")]
    for wave in range(9)
]
"""The work of the script: 9 waves of 6 requests for 1 to 3 samples of 3 questions, in 2 namespaces."""


class Model:
    """Goes on where the killed process was."""

    max_n = 2

    def __init__(self):
        self.made = []

    async def request(self, request):
        await asyncio.sleep(0)
        data = [f"{request.prompt}/again/{len(self.made) + i}" for i in range(request.n)]
        self.made += data
        return Response(data)


def check_ledger(folder):
    """What is taken is what draws hold, and what is listed is stored."""
    ledger = sqlite3.connect(folder / "ledger.cache.db")
    assert ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    spans = collections.defaultdict(set)
    for owner, key, start, stop in ledger.execute("SELECT owner, key, start, stop FROM intervals"):
        spans[owner, key].update(range(start, stop))
    held = collections.defaultdict(set)
    for owner, key, indices in ledger.execute("SELECT namespace, key, indices FROM segments"):
        numbers = {int(index) for index in str(indices).split(",")}
        assert held[owner, key].isdisjoint(numbers), "C1: two draws of a namespace share a sample"
        held[owner, key] |= numbers
    assert {place: taken for place, taken in spans.items() if place[0]} == held
    assert ledger.execute("SELECT count(*) FROM pending").fetchone() == (0,)
    names = {name: key for key, name in ledger.execute("SELECT id, key FROM keys")}
    ledger.close()
    shelf = sqlite3.connect(folder / "cache.db")
    assert shelf.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    stored = collections.defaultdict(set)
    for (place,) in shelf.execute("SELECT key FROM Cache"):
        key, index = place.split("/")
        stored[names[key]].add(int(index))
    shelf.close()
    assert {key: listed for (owner, key), listed in spans.items() if not owner} == stored


def stored_in(folder):
    """Return the samples that lie on the shelf, whatever the ledger says."""
    store = DiskStore(folder)
    found = collections.defaultdict(set)
    for info in store.keys(""):
        for index in range(200):
            if store.status([(info.key, index)]) == ["stored"]:
                found[info.key].add(index)
    store.close()
    return found


async def again(folder):
    """Run the same work again, and return what each draw got and what was generated for it."""
    model, got = Model(), {}
    async with OnlineAPI(model, folder) as pipeline:
        counts = collections.Counter()
        for wave in WAVES:
            answers = await asyncio.gather(
                *(
                    pipeline.request(Request(prompt, n=n, request_id=request_id, namespace=namespace))
                    for prompt, n, request_id, namespace in wave
                )
            )
            for asked, answer in zip(wave, answers, strict=True):
                prompt, _, request_id, namespace = asked
                got[*asked, counts[prompt, request_id, namespace]] = answer
                counts[prompt, request_id, namespace] += 1
        model.unreported = pipeline.stats().unreported
    return model, got


def killed(folder, where, at):
    """Return what the script's callers received before it was killed, or all of it."""
    process = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:most requests",
            "-c",
            SCRIPT,
            where,
            str(at),
            str(folder),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == ""
    assert process.returncode in (0, -9)
    return process.returncode == -9, [json.loads(line) for line in process.stdout.splitlines()]


POINTS = [
    *(("call", at) for at in (1, 2, 5, 9, 13)),
    *(("before commit", at) for at in (1, 2, 3, 4, 5, 6, 9, 12)),
    *(("after commit", at) for at in (1, 2, 3, 4, 5, 6, 9, 12)),
    *(("statement", at) for at in (20, 33, 47, 61, 75, 90, 110, 140, 170, 210)),
]


@pytest.mark.parametrize(("where", "at"), POINTS[:: sized(2, 1)])
def test_a_rerun_after_a_kill_keeps_every_promise(tmp_path, where, at):
    folder = tmp_path / "cache"
    dead, received = killed(folder, where, at)
    assert dead, "the script ended before the point came: choose an earlier one"
    before = stored_in(folder)
    model, got = asyncio.run(again(folder))

    # C2 and C7: what a caller has seen comes again, at the same place.
    counts = collections.Counter()
    for prompt, n, request_id, namespace, data in received:
        place = (prompt, n, request_id, namespace)
        same = [answer.data for asked, answer in got.items() if asked[:4] == place]
        assert data in same
        counts[place] += 1

    # C1: within a namespace, no sample is given twice.
    given = collections.defaultdict(list)
    for (prompt, *_, namespace, _), answer in got.items():
        given[namespace, prompt] += answer.data
    assert all(len(samples) == len(set(samples)) for samples in given.values())

    # C4 and C7: every stored sample is used before one is generated, so none was lost.
    used = collections.defaultdict(set)
    for answer in got.values():
        used[answer.key].update(answer.indices)
    for key, indices in before.items():
        assert indices <= used[key] or not model_made(model, got, key)

    # C6: false exactly for what was generated now, less what is counted as unreported.
    fresh = [sample for a in got.values() for sample, old in zip(a.data, a.cached, strict=True) if not old]
    assert set(fresh) <= set(model.made)
    assert len(fresh) == len(set(fresh)) == len(model.made) - model.unreported
    assert model.unreported <= 3, "a kill costs at most the samples of the commit that it cut short"
    check_ledger(folder)

    # And a third run is free and the same.
    idle, third = asyncio.run(again(folder))
    assert idle.made == []
    assert {place: answer.data for place, answer in third.items()} == {
        place: answer.data for place, answer in got.items()
    }


def model_made(model, got, key):
    """Return what the rerun generated for a key."""
    prompt = next(place[0] for place, answer in got.items() if answer.key == key)
    return [sample for sample in model.made if sample.startswith(f"{prompt}/")]


def test_the_points_lie_within_the_script(tmp_path):
    dead, lines = killed(tmp_path / "cache", "never", 0)
    assert not dead
    calls, _ = lines.pop()
    assert calls >= max(at for where, at in POINTS if where == "call")
    assert len(lines) == 54
    check_ledger(tmp_path / "cache")


DISCARDING = """
import asyncio, os, signal, sys
import cachepipe
from cachepipe import DiskStore, OnlineAPI, Request, Response
from cachepipe.stores.base import Discard

class Model:
    cache_scope = "m"
    async def request(self, request):
        if request.n == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Response([f"{request.n}/{i}" for i in range(request.n)])

async def main():
    store = DiskStore(sys.argv[1])
    pipeline = OnlineAPI(Model(), store)
    await pipeline.request(Request("q", n=3, request_id="other", namespace="b"))
    drawn = await pipeline.request(Request("q", n=2, namespace="a"))
    await store.apply([Discard(drawn.key, drawn.indices[0], "a refusal")])
    with cachepipe.run():
        await pipeline.request(Request("q", n=3, namespace="a"))

asyncio.run(main())
"""
"""Killed while the third sample of a draw is generated; what replaces its first one is stored."""


class Broken:
    cache_scope = "m"

    async def request(self, request):
        raise RuntimeError(f"no {request.n} samples today")


@pytest.mark.parametrize(("n", "left"), [(0, (0, 1)), (1, (2, 1)), (2, (2, 1))])
def test_c8_what_a_killed_process_put_in_place_of_a_discarded_sample(tmp_path, n, left):
    """It stands as far as it was delivered to a run that makes the same draw; else a failure undoes it."""
    process = forked.run(
        [sys.executable, "-W", "error", "-c", DISCARDING, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (-9, "")

    async def main():
        store = DiskStore(tmp_path / "cache")
        async with OnlineAPI(Broken(), store) as pipeline:
            if n:
                answer = await pipeline.request(Request("q", n=n, namespace="a"))
                assert list(answer.indices) == [2, 1][:n]
            with cachepipe.run(), pytest.raises(RuntimeError, match="no 1 samples"):
                await pipeline.request(Request("q", n=3, namespace="a"))
            assert [info.indices for info in store.draws(namespace=label("a"))] == [left]
            if not n:
                answer = await pipeline.request(Request("q", request_id="x", namespace="a"))
                assert (answer.indices, answer.cached) == ((2,), [True])
        store.close()

    asyncio.run(main())
