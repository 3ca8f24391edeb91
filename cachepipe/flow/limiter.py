"""The limiter: a stage between the cacher and the model that keeps calls within limits.

It sees only what has to be asked of the model: hits, and requests that wait for a sample of another, never
arrive.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from cachepipe import context
from cachepipe.accounting import Account, usage_of
from cachepipe.adapting import has_batch, name_of
from cachepipe.flow.calls import FlowStats, holding
from cachepipe.flow.limits import Limits
from cachepipe.flow.tokens import Estimate, Estimator
from cachepipe.flow.windows import Quota
from cachepipe.stage import Stage, adapter_of, ask, ask_batch, each, given, send
from cachepipe.typedefs import Arrived, Batch, Request, Response, field_names

T = TypeVar("T")


class AsyncLimiter(Stage):
    """Calls a model no faster than its limits allow; further calls wait.

    A call is a request, or a batch if the model takes batches. Its tokens are estimated, and corrected
    when the samples report their usage.

    Args:
        model: the model.
        max_requests: calls within any ``interval``; None is no limit.
        max_tokens: tokens within any ``interval``; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
        limits: shared limits, which replace those above.
        estimator: estimates tokens; by default each limiter has its own.
        options: further arguments of `Limits`.

    Attributes:
        queue_seconds: total time that calls of this stage have waited to be let go.
        call_seconds: total time that they have taken from then on.
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
        """Return what has passed through the limits."""
        return self.limits.stats()

    async def request(self, request: Request) -> Response:
        """Return the model's response to a request."""
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
        """Make a call for requests once it is let go, and learn from the answers."""
        estimates = [self.estimator.estimate(self._body(request), request.n) for request in requests]
        attempt = context.attempt.get() or context.Attempt()
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
        """Return the tokens of a call and learn from them, if its samples report them."""
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
        """Return what the estimator reads of a request."""
        fields = {name: getattr(request, name) for name in field_names(type(request))}
        if isinstance(request.prompt, Mapping):
            fields |= request.prompt
        fields["model"] = fields.get("model") or name_of(self._adapter)
        return fields


class _Gated:
    """Waits before each batch of a model, also before those that repeat the requests of a failed batch."""

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], model: Any) -> None:
        self._call = call
        self._model = model

    async def batch_request(self, batch: Batch, *, arrived: Arrived | None = None) -> list[Any]:
        """Return the model's answers, with errors among them."""
        return await self._call(batch.requests, lambda: send(self._model, batch, arrived))
