"""Sends the samples of a draw to one client. If the client leaves, the draw goes on without it (C7)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from cachepipe.providers.generation import Answer
from cachepipe.providers.responses import BodySource, Received
from cachepipe.providers.stream_recorder import StreamSource
from cachepipe.proxy import cache_headers, headers
from cachepipe.proxy.counters import Outcome
from cachepipe.proxy.http_exchange import JSON, ClientGone, HttpExchange
from cachepipe.proxy.idempotency import RequestCounts
from cachepipe.proxy.upstream import ProxyExchange, UpstreamUnreachable

if TYPE_CHECKING:
    from cachepipe.proxy.app import Proxy


@dataclass(eq=False)
class AnswerSender:
    """Answers one request from the cache, or from the call that its draw makes.

    Attributes:
        proxy: the proxy.
        http: the request.
        exchange: the same request, as the cache sees it.
        counter: counts the occurrences of its draws.
    """

    proxy: Proxy
    http: HttpExchange
    exchange: ProxyExchange
    counter: RequestCounts

    async def drawn(self, task: asyncio.Future[Answer]) -> Outcome:
        """Send the answer of a draw; if the client leaves, continue the draw without it."""
        counter = self.counter
        try:
            here = await self.http.wait_for(task)
        except BaseException:  # the server stops
            self.leave(task)
            raise
        if not here or self.http.gone:  # perhaps in the same turn as the answer: nothing of it was sent
            self.leave(task)
            raise ClientGone
        try:
            answer = task.result()
            arrived, source = answer.arrived, answer.content
            if arrived is None or not isinstance(source, BodySource):
                outcome = await self.send(answer)
                counter.delivered()
                return outcome
        except asyncio.CancelledError:
            counter.unanswered()
            if not task.cancelled():
                raise
            raise UpstreamUnreachable("the call was stopped") from None
        except Exception:
            counter.unanswered()
            raise
        return await self._stream(answer, arrived, source)

    async def send(self, answer: Answer) -> Outcome:
        """Send a whole answer, and count its samples."""
        exchange = self.exchange
        content, arrived = answer.content, answer.arrived
        if arrived is None:
            status = 200
            pairs = headers.with_safety([self._media_type() if isinstance(content, BodySource) else JSON])
            pairs += cache_headers.call_id(exchange.api, answer.made_by)
        else:
            status = arrived.response.status
            pairs = headers.of_answer(arrived.response.pairs)
        pairs += self._described(answer)
        if isinstance(content, BodySource):
            content = b"".join(content.read())
        self.http.facts["key"] = exchange.record.keys[0]
        await self.http.answer(status, pairs, content)
        if not answer.kept:
            return "error"
        responses = exchange.record.responses or ()
        self._count(responses)
        return _outcome([flag for response in responses for flag in response.cached or ()])

    def _media_type(self) -> tuple[bytes, bytes]:
        return b"content-type", self.exchange.api.media_type(self.exchange.asks[0]).encode()

    def _described(self, answer: Answer) -> cache_headers.Pairs:
        return cache_headers.describing(self.exchange, answer, stores=not self.proxy.store.read_only)

    def _count(self, responses: Any) -> None:
        self.proxy.counters.received(self.exchange.claimant.namespace, responses, self.exchange.head.url)

    def leave(self, task: asyncio.Future[Answer]) -> None:
        """Continue the draw of a client that has gone, and store its samples for the next request."""
        if self.exchange.stream and not task.done():
            task.add_done_callback(lambda _: self.counter.unanswered())
            task.cancel()  # nothing of the stream has come
            return
        self.counter.left()
        self.proxy.counters.background += 1
        self.proxy.background.add(task)
        task.add_done_callback(self._left_draw_ended)

    def _left_draw_ended(self, task: asyncio.Future[Answer]) -> None:
        self.proxy.background.discard(task)
        self.proxy.counters.background -= 1
        self.counter.ended()
        if _succeeded(task):
            content = task.result().content
            if isinstance(content, BodySource):
                content.leave()
            elif self.exchange.record.responses is not None:
                self._count(self.exchange.record.responses)

    # Streams.

    async def _stream(self, answer: Answer, arrived: Received, source: BodySource) -> Outcome:
        """Send the events of a call as they come."""
        exchange, http, draw = self.exchange, self.http, self.exchange.task
        response = arrived.response
        whole = False
        try:
            pairs = headers.of_answer(response.pairs) + self._described(answer)
            if exchange.asks[0].transport.get("stream") == "json":  # the upstream always writes events
                pairs = [self._media_type() if pair[0] == b"content-type" else pair for pair in pairs]
            await http.start(response.status, pairs)
            whole = await http.stream(source.aread())
        except UpstreamUnreachable:
            http.facts["error"] = "upstream_broke_off"
            return "error"
        finally:
            if not whole and not (isinstance(source, StreamSource) and source.finished):
                exchange.give_back()
            source.leave()
            if draw is None or draw.done():
                self._stream_ended(draw)
            else:
                self.proxy.counters.background += 1
                draw.add_done_callback(self._left_stream_ended)
        if not whole:
            raise ClientGone
        if not answer.kept:
            return "passed"
        return "miss" if _succeeded(draw) else "error"

    def _left_stream_ended(self, draw: asyncio.Future[Any]) -> None:
        self.proxy.counters.background -= 1
        self._stream_ended(draw)

    def _stream_ended(self, draw: asyncio.Future[Any] | None) -> None:
        if _succeeded(draw):
            if not self.exchange.given_back:
                self.counter.delivered()
            self._count([draw.result()])
        self.counter.ended()


def _outcome(cached: Sequence[bool]) -> Outcome:
    return "hit" if all(cached) else "partial" if any(cached) else "miss"


def _succeeded(task: asyncio.Future[Any] | None) -> TypeGuard[asyncio.Future[Any]]:
    return task is not None and task.done() and not task.cancelled() and task.exception() is None
