"""Budgets: a call is made only if what it may cost at most is left of its namespace's budget.

Before a call, its prompt and the largest answer are reserved in the store; after it, the reservation is
replaced by what the call has cost. What was spent is summed from the stored rows (C6) when a process makes
its first call, so it survives kills. The processes that share a store share its budgets. Hits are never
refused.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Mapping
from typing import Any, Final

from cachepipe import wire
from cachepipe.accounting import Seller
from cachepipe.contract.budgets import NANO, nanos
from cachepipe.contract.draws import label
from cachepipe.errors import BudgetExceeded, StoreError, UnknownCost
from cachepipe.flow.clock import CLOCK, Clock
from cachepipe.flow.tokens import Estimator, limit_of
from cachepipe.prices import HOW_TO_GIVE, Prices
from cachepipe.stores.base import Reserve, Reserved, Settle, Store
from cachepipe.stores.sums import statements

_PAUSES: Final = (0.02, 0.5)  # seconds between two looks at a budget that calls in flight use up: first, last


class _Bytes:
    """Counts a token for each byte of a text: no text has more."""

    @staticmethod
    def encode(text: str) -> bytes:
        """Return the bytes."""
        return text.encode("utf-8", "surrogatepass")


class Budget:
    """The largest amount that each namespace of a cache may spend.

    Args:
        usd: US dollars for each namespace; None for no limit.
        namespaces: US dollars for some namespaces, by name, instead of ``usd``.
        prices: the prices of tokens; default is the table of ``genai-prices``.
    """

    def __init__(
        self,
        usd: float | None = None,
        *,
        namespaces: Mapping[Any, float] | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._namespaces = dict(namespaces or {})
        for amount in (*self._namespaces.values(), 0.0 if usd is None else usd):
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
                raise ValueError(f"a budget is a number of US dollars, at least 0; got {amount!r}")
        self.usd = usd
        self.prices = prices or Prices()
        self._estimator = Estimator(_Bytes)

    def __repr__(self) -> str:
        return f"<Budget of {self.usd} US dollars>"

    @classmethod
    def of(cls, value: Any) -> Budget:
        """Return the budget that a user's argument stands for: a `Budget`, or US dollars."""
        return value if isinstance(value, Budget) else cls(value)

    def limit(self, namespace: str | None) -> float | None:
        """Return the budget of a namespace in US dollars; None if it has no budget."""
        return self._namespaces.get(namespace, self.usd)

    def most(self, body: Mapping[str, Any], url: str, *, samples: int | None = None) -> float:
        """Return the largest cost of a call in US dollars.

        Args:
            body: the body that is sent.
            url: the URL of the call.
            samples: the number of samples, if the body does not contain it; 0 for answers without tokens.

        Raises:
            UnknownCost: when the price of the model or the largest size of its answers is unknown.
        """
        estimate = self._estimator.estimate(body, samples)
        model, limit = estimate.model, limit_of(body)
        what = f"of {model} at {url} is unknown, and a budget is set, so the call was not made. "
        if limit is None and estimate.n:
            limit = self.prices.max_tokens(model, url)
            if limit is None:
                raise UnknownCost(f"the largest answer {what}Set max_tokens in the request. {HOW_TO_GIVE}")
        counts = {
            "prompt_tokens": math.ceil(estimate.raw),
            "cached_tokens": 0,
            "completion_tokens": estimate.n * (limit or 0),
        }
        cost = self.prices.cost_of_sum(counts, model, url)
        if cost is None:
            raise UnknownCost(f"the price {what}{HOW_TO_GIVE}")
        return cost

    def cost(self, usage: Any, model: str | None, url: str) -> float | None:
        """Return the cost of a call by the usage that its answer reports; None if it is unknown."""
        counts = wire.token_counts(usage)
        if counts["total_tokens"] is None:
            return None
        return self.prices.cost_of_sum({name: count or 0 for name, count in counts.items()}, model, url)


