"""Which indices a draw gets, against plain sets and lists (C1 to C4)."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import sized

from cachepipe.contract.allotment import (
    DISCARDED,
    Segment,
    added,
    allot,
    choose,
    first,
    laid,
    lowest_listed_free,
    lowest_new,
    noted_place,
)
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.schedule import Place

indices = st.integers(0, 24)
sets = st.sets(indices)


def interval_set(numbers):
    made = IntervalSet()
    for number in numbers:
        made.add(number)
    return made


def chosen(listed, taken, preferred, *, new=False):
    return choose(interval_set(listed), interval_set(taken), preferred, new=new)


class Taken(IntervalSet):
    """Records what is taken, once each."""

    def __init__(self, intervals):
        super().__init__(intervals)
        self.took = []

    def add(self, index):
        assert index not in self
        self.took.append(index)
        super().add(index)


@dataclass
class KeyView:
    """A key in memory: ``states`` says of each listed index whether it is stored, discarded or pending."""

    states: dict[int, str] = field(default_factory=dict)
    taken_before: set[int] = field(default_factory=set)
    follows: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.listed = interval_set(self.states)
        self.taken = Taken(interval_set(self.taken_before))
        self.took = self.taken.took
        self.leased = []

    def others(self):
        return [Segment(0, 0, self.follows, 1, None, 1)]

    def sample(self, index):
        return {"stored": f"sample {index}", "discarded": DISCARDED}.get(self.states.get(index))

    def lease(self, index):
        if self.states.get(index) == "pending":
            return False
        self.states[index] = "pending"
        self.listed.add(index)
        self.leased.append(index)
        return True


@given(sets, sets)
def test_the_lowest_listed_free_index(listed, taken):
    found = lowest_listed_free(interval_set(listed), interval_set(taken))
    assert found == min(listed - taken, default=None)


@given(sets, sets)
def test_the_lowest_new_index(listed, taken):
    assert lowest_new(interval_set(listed), interval_set(taken)) == min(set(range(60)) - listed - taken)


@settings(max_examples=sized(100, 300))
@given(st.sets(indices, min_size=3), sets, st.none() | indices, st.booleans())
@example({0, 1, 2}, {0}, 2, False)
@example({0, 1, 2}, {2}, 2, False)
@example({0}, {0}, 2, False)
def test_what_a_position_gets(listed, taken, preferred, new):
    """C3 and C4: the coupled sample, else the lowest free one, else one to generate."""
    free = listed - taken
    if new:
        expected = min(set(range(60)) - listed - taken)
    elif preferred in free:
        expected = preferred
    elif free:
        expected = min(free)
    elif preferred is not None and preferred not in taken:
        expected = preferred
    else:
        expected = min(set(range(60)) - listed - taken)
    assert chosen(listed, taken, preferred, new=new) == expected


@given(sets, sets, st.none() | indices, st.booleans())
def test_nothing_that_is_taken_is_ever_given(listed, taken, preferred, new):
    """C1."""
    assert chosen(listed, taken, preferred, new=new) not in taken


@given(sets, sets, st.none() | indices)
def test_nothing_is_generated_while_a_listed_sample_is_free(listed, taken, preferred):
    """C4."""
    assert (chosen(listed, taken, preferred) in listed) == bool(listed - taken)


books = st.builds(
    KeyView,
    st.dictionaries(indices, st.sampled_from(["stored", "stored", "discarded", "pending"]), max_size=12),
    sets,
    st.lists(indices, unique=True, max_size=4),
)


@given(books, st.integers(1, 6), st.booleans(), st.booleans())
def test_c1_a_new_draw_gets_distinct_indices_that_were_free_and_takes_them(view, n, refresh, couple):
    before = {index for index in range(60) if index in view.taken}
    states = dict(view.states)
    got = allot(view, [], n, refresh=refresh, couple=couple)
    assert len(set(got.indices)) == len(got.samples) == n
    assert before.isdisjoint(got.indices)
    assert set(got.indices) <= set(view.took)
    assert (got.kept, got.replaced) == (0, [])
    for index, sample in zip(got.indices, got.samples, strict=True):
        assert (sample is not None) == (states.get(index) == "stored" and not refresh)
    assert got.to_generate == [index for index in got.indices if index not in states] == view.leased


@given(books, st.integers(1, 6))
def test_c4_nothing_is_generated_while_the_list_has_free_samples(view, n):
    free = [index for index, state in view.states.items() if state != "discarded" and index not in view.taken]
    got = allot(view, [], n)
    assert len(got.to_generate) == max(0, n - len(free))


@given(books, st.integers(1, 6))
def test_c3_a_new_draw_follows_the_earliest_namespace_where_its_samples_are_free(view, n):
    states, taken = dict(view.states), set(view.taken_before)
    got = allot(view, [], n)
    given_before = set()
    for position, index in enumerate(got.indices):
        if position < len(view.follows):
            preferred = view.follows[position]
            usable = states.get(preferred) in ("stored", "pending")
            if usable and preferred not in taken and preferred not in given_before:
                assert index == preferred
        given_before.add(index)


@given(books, st.lists(indices, unique=True, min_size=1, max_size=4), st.integers(1, 6))
def test_c2_a_draw_keeps_what_the_ledger_holds_but_discarded_samples(view, held, n):
    for index in held:
        view.states.setdefault(index, "stored")
        view.listed.add(index)
        IntervalSet.add(view.taken, index)  # held from before
    states = dict(view.states)
    got = allot(view, held, n)
    assert got.kept == min(n, len(held))
    for position, index in enumerate(held[:n]):
        assert (position in got.replaced) == (states[index] == "discarded")
        assert (got.indices[position] == index) == (states[index] != "discarded")


@given(books, st.lists(indices, unique=True, max_size=3), st.integers(1, 5))
def test_a_replay_gives_what_a_claim_would_or_nothing(view, held, n):
    """Modes: a pending sample or a partial hit is a miss."""
    for index in held:
        view.states.setdefault(index, "stored")
        view.listed.add(index)
        IntervalSet.add(view.taken, index)  # held from before
    twin = KeyView(dict(view.states), {index for index in range(60) if index in view.taken}, view.follows)
    replayed = allot(twin, held, n, stored_only=True)
    claimed = allot(view, held, n)
    if None in claimed.samples:
        assert replayed is None
        assert twin.leased == []
    else:
        assert replayed == claimed


def test_a_refresh_leaves_what_is_listed_and_replaces_the_whole_draw():
    view = KeyView({0: "stored", 1: "stored", 2: "pending"}, {0, 1})
    got = allot(view, [0, 1], 1, refresh=True)
    assert (got.indices, got.to_generate, got.kept) == ([3], [3], 0)
    assert added(got, 1, 2, refresh=True) == [(0, [3]), (1, [])]


def test_what_a_claim_adds_is_what_it_replaced_and_what_lies_beyond():
    view = KeyView({0: "discarded", 1: "stored"}, {0, 1})
    got = allot(view, [0, 1], 4)
    assert got.indices == [2, 1, 3, 4]
    assert added(got, 4, 2, refresh=False) == [(0, [2]), (2, [3, 4])]
    assert added(allot(KeyView({0: "stored"}, {0}), [0], 1), 1, 1, refresh=False) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(indices, min_size=1, max_size=4)), max_size=6))
def test_later_parts_lie_over_earlier_ones(parts):
    positions = {}
    length = 0
    for start, given_there in parts:
        if start > length:
            continue
        positions.update(enumerate(given_there, start))
        length = max(length, start + len(given_there))
    assert laid(parts) == [positions[place] for place in range(length)]


def test_a_draw_whose_sample_was_replaced():
    assert laid([(0, [0, 1, 2]), (3, [3]), (1, [7])]) == [0, 7, 2, 3]
    assert laid([(0, [0, 1]), (0, [2]), (1, [])]) == [2]
    assert laid([]) == []


@given(st.integers(1, 6), st.booleans(), st.booleans())
def test_c3_the_first_draw_of_a_key_gets_what_an_empty_list_gives(n, refresh, couple):
    assert first(n) == allot(KeyView(), [], n, refresh=refresh, couple=couple).to_generate


def test_c11_a_coupled_draw_inherits_the_place_that_the_other_has_noted():
    view = KeyView(states={0: "stored", 1: "stored"}, follows=[1])
    view.others = lambda: [Segment(0, 0, [1], 1, None, 1, place=Place(7, 1))]
    assert allot(view, [], 1).place == Place(7, 1)


def test_c11_a_draw_that_gets_another_sample_inherits_no_place():
    view = KeyView(states={0: "stored", 1: "stored"}, taken_before={1})
    view.others = lambda: [Segment(0, 0, [1], 1, None, 1, place=Place(7, 1))]
    assert allot(view, [], 1).place is None


def test_c11_the_latest_place_that_a_part_of_the_draw_has_noted_counts():
    parts = [
        Segment(0, 0, [0], 1, None, 1, place=Place(7, 1)),
        Segment(1, 1, [1], 1, None, 2),
        Segment(2, 2, [2], 1, None, 3, place=Place(9, 1)),
    ]
    assert [noted_place(parts, n) for n in (0, 1, 2, 3)] == [None, Place(7, 1), Place(7, 1), Place(9, 1)]
