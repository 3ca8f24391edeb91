"""A draw on its way: performs the effects that `cachepipe.contract.lifecycle` decides on.

Everything that concerns a draw happens on the loop of its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from cachepipe import cells, runs
from cachepipe.cache import others
from cachepipe.cache.calls import Call, Caller, Demand
from cachepipe.cache.turns import Turn
from cachepipe.cache.write_queue import WriteQueue, unheard
from cachepipe.contract import lifecycle
from cachepipe.contract.draws import Claims, Counter, Draw, give_back, label
from cachepipe.contract.keys import Question
from cachepipe.contract.lifecycle import DrawState, Effects
from cachepipe.contract.schedule import Place
from cachepipe.errors import (
    FreshIds,
    NotStored,
    RepeatedCell,
    SharedDraw,
    SharedReplicates,
    StoreUnreachable,
    warn,
)
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Grant,
    NotePlace,
    ReleaseHold,
    ReleaseLease,
    Sample,
    new_meta,
    place_of,
)
from cachepipe.stores.sums import KEPT, Delivery, is_stored
from cachepipe.typedefs import Request, Response

if TYPE_CHECKING:
    from cachepipe.cache.cache import Cache, Found

_tokens = itertools.count(1)


class Drawing:
    """One draw: its state, and the samples that have come.

    Args:
        cache: the cache that it draws from.
        queue: the write queue of its loop.
        request: the request; it is copied when the draw has to wait.
        question: its question.
        draw: its identity; None if no occurrence is counted.
        counter: what counted its occurrence.
        run: the run that it belongs to.
        turn: the turn of its request, if answers are handed over in order.
        token: identifies its claims.
        stored: whether the ledger records it.
    """

    __slots__ = (
        "cache",
        "counter",
        "delivered",
        "demands",
        "draw",
        "future",
        "headers",
        "lacks",
        "noted",
        "question",
        "queue",
        "request",
        "run",
        "state",
        "token",
        "turn",
        "user",
        "values",
        "waits_since",
    )

    def __init__(
        self,
        cache: Cache,
        queue: WriteQueue,
        request: Request,
        question: Question,
        draw: Draw | None,
        counter: Counter | None,
        run: runs.Occurrences | None,
        turn: Turn | None,
        token: str,
        *,
        stored: bool,
    ) -> None:
        self.cache = cache
        self.queue = queue
        self.request = request
        self.question = question
        self.draw = draw
        self.counter = counter
        self.run = run
        self.turn = turn
        self.noted: Place | None = None  # the place that the draw has noted
        self.user = label(request.namespace)
        self.token = token
        self.state = DrawState(request.n, stored=stored)
        self.values: list[Any] = [None] * request.n
        self.headers = [b""] * request.n  # by position: what is stored beside the sample
        self.demands: tuple[DrawDemand, ...] = ()
        self.delivered = False
        self.lacks = False  # whether the claim under way is known to find no sample
        self.waits_since: float | None = None  # since when it waits for another process, on its loop's clock
        self.future: asyncio.Future[None] = queue.loop.create_future()

    # What the caller does.

    def generate(self) -> None:
        """Generate all samples, for this caller alone."""
        self.perform(self.state.unsaved())

    def claim(self, *, refresh: bool = False) -> None:
        """Claim the samples at the end of the turn."""
        draw, run = self.draw, self.run
        if draw is None or run is None:
            raise RuntimeError("a draw without an identity cannot be claimed")
        claim = claim_of(draw, self.state.n, self.question, self.token, self.user, run, refresh=refresh)
        lacking: Callable[[], None] | None = None
        if self.turn is not None:
            self.turn.line.claiming()
            lacking = self._lacks
        self.queue.put(claim, self._granted, lacking=lacking)

    def claimed(self, result: Grant | Exception) -> None:
        """Learn the result of a claim that was made at once."""
        if self.turn is not None:
            self.turn.line.claiming()
        self.queue.tell_now(self._granted, result)

    def own(self) -> None:
        """Copy the request, as the caller may change its own object from now on."""
        self.request = self.request.asking(self.state.n)

    async def response(self, duplicated: list[bool] | None) -> Response:
        """Return the response; a cancelled caller gives back what it had claimed (C8)."""
        try:
            await self.future
        except BaseException:
            self.leave()
            raise
        self.delivered = True
        state, cache = self.state, self.cache
        cache.hits += state.n - state.generated
        cache.misses += state.generated
        if self.run is not None:
            cache.deliveries.add(self._delivery(self.run))
        indices = tuple(state.indices) if state.indices else None
        return respond(self.values, state.cached, duplicated, indices, self.question.key)

    def leave(self) -> None:
        """Give the draw up, as its caller does not wait any more."""
        self.perform(self.state.left())
        if not self.future.cancel() and not self.future.cancelled():
            self.future.exception()  # nobody is told

    def take_back(self) -> None:
        """Take the response back if it was made, as it did not reach its caller; else leave."""
        state, cache = self.state, self.cache
        if not self.delivered:
            self.leave()
            return
        cache.hits -= state.n - state.generated
        cache.misses -= state.generated
        cache.unreported += state.generated
        if self.run is not None:
            cache.deliveries.add(self._delivery(self.run)._replace(what="taken back"))
        self._give_back()

    @property
    def place(self) -> Place:
        """The place of the response in the schedule (C11)."""
        latest = max(map(place_of, self.headers))
        return latest if self.noted is None else max(latest, self.noted)

    def note_place(self, place: Place, then: Callable[[Any], None]) -> None:
        """Record another place, then call ``then`` with None or an error."""
        note_place(self.queue, self.draw, self.state.n, place, then)

    def _delivery(self, run: runs.Occurrences) -> Delivery:
        cached = tuple(self.state.cached) if self.state.generated else None
        return Delivery(run.name, self.user, self.question.scope, tuple(self.headers), cached)

    # What the store, the model and other draws report.

    def _lacks(self) -> None:
        """Learn that the store has no sample for the claim that is under way."""
        if self.turn is not None:
            self.lacks = True
            self.turn.line.lacking()

    def _granted(self, grant: Grant | Exception) -> None:
        if self.turn is not None:
            self.turn.line.claimed(lacking=self.lacks)
            self.lacks = False
        if isinstance(grant, Exception):
            self.perform(self.state.broken(grant))
            return
        effects = self.state.granted(
            grant.indices, grant.samples, grant.mine, grant.held, joined=grant.joined
        )
        self.noted = grant.place
        try:
            if not self.state.ended:
                self._note(grant)
            self.perform(effects, grant.samples)
        except Exception as error:  # noqa: BLE001 - such as a sample that cannot be read
            self.perform(self.state.spoiled(grant.mine, error))

    def _note(self, grant: Grant) -> None:
        """Note what was claimed; give the warnings that each run gives once."""
        draw, run = self.draw, self.run
        if draw is None or run is None:
            return
        note_claim(run, draw, self.user, grant)
        if grant.shared:
            warn_shared(self.question, self.request, run)
        pays_again = grant.mine and draw.occurrence and self.cache.mode == "read-write"
        if pays_again and cells.runs_again(run.inputs) and run.first_time("repeated cell"):
            warn(
                "this cell was run before, and asks the model again for what it asked then: a question "
                "that is repeated in a run gets fresh samples, and a run lasts as long as the kernel. To "
                "replay cells that are run again, write %load_ext cachepipe in the first cell",
                RepeatedCell,
            )
        count_draw(run, draw, grant)

    def brought(self, index: int, value: Any, call: Call) -> None:
        """Store a sample that a call has returned, then take it."""
        if not self.state.stored:
            self._take(index, value, b"")
            return
        try:
            commit = self.commit_of(index, value, call)
        except Exception as error:  # noqa: BLE001 - whatever error the encoder raises, the value is paid for
            self._unstored(index, value, b"", error)
            return
        call.owed += 1
        self.queue.put(commit, self._committed, index, value, call, commit.meta)

    def commit_of(self, index: int | None, value: Any, call: Call) -> Commit:
        """Return the operation that stores a value, with the bytes and notes of the model's adapter."""
        cache, key = self.cache, self.question.key
        run = "" if self.run is None else self.run.name
        meta = new_meta(call.id, call.seconds, run, self.user)
        if call.payment is not None:
            meta["reserved"] = [*call.payment.calls]
        if cache.pack is None:
            return Commit(key, index, cache.codec.encode(value), meta)
        payload, noted = cache.pack(value)
        return Commit(key, index, payload, {**meta, **noted})

    def _committed(
        self, index: int, value: Any, call: Call, meta: Mapping[str, Any], result: Committed | Exception
    ) -> None:
        call.stored()
        if isinstance(result, Exception):
            header = orjson.dumps(meta)
            if isinstance(result, StoreUnreachable) and result.kept:
                header = KEPT + header[1:]
            self._unstored(index, value, header, result)
            return
        self.perform(self.state.committed(index, kept=result.kept), [result.sample])
        if result.kept:
            self._take(index, value, result.sample.header)

    def _unstored(self, index: int, value: Any, header: bytes, error: Exception) -> None:
        """Take a sample that could not be stored. A rerun generates it again."""
        self.perform(self.state.unstored(index))
        try:
            warn(f"a sample of key {self.question.key} was not cached: {error}", NotStored)
        except NotStored as refused:  # the user has made the warning an error
            self._lose([header])
            self.perform(self.state.broken(refused))
            return
        self._take(index, value, header)

    def _take(self, index: int, value: Any, header: bytes) -> None:
        """Put a sample that was generated for this draw into its place."""
        position = self.state.takes(index)
        if position is None:  # the draw has ended, or was granted other indices meanwhile
            self._waste([header])
            return
        present = self.cache.present
        try:
            self.values[position] = value if present is None else present(value)
        except Exception as error:  # noqa: BLE001 - the adapter's own; the sample is stored
            self._waste([header])
            self.perform(self.state.broken(error))
            return
        self.headers[position] = header
        self.perform(self.state.filled(index))

    def told(self, index: int, sample: Sample | None, error: BaseException | None, last: bool) -> None:
        """Learn what became of an awaited sample. Thread-safe."""
        self.queue.soon(self._arrived, index, sample, error, last)

    def _arrived(self, index: int, sample: Sample | None, error: BaseException | None, last: bool) -> None:
        if sample is None:
            self.perform(self.state.absent(index, error, last=last))
            return
        position = self.state.takes(index)
        if position is None:
            return
        try:
            self.values[position] = self.cache.decode(sample)
        except Exception as unreadable:  # noqa: BLE001 - such as the error for an unknown class
            self.perform(self.state.broken(unreadable))
            return
        self.headers[position] = sample.header
        self.perform(self.state.arrived(index))

    def fail(self, indices: Sequence[int], error: BaseException | None) -> None:
        """Learn that samples will not come: their call failed, or was stopped (None)."""
        self.perform(self.state.failed(indices, error))

    def unheard(self) -> None:
        """Claim once more, as those who should have generated the awaited samples do not."""
        self.perform(self.state.unheard())

    # Effects.

    def perform(self, effects: Effects, samples: Sequence[Sample | None] = ()) -> None:
        """Perform effects in order; ``samples`` are those of the event."""
        for effect in effects:
            self._performs[type(effect)](self, effect, samples)

    def _fill(self, effect: lifecycle.Fill, samples: Sequence[Sample | None]) -> None:
        for position in effect.positions:
            sample = samples[position]
            if sample is not None:
                self.values[position] = self.cache.decode(sample)
                self.headers[position] = sample.header

    def _await(self, effect: lifecycle.Await, _samples: object) -> None:
        key, registry = self.question.key, self.cache.in_flight
        for index in effect.indices:
            registry.wait(key, index, self)
            if registry.maker(key, index) is not self.queue:  # another loop may end with its call
                others.watch(self)

    def _stop_waiting(self, effect: lifecycle.StopWaiting, _samples: object) -> None:
        self.queue.strangers.pop(self, None)
        self.cache.in_flight.unwait(self.question.key, effect.indices, self)

    def _generate(self, effect: lifecycle.Generate, _samples: object) -> None:
        demand = DrawDemand(self, effect.indices)
        self.demands += (demand,)
        if self.state.stored:
            self.cache.in_flight.announce(self.queue, self.question.key, effect.indices)
        window = 0.0 if demand.group is None else self.cache.window
        if self.turn is None:
            self.queue.want(demand, window=window)
        else:
            self.turn.want(self.queue, demand, window)

    def _free_leases(self, effect: lifecycle.FreeLeases, _samples: object) -> None:
        if not self.state.stored:
            return
        key, registry, (indices, error, last) = self.question.key, self.cache.in_flight, effect

        def freed(_result: Any) -> None:
            for index in indices:
                registry.settle(key, index, None, error, last=last)

        self.queue.put(ReleaseLease(key, indices), freed)

    def _wake(self, effect: lifecycle.Wake, samples: Sequence[Sample | None]) -> None:
        sample = samples[0] if effect.stored else None
        self.cache.in_flight.settle(self.question.key, effect.place, sample)

    def _claim(self, _effect: object, _samples: object) -> None:
        self.claim()

    def _count_waste(self, effect: lifecycle.Waste, _samples: object) -> None:
        self.cache.unreported += effect.others
        if effect.positions:
            self._waste([self.headers[position] for position in effect.positions])

    def _give_back(self, _effect: object = None, _samples: object = None) -> None:
        if self.draw is not None and self.counter is not None:
            give_back(self.draw, self.counter)

    def _release(self, effect: lifecycle.Release, _samples: object) -> None:
        state, draw = self.state, self.draw
        if effect.complete or state.ended:
            self.queue.strangers.pop(self, None)
        then: Callable[[Any], None] = unheard if effect.error is None else partial(self._tell, effect.error)
        if state.held and draw is not None:
            self.queue.put(ReleaseHold(draw, self.token, state.held, effect.complete, state.n), then)
        else:
            then(None)

    def _tell(self, error: BaseException, _result: Any) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def _withdraw(self, _effect: object, _samples: object) -> None:
        for demand in self.demands:
            self.queue.withdraw(demand)

    def _cancel(self, _effect: object, _samples: object) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there any more
            self.future.cancel()

    def _deliver(self, _effect: object, _samples: object) -> None:
        self.queue.strangers.pop(self, None)
        if not self.future.done():
            self.future.set_result(None)

    def _waste(self, headers: Sequence[bytes]) -> None:
        self.cache.unreported += len(headers)
        self._lose(headers)

    def _lose(self, headers: Iterable[bytes]) -> None:
        """Record samples that are neither stored nor delivered; the store counts the stored ones."""
        lost = tuple([header for header in headers if not is_stored(header)])
        if lost and self.run is not None:
            self.cache.deliveries.add(
                Delivery(self.run.name, self.user, self.question.scope, lost, what="lost")
            )

    _performs: ClassVar[Mapping[type, Callable[[Any, Any, Any], None]]] = {
        lifecycle.Fill: _fill,
        lifecycle.Await: _await,
        lifecycle.StopWaiting: _stop_waiting,
        lifecycle.Generate: _generate,
        lifecycle.FreeLeases: _free_leases,
        lifecycle.Wake: _wake,
        lifecycle.ClaimAgain: _claim,
        lifecycle.Waste: _count_waste,
        lifecycle.GiveBack: _give_back,
        lifecycle.Release: _release,
        lifecycle.Withdraw: _withdraw,
        lifecycle.Cancel: _cancel,
        lifecycle.Deliver: _deliver,
    }


