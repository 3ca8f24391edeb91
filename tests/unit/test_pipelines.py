"""Stages put together."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import dataclass

import diskcache
import pytest

from cachepipe import (
    AsyncBatcher,
    AsyncCacher,
    AsyncDeduplicator,
    BadAnswer,
    Batch,
    CacheMiss,
    LocalAPI,
    MemoryStore,
    NotStored,
    OnlineAPI,
    OrderedLocalAPI,
    Request,
    RequestReorderer,
    Response,
    ShortAnswer,
    StageClosed,
    StoreError,
    UnkeyableValue,
)
from cachepipe.contract.schedule import MOST_TURNS
from cachepipe.stores import transaction
from cachepipe.stores.base import Claim, Commit
from cachepipe.testing import FaultyStore

PIPELINES = [OnlineAPI, LocalAPI, OrderedLocalAPI]


@dataclass(frozen=True)
class Chat(Request):
    temperature: float = 1
    stop: object = None


class Numbers:
    def __init__(self):
        self.made = 0
        self.calls = []

    def answer(self, request):
        first, self.made = self.made, self.made + request.n
        self.calls.append((request.prompt, request.n))
        return Response([f"{request.prompt}#{number}" for number in range(first, self.made)])


class Single(Numbers):
    async def request(self, request):
        await asyncio.sleep(0)
        return self.answer(request)


class Batched(Numbers):
    async def batch_request(self, batch):
        await asyncio.sleep(0)
        return [self.answer(request) for request in batch.requests]


class Both(Single, Batched):
    pass


def ask(pipeline, *prompts, **more):
    return [asyncio.ensure_future(pipeline.request(Request(prompt, **more))) for prompt in prompts]


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("model", [Single, Batched, Both])
def test_any_model_fits_into_any_pipeline(pipeline, model):
    async def main():
        async with pipeline(model(), MemoryStore()) as api:
            first = await asyncio.gather(*ask(api, *"abc", n=2))
            again = await api.batch_request(Batch([Request(p, n=2, namespace="x") for p in "abc"]))
        assert [answer.cached for answer in first] == [[False, False]] * 3
        assert [answer.duplicated for answer in first] == [[False, True]] * 3
        assert [answer.data for answer in again] == [answer.data for answer in first]
        assert [answer.cached for answer in again] == [[True, True]] * 3

    asyncio.run(main())


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("model", [Single, Batched])
@pytest.mark.parametrize("max_n", [1, 2, 3])
def test_a_limit_on_n_is_served_by_several_calls(pipeline, model, max_n):
    async def main():
        adapter = model()
        adapter.max_n = max_n
        options = {"hardware_batch_size": 4} if pipeline is OrderedLocalAPI else {"batch_size": 4}
        async with pipeline(adapter, MemoryStore(), **options) as api:
            response = await api.request(Request("a", n=7))
        assert len(set(response.data)) == 7
        assert max(n for _, n in adapter.calls) <= max_n

    asyncio.run(main())


@pytest.mark.parametrize("pipeline", [OnlineAPI, LocalAPI])
def test_what_code_for_cachesaver_passes_is_taken(pipeline, tmp_path):
    async def main():
        with diskcache.Cache(str(tmp_path / "c"), eviction_policy="none", cull_limit=0) as cache:
            api = pipeline(
                Both(),
                cache,
                2,
                1,
                allow_batch_overflow=True,
                correctness=False,
                hash=lambda request: request.prompt[:1],
            )
            first = await api.request(Request("apple", n=2))
            second = await api.request(Request("avocado", n=2, namespace="x"))
            await api.cleanup()
            assert second.data == first.data
            assert second.cached == [True, True]
            with pytest.raises(StageClosed):
                await api.request(Request("a"))
            assert len(cache) == 2, "closing a pipeline closes no cache that the caller opened"

    asyncio.run(main())


def test_ordered_local_takes_its_two_batch_sizes(tmp_path):
    api = OrderedLocalAPI(Both(), tmp_path / "c", collection_batch_size=4, hardware_batch_size=2, timeout=1)
    asyncio.run(api.cleanup())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_closing_waits_for_no_batch_window_though_a_claim_was_granted_late(pipeline):
    """Another thread or process was writing when the request was claimed."""

    async def main():
        store = FaultyStore(MemoryStore())
        store.locked = True
        sizes = (
            {"collection_batch_size": 9, "hardware_batch_size": 9}
            if pipeline is OrderedLocalAPI
            else {"batch_size": 9}
        )
        api = pipeline(Both(), store, timeout=3600, **sizes)
        async with asyncio.timeout(20):
            [miss] = ask(api, "new")
            await asyncio.sleep(0)
            await api.close()
            assert (await miss).cached == [False]

    asyncio.run(main())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_hit_never_waits_for_a_batch_window(pipeline):
    async def main():
        store = MemoryStore()
        async with pipeline(Both(), store) as first:
            known = await first.request(Request("known"))
        sizes = (
            {"collection_batch_size": 9, "hardware_batch_size": 9}
            if pipeline is OrderedLocalAPI
            else {"batch_size": 9}
        )
        api = pipeline(Both(), store, timeout=3600, **sizes)
        async with asyncio.timeout(20):
            [miss] = ask(api, "new")
            await turns()
            hit = await api.request(Request("known"))
            other = await api.request(Request("known", namespace="x"))
            assert hit.data == other.data == known.data
            assert not miss.done()
            await api.close()
            assert (await miss).cached == [False]

    asyncio.run(main())


def test_ordered_local_sorts_what_it_collects_then_cuts():
    class Recording(Batched):
        async def batch_request(self, batch):
            self.batches.append([request.request_id for request in batch.requests])
            return await super().batch_request(batch)

    async def main():
        model = Recording()
        model.batches = []
        api = OrderedLocalAPI(
            model, MemoryStore(), collection_batch_size=6, hardware_batch_size=2, timeout=3600
        )
        ids = ["10", "9", "100", "1", "20", "2"]
        answers = await asyncio.gather(*(api.request(Request(f"p{one}", request_id=one)) for one in ids))
        assert model.batches == [["1", "2"], ["9", "10"], ["20", "100"]]
        assert [answer.data[0].split("#")[0] for answer in answers] == [f"p{one}" for one in ids]
        await api.close()

    asyncio.run(main())


def test_online_delivers_each_answer_as_it_comes_and_local_as_a_batch():
    class Gated(Both):
        gates: dict

        async def request(self, request):
            await self.gates[request.prompt].wait()
            return self.answer(request)

    async def main():
        model = Gated()
        model.gates = {prompt: asyncio.Event() for prompt in "ab"}
        async with OnlineAPI(model, MemoryStore(), batch_size=2, timeout=3600) as api:
            first, second = ask(api, *"ab")
            model.gates["b"].set()
            assert (await second).data == ["b#0"]
            assert not first.done()
            model.gates["a"].set()
            await first
        model = Gated()
        async with LocalAPI(model, MemoryStore(), batch_size=2, timeout=3600) as api:
            await asyncio.gather(*ask(api, *"ab"))

    asyncio.run(main())


# The end.


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_close_waits_for_what_is_in_flight_and_the_rest_is_refused(pipeline):
    async def main():
        gate, store = asyncio.Event(), MemoryStore()

        class Slow(Both):
            async def request(self, request):
                await gate.wait()
                return self.answer(request)

            async def batch_request(self, batch):
                await gate.wait()
                return [self.answer(request) for request in batch.requests]

        api = pipeline(Slow(), store)
        tasks = ask(api, *"ab")
        await turns()
        closing = asyncio.ensure_future(api.close())
        await turns()
        assert not closing.done()
        with pytest.raises(StageClosed):
            await api.request(Request("c"))
        gate.set()
        await closing
        assert [task.result().cached for task in tasks] == [[False], [False]]
        await api.close()
        with pytest.raises(StageClosed):
            await api.batch_request(Batch([Request("c")]))
        async with pipeline(Both(), store) as again:
            assert (await again.request(Request("a"))).cached == [True]

    asyncio.run(main())


def test_close_keeps_what_cancelled_callers_had_paid_for():
    """C7."""

    async def main():
        store, model, gate = MemoryStore(), Single(), asyncio.Event()

        class Slow(Single):
            async def request(self, request):
                await gate.wait()
                return self.answer(request)

        api = OnlineAPI(Slow(), store)
        first, second = ask(api, "a", "a")
        await turns(MOST_TURNS + 5)  # the loop is never quiet
        first.cancel()
        await turns()
        gate.set()
        await api.close()
        await second
        assert store.totals()["samples"] == 2
        async with OnlineAPI(model, store) as again:
            answers = await asyncio.gather(*ask(again, "a", "a"))
        assert [answer.cached for answer in answers] == [[True], [True]]
        assert model.calls == []

    asyncio.run(main())


def test_a_pipeline_is_used_from_several_runs_of_the_loop():
    api = OnlineAPI(Single(), MemoryStore())
    data = [asyncio.run(api.request(Request("a", n=2))).data for _ in range(4)]
    assert len({sample for samples in data for sample in samples}) == 8
    asyncio.run(api.close())


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("last", "asked"), [({"request_id": "last"}, 2), ({"namespace": "y"}, 1)], ids=repr)
def test_draws_of_a_question_share_a_call_though_hundreds_came_in_between(tmp_path, disk, last, asked):
    """Whether the last of them needs anything or finds it stored."""

    async def main():
        model = Single()
        async with OnlineAPI(model, tmp_path / "c" if disk else MemoryStore()) as api:
            await api.request(Request("q"))
            crowd = ask(api, "q", n=2, namespace="x")
            crowd += ask(api, *[f"other {number}" for number in range(700)])
            crowd += ask(api, "q", **{"namespace": "x", **last})
            answers = await asyncio.gather(*crowd)
        assert [call for call in model.calls if call[0] == "q"] == [("q", 1), ("q", asked)]
        assert len({*answers[0].data, *answers[-1].data}) == 1 + asked

    asyncio.run(main())


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_several_threads_with_loops_of_their_own_share_a_pipeline(tmp_path, disk):
    """C1 and C4: samples independent, none bought twice, nobody stuck."""
    api = OnlineAPI(Single(), tmp_path / "c" if disk else MemoryStore())
    got, errors, start = [], [], threading.Barrier(6)

    async def main():
        return await asyncio.gather(*ask(api, *[f"q{i % 5}" for i in range(50)]))

    def work():
        try:
            start.wait()
            got.extend(asyncio.run(main()))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert sorted((a.key, a.indices) for a in got) == sorted(
        (key, (index,)) for key in {a.key for a in got} for index in range(60)
    )
    assert len({answer.data[0] for answer in got}) == 300
    assert api.stats().generated == 300
    asyncio.run(api.close())


def test_threads_in_namespaces_of_their_own_share_what_is_generated(tmp_path):
    """C4, across loops: a sample that another thread generates is awaited."""
    model = Single()
    api = OnlineAPI(model, tmp_path / "c")
    got, start = {}, threading.Barrier(4)

    def work(namespace):
        async def main():
            return await asyncio.gather(*ask(api, *map(str, range(40)), namespace=namespace))

        start.wait()
        got[namespace] = [answer.data for answer in asyncio.run(main())]

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got["a"] == got["b"] == got["c"] == got["d"]
    assert len(model.calls) == 40
    asyncio.run(api.close())


def test_a_pipeline_that_is_dropped_without_a_close_has_written_everything(tmp_path):
    api = OnlineAPI(Single(), tmp_path / "c")
    first = asyncio.run(api.request(Request("a")))
    del api
    gc.collect()
    api = OnlineAPI(Single(), tmp_path / "c")
    again = asyncio.run(api.request(Request("a")))
    assert (again.data, again.cached) == (first.data, [True])
    asyncio.run(api.close())


# Stores that fail.


def test_a_claim_that_fails_is_an_error_and_nothing_is_spent():
    async def main():
        store, model = FaultyStore(MemoryStore()), Single()
        async with OnlineAPI(model, store) as api:
            store.fail_next(StoreError("disk full"), on=Claim, times=2)
            with pytest.raises(StoreError, match="disk full"):
                await api.request(Request("a"))
            assert model.calls == []
            store._faults.clear()
            assert (await api.request(Request("a"))).indices == (0,), "its number was given back"

    asyncio.run(main())


def test_a_commit_that_fails_still_delivers_what_was_paid_for_and_says_so():
    """C7: with a warning that says why it is not cached."""

    async def main():
        store, model = FaultyStore(MemoryStore()), Single()
        async with OnlineAPI(model, store) as api:
            store.fail_next(StoreError("disk full"), on=Commit, times=2)
            with pytest.warns(NotStored, match="disk full"):
                response = await api.request(Request("a"))
            assert (response.data, response.cached) == (["a#0"], [False])
            with pytest.raises(NotStored, match="disk full"):  # where its user makes warnings errors
                await api.request(Request("b"))
            assert (await api.request(Request("b"))).cached == [False]

    asyncio.run(main())


def test_a_sample_that_cannot_be_stored_is_delivered_with_a_warning():
    thing = object()

    class Odd(Single):
        async def request(self, request):
            return Response([thing, "fine"])

    async def main():
        store = MemoryStore()
        async with OnlineAPI(Odd(), store) as api:
            with pytest.warns(NotStored, match="type object cannot be stored"):
                response = await api.request(Request("a", n=2))
        assert response.data == [thing, "fine"]
        assert store.totals()["samples"] == 1

    asyncio.run(main())


# Models that answer badly.


@pytest.mark.parametrize(
    "answer", [None, "text", 5, Response("text"), Response(None), Response({"a": 1})], ids=repr
)
def test_what_is_no_answer_is_an_error_and_not_cached(answer):
    """C8."""

    class Wrong:
        async def request(self, request):
            return answer

    async def main():
        store = MemoryStore()
        async with OnlineAPI(Wrong(), store) as api:
            with pytest.raises(BadAnswer):
                await api.request(Request("a"))
        assert store.totals()["samples"] == 0

    asyncio.run(main())


def test_a_model_that_returns_fewer_is_asked_for_the_rest():
    """C8: until three calls in a row bring nothing new."""

    class Stingy(Single):
        async def request(self, request):
            self.calls.append(request.n)
            if len(self.calls) in (2, 3):
                return Response([])
            return Response([f"s{len(self.calls)}"])

    async def main():
        model = Stingy()
        async with OnlineAPI(model, MemoryStore()) as api:
            assert (await api.request(Request("a", n=3))).data == ["s1", "s4", "s5"]
        assert model.calls == [3, 2, 2, 2, 1]

    asyncio.run(main())


def test_one_that_brings_nothing_three_times_is_given_up_and_what_came_is_kept():
    class Dry(Single):
        async def request(self, request):
            self.calls.append(request.n)
            return Response(["only"] if len(self.calls) == 1 else [])

    async def main():
        store, model = MemoryStore(), Dry()
        async with OnlineAPI(model, store) as api:
            with pytest.raises(ShortAnswer, match="still owes 1"):
                await api.request(Request("a", n=2))
            assert model.calls == [2, 1, 1, 1]
            assert (await api.request(Request("a"))).cached == [True]

    asyncio.run(main())


def test_extra_samples_are_kept_for_the_next():
    """C8."""

    class Generous(Single):
        async def request(self, request):
            self.calls.append(request.n)
            return Response([f"{len(self.calls)}.{i}" for i in range(request.n + 2)])

    async def main():
        model = Generous()
        async with OnlineAPI(model, MemoryStore()) as api:
            first = await api.request(Request("a"))
            rest = [await api.request(Request("a")) for _ in range(2)]
            assert [first.data, *(answer.data for answer in rest)] == [["1.0"], ["1.1"], ["1.2"]]
            assert [answer.cached for answer in rest] == [[True], [True]]
            assert api.stats().unreported == 2
        assert model.calls == [1]

    asyncio.run(main())


# Modes, scopes and what is refused.


def test_replay_never_calls_the_model():
    async def main():
        store, model = MemoryStore(), Single()
        async with OnlineAPI(Single(), store) as api:
            known = await api.request(Request("a", n=2))
        async with OnlineAPI(model, store, mode="replay") as api:
            assert (await api.request(Request("a", n=2))).data == known.data
            with pytest.raises(CacheMiss) as miss:
                await api.request(Chat("b", namespace="x", temperature=0.5))
            assert miss.value.namespace == "x"
            assert miss.value.request.prompt == "b"
            assert miss.value.key in str(miss.value)
        assert model.calls == []

    asyncio.run(main())


def test_bypass_leaves_no_trace():
    async def main():
        store = MemoryStore()
        async with OnlineAPI(Single(), store) as normal, OnlineAPI(Single(), store, mode="bypass") as bypass:
            await normal.request(Request("a"))
            response = await bypass.request(Request("a"))
            assert (response.cached, response.indices) == ([False], None)
            assert (await normal.request(Request("a"))).indices == (1,)
        assert store.totals()["draws"] == 2

    asyncio.run(main())


def test_repeat_same_shares_one_draw_per_key():
    """C1: the declared exception, in all namespaces."""

    async def main():
        store, model = MemoryStore(), Single()
        async with OnlineAPI(model, store, repeat="same") as api:
            answers = [
                await api.request(Request("a", n=n, namespace=name))
                for n, name in ((1, None), (2, "x"), (1, "y"))
            ]
            assert [answer.data for answer in answers] == [["a#0"], ["a#0", "a#1"], ["a#0"]]
        assert model.made == 2

    asyncio.run(main())


def test_scope_overrides_what_the_model_says():
    first, second = Single(), Single()
    first.model, second.cache_scope = "a", "b"
    store = MemoryStore()
    request = Request("q")
    keys = {
        OnlineAPI(model, store, scope=scope).key(request)
        for model, scope in ((first, None), (second, None), (Single(), None), (first, "c"), (second, "c"))
    }
    assert len(keys) == 4
    assert OnlineAPI(first, store).key(request) == OnlineAPI(Single(), store, scope="a").key(request)


def test_a_stage_in_between_hides_no_scope():
    model = Single()
    model.cache_scope = "s"
    expected = OnlineAPI(model, MemoryStore()).key(Request("q"))
    for stage in (AsyncBatcher(model), RequestReorderer(model), AsyncBatcher(RequestReorderer(model))):
        assert AsyncCacher(stage, MemoryStore()).question(Request("q")).key == expected


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "readwrite"}, ValueError, "mode is one of"),
        ({"repeat": "never"}, ValueError, "repeat is"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"window": -1}, ValueError, "window"),
        ({"classes": [int]}, TypeError, "classes="),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=repr,
)
def test_options_that_make_no_sense_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        OnlineAPI(Single(), MemoryStore(), **options)


def test_what_is_no_request_is_refused():
    async def main():
        async with OnlineAPI(Single(), MemoryStore()) as api:
            with pytest.raises(TypeError, match=r"Request\(prompt"):
                await api.request("what?")
            with pytest.raises(UnkeyableValue):
                await api.request(Request({1, 2}))
            assert (await api.request(Request("fine"))).cached == [False]

    asyncio.run(main())


@pytest.mark.parametrize("batch", [[Request("p")], (), Request("p"), None])
def test_what_is_no_batch_is_refused(batch):
    async def main():
        async with OnlineAPI(Single(), MemoryStore()) as pipeline:
            with pytest.raises(TypeError, match=r"takes a Batch; got .* Write Batch\(\[\.\.\.\]\)"):
                await pipeline.batch_request(batch)

    asyncio.run(main())


def test_reprs_show_state():
    async def main():
        async with OnlineAPI(Single(), MemoryStore()) as api:
            await asyncio.gather(*ask(api, "a", "a"))
            assert repr(api) == (
                "<OnlineAPI <AsyncCacher <MemoryStore 2 samples> 0 hits, 2 misses, 0 in flight>>"
            )
            stats = api.stats()
            assert (stats["hits"], stats["misses"], stats["merged"], stats.in_flight) == (0, 2, 1, 0)
            assert stats.as_dict()["generated"] == 2

    asyncio.run(main())


def test_stages_can_be_put_together_by_hand():
    async def main():
        model = Both()
        stack = AsyncDeduplicator(AsyncCacher(AsyncBatcher(RequestReorderer(model), 4, 0.0), MemoryStore()))
        async with stack:
            answers = await asyncio.gather(*ask(stack, "b", "a", "b"))
        assert [answer.duplicated for answer in answers] == [[False], [False], [True]]
        assert sorted(model.calls) == [("a", 1), ("b", 2)]

    asyncio.run(main())


def test_the_environment_switches_caching_off(tmp_path, monkeypatch):
    """Then nothing is read or written, not even the folder; a replay is still a replay."""
    monkeypatch.setenv("CACHEPIPE_DISABLE", "1")

    async def main():
        async with OnlineAPI(Both(), tmp_path / "c") as api:
            first, again = [await api.request(Request("p")) for _ in range(2)]
        assert (first.cached, again.cached) == ([False], [False])
        with pytest.raises(StoreError):
            OnlineAPI(Both(), tmp_path / "c", mode="replay")

    asyncio.run(main())
    assert not (tmp_path / "c").exists()


@pytest.mark.anyio
@pytest.mark.parametrize("company", [0, 1], ids=["alone", "in a crowd"])
async def test_what_a_request_holds_may_change_once_it_is_asked(company):
    """A lone claim is made at once, a crowd's at the end of the turn: the model gets what the key is of."""
    model = Single()
    async with AsyncCacher(model, MemoryStore()) as cacher:
        request = Request([{"role": "user", "content": "asked"}])
        others = [asyncio.create_task(cacher.request(Request(f"other {i}"))) for i in range(company)]
        asking = asyncio.create_task(cacher.request(request))
        await asyncio.sleep(0)  # all of them are claimed, or about to be; no call has begun
        assert model.calls == []
        request.prompt[0]["content"] = "changed"
        request.prompt.append("more")
        await asyncio.gather(asking, *others)
    assert [prompt for prompt, _ in model.calls if type(prompt) is list] == [
        [{"role": "user", "content": "asked"}]
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("front", [OnlineAPI, AsyncCacher])
@pytest.mark.parametrize("after", range(12))
async def test_c8_a_batch_that_is_cancelled_is_as_if_it_had_not_been_asked(front, after):
    """Of what had come, of what had failed, of what was stored, and of what was yet to come."""
    gate, told = asyncio.Event(), []

    class Model(Numbers):
        async def request(self, request):
            if request.prompt == "slow":
                await gate.wait()
            if request.prompt == "bad" and not gate.is_set():
                raise OSError("down")
            return self.answer(request)

    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with front(Model(), MemoryStore()) as api:
        await api.request(Request("known", namespace="other"))
        batch = Batch([Request(prompt) for prompt in ("slow", "quick", "bad", "known")])
        asking = asyncio.create_task(api.batch_request(batch))
        await turns(after)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        gate.set()
        again = await api.batch_request(batch)
    stats = api.stats()
    assert [answer.indices for answer in again] == [(0,)] * 4
    assert [answer.cached for answer in again if answer.key != again[1].key] == [[False], [False], [True]]
    assert again[1].cached == [stats.unreported == 1]
    assert (stats.generated, stats.misses + stats.unreported) == (4, 4)
    del asking
    gc.collect()
    assert told == []


@pytest.mark.anyio
@pytest.mark.parametrize("front", [OnlineAPI, AsyncCacher])
@pytest.mark.parametrize("mode", ["read-write", "bypass"])
async def test_a_call_of_a_batch_that_is_stopped_from_outside_stops_no_other(front, mode):
    class Model(Single):
        async def request(self, request):
            if request.prompt == "stopped":
                raise asyncio.CancelledError
            return await super().request(request)

    async with front(Model(), MemoryStore(), mode=mode) as api:
        batch = Batch([Request(prompt) for prompt in ("first", "stopped", "last")])
        first, stopped, last = await api.batch_request(batch, return_exceptions=True)
        assert (first.data, last.data) == (["first#0"], ["last#1"])
        assert isinstance(stopped, asyncio.CancelledError)
        with pytest.raises(asyncio.CancelledError):
            await api.batch_request(batch)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_crowd_costs_the_same_per_head_whatever_its_size(tmp_path, monkeypatch, disk):
    """What is queued is not looked through again with each part that is written."""
    looks, usual = 0, Claim.draw

    def looked(claim):
        nonlocal looks
        looks += 1
        return usual.__get__(claim)

    monkeypatch.setattr(Claim, "draw", property(looked, usual.__set__))

    async def per_head(size):
        nonlocal looks
        async with OnlineAPI(Single(), tmp_path / f"{size}" if disk else MemoryStore()) as api:
            looks = 0
            await asyncio.gather(*ask(api, *map(str, range(size))))
            return looks / size

    assert asyncio.run(per_head(2560)) <= asyncio.run(per_head(256)) + 1


def test_ids_of_more_keys_than_are_remembered_are_looked_up_together(tmp_path, monkeypatch):
    monkeypatch.setattr(transaction, "_REMEMBERED", 50)
    statements = []

    async def main():
        async with OnlineAPI(Single(), tmp_path / "c") as api:
            api.store._writable()[0].set_trace_callback(statements.append)
            await asyncio.gather(*ask(api, *map(str, range(500))))

    asyncio.run(main())
    assert sum("FROM keys WHERE key = " in statement for statement in statements) < 25
