"""In which order a pipeline hands over its answers, and when it asks the model (C11).

`tests/programs` tries whole programs; here is each rule by itself.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import NamedTuple

import forked
import pytest

from cachepipe import AsyncCacher, Batch, CacheMiss, LocalAPI, MemoryStore, OnlineAPI, Request, loops, run
from cachepipe.cache import others
from cachepipe.cache import turns as line_turns
from cachepipe.cache.turns import Line
from cachepipe.contract.schedule import MOST_TURNS, RESTLESS_TURNS, Place
from cachepipe.loops import OwnHandles, PerLoop
from cachepipe.stores.base import Discard
from cachepipe.testing import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


def at_once(coroutine):
    """Return the result of a coroutine that must not wait for anything."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


async def filled(store, *prompts):
    """Store one sample of each prompt, in this order."""
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        for prompt in prompts:
            await pipeline.request(Request(prompt))


class Asking:
    """Requests that are made together, and the order in which they are answered."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.order = []

    async def one(self, prompt, **fields):
        try:
            response = await self.pipeline.request(Request(prompt, **fields))
        except Exception:
            self.order.append(f"{prompt} failed")
            raise
        self.order.append(prompt)
        return response

    def begin(self, *prompts, **fields):
        return [asyncio.create_task(self.one(prompt, **fields)) for prompt in prompts]


async def answered(pipeline, *prompts, **fields):
    """Ask together; return the prompts in the order of their answers."""
    asking = Asking(pipeline)
    await asyncio.gather(*asking.begin(*prompts, **fields), return_exceptions=True)
    return asking.order


# The order.


@pytest.mark.parametrize("namespace", [None, "new"])
@pytest.mark.parametrize("request_id", [None, "another"])
async def test_hits_come_in_the_order_in_which_their_samples_were_stored(store, namespace, request_id):
    await filled(store, "b", "c", "a")
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        asked = {"namespace": namespace, "request_id": request_id}
        if namespace is None and request_id is not None:
            asked["namespace"] = "new"
        assert await answered(pipeline, "a", "b", "c", **asked) == ["b", "c", "a"]


async def test_hits_come_as_they_were_asked_without_the_schedule(store):
    await filled(store, "b", "c", "a")
    async with OnlineAPI(ScriptedModel(), store, ordered=False) as pipeline:
        assert await answered(pipeline, "a", "b", "c") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "ordered"),
    [
        ({}, True),
        ({"repeat": "same"}, False),
        ({"repeat": "same", "ordered": True}, True),
        ({"correctness": False}, False),
        ({"correctness": False, "ordered": True}, True),
        ({"ordered": 7}, 7),
    ],
)
@pytest.mark.parametrize("kind", [OnlineAPI, LocalAPI])
async def test_the_schedule_is_the_default_of_pipelines_with_fresh_samples(kind, options, ordered):
    async with kind(ScriptedModel(), MemoryStore(), **options) as pipeline:
        assert pipeline._cacher.ordered == ordered


@pytest.mark.parametrize("ordered", ["yes", 0, -1, 1.5])
async def test_a_setting_that_is_neither_true_nor_a_number_of_turns_is_refused(ordered):
    with pytest.raises(ValueError, match="ordered is True, False, or a number of turns"):
        OnlineAPI(ScriptedModel(), MemoryStore(), ordered=ordered)


async def test_a_draw_of_several_samples_has_the_place_of_its_latest(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await pipeline.request(Request("a"))
        await pipeline.request(Request("b"))
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await pipeline.request(Request("a", n=2))
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        assert await answered(pipeline, "a", "b", n=1) == ["a", "b"]
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        asking = Asking(pipeline)
        await asyncio.wait([*asking.begin("a", n=2), *asking.begin("b")])
        assert asking.order == ["b", "a"]


async def test_answers_are_handed_over_one_at_a_time_each_when_the_program_is_quiet(store, turns):
    """Each task goes on for many turns after its answer before the next task gets one."""
    await filled(store, "a", "b", "c")
    order = []
    async with OnlineAPI(ScriptedModel(), store) as pipeline:

        async def ask(prompt):
            await pipeline.request(Request(prompt))
            for step in range(30):
                await asyncio.sleep(0)
                order.append((prompt, step))

        await asyncio.gather(*map(ask, "cba"))
    assert order == [(prompt, step) for prompt in "abc" for step in range(30)]


async def test_several_pipelines_on_a_store_share_one_schedule(store):
    await filled(store, "b", "a")
    async with OnlineAPI(ScriptedModel(), store) as one, OnlineAPI(ScriptedModel(), store) as other:
        asking = Asking(one), Asking(other)
        asking[1].order = asking[0].order
        await asyncio.wait([*asking[0].begin("a"), *asking[1].begin("b")])
        assert asking[0].order == ["b", "a"]


async def test_a_batch_has_one_turn(store):
    await filled(store, "a", "b", "c")
    order = []
    async with OnlineAPI(ScriptedModel(), store) as pipeline:

        async def batch():
            answers = await pipeline.batch_request(Batch([Request("c"), Request("a")]))
            order.append([answer.data for answer in answers])

        async def single():
            order.append((await pipeline.request(Request("b"))).data)

        await asyncio.gather(batch(), single())
    assert order == [["b#1"], [["c#2"], ["a#0"]]]


async def test_a_replay_has_the_same_order(store):
    await filled(store, "b", "c", "a")
    async with OnlineAPI(ScriptedModel(), store, mode="replay") as pipeline:
        assert await answered(pipeline, "a", "b", "c") == ["b", "c", "a"]
        assert await answered(pipeline, "a", "b", "c", namespace="new") == ["b", "c", "a"]
        with pytest.raises(CacheMiss):
            await asyncio.gather(
                pipeline.request(Request("z")), pipeline.request(Request("b", namespace="2"))
            )


async def test_a_sample_that_replaces_a_discarded_one_has_its_own_place(store):
    await filled(store, "a", "b")
    async with OnlineAPI(ScriptedModel(name="new "), store) as pipeline:
        key = pipeline.key(Request("a"))
        await store.apply([Discard(key, 0, "wrong")])
        assert await answered(pipeline, "a", "b") == ["b", "a"]
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        assert await answered(pipeline, "a", "b") == ["b", "a"]


# Alone, quiet, and never quiet.


@pytest.mark.parametrize("kind", [OnlineAPI, LocalAPI, AsyncCacher])
async def test_a_request_alone_on_a_quiet_loop_is_answered_at_once(store, kind):
    """Many in a row, without a turn of the loop."""
    await filled(store, "a", "b")
    async with kind(ScriptedModel(), store) as pipeline:
        for prompt in "abab":
            with run():
                assert at_once(pipeline.request(Request(prompt))).cached == [True]


async def test_the_first_request_of_a_gather_waits_for_the_others(store):
    await filled(store, "b", "a")
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        assert await answered(pipeline, "a", "b") == ["b", "a"]


async def test_an_eager_task_does_not_take_itself_for_alone(store):
    """It runs before the tasks after it exist, so a loop with a task factory is never known to be quiet."""
    await filled(store, "b", "a")
    loop = asyncio.get_running_loop()
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        asking = Asking(pipeline)
        loop.set_task_factory(lambda loop, work, **options: asyncio.Task(work, loop=loop, **options))
        try:
            asked = pipeline.request(Request("a", namespace="eager"))
            assert asked.send(None) is not None, "it must wait"
            asked.close()
            await asyncio.wait(asking.begin("a", "b"))
        finally:
            loop.set_task_factory(None)
    assert asking.order == ["b", "a"]


async def test_a_program_that_never_rests_is_served(store):
    """Within a number of turns, if nothing else is in the way: the store is only read for known draws."""
    await filled(store, "b", "a")
    turned = 0
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        asking = Asking(pipeline)
        tasks = asking.begin("a", "b")
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turned += 1
        assert MOST_TURNS < turned < MOST_TURNS + 3 * RESTLESS_TURNS
        [task] = asking.begin("new")
        async with asyncio.timeout(20):
            while not task.done():  # noqa: ASYNC110 - it never rests
                await asyncio.sleep(0)
    assert asking.order == ["b", "a", "new"]


def unreadable(loop):
    """The handles on a loop whose queue cannot be read."""
    handles = OwnHandles(loop)
    handles.ready = None
    return handles


@pytest.mark.parametrize(("ordered", "few", "enough"), [(True, 4, 8), (40, 38, 44)])
async def test_where_the_loops_queue_cannot_be_read_a_number_of_turns_is_quiet(
    monkeypatch, turns, ordered, few, enough
):
    monkeypatch.setattr(loops, "_own_handles", PerLoop(unreadable))
    store = MemoryStore()
    await filled(store, "a")
    async with OnlineAPI(ScriptedModel(), store, ordered=ordered) as pipeline:
        asking = Asking(pipeline)
        asking.begin("a")
        await turns(few)
        assert asking.order == []
        await turns(enough - few)
        assert asking.order == ["a"]


# Misses.


async def test_the_model_is_asked_only_after_the_hits_in_flight_were_handed_over(store):
    await filled(store, "a", "b")
    model = ScriptedModel()
    seen = []
    async with OnlineAPI(model, store) as pipeline:

        async def ask(prompt):
            await pipeline.request(Request(prompt))
            seen.append((prompt, len(model.calls)))

        await asyncio.gather(*map(ask, ["new", "a", "b"]))
    assert seen == [("a", 0), ("b", 0), ("new", 1)]


async def test_a_loser_of_a_race_that_the_first_run_cancelled_is_not_bought_by_the_rerun(store):
    async def race(pipeline):
        tasks = [asyncio.create_task(pipeline.request(Request(prompt))) for prompt in ("slow", "fast")]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.wait(tasks)
        return [task.result().data for task in done]

    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        racing = asyncio.create_task(race(pipeline))
        await model.begun(2)
        next(call for call in model.calls if call.request.prompt == "fast").release()
        first = await racing
    for namespace in ("same", "again"):
        again = ScriptedModel()
        async with OnlineAPI(again, store) as pipeline:
            assert await race(pipeline) == first, namespace
        assert again.calls == []


async def test_hits_in_a_long_row_delay_a_miss_by_no_more_than_a_bound(store, monkeypatch):
    """It waits for those that are ready, whatever the program does with them, and then for a time."""
    await filled(store, *"abcdef")
    monkeypatch.setattr(line_turns, "HOLD_SECONDS", 0.0)
    model = ScriptedModel()
    seen = []
    async with OnlineAPI(model, store) as pipeline:

        async def ask(*prompts):
            for prompt in prompts:
                await pipeline.request(Request(prompt))
                seen.append((prompt, len(model.calls)))

        await asyncio.gather(ask("new"), ask("b"), ask("a", "c", "d", "e", "f"))
    assert [prompt for prompt, _ in seen] == [*"abcdef", "new"], "the order does not depend on it"
    assert seen[:2] == [("a", 0), ("b", 0)]
    assert ("f", 1) in seen


async def test_a_loser_is_not_bought_beside_a_task_that_computes_for_long(store, monkeypatch):
    """The winner's answer has its consequences before the model is asked, also when the time is over."""
    await filled(store, "w1", "w2", "w3", "fast")
    monkeypatch.setattr(line_turns, "HOLD_SECONDS", 0.0)
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:

        async def work():
            for prompt in ("w1", "w2", "w3"):
                await pipeline.request(Request(prompt))

        async def race():
            tasks = [asyncio.create_task(pipeline.request(Request(prompt))) for prompt in ("slow", "fast")]
            _, losers = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in losers:
                task.cancel()

        await asyncio.gather(work(), race())
    assert model.calls == []