class DrawDemand(Demand):
    """The samples that a draw must generate: those at these indices, in this order."""

    __slots__ = ("drawing",)

    def __init__(self, drawing: Drawing, indices: Sequence[int]) -> None:
        mergeable = drawing.question.mergeable and drawing.draw is not None
        super().__init__(drawing.question.key if mergeable else None, indices)
        self.drawing = drawing

    @property
    def request(self) -> Request:
        """The request, with the ``n`` that its caller wrote."""
        return self.drawing.request

    @property
    def wanted(self) -> bool:
        """Whether anyone waits for it."""
        drawing = self.drawing
        return not drawing.state.ended or drawing.cache.in_flight.anyone_waits(
            drawing.question.key, self.slots
        )

    def deliver(self, slots: Sequence[int], values: list[Any], call: Call) -> None:
        """Take samples that a call has returned."""
        for index, value in zip(slots, values, strict=True):
            self.drawing.brought(index, value, call)

    def fail(self, slots: Sequence[int], error: BaseException | None) -> None:
        """Learn that the call for samples failed; the error is None if the call was withdrawn."""
        self.drawing.fail(slots, error)


def new_token() -> str:
    """Return a token that identifies the claims of one draw in this process."""
    return f"{next(_tokens):x}"


def claim_of(
    draw: Draw,
    n: int,
    question: Question,
    token: str,
    user: str,
    run: runs.Occurrences,
    *,
    refresh: bool,
) -> Claim:
    """Return the claim of a draw; ``user`` is the label of the namespace that makes it."""
    claim = Claim(draw, n, question, token, refresh, user if draw.shared else None)
    if run.replays:
        claim.avoid = run.taken(draw.namespace, question.key)
    return claim


