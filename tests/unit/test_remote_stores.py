"""The store that machines share, on an engine in memory: round trips, conflicts, leases, and what is kept."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading

import pytest

from cachepipe import NotStored, OnlineAPI, Request, StoreError
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.keys import Question, digest
from cachepipe.errors import DamagedCache, StoreUnreachable
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Discard,
    PartlyApplied,
    ReleaseHold,
    ReleaseLease,
)
from cachepipe.stores.remote import rows, similar
from cachepipe.stores.remote.engine import SAMPLE, TURN, Read, Swap, Unreachable
from cachepipe.stores.remote.made import MadeDraws
from cachepipe.stores.remote.session import Session, patiently
from cachepipe.stores.remote.spool import Spool
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import MemoryEngine, ScriptedModel

pytestmark = pytest.mark.anyio

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


def asked(key=KEY):
    return Question(key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')


def drawn(request_id="", *, namespace=None, key=KEY):
    return Draw(label(namespace), key, request_id, 0)


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine(clock):
    return MemoryEngine(clock)


@pytest.fixture
def start(engine, tmp_path, monkeypatch):
    """A function that opens the store as another process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stores = []

    def begin(**options):
        session = Session(engine, **{"renews": False, "sleep": lambda _: None, **options})
        stores.append(RemoteStore(session))
        return stores[-1]

    yield begin
    engine.before_swap = engine.after_swap = None
    engine.down = False
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    return start()


def claim(store, draw, n=1, token="one", **more):  # noqa: S107 - names a claimant
    [grant] = store.write([Claim(draw, n, asked(draw.key), token, **more)])
    return grant


def fill(store, draw, n=1):
    grant = claim(store, draw, n)
    store.write([Commit(draw.key, index, b"%d" % index, {}) for index in grant.mine])
    return grant


def trips(engine, store, *operations):
    before = engine.trips
    results = store.write(operations)
    return engine.trips - before, results


# Similar questions.


def test_a_miss_is_compared_with_a_bounded_number_of_questions_that_are_read_once(engine, start, monkeypatch):
    store = start()
    for number in range(6):
        scope, document = "m", b'{"fields":{"number":%d,"prompt":"why?"}}' % number
        question = Question(digest(scope, document), scope, document)
        store.write([Claim(drawn(key=question.key), 1, question, "t")])
    asked_for = Question("k2-x", "m", b'{"fields":{"number":9,"prompt":"why?"}}')
    monkeypatch.setattr(similar, "MOST", 3)
    before = engine.trips
    found = [store.similar(asked_for) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0].scope == "m"
    assert engine.trips - before == 1 + 3, "one scan, and a look at those that are near"
    assert len(store._similar._keys) == 3


# Round trips.


def test_a_claim_does_not_lose_a_race_against_a_commit_that_it_does_not_need(engine, start):
    store, other = start(), start()
    other.write([Claim(drawn(name), 1, asked(), "t") for name in "ab"])
    store.session.lease()

    def commit(_swaps):
        engine.before_swap = None
        other.write([Commit(KEY, 0, b"0", {})])

    engine.before_swap = commit
    count, [grant] = trips(engine, store, Claim(drawn("c"), 1, asked(), "t"))
    assert grant.mine == [2]
    assert count == 2 + 1 + 1, "a read, the other's commit, a swap, and who generates the others"


def test_a_claim_of_a_pending_sample_does_not_look_for_it(engine, start):
    store, other = start(), start()
    other.write([Claim(drawn(name), 1, asked(), "t") for name in "ab"])
    store.session.lease()
    count, [grant] = trips(engine, store, Claim(drawn("b", namespace="x"), 1, asked(), "t"))
    assert (grant.indices, grant.mine) == ([1], [])
    assert count == 3, "a read, a swap, and who generates it"


