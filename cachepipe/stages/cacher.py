"""The cacher: draws claim their samples from a store, and missing samples are generated once.

A request becomes a draw. If the ledger holds the draw, the cacher answers at once. Otherwise it claims the
draws of one turn of the event loop in one transaction, and asks the model for their missing samples
together. Generation belongs to no caller: it continues while anyone waits for it, and its samples are
durable before anyone sees them. ``cachepipe.contract.allotment`` decides which indices a draw gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cachepipe import context, loops, runs
from cachepipe.adapting import hooks_of, scope_of
from cachepipe.cache.cache import Cache, Found, Stats, in_turn
from cachepipe.cache.drawing import Drawing, outcomes
from cachepipe.cache.turns import Turn, latest
from cachepipe.contract import keys
from cachepipe.contract.keys import Question
from cachepipe.errors import CacheMiss
from cachepipe.stage import Stage, adapter_of, given
from cachepipe.stores import MemoryStore, open_store, switched_off
from cachepipe.typedefs import MODES, REPEATS, Batch, Mode, Ordered, Repeat, Request, Response, check_ordered
from cachepipe.values import Codec

Flags = Callable[[Request, Question], list[bool]]
"""A function that returns the flags ``duplicated`` of a request."""


class AsyncCacher(Stage):
    """Caches the samples of a model: each draw gets its own, and a rerun gets the same ones again.

    Args:
        model: generates samples; it is asked only for samples that the store lacks.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder (see
            ``cachepipe.stores.default_folder``).
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``, as in the contract; a block of
            ``cachepipe.using`` or ``cachepipe.experiment`` around this call overrides it. With
            ``CACHEPIPE_DISABLE=1`` in the environment ``"read-write"`` is ``"bypass"``.
        scope: identifies the model in cache keys; default is the model's ``cache_scope``, or its ``model``.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: all requests for a
            question share one draw.
        hash: a function that returns a string for a request, which replaces its fields in the key.
        classes: dataclasses and pydantic models that may be stored as samples.
        durability: ``"process"`` or ``"full"``, if the cacher opens the store.
        wait_for_others: seconds to wait for a sample that another live process generates before generating
            it here, if the cacher opens the store; None waits as long as that process lives.
        ordered: hand over the answers in the order of the first run, one at a time, so that a rerun of a
            concurrent program takes the same course; the default is to do so with ``repeat="fresh"``. A
            number (of turns of the event loop, by default 5) sets when a loop counts as quiet whose queue
            cannot be read, such as uvloop's.
    """

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        *,
        mode: Mode = "read-write",
        scope: str | None = None,
        repeat: Repeat = "fresh",
        hash: Callable[[Request], str] | None = None,  # noqa: A002 - CacheSaver's name
        classes: Iterable[type] = (),
        durability: str = "process",
        wait_for_others: float | None = None,
        ordered: Ordered | None = None,
    ) -> None:
        super().__init__(model)
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {mode!r}")
        if repeat not in REPEATS:
            raise ValueError(f"repeat is 'fresh' or 'same'; got {repeat!r}")
        if ordered is not None:
            check_ordered(ordered)
        codec = Codec(classes)
        mode = context.current().mode_of(mode)
        if mode == "read-write" and switched_off():
            mode, cache = "bypass", MemoryStore()
        self.store, self._owns_store = open_store(
            cache,
            durability=durability,
            wait_for_others=wait_for_others,
            read_only=True if mode == "replay" else None,
        )
        self.repeat = repeat
        self.ordered = repeat == "fresh" if ordered is None else ordered
        self.mode = mode
        self.scope = scope if scope is not None else scope_of(model)
        self._ended = False
        self._hash = hash
        self._question = hooks_of(adapter_of(model)).question
        self._cache = Cache(model, self.store, mode=mode, repeat=repeat, codec=codec)
        runs.opened(self.store.identity, self)

    def __repr__(self) -> str:
        stats = self.stats()
        figures = f"{stats.hits} hits, {stats.misses} misses, {stats.in_flight} in flight"
        return f"<AsyncCacher {self.store!r} {figures}>"

    def question(self, request: Request) -> Question:
        """Return what a request asks, with its key.

        Raises:
            UnkeyableValue: when no stable key can be made from one of its values.
        """
        if not isinstance(request, Request):
            raise TypeError(f"a pipeline takes a Request; got {request!r}. Write Request(prompt=...)")
        if self._question is not None and self._hash is None:
            question: Question = self._question(request, self.scope)
            return question
        return keys.question(request, self.scope, self._hash)

    async def request(self, request: Request) -> Response:
        """Return the samples of a draw; ``cached`` says which were stored already.

        Raises:
            CacheMiss: in replay mode, when not all of them are stored.
            StoreError: when the store fails before anything is spent.
        """
        loop, request = loops.running(), context.claimed(request)
        try:
            begun, turn = self.begin(request, self.question(request), loop)
        except CacheMiss:
            await self.come_last(loop)
            raise
        if turn is not None:
            return await in_turn(turn, begun, None)
        return await begun.response(None) if isinstance(begun, Drawing) else begun.response(None)

    def begin(
        self, request: Request, question: Question, loop: asyncio.AbstractEventLoop
    ) -> tuple[Found | Drawing, Turn | None]:
        """Return what is stored for a request, or begin to draw it; and its turn, if it has to wait.

        The request names who draws (see ``context.claimed``).
        """
        if self._closed:
            self._check_open()
        cache = self._cache
        queue = cache.queue(loop)
        line = None if self.ordered is False else cache.line(queue, self.ordered)
        if line is None:
            return cache.begin(request, question, queue), None
        rests = line.rests()
        begun = cache.begin(request, question, queue, line.arrive)
        if isinstance(begun, Drawing):
            return begun, begun.turn
        return begun, None if rests else line.arrive()

    async def come_last(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until all answers that are ready have been handed over, as errors do (C11)."""
        line = self._cache.line(self._cache.queue(loop), self.ordered)
        if line is not None:
            await line.arrive().come(None)

    async def batch_request(self, batch: Batch, *, return_exceptions: bool = False) -> list[Response]:
        """Return one response per request, claimed in one transaction."""
        return await self.draw_all(batch.requests, return_exceptions=return_exceptions)

    async def draw_all(
        self,
        requests: Sequence[Request],
        flags: Flags | None = None,
        *,
        return_exceptions: bool = False,
    ) -> list[Response]:
        """Return one response per request, in order, after all of them have ended.

        Args:
            requests: the requests.
            flags: returns the flags of a request, from a deduplicator in front.
            return_exceptions: put the error of a request in its place; otherwise the first one is raised.
        """
        self._check_open()
        cache, loop = self._cache, loops.running()
        queue = cache.queue(loop)
        line = cache.line(queue, self.ordered)
        turn = None if line is None else line.arrive()
        arrive = None if turn is None else lambda: turn
        if len(requests) > 1:
            queue.gather()
        answers: list[Any] = []
        begun: list[Found | Drawing] = []
        waiting: dict[int, Drawing] = {}
        flagged: list[list[bool] | None] = []
        try:
            for request in map(context.claimed, requests):
                duplicated = None
                try:
                    question = self.question(request)
                    duplicated = None if flags is None else flags(request, question)
                    one = cache.begin(request, question, queue, arrive)
                except Exception as error:  # noqa: BLE001 - it is this request's own
                    answers.append(error)
                    continue
                begun.append(one)
                if isinstance(one, Drawing):
                    waiting[len(answers)] = one
                    flagged.append(duplicated)
                    answers.append(None)
                else:
                    answers.append(one.response(duplicated))
            await asyncio.sleep(0)  # hits do not suspend
            ended = await outcomes([*waiting.values()], flagged)
            for place, answer in zip(waiting, ended, strict=True):
                answers[place] = answer
            if turn is not None:
                delivered = [one for one in begun if not isinstance(one, Drawing) or one.delivered]
                await turn.come(latest(delivered))
            return given(answers, return_exceptions)
        except BaseException:
            for one in begun:
                one.take_back()
            raise
        finally:
            if turn is not None:
                turn.leave()

    def widen(self, window: float) -> None:
        """Merge demands for one question that come within ``window`` seconds into shared calls."""
        self._cache.window = max(self._cache.window, window)

    def count_merged(self, samples: int) -> None:
        """Count samples that a deduplicator in front has flagged."""
        self._cache.merged += samples

    def stats(self) -> Stats:
        """Return the figures since the cacher was opened."""
        return self._cache.stats()

    async def close(self) -> None:
        """Wait for calls in flight, write their samples, and close the store if the cacher opened it."""
        self._closed = True
        if self._ended:
            return
        runs.closed(self.store.identity, self)
        await self._cache.drain(loops.running())
        self._ended = True
        if isinstance(self.model, Stage):
            await self.model.close()
        if self._owns_store:
            await loops.running().run_in_executor(None, self.store.close)
