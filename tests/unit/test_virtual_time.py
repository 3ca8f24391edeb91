"""The event loop whose time jumps."""

import asyncio
import time

import pytest

from cachepipe.testing import VirtualTimeLoop, loop


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def test_an_hour_takes_no_time_and_timers_end_in_their_order():
    ended = []

    async def sleeps(seconds):
        await asyncio.sleep(seconds)
        ended.append((seconds, asyncio.get_running_loop().time()))

    async def main():
        await asyncio.gather(*map(sleeps, (3600, 0.5, 7)))

    began = time.monotonic()
    run(main)
    assert ended == [(0.5, 0.5), (7, 7), (3600, 3600)]
    assert time.monotonic() - began < 60


def test_time_passes_in_turns_too_if_they_take_time():
    async def main():
        timer, turns = asyncio.ensure_future(asyncio.sleep(0.01)), 0
        while not timer.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(turn=0.001)) as runner:
        assert 9 <= runner.run(main()) <= 13


def test_a_thread_is_waited_for_and_takes_no_virtual_time():
    async def main():
        done = await asyncio.to_thread(lambda: "done")
        return done, asyncio.get_running_loop().time()

    assert run(main) == ("done", 0)


def test_a_thread_may_act_before_a_distant_timer():
    async def main():
        async with asyncio.timeout(86400):
            await asyncio.to_thread(lambda: None)

    run(main)


def test_what_would_wait_for_ever_is_an_error(monkeypatch):
    monkeypatch.setattr(loop, "_PATIENCE", 0)

    async def main():
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        with pytest.raises(RuntimeError, match="no timer is left"):
            runner.run(main())
        monkeypatch.undo()