def test_what_each_operation_costs_in_round_trips(engine, start):
    store, other = start(), start()
    store.session.lease()
    other.session.lease()
    assert trips(engine, store, Claim(drawn("a"), 1, asked(), "t"))[0] == 2, "a miss reads and swaps"
    assert trips(engine, store, Commit(KEY, 0, b"x", {}))[0] == 1, "what was claimed is remembered"
    assert trips(engine, store, Claim(drawn("a"), 1, asked(), "t"))[0] == 1, "a known draw is read"
    new = Claim(drawn("b", namespace="x"), 1, asked(), "t")
    assert trips(engine, other, new)[0] == 2, "the sample is read with the rest"
    follower = Claim(drawn("a", namespace="y"), 1, asked(), "t")
    assert trips(engine, other, follower)[0] == 2, "so is the draw that it follows"
    assert trips(engine, other, follower)[0] == 1, "and a known draw, after new ones"
    after = Claim(drawn("b", namespace="y"), 1, asked(), "t")
    assert trips(engine, store, after)[0] == 3, "after a known draw the next one is first taken for known"
    assert trips(engine, store, Claim(drawn("c"), 1, asked(), "t"))[0] == 2


def test_known_draws_are_granted_beside_others_that_are_new(engine, store):
    fill(store, drawn("a"), 2)
    fill(store, drawn("a", key=OTHER))
    known = store.write([Claim(drawn("a"), 1, asked(), "t")])
    assert engine.rows[KEY][rows.first_field(drawn("a"))][8:].startswith(b"=")
    claims = [Claim(drawn(name, key=key), 1, asked(key), "t") for name in "ab" for key in (KEY, OTHER)]
    grants = store.write([*claims, Claim(drawn("a", key=OTHER), 1, asked(OTHER), "t", refresh=True)])
    assert [grant.indices for grant in grants] == [[0], [0], [2], [1], [2]]
    assert grants[0].samples == known[0].samples


def test_operations_on_many_keys_travel_together(engine, store):
    keys = [f"k2-{number:064}" for number in range(50)]
    store.session.lease()
    count, grants = trips(engine, store, *(Claim(drawn("a", key=key), 1, asked(key), "t") for key in keys))
    assert count == 2
    assert all(grant.mine == [0] for grant in grants)
    count, _ = trips(engine, store, *(Commit(key, 0, b"x", {}) for key in keys))
    assert count == 1


def test_claims_of_one_key_are_merged_into_one_swap(engine, store):
    swaps = []
    engine.before_swap = swaps.extend
    grants = store.write([Claim(drawn(str(number)), 1, asked(), "t") for number in range(200)])
    assert [grant.indices for grant in grants] == [[number] for number in range(200)]
    assert len(swaps) == 1


def test_nothing_waits_on_an_event_loop(engine, store):
    fill(store, drawn("a"))
    before = engine.trips

    async def look():
        return store.recall(drawn("a"), 1), store.apply_now([Claim(drawn("a"), 1, asked(), "t")])

    assert asyncio.run(look()) == (None, None)
    assert engine.trips == before
    assert store.recall(drawn("a"), 1) is not None, "a thread without a loop may wait"


def test_states_are_looked_at_in_a_thread_while_a_loop_waits(start):
    store, other = start(), start()
    claim(other, drawn("a"))
    changed = threading.Event()
    end = store.listen(changed.set)

    async def look():
        first = store.status([(KEY, 0)])
        other.write([Commit(KEY, 0, b"x", {})])
        await asyncio.to_thread(changed.wait, 20)
        return first, store.status([(KEY, 0)])

    assert asyncio.run(look()) == (["pending"], ["stored"])
    end()


def test_the_processes_that_generate_many_samples_are_asked_about_together(engine, start):
    others = [start() for _ in range(5)]
    for number, other in enumerate(others):
        claim(other, drawn(str(number)))
    store = start()
    before = engine.trips
    assert store.status([(KEY, index) for index in range(5)]) == ["pending"] * 5
    assert engine.trips - before == 2


# Conflicts.


