"""A complete check of a cache (C12): each row against its digest, and against the rows of the other tables.

The check only reads. It sees the ledger as of one moment and the samples as of a later one, so it can run
while other processes use the cache. Its memory grows with the rows of one question, not with the cache.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from cachepipe.accounting import RunSums
from cachepipe.contract import keys
from cachepipe.contract.allotment import DISCARDED, Segment, indices_of
from cachepipe.contract.draws import SHARED, Draw, namespace_of
from cachepipe.contract.intervals import Interval, IntervalSet
from cachepipe.errors import DamagedCache, FormatError, StoreError, UnsafeRow
from cachepipe.stores import identity, tables
from cachepipe.stores.disk import connect_to_read
from cachepipe.stores.folders import check_files
from cachepipe.stores.received import check_format, check_ledger, check_shelf
from cachepipe.stores.tables import LISTED

_EXAMPLES: Final = 10  # of each kind of problem
_STEP: Final = 1000  # rows to a step of the progress
_MESSAGES: Final = 100  # of SQLite's own check of a file

_NAME: Final = re.compile(r"(k[0-9]+-[^/]+)/(0|[1-9][0-9]{0,17})")
_OF_INDEX: Final = re.compile(
    r"row \d+ missing from index|wrong # of entries in index|non-unique entry in index", re.IGNORECASE
)

COPY: Final = "restore the cache from a copy"
REPAIR: Final = "run `cachepipe verify --repair`"

KINDS: Final[dict[str, tuple[str, str]]] = {
    "parts": ("the files do not belong together, or one is missing", COPY),
    "file": ("SQLite reports damage in a file", COPY),
    "index": ("an index of a file does not fit its table", REPAIR),
    "hidden": ("a row that the check found and look-ups do not find", COPY),
    "question": ("a question that does not give its key", COPY),
    "draw": ("a row of a draw is damaged", COPY),
    "set": ("a row that lists or assigns samples is damaged", COPY),
    "unknown": ("a row that belongs to no known question or namespace", COPY),
    "repeated": ("one namespace has two draws with the same sample", COPY),
    "unassigned": ("a draw has a sample that its namespace does not note as taken", COPY),
    "undrawn": ("a namespace notes a sample as taken that no draw of its has", COPY),
    "sample": ("a stored sample is damaged", REPAIR),
    "missing": ("a listed sample is not stored", REPAIR),
    "unlisted": ("a stored sample is not listed", REPAIR),
    "stray": ("the question of a stored sample is missing", COPY),
    "discard": ("a sample is discarded in one of the two files only", REPAIR),
    "lease": ("a sample is noted as being generated, but not in order", REPAIR),
    "first": ("the note of a draw's earliest namespace is wrong", REPAIR),
    "change": ("the note of a question's last change is damaged", REPAIR),
    "bundle": ("the bundle is damaged, or is none", "get another copy of it"),
    "sums": ("a row of the sums of what was delivered is damaged", COPY),
}
"""Per kind of problem, what is wrong and what to do about it."""


def _lacks_its_end(connection: sqlite3.Connection) -> bool:
    """Return True if a file of SQLite is shorter than its header says; SQLite reads the rest as zeros.

    A file with a write-ahead log is not judged, because the log may hold what the file lacks.
    """
    path = next(file for _, name, file in connection.execute("PRAGMA main.database_list") if name == "main")
    if not path:  # it is in memory
        return False
    with contextlib.suppress(FileNotFoundError):
        if Path(f"{path}-wal").stat().st_size:
            return False
    with Path(path).open("rb") as file:
        head = file.read(100)
        size = file.seek(0, io.SEEK_END)
    page = int.from_bytes(head[16:18], "big")
    pages = int.from_bytes(head[28:32], "big")
    # The number of pages is valid if the last writer has noted its own change beside it.
    return head[24:28] == head[92:96] and size < pages * (65536 if page == 1 else page)


class Stored(NamedTuple):
    """Where a sample is, or should be."""

    key: str
    index: int  # type: ignore[assignment]  # a place is no sequence that one searches


class Absent(NamedTuple):
    """Listed samples of a key that are not stored: those from ``start``, below ``stop``."""

    key: str
    start: int
    stop: int


@dataclass(slots=True)
class Problem:
    """What is wrong in one way: how often, and some of the places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class IntegrityReport:
    """What a check has found.

    Attributes:
        counts: how many questions, samples, draws and discarded samples were checked.
        foreign: rows in the file of samples that are not cachepipe's; they are left alone.
        recent: samples that a killed process stored last, or that a running one stores now; the next
            opening of the cache lists them.
        unfinished: positions of draws without a sample, as killed runs leave them; the sample is generated
            when it is asked for.
        problems: by kind (see ``KINDS``).
        notes: the keys on a server with notes that can be written anew from other rows.
    """

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("questions", "samples", "draws", "discarded"), 0)
    )
    foreign: int = 0
    recent: int = 0
    unfinished: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    damaged: list[Stored] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    unlisted: list[Stored] = field(default_factory=list)
    discards: list[Stored] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def join(self, other: IntegrityReport) -> None:
        """Add what another check has found."""
        for name, count in other.counts.items():
            self.counts[name] += count
        self.unfinished += other.unfinished
        for kind, problem in other.problems.items():
            for example in problem.examples:
                self.add(kind, example, 0)
            self.problems[kind].count += problem.count
        for name in ("damaged", "absent", "unlisted", "discards"):
            getattr(self, name).extend(getattr(other, name))
        self.notes |= other.notes

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count a problem."""
        problem = self.problems.setdefault(kind, Problem())
        problem.count += count
        if len(problem.examples) < _EXAMPLES:
            problem.examples.append(example.encode(errors="backslashreplace").decode())


_Row = tuple[Any, ...]
Step = Callable[[], object]
Progress = Callable[[int], contextlib.AbstractContextManager[Step]]
"""Takes the number of steps of a check; returns a context manager whose value is called after each step."""


def unseen(steps: int) -> contextlib.AbstractContextManager[Step]:  # noqa: ARG001 - nobody looks
    """Show no progress."""
    return contextlib.nullcontext(lambda: None)


def verify(folder: Path, progress: Progress = unseen) -> IntegrityReport:
    """Return what is wrong in the cache of a folder; only reads.

    Raises:
        StoreError: when the folder cannot be read, or nothing in it may be read.
    """
    report = IntegrityReport()
    missing = [name for name in (identity.LEDGER, identity.SHELF) if not (folder / name).exists()]
    if missing:
        report.add("parts", f"the folder has no {' and no '.join(missing)}", len(missing))
        return report
    try:
        with _opened(folder) as (ledger, shelf):
            if _may_be_read(ledger, shelf, folder, report):
                check_rows(ledger, shelf, report, progress)
    except (OSError, *tables.UNREADABLE) as error:
        report.add("file", str(error))
    return report


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[sqlite3.Connection, sqlite3.Connection]]:
    """Open both files for reading; text that is not UTF-8 is read too, and fails its digest."""
    with contextlib.ExitStack() as stack:
        pair = []
        for name in (identity.LEDGER, identity.SHELF):
            connection, _ = connect_to_read(folder / name)
            stack.enter_context(contextlib.closing(connection))
            connection.execute("PRAGMA query_only = 1")
            connection.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
            pair.append(connection)
        yield pair[0], pair[1]


def _may_be_read(
    ledger: sqlite3.Connection, shelf: sqlite3.Connection, folder: Path, report: IntegrityReport
) -> bool:
    """Check that the files are what cachepipe makes and belong together; return False if no row may be read.

    Raises:
        FormatError: when another version wrote them.
    """
    try:
        check_files(folder, identity.LEDGER, identity.SHELF)
        has_ledger = "meta" in check_ledger(ledger, str(folder))
        has_shelf = "Cache" in check_shelf(shelf, str(folder))
    except FormatError:
        raise
    except StoreError as error:  # reading might run what they hold
        report.add("file", str(error))
        return False
    empty = [name for name, has in ((identity.LEDGER, has_ledger), (identity.SHELF, has_shelf)) if not has]
    if empty:
        report.add("parts", f"{' and '.join(empty)} has none of its tables", len(empty))
        return False
    check_format(ledger, str(folder))
    try:
        identity.check_parts(ledger, shelf, str(folder))
    except DamagedCache as error:
        report.add("parts", str(error))
    return True


def check_rows(
    ledger: sqlite3.Connection,
    shelf: sqlite3.Connection,
    report: IntegrityReport,
    progress: Progress = unseen,
) -> None:
    """Check all rows of a ledger and its samples; add what is wrong to a report."""
    _Check(ledger, shelf, report, progress).run()


class _Rows:
    """The rows of a table in the order of its first column, taken one number of a question at a time."""

    __slots__ = ("_cursor", "_next", "_stray")

    def __init__(self, cursor: sqlite3.Cursor, stray: Callable[[_Row], None]) -> None:
        self._cursor = cursor
        self._stray = stray
        self._next: _Row | None = next(cursor, None)

    def of(self, key: float) -> Sequence[_Row]:
        """Return the rows of a question; those before them belong to none, or lie out of order."""
        row = self._next
        if row is None:
            return ()
        found = []
        while row is not None:
            number = row[0]
            if number == key:
                found.append(row)
            elif type(number) is int and number > key:
                break
            else:
                self._stray(row)
            row = next(self._cursor, None)
        self._next = row
        return found

    def finish(self) -> None:
        """Report the rows after the last question."""
        self.of(float("inf"))


class _Question(NamedTuple):
    """A question, with what the check reads of it; ``segments`` is the number that look-ups find."""

    key: str
    listed: IntervalSet | None
    taken: dict[int, IntervalSet | None]
    segments: int
    stored: set[int]
    pending: set[int]
    discarded: set[int]


class _Check:
    def __init__(
        self,
        ledger: sqlite3.Connection,
        shelf: sqlite3.Connection,
        report: IntegrityReport,
        progress: Progress,
    ) -> None:
        self._ledger = ledger
        self._shelf = shelf
        self._report = report
        self._progress = progress
        self._labels: dict[int, str] = {LISTED: ""}
        self._rows = 0
        self._step: Step = lambda: None

    def run(self) -> None:
        """Check everything."""
        self._check_files()
        try:
            # Read the ledger first, because a commit writes the sample before the ledger.
            self._ledger.execute("BEGIN")
            size = 0
            with self._reading("the ledger"):
                self._labels |= dict(self._ledger.execute("SELECT id, label FROM namespaces"))
                size += self._one(self._ledger, "SELECT count(*) FROM segments")
            self._shelf.execute("BEGIN")
            with self._reading("the file of samples"):
                size += self._one(self._shelf, "SELECT count(*) FROM Cache")
            with self._progress(size // _STEP + 1) as self._step:
                for check in (self._check_questions, self._check_leases_and_firsts, self._check_sums):
                    with self._reading("the ledger"):
                        check()
                with self._reading("the file of samples"):
                    self._check_samples()
                self._step()
            self._ledger.execute("ROLLBACK")
            with self._reading("the ledger"):
                self._confirm()
        finally:
            for connection in (self._ledger, self._shelf):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Report an error that ends the reading of some rows; the check goes on with the next ones."""
        try:
            yield
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
            self._report.add("file", f"{what} cannot be read to its end: {error}")

    @staticmethod
    def _one(connection: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> Any:
        row = connection.execute(query, values).fetchone()
        return None if row is None else row[0]

    def _passed(self, rows: int) -> None:
        """Count rows that are checked."""
        self._rows += rows
        while self._rows >= _STEP:
            self._rows -= _STEP
            self._step()

    def _check_files(self) -> None:
        """Ask SQLite about the structure of both files."""
        for connection, name in ((self._ledger, identity.LEDGER), (self._shelf, identity.SHELF)):
            with self._reading(name):
                rows = connection.execute(f"PRAGMA main.integrity_check({_MESSAGES})")
                for line in (line for (text,) in rows.fetchall() for line in str(text).splitlines()):
                    if line != "ok":
                        kind = "index" if _OF_INDEX.match(line) else "file"
                        self._report.add(kind, f"{name}: {line}")
                if _lacks_its_end(connection):
                    self._report.add("file", f"{name}: the end of the file is missing")

    # The ledger.

    def _check_questions(self) -> None:
        def table(query: str) -> _Rows:
            what = query.split(" FROM ")[1].split(maxsplit=1)[0]
            return _Rows(
                self._ledger.execute(query),
                lambda row: self._report.add("unknown", f"{what}: question number {row[0]!r}"),
            )

        segments = table(
            "SELECT key, request_id, occurrence, replicate, namespace, number, position, indices, lease,"
            " token, stamp, standing, digest, place FROM segments"
            " ORDER BY key, request_id, occurrence, replicate, namespace, number"
        )
        intervals = table(
            "SELECT key, owner, start, stop, digest,"
            " (SELECT count(*) FROM intervals i WHERE i.owner = t.owner AND i.key = t.key)"
            " FROM intervals AS t ORDER BY key, owner, stop"
        )
        pending = table("SELECT key, sample FROM pending ORDER BY key, sample")
        discards = table("SELECT key, sample FROM discards ORDER BY key, sample")
        questions = self._ledger.execute(_QUESTIONS)
        names = self._ledger.execute("SELECT key FROM keys ORDER BY id")
        while page := names.fetchmany(_TOGETHER):
            self._report.counts["questions"] += len(page)
            wanted = orjson.dumps([key if _encodable(key) else "" for (key,) in page]).decode()
            stored = _Rows(self._shelf.execute(_STORED, (wanted,)), lambda _: None)
            for place, (number, key, *rest, found) in zip(range(len(page)), questions, strict=False):
                self._check_question(number, key, *rest)
                listed, taken = self._sets(str(key), intervals.of(number))
                question = _Question(
                    str(key),
                    listed,
                    taken,
                    found,
                    {int(name[2]) for row in stored.of(place) if (name := _NAME.fullmatch(row[1]))},
                    {index for _, index in pending.of(number)},
                    {index for _, index in discards.of(number)},
                )
                self._report.counts["discarded"] += len(question.discarded)
                self._check_list(question)
                self._check_draws(question, segments.of(number))
        for rows in (segments, intervals, pending, discards):
            rows.finish()

    def _check_question(self, number: int, key: Any, scope: Any, document: Any, at: Any, found: Any) -> None:
        """Check that a document gives its key, and that look-ups find the question."""
        fits = type(document) is bytes and type(at) is float and _encodable(key)
        if fits and found != number:
            self._report.add("hidden", f"question {key}")
        if not fits or not (scope is None or _encodable(scope)) or keys.digest(scope, document) != key:
            self._report.add("question", str(key))

    def _sets(
        self, key: str, rows: Iterable[_Row]
    ) -> tuple[IntervalSet | None, dict[int, IntervalSet | None]]:
        """Return the list of a question, and what its namespaces have taken; None for damaged ones."""
        owned: dict[int, list[_Row]] = {}
        for row in rows:
            owned.setdefault(row[1], []).append(row)
        sets = {owner: self._set(key, owner, each) for owner, each in owned.items()}
        return sets.pop(LISTED, _NOTHING), sets

    def _set(self, key: str, owner: int, rows: list[_Row]) -> IntervalSet | None:
        """Return a set of indices; None for one that is damaged."""
        name = self._labels.get(owner)
        if name is None:
            self._report.add("unknown", f"intervals: namespace number {owner!r} of question {key}", len(rows))
            return None
        last = -1
        found = []
        for _, _, start, stop, digest, _ in rows:
            if tables.interval_digest(name, key, start, stop) != digest:
                self._report.add("set", f"question {key}, {whose(name)}")
                return None
            if not last < start < stop:
                self._report.add("set", f"question {key}, {whose(name)}: intervals overlap")
                return None
            last = stop
            found.append((start, stop))
        if rows[0][5] != len(rows):
            self._report.add("hidden", f"a set of question {key}, {whose(name)}")
        return IntervalSet(found)

    def _check_list(self, question: _Question) -> None:
        """Check that what is listed is stored or pending, and the other way round."""
        key, listed = question.key, question.listed
        for index in question.discarded:
            self._check_discarded(question, index)
        if listed is None:
            return
        there = sorted(question.stored | question.pending)
        for start, stop in gaps(listed, there):
            self._report.absent.append(Absent(key, start, stop))
            self._report.add("missing", span(key, start, stop), stop - start)
        for index in there:
            if index not in listed:
                if index in question.stored:
                    self._report.unlisted.append(Stored(key, index))
                if index in question.pending:
                    self._report.add("lease", f"{key}/{index}: it is not listed")

    def _check_discarded(self, question: _Question, index: int) -> None:
        """Check that a sample that is discarded on record is marked so."""
        if index in question.stored:
            row = self._shelf.execute(tables.GET, (f"{question.key}/{index}",)).fetchone()
            with contextlib.suppress(DamagedCache, UnsafeRow):  # damaged ones are reported as such
                if tables.parse_sample(question.key, index, *row) is not DISCARDED:
                    self._report.discards.append(Stored(question.key, index))
        elif question.listed is not None and index not in question.listed:
            self._report.add("unknown", f"discards: sample {index} of question {question.key}")

    def _check_draws(self, question: _Question, rows: Sequence[_Row]) -> None:
        """Check the draws of a question, and what its namespaces have taken (C1)."""
        drawn: dict[int, dict[int, Draw]] = {}
        unsure: set[int] = set()
        key, listed, all_taken, _, stored, pending, _ = question
        draws: dict[_Row, list[_Row]] = {}
        for row in rows:
            draws.setdefault(row[1:5], []).append(row[4:])
        self._passed(len(rows))
        self._report.counts["draws"] += len(draws)
        for place, written in draws.items():
            namespace = place[3]
            draw = self._draw(key, *place)
            segments = None if draw is None else self._segments(draw, written)
            if draw is None or segments is None:
                unsure.add(namespace)
                continue
            taken = all_taken.get(namespace, _NOTHING)
            holders = drawn.setdefault(namespace, {})
            whole = len(segments) == 1 and not segments[0].position
            indices = segments[0].indices if whole else indices_of(segments)
            for index in indices if whole else {index for segment in segments for index in segment.indices}:
                if holders.setdefault(index, draw) is not draw:
                    self._report.add("repeated", f"{key}/{index}, {whose(draw.namespace)}")
                if taken is not None and index not in taken:
                    self._report.add("unassigned", f"{key}/{index}, {told(draw)}")
            for index in indices:
                if index not in stored and index not in pending and index not in (listed or _NOTHING):
                    self._report.unfinished += 1
        if question.segments != len(rows):
            self._report.add("hidden", f"draws of question {key}", abs(question.segments - len(rows)))
        self._check_taken(question, drawn, unsure)

    def _check_taken(self, question: _Question, drawn: dict[int, dict[int, Draw]], unsure: set[int]) -> None:
        """Check that some draw of a namespace has each sample that the namespace has taken."""
        for namespace, taken in question.taken.items():
            if taken is not None and namespace not in unsure:
                known = sorted(question.discarded.union(drawn.get(namespace, ())))
                for start, stop in gaps(taken, known):
                    label = self._labels[namespace]
                    example = f"{span(question.key, start, stop)}, {whose(label)}"
                    self._report.add("undrawn", example, stop - start)

    def _draw(
        self, key: str, request_id: str, occurrence: int, replicate: str, namespace: int
    ) -> Draw | None:
        """Return the draw of some rows; None if the ledger does not know its namespace."""
        name = self._labels.get(namespace)
        if name is None:
            self._report.add("unknown", f"segments: namespace number {namespace!r} of question {key}")
            return None
        return Draw(name, key, request_id, occurrence, replicate)

    def _segments(self, draw: Draw, rows: Sequence[_Row]) -> list[Segment] | None:
        """Return the segments of a draw; None if its rows are not what was written."""
        try:
            segments = tables.segments_of(draw, rows)
            for segment in segments:
                if not 0 <= segment.standing <= len(segment.indices):
                    raise ValueError(segment.standing)  # noqa: TRY301 - as those of rows
        except (DamagedCache, TypeError, ValueError):
            self._report.add("draw", told(draw))
            return None
        return segments

    def _check_leases_and_firsts(self) -> None:
        key = "(SELECT k.key FROM keys k WHERE k.id = t.key)"
        for name, request_id in self._ledger.execute(f"SELECT {key}, request_id FROM {ODD_SEGMENTS}"):
            self._report.add("draw", f"question {name}, request {request_id!r}")
        for name, index in self._ledger.execute(f"SELECT {key}, sample FROM {LOST_LEASES}"):
            self._report.add("lease", f"{name}/{index}: the process that generates it is not known")
        query = f"SELECT {key}, request_id FROM {WRONG_FIRSTS}"
        for name, request_id in self._ledger.execute(query, (SHARED,)):
            self._report.add("first", f"question {name}, request {request_id!r}")

    def _check_sums(self) -> None:
        loaded: tuple[tuple[str, str, Callable[[bytes], Any]], ...] = (
            ("sums", "stamp, run, namespace", RunSums.loads),
            ("budgets", f"0, '{tables.BUDGET}', namespace", tables.load_purse),
            ("removals", f"stamp, id, '{tables.REMOVAL}'", orjson.loads),
        )
        for table, about, loads in loaded:
            rows = self._ledger.execute(f"SELECT {about}, document, digest FROM {table}")
            for stamp, *row in rows:
                self._passed(1)
                try:
                    tables.read_sums(loads, *row)
                    fits = type(stamp) is int and _encodable(row[0]) and _encodable(row[1])
                except DamagedCache:
                    fits = False
                if not fits:
                    self._report.add("sums", f"{table}: run {row[0]}, {whose(str(row[1]))}")

    # The samples.

    def _check_samples(self) -> None:
        """Check each row of the file of samples, in the order of the table itself."""
        some: list[Stored] = []
        for rowid, written, raw, found, *row in self._shelf.execute(_ALL_STORED):
            self._passed(1)
            match = _NAME.fullmatch(written) if raw == 1 and _encodable(written) else None
            if match is None:
                self._report.foreign += 1
                continue
            sample = Stored(match[1], int(match[2]))
            if found != rowid:
                self._report.add("hidden", f"sample {written}")
            some.append(sample)
            if len(some) == _TOGETHER:
                self._check_keys(some)
                some.clear()
            try:
                _, gone = tables.header_of(*sample, *row)
            except (DamagedCache, UnsafeRow):
                self._report.damaged.append(sample)
                self._report.add("sample", written)
                continue
            if not gone:
                self._report.counts["samples"] += 1
            elif not self._on_record(sample):
                self._report.discards.append(sample)
        self._check_keys(some)

    def _check_keys(self, samples: list[Stored]) -> None:
        """Note the samples of questions that the ledger does not know."""
        names = orjson.dumps([sample.key for sample in samples]).decode()
        unknown = {key for (key,) in self._ledger.execute(_UNKNOWN, (names,))}
        self._report.unlisted += [sample for sample in samples if sample.key in unknown]

    def _on_record(self, sample: Stored) -> bool:
        query = "SELECT 1 FROM discards WHERE key = (SELECT id FROM keys WHERE key = ?) AND sample = ?"
        return self._one(self._ledger, query, sample) is not None

    # What another process may have changed between the two moments.

    def _confirm(self) -> None:
        """Look again at samples and discards that the ledger did not have yet when it was read."""
        report = self._report
        unlisted = [sample for sample in report.unlisted if not self._is_listed(sample)]
        recent = self._recent()
        report.unlisted = [sample for sample in unlisted if sample not in recent]
        report.recent = len(unlisted) - len(report.unlisted)
        for sample in report.unlisted:
            known = self._one(self._ledger, "SELECT 1 FROM keys WHERE key = ?", (sample.key,)) is not None
            report.add("unlisted" if known else "stray", f"{sample.key}/{sample.index}")
        discards = dict.fromkeys(report.discards)
        report.discards = [
            sample
            for sample in discards
            if (sample not in recent or self._is_listed(sample))
            and self._on_record(sample)
            != tables.is_discarded(
                *sample, self._shelf.execute(tables.GET, (f"{sample.key}/{sample.index}",)).fetchone()
            )
        ]
        for sample in report.discards:
            report.add("discard", f"{sample.key}/{sample.index}")

    def _is_listed(self, sample: Stored) -> bool:
        query = (
            "SELECT start <= ?2 FROM intervals WHERE owner = 0 AND key = (SELECT id FROM keys WHERE key = ?1)"
            " AND stop > ?2 ORDER BY stop LIMIT 1"
        )
        return bool(self._one(self._ledger, query, sample))

    def _recent(self) -> set[Stored]:
        """Return the samples since the last checkpoint, if a process runs or has not closed the cache."""
        if self._one(self._ledger, "SELECT 1 FROM leases WHERE ended IS NULL") is None:
            return set()
        last = self._one(self._ledger, "SELECT value FROM meta WHERE name = 'sample'")
        names = self._shelf.execute(
            "SELECT key FROM Cache WHERE raw = 1 AND rowid >"
            " ifnull((SELECT rowid FROM Cache WHERE key = ? AND raw = 1), 0)",
            (last,),
        )
        found = (_NAME.fullmatch(str(name)) for (name,) in names)
        return {Stored(name[1], int(name[2])) for name in found if name is not None}


_TOGETHER: Final = 256  # questions or samples whose rows in the other file one statement looks up
_NOTHING: Final = IntervalSet()

# With what look-ups find of a row beside the row itself.

_QUESTIONS: Final = (
    "SELECT id, key, scope, document, at, (SELECT i.id FROM keys i WHERE i.key = k.key),"
    " (SELECT count(*) FROM segments s WHERE s.key = k.id) FROM keys k ORDER BY id"
)
_ALL_STORED: Final = (
    "SELECT rowid, key, raw, (SELECT i.rowid FROM Cache i WHERE i.key = c.key AND i.raw = 1),"
    " mode, filename, value FROM Cache AS c NOT INDEXED ORDER BY rowid"
)
_STORED: Final = (
    "SELECT j.key, c.key FROM json_each(?) j CROSS JOIN Cache c INDEXED BY Cache_key_raw"
    " ON c.raw = 1 AND c.key > j.value || '/' AND c.key < j.value || '0' ORDER BY j.key"
)
"""The names of the samples of some questions, as look-ups find them, with the place of the question."""
_UNKNOWN: Final = (
    "SELECT value FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM keys WHERE keys.key = value)"
)

ODD_SEGMENTS: Final = (
    "segments AS t WHERE typeof(lease) != 'integer' OR typeof(generated) != 'integer'"
    " OR typeof(token) NOT IN ('null', 'text')"
)
"""Rows of draws with values of the wrong type beside those that the digest covers."""

LOST_LEASES: Final = "pending AS t WHERE lease NOT IN (SELECT id FROM leases WHERE ended IS NULL)"
"""Samples that are noted as being generated by a process that has ended, or was never there."""

WRONG_FIRSTS: Final = (
    "firsts AS t WHERE t.namespace IS NOT"
    " (SELECT s.namespace FROM segments s WHERE s.key = t.key AND s.request_id = t.request_id"
    " AND s.occurrence = t.occurrence AND s.replicate = t.replicate"
    " AND s.namespace IS NOT (SELECT id FROM namespaces WHERE label = ?)"
    " ORDER BY s.stamp, s.namespace LIMIT 1)"
)
"""Notes of the earliest namespace of a draw that the rows of the draw do not confirm."""


def gaps(intervals: Iterable[Interval], present: Sequence[int]) -> list[Interval]:
    """Return what is left of intervals without some indices, which are sorted."""
    found = []
    place, end = 0, len(present)
    for start, stop in intervals:
        at = start
        while place < end and (index := present[place]) < stop:
            if index > at:
                found.append((at, index))
            if index >= at:
                at = index + 1
            place += 1
        if at < stop:
            found.append((at, stop))
    return found


def _encodable(text: Any) -> bool:
    """Return True if a value is a text that can be looked up; text that is not UTF-8 in the file is not."""
    if type(text) is not str:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def span(key: str, start: int, stop: int) -> str:
    """Return the samples of a key from an index on, below another one, for people."""
    return f"{key}/{start}" if stop == start + 1 else f"{key}/{start} to {stop - 1}"


def whose(written: str) -> str:
    """Return whose a set of indices with a label is, for people."""
    if written == SHARED:
        return "for everybody"
    if not written:
        return "its list"
    name = namespace_of(written)
    return "no namespace" if name is None else f"namespace {name!r}"


def told(draw: Draw) -> str:
    """Return a draw for people."""
    request = f", request {draw.request_id!r}" if draw.request_id else ""
    again = f", time {draw.occurrence + 1}" if draw.occurrence else ""
    return f"question {draw.key}, {whose(draw.namespace)}{request}{again}"
