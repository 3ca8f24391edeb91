"""The calls of limits: those that wait, the permission to make one, and their counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from cachepipe import markup
from cachepipe.flow.adaptive import Adaptive
from cachepipe.flow.queues import FairQueue, Place
from cachepipe.flow.windows import Quota, Use, Window


@dataclass
class FlowStats:
    """What has passed through limits since they were made.

    Attributes:
        calls: calls that were let go, repeated attempts included.
        answered: calls that were answered.
        refused: calls that were refused because too many came (429).
        overloaded: calls that failed because the provider was overloaded, not reachable, or too slow.
        failed: calls that failed for another reason.
        retries: repeated attempts.
        tokens: tokens used, as the answers report them, else as estimated.
        queue_seconds: total time that calls have waited to be let go.
        call_seconds: total time that calls have taken from then on.
        waiting: calls that wait now.
        in_flight: calls that are in flight now.
    """

    calls: int = 0
    answered: int = 0
    refused: int = 0
    overloaded: int = 0
    failed: int = 0
    retries: int = 0
    tokens: float = 0.0
    queue_seconds: float = 0.0
    call_seconds: float = 0.0
    waiting: int = 0
    in_flight: int = 0

    def __getitem__(self, name: str) -> float:
        value: float = asdict(self)[name]
        return value

    def _repr_html_(self) -> str:
        return markup.figures(self.as_dict().items())

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(slots=True, eq=False, repr=False)
class LimitedModel:
    """One model, and the calls that wait for it."""

    name: str | None
    quota: Quota | None
    windows: list[Window]
    adaptive: Adaptive
    queue: FairQueue[WaitingCall] = field(default_factory=FairQueue)
    in_flight: int = 0


@dataclass(slots=True, eq=False, repr=False)
class Slot:
    """The permission to make one call. End it with `end`, or use it with ``with``.

    Attributes:
        limits: the limits that gave the permission.
        on_end: is called at the end, with the arguments of `end`.
        model: the model that is called.
        uses: what the call uses of each window.
        tokens: the estimated tokens of the call.
        begun: the time at which the call was made.
        spent: the requests and tokens that were spent on the model when the call was let go.
        places: how many of the calls at once it counts as: 1, or 0 within another call.
        shared: the number of the call in the quotas that processes share.
        queued: the seconds that it has waited.
        ended: whether the call has ended.
    """

    limits: object
    on_end: Callable[[Slot, float | None, Mapping[str, Any] | None, BaseException | None], None]
    model: LimitedModel
    uses: list[tuple[Window, Use]]
    tokens: float
    begun: float
    spent: tuple[float, float]
    places: int
    shared: int | None = None
    queued: float = 0.0
    ended: bool = False

    def end(
        self,
        *,
        tokens: float | None = None,
        headers: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End the call. Only the first time counts.

        Args:
            tokens: the tokens that the call has used, if known.
            headers: the headers of the answer.
            error: the error of the call; its headers and status are read.
        """
        if not self.ended:
            self.ended = True
            self.on_end(self, tokens, headers, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error=error)


holding: ContextVar[tuple[Slot, ...]] = ContextVar("cachepipe_holding", default=())
"""The slots of the calls within which a call is made. It takes no second place: it would wait for itself."""


class WaitingCall(Place):
    """A call that waits to be let go."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        number: int,
        rank: int,
        model: LimitedModel,
        tokens: float,
        since: float,
    ) -> None:
        super().__init__(loop, number, rank)
        self.model = model
        self.tokens = tokens
        self.since = since
        self.slot: Slot | None = None
        self.error: BaseException | None = None
        self.woken: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        """Wake the caller."""
        if not self.woken.done():
            self.woken.set_result(None)
