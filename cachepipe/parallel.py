"""Applies a function to many inputs concurrently: results in order, errors raised or returned."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from cachepipe import loops, progress
from cachepipe.context import INHERITED, Inherited, using
from cachepipe.typedefs import Ordered

_AT_ONCE = 100


async def alcall(
    inputs: Iterable[Any],
    func: Callable[..., Any],
    *,
    max_concurrent: int = _AT_ONCE,
    return_exceptions: bool = False,
    show_progress: bool = False,
    ordered: Ordered | Inherited = INHERITED,
    **kwargs: Any,
) -> list[Any]:
    """Return ``[await func(item, **kwargs) for each input]``, in order, run concurrently.

    A synchronous function is called too, on this loop.

    Args:
        inputs: the inputs.
        func: the function.
        max_concurrent: the largest number of concurrent calls.
        return_exceptions: return errors in the places of results. Otherwise no further call begins after an
            error, the calls under way are awaited, and the first of their errors in order is raised. An
            exception that is not an ``Exception``, such as ``SystemExit``, is always raised, and cancels the
            calls under way.
        show_progress: show a bar on a terminal or in a notebook.
        ordered: hand over the answers of the function's asynchronous clients in the order of the first run
            (see ``cachepipe.using``).
        kwargs: passed to the function.
    """
    loops.running()  # fails without a loop
    calls = _Calls(inputs, max_concurrent, return_exceptions=return_exceptions)
    bar = progress.shown(len(calls.results), _name(func), show=show_progress)
    with bar as tick, using(ordered=ordered):

        async def work() -> None:
            for place, item in calls.left:
                try:
                    result = func(item, **kwargs)
                    calls.results[place] = await result if inspect.isawaitable(result) else result
                except Exception as error:  # noqa: BLE001 - it is a result, or raised at the end
                    calls.fail(place, error)
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    calls.fail(place, error)  # something that it waited for was cancelled
                tick(failed=place in calls.failed)
                await asyncio.sleep(0)  # calls that return at once give way to other tasks

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(calls.workers):
                    group.create_task(work())
        except BaseExceptionGroup as raised:  # from a function; not an Exception
            raise raised.exceptions[0] from None
    return calls.outcome()


def lcall(
    inputs: Iterable[Any],
    func: Callable[..., Any],
    *,
    max_concurrent: int = 1,
    return_exceptions: bool = False,
    show_progress: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Return ``[func(item, **kwargs) for each input]``, in order; concurrent calls run in threads.

    Args:
        inputs: the inputs.
        func: the function; with ``max_concurrent=1`` it is called in the caller's thread.
        max_concurrent: the largest number of concurrent calls.
        return_exceptions: return errors in the places of results. Otherwise no further call begins after an
            error, the calls under way are awaited, and the first of their errors in order is raised. An
            exception that is not an ``Exception``, such as ``SystemExit``, is always raised, when the calls
            under way have ended.
        show_progress: show a bar on a terminal or in a notebook.
        kwargs: passed to the function.

    Raises:
        TypeError: for an asynchronous function, which `alcall` calls.
    """
    if inspect.iscoroutinefunction(func):
        raise TypeError(f"lcall calls functions that are not asynchronous; await alcall for {_name(func)}")
    calls = _Calls(inputs, max_concurrent, return_exceptions=return_exceptions)
    with progress.shown(len(calls.results), _name(func), show=show_progress) as tick:

        def work() -> None:
            for place, item in calls.left:
                try:
                    calls.results[place] = func(item, **kwargs)
                except Exception as error:  # noqa: BLE001 - it is a result, or raised at the end
                    calls.fail(place, error)
                except BaseException:
                    calls.stop()
                    raise
                tick(failed=place in calls.failed)

        if max_concurrent == 1:
            work()
        else:
            with ThreadPoolExecutor(calls.workers or 1, "cachepipe-lcall") as pool:
                begun = [pool.submit(contextvars.copy_context().run, work) for _ in range(calls.workers)]
                try:
                    wait(begun)
                finally:
                    calls.stop()  # also after a keyboard interrupt
            for thread in begun:
                thread.result()  # raises what a function raised that is not an Exception
    return calls.outcome()


class _Calls:
    """The calls of a function: the inputs that are left, and the results.

    Attributes:
        left: iterates over the places and inputs of the calls to begin, in any thread: its step is atomic.
        workers: the number of workers that begin calls.
        failed: the errors by their places.
    """

    def __init__(self, inputs: Iterable[Any], max_concurrent: int, *, return_exceptions: bool) -> None:
        if isinstance(max_concurrent, bool) or not isinstance(max_concurrent, int) or max_concurrent < 1:
            raise ValueError(f"max_concurrent is a whole number, at least 1; got {max_concurrent!r}")
        items = list(inputs)
        self.left = enumerate(items)
        self.results: list[Any] = [None] * len(items)
        self.workers = min(max_concurrent, len(items))
        self.failed: dict[int, BaseException] = {}
        self._returns = return_exceptions

    def fail(self, place: int, error: BaseException) -> None:
        """Note an error as the result of a call; no further call begins if it will be raised."""
        self.results[place] = self.failed[place] = error
        if not self._returns:
            self.stop()

    def stop(self) -> None:
        """Begin no further call."""
        for _ in self.left:
            pass

    def outcome(self) -> list[Any]:
        """Return the results, or raise the first error in order."""
        if self.failed and not self._returns:
            raise self.failed[min(self.failed)]
        return self.results


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", type(func).__name__)
