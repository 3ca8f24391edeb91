"""One transaction on the ledger: the operations of a store as rows.

Small sets of indices stay in memory while no other connection writes (SQLite's ``data_version`` shows it),
and new rows are gathered and written at the end, many per statement. So a thousand draws claimed at once cost
a few statements, and a lone draw of a known key costs three. ``cachepipe.contract.allotment`` decides which
indices a draw gets; reading ahead here changes no decision.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import orjson

from cachepipe.accounting import Delivered
from cachepipe.contract.allotment import Discarded, added, allot, first, laid, lowest_new
from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.intervals import IndexSet, Union, changes
from cachepipe.contract.keys import Question, trimmed
from cachepipe.contract.undoing import Piece, fallen, settled
from cachepipe.errors import DamagedCache, StoreError
from cachepipe.stores import tables
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Discard,
    Grant,
    Note,
    Operation,
    ReleaseHold,
    ReleaseLease,
    Result,
    Sample,
    Seize,
)
from cachepipe.stores.sets import LargeSet, SmallSet
from cachepipe.stores.tables import FEW, LISTED, ROWS, SEGMENT, SMALL, Segment, pack, read_sample, unpack

_REMEMBERED = 20_000  # keys, namespaces and sets remembered between transactions, half a kilobyte each
_SEVERAL = 8  # claims from which on their rows, sets and samples are read ahead in a few statements

Place = tuple[int, str, int, str]
"""A draw apart from its namespace, as the ledger writes it: key, request id, occurrence, replicate."""


class Memory:
    """What a store remembers between its transactions; invalid once another connection has written."""

    def __init__(
        self,
        leased: Callable[[], str],
        lives: Callable[[int, str], bool],
        shared: Callable[[set[int]], bool],
        written: dict[str, int],
        check_files: Callable[..., None],
    ) -> None:
        """Make an empty one; ``written`` holds ids of keys that readers have seen, which never change."""
        self.leased = leased
        self.lives = lives
        self.shared = shared
        self.check_files = check_files
        self.version = -1
        self.lease: int | None = None
        self.reaped = 0.0
        self.stamp = 0
        """The greatest stamp that was seen, in microseconds since 1970."""
        self.written_stamp = 0
        """The greatest stamp of a row of the ledger that this process has written."""
        self.written_sample: str | None = None
        """The name of the sample that this process has stored last."""
        self.keys: dict[str, int] = {}
        self.written = written
        self.namespaces: dict[str, int] = {}
        self.labels: dict[int, str] = {LISTED: ""}
        self.sets: dict[tuple[int, int], SmallSet | None] = {}
        self.grown: list[tuple[int, int]] = []
        """Sets that have too many intervals by now; the transaction that grew them still uses them."""

    def forget(self) -> None:
        """Forget everything: a transaction was rolled back, or another connection has written."""
        self.lease = None
        self.keys.clear()
        self.namespaces.clear()
        self.labels = {LISTED: ""}
        self.sets.clear()
        self.grown.clear()


class Transaction:
    """Applies operations inside ``BEGIN IMMEDIATE`` … ``COMMIT`` on the ledger's connection.

    It may be used again after a COMMIT; one that has failed is thrown away.
    """

    def __init__(self, memory: Memory, ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> None:
        self._memory = memory
        self._ledger = ledger
        self._shelf = shelf
        self._now = 0.0
        self._clock = 0
        self._keys: list[tuple[int, str, str | None, bytes, float]] = []
        self._segments: list[tuple[Any, ...]] = []
        self._pending: list[tuple[int, int, int]] = []
        self._uses: list[tuple[int, int, float]] = []
        self._touched: set[Place] = set()
        self._new_keys: set[int] = set()
        self._begun: set[int] = set()  # new keys of which the first samples are claimed
        self._intervals: list[tuple[int, int, int, int, bytes]] = []
        self._dirty: dict[tuple[int, int], SmallSet] = {}
        self._found: dict[Place, list[Segment]] = {}
        self._seen: dict[tuple[str, int], Sample | Discarded] = {}

    def run(self, operations: Sequence[Operation]) -> list[Result]:
        """Return the operations' results, after everything except the COMMIT."""
        memory = self._memory
        self._now = time.time()
        self._clock = int(self._now * 1e6)
        if self._found:
            self._found.clear()
        if self._seen:
            self._seen.clear()
        version = self._ledger.execute("PRAGMA data_version").fetchone()[0]
        if version != memory.version or len(memory.sets) > _REMEMBERED or len(memory.keys) > _REMEMBERED:
            memory.forget()
            memory.version = version
        if memory.grown:
            for place in memory.grown:
                memory.sets[place] = None
            memory.grown.clear()
        return self._apply(operations)

    def _apply(self, operations: Sequence[Operation]) -> list[Result]:
        kinds = [type(operation) for operation in operations]
        if ReleaseHold in kinds and Commit in kinds[kinds.index(ReleaseHold) :]:
            # Readers see a sample before this transaction ends: no draw that waits for it may be undone.
            first = kinds.index(ReleaseHold)
            late = sorted(range(first, len(kinds)), key=lambda place: kinds[place] is not Commit)
            order = [*range(first), *late]
            found = dict(zip(order, self._apply([operations[place] for place in order]), strict=True))
            return [found[place] for place in range(len(order))]
        results: list[Result] = []
        claims = [operation for operation in operations if type(operation) is Claim]
        self._intern([claim.question.key for claim in claims])
        if claims:
            self._reap_the_dead()
        if len(claims) >= _SEVERAL:
            self._look_ahead(claims)
        place = 0
        while place < len(operations):
            operation = operations[place]
            if type(operation) is Commit:
                stop = place
                while stop < len(operations) and type(operations[stop]) is Commit:
                    stop += 1
                results += self._commit_all(operations[place:stop])  # type: ignore[arg-type]
                place = stop
                continue
            if type(operation) is Claim:
                results.append(self._claim(operation))
            else:
                self._flush()
                self._found.clear()
                self._seen.clear()
                match operation:
                    case ReleaseLease():
                        self._release_lease(operation)
                    case Seize():
                        self._seize(operation)
                    case ReleaseHold():
                        self._release_hold(operation)
                    case Discard():
                        self._discard(operation)
                    case Note():
                        self._note(operation)
                results.append(None)
            place += 1
        self._flush()
        return results

    def _look_ahead(self, claims: Sequence[Claim]) -> None:
        """Read the rows, sets and samples that the claims will probably need, in a few statements."""
        known = self._memory.keys
        old = [claim for claim in claims if known.get(claim.draw.key)]
        if len(old) < _SEVERAL:
            return
        self._found = {self._place(known[claim.draw.key], claim.draw): [] for claim in old}
        wanted = list(self._found)
        for at in range(0, len(wanted), ROWS):
            values: list[Any] = [value for place in wanted[at : at + ROWS] for value in place]
            values += [None] * (4 * ROWS - len(values))
            for row in self._ledger.execute(tables.DRAWS, values):
                self._found[row[:4]].append(Segment._make(row[4:]))
        owners: dict[int, dict[int, str]] = {LISTED: {}}
        for claim in old:
            name = claim.draw.key
            owners[LISTED][known[name]] = name
            owners.setdefault(self._namespace(claim.draw.namespace), {})[known[name]] = name
        sets = self._memory.sets
        for owner, names in owners.items():
            rows: dict[int, list[tuple[int, int, bytes]]] = {
                key: [] for key in names if (owner, key) not in sets
            }
            if len(rows) >= _SEVERAL:
                for key, *row in self._ledger.execute(tables.SETS, (owner, orjson.dumps([*rows]).decode())):
                    rows[key].append(tuple(row))
                for key, found in rows.items():
                    self._remember(owner, key, names[key], found)
        self._look_at_samples(old)

    def _look_at_samples(self, claims: Sequence[Claim]) -> None:
        """Read the samples that claims will probably get: their own, the coupled, or the first free."""
        wanted: dict[str, tuple[str, int]] = {}
        for claim in claims:
            draw = claim.draw
            if claim.n > FEW:
                continue
            key, namespace = self._memory.keys[draw.key], self._namespace(draw.namespace)
            rows = self._found[self._place(key, draw)]
            taken = self._set(namespace, key, draw.key).interval_at(0)
            first = 0 if taken is None or taken[0] else taken[1]
            indices = list(range(first, first + claim.n))
            if rows:
                others = {row.namespace: row for row in reversed(rows)}
                row = others.get(namespace) or _earliest(others.values())
                if row.position == 0:
                    indices = unpack(row.indices)[: claim.n]
            for index in indices:
                wanted[f"{draw.key}/{index}"] = (draw.key, index)
        names = orjson.dumps([*wanted]).decode()
        for name, mode, filename, value in self._shelf.execute(tables.SAMPLES, (names,)):
            self._seen[wanted[name]] = tables.parse_sample(*wanted[name], mode, filename, value)

    # Claims.

    def _claim(self, claim: Claim) -> Grant:
        draw, n = claim.draw, claim.n
        key = self._key(claim.question)
        namespace = self._namespace(draw.namespace)
        place = self._place(key, draw)
        if claim.user is not None:
            self._uses.append((key, self._namespace(claim.user), self._now))
        if key in self._new_keys:
            if key not in self._begun:
                return self._claim_first(claim, key, namespace, place)
            self._flush()
        view = _KeyView(self, claim, key, namespace, place)
        own = view.own
        if own:
            tables.check_segments(draw, own)
        known = not draw.shared and view.taken.interval_at(0) is not None
        held = laid((segment.position, unpack(segment.indices)) for segment in own) if own else []
        allotment = allot(view, held, n, refresh=claim.refresh, couple=not draw.shared)
        assert allotment is not None  # noqa: S101 - only a claim of stored samples may give up
        samples, mine = allotment.samples, allotment.to_generate
        missing = None in samples
        token = claim.token if missing else None
        holds: list[int] = []
        if own:
            if missing:
                holds = self._join(claim, place, namespace, own)
            elif len(held) > n:
                self._let_stand(claim, place, namespace, own, {*held[n:]})
        segments = added(allotment, n, len(held), refresh=claim.refresh)
        if segments:
            part = own[-1].part + 1 if own else 0
            self._write(draw, (*place, namespace), part, segments, mine, token)
            holds += range(part, part + len(segments))
        return Grant(
            allotment.indices,
            samples,
            mine,
            tuple(holds) if missing else (),
            sum(len(chosen) for _, chosen in segments),
            fresh_id=known and not own and bool(draw.request_id),
            shared=bool(own) and self._memory.shared({segment.lease for segment in own}),
            joined=missing
            and any(segment.token != token or segment.lease != self._lease() for segment in own),
        )

    def _claim_first(self, claim: Claim, key: int, namespace: int, place: Place) -> Grant:
        """Claim the first samples of a key: there is nothing to look at."""
        indices, lease = first(claim.n), self._lease()
        self._begun.add(key)
        self._write(claim.draw, (*place, namespace), 0, [(0, indices)], indices, claim.token)
        self._pending += [(key, index, lease) for index in indices]
        stop = len(indices)
        for owner, label in ((LISTED, ""), (namespace, claim.draw.namespace)):
            digest = tables.interval_digest(label, claim.draw.key, 0, stop)
            self._intervals.append((owner, key, stop, 0, digest))
        return Grant(indices, [None] * stop, list(indices), (0,), stop)

    def _write(
        self,
        draw: Draw,
        where: tuple[Any, ...],
        first: int,
        segments: list[tuple[int, list[int]]],
        mine: list[int],
        token: str | None,
    ) -> None:
        """Write what one claim adds to a draw, at the latest before the draw is looked up again.

        Equal lease, token and stamp mark its segments as one claim's.
        """
        lease, stamp = self._lease(), self._stamp()
        self._memory.written_stamp = stamp
        for part, (position, chosen) in enumerate(segments, first):
            generated = len({*chosen}.intersection(mine)) if mine else 0
            standing = len(chosen) if token is None else 0
            indices = pack(chosen)
            digest = tables.segment_digest(draw, part, position, indices, stamp)
            self._segments.append(
                (*where, part, position, indices, lease, token, generated, stamp, standing, digest)
            )
        place = where[:4]
        self._touched.add(place)
        self._found.pop(place, None)

    def _stamp(self) -> int:
        """Return a stamp that is greater than every stamp seen so far."""
        self._memory.stamp = stamp = max(self._clock, self._memory.stamp + 1)
        return stamp

    @staticmethod
    def _place(key: int, draw: Draw) -> Place:
        return key, draw.request_id, draw.occurrence, draw.replicate

    def rows(self, place: Place, namespace: int) -> tuple[list[Segment], list[Segment] | None]:
        """Return a draw's segments in a namespace, and in the others.

        If there are many others, return only those of the earliest namespace, or None if that is unknown.
        """
        if place in self._touched:
            self._flush()
        rows = self._found.get(place)
        if rows is None:
            rows = self._read(f"{tables.DRAW} LIMIT {FEW + 1}", place)
        if len(rows) <= FEW:
            if not rows:
                return [], []
            return [row for row in rows if row[0] == namespace], [row for row in rows if row[0] != namespace]
        rows = self._read(tables.OWN_AND_FIRST, (*place, namespace))
        first = [row for row in rows if row[0] != namespace]
        return [row for row in rows if row[0] == namespace], first or None

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Segment]:
        return list(map(Segment._make, self._ledger.execute(query, values)))

    def coupled(self, draw: Draw, place: Place, namespace: int, others: list[Segment] | None) -> list[int]:
        """Return the indices that the same draw has in the earliest other namespace."""
        if others is None:
            first = self._first(place)
            if first == namespace:
                others = self._read(f"{tables.OTHERS} ORDER BY namespace, part", (*place, namespace))
            else:
                others = self._read(tables.OWN, (*place, first))
        if not others:
            return []
        shared = self._namespace(SHARED)
        others = [segment for segment in others if segment.namespace != shared]
        if not others:
            return []
        earliest = _earliest(others)
        self._memory.stamp = max(self._memory.stamp, earliest.stamp)
        segments = [segment for segment in others if segment.namespace == earliest.namespace]
        tables.check_segments(draw._replace(namespace=self._label(earliest.namespace)), segments)
        return laid((segment.position, unpack(segment.indices)) for segment in segments)

    def _first(self, place: Place) -> int | None:
        """Return the earliest namespace of a draw that has many rows, and note it.

        None if all of the rows belong to the key's shared draw, which has no namespace.
        """
        row = self._ledger.execute(
            "SELECT namespace FROM firsts"
            " WHERE key = ? AND request_id = ? AND occurrence = ? AND replicate = ?",
            place,
        ).fetchone()
        if row is None:
            rows = self._read(f"{tables.OTHERS} ORDER BY stamp, namespace LIMIT 1", (*place, -1))
            if not rows:
                return None
            row = rows[0]
            self._ledger.execute("INSERT INTO firsts VALUES(?, ?, ?, ?, ?)", (*place, row[0]))
        return int(row[0])

    def _join(self, claim: Claim, place: Place, namespace: int, own: list[Segment]) -> list[int]:
        """Hold the segments of a draw that may still be undone, whichever claimant wrote them."""
        held: list[int] = []
        for segment in self._unsettled(claim.draw.key, own):
            if segment.token != claim.token or segment.lease != self._lease():
                self._ledger.execute(
                    "INSERT OR IGNORE INTO holders VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
                    (*place, namespace, segment.part, self._holder(claim.token), self._lease()),
                )
            held.append(segment.part)
        return held

    def _holder(self, token: str) -> str:
        """Return a claimant's token that is unique among all processes."""
        return f"{self._lease()}-{token}"

    def _let_stand(
        self, claim: Claim, place: Place, namespace: int, own: list[Segment], beyond: set[int]
    ) -> None:
        """Mark what is delivered now of segments that may still be undone because later samples may fail."""
        key, last, given = claim.draw.key, own[0], {}
        for segment in own:
            standing = min(claim.n - segment.position, len(unpack(segment.indices)))
            if standing > segment.standing:
                last, given[segment.part] = segment, standing
        # Segments of later claims do not affect these.
        rows = (
            [segment for segment in own if segment.part <= last.part or segment.claim == last.claim]
            if given
            else []
        )
        after = [index for segment in rows for index in unpack(segment.indices) if index in beyond]
        missing = [index for index in after if self.sample(key, index) is None]
        for segment in self._unsettled(key, rows, missing) if missing else ():
            if segment.part in given:
                self._found.pop(place, None)
                self._ledger.execute(
                    f"UPDATE segments SET standing = ?{SEGMENT}",
                    (given[segment.part], *place, namespace, segment.part),
                )

    def _unsettled(
        self, key: str, segments: list[Segment], among: Collection[int] | None = None
    ) -> list[Segment]:
        """Return the segments that may still be undone, if only samples ``among`` some can be missing."""
        first = settled(
            _pieces(segments),
            lambda index: (among is None or index in among) and self.sample(key, index) is None,
        )
        return segments[first:]

    def lease(self, key: int, name: str, index: int, listed: IndexSet) -> bool:
        """Take the lease of an index without a sample; return False if a live process has it.

        Raises:
            DamagedCache: when the list says that the sample is stored.
        """
        row = (key, index, self._lease())
        if index not in listed:
            self._pending.append(row)
            self.add(LISTED, key, name, index)
            return True
        self._flush()
        if self._ledger.execute("INSERT OR IGNORE INTO pending VALUES(?, ?, ?)", row).rowcount:
            raise DamagedCache(
                f"sample {index} of key {name} is listed in the ledger but missing among the samples. Run "
                "`cachepipe verify --repair` to have such samples generated anew, or restore the cache from "
                "a copy"
            )
        return False

    # Commits.

    def _commit_all(self, commits: Sequence[Commit]) -> list[Result]:
        """Store samples: together if every lease is still ours, else one by one."""
        self._flush()
        self._seen.clear()
        self._memory.check_files(deleted=True)
        self._intern([commit.key for commit in commits])
        if any(commit.index is None for commit in commits):
            return [self._commit(commit) for commit in commits]
        lease = self._lease()
        self._ledger.execute("SAVEPOINT commits")
        gone = self._ledger.executemany(
            "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?",
            [(self._key_of(commit.key), commit.index, lease) for commit in commits],
        ).rowcount
        samples = [self._sample_of(commit, commit.index or 0) for commit in commits]
        if gone == len(commits) and self._put(list(zip(commits, samples, strict=True))):
            self._ledger.execute("RELEASE commits")
            return [Committed(sample, kept=True) for sample in samples]
        self._ledger.execute("ROLLBACK TO commits")
        self._ledger.execute("RELEASE commits")
        return [self._commit(commit) for commit in commits]

    def _sample_of(self, commit: Commit, index: int) -> Sample:
        header = {"id": commit.id, "stamp": self._stamp(), **commit.meta}
        return Sample(index, commit.id, commit.payload, trimmed(orjson.dumps(header)))

    def _put(self, samples: list[tuple[Commit, Sample]]) -> bool:
        """Write rows to the samples file, durably; return True if all of them were new."""
        self._shelf.execute("BEGIN IMMEDIATE")
        rows = []
        for commit, sample in samples:
            name = f"{commit.key}/{sample.index}"
            rows.append((name, self._now, self._now, tables.sample_row(name, sample)))
        put = self._shelf.executemany(tables.PUT, rows).rowcount
        if put != len(samples):
            self._shelf.execute("ROLLBACK")
            return False
        self._shelf.execute("COMMIT")
        self._memory.written_sample = name
        return True

    def _commit(self, commit: Commit) -> Committed:
        key, name = self._key_of(commit.key), commit.key
        kept = commit.index is not None and self._still_ours(key, commit, commit.index)
        there = read_sample(self._shelf, name, commit.index) if commit.index is not None else None
        if kept and isinstance(there, Sample):
            return Committed(there, kept=True)  # written earlier, by a transaction that was interrupted
        index = commit.index
        if index is None or not kept:
            listed = self._set(LISTED, key, name)
            index = lowest_new(listed, listed)
            while read_sample(self._shelf, name, index) is not None:
                self.add(LISTED, key, name, index)  # stored, but not listed: its writer was killed in between
                index = lowest_new(listed, listed)
            self.add(LISTED, key, name, index)
        sample = self._sample_of(commit, index)
        if not self._put([(commit, sample)]):
            raise StoreError(f"another process has written sample {index} of key {name} meanwhile; try again")
        return Committed(sample, kept)

    def _still_ours(self, key: int, commit: Commit, index: int) -> bool:
        """Take a committed index out of ``pending``; return True if the lease on it was still ours."""
        gone = self._ledger.execute(
            "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
        ).rowcount
        there = read_sample(self._shelf, commit.key, index)
        if there is not None:
            return isinstance(there, Sample) and there.id == commit.id
        if not gone and self._is_pending(key, index):
            return False
        if index not in self._set(LISTED, key, commit.key):
            self.add(LISTED, key, commit.key, index)
        return True

    # What else happens to a draw and to a sample.

    def _release_lease(self, release: ReleaseLease) -> None:
        key = self._key_of(release.key)
        for index in release.indices:
            gone = self._ledger.execute(
                "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
            ).rowcount
            if gone and self.sample(release.key, index) is None:
                self._remove(LISTED, key, release.key, index)

    def _seize(self, seize: Seize) -> None:
        key = self._key_of(seize.key)
        for index in seize.indices:
            gone = self._ledger.execute(
                "DELETE FROM pending WHERE key = ? AND sample = ? AND lease != ?", (key, index, self._lease())
            ).rowcount
            if gone and self.sample(seize.key, index) is None:
                self._remove(LISTED, key, seize.key, index)

    def _release_hold(self, release: ReleaseHold) -> None:
        """Release a hold. Undo what is not settled, not delivered and not held by others (C8)."""
        draw = release.draw
        key = self._key_of(draw.key)
        namespace = self._namespace(draw.namespace)
        where = (*self._place(key, draw), namespace)
        segments = self._read(tables.OWN, where)
        tables.check_segments(draw, segments)
        released: set[int] = set()
        for at, segment in enumerate(segments):
            if segment.part in release.held:
                left = self._let_go(release, where, segment)
                if left is not None:
                    segments[at] = left
                    released.add(segment.part)
        if all(
            segment.standing == len(unpack(segment.indices))
            for segment in segments
            if segment.part in released
        ):
            return
        undone: list[int] = []
        while fallen := self._fallen(draw.key, where, segments, released):
            for segment in fallen:  # if a refresh is undone, the samples that it had replaced return
                undone += self._undo(draw, where, segment, segments)
        for index in undone:
            self._remove(namespace, key, draw.key, index)
        if undone:
            self._ledger.execute(
                "DELETE FROM firsts WHERE key = ? AND request_id = ? AND occurrence = ? AND replicate = ?"
                " AND namespace = ?",
                where,
            )

    def _let_go(self, release: ReleaseHold, where: tuple[Any, ...], segment: Segment) -> Segment | None:
        """Release a claimant's hold of a part, and mark what it received; return None if it had no hold."""
        place = (*where, segment.part)
        if (segment.lease, segment.token) == (self._lease(), release.token):
            segment = segment._replace(token=None)
            if not release.complete:
                self._ledger.execute(f"UPDATE segments SET token = NULL{SEGMENT}", place)
        else:
            holder = (*place, self._holder(release.token))
            if not self._ledger.execute(f"DELETE FROM holders{SEGMENT} AND token = ?", holder).rowcount:
                return None
        given = min(release.n - segment.position, len(unpack(segment.indices)))
        if release.complete and given > segment.standing:
            segment = segment._replace(standing=given)
            self._ledger.execute(f"UPDATE segments SET standing = ?{SEGMENT}", (given, *place))
        return segment

    def _fallen(
        self, key: str, where: tuple[Any, ...], segments: list[Segment], released: set[int]
    ) -> list[Segment]:
        """Return the segments to undo (see ``cachepipe.contract.undoing``)."""
        by_number = {segment.part: segment for segment in segments}

        def held(piece: Piece) -> bool:
            segment = by_number[piece.number]
            return self._held_by_others((*where, segment.part), segment.lease, segment.token)

        found = fallen(_pieces(segments), released, lambda index: self.sample(key, index) is None, held)
        return [by_number[piece.number] for piece in found]

    def _undo(
        self, draw: Draw, where: tuple[Any, ...], segment: Segment, segments: list[Segment]
    ) -> list[int]:
        """Reduce a part to its delivered indices; return the indices that are free again."""
        place, indices = (*where, segment.part), unpack(segment.indices)
        kept, free = indices[: segment.standing], indices[segment.standing :]
        if not kept:
            segments.remove(segment)
            self._ledger.execute(f"DELETE FROM segments{SEGMENT}", place)
        elif free:
            written = pack(kept)
            digest = tables.segment_digest(draw, segment.part, segment.position, written, segment.stamp)
            segments[segments.index(segment)] = segment._replace(indices=written, digest=digest)
            self._ledger.execute(
                f"UPDATE segments SET indices = ?, digest = ?{SEGMENT}", (written, digest, *place)
            )
        return free

    def _held_by_others(self, where: tuple[Any, ...], author: int, token: str | None) -> bool:
        """Return True if a live claimant holds a segment: its author or a claimant that joined it."""
        mine = (*where, self._lease())
        if self._ledger.execute(f"SELECT 1 FROM holders{SEGMENT} AND lease = ? LIMIT 1", mine).fetchone():
            return True  # most holders in a crowd belong to this process, and one is enough
        leases = {row[0] for row in self._ledger.execute(f"SELECT lease FROM holders{SEGMENT}", where)}
        if token is not None:
            leases.add(author)
        return any(lease == self._lease() or self._alive(lease) for lease in leases)

    def _discard(self, discard: Discard) -> None:
        """Mark a sample as discarded, on record; it may be damaged, or listed and missing."""
        name, index = discard.key, discard.index
        key = self._key_of(name)
        listed = self._set(LISTED, key, name)
        row = self._shelf.execute(tables.GET_DAMAGED, (f"{name}/{index}",)).fetchone()
        if row is None and (index not in listed or self._is_pending(key, index)):
            raise StoreError(f"there is no sample {index} of key {name} to discard")
        if not tables.is_discarded(name, index, row):
            gone = tables.discarded_row(f"{name}/{index}", b"" if row is None else row[2] or b"")
            self._shelf.execute(tables.PUT_DISCARDED, (f"{name}/{index}", self._now, self._now, gone))
        if index not in listed:
            self.add(LISTED, key, name, index)
        self._ledger.execute(
            "INSERT OR IGNORE INTO discards VALUES(?, ?, ?, ?)", (key, index, self._now, discard.why)
        )

    def _is_pending(self, key: int, index: int) -> bool:
        query = "SELECT 1 FROM pending WHERE key = ? AND sample = ?"
        return self._ledger.execute(query, (key, index)).fetchone() is not None

    def _note(self, note: Note) -> None:
        place = (note.run, note.namespace)
        if note.unreported.sold:
            document = note.unreported.dumps()
            digest = tables.sums_digest(*place, document)
            row = (self._stamp(), *place, document, digest)
            self._ledger.execute("INSERT INTO unreported VALUES(?, ?, ?, ?, ?)", row)
        if note.delivered.as_asked.sold:
            query = "SELECT document, digest FROM sums WHERE run = ? AND namespace = ?"
            found = self._ledger.execute(query, place).fetchone()
            sums = tables.read_sums(Delivered.loads, *place, *found) if found else Delivered()
            sums.join(note.delivered)
            document = sums.dumps()
            digest = tables.sums_digest(*place, document)
            self._ledger.execute(tables.ADD_SUMS, (*place, self._stamp(), document, digest))

    # Samples.

    def sample(self, key: str, index: int) -> Sample | Discarded | None:
        """Return the sample at an index, `DISCARDED`, or None."""
        sample = self._seen.get((key, index)) if self._seen else None
        return read_sample(self._shelf, key, index) if sample is None else sample

    # Sets.

    def _set(self, owner: int, key: int, name: str) -> SmallSet | LargeSet:
        """Return a set of indices of a key."""
        place = (owner, key)
        sets = self._memory.sets
        if place not in sets:
            # The listed set is usually needed together with a namespace's set.
            wanted = [owner] if owner == LISTED or (LISTED, key) in sets else [owner, LISTED]
            found: dict[int, list[tuple[int, int, bytes]]] = {each: [] for each in wanted}
            query = tables.TWO_SETS if len(wanted) > 1 else tables.ONE_SET
            for each, start, stop, digest in self._ledger.execute(query, (key, *wanted)):
                found[each].append((start, stop, digest))
            for each, rows in found.items():
                self._remember(each, key, name, rows)
        known = sets[place]
        if known is None:
            return LargeSet(self._ledger, (owner, self._label(owner)), (key, name))
        return known

    def _remember(self, owner: int, key: int, name: str, rows: list[tuple[int, int, bytes]]) -> None:
        small = len(rows) <= SMALL
        self._memory.sets[owner, key] = SmallSet(self._label(owner), name, rows) if small else None

    def add(self, owner: int, key: int, name: str, index: int) -> None:
        """Put an index into a set."""
        known = self._set(owner, key, name)
        known.add(index)
        if type(known) is SmallSet:
            self._dirty[owner, key] = known

    def _remove(self, owner: int, key: int, name: str, index: int) -> None:
        known = self._set(owner, key, name)
        known.remove(index)
        if type(known) is SmallSet:
            self._dirty[owner, key] = known

    # What is gathered, and written many rows to a statement.

    def _flush(self) -> None:
        if self._keys:
            self._ledger.executemany("INSERT INTO keys VALUES(?, ?, ?, ?, ?)", self._keys)
            self._keys.clear()
            self._new_keys.clear()
            self._begun.clear()
        if self._intervals:
            self._ledger.executemany(tables.PUT_INTERVAL, self._intervals)
            self._intervals.clear()
        if self._segments:
            self._ledger.executemany(tables.PUT_SEGMENT, self._segments)
            self._segments.clear()
            self._touched.clear()
        if self._pending:
            self._ledger.executemany("INSERT INTO pending VALUES(?, ?, ?)", self._pending)
            self._pending.clear()
        if self._uses:
            self._ledger.executemany("INSERT OR IGNORE INTO uses VALUES(?, ?, ?)", self._uses)
            self._uses.clear()
        if self._dirty:
            self._flush_sets()

    def _flush_sets(self) -> None:
        gone: list[tuple[int, int, int]] = []
        new: list[tuple[int, int, int, int, bytes]] = []
        for (owner, key), known in self._dirty.items():
            intervals = list(known)
            old, added = changes(known.written, intervals)
            gone += [(owner, key, stop) for _, stop in old]
            for start, stop in added:
                digest = tables.interval_digest(known.label, known.key, start, stop)
                new.append((owner, key, stop, start, digest))
            known.written = intervals
            if len(intervals) > SMALL:
                self._memory.grown.append((owner, key))
        self._dirty.clear()
        if gone:
            self._ledger.executemany(tables.DROP_INTERVAL, gone)
        if new:
            self._ledger.executemany(tables.PUT_INTERVAL, new)

    # Interned ids.

    def _intern(self, keys: list[str]) -> None:
        """Look up the ids of many keys in one statement."""
        known = self._memory.keys
        unknown = [key for key in keys if key not in known]
        if len(unknown) > 8:
            rows = self._ledger.execute(
                "SELECT key, id FROM keys WHERE key IN (SELECT value FROM json_each(?))",
                (orjson.dumps(unknown).decode(),),
            )
            known.update(rows)
            for key in unknown:
                known.setdefault(key, 0)

    def _key(self, question: Question) -> int:
        known = self._memory.keys
        key = known.get(question.key)
        if key is None:
            key = self._memory.written.get(question.key)
        if key is None:
            row = self._ledger.execute("SELECT id FROM keys WHERE key = ?", (question.key,)).fetchone()
            key = 0 if row is None else int(row[0])
        if not key:
            if self._keys:
                key = self._keys[-1][0] + 1
            else:
                row = self._ledger.execute("SELECT max(id) FROM keys").fetchone()
                key = (row[0] or 0) + 1
            self._keys.append((key, question.key, question.scope, question.document, self._now))
            self._new_keys.add(key)
        known[question.key] = key
        return key

    def _key_of(self, name: str) -> int:
        key = self._memory.keys.get(name)
        if not key:
            row = self._ledger.execute("SELECT id FROM keys WHERE key = ?", (name,)).fetchone()
            if row is None:
                raise StoreError(f"the cache knows no key {name}; claim a draw of it first")
            key = self._memory.keys[name] = int(row[0])
        return key

    def _namespace(self, label: str) -> int:
        known = self._memory.namespaces
        namespace = known.get(label)
        if namespace is None:
            self._ledger.execute("INSERT OR IGNORE INTO namespaces VALUES(NULL, ?)", (label,))
            row = self._ledger.execute("SELECT id FROM namespaces WHERE label = ?", (label,)).fetchone()
            namespace = known[label] = int(row[0])
            self._memory.labels[namespace] = label
        return namespace

    def _label(self, namespace: int) -> str:
        label = self._memory.labels.get(namespace)
        if label is None:
            row = self._ledger.execute("SELECT label FROM namespaces WHERE id = ?", (namespace,)).fetchone()
            if row is None:
                raise DamagedCache(
                    f"the ledger has a draw of namespace number {namespace}, but no such namespace. Restore "
                    "the cache from a copy"
                )
            label = self._memory.labels[namespace] = str(row[0])
        return label

    # Leases.

    def _lease(self) -> int:
        lease = self._memory.lease
        if lease is None:
            name = self._memory.leased()
            self._ledger.execute("INSERT OR IGNORE INTO leases VALUES(NULL, ?, ?, NULL)", (name, self._now))
            row = self._ledger.execute("SELECT id FROM leases WHERE name = ?", (name,)).fetchone()
            lease = self._memory.lease = int(row[0])
        return lease

    def _alive(self, lease: int) -> bool:
        row = self._ledger.execute(
            "SELECT name FROM leases WHERE id = ? AND ended IS NULL", (lease,)
        ).fetchone()
        return row is not None and self._memory.lives(lease, row[0])

    def _reap_the_dead(self) -> None:
        """Free the samples that dead processes were generating, and end their holds."""
        now = time.monotonic()
        if now - self._memory.reaped < 0.1:
            return
        self._memory.reaped = now
        self._memory.check_files()
        mine = self._lease()
        for lease, name in self._ledger.execute(
            "SELECT id, name FROM leases WHERE ended IS NULL AND id != ?", (mine,)
        ).fetchall():
            if self._memory.lives(lease, name):
                continue
            for key, name_of_key, index in self._ledger.execute(
                "SELECT p.key, k.key, p.sample FROM pending p JOIN keys k ON k.id = p.key WHERE p.lease = ?",
                (lease,),
            ).fetchall():
                if self.sample(name_of_key, index) is None:
                    self._remove(LISTED, key, name_of_key, index)
            self._ledger.execute("DELETE FROM pending WHERE lease = ?", (lease,))
            self._ledger.execute("DELETE FROM holders WHERE lease = ?", (lease,))
            self._ledger.execute("UPDATE leases SET ended = ? WHERE id = ?", (self._now, lease))


