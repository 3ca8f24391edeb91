"""C4 and C5: how little the model is asked, in how few calls, and in which order lists are filled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

import cachepipe
from cachepipe import OnlineAPI, Request
from cachepipe.testing.models import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Seeded(Request):
    seed: int | None = None
    best_of: int | None = None


class LateError(ScriptedError, TimeoutError):
    """The model did not answer in time."""


def at_once(pipeline, requests):
    return asyncio.gather(*[pipeline.request(request) for request in requests])


def namespaces(count, n=1):
    return [Request("p", n=n, namespace=f"ns{number}") for number in range(count)]


def same_namespace(*sizes):
    return [Request("p", n=n, request_id=f"r{place}") for place, n in enumerate(sizes)]


async def test_c4_a_top_up_buys_what_is_not_at_hand(store):
    """With n wanted and k at hand the model is asked for n - k."""
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Request("p", n=2, namespace="a"))
        second = await pipeline.request(Request("p", n=5, namespace="b"))
    assert model.asked == [2, 3]
    assert second.data[:2] == first.data
    assert second.cached == [True, True, False, False, False]


async def test_c4_a_larger_n_keeps_the_draw_and_extends_it(store):
    """C2 too: the same draw asked with a larger n gets the same samples, then more."""
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        answers = []
        for n in (2, 4, 1):
            with cachepipe.run():
                answers.append((await pipeline.request(Request("p", n=n))).data)
    assert answers[1][:2] == answers[0]
    assert answers[2] == answers[0][:1]
    assert model.asked == [2, 2]


async def test_c4_several_draws_of_a_namespace_travel_in_one_call(store):
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        responses = await at_once(pipeline, same_namespace(1, 2, 3))
    assert model.asked == [6]
    assert len({sample for response in responses for sample in response.data}) == 6


async def test_c4_several_namespaces_need_what_the_largest_needs(store):
    """Namespaces share samples, so five that want 1, 2 … 5 samples cost five, in one call."""
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        responses = await at_once(pipeline, [Request("p", n=n, namespace=f"ns{n}") for n in (5, 1, 4, 2, 3)])
    assert model.asked == [5]
    assert all(response.data == responses[0].data[: len(response.data)] for response in responses)


async def test_c4_what_namespaces_need_beyond_each_other_is_summed(store):
    """Rising needs of several namespaces, each beyond the one before, leave in one call together."""
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        await at_once(pipeline, [Request("p", n=n, namespace=f"ns{n}") for n in (1, 3, 6)])
    assert model.asked == [6]


@pytest.mark.parametrize(("max_n", "calls"), [(1, 7), (2, 4), (3, 3), (4, 2), (7, 1), (8, 1), (None, 1)])
async def test_c4_needs_are_cut_into_the_fewest_calls(store, max_n, calls):
    model = ScriptedModel(max_n=max_n)
    async with OnlineAPI(model, store) as pipeline:
        await at_once(pipeline, same_namespace(2, 1, 4))
    assert len(model.calls) == calls
    assert sum(model.asked) == model.generated == 7


@pytest.mark.parametrize(
    "error",
    [*(ScriptedError(status_code=code) for code in (400, 413, 422)), LateError()],
    ids=["400", "413", "422", "time-out"],
)
async def test_c4_a_refused_merged_call_is_repeated_as_its_callers_wrote_it(store, error):
    """Nobody sees the error, and the limit is lowered for later calls."""
    model = ScriptedModel(fail=lambda request: error if request.n > 2 else None)
    async with OnlineAPI(model, store) as pipeline:
        responses = await at_once(pipeline, same_namespace(1, 2, 2))
        assert model.asked == [5, 1, 2, 2]
        assert [len(response.data) for response in responses] == [1, 2, 2]
        assert all(not any(response.cached) for response in responses)
        await at_once(pipeline, [Request("q", request_id=f"{number}") for number in range(5)])
    assert model.asked[4:] == [2, 2, 1]


async def test_c4_a_merged_call_that_fails_otherwise_is_not_repeated(store):
    """A 500 says nothing about n: those who needed the call see it."""
    error = ScriptedError(status_code=500)
    model = ScriptedModel([error])
    async with OnlineAPI(model, store) as pipeline:
        answers = await asyncio.gather(
            *[pipeline.request(request) for request in same_namespace(1, 1)], return_exceptions=True
        )
    assert all(answer is error for answer in answers)
    assert model.asked == [2]


async def test_c4_a_lone_call_that_is_refused_is_not_repeated(store):
    error = ScriptedError(status_code=400)
    model = ScriptedModel([error])
    async with OnlineAPI(model, store) as pipeline:
        with pytest.raises(ScriptedError) as caught:
            await pipeline.request(Request("p", n=3))
    assert caught.value is error
    assert model.asked == [3]


async def test_c4_a_merged_call_answered_short_is_repeated_as_its_callers_wrote_it(store):
    model = ScriptedModel(lambda request: min(request.n, 2))
    async with OnlineAPI(model, store) as pipeline:
        responses = await at_once(pipeline, same_namespace(2, 2, 2))
        assert model.asked == [6, 2, 2]
        assert len({sample for response in responses for sample in response.data}) == 6
        await at_once(pipeline, [Request("q", request_id=f"{number}") for number in range(4)])
    assert model.asked[3:] == [2, 2]


async def test_c4_a_short_answer_to_a_merged_call_never_cuts_what_a_caller_wrote_alone(store):
    """One sample for 3 + 1: the limit becomes 3, the most that anyone asked for, and not 1."""
    model = ScriptedModel([1])
    async with OnlineAPI(model, store) as pipeline:
        await at_once(pipeline, same_namespace(3, 1))
        assert model.asked == [4, 2, 1]
        await pipeline.request(Request("q", n=3))
    assert model.asked[3:] == [3]


async def test_c4_a_limit_that_was_lowered_is_raised_by_no_later_refusal(store):
    """Two merged calls are in flight; the one with the smaller parts is refused first."""
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        small = [Request("p", request_id=f"{number}") for number in range(4)]
        large = [Request("q", n=3, request_id=f"{number}") for number in range(2)]
        answers = asyncio.ensure_future(at_once(pipeline, [*small, *large]))
        calls = await model.begun(2)
        assert [call.n for call in calls] == [4, 6]
        model.hold = False
        for call in calls:
            call.fail(ScriptedError(status_code=400))
            await call.over()
        await answers
        assert model.asked[2:] == [1, 1, 1, 1, 3, 3]
        await at_once(pipeline, [Request("r", request_id=f"{number}") for number in range(3)])
    assert model.asked[8:] == [1, 1, 1]


async def test_c4_a_call_that_has_not_begun_when_its_request_is_cancelled_is_not_made(store, turns):
    for count in range(8):
        model = ScriptedModel(hold=True)
        async with OnlineAPI(model, store) as pipeline:
            task = asyncio.create_task(pipeline.request(Request(f"p{count}")))
            await turns(count)
            task.cancel()
            while not task.done():
                await turns()
            begun = len(model.calls)
            await turns(8)
            model.open()
        assert len(model.calls) == begun


async def test_c4_the_error_of_a_repeated_call_reaches_its_own_caller_alone(store):
    """A merged call is refused; repeated one by one, one of its parts is refused again."""
    errors = [ScriptedError("merged", status_code=400), ScriptedError("mine", status_code=400)]
    model = ScriptedModel([errors[0], None, errors[1], None])
    async with OnlineAPI(model, store) as pipeline:
        answers = await asyncio.gather(
            *[pipeline.request(request) for request in same_namespace(1, 1, 1)], return_exceptions=True
        )
    assert answers[1] is errors[1]
    assert [type(answers[place]) for place in (0, 2)] == [cachepipe.Response] * 2


@pytest.mark.parametrize("field", ["seed", "best_of"])
async def test_c4_requests_with_a_seed_or_best_of_are_not_merged(store, field):
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        requests = [Seeded("p", n=2, request_id=f"{number}", **{field: 5}) for number in range(3)]
        responses = await at_once(pipeline, requests)
    assert model.asked == [2, 2, 2]
    assert len({sample for response in responses for sample in response.data}) == 6, "C1, in spite of a seed"


@pytest.mark.parametrize("field", ["seed", "best_of"])
async def test_c4_requests_with_a_seed_or_best_of_are_not_cut_by_what_others_have_taught(store, field):
    model = ScriptedModel(fail=lambda request: ScriptedError(status_code=400) if request.n == 2 else None)
    async with OnlineAPI(model, store) as pipeline:
        await at_once(pipeline, same_namespace(1, 1))  # refused when merged: the limit is lowered to 1
        await pipeline.request(Seeded("p", n=3, **{field: 5}))
    assert model.asked == [2, 1, 1, 3]


async def test_c4_best_of_puts_n_into_the_key(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        keys = {pipeline.key(Seeded("p", n=n, best_of=5)) for n in (1, 2, 3)}
        assert len(keys) == 3
        assert len({pipeline.key(Seeded("p", n=n, seed=5)) for n in (1, 2, 3)}) == 1


async def test_c4_a_need_beside_a_call_in_flight_joins_it(store):
    """Twenty namespaces that come while a call is in flight make no call of their own."""
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        first = asyncio.create_task(pipeline.request(Request("p", n=2)))
        await model.begun(1)
        others = [asyncio.create_task(pipeline.request(request)) for request in namespaces(20, n=2)]
        await asyncio.sleep(0)
        model.open()
        answers = await asyncio.gather(first, *others)
    assert model.asked == [2]
    assert all(answer.data == answers[0].data for answer in answers)
    assert [sum(not cached for cached in answer.cached) for answer in answers] == [2] + [0] * 20


async def test_c4_two_clients_never_share_a_call(store):
    """One must not spend the other's key, though they share the samples."""
    models = [ScriptedModel(hold=True, cache_scope="m") for _ in range(2)]
    pipelines = [OnlineAPI(model, store) for model in models]
    tasks = [
        asyncio.create_task(pipeline.request(Request("p", n=n, request_id=f"{n}")))
        for pipeline, n in zip(pipelines, (1, 2), strict=True)
    ]
    for model in models:
        await model.begun(1)
        model.open()
    await asyncio.gather(*tasks)
    assert [model.asked for model in models] == [[1], [2]]
    for pipeline in pipelines:
        await pipeline.close()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
