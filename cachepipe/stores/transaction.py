"""One transaction on the ledger: the contract's verbs as rows.

Small sets of indices are held in memory while nobody else writes (SQLite's ``data_version`` tells), and
new rows are gathered and written many to a statement at the end. So a thousand draws claimed at once
cost a few statements, and a lone draw of a known key costs three.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import orjson

from cachepipe.errors import StoreError
from cachepipe.keys import Question, trimmed
from cachepipe.ledger import (
    LISTED,
    SHARED,
    Runs,
    choose,
    is_in,
    laid,
    lowest_new,
    merged,
    settled,
    split,
)
from cachepipe.stores.base import (
    Claim,
    Commit,
    Committed,
    Discard,
    Forgo,
    Grant,
    Leave,
    Operation,
    Result,
    Sample,
)
from cachepipe.stores.rows import DISCARDED, GONE, PUT, Discarded, pack, parse_sample, read_sample, unpack

_SMALL = 64  # runs up to which a set is held in memory as a whole
_REMEMBERED = 20_000  # keys, namespaces and sets remembered between transactions, half a kilobyte each

_SEVERAL = 8  # claims from which on what they look at is read in a few statements
_FEW = 8  # rows of one draw, of all namespaces together, up to which they are simply read
_DRAW = (
    "SELECT namespace, part, position, indices, lease, token, at, standing FROM segments"
    " WHERE key = ?1 AND request_id = ?2 AND occurrence = ?3"
)
_OTHERS = (
    f"{_DRAW} AND namespace != ? AND namespace IS NOT (SELECT id FROM namespaces WHERE label = '{SHARED}')"
)
_OWN_AND_FIRST = (
    f"{_DRAW} AND namespace IN"
    " (?4, (SELECT namespace FROM firsts WHERE key = ?1 AND request_id = ?2 AND occurrence = ?3))"
)
_ROWS = 32  # rows to a statement that looks many draws up at once
_DRAWS = (
    "WITH w(k, r, o) AS (VALUES " + ", ".join(["(?, ?, ?)"] * _ROWS) + ")"
    " SELECT w.k, w.r, w.o, s.namespace, s.part, s.position, s.indices, s.lease, s.token, s.at, s.standing"
    " FROM w CROSS JOIN segments s ON s.key = w.k AND s.request_id = w.r AND s.occurrence = w.o"
    " AND s.namespace <= ifnull((SELECT t.namespace FROM segments t WHERE t.key = w.k AND t.request_id = w.r"
    f" AND t.occurrence = w.o LIMIT 1 OFFSET {_FEW}), 9223372036854775807)"
)
_SETS = (
    "SELECT s.key, s.start, s.stop FROM json_each(?2) j"
    " CROSS JOIN spans s ON s.owner = ?1 AND s.key = j.value AND s.stop <= ifnull("
    "(SELECT t.stop FROM spans t WHERE t.owner = ?1 AND t.key = j.value"
    f" ORDER BY t.stop LIMIT 1 OFFSET {_SMALL}), 9223372036854775807) ORDER BY s.key, s.stop"
)
_ONE_SET = (
    f"SELECT owner, start, stop FROM spans WHERE key = ?1 AND owner = ?2 ORDER BY stop LIMIT {_SMALL + 1}"
)
_TWO_SETS = f"SELECT * FROM ({_ONE_SET}) UNION ALL SELECT * FROM ({_ONE_SET.replace('?2', '?3')})"
_SAMPLES = (
    "SELECT j.value, c.mode, c.filename, c.value FROM json_each(?) j"
    " CROSS JOIN Cache c ON c.key = j.value AND c.raw = 1"
)
_PART = " WHERE key = ? AND request_id = ? AND occurrence = ? AND namespace = ? AND part = ?"

DrawRow = tuple[int, str, int]
"""A draw's key, request id and occurrence, as the ledger writes them."""