def test_c1_a_claim_that_loses_a_race_decides_again(engine, start):
    store, other = start(), start()
    claim(store, drawn("first"))

    def race(_swaps):
        engine.before_swap = None
        assert claim(other, drawn("b")).indices == [1]

    engine.before_swap = race
    assert claim(store, drawn("a")).indices == [2]


def test_the_loser_of_a_race_has_its_turn_before_others(engine, clock, store):
    lost = Swap(KEY, b"1", True, {b"L": b"as it was"}, {b"L": b"12345678new"})
    assert engine.swap([lost], who=1)[0].wait is False
    later = Swap(KEY, b"2", True, {b"L": None}, {b"L": b"12345678two"})
    assert engine.swap([later], who=2)[0].wait is True
    commit = Swap(KEY, b"3", False, {b"k": None}, {b"k": b"12345678kkk"})
    assert engine.swap([commit], who=2) == [None], "commits do not wait"
    clock.now += TURN
    assert engine.swap([later], who=2) == [None], "a turn ends by itself"


def test_who_lost_a_race_reads_in_its_turn_the_next_time(engine, start):
    """So it decides once on rows that nobody swaps meanwhile; while it is another's turn, it only looks."""
    pauses, others = [], []

    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            fill(there, drawn("theirs, too"))

    here, there = start(sleep=wait), start()
    fill(here, drawn("first"))

    def overtake(_):
        engine.before_swap = None
        fill(there, drawn("theirs"))

    engine.before_swap = overtake
    fill(here, drawn("lost"))
    assert engine.read_in_turn(Read(KEY, []), there.session.lease()) == {}
    engine.before_swap = others.append
    assert claim(here, drawn("in turn")).mine == [4]
    assert len(pauses) == 3
    assert [len(swaps) for swaps in others] == [1, 1, 1], "two of the other process, and one of its own"
    engine.before_swap = None
    assert engine.read_in_turn(Read(KEY, []), there.session.lease()) == {}, "the swap has ended the turn"


def test_a_server_that_starts_is_waited_for_longer_than_one_of_which_there_is_no_sign():
    answers = [Unreachable("it starts", there=True), Unreachable("it starts", there=True)]

    def ask():
        if answers:
            raise answers.pop()
        return "here"

    assert patiently(ask, "db", 30.0, sleep=lambda _: None, for_nobody=0) == "here"
    answers.append(Unreachable("nobody listens"))
    with pytest.raises(StoreUnreachable, match="db has not answered for 0 s: nobody listens"):
        patiently(ask, "db", 30.0, sleep=lambda _: None, for_nobody=0)


def test_a_swap_that_is_sent_twice_is_performed_once(engine, store):
    def lose(_swaps):
        engine.after_swap = None
        raise Unreachable("the answer was lost")

    engine.after_swap = lose
    grant = claim(store, drawn("a"), 2)
    assert (grant.indices, grant.mine) == ([0, 1], [0, 1])
    engine.after_swap = lose
    [result] = store.write([Commit(KEY, None, b"extra", {})])
    assert result.sample.index == 2
    assert [sample.index for sample in store.samples(KEY)] == [2]


def test_an_operation_that_is_refused_after_others_were_performed_is_the_only_one_that_fails(engine, start):
    store, other = start(), start()
    fill(store, drawn("a"))
    fill(store, drawn("a", key=OTHER))

    def race(_swaps):
        engine.before_swap = None
        engine.rows[KEY].pop(b"k")  # what nobody does, so that the second decision is an error

    engine.before_swap = race

    async def apply():
        await store.apply([Commit(OTHER, None, b"extra", {}), Commit(KEY, None, b"extra", {})])

    with pytest.raises(PartlyApplied, match="knows no key") as partly:
        asyncio.run(apply())
    stored, refused = partly.value.results
    assert isinstance(stored, Committed)
    assert isinstance(refused, StoreError)
    assert [sample.index for sample in other.samples(OTHER)] == [0, 1]


