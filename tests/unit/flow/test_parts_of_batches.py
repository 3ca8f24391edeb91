"""Batches whose answers come in parts: who has an answer does not wait for those who have none yet."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import (
    AsyncBatcher,
    AsyncCacher,
    AsyncLimiter,
    AsyncRetrier,
    Batch,
    BatchMismatch,
    DiskStore,
    LocalAPI,
    MemoryStore,
    OrderedLocalAPI,
    Request,
    RequestReorderer,
    Response,
    StageClosed,
    context,
)
from cachepipe.cache.calls import Caller, DirectDemand, withdraw
from cachepipe.flow.flow import Flow
from cachepipe.flow.limits import Limits
from cachepipe.flow.retries import Retries
from cachepipe.stage import Stage, ask_batch
from cachepipe.testing import FakeClock, ScriptedError, ScriptedModel
from cachepipe.typedefs import SingleRequestModel

pytestmark = pytest.mark.anyio

IDS = {"a": "10", "bad": "9", "c": "2", "d": "1"}  # in natural order: d, c, bad, a
GOOD = ["a", "c", "d"]


class Failing:
    """A model that takes batches only, and answers a question only after so many failures."""

    model = "m"

    def __init__(self, failures=(("bad", [429]),)):
        self.failures = {prompt: list(statuses) for prompt, statuses in failures}
        self.batches = []

    async def batch_request(self, batch):
        self.batches.append([request.prompt for request in batch])
        return [self.answer(request) for request in batch]

    def answer(self, request):
        statuses = self.failures.get(request.prompt)
        if statuses:
            return ScriptedError(status_code=statuses.pop(0))
        return Response([f"{request.prompt}/{number}" for number in range(request.n)])


class Gated(Failing):
    """One that answers when it is told to."""

    def __init__(self, *failures):
        super().__init__(*failures)
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def batch_request(self, batch):
        self.asked.set()
        await self.go.wait()
        return await super().batch_request(batch)


class Bare(Stage):
    """A stage without requests, so that what is above asks for batches."""

    request = SingleRequestModel.request

    async def batch_request(self, batch, *, return_exceptions=False, arrived=None):
        return await self.model.batch_request(batch, return_exceptions=return_exceptions, arrived=arrived)


def local(model, store, flow):
    return LocalAPI(model, store, batch_size=4, service=flow)


def ordered(model, store, flow):
    return OrderedLocalAPI(model, store, 4, 4, service=flow)


def cached(model, store, flow):
    limited = AsyncLimiter(model, limits=flow.limits)
    return AsyncCacher(Bare(AsyncRetrier(limited, retries=flow.retries)), store)


def upside_down(model, store, flow):
    retried = AsyncRetrier(model, retries=flow.retries)
    return AsyncCacher(Bare(Bare(AsyncLimiter(retried, limits=flow.limits))), store)


def sorted_below(model, store, flow):
    retried = AsyncRetrier(RequestReorderer(model), retries=flow.retries)
    return AsyncCacher(AsyncBatcher(RequestReorderer(retried), 4), store)


@pytest.fixture(params=[local, ordered, cached, upside_down, sorted_below], ids=lambda make: make.__name__)
def make(request, clock):
    """A function that puts stages around a model: in the ways in which requests become batches."""

    def made(model, store):
        return request.param(
            model, store, Flow(Limits(adaptive=False, clock=clock), Retries(first=1, clock=clock))
        )

    return made


def ask(pipeline, prompts):
    return {
        prompt: asyncio.create_task(pipeline.request(Request(prompt, request_id=IDS.get(prompt))))
        for prompt in prompts
    }


def key(pipeline, prompt):
    cacher = pipeline if isinstance(pipeline, AsyncCacher) else pipeline._cacher
    return cacher.question(Request(prompt)).key


async def test_answers_are_stored_and_delivered_while_what_failed_waits_to_be_asked_for_again(
    make, clock, tmp_path
):
    """C7: nobody who has an answer waits for somebody else's attempts."""
    model = Failing()
    store, other = DiskStore(tmp_path / "cache"), DiskStore(tmp_path / "cache")
    async with make(model, store) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        assert [prompt for prompt in IDS if tasks[prompt].done()] == GOOD
        assert [tasks[prompt].result().data for prompt in GOOD] == [["a/0"], ["c/0"], ["d/0"]]
        stored = [prompt for prompt in IDS if other.sample(key(pipeline, prompt), 0) is not None]
        assert stored == GOOD
        stats = pipeline.stats()
        assert (stats.in_flight, stats.generated, stats.calls) == (1, 3, 4)
        await clock.advance(1)
        assert (await tasks["bad"]).data == ["bad/0"]
        assert pipeline.stats().in_flight == 0
    assert [sorted(batch) for batch in model.batches] == [sorted(IDS), ["bad"]]
    other.close()
    store.close()


