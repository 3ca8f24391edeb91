"""What the stages have in common: how a model is asked, and how a stage is opened and closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cachepipe.adapting import (
    check_model,
    cut_of,
    has_batch,
    has_request,
    limit_of,
    reports_arrivals,
    scope_of,
)
from cachepipe.errors import BadAnswer, BatchMismatch, StageClosed
from cachepipe.typedefs import Arrived, Batch, Payment, Request, Response, Ticket

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Stage:
    """A model in front of a model. Subclasses define ``request`` and, if they can do better, the batch.

    If the answers of a ``batch_request`` do not arrive together, it may accept one more keyword, ``arrived``
    (see `Arrived`), and call it with each answer. It still returns all answers. A method without this
    keyword is called without it.

    Attributes:
        queue_seconds: total time that the calls of this stage have waited for its leave.
        call_seconds: total time that they have taken from then on.
        submit: see `cachepipe.typedefs.ModelHooks`; None if requests are not queued here.
    """

    queue_seconds: float = 0.0
    call_seconds: float = 0.0
    submit: Callable[[Request], Ticket] | None = None

    def __init__(self, model: Any) -> None:
        check_model(model)
        self.model = model
        self._closed = False

    @property
    def max_n(self) -> int | None:
        """The largest number of samples that the model returns in one call; None if it has no limit."""
        return limit_of(self.model)

    @property
    def cut_n(self) -> int | None:
        """The number of samples above which a request is cut into several, if it may be cut."""
        return cut_of(self.model)

    @property
    def cache_scope(self) -> str | None:
        """The scope of the model's answers (see ``cachepipe.adapting.scope_of``)."""
        return scope_of(self.model)

    async def request(self, request: Request) -> Response:
        """Return a response with ``request.n`` samples."""
        raise NotImplementedError

    async def batch_request(self, batch: Batch, *, return_exceptions: bool = False) -> list[Response]:
        """Return one response per request, in order, after all of them have ended.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is
                raised, and what the other requests brought is in the cache.
        """
        self._check_open()
        return await together([self.request(request) for request in batch.requests], return_exceptions)

    def flush(self) -> None:
        """Send what the stages below have queued, without waiting for it."""
        if isinstance(self.model, Stage):
            self.model.flush()

    async def close(self) -> None:
        """Finish what is in flight and close the stages below. Idempotent."""
        self._closed = True
        if isinstance(self.model, Stage):
            await self.model.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StageClosed(f"this {type(self).__name__} is closed; make another one")

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def adapter_of(model: Any) -> Any:
    """Return the adapter at the end of a chain of stages: it knows what is sent to a provider."""
    while isinstance(model, Stage):
        model = model.model
    return model


async def together(requests: Iterable[Any], return_exceptions: bool) -> list[Any]:
    """Await all, then return the results in order, or raise the first error in that order."""
    return given(await asyncio.gather(*requests, return_exceptions=True), return_exceptions)


def given(answers: list[Any], return_exceptions: bool) -> list[Any]:
    """Return the answers; raise the first error among them unless exceptions may be returned."""
    if not return_exceptions:
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
    return answers


async def each(
    ask_one: Callable[[Request], Awaitable[Any]], requests: Sequence[Request], arrived: Arrived | None
) -> list[Any]:
    """Ask for each request by itself, all at once; return one answer or error per request, in order.

    Args:
        ask_one: asks for one request.
        requests: the requests.
        arrived: is called with each answer as it comes.
    """

    async def one(place: int, request: Request) -> Any:
        try:
            answer = await ask_one(request)
        except GeneratorExit:  # nobody is left to be told
            raise
        except BaseException as error:
            if arrived is not None:
                arrived(place, error)
            raise
        if arrived is not None:
            arrived(place, answer)
        return answer

    return await together([one(*numbered) for numbered in enumerate(requests)], return_exceptions=True)


