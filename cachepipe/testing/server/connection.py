"""HTTP/1.1 over one connection, through h11: bytes become requests, and replies become bytes, with delays."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, cast

import h11

from cachepipe.testing.server.dialects import known_path
from cachepipe.testing.server.refusals import RefusalError
from cachepipe.testing.server.replies import HttpReply, HttpRequest, refused

if TYPE_CHECKING:
    from cachepipe.testing.server.responder import Responder
    from cachepipe.testing.server.traffic import Traffic

__all__ = ["HttpConnection"]

_BACKLOG: Final = 256 * 1024  # bytes that a client may send before the answer to its last request
_LINGER: Final = 2.0  # seconds that a client has to read a refusal before the connection is closed
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


class HttpConnection(asyncio.Protocol):
    """One connection, which h11 parses and frames, with one request after the other.

    Args:
        responder: Decides the replies.
        traffic: Counts the connection and its requests.
    """

    def __init__(self, responder: Responder, traffic: Traffic) -> None:
        self._responder, self._traffic = responder, traffic
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self._head: h11.Request | None = None
        self._arrived = (0.0, 0.0)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._answering: tuple[HttpRequest, HttpReply] | None = None
        self._task: asyncio.Task[None] | None = None
        self._discarding = False

    async def close(self) -> None:
        """Close the connection and wait until it is closed."""
        if self._transport is not None:
            self._transport.abort()
            await self._closed

    # -- what asyncio calls -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection; asyncio has already set TCP_NODELAY on the socket."""
        self._transport = cast("asyncio.Transport", transport)
        if self._traffic.closing:  # the connection was accepted just before the listener was closed
            self._transport.abort()
        self._traffic.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio names it
        """End the connection; the client has left a request in flight."""
        self._transport = None
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._ended(499)
        self._traffic.closed(self)
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """Pause the events of a stream."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Continue the events of a stream."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Read bytes, and the requests that they complete."""
        if self._discarding:
            return
        self._http.receive_data(data)
        if self._answering is None:
            self._advance()
        elif len(self._http.trailing_data[0]) > _BACKLOG and self._transport is not None:
            self._transport.pause_reading()

    # -- requests -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read what has arrived, up to a request that has to wait for its answer."""
        try:
            while self._answering is None and self._transport is not None and not self._discarding:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self._take(event)
        except h11.RemoteProtocolError as error:
            self._reject(RefusalError(error.error_status_hint, f"This is not HTTP as expected: {error}."))

    def _take(self, event: h11.Event | type[h11.NEED_DATA | h11.PAUSED]) -> None:
        if isinstance(event, h11.Request):
            self._take_head(event)
        elif isinstance(event, h11.Data):
            self._size += len(event.data)
            if not self._too_large(self._size):
                self._body.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self._dispatch()
        elif self._transport is not None:  # the client has closed its side
            self._transport.close()

    def _take_head(self, head: h11.Request) -> None:
        self._head = head
        self._arrived = (time.time(), time.perf_counter())
        self._body, self._size = [], 0
        self._headers = dict(head.headers)
        if self._too_large(int(self._headers.get(b"content-length", b"0"))):
            return
        if self._http.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            self._write(self._http.send(go_on) or b"")

    def _too_large(self, size: int) -> bool:
        limit = self._responder.settings.max_body
        if size > limit:
            self._reject(
                RefusalError(413, f"Expected a body of at most {limit} bytes, but got {size} or more.")
            )
        return size > limit

    def _reject(self, refusal: RefusalError) -> None:
        """Answer a request that was not read to its end, after which the connection cannot be used."""
        if self._transport is None:
            return
        path = self._path()
        reply = refused(path, refusal)
        if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            reply.headers.append((b"connection", b"close"))
            self._begun(HttpRequest("", path, {}, b"", *self._arrived), reply)
            self._transport.write(self._whole(reply))
            self._ended(reply.status)
        # The server reads and drops what the client still sends: closing at once would reset the
        # connection, and with it the answer that the client has not read yet.
        self._discarding = True
        asyncio.get_running_loop().call_later(_LINGER, self._transport.close)

    def _path(self) -> str:
        return known_path(self._target().partition("?")[0])

    def _target(self) -> str:
        return self._head.target.decode("ascii", "replace") if self._head else ""

    def _dispatch(self) -> None:
        head = self._head
        if head is None:  # h11 has no end of a reply without its beginning
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        request = HttpRequest(
            head.method.decode(), self._path(), self._headers, body, *self._arrived, self._target()
        )
        reply = self._responder.reply(request)
        self._begun(request, reply)
        if reply.delay or reply.pace or (reply.held and not self._responder.running.is_set()):
            self._task = asyncio.get_running_loop().create_task(self._later(reply))
        elif self._transport is not None:
            self._write_whole(reply)
            self._finish(reply)

    # -- replies ------------------------------------------------------------------------------------

    async def _later(self, reply: HttpReply) -> None:
        """Write a reply after its delay, event by event if they have a delay too."""
        if reply.delay:
            await asyncio.sleep(reply.delay)
        if reply.held:
            await self._responder.running.wait()
        if reply.status and reply.pace:
            await self._write_in_parts(reply)
        else:
            self._write_whole(reply)
        self._task = None
        self._finish(reply)
        self._advance()

    def _write_whole(self, reply: HttpReply) -> None:
        """Write a reply, unless the connection is dropped instead."""
        if reply.status:
            whole = self._whole(reply)
            self._ended(reply.status)  # first, so that the request is counted once its client has the answer
            self._write(whole)

    async def _write_in_parts(self, reply: HttpReply) -> None:
        self._write(self._start(reply))
        for number, part in enumerate(reply.parts):
            if number:
                await asyncio.sleep(reply.pace)
            await self._writable.wait()
            if number == len(reply.parts) - 1:
                self._ended(reply.status)
            self._write(self._http.send(h11.Data(data=part)) or b"")
        if not reply.broken:
            self._write(self._http.send(h11.EndOfMessage()) or b"")

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _start(self, reply: HttpReply) -> bytes:
        headers = [*reply.headers, (b"date", _date(int(time.time())))]
        if not reply.stream and not reply.broken:
            headers.append((b"content-length", str(len(reply.parts[0])).encode()))
        reason = _REASONS.get(reply.status, b"")
        return self._http.send(h11.Response(status_code=reply.status, headers=headers, reason=reason)) or b""

    def _whole(self, reply: HttpReply) -> bytes:
        """Return the head and the body together, to send them at once."""
        head = self._start(reply)
        body = reply.parts[0] if len(reply.parts) == 1 else b"".join(reply.parts)
        if self._head is not None and self._head.method == b"HEAD":
            body = b""
        content = self._http.send(h11.Data(data=body)) or b""
        if reply.broken:
            return head + content
        return head + content + (self._http.send(h11.EndOfMessage()) or b"")

    def _finish(self, reply: HttpReply) -> None:
        """Prepare the connection for the next request, or close it."""
        self._ended(reply.status)
        transport = self._transport
        if transport is None:
            return
        if reply.broken or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            transport.close()
            return
        self._http.start_next_cycle()
        self._head = None
        transport.resume_reading()

    # -- counting -----------------------------------------------------------------------------------

    def _begun(self, request: HttpRequest, reply: HttpReply) -> None:
        self._answering = (request, reply)
        self._traffic.begun(request)

    def _ended(self, status: int) -> None:
        """Count the request that is being answered, unless it is counted."""
        if self._answering is not None:
            request, reply = self._answering
            self._answering = None
            self._traffic.ended(request, reply, status)


_dates: dict[int, bytes] = {}


def _date(second: int) -> bytes:
    """Return the time as HTTP writes it, formatted once a second."""
    if second not in _dates:
        _dates.clear()
        _dates[second] = formatdate(second, usegmt=True).encode()
    return _dates[second]
