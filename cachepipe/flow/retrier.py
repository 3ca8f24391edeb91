"""The retrier: a stage that repeats failed calls, above the limiter, so that each attempt waits its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cachepipe import context
from cachepipe.flow.retries import Retries
from cachepipe.stage import Stage, ask, ask_batch, given
from cachepipe.typedefs import Arrived, Batch, Request, Response


class AsyncRetrier(Stage):
    """Repeats failed calls of a model if a repetition may succeed; see `Retries`.

    Meanwhile, an adapter that calls a provider through an SDK turns off the SDK's own retries.

    Args:
        model: the model.
        max_retries: the largest number of times that a call is repeated.
        max_time: seconds after a call's first failure from which on it is not repeated.
        retries: decides, in place of the arguments above.
        options: further arguments of `Retries`.
    """

    def __init__(
        self,
        model: Any,
        max_retries: int = 8,
        max_time: float = 600.0,
        *,
        retries: Retries | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model)
        self.retries = Retries(max_retries, max_time, **options) if retries is None else retries

    def __repr__(self) -> str:
        return f"<AsyncRetrier {self.retries!r}>"

    async def request(self, request: Request) -> Response:
        """Return the response of the first attempt that succeeds, or raise the error of the last one."""
        self._check_open()
        return await self.retries.run(lambda: ask(self.model, request))

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return one response per request, in order; the requests that fail are repeated together.

        If it is cancelled, it returns the responses that have come, because they are paid for.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is raised.
            arrived: gets each response, and each final error, as it comes, without waiting for the requests
                that are repeated.
        """
        self._check_open()
        answers: list[Any] = [None] * len(batch)
        try:
            await self._ask_until_done(batch.requests, answers, arrived)
        except asyncio.CancelledError as stopped:
            if not any(isinstance(answer, Response) for answer in answers):
                raise
            answers = [answer if isinstance(answer, Response) else stopped for answer in answers]
        return given(answers, return_exceptions)

    async def _ask_until_done(
        self, requests: Sequence[Request], answers: list[Any], arrived: Arrived | None
    ) -> None:
        """Put the answers of requests in their places as they come, and report the final ones."""
        attempts = [self.retries.begin() for _ in requests]
        left = list(range(len(requests)))
        waits: dict[int, float] = {}  # by place, the seconds until a request that failed is repeated
        number = 0

        def take(nth: int, answer: Any) -> None:
            place = left[nth]
            answers[place] = answer
            wait = None
            if isinstance(answer, BaseException):
                wait = attempts[place].after(answer)
            else:
                attempts[place].succeeded()
            if wait is not None:
                waits[place] = wait
            elif arrived is not None:
                arrived(place, answer)

        while left:
            with context.attempting(number):
                await ask_batch(self.model, [requests[place] for place in left], take)
            left = sorted(waits)
            number += 1
            if left:
                await self.retries.clock.sleep(max(waits.values()))
                waits.clear()
