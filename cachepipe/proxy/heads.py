"""The fast path: what a request's head says is read once; the same head again says the same.

The requests of one client differ in little but their bodies. So what the application made of a head is kept
by its bytes, all but the length of the body; where those come again, whole and in order, nothing of them
is parsed, checked or looked up a second time. A question whose answer is known is then answered at once, by
the protocol itself. Everything else goes the ordinary way.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

HEAD: Final = "cachepipe.head"
"""Where a scope has its head without the body's length, if what that means may be kept."""

_END: Final = b"\r\n\r\n"
_LENGTHS: Final = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH: Final = len(_LENGTHS[0])
_LARGEST_HEAD: Final = 8192  # bytes of a head that is kept
_LARGEST_BODY: Final = 32 << 10  # bytes of a body that is waited for; others go the ordinary way
_MOST: Final = 1024  # heads that are kept


class Asked(NamedTuple):
    """What a request begins with.

    Attributes:
        name: its head without the body's length.
        end: where its body begins.
        size: the length of its body.
    """

    name: bytes
    end: int
    size: int


def asked(data: bytes) -> Asked | None:
    """Return what bytes from a connection begin with, if that is the whole head of a request with a body."""
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
    return Asked(data[:at] + data[stop:end], end, size) if size <= _LARGEST_BODY else None


def is_plain(name: bytes) -> bool:
    """Tell whether every HTTP parser finds the same lines in a head: no folded ones, nor lone line feeds."""
    return (
        name.count(b"\n") == name.count(b"\r\n") == name.count(b"\r")
        and b"\n " not in name
        and b"\n\t" not in name
    )


class Heads(dict[bytes, Any]):
    """What was made of the heads that came last, by their bytes without the body's length."""

    def keep(self, name: bytes, meaning: Any) -> None:
        """Keep what a head means, in place of the one that came first."""
        if len(self) >= _MOST:
            del self[next(iter(self))]
        self[name] = meaning
