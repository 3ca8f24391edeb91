"""A writable cache above caches and bundles that are only read.

There is one logic: when a key is first claimed, what the lower layers hold of it is added to the upper store,
in the same transaction and by the rules of ``contract/entries.py``. So hits come from every layer, new
samples go to the upper store, and no sample of a lower layer is given twice. Where nothing may be written, a
store in memory takes the place of the upper one.

What is only looked at is added to another store in memory. When that has grown to its bound, it is emptied;
what is then asked for is read again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import reduce
from heapq import merge as in_key_order
from operator import attrgetter
from typing import Any, Final, Protocol

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry, joined
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.errors import LayerIgnored, NoCache, StoreError, warn
from cachepipe.stores.base import (
    Adopt,
    Adopted,
    Ahead,
    Claim,
    Foreseen,
    Grant,
    Operation,
    PartlyApplied,
    Result,
    Store,
    StoredQuestion,
)
from cachepipe.stores.bundles.reader import Bundle, is_bundle
from cachepipe.stores.memory import MemoryStore
from cachepipe.stores.misses import nearest

_MOST: Final = 32 << 20  # bytes of what was looked at that are kept in memory
_ROW: Final = 1 << 10  # bytes that a question, a sample or a draw takes beside its content
_KEYS: Final = 100_000  # keys of which it is remembered that they were brought up


class Layer(Protocol):
    """What is read: a store, or a bundle."""

    identity: str

    def entry(self, key: str) -> Entry | None:
        """Return all that is held of a question; None if it is not known."""
        ...

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


def _of_shown(name: str) -> Any:
    """Return a property: the method of the store that listings show."""
    return property(lambda store: getattr(store._shown, name))  # noqa: SLF001 - it is its own


class LayeredStore:
    """A store above layers that are only read.

    Args:
        top: the store that is written; None if nothing is.
        layers: what is below it, the first one first.
        owned: the stores and bundles that are closed with this one.
    """

    def __init__(self, top: Store | None, layers: Sequence[Layer], owned: Sequence[Layer] = ()) -> None:
        self._top = top
        self._layers = layers if top is None else [top, *layers]
        self._below = layers
        self._owned = owned
        self._memory = MemoryStore()
        self._seen = MemoryStore()
        self._lock = threading.Lock()
        self._looked: set[str] = set()
        self._size = 0
        self._adopted: set[str] = set()
        self.read_only = top is None
        self.why_read_only = "it consists of caches and bundles that are only read" if top is None else ""
        self.where = ", ".join(_where(each) for each in self._layers)
        self.identity = (
            top.identity if top is not None else f"layers:{'+'.join(each.identity for each in layers)}"
        )
        self.wait_for_others = self._shown.wait_for_others

    @property
    def _shown(self) -> Any:
        """The store that listings show: the upper one, else what was looked at."""
        return self._seen if self._top is None else self._top

    # What is generated, and listings, concern the upper store.
    status, generator, listen = _of_shown("status"), _of_shown("generator"), _of_shown("listen")
    keys, question = _of_shown("keys"), _of_shown("question")
    sample, samples, draws = _of_shown("sample"), _of_shown("samples"), _of_shown("draws")
    namespaces, sums, bought = _of_shown("namespaces"), _of_shown("sums"), _of_shown("bought")
    removals = _of_shown("removals")
    entry, entries_of = _of_shown("entry"), _of_shown("entries_of")

    def __repr__(self) -> str:
        return f"<LayeredStore {self._top!r} above {list(self._below)!r}>"

    # Writing: the upper store gets what the layers below hold of a key.

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction; return None at once if that would have to wait."""
        adopts = self._adoptions(operations)
        results = self._written().apply_now([*adopts, *operations])
        return None if results is None else self._without(adopts, results)

    def apply(self, operations: Sequence[Operation]) -> Awaitable[list[Result]]:
        """Apply the operations in one transaction, in order, without blocking the event loop."""
        adopts = self._adoptions(operations)
        applied = self._written().apply([*adopts, *operations])
        return asyncio.ensure_future(self._apply(adopts, applied)) if adopts else applied

    async def _apply(self, adopts: Sequence[Adopt], applied: Awaitable[list[Result]]) -> list[Result]:
        try:
            return self._without(adopts, await applied)
        except PartlyApplied as error:
            raise PartlyApplied(error.results[len(adopts) :]) from error

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations in the background; this also works without an event loop."""
        self._written().apply_soon([*self._adoptions(operations), *operations])

    def _written(self) -> Store:
        return self._memory if self._top is None else self._top

    def _adoptions(self, operations: Sequence[Operation]) -> list[Adopt]:
        """Return what adds the layers below to the keys that are claimed."""
        keys = {operation.draw.key: None for operation in operations if type(operation) is Claim}
        if len(self._adopted) > _KEYS:
            self._adopted.clear()  # what is brought up again is there already
        adopts: list[Adopt] = []
        for key in keys:
            if key not in self._adopted:
                found = _entries(self._below, key)
                adopts += map(Adopt, found)
                if not found:
                    self._adopted.add(key)
        return adopts

    def _without(self, adopts: Sequence[Adopt], results: Sequence[Result]) -> list[Result]:
        """Return the results of what was asked; note what was added."""
        for adopt, result in zip(adopts, results[: len(adopts)], strict=True):
            _check(adopt, result)
            self._adopted.add(adopt.key)
        return list(results[len(adopts) :])

    # Reading.

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw whose samples are all stored in the upper store, else None."""
        if self._top is not None:
            return self._top.recall(draw, n)
        with self._lock:
            self._look([draw.key])
            return self._seen.recall(draw, n)

    def look(self, claims: Sequence[Claim], *, urgent: bool) -> None:
        """Return None: a sample may be in a lower layer, and only a claim brings it up."""

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of its samples are stored in some layer, else None."""
        with self._lock:
            self._look([draw.key])
            return self._seen.replay(draw, n, taken)

    def foresee(self, wanted: Sequence[tuple[Draw, int, Ahead]], *, refresh: bool = False) -> list[Foreseen]:
        """Return what claims would get, in order; nothing is written."""
        with self._lock:
            self._look([draw.key for draw, _, _ in wanted])
            return self._seen.foresee(wanted, refresh=refresh)

    def entries(self, namespaces: Collection[str] | None = None, *, after: str = "") -> Iterator[Entry]:
        """Iterate over the entries of all questions of the upper store; without one, of all layers.

        Args:
            namespaces: the labels of namespaces; only questions that one of them has drawn.
            after: only keys after this one.
        """
        if self._top is not None:
            return self._top.entries(namespaces, after=after)
        return (entry for entry in entries_of_all(self._layers, namespaces) if entry.key > after)

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question of any layer that differs least; None if none is similar."""
        return nearest(question, filter(None, [each.similar(question) for each in self._layers]))

    def _look(self, keys: Iterable[str]) -> None:
        """Add what all layers hold of keys to what was looked at, and bound that. The lock is held."""
        if self._size > _MOST:
            self._seen.close()
            self._seen = MemoryStore()
            self._looked.clear()
            self._size = 0
        for key in keys:
            if key in self._looked and self._top is None:
                continue
            for entry in _entries(self._layers, key):
                result = self._seen.write([adopt := Adopt(entry)])[0]
                _check(adopt, result)
                if isinstance(result, Adopted) and result.changed:
                    self._size += _size(entry)
            self._looked.add(key)
            self._size += _ROW

    def close(self) -> None:
        """Close what was opened for this store."""
        self._memory.close()
        with self._lock:
            self._seen.close()
        for each in self._owned:
            each.close()


