"""C1 to C3 in plain words, and the modes: replay, refresh, bypass, and repeat="same"."""

from __future__ import annotations

import asyncio
import random

import pytest

import cachepipe
from cachepipe import Batch, CacheMiss, OnlineAPI, Request, Response, StoreError
from cachepipe.testing import FaultyStore
from cachepipe.testing.models import ScriptedError, ScriptedModel

pytestmark = pytest.mark.anyio


class NoModel:
    """A model that must not be called."""

    cache_scope = "m"

    async def request(self, request):
        raise AssertionError("the model was called")


def contents(store):
    """Return all that a store holds, as far as its readers can see."""
    return (
        [(info.draw, info.indices, info.generated) for info in store.draws()],
        [(info.key, info.samples, info.pending, info.namespaces) for info in store.keys()],  # noqa: SIM118 - a store's method
        [(sample.index, sample.id) for info in store.keys() for sample in store.samples(info.key)],  # noqa: SIM118 - likewise
        list(store.namespaces()),
    )


def scripted(**options):
    return ScriptedModel(cache_scope="m", **options)


# Replay.


async def test_replay_serves_what_is_there_and_writes_nothing(store):
    """Also claims of namespaces that never drew live in memory only; the model is never called."""
    async with OnlineAPI(scripted(), store) as pipeline:
        drawn = await pipeline.request(Request("p", n=3, namespace="a"))
    before = contents(store)
    async with OnlineAPI(NoModel(), store, mode="replay") as replay:
        same = await replay.request(Request("p", n=3, namespace="a"))
        one = await replay.request(Request("p", namespace="new"))
        two = await replay.request(Request("p", n=2, namespace="new"))
    assert same.data == drawn.data
    assert same.cached == [True] * 3
    assert one.data + two.data == drawn.data, "C1 holds within the run"
    assert contents(store) == before


async def test_replay_names_what_it_missed(store):
    request = Request("p", namespace="a", request_id="r")
    async with OnlineAPI(NoModel(), store, mode="replay") as replay:
        with pytest.raises(CacheMiss) as caught:
            await replay.request(request)
        assert caught.value.key == replay.key(request)
    assert (caught.value.namespace, caught.value.request) == ("a", request)
    assert replay.key(request) in str(caught.value)
    assert "'a'" in str(caught.value)


async def test_replay_takes_a_partial_hit_for_a_miss_that_claims_nothing(store):
    async with OnlineAPI(scripted(), store) as pipeline:
        drawn = await pipeline.request(Request("p", n=2))
    before = contents(store)
    async with OnlineAPI(NoModel(), store, mode="replay") as replay:
        for namespace in (None, "new"):
            with pytest.raises(CacheMiss):
                await replay.request(Request("p", n=3, namespace=namespace))
        for namespace in (None, "new"):
            again = await replay.request(Request("p", n=2, namespace=namespace))
            assert again.data == drawn.data, "the miss gave its occurrence number and its samples back"
    assert contents(store) == before


async def test_c6_a_request_that_misses_in_replay_has_begun(store):
    async with OnlineAPI(NoModel(), store, mode="replay") as replay:
        with pytest.raises(CacheMiss):
            await replay.request(Request("p"))
        assert replay.stats().requests == 1


async def test_replay_takes_a_pending_sample_for_a_miss(store):
    model = scripted(hold=True)
    writer, replay = OnlineAPI(model, store), OnlineAPI(NoModel(), store, mode="replay")
    task = asyncio.create_task(writer.request(Request("p")))
    await model.begun(1)
    with cachepipe.run():
        for namespace in (None, "new"):
            with pytest.raises(CacheMiss):
                await replay.request(Request("p", namespace=namespace))
        model.open()
        drawn = await task
        for namespace in (None, "new"):
            assert (await replay.request(Request("p", namespace=namespace))).data == drawn.data
    await writer.close()
    await replay.close()


# Refresh.


async def test_refresh_replaces_the_draw_and_later_runs_replay_the_new(store):
    model = scripted()
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(model, store, mode="refresh") as refresh:
        old = await pipeline.request(Request("p", n=2))
        with cachepipe.run():
            new = await refresh.request(Request("p", n=2))
        with cachepipe.run():
            again = await pipeline.request(Request("p", n=2))
            next_draw = await pipeline.request(Request("p", n=1))
    assert model.asked == [2, 2, 1], "the old samples stay taken"
    assert again.data == new.data
    assert new.cached == [False, False]
    assert len({*old.data, *new.data, *next_draw.data}) == 5


async def test_refresh_generates_although_free_samples_are_there(store):
    model = scripted()
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(model, store, mode="refresh") as refresh:
        other = await pipeline.request(Request("p", n=3, namespace="other"))
        mine = await refresh.request(Request("p", n=2, namespace="mine"))
    assert set(mine.data).isdisjoint(other.data)
    assert model.asked == [3, 2]


