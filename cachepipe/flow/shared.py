"""Quotas that the processes of one machine share, in a file of a folder that each of them names.

Each call that is in flight, or that still counts, is a row. The rows of a process that has died expire like
others, and its calls no longer count as in flight once the lock of its lease is free. The time is the
machine's monotonic clock, which its processes have in common. Rows from before a restart of the machine are
recognised because they seem to lie in the future. The file contains nothing about a call but its tokens.

No method waits for the file's lock. If a take finds the lock held, the caller tries again some milliseconds
later. The end of a call is written with the next transaction.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cachepipe.errors import StoreError
from cachepipe.flow.windows import Quota
from cachepipe.stores import leases
from cachepipe.stores.folders import check_files
from cachepipe.stores.mounts import check_local

_AGAIN = 0.005  # seconds until a take that found the lock held is tried again
_LOOK = 0.05  # seconds between checks whether a call of another process has ended
_CHANGE = 1.0  # seconds between checks whether calls of others have used fewer tokens than estimated
_PATIENCE = 0.5  # seconds after which a waiting process goes before one that has as many places
_GONE = 0.5  # seconds without a check after which a process no longer counts as waiting
_AHEAD = 60.0  # seconds by which others may be ahead, because they read the time before they have the lock
_LONGEST = 90_000.0  # seconds of the longest pause; longer ones are ignored
_FILE = "limits.cache.db"  # a name that diskcache leaves alone
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, quota TEXT NOT NULL, owner TEXT NOT NULL, call INTEGER NOT NULL,
    tokens REAL NOT NULL, taken REAL NOT NULL, interval REAL NOT NULL, expires REAL NOT NULL,
    running INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_quota ON calls (quota, expires);
CREATE INDEX IF NOT EXISTS calls_by_number ON calls (owner, call);
CREATE TABLE IF NOT EXISTS waits (
    quota TEXT NOT NULL, owner TEXT NOT NULL, since REAL NOT NULL, seen REAL NOT NULL,
    PRIMARY KEY (quota, owner)
);
CREATE TABLE IF NOT EXISTS pauses (quota TEXT PRIMARY KEY, until REAL NOT NULL);
"""


_calls = itertools.count(1)  # one counter per process, as its lease, so that its calls have distinct numbers


class Taken(NamedTuple):
    """The answer to a call that wants to be made.

    Attributes:
        wait: the seconds after which to ask again; 0 if the call may be made.
        whole: whether all calls have to wait, and not only those of the model.
        call: the number of the call in shared quotas.
    """

    wait: float
    whole: bool = True
    call: int | None = None