async def test_what_failed_together_is_asked_for_again_together_and_an_error_that_stands_is_told(make, clock):
    model = Failing([("bad", [429, 503]), ("d", [500]), ("c", [400])])
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        assert [prompt for prompt in IDS if tasks[prompt].done()] == ["a", "c"]
        with pytest.raises(ScriptedError):
            await tasks["c"]
        await clock.advance(1)
        assert [prompt for prompt in IDS if tasks[prompt].done()] == ["a", "c", "d"]
        await clock.advance(2)
        assert (await tasks["bad"]).data == ["bad/0"]
    assert [sorted(batch) for batch in model.batches] == [sorted(IDS), ["bad", "d"], ["bad"]]


async def test_a_caller_who_goes_stops_the_attempts_that_were_its_own(make, clock):
    model = Failing()
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        tasks["bad"].cancel()
        await clock.settle()
        assert tasks["bad"].cancelled()
        assert clock.next_due is None
        assert pipeline.stats().in_flight == 0
        assert [(await tasks[prompt]).data for prompt in GOOD] == [["a/0"], ["c/0"], ["d/0"]]
    assert len(model.batches) == 1


async def test_one_of_two_who_wait_for_another_attempt_may_go(make, clock):
    model = Failing([("bad", [429]), ("d", [429])])
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        tasks["d"].cancel()
        await clock.advance(10)
        assert (await tasks["bad"]).data == ["bad/0"]


async def test_what_nobody_wants_is_not_asked_for_again_when_the_others_have_their_answers(make, clock):
    """Its caller went while all of them were waiting."""
    model = Gated()
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await model.asked.wait()
        tasks["bad"].cancel()
        await clock.settle()
        model.go.set()
        await clock.settle()
        assert [(await tasks[prompt]).data for prompt in GOOD] == [["a/0"], ["c/0"], ["d/0"]]
        assert clock.next_due is None
    assert len(model.batches) == 1


async def test_what_comes_for_a_caller_who_has_gone_is_stored_all_the_same(make, clock):
    model, store = Gated(()), MemoryStore()
    async with make(model, store) as pipeline:
        tasks = ask(pipeline, IDS)
        await model.asked.wait()
        for prompt in ("a", "bad", "d"):
            tasks[prompt].cancel()
        await clock.settle()
        model.go.set()
        await clock.settle()
        assert (await tasks["c"]).data == ["c/0"]
        assert all(store.sample(key(pipeline, prompt), 0) is not None for prompt in IDS)


async def test_all_who_go_at_once_stop_the_batch(make, clock):
    held = asyncio.Event()

    class Held(Failing):
        async def batch_request(self, batch):
            await super().batch_request(batch)
            try:
                await held.wait()
            finally:
                self.batches.append("ended")

    model = Held()
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        for task in tasks.values():
            task.cancel()
        await clock.settle()
        assert all(task.cancelled() for task in tasks.values())
        assert pipeline.stats().in_flight == 0
    assert model.batches[1:] == ["ended"]


