"""Removals from a shared store while others draw from it: races, copies, and answers that are lost."""

from __future__ import annotations

import pytest

from cachepipe import removing
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.errors import StoreError
from cachepipe.removing import forget, prune
from cachepipe.runs import Occurrences
from cachepipe.stores.base import Claim, Commit, Drop, Dropped, Erase, RecordRemoval, ReleaseHold, Withdraw
from cachepipe.stores.remote import local
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.remote.verify import check
from cachepipe.testing import MemoryEngine

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


def drawn(request_id="", *, namespace="x", key=KEY):
    return Draw(label(namespace), key, request_id, 0)


def claim(store, draw, n=1):
    question = Question(draw.key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')
    [grant] = store.write([Claim(draw, n, question, "t")])
    return grant


def fill(store, draw, n=1):
    grant = claim(store, draw, n)
    store.write([Commit(draw.key, index, b"%d" % index, {}) for index in grant.mine])
    store.write([ReleaseHold(draw, "t", grant.held, complete=True, n=n)])
    return grant.indices


def indices(store, key=KEY):
    return [sample.index for sample in store.samples(key)]


@pytest.fixture
def engine():
    return MemoryEngine()


@pytest.fixture
def start(engine, tmp_path):
    """A function that opens the store as another process, perhaps with copies on a machine."""
    stores = []

    def begin(machine=None):
        copies = None if machine is None else local.copies_in(tmp_path / machine, engine, 10)
        session = Session(engine, renews=False, sleep=lambda _: None, copies=copies)
        stores.append(RemoteStore(session))
        return stores[-1]

    yield begin
    engine.before_swap = engine.after_swap = None
    for store in stores:
        store.close()


@pytest.fixture(autouse=True)
def _do_not_wait(monkeypatch):
    monkeypatch.setattr(removing, "_PATIENCE", 0.0)


@pytest.fixture
def store(start):
    """A store with two draws, whose process has ended."""
    first = start()
    fill(first, drawn("a"), 2)
    fill(first, drawn("a", namespace="y"))
    first.close()
    return start()


def before_next_swap(engine, do):
    def act(_swaps):
        engine.before_swap = None
        do()

    engine.before_swap = act


def test_c2_a_sample_that_is_drawn_between_the_look_and_the_deletion_stays(engine, start, store):
    other = start()
    store.write([Withdraw(KEY, [label("x")])])
    before_next_swap(engine, lambda: claim(other, drawn("b", namespace="y")))
    [erased] = store.write([Erase(KEY, [0, 1], "test")])
    assert erased.indices == []
    assert other.recall(drawn("b", namespace="y"), 1).indices == [1]


def test_c2_a_namespace_that_comes_between_the_look_and_the_deletion_keeps_its_sample(engine, start, store):
    other = start()
    store.write([Withdraw(KEY, [label("x")])])
    before_next_swap(engine, lambda: claim(other, drawn("b", namespace="new"), 2))
    [erased] = store.write([Erase(KEY, [1], "test")])
    assert erased.indices == []
    assert indices(store) == [0, 1]


def test_c2_a_claim_does_not_get_a_sample_that_was_deleted_meanwhile(engine, start, store):
    other = start()
    store.write([Withdraw(KEY, [label("x")])])
    before_next_swap(engine, lambda: other.write([Erase(KEY, [1], "test")]))
    grant = claim(store, drawn("b", namespace="y"))
    assert (grant.indices, grant.mine) == ([2], [2])


def test_c1_a_claim_sees_that_its_namespace_was_forgotten_meanwhile(engine, start, store):
    other = start()
    before_next_swap(engine, lambda: other.write([Withdraw(KEY, [label("x")])]))
    assert claim(store, drawn("b")).indices == [0], "as if the namespace had never drawn"


def test_c3_a_claim_does_not_follow_a_draw_that_was_removed_meanwhile(engine, start, store):
    other = start()
    before_next_swap(engine, lambda: other.write([Withdraw(KEY, [label("x")]), Withdraw(KEY, [label("y")])]))
    assert claim(store, drawn("a", namespace="third"), 2).indices == [0, 1]
    assert check(store.session).problems.keys() <= {"question"}


def test_a_draw_that_begins_between_the_look_and_the_removal_refuses_it(engine, start, store):
    other = start()
    before_next_swap(engine, lambda: claim(other, drawn("b")))
    with pytest.raises(StoreError, match="running has drawn samples in the namespace 'x'; end it"):
        store.apply_now([Withdraw(KEY, [label("x")])])
    assert {info.draw.request_id for info in store.draws(KEY)} == {"a", "b"}


def test_a_removal_whose_answer_was_lost_is_performed_once(engine, store):
    def lose(_swaps):
        engine.after_swap = None
        raise Unreachable("the answer was lost")

    store.write([Withdraw(KEY, [label("x")])])
    engine.after_swap = lose
    [erased] = store.write([Erase(KEY, [1], "test")])
    assert erased.indices == [1]
    assert indices(store) == [0]


def test_nothing_is_removed_if_a_process_that_runs_has_made_one_of_the_draws(start, store):
    alive = start()
    fill(alive, drawn("a", key=OTHER))
    with pytest.raises(StoreError, match="end it"):
        forget(store, "x", samples=True)
    [record] = store.removals()
    assert (record["draws"], record["samples"], record["done"]) == (0, 0, False)
    assert (indices(store, KEY), indices(store, OTHER)) == ([0, 1], [0])


def test_what_was_removed_before_a_process_drew_is_recorded_and_completed(engine, start, store, monkeypatch):
    first, alive = start(), start()
    fill(first, drawn("a", key=OTHER))
    first.close()
    swap = engine.swap

    def late(swaps, who):
        """Have another process draw when the removal is about to be written."""
        if any(each.key == OTHER for each in swaps):
            monkeypatch.setattr(engine, "swap", swap)
            claim(alive, drawn("b", key=OTHER))
        return swap(swaps, who)

    monkeypatch.setattr(engine, "swap", late)
    with pytest.raises(StoreError, match="end it"):
        forget(store, "x", samples=True)
    [record] = store.removals()
    assert (record["questions"], record["draws"], record["samples"], record["done"]) == (1, 1, 1, False)
    assert (indices(store, KEY), indices(store, OTHER)) == ([0], [0])
    alive.close()
    store.session._others.clear()  # time passes
    assert forget(store, "x", samples=True).draws == 2
    assert indices(store, OTHER) == []


# Copies on machines.


def test_c2_a_draw_that_was_removed_is_not_answered_from_copies(start, store):
    reader = start("one")
    assert reader.recall(drawn("a"), 2).indices == [0, 1]
    reader.session.local.follow()
    assert reader.session.local.recall(drawn("a"), 2) is not None
    assert forget(store, "x", samples=True).samples == 1
    Occurrences()  # a run begins
    reader.session.local.follow()
    assert reader.session.local.recall(drawn("a"), 2) is None
    assert reader.recall(drawn("a"), 2) is None
    assert reader.recall(drawn("a", namespace="y"), 1).indices == [0]


def test_c2_the_machine_that_removes_a_draw_has_no_copy_of_it_at_once(start, store):
    machine = start("one")
    machine.recall(drawn("a"), 2)
    machine.session.local.follow()
    forget(machine, "x")
    assert machine.session.local.recall(drawn("a"), 2) is None


def test_a_namespace_that_was_forgotten_is_copied_again_when_it_has_drawn_anew(start, store):
    machine = start("one")
    forget(machine, "x")
    fill(machine, drawn("a"), 2)
    machine.session.local.follow()
    assert machine.session.local.recall(drawn("a"), 2).indices == [0, 1]


def test_a_question_that_was_deleted_is_copied_again_when_it_is_asked_anew(start, store):
    """Also on a machine that has learnt of the removal; what it read before is not copied."""
    one, two = start("one"), start("two")
    two.session.local.sync()
    assert two.recall(drawn("a"), 2).indices == [0, 1]  # it is to be copied
    forget(one, "x")
    forget(one, "y")
    prune(one)
    assert one.question(KEY) is None
    for machine in (one, two):
        Occurrences()  # a run begins
        machine.session.local.follow()
        assert machine.session.local.recall(drawn("a"), 2) is None
    fill(one, drawn("a"), 2)
    for machine in (one, two):
        machine.session.local.follow()
        assert machine.recall(drawn("a"), 2).indices == [0, 1]
        machine.session.local.follow()
        assert machine.session.local.recall(drawn("a"), 2).indices == [0, 1]


def test_many_samples_of_one_question_are_deleted(start, store):
    store.write([Withdraw(KEY, [label("x"), label("y")])])
    store.write([Commit(KEY, None, b"extra", {}) for _ in range(1200)])
    assert prune(store).samples == 1202
    assert store.session.engine.rows[KEY] == {}, "nothing is left of the question"


def test_c6_of_two_commands_that_remove_at_once_one_is_refused(engine, start, store):
    """Otherwise both would count what the samples have cost that they delete."""
    other, refused = start(), []
    emptied(store)

    def begin_another():
        with pytest.raises(StoreError, match="another command is removing something") as told:
            prune(other)
        refused.append(told)

    before_next_swap(engine, lambda: before_next_swap(engine, begin_another))  # the first swap is the record
    assert prune(store).questions_deleted == 1
    assert len(refused) == 1
    assert prune(other).questions == 0
    [record] = store.removals()
    assert (record["done"], record["deleting"]) == (True, [])
    assert "lease" not in record


def test_a_command_whose_predecessor_was_killed_is_not_refused(engine, start, store):
    first = start()
    emptied(store)
    name, document = "killed", b'{"id":"killed","at":1.0,"deleting":[],"spent":[]}'
    first.write([RecordRemoval(name, document, running=True)])
    with pytest.raises(StoreError, match="another command is removing something"):
        prune(store)
    engine.close_lease(first.session.lease())
    store.session._others.clear()
    assert prune(store).questions_deleted == 1


# Whole questions.


def emptied(store):
    """Remove all draws and samples of the question, but not the question."""
    store.write([Withdraw(KEY, [label("x"), label("y")])])
    store.write([Erase(KEY, [0, 1], "test")])


def test_a_question_that_is_drawn_between_the_look_and_the_deletion_stays(engine, start, store):
    other = start()
    emptied(store)
    before_next_swap(engine, lambda: claim(other, drawn("b")))
    assert store.write([Drop(KEY, [0, 1])]) == [Dropped(gone=False)]
    assert claim(other, drawn("b")).indices == [2]


def test_c1_a_claim_sees_that_its_question_was_deleted_meanwhile(engine, start, store):
    other = start()
    emptied(store)
    before_next_swap(engine, lambda: other.write([Drop(KEY, [0, 1])]))
    assert fill(store, drawn("b")) == [0]
    assert other.question(KEY) is not None
    assert [sample.payload for sample in other.samples(KEY)] == [b"0"]


def test_c12_what_a_process_remembers_of_a_deleted_question_is_not_used(start, store):
    late = start()
    store.write([Commit(KEY, None, b"extra", {})])
    store.write([Withdraw(KEY, [label("x"), label("y")])])
    assert prune(late).questions_deleted == 1
    with pytest.raises(StoreError, match=f"knows no key {KEY}"):
        store.apply_now([Commit(KEY, None, b"late", {})])
    assert fill(late, drawn("b")) == [0]
    [committed] = store.write([Commit(KEY, None, b"extra", {})])
    assert committed.sample.index == 1


def test_a_deletion_whose_answer_was_lost_is_performed_once(engine, store):
    def lose(_swaps):
        engine.after_swap = None
        raise Unreachable("the answer was lost")

    emptied(store)
    engine.after_swap = lose
    assert store.write([Drop(KEY, [0, 1])]) == [Dropped(gone=True)]