async def ask(model: Any, request: Request) -> Response:
    """Return what a model answers to one request, whichever of the two protocols it speaks."""
    if has_request(model):
        response: Response = await model.request(request)
        return response
    answer = (await ask_batch(model, [request]))[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def ask_batch(
    model: Any, requests: Sequence[Request], arrived: Arrived | None = None
) -> list[Response | BaseException]:
    """Return one answer or error per request.

    A batch that fails as a whole is repeated request by request, so that one bad request does not
    take the others with it.

    Args:
        model: the model, whichever of the two protocols it speaks.
        requests: the requests.
        arrived: is called once for each answer or error: when it comes, or at the latest before this returns.
    """
    came: dict[int, Any] = {}

    def take(place: int, answer: Any) -> None:
        if place not in came:
            came[place] = answer = _raisable(answer)
            if arrived is not None:
                arrived(place, answer)

    for place, answer in enumerate(await _ask_batch(model, requests, came, take)):
        take(place, answer)
    return [came[place] for place in range(len(requests))]


async def _ask_batch(
    model: Any, requests: Sequence[Request], came: dict[int, Any], take: Arrived
) -> list[Any]:
    """Return one answer or error per request; answers that came earlier are used."""
    if not has_batch(model):
        return await each(model.request, requests, take)
    try:
        answers = await send(model, Batch(list(requests)), take)
    except Exception as error:
        if isinstance(model, Stage):
            raise
        if len(requests) > 1:
            await _repeat(model, requests, came, take)
        answers = [error] * len(requests)  # for whom nothing has come by now
    if len(answers) != len(requests):
        mismatch = BatchMismatch(
            f"sent {len(requests)} requests, the model returned {len(answers)} responses; "
            "return one response or exception per request"
        )
        return [mismatch for _ in requests]
    return answers


async def _repeat(model: Any, requests: Sequence[Request], came: dict[int, Any], take: Arrived) -> None:
    """Ask one by one for the requests of a batch that have no answer yet."""
    for place, request in enumerate(requests):
        if place not in came:
            try:
                take(place, (await ask_batch(model, [request]))[0])
            except asyncio.CancelledError as stopped:  # what has come is paid for
                for rest in range(place, len(requests)):
                    take(rest, stopped)


async def send(model: Any, batch: Batch, arrived: Arrived | None) -> list[Any]:
    """Return what a model's own ``batch_request`` does; stages put errors in their places.

    Args:
        model: a model that takes batches.
        batch: the batch.
        arrived: is called with answers as they come, if the model reports them.
    """
    method = model.batch_request
    function = getattr(method, "__func__", None)
    if function is Stage.batch_request:  # which waits for all
        stage: Stage = method.__self__
        stage._check_open()  # noqa: SLF001 - this module's own
        return await each(stage.request, batch.requests, arrived)
    options: dict[str, Any] = {"return_exceptions": True} if isinstance(model, Stage) else {}
    if function is not None and reports_arrivals(function):
        options["arrived"] = arrived
    return list(await method(batch, **options))


def _raisable(answer: Any) -> Any:
    """Return an answer; a StopIteration, which a future cannot hold, becomes a RuntimeError."""
    if not isinstance(answer, StopIteration):
        return answer
    error = RuntimeError("a model's batch_request returned a StopIteration for one of its requests")
    error.__cause__ = answer
    return error


class Flight:
    """A batch in flight. It is stopped when no member wants one of its missing answers any more.

    Args:
        members: the requests that wait for an answer.

    Attributes:
        task: the task that asks for the batch, until it is stopped.
    """

    def __init__(self, members: Iterable[Hashable]) -> None:
        self.task: asyncio.Task[None] | None = None
        self._owed = set(members)
        self._wanting = set(self._owed)

    def leave(self, member: Hashable) -> None:
        """Note that a member does not want its answer any more."""
        self._wanting.discard(member)
        self._stop_unwanted()

    def answered(self, member: Hashable) -> None:
        """Note that a member has received its answer or error."""
        self._owed.discard(member)
        self._wanting.discard(member)
        if self._owed and not self._wanting and self.task is not None:
            # Not before the next turn: the answers of others may be about to come in this one.
            self.task.get_loop().call_soon(self._stop_unwanted)

    def _stop_unwanted(self) -> None:
        if self._owed and not self._wanting and self.task is not None:
            task, self.task = self.task, None  # cancel it only once: its cleanup must not be interrupted
            task.cancel()


def samples_of(answer: Any) -> list[Any]:
    """Return the samples of a model's answer.

    Raises:
        BadAnswer: when it is not a response, or its data is not a list.
    """
    data = getattr(answer, "data", None)
    if type(data) is list:
        return data.copy()
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
        raise BadAnswer(f"a model returns Response(data=[one item per sample]); got {answer!r:.200}")
    return list(data)


def payment_of(answer: Any) -> Payment | None:
    """Return what the calls of an answer have reserved of a budget; None if that is nothing."""
    return answer.payment if isinstance(answer, Response) else None
