"""Threads, forks and files that a cold review found wanting: each of these tests failed once."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import cachepipe.stores.writer
from cachepipe import AsyncBatcher, AsyncDeduplicator, DiskStore, MemoryStore, OnlineAPI, Request, Response
from cachepipe.stores.base import Forgo
from cachepipe.testing.models import ScriptedModel

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


class Model:
    async def request(self, request):
        await asyncio.sleep(0)
        return Response(["x"] * request.n)


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def ask(pipeline, prompt):
    return asyncio.run(pipeline.request(Request(prompt)))


def known(store):
    """Return a key that a store knows."""
    pipeline = OnlineAPI(ScriptedModel(), store)
    ask(pipeline, "known")
    return pipeline.key(Request("known"))


def put_to_writer(store, key):
    """Let a store's writer thread write something; return the thread."""
    written = threading.Event()
    store._writer.put([Forgo(key, [0])], lambda _: written.set())
    thread = store._writer._thread
    assert thread is not None
    assert written.wait(20)
    return thread


def script(text, *arguments):
    """Run a program of its own, so that no thread of the tests is forked."""
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# Threads and loops that have ended.


@LINUX
def test_threads_that_have_ended_leave_no_open_files(tmp_path):
    pipeline = OnlineAPI(Model(), tmp_path)
    for number in range(5):
        in_thread(ask, pipeline, f"warm{number}")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(30):
        in_thread(ask, pipeline, f"p{number}")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 12, "6 descriptors per thread would be 180"
    asyncio.run(pipeline.close())


def test_loops_that_are_closed_leave_their_figures_and_nothing_else():
    pipeline = OnlineAPI(Model(), MemoryStore())
    for number in range(20):
        ask(pipeline, f"p{number}")
    assert len(pipeline._cacher._engine.lanes()) <= 2
    assert (pipeline.stats().calls, pipeline.stats().generated) == (20, 20)
    asyncio.run(pipeline.close())


@pytest.mark.parametrize("kind", ["batcher", "deduplicator"])
def test_a_loop_s_lane_may_be_dropped_by_two_threads_at_once_while_a_third_adds_one(kind):
    """What another thread does while this one looks for closed loops is done at the worst moment of all."""
    stage = AsyncBatcher(Model()) if kind == "batcher" else AsyncDeduplicator(Model())

    class Closed:
        """A loop that is closed, and whose lane another thread drops just now."""

        def is_closed(self):
            stage._lanes.pop(self, None)
            stage._lanes[Open()] = None
            return True

    class Open:
        def is_closed(self):
            return False

    stage._lanes.update({Closed(): None, Closed(): None})
    assert asyncio.run(stage.request(Request("p"))).data == ["x"]
    assert [type(loop) for loop in stage._lanes if isinstance(loop, Closed | Open)] == [Open, Open]
    stage._lanes.clear()
    asyncio.run(stage.close())


# Files.


@pytest.mark.parametrize(("durability", "inline"), [("full", False), ("process", True)])
def test_full_durability_never_writes_on_the_loop_s_thread(tmp_path, durability, inline):
    store = DiskStore(tmp_path, durability=durability)
    key = known(store)
    results = store.apply_now([Forgo(key, [0])])
    assert (results is not None) is inline
    store.close()


def test_the_writer_thread_ends_when_it_is_idle_and_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cachepipe.stores.writer, "_IDLE", 0.01)
    store = DiskStore(tmp_path)
    key = known(store)
    ended = []
    for _ in range(2):
        ended.append(put_to_writer(store, key))
        ended[-1].join(20)
        assert not ended[-1].is_alive()
    assert ended[0] is not ended[1]
    store.close()


@LINUX
def test_a_pipeline_dropped_after_its_writer_thread_ran_leaves_no_thread_and_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cachepipe.stores.writer, "_IDLE", 0.01)
    stays = DiskStore(tmp_path)  # keeps what the folder's own opening costs
    files = len(list(Path("/proc/self/fd").iterdir()))
    threads = set(threading.enumerate())
    for number in range(3):
        pipeline = OnlineAPI(Model(), tmp_path, scope="s")
        ask(pipeline, f"p{number}")
        put_to_writer(pipeline.store, pipeline.key(Request("p"))).join(20)
        store = weakref.ref(pipeline.store)
        del pipeline
        gc.collect()
        assert store() is None, "somebody holds it"
    assert set(threading.enumerate()) == threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 2
    stays.close()


def test_a_close_moves_the_write_ahead_log_though_others_have_it_open(tmp_path):
    class Large:
        async def request(self, request):
            return Response(["x" * 2000] * request.n)

    stays = OnlineAPI(Large(), tmp_path)
    ask(stays, "w")
    moved = []
    for _ in range(4):

        async def session(tag):
            async with OnlineAPI(Large(), tmp_path) as pipeline:
                requests = (pipeline.request(Request(f"{tag}-{number}")) for number in range(300))
                await asyncio.gather(*requests)

        asyncio.run(session(len(moved)))
        moved.append((tmp_path / "cache.db").stat().st_size)
    asyncio.run(stays.close())
    assert moved[0] > 300 * 2000, "what was written is in the log alone"
    assert moved == sorted(set(moved))


# Forks.

FORKED = """
import asyncio, os, signal, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([request.prompt] * request.n)

def ask(prompt):
    return asyncio.run(pipeline.request(Request(prompt))).data

pipeline = OnlineAPI(Model(), sys.argv[1], scope="s")
ask("w")
begun, closed = os.pipe(), os.pipe()
child = os.fork()
if not child:
    ask("c1")
    os.write(begun[1], b"x")
    os.read(closed[0], 1)
    assert ask("c2") == ["c2"]
    os.kill(os.getpid(), signal.SIGKILL)
os.read(begun[0], 1)
asyncio.run(pipeline.close())
os.write(closed[1], b"x")
os.waitpid(child, 0)
"""


@FORKS
def test_c7_samples_of_a_forked_child_survive_its_parent_s_close_and_its_own_kill(tmp_path):
    script(FORKED, tmp_path)
    pipeline = OnlineAPI(ScriptedModel(), tmp_path, scope="s")
    asked = {prompt: pipeline.key(Request(prompt)) for prompt in ("w", "c1", "c2")}
    assert {prompt: len(list(pipeline.store.samples(key))) for prompt, key in asked.items()} == {
        "w": 1,
        "c1": 1,
        "c2": 1,
    }
    asyncio.run(pipeline.close())
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


IN_RUN = """
import asyncio, os, sys
import cachepipe
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([f"x{number}" for number in range(request.n)])

def ask(tag):
    print(tag, *asyncio.run(pipeline.request(Request("p"))).indices, flush=True)

def forked(tag):
    child = os.fork()
    if not child:
        ask(tag)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

pipeline = OnlineAPI(Model(), sys.argv[1])
ask("parent")
forked("child")
with cachepipe.run():
    ask("parent in run")
    forked("child in run")
"""


@FORKS
def test_c2_a_child_forked_inside_a_run_is_another_run(tmp_path):
    assert script(IN_RUN, tmp_path) == ["parent 0", "child 0", "parent in run 0", "child in run 0"]


def test_a_folder_opened_twice_is_still_open_for_other_processes(tmp_path):
    """Else another process that ends believes itself the last one, and removes the logs that are in use."""
    store = DiskStore(tmp_path)
    known(store)
    DiskStore(tmp_path).close()
    code = "import sys, cachepipe; cachepipe.DiskStore(sys.argv[1]).close()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    logs = sorted(path.name for path in tmp_path.glob("*-wal"))
    store.close()
    assert logs == ["cache.db-wal", "ledger.cache.db-wal"]
