"""Makes the next item of an iterator while the current one is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final, TypeVar

T = TypeVar("T")

_END: Final[Any] = object()


@contextlib.contextmanager
def prefetched(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Return an iterator over items; one thread makes the next item while the current one is used.

    Use it as a context manager, which ends the thread.
    """
    with ThreadPoolExecutor(1, "cachepipe-prefetch") as pool:
        yield _made_in(pool, iter(items))


def _made_in(pool: Executor, items: Iterator[T]) -> Iterator[T]:
    coming = pool.submit(next, items, _END)
    while (item := coming.result()) is not _END:
        coming = pool.submit(next, items, _END)
        yield item
