"""The one way to the samples of a store: `Cache.look` finds what is stored, `Cache.begin` draws the rest.

Pipelines, clients, the proxy and batch files use it, and nothing below it. Nothing that runs in the
background refers to a pipeline or a client, so these are collected when the program does not refer to them
any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cachepipe import forks, loops, markup, runs
from cachepipe.adapting import hooks_of
from cachepipe.cache.calls import Caller
from cachepipe.cache.drawing import (
    Drawing,
    claim_of,
    count_draw,
    keep_extra,
    new_token,
    note_claim,
    note_place,
    respond,
    start,
    warn_shared,
)
from cachepipe.cache.in_flight import in_flight_of
from cachepipe.cache.turns import Line, Turn
from cachepipe.cache.write_queue import MANY, WriteQueue
from cachepipe.contract.draws import Claims, Counter, Draw, draw_of, give_back, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.contract.schedule import Place
from cachepipe.loops import PerLoop
from cachepipe.stage import adapter_of
from cachepipe.stores.base import Grant, Sample, Store, place_of
from cachepipe.stores.misses import missed
from cachepipe.stores.sums import deliveries_of, known
from cachepipe.typedefs import Mode, Ordered, Repeat, Request, Response
from cachepipe.values import Codec

Arrive = Callable[[], Turn]
"""A function that returns the turn of a request (C11)."""
Asked = Sequence[tuple[Question, int]]
"""Questions, and how many samples are wanted of each."""


@dataclass(frozen=True)
class Stats:
    """The figures of a cache since it was opened, in samples unless stated otherwise.

    Attributes:
        hits: delivered from the cache.
        misses: generated on behalf of the request that got them.
        merged: flagged as duplicated, by the deduplicator in front.
        generated: returned by the model.
        in_flight: being generated now.
        unreported: generated, but never reported as such: their request failed or was cancelled, or
            nobody had asked for them.
        requests: requests begun.
        calls: calls made to the model.
        queue_seconds: total time that calls have waited for a service or limiter.
        call_seconds: total time that calls have taken from then on; 0 where nothing limits them.
    """

    hits: int = 0
    misses: int = 0
    merged: int = 0
    generated: int = 0
    in_flight: int = 0
    unreported: int = 0
    requests: int = 0
    calls: int = 0
    queue_seconds: float = 0.0
    call_seconds: float = 0.0

    def __getitem__(self, name: str) -> float:
        value: float = asdict(self)[name]
        return value

    def _repr_html_(self) -> str:
        return markup.figures(self.as_dict().items())

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


class Cache:
    """Draws the samples of one model from one store.

    Args:
        model: generates samples.
        store: the store.
        mode: how the cache is used.
        repeat: ``"same"`` if all requests for a question share one draw.
        codec: encodes samples, unless the model's adapter does.

    Attributes:
        window: seconds during which demands for one question are merged into shared calls.
        queue: returns the write queue of an event loop.
    """

    def __init__(
        self, model: Any, store: Store, *, mode: Mode = "read-write", repeat: Repeat = "fresh", codec: Codec
    ) -> None:
        self.model = model
        self.store = store
        self.mode = mode
        self.repeat = repeat
        self.codec = codec
        self.window = 0.0
        self.in_flight = in_flight_of(store.identity)
        self.deliveries = deliveries_of(store)
        self.merged = self.hits = self.misses = self.unreported = self.requests = 0
        hooks = hooks_of(adapter_of(model))
        self.present, self.pack, self.unpack = hooks.present, hooks.pack, hooks.unpack
        self.in_memory = mode == "replay" or store.read_only  # claims are not written
        self._queues = PerLoop(self._new_queue, self._keep_figures)
        self.queue = self._queues.of
        self._calls = self._generated = 0  # of loops that are closed

    def _new_queue(self, loop: asyncio.AbstractEventLoop) -> WriteQueue:
        line = self.in_flight.lines.of(loop)
        queue = WriteQueue(loop, self.store, Caller(loop, self.model, keep_extra), start, line)
        self.in_flight.join(queue)
        return queue

    def _keep_figures(self, queue: WriteQueue) -> None:
        """Keep the figures of a loop that was closed."""
        self._calls += queue.caller.calls
        self._generated += queue.caller.generated

    def stats(self) -> Stats:
        """Return the figures so far."""
        callers = [queue.caller for queue in self.open_queues()]
        return Stats(
            hits=self.hits,
            misses=self.misses,
            merged=self.merged,
            generated=self._generated + sum(caller.generated for caller in callers),
            in_flight=sum(caller.in_flight for caller in callers),
            unreported=self.unreported,
            requests=self.requests,
            calls=self._calls + sum(caller.calls for caller in callers),
        )

    def open_queues(self) -> list[WriteQueue]:
        """Return the write queues of the loops that have made requests."""
        return self._queues.all()

    def line(self, queue: WriteQueue, ordered: Ordered) -> Line | None:
        """Return the line of a loop's requests, if answers are handed over in order, else None."""
        if ordered is False or self.mode == "bypass":
            return None
        if ordered is not True:
            queue.line.quiet_turns = max(queue.line.quiet_turns, ordered)
        return queue.line

    def shares(self, question: Question) -> bool:
        """Return True if all requests for a question share one draw (C1)."""
        return self.repeat == "same" or question.function

    # What is stored.

    def look(
        self,
        claimant: Claims,
        asked: Asked,
        request: Any,
        *,
        run: runs.Occurrences | None = None,
        counter: Counter | None = None,
    ) -> list[Found] | None:
        """Return the samples of a request's draws if all of them are stored, else None.

        Only reads, except that a claim which is not written takes indices in memory. Thread-safe.
        After several new draws it leaves the next one to a claim, which also finds what is stored.

        Args:
            claimant: who draws.
            asked: the questions of the request.
            request: the request, for the error.
            run: the run; by default the current one.
            counter: counts the occurrences of equal requests; by default the run.

        Raises:
            CacheMiss: in replay mode, when a sample is not stored.
        """
        if self.mode in {"refresh", "bypass"}:
            return None
        if run is None:
            run = runs.current(self.store.identity)
        if run.expects_new and not self.in_memory:
            return None
        if counter is None:
            counter = run
        found: list[Found] = []
        try:
            for question, n in asked:
                draw = draw_of(question.key, claimant, counter, shared=self.shares(question))
                one = self._find(draw, claimant, question, n, counter, run)
                if one is None:
                    give_back(draw, counter)
                    if self.mode == "replay":
                        self.requests += 1
                        raise missed(self.store, question, draw, n, request, claimant.namespace)
                    return None
                found.append(one)
        finally:
            if len(found) < len(asked):
                for one in found:
                    one.give_back()
        self.requests += len(found)
        for one in found:
            self._deliver(one)
        return found

    def _find(
        self,
        draw: Draw,
        claimant: Claims,
        question: Question,
        n: int,
        counter: Counter,
        run: runs.Occurrences,
    ) -> Found | None:
        """Return the samples of a draw if all of them are stored; an error gives its number back."""
        user = label(claimant.namespace) if draw.shared else draw.namespace
        try:
            grant = self._granted(draw, user, question, n, run)
        except BaseException:
            give_back(draw, counter)
            raise
        if grant is None:
            return None
        return self._found(Found(self, run, counter, user, question, draw, grant, []), claimant)

    def _found(self, found: Found, claimant: Claims) -> Found:
        """Count a draw and decode its samples, which are all stored; an error gives its number back."""
        grant, run = found.grant, found.run
        try:
            if grant.shared:
                warn_shared(found.question, claimant, run)
            count_draw(run, found.draw, grant)
            for sample in grant.samples:
                if sample is not None:
                    found.values.append(self.decode(sample))
        except BaseException:
            found.give_back()
            raise
        return found

    def _granted(
        self, draw: Draw, user: str, question: Question, n: int, run: runs.Occurrences
    ) -> Grant | None:
        """Return the samples of a draw as the store has them, if it has them all."""
        if self.in_memory:
            with run.replaying:
                taken = IntervalSet() if draw.shared else run.taken(user, question.key)
                return self.store.replay(draw, n, taken)
        # Reading more would delay others, and the first use of a shared draw must be recorded.
        if n > MANY or (draw.shared and (question.key, user) not in run.used):
            return None
        return self.store.recall(draw, n)

    def _deliver(self, found: Found) -> None:
        """Account for samples that were stored."""
        run, grant = found.run, found.grant
        self.hits += len(grant.indices)
        self.deliveries.add_known(run.name, found.user, found.question.scope, grant)

    # Draws.

    def begin(
        self, request: Request, question: Question, queue: WriteQueue, turn: Arrive | None = None
    ) -> Found | Drawing:
        """Return what is stored for a request of one question, or begin to draw it.

        While claims are queued, a request joins them: their transaction also finds what is stored. After
        several new draws the next one is claimed, for the same reason.

        Args:
            request: the request.
            question: its question.
            queue: the write queue of the running loop.
            turn: returns the turn of the request, if answers are handed over in order; it is called for a
                draw that is not known yet.
        """
        if self.in_memory or self.mode != "read-write" or not queue.idle:
            return self.draw(request, question, queue, turn=turn)
        run = runs.current(self.store.identity)
        if run.expects_new:
            return self.draw(request, question, queue, run=run, turn=turn)
        self.requests += 1
        draw = draw_of(question.key, request, run, shared=self.shares(question))
        found = self._find(draw, request, question, request.n, run, run)
        if found is None:
            return self._drawing(request, question, queue, draw, run, run, turn)
        self._deliver(found)
        return found

    def draw(
        self,
        request: Request,
        question: Question,
        queue: WriteQueue,
        *,
        run: runs.Occurrences | None = None,
        counter: Counter | None = None,
        turn: Arrive | None = None,
    ) -> Found | Drawing:
        """Begin to draw the samples of a request; what is not stored is generated.

        A request that is alone in its turn of the event loop is claimed at once, others together at its end.
        Where claims are made in memory only, those find what is stored.

        Args:
            request: the request.
            question: its question.
            queue: the write queue of the running loop.
            run: the run; by default the current one.
            counter: counts the occurrences of equal requests; by default the run.
            turn: see ``begin``.

        Raises:
            CacheMiss: in replay mode, when a sample is not stored.
        """
        self.requests += 1
        if self.mode == "bypass":
            return self._drawing(request, question, queue, None, None, None, turn)
        if run is None:
            run = runs.current(self.store.identity)
        if counter is None:
            counter = run
        draw = draw_of(question.key, request, counter, shared=self.shares(question))
        if self.in_memory and self.mode != "refresh":
            found = self._find(draw, request, question, request.n, counter, run)
            if found is not None:
                self._deliver(found)
                return found
        if self.mode == "replay":
            give_back(draw, counter)
            raise missed(self.store, question, draw, request.n, request, request.namespace)
        return self._drawing(request, question, queue, draw, counter, run, turn)

    def _drawing(
        self,
        request: Request,
        question: Question,
        queue: WriteQueue,
        draw: Draw | None,
        counter: Counter | None,
        run: runs.Occurrences | None,
        turn: Arrive | None,
    ) -> Found | Drawing:
        """Claim the samples of a draw, or generate those of a request that claims nothing."""
        stored = draw is not None and not self.store.read_only
        refresh, token = self.mode == "refresh", new_token()
        result: Grant | Exception | None = None
        if draw is not None and run is not None and counter is not None and stored:
            user = label(request.namespace) if draw.shared else draw.namespace
            if request.n <= MANY and queue.alone():
                result = queue.claim_now(
                    claim_of(draw, request.n, question, token, user, run, refresh=refresh)
                )
            if isinstance(result, Grant) and None not in result.samples:
                note_claim(run, draw, user, result)
                found = Found(self, run, counter, user, question, draw, result, [])
                self._deliver(self._found(found, request))
                return found
        taken = None if turn is None else turn()
        drawing = Drawing(self, queue, request, question, draw, counter, run, taken, token, stored=stored)
        if not stored:
            drawing.generate()
        elif result is None:
            drawing.claim(refresh=refresh)
        else:
            drawing.claimed(result)
        if not drawing.state.complete:
            drawing.own()
        return drawing

    def decode(self, sample: Sample) -> Any:
        """Return the value of a stored sample as the model's adapter unpacks or presents it."""
        if self.unpack is not None:
            return self.unpack(sample)
        value = self.codec.decode(sample.payload)
        return value if self.present is None else self.present(value)

    # The end.

    async def drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for calls in flight, and until everything is written."""
        for queue in self.open_queues():
            if queue.loop is loop:
                await queue.drain()
                await queue.line.drain()
            elif queue.loop.is_running() and queue.fork == forks.count:  # loops run in their own process
                there = asyncio.run_coroutine_threadsafe(queue.drain(), queue.loop)
                await asyncio.wait([asyncio.wrap_future(there)])  # it is cancelled if that loop ends
        await self.deliveries.write()


class Found(NamedTuple):
    """The samples of a draw that were stored.

    Attributes:
        cache: the cache.
        run: the run that they were delivered in.
        counter: counts the occurrences of equal requests.
        user: the label of the namespace.
        question: the question.
        draw: the draw.
        grant: the samples.
        values: the samples, decoded.
    """

    cache: Cache
    run: runs.Occurrences
    counter: Counter
    user: str
    question: Question
    draw: Draw
    grant: Grant
    values: list[Any]

    def response(self, duplicated: list[bool] | None) -> Response:
        """Return the response, with these flags ``duplicated``."""
        indices = self.grant.indices
        return respond(self.values, [True] * len(indices), duplicated, tuple(indices), self.question.key)

    @property
    def place(self) -> Place:
        """The place of the response in the schedule (C11)."""
        grant = self.grant
        latest = max([place_of(sample.header) for sample in grant.samples if sample is not None])
        return latest if grant.place is None else max(latest, grant.place)

    def note_place(self, place: Place, then: Callable[[Any], None]) -> None:
        """Record another place, then call ``then`` with None or an error."""
        queue = self.cache.queue(loops.running())
        note_place(queue, self.draw, len(self.grant.indices), place, then)

    def take_back(self) -> None:
        """Take the samples back, as they did not reach their caller: a retry is then the same draw."""
        self.cache.hits -= len(self.grant.indices)
        delivery = known(self.run.name, self.user, self.question.scope, self.grant, "taken back")
        self.cache.deliveries.add(delivery)
        self.give_back()

    def give_back(self) -> None:
        """Give back the number of the draw, and what was claimed in memory."""
        give_back(self.draw, self.counter)
        if self.cache.in_memory and not self.draw.shared:
            with self.run.replaying:
                taken = self.run.taken(self.user, self.question.key)
                for index in self.grant.indices:
                    taken.remove(index)


async def in_turn(turn: Turn, begun: Found | Drawing, duplicated: list[bool] | None) -> Response:
    """Return the response of a draw, or raise its error, when its turn has come (C11).

    Args:
        turn: the turn of its request.
        begun: the draw.
        duplicated: the flags of the response.
    """
    try:
        if isinstance(begun, Drawing):
            response = await begun.response(duplicated)
        else:
            response = begun.response(duplicated)
    except Exception:
        await turn.come(None)
        raise
    except BaseException:
        turn.leave()
        raise
    try:
        await turn.come(begun)
    except BaseException:
        begun.take_back()
        raise
    return response


def responses_of(found: Sequence[Found], duplicated: Sequence[list[bool]]) -> list[Response]:
    """Return the response of each draw, with these flags ``duplicated``."""
    return [one.response(flags) for one, flags in zip(found, duplicated, strict=True)]
