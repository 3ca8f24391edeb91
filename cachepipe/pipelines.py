"""Pipelines of stages: for paid APIs, for models that batch on hardware, and for batches in a fixed order.

The order is deduplicator, cacher, batcher, model. The deduplicator comes first, because it must see equal
requests before they become different draws. The cacher comes before the batcher, so that a hit never waits
for a batch window. The batcher gets only requests for samples that must be generated, for all draws and
namespaces together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from cachepipe import context
from cachepipe.adapting import has_request
from cachepipe.cache.cache import Stats
from cachepipe.contract.keys import Question
from cachepipe.stage import Stage
from cachepipe.stages.batcher import AsyncBatcher
from cachepipe.stages.cacher import AsyncCacher
from cachepipe.stages.deduplicator import AsyncDeduplicator
from cachepipe.stages.reorderer import RequestReorderer
from cachepipe.stores.base import Store
from cachepipe.typedefs import Arrived, Batch, Mode, Ordered, Repeat, Request, Response, SingleRequestModel

Hash = Callable[[Request], str] | None


class Options(TypedDict, total=False):
    """The keyword parameters of every pipeline.

    Attributes:
        mode: ``"read-write"`` (default), ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: identifies the model in cache keys; default is the model's ``cache_scope``, or its ``model``.
        repeat: ``"fresh"`` (default): a repeated request gets fresh samples; ``"same"``: all share one draw.
        window: seconds in which equal questions share a call; 0 (default) means a turn of the event loop.
        classes: dataclasses and pydantic models that may be stored as samples.
        durability: ``"process"`` (default), or ``"full"`` to survive a crash of the machine.
        wait_for_others: seconds to wait for a sample that another live process generates before it is
            generated here; None (default) waits as long as that process lives.
        ordered: hand over the answers in the order of the first run, one at a time, so that a rerun of a
            program with concurrent tasks takes the same course; see ``AsyncCacher``. The default is True with
            ``repeat="fresh"`` and ``correctness=True``.
        service: limits and retries the calls of the model, such as ``Services.OpenAI()``. It is between the
            batcher and the model, so it does not affect hits.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``. A call that may exceed it raises ``BudgetExceeded``.
    """

    mode: Mode
    scope: str | None
    repeat: Repeat
    window: float
    classes: Iterable[type]
    durability: str
    wait_for_others: float | None
    ordered: Ordered | None
    service: Any
    budget: Any


class Pipeline(Stage):
    """A deduplicator and a cacher in front of the stage that asks the model.

    Use it with ``async with``, or call ``close`` at the end. Closing never closes a cache that the
    caller opened.
    """

    def __init__(self, model: Any, below: Any, cache: Any, hash: Hash, options: Options) -> None:  # noqa: A002 - CacheSaver's name
        super().__init__(model)
        for_cacher: dict[str, Any] = dict(options)
        window = for_cacher.pop("window", 0.0)
        self._cacher = AsyncCacher(below, cache, hash=hash, **for_cacher)
        self._head = AsyncDeduplicator(self._cacher, window=window)
        _begin_budget(below, self._cacher.store)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._cacher!r}>"

    @property
    def store(self) -> Store:
        """The store of the samples."""
        return self._cacher.store

    async def request(self, request: Request) -> Response:
        """Return ``request.n`` samples of the request's own draw.

        Raises:
            CacheMiss: in replay mode, when not all of them are stored.
            UnkeyableValue: when no stable key can be made from the request.
        """
        if self._closed:
            self._check_open()
        return await self._head.request(request)

    async def batch_request(self, batch: Batch, *, return_exceptions: bool = False) -> list[Response]:
        """Return one response per request, in order, after all of them have ended.

        Args:
            batch: the requests.
            return_exceptions: put the error of a request in its place; otherwise the first one is
                raised, and what the other requests brought is in the cache.
        """
        self._check_open()
        if not isinstance(batch, Batch):
            raise TypeError(f"batch_request takes a Batch; got {batch!r:.200}. Write Batch([...])")
        return await self._head.batch_request(batch, return_exceptions=return_exceptions)

    def question(self, request: Request) -> Question:
        """Return what a request asks, with its key."""
        return self._cacher.question(request)

    def key(self, request: Request) -> str:
        """Return the key of a request's question."""
        return self.question(request).key

    def stats(self) -> Stats:
        """Return the figures since the pipeline was opened: hits, misses, merged, generated and more."""
        stats = self._head.stats()
        stage: Any = self.model
        while isinstance(stage, Stage):
            if stage.queue_seconds or stage.call_seconds:
                return replace(stats, queue_seconds=stage.queue_seconds, call_seconds=stage.call_seconds)
            stage = stage.model
        return stats

    async def close(self) -> None:
        """Wait for what is in flight on this loop and write it. Idempotent."""
        self._closed = True
        await self._head.close()

    async def cleanup(self) -> None:
        """Close the pipeline; the name that code written for CacheSaver calls."""
        await self.close()


