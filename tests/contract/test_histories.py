"""Histories that once broke the contract: several processes, draws of many rows, long draws, lost turns."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import shutil
import sqlite3
import threading
from typing import ClassVar

import pytest

from cachepipe import DiskStore, LocalAPI, Request, Response, StoreError
from cachepipe.cache.calls import Caller, DirectDemand
from cachepipe.contract import allotment
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.stores import reading, transaction
from cachepipe.stores.base import Claim, Commit, Discard, ReleaseHold, ReleaseLease
from cachepipe.testing import MortalStore

pytestmark = pytest.mark.anyio

QUESTION = Question("k2-a", None, b"{}")
KEY = QUESTION.key


def draw(namespace="a", request_id=""):
    return Draw(label(namespace), KEY, request_id, 0)


def claim(store, whose, n=1, token="one", **more):  # noqa: S107 - no secret
    [grant] = store.write([Claim(whose, n, QUESTION, token, **more)])
    return grant


def generate(store, whose, n=1, token="one", **more):  # noqa: S107 - no secret
    """Claim n samples of a draw and store what is missing."""
    grant = claim(store, whose, n, token, **more)
    store.write([Commit(KEY, index, b"%d" % index, {}) for index in grant.mine])
    return grant


@pytest.fixture
def process(tmp_path):
    """A function that opens one folder as the process of that name."""
    living, opened = set(), []

    def start(name):
        opened.append(MortalStore(tmp_path / "cache", name, living))
        return opened[-1]

    yield start
    for store in opened:
        store.close()


def test_c3_a_shared_draw_of_many_rows_is_no_namespace_to_be_coupled_to(store):
    for n in range(1, 12):
        generate(store, Draw(SHARED, KEY, "", 0), n)
    assert claim(store, draw()).indices == [0]
    assert claim(store, draw("b"), 3).indices == [0, 1, 2]


def test_c1_who_joined_a_draw_holds_it_whatever_number_another_process_gave_its_request(process):
    """Processes that run one program number their requests alike."""
    author, first, second = process("author"), process("first"), process("second")
    grant = claim(author, draw(), 2, "7")
    one, two = claim(first, draw(), 2, "3"), claim(second, draw(), 2, "3")
    author.write([ReleaseLease(KEY, grant.mine), ReleaseHold(draw(), "7", grant.held, complete=False)])
    first.write([ReleaseHold(draw(), "3", one.held, complete=False)])
    assert [found.indices for found in second.draws()] == [(0, 1)]
    second.write([ReleaseHold(draw(), "3", two.held, complete=False)])
    assert not list(second.draws())


def fail(store, grant, token="one"):  # noqa: S107 - no secret
    """Give up a claim whose samples will not come; return what the ledger holds of each draw."""
    store.write([ReleaseLease(KEY, grant.mine), ReleaseHold(draw(), token, grant.held, complete=False)])
    return [found.indices for found in store.draws()]


def kill(store):
    store.alive.discard(store.name)


@pytest.fixture
def at_once(monkeypatch):
    """The dead are told from the living at each look."""
    monkeypatch.setattr(reading, "_ALIVE_FOR", -1.0)
    monkeypatch.setattr(transaction.time, "monotonic", itertools.count(1000).__next__)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("n", "left"), [(0, (0, 1)), (1, (2, 1)), (2, (2, 1))])
def test_c8_a_replacement_outlives_its_killed_process_as_far_as_it_was_delivered(process, n, left):
    author, other = process("author"), process("other")
    generate(author, draw(), 2)
    author.write([Commit(KEY, None, b"2", {}), Discard(KEY, 0, "a refusal")])
    assert claim(author, draw(), 3).indices == [2, 1, 3]
    kill(author)
    if n:
        assert other.recall(draw(), n) is None
        assert claim(other, draw(), n).indices == [2, 1][:n]
    grant = claim(other, draw(), 3, "two")
    assert (grant.indices, grant.mine) == ([2, 1, 3], [3])
    assert fail(other, grant, "two") == [left]
    assert claim(other, draw("a", "another")).indices == [3 if 2 in left else 2]


@pytest.mark.usefixtures("at_once")
def test_c2_a_refresh_of_a_draw_whose_process_was_killed_stands_when_an_extension_fails(process):
    """What the killed process had begun is no part of the draw any more."""
    first, second, third = process("first"), process("second"), process("third")
    claim(first, draw(), 2)
    kill(first)
    assert generate(second, draw(), 2, refresh=True).indices == [2, 3]
    kill(second)
    assert fail(third, claim(third, draw(), 3)) == [(2, 3)]
    assert third.recall(draw(), 2).indices == [2, 3]


@pytest.mark.usefixtures("at_once")
def test_c1_what_a_joiner_received_in_place_of_a_discarded_sample_stands_when_its_process_has_ended(process):
    first, second = process("first"), process("second")
    grant = claim(first, draw(), 3)
    first.write([Commit(KEY, 0, b"0", {}), Discard(KEY, 0, "a refusal")])
    short = generate(second, draw(), 1, "two")
    assert (short.indices, short.joined) == ([3], True)
    second.write([ReleaseHold(draw(), "two", short.held, complete=True, n=1)])
    last = claim(first, draw(), 3, "three")
    kill(second)
    fail(first, grant)
    assert fail(first, last, "three") == [(3,)]
    assert claim(first, draw("a", "another")).indices == [1]


@pytest.mark.usefixtures("at_once")
def test_c2_what_a_killed_process_had_laid_on_a_draw_that_failed_is_undone_with_it(process):
    """Else a gap is left, and nothing that the draw gets later is found again."""
    first, second = process("first"), process("second")
    grant = claim(first, draw())
    assert claim(second, draw(), 2, "two").indices == [0, 1]
    kill(second)
    assert not fail(first, grant)
    assert generate(first, draw(), 2).indices == [0, 1]
    assert first.recall(draw(), 2).indices == [0, 1]


def test_c1_a_refresh_that_was_recalled_stands_when_who_took_it_over_is_cancelled(process):
    """It had begun the draw before the refresh, and has not noticed yet that all has come."""
    first, second, reader = process("first"), process("second"), process("reader")
    before = claim(first, draw(), 2)
    refresh = claim(second, draw(), 2, "two", refresh=True)
    joined = claim(first, draw(), 2)
    assert (joined.indices, joined.mine) == ([2, 3], [])
    fail(second, refresh, "two")
    assert generate(first, draw(), 2).mine == [2, 3]
    assert reader.recall(draw(), 2).indices == [2, 3]
    held = tuple({*before.held, *joined.held})
    first.write([ReleaseLease(KEY, before.mine), ReleaseHold(draw(), "one", held, complete=False)])
    assert reader.recall(draw(), 2).indices == [2, 3]
    assert claim(reader, draw("a", "another")).indices == [4], "what was refreshed stays taken"


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_c8_a_refresh_and_what_it_was_to_replace_are_both_undone(store, order):
    """In whatever order they fail; what the refresh hid is looked at again when it has gone."""
    grants = {"one": claim(store, draw(), 3), "two": claim(store, draw(), 2, "two", refresh=True)}
    assert [found.indices for found in store.draws()] == [(3, 4)]
    for token in order:
        left = fail(store, grants[token], token)
    assert not left
    assert claim(store, draw("a", "another"), 3).indices == [0, 1, 2]


def test_c3_a_clock_that_was_set_back_leaves_the_positions_of_a_draw_as_they_are(process, monkeypatch):
    now = [2000.0]
    monkeypatch.setattr(transaction.time, "time", lambda: now[0])
    first, second, third = process("first"), process("second"), process("third")
    generate(first, draw("a", "before"))
    generate(first, draw("a", "r"))
    now[0] = 1000.0
    assert generate(second, draw("a", "r"), 3).indices == [1, 2, 3]
    assert second.replay(draw("b", "r"), 3, IntervalSet()).indices == [1, 2, 3]
    now[0] = 500.0
    assert claim(third, draw("earliest", "r")).indices == [1]
    now[0] = 3000.0
    for namespace in "cdefghij":  # from so many rows on, only the earliest are looked at
        assert claim(third, draw(namespace, "r")).indices == [1]
    assert claim(third, draw("earliest", "r"), 3).indices == [1, 2, 3]


def test_c1_a_draw_that_is_undone_while_it_is_looked_at_is_not_delivered(tmp_path, monkeypatch):
    """Its samples come from another namespace between the look at the ledger and that at the shelf."""
    store = DiskStore(tmp_path / "cache")
    maker = claim(store, draw("b"), 2)
    grant = claim(store, draw("a"), 2, "two")
    store.recall(draw("a"), 2)  # so that the connections are open
    look = reading.read_sample
    commits = [Commit(KEY, index, b"%d" % index, {}) for index in maker.mine]
    history = [ReleaseHold(draw("a"), "two", grant.held, complete=False), *commits]

    def late(*given):
        if history:
            now, history[:] = list(history), []
            store.write(now[:1])
            store.write(now[1:])
        return look(*given)

    monkeypatch.setattr(reading, "read_sample", late)
    assert store.recall(draw("a"), 2) is None
    assert claim(store, draw("a", "other"), 2).indices == [0, 1]
    store.close()


def test_c1_a_draw_is_not_undone_in_the_transaction_that_stores_its_samples(store):
    """Readers see them before it has ended, and the draw beside them."""
    maker = claim(store, draw("b"), 2)
    grant = claim(store, draw("a"), 2, "two")
    leave = ReleaseHold(draw("a"), "two", grant.held, complete=False)
    results = store.write([leave, *(Commit(KEY, index, b"%d" % index, {}) for index in maker.mine)])
    assert [result and result.sample.index for result in results] == [None, 0, 1]
    assert store.recall(draw("a"), 2).indices == [0, 1]


class Counted(int):
    """A number that counts how often it is compared."""

    compared: ClassVar[list[int]] = []

    def __eq__(self, other):
        self.compared.append(other)
        return int(self) == other

    __hash__ = int.__hash__


def test_c4_a_claim_of_many_samples_does_not_look_at_all_of_them_for_each(store, monkeypatch):
    choose = allotment.choose
    monkeypatch.setattr(allotment, "choose", lambda *given, **more: Counted(choose(*given, **more)))
    Counted.compared.clear()
    generate(store, draw("b"))
    assert len(claim(store, draw(), 1000).mine) == 999
    assert len(Counted.compared) < 10_000


class Slots(list):
    """A list that counts what is copied out of it."""

    copied = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        if isinstance(place, slice):
            Slots.copied += len(found)
            return Slots(found)
        return found


class Single:
    max_n = 1

    async def request(self, request):
        return Response([f"a{number}" for number in range(request.n)])


async def test_c4_a_request_for_many_samples_is_cut_without_copying_the_rest_of_it_for_each_call():
    caller = Caller(asyncio.get_running_loop(), Single(), lambda *_: None)
    need = DirectDemand(asyncio.get_running_loop(), Request("q", n=1000))
    need.slots = Slots(need.slots)
    caller.start([need])
    assert len(await need.result()) == caller.calls == 1000
    assert Slots.copied == 1000


class Gated:
    """A model that answers all it was asked at once, when it is told to."""

    model = "m"

    def __init__(self):
        self.returned = 0
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def batch_request(self, batch):
        self.asked.set()
        await self.go.wait()
        self.returned += len(batch.requests)
        return [Response([request.prompt]) for request in batch.requests]


@pytest.mark.parametrize("turns", range(8))
def test_c7_what_a_model_has_returned_outlives_a_loop_that_ends_behind_a_lock(tmp_path, turns):
    folder = tmp_path / "cache"
    store, model = DiskStore(folder), Gated()
    other = sqlite3.connect(folder / "ledger.cache.db", isolation_level=None)

    async def leave():
        asking = asyncio.ensure_future(LocalAPI(model, store).request(Request("q")))
        await model.asked.wait()
        other.execute("BEGIN IMMEDIATE")
        model.go.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        return asking

    asyncio.run(leave())
    other.execute("ROLLBACK")
    other.close()
    store.close()
    assert stored(folder) == model.returned


@pytest.mark.parametrize("turns", [0, 3])
def test_c7_what_a_model_has_returned_outlives_a_loop_that_ends_with_much_to_write(tmp_path, turns):
    folder = tmp_path / "cache"
    store, model = DiskStore(folder), Gated()
    model.go.set()

    async def leave():
        pipeline = LocalAPI(model, store, batch_size=5000)
        asking = [asyncio.ensure_future(pipeline.request(Request(f"q{number}"))) for number in range(2000)]
        await model.asked.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        return asking

    asyncio.run(leave())
    store.close()
    assert stored(folder) == model.returned > 100


@pytest.mark.parametrize("what", ["deleted", "moved", "made anew"])
def test_c7_nothing_is_claimed_in_a_folder_that_has_gone_and_what_was_is_stored_if_it_can_be(tmp_path, what):
    folder, other = tmp_path / "cache", tmp_path / "other"
    store = DiskStore(folder)
    grant = claim(store, draw())
    if what == "deleted":
        shutil.rmtree(folder)
    else:
        folder.rename(other)
    if what == "made anew":
        DiskStore(folder).close()
    store._ledger.reaped = 0.0  # they are looked at ten times a second
    with pytest.raises(StoreError, match="moved or deleted"):
        claim(store, draw("b"))
    commit = Commit(KEY, grant.mine[0], b"0", {})
    if what == "deleted":
        with pytest.raises(StoreError, match="moved or deleted"):
            store.write([commit])
    else:
        assert store.write([commit])[0].kept
    store.close()
    if what != "deleted":
        assert stored(other) == 1


def test_c7_a_store_whose_files_cannot_be_opened_any_more_writes_what_is_queued_and_closes(
    tmp_path, monkeypatch
):
    """As when a process has opened too many: a checkpoint can wait."""
    folder = tmp_path / "cache"
    store = DiskStore(folder)
    grants = [claim(store, draw("a", str(number))) for number in range(2)]

    def refuse(**_):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(store, "_open", refuse)
    for grant in grants:
        store._rows = 1_000_000  # so that a checkpoint is due
        written = threading.Event()
        store._writer.put([Commit(KEY, grant.mine[0], b"0", {})], lambda _, written=written: written.set())
        assert written.wait(20)
    store.close()
    monkeypatch.undo()
    assert stored(folder) == 2


def test_c8_what_reaches_the_thread_of_a_store_that_is_closing_is_answered(tmp_path):
    store = DiskStore(tmp_path / "cache")
    answers = queue.Queue()
    store._writer.put([], answers.put)
    assert answers.get(timeout=20) == []
    store.close()
    store._writer.put([], answers.put)
    assert isinstance(answers.get(timeout=20), StoreError)


def stored(folder):
    """Return how many samples a folder holds."""
    with contextlib.closing(DiskStore(folder)) as store:
        totals = store.totals()
        assert totals["pending"] == 0
        return totals["samples"]
