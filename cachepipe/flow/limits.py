"""The limits of an endpoint: which call may be made now, and which one is next.

Everything in the process that calls the endpoint shares one object, on any loop and thread. Its decisions
take no time and no I/O: quotas (`windows`), the lessons of the provider's answers (`adaptive`) and the order
of those that wait (`queues`). A call that waits is woken on its own loop.

A call that does not fit yet holds up the calls behind it, because large calls would wait for ever otherwise.
If only the limits of its model are in the way, it holds up the calls of that model alone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import threading
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from cachepipe import loops
from cachepipe.errors import StoreError
from cachepipe.flow.adaptive import Adaptive
from cachepipe.flow.calls import FlowStats, LimitedModel, Slot, WaitingCall, holding
from cachepipe.flow.clock import CLOCK, Alarm, Clock, call_on, running_loop
from cachepipe.flow.headers import headers_of, hints, in_any_case, retry_after
from cachepipe.flow.shared import SharedQuotas, Taken
from cachepipe.flow.windows import Quota, is_number, longest_wait, take_all
from cachepipe.outages import is_connection_error, status_of

_logger = logging.getLogger(__name__)
_AGAIN = 0.005  # seconds until a failed write is tried again
_COLD = 5.0  # seconds that a request may take to arrive before the first answer has come
_WITHIN = 2  # the rank of a call that is made within another one
_NOTABLE = 60.0  # seconds of a pause that is logged, because the program may seem to hang
_TICK = 1e-6  # seconds of the shortest wait; rounding may turn a shorter one into none
_OVERLOADED = frozenset({408, 498, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class Limits:
    """Limits on calls, shared by all who call one endpoint. Every method may be called from any thread.

    Args:
        max_requests: calls within any interval; None is no limit.
        max_tokens: tokens within any interval; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
        per_model: further limits by the name of the model, each a `Quota` or a mapping of its fields.
        adaptive: whether refusals (429) and overloads slow calls down. Retry-After and the provider's headers
            are always obeyed.
        transit: the seconds that a request may take to arrive at the provider; default is a quarter of the
            interval, at most 1. See ``cachepipe.flow.windows``.
        shared: a folder in which processes of this machine share the quotas.
        name: identifies these limits in that folder.
        clock: the clock.
    """

    def __init__(
        self,
        max_requests: float | None = None,
        max_tokens: float | None = None,
        interval: float = 60.0,
        *,
        max_concurrency: int | None = None,
        per_model: Mapping[str, Quota | Mapping[str, Any]] | None = None,
        adaptive: bool = True,
        transit: float | None = None,
        shared: str | os.PathLike[str] | None = None,
        name: str = "limits",
        clock: Clock = CLOCK,
    ) -> None:
        self.quota = Quota(max_requests, max_tokens, interval, max_concurrency)
        if not isinstance(per_model or {}, Mapping):
            raise TypeError(
                f"per_model is a mapping of limits by the name of a model; got {per_model!r:.100}"
            )
        self.per_model = {name: Quota.of(quota) for name, quota in (per_model or {}).items()}
        if transit is not None and not (is_number(transit) and transit >= 0):
            raise ValueError(f"transit is a number of seconds, 0 or more; got {transit!r}")
        self.transit = transit
        self.adaptive = adaptive
        self.clock = clock
        self._name = name
        self._shared = None if shared is None else SharedQuotas(shared, name)
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a coroutine that is collected may leave the queue at any point
        self._alarm = Alarm(self.clock, self._lock, self._dispatch)
        self._dispatching = self._again = False
        self._busy = False  # whether a call may be waiting
        self._warm = False  # whether a call has been answered
        self._places = 0
        self._windows = self.quota.windows()
        self._models: dict[str | None, LimitedModel] = {}
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._stats = FlowStats()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Limits {self.describe()}, {stats.waiting} waiting, {stats.in_flight} in flight>"

    def describe(self) -> str:
        """Return the limits in words."""
        return str(self.quota)

    def stats(self) -> FlowStats:
        """Return what has passed through the limits since they were made."""
        with self._lock:
            waiting = sum(1 for model in self._models.values() for _ in model.queue)
            return replace(self._stats, waiting=waiting)

    def learned(self) -> dict[str | None, dict[str, float | None]]:
        """Return what was learned of each model: ``concurrency``, and ``pace`` in calls per second."""
        with self._lock:
            return {
                name: {"concurrency": model.adaptive.concurrency, "pace": model.adaptive.pace}
                for name, model in self._models.items()
            }

    def share(self, folder: str | os.PathLike[str]) -> None:
        """Share the quotas with other processes of the machine, unless a folder was given already.

        Args:
            folder: the folder.
        """
        if self._shared is None:
            self._shared = SharedQuotas(folder, self._name)

    def close(self) -> None:
        """Close the file that processes share, if there is one. The limits may be used again."""
        with self._lock:
            if self._shared is not None:
                self._shared.close()

    # A call comes in.

    async def enter(
        self,
        *,
        namespace: str | None = None,
        model: str | None = None,
        tokens: float = 0.0,
        ahead: bool = False,
    ) -> Slot:
        """Wait until a call may be made, and return the permission to make it. The caller ends it.

        Args:
            namespace: the namespace of the call.
            model: the name of the model that is called.
            tokens: the estimated tokens of the call.
            ahead: whether it goes before all that wait, because it is a repeated attempt.
        """
        rank = _WITHIN if self._is_within() else int(ahead)
        with self._lock:
            now = self.clock.now()
            known = self._known(model)
            self._stats.retries += ahead
            if not self._busy and self._shared is None and self._wait(known, tokens, rank, now).wait <= 0:
                slot = self._slot(known, tokens, rank, now)
                self._expire(slot, now, arrived=False)
                return slot
            waiting = WaitingCall(loops.running(), next(self._numbers), rank, known, tokens, now)
            known.queue.add(waiting, namespace, self._virtual)
            self._busy = True
            self._dispatch()
        if waiting.slot is None:
            try:
                await waiting.woken
            except BaseException:
                self._leave(waiting)
                raise
        if waiting.slot is None:
            raise asyncio.CancelledError if waiting.error is None else waiting.error
        self._begin(waiting.slot, waiting.since)
        return waiting.slot

    def _is_within(self) -> bool:
        """Return True if the caller is in a call that these limits have permitted."""
        return any(slot.limits is self and not slot.ended for slot in holding.get())

    def _known(self, name: str | None) -> LimitedModel:
        """Return what is known of a model, which may be new."""
        model = self._models.get(name)
        if model is None:
            quota = self.per_model.get(name or "")
            quotas = [self.quota] if quota is None else [self.quota, quota]
            most = min(math.inf if each.max_concurrency is None else each.max_concurrency for each in quotas)
            windows = [] if quota is None else quota.windows()
            model = LimitedModel(name, quota, windows, Adaptive(most, learns=self.adaptive))
            self._models[name] = model
        return model

    def _leave(self, waiting: WaitingCall) -> None:
        """Give up a place, or a permission that came too late."""
        with self._lock:
            waiting.left = True
            slot = waiting.slot
            if slot is not None and not slot.ended and self._is_own(slot):
                slot.ended = True
                for window, use in slot.uses:
                    window.give_back(use)
                if slot.shared is not None and self._shared is not None:
                    self._shared.give_back(slot.shared)
                slot.model.adaptive.unsent(slot.tokens)
                self._release(slot)
                self._stats.calls -= 1
            self._dispatch()

    def _is_own(self, slot: Slot) -> bool:
        """Return True if this process gave the slot, and not one from which it was forked."""
        return self._models.get(slot.model.name) is slot.model

    # It is let go.

    def _dispatch(self) -> None:
        """Let go all calls that may be made now, in order, and set the alarm for the others."""
        self._again = True
        if self._dispatching:  # a call that was let go, or a shared quota, has brought another look about
            return
        self._dispatching = True
        try:
            while self._again:
                self._again = False
                self._let_go_all(self.clock.now())
        finally:
            self._dispatching = False

    def _let_go_all(self, now: float) -> None:
        held: set[str | None] = set()  # the models whose next call has to wait
        soonest = math.inf
        while (waiting := min(self._heads(held), default=None)) is not None:
            try:
                taken = self._take(waiting, now)
            except StoreError as error:
                waiting.model.queue.pop(0.0)
                waiting.left, waiting.error = True, error
                call_on(waiting.loop, waiting.wake)
                continue
            if taken.wait <= 0:
                self._let_go(waiting, now, taken.call)
                continue
            soonest = min(soonest, now + taken.wait)
            if taken.whole:
                break
            held.add(waiting.model.name)
        heads = self._heads()
        self._busy = bool(heads)
        if not heads:
            self._virtual = 0.0
            for model in self._models.values():
                model.queue.lines.clear()
        soonest = min(soonest, self._write_late(now))
        if soonest < math.inf:
            here = running_loop()
            waiters = {head.loop for head in heads}
            self._alarm.set(waiters if here is None else {here, *waiters}, max(soonest, now + _TICK))

    def _heads(self, held: Collection[str | None] = ()) -> list[WaitingCall]:
        """Return the first waiting call of each model, except those of some models."""
        firsts = (model.queue.first() for model in self._models.values() if model.name not in held)
        return [head for head in firsts if head is not None]

    def _write_late(self, now: float) -> float:
        """Repeat writes to the shared quotas that failed; return when they have to be repeated again."""
        if self._shared is None or not self._shared.late:
            return math.inf
        self._shared.write()
        return now + _AGAIN if self._shared.late else math.inf

    def _wait(self, model: LimitedModel, tokens: float, rank: int, now: float) -> Taken:
        """Return how long a call has to wait as far as this process knows, and whether all others wait."""
        wait = max(
            model.adaptive.wait(0 if rank == _WITHIN else model.in_flight, now, tokens),
            longest_wait(model.windows, tokens, now),
        )
        if wait > 0:
            return Taken(wait, whole=False)
        most = self.quota.max_concurrency
        full = most is not None and self._places >= most and rank != _WITHIN
        return Taken(math.inf if full else longest_wait(self._windows, tokens, now))

    def _take(self, waiting: WaitingCall, now: float) -> Taken:
        """Return how long a call has to wait; if it has not, take it from the quotas of all processes."""
        model = waiting.model
        taken = self._wait(model, waiting.tokens, waiting.rank, now)
        if taken.wait > 0 or self._shared is None:
            return taken
        quotas = [self.quota] if model.quota is None else [self.quota, model.quota]
        if waiting.rank == _WITHIN:
            quotas = [replace(quota, max_concurrency=None) for quota in quotas]
        return self._shared.take(quotas, model.name, waiting.tokens, self._transit, now)

    def _let_go(self, waiting: WaitingCall, now: float, shared: int | None) -> None:
        """Permit the call that is next."""
        if waiting.line is not None:
            self._virtual = max(self._virtual, waiting.line.start)
        requests, tokens = self.quota.max_requests, self.quota.max_tokens
        share = max(1 / requests if requests else 0.001, waiting.tokens / tokens if tokens else 0.0)
        waiting.model.queue.pop(share)  # its cost is its share of the quota that it uses most of
        waiting.slot = self._slot(waiting.model, waiting.tokens, waiting.rank, now)
        waiting.slot.shared = shared
        call_on(waiting.loop, waiting.wake)

    def _slot(self, model: LimitedModel, tokens: float, rank: int, now: float) -> Slot:
        """Return the permission to make a call now."""
        uses = take_all((*self._windows, *model.windows), tokens)
        spent = model.adaptive.sent(tokens, now)
        slot = Slot(self, self._end, model, uses, tokens, now, spent, places=0 if rank == _WITHIN else 1)
        model.in_flight += slot.places
        self._places += slot.places
        self._stats.in_flight += 1
        self._stats.calls += 1
        return slot

    # It goes out, and ends.

    def _begin(self, slot: Slot, since: float) -> None:
        """Note when a call is really made: its loop may have been busy since it was let go."""
        with self._lock:
            now = self.clock.now()
            late = now - slot.begun
            if slot.shared is not None and self._shared is not None and late > _AGAIN:
                self._shared.delay(slot.shared, late)
            slot.begun = now
            slot.queued = now - since
            self._stats.queue_seconds += slot.queued
            self._expire(slot, now, arrived=False)
            if slot.uses:
                self._dispatch()  # only now is it known how long the others have to wait

    def _expire(self, slot: Slot, now: float, *, arrived: bool) -> None:
        """Set the end of what a call uses; later, if its request may not have arrived yet."""
        for window, use in slot.uses:
            window.expire(use, now + window.interval + (0.0 if arrived else self._transit(window.interval)))

    def _transit(self, interval: float) -> float:
        """Return the seconds that a request may take to arrive."""
        if self.transit is not None:
            return self.transit
        usual = min(1.0, interval / 4)
        return usual if self._warm else max(usual, _COLD)

    def _end(
        self,
        slot: Slot,
        tokens: float | None,
        headers: Mapping[str, Any] | None,
        error: BaseException | None,
    ) -> None:
        headers = headers_of(error) if headers is None else in_any_case(headers)
        with self._lock:
            if not self._is_own(slot):
                return
            now = self.clock.now()
            in_flight = slot.model.in_flight
            self._release(slot)
            self._stats.call_seconds += now - slot.begun
            if tokens is not None:
                self._correct(slot, tokens)
            elif error is None:
                self._stats.tokens += slot.tokens
            self._expire(slot, now, arrived=True)
            if slot.shared is not None and self._shared is not None:
                self._shared.end(slot.shared, tokens, now)
            for hint in hints(headers):
                slot.model.adaptive.learn_hint(hint, slot.spent, slot.begun, now)
            self._learn(slot, in_flight, headers, error, now)
            if self._busy or self._shared is not None:
                self._dispatch()

    def _correct(self, slot: Slot, tokens: float) -> None:
        """Count the tokens that a call has used instead of its estimate."""
        self._stats.tokens += tokens
        for window, use in slot.uses:
            if window.of_tokens:
                window.correct(use, tokens)

    def _learn(
        self,
        slot: Slot,
        in_flight: int,
        headers: Mapping[str, Any] | None,
        error: BaseException | None,
        now: float,
    ) -> None:
        """Count what became of a call, and learn from it."""
        stats, adaptive, status = self._stats, slot.model.adaptive, status_of(error)
        if error is None:
            self._warm = True
            stats.answered += 1
            adaptive.answered(slot.begun, in_flight, now)
            return
        if status == 429:
            stats.refused += 1
            learn = adaptive.refused
        elif status in _OVERLOADED or is_connection_error(error):
            stats.overloaded += 1
            learn = adaptive.overloaded
        else:
            stats.failed += isinstance(error, Exception)
            return
        pause = retry_after(headers)
        if pause and pause >= _NOTABLE and adaptive.paused_until <= now:
            name = slot.model.name
            _logger.warning("the provider asks for no calls of model %s for %d seconds", name, pause)
        if pause and self._shared is not None:
            self._shared.pause(slot.model.name, now + pause)
        learn(slot.begun, pause, now)

    def _release(self, slot: Slot) -> None:
        slot.model.in_flight -= slot.places
        self._places -= slot.places
        self._stats.in_flight -= 1


_all: weakref.WeakSet[Limits] = weakref.WeakSet()


def _after_fork() -> None:
    """Reset all limits in a forked child: its parent's calls are not its own, and may have held a lock."""
    for limits in _all:
        limits._reset()  # noqa: SLF001 - this module's own
        if limits._shared is not None:  # noqa: SLF001 - likewise
            limits._shared.forget()  # noqa: SLF001 - likewise


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
