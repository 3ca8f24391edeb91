"""Passes requests that the cache cannot answer through to the provider."""

from __future__ import annotations

import asyncio
from typing import Any

from cachepipe.proxy import headers
from cachepipe.proxy.cache_headers import status
from cachepipe.proxy.counters import Outcome
from cachepipe.proxy.http_exchange import ClientGone, HttpExchange
from cachepipe.proxy.settings import Upstream
from cachepipe.proxy.upstream import UpstreamClient, UpstreamResponse


async def pass_through(
    client: UpstreamClient, http: HttpExchange, upstream: Upstream, url: str, why: str, content: bytes | None
) -> Outcome:
    """Forward a request unchanged, and its answer as it comes.

    Args:
        client: the connections.
        http: the request.
        upstream: its upstream.
        url: its URL there.
        why: why the cache does not answer it, as in ``cache-status``.
        content: its body, if it was read already.

    Raises:
        ClientGone: when the client leaves before the end of the answer.
    """
    loop = asyncio.get_running_loop()
    pairs = upstream.credited(headers.to_upstream(http.headers))
    sent: Any = content
    taken: asyncio.Future[None] = loop.create_future()
    if content is None:
        length = http.named.get(b"content-length", b"0")
        if length != b"0":
            pairs.append((b"content-length", length))
        if length != b"0" or b"transfer-encoding" in http.named:
            sent = http.chunks(taken)
    call = loop.create_task(client.call(upstream, http.method, url, pairs, sent))
    try:
        if sent is not content:  # a client is watched only once its body has been read
            await asyncio.wait((call, taken), return_when=asyncio.FIRST_COMPLETED)
        if not await http.wait_for(call):
            raise ClientGone
        response = await call
    finally:
        call.cancel()  # unless it has ended
    try:
        await http.start(response.status, [*_headers_of(response), status(why)])
        if not await http.stream(response.aiter_raw()):
            raise ClientGone
    finally:
        await response.aclose()
    return "passed"


def _headers_of(response: UpstreamResponse) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer, without the length of a body that its status excludes."""
    pairs = headers.from_upstream(response.pairs)
    if response.status not in (204, 304):
        return pairs
    return [pair for pair in pairs if pair[0] != b"content-length"]
