"""What several unit tests share."""

from __future__ import annotations

import asyncio
import selectors

import pytest


class Selector(selectors.SelectSelector):
    loop = None

    def select(self, timeout=None):
        assert timeout is not None, "everything waits for something that will never happen"
        self.loop.now += max(timeout, 0)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing else is left to do."""

    def __init__(self):
        self.now = 0.0
        selector = Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now


@pytest.fixture(scope="session")
def run():
    """A function that runs a coroutine function on a loop that never waits for a timer."""

    def run_in_no_time(main):
        with asyncio.Runner(loop_factory=Loop) as runner:
            return runner.run(main())

    return run_in_no_time
