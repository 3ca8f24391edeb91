"""What is removed from a cache, and what every promise says afterwards."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import sqlite3
from types import SimpleNamespace

import pytest

import cachepipe
from cachepipe import MemoryStore, StoreError, open_store
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question, digest, encode
from cachepipe.removing import compact, discard, forget, prune
from cachepipe.stores.base import Claim, Commit, Drop, Erase, ReleaseHold, new_meta
from cachepipe.stores.queued import Queued
from cachepipe.stores.remote.engine import Read, Swap
from cachepipe.stores.remote.verify import check
from cachepipe.stores.sums import statements
from cachepipe.stores.verify import verify
from cachepipe.testing import MortalStore

SCOPE = "https://api.example/v1/chat/completions"


def question(text="why?", model="m"):
    document = encode({"body": {"messages": [{"content": text, "role": "user"}], "model": model}})
    return Question(digest(SCOPE, document), SCOPE, document)


class Caller:
    """A program that draws from a cache, and ends."""

    def __init__(self, folder):
        self.store = open_store(folder)[0]

    def draw(self, namespace, request_id="", n=1, asked=None, *, text="answer", shared=False):
        asked = asked or question()
        draw = Draw(SHARED if shared else label(namespace), asked.key, request_id, 0)
        user = label(namespace) if shared else None
        [grant] = self.store.apply_now([Claim(draw, n, asked, "t", user=user)])
        for index in grant.mine:
            meta = {**new_meta("call", 1.0, "run", label(namespace)), "sold": {"usage": [2, 3, 5, 0, 0]}}
            self.store.apply_now([Commit(asked.key, index, f'"{text} {index}"'.encode(), meta)])
        self.store.apply_now([ReleaseHold(draw, "t", grant.held, complete=True, n=n)])
        return grant.indices


@contextlib.contextmanager
def calling(folder):
    caller = Caller(folder)
    with contextlib.closing(caller.store):
        yield caller


def reading(cache):
    return contextlib.closing(open_store(cache, read_only=True)[0])


def contents(cache):
    """Return all that is stored of samples, as text."""
    if not isinstance(cache, str):
        [rows] = sqlite3.connect(cache / "cache.db").execute("SELECT group_concat(value) FROM Cache")
        return str(rows)
    with reading(cache) as store:
        key = question().key
        fields = store.session.engine.samples_of(key)
        return str(store.session.engine.read([Read(key, fields)]))


def verified(cache):
    """Return what a check finds in a folder or on a server."""
    if not isinstance(cache, str):
        return verify(cache)
    with reading(cache) as store:
        return check(store.session)


def held(folder):
    """Return the draws of a cache, and its stored samples."""
    with reading(folder) as store:
        draws = {(info.draw.namespace, info.draw.request_id): info.indices for info in store.draws()}
        samples = [sample.index for info in store.keys(newest=True) for sample in store.samples(info.key)]
    return draws, samples


def spent(folder):
    with reading(folder) as store:
        return sum(len(bought.header) > 0 for bought in store.bought()), sum(b.held for b in store.bought())


@pytest.fixture(params=["folder", "valkey", "postgresql"])
def cache(request, tmp_path):
    """Give an empty cache in a folder, and on each server."""
    if request.param == "folder":
        return tmp_path / "cache"
    return request.getfixturevalue(f"new_{request.param.removesuffix('ql')}_url")()


@pytest.fixture
def folder(cache):
    """Give a cache in which two namespaces share some samples."""
    with calling(cache) as caller:
        caller.draw("one", "a", 2)
        caller.draw("one", "b", 2)
        caller.draw("two", "a", 2)
    return cache


def test_a_namespace_is_forgotten_and_what_others_hold_stays(folder):
    removal = forget(folder, "one")
    assert (removal.questions, removal.draws, removal.samples, removal.unused) == (1, 2, 0, 2)
    assert removal.cost.counts()["samples"] == 2
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1, 2, 3])
    assert spent(folder) == (4, 2), "all of it was spent, and half of it is wasted now"
    assert verified(folder).whole


def test_samples_that_nobody_holds_go_on_request_and_still_count_as_spent(folder):
    removal = forget(folder, "one", samples=True)
    assert (removal.draws, removal.samples, removal.unused, removal.size) == (2, 2, 0, 20)
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1])
    assert spent(folder) == (4, 2)
    assert verified(folder).whole
    stored = contents(folder)
    assert "answer 0" in stored
    assert "answer 3" not in stored


def test_c1_the_index_of_a_deleted_sample_is_not_used_again(folder):
    forget(folder, "one", samples=True)
    with calling(folder) as caller:
        assert caller.draw("two", "b", 2) == [4, 5]
        assert caller.draw("one", "a", 2) == [0, 1], "C3: it is coupled to the namespace that is left"
        assert caller.draw("one", "b", 2) == [4, 5]
    assert verified(folder).whole


def test_c2_every_draw_that_stays_gets_what_it_got(folder):
    forget(folder, "one", samples=True)
    prune(folder)
    with contextlib.closing(open_store(folder)[0]) as store:
        grant = store.recall(Draw(label("two"), question().key, "a", 0), 2)
        assert [sample.payload for sample in grant.samples] == [b'"answer 0"', b'"answer 1"']
        assert store.replay(Draw(label("one"), question().key, "x", 0), 3, IntervalSet()) is None


def test_a_removal_can_be_tried_without_changing_anything(folder):
    before = held(folder)
    for removal in (
        forget(folder, "one", samples=True, dry_run=True),
        prune(folder, namespace="two", draws=True, dry_run=True),
    ):
        assert removal.questions == 1
        assert not removal.done
    assert held(folder) == before


def test_unused_samples_are_deleted_and_no_draw_changes(folder):
    forget(folder, "one")
    removal = prune(folder)
    assert (removal.draws, removal.samples) == (0, 2)
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1])
    assert prune(folder).questions == 0, "there is nothing left to delete"


def test_draws_are_removed_with_their_samples_and_those_of_others_stay(folder):
    removal = prune(folder, namespace="one", draws=True)
    assert (removal.draws, removal.samples) == (2, 2)
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1])
    removal = prune(folder, scope="https://api.example/v1", draws=True)
    assert (removal.draws, removal.samples) == (1, 2)
    assert held(folder) == ({}, [])
    assert verified(folder).whole


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        ({"older_than": 3600}, 0),
        ({"older_than": dt.timedelta(seconds=-60)}, 3),
        ({"model": "m"}, 3),
        ({"model": "other"}, 0),
        ({"scope": "https://api.example"}, 3),
        ({"scope": "https://api.exam"}, 0),
        ({"larger_than": 39}, 3),
        ({"larger_than": 40}, 0),
        ({"namespace": "three"}, 0),
    ],
)
def test_only_what_is_selected_is_removed(folder, chosen, count):
    assert prune(folder, **chosen, draws=True).draws == count


def test_all_draws_are_removed_only_if_it_is_said_which(folder):
    with pytest.raises(ValueError, match="older_than, namespace, model"):
        prune(folder, draws=True)


def test_a_shared_draw_goes_with_its_last_user(cache):
    with calling(cache) as caller:
        caller.draw("one", shared=True)
        caller.draw("two", shared=True)
    assert forget(cache, "one").draws == 0
    assert held(cache) == ({(SHARED, ""): (0,)}, [0])
    assert forget(cache, "two", samples=True).samples == 1
    assert held(cache) == ({}, [])
    assert verified(cache).whole


def test_a_namespace_that_has_drawn_nothing_is_named_in_the_error(folder):
    with pytest.raises(StoreError, match=r"no draws of the namespace 'none'; `cachepipe stats` lists"):
        forget(folder, "none")


def test_the_draws_of_a_program_that_runs_are_not_removed(tmp_path):
    alive = set()
    theirs = MortalStore(tmp_path, "host-1-0123456789ab", alive)
    caller = Caller.__new__(Caller)
    caller.store = theirs
    caller.draw("one", "a", 2)
    ours = MortalStore(tmp_path, "host-2-0123456789ab", alive)
    with pytest.raises(StoreError, match=r"running has drawn samples in the namespace 'one'; end it"):
        forget(ours, "one")
    alive.remove(theirs.name)
    with contextlib.closing(MortalStore(tmp_path, "host-3-0123456789ab", alive)) as later:
        assert forget(later, "one").draws == 1
    theirs.close()
    ours.close()


def test_draws_of_requests_that_are_under_way_are_not_removed(cache):
    with calling(cache) as caller:
        asked = question()
        caller.store.apply_now([Claim(Draw(label("one"), asked.key, "", 0), 1, asked, "t")])
        with pytest.raises(StoreError, match="end it"):
            forget(caller.store, "one")


def test_draws_whose_caller_has_not_received_them_are_not_removed(cache):
    """Another caller of the same draw has received the samples; the first one has yet to."""
    with calling(cache) as caller:
        asked, store = question(), caller.store
        draw = Draw(label("one"), asked.key, "", 0)
        [first] = store.apply_now([Claim(draw, 1, asked, "first")])
        [second] = store.apply_now([Claim(draw, 1, asked, "second")])
        store.apply_now([Commit(asked.key, 0, b'"answer"', {})])
        store.apply_now([ReleaseHold(draw, "second", second.held, complete=True, n=1)])
        with pytest.raises(StoreError, match="end it"):
            forget(store, "one")
        store.apply_and_wait([ReleaseHold(draw, "first", first.held, complete=True, n=1)])
        assert forget(store, "one").draws == 1


def test_a_sample_that_is_drawn_meanwhile_stays(folder):
    forget(folder, "one")
    key = question().key
    with calling(folder) as caller:
        caller.draw("three", "b", 3)
        [erased] = caller.store.apply_now([Erase(key, [0, 1, 2, 3, 4], "test")])
    assert erased.indices == [3]
    assert held(folder)[1] == [0, 1, 2]


def test_a_sample_that_is_generated_is_not_deleted(cache):
    with calling(cache) as caller:
        asked = question()
        caller.store.apply_now([Claim(Draw(label("one"), asked.key, "", 0), 1, asked, "t")])
        assert caller.store.apply_now([Erase(asked.key, [0], "test")])[0].indices == []


def test_a_removal_is_recorded_with_what_it_cost(folder):
    forget(folder, "one")
    prune(folder, older_than=-60)
    with reading(folder) as store:
        first, second = store.removals()
        [discarded, _] = store.discards(question().key)
    assert first["selected"] == {"command": "rm", "namespace": "one", "samples": False}
    assert (first["draws"], first["samples"], first["unused"], first["done"]) == (2, 0, 2, True)
    assert (second["draws"], second["samples"], second["done"]) == (0, 2, True)
    assert discarded.why == "cachepipe prune --older-than -60"


def test_a_stopped_removal_is_recorded_and_leaves_the_cache_whole(folder, monkeypatch):
    apply, asked = Queued.apply_and_wait, []

    def stopped(store, operations):
        asked.append(type(operations[0]).__name__)
        if isinstance(operations[0], Erase):
            raise KeyboardInterrupt
        return apply(store, operations)

    monkeypatch.setattr(Queued, "apply_and_wait", stopped)
    with pytest.raises(KeyboardInterrupt):
        forget(folder, "one", samples=True)
    assert asked == ["RecordRemoval", "Withdraw", "Erase", "RecordRemoval"]
    monkeypatch.undo()
    assert verified(folder).whole
    with reading(folder) as store:
        assert [record["done"] for record in store.removals()] == [False]
    assert prune(folder).samples == 2
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1])


# Whole questions.


def facts(cache):
    """Return what the listings say of a cache: keys, samples, discarded ones, and what was spent."""
    with reading(cache) as store:
        totals = store.totals()
        spent = {name: each.spent.counts() for name, each in statements(store).items() if each.spent.sold}
        listed = len(list(store.keys()))
    return listed, totals["keys"], totals["samples"], totals["discarded"], spent


def test_a_question_of_which_nothing_is_left_goes_too_and_its_cost_stays(folder):
    spent = facts(folder)[-1]
    assert spent["=one"]["samples"] == 4
    removal = prune(folder, model="m", draws=True)
    assert (removal.questions_deleted, removal.draws, removal.samples) == (1, 3, 4)
    assert facts(folder) == (0, 0, 0, 0, spent)
    report = verified(folder)
    assert report.whole
    assert set(report.counts.values()) == {0}
    assert "answer" not in contents(folder)
    with reading(folder) as store:
        assert store.question(question().key) is None
    assert prune(folder).questions == 0


def test_c1_a_question_that_was_deleted_begins_anew(folder):
    prune(folder, model="m", draws=True)
    with calling(folder) as caller:
        assert caller.draw("one", "a", 2, text="new") == [0, 1]
        assert caller.draw("two", "a", 3, text="new") == [0, 1, 2]
        grant = caller.store.recall(Draw(label("two"), question().key, "a", 0), 3)
        assert [sample.payload for sample in grant.samples] == [b'"new 0"', b'"new 1"', b'"new 2"']
    assert facts(folder)[:4] == (1, 1, 3, 0)
    assert verified(folder).whole


def test_a_question_with_a_draw_or_a_sample_stays(folder):
    assert forget(folder, "one", samples=True).questions_deleted == 0
    assert forget(folder, "two").questions_deleted == 0
    assert facts(folder)[:4] == (1, 1, 2, 2)
    removal = prune(folder)
    assert (removal.samples, removal.questions_deleted) == (2, 1)
    assert facts(folder)[:4] == (0, 0, 0, 0)


@pytest.mark.filterwarnings("ignore:the server at .* may lose the samples of the last second")
def test_c3_what_was_exported_comes_back_beside_what_is_new(folder, tmp_path):
    bundle = tmp_path / "saved.cachepipe"
    cachepipe.export(folder, bundle, namespaces=["two"])
    prune(folder, model="m", draws=True)
    with calling(folder) as caller:
        assert caller.draw("three", "b", 1, text="new") == [0]
    cachepipe.import_(bundle, folder)
    assert held(folder) == ({("=three", "b"): (0,), ("=two", "a"): (2, 1)}, [0, 1, 2]), "ids tell them apart"
    with reading(folder) as store:
        grant = store.recall(Draw(label("two"), question().key, "a", 0), 2)
        assert [sample.payload for sample in grant.samples] == [b'"answer 0"', b'"answer 1"']
    assert verified(folder).whole


@pytest.mark.filterwarnings("ignore:the server at .* may lose the samples of the last second")
def test_c2_an_export_whose_draws_were_made_anew_is_refused(folder, tmp_path):
    bundle = tmp_path / "saved.cachepipe"
    cachepipe.export(folder, bundle, namespaces=["two"])
    prune(folder, model="m", draws=True)
    with calling(folder) as caller:
        caller.draw("two", "a", 2, text="new")
    with pytest.raises(StoreError):
        cachepipe.import_(bundle, folder)
    assert held(folder) == ({("=two", "a"): (0, 1)}, [0, 1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_c6_a_removal_that_is_stopped_at_a_question_counts_its_cost_once(folder, monkeypatch, when):
    apply, spent = Queued.apply_and_wait, facts(folder)[-1]

    def stopped(store, operations):
        if isinstance(operations[0], Drop):
            if when == "after":
                apply(store, operations)
                apply(store, operations) if store.question(question().key) is not None else None
            raise KeyboardInterrupt
        return apply(store, operations)

    monkeypatch.setattr(Queued, "apply_and_wait", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, model="m", draws=True)
    monkeypatch.undo()
    assert facts(folder)[1] == (when == "before")
    assert facts(folder)[-1] == spent
    assert verified(folder).whole
    assert prune(folder).questions_deleted == (when == "before")
    assert facts(folder) == (0, 0, 0, 0, spent)


def test_a_question_that_somebody_draws_meanwhile_stays(folder, monkeypatch):
    apply = Queued.apply_and_wait

    def late(store, operations):
        if isinstance(operations[0], Drop):
            with calling(folder) as caller:
                assert caller.draw("late", "b", 1, text="new") == [4]
        return apply(store, operations)

    monkeypatch.setattr(Queued, "apply_and_wait", late)
    assert prune(folder, model="m", draws=True).questions_deleted == 0
    assert held(folder) == ({("=late", "b"): (4,)}, [4])
    assert verified(folder).whole


def test_c9_a_process_that_knew_a_deleted_question_finds_the_new_one(tmp_path):
    alive = set()
    theirs = MortalStore(tmp_path, "host-1-0123456789ab", alive)
    reader, first = Caller.__new__(Caller), Caller.__new__(Caller)
    reader.store = theirs
    other = question("other")
    with contextlib.closing(MortalStore(tmp_path, "host-2-0123456789ab", alive)) as store:
        first.store = store
        first.draw("one", "a", 2)
        assert len(theirs.recall(Draw(label("one"), question().key, "a", 0), 2).samples) == 2
    alive.remove("host-2-0123456789ab")
    assert prune(tmp_path, model="m", draws=True).questions_deleted == 1
    with calling(tmp_path) as caller:
        caller.draw("one", "a", asked=other, text="other")
        caller.draw("one", "a", asked=question(), text="new")
    draw = Draw(label("one"), question().key, "a", 0)
    assert theirs.recall(draw, 2) is None
    assert reader.draw("one", "a", 2, text="more") == [0, 1]
    assert [sample.payload for sample in theirs.recall(draw, 2).samples] == [b'"new 0"', b'"more 1"']
    theirs.close()
    assert verified(tmp_path).whole


def test_c12_a_folder_whose_last_samples_were_deleted_is_opened_again(tmp_path):
    for number in range(3):
        with calling(tmp_path) as caller:
            caller.draw("one", "a", asked=question(str(number)))
    with contextlib.closing(
        open_store(tmp_path)[0]
    ) as writer:  # it notes what it has stored last when it ends
        Caller.draw(SimpleNamespace(store=writer), "two", "b", asked=question("2"))
        Caller.draw(SimpleNamespace(store=writer), "two", "b", asked=question("3"))
    assert prune(tmp_path, namespace="two", draws=True).questions_deleted == 1
    assert prune(tmp_path, namespace="one", draws=True).questions_deleted == 3
    with calling(tmp_path) as caller:
        assert caller.draw("one", "a", asked=question("2")) == [0]
    assert verified(tmp_path).whole


def test_a_store_in_memory_is_pruned_too():
    store = MemoryStore()
    caller = Caller.__new__(Caller)
    caller.store = store
    caller.draw("one", "a", 2)
    assert forget(store, "one", samples=True).samples == 2
    assert caller.draw("one", "a", 2) == [0, 1]


def test_a_damaged_record_is_found(folder):
    forget(folder, "one")
    if isinstance(folder, str):
        with contextlib.closing(open_store(folder)[0]) as store:
            engine, key = store.session.engine, "~removals"
            [(name, row)] = engine.rows_of([key])[0].items()
            engine.swap([Swap(key, b"damage", puts={name: row[:-1] + b" "})], 1)
    else:
        with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db")) as ledger, ledger:
            ledger.execute("UPDATE removals SET document = '{}'")
    assert verified(folder).problems.keys() == {"sums"}


def test_a_sample_is_discarded_from_python(folder):
    discard(folder, question().key, 0, "a refusal")
    with calling(folder) as caller:
        assert caller.store.recall(Draw(label("two"), question().key, "a", 0), 2) is None
        assert caller.draw("two", "a", 2) == [2, 1]
    with pytest.raises(StoreError, match="no sample 9"):
        discard(folder, question().key, 9, "no")


def test_space_is_given_back_beside_readers(cache):
    def fill():
        with calling(cache) as caller:
            for each in range(10):
                caller.draw(
                    "one", asked=question(str(each)), text=random.Random(each).randbytes(20_000).hex()
                )
            caller.draw("two", asked=question("kept"))
        prune(cache, namespace="one", draws=True)

    fill()
    with reading(cache) as reader:
        assert reader.totals()["samples"] == 1
        found = compact(cache)
        assert reader.totals()["samples"] == 1
        assert len(list(reader.samples(question("kept").key))) == 1
    if str(cache).startswith("valkey:"):
        assert (found.before, found.after) == (None, None), "the server frees by itself what is deleted"
    elif isinstance(cache, str):
        fill()
        assert compact(cache).after < found.after + 200_000, "the space is used for what is new"
    else:
        assert found.after < found.before
    assert verified(cache).whole


def test_a_cache_that_another_process_writes_is_not_compacted(tmp_path):
    alive = set()
    theirs = MortalStore(tmp_path, "host-1-0123456789ab", alive)
    caller = Caller.__new__(Caller)
    caller.store = theirs
    caller.draw("one")
    with (
        contextlib.closing(MortalStore(tmp_path, "host-2-0123456789ab", alive)) as ours,
        pytest.raises(StoreError, match="writes to the cache"),
    ):
        ours.compact()
    theirs.close()


def test_all_of_it_is_public():
    assert cachepipe.forget is forget
    assert cachepipe.prune is prune
    assert cachepipe.compact is compact
    assert cachepipe.discard is discard
