"""One event loop's write queue: operations of one turn are written in one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

from cachepipe import forks
from cachepipe.cache.calls import Caller, Demand, withdraw
from cachepipe.cache.turns import Line
from cachepipe.errors import StoreError, StoreUnavailable
from cachepipe.gathering import Gathering
from cachepipe.loops import own_handles
from cachepipe.stores.base import Claim, Commit, Grant, Operation, PartlyApplied, Store

MANY = 1000
"""If a draw has more samples than this, the store's thread even reads them."""
_BYTES = 1 << 20  # the largest weight of operations that the loop's own thread writes at once
_LOOK = 0.01  # seconds between looks at samples that other processes generate
_INLINE = 128  # operations that may be written on the loop's own thread at once


class _Queued(NamedTuple):
    """An operation that is to be performed.

    Attributes:
        operation: the operation.
        done: gets its result.
        arguments: the first arguments of ``done``.
        lacking: is called if the samples of a claim turn out to be missing before it is granted.
    """

    operation: Operation
    done: Callable[..., None]
    arguments: tuple[Any, ...]
    lacking: Callable[[], None] | None


def _weight(operation: Operation) -> int:
    """Return about how many bytes an operation makes the store read or write."""
    if type(operation) is Commit:
        return len(operation.payload)
    return operation.n * 1000 if type(operation) is Claim else 0


class _Turn:
    """A queue's turn on its loop. If the loop is closed before the turn, the queue writes without a loop."""

    __slots__ = ("_queue",)

    def __init__(self, queue: WriteQueue) -> None:
        self._queue: WriteQueue | None = queue

    def __call__(self) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.flush()

    def __del__(self) -> None:
        if self._queue is not None:
            self._queue.rescue()


