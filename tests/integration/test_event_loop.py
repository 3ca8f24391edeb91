"""The event loop turns while the disk is slow and while another process holds a lock."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time

import forked
import pytest
from blockbuster import blockbuster_ctx

import cachepipe
from cachepipe import DiskStore, OnlineAPI, Request, Response, open_store
from cachepipe.cache import turns as line_turns
from cachepipe.stores.base import Claim, Commit
from cachepipe.testing import FaultyStore, ScriptedModel

pytestmark = pytest.mark.anyio


class Model:
    def __init__(self):
        self.calls = 0

    async def request(self, request):
        self.calls += 1
        await asyncio.sleep(0)
        return Response([f"{request.prompt}#{self.calls}.{i}" for i in range(request.n)])


async def turns(count):
    """Give the loop turns; none of them may be spent on waiting for a lock."""
    begun = time.monotonic()
    for _ in range(count):
        await asyncio.sleep(0)
    assert time.monotonic() - begun < 2, "the loop stood still"


def asking(pipeline, *prompts, **more):
    return [asyncio.ensure_future(pipeline.request(Request(prompt, **more))) for prompt in prompts]


@pytest.mark.parametrize("name", ["ledger.cache.db", "cache.db"])
async def test_the_loop_turns_and_hits_are_served_while_a_file_is_locked(tmp_path, name, locked, monkeypatch):
    monkeypatch.setattr(line_turns, "CLAIM_SECONDS", 0.05)
    folder, model = tmp_path / "cache", Model()
    async with OnlineAPI(model, folder) as first:
        known = await first.request(Request("known", n=2))
    async with asyncio.timeout(30), OnlineAPI(model, folder) as pipeline:
        with locked(folder, name):
            misses = asking(pipeline, *"abc")
            await turns(300)
            hits = [
                await pipeline.request(Request("known", n=2, request_id=None)),
            ]
            await turns(300)
            assert not any(task.done() for task in misses), "the lock was not held, so nothing is shown"
        answers = await asyncio.gather(*misses)
    assert hits[0].data == known.data
    assert hits[0].cached == [True, True]
    assert [answer.cached for answer in answers] == [[False]] * 3


@pytest.fixture
def holding(tmp_path):
    """Another process that holds the ledger's write lock until it is told to let go."""
    store = DiskStore(tmp_path / "cache")
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.readline(); c.execute('ROLLBACK')"
    )
    holder = forked.Popen(
        [sys.executable, "-c", script, str(tmp_path / "cache" / "ledger.cache.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    yield store, lambda: (holder.stdin.write("\n"), holder.stdin.flush())
    holder.kill()
    holder.communicate()
    store.close()


async def test_the_loop_turns_while_another_process_holds_the_lock(holding):
    store, let_go = holding
    async with asyncio.timeout(30), OnlineAPI(Model(), store) as pipeline:
        tasks = asking(pipeline, *map(str, range(100)))
        await turns(500)
        assert not any(task.done() for task in tasks)
        assert pipeline.stats().calls == 0, "nothing is spent before it is claimed"
        let_go()
        answers = await asyncio.gather(*tasks)
    assert all(answer.cached == [False] for answer in answers)


async def test_a_pipeline_opens_on_an_existing_cache_while_a_file_is_locked(tmp_path, locked):
    folder, model = tmp_path / "cache", Model()
    async with OnlineAPI(model, folder) as first:
        known = await first.request(Request("known"))
    with locked(folder, "ledger.cache.db"), locked(folder, "cache.db"):
        opening = asyncio.get_running_loop().run_in_executor(None, OnlineAPI, model, folder)
        async with asyncio.timeout(10):
            pipeline = await opening
        assert (await pipeline.request(Request("known"))).data == known.data
    await pipeline.close()


@contextlib.contextmanager
def watched():
    """Raise an error where something blocks the event loop, apart from SQLite."""
    with blockbuster_ctx() as guard:
        for function in guard.functions:
            if "sqlite3" in function:
                guard.functions[function].deactivate()
        yield guard


async def test_nothing_that_blocks_is_called_on_the_loop_while_hits_and_misses_are_served(tmp_path):
    """Apart from SQLite's short reads and writes, which never wait for a lock, and one look at a file.

    The look at the ledger's inode, ten times a second at most, notices a folder that was moved or deleted.
    """
    async with OnlineAPI(Model(), tmp_path / "cache") as pipeline:
        await asyncio.gather(*asking(pipeline, "warm"))
        with watched() as guard:
            guard.functions["os.stat"].can_block_in("cachepipe/stores/disk.py", "_inode")
            misses = await asyncio.gather(*asking(pipeline, *map(str, range(200)), n=2))
            hits = await asyncio.gather(*asking(pipeline, *map(str, range(200)), namespace="other", n=2))
    assert [answer.data for answer in misses] == [answer.data for answer in hits]


async def test_nothing_waits_for_a_server_on_the_loop(new_valkey_url):
    """Also while samples of other processes are awaited; a closed loop or another thread may wait.

    The copies on this machine are read on the loop.
    """
    url = new_valkey_url()
    there, _ = open_store(f"{url}&timeout=4")
    there.identity = "played by another process"
    slow = ScriptedModel(hold=True, cache_scope="m")
    model = ScriptedModel(cache_scope="m")
    async with OnlineAPI(model, url) as pipeline, OnlineAPI(slow, there) as other:
        await asyncio.gather(*asking(pipeline, "warm", namespace="here"))
        await asyncio.gather(*asking(other, "warm", namespace="there"))
        with watched():
            first = asking(other, "held", namespace="x")
            await slow.begun(1)
            waits = asking(pipeline, "held", namespace="y")
            misses = await asyncio.gather(*asking(pipeline, *map(str, range(200)), n=2))
            hits = await asyncio.gather(*asking(pipeline, *map(str, range(200)), namespace="other", n=2))
            slow.open()
            await asyncio.gather(*first, *waits)
        with cachepipe.run(), watched():
            again = await asyncio.gather(*asking(pipeline, *map(str, range(200)), n=2))
    assert [answer.data for answer in misses] == [answer.data for answer in hits]
    assert [answer.data for answer in misses] == [answer.data for answer in again]
    assert waits[0].result().data == first[0].result().data
    there.close()


async def test_a_slow_store_keeps_requests_waiting_and_the_loop_turning(tmp_path):
    store = FaultyStore(DiskStore(tmp_path / "cache"))
    pipeline = OnlineAPI(Model(), store)
    with store.held():
        tasks = asking(pipeline, "a", "b")
        await turns(200)
        assert not any(task.done() for task in tasks)
    answers = await asyncio.gather(*tasks)
    assert [answer.cached for answer in answers] == [[False], [False]]
    await pipeline.close()
    store.close()


async def test_a_thousand_concurrent_misses_make_few_transactions(tmp_path):
    store = FaultyStore(DiskStore(tmp_path / "cache"))
    async with OnlineAPI(Model(), store) as pipeline:
        answers = await asyncio.gather(*asking(pipeline, *map(str, range(1000))))
    assert all(answer.cached == [False] for answer in answers)
    claims = [t for t in store.transactions if any(type(one) is Claim for one in t)]
    commits = [t for t in store.transactions if any(type(one) is Commit for one in t)]
    assert len(claims) <= 20
    assert len(commits) <= 20
    assert sum(type(one) is Commit for t in store.transactions for one in t) == 1000
    store.close()


async def test_answers_that_come_one_by_one_are_written_as_they_come(tmp_path):
    """C7: nobody waits for a group to fill."""
    gates = [asyncio.Event() for _ in range(3)]

    class Gated:
        async def request(self, request):
            await gates[int(request.prompt)].wait()
            return Response([request.prompt])

    async with OnlineAPI(Gated(), tmp_path / "cache") as pipeline:
        tasks = asking(pipeline, *"012")
        for number in (2, 0, 1):
            gates[number].set()
            await tasks[number]
            reader = DiskStore(tmp_path / "cache")
            assert reader.totals()["samples"] == sum(task.done() for task in tasks)
            reader.close()


@pytest.mark.parametrize("kind", [Claim, Commit])
async def test_a_lock_in_the_middle_of_a_request_costs_nothing_but_time(tmp_path, kind, locked):
    store = FaultyStore(DiskStore(tmp_path / "cache"))
    asked, gate = asyncio.Event(), asyncio.Event()

    class Gated:
        async def request(self, request):
            asked.set()
            await gate.wait()
            return Response([request.prompt] * request.n)

    pipeline = OnlineAPI(Gated(), store)
    with contextlib.ExitStack() as stack:
        if kind is Claim:
            stack.enter_context(locked(tmp_path / "cache", "ledger.cache.db"))
        tasks = asking(pipeline, "a", n=3)
        await turns(50)
        if kind is Commit:
            await asked.wait()
            stack.enter_context(locked(tmp_path / "cache", "cache.db"))
        gate.set()
        await turns(200)
        assert not tasks[0].done(), "C7: a sample is durable before any caller sees it"
    async with asyncio.timeout(30):
        assert (await tasks[0]).data == ["a"] * 3
    await pipeline.close()
    store.close()
