"""Where samples and the ledger live, and which store a caller's argument stands for."""

from __future__ import annotations

import os
from typing import Any

from cachepipe import context, replaying
from cachepipe.stores.base import Store
from cachepipe.stores.bundles.reader import is_bundle
from cachepipe.stores.disk import DiskStore
from cachepipe.stores.folders import expanded, homeless
from cachepipe.stores.memory import MemoryStore
from cachepipe.stores.remote import is_url

__all__ = [
    "DiskStore",
    "MemoryStore",
    "Store",
    "cache_for",
    "default_folder",
    "open_store",
    "switched_off",
]


def switched_off() -> bool:
    """Return True if the environment switches caching off: ``CACHEPIPE_DISABLE=1``."""
    return os.environ.get("CACHEPIPE_DISABLE", "") not in ("", "0")


def default_folder() -> str:
    """Return the default cache folder.

    ``CACHEPIPE_DIR``, else ``caches/`` in the current folder if it exists, else the user's cache folder.

    Raises:
        StoreError: when the user has no home directory.
    """
    if named := os.environ.get("CACHEPIPE_DIR"):
        return named
    if os.path.isdir("caches"):  # noqa: PTH112 - a string is what is returned
        return os.path.join("caches", "default")  # noqa: PTH118
    import platformdirs  # noqa: PLC0415 - only when it is needed

    try:
        return str(expanded(platformdirs.user_cache_dir("cachepipe", appauthor=False)))
    except RuntimeError as error:
        raise homeless("the default cache folder") from error


def cache_for(cache: Any) -> Any:
    """Return the cache that an argument stands for: None is that of the experiment, or the default folder.

    In ``cachepipe replay``, every cache but an open store is the one that is replayed.
    """
    if replaying.CURRENT is not None and not hasattr(type(cache), "apply_now"):
        return replaying.CURRENT.cache
    cache = context.current().cache_of(cache)
    return default_folder() if cache is None else cache


def open_store(
    cache: Any = None,
    *,
    durability: str = "process",
    wait_for_others: float | None = None,
    read_only: bool | None = None,
) -> tuple[Store, bool]:
    """Return the store for a path, a URL, a ``diskcache.Cache`` or a store; see `cache_for` for None.

    A bundle is only read. Of a list of these, the first one is written, and the others are read below it.

    Returns:
        The store, and whether this function opened it, so that the caller must close it.
    """
    if replaying.CURRENT is not None:
        read_only = True
    return _open(cache_for(cache), durability, wait_for_others, read_only)


def _open(
    cache: Any, durability: str, wait_for_others: float | None, read_only: bool | None
) -> tuple[Store, bool]:
    """Return the store for what `cache_for` has returned, as `open_store` does."""
    if hasattr(type(cache), "apply_now"):
        return cache, False
    if isinstance(cache, list | tuple) or (
        isinstance(cache, str | os.PathLike) and not is_url(str(cache)) and is_bundle(cache)
    ):
        from cachepipe.stores.layers import open_layers  # noqa: PLC0415 - only when it is needed

        def open_one(one: Any, write: bool) -> tuple[Store, bool]:
            one = one if replaying.CURRENT is not None else cache_for(one)
            return _open(one, durability, wait_for_others, read_only if write else True)

        return open_layers(cache if isinstance(cache, list | tuple) else [cache], open_one), True
    if isinstance(cache, str) and is_url(cache):
        from cachepipe.stores.remote.urls import open_url  # noqa: PLC0415 - only when it is needed

        remote = open_url(
            cache, durability=durability, read_only=bool(read_only), wait_for_others=wait_for_others
        )
        return remote, True
    if isinstance(cache, str | os.PathLike) or hasattr(type(cache), "directory"):
        store = DiskStore(
            cache,
            durability=durability,  # type: ignore[arg-type]  # it is checked there
            wait_for_others=wait_for_others,
            read_only=read_only,
        )
        return store, True
    raise TypeError(
        "cache= takes a folder, a URL, a bundle, a diskcache.Cache, a store such as MemoryStore(), or a list "
        f"of these; got {cache!r}"
    )
