"""The deduplicator: identical requests of one namespace that are served together are one group.

In front of a cacher it marks which samples were merged; the cacher gives each draw its own samples and
asks for what is missing in shared calls. Alone around a model it asks for a group in one call with the
summed ``n``, and hands each request its own part.
"""

from __future__ import annotations

import asyncio
from threading import get_ident
from typing import Any

from cachepipe import context, loops
from cachepipe.adapting import hooks_of, scope_of
from cachepipe.cache.cache import Stats, in_turn
from cachepipe.cache.calls import Call, Caller, Demand, DirectDemand
from cachepipe.cache.drawing import Drawing
from cachepipe.contract import keys
from cachepipe.contract.flags import Asker, Groups
from cachepipe.errors import CacheMiss
from cachepipe.gathering import Gathering
from cachepipe.loops import PerLoop
from cachepipe.stage import Stage, adapter_of, together
from cachepipe.stages.cacher import AsyncCacher
from cachepipe.typedefs import Batch, Request, Response

_TURN = 256  # requests served before the loop is given a turn


class _LoopState:
    """What one event loop's requests share: the groups that are open now."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: Any) -> None:
        self.loop = loop
        self.thread = get_ident()
        self.groups = Groups()
        self.closing = False  # whether the groups are closed at the end of this turn
        self.handles = loops.own_handles(loop)
        self.served = 0
        self.caller = Caller(loop, model, _dropped)
        self.waiting: Gathering[DirectDemand] = Gathering(loop, self._start)

    def close(self) -> None:
        """Close the groups of this turn."""
        self.closing = False
        self.groups.clear()

    def _start(self, demands: list[DirectDemand]) -> None:
        self.caller.start([demand for demand in demands if demand.wanted])


class AsyncDeduplicator(Stage):
    """Merges identical requests of a namespace that are in flight together.

    Args:
        model: a cacher, or any model.
        window: seconds during which a group stays open; 0 is the turn of the event loop in which its
            first request came.
        scope: identifies the model in cache keys, if no cacher behind does so.
    """

    def __init__(self, model: Any, *, window: float = 0.0, scope: str | None = None) -> None:
        super().__init__(model)
        if not window >= 0:
            raise ValueError(f"window is a number of seconds, at least 0; got {window!r}")
        self.window = window
        self._cacher = model if isinstance(model, AsyncCacher) else None
        self._scope = scope if scope is not None else scope_of(model)
        self._question = hooks_of(adapter_of(model)).question
        self._loops: PerLoop[_LoopState] = PerLoop(lambda loop: _LoopState(loop, model))
        self._last: _LoopState | None = None
        self._requests = self._merged = self._misses = 0
        if self._cacher is not None:
            self._cacher.widen(window)

    def __repr__(self) -> str:
        return f"<AsyncDeduplicator {self.stats().merged} samples merged>"

    def stats(self) -> Stats:
        """Return the figures since the stage was opened; with a cacher behind, the cacher's figures."""
        if self._cacher is not None:
            return self._cacher.stats()
        callers = [here.caller for here in self._loops.all()]
        return Stats(
            misses=self._misses,
            merged=self._merged,
            requests=self._requests,
            generated=sum(caller.generated for caller in callers),
            in_flight=sum(caller.in_flight for caller in callers),
            calls=sum(caller.calls for caller in callers),
        )

    async def request(self, request: Request) -> Response:
        """Return the request's own samples; ``duplicated`` says which were merged into a group."""
        # Asking for the running loop is a system call on some versions of Python; a loop that runs on
        # this thread is the running one.
        here = self._last
        if here is None or here.thread != get_ident() or not here.loop.is_running():
            here = self._here(loops.running())
        loop, request = here.loop, context.claimed(request)
        asker = Asker(asyncio.current_task(loop))
        cacher = self._cacher
        if cacher is None:
            self._check_open()
            return await self._merge(here, request, asker)
        question = cacher.question(request)
        duplicated = self._flags(here, request, question, asker)
        try:
            begun, turn = cacher.begin(request, question, loop)
        except CacheMiss:
            await cacher.come_last(loop)
            raise
        if turn is not None:
            response = await in_turn(turn, begun, duplicated)
        elif isinstance(begun, Drawing):
            response = await begun.response(duplicated)
        else:
            response = begun.response(duplicated)
        here.served += 1
        if not here.served % _TURN:
            try:
                await asyncio.sleep(0)  # hits do not suspend: now and then others must have their turn
            except BaseException:
                begun.take_back()
                raise
        return response

    async def batch_request(self, batch: Batch, *, return_exceptions: bool = False) -> list[Response]:
        """Return one response per request; equal ones of the batch are a group.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is raised.
        """
        self._check_open()
        here, asker = self._here(loops.running()), Asker(asyncio.current_task(), batch)
        if self._cacher is None:
            return await together(
                [self._merge(here, context.claimed(request), asker) for request in batch.requests],
                return_exceptions,
            )

        def flags(request: Request, question: keys.Question) -> list[bool]:
            return self._flags(here, request, question, asker)

        return await self._cacher.draw_all(batch.requests, flags, return_exceptions=return_exceptions)

    def _flags(self, here: _LoopState, request: Request, question: keys.Question, asker: Asker) -> list[bool]:
        """Return the flags ``duplicated`` of a request; its group stays open for this turn or window."""
        group, groups = (question.key, request.namespace), here.groups
        duplicated = groups.duplicated(group, asker, request.n)
        if self.window:
            if not duplicated[0]:
                here.loop.call_later(self.window, groups.close, group)
        elif not here.closing:
            here.closing = True
            here.handles.call_soon(here.close)
        if self._cacher is not None and (merged := sum(duplicated)):
            self._cacher.count_merged(merged)
        return duplicated

    def _ask(self, request: Request) -> keys.Question:
        """Return the question of a request, as a cacher would key it."""
        own = self._question
        question: keys.Question = (
            keys.question(request, self._scope) if own is None else own(request, self._scope)
        )
        return question

    def _here(self, loop: asyncio.AbstractEventLoop) -> _LoopState:
        here = self._loops.of(loop)
        here.thread = get_ident()
        self._last = here
        return here

    async def _merge(self, here: _LoopState, request: Request, asker: Asker) -> Response:
        """Return the request's part of the samples that are asked for its group."""
        question = self._ask(request)
        duplicated = self._flags(here, request, question, asker)
        group = (question.key, request.namespace) if question.mergeable else None
        demand = DirectDemand(here.loop, request.asking(request.n), group)
        here.waiting.add(demand, window=self.window)
        values = await demand.result()
        self._merged += request.n - (not duplicated[0])
        self._requests += 1
        self._misses += request.n
        response = Response(values, None, duplicated)
        response.key = question.key
        return response

    async def close(self) -> None:
        """Wait for what is in flight on this loop and close the stages behind."""
        self._closed = True
        here = self._loops.known(loops.running())
        while here is not None and (here.waiting or here.caller.busy):
            here.waiting.cut()
            await here.caller.step()
        await super().close()


def _dropped(demand: Demand, values: list[Any], call: Call) -> None:
    """Drop samples that nobody asked for: there is no store to keep them."""
