"""The identity of a draw (C1, C2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.draws import (
    SHARED,
    Claimant,
    Draw,
    Identity,
    OneRequest,
    draw_of,
    give_back,
    label,
    namespace_of,
)


class Counter:
    """Counts in a dictionary."""

    def __init__(self):
        self.counts = {}
        self.returned = []

    def take(self, identity):
        number = self.counts.get(identity, 0)
        self.counts[identity] = number + 1
        return number

    def give_back(self, draw):
        self.returned.append(draw)


def drawn(counter, key="k", namespace="n", request_id="r", replicate=None, *, shared=False):
    return draw_of(key, Claimant(namespace, request_id, replicate), counter, shared=shared)


def test_c2_equal_requests_are_counted_and_others_are_not():
    counter = Counter()
    first, second = drawn(counter), drawn(counter)
    assert (first.occurrence, second.occurrence) == (0, 1)
    others = [
        drawn(counter, key="other"),
        drawn(counter, namespace=None),
        drawn(counter, request_id=None),
        drawn(counter, replicate=1),
    ]
    assert [draw.occurrence for draw in others] == [0, 0, 0, 0]
    assert len({first, second, *others}) == 6


@pytest.mark.parametrize(("one", "other"), [(3, "3"), (0, "0"), (-1, "-1")])
def test_c1_a_number_and_its_text_are_one_replicate(one, other):
    counter = Counter()
    assert drawn(counter, replicate=one).identity == drawn(counter, replicate=other).identity


def test_c1_none_is_a_replicate_of_its_own():
    counter = Counter()
    replicates = [None, "", "None", "-", 0]
    assert len({drawn(counter, replicate=replicate).identity for replicate in replicates}) == 5


def test_a_missing_request_id_is_the_empty_string():
    counter = Counter()
    assert drawn(counter, request_id=None).identity == drawn(counter, request_id="").identity


def test_c1_a_shared_draw_is_one_per_key_and_counts_nothing():
    counter = Counter()
    draws = {drawn(counter, namespace=name, replicate=name, shared=True) for name in ("a", "b")}
    assert draws == {Draw(SHARED, "k", "", 0)}
    assert draws.pop().shared
    assert counter.counts == {}


def test_c8_the_number_of_a_draw_is_given_back_and_a_shared_draw_has_none():
    counter = Counter()
    draw = drawn(counter, replicate=2)
    give_back(draw, counter)
    give_back(drawn(counter, shared=True), counter)
    assert counter.returned == [draw]
    assert draw.identity == Identity("=n", "k", "r", "=2")


@given(st.none() | st.text())
def test_a_label_stands_for_one_namespace(namespace):
    assert namespace_of(label(namespace)) == namespace
    assert label(namespace) != SHARED


@given(st.none() | st.text(), st.none() | st.text())
def test_two_namespaces_have_two_labels(first, second):
    assert (label(first) == label(second)) == (first == second)


def test_c8_one_request_gives_each_of_its_numbers_back_once():
    counter = Counter()
    one = OneRequest(counter)
    first, second = drawn(one), drawn(one, key="other")
    give_back(first, one)
    one.left()
    give_back(first, one)
    give_back(second, one)
    assert counter.returned == [first, second]
