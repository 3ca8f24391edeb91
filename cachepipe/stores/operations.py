"""The operations of a store, performed on the rows of a ledger as ``cachepipe.contract`` decides.

An engine (``cachepipe.stores.ledger``) reads and writes the rows; nothing here depends on how it does so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Final

import orjson

from cachepipe.contract.allotment import (
    Discarded,
    Segment,
    added,
    allot,
    first,
    indices_of,
    lowest_new,
    noted_place,
)
from cachepipe.contract.draws import SHARED, Draw, is_own, namespace_of
from cachepipe.contract.entries import NOBODY, Addition, Entry, EntrySample, addition
from cachepipe.contract.intervals import IntervalSet, MutableIndexSet, Union, intervals_of
from cachepipe.contract.keys import trimmed
from cachepipe.contract.undoing import fallen, settled
from cachepipe.errors import StoreError
from cachepipe.stores.base import (
    Adopt,
    Adopted,
    AdoptSums,
    Ahead,
    BeginSum,
    Claim,
    Commit,
    Committed,
    Discard,
    Drop,
    Dropped,
    EndSum,
    Erase,
    Erased,
    Foreseen,
    Grant,
    Note,
    NotePlace,
    Operation,
    OthersRemove,
    RecordRemoval,
    ReleaseHold,
    ReleaseLease,
    Reserve,
    Reserved,
    Result,
    Sample,
    Seize,
    Settle,
    SumBegun,
    Withdraw,
    with_origin,
)
from cachepipe.stores.ledger import DrawRows, DrawView, KeyRows, Ledger

_MOST_MISSING: Final = 100_000
"""The most listed samples that may be missing: a ledger that lists more is hardly a real one."""


def perform(ledger: Ledger, operations: Sequence[Operation]) -> list[Result]:
    """Perform operations in order, inside a transaction; return their results.

    Commits go before releases of holds: readers see a sample before the transaction ends, so a draw that
    waits for it must not be undone.

    Raises:
        StoreError: when an operation is refused; then the engine takes the whole transaction back.
    """
    kinds = list(map(type, operations))
    alike = kinds.count(kinds[0]) == len(kinds) if kinds else False
    if Claim in kinds:
        claims: Any = operations
        if not alike:
            claims = [operation for operation in operations if type(operation) is Claim]
        for lease in ledger.prepare(claims):
            _end(ledger, lease)
    if alike:
        return _perform_all(ledger, kinds[0], operations)
    order = _commits_first(kinds) if ReleaseHold in kinds else range(len(kinds))
    results: dict[int, Result] = {}
    for kind, places in groupby(order, kinds.__getitem__):
        group = list(places)
        found = _perform_all(ledger, kind, [operations[place] for place in group])
        results.update(zip(group, found, strict=True))
    return list(map(results.__getitem__, range(len(kinds))))


def _perform_all(ledger: Ledger, kind: type[Operation], operations: Sequence[Any]) -> list[Result]:
    """Perform operations of one kind."""
    if kind is Commit:
        return list(_commit_all(ledger, operations))
    if kind is Erase:
        return list(_erase_all(ledger, operations))
    if kind is Drop:
        return list(_drop_all(ledger, operations))
    if kind is Adopt:
        return list(_adopt_all(ledger, operations))
    return list(map(partial(_PERFORM[kind], ledger), operations))


def _commits_first(kinds: list[type[Operation]]) -> list[int]:
    """Return the places of operations so that, from the first release of a hold on, commits go first."""
    released = kinds.index(ReleaseHold)
    return sorted(range(len(kinds)), key=lambda place: place >= released and 1 + (kinds[place] is not Commit))


# Claims.


def _claim(ledger: Ledger, claim: Claim) -> Grant:
    draw, n = claim.draw, claim.n
    rows = ledger.claimed(claim)
    if claim.user is not None:
        rows.use(claim.user)
    if rows.is_new:
        indices = first(n)
        lease, stamp = ledger.author()
        rows.begin(Segment(0, 0, indices, lease, claim.token, stamp))
        return Grant(indices, [None] * n, list(indices), (0,), n)
    own, shared = rows.segments, draw.shared
    known = not shared and rows.taken.interval_at(0) is not None
    held = indices_of(own) if own else []
    allotment = allot(rows, held, n, refresh=claim.refresh, couple=not shared)
    assert allotment is not None  # noqa: S101 - only a claim of stored samples may give up
    grant = Grant(allotment.indices, allotment.samples, allotment.to_generate)
    grant.place = allotment.place
    if own:
        parts = added(allotment, n, len(held), refresh=claim.refresh)
        return _claim_again(ledger, claim, rows, grant, {*held[n:]}, parts)
    missing = None in grant.samples
    lease, stamp = ledger.author()
    token, grant.held, standing = (claim.token, (0,), 0) if missing else (None, (), n)
    rows.add(Segment(0, 0, grant.indices, lease, token, stamp, standing, grant.place), len(grant.mine))
    grant.added, grant.fresh_id = n, known and is_own(draw.request_id)
    return grant


def _claim_again(
    ledger: Ledger,
    claim: Claim,
    rows: DrawRows,
    grant: Grant,
    more: set[int],
    parts: list[tuple[int, list[int]]],
) -> Grant:
    """Complete the grant of a draw that the ledger holds: add new parts, and hold what is not settled."""
    own = rows.segments
    number = own[-1].number + 1
    noted = noted_place(own, claim.n)
    missing = None in grant.samples
    token = claim.token if missing else None
    if missing:
        grant.held = (*_join(ledger, claim, rows), *range(number, number + len(parts)))
    elif more:
        _let_stand(claim, rows, more)
    if parts:
        lease, stamp = ledger.author()
        for each, (position, chosen) in enumerate(parts, number):
            standing = 0 if missing else len(chosen)
            generated = len({*grant.mine}.intersection(chosen))
            rows.add(Segment(each, position, chosen, lease, token, stamp, standing, grant.place), generated)
            grant.added += len(chosen)
    grant.place = max((place for place in (noted, grant.place) if place is not None), default=None)
    grant.shared = ledger.made_by_others({segment.lease for segment in own})
    grant.joined = missing and not all(_is_author(ledger, segment, token) for segment in own)
    return grant


def _is_author(ledger: Ledger, segment: Segment, token: str | None) -> bool:
    """Return True if a claimant of this process wrote a segment and still holds it."""
    return segment.token == token and segment.lease == ledger.lease()


def _join(ledger: Ledger, claim: Claim, rows: DrawRows) -> list[int]:
    """Hold the segments of a draw that may still be undone, whichever claimant wrote them."""
    held: list[int] = []
    for segment in _unsettled(rows, rows.segments):
        if not _is_author(ledger, segment, claim.token):
            rows.hold(segment.number, claim.token)
        held.append(segment.number)
    return held


def _let_stand(claim: Claim, rows: DrawRows, beyond: set[int]) -> None:
    """Mark what is delivered now: later samples may fail, and then it must not be undone."""
    given = {
        segment.number: segment._replace(standing=standing)
        for segment in rows.segments
        if (standing := _received(segment, claim.n)) > segment.standing
    }
    if not given:
        return
    last = [*given.values()][-1]
    # Segments of later claims do not affect these.
    earlier = [each for each in rows.segments if each.number <= last.number or each.claim == last.claim]
    stand = settled(earlier, lambda index: index in beyond and rows.sample(index) is None)
    for segment in earlier[stand:]:
        if segment.number in given:
            rows.replace(given[segment.number])


def _received(segment: Segment, n: int) -> int:
    """Return how many indices of a segment belong to the first n samples of its draw."""
    return min(n - segment.position, len(segment.indices))


def _unsettled(rows: DrawRows, segments: Sequence[Segment]) -> Sequence[Segment]:
    """Return the segments that may still be undone."""
    return segments[settled(segments, lambda index: rows.sample(index) is None) :]


def replay(rows: DrawView, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
    """Return what a claim would get if all of its samples are stored, else None; see ``Store.replay``."""
    rows.taken = Union(IntervalSet(), Union(rows.taken, taken))  # type: ignore[misc]  # see subclasses
    allotment = allot(rows, indices_of(rows.segments), n, couple=not draw.shared, stored_only=True)
    if allotment is None:
        return None
    for index in allotment.indices:
        taken.add(index)
    own = noted_place(rows.segments, n)
    return Grant(allotment.indices, allotment.samples, place=allotment.place if own is None else own)


def recall(rows: DrawView, n: int) -> Grant | None:
    """Return the first n samples of a draw whose samples are all stored, else None; see ``Store.recall``.

    The samples beyond n must be stored too: an incomplete draw may still be undone.
    """
    indices = indices_of(rows.segments)
    samples = [sample for sample in map(rows.sample, indices) if isinstance(sample, Sample)]
    if not len(samples) == len(indices) >= n:
        return None
    return Grant(indices[:n], [*samples[:n]], place=noted_place(rows.segments, n))


class _AheadView:
    """A key as it would be after the earlier draws of a plan.

    Args:
        rows: the draw and its key as they are stored; None if the key is new.
        ahead: what the earlier draws would take; changes go there.
    """

    def __init__(self, rows: DrawView | None, ahead: Ahead) -> None:
        self._rows = rows
        self._planned = ahead.listed
        self.listed: MutableIndexSet = ahead.listed if rows is None else Union(ahead.listed, rows.listed)
        self.taken: MutableIndexSet = ahead.taken if rows is None else Union(ahead.taken, rows.taken)

    def others(self) -> Sequence[Segment]:
        return () if self._rows is None else self._rows.others()

    def sample(self, index: int) -> Sample | Discarded | None:
        return None if self._rows is None or index in self._planned else self._rows.sample(index)

    def lease(self, index: int) -> bool:
        if index in self.listed:
            return False
        self.listed.add(index)
        return True


def foresee(rows: DrawView | None, draw: Draw, n: int, ahead: Ahead, *, refresh: bool) -> Foreseen:
    """Return what a claim would get after the earlier draws of a plan; see ``Store.foresee``.

    Args:
        rows: the draw and its key as they are stored; None if the key is new.
        draw: the draw.
        n: how many samples.
        ahead: what the earlier draws would take; what this one would take is added.
        refresh: whether the claim would replace what the ledger holds.
    """
    held = ahead.held or ([] if rows is None else indices_of(rows.segments))
    planned = IntervalSet(ahead.listed)
    allotment = allot(_AheadView(rows, ahead), held, n, refresh=refresh, couple=not draw.shared)
    assert allotment is not None  # noqa: S101 - only a claim of stored samples may give up
    if draw.shared and len(allotment.indices) >= len(held):
        ahead.held = allotment.indices
    new = {*allotment.to_generate}
    missing = [
        index
        for index, sample in zip(allotment.indices, allotment.samples, strict=True)
        if sample is None and index not in new
    ]
    return Foreseen(
        [sample for sample in allotment.samples if sample is not None],
        len(new),
        [index for index in missing if index not in planned],
        known=rows is not None,
    )


# Commits.


def _commit_all(ledger: Ledger, commits: Sequence[Commit]) -> list[Result]:
    """Store samples: together if this process still generates all of them, else one by one."""
    places = [(commit.key, commit.index) for commit in commits if commit.index is not None]
    if len(places) == len(commits):
        samples = [(commit.key, _sample(ledger, commit, commit.index or 0)) for commit in commits]
        if ledger.store_pending(samples):
            return [Committed(sample, kept=True) for _, sample in samples]
    return [_commit(ledger, commit) for commit in commits]


def _sample(ledger: Ledger, commit: Commit, index: int) -> Sample:
    header = {"id": commit.id, "stamp": ledger.stamp(), **commit.meta}
    return Sample(index, commit.id, commit.payload, trimmed(orjson.dumps(header)))


def _commit(ledger: Ledger, commit: Commit) -> Committed:
    rows, index = ledger.key(commit.key), commit.index
    there = None if index is None else rows.sample(index)
    kept = index is not None and _keeps_index(ledger, rows, commit, index, there)
    if kept and isinstance(there, Sample):
        rows.listed.add(there.index)
        return Committed(there, kept=True)  # written earlier, by a transaction that was interrupted
    if index is None or not kept:
        listed = rows.listed
        index = lowest_new(listed, listed)
        while rows.sample(index) is not None:
            listed.add(index)  # stored, but not listed: its writer was killed in between
            index = lowest_new(listed, listed)
    rows.listed.add(index)
    sample = _sample(ledger, commit, index)
    if not ledger.store(commit.key, sample):
        raise StoreError(
            f"another process has written sample {index} of key {commit.key} meanwhile; try again"
        )
    return Committed(sample, kept)


def _keeps_index(
    ledger: Ledger, rows: KeyRows, commit: Commit, index: int, there: Sample | Discarded | None
) -> bool:
    """Return True if a sample is stored where it was claimed; end its lease if this process has it.

    It is stored there if nobody else generates that index now, and no other sample has it.
    """
    author = rows.pending(index)
    if author == ledger.lease():
        rows.unpend(index)
        author = None
    if there is not None:
        return isinstance(there, Sample) and there.id == commit.id
    return author is None


# Entries of other caches.


def _adopt_all(ledger: Ledger, adopts: Sequence[Adopt]) -> list[Adopted]:
    """Add entries; those of different keys together."""
    results: list[Adopted] = []
    left = list(adopts)
    while left:
        together: dict[str, Adopt] = {}
        for adopt in left:
            if adopt.key in together:
                break
            together[adopt.key] = adopt
        results += _adopt_keys(ledger, [adopt.entry for adopt in together.values()])
        left = left[len(together) :]
    return results


def _adopt_keys(ledger: Ledger, entries: Sequence[Entry]) -> list[Adopted]:
    """Add entries of different keys: first all samples, then what refers to them."""
    held = ledger.entries([entry.key for entry in entries])
    added = [addition(ours, entry) for ours, entry in zip(held, entries, strict=True)]
    samples = [
        (entry.key, adopted_sample(sample, index))
        for entry, add in zip(entries, added, strict=True)
        for index, sample in add.samples
    ]
    if samples:
        ledger.put(samples)
    return [
        _adopt(ledger, entry, add, new=ours is None)
        for ours, entry, add in zip(held, entries, added, strict=True)
    ]


def _adopt(ledger: Ledger, entry: Entry, add: Addition, *, new: bool) -> Adopted:
    """Add what an entry has beyond its samples."""
    changes = add.changes
    if changes:
        ledger.extend(entry, add)
        for index, sample in add.samples:
            if sample.discarded is not None:
                ledger.key(entry.key).discard(index, sample.discarded)
        if add.users:
            shared = ledger.draw(Draw(SHARED, entry.key, "", 0))
            for user in add.users:
                shared.use(user)
    return Adopted(len(add.samples), len(add.segments), add.different, add.altered, new, changes)


def adopted_sample(sample: EntrySample, index: int) -> Sample:
    """Return a sample of another cache as it is stored at an index; its header notes where it came from."""
    header = sample.header
    if index != sample.origin:
        header = with_origin(header, sample.origin)
    return Sample(index, sample.id, sample.payload, header)


# What else happens to a draw and to a sample.


def _free(ledger: Ledger, freed: ReleaseLease | Seize, *, ours: bool) -> None:
    """Note that this process, or another one, no longer generates samples; missing ones become free."""
    rows = ledger.key(freed.key)
    for index in freed.indices:
        author = rows.pending(index)
        if author is not None and (author == ledger.lease()) is ours:
            rows.unpend(index)
            _unlist(rows, index)


def _unlist(rows: KeyRows, index: int) -> None:
    """Take an index that is not generated any more out of the list, unless its sample is stored."""
    if rows.sample(index) is None:
        rows.listed.remove(index)


def _end(ledger: Ledger, lease: int) -> None:
    """Free the samples that a dead process was generating, and end its holds."""
    for rows, index in ledger.pending_of(lease):
        _unlist(rows, index)
    ledger.end(lease)


def _release_hold(ledger: Ledger, release: ReleaseHold) -> None:
    """Release a hold; undo the draw where nobody else holds it (C8)."""
    rows = ledger.draw(release.draw)
    segments = list(rows.segments)
    released: set[int] = set()
    for at, segment in enumerate(segments):
        if segment.number in release.held:
            left = _let_go(ledger, rows, release, segment)
            if left is not None:
                segments[at] = left
                released.add(segment.number)
    if not all(each.standing == len(each.indices) for each in segments if each.number in released):
        _undo(ledger, rows, segments, released)


def _undo(ledger: Ledger, rows: DrawRows, segments: list[Segment], released: set[int]) -> None:
    """Delete the parts of a draw that are not settled, not delivered and not held by others."""

    def held(segment: Segment) -> bool:
        if segment.token is not None and _lives(ledger, segment.lease):
            return True
        return any(_lives(ledger, lease) for lease in rows.holders(segment.number))

    while undone := fallen(segments, released, lambda index: rows.sample(index) is None, held):
        for segment in undone:  # if a refresh is undone, the samples that it had replaced return
            kept, free = segment.indices[: segment.standing], segment.indices[segment.standing :]
            if not kept:
                segments.remove(segment)
                rows.drop(segment)
            elif free:
                left = segment._replace(indices=kept)
                segments[segments.index(segment)] = left
                rows.replace(left)
            for index in free:
                rows.taken.remove(index)


def _lives(ledger: Ledger, lease: int) -> bool:
    return lease == ledger.lease() or ledger.alive(lease)


def _let_go(ledger: Ledger, rows: DrawRows, release: ReleaseHold, segment: Segment) -> Segment | None:
    """Release a claimant's hold of a segment, and mark what it received; return None if it had no hold."""
    left = segment
    if _is_author(ledger, segment, release.token):
        left = segment._replace(token=None)
    elif not rows.unhold(segment.number, release.token):
        return None
    if release.complete:
        left = left._replace(standing=max(_received(segment, release.n), segment.standing))
    if left != segment:
        rows.replace(left)
    return left


