"""How the ledger and the samples are written: tables, statements, the form of rows, and their digests.

Each row is bound to its place by a digest (C12): a sample to its key and index, a segment to its draw, an
interval of a set to its owner and key. A row that was damaged, or moved to another place, is refused when it
is read.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import orjson
from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from cachepipe.contract.allotment import DISCARDED, Discarded, Segment
from cachepipe.contract.budgets import Purse
from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.schedule import Place, parse_place
from cachepipe.errors import DamagedCache, UnsafeRow
from cachepipe.stores.base import Sample

_Sums = TypeVar("_Sums")

FORMAT = 4
"""The version of the tables below; a ledger with a higher one is refused."""

BUDGET = "budget"
"""Stands for the run in what binds the row of a budget to its namespace."""

REMOVAL = "removal"
"""Stands for the namespace in what binds the record of a removal to its id."""

LISTED = 0
"""The owner of the set of listed indices; namespaces have positive numbers."""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES('format', {FORMAT});
CREATE TABLE IF NOT EXISTS namespaces(id INTEGER PRIMARY KEY, label TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS keys(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, scope TEXT, document BLOB NOT NULL, at REAL NOT NULL);
-- A draw's indices by position, in segments; a later segment (``number``) overrides an earlier one. Those
-- that one claim added have equal lease, token and stamp, and stand or are undone together.
-- ``standing``: how many of its indices were delivered while the rest was missing, and so are never undone.
-- ``place``: the place in the schedule that the draw noted, if it was handed over late (C11).
CREATE TABLE IF NOT EXISTS segments(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, replicate TEXT NOT NULL,
    namespace INTEGER NOT NULL, number INTEGER NOT NULL, position INTEGER NOT NULL, indices NOT NULL,
    lease INTEGER NOT NULL, token TEXT, generated INTEGER NOT NULL, stamp INTEGER NOT NULL,
    standing INTEGER NOT NULL, digest BLOB NOT NULL, place TEXT,
    PRIMARY KEY(key, request_id, occurrence, replicate, namespace, number)) WITHOUT ROWID;
-- The earliest namespace of a draw that many namespaces have made: later ones are coupled to it.
CREATE TABLE IF NOT EXISTS firsts(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, replicate TEXT NOT NULL,
    namespace INTEGER NOT NULL, PRIMARY KEY(key, request_id, occurrence, replicate)) WITHOUT ROWID;
-- Sets of indices as maximal intervals: owner 0 has the listed indices, a namespace those that it has taken.
CREATE TABLE IF NOT EXISTS intervals(
    owner INTEGER NOT NULL, key INTEGER NOT NULL, stop INTEGER NOT NULL, start INTEGER NOT NULL,
    digest BLOB NOT NULL, PRIMARY KEY(owner, key, stop)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending(
    key INTEGER NOT NULL, sample INTEGER NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, sample)) WITHOUT ROWID;
-- The claimants that joined an incomplete segment which another claimant wrote.
CREATE TABLE IF NOT EXISTS holders(
    key INTEGER NOT NULL, request_id TEXT NOT NULL, occurrence INTEGER NOT NULL, replicate TEXT NOT NULL,
    namespace INTEGER NOT NULL, number INTEGER NOT NULL, token TEXT NOT NULL, lease INTEGER NOT NULL,
    PRIMARY KEY(key, request_id, occurrence, replicate, namespace, number, token)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, at REAL NOT NULL, ended REAL);
CREATE INDEX IF NOT EXISTS leases_open ON leases(id, name) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS uses(
    key INTEGER NOT NULL, namespace INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY(key, namespace)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS discards(
    key INTEGER NOT NULL, sample INTEGER NOT NULL, at REAL NOT NULL, why TEXT NOT NULL,
    PRIMARY KEY(key, sample)) WITHOUT ROWID;
-- Per run and label of a namespace, what the run has noted (C6): the sums of what was delivered, and of what
-- was generated, not stored and not delivered; as JSON.
CREATE TABLE IF NOT EXISTS sums(
    run TEXT NOT NULL, namespace TEXT NOT NULL, stamp INTEGER NOT NULL, document BLOB NOT NULL,
    digest BLOB NOT NULL, PRIMARY KEY(run, namespace)) WITHOUT ROWID;
-- Per label of a namespace, what was spent and reserved of its budget, as JSON.
CREATE TABLE IF NOT EXISTS budgets(
    namespace TEXT PRIMARY KEY, document BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
-- What commands have removed, as JSON.
CREATE TABLE IF NOT EXISTS removals(
    id TEXT PRIMARY KEY, stamp INTEGER NOT NULL, document BLOB NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
"""

