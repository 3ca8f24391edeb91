"""Passes requests that the cache cannot answer through to the provider."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from cachepipe.flow import Budget
from cachepipe.proxy import headers
from cachepipe.proxy.cache_headers import status
from cachepipe.proxy.counters import Outcome
from cachepipe.proxy.http_exchange import NEVER_AGAIN, ClientGone, HttpExchange, Refusal
from cachepipe.proxy.settings import Upstream
from cachepipe.proxy.upstream import UpstreamClient, UpstreamResponse

_FREE: Final = ("/messages/count_tokens", ":countTokens", "/files", "/uploads")
"""The endings of paths whose requests generate nothing."""


def check_counted(budget: Budget | None, http: HttpExchange, url: str) -> None:
    """Refuse a request that may cost something that its namespace's budget cannot count.

    What passes through is not stored, and budgets count what is stored.

    Args:
        budget: the budgets of the proxy.
        http: the request.
        url: its URL at the upstream.

    Raises:
        Refusal: when the namespace has a budget, and the request may cost something.
    """
    if budget is None or http.method != "POST" or url.partition("?")[0].endswith(_FREE):
        return
    namespace = http.claimant.namespace
    limit = budget.limit(namespace)
    if limit is not None:
        message = (
            f"the namespace {namespace!r} has a budget of ${limit:g}, and the cost of this request cannot be "
            "counted, because its answer is not cached. No call was made. Use a namespace without a budget, "
            "or ask the provider itself"
        )
        raise Refusal(402, "not_counted", message, [NEVER_AGAIN])


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
