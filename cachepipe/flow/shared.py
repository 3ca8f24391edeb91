"""Quotas that the processes of a machine hold together, in a file of a folder that they share.

Each call that is under way, or counts still, is a row. A process that dies leaves rows behind: they expire as
those of the living do, and its calls are no longer counted as under way once the lock of its lease is free.
Time is the machine's monotonic clock, which its processes have in common; rows from before a restart of
the machine are told by having begun in the future. Nothing of a call is in the file but its tokens.

No method waits for the file's lock. A take that meets it held is tried again some milliseconds later; the
end of a call is written with whatever is written next.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cachepipe.errors import StoreError
from cachepipe.stores import leases
from cachepipe.stores.folders import check_files

_AGAIN = 0.005  # seconds until a lock that was held is tried again
_LOOK = 0.05  # seconds between looks whether a call of another process has ended
_CHANGE = 1.0  # seconds between looks whether calls of others have used fewer tokens than was thought
_PATIENCE = 0.5  # seconds after which who waits for a place goes before a process that has as many
_GONE = 0.5  # seconds without a look after which nobody waits there any more
_AHEAD = 60.0  # seconds by which others may be ahead: a time is read before the lock is had
_LONGEST = 90_000.0  # seconds of a pause that are believed
_FILE = "limits.cache.db"  # a name that diskcache leaves alone
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, quota TEXT NOT NULL, owner TEXT NOT NULL, call INTEGER NOT NULL,
    tokens REAL NOT NULL, taken REAL NOT NULL, expires REAL NOT NULL, running INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_quota ON calls (quota, expires);
CREATE INDEX IF NOT EXISTS calls_by_number ON calls (owner, call);
CREATE TABLE IF NOT EXISTS waits (
    quota TEXT NOT NULL, owner TEXT NOT NULL, since REAL NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (quota, owner)
);
CREATE TABLE IF NOT EXISTS pauses (quota TEXT PRIMARY KEY, until REAL NOT NULL);
"""


_calls = itertools.count(1)  # for the process, as its lease is: no two calls of one owner have one number


class Wanted(NamedTuple):
    """A quota that a call is to be taken from.

    Attributes:
        name: what it is called in the file.
        max_requests: calls per interval, or None.
        max_tokens: tokens per interval, or None.
        interval: seconds.
        max_concurrency: calls at once, or None.
        transit: seconds that a request may be on its way.
    """

    name: str
    max_requests: float | None
    max_tokens: float | None
    interval: float
    max_concurrency: int | None
    transit: float


class Taken(NamedTuple):
    """What became of a wish to call.

    Attributes:
        call: what the call is called at its end; None when it may not be made yet.
        wait: in how many seconds to ask again.
        whole: whether all calls have to wait, and not only those of the model.
    """

    call: int | None
    wait: float
    whole: bool


