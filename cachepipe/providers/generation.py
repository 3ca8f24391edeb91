"""Calls to a provider: the body of a request goes out, and its samples come back.

`Calls` is what exchanges with the cache (`cachepipe.providers.exchange`) and the adapters of pipelines
(`cachepipe.models`) have in common: the body, the service's limits, the span, and the samples of the answer.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import orjson

from cachepipe import jsontext, telemetry, wire
from cachepipe.accounting import Usage, is_name, noted, sold_in, usage_of, usage_sold
from cachepipe.bounds import max_answer
from cachepipe.contract.keys import trimmed
from cachepipe.errors import CachepipeError
from cachepipe.flow.budget import Reservation, Spending
from cachepipe.flow.flow import Flow, Passage
from cachepipe.providers.responses import BodySource, Received
from cachepipe.values import Codec

_codec = Codec()
_CALL_ID = b'"request"'

S = TypeVar("S")


class Kept(NamedTuple):
    """A sample as it is stored.

    Attributes:
        payload: its JSON, in the cache's own spelling.
        noted: JSON of the facts stored with it, or nothing.
        reserved: what its call has reserved of a budget, until it is stored.
    """

    payload: bytes
    noted: bytes = b""
    reserved: Reservation | None = None

    @property
    def value(self) -> wire.Sample:
        """The sample."""
        sample: wire.Sample = _codec.decode(self.payload)
        return sample

    @property
    def usage(self) -> Usage:
        """The usage of the sample, as the facts beside it say, which takes less time than reading it."""
        sold = sold_in(self.noted)
        return usage_sold(sold) if sold else usage_of(self.value)

    @property
    def made_by(self) -> str | None:
        """The provider's id of the call that made it."""
        if _CALL_ID not in self.noted:
            return None
        name = orjson.loads(self.noted).get("request")
        # It may come from a received cache, and goes into a header.
        return name if isinstance(name, str) and name.isascii() and name.isprintable() else None


def packed(
    samples: Sequence[wire.Sample],
    *,
    request: Any = None,
    asked: Any = None,
    url: str | None = None,
    reserved: Reservation | None = None,
) -> list[Kept]:
    """Return the samples of a call in the form in which they are stored.

    Args:
        samples: the samples.
        request: the provider's id of the call.
        asked: the model that was asked.
        url: where the call went, unless the scope of the question says so.
        reserved: what the call has reserved of a budget.

    Raises:
        NotStorable: when an equal sample could not be restored.
    """
    about = {name: value for name, value in (("request", request), ("asked", asked)) if is_name(value)}
    return [
        Kept(_codec.encode(sample), trimmed(orjson.dumps({**about, **noted(sample, url, asked)})), reserved)
        for sample in samples
    ]


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


class Unkept(CachepipeError):  # noqa: N818 - it never reaches a caller
    """A call returned a response that is not an answer; the callers that needed it get that response.

    It looks like a refusal, so that a merged call is repeated as its callers wrote it.

    Attributes:
        arrived: the response.
        error: what is wrong with it.
    """

    status_code = 422

    def __init__(self, arrived: Received, error: Exception) -> None:
        super().__init__(f"not cached: {error}")
        self.arrived = arrived
        self.error = self.__cause__ = error


class TooLarge(Unkept):
    """A call returned an answer that is too large to be kept; one reader may read it as it comes."""

    def __init__(self, arrived: Received, most: int) -> None:
        error = wire.BadAnswer(
            f"the answer has more than {most} bytes, and is neither cached nor combined with others. Raise "
            "the limit: the environment variable CACHEPIPE_MAX_ANSWER, or --max-answer of a proxy"
        )
        super().__init__(arrived, error)
        self._gone = False

    def answer(self) -> Answer:
        """Return the answer to the first caller.

        Raises:
            BadAnswer: when another caller has it, or it was given up.
        """
        if self._gone:
            raise self.error from None
        self._gone = True
        return Answer(self.arrived.content, self.arrived, kept=False)

    def leave(self) -> None:
        """Give the rest of the answer up, unless a caller reads it."""
        if not self._gone and isinstance(self.arrived.content, BodySource):
            self.arrived.content.leave()
        self._gone = True


