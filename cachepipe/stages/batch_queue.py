"""The queue of a batcher on one event loop: requests gather, leave in batches, and get their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from cachepipe.errors import StageClosed
from cachepipe.gathering import Gathering
from cachepipe.stage import Flight, ask_batch, each
from cachepipe.typedefs import Request, Response


class QueuedRequest:
    """A request's place in the queue or in a batch. Await it for the response."""

    __slots__ = ("_answer", "_batch", "_future", "_queue", "request")

    def __init__(self, queue: BatchQueue, request: Request) -> None:
        self.request = request
        self._queue = queue
        self._batch: _Batch | None = None
        self._answer: Response | BaseException | None = None
        self._future: asyncio.Future[Response] = queue.loop.create_future()

    def __await__(self) -> Generator[Any, None, Response]:
        return self._future.__await__()

    async def kept(self) -> Response:
        """Return the response; a cancelled caller withdraws, but still returns the response if it comes."""
        try:
            return await self._future
        except asyncio.CancelledError:
            if self._answer is not None:
                return self.result()
            self._future = self._queue.loop.create_future()  # the other one was cancelled with its awaiter
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
            self._queue.drop(self)
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

    def __init__(self, requests: Sequence[QueuedRequest]) -> None:
        super().__init__(requests)
        self.requests = requests

    def settle(self, place: int, answer: Response | BaseException) -> None:
        """Deliver an answer or an error."""
        request = self.requests[place]
        request.settle(answer)
        self.answered(request)


class BatchQueue:
    """One event loop's queue and batches in flight.

    Args:
        loop: the event loop.
        model: the model.
        size: the largest number of samples in a batch.
        window: seconds that a batch stays open after its first request.
        most: the largest number of batches in flight; None means no limit.
        single: whether the model is asked for each request by itself.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        model: Any,
        *,
        size: int,
        window: float,
        most: int | None,
        single: bool,
    ) -> None:
        self.loop = loop
        self._model = model
        self._size = size
        self._window = window
        self._most = most
        self._single = single
        self._open: Gathering[QueuedRequest] = Gathering(loop, self._close)
        self._samples = 0  # of the requests in the open batch
        self._ready: list[list[QueuedRequest]] = []
        self.flying: set[asyncio.Task[None]] = set()

    @property
    def queued(self) -> int:
        """The number of requests that were not sent yet."""
        return len(self._open.items) + sum(map(len, self._ready))

    def put(self, request: QueuedRequest) -> None:
        """Queue a request; if it does not fit into the open batch, it opens a new one."""
        n = request.request.n
        if self._open and self._samples + n > self._size:
            self._open.cut()
        self._samples += n
        self._open.add(request, window=self._window)
        if self._samples >= self._size:
            self._open.cut()

    def drop(self, request: QueuedRequest) -> None:
        """Remove a request that was not sent yet."""
        if request in self._open.items:
            self._open.items.remove(request)
            self._samples -= request.request.n
        else:
            self._ready = [
                left for batch in self._ready if (left := [one for one in batch if one is not request])
            ]

    def cut(self) -> None:
        """Close the open batch and send it, or queue it when enough are in flight."""
        self._open.cut()

    def _close(self, requests: list[QueuedRequest]) -> None:
        self._samples = 0
        self._ready.append(requests)
        self._send()

    def _send(self) -> None:
        while self._ready and (self._most is None or len(self.flying) < self._most):
            batch = _Batch(self._ready.pop(0))
            for request in batch.requests:
                request.sent(batch)
            batch.task = task = self.loop.create_task(self._fly(batch))
            self.flying.add(task)
            task.add_done_callback(partial(self._landed, batch))

    def _landed(self, batch: _Batch, task: asyncio.Task[None]) -> None:
        self.flying.discard(task)
        for request in batch.requests:  # of a task that was cancelled before it had begun
            request.settle(asyncio.CancelledError())
        if not self.loop.is_closed():
            self._send()

    async def _fly(self, batch: _Batch) -> None:
        asked = [request.request for request in batch.requests]
        try:
            if self._single:
                await each(self._model.request, asked, batch.settle)
            else:
                await ask_batch(self._model, asked, batch.settle)
        except BaseException as error:
            for request in batch.requests:
                request.settle(error)
            if not isinstance(error, asyncio.CancelledError):
                raise

    def abort(self) -> None:
        """Refuse the requests that were not sent yet."""
        waiting = [request for requests in (*self._ready, self._open.items) for request in requests]
        self._open.items, self._ready, self._samples = [], [], 0
        for request in waiting:
            request.settle(StageClosed("the batcher was closed before this request was sent; send it again"))