class WriteQueue:
    """One event loop's write queue: operations of one turn are written in one transaction."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: Store,
        caller: Caller,
        start: Callable[[Caller, list[Demand]], None],
        line: Line,
    ) -> None:
        """Make one; ``start`` begins the calls for demands, and ``line`` is that of the loop and store."""
        self.loop = loop
        self.caller = caller
        self.line = line
        self.demands: Gathering[Demand] = Gathering(loop, self._ask)
        """The demands to ask the model for at the end of this turn, or of the window."""
        self._held: dict[Hashable, list[Demand]] = {}
        self.delayed: dict[Demand, float] = {}
        """The demands, with their windows, that wait until other requests have been answered (C11)."""
        self.strangers: dict[Any, None] = {}
        """The draws that await samples from other processes, in order."""
        self.writes: set[asyncio.Future[list[Any]]] = set()
        self.store = store
        self._start = start
        self._operations: deque[_Queued] = deque()
        self._claiming: dict[Hashable, int] = {}  # how many draws of a key are queued
        self._sent: list[list[_Queued]] = []
        self._first: object = None
        self._at_once = False
        self._handles = own_handles(loop)
        self.fork = forks.count

    def soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on this queue's loop: now if that loop is the running one, else soon."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - the documented one raises
            function(*arguments)
            return
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there any more
            self.loop.call_soon_threadsafe(function, *arguments)

    def put(
        self,
        operation: Operation,
        done: Callable[..., None],
        *arguments: Any,
        lacking: Callable[[], None] | None = None,
    ) -> None:
        """Queue an operation for the end of this turn.

        Args:
            operation: the operation.
            done: gets its result or error as last argument.
            arguments: the first arguments of ``done``.
            lacking: is called if the samples of a claim turn out to be missing before it is granted.
        """
        self._operations.append(_Queued(operation, done, arguments, lacking))
        if type(operation) is Claim:
            key = operation.draw.key
            self._claiming[key] = self._claiming.get(key, 0) + 1
        if len(self._operations) == 1:
            with contextlib.suppress(RuntimeError):  # the loop is closed: this is the last chance
                self.loop.call_soon(_Turn(self))

    def claim_now(self, claim: Claim) -> Grant | Exception | None:
        """Claim at once; return the grant or the error, or None if a lock is in the way."""
        try:
            results: list[Any] | None = self.store.apply_now([claim])
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
            return error
        return None if results is None else results[0]

    def tell_now(self, done: Callable[..., None], result: Any) -> None:
        """Pass on a result that was there at once: demands that follow from it may wait for others."""
        self._at_once = True
        self._tell(done, (), result)
        self._at_once = False

    def want(self, *demands: Demand, window: float = 0.0) -> None:
        """Ask for samples at the end of the window; by default when the claims of this turn are granted."""
        self.demands.add(*demands, window=window, turns=2 if self._at_once else 1)

    def want_delayed(self) -> None:
        """Ask for the samples that were delayed."""
        delayed, self.delayed = self.delayed, {}
        for demand, window in delayed.items():
            self.want(demand, window=window)

    def withdraw(self, demand: Demand) -> None:
        """Give a demand up, unless others wait for its samples."""
        withdraw(demand)
        if demand in self.delayed and not demand.wanted:
            del self.delayed[demand]
            demand.fail(demand.slots, None)

    def alone(self) -> bool:
        """Return True if only the running task has made requests in this turn of the loop."""
        if self._operations:
            return False
        task = asyncio.current_task(self.loop)
        if self._first is None:
            self._first = task
            self._handles.call_soon(self._turned)
        return self._first is task

    def gather(self) -> None:
        """Claim all requests of this turn together, although one task makes them."""
        if self._first is None:
            self._handles.call_soon(self._turned)
        self._first = self

    def _turned(self) -> None:
        self._first = None

    def flush(self) -> None:
        """Write the queued operations: inline, some per turn of the loop, or on the store's thread."""
        batch = self._take(_INLINE)
        if not batch:
            return
        try:
            self._write(batch)
        finally:
            if self._operations:  # after the calls for samples that were granted just now
                self.loop.call_soon(_Turn(self))

    def _take(self, most: int | None = None) -> list[_Queued]:
        """Take operations from the queue; release demands that waited for a last claim of their question."""
        queue = self._operations
        batch = [queue.popleft() for _ in range(len(queue) if most is None else min(most, len(queue)))]
        for item in batch:
            if type(claim := item.operation) is not Claim:
                continue
            key = claim.draw.key
            left = self._claiming.pop(key) - 1
            if left:
                self._claiming[key] = left
            elif key in self._held:
                self.want(*self._held.pop(key))
        return batch

    def rescue(self) -> None:
        """Write the queued operations without a loop, except claims: nobody is left to use them."""
        items = list(self._operations)  # until they are written: what they reserve ends after them
        left = [item.operation for item in items if type(item.operation) is not Claim]
        self._operations.clear()
        self._claiming.clear()
        self._held.clear()
        if not left or self.fork != forks.count:
            return
        if sys.is_finalizing():  # no thread can be started any more
            with contextlib.suppress(Exception):  # nobody is left to be told
                self.store.apply_now(left)
        else:
            self.store.apply_soon(left)

    def _write(self, batch: list[_Queued]) -> None:
        try:
            operations = [item.operation for item in batch]
            light = sum(map(_weight, operations)) <= _BYTES
            results = self.store.apply_now(operations) if light else None
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
            if len(batch) == 1:
                self._tell(batch[0].done, batch[0].arguments, error)
                return
            results = None  # one operation is invalid: write the others without it
        if results is None:
            batch += self._take()
            batch = [item for item in batch if not self._recalled(item)]
            if batch := self._look(batch):
                self._hand_over(batch)
            return
        for item, result in zip(batch, results, strict=True):
            self._tell(item.done, item.arguments, result)

    def _tell(self, done: Callable[..., None], arguments: tuple[Any, ...], result: Any) -> None:
        """Pass a result on; an error here must not keep other results from their callers."""
        try:
            done(*arguments, result)
        except Exception as error:  # noqa: BLE001 - reported, and its draw has failed already
            self.loop.call_exception_handler(
                {"message": "cachepipe could not pass on a result of its store", "exception": error}
            )

    def _recalled(self, item: _Queued) -> bool:
        """Answer a claim that needs no writing, so that a hit does not wait for another writer."""
        if not _may_be_known(item.operation):
            return False
        try:
            grant = self.store.recall(item.operation.draw, item.operation.n)
        except StoreError:
            return False  # the claim will say so
        if grant is not None:
            self._tell(item.done, item.arguments, grant)
        return grant is not None

    def _look(self, batch: list[_Queued]) -> list[_Queued]:
        """Look what the store has for claims; return what is to be written at once.

        While answers wait for claims, each would hold up these answers, and so the next claims, until it is
        written.
        """
        claims: list[_Queued] = []
        others: list[_Queued] = []
        for item in batch:
            (claims if _may_be_known(item.operation) else others).append(item)
        if not claims:
            return batch
        urgent = self.line.is_crowded and any(item.lacking is not None for item in claims)
        looked = self.store.look([item.operation for item in claims], urgent=urgent)  # type: ignore[misc]  # all are claims
        if looked is None:
            return batch
        self._sent.append(claims)
        self.writes.add(looked)
        looked.add_done_callback(partial(self._looked, claims))
        return others

    def _looked(self, claims: list[_Queued], looked: asyncio.Future[list[Grant | bool]]) -> None:
        self._sent.remove(claims)
        self.writes.discard(looked)
        if looked.cancelled():
            return
        error = looked.exception()
        if isinstance(error, StoreUnavailable):  # it was waited for
            for item in claims:
                self._tell(item.done, item.arguments, error)
            return
        found = [True] * len(claims) if error else looked.result()  # the claims will raise it
        left: list[_Queued] = []
        for item, grant in zip(claims, found, strict=True):
            if isinstance(grant, Grant):
                self._tell(item.done, item.arguments, grant)
                continue
            if not grant and item.lacking is not None:
                item.lacking()
            left.append(item)
        if left:
            self._hand_over(left)

    def _hand_over(self, batch: list[_Queued]) -> None:
        """Pass a batch to the store's thread now: a loop that is ending may not begin tasks any more."""
        written = asyncio.ensure_future(self.store.apply([item.operation for item in batch]), loop=self.loop)
        self._sent.append(batch)
        self.writes.add(written)
        written.add_done_callback(partial(self._written, batch))

    def _written(self, batch: list[_Queued], written: asyncio.Future[list[Any]]) -> None:
        self._sent.remove(batch)
        self.writes.discard(written)
        if written.cancelled():
            return
        error = written.exception()
        if error is None:
            results: list[Any] = list(written.result())
        elif isinstance(error, PartlyApplied):
            results = list(error.results)
        elif len(batch) > 1 and not isinstance(error, StoreUnavailable):
            for item in batch:  # one operation is invalid: write the others without it
                self._hand_over([item])
            return
        else:
            results = [error] * len(batch)
        for item, result in zip(batch, results, strict=True):
            self._tell(item.done, item.arguments, result)

    def _ask(self, demands: list[Demand]) -> None:
        """Begin the calls for demands. A demand waits while claims for the same question are queued."""
        now = []
        for demand in demands:
            if demand.group in self._claiming:
                self._held.setdefault(demand.group, []).append(demand)
            else:
                now.append(demand)
        self._start(self.caller, now)

    def claims(self, key: str) -> bool:
        """Return True if draws of a key are queued or being granted. Thread-safe."""
        if key in self._claiming:
            return True
        sent = [item.operation for batch in list(self._sent) for item in list(batch)]
        return any(type(operation) is Claim and operation.draw.key == key for operation in sent)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued in this turn."""
        return not self._operations

    def _busy(self) -> bool:
        waiting = self._operations or self.writes or self.demands or self.delayed or self.strangers
        return bool(waiting) or self.caller.busy

    async def drain(self) -> None:
        """Wait until everything queued is written and no call is in flight; end the window at once."""
        while self._busy():
            self.want_delayed()
            self.demands.cut()
            if self.writes:
                await asyncio.wait(self.writes)
            elif self.caller.busy:
                await self.caller.step()
            else:
                await asyncio.sleep(0 if self._operations or self.demands else _LOOK)


def _may_be_known(operation: Operation) -> TypeGuard[Claim]:
    """Return True for a claim that may be answered without writing."""
    return (
        type(operation) is Claim and not operation.refresh and operation.user is None and operation.n <= MANY
    )


def unheard(_result: Any) -> None:
    """Ignore the result of an operation that nobody waits for. If it failed, the next claim fails too."""
