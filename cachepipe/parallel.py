"""Applies a function to many inputs concurrently: results in order, errors raised or returned."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from cachepipe import loops, progress

_AT_ONCE = 100


async def alcall(
    inputs: Iterable[Any],
    func: Callable[..., Any],
    *,
    max_concurrent: int = _AT_ONCE,
    return_exceptions: bool = False,
    show_progress: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Return ``[await func(item, **kwargs) for each input]``, in order, run concurrently.

    A synchronous function is called too, on this loop.

    Args:
        inputs: the inputs.
        func: the function.
        max_concurrent: how many inputs are under way at once at most.
        return_exceptions: put an error in the place of its result; otherwise no further input is begun after
            an error, those under way are awaited, and the first of their errors in order is raised. What is
            no ``Exception``, such as ``SystemExit``, is always raised, and what is under way is cancelled.
        show_progress: show a bar on a terminal or in a notebook.
        kwargs: passed to the function.
    """
    _check(max_concurrent)
    loops.running()  # its tasks need one
    items = list(inputs)
    results: list[Any] = [None] * len(items)
    failed: dict[int, BaseException] = {}
    places = iter(range(len(items)))
    with progress.shown(len(items), _name(func), show=show_progress) as tick:

        async def work() -> None:
            for place in places:
                try:
                    result = func(items[place], **kwargs)
                    results[place] = await result if inspect.isawaitable(result) else result
                except Exception as error:  # noqa: BLE001 - it is a result, or raised at the end
                    results[place] = failed[place] = error
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    results[place] = failed[place] = error  # of something that it waited for
                tick(failed=place in failed)
                if failed and not return_exceptions:
                    return
                await asyncio.sleep(0)  # what is answered at once lets others have their turns, too

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(max_concurrent, len(items))):
                    group.create_task(work())
        except BaseExceptionGroup as raised:  # by a function, and no Exception
            raise raised.exceptions[0] from None
    if failed and not return_exceptions:
        raise failed[min(failed)]
    return results


def lcall(
    inputs: Iterable[Any],
    func: Callable[..., Any],
    *,
    max_concurrent: int = 1,
    return_exceptions: bool = False,
    show_progress: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Return ``[func(item, **kwargs) for each input]``, in order; several at once go to threads.

    Args:
        inputs: the inputs.
        func: the function; it is called in the caller's thread when one is under way at a time.
        max_concurrent: how many inputs are under way at once at most.
        return_exceptions: put an error in the place of its result; otherwise no further input is begun after
            an error, those under way are awaited, and the first of their errors in order is raised. What is
            no ``Exception``, such as ``SystemExit``, is always raised, once those under way have ended.
        show_progress: show a bar on a terminal or in a notebook.
        kwargs: passed to the function.

    Raises:
        TypeError: for an asynchronous function, which `alcall` calls.
    """
    _check(max_concurrent)
    if inspect.iscoroutinefunction(func):
        raise TypeError(f"lcall calls functions that are not asynchronous; await alcall for {_name(func)}")
    items = list(inputs)
    results: list[Any] = [None] * len(items)
    failed: dict[int, BaseException] = {}
    places = iter(range(len(items)))
    stopped = False
    with progress.shown(len(items), _name(func), show=show_progress) as tick:

        def work() -> None:
            nonlocal stopped
            for place in places:  # the step of a range's iterator is atomic
                if stopped:
                    return
                try:
                    results[place] = func(items[place], **kwargs)
                except Exception as error:  # noqa: BLE001 - it is a result, or raised at the end
                    results[place] = failed[place] = error
                except BaseException:
                    stopped = True
                    raise
                tick(failed=place in failed)
                if failed and not return_exceptions:
                    return

        if max_concurrent == 1:
            work()
        else:
            with ThreadPoolExecutor(min(max_concurrent, len(items)) or 1, "cachepipe-lcall") as pool:
                begun: list[Future[None]] = [
                    pool.submit(contextvars.copy_context().run, work)
                    for _ in range(min(max_concurrent, len(items)))
                ]
                try:
                    wait(begun)
                finally:
                    stopped = True  # such as by a keyboard interrupt
            for thread in begun:
                thread.result()  # raises what a function raised that is no Exception
    if failed and not return_exceptions:
        raise failed[min(failed)]
    return results


def _check(max_concurrent: int) -> None:
    if isinstance(max_concurrent, bool) or not isinstance(max_concurrent, int) or max_concurrent < 1:
        raise ValueError(f"max_concurrent is a whole number, at least 1; got {max_concurrent!r}")


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", type(func).__name__)
