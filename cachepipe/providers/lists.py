"""Lists of questions: the items that the store lacks travel together, in as few calls as possible."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cachepipe import loops
from cachepipe.contract.demands import REFUSED
from cachepipe.outages import status_of
from cachepipe.providers.generation import TooLarge, Unkept
from cachepipe.wire import MixedAnswer

if TYPE_CHECKING:
    from cachepipe.providers.exchange import Exchange

_QUIET_TURNS: Final = 3  # a list is sent after this many turns of the loop without a new item


class _Item(NamedTuple):
    """An item of a list: its exchange, its place there, and the future of its samples."""

    exchange: Exchange
    place: int
    future: asyncio.Future[Sequence[Any]]

    def settle(self, samples: Sequence[Any] = (), error: BaseException | None = None) -> None:
        """Give the samples or the error to the one who waits, unless it was cancelled."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(samples)
        else:
            self.future.set_exception(error)


class _Group:
    """Items that share a call.

    Args:
        n: the number of samples of each item.
        most: the largest number of items.
    """

    def __init__(self, n: int, most: int) -> None:
        self.n = n
        self.most = most
        self.items: list[_Item] = []
        self.quiet = 0
        self.task: asyncio.Task[None] | None = None


class Lists:
    """Sends the missing items of lists in shared calls.

    A request's own items share a call, which fails as its caller wrote it.

    Args:
        shared: whether items of several requests share calls too, if the requests differ in nothing else. A
            shared call that is refused or times out is halved, until each item has failed alone. After one
            that returned too few samples, so that nobody can tell which item they answer, each item travels
            alone.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared
        self._mixed = False
        self._open: dict[Hashable, _Group] = {}

    def takes(self, exchange: Exchange, place: int) -> bool:
        """Return True if a question of an exchange may share a call with others."""
        return len(exchange.asks) > 1 or (self._shared and exchange.list_kind(place) is not None)

    async def samples(self, exchange: Exchange, place: int, n: int) -> Sequence[Any]:
        """Return n samples of a question of an exchange."""
        loop = loops.running()
        kind: Hashable = exchange
        most = len(exchange.asks)
        if self._shared and (shared := exchange.list_kind(place)) is not None:
            kind, most = ((exchange, place), 1) if self._mixed else (shared, exchange.api.most_items)
        name = loop, n, kind
        group = self._open.get(name)
        if group is None or len(group.items) == most:
            group = self._open[name] = _Group(n, most)
            loop.call_soon(self._settle, loop, name, group)
        group.quiet = 0
        future: asyncio.Future[Sequence[Any]] = loop.create_future()
        group.items.append(_Item(exchange, place, future))
        try:
            return await future
        except asyncio.CancelledError:
            if group.task is not None and all(item.future.done() for item in group.items):
                group.task.cancel()
            raise

    def _settle(self, loop: asyncio.AbstractEventLoop, name: Hashable, group: _Group) -> None:
        """Send the items of a group once no more of them come."""
        group.quiet += 1
        if group.quiet < _QUIET_TURNS and len(group.items) < group.most:
            loop.call_soon(self._settle, loop, name, group)
            return
        if self._open.get(name) is group:
            del self._open[name]
        items = [item for item in group.items if not item.future.done()]
        if items:
            ranks = {item.exchange: rank for rank, item in reversed(list(enumerate(items)))}
            items.sort(key=lambda item: (ranks[item.exchange], item.place))
            context = items[0].exchange.own_context()
            group.task = loop.create_task(self._serve(items, group.n), context=context)
            _tasks.add(group.task)
            group.task.add_done_callback(_tasks.discard)

    async def _serve(self, items: Sequence[_Item], n: int) -> None:
        first = items[0].exchange
        try:
            samples = await first.called([item.exchange.asks[item.place] for item in items], n)
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            if parts := self._parts(items, error):
                await asyncio.gather(*(self._serve(part, n) for part in parts))
                return
            if isinstance(error, TooLarge) and (first.over or len(items) < len(first.asks)):
                error.leave()
            for item in items:
                item.settle(error=error)
            return
        share = len(samples) // len(items)  # a lone item may get fewer than n samples
        for place, item in enumerate(items):
            item.settle(samples[place * share : (place + 1) * share])

    def _parts(self, items: Sequence[_Item], error: BaseException) -> Sequence[Sequence[_Item]]:
        """Return the lists to send instead of one that failed; none if the items fail with it."""
        if not self._shared or len(items) == 1:
            return ()
        if isinstance(error, MixedAnswer):
            self._mixed = True
            return [[item] for item in items]
        if _may_be_size(error):
            half = len(items) // 2
            return items[:half], items[half:]
        return ()


_tasks: set[asyncio.Task[None]] = set()
"""Calls in flight."""


def _may_be_size(error: BaseException) -> bool:
    """Return True if a call may have failed because of its size, or of one bad item among good ones."""
    if isinstance(error, Unkept):
        return False
    return "Timeout" in type(error).__name__ or status_of(error) in REFUSED
