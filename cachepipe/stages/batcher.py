"""The batcher: requests travel in batches, cut by samples and by a window in seconds.

A batch leaves when it holds ``batch_size`` samples, or ``window`` seconds after its first request came.
Batches do not wait for one another unless ``in_flight`` says so. Each request gets its own result or
its own error, also when the batch as a whole fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal

from cachepipe import loops
from cachepipe.adapting import has_request
from cachepipe.errors import StageClosed
from cachepipe.stage import (
    Flight,
    Stage,
    ask_batch,
    each,
    given,
    samples_of,
    together,
)
from cachepipe.typedefs import Arrived, Batch, Request, Response


class Ticket:
    """A request's place in the queue or in a batch. Await it for the response."""

    __slots__ = ("_answer", "_batch", "_future", "_lane", "request")

    def __init__(self, lane: _Lane, request: Request) -> None:
        self.request = request
        self._lane = lane
        self._batch: _Batch | None = None
        self._answer: Response | BaseException | None = None
        self._future: asyncio.Future[Response] = lane.loop.create_future()

    def __await__(self) -> Generator[Any, None, Response]:
        return self._future.__await__()

    async def kept(self) -> Response:
        """Return the response; a cancelled caller withdraws, but still returns the response if it comes."""
        try:
            return await self._future
        except asyncio.CancelledError:
            if self._answer is not None:
                return self.result()
            self._future = self._lane.loop.create_future()  # the other one was cancelled with its awaiter
            self.withdraw()
            return await self._future

    def result(self) -> Response:
        """Return the response if it came although its awaiter was cancelled, else raise the cancellation."""
        if self._answer is None:
            return self._future.result()
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def withdraw(self) -> None:
        """Give the place up. A request that was already sent in a batch with others still gets its answer."""
        if self._answer is not None:
            return
        if self._batch is None:
            self._lane.drop(self)
            self._future.cancel()
        else:
            self._batch.leave(self)

    def sent(self, batch: _Batch) -> None:
        """Note that the request was sent."""
        self._batch = batch

    def settle(self, answer: Response | BaseException) -> None:
        """Deliver the answer or the error."""
        if self._answer is not None:
            return
        self._answer = answer
        if self._future.done():
            return  # it was cancelled with its awaiter, which asks for the result
        if isinstance(answer, asyncio.CancelledError):
            self._future.cancel()
        elif isinstance(answer, BaseException):
            self._future.set_exception(answer)
        else:
            self._future.set_result(answer)


class _Batch(Flight):
    """A batch in flight."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        super().__init__(tickets)
        self.tickets = tickets

    def settle(self, place: int, answer: Response | BaseException) -> None:
        """Deliver an answer or an error."""
        ticket = self.tickets[place]
        ticket.settle(answer)
        self.answered(ticket)


class _Lane:
    """One event loop's queue and batches in flight."""

    def __init__(self, batcher: AsyncBatcher, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._model = batcher.model
        self._size = batcher.batch_size
        self._window = batcher.window
        self._most = batcher.in_flight
        self._single = batcher.single
        self._queue: list[Ticket] = []
        self._samples = 0
        self._ready: list[list[Ticket]] = []
        self._timer: asyncio.Handle | None = None
        self.flying: set[asyncio.Task[None]] = set()

    @property
    def queued(self) -> int:
        return len(self._queue) + sum(len(tickets) for tickets in self._ready)

    def put(self, ticket: Ticket) -> None:
        """Queue a request; if it does not fit into the open batch, it opens a new one."""
        n = ticket.request.n
        if self._queue and self._samples + n > self._size:
            self.cut()
        self._queue.append(ticket)
        self._samples += n
        if self._samples >= self._size:
            self.cut()
        elif self._timer is None:
            if self._window:
                self._timer = self.loop.call_later(self._window, self.cut)
            else:
                self._timer = self.loop.call_soon(self.cut)

    def drop(self, ticket: Ticket) -> None:
        """Remove a request that was not sent yet."""
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._samples -= ticket.request.n
        else:
            self._ready = [
                left for batch in self._ready if (left := [one for one in batch if one is not ticket])
            ]

    def cut(self) -> None:
        """Close the open batch and send it, or queue it when enough are in flight."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue:
            self._ready.append(self._queue)
            self._queue, self._samples = [], 0
        self._send()

    def _send(self) -> None:
        while self._ready and (self._most is None or len(self.flying) < self._most):
            batch = _Batch(self._ready.pop(0))
            for ticket in batch.tickets:
                ticket.sent(batch)
            batch.task = task = self.loop.create_task(self._fly(batch))
            self.flying.add(task)
            task.add_done_callback(partial(self._landed, batch))

    def _landed(self, batch: _Batch, task: asyncio.Task[None]) -> None:
        self.flying.discard(task)
        for ticket in batch.tickets:  # of a task that was cancelled before it had begun
            ticket.settle(asyncio.CancelledError())
        if not self.loop.is_closed():
            self._send()

    async def _fly(self, batch: _Batch) -> None:
        requests = [ticket.request for ticket in batch.tickets]
        try:
            if self._single:
                await each(self._model.request, requests, batch.settle)
            else:
                await ask_batch(self._model, requests, batch.settle)
        except BaseException as error:
            for ticket in batch.tickets:
                ticket.settle(error)
            if not isinstance(error, asyncio.CancelledError):
                raise

    def abort(self) -> None:
        """Refuse the requests that were not sent yet."""
        waiting = [*self._queue, *(ticket for tickets in self._ready for ticket in tickets)]
        self._queue, self._ready, self._samples = [], [], 0
        for ticket in waiting:
            ticket.settle(StageClosed("the batcher was closed before this request was sent; send it again"))


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
        self._lanes: dict[asyncio.AbstractEventLoop, _Lane] = {}

    def __repr__(self) -> str:
        lanes = list(self._lanes.values())
        queued, flying = sum(lane.queued for lane in lanes), sum(len(lane.flying) for lane in lanes)
        return f"<AsyncBatcher {queued} queued, {flying} in flight>"

    def submit(self, request: Request) -> Ticket:
        """Queue a request without waiting; await the ticket for its response, or withdraw it."""
        self._check_open()
        loop = loops.running()
        lane = self._lanes.get(loop)
        if lane is None:
            for old in list(self._lanes):
                if old.is_closed():
                    self._lanes.pop(old, None)
            lane = self._lanes[loop] = _Lane(self, loop)
        ticket = Ticket(lane, request)
        lane.put(ticket)
        return ticket

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
        if request.seed is None and request.best_of is None:
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
        lane = self._lanes.get(loops.running())
        if lane is not None:
            lane.cut()
        super().flush()

    async def close(self) -> None:
        """Send what is queued at once, wait for what is in flight on this loop, and refuse the rest."""
        self._closed = True
        lane = self._lanes.get(loops.running())
        if lane is not None:
            lane.cut()
            while lane.flying:
                await asyncio.wait(lane.flying)
            lane.abort()
        await super().close()
