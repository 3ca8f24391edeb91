"""A model that follows a test's script and records its calls.

It answers from a script, or with samples that are all different. It can hold calls at a gate until the test
releases them in any order, and it fails on demand. It uses no clock: a test waits for calls to begin
(``begun``) and decides when they end (``release``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

from cachepipe.typedefs import Batch, Request, Response

__all__ = ["ScriptedCall", "ScriptedError", "ScriptedModel"]

_AS_SCRIPTED: Final = object()


class ScriptedError(Exception):
    """A failure that a test has asked for.

    Attributes:
        status_code: the status code, as on the error of an HTTP client, or None.
    """

    def __init__(
        self, message: str = "the test ordered this failure", *, status_code: int | None = None
    ) -> None:
        super().__init__(message)
        self.status_code = status_code


class ScriptedCall:
    """One request that reached the model: its question, its times and its outcome.

    Attributes:
        request: the request as it reached the model.
        started: the place of its beginning among all beginnings and ends of calls.
        finished: the place of its end among them; None while it is in flight.
        batch: the number of its batch, or None.
        samples: the samples that it returned; empty until then.
        error: the exception that it raised, such as a cancellation; None if it returned.
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
        """The number of samples that it asked for."""
        return self.request.n

    @property
    def step(self) -> Any:
        """Its step of the script (see ``ScriptedModel``); ``release`` may replace it."""
        return self._step

    @property
    def state(self) -> Literal["held", "released", "returned", "failed", "cancelled"]:
        """Its state."""
        if self.finished is None:
            return "released" if self._gate.is_set() else "held"
        if self.error is None:
            return "returned"
        return "cancelled" if isinstance(self.error, asyncio.CancelledError) else "failed"

    def release(self, step: Any = _AS_SCRIPTED) -> None:
        """Let the call continue, with the script's step or another one. A second release does nothing."""
        if step is not _AS_SCRIPTED and not self._gate.is_set():
            self._step = step
        self._gate.set()

    async def passed(self) -> None:
        """Wait until the call is released."""
        await self._gate.wait()

    async def over(self) -> None:
        """Wait until the call has ended."""
        await self._end.wait()

    def end(self, finished: int) -> None:
        """Note that the call has ended; the model calls this."""
        self.finished = finished
        self._end.set()

    def fail(self, error: BaseException | None = None) -> None:
        """Let the call continue, and fail."""
        self.release(ScriptedError() if error is None else error)


class ScriptedModel:
    """A model for tests of code that calls models: it follows a script, records its calls and can hold them.

    The result of a call is a *step*: None is ``request.n`` samples, each different from all others; a number
    is that many samples, which may be fewer or more than were asked for; a list is the samples; an exception
    is raised; any other value is returned unchanged, well-formed or not. The step is chosen when the call
    begins, so the order in which calls are released does not change their results.

    Args:
        script: the steps of the calls, in the order in which these begin; after the last one, each step is
            None.
            Or a function that returns a step for a request.
        fail: a function that returns the exception with which a request fails, or None. It is asked before
            the script, and a request that fails uses no step.
        max_n: the attribute of that name: the largest number of samples of one call. A call for more
            fails with a ``ScriptedError`` of status 400.
        hold: whether calls wait at a gate until they are released. You may change it at any time.
        turns: the number of turns of the event loop that a call takes after its release.
        whole: whether a batch fails as a whole when one of its requests does; otherwise the
            exception is put in the place of the request.
        cache_scope: identifies the model in cache keys.
        name: the beginning of its samples, which tells the samples of several models apart.

    Attributes:
        calls: every request that reached the model, in order of beginning.
        batches: the number of batches that did.
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

    # What has happened.

    @property
    def held(self) -> list[ScriptedCall]:
        """The calls at the gate, in order of beginning."""
        return [call for call in self.calls if call.state == "held"]

    @property
    def ended(self) -> list[ScriptedCall]:
        """The calls that have ended, in the order of their ends."""
        over = [call for call in self.calls if call.finished is not None]
        return sorted(over, key=lambda call: call.finished or 0)

    @property
    def asked(self) -> list[int]:
        """The number of samples that each call asked for."""
        return [call.n for call in self.calls]

    @property
    def generated(self) -> int:
        """The total number of samples that were returned."""
        return sum(len(call.samples) for call in self.calls)

    async def begun(self, count: int) -> list[ScriptedCall]:
        """Wait until at least ``count`` calls have begun since the model was made; return all calls."""
        while len(self.calls) < count:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self.calls

    # What is to happen.

    def release(self) -> None:
        """Release all calls at the gate; calls that begin later are held as before."""
        for call in self.held:
            call.release()

    def open(self) -> None:
        """Release all calls at the gate, and hold no more of them."""
        self.hold = False
        self.release()

    # The two protocols of a model.

    async def request(self, request: Request) -> Any:
        """Return the result of the script's step: by default ``request.n`` samples that are all different."""
        call = self._begin(request, None)
        answer = await self._serve(call)
        _note(call, answer)
        return answer

    async def batch_request(self, batch: Batch) -> list[Any]:
        """Return the result of a step for each request, with an exception in the place of one that failed."""
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
        """The same model with the method ``request`` only."""
        return _OnlyRequest(self)

    @property
    def only_batches(self) -> _OnlyBatches:
        """The same model with the method ``batch_request`` only."""
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
        """Return the samples that a step stands for, or the step itself if it is another value."""
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
    """Record that a batch has failed as a whole: none of its calls has returned anything."""
    for call in calls:
        call.error = call.error or error


def _note(call: ScriptedCall, answer: Any) -> None:
    """Record the samples of an answer before it is returned."""
    if isinstance(answer, Response) and not isinstance(answer.data, str | bytes):
        call.samples = list(answer.data)


class _View:
    """A scripted model with only one of its two methods."""

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