async def test_c5_what_a_draw_gets_does_not_depend_on_the_order_of_completion(store, order):
    """One sample per call: each sample's index was fixed before any call ended."""
    model = ScriptedModel(max_n=1, hold=True)
    async with OnlineAPI(model, store) as pipeline:
        tasks = [asyncio.create_task(pipeline.request(request)) for request in same_namespace(1, 2, 1)]
        calls = list(await model.begun(4))
        for place in order:
            calls[place].release()
            await calls[place].over()
        responses = await asyncio.gather(*tasks)
        assert [response.data for response in responses] == [["p#0"], ["p#1", "p#2"], ["p#3"]]
        assert [response.indices for response in responses] == [(0,), (1, 2), (3,)]
        with cachepipe.run():
            whole = await pipeline.request(Request("p", n=4, namespace="later", request_id="new"))
    assert whole.data == ["p#0", "p#1", "p#2", "p#3"]


async def test_c5_short_answers_first_is_not_how_a_list_is_filled(store):
    """A model whose latency grows with the answer's length: released shortest first, stored as asked."""
    lengths = [5, 1, 4, 2, 3]
    answers = iter("x" * length for length in lengths)
    model = ScriptedModel(lambda _: [next(answers)], max_n=1, hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", n=5)))
        for call in sorted(await model.begun(5), key=lambda call: len(call.step[0])):
            call.release()
            await call.over()
        assert [len(sample) for sample in (await task).data] == lengths
        few = await pipeline.request(Request("p", namespace="few"))
    assert len(few.data[0]) == lengths[0]


@pytest.mark.anyio
async def test_c4_a_crowd_larger_than_a_transaction_still_shares_one_call(store):
    """Its claims are written in several parts; what they need is asked for when the last one is known."""
    model = ScriptedModel()
    async with OnlineAPI(model, store) as pipeline:
        requests = [Request("p", namespace=f"{k % 3}", request_id=f"{k}") for k in range(1000)]
        await asyncio.gather(*(pipeline.request(request) for request in requests))
    assert model.asked == [334]


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