def note_claim(run: runs.Occurrences, draw: Draw, user: str, grant: Grant) -> None:
    """Note in a run what a claim was granted, and the use of a shared draw."""
    run.claimed(new=grant.added > 0)
    if draw.shared:
        run.used.add((draw.key, user))


def note_place(
    queue: WriteQueue, draw: Draw | None, n: int, place: Place, then: Callable[[Any], None]
) -> None:
    """Record the place of a draw of n samples in the ledger, then call ``then`` with None or an error.

    The draw that all namespaces share has no place of its own.
    """
    if draw is None or draw.shared or queue.store.read_only:
        then(None)
    else:
        queue.put(NotePlace(draw, n, place), then)


def start(caller: Caller, demands: Sequence[Demand]) -> None:
    """Begin the calls for demands. A demand that nobody waits for any more fails instead."""
    wanted = []
    for demand in demands:
        if demand.wanted:
            wanted.append(demand)
        else:
            demand.fail(demand.slots, None)
    try:
        caller.start(wanted)
    except Exception as error:  # noqa: BLE001 - such as a model whose limit is not a number
        for demand in wanted:
            demand.fail(demand.slots, error)


def keep_extra(demand: Demand, values: list[Any], call: Call) -> None:
    """Store the samples that a model returned beyond the number asked for; later draws get them."""
    if not isinstance(demand, DrawDemand):
        return
    drawing = demand.drawing
    drawing.cache.unreported += len(values)
    if not drawing.state.stored:
        return
    for value in values:
        try:
            commit = drawing.commit_of(None, value, call)
        except Exception:  # noqa: BLE001, S112 - nobody asked for it
            continue
        call.owed += 1
        drawing.queue.put(commit, call.stored)


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