async def test_a_miss_alone_is_sent_at_once(store):
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("new")))
        async with asyncio.timeout(10):
            await model.begun(1)
        model.open()
        await task


async def test_concurrent_misses_of_one_question_still_share_a_call(store):
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        await asyncio.gather(*(pipeline.request(Request("new")) for _ in range(20)))
    assert model.asked == [20]


async def test_the_misses_of_a_batch_still_go_together(store):
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        await pipeline.batch_request(Batch([Request("new"), Request("new"), Request("new", n=2)]))
    assert model.asked == [4]
    batches = ScriptedModel()
    async with LocalAPI(batches.only_batches, store, batch_size=8) as pipeline:
        await pipeline.batch_request(Batch([Request("x"), Request("y"), Request("z")]))
    assert batches.batches == 1


# Failures, cancellations and ends.


async def test_a_miss_in_replay_comes_last_as_the_failure_did_in_the_run(store):
    await filled(store, "b", "a")
    for options in ({"mode": "replay"}, {}):
        model = ScriptedModel(fail=lambda _: ScriptedError())
        async with OnlineAPI(model, store, **options) as pipeline:
            assert await answered(pipeline, "z", "a", "b") == ["b", "a", "z failed"]


async def test_a_note_that_takes_too_long_stops_no_other_answer(monkeypatch):
    monkeypatch.setattr(line_turns, "CLAIM_SECONDS", 0.01)
    line, notes = Line(asyncio.get_running_loop()), []

    class Slow(Placed):
        def note_place(self, _place, then):
            notes.append(then)

    late, early, last = line.arrive(), line.arrive(), line.arrive()
    await early.come(Placed(Place(9)))
    task = asyncio.create_task(late.come(Slow(Place(5))))
    async with asyncio.timeout(20):
        await last.come(Placed(Place(10)))
    assert not task.done()
    notes[0](None)
    await task


