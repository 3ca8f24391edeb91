"""Claims of the contract that a cold review found broken: each of these tests failed once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest

import cachepipe
import cachepipe.stores.writer
from cachepipe import (
    AsyncDeduplicator,
    Batch,
    CacheMiss,
    DiskStore,
    LocalAPI,
    MemoryStore,
    NotStored,
    OnlineAPI,
    OrderedLocalAPI,
    Request,
    Response,
    StoreError,
    StoreLocked,
    runs,
)
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.keys import provider_question
from cachepipe.stages import engine
from cachepipe.stores.base import Forgo
from cachepipe.testing.models import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


@dataclass
class Point:
    x: object


class Adapter:
    """A model with a provider's questions and its own way to present samples."""

    cache_scope = "https://api.example/v1/chat"

    def question(self, request, scope):
        body = {"messages": request.prompt, "model": "m"}
        return provider_question(scope or self.cache_scope, {"body": body})

    def present(self, value):
        return ("presented", value)

    async def request(self, request):
        return Response([f"a{number}" for number in range(request.n)])


def stored(store, key):
    return [sample.index for sample in store.samples(key)]


async def outcome(awaitable):
    return (await asyncio.gather(awaitable, return_exceptions=True))[0]


async def until(true):
    """Return when something that no event tells has become so."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.005)


class Lock:
    """The write lock of a folder's ledger, as another process holds it."""

    def __init__(self, folder):
        self.connection = sqlite3.connect(folder / "ledger.cache.db", isolation_level=None)
        self.connection.execute("BEGIN IMMEDIATE")

    def release(self):
        self.connection.execute("ROLLBACK")
        self.connection.close()


# Keys and draws.


@pytest.mark.parametrize(
    "make",
    [
        lambda model, store: OnlineAPI(model, store, batch_size=2),
        lambda model, store: OnlineAPI(model, store, in_flight=4),
        lambda model, store: LocalAPI(model, store, batch_size=8),
        OrderedLocalAPI,
    ],
)
async def test_c9_c10_an_adapter_behind_a_batcher_keeps_its_keys_and_presents_its_samples(make):
    store = MemoryStore()
    plain, batched = OnlineAPI(Adapter(), store), make(Adapter(), store)
    assert batched.key(Request("p")) == plain.key(Request("p"))
    async with asyncio.timeout(20):
        assert (await batched.request(Request("p"))).data == [("presented", "a0")]
        await batched.close()
    await plain.close()


async def test_c1_a_batch_that_cannot_read_a_hit_gives_its_draw_back_once(store):
    serial = iter(range(100))

    class Model:
        async def request(self, request):
            return Response([Point(next(serial)) for _ in range(request.n)])

    model = Model()
    good, bad = OnlineAPI(model, store, classes=[Point]), OnlineAPI(model, store)
    await good.request(Request("p"))
    await good.request(Request("p"))
    with cachepipe.run():
        with pytest.raises(StoreError):
            await bad.batch_request(Batch([Request("p")]))
        one = await good.request(Request("p"))
        other = await good.request(Request("p"))
    assert one.indices == (0,)
    assert other.indices == (1,), "C1: two requests of one run have the same draw"
    assert bad.stats().hits == 0
    await good.close()
    await bad.close()


async def test_c8_a_batch_that_misses_in_replay_claims_nothing(store):
    await OnlineAPI(ScriptedModel(), store).request(Request("p", namespace="a"))
    with cachepipe.run():
        replay = OnlineAPI(ScriptedModel(), store, mode="replay")
        with pytest.raises(CacheMiss) as missed:
            await replay.batch_request(Batch([Request("p", namespace="b"), Request("q", namespace="b")]))
        assert missed.value.request.prompt == "q"
        assert (await replay.request(Request("p", namespace="b"))).data == ["p#0"]


# Other processes, other loops, locked files.

