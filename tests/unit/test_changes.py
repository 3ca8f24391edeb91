"""Shared stores announce changes of draws that may have been answered before, so that copies can notice."""

from __future__ import annotations

import pytest

from cachepipe.contract.allotment import Segment, answers_alike
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.contract.schedule import Place
from cachepipe.stores.base import Claim, Commit, Discard, NotePlace, ReleaseHold, ReleaseLease
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.remote.urls import open_url
from cachepipe.testing import MemoryEngine

KEY = "k2-" + "a" * 64


def drawn(request_id="", *, namespace=None):
    return Draw(label(namespace), KEY, request_id, 0)


def claim(store, draw, n=1, **more):
    question = Question(KEY, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')
    [grant] = store.write([Claim(draw, n, question, "t", **more)])
    return grant


def fill(store, draw, n=1):
    grant = claim(store, draw, n)
    store.write([Commit(KEY, index, b"%d" % index, {}) for index in grant.mine])
    return grant


@pytest.fixture
def engine():
    return MemoryEngine()


@pytest.fixture
def start(engine):
    stores = []

    def begin():
        stores.append(RemoteStore(Session(engine, renews=False, sleep=lambda _: None)))
        return stores[-1]

    yield begin
    engine.before_swap = None
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    return start()


def announced(engine):
    return [number for number, _ in engine.changes(None).keys]


# What is announced.


def test_what_only_adds_is_not_announced(engine, start):
    store, other = start(), start()
    fill(store, drawn("a"))
    fill(store, drawn("a"), 3)
    fill(other, drawn("a", namespace="b"), 2)
    failed = claim(store, drawn("c"), 5)
    joined = claim(other, drawn("c"), 5)
    store.write([ReleaseLease(KEY, failed.mine), ReleaseHold(drawn("c"), "t", failed.held, complete=False)])
    other.write([ReleaseHold(drawn("c"), "t", joined.held, complete=False)])
    assert announced(engine) == []


def test_a_discard_is_announced(engine, store):
    fill(store, drawn("a"))
    store.write([Discard(KEY, 0, "it is wrong")])
    assert announced(engine) == [1]
    assert rows.load_change(KEY, engine.rows[KEY][rows.CHANGED]) == 1


def test_the_draw_of_a_discarded_sample_is_announced_when_it_gets_another(engine, store):
    fill(store, drawn("a"), 2)
    store.write([Discard(KEY, 0, "it is wrong")])
    fill(store, drawn("a"), 2)
    assert announced(engine) == [1, 2]


def test_c2_a_refreshed_draw_is_announced(engine, store):
    fill(store, drawn("a"))
    claim(store, drawn("a"), refresh=True)
    assert announced(engine) == [1]


def test_c11_a_noted_place_is_announced(engine, store):
    fill(store, drawn("a"), 2)
    store.write([NotePlace(drawn("a"), 1, Place(17, 1))])
    assert announced(engine) == [1]
    store.write([NotePlace(drawn("a"), 1, Place(17, 1))])
    assert announced(engine) == [1], "nothing has changed"


def test_a_change_is_announced_before_it_is_made(engine, store):
    fill(store, drawn("a"))
    seen = []
    engine.before_swap = lambda _: seen.append(announced(engine))
    store.write([Discard(KEY, 0, "it is wrong")])
    assert seen == [[1]]


def test_a_change_that_another_one_has_overtaken_is_announced_again(engine, start):
    store, other = start(), start()
    fill(store, drawn("a"), 2)

    def overtake(_swaps):
        engine.before_swap = None
        other.write([Discard(KEY, 1, "it is wrong too")])

    engine.before_swap = overtake
    store.write([Discard(KEY, 0, "it is wrong")])
    assert announced(engine) == [1, 2, 3]
    assert rows.load_change(KEY, engine.rows[KEY][rows.CHANGED]) == 3


PLACED = Segment(0, 0, [4, 5], 1, None, 1, place=Place(3))
PLAIN = PLACED._replace(place=None)
MORE = Segment(1, 2, [6], 1, None, 2)


@pytest.mark.parametrize(
    ("before", "after", "alike"),
    [
        ([PLAIN], [PLAIN], True),
        ([PLAIN], [PLAIN._replace(token="t", standing=1, lease=9)], True),
        ([PLAIN], [PLAIN, MORE], True),
        ([PLAIN, MORE], [PLAIN], True),
        ([PLAIN], [PLAIN, MORE._replace(place=Place(9))], True),
        ([PLAIN], [PLACED], False),
        ([PLACED], [PLACED._replace(place=Place(4))], False),
        ([PLAIN], [PLAIN, MORE._replace(position=1)], False),
        ([PLAIN], [PLAIN, MORE._replace(position=0)], False),
    ],
)
def test_draws_are_answered_alike_if_no_position_has_changed(before, after, alike):
    assert answers_alike(before, after) is alike


# The engines.


@pytest.fixture(params=["memory", "valkey", "postgres"])
def real_engine(request, monkeypatch, tmp_path):
    """Each engine, on a real server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if request.param == "memory":
        yield MemoryEngine()
        return
    store = open_url(request.getfixturevalue(f"new_{request.param}_url")())
    yield store.session.engine
    store.close()


def test_an_engine_numbers_the_changes_and_tells_those_from_a_number_on(real_engine):
    assert real_engine.changes(None).keys == []
    assert real_engine.changes(0).keys == []
    assert real_engine.announce(["ä", "b"]) == [1, 2]
    assert real_engine.announce(["ä"]) == [3]
    assert real_engine.changes(None).keys == [(1, "ä"), (2, "b"), (3, "ä")]
    assert real_engine.changes(3).keys == [(3, "ä")]
    assert real_engine.changes(4).keys == []


def test_an_engine_remembers_the_last_changes_only(real_engine, monkeypatch):
    for module in (
        "cachepipe.stores.remote.valkey",
        "cachepipe.stores.remote.postgres",
        "cachepipe.testing.engines",
    ):
        monkeypatch.setattr(f"{module}.CHANGES", 5)
        monkeypatch.setattr(f"{module}.RECENT", 3)
    for number in range(9):
        real_engine.announce([str(number)])
    assert [number for number, _ in real_engine.changes(0).keys] == [5, 6, 7, 8, 9]
    assert [number for number, _ in real_engine.changes(None).keys] == [7, 8, 9]


def test_an_engine_has_one_epoch_as_long_as_its_server_runs(real_engine):
    assert real_engine.changes(None).epoch == real_engine.changes(0).epoch