def _discard(ledger: Ledger, discard: Discard) -> None:
    """Mark a sample as discarded, on record; it may be damaged, or listed and missing."""
    rows, index = ledger.key(discard.key), discard.index
    if not rows.has_row(index) and (index not in rows.listed or rows.pending(index) is not None):
        raise StoreError(f"there is no sample {index} of key {rows.name} to discard")
    rows.discard(index, discard.why)
    rows.listed.add(index)


def _withdraw(ledger: Ledger, withdraw: Withdraw) -> None:
    """Remove the draws of namespaces; the shared draw stays while others use it."""
    rows, gone = ledger.key(withdraw.key), {*withdraw.namespaces}
    if not gone.issuperset(rows.users()):
        gone.discard(SHARED)
    for namespace in sorted(gone):
        _check_idle(ledger, rows, namespace)
        rows.withdraw(namespace)


def _check_idle(ledger: Ledger, rows: KeyRows, namespace: str) -> None:
    """Raise an error if a live process has made one of a namespace's draws, or makes one now."""
    holders, makers = rows.makers(namespace)
    if any(_lives(ledger, lease) for lease in holders) or ledger.made_by_others(makers):
        whose = "shared draws" if namespace == SHARED else f"the namespace {namespace_of(namespace)!r}"
        raise StoreError(
            f"a process that is running has drawn samples in {whose}; end it (a program, a notebook or a "
            "proxy) before you remove its draws"
        )


