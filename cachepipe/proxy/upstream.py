"""Calls to the providers: the connections, their errors, and the exchange that makes the calls."""

from __future__ import annotations

import asyncio
import functools
import io
import urllib.request
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

from cachepipe import jsontext, outages, wire
from cachepipe.accounting import Usage, usage_of
from cachepipe.contract.draws import Retried
from cachepipe.errors import CachepipeError, NotStorable
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
_OWN_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # of the HTTP library
_LONGEST_HEADER: Final = 1 << 16
_PIECE: Final = 1 << 20  # bytes that are decoded, or sent, at once


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

    def __init__(
        self, response: aiohttp.ClientResponse, upstream: str, url: str, release: Callable[[], None]
    ) -> None:
        self._response = response
        self.headers = response.headers
        self.status: int = response.status
        self.http_version: str = "HTTP/1.1"
        self.pairs: list[tuple[bytes, bytes]] = [
            (name.lower(), value) for name, value in response.raw_headers
        ]
        """The headers as they came, by lower-case names."""
        self._place = upstream, url
        self._release = release

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """Iterate over the decoded body; if its encoding was not asked for, over the raw body."""
        raw = self.aiter_raw()
        plain = "content-encoding" not in self.headers or headers.is_encoded(self.pairs)
        return raw if plain else self._decoded(raw)

    async def aiter_raw(self) -> AsyncIterator[bytes]:
        """Iterate over the raw body."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except Exception as error:  # noqa: BLE001 - it is raised again
            raise _translated(error, *self._place) from None

    async def _decoded(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        codings = [coding.strip().lower() for coding in self.headers.get("content-encoding", "").split(",")]
        for coding in reversed(codings):
            if coding in ("gzip", "deflate"):
                chunks = _inflated(chunks, self._place)
        async for chunk in chunks:
            yield chunk

    async def aread(self, most: int) -> bytes | BodySource:
        """Return the body and close the response; for a body of more than ``most`` bytes, return a source."""
        size = self._response.content_length
        if size is not None and size <= most and "content-encoding" not in self.headers:
            try:
                return await self._response.read()
            except Exception as error:  # noqa: BLE001 - it is raised again
                raise _translated(error, *self._place) from None
            finally:
                await self.aclose()
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
        release, self._release = self._release, _nothing
        release()
        self._response.release()


def _nothing() -> None:
    """Release nothing: it was released before."""


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


async def _inflated(chunks: AsyncIterator[bytes], place: tuple[str, str]) -> AsyncIterator[bytes]:
    """Iterate over a body that was compressed by gzip or deflate, with a header or without."""
    inflater: Any = None
    async for chunk in chunks:
        data = chunk
        try:
            if inflater is None:
                inflater, data = _inflater(data)
            while data and not inflater.eof:
                yield inflater.decompress(data, _PIECE)
                data = inflater.unconsumed_tail
                if inflater.eof and inflater.unused_data:  # another member follows
                    inflater, data = _inflater(inflater.unused_data)
        except zlib.error as error:
            raise _broken(place, error) from None
    if inflater is not None and not inflater.eof:
        raise _broken(place, EOFError("the compressed body is not complete"))


def _inflater(data: bytes) -> tuple[Any, bytes]:
    """Return a decompressor for a body that begins with some data, and the data."""
    headed = data[:1] == b"\x1f" or (
        data[0] & 15 == 8 and (len(data) < 2 or not int.from_bytes(data[:2]) % 31)
    )
    return zlib.decompressobj(zlib.MAX_WBITS | 32 if headed else -zlib.MAX_WBITS), data


def _broken(place: tuple[str, str], error: BaseException) -> UpstreamUnreachable:
    upstream, url = place
    return UpstreamUnreachable(
        f"the upstream {upstream!r} at {outages.public_url(url)} could not be reached, or closed the "
        f"connection: {type(error).__name__}: {error}"
    )


def _translated(error: BaseException, upstream: str, url: str) -> BaseException:
    """Return an error of the connection as one of ours, which contains no header; return others unchanged."""
    if isinstance(error, TimeoutError):
        outages.failed(error, url)
        return UpstreamTimeout(
            f"the upstream {upstream!r} at {outages.public_url(url)} took too long ({type(error).__name__}); "
            "try again, or raise --timeout"
        )
    if isinstance(error, aiohttp.ClientError | OSError):
        outages.failed(error, url)
        return _broken((upstream, url), error)
    if isinstance(error, ValueError):  # its message may contain a key
        return UpstreamUnreachable(
            f"a header of this request cannot be sent to the upstream {upstream!r} at "
            f"{outages.public_url(url)}"
        )
    return error


@functools.lru_cache(maxsize=256)
def _sendable(pairs: tuple[tuple[bytes, bytes], ...]) -> CIMultiDict[str]:
    """Return headers as the HTTP library takes them; most calls of a client have the same."""
    return CIMultiDict([(name.decode("latin-1"), headers.text_of(value)) for name, value in pairs])


def _in_pieces(content: Any) -> Any:
    """Return a body that does not stop the event loop while it is sent."""
    return io.BytesIO(content) if content is not None and len(content) > _PIECE else content


class _Upload:
    """A body that is sent while its client still sends it.

    Args:
        content: the body.
        limit: the time-out of the call. It is off while the client is awaited, who has its own time-out.
        seconds: how long the upstream may take for each part.

    Attributes:
        error: the error of the client, whom the HTTP library mistakes for the upstream.
    """

    def __init__(self, content: AsyncIterator[bytes], limit: asyncio.Timeout, seconds: float) -> None:
        self._content, self._limit, self._seconds = content, limit, seconds
        self.error: Exception | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Iterate over the body."""
        now = asyncio.get_running_loop().time
        self._limit.reschedule(None)
        try:
            async for chunk in self._content:
                self._limit.reschedule(now() + self._seconds)
                yield chunk
                self._limit.reschedule(None)
        except Exception as error:
            self.error = error
            raise
        finally:
            self._limit.reschedule(now() + self._seconds)


