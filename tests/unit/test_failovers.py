"""Writes that a failover has lost are noticed and written again, on an engine in memory."""

from __future__ import annotations

import warnings
import weakref
from types import SimpleNamespace

import pytest

from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.errors import FailedOver
from cachepipe.stores.base import Claim, Commit, Discard, ReleaseHold, ReleaseLease
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.recent import Recent
from cachepipe.stores.remote.session import Session, _Renewal
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.remote.verify import check
from cachepipe.testing import MemoryEngine

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine(clock):
    return MemoryEngine(clock)


@pytest.fixture
def start(engine, tmp_path, monkeypatch):
    """A function that opens the store as another process, which has looked at the server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stores = []

    def begin():
        store = RemoteStore(Session(engine, renews=False, sleep=lambda _: None))
        store.session.lease()
        store.session.watch.look(engine)
        stores.append(store)
        return store

    yield begin
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    return start()


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1_800_000_000.0

    def __call__(self):
        return self.now


def asked(key=KEY):
    return Question(key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')


def drawn(request_id="", *, namespace=None, key=KEY):
    return Draw(label(namespace), key, request_id, 0)


def claim(store, draw, n=1, token="one"):  # noqa: S107 - names a claimant
    [grant] = store.write([Claim(draw, n, asked(draw.key), token)])
    return grant


def commit(store, key, index, payload=None):
    [result] = store.write([Commit(key, index, payload or b"%d" % index, {"call": "c"})])
    return result


def fill(store, draw, n=1):
    for index in claim(store, draw, n).mine:
        commit(store, draw.key, index)
    return store.recall(draw, n)


def notice(store):
    """Do what the renewal of the lease and the writing thread do; return what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if store.session.watch.look(store.session.engine):
            store.tidy()
    assert {each.category for each in told} <= {FailedOver}
    return [str(each.message) for each in told]


def content(engine):
    """Return all rows but the count of changes."""
    return {key: {**there} for key, there in engine.rows.items()}


def test_c7_a_commit_that_was_lost_gets_its_place_again_so_that_nobody_waits_for_it(engine, start):
    store, other = start(), start()
    claim(store, drawn("a"), 2)
    claim(other, drawn("a", namespace="x"), 2)
    replica = engine.replica()
    before = commit(store, KEY, 0), commit(store, KEY, 1)
    engine.fail_over(replica)
    assert other.status([(KEY, 0), (KEY, 1)]) == ["pending"] * 2, "its generator lives"
    [told] = notice(store)
    assert "took over from another one; noticed at 2027-01-15 08:00:00 UTC" in told
    assert "stored 2 samples and 0 draws again" in told
    assert other.status([(KEY, 0), (KEY, 1)]) == ["stored"] * 2
    assert list(store.samples(KEY)) == [each.sample for each in before], "with their ids and stamps"
    assert notice(store) == [], "once per failover"


def test_c1_c2_draws_that_were_lost_with_their_samples_and_question_come_back(engine, start):
    store, other = start(), start()
    fill(store, drawn("old", key=OTHER))
    replica = engine.replica()
    fill(store, drawn("a"), 3)
    fill(store, drawn("b", namespace="x"), 1)
    fill(store, drawn("hit", namespace="x", key=OTHER))
    lost = content(engine)
    grants = [store.recall(drawn("a"), 3), store.recall(drawn("b", namespace="x"), 1)]
    engine.fail_over(replica)
    [told] = notice(store)
    assert "stored 3 samples and 3 draws again" in told
    again = [other.recall(drawn("a"), 3), other.recall(drawn("b", namespace="x"), 1)]
    assert [(one.indices, one.samples) for one in again] == [(one.indices, one.samples) for one in grants]
    assert claim(other, drawn("new", namespace="x", key=OTHER)).indices == [1], "sample 0 is taken"
    assert all(lost[key].keys() <= there.keys() for key, there in engine.rows.items())
    assert {*check(store.session).problems} <= {"question"}, "the keys are made up"


def test_a_failover_that_lost_nothing_changes_nothing_and_is_told(engine, store):
    fill(store, drawn("a"), 2)
    before = content(engine)
    engine.fail_over(engine.replica())
    [told] = notice(store)
    assert "stored 0 samples and 0 draws again" in told
    assert content(engine) == before


