"""One event loop in a thread of its own, for calls from threads that have none.

It is a daemon: samples are durable before anyone sees them, so nothing is lost when the interpreter exits,
and until then every thread can use it, whether a loop of its own runs there or not.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def portal() -> asyncio.AbstractEventLoop:
    """Return the loop, started by the first who needs it."""
    global _loop  # noqa: PLW0603 - there is one loop for the process
    if _loop is not None:
        return _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="cachepipe-portal", daemon=True).start()
            _loop = loop
        return _loop


def in_portal(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine does on the loop, waiting for it in this thread."""
    future = asyncio.run_coroutine_threadsafe(work, portal())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _after_fork() -> None:
    """Let a forked child start a loop of its own: it inherits no threads."""
    global _lock, _loop  # the parent may have held the one, and runs the other
    _lock, _loop = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