@functools.lru_cache(maxsize=64)
def _proxy_of(scheme: str, host: str) -> str | None:
    """Return the URL of the HTTP proxy that the environment names for a server, or None."""
    if urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(scheme) or proxies.get("all")


class UpstreamClient:
    """The connections to the upstreams of a proxy."""

    def __init__(self, settings: ProxySettings) -> None:
        self.most = settings.max_answer
        self._settings = settings
        self._trust = httpx2.create_ssl_context()  # what the SDKs trust
        self._opened: aiohttp.ClientSession | None = None
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
        try:
            response = await self._sent(method, url, pairs, content)
        except BaseException as error:  # noqa: BLE001 - it is raised again
            self._release(name)
            raise _translated(error, name, url) from None
        outages.reached(url)
        answer = UpstreamResponse(response, name, url, functools.partial(self._release, name))
        if not 200 <= answer.status < 600:
            await answer.aclose()
            raise UpstreamUnreachable(
                f"the upstream {name!r} answered with status {answer.status}, which is not valid"
            )
        return answer

    async def _sent(
        self,
        method: str,
        url: str,
        pairs: Sequence[tuple[bytes, bytes]],
        content: bytes | AsyncIterator[bytes] | None,
    ) -> aiohttp.ClientResponse:
        """Send a request, and return the answer once its head has come."""
        address = URL(url, encoded=True)
        seconds = self._settings.timeout
        async with asyncio.timeout(self._settings.connect_timeout + seconds) as limit:
            upload = (
                None if content is None or isinstance(content, bytes) else _Upload(content, limit, seconds)
            )
            try:
                return await self._session().request(
                    method,
                    address,
                    headers=_sendable(tuple(pairs)),
                    data=_in_pieces(content) if upload is None else upload.chunks(),
                    proxy=_proxy_of(address.scheme, address.authority),
                    skip_auto_headers=_OWN_HEADERS,
                    allow_redirects=False,
                )
            except aiohttp.ClientError:
                if upload is not None and upload.error is not None:
                    raise upload.error from None
                raise

    def _session(self) -> aiohttp.ClientSession:
        """Return the connections; they belong to the event loop of the first call."""
        if self._opened is None:
            settings = self._settings
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, ssl=self._trust),
                # A cookie jar would send the cookies of one client with the requests of another.
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=settings.connect_timeout, sock_read=settings.timeout
                ),
                auto_decompress=False,
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
            )
        return self._opened

    def _release(self, name: str) -> None:
        self.in_flight[name] -= 1
        self._slots[name].release()

    async def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()


class ProxyExchange(Exchange):
    """A request to the proxy that the cache may answer.

    Args:
        client: the connections.
        spend: counts the samples of its calls: takes the namespace, their usages and the URL.
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
        spend: Callable[[str | None, Sequence[Usage], str], None],
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
        try:
            kept = super()._packed(samples, made)
        except NotStorable:
            self._spend(self.claimant.namespace, [usage_of(sample) for sample in samples], self.head.url)
            raise
        self._spend(self.claimant.namespace, [each.usage for each in kept], self.head.url)
        return kept

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:
        """Make a call with this request's own headers."""
        pairs = [*self.head.pairs, _JSON, _PLAIN if stream else _PACKED]
        upstream = self.head.upstream
        url, sent = self.api.sent(self.head.url, body)
        reader = await self._client.call(upstream, "POST", url, pairs, jsontext.dumps(sent))
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
