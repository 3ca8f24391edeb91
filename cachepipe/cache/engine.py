"""The life of a draw: its claim, the samples that it awaits or has generated, and its end.

An engine holds the state of a cacher. Nothing that runs in the background refers to the cacher itself, so a
cacher is collected, and its run may end, when the program does not refer to it any more. Everything that
concerns a draw happens on the loop of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson

from cachepipe import runs
from cachepipe.adapting import hooks_of
from cachepipe.cache.calls import Call, Caller, Need, withdraw
from cachepipe.cache.in_flight import board_of
from cachepipe.cache.write_queue import MANY, Lane
from cachepipe.contract.draws import Counter, Draw, draw_of, give_back, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.errors import FreshIds, NotStored, SharedDraw, StoreError, WaitingForOthers, warn
from cachepipe.stage import adapter_of
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Grant,
    Process,
    ReleaseHold,
    ReleaseLease,
    Sample,
    Seize,
    Store,
    new_meta,
)
from cachepipe.stores.misses import missed
from cachepipe.stores.sums import Delivery, deliveries_of, is_stored, known
from cachepipe.typedefs import Mode, Repeat, Request, Response
from cachepipe.values import Codec

_LOOK_FIRST, _LOOK_LAST = 0.005, 0.25  # seconds between looks at samples that other processes generate
_LONG = 10.0  # seconds of waiting for another process after which a warning is given
_ORPHAN_LOOKS = 6  # looks after which a sample of this process that no loop generates is taken over


@dataclass(frozen=True)
class Stats:
    """The figures of a cacher since it was opened, in samples unless stated otherwise.

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

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


class Receipt(NamedTuple):
    """What a cacher needs in order to take a response back."""

    draw: Draw
    counter: Counter
    run: runs.Occurrences
    n: int
    generated: int
    delivery: Delivery
    remembered: tuple[int, ...] = ()


class Drawing:
    """A request on its way through the cacher."""

    __slots__ = (
        "awaited",
        "cached",
        "complete",
        "counter",
        "dead",
        "future",
        "generated",
        "headers",
        "held",
        "id",
        "indices",
        "joined",
        "lane",
        "lent",
        "making",
        "missing",
        "mode",
        "n",
        "needs",
        "question",
        "request",
        "retried",
        "run",
        "token",
        "unsaved",
        "user",
        "values",
        "waits_since",
    )

    def __init__(
        self, lane: Lane, request: Request, question: Question, mode: Mode, *, lent: bool = False
    ) -> None:
        self.lane = lane
        self.request = request if lent else request.asking(request.n)
        self.lent = lent  # whether it is the caller's own object, which the caller can still change
        self.question = question
        self.mode = mode
        self.n = request.n
        self.id: Draw = None  # type: ignore[assignment]
        self.counter: Counter = None  # type: ignore[assignment]
        self.run: runs.Occurrences = None  # type: ignore[assignment]
        self.user: str | None = None
        self.token = f"{next(_tokens):x}"
        self.indices: list[int] = []
        self.values: list[Any] = [None] * self.n
        self.cached = [True] * self.n  # by position: False once it was generated on this draw's behalf
        self.generated = 0  # how many were
        self.headers = [b""] * self.n  # by position: what is stored beside the sample
        self.missing: dict[int, int] = {}  # index -> position
        # Most draws have none of these, so the sets are made when the first index comes.
        self.awaited: set[int] = _NONE  # indices that others generate
        self.making: set[int] = _NONE  # indices that are generated on this draw's behalf
        self.needs: tuple[_Need, ...] = ()
        self.held: tuple[int, ...] = ()
        self.joined = False
        self.waits_since: float | None = (
            None  # when it began to wait for another process, on its loop's clock
        )
        self.complete = False
        self.unsaved = False
        self.dead = False
        self.retried = False
        self.future: asyncio.Future[None] = lane.loop.create_future()

    def own(self) -> Request:
        """Return a request that the caller cannot change any more."""
        if self.lent:
            self.lent = False
            self.request = self.request.asking(self.n)
        return self.request

    @property
    def namespace(self) -> str:
        """The label of the namespace that it is made for; a shared draw's own is none."""
        return self.id.namespace if self.user is None else self.user

    def response(self, duplicated: list[bool] | None) -> Response:
        """Return the response of a complete draw."""
        return respond(self.values, self.cached, duplicated, tuple(self.indices), self.question.key)


