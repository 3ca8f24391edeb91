"""What one cache hands to another about a question, and how it is added to what is there (C1, C2, C3).

An index is a position in one store, so entries name samples by their permanent ids. Nothing that a store
holds is renumbered or overwritten. A sample that is new there gets the index at which it was generated, if
that is free, else a new one. A draw that is new there is added as it is. Where both hold a draw, one of the
two must continue the other: then the longer one stands, and each cache replays what it delivered. Otherwise
the draws are *different*, and nothing of the entry is added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cachepipe.contract.allotment import Segment, laid, lowest_new
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.schedule import Place

NOBODY = 0
"""The lease of segments that came from another cache: no live process wrote them here."""


class EntrySample(NamedTuple):
    """A sample of an entry.

    Attributes:
        id: its permanent id.
        origin: the index at which it was generated.
        header: JSON of its id and stamp, and of the call that made it.
        payload: the encoded value; empty if the sample was discarded.
        discarded: why it was discarded, or None.
        index: its index in the store that the entry was read from.
    """

    id: str
    origin: int
    header: bytes
    payload: bytes
    discarded: str | None = None
    index: int = -1  # type: ignore[assignment]  # a sample is no sequence that one searches


class EntrySegment(NamedTuple):
    """A segment of a draw (see ``allotment.Segment``).

    Attributes:
        position: the position of its first sample in the draw.
        samples: the ids of its samples; None for one that is not stored.
        stamp: the stamp of its writing.
        generated: how many of its samples were to be generated for the draw.
        place: the place in the schedule that the draw has noted, if any (C11).
        number: its number in the store that the entry was read from.
    """

    position: int
    samples: tuple[str | None, ...]
    stamp: int
    generated: int = 0
    place: Place | None = None
    number: int = -1

    @property
    def content(self) -> tuple[int, tuple[str | None, ...]]:
        """What it adds to the draw."""
        return self.position, self.samples


@dataclass(slots=True)
class Entry:
    """What a cache holds of one question.

    Attributes:
        key: the key of the question.
        scope: its scope.
        document: its canonical JSON.
        samples: its samples, in order (see `ordered`).
        draws: the segments of each of its draws, in order of writing.
        users: the labels of the namespaces that use its shared draw.
        used: the indices of the store that no other sample may get; None if the entry was read to be copied.
    """

    key: str
    scope: str | None
    document: bytes
    samples: list[EntrySample] = field(default_factory=list)
    draws: dict[Draw, list[EntrySegment]] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)
    used: IntervalSet | None = None

    def sliced(self, labels: Collection[str] | None = None) -> Entry | None:
        """Return what another cache gets: what replays some namespaces, or all; None if that is nothing.

        What a failure may still undo is left out.

        Args:
            labels: the labels of the namespaces; None for all, and for samples that nobody has drawn.
        """
        users, draws, samples = self.users, {}, self.samples
        if labels is None and self.used is None and all(map(_is_settled, self.draws.values())):
            return self if self.draws or samples else None
        if labels is not None:
            users = [label for label in users if label in labels]
        for draw, segments in self.draws.items():
            wanted = labels is None or (users if draw.shared else draw.namespace in labels)
            if wanted and (settled := _without_open_end(segments)):
                draws[draw] = settled
        if labels is not None:
            drawn = {name for each in draws.values() for segment in each for name in segment.samples}
            samples = [sample for sample in samples if sample.id in drawn]
        if not draws and not samples:
            return None
        return Entry(self.key, self.scope, self.document, samples, draws, users)

    def stamps(self) -> list[int]:
        """Return the stamps of its draws."""
        return [segment.stamp for segments in self.draws.values() for segment in segments]


def ordered(samples: Iterable[EntrySample]) -> list[EntrySample]:
    """Return samples in an order that is the same in every store and does not depend on their length (C5)."""
    found = list(samples)
    if len(found) > 1:
        found.sort(key=lambda sample: (sample.origin, sample.id))
    return found


def _is_settled(segments: Sequence[EntrySegment]) -> bool:
    """Return True if a draw has segments, and the last one is not one that may be undone."""
    return bool(segments) and (not segments[-1].samples or any(segments[-1].samples))


def _without_open_end(segments: Sequence[EntrySegment]) -> list[EntrySegment]:
    """Return the segments of a draw, without those at its end that lack any sample: they may be undone."""
    end = len(segments)
    while end and segments[end - 1].samples and not any(segments[end - 1].samples):
        end -= 1
    return list(segments[:end])


class Addition(NamedTuple):
    """What a store adds of another cache's entry.

    Attributes:
        samples: the samples that are new, each with its index.
        continues: per draw the segments that are new.
        segments: the same with the indices of the store, each with its count of generated samples.
        users: the labels of the namespaces that are new users of the shared draw.
        different: the draws that contradict those of the store; then nothing is added.
        altered: the ids of samples that differ from those of the store; likewise.
    """

    samples: Sequence[tuple[int, EntrySample]] = ()
    continues: Sequence[tuple[Draw, list[EntrySegment]]] = ()
    segments: Sequence[tuple[Draw, list[tuple[Segment, int]]]] = ()
    users: Sequence[str] = ()
    different: Sequence[Draw] = ()
    altered: Sequence[str] = ()

    @property
    def refused(self) -> bool:
        """Whether the entry contradicts the store."""
        return bool(self.different or self.altered)

    @property
    def changes(self) -> bool:
        """Whether anything is added."""
        return bool(self.samples or self.segments or self.users)


def addition(ours: Entry | None, theirs: Entry) -> Addition:
    """Return what a store adds of another cache's entry.

    Args:
        ours: what the store holds of the question; None if it is new there.
        theirs: the entry, without an id that two draws of a namespace share.
    """
    if ours is None:
        return _placed(None, theirs.samples, [*theirs.draws.items()], theirs.users)
    known = {sample.id: sample for sample in ours.samples}
    altered = [sample.id for sample in theirs.samples if _is_altered(known.get(sample.id), sample)]
    drawn = {
        (draw.namespace, name): draw
        for draw, segments in ours.draws.items()
        for segment in segments
        for name in segment.samples
        if name is not None
    }
    more = []
    different: list[Draw] = []
    for draw, segments in theirs.draws.items():
        added = continued(ours.draws.get(draw, ()), segments)
        names = [name for segment in added or () for name in segment.samples if name is not None]
        if added is None or any(drawn.get((draw.namespace, name), draw) != draw for name in names):
            different.append(draw)
        elif added:
            more.append((draw, added))
    if different or altered:
        return Addition(different=different, altered=altered)
    new = [sample for sample in theirs.samples if sample.id not in known]
    users = [label for label in theirs.users if label not in ours.users]
    return _placed(ours, new, more, users)


def _placed(
    ours: Entry | None,
    samples: Sequence[EntrySample],
    continues: Sequence[tuple[Draw, list[EntrySegment]]],
    users: Sequence[str],
) -> Addition:
    """Return what is added to an entry, or to a store without one, with the indices of the store."""
    used = IntervalSet(() if ours is None else ours.used or ())
    indices = _numbered(samples, used)
    new = [(indices[sample.id], sample) for sample in samples]
    if ours is not None:
        indices |= {sample.id: sample.index for sample in ours.samples}
    segments_of = []
    for draw, added in continues:
        own = None if ours is None else ours.draws.get(draw)
        number = own[-1].number + 1 if own else 0
        rows = [_row(number + at, each, indices, used) for at, each in enumerate(added)]
        segments_of.append((draw, rows))
    return Addition(new, continues, segments_of, users)


def joined(ours: Entry | None, theirs: Entry) -> Entry | None:
    """Return what a store holds of a question after it has added an entry; None if the two contradict."""
    add = addition(ours, theirs)
    if add.refused:
        return None
    if ours is None:
        ours = Entry(theirs.key, theirs.scope, theirs.document)
    samples = [*ours.samples, *(sample._replace(index=index) for index, sample in add.samples)]
    draws = {draw: list(segments) for draw, segments in ours.draws.items()}
    used = IntervalSet(ours.used or ())
    for index, _ in add.samples:
        used.add(index)
    for (draw, added), (_, rows) in zip(add.continues, add.segments, strict=True):
        numbered = [each._replace(number=row.number) for each, (row, _) in zip(added, rows, strict=True)]
        draws[draw] = [*draws.get(draw, ()), *numbered]
        for row, _ in rows:
            for index in row.indices:
                used.add(index)
    in_order = {draw: draws[draw] for draw in sorted(draws)}
    users = sorted({*ours.users, *theirs.users})
    return Entry(ours.key, ours.scope, ours.document, ordered(samples), in_order, users, used)


def rescoped(entry: Entry, scope: str | None, key: str) -> Entry:
    """Return an entry under another scope, and so under another key."""
    draws = {draw._replace(key=key): segments for draw, segments in entry.draws.items()}
    return Entry(key, scope, entry.document, entry.samples, draws, entry.users)


def _is_altered(ours: EntrySample | None, theirs: EntrySample) -> bool:
    """Return True if two samples with one id are not the same answer; discarded ones keep no answer."""
    if ours is None or ours.discarded is not None or theirs.discarded is not None:
        return False
    return (ours.header, ours.payload) != (theirs.header, theirs.payload)


def continued(ours: Sequence[EntrySegment], theirs: Sequence[EntrySegment]) -> list[EntrySegment] | None:
    """Return the segments with which a store's draw becomes another cache's draw, or a longer one.

    None if the draws are different: neither continues the other.

    Args:
        ours: the segments of the draw in the store.
        theirs: its segments in the other cache.
    """
    if not ours:
        return list(theirs)
    shorter = min(len(ours), len(theirs))
    if all(map(_fits, ours[:shorter], theirs[:shorter])):
        added = list(theirs[shorter:])
    elif all(map(_agree, _laid(ours), _laid(theirs))):
        added = []
    else:
        return None
    if len(ours) > len(theirs) and not added:
        return []  # what was replaced here later stays replaced
    missing = _missing(_laid([*ours, *added]), _laid(theirs))
    stamp = theirs[-1].stamp
    return added + [EntrySegment(position, (name,), stamp) for position, name in missing]


def _fits(ours: EntrySegment, theirs: EntrySegment) -> bool:
    """Return True if two segments add the same to a draw, as far as their samples are stored."""
    alike = ours.position == theirs.position and len(ours.samples) == len(theirs.samples)
    return alike and all(map(_agree, ours.samples, theirs.samples))


def _agree(ours: str | None, theirs: str | None) -> bool:
    return ours == theirs or ours is None or theirs is None


def _laid(segments: Iterable[EntrySegment]) -> list[str | None]:
    """Return the ids of a draw's samples by position."""
    return laid((segment.position, segment.samples) for segment in segments)  # type: ignore[misc,return-value]


