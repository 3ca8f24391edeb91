"""Budgets: a call is made only if what it may cost at most is left of its namespace's budget.

Before a call, its prompt and the largest answer are reserved in the store; once its samples are stored, the
reservation is replaced by what the call has cost. What was spent is summed from the stored rows (C6) when a
process makes its first call, so it survives kills. The processes that share a store share its budgets. Hits
are never refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cachepipe import wire
from cachepipe.accounting import Account, Seller
from cachepipe.contract.budgets import NANO, nanos
from cachepipe.contract.draws import label
from cachepipe.errors import BudgetExceeded, StoreError, UnknownCost
from cachepipe.flow.clock import CLOCK, Clock
from cachepipe.flow.tokens import Estimator, limit_of
from cachepipe.prices import HOW_TO_GIVE, Prices
from cachepipe.stores.base import (
    BeginSum,
    EndSum,
    Operation,
    Reserve,
    Reserved,
    RowSum,
    Settle,
    Store,
    SumBegun,
    new_id,
)
from cachepipe.stores.sums import deliveries_of, spent_rows

if TYPE_CHECKING:
    from typing import Self

_Result = TypeVar("_Result", Reserved, SumBegun)
_SKEW: Final = 3600.0  # seconds by which the clocks of machines may differ
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
        """Return the cost of a call by the cost or usage that its answer reports; None if it is unknown."""
        nanos = wire.reported_cost(usage)
        if nanos is not None:
            return nanos / 1e9
        counts = wire.token_counts(usage)
        if counts["total_tokens"] is None:
            return None
        return self.prices.cost_of_sum({name: count or 0 for name, count in counts.items()}, model, url)


class Reservation:
    """What is reserved for a call: until the call has ended and its samples are stored.

    If it is dropped before, it is settled then.

    Attributes:
        call: identifies the call.
    """

    def __init__(self, spending: Spending, namespace: str, amount: int, seller: Seller) -> None:
        self.call = new_id()
        self._spending = spending
        self._namespace = namespace
        self._amount = amount
        self._seller = seller
        self._spent: int | None = None  # None while the call goes on
        self._owed = 0  # samples that are not stored yet, less those that were stored before the call ended
        self._settled = False

    def __repr__(self) -> str:
        return f"<Reservation of {self._amount / NANO} US dollars>"

    def __del__(self) -> None:
        if not self._settled:
            with contextlib.suppress(Exception):  # the interpreter may be ending
                settle(filter(None, [self._settlement()]))

    def end(
        self, answer: Mapping[str, Any] | None = None, *, error: BaseException | None = None, samples: int = 0
    ) -> None:
        """Note what the call has cost; only the first time counts.

        Args:
            answer: the answer; without its usage, the call counts with all that was reserved.
            error: the error of a call that brought no answer; it counts nothing.
            samples: how many samples it has brought that are to be stored.
        """
        cost = self._spending.budget.cost(wire.usage_in(answer or {}), *self._seller)
        self.end_at(0.0 if error is not None else cost, samples)

    def end_at(self, cost: float | None, samples: int = 0) -> None:
        """Note what the call has cost in US dollars; all that was reserved if that is unknown."""
        if self._spent is None:
            self._spent = self._amount if cost is None else nanos(cost)
            self.stored(-samples)

    def refused(self) -> None:
        """Learn that nothing was reserved."""
        self._settled = True

    def stored(self, samples: int) -> None:
        """Learn that samples of the call are stored, or will not be."""
        settle(filter(None, [self.less(samples)]))

    def less(self, samples: int) -> tuple[Spending, Settle] | None:
        """Learn that samples are stored, or will not be; return what settles the call, if these were all."""
        self._owed -= samples
        return None if self._spent is None or self._owed > 0 else self._settlement()

    def _settlement(self) -> tuple[Spending, Settle] | None:
        if self._settled:
            return None
        self._settled = True
        return self._spending, Settle(self._namespace, self.call, self._spent or 0)


def settle(settlements: Iterable[tuple[Spending, Settle]]) -> None:
    """Settle calls in the background; those of one store in one transaction."""
    by_spending: dict[Spending, list[Settle]] = {}
    for spending, one in settlements:
        by_spending.setdefault(spending, []).append(one)
    for spending, some in by_spending.items():
        spending.settle(some)


class Reservations:
    """What the calls of an answer have reserved, until its samples are stored: a `Payment`.

    Args:
        reservations: for each sample of the answer, the reservation of the call that brought it.
    """

    def __init__(self, reservations: Iterable[Reservation]) -> None:
        self._samples = Counter(reservations)
        self.calls = [reservation.call for reservation in self._samples]

    @classmethod
    def of(cls, reservations: Iterable[Reservation | None]) -> Self | None:
        """Return what was reserved for samples; None if that is nothing."""
        known = [reservation for reservation in reservations if reservation is not None]
        return cls(known) if known else None

    def stored(self) -> None:
        """Learn that the samples of the answer are stored, or that they will not be."""
        samples, self._samples = self._samples, Counter()
        settle(filter(None, [reservation.less(count) for reservation, count in samples.items()]))


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
                reservation = Reservation(self, name, amount, seller)
                try:
                    state = await self._asked(Reserve(name, reservation.call, amount, nanos(limit)))
                except BaseException:
                    reservation.end_at(0.0)  # it may have been granted
                    raise
                if state.granted:
                    return reservation
                reservation.refused()
                if state.spent + amount > nanos(limit):
                    raise BudgetExceeded(namespace, limit, state.spent / NANO, most)
                await self._clock.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])

    async def _asked(self, reserve: Reserve) -> Reserved:
        """Ask the store for an amount; sum the rows first, where that is due."""
        name = reserve.namespace
        if name not in self._summed:
            await self._sum_up(name)
            self._summed.add(name)
        while True:
            state = _one(Reserved, await self._store.apply([reserve]))
            if not state.lost:
                return state
            await self._sum_up(name)

    async def _sum_up(self, name: str) -> None:
        """Sum the rows of a namespace up, while other calls may go on."""
        await deliveries_of(self._store).write()  # it has what could not be stored
        since, ended = time.time() - _SKEW, EndSum(name, new_id())
        try:
            begun = _one(SumBegun, await self._store.apply([BeginSum(name, ended.name)]))
            summed = partial(self._summed_rows, name, begun.calls, since)
            ended.found = await asyncio.get_running_loop().run_in_executor(None, summed)
            ended.ended = begun.ended
            await self._store.apply([ended])
        except BaseException:
            self._apply_soon([EndSum(name, ended.name)])
            raise

    def _summed_rows(self, name: str, calls: Collection[str], since: float) -> RowSum:
        """Return what the stored rows of a namespace have cost."""
        found = spent_rows(self._store, name, calls, since)
        rest = self._cost(found.rest)
        return RowSum(rest, [(calls, self._cost(account)) for calls, account in found.apart.items()])

    def _cost(self, account: Account) -> int:
        """Return the cost of rows in nano-dollars."""
        cost, unpriced = account.cost(self.budget.prices.cost_of_sum)
        if unpriced:
            raise UnknownCost(
                f"{unpriced} stored samples of the namespace have no known cost, so its budget cannot be "
                f"kept. {HOW_TO_GIVE}; for a server that reports no usage, set no budget"
            )
        return nanos(cost or 0.0)

    def settle(self, settlements: Sequence[Settle]) -> None:
        """Settle calls in the background."""
        self._apply_soon(settlements)

    def _apply_soon(self, operations: Sequence[Operation]) -> None:
        with contextlib.suppress(StoreError):  # it was closed: what is reserved ends with the process
            self._store.apply_soon(operations)


def _one(kind: type[_Result], results: Sequence[object]) -> _Result:
    """Return the one result of an operation."""
    [result] = results
    if not isinstance(result, kind):
        raise TypeError(f"a store returned {result!r:.80} instead of a {kind.__name__}")
    return result