def _erase_all(ledger: Ledger, erases: Sequence[Erase]) -> list[Erased]:
    """Delete the samples that no draw has and that nobody generates."""
    found: list[Erased] = []
    samples: list[tuple[KeyRows, int, str]] = []
    for erase in erases:
        rows = ledger.key(erase.key)
        drawn = rows.drawn()
        free = [
            index
            for index in erase.indices
            if index not in drawn and index in rows.listed and rows.pending(index) is None
        ]
        samples += [(rows, index, erase.why) for index in free]
        found.append(Erased(free))
    ledger.erase(samples)
    return found


def _drop_all(ledger: Ledger, drops: Sequence[Drop]) -> list[Dropped]:
    """Delete the questions of which nothing is left."""
    keys = [ledger.key(drop.key) for drop in drops]
    empty = [rows for rows, drop in zip(keys, drops, strict=True) if _is_empty(rows, drop)]
    gone = {rows.name for rows, done in zip(empty, ledger.delete(empty), strict=True) if done}
    return [Dropped(drop.key in gone) for drop in drops]


def _is_empty(rows: KeyRows, drop: Drop) -> bool:
    """Return True if a question has no draw, and no sample that is stored or being generated."""
    listed = list(intervals_of(rows.listed))
    many = sum(stop - start for start, stop in listed) > len(drop.indices) + _MOST_MISSING
    if many or rows.users() or rows.drawn().interval_at(0) is not None:
        return False
    return not any(
        isinstance(rows.sample(index), Sample) or rows.pending(index) is not None
        for interval in listed
        for index in range(*interval)
    )


