"""C6: what a cache has cost and saved, derived from its rows: samples, and the sums of its runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import forked
import pytest
from sellers import COMPLETION, PROMPT, Seller

import cachepipe
from cachepipe import Budget, BudgetExceeded, DiskStore, NotStored, OnlineAPI, Prices, Request
from cachepipe.contract.draws import label
from cachepipe.flow.budget import Spending
from cachepipe.sharing import export, import_, merge, sync
from cachepipe.stores import sums
from cachepipe.stores.base import Discard, Note
from cachepipe.stores.sums import run_statements, statements
from cachepipe.testing import FaultyStore

pytestmark = pytest.mark.anyio


def figures(store, namespace=None):
    """Return samples and tokens of each sum of a namespace."""
    found = statements(store).get(label(namespace))
    if found is None:
        return {}
    counts = {name: account.counts() for name, account in found.accounts().items()}
    return {name: (each["samples"], each["total_tokens"]) for name, each in counts.items()}


NOTHING = (0, 0)


async def test_c6_a_run_and_two_replays_of_it_save_twice_what_the_run_was_billed(store):
    for _ in range(3):
        async with OnlineAPI(Seller(), store) as pipeline:
            await pipeline.request(Request("p", n=2))
            await pipeline.request(Request("q"))
    assert figures(store) == {
        "spent": (3, 29),
        "as_asked": (9, 87),
        "billed": (3, 29),
        "saved": (6, 58),
        "unreported": NOTHING,
        "wasted": NOTHING,
    }
    assert statements(store)[label(None)].delivered.requests == 6
    assert len({noted.run for noted in store.sums()}) == 3


async def test_c6_a_run_keeps_its_name_and_another_run_has_another(store):
    async with OnlineAPI(Seller(), store) as pipeline:
        for _ in range(2):
            await pipeline.request(Request("p"))
        with cachepipe.run():
            await pipeline.request(Request("p"))
            await pipeline.request(Request("q"))
        first = pipeline.store
    counts = {noted.run: noted.sums.delivered.requests for noted in first.sums()}
    assert sorted(counts.values()) == [2, 2]
    made_in = {sample.meta["run"] for info in store.keys() for sample in store.samples(info.key)}  # noqa: SIM118 - a store's method
    assert made_in == set(counts)


async def test_c6_a_sample_records_its_call_its_run_and_what_it_has_used(store):
    async with OnlineAPI(Seller(), store) as pipeline:
        await pipeline.request(Request("p", n=2, namespace="exp"))
        key = pipeline.key(Request("p"))
    first, second = (sample.meta for sample in store.samples(key))
    assert first["call"] == second["call"]
    assert first["namespace"] == label("exp")
    assert first["sold"] == {"model": "m-1", "usage": [10, 3, 13, 0, 0]}
    assert second["sold"] == {"model": "m-1", "first": False, "usage": [10, 3, 13, 0, 0]}


async def test_c6_namespaces_that_share_a_call_share_its_prompt(store):
    model = Seller()
    requests = [Request("p", namespace=name) for name in ("a", "b")] + [Request("p", n=2, namespace="a")]
    async with OnlineAPI(model, store) as pipeline:
        await asyncio.gather(*map(pipeline.request, requests))
    assert model.calls == 1
    a, b = figures(store, "a"), figures(store, "b")
    assert a["spent"] == a["billed"] == (3, 19)
    assert a["as_asked"] == (3, 13 + 16)
    assert b["spent"] == b["billed"] == NOTHING
    assert b["saved"] == (1, 13)


async def test_c6_a_shared_draw_counts_for_the_namespaces_that_ask(store):
    for _ in range(2):
        async with OnlineAPI(Seller(), store, repeat="same") as pipeline:
            for name in ("a", "b"):
                await pipeline.request(Request("p", namespace=name))
    assert figures(store, "a")["spent"] == (1, 13)
    assert figures(store, "a")["saved"] == (1, 13)
    assert figures(store, "b")["saved"] == (2, 26)


async def test_c6_a_cancelled_request_has_its_sample_unreported_and_wasted_until_it_is_drawn(store):
    gate = asyncio.Event()
    model = Seller(gate)
    async with OnlineAPI(model, store) as pipeline:
        waiting = asyncio.ensure_future(pipeline.request(Request("p", n=2)))
        other = asyncio.ensure_future(pipeline.request(Request("p", namespace="other")))
        await model.arrived.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        gate.set()
        await other
    found = figures(store)
    assert found["spent"] == found["unreported"] == (2, 16)
    assert found["wasted"] == (1, 3), "the other namespace holds the first"
    async with OnlineAPI(Seller(), store) as pipeline:
        assert (await pipeline.request(Request("p", n=2))).cached == [True, True]
    found = figures(store)
    assert found["unreported"] == (2, 16), "no sample is reported later than at its first delivery"
    assert found["wasted"] == NOTHING
    assert found["saved"] == (2, 16)


async def test_c6_what_a_failed_request_has_got_is_unreported(store):
    class Halves(Seller):
        max_n = 1

        async def request(self, request):
            answer = await super().request(request)
            if self.calls == 2:
                raise RuntimeError("no")
            return answer

    async with OnlineAPI(Halves(), store) as pipeline:
        with pytest.raises(RuntimeError):
            await pipeline.request(Request("p", n=2))
    found = figures(store)
    assert found["spent"] == found["unreported"] == found["wasted"] == (1, 13)
    assert found["as_asked"] == found["billed"] == NOTHING


async def test_c6_extra_samples_are_unreported(store):
    async with OnlineAPI(Seller(extra=2), store) as pipeline:
        await pipeline.request(Request("p"))
    found = figures(store)
    assert (found["spent"], found["billed"], found["unreported"]) == ((3, 19), (1, 13), (2, 6))
    assert found["wasted"] == (2, 6)


async def test_c6_a_discarded_sample_was_spent_and_is_wasted(store):
    async with OnlineAPI(Seller(), store) as pipeline:
        await pipeline.request(Request("p", n=2))
        await store.apply([Discard(pipeline.key(Request("p")), 1, "bad")])
    assert figures(store)["spent"] == (2, 16)
    assert figures(store)["wasted"] == (1, 3)


async def test_c6_what_could_not_be_stored_was_spent_all_the_same(store):
    async with OnlineAPI(Seller(storable=False), store) as pipeline:
        with pytest.warns(NotStored):
            await pipeline.request(Request("p", n=2))
    found = figures(store)
    assert found["spent"] == found["billed"] == (2, 0), "counted, and of unknown usage"
    assert statements(store)[label(None)].spent.counts()["unknown"] == 2
    assert found["unreported"] == NOTHING


async def test_c6_what_was_neither_stored_nor_delivered_is_unreported(store):
    gate = asyncio.Event()
    model = Seller(gate, storable=False)
    async with OnlineAPI(model, store) as pipeline:
        first = asyncio.ensure_future(pipeline.request(Request("p")))
        second = asyncio.ensure_future(pipeline.request(Request("p", request_id="2")))
        await model.arrived.wait()
        first.cancel()
        await asyncio.wait([first])
        gate.set()
        with pytest.warns(NotStored):
            await second
    assert figures(store)["spent"] == (2, 0)
    assert figures(store)["unreported"] == (1, 0)
    assert [noted.sums.unreported.counts()["samples"] for noted in store.sums()] == [1]


async def test_c6_a_response_that_did_not_reach_its_caller_is_taken_back(store):
    class Fails(Seller):
        async def request(self, request):
            if request.prompt == "fails":
                raise RuntimeError("no")
            return await super().request(request)

    async with OnlineAPI(Fails(), store) as pipeline:
        await pipeline.request(Request("p"))
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await pipeline.batch_request(
                    cachepipe.Batch([Request("p", namespace="b"), Request("fails", namespace="b")])
                )
    assert figures(store, "b").get("as_asked", NOTHING) == NOTHING


async def test_c6_replays_from_a_store_that_can_be_written_count(store):
    async with OnlineAPI(Seller(), store) as pipeline:
        await pipeline.request(Request("p"))
    async with OnlineAPI(Seller(), store, mode="replay") as pipeline:
        await pipeline.request(Request("p", namespace="new"))
    assert figures(store, "new")["saved"] == (1, 13)
    assert figures(store, "new")["spent"] == NOTHING
    assert [info.namespace for info in store.namespaces()] == [None]


async def test_c6_a_read_only_store_writes_no_sums(tmp_path):
    async with OnlineAPI(Seller(), tmp_path) as pipeline:
        await pipeline.request(Request("p"))
    reader = DiskStore(tmp_path, read_only=True)
    before = figures(reader)
    async with OnlineAPI(Seller(), reader) as pipeline:
        await pipeline.request(Request("p"))
        await pipeline.request(Request("q"))
    assert figures(reader) == before
    reader.close()


async def test_c6_bypassed_requests_leave_no_trace_in_the_sums(store):
    async with OnlineAPI(Seller(), store, mode="bypass") as pipeline:
        await pipeline.request(Request("p"))
    assert statements(store) == {}


# When the sums are written.


async def test_c6_hits_write_nothing_and_closing_writes_their_sums_once(store):
    faulty = FaultyStore(store)
    async with OnlineAPI(Seller(), faulty) as pipeline:
        await pipeline.request(Request("p"))
        begun = len(faulty.transactions)
        for _ in range(300):
            with cachepipe.run():
                await pipeline.request(Request("p"))
        assert len(faulty.transactions) == begun
    written = faulty.transactions[begun:]
    assert len(written) == 1
    assert all(type(operation) is Note for operation in written[0])
    assert figures(store)["as_asked"] == (301, 301 * 13)


async def test_c6_many_deliveries_are_summed_while_they_go_on(store, monkeypatch):
    monkeypatch.setattr(sums, "MOST", 50)
    written = threading.Event()

    class Told(FaultyStore):
        def apply_soon(self, operations):
            super().apply_soon(operations)
            written.set()

    async with OnlineAPI(Seller(), Told(store)) as pipeline:
        await pipeline.request(Request("p"))
        for _ in range(100):
            with cachepipe.run():
                await pipeline.request(Request("p"))
        assert await asyncio.to_thread(written.wait, 30)
        await store.apply([])  # behind them
        assert figures(store)["as_asked"][0] >= 50
    assert figures(store)["as_asked"] == (101, 101 * 13)


SCRIPT = """
import asyncio, sys
sys.path.append(sys.argv[3])
from sellers import Seller
from cachepipe import OnlineAPI, Request