ELSEWHERE = """
import asyncio, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return Response(["elsewhere"] * request.n)

async def main():
    async with OnlineAPI(Model(), sys.argv[1]) as pipeline:
        await pipeline.request(Request("p", namespace="a"))

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def waiting_for_another(pipeline, folder):
    """A request that awaits what another process generates, and what lets that process go on."""
    program = ELSEWHERE.replace("class Model:", 'class Model:\n    cache_scope = "s"')
    with subprocess.Popen(  # noqa: ASYNC220 - its pipes are read in a thread
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:

        def go_on():
            child.stdin.write("\n")
            child.stdin.flush()

        try:
            assert await asyncio.to_thread(child.stdout.readline) == "begun\n"
            task = asyncio.create_task(pipeline.request(Request("p", namespace="b")))
            await until(lambda: any(lane.strangers for lane in pipeline._cacher._engine.lanes()))
            yield task, go_on
        finally:
            child.kill()


async def test_c7_closing_waits_for_samples_that_another_process_generates(tmp_path, turns):
    pipeline = OnlineAPI(ScriptedModel(), tmp_path)
    await pipeline.close()
    pipeline = OnlineAPI(ScriptedModel(), tmp_path, scope="s")
    async with waiting_for_another(pipeline, tmp_path) as (task, go_on):
        closing = asyncio.create_task(pipeline.close())
        await turns(20)
        assert not pipeline._cacher._ended, "closed under a request in flight"
        go_on()
        async with asyncio.timeout(20):
            assert (await task).data == ["elsewhere"]
            await closing


async def test_c8_a_sample_whose_call_failed_here_may_come_from_another_process(tmp_path):
    async with OnlineAPI(ScriptedModel([ScriptedError()]), tmp_path, scope="s") as pipeline:
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("p", namespace="b"))
        async with waiting_for_another(pipeline, tmp_path) as (task, go_on):
            go_on()
            async with asyncio.timeout(20):
                assert (await task).data == ["elsewhere"]


READS = {
    "recall": lambda store, key: store.recall(Draw("-", key, "", 0), 1),
    "replay": lambda store, key: store.replay(Draw("-", key, "", 0), 1, IntervalSet()),
    "glance": lambda store, key: store.glance([(key, 0)]),
}


@pytest.mark.parametrize("read", READS)
async def test_c8_every_read_of_a_closed_store_says_that_it_was_closed(store, read):
    pipeline = OnlineAPI(ScriptedModel(), store)
    await pipeline.request(Request("p"))
    key = pipeline.key(Request("p"))
    READS[read](store, key)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        READS[read](store, key)


@pytest.mark.parametrize("read", READS)
async def test_c8_what_sqlite_says_of_a_damaged_ledger_is_a_store_error(tmp_path, read):
    store = DiskStore(tmp_path)
    pipeline = OnlineAPI(ScriptedModel(), store)
    await pipeline.request(Request("p"))
    with sqlite3.connect(tmp_path / "ledger.cache.db") as connection:
        for table in ("segments", "pending", "draws"):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
    connection.close()
    if read == "glance":  # what is stored is told without the ledger
        with pytest.raises(StoreError):
            store.glance([("0" * 64, 0)])
    else:
        with pytest.raises(StoreError):
            READS[read](store, pipeline.key(Request("p")))
    store.close()


async def ask_beside_a_loop_that_is_closed():
    begun, serial = threading.Event(), iter(range(100))

    class Model:
        async def request(self, request):
            if not next(serial):
                begun.set()
                await asyncio.Event().wait()
            return Response(["x"] * request.n)

    pipeline = OnlineAPI(Model(), MemoryStore())
    loop = asyncio.new_event_loop()

    def left():
        async def ask():
            asyncio.current_task().kept = asyncio.create_task(pipeline.request(Request("p", namespace="a")))
            while not begun.is_set():  # noqa: ASYNC110 - an event of threads
                await asyncio.sleep(0)

        loop.run_until_complete(ask())

    await asyncio.to_thread(left)
    waiting = asyncio.create_task(pipeline.request(Request("p", namespace="b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.close()
    async with asyncio.timeout(20):
        assert (await waiting).data == ["x"]
        await pipeline.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_c4_a_sample_in_the_making_on_a_loop_that_was_closed_is_taken_over():
    await ask_beside_a_loop_that_is_closed()
    gc.collect()  # what the closed loop has left is reported here, not in another test


def test_c4_a_claim_that_is_granted_after_its_loop_has_gone_is_undone(tmp_path, monkeypatch):
    pipeline = OnlineAPI(ScriptedModel(), tmp_path)
    asyncio.run(pipeline.request(Request("w")))
    lock = Lock(tmp_path)
    store, tried = pipeline.store, threading.Event()

    def write(operations, write=store.write):
        tried.set()
        return write(operations)

    async def abandoned():
        task = asyncio.create_task(pipeline.request(Request("p", namespace="a")))
        assert await asyncio.to_thread(tried.wait, 20)  # the writer thread has it, and waits for the lock
        assert not task.done()
        loop_gone.append(task)

    loop_gone = []
    monkeypatch.setattr(store, "write", write)
    asyncio.run(abandoned())
    lock.release()

    async def written():
        for _ in range(3):  # behind the claim, and behind what undoes it
            await pipeline.store.apply([Forgo(pipeline.key(Request("w")), [9])])

    asyncio.run(written())
    connection = sqlite3.connect(tmp_path / "ledger.cache.db")
    assert connection.execute("SELECT * FROM pending").fetchall() == []
    connection.close()
    assert [info.draw for info in pipeline.store.draws(namespace="=a")] == []
    asyncio.run(pipeline.close())


async def test_c8_when_the_ledger_stays_locked_all_who_wait_fail_together(tmp_path, monkeypatch):
    monkeypatch.setattr(cachepipe.stores.writer, "LOCK_TIMEOUT", 0.5)
    pipeline = OnlineAPI(ScriptedModel(), tmp_path)
    await pipeline.request(Request("w"))
    lock = Lock(tmp_path)
    try:
        async with asyncio.timeout(6):  # one after the other they would take 20 s
            answers = await asyncio.gather(
                *(pipeline.request(Request(f"p{number}")) for number in range(40)), return_exceptions=True
            )
    finally:
        lock.release()
    assert {isinstance(answer, StoreError) for answer in answers} == {True}
    await pipeline.close()


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
    writer.put([Forgo("k", [0])], told.append)
    assert begun.wait(20)
    for _ in range(4):
        writer.put([Forgo("k", [0])], told.append)
    gate.set()
    writer.stop()
    assert tried == [1, 4]
    assert [type(error) for error in told] == [StoreLocked] * 5


# Models, adapters and samples that are not as they should be.


@pytest.mark.parametrize("limit", ["4", 2.5])
async def test_c8_an_invalid_limit_of_a_model_is_an_error_not_a_hang(store, limit):
    class Model:
        max_n = limit

        async def request(self, request):
            return Response(["x"] * request.n)

    async def ask():
        async with OnlineAPI(Model(), store) as pipeline:
            await pipeline.request(Request("p"))

    with pytest.raises((TypeError, ValueError), match="max_n"):
        async with asyncio.timeout(5):
            await ask()


async def test_c8_an_adapter_that_cannot_present_a_sample_fails_the_request(store):
    class Model(Adapter):
        def present(self, value):
            raise ZeroDivisionError(value)

    async with asyncio.timeout(5), OnlineAPI(Model(), store) as pipeline:
        with pytest.raises(ZeroDivisionError):
            await pipeline.request(Request("p"))
        assert stored(store, pipeline.key(Request("p"))) == [0]


def unset():
    point = Point(1)
    del point.x
    return point


def deep():
    nested = []
    for _ in range(300):
        nested = [nested]
    return Point(nested)


@pytest.mark.parametrize("make", [deep, unset])
async def test_c7_a_sample_that_no_codec_takes_is_delivered_and_so_are_those_after_it(store, make):
    odd = make()
    async with (
        asyncio.timeout(10),
        OnlineAPI(ScriptedModel([["a", odd, "b"]]), store, classes=[Point]) as pipe,
    ):
        with pytest.warns(NotStored):
            answer = await pipe.request(Request("p", n=3))
        delivered = answer.data[1] is odd  # pytest cannot print it
        assert (answer.data[0], delivered, answer.data[2]) == ("a", True, "b")
        assert len(stored(store, pipe.key(Request("p")))) == 2


async def test_c7_an_integer_of_any_length_is_stored(store):
    async with asyncio.timeout(10), OnlineAPI(ScriptedModel([["a", 10**5000, "b"]]), store) as pipeline:
        answer = await pipeline.request(Request("p", n=3))
        equal = answer.data == ["a", 10**5000, "b"]
        with cachepipe.run():
            again = (await pipeline.request(Request("p", n=3))).data == answer.data
    assert (equal, again) == (True, True)


# Calls that nobody waits for.


@pytest.mark.parametrize("refused", [True, False], ids=["refused", "short"])
async def test_c4_a_merged_call_is_repeated_only_for_callers_that_still_wait(store, refused):
    model = ScriptedModel(hold=True)
    async with asyncio.timeout(10), OnlineAPI(model, store) as pipeline:
        tasks = [
            asyncio.create_task(pipeline.request(Request("p", request_id=str(number)))) for number in range(5)
        ]
        [call] = await model.begun(1)
        assert call.n == 5
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        model.hold = False
        if refused:
            call.fail(ScriptedError(status_code=400))
        else:
            call.release(1)
        assert len((await tasks[0]).data) == 1
    assert model.asked == ([5, 1] if refused else [5])


async def test_c4_the_other_calls_of_a_request_that_failed_in_bypass_are_stopped(store):
    model = ScriptedModel(max_n=1, hold=True)
    async with asyncio.timeout(10), OnlineAPI(model, store, mode="bypass") as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", n=5)))
        calls = await model.begun(5)
        calls[0].fail()
        with pytest.raises(ScriptedError):
            await task
        for call in calls:
            await call.over()
        assert [call.state for call in calls] == ["failed"] + ["cancelled"] * 4


async def test_c6_what_comes_for_a_request_that_failed_in_bypass_is_unreported(store):
    serial = iter(range(100))
    ended = []

    class Model:
        max_n = 1

        async def request(self, request):
            if not next(serial):
                raise ZeroDivisionError
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(request)
            return Response(["x"])  # it was paid for before it could be stopped

    async with asyncio.timeout(10), OnlineAPI(Model(), store, mode="bypass") as pipeline:
        with pytest.raises(ZeroDivisionError):
            await pipeline.request(Request("p", n=5))
        await until(lambda: not pipeline.stats().in_flight)
        stats = pipeline.stats()
        assert stats.generated == stats.unreported == len(ended) > 0


# Closing.


def test_c7_closing_on_one_loop_waits_for_requests_on_the_others(tmp_path, turns):
    begun, here = threading.Event(), []

    class Model:
        async def request(self, request):
            gate = asyncio.Event()
            here.append((asyncio.get_running_loop(), gate))
            begun.set()
            await gate.wait()
            return Response(["x"] * request.n)

    pipeline = OnlineAPI(Model(), tmp_path)
    key, answers = pipeline.key(Request("p")), []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(pipeline.request(Request("p")))))

    async def close():
        thread.start()
        assert await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(pipeline.close())
        loop, gate = here[0]
        await turns(5)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turns(5), loop))
        await turns(5)
        ended = pipeline._cacher._ended
        loop.call_soon_threadsafe(gate.set)
        async with asyncio.timeout(20):
            await closing
        assert not ended, "closed under the other loop's request"

    asyncio.run(close())
    thread.join(20)
    assert [answer.data for answer in answers] == [["x"]]
    store = DiskStore(tmp_path)
    assert stored(store, key) == [0]
    store.close()


async def test_c7_a_close_that_was_cancelled_can_be_finished(store, turns):
    model = ScriptedModel(hold=True)
    pipeline = OnlineAPI(model, store)
    task = asyncio.create_task(pipeline.request(Request("p")))
    await model.begun(1)
    first = asyncio.create_task(pipeline.close())
    await turns(5)
    first.cancel()
    await outcome(first)
    second = asyncio.create_task(pipeline.close())
    await turns(20)
    assert not second.done(), "returned with a request in flight"
    model.open()
    async with asyncio.timeout(10):
        await second
    assert task.done()
    assert task.result().data == ["p#0"]


async def test_c2_runs_of_stores_that_are_gone_are_forgotten():
    store = MemoryStore()
    identity = store.identity
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await pipeline.request(Request("p"))
        assert identity in runs._runs
    store.close()
    del pipeline, store
    gc.collect()
    assert identity not in runs._runs
    assert identity not in runs._open


# Modes, and the deduplicator's window.


async def test_replay_from_a_folder_that_does_not_exist_is_an_error_and_makes_nothing(tmp_path):
    folder = tmp_path / "typo"
    with pytest.raises(StoreError):
        OnlineAPI(ScriptedModel(), folder, mode="replay")
    assert not folder.exists()


async def test_a_window_is_open_as_long_from_the_first_request_of_each_group(monkeypatch, turns):
    timers = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda _after, *call, **_more: timers.append(call)
    )
    model = ScriptedModel()
    stage = AsyncDeduplicator(model, window=0.5)
    tasks = [asyncio.create_task(stage.request(Request("a")))]
    await turns(3)
    opened = list(timers)
    tasks.append(asyncio.create_task(stage.request(Request("b"))))
    await turns(3)
    for call, *arguments in opened:  # what ends the window of a
        call(*arguments)
    del timers[: len(opened)]
    tasks.append(asyncio.create_task(stage.request(Request("b"))))
    await turns(3)
    while timers:
        call, *arguments = timers.pop(0)
        call(*arguments)
        await turns(3)
    monkeypatch.undo()
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*tasks)
        await stage.close()
    assert [answer.duplicated for answer in answers] == [[False], [False], [True]]


def test_c4_a_loop_that_is_busy_loses_its_claim_to_no_other_loop(tmp_path, monkeypatch):
    """The writer's thread has claimed for it; another loop looks at the claim again and again meanwhile."""
    model = ScriptedModel()
    pipeline = OnlineAPI(model, tmp_path)
    asyncio.run(pipeline.request(Request("another")))
    blocker = sqlite3.connect(
        tmp_path / "ledger.cache.db", isolation_level=None, check_same_thread=False, timeout=0
    )
    blocker.execute("BEGIN IMMEDIATE")
    request = Request("p", namespace="a")
    place = [(pipeline.key(request), 0)]
    queued, looked = threading.Event(), threading.Event()
    looks = []
    glance = pipeline.store.glance

    def counting(wanted):
        if looked.is_set() or not wanted:
            return glance(wanted)
        looks.append(wanted)
        if len(looks) > 3 * engine._ORPHAN_LOOKS:
            looked.set()
        return glance(wanted)

    async def busy():
        task = asyncio.create_task(pipeline.request(request))
        for _ in range(20):  # turns of the loop, until the writer's thread has it
            await asyncio.sleep(0)
        blocker.execute("ROLLBACK")
        queued.set()
        assert looked.wait(20), "the other loop never looked"
        return await task

    async def other():
        return await pipeline.request(Request("p", namespace="b"))

    answers = []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(busy())))
    thread.start()
    assert queued.wait(20)
    while glance(place) == ["free"]:
        threading.Event().wait(0.001)
    monkeypatch.setattr(engine, "_LOOK_LAST", 0.005)
    monkeypatch.setattr(pipeline.store, "glance", counting)
    answers.append(asyncio.run(other()))
    thread.join()
    blocker.close()
    asyncio.run(pipeline.close())
    assert answers[0].data == answers[1].data
    assert model.generated == 2, "the other question's, and one for both"