def _missing(ours: Sequence[str | None], theirs: Sequence[str | None]) -> list[tuple[int, str]]:
    """Return, by position, the samples of their draw at positions where our draw has no sample."""
    return [
        (position, name)
        for position, name in enumerate(theirs)
        if name is not None and (position >= len(ours) or ours[position] is None)
    ]


def _numbered(samples: Sequence[EntrySample], used: IntervalSet) -> dict[str, int]:
    """Return the index of each new sample: its origin if that is free, else the lowest free one."""
    found: dict[str, int] = {}
    left: list[str] = []
    for sample in samples:
        if sample.origin in used:
            left.append(sample.id)
        else:
            used.add(sample.origin)
            found[sample.id] = sample.origin
    for name in left:
        found[name] = _new(used)
    return found


def _new(used: IntervalSet) -> int:
    index = lowest_new(used, used)
    used.add(index)
    return index


def _row(
    number: int, segment: EntrySegment, indices: dict[str, int], used: IntervalSet
) -> tuple[Segment, int]:
    """Return a segment with the indices of the store; a sample that is not stored gets one that is free."""
    found = [None if name is None else indices.get(name) for name in segment.samples]
    standing = found.index(None) if None in found else len(found)
    chosen = [_new(used) if index is None else index for index in found]
    row = Segment(number, segment.position, chosen, NOBODY, None, segment.stamp, standing, segment.place)
    return row, segment.generated
