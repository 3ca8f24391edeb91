"""The fast path: a cache of parsed request heads.

The requests of one client usually differ in their bodies only. So the proxy keeps the meaning of a head by
its bytes, except the length of the body. Equal bytes are not parsed, checked or looked up again, and if the
answer is known, the protocol itself answers at once. All other requests are served the normal way.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

HEAD: Final = "cachepipe.head"
"""The key of an ASGI scope for the head without the body's length, if its meaning may be kept."""

_END: Final = b"\r\n\r\n"
_LENGTHS: Final = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH: Final = len(_LENGTHS[0])
_LARGEST_HEAD: Final = 8192  # bytes of a head that is kept
_LARGEST_BODY: Final = 32 << 10  # bytes of a body on the fast path; larger ones are served the normal way
_MOST: Final = 1024  # heads that are kept


class RequestStart(NamedTuple):
    """The beginning of a request.

    Attributes:
        name: its head without the body's length.
        end: where its body begins.
        size: the length of its body.
    """

    name: bytes
    end: int
    size: int


def split_head(data: bytes) -> RequestStart | None:
    """Return the beginning of a request, if the bytes contain the whole head of a request with a body."""
    end = data.find(_END) + 4
    if not 4 < end <= _LARGEST_HEAD:
        return None
    at = data.find(_LENGTHS[0], 0, end)
    if at < 0:
        at = data.find(_LENGTHS[1], 0, end)
        if at < 0:
            return None
    stop = data.find(b"\r\n", at + 2)
    length = data[at + _LENGTH : stop]
    if not length.isdigit() or len(length) > 5:
        return None
    size = int(length)
    return RequestStart(data[:at] + data[stop:end], end, size) if size <= _LARGEST_BODY else None


def is_plain(name: bytes) -> bool:
    """Return True if every HTTP parser finds the same lines in a head: none folded, no lone line feeds."""
    return (
        name.count(b"\n") == name.count(b"\r\n") == name.count(b"\r")
        and b"\n " not in name
        and b"\n\t" not in name
    )


class HeadCache(dict[bytes, Any]):
    """The meanings of the most recent heads, by their bytes without the body's length."""

    def keep(self, name: bytes, meaning: Any) -> None:
        """Keep the meaning of a head, and forget the oldest one if there are too many."""
        if len(self) >= _MOST:
            del self[next(iter(self))]
        self[name] = meaning
