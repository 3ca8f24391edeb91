"""What becomes of a draw (C1, C2, C4, C6, C7, C8): random worlds of draws, without any I/O.

`World` performs the effects of `cachepipe.contract.lifecycle` on a ledger of dictionaries: claims, commits
and releases are queued and applied in order, calls are answered, fail or are stopped in any order, callers
leave at any moment.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import sized

from cachepipe.contract import lifecycle
from cachepipe.contract.allotment import Segment, added, allot, laid
from cachepipe.contract.draws import Claimant, draw_of
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.lifecycle import DrawState
from cachepipe.contract.undoing import fallen

KEY = "k"


class Numbers:
    """Counts the occurrences of equal requests."""

    def __init__(self):
        self.used = {}

    def take(self, identity):
        used = self.used.setdefault(identity, set())
        number = next(number for number in range(len(used) + 1) if number not in used)
        used.add(number)
        return number

    def give_back(self, draw):
        self.used[draw.identity].remove(draw.occurrence)


class Ledger:
    """The sample list of one key, and its draws."""

    def __init__(self):
        self.samples = {}
        self.pending = {}  # index -> who generates it
        self.taken = {}
        self.segments = {}
        self.holders = {}
        self.claims = 0
        self.order = {}

    def claim(self, draw, n, token):
        view = View(self, draw, token)
        segments = self.segments.get(draw, [])
        held = laid((segment.position, segment.indices) for segment in segments)
        allotment = allot(view, held, n)
        self.claims += 1
        self.order.setdefault(draw.namespace, self.claims)
        number = max((segment.number for segment in segments), default=-1) + 1
        for position, indices in added(allotment, n, len(held), refresh=False):
            segments = [*segments, Segment(number, position, indices, 0, "one", self.claims)]
            number += 1
        self.segments[draw] = segments
        joined = False
        for segment in segments:
            holders = self.holders.setdefault((draw, segment.number), set())
            joined = joined or bool(holders - {token})
            holders.add(token)
        numbers = tuple(segment.number for segment in segments)
        return allotment, numbers, joined

    def commit(self, index, token):
        """Store a sample; return its index: another one if the lease was lost."""
        if self.pending.get(index) == token:
            del self.pending[index]
        else:
            index = max([*self.samples, *self.pending, -1]) + 1
        self.samples[index] = f"sample {index}"
        return index

    def free(self, indices, token):
        for index in indices:
            if self.pending.get(index) == token:
                del self.pending[index]

    def release(self, draw, token, numbers, complete):
        for number in numbers:
            self.holders.get((draw, number), set()).discard(token)
        segments = self.segments.get(draw, [])
        if complete or not segments:
            return
        undone = fallen(
            segments,
            numbers,
            lambda index: index not in self.samples,
            lambda segment: bool(self.holders.get((draw, segment.number))),
        )
        self.segments[draw] = [segment for segment in segments if segment not in undone]
        for segment in undone:
            for index in segment.indices:
                self.taken[draw.namespace].remove(index)

    def row(self, draw):
        return laid((segment.position, segment.indices) for segment in self.segments.get(draw, []))


class View:
    """What one claim sees."""

    def __init__(self, ledger, draw, token):
        self.ledger, self.draw, self.token = ledger, draw, token
        self.listed = IntervalSet()
        for index in {*ledger.samples, *ledger.pending}:
            self.listed.add(index)
        self.taken = ledger.taken.setdefault(draw.namespace, IntervalSet())

    def others(self):
        found = [
            (self.ledger.order[draw.namespace], segments)
            for draw, segments in self.ledger.segments.items()
            if segments and draw.namespace != self.draw.namespace and draw[1:] == self.draw[1:]
        ]
        return min(found)[1] if found else []

    def sample(self, index):
        return self.ledger.samples.get(index)

    def lease(self, index):
        return self.ledger.pending.setdefault(index, self.token) == self.token


@dataclasses.dataclass(eq=False)
class Caller:
    draw: object
    state: DrawState
    outcome: object = None  # None while it waits
    taken_back: bool = False
    values: dict = dataclasses.field(default_factory=dict)


class World:
    def __init__(self):
        self.ledger, self.numbers = Ledger(), Numbers()
        self.callers, self.queue, self.calls = [], [], []
        self.waiting = {}
        self.generated = self.unreported = self.unsaved = 0

    # What happens.

    def begin(self, namespace, n):
        draw = draw_of(KEY, Claimant(namespace), self.numbers, shared=False)
        caller = Caller(draw, DrawState(n))
        self.callers.append(caller)
        self.queue.append((self.claim, caller))
        return caller

    def write(self):
        operation, *arguments = self.queue.pop(0)
        operation(*arguments)

    def answer(self, place, how):
        caller, index = self.calls.pop(place)
        state = caller.state
        if how == "fails":
            self.perform(caller, state.failed([index], ValueError(f"call for {index}")))
        elif how == "is stopped":
            self.perform(caller, state.failed([index], None))
        else:
            self.generated += 1
            if how == "loses its lease":
                self.ledger.pending.pop(index, None)
            if how == "is not stored":
                self.unsaved += 1
                self.perform(caller, state.unstored(index))
                self.take(caller, index)
            else:
                self.queue.append((self.commit, caller, index))

    def leave(self, caller):
        if caller.outcome is None or caller.outcome == "samples":
            delivered = caller.outcome is not None
            caller.taken_back = True
            self.perform(caller, caller.state.left())
            caller.outcome = caller.outcome if delivered else "left"

    # Operations.

    def claim(self, caller):
        allotment, numbers, joined = self.ledger.claim(caller.draw, caller.state.n, id(caller))
        effects = caller.state.granted(
            allotment.indices, allotment.samples, allotment.to_generate, numbers, joined=joined
        )
        self.perform(caller, effects, allotment.samples)

    def commit(self, caller, index):
        stored = self.ledger.commit(index, id(caller))
        self.perform(caller, caller.state.committed(index, kept=stored == index))
        if stored == index:
            self.take(caller, index)

    def take(self, caller, index):
        position = caller.state.takes(index)
        if position is None:
            self.unreported += 1
            return
        caller.values[position] = index
        self.perform(caller, caller.state.filled(index))

    def settle(self, index, error=None, *, last=False):
        for caller in self.waiting.pop(index, []):
            if index not in self.ledger.samples:
                self.perform(caller, caller.state.absent(index, error, last=last))
            elif (position := caller.state.takes(index)) is not None:
                caller.values[position] = index
                self.perform(caller, caller.state.arrived(index))

    # Effects.

    def perform(self, caller, effects, samples=()):
        for effect in effects:
            getattr(self, type(effect).__name__)(caller, effect)

    def Fill(self, caller, effect):  # noqa: N802 - named after the effect, like those below
        for position in effect.positions:
            caller.values[position] = caller.state.indices[position]

    def Await(self, caller, effect):  # noqa: N802
        for index in effect.indices:
            self.waiting.setdefault(index, []).append(caller)

    def StopWaiting(self, caller, effect):  # noqa: N802
        for index in effect.indices:
            self.waiting[index] = [one for one in self.waiting.get(index, []) if one is not caller]

    def Generate(self, caller, effect):  # noqa: N802
        self.calls += [(caller, index) for index in effect.indices]

    def FreeLeases(self, caller, effect):  # noqa: N802
        def freed():
            self.ledger.free(effect.indices, id(caller))
            for index in effect.indices:
                self.settle(index, effect.error, last=effect.last)

        self.queue.append((freed,))

    def Wake(self, caller, effect):  # noqa: N802
        self.settle(effect.place)

    def ClaimAgain(self, caller, effect):  # noqa: N802
        self.queue.append((self.claim, caller))

    def Waste(self, caller, effect):  # noqa: N802
        self.unreported += len(effect.positions) + effect.others

    def GiveBack(self, caller, effect):  # noqa: N802
        self.numbers.give_back(caller.draw)

    def Release(self, caller, effect):  # noqa: N802
        def released():
            self.ledger.release(caller.draw, id(caller), caller.state.held, effect.complete)
            if effect.error is not None and caller.outcome is None:
                caller.outcome = effect.error

        self.queue.append((released,))

    def Withdraw(self, caller, effect):  # noqa: N802
        """The calls go on, as they may travel with others."""

    def Cancel(self, caller, effect):  # noqa: N802
        if caller.outcome is None:
            caller.outcome = "cancelled"

    def Deliver(self, caller, effect):  # noqa: N802
        assert sorted(caller.values) == list(range(caller.state.n))
        if caller.outcome is None:
            caller.outcome = "samples"

    # The end.

    def finish(self):
        while self.queue or self.calls:
            if self.queue:
                self.write()
            else:
                self.answer(0, "is stored")

    def check(self):
        assert all(caller.outcome is not None for caller in self.callers), "a caller hangs"
        assert not any(self.waiting.values())
        assert not self.ledger.pending
        delivered = [caller for caller in self.callers if caller.outcome == "samples"]
        self.check_independence(delivered)
        for draw, segments in self.ledger.segments.items():  # C8
            assert all(index in self.ledger.samples for segment in segments for index in segment.indices), (
                draw
            )
        for namespace, taken in self.ledger.taken.items():
            rows = [self.ledger.row(draw) for draw in self.ledger.segments if draw.namespace == namespace]
            held = Counter(index for row in rows for index in row)
            assert max(held.values(), default=1) == 1
            assert set(held) == {index for start, stop in taken for index in range(start, stop)}
        falses = sum(not cached for caller in delivered for cached in caller.state.cached)
        back = sum(caller.state.generated for caller in delivered if caller.taken_back)
        assert falses - back == self.generated - self.unreported  # C6

    def check_independence(self, delivered):
        """C1 and C2: one draw has the same samples whoever asked; two draws of a namespace share none."""
        draws = {}
        for caller in delivered:
            values = [caller.values[position] for position in range(caller.state.n)]
            if all(index in self.ledger.samples for index in values):
                draws.setdefault(caller.draw, []).append(values)
        for draw, answers in draws.items():
            longest = max(answers, key=len)
            assert all(answer == longest[: len(answer)] for answer in answers)
            assert self.ledger.row(draw)[: len(longest)] == longest
        for namespace in {draw.namespace for draw in draws}:
            given = Counter(
                index
                for draw, answers in draws.items()
                if draw.namespace == namespace
                for index in max(answers, key=len)
            )
            assert max(given.values()) == 1


HAPPY = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sampled_from("ab"), st.integers(1, 3)),
        st.tuples(st.just("write"), st.none(), st.none()),
        st.tuples(st.just("answer"), st.integers(0, 9), st.just("is stored")),
    ),
    max_size=40,
)
ANSWERS = ["is stored", "fails", "is stopped", "loses its lease"]
ROUGH = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.sampled_from("ab"), st.integers(1, 3)),
        st.tuples(st.just("write"), st.none(), st.none()),
        st.tuples(st.just("answer"), st.integers(0, 9), st.sampled_from(ANSWERS)),
        st.tuples(st.just("leave"), st.integers(0, 9), st.none()),
    ),
    max_size=40,
)


def played(steps):
    world = World()
    for what, one, other in steps:
        if what == "begin":
            world.begin(one, other)
        elif what == "write" and world.queue:
            world.write()
        elif what == "answer" and world.calls:
            world.answer(one % len(world.calls), other)
        elif what == "leave" and world.callers:
            world.leave(world.callers[one % len(world.callers)])
    world.finish()
    return world


@given(HAPPY)
def test_c4_a_world_without_failures_buys_what_its_largest_namespace_draws(steps):
    world = played(steps)
    world.check()
    drawn = Counter()
    for caller in world.callers:
        drawn[caller.draw.namespace] += caller.state.n
    assert world.generated == len(world.ledger.samples) == max(drawn.values(), default=0)
    assert not world.unreported


@settings(max_examples=sized(100, 400))
@given(ROUGH)
def test_c8_failures_and_cancellations_at_any_moment_leave_every_promise_whole(steps):
    world = played(steps)
    world.check()


@given(ROUGH)
def test_c2_a_rerun_gets_what_the_draws_that_stand_got(steps):
    world = played(steps)
    rows = {draw: world.ledger.row(draw) for draw, segments in world.ledger.segments.items() if segments}
    world.callers, world.numbers, bought = [], Numbers(), world.generated
    for draw in sorted(rows):
        caller = Caller(draw, DrawState(len(rows[draw])))
        world.callers.append(caller)
        world.claim(caller)
        assert [caller.values[position] for position in range(caller.state.n)] == rows[draw]
        assert caller.outcome == "samples"
        assert caller.state.cached == [True] * caller.state.n
    assert world.generated == bought


# Single rules.


def granted(mine=(0,), n=1):
    state = DrawState(n)
    state.granted(list(range(n)), [None] * n, list(mine), (7,))
    return state


def test_c7_a_sample_that_could_not_be_stored_is_delivered():
    state = granted()
    assert state.unstored(0) == (lifecycle.FreeLeases([0]),)
    assert state.takes(0) == 0
    assert state.filled(0) == (lifecycle.Deliver(),)
    assert state.cached == [False]


def test_c8_an_error_reaches_the_draw_whose_call_failed_after_the_ledger_was_mended():
    error = ValueError("refused")
    freed, waste, back, release = granted().failed([0], error)
    assert freed == lifecycle.FreeLeases([0], error, last=False)
    assert waste == lifecycle.Waste([])
    assert back == lifecycle.GiveBack()
    assert release == lifecycle.Release(complete=False, error=error)


def test_c8_who_waited_for_the_failed_call_claims_once_more_and_then_fails_with_the_second():
    state = granted(mine=())
    assert state.absent(0, ValueError("first")) == (lifecycle.ClaimAgain(),)
    state.granted([0], [None], [], (7,))
    second = ValueError("second")
    assert lifecycle.Release(complete=False, error=second) in state.absent(0, second, last=True)


def test_c8_an_error_of_a_first_try_never_fails_who_only_waited():
    state = granted(mine=())
    assert state.absent(0, ValueError("first"), last=True) == (lifecycle.ClaimAgain(),)
    state.granted([0], [None], [], (7,))
    assert state.absent(0, ValueError("another's first")) == (lifecycle.ClaimAgain(),)


def test_c8_a_draw_that_is_complete_stands_when_its_caller_leaves_and_gives_its_number_back():
    state = granted()
    state.committed(0, kept=True)
    state.takes(0)
    state.filled(0)
    assert state.left() == (lifecycle.Waste([0]), lifecycle.GiveBack())
    assert state.left() == ()


def test_c8_a_draw_that_is_left_before_its_grant_frees_what_it_is_granted():
    state = DrawState(1)
    state.left()
    assert state.granted([0], [None], [0], (7,)) == (
        lifecycle.Release(complete=False),
        lifecycle.FreeLeases([0]),
    )


def test_c6_a_sample_that_comes_after_its_draw_has_ended_belongs_to_nobody():
    state = granted()
    state.left()
    assert state.takes(0) is None


def test_c7_a_lost_lease_makes_the_draw_claim_again():
    state = granted()
    waste, wake, claim = state.committed(0, kept=False)
    assert (waste, wake, claim) == (
        lifecycle.Waste(others=1),
        lifecycle.Wake(0, stored=False),
        lifecycle.ClaimAgain(),
    )


def test_c5_a_second_grant_keeps_the_samples_that_were_generated():
    """A draw whose lease was lost at one position keeps what it has generated at the others."""
    state = granted(mine=(0, 1), n=2)
    state.takes(0)
    state.filled(0)
    state.committed(1, kept=False)
    assert state.granted([0, 2], ["stored", None], [2], (7,)) == [lifecycle.Generate([2])]
    assert state.cached == [False, True]


def test_c8_an_unreadable_sample_fails_the_draw_and_frees_what_it_was_to_generate():
    state = DrawState(2)
    state.granted([0, 1], ["stored", None], [1], (7,))
    error = ValueError("unreadable")
    first, *_, last = state.spoiled([1], error)
    assert first == lifecycle.FreeLeases([1])
    assert last == lifecycle.Release(complete=False, error=error)
    assert state.making == set()


def test_what_is_not_in_the_ledger_is_generated_for_its_caller_alone():
    state = DrawState(2, stored=False)
    assert state.unsaved() == (lifecycle.Generate([-1, -2]),)
    assert lifecycle.Withdraw() in state.failed([-1], ValueError("refused"))


@pytest.mark.parametrize("event", ["broken", "left", "failed", "absent", "unheard"])
def test_nothing_happens_twice_to_a_draw_that_has_ended(event):
    state = granted(mine=())
    state.left()
    arguments = {"broken": (ValueError(),), "failed": ([], None), "absent": (0,)}.get(event, ())
    effects = getattr(state, event)(*arguments)
    kinds = {type(effect) for effect in effects}
    assert not kinds & {lifecycle.Release, lifecycle.GiveBack, lifecycle.ClaimAgain, lifecycle.Deliver}


def test_c8_a_draw_that_others_hold_too_ends_its_hold_when_it_is_complete():
    """Else the failure of the others could not undo what they added to it later."""
    state = DrawState(1)
    release = lifecycle.Release(complete=True)
    assert state.granted([0], ["stored"], [], (7,), joined=True) == [
        lifecycle.Fill([0]),
        release,
        lifecycle.Deliver(),
    ]


def test_a_draw_that_ends_does_not_wait_any_more():
    assert lifecycle.StopWaiting([0]) in granted(mine=()).left()
