"""C7 and C8: what failures, cancellations and malformed answers do, and what they do not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

import cachepipe
from cachepipe import (
    AsyncBatcher,
    AsyncCacher,
    BadAnswer,
    Batch,
    LocalAPI,
    NotStored,
    OnlineAPI,
    Request,
    Response,
    SharedDraw,
    ShortAnswer,
    StoreError,
)
from cachepipe.contract.draws import Draw
from cachepipe.stores.base import Claim, Commit, ReleaseLease
from cachepipe.testing import FaultyStore
from cachepipe.testing.models import ScriptedError, ScriptedModel
from cachepipe.values import Codec

pytestmark = pytest.mark.anyio


@dataclass
class Point:
    x: int


def stored(store):
    return sum(info.samples for info in store.keys())  # noqa: SIM118 - a store's method


async def outcome(awaitable):
    return (await asyncio.gather(awaitable, return_exceptions=True))[0]


# Cancellation, at every point.


def make_pipeline(kind, model, store):
    match kind:
        case "online":
            return OnlineAPI(model, store)
        case "local":
            return LocalAPI(model, store, batch_size=8)
        case "cacher":
            return AsyncCacher(model, store)
        case _:
            return OnlineAPI(model, FaultyStore(store))


async def cancelled_after(pipeline, request, turns):
    """Return None when a request was cancelled after so many turns of the loop, else its response."""
    task = asyncio.create_task(pipeline.request(request))
    for _ in range(turns):
        if task.done():
            break
        await asyncio.sleep(0)
    task.cancel()
    answer = await outcome(task)
    return None if isinstance(answer, asyncio.CancelledError) else answer


@pytest.mark.parametrize("kind", ["online", "local", "cacher", "locked"])
@pytest.mark.parametrize("at_hand", [0, 1, 2])
async def test_c7_a_request_may_be_cancelled_at_every_await(new_store, kind, at_hand):
    """C7, C8: its retry is the same draw; nothing is lost, nothing doubled, wherever it was cancelled."""
    finished = False
    turns = 0
    while not finished:
        model, store = ScriptedModel(turns=2), new_store()
        pipeline = make_pipeline(kind, model, store)
        if kind == "locked":
            pipeline.store.locked = True
        if at_hand:
            await pipeline.request(Request("p", n=at_hand, namespace="other"))
        request = Request("p", n=2, request_id="r")
        answer = await cancelled_after(pipeline, request, turns)
        finished = answer is not None
        async with asyncio.timeout(
            5
        ):  # a retry that waits for what nobody makes any more fails, and does not hang
            answer = answer or await pipeline.request(request)
            after = await pipeline.request(Request("p", n=2, request_id="r"))
            await pipeline.close()
        assert set(answer.data).isdisjoint(after.data), f"C1, cancelled after {turns} turns"
        assert stored(store) == model.generated == 4, f"C7, cancelled after {turns} turns"
        draws = {info.draw.occurrence: info.indices for info in store.draws(namespace="-")}
        assert draws == {0: answer.indices, 1: after.indices}, f"C8, cancelled after {turns} turns"
        falses = [*answer.cached, *after.cached].count(False)
        stats = pipeline.stats()
        assert falses + at_hand + stats.unreported == stats.generated, f"C6, cancelled after {turns} turns"
        store.close()
        # A locked store's thread takes as long as it takes, in turns; the first turns matter most.
        turns += 1 + turns // 8
    assert turns > (3 if at_hand < 2 else 0)


async def test_c8_cancelled_where_the_deduplicator_gives_others_their_turn(store):
    """One request in many gives the loop a turn after it was served; it too gives its number back."""
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        drawn = [(await pipeline.request(Request(f"p{number}"))).data for number in range(600)]
        with cachepipe.run():
            again = []
            for number in range(600):
                answer = await cancelled_after(pipeline, Request(f"p{number}"), 1)
                answer = answer or await pipeline.request(Request(f"p{number}"))
                again.append(answer.data)
    assert again == drawn


async def test_c8_a_claim_that_is_granted_after_its_request_was_cancelled_is_undone(store, turns):
    """Its leases too: else other processes would wait for what nobody generates."""
    faulty, model = FaultyStore(store), ScriptedModel()
    async with OnlineAPI(model, faulty) as pipeline:
        place = (pipeline.key(Request("p")), 0)
        with faulty.held():
            task = asyncio.create_task(pipeline.request(Request("p")))
            await turns(5)
            task.cancel()
            await asyncio.wait([task])
    assert store.status([place]) == ["free"]
    assert list(store.draws()) == []
    assert model.calls == []


async def test_c8_a_partial_hit_that_cannot_be_read_gives_back_what_it_was_to_generate(store):
    class Model:
        cache_scope = "m"

        async def request(self, request):
            return Response([Point(1)] * request.n)

    async with OnlineAPI(Model(), store, classes=[Point]) as good, OnlineAPI(Model(), store) as bad:
        await good.request(Request("p"))
        with pytest.raises(StoreError):
            await bad.request(Request("p", n=2, namespace="b"))
        key = bad.key(Request("p"))
    assert store.status([(key, 0), (key, 1)]) == ["stored", "free"]
    assert [info.draw.namespace for info in store.draws()] == ["-"]


async def test_c8_a_hit_that_cannot_be_read_fails_alone_and_gives_its_number_back(store):
    class Model:
        cache_scope = "m"

        async def request(self, request):
            return Response([Point(1) if request.prompt == "p" else "text"] * request.n)

    batch = Batch([Request("p"), Request("q")])
    async with OnlineAPI(Model(), store, classes=[Point]) as good:
        await good.batch_request(batch)
        with cachepipe.run():
            bad = OnlineAPI(Model(), store)
            unread, read = await bad.batch_request(batch, return_exceptions=True)
            assert isinstance(unread, StoreError)
            assert read.cached == [True]
            assert bad.stats().hits == 1
            again = await good.request(Request("p"))
            assert again.cached == [True], "it is the same draw"
            await bad.close()


async def test_c8_a_hit_whose_warning_is_an_error_gives_its_number_back(store):
    faulty = FaultyStore(store)
    async with OnlineAPI(ScriptedModel(), faulty) as pipeline:
        first = await pipeline.request(Request("p"))

    def recall(draw, n):
        grant = store.recall(draw, n)
        return grant and replace(grant, shared=True)

    faulty.recall = recall
    async with OnlineAPI(ScriptedModel(), faulty) as rerun:
        with pytest.raises(SharedDraw):
            await rerun.request(Request("p"))
        again = await rerun.request(Request("p"))
    assert (again.data, again.cached) == (first.data, [True])


async def test_c6_a_sample_that_was_bought_twice_is_kept_as_an_extra_and_unreported(store):
    """The lease was lost while the model answered, and another draw has generated the sample meanwhile."""
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", namespace="a")))
        [call] = await model.begun(1)
        question = pipeline._cacher.question(Request("p"))
        store.apply_now([ReleaseLease(question.key, [0])])
        [grant] = store.apply_now([Claim(Draw("=b", question.key, "", 0), 1, question, "another")])
        assert grant.mine == [0]
        store.apply_now([Commit(question.key, 0, Codec(()).encode("theirs"), {})])
        call.release()
        answer = await task
        stats = pipeline.stats()
    assert (answer.data, answer.cached) == (["theirs"], [True])
    assert (stats.generated, stats.unreported, stats.misses, stats.hits) == (1, 1, 0, 1)
    assert [sample.index for sample in store.samples(question.key)] == [0, 1]


async def test_c7_a_cancelled_caller_leaves_the_call_to_those_who_wait(store):
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        owner = asyncio.create_task(pipeline.request(Request("p", namespace="a")))
        await model.begun(1)
        waiter = asyncio.create_task(pipeline.request(Request("p", namespace="b")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        owner.cancel()
        await outcome(owner)
        model.open()
        answer = await waiter
        assert answer.cached == [True], "it was generated on somebody else's behalf"
        retried = await pipeline.request(Request("p", namespace="a"))
        assert retried.data == answer.data
        stats = pipeline.stats()
    assert (stats.generated, stats.unreported, stats.misses) == (1, 1, 0)
    assert len(model.calls) == 1


async def test_c7_a_call_that_nobody_waits_for_any_more_is_stopped(store):
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p")))
        [call] = await model.begun(1)
        task.cancel()
        await outcome(task)
        await call.over()
        assert call.state == "cancelled"


async def test_c7_what_some_calls_of_a_cancelled_request_brought_is_stored(store):
    model = ScriptedModel(max_n=1, hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", n=3)))
        calls = list(await model.begun(3))
        calls[1].release()
        await calls[1].over()
        task.cancel()
        await outcome(task)
        model.open()
        answer = await pipeline.request(Request("p", n=3))
        stats = pipeline.stats()
    assert sorted(answer.cached) == [False, False, True]
    assert calls[1].samples[0] in answer.data
    assert model.generated == stats.generated == 3
    assert stats.unreported + answer.cached.count(False) == 3


async def test_c7_a_batch_repeated_one_by_one_keeps_what_has_come_when_it_is_cancelled(store):
    """A batch failed whole, its requests are repeated singly; what they brought is not lost."""
    script = [ScriptedError(), None, None, None]
    model = ScriptedModel(script, whole=True)
    pipeline = LocalAPI(model.only_batches, store, batch_size=2)
    tasks = [asyncio.create_task(pipeline.request(Request(question))) for question in "pq"]
    await model.begun(2)
    model.hold = True
    calls = await model.begun(3)
    calls[2].release()
    await model.begun(4)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    model.open()
    await pipeline.close()
    assert stored(store) == 1, "the third call had returned a sample"


# Errors.


async def test_c8_an_error_reaches_exactly_those_who_needed_the_call(store):
    """As the same object; those who only waited try once more and see nothing of it."""
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        owners = [
            asyncio.create_task(pipeline.request(Request("p", request_id=f"{number}"))) for number in range(3)
        ]
        [call] = await model.begun(1)
        waiter = asyncio.create_task(pipeline.request(Request("p", n=2, namespace="b")))
        other = asyncio.create_task(pipeline.request(Request("q")))
        await model.begun(2)
        error = ScriptedError()
        call.fail(error)
        model.open()
        assert all([await outcome(owner) is error for owner in owners])
        assert len((await waiter).data) == 2
        assert (await other).data == ["q#3"]
    assert model.asked == [3, 1, 2]


@pytest.mark.parametrize("second", ["succeeds", "fails"])
async def test_c8_those_who_only_waited_retry_once_together(store, second):
    """Twenty namespaces wait: exactly one further call, whose outcome is theirs."""
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        owner = asyncio.create_task(pipeline.request(Request("p", namespace="owner")))
        await model.begun(1)
        waiters = [
            asyncio.create_task(pipeline.request(Request("p", namespace=f"ns{number}")))
            for number in range(20)
        ]
        for _ in range(4):
            await asyncio.sleep(0)
        model.calls[0].fail()
        await outcome(owner)
        await model.begun(2)
        error = ScriptedError("the second")
        model.hold = False
        if second == "fails":
            model.fail = lambda _: error
            model.calls[1].fail(error)
        else:
            model.calls[1].release()
        answers = await asyncio.gather(*waiters, return_exceptions=True)
        assert len(model.calls) == 2
        if second == "fails":
            assert all(answer is error for answer in answers)
        else:
            assert [answer.cached for answer in answers].count([False]) == 1
            assert len({answer.data[0] for answer in answers}) == 1


async def test_c8_a_failed_draw_is_undone_and_its_number_comes_back(store):
    model = ScriptedModel([None, ScriptedError()])
    async with OnlineAPI(model, store) as pipeline:
        at_hand = await pipeline.request(Request("p", n=2, namespace="other"))
        before = list(store.draws())
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("p", n=3))
        other = await pipeline.request(Request("p", n=1, request_id="x"))
        assert other.data == at_hand.data[:1], "what the failed draw had reserved is free again"
        assert [info.draw.request_id for info in store.draws(namespace="-")] == ["x"]
        assert list(store.draws(namespace="=other")) == before
        again = await pipeline.request(Request("p", n=3))
        assert again.data[0] == at_hand.data[1]
    assert {info.draw.occurrence for info in store.draws(namespace="-")} == {0}


async def test_c8_the_retry_of_the_second_of_two_equal_requests_is_the_second_draw(store):
    model = ScriptedModel([None, ScriptedError(), None])
    async with OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Request("p"))
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("p"))
        second = await pipeline.request(Request("p"))
        with cachepipe.run():
            rerun = [(await pipeline.request(Request("p"))).data for _ in range(2)]
    assert rerun == [first.data, second.data]


async def test_c8_a_batch_that_fails_may_be_retried_as_it_was(store):
    """The others were stored but not delivered, so each retry is the same draw, and a hit."""
    bad = [True]
    model = ScriptedModel(fail=lambda request: ScriptedError() if request.prompt == "7" and bad[0] else None)
    async with OnlineAPI(model, store) as pipeline:
        batch = Batch([Request(f"{number}") for number in range(51)])
        with pytest.raises(ScriptedError):
            await pipeline.batch_request(batch)
        assert stored(store) == 50
        bad[0] = False
        answers = await pipeline.batch_request(batch)
        stats = pipeline.stats()
    assert [answer.cached for answer in answers].count([True]) == 50
    assert model.generated == 51
    assert stats.unreported == 50
    assert stats.misses == 1


async def test_c8_a_batch_that_is_cancelled_may_be_retried_as_it_was(store):
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        batch = Batch([Request(f"{number}") for number in range(5)])
        task = asyncio.create_task(pipeline.batch_request(batch))
        calls = list(await model.begun(5))
        for call in calls[:3]:
            call.release()
            await call.over()
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await outcome(task)
        model.open()
        answers = await pipeline.batch_request(batch)
    assert [answer.cached for answer in answers] == [[True]] * 3 + [[False]] * 2
    assert model.generated == 5


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["online", "local"])
async def test_c7_one_bad_request_among_51_fails_alone(store, kind, whole):
    """The others are delivered and stored, also when the model fails its batch as a whole."""
    error = ScriptedError(status_code=422)
    model = ScriptedModel(fail=lambda request: error if request.prompt == "7" else None, whole=whole)
    pipeline = OnlineAPI(model, store) if kind == "online" else LocalAPI(model, store, batch_size=51)
    async with pipeline:
        batch = Batch([Request(f"{number}") for number in range(51)])
        answers = await pipeline.batch_request(batch, return_exceptions=True)
    assert answers[7] is error
    assert [type(answer) for answer in answers].count(Response) == 50
    assert stored(store) == 50


# Short, generous and malformed answers.


async def test_c8_short_answers_are_asked_for_again(store):
    model = ScriptedModel([3, 0, 0, 1, 0, 0])
    async with OnlineAPI(model, store) as pipeline:
        answer = await pipeline.request(Request("p", n=5))
    assert model.asked == [5, 2, 2, 2, 1, 1, 1]
    assert len(set(answer.data)) == 5
    assert answer.cached == [False] * 5


async def test_c8_three_empty_answers_in_a_row_are_the_end(store):
    """What the model did return is stored, and serves the retry."""
    model = ScriptedModel([2, 0, 0, 0])
    async with OnlineAPI(model, store) as pipeline:
        with pytest.raises(ShortAnswer):
            await pipeline.request(Request("p", n=3))
        assert model.asked == [3, 1, 1, 1]
        assert stored(store) == 2
        answer = await pipeline.request(Request("p", n=3))
    assert answer.cached == [True, True, False]


async def test_c8_extra_samples_are_stored_and_used(store):
    model = ScriptedModel([3])
    async with OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Request("p"))
        second = await pipeline.request(Request("p", n=2))
        stats = pipeline.stats()
    assert model.asked == [1]
    assert second.cached == [True, True]
    assert len({*first.data, *second.data}) == 3
    assert (stats.generated, stats.misses, stats.unreported) == (3, 1, 2)


class NoData:
    """An answer without data."""


@pytest.mark.parametrize(
    "answer",
    [NoData(), Response("text"), Response(b"bytes"), Response({"a": 1}), "text", object()],
    ids=["no data", "a string", "bytes", "a mapping", "bare text", "an object"],
)
async def test_c8_a_malformed_answer_is_an_error_and_not_cached(store, answer):
    model = ScriptedModel(lambda _: answer if not broken else None)
    broken = []
    async with OnlineAPI(model, store) as pipeline:
        with pytest.raises(BadAnswer):
            await pipeline.request(Request("p"))
        assert stored(store) == 0
        broken.append("no more")
        assert (await pipeline.request(Request("p"))).data == ["p#0"]


async def test_c8_a_model_that_returns_none_is_an_error(store):
    class Forgetful:
        async def request(self, request):
            return None

    async with AsyncCacher(Forgetful(), store) as cacher:
        with pytest.raises(BadAnswer):
            await cacher.request(Request("p"))
    assert stored(store) == 0


async def test_c8_a_batch_of_the_wrong_length_is_an_error_for_all_of_it(store):
    class Hasty:
        async def batch_request(self, batch):
            return [Response(["one"])]

    pipeline = LocalAPI(Hasty(), store, batch_size=3)
    answers = await pipeline.batch_request(
        Batch([Request(question) for question in "pqr"]), return_exceptions=True
    )
    assert all(isinstance(answer, BadAnswer) for answer in answers)
    assert stored(store) == 0
    await pipeline.close()


async def test_c7_what_cannot_be_stored_is_delivered_with_a_warning(store):
    value = object()
    model = ScriptedModel([[value], None])
    async with OnlineAPI(model, store) as pipeline:
        with pytest.warns(NotStored):
            answer = await pipeline.request(Request("p"))
        assert answer.data == [value]
        assert answer.cached == [False]
        assert stored(store) == 0
        with cachepipe.run():
            again = await pipeline.request(Request("p"))
        assert again.cached == [False]
        assert stored(store) == 1


async def test_warnings_made_errors_hang_nobody(store):
    """As with ``-W error``: the request ends, with its samples or with the warning."""
    model = ScriptedModel([[object()]])
    async with OnlineAPI(model, store) as pipeline, asyncio.timeout(5):
        answer = await outcome(pipeline.request(Request("p")))
    assert isinstance(answer, (Response, NotStored))


async def test_an_error_below_a_batcher_keeps_its_identity(store):
    error = ScriptedError()
    model = ScriptedModel([error])
    async with AsyncCacher(AsyncBatcher(model, 4), store) as cacher:
        assert await outcome(cacher.request(Request("p"))) is error


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
        assert stored(store) == 2


async def test_c7_an_integer_of_any_length_is_stored(store):
    async with asyncio.timeout(10), OnlineAPI(ScriptedModel([["a", 10**5000, "b"]]), store) as pipeline:
        answer = await pipeline.request(Request("p", n=3))
        equal = answer.data == ["a", 10**5000, "b"]
        with cachepipe.run():
            again = (await pipeline.request(Request("p", n=3))).data == answer.data
    assert (equal, again) == (True, True)


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
