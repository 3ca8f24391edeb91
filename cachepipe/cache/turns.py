"""Hands over answers in the order of `cachepipe.contract.schedule`: one at a time, in a quiet program (C11).

A request takes a `Turn` when it arrives. While answers wait for their turns, a callback runs once in each
turn of the event loop. If the loop is quiet, the callback hands over the next answer; if no answer is ready,
it asks the model for the samples that are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from cachepipe.contract.schedule import (
    CLAIM_SECONDS,
    HOLD_SECONDS,
    LAST,
    MOST_TURNS,
    QUIET_TURNS,
    RESTLESS_TURNS,
    HandedOver,
    Place,
    Schedule,
)
from cachepipe.loops import own_handles

if TYPE_CHECKING:
    from cachepipe.cache.calls import Demand
    from cachepipe.cache.write_queue import WriteQueue


class Placed(Protocol):
    """The samples of a draw, which have a place in the schedule."""

    @property
    def place(self) -> Place:
        """The place."""
        ...

    def note_place(self, place: Place, then: Callable[[Any], None]) -> None:
        """Record another place, then call ``then`` with None or an error."""
        ...


class Turn:
    """One request's turn to be answered. It ends when ``come`` returns, or with ``leave``."""

    __slots__ = ("_asks", "arrival", "line")

    def __init__(self, line: Line, arrival: int) -> None:
        self.line = line
        self.arrival = arrival
        self._asks = False  # whether it has asked at once: the rest of its demands go with the first

    def want(self, queue: WriteQueue, demand: Demand, window: float) -> None:
        """Ask for samples when no request in flight can be answered."""
        self._asks = self.line.is_alone(asks=self._asks)
        if self._asks:
            queue.want(demand, window=window)
        else:
            self.line.delay(queue, demand, window)

    async def come(self, last: Placed | None) -> None:
        """Wait until the answer is handed over.

        Args:
            last: the samples of the answer with the latest place; None for an answer without samples, which
                comes after all that are ready.

        Raises:
            StoreError: when the answer is late, and its place cannot be recorded.
        """
        line, arrival = self.line, self.arrival
        if line.has_ended(arrival):
            return
        if line.answers_at_once(arrival):
            line.leave(arrival)
            return
        future: asyncio.Future[None] = line.loop.create_future()
        try:
            line.ready(arrival, future, last)
            await future
        except BaseException:
            line.leave(arrival)
            raise

    def leave(self) -> None:
        """End the turn without an answer."""
        self.line.leave(self.arrival)


def latest(answered: Iterable[Placed]) -> Placed | None:
    """Return the samples with the latest place; None for an empty sequence."""
    return max(answered, key=lambda one: one.place, default=None)


