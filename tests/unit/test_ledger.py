"""Which indices a draw gets, against plain sets."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachepipe.ledger import (
    LISTED,
    SHARED,
    Runs,
    choose,
    is_in,
    label,
    laid,
    lowest_listed_free,
    lowest_new,
    merged,
    namespace_of,
    settled,
    split,
)

indices = st.integers(0, 24)
sets = st.sets(indices)
US = 1


def runs_of(numbers):
    """Return maximal runs of a set, found the slow way."""
    found = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


class Book:
    """A book over plain sets."""

    def __init__(self, listed, taken):
        self.sets = {LISTED: listed, US: taken}

    def run_at(self, owner, at):
        return next((run for run in runs_of(self.sets[owner]) if run[1] > at), None)


def all_of(runs):
    found, at = [], 0
    while (run := runs.run_at(at)) is not None:
        found.append(run)
        at = run[1]
    return found


@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), indices), max_size=60))
def test_runs_are_a_set(changes):
    runs, numbers = Runs(), set()
    for change, index in changes:
        getattr(runs, change)(index)
        (numbers.add if change == "add" else numbers.discard)(index)
        assert all_of(runs) == runs_of(numbers)
        for at in range(26):
            assert runs.run_at(at) == Book(numbers, ()).run_at(LISTED, at)


@given(sets, sets)
def test_the_lowest_listed_free_index(listed, taken):
    assert lowest_listed_free(Book(listed, taken), US) == min(listed - taken, default=None)


@given(sets, sets)
def test_the_lowest_new_index(listed, taken):
    assert lowest_new(Book(listed, taken), US) == min(set(range(60)) - listed - taken)


@given(sets, indices)
def test_being_in_a_set(listed, index):
    assert is_in(Book(listed, set()), LISTED, index) == (index in listed)


@settings(max_examples=300)
@given(st.sets(indices, min_size=3), sets, st.none() | indices, st.booleans())
@example({0, 1, 2}, {0}, 2, False)
@example({0, 1, 2}, {2}, 2, False)
@example({0}, {0}, 2, False)
def test_what_a_position_gets(listed, taken, coupled, new):
    """C3 and C4: the coupled sample, else the lowest free one, else one to generate."""
    free = listed - taken
    if new:
        expected = min(set(range(60)) - listed - taken)
    elif coupled in free:
        expected = coupled
    elif free:
        expected = min(free)
    elif coupled is not None and coupled not in taken:
        expected = coupled
    else:
        expected = min(set(range(60)) - listed - taken)
    assert choose(Book(listed, taken), US, coupled, new=new) == expected


@given(sets, sets, st.none() | indices, st.booleans())
def test_nothing_that_is_taken_is_ever_given(listed, taken, coupled, new):
    """C1."""
    assert choose(Book(listed, taken), US, coupled, new=new) not in taken


@given(sets, sets, st.none() | indices)
def test_nothing_is_generated_while_a_listed_sample_is_free(listed, taken, coupled):
    """C4."""
    assert (choose(Book(listed, taken), US, coupled) in listed) == bool(listed - taken)


@given(sets, indices)
def test_merging_an_index_into_runs(numbers, index):
    numbers.discard(index)
    near = [run for run in runs_of(numbers) if run[1] == index or run[0] == index + 1]
    gone, run = merged(near, index)
    assert sorted({*runs_of(numbers)} - {*gone} | {run}) == runs_of(numbers | {index})


@given(sets, indices)
def test_runs_that_do_not_touch_the_index_are_left_alone(numbers, index):
    numbers.discard(index)
    gone, run = merged(runs_of(numbers), index)
    assert sorted({*runs_of(numbers)} - {*gone} | {run}) == runs_of(numbers | {index})


@given(st.integers(0, 9), st.integers(1, 9), st.data())
def test_splitting_a_run(start, length, data):
    run = (start, start + length)
    index = data.draw(st.integers(run[0], run[1] - 1))
    assert split(run, index) == runs_of({*range(*run)} - {index})


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(indices, min_size=1, max_size=4)), max_size=6))
def test_later_segments_lie_over_earlier_ones(segments):
    positions = {}
    length = 0
    for start, chosen in segments:
        if start > length:
            continue
        positions.update(enumerate(chosen, start))
        length = max(length, start + len(chosen))
    assert laid(segments) == [positions[place] for place in range(length)]


def test_a_draw_whose_sample_was_replaced():
    assert laid([(0, [0, 1, 2]), (3, [3]), (1, [7])]) == [0, 7, 2, 3]
    assert laid([]) == []


@given(st.lists(st.lists(st.lists(indices, max_size=3), min_size=1, max_size=3), max_size=5), sets)
def test_what_a_claim_added_is_settled_when_all_of_it_and_all_before_it_is_stored(claims, missing):
    """C8: there is no part of a claim that stands while another part of it is undone."""
    parts = [(name, part) for name, claim in enumerate(claims) for part in claim]
    whole = [missing.isdisjoint(index for part in claim for index in part) for claim in claims]
    first = whole.index(False) if False in whole else len(claims)
    assert settled(parts, missing.__contains__) == sum(len(claim) for claim in claims[:first])


@given(st.none() | st.text())
def test_a_label_stands_for_one_namespace(namespace):
    assert namespace_of(label(namespace)) == namespace
    assert label(namespace) != SHARED


@given(st.none() | st.text(), st.none() | st.text())
def test_two_namespaces_have_two_labels(first, second):
    assert (label(first) == label(second)) == (first == second)