async def test_closing_waits_for_what_is_asked_for_again(make, clock):
    model = Failing()
    pipeline = make(model, MemoryStore())
    tasks = ask(pipeline, IDS)
    await clock.settle()
    closing = [asyncio.create_task(pipeline.close()) for _ in range(2)]
    await clock.settle()
    assert not any(task.done() for task in closing)
    await clock.advance(1)
    await asyncio.gather(*closing)
    assert tasks["bad"].result().data == ["bad/0"]


async def test_a_batch_that_fails_whole_hands_each_answer_on_as_it_comes_one_by_one(make, clock):
    """C8, and each single call is one that is limited and made again."""

    class Whole(Failing):
        asked, go = asyncio.Event(), asyncio.Event()

        async def batch_request(self, batch):
            if len(batch) > 1:
                raise ScriptedError(status_code=400)
            if batch.requests[0].prompt == "bad":
                self.asked.set()
                await self.go.wait()
            return await super().batch_request(batch)

    model = Whole(())
    async with make(model, MemoryStore()) as pipeline:
        tasks = ask(pipeline, ["a", "c", "bad"])
        await model.asked.wait()
        await clock.settle()
        first = [batch[0] for batch in model.batches]
        assert first
        assert [prompt for prompt in tasks if tasks[prompt].done()] == sorted(first)
        model.go.set()
        answers = {prompt: (await task).data for prompt, task in tasks.items()}
    assert answers == {"a": ["a/0"], "c": ["c/0"], "bad": ["bad/0"]}