def test_c12_an_error_on_remembered_rows_is_checked_on_current_ones(engine, start):
    store, other = start(), start()
    claim(store, drawn("a"))
    other.write([Claim(drawn("b"), 1, asked(), "t"), Commit(KEY, 1, b"x", {})])
    store.write([Discard(KEY, 1, "it is there, whatever is remembered")])
    assert [info.index for info in store.discards(KEY)] == [1]


def test_c12_a_row_that_was_moved_or_changed_is_an_error(engine, store):
    fill(store, drawn("a"))
    fill(store, drawn("b", namespace="x", key=OTHER))
    field = rows.draw_field(drawn("a"))
    row = engine.rows[KEY][field]
    engine.rows[KEY][field] = row[:-1] + b"!"
    with pytest.raises(DamagedCache, match=f"of key {KEY} is damaged"):
        store.recall(drawn("a"), 1)
    engine.rows[OTHER][field] = row
    with pytest.raises(DamagedCache):
        store.recall(drawn("a", key=OTHER), 1)


# The earliest other namespace (C3).


def namespaces(store, count):
    fill(store, drawn("x", namespace="n0"))  # takes the first sample, so that the draws differ
    for number in range(count):
        fill(store, drawn("a", namespace=f"n{number}"))


def test_c3_the_earliest_of_many_namespaces_is_followed(store):
    namespaces(store, 7)
    assert claim(store, drawn("a", namespace="last")).indices == [1]


def test_c3_when_the_earliest_draws_are_undone_a_later_one_is_followed(start):
    store = start()
    claim(store, drawn("0", namespace="z"), 9)
    grants = {f"n{number}": claim(store, drawn("a", namespace=f"n{number}"), 1) for number in range(4)}
    store.write([Commit(KEY, 8, b"x", {})])
    late = drawn("a", namespace="late")
    claim(store, drawn("b", namespace="late"))  # takes the stored one
    grant = claim(store, late)
    store.write([Commit(KEY, index, b"y", {}) for index in grant.indices])
    for namespace, undone in grants.items():
        store.write([ReleaseHold(drawn("a", namespace=namespace), "one", undone.held, complete=False)])
    follower = claim(store, drawn("a", namespace="follower"))
    assert follower.indices == grant.indices


def test_c8_a_claimant_that_leaves_is_not_a_holder_any_more(start):
    store, other = start(), start()
    first = claim(store, drawn("a"))
    second = claim(other, drawn("a"), token="two")
    other.write([ReleaseHold(drawn("a"), "two", second.held, complete=False)])
    store.write([ReleaseLease(KEY, [0]), ReleaseHold(drawn("a"), "one", first.held, complete=False)])
    assert list(store.draws()) == []


def test_a_shared_draw_notes_who_uses_it_once(engine, store):
    shared = drawn()._replace(namespace=SHARED)
    for _ in range(2):
        claim(store, shared, user="=a")
    assert [name for name in engine.rows[KEY] if name.startswith(rows.USE)] == [b"u/=a"]


# Leases.


def test_c4_a_process_that_does_not_renew_its_lease_loses_what_it_generates(clock, start):
    store, other = start(), start()
    claim(store, drawn("a"))
    assert other.status([(KEY, 0)]) == ["pending"]
    clock.now += 5
    other.session._others.clear()  # else it is believed for a quarter of a second
    assert other.status([(KEY, 0)]) == ["free"]
    assert claim(other, drawn("a"), token="two").mine == [0]
    assert not store.session.renew(), "a lease that has ended is not revived"
    [late] = store.write([Commit(KEY, 0, b"late", {})])
    assert not late.kept
    assert late.sample.index == 1
    [result] = other.write([Commit(KEY, 0, b"on time", {})])
    assert result.kept


