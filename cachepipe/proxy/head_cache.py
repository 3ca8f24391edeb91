"""The fast path: a cache of parsed request heads.

The requests of one client usually differ in their bodies only. So the proxy keeps the meaning of a head by
its bytes, except the length of the body. Equal bytes are not parsed, checked or looked up again, and if the
answer is known, the protocol itself answers at once. All other requests are served the normal way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from cachepipe import wire
from cachepipe.contract.draws import Claimant
from cachepipe.proxy.paths import Destination
from cachepipe.proxy.settings import Upstream

HEAD: Final = "cachepipe.head"
"""The key of an ASGI scope for the head without the body's length, if its meaning may be kept."""

_END: Final = b"\r\n\r\n"
_LENGTHS: Final = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH: Final = len(_LENGTHS[0])
_LARGEST_HEAD: Final = 8192  # bytes of a head that is kept
_LARGEST_BODY: Final = 32 << 10  # bytes of a body on the fast path; larger ones are served the normal way
_MOST: Final = 1024  # heads that are kept


class ParsedHead(NamedTuple):
    """The meaning of the head of a request that the cache may answer, without the body that follows it.

    Attributes:
        destination: the parts of the path.
        upstream: the upstream.
        api: the API.
        url: the URL at the upstream.
        key_headers: the headers that are part of the question.
        claimant: who draws.
        pairs: the headers of a call, including credentials.
        caller: a digest of everything in them that may not be shared with other callers.
        scope: the method and the headers, as ASGI has them.
    """

    destination: Destination
    upstream: Upstream
    api: wire.Api
    url: str
    key_headers: Mapping[str, str]
    claimant: Claimant
    pairs: list[tuple[bytes, bytes]]
    caller: bytes
    scope: Mapping[str, Any]


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


class HeadCache(dict[bytes, ParsedHead]):
    """The most recent parsed heads, by their bytes without the body's length."""

    def keep(self, name: bytes, head: ParsedHead) -> None:
        """Keep a parsed head, and forget the oldest one if there are too many."""
        if len(self) >= _MOST:
            del self[next(iter(self))]
        self[name] = head