async def test_a_model_of_single_requests_delivers_each_answer_of_a_batch_as_it_comes(make, clock):
    model = ScriptedModel(hold=True)
    async with make(model.only_request, MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        calls = {call.request.prompt: call for call in await model.begun(4)}
        for count, prompt in enumerate(["c", "a", "bad", "d"], 1):
            calls[prompt].release()
            await clock.settle()
            assert tasks[prompt].done()
            assert sum(task.done() for task in tasks.values()) == count


async def test_hardware_batches_of_one_collection_do_not_wait_for_one_another(clock):
    model = ScriptedModel(hold=True)
    async with OrderedLocalAPI(model.only_batches, MemoryStore(), 4, 2, in_flight=1) as pipeline:
        tasks = ask(pipeline, IDS)
        await model.begun(2)
        model.release()
        await model.begun(4)
        await clock.settle()
        assert [prompt for prompt in IDS if tasks[prompt].done()] == ["c", "d"]
        model.open()
        await asyncio.gather(*tasks.values())


# Stages that others have written.


class Shouting(Stage):
    """Changes what a batch brings, and knows nothing of parts."""

    async def batch_request(self, batch, *, return_exceptions=False):
        answers = await self.model.batch_request(batch, return_exceptions=return_exceptions)
        return [Response([text.upper() for text in answer.data]) for answer in answers]


class Passing(Shouting):
    """Passes on whatever options there are."""

    async def batch_request(self, batch, **options):
        return await super().batch_request(batch, **options)


@pytest.mark.parametrize("kind", [Shouting, Passing])
async def test_a_stage_that_does_not_name_the_keyword_sees_whole_batches(clock, kind):
    retrier = AsyncRetrier(Failing(), 1, clock=clock)
    async with AsyncCacher(AsyncBatcher(kind(retrier), 4), MemoryStore()) as pipeline:
        tasks = ask(pipeline, IDS)
        await clock.settle()
        assert not any(task.done() for task in tasks.values())
        await clock.advance(1)
        assert [task.result().data for task in tasks.values()] == [["A/0"], ["BAD/0"], ["C/0"], ["D/0"]]


class Single(Stage):
    """Has no batches of its own."""

    async def request(self, request):
        return await self.model.request(request)


async def test_a_stage_that_has_requests_only_delivers_each_answer_of_a_batch_as_it_comes(clock):
    model = ScriptedModel(hold=True)
    stage = Single(model)
    async with AsyncCacher(AsyncBatcher(stage, 2), MemoryStore()) as pipeline:
        tasks = ask(pipeline, ["a", "c"])
        (await model.begun(2))[1].release()
        assert (await tasks["c"]).data == ["c#1"]
        assert not tasks["a"].done()
        model.open()
        await tasks["a"]
    with pytest.raises(StageClosed):
        await ask_batch(stage, [Request("a")])


async def test_a_stage_that_brings_too_few_is_told_so():
    class Short(Stage):
        async def batch_request(self, batch, *, return_exceptions=False, arrived=None):
            arrived(1, Response(["early"]))
            return [Response(["x"])]

    told = []
    answers = await ask_batch(
        Short(Failing()), [Request("a"), Request("c")], lambda *answer: told.append(answer)
    )
    assert isinstance(answers[0], BatchMismatch)
    assert answers[1].data == ["early"]
    assert [place for place, _ in told] == [1, 0]


async def test_a_model_that_fails_after_a_part_is_asked_for_the_rest_only():
    class Parts(Failing):
        async def batch_request(self, batch, *, arrived=None):
            answers = await super().batch_request(batch)
            if len(batch) == 1:
                return answers
            arrived(1, answers[1])
            raise ScriptedError(status_code=400)

    model = Parts(())
    answers = await ask_batch(model, [Request(prompt) for prompt in "acd"])
    assert [answer.data for answer in answers] == [["a/0"], ["c/0"], ["d/0"]]
    assert model.batches == [["a", "c", "d"], ["a"], ["d"]]


async def test_what_begins_with_an_answer_is_no_part_of_the_attempt_that_brought_it(clock):
    """A model that gives one sample a call is asked for the second while another's first is awaited."""
    seen = []

    class Noting(Bare):
        async def batch_request(self, batch, *, return_exceptions=False, arrived=None):
            seen.append(context.attempt.get())
            return await super().batch_request(batch, return_exceptions=return_exceptions, arrived=arrived)

    model = ScriptedModel(lambda request: 1, hold=True)
    async with AsyncCacher(Noting(AsyncRetrier(model.only_request, clock=clock)), MemoryStore()) as pipeline:
        tasks = [asyncio.create_task(pipeline.request(Request(prompt, n=2))) for prompt in "ac"]
        calls = await model.begun(2)
        calls[0].release()
        await model.begun(3)
        model.open()
        await asyncio.gather(*tasks)
    assert len(seen) == 3
    assert set(seen) == {None}


async def test_one_who_was_cancelled_in_a_batch_takes_nobody_elses_answer_with_it():
    class Stopped(Failing):
        async def batch_request(self, batch):
            return [asyncio.CancelledError(), *(await super().batch_request(batch))[1:]]

    async with AsyncCacher(Stopped(()), MemoryStore()) as pipeline:
        tasks = ask(pipeline, ["a", "c"])
        await asyncio.wait(tasks.values())
        assert tasks["a"].cancelled()
        assert tasks["c"].result().data == ["c/0"]


@pytest.mark.parametrize("gone", ["a", "ac"])
async def test_what_is_given_up_before_its_batch_has_left_is_not_asked_for(gone):
    loop, model = asyncio.get_running_loop(), Failing(())
    caller = Caller(loop, model, lambda *_: None)
    needs = {prompt: DirectDemand(loop, Request(prompt)) for prompt in "ac"}
    caller.start(list(needs.values()))
    for prompt in gone:
        needs[prompt].future.cancel()
        withdraw(needs[prompt])
    while caller.busy:
        await caller.step()
    assert model.batches == ([["c"]] if gone == "a" else [])
    assert (caller.in_flight, caller.calls) == (0, len(model.batches))


# Whatever happens, in whatever order.


@given(
    failures=st.lists(st.lists(st.sampled_from([429, 503, 400]), max_size=2), max_size=6),
    ids=st.permutations(range(6)),
    whole=st.booleans(),
)
def test_each_answer_is_told_once_in_its_place_and_as_the_list_has_it(failures, ids, whole):
    async def main():
        clock = FakeClock()

        class Model(Failing):
            async def batch_request(self, batch):
                if whole and len(batch) > 2:
                    raise ScriptedError(status_code=400)
                return await super().batch_request(batch)

        model = Model([(str(number), statuses) for number, statuses in enumerate(failures)])
        retrier = AsyncRetrier(RequestReorderer(AsyncLimiter(model, clock=clock)), first=1, clock=clock)
        requests = [Request(str(place), request_id=str(ids[place])) for place in range(len(failures))]
        told = {}

        def arrived(place, answer):
            assert place not in told
            told[place] = answer

        task = asyncio.create_task(ask_batch(RequestReorderer(retrier), requests, arrived))
        await clock.advance(20)
        answers = await task
        assert [told[place] for place in range(len(requests))] == answers
        for place, answer in enumerate(answers):
            if 400 in failures[place]:
                assert answer.status_code == 400
            else:
                assert answer.data == [f"{place}/0"]

    asyncio.run(main())


async def test_a_retrier_alone_returns_whole_lists_or_raises_the_first_error(clock):
    batch = Batch([Request(prompt) for prompt in ("a", "bad", "c")])
    task = asyncio.create_task(AsyncRetrier(Failing(), clock=clock).batch_request(batch))
    await clock.advance(1)
    assert [answer.data for answer in await task] == [["a/0"], ["bad/0"], ["c/0"]]
    refused = [("bad", [400, 400])]
    retrier = AsyncRetrier(Failing(refused), clock=clock)
    answers = await retrier.batch_request(batch, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Response, ScriptedError, Response]
    with pytest.raises(ScriptedError):
        await retrier.batch_request(batch)


@pytest.mark.parametrize("late", range(12))
async def test_what_a_model_has_returned_is_stored_whenever_its_collection_is_stopped(clock, turns, late):
    """C7: the callers of one hardware batch have gone, and the other one's get their answers just before."""
    model, store = ScriptedModel(hold=True), MemoryStore()
    async with OrderedLocalAPI(model.only_batches, store, 4, 2) as pipeline:
        tasks = ask(pipeline, IDS)
        calls = {call.request.prompt: call for call in await model.begun(4)}
        for prompt in ("a", "bad"):
            tasks[prompt].cancel()
        await clock.settle()
        for prompt in ("c", "d"):
            calls[prompt].release()
        await turns(late)
        for prompt in ("a", "bad"):
            calls[prompt].release()
        await clock.settle()
    returned = [prompt for prompt in IDS if calls[prompt].state == "returned"]
    assert [prompt for prompt in IDS if store.sample(key(pipeline, prompt), 0) is not None] == returned
    assert all(tasks[prompt].done() for prompt in IDS)


@pytest.mark.parametrize("view", ["only_batches", "only_request"])
@pytest.mark.parametrize("late", range(10))
async def test_what_a_model_has_returned_is_stored_whenever_its_callers_go(make, clock, turns, late, view):
    """C7."""
    model, store = ScriptedModel(hold=True), MemoryStore()
    async with make(getattr(model, view), store) as pipeline:
        tasks = ask(pipeline, IDS)
        calls = {call.request.prompt: call for call in await model.begun(4)}
        model.release()
        await turns(late)
        for task in tasks.values():
            task.cancel()
        await clock.settle()
        assert all(task.done() for task in tasks.values())
    returned = [prompt for prompt in IDS if calls[prompt].state == "returned"]
    assert [prompt for prompt in IDS if store.sample(key(pipeline, prompt), 0) is not None] == returned


async def test_what_travels_with_another_collections_requests_is_stored_though_its_own_has_been_left(clock):
    """Two collections share a hardware batch, and all callers of one go."""
    model, store = ScriptedModel(hold=True), MemoryStore()
    async with OrderedLocalAPI(model.only_batches, store, 2, 4) as pipeline:
        tasks = ask(pipeline, IDS)
        assert {call.batch for call in await model.begun(4)} == {1}
        for prompt in ("a", "bad"):
            tasks[prompt].cancel()
        await clock.settle()
        model.release()
        await clock.settle()
        assert all(task.done() for task in tasks.values())
        assert all(store.sample(key(pipeline, prompt), 0) is not None for prompt in IDS)
