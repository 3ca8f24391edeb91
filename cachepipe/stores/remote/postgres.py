"""An engine on a PostgreSQL server.

The rows of all keys are in two tables of a schema: samples, and the others. Two functions of the server,
`postgres.sql`, compare and set them. Each statement is a transaction of its own, so that a pooler may give
each to another connection.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final, TypeVar

from cachepipe.errors import FormatError, StoreError
from cachepipe.stores.remote.checks import DATABASE_SETTINGS, Unfit, database_faults, tls_fault, warn_once
from cachepipe.stores.remote.connections import LISTENS, Connections, listen
from cachepipe.stores.remote.engine import (
    CHANGES,
    RECEIPT,
    RECENT,
    SAMPLE,
    TURN,
    Changes,
    Conflict,
    Read,
    Rows,
    Server,
    Swap,
    Unreachable,
    no_cache,
)
from cachepipe.stores.remote.rows import decoded, encoded
from cachepipe.stores.tables import GONE

try:
    import psycopg
    from psycopg import errors, sql
    from psycopg.adapt import Dumper
    from psycopg.waiting import Ready
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(
        "a cache in a PostgreSQL database needs psycopg: pip install 'cachepipe[postgres]'"
    ) from error

FORMAT: Final = 1
"""The version of the rows and tables in the database."""

_PAGE: Final = 100  # keys whose rows are read in one round trip
_LOCK: Final = int.from_bytes(b"cachepip")  # of the processes that make tables

_LATER: Final = ("08", "40", "53", "55", "57", "58", "25006")
"""The beginnings of SQLSTATE codes of what may pass: the server is away or full, it starts, stops or is
replaced, a lock is not free, or two transactions meet."""
_BROKEN: Final = (psycopg.OperationalError, psycopg.InterfaceError, OSError)
"""What the client raises of itself, when a connection cannot be made or breaks."""
_IDLE: Final = psycopg.pq.TransactionStatus.IDLE
_TABLES: Final = ("keys", "ledger", "samples", "changes", "leases", "meta")
_NO_CACHE: Final = (errors.UndefinedTable, errors.InvalidSchemaName)
_REFUSED: Final = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist")
"""Parts of what a server says of a connection that it will always refuse."""

_T = TypeVar("_T")


class PostgresEngine:
    """Rows in a schema of a database.

    Args:
        options: how libpq connects.
        where: says where the server is, without credentials.
        schema: the schema.
        timeout: seconds to wait for an answer of the server.
        create: whether to begin a cache where there is none.
    """

    def __init__(
        self, options: Mapping[str, Any], where: str, schema: str, timeout: float, *, create: bool = True
    ) -> None:
        self._options = options
        self._schema = schema
        self._name = sql.Identifier(schema).as_string()
        self._timeout = timeout
        self._connections = Connections(self._connect)
        self.where = where
        try:
            self._check()
            self.identity = self._opened(create=create)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<PostgresEngine {self.where}>"

    # Opening.

    def _check(self) -> None:
        """Refuse a server that would lose samples in silence; warn of one that may lose some."""
        [[version, replica, replicas]] = self._ask(
            "select current_setting('server_version_num')::int, pg_is_in_recovery(), "
            "(select count(*) from pg_stat_replication)::int"
        )
        settings = dict(
            self._ask("select name, setting from pg_settings where name = any (%s)", [[*DATABASE_SETTINGS]])
        )
        try:
            for told in database_faults(version, settings, replica=replica, replicas=replicas):
                warn_once(self.where, told)
        except Unfit as error:
            raise StoreError(f"the server at {self.where} {error}") from None

    def _opened(self, *, create: bool) -> str:
        """Return the identity of the store; make its tables if it is new."""
        try:
            return self._signed()
        except _Missing:
            if not create:
                raise no_cache(self.where) from None
            self._with(self._make)
            return self._signed()

    def _signed(self) -> str:
        """Return the identity of the store."""
        [[format_, identity]] = self._ask("select format, identity from SCHEMA.meta")
        if format_ > FORMAT:
            raise FormatError(
                f"the cache {self.where} has format {format_}, and this version of cachepipe knows formats "
                f"up to {FORMAT}. Update cachepipe"
            )
        return f"postgresql:{identity}"

    def _make(self, connection: _Connection) -> None:
        """Make the schema and its tables, unless another process has made them."""
        with self._clear(), connection.transaction():
            connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
            if connection.execute("select to_regclass(%s) is null", [f"{self._name}.meta"]).fetchall()[0][0]:
                if connection.execute("select to_regnamespace(%s) is null", [self._name]).fetchall()[0][0]:
                    connection.execute(self._sql("create schema SCHEMA"))
                code = resources.files(__package__).joinpath("postgres.sql").read_text("utf-8")
                connection.execute(self._sql(code))
                connection.execute(
                    self._sql("insert into SCHEMA.meta (format, identity) values (%s, %s)"),
                    [FORMAT, secrets.token_hex(8)],
                )

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        """Say so when the schema is used for something else."""
        try:
            yield
        except (errors.DuplicateTable, errors.DuplicateFunction) as error:
            raise StoreError(
                f"the schema {self._schema} of {self.where} has tables that are not those of a cache. Name "
                "another schema in the URL: ?schema=NAME"
            ) from error

    # Asking.

    def _sql(self, statement: str) -> bytes:
        return statement.replace("SCHEMA", self._name).encode()

    def _ask(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows that a statement returns, if it returns rows."""

        def ask(connection: _Connection) -> list[Any]:
            cursor = connection.execute(self._sql(statement), values or None, binary=True)
            return cursor.fetchall() if cursor.description else []

        return self._with(ask)

    def _with(self, ask: Callable[[_Connection], _T]) -> _T:
        """Return what a function finds with a connection of its own."""
        try:
            connection = self._connections.take()
            try:
                return ask(connection)
            finally:
                if connection.closed or connection.info.transaction_status != _IDLE:
                    self._connections.drop(connection)
                else:
                    self._connections.give_back(connection)
        except (psycopg.Error, OSError) as error:
            raise self._ours(error) from None  # the client's error may quote what was sent

    def _connect(self) -> _Connection:
        connection = _Connection.connect(**self._options, autocommit=True, prepare_threshold=None)
        connection.seconds = self._timeout
        connection.adapters.register_dumper(_Numbers, _NumbersDumper)
        connection.adapters.register_dumper(_Texts, _TextsDumper)
        return connection

    def _ours(self, error: Exception) -> Exception:
        """Return our error for one of the client's."""
        told = " ".join(str(error).split())
        state = getattr(error, "sqlstate", None) or ""
        if isinstance(error, _NO_CACHE):
            return _Missing(self.where, told)
        if state == "42501" or "permission denied" in told:
            return StoreError(
                f"the server at {self.where} does not permit it: {told}. The user needs the right to create "
                "a schema in the database (GRANT CREATE ON DATABASE), or all rights on the cache's schema, "
                "its tables and its functions"
            )
        if not state and (fault := tls_fault(told, "sslrootcert")):
            return StoreError(f"the server at {self.where} {fault}")
        if any(part in told for part in _REFUSED) and not state:
            return StoreError(
                f"the server at {self.where} refuses the connection: {told}. Name an existing database and "
                "user in the URL, and give the password there, in PGPASSWORD or in a .pgpass file"
            )
        if state.startswith(_LATER) or (not state and isinstance(error, _BROKEN)):
            there = bool(state) or "FATAL:" in told
            return Unreachable(
                f"{type(error).__name__}: {told}" if told else type(error).__name__, there=there
            )
        return StoreError(f"the server at {self.where} refuses: {told}")

    # Rows.

    def read(self, reads: Sequence[Read]) -> list[Rows]:
        """Return the rows of each key, as of one moment."""
        fields, samples, follow, pending = _Fields(), _Fields(), _Fields(), _Numbers()
        for number, read in enumerate(reads, 1):
            for name in read.fields:
                (samples if name.startswith(SAMPLE) else fields).add(number, name)
            for name in read.follow:
                follow.add(number, name)
            if read.pending:
                pending.append(number)
        keys = _Texts(encoded(read.key) for read in reads)
        found: list[Rows] = [{} for _ in reads]
        for number, name, row in self._ask(
            "select * from SCHEMA.read(%s, %s, %s, %s, %s, %s, %s, %s)",
            [keys, *fields, *samples, *follow, pending],
        ):
            found[number - 1][name] = row
        return found

    def read_soon(self, reads: Sequence[Read], then: Callable[[list[Rows] | None], object]) -> bool:  # noqa: ARG002 - see below
        """Return False: it is read in a thread."""
        return False

    def read_in_turn(self, read: Read, who: int) -> Rows | None:  # noqa: ARG002 - see below
        """Read: swaps of a key wait for each other in the server."""
        return self.read([read])[0]

    def swap(self, swaps: Sequence[Swap], who: int) -> list[Conflict | Rows | None]:
        """Perform each swap as a whole if its expected rows are current; see ``Engine.swap``.

        What is performed is one transaction.
        """
        expected, digests, puts, contents, deletes = _Fields(), _Texts(), _Fields(), _Texts(), _Fields()
        wants = _Fields()
        for number, swap in enumerate(swaps, 1):
            for name, digest in swap.expected.items():
                expected.add(number, name)
                digests.append(digest or b"")
            for name in swap.wants:
                wants.add(number, name)
            for name, content in swap.puts.items():
                puts.add(number, name)
                contents.append(content)
            for name in swap.deletes:
                deletes.add(number, name)
        answers = self._ask(
            f"select * from SCHEMA.swap({', '.join(['%s'] * 18)})",
            [
                _Texts(encoded(swap.key) for swap in swaps),
                _Texts(swap.nonce for swap in swaps),
                _Numbers(swap.fair for swap in swaps),
                _Numbers(-1 if swap.whole is None else swap.whole for swap in swaps),
                who,
                TURN,
                RECEIPT,
                *expected,
                digests,
                *wants,
                GONE,
                *puts,
                contents,
                *deletes,
            ],
        )
        conflicts: dict[int, Conflict] = {}
        wanted: dict[int, Rows] = {number: {} for number, swap in enumerate(swaps, 1) if swap.wants}
        for number, reserved, name, row in answers:
            if name is None:
                conflicts[number] = Conflict({}, reserved)
            elif number in conflicts:
                conflicts[number].rows[name] = row
            else:
                wanted[number][name] = row
        self._wake(
            [swap.key for number, swap in enumerate(swaps, 1) if swap.wakes and number not in conflicts]
        )
        return [conflicts.get(number) or wanted.get(number) for number in range(1, len(swaps) + 1)]

    def rows_of(self, keys: Sequence[str]) -> list[Rows]:
        """Return all rows of each key but the samples."""
        names = [encoded(key) for key in keys]
        there: dict[bytes, Rows] = {name: {} for name in names}
        for key, field, content in self._ask(
            "select key, coalesce(long, field), content from SCHEMA.ledger where key = any (%s)", [names]
        ):
            there[key][field] = content
        return [there[name] for name in names]

    def samples_of(self, key: str) -> list[bytes]:
        """Return the fields of all samples of a key, in any order."""
        found = self._ask("select field from SCHEMA.samples where key = %s", [encoded(key)])
        return [name for (name,) in found]

    def scan(self, prefix: str, fields: Sequence[bytes] = ()) -> Iterator[tuple[str, Rows]]:
        """Iterate over the keys with a prefix, in order, with all rows but the samples, or some of them."""
        first = encoded(prefix)
        end = first[:-1] + bytes([first[-1] + 1]) if first else None  # UTF-8 has no byte 255
        exact = [name for name in fields if not name.endswith(b"/")]
        kinds = [name for name in fields if name.endswith(b"/")]  # of a letter each
        last: bytes | None = None
        while True:
            page: dict[bytes, Rows] = {}
            for key, name, row in self._ask(
                "select k.key, coalesce(l.long, l.field), l.content from ("
                "select key from SCHEMA.keys where key >= %s and (%s::bytea is null or key < %s) and "
                "(%s::bytea is null or key > %s) order by key limit %s"
                ") as k left join SCHEMA.ledger l on l.key = k.key and "
                "(%s or l.field = any (array(select SCHEMA.short(f) from unnest(%s::bytea[]) f)) or "
                "substring(l.field, 1, 2) = any (%s)) order by k.key",
                [first, end, end, last, last, _PAGE, not fields, exact, kinds],
            ):
                there = page.setdefault(key, {})
                if name is not None:
                    there[name] = row
            for last, there in page.items():
                yield decoded(last), there
            if len(page) < _PAGE:
                return

    def strays(self) -> Iterator[str]:
        """Iterate over the keys that have samples and no other row, or that `scan` misses."""
        found = self._ask(
            "select distinct s.key from SCHEMA.samples s "
            "where not exists (select from SCHEMA.ledger l where l.key = s.key) union "
            "select distinct l.key from SCHEMA.ledger l "
            "where not exists (select from SCHEMA.keys k where k.key = l.key)"
        )
        for (key,) in found:
            yield decoded(key)

    def compact(self) -> tuple[int, int]:
        """Make the space of deleted rows free for others; return the bytes of the tables before and after."""
        before = self._size()
        # The lock of a key that is gone; a swap that takes it meanwhile leaves a receipt.
        self._ask(
            "delete from SCHEMA.keys k where not exists (select from SCHEMA.ledger l where l.key = k.key) "
            "and not exists (select from SCHEMA.samples s where s.key = k.key) and not exists ("
            "select from jsonb_each(k.receipts) r where (r.value ->> 1)::float8 > SCHEMA.seconds() - %s)",
            [RECEIPT],
        )
        warnings: list[str] = []
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.seconds = 0.0  # it may take long
                connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
                tables = ", ".join(f"SCHEMA.{name}" for name in _TABLES)
                connection.execute(self._sql(f"vacuum (analyze) {tables}"))
        except (psycopg.Error, OSError) as error:
            raise self._ours(error) from None
        if warnings:
            raise StoreError(
                f"the server at {self.where} has not compacted the cache: {warnings[0]}. The owner of its "
                "tables may do so"
            )
        return before, self._size()

    def _size(self) -> int:
        sizes = " + ".join(["pg_total_relation_size(%s::regclass)"] * len(_TABLES))
        [[size]] = self._ask(f"select {sizes}", [f"{self._name}.{name}" for name in _TABLES])
        return int(size)

    # Changes.

    def swap_soon(self, swaps: Sequence[Swap], who: int, then: Callable[[Any], object]) -> bool:  # noqa: ARG002 - see below
        """Return False: it is swapped in a thread."""
        return False

    def announce(self, keys: Sequence[str]) -> list[int]:
        """Announce a change of each key; return their numbers."""
        [[last]] = self._ask(
            "select SCHEMA.announce(%s, %s)", [_Texts(encoded(key) for key in keys), CHANGES]
        )
        return [*range(last - len(keys) + 1, last + 1)]

    def changes(self, since: int | None) -> Changes:
        """Return the changes from a number on; without a number the recent ones.

        The epoch is when the server was started, and which cache is in which files: a table that is restored
        has another file.
        """
        found = self._ask(
            "select c.number, c.key, extract(epoch from pg_postmaster_start_time())::text, "
            "pg_relation_filenode(m.tableoid)::text, pg_relation_filenode(%s::regclass)::text, m.identity "
            "from SCHEMA.meta m left join SCHEMA.changes c "
            "on c.number >= coalesce(%s::bigint, m.changes - %s + 1) order by c.number",
            [f"{self._name}.ledger", since, RECENT],
        )
        keys = [(number, decoded(key)) for number, key, *_ in found if number is not None]
        return Changes(" ".join(found[0][2:]), keys)

    # Leases.

    def open_lease(self, name: str, seconds: float) -> int:
        """Return the number of a new lease; forget those that have ended."""
        lease = secrets.randbits(62)
        if self._signed() != self.identity:
            raise _Missing(self.where, "another cache is in its place")
        self._ask("delete from SCHEMA.leases where until < SCHEMA.seconds()")
        self._ask(
            "insert into SCHEMA.leases (lease, name, until) values (%s, %s, SCHEMA.seconds() + %s)",
            [lease, encoded(name), seconds],
        )
        return lease

    def renew_lease(self, lease: int, seconds: float) -> bool:
        """Renew a lease on the server's clock; return False if it has ended."""
        return bool(
            self._ask(
                "update SCHEMA.leases set until = SCHEMA.seconds() + %s "
                "where lease = %s and until > SCHEMA.seconds() returning true",
                [seconds, lease],
            )
        )

    def close_lease(self, lease: int) -> None:
        """End a lease."""
        self._ask("delete from SCHEMA.leases where lease = %s", [lease])

    def holders(self, leases: Sequence[int]) -> list[str | None]:
        """Return the name of the process that holds each lease, or None if the lease has ended."""
        found = dict(
            self._ask(
                "select lease, name from SCHEMA.leases where lease = any (%s::bigint[]) "
                "and until > SCHEMA.seconds()",
                [[*leases]],
            )
        )
        return [None if lease not in found else decoded(found[lease]) for lease in leases]

    def now(self) -> int:
        """Return the server's time in microseconds since 1970."""
        [[seconds]] = self._ask("select extract(epoch from clock_timestamp())::float8")
        return int(seconds * 1e6)

    def servers(self) -> list[Server]:
        """Return the server that is written to; its history is the timeline of its log."""
        [[timeline]] = self._ask(
            "select case when pg_is_in_recovery() then null "
            "else left(pg_walfile_name(pg_current_wal_lsn()), 8) end"
        )
        if timeline is None:
            return []
        return [Server(self.where, timeline, f"{int(timeline, 16) - 1:08X}")]

    # Notifications.

    @property
    def _channel(self) -> str:
        return self.identity.replace(":", "_")

    def _wake(self, keys: Sequence[str]) -> None:
        """Tell those who listen, after the commit: a commit that notifies makes all others wait for it."""
        if keys:
            with contextlib.suppress(Unreachable, StoreError):
                self._ask(
                    "select set_config('synchronous_commit', 'off', true), pg_notify(%s, key) "
                    "from unnest(%s::text[]) as k (key)",
                    [self._channel, [encoded(key).hex() for key in keys]],
                )

    def listen(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call a function, in another thread, with each key that a swap wakes; return what ends this.

        A pooler may not pass notifications on.
        """

        def hear(ended: threading.Event) -> None:
            with contextlib.closing(self._connect()) as connection:
                connection.execute(sql.SQL("listen {}").format(sql.Identifier(self._channel)))
                while not ended.is_set():
                    for notice in connection.notifies(timeout=LISTENS):
                        changed(decoded(bytes.fromhex(notice.payload)))

        return listen(hear, psycopg.Error, OSError)

    # The end.

    def inherit(self) -> None:
        """Begin again in a forked child."""
        self._connections.inherit()

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()


class _Missing(StoreError):  # noqa: N818 - says what is missing
    """The schema has no tables of a cache."""

    def __init__(self, where: str, told: str) -> None:
        super().__init__(
            f"the cache {where} was deleted or replaced while it was open: {told}. Restore it from a copy, "
            "or open it again to begin anew"
        )


class _Connection(psycopg.Connection[Any]):
    """A connection that waits for an answer for some seconds only, also for a server that is stopped."""

    seconds = 0.0

    def wait(self, gen: Generator[Any, Any, _T], interval: float = 0.1, timeout: float | None = None) -> _T:
        more = {} if timeout is None else {"timeout": timeout}  # earlier versions do not know it
        return super().wait(_within(gen, self.seconds) if self.seconds else gen, interval, **more)


def _within(waiting: Generator[Any, Any, _T], seconds: float) -> Generator[Any, Any, _T]:
    """Do what a generator of the client does; raise an error when nothing has come for some seconds."""
    until = time.monotonic() + seconds
    try:
        wanted = next(waiting)
        while True:
            ready = yield wanted
            if ready == Ready.NONE and time.monotonic() > until:
                raise psycopg.OperationalError(f"no answer within {seconds:g} s")
            wanted = waiting.send(ready)
    except StopIteration as end:
        found: _T = end.value
        return found


class _Numbers(list[int]):
    """An array of numbers."""


class _Texts(list[bytes]):
    """An array of bytes."""


class _NumbersDumper(Dumper):
    """Writes an array as the server does; the client's own way takes several times as long."""

    format = psycopg.pq.Format.BINARY
    oid = 1007

    def dump(self, obj: _Numbers) -> bytes:
        return _array(b"\0\0\0\x17", [number.to_bytes(4, signed=True) for number in obj])


class _TextsDumper(Dumper):
    """Writes an array likewise."""

    format = psycopg.pq.Format.BINARY
    oid = 1001

    def dump(self, obj: _Texts) -> bytes:
        return _array(b"\0\0\0\x11", obj)


def _array(kind: bytes, parts: Sequence[bytes]) -> bytes:
    if not parts:
        return b"\0\0\0\0\0\0\0\0%b" % kind
    head = b"\0\0\0\1\0\0\0\0%b%b\0\0\0\1" % (kind, len(parts).to_bytes(4))
    return head + b"".join([each for part in parts for each in (len(part).to_bytes(4), part)])


class _Fields:
    """Fields of several keys, each with the number of its key."""

    def __init__(self) -> None:
        self._numbers = _Numbers()
        self._names = _Texts()

    def add(self, number: int, name: bytes) -> None:
        self._numbers.append(number)
        self._names.append(name)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter((self._numbers, self._names))