class Memory:
    """What a store remembers between its transactions; worth nothing once somebody else has written."""

    def __init__(
        self,
        leased: Callable[[], str],
        lives: Callable[[int, str], bool],
        shared: Callable[[set[int]], bool],
        written: dict[str, int],
        check_files: Callable[[], None],
    ) -> None:
        """Make an empty one; ``written`` are ids of keys that readers have seen: they stay what they are."""
        self.leased = leased
        self.lives = lives
        self.shared = shared
        self.check_files = check_files
        self.version = -1
        self.lease: int | None = None
        self.reaped = 0.0
        self.at = 0.0
        self.keys: dict[str, int] = {}
        self.written = written
        self.namespaces: dict[str, int] = {}
        self.sets: dict[tuple[int, int], _Set | None] = {}

    def forget(self) -> None:
        """Forget everything: a transaction was rolled back, or somebody else has written."""
        self.lease = None
        self.keys.clear()
        self.namespaces.clear()
        self.sets.clear()


class _Set(Runs):
    """A set of indices with the rows that the ledger has of it."""

    __slots__ = ("written",)

    def __init__(self, written: list[tuple[int, int]]) -> None:
        super().__init__()
        self._starts = [start for start, _ in written]
        self._stops = [stop for _, stop in written]
        self.written = written

    @property
    def runs(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))


