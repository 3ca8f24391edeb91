"""HTTP requests as they were read, and replies before they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cachepipe.testing.server.dialects import dialect_of
from cachepipe.testing.server.refusals import RefusalError

__all__ = ["HttpReply", "HttpRequest", "json_reply", "refused", "stream_reply"]

_JSON: Final = (b"content-type", b"application/json")
_EVENTS: Final = (b"content-type", b"text/event-stream; charset=utf-8")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP request, read to its end.

    The path has `{id}` in place of the model that a Gemini request names; the target is as it came.
    """

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    body: bytes
    arrived: float
    since: float
    target: str = ""

    def allow(self, *methods: str) -> None:
        """Raise `RefusalError` for other methods."""
        if self.method not in methods:
            raise RefusalError(
                405,
                f"Expected {' or '.join(methods)} here, but got {self.method}.",
                code="method_not_allowed",
                headers=((b"allow", ", ".join(methods).encode()),),
            )

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object. Raise `RefusalError` for another body."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise RefusalError(
                400, f"Expected a JSON object as the body, but could not parse it: {error}."
            ) from error
        if not isinstance(value, dict):
            raise RefusalError(400, f"Expected a JSON object as the body, but got {type(value).__name__}.")
        return value


@dataclass(slots=True, kw_only=True)
class HttpReply:
    """A reply, its delays, and what is counted once it is written.

    `parts` is the whole body, or the events of a stream. With `broken`, the connection closes after
    the last part, as if more would follow; with `status` 0 it closes without a byte. A reply that is `held`
    waits while the server is paused.
    """

    status: int
    parts: Sequence[bytes]
    headers: list[tuple[bytes, bytes]]
    stream: bool = False
    broken: bool = False
    held: bool = False
    delay: float = 0.0
    pace: float = 0.0
    samples: int = 0
    n: int = 1
    fault: str | None = None


def json_reply(value: object, status: int = 200) -> HttpReply:
    """Return a reply with a JSON body."""
    return HttpReply(status=status, parts=[orjson.dumps(value)], headers=[_JSON])


def stream_reply(events: Sequence[bytes], *, array: bool = False) -> HttpReply:
    """Return a reply that is a stream of these events, or of the parts of a JSON array."""
    headers = [_JSON if array else _EVENTS, (b"cache-control", b"no-cache")]
    return HttpReply(status=200, parts=events, headers=headers, stream=True)


def refused(path: str, refusal: RefusalError) -> HttpReply:
    """Return the error reply to a refused request, in the dialect of its path."""
    dialect = dialect_of(path)
    reply = json_reply(dialect.error(refusal), refusal.status)
    if dialect.error_headers:
        reply.headers += refusal.headers
    return reply
