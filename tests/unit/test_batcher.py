"""The batcher, on a loop whose clock jumps to the next timer when nothing is left to do."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass

import pytest

from cachepipe import AsyncBatcher, Batch, BatchMismatch, Request, Response, StageClosed
from cachepipe.testing import ScriptedModel


@dataclass(frozen=True)
class Seeded(Request):
    seed: int | None = None
    best_of: int | None = None


def now():
    return round(asyncio.get_running_loop().time(), 3)


class Batched:
    """Answers batches, and records what each held and when it came."""

    def __init__(self, *, seconds=0.0, gate=None):
        self.batches = []
        self.times = []
        self.flying = self.most = 0
        self.seconds = seconds
        self.gate = gate

    async def batch_request(self, batch):
        self.batches.append([(request.prompt, request.n) for request in batch.requests])
        self.times.append(now())
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.seconds)
        finally:
            self.flying -= 1
        return [self.answer(request) for request in batch.requests]

    def answer(self, request):
        return Response([f"{request.prompt}.{i}" for i in range(request.n)])


class Single:
    """Answers single requests."""

    max_n = None

    def __init__(self):
        self.asked = []

    async def request(self, request):
        self.asked.append((request.prompt, request.n))
        await asyncio.sleep(1)
        return Response([f"{request.prompt}.{i}" for i in range(request.n)])


class Uneven(Single):
    """Takes as many seconds as the prompt says."""

    async def request(self, request):
        await asyncio.sleep(float(request.prompt))
        return Response([request.prompt])


def ask(batcher, *prompts, n=1):
    return [asyncio.ensure_future(batcher.request(Request(prompt, n=n))) for prompt in prompts]


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


def sizes(model):
    return [sum(n for _, n in batch) for batch in model.batches]


# Cutting.


@pytest.mark.parametrize(("ns", "expected"), [([1] * 7, [3, 3, 1]), ([2, 2, 1], [2, 3]), ([3, 1, 2], [3, 3])])
def test_a_batch_holds_at_most_its_size_in_samples(ns, expected, run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 3, 5)
        await asyncio.gather(*(batcher.request(Request(str(i), n=n)) for i, n in enumerate(ns)))
        assert sizes(model) == expected

    run(main)


def test_a_full_batch_never_waits_for_its_window(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 2, 3600)
        await asyncio.gather(*ask(batcher, *"abcd"))
        assert model.times == [0, 0]
        assert now() == 0

    run(main)


def test_a_batch_that_is_not_full_leaves_a_window_after_its_first_request(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 10, 5)
        first = ask(batcher, "a")
        await asyncio.sleep(3)
        second = ask(batcher, "b")
        await asyncio.gather(*first, *second)
        assert model.times == [5]
        assert model.batches == [[("a", 1), ("b", 1)]]
        await asyncio.gather(*ask(batcher, "c"))
        assert model.times == [5, 10]

    run(main)


def test_a_window_of_zero_is_a_turn_of_the_loop(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 10)
        await asyncio.gather(*ask(batcher, *"abc"))
        assert sizes(model) == [3]
        assert now() == 0

    run(main)


def test_a_request_that_does_not_fit_sends_the_open_batch_and_opens_another(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 3, 5)
        small, large = ask(batcher, "small", n=2) + ask(batcher, "large", n=2)
        await small
        assert model.times == [0]
        await large
        assert model.times == [0, 5]

    run(main)


def test_a_timer_of_a_batch_that_has_left_cuts_no_other(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 2, 5)
        first = ask(batcher, "a")
        await asyncio.sleep(4)
        first += ask(batcher, "b")
        await asyncio.gather(*first)
        await asyncio.gather(*ask(batcher, "c"))
        assert model.times == [4, 9]

    run(main)


def test_a_request_larger_than_a_batch_is_cut(run):
    async def main():
        model = Batched()
        response = await AsyncBatcher(model, 3, 5).request(Request("a", n=8))
        assert len(response.data) == 8
        assert sizes(model) == [3, 3, 2]

    run(main)


@pytest.mark.parametrize("fields", [{"seed": 0}, {"best_of": 9}])
def test_one_with_a_seed_or_best_of_travels_whole(fields, run):
    """C4: such requests are neither merged nor cut."""

    async def main():
        model = Batched()
        await AsyncBatcher(model, 3, 5).request(Seeded("a", n=8, **fields))
        assert sizes(model) == [8]

    run(main)


def test_overflow_lets_it_travel_whole_too_but_within_the_models_limit(run):
    async def main():
        model = Batched()
        await AsyncBatcher(model, 3, 5, allow_batch_overflow=True).request(Request("a", n=8))
        model.max_n = 5
        await AsyncBatcher(model, 30, 5, allow_batch_overflow=True).request(Request("a", n=8))
        assert sizes(model) == [8, 8]
        assert [n for batch in model.batches for _, n in batch] == [8, 5, 3]

    run(main)


# In flight.


def test_batches_do_not_wait_for_one_another(run):
    async def main():
        model = Batched(seconds=10)
        batcher = AsyncBatcher(model, 1)
        await asyncio.gather(*ask(batcher, *"abcde"))
        assert (model.most, now()) == (5, 10)

    run(main)


def test_at_most_so_many_are_in_flight_as_were_asked_for(run):
    async def main():
        model = Batched(seconds=10)
        batcher = AsyncBatcher(model, 1, in_flight=2)
        tasks = ask(batcher, *"abcde")
        await turns()
        assert repr(batcher) == "<AsyncBatcher 3 queued, 2 in flight>"
        await asyncio.gather(*tasks)
        assert (model.most, now()) == (2, 30)
        assert [prompt for [(prompt, _)] in model.batches] == list("abcde")

    run(main)


# Each its own.


def test_each_request_gets_its_own_result_in_any_order(run):
    async def main():
        batcher = AsyncBatcher(Batched(), 4, 1)
        answers = await batcher.batch_request(
            Batch([Request(p, n=n) for p, n in (("a", 2), ("b", 1), ("a", 1))])
        )
        assert [answer.data for answer in answers] == [["a.0", "a.1"], ["b.0"], ["a.0"]]

    run(main)


def test_each_request_gets_its_own_error(run):
    class Picky(Batched):
        def answer(self, request):
            return KeyError(request.prompt) if request.prompt in "bd" else super().answer(request)

    async def main():
        batcher = AsyncBatcher(Picky(), 4, 1)
        results = await asyncio.gather(*ask(batcher, *"abcd"), return_exceptions=True)
        assert results[0].data == ["a.0"]
        assert results[2].data == ["c.0"]
        assert [(type(e), e.args) for e in results[1::2]] == [(KeyError, ("b",)), (KeyError, ("d",))]

    run(main)


def test_a_batch_that_fails_as_a_whole_is_repeated_one_by_one(run):
    class Fragile(Batched):
        def answer(self, request):
            if request.prompt == "bad":
                raise ConnectionError(request.prompt)
            return super().answer(request)

    async def main():
        model = Fragile()
        results = await asyncio.gather(
            *ask(AsyncBatcher(model, 3, 1), "a", "bad", "b"), return_exceptions=True
        )
        assert [getattr(result, "data", None) for result in results] == [["a.0"], None, ["b.0"]]
        assert isinstance(results[1], ConnectionError)
        assert sizes(model) == [3, 1, 1, 1]

    run(main)


def test_a_lone_request_that_fails_is_not_repeated(run):
    class Fragile(Batched):
        def answer(self, request):
            raise ConnectionError

    async def main():
        model = Fragile()
        with pytest.raises(ConnectionError):
            await AsyncBatcher(model, 3).request(Request("a"))
        assert sizes(model) == [1]

    run(main)


@pytest.mark.parametrize("returned", [0, 1, 3])
def test_another_number_of_responses_is_an_error_for_all_and_nobody_hangs(returned, run):
    class Wrong:
        async def batch_request(self, batch):
            return [Response(["x"])] * returned

    async def main():
        results = await asyncio.gather(*ask(AsyncBatcher(Wrong(), 2, 1), *"ab"), return_exceptions=True)
        assert [type(result) for result in results] == [BatchMismatch, BatchMismatch]
        assert str(results[0]).startswith(f"sent 2 requests, the model returned {returned} responses")

    run(main)


def test_return_exceptions_puts_errors_in_their_places(run):
    class Picky(Batched):
        def answer(self, request):
            return KeyError("b") if request.prompt == "b" else super().answer(request)

    async def main():
        batcher = AsyncBatcher(Picky(), 3, 1)
        batch = Batch([Request(prompt) for prompt in "abc"])
        results = await batcher.batch_request(batch, return_exceptions=True)
        assert [type(result) for result in results] == [Response, KeyError, Response]
        with pytest.raises(KeyError):
            await batcher.batch_request(batch)

    run(main)


# A model that has only request, or both.


def test_a_model_that_has_only_request_is_asked_for_each_at_once(run):
    async def main():
        model = Single()
        answers = await asyncio.gather(*ask(AsyncBatcher(model, 3, 1), *"abc"))
        assert [answer.data for answer in answers] == [["a.0"], ["b.0"], ["c.0"]]
        assert now() == 1

    run(main)


def test_prefer_chooses_between_the_methods_of_a_model_that_has_both(run):
    class Both(Batched):
        def __init__(self):
            super().__init__()
            self.singles = 0

        async def request(self, request):
            self.singles += 1
            return self.answer(request)

    async def main():
        for prefer, expected in (("batch", (1, 0)), ("request", (0, 3))):
            model = Both()
            await asyncio.gather(*ask(AsyncBatcher(model, 3, 1, prefer=prefer), *"abc"))
            assert (len(model.batches), model.singles) == expected

    run(main)


@pytest.mark.parametrize("prefer", ["request", "batch"])
def test_a_model_of_single_requests_delivers_each_answer_as_it_comes(prefer, run):
    async def main():
        tasks = ask(AsyncBatcher(Uneven(), 3, prefer=prefer), "9", "1", "5")
        await tasks[1]
        assert now() == 1
        await asyncio.gather(*tasks)

    run(main)


# Cancellation.


def test_a_cancelled_request_leaves_the_queue(run):
    async def main():
        model = Batched()
        batcher = AsyncBatcher(model, 3, 5)
        tasks = ask(batcher, *"de")
        await turns()
        tasks[0].cancel()
        more = ask(batcher, "f", "g")
        await asyncio.gather(*tasks[1:], *more)
        assert "d" not in [prompt for batch in model.batches for prompt, _ in batch]
        assert model.times[-1] == 0, "the place that it gave up was filled"

    run(main)


def test_one_that_waits_for_its_turn_to_fly_leaves_too(run):
    async def main():
        model = Batched(seconds=10)
        batcher = AsyncBatcher(model, 1, in_flight=1)
        tasks = ask(batcher, *"abc")
        await turns()
        tasks[1].cancel()
        await asyncio.gather(tasks[0], tasks[2])
        assert [prompt for [(prompt, _)] in model.batches] == ["a", "c"]
        assert repr(batcher) == "<AsyncBatcher 0 queued, 0 in flight>"

    run(main)


def test_one_in_flight_leaves_the_others_flying(run):
    async def main():
        gate = asyncio.Event()
        model = Batched(gate=gate)
        tasks = ask(AsyncBatcher(model, 3, 1), *"abc")
        await turns()
        tasks[1].cancel()
        await turns()
        assert model.flying == 1
        gate.set()
        answers = await asyncio.gather(tasks[0], tasks[2])
        assert [answer.data for answer in answers] == [["a.0"], ["c.0"]]
        assert tasks[1].cancelled()

    run(main)


def test_a_batch_that_nobody_wants_any_more_is_stopped(run):
    async def main():
        model = Batched(gate=asyncio.Event())
        tasks = ask(AsyncBatcher(model, 2, 1), *"ab")
        await turns()
        for task in tasks:
            task.cancel()
        await turns()
        assert model.flying == 0
        assert all(task.cancelled() for task in tasks)

    run(main)


def test_what_is_stopped_is_stopped_once_and_may_end_as_it_needs(run):
    """Also where its requests end one after the other."""
    ended = []

    class Careful(Single):
        async def request(self, request):
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(float(request.prompt))
                ended.append(request.prompt)

    async def main():
        tasks = ask(AsyncBatcher(Careful(), 3), "1", "2", "3")
        await turns()
        for task in tasks:
            task.cancel()
        await asyncio.sleep(5)
        assert ended == ["1", "2", "3"]

    run(main)


def test_a_batch_whose_other_requests_have_their_answers_is_stopped_by_the_last_who_waits(run):
    async def main():
        batcher = AsyncBatcher(Uneven(), 4)
        tasks = ask(batcher, "1", "2", "8", "9")
        await asyncio.sleep(1.5)
        tasks[3].cancel()
        await asyncio.sleep(1)
        assert tasks[1].result().data == ["2"]
        assert repr(batcher) == "<AsyncBatcher 0 queued, 1 in flight>"
        tasks[2].cancel()
        await turns()
        assert repr(batcher) == "<AsyncBatcher 0 queued, 0 in flight>"
        assert now() == 2.5

    run(main)


def test_a_ticket_that_has_its_answer_and_is_withdrawn_stops_nobody_elses(run):
    async def main():
        batcher = AsyncBatcher(Uneven(), 2)
        first, second = (batcher.submit(Request(prompt)) for prompt in "12")
        assert (await first).data == ["1"]
        first.withdraw()
        first.withdraw()
        assert (await second).data == ["2"]

    run(main)


# The end.


def test_closing_sends_what_is_queued_and_waits_for_what_is_in_flight(run):
    async def main():
        model = Batched(seconds=10)
        batcher = AsyncBatcher(model, 3, 3600)
        tasks = ask(batcher, *"abcd")
        await turns()
        await batcher.close()
        assert now() == 10
        assert [task.result().data for task in tasks] == [[f"{prompt}.0"] for prompt in "abcd"]
        await batcher.close()
        for call in (batcher.request(Request("e")), batcher.batch_request(Batch([Request("e")]))):
            with pytest.raises(StageClosed, match="closed"):
                await call

    run(main)


def test_closing_in_mid_batch_with_a_limit_in_flight_delivers_or_refuses_everything(run):
    async def main():
        model = Batched(seconds=10)
        batcher = AsyncBatcher(model, 1, in_flight=1)
        async with batcher:
            tasks = ask(batcher, *"abcd")
            await turns()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, Response | StageClosed) for result in results)
        assert results[0].data == ["a.0"]
        with pytest.raises(StageClosed):
            async with batcher:
                pass

    run(main)


def test_a_batch_that_is_cancelled_from_within_reaches_its_callers(run):
    class Cancelling:
        async def batch_request(self, batch):
            raise asyncio.CancelledError

    async def main():
        [task] = ask(AsyncBatcher(Cancelling(), 1), "a")
        await asyncio.wait([task], timeout=60)
        assert task.done()
        assert task.cancelled()

    run(main)


def test_one_batcher_serves_several_loops_one_after_the_other(run):
    batcher = AsyncBatcher(Batched(), 2, 1)

    async def main():
        answers = await asyncio.gather(*ask(batcher, *"abc"))
        assert [answer.data for answer in answers] == [["a.0"], ["b.0"], ["c.0"]]

    for _ in range(3):
        run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": 1.5},
        {"batch_size": True},
        {"timeout": -1},
        {"timeout": None},
        {"timeout": float("nan")},
        {"in_flight": 0},
    ],
    ids=repr,
)
def test_settings_that_make_no_sense_are_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match="at least"):
        AsyncBatcher(Batched(), **options)


@pytest.mark.parametrize("model", [None, 5, "gpt", Batched, object()])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="a model has"):
        AsyncBatcher(model)


def test_a_thousand_requests_make_as_few_batches_as_there_can_be(run):
    async def main():
        model = Batched()
        await asyncio.gather(*ask(AsyncBatcher(model, 64, 1), *map(str, range(1000))))
        assert len(model.batches) == 16
        assert sum(sizes(model)) == 1000

    run(main)


def test_a_batcher_that_nobody_refers_to_is_gone_without_the_garbage_collector():
    gc.disable()
    try:
        batcher = AsyncBatcher(ScriptedModel())
        gone = weakref.ref(batcher)
        del batcher
        assert gone() is None
    finally:
        gc.enable()
