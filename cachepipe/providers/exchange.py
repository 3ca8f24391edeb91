"""Answers requests to a provider from the cache, for clients and proxy: question, draw, samples, answer.

A request is split into questions (`cachepipe.wire`), and each question becomes a draw of a cacher
(`cachepipe.stages`). The cacher asks the exchange for missing samples, and the exchange's `send` makes the
call: through an SDK in the clients, through its own HTTP client in the proxy. If one call was made for this
request alone, its answer is handed on unchanged; every other answer is assembled from samples.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import orjson

from cachepipe import jsontext, loops, runs, telemetry, wire
from cachepipe.accounting import is_name, noted
from cachepipe.bounds import check_n, max_answer
from cachepipe.cache.engine import Receipt
from cachepipe.cache.write_queue import MANY
from cachepipe.contract import keys
from cachepipe.contract.draws import (
    Claimant,
    Counter,
    Draw,
    OneRequest,
    Retried,
    draw_of,
    give_back,
    label,
)
from cachepipe.contract.flags import Asker, Groups, lone
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question, trimmed
from cachepipe.errors import CachepipeError, NotStorable, ShortAnswer
from cachepipe.flow.flow import Flow, Passage
from cachepipe.providers import info
from cachepipe.providers.responses import BodySource, Received
from cachepipe.providers.stream_recorder import AsyncRecordedStream, RecordedStream, ReplayedStream
from cachepipe.stage import together
from cachepipe.stages.cacher import AsyncCacher
from cachepipe.stores import open_store
from cachepipe.stores.base import Grant, Sample
from cachepipe.stores.misses import missed
from cachepipe.stores.sums import deliveries_of, known
from cachepipe.typedefs import MODES, REPEATS, Mode, Repeat, Request, Response, by_value
from cachepipe.values import Codec

CLOSING_SECONDS = 5.0
"""Seconds that closing a client waits, by default, for the rest of a stream that its reader left."""
_QUIET_TURNS = 3  # turns of the loop without a new item after which a list of items is sent
_codec = Codec()
_MARKED = b'"\\u0000'
_CALL_ID = b'"request"'


class Unkept(CachepipeError):  # noqa: N818 - it never reaches a caller
    """A call returned a response that is not an answer; the callers that needed it get that response.

    It looks like a refusal, so that a merged call is repeated as its callers wrote it.
    """

    status_code = 422

    def __init__(self, arrived: Received, error: BaseException) -> None:
        super().__init__(f"not cached: {error}")
        self.arrived = arrived


class TooLarge(Unkept):
    """A call returned an answer that is too large to be kept; one reader may read it as it comes."""

    def __init__(self, arrived: Received, most: int) -> None:
        error = wire.BadAnswer(
            f"the answer has more than {most} bytes, and is neither cached nor combined with others. Raise "
            "the limit: the environment variable CACHEPIPE_MAX_ANSWER, or --max-answer of a proxy"
        )
        super().__init__(arrived, error)
        self.__cause__ = error
        self._gone = False

    def answer(self) -> Answer:
        """Return the answer to the first caller.

        Raises:
            BadAnswer: when another caller has it, or it was given up.
        """
        if self._gone and self.__cause__ is not None:
            raise self.__cause__ from None
        self._gone = True
        return Answer(self.arrived.content, self.arrived, kept=False)

    def leave(self) -> None:
        """Give the rest of the answer up, unless a caller reads it."""
        if not self._gone and isinstance(self.arrived.content, BodySource):
            self.arrived.content.leave()
        self._gone = True


class Kept(NamedTuple):
    """A sample as it is stored.

    Attributes:
        payload: its JSON, in the cache's own spelling.
        noted: JSON of the facts stored with it, or nothing.
    """

    payload: bytes
    noted: bytes = b""

    @property
    def value(self) -> wire.Sample:
        """The sample."""
        sample: wire.Sample = _codec.decode(self.payload)
        return sample

    @property
    def made_by(self) -> str | None:
        """The provider's id of the call that made it."""
        if _CALL_ID not in self.noted:
            return None
        name = orjson.loads(self.noted).get("request")
        # It may come from a received cache, and goes into a header.
        return name if isinstance(name, str) and name.isascii() and name.isprintable() else None