class SharedQuotas:
    """The quotas of one endpoint in a folder. They are used under the lock of their `Limits`.

    Args:
        folder: the folder, which is made if it does not exist.
        name: identifies the endpoint in the folder.
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
        """Whether something has not been written yet."""
        return bool(self._late)

    def take(
        self,
        quotas: Sequence[Quota],
        model: str | None,
        tokens: float,
        transit: Callable[[float], float],
        now: float,
    ) -> Taken:
        """Take a call from all quotas or from none.

        Args:
            quotas: the quota of all calls, and that of the model if it has one.
            model: the name of the model.
            tokens: the estimated tokens of the call.
            transit: returns the seconds that a request may take to arrive, for an interval.
            now: the time.

        Raises:
            StoreError: when the file cannot be used.
        """
        own_name = f"{self.name} {model or ''}"
        everybody, *own = zip((self.name, own_name), quotas, strict=False)
        try:
            with self._transaction() as connection:
                wait = self._paused(connection, own_name, now)
                for name, quota in own:
                    wait = max(wait, self._wait(connection, name, quota, tokens, now))
                if wait:
                    return Taken(wait, whole=False)
                wait = self._wait(connection, *everybody, tokens, now)
                if wait:
                    return Taken(wait)
                call = next(_calls)
                for name, quota in (everybody, *own):
                    counted = tokens if quota.max_tokens is None else min(tokens, quota.max_tokens)
                    expires = now + transit(quota.interval) + quota.interval
                    connection.execute(
                        "INSERT INTO calls (quota, owner, call, tokens, taken, interval, expires, running) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, 1)",
                        (name, self._owner, call, counted, now, quota.interval, expires),
                    )
                return Taken(0.0, call=call)
        except (sqlite3.Error, OSError) as error:
            if _is_held(error):
                return Taken(_AGAIN)
            raise StoreError(f"the quotas shared in {self._folder} cannot be used: {error}") from error

    def _wait(
        self, connection: sqlite3.Connection, name: str, quota: Quota, tokens: float, now: float
    ) -> float:
        """Return the seconds after which to ask again, or 0 if a call fits into a quota."""
        connection.execute(
            "DELETE FROM calls WHERE quota = ? AND (expires <= ? AND NOT running OR taken > ?)",
            (name, now, now + _AHEAD),
        )
        calls, used, soonest = connection.execute(
            "SELECT count(*), total(tokens), min(expires) FROM calls WHERE quota = ? AND expires > ?",
            (name, now),
        ).fetchone()
        full = quota.max_requests is not None and calls + 1 > quota.max_requests
        if quota.max_tokens is not None:
            full = full or used + min(tokens, quota.max_tokens) > quota.max_tokens * (1 + 1e-12)
        if full and soonest is not None:
            wait = max(_AGAIN, float(soonest) - now)
            return wait if quota.max_tokens is None else min(wait, _CHANGE)
        if quota.max_concurrency is not None and not self._has_place(
            connection, name, quota.max_concurrency, now
        ):
            return _LOOK
        return 0.0

    def _has_place(self, connection: sqlite3.Connection, name: str, most: int, now: float) -> bool:
        """Return True if one more call may be in flight, and no process that waits longer goes before.

        A process notices at once when a call of its own ends, so it would always be the first to ask.
        """
        running = dict[str, int]()
        rows = "SELECT owner, count(*) FROM calls WHERE quota = ? AND running GROUP BY owner"
        for owner, count in connection.execute(rows, (name,)).fetchall():
            if owner == self._owner or leases.alive(self._folder, owner):
                running[owner] = count
            else:  # its process has died
                connection.execute("UPDATE calls SET running = 0 WHERE owner = ?", (owner,))
        connection.execute("DELETE FROM waits WHERE NOT seen BETWEEN ? AND ?", (now - _GONE, now + _AHEAD))
        since = dict(connection.execute("SELECT owner, since FROM waits WHERE quota = ?", (name,)).fetchall())
        mine = (since.pop(self._owner, now), self._owner)
        sooner = sum(
            then <= now - _PATIENCE
            and (then, owner) < mine
            and running.get(owner, 0) <= running.get(self._owner, 0)
            for owner, then in since.items()
        )
        if sum(running.values()) + sooner < most:
            connection.execute("DELETE FROM waits WHERE quota = ? AND owner = ?", (name, self._owner))
            return True
        connection.execute(
            "INSERT INTO waits VALUES (?, ?, ?, ?) "
            "ON CONFLICT (quota, owner) DO UPDATE SET seen = excluded.seen",
            (name, self._owner, now, now),
        )
        return False

    def _paused(self, connection: sqlite3.Connection, name: str, now: float) -> float:
        row = connection.execute("SELECT until FROM pauses WHERE quota = ?", (name,)).fetchone()
        return float(row[0]) - now if row is not None and now < row[0] < now + _LONGEST else 0.0

    def end(self, call: int, tokens: float | None, now: float) -> None:
        """End a call.

        Args:
            call: the number of the call.
            tokens: the tokens that it has used, if known.
            now: the time.
        """
        self._later(
            "UPDATE calls SET running = 0, expires = min(expires, ? + interval), "
            "tokens = coalesce(?, tokens) WHERE owner = ? AND call = ?",
            (now, tokens, self._owner, call),
        )

    def delay(self, call: int, seconds: float) -> None:
        """Count a call longer, because it was made some time after it was taken."""
        self._later(
            "UPDATE calls SET expires = expires + ? WHERE owner = ? AND call = ?",
            (seconds, self._owner, call),
        )

    def give_back(self, call: int) -> None:
        """Remove a call, as if it had never been taken."""
        self._later("DELETE FROM calls WHERE owner = ? AND call = ?", (self._owner, call))

    def pause(self, model: str | None, until: float) -> None:
        """Let no process call a model before a time."""
        self._later(
            "INSERT INTO pauses VALUES (?, ?) "
            "ON CONFLICT (quota) DO UPDATE SET until = max(until, excluded.until)",
            (f"{self.name} {model or ''}", until),
        )

    def _later(self, statement: str, values: tuple[Any, ...]) -> None:
        self._late.append((statement, values))
        self.write()

    def write(self) -> None:
        """Write what has not been written yet, unless another process is writing.

        Nothing is raised, because it concerns calls that have ended. The next `take` raises what is wrong.
        """
        with contextlib.suppress(sqlite3.Error, OSError), self._transaction():
            pass

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction, which begins with what has not been written yet. A failure undoes all of it."""
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
            check_local(
                "the quotas",
                self._folder.resolve(),
                "Processes of one machine share them: name a local folder",
            )
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
                connection.execute("PRAGMA synchronous = OFF")  # nothing is valid after a restart
                connection.executescript(_SCHEMA)
                connection.execute("PRAGMA busy_timeout = 0")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def forget(self) -> None:
        """Start again in a forked child, which must not use the parent's connection."""
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
    """Return True if an error only says that another process holds the lock."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
