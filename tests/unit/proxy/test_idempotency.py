"""Which occurrence a request is: numbers are given, joined and given back."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from profiles import sized

from cachepipe.contract.draws import Claimant, Draw, Identity
from cachepipe.proxy.idempotency import ProxyRun, RequestCounter
from cachepipe.runs import Occurrences

ONE = Identity("=a", "k", "")


def taken(run, **options):
    counter = RequestCounter(run, **options)
    return counter, counter.take(ONE)


def undo(counter, number):
    counter.give_back(ONE.draw(number))


def test_requests_count_up_and_failures_give_back():
    run = ProxyRun()
    first, zero = taken(run)
    second, one = taken(run)
    assert (zero, one) == (0, 1)
    undo(first, 0)
    _, again = taken(run)
    assert again == 0
    second.delivered()
    assert taken(run)[1] == 2


def test_what_stands_of_a_request_without_an_answer_is_for_the_next():
    run = ProxyRun()
    first, number = taken(run)
    first.unanswered()
    assert not run.live
    assert taken(run)[1] == number
    failed, another = taken(run)
    undo(failed, another)
    failed.unanswered()  # given back once
    assert taken(run)[1] == another
    assert taken(run)[1] == another + 1


def test_a_client_that_leaves_gives_its_number_to_the_next():
    run = ProxyRun()
    gone, number = taken(run)
    gone.left()
    following, same = taken(run)
    assert same == number
    undo(gone, number)  # the call that went on fails, but the other request holds the draw
    assert taken(run)[1] == 1
    following.delivered()
    assert taken(run)[1] == 2


def test_c8_a_retry_that_leaves_gives_the_number_to_the_next_though_the_first_try_goes_on():
    run = ProxyRun()
    first, number = taken(run)
    first.left()
    for _ in range(2):
        retry, same = taken(run)
        assert same == number
        retry.left()
        retry.left()
    first.ended()
    assert taken(run)[1] == number
    assert taken(run)[1] == number + 1


def test_a_number_is_given_back_once():
    run = ProxyRun()
    gone, number = taken(run)
    gone.left()
    undo(gone, number)
    assert [taken(run)[1], taken(run)[1]] == [0, 1]


def test_a_retry_joins_the_oldest_in_flight_but_for_what_was_given_back():
    run = ProxyRun()
    _, zero = taken(run)
    failing, one = taken(run)
    assert (zero, one) == (0, 1)
    assert taken(run, retry=True)[1] == 0
    undo(failing, 1)
    assert taken(run, retry=True)[1] == 1
    assert taken(run)[1] == 2


def test_a_delivered_draw_is_joined_by_its_key_only():
    run = ProxyRun()
    counter, _ = taken(run, entry=run.entry("i", Claimant("a"), ("k",)))
    counter.delivered()
    assert taken(run, retry=True)[1] == 1
    joined, number = taken(run, entry=run.entry("i", Claimant("a"), ("k",)))
    assert number == 0
    undo(joined, 0)
    assert taken(run)[1] == 2


class Joins(RuleBasedStateMachine):
    """No number is ever delivered to two requests, unless one of them said that it is the other's try."""

    def __init__(self):
        super().__init__()
        self.run = ProxyRun()
        self.flight = []
        self.delivered = []

    @rule(key=st.sampled_from([None, None, "x", "y"]))
    def ask(self, key):
        entry = None if key is None else self.run.entry(key, Claimant("a"), ("k",))
        counter, number = taken(self.run, entry=entry)
        self.flight.append((counter, number, key))

    @rule(which=st.integers(0, 9), end=st.sampled_from(["deliver", "fail", "leave", "leave and fail"]))
    def end(self, which, end):
        if not self.flight:
            return
        counter, number, key = self.flight.pop(which % len(self.flight))
        if end == "deliver":
            counter.delivered()
            self.delivered.append((number, key))
        elif end == "fail":
            undo(counter, number)
        else:
            counter.left()
            if end == "leave":
                counter.ended()
            else:
                undo(counter, number)

    @invariant()
    def independent(self):
        owners = {}
        for number, key in self.delivered:
            assert owners.setdefault(number, key) == key or key is None
        plain = [number for number, key in self.delivered if key is None]
        assert len(plain) == len({*plain})

    def teardown(self):
        for counter, _, _ in self.flight:
            counter.ended()
        assert not self.run.live


TestJoins = Joins.TestCase
TestJoins.settings = settings(max_examples=sized(20, 60), stateful_step_count=30, deadline=None)


def test_namespaces_of_a_proxy_are_of_several_programs_and_so_are_not_compared():
    draws = [Draw(f"=run-{number}", f"k{key}", "", 0) for number in range(3) for key in range(50)]
    of_proxy = ProxyRun().counted.overlap
    assert not any(of_proxy.add(draw, [0]) for draw in draws)
    compared = Occurrences().overlap
    assert any(compared.add(draw, [0]) for draw in draws)