def test_c1_what_others_have_made_meanwhile_stays_and_the_sample_is_an_extra(engine, start):
    store, other = start(), start()
    claim(store, drawn("z"))
    replica = engine.replica()
    fill(store, drawn("a"))
    engine.fail_over(replica)
    assert claim(other, drawn("b")).mine == [1]
    commit(other, KEY, 1, b"other")
    [told] = notice(store)
    assert "stored 1 samples and 1 draws again" in told
    assert other.recall(drawn("b"), 1).samples[0].payload == b"other"
    assert store.recall(drawn("a"), 1).indices == [2]
    assert store.recall(drawn("a"), 1).samples[0].payload == b"1"
    assert {*check(store.session).problems} <= {"question"}, "the keys are made up"


def test_c2_a_draw_that_was_made_again_stays_as_it_is_and_its_lost_sample_is_kept(engine, start):
    store, other = start(), start()
    claim(store, drawn("z"))
    replica = engine.replica()
    fill(store, drawn("a"))
    engine.fail_over(replica)
    assert claim(other, drawn("a")).mine == [1]
    commit(other, KEY, 1, b"other")
    [told] = notice(store)
    assert "stored 1 samples and 0 draws again. 1 draws are lost" in told
    assert other.recall(drawn("a"), 1).samples[0].payload == b"other"
    assert [sample.payload for sample in store.samples(KEY)] == [b"other", b"1"]


def test_c2_a_draw_whose_sample_arrives_after_the_failover_comes_back_then(engine, store):
    fill(store, drawn("z"))
    replica = engine.replica()
    claim(store, drawn("a"))
    engine.fail_over(replica)
    [told] = notice(store)
    assert "stores 1 more draws as soon as their samples are there" in told
    commit(store, KEY, 1)
    assert store.recall(drawn("a"), 1) is None
    assert notice(store) == []
    assert store.recall(drawn("a"), 1).indices == [1]
    assert not store.session.watch.look(engine), "nothing is left to do"


def test_c8_a_release_that_was_lost_is_repeated(engine, start):
    store, other = start(), start()
    grant = claim(store, drawn("a"))
    replica = engine.replica()
    store.write([ReleaseLease(KEY, [0]), ReleaseHold(drawn("a"), "one", grant.held, complete=False)])
    engine.fail_over(replica)
    assert other.status([(KEY, 0)]) == ["pending"]
    notice(store)
    assert other.status([(KEY, 0)]) == ["free"]


def test_a_sample_that_was_discarded_does_not_come_back(engine, store):
    fill(store, drawn("a"), 2)
    store.write([Discard(KEY, 0, "wrong")])
    engine.fail_over(engine.replica())
    notice(store)
    assert [sample.index for sample in store.samples(KEY)] == [1]


def test_a_server_that_restarts_is_told_of_only_if_it_has_lost_something(engine, store, monkeypatch):
    servers = engine.servers
    monkeypatch.setattr(engine, "servers", lambda: [each._replace(before="") for each in servers()])
    replica = engine.replica()
    fill(store, drawn("a"))
    engine.fail_over(engine.replica())
    assert notice(store) == []
    engine.fail_over(replica)
    [told] = notice(store)
    assert "was restarted or replaced" in told


def test_a_process_that_met_no_answer_looks_at_once(engine, store):
    replica = engine.replica()
    fill(store, drawn("a"))

    def fail(_swaps):
        engine.before_swap = None
        engine.fail_over(replica)
        raise Unreachable("its server died")

    engine.before_swap = fail
    assert claim(store, drawn("b", key=OTHER)).mine == [0]
    with pytest.warns(FailedOver, match="stored 1 samples and 1 draws again"):
        store.tidy()
    assert store.recall(drawn("a"), 1) is not None


def test_a_lease_is_renewed_though_a_look_at_the_servers_fails(engine, store, monkeypatch):
    """A client of a cluster may raise anything while another thread learns of the new servers."""
    renewed = []
    monkeypatch.setattr(store.session, "renew", lambda: renewed.append(1) or True)
    monkeypatch.setattr(engine, "servers", lambda: {}["changed while it was read"])
    turns = iter([False, False, True])
    ended = SimpleNamespace(wait=lambda _: next(turns))
    _Renewal(weakref.ref(store.session), ended, 1.0)()
    assert len(renewed) == 2


def test_what_is_kept_is_bounded_in_time_and_bytes(engine, store):
    now = [0.0]
    store.session.recent = recent = Recent(seconds=30, most=100_000, clock=lambda: now[0])
    fill(store, drawn("a"))
    assert recent.pages()[KEY].rows
    now[0] = 31
    assert recent.pages() == {}
    claim(store, drawn("b"), 50)
    for index in range(1, 51):
        commit(store, KEY, index, b"x" * 10_000)
    kept = recent.pages()[KEY].rows
    assert sum(map(len, kept.values())) <= 100_000
    assert b"s/50" in kept
    assert b"s/1" not in kept
