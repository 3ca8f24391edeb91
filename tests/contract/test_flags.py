"""C6: what ``cached`` and ``duplicated`` say, and how the figures add up."""

from __future__ import annotations

import asyncio

import pytest

import cachepipe
from cachepipe import AsyncCacher, AsyncDeduplicator, Batch, OnlineAPI, Request
from cachepipe.testing.models import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


async def flags(pipeline, requests):
    answers = await asyncio.gather(*[pipeline.request(request) for request in requests])
    return [answer.duplicated for answer in answers]


async def test_c6_a_lone_request_for_two_is_a_group(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        answer = await pipeline.request(Request("p", n=2))
    assert answer.duplicated == [False, True]
    assert answer.cached == [False, False]


async def test_c6_requests_of_one_tick_are_grouped_by_key_and_namespace(store):
    requests = [
        Request("p", n=2),
        Request("p", request_id="x"),
        Request("q"),
        Request("p", namespace="a"),
        Request("p", n=2, namespace="a"),
        Request("p"),
    ]
    expected = [[False, True], [True], [False], [False], [True, True], [True]]
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        assert await flags(pipeline, requests) == expected
        with cachepipe.run():
            assert await flags(pipeline, requests) == expected, "hits are flagged alike"


async def test_c6_equal_requests_of_a_batch_are_a_group(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        batch = Batch([Request("p"), Request("q"), Request("p", n=2), Request("p", namespace="a")])
        answers = await pipeline.batch_request(batch)
    assert [answer.duplicated for answer in answers] == [[False], [False], [True, True], [False]]


async def test_c6_one_task_that_awaits_request_after_request_makes_no_group(store):
    """Neither for misses nor for hits, which are served within one turn of the loop."""
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        for _ in range(2):
            with cachepipe.run():
                for _ in range(3):
                    assert (await pipeline.request(Request("p"))).duplicated == [False]
                for _ in range(2):
                    [answer] = await pipeline.batch_request(Batch([Request("p")]))
                    assert answer.duplicated == [False]


async def test_c6_a_stage_that_is_absent_leaves_its_flags_none(store):
    model = ScriptedModel()
    async with AsyncCacher(model, store) as cacher:
        alone = await cacher.request(Request("p", n=2))
    async with AsyncDeduplicator(model) as deduplicator:
        merged = await deduplicator.request(Request("p", n=2))
    assert (alone.cached, alone.duplicated) == ([False, False], None)
    assert (merged.cached, merged.duplicated) == (None, [False, True])


async def test_c6_a_deduplicator_alone_merges_by_itself():
    """One call with the summed n per (key, namespace); each request gets a part of its own."""
    model = ScriptedModel()
    requests = [Request("p"), Request("p", n=2, request_id="x"), Request("p", namespace="a"), Request("p")]
    async with AsyncDeduplicator(model) as deduplicator:
        answers = await asyncio.gather(*[deduplicator.request(request) for request in requests])
        stats = deduplicator.stats()
    assert sorted(model.asked) == [1, 4]
    assert [answer.duplicated for answer in answers] == [[False], [True, True], [False], [True]]
    assert len({sample for answer in answers for sample in answer.data}) == 5
    assert (stats.generated, stats.merged, stats.requests, stats.calls) == (5, 3, 4, 2)


async def test_c6_the_figures_add_up(store):
    model = ScriptedModel([4, None, ScriptedError()])
    async with OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Request("p", n=3))
        await pipeline.request(Request("p", n=2))
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("q"))
        with cachepipe.run():
            again = await pipeline.request(Request("p", n=3))
        stats = pipeline.stats()
    assert again.data == first.data
    assert stats.as_dict() == {
        "hits": 1 + 3,
        "misses": 3 + 1,
        "merged": 2 + 1 + 2,
        "generated": 5,
        "in_flight": 0,
        "unreported": 1,
        "requests": 4,
        "calls": 3,
        "queue_seconds": 0,
        "call_seconds": 0,
    }


async def test_c6_samples_in_flight_are_counted(store):
    model = ScriptedModel(hold=True)
    async with OnlineAPI(model, store) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", n=3)))
        await model.begun(1)
        assert pipeline.stats().in_flight == 3
        model.open()
        await task
        assert pipeline.stats().in_flight == 0
