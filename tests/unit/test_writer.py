"""The thread that writes to a store in a folder: when it is used, when it ends, and what a lock costs."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest

import cachepipe.stores.sums
import cachepipe.stores.writer
from cachepipe import DiskStore, OnlineAPI, Request, StoreError, StoreLocked
from cachepipe.stores.base import ReleaseLease
from cachepipe.testing import ScriptedModel

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def known(store):
    """Return a key that a store knows."""
    pipeline = OnlineAPI(ScriptedModel(), store)
    asyncio.run(pipeline.request(Request("known")))
    return pipeline.key(Request("known"))


def put_to_writer(store, key):
    """Let a store's writer thread write something; return the thread."""
    written = threading.Event()
    store._writer.put([ReleaseLease(key, [0])], lambda _: written.set())
    thread = store._writer._thread
    assert thread is not None
    assert written.wait(20)
    return thread


@pytest.mark.anyio
async def test_c8_when_the_ledger_stays_locked_all_who_wait_fail_together(tmp_path, monkeypatch, locked):
    monkeypatch.setattr(cachepipe.stores.writer, "LOCK_TIMEOUT", 0.5)
    pipeline = OnlineAPI(ScriptedModel(), tmp_path)
    await pipeline.request(Request("w"))
    with locked(tmp_path):
        async with asyncio.timeout(6):  # one after the other they would take 20 s
            answers = await asyncio.gather(
                *(pipeline.request(Request(f"p{number}")) for number in range(40)), return_exceptions=True
            )
    assert {isinstance(answer, StoreError) for answer in answers} == {True}
    await pipeline.close()


def test_what_is_queued_just_as_the_thread_stops_waiting_is_written():
    class Late(threading.Condition):
        """Its first wait ends with a timeout, just after something was queued."""

        def wait(self, timeout=None):
            if waited:
                return super().wait(timeout)
            waited.append(timeout)
            writer._queue.append(([ReleaseLease("k", [1])], lambda _: written.set()))
            return False

    class Store:
        identity = "store"

        def write(self, operations):
            return [None] * len(operations)

        def tidy(self):
            pass

    waited, written = [], threading.Event()
    writer = cachepipe.stores.writer.Writer(Store())
    writer._condition = Late()
    writer.put([ReleaseLease("k", [0])], lambda _: None)
    assert written.wait(20)
    writer.stop()


def test_c8_what_queues_behind_a_lock_waits_for_it_once_and_fails_together(monkeypatch):
    monkeypatch.setattr(cachepipe.stores.writer, "LOCK_TIMEOUT", -1.0)
    monkeypatch.setattr(cachepipe.stores.writer, "_IDLE", 0.01)
    begun, gate, tried, told = threading.Event(), threading.Event(), [], []

    class Store:
        identity = "locked"

        def write(self, operations):
            tried.append(len(operations))
            begun.set()
            gate.wait(20)
            raise cachepipe.stores.writer.Locked

        def tidy(self):
            pass

    writer = cachepipe.stores.writer.Writer(Store())
    writer.put([ReleaseLease("k", [0])], told.append)
    assert begun.wait(20)
    for _ in range(4):
        writer.put([ReleaseLease("k", [0])], told.append)
    gate.set()
    writer.stop()
    assert tried == [1, 4]
    assert [type(error) for error in told] == [StoreLocked] * 5


@pytest.mark.parametrize(("durability", "inline"), [("full", False), ("process", True)])
def test_full_durability_never_writes_on_the_loop_s_thread(tmp_path, durability, inline):
    store = DiskStore(tmp_path, durability=durability)
    key = known(store)
    results = store.apply_now([ReleaseLease(key, [0])])
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
def test_a_pipeline_dropped_after_its_threads_ran_leaves_no_thread_and_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cachepipe.stores.writer, "_IDLE", 0.01)
    monkeypatch.setattr(cachepipe.stores.sums, "SECONDS", 0.01)
    stays = DiskStore(tmp_path)  # keeps what the folder's own opening costs
    files = len(list(Path("/proc/self/fd").iterdir()))
    threads = set(threading.enumerate())
    for number in range(3):
        pipeline = OnlineAPI(ScriptedModel(), tmp_path, scope="s")
        asyncio.run(pipeline.request(Request(f"p{number}")))
        for thread in set(threading.enumerate()) - threads:
            if thread.name == "cachepipe-sums":
                thread.join(20)
        put_to_writer(pipeline.store, pipeline.key(Request("p"))).join(20)
        store = weakref.ref(pipeline.store)
        del pipeline
        gc.collect()
        assert store() is None, "somebody holds it"
    assert set(threading.enumerate()) <= threads  # those of earlier tests may have ended meanwhile
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 2
    stays.close()
