"""The limits and their queue, on a clock that is moved by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from cachepipe import Limits
from cachepipe.flow import FlowStats, Quota
from cachepipe.testing import FakeClock

pytestmark = pytest.mark.anyio


class RefusedError(Exception):
    """429, or another status."""

    def __init__(self, status_code=429, **headers):
        super().__init__(status_code)
        self.status_code = status_code
        self.response = type(
            "Response", (), {"headers": {k.replace("_", "-"): v for k, v in headers.items()}}
        )


def limits(clock, *quota, **options):
    return Limits(*quota, **{"adaptive": False, "clock": clock, **options})


class Caller:
    """Makes calls that take a time of their own, and notes when each was let go."""

    def __init__(self, limits, clock):
        self.limits, self.clock = limits, clock
        self.let_go = []
        self.tasks = []

    def call(self, name, takes=0.0, error=None, used=None, headers=None, **how):
        async def make():
            slot = await self.limits.enter(**how)
            self.let_go.append((name, self.clock.now()))
            if takes:
                await self.clock.sleep(takes)
            slot.end(error=error, tokens=used, headers=headers)

        self.tasks.append(asyncio.create_task(make()))
        return self.tasks[-1]

    @property
    def names(self):
        return [name for name, _ in self.let_go]

    @property
    def times(self):
        return [when for _, when in self.let_go]


@pytest.fixture
async def begin(clock):
    callers = []

    def make(*quota, **options):
        callers.append(Caller(limits(clock, *quota, **options), clock))
        return callers[-1]

    yield make
    for caller in callers:
        for task in caller.tasks:
            task.cancel()
        await asyncio.gather(*caller.tasks, return_exceptions=True)


async def test_no_sliding_interval_holds_more_requests_than_the_quota(begin, clock):
    caller = begin(5, None, 1.0)
    for number in range(23):
        caller.call(number, takes=0.125)
        await clock.advance(0.03)
    await clock.advance(30)
    times = caller.times
    assert len(times) == 23
    # However long after it was let go each arrived: it had by the time its answer was there.
    assert all(later >= earlier + 0.125 + 1 for earlier, later in zip(times, times[5:], strict=False))


async def test_a_call_that_takes_long_counts_from_the_time_by_which_its_request_has_arrived(begin, clock):
    caller = begin(1, None, 10.0, transit=0.5)
    caller.call("long", takes=1000)
    caller.call("next")
    await clock.advance(10.4)
    assert caller.names == ["long"]
    await clock.advance(0.2)
    assert caller.let_go[1] == ("next", 10.5)


async def test_until_the_first_answer_a_request_may_be_long_on_its_way(begin, clock):
    caller = begin(1, None, 1.0)
    caller.call("cold", takes=100)
    caller.call("next")
    await clock.advance(200)
    assert caller.times == [0, 6.0]
    caller.call("warm", takes=100)
    caller.call("last")
    await clock.advance(200)
    assert caller.times[2:] == [200.0, 201.25]


async def test_tokens_are_limited_and_put_right_when_usage_comes(begin, clock):
    caller = begin(None, 100, 60.0)
    caller.call("a", tokens=60, used=20)
    await clock.settle()
    caller.call("b", tokens=80)
    caller.call("c", tokens=10)
    await clock.settle()
    assert caller.names == ["a", "b"]  # c does not pass by, or large calls would wait for ever
    await clock.advance(61)
    assert caller.names == ["a", "b", "c"]
    assert caller.limits.stats().tokens == 110


async def test_a_call_for_more_tokens_than_the_quota_goes_alone(begin, clock):
    caller = begin(None, 100, 60.0)
    caller.call("small", tokens=1)
    caller.call("huge", tokens=10_000)
    caller.call("after", tokens=1)
    await clock.advance(60)
    assert caller.let_go == [("small", 0), ("huge", 60)]
    await clock.advance(60)
    assert caller.let_go[2:] == [("after", 120)]


async def test_concurrency_is_capped(begin, clock):
    caller = begin(max_concurrency=2)
    for number in range(5):
        caller.call(number, takes=1)
    await clock.settle()
    assert (caller.names, caller.limits.stats().in_flight, caller.limits.stats().waiting) == ([0, 1], 2, 3)
    await clock.advance(10)
    assert caller.times == [0, 0, 1, 1, 2]


async def test_a_model_has_limits_of_its_own_and_holds_nobody_else_back(begin, clock):
    caller = begin(4, None, 1.0, per_model={"slow": {"max_requests": 1, "interval": 10}})
    for number in range(3):
        caller.call(f"slow {number}", model="slow")
    caller.call("quick", model="quick")
    await clock.settle()
    assert caller.names == ["slow 0", "quick"]
    await clock.advance(25)
    assert caller.let_go[2:] == [("slow 1", 10), ("slow 2", 20)]


async def test_a_small_namespace_does_not_wait_for_a_huge_one(begin, clock):
    caller = begin(1, None, 1.0)
    for number in range(500):
        caller.call(f"huge {number}", namespace="huge")
    await clock.advance(10.5)
    for number in range(5):
        caller.call(f"small {number}", namespace="small")
    await clock.advance(10)
    names = caller.names[11:]
    assert sum(name.startswith("small") for name in names) == 5
    assert [name for name in names if name.startswith("small")] == [f"small {n}" for n in range(5)]


async def test_fairness_counts_what_calls_use_not_how_many_there_are(begin, clock):
    caller = begin(None, 100, 1.0)
    for _ in range(20):
        caller.call("large", namespace="a", tokens=100)
    for _ in range(100):
        caller.call("small", namespace="b", tokens=10)
    await clock.advance(10.5)
    assert 40 <= caller.names.count("small") <= 70  # about half of the tokens, not a call for a call
    assert 4 <= caller.names.count("large") <= 7


async def test_a_retry_goes_before_those_who_wait(begin, clock):
    caller = begin(1, None, 1.0)
    for number in range(3):
        caller.call(number)
    await clock.settle()
    caller.call("again", ahead=True)
    await clock.advance(5)
    assert caller.names == [0, "again", 1, 2]
    assert caller.limits.stats().retries == 1


async def test_who_is_cancelled_while_waiting_takes_nothing(begin, clock):
    caller = begin(1, None, 1.0)
    caller.call("first")
    waiting = [caller.call(number) for number in range(3)]
    await clock.settle()
    waiting[0].cancel()
    await clock.advance(1)
    assert caller.names == ["first", 1]
    assert caller.limits.stats().waiting == 1


async def test_a_namespace_that_gave_up_a_huge_queue_is_not_behind_for_it(begin, clock):
    caller = begin(1, None, 1.0)
    for number in range(500):
        caller.call(f"given up {number}", namespace="a")
    await clock.advance(2)
    for task in caller.tasks[:400]:
        task.cancel()
    await clock.settle()
    for number in range(100):
        caller.call(f"b {number}", namespace="b")
    await clock.advance(4)
    assert [name.startswith("b") for name in caller.names[-4:]].count(False) == 2
    for task in caller.tasks[400:500]:
        task.cancel()
    caller.call("again", namespace="a")
    await clock.advance(3)
    assert "again" in caller.names


async def test_who_waits_behind_one_that_waited_is_let_go_in_time(begin, clock):
    """When a call that had to wait is made, it is known for the first time when the next may be."""
    caller = begin(1, None, 10.0, transit=0.5)
    caller.call("first")
    caller.call("long", takes=1000)
    caller.call("next")
    await clock.advance(100)
    assert caller.let_go == [("first", 0), ("long", 10), ("next", 20.5)]


async def test_who_gives_up_leave_gives_back_what_the_provider_said_was_left(begin, clock):
    caller = begin(max_concurrency=1)
    told = {"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "60s"}
    (await caller.limits.enter()).end(headers=told)
    slot = await caller.limits.enter()
    waiting = caller.call("given up")
    await clock.settle()
    slot.end()
    waiting.cancel()
    await clock.settle()
    caller.call("next")
    await clock.settle()
    assert caller.names == ["next"]


async def test_leave_that_comes_to_a_cancelled_caller_goes_to_the_next(begin, clock):
    """The leave and the cancellation come in the same turn of the loop, and no quota is used up."""
    caller = begin(2, None, 60.0, max_concurrency=1)
    slot = await caller.limits.enter()
    second = caller.call("second")
    caller.call("third")
    await clock.settle()
    slot.end()
    second.cancel()
    await clock.settle()
    assert caller.names == ["third"]
    assert (caller.limits.stats().calls, caller.limits.stats().in_flight) == (2, 0)


async def test_retry_after_pauses_all_calls_of_the_model(begin, clock):
    caller = begin()
    caller.call("refused", model="m", error=RefusedError(retry_after="30"))
    await clock.settle()
    caller.call("same", model="m")
    caller.call("other", model="n")
    await clock.advance(29)
    assert caller.names == ["refused", "other"]
    await clock.advance(1)
    assert caller.let_go[2] == ("same", 30)
    assert caller.limits.stats().refused == 1


async def test_a_long_pause_is_told_of_once(begin, clock, caplog):
    caller = begin()
    for seconds in ("59", "3600"):
        for _ in range(5):
            caller.call("refused", takes=1, model="m", error=RefusedError(retry_after=seconds))
        await clock.advance(61)
    [record] = caplog.records
    assert record.getMessage() == "the provider asks for no calls of model m for 3600 seconds"


async def test_what_a_provider_says_is_left_is_kept_to(begin, clock):
    caller = begin()
    told = {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "8s",
    }
    caller.call("first", headers=told)
    await clock.settle()
    for number in range(4):
        caller.call(number, takes=100)
    await clock.settle()
    assert caller.names == ["first", 0, 1]
    await clock.advance(20)
    assert caller.times[3:] == [1, 2]  # one a second comes back


@pytest.mark.parametrize(("reset", "quota"), [(1.1, 7), (1.1, 500), (0.7, 60)])
async def test_a_wait_too_short_to_be_told_as_a_number_comes_to_an_end(reset, quota):
    """Added to the time it was no wait at all, so that the same moment came again and again."""

    class Counting(FakeClock):
        at_once = 0

        def call_at(self, loop, when, callback):
            self.at_once += when <= self.now()
            assert self.at_once < 50
            return super().call_at(loop, when, callback)

    clock = Counting(0.1)
    caller = Caller(limits(clock), clock)
    told = {
        "x-ratelimit-limit-requests": str(quota),
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": f"{reset}s",
    }
    (await caller.limits.enter()).end(headers=told)
    caller.call("next")
    await clock.advance(10)
    assert caller.times == [pytest.approx(0.1 + reset / quota, abs=1e-5)]


async def test_what_is_left_of_tokens_is_kept_to_as_well(begin, clock):
    caller = begin()
    told = {"x-ratelimit-remaining-tokens": "100", "x-ratelimit-reset-tokens": "1m0s"}
    caller.call("first", tokens=10, headers=told)
    await clock.settle()
    caller.call("fits", tokens=60, takes=100)
    caller.call("too many", tokens=60)
    await clock.advance(59)
    assert caller.names == ["first", "fits"]
    await clock.advance(1)
    assert caller.names == ["first", "fits", "too many"]


async def test_time_in_the_queue_and_in_calls_is_told_apart(begin, clock):
    caller = begin(max_concurrency=1)
    for number in range(3):
        caller.call(number, takes=2)
    await clock.advance(10)
    stats = caller.limits.stats()
    assert (stats.queue_seconds, stats.call_seconds) == (0 + 2 + 4, 6)
    assert stats["calls"] == stats.as_dict()["answered"] == 3


async def test_outcomes_are_counted_by_kind(begin, clock):
    caller = begin()
    for error in (
        None,
        RefusedError(429),
        RefusedError(503),
        TimeoutError(),
        RefusedError(400),
        ValueError(),
    ):
        caller.call("call", error=error)
    await clock.settle()
    assert caller.limits.stats() == FlowStats(
        calls=6, answered=1, refused=1, overloaded=2, failed=2, queue_seconds=0, call_seconds=0
    )


async def test_loops_in_other_threads_share_the_limits():
    """Forty calls of four loops, with a cap of three: never more at once, and all get their turn."""
    shared = Limits(max_concurrency=3, adaptive=False)
    most, running, lock = [], [0], threading.Lock()

    async def call():
        with await shared.enter():
            with lock:
                running[0] += 1
                most.append(running[0])
            await asyncio.sleep(0)
            with lock:
                running[0] -= 1

    async def several():
        await asyncio.gather(*[call() for _ in range(10)])

    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(most) == 40
    assert max(most) <= 3
    assert (shared.stats().in_flight, shared.stats().waiting) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where there are threads
def test_a_forked_child_begins_with_all_of_its_own():
    """Even where another thread held the lock, and with slots of the parent that it ends."""
    shared = Limits(max_concurrency=1, adaptive=False)
    slot = asyncio.run(shared.enter())
    held, over = threading.Event(), threading.Event()

    def hold():
        with shared._lock:
            held.set()
            over.wait(30)

    async def several():
        (await shared.enter()).end()
        slot.end()
        first = await shared.enter()
        second = asyncio.create_task(shared.enter())
        await asyncio.sleep(0)
        free = second.done()
        first.end()
        (await second).end()
        return not free

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that hangs is a failure, too
        try:
            stats = shared.stats()
            fine = stats.in_flight == 0 and asyncio.run(asyncio.wait_for(several(), 10))
            os._exit(0 if fine and shared.stats().in_flight == 0 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    over.set()
    thread.join(30)
    assert shared.stats().in_flight == 1


async def test_who_waited_on_a_loop_that_was_closed_is_forgotten():
    shared = Limits(max_concurrency=1, adaptive=False)
    slot = await shared.enter()

    def leave_one_waiting():
        loop = asyncio.new_event_loop()
        task = loop.create_task(shared.enter())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        return task

    task = await asyncio.to_thread(leave_one_waiting)
    slot.end()
    with await asyncio.wait_for(shared.enter(), 5):
        assert shared.stats().in_flight == 1
    task._log_destroy_pending = False  # the loop it waited on is gone, as when a script ends early


async def test_lines_of_namespaces_that_are_over_are_forgotten(begin, clock):
    caller = begin(max_concurrency=1)
    for number in range(3000):
        (await caller.limits.enter(namespace=f"alone {number}")).end()
    slot = await caller.limits.enter()
    for number in range(3000):
        caller.call(number, namespace=f"waits {number}")
    await clock.settle()
    slot.end()
    for _ in range(400):
        await clock.settle()
    assert len(caller.names) == 3000
    assert not caller.limits._models[None].queue.lines


@pytest.mark.parametrize(
    ("quota", "problem"),
    [
        ({"max_requests": 0}, "max_requests is a number, at least 1"),
        ({"max_tokens": "many"}, "max_tokens is a number"),
        ({"max_concurrency": True}, "max_concurrency is a number"),
        ({"interval": 0}, "interval is a number of seconds above 0"),
        ({"interval": float("inf")}, "interval"),
    ],
)
def test_a_quota_that_is_none_is_refused(quota, problem):
    with pytest.raises(ValueError, match=problem):
        Quota(**quota)
    with pytest.raises(ValueError, match=problem):
        Limits(per_model={"m": quota})


@pytest.mark.parametrize("wrong", [5, {"max_request": 5}, [1]], ids=repr)
def test_limits_of_a_model_that_are_none_are_refused(wrong):
    with pytest.raises(TypeError, match=r"are a mapping of max_requests, max_tokens, .*; got"):
        Limits(per_model={"m": wrong})
    with pytest.raises(TypeError, match="per_model is a mapping of limits"):
        Limits(per_model="m")


def test_the_repr_shows_quota_and_state():
    assert repr(Limits(5, 1000, 1)) == "<Limits 5 requests and 1000 tokens per 1 s, 0 waiting, 0 in flight>"
    assert repr(Limits(max_concurrency=3)) == "<Limits no quota, 3 at once, 0 waiting, 0 in flight>"
    with pytest.raises(ValueError, match="transit is a number of seconds"):
        Limits(transit=-1)
