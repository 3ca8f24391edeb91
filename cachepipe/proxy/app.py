"""The proxy as an ASGI application: decides what each request is, and answers it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol
from urllib.parse import quote

from cachepipe import jsontext, wire
from cachepipe.context import INHERITED, Inherited, Using
from cachepipe.contract.draws import Claimant
from cachepipe.errors import (
    BadAnswer,
    BudgetExceeded,
    CacheMiss,
    CachepipeError,
    StageClosed,
    StoreError,
    TooManySamples,
    UnkeyableValue,
    UnknownCost,
)
from cachepipe.outages import advice_for, public_url
from cachepipe.providers.exchange import (
    CacheView,
    SharedStore,
    body_from,
    check_size,
    questions_of,
)
from cachepipe.proxy import control, headers, paths
from cachepipe.proxy.access import AccessControl
from cachepipe.proxy.body_cache import BodyCache, ParsedBody, read_object
from cachepipe.proxy.cache_headers import one_hit, status
from cachepipe.proxy.counters import Counters, Outcome, Prices, Totals
from cachepipe.proxy.head_cache import HEAD, HeadCache, ParsedHead
from cachepipe.proxy.http_exchange import NEVER_AGAIN, ClientGone, HttpExchange, Receive, Refusal, Send
from cachepipe.proxy.idempotency import ProxyRuns, RequestCounts
from cachepipe.proxy.log import RequestLog
from cachepipe.proxy.passing import check_counted, pass_through
from cachepipe.proxy.responder import AnswerSender
from cachepipe.proxy.routing import Route, Router
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.proxy.shared_runs import SharedRuns
from cachepipe.proxy.upstream import (
    ProxyExchange,
    UpstreamClient,
    UpstreamRefusal,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from cachepipe.stores import MemoryStore, open_store, switched_off
from cachepipe.typedefs import MODES, Mode

_KEY_HEADERS: Final = tuple(name.encode() for name in wire.ANSWER_HEADERS)
_CALLERS: Final = 1024  # callers whose calls are kept apart, in memory at once
_LAST_SECONDS: Final = 1.0  # to store the last answers, even if no time is left
_FAILURES: Final = (
    (UpstreamTimeout, 504, "upstream_timeout"),
    (UpstreamUnreachable, 502, "upstream_unreachable"),
    (TooManySamples, 400, "n_too_large"),
    (BadAnswer, 502, "bad_answer"),
    (BudgetExceeded, 402, "budget_exceeded"),
    (UnknownCost, 402, "unknown_cost"),
)
"""The errors whose message is the answer, and its status and code."""
_GOOGLE_STATUS: Final = {
    401: "UNAUTHENTICATED",
    402: "RESOURCE_EXHAUSTED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Google's names of statuses."""


class Workers(Protocol):
    """The worker processes of a proxy, as one of them sees them."""

    @property
    def runs(self) -> SharedRuns:
        """The runs, which the workers share."""
        ...

    async def begin_run(self, *namespaces: str | None) -> None:
        """Begin a new run of every namespace, or of one."""
        ...

    async def totals(self, prices: Prices) -> Totals:
        """Return the counts of all workers."""
        ...


