"""Calls to the model; ``cachepipe.contract.demands`` decides which demands share a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from typing import Any

from cachepipe.adapting import cut_of, has_request, hooks_of, limit_of
from cachepipe.contract.demands import PATIENCE, Answered, Limit, answered, cut, largest, repeats
from cachepipe.errors import ShortAnswer
from cachepipe.outages import status_of
from cachepipe.stage import Flight, Stage, ask_batch, payment_of, samples_of
from cachepipe.stores.base import new_id
from cachepipe.typedefs import Payment, Request

_STEP = 0.05  # seconds after which closing sends again what the stages below have queued


class Demand:
    """The samples of one question that one draw demands. Subclasses define where the samples go.

    Attributes:
        group: demands of one group may share a call; None means that the demand shares no call.
        slots: the places of the samples. Each is bound to a place in a call before the call is made, so the
            order of completion does not matter (C5).
        calls: the calls in flight for it.
    """

    __slots__ = ("calls", "group", "slots")

    def __init__(self, group: Hashable | None, slots: Sequence[int]) -> None:
        self.group = group
        self.slots = slots
        self.calls: set[Call] = set()

    @property
    def request(self) -> Request:
        """The request, with the ``n`` that its caller wrote."""
        raise NotImplementedError

    @property
    def wanted(self) -> bool:
        """Whether anyone waits for it."""
        raise NotImplementedError

    def deliver(self, slots: Sequence[int], values: list[Any], call: Call) -> None:
        """Take samples that a call has returned."""
        raise NotImplementedError

    def fail(self, slots: Sequence[int], error: BaseException | None) -> None:
        """Learn that the call for samples failed; the error is None if the call was withdrawn."""
        raise NotImplementedError


Piece = tuple[Demand, Sequence[int]]


class Call:
    """One call to the model: its id, its demands, its number of samples, and how to withdraw it.

    Attributes:
        payment: what its answer has reserved of a budget, until its samples are stored.
        owed: how many of its samples are being stored, and one more while they are handed out.
    """

    __slots__ = (
        "begun",
        "empty",
        "flight",
        "id",
        "owed",
        "payment",
        "pieces",
        "seconds",
        "settled",
        "task",
        "ticket",
        "total",
        "withdrawn",
    )

    def __init__(self, pieces: list[Piece], empty: int = 0) -> None:
        self.id = new_id()
        self.pieces = pieces
        self.total = len(pieces[0][1]) if len(pieces) == 1 else sum(len(slots) for _, slots in pieces)
        self.empty = empty
        self.seconds = 0.0
        self.begun = self.settled = self.withdrawn = False
        self.task: asyncio.Task[None] | None = None
        self.ticket: Any = None
        self.flight: Flight | None = None
        self.payment: Payment | None = None
        self.owed = 1

    def stored(self, _result: object = None) -> None:
        """Learn that a sample is stored, or could not be; the last one ends what was reserved."""
        self.owed -= 1
        if not self.owed and self.payment is not None:
            self.payment.stored()

    @property
    def request(self) -> Request:
        """The request to send to the model."""
        [(demand, slots), *others] = self.pieces
        request, total = demand.request, self.total
        if others:
            return request.merging(total)
        request.placed(slots)
        return request if request.n == total else request.asking(total)

    @property
    def merged(self) -> bool:
        """Whether the call serves more than one demand."""
        return len(self.pieces) > 1

    @property
    def wanted(self) -> bool:
        """Whether anyone waits for any of it."""
        return any(demand.wanted for demand, _ in self.pieces)

    def withdraw(self) -> None:
        """Stop the call, unless it is part of a batch that others still wait for."""
        self.withdrawn = True
        if self.ticket is not None:
            self.ticket.withdraw()
        elif self.flight is not None:
            self.flight.leave(self)
        elif self.task is not None and self.begun:
            self.task.cancel()


class DirectDemand(Demand):
    """What a caller without a store demands: its samples go to the caller directly."""

    __slots__ = ("_owed", "_request", "future", "values")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, request: Request, group: Hashable | None = None
    ) -> None:
        super().__init__(group, range(request.n))
        self._request = request
        self.values: list[Any] = [None] * request.n
        self._owed = request.n
        self.future: asyncio.Future[None] = loop.create_future()

    @property
    def request(self) -> Request:
        """The request."""
        return self._request

    @property
    def wanted(self) -> bool:
        """Whether the caller still waits."""
        return not self.future.done()

    def deliver(self, slots: Sequence[int], values: list[Any], call: Call) -> None:  # noqa: ARG002 - not recorded
        """Put samples in their places."""
        for slot, value in zip(slots, values, strict=True):
            self.values[slot] = value
        self._owed -= len(values)
        if not self._owed and not self.future.done():
            self.future.set_result(None)

    def fail(self, slots: Sequence[int], error: BaseException | None) -> None:  # noqa: ARG002 - it fails as a whole
        """Fail as a whole."""
        if self.future.done():
            return
        if error is None:
            self.future.cancel()
        else:
            self.future.set_exception(error)

    async def result(self) -> list[Any]:
        """Return the samples; a cancelled caller withdraws calls that nobody else waits for."""
        try:
            await self.future
        except BaseException:
            self.future.cancel()
            withdraw(self)
            raise
        return self.values


class Caller:
    """Asks a model for the samples that are needed, in as few calls as its limit allows.

    Args:
        loop: the event loop of the calls.
        model: the model or stage to ask.
        extra: a function that takes samples beyond the number that was asked for, with a demand for them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        model: Any,
        extra: Callable[[Demand, list[Any], Call], None],
    ) -> None:
        self._loop = loop
        self._model = model
        self._single_requests = has_request(model)
        self._limit = Limit(cut_of(model))
        hooks = hooks_of(model)
        self._submit, self._context_of = hooks.submit, hooks.context_of
        self._extra = extra
        self._tasks: dict[asyncio.Task[None], list[Call]] = {}
        self.calls = 0
        self.generated = 0
        self.in_flight = 0

    def start(self, demands: Sequence[Demand]) -> None:
        """Begin the calls for demands that arrived together."""
        if not demands:
            return
        groups: dict[Hashable, list[Demand]] = {}
        for demand in demands:
            groups.setdefault(id(demand) if demand.group is None else demand.group, []).append(demand)
        own = limit_of(self._model)
        limit = self._limit.of(own)
        self._send(
            [
                Call(pieces)
                for group in groups.values()
                for pieces in cut(group, own if group[0].group is None else limit)
            ]
        )

    def _send(self, calls: list[Call]) -> None:
        if self._single_requests:
            for call in calls:
                self._spawn([call], self._single(call))
        elif calls:
            self._spawn(calls, self._batch(calls))

    def _spawn(self, calls: list[Call], work: Any) -> None:
        context = None if self._context_of is None else self._context_of(calls[0].pieces[0][0].request)
        task: asyncio.Task[None] = self._loop.create_task(work, context=context)
        self._tasks[task] = calls
        task.add_done_callback(self._ended)
        for call in calls:
            if len(calls) == 1:
                call.task = task
            for demand, _ in call.pieces:
                demand.calls.add(call)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Fail the calls of a task that was cancelled before it began."""
        for call in self._tasks.pop(task):
            if not call.settled:
                self._failed(call, asyncio.CancelledError())

    async def _single(self, call: Call) -> None:
        if call.withdrawn and not call.wanted:
            return
        call.begun = True
        total = call.total
        request = call.request
        self._begin(total)
        begun = time.perf_counter()
        try:
            if self._submit is not None:
                call.ticket = self._submit(request)
                try:
                    answer = await call.ticket
                except asyncio.CancelledError:
                    call.ticket.withdraw()  # the loop is ending; an answer that came is still used
                    answer = call.ticket.result()
            else:
                answer = await self._model.request(request)
            values = samples_of(answer)
        except BaseException as error:
            self.in_flight -= total
            self._failed(call, error)
            if isinstance(error, asyncio.CancelledError | Exception):
                return
            raise
        self.in_flight -= total
        call.seconds = time.perf_counter() - begun
        call.payment = payment_of(answer)
        self._answered(call, values)

    async def _batch(self, calls: list[Call]) -> None:
        calls = [call for call in calls if not call.withdrawn or call.wanted]
        if not calls:
            return
        flight = Flight(calls)
        flight.task = asyncio.current_task()
        for call in calls:
            call.flight = flight
        self._begin(sum(call.total for call in calls), len(calls))
        begun = time.perf_counter()

        def settle(place: int, answer: Any) -> None:
            call = calls[place]
            if not call.settled:
                flight.answered(call)
                self.in_flight -= call.total
                call.seconds = time.perf_counter() - begun
                self._settle(call, answer)

        here = copy_context()  # work that begins when an answer comes is not part of the call's context
        requests = [call.request for call in calls]
        try:
            await ask_batch(self._model, requests, lambda place, answer: here.run(settle, place, answer))
        except BaseException as error:
            flight.task = None  # the task ends here
            for place in range(len(calls)):
                settle(place, error)
            if not isinstance(error, asyncio.CancelledError):
                raise

    def _settle(self, call: Call, answer: Any) -> None:
        """Take the answer or the error of one call of a batch."""
        if isinstance(answer, BaseException):
            self._failed(call, answer)
            return
        try:
            values = samples_of(answer)
        except Exception as error:  # noqa: BLE001 - it belongs to those who needed this call
            self._failed(call, error)
        else:
            call.payment = payment_of(answer)
            self._answered(call, values)

    def _begin(self, total: int, calls: int = 1) -> None:
        self.calls += calls
        self.in_flight += total

    def _answered(self, call: Call, values: list[Any]) -> None:
        """Hand out the samples of a call, and ask again for those that are missing."""
        call.settled = True
        self.generated += len(values)
        self._hand_out(call, values)
        call.stored()

    def _hand_out(self, call: Call, values: list[Any]) -> None:
        if len(values) == call.total and not call.merged:
            demand, slots = call.pieces[0]
            demand.calls.discard(call)
            _deliver(demand, slots, values, call)
            return
        then = answered(call.pieces, len(values), call.empty)
        start = 0
        for (demand, slots), got in zip(call.pieces, then.given, strict=True):
            if got:
                _deliver(demand, slots[:got], values[start : start + got], call)
            start += got
        if then.extra:
            self._extra(call.pieces[0][0], values[start:], call)
        _detach(call)
        if then.limit is not None:
            self._limit.lower(then.limit)
        self._ask_again(call, then, brought=bool(values))

    def _ask_again(self, call: Call, then: Answered[Demand], *, brought: bool) -> None:
        """Ask for what a call left missing, or give the model up."""
        if then.separately:
            self._send_each(then.missing)
        elif then.gives_up:
            [(demand, slots)] = then.missing
            error = ShortAnswer(
                f"asked for {demand.request.n} samples, the model still owes {len(slots)} after {PATIENCE} "
                "calls in a row that returned none; check what it returns for n > 1, or set its max_n"
            )
            demand.fail(slots, error)
        elif then.missing:
            self._send([Call(list(then.missing), 0 if brought else call.empty + 1)])

    def _failed(self, call: Call, error: BaseException) -> None:
        call.settled = True
        _detach(call)
        if repeats(call.pieces, timed_out=_timed_out(error), status=status_of(error)):
            self._limit.lower(largest(call.pieces))
            self._send_each(call.pieces)
            return
        told = None if isinstance(error, asyncio.CancelledError | GeneratorExit) else error
        for demand, slots in call.pieces:
            demand.fail(slots, told)

    def _send_each(self, pieces: Sequence[Piece]) -> None:
        """Ask for each piece in a call of its own, except for callers that do not wait any more."""
        wanted = []
        for demand, slots in pieces:
            if demand.wanted:
                wanted.append(Call([(demand, slots)]))
            else:
                demand.fail(slots, None)
        self._send(wanted)

    @property
    def busy(self) -> bool:
        """Whether a call is in flight."""
        return bool(self._tasks)

    async def step(self) -> None:
        """Send the requests that the stages below have queued, and wait until a call in flight has ended.

        It also returns after a short time, as a call that has just begun may reach their queues later.
        """
        await asyncio.sleep(0)
        if isinstance(self._model, Stage):
            self._model.flush()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=_STEP, return_when=asyncio.FIRST_COMPLETED)


def _deliver(demand: Demand, slots: Sequence[int], values: list[Any], call: Call) -> None:
    """Hand samples to a demand. If that raises, only this demand fails."""
    try:
        demand.deliver(slots, values, call)
    except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
        demand.fail(slots, error)


def _detach(call: Call) -> None:
    for demand, _ in call.pieces:
        demand.calls.discard(call)


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def withdraw(demand: Demand) -> None:
    """Stop the calls for a demand, unless others wait for them."""
    for call in list(demand.calls):
        if not call.wanted:
            call.withdraw()
