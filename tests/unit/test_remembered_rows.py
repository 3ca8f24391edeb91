"""Claims that are decided on what a process remembers of a key: one round trip, and never another answer."""

from __future__ import annotations

import pytest

from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.errors import DamagedCache, StoreError
from cachepipe.stores.base import Claim, Commit, Discard
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import MemoryEngine

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


def drawn(request_id, namespace=None, key=KEY):
    return Draw(label(namespace), key, request_id, 0)


def claimed(draw, n=1):
    question = Question(draw.key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')
    return Claim(draw, n, question, "t")


def claim(store, *draws):
    return store.write([claimed(draw) for draw in draws])


def fill(store, draw, n=1):
    [grant] = store.write([claimed(draw, n)])
    store.write([Commit(draw.key, index, b"%d" % index, {}) for index in grant.mine])
    return grant


def payloads(grants):
    return [[sample and sample.payload for sample in grant.samples] for grant in grants]


@pytest.fixture
def engine():
    return MemoryEngine()


@pytest.fixture
def start(engine, tmp_path, monkeypatch):
    """A function that opens the store as another process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stores = []

    def begin():
        stores.append(RemoteStore(Session(engine, renews=False, sleep=lambda _: None)))
        return stores[-1]

    yield begin
    engine.before_swap = engine.after_swap = None
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    """A store whose process has made new draws, so that it guesses."""
    store = start()
    fill(store, drawn("first"), 3)
    assert store.session.guesses
    return store


def trips(engine, store, *draws):
    before = engine.trips
    grants = claim(store, *draws)
    return engine.trips - before, grants


def test_new_draws_take_one_round_trip(engine, store):
    count, grants = trips(engine, store, drawn("a", "x"), drawn("b", "x"), drawn("a", "y"))
    assert (count, payloads(grants)) == (1, [[b"0"], [b"1"], [b"0"]])
    count, grants = trips(engine, store, drawn("c", "x"))
    assert (count, payloads(grants)) == (1, [[b"2"]])
    count, [grant] = trips(engine, store, drawn("d", "x"))
    assert (count, grant.mine) == (1, [3])
    count, [grant] = trips(engine, store, drawn("a", key=OTHER))
    assert (count, grant.mine) == (1, [0]), "after a new key, the next unknown key counts as new"


def test_c3_the_same_draw_of_another_namespace_takes_one_round_trip(engine, store):
    claim(store, drawn("a", "x"), drawn("b", "x"))
    count, grants = trips(engine, store, drawn("b", "y"))
    assert (count, payloads(grants)) == (1, [[b"1"]])


def test_c1_a_guess_that_another_process_has_made_wrong_gives_no_sample_twice(engine, start, store):
    other = start()
    seen = []
    for number in range(6):
        seen += claim(store, drawn(f"a{number}", "x"))[0].indices
        seen += claim(other, drawn(f"b{number}", "x"))[0].indices
    assert sorted(seen) == [*range(12)]
    draws = [info.draw for info in store.draws() if info.draw.namespace == label("x")]
    assert len(draws) == 12


def test_c2_a_draw_that_another_process_has_made_is_not_guessed_to_be_new(start, store):
    [theirs] = claim(start(), drawn("a", "x"))
    [ours] = claim(store, drawn("a", "x"))
    assert (ours.indices, ours.shared) == (theirs.indices, True)


def test_c3_a_draw_that_another_process_has_made_in_another_namespace_is_followed(start, store):
    other = start()
    claim(other, drawn("a", "x"), drawn("b", "x"))
    assert claim(store, drawn("b", "y"))[0].indices == [1]


def test_c4_a_sample_that_another_process_has_stored_meanwhile_is_taken(start, store):
    fill(start(), drawn("theirs"))
    [grant] = claim(store, drawn("a", "x"))
    assert payloads([grant]) == [[b"0"]]
    rest = claim(store, *[drawn(f"b{number}", "x") for number in range(3)])
    assert [each for grant in rest for each in grant.mine] == []


def test_c4_a_key_that_another_process_knows_is_not_new(start, store):
    fill(start(), drawn("theirs", key=OTHER))
    [grant] = claim(store, drawn("a", "x", key=OTHER))
    assert payloads([grant]) == [[b"0"]]


def test_c12_a_sample_that_another_process_has_discarded_is_not_granted(start, store):
    start().write([Discard(KEY, 0, "it is wrong")])
    [grant] = claim(store, drawn("a", "x"))
    assert payloads([grant]) == [[b"1"]]


def test_c12_a_sample_that_is_missing_is_an_error(engine, store):
    del engine.rows[KEY][b"s/0"]
    [error] = claim(store, drawn("a", "x"))
    assert isinstance(error, DamagedCache)
    assert "missing" in str(error)


def test_c12_a_damaged_sample_is_an_error_of_its_key_only(engine, store):
    fill(store, drawn("first", key=OTHER))
    engine.rows[KEY][b"s/0"] = engine.rows[KEY][b"s/0"][:-1] + b"?"
    found = claim(store, drawn("a", "x"), drawn("a", "x", key=OTHER))
    assert isinstance(found[0], DamagedCache)
    assert payloads(found[1:]) == [[b"0"]]


def fail_once(engine, then=lambda: None):
    def lose(_swaps):
        engine.after_swap = None
        then()
        raise Unreachable("the answer was lost")

    engine.after_swap = lose


def test_a_swap_whose_answer_was_lost_brings_its_samples_when_it_is_sent_again(engine, store):
    fail_once(engine)
    count, grants = trips(engine, store, drawn("a", "x"))
    assert (count, payloads(grants)) == (2, [[b"0"]])
    assert claim(store, drawn("a", "x"))[0].indices == [0]


def test_c12_a_sample_that_is_discarded_before_a_swap_is_sent_again_is_not_granted(engine, start, store):
    other = start()
    fail_once(engine, lambda: other.write([Discard(KEY, 0, "it is wrong")]))
    [grant] = claim(store, drawn("a", "x"))
    assert payloads([grant]) == [[b"1"]]


def test_a_wrong_guess_does_not_keep_others_from_their_results(engine, start, store):
    fill(store, drawn("first", key=OTHER))
    claim(start(), drawn("a", "x", key=OTHER))
    engine.rows[OTHER][b"s/0"] = b"damaged"
    found = claim(store, drawn("a", "x"), drawn("a", "x", key=OTHER))
    assert payloads(found[:1]) == [[b"0"]]
    assert isinstance(found[1], StoreError)
