"""Functions over many inputs: order, bounds, errors."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachepipe import alcall, lcall, parallel, using
from cachepipe.context import current

pytestmark = pytest.mark.anyio


async def test_results_come_in_the_order_of_inputs_whatever_ends_first():
    gates = [asyncio.Event() for _ in range(4)]

    async def work(number):
        await gates[number].wait()
        if number:
            gates[number - 1].set()
        return number * 10

    gates[3].set()
    assert await alcall(range(4), work) == [0, 10, 20, 30]


async def test_no_more_than_so_many_are_under_way():
    running, most = 0, 0

    async def work(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await alcall(range(50), work, max_concurrent=7)
    assert most == 7


async def test_functions_that_are_not_asynchronous_are_called_as_well_and_get_what_else_is_given():
    assert await alcall([1, 2], lambda number, by: number * by, by=3) == [3, 6]
    assert await alcall([], lambda number: number) == []


@pytest.mark.parametrize("call", ["alcall", "lcall", "lcall in threads"])
async def test_errors_come_as_values_when_asked_for(call):
    def work(number):
        return 1 // number

    options = {"return_exceptions": True}
    if call == "alcall":
        results = await alcall([1, 0, -1], work, **options)
    else:
        results = lcall([1, 0, -1], work, **options, max_concurrent=3 if "threads" in call else 1)
    assert (results[0], results[2]) == (1, -1)
    assert isinstance(results[1], ZeroDivisionError)


async def test_after_an_error_nothing_more_is_begun_and_what_is_under_way_ends():
    begun, ended = [], []

    async def work(number):
        begun.append(number)
        if number == 1:
            raise ValueError(number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended.append(number)

    with pytest.raises(ValueError, match="1"):
        await alcall(range(100), work, max_concurrent=3)
    assert sorted([*ended, 1]) == sorted(begun)
    assert len(begun) < 10


async def test_the_first_error_in_order_is_raised():
    second = asyncio.Event()

    async def work(number):
        if number == 0:
            await second.wait()
        second.set()
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        await alcall([0, 1], work)


async def test_what_is_answered_at_once_does_not_keep_the_loop():
    """Thousands of hits in a row: others have their turns, and a cancellation is heard."""
    done = []

    async def hit(item):
        done.append(item)

    calling_all = asyncio.ensure_future(alcall(range(1000), hit, max_concurrent=10))
    for _ in range(5):
        await asyncio.sleep(0)
    assert 0 < len(done) < 1000
    calling_all.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling_all
    assert len(done) < 1000


async def test_a_cancelled_call_cancels_what_is_under_way():
    cancelled, begun = [], asyncio.Event()

    async def work(number):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    task = asyncio.create_task(alcall([1, 2], work))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(cancelled) == [1, 2]


def test_lcall_stays_in_the_callers_thread_unless_several_are_wanted_at_once():
    assert set(lcall(range(3), lambda _: threading.current_thread())) == {threading.current_thread()}
    meet = threading.Barrier(3, timeout=10)

    def work(number):
        meet.wait()
        return number, current().namespace

    with using(namespace="ns"):
        assert lcall(range(3), work, max_concurrent=3) == [(0, "ns"), (1, "ns"), (2, "ns")]
    assert lcall([], work, max_concurrent=3) == []


def test_after_an_interrupt_nothing_more_is_begun_in_threads(monkeypatch):
    """What is under way ends; the pool would otherwise wait for all that is left."""
    under_way, released, begun = threading.Semaphore(0), threading.Event(), []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *args, **named):
            released.set()
            super().shutdown(*args, **named)

    def interrupted(_):
        for _ in range(2):
            under_way.acquire()
        raise KeyboardInterrupt

    def call(item):
        begun.append(item)
        under_way.release()
        released.wait()

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(parallel, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lcall(range(100), call, max_concurrent=2)
    assert sorted(begun) == [0, 1]


def test_an_asynchronous_function_is_not_for_lcall():
    """It would return what nobody awaits."""

    async def ask(item):
        return item

    with pytest.raises(TypeError, match="await alcall for ask"):
        lcall([1, 2], ask)


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        lcall([1, 0], lambda number: 1 // number, max_concurrent=2)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, None])
async def test_a_bound_that_is_none_is_refused(most):
    with pytest.raises(ValueError, match="max_concurrent is a whole number"):
        await alcall([1], print, max_concurrent=most)
    with pytest.raises(ValueError, match="max_concurrent is a whole number"):
        lcall([1], print, max_concurrent=most)


async def test_a_bar_is_shown_where_somebody_looks(monkeypatch, capsys):
    await alcall([1], lambda number: number, show_progress=True)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def doubled(number):
        return number * 2

    assert lcall([1, 2], doubled, show_progress=True) == [2, 4]
    assert "doubled" in capsys.readouterr().err


@pytest.mark.parametrize("return_exceptions", [True, False])
async def test_a_function_whose_own_work_was_cancelled_has_failed(return_exceptions):
    """It is no result that is None, and the other inputs have theirs."""

    async def work(number):
        if number == 1:
            raise asyncio.CancelledError
        return number

    call = alcall(range(4), work, max_concurrent=1, return_exceptions=return_exceptions)
    if return_exceptions:
        results = await call
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert isinstance(results[1], asyncio.CancelledError)
    else:
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_who_is_cancelled_stops_what_is_under_way():
    begun, stopped = asyncio.Event(), []

    async def work(number):
        if number == 1:
            begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(number)
            raise

    task = asyncio.create_task(alcall(range(9), work, max_concurrent=2, return_exceptions=True))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(stopped) == [0, 1]


class OddError(BaseException):
    """Neither an Exception, nor one of those that stop a loop."""


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt(), OddError()])
@pytest.mark.parametrize("most", [1, 3])
def test_lcall_raises_what_is_no_exception_and_begins_nothing_more(error, return_exceptions, most):
    called = []

    def work(number):
        called.append(number)
        if number == 1:
            raise error
        return number

    with pytest.raises(type(error)) as caught:
        lcall(range(10_000), work, max_concurrent=most, return_exceptions=return_exceptions)
    assert caught.value is error
    assert len(called) < 10_000


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize("error", [SystemExit(7), OddError(), GeneratorExit()])
def test_alcall_raises_what_is_no_exception_as_it_is(error, return_exceptions):
    async def work(number):
        if number == 1:
            raise error
        await asyncio.Event().wait()

    with pytest.raises(type(error)) as caught:
        asyncio.run(alcall(range(5), work, return_exceptions=return_exceptions))
    assert caught.value is error
