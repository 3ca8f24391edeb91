"""A provider's HTTP response, whichever client received it, and the source of its body."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, NamedTuple

_FRAMED = frozenset({"HTTP/2", "HTTP/3"})
"""The versions of HTTP that mark the end of each body."""


class Received(NamedTuple):
    """A response that the SDK has received and not parsed yet.

    Attributes:
        response: the HTTP response.
        details: the other arguments of ``_process_response``.
        content: its body; empty for a stream, and a source for a body that is too large to be kept.
    """

    response: Any
    details: dict[str, Any]
    content: bytes | BodySource = b""


class BodySource:
    """The source of the body of a response that is made here: bytes in memory.

    Subclasses read a recorded stream.
    """

    def __init__(self, chunks: Iterable[bytes] = ()) -> None:
        self.chunks = chunks

    def read(self) -> Iterator[bytes]:
        """Iterate over the body in a thread."""
        return iter(self.chunks)

    async def aread(self) -> AsyncIterator[bytes]:
        """Iterate over the body on a loop."""
        for chunk in self.read():
            yield chunk

    def leave(self) -> None:
        """Note that the reader has stopped."""

    async def aleave(self) -> None:
        """Note that the reader has stopped, on a loop."""
        self.leave()

    def closing(self) -> None:
        """Note that the response is about to be closed; it may be closed already."""


def broken(error: Exception) -> BodySource:
    """Return a body that was lost in transit: reading it raises the error."""

    def lost(_: bytes) -> bytes:
        raise error

    return BodySource(map(lost, (b"",)))


def ends_in_order(response: Any) -> bool:
    """Return True if a body has a length or a last chunk, so that its end is not a broken connection.

    The HTTP library raises an error for a body that ends early.
    """
    headers = response.headers
    return (
        "content-length" in headers
        or "chunked" in headers.get("transfer-encoding", "").lower()
        or response.http_version in _FRAMED
    )


def take_read_timeout(response: Any, longest: float) -> float | None:
    """Return the read time-out of a response, and raise that of its connection.

    A time-out of the connection closes it, and the rest of the stream is lost. So the reader of a recorded
    stream has a time-out of its own (see `read_timeout`).

    Args:
        response: the response, its body unread.
        longest: the new time-out of the connection, if the present one is shorter.
    """
    try:
        timeouts = response.request.extensions["timeout"]
        seconds: float | None = timeouts["read"]
    except (AttributeError, KeyError, RuntimeError):  # the sender has no time-outs
        return None
    if seconds is not None:
        timeouts["read"] = max(seconds, longest)
    return seconds


def read_timeout(response: Any) -> Exception:
    """Return the error that the HTTP library raises if a body does not arrive in time."""
    library = importlib.import_module(type(response.request).__module__.partition(".")[0])
    error: Exception = library.ReadTimeout("The read operation timed out", request=response.request)
    return error


def hang_up(response: Any) -> None:
    """Make a thread that waits for a body fail at once, unless other responses use the connection."""
    if response.http_version in _FRAMED:
        return
    with contextlib.suppress(AttributeError, KeyError, OSError):
        stream = response.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
