"""Quotas hold in every interval, wherever it begins, as the provider sees it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.flow.windows import Window


def most_within(moments, interval):
    """The largest sum of amounts of (time, amount) pairs within any half-open interval."""
    moments = sorted(moments)
    return max(
        sum(amount for when, amount in moments if begin <= when < begin + interval) for begin, _ in moments
    )


calls = st.lists(
    st.tuples(
        st.integers(0, 40),  # since the call before it was asked for
        st.integers(0, 30),  # how long it takes
        st.floats(0, 1),  # when in that time it arrives
        st.integers(1, 5),  # what it uses
    ),
    min_size=1,
    max_size=60,
)


@given(calls, st.integers(1, 7), st.integers(1, 50))
def test_no_interval_holds_more_than_the_quota_wherever_in_a_call_the_request_arrives(calls, limit, interval):
    window = Window(limit, interval)
    now, running, arrived = 0.0, [], []
    for pause, takes, share, amount in calls:
        now += pause
        while True:
            for end, use in [(end, use) for end, use in running if end <= now]:
                window.expire(use, end + interval)
                running.remove((end, use))
            wait = window.wait(amount, now)
            if not wait:
                break
            now = min(now + wait, min((end for end, _ in running), default=math.inf))
        running.append((now + takes, window.take(amount)))
        arrived.append((now + takes * share, min(amount, limit)))
    assert most_within(arrived, interval) <= limit


def test_a_use_ends_an_interval_after_its_call_or_after_the_time_a_request_may_be_on_its_way():
    window = Window(1, 10)
    use = window.take(1)
    assert window.wait(1, 3) == math.inf  # nothing tells when
    window.expire(use, 12)
    assert window.wait(1, 4) == 8
    window.expire(use, 11)
    window.expire(use, 99)  # what is certain already stays so
    assert window.wait(1, 4) == 7
    assert window.wait(1, 11) == 0
    assert window.used == 0


def test_what_was_used_is_put_right_and_given_back():
    window = Window(100, 60)
    one, other = window.take(30), window.take(50)
    assert window.wait(21, 0) > 0
    window.correct(one, 10)
    assert window.wait(40, 0) == 0
    window.correct(one, 90)  # more than was thought, and more than the quota
    assert window.used == 140
    assert window.wait(1, 0) > 0
    window.give_back(other)
    window.give_back(other)
    assert window.used == 90


def test_a_use_of_more_than_the_quota_goes_alone():
    window = Window(10, 1)
    use = window.take(5)
    assert window.wait(1000, 0) > 0
    window.give_back(use)
    assert window.wait(1000, 0) == 0
    window.take(1000)
    assert window.wait(1, 0) > 0


def test_its_repr_shows_its_state():
    window = Window(10, 60)
    window.take(3)
    assert repr(window) == "<Window 3 of 10 in 60 s>"


@pytest.mark.parametrize("size", [10, 5000])
def test_asking_costs_the_same_however_much_was_used(size):
    window = Window(size, 1)
    for number in range(size):
        window.expire(window.take(1), number)
    assert window.wait(1, -1) == 1  # looked up, not searched
    assert window.wait(size, size) == 0
    assert window._heap == []


def test_what_is_rounded_off_does_not_add_up():
    window = Window(0.3, 1)
    for _ in range(3):
        window.expire(window.take(0.1), 1)
    assert window.wait(0.3, 1) == 0
    assert window.used == 0
