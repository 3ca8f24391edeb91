"""What stores with a writer thread have in common: operations are queued, and their results handed over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cachepipe.errors import StoreError
from cachepipe.stores.base import (
    Claim,
    Grant,
    Operation,
    PartlyApplied,
    ReleaseHold,
    ReleaseLease,
    Result,
)
from cachepipe.stores.writer import Writer


class Queued:
    """Applies operations on a writer thread."""

    _writer: Writer
    _closed: bool

    def _check(self) -> None:
        """Raise a ``StoreError`` if the store was closed."""
        raise NotImplementedError

    def apply(self, operations: Sequence[Operation]) -> asyncio.Future[list[Result]]:
        """Apply the operations on the writer thread, in one transaction with others that are queued."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Result]] = loop.create_future()

        def settle(results: list[Result | Exception] | Exception) -> None:
            if future.done():
                self._undo(operations, results)
                return
            if isinstance(results, Exception):
                future.set_exception(results)
            elif errors := [result for result in results if isinstance(result, Exception)]:
                whole = len(errors) == len(results)
                future.set_exception(errors[0] if whole else PartlyApplied(results))
            else:
                future.set_result(results)  # type: ignore[arg-type]  # none is an error

        def done(results: list[Result | Exception] | Exception) -> None:
            try:
                loop.call_soon_threadsafe(settle, results)
            except RuntimeError:  # the loop was closed, so the caller is gone
                self._undo(operations, results)

        try:
            self._check()
            self._writer.put(operations, done)
        except StoreError as error:
            future.set_exception(error)
        return future

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
        if back:
            self.apply_soon(back)

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations on the writer thread, in the background."""
        if not self._closed:
            self._check()
            self._writer.put(operations, lambda _results: None)
