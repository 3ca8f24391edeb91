"""A pool of actors for plain Ray programs: each actor has a pipeline, and all share one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cachepipe.errors import CachepipeError
from cachepipe.ray.cluster import check_cluster, ray
from cachepipe.ray.settings import RaySettings
from cachepipe.ray.totals import Summary, summary
from cachepipe.ray.worker import Worker, check_id
from cachepipe.typedefs import Request, Response

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class RequestError(CachepipeError):
    """A request of a pool failed in its actor. Its text is ``code: message``, without credentials.

    The error itself stays there, because those of SDKs hold the headers that were sent.
    """


class _Actor:
    """What runs in each actor of a pool."""

    def __init__(self, settings: RaySettings) -> None:
        check_cluster(settings)
        self._worker = Worker(settings)

    async def request(self, request: Request) -> Response | str:
        """Return the response, or the error as a text."""
        return (await self._worker.answers([request]))[0]

    async def write_sums(self) -> None:
        """Write the sums of what was delivered."""
        await self._worker.write_sums()


class Pool:
    """Actors that answer requests. It may be passed to Ray tasks and other actors.

    The ``request_id`` of a request says which draw it is: requests with the same id that ask the same get the
    same samples, whichever actor answers. Ray replaces an actor that dies, and repeats its requests, which
    are then the same draws.

    Args:
        settings: how each actor makes its pipeline.
        size: the number of actors.
        concurrency: requests in flight in an actor.
        options: further options of the actors, such as ``num_cpus`` and ``runtime_env``.

    Raises:
        StoreError: when the cache is a folder, and the cluster has several nodes.
    """

    def __init__(
        self, settings: RaySettings, size: int = 2, *, concurrency: int = 64, **options: Any
    ) -> None:
        check_cluster(settings)
        self.settings = settings
        self.concurrency = concurrency
        kept = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": concurrency, **options}
        kind = ray.remote(_Actor).options(**kept)
        self.actors = [kind.remote(settings) for _ in range(size)]
        self._next = 0

    def __repr__(self) -> str:
        return f"<Pool of {len(self.actors)} actors on {self.settings.cache}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, request: Request) -> Response:
        """Return the samples of a request.

        Raises:
            RequestError: when it fails.
            ValueError: when it has no ``request_id``, and equal questions do not share one draw.
        """
        return _given(ray.get(self._sent(request)))

    def map(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> Iterator[Response | RequestError]:
        """Yield the samples of each request, in order. As many requests are in flight as the actors take.

        Args:
            requests: the requests.
            return_exceptions: yield the `RequestError` of a request in its place; otherwise it is raised.

        Raises:
            RequestError: when a request fails.
            ValueError: when a request has no ``request_id``, and equal questions do not share one draw.
        """
        sent: deque[Any] = deque()
        most = self.concurrency * len(self.actors)
        for request in requests:
            if len(sent) == most:
                yield _outcome(ray.get(sent.popleft()), return_exceptions=return_exceptions)
            sent.append(self._sent(request))
        while sent:
            yield _outcome(ray.get(sent.popleft()), return_exceptions=return_exceptions)

    def _sent(self, request: Request) -> Any:
        """Send a request to the next actor."""
        if not isinstance(request, Request):
            raise TypeError(f"a pool takes a Request; got {request!r:.200}. Write Request(prompt=...)")
        check_id(self.settings, request.request_id, "Request(…, request_id='…')")
        self._next = (self._next + 1) % len(self.actors)
        return self.actors[self._next].request.remote(request)

    def summary(self) -> Summary:
        """Return what the run has cost and saved so far, over all actors."""
        self._write_sums()
        return summary(self.settings)

    def close(self) -> None:
        """Write the sums of what was delivered, and end the actors."""
        self._write_sums()
        for actor in self.actors:
            ray.kill(actor)

    def _write_sums(self) -> None:
        ray.get([actor.write_sums.remote() for actor in self.actors])


def _outcome(answer: Response | str, *, return_exceptions: bool) -> Response | RequestError:
    if return_exceptions and isinstance(answer, str):
        return RequestError(answer)
    return _given(answer)


def _given(answer: Response | str) -> Response:
    """Return a response, or raise its error."""
    if isinstance(answer, str):
        raise RequestError(answer)
    return answer