class Proxy:
    """The application. ``startup`` or the first request opens its cache, and ``shutdown`` closes it.

    Args:
        settings: its settings.
        log: takes the log entry of each request; None for standard error.
        workers: the worker processes, if this is one of them.

    Raises:
        BadSettings: when it would not work, or would not be safe.
    """

    def __init__(
        self,
        settings: ProxySettings,
        log: Callable[[Mapping[str, Any]], None] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.settings = settings.checked()
        self.mode: Mode = "replay" if settings.replay else "bypass" if switched_off() else "read-write"
        self.log = RequestLog(settings.log, log)
        self.runs = ProxyRuns()
        self.workers = workers
        self._run_of = self.runs.run if workers is None else workers.runs.run
        self.heads = HeadCache()
        self.background: set[asyncio.Future[Any]] = set()
        """The draws of clients that have gone."""
        self.ready = False
        self._open = self._ended = False
        self._until: float | None = None  # when requests in flight are given up, by the loop's clock
        self._deadline: asyncio.Timeout | None = None  # the same, while a shutdown waits
        self._bodies = BodyCache()
        self._view_of = functools.lru_cache(_CALLERS)(self._new_view)
        self._router = Router(settings)
        self._access = AccessControl(settings)

    def __repr__(self) -> str:
        return f"<Proxy {', '.join(self._router.upstreams)}{' replay' if self.settings.replay else ''}>"

    # Startup and shutdown.

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
        self.view = CacheView.of(
            self.store, settings.namespace, self.mode, None, settings.repeat, budget=settings.budget
        )
        self.shared_store: SharedStore = self.view.shared_store
        self.client = UpstreamClient(settings)
        self.counters = Counters(self.client, settings.given_prices)
        self.ready = True

    def stopping(self) -> None:
        """Stop being ready, and start ``shutdown_timeout``."""
        self.ready = False
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self.settings.shutdown_timeout

    def give_up(self) -> None:
        """Give up the requests in flight."""
        self._until = 0.0
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def shutdown(self) -> None:
        """Finish and store what is in flight, within ``shutdown_timeout``, and close the cache."""
        if not self._open:
            return
        self.stopping()
        until = asyncio.get_running_loop().time() + _LAST_SECONDS
        self._open = False
        self._ended = True
        self._deadline = asyncio.timeout_at(max(until, self._until or 0))
        try:
            async with self._deadline:
                await self.shared_store.close()
                while self.background:
                    await asyncio.wait(self.background)
        except TimeoutError:
            for task in list(self.background):
                task.cancel()
        finally:
            self._deadline = None
        await self.client.close()
        if self._owned:
            await asyncio.get_running_loop().run_in_executor(None, self.store.close)
        self.log.flush()

    async def begin_run(self, *namespaces: str | None) -> None:
        """Begin a new run of every namespace, or of one, in all worker processes.

        Raises:
            Refusal: when too many namespaces have runs of their own.
        """
        if self.workers is not None:
            await self.workers.begin_run(*namespaces)
        elif namespaces:
            self.runs.begin_of(*namespaces)
        else:
            self.runs.begin()

    async def totals(self) -> Totals:
        """Return the counts of all worker processes."""
        if self.workers is None:
            return self.counters
        return await self.workers.totals(self.counters.prices)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or the server's startup and shutdown events."""
        if scope["type"] == "lifespan":
            await self._serve_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        if not self._open:  # a server without lifespan events
            await self.startup()
        http = self._http(scope, receive, send)
        await self._serve(http, self._answer(http))

    async def serve_parsed(
        self, head: ParsedHead, body: ParsedBody, scope: Mapping[str, Any], receive: Receive, send: Send
    ) -> None:
        """Serve a request with a known head and body, after its draw was looked up; see `at_once`."""
        http = self._http(scope, receive, send)
        http.route = Route(head.destination, head.upstream, head.url, head.api)
        http.claimant = head.claimant
        run = self._run_of(head.claimant.namespace, head.destination.run)
        await self._serve(http, self._draw(http, head, body, "read-write", run.request(head.claimant, ())))

    def _http(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> HttpExchange:
        usual = Claimant(self.settings.namespace, None, self.settings.replicate)
        return HttpExchange(scope, receive, send, self.settings.client_timeout, usual)

    async def _serve_lifespan(self, receive: Receive, send: Send) -> None:
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

    async def _serve(self, http: HttpExchange, answer: Awaitable[Outcome | None]) -> None:
        """Await the answer to a request; then count and log the request."""
        self.counters.in_flight += 1
        try:
            outcome = await self._outcome(http, answer)
            if outcome is None:
                return
            route = http.route
            if outcome != "refused" or route is not None:
                self.counters.ended(http.claimant.namespace, outcome)
            if outcome != "hit":
                self.counters.seconds.observe(time.perf_counter() - http.begun)
            self.log.request(
                outcome,
                http.method,
                None if route is None else route.destination,
                http.claimant,
                http.status,
                http.begun,
                http.sent,
                **http.facts,
            )
        finally:
            self.counters.in_flight -= 1
            http.close()

    async def _outcome(self, http: HttpExchange, answer: Awaitable[Outcome | None]) -> Outcome | None:
        """Await the answer to a request, or send the error that comes instead; return how it ended."""
        try:
            return await answer
        except Refusal as refusal:
            await self._refuse(http, refusal)
            return "refused"
        except ClientGone:
            http.status = http.status or 499
            return "left"
        except UpstreamRefusal as refusal:
            missing = http.route if refusal.status_code == 404 else None
            if missing is not None and (advice := advice_for(public_url(missing.url))):
                http.facts["advice"] = advice
            pairs = [*refusal.pairs, status(f"fwd=miss; fwd-status={refusal.status_code}")]
            await http.answer(refusal.status_code, pairs, refusal.content)
        except asyncio.CancelledError:  # the server stops without waiting
            await self._refuse(http, Refusal(503, "stopping", "the proxy was stopped; try again"))
        except Exception as error:  # noqa: BLE001 - no request may stop the server
            await self._refuse(http, self._failure(http, error))
        return "error"

    def _failure(self, http: HttpExchange, error: Exception) -> Refusal:
        """Return the response for an error that is not the upstream's answer."""
        for kind, code, name in _FAILURES:
            if isinstance(error, kind):
                return Refusal(code, name, str(error), [NEVER_AGAIN] if code < 500 else ())
        if isinstance(error, CacheMiss):
            http.facts["key"] = error.key
            if self.settings.why and error.why:
                http.facts["why"] = error.why
            message = f"{error.reason}. Run it once without --replay to generate what is missing."
            pairs = [NEVER_AGAIN, (b"x-cachepipe-key", error.key.encode())]
            if error.nearest is not None:
                pairs.append((b"x-cachepipe-nearest", error.nearest.encode()))
            return Refusal(404, "cache_miss", message, pairs)
        if isinstance(error, StoreError):
            self.log.failed("the cache failed", error)
            return Refusal(503, "cache_failed", "the cache could not carry out this request; see the log")
        self.log.failed("a request failed", error)
        return Refusal(500, "internal_error", "the proxy failed; see its log")

    async def _refuse(self, http: HttpExchange, refusal: Refusal) -> None:
        """Answer with an error, in the format of the API of the request."""
        http.facts["error"] = refusal.code
        if http.status:  # an answer has begun; the client sees that it is incomplete
            return
        kind = "invalid_request_error" if refusal.status < 500 else "api_error"
        error: dict[str, Any] = {"type": kind, "message": refusal.message, "code": refusal.code}
        if http.route is not None and http.route.api is wire.MESSAGES:
            value = {"type": "error", "error": error}
        elif http.route is not None and http.route.api in (wire.GENERATE_CONTENT, wire.EMBED_CONTENT):
            value = {"error": _google_error(refusal)}
        else:
            value = {"error": {**error, "param": None}}
        await http.send_json(value, refusal.status, refusal.pairs)

    async def _answer(self, http: HttpExchange) -> Outcome | None:
        """Answer a request; return None for the proxy's own paths, whose requests are not counted."""
        route = http.route = self._find_route(http)
        upstream, api = route.upstream, route.api
        if upstream is None:
            self._access.check(http, route.destination.rest)
            await control.answer(self, http, route.destination.rest)
            return None
        self._access.check(http, None)
        http.claimant = self._claimant(http, route.destination)
        mode, url = self._mode(http), http.with_query(route.url)
        content, encoded = None, b"content-encoding" in http.named
        if http.method == "POST" and api is not None and mode != "bypass" and not encoded:
            content = await http.body(self.settings.max_body)
            head = self._head(http, route.destination, upstream, api, url)
            body = self._body(head, content)
            if body is not None:
                return await self._cached(http, head, body, mode)
        if self.settings.replay or http.header(b"x-cachepipe-mode") == "replay":
            message = "this request cannot be answered from a cache, and this proxy only replays"
            raise Refusal(404, "not_cached", message, [NEVER_AGAIN])
        check_counted(self.settings.budget, http, url)
        why = "fwd=bypass" if http.method == "POST" else "fwd=method"
        return await pass_through(self.client, http, upstream, url, why, content)

    # What it asks.

    def _find_route(self, http: HttpExchange) -> Route:
        raw = http.scope.get("raw_path") or quote(http.scope["path"]).encode()
        try:
            return self._router.route(raw)
        except paths.BadPath as error:
            self._access.check(http, None)  # the names of upstreams are only for clients with the token
            code = 404 if isinstance(error, paths.UnknownPath) else 400
            raise Refusal(code, "bad_path", f"{error}; got {raw[:200].decode('latin-1')}") from None

    def _claimant(self, http: HttpExchange, destination: paths.Destination) -> Claimant:
        """Return who draws: as the headers say, else the path, else the settings."""

        def named(name: bytes) -> str | Inherited:
            value = http.header(b"x-cachepipe-" + name)
            return INHERITED if value is None else value

        by_headers = Using(named(b"namespace"), named(b"request-id"), replicate=named(b"replicate"))
        by_path = Using(destination.namespace, replicate=destination.replicate)
        return by_headers.over(by_path).claimant(self.settings.namespace, self.settings.replicate)

    def _mode(self, http: HttpExchange) -> Mode:
        mode = http.header(b"x-cachepipe-mode")
        if mode is None:
            return self.mode
        if mode not in MODES:
            message = f"x-cachepipe-mode is one of {', '.join(MODES)}; got {mode[:50]!r}"
            raise Refusal(400, "bad_mode", message)
        if self.settings.replay and mode != "replay":
            message = f"this server only replays; it cannot {mode}"
            raise Refusal(400, "bad_mode", message, [NEVER_AGAIN])
        return "bypass" if self.mode == "bypass" else mode

    @staticmethod
    def _head(
        http: HttpExchange, destination: paths.Destination, upstream: Upstream, api: wire.Api, url: str
    ) -> ParsedHead:
        """Return the meaning of a request's path and headers."""
        hop_by_hop = headers.named_by_connection(http.headers)
        key_headers = {
            name.decode(): ", ".join(headers.values_of(http.headers, name))
            for name in _KEY_HEADERS
            if name in http.named and name not in hop_by_hop
        }
        own = headers.of_question(http.headers)
        if api in (wire.GENERATE_CONTENT, wire.EMBED_CONTENT):
            url, own = headers.with_key_of(url, own)
        pairs = upstream.credited(own)
        caller = headers.caller_digest(upstream.name, pairs)
        scope = {name: http.scope[name] for name in ("method", "headers")}
        return ParsedHead(destination, upstream, api, url, key_headers, http.claimant, pairs, caller, scope)

    def _body(self, head: ParsedHead, content: bytes) -> ParsedBody | None:
        """Return the questions of a body; None if the cache cannot answer it.

        Raises:
            TooManySamples: when it asks for more samples than a request may ask for.
        """
        name = (head.url, *head.key_headers.items(), content)
        known = self._bodies.get(name)
        if known is not None:
            return known
        try:
            body = read_object(content)
        except jsontext.LongInteger as error:
            raise Refusal(400, "bad_request", f"the request cannot be keyed: {error}") from None
        if body is None:
            return None
        try:
            body = dict(head.api.received(head.url, body))
            asks = head.api.split(body)
            if not asks or not all(ask.cacheable for ask in asks):
                return None
            check_size(asks, self.settings.max_n)
            questions = questions_of(head.api, asks, head.url, head.key_headers)
        except (UnkeyableValue, RecursionError, wire.BadRequest):
            return None
        single = len(asks) == asks[0].n == 1 and not asks[0].stream
        parsed = ParsedBody(body, asks, questions, single)
        self._bodies.put(name, parsed)
        return parsed

    # What the cache answers.

    async def _cached(self, http: HttpExchange, head: ParsedHead, body: ParsedBody, mode: Mode) -> Outcome:
        """Answer a request from the cache, or with a call that the cache makes."""
        run = self._run_of(head.claimant.namespace, head.destination.run)
        key = http.header(b"idempotency-key")
        retry = http.named.get(b"x-stainless-retry-count", b"0").strip() not in (b"0", b"")
        keys = [question.key for question in body.questions]
        counter = run.request(head.claimant, keys, retry=retry, key=key)
        if key is None and not retry:
            name = http.scope.get(HEAD)
            if name is not None and mode == "read-write":
                self.heads.keep(name, head)
            spend = self.counters.spend
            exchange = ProxyExchange(self.client, spend, self.view, head, body, mode, run.counted)
            answer = exchange.known()
            if answer is not None:
                return await AnswerSender(self, http, exchange, counter).send(answer)
        return await self._draw(http, head, body, mode, counter)

    async def _draw(
        self, http: HttpExchange, head: ParsedHead, body: ParsedBody, mode: Mode, counter: RequestCounts
    ) -> Outcome:
        """Draw the samples of a request that are not known, and answer it."""
        view, run = self._view_of(head.caller, head.upstream), counter.run.counted
        exchange = ProxyExchange(self.client, self.counters.spend, view, head, body, mode, run, counter)
        if self.settings.why and mode == "read-write" and not counter.attaches:
            with contextlib.suppress(StoreError):  # the draw meets it again
                if reasons := await exchange.reasons():
                    http.facts["why"] = "; ".join(reasons)
        task = asyncio.get_running_loop().create_task(exchange.drawn())
        return await AnswerSender(self, http, exchange, counter).drawn(task)

    def _new_view(self, caller: bytes, upstream: Upstream) -> CacheView:  # noqa: ARG002 - a key of the cache
        """Return a view of the cache whose draws share calls with each other only."""
        return self.view.changed(service=upstream.flow)

    def at_once(self, head: ParsedHead, content: bytes, asker: object) -> bytes | ParsedBody | None:
        """Return the complete response to a request with a known draw.

        For an unknown draw, return the parsed body, for `serve_parsed`. For a request that must be served the
        normal way, return None.

        Args:
            head: the parsed head.
            content: the body.
            asker: the asker, which separates requests that are served together from those of one client.
        """
        if not self._open:
            return None
        begun = time.perf_counter()
        namespace = head.claimant.namespace
        try:
            body = self._body(head, content)
            if body is None or not body.single:
                return None
            counted = self._run_of(namespace, head.destination.run).counted
            cache = self.view.cache("read-write")
            found = cache.look(head.claimant, [(body.questions[0], 1)], content, run=counted)
        except (CachepipeError, Refusal):
            return None  # the normal way answers with the error
        if found is None:
            return body
        key, index, sample = body.questions[0].key, found[0].grant.indices[0], found[0].values
        duplicated = self.view.duplicated(key, namespace, 1, asker)[0]
        content = body_from(head.api, body.asks[0], sample)
        self.counters.hit(namespace, sample[0], head.url)
        self.log.request("hit", "POST", head.destination, head.claimant, 200, begun, len(content), key=key)
        return one_hit(head.api, sample[0].made_by, key, index, content, duplicated=duplicated)


def _google_error(refusal: Refusal) -> dict[str, Any]:
    """Return an error as Google writes it."""
    kind = "type.googleapis.com/google.rpc.ErrorInfo"
    details = [{"@type": kind, "reason": refusal.code.upper(), "domain": "cachepipe"}]
    status = _GOOGLE_STATUS.get(refusal.status, "INVALID_ARGUMENT" if refusal.status < 500 else "INTERNAL")
    return {"code": refusal.status, "message": refusal.message, "status": status, "details": details}
