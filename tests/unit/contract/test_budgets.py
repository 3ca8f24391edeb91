"""A purse: what was spent and reserved never exceeds a budget, whatever the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.budgets import Purse, nanos

calls = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50), st.floats(0, 1)), max_size=40)


def test_amounts_are_rounded_up():
    assert (nanos(0), nanos(1e-10), nanos(1.5)) == (0, 1, 1_500_000_000)


@given(calls, st.integers(0, 200), st.randoms(use_true_random=False))
def test_c6_spent_and_reserved_stay_within_the_budget(calls, limit, random):
    purse, flying = Purse(), []
    for lease, amount, share in calls:
        if purse.reserve(lease, amount, limit):
            flying.append((lease, amount, int(amount * share)))
        assert purse.spent + purse.reserved <= limit
        if flying and random.random() < 0.5:
            purse.settle(*flying.pop(random.randrange(len(flying))))
    for call in flying:
        purse.settle(*call)
    assert purse.reserved == 0
    assert purse.spent <= limit


def test_a_sum_of_the_rows_lowers_what_is_spent_only_where_nobody_else_spends():
    purse = Purse(summed=50, settled=10)
    purse.sum_up(20, alone=False)
    assert purse.spent == 60
    purse.sum_up(70, alone=False)
    assert purse.spent == 80
    purse.sum_up(20, alone=True)
    assert purse.spent == 30
