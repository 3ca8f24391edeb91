"""How demands become calls, and what short and refused calls teach (C4, C8)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.demands import PATIENCE, Limit, answered, cut, repeats


@dataclass(frozen=True)
class Demand:
    name: int
    slots: tuple[int, ...]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def demands(wanted):
    return [Demand(name, tuple(range(size))) for name, size in enumerate(wanted)]


def covered(pieces):
    return [(demand.name, slot) for demand, slots in pieces for slot in slots]


@given(sizes, st.none() | st.integers(1, 12))
def test_c4_calls_ask_for_everything_once_in_order_in_as_few_calls_as_the_limit_allows(wanted, limit):
    calls = cut(demands(wanted), limit)
    assert [place for call in calls for place in covered(call)] == [
        (name, slot) for name, size in enumerate(wanted) for slot in range(size)
    ]
    total = sum(wanted)
    assert len(calls) == (1 if limit is None else -(-total // limit))
    assert all(len(covered(call)) <= (limit or total) for call in calls)


@given(sizes, st.integers(0, 60))
def test_c5_samples_go_to_slots_in_the_order_in_which_they_were_bound(wanted, brought):
    pieces = [(demand, demand.slots) for demand in demands(wanted)]
    then = answered(pieces, brought, 0)
    assert sum(then.given) + then.extra == brought
    got = [
        (demand.name, slot)
        for (demand, slots), count in zip(pieces, then.given, strict=True)
        for slot in slots[:count]
    ]
    assert got == covered(pieces)[:brought]
    assert covered(then.missing) == covered(pieces)[brought:]


@given(sizes, st.integers(0, 60))
def test_c4_a_merged_call_that_is_answered_short_is_repeated_as_its_callers_wrote_it(wanted, brought):
    pieces = [(demand, demand.slots) for demand in demands(wanted)]
    then = answered(pieces, brought, PATIENCE)
    short = brought < sum(wanted)
    assert then.separately == (short and len(wanted) > 1)
    assert then.limit == (max(brought, *wanted) if then.separately else None)
    assert not (then.separately and then.gives_up)


def test_c8_a_model_is_given_up_when_three_calls_in_a_row_bring_nothing():
    pieces = [(Demand(0, (0, 1)), (0, 1))]
    assert [answered(pieces, 0, empty).gives_up for empty in range(3)] == [False, False, True]
    assert not answered(pieces, 1, 2).gives_up
    assert answered(pieces, 2, 2).missing == ()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_c4_a_merged_call_that_is_refused_is_repeated(status):
    merged = [(demand, demand.slots) for demand in demands([1, 1])]
    assert repeats(merged, timed_out=False, status=status)
    assert repeats(merged, timed_out=True, status=None)
    assert not repeats(merged[:1], timed_out=True, status=status)


@pytest.mark.parametrize("status", [None, 200, 401, 404, 429, 500, "400"])
def test_c8_other_failures_are_their_callers_own(status):
    merged = [(demand, demand.slots) for demand in demands([1, 1])]
    assert not repeats(merged, timed_out=False, status=status)


def test_c4_what_calls_teach_lowers_the_limit_of_mergeable_demands_only():
    limit = Limit(None)
    assert (limit.of(None), limit.of(8)) == (None, 8)
    limit.lower(5)
    limit.lower(7)
    assert (limit.of(None), limit.of(8), limit.of(3)) == (5, 5, 3)
    assert limit.of(8, mergeable=False) == 8
    assert Limit(2).of(None) == 2