class _Model:
    """The model behind a cacher: it passes each request to the exchange that the request belongs to."""

    max_n = wire.CHAT.max_n
    cache_scope = None

    async def request(self, request: Any) -> Response:
        """Return the samples of a call for the request."""
        return Response(await request.exchange.generate(request))

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


class Backing:
    """The cache behind a client and its copies, or behind a proxy."""

    def __init__(self, cache: Any) -> None:
        self.store, self.owned = open_store(cache)
        self.closed = False
        self.cachers: weakref.WeakSet[AsyncCacher] = weakref.WeakSet()
        self.recordings: weakref.WeakSet[RecordedStream] = weakref.WeakSet()
        self.deliveries = deliveries_of(self.store)
        runs.opened(self.store.identity, self)

    async def close(self, timeout: float = CLOSING_SECONDS) -> None:  # noqa: ASYNC109 - it bounds a part only
        """Wait for what is in flight on this loop, then close the store if it was opened here.

        Args:
            timeout: seconds after which the rest of a stream without a reader is given up.
        """
        if self.closed:
            return
        self.closed = True
        recordings = list(self.recordings)
        for recording in recordings:
            recording.leave()
        timer = loops.running().call_later(timeout, _withdraw, recordings)
        try:
            for cacher in list(self.cachers):
                await cacher.close()
        finally:
            timer.cancel()
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
class Surface:
    """A client's view of a cache: the cache, and how it is used. Copies of a client have equal views.

    Requests share merged calls only within views that share ``cachers``, so never across credentials.
    """

    backing: Backing
    namespace: str | None
    mode: Mode
    scope: str | None
    repeat: Repeat
    service: Any = None
    cachers: dict[tuple[Mode, Repeat], AsyncCacher] = dataclasses.field(default_factory=dict)
    groups: dict[Any, Groups] = dataclasses.field(default_factory=dict)
    """By loop, the groups of equal requests that are served together in its turn."""

    def __post_init__(self) -> None:
        if self.service is not None and not isinstance(getattr(self.service, "flow", None), Flow):
            raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {self.service!r}")
        for name in ("namespace", "scope"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None; got {value!r}. Write {name}=str(...)")
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {self.mode!r}")
        if self.repeat not in REPEATS:
            raise ValueError(f"repeat is 'fresh' or 'same'; got {self.repeat!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surface) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"<Surface {self.backing.store!r} namespace={self.namespace!r} mode={self.mode!r}>"

    def _identity(self) -> tuple[Any, ...]:
        return id(self.backing), self.namespace, self.mode, self.scope, self.repeat, id(self.service)

    @classmethod
    def of(
        cls,
        cache: Any,
        namespace: str | None,
        mode: Mode,
        scope: str | None,
        repeat: Repeat,
        service: Any = None,
    ) -> Self:
        """Return the surface for a client's parameters."""
        made = cls.__new__(cls)
        made.namespace, made.mode, made.scope, made.repeat = namespace, mode, scope, repeat
        made.service = service
        made.cachers, made.groups = {}, {}
        made.__post_init__()  # before anything is opened
        made.backing = Backing(cache)
        return made

    @property
    def flow(self) -> Flow | None:
        """The flow control of calls upstream; None if nothing limits them."""
        return None if self.service is None else self.service.flow

    def changed(self, **changes: Any) -> Self:
        """Return a surface with these changes; it shares no calls with this one."""
        return dataclasses.replace(self, cachers={}, groups={}, **changes)

    def named(self, namespace: str | None) -> Self:
        """Return the surface of the same client in another namespace; they share calls."""
        return dataclasses.replace(self, namespace=namespace)

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
            loop.call_soon(self.groups.pop, loop, None)
        asker = Asker(asyncio.current_task(loop) if asker is None else asker)
        return groups.duplicated((key, label(namespace)), asker, n)

    def cacher(self, mode: Mode) -> AsyncCacher:
        """Return the cacher for a mode."""
        cacher = self.cachers.get((mode, self.repeat))
        if cacher is None:
            made = AsyncCacher(_model, self.backing.store, mode=mode, repeat=self.repeat)
            cacher = self.cachers.setdefault((mode, self.repeat), made)
            self.backing.cachers.add(cacher)
        return cacher


@dataclass(frozen=True, eq=False)
class Asked(Request):
    """One question of an exchange, as the cacher sees it. Nothing is copied until a call must be sent."""

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
        """Return the same question for n samples, not all of which belong to this request."""
        twin = copy.copy(self)
        object.__setattr__(twin, "n", n)
        object.__setattr__(twin, "own", False)
        return twin

    def placed(self, indices: Sequence[int]) -> None:
        """Note the indices of samples that a call is about to generate for this request alone."""
        if self.exchange.mode != "bypass" and len(indices) == self.n and min(indices) >= 0:
            self.exchange.claimed = tuple(indices)


class Answer(NamedTuple):
    """The answer to a request.

    Attributes:
        content: the body: JSON, or the source of a stream's events.
        arrived: the response of a call that was made for this request alone, with its status and headers;
            None if the answer was assembled from samples.
        kept: False if it is not a valid answer, such as an error under status 200; it is not cached.
        made_by: the provider's id of the call that generated its first sample, if known.
    """

    content: bytes | BodySource
    arrived: Received | None = None
    kept: bool = True
    made_by: str | None = None


def check_size(asks: Sequence[wire.Ask], most: int | None = None) -> None:
    """Refuse a request that asks for too many samples.

    Raises:
        TooManySamples: when it does; see `cachepipe.bounds.check_n`.
    """
    check_n(asks[0].n, len(asks), most)


def questions_of(
    api: wire.Api,
    asks: Sequence[wire.Ask],
    url: str,
    headers: Mapping[str, str],
    *,
    scope: str | None = None,
    alone: bool = False,
) -> list[Question]:
    """Return the questions of a request with their keys; the arguments are those of `Exchange`.

    Raises:
        UnkeyableValue: when no stable key can be made from one of its values.
    """
    alone = alone or api.max_n == 1 or len(asks) > 1
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


def recalled(
    surface: Surface,
    asks: Sequence[wire.Ask],
    questions: Sequence[Question],
    claimant: Claimant,
    occurrences: runs.Occurrences | None = None,
    counter: Counter | None = None,
) -> list[Grant] | None:
    """Return the samples of a request's draws if the store has them all, else None.

    Only reads. Thread-safe. ``occurrences`` are by default those of the current run, which is also the
    ``counter`` unless there is another.
    """
    store = surface.backing.store
    if store.read_only:
        return None
    if occurrences is None:
        occurrences = runs.current(store.identity)
    if counter is None:
        counter = occurrences
    taken: list[Draw] = []
    grants: list[Grant] = []
    user = label(claimant.namespace)
    try:
        for ask, question in zip(asks, questions, strict=True):
            if ask.n > MANY:  # it would delay others
                return None
            shared = question.function or surface.repeat == "same"
            if shared and (question.key, user) not in occurrences.used:
                return None
            identity = draw_of(question.key, claimant, counter, shared=shared)
            if not shared:
                taken.append(identity)
            grant = store.recall(identity, ask.n)
            if grant is None or grant.shared:
                return None
            grants.append(grant)
    finally:
        if len(grants) < len(asks):  # the cacher begins anew, with the same numbers
            for draw in taken:
                counter.give_back(draw)
    for draw in taken:
        occurrences.count(draw, fresh_id=False)
    _deliver(surface, occurrences.name, user, questions, grants)
    return grants


def _deliver(
    surface: Surface,
    run: str,
    namespace: str,
    questions: Sequence[Question],
    grants: Sequence[Grant],
    *,
    taken_back: bool = False,
) -> None:
    """Add known draws to the sums of a run, or take them back."""
    deliveries = surface.backing.deliveries
    for question, grant in zip(questions, grants, strict=True):
        if taken_back:
            deliveries.add(known(run, namespace, question.scope, grant, "taken back"))
        else:
            deliveries.add_known(run, namespace, question.scope, grant)


def responses_of(
    questions: Sequence[Question], grants: Sequence[Grant], duplicated: Sequence[list[bool]]
) -> list[Response]:
    """Return grants from the ledger as responses."""
    return list(map(_cached, questions, grants, duplicated))


def body_from(api: wire.Api, ask: wire.Ask, samples: Sequence[Kept]) -> bytes:
    """Return the JSON of an answer that is assembled from samples."""
    payloads = [sample.payload for sample in samples]
    for payload in payloads:
        if _MARKED in payload:
            return jsontext.dumps(api.answer([sample.value for sample in samples], ask))
    return api.answer_bytes(payloads, ask)


class Exchange:
    """One request that the cache may answer. Subclasses define `send`.

    Call ``known()``, and if it returns None, ``await drawn()``; ``record`` then describes the answer (see
    `cachepipe.providers.info`).

    Args:
        surface: the cache, and how it is used.
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
    """

    def __init__(
        self,
        surface: Surface,
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
    ) -> None:
        self.surface = surface
        self.api = api
        self.body = body
        self.asks = asks
        self.stream = stream
        self.mode = mode
        self.claimant = claimant
        self.brought: list[tuple[Received, list[Any]]] = []
        self.live: asyncio.Future[tuple[RecordedStream, Received]] | None = None
        self.task: asyncio.Future[Response] | None = None
        self.max_retries: int | None = None  # how often a call is made again, if the request says so itself
        self.spans = True  # whether calls make spans here, as who sends them makes none
        self.claimed: tuple[int, ...] | None = None  # the indices of a lone question's samples to come
        self.counter: Retried | None = None  # counts the occurrences of equal requests; by default the run
        self.given_back = (
            False  # whether the reader of the stream was cut off, so that its retry is this draw
        )
        self._receipts: list[Receipt] = []
        self._known: tuple[str, Sequence[Grant]] | None = None  # what was there, and the name of the run
        self._undo: Callable[[], None] | None = None  # what takes back a stream that was replayed
        self._snapped = False
        self._items: list[tuple[Asked, asyncio.Future[list[Any]]]] = []
        self._quiet = 0
        self._over = False  # nobody takes what a call brings any more
        self.questions = questions or questions_of(api, asks, url, headers, scope=surface.scope, alone=alone)
        names = tuple(question.key for question in self.questions)
        self.record = info.Record(names, claimant, url)

    def own_context(self) -> contextvars.Context | None:
        """Return the context for a task that uses `send`; None if any context will do."""
        return None

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:
        """Make a call; its error reaches exactly the requests that needed it.

        Args:
            body: the body to send instead of the request's own.
            stream: whether it asks for a stream; the response is then returned with its body unread, as
                an object with ``aiter_bytes()`` and ``aclose()``.
        """
        raise NotImplementedError

    def most(self) -> int:
        """Return the largest size in bytes of an answer that is kept; larger ones are only handed on."""
        return max_answer()

    # Hits.

    def known(self) -> Answer | None:
        """Return the answer if the store has all of its samples, else None. Only reads. Thread-safe.

        Raises:
            CacheMiss: in replay mode, when the answer is not stored.
        """
        if self.mode == "replay":
            return self._replayed()
        if self.mode != "read-write":
            return None
        run = runs.current(self.surface.backing.store.identity)
        counter = self._counter() if self.stream else None
        grants = recalled(self.surface, self.asks, self.questions, self.claimant, run, counter)
        if grants is None:
            return None
        self._known = run.name, grants
        return self.granted(grants)

    def _replayed(self) -> Answer:
        """Return the answer if all of its samples are stored, with a claim in memory only; see `known`."""
        store = self.surface.backing.store
        occurrences = runs.current(store.identity)
        done: list[tuple[Draw, IntervalSet, Grant | None]] = []
        grants: list[Grant] = []
        with occurrences.replaying:
            for ask, question in zip(self.asks, self.questions, strict=True):
                identity = draw_of(
                    question.key,
                    self.claimant,
                    occurrences,
                    shared=question.function or self.surface.repeat == "same",
                )
                shared = identity.shared
                taken = IntervalSet() if shared else occurrences.taken(identity.namespace, question.key)
                grant = None
                try:
                    grant = store.replay(identity, ask.n, taken)
                finally:
                    done.append((identity, taken, grant))
                    if grant is None:
                        _unclaim(done, occurrences)
                if grant is None:
                    raise missed(store, question, identity, ask.n, self.body, self.claimant.namespace)
                grants.append(grant)
        self._undo = partial(_unclaim, done, occurrences)
        self._known = occurrences.name, grants
        _deliver(self.surface, occurrences.name, label(self.claimant.namespace), self.questions, grants)
        return self.granted(grants)

    def _counter(self) -> Retried:
        """Return what counts the occurrences of a stream, which may be given back while its draw goes on."""
        if self.counter is None:
            self.counter = OneRequest(runs.current(self.surface.backing.store.identity))
        return self.counter

    def give_back(self) -> None:
        """Learn that the reader of the stream was cancelled or timed out: its retry is the same draw (C8).

        A sample that is still being recorded is then no longer this request's. Any thread may call this.
        """
        self.given_back = True
        if self._known is not None:
            (run, grants), self._known = self._known, None
            namespace = label(self.claimant.namespace)
            _deliver(self.surface, run, namespace, self.questions, grants, taken_back=True)
        if self._undo is not None:
            self._undo()
        elif self.counter is not None:
            self.counter.left()
        if self.task is None or self.task.done():
            self._take_back()

    def _take_back(self) -> None:
        receipts, self._receipts = self._receipts, []
        self.surface.cacher(self.mode).take_back(receipts)

    def granted(self, grants: Sequence[Grant]) -> Answer:
        """Return the answer with the samples of these grants."""
        flags = [self._flags(place) for place in range(len(grants))]
        responses = self.record.responses = responses_of(self.questions, grants, flags)
        return self._made([sample for response in responses for sample in response.data])

    in_turns = True
    """Whether requests come from an event loop, in whose turns equal ones are served together."""

    @classmethod
    def flags(cls, surface: Surface, namespace: str | None, question: Question, ask: wire.Ask) -> list[bool]:
        """Return for each sample of a question whether it is merged with an earlier one (C6)."""
        if cls.in_turns:
            return surface.duplicated(question.key, namespace, ask.n)
        return lone(ask.n)

    def _flags(self, place: int) -> list[bool]:
        return self.flags(self.surface, self.claimant.namespace, self.questions[place], self.asks[place])

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
        cacher = self.surface.cacher(self.mode)
        loop = loops.running()
        if self.stream:
            self._counter()
        whose = self.claimant._asdict()
        requests = [
            Asked(self.body, n=ask.n, exchange=self, place=place, **whose)
            for place, ask in enumerate(self.asks)
        ]
        try:
            if self.stream and len(requests) == 1:
                return await self._streamed(cacher, requests[0], loop)
            if len(requests) == 1:
                flags = self._flags(0)
                responses = [
                    await cacher.draw(
                        requests[0], self.questions[0], loop, flags, counter=self.counter, looked=True
                    )
                ]
            else:
                responses = await self._several(cacher, requests, loop)
        except TooLarge as large:
            return large.answer()
        except Unkept as unkept:
            if self.stream and unkept.__cause__ is not None:
                raise unkept.__cause__ from None
            return Answer(unkept.arrived.content, unkept.arrived, kept=False)
        except ShortAnswer:
            if self.stream or not self.brought:
                raise
            arrived = self.brought[-1][0]
            return Answer(arrived.content, arrived, kept=False)
        finally:
            self._over = True
        return self._delivered(responses)

    async def _several(
        self, cacher: AsyncCacher, requests: Sequence[Asked], loop: asyncio.AbstractEventLoop
    ) -> list[Response]:
        receipts = self._receipts
        try:
            return await together(
                [
                    _begun(
                        cacher.draw(
                            request,
                            self.questions[place],
                            loop,
                            self._flags(place),
                            receipts,
                            counter=self.counter,
                        ),
                        loop,
                    )
                    for place, request in enumerate(requests)
                ],
                False,
            )
        except BaseException:
            cacher.take_back(receipts)
            raise

    def _delivered(self, responses: Sequence[Response]) -> Answer:
        """Return the response of a call for this request alone, else an answer assembled from samples."""
        self.record.responses = responses
        samples = [sample for response in responses for sample in response.data]
        if len(self.brought) == 1 and not self.stream:
            arrived, brought = self.brought[0]
            if len(brought) == len(samples) and all(map(_same, brought, samples)):
                return Answer(arrived.content, arrived, made_by=samples[0].made_by)
        return self._made(samples)

    async def _streamed(self, cacher: AsyncCacher, request: Asked, loop: asyncio.AbstractEventLoop) -> Answer:
        """Return the stream itself if this request generates it, else a replay of it."""
        live = self.live = loop.create_future()
        task = self.task = _begun(
            cacher.draw(
                request,
                self.questions[0],
                loop,
                self._flags(0),
                self._receipts,
                counter=self.counter,
                looked=True,
            ),
            loop,
        )
        _tasks.add(task)
        task.add_done_callback(self._stream_drawn)
        try:
            await asyncio.wait((task, live), return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            raise
        if live.done():
            return Answer(*live.result())
        return self._delivered([task.result()])

    def _stream_drawn(self, task: asyncio.Future[Response]) -> None:
        _tasks.discard(task)
        if not task.cancelled() and task.exception() is None:
            self.record.responses = [task.result()]
            if self.given_back:
                self._take_back()

    # Generation, on the loop of the cacher.

    def keep(self) -> None:
        """Make the body this request's own, before the caller can change it."""
        if not self._snapped:
            self._snapped = True
            self.body = by_value(self.body)
            self.asks = self.api.split(self.body)

    async def generate(self, asked: Asked) -> list[Any]:
        """Return the samples of a call for one of the questions."""
        if len(self.asks) > 1:
            return await self._collected(asked)
        live = self.live
        if live is not None and asked.own and not live.done():
            return await self._recorded(live)
        try:
            return await self._called((self.asks[asked.place],), asked.n)
        except TooLarge as large:
            if self._over or self.stream or not asked.own:
                large.leave()
            raise

    async def _called(self, asks: Sequence[wire.Ask], n: int) -> list[Any]:
        """Return the samples of one call, n for each of the asks."""
        questions = [ask.question for ask in asks]
        body: Mapping[str, Any] = self.body
        if self.stream or len(asks) != len(self.asks) or n != self.asks[0].n:
            body = self.api.merge_body(questions, n, transport=self.asks[0].transport)
        made, arrived = await self._upstream(body, stream=False)
        content, most = arrived.content, self.most()
        if isinstance(content, BodySource) or len(content) > most:
            if made is not None:
                made.end()
            raise TooLarge(arrived, most)
        if made is not None:
            made.end(_read(content))
        try:
            samples = self.api.samples(content, questions if len(asks) > 1 else ())
            if len(asks) > 1:
                wire.by_question(samples, len(asks), n)
            kept = self._packed(samples, arrived)
        except (wire.BadAnswer, NotStorable) as error:
            raise Unkept(arrived, error) from error
        self.brought.append((arrived, kept))
        return kept

    def _packed(self, samples: Sequence[wire.Sample], arrived: Received) -> list[Kept]:
        """Return the samples of a call in the form in which they are stored."""
        names = {
            "request": arrived.response.headers.get(id_header(self.api)),
            "asked": self.body.get("model"),
        }
        about = {name: value for name, value in names.items() if is_name(value)}
        url = wire.scope_of(self.record.url)
        elsewhere = None if url == self.questions[0].scope else url
        return [
            Kept(_codec.encode(sample), trimmed(orjson.dumps({**about, **noted(sample, elsewhere)})))
            for sample in samples
        ]

    async def _upstream(self, body: Mapping[str, Any], *, stream: bool) -> tuple[_Made | None, Received]:
        """Make a call, scheduled and retried by the flow control if there is one.

        Returns:
            The object that must be notified of its end, if any, and the response.
        """
        flow = self.surface.flow
        wanted = self.spans and telemetry.wanted()
        if flow is None and not wanted:
            return None, await self.send(body, stream=stream)
        spans: list[telemetry.CallSpan | None] = []

        async def attempt() -> Received:
            about = self.api.name, self.record.url, body, getattr(self, "context", None)
            span = telemetry.begin(*about) if wanted else None
            try:
                arrived = await self.send(body, stream=stream)
            except BaseException as error:
                if span is not None:
                    span.end(error=error)
                raise
            spans.append(span)
            return arrived

        if flow is None:
            passage, arrived = None, await attempt()
        else:
            passage, arrived = await flow.call(
                attempt,
                body,
                namespace=self.claimant.namespace,
                samples=0 if self.asks[0].function else None,
                max_retries=self.max_retries,
            )
        return _Made(passage, spans[-1], arrived), arrived

    async def _collected(self, asked: Asked) -> list[Any]:
        """Return the samples of one item of a list; the list's missing items share one call."""
        loop = loops.running()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._items.append((asked, future))
        self._quiet = 0
        if len(self._items) == 1:
            loop.call_soon(self._settle, loop)
        return await future

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send the collected items once no more of them come."""
        self._quiet += 1
        if self._quiet < _QUIET_TURNS and len(self._items) < len(self.asks):
            loop.call_soon(self._settle, loop)
            return
        items, self._items = self._items, []
        for n in {asked.n for asked, _ in items}:
            work = self._send_items([item for item in items if item[0].n == n], n)
            task = loop.create_task(work, context=self.own_context())
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)

    async def _send_items(self, items: Sequence[tuple[Asked, asyncio.Future[list[Any]]]], n: int) -> None:
        items = sorted(items, key=lambda item: item[0].place)
        try:
            samples = await self._called([self.asks[asked.place] for asked, _ in items], n)
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            if isinstance(error, TooLarge) and (self._over or len(items) < len(self.asks)):
                error.leave()
            for _, future in items:
                if not future.done():
                    future.set_exception(error)
            return
        share = len(samples) // len(items)  # a lone item's may be fewer than n
        for place, (_, future) in enumerate(items):
            if not future.done():
                future.set_result(samples[place * share : (place + 1) * share])

    async def _recorded(self, live: asyncio.Future[tuple[RecordedStream, Received]]) -> list[Any]:
        """Return the samples of the caller's own stream when it has come to its end."""
        body, added = self.api.inject_usage(self.body)
        try:
            made, arrived = await self._upstream(body, stream=True)
        except Exception as error:
            if not added or getattr(error, "status_code", None) not in (400, 422):
                raise
            added = False  # not every server knows how to report usage: what counts is what its caller wrote
            made, arrived = await self._upstream(self.body, stream=True)
        if made is None:
            return self._packed(await self._recorded_samples(arrived, live, hide_usage=added), arrived)
        try:
            samples = await self._recorded_samples(arrived, live, hide_usage=added)
        except BaseException as error:
            made.end(error=error)
            raise
        made.end(self.api.answer(samples, self.asks[0]))
        return self._packed(samples, arrived)

    async def _recorded_samples(
        self,
        arrived: Received,
        live: asyncio.Future[tuple[RecordedStream, Received]],
        *,
        hide_usage: bool,
    ) -> list[Any]:
        recording = self.recording(
            arrived.response,
            self.api.recorder().within(self.most()),
            hide_usage=hide_usage,
            awaited=partial(self.surface.cacher(self.mode).awaited, self.questions[0].key),
            cut=self.give_back,
        )
        self.surface.backing.recordings.add(recording)
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


def _begun(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    """Run a coroutine at once up to its first wait, then in a task; return a future of its result.

    So a draw takes its number when the request is made, not a turn of the loop later.
    """
    begun: asyncio.Future[Any] = loop.create_future()
    try:
        waiting = work.send(None)
    except StopIteration as ended:
        begun.set_result(ended.value)
        return begun
    except Exception as error:  # noqa: BLE001 - it belongs to whoever waits
        begun.set_exception(error)
        return begun

    async def rest() -> Any:
        return await _resumed(work, waiting)

    task = loop.create_task(rest())
    task.add_done_callback(lambda _: work.close())  # where it was cancelled before it went on
    return task


@types.coroutine
def _resumed(work: Coroutine[Any, Any, Any], waiting: Any) -> Generator[Any, Any, Any]:
    """Continue a coroutine that waits for something."""
    while True:
        try:
            value = yield waiting
        except BaseException as error:  # noqa: BLE001 - it goes to the coroutine
            step = partial(work.throw, error)
        else:
            step = partial(work.send, value)
        try:
            waiting = step()
        except StopIteration as ended:
            return ended.value


class _Made:
    """A call upstream with an answer that has begun to arrive, until its end is reported."""

    def __init__(self, passage: Passage | None, span: telemetry.CallSpan | None, arrived: Received) -> None:
        self._passage = passage
        self._span = span
        self._headers = getattr(arrived.response, "headers", None)

    def end(self, answer: Mapping[str, Any] | None = None, *, error: BaseException | None = None) -> None:
        """Report its end to the flow control and the telemetry, if there are any."""
        usage = (answer or {}).get("usage")
        if self._passage is not None:
            self._passage.end(usage=usage, headers=self._headers, error=error)
        if self._span is not None:
            self._span.end(answer, error=error)


def _read(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object of an answer, or None."""
    try:
        answer = jsontext.loads(content)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _same(one: Any, other: Any) -> bool:
    return one is other


def kept_of(grant: Grant) -> list[Kept]:
    """Return the samples of a complete grant."""
    return [Kept(sample.payload, sample.header) for sample in grant.samples if sample is not None]


def _cached(question: Question, grant: Grant, duplicated: list[bool]) -> Response:
    """Return a grant from the ledger as a response."""
    samples = kept_of(grant)
    response = Response(samples, [True] * len(samples), duplicated)
    response.indices = tuple(grant.indices)
    response.key = question.key
    return response


def _unclaim(done: Sequence[tuple[Draw, IntervalSet, Grant | None]], occurrences: runs.Occurrences) -> None:
    """Give back what was claimed in memory for a request that was not answered."""
    for draw, taken, grant in done:
        give_back(draw, occurrences)
        for index in () if grant is None else grant.indices:
            taken.remove(index)


def id_header(api: wire.Api) -> str:
    """Return the name of the header with the provider's id of a call."""
    return "request-id" if api is wire.MESSAGES else "x-request-id"
