"""Removes from caches what nobody needs any more, on record, and gives the disk space back.

``contract/removal.py`` decides what goes. Draws go first and samples later, in transactions of their own: so
a process that is killed in between leaves samples that nobody has drawn, and nothing else. On a server, the
transaction of each question is one of its own.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import orjson

from cachepipe.accounting import Account
from cachepipe.contract.draws import label
from cachepipe.contract.entries import Entry
from cachepipe.contract.removal import Selection, Step, step
from cachepipe.differences import loaded
from cachepipe.errors import StoreError
from cachepipe.listings import known_scope, model_in
from cachepipe.prices import Prices
from cachepipe.stores import open_store
from cachepipe.stores.base import (
    Discard,
    Drop,
    Dropped,
    Erase,
    Erased,
    OthersRemove,
    PartlyApplied,
    RecordRemoval,
    Store,
    Withdraw,
    new_id,
)
from cachepipe.stores.remote import is_url
from cachepipe.stores.sums import deleted_by, made_for

_AT_ONCE: Final = 500  # questions that are removed from in one transaction, or samples of one question
_PATIENCE: Final = 5.0  # seconds to wait for another command
_PAUSE: Final = 0.1  # seconds between two tries

_T = TypeVar("_T")
_Steps = list[tuple[Entry, Step]]

Cache = str | os.PathLike[str] | Store
"""A folder, the URL of a server, or an open store."""


@dataclass(slots=True)
class Removal:
    """What was removed, or would be.

    Attributes:
        selected: what was selected, by name of the option.
        questions: how many questions are concerned.
        draws: how many draws are removed.
        samples: how many samples are deleted.
        size: how many bytes their content takes.
        unused: how many of the samples stay that no draw has any more.
        questions_deleted: how many questions are deleted, because nothing is left of them.
        cost: what the samples have cost that are deleted, or that no draw has any more.
        done: whether it was done completely.
    """

    selected: dict[str, Any]
    questions: int = 0
    draws: int = 0
    samples: int = 0
    size: int = 0
    unused: int = 0
    questions_deleted: int = 0
    cost: Account = field(default_factory=Account)
    done: bool = False

    def as_dict(self, prices: Prices | None = None) -> dict[str, Any]:
        """Return the facts by name, with the tokens and the cost in US dollars."""
        cost = self.cost.as_dict((prices or Prices()).cost_of_sum)
        return {"selected": self.selected, **self._counts(), "cost": cost, "done": self.done}

    def _counts(self) -> dict[str, int]:
        counted = {"questions": self.questions, "draws": self.draws, "samples": self.samples}
        rest = {"unused": self.unused, "questions_deleted": self.questions_deleted}
        return {**counted, "bytes": self.size, **rest}

    def _add(self, entry: Entry, one: Step, *, erases: bool) -> None:
        self.questions_deleted += one.ends
        self.questions += 1
        self.draws += one.draws
        self.cost.add_all([sample.header for sample in one.unused], entry.scope or "")
        if erases:
            self.samples += len(one.unused)
            self.size += sum(len(sample.payload) for sample in one.unused)
        else:
            self.unused += len(one.unused)

    def _document(self, name: str, at: float, spent: _Spent, deleting: Sequence[Entry] = ()) -> bytes:
        """Return the record.

        Args:
            name: its id.
            at: when the command began, in seconds since 1970.
            spent: what the samples of the deleted questions have cost.
            deleting: the questions that are deleted next.
        """
        facts = {"id": name, "at": at, "selected": self.selected, **self._counts()}
        next_ones = [
            [each.key, each.samples[0].id, _Spent([each]).rows()] for each in deleting if each.samples
        ]
        sums = {"spent": spent.rows(), "deleting": next_ones}
        return orjson.dumps({**facts, "cost": self.cost.rows(), "done": self.done, **sums})


class _Spent:
    """What the samples of questions have cost, by the run and the label of the namespace that paid."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._sums: dict[tuple[str, str], Account] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Add all samples of a question, also those that were deleted before."""
        headers: dict[tuple[str, str], list[bytes]] = {}
        for sample in entry.samples:
            run, namespace, _ = made_for(sample.header)
            headers.setdefault((run, namespace), []).append(sample.header)
        for place, found in headers.items():
            self._sums.setdefault(place, Account()).add_all(found, entry.scope or "")

    def rows(self) -> list[list[Any]]:
        """Return the sums as JSON can hold them."""
        return [[*place, account.rows()] for place, account in self._sums.items()]


