"""A model that does what a test tells it to, and remembers what it was asked.

It answers from a script or with samples that are all different, holds calls at a gate until the test
lets them go in an order of its choice, and fails when it is told to. No clock is involved: a test
waits for calls to begin (``begun``) and decides when they end (``release``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

from cachepipe.typedefs import Batch, Request, Response

__all__ = ["ScriptedCall", "ScriptedError", "ScriptedModel"]

_AS_SCRIPTED: Final = object()


class ScriptedError(Exception):
    """A failure that a test has ordered.

    Attributes:
        status_code: what an HTTP client's error would carry, or None.
    """

    def __init__(
        self, message: str = "the test ordered this failure", *, status_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code


class ScriptedCall:
    """One request that the model was asked: what for, when, and what became of it.

    Attributes:
        request: the request as it reached the model.
        started: when it began, as its place among all beginnings and ends of calls.
        finished: when it ended, likewise; None while it is in flight.
        batch: the number of the batch it came in, or None.
        samples: what it returned; empty until then.
        error: what it raised, a cancellation included; None when it returned.
    """

    def __init__(self, request: Request, started: int, batch: int | None, step: Any) -> None:
        self.request = request
        self.started = started
        self.finished: int | None = None
        self.batch = batch
        self.samples: list[Any] = []
        self.error: BaseException | None = None
        self._step = step
        self._gate = asyncio.Event()
        self._end = asyncio.Event()

    def __repr__(self) -> str:
        return f"<ScriptedCall {self.request.prompt!r} n={self.n} {self.state}>"

    @property
    def n(self) -> int:
        """How many samples it asked for."""
        return self.request.n

    @property
    def step(self) -> Any:
        """What the script has in mind for it (see ``ScriptedModel``); ``release`` may say otherwise."""
        return self._step

    @property
    def state(self) -> Literal["held", "released", "returned", "failed", "cancelled"]:
        """What has become of it."""
        if self.finished is None:
            return "released" if self._gate.is_set() else "held"
        if self.error is None:
            return "returned"
        return "cancelled" if isinstance(self.error, asyncio.CancelledError) else "failed"

    def release(self, step: Any = _AS_SCRIPTED) -> None:
        """Let the call go on: as the script has it, or with another step. Released twice is no harm."""
        if step is not _AS_SCRIPTED and not self._gate.is_set():
            self._step = step
        self._gate.set()

    async def passed(self) -> None:
        """Return when the call was released."""
        await self._gate.wait()

    async def over(self) -> None:
        """Return when the call has ended."""
        await self._end.wait()

    def end(self, finished: int) -> None:
        """Note that the call has ended; the model does that."""
        self.finished = finished
        self._end.set()

    def fail(self, error: BaseException | None = None) -> None:
        """Let the call go on, and fail."""
        self.release(ScriptedError() if error is None else error)


class ScriptedModel:
    """A model for tests of code that calls models: scripted, recorded, and held where you want it.

    What a call brings is a *step*: None is ``request.n`` samples, each different from all others; a
    number is that many of them, fewer or more than were asked; a list is the samples; an exception is
    raised; anything else is returned as it is, well-formed or not. The step is chosen when the call
    begins, so the order in which calls are released does not change what they bring.

    Args:
        script: steps for the calls in order of their beginning, after whose end each step is None; or
            a function from a request to a step.
        fail: a function from a request to the exception that it fails with, or None. It comes before
            the script and takes no step from it.
        max_n: the attribute of that name: the most samples that a call may ask for. A call for more
            fails with a ``ScriptedError`` of status 400.
        hold: whether calls wait at a gate until they are released. May be changed at any time.
        turns: how many turns of the event loop a call takes after it was released.
        whole: whether a batch fails as a whole when one of its requests does; otherwise the
            exception stands in the request's place.
        cache_scope: whose answers these are, as in the sampling contract.
        name: what its samples begin with, to tell those of several models apart.

    Attributes:
        calls: every request that reached the model, in order of beginning.
        batches: how many batches did.
    """

    def __init__(
        self,
        script: Callable[[Request], Any] | Iterable[Any] | None = None,
        *,
        fail: Callable[[Request], BaseException | None] | None = None,
        max_n: int | None = None,
        hold: bool = False,
        turns: int = 0,
        whole: bool = False,
        cache_scope: str | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.calls: list[ScriptedCall] = []
        self.batches = 0
        self.fail = fail
        self.max_n = max_n
        self.hold = hold
        self.turns = turns
        self.whole = whole
        self.cache_scope = cache_scope
        self._function = script if callable(script) else None
        self._steps: Iterator[Any] = iter(()) if script is None or callable(script) else iter(script)
        self._serial = 0
        self._clock = 0
        self._waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<ScriptedModel {len(self.calls)} calls, {len(self.held)} held>"

    # What happened.

    @property
    def held(self) -> list[ScriptedCall]:
        """The calls at the gate, in order of beginning."""
        return [call for call in self.calls if call.state == "held"]

    @property
    def ended(self) -> list[ScriptedCall]:
        """The calls that have ended, in order of their ends."""
        over = [call for call in self.calls if call.finished is not None]
        return sorted(over, key=lambda call: call.finished or 0)

    @property
    def asked(self) -> list[int]:
        """How many samples each call asked for."""
        return [call.n for call in self.calls]

    @property
    def generated(self) -> int:
        """How many samples were returned in all."""
        return sum(len(call.samples) for call in self.calls)

    async def begun(self, count: int) -> list[ScriptedCall]:
        """Return the calls as soon as at least ``count`` have begun since the model was made."""
        while len(self.calls) < count:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self.calls

    # What shall happen.

    def release(self) -> None:
        """Let all calls at the gate go; calls that begin later are held as before."""
        for call in self.held:
            call.release()

    def open(self) -> None:
        """Let all calls at the gate go, and hold no more of them."""
        self.hold = False
        self.release()

    # The two protocols of a model.

    async def request(self, request: Request) -> Any:
        """Return what the script says: ``request.n`` samples that are all different unless told otherwise."""
        call = self._begin(request, None)
        answer = await self._serve(call)
        _note(call, answer)
        return answer

    async def batch_request(self, batch: Batch) -> list[Any]:
        """Return what the script says for each request; a failed one's exception stands in its place."""
        self.batches += 1
        calls = [self._begin(request, self.batches) for request in batch.requests]
        try:
            answers = await asyncio.gather(*map(self._serve, calls), return_exceptions=True)
        except BaseException as error:
            _withhold(calls, error)
            raise
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if self.whole and failures:
            _withhold(calls, failures[0])
            raise failures[0]
        for call, answer in zip(calls, answers, strict=True):
            _note(call, answer)
        return answers

    @property
    def only_request(self) -> _OnlyRequest:
        """The same model with ``request`` alone."""
        return _OnlyRequest(self)

    @property
    def only_batches(self) -> _OnlyBatches:
        """The same model with ``batch_request`` alone."""
        return _OnlyBatches(self)

    def _begin(self, request: Request, batch: int | None) -> ScriptedCall:
        call = ScriptedCall(request, self._tick(), batch, self._step(request))
        self.calls.append(call)
        if not self.hold:
            call.release()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        return call

    def _step(self, request: Request) -> Any:
        if self.max_n and request.n > self.max_n:
            return ScriptedError(f"n is {request.n}; the most is {self.max_n}", status_code=400)
        if self.fail is not None and (error := self.fail(request)) is not None:
            return error
        step = next(self._steps, None) if self._function is None else self._function(request)
        return self._samples(step, request)

    def _samples(self, step: Any, request: Request) -> Any:
        """Return the samples that a step stands for, or the step itself when it stands for none."""
        count = request.n if step is None else step
        if isinstance(count, bool) or not isinstance(count, int):
            return step
        first, self._serial = self._serial, self._serial + count
        return [f"{self.name}{request.prompt}#{serial}" for serial in range(first, self._serial)]

    async def _serve(self, call: ScriptedCall) -> Any:
        try:
            await call.passed()
            for _ in range(self.turns):
                await asyncio.sleep(0)
            return self._answer(call)
        except BaseException as error:
            call.error = error
            raise
        finally:
            call.end(self._tick())

    def _answer(self, call: ScriptedCall) -> Any:
        step = self._samples(call.step, call.request)
        if isinstance(step, BaseException):
            raise step
        return Response(list(step)) if isinstance(step, list) else step

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _withhold(calls: Iterable[ScriptedCall], error: BaseException) -> None:
    """Record that a batch has failed as a whole: none of its calls has returned anything to anybody."""
    for call in calls:
        call.error = call.error or error


def _note(call: ScriptedCall, answer: Any) -> None:
    """Record the samples of an answer that is about to be returned."""
    if isinstance(answer, Response) and not isinstance(answer.data, str | bytes):
        call.samples = list(answer.data)


class _View:
    """A scripted model with one of its two methods."""

    def __init__(self, model: ScriptedModel) -> None:
        self._model = model

    def __repr__(self) -> str:
        return repr(self._model)

    @property
    def max_n(self) -> int | None:
        return self._model.max_n

    @property
    def cache_scope(self) -> str | None:
        return self._model.cache_scope


class _OnlyRequest(_View):
    async def request(self, request: Request) -> Any:
        return await self._model.request(request)


class _OnlyBatches(_View):
    async def batch_request(self, batch: Batch) -> list[Any]:
        return await self._model.batch_request(batch)
