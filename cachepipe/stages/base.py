"""What the stages have in common: how a model is asked, and how a stage is opened and closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cachepipe.errors import BadAnswer, BatchMismatch, StageClosed
from cachepipe.typedefs import Batch, Request, Response

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Stage:
    """A model in front of a model. Subclasses define ``request`` and, if they can do better, the batch."""

    def __init__(self, model: Any) -> None:
        check_model(model)
        self.model = model
        self._closed = False

    @property
    def max_n(self) -> int | None:
        """How many samples the model gives in one call at most; None when it has no limit."""
        return limit_of(self.model)

    @property
    def cut_n(self) -> int | None:
        """How many samples a request may ask for before it is better cut, where nothing speaks against it."""
        return getattr(self.model, "cut_n", None)

    @property
    def cache_scope(self) -> str | None:
        """Whose answers these are (see ``cachepipe.keys.scope_of``)."""
        from cachepipe.keys import scope_of  # noqa: PLC0415 - keys is not needed by every stage

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
        """End what is in flight and close the stages below. Idempotent."""
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


def check_model(model: Any) -> None:
    """Refuse what is no model before anything is asked of it."""
    limit_of(model)
    if isinstance(model, type) or not (has_request(model) or has_batch(model)):
        raise TypeError(
            "a model has `async request(Request) -> Response` or `async batch_request(Batch) -> "
            f"list[Response]`; got {model!r}"
        )


def adapter_of(model: Any) -> Any:
    """Return the adapter at the end of a chain of stages: it knows what goes to a provider."""
    while isinstance(model, Stage):
        model = model.model
    return model


def has_request(model: Any) -> bool:
    """Tell whether a model answers single requests."""
    return _overrides(model, "request")


def has_batch(model: Any) -> bool:
    """Tell whether a model answers batches."""
    return _overrides(model, "batch_request")


def _overrides(model: Any, name: str) -> bool:
    """Tell whether a model has a method of its own, not only the protocol's empty one."""
    from cachepipe.typedefs import BatchRequestModel, SingleRequestModel  # noqa: PLC0415 - only here

    method = getattr(type(model), name, None)
    if method is None:
        return callable(getattr(model, name, None))
    return method not in (
        getattr(SingleRequestModel, name, None),
        getattr(BatchRequestModel, name, None),
    )


def limit_of(model: Any) -> int | None:
    """Return a model's limit on ``n``, its attribute ``max_n``; None or 0 is no limit."""
    limit: Any = getattr(model, "max_n", None)
    if limit is None:
        return None
    if type(limit) is not int and not isinstance(limit, bool) and hasattr(limit, "__index__"):
        limit = limit.__index__()
    if type(limit) is not int or limit < 0:
        raise TypeError(f"max_n is a whole number of samples or None; {model!r} has {limit!r}")
    return limit or None


async def together(requests: Iterable[Any], return_exceptions: bool) -> list[Any]:
    """Await all, then return the results in order, or raise the first error in that order."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    if not return_exceptions:
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return results


async def ask(model: Any, request: Request) -> Response:
    """Return what a model answers to one request, whichever of the two protocols it speaks."""
    if has_request(model):
        response: Response = await model.request(request)
        return response
    answer = (await ask_batch(model, [request]))[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def ask_batch(model: Any, requests: Sequence[Request]) -> list[Response | BaseException]:
    """Return one answer or error per request.

    A batch that fails as a whole is repeated request by request, so that one bad request does not
    take the others with it.
    """
    if not has_batch(model):
        return await together([model.request(request) for request in requests], return_exceptions=True)
    batch = Batch(list(requests))
    if isinstance(model, Stage):
        return list(await model.batch_request(batch, return_exceptions=True))
    try:
        answers = list(await model.batch_request(batch))
    except Exception as error:  # noqa: BLE001 - it belongs to those who asked
        if len(requests) == 1:
            return [error]
        answers = []
        for request in requests:
            try:
                answers += await ask_batch(model, [request])
            except asyncio.CancelledError as stopped:  # what has come is paid for
                return answers + [stopped] * (len(requests) - len(answers))
        return answers
    if len(answers) != len(requests):
        mismatch = BatchMismatch(
            f"sent {len(requests)} requests, the model returned {len(answers)} responses; "
            "return one response or exception per request"
        )
        return [mismatch for _ in requests]
    return [_raisable(answer) for answer in answers]


def _raisable(answer: Any) -> Any:
    """Return an answer; a StopIteration, which no future takes, becomes what a coroutine makes of it."""
    if not isinstance(answer, StopIteration):
        return answer
    error = RuntimeError("a model's batch_request returned a StopIteration for one of its requests")
    error.__cause__ = answer
    return error


def samples_of(answer: Any) -> list[Any]:
    """Return the samples of a model's answer.

    Raises:
        BadAnswer: when it is no response, or its data no list.
    """
    data = getattr(answer, "data", None)
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
        raise BadAnswer(f"a model returns Response(data=[one item per sample]); got {answer!r:.200}")
    return list(data)
