"""A complete check of a shared store (C12): each row against its digest, and against the rows of its key.

The check only reads, and sees the rows of a key as of one moment and its samples as of a later one. So it can
run while others use the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Final

from cachepipe.accounting import RunSums
from cachepipe.contract import keys
from cachepipe.contract.allotment import indices_of
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import PENDING, SAMPLE, Read, Rows
from cachepipe.stores.remote.listing import sample_indices
from cachepipe.stores.remote.rows import DrawRow, FirstRow
from cachepipe.stores.remote.session import RUN, Session
from cachepipe.stores.tables import load_purse
from cachepipe.stores.verify import Absent, IntegrityReport, Step, Stored, gaps, span, told, whose

_PAGE: Final = 100  # samples that are read in one round trip
_NOTES: Final = frozenset({"lease", "discard", "change"})
"""Kinds of damaged rows that are written anew from others."""
_OF_RUNS: Final = (rows.SUMS, rows.BUDGET, rows.REMOVAL)
_OF_QUESTIONS: Final = (rows.TAKEN, rows.DRAW, rows.FIRST, PENDING, rows.WHY, rows.USE)


def check(session: Session, step: Step = lambda: None) -> IntegrityReport:
    """Return what is wrong in a shared store.

    A question with a problem is looked at twice, because others may write between two answers of the engine.

    Args:
        session: this process's use of the store.
        step: called after each key.
    """
    report = IntegrityReport()
    seen: set[str] = set()
    for key, found in session.engine.scan(""):
        if key not in seen:
            seen.add(key)
            one = _checked(session, key, found)
            report.join(one if one.whole else _checked(session, key, session.engine.rows_of([key])[0]))
            step()
    for key in session.engine.strays():
        report.add("stray", key)
    return report


def _checked(session: Session, key: str, found: Rows) -> IntegrityReport:
    report = IntegrityReport()
    if found:
        _Key(session, key, found, report).check()
    return report


class _Key:
    """The check of one key."""

    def __init__(self, session: Session, key: str, found: Rows, report: IntegrityReport) -> None:
        self._session = session
        self._key = key
        self._rows = found
        self._report = report
        self._discarded = {*rows.indices_in(found, rows.WHY)}

    def check(self) -> None:
        """Check all rows."""
        if self._key.startswith(RUN):
            self._each(rows.SUMS, self._check_sums, "sums")
            self._each(rows.BUDGET, self._check_purse, "sums")
            self._each(rows.REMOVAL, lambda name, content: rows.loads(self._key, name, content), "sums")
            self._check_fields(_OF_RUNS)
            return
        self._report.counts["questions"] += 1
        if rows.KNOWN not in self._rows:
            self._report.add("question", f"{self._key}: its row is missing")
        self._each(rows.KNOWN, self._check_question, "question")
        self._each(rows.CHANGED, lambda name, _: rows.load_change(self._key, self._rows[name]), "change")
        self._each(rows.USE, lambda name, content: float(rows.loads(self._key, name, content)), "draw")
        self._each(PENDING, lambda name, content: rows.load_lease(self._key, name, content), "lease")
        self._each(rows.WHY, lambda name, content: rows.load_why(self._key, name, content), "discard")
        self._check_fields(_OF_QUESTIONS)
        pending = {*rows.indices_in(self._rows, PENDING)}
        stored = sample_indices(self._session, self._key)
        listed = self._set(rows.LISTED)
        if listed is not None:
            for index in sorted(pending):
                if index not in listed:
                    self._notes("lease", f"{self._key}/{index}: it is not listed")
            for index in sorted(self._discarded):
                if index not in listed and index not in stored:
                    self._report.add("unknown", f"{self._key}: sample {index} is discarded, and not listed")
            self._check_list(listed, stored, pending)
        self._check_draws(listed or IntervalSet(), {*stored, *pending})

    def _notes(self, kind: str, example: str) -> None:
        """Count a problem that is repaired by writing the notes of the key anew."""
        self._report.add(kind, example)
        self._report.notes.add(self._key)

    def _check_fields(self, known: tuple[bytes, ...]) -> None:
        for name in self._rows:
            if not name.startswith(known) and name not in (
                rows.KNOWN,
                rows.QUESTION,
                rows.LISTED,
                rows.CHANGED,
            ):
                self._report.add("unknown", f"{self._key}: the row {rows.decoded(name)!r:.80}")

    def _each(self, prefix: bytes, read: Any, kind: str) -> None:
        """Check each row whose field has a prefix."""
        for name, row in self._rows.items():
            if name.startswith(prefix) and (name == prefix or prefix.endswith(b"/")):
                try:
                    read(name, rows.unpack(self._key, name, row))
                except DamagedCache as error:
                    (self._notes if kind in _NOTES else self._report.add)(kind, str(error))
                except (ValueError, TypeError, LookupError, AttributeError):
                    self._report.add(
                        kind, f"{self._key}: the row {rows.decoded(name)!r} holds something else"
                    )

    def _set(self, name: bytes) -> IntervalSet | None:
        """Return the set in a row; None if it is damaged."""
        try:
            row = self._rows.get(name)
            content = b"" if row is None else rows.unpack(self._key, name, row)
            found = rows.load_set(self._key, name, content)
        except DamagedCache as error:
            self._report.add("set", str(error))
            return None
        last = -1
        for start, stop in found:
            if not last < start < stop:
                self._report.add("set", f"{self._key}, {rows.decoded(name)!r:.80}: intervals overlap")
                return None
            last = stop
        return found

    def _check_question(self, name: bytes, content: bytes) -> None:
        scope, _ = rows.loads(self._key, name, content)
        document = rows.unpack(self._key, rows.QUESTION, self._rows.get(rows.QUESTION, b""))
        if keys.digest(scope, document) != self._key:
            self._report.add("question", self._key)

    def _check_purse(self, name: bytes, content: bytes) -> None:
        rows.load_sums(load_purse, self._key, name, content)

    def _check_sums(self, name: bytes, content: bytes) -> None:
        rows.load_sums(RunSums.loads, self._key, name, content)

    # Samples.

    def _check_list(self, listed: IntervalSet, stored: list[int], pending: set[int]) -> None:
        """Compare the list with what is stored; the work is bounded by what is stored."""
        for start, stop in gaps(listed, sorted({*stored, *pending})):
            self._report.add("missing", f"{self._key}/{start}", stop - start)
            self._report.absent.append(Absent(self._key, start, stop))
        self._check_samples(index for index in stored if index in listed)
        if unlisted := [index for index in stored if index not in listed]:
            [now] = self._session.asked(lambda: self._session.engine.read([Read(self._key, [rows.LISTED])]))
            later = self._listed(now)
            for index in unlisted:
                if index not in later:  # those that are were stored since the list was read
                    self._report.add("unlisted", f"{self._key}/{index}")
                    self._report.unlisted.append(Stored(self._key, index))

    def _listed(self, found: Rows) -> IntervalSet:
        content = rows.unpack(self._key, rows.LISTED, found[rows.LISTED]) if rows.LISTED in found else b""
        return rows.load_set(self._key, rows.LISTED, content)

    def _check_samples(self, indices: Iterable[int]) -> None:
        left = iter(indices)
        while page := list(itertools.islice(left, _PAGE)):
            read = Read(self._key, [rows.numbered(SAMPLE, index) for index in page])
            found = self._session.asked(lambda read=read: self._session.engine.read([read]))[0]  # type: ignore[misc]
            for index in page:
                if (row := found.get(rows.numbered(SAMPLE, index))) is not None:
                    self._check_sample(index, row)

    def _check_sample(self, index: int, row: bytes) -> None:
        where = f"{self._key}/{index}"
        try:
            _, gone = rows.header_in(self._key, index, row)
        except (DamagedCache, UnsafeRow):
            self._report.add("sample", where)
            self._report.damaged.append(Stored(self._key, index))
            return
        self._report.counts["discarded" if gone else "samples"] += 1
        if gone != (index in self._discarded):
            self._report.add("discard", where)
            self._report.discards.append(Stored(self._key, index))

    # Draws.

    def _check_draws(self, listed: IntervalSet, there: set[int]) -> None:
        """Check the draws, and what their namespaces have taken (C1).

        Args:
            listed: the listed indices.
            there: the indices that are stored or being generated.
        """
        drawn: dict[str, dict[int, Draw]] = {}
        unsure: set[str] = set()
        begun: dict[bytes, list[tuple[int, str]]] = {}
        for name in [name for name in self._rows if name.startswith(rows.DRAW)]:
            draw, row = self._draw(name)
            if draw is None or row is None:
                unsure.add("" if draw is None else draw.namespace)
                continue
            self._report.counts["draws"] += 1
            holders = drawn.setdefault(draw.namespace, {})
            for index in {index for segment in row.segments.values() for index in segment.indices}:
                if holders.setdefault(index, draw) != draw:
                    self._report.add("repeated", f"{self._key}/{index}, {whose(draw.namespace)}")
            laid = {*indices_of(row.segments.values())}
            self._report.unfinished += sum(index not in listed for index in laid - there)
            if not draw.shared:
                stamp = min(segment.stamp for segment in row.segments.values())
                begun.setdefault(rows.first_field(draw), []).append((stamp, draw.namespace))
        if "" not in unsure:
            self._check_taken(drawn, unsure)
        if not unsure:
            self._check_firsts(begun)

    def _draw(self, name: bytes) -> tuple[Draw | None, DrawRow | None]:
        """Return the draw with a field and its row; None for what is damaged."""
        draw = None
        try:
            draw = rows.draw_of(self._key, name)
            content = rows.unpack(self._key, name, self._rows[name])
            row = DrawRow.loads(self._key, name, content)
            fits = row.segments and content == row.dumps()
            standing = all(0 <= each.standing <= len(each.indices) for each in row.segments.values())
        except (DamagedCache, ValueError, TypeError) as error:
            self._report.add("draw", str(error))
            return draw, None
        if not (fits and standing):
            self._report.add("draw", told(draw))
            return draw, None
        return draw, row

    def _check_taken(self, drawn: dict[str, dict[int, Draw]], unsure: set[str]) -> None:
        """Check that what a namespace has taken is what its draws have."""
        labels = {rows.decoded(name[len(rows.TAKEN) :]) for name in self._rows if name.startswith(rows.TAKEN)}
        for label in sorted({*labels, *drawn} - unsure):
            taken, has = self._set(rows.taken_field(label)), drawn.get(label, {})
            if taken is None:
                continue
            for index in sorted(has):
                if index not in taken:
                    self._report.add("unassigned", f"{self._key}/{index}, {told(has[index])}")
            for start, stop in gaps(taken, sorted({*has, *self._discarded})):
                self._report.add("undrawn", f"{span(self._key, start, stop)}, {whose(label)}", stop - start)

    # The earliest namespaces of each draw (C3).

    def _check_firsts(self, begun: dict[bytes, list[tuple[int, str]]]) -> None:
        """Check the notes of the earliest namespaces against the draws.

        Args:
            begun: by the field of the note, the lowest stamp of the draw in each namespace.
        """
        names = {name for name in self._rows if name.startswith(rows.FIRST)}
        for name in sorted(names | begun.keys()):
            try:
                row = self._rows.get(name)
                first = FirstRow()
                if row is not None:
                    first = FirstRow.loads(self._key, name, rows.unpack(self._key, name, row))
            except DamagedCache as error:
                self._notes("first", str(error))
                continue
            if not first.agrees(begun.get(name, [])):
                self._notes("first", f"{self._key}: the note {rows.decoded(name[len(rows.FIRST) :])!r:.80}")
