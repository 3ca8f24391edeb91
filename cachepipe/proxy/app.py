"""The proxy as an ASGI application: decides what each request is, and answers it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import cachepipe
from cachepipe import jsontext, runs, wire
from cachepipe.context import Inherited
from cachepipe.contract.draws import Claimant, label
from cachepipe.errors import (
    BadAnswer,
    CacheMiss,
    CachepipeError,
    StageClosed,
    StoreError,
    TooManySamples,
    UnkeyableValue,
)
from cachepipe.outages import advice_for, public_url
from cachepipe.providers.exchange import (
    Answer,
    Backing,
    Surface,
    body_from,
    check_size,
    id_header,
    questions_of,
)
from cachepipe.providers.responses import BodySource
from cachepipe.providers.stream_recorder import StreamSource
from cachepipe.proxy import browse, headers, page, paths
from cachepipe.proxy.access import AccessControl
from cachepipe.proxy.body_cache import BodyCache, ParsedBody, read_object
from cachepipe.proxy.counters import Counters, Outcome
from cachepipe.proxy.head_cache import HEAD, HeadCache
from cachepipe.proxy.headers import listed
from cachepipe.proxy.http_exchange import JSON, ClientGone, HttpExchange, Receive, Refusal, Send
from cachepipe.proxy.idempotency import ProxyRun, RequestCounter
from cachepipe.proxy.log import RequestLog
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.proxy.upstream import (
    ProxyExchange,
    UpstreamClient,
    UpstreamRefusal,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from cachepipe.stores import MemoryStore, open_store, switched_off
from cachepipe.typedefs import MODES, Mode, Response

_EVENTS: Final = (b"content-type", b"text/event-stream; charset=utf-8")
_HIT: Final = (b"cache-status", b"cachepipe; hit")
_COUNTING: Final = tuple(name.encode() for name in wire.ANSWER_HEADERS)
_NEVER_AGAIN: Final = (b"x-should-retry", b"false")
_SURFACES: Final = 1024  # credentials whose calls are kept apart, in memory at once
_LABELS: Final = 10_000  # labelled runs of a server's life
_LAST_SECONDS: Final = 1.0  # to store what has just come, however little time is left
_LONGEST_KEY: Final = 1000  # characters of an idempotency key
_MESSAGES: Final = re.compile(r"/v1/messages(/|$)")
_OWN: Final = frozenset({"/", "/healthz", "/readyz", "/metrics"})


class Route(NamedTuple):
    """The destination of requests with one path."""

    destination: paths.Destination
    upstream: Upstream | None
    url: str
    api: wire.Api | None


class ParsedHead(NamedTuple):
    """The meaning of a parsed head, without the body that follows it."""

    route: Route
    url: str
    counting: Mapping[str, str]
    claimant: Claimant
    pairs: list[tuple[bytes, bytes]]
    who: bytes
    scope: Mapping[str, Any]


class Proxy:
    """The application. ``startup`` or the first request opens its cache, and ``shutdown`` closes it.

    Args:
        settings: its settings.
        log: takes the log entry of each request; None for standard error.

    Raises:
        BadSettings: when it would not work, or would not be safe.
    """

    def __init__(
        self, settings: ProxySettings, log: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.settings = settings.checked()
        self.upstreams = {upstream.name: upstream for upstream in settings.upstreams}
        self.mode: Mode = "replay" if settings.replay else "bypass" if switched_off() else "read-write"
        self.log = RequestLog(settings.log, log)
        self.ready = False
        self._open = self._ended = False
        self._until: float | None = None  # when the loop's clock says so, what is in flight is given up
        self._patience: asyncio.Timeout | None = None  # until then, while a shutdown waits
        self._default = ProxyRun()
        self._named: dict[str | None, ProxyRun] = {}
        self._labelled: dict[tuple[str | None, str], ProxyRun] = {}
        self._memory = BodyCache()
        self.heads = HeadCache()
        self._surfaces: OrderedDict[bytes, Surface] = OrderedDict()
        self._background: set[asyncio.Task[Any]] = set()
        self._route = functools.lru_cache(4096)(self._routed)
        self._first = settings.upstreams[0]
        self._anthropic = next((each for each in settings.upstreams if each.kind == "anthropic"), None)
        self._access = AccessControl(settings)

    def __repr__(self) -> str:
        return f"<Proxy {', '.join(self.upstreams)}{' replay' if self.settings.replay else ''}>"

    # Life.

    async def startup(self) -> None:
        """Open the cache.

        Raises:
            StoreError: when that fails.
            StageClosed: when it has been shut down.
        """
        if self._open:
            return
        if self._ended:
            raise StageClosed("this proxy was shut down; make another one")
        settings = self.settings
        if self.mode == "bypass":
            self.store, self._owned = open_store(MemoryStore())
        else:
            self.store, self._owned = open_store(
                settings.cache, durability=settings.durability, read_only=True if settings.replay else None
            )
        self._open = True
        self.surface = Surface.of(self.store, settings.namespace, self.mode, None, settings.repeat)
        self.backing: Backing = self.surface.backing
        self.caller = UpstreamClient(settings)
        self.counters = Counters(self.caller)
        self.ready = True

    def stopping(self) -> None:
        """Stop being ready, and start ``shutdown_timeout``."""
        self.ready = False
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self.settings.shutdown_timeout

    def hurry(self) -> None:
        """Give up what is in flight."""
        self._until = 0.0
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    async def shutdown(self) -> None:
        """Finish and store what is in flight, within ``shutdown_timeout``, and close the cache."""
        if not self._open:
            return
        self.stopping()
        until = asyncio.get_running_loop().time() + _LAST_SECONDS
        self._open = False
        self._ended = True
        self._patience = asyncio.timeout_at(max(until, self._until or 0))
        try:
            async with self._patience:
                await self.backing.close()
                while self._background:
                    await asyncio.wait(self._background)
        except TimeoutError:
            for task in list(self._background):
                task.cancel()
        finally:
            self._patience = None
        await self.caller.close()
        if self._owned:
            await asyncio.get_running_loop().run_in_executor(None, self.store.close)
        self.log.flush()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or the server's startup and shutdown events."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        if not self._open:  # a server without lifespan events
            await self.startup()
        await self._serve_http(HttpExchange(scope, receive, send, self.settings.client_timeout))

    async def go_on(
        self, head: ParsedHead, read: ParsedBody, scope: Mapping[str, Any], receive: Receive, send: Send
    ) -> None:
        """Serve a request with a known head and body; see `at_once`."""
        await self._serve_http(HttpExchange(scope, receive, send, self.settings.client_timeout), head, read)

    async def _serve_http(
        self, http: HttpExchange, head: ParsedHead | None = None, read: ParsedBody | None = None
    ) -> None:
        self.counters.in_flight += 1
        try:
            await self._serve(http, head, read)
        finally:
            self.counters.in_flight -= 1
            http.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.startup()
                except CachepipeError as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return

    # One request.

    async def _serve(self, http: HttpExchange, head: ParsedHead | None, read: ParsedBody | None) -> None:
        outcome: Outcome = "refused"
        route: Route | None = None
        namespace = self.settings.namespace
        try:
            if head is not None and read is not None:
                route, namespace = head.route, head.claimant.namespace
                outcome = await self._drawn_anew(http, head, read)
            else:
                route = self._placed(http)
                self._access.check(http, route.destination.rest if route.upstream is None else None)
                if route.upstream is None:
                    await self._own(http, route.destination.rest)
                    return
                namespace = self._namespace(http, route.destination)
                outcome = await self._asked(http, route, namespace)
        except Refusal as refusal:
            await self._refuse(http, route, refusal)
        except ClientGone:
            outcome = "left"
            http.status = http.status or 499
        except UpstreamRefusal as refusal:
            outcome = "error"
            if (
                refusal.status_code == 404
                and route is not None
                and (advice := advice_for(public_url(route.url)))
            ):
                http.facts["advice"] = advice
            pairs = [*refusal.pairs, self._status(f"fwd=miss; fwd-status={refusal.status_code}")]
            await http.answer(refusal.status_code, pairs, refusal.content)
        except asyncio.CancelledError:  # the server stops, and waits no longer
            outcome = "error"
            await self._refuse(http, route, Refusal(503, "stopping", "the proxy was stopped; try again"))
        except Exception as error:  # noqa: BLE001 - a server outlives whatever is wrong with one request
            outcome = "error"
            await self._refuse(http, route, self._failure(http, error))
        if outcome != "refused" or route is not None:
            self.counters.ended(namespace, outcome)
        if outcome != "hit":
            self.counters.seconds.observe(self.log.seconds(http))
        self.log.request(http, route.destination if route else None, namespace, outcome)

    def _failure(self, http: HttpExchange, error: Exception) -> Refusal:
        """Return the response for an error that is not the upstream's answer."""
        if isinstance(error, UpstreamTimeout):
            return Refusal(504, "upstream_timeout", str(error))
        if isinstance(error, UpstreamUnreachable):
            return Refusal(502, "upstream_unreachable", str(error))
        if isinstance(error, TooManySamples):
            return Refusal(400, "n_too_large", str(error), [_NEVER_AGAIN])
        if isinstance(error, BadAnswer):
            return Refusal(502, "bad_answer", str(error))
        if isinstance(error, CacheMiss):
            http.facts["key"] = error.key
            message = f"{error.reason}. Run it once without --replay to generate what is missing."
            pairs = [_NEVER_AGAIN, (b"x-cachepipe-key", error.key.encode())]
            if error.nearest is not None:
                pairs.append((b"x-cachepipe-nearest", error.nearest.encode()))
            return Refusal(404, "cache_miss", message, pairs)
        if isinstance(error, StoreError):
            self.log.failed("the cache failed", error)
            return Refusal(503, "cache_failed", "the cache could not carry out this request; see the log")
        self.log.failed("a request failed", error)
        return Refusal(500, "internal_error", "the proxy failed; see its log")

    async def _refuse(self, http: HttpExchange, route: Route | None, refusal: Refusal) -> None:
        """Answer with an error, in the format of the API of the request."""
        http.facts["error"] = refusal.code
        if http.status:  # an answer has begun: without its end, the client sees that it is broken
            return
        kind = "invalid_request_error" if refusal.status < 500 else "api_error"
        error = {"type": kind, "message": refusal.message, "code": refusal.code}
        if route is not None and route.api is wire.MESSAGES:
            await http.tell({"type": "error", "error": error}, refusal.status, refusal.pairs)
        else:
            await http.tell({"error": {**error, "param": None}}, refusal.status, refusal.pairs)

    @staticmethod
    def _status(text: str) -> tuple[bytes, bytes]:
        return b"cache-status", f"cachepipe; {text}".encode()

    # Where it goes.

    def _placed(self, http: HttpExchange) -> Route:
        raw = http.scope.get("raw_path") or quote(http.scope["path"]).encode()
        try:
            return self._route(raw)
        except paths.BadPath as error:
            self._access.check(http, None)  # what there is else is told to nobody without the token
            status = 404 if isinstance(error, paths.UnknownPath) else 400
            raise Refusal(status, "bad_path", f"{error}; got {raw[:200].decode('latin-1')}") from None

    def _routed(self, raw: bytes) -> Route:
        destination = paths.destination_of(raw)
        rest = destination.rest
        own = destination.upstream is None and isinstance(destination.namespace, Inherited)
        if own and (rest in _OWN or rest == "/cachepipe" or rest.startswith("/cachepipe/")):
            return Route(destination, None, "", None)
        if destination.upstream is not None:
            upstream = self.upstreams.get(destination.upstream)
            if upstream is None:
                known = ", ".join(self.upstreams)
                raise paths.UnknownPath(f"there is no upstream {destination.upstream!r}; there are {known}")
        elif self._anthropic is not None and _MESSAGES.match(rest):
            upstream = self._anthropic
        else:
            upstream = self._first
        mount = upstream.mount
        if rest != mount and not rest.startswith(f"{mount}/"):
            raise paths.UnknownPath(
                f"paths of the upstream {upstream.name!r} begin with {mount}; the base URL ends with it"
            )
        below = paths.collapsed(rest[len(mount) :])
        return Route(destination, upstream, upstream.url + below, wire.api_for("POST", rest))

    def _namespace(self, http: HttpExchange, destination: paths.Destination) -> str | None:
        told = http.says(b"x-cachepipe-namespace")
        if told is not None:
            return told
        return (
            self.settings.namespace if isinstance(destination.namespace, Inherited) else destination.namespace
        )

    def _mode(self, http: HttpExchange) -> Mode:
        told = http.says(b"x-cachepipe-mode")
        if told is None:
            return self.mode
        if told not in MODES:
            raise Refusal(
                400, "bad_mode", f"x-cachepipe-mode is one of {', '.join(MODES)}; got {told[:50]!r}"
            )
        if self.settings.replay and told != "replay":
            raise Refusal(400, "bad_mode", f"this server only replays; it cannot {told}", [_NEVER_AGAIN])
        return "bypass" if self.mode == "bypass" else told

    def _run(self, namespace: str | None, run: str | None) -> ProxyRun:
        """Return the run of a request."""
        if run is None:
            return self._named.get(namespace) or self._default
        found = self._labelled.get((namespace, run))
        if found is None:
            if len(self._labelled) >= _LABELS:
                raise Refusal(
                    503,
                    "too_many_runs",
                    f"{_LABELS} run labels have been used since the server started; restart it",
                    [_NEVER_AGAIN],
                )
            found = self._labelled[namespace, run] = ProxyRun()
        return found

    # What it asks.

    async def _asked(self, http: HttpExchange, route: Route, namespace: str | None) -> Outcome:
        mode = self._mode(http)
        why = ""
        if http.method != "POST":
            why = "fwd=method"
        elif route.api is None or mode == "bypass" or b"content-encoding" in http.named:
            why = "fwd=bypass"
        if why:
            return await self._passed(http, route, why, None)
        assert route.api is not None  # noqa: S101 - told above
        content = await http.body(self.settings.max_body)
        query = http.scope["query_string"].decode("latin-1")
        url = f"{route.url}?{query}" if query else route.url
        counting = {}
        for name in _COUNTING:
            if name in http.named and name not in headers.named_by_connection(http.headers):
                counting[name.decode()] = ", ".join(headers.said(http.headers, name))
        read = self._read(route.api, url, counting, content)
        if read is None:  # the provider says what is wrong with it, if anything
            return await self._passed(http, route, "fwd=bypass", content)
        exchange = self._exchange(route, url, counting, read, mode, self._claimant(http, namespace))
        return await self._drawn(http, route, exchange, counting)

    def _exchange(
        self,
        route: Route,
        url: str,
        counting: Mapping[str, str],
        read: ParsedBody,
        mode: Mode,
        claimant: Claimant,
    ) -> ProxyExchange:
        assert route.upstream is not None  # noqa: S101 - routes of the proxy's own are served elsewhere
        assert route.api is not None  # noqa: S101 - as are those that pass through
        return ProxyExchange(
            self.caller,
            route.upstream,
            url,
            self.counters.spend,
            surface=self.surface,
            api=route.api,
            body=read.body,
            asks=read.asks,
            questions=read.questions,
            headers=counting,
            stream=read.asks[0].stream,
            alone=False,
            mode=mode,
            claimant=claimant,
        )

    @staticmethod
    def _claimant(http: HttpExchange, namespace: str | None) -> Claimant:
        """Return who draws, from a request's headers."""
        request_id, replicate = http.says(b"x-cachepipe-request-id"), http.says(b"x-cachepipe-replicate")
        return Claimant(namespace, request_id, replicate)

    def _read(
        self, api: wire.Api, url: str, counting: Mapping[str, str], content: bytes
    ) -> ParsedBody | None:
        """Return the questions of a body; None if the cache cannot answer it.

        Raises:
            TooManySamples: when it asks for more samples than a request may ask for.
        """
        name = (url, *counting.items(), content)
        read = self._memory.get(name)
        if read is not None:
            return read
        try:
            body = read_object(content)
        except jsontext.LongInteger as error:
            raise Refusal(400, "bad_request", f"the request cannot be keyed: {error}") from None
        if body is None:
            return None
        try:
            asks = api.split(body)
            if not asks or not all(ask.cacheable for ask in asks):
                return None
            check_size(asks, self.settings.max_n)
            questions = questions_of(api, asks, url, counting)
        except (UnkeyableValue, RecursionError, wire.BadRequest):
            return None
        single = len(asks) == asks[0].n == 1 and not asks[0].stream
        read = ParsedBody(body, asks, questions, single)
        self._memory.put(name, read)
        return read

    async def _drawn(
        self, http: HttpExchange, route: Route, exchange: ProxyExchange, counting: Mapping[str, str]
    ) -> Outcome:
        run = self._run(exchange.claimant.namespace, route.destination.run)
        key = http.says(b"idempotency-key")
        retry = http.named.get(b"x-stainless-retry-count", b"0").strip() not in (b"0", b"")
        entry = None
        if key is not None:
            entry = self._entry(run, exchange, key)
        elif not retry:
            head = http.scope.get(HEAD)
            if head is not None and exchange.mode == "read-write":
                scope = {name: http.scope[name] for name in ("method", "headers")}
                shown = self._shown(http, exchange)
                self.heads.keep(
                    head, ParsedHead(route, exchange.url, counting, exchange.claimant, *shown, scope)
                )
            with runs.within(run):
                answer = exchange.known()
            if answer is not None:
                await self._hand_on(http, exchange, answer)
                return self._count(exchange)
        ticket = RequestCounter(run, retry=retry, entry=entry)
        return await self._draw(http, exchange, *self._shown(http, exchange), ticket)

    def _shown(self, http: HttpExchange, exchange: ProxyExchange) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Return the headers of a call, and a digest of its credentials."""
        pairs = self._credited(headers.of_question(http.headers), exchange.upstream)
        return pairs, headers.who_asks(exchange.upstream.name, pairs)

    async def _drawn_anew(self, http: HttpExchange, head: ParsedHead, read: ParsedBody) -> Outcome:
        """Answer a request after its draw was looked up."""
        exchange = self._exchange(head.route, head.url, head.counting, read, "read-write", head.claimant)
        run = self._run(head.claimant.namespace, head.route.destination.run)
        return await self._draw(http, exchange, head.pairs, head.who, RequestCounter(run))

    async def _draw(
        self,
        http: HttpExchange,
        exchange: ProxyExchange,
        pairs: list[tuple[bytes, bytes]],
        who: bytes,
        ticket: RequestCounter,
    ) -> Outcome:
        exchange.pairs = pairs
        exchange.surface = self._surface(who, exchange.upstream)
        exchange.counter = ticket
        with runs.within(ticket.run):
            task = asyncio.get_running_loop().create_task(exchange.drawn())
        return await self._await(http, exchange, ticket, task)

    def at_once(self, head: ParsedHead, content: bytes, asker: object) -> bytes | ParsedBody | None:
        """Return the complete response to a request with a known draw.

        For an unknown draw, return the questions of its body, for `go_on`. For a request that must be served
        the normal way, return None.

        Args:
            head: the meaning of its head.
            content: its body.
            asker: the asker, which separates requests that are served together from those of one client.
        """
        api, destination = head.route.api, head.route.destination
        if not self._open or api is None:
            return None
        begun = time.perf_counter()
        namespace = head.claimant.namespace
        try:
            read = self._read(api, head.url, head.counting, content)
            if read is None or not read.single:
                return None
            counted = self._run(namespace, destination.run).counted
            cache = self.surface.cache("read-write")
            found = cache.look(head.claimant, [(read.questions[0], 1)], content, run=counted)
        except (CachepipeError, Refusal):
            return None  # what is wrong is told the ordinary way
        if found is None:
            return read
        key, index, kept = read.questions[0].key, found.grants[0].indices[0], found.values()
        merged = self.surface.duplicated(key, namespace, 1, asker)[0]
        content = body_from(api, read.asks[0], kept)
        self.counters.hit(namespace, key, index, kept[0], head.url)
        self.counters.ended(namespace, "hit")
        self.log.hit(destination, namespace, key, len(content), begun)
        made_by = b"".join([b"%b: %b\r\n" % pair for pair in _made_by(api, kept[0].made_by)])
        told = (made_by, key.encode(), _FLAGS[merged], index, len(content), content)
        return _ONE_HIT % told

    def _entry(self, run: ProxyRun, exchange: ProxyExchange, key: str) -> Any:
        """Return the entry of an idempotency key.

        Raises:
            Refusal: when it was used with another request.
        """
        if len(key) > _LONGEST_KEY:
            raise Refusal(
                400, "bad_idempotency_key", f"an Idempotency-Key has at most {_LONGEST_KEY} characters"
            )
        claimant = exchange.claimant
        asked = (*exchange.record.keys, claimant.request_id or "", label(claimant.replicate))
        entry = run.entry(label(claimant.namespace), key, asked)
        if entry.questions != asked:
            raise Refusal(
                422,
                "idempotency_key_reused",
                "this Idempotency-Key was used with another request; each request has its own",
                [_NEVER_AGAIN],
            )
        return entry

    def _credited(self, pairs: list[tuple[bytes, bytes]], upstream: Upstream) -> list[tuple[bytes, bytes]]:
        """Return headers with the upstream's own key, if there is one, instead of the client's."""
        shown = upstream.shown_key
        if shown is None:
            return pairs
        key_header = upstream.key_header.encode()
        pairs = [pair for pair in pairs if pair[0] not in headers.KEYS and pair[0] != key_header]
        return [*pairs, (key_header, shown.encode())]

    def _surface(self, who: bytes, upstream: Upstream) -> Surface:
        """Return the view of the cache for requests that may share calls."""
        surface = self._surfaces.get(who)
        if surface is None:
            surface = self._surfaces[who] = self.surface.changed(service=upstream.flow)
            if len(self._surfaces) > _SURFACES:
                self._surfaces.popitem(last=False)
        else:
            self._surfaces.move_to_end(who)
        return surface

    async def _await(
        self,
        http: HttpExchange,
        exchange: ProxyExchange,
        ticket: RequestCounter,
        task: asyncio.Task[Answer],
    ) -> Outcome:
        """Return the answer of a draw; if the client leaves, continue the draw without it."""
        try:
            here = await http.or_gone(task)
        except BaseException:  # the server stops
            self._leave(exchange, ticket, task)
            raise
        if not here or http.gone:  # in one turn with the answer, perhaps: nothing of it was sent
            self._leave(exchange, ticket, task)
            raise ClientGone
        try:
            answer = task.result()
            live = answer.arrived is not None and isinstance(answer.content, BodySource)
            if not live:
                await self._hand_on(http, exchange, answer)
        except asyncio.CancelledError:
            ticket.unanswered()
            if not task.cancelled():
                raise
            raise UpstreamUnreachable("the call was stopped") from None
        except Exception:
            ticket.unanswered()
            raise
        if live:
            return await self._streamed(http, exchange, ticket, answer)
        ticket.delivered()
        return self._count(exchange) if answer.kept else "error"

    def _leave(self, exchange: ProxyExchange, ticket: RequestCounter, task: asyncio.Task[Answer]) -> None:
        """Continue the draw of a client that has gone, and store its samples for the next request."""
        if exchange.stream and not task.done():
            task.add_done_callback(lambda _: ticket.unanswered())
            task.cancel()  # nothing has come of the stream
            return
        ticket.left()
        self.counters.background += 1
        self._background.add(task)

        def ended(task: asyncio.Task[Answer]) -> None:
            self._background.discard(task)
            self.counters.background -= 1
            ticket.ended()
            if not task.cancelled() and task.exception() is None:
                content = task.result().content
                if isinstance(content, BodySource):
                    content.leave()
                elif exchange.record.responses is not None:
                    self.counters.drew(exchange.claimant.namespace, exchange.record.responses, exchange.url)

        task.add_done_callback(ended)

    async def _streamed(
        self,
        http: HttpExchange,
        exchange: ProxyExchange,
        ticket: RequestCounter,
        answer: Answer,
    ) -> Outcome:
        source = answer.content
        assert isinstance(source, BodySource)  # noqa: S101 - told by the caller
        assert answer.arrived is not None  # noqa: S101 - likewise
        drawing = exchange.task
        pairs = headers.of_answer(answer.arrived.response.pairs)
        pairs += self._told(exchange, answer)
        broken: Exception | None = None
        whole = False
        try:
            await http.start(answer.arrived.response.status, pairs)
            whole = await http.stream(source.aread())
        except UpstreamUnreachable as error:
            broken = error
        finally:
            if not whole and not (isinstance(source, StreamSource) and source.finished):
                exchange.give_back()
            source.leave()
            if drawing is None or drawing.done():
                self._stream_ended(exchange, ticket, drawing)
            else:
                self.counters.background += 1
                drawing.add_done_callback(functools.partial(self._abandoned, exchange, ticket))
        if broken is not None:
            http.facts["error"] = "upstream_broke_off"
            return "error"
        if not whole:
            raise ClientGone
        if not answer.kept:
            return "passed"
        return "miss" if drawing is not None and _succeeded(drawing) else "error"

    def _abandoned(
        self, exchange: ProxyExchange, ticket: RequestCounter, drawing: asyncio.Future[Any]
    ) -> None:
        self.counters.background -= 1
        self._stream_ended(exchange, ticket, drawing)

    def _stream_ended(
        self, exchange: ProxyExchange, ticket: RequestCounter, drawing: asyncio.Future[Any] | None
    ) -> None:
        if drawing is not None and _succeeded(drawing):
            if exchange.given_back:
                ticket.ended()
            else:
                ticket.delivered()
            self.counters.drew(exchange.claimant.namespace, [drawing.result()], exchange.url)
        else:
            ticket.ended()

    # What is answered.

    async def _hand_on(self, http: HttpExchange, exchange: ProxyExchange, answer: Answer) -> None:
        content, arrived = answer.content, answer.arrived
        if arrived is None:
            status = 200
            pairs = headers.shown([_EVENTS if isinstance(content, BodySource) else JSON])
            pairs += _made_by(exchange.api, answer.made_by)
        else:
            status = arrived.response.status
            pairs = headers.of_answer(arrived.response.pairs)
        pairs += self._told(exchange, answer)
        if isinstance(content, BodySource):
            content = b"".join(content.read())
        http.facts["key"] = exchange.record.keys[0]
        await http.answer(status, pairs, content)

    def _told(self, exchange: ProxyExchange, answer: Answer) -> list[tuple[bytes, bytes]]:
        """Return the headers that describe where an answer comes from."""
        if not answer.kept:
            return [self._status("fwd=miss")]
        responses = exchange.record.responses
        stored = "" if self.store.read_only else "; stored"
        if responses is None:  # a stream that this request alone generates
            n = exchange.asks[0].n
            pairs = listed(b"x-cachepipe-key", exchange.record.keys)
            pairs += listed(b"x-cachepipe-cached", ["false"] * n)
            pairs += listed(b"x-cachepipe-duplicated", ["false", *["true"] * (n - 1)])
            pairs += listed(b"x-cachepipe-indices", list(map(str, exchange.claimed or ())))
            heads = answer.arrived.response.pairs if answer.arrived is not None else ()
            if not dict(heads).get(b"content-type", b"").lower().startswith(b"text/event-stream"):
                stored = ""  # what has come instead is no answer
            return [*pairs, self._status(f"fwd=miss{stored}")]
        pairs = _facts(exchange.record.keys, responses)
        cached = [flag for response in responses for flag in response.cached or ()]
        if all(cached):
            return [*pairs, _HIT]
        return [*pairs, self._status(f"fwd={'partial' if any(cached) else 'miss'}{stored}")]

    def _count(self, exchange: ProxyExchange) -> Outcome:
        responses = exchange.record.responses or ()
        self.counters.drew(exchange.claimant.namespace, responses, exchange.url)
        flags = [flag for response in responses for flag in response.cached or ()]
        return "hit" if all(flags) else "partial" if any(flags) else "miss"

    # What is passed through.

    async def _passed(self, http: HttpExchange, route: Route, why: str, content: bytes | None) -> Outcome:
        """Forward a request unchanged, and its answer as it comes."""
        if self.settings.replay or http.says(b"x-cachepipe-mode") == "replay":
            raise Refusal(
                404,
                "not_cached",
                "this request cannot be answered from a cache, and this proxy only replays",
                [_NEVER_AGAIN],
            )
        upstream = route.upstream
        assert upstream is not None  # noqa: S101 - routes of the proxy's own are served elsewhere
        pairs = self._credited(headers.to_upstream(http.headers), upstream)
        length = http.named.get(b"content-length")
        sent: Any = content
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if content is None:
            if length is not None and length != b"0":
                pairs.append((b"content-length", length))
                sent = http.chunks(taken)
            elif b"transfer-encoding" in http.named:
                sent = http.chunks(taken)
        query = http.scope["query_string"]
        url = f"{route.url}?{query.decode('latin-1')}" if query else route.url
        work = asyncio.get_running_loop().create_task(
            self.caller.call(upstream, http.method, url, pairs, sent)
        )
        try:
            if sent is not content:  # a client is watched only once its body has been read
                await asyncio.wait((work, taken), return_when=asyncio.FIRST_COMPLETED)
            reader = await work if await http.or_gone(work) else None
        except BaseException:
            work.cancel()
            raise
        if reader is None:
            work.cancel()
            raise ClientGone
        try:
            pairs = headers.from_upstream(reader.pairs)
            if reader.status in (204, 304):  # what has no body has no length of one that would come
                pairs = [pair for pair in pairs if pair[0] != b"content-length"]
            await http.start(reader.status, [*pairs, self._status(why)])
            if not await http.stream(reader.aiter_raw()):
                raise ClientGone
        finally:
            await reader.aclose()
        return "passed"

    # The proxy's own.

    async def _own(self, http: HttpExchange, path: str) -> None:
        if path == "/cachepipe/runs":
            await self._new_run(http)
            return
        if http.method not in ("GET", "HEAD"):
            raise Refusal(405, "bad_method", f"{path} supports GET only", [(b"allow", b"GET, HEAD")])
        if path == "/healthz":
            await http.tell({"status": "ok"})
        elif path == "/readyz":
            await http.tell({"status": "ok" if self.ready else "stopping"}, 200 if self.ready else 503)
        elif path == "/metrics":
            kind = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
            await http.answer(200, [kind, *headers.INERT], self.counters.metrics())
        elif path in page.FILES:
            await http.answer(200, *page.answer(path))
        elif path in ("/cachepipe", "/cachepipe/", "/cachepipe/api/status"):
            await http.tell(self._state())
        elif path == "/cachepipe/api/counters":
            await asyncio.to_thread(self.counters.prices.learn)
            await http.tell(self.counters.as_json())
        elif path.startswith("/cachepipe/api/"):
            await self._browse(http, path.removeprefix("/cachepipe/api"))
        else:
            raise Refusal(404, "not_found", f"{path[:200]} does not exist; see /cachepipe")

    def _state(self) -> dict[str, Any]:
        return {
            "cachepipe": cachepipe.__version__,
            "cache": str(getattr(self.store, "folder", self.store)),
            "read_only": self.store.read_only,
            "mode": self.mode,
            "namespace": self.settings.namespace,
            "upstreams": [
                {"name": each.name, "url": each.url, "kind": each.kind, "mount": each.mount}
                for each in self.settings.upstreams
            ],
            "see": [
                "/cachepipe/api/counters",
                "/cachepipe/api/namespaces",
                "/cachepipe/api/keys",
                "/metrics",
            ],
        }

    async def _new_run(self, http: HttpExchange) -> None:
        """Begin a new run: of every namespace, or of one."""
        if http.method != "POST":
            raise Refusal(405, "bad_method", "begin a run with POST", [(b"allow", b"POST")])
        content = await http.body(65_536)
        options = None
        with contextlib.suppress(jsontext.LongInteger):
            options = read_object(content) if content.strip() else {}
        if options is None or not {*options} <= {"namespace"}:
            raise Refusal(400, "bad_run", 'begin a run with an empty body, or with {"namespace": "NAME"}')
        if "namespace" in options:
            namespace = options["namespace"]
            if namespace is not None and not isinstance(namespace, str):
                raise Refusal(400, "bad_run", f"a namespace is a text or null; got {namespace!r:.100}")
            if len(self._named) >= _LABELS and namespace not in self._named:
                raise Refusal(
                    503, "too_many_runs", "too many namespaces have runs of their own; restart the server"
                )
            self._named[namespace] = ProxyRun()
            served = namespace in self.counters.namespaces
            options["known"] = served or await asyncio.to_thread(self._holds, namespace)
        else:
            self._default = ProxyRun()
            self._named.clear()
        await http.tell({"run": secrets.token_hex(8), **options}, 201)

    def _holds(self, namespace: str | None) -> bool:
        """Return True if the cache has draws of a namespace."""
        return any(info.namespace == namespace for info in self.store.namespaces())

    async def _browse(self, http: HttpExchange, path: str) -> None:
        query = http.scope["query_string"].decode("latin-1")
        try:
            found = await asyncio.to_thread(browse.answer, self.store, path, query)
        except browse.BadQuery as error:
            raise Refusal(400, "bad_query", str(error)) from None
        except browse.NotThere as error:
            raise Refusal(404, "not_found", str(error)) from None
        await http.tell(found)


_WORDS: Final = {True: "true", False: "false"}
_FLAGS: Final = {True: b"true", False: b"false"}
_ONE_HIT: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    + b"".join(b"%b: %b\r\n" % pair for pair in headers.INERT)
    + b"%bx-cachepipe-key: %b\r\n"
    b"x-cachepipe-duplicated: %b\r\nx-cachepipe-cached: true\r\nx-cachepipe-indices: %d\r\n"
    b"cache-status: cachepipe; hit\r\ncontent-length: %d\r\n\r\n%b"
)


def _facts(keys: Sequence[str], responses: Sequence[Response]) -> list[tuple[bytes, bytes]]:
    """Return the headers that describe the samples of an answer."""
    pairs = listed(b"x-cachepipe-key", keys)
    one = responses[0]
    cached, merged, indices = one.cached or [], one.duplicated or [], one.indices
    for other in responses[1:]:
        cached, merged = cached + (other.cached or []), merged + (other.duplicated or [])
        indices = None if indices is None or other.indices is None else indices + other.indices
    pairs += listed(b"x-cachepipe-duplicated", [_WORDS[flag] for flag in merged])
    pairs += listed(b"x-cachepipe-cached", [_WORDS[flag] for flag in cached])
    if indices is not None:
        pairs += listed(b"x-cachepipe-indices", list(map(str, indices)))
    return pairs


def _made_by(api: wire.Api, name: str | None) -> list[tuple[bytes, bytes]]:
    """Return the header with the id of the call that made an answer, if known."""
    return [] if name is None else [(id_header(api).encode(), name.encode("latin-1", "replace"))]


def _succeeded(task: asyncio.Future[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
