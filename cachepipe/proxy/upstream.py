"""Calls to the providers: the connections, their errors, and the exchange that makes the calls."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import httpx2 as httpx

from cachepipe import jsontext, outages, wire
from cachepipe.contract.draws import Retried
from cachepipe.errors import CachepipeError
from cachepipe.providers.exchange import CacheView, Exchange
from cachepipe.providers.generation import Kept, Made
from cachepipe.providers.responses import BodySource, Received
from cachepipe.proxy import headers
from cachepipe.proxy.body_cache import ParsedBody
from cachepipe.proxy.head_cache import ParsedHead
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.runs import Occurrences
from cachepipe.typedefs import Mode

_JSON: Final = (b"content-type", b"application/json")
_PLAIN: Final = (b"accept-encoding", b"identity")  # compressed events would arrive in clumps
_PACKED: Final = (b"accept-encoding", b"gzip, deflate")


class UpstreamRefusal(CachepipeError):  # noqa: N818 - names what it holds
    """An upstream answered with an error status; the answer is forwarded unchanged.

    Attributes:
        status_code: the status.
        pairs: the headers.
        headers: the same headers as a mapping of texts, for the flow control.
        content: the body.
    """

    def __init__(self, upstream: str, status: int, pairs: list[tuple[bytes, bytes]], content: bytes) -> None:
        super().__init__(f"the upstream {upstream!r} answered with status {status}")
        self.status_code = status
        self.pairs = pairs
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}
        self.content = content


class UpstreamUnreachable(CachepipeError):  # noqa: N818 - names what happened
    """An upstream could not be reached, or closed the connection before its answer was complete."""


class UpstreamTimeout(UpstreamUnreachable):
    """An upstream took too long."""


class UpstreamResponse:
    """A response of an upstream with a body that is read as it comes; it counts as a call in flight."""

    def __init__(self, response: Any, upstream: str, url: str, release: Callable[[], None]) -> None:
        self.response = response
        self.headers = response.headers
        self.status: int = response.status_code
        self.http_version: str = response.http_version
        self.pairs: list[tuple[bytes, bytes]] = [(name.lower(), value) for name, value in self.headers.raw]
        """The headers as they came, by lower-case names."""
        self._place = upstream, url
        self._release = release

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the decoded body; if its encoding was not asked for, over the raw body."""
        return self.aiter_raw() if headers.is_encoded(self.pairs) else self._read(self.response.aiter_bytes())

    def aiter_raw(self) -> AsyncIterator[bytes]:
        """Iterate over the raw body."""
        return self._read(self.response.aiter_raw())

    async def _read(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async with _translated(*self._place):
            async for chunk in chunks:
                yield chunk

    async def aread(self, most: int) -> bytes | BodySource:
        """Return the body and close the response; for a body of more than ``most`` bytes, return a source."""
        chunks = self.aiter_bytes()
        begun: deque[bytes] = deque()
        size = 0
        try:
            async for chunk in chunks:
                begun.append(chunk)
                size += len(chunk)
                if size > most:
                    return _UnreadBody(self, begun, chunks)
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        return b"".join(begun)

    async def aclose(self) -> None:
        """Release the connection."""
        self._release()
        with contextlib.suppress(httpx.HTTPError):
            await self.response.aclose()


class _UnreadBody(BodySource):
    """A body that is too large to be kept: the part that was read, then the rest as it comes."""

    def __init__(self, reader: UpstreamResponse, begun: deque[bytes], chunks: AsyncIterator[bytes]) -> None:
        super().__init__()
        self._reader = reader
        self._begun = begun
        self._chunks = chunks
        self._closing: asyncio.Task[None] | None = None

    async def aread(self) -> AsyncIterator[bytes]:
        """Iterate over the body."""
        try:
            while self._begun:
                yield self._begun.popleft()
            async for chunk in self._chunks:
                yield chunk
        finally:
            await self._reader.aclose()

    def leave(self) -> None:
        """Release the connection."""
        self._begun.clear()
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._reader.aclose())


@contextlib.asynccontextmanager
async def _translated(upstream: str, url: str) -> AsyncIterator[None]:
    """Turn an error of the connection into one of ours, which contains no header."""
    where = f"the upstream {upstream!r} at {outages.public_url(url)}"
    try:
        yield
    except httpx.TimeoutException as error:
        outages.failed(error, url)
        raise UpstreamTimeout(
            f"{where} took too long ({type(error).__name__}); try again, or raise --timeout"
        ) from None
    except httpx.LocalProtocolError:  # its message may contain a key
        raise UpstreamUnreachable(f"a header of this request cannot be sent to {where}") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ssl.SSLError, OSError) as error:
        outages.failed(error, url)
        raise UpstreamUnreachable(
            f"{where} could not be reached, or closed the connection: {type(error).__name__}: {error}"
        ) from None