class Reservation:
    """What is reserved for a call that has not ended."""

    def __init__(self, spending: Spending, namespace: str, amount: int, seller: Seller) -> None:
        self._spending = spending
        self._namespace = namespace
        self._amount = amount
        self._seller = seller
        self._ended = False

    def end(self, answer: Mapping[str, Any] | None = None, *, error: BaseException | None = None) -> None:
        """Replace the reservation by what the call has cost; only the first time counts.

        Args:
            answer: the answer; without its usage, the call counts with all that was reserved.
            error: the error of a call that brought no answer; it counts nothing.
        """
        cost = self._spending.budget.cost(wire.usage_in(answer or {}), *self._seller)
        self.end_at(0.0 if error is not None else cost)

    def end_at(self, cost: float | None) -> None:
        """Replace the reservation by a cost in US dollars; by all of it if the cost is unknown."""
        if not self._ended:
            self._ended = True
            spent = self._amount if cost is None else nanos(cost)
            self._spending.settle(Settle(self._namespace, self._amount, spent))


class Spending:
    """What calls spend of the budgets of a store. May be used on several event loops.

    Args:
        store: the store.
        budget: the budget.
        clock: the time.
    """

    def __init__(self, store: Store, budget: Budget, clock: Clock = CLOCK) -> None:
        self.budget = budget
        self._store = store
        self._clock = clock
        self._summed: set[str] = set()
        self._heads: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Lock]]
        self._heads = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<Spending of {self.budget!r} in {self._store!r}>"

    async def reserve(
        self, namespace: str | None, body: Mapping[str, Any], url: str, *, samples: int | None = None
    ) -> Reservation | None:
        """Reserve the largest cost of a call; wait while calls in flight hold what it needs.

        Args:
            namespace: the namespace of the call.
            body: the body that is sent.
            url: the URL of the call.
            samples: as for `Budget.most`.

        Returns:
            The reservation, to be ended with the call; None if the namespace has no budget.

        Raises:
            BudgetExceeded: when the call does not fit.
            UnknownCost: when its cost is unknown.
        """
        limit = self.budget.limit(namespace)
        if limit is None:
            return None
        model = body.get("model")
        seller = (model if isinstance(model, str) else None, url)
        return await self.hold(namespace, self.budget.most(body, url, samples=samples), seller)

    async def hold(self, namespace: str | None, most: float, seller: Seller) -> Reservation | None:
        """Reserve an amount, as `reserve` does.

        Args:
            namespace: the namespace of the call.
            most: the largest cost of the call in US dollars.
            seller: the model, and the URL of the call.

        Raises:
            BudgetExceeded: when the call does not fit.
        """
        limit = self.budget.limit(namespace)
        if limit is None:
            return None
        name, amount = label(namespace), nanos(most)
        heads = self._heads.setdefault(asyncio.get_running_loop(), {})
        async with heads.setdefault(name, asyncio.Lock()):  # the first in line looks, the others wait
            pause = _PAUSES[0]
            while True:
                state = await self._asked(name, amount, nanos(limit))
                if state.granted:
                    return Reservation(self, name, amount, seller)
                if state.spent + amount > nanos(limit):
                    raise BudgetExceeded(namespace, limit, state.spent / NANO, most)
                await self._clock.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])

    async def _asked(self, name: str, amount: int, limit: int) -> Reserved:
        """Ask the store for an amount; sum the rows first, where that is due."""
        if name in self._summed:
            state = await self._apply(Reserve(name, amount, limit))
            if not state.lost:
                return state
        before = await self._apply(Reserve(name, 0, 0))
        while before.lost:
            before = await self._apply(Reserve(name, 0, 0))
        spent = await asyncio.get_running_loop().run_in_executor(None, self._spent, name)
        state = await self._apply(Reserve(name, amount, limit, summed=spent - before.settled))
        self._summed.add(name)
        return state

    async def _apply(self, reserve: Reserve) -> Reserved:
        [state] = await self._store.apply([reserve])
        if not isinstance(state, Reserved):
            raise TypeError(f"a store returned {state!r:.80} for a reservation")
        return state

    def _spent(self, name: str) -> int:
        """Return what the stored rows of a namespace sum up to."""
        statement = statements(self._store).get(name)
        if statement is None:
            return 0
        cost, unpriced = statement.spent.cost(self.budget.prices.cost_of_sum)
        if unpriced:
            raise UnknownCost(
                f"{unpriced} stored samples of the namespace have no known cost, so its budget cannot be "
                f"kept. {HOW_TO_GIVE}; for a server that reports no usage, set no budget"
            )
        return nanos(cost or 0.0)

    def settle(self, settle: Settle) -> None:
        """End a reservation in the background."""
        try:
            self._store.apply_soon([settle])
        except StoreError:
            return  # it was closed: the reservation ends with the process