def warn_shared(question: Question, claimant: Claims, run: runs.Occurrences) -> None:
    """Warn, once in a run, that another live process makes the same draw (C1)."""
    if run.first_time("shared draw"):
        warn(
            f"another live process made the same draw (key {question.key}, namespace "
            f"{claimant.namespace!r}, request id {claimant.request_id!r}) and gets the same samples; "
            "workers that need independent samples must use different request ids or replicates",
            SharedDraw,
        )


def count_draw(run: runs.Occurrences, draw: Draw, grant: Grant) -> None:
    """Count a draw, and give the warnings about the draws of a run, each once in a run."""
    if run.count(draw, fresh_id=grant.fresh_id):
        warn(
            "most requests of this run have new request ids on questions that their namespace has asked "
            "before, so they get fresh samples and a rerun buys everything again. Ids must be the same "
            "in each run: not made from hash(str), uuids or times",
            FreshIds,
        )
    overlap = run.overlap.add(draw, grant.indices)
    if overlap is not None and run.first_time("shared replicates"):
        some, last = ", ".join(map(repr, overlap.namespaces[:-1])), overlap.namespaces[-1]
        warn(
            f"the namespaces {some} and {last!r} have drawn the same {overlap.samples} samples so far: "
            "namespaces share samples, so as repetitions of an experiment they show a standard error of 0. "
            "For independent repetitions write one namespace, and replicate=0, replicate=1 … "
            "If these namespaces are meant to share, write "
            "warnings.filterwarnings('ignore', category=cachepipe.SharedReplicates)",
            SharedReplicates,
        )


async def outcomes(
    begun: Sequence[Found | Drawing], duplicated: Sequence[list[bool] | None]
) -> list[Response | BaseException]:
    """Return the response or the error of each draw, in order, after all of them have ended."""
    return [await _outcome(*one) for one in zip(begun, duplicated, strict=True)]


async def _outcome(begun: Found | Drawing, duplicated: list[bool] | None) -> Response | BaseException:
    if not isinstance(begun, Drawing):
        return begun.response(duplicated)
    try:
        return await begun.response(duplicated)
    except asyncio.CancelledError as stopped:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return stopped  # its call was stopped from outside
    except Exception as error:  # noqa: BLE001 - it is this request's own
        return error