class SharedQuotas:
    """The quotas of one endpoint in a folder. It is used under the lock of its `Limits`.

    Args:
        folder: the folder; it is made if there is none.
        name: what tells the endpoint from others in the same folder.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        self._folder = Path(folder)
        self.name = name
        self._connection: sqlite3.Connection | None = None
        self._lease: leases.Lease | None = None
        self._owner = ""
        self._late: list[tuple[str, tuple[Any, ...]]] = []

    def __repr__(self) -> str:
        return f"<SharedQuotas of {self.name} in {self._folder}>"

    @property
    def late(self) -> bool:
        """Whether something is still to be written."""
        return bool(self._late)

    def take(
        self, everybody: Sequence[Wanted], model: Sequence[Wanted], tokens: float, paused: str, now: float
    ) -> Taken:
        """Take a call from all quotas or from none.

        Args:
            everybody: the quotas that hold for all calls.
            model: those of the model alone.
            tokens: how many the call is thought to use.
            paused: the name under which the model may be paused.
            now: the time.

        Raises:
            StoreError: when the file cannot be used.
        """
        try:
            with self._transaction() as connection:
                return self._take(connection, everybody, model, tokens, paused, now)
        except (sqlite3.Error, OSError) as error:
            if _is_held(error):
                return Taken(None, _AGAIN, whole=True)
            raise StoreError(f"the quotas shared in {self._folder} cannot be used: {error}") from error

    def _take(
        self,
        connection: sqlite3.Connection,
        everybody: Sequence[Wanted],
        model: Sequence[Wanted],
        tokens: float,
        paused: str,
        now: float,
    ) -> Taken:
        wait = self._paused(connection, paused, now)
        for quota in model:
            wait = max(wait, self._wait(connection, quota, tokens, now))
        if wait:
            return Taken(None, wait, whole=False)
        for quota in everybody:
            wait = max(wait, self._wait(connection, quota, tokens, now))
        if wait:
            return Taken(None, wait, whole=True)
        call = next(_calls)
        rows = [
            (
                quota.name,
                self._owner,
                call,
                tokens if quota.max_tokens is None else min(tokens, quota.max_tokens),
                now,
                now + quota.transit + quota.interval,
            )
            for quota in (*everybody, *model)
        ]
        connection.executemany(
            "INSERT INTO calls (quota, owner, call, tokens, taken, expires, running) "
            "VALUES (?, ?, ?, ?, ?, ?, 1)",
            rows,
        )
        return Taken(call, 0.0, whole=True)

    def _wait(self, connection: sqlite3.Connection, quota: Wanted, tokens: float, now: float) -> float:
        connection.execute(
            "DELETE FROM calls WHERE quota = ? AND (expires <= ? AND NOT running OR taken > ?)",
            (quota.name, now, now + _AHEAD),
        )
        calls, used, soonest = connection.execute(
            "SELECT count(*), total(tokens), min(expires) FROM calls WHERE quota = ? AND expires > ?",
            (quota.name, now),
        ).fetchone()
        full = quota.max_requests is not None and calls + 1 > quota.max_requests
        if quota.max_tokens is not None:
            full = full or used + min(tokens, quota.max_tokens) > quota.max_tokens * (1 + 1e-12)
        if full and soonest is not None:
            wait = max(_AGAIN, float(soonest) - now)
            return wait if quota.max_tokens is None else min(wait, _CHANGE)
        if quota.max_concurrency is not None and not self._has_place(connection, quota, now):
            return _LOOK
        return 0.0

    def _has_place(self, connection: sqlite3.Connection, quota: Wanted, now: float) -> bool:
        """Tell whether one more call may be under way, and nobody who waits longer is to have that place.

        Its own calls end where a process sees it at once, so that it would always be the first to ask.
        """
        running = dict[str, int]()
        for owner, count in self._running(connection, quota.name):
            if owner == self._owner or leases.alive(self._folder, owner):
                running[owner] = count
            else:  # its process has died
                connection.execute("UPDATE calls SET running = 0 WHERE owner = ?", (owner,))
        connection.execute("DELETE FROM waits WHERE NOT seen BETWEEN ? AND ?", (now - _GONE, now + _AHEAD))
        since = dict(
            connection.execute("SELECT owner, since FROM waits WHERE quota = ?", (quota.name,)).fetchall()
        )
        mine = (since.pop(self._owner, now), self._owner)
        sooner = sum(
            then <= now - _PATIENCE
            and (then, owner) < mine
            and running.get(owner, 0) <= running.get(self._owner, 0)
            for owner, then in since.items()
        )
        if sum(running.values()) + sooner < (quota.max_concurrency or 0):
            connection.execute("DELETE FROM waits WHERE quota = ? AND owner = ?", (quota.name, self._owner))
            return True
        connection.execute(
            "INSERT INTO waits VALUES (?, ?, ?, ?) "
            "ON CONFLICT (quota, owner) DO UPDATE SET seen = excluded.seen",
            (quota.name, self._owner, now, now),
        )
        return False

    def _running(self, connection: sqlite3.Connection, name: str) -> list[tuple[str, int]]:
        """Return how many calls are under way, by the lease of their process."""
        return connection.execute(
            "SELECT owner, count(*) FROM calls WHERE quota = ? AND running GROUP BY owner", (name,)
        ).fetchall()

    def _paused(self, connection: sqlite3.Connection, name: str, now: float) -> float:
        row = connection.execute("SELECT until FROM pauses WHERE quota = ?", (name,)).fetchone()
        return float(row[0]) - now if row is not None and now < row[0] < now + _LONGEST else 0.0

    def end(self, call: int, tokens: float | None, expires: Sequence[tuple[str, float]]) -> None:
        """Say that a call has ended.

        Args:
            call: what `take` called it.
            tokens: how many it has used, if that is known.
            expires: of each quota, until when it counts, unless it ends before.
        """
        for name, when in expires:
            self._later(
                "UPDATE calls SET running = 0, expires = min(expires, ?), tokens = coalesce(?, tokens) "
                "WHERE owner = ? AND call = ? AND quota = ?",
                (when, tokens, self._owner, call, name),
            )
        self.write()

    def delay(self, call: int, seconds: float) -> None:
        """Let a call count longer that was made some time after it was taken."""
        self._later(
            "UPDATE calls SET expires = expires + ? WHERE owner = ? AND call = ?",
            (seconds, self._owner, call),
        )
        self.write()

    def give_back(self, call: int) -> None:
        """Let a call never have been taken."""
        self._later("DELETE FROM calls WHERE owner = ? AND call = ?", (self._owner, call))
        self.write()

    def pause(self, name: str, until: float) -> None:
        """Let nobody call before a time."""
        self._later(
            "INSERT INTO pauses VALUES (?, ?) "
            "ON CONFLICT (quota) DO UPDATE SET until = max(until, excluded.until)",
            (name, until),
        )
        self.write()

    def _later(self, statement: str, values: tuple[Any, ...]) -> None:
        self._late.append((statement, values))

    def write(self) -> None:
        """Write what is still to be written, unless somebody else is writing.

        Nothing is raised, for it concerns calls that have ended: the next `take` tells what is wrong.
        """
        with contextlib.suppress(sqlite3.Error, OSError), self._transaction():
            pass

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Do something in one transaction, after what is still to be written; or nothing, when it fails."""
        connection = self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in self._late:
                connection.execute(statement, values)
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        self._late.clear()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._lease is None:
                self._lease = leases.hold(self._folder)
                self._owner = self._lease.name
            path = self._folder / _FILE
            check_files(self._folder, _FILE)
            path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = OFF")  # all is stale after a restart
                connection.executescript(_SCHEMA)
                connection.execute("PRAGMA busy_timeout = 0")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def forget(self) -> None:
        """Begin anew in a forked child, which must not use the parent's connection."""
        self._connection = self._lease = None
        self._late = []

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._connection is not None:
            self.write()
            self._connection.close()
            self._connection = None
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _is_held(error: Exception) -> bool:
    """Tell whether an error only says that somebody else holds the lock."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