def test_a_process_that_lost_its_lease_keeps_what_nobody_has_taken(clock, start):
    store = start()
    claim(store, drawn("a"))
    clock.now += 5
    assert not store.session.renew()
    [result] = store.write([Commit(KEY, 0, b"x", {})])
    assert (result.kept, result.sample.index) == (True, 0)
    assert store.session.renew(), "it has another lease"


def test_a_renewed_lease_lasts(clock, start):
    store, other = start(), start()
    claim(store, drawn("a"))
    for _ in range(5):
        clock.now += 2
        assert store.session.renew()
    assert other.status([(KEY, 0)]) == ["pending"]
    assert other.generator(KEY, 0).name.endswith(str(os.getpid()))


def test_c1_a_draw_that_a_live_process_made_is_told(clock, start):
    store, other = start(), start()
    fill(store, drawn("a"))
    assert claim(other, drawn("a")).shared
    assert other.recall(drawn("a"), 1).shared
    assert not store.recall(drawn("a"), 1).shared
    clock.now += 5
    other.session._others.clear()
    assert not claim(other, drawn("a")).shared


# Stamps.


def test_c3_stamps_order_what_processes_with_different_clocks_write(clock, start):
    early, late = start(), start()
    late.session._offset += 3_600_000_000  # an hour ahead
    fill(late, drawn("a", namespace="first"))
    fill(early, drawn("a", namespace="second"))
    draws = sorted(early.draws(), key=lambda info: info.at)
    assert [info.draw.namespace for info in draws] == ["=first", "=second"]


# What an engine cannot take.


def test_c7_a_sample_that_could_not_be_written_is_kept_and_written_later(engine, start):
    store = start(patience=0.01)
    claim(store, drawn("a"))
    engine.down = True

    async def commit():
        await store.apply([Commit(KEY, 0, b"paid", {"call": "c"}, id="me")])

    with pytest.raises(StoreUnreachable, match=r"has not answered.*kept in .*samples\.jsonl"):
        asyncio.run(commit())
    engine.down = False
    store.tidy()
    [sample] = store.samples(KEY)
    assert (sample.index, sample.id, sample.payload) == (0, "me", b"paid")
    assert not store._spool


def test_c7_what_a_dead_process_has_kept_gets_its_place(clock, engine, start):
    dead = start(patience=0.01)
    claim(dead, drawn("a"))
    engine.down = True
    [error] = dead.write([Commit(KEY, 0, b"paid", {})])
    assert isinstance(error, StoreUnreachable)
    engine.down = False
    clock.now += 5
    store = start()
    store.tidy()
    grant = claim(store, drawn("a"))
    assert [sample.payload for sample in grant.samples] == [b"paid"]


def test_c7_a_line_that_was_cut_off_loses_no_other_sample(start):
    store = start()
    claim(store, drawn("a"), 2)
    path = store._spool.put([Commit(KEY, 0, b"whole", {})], store.session.lease())
    with path.open("ab") as file:
        file.write(b'[1,"k2-')
    store.tidy()
    assert [sample.payload for sample in store.samples(KEY)] == [b"whole"]


def test_c1_samples_that_were_kept_are_stored_once_if_the_store_goes_away_in_between(engine, start):
    store = start(patience=0.01)
    claim(store, drawn("a"))
    extras = [Commit(KEY, None, b"%d" % number, {}, id=f"e{number}") for number in range(3)]
    store._spool.put(extras, store.session.lease())
    swaps = []

    def away(asked):
        swaps.append(asked)
        if len(swaps) > 1:
            raise Unreachable("it is away")

    engine.before_swap = away
    store.tidy()
    assert len(swaps) > 1
    engine.before_swap = None
    store.tidy()
    assert [sample.id for sample in store.samples(KEY)] == ["e0", "e1", "e2"]
    assert not store._spool


