"""Makes the client for a completion from the caller's options, else from the environment.

If the caller gives no client, one is made for each cache, endpoint and mode. It stays open as long as the
process, or as long as its service; the store of a folder is opened once. So connections are reused, and a
program is one run, even if it calls ``asyncio.run`` several times. The client runs on the loop of
`cachepipe.portal`, which has its own thread, so it serves callers with a loop, without one, and in
notebooks.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import difflib
import functools
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from inspect import signature
from typing import Any, Final, Protocol, Self, TypeVar

import anyio.to_thread

from cachepipe import context, loops, runs
from cachepipe.adapting import name_of
from cachepipe.context import INHERITED, Inherited
from cachepipe.portal import in_portal, portal, submit
from cachepipe.sdk.mixins import AsyncCached, SyncCached
from cachepipe.services import Service, close_lent, ollama_url, stripped
from cachepipe.stores import Store, check_folder, default_folder, open_store
from cachepipe.stores.folders import expanded
from cachepipe.typedefs import REPEATS, Mode, Repeat

T = TypeVar("T")
_logger = logging.getLogger(__name__)

DEFAULT_MODEL: Final = "gpt-4o-mini"
"""The default model, if neither the caller nor ``CACHEPIPE_MODEL`` names one."""

NAMES: Final = (
    "cache",
    "namespace",
    "service",
    "client",
    "api_key",
    "base_url",
    "mode",
    "repeat",
    "request_id",
)
"""The options for the client and the cache; all others become fields of the request."""

_CLOSING_SECONDS: Final = 10.0


class ServiceLike(Protocol):
    """The part of a service that is needed here: drop-in clients bound to it."""

    def client(self, **options: Any) -> Any:
        """Return an asynchronous client with ``cache=``, ``mode=`` and ``repeat=``."""
        ...


class Access:
    """The endpoint, the cache and the mode of calls.

    Args:
        options: the options of `NAMES`; missing ones are looked up.
        environment: settings that override the environment of the process.

    Raises:
        TypeError, ValueError: for options that exclude each other, or are not valid.
    """

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, Any] | None = None) -> None:
        self._environment = environment or {}
        self._opened: Any = None
        self.client: Any = options.get("client")
        self.service: ServiceLike | None = options.get("service")
        if self.service is not None and not callable(getattr(self.service, "client", None)):
            raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {self.service!r:.100}")
        self.mode: Mode | None = options.get("mode")
        self.repeat: Repeat | None = options.get("repeat")
        if self.repeat is not None and self.repeat not in REPEATS:
            raise ValueError(f"repeat is 'fresh' or 'same'; got {self.repeat!r}")
        self.request_id: str | Inherited | None = options.get("request_id", INHERITED)
        self.namespace = self._namespace(options)
        with self.using():
            pass  # what is no mode, namespace or request id is refused
        self._cache = options.get("cache")
        if not is_cached(self.client):
            self._cache = located(self.found("CACHEPIPE_DIR") if self._cache is None else self._cache)
        where = [name for name in ("client", "service") if options.get(name) is not None]
        where += [name for name in ("api_key", "base_url") if options.get(name) is not None]
        if len(where) > 1 and where != ["api_key", "base_url"]:
            raise TypeError(f"give {where[0]}= or {where[1]}=, not both: the first knows where to ask")
        self.api_key = self.base_url = None
        if self.client is not None:
            self._take_client()
        elif self.service is None:
            self.api_key, self.base_url = self._endpoint(options)

    def __repr__(self) -> str:
        return f"<Access namespace={self.namespace!r} mode={self.mode!r}>"  # never a key, nor a URL with one

    def __reduce__(self) -> Any:
        raise TypeError(
            "a chat holds a key, so it is not pickled; keep what was said: chat.conversation.to_json()"
        )

    def __deepcopy__(self, _: object) -> Self:
        return self  # what it knows does not change

    # What was given.

    def found(self, name: str) -> str | None:
        """Return a setting by its name in the environment; None if it is not set, or empty."""
        value = self._environment.get(name)
        return str(value) if value else os.environ.get(name) or None

    def _namespace(self, options: Mapping[str, Any]) -> str | Inherited | None:
        if "namespace" in options:
            given: str | None = options["namespace"]
            return given
        if is_cached(self.client) or not isinstance(context.current().namespace, Inherited):
            return INHERITED
        return self.found("CACHEPIPE_NAMESPACE") or INHERITED

    def _endpoint(self, options: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Return the key and the base URL.

        If no OpenAI key or URL is found, ``OLLAMA_HOST`` is used: a host, ``host:port`` or a URL. ``AUTH``
        contains the credentials for a gateway in front of it.
        """
        key = stripped(options.get("api_key")) or stripped(self.found("OPENAI_API_KEY")) or None
        url = options.get("base_url") or self.found("OPENAI_BASE_URL")
        host = self.found("OLLAMA_HOST")
        if key is not None or url is not None or host is None:
            return key, None if url is None else str(url)
        secret = self.found("AUTH")
        return secret or "ollama", ollama_url(host, secret)

    def _take_client(self) -> None:
        self._is_async = inspect.iscoroutinefunction(getattr(type(self.client), "request", None))
        _check_completes(self.client, "client= takes a client of openai, together or cachepipe.sdk")
        if is_cached(self.client):
            if self._cache is not None:
                raise TypeError(
                    "the client has a cache already: leave out cache=, or use client.copy(cache=...)"
                )
            if self.repeat is not None:
                self.client = self.client.copy(repeat=self.repeat)
        else:
            self.client = wrapped(self.client, self._cache, self.mode, self.repeat)

    # Asking.

    @property
    def on_portal(self) -> bool:
        """Whether calls are made on the portal's loop, else on the caller's."""
        return self.client is None or not self._is_async

    async def opened(self) -> Any:
        """Return the client, on the loop of its calls."""
        if self.client is not None:
            return self.client
        mode = self.mode or context.current().mode_of("read-write")
        ours: dict[str, Any] = {"cache": kept(self._cache), "mode": mode, "repeat": self.repeat or "fresh"}
        if isinstance(self.service, Service):
            client = self.service.lent(**ours)
            _check_completes(client, "service= takes a service of chat completions")
            return client
        name = (id(ours["cache"]), id(self.service), self.api_key, self.base_url, mode, ours["repeat"])
        known = _clients.get(name)
        if known is None:
            if self.service is not None:
                client = self.service.client(**ours)
                _check_completes(client, "service= takes a service of chat completions")
            else:
                from cachepipe.sdk.openai import AsyncOpenAI  # noqa: PLC0415 - now it is needed

                client = AsyncOpenAI(api_key=self.api_key, base_url=self.base_url, **ours)
            # What an id stands for is kept with it, so that it stands for nothing else.
            known = _clients[name] = (client, self.service, ours["cache"])
        return known[0]

    async def fitted(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a body in the form that the client accepts.

        Raises:
            TypeError: for a field that is not a parameter of the client's method, before anything is asked.
        """
        client = await self.opened()
        if "logprobs" in body and _is_of("together", client):  # it takes one number for both
            body = {**body, "logprobs": body.get("top_logprobs") or 1}
            body.pop("top_logprobs", None)
        taken = _taken(client.chat.completions.create)
        if taken is not None and (wrong := next((name for name in body if name not in taken), None)):
            near = difflib.get_close_matches(wrong, [*taken, *NAMES], 1)
            meant = f" Did you mean {near[0]}=?" if near else ""
            raise TypeError(
                f"{type(client).__name__} takes no {wrong}=.{meant} "
                "What only the provider knows goes into extra_body="
            )
        return body

    @contextlib.contextmanager
    def using(self, request_id: str | Inherited | None = INHERITED) -> Iterator[None]:
        """Set namespace and request id for the calls within a block.

        Args:
            request_id: overrides the request id in the options.
        """
        if isinstance(request_id, Inherited):
            request_id = self.request_id
        mode = INHERITED if self.mode is None else self.mode
        with context.using(namespace=self.namespace, request_id=request_id, mode=mode):
            yield

    async def ask(self, body: Mapping[str, Any], request_id: str | Inherited | None = INHERITED) -> Any:
        """Make a chat request, and return the client's object for the answer."""
        body = await self.fitted(body)
        client = self._opened = await self.opened()
        with self.using(request_id), sending():
            if self.client is None or self._is_async:
                return await client.chat.completions.create(**body)
            return await anyio.to_thread.run_sync(
                lambda: client.chat.completions.create(**body), abandon_on_cancel=True, limiter=_threads()
            )

    def generated(self, key: str, index: int | None) -> tuple[float, float] | None:
        """Return when the generation of a sample began and ended, in seconds since 1970.

        None if it is not stored, or its times are unknown.
        """
        if index is None or index < 0:
            return None
        sample = self._opened._cachepipe.backing.store.sample(key, index)  # noqa: SLF001 - it is ours
        if sample is None or (seconds := sample.meta.get("seconds")) is None:
            return None
        return sample.at - seconds, sample.at

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the loop of the calls, and return its result."""
        return await on_portal(work()) if self.on_portal else await work()

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the portal's loop for a caller without a loop, and return its result."""
        if not self.on_portal:
            raise TypeError(
                f"the functions and methods that wait take no asynchronous client, whose loop is not theirs; "
                f"got {type(self.client).__name__}. Give a synchronous client, or await the asynchronous twin"
            )
        return in_portal(work())


def is_cached(client: Any) -> bool:
    """Return True if a client is one of cachepipe's, and so has a cache and a namespace."""
    return isinstance(client, AsyncCached | SyncCached)


def _check_completes(client: Any, told: str) -> None:
    """Raise an error for a client without chat completions."""
    if not hasattr(getattr(client, "chat", None), "completions"):
        raise TypeError(f"{told}, with chat.completions; got {client!r:.200}")


def _taken(method: Any) -> frozenset[str] | None:
    """Return the parameters of a client's method; None if it accepts any."""
    return _parameters(getattr(method, "__func__", method))


@functools.lru_cache(maxsize=16)
def _parameters(function: Any) -> frozenset[str] | None:
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def _is_of(sdk: str, client: Any) -> bool:
    """Return True if a client belongs to an SDK."""
    return any(kind.__module__.partition(".")[0] == sdk for kind in type(client).__mro__)


def model_of(access: Access, model: str | None) -> str:
    """Return the model to use."""
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model= is the name of a model; got {model!r:.100}")
    own: str | None = name_of(access.service)
    named = model or own or access.found("CACHEPIPE_MODEL")
    if named is None:
        say_default(DEFAULT_MODEL, "model= or CACHEPIPE_MODEL names another")
    return named or DEFAULT_MODEL


@functools.cache
def say_default(model: str, how: str) -> None:
    """Report once that the default model is used, and how to name another."""
    _logger.warning("no model is named, so %s is asked; %s", model, how)


# The portal.


async def on_portal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the portal's loop, in the caller's context, and return its result."""
    try:
        here = loops.running()
    except RuntimeError:
        work.close()
        raise
    if here is portal():
        return await work
    return await asyncio.wrap_future(submit(work))


_clients: dict[tuple[Any, ...], tuple[Any, ...]] = {}
"""The clients that were made here, with the objects that keep ids unique. For the portal's loop only."""
_stores: dict[str | int, tuple[Store, Any]] = {}
"""The stores that were opened here. For the portal's loop only."""
_holders: weakref.WeakKeyDictionary[Store, _Holder] = weakref.WeakKeyDictionary()
"""The objects that keep the runs of stores open, while the stores exist."""
_wrappers: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Return what is wrong with a text that UTF-8 cannot encode, without the rest of the text."""
    try:
        yield
    except UnicodeEncodeError as error:
        if error.encoding != "utf-8":  # of a header
            raise
        raise ValueError(
            f"what is asked holds {error.object[error.start]!r}, half of a character, which no request can "
            "carry; mend it, as by text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def located(cache: Any) -> Any:
    """Return a cache argument with a folder as its absolute path; None means the default folder.

    Raises:
        StoreError: for a string that is not the name of a folder.
    """
    if cache is None:
        cache = default_folder()
    if not isinstance(cache, str | os.PathLike):
        return cache
    check_folder(cache)
    return str(expanded(cache))


def kept(cache: Any) -> Store:
    """Return the store of what `located` returns.

    A store that is opened here stays open until `close_clients`. The run of a store lasts until then, or
    while the caller's store exists. So consecutive callers are in one run, and share its files.
    """
    name = cache if isinstance(cache, str) else id(cache)
    with _lock:
        if name in _stores:
            return _stores[name][0]
        store, owned = open_store(cache)
        if owned:
            _stores[name] = (store, cache)
        if store not in _holders:
            _holders[store] = _Holder()
            runs.opened(store.identity, _holders[store])
        return store


class _Holder:
    """Keeps a run open."""


def wrapped(client: Any, cache: Any, mode: Mode | None, repeat: Repeat | None) -> Any:
    """Return a plain client with a cache: the same one each time, so that its calls are one run."""
    from cachepipe.sdk.wrapping import wrap  # noqa: PLC0415 - now it is needed

    store = kept(cache)
    name = (id(store), mode, repeat)
    with _lock:
        known = _wrappers.setdefault(client, {})
        if name not in known:  # what is made keeps the store, so that the name is its own
            known[name] = wrap(client, cache=store, mode=mode or "read-write", repeat=repeat or "fresh")
        return known[name]


_limiters: weakref.WeakKeyDictionary[Any, anyio.CapacityLimiter] = weakref.WeakKeyDictionary()


def _threads() -> anyio.CapacityLimiter:
    """Return a limiter without a limit, because the caller limits the number of calls."""
    loop = asyncio.get_running_loop()
    limiter = _limiters.get(loop)
    if limiter is None:
        limiter = _limiters[loop] = anyio.CapacityLimiter(float("inf"))
    return limiter


async def close_clients() -> None:
    """Wait for what is in flight, and close the clients that were made here; later calls make new ones."""

    async def close() -> None:
        clients = [client for client, *_ in _clients.values()]
        _clients.clear()
        closing = (close_lent(), *(client.close() for client in clients))
        await asyncio.gather(*closing, return_exceptions=True)
        with _lock:
            _wrappers.clear()
            while _holders:
                store, holder = _holders.popitem()
                runs.closed(store.identity, holder)
            while _stores:
                _, (store, _) = _stores.popitem()
                store.close()

    await on_portal(close())


@atexit.register
def _at_exit() -> None:
    if _clients or _stores:
        with contextlib.suppress(Exception):  # nobody is left to be told
            work: Awaitable[None] = asyncio.wait_for(close_clients(), _CLOSING_SECONDS)
            in_portal(work)  # type: ignore[arg-type]  # wait_for is a coroutine


def _after_fork() -> None:
    """Drop the clients in a forked child, which must not share connections with its parent."""
    global _lock  # noqa: PLW0603 - the parent may have held it while forking
    _lock = threading.Lock()
    _clients.clear()
    _stores.clear()
    _holders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