SHELF_SCHEMA = "CREATE TABLE cachepipe(name TEXT PRIMARY KEY, value) WITHOUT ROWID"
"""The table of the samples file with the cache's identity and the ledger's last checkpoint."""

# Statements on the ledger. A draw's place is (key, request_id, occurrence, replicate), then its namespace.

PLACE = " WHERE key = ? AND request_id = ? AND occurrence = ? AND replicate = ?"
SEGMENT = f"{PLACE} AND namespace = ? AND number = ?"
_SEGMENT_COLUMNS = "namespace, number, position, indices, lease, token, stamp, standing, digest, place"
DRAW = (
    f"SELECT {_SEGMENT_COLUMNS} FROM segments"
    " WHERE key = ?1 AND request_id = ?2 AND occurrence = ?3 AND replicate = ?4"
)
OTHERS = (
    f"{DRAW} AND namespace != ? AND namespace IS NOT (SELECT id FROM namespaces WHERE label = '{SHARED}')"
)
EARLIEST = (
    "SELECT s.namespace, n.label FROM segments s JOIN namespaces n ON n.id = s.namespace"
    " WHERE s.key = ? AND s.request_id = ? AND s.occurrence = ? AND s.replicate = ?"
    f" AND s.namespace != ? AND n.label != '{SHARED}' ORDER BY s.stamp, s.namespace LIMIT 1"
)
OWN = f"{DRAW} AND namespace = ? ORDER BY number"
OWN_AND_FIRST = (
    f"{DRAW} AND namespace IN (?5, (SELECT namespace FROM firsts WHERE key = ?1 AND request_id = ?2"
    " AND occurrence = ?3 AND replicate = ?4))"
)
FEW = 8
"""The number of rows of one draw, over all namespaces, up to which all are read."""
ROWS = 32
"""The number of draws that one statement looks up."""
DRAWS = (
    "WITH w(k, r, o, c) AS (VALUES " + ", ".join(["(?, ?, ?, ?)"] * ROWS) + ")"
    " SELECT w.k, w.r, w.o, w.c, "
    + ", ".join(f"s.{name}" for name in _SEGMENT_COLUMNS.split(", "))
    + " FROM w"
    " CROSS JOIN segments s ON s.key = w.k AND s.request_id = w.r AND s.occurrence = w.o"
    " AND s.replicate = w.c AND s.namespace <= ifnull("
    "(SELECT t.namespace FROM segments t WHERE t.key = w.k AND t.request_id = w.r"
    f" AND t.occurrence = w.o AND t.replicate = w.c LIMIT 1 OFFSET {FEW}), 9223372036854775807)"
)
SMALL = 64
"""The number of intervals up to which a set is held in memory."""
SETS = (
    "SELECT s.key, s.start, s.stop, s.digest FROM json_each(?2) j"
    " CROSS JOIN intervals s ON s.owner = ?1 AND s.key = j.value AND s.stop <= ifnull("
    "(SELECT t.stop FROM intervals t WHERE t.owner = ?1 AND t.key = j.value"
    f" ORDER BY t.stop LIMIT 1 OFFSET {SMALL}), 9223372036854775807) ORDER BY s.key, s.stop"
)
ONE_SET = (
    f"SELECT start, stop, digest FROM intervals WHERE key = ?1 AND owner = ?2 ORDER BY stop LIMIT {SMALL + 1}"
)
_SET_LIKE_DRAW = (
    "SELECT owner, NULL, start, stop, NULL, NULL, NULL, NULL, digest, NULL FROM intervals"
    f" WHERE key = ?1 AND owner = {{}} ORDER BY stop LIMIT {SMALL + 1}"
)
DRAW_AND_SETS = (
    f"SELECT * FROM ({DRAW} LIMIT {FEW + 1})"
    f" UNION ALL SELECT * FROM ({_SET_LIKE_DRAW.format('?5')})"
    f" UNION ALL SELECT * FROM ({_SET_LIKE_DRAW.format(LISTED)})"
)
"""The segments of a draw, and the sets that its claim needs; the rows of sets have no number."""
INTERVAL_AT = (
    "SELECT start, stop, digest FROM intervals WHERE owner = ? AND key = ? AND stop > ? ORDER BY stop LIMIT 1"
)
INTERVALS_NEAR = (
    "SELECT start, stop, digest FROM intervals"
    " WHERE owner = ? AND key = ? AND stop >= ? ORDER BY stop LIMIT 2"
)
DROP_INTERVAL = "DELETE FROM intervals WHERE owner = ? AND key = ? AND stop = ?"
UNPEND = "DELETE FROM pending WHERE key = ? AND sample = ? AND lease = ?"
PUT_INTERVAL = "INSERT INTO intervals VALUES(?, ?, ?, ?, ?)"
PUT_SEGMENT = "INSERT INTO segments VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

