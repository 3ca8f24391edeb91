"""The limiter and the retrier as stages of a pipeline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from cachepipe import (
    AsyncLimiter,
    AsyncRetrier,
    Batch,
    LocalAPI,
    MemoryStore,
    OnlineAPI,
    Request,
    Response,
    Service,
    context,
)
from cachepipe.flow.flow import Flow
from cachepipe.flow.limits import Limits
from cachepipe.flow.retries import Retries
from cachepipe.testing import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Asked(Request):
    model: str | None = None
    max_tokens: int | None = None


def flow(clock, *quota, **options):
    return Flow(Limits(*quota, adaptive=False, clock=clock, **options), Retries(first=1, clock=clock))


class Batches:
    """A model that takes batches only."""

    def __init__(self, *failures):
        self.failures, self.sizes = list(failures), []

    async def batch_request(self, batch):
        self.sizes.append(len(batch))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return [Response([f"{request.prompt} answered"] * request.n) for request in batch]


async def test_hits_and_waits_for_others_samples_cost_no_quota(clock):
    model = ScriptedModel()
    service = flow(clock, 2, None, 60.0)
    async with OnlineAPI(model, MemoryStore(), service=service) as pipeline:
        first = await asyncio.gather(
            *[pipeline.request(Request("p", namespace=f"ns{number}")) for number in range(50)]
        )
        again = await asyncio.gather(
            *[pipeline.request(Request("p", namespace=f"ns{number}")) for number in range(50, 100)]
        )
    assert {response.data[0] for response in first + again} == {first[0].data[0]}
    assert service.limits.stats().calls == 1
    assert service.limits.stats().queue_seconds == 0


async def test_misses_wait_for_their_turn(clock):
    service = flow(clock, 2, None, 60.0)
    async with OnlineAPI(ScriptedModel(), MemoryStore(), service=service) as pipeline:
        tasks = [asyncio.create_task(pipeline.request(Request(f"p{number}"))) for number in range(4)]
        await clock.settle()
        assert [task.done() for task in tasks] == [True, True, False, False]
        await clock.advance(60)
        assert all(task.done() for task in tasks)
    assert service.limits.stats().queue_seconds == 120


async def test_a_pipeline_tells_time_in_the_queue_from_time_in_calls(clock):
    """Its own, where others share the service; hits have neither."""

    class Slow:
        async def request(self, request):
            await clock.sleep(5)
            return Response(["answer"] * request.n)

    service = flow(clock, 1, None, 60.0, transit=60)
    store = MemoryStore()
    async with (
        OnlineAPI(Slow(), store, service=service) as one,
        OnlineAPI(AsyncLimiter(Slow(), limits=service.limits), MemoryStore()) as other,
    ):
        tasks = [asyncio.create_task(each.request(Request("p"))) for each in (one, other)]
        await clock.advance(500)
        assert all(task.done() for task in tasks)
        await one.request(Request("p", namespace="b"))
        assert (one.stats().queue_seconds, one.stats().call_seconds) == (0, 5)
        assert (other.stats()["queue_seconds"], other.stats()["call_seconds"]) == (65, 5)
    assert (service.limits.stats().queue_seconds, service.limits.stats().call_seconds) == (65, 10)
    async with OnlineAPI(ScriptedModel(), store) as unlimited:
        assert (unlimited.stats().queue_seconds, unlimited.stats().call_seconds) == (0, 0)


async def test_pipelines_share_a_service(clock):
    service = flow(clock, 1, None, 60.0)
    one = OnlineAPI(ScriptedModel(), MemoryStore(), service=service)
    other = OnlineAPI(ScriptedModel(), MemoryStore(), service=service)
    async with one, other:
        await one.request(Request("p"))
        task = asyncio.create_task(other.request(Request("p")))
        await clock.settle()
        assert not task.done()
        await clock.advance(60)
        assert task.done()


async def test_a_failed_call_is_made_again_each_attempt_in_its_turn(clock):
    model = ScriptedModel([ScriptedError(status_code=503), ScriptedError(status_code=429)])
    service = flow(clock, 1, None, 60.0)
    async with OnlineAPI(model, MemoryStore(), service=service) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p")))
        await clock.advance(500)
        assert (await task).cached == [False]
    stats = service.limits.stats()
    assert (stats.calls, stats.retries, stats.overloaded, stats.refused, stats.answered) == (3, 2, 1, 1, 1)


async def test_what_cannot_succeed_is_not_made_again(clock):
    model = ScriptedModel([ScriptedError(status_code=401)])
    async with OnlineAPI(model, MemoryStore(), service=flow(clock)) as pipeline:
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("p"))
    assert len(model.calls) == 1


async def test_models_are_limited_by_name_and_by_tokens(clock):
    limiter = AsyncLimiter(
        ScriptedModel(), None, 100, 60.0, per_model={"slow": {"max_requests": 1}}, adaptive=False, clock=clock
    )
    slow = [asyncio.create_task(limiter.request(Asked("p", model="slow", max_tokens=1))) for _ in range(2)]
    large = [asyncio.create_task(limiter.request(Asked("p", max_tokens=60))) for _ in range(2)]
    await clock.settle()
    assert [task.done() for task in slow + large] == [True, False, True, False]
    await clock.advance(130)
    assert all(task.done() for task in slow + large)


async def test_usage_that_samples_tell_puts_tokens_right(clock):
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    limiter = AsyncLimiter(ScriptedModel([[{"usage": usage}]]), None, 1000, 60.0, clock=clock)
    await limiter.request(Asked("p", max_tokens=900))
    assert limiter.stats().tokens == 12


async def test_a_batch_is_one_call_of_a_model_that_takes_batches(clock):
    model = Batches()
    service = flow(clock, 1, None, 60.0)
    async with LocalAPI(model, MemoryStore(), batch_size=8, service=service) as pipeline:
        responses = await pipeline.batch_request(Batch([Request(f"p{number}") for number in range(8)]))
    assert [response.data for response in responses] == [[f"p{number} answered"] for number in range(8)]
    assert model.sizes == [8]
    assert service.limits.stats().calls == 1


async def test_a_model_that_takes_batches_only_gets_them_from_an_online_pipeline_too(clock):
    model = Batches()
    async with OnlineAPI(model, MemoryStore(), batch_size=4, service=flow(clock)) as pipeline:
        await pipeline.batch_request(Batch([Request(f"p{number}") for number in range(8)]))
    assert model.sizes == [4, 4]


async def test_what_failed_of_a_batch_is_asked_for_again_together(clock):
    class Partly(Batches):
        async def batch_request(self, batch):
            answers = await super().batch_request(batch)
            if len(self.sizes) == 1:
                answers[1] = answers[3] = ScriptedError(status_code=503)
                answers[2] = ScriptedError(status_code=400)
            return answers

    model = Partly()
    retrier = AsyncRetrier(AsyncLimiter(model, clock=clock), clock=clock)
    task = asyncio.create_task(
        retrier.batch_request(Batch([Request(f"p{number}") for number in range(5)]), return_exceptions=True)
    )
    await clock.advance(10)
    answers = await task
    assert model.sizes == [5, 2]
    assert [type(answer).__name__ for answer in answers] == [
        "Response", "Response", "ScriptedError", "Response", "Response",
    ]  # fmt: skip


@pytest.mark.parametrize("when", ["while it waits", "in its turn", "in the call"])
async def test_what_has_come_is_kept_by_who_is_cancelled_before_the_rest_is_asked_for_again(clock, when):
    class Partly(Batches):
        async def batch_request(self, batch):
            answers = await super().batch_request(batch)
            if len(self.sizes) > 1:
                await clock.sleep(1000)
            return [answers[0], ScriptedError(status_code=503)]

    quota = (1, None, 60.0) if when == "in its turn" else ()
    store = MemoryStore()
    async with LocalAPI(Partly(), store, batch_size=2, service=flow(clock, *quota)) as pipeline:
        tasks = [asyncio.create_task(pipeline.request(Request(prompt))) for prompt in "ab"]
        await clock.settle()
        await clock.advance({"while it waits": 0.1, "in its turn": 10, "in the call": 10}[when])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await clock.settle()
        assert store.sample(pipeline.key(Request("a")), 0) is not None


async def test_a_batch_that_fails_whole_is_repeated_one_by_one_each_in_its_turn(clock):
    model = Batches(ScriptedError(status_code=400))
    limiter = AsyncLimiter(model, 2, None, 60.0, adaptive=False, clock=clock)
    task = asyncio.create_task(limiter.batch_request(Batch([Request("a"), Request("b")])))
    await clock.advance(61)
    assert [response.data for response in await task] == [["a answered"], ["b answered"]]
    assert model.sizes == [2, 1, 1]
    assert limiter.stats().calls == 3


async def test_a_stage_works_alone_and_says_what_it_is(clock):
    model = ScriptedModel()
    async with AsyncRetrier(AsyncLimiter(model, 5, None, 1.0, clock=clock), 3, clock=clock) as stage:
        assert len((await stage.request(Request("p", n=2))).data) == 2
    assert repr(AsyncLimiter(model, 5, None, 1.0)).startswith("<AsyncLimiter <Limits 5 requests per 1 s")
    assert repr(AsyncRetrier(model, 3)) == "<AsyncRetrier <Retries 3 at most, within 600 s>>"


async def test_a_call_within_a_call_does_not_wait_for_itself(clock):
    """An adapter that calls through the same limits takes no second place, but requests all the same."""
    limits = Limits(3, None, 60.0, max_concurrency=1, clock=clock)
    below = AsyncLimiter(ScriptedModel(), limits=limits)

    class Agent:
        async def request(self, request):
            return await asyncio.create_task(below.request(request))

    above = AsyncLimiter(Agent(), limits=limits)
    tasks = [asyncio.create_task(above.request(Request(prompt))) for prompt in "pq"]
    await clock.settle()
    assert [task.done() for task in tasks] == [True, False]  # the fourth request is one too many
    assert limits.stats().in_flight == 1
    await clock.advance(60)
    assert all(task.done() for task in tasks)
    assert (limits.stats().calls, limits.stats().in_flight) == (4, 0)


async def test_a_call_that_outlives_the_one_it_began_in_takes_a_place(clock):
    limits = Limits(max_concurrency=1, clock=clock)
    below = AsyncLimiter(ScriptedModel(), limits=limits)
    begun = []

    class Agent:
        async def request(self, request):
            async def later():
                await clock.sleep(10)
                return await below.request(request)

            begun.append(asyncio.create_task(later()))
            return Response(["answer"])

    await AsyncLimiter(Agent(), limits=limits).request(Request("p"))
    slot = await limits.enter()
    await clock.advance(20)
    assert not begun[0].done()
    slot.end()
    await begun[0]


async def test_shared_limits_keep_their_own_quota():
    with pytest.raises(TypeError, match="have quotas of their own"):
        AsyncLimiter(ScriptedModel(), 5, limits=Limits())


async def test_what_is_no_service_is_refused_before_anything_is_spent():
    with pytest.raises(TypeError, match="service= takes a Service"):
        OnlineAPI(ScriptedModel(), MemoryStore(), service="https://host/v1")


async def test_an_adapter_knows_that_others_make_its_attempts(clock):
    seen = []

    class Adapter:
        async def request(self, request):
            attempt = context.attempt.get()
            attempt.headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}
            seen.append((attempt.number, attempt.sole))
            return Response(["answer"])

    service = Service("https://host/v1", clock=clock)
    async with OnlineAPI(Adapter(), MemoryStore(), service=service) as pipeline:
        await pipeline.request(Request("p"))
        task = asyncio.create_task(pipeline.request(Request("q")))
        await clock.advance(8)
        assert seen == [(0, True)]  # what the headers say is kept to
        await clock.advance(1)
        assert task.done()
    assert context.attempt.get() is None
