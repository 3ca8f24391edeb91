"""How a fault changes an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import orjson

from cachepipe.testing.server.dialects import dialect_of
from cachepipe.testing.server.refusals import RefusalError, retry_after
from cachepipe.testing.server.replies import HttpReply, refused

if TYPE_CHECKING:
    from cachepipe.testing.server.answers import EventStream
    from cachepipe.testing.server.settings import Fault

__all__ = ["choices_left", "events_left", "reply_instead", "spoil"]

_STATUS: Final = {"rate_limit": 429, "error": 500, "unavailable": 503, "status": 500}


def reply_instead(fault: Fault, path: str) -> HttpReply | None:
    """Return the reply that replaces the answer, or None if the fault only changes the answer."""
    if fault.kind == "drop":
        return HttpReply(status=0, parts=[], headers=[], broken=True)
    return refused(path, _refusal(fault)) if fault.kind in _STATUS else None


def choices_left(count: int, fault: Fault | None) -> int:
    """Return the number of choices that remain of `count`."""
    if fault is None or fault.kind != "short":
        return count
    return min(count, count - 1 if fault.keep is None else fault.keep)


def spoil(reply: HttpReply, fault: Fault, path: str) -> None:
    """Apply a fault to an answer; none of its samples counts as delivered.

    `events_left` applies it to the events of a stream.
    """
    if fault.kind == "short":
        return
    reply.samples = 0
    if reply.stream:
        return
    whole = reply.parts[0]
    if fault.kind in {"cut", "truncate"}:
        # The announced length is that of the whole answer, so the client notices that a part is missing.
        reply.headers.append((b"content-length", str(len(whole)).encode()))
        reply.parts = [whole[: len(whole) // 2]]
        reply.broken = True
    elif fault.kind == "malformed":
        reply.parts = [whole[: len(whole) * 2 // 3]]
    else:
        reply.parts = [orjson.dumps(dialect_of(path).error(_refusal(fault)))]


def events_left(stream: EventStream, fault: Fault | None, path: str) -> list[bytes]:
    """Return the events of a stream that reach the client."""
    if fault is None or fault.kind == "short":
        return stream.content + stream.ending
    after = (len(stream.content) + 1) // 2 if fault.after is None else fault.after
    content = stream.content[:after]
    if fault.kind == "malformed":
        following = stream.content[after:] or stream.ending
        return [*content, following[0][: len(following[0]) * 2 // 3] + b"\n\n", *following[1:]]
    if fault.kind == "error_200":
        return [*content, dialect_of(path).error_event(_refusal(fault), after)]
    return content


def _refusal(fault: Fault) -> RefusalError:
    status = fault.status or _STATUS.get(fault.kind, 500)
    wait = fault.retry_after
    if wait is None and status in {429, 503}:
        wait = 1.0
    kind, code = "invalid_request_error", None
    if status == 429:
        kind, code = "requests", "rate_limit_exceeded"
    elif status >= 500:
        kind = "server_error"
    headers = () if wait is None else retry_after(wait)
    return RefusalError(status, fault.message, kind=kind, code=code, headers=headers)