class _KeyView:
    """One key as a transaction shows it to a claim (see ``cachepipe.contract.allotment.KeyView``)."""

    __slots__ = (
        "_claim",
        "_key",
        "_namespace",
        "_others",
        "_place",
        "_transaction",
        "listed",
        "own",
        "taken",
    )

    def __init__(
        self, transaction: Transaction, claim: Claim, key: int, namespace: int, place: Place
    ) -> None:
        self._transaction = transaction
        self._claim = claim
        self._key = key
        self._namespace = namespace
        self._place = place
        self.own, self._others = transaction.rows(place, namespace)
        name = claim.draw.key
        taken: IndexSet = transaction._set(namespace, key, name)  # noqa: SLF001 - of this module
        self.taken = taken if claim.avoid is None else Union(taken, claim.avoid)
        self.listed: IndexSet = transaction._set(LISTED, key, name)  # noqa: SLF001 - of this module

    def coupled(self) -> Sequence[int]:
        if self._others is not None and not self._others:
            return ()
        return self._transaction.coupled(self._claim.draw, self._place, self._namespace, self._others)

    def sample(self, index: int) -> Sample | Discarded | None:
        return self._transaction.sample(self._claim.draw.key, index)

    def take(self, index: int) -> None:
        self._transaction.add(self._namespace, self._key, self._claim.draw.key, index)

    def lease(self, index: int) -> bool:
        return self._transaction.lease(self._key, self._claim.draw.key, index, self.listed)


def _earliest(segments: Iterable[Segment]) -> Segment:
    """Return the first row of the earliest namespace."""
    try:
        return min(segments, key=lambda segment: (segment.stamp, segment.namespace))
    except TypeError as error:
        raise tables.damaged_row("a stamp that is not a number") from error


def _pieces(segments: Sequence[Segment]) -> list[Piece]:
    """Return segments as ``cachepipe.contract.undoing`` takes them."""
    return [
        Piece(segment.part, segment.position, unpack(segment.indices), segment.claim, segment.standing)
        for segment in segments
    ]
