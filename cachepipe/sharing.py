"""Hands what caches hold to others: bundles, merges and copies both ways.

Whatever the engines of the caches are, what is copied keeps its permanent ids and stamps, and nothing is
renumbered or overwritten. ``contract/entries.py`` has the rules.
"""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import os
import secrets
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from heapq import merge as in_key_order
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from cachepipe.contract.draws import label, namespace_of
from cachepipe.contract.entries import Addition, Entry, addition, joined, rescoped
from cachepipe.contract.keys import digest
from cachepipe.errors import ImportRefused, SecretsFound, StoreError
from cachepipe.prefetch import prefetched
from cachepipe.stores import DiskStore, cache_for, open_store
from cachepipe.stores.base import Adopt, Adopted, Store
from cachepipe.stores.bundles.manifest import Manifest
from cachepipe.stores.bundles.reader import Bundle, is_bundle
from cachepipe.stores.bundles.secrets import Findings
from cachepipe.stores.bundles.writer import Writer
from cachepipe.stores.layers import entries_of_all
from cachepipe.stores.scratch import scratch_folder

_BATCH: Final = 1000  # entries that are written in one transaction
_BYTES: Final = 8 << 20  # bytes of their samples
_SHOWN: Final = 20  # conflicts that an error names

_Item = TypeVar("_Item")

Progress = Callable[[str, int], None]
"""Gets what is being done, and how many questions are done."""
Cache = str | os.PathLike[str] | Store
"""A folder, the URL of a server, a bundle, or an open store."""
Caches = Cache | Sequence[Cache]
"""A cache, or a list of caches that are read together."""
Scopes = str | Mapping[str, str]
"""The scope that all questions get, or new scopes by old ones."""


def _unseen(doing: str, done: int) -> None:
    """Show no progress."""


# Export.


def export(
    cache: Caches,
    path: str | os.PathLike[str],
    *,
    namespaces: Collection[str | None] | None = None,
    allow_secrets: bool = False,
    overwrite: bool = False,
    progress: Progress = _unseen,
) -> Manifest:
    """Write what replays some namespaces into a bundle: questions, samples and draws.

    Equal content gives equal bytes, from whichever cache or engine it comes.

    Args:
        cache: where it comes from.
        path: the file, by convention with the ending ``.cachepipe``.
        namespaces: the namespaces; None for all, and for samples that nobody has drawn.
        allow_secrets: whether texts that look like credentials or private addresses are exported.
        overwrite: whether a file with other content is replaced.
        progress: gets how many questions are done.

    Returns:
        What the bundle holds.

    Raises:
        SecretsFound: when a text looks like a credential or a private address; then no file is written.
        StoreError: when the cache cannot be read, or has no draws of a namespace.
    """
    target = Path(path)
    if target.is_dir():
        raise StoreError(f"a bundle is a file; {target} is a folder. Name a file, such as paper.cachepipe")
    findings = None if allow_secrets else Findings()
    unused = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with contextlib.closing(slices(cache, namespaces)) as read, unused.open("xb") as file:
            found = _counted(_checked(read, namespaces), "exporting", progress)
            manifest = Writer(file, version("cachepipe"), namespaces, findings).write(found)
            file.flush()
            os.fsync(file.fileno())
        if findings is not None and findings.count:
            raise SecretsFound(findings.found, findings.count)
        if target.exists() and not overwrite and not filecmp.cmp(target, unused, shallow=False):
            raise StoreError(
                f"{target} exists and has other content; name another file, or overwrite it with --overwrite"
            )
        unused.replace(target)
    except OSError as error:
        raise StoreError(f"the bundle {target} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            unused.unlink()
    return manifest


def slices(cache: Caches, namespaces: Collection[str | None] | None) -> Generator[Entry]:
    """Iterate over the parts of entries that replay some namespaces, or over all; see `export`."""
    labels = None if namespaces is None else {label(name) for name in namespaces}
    with contextlib.ExitStack() as stack:
        caches: Any = cache if isinstance(cache, list | tuple) else [cache]
        sources = [stack.enter_context(opened(one)) for one in caches]
        yield from entries_of_all(sources, labels)


def _checked(entries: Iterable[Entry], namespaces: Collection[str | None] | None) -> Iterator[Entry]:
    """Iterate over entries; raise an error at the end if a namespace has no draws."""
    missing = {label(name) for name in namespaces or ()}
    for entry in entries:
        if missing:
            missing.difference_update(draw.namespace for draw in entry.draws)
            missing.difference_update(entry.users)
        yield entry
    if missing:
        names = ", ".join(repr(namespace_of(name)) for name in sorted(missing))
        raise StoreError(f"the cache has no draws of the namespace {names}; `cachepipe stats` lists them all")


def _all(store: Store | Bundle) -> Iterator[Entry]:
    """Iterate over all that another cache gets."""
    return (found for entry in store.entries() if (found := entry.sliced()) is not None)


def _counted(
    items: Iterable[_Item], doing: str, progress: Progress, size: Callable[[_Item], int] = lambda _: 1
) -> Iterator[_Item]:
    """Iterate over items of so many questions; tell how many questions are done."""
    done = 0
    for item in items:
        yield item
        done += size(item)
        progress(doing, done)


# Import, merge and sync.


@dataclass(slots=True)
class Counts:
    """What a cache got from others.

    Attributes:
        questions: how many questions the others hold.
        new: questions that the cache did not have.
        more: questions of which it got samples, draws or users that it did not have.
        same: questions of which it had everything.
        samples: samples that it got.
        draws: draws that it got, or that became longer.
    """

    questions: int = 0
    new: int = 0
    more: int = 0
    same: int = 0
    samples: int = 0
    draws: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


@dataclass(slots=True)
class _Conflicts:
    """What contradicts: sentences, at most some of them, and how many there are."""

    told: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, entry: Entry, found: Addition | Adopted) -> None:
        for draw in found.different:
            name = namespace_of(draw.namespace)
            who = "the shared draw" if draw.shared else f"namespace {name!r}"
            self._add(f"{who} drew other samples of {entry.key[:16]} in each")
        for name in found.altered:
            self._add(f"sample {name} of {entry.key[:16]} is another answer in each")

    def _add(self, what: str) -> None:
        self.count += 1
        if len(self.told) < _SHOWN:
            self.told.append(what)


