"""Limits, retries and estimates put together: how all calls to one endpoint are made, by whomever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from cachepipe import context, wire
from cachepipe.flow.limits import Limits, Slot
from cachepipe.flow.retries import Retries
from cachepipe.flow.tokens import Estimate, Estimator

T = TypeVar("T")


class Passage:
    """A call that was let go, until its end is told."""

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
        """Say that the call has ended. Idempotent.

        Args:
            usage: token counts, as the provider tells them or as an SDK's model of that.
            headers: those of the answer.
            error: what it failed with.
        """
        if usage is not None and hasattr(usage, "model_dump"):
            usage = usage.model_dump()
        counts = wire.token_counts(usage)
        total = counts["total_tokens"] or None
        if total is not None:
            self._estimator.learn(self._estimate, counts["prompt_tokens"], counts["completion_tokens"])
        self._slot.end(tokens=total, headers=headers, error=error)


class Flow:
    """How calls to one endpoint are made; shared by all who make them.

    Args:
        limits: who may call when.
        retries: which failed calls are made again.
        estimator: what tells the tokens of calls beforehand.
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
        """Itself, so that it may stand where a service is wanted."""
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
        """Make a call when it is let go, and again where that may help; return what it brought.

        Args:
            make: makes one attempt.
            body: what is sent, to estimate its tokens by.
            namespace: whose call it is.
            samples: how many samples it asks for, if the body does not say so; 0 for answers without tokens.
            max_retries: how often it is made again at most, if it says so itself.

        Returns:
            What must be told the end of the call, and what the attempt that did not fail has brought.
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
        """Do as `call` does in a thread without a loop.

        Args:
            make: makes one attempt, in this thread.
            body: what is sent.
            wait: runs a coroutine on a loop elsewhere, and returns what it does.
            namespace: whose call it is.
            samples: how many samples it asks for.
            max_retries: how often it is made again at most.
        """
        estimate = self.estimator.estimate(body, samples)
        attempts = self.retries.begin(max_retries)
        number = 0
        while True:
            with context.attempting(number):
                turn = _Turn(self._enter(estimate, namespace, again=number > 0))
                try:
                    passage: Passage = wait(turn.come())
                    made = make()
                except BaseException as error:
                    turn.leave(error)
                    seconds = attempts.after(error)
                    if seconds is None:
                        raise
                else:
                    attempts.succeeded()
                    return passage, made
            number += 1
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


class _Turn:
    """A turn that a thread waits for: it is given back where the thread is interrupted as it comes."""

    def __init__(self, entering: Coroutine[Any, Any, Passage]) -> None:
        self._entering = entering
        self._passage: Passage | None = None
        self._left: BaseException | None = None

    async def come(self) -> Passage:
        """Return the passage when it is there."""
        passage = self._passage = await self._entering
        if self._left is not None:
            passage.end(error=self._left)
        return passage

    def leave(self, error: BaseException) -> None:
        """Say with what the call has ended, if it was let go, or that nobody waits any more."""
        self._left = error
        if self._passage is not None:
            self._passage.end(error=error)