class Calls:
    """The calls of one request to a provider. Subclasses set the attributes and define `send`.

    Attributes:
        api: the API of the request.
        body: the request's body.
        asks: its questions: ``api.split(body)``.
        url: its URL.
        spans: whether calls make spans here, because whoever sends them makes none.
        context: the caller's context, with the parent span; default is the current one.
        max_retries: how often a failed call is repeated, if the request itself sets that.
    """

    api: wire.Api
    body: Mapping[str, Any]
    asks: Sequence[wire.Ask]
    url: str
    spans: bool = True
    context: contextvars.Context | None = None
    max_retries: int | None = None

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:
        """Make a call; its error reaches exactly the requests that needed it.

        Args:
            body: the body to send instead of the request's own.
            stream: whether it asks for a stream; the response is then returned with its body unread, as
                an object with ``aiter_bytes()`` and ``aclose()``.
        """
        raise NotImplementedError

    @property
    def flow(self) -> Flow | None:
        """The flow control of the calls; None if nothing limits them here."""
        return None

    @property
    def spending(self) -> Spending | None:
        """What calls spend of a budget; None if nothing bounds them here."""
        return None

    @property
    def namespace(self) -> str | None:
        """The namespace that the calls are made for."""
        return None

    def most(self) -> int:
        """Return the largest size in bytes of an answer that is kept; larger ones are only handed on."""
        return max_answer()

    async def call(self, asks: Sequence[wire.Ask], n: int) -> tuple[list[wire.Sample], Made]:
        """Make one call; return its samples, n for each of the asks, and the call.

        Args:
            asks: questions of this request, or of others that differ from it in their item only.
            n: the number of samples of each question.

        Raises:
            Unkept: when the response is not an answer.
        """
        questions = [ask.question for ask in asks]
        body, first = self.body, self.asks[0]
        if first.stream or n != first.n or list(asks) != list(self.asks):
            body = self.api.merge_body(questions, n, transport=first.transport)
        made, arrived = await self.begin(body, stream=False)
        content, most = arrived.content, self.most()
        if isinstance(content, BodySource) or len(content) > most:
            made.end()
            raise TooLarge(arrived, most)
        try:
            samples = self.api.samples(content, questions if len(asks) > 1 else ())
            if len(asks) > 1:
                wire.by_question(samples, len(asks), n)
        except wire.BadAnswer as error:
            made.end_with(content)
            raise Unkept(arrived, error) from error
        made.end_with(content, len(samples))
        return samples, made

    async def begin(self, body: Mapping[str, Any], *, stream: bool) -> tuple[Made, Received]:
        """Make a call, scheduled and retried by the flow control if there is one.

        Returns:
            The object that must be notified of its end, and the response.

        Raises:
            BudgetExceeded: when a budget does not allow the call.
            UnknownCost: when a budget is set, and the cost of the call is unknown.
        """
        spending = self.spending
        if spending is None:
            return await self._sent(body, stream=stream)
        samples = 0 if self.asks[0].function else None
        reserved = await spending.reserve(self.namespace, body, self.url, samples=samples)
        try:
            made, arrived = await self._sent(body, stream=stream)
        except BaseException as error:
            if reserved is not None:
                reserved.end(error=error)
            raise
        made.reserved = reserved
        return made, arrived

    async def _sent(self, body: Mapping[str, Any], *, stream: bool) -> tuple[Made, Received]:
        flow = self.flow
        wanted = self.spans and telemetry.wanted()
        if flow is None and not wanted:
            arrived = await self.send(body, stream=stream)
            return Made(None, None, arrived), arrived
        spans: list[telemetry.CallSpan | None] = []

        async def attempt() -> Received:
            span = telemetry.begin(self.api.name, self.url, body, self.context) if wanted else None
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
                namespace=self.namespace,
                samples=0 if self.asks[0].function else None,
                max_retries=self.max_retries,
            )
        return Made(passage, spans[-1], arrived), arrived


class Made:
    """A call upstream with an answer that has begun to arrive, until its end is reported.

    Attributes:
        arrived: the response.
        reserved: what was reserved for it, if a budget bounds it.
    """

    reserved: Reservation | None = None

    def __init__(self, passage: Passage | None, span: telemetry.CallSpan | None, arrived: Received) -> None:
        self._passage = passage
        self._span = span
        self.arrived = arrived
        self._headers = getattr(arrived.response, "headers", None)

    def end(
        self, answer: Mapping[str, Any] | None = None, *, error: BaseException | None = None, samples: int = 0
    ) -> None:
        """Report its end to the budget, the flow control and the telemetry, if there are any.

        Args:
            answer: the answer.
            error: the error of a call that brought none.
            samples: how many samples it has brought that are to be stored.
        """
        if self.reserved is not None:
            self.reserved.end(answer, error=error, samples=samples)
        usage = wire.usage_in(answer or {})
        if self._passage is not None:
            self._passage.end(usage=usage, headers=self._headers, error=error)
        if self._span is not None:
            self._span.end(answer, error=error)

    def end_with(self, content: bytes, samples: int = 0) -> None:
        """Report its end with an answer in raw form; see `end`."""
        if self._passage is None and self._span is None and self.reserved is None:
            return
        try:
            answer = jsontext.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) and self._span is not None:
            self._span.end(error=wire.BadAnswer("the answer is not a JSON object"))
        self.end(answer if isinstance(answer, dict) else None, samples=samples)


async def in_parts(call: Callable[[int], Awaitable[Sequence[S]]], n: int, limit: int) -> Sequence[S]:
    """Return n samples, from as many calls at once as the limit requires.

    If some calls fail, the function returns the samples of the others, which are paid for. The cache asks
    again for the missing ones.

    Args:
        call: makes a call for a number of samples.
        n: the number of samples.
        limit: the largest number of samples of one call.
    """
    if n <= limit:
        return await call(n)
    sizes = [min(limit, n - begun) for begun in range(0, n, limit)]
    parts = await asyncio.gather(*map(call, sizes), return_exceptions=True)
    samples = [sample for part in parts if not isinstance(part, BaseException) for sample in part]
    failures = [part for part in parts if isinstance(part, BaseException)]
    if failures and not samples:
        raise failures[0]
    return samples
