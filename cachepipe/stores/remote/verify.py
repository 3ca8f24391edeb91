"""A complete check of a shared store (C12): each row against its digest, and against the rows of its key.

The check only reads, and sees the rows of a key as of one moment and its samples as of a later one. So it can
run while others use the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Final

from cachepipe.accounting import Account, Delivered
from cachepipe.contract import keys
from cachepipe.contract.allotment import indices_of
from cachepipe.contract.draws import SHARED
from cachepipe.contract.intervals import IntervalSet
from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import PENDING, SAMPLE, Read, Rows
from cachepipe.stores.remote.listing import sample_indices
from cachepipe.stores.remote.rows import DrawRow, FirstRow
from cachepipe.stores.remote.session import RUN, Session
from cachepipe.stores.tables import load_purse
from cachepipe.stores.verify import Absent, IntegrityReport, Step, Stored, gaps

_PAGE: Final = 100  # samples that are read in one round trip


def check(session: Session, step: Step = lambda: None) -> IntegrityReport:
    """Return what is wrong in a shared store.

    Args:
        session: this process's use of the store.
        step: called after each key.
    """
    report = IntegrityReport()
    seen: set[str] = set()
    for key, found in session.engine.scan(""):
        if key not in seen:
            seen.add(key)
            _Key(session, key, found, report).check()
            step()
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
            self._each(rows.UNREPORTED, self._check_unreported, "sums")
            self._each(rows.BUDGET, self._check_purse, "sums")
            self._each(rows.REMOVAL, lambda name, content: rows.loads(self._key, name, content), "sums")
            return
        self._report.counts["questions"] += 1
        self._each(rows.KNOWN, self._check_question, "question")
        pending = {*rows.indices_in(self._rows, PENDING)}
        self._each(PENDING, lambda name, content: rows.load_lease(self._key, name, content), "lease")
        self._each(rows.FIRST, lambda name, content: FirstRow.loads(self._key, name, content), "first")
        self._each(rows.WHY, lambda name, content: rows.loads(self._key, name, content), "discard")
        listed = self._set(rows.LISTED)
        if listed is not None:
            if stray := sorted(index for index in pending if index not in listed):
                self._report.add("lease", f"{self._key}: sample {stray[0]} is not listed", len(stray))
            self._check_list(listed, pending)
        self._check_draws()

    def _each(self, prefix: bytes, read: Any, kind: str) -> None:
        """Check each row whose field has a prefix."""
        for name, row in self._rows.items():
            if name.startswith(prefix) and (name == prefix or prefix.endswith(b"/")):
                try:
                    read(name, rows.unpack(self._key, name, row))
                except DamagedCache as error:
                    self._report.add(kind, str(error))

    def _set(self, name: bytes) -> IntervalSet | None:
        """Return the set in a row; None if it is damaged."""
        try:
            row = self._rows.get(name)
            content = b"" if row is None else rows.unpack(self._key, name, row)
            return rows.load_set(self._key, name, content)
        except DamagedCache as error:
            self._report.add("set", str(error))
            return None

    def _check_question(self, name: bytes, content: bytes) -> None:
        scope, _ = rows.loads(self._key, name, content)
        document = rows.unpack(self._key, rows.QUESTION, self._rows.get(rows.QUESTION, b""))
        if keys.digest(scope, document) != self._key:
            self._report.add("question", self._key)

    def _check_purse(self, name: bytes, content: bytes) -> None:
        rows.load_sums(load_purse, self._key, name, content)

    def _check_sums(self, name: bytes, content: bytes) -> None:
        rows.load_sums(Delivered.loads, self._key, name, content)

    def _check_unreported(self, name: bytes, content: bytes) -> None:
        _, document = rows.loads(self._key, name, content)
        rows.load_sums(Account.loads, self._key, name, document.encode())

    # Samples.

    def _check_list(self, listed: IntervalSet, pending: set[int]) -> None:
        """Compare the list with what is stored; the work is bounded by what is stored."""
        stored = sample_indices(self._session, self._key)
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

    def _check_draws(self) -> None:
        drawn: dict[str, set[int]] = {}
        for name, row in self._rows.items():
            if not name.startswith(rows.DRAW):
                continue
            try:
                draw = rows.draw_of(self._key, name)
                found = DrawRow.loads(self._key, name, rows.unpack(self._key, name, row))
            except DamagedCache as error:
                self._report.add("draw", str(error))
                continue
            self._report.counts["draws"] += 1
            indices = {*indices_of(found.segments.values())}
            known = drawn.setdefault(draw.namespace, set())
            if twice := known & indices:
                self._report.add("repeated", f"{self._key}/{min(twice)} in {draw.namespace!r}", len(twice))
            known |= indices
        for namespace, indices in drawn.items():
            taken = self._set(rows.taken_field(namespace))
            if taken is not None and (lost := sorted(index for index in indices if index not in taken)):
                shown = "shared draws" if namespace == SHARED else repr(namespace)
                self._report.add("unassigned", f"{self._key}/{lost[0]} in {shown}", len(lost))