class OnlineAPI(Pipeline):
    """For paid APIs: each request gets its answer as it comes, with any number of requests in flight.

    Args:
        model: the adapter; if it has both methods, ``request`` is used, so that one failure does not affect
            other requests.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        batch_size: the number of misses sent together; 1 sends each at once.
        timeout: seconds that a miss waits for others to fill its batch. It is not an HTTP time-out.
        allow_batch_overflow: send a request for more than ``batch_size`` samples in one call.
        correctness: CacheSaver's name of ``ordered``.
        hash: a function from a request to a string that stands for its fields in the key.
        in_flight: batches in flight at most; None is no limit.
        options: ``mode``, ``scope``, ``repeat``, ``window``, ``classes``, ``durability``,
            ``wait_for_others``, ``ordered``, ``service`` (see ``Options``).
    """

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        batch_size: int = 1,
        timeout: float = 0.0,
        allow_batch_overflow: bool = True,
        correctness: bool = True,
        hash: Hash = None,  # noqa: A002 - CacheSaver's name
        *,
        in_flight: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        if not correctness:
            options.setdefault("ordered", False)
        model = _limited(model, options)
        batcher = AsyncBatcher(
            model,
            batch_size,
            timeout,
            in_flight=in_flight,
            prefer="request",
            allow_batch_overflow=allow_batch_overflow,
        )
        alone = batch_size == 1 and not timeout and in_flight is None and allow_batch_overflow
        super().__init__(
            model,
            model if alone and batcher.single else batcher,
            cache,
            hash,
            options,
        )


class LocalAPI(Pipeline):
    """For models that batch on hardware: misses reach ``batch_request`` in batches of samples.

    Args:
        model: the adapter; its ``batch_request`` is used when it has both methods.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        batch_size: samples in a batch at most; a request for more is cut.
        timeout: seconds that a batch stays open for more after its first request.
        allow_batch_overflow: send a request for more than ``batch_size`` samples whole.
        correctness: CacheSaver's name of ``ordered``.
        hash: as in ``OnlineAPI``.
        in_flight: batches in flight at most: one that runs and one that is ready, unless told otherwise.
        options: ``mode``, ``scope``, ``repeat``, ``window``, ``classes``, ``durability``,
            ``wait_for_others``, ``ordered``, ``service`` (see ``Options``).
    """

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        batch_size: int = 1,
        timeout: float = 0.0,
        allow_batch_overflow: bool = False,
        correctness: bool = True,
        hash: Hash = None,  # noqa: A002 - CacheSaver's name
        *,
        in_flight: int | None = 2,
        **options: Unpack[Options],
    ) -> None:
        if not correctness:
            options.setdefault("ordered", False)
        model = _limited(model, options)
        super().__init__(
            model,
            AsyncBatcher(
                model,
                batch_size,
                timeout,
                in_flight=in_flight,
                allow_batch_overflow=allow_batch_overflow,
            ),
            cache,
            hash,
            options,
        )


