"""Limits, retries and estimates together, in threads that have no loop."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe.flow.flow import Flow
from cachepipe.flow.limits import Limits
from cachepipe.flow.retries import Retries


class Refused(Exception):  # noqa: N818 - what a server says
    status_code = 503


@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_thread_that_is_interrupted_gives_back_the_turn_that_has_come(comes):
    """Whether the turn came just before the interruption or comes after it."""
    flow = Flow(Limits(max_concurrency=1))
    late = []

    def wait(work):
        if comes == "before":
            asyncio.run(work)
        else:
            late.append(work)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.call_in_thread(lambda: None, {"model": "m"}, wait)
    for work in late:
        asyncio.run(work)
    assert (flow.limits.stats().in_flight, flow.limits.stats().waiting) == (0, 0)


def test_an_interruption_is_never_tried_again():
    made = []

    def make():
        made.append(1)
        raise KeyboardInterrupt

    flow = Flow(retries=Retries(retry=lambda error: True))
    with pytest.raises(KeyboardInterrupt):
        flow.call_in_thread(make, {}, asyncio.run)
    assert len(made) == 1
    assert flow.limits.stats().in_flight == 0


def test_what_fails_in_a_thread_is_made_again_in_its_turn():
    errors = [Refused(), Refused()]

    def make():
        if errors:
            raise errors.pop()
        return "answer"

    flow = Flow(Limits(max_concurrency=1), Retries(first=0))
    passage, answer = flow.call_in_thread(make, {"model": "m"}, asyncio.run)
    assert answer == "answer"
    assert flow.limits.stats().in_flight == 1
    passage.end()
    stats = flow.limits.stats()
    assert (stats.in_flight, stats.calls, stats.retries, stats.overloaded) == (0, 3, 2, 2)