async def test_a_refresh_that_has_to_wait_for_others_to_write_is_no_hit(store):
    model, busy = scripted(), FaultyStore(store)
    async with OnlineAPI(model, busy) as pipeline, OnlineAPI(model, busy, mode="refresh") as refresh:
        old = await pipeline.request(Request("p"))
        busy.locked = True
        with cachepipe.run():
            new = await refresh.request(Request("p"))
    assert new.cached == [False]
    assert new.data != old.data


async def test_a_refresh_that_fails_leaves_the_old(store):
    model = scripted(script=[None, ScriptedError()])
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(model, store, mode="refresh") as refresh:
        old = await pipeline.request(Request("p", n=2))
        before = contents(store)
        with cachepipe.run(), pytest.raises(ScriptedError):
            await refresh.request(Request("p", n=2))
        assert contents(store) == before
        with cachepipe.run():
            assert (await pipeline.request(Request("p", n=2))).data == old.data


async def test_a_refresh_that_is_cancelled_leaves_the_old(store):
    model = scripted()
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(model, store, mode="refresh") as refresh:
        old = await pipeline.request(Request("p", n=2))
        before = contents(store)
        model.hold = True
        with cachepipe.run():
            task = asyncio.create_task(refresh.request(Request("p", n=2)))
            await model.begun(2)
            task.cancel()
            await asyncio.wait([task])
        model.open()
        with cachepipe.run():
            assert (await pipeline.request(Request("p", n=2))).data == old.data
    assert contents(store) == before


# Bypass.


async def test_bypass_reads_and_writes_nothing_and_counts_no_occurrence(store):
    model = scripted()
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(model, store, mode="bypass") as bypass:
        drawn = await pipeline.request(Request("p", n=2))
        before = contents(store)
        with cachepipe.run():
            past = await bypass.request(Request("p", n=2))
            assert past.cached == [False, False]
            assert set(past.data).isdisjoint(drawn.data)
            assert contents(store) == before
            assert (await pipeline.request(Request("p", n=2))).data == drawn.data


async def test_bypass_accounts_for_what_nobody_received(store):
    """C6: extras of a generous model and samples of failed requests are unreported in this mode too."""
    model = scripted(script=[[*"abc"], None, ScriptedError()], max_n=2)
    async with OnlineAPI(model, store, mode="bypass") as bypass:
        falses = 0
        for n in (2, 4):
            try:
                falses += (await bypass.request(Request("p", n=n))).cached.count(False)
            except ScriptedError:
                continue
        stats = bypass.stats()
    assert stats.generated == model.generated
    assert falses + stats.unreported == stats.generated


# The same draw for all.


async def test_same_shares_one_draw_that_takes_nothing_from_a_namespace(store):
    model = scripted()
    async with OnlineAPI(model, store, repeat="same") as same, OnlineAPI(model, store) as fresh:
        answers = [
            (await same.request(Request("p", n=2, namespace=namespace, request_id=request_id))).data
            for namespace in (None, "a", "b")
            for request_id in (None, "x")
        ]
        assert all(answer == answers[0] for answer in answers)
        assert model.asked == [2]
        drawn = await fresh.request(Request("p", n=2, namespace="a"))
    assert drawn.data == answers[0], "the namespace has drawn nothing yet, so the list serves it"
    assert model.asked == [2]


async def test_same_users_share_one_generation_and_their_use_is_recorded(store):
    model = scripted()
    async with OnlineAPI(model, store, repeat="same") as same:
        responses = await asyncio.gather(
            *[same.request(Request("p", n=n, namespace=f"ns{n}")) for n in (1, 3, 2)]
        )
    assert sum(model.asked) == 3
    assert len(model.calls) == 1
    assert all(response.data == responses[1].data[: len(response.data)] for response in responses)
    used = store._readable()[0].execute(
        "SELECT n.label FROM uses u JOIN namespaces n ON n.id = u.namespace ORDER BY n.label"
    )
    assert [row[0] for row in used] == ["=ns1", "=ns2", "=ns3"]
    assert [(info.draw.namespace, info.indices) for info in store.draws()] == [("*", (0, 1, 2))]


async def test_c3_the_shared_draw_couples_nothing(store):
    """It is kept outside the namespaces, so a namespace repeats the earliest namespace all the same."""
    async with OnlineAPI(scripted(), store, repeat="same") as same, OnlineAPI(scripted(), store) as fresh:
        await same.request(Request("p"))
        first = {
            request_id: (await fresh.request(Request("p", request_id=request_id, namespace="a"))).data
            for request_id in ("x", "")
        }
        second = {
            request_id: (await fresh.request(Request("p", request_id=request_id, namespace="b"))).data
            for request_id in ("", "x")
        }
    assert second == first