ADD_SUMS = (
    "INSERT INTO sums VALUES(?, ?, ?, ?, ?) ON CONFLICT(run, namespace) DO UPDATE SET stamp = excluded.stamp,"
    " document = excluded.document, digest = excluded.digest"
)

# A statement on both, on a reader's connection to the samples, which has the ledger attached. SQLite begins
# to read the samples first: so a draw that the ledger holds, with a sample that is there, was complete then.

_RECALLED = (
    "s.number, s.position, s.indices, s.lease, s.stamp, s.digest, s.place, c.mode, c.filename, c.value FROM"
)
_SAMPLE_OF_SEGMENT = " LEFT JOIN main.Cache c ON c.key = ?1 || s.indices AND c.raw = 1"
RECALL = (
    f"SELECT {_RECALLED} ledger.segments s{_SAMPLE_OF_SEGMENT}"
    " WHERE s.key = ?2 AND s.request_id = ?3 AND s.occurrence = ?4 AND s.replicate = ?5 AND s.namespace = ?6"
    " ORDER BY s.number"
)
RECALL_BY_NAME = (
    f"SELECT k.id, n.id, {_RECALLED} ledger.keys k CROSS JOIN ledger.namespaces n"
    " LEFT JOIN ledger.segments s ON s.key = k.id AND s.request_id = ?3 AND s.occurrence = ?4"
    f" AND s.replicate = ?5 AND s.namespace = n.id{_SAMPLE_OF_SEGMENT}"
    " WHERE k.key = ?2 AND n.label = ?6 ORDER BY s.number"
)
"""Like ``RECALL``, for a key and a namespace whose numbers are not known yet; it returns these too."""
ALL_SAMPLES = (
    "SELECT k.id, k.key, k.scope, c.key, c.mode, c.filename, c.value FROM ledger.keys k"
    " CROSS JOIN main.Cache c INDEXED BY Cache_key_raw ON c.raw = 1"
    " AND c.key > k.key || '/' AND c.key < k.key || '0' ORDER BY k.id"
)
OWN_DIGESTS = f"SELECT digest FROM segments{PLACE} AND namespace = ? ORDER BY number"

# Statements on the samples. Rows are those of diskcache's own ``set``: raw bytes, a text key, no expiry.

