"""What several unit tests share."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe.testing import VirtualTimeLoop


@pytest.fixture(scope="session")
def run():
    """A function that runs a coroutine function on a loop that never waits for a timer."""

    def run_in_no_time(main):
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main())

    return run_in_no_time