# C1 to C3, one sentence each.


async def test_c1_a_repeated_request_gets_fresh_samples(store):
    async with OnlineAPI(scripted(), store) as pipeline:
        answers = [(await pipeline.request(Request("p", n=2))).data for _ in range(3)]
    assert len({sample for answer in answers for sample in answer}) == 6


async def test_c1_claims_of_replays_and_of_writers_keep_apart_within_a_run(store):
    """What a replay gave to a draw is not given to another draw of the same run."""
    model = scripted()
    async with OnlineAPI(model, store) as pipeline, OnlineAPI(NoModel(), store, mode="replay") as replay:
        await pipeline.request(Request("p", n=1, namespace="other"))
        read = await replay.request(Request("p", request_id="x", namespace="a"))
        written = await pipeline.request(Request("p", request_id="y", namespace="a"))
    assert read.data != written.data


async def test_c3_a_second_namespace_repeats_the_first_in_any_order(store):
    requests = [
        Request(question, n=n, request_id=request_id)
        for question in "pq"
        for request_id in (None, "x", "y")
        for n in (1, 2)
    ]

    async def all_in(namespace, order):
        answers = {}
        for place in order:
            asked = requests[place]
            again = Request(asked.prompt, n=asked.n, request_id=asked.request_id, namespace=namespace)
            answers[place] = (await pipeline.request(again)).data
        return answers

    model = scripted()
    async with OnlineAPI(model, store) as pipeline:
        # Requests of one identity keep their order: it is what tells their draws apart.
        first = await all_in("a", range(len(requests)))
        pairs = [(place, place + 1) for place in range(0, len(requests), 2)]
        random.Random(1).shuffle(pairs)
        second = await all_in("b", [place for pair in pairs for place in pair])
    assert first == second
    assert model.generated == 18


async def test_c3_a_namespace_with_other_ids_reuses_from_the_front(store):
    model = scripted()
    async with OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Request("p", n=3, request_id="x", namespace="a"))
        second = [
            (await pipeline.request(Request("p", request_id=f"{number}", namespace="b"))).data[0]
            for number in range(3)
        ]
    assert second == first.data
    assert model.asked == [3]


async def test_closing_the_last_pipeline_ends_the_run(store):
    """A run lasts until no pipeline on the store is open; copies that stay open keep it."""
    model = scripted()
    first, other = OnlineAPI(model, store), OnlineAPI(model, store)
    one = await first.request(Request("p"))
    await first.close()
    two = await other.request(Request("p"))
    await other.close()
    async with OnlineAPI(model, store) as later:
        again = await later.request(Request("p"))
    assert one.data != two.data
    assert again.data == one.data


async def test_c8_a_batch_that_misses_in_replay_claims_nothing(store):
    await OnlineAPI(ScriptedModel(), store).request(Request("p", namespace="a"))
    with cachepipe.run():
        replay = OnlineAPI(ScriptedModel(), store, mode="replay")
        with pytest.raises(CacheMiss) as missed:
            await replay.batch_request(Batch([Request("p", namespace="b"), Request("q", namespace="b")]))
        assert missed.value.request.prompt == "q"
        assert (await replay.request(Request("p", namespace="b"))).data == ["p#0"]


async def test_replay_from_a_folder_that_does_not_exist_is_an_error_and_makes_nothing(tmp_path):
    folder = tmp_path / "typo"
    with pytest.raises(StoreError):
        OnlineAPI(ScriptedModel(), folder, mode="replay")
    assert not folder.exists()


async def test_c4_the_other_calls_of_a_request_that_failed_in_bypass_are_stopped(store):
    model = ScriptedModel(max_n=1, hold=True)
    async with asyncio.timeout(10), OnlineAPI(model, store, mode="bypass") as pipeline:
        task = asyncio.create_task(pipeline.request(Request("p", n=5)))
        calls = await model.begun(5)
        calls[0].fail()
        with pytest.raises(ScriptedError):
            await task
        for call in calls:
            await call.over()
        assert [call.state for call in calls] == ["failed"] + ["cancelled"] * 4


async def test_c6_what_comes_for_a_request_that_failed_in_bypass_is_unreported(store, until):
    serial = iter(range(100))
    ended = []
    begun = asyncio.Event()

    class Model:
        max_n = 1

        async def request(self, request):
            if not next(serial):
                await begun.wait()
                raise ZeroDivisionError
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(request)
            return Response(["x"])  # it was paid for before it could be stopped

    async with asyncio.timeout(10), OnlineAPI(Model(), store, mode="bypass") as pipeline:
        with pytest.raises(ZeroDivisionError):
            await pipeline.request(Request("p", n=5))
        await until(lambda: not pipeline.stats().in_flight)
        stats = pipeline.stats()
        assert stats.generated == stats.unreported == len(ended) > 0
