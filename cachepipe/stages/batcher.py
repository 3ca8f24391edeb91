"""The batcher: requests travel in batches, cut by samples and by a window in seconds.

A batch leaves when it holds ``batch_size`` samples, or ``window`` seconds after its first request came.
Batches do not wait for one another unless ``in_flight`` says so. Each request gets its own result or
its own error, also when the batch as a whole fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal

from cachepipe import loops
from cachepipe.adapting import has_request
from cachepipe.contract.demands import is_mergeable
from cachepipe.loops import PerLoop
from cachepipe.stage import (
    Stage,
    each,
    given,
    samples_of,
    together,
)
from cachepipe.stages.batch_queue import BatchQueue, QueuedRequest
from cachepipe.typedefs import Arrived, Batch, Request, Response


class AsyncBatcher(Stage):
    """Collects requests into batches for a model.

    Args:
        model: answers the batches; a model that has only ``request`` is called for each request concurrently.
        batch_size: the largest number of samples in a batch. A request for more is cut into pieces, unless it
            has a ``seed`` or ``best_of``, or ``allow_batch_overflow`` is set; then it is sent alone.
        timeout: the window: seconds that a batch stays open after its first request. 0 means until the end
            of the event loop's turn.
        in_flight: the largest number of batches in flight; None means no limit.
        prefer: the method to use if the model has both. ``"request"`` delivers each answer as it comes,
            ``"batch"`` delivers all answers of a batch together.
        allow_batch_overflow: send a request for more than ``batch_size`` samples in one piece.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 1,
        timeout: float = 0.0,
        *,
        in_flight: int | None = None,
        prefer: Literal["batch", "request"] = "batch",
        allow_batch_overflow: bool = False,
    ) -> None:
        super().__init__(model)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is a number of samples, at least 1; got {batch_size!r}")
        if timeout is None or not timeout >= 0:
            raise ValueError(f"timeout is a number of seconds, at least 0; got {timeout!r}")
        if in_flight is not None and in_flight < 1:
            raise ValueError(f"in_flight is a number of batches, at least 1, or None; got {in_flight!r}")
        self.batch_size = batch_size
        self.window = timeout
        self.in_flight = in_flight
        self.single = prefer == "request" and has_request(model)
        self._overflow = allow_batch_overflow
        make = partial(
            BatchQueue, model=model, size=batch_size, window=timeout, most=in_flight, single=self.single
        )
        self._queues: PerLoop[BatchQueue] = PerLoop(make)

    def __repr__(self) -> str:
        queues = self._queues.all()
        queued, flying = sum(queue.queued for queue in queues), sum(len(queue.flying) for queue in queues)
        return f"<AsyncBatcher {queued} queued, {flying} in flight>"

    def submit(self, request: Request) -> QueuedRequest:
        """Queue a request without waiting; await the ticket for its response, or withdraw it."""
        self._check_open()
        queue = self._queues.of(loops.running())
        queued = QueuedRequest(queue, request)
        queue.put(queued)
        return queued

    @property
    def cut_n(self) -> int | None:
        """The number of samples above which a request is cut."""
        return None if self._overflow else self.batch_size

    async def request(self, request: Request) -> Response:
        """Return the response; cancelling a caller does not affect the other requests of its batch."""
        return await self._ask(request, self._one)

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return one response per request, in order, after all of them have ended.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is raised.
            arrived: is called with each answer as it comes, also after a cancellation: this method then waits
                for the answers of requests that were sent in a batch with others.
        """
        if arrived is None:
            return await super().batch_request(batch, return_exceptions=return_exceptions)
        self._check_open()
        answers = await each(lambda request: self._ask(request, self._kept), batch.requests, arrived)
        return given(answers, return_exceptions)

    def _ask(self, request: Request, one: Callable[[Request], Awaitable[Response]]) -> Awaitable[Response]:
        """Ask for a request as a whole, or in parts if it is larger than one request may be."""
        limits = [self.max_n]
        if is_mergeable(request.seed, request.best_of):
            limits.append(self.cut_n)
        limit = min((limit for limit in limits if limit), default=request.n)
        return one(request) if request.n <= limit else self._in_parts(request, limit, one)

    async def _in_parts(
        self, request: Request, limit: int, one: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        parts = [limit] * (request.n // limit)
        if request.n % limit:
            parts.append(request.n % limit)
        answers = await together([one(request.asking(part)) for part in parts], return_exceptions=False)
        return Response([sample for answer in answers for sample in samples_of(answer)])

    async def _one(self, request: Request) -> Response:
        ticket = self.submit(request)
        try:
            return await ticket
        except asyncio.CancelledError:
            ticket.withdraw()
            raise

    def _kept(self, request: Request) -> Awaitable[Response]:
        return self.submit(request).kept()

    def flush(self) -> None:
        """Send what is queued on this loop, without waiting for its window."""
        queue = self._queues.known(loops.running())
        if queue is not None:
            queue.cut()
        super().flush()

    async def close(self) -> None:
        """Send what is queued at once, wait for what is in flight on this loop, and refuse the rest."""
        self._closed = True
        queue = self._queues.known(loops.running())
        if queue is not None:
            queue.cut()
            while queue.flying:
                await asyncio.wait(queue.flying)
            queue.abort()
        await super().close()
