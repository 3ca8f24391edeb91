"""A writable cache above caches and bundles that are only read.

There is one logic: when a key is first claimed, what the lower layers hold of it is added to the upper store,
in the same transaction and by the rules of ``contract/entries.py``. So hits come from every layer, new
samples go to the upper store, and no sample of a lower layer is given twice. Where nothing may be written, a
store in memory takes the place of the upper one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry
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
        self._lock = threading.Lock()
        self._looked: set[str] = set()
        self._adopted: set[str] = set()
        self.read_only = top is None
        self.why_read_only = "it consists of caches and bundles that are only read" if top is None else ""
        seen = self._memory if top is None else top
        self.where = ", ".join(_where(each) for each in self._layers)
        self.identity = (
            seen.identity if top is not None else f"layers:{'+'.join(each.identity for each in layers)}"
        )
        self.wait_for_others = seen.wait_for_others
        # What is generated, and listings, concern the upper store.
        self.status, self.generator, self.listen = seen.status, seen.generator, seen.listen
        self.keys, self.question = seen.keys, seen.question
        self.sample, self.samples, self.draws = seen.sample, seen.samples, seen.draws
        self.namespaces, self.sums, self.bought = seen.namespaces, seen.sums, seen.bought
        self.removals = seen.removals
        self.entry, self.entries, self.entries_of = seen.entry, seen.entries, seen.entries_of

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
        self._look(draw.key)
        return self._memory.recall(draw, n)

    def look(self, claims: Sequence[Claim]) -> None:
        """Return None: a sample may be in a lower layer, and only a claim brings it up."""

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of its samples are stored in some layer, else None."""
        self._look(draw.key)
        return self._memory.replay(draw, n, taken)

    def foresee(self, wanted: Sequence[tuple[Draw, int, Ahead]], *, refresh: bool = False) -> list[Foreseen]:
        """Return what claims would get, in order; nothing is written."""
        for draw, _, _ in wanted:
            self._look(draw.key)
        return self._memory.foresee(wanted, refresh=refresh)

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question of any layer that differs least; None if none is similar."""
        return nearest(question, filter(None, [each.similar(question) for each in self._layers]))

    def _look(self, key: str) -> None:
        """Add what all layers hold of a key to the store in memory."""
        with self._lock:
            if key in self._looked and self._top is None:
                return
            for entry in _entries(self._layers, key):
                _check(adopt := Adopt(entry), self._memory.write([adopt])[0])
            self._looked.add(key)

    def close(self) -> None:
        """Close what was opened for this store."""
        self._memory.close()
        for each in self._owned:
            each.close()


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
