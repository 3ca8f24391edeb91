"""Answers requests to a provider from the cache, for clients and proxy: question, draw, samples, answer.

A request is split into questions (`cachepipe.wire`), and each question becomes a draw of a cache
(`cachepipe.cache`). The cache asks the exchange for missing samples, and the exchange's `send` makes the
call: through an SDK in the clients, through its own HTTP client in the proxy. If one call was made for this
request alone, its answer is handed on unchanged; every other answer is assembled from samples.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self

import orjson

from cachepipe import context, loops, runs, wire
from cachepipe.bounds import check_n
from cachepipe.cache.cache import Cache, Found, responses_of
from cachepipe.cache.drawing import Drawing, outcomes
from cachepipe.cache.turns import Turn, latest
from cachepipe.contract import keys
from cachepipe.contract.draws import (
    Claimant,
    OneRequest,
    Retried,
    draw_of,
    give_back,
    label,
)
from cachepipe.contract.flags import Asker, Groups, lone
from cachepipe.contract.keys import Question
from cachepipe.errors import CacheMiss, NotStorable, ShortAnswer
from cachepipe.flow.budget import Budget, Reservations, Spending
from cachepipe.flow.flow import Flow
from cachepipe.outages import status_of
from cachepipe.prices import TABLE, Prices
from cachepipe.providers import info, presets
from cachepipe.providers.generation import Answer, Calls, Kept, Made, TooLarge, Unkept, in_parts, packed
from cachepipe.providers.lists import Lists
from cachepipe.providers.responses import Received
from cachepipe.providers.stream_recorder import AsyncRecordedStream, RecordedStream, ReplayedStream
from cachepipe.stage import given
from cachepipe.stores import open_store, switched_off
from cachepipe.stores.base import Sample
from cachepipe.stores.misses import lacking
from cachepipe.stores.sums import deliveries_of
from cachepipe.typedefs import (
    MODES,
    REPEATS,
    Mode,
    Ordered,
    Repeat,
    Request,
    Response,
    by_value,
    check_ordered,
    check_replicate,
)
from cachepipe.values import Codec

CLOSING_SECONDS = 5.0
"""Seconds that closing a client waits, by default, for the rest of a stream that its reader left."""
_codec = Codec()
_MARKED = b'"\\u0000'


class _Model:
    """The model behind a cache: it passes each request to the exchange that the request belongs to."""

    max_n = wire.CHAT.max_n
    cache_scope = None

    async def request(self, request: Any) -> Response:
        """Return the samples of a call for the request."""
        response = Response(await request.exchange.generate(request))
        response.payment = Reservations.of([sample.reserved for sample in response.data])
        return response

    @staticmethod
    def context_of(request: Any) -> contextvars.Context | None:
        """Return the context in which a request is generated."""
        context: contextvars.Context | None = request.exchange.own_context()
        return context

    @staticmethod
    def pack(value: Kept) -> tuple[bytes, Mapping[str, Any]]:
        """Return the bytes of a sample, and the facts to store with it."""
        return value.payload, orjson.loads(value.noted) if value.noted else {}

    @staticmethod
    def unpack(sample: Sample) -> Kept:
        """Return a stored sample."""
        return Kept(sample.payload, sample.header)


_model = _Model()


class SharedStore:
    """The cache behind a client and its copies, or behind a proxy."""

    def __init__(self, cache: Any) -> None:
        self.store, self.owned = open_store(cache)
        self.closed = False
        self.caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        self.recordings: weakref.WeakSet[RecordedStream] = weakref.WeakSet()
        self.deliveries = deliveries_of(self.store)
        self._spending: dict[int, Spending] = {}
        runs.opened(self.store.identity, self)

    def spending(self, budget: Budget) -> Spending:
        """Return what calls spend of a budget; all who have the same budget share it."""
        return self._spending.setdefault(id(budget), Spending(self.store, budget))

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight on this loop; the argument is that of `close`."""
        recordings = list(self.recordings)
        for recording in recordings:
            recording.leave()
        timer = loops.running().call_later(timeout, _withdraw, recordings)
        try:
            for cache in list(self.caches):
                await cache.drain(loops.running())
        finally:
            timer.cancel()

    async def close(self, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight on this loop, then close the store if it was opened here.

        Args:
            timeout: seconds after which the rest of a stream without a reader is given up.
        """
        if self.closed:
            return
        self.closed = True
        await self.drain(timeout)
        runs.closed(self.store.identity, self)
        await self.deliveries.write()
        if self.owned:
            try:
                await loops.running().run_in_executor(None, self.store.close)
            except RuntimeError:  # the interpreter is exiting, and starts no threads any more
                self.store.close()


def _withdraw(recordings: Sequence[RecordedStream]) -> None:
    for recording in recordings:
        recording.withdraw()


@dataclass(eq=False)
class CacheView:
    """A client's view of a cache: the cache, and how it is used. Copies of a client have equal views.

    Requests share merged calls only within views that share ``caches``, so never across credentials.
    """

    shared_store: SharedStore
    namespace: str | None
    mode: Mode
    scope: str | None
    repeat: Repeat
    service: Any = None
    replicate: str | int | None = None
    ordered: Ordered = False
    budget: Budget | None = None
    caches: dict[tuple[Mode, Repeat], Cache] = dataclasses.field(default_factory=dict)
    groups: dict[Any, Groups] = dataclasses.field(default_factory=dict)
    """By loop, the groups of equal requests that are served together in its turn."""

    def __post_init__(self) -> None:
        if self.service is not None and not isinstance(getattr(self.service, "flow", None), Flow):
            raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {self.service!r}")
        for name in ("namespace", "scope"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None; got {value!r}. Write {name}=str(...)")
        check_replicate(self.replicate)
        check_ordered(self.ordered)
        if self.budget is not None:
            self.budget = Budget.of(self.budget)
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {self.mode!r}")
        if self.repeat not in REPEATS:
            raise ValueError(f"repeat is 'fresh' or 'same'; got {self.repeat!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheView) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        named = f"namespace={self.namespace!r} replicate={self.replicate!r} mode={self.mode!r}"
        return f"<CacheView {self.shared_store.store!r} {named}>"

    def _identity(self) -> tuple[Any, ...]:
        drawn = self.namespace, label(self.replicate), self.ordered
        how = self.mode, self.scope, self.repeat
        return id(self.shared_store), *drawn, *how, id(self.service), id(self.budget)

    @classmethod
    def of(
        cls,
        cache: Any,
        namespace: str | None,
        mode: Mode,
        scope: str | None,
        repeat: Repeat,
        service: Any = None,
        replicate: str | int | None = None,
        ordered: Ordered = False,
        budget: Any = None,
    ) -> Self:
        """Return the view for a client's parameters."""
        made = cls.__new__(cls)
        made.namespace, made.mode, made.scope, made.repeat = namespace, mode, scope, repeat
        made.service, made.replicate, made.ordered = service, replicate, ordered
        made.budget = context.current().budget_of(budget)
        made.caches, made.groups = {}, {}
        made.__post_init__()  # before anything is opened
        made.shared_store = SharedStore(cache)
        return made

    @property
    def flow(self) -> Flow | None:
        """The flow control of calls upstream; None if nothing limits them."""
        return None if self.service is None else self.service.flow

    @property
    def spending(self) -> Spending | None:
        """What calls spend of the budget; None if there is none."""
        return None if self.budget is None else self.shared_store.spending(self.budget)

    @property
    def prices(self) -> Prices:
        """The prices of tokens: those of the budget, else the table."""
        return TABLE if self.budget is None else self.budget.prices

    def changed(self, **changes: Any) -> Self:
        """Return a view with these changes; it shares no calls with this one."""
        return dataclasses.replace(self, caches={}, groups={}, **changes)

    def sharing(self, **changes: Any) -> Self:
        """Return a view of the same client with another namespace or replicate; they share calls."""
        return dataclasses.replace(self, **changes)

    def duplicated(self, key: str, namespace: str | None, n: int, asker: object = None) -> list[bool]:
        """Return the flags ``duplicated`` of a question that is asked in this turn of the event loop.

        Args:
            key: the key of the question.
            namespace: the namespace that draws.
            n: how many samples.
            asker: what asks; by default the running task.
        """
        loop = loops.running()
        groups = self.groups.get(loop)
        if groups is None:
            groups = self.groups[loop] = Groups()
            loops.own_handles(loop).call_soon(self.groups.pop, loop, None)
        asker = Asker(asyncio.current_task(loop) if asker is None else asker)
        return groups.duplicated((key, namespace), asker, n)

    def cache(self, mode: Mode) -> Cache:
        """Return the cache for a mode."""
        cache = self.caches.get((mode, self.repeat))
        if cache is None:
            actual: Mode = "bypass" if mode == "read-write" and switched_off() else mode
            made = Cache(_model, self.shared_store.store, mode=actual, repeat=self.repeat, codec=_codec)
            cache = self.caches.setdefault((mode, self.repeat), made)
            self.shared_store.caches.add(cache)
        return cache


@dataclass(frozen=True, eq=False)
class Asked(Request):
    """One question of an exchange, as the cache sees it. Nothing is copied until a call must be sent."""

    exchange: Any = dataclasses.field(default=None, kw_only=True, repr=False)
    place: int = dataclasses.field(default=0, kw_only=True, repr=False)
    own: bool = dataclasses.field(default=True, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Keep the values without copying them: the `Exchange` owns them."""

    def asking(self, n: int) -> Self:
        """Return the same question for n samples."""
        self.exchange.keep()
        if n == self.n:
            return self
        return self.merging(n)

    def merging(self, n: int) -> Self:
        """Return the same question for n samples; some of them belong to other requests."""
        twin = copy.copy(self)
        object.__setattr__(twin, "n", n)
        object.__setattr__(twin, "own", False)
        return twin

    def placed(self, indices: Sequence[int]) -> None:
        """Note the indices of samples that a call is about to generate for this request alone."""
        if self.exchange.mode != "bypass" and len(indices) == self.n and min(indices) >= 0:
            self.exchange.claimed = tuple(indices)


def check_size(asks: Sequence[wire.Ask], most: int | None = None) -> None:
    """Refuse a request that asks for too many samples.

    Raises:
        TooManySamples: when it does; see `cachepipe.bounds.check_n`.
    """
    check_n(asks[0].n, len(asks), most)


def limit_of(api: wire.Api, ask: wire.Ask, url: str, most: int | None = None) -> int:
    """Return the largest number of samples of one call.

    A request with a seed is sent as its caller wrote it, since its samples would be equal in calls of their
    own.

    Args:
        api: the API.
        ask: the question.
        url: where the call goes.
        most: the number that the client's provider honours, if it is known.
    """
    return _most_of(api, url, most) if ask.mergeable else api.max_n


@lru_cache(maxsize=256)
def _most_of(api: wire.Api, url: str, most: int | None) -> int:
    """Return the largest number of samples of a call that may be merged; the arguments are as above."""
    known = presets.at(wire.scope_of(url))
    limits = (api.max_n, most, None if known is None else known.max_n)
    return min(limit for limit in limits if limit is not None)


def questions_of(
    api: wire.Api,
    asks: Sequence[wire.Ask],
    url: str,
    headers: Mapping[str, str],
    *,
    scope: str | None = None,
    alone: bool = False,
    max_n: int | None = None,
) -> list[Question]:
    """Return the questions of a request with their keys; the arguments are those of `Exchange`.

    Raises:
        UnkeyableValue: when no stable key can be made from one of its values.
    """
    alone = alone or len(asks) > 1 or limit_of(api, asks[0], url, max_n) == 1
    scope, named = wire.named_scope(scope, wire.scope_of(url), api)
    return [
        keys.provider_question(
            scope,
            wire.question_document(ask, headers, named),
            as_written=api.as_written,
            mergeable=ask.mergeable and not alone,
            function=ask.function,
        )
        for ask in asks
    ]


def body_from(api: wire.Api, ask: wire.Ask, samples: Sequence[Kept]) -> bytes:
    """Return the JSON of an answer that is assembled from samples."""
    payloads = [sample.payload for sample in samples]
    for payload in payloads:
        if _MARKED in payload:
            return api.written(api.answer([sample.value for sample in samples], ask))
    return api.answer_bytes(payloads, ask)


class Exchange(Calls):
    """One request that the cache may answer. Subclasses define `send`.

    Call ``known()``, and if it returns None, ``await drawn()``; ``record`` then describes the answer (see
    `cachepipe.providers.info`).

    Args:
        view: the cache, and how it is used.
        api: the API of the request.
        body: the request's body.
        asks: its questions: ``api.split(body)``; all of them ``cacheable``.
        url: the request's URL.
        headers: the headers of the request; those that change the answer count.
        stream: whether the caller wants an event stream.
        alone: whether it needs a call of its own, for example because of its own headers.
        mode: how the cache is used.
        claimant: who draws.
        questions: the questions with their keys, if an equal request has made them before.
        run: the run that it belongs to; by default the current one.
        counter: counts the occurrences of equal requests; by default the run.
        lists: sends the items of lists; by default only this request's own items share calls.
        max_n: the largest number of samples of one call; default is that of the API or of a known provider.
        ordered: whether the answer is handed over in its turn.
    """

    def __init__(
        self,
        view: CacheView,
        api: wire.Api,
        body: Mapping[str, Any],
        asks: Sequence[wire.Ask],
        url: str,
        headers: Mapping[str, str],
        *,
        stream: bool,
        alone: bool,
        mode: Mode,
        claimant: Claimant,
        questions: list[Question] | None = None,
        run: runs.Occurrences | None = None,
        counter: Retried | None = None,
        lists: Lists | None = None,
        max_n: int | None = None,
        ordered: Ordered = False,
    ) -> None:
        self.view = view
        self.ordered = ordered
        self.api = api
        self.body = body
        self.asks = asks
        self.url = url
        self.stream = stream
        self.mode = mode
        self.claimant = claimant
        self.brought: list[tuple[Received, list[Any]]] = []
        self.live: asyncio.Future[tuple[RecordedStream, Received]] | None = None
        self.task: asyncio.Future[Response] | None = None
        self.claimed: tuple[int, ...] | None = None  # the indices of a lone question's samples to come
        self.run = run
        self.counter = counter
        self.lists = lists
        self.max_n = limit_of(api, asks[0], url, max_n)
        self.given_back = (
            False  # whether the reader of the stream was cut off, so that its retry is this draw
        )
        self._begun: list[Found | Drawing] = []
        self._found: Sequence[Found] = ()  # what was stored
        self._snapped = False
        self._kind: Hashable = None  # what the items that may share a call have in common
        self.over = False  # nobody takes what a call brings any more
        self.questions = questions or questions_of(
            api, asks, url, headers, scope=view.scope, alone=alone, max_n=max_n
        )
        self.record = info.Record(self.questions, claimant, url, view.prices)

    def own_context(self) -> contextvars.Context | None:
        """Return the context for a task that uses `send`; None if any context will do."""
        return None

    @property
    def flow(self) -> Flow | None:
        """The flow control of the service."""
        return self.view.flow

    @property
    def spending(self) -> Spending | None:
        """What calls spend of the budget."""
        return self.view.spending

    @property
    def namespace(self) -> str | None:
        """The namespace that draws."""
        return self.claimant.namespace

    # Hits.

    def known(self) -> Answer | None:
        """Return the answer if the store has all of its samples, else None. Only reads. Thread-safe.

        An answer that must wait for its turn is left to ``drawn``.

        Raises:
            CacheMiss: in replay mode, when the answer is not stored.
        """
        if self.ordered is not False:
            return None
        found = self._look()
        return None if found is None else self.hit(found)

    async def reasons(self) -> list[str]:
        """Return for each question whose samples are not all stored why; no draw is made.

        Raises:
            StoreError: when the cache cannot be read.
        """
        view = self.view
        cache = view.cache(self.mode)
        run = self.run or runs.current(view.shared_store.store.identity)
        asked = [
            (question, ask.n, draw_of(question.key, self.claimant, run, shared=cache.shares(question)))
            for question, ask in zip(self.questions, self.asks, strict=True)
        ]
        for _, _, draw in asked:
            give_back(draw, run)
        found = await asyncio.to_thread(lacking, view.shared_store.store, asked, self.claimant.namespace)
        return [why for _, why in found]

    def _look(self) -> list[Found] | None:
        asked = [(question, ask.n) for question, ask in zip(self.questions, self.asks, strict=True)]
        counter = self._counter() if self.stream else self.counter
        cache = self.view.cache(self.mode)
        return cache.look(self.claimant, asked, self.body, run=self.run, counter=counter)

    def hit(self, found: Sequence[Found]) -> Answer:
        """Return the answer with samples that were stored."""
        self._found = found
        flags = [self._flags(place) for place in range(len(found))]
        self.record.responses = responses = responses_of(found, flags)
        return self._made([sample for response in responses for sample in response.data])

    def _counter(self) -> Retried:
        """Return what counts the occurrences of a stream, which may be given back while its draw goes on."""
        if self.counter is None:
            self.counter = OneRequest(self.run or runs.current(self.view.shared_store.store.identity))
        return self.counter

    def give_back(self) -> None:
        """Learn that the reader of the stream was cancelled or timed out: its retry is the same draw (C8).

        A sample that is still being recorded is then no longer this request's. Any thread may call this.
        """
        self.given_back = True
        if self._found:
            found, self._found = self._found, ()
            for one in found:
                one.take_back()
        elif self.counter is not None:
            self.counter.left()
        if self.task is None or self.task.done():
            self._take_back()

    def _take_back(self) -> None:
        begun, self._begun = self._begun, []
        for one in begun:
            one.take_back()

    in_turns = True
    """Whether requests come from an event loop, in whose turns equal ones are served together."""

    @classmethod
    def flags(cls, view: CacheView, namespace: str | None, question: Question, ask: wire.Ask) -> list[bool]:
        """Return for each sample of a question whether it is merged with an earlier one (C6)."""
        if cls.in_turns:
            return view.duplicated(question.key, namespace, ask.n)
        return lone(ask.n)

    def _flags(self, place: int) -> list[bool]:
        return self.flags(self.view, self.claimant.namespace, self.questions[place], self.asks[place])

    def _made(self, samples: Sequence[Kept]) -> Answer:
        """Return an answer that is assembled from samples."""
        made_by = samples[0].made_by
        if self.stream:
            events = self.api.stream([sample.value for sample in samples], self.asks[0])
            return Answer(ReplayedStream(list(events), self.give_back), made_by=made_by)
        return Answer(body_from(self.api, self.asks[0], samples), made_by=made_by)

    # Draws.

    async def drawn(self) -> Answer:
        """Draw the samples; return the answer, or the stream that generates them."""
        cache = self.view.cache(self.mode)
        line = cache.line(cache.queue(loops.running()), self.ordered)
        if line is None:
            return await self._drawn(None)
        turn = line.arrive()
        try:
            try:
                found = self._look()
            except CacheMiss:
                await turn.come(None)  # as errors do
                raise
            if found is None:
                return await self._drawn(turn)
            try:
                await turn.come(latest(found))
            except BaseException:
                for one in found:
                    one.take_back()
                raise
            return self.hit(found)
        finally:
            turn.leave()

    async def _drawn(self, turn: Turn | None) -> Answer:
        """Draw the samples, and return the answer in its turn; a stream that generates them begins now."""
        cache = self.view.cache(self.mode)
        queue = cache.queue(loops.running())
        if self.stream:
            self._counter()
        if len(self.asks) > 1:
            queue.gather()
        whose = self.claimant._asdict()
        if self.stream and len(self.asks) == 1:
            self.live = queue.loop.create_future()
        flags = []
        try:
            for place, (ask, question) in enumerate(zip(self.asks, self.questions, strict=True)):
                flags.append(self._flags(place))
                request = Asked(self.body, n=ask.n, exchange=self, place=place, **whose)
                arrive = None if turn is None else lambda: turn
                one = cache.draw(request, question, queue, run=self.run, counter=self.counter, turn=arrive)
                self._begun.append(one)
            if self.live is not None and isinstance(one, Drawing) and not one.state.complete:
                live, responses = await self._streamed(one, flags[0], self.live)
                if live is not None:
                    return live
            else:
                responses = given(await outcomes(self._begun, flags), return_exceptions=False)
            if turn is not None:
                await turn.come(latest(self._begun))
        except BaseException as error:  # noqa: BLE001 - an error without an answer is raised again
            self._take_back()
            if turn is not None and isinstance(error, Exception):
                await turn.come(None)
            return self._instead(error)
        finally:
            self.over = True
        if not self.stream:
            self._begun = []  # a draw refers to its exchange: this leaves nothing for the garbage collector
        return self._delivered(responses)

    def _instead(self, error: BaseException) -> Answer:
        """Return what a call returned instead of an answer that can be cached; else raise the error."""
        if isinstance(error, TooLarge):
            return error.answer()
        if isinstance(error, Unkept) and not (self.stream and error.__cause__ is not None):
            return Answer(error.arrived.content, error.arrived, kept=False)
        if isinstance(error, ShortAnswer) and self.brought and not self.stream:
            arrived = self.brought[-1][0]
            return Answer(arrived.content, arrived, kept=False)
        if isinstance(error, Unkept) and error.__cause__ is not None:
            raise error.__cause__ from None
        raise error

    def _delivered(self, responses: Sequence[Response]) -> Answer:
        """Return the response of a call for this request alone, else an answer assembled from samples."""
        self.record.responses = responses
        samples = [sample for response in responses for sample in response.data]
        if len(self.brought) == 1 and not self.stream:
            arrived, brought = self.brought[0]
            if len(brought) == len(samples) and all(map(_same, brought, samples)):
                return Answer(arrived.content, arrived, made_by=samples[0].made_by)
        return self._made(samples)

    async def _streamed(
        self,
        drawing: Drawing,
        flags: list[bool],
        live: asyncio.Future[tuple[RecordedStream, Received]],
    ) -> tuple[Answer | None, list[Response]]:
        """Return the stream itself if this request generates it, else the response to replay."""
        task = self.task = drawing.queue.loop.create_task(drawing.response(flags))
        _tasks.add(task)
        task.add_done_callback(self._stream_drawn)
        try:
            await asyncio.wait((task, live), return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            raise
        if live.done():
            return Answer(*live.result()), []
        return None, [task.result()]

    def _stream_drawn(self, task: asyncio.Future[Response]) -> None:
        _tasks.discard(task)
        if not task.cancelled() and task.exception() is None:
            self.record.responses = [task.result()]
            if self.given_back:
                self._take_back()

    # Generation, on the loop of the request.

    def keep(self) -> None:
        """Copy the body, before the caller can change it."""
        if not self._snapped:
            self._snapped = True
            self.body = by_value(self.body)
            self.asks = self.api.split(self.body)

    async def generate(self, asked: Asked) -> Sequence[Any]:
        """Return the samples of a call for one of the questions."""
        live = self.live
        whole = asked.own and len(self.asks) == 1 and asked.n <= self.max_n
        if live is not None and whole and not live.done():
            return await self._recorded(live)
        try:
            return await in_parts(partial(self._generated, asked.place), asked.n, self.max_n)
        except TooLarge as large:
            if len(self.asks) == 1 and (self.over or self.stream or not asked.own):
                large.leave()
            raise

    async def _generated(self, place: int, n: int) -> Sequence[Any]:
        """Return n samples of one of the questions."""
        if self.lists is None and len(self.asks) > 1:
            self.lists = Lists()
        if self.lists is not None and self.lists.takes(self, place):
            return await self.lists.samples(self, place, n)
        return await self.called((self.asks[place],), n)

    async def called(self, asks: Sequence[wire.Ask], n: int) -> Sequence[Any]:
        """Return the samples of one call as they are stored, n for each of the asks; see `Calls.call`."""
        samples, made = await self.call(asks, n)
        try:
            kept = self._packed(samples, made)
        except NotStorable as error:
            raise Unkept(made.arrived, error) from error
        self.brought.append((made.arrived, kept))
        return kept

    def list_kind(self, place: int) -> Hashable:
        """Return what the items that may share a call have in common; None if the question travels alone."""
        ask, listed = self.asks[place], self.api.listed
        item = None if listed is None else ask.question.get(listed)
        if item is None or not ask.mergeable or not isinstance(item, self.api.item_types):
            return None
        if self._kind is None:
            others = {name: value for name, value in ask.question.items() if name != listed}
            document = {"body": others, "transport": ask.transport}
            shared = keys.provider_question(self.url, document, as_written=self.api.as_written)
            self._kind = self.claimant, shared.key
        return self._kind, type(item)

    def _packed(self, samples: Sequence[wire.Sample], made: Made) -> list[Kept]:
        """Return the samples of a call in the form in which they are stored."""
        url = wire.scope_of(self.url)
        try:
            return packed(
                samples,
                request=made.arrived.response.headers.get(id_header(self.api)),
                asked=self.body.get("model"),
                url=None if url == self.questions[0].scope else url,
                reserved=made.reserved,
            )
        except NotStorable:
            if made.reserved is not None:
                made.reserved.stored(len(samples))
            raise

    async def _recorded(self, live: asyncio.Future[tuple[RecordedStream, Received]]) -> list[Any]:
        """Return the samples of the caller's own stream when it has come to its end."""
        body, added = self.api.inject_usage(self.body)
        try:
            made, arrived = await self.begin(body, stream=True)
        except Exception as error:
            if not added or status_of(error) not in (400, 422):
                raise
            added = False  # not every server knows how to report usage: what counts is what its caller wrote
            made, arrived = await self.begin(self.body, stream=True)
        try:
            samples = await self._recorded_samples(arrived, live, hide_usage=added)
        except BaseException as error:
            made.end(error=error)
            raise
        made.end(self.api.answer(samples, self.asks[0]), samples=len(samples))
        return self._packed(samples, made)

    async def _recorded_samples(
        self,
        arrived: Received,
        live: asyncio.Future[tuple[RecordedStream, Received]],
        *,
        hide_usage: bool,
    ) -> list[Any]:
        registry = self.view.cache(self.mode).in_flight
        recording = self.recording(
            arrived.response,
            self.api.recorder(ask=self.asks[0]).within(self.most()),
            hide_usage=hide_usage,
            awaited=partial(registry.anyone_waits_for, self.questions[0].key),
            cut=self.give_back,
        )
        self.view.shared_store.recordings.add(recording)
        if self.task is not None:
            recording.watch(self.task)
        if live.done():  # the caller has gone
            recording.leave()
        else:
            live.set_result((recording, arrived))
        samples: list[Any] = await recording.run()
        return samples

    recording: Callable[..., Any] = AsyncRecordedStream


_tasks: set[asyncio.Future[Any]] = set()
"""Draws of streams, which go on when their readers have stopped."""


def _same(one: Any, other: Any) -> bool:
    return one is other


def id_header(api: wire.Api) -> str:
    """Return the name of the header with the provider's id of a call."""
    return "request-id" if api is wire.MESSAGES else "x-request-id"
