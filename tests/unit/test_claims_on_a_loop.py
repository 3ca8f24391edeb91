"""Claims that an event loop makes on a shared store itself, and what becomes of those without an answer."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe import OnlineAPI, Request
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.stores.base import Claim, Commit, ReleaseLease
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import MemoryEngine, ScriptedModel

pytestmark = pytest.mark.anyio

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


class LoopEngine(MemoryEngine):
    """An engine that swaps on a loop; a test holds its answers back, or loses them.

    Attributes:
        soon: the number of swaps on a loop.
        loses: what is lost: nothing, the answer, or the request too.
        held: answers that were held back; None if they are not.
    """

    def __init__(self):
        super().__init__()
        self.soon = 0
        self.loses = ""
        self.held = None

    def swap_soon(self, swaps, who, then):
        self.soon += len(swaps)
        try:
            answers = None if self.loses == "request" else self.swap(swaps, who)
        except Unreachable:
            answers = None
        if self.loses == "answer":
            answers = None
        if self.held is None:
            asyncio.get_running_loop().call_soon(then, answers)
        else:
            self.held.append((then, answers))
        return True


def claimed(request_id, namespace=None, key=KEY, n=1):
    question = Question(key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')
    return Claim(Draw(label(namespace), key, request_id, 0), n, question, "t")


def fill(store, *claims):
    grants = store.write(claims)
    store.write(
        [
            Commit(claim.draw.key, index, b"%d" % index, {})
            for claim, grant in zip(claims, grants, strict=True)
            for index in grant.mine
        ]
    )


def payloads(grants):
    return [[sample and sample.payload for sample in grant.samples] for grant in grants]


@pytest.fixture
def engine():
    return LoopEngine()


@pytest.fixture
def start(engine, tmp_path, monkeypatch):
    """A function that opens the store as another process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stores = []

    def begin():
        stores.append(RemoteStore(Session(engine, renews=False, sleep=lambda _: None)))
        return stores[-1]

    yield begin
    engine.loses = ""
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    """A store whose process has made new draws, so that it guesses."""
    store = start()
    fill(store, claimed("first", n=3), claimed("first", key=OTHER))
    return store


async def test_new_draws_are_claimed_without_a_thread(engine, store):
    claims = [claimed("a", "x"), claimed("b", "x"), claimed("a", "x", OTHER), claimed("b", "x", OTHER)]
    before = engine.trips
    grants = await store.apply(claims)
    assert (engine.soon, engine.trips - before) == (2, 1)
    assert payloads(grants) == [[b"0"], [b"1"], [b"0"], [None]]
    assert grants[-1].mine == [1]
    assert store._writer._thread is None


async def test_a_pipeline_makes_new_draws_without_a_thread_for_claims(engine, store, until):
    async with OnlineAPI(ScriptedModel(cache_scope="m"), store, ordered=False) as pipeline:
        first = [await pipeline.request(Request("p", request_id=str(number))) for number in range(5)]
        await until(lambda: not store._writer.busy)
        engine.soon = 0
        again = [
            await pipeline.request(Request("p", request_id=str(number), namespace="x")) for number in range(5)
        ]
        assert engine.soon == 5
    assert [each.data for each in again] == [each.data for each in first]


@pytest.mark.parametrize("loses", ["answer", "request"])
async def test_c1_a_claim_whose_answer_is_lost_is_made_once(engine, store, loses):
    engine.loses = loses
    [grant] = await store.apply([claimed("a", "x")])
    assert payloads([grant]) == [[b"0"]]
    assert [info.draw.request_id for info in store.draws() if info.draw.namespace == label("x")] == ["a"]
    engine.loses = ""
    [grant] = await store.apply([claimed("b", "x")])
    assert grant.indices == [1]


@pytest.mark.parametrize("loses", ["answer", "request"])
async def test_c4_a_miss_whose_claim_gets_no_answer_is_generated_once(engine, store, loses, until):
    model = ScriptedModel(cache_scope="m")
    async with OnlineAPI(model, store, ordered=False) as pipeline:
        await pipeline.request(Request("p", request_id="first"))
        await until(lambda: not store._writer.busy)
        engine.soon, engine.loses = 0, loses
        response = await pipeline.request(Request("p", request_id="second"))
        assert engine.soon == 1
        assert (response.cached, response.indices) == ([False], (1,))
        assert len(model.calls) == 2


async def test_c1_a_claim_that_another_process_overtakes_gets_another_sample(engine, start, store):
    [theirs] = start().write([claimed("theirs", "x")])
    grants = await store.apply([claimed("a", "x"), claimed("a", "x", OTHER)])
    assert theirs.indices == [0]
    assert payloads(grants) == [[b"1"], [b"0"]]
    assert engine.soon == 2


async def test_a_claim_does_not_overtake_what_its_loop_has_queued(engine, store):
    [grant] = store.write([claimed("a", "x", OTHER), claimed("b", "x", OTHER)])[1:]
    released = store.apply([ReleaseLease(OTHER, grant.mine)])
    [other] = await store.apply([claimed("b", "y", OTHER)])
    await released
    assert engine.soon == 0, "the thread does it, behind the release"
    assert other.indices


async def test_claims_of_a_key_that_is_being_swapped_do_not_race_with_their_own_process(engine, store, until):
    engine.held = []
    first = store.apply([claimed("a", "x")])
    second = store.apply([claimed("b", "x"), claimed("a", "x", OTHER)])
    assert engine.soon == 1, "a thread reads what the first swap has written"
    assert [grant.indices for grant in await second] == [[1], [0]]
    [(then, answers)] = engine.held
    then(answers)
    assert [grant.indices for grant in await first] == [[0]]
    engine.held = None
    assert not store.session._contended
    await until(lambda: not store._writer.busy)
    await store.apply([claimed("c", "x")])
    assert engine.soon == 2


async def test_what_a_cancelled_claim_was_granted_is_given_back(engine, store, until):
    engine.held = []
    future = store.apply([claimed("b", "x", n=4)])
    future.cancel()
    [(then, answers)] = engine.held
    assert b"p/3" in engine.rows[KEY]
    then(answers)
    await until(lambda: b"p/3" not in engine.rows[KEY])


def test_what_a_closed_loop_was_granted_is_given_back(engine, store):
    engine.held = []

    async def begin():
        store.apply([claimed("b", "x", n=4)])

    asyncio.run(begin())
    [(then, answers)] = engine.held
    assert b"p/3" in engine.rows[KEY]
    then(answers)
    store.close()
    assert b"p/3" not in engine.rows[KEY]


def test_a_claim_of_a_closed_loop_without_an_answer_does_not_block_the_store(engine, store):
    engine.held = []

    async def begin():
        store.apply([claimed("b", "x", n=3)])

    asyncio.run(begin())
    [(then, _)] = engine.held
    then(None)
    [grant] = store.write([claimed("c", "x")])
    assert grant.indices == [3]


async def test_a_store_that_is_closed_says_so_to_a_claim_without_an_answer(engine, store):
    engine.held = []
    future = store.apply([claimed("a", "x")])
    store.close()
    [(then, _)] = engine.held
    then(None)
    with pytest.raises(Exception, match="was closed"):
        await future