class Transaction:
    """Applies operations inside ``BEGIN IMMEDIATE`` … ``COMMIT`` on the ledger's connection."""

    def __init__(self, memory: Memory, ledger: sqlite3.Connection, shelf: sqlite3.Connection) -> None:
        self._memory = memory
        self._ledger = ledger
        self._shelf = shelf
        self._now = time.time()
        self._at = max(self._now, memory.at)
        self._keys: list[tuple[int, str, str | None, bytes, float]] = []
        self._segments: list[tuple[Any, ...]] = []
        self._pending: list[tuple[int, int, int]] = []
        self._spans: list[tuple[int, int, int, int]] = []
        self._uses: list[tuple[int, int, float]] = []
        self._touched: set[DrawRow] = set()
        self._new_keys: set[int] = set()
        self._claimed: set[int] = set()
        self._dirty: dict[tuple[int, int], _Set] = {}
        self._found: dict[DrawRow, list[Any]] = {}
        self._seen: dict[tuple[str, int], Sample | Discarded] = {}
        version = ledger.execute("PRAGMA data_version").fetchone()[0]
        if version != memory.version or len(memory.sets) > _REMEMBERED or len(memory.keys) > _REMEMBERED:
            memory.forget()
            memory.version = version

    def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Return the operations' results, after everything is written but the COMMIT."""
        kinds = [type(operation) for operation in operations]
        if Leave in kinds and Commit in kinds[kinds.index(Leave) :]:
            # Readers see a sample before this transaction has ended: no draw that waits for it may be undone.
            first = kinds.index(Leave)
            late = sorted(range(first, len(kinds)), key=lambda place: kinds[place] is not Commit)
            order = [*range(first), *late]
            found = dict(zip(order, self.apply([operations[place] for place in order]), strict=True))
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
                    case Forgo():
                        self._forgo(operation)
                    case Leave():
                        self._leave(operation)
                    case Discard():
                        self._discard(operation)
                results.append(None)
            place += 1
        self._flush()
        return results

    def _look_ahead(self, claims: Sequence[Claim]) -> None:
        """Read in a few statements what the claims will most likely look at: rows, sets and samples."""
        known = self._memory.keys
        old = [claim for claim in claims if known.get(claim.draw.key)]
        if len(old) < _SEVERAL:
            return
        draws = [claim.draw for claim in old]
        self._found = {(known[draw.key], draw.request_id, draw.occurrence): [] for draw in draws}
        wanted = list(self._found)
        for at in range(0, len(wanted), _ROWS):
            part: list[Any] = [value for place in wanted[at : at + _ROWS] for value in place]
            part += [None] * (3 * _ROWS - len(part))
            for row in self._ledger.execute(_DRAWS, part):
                self._found[row[:3]].append(row[3:])
        owners: dict[int, set[int]] = {LISTED: set()}
        for claim in old:
            key = known[claim.draw.key]
            owners[LISTED].add(key)
            owners.setdefault(self._namespace(claim.draw.namespace), set()).add(key)
        sets = self._memory.sets
        for owner, keys in owners.items():
            runs: dict[int, list[tuple[int, int]]] = {key: [] for key in keys if (owner, key) not in sets}
            if len(runs) >= _SEVERAL:
                for key, start, stop in self._ledger.execute(_SETS, (owner, orjson.dumps([*runs]).decode())):
                    runs[key].append((start, stop))
                for key, rows in runs.items():
                    sets[owner, key] = None if len(rows) > _SMALL else _Set(rows)
        self._look_at_samples(old)

    def _look_at_samples(self, claims: Sequence[Claim]) -> None:
        """Read the samples that claims will most likely get: their own, the coupled, or the first free."""
        wanted: dict[str, tuple[str, int]] = {}
        for claim in claims:
            draw = claim.draw
            if claim.n > _FEW:
                continue
            key, namespace = self._memory.keys[draw.key], self._namespace(draw.namespace)
            rows = self._found[key, draw.request_id, draw.occurrence]
            taken = self.run_at(namespace, key, 0)
            first = 0 if taken is None or taken[0] else taken[1]
            indices = list(range(first, first + claim.n))
            if rows:
                others = {row[0]: row for row in reversed(rows)}
                row = others.get(namespace) or min(others.values(), key=lambda row: (row[6], row[0]))
                if row[2] == 0:
                    indices = unpack(row[3])[: claim.n]
            for index in indices:
                wanted[f"{draw.key}/{index}"] = (draw.key, index)
        for name, mode, filename, value in self._shelf.execute(_SAMPLES, (orjson.dumps([*wanted]).decode(),)):
            self._seen[wanted[name]] = parse_sample(*wanted[name], mode, filename, value)

    # Claims.

    def _claim(self, claim: Claim) -> Grant:
        draw, n = claim.draw, claim.n
        key = self._key(claim.question)
        namespace = self._namespace(draw.namespace)
        if key in self._new_keys:
            if key not in self._claimed:
                return self._claim_first(claim, key, namespace)
            self._flush()
        if claim.user is not None:
            self._uses.append((key, self._namespace(claim.user), self._now))
        book = _Book(self, key, claim.avoid)
        place = (key, draw.request_id, draw.occurrence)
        own, others = self._rows(place, namespace)
        known = draw.namespace != SHARED and book.run_at(namespace, 0) is not None
        stored = None if own else self._claim_stored(claim, book, place, namespace, others, fresh=known)
        if stored is not None:
            return stored
        whole = laid((row[2], unpack(row[3])) for row in own)
        indices = whole[:n]
        old = 0 if claim.refresh else len(indices)
        samples: list[Sample | None] = []
        coupled: list[int] | None = None
        replaced: list[int] = []
        mine: list[int] = []
        for position in range(n):
            sample: Sample | Discarded | None = GONE
            if position < old:
                sample = self._sample(draw.key, indices[position])
                if sample is GONE:
                    replaced.append(position)
            listed = True
            while sample is GONE:
                if coupled is None:
                    alone = claim.refresh or draw.namespace == SHARED
                    coupled = [] if alone else self._coupled(place, namespace, others)
                preferred = coupled[position] if position < len(coupled) else None
                index = choose(book, namespace, preferred, new=claim.refresh)
                self._add(namespace, key, index)  # a discarded one stays taken: nothing comes back to it
                indices[position : position + 1] = [index]
                listed = is_in(book, LISTED, index)
                sample = self._sample(draw.key, index) if listed else None
            if not isinstance(sample, Sample):
                sample = None
                index = indices[position]
                if self._gain(book, key, index, listed=listed):
                    mine.append(index)
            samples.append(sample)
        missing = None in samples
        token = claim.token if missing else None
        held: list[int] = []
        if missing and own:
            held = self._join(claim, place, namespace, own)
        elif len(whole) > n:
            self._let_stand(claim, place, namespace, own, {*whole[n:]})
        added = [(position, [indices[position]]) for position in replaced]
        if old < n:
            added.append((old, indices[old:]))
        added += [(n, [])] * (claim.refresh and len(whole) > n)  # the old row goes as a whole
        held += self._extend((*place, namespace), own, added, mine, token)
        return Grant(
            indices,
            samples,
            mine,
            tuple(held) if missing else (),
            sum(len(chosen) for _, chosen in added),
            fresh_id=known and not own and bool(draw.request_id),
            shared=bool(own) and self._memory.shared({row[4] for row in own}),
            joined=missing and any(row[5] != token or row[4] != self._lease() for row in own),
        )

    def _claim_stored(
        self,
        claim: Claim,
        book: _Book,
        place: DrawRow,
        namespace: int,
        others: list[Any] | None,
        *,
        fresh: bool,
    ) -> Grant | None:
        """Claim the one sample of a draw that is new to its namespace, if that is stored: the usual case."""
        draw = claim.draw
        if claim.n > 1 or claim.refresh or draw.namespace == SHARED:
            return None
        coupled = self._coupled(place, namespace, others)
        index = choose(book, namespace, coupled[0] if coupled else None)
        sample = self._sample(draw.key, index)
        if type(sample) is not Sample:
            return None
        self._add(namespace, place[0], index)
        self._write(place, (*place, namespace, 0, 0, index, self._lease(), None, 0, self._later(), 0))
        return Grant([index], [sample], [], (), 1, fresh and bool(draw.request_id))

    def _extend(
        self,
        where: tuple[int, str, int, int],
        own: list[Any],
        added: list[tuple[int, list[int]]],
        mine: list[int],
        token: str | None,
    ) -> list[int]:
        """Write what one claim adds to a draw; by lease, token and time its segments are known as one."""
        if not added:
            return []
        first = own[-1][1] + 1 if own else 0
        lease, at = self._lease(), self._later()
        for part, (position, chosen) in enumerate(added, first):
            generated = len({*chosen}.intersection(mine)) if mine else 0
            standing = len(chosen) if token is None else 0
            row = (*where, part, position, pack(chosen), lease, token, generated, at, standing)
            self._write(where[:3], row)
        return [*range(first, first + len(added))]

    def _write(self, place: DrawRow, row: tuple[Any, ...]) -> None:
        """Write a segment of a draw, at the latest before the draw is looked up again."""
        self._segments.append(row)
        self._touched.add(place)
        self._found.pop(place, None)

    def _later(self) -> float:
        """Return a time that is later than that of every row before: the earliest namespace goes by it."""
        self._at = self._memory.at = self._at + 1e-6
        return self._at

    def _claim_first(self, claim: Claim, key: int, namespace: int) -> Grant:
        """Claim the first samples of a key that nobody has asked for before."""
        draw, n, lease = claim.draw, claim.n, self._lease()
        place = (key, draw.request_id, draw.occurrence)
        indices = list(range(n))
        self._segments.append(
            (*place, namespace, 0, 0, 0 if n == 1 else pack(indices), lease, claim.token, n, self._later(), 0)
        )
        self._pending += [(key, index, lease) for index in indices]
        self._spans.append((LISTED, key, n, 0))
        self._spans.append((namespace, key, n, 0))
        self._claimed.add(key)
        if claim.user is not None:
            self._uses.append((key, self._namespace(claim.user), self._now))
        return Grant(indices, [None] * n, list(indices), (0,), n)

    def _rows(self, place: DrawRow, namespace: int) -> tuple[list[Any], list[Any] | None]:
        """Return a draw's rows in this namespace, and in the others.

        When those are many, only those of the earliest, or None when it is not known which that is.
        """
        if place in self._touched:
            self._flush()
        rows = self._found.get(place)
        if rows is None:
            rows = self._ledger.execute(f"{_DRAW} LIMIT {_FEW + 1}", place).fetchall()
        if len(rows) <= _FEW:
            return [row for row in rows if row[0] == namespace], [row for row in rows if row[0] != namespace]
        rows = self._ledger.execute(_OWN_AND_FIRST, (*place, namespace)).fetchall()
        first = [row for row in rows if row[0] != namespace]
        return [row for row in rows if row[0] == namespace], first or None

    def _coupled(self, place: DrawRow, namespace: int, others: list[Any] | None) -> list[int]:
        """Return the indices that the same draw has in the earliest other namespace."""
        if others is None:
            first = self._first(place)
            if first == namespace:
                others = self._ledger.execute(
                    f"{_OTHERS} ORDER BY namespace, part", (*place, namespace)
                ).fetchall()
            else:
                others = self._ledger.execute(f"{_DRAW} AND namespace = ?", (*place, first)).fetchall()
        shared = self._namespace(SHARED)
        others = [row for row in others if row[0] != shared]
        if not others:
            return []
        earliest = min(others, key=lambda row: (row[6], row[0]))[0]
        return laid((row[2], unpack(row[3])) for row in others if row[0] == earliest)

    def _first(self, place: DrawRow) -> int | None:
        """Return the earliest namespace of a draw that has many rows; it is noted once found.

        None when all of the rows are those of the key's shared draw, which has no namespace.
        """
        row = self._ledger.execute(
            "SELECT namespace FROM firsts WHERE key = ? AND request_id = ? AND occurrence = ?", place
        ).fetchone()
        if row is None:
            row = self._ledger.execute(f"{_OTHERS} ORDER BY at, namespace LIMIT 1", (*place, -1)).fetchone()
            if row is None:
                return None
            self._ledger.execute("INSERT INTO firsts VALUES(?, ?, ?, ?)", (*place, row[0]))
        return int(row[0])

    def _join(self, claim: Claim, place: DrawRow, namespace: int, own: list[Any]) -> list[int]:
        """Hold the segments of a draw that may yet be undone, whoever wrote them."""
        held: list[int] = []
        for row in self._unsettled(claim.draw.key, own):
            if row[5] != claim.token or row[4] != self._lease():
                self._ledger.execute(
                    "INSERT OR IGNORE INTO holders VALUES(?, ?, ?, ?, ?, ?, ?)",
                    (*place, namespace, row[1], self._holder(claim.token), self._lease()),
                )
            held.append(row[1])
        return held

    def _holder(self, token: str) -> str:
        """Return the token of a claimant among those of all processes."""
        return f"{self._lease()}-{token}"

    def _let_stand(
        self, claim: Claim, place: DrawRow, namespace: int, own: list[Any], beyond: set[int]
    ) -> None:
        """Note what is delivered now of segments that may yet be undone, as what lies beyond may fail."""
        key, last, given = claim.draw.key, own[0], {}
        for row in own:
            standing = min(claim.n - row[2], len(unpack(row[3])))
            if standing > row[7]:
                last, given[row[1]] = row, standing
        # What later claims added decides nothing of these.
        rows = [row for row in own if row[1] <= last[1] or row[4:7] == last[4:7]] if given else []
        after = [index for row in rows for index in unpack(row[3]) if index in beyond]
        missing = [index for index in after if self._sample(key, index) is None]
        for row in self._unsettled(key, rows, missing) if missing else ():
            if row[1] in given:
                self._found.pop(place, None)
                self._ledger.execute(
                    f"UPDATE segments SET standing = ?{_PART}", (given[row[1]], *place, namespace, row[1])
                )

    def _unsettled(self, key: str, rows: list[Any], among: Collection[int] | None = None) -> list[Any]:
        """Return the rows of a draw that may yet be undone, if samples are missing only ``among`` some."""
        first = settled(
            [(row[4:7], unpack(row[3])) for row in rows],
            lambda index: (among is None or index in among) and self._sample(key, index) is None,
        )
        return rows[first:]

    def _gain(self, book: _Book, key: int, index: int, *, listed: bool) -> bool:
        """Take the lease of an index without a sample, unless a live process has it."""
        row = (key, index, self._lease())
        if not listed and not is_in(book, LISTED, index):
            self._pending.append(row)
            self._add(LISTED, key, index)
            return True
        self._flush()
        gained = self._ledger.execute("INSERT OR IGNORE INTO pending VALUES(?, ?, ?)", row).rowcount
        if gained and not is_in(book, LISTED, index):
            self._add(LISTED, key, index)
        return bool(gained)

    # Commits.

    def _commit_all(self, commits: Sequence[Commit]) -> list[Result]:
        """Store samples: all at once when every lease is still ours, else one by one."""
        self._flush()
        self._seen.clear()
        self._intern([commit.key for commit in commits])
        if any(commit.index is None for commit in commits):
            return [self._commit(commit) for commit in commits]
        lease = self._lease()
        self._ledger.execute("SAVEPOINT commits")
        gone = self._ledger.executemany(
            "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?",
            [(self._key_of(commit.key), commit.index, lease) for commit in commits],
        ).rowcount
        samples = [_sample(commit, commit.index or 0) for commit in commits]
        if gone == len(commits) and self._put(list(zip(commits, samples, strict=True))):
            self._ledger.execute("RELEASE commits")
            return [Committed(sample, kept=True) for sample in samples]
        self._ledger.execute("ROLLBACK TO commits")
        self._ledger.execute("RELEASE commits")
        return [self._commit(commit) for commit in commits]

    def _put(self, samples: list[tuple[Commit, Sample]]) -> bool:
        """Write rows to the shelf, durably; tell whether all of them were new."""
        self._shelf.execute("BEGIN IMMEDIATE")
        put = self._shelf.executemany(
            PUT,
            [
                (f"{commit.key}/{sample.index}", self._now, self._now, sample.header + b"\n" + sample.payload)
                for commit, sample in samples
            ],
        ).rowcount
        if put != len(samples):
            self._shelf.execute("ROLLBACK")
            return False
        self._shelf.execute("COMMIT")
        return True

    def _commit(self, commit: Commit) -> Committed:
        key = self._key_of(commit.key)
        book = _Book(self, key)
        kept = commit.index is not None and self._still_ours(book, key, commit, commit.index)
        there = read_sample(self._shelf, commit.key, commit.index) if commit.index is not None else None
        if kept and isinstance(there, Sample):
            return Committed(there, kept=True)  # written before, by a transaction that was cut short
        index = commit.index
        if index is None or not kept:
            index = lowest_new(book, LISTED)
            while read_sample(self._shelf, commit.key, index) is not None:
                self._add(LISTED, key, index)  # stored, but not noted: its writer was killed in between
                index = lowest_new(book, LISTED)
            self._add(LISTED, key, index)
        sample = _sample(commit, index)
        if not self._put([(commit, sample)]):
            raise StoreError(f"sample {index} of key {commit.key} was written by somebody else meanwhile")
        return Committed(sample, kept)

    def _still_ours(self, book: _Book, key: int, commit: Commit, index: int) -> bool:
        """Take a committed index out of ``pending``; tell whether the lease on it was still ours."""
        gone = self._ledger.execute(
            "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
        ).rowcount
        there = read_sample(self._shelf, commit.key, index)
        if there is not None:
            return isinstance(there, Sample) and there.id == commit.id
        if not gone:
            pending = self._ledger.execute(
                "SELECT 1 FROM pending WHERE key = ? AND sample = ?", (key, index)
            ).fetchone()
            if pending is not None:
                return False
        if not is_in(book, LISTED, index):
            self._add(LISTED, key, index)
        return True

    # What else happens to a draw and to a sample.

    def _forgo(self, forgo: Forgo) -> None:
        key = self._key_of(forgo.key)
        for index in forgo.indices:
            gone = self._ledger.execute(
                "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?", (key, index, self._lease())
            ).rowcount
            if gone and self._sample(forgo.key, index) is None:
                self._remove(LISTED, key, index)

    def _leave(self, leave: Leave) -> None:
        """End a hold. What is not settled and held by nobody else is undone, but what was delivered (C8)."""
        key = self._key_of(leave.draw.key)
        namespace = self._namespace(leave.draw.namespace)
        place = (key, leave.draw.request_id, leave.draw.occurrence)
        where = (*place, namespace)
        rows = [list(row) for row in self._ledger.execute(f"{_DRAW} AND namespace = ?", where)]
        held = [row for row in rows if row[1] in leave.held and self._let_go(leave, where, row)]
        if all(row[7] == len(unpack(row[3])) for row in held):
            return
        undone: list[int] = []
        while fallen := self._fallen(leave.draw.key, where, rows, held):
            for row in fallen:  # when a refresh is undone, what it had replaced is there again
                undone += self._undo(where, row, rows)
        for index in undone:
            self._remove(namespace, key, index)
        if undone:
            self._ledger.execute(
                "DELETE FROM firsts WHERE key = ? AND request_id = ? AND occurrence = ? AND namespace = ?",
                where,
            )

    def _let_go(self, leave: Leave, where: tuple[Any, ...], row: list[Any]) -> bool:
        """End a claimant's hold of a segment, and note what it was given; tell whether it had one."""
        part = (*where, row[1])
        if row[4:6] == [self._lease(), leave.token]:
            row[5] = None
            if not leave.complete:
                self._ledger.execute(f"UPDATE segments SET token = NULL{_PART}", part)
        else:
            holder = (*part, self._holder(leave.token))
            if not self._ledger.execute(f"DELETE FROM holders{_PART} AND token = ?", holder).rowcount:
                return False
        if leave.complete and (given := min(leave.n - row[2], len(unpack(row[3])))) > row[7]:
            row[7] = given
            self._ledger.execute(f"UPDATE segments SET standing = ?{_PART}", (given, *part))
        return True

    def _fallen(
        self, key: str, where: tuple[Any, ...], rows: list[list[Any]], held: list[list[Any]]
    ) -> list[list[Any]]:
        """Return the segments to undo: of those that were held, and of what the dead have laid on them."""
        visible = laid((row[2], unpack(row[3])) for row in rows)
        decided = {index for row in held for index in unpack(row[3])}.intersection(visible)
        fallen: list[list[Any]] = []
        for row in self._unsettled(key, rows, decided):
            stands = 0 < len(unpack(row[3])) == row[7]
            if stands or not (fallen or row in held):
                continue
            if not self._held_by_others((*where, row[1]), row[4], row[5]):
                fallen.append(row)
        return fallen

    def _undo(self, where: tuple[Any, ...], row: list[Any], rows: list[list[Any]]) -> list[int]:
        """Cut a segment down to what was delivered of it; return the indices that are free again."""
        part, indices = (*where, row[1]), unpack(row[3])
        kept, free = indices[: row[7]], indices[row[7] :]
        if not kept:
            rows.remove(row)
            self._ledger.execute(f"DELETE FROM segments{_PART}", part)
        elif free:
            row[3] = pack(kept)
            self._ledger.execute(f"UPDATE segments SET indices = ?{_PART}", (row[3], *part))
        return free

    def _held_by_others(self, where: tuple[Any, ...], author: int, token: str | None) -> bool:
        """Tell whether a live claimant holds a segment: its author, whose token is there, or a joiner."""
        mine = (*where, self._lease())
        if self._ledger.execute(f"SELECT 1 FROM holders{_PART} AND lease = ? LIMIT 1", mine).fetchone():
            return True  # most holders of a crowd are this process's: one of them is enough
        leases = {row[0] for row in self._ledger.execute(f"SELECT lease FROM holders{_PART}", where)}
        if token is not None:
            leases.add(author)
        return any(lease == self._lease() or self._alive(lease) for lease in leases)

    def _discard(self, discard: Discard) -> None:
        key = self._key_of(discard.key)
        there = read_sample(self._shelf, discard.key, discard.index)
        if there is None:
            raise StoreError(f"there is no sample {discard.index} of key {discard.key} to discard")
        if there is not GONE:
            self._shelf.execute(
                "UPDATE Cache SET value = CAST(? || value AS BLOB) WHERE key = ? AND raw = 1",
                (DISCARDED, f"{discard.key}/{discard.index}"),
            )
        self._ledger.execute(
            "INSERT OR IGNORE INTO discards VALUES(?, ?, ?, ?)", (key, discard.index, self._now, discard.why)
        )

    # Samples.

    def _sample(self, key: str, index: int) -> Sample | Discarded | None:
        sample = self._seen.get((key, index))
        return read_sample(self._shelf, key, index) if sample is None else sample

    # Sets.

    def set_of(self, owner: int, key: int) -> _Set | None:
        """Return a small set of indices, or None for one that has too many runs to hold."""
        place = (owner, key)
        sets = self._memory.sets
        if place in sets:
            return sets[place]
        # The set of all is looked at with that of a namespace, mostly.
        wanted = [owner] if owner == LISTED or (LISTED, key) in sets else [owner, LISTED]
        found: dict[int, list[tuple[int, int]]] = {each: [] for each in wanted}
        for each, start, stop in self._ledger.execute(
            _TWO_SETS if len(wanted) > 1 else _ONE_SET, (key, *wanted)
        ):
            found[each].append((start, stop))
        for each, rows in found.items():
            sets[each, key] = None if len(rows) > _SMALL else _Set(rows)
        return sets[place]

    def run_at(self, owner: int, key: int, at: int) -> tuple[int, int] | None:
        """Return the first run of a set whose stop is above ``at``."""
        known = self.set_of(owner, key)
        if known is not None:
            return known.run_at(at)
        run: tuple[int, int] | None = self._ledger.execute(
            "SELECT start, stop FROM spans WHERE owner = ? AND key = ? AND stop > ? ORDER BY stop LIMIT 1",
            (owner, key, at),
        ).fetchone()
        return run

    def _add(self, owner: int, key: int, index: int) -> None:
        known = self.set_of(owner, key)
        if known is not None:
            known.add(index)
            self._dirty[owner, key] = known
            return
        near = self._ledger.execute(
            "SELECT start, stop FROM spans WHERE owner = ? AND key = ? AND stop >= ? ORDER BY stop LIMIT 2",
            (owner, key, index),
        ).fetchall()
        if any(run[0] <= index < run[1] for run in near):
            return
        gone, run = merged(near, index)
        self._rewrite(owner, key, gone, [run])

    def _remove(self, owner: int, key: int, index: int) -> None:
        known = self.set_of(owner, key)
        if known is not None:
            known.remove(index)
            self._dirty[owner, key] = known
            return
        run = self.run_at(owner, key, index)
        if run is not None and run[0] <= index:
            self._rewrite(owner, key, [run], split(run, index))

    def _rewrite(self, owner: int, key: int, old: list[tuple[int, int]], new: list[tuple[int, int]]) -> None:
        for _, stop in old:
            self._ledger.execute(
                "DELETE FROM spans WHERE owner = ? AND key = ? AND stop = ?", (owner, key, stop)
            )
        for start, stop in new:
            self._ledger.execute("INSERT INTO spans VALUES(?, ?, ?, ?)", (owner, key, stop, start))

    # What is gathered, and written many rows to a statement.

    def _flush(self) -> None:
        if self._keys:
            self._ledger.executemany("INSERT INTO keys VALUES(?, ?, ?, ?, ?)", self._keys)
            self._keys.clear()
        if self._segments:
            self._ledger.executemany(
                "INSERT INTO segments VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._segments
            )
            self._segments.clear()
            self._touched.clear()
        if self._pending:
            self._ledger.executemany("INSERT INTO pending VALUES(?, ?, ?)", self._pending)
            self._pending.clear()
        if self._spans:
            self._ledger.executemany("INSERT INTO spans VALUES(?, ?, ?, ?)", self._spans)
            self._spans.clear()
        if self._uses:
            self._ledger.executemany("INSERT OR IGNORE INTO uses VALUES(?, ?, ?)", self._uses)
            self._uses.clear()
        if self._dirty:
            self._flush_sets()
        self._new_keys.clear()
        self._claimed.clear()

    def _flush_sets(self) -> None:
        gone: list[tuple[int, int, int]] = []
        new: list[tuple[int, int, int, int]] = []
        for (owner, key), known in self._dirty.items():
            runs, written = known.runs, known.written
            if runs == written:
                continue
            before, after = set(written), set(runs)
            gone += [(owner, key, stop) for _, stop in before - after]
            new += [(owner, key, stop, start) for start, stop in after - before]
            known.written = runs
            if len(runs) > _SMALL:
                self._memory.sets[owner, key] = None
        self._dirty.clear()
        if gone:
            self._ledger.executemany("DELETE FROM spans WHERE owner = ? AND key = ? AND stop = ?", gone)
        if new:
            self._ledger.executemany("INSERT INTO spans VALUES(?, ?, ?, ?)", new)

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

    def _namespace(self, written: str) -> int:
        known = self._memory.namespaces
        namespace = known.get(written)
        if namespace is None:
            self._ledger.execute("INSERT OR IGNORE INTO namespaces VALUES(NULL, ?)", (written,))
            row = self._ledger.execute("SELECT id FROM namespaces WHERE label = ?", (written,)).fetchone()
            namespace = known[written] = int(row[0])
        return namespace

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
        """Free what processes that have died were generating, and end their holds."""
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
                if self._sample(name_of_key, index) is None:
                    self._remove(LISTED, key, index)
            self._ledger.execute("DELETE FROM pending WHERE lease = ?", (lease,))
            self._ledger.execute("DELETE FROM holders WHERE lease = ?", (lease,))
            self._ledger.execute("UPDATE leases SET ended = ? WHERE id = ?", (self._now, lease))


class _Book:
    """The sets of one key inside a transaction."""

    __slots__ = ("_avoid", "_key", "_transaction")

    def __init__(self, transaction: Transaction, key: int, avoid: Runs | None = None) -> None:
        self._transaction = transaction
        self._key = key
        self._avoid = avoid

    def run_at(self, owner: int, at: int) -> tuple[int, int] | None:
        run = self._transaction.run_at(owner, self._key, at)
        if self._avoid is not None and owner != LISTED:
            other = self._avoid.run_at(at)
            if other is not None and (run is None or other[0] < run[0]):
                return other
        return run


def _sample(commit: Commit, index: int) -> Sample:
    return Sample(index, commit.id, commit.payload, trimmed(orjson.dumps({"id": commit.id, **commit.meta})))