class UpstreamClient:
    """The connections to the upstreams of a proxy."""

    def __init__(self, settings: ProxySettings) -> None:
        self.most = settings.max_answer
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=settings.max_calls, keepalive_expiry=30.0
        )
        timeout = httpx.Timeout(settings.timeout, connect=settings.connect_timeout, pool=None)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, follow_redirects=False)
        # A cookie jar would send the cookies of one client with the requests of another.
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._client.headers.clear()
        names = [upstream.name for upstream in settings.upstreams]
        self._slots = {name: asyncio.Semaphore(settings.max_calls) for name in names}
        self.calls = dict.fromkeys(names, 0)
        self.in_flight = dict.fromkeys(names, 0)

    async def call(
        self,
        upstream: Upstream,
        method: str,
        url: str,
        pairs: Sequence[tuple[bytes, bytes]],
        content: bytes | AsyncIterator[bytes] | None,
    ) -> UpstreamResponse:
        """Return an upstream's answer with its body unread; the caller closes it.

        Raises:
            UpstreamUnreachable: when there is no answer.
        """
        name = upstream.name
        await self._slots[name].acquire()
        self.calls[name] += 1
        self.in_flight[name] += 1
        with contextlib.ExitStack() as stack:
            stack.callback(self._release, name)
            async with _translated(name, url):
                request = self._client.build_request(method, url, headers=list(pairs), content=content)
                response = await self._client.send(request, stream=True)
            outages.reached(url)
            release = stack.pop_all().close
        answer = UpstreamResponse(response, name, url, release)
        if not 200 <= answer.status < 600:
            await answer.aclose()
            raise UpstreamUnreachable(
                f"the upstream {name!r} answered with status {answer.status}, which is not valid"
            )
        return answer

    def _release(self, name: str) -> None:
        self.in_flight[name] -= 1
        self._slots[name].release()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class ProxyExchange(Exchange):
    """A request to the proxy that the cache may answer.

    Args:
        client: the connections.
        spend: counts the samples of its calls: takes the namespace, samples and the URL.
        view: the cache, and how it is used.
        head: the head of the request.
        body: its body.
        mode: how the cache is used.
        run: the run that it belongs to.
        counter: counts the occurrences of its draws; by default the run.
    """

    def __init__(
        self,
        client: UpstreamClient,
        spend: Callable[[str | None, Sequence[wire.Sample], str], None],
        view: CacheView,
        head: ParsedHead,
        body: ParsedBody,
        mode: Mode,
        run: Occurrences,
        counter: Retried | None = None,
    ) -> None:
        super().__init__(
            view,
            head.api,
            body.body,
            body.asks,
            head.url,
            head.key_headers,
            stream=body.asks[0].stream,
            alone=False,
            mode=mode,
            claimant=head.claimant,
            questions=body.questions,
            run=run,
            counter=counter,
        )
        self.head = head
        self._client = client
        self._spend = spend

    def most(self) -> int:
        """Return the largest size in bytes of an answer that is kept in memory."""
        return self._client.most

    def keep(self) -> None:
        """Keep the body without copying it: it was read from the wire, so nothing else can change it."""

    def _packed(self, samples: Sequence[wire.Sample], made: Made) -> list[Kept]:
        """Count the samples of a call, and return them in the form in which they are stored."""
        self._spend(self.claimant.namespace, samples, self.head.url)
        return super()._packed(samples, made)

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:
        """Make a call with this request's own headers."""
        pairs = [*self.head.pairs, _JSON, _PLAIN if stream else _PACKED]
        upstream, url = self.head.upstream, self.head.url
        reader = await self._client.call(upstream, "POST", url, pairs, jsontext.dumps(body))
        if stream and 200 <= reader.status < 300:
            return Received(reader, {})
        content = await reader.aread(self.most())
        if not 200 <= reader.status < 300:
            pairs = headers.of_answer(reader.pairs)
            if isinstance(content, BodySource):
                content.leave()
                content = b"The upstream's error has more than %d bytes, and is left out.\n" % self.most()
                pairs = headers.of_answer([(b"content-type", b"text/plain; charset=utf-8")])
            raise UpstreamRefusal(upstream.name, reader.status, pairs, content)
        return Received(reader, {}, content)
