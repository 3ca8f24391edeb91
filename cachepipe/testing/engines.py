"""An engine of shared stores in memory: several stores, each as a process of its own, share one table."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cachepipe.stores.remote.engine import (
    CHANGES,
    DIGEST,
    FIELD,
    PENDING,
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
)
from cachepipe.stores.tables import GONE


class MemoryEngine:
    """Rows in dictionaries, with faults that a test switches on.

    Args:
        clock: returns the time in seconds since 1970.

    Attributes:
        rows: the rows of each key.
        before_swap: called with the swaps before they are performed; a test may change rows, or raise
            `Unreachable`.
        after_swap: called with the swaps after they were performed, before anyone hears of it.
        trips: the number of calls.
        epoch: what `changes` returns; a test that takes writes back sets another one.
    """

    where = "memory"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.identity = f"memory:{secrets.token_hex(8)}"
        self.rows: dict[str, Rows] = {}
        self.before_swap: Callable[[Sequence[Swap]], None] | None = None
        self.after_swap: Callable[[Sequence[Swap]], None] | None = None
        self.trips = 0
        self.epoch = ""
        self.down = False
        self._clock = clock
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._leases: dict[int, tuple[str, float]] = {}
        self._turns: dict[str, tuple[int, float]] = {}
        self._receipts: dict[tuple[str, int], tuple[bytes, float]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._changes: list[tuple[int, str]] = []
        self._failovers = 0

    def __repr__(self) -> str:
        return f"<MemoryEngine {len(self.rows)} keys, {self.trips} trips>"

    def _called(self) -> None:
        self.trips += 1
        if self.down:
            raise Unreachable("it is down")

    def read(self, reads: Sequence[Read]) -> list[Rows]:
        """Return the rows of each key."""
        self._called()
        with self._lock:
            return [self._read(read) for read in reads]

    def _read(self, read: Read) -> Rows:
        there = self.rows.get(read.key, {})
        wanted = list(read.fields)
        for name in read.follow:
            named = _named(there.get(name, b""))
            if named.startswith(FIELD):
                wanted.append(bytes.fromhex(named[1:].decode()))
                named = _named(there.get(wanted[-1], b""))
            wanted += [SAMPLE + index for index in named.split(b",") if index.isdigit()]
        if read.pending:
            wanted += [name for name in there if name.startswith(PENDING)]
        return {name: there[name] for name in wanted if name in there}

    def read_soon(self, reads: Sequence[Read], then: Callable[[list[Rows] | None], object]) -> bool:  # noqa: ARG002 - see below
        """Return False: it is read in a thread."""
        return False

    def read_in_turn(self, read: Read, who: int) -> Rows | None:
        """Reserve a key for a process, and read; return None while it is reserved for another process."""
        self._called()
        with self._lock:
            now = self._clock()
            holder, until = self._turns.get(read.key, (who, 0.0))
            if now >= until:
                self._turns[read.key] = (who, now + TURN)
            elif holder != who:
                return None
            return self._read(read)

    def swap(self, swaps: Sequence[Swap], who: int) -> list[Conflict | Rows | None]:
        """Perform each swap whose expected rows are current."""
        self._called()
        if self.before_swap is not None:
            self.before_swap(swaps)
        with self._lock:
            results = [self._swap(swap, who) for swap in swaps]
        if self.after_swap is not None:
            self.after_swap(swaps)
        return results

    def _swap(self, swap: Swap, who: int) -> Conflict | Rows | None:
        there, now = self.rows.setdefault(swap.key, {}), self._clock()
        wanted = {name: there[name] for name in swap.wants if name in there} if swap.wants else None
        nonce, until = self._receipts.get((swap.key, who), (b"", 0.0))
        if nonce == swap.nonce and now < until:
            return wanted
        holder, until = self._turns.get(swap.key, (who, 0.0))
        reserved = swap.fair and now < until and holder != who
        current = {name: there[name] for name in swap.expected if name in there}
        changed = any(
            current.get(name, b"")[:DIGEST] != (digest or b"") for name, digest in swap.expected.items()
        )
        changed = changed or any(there.get(name, GONE).startswith(GONE) for name in swap.wants)
        if swap.whole is not None:
            changed = changed or swap.whole != sum(not name.startswith((SAMPLE, PENDING)) for name in there)
        if reserved or changed:
            if swap.fair and now >= until:
                self._turns[swap.key] = (who, now + TURN)
            return Conflict(current, reserved)
        there.update(swap.puts)
        for name in swap.deletes:
            there.pop(name, None)
        self._receipts[swap.key, who] = (swap.nonce, now + RECEIPT)
        if holder == who:
            self._turns.pop(swap.key, None)
        for listener in list(self._listeners) if swap.wakes else ():
            listener(swap.key)
        return wanted

    def swap_soon(self, swaps: Sequence[Swap], who: int, then: Callable[[Any], object]) -> bool:  # noqa: ARG002 - see below
        """Return False: it is swapped in a thread."""
        return False

    def announce(self, keys: Sequence[str]) -> list[int]:
        """Announce a change of each key; return their numbers."""
        self._called()
        with self._lock:
            last = self._changes[-1][0] if self._changes else 0
            numbers = [*range(last + 1, last + 1 + len(keys))]
            self._changes = [*self._changes, *zip(numbers, keys, strict=True)][-CHANGES:]
            return numbers

    def changes(self, since: int | None) -> Changes:
        """Return the changes from a number on; without a number the recent ones."""
        self._called()
        with self._lock:
            if since is None:
                return Changes(self.epoch, self._changes[-RECENT:])
            return Changes(self.epoch, [change for change in self._changes if change[0] >= since])

    def open_lease(self, name: str, seconds: float) -> int:
        """Return the number of a new lease."""
        self._called()
        with self._lock:
            lease = next(self._numbers)
            self._leases[lease] = (name, self._clock() + seconds)
            return lease

    def renew_lease(self, lease: int, seconds: float) -> bool:
        """Renew a lease; return False if it has ended."""
        self._called()
        with self._lock:
            [name] = self.holders([lease])
            if name is None:
                return False
            self._leases[lease] = (name, self._clock() + seconds)
            return True

    def close_lease(self, lease: int) -> None:
        """End a lease."""
        self._called()
        self._leases.pop(lease, None)

    def holders(self, leases: Sequence[int]) -> list[str | None]:
        """Return the name of the process that holds each lease."""
        self._called()
        found = [self._leases.get(lease, (None, 0.0)) for lease in leases]
        return [name if self._clock() < until else None for name, until in found]

    def now(self) -> int:
        """Return the time in microseconds since 1970."""
        self._called()
        return int(self._clock() * 1e6)

    # Failovers.

    def servers(self) -> list[Server]:
        """Return the one server."""
        self._called()
        return [Server(self.where, str(self._failovers), str(self._failovers - 1))]

    def replica(self) -> dict[str, Rows]:
        """Return a copy of the rows, which is behind as soon as others are written."""
        with self._lock:
            return {key: dict(there) for key, there in self.rows.items()}

    def fail_over(self, replica: dict[str, Rows]) -> None:
        """Go on with the rows of a replica: what was written since it was copied is lost."""
        with self._lock:
            self.rows = replica
            self._failovers += 1
            self._receipts.clear()
            self._turns.clear()

    def rows_of(self, keys: Sequence[str]) -> list[Rows]:
        """Return all rows of each key but the samples."""
        self._called()
        with self._lock:
            return [
                {name: row for name, row in self.rows.get(key, {}).items() if not name.startswith(SAMPLE)}
                for key in keys
            ]

    def samples_of(self, key: str) -> list[bytes]:
        """Return the fields of all samples of a key."""
        self._called()
        with self._lock:
            return [name for name in self.rows.get(key, {}) if name.startswith(SAMPLE)]

    def scan(self, prefix: str, fields: Sequence[bytes] = ()) -> Iterator[tuple[str, Rows]]:
        """Iterate over the keys with a prefix, without the samples."""
        self._called()
        kinds = tuple(name for name in fields if name.endswith(b"/"))
        with self._lock:
            found = [
                (
                    key,
                    {
                        name: row
                        for name, row in there.items()
                        if (
                            name in fields or name.startswith(kinds)
                            if fields
                            else not name.startswith(SAMPLE)
                        )
                    },
                )
                for key, there in self.rows.items()
                if key.startswith(prefix)
            ]
        return iter(found)

    def strays(self) -> Iterator[str]:
        """Iterate over the keys that have samples or pending indices and no other row."""
        with self._lock:
            found = [
                key
                for key, there in self.rows.items()
                if there and all(name.startswith((SAMPLE, PENDING)) for name in there)
            ]
        return iter(found)

    def compact(self) -> None:
        """Do nothing: what is deleted is gone."""

    def listen(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call a function with each key that is woken."""
        self._listeners.append(changed)
        return lambda: self._listeners.remove(changed)

    def inherit(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: others may use it."""


def _named(row: bytes) -> bytes:
    """Return the line at the beginning of a row that is followed."""
    return row[DIGEST:].partition(b"\n")[0]