def test_c1_a_sample_whose_confirmation_was_lost_is_stored_once(engine, start):
    store = start(patience=0.01)
    claim(store, drawn("a"))

    def lost(_asked):
        raise Unreachable("the answer was lost")

    engine.after_swap = lost
    [error] = store.write([Commit(KEY, None, b"extra", {}, id="e")])
    assert isinstance(error, StoreUnreachable)
    engine.after_swap = None
    store.tidy()
    assert [sample.id for sample in store.samples(KEY)] == ["e"]
    assert not store._spool


def test_c7_a_sample_that_was_kept_is_stored_beside_one_that_is_damaged(engine, start):
    store = start()
    fill(store, drawn("a"))
    engine.rows[KEY][b"s/0"] += b"?"
    store._spool.put([Commit(KEY, None, b"paid", {}, id="paid")], store.session.lease())
    store.tidy()
    assert b"s/1" in engine.rows[KEY]


def test_c4_an_extra_is_stored_once_though_its_writer_was_killed_before_it_had_emptied_the_file(start):
    store, other = start(), start()
    claim(store, drawn("a"))
    path = store._spool.put([Commit(KEY, 0, b"late", {}, id="late")], 1)
    lines = path.read_bytes()
    other.tidy()  # its lease is not the one under which the index is pending
    path.write_bytes(lines)
    store.tidy()
    assert [(sample.id, sample.payload) for sample in store.samples(KEY)] == [("late", b"late")]


def test_c7_a_sample_that_the_store_refuses_stays_in_a_file(engine):
    spool = Spool(engine.identity)
    spool.put([Commit("k2-unknown", 0, b"paid", {})], 1)

    def refuse(commit, lease):
        raise StoreError("the cache knows no such key")

    with pytest.warns(NotStored, match=r"refused\.jsonl"):
        spool.empty(refuse, lambda _: ())
    assert not spool
    assert b"k2-unknown" in (spool.folder / "refused.jsonl").read_bytes()


def test_the_engine_reads_what_the_row_of_a_draw_names(engine, store):
    fill(store, drawn("a"), 3)
    field = rows.draw_field(drawn("a"))
    [found] = engine.read([Read(KEY, [field], [field])])
    assert {*found} == {field, b"s/0", b"s/1", b"s/2"}


# Requests that are answered in order.


async def in_order(store, model, engine):
    """Ask four stored questions, and a new one after each; hold up the first swap until all are asked.

    Returns:
        The swaps.
    """
    asked, begun, swaps = threading.Event(), [], []
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        for name in "abcd":
            await pipeline.request(Request(name))

    def hold(found):
        swaps.extend(found)
        assert asked.wait(8)

    async def ask(pipeline, name):
        await pipeline.request(Request(name))
        begun.append(name)
        if len(begun) == 4:
            asyncio.get_running_loop().call_later(0, asked.set)
        return await pipeline.request(Request("new", request_id=name))

    async with OnlineAPI(model, store) as pipeline:
        engine.before_swap = hold
        responses = await asyncio.gather(*[ask(pipeline, name) for name in "dcba"])
        engine.before_swap = None
    assert begun == [*"abcd"], "in the order of the first run"
    assert [response.indices for response in responses] == [(3,), (2,), (1,), (0,)]
    return swaps


async def test_c11_answers_do_not_wait_for_claims_that_will_find_no_sample(engine, store):
    model = ScriptedModel()
    async with asyncio.timeout(20):
        swaps = await in_order(store, model, engine)
    claiming = [swap for swap in swaps if any(name.startswith(rows.DRAW) for name in swap.puts)]
    assert len(claiming) <= 3, "claims that waited together travelled together"
    assert model.asked == [4], "the model is asked when all of them are granted"


