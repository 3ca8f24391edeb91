"""One event loop in a thread of its own, for calls from threads that have none.

The thread is a daemon: samples are durable before anyone sees them, so nothing is lost when the interpreter
exits, and until then every thread can use it, whether a loop of its own runs there or not.

A task that raises ``SystemExit`` or ``KeyboardInterrupt`` stops its loop. Here the exception reaches the
caller that waits for the task, and the loop goes on for the others. If the thread ends all the same, those
who wait get an error, and the next call starts another thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_promised: set[concurrent.futures.Future[Any]] = set()
"""What is awaited of the loop; it fails when the loop's thread ends."""


def portal() -> asyncio.AbstractEventLoop:
    """Return the loop; the first caller starts it."""
    global _loop  # noqa: PLW0603 - there is one loop for the process
    if _loop is not None:
        return _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="cachepipe-portal", daemon=True).start()
            _loop = loop
        return _loop


def promised(future: concurrent.futures.Future[T], loop: asyncio.AbstractEventLoop) -> None:
    """Have a future fail if the thread of this loop ends before the future is done."""
    _promised.add(future)
    future.add_done_callback(_promised.discard)
    if loop is not _loop:
        _fail(future)


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Return a future of what a coroutine returns on the loop.

    Raises:
        RuntimeError: when the interpreter is exiting, so that the loop runs no more.
    """
    if sys.is_finalizing():
        work.close()
        raise RuntimeError("the interpreter is exiting, and makes no calls any more; close clients before")
    loop = portal()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    promised(future, loop)
    return future


def in_portal(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns on the loop; this thread waits for it.

    Raises:
        RuntimeError: when this is the loop's own thread, which would wait for itself.
    """
    check_elsewhere(work)
    future = submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def check_elsewhere(work: Coroutine[Any, Any, Any]) -> None:
    """Refuse to wait for a coroutine in the loop's own thread.

    Raises:
        RuntimeError: when this is that thread.
    """
    if _loop is not None and asyncio._get_running_loop() is _loop:  # noqa: SLF001 - the documented one raises
        work.close()
        raise RuntimeError(
            "this would wait for the loop that it runs on; await the asynchronous twin instead"
        )


def _run(loop: asyncio.AbstractEventLoop) -> None:
    global _loop  # noqa: PLW0603 - as above
    try:
        while True:
            try:
                loop.run_forever()
            except (KeyboardInterrupt, SystemExit):  # of a task, whose future has it
                continue
            break
    finally:
        _loop = None
        for future in list(_promised):
            _fail(future)
        with contextlib.suppress(Exception):  # it is of no use any more
            loop.close()


def _fail(future: concurrent.futures.Future[Any]) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was done meanwhile
        future.set_exception(
            RuntimeError(
                "the thread of cachepipe's event loop has ended during this call; make the call again"
            )
        )


def _after_fork() -> None:
    """Let a forked child start a loop of its own: it inherits no threads."""
    global _lock, _loop, _promised  # the parent may have held the lock, and runs the loop
    _lock, _loop, _promised = threading.Lock(), None, set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