class OrderedLocalAPI(Pipeline):
    """For models with batches that must not depend on timing: misses are collected, sorted, then batched.

    Misses are collected until ``collection_batch_size`` samples are needed or ``timeout`` seconds have
    passed, sorted by request id ("2" before "10"), and cut into hardware batches in that order. Hits do not
    wait for the collection.

    Args:
        model: the adapter; its ``batch_request`` is used when it has both methods.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        collection_batch_size: samples to collect at most.
        hardware_batch_size: samples in a batch at most.
        timeout: seconds that a collection stays open after its first request.
        allow_batch_overflow: send a request for more than ``hardware_batch_size`` samples whole.
        correctness: CacheSaver's name of ``ordered``.
        hash: as in ``OnlineAPI``.
        in_flight: hardware batches in flight at most.
        options: ``mode``, ``scope``, ``repeat``, ``window``, ``classes``, ``durability``,
            ``wait_for_others``, ``ordered``, ``service`` (see ``Options``).
    """

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        collection_batch_size: int = 1,
        hardware_batch_size: int = 1,
        timeout: float = 0.0,
        allow_batch_overflow: bool = False,
        correctness: bool = True,
        hash: Hash = None,  # noqa: A002 - CacheSaver's name
        *,
        in_flight: int | None = 2,
        **options: Unpack[Options],
    ) -> None:
        if not correctness:
            options.setdefault("ordered", False)
        model = _limited(model, options)
        hardware = AsyncBatcher(
            model, hardware_batch_size, in_flight=in_flight, allow_batch_overflow=allow_batch_overflow
        )
        collection = AsyncBatcher(
            RequestReorderer(hardware),
            collection_batch_size,
            timeout,
            allow_batch_overflow=True,
        )
        super().__init__(
            model,
            _Cutting(collection, hardware),
            cache,
            hash,
            options,
        )


def _limited(model: Any, options: Options) -> Any:
    """Return the model with the limits of the service and with the budget, if the options have them."""
    service, budget = options.pop("service", None), context.current().budget_of(options.pop("budget", None))
    if service is not None:
        model = _served(model, service)
    if budget is None:
        return model
    from cachepipe.flow import Budget  # noqa: PLC0415 - for those who ask for it
    from cachepipe.flow.budgeter import AsyncBudgeter  # noqa: PLC0415 - likewise

    budgeted = AsyncBudgeter(model, Budget.of(budget))
    return budgeted if has_request(model) else _Batches(budgeted)


def _begin_budget(stage: Any, store: Store) -> None:
    """Give the store to the stage that keeps the budget, if there is one."""
    while isinstance(stage, Stage):
        if begin := getattr(stage, "begin", None):
            begin(store)
        stage = stage.model


def _served(model: Any, service: Any) -> Any:
    """Return the model with the limits of a service."""
    from cachepipe.flow import AsyncLimiter, AsyncRetrier  # noqa: PLC0415 - for those who ask for it
    from cachepipe.flow.flow import Flow  # noqa: PLC0415 - likewise

    flow = getattr(service, "flow", None)
    if not isinstance(flow, Flow):
        raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {service!r}")
    limited = AsyncRetrier(
        AsyncLimiter(model, limits=flow.limits, estimator=flow.estimator), retries=flow.retries
    )
    return limited if has_request(model) else _Batches(limited)


class _Batches(Stage):
    """A model that takes batches only, behind stages that also take single requests."""

    request = SingleRequestModel.request

    async def batch_request(
        self, batch: Batch, *, return_exceptions: bool = False, arrived: Arrived | None = None
    ) -> list[Response]:
        answers: list[Response] = await self.model.batch_request(
            batch, return_exceptions=return_exceptions, arrived=arrived
        )
        return answers


class _Cutting(Stage):
    """The collecting batcher, which gives the cacher above the size limit of the hardware's requests."""

    def __init__(self, collection: AsyncBatcher, hardware: AsyncBatcher) -> None:
        super().__init__(collection)
        self._hardware = hardware
        self.submit = collection.submit

    @property
    def cut_n(self) -> int | None:
        return self._hardware.cut_n

    async def request(self, request: Request) -> Response:
        return await self.model.request(request)  # type: ignore[no-any-return]
