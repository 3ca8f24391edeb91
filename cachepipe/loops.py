"""The event loop that the asynchronous parts run on."""

from __future__ import annotations

import asyncio


def running() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        RuntimeError: when no asyncio loop runs here, as under trio.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "this part of cachepipe needs asyncio, and no asyncio event loop runs here; is this trio? Start "
            "the program with asyncio.run(...) or anyio.run(..., backend='asyncio'), or use a synchronous "
            "client in a thread, as by trio.to_thread.run_sync(...)"
        ) from None
