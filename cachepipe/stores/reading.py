"""The reading half of a store whose ledger and samples are SQLite tables: it never waits for writers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import operator
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import orjson

from cachepipe import forks
from cachepipe.accounting import RunSums
from cachepipe.contract.allotment import Discarded, Segment, laid
from cachepipe.contract.draws import SHARED, Draw, namespace_of
from cachepipe.contract.entries import NOBODY, Entry
from cachepipe.contract.intervals import IntervalSet, covered
from cachepipe.contract.keys import Question, encode
from cachepipe.errors import DamagedCache, StoreError, UnsafeRow
from cachepipe.stores import entries, leases, operations, tables
from cachepipe.stores.base import (
    AdoptSums,
    Ahead,
    Bought,
    Claim,
    DiscardInfo,
    DrawInfo,
    Foreseen,
    Grant,
    KeyInfo,
    NamespaceInfo,
    Process,
    Sample,
    State,
    StoredQuestion,
)
from cachepipe.stores.ledger import DrawView
from cachepipe.stores.misses import Similar, nearest
from cachepipe.stores.sets import LargeSet
from cachepipe.stores.tables import LISTED, SegmentRow, parse_sample, read_sample, unpack
from cachepipe.stores.transaction import SqlLedger

_ALIVE_FOR = 0.25  # seconds for which a lease that was found alive counts as alive
_FEW = 64  # samples up to which each one is looked up
_IDS = 50_000  # interned keys and namespaces that readers remember, 200 bytes each

_LONG = 100_000  # indices of a list above which those that are stored are looked up first
_STORED = "SELECT CAST(substr(key, ?3) AS INTEGER) FROM Cache WHERE raw = 1 AND key > ?1 AND key < ?2"

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _reads(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn SQLite's errors in a method of a store, or in the generator that it returns, into ours."""
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def iterate(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            store: Any = args[0]
            with store._reading_rows():  # noqa: SLF001 - of this module
                rows: Any = method(*args, **kwargs)
                if store._has_snapshots:  # noqa: SLF001 - of this module
                    yield from rows
                    return
                rows = list(rows)
            yield from rows

        return iterate

    @functools.wraps(method)
    def read(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with args[0]._reading_rows():  # type: ignore[attr-defined]  # noqa: SLF001 - of this module
            return method(*args, **kwargs)

    return read


class _Readers:
    """One thread's connections for reading; they are closed when it ends."""

    def __init__(self, pair: tuple[sqlite3.Connection, sqlite3.Connection]) -> None:
        self.pair = pair

    def close(self) -> None:
        """Close both."""
        for connection in self.pair:
            connection.close()

    def __del__(self) -> None:
        self.close()


class SqlReader:
    """Reads the ledger and the samples, on two connections of each thread."""

    identity: str
    _ledger: SqlLedger
    _has_snapshots = True  # readers see what was stored when they began, whatever is written meanwhile
    _closed = False

    # What subclasses provide.

    def _open(self, *, write: bool) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Return connections to the ledger and to the samples, in autocommit mode.

        Connections for writing do not wait for locks; those for reading have the samples attached.
        """
        raise NotImplementedError

    def _own_lease_name(self) -> str | None:
        """Return the name of this process's lease, if there is one."""
        raise NotImplementedError

    def _lease_alive(self, name: str) -> bool:
        """Return True if the process that holds a lease is alive."""
        raise NotImplementedError

    # Connections.

    def _begin_reading(self) -> None:
        """Begin without connections: at first, and in a forked child, which must not use its parent's."""
        self._fork = forks.count
        self._reading = threading.local()
        self._readers: weakref.WeakSet[_Readers] = weakref.WeakSet()
        self._key_ids: dict[str, int] = {}
        self._namespace_ids: dict[str, int] = {}
        self._leases: dict[int, tuple[bool, float]] = {NOBODY: (False, 0.0)}
        self._similar = Similar()

    def _close_readers(self) -> None:
        for readers in list(self._readers):
            readers.close()

    def _readable(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        if self._fork == forks.count and not self._closed:
            readers: _Readers | None = getattr(self._reading, "readers", None)
            if readers is not None:
                return readers.pair
        self._check()
        readers = self._reading.readers = _Readers(self._open(write=False))
        self._readers.add(readers)
        return readers.pair

    def _check(self) -> None:
        if self._closed:
            raise StoreError(f"the cache {self.identity} was closed; open it again")

    @contextlib.contextmanager
    def _reading_rows(self) -> Iterator[None]:
        """Turn the errors of damaged rows into ours; in a generator, also those between two of its values."""
        try:
            yield
        except UnicodeEncodeError:  # the caller looks for a text that cannot be stored
            raise
        except tables.UNREADABLE as error:
            raise self._unreadable(error) from error
        except (TypeError, ValueError) as error:
            raise tables.damaged_row("a value of the wrong type") from error

    def _unreadable(self, error: Exception) -> StoreError:
        return StoreError(
            f"the cache {self.identity} could not be read: {error}. Run `cachepipe verify` to see whether it "
            "is damaged"
        )

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw if all of them are stored, else None.

        Raises:
            StoreError: when the files cannot be read.
        """
        label, name, request_id, occurrence, replicate = draw
        key, namespace = self._key_ids.get(name), self._namespace_ids.get(label)
        try:
            _, shelf = self._readable()
            if key is None or namespace is None:
                values: tuple[Any, ...] = (name + "/", name, request_id, occurrence, replicate, label)
                rows = shelf.execute(tables.RECALL_BY_NAME, values).fetchall()
                if not rows:
                    return None
                key, namespace = rows[0][:2]
                _intern(self._key_ids, name, key)
                _intern(self._namespace_ids, label, namespace)
                rows = [row[2:] for row in rows if row[2] is not None]
            else:
                values = (name + "/", key, request_id, occurrence, replicate, namespace)
                rows = shelf.execute(tables.RECALL, values).fetchall()
            if len(rows) != 1 or n != 1 or type(index := rows[0][2]) is not int:
                place = (key, request_id, occurrence, replicate, namespace)
                return self._recall_several(draw, place, rows, n) if rows else None
            number, position, _, lease, stamp, digest, noted, mode, filename, value = rows[0]
            if value is None and mode is None:
                return None
            sample = parse_sample(name, index, mode, filename, value)
            tables.check_segment(draw, number, position, index, stamp, digest, noted)
            if type(sample) is not Sample:
                return None
            shared = lease != self._ledger.own_lease and self._shared({lease})
            return Grant(
                [index], [sample], shared=shared, place=None if noted is None else tables.read_place(noted)
            )
        except tables.UNREADABLE as error:
            raise self._unreadable(error) from error

    def _recall_several(self, draw: Draw, place: tuple[Any, ...], rows: list[Any], n: int) -> Grant | None:
        ledger, shelf = self._readable()
        for row in rows:
            tables.check_segment(draw, *row[:3], *row[4:7])
        indices = laid((row[1], unpack(row[2])) for row in rows)
        if len(indices) < n:
            return None
        # The samples beyond n must be stored too: an incomplete draw may still be undone.
        beyond = indices[n:]
        if len(beyond) > _FEW:
            if not _whole(ledger, place[0], min(beyond), max(beyond)):
                return None
            beyond = []
        samples: list[Sample | None] = []
        for index in [*indices[:n], *beyond]:
            found = read_sample(shelf, draw.key, index)
            if type(found) is not Sample:
                return None
            samples.append(found)
        shared = self._shared({row[3] for row in rows})
        noted = [each for row in rows if row[1] < n and (each := tables.read_place(row[6])) is not None]
        grant = Grant(indices[:n], samples[:n], shared=shared, place=max(noted, default=None))
        return grant if self._stands(place, rows) else None

    def _stands(self, place: tuple[Any, ...], rows: list[Any]) -> bool:
        """Return True if the rows still exist after their samples were read.

        The ledger is read before the samples. In between, the draw may have been undone, and its samples may
        have come for another draw. Draws of processes that have ended are never undone.
        """
        leases = self._leases
        for row in rows:
            known = leases.get(row[3])
            if known is None or known[0]:
                ledger, _ = self._readable()
                digests = ledger.execute(tables.OWN_DIGESTS, place).fetchall()
                return digests == [(row[5],) for row in rows]
        return True

    @_reads
    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of its samples are stored, else None.

        Raises:
            StoreError: when the files cannot be read.
        """
        ledger, shelf = self._readable()
        self._key_ids.pop(draw.key, None)  # the question may have been deleted and asked anew
        key = self._key_id(ledger, draw.key)
        if key is None:
            return None
        namespace = self._namespace_id(ledger, draw.namespace)
        view = _DrawView(ledger, shelf, key, -1 if namespace is None else namespace, draw)
        return operations.replay(view, draw, n, taken)

    @_reads
    def foresee(self, wanted: Sequence[tuple[Draw, int, Ahead]], *, refresh: bool = False) -> list[Foreseen]:
        """Return what successive claims would get; see ``Store.foresee``.

        Raises:
            StoreError: when the files cannot be read.
        """
        ledger, shelf = self._readable()
        found: list[Foreseen] = []
        for draw, n, ahead in wanted:
            # Not the subclass's: it may take the lock that is held here.
            grant = None if refresh else SqlReader.recall(self, draw, n)
            if grant is not None:
                found.append(Foreseen([sample for sample in grant.samples if sample is not None], 0, []))
                continue
            key, namespace = self._key_id(ledger, draw.key), self._namespace_id(ledger, draw.namespace)
            view: _DrawView | None = None
            if key is not None:
                view = _DrawView(ledger, shelf, key, -1 if namespace is None else namespace, draw)
            found.append(operations.foresee(view, draw, n, ahead, refresh=refresh))
        return found

    @_reads
    def status(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Return for each (key, index) whether its sample is stored, generated elsewhere or here, or free.

        Raises:
            StoreError: when the files cannot be read.
        """
        ledger, shelf = self._readable()
        states: list[State] = []
        for key, index in wanted:
            # Read pending before the sample: a commit writes them in the opposite order.
            row = ledger.execute(
                "SELECT l.id, l.name, l.ended FROM pending p JOIN leases l ON l.id = p.lease"
                " WHERE p.key = (SELECT id FROM keys WHERE key = ?) AND p.sample = ?",
                (key, index),
            ).fetchone()
            if type(read_sample(shelf, key, index)) is Sample:
                states.append("stored")
            elif row is not None and row[1] == self._own_lease_name():
                states.append("ours")
            elif row is not None and row[2] is None and self._lives(row[0], row[1]):
                states.append("pending")
            else:
                states.append("free")
        return states

    def look(self, claims: Sequence[Claim], *, urgent: bool) -> None:
        """Return None: a claim does not wait for a server."""

    def listen(self, changed: Callable[[], None]) -> None:
        """Return None: files tell nobody that they have changed."""

    @_reads
    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample, or None."""
        ledger, _ = self._readable()
        row = ledger.execute(
            "SELECT l.name FROM pending p JOIN leases l ON l.id = p.lease"
            " WHERE p.key = (SELECT id FROM keys WHERE key = ?) AND p.sample = ?",
            (key, index),
        ).fetchone()
        return None if row is None else leases.process(str(row[0]))

    @_reads
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
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT k.key, CAST(k.scope AS TEXT), CAST(k.at AS REAL),"
            " (SELECT coalesce(sum(stop - start), 0) FROM intervals WHERE owner = 0 AND key = k.id),"
            " (SELECT count(*) FROM pending WHERE key = k.id),"
            " (SELECT count(DISTINCT namespace) FROM segments WHERE key = k.id AND namespace IS NOT"
            "  (SELECT id FROM namespaces WHERE label = ?1)),"
            " (SELECT count(*) FROM discards WHERE key = k.id)"
            " FROM keys k"
            " WHERE (?2 = '' OR k.id IN (SELECT id FROM keys WHERE key >= ?2 AND key < ?3))"
            " AND (?4 IS NULL OR k.scope = ?4 OR substr(k.scope, 1, length(?4) + 1) = ?4 || '/')"
            " AND (?5 IS NULL OR EXISTS (SELECT 1 FROM segments WHERE key = k.id AND namespace ="
            "  (SELECT id FROM namespaces WHERE label = ?5)))"
            + " AND CAST(k.document AS TEXT) LIKE ? ESCAPE '|'" * len(holding)
            + f" ORDER BY k.id {'DESC' if newest else ''}",
            (SHARED, prefix, prefix + "\U0010ffff", scope, namespace, *map(_containing, holding)),
        )
        for key, whose, at, listed, pending, namespaces, discards in rows:
            yield KeyInfo(key, whose, at, listed - pending - discards, pending, namespaces)

    @_reads
    def question(self, key: str) -> StoredQuestion | None:
        """Return the question of a key."""
        ledger, _ = self._readable()
        row = ledger.execute(
            "SELECT CAST(scope AS TEXT), CAST(document AS BLOB), CAST(at AS REAL) FROM keys WHERE key = ?",
            (key,),
        ).fetchone()
        return None if row is None else StoredQuestion(key, row[0], row[1], row[2])

    @_reads
    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar.

        The same question under another scope is always found, others among the newest ones.
        """
        ledger, _ = self._readable()
        self._similar.read(
            lambda after, longest: ledger.execute(
                "SELECT id, scope, CASE WHEN length(document) <= ? THEN document END FROM keys"
                " WHERE id > ? ORDER BY id DESC",
                (longest, after),
            )
        )
        ids, keys = self._similar.ids(question), self._similar.elsewhere(question)
        rows = ledger.execute(
            "SELECT key, CAST(scope AS TEXT), CAST(document AS BLOB), CAST(at AS REAL) FROM keys"
            f" WHERE key IN ({_marks(keys)}) OR id IN ({_marks(ids)})",
            (*keys, *ids),
        )
        return nearest(question, itertools.starmap(StoredQuestion, rows))

    @_reads
    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key; None if it does not exist or was discarded."""
        _, shelf = self._readable()
        sample = read_sample(shelf, key, index)
        return sample if isinstance(sample, Sample) else None

    @_reads
    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index; discarded ones are left out."""
        ledger, shelf = self._readable()
        rows = ledger.execute(
            "SELECT start, stop, digest FROM intervals"
            " WHERE owner = 0 AND key = (SELECT id FROM keys WHERE key = ?) ORDER BY stop",
            (key,),
        ).fetchall()
        for row in rows:
            tables.check_interval("", key, *row)
        runs = [(start, stop) for start, stop, _ in rows]
        listed: Iterable[int] = itertools.chain.from_iterable(range(start, stop) for start, stop in runs)
        if sum(stop - start for start, stop in runs) > _LONG:  # a received ledger may list any number
            stored = shelf.execute(_STORED, (f"{key}/", f"{key}0", len(key) + 2)).fetchall()
            known = IntervalSet(runs)
            listed = sorted(index for (index,) in stored if index in known)
        for index in listed:
            sample = read_sample(shelf, key, index)
            if isinstance(sample, Sample):
                yield sample

    @_reads
    def discards(self, key: str) -> Iterator[DiscardInfo]:
        """Iterate over the samples of a key that were discarded, by index."""
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT sample, at, why FROM discards WHERE key = (SELECT id FROM keys WHERE key = ?)"
            " ORDER BY sample",
            (key,),
        )
        yield from itertools.starmap(DiscardInfo, rows)

    @_reads
    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, in order of creation; ``namespace`` is a label."""
        ledger, _ = self._readable()
        rows = ledger.execute(
            "SELECT n.label, k.key, s.request_id, s.occurrence, s.replicate,"
            " s.position, s.indices, s.generated, s.stamp, s.number, s.digest, s.place"
            " FROM segments s JOIN namespaces n ON n.id = s.namespace JOIN keys k ON k.id = s.key"
            " WHERE (? IS NULL OR k.key = ?) AND (? IS NULL OR n.label = ?)"
            " ORDER BY s.key, s.request_id, s.occurrence, s.replicate, s.namespace, s.number",
            (key, key, namespace, namespace),
        )
        for whose, group in itertools.groupby(rows, key=lambda row: row[:5]):
            draw, segments = Draw(*whose), list(group)
            for row in segments:
                tables.check_segment(draw, row[9], row[5], row[6], row[8], *row[10:])
            indices = laid((row[5], unpack(row[6])) for row in segments)
            generated = sum(row[7] for row in segments)
            yield DrawInfo(draw, tuple(indices), generated, segments[0][8] / 1e6)

    @_reads
    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, in order of their first draw; the shared draws are left out."""
        ledger, _ = self._readable()
        taken = dict(
            ledger.execute("SELECT owner, sum(stop - start) FROM intervals WHERE owner > 0 GROUP BY owner")
        )
        drawn = {
            namespace: (draws, generated)
            for namespace, draws, generated in ledger.execute(
                "SELECT namespace, sum(number = 0), sum(generated) FROM segments GROUP BY namespace"
            )
        }
        for namespace, written in ledger.execute("SELECT id, label FROM namespaces ORDER BY id").fetchall():
            if written != SHARED:
                draws, generated = drawn.get(namespace, (0, 0))
                yield NamespaceInfo(namespace_of(written), draws, taken.get(namespace, 0), generated)

    @_reads
    def sums(self) -> Iterator[AdoptSums]:
        """Iterate over what the runs have noted.

        Raises:
            DamagedCache: when a row is not what was written.
        """
        ledger, _ = self._readable()
        for run, namespace, *row in ledger.execute("SELECT run, namespace, document, digest FROM sums"):
            yield AdoptSums(run, namespace, tables.read_sums(RunSums.loads, run, namespace, *row))

    @_reads
    def bought(self) -> Iterator[Bought]:
        """Iterate over all samples, the discarded ones too, as they count in what was spent."""
        ledger, shelf = self._readable()
        taken = itertools.groupby(
            ledger.execute("SELECT key, start, stop FROM intervals WHERE owner > 0 ORDER BY key, start"),
            key=operator.itemgetter(0),
        )
        at, held = next(taken, (None, ()))
        number, all_held = 0, IntervalSet()
        for key, name, scope, place, *row in shelf.execute(tables.ALL_SAMPLES):
            while at is not None and at < key:
                at, held = next(taken, (None, ()))
            if key != number:
                number, all_held = key, covered(interval[1:] for interval in held if key == at)
            try:
                index = int(place[len(name) + 1 :])
                header, gone = tables.header_of(name, index, *row)
            except ValueError:  # not a sample's row
                continue
            except (DamagedCache, UnsafeRow):
                header, gone = b"", True
            yield Bought(scope, header, not gone and index in all_held)

    @_reads
    def entry(self, key: str) -> Entry | None:
        """Return all that is held of a question, for another cache; None if it is not known."""
        ledger, shelf = self._readable()
        found = list(entries.of_keys(ledger, shelf, [key]))
        return found[0] if found else None

    @_reads
    def entries_of(self, keys: Sequence[str]) -> Iterator[Entry]:
        """Iterate over the entries of the keys that are known, in their order."""
        ledger, shelf = self._readable()
        with entries.unmapped(ledger, shelf):
            yield from entries.of_keys(ledger, shelf, keys)

    @_reads
    def entries(self, namespaces: Collection[str] | None = None, *, after: str = "") -> Iterator[Entry]:
        """Iterate over the entries of all questions, in the order of their keys.

        Args:
            namespaces: the labels of namespaces; only questions that one of them has drawn.
            after: only keys after this one.
        """
        ledger, shelf = self._readable()
        with entries.unmapped(ledger, shelf):
            yield from entries.entries(ledger, shelf, namespaces, after)

    @_reads
    def removals(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of what was removed, in order of time.

        Raises:
            DamagedCache: when a row is not what was written.
        """
        ledger, _ = self._readable()
        for name, *row in ledger.execute("SELECT id, document, digest FROM removals ORDER BY stamp"):
            yield tables.read_sums(orjson.loads, name, tables.REMOVAL, *row)

    @_reads
    def totals(self) -> dict[str, int]:
        """Return how many keys, samples, pending samples, draws, namespaces and discards there are."""
        ledger, _ = self._readable()
        row = ledger.execute(
            "SELECT (SELECT count(*) FROM keys),"
            " (SELECT coalesce(sum(stop - start), 0) FROM intervals WHERE owner = 0),"
            " (SELECT count(*) FROM pending),"
            " (SELECT count(*) FROM segments WHERE number = 0),"
            " (SELECT count(*) FROM namespaces WHERE label != ?), (SELECT count(*) FROM discards)",
            (SHARED,),
        ).fetchone()
        keys, listed, pending, draws, namespaces, discards = row
        return {
            "keys": keys,
            "samples": listed - pending - discards,
            "pending": pending,
            "draws": draws,
            "namespaces": namespaces,
            "discarded": discards,
        }

    # Ids that readers remember; only rows of finished transactions are seen by them.

    def _key_id(self, ledger: sqlite3.Connection, key: str) -> int | None:
        return _interned(self._key_ids, ledger, "SELECT id FROM keys WHERE key = ?", key)

    def _namespace_id(self, ledger: sqlite3.Connection, label: str) -> int | None:
        return _interned(self._namespace_ids, ledger, "SELECT id FROM namespaces WHERE label = ?", label)

    # Leases.

    def _shared(self, leases: set[int]) -> bool:
        """Return True if another live process is among the leases that made a draw."""
        for lease in leases:
            alive, asked = self._leases.get(lease, (True, -math.inf))
            if not alive or lease == self._ledger.own_lease:
                continue
            if time.monotonic() - asked <= _ALIVE_FOR or self._is_other_alive(lease):
                return True
        return False

    def _is_other_alive(self, lease: int) -> bool:
        """Return True if a lease is that of another process, which is alive."""
        ledger, _ = self._readable()
        row = ledger.execute("SELECT name, ended FROM leases WHERE id = ?", (lease,)).fetchone()
        if row is None or row[0] == self._own_lease_name():
            return False
        if row[1] is not None:
            self._leases[lease] = (False, 0.0)
            return False
        return self._lives(lease, row[0])

    def _lives(self, lease: int, name: str) -> bool:
        """Return True if a lease's process is alive. False is remembered for ever, True for a short time."""
        known = self._leases.get(lease)
        now = time.monotonic()
        if known is not None and (not known[0] or now - known[1] < _ALIVE_FOR):
            return known[0]
        lives = self._lease_alive(name)
        self._leases[lease] = (lives, now)
        return lives


def _marks(values: Sequence[Any]) -> str:
    """Return the question marks of an SQL list of values."""
    return ",".join("?" * len(values))


def _containing(text: str) -> str:
    """Return a pattern for documents (JSON) that contain a text."""
    pattern = re.sub("([%_|])", r"|\1", encode(text).decode()[1:-1])
    return f"%{pattern}%"


def _whole(ledger: sqlite3.Connection, key: int, first: int, last: int) -> bool:
    """Return True if the ledger says that all samples from the first index to the last are stored."""
    run = ledger.execute(
        "SELECT start, stop FROM intervals WHERE owner = 0 AND key = ? AND stop > ? ORDER BY stop LIMIT 1",
        (key, first),
    ).fetchone()
    pending = ledger.execute(
        "SELECT 1 FROM pending WHERE key = ? AND sample BETWEEN ? AND ? LIMIT 1", (key, first, last)
    ).fetchone()
    return run is not None and run[0] <= first and last < run[1] and pending is None


def _interned(ids: dict[str, int], ledger: sqlite3.Connection, query: str, text: str) -> int | None:
    identifier = ids.get(text)
    if identifier is None:
        row = ledger.execute(query, (text,)).fetchone()
        if row is None:
            return None
        identifier = int(row[0])
        _intern(ids, text, identifier)
    return identifier


def _intern(ids: dict[str, int], text: str, identifier: int) -> None:
    """Remember an id; forget the others when there are too many."""
    if len(ids) >= _IDS:
        ids.clear()
    ids[text] = identifier


class _DrawView(DrawView):
    """One draw as a reader sees it, for a claim in memory.

    Args:
        ledger: a reader's connection to the ledger.
        shelf: a reader's connection to the samples.
        key: the number of the key.
        namespace: the number of the draw's namespace, or -1 if the ledger does not know it.
        draw: the draw.
    """

    def __init__(
        self, ledger: sqlite3.Connection, shelf: sqlite3.Connection, key: int, namespace: int, draw: Draw
    ) -> None:
        self._ledger = ledger
        self._shelf = shelf
        self._draw = draw
        self._where = (key, draw.request_id, draw.occurrence, draw.replicate, namespace)
        self.name = draw.key
        self.listed = LargeSet(ledger, (LISTED, ""), (key, draw.key))
        self.taken = LargeSet(ledger, (namespace, draw.namespace), (key, draw.key))
        self.segments = self._read(draw, self._where)

    def others(self) -> Sequence[Segment]:
        first = self._ledger.execute(tables.EARLIEST, self._where).fetchone()
        if first is None:
            return ()
        return self._read(self._draw._replace(namespace=first[1]), (*self._where[:4], first[0]))

    def _read(self, draw: Draw, where: tuple[Any, ...]) -> list[Segment]:
        return tables.segments_of(draw, map(SegmentRow._make, self._ledger.execute(tables.OWN, where)))

    def sample(self, index: int) -> Sample | Discarded | None:
        return read_sample(self._shelf, self.name, index)
