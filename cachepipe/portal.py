"""One event loop in a thread of its own, for calls from threads without a loop.

The thread is a daemon: samples are durable before anyone sees them, so nothing is lost when the interpreter
exits. Until then every thread can use it, even if another loop runs in that thread.

A task that raises ``SystemExit`` or ``KeyboardInterrupt`` normally stops its loop. Here the exception reaches
the caller that waits for the task, and the loop continues for the others. If the thread ends nevertheless,
its callers get an error, and the next call starts another thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_promised: set[concurrent.futures.Future[Any]] = set()
"""The futures that callers await; they fail when the loop's thread ends."""


def portal() -> asyncio.AbstractEventLoop:
    """Return the loop; the first call starts it."""
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
    """Make a future fail if the thread of this loop ends before the future is done."""
    _promised.add(future)
    future.add_done_callback(_promised.discard)
    if loop is not _loop:
        _fail(future)


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine on the loop and return a future of its result.

    Raises:
        RuntimeError: when the interpreter is exiting, so that the loop has stopped.
    """
    if sys.is_finalizing():
        work.close()
        raise RuntimeError("the interpreter is exiting, and makes no calls any more; close clients before")
    loop = portal()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    promised(future, loop)
    return future


def in_portal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop, wait for it in this thread, and return its result.

    Raises:
        RuntimeError: when this is the loop's own thread.
    """
    check_elsewhere(work)
    future = submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def run_now(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Make a plain function of a coroutine function that awaits only what is there already."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        work = function(*arguments, **options)
        try:
            work.send(None)
        except StopIteration as end:
            return end.value
        work.close()
        raise RuntimeError(f"{function.__qualname__} waits, which only an asynchronous client may")

    del run.__wrapped__  # tools that unwrap functions would take this for a coroutine function
    return run


def check_elsewhere(work: Coroutine[Any, Any, Any]) -> None:
    """Raise an error in the loop's own thread, which must not wait for itself.

    Raises:
        RuntimeError: when this is that thread.
    """
    if _loop is not None and asyncio._get_running_loop() is _loop:  # noqa: SLF001 - the documented one raises
        work.close()
        raise RuntimeError(
            "this would wait for the loop that it runs on; await the asynchronous method instead"
        )


def _run(loop: asyncio.AbstractEventLoop) -> None:
    global _loop  # noqa: PLW0603 - as above
    try:
        while True:
            try:
                loop.run_forever()
            except (KeyboardInterrupt, SystemExit):  # a task raised it, and its caller gets it
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
    """Reset the portal in a forked child, which inherits no threads and starts a loop of its own."""
    global _lock, _loop, _promised  # the parent may have held the lock, and runs the loop
    _lock, _loop, _promised = threading.Lock(), None, set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
