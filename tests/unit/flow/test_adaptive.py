"""What refusals and overloads teach: against servers whose limits nobody tells, on a clock moved by hand."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from cachepipe import Limits, Retries, context
from cachepipe.flow.adaptive import Adaptive
from cachepipe.testing import FakeClock

pytestmark = pytest.mark.anyio


class RefusedError(Exception):
    def __init__(self, status_code, headers):
        super().__init__(status_code)
        self.status_code = status_code
        self.response = type("Response", (), {"headers": headers})


@dataclass
class Server:
    """Lets ``rate`` requests a second through, ``burst`` at once after a rest; the rest is refused."""

    clock: FakeClock
    rate: float
    burst: float
    latency: float
    tells: bool = True
    most: int | None = None
    seen: int = 0
    refused: int = 0
    busy: int = 0

    def __post_init__(self):
        self.level, self.since, self.chance = self.burst, 0.0, random.Random(1)

    async def __call__(self):
        takes = self.latency * (1 + 0.2 * self.chance.random())
        await self.clock.sleep(takes / 2)
        now = self.clock.now()
        self.level = min(self.burst, self.level + (now - self.since) * self.rate)
        self.since = now
        self.seen += 1
        full = self.most is not None and self.busy >= self.most
        if self.level < 1 or full:
            self.refused += 1
            await self.clock.sleep(takes / 2)
            wait = (1 - self.level) / self.rate
            raise RefusedError(
                503 if full else 429, {"retry-after-ms": f"{wait * 1000:.0f}"} if self.tells else {}
            )
        self.level -= 1
        self.busy += 1
        await self.clock.sleep(takes / 2)
        self.busy -= 1


async def run(server, count, limits=None):
    """Make so many calls with retries; return how long that takes, in seconds."""
    clock = server.clock
    limits = limits or Limits(clock=clock)
    retries = Retries(max_retries=30, clock=clock, chance=random.Random(2).random)

    async def attempt():
        with await limits.enter(ahead=context.attempt.get().number > 0):
            await server()

    began = clock.now()
    tasks = [asyncio.create_task(retries.run(attempt)) for _ in range(count)]
    await clock.settle()
    while not all(task.done() for task in tasks):
        await clock.advance(clock.next_due - clock.now())
    for task in tasks:
        task.result()
    return clock.now() - began


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("cachepipe.testing.clock._TURNS", 4)
    return FakeClock()


@pytest.mark.parametrize("tells", [True, False], ids=["retry-after", "silent"])
async def test_a_hidden_rate_is_found_and_used_up(clock, tells):
    server = Server(clock, rate=100, burst=100, latency=0.05, tells=tells)
    seconds = await run(server, 1500)
    assert (1500 - server.burst) / seconds >= 0.9 * server.rate  # the burst is a present
    assert server.refused < 0.1 * server.seen
    assert server.seen - server.refused == 1500


async def test_once_found_hardly_anything_is_refused(clock):
    server = Server(clock, rate=50, burst=50, latency=0.3)
    limits = Limits(clock=clock)
    await run(server, 400, limits)
    refused, seen = server.refused, server.seen
    seconds = await run(server, 800, limits)
    assert (server.refused - refused) / (server.seen - seen) < 0.03
    assert 800 / seconds > 0.9 * server.rate


async def test_a_rate_that_was_raised_is_found_again(clock):
    server = Server(clock, rate=20, burst=20, latency=0.1)
    limits = Limits(clock=clock)
    await run(server, 300, limits)
    server.rate = server.burst = 80
    await run(server, 1500, limits)
    assert limits.learned()[None]["pace"] > 60


async def test_an_overloaded_server_gets_fewer_calls_at_once(clock):
    server = Server(clock, rate=1e6, burst=1e6, latency=0.2, most=10, tells=False)
    await run(server, 400)
    assert server.refused < 0.25 * server.seen


async def test_concurrency_stops_growing_where_more_brings_no_more(clock):
    """A server that answers one after the other, 100 a second, however many wait there."""
    free = 0.0
    limits = Limits(clock=clock)

    async def call():
        nonlocal free
        with await limits.enter():
            free = max(free, clock.now() + 0.1) + 0.01
            await clock.sleep(free - clock.now())

    tasks = [asyncio.create_task(call()) for _ in range(2000)]
    await clock.settle()
    while not all(task.done() for task in tasks):
        await clock.advance(clock.next_due - clock.now())
    assert clock.now() < 25
    assert limits.learned()[None]["concurrency"] < 150  # else it would be near a thousand


def answered(adaptive, count, now=0.0, latency=0.1):
    for _ in range(count):
        adaptive.answered(now - latency, int(adaptive.concurrency), now)


def overloaded(adaptive, sent, now):
    """So many failures at once that it is no single bad call."""
    for _ in range(3):
        adaptive.overloaded(sent, None, now)


def test_concurrency_grows_fast_at_first_halves_and_then_grows_by_one_per_round():
    adaptive = Adaptive()
    first = adaptive.concurrency
    answered(adaptive, 16, now=1)
    assert adaptive.concurrency == first * 1.5
    overloaded(adaptive, 1.5, 2)
    assert adaptive.concurrency == first * 0.75
    before = adaptive.concurrency
    answered(adaptive, int(before), now=3)
    assert before + 0.9 < adaptive.concurrency <= before + 1


def test_calls_that_were_under_way_already_teach_nothing_more():
    adaptive = Adaptive()
    answered(adaptive, 100, now=1)
    overloaded(adaptive, 1.5, 2)
    lowered = adaptive.concurrency
    overloaded(adaptive, 1.9, 2.1)  # sent before the lesson of 2
    assert adaptive.concurrency == lowered
    overloaded(adaptive, 2.05, 2.2)
    assert adaptive.concurrency == lowered / 2


def test_a_call_that_always_fails_slows_nobody_else_down():
    adaptive = Adaptive()
    answered(adaptive, 20, now=1)
    before = adaptive.concurrency
    for moment in range(2, 20):
        adaptive.overloaded(moment - 0.1, None, moment)
        answered(adaptive, 20, now=moment + 0.5)
    assert adaptive.concurrency >= before
    assert adaptive.pace is None


def test_concurrency_never_falls_below_one_nor_grows_beyond_its_cap():
    adaptive = Adaptive(most=20)
    answered(adaptive, 500, now=1)
    assert adaptive.concurrency == 20
    for moment in range(2, 50):
        overloaded(adaptive, moment, moment + 0.5)
    assert adaptive.concurrency == 1
    assert adaptive.wait(0, 100) == 0


def test_what_is_not_used_does_not_grow():
    adaptive = Adaptive()
    first = adaptive.concurrency
    for _ in range(100):
        adaptive.answered(0.0, 2, 0.1)
    assert adaptive.concurrency == first


def test_as_many_calls_may_be_under_way_as_the_learned_rate_needs():
    adaptive = Adaptive()
    adaptive.sent(0, 0.0)
    answered(adaptive, 200, now=2.0, latency=2.0)
    adaptive.refused(1.5, None, 2.0)
    for moment in (5, 9, 14):
        overloaded(adaptive, moment - 0.5, moment)
    assert adaptive.room >= adaptive.pace * 2.0


def test_a_first_call_that_is_refused_teaches_a_pace_that_recovers():
    adaptive = Adaptive()
    adaptive.sent(0, 0.0)
    adaptive.refused(0.0, None, 0.1)
    assert adaptive.pace > 1
    for moment in range(1, 60):
        adaptive.refused(moment, None, moment + 0.5)
    assert adaptive.pace == pytest.approx(0.1, rel=0.05)  # slow, but not for ever
    answered(adaptive, 15, now=100)
    assert adaptive.pace > 5


def test_without_learning_only_the_pause_that_was_asked_for_is_kept():
    adaptive = Adaptive(learns=False)
    adaptive.refused(0, 30, 1)
    adaptive.overloaded(2, 10, 3)
    assert adaptive.pace is None
    assert adaptive.wait(10_000, 1) == 30
    assert adaptive.wait(10_000, 31) == 0
