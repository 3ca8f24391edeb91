"""The proxy's own paths: health, metrics, the page for people and its JSON API, and new runs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any, Final

import cachepipe
from cachepipe import jsontext
from cachepipe.figures import stats_of
from cachepipe.proxy import browse, headers, page
from cachepipe.proxy.body_cache import read_object
from cachepipe.proxy.http_exchange import HttpExchange, Refusal

if TYPE_CHECKING:
    from cachepipe.proxy.app import Proxy
    from cachepipe.proxy.counters import Totals

_LARGEST: Final = 65_536  # bytes of the body that begins a run
_METRICS: Final = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_SEE: Final = [
    *(f"/cachepipe/api/{name}" for name in ("counters", "stats", "namespaces", "keys")),
    "/metrics",
]


async def answer(proxy: Proxy, http: HttpExchange, path: str) -> None:
    """Answer a request for one of the proxy's own paths.

    Raises:
        Refusal: when there is nothing at the path, or the request is not valid.
    """
    if path == "/cachepipe/runs":
        await _begin_run(proxy, http)
        return
    if http.method not in ("GET", "HEAD"):
        raise Refusal(405, "bad_method", f"{path} supports GET only", [(b"allow", b"GET, HEAD")])
    if path == "/healthz":
        await http.send_json({"status": "ok"})
    elif path == "/readyz":
        word, status = ("ok", 200) if proxy.ready else ("stopping", 503)
        await http.send_json({"status": word}, status)
    elif path == "/metrics":
        totals = await _totals(proxy)
        await http.answer(200, [_METRICS, *headers.INERT], totals.metrics())
    elif path in page.FILES:
        await http.answer(200, *page.answer(path))
    elif path in ("/cachepipe", "/cachepipe/"):
        await http.send_json(_status(proxy))
    elif path.startswith("/cachepipe/api/"):
        await http.send_json(await _value_at(proxy, path.removeprefix("/cachepipe/api"), http))
    else:
        raise Refusal(404, "not_found", f"{path[:200]} does not exist; see /cachepipe")


def _status(proxy: Proxy) -> dict[str, Any]:
    store, settings = proxy.store, proxy.settings
    return {
        "cachepipe": cachepipe.__version__,
        "cache": getattr(store, "where", str(store)),
        "read_only": store.read_only,
        "mode": proxy.mode,
        "workers": settings.workers,
        "namespace": settings.namespace,
        "replicate": settings.replicate,
        "upstreams": [
            {name: getattr(each, name) for name in ("name", "url", "kind", "mount")}
            for each in settings.upstreams
        ],
        "see": _SEE,
    }


async def _totals(proxy: Proxy) -> Totals:
    """Return the counts of all worker processes, with the prices that are known."""
    totals = await proxy.totals()
    await asyncio.to_thread(totals.prices.learn)
    return totals


async def _value_at(proxy: Proxy, path: str, http: HttpExchange) -> Any:
    """Return the JSON value at a path of the API."""
    if path == "/status":
        return _status(proxy)
    if path == "/counters":
        return (await _totals(proxy)).as_json()
    if path == "/stats":
        store: Any = proxy.store  # each store that a proxy opens can be listed
        await proxy.shared_store.deliveries.write()
        return await asyncio.to_thread(stats_of, store, proxy.counters.prices.given)
    query = http.scope["query_string"].decode("latin-1")
    return await asyncio.to_thread(browse.answer, proxy.store, path, query)


async def _begin_run(proxy: Proxy, http: HttpExchange) -> None:
    """Begin a new run: of every namespace, or of one."""
    if http.method != "POST":
        raise Refusal(405, "bad_method", "begin a run with POST", [(b"allow", b"POST")])
    content = await http.body(_LARGEST)
    options = None
    with contextlib.suppress(jsontext.LongInteger):
        options = read_object(content) if content.strip() else {}
    if options is None or not {*options} <= {"namespace"}:
        raise Refusal(400, "bad_run", 'begin a run with an empty body, or with {"namespace": "NAME"}')
    if options:
        namespace = options["namespace"]
        if namespace is not None and not isinstance(namespace, str):
            raise Refusal(400, "bad_run", f"a namespace is a text or null; got {namespace!r:.100}")
        await proxy.begin_run(namespace)
        served = namespace in (await _totals(proxy)).namespaces
        options["known"] = served or await asyncio.to_thread(_has_draws, proxy, namespace)
    else:
        await proxy.begin_run()
    await http.send_json({"run": secrets.token_hex(8), **options}, 201)


def _has_draws(proxy: Proxy, namespace: str | None) -> bool:
    """Return True if the cache has draws of a namespace."""
    return any(info.namespace == namespace for info in proxy.store.namespaces())
