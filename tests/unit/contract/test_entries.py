"""What a cache adds of another cache's entry: ids, indices and draws (C1, C2)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import (
    Entry,
    EntrySample,
    EntrySegment,
    addition,
    joined,
    ordered,
)
from cachepipe.contract.intervals import IntervalSet

KEY = "k2-" + "a" * 64


def sample(name, origin, payload=b"1"):
    return EntrySample(name, origin, b'{"id":"%b","stamp":1}' % name.encode(), payload, None, origin)


def draw(namespace="=run", request_id=""):
    return Draw(namespace, KEY, request_id, 0)


def entry(samples, draws, *, used=None):
    """An entry with samples by id and origin, and draws with lists of ids for each segment."""
    made = {
        who: [
            EntrySegment(position, tuple(ids), 10 + at, 0, None, at)
            for at, (position, ids) in enumerate(parts)
        ]
        for who, parts in draws.items()
    }
    found = ordered(sample(name, origin) for name, origin in samples.items())
    indices = IntervalSet()
    for each in found:
        indices.add(each.index)
    for index in used or ():
        indices.add(index)
    return Entry(KEY, "s", b"{}", found, dict(sorted(made.items())), [], indices)


def indices(add):
    return {each.id: index for index, each in add.samples}


def drawn(found):
    """The ids of each draw by position."""
    held = {}
    for who, segments in found.draws.items():
        ids = []
        for segment in segments:
            ids[segment.position : segment.position + len(segment.samples)] = segment.samples
        held[who] = ids
    return held


def test_a_new_question_keeps_its_indices():
    add = addition(None, entry({"a": 0, "b": 3}, {draw(): [(0, ["a", "b"])]}))
    assert indices(add) == {"a": 0, "b": 3}
    [(who, [(segment, _)])] = add.segments
    assert (who, segment.indices, segment.standing) == (draw(), [0, 3], 2)


def test_nothing_is_renumbered_if_two_caches_generated_the_same_index():
    ours = entry({"a": 0, "b": 1}, {draw(): [(0, ["a", "b"])]})
    add = addition(ours, entry({"x": 0, "y": 1}, {draw("=other"): [(0, ["x", "y"])]}))
    assert indices(add) == {"x": 2, "y": 3}


def test_c1_a_sample_gets_no_index_that_a_draw_still_waits_for():
    ours = entry({}, {draw(): [(0, [None])]}, used=[0])
    assert indices(addition(ours, entry({"x": 0}, {}))) == {"x": 1}


def test_what_is_the_same_adds_nothing():
    both = entry({"a": 0}, {draw(): [(0, ["a"])]})
    add = addition(both, both)
    assert (add.samples, add.segments, add.refused) == ([], [], False)


def test_c2_a_longer_draw_continues_a_shorter_one_either_way():
    short = entry({"a": 0}, {draw(): [(0, ["a"])]})
    long = entry({"a": 0, "b": 1}, {draw(): [(0, ["a"]), (1, ["b"])]})
    assert drawn(joined(short, long)) == drawn(joined(long, short)) == {draw(): ["a", "b"]}


def test_c2_a_sample_that_was_replaced_on_record_stays_replaced():
    before = entry({"a": 0}, {draw(): [(0, ["a"])]})
    after = entry({"a": 0, "b": 1}, {draw(): [(0, ["a"]), (0, ["b"])]})
    assert drawn(joined(before, after)) == drawn(joined(after, before)) == {draw(): ["b"]}


def test_c2_draws_that_got_other_samples_are_different():
    ours, theirs = (entry({name: 0}, {draw(): [(0, [name])]}) for name in "ab")
    assert addition(ours, theirs).different == [draw()]
    assert joined(ours, theirs) is None


def test_c1_a_sample_that_another_draw_of_the_namespace_has_is_different():
    ours = entry({"a": 0, "b": 1}, {draw(): [(0, ["a"])], draw(request_id="2"): [(0, ["b"])]})
    theirs = entry({"a": 0, "b": 1}, {draw(): [(0, ["a"]), (1, ["b"])]})
    assert addition(ours, theirs).different == [draw()]


def test_a_sample_that_a_killed_process_did_not_store_is_added():
    ours = entry({}, {draw(): [(0, [None])]}, used=[0])
    found = joined(ours, entry({"a": 0}, {draw(): [(0, ["a"])]}))
    assert drawn(found) == {draw(): ["a"]}


def test_an_answer_that_differs_under_one_id_is_refused():
    ours, theirs = entry({"a": 0}, {}), entry({}, {})
    theirs.samples = [sample("a", 0, b"2")]
    assert addition(ours, theirs).altered == ["a"]


# A world of caches: one history of draws, of which each cache has seen a part.

NAMES = "abcdefgh"


@st.composite
def caches(draws):
    """Two caches with parts of one history, in which no draw has two answers."""
    ids = draws(st.permutations(NAMES))
    history = {}
    for namespace in ("=r1", "=r2"):
        free = list(ids)
        for request_id in "xyz"[: draws(st.integers(1, 3))]:
            count = draws(st.integers(1, 2))
            history[draw(namespace, request_id)], free = free[:count], free[count:]
    made = []
    for _ in range(2):
        held = {}
        for who, names in history.items():
            length = draws(st.integers(0, len(names)))
            if length:
                held[who] = [(at, [name]) for at, name in enumerate(names[:length])]
        known = {name for parts in held.values() for _, part in parts for name in part}
        made.append(entry({name: NAMES.index(name) // 2 for name in known}, held))
        for at, each in enumerate(made[-1].samples):  # each cache has its own indices
            made[-1].samples[at] = each._replace(index=at)
        made[-1].used = IntervalSet([(0, len(known))] if known else [])
    return made


@given(caches())
def test_c1_and_c2_hold_in_a_joined_cache_whichever_comes_first(both):
    one, other = both
    found, reverse = joined(one, other), joined(other, one)
    assert drawn(found) == drawn(reverse)
    for part in both:
        for who, ids in drawn(part).items():
            assert drawn(found)[who][: len(ids)] == ids
    for namespace in ("=r1", "=r2"):
        given_out = [name for who, ids in drawn(found).items() if who.namespace == namespace for name in ids]
        assert len({*given_out}) == len(given_out)
    places = [each.index for each in found.samples]
    assert len({*places}) == len(places)
    assert {each.id: each.index for each in one.samples}.items() <= {
        e.id: e.index for e in found.samples
    }.items()


@given(caches())
def test_joining_again_changes_nothing(both):
    one, other = both
    found = joined(one, other)
    for part in both:
        add = addition(found, part)
        assert (add.samples, add.segments, add.refused) == ([], [], False)


@given(caches())
def test_what_is_handed_on_does_not_depend_on_the_order(both):
    def handed_on(found):
        part = found.sliced()
        return part and (
            [each._replace(index=0) for each in part.samples],
            {who: [each._replace(number=0) for each in segments] for who, segments in part.draws.items()},
        )

    one, other = both
    assert handed_on(joined(one, other)) == handed_on(joined(other, one))
