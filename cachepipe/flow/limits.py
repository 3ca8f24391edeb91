"""The limits of an endpoint: who may call now, and in which order the others wait.

One object is shared by everything that calls the endpoint, from any loop and thread of the process. What
it decides takes no time and no I/O: quotas (`windows`), what the provider's answers teach (`adaptive`),
and the queue. Whoever waits is woken on its own loop.

The queue is fair between namespaces, by start-time fair queueing (Goyal et al. 1996): each call is tagged
with the virtual time at which its namespace would have had its turn, and the lowest tag goes first. So
a namespace that wants little waits for about one call of each other, however many thousands one of them
has queued. A call that does not fit yet holds back those behind it, or large ones would wait for ever,
but only those of its own model where only that model's limits are in the way.

A tag is given when a call becomes the first of its line (its namespace's calls of one model), so those who
give up in a line have cost it nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from cachepipe import loops
from cachepipe.errors import StoreError
from cachepipe.flow.adaptive import Adaptive
from cachepipe.flow.clock import CLOCK, Clock
from cachepipe.flow.headers import headers_of, hints, in_any_case, retry_after
from cachepipe.flow.shared import SharedQuotas, Taken, Wanted
from cachepipe.flow.windows import Use, Window
from cachepipe.outages import is_connection_error

_logger = logging.getLogger(__name__)
_AGAIN = 0.005  # seconds until what could not be written is tried again
_COLD = 5.0  # seconds that a request may be on its way before any answer has come
_WITHIN = 2  # the rank of a call that is made within another one
_NOTABLE = 60.0  # seconds of a pause of which is told, since nothing else may be heard meanwhile
_TICK = 1e-6  # seconds of the shortest wait: what is less may be no time at all, as numbers go
_MANY = 1000  # lines from which those that are over are forgotten
_OVERLOADED = frozenset({408, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


@dataclass(frozen=True)
class Quota:
    """What may be used within any interval.

    Attributes:
        max_requests: calls per interval; None is no limit.
        max_tokens: tokens per interval, those of prompts and of answers together; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
    """

    max_requests: float | None = None
    max_tokens: float | None = None
    interval: float = 60.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 1):
                raise ValueError(f"{name} is a number, at least 1, or None for no limit; got {value!r}")
        if not (_is_number(self.interval) and 0 < self.interval < math.inf):
            raise ValueError(f"interval is a number of seconds above 0; got {self.interval!r}")

    @classmethod
    def of(cls, value: Quota | Mapping[str, Any]) -> Quota:
        """Return a quota that may be given by the names of its fields.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(value, Quota):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or any(name not in names for name in value):
            raise TypeError(f"the limits of a model are a mapping of {', '.join(names)}; got {value!r:.100}")
        return cls(**value)

    def windows(self) -> tuple[Window | None, Window | None]:
        """Return the window of requests and that of tokens."""
        return (
            None if self.max_requests is None else Window(self.max_requests, self.interval),
            None if self.max_tokens is None else Window(self.max_tokens, self.interval),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


@dataclass
class FlowStats:
    """What went through limits since they were made.

    Attributes:
        calls: calls let go, attempts that were repeated included.
        answered: those that were answered.
        refused: those refused for coming too fast (429).
        overloaded: those that failed because the provider had too much to do, was not reached, or timed out.
        failed: those that failed for another reason.
        retries: attempts made again.
        tokens: tokens used, as the answers told, else as estimated.
        queue_seconds: time that calls have waited to be let go, added up.
        call_seconds: time that calls have taken from then on, added up.
        waiting: calls that wait now.
        in_flight: calls under way now.
    """

    calls: int = 0
    answered: int = 0
    refused: int = 0
    overloaded: int = 0
    failed: int = 0
    retries: int = 0
    tokens: float = 0.0
    queue_seconds: float = 0.0
    call_seconds: float = 0.0
    waiting: int = 0
    in_flight: int = 0

    def __getitem__(self, name: str) -> float:
        value: float = asdict(self)[name]
        return value

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


class Slot:
    """Leave to make one call. End it with `end`, or use it with ``with``.

    Attributes:
        model: what is known of the model that is called.
        uses: what it takes of which window.
        tokens: how many tokens the call is thought to use.
        begun: when the call was really made.
        call: what it is called where processes share the quotas.
        queued: seconds that it waited.
        ended: whether its end was told.
        spent: how many requests and tokens were spent on the model when it was let go.
        places: of those that may be under way at once, how many it takes: 1, or 0 within another call.
    """

    __slots__ = (
        "_limits",
        "begun",
        "call",
        "ended",
        "model",
        "places",
        "queued",
        "spent",
        "tokens",
        "uses",
    )

    def __init__(self, limits: Limits, model: _Model, uses: list[tuple[Window, Use]], tokens: float) -> None:
        self._limits = limits
        self.model = model
        self.uses = uses
        self.tokens = tokens
        self.begun = self.queued = 0.0
        self.ended = False
        self.call: int | None = None
        self.spent = (0.0, 0.0)
        self.places = 1

    def end(
        self,
        *,
        tokens: float | None = None,
        headers: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Say that the call has ended. Idempotent.

        Args:
            tokens: how many tokens it has used, where that is known.
            headers: those of the answer.
            error: what it failed with; headers and status are read from it.
        """
        if not self.ended:
            self.ended = True
            self._limits._end(self, tokens, headers, error)  # noqa: SLF001 - its other half

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error=error)


class _Line:
    """The calls of one namespace that wait for one model, in order."""

    __slots__ = ("finish", "start", "waiting")

    def __init__(self) -> None:
        self.start = self.finish = 0.0  # the tag of its first call, and that of the one after the last let go
        self.waiting: deque[_Ticket] = deque()


holding: ContextVar[tuple[Slot, ...]] = ContextVar("cachepipe_holding", default=())
"""The slots of the calls within which a call is made: it takes no second place, or would wait for itself."""


class _Model:
    """What is known of one model, and who waits for it."""

    __slots__ = ("adaptive", "ahead", "heads", "in_flight", "lines", "many", "name", "quota", "windows")

    def __init__(self, name: str | None, quota: Quota | None, most: float, *, learns: bool) -> None:
        self.name = name
        self.quota = quota
        if quota is not None and quota.max_concurrency is not None:
            most = min(most, quota.max_concurrency)
        self.windows = (None, None) if quota is None else quota.windows()
        self.adaptive = Adaptive(most, learns=learns)
        self.in_flight = 0
        self.ahead: list[_Ticket] = []  # a heap of those who go before all lines
        self.lines: dict[str | None, _Line] = {}
        self.heads: list[tuple[float, int, _Line]] = []  # a heap of the lines in which somebody waits
        self.many = _MANY

    def add(self, ticket: _Ticket, namespace: str | None, virtual: float) -> None:
        """Let a call wait.

        Args:
            ticket: its place.
            namespace: whose it is.
            virtual: the virtual time.
        """
        if ticket.rank:
            heapq.heappush(self.ahead, ticket)
            return
        line = ticket.line = self.line(namespace, virtual)
        line.waiting.append(ticket)
        if len(line.waiting) == 1:
            line.start = max(virtual, line.finish)
            heapq.heappush(self.heads, (line.start, ticket.number, line))

    def line(self, namespace: str | None, virtual: float) -> _Line:
        """Return the line of a namespace; those of others that are over are forgotten now and then."""
        line = self.lines.get(namespace)
        if line is None:
            if len(self.lines) >= self.many:
                self.lines = {
                    name: line for name, line in self.lines.items() if line.waiting or line.finish > virtual
                }
                self.many = max(_MANY, 2 * len(self.lines))
            line = self.lines[namespace] = _Line()
        return line

    def head(self) -> _Ticket | None:
        """Return who is next."""
        while self.ahead:
            if not self.ahead[0].gone:
                return self.ahead[0]
            heapq.heappop(self.ahead)
        while self.heads:
            line = self.heads[0][2]
            while line.waiting and line.waiting[0].gone:
                line.waiting.popleft()
            if line.waiting:
                return line.waiting[0]
            heapq.heappop(self.heads)
        return None

    def pop(self, cost: float) -> None:
        """Take out who is next, at a cost to the line."""
        if self.ahead:
            heapq.heappop(self.ahead)
            return
        line = self.heads[0][2]
        line.waiting.popleft()
        line.finish = line.start + cost
        if line.waiting:
            line.start = line.finish
            heapq.heapreplace(self.heads, (line.start, line.waiting[0].number, line))
        else:
            heapq.heappop(self.heads)

    def waiting(self) -> Iterator[_Ticket]:
        """Return all who wait, in no order."""
        yield from (ticket for ticket in self.ahead if not ticket.gone)
        for _, _, line in self.heads:
            yield from (ticket for ticket in line.waiting if not ticket.gone)


class _Ticket:
    """A place in the queue.

    Attributes:
        rank: 0 in a line, 1 of a call that is made again, 2 of one that is made within another.
        line: that in which it waits, if it does.
        left: whether nobody waits there any more.
    """

    __slots__ = (
        "error",
        "future",
        "left",
        "line",
        "loop",
        "model",
        "number",
        "rank",
        "since",
        "slot",
        "tokens",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        model: _Model,
        number: int,
        rank: int,
        tokens: float,
        since: float,
    ) -> None:
        self.loop = loop
        self.model = model
        self.number = number
        self.rank = rank
        self.tokens = tokens
        self.since = since
        self.line: _Line | None = None
        self.left = False
        self.error: BaseException | None = None
        self.slot: Slot | None = None
        self.future: asyncio.Future[None] = loop.create_future()

    @property
    def gone(self) -> bool:
        """Whether nobody waits there, or ever will."""
        return self.left or self.loop.is_closed()

    @property
    def order(self) -> tuple[int, float, int]:
        """What the order of those who are next goes by."""
        return -self.rank, 0.0 if self.line is None else self.line.start, self.number

    def __lt__(self, other: _Ticket) -> bool:
        return self.order < other.order

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _Timer:
    """When a loop is to look again."""

    __slots__ = ("before", "handle", "when")

    def __init__(self, when: float, before: _Timer | None) -> None:
        self.when = when
        self.before = before
        self.handle: Any = None


class Limits:
    """Limits on calls, shared by all who call one endpoint. Every method may be used from any thread.

    Args:
        max_requests: calls within any interval; None is no limit.
        max_tokens: tokens within any interval; None is no limit.
        interval: seconds.
        max_concurrency: calls at once; None is no limit.
        per_model: further limits by the name of the model, as `Quota` or as a mapping of its fields.
        adaptive: whether 429s and overloads slow calls down; Retry-After and the provider's headers
            are honoured in any case.
        transit: seconds that a request may be on its way to the provider; default is a quarter of the
            interval, at most 1. See ``cachepipe.flow.windows``.
        shared: a folder in which the processes of this machine that name it hold the quotas together.
        name: what tells these limits from others in that folder.
        clock: tells the time.
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
        if transit is not None and not (_is_number(transit) and transit >= 0):
            raise ValueError(f"transit is a number of seconds, 0 or more; got {transit!r}")
        self.transit = transit
        self.adaptive = adaptive
        self.clock = clock
        self._shared: Any = None if shared is None else SharedQuotas(shared, name)
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a coroutine that is collected may leave the queue at any point
        self._dispatching = self._again = False
        self._busy = False  # whether somebody waits, or may
        self._places = 0
        self._windows = self.quota.windows()
        self._models: dict[str | None, _Model] = {}
        self._numbers = itertools.count()
        self._virtual = 0.0
        self._timers: dict[asyncio.AbstractEventLoop, _Timer] = {}
        self._warm = False
        self._stats = FlowStats()

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Limits {self.describe()}, {stats.waiting} waiting, {stats.in_flight} in flight>"

    def describe(self) -> str:
        """Return the limits in words."""
        quota = self.quota
        parts = []
        if quota.max_requests is not None:
            parts.append(f"{quota.max_requests:g} requests")
        if quota.max_tokens is not None:
            parts.append(f"{quota.max_tokens:g} tokens")
        words = f"{' and '.join(parts)} per {quota.interval:g} s" if parts else "no quota"
        return words if quota.max_concurrency is None else f"{words}, {quota.max_concurrency} at once"

    def stats(self) -> FlowStats:
        """Return what went through since they were made."""
        with self._lock:
            waiting = sum(1 for model in self._models.values() for _ in model.waiting())
            return replace(self._stats, waiting=waiting)

    def learned(self) -> dict[str | None, dict[str, float | None]]:
        """Return what was learned of each model: ``concurrency``, and ``pace`` in calls per second."""
        with self._lock:
            return {
                name: {"concurrency": model.adaptive.concurrency, "pace": model.adaptive.pace}
                for name, model in self._models.items()
            }

    def close(self) -> None:
        """Close the file that processes share, if there is one. The limits may be used again."""
        with self._lock:
            if self._shared is not None:
                self._shared.close()

    # Coming in.

    async def enter(
        self,
        *,
        namespace: str | None = None,
        model: str | None = None,
        tokens: float = 0.0,
        ahead: bool = False,
    ) -> Slot:
        """Wait until a call may be made, and return the leave to make it; its end must be told.

        Args:
            namespace: whose call it is.
            model: the name of the model that is called.
            tokens: how many tokens it is thought to use.
            ahead: go before all who wait: the call was let go before, and is made again.
        """
        rank = _WITHIN if self._within() else int(ahead)
        with self._lock:
            now = self.clock.now()
            known = self._known(model)
            self._stats.retries += ahead
            if not self._busy and self._shared is None and not self._wait(known, tokens, rank, now):
                made = self._slot(known, tokens, rank, now)
                self._count(made, now)
                return made
            loop = loops.running()
            ticket = _Ticket(loop, known, next(self._numbers), rank, tokens, now)
            known.add(ticket, namespace, self._virtual)
            self._busy = True
            self._dispatch()
        if ticket.slot is None:
            try:
                await ticket.future
            except BaseException:
                self._leave(ticket)
                raise
        slot = ticket.slot
        if slot is None:
            raise asyncio.CancelledError if ticket.error is None else ticket.error
        self._begin(slot, ticket)
        return slot

    def _within(self) -> bool:
        """Tell whether this is part of a call that has leave already."""
        held = holding.get()
        return bool(held) and any(slot._limits is self and not slot.ended for slot in held)  # noqa: SLF001 - its other half

    def _known(self, name: str | None) -> _Model:
        model = self._models.get(name)
        if model is None:
            most = math.inf if self.quota.max_concurrency is None else self.quota.max_concurrency
            model = self._models[name] = _Model(
                name, self.per_model.get(name or ""), most, learns=self.adaptive
            )
        return model

    def _cost(self, tokens: float) -> float:
        """Return what share of the quotas a call takes: of the one that it takes most of."""
        requests, most = self.quota.max_requests, self.quota.max_tokens
        return max(1 / requests if requests else 0.001, tokens / most if most else 0.0)

    def _leave(self, ticket: _Ticket) -> None:
        """Give up a place, or the leave that came too late."""
        with self._lock:
            ticket.left = True
            slot = ticket.slot
            if slot is not None and not slot.ended and self._is_own(slot):
                slot.ended = True
                for window, use in slot.uses:
                    window.give_back(use)
                if slot.call is not None:
                    self._shared.give_back(slot.call)
                slot.model.adaptive.unsent(slot.tokens)
                self._release(slot)
                self._stats.calls -= 1
            self._dispatch()

    def _is_own(self, slot: Slot) -> bool:
        """Tell whether a slot was given in this process, and not in one that it was forked from."""
        return self._models.get(slot.model.name) is slot.model

    # Being let go.

    def _dispatch(self) -> None:
        """Let go all who may be, in order, and see that the rest is looked at in time. Holds the lock."""
        self._again = True
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._again:
                self._again = False
                self._let_go_all(self.clock.now())
        finally:
            self._dispatching = False

    def _let_go_all(self, now: float) -> None:
        held: set[int] = set()
        soonest = math.inf
        while True:
            ticket = min(
                (head for model in self._models.values() if id(model) not in held and (head := model.head())),
                default=None,
            )
            if ticket is None:
                break
            wait = self._wait_for_model(ticket.model, ticket.tokens, ticket.rank, now)
            if wait > 0:
                held.add(id(ticket.model))
                soonest = min(soonest, now + wait)
                continue
            wait = self._wait_for_all(ticket.tokens, ticket.rank, now)
            if wait > 0:
                soonest = min(soonest, now + wait)
                break
            call = None
            if self._shared is not None:
                taken = self._take_shared(ticket, now)
                if taken is None:
                    continue
                if taken.wait > 0:
                    soonest = min(soonest, now + taken.wait)
                    if taken.whole:
                        break
                    held.add(id(ticket.model))
                    continue
                call = taken.call
            self._let_go(ticket, now, call)
        busy = ticket is not None or bool(held)
        if self._busy and not busy:
            self._virtual = 0.0
            for model in self._models.values():
                model.lines.clear()
        self._busy = busy
        if self._shared is not None and self._shared.late:
            self._shared.write()
            soonest = min(soonest, now + _AGAIN) if self._shared.late else soonest
        if soonest < math.inf:
            self._arm(max(soonest, now + _TICK))

    def _wait(self, model: _Model, tokens: float, rank: int, now: float) -> float:
        """Return 0 when a call may be made now as far as this process knows, else some time."""
        return self._wait_for_model(model, tokens, rank, now) or self._wait_for_all(tokens, rank, now)

    def _wait_for_model(self, model: _Model, tokens: float, rank: int, now: float) -> float:
        adaptive = model.adaptive
        calls, used = model.windows
        wait = adaptive.wait(0 if rank == _WITHIN else model.in_flight, now)
        if adaptive.requests.told:
            wait = max(wait, adaptive.requests.wait(1, now))
        if adaptive.tokens.told:
            wait = max(wait, adaptive.tokens.wait(tokens, now))
        if calls is not None:
            wait = max(wait, calls.wait(1, now))
        if used is not None:
            wait = max(wait, used.wait(tokens, now))
        return wait

    def _wait_for_all(self, tokens: float, rank: int, now: float) -> float:
        most = self.quota.max_concurrency
        if most is not None and self._places >= most and rank != _WITHIN:
            return math.inf
        calls, used = self._windows
        wait = 0.0 if calls is None else calls.wait(1, now)
        return wait if used is None else max(wait, used.wait(tokens, now))

    def _take_shared(self, ticket: _Ticket, now: float) -> Taken | None:
        """Take a call from the quotas of all processes; None when that fails, which its caller is told."""
        model = ticket.model
        everybody, own = (
            [
                Wanted(
                    f"{self._shared.name} {name or ''}".rstrip(),
                    quota.max_requests,
                    quota.max_tokens,
                    quota.interval,
                    None if ticket.rank == _WITHIN else quota.max_concurrency,
                    self._transit(quota.interval),
                )
            ]
            if quota is not None
            else []
            for name, quota in (("", self.quota), (model.name, model.quota))
        )
        try:
            taken: Taken = self._shared.take(everybody, own, ticket.tokens, self._paused_name(model), now)
        except StoreError as error:
            model.pop(0.0)
            ticket.left = True
            ticket.error = error
            self._on(ticket.loop, ticket.wake)
            return None
        return taken

    def _paused_name(self, model: _Model) -> str:
        return f"{self._shared.name} {model.name or ''}"

    def _let_go(self, ticket: _Ticket, now: float, call: int | None) -> None:
        """Give leave to the call that is next."""
        model = ticket.model
        if ticket.line is not None:
            self._virtual = max(self._virtual, ticket.line.start)
        model.pop(self._cost(ticket.tokens))
        ticket.slot = self._slot(model, ticket.tokens, ticket.rank, now)
        ticket.slot.call = call
        self._on(ticket.loop, ticket.wake)

    def _slot(self, model: _Model, tokens: float, rank: int, now: float) -> Slot:
        """Return the leave to make a call now."""
        uses: list[tuple[Window, Use]] = []
        for calls, used in (self._windows, model.windows):
            if calls is not None:
                uses.append((calls, calls.take(1)))
            if used is not None:
                uses.append((used, used.take(tokens)))
        slot = Slot(self, model, uses, tokens)
        slot.begun = now
        slot.places = 0 if rank == _WITHIN else 1
        adaptive = model.adaptive
        adaptive.sent(tokens, now)
        slot.spent = (adaptive.requests.spent, adaptive.tokens.spent)
        model.in_flight += slot.places
        self._places += slot.places
        self._stats.in_flight += 1
        self._stats.calls += 1
        return slot

    def _on(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> bool:
        """Call back on a loop, at once if it is the one that runs here; tell whether it can."""
        if _running() is loop:
            callback()
            return True
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # it is closed, and with it everything that waited on it
            return False
        return True

    def _arm(self, when: float) -> None:
        """See that the loops on which someone waits look again at a time."""
        heads = [head for model in self._models.values() if (head := model.head()) is not None]
        loops = {head.loop for head in heads}
        loops.update(self._timers)
        here = _running()
        if here is not None:
            loops.add(here)
        for loop in loops:
            timer = self._timers.get(loop)
            if loop.is_closed():
                self._timers.pop(loop, None)
            elif timer is None or timer.when > when:
                timer = self._timers[loop] = _Timer(when, timer)
                self._on(loop, partial(self._start, loop, timer))

    def _start(self, loop: asyncio.AbstractEventLoop, timer: _Timer) -> None:
        with self._lock:
            if timer.before is not None and timer.before.handle is not None:
                timer.before.handle.cancel()
            timer.before = None
            if self._timers.get(loop) is timer:
                timer.handle = self.clock.call_at(loop, timer.when, partial(self._due, loop, timer))

    def _due(self, loop: asyncio.AbstractEventLoop, timer: _Timer) -> None:
        with self._lock:
            if self._timers.get(loop) is timer:
                del self._timers[loop]
            self._dispatch()

    # Going out.

    def _begin(self, slot: Slot, ticket: _Ticket) -> None:
        """Note when a call is really made: its loop may have been busy since it was let go."""
        with self._lock:
            now = self.clock.now()
            late = now - slot.begun
            if slot.call is not None and late > _AGAIN:
                self._shared.delay(slot.call, late)
            slot.begun = now
            slot.queued = now - ticket.since
            self._stats.queue_seconds += slot.queued
            self._count(slot, now)
            if slot.uses:
                self._dispatch()  # it is known only now until when those who wait have to

    def _count(self, slot: Slot, now: float) -> None:
        """See that what a call uses counts no longer than it may, however long it takes."""
        for window, use in slot.uses:
            window.expire(use, now + self._transit(window.interval) + window.interval)

    def _transit(self, interval: float) -> float:
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
        told, asked = hints(headers), None if error is None else retry_after(headers)
        status = status_of(error)
        with self._lock:
            if not self._is_own(slot):
                return
            now = self.clock.now()
            stats, adaptive = self._stats, slot.model.adaptive
            stats.call_seconds += now - slot.begun
            in_flight = slot.model.in_flight
            self._release(slot)
            used = tokens if tokens is not None else (slot.tokens if error is None else None)
            stats.tokens += used or 0.0
            for window, use in slot.uses:
                if tokens is not None and window in (self._windows[1], slot.model.windows[1]):
                    window.correct(use, tokens)
                window.expire(use, now + window.interval)
            if slot.call is not None:
                quotas = (("", self.quota), (slot.model.name, slot.model.quota))
                expires = [
                    (f"{self._shared.name} {name}".rstrip(), now + quota.interval)
                    for name, quota in quotas
                    if quota is not None
                ]
                self._shared.end(slot.call, tokens, expires)
            for hint in told:
                budget = adaptive.requests if hint.kind == "requests" else adaptive.tokens
                budget.learn(hint, slot.spent[hint.kind != "requests"], slot.begun, now)
            if error is None:
                self._warm = True
                stats.answered += 1
                adaptive.answered(slot.begun, in_flight, now)
            elif status == 429:
                stats.refused += 1
                self._pause(slot.model, asked, now)
                adaptive.refused(slot.begun, asked, now)
            elif status in _OVERLOADED or is_connection_error(error):
                stats.overloaded += 1
                self._pause(slot.model, asked, now)
                adaptive.overloaded(slot.begun, asked, now)
            elif isinstance(error, Exception):
                stats.failed += 1
            if self._busy or self._shared is not None:
                self._dispatch()

    def _pause(self, model: _Model, asked: float | None, now: float) -> None:
        """Tell of a long pause that the provider has asked for, and the other processes of any."""
        if asked and asked >= _NOTABLE and model.adaptive.paused_until <= now:
            _logger.warning("the provider asks for no calls of model %s for %d seconds", model.name, asked)
        if asked and self._shared is not None:
            self._shared.pause(self._paused_name(model), now + asked)

    def _release(self, slot: Slot) -> None:
        slot.model.in_flight -= slot.places
        self._places -= slot.places
        self._stats.in_flight -= 1


_all: weakref.WeakSet[Limits] = weakref.WeakSet()


def _after_fork() -> None:
    """Let a forked child begin anew: what was under way is its parent's, who may have held a lock."""
    for limits in _all:
        limits._reset()  # noqa: SLF001 - this module's own
        if limits._shared is not None:  # noqa: SLF001 - likewise
            limits._shared.forget()  # noqa: SLF001 - likewise


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _running() -> asyncio.AbstractEventLoop | None:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error of a model's adapter stands for, whichever library it is from."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status_code", "status"):
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