RAW = 1
PUT = (
    "INSERT INTO Cache(key, raw, store_time, expire_time, access_time, access_count, tag, size, mode,"
    f" filename, value) VALUES(?, 1, ?, NULL, ?, 0, NULL, 0, {RAW}, NULL, ?)"
    " ON CONFLICT(key, raw) DO NOTHING"
)
GET = "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1"
GET_DAMAGED = (
    f"SELECT CASE WHEN mode = {RAW} AND filename IS NULL AND typeof(value) = 'blob' THEN {RAW} END, NULL,"
    " CAST(value AS BLOB) FROM Cache WHERE key = ? AND raw = 1"
)
"""Like ``GET``, for rows that may hold anything; those that no sample has come without a mode."""
EARLIER = (
    "SELECT key FROM Cache WHERE raw = 1 AND key GLOB 'k[0-9]*-*/*'"
    " AND rowid < (SELECT rowid FROM Cache WHERE key = ? AND raw = 1) ORDER BY rowid DESC"
)
"""The names of samples that were stored before one, the latest first."""
SAMPLES = (
    "SELECT j.value, c.mode, c.filename, c.value FROM json_each(?) j"
    " CROSS JOIN Cache c ON c.key = j.value AND c.raw = 1"
)
PUT_ANYWAY = PUT.replace(
    "DO NOTHING", f"DO UPDATE SET mode = {RAW}, filename = NULL, value = excluded.value, expire_time = NULL"
)

_INSERTED = 100  # rows that one statement inserts
_VALUES = re.compile(r"VALUES(\([^()]*\))")

_LIVE = b"+"
GONE = b"-"
"""The first byte of a sample's row that is discarded or deleted."""
_BODY = 17  # bytes of a sample's row before its header: its state, and the digest
_HEADER = b'{"id":"'


UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What reading a damaged file raises. SQLite's message may quote bytes of the file that are not UTF-8."""


def insert(connection: sqlite3.Connection, query: str, rows: Sequence[Sequence[Any]]) -> int:
    """Insert rows; return how many were new.

    A statement inserts many rows: other threads of Python run meanwhile, and are not waited for after each.
    """
    new = 0
    end = len(rows) - len(rows) % _INSERTED
    for at in range(0, end, _INSERTED):
        values = [value for row in rows[at : at + _INSERTED] for value in row]
        new += connection.execute(_of_many(query), values).rowcount
    return new + connection.executemany(query, rows[end:]).rowcount if end < len(rows) else new


@functools.cache
def _of_many(query: str) -> str:
    """Return the statement that inserts many rows, from the one that inserts one."""
    before, values, after = _VALUES.split(query, 1)
    return f"{before}VALUES{', '.join([values] * _INSERTED)}{after}"