async def test_c11_an_answer_waits_for_claims_that_may_find_a_sample(engine, store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await asyncio.gather(*[pipeline.request(Request(name)) for name in "ab"])
    looks = []

    def look(claims, **options):
        looks.append(claims)
        return RemoteStore.look(store, claims, **options)

    store.look = look
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        order = []

        async def ask(name, namespace):
            await pipeline.request(Request(name, namespace=namespace))
            order.append(name)

        await asyncio.gather(ask("b", None), ask("a", "x"))
    assert order == [*"ab"], "a new draw of an earlier sample comes first"
    assert looks


def test_c11_a_process_foretells_whether_its_new_draws_find_a_sample(start):
    """It counts the draws of a namespace that had none when it first looked."""
    here, there = start(), start()

    def foretold(store, request_id):
        return store.session.foretell([Claim(drawn(request_id), 1, asked(), "one")])

    assert foretold(here, "a") is None, "nothing is known of the key"
    assert here.session.look([Claim(drawn("a"), 1, asked(), "one")]) == [False]
    fill(here, drawn("a"))
    assert foretold(here, "b") == [False]
    assert foretold(here, "b") is None, "it may have made this draw before"
    assert foretold(here, "a") is None
    fill(there, drawn("a", namespace="other"), 3)
    fill(here, drawn("b"))
    assert foretold(here, "c") == [True]
    assert there.session.look([Claim(drawn("c"), 1, asked(), "one")]) == [True]
    fill(there, drawn("c"))
    assert foretold(there, "d") is None, "the namespace had draws before this process looked"


def test_the_draws_that_a_process_counts_are_bounded():
    made = MadeDraws(most=3)
    draws = [drawn(name, namespace=namespace) for namespace in "xyz" for name in "ab"]
    for draw in draws:
        made.add(draw)
        assert made.may_hold(draw), "its namespace is not counted"
    for draw in draws:
        made.begin(draw)
        made.add(draw)
        made.add(draw)
        assert made.may_hold(draw)
        assert len(made) <= 3
    assert [made.may_hold(drawn("c", namespace=namespace)) for namespace in "xyz"] == [True, True, False]


# Listings.


@pytest.fixture
def scanned(engine, monkeypatch):
    """The fields that scans of the store ask for, and the keys of which all rows are read."""
    fields, keys = [], []
    scan, rows_of = engine.scan, engine.rows_of
    monkeypatch.setattr(
        engine, "scan", lambda prefix, asked=(): (fields.append([*asked]), scan(prefix, asked))[1]
    )
    monkeypatch.setattr(engine, "rows_of", lambda asked: (keys.append([*asked]), rows_of(asked))[1])
    return fields, keys


def listed_in(store, count):
    """Ask questions; return their keys, in this order."""
    names = [f"k2-{number:064x}" for number in range(count)]
    for name in names:
        fill(store, Draw(label("x" if name == names[3] else None), name, "", 0))
    return names


def test_a_listing_reads_all_rows_only_of_the_questions_that_it_shows(store, scanned):
    names = listed_in(store, 250)
    fields, keys = scanned
    found = store.keys(newest=True)
    assert fields == [[rows.KNOWN]], "nothing but what they are sorted by"
    assert [info.key for info in itertools.islice(found, 2)] == names[:-3:-1]
    assert keys == [names[:149:-1]], "a page"
    assert [(info.key, info.samples) for info in store.keys(namespace=label("x"))] == [(names[3], 1)]
    assert keys[1:] == [[names[3]]]
    assert [info.key for info in store.keys(holding=["WHY"])] == names
    assert rows.QUESTION in fields[-1]


def test_figures_are_summed_without_the_questions_and_the_samples(store, scanned):
    listed_in(store, 5)
    fields, keys = scanned
    looked = []
    store.looked = looked.append
    assert store.totals() == {
        "keys": 5,
        "samples": 5,
        "pending": 0,
        "draws": 5,
        "namespaces": 2,
        "discarded": 0,
    }
    assert [(one.namespace, one.draws, one.samples) for one in store.namespaces()] == [
        (None, 4, 4),
        ("x", 1, 1),
    ]
    assert len(list(store.draws())) == 5
    assert not {rows.QUESTION, rows.FIRST, SAMPLE}.intersection(*fields)
    assert all(fields)
    assert keys == []
    assert looked == [1, 2, 3, 4, 5] * 3
