"""What stores with a writer thread have in common: operations are queued, and their results handed over."""

from __future__ import annotations

import asyncio
import atexit
import queue
import weakref
from collections.abc import Sequence
from typing import Any

from cachepipe.errors import StoreError
from cachepipe.stores.base import (
    Claim,
    Grant,
    Operation,
    PartlyApplied,
    ReleaseHold,
    ReleaseLease,
    Reserve,
    Reserved,
    Result,
    Settle,
)
from cachepipe.stores.writer import Done, Writer

_opened: weakref.WeakSet[Queued] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Write what is still queued when the interpreter ends.

    This module is imported before those that queue something at the end, so this is called after them.
    """
    for store in list(_opened):
        store.close()


def error_in(results: Sequence[Result | Exception]) -> Exception | None:
    """Return the error of operations that were not all applied, or None."""
    errors = [result for result in results if isinstance(result, Exception)]
    if not errors:
        return None
    return errors[0] if len(errors) == len(results) else PartlyApplied(results)


class Queued:
    """Applies operations on a writer thread; it is closed when the interpreter ends."""

    _writer: Writer
    _closed: bool

    def _opens(self) -> None:
        """Note that the store is open."""
        _opened.add(self)

    def close(self) -> None:
        """Write what is queued, and release what the store opened itself."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raise a ``StoreError`` if the store was closed."""
        raise NotImplementedError

    def apply(self, operations: Sequence[Operation]) -> asyncio.Future[list[Result]]:
        """Apply the operations on the writer thread, in one transaction with others that are queued."""
        return self._awaited(self._writer, operations)

    def _awaited(self, writer: Writer, operations: Sequence[Operation]) -> asyncio.Future[list[Any]]:
        """Queue operations on a thread; return what their results are awaited with."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        try:
            self._check()
            writer.put(operations, self._settling(operations, future))
        except StoreError as error:
            future.set_exception(error)
        return future

    def _settling(self, operations: Sequence[Operation], future: asyncio.Future[list[Any]]) -> Done:
        """Return what gives the results of operations to a future of a loop, in whatever thread it is called.

        If nobody waits for them any more, claims are given back.
        """
        loop = future.get_loop()

        def settle(results: list[Any] | Exception) -> None:
            if future.done():
                self._undo(operations, results)
                return
            error = results if isinstance(results, Exception) else error_in(results)
            if error is None:
                future.set_result(results)  # type: ignore[arg-type]  # it is no error
            else:
                future.set_exception(error)

        def done(results: list[Any] | Exception) -> None:
            if asyncio._get_running_loop() is loop:  # noqa: SLF001 - the documented one raises
                settle(results)
                return
            try:
                loop.call_soon_threadsafe(settle, results)
            except RuntimeError:  # the loop was closed, so the caller is gone
                self._undo(operations, results)

        return done

    def apply_and_wait(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations on the writer thread, and wait for it; for programs without an event loop.

        Raises:
            StoreError: when they were not all applied.
        """
        self._check()
        found: queue.SimpleQueue[list[Result | Exception] | Exception] = queue.SimpleQueue()
        self._writer.put(operations, found.put)
        results = found.get()
        error = results if isinstance(results, Exception) else error_in(results)
        if error is not None:
            raise error
        return results  # type: ignore[return-value]  # none is an error

    def _undo(self, operations: Sequence[Operation], results: list[Result | Exception] | Exception) -> None:
        """Give back the grants of claimants that are gone."""
        if isinstance(results, Exception):
            return
        back: list[Operation] = []
        for operation, result in zip(operations, results, strict=True):
            if isinstance(operation, Claim) and isinstance(result, Grant):
                if result.mine:
                    back.append(ReleaseLease(operation.draw.key, result.mine))
                if result.held:
                    back.append(ReleaseHold(operation.draw, operation.token, result.held, complete=False))
            if isinstance(operation, Reserve) and isinstance(result, Reserved) and result.granted:
                back.append(Settle(operation.namespace, operation.call, 0))
        if back:
            self.apply_soon(back)

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations on the writer thread, in the background."""
        if not self._closed:
            self._check()
            self._writer.put(operations, lambda _results: None)
