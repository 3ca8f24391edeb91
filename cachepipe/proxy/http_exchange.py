"""One request to the proxy and its answer, through ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from cachepipe.contract.draws import Claimant
from cachepipe.proxy import headers
from cachepipe.proxy.routing import Route

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CONNECTION: Final = "cachepipe.connection"
"""A key of a scope: the `Connection` of the request, if this package's own server serves it."""

KEEP_ALIVE: Final = "cachepipe.keep_alive"
"""A key of a scope: an HTTP/1.0 client asks to keep its connection."""

NEVER_AGAIN: Final = (b"x-should-retry", b"false")
"""Tells clients that a retry would get the same refusal."""

_CLOSE: Final = [(b"connection", b"close")]
JSON: Final = (b"content-type", b"application/json")
_PRIVATE: Final = [(b"cache-control", b"no-store"), *headers.INERT]


class Connection(Protocol):
    """The connection of a client. It also disconnects a client that reads nothing for too long.

    Attributes:
        lost: whether it has ended.
        leaving: functions that are called when it ends.
    """

    lost: bool
    leaving: set[Callable[[], None]]


class ClientGone(Exception):  # noqa: N818 - nobody is left to whom it would be an error
    """The client has left, or does not read any more."""


class Refusal(Exception):  # noqa: N818 - names what happened
    """A request gets an error of the proxy itself.

    Args:
        status: the status.
        code: a short name for programs.
        message: what was expected, what arrived, what to do.
        pairs: further headers.
    """

    def __init__(
        self, status: int, code: str, message: str, pairs: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.pairs = pairs


@dataclass(eq=False)
class HttpExchange:
    """One request, and the state of its answer.

    Attributes:
        scope: the ASGI scope.
        receive: returns the parts of the body, and the end of the connection.
        send_message: takes the parts of the answer.
        timeout: seconds without a byte from or to the client.
        claimant: who draws; the claimant of requests that name none until it is known.
        route: the route of its path, once it is found.
        status: the status of the answer, once it has begun.
        sent: bytes of the answer's body.
        facts: further facts for the log.
        begun: when it began, in seconds of ``time.perf_counter``.
        gone: whether the client is known to have gone.
    """

    scope: Mapping[str, Any]
    receive: Receive
    send_message: Send
    timeout: float
    claimant: Claimant = field(default_factory=Claimant)
    route: Route | None = None
    status: int = 0
    sent: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)
    gone: bool = False
    _watch: asyncio.Task[None] | None = None
    _waiter: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self._connection: Connection | None = self.scope.get(CONNECTION)
        self.headers: list[tuple[bytes, bytes]] = self.scope["headers"]
        self.named = dict(self.headers)
        self.method: str = self.scope["method"]

    def header(self, name: bytes) -> str | None:
        """Return the value of a header, or None."""
        value = self.named.get(name)
        return None if value is None else headers.text_of(value)

    def with_query(self, url: str) -> str:
        """Return a URL with the query of the request."""
        query = self.scope["query_string"]
        return f"{url}?{query.decode('latin-1')}" if query else url

    # The request's body.

    async def body(self, most: int) -> bytes:
        """Return the whole body.

        Args:
            most: the largest number of bytes.

        Raises:
            Refusal: when it has more, or takes too long.
            ClientGone: when it ends early.
        """
        length = self.named.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise self.too_large(most)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._received()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > most:
                raise self.too_large(most)
        return b"".join(parts)

    @staticmethod
    def too_large(most: int) -> Refusal:
        """Return the refusal of a body that is too large."""
        return Refusal(413, "too_large", f"a request that can be cached has at most {most} bytes", _CLOSE)

    async def _received(self) -> Message:
        try:
            async with asyncio.timeout(self.timeout):
                message = await self.receive()
        except TimeoutError:
            raise Refusal(408, "too_slow", "the body of the request ended early", _CLOSE) from None
        if message["type"] != "http.request":
            raise ClientGone
        return message

    async def chunks(self, taken: asyncio.Future[None]) -> AsyncIterator[bytes]:
        """Iterate over the body as it comes, and note its end."""
        more = True
        while more:
            message = await self._received()
            more = message.get("more_body", False)
            if not more:
                taken.set_result(None)
            if message.get("body"):
                yield message["body"]

    # Clients that leave. They are watched only once the body has been read.

    async def wait_for(self, *work: asyncio.Future[Any]) -> bool:
        """Wait until some work is done or the client has gone; return True if work is done."""
        if any(each.done() for each in work):
            return True
        self._watch_client()
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        for each in work:
            each.add_done_callback(self._wake)
        try:
            if not self.gone:
                await waiter
        finally:
            self._waiter = None
            for each in work:
                if not each.done():
                    each.remove_done_callback(self._wake)
        return any(each.done() for each in work)

    def _wake(self, _work: object = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _watch_client(self) -> None:
        """Learn from now on when the client leaves; another server than ours tells it by a message."""
        connection = self._connection
        if connection is not None:
            connection.leaving.add(self._leave)
            self.gone = connection.lost
        elif self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._gone())

    def _leave(self) -> None:
        self.gone = True
        self._wake()

    async def _gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def close(self) -> None:
        """Stop watching."""
        if self._connection is not None:
            self._connection.leaving.discard(self._leave)
        if self._watch is not None:
            self._watch.cancel()

    # The answer.

    async def start(self, status: int, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers."""
        self.status = status
        pairs = self._connected(pairs)
        await self.send_message({"type": "http.response.start", "status": status, "headers": pairs})

    def _connected(self, pairs: Sequence[tuple[bytes, bytes]]) -> Sequence[tuple[bytes, bytes]]:
        """Return headers that tell a client of HTTP/1.0 whether its connection stays open."""
        if self.scope.get("http_version") != "1.0" or any(name == b"connection" for name, _ in pairs):
            return pairs
        lives = KEEP_ALIVE in self.scope and any(name == b"content-length" for name, _ in pairs)
        return [*pairs, (b"connection", b"keep-alive" if lives else b"close")]

    async def write(self, chunk: bytes, *, more: bool = True) -> None:
        """Send a part of the body, waiting until the client has room for it.

        Raises:
            ClientGone: when the client reads nothing for too long.
        """
        self.sent += len(chunk)
        message = {"type": "http.response.body", "body": chunk, "more_body": more}
        if self._connection is not None:  # which disconnects a client that does not read
            await self.send_message(message)
            return
        try:
            async with asyncio.timeout(self.timeout):
                await self.send_message(message)
        except TimeoutError:
            raise ClientGone from None

    async def answer(self, status: int, pairs: list[tuple[bytes, bytes]], content: bytes) -> None:
        """Send a complete answer. It may wait in memory for a slow client."""
        self.sent += len(content)
        pairs.append((b"content-length", b"%d" % len(content)))
        await self.start(status, pairs)
        await self.send_message({"type": "http.response.body", "body": content})

    async def send_json(
        self, value: Any, status: int = 200, pairs: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Answer with JSON that the proxy makes itself."""
        try:
            content = orjson.dumps(value)
        except TypeError:  # stored values may nest deeply, and contain lone surrogates
            content = json.dumps(value, default=repr).encode()
        await self.answer(status, [JSON, *_PRIVATE, *pairs], content)

    async def stream(self, source: AsyncIterator[bytes]) -> bool:
        """Send the data of a source as it comes; return True if the client received all of it.

        An error of the source is raised once the data before it was sent.
        """
        pump = asyncio.get_running_loop().create_task(self._pump(source))
        try:
            if await self.wait_for(pump):
                pump.result()
                return True
        except ClientGone:
            pass
        finally:
            if not pump.done():
                pump.cancel()
                await asyncio.wait([pump])
            with contextlib.suppress(RuntimeError):  # it is already being closed
                await source.aclose()  # type: ignore[attr-defined]  # all sources are generators
        return False

    async def _pump(self, source: AsyncIterator[bytes]) -> None:
        async for chunk in source:
            await self.write(chunk)
        await self.write(b"", more=False)
