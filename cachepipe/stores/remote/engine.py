"""What an engine of a shared store offers: rows of keys, which are compared and set together.

A row is bytes in a field of a key. An engine does not know what rows mean, except for two prefixes of
fields: ``s/`` is a sample, and ``p/`` is a pending index. The rows of one key are read and written together;
those of different keys need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from cachepipe.errors import NoCache

Rows = dict[bytes, bytes]
"""The rows of one key by field; a field without a row is missing."""

SAMPLE: Final = b"s/"
PENDING: Final = b"p/"

FIELD: Final = b"="
"""Stands before the name of a field, in hexadecimal digits, at the beginning of a row that is followed."""

DIGEST: Final = 8
"""The number of bytes at the beginning of a row that are its digest; rows are compared by them."""

TURN: Final = 0.25
"""Seconds for which a key is reserved for the first process that lost a race for it."""

RECEIPT: Final = 120.0
"""Seconds for which an engine remembers the last swap of a process on a key."""

CHANGES: Final = 65_536
"""The number of announced changes that an engine remembers."""
RECENT: Final = 1000
"""The number of changes that somebody reads who knows none: the latest ones may still be under way."""


class Unreachable(Exception):  # noqa: N818 - says what the engine is
    """The engine cannot answer now: it may answer later, and what was asked may have been done.

    Args:
        told: the reason.
        there: whether a server has said so itself, such as one that starts.
    """

    def __init__(self, told: str, *, there: bool = False) -> None:
        super().__init__(told)
        self.there = there


def no_cache(where: str) -> NoCache:
    """Return the error for a cache that is to be read and does not exist."""
    return NoCache(f"there is no cache to read at {where}. Check the URL, or fill the cache first")


class Read(NamedTuple):
    """What is read of one key, as of one moment.

    Attributes:
        key: the key.
        fields: the fields.
        follow: fields whose rows name what is read too. Behind its digest, such a row begins with a line: the
            indices of samples, or `FIELD` and the name of another field, whose samples are then read too.
        pending: whether the rows of all pending indices are read too.
    """

    key: str
    fields: Sequence[bytes]
    follow: Sequence[bytes] = ()
    pending: bool = False


@dataclass(slots=True)
class Swap:
    """What is written of one key, if the rows that were read are still the same.

    Attributes:
        key: the key.
        nonce: names the swap. If the process's last swap of the key had the same one, it has been performed.
        fair: whether the swap waits while the key is reserved for another process, and reserves it if it
            fails.
        expected: the digest of each row that was read; None where there was no row.
        puts: the rows to write.
        deletes: the fields whose rows are deleted.
        whole: how many rows the key has besides samples and pending indices, if that must be so too: then no
            row was added that was not read.
        wakes: whether those who listen are told, as somebody may wait for what is written.
        changes: whether a draw that was answered before is answered otherwise afterwards; see `Changes`.
        wants: the fields of samples that were not read. The swap is only performed if they are stored, and
            not discarded; it then returns their rows.
    """

    key: str
    nonce: bytes
    fair: bool = False
    expected: dict[bytes, bytes | None] = field(default_factory=dict)
    puts: Rows = field(default_factory=dict)
    deletes: list[bytes] = field(default_factory=list)
    wakes: bool = False
    changes: bool = False
    whole: int | None = None
    wants: Sequence[bytes] = ()


class Conflict(NamedTuple):
    """Why a swap wrote nothing.

    Attributes:
        rows: the current rows of the fields that it had read.
        wait: whether the key is reserved for another process.
    """

    rows: Rows
    wait: bool


class Changes(NamedTuple):
    """The keys whose stored draws are answered otherwise than before, as far as an engine remembers.

    A change is announced before the swap that makes it, and that swap writes its number into a row of the key
    (`rows.CHANGED`). So rows that were read with at least the number of the latest announced change are
    current. A reader that has missed changes, or sees another epoch, must forget all copies.

    Attributes:
        epoch: another one as soon as the engine may have lost writes: it was restarted, replaced or restored.
        keys: the number and the key of each change; the numbers follow one another.
    """

    epoch: str
    keys: Sequence[tuple[int, str]]


class Server(NamedTuple):
    """A server that is written to.

    Attributes:
        where: says where it is.
        history: names what it has written since it became a primary, or was started.
        before: the history that it continues, perhaps without the last writes; empty if it does not say.
    """

    where: str
    history: str
    before: str = ""


class Engine(Protocol):
    """Stores rows on behalf of many processes. Each method is one round trip and may be called in any thread.

    Each method raises `Unreachable` if the engine cannot answer now, and ``StoreError`` for other failures.
    """

    where: str
    """Says where the store is, without credentials."""
    identity: str
    """Identifies the store, whatever it is called."""

    def read(self, reads: Sequence[Read]) -> list[Rows]:
        """Return the rows of each key, as of one moment per key."""
        ...

    def read_soon(self, reads: Sequence[Read], then: Callable[[list[Rows] | None], object]) -> bool:
        """Read as `read` does, on the running event loop and without waiting.

        Args:
            reads: what is read.
            then: gets the rows of each key in a later turn of the loop, or None if they could not be read.

        Returns:
            False if this is not possible now; then `read` is, in a thread.
        """
        ...

    def read_in_turn(self, read: Read, who: int) -> Rows | None:
        """Reserve a key for `TURN` seconds or until the process swaps it, and read as `read` does.

        An engine may also just read.

        Args:
            read: what is read.
            who: the lease of the process.

        Returns:
            The rows; None while the key is reserved for another process.
        """
        ...

    def swap(self, swaps: Sequence[Swap], who: int) -> list[Conflict | Rows | None]:
        """Perform each swap as a whole if its expected rows are current.

        Args:
            swaps: the swaps, each of another key.
            who: the lease of the process.

        Returns:
            For each that was performed the rows that it wants, None if it wants none; else the conflict.
        """
        ...

    def swap_soon(
        self,
        swaps: Sequence[Swap],
        who: int,
        then: Callable[[Sequence[Conflict | Rows | None] | None], object],
    ) -> bool:
        """Perform swaps as `swap` does, on the running event loop and without waiting.

        They leave no receipts, so they must not be tried twice.

        Args:
            swaps: the swaps.
            who: the lease of the process.
            then: gets the answers in a later turn of the loop, or None if it is not known what was performed.

        Returns:
            False if this is not possible now; then `swap` is, in a thread.
        """
        ...

    def announce(self, keys: Sequence[str]) -> list[int]:
        """Announce a change of each key; return their numbers, which are greater than all before."""
        ...

    def changes(self, since: int | None) -> Changes:
        """Return the changes from a number on, that one included; without a number the `RECENT` ones."""
        ...

    def open_lease(self, name: str, seconds: float) -> int:
        """Return the number of a new lease of a process, which ends after some seconds; see `renew_lease`.

        Raises:
            StoreError: when the store was emptied or replaced since the engine was opened.
        """
        ...

    def renew_lease(self, lease: int, seconds: float) -> bool:
        """Renew a lease on the engine's clock; return False if it has ended: an ended lease stays so."""
        ...

    def close_lease(self, lease: int) -> None:
        """End a lease."""
        ...

    def holders(self, leases: Sequence[int]) -> list[str | None]:
        """Return the name of the process that holds each lease, or None if the lease has ended."""
        ...

    def now(self) -> int:
        """Return the engine's time in microseconds since 1970."""
        ...

    def servers(self) -> list[Server]:
        """Return the servers that are written to now. One with another history may have lost writes."""
        ...

    def rows_of(self, keys: Sequence[str]) -> list[Rows]:
        """Return all rows of each key but the samples, as of one moment per key."""
        ...

    def samples_of(self, key: str) -> list[bytes]:
        """Return the fields of all samples of a key, in any order."""
        ...

    def scan(self, prefix: str, fields: Sequence[bytes] = ()) -> Iterator[tuple[str, Rows]]:
        """Iterate over the keys with a prefix, in any order, with all rows but the samples.

        With fields, only these rows are read; a field that ends with ``/`` stands for all that begin with it.
        A key that is written meanwhile may come twice.
        """
        ...

    def strays(self) -> Iterator[str]:
        """Iterate over the keys that have samples and no other row, or that `scan` misses."""
        ...

    def compact(self) -> tuple[int, int] | None:
        """Give back the space of deleted rows; return the bytes before and after.

        None if the engine does so by itself.

        Raises:
            StoreError: when that is not permitted.
        """
        ...

    def listen(self, changed: Callable[[str], None]) -> Callable[[], None] | None:
        """Call a function, in another thread, with each key that a swap wakes; return what ends this.

        An engine without notifications returns None.
        """
        ...

    def inherit(self) -> None:
        """Begin again in a forked child, without the connections of its parent."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...
