"""CacheSaver's pipelines; each new one counts equal requests from the start, as a restarted program does."""

from __future__ import annotations

from typing import Any

from cachepipe import pipelines, runs
from cachepipe.typedefs import Batch, Request, Response

__all__ = ["LocalAPI", "OnlineAPI", "OrderedLocalAPI"]


class _OwnRun(pipelines.Pipeline):
    """A pipeline in a run of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run = runs.Run()

    async def request(self, request: Request) -> Response:
        with runs.within(self._run):
            return await super().request(request)

    async def batch_request(self, batch: Batch, *, return_exceptions: bool = False) -> list[Response]:
        with runs.within(self._run):
            return await super().batch_request(batch, return_exceptions=return_exceptions)


class OnlineAPI(_OwnRun, pipelines.OnlineAPI):
    """`cachepipe.OnlineAPI`, for paid APIs, in a run of its own."""


class LocalAPI(_OwnRun, pipelines.LocalAPI):
    """`cachepipe.LocalAPI`, for models that batch on hardware, in a run of its own."""


class OrderedLocalAPI(_OwnRun, pipelines.OrderedLocalAPI):
    """`cachepipe.OrderedLocalAPI`, which also sorts by request id, in a run of its own."""
