"""Sets of indices as intervals, against plain sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.intervals import IntervalSet, Union, changes, covered, merged, split

indices = st.integers(0, 24)
sets = st.sets(indices)


def intervals_of(numbers):
    """Return the maximal intervals of a set, found the slow way."""
    found = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def interval_at(numbers, at):
    return next((interval for interval in intervals_of(numbers) if interval[1] > at), None)


@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), indices), max_size=60))
def test_an_interval_set_is_a_set(changes):
    tested, numbers = IntervalSet(), set()
    for change, index in changes:
        getattr(tested, change)(index)
        (numbers.add if change == "add" else numbers.discard)(index)
        assert list(tested) == intervals_of(numbers)
        assert len(tested) == len(intervals_of(numbers))
        for at in range(26):
            assert tested.interval_at(at) == interval_at(numbers, at)
            assert (at in tested) == (at in numbers)


@given(sets)
def test_an_interval_set_is_made_of_its_intervals_again(numbers):
    assert list(IntervalSet(IntervalSet(intervals_of(numbers)))) == intervals_of(numbers)


@given(sets, sets)
def test_a_union_holds_what_either_set_holds(one, other):
    union = Union(IntervalSet(intervals_of(one)), IntervalSet(intervals_of(other)))
    found, at = set(), 0
    while (interval := union.interval_at(at)) is not None:
        found.update(range(max(at, interval[0]), interval[1]))
        at = interval[1]
    assert found == one | other == {index for index in range(26) if index in union}


@given(sets, indices)
def test_merging_an_index_into_intervals(numbers, index):
    numbers.discard(index)
    near = [one for one in intervals_of(numbers) if one[1] == index or one[0] == index + 1]
    gone, interval = merged(near, index)
    assert sorted({*intervals_of(numbers)} - {*gone} | {interval}) == intervals_of(numbers | {index})


@given(sets, indices)
def test_intervals_that_do_not_touch_the_index_are_left_alone(numbers, index):
    numbers.discard(index)
    gone, interval = merged(intervals_of(numbers), index)
    assert sorted({*intervals_of(numbers)} - {*gone} | {interval}) == intervals_of(numbers | {index})


@given(st.integers(0, 9), st.integers(1, 9), st.data())
def test_splitting_an_interval(start, length, data):
    interval = (start, start + length)
    index = data.draw(st.integers(interval[0], interval[1] - 1))
    assert split(interval, index) == intervals_of({*range(*interval)} - {index})


@given(sets, sets)
def test_changes_are_what_one_set_has_and_the_other_has_not(old, new):
    old, new = intervals_of(old), intervals_of(new)
    gone, added = changes(old, new)
    assert gone == [interval for interval in old if interval not in new]
    assert added == [interval for interval in new if interval not in old]


class Counted(tuple):
    """An interval that counts how often it is compared with another one."""

    compared = 0
    __slots__ = ()

    def __eq__(self, other):
        Counted.compared += 1
        return tuple.__eq__(self, other)

    __hash__ = tuple.__hash__


def test_changes_of_large_sets_compare_each_interval_a_few_times():
    old = [Counted((2 * at, 2 * at + 1)) for at in range(2000)]
    new = [Counted((2 * at, 2 * at + 1)) for at in range(1000, 3000)]
    Counted.compared = 0
    gone, added = changes(old, new)
    assert (gone, added) == (old[:1000], new[1000:])
    assert Counted.compared < 20 * 2000


@given(st.lists(st.tuples(indices, indices)))
def test_intervals_that_overlap_cover_what_each_of_them_has(pairs):
    intervals = sorted((min(pair), max(pair) + 1) for pair in pairs)
    numbers = {number for start, stop in intervals for number in range(start, stop)}
    assert list(covered(intervals)) == intervals_of(numbers)
