"""Keeps stores and clients open between calls.

A client is made for each cache, endpoint and mode, and stays open as long as the process or its service. The
store of a folder is opened once. So connections are reused, and a program is one run, even if it calls
``asyncio.run`` several times. The clients run on the loop of `cachepipe.portal`, which has its own thread, so
they serve callers with a loop, without one, and in notebooks.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Awaitable, Coroutine
from typing import Any, Final, TypeVar

from cachepipe import context, loops, runs
from cachepipe.portal import in_portal, portal, submit
from cachepipe.services import Loan, close_lent
from cachepipe.stores import Store, cache_for, open_store
from cachepipe.stores.folders import expanded
from cachepipe.stores.remote import is_url
from cachepipe.typedefs import Mode, Repeat

T = TypeVar("T")
_CLOSING_SECONDS: Final = 10.0

_stores: dict[str | int, tuple[Store, Any]] = {}
"""The stores that were opened here, by folder, or by the id of the caller's cache; each with that cache."""
_used: weakref.WeakSet[Store] = weakref.WeakSet()
"""All stores that callers have used; their runs are open."""
_wrappers: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()
_own = Loan()
_lock = threading.Lock()


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


def located(cache: Any) -> Any:
    """Return a cache argument with a folder as its absolute path; see ``cache_for`` for None.

    Raises:
        StoreError: for a string that is not the name of a folder.
    """
    cache = cache_for(cache)
    if not isinstance(cache, str | os.PathLike):
        return cache
    return cache if isinstance(cache, str) and is_url(cache) else str(expanded(cache))


def kept_store(cache: Any) -> Store:
    """Return the store of what `located` returns.

    A store that is opened here stays open until `close_clients`. The store's run lasts until then, or until
    the caller's store is collected. So consecutive callers are in one run and share the store's files.
    """
    name = cache if isinstance(cache, str) else id(cache)
    with _lock:
        if name in _stores:
            return _stores[name][0]
        store, owned = open_store(cache)
        if owned:
            _stores[name] = (store, cache)
        if store not in _used:
            _used.add(store)
            runs.opened(store.identity, store)
        return store


def own_client(store: Store, mode: Mode, repeat: Repeat, api_key: str | None, base_url: str | None) -> Any:
    """Return the client of an endpoint for a store; on the portal's loop."""
    from cachepipe.sdk.openai import AsyncOpenAI  # noqa: PLC0415 - loads the SDK

    options: dict[str, Any] = {"api_key": api_key, "base_url": base_url, "mode": mode, "repeat": repeat}
    options["budget"] = context.current().budget_of(None)
    name = (id(store), *options.values())  # the client keeps the store, so that the id stays the store's
    return _own.client(name, lambda: AsyncOpenAI(cache=store, **options))


def wrapped(client: Any, cache: Any, repeat: Repeat | None) -> Any:
    """Return a plain client with a cache: the same one each time, so that its calls are one run."""
    from cachepipe.sdk.wrapping import wrap  # noqa: PLC0415 - loads the SDK

    store = kept_store(cache)
    budget = context.current().budget_of(None)
    name = (id(store), repeat, budget)
    with _lock:
        known = _wrappers.setdefault(client, {})
        if name not in known:  # the wrapper keeps the store, so that the id stays the store's
            known[name] = wrap(client, cache=store, repeat=repeat or "fresh", budget=budget)
        return known[name]


async def close_clients() -> None:
    """Wait for what is in flight, and close the clients that were made here; later calls make new ones."""

    async def close() -> None:
        await close_lent()
        with _lock:
            _wrappers.clear()
            while _used:
                store = _used.pop()
                runs.closed(store.identity, store)
            while _stores:
                _, (store, _) = _stores.popitem()
                store.close()

    await on_portal(close())


@atexit.register
def _at_exit() -> None:
    if _used:
        with contextlib.suppress(Exception):  # nobody can handle it any more
            work: Awaitable[None] = asyncio.wait_for(close_clients(), _CLOSING_SECONDS)
            in_portal(work)  # type: ignore[arg-type]  # wait_for is a coroutine


def _after_fork() -> None:
    """Drop the clients in a forked child, which must not share connections with its parent."""
    global _lock, _own
    _lock, _own = threading.Lock(), Loan()
    for each in (_stores, _used, _wrappers):
        each.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
