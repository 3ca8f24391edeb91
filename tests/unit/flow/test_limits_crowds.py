"""Random crowds of calls against an oracle that knows nothing of windows, queues or tags."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import sized

from cachepipe import Limits
from cachepipe.testing import FakeClock

INTERVAL, TRANSIT = 8.0, 2.0
MOST = {"max_requests": 3, "max_tokens": 20, "max_concurrency": 4}
SLOW = {"max_requests": 2, "interval": 16.0}


class RefusedError(Exception):
    status_code = 429


@dataclass
class Made:
    """A call that was let go: when, and by when its request had arrived for certain."""

    model: str
    tokens: float
    began: float
    arrived: float = float("inf")
    ended: float = float("inf")


@dataclass(frozen=True)
class Step:
    pause: float
    namespace: str
    model: str
    tokens: int
    used: float | None  # share of the estimate
    takes: float
    outcome: str
    cancel: int | None  # which of the calls so far is given up then


steps = st.lists(
    st.builds(
        Step,
        pause=st.sampled_from([0.0, 0.0, 0.5, 3.0]),
        namespace=st.sampled_from("abc"),
        model=st.sampled_from(["quick", "slow"]),
        tokens=st.integers(0, 25),
        used=st.sampled_from([None, 0.0, 0.5, 1.0]),
        takes=st.sampled_from([0.0, 0.25, 1.0, 7.0, 40.0]),
        outcome=st.sampled_from(["answered", "answered", "refused", "again"]),
        cancel=st.none() | st.integers(0, 30),
    ),
    min_size=1,
    max_size=30,
)


async def crowd(steps, folder=None):
    """Make the calls; with a folder, through two limits that share it, as two processes would."""
    clock = FakeClock()
    how = {"interval": INTERVAL, "transit": TRANSIT, "per_model": {"slow": SLOW}, "adaptive": False}
    several = [Limits(**MOST, **how, clock=clock, shared=folder) for _ in range(1 if folder is None else 2)]
    made, tasks = [], []

    async def call(step):
        limits = several[ord(step.namespace) % len(several)]
        with await limits.enter(
            namespace=step.namespace,
            model=step.model,
            tokens=step.tokens,
            ahead=step.outcome == "again",
        ) as slot:
            mine = Made(step.model, step.tokens, clock.now())
            made.append(mine)
            try:
                if step.takes:
                    await clock.sleep(step.takes)
                mine.tokens = step.tokens if step.used is None else step.used * step.tokens
                error = RefusedError() if step.outcome == "refused" else None
                slot.end(error=error, tokens=None if error or step.used is None else mine.tokens)
            finally:
                mine.ended = clock.now()

    for step in steps:
        await clock.advance(step.pause)
        tasks.append(asyncio.create_task(call(step)))
        if step.cancel is not None and step.cancel < len(tasks):
            tasks[step.cancel].cancel()
    await clock.advance(100 * len(steps))
    assert all(task.done() for task in tasks)
    stats = [limits.stats() for limits in several]
    assert [(each.in_flight, each.waiting) for each in stats] == [(0, 0)] * len(several)
    assert sum(each.calls for each in stats) == len(made)
    for limits, before in zip(several, stats, strict=True):
        await clock.advance(100)
        with await limits.enter(tokens=MOST["max_tokens"]):  # nothing was left behind
            assert limits.stats().queue_seconds == before.queue_seconds
        limits.close()
    return made


def check(made, interval, amount, most):
    """No interval holds more, whenever in the time in which they may each call arrived."""
    for begin in {moment for each in made for moment in (each.began, each.arrived)}:
        within = [each for each in made if each.arrived >= begin and each.began < begin + interval]
        assert sum(map(amount, within)) <= most


def check_all(made):
    for each in made:
        each.arrived = min(each.ended, each.began + TRANSIT)
    check(made, INTERVAL, lambda each: 1, MOST["max_requests"])
    check(made, INTERVAL, lambda each: min(each.tokens, MOST["max_tokens"]), MOST["max_tokens"])
    check([each for each in made if each.model == "slow"], SLOW["interval"], lambda each: 1, 2)
    for each in made:
        under_way = [other for other in made if other.began <= each.began < other.ended]
        assert len(under_way) <= MOST["max_concurrency"]


@settings(max_examples=sized(40, 150))
@given(steps)
def test_no_crowd_exceeds_a_limit_or_leaves_anything_behind(steps):
    with mock.patch("cachepipe.testing.clock._TURNS", 4):
        check_all(asyncio.run(crowd(steps)))


@settings(max_examples=sized(10, 30))
@given(steps)
def test_no_crowd_of_two_exceeds_what_they_share(steps):
    with mock.patch("cachepipe.testing.clock._TURNS", 4), tempfile.TemporaryDirectory() as folder:
        check_all(asyncio.run(crowd(steps, folder)))