def respond(
    values: list[Any],
    cached: list[bool],
    duplicated: list[bool] | None,
    indices: tuple[int, ...] | None,
    key: str,
) -> Response:
    """Return a response with its flags, indices and key."""
    response = Response(values, cached, duplicated)
    response.indices = indices
    response.key = key
    return response


_tokens = itertools.count(1)
_NONE: Any = frozenset()


class _Need(Need):
    """The samples that a draw must generate: those at these indices, in this order."""

    __slots__ = ("draw", "engine")

    def __init__(self, engine: Engine, draw: Drawing, indices: Sequence[int]) -> None:
        super().__init__(draw.own(), draw.question.key if draw.question.mergeable else None, indices)
        self.engine = engine
        self.draw = draw

    @property
    def wanted(self) -> bool:
        return not self.draw.dead or self.engine.board.anyone_waits(self.draw.question.key, self.slots)

    def deliver(self, slots: Sequence[int], values: list[Any], call: Call) -> None:
        for index, value in zip(slots, values, strict=True):
            self.engine.store_sample(self.draw, index, value, call)

    def fail(self, slots: Sequence[int], error: BaseException | None) -> None:
        self.engine.give_up(self.draw, slots, error)


class Engine:
    """The state of a cacher, without a reference to it: see the module's docstring."""

    def __init__(self, model: Any, store: Store, codec: Codec) -> None:
        self.model = model
        self.store = store
        self.codec = codec
        self.window = 0.0
        self.board = board_of(store.identity)
        self.deliveries = deliveries_of(store)
        self.merged = self.hits = self.misses = self.unreported = self.requests = 0
        self._lock = threading.Lock()
        self._lanes: dict[asyncio.AbstractEventLoop, Lane] = {}
        self._last: Lane | None = None
        hooks = hooks_of(adapter_of(model))
        self._present, self._pack, self._unpack = hooks.present, hooks.pack, hooks.unpack
        self._calls = self._generated = 0  # of loops that are closed

    def lane(self, loop: asyncio.AbstractEventLoop) -> Lane:
        """Return an event loop's lane."""
        last = self._last
        if last is not None and last.loop is loop:
            return last
        lane = self._lanes.get(loop)
        if lane is None:
            with self._lock:
                for old in [old for old in self._lanes if old.is_closed()]:
                    past = self._lanes.pop(old).caller
                    self._calls += past.calls
                    self._generated += past.generated
                caller = Caller(loop, self.model, self.keep_extra)
                lane = self._lanes[loop] = Lane(loop, self.store, caller, self._start)
                self.board.join(lane)
        self._last = lane
        return lane

    def lanes(self) -> list[Lane]:
        """Return the lanes of the loops that have made requests."""
        with self._lock:
            return list(self._lanes.values())

    def stats(self) -> Stats:
        """Return the figures so far."""
        callers = [lane.caller for lane in self.lanes()]
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

    # From request to draw.

    def begin(
        self,
        lane: Lane,
        request: Request,
        question: Question,
        mode: Mode,
        repeat: Repeat,
        duplicated: list[bool] | None,
        receipts: list[Receipt] | None,
        *,
        counter: Counter | None = None,
        looked: bool = False,
        crowd: bool = False,
    ) -> Response | Drawing:
        """Return the response if the store has all samples of the draw, else the draw to wait for.

        Requests that come in a ``crowd`` are claimed together at the end of the turn. The ``counter``, by
        default the run, counts the occurrences of equal requests.
        """
        self.requests += 1
        run = runs.current(self.store.identity)
        if counter is None:
            counter = run
        shared = repeat == "same" or question.function
        identity = draw_of(question.key, request, counter, shared=shared)
        user = label(request.namespace) if shared else None
        try:
            if mode == "replay" or self.store.read_only:
                return self._replay(
                    lane, request, question, identity, mode, counter, run, duplicated, receipts
                )
            # In a crowd the claims of this turn, in one transaction, also find what is known already.
            if (
                mode == "read-write"
                and not looked
                and lane.idle
                and request.n <= MANY
                and (user is None or (question.key, user) in run.used)
            ):
                grant = self.store.recall(identity, request.n)
                if grant is not None:
                    run.count(identity, fresh_id=False)
                    return self._known(request, question, identity, counter, grant, run, duplicated, receipts)
        except BaseException:
            give_back(identity, counter)
            raise
        alone = (
            not crowd and request.n <= MANY and lane.alone()
        )  # what is stored is then there before this returns
        draw = Drawing(lane, request, question, mode, lent=alone)
        draw.id, draw.user, draw.counter, draw.run = identity, user, counter, run
        self._claim(draw, refresh=mode == "refresh", alone=alone)
        if not draw.complete:
            draw.own()
        return draw

    def _known(
        self,
        request: Request,
        question: Question,
        identity: Draw,
        counter: Counter,
        grant: Grant,
        run: runs.Occurrences,
        duplicated: list[bool] | None,
        receipts: list[Receipt] | None,
        remembered: tuple[int, ...] = (),
    ) -> Response:
        if grant.shared:
            self._warn_shared(question, request, run)
        values = [self.decode(sample) for sample in grant.samples if sample is not None]
        self.hits += request.n
        namespace = label(request.namespace) if identity.shared else identity.namespace
        self.deliveries.add_known(run.name, namespace, question.scope, grant)
        if receipts is not None:
            delivery = known(run.name, namespace, question.scope, grant)
            receipts.append(Receipt(identity, counter, run, request.n, 0, delivery, remembered))
        return respond(values, [True] * request.n, duplicated, tuple(grant.indices), question.key)

    def _replay(
        self,
        lane: Lane,
        request: Request,
        question: Question,
        identity: Draw,
        mode: Mode,
        counter: Counter,
        run: runs.Occurrences,
        duplicated: list[bool] | None,
        receipts: list[Receipt] | None,
    ) -> Response | Drawing:
        taken = IntervalSet() if identity.shared else run.taken(identity.namespace, question.key)
        grant = None if mode == "refresh" else self.store.replay(identity, request.n, taken)
        if grant is not None:
            remembered = tuple(grant.indices)
            return self._known(
                request, question, identity, counter, grant, run, duplicated, receipts, remembered
            )
        if mode == "replay":
            raise missed(self.store, question, identity, request.n, request, request.namespace)
        draw = Drawing(lane, request, question, mode)
        draw.id, draw.counter, draw.run, draw.unsaved = identity, counter, run, True
        draw.missing = {-1 - position: position for position in range(draw.n)}
        self._need(draw, list(draw.missing))
        return draw

    async def finish(
        self, draw: Drawing, duplicated: list[bool] | None, receipts: list[Receipt] | None
    ) -> Response:
        """Return a draw's response; a cancelled caller gives back what it had claimed (C8)."""
        try:
            await draw.future
        except BaseException:
            self.abandon(draw)
            raise
        self.hits += draw.n - draw.generated
        self.misses += draw.generated
        cached = tuple(draw.cached) if draw.generated else None
        where = draw.run.name, draw.namespace, draw.question.scope
        delivery = Delivery(*where, tuple(draw.headers), cached)
        self.deliveries.add(delivery)
        if receipts is not None:
            receipts.append(Receipt(draw.id, draw.counter, draw.run, draw.n, draw.generated, delivery))
        return draw.response(duplicated)

    def abandon(self, draw: Drawing) -> None:
        """Give back the claim of a draw that nobody waits for any more, unless the draw has failed."""
        if draw.complete or not draw.dead:
            self._abandon(draw)
        if not draw.future.cancel() and not draw.future.cancelled():
            draw.future.exception()  # nobody is told

    def take_back(self, receipt: Receipt) -> None:
        """Take back a response that did not reach its caller: a retry is then the same draw."""
        self.hits -= receipt.n - receipt.generated
        self.misses -= receipt.generated
        self.unreported += receipt.generated
        self.deliveries.add(receipt.delivery._replace(what="taken back"))
        give_back(receipt.draw, receipt.counter)
        if receipt.remembered and not receipt.draw.shared:
            taken = receipt.run.taken(receipt.draw.namespace, receipt.draw.key)
            for index in receipt.remembered:
                taken.remove(index)

    def count_unreported(self, samples: int) -> None:
        """Count samples that were generated and reached no caller."""
        self.unreported += samples

    # Claims.

    def _claim(self, draw: Drawing, *, refresh: bool = False, alone: bool = False) -> None:
        claim = Claim(draw.id, draw.n, draw.question, draw.token, refresh, draw.user)
        if draw.run.replays:
            claim.avoid = draw.run.taken(draw.id.namespace, draw.question.key)

        if alone:
            draw.lane.put_now(claim, self._on_grant, draw)
        else:
            draw.lane.put(claim, self._on_grant, draw)

    def _on_grant(self, draw: Drawing, result: Grant | Exception) -> None:
        try:
            self._granted(draw, result)
        except Exception as error:  # noqa: BLE001 - such as a warning that was made an error
            if not draw.dead:
                unmade = [] if isinstance(result, Exception) else sorted({*result.mine} - draw.making)
                if unmade:
                    draw.lane.put(ReleaseLease(draw.question.key, unmade), _unheard)
                self._fail(draw, error)

    def _granted(self, draw: Drawing, grant: Grant | Exception) -> None:
        if isinstance(grant, Exception):
            if not draw.dead:
                self._fail(draw, grant)
            return
        lane, key = draw.lane, draw.question.key
        draw.joined = draw.joined or grant.joined
        draw.held = tuple({*draw.held, *grant.held}) if draw.held else grant.held
        if draw.dead:
            self._leave(draw, _unheard)
            if grant.mine:
                lane.put(ReleaseLease(key, grant.mine), _unheard)
            return
        if draw.user is not None:
            draw.run.used.add((key, draw.user))
        self._warn(draw, grant)
        mine = grant.mine if len(grant.mine) < 2 else set(grant.mine)
        draw.indices = grant.indices
        draw.missing = {}
        for position, (index, sample) in enumerate(zip(grant.indices, grant.samples, strict=True)):
            if not draw.cached[position]:
                continue
            if sample is not None:
                draw.values[position] = self.decode(sample)
                draw.headers[position] = sample.header
                continue
            draw.missing[index] = position
            if index not in mine and index not in draw.making and index not in draw.awaited:
                if not draw.awaited:
                    draw.awaited = set()
                draw.awaited.add(index)
                self.board.wait(key, index, draw, partial(self._told, draw))
                if self.board.maker(key, index) is not lane:  # another loop may end with its call
                    self._watch(draw)
        if mine:
            self._need(draw, grant.mine)
        if not draw.missing:
            self._complete(draw)

    def _need(self, draw: Drawing, indices: list[int]) -> None:
        lane = draw.lane
        need = _Need(self, draw, indices)
        draw.needs += (need,)
        draw.making = draw.making.union(indices) if draw.making else set(indices)
        if not draw.unsaved:
            self.board.announce(lane, draw.question.key, indices)
        lane.want(need, window=self.window)

    def _start(self, lane: Lane) -> None:
        """Begin the calls for the needs that are ready."""
        wanted: list[Need] = []
        unwanted: list[Need] = []
        for need in lane.ready():
            (wanted if need.wanted else unwanted).append(need)
        for need in unwanted:
            need.fail(need.slots, None)
        try:
            lane.caller.start(wanted)
        except Exception as error:  # noqa: BLE001 - such as a limit that is none
            for need in wanted:
                need.fail(need.slots, error)

    # Samples that come, and samples that do not.

    def store_sample(self, draw: Drawing, index: int, value: Any, call: Call) -> None:
        """Commit a sample that a call has returned, then deliver it to the draws that wait for it."""
        if index < 0:  # a store that cannot be written
            self._filled(draw, index, value, b"")
            return
        try:
            commit = self._commit(draw, index, value, call)
        except Exception as error:  # noqa: BLE001 - whatever a value does to its encoder, it is paid for
            self._unstored(draw, index, value, b"", error)
            return

        draw.lane.put(commit, self._stored, draw, index, value, commit.meta)

    def _stored(
        self,
        draw: Drawing,
        index: int,
        value: Any,
        meta: Mapping[str, Any],
        result: Committed | Exception,
    ) -> None:
        draw.making -= {index}
        key = draw.question.key
        if isinstance(result, Exception):
            self._unstored(draw, index, value, orjson.dumps(meta), result)
            return
        if not result.kept:
            self.unreported += 1
            self.board.settle(key, index, None)
            if not draw.dead:
                self._claim(draw)
            return
        self.board.settle(key, index, result.sample)
        self._filled(draw, index, value, result.sample.header)

    def keep_extra(self, need: Need, values: list[Any], call: Call) -> None:
        """Store samples that nobody asked for; they serve whoever needs the next."""
        self.unreported += len(values)
        if not isinstance(need, _Need) or need.draw.unsaved:
            return
        for value in values:
            try:
                commit = self._commit(need.draw, None, value, call)
            except Exception:  # noqa: BLE001, S112 - nobody asked for it
                continue
            need.draw.lane.put(commit, _unheard)

    def _commit(self, draw: Drawing, index: int | None, value: Any, call: Call) -> Commit:
        """Return the operation that stores a value, with the bytes and notes of the model's adapter."""
        key = draw.question.key
        meta = new_meta(call.id, call.seconds, draw.run.name, draw.namespace)
        if self._pack is None:
            return Commit(key, index, self.codec.encode(value), meta)
        payload, noted = self._pack(value)
        return Commit(key, index, payload, {**meta, **noted})

    def _filled(self, draw: Drawing, index: int, value: Any, header: bytes) -> None:
        if draw.dead:
            self.unreported += 1
            self._lose(draw, [header])
            return
        position = draw.missing.pop(index, None)
        if position is None:  # the draw was laid anew meanwhile
            self.unreported += 1
            return
        try:
            draw.values[position] = value if self._present is None else self._present(value)
        except Exception as error:  # noqa: BLE001 - the adapter's own; the sample is stored
            self.unreported += 1
            self._lose(draw, [header])
            self._fail(draw, error)
            return
        draw.headers[position] = header
        draw.cached[position] = False
        draw.generated += 1
        if not draw.missing:
            self._complete(draw)

    def _lose(self, draw: Drawing, headers: Iterable[bytes]) -> None:
        """Note samples that reach nobody, as far as they are not stored: else the store accounts for them."""
        lost = tuple([header for header in headers if not is_stored(header)])
        if lost:
            where = draw.run.name, draw.namespace, draw.question.scope
            self.deliveries.add(Delivery(*where, lost, what="lost"))

    def _lose_generated(self, draw: Drawing) -> None:
        """Note what was generated for a draw that fails or was cancelled."""
        self.unreported += draw.generated
        if draw.generated:
            generated = zip(draw.headers, draw.cached, strict=True)
            self._lose(draw, [header for header, cached in generated if not cached])

    def _unstored(self, draw: Drawing, index: int, value: Any, header: bytes, error: Exception) -> None:
        """Deliver a sample that could not be stored, as it is paid for. A rerun generates it again."""
        self.give_up(draw, [index], None, keep=True)
        try:
            warn(f"a sample of key {draw.question.key} was not cached: {error}", NotStored)
        except NotStored as refused:  # its user has made it an error
            self._lose(draw, [header])
            if not draw.dead:
                self._fail(draw, refused)
            return
        self._filled(draw, index, value, header)

    def give_up(
        self, draw: Drawing, indices: Sequence[int], error: BaseException | None, *, keep: bool = False
    ) -> None:
        """Free the indices of samples that will not come. Their draw fails, and its waiters try once more."""
        key = draw.question.key
        draw.making -= {*indices}

        def done(_result: Any) -> None:
            for index in indices:
                # The waiters try once more; if that call fails, they fail with its error.
                self.board.settle(key, index, None, error, last=draw.retried)

        if indices and indices[0] >= 0:
            draw.lane.put(ReleaseLease(key, indices), done)
        if keep or draw.dead:
            return
        if error is None:
            # Its call was stopped from outside: the request is cancelled with it, and undone.
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there any more
                draw.future.cancel()
            self._abandon(draw)
        else:
            self._fail(draw, error)

    def _told(
        self, draw: Drawing, index: int, sample: Sample | None, error: BaseException | None, last: bool
    ) -> None:
        """Pass an awaited sample to the draw's own loop. Thread-safe."""
        draw.lane.soon(self.arrived, draw, index, sample, error, last)

    def arrived(
        self,
        draw: Drawing,
        index: int,
        sample: Sample | None,
        error: BaseException | None,
        last: bool,
    ) -> None:
        """Take a sample that another draw generated, or claim it once more if it did not come."""
        draw.awaited -= {index}
        if draw.dead or index not in draw.missing:
            return
        if sample is None:
            if error is not None and last and draw.retried:
                self._fail(draw, error)
                return
            draw.retried = draw.retried or error is not None
            self._claim(draw)
            return
        position = draw.missing[index]
        try:
            draw.values[position] = self.decode(sample)
        except Exception as unreadable:  # noqa: BLE001 - such as one of an unnamed class
            self._fail(draw, unreadable)
            return
        draw.headers[position] = sample.header
        del draw.missing[index]
        if not draw.missing:
            self._complete(draw)

    def decode(self, sample: Sample) -> Any:
        """Return the value of a stored sample as the model's adapter unpacks or presents it."""
        if self._unpack is not None:
            return self._unpack(sample)
        value = self.codec.decode(sample.payload)
        return value if self._present is None else self._present(value)

    # Ends.

    def _complete(self, draw: Drawing) -> None:
        draw.complete = True
        draw.lane.strangers.pop(draw, None)
        if draw.joined:
            self._leave(draw, _unheard)
        if not draw.future.done():
            draw.future.set_result(None)

    def _fail(self, draw: Drawing, error: BaseException) -> None:
        """Undo a draw, then tell its caller."""

        def told(_result: Any) -> None:
            if not draw.future.done():
                draw.future.set_exception(error)

        self._end(draw, told)

    def _abandon(self, draw: Drawing) -> None:
        """Undo a draw whose caller has gone, and stop the calls that nobody waits for any more."""
        if draw.complete:
            self._lose_generated(draw)
            self._give_back(draw)
            draw.dead = True
            return
        self._end(draw)
        for need in draw.needs:
            withdraw(need)

    def _end(self, draw: Drawing, then: Callable[[Any], None] | None = None) -> None:
        draw.dead = True
        draw.lane.strangers.pop(draw, None)
        self._lose_generated(draw)
        self.board.unwait(draw.question.key, draw.awaited, draw)
        self._give_back(draw)
        self._leave(draw, _unheard if then is None else then)

    def _leave(self, draw: Drawing, then: Callable[[Any], None]) -> None:
        if draw.held:
            draw.lane.put(ReleaseHold(draw.id, draw.token, draw.held, draw.complete, draw.n), then)
        else:
            then(None)

    def _give_back(self, draw: Drawing) -> None:
        give_back(draw.id, draw.counter)

    # Samples that other processes generate.

    def _watch(self, draw: Drawing) -> None:
        strangers = draw.lane.strangers
        if draw.waits_since is None:
            draw.waits_since = draw.lane.loop.time()
        if not strangers:
            draw.lane.loop.call_later(_LOOK_FIRST, self._look, draw.lane, _LOOK_FIRST, {})
        strangers[draw] = None

    def _look(self, lane: Lane, pause: float, orphans: dict[tuple[str, int], int]) -> None:
        """Look for the samples that this lane's draws await from other processes."""
        places = [
            (draw, index)
            for draw in lane.strangers
            for index in draw.awaited
            if self.board.maker(draw.question.key, index) is None
        ]
        seen: dict[tuple[str, int], int] = {}
        again: dict[Drawing, None] = {}
        try:
            states = self.store.status([(draw.question.key, index) for draw, index in places])
        except StoreError as error:
            for draw in list(lane.strangers):
                self._fail(draw, error)
            return
        for (draw, index), state in zip(places, states, strict=False):
            place = (draw.question.key, index)
            if state == "ours":
                # Granted to another lane of this process that has not announced it yet, or is gone.
                seen[place] = 0 if self.board.anyone_claims(place[0]) else orphans.get(place, 0) + 1
                if seen[place] >= _ORPHAN_LOOKS:
                    lane.put(ReleaseLease(place[0], [index]), _unheard)
                    again[draw] = None
            elif state != "pending" or self._outwaited(draw, index):
                again[draw] = None
        for draw in again:
            self.board.unwait(draw.question.key, draw.awaited, draw)
            draw.awaited = _NONE
            lane.strangers.pop(draw, None)
            self._claim(draw)
        if lane.strangers:
            pause = min(pause * 1.5, _LOOK_LAST)
            lane.loop.call_later(pause, self._look, lane, pause, seen)

    def _outwaited(self, draw: Drawing, index: int) -> bool:
        """Return True if this process now generates a sample that another process was generating.

        It does so after ``wait_for_others`` seconds, or after 10 s if the other process is stopped.
        """
        waited = draw.lane.loop.time() - (draw.waits_since or 0.0)
        longest = self.store.wait_for_others
        late = longest is not None and waited >= longest
        if waited >= _LONG and not late:
            process = self.store.generator(draw.question.key, index)
            if process is None:
                return False
            late = process.stopped
            self._warn_waiting(draw, process)
        if late:
            draw.lane.put(Seize(draw.question.key, [index]), _unheard)
        return late

    def _warn_waiting(self, draw: Drawing, process: Process) -> None:
        if draw.run.first_time("waits for others"):
            what = (
                "That process is stopped, so the sample is generated here"
                if process.stopped
                else "With wait_for_others=SECONDS the sample is generated here after that time"
            )
            warn(
                f"a request has waited {_LONG:.0f} s for a sample of key {draw.question.key}, which "
                f"{process.name} generates. {what}",
                WaitingForOthers,
            )

    # Warnings, each given once in a run.

    def _warn(self, draw: Drawing, grant: Grant) -> None:
        if grant.shared:
            self._warn_shared(draw.question, draw.request, draw.run)
        if draw.run.count(draw.id, fresh_id=grant.fresh_id):
            warn(
                "most requests of this run have new request ids on questions that their namespace has asked "
                "before, so they get fresh samples and a rerun buys everything again. Ids must be the same "
                "in each run: not made from hash(str), uuids or times",
                FreshIds,
            )

    def _warn_shared(self, question: Question, request: Request, run: runs.Occurrences) -> None:
        if run.first_time("shared draw"):
            warn(
                f"another live process made the same draw (key {question.key}, namespace "
                f"{request.namespace!r}, request id {request.request_id!r}) and gets the same samples; "
                "workers that need independent samples must use different request ids or replicates",
                SharedDraw,
            )


def _unheard(_result: Any) -> None:
    """Ignore a result that nobody waits for; its failure shows in the next claim."""