def _record_removal(ledger: Ledger, record: RecordRemoval) -> None:
    document = record.document
    if record.running:
        for other in ledger.removals():
            lease = other.get("lease")
            if other["id"] != record.id and lease is not None and _lives(ledger, lease):
                raise OthersRemove(
                    "another command is removing something from this cache. Run this one again when the "
                    "other has ended"
                )
        document = orjson.dumps({**orjson.loads(document), "lease": ledger.lease()})
    ledger.put_removal(record.id, document)


def _note_place(ledger: Ledger, note: NotePlace) -> None:
    """Note a place on the last segment of what was handed over, if the draw still exists."""
    rows = ledger.draw(note.draw)
    handed_over = [segment for segment in rows.segments if segment.position < note.n]
    if handed_over:
        rows.replace(handed_over[-1]._replace(place=note.place))


def _note(ledger: Ledger, note: Note) -> None:
    if note.unreported.sold or note.delivered.as_asked.sold:
        sums = ledger.sums(note.run, note.namespace)
        sums.add(note.delivered, note.unreported)
        ledger.put_sums(note.run, note.namespace, sums)


def _adopt_sums(ledger: Ledger, adopt: AdoptSums) -> None:
    if adopt.sums.notes > ledger.sums(adopt.run, adopt.namespace).notes:
        ledger.put_sums(adopt.run, adopt.namespace, adopt.sums)


