"""C11: which answer is handed over next, decided without a loop, a store or a clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.schedule import LAST, HandedOver, Place, Schedule, parse_place


def handed_over(schedule):
    """Hand everything over that is ready; return the requests in order, with the places that they note."""
    order = []
    while (one := schedule.next()) is not None:
        order.append(one)
    return order


def test_of_the_ready_answers_the_one_with_the_lowest_place_comes_first():
    schedule = Schedule()
    first, second, third = (schedule.arrive() for _ in range(3))
    schedule.ready(first, Place(9))
    schedule.ready(second, Place(4))
    schedule.ready(third, LAST)
    assert handed_over(schedule) == [
        HandedOver(second, None),
        HandedOver(first, None),
        HandedOver(third, None),
    ]


def test_ties_go_by_arrival():
    schedule = Schedule()
    first, second = schedule.arrive(), schedule.arrive()
    schedule.ready(second, Place(4))
    schedule.ready(first, Place(4))
    assert handed_over(schedule) == [HandedOver(first, None), HandedOver(second, None)]


def test_an_answer_after_one_with_a_later_place_notes_a_place_after_it():
    schedule = Schedule()
    late, early = schedule.arrive(), schedule.arrive()
    schedule.ready(early, Place(9))
    assert schedule.next() == HandedOver(early, None)
    schedule.ready(late, Place(4))
    assert schedule.next() == HandedOver(late, Place(9, 1))


def test_answers_between_an_early_place_and_its_noted_one_come_before_it():
    schedule = Schedule()
    late, early, between = (schedule.arrive() for _ in range(3))
    schedule.ready(early, Place(9))
    assert schedule.next() == HandedOver(early, None)
    schedule.ready(late, Place(4))
    schedule.ready(between, Place(9))
    assert handed_over(schedule) == [HandedOver(between, None), HandedOver(late, Place(9, 1))]


def test_a_request_that_arrived_after_a_later_place_notes_nothing():
    schedule = Schedule()
    pending, early = schedule.arrive(), schedule.arrive()
    schedule.ready(early, Place(9))
    schedule.next()
    schedule.ready(schedule.arrive(), Place(4))
    assert schedule.next().note is None
    schedule.ready(pending, Place(10))
    assert schedule.next() == HandedOver(pending, None)


def test_an_answer_without_a_place_makes_no_other_late():
    schedule = Schedule()
    failed, late = schedule.arrive(), schedule.arrive()
    schedule.ready(failed, LAST)
    schedule.next()
    schedule.ready(late, Place(4))
    assert schedule.next() == HandedOver(late, None)


def test_requests_that_leave_are_never_handed_over():
    schedule = Schedule()
    left, other = schedule.arrive(), schedule.arrive()
    schedule.ready(left, Place(1))
    schedule.leave(left)
    assert not schedule.any_ready
    schedule.ready(other, Place(2))
    assert (handed_over(schedule), schedule.in_flight) == ([HandedOver(other, None)], {})


@pytest.mark.parametrize("written", ["", "17", "17+", "+1", "-1+1", "a+b", "17+1+1"])
def test_what_is_no_place_is_refused(written):
    with pytest.raises(ValueError, match="a place is two numbers"):
        parse_place(written)


def test_a_place_is_read_as_it_was_written():
    assert parse_place(str(Place(17, 2))) == Place(17, 2)


class Program:
    """A program that asks for more whenever it gets an answer: what it asks depends on all answers so far.

    Some of its answers are stored, others are generated, and some of these are noticed late. Several
    requests may ask for the same sample.
    """

    def __init__(self, seed):
        self.seed = seed
        self.clock = 1_000
        self.places = {}  # request -> its place, as the ledger has it after the first run

    def asks(self, history):
        """Return the requests that the program makes after these answers."""
        rng = random.Random(f"{self.seed}/{history}")
        count = rng.choice([0, 1, 1, 2, 3]) if history else rng.randrange(1, 6)
        return [f"{len(history)}.{number}" for number in range(count if len(history) < 30 else 0)]

    def run(self, latency):
        """Run it; ``latency`` returns how many steps after its arrival an answer is ready."""
        schedule, steps, arrivals, due, history = Schedule(), 0, {}, [], []
        for asked in self.asks(history):
            self._arrive(asked, schedule, arrivals, due, latency(asked))
        while arrivals:
            steps += 1
            for item in list(due):
                item[0] -= 1
                if item[0] == 1 and item[1] not in self.places:  # it is stored, and noticed a step later
                    self.places[item[1]] = Place(self._stamp())
                if item[0] <= 0:
                    due.remove(item)
                    place = self.places.setdefault(item[1], Place(self._stamp()))
                    schedule.ready(
                        next(number for number, name in arrivals.items() if name == item[1]), place
                    )
            one = schedule.next()
            if one is None:
                continue
            name = arrivals.pop(one.arrival)
            if one.note is not None:
                self.places[name] = one.note
            history.append(name)
            for asked in self.asks(history):
                self._arrive(asked, schedule, arrivals, due, latency(asked))
        return history

    def _arrive(self, asked, schedule, arrivals, due, steps):
        rng = random.Random(f"{self.seed}/{asked}")
        if rng.random() < 0.3:  # stored before this run, also with stamps that are equal
            self.places.setdefault(asked, Place(rng.randrange(1, 50)))
        arrivals[schedule.arrive()] = asked
        due.append([steps, asked])

    def _stamp(self):
        self.clock += 1
        return self.clock


@given(seed=st.integers(0, 10**9))
def test_a_rerun_hands_over_the_same_answers_at_the_same_points_whatever_the_latencies(seed):
    program, rng = Program(seed), random.Random(seed)
    first = program.run(lambda _: rng.randrange(1, 9))
    places = dict(program.places)
    assert program.run(lambda _: 0) == first
    assert program.places == places  # and notes nothing
