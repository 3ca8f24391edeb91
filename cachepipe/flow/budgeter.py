"""The budgeter: a stage between the batcher and the model that makes no call which may exceed a budget.

It sees only what has to be asked of the model: hits never arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cachepipe.accounting import Account, usage_of
from cachepipe.adapting import has_batch, name_of
from cachepipe.flow.budget import Budget, Reservation, Reservations, Spending
from cachepipe.stage import Stage, adapter_of, ask, ask_batch, each, given
from cachepipe.stores.base import Store
from cachepipe.typedefs import Arrived, Batch, Request, Response, field_names


class AsyncBudgeter(Stage):
    """Makes a call only if what it may cost at most is left of its namespace's budget.

    A call is a request, or a batch if the model takes batches only. Call `begin` before the first request.

    Args:
        model: the model. Its price is that of its ``model`` at its ``cache_scope``.
        budget: the budget.
    """

    def __init__(self, model: Any, budget: Budget) -> None:
        super().__init__(model)
        self.budget = budget
        self._adapter = adapter_of(model)
        scope = getattr(self._adapter, "cache_scope", None)
        self._url = scope if isinstance(scope, str) else ""
        self._spending: Spending | None = None

    def __repr__(self) -> str:
        return f"<AsyncBudgeter {self.budget!r}>"

    def begin(self, store: Store) -> None:
        """Take the store in which the spending is counted."""
        self._spending = Spending(store, self.budget)

    async def request(self, request: Request) -> Response:
        """Return the model's response to a request.

        Raises:
            BudgetExceeded: when the budget does not allow the call.
            UnknownCost: when the cost of the call is unknown.
        """
        self._check_open()
        held = await self._hold([request])
        answers: list[Response] = []
        try:
            answers.append(_paid(await ask(self.model, request), held.get(request.namespace)))
        finally:
            self._end(held, [request], answers)
        return answers[0]

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return one response per request, in order; a model that takes batches is called once."""
        self._check_open()
        if not has_batch(self._adapter):
            return given(await each(self.request, batch.requests, arrived), return_exceptions)
        held = await self._hold(batch.requests)
        came: dict[int, Any] = {}

        def take(place: int, answer: Any) -> None:
            came[place] = answer = _paid(answer, held.get(batch.requests[place].namespace))
            if arrived is not None:
                arrived(place, answer)

        try:
            await ask_batch(self.model, batch.requests, take)
        finally:
            self._end(held, [batch.requests[place] for place in came], [*came.values()])
        return given([came[place] for place in range(len(batch))], return_exceptions)

    async def _hold(self, requests: Sequence[Request]) -> dict[str | None, Reservation | None]:
        """Reserve what a call may cost at most, by namespace."""
        if self._spending is None:
            raise RuntimeError("a budgeter begins with the store: call begin(store)")
        most: dict[str | None, float] = {}
        for request in requests:
            if self.budget.limit(request.namespace) is not None:
                cost = self.budget.most(self._body(request), self._url, samples=request.n)
                most[request.namespace] = most.get(request.namespace, 0.0) + cost
        held: dict[str | None, Reservation | None] = {}
        seller = (name_of(self._adapter), self._url)
        try:
            for namespace in sorted(most, key=str):  # in one order, so that no two calls wait for each other
                held[namespace] = await self._spending.hold(namespace, most[namespace], seller)
        except BaseException:
            for reservation in held.values():
                if reservation is not None:
                    reservation.end_at(0.0)
            raise
        return held

    def _end(
        self,
        held: Mapping[str | None, Reservation | None],
        requests: Sequence[Request],
        answers: Sequence[Any],
    ) -> None:
        """Replace reservations by what the samples of each namespace have used."""
        for namespace, reservation in held.items():
            if reservation is None:
                continue
            spent, brought = Account(), 0
            for request, answer in zip(requests, answers, strict=False):
                if request.namespace == namespace and isinstance(answer, Response):
                    brought += len(answer.data)
                    mappings = [sample if isinstance(sample, dict) else {} for sample in answer.data]
                    spent.spend(map(usage_of, mappings), self._url)
            cost, unpriced = spent.cost(self.budget.prices.cost_of_sum)
            reservation.end_at(None if unpriced else cost, brought)

    def _body(self, request: Request) -> Mapping[str, Any]:
        """Return what decides the cost of a request."""
        fields = {name: getattr(request, name) for name in field_names(type(request))}
        if isinstance(request.prompt, Mapping):
            fields |= request.prompt
        fields["model"] = fields.get("model") or name_of(self._adapter)
        return fields


def _paid(answer: Any, reservation: Reservation | None) -> Any:
    """Return an answer with what was reserved for it, until its samples are stored."""
    if reservation is None or not isinstance(answer, Response):
        return answer
    paid = answer._replace()
    paid.payment = Reservations.of([reservation] * len(answer.data))
    return paid
