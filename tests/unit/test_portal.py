"""The portal's loop: it outlives what its tasks raise, and nobody waits for a thread that has ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading

import pytest

from cachepipe.portal import in_portal, portal, promised, run_now, submit


class OddError(BaseException):
    """Neither an Exception, nor one of those that stop a loop."""


async def raised(error):
    await asyncio.sleep(0)
    raise error


@pytest.fixture
def dead():
    """Ends the portal's thread as a fault of its loop would."""

    def end():
        ended = threading.Event()
        loop = portal()
        closing = loop.close
        loop.close = lambda: (closing(), ended.set())
        loop.call_soon_threadsafe(loop.stop)
        assert ended.wait(20)
        return loop

    return end


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), OddError(), GeneratorExit()])
def test_what_a_task_raises_reaches_its_waiter_and_the_loop_goes_on(error):
    loop = portal()
    with pytest.raises(type(error)) as caught:
        in_portal(raised(error))
    assert caught.value is error
    assert in_portal(asyncio.sleep(0, "alive")) == "alive"
    assert portal() is loop


def test_an_exit_of_one_task_leaves_the_others_alone():
    gate = threading.Event()

    async def waits():
        await asyncio.to_thread(gate.wait)
        return "done"

    other = submit(waits())
    with pytest.raises(SystemExit):
        in_portal(raised(SystemExit(1)))
    gate.set()
    assert other.result(20) == "done"


def test_a_task_within_a_task_may_exit():
    async def outer():
        async with asyncio.TaskGroup() as group:
            group.create_task(raised(SystemExit(4)))

    with pytest.raises(SystemExit, match="4"):
        in_portal(outer())
    assert in_portal(asyncio.sleep(0, "alive")) == "alive"


def test_who_waits_for_a_thread_that_has_ended_gets_an_error_and_the_next_call_another_thread(dead):
    begun = threading.Event()

    async def waits():
        begun.set()
        await asyncio.Event().wait()

    waiting = submit(waits())
    assert begun.wait(20)
    old = dead()
    with pytest.raises(RuntimeError, match="make the call again"):
        waiting.result(20)
    assert in_portal(asyncio.sleep(0, "alive")) == "alive"
    assert portal() is not old


def test_what_is_promised_by_a_loop_that_has_ended_fails_at_once(dead):
    late = concurrent.futures.Future()
    promised(late, dead())
    with pytest.raises(RuntimeError, match="has ended"):
        late.result(0)


def test_the_loops_own_thread_does_not_wait_for_itself():
    async def waits():
        in_portal(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="await the asynchronous method"):
        in_portal(waits())


def test_a_coroutine_function_that_never_waits_becomes_a_plain_function():
    async def half(number):
        return number // 2

    async def quarter(number):
        return await half(await half(number))

    plain = run_now(quarter)
    assert plain(12) == 3
    assert plain.__name__ == "quarter"
    assert not inspect.iscoroutinefunction(inspect.unwrap(plain))
    with pytest.raises(TypeError, match="unsupported operand"):
        plain("12")


def test_a_coroutine_function_that_waits_is_refused():
    cleaned = []

    async def waits():
        try:
            await asyncio.sleep(0)
        finally:
            cleaned.append(True)

    with pytest.raises(RuntimeError, match="waits waits, which only an asynchronous client may"):
        run_now(waits)()
    assert cleaned