def forget(cache: Cache, namespace: str | None, *, samples: bool = False, dry_run: bool = False) -> Removal:
    """Remove all draws of a namespace, as if it had never drawn; what was billed stays billed.

    Samples that other namespaces have drawn stay. A later run of the namespace draws anew.

    Args:
        cache: the cache.
        namespace: the namespace; None is that of requests without one.
        samples: whether the samples are deleted that then no namespace has drawn. By default they stay, count
            as wasted, and are used by later runs.
        dry_run: only return what would be removed.

    Raises:
        StoreError: when the cache has no draws of the namespace, or a process that is running has made some.
    """
    selection = Selection(draws=True, samples=samples, namespaces=[label(namespace)])
    selected = {"command": "rm", "namespace": namespace, "samples": samples}
    removal = _remove(cache, selection, selected, lambda _: True, dry_run=dry_run)
    if not removal.questions:
        name = "requests without a namespace" if namespace is None else f"the namespace {namespace!r}"
        raise StoreError(f"the cache has no draws of {name}; `cachepipe stats` lists the namespaces")
    return removal


def prune(
    cache: Cache,
    *,
    older_than: float | dt.timedelta | None = None,
    namespace: str | None = None,
    model: str | None = None,
    scope: str | None = None,
    larger_than: int | None = None,
    draws: bool = False,
    dry_run: bool = False,
) -> Removal:
    """Delete samples that no draw has; with ``draws``, remove draws together with their samples.

    Args:
        cache: the cache.
        older_than: only what is older, in seconds: samples, and draws of a namespace by its newest draw of
            the question.
        namespace: only questions that this namespace has drawn and, with ``draws``, only its draws.
        model: only questions to this model.
        scope: only questions to this endpoint or adapter, or below this base URL.
        larger_than: only questions whose samples take more bytes together.
        draws: remove the draws too. They cannot be replayed any more: later runs draw anew.
        dry_run: only return what would be removed.

    Raises:
        ValueError: when ``draws`` is given without saying which.
        StoreError: when the cache cannot be read or written, or a process that is running has made a draw.
    """
    if isinstance(older_than, dt.timedelta):
        older_than = older_than.total_seconds()
    scope = None if scope is None else known_scope(scope)
    limits = {
        "older_than": older_than,
        "namespace": namespace,
        "model": model,
        "scope": scope,
        "larger_than": larger_than,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if draws and not given:
        raise ValueError(
            "draws are removed only with older_than, namespace, model, scope or larger_than; got none of them"
        )
    selection = Selection(
        draws=draws,
        samples=True,
        namespaces=None if namespace is None else [label(namespace)],
        before=None if older_than is None else int((time.time() - older_than) * 1e6),
        above=larger_than,
    )

    def fits(entry: Entry) -> bool:
        below = scope is None or entry.scope == scope or (entry.scope or "").startswith(f"{scope}/")
        return below and (model is None or model in (model_in(loaded(entry.document)), entry.scope))

    return _remove(cache, selection, {"command": "prune", **given, "draws": draws}, fits, dry_run=dry_run)


def _remove(
    cache: Cache,
    selection: Selection,
    selected: dict[str, Any],
    fits: Callable[[Entry], bool],
    *,
    dry_run: bool,
) -> Removal:
    store: Any
    on_server = isinstance(cache, str) and is_url(cache)
    store, owned = open_store(cache, durability="process" if on_server else "full", read_only=dry_run or None)
    try:
        removal = Removal(selected)
        if dry_run:
            for entry, one in _steps(store, selection, fits):
                removal._add(entry, one, erases=selection.samples)  # noqa: SLF001 - of this module
            return removal
        if store.read_only:
            raise StoreError(f"the cache {store.identity} cannot be written: {store.why_read_only}")
        return _perform(store, partial(_steps, store, selection, fits), selection, removal)
    finally:
        if owned:
            store.close()


def _steps(store: Store, selection: Selection, fits: Callable[[Entry], bool]) -> Iterator[tuple[Entry, Step]]:
    for entry in store.entries(selection.namespaces):
        if fits(entry) and (one := step(entry, selection)) is not None:
            yield entry, one


def _perform(
    store: Any, steps: Callable[[], Iterator[tuple[Entry, Step]]], selection: Selection, removal: Removal
) -> Removal:
    name, at, spent = new_id(), time.time(), _Spent()
    deleting: list[Entry] = []
    running = False

    def record(*, ends: bool = False) -> None:
        nonlocal running
        document = removal._document(name, at, spent, deleting)  # noqa: SLF001 - of this module
        store.apply_and_wait([RecordRemoval(name, document, running=not ends)])
        running = not ends

    if next(steps(), None) is None:
        removal.done = True
        return removal
    why = f"cachepipe {told(removal.selected)}"
    _wait_for_others(record)
    try:
        _settle(store)
        found = steps()  # from now on, no other command removes anything
        while batch := list(itertools.islice(found, _AT_ONCE)):
            done, refused = _withdrawn(store, batch)
            if selection.samples:
                done = _erased(store, done, why)
            deleting = [entry for entry, one in done if one.ends]
            if deleting:
                record()
                done = _deleted(store, done)
            for entry, one in done:
                if one.ends:
                    spent.add(entry)
                removal._add(entry, one, erases=selection.samples)  # noqa: SLF001 - of this module
            deleting = []
            if refused is not None:
                raise refused
            record()
        removal.done = True
        record(ends=True)
    finally:
        if running:
            with contextlib.suppress(StoreError):  # the error that is under way says more
                record(ends=True)
    return removal


def _wait_for_others(record: Callable[[], None]) -> None:
    """Begin a record; wait a moment for another command, as the lease of one that was killed has to end."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return record()
        except OthersRemove:
            if time.monotonic() > until:
                raise
        time.sleep(_PAUSE)


def _settle(store: Any) -> None:
    """Note in the records of commands that were stopped which questions they have deleted."""
    for record in store.removals():
        if record["deleting"]:
            record["spent"] += deleted_by(store, record)
            record["deleting"] = []
            record.pop("lease", None)
            store.apply_and_wait([RecordRemoval(record["id"], orjson.dumps(record))])


def _withdrawn(store: Any, batch: _Steps) -> tuple[_Steps, StoreError | None]:
    """Remove draws; return what was done, and the error if something was refused."""
    asked = [(entry, one) for entry, one in batch if one.namespaces]
    if not asked:
        return batch, None
    try:
        store.apply_and_wait([Withdraw(one.key, one.namespaces) for _, one in asked])
    except PartlyApplied as error:
        results = error.results
        refused = {one.key for (_, one), each in zip(asked, results, strict=True) if each is not None}
        return [(entry, one) for entry, one in batch if one.key not in refused], StoreError(str(error))
    return batch, None


def _erased(store: Any, batch: _Steps, why: str) -> _Steps:
    """Delete samples; return what was done: samples that were drawn meanwhile stay."""
    pages = [
        Erase(one.key, [each.index for each in page], why) for _, one in batch for page in _pages(one.unused)
    ]
    gone: dict[str, set[int]] = {}
    for some in _pages(pages):
        erased: list[Erased] = store.apply_and_wait(some)
        for page, result in zip(some, erased, strict=True):
            gone.setdefault(page.key, set()).update(result.indices)
    return [
        (entry, one._replace(unused=[each for each in one.unused if each.index in gone.get(one.key, ())]))
        for entry, one in batch
    ]


def _deleted(store: Any, batch: _Steps) -> _Steps:
    """Delete the empty questions, and return what was done. Questions in use stay."""
    drops = [Drop(one.key, [sample.index for sample in entry.samples]) for entry, one in batch if one.ends]
    gone: set[str] = set()
    for _ in range(2):  # the first time, a folder may have to note another sample at its checkpoint
        left = [drop for drop in drops if drop.key not in gone]
        dropped: list[Dropped] = store.apply_and_wait(left) if left else []
        gone |= {drop.key for drop, result in zip(left, dropped, strict=True) if result.gone}
    return [(entry, one._replace(ends=one.key in gone)) for entry, one in batch]


def _pages(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[at : at + _AT_ONCE] for at in range(0, len(items), _AT_ONCE))


def told(selected: dict[str, Any]) -> str:
    """Return a command and its options as one would write them."""
    words = [str(selected["command"])]
    for name, value in selected.items():
        if name != "command" and value is not False:
            option = f"--{name.replace('_', '-')}"
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def discard(cache: Cache, key: str, index: int, why: str) -> None:
    """Discard a sample, on record: its draws get another one at the same position when they are run again.

    Args:
        cache: the cache.
        key: the key of its question.
        index: its index.
        why: the reason, which is stored.

    Raises:
        StoreError: when there is no such sample, or the cache cannot be written.
    """
    store: Any
    store, owned = open_store(cache)
    try:
        store.apply_and_wait([Discard(key, index, why)])
    finally:
        if owned:
            store.close()


@dataclass(frozen=True, slots=True)
class Compacted:
    """The bytes of a cache's files or tables, before and after it was compacted; None if it is not needed."""

    before: int | None
    after: int | None


def compact(cache: str | os.PathLike[str]) -> Compacted:
    """Give the space back that was freed in a cache.

    The files of a folder are rewritten; others may read meanwhile, and if the process is killed, the cache
    stays as it was. In PostgreSQL, what was freed is used for new rows; all may go on meanwhile. Valkey
    frees what is deleted by itself.

    Args:
        cache: the folder or the URL.

    Raises:
        StoreError: when another process writes to the cache in a folder, or the server does not permit it.
    """
    store: Any
    store, owned = open_store(cache)
    try:
        if not hasattr(type(store), "compact"):
            raise StoreError(
                f"only a cache in a folder or on a server can be compacted; got {store.identity}"
            )
        return Compacted(*(store.compact() or (None, None)))
    finally:
        if owned:
            store.close()
