"""The scripted model does what the other tests rely on."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe import Batch, Request, Response
from cachepipe.adapting import has_batch, has_request
from cachepipe.testing import ScriptedModel
from cachepipe.testing.models import ScriptedError

pytestmark = pytest.mark.anyio


async def test_samples_are_all_different_and_calls_are_recorded():
    model = ScriptedModel()
    first = await model.request(Request("p", n=2))
    second = await model.request(Request("q"))
    assert (first.data, second.data) == (["p#0", "p#1"], ["q#2"])
    assert model.asked == [2, 1]
    assert [call.request.prompt for call in model.calls] == ["p", "q"]
    assert [(call.started, call.finished) for call in model.calls] == [(1, 2), (3, 4)]
    assert model.generated == 3
    assert repr(model.calls[0]) == "<ScriptedCall 'p' n=2 returned>"
    assert repr(model) == "<ScriptedModel 2 calls, 0 held>"


async def test_a_script_says_what_each_call_brings():
    error, odd = ScriptedError(), object()
    model = ScriptedModel([["a"], 3, 0, error, odd, Response(("b",)), None], name="m:")
    request = Request("p", n=2)
    assert (await model.request(request)).data == ["a"]
    assert (await model.request(request)).data == ["m:p#0", "m:p#1", "m:p#2"]
    assert (await model.request(request)).data == []
    with pytest.raises(ScriptedError) as caught:
        await model.request(request)
    assert caught.value is error
    assert await model.request(request) is odd
    assert (await model.request(request)).data == ("b",)
    for _ in range(2):
        assert len((await model.request(request)).data) == 2, (
            "what the script leaves open, and what follows it"
        )
    assert [call.state for call in model.calls].count("failed") == 1


async def test_a_function_may_write_the_script_and_a_predicate_may_fail_calls():
    error = ScriptedError(status_code=500)
    model = ScriptedModel(
        lambda request: [request.prompt.upper()],
        fail=lambda request: error if request.prompt == "bad" else None,
    )
    assert (await model.request(Request("good"))).data == ["GOOD"]
    with pytest.raises(ScriptedError) as caught:
        await model.request(Request("bad"))
    assert caught.value.status_code == 500


async def test_calls_wait_at_the_gate_and_leave_in_any_order():
    model = ScriptedModel(hold=True)
    tasks = [asyncio.create_task(model.request(Request(question))) for question in "pqr"]
    calls = await model.begun(3)
    assert model.held == calls
    calls[2].release()
    await calls[2].over()
    calls[0].fail()
    await calls[0].over()
    calls[1].release(["changed"])
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[0], ScriptedError)
    assert [answer.data for answer in answers[1:]] == [["changed"], ["r#2"]]
    assert model.ended == [calls[2], calls[0], calls[1]]
    model.open()
    assert (await model.request(Request("s"))).data == ["s#3"]


async def test_a_cancelled_call_is_recorded_as_cancelled():
    model = ScriptedModel(hold=True)
    task = asyncio.create_task(model.request(Request("p")))
    [call] = await model.begun(1)
    task.cancel()
    await asyncio.wait([task])
    assert call.state == "cancelled"
    assert model.held == []


async def test_more_than_max_n_is_refused():
    model = ScriptedModel(max_n=2)
    with pytest.raises(ScriptedError) as caught:
        await model.request(Request("p", n=3))
    assert caught.value.status_code == 400


@pytest.mark.parametrize("whole", [False, True])
async def test_a_batch_fails_in_places_or_as_a_whole(whole):
    error = ScriptedError()
    model = ScriptedModel([None, error], whole=whole)
    batch = Batch([Request("p"), Request("q")])
    if whole:
        with pytest.raises(ScriptedError):
            await model.batch_request(batch)
    else:
        answers = await model.batch_request(batch)
        assert answers[0].data == ["p#0"]
        assert answers[1] is error
    assert [call.batch for call in model.calls] == [1, 1]
    assert model.batches == 1


async def test_a_model_may_show_one_of_its_two_faces():
    model = ScriptedModel(max_n=3, cache_scope="m")
    single, batched = model.only_request, model.only_batches
    assert (has_request(model), has_batch(model)) == (True, True)
    assert (has_request(single), has_batch(single)) == (True, False)
    assert (has_request(batched), has_batch(batched)) == (False, True)
    await single.request(Request("p"))
    await batched.batch_request(Batch([Request("q")]))
    assert model.asked == [1, 1]
    assert (single.max_n, batched.cache_scope) == (3, "m")