def import_(
    path: str | os.PathLike[str],
    cache: Cache,
    *,
    scope: Scopes | None = None,
    progress: Progress = _unseen,
) -> Counts:
    """Add what a bundle holds to a cache, without renumbering or overwriting anything.

    The bundle is checked completely before anything is written. An import that was stopped can be repeated.

    Args:
        path: the bundle.
        cache: the cache, which is created if it does not exist.
        scope: puts the questions under another scope.
        progress: gets how many questions are done.

    Raises:
        BundleError: when the file is not a bundle, or is damaged.
        ImportRefused: when a draw of the bundle has other samples in the cache; nothing was changed.
        StoreError: when the cache cannot be written.
    """
    with contextlib.closing(Bundle(path)) as bundle, opened(cache, write=True) as store:
        return _combine([bundle], [store], scope, progress)[0]


def merge(
    caches: Sequence[Cache],
    into: Cache,
    *,
    progress: Progress = _unseen,
) -> Counts:
    """Add what some caches or bundles hold to another cache; see `import_`."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(opened(cache)) for cache in caches]
        target = stack.enter_context(opened(into, write=True))
        return _combine(sources, [target], None, progress)[0]


def sync(one: Cache, other: Cache, *, progress: Progress = _unseen) -> tuple[Counts, Counts]:
    """Copy between two caches both ways, so that each holds what both held; see `import_`.

    A copy that was stopped continues when it is repeated.

    Returns:
        What the first one got, and what the second one got.
    """
    with opened(one, write=True) as first, opened(other, write=True) as second:
        if first.identity == second.identity:
            raise StoreError("the two are one cache; name two different ones")
        found = _combine([first, second], [first, second], None, progress)
        return found[0], found[1]


def _combine(
    sources: Sequence[Store | Bundle],
    targets: Sequence[Store],
    scope: Scopes | None,
    progress: Progress,
) -> list[Counts]:
    """Add what the sources hold to each target, if nothing contradicts; return what each got."""
    copies = [_Copy(target, sources) for target in targets]
    conflicts = _Conflicts()
    questions = 0
    with prefetched(_batches(_groups(sources, scope))) as batches:
        for batch in _counted(batches, "checking", progress, len):
            _check(copies, batch, conflicts)
            questions += len(batch)
    if conflicts.count:
        raise ImportRefused(
            conflicts.told,
            conflicts.count,
            "Draw in another namespace in one of them, or import one as a bundle under another --scope",
        )
    if any(copy.changes for copy in copies):
        with prefetched(_batches(_groups(sources, scope))) as batches:
            for batch in _counted(batches, "writing", progress, len):
                for copy in copies:
                    add(copy.target, copy.missing(batch), copy.counts)
    else:
        for copy in copies:
            copy.counts.questions = copy.counts.same = questions
    _add_sums(sources, targets)
    return [copy.counts for copy in copies]


_Group = list[tuple[int, Entry]]
"""What the sources hold of one question; each entry with the number of its source."""


class _Copy:
    """What a target gets.

    Args:
        target: the store.
        sources: the stores and bundles; the target may be one of them.

    Attributes:
        is_source: whether the target is one of the sources.
        changes: whether anything has to be written, as far as was looked.
        counts: what was written.
    """

    def __init__(self, target: Store, sources: Sequence[Store | Bundle]) -> None:
        self.target = target
        self.changes = False
        self.counts = Counts()
        self._place = next((place for place, source in enumerate(sources) if source is target), -1)
        self.is_source = self._place >= 0

    def held(self, batch: Sequence[_Group]) -> dict[str, Entry]:
        """Return by key what the target holds of some questions; if it is a source, nothing is read again."""
        if self.is_source:
            return {entry.key: entry for group in batch for place, entry in group if place == self._place}
        return {entry.key: entry for entry in self.target.entries_of([group[0][1].key for group in batch])}

    def missing(self, batch: Sequence[_Group]) -> list[list[Entry]]:
        """Return what may have to be added of each question."""
        if not self.is_source:
            return [[entry for _, entry in group] for group in batch]
        held = self.held(batch)
        return [
            [entry for _, entry in group if entry is not (own := held.get(entry.key)) and _adds(own, entry)]
            for group in batch
        ]


def _adds(ours: Entry | None, theirs: Entry) -> bool:
    """Return True if an entry adds anything to what a store holds, or contradicts it."""
    found = addition(ours, theirs)
    return found.changes or found.refused


def _add_sums(sources: Sequence[Store | Bundle], targets: Sequence[Store]) -> None:
    """Add what the runs of caches have noted to each target; bundles hold nothing of it."""
    for source in sources:
        if isinstance(source, Bundle):
            continue
        sums = iter(source.sums())
        while some := list(itertools.islice(sums, _BATCH)):
            for target in targets:
                if target.identity != source.identity:
                    target.apply_and_wait(some)  # type: ignore[attr-defined]  # all that is opened here has it


def _check(copies: Sequence[_Copy], batch: list[_Group], conflicts: _Conflicts) -> None:
    """Note what of a batch contradicts what the targets hold, or itself; and whether it changes a target."""
    held = [copy.held(batch) for copy in copies]
    for group in batch:
        entries = [entry for _, entry in group]
        for copy, each in zip(copies, held, strict=True):
            own = each.get(entries[-1].key)
            copy.changes = copy.changes or any(entry is not own and _adds(own, entry) for _, entry in group)
            if own is not None and not copy.is_source:
                entries.insert(0, own)
        whole, *others = entries
        for entry in others:
            found = addition(whole, entry)
            if found.refused:
                conflicts.add(entry, found)
            elif entry is not others[-1]:
                whole = joined(whole, entry) or whole


def _groups(sources: Sequence[Store | Bundle], scope: Scopes | None) -> Iterator[_Group]:
    """Iterate over what the sources hold of each question."""
    streams = [_numbered(place, _rescoped(_all(source), scope)) for place, source in enumerate(sources)]
    if len(streams) == 1 and scope is None:
        yield from ([entry] for entry in streams[0])
        return
    for _, group in itertools.groupby(in_key_order(*streams, key=_key), _key):
        yield list(group)


def _numbered(place: int, entries: Iterator[Entry]) -> Iterator[tuple[int, Entry]]:
    """Iterate over the entries of a source, with its number."""
    return zip(itertools.repeat(place), entries)


def _key(entry: tuple[int, Entry]) -> str:
    return entry[1].key


def _rescoped(entries: Iterator[Entry], scope: Scopes | None) -> Iterator[Entry]:
    if scope is None:
        yield from entries
        return
    for entry in entries:
        new = scope if isinstance(scope, str) else scope.get(entry.scope or "")
        yield entry if new is None else rescoped(entry, new, digest(new, entry.document))


def _batches(groups: Iterable[_Group]) -> Iterator[list[_Group]]:
    """Iterate over groups of entries that are written together."""
    batch: list[_Group] = []
    size = 0
    for group in groups:
        batch.append(group)
        size += sum([len(sample.payload) for _, entry in group for sample in entry.samples])
        if len(batch) >= _BATCH or size >= _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def add(target: Store, batch: Sequence[Sequence[Entry]], counts: Counts) -> None:
    """Add the entries of some questions to a store in one transaction."""
    # First one entry of each question, then the next one of each: a store adds those of different questions
    # together.
    rounds = itertools.zip_longest(*batch)
    adopts = [Adopt(entry) for each in rounds for entry in each if entry is not None]
    apply: Any = target.apply_and_wait  # type: ignore[attr-defined]  # all that is opened here has it
    changed: set[str] = set()
    new: set[str] = set()
    for adopt, result in zip(adopts, apply(adopts) if adopts else (), strict=True):
        if result.different or result.altered:
            raise StoreError(
                f"the cache was changed meanwhile, and now contradicts what is added of {adopt.key}. What "
                "came before was added; try again to see what contradicts"
            )
        counts.samples += result.samples
        counts.draws += result.draws
        if result.changed:
            changed.add(adopt.key)
        if result.new:
            new.add(adopt.key)
    counts.questions += len(batch)
    counts.same += len(batch) - len(changed)
    counts.new += len(changed & new)
    counts.more += len(changed - new)


@contextlib.contextmanager
def unpacked(path: str | os.PathLike[str], *, progress: Progress = _unseen) -> Iterator[DiskStore]:
    """Open what a bundle holds as a store that is only read, in a temporary folder.

    Args:
        path: the bundle.
        progress: gets how many questions are unpacked.

    Raises:
        BundleError: when the file is not a bundle, or is damaged.
    """
    with contextlib.closing(Bundle(path)) as bundle, scratch_folder() as folder:
        with contextlib.closing(DiskStore(folder)) as store:
            for batch in _counted(_batches(_groups([bundle], None)), "unpacking", progress, len):
                add(store, [[entry for _, entry in group] for group in batch], Counts())
        with contextlib.closing(_UnpackedBundle(folder, read_only=True)) as unpacked:
            unpacked.bundle = bundle.path
            yield unpacked


class _UnpackedBundle(DiskStore):
    """What a bundle holds, in a temporary folder."""

    bundle: Path

    @property
    def where(self) -> str:
        """The bundle."""
        return str(self.bundle)

    def size(self) -> int:
        """Return the number of bytes of the bundle."""
        return self.bundle.stat().st_size


@contextlib.contextmanager
def opened(cache: Cache, *, write: bool = False) -> Iterator[Any]:
    """Open a cache or, for reading, a bundle; an open store stays open."""
    cache = cache_for(cache)
    if isinstance(cache, str | os.PathLike) and is_bundle(cache):
        if write:
            raise StoreError(f"{os.fspath(cache)} is a bundle, which is only read; name a folder or a URL")
        with contextlib.closing(Bundle(cache)) as bundle:
            yield bundle
        return
    store, owned = open_store(
        cache, durability="full" if write else "process", read_only=None if write else True
    )
    try:
        if write and store.read_only:
            raise StoreError(f"the cache {store.identity} cannot be written: {store.why_read_only}")
        yield store
    finally:
        if owned:
            store.close()