# Budgets.


def _reserve(ledger: Ledger, reserve: Reserve) -> Reserved:
    purse, own = ledger.purse(reserve.namespace), ledger.lease()
    lost = bool(purse.of_dead(partial(_lives, ledger)))
    granted = not lost and purse.reserve(reserve.call, own, reserve.amount, reserve.limit)
    ledger.put_purse(reserve.namespace, purse)
    return Reserved(granted, purse.spent, purse.reserved, lost)


def _settle(ledger: Ledger, settle: Settle) -> None:
    purse = ledger.purse(settle.namespace)
    purse.settle(settle.call, settle.spent)
    ledger.put_purse(settle.namespace, purse)


def _begin_sum(ledger: Ledger, begin: BeginSum) -> SumBegun:
    purse = ledger.purse(begin.namespace)
    ended = purse.of_dead(partial(_lives, ledger))
    calls = purse.begin_sum(begin.name, ledger.lease())
    ledger.put_purse(begin.namespace, purse)
    return SumBegun(calls, ended)


def _end_sum(ledger: Ledger, end: EndSum) -> None:
    purse, own = ledger.purse(end.namespace), ledger.lease()
    if end.found is None:
        purse.drop_sum(end.name)
    else:
        alone = {lease for lease, _ in purse.held.values()} <= {own, NOBODY}
        purse.end_sum(end.name, *end.found, end.ended, alone=alone)
    ledger.put_purse(end.namespace, purse)


_PERFORM: dict[type[Operation], Callable[[Ledger, Any], Result]] = {
    Claim: _claim,
    ReleaseLease: partial(_free, ours=True),
    Seize: partial(_free, ours=False),
    ReleaseHold: _release_hold,
    Discard: _discard,
    Withdraw: _withdraw,
    RecordRemoval: _record_removal,
    Note: _note,
    AdoptSums: _adopt_sums,
    NotePlace: _note_place,
    Reserve: _reserve,
    Settle: _settle,
    BeginSum: _begin_sum,
    EndSum: _end_sum,
}
"""What performs each operation; commits that follow one another are performed together."""
