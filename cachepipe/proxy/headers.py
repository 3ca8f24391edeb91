"""Which headers are forwarded: hop-by-hop headers are removed, and our own are added.

Headers are pairs of bytes with lower-case names, as the ASGI specification has them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

Pairs = Sequence[tuple[bytes, bytes]]

_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-authentication-info",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
_NOT_UPSTREAM: Final = frozenset({b"host", b"expect", b"content-length"})
INERT: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'; frame-ancestors 'none'"),
)
"""Headers that prevent a browser from running an answer as a page of the proxy."""

_UNBUFFERED: Final = (b"x-accel-buffering", b"no")  # without it, nginx buffers events
_NOT_BACK: Final = frozenset({b"date", b"server", *(name for name, _ in INERT)})
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # bytes that no server may send in a header
_DECODABLE: Final = frozenset({b"gzip", b"deflate", b"identity", b""})
_OURS: Final = b"x-cachepipe-"
_NGINX: Final = b"x-accel-"  # commands for a server in front of this one
GEMINI_KEY: Final = b"x-goog-api-key"
KEYS: Final = frozenset({b"authorization", b"x-api-key", b"api-key", GEMINI_KEY})
"""The headers with a client's API key."""

_OF_ONE_CALL: Final = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"baggage",
        b"content-type",
        b"cookie",
        b"idempotency-key",
        b"origin",
        b"priority",
        b"referer",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-client-request-id",
        b"x-irid",
        b"x-request-id",
    }
)
_FAMILIES: Final = (b"x-stainless-", b"sec-", b"x-b3-", b"x-datadog-")
_LONGEST: Final = 4000  # bytes of one of our headers; clients refuse answers with longer ones


def to_upstream(headers: Pairs) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request to forward: without hop-by-hop headers, our own, host and length."""
    own = named_by_connection(headers)
    return [
        (name, value.strip(b" \t"))  # such as "Bearer " without a key
        for name, value in headers
        if name not in _HOP and name not in _NOT_UPSTREAM and name not in own and not name.startswith(_OURS)
    ]


def of_question(headers: Pairs) -> list[tuple[bytes, bytes]]:
    """Return the headers to send upstream with a question; the proxy writes the body and the answer."""
    left_out = (b"cookie", b"accept-encoding", b"content-type", b"idempotency-key", b"content-encoding")
    return [pair for pair in to_upstream(headers) if pair[0] not in left_out]


def with_key_of(url: str, pairs: list[tuple[bytes, bytes]]) -> tuple[str, list[tuple[bytes, bytes]]]:
    """Return a URL without the API key that Google takes in a query, and headers with that key."""
    place, mark, query = url.partition("?")
    parts = query.split("&")
    keys = [part.partition("=")[2] for part in parts if part.partition("=")[0] == "key"]
    if not keys:
        return url, pairs
    if not any(name == GEMINI_KEY for name, _ in pairs):
        pairs = [*pairs, (GEMINI_KEY, unquote_to_bytes(keys[-1]))]
    rest = "&".join(part for part in parts if part.partition("=")[0] != "key")
    return f"{place}{mark}{rest}" if rest else place, pairs


def from_upstream(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an upstream's answer that are forwarded with its unchanged bytes."""
    pairs = [(name.lower(), value) for name, value in headers]
    own = named_by_connection(pairs)
    kept = [
        (name, value)
        for name, value in pairs
        if name not in _HOP
        and name not in _NOT_BACK
        and name not in own
        and not name.startswith((_OURS, _NGINX))
        and name != b"cache-status"
        and not _CONTROL.search(value)
    ]
    return with_safety(kept)


def with_safety(pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a provider's answer with those that protect browsers and stop buffering."""
    return [*pairs, *INERT, *([_UNBUFFERED] if is_event_stream(pairs) else [])]


def is_event_stream(pairs: Pairs) -> bool:
    """Return True if the headers of an answer announce an event stream."""
    return any(
        name == b"content-type" and value.strip().lower().startswith(b"text/event-stream")
        for name, value in pairs
    )


def is_encoded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return True if a body has an encoding that the proxy did not ask for, and so is only forwarded."""
    return any(
        coding.strip().lower() not in _DECODABLE
        for name, value in headers
        if name == b"content-encoding"
        for coding in value.split(b",")
    )


def of_answer(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers that are valid for a decoded body, without cookies, which belong to one client."""
    pairs = from_upstream(headers)
    left_out = {b"content-length", b"set-cookie"}
    if not is_encoded(pairs):
        left_out.add(b"content-encoding")
    return [pair for pair in pairs if pair[0] not in left_out]


def named_by_connection(headers: Pairs) -> frozenset[bytes]:
    """Return the names that ``Connection`` declares as hop-by-hop."""
    return frozenset(
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    )


def caller_digest(upstream: str, headers: Pairs) -> bytes:
    """Return a digest that differs between requests that may not share a call; it contains no API key.

    It covers the upstream's name and every header that is sent there, except headers that describe a single
    call and neither grant access nor change the answer.
    """
    kept = [
        b"%d:%b%d:%b" % (len(name), name, len(value), value)
        for name, value in headers
        if name not in _OF_ONE_CALL and not name.startswith(_FAMILIES)
    ]
    kept.sort()
    kept.append(upstream.encode())
    return hashlib.blake2b(b"".join(kept), digest_size=16).digest()


def listed(name: bytes, values: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Return a header that lists values; no header if the list is longer than clients accept."""
    text = ", ".join(values).encode()
    return [(name, text)] if text and len(text) <= _LONGEST else []


def text_of(value: bytes) -> str:
    """Return the text of a header: UTF-8, or Latin-1 if it is not valid UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def values_of(headers: Pairs, name: bytes) -> list[str]:
    """Return the values of the headers with one name, in order."""
    return [text_of(value) for each, value in headers if each == name]
