"""Listings of a shared store, for people who look at a cache."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from xxhash import xxh3_64_intdigest

from cachepipe.accounting import RunSums
from cachepipe.contract.allotment import indices_of
from cachepipe.contract.draws import SHARED, namespace_of
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import Interval, IntervalSet, covered
from cachepipe.contract.keys import Question, encode
from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores.base import (
    AdoptSums,
    Bought,
    DiscardInfo,
    DrawInfo,
    KeyInfo,
    NamespaceInfo,
    Sample,
    StoredQuestion,
)
from cachepipe.stores.remote import entries, rows
from cachepipe.stores.remote.engine import PENDING, SAMPLE, Read, Rows
from cachepipe.stores.remote.rows import DrawRow
from cachepipe.stores.remote.session import REMOVALS, RUN, Session
from cachepipe.stores.remote.similar import SimilarQuestions, question_in

_WHOLE: Final = 64  # characters that only a whole key has
_PAGE: Final = 100  # samples, or questions, that are read in one round trip
_SHORT: Final = 20  # samples of a question that are read together with those of others
_DRAWS: Final = (rows.KNOWN, rows.DRAW)
_COUNTED: Final = (*_DRAWS, rows.LISTED, rows.TAKEN, rows.WHY, PENDING)
_HELD: Final = (rows.KNOWN, rows.LISTED, rows.TAKEN)


class Listing:
    """Iterates over the content of a shared store. Each listing looks at all keys that it may name.

    Attributes:
        looked: is called with the number of questions that a listing has looked at, whenever it grows.
    """

    session: Session
    looked: Callable[[int], object] = staticmethod(lambda _: None)
    _similar: SimilarQuestions

    def _check(self) -> None:
        """Raise a ``StoreError`` if the store was closed."""
        raise NotImplementedError

    def _keys(self, fields: Sequence[bytes], prefix: str = "") -> Iterator[_Key]:
        """Iterate over the questions whose keys have a prefix, in any order, with the rows of some fields."""
        self._check()
        if len(prefix) >= _WHOLE and (one := self._key(prefix)) is not None:
            yield one
            return
        seen: set[int] = set()
        for name, found in self.session.engine.scan(prefix, fields):
            if rows.KNOWN in found and not name.startswith(RUN) and (digest := _digest(name)) not in seen:
                seen.add(digest)
                self.looked(len(seen))
                yield _Key(name, found)

    def _key(self, key: str) -> _Key | None:
        return next(self._all_of([key]), None)

    def _all_of(self, keys: Iterable[str]) -> Iterator[_Key]:
        """Iterate over those of the keys that exist, with all rows but the samples."""
        self._check()
        left = iter(keys)
        while page := list(itertools.islice(left, _PAGE)):
            found = self.session.asked(lambda page=page: self.session.engine.rows_of(page))  # type: ignore[misc]
            for key, there in zip(page, found, strict=True):
                if rows.KNOWN in there:
                    yield _Key(key, there)

    def keys(
        self,
        prefix: str = "",
        *,
        newest: bool = False,
        scope: str | None = None,
        namespace: str | None = None,
        holding: Sequence[str] = (),
    ) -> Iterator[KeyInfo]:
        """Iterate over the keys with a prefix, in order of their first request, or newest first.

        Args:
            prefix: the beginning of the keys.
            newest: whether the newest comes first.
            scope: only questions of this scope, or of scopes below it if it is a base URL.
            namespace: only questions that the namespace with this label has drawn.
            holding: only questions whose documents contain these texts; the case of ASCII does not matter.
        """
        texts = [encode(text)[1:-1].lower() for text in holding]
        fields = [rows.KNOWN, *([rows.QUESTION] if texts else [])]
        if namespace is not None:
            fields.append(rows.taken_field(namespace))
        found = [  # as bytes, which take the least memory: there may be millions
            struct.pack(">d", one.at) + rows.encoded(one.name)
            for one in self._keys(fields, prefix)
            if one.is_below(scope)
            and (namespace is None or fields[-1] in one.rows)
            and all(text in one.document.lower() for text in texts)
        ]
        found.sort(reverse=newest)
        names = (rows.decoded(each[8:]) for each in found)
        return (one.info() for one in self._all_of(names) if namespace is None or one.drawn_by(namespace))

    def question(self, key: str) -> StoredQuestion | None:
        """Return the question of a key."""
        self._check()
        fields = [rows.KNOWN, rows.QUESTION]
        [found] = self.session.asked(lambda: self.session.engine.read([Read(key, fields)]))
        return _Key(key, found).question() if rows.KNOWN in found else None

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar.

        It is looked for among some questions only: reading all of them could take long.
        """
        self._check()
        return self._similar.similar(question)

    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key; None if it does not exist or was discarded."""
        return next(self._samples(key, [index]), None)

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index; discarded ones are left out."""
        self._check()
        [found] = self.session.asked(lambda: self.session.engine.read([Read(key, [rows.LISTED])]))
        return self._samples(key, self._stored(_Key(key, found)))

    def _stored(self, one: _Key) -> list[int]:
        """Return the listed indices with a sample; a damaged list may name any number of others."""
        listed = one.indices(rows.LISTED)
        return [index for index in sample_indices(self.session, one.name) if index in listed]

    def _samples(self, key: str, indices: Iterable[int]) -> Iterator[Sample]:
        for index, row in self._rows_of_samples(key, indices):
            sample = rows.load_sample(key, index, row)
            if isinstance(sample, Sample):
                yield sample

    def ids(self, key: str) -> set[str]:
        """Return the permanent ids of the samples of a key, of the discarded ones too."""
        found: set[str] = set()
        for index, row in self._rows_of_samples(key, sample_indices(self.session, key)):
            with contextlib.suppress(DamagedCache, UnsafeRow):
                header, _ = rows.header_in(key, index, row)
                found.add(rows.loads(key, rows.numbered(SAMPLE, index), header or b"{}").get("id", ""))
        return found

    def _rows_of_samples(self, key: str, indices: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        self._check()
        left = iter(indices)
        while page := list(itertools.islice(left, _PAGE)):
            read = Read(key, [rows.numbered(SAMPLE, index) for index in page])
            [found] = self.session.asked(lambda read=read: self.session.engine.read([read]))  # type: ignore[misc]
            for index, name in zip(page, read.fields, strict=True):
                if name in found:
                    yield index, found[name]

    def _with_samples(self, ones: Iterator[_Key]) -> Iterator[tuple[_Key, Iterable[tuple[int, bytes]]]]:
        """Iterate over questions with the rows of their samples; those of short lists are read together."""
        while page := list(itertools.islice(ones, _PAGE)):
            lists = [one.indices(rows.LISTED) for one in page]
            short = [
                Read(one.name, [rows.numbered(SAMPLE, index) for each in listed for index in range(*each)])
                for one, listed in zip(page, lists, strict=True)
                if _size(listed) <= _SHORT
            ]
            read = self.session.asked(lambda short=short: self.session.engine.read(short))  # type: ignore[misc]
            there = {each.key: found for each, found in zip(short, read, strict=True)}
            for one in page:
                if one.name not in there:
                    yield one, self._rows_of_samples(one.name, self._stored(one))
                else:
                    found = there[one.name]
                    yield (
                        one,
                        [
                            (index, found[rows.numbered(SAMPLE, index)])
                            for index in rows.indices_in(found, SAMPLE)
                        ],
                    )

    def discards(self, key: str) -> Iterator[DiscardInfo]:
        """Iterate over the samples of a key that were discarded, by index."""
        one = self._key(key)
        for index in () if one is None else rows.indices_in(one.rows, rows.WHY):
            name = rows.numbered(rows.WHY, index)
            yield DiscardInfo(index, *rows.load_why(key, name, one.content(name)))  # type: ignore[union-attr]

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, in order of creation; ``namespace`` is a label."""
        found = self._keys(_DRAWS) if key is None else filter(None, [self._key(key)])
        infos = [info for one in found for info in one.draws(namespace)]
        return iter(sorted(infos, key=lambda info: info.at))

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, in order of their first draw; the shared draws are left out."""
        draws: dict[str, list[int]] = {}
        first: dict[str, float] = {}
        samples: dict[str, int] = {}
        for one in self._keys((*_DRAWS, rows.TAKEN)):
            for info in one.draws():
                label = info.draw.namespace
                counts = draws.setdefault(label, [0, 0])
                counts[0] += 1
                counts[1] += info.generated
                first[label] = min(info.at, first.get(label, info.at))
            for label, taken in one.taken():
                samples[label] = samples.get(label, 0) + _size(taken)
        for label in sorted(first, key=first.__getitem__):
            if label != SHARED:
                count, generated = draws[label]
                yield NamespaceInfo(namespace_of(label), count, samples.get(label, 0), generated)

    def sums(self) -> Iterator[AdoptSums]:
        """Iterate over what the runs have noted."""
        self._check()
        seen: dict[str, Rows] = dict(self.session.engine.scan(RUN))
        for key, found in seen.items():
            for name, row in found.items():
                if name.startswith(rows.SUMS):
                    content, label = rows.unpack(key, name, row), rows.decoded(name[len(rows.SUMS) :])
                    sums = rows.load_sums(RunSums.loads, key, name, content)
                    yield AdoptSums(key.removeprefix(RUN), label, sums)

    def bought(self) -> Iterator[Bought]:
        """Iterate over all samples, the discarded ones too, as they count in what was spent."""
        for one, found in self._with_samples(self._keys(_HELD)):
            held = covered(sorted(itertools.chain.from_iterable(taken for _, taken in one.taken())))
            for index, row in found:
                try:
                    header, gone = rows.header_in(one.name, index, row)
                except (DamagedCache, UnsafeRow):
                    header, gone = b"", True
                yield Bought(one.scope, header, not gone and index in held)

    def entry(self, key: str) -> Entry | None:
        """Return all that is held of a question, for another cache; None if it is not known."""
        one = self._key(key)
        if one is None:
            return None
        listed = entries.listed_in(key, one.rows)
        return entries.entry(key, one.rows, self._rows_of_samples(key, listed))

    def entries_of(self, keys: Sequence[str]) -> Iterator[Entry]:
        """Iterate over the entries of the keys that are known, in their order."""
        yield from filter(None, map(self.entry, sorted(keys)))

    def entries(self, namespaces: Collection[str] | None = None, *, after: str = "") -> Iterator[Entry]:
        """Iterate over the entries of all questions, in the order of their keys.

        Args:
            namespaces: the labels of namespaces; only questions that one of them has drawn.
            after: only keys after this one.
        """
        names = sorted(
            one.name
            for one in self._keys([rows.KNOWN] if namespaces is None else [*_DRAWS, rows.USE])
            if one.name > after and (namespaces is None or one.concerns(namespaces))
        )
        yield from self.entries_of(names)

    def removals(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of what commands have removed, the oldest first."""
        self._check()
        key = f"{RUN}{REMOVALS}"
        [found] = self.session.asked(lambda: self.session.engine.rows_of([key]))
        records = [
            rows.loads(key, name, rows.unpack(key, name, row))
            for name, row in found.items()
            if name.startswith(rows.REMOVAL)
        ]
        return iter(sorted(records, key=lambda record: record["at"]))

    def totals(self) -> dict[str, int]:
        """Return how many keys, samples, pending samples, draws, namespaces and discards there are."""
        counts = dict.fromkeys(("keys", "samples", "pending", "draws", "namespaces", "discarded"), 0)
        labels: set[str] = set()
        for one in self._keys(_COUNTED):
            info = one.info()
            counts["keys"] += 1
            counts["samples"] += info.samples
            counts["pending"] += info.pending
            counts["discarded"] += len(rows.indices_in(one.rows, rows.WHY))
            for draw in one.draws():
                counts["draws"] += 1
                labels.add(draw.draw.namespace)
        counts["namespaces"] = len(labels - {SHARED})
        return counts


class _Key(NamedTuple):
    """The rows of a question."""

    name: str
    rows: Rows

    def content(self, name: bytes) -> bytes:
        return rows.unpack(self.name, name, self.rows[name])

    def json(self, name: bytes) -> Any:
        return rows.loads(self.name, name, self.content(name))

    def indices(self, name: bytes) -> IntervalSet:
        return rows.load_set(self.name, name, self.content(name)) if name in self.rows else IntervalSet()

    @property
    def scope(self) -> str | None:
        scope: str | None = self.json(rows.KNOWN)[0]
        return scope

    @property
    def document(self) -> bytes:
        return self.content(rows.QUESTION)

    @property
    def at(self) -> float:
        at: float = self.json(rows.KNOWN)[1]
        return at

    def question(self) -> StoredQuestion:
        return question_in(self.name, self.rows)

    def info(self) -> KeyInfo:
        scope, at = self.json(rows.KNOWN)
        pending = len(rows.indices_in(self.rows, PENDING))
        discarded = len(rows.indices_in(self.rows, rows.WHY))
        stored = _size(self.indices(rows.LISTED)) - pending - discarded
        labels = {rows.draw_of(self.name, name).namespace for name in self._names(rows.DRAW)}
        return KeyInfo(self.name, scope, at, stored, pending, len(labels - {SHARED}))

    def is_below(self, scope: str | None) -> bool:
        return scope is None or self.scope == scope or (self.scope or "").startswith(f"{scope}/")

    def drawn_by(self, namespace: str) -> bool:
        return any(rows.draw_of(self.name, name).namespace == namespace for name in self._names(rows.DRAW))

    def concerns(self, namespaces: Collection[str]) -> bool:
        users = (rows.decoded(name[len(rows.USE) :]) for name in self._names(rows.USE))
        return any(map(self.drawn_by, namespaces)) or any(user in namespaces for user in users)

    def draws(self, namespace: str | None = None) -> Iterator[DrawInfo]:
        for name in self._names(rows.DRAW):
            draw = rows.draw_of(self.name, name)
            if namespace is None or draw.namespace == namespace:
                row = DrawRow.loads(self.name, name, self.content(name))
                at = min(segment.stamp for segment in row.segments.values()) / 1e6
                indices = tuple(indices_of(row.segments.values()))
                yield DrawInfo(draw, indices, sum(row.generated.values()), at)

    def taken(self) -> Iterator[tuple[str, IntervalSet]]:
        for name in self._names(rows.TAKEN):
            yield rows.decoded(name[len(rows.TAKEN) :]), self.indices(name)

    def _names(self, prefix: bytes) -> list[bytes]:
        return [name for name in self.rows if name.startswith(prefix)]


def sample_indices(session: Session, key: str) -> list[int]:
    """Return the indices of the stored samples of a key, in order; the discarded ones are among them."""
    return rows.indices_in(session.asked(lambda: session.engine.samples_of(key)), SAMPLE)


def _digest(key: str) -> int:
    """Return what stands for a key among those that were seen, in less memory."""
    return xxh3_64_intdigest(rows.encoded(key))


def _size(intervals: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)