async def main():
    pipeline = OnlineAPI(Seller(), sys.argv[1])
    for place in range(5):
        await pipeline.request(Request(f"question {place}", n=2))
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        await asyncio.Event().wait()

asyncio.run(main())
"""


def began(folder, how):
    words = [str(folder), how, str(Path(__file__).parents[1])]
    return forked.Popen([sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, text=True)


async def test_c6_a_kill_loses_nothing_of_what_was_spent(tmp_path):
    process = began(tmp_path / "cache", "wait")
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    store = DiskStore(tmp_path / "cache")
    assert figures(store)["spent"] == (10, 5 * 16)
    async with OnlineAPI(Seller(), store) as pipeline:
        for place in range(5):
            await pipeline.request(Request(f"question {place}", n=2))
    assert figures(store)["saved"][1] >= 5 * 16
    assert figures(store)["spent"] == (10, 5 * 16)
    store.close()


async def test_c6_a_program_that_closes_nothing_has_its_sums_written_when_it_ends(tmp_path):
    process = began(tmp_path / "cache", "end")
    process.communicate()
    store = DiskStore(tmp_path / "cache", read_only=True)
    assert figures(store)["billed"] == figures(store)["spent"] == (10, 5 * 16)
    store.close()


# Handed on.


def bought_by(number):
    """What a namespace has bought when it has asked so many questions for one sample each."""
    return (number, number * (PROMPT + COMPLETION))


async def asks(store, *prompts, namespace="x", **seller):
    """A run that asks some questions, and then the first one again in another run."""
    async with OnlineAPI(Seller(**seller), store) as pipeline:
        for prompt in prompts:
            await pipeline.request(Request(prompt, namespace=namespace))
        with cachepipe.run():
            await pipeline.request(Request(prompts[0], namespace=namespace))


async def test_c6_a_merge_hands_on_what_runs_were_billed_and_saved_however_often(new_store):
    one, other, both = new_store(), new_store(), new_store()
    await asks(one, "a", "b")
    await asks(other, "c", "d", "e")
    await asks(other, "a", "b", namespace="y")  # its samples get other indices
    for _ in range(2):
        merge([one, other], both)
    found = figures(both, "x")
    assert (found["spent"], found["billed"], found["saved"]) == (bought_by(5), bought_by(5), bought_by(2))
    assert (found["unreported"], found["wasted"]) == (NOTHING, NOTHING)
    assert figures(both, "y") == figures(other, "y")
    assert runs_of(both) == runs_of(one) | runs_of(other)
    await asks(one, "g")  # and goes on
    merge([one], both)
    sync(both, one)
    sync(one, both)
    assert figures(both, "x")["billed"] == figures(one, "x")["billed"] == bought_by(6)
    assert figures(both, "x")["saved"] == figures(one, "x")["saved"] == bought_by(3)


def runs_of(store):
    """What each run was billed in each namespace."""
    return {
        (run.run, run.namespace): run.statement.delivered.billed.counts()["samples"]
        for run in run_statements(store)
    }


async def test_c6_what_was_paid_and_not_stored_is_handed_on(new_store):
    one, both = new_store(), new_store()
    with pytest.warns(NotStored):
        await asks(one, "a", storable=False)
    assert figures(one, "x")["spent"][0] == 2
    merge([one, one], both)
    assert figures(both, "x") == figures(one, "x")


async def test_c6_a_bundle_hands_on_what_was_spent_and_a_budget_counts_it(new_store, tmp_path):
    one, other = new_store(), new_store()
    await asks(one, "a", "b")
    await asks(other, "a", "b", namespace="y")
    mine = figures(other, "y")
    export(one, tmp_path / "x.cachepipe")
    for _ in range(2):
        import_(tmp_path / "x.cachepipe", other)
    assert figures(other, "y") == mine
    found = figures(other, "x")
    assert (found["spent"], found["billed"], found["unreported"]) == (bought_by(2), NOTHING, bought_by(2))
    prices = Prices({"m-1": {"prompt": 1000, "completion": 1000, "max_tokens": COMPLETION}})
    spending = Spending(other, Budget(0.001 * bought_by(2)[1], prices=prices))
    with pytest.raises(BudgetExceeded):
        await spending.hold("x", 0.001, ("m-1", Seller.cache_scope))
