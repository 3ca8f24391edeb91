"""Limits, retries and estimates together: how all calls to one endpoint are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from cachepipe import context, wire
from cachepipe.flow.calls import Slot
from cachepipe.flow.limits import Limits
from cachepipe.flow.retries import Retries
from cachepipe.flow.tokens import Estimate, Estimator

T = TypeVar("T")


class Passage:
    """A call that was let go and has not ended."""

    __slots__ = ("_estimate", "_estimator", "_slot")

    def __init__(self, slot: Slot, estimator: Estimator, estimate: Estimate) -> None:
        self._slot = slot
        self._estimator = estimator
        self._estimate = estimate

    def end(
        self,
        *,
        usage: Any = None,
        headers: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End the call. Only the first time counts.

        Args:
            usage: the provider's token counts, as a mapping or as an SDK's object.
            headers: the headers of the answer.
            error: the error of the call.
        """
        if usage is not None and hasattr(usage, "model_dump"):
            usage = usage.model_dump()
        counts = wire.token_counts(usage)
        total = counts["total_tokens"] or None
        if total is not None:
            self._estimator.learn(self._estimate, counts["prompt_tokens"], counts["completion_tokens"])
        self._slot.end(tokens=total, headers=headers, error=error)


class Flow:
    """How calls to one endpoint are made; everything that calls the endpoint shares it.

    Args:
        limits: which call may be made when.
        retries: which failed calls are repeated.
        estimator: estimates the tokens of calls.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        retries: Retries | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        self.limits = Limits() if limits is None else limits
        self.retries = Retries() if retries is None else retries
        self.estimator = Estimator() if estimator is None else estimator

    def __repr__(self) -> str:
        return f"<Flow {self.limits!r}, {self.retries!r}>"

    @property
    def flow(self) -> Flow:
        """This object, so that it can be used in place of a service."""
        return self

    async def call(
        self,
        make: Callable[[], Awaitable[T]],
        body: Mapping[str, Any],
        *,
        namespace: str | None = None,
        samples: int | None = None,
        max_retries: int | None = None,
    ) -> tuple[Passage, T]:
        """Make a call once it is let go, and repeat it if it fails and may succeed.

        Args:
            make: makes one attempt.
            body: the body that is sent; the tokens are estimated from it.
            namespace: the namespace of the call.
            samples: the number of samples, if the body does not contain it; 0 for answers without tokens.
            max_retries: the largest number of times that it is repeated, if it differs.

        Returns:
            The passage, which the caller ends, and the result of the attempt that succeeded.
        """
        estimate = self.estimator.estimate(body, samples)

        async def attempt() -> tuple[Passage, T]:
            passage = await self._enter(estimate, namespace)
            try:
                return passage, await make()
            except BaseException as error:
                passage.end(error=error)
                raise

        return await self.retries.run(attempt, max_retries)

    def call_in_thread(
        self,
        make: Callable[[], T],
        body: Mapping[str, Any],
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
        *,
        namespace: str | None = None,
        samples: int | None = None,
        max_retries: int | None = None,
    ) -> tuple[Passage, T]:
        """Make a call as `call` does, in a thread without an event loop.

        Args:
            make: makes one attempt, in this thread.
            body: the body that is sent.
            wait: runs a coroutine on a loop of another thread, and returns its result.
            namespace: the namespace of the call.
            samples: the number of samples, as for `call`.
            max_retries: the largest number of times that it is repeated, if it differs.
        """
        estimate = self.estimator.estimate(body, samples)
        attempts = self.retries.begin(max_retries)
        while True:
            with context.attempting(attempts.repeated):
                entry = _Entry(self._enter(estimate, namespace, again=attempts.repeated > 0))
                try:
                    passage: Passage = wait(entry.come())
                    made = make()
                except BaseException as error:
                    entry.leave(error)
                    seconds = attempts.after(error)
                    if seconds is None:
                        raise
                else:
                    attempts.succeeded()
                    return passage, made
            wait(self.retries.clock.sleep(seconds))

    async def _enter(self, estimate: Estimate, namespace: str | None, *, again: bool = False) -> Passage:
        attempt = context.attempt.get()
        slot = await self.limits.enter(
            namespace=namespace,
            model=estimate.model,
            tokens=estimate.total,
            ahead=again or (attempt is not None and attempt.number > 0),
        )
        return Passage(slot, self.estimator, estimate)


class _Entry:
    """The wait of a thread for a passage; the passage is given back if the thread is interrupted."""

    def __init__(self, entering: Coroutine[Any, Any, Passage]) -> None:
        self._entering = entering
        self._passage: Passage | None = None
        self._left: BaseException | None = None

    async def come(self) -> Passage:
        """Wait for the passage and return it."""
        passage = self._passage = await self._entering
        if self._left is not None:
            passage.end(error=self._left)
        return passage

    def leave(self, error: BaseException) -> None:
        """End the call with an error: at once if it was let go, else as soon as it is."""
        self._left = error
        if self._passage is not None:
            self._passage.end(error=error)