class Line:
    """The requests of one event loop and store that wait for their turns.

    Args:
        loop: the event loop.

    Attributes:
        quiet_turns: the turns without requests after which the loop counts as quiet, if its queue cannot be
            read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.quiet_turns = QUIET_TURNS
        self._handles = own_handles(loop)
        self._schedule = Schedule()
        self._in_flight = self._schedule.in_flight
        self._waiting: dict[int, tuple[asyncio.Future[None], Placed | None]] = {}
        self._delayed: dict[WriteQueue, None] = {}
        self._delayed_since = 0.0
        self._before: set[int] | None = None  # the answers that go before the delayed demands
        self._claims = 0  # claims under way
        self._lacking = (
            0  # those of them that will find no sample; the store may have what the others ask for
        )
        self._patience: asyncio.TimerHandle | None = None  # ends the wait for claims and notes
        self._noting = False  # whether the place of an answer is being recorded
        self._impatient = False  # whether claims or a note have taken too long
        self._restless = False  # whether the loop has not been quiet for too long
        self._stopped = True  # whether no callback is scheduled
        self._turns = 0  # turns since an answer was handed over
        self._still = 0  # turns since a request came or went

    def __repr__(self) -> str:
        return f"<Line {len(self._waiting)} answers of {len(self._in_flight)} requests wait>"

    def rests(self) -> bool:
        """Return True if no request is in flight and the program waits for nothing else."""
        return not self._in_flight and self._handles.alone

    def is_alone(self, *, asks: bool = False) -> bool:
        """Return True if only one request is in flight and the program waits for nothing else.

        Args:
            asks: whether that request has begun to ask the model, so that the program waits for this.
        """
        return len(self._in_flight) == 1 and (asks or self._handles.alone)

    @property
    def is_crowded(self) -> bool:
        """Whether several requests are in flight."""
        return len(self._in_flight) > 1

    def answers_at_once(self, arrival: int) -> bool:
        """Return True if a request need not wait for its turn: it is alone, and was so all the time."""
        return self.is_alone() and not self._schedule.may_be_late(arrival)

    def has_ended(self, arrival: int) -> bool:
        """Return True if the turn of a request is over."""
        return arrival not in self._in_flight

    # Requests.

    def arrive(self) -> Turn:
        """Return the turn of a request that arrives now."""
        self._still = 0
        return Turn(self, self._schedule.arrive())

    def leave(self, arrival: int) -> None:
        """End the turn of a request."""
        self._still = 0
        self._waiting.pop(arrival, None)
        if self._before is not None:
            self._before.discard(arrival)
        self._schedule.leave(arrival)

    def ready(self, arrival: int, future: asyncio.Future[None], last: Placed | None) -> None:
        """Hand an answer over in its turn.

        Args:
            arrival: the number of its request.
            future: is resolved when the turn has come.
            last: the samples of the answer with the latest place; None if it has none.
        """
        self._waiting[arrival] = (future, last)
        self._schedule.ready(arrival, LAST if last is None else last.place)
        if self._stopped:
            self._go_on()

    def delay(self, queue: WriteQueue, demand: Demand, window: float) -> None:
        """Ask for samples later, when no request in flight can be answered."""
        if not self._delayed:
            self._delayed_since = self.loop.time()
        self._delayed[queue] = None
        queue.delayed[demand] = window
        self._go_on()

    def claiming(self) -> None:
        """Note that a claim is under way: the store may have what it asks for."""
        self._claims += 1

    def lacking(self) -> None:
        """Note that a claim under way will find no sample, so that answers need not wait for it."""
        self._lacking += 1
        self._written()

    def claimed(self, *, lacking: bool = False) -> None:
        """Note that a claim was answered, and whether it was noted as ``lacking``."""
        self._claims -= 1
        self._lacking -= lacking
        self._written()

    def _written(self) -> None:
        """Go on when no claim and no note is under way that answers wait for."""
        if self._patience is not None and not self._is_writing():
            self._patience.cancel()
            self._patience, self._impatient = None, False
        self._go_on()

    def _is_writing(self) -> bool:
        """Return True while claims or a note are under way. Only the delayed demands wait for all claims."""
        if self._noting or not self._claims:
            return self._noting
        return self._claims > self._lacking or not self._schedule.any_ready

    async def drain(self) -> None:
        """Wait until the answers that are ready now are handed over."""
        await asyncio.sleep(0)  # those that have just come get ready
        if self._waiting:
            await asyncio.wait([future for future, _ in self._waiting.values()])

    # Turns of the loop.

    def _go_on(self) -> None:
        """Schedule the callback, if there is something to do for it."""
        if self._stopped and (self._delayed or self._schedule.any_ready) and not self._must_wait():
            self._stopped = False
            self._call_soon()

    def _must_wait(self) -> bool:
        """Return True while claims or a note are under way, unless they have taken too long."""
        if not self._is_writing():
            return False
        if self._patience is None:
            self._patience = self.loop.call_later(CLAIM_SECONDS, self._lose_patience)
        return not self._impatient

    def _lose_patience(self) -> None:
        self._impatient = True
        self._go_on()

    def _call_soon(self) -> None:
        self._handles.steps += 1
        self.loop.call_soon(self._step)

    def _step(self) -> None:
        """Hand over an answer or ask for samples, if the program is quiet."""
        self._handles.steps -= 1
        self._turns += 1
        self._still += 1
        if not self._must_wait():
            if not self._is_quiet():
                self._call_soon()
                return
            self._turns = self._still = 0
            if self._delayed:
                self._look_at_delayed()
            next_one = self._schedule.next()
            if next_one is None:
                self._ask()
            else:
                self._hand_over(next_one)
        self._stopped = True
        self._go_on()

    def _look_at_delayed(self) -> None:
        """Ask for delayed samples if the answers that were ready at first have had their consequences."""
        if self._before is None:
            self._before = {*self._waiting}
        elif not self._before and self.loop.time() - self._delayed_since >= HOLD_SECONDS:
            self._ask()

    def _is_quiet(self) -> bool:
        handles = self._handles
        if handles.ready is None:
            quiet = self._still > self.quiet_turns
        else:
            quiet = len(handles.ready) <= handles.count + handles.steps
        if quiet:
            self._restless = False
        elif self._turns > MOST_TURNS:
            self._restless = True
        return quiet or (self._restless and self._turns > RESTLESS_TURNS)

    def _hand_over(self, next_one: HandedOver) -> None:
        future, last = self._waiting.pop(next_one.arrival)
        if next_one.note is None or last is None:
            self._resolve(future, None)
        else:
            self._noting = True
            last.note_place(next_one.note, lambda error: self._noted(future, error))
        if self._before is not None:
            self._before.discard(next_one.arrival)

    def _noted(self, future: asyncio.Future[None], error: Any) -> None:
        self._resolve(future, error)
        self._noting = False
        self._written()

    @staticmethod
    def _resolve(future: asyncio.Future[None], error: Any) -> None:
        if future.done():
            return
        if isinstance(error, Exception):
            future.set_exception(error)
        else:
            future.set_result(None)

    def _ask(self) -> None:
        """Ask for the samples that were delayed."""
        delayed, self._delayed, self._before = self._delayed, {}, None
        for queue in delayed:
            queue.want_delayed()
