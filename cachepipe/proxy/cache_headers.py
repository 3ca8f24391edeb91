"""The headers that say what the cache did: ``cache-status`` (RFC 9211) and ``x-cachepipe-…``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cachepipe import wire
from cachepipe.providers.exchange import id_header
from cachepipe.providers.generation import Answer
from cachepipe.providers.info import per_sample
from cachepipe.proxy import headers
from cachepipe.proxy.headers import listed
from cachepipe.proxy.upstream import ProxyExchange

Pairs = list[tuple[bytes, bytes]]

_WORDS: Final = {True: "true", False: "false"}
_ONE_HIT: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    + b"".join(b"%b: %b\r\n" % pair for pair in headers.INERT)
    + b"%bx-cachepipe-key: %b\r\n"
    b"x-cachepipe-duplicated: %b\r\nx-cachepipe-cached: true\r\nx-cachepipe-indices: %d\r\n"
    b"cache-status: cachepipe; hit\r\ncontent-length: %d\r\n\r\n%b"
)


def one_hit(
    api: wire.Api, call: str | None, key: str, index: int, content: bytes, *, duplicated: bool
) -> bytes:
    """Return the whole response with one stored sample, as HTTP/1.1.

    Args:
        api: the API of the request.
        call: the id of the call that generated the sample, if known.
        key: the key of the question.
        index: the index of the sample.
        content: the body.
        duplicated: the flag of the sample.
    """
    made_by = b"".join([b"%b: %b\r\n" % pair for pair in call_id(api, call)])
    flag = b"true" if duplicated else b"false"
    return _ONE_HIT % (made_by, key.encode(), flag, index, len(content), content)


def status(text: str) -> tuple[bytes, bytes]:
    """Return the header ``cache-status``."""
    return b"cache-status", f"cachepipe; {text}".encode()


def call_id(api: wire.Api, name: str | None) -> Pairs:
    """Return the header with the id of the call that generated an answer, if known."""
    return [] if name is None else [(id_header(api).encode(), name.encode("latin-1", "replace"))]


def describing(exchange: ProxyExchange, answer: Answer, *, stores: bool) -> Pairs:
    """Return the headers that describe where an answer comes from.

    Args:
        exchange: the exchange.
        answer: its answer.
        stores: whether new samples are stored.
    """
    if not answer.kept:
        return [status("fwd=miss")]
    stored = "; stored" if stores else ""
    responses = exchange.record.responses
    if responses is None:  # a stream that this request alone generates
        n = exchange.asks[0].n
        arrived = () if answer.arrived is None else answer.arrived.response.pairs
        if not headers.is_event_stream(arrived):
            stored = ""  # what has come instead is not an answer
        pairs = _flags(exchange.record.keys, [False] * n, [False, *[True] * (n - 1)], exchange.claimed)
        return [*pairs, status(f"fwd=miss{stored}")]
    facts = per_sample(responses)
    cached = facts["cached"]
    pairs = _flags(exchange.record.keys, cached, facts["duplicated"], facts["indices"])
    if all(cached):
        return [*pairs, status("hit")]
    return [*pairs, status(f"fwd={'partial' if any(cached) else 'miss'}{stored}")]


def _flags(
    keys: Sequence[str], cached: Sequence[bool], duplicated: Sequence[bool], indices: Sequence[int] | None
) -> Pairs:
    return [
        *listed(b"x-cachepipe-key", keys),
        *listed(b"x-cachepipe-duplicated", [_WORDS[flag] for flag in duplicated]),
        *listed(b"x-cachepipe-cached", [_WORDS[flag] for flag in cached]),
        *listed(b"x-cachepipe-indices", list(map(str, indices or ()))),
    ]
