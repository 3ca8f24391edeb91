"""A purse: what was spent and reserved never exceeds a budget, whatever the order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.budgets import Purse, nanos
from cachepipe.stores.tables import dump_purse, load_purse

LIMIT = 100
STEPS = ["reserve", "reserve", "store", "settle", "begin", "end", "kill"]
steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 60)), min_size=60, max_size=200)


class World:
    """What is true: processes, calls in flight, the stored rows; and the purse."""

    def __init__(self):
        self.purse = Purse()
        self.alive = {1, 2, 3}
        self.flying = {}  # by call: its process, its amount, and whether its row is stored
        self.rows = {}  # by call: what it has cost
        self.sums = {}  # by name: its process, the calls to tell apart, those that have ended, the rows seen
        self.number = 0

    @property
    def spent(self):
        return sum(self.rows.values())

    def lost(self):
        return self.purse.of_dead(self.alive.__contains__)

    def reserve(self, amount):
        self.number += 1
        call, process = f"call {self.number}", sorted(self.alive)[amount % len(self.alive)]
        if not self.lost() and self.purse.reserve(call, process, amount, LIMIT):
            self.flying[call] = (process, amount)

    def _some(self, among, number):
        return sorted(among)[number % len(among)] if among else None

    def store(self, number):
        call = self._some(self.flying.keys() - self.rows.keys(), number)
        if call is not None:
            self.rows[call] = self.flying[call][1] * number // 60

    def settle(self, number):
        call = self._some(self.flying.keys() & self.rows.keys(), number)
        if call is not None:
            del self.flying[call]
            self.purse.settle(call, self.rows[call])

    def begin(self, number):
        self.number += 1
        name, process = f"sum {self.number}", sorted(self.alive)[number % len(self.alive)]
        ended = self.lost()
        apart = {*self.purse.begin_sum(name, process)}
        self.sums[name] = (process, apart, ended, {*self.rows} if number % 2 else None)

    def end(self, number):
        name = self._some(self.sums, number)
        if name is None:
            return
        process, apart, ended, seen = self.sums.pop(name)
        rows = self.rows if seen is None else {call: self.rows[call] for call in seen}
        before = {
            call: cost for call, cost in rows.items() if call not in apart and not self._later(call, name)
        }
        told = [((call,), cost) for call, cost in rows.items() if call not in before]
        alone = {lease for lease, _ in self.purse.held.values()} <= {process}
        self.purse.end_sum(name, sum(before.values()), told, ended, alone=alone)

    def _later(self, call, name):
        return int(call.split()[1]) > int(name.split()[1])

    def kill(self, number):
        if len(self.alive) > 1:
            dead = self._some(self.alive, number)
            self.alive.discard(dead)
            self.flying = {call: held for call, held in self.flying.items() if held[0] != dead}
            self.sums = {name: one for name, one in self.sums.items() if one[0] != dead}


def test_amounts_are_rounded_up():
    assert (nanos(0), nanos(1e-10), nanos(1.5)) == (0, 1, 1_500_000_000)


@given(steps)
def test_c6_what_is_spent_and_reserved_is_counted_once_and_stays_within_the_budget(steps):
    world = World()
    for step, number in steps:
        getattr(world, step)(number)
        purse = world.purse
        flying = sum(amount for call, (_, amount) in world.flying.items() if call not in world.rows)
        assert purse.spent + purse.reserved >= world.spent + flying
        assert world.spent + flying <= LIMIT
    while world.sums:
        world.end(0)
    for call in [*world.flying]:
        world.rows.setdefault(call, 0)
        world.settle(0)
    if world.lost():
        world.begin(0)
        world.end(0)
    assert (world.purse.spent, world.purse.reserved, world.purse.recent) == (world.spent, 0, {})


def test_a_sum_of_the_rows_lowers_what_is_spent_only_where_nobody_else_spends():
    purse = Purse(counted=60)
    for found, alone, spent in ((20, False, 60), (80, False, 80), (20, True, 20)):
        purse.begin_sum("a sum", 1)
        purse.end_sum("a sum", found, [], [], alone=alone)
        assert purse.spent == spent


def test_a_sum_that_another_one_has_overtaken_lowers_nothing():
    """The process of a call has died after it stored its samples, which only the later sum has seen."""
    purse = Purse()
    assert purse.reserve("call", 1, 9, LIMIT)
    assert purse.begin_sum("early", 2) == ["call"]
    ended = purse.of_dead({2}.__contains__)
    purse.begin_sum("late", 2)
    purse = load_purse(dump_purse(purse))
    purse.end_sum("late", 0, [(["call"], 7)], ended, alone=True)
    purse = load_purse(dump_purse(purse))
    purse.end_sum("early", 0, [], [], alone=True)
    assert purse == Purse(counted=7)


def test_a_call_whose_process_was_taken_for_dead_is_summed_again():
    purse = Purse(counted=5)
    purse.settle("lost", 7)
    assert purse.of_dead({1}.__contains__) == ["lost"]
    purse.settle("nothing reserved", 0)
    assert (purse.spent, purse.reserved) == (5, 7)
