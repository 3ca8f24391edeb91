"""IntervalSet: what counts occurrences, and when counting begins anew."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepipe
from cachepipe import AsyncCacher, MemoryStore, OnlineAPI, Request, Response, runs
from cachepipe.contract.draws import Draw, Identity
from cachepipe.runs import Occurrences

WHO = Identity("-", "k", "r")


class Model:
    async def request(self, request):
        return Response([f"{request.prompt}{i}" for i in range(request.n)])


def index(pipeline, **more):
    """Return the index that a request gets: a repetition within a run gets another one."""
    return asyncio.run(pipeline.request(Request("q", **more))).indices[0]


def draw(occurrence):
    return WHO.draw(occurrence)


def test_occurrences_are_counted_by_namespace_key_and_id():
    counted = Occurrences()
    assert [counted.take(WHO) for _ in range(3)] == [0, 1, 2]
    assert [counted.take(other) for other in (("=", "k", "r"), ("-", "l", "r"), ("-", "k", ""))] == [0, 0, 0]


def test_a_number_that_is_given_back_is_the_next_one():
    """C8: a retry is the same draw."""
    counted = Occurrences()
    for _ in range(4):
        counted.take(WHO)
    counted.give_back(draw(2))
    counted.give_back(draw(0))
    assert [counted.take(WHO) for _ in range(3)] == [0, 2, 4]


def test_a_run_expects_a_new_draw_after_four_in_a_row():
    counted, expected = Occurrences(), []
    for new in (True, True, True, False, True, True, True, True, True, False):
        counted.claimed(new=new)
        expected.append(counted.expects_new)
    assert expected == [False] * 7 + [True, True, False]


@given(st.lists(st.booleans(), max_size=40), st.randoms())
def test_no_number_is_held_twice_at_once(steps, random):
    counted, held = Occurrences(), []
    for taking in steps:
        if taking or not held:
            number = counted.take(WHO)
            assert number not in held
            assert number <= len(held)
            held.append(number)
        else:
            counted.give_back(draw(held.pop(random.randrange(len(held)))))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60), st.integers(1, 3), st.randoms())
def test_numbers_are_the_same_whether_they_are_kept_in_memory_or_in_a_file(steps, kept, random):
    """Identities of a few characters that differ only in where one string ends and the next begins."""
    names = [
        ("-", "k", "r"),
        ("-", "kr", ""),
        ("-k", "r", ""),
        ("-", "k", "r2"),
        ("=\udc80", "", ""),
        ("", "", ""),
    ]
    names = [Identity(*name) for name in names]
    few, many, held = Occurrences(kept), Occurrences(), []
    for which, taking in steps:
        if taking or not held:
            number = few.take(names[which])
            assert number == many.take(names[which])
            held.append(names[which].draw(number))
        else:
            back = held.pop(random.randrange(len(held)))
            few.give_back(back)
            many.give_back(back)
        assert len(few._next) <= kept + 1


def test_numbers_that_are_given_back_do_not_bring_all_identities_into_memory():
    counted = Occurrences(kept=10)
    names = [Identity("-", str(number), "r") for number in range(50)]
    for name in names:
        counted.take(name)
    for name in names:
        counted.give_back(name.draw(0))
    assert len(counted._next) <= 10
    assert [counted.take(name) for name in names] == [0] * 50


def test_identities_beyond_those_used_last_are_not_in_memory():
    counted = Occurrences(kept=1000)
    for _ in range(2):
        for number in range(3000):
            counted.take(Identity("-", str(number), "r"))
    assert len(counted._next) <= 1000
    assert [counted.take(Identity("-", str(number), "r")) for number in (0, 1500, 2999)] == [2, 2, 2]


def test_failures_that_are_not_asked_again_take_no_memory():
    counted = Occurrences()
    for number in range(1000):
        identity = Identity("-", str(number), "r")
        assert counted.take(identity) == 0
        counted.give_back(identity.draw(0))
    assert not counted._next
    assert not counted._returned


def test_claims_in_memory_beyond_those_used_last_are_in_the_file():
    """C1: what a replay has taken stays taken, however many keys there are."""
    counted = Occurrences(kept=100)
    for _ in range(2):
        for number in range(1000):
            taken = counted.taken("-", str(number))
            index = 2 * sum(1 for _ in taken)
            assert taken.interval_at(index) is None
            taken.add(index)
    assert len(counted._taken) <= 100
    assert counted.replays
    assert [list(counted.taken("-", str(number))) for number in (0, 999)] == [[(0, 1), (2, 3)]] * 2


def test_counting_goes_on_in_memory_when_there_is_no_room_for_a_file(monkeypatch):
    def full(*_arguments, **_options):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    counted = Occurrences(kept=10)
    assert [counted.take(Identity("-", str(number), "")) for number in [*range(500), *range(500)]] == [
        0
    ] * 500 + [1] * 500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_file_to_its_parent():
    counted = Occurrences(kept=1)
    for number in range(1000):
        counted.take(Identity("-", str(number), "r"))
    child = os.fork()
    if not child:
        for number in range(1000, 3000):  # would write to the file that both have open
            counted.take(Identity("-", str(number), "r"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [counted.take(Identity("-", str(number), "r")) for number in range(1000)] == [1] * 1000


def test_uses_of_shared_draws_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(runs, "_USED", 10)
    counted = Occurrences()
    for number in range(95):
        counted.used.add((str(number), "-"))
        assert len(counted.used) <= 10
        assert (str(number), "-") in counted.used


def test_numbers_are_given_once_to_any_number_of_threads():
    counted, got = Occurrences(), []

    def work():
        got.extend([counted.take(WHO) for _ in range(500)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(4000))


def test_a_warning_is_given_once_in_a_run():
    counted = Occurrences()
    assert [counted.first_time("a"), counted.first_time("a"), counted.first_time("b")] == [True, False, True]


@pytest.mark.parametrize(("fresh", "warned"), [(20, True), (11, True), (10, False), (0, False)])
def test_fresh_ids_are_told_when_they_are_most_of_twenty(fresh, warned):
    counted = Occurrences()
    told = [counted.count(Draw("-", str(number), "id", 0), fresh_id=number < fresh) for number in range(20)]
    assert any(told) == warned


def test_replicates_of_one_question_are_no_sign_of_fresh_ids():
    counted = Occurrences()
    assert not any(counted.count(Draw("-", "k", str(n), 0), fresh_id=n > 0) for n in range(200))


def test_a_run_lasts_until_no_pipeline_is_open():
    store = MemoryStore()
    first, second = OnlineAPI(Model(), store), OnlineAPI(Model(), store)
    assert [index(first), index(second), index(first)] == [0, 1, 2]
    asyncio.run(first.close())
    assert index(second) == 3, "one is still open"
    asyncio.run(second.close())
    third = OnlineAPI(Model(), store)
    assert index(third) == 0
    asyncio.run(third.close())


def test_a_pipeline_that_is_dropped_without_a_close_ends_its_run():
    store = MemoryStore()
    pipeline = OnlineAPI(Model(), store)
    assert [index(pipeline), index(pipeline)] == [0, 1]
    del pipeline
    gc.collect()
    pipeline = OnlineAPI(Model(), store)
    assert index(pipeline) == 0
    asyncio.run(pipeline.close())


def test_one_that_is_dropped_is_gone_at_once_without_a_collection():
    """A cacher is in no cycle, so nothing waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        store = MemoryStore()
        for _ in range(3):
            cacher = AsyncCacher(Model(), store)
            assert index(cacher) == 0
            del cacher
    finally:
        gc.enable()


