"""The deduplicator alone around a model, and in front of a cacher (C6)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from cachepipe import AsyncCacher, AsyncDeduplicator, Batch, MemoryStore, Request, Response, StageClosed


@dataclass(frozen=True)
class Seeded(Request):
    seed: int | None = None


class Model:
    """Numbers its samples, so that no two are equal."""

    def __init__(self, *, max_n=None, gate=None):
        self.asked = []
        self.made = 0
        self.max_n = max_n
        self.gate = gate

    async def request(self, request):
        self.asked.append((request.prompt, request.n))
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        first, self.made = self.made, self.made + request.n
        return Response([f"{request.prompt}{number}" for number in range(first, self.made)])


def ask(stage, *prompts, **more):
    return [asyncio.ensure_future(stage.request(Request(prompt, **more))) for prompt in prompts]


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


# Alone.


def test_identical_requests_that_are_in_flight_together_are_one_call_with_the_summed_n(run):
    async def main():
        model = Model()
        answers = await asyncio.gather(*ask(AsyncDeduplicator(model), "a", "b", "a", "a", n=2))
        assert sorted(model.asked) == [("a", 6), ("b", 2)]
        samples = [sample for answer in answers for sample in answer.data]
        assert len(set(samples)) == 8
        assert all(len(answer.data) == 2 for answer in answers)

    run(main)


def test_the_first_sample_of_a_group_is_no_duplicate_and_all_others_are(run):
    """C6."""

    async def main():
        answers = await asyncio.gather(*ask(AsyncDeduplicator(Model()), "a", "a", "b", n=2))
        assert [answer.duplicated for answer in answers] == [[False, True], [True, True], [False, True]]
        assert [answer.cached for answer in answers] == [None, None, None]

    run(main)


def test_a_lone_request_with_two_samples_is_such_a_group(run):
    """C6."""

    async def main():
        stage = AsyncDeduplicator(Model())
        assert (await stage.request(Request("a", n=2))).duplicated == [False, True]
        assert (await stage.request(Request("a", n=1))).duplicated == [False]

    run(main)


def test_one_task_that_asks_again_and_again_is_not_in_flight_with_itself(run):
    class Instant:
        async def request(self, request):
            return Response(["x"] * request.n)

    async def main():
        stage = AsyncDeduplicator(AsyncCacher(Instant(), MemoryStore()))
        await stage.request(Request("a", request_id="1"))
        await stage.request(Request("a", request_id="2"))
        flags = [(await stage.request(Request("a", namespace="x"))).duplicated for _ in range(3)]
        assert flags == [[False]] * 3

    run(main)


def test_a_batch_is_served_together(run):
    async def main():
        model = Model()
        batch = Batch([Request("a"), Request("b"), Request("a", n=2)])
        answers = await AsyncDeduplicator(model).batch_request(batch)
        assert [answer.duplicated for answer in answers] == [[False], [False], [True, True]]
        assert sorted(model.asked) == [("a", 3), ("b", 1)]

    run(main)


def test_ids_do_not_tell_requests_apart_but_namespaces_do(run):
    async def main():
        model = Model()
        stage = AsyncDeduplicator(model)
        answers = await asyncio.gather(
            *ask(stage, "a", request_id="1"),
            *ask(stage, "a", request_id="2"),
            *ask(stage, "a", namespace="x"),
        )
        assert [answer.duplicated for answer in answers] == [[False], [True], [False]]
        assert len({sample for answer in answers for sample in answer.data}) == 3

    run(main)


def test_requests_with_a_seed_are_flagged_but_not_merged(run):
    """C4: they travel as their callers wrote them."""

    async def main():
        model = Model()
        stage = AsyncDeduplicator(model)
        await asyncio.gather(*(stage.request(Seeded("a", n=2, seed=0)) for _ in range(3)))
        assert model.asked == [("a", 2)] * 3

    run(main)


def test_a_call_asks_for_no_more_than_the_model_gives(run):
    async def main():
        model = Model(max_n=4)
        answers = await asyncio.gather(*ask(AsyncDeduplicator(model), "a", "a", "a", n=3))
        assert sorted(n for _, n in model.asked) == [1, 4, 4]
        assert len({sample for answer in answers for sample in answer.data}) == 9

    run(main)


def test_requests_within_the_window_share_a_call_and_later_ones_do_not(run):
    async def main():
        model = Model()
        stage = AsyncDeduplicator(model, window=10)
        first = ask(stage, "a")
        await asyncio.sleep(9)
        second = ask(stage, "a")
        answers = await asyncio.gather(*first, *second)
        assert model.asked == [("a", 2)]
        assert asyncio.get_running_loop().time() == pytest.approx(10)
        assert [answer.duplicated for answer in answers] == [[False], [True]]
        [later] = await asyncio.gather(*ask(stage, "a"))
        assert later.duplicated == [False]
        assert model.asked == [("a", 2), ("a", 1)]

    run(main)


def test_an_error_reaches_the_group_that_needed_the_call_and_no_other(run):
    """C8, as the adapter raised it."""
    error = ConnectionError("down")

    class Down(Model):
        async def request(self, request):
            if request.prompt == "a":
                raise error
            return await super().request(request)

    async def main():
        results = await asyncio.gather(*ask(AsyncDeduplicator(Down()), "a", "b", "a"), return_exceptions=True)
        assert results[0] is error
        assert results[2] is error
        assert len(results[1].data) == 1

    run(main)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_merged_call_that_is_refused_is_repeated_as_its_callers_wrote_it(status, run):
    """C4: and the limit is lowered for the run."""

    class Refused(Exception):  # noqa: N818 - as a client library has it
        status_code = status

    class Small(Model):
        async def request(self, request):
            if request.n > 2:
                self.asked.append((request.prompt, request.n))
                raise Refused
            return await super().request(request)

    async def main():
        model = Small()
        stage = AsyncDeduplicator(model)
        answers = await asyncio.gather(*ask(stage, "a", "a", "a", n=2))
        assert model.asked == [("a", 6), ("a", 2), ("a", 2), ("a", 2)]
        assert len({sample for answer in answers for sample in answer.data}) == 6
        await asyncio.gather(*ask(stage, "b", "b", n=1))
        assert model.asked[4:] == [("b", 2)]

    run(main)


def test_a_cancelled_caller_leaves_the_shared_call_running(run):
    async def main():
        gate = asyncio.Event()
        model = Model(gate=gate)
        tasks = ask(AsyncDeduplicator(model), "a", "a")
        await turns()
        tasks[0].cancel()
        await turns()
        gate.set()
        assert len((await tasks[1]).data) == 1
        assert tasks[0].cancelled()
        assert model.asked == [("a", 2)]

    run(main)


def test_a_call_that_nobody_waits_for_is_stopped(run):
    async def main():
        stopped = []

        class Watched(Model):
            async def request(self, request):
                try:
                    return await super().request(request)
                except asyncio.CancelledError:
                    stopped.append(request.prompt)
                    raise

        tasks = ask(AsyncDeduplicator(Watched(gate=asyncio.Event())), "a", "a")
        await turns()
        for task in tasks:
            task.cancel()
        await turns()
        assert stopped == ["a"]

    run(main)


def test_what_was_cancelled_before_its_window_ended_is_not_asked(run):
    async def main():
        model = Model()
        stage = AsyncDeduplicator(model, window=3600)
        kept, left = ask(stage, "kept", "left")
        await turns()
        left.cancel()
        await turns()
        await stage.close()  # which waits for no window
        assert model.asked == [("kept", 1)]
        assert (await kept).duplicated == [False]

    asyncio.run(main())  # in real time: the window is open


def test_closing_waits_for_what_is_in_flight(run):
    async def main():
        stage = AsyncDeduplicator(Model(), window=5)
        tasks = ask(stage, "a", "b")
        await turns(1)
        await stage.close()
        await turns(2)
        assert all(len(task.result().data) == 1 for task in tasks)
        with pytest.raises(StageClosed):
            await stage.request(Request("a"))
        with pytest.raises(StageClosed):
            await stage.batch_request(Batch([]))

    run(main)


def test_stats_count_samples(run):
    async def main():
        stage = AsyncDeduplicator(Model())
        await asyncio.gather(*ask(stage, "a", "a", "b", n=2))
        stats = stage.stats()
        assert (stats.requests, stats.misses, stats.generated, stats.calls, stats.in_flight) == (
            3,
            6,
            6,
            2,
            0,
        )
        assert stats.merged == 4
        assert repr(stage) == "<AsyncDeduplicator 4 samples merged>"

    run(main)


def test_a_window_is_a_number_of_seconds():
    for window in (-1, float("nan")):
        with pytest.raises(ValueError, match="window is a number of seconds"):
            AsyncDeduplicator(Model(), window=window)


# In front of a cacher.


def test_flags_of_the_two_stages_are_independent(run):
    """Cached tells who paid, duplicated who was served together."""

    async def main():
        stage = AsyncDeduplicator(AsyncCacher(Model(), MemoryStore()))
        answers = await asyncio.gather(*ask(stage, "a", "a", n=2), *ask(stage, "a", n=2, namespace="x"))
        assert [answer.duplicated for answer in answers] == [[False, True], [True, True], [False, True]]
        assert [answer.cached for answer in answers] == [[False] * 2, [False] * 2, [True] * 2]
        assert answers[2].data == answers[0].data
        assert (answers[0].indices, answers[1].indices) == ((0, 1), (2, 3))
        assert stage.stats().merged == 4

    run(main)


@pytest.mark.anyio
async def test_a_window_is_open_as_long_from_the_first_request_of_each_group(monkeypatch):
    timers = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda _after, *call, **_more: timers.append(call)
    )
    model = Model()
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
