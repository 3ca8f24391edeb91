"""The reorderer: requests of a batch reach the model in the natural order of their ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cachepipe.stage import Stage, ask, ask_batch, given
from cachepipe.typedefs import Arrived, Batch, Request, Response

_NUMBERS = re.compile(r"(\d+)", re.ASCII)


def natural(request_id: str | None) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which "2" comes before "10", and "a2" before "a10"."""
    parts = _NUMBERS.split(request_id or "")
    return tuple(
        (0, int(part), part) if part.isdigit() and part.isascii() else (1, 0, part) for part in parts if part
    )


def in_order(requests: Iterable[Request]) -> list[int]:
    """Return the places of requests in the natural order of their ids; equal ids keep their order."""
    listed = list(requests)
    return sorted(range(len(listed)), key=lambda place: natural(listed[place].request_id))


class RequestReorderer(Stage):
    """Sorts each batch by request id, naturally, and returns the responses in the batch's own order.

    So a model that draws random numbers per batch sees the same batches in the same order, whatever
    the order in which requests arrived. Ids may occur more than once.

    Args:
        model: what answers.
    """

    def __repr__(self) -> str:
        return f"<RequestReorderer {self.model!r}>"

    async def request(self, request: Request) -> Response:
        """Return the model's response: there is nothing to sort."""
        self._check_open()
        return await ask(self.model, request)

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        """Return the model's responses in the batch's own order, and report each as it comes."""
        self._check_open()
        order = in_order(batch.requests)
        responses: list[Any] = [None] * len(order)

        def take(nth: int, answer: Any) -> None:
            place = order[nth]
            responses[place] = answer
            if arrived is not None:
                arrived(place, answer)

        await ask_batch(self.model, [batch.requests[place] for place in order], take)
        return given(responses, return_exceptions)