def entries_of_all(sources: Sequence[Any], namespaces: Collection[str] | None) -> Generator[Entry]:
    """Iterate over what stores and bundles hold together of each question, in the order of the keys.

    Where they contradict each other, the first one counts.

    Args:
        sources: the stores and bundles.
        namespaces: the labels of the namespaces that the entries replay; None for everything.
    """
    parts = [
        filter(None, map(Entry.sliced, source.entries(namespaces), itertools.repeat(namespaces)))
        for source in sources
    ]
    if len(parts) == 1:
        yield from parts[0]
        return
    for _, group in itertools.groupby(in_key_order(*parts, key=attrgetter("key")), attrgetter("key")):
        yield reduce(lambda whole, entry: joined(whole, entry) or whole, group)


def _size(entry: Entry) -> int:
    """Return about how many bytes an entry takes in memory."""
    samples = sum(_ROW + len(sample.header) + len(sample.payload) for sample in entry.samples)
    return len(entry.document) + samples + _ROW * len(entry.draws)


def open_layers(caches: Sequence[Any], open_one: Callable[[Any, bool], tuple[Store, bool]]) -> LayeredStore:
    """Return a store above caches and bundles; the first cache is written if it can be.

    Args:
        caches: folders, URLs, stores and bundles.
        open_one: opens a cache that is no bundle, or that is written if the second argument is True.

    Raises:
        StoreError: when there is no cache, or one cannot be opened. If nothing is written, the first one need
            not exist.
    """
    if not caches:
        raise StoreError("cache= takes at least one cache; got an empty list")
    owned: list[Layer] = []
    layers: list[Layer] = []
    top: Store | None = None
    try:
        for place, cache in enumerate(caches):
            if isinstance(cache, str | os.PathLike) and is_bundle(cache):
                bundle = Bundle(cache)
                layers.append(bundle)
                owned.append(bundle)
                continue
            try:
                store, is_ours = open_one(cache, place == 0)
            except NoCache:
                if place or len(caches) == 1:
                    raise
                continue  # what is only read, and would be created, is empty
            if is_ours:
                owned.append(store)
            if place == 0 and not store.read_only:
                top = store
            else:
                layers.append(store)
    except BaseException:
        for each in owned:
            each.close()
        raise
    return LayeredStore(top, layers, owned)


def _entries(layers: Sequence[Layer], key: str) -> list[Entry]:
    """Return what layers hold of a key."""
    found = [layer.entry(key) for layer in layers]
    return [part for entry in found if entry is not None and (part := entry.sliced()) is not None]


def _where(layer: Layer) -> str:
    """Return where a layer is, for people."""
    return str(layer.path) if isinstance(layer, Bundle) else getattr(layer, "where", repr(layer))


def _check(adopt: Adopt, result: Result) -> None:
    """Warn if a layer contradicts the ones above it, which then count."""
    if isinstance(result, Adopted) and (result.different or result.altered):
        warn(
            f"a lower layer holds other samples of {adopt.key[:16]} for the same draws as those above it, "
            "so this question is answered without it. Use another namespace above it",
            LayerIgnored,
        )
