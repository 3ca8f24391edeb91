"""When a call's reservation ends: once its samples are stored, exactly once, and no sum counts it twice."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from functools import partial

import pytest

import cachepipe
from cachepipe import Budget, OnlineAPI, Prices, Request, Response
from cachepipe.contract.budgets import nanos
from cachepipe.errors import BudgetExceeded, NotStored, StoreError
from cachepipe.flow import budget as budgets
from cachepipe.flow.budget import Spending
from cachepipe.models import OpenAIModel
from cachepipe.stores import operations
from cachepipe.stores.base import Commit, Reserve
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.sums import statements
from cachepipe.testing import MemoryEngine

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has"),
]

PRICES = Prices({"m": {"prompt": 0, "completion": 1000, "max_tokens": 5}})  # a tenth of a cent per token
TOKEN = 10**6  # nano-dollars of a token
URL = "http://model/v1/chat/completions"
LOOK = Reserve("=x", "a look", 0, 10**15)


class PricedModel(OpenAIModel):
    """A model whose answers have 3 tokens, and come when the test lets them."""

    def __init__(self):
        super().__init__("m", base_url="http://model/v1", api_key="none")
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.error = None

    async def request(self, request):
        self.asked.set()
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        usage = {"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "hi"},
            "finish_reason": "stop",
        }
        sample = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
        return Response([{**sample, "number": number} for number in range(request.n)])


class Gate:
    """Holds back the samples that a store is to store; while it is closed, everything else goes on."""

    def __init__(self, store, monkeypatch):
        self._apply, self._now = store.apply, store.apply_now
        self.held, self.opened = asyncio.Event(), asyncio.Event()
        monkeypatch.setattr(store, "apply", self.apply)
        monkeypatch.setattr(store, "apply_now", self.apply_now)

    def apply_now(self, operations):
        return None if any(type(one) is Commit for one in operations) else self._now(operations)

    def apply(self, operations):
        if not any(type(one) is Commit for one in operations):
            return self._apply(operations)

        async def later():
            self.held.set()
            await asyncio.wait_for(self.opened.wait(), 10)
            return await self._apply(operations)

        return asyncio.ensure_future(later())


@pytest.fixture(
    params=["memory", "disk", "valkey", "postgres", pytest.param("cluster", marks=pytest.mark.slow)]
)
def store(request, tmp_path):
    """An empty cache on each engine."""
    if request.param == "memory":
        opened = cachepipe.MemoryStore()
    elif request.param == "disk":
        opened = cachepipe.DiskStore(tmp_path / "cache")
    else:
        opened, _ = cachepipe.open_store(request.getfixturevalue(f"new_{request.param}_url")())
    yield opened
    opened.close()


async def state_of(store):
    """What is spent and reserved of the budget, in tokens."""
    [state] = await store.apply([LOOK])
    assert not state.lost
    return state.spent / TOKEN, state.reserved / TOKEN


async def paid_in(store):
    """What the rows sum up to, in tokens."""
    found = await asyncio.to_thread(statements, store)
    cost = found["=x"].spent.cost(PRICES.cost_of_sum)[0] if "=x" in found else 0.0
    return nanos(cost) / TOKEN


@asynccontextmanager
async def asking(store, model, n=1):
    """A request through a pipeline with a budget, as a task."""
    async with OnlineAPI(model, store, budget=Budget(1, prices=PRICES)) as pipeline:
        task = asyncio.create_task(pipeline.request(Request("a", n=n, namespace="x")))
        yield task
        await asyncio.wait([task])


async def test_c6_a_reservation_ends_when_the_samples_are_stored_not_before(store, monkeypatch):
    gate, model = Gate(store, monkeypatch), PricedModel()
    model.answers.set()
    async with asking(store, model, n=2) as task:
        await gate.held.wait()
        assert await state_of(store) == (0, 10)
        assert await paid_in(store) == 0
        other = Spending(store, Budget(0.012, prices=PRICES))  # what it sums up lacks these samples
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other.hold("x", 0.003, ("m", URL)), 0.05)
        assert await state_of(store) == (0, 10)
        gate.opened.set()
        await task
    assert await state_of(store) == (6, 0)
    assert await paid_in(store) == 6
    with pytest.raises(BudgetExceeded):
        await other.hold("x", 0.007, ("m", URL))


@pytest.mark.parametrize("seen", [True, False])
async def test_c6_a_call_that_is_settled_during_a_sum_counts_once(store, monkeypatch, seen):
    """Whether the sum has read its samples or not."""
    gate, model, summed = Gate(store, monkeypatch), PricedModel(), budgets.spent_rows
    reading, settled = threading.Event(), threading.Event()

    def spent_rows(*arguments):
        found = None if seen else summed(*arguments)
        reading.set()
        assert settled.wait(20)
        return found or summed(*arguments)

    model.answers.set()
    async with asking(store, model) as task:
        await gate.held.wait()
        monkeypatch.setattr(budgets, "spent_rows", spent_rows)
        other = asyncio.create_task(Spending(store, Budget(1, prices=PRICES)).hold("x", 0.001, ("m", URL)))
        assert await asyncio.to_thread(reading.wait, 20)
        gate.opened.set()
        await task
        assert await state_of(store) == (3, 0)
        settled.set()
        reservation = await other
    assert await state_of(store) == (3, 1)
    reservation.end_at(0.0005)
    assert await state_of(store) == (3.5, 0)


async def test_c6_a_call_that_fails_or_is_cancelled_releases_what_it_has_reserved(store):
    model = PricedModel()
    model.answers.set()
    model.error = ValueError("no answer")
    async with asking(store, model) as task:
        with pytest.raises(ValueError, match="no answer"):
            await task
    assert await state_of(store) == (0, 0)
    model.error = None
    model.answers.clear()
    model.asked.clear()
    async with asking(store, model) as task:
        await model.asked.wait()
        assert await state_of(store) == (0, 5)
        task.cancel()
    assert await state_of(store) == (0, 0)
    model.asked.clear()
    async with asking(store, model) as task:  # timed out
        await model.asked.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0)
    assert (await state_of(store), await paid_in(store)) == ((0, 0), 0)


async def test_c6_what_a_cancelled_request_has_bought_is_spent(store, monkeypatch):
    gate, model = Gate(store, monkeypatch), PricedModel()
    model.answers.set()
    async with asking(store, model) as task:
        await gate.held.wait()
        task.cancel()
        await asyncio.wait([task])
        assert await state_of(store) == (0, 5)
        gate.opened.set()
    assert (await state_of(store), await paid_in(store)) == ((3, 0), 3)


async def test_c6_a_reservation_that_is_granted_to_a_caller_who_has_gone_is_given_back(store):
    spending = Spending(store, Budget(1, prices=PRICES))
    (await spending.hold("x", 0.001, ("m", URL))).end_at(0.0)
    task = asyncio.create_task(spending.hold("x", 0.007, ("m", URL)))
    while not task.done():
        await asyncio.sleep(0)
        if task._fut_waiter is not None and not task._fut_waiter.done():
            task.cancel()
    assert task.cancelled()
    assert await state_of(store) == (0, 0)


async def test_c6_samples_that_cannot_be_stored_are_spent_and_release_their_reservation(store, monkeypatch):
    model = PricedModel()
    model.answers.set()

    def full(*_):
        raise StoreError("the disk is full")

    monkeypatch.setattr(operations, "_commit_all", full)
    with pytest.warns(NotStored, match="the disk is full"):
        async with asking(store, model) as task:
            await task
    assert (await state_of(store), await paid_in(store)) == ((3, 0), 3)
    (await Spending(store, Budget(1, prices=PRICES)).hold("x", 0.001, ("m", URL))).end_at(0.0)
    assert await state_of(store) == (3, 0)


async def test_c6_an_answer_that_nobody_takes_releases_its_reservation(store):
    spending = Spending(store, Budget(1, prices=PRICES))
    reservation = await spending.hold("x", 0.005, ("m", URL))
    reservation.end_at(0.003, samples=1)
    assert await state_of(store) == (0, 5)
    del reservation
    assert await state_of(store) == (3, 0)


async def test_c6_calls_are_settled_once_the_samples_are_stored_that_a_server_did_not_take(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine, model = MemoryEngine(), PricedModel()
    store = RemoteStore(Session(engine, patience=0.01, renews=False))
    async with asking(store, model) as task:
        await model.asked.wait()
        monkeypatch.setattr(store, "tidy", lambda: None)  # the store's thread would do it at once
        engine.down = True
        model.answers.set()
        with pytest.warns(NotStored, match=r"kept in .*samples\.jsonl"):
            await task
        engine.down = False
        assert (await state_of(store), await paid_in(store)) == ((0, 5), 0)
        await asyncio.to_thread(partial(RemoteStore.tidy, store))
        assert (await state_of(store), await paid_in(store)) == ((3, 0), 3)
    store.close()
