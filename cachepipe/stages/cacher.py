"""The cacher: draws claim their samples from a store, and missing samples are generated once.

A request becomes a draw. If the ledger holds the draw, the cacher answers at once. Otherwise it claims the
draws of one turn of the event loop in one transaction, and asks the model for their missing samples
together. Generation belongs to no caller: it continues while anyone waits for it, and its samples are
durable before anyone sees them. ``cachepipe.contract.allotment`` decides which indices a draw gets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from cachepipe import forks, loops, runs
from cachepipe.adapting import hooks_of, scope_of
from cachepipe.cache.calls import Wanted
from cachepipe.cache.engine import Drawing, Engine, Receipt, Stats, respond
from cachepipe.contract import keys
from cachepipe.contract.draws import Counter
from cachepipe.contract.keys import Question
from cachepipe.stage import Stage, adapter_of, given, together
from cachepipe.stores import MemoryStore, open_store, switched_off
from cachepipe.typedefs import MODES, REPEATS, Batch, Mode, Repeat, Request, Response
from cachepipe.values import Codec

Flags = Callable[[Request, Question], list[bool]]
"""A function that returns the flags ``duplicated`` of a request."""


class AsyncCacher(Stage):
    """Caches the samples of a model: each draw gets its own, and a rerun gets the same ones again.

    Args:
        model: generates samples; it is asked only for samples that the store lacks.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder (see
            ``cachepipe.stores.default_folder``).
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``, as in the contract. With
            ``CACHEPIPE_DISABLE=1`` in the environment ``"read-write"`` is ``"bypass"``.
        scope: identifies the model in cache keys; default is the model's ``cache_scope``, or its ``model``.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: all requests for a
            question share one draw.
        hash: a function that returns a string for a request, which replaces its fields in the key.
        classes: dataclasses and pydantic models that may be stored as samples.
        durability: ``"process"`` or ``"full"``, if the cacher opens the store.
        wait_for_others: seconds to wait for a sample that another live process generates before generating
            it here, if the cacher opens the store; None waits as long as that process lives.
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
    ) -> None:
        super().__init__(model)
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {mode!r}")
        if repeat not in REPEATS:
            raise ValueError(f"repeat is 'fresh' or 'same'; got {repeat!r}")
        codec = Codec(classes)
        if mode == "read-write" and switched_off():
            mode, cache = "bypass", MemoryStore()
        self.store, self._owns_store = open_store(
            cache,
            durability=durability,
            wait_for_others=wait_for_others,
            read_only=True if mode == "replay" else None,
        )
        self._ended = False
        self.mode = mode
        self.repeat = repeat
        self.scope = scope if scope is not None else scope_of(model)
        self._hash = hash
        self._question = hooks_of(adapter_of(model)).question
        self._engine = Engine(model, self.store, codec)
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
        return await self.draw(request, self.question(request), loops.running())

    async def draw(
        self,
        request: Request,
        question: Question,
        loop: asyncio.AbstractEventLoop,
        duplicated: list[bool] | None = None,
        receipts: list[Receipt] | None = None,
        *,
        counter: Counter | None = None,
        looked: bool = False,
    ) -> Response:
        """Return the samples of a draw, for a caller that has made the question already.

        Args:
            request: the request.
            question: the request's question.
            loop: the running loop.
            duplicated: the flags from a deduplicator in front.
            receipts: gets the receipt that ``take_back`` needs if the response does not reach its caller.
            counter: counts the occurrences of equal requests; by default the run.
            looked: whether the caller has just read the ledger and not found the draw.
        """
        begun = self.begin(request, question, loop, duplicated, receipts, counter=counter, looked=looked)
        return begun if isinstance(begun, Response) else await begun

    def begin(
        self,
        request: Request,
        question: Question,
        loop: asyncio.AbstractEventLoop,
        duplicated: list[bool] | None = None,
        receipts: list[Receipt] | None = None,
        *,
        counter: Counter | None = None,
        looked: bool = False,
    ) -> Response | Coroutine[Any, Any, Response]:
        """Begin a draw as ``draw`` does: return the response if it is complete, else an awaitable."""
        self._check_open()
        if self.mode == "bypass":
            return self._bypass(request, question, loop, duplicated)
        begun = self._begin(request, question, loop, duplicated, receipts, counter=counter, looked=looked)
        return begun if isinstance(begun, Response) else self._engine.finish(begun, duplicated, receipts)

    def _begin(
        self,
        request: Request,
        question: Question,
        loop: asyncio.AbstractEventLoop,
        duplicated: list[bool] | None,
        receipts: list[Receipt] | None,
        *,
        counter: Counter | None = None,
        **options: bool,
    ) -> Response | Drawing:
        """Begin a draw: return the response if it is complete, else the draw."""
        engine = self._engine
        if duplicated is not None:
            engine.merged += sum(duplicated)
        return engine.begin(
            engine.lane(loop),
            request,
            question,
            self.mode,
            self.repeat,
            duplicated,
            receipts,
            counter=counter,
            **options,
        )

    def take_back(self, receipts: Iterable[Receipt]) -> None:
        """Take back responses that did not reach their caller: a retry is then the same draw."""
        for receipt in receipts:
            self._engine.take_back(receipt)

    async def _bypass(
        self,
        request: Request,
        question: Question,
        loop: asyncio.AbstractEventLoop,
        duplicated: list[bool] | None,
    ) -> Response:
        engine = self._engine
        engine.requests += 1
        engine.merged += sum(duplicated or ())
        need = Wanted(loop, request.asking(request.n), late=engine.count_unreported)
        engine.lane(loop).caller.start([need])
        try:
            values = await need.result()
        except BaseException:
            engine.count_unreported(need.brought)
            raise
        engine.misses += request.n
        present = engine._present  # noqa: SLF001 - its own engine
        values = values if present is None else [present(value) for value in values]
        return respond(values, [False] * request.n, duplicated, None, question.key)

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
        if self.mode == "bypass":
            return await together([self._bypassed(request, flags) for request in requests], return_exceptions)
        loop, engine, crowd = loops.running(), self._engine, len(requests) > 1
        receipts: list[Receipt] = []
        answers: list[Any] = []
        waiting: deque[tuple[int, Drawing, list[bool] | None]] = deque()
        try:
            for place, request in enumerate(requests):
                duplicated = None
                begun: Response | Drawing | Exception
                try:
                    question = self.question(request)
                    duplicated = None if flags is None else flags(request, question)
                    begun = self._begin(request, question, loop, duplicated, receipts, crowd=crowd)
                except Exception as error:  # noqa: BLE001 - it is this request's own
                    begun = error
                answers.append(begun)
                if not isinstance(begun, Response | Exception):
                    waiting.append((place, begun, duplicated))
            await asyncio.sleep(0)  # hits do not suspend
            while waiting:
                place, draw, duplicated = waiting.popleft()
                answers[place] = await self._outcome(draw, duplicated, receipts)
            return given(answers, return_exceptions)
        except BaseException:
            for _, draw, _ in waiting:
                engine.abandon(draw)
            self.take_back(receipts)
            raise

    async def _bypassed(self, request: Request, flags: Flags | None) -> Response:
        question = self.question(request)
        duplicated = None if flags is None else flags(request, question)
        return await self._bypass(request, question, loops.running(), duplicated)

    async def _outcome(
        self, draw: Drawing, duplicated: list[bool] | None, receipts: list[Receipt]
    ) -> Response | BaseException:
        """Return a draw's response, or its error."""
        try:
            return await self._engine.finish(draw, duplicated, receipts)
        except asyncio.CancelledError as stopped:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return stopped  # its call was stopped from outside
        except Exception as error:  # noqa: BLE001 - it is this request's own
            return error

    def widen(self, window: float) -> None:
        """Merge needs of one question that come within ``window`` seconds into shared calls."""
        self._engine.window = max(self._engine.window, window)

    def awaited(self, key: str) -> bool:
        """Return True if a draw of this process waits for a sample of this key from another draw."""
        return self._engine.board.anyone_waits_for(key)

    def stats(self) -> Stats:
        """Return the figures since the cacher was opened."""
        return self._engine.stats()

    async def close(self) -> None:
        """Wait for calls in flight, write their samples, and close the store if the cacher opened it."""
        self._closed = True
        if self._ended:
            return
        runs.closed(self.store.identity, self)
        here = loops.running()
        for lane in self._engine.lanes():
            if lane.loop is here:
                await lane.drain()
            elif lane.loop.is_running() and lane._fork == forks.count:  # noqa: SLF001 - loops run in their own process
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(lane.drain(), lane.loop))
        await self._engine.deliveries.write()
        self._ended = True
        if isinstance(self.model, Stage):
            await self.model.close()
        if self._owns_store:
            await loops.running().run_in_executor(None, self.store.close)