async def test_an_error_comes_after_the_answers_that_are_ready_and_stops_nobody(store):
    await filled(store, "a", "b")
    model = ScriptedModel(fail=lambda request: ScriptedError() if request.prompt == "bad" else None)
    async with OnlineAPI(model, store) as pipeline:
        assert await answered(pipeline, "bad", "a", "b", "good") == ["a", "b", "good", "bad failed"]


async def test_a_request_that_is_cancelled_while_it_waits_gives_its_draw_back(store):
    await filled(store, "a", "b")
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        asking = Asking(pipeline)
        first, second = asking.begin("b", "a")
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([first, second])
        assert asking.order == ["b"]
        assert (await pipeline.request(Request("a"))).indices == (0,)
        stats = pipeline.stats()
        assert (stats.hits, stats.misses, stats.unreported) == (2, 0, 0)


async def test_a_batch_that_is_cancelled_while_it_waits_gives_its_draws_back(store, turns):
    await filled(store, "a", "b", "c")
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        single = asyncio.create_task(pipeline.request(Request("a")))
        batch = Batch([Request("b"), Request("c")])
        task = asyncio.create_task(pipeline.batch_request(batch))
        await turns(2)
        task.cancel()
        await asyncio.wait([task, single])
        assert [answer.indices for answer in await pipeline.batch_request(batch)] == [(0,), (0,)]