def test_runs_of_two_stores_have_nothing_to_do_with_each_other():
    first, second = OnlineAPI(Model(), MemoryStore()), OnlineAPI(Model(), MemoryStore())
    assert [index(first), index(second), index(first)] == [0, 0, 1]


def test_two_stores_on_one_folder_share_a_run(tmp_path):
    first, second = OnlineAPI(Model(), tmp_path / "c"), OnlineAPI(Model(), tmp_path / "x" / ".." / "c")
    assert [index(first), index(second)] == [0, 1]
    asyncio.run(first.close())
    asyncio.run(second.close())


def test_a_run_of_ones_own_counts_from_the_front():
    pipeline = OnlineAPI(Model(), MemoryStore())
    assert [index(pipeline), index(pipeline)] == [0, 1]
    with cachepipe.run():
        assert [index(pipeline), index(pipeline), index(pipeline)] == [0, 1, 2]
        with cachepipe.run():
            assert index(pipeline) == 0
        assert index(pipeline) == 3
    assert index(pipeline) == 2


def test_a_run_of_ones_own_follows_its_task_only():
    async def own(pipeline, results):
        with cachepipe.run():
            for _ in range(3):
                results += (await pipeline.request(Request("q"))).indices
                await asyncio.sleep(0)

    async def main():
        pipeline = OnlineAPI(Model(), MemoryStore())
        first, second, outside = [], [], []
        tasks = [asyncio.create_task(own(pipeline, results)) for results in (first, second)]
        for _ in range(3):
            outside += (await pipeline.request(Request("q"))).indices
        await asyncio.gather(*tasks)
        assert first == second == outside == [0, 1, 2]

    asyncio.run(main())


def test_a_run_outlives_the_pipelines_in_it():
    store = MemoryStore()
    with cachepipe.run():
        for expected in range(3):
            pipeline = OnlineAPI(Model(), store)
            assert index(pipeline) == expected
            asyncio.run(pipeline.close())


def test_a_new_store_where_a_dead_one_was_begins_at_the_front():
    """An identity is never used again, whatever address an object gets."""
    with cachepipe.run():
        for _ in range(50):
            pipeline = OnlineAPI(Model(), MemoryStore())
            assert index(pipeline) == 0
            asyncio.run(pipeline.close())
            del pipeline
    assert MemoryStore().identity != MemoryStore().identity


@pytest.mark.anyio
async def test_c2_runs_of_stores_that_are_gone_are_forgotten():
    store = MemoryStore()
    identity = store.identity
    async with OnlineAPI(Model(), store) as pipeline:
        await pipeline.request(Request("p"))
        assert identity in runs._runs
    store.close()
    del pipeline, store
    gc.collect()
    assert identity not in runs._runs
    assert identity not in runs._open
