"""The limiter and the retrier as stages: between what generates samples and the model.

There they see only what has to be asked of the model. Hits, and those who wait for somebody else's
sample, never come by. The retrier goes above the limiter, so that each attempt waits for its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from cachepipe import context
from cachepipe.accounting import Account, usage_of
from cachepipe.adapting import has_batch, name_of
from cachepipe.flow.limits import FlowStats, Limits, Quota, holding
from cachepipe.flow.retries import Retries
from cachepipe.flow.tokens import Estimate, Estimator
from cachepipe.stage import Stage, adapter_of, ask, ask_batch, each, given, send
from cachepipe.typedefs import Arrived, Batch, Request, Response, field_names

T = TypeVar("T")


class AsyncLimiter(Stage):
    """A model that is called no faster than its limits allow; calls beyond them wait.

    A call is a request, or a batch where the model takes batches. Its tokens are estimated beforehand, and
    put right when the samples tell their usage.

    Args:
        model: the model.
        max_requests: calls within any ``interval``; None is no limit.
        max_tokens: tokens within any ``interval``; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
        limits: limits that others share, instead of those above.
        estimator: what estimates tokens; default is one of its own.
        options: further arguments of `Limits`.

    Attributes:
        queue_seconds: time that calls of this stage have waited to be let go, added up.
        call_seconds: time that they have taken from then on, added up.
    """

    def __init__(
        self,
        model: Any,
        max_requests: float | None = None,
        max_tokens: float | None = None,
        interval: float = 60.0,
        *,
        max_concurrency: int | None = None,
        limits: Limits | None = None,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model)
        own = Quota(max_requests, max_tokens, interval, max_concurrency)
        if limits is not None and (own != Quota() or options):
            raise TypeError("limits that are shared have quotas of their own; set them there")
        if limits is None:
            limits = Limits(max_requests, max_tokens, interval, max_concurrency=max_concurrency, **options)
        self.limits = limits
        self.estimator = Estimator() if estimator is None else estimator
        self.queue_seconds = self.call_seconds = 0.0
        self._adapter = adapter_of(model)
        self._gated = _Gated(self._call, model)

    def __repr__(self) -> str:
        return f"<AsyncLimiter {self.limits!r}>"

    def stats(self) -> FlowStats:
        """Return what went through the limits."""
        return self.limits.stats()

    async def request(self, request: Request) -> Response:
        """Return the response, once the call was let go and has ended."""
        self._check_open()

        async def make() -> list[Response]:
            return [await ask(self.model, request)]

        return (await self._call([request], make))[0]

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return one response per request, in order; a model that takes batches is called once."""
        self._check_open()
        if has_batch(self._adapter):
            answers = await ask_batch(self._gated, batch.requests, arrived)
        else:
            answers = await each(self.request, batch.requests, arrived)
        return given(answers, return_exceptions)

    async def _call(self, requests: Sequence[Request], make: Callable[[], Awaitable[list[T]]]) -> list[T]:
        """Make a call for requests when it is let go, and learn from what it brings."""
        estimates = [self.estimator.estimate(self._body(request), request.n) for request in requests]
        above = context.attempt.get()
        attempt = context.Attempt() if above is None else above
        slot = await self.limits.enter(
            namespace=requests[0].namespace,
            model=estimates[0].model,
            tokens=sum(estimate.total for estimate in estimates),
            ahead=attempt.number > 0,
        )
        self.queue_seconds += slot.queued
        token, within = context.attempt.set(attempt), holding.set((*holding.get(), slot))
        answers: Sequence[T] = ()
        failure: BaseException | None = None
        try:
            answers = await make()
            failure = next((answer for answer in answers if isinstance(answer, BaseException)), None)
        except BaseException as error:
            failure = error
            raise
        finally:
            context.attempt.reset(token)
            holding.reset(within)
            self.call_seconds += self.limits.clock.now() - slot.begun
            slot.end(tokens=self._used(answers, estimates), headers=attempt.headers, error=failure)
        return list(answers)

    def _used(self, answers: Sequence[Any], estimates: Sequence[Estimate]) -> float | None:
        """Return the tokens of a call if its samples tell them, and learn from them."""
        used = 0.0
        for answer, estimate in zip(answers, estimates, strict=False):
            data = getattr(answer, "data", None)
            samples = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
            spent = Account()
            spent.spend(map(usage_of, samples), "")
            usage = spent.counts()
            if not usage["total_tokens"]:
                return None
            used += usage["total_tokens"]
            self.estimator.learn(estimate, usage["prompt_tokens"], usage["completion_tokens"])
        return used if answers else None

    def _body(self, request: Request) -> Mapping[str, Any]:
        fields = {name: getattr(request, name) for name in field_names(type(request))}
        if isinstance(request.prompt, Mapping):
            fields |= request.prompt
        fields["model"] = fields.get("model") or name_of(self._adapter)
        return fields


class _Gated:
    """A model each of whose batches is let go first: those that are repeated one by one, too."""

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], model: Any) -> None:
        self._call = call
        self._model = model

    async def batch_request(self, batch: Batch, *, arrived: Arrived | None = None) -> list[Any]:
        """Return what the model answers, errors among it."""
        return await self._call(batch.requests, lambda: send(self._model, batch, arrived))


class AsyncRetrier(Stage):
    """A model whose failed calls are made again, where that may help; see `Retries`.

    An adapter that calls a provider with an SDK lets it make no attempts of its own meanwhile.

    Args:
        model: the model.
        max_retries: how often a call is made again at most.
        max_time: seconds from a call's first failure after which it is not made again.
        retries: what decides, instead of those above.
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
        """Return the response of the first attempt that has one, or raise the last one's error."""
        self._check_open()
        return await self.retries.run(lambda: ask(self.model, request))

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return one response per request, in order; those that failed are asked for again together.

        Whoever is cancelled meanwhile returns what has come: it is paid for.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is raised.
            arrived: is told each response, and each error that stands, as it comes: it does not wait for
                what is asked for again.
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
        """Put the answers of requests in their places as they come, and hand on those that stand."""
        attempts = [self.retries.begin() for _ in requests]
        left = list(range(len(requests)))
        waits: dict[int, float] = {}  # how long before those that failed are asked for again, by place
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