def locked(error: sqlite3.OperationalError) -> bool:
    """Return True if SQLite refused because another connection writes."""
    code = getattr(error, "sqlite_errorcode", 0)  # text that is not UTF-8 is an error without a code
    return (code & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


# Indices.


def pack(indices: Sequence[int]) -> int | str:
    """Return how the ledger writes indices: one as a number, several as text."""
    return indices[0] if len(indices) == 1 else ",".join(map(str, indices))


def unpack(written: int | str) -> list[int]:
    """Return the indices that the ledger wrote.

    Raises:
        DamagedCache: when it holds something else there.
    """
    if type(written) is int:
        return [written]
    try:
        return [int(part) for part in str(written).split(",")] if written else []
    except ValueError as error:
        raise damaged_row(f"the indices {written!r:.80}") from error


def damaged_row(what: str) -> DamagedCache:
    """Return the error for a row of the ledger that holds something that cachepipe never writes."""
    return DamagedCache(
        f"the ledger is damaged: it holds {what}. Run `cachepipe verify` to see what else is damaged, and "
        "restore the cache from a copy"
    )


def _unlike_its_digest(what: str) -> DamagedCache:
    return DamagedCache(
        f"the ledger's row of {what} is damaged. Run `cachepipe verify` to find further damage, and restore "
        "the cache from a copy"
    )


# Segments of draws.


class SegmentRow(NamedTuple):
    """A segment of a draw as the ledger holds it.

    Attributes:
        namespace: the number of the namespace.
        indices: its packed indices (see ``unpack``).
        digest: binds it to its draw.
    """

    namespace: int
    number: int
    position: int
    indices: int | str
    lease: int
    token: str | None
    stamp: int
    standing: int
    digest: bytes
    place: str | None


def segment_digest(
    draw: Draw, number: int, position: int, indices: int | str, stamp: int, place: str | None
) -> bytes:
    """Return the digest that binds a segment to its draw."""
    namespace, key, request_id, occurrence, replicate = draw
    text = (
        f"{key}\0{namespace}\0{replicate}\0{request_id}\0{occurrence} {number} {position} {stamp} {indices}"
    )
    if place is not None:
        text = f"{text} {place}"
    return xxh3_64_digest(text.encode("utf-8", "surrogatepass"))


def segments_of(draw: Draw, rows: Iterable[SegmentRow | tuple[Any, ...]]) -> list[Segment]:
    """Return the segments in the rows of a draw.

    Raises:
        DamagedCache: when a row is not what was written for the draw.
    """
    segments = []
    for _, number, position, indices, lease, token, stamp, standing, digest, written in rows:
        check_segment(draw, number, position, indices, stamp, digest, written)
        held = [indices] if type(indices) is int else unpack(indices)
        place = None if written is None else read_place(written)
        segments.append(Segment(number, position, held, lease, token, stamp, standing, place))
    return segments


def write_place(place: Place | None) -> str | None:
    """Return how the ledger writes the place in the schedule that a draw has noted."""
    return None if place is None else str(place)


def read_place(written: str | None) -> Place | None:
    """Return the place in the schedule that a draw has noted.

    Raises:
        DamagedCache: when the row holds something else there.
    """
    try:
        return None if written is None else parse_place(written)
    except (ValueError, AttributeError) as error:
        raise damaged_row(f"the place {written!r:.80}") from error


def check_segment(
    draw: Draw,
    number: int,
    position: int,
    indices: int | str,
    stamp: int,
    digest: bytes,
    place: str | None,
) -> None:
    """Raise an error if a segment is not what was written for a draw.

    Raises:
        DamagedCache: when its digest does not fit.
    """
    if segment_digest(draw, number, position, indices, stamp, place) != digest:
        raise _unlike_its_digest(f"a draw of key {draw.key}")


_AGE = operator.attrgetter("stamp", "namespace")


def earliest(rows: Iterable[SegmentRow]) -> SegmentRow:
    """Return the first row of the earliest namespace (C3)."""
    try:
        return min(rows, key=_AGE)
    except TypeError as error:
        raise damaged_row("a stamp that is not a number") from error


# Sets.


def interval_digest(label: str, key: str, start: int, stop: int) -> bytes:
    """Return the digest that binds an interval to its owner's label and its key."""
    return xxh3_64_digest(f"{key}\0{label}\0{start} {stop}".encode("utf-8", "surrogatepass"))


def check_interval(label: str, key: str, start: int, stop: int, digest: bytes) -> None:
    """Raise an error if an interval is not what was written.

    Raises:
        DamagedCache: when its digest does not fit.
    """
    if interval_digest(label, key, start, stop) != digest:
        raise _unlike_its_digest(f"the samples of key {key}")


# Sums.


def sums_digest(run: str, namespace: str, document: bytes) -> bytes:
    """Return what binds sums to a run and the label of a namespace."""
    return xxh3_64_digest(f"{run}\0{namespace}\0".encode("utf-8", "surrogatepass") + document)


def read_sums(
    loads: Callable[[bytes], _Sums], run: str, namespace: str, document: bytes, digest: bytes
) -> _Sums:
    """Return the document of a row of sums, as ``loads`` reads it.

    Raises:
        DamagedCache: when the row is not what was written.
    """
    with contextlib.suppress(ValueError, TypeError, LookupError):
        if sums_digest(run, namespace, document) == digest:
            return loads(document)
    raise _unlike_its_digest(f"the sums of the run {run}")


def dump_purse(purse: Purse) -> bytes:
    """Return the document of a row of a budget."""
    held = [[call, *whose] for call, whose in purse.held.items()]
    sums = [[name, lease, name in purse.overtaken] for name, lease in purse.sums.items()]
    return orjson.dumps([purse.counted, held, [*purse.recent.items()], sums])


def load_purse(document: bytes) -> Purse:
    """Return what ``dump_purse`` has written.

    Raises:
        ValueError: when it is something else.
    """
    counted, held, recent, sums = orjson.loads(document)
    return Purse(
        int(counted),
        {str(call): (int(lease), int(amount)) for call, lease, amount in held},
        {str(call): int(spent) for call, spent in recent},
        {str(name): int(lease) for name, lease, _ in sums},
        {str(name) for name, _, overtaken in sums if overtaken},
    )


# Samples.


def _sample_digest(name: str, state: bytes, body: bytes) -> bytes:
    return xxh3_64_hexdigest(b"%b%b%b" % (name.encode(), state, body)).encode()


def sample_row(name: str, sample: Sample) -> bytes:
    """Return the row of a sample that is stored under a name."""
    body = b"%b\n%b" % (sample.header, sample.payload)
    return b"%b%b%b" % (_LIVE, _sample_digest(name, _LIVE, body), body)


def discarded_row(name: str, row: bytes = b"") -> bytes:
    """Return the row of a sample that is discarded from now on; it keeps what the row before it held."""
    return b"%b%b%b" % (GONE, _sample_digest(name, GONE, row[_BODY:]), row[_BODY:])


def erased_row(name: str, row: bytes) -> bytes:
    """Return the row of a sample that is deleted from now on; it keeps the header of the row before it."""
    body = row[_BODY:]
    kept = body[: body.find(b"\n") + 1] if body.startswith(_HEADER) else b""
    return b"%b%b%b" % (GONE, _sample_digest(name, GONE, kept), kept)


def read_sample(shelf: sqlite3.Connection, key: str, index: int) -> Sample | Discarded | None:
    """Return the sample at an index of a key's list, `DISCARDED`, or None if there is none.

    Raises:
        UnsafeRow: when cachepipe did not write the row, for example a pickle.
        DamagedCache: when the row is not what was written there.
    """
    row = shelf.execute(GET, (f"{key}/{index}",)).fetchone()
    return None if row is None else parse_sample(key, index, *row)


def parse_sample(key: str, index: int, mode: Any, filename: Any, value: Any) -> Sample | Discarded:
    """Return the sample in a row of diskcache's table, or `DISCARDED`.

    Raises:
        UnsafeRow: when cachepipe did not write the row, for example a pickle.
        DamagedCache: when the row is not what was written there.
    """
    state, body = _checked(key, index, mode, filename, value)
    if state == GONE:
        return DISCARDED
    end = body.find(b"\n")
    identifier = body[7 : body.find(b'"', 7)]
    return Sample(index, identifier.decode(), body[end + 1 :], body[:end])


def header_of(key: str, index: int, mode: Any, filename: Any, value: Any) -> tuple[bytes, bool]:
    """Return the header in a row as ``parse_sample`` reads it, and whether the sample was discarded."""
    state, body = _checked(key, index, mode, filename, value)
    return body[: body.find(b"\n")], state == GONE


def parts_of(key: str, index: int, mode: Any, filename: Any, value: Any) -> tuple[bytes, bytes, bool]:
    """Return the header and the payload in a row, and whether the sample was discarded.

    Both are empty for a sample that could not be read when it was discarded.
    """
    state, body = _checked(key, index, mode, filename, value)
    header, _, payload = body.partition(b"\n")
    return (header, payload, state == GONE) if header.startswith(_HEADER) else (b"", b"", state == GONE)


def _checked(key: str, index: int, mode: Any, filename: Any, value: Any) -> tuple[bytes, bytes]:
    """Return what became of the sample in a row, and its header and payload."""
    if mode != RAW or filename is not None or type(value) is not bytes:
        raise UnsafeRow(
            f"sample {index} of key {key} is stored in diskcache's mode {mode}, which may be a pickle; "
            "cachepipe stores raw bytes only and never unpickles. Run `cachepipe verify --repair` to have it "
            "generated anew, or restore the cache from a copy"
        )
    state, body = value[:1], value[_BODY:]
    if value[1:_BODY] != xxh3_64_hexdigest(f"{key}/{index}".encode() + state + body).encode():
        raise DamagedCache(
            f"sample {index} of key {key} is damaged. Run `cachepipe verify --repair` to have such samples "
            "generated anew, or restore the cache from a copy"
        )
    return state, body


def is_discarded(key: str, index: int, row: Sequence[Any] | None) -> bool:
    """Return True if the row of a sample marks it as discarded; a damaged row does not."""
    try:
        return row is not None and parse_sample(key, index, *row) is DISCARDED
    except (DamagedCache, UnsafeRow):
        return False