async def test_closing_waits_until_the_answers_that_are_ready_are_handed_over(store, turns):
    model = ScriptedModel(hold=True)
    pipeline = OnlineAPI(model, store)
    tasks = Asking(pipeline).begin("a", "b", "c")
    await model.begun(3)
    closing = asyncio.create_task(pipeline.close())
    await turns(3)
    model.open()
    await closing
    assert all(task.done() for task in tasks)


class Placed(NamedTuple):
    """An answer with a place; noting another one fails."""

    place: Place

    def note_place(self, _place, then):
        then(OSError("the disk is full"))


async def test_a_place_that_cannot_be_noted_is_an_error_for_its_request_only():
    """The place of a late answer decides the order of the rerun, so it is noted before the answer goes."""
    line = Line(asyncio.get_running_loop())
    late, early, last = line.arrive(), line.arrive(), line.arrive()
    await early.come(Placed(Place(9)))
    with pytest.raises(OSError, match="the disk is full"):
        await late.come(Placed(Place(5)))
    await last.come(Placed(Place(10)))


# Other processes.

WORKER = """
import asyncio, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    model = "m"

    async def request(self, request):
        print("asked", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return Response(["theirs"] * request.n)

async def main():
    async with OnlineAPI(Model(), sys.argv[1]) as pipeline:
        await pipeline.request(Request("shared", namespace="theirs", request_id="w"))
        print("stored", flush=True)

asyncio.run(main())
"""


def worker(folder):
    """Another process that is generating a sample, until it is told to go on."""
    command = [sys.executable, "-c", WORKER, str(folder)]
    return forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def test_a_sample_of_another_process_that_is_noticed_late_makes_the_rerun_exact(tmp_path, monkeypatch):
    """It was stored before ours, and came after it: the rerun, and a new namespace, follow what happened."""
    looks = []

    class Look(others.Look):
        def __init__(self, queue):
            looks.append(self)
            super().__init__(queue)

    monkeypatch.setattr(others, "FIRST", 10.0**6)
    monkeypatch.setattr(others, "Look", Look)
    with worker(tmp_path) as process:
        assert process.stdout.readline() == "asked\n"
        model = ScriptedModel(hold=True, cache_scope="m")
        async with OnlineAPI(model, tmp_path) as pipeline:
            asking = Asking(pipeline)
            tasks = asking.begin("shared", "own")
            await model.begun(1)
            process.communicate("\n")
            model.open()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert asking.order == ["own"]
            looks[0]()
            await asyncio.wait(tasks)
            assert asking.order == ["own", "shared"]
            assert [task.result().cached for task in tasks] == [[True], [False]]
    for fields in ({}, {"namespace": "new"}):
        async with OnlineAPI(ScriptedModel(cache_scope="m"), tmp_path) as pipeline:
            assert await answered(pipeline, "shared", "own", **fields) == ["own", "shared"]
    async with OnlineAPI(ScriptedModel(cache_scope="m"), tmp_path, mode="replay") as pipeline:
        assert await answered(pipeline, "shared", "own", namespace="yet another") == ["own", "shared"]


async def test_programs_on_several_loops_have_schedules_of_their_own(tmp_path):
    await filled(tmp_path, "b", "c", "a")
    pipeline = OnlineAPI(ScriptedModel(), tmp_path)

    def elsewhere(namespace):
        return asyncio.run(answered(pipeline, "a", "b", "c", namespace=namespace))

    orders = await asyncio.gather(*(asyncio.to_thread(elsewhere, f"n-{letter}") for letter in "xyz"))
    assert orders == [["b", "c", "a"]] * 3
    await pipeline.close()
