"""What an engine offers: the rows of a key and of a draw, read and written inside one transaction.

``cachepipe.stores.operations`` decides with ``cachepipe.contract`` what is written. An engine keeps rows: it
reads what is asked for, or more in advance, and writes what it is told to, all of it or none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from cachepipe.accounting import RunSums
from cachepipe.contract.allotment import Discarded, Segment
from cachepipe.contract.budgets import Purse
from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import IntervalSet, MutableIndexSet
from cachepipe.errors import DamagedCache
from cachepipe.stores.base import Claim, Sample


class DrawView(ABC):
    """One draw and its key, for reading; ``contract.allotment`` sees them as a `KeyView`.

    Attributes:
        name: the key.
        listed: the indices whose samples are stored or being generated.
        taken: the indices that the draw's namespace has taken.
        segments: the draw's segments, in order of writing.
    """

    __slots__ = ()

    name: str
    listed: MutableIndexSet
    taken: MutableIndexSet
    segments: list[Segment]

    @abstractmethod
    def sample(self, index: int) -> Sample | Discarded | None:
        """Return the sample at an index, `DISCARDED`, or None."""

    @abstractmethod
    def others(self) -> Sequence[Segment]:
        """Return the segments of the same draw in the earliest other namespace.

        The earliest one has the segment with the lowest stamp. The shared draw's namespace is left out.
        """

    def lease(self, index: int) -> bool:  # noqa: ARG002 - a reader generates nothing
        """Return False: a reader takes no lease."""
        return False


class KeyRows(ABC):
    """The rows of one key.

    Attributes:
        name: the key.
        listed: the indices whose samples are stored or being generated.
    """

    __slots__ = ()

    name: str
    listed: MutableIndexSet

    @abstractmethod
    def sample(self, index: int) -> Sample | Discarded | None:
        """Return the sample at an index, `DISCARDED`, or None."""

    @abstractmethod
    def has_row(self, index: int) -> bool:
        """Return True if a sample is stored, even a damaged or a discarded one."""

    @abstractmethod
    def pending(self, index: int) -> int | None:
        """Return the lease of the process that generates a sample, or None."""

    @abstractmethod
    def pend(self, index: int) -> None:
        """Note that this process generates a sample; nobody generated it before."""

    @abstractmethod
    def unpend(self, index: int) -> None:
        """Note that nobody generates a sample."""

    @abstractmethod
    def discard(self, index: int, why: str) -> None:
        """Mark a sample as discarded, and record why; keep its bytes, and the first reason."""

    @abstractmethod
    def drawn(self) -> IntervalSet:
        """Return the indices in all segments of draws, also in those that later ones override.

        No draw is added before the transaction ends.
        """

    @abstractmethod
    def makers(self, namespace: str) -> tuple[set[int], set[int]]:
        """Return the leases of claimants that hold parts of a namespace's draws, and those that made them."""

    @abstractmethod
    def withdraw(self, namespace: str) -> None:
        """Delete the draws of a namespace, by its label, and what it has taken and used."""

    @abstractmethod
    def users(self) -> list[str]:
        """Return the labels of the namespaces that use the shared draw."""


class DrawRows(DrawView, KeyRows):
    """The rows of one draw and of its key.

    Attributes:
        is_new: whether nobody has claimed a sample of the key yet.
    """

    __slots__ = ()

    is_new: bool

    @abstractmethod
    def add(self, segment: Segment, generated: int) -> None:
        """Add a segment, and how many of its indices are to be generated for the draw."""

    @abstractmethod
    def insert(self, segment: Segment, generated: int) -> None:
        """Add a segment of another cache, which may be earlier than those of other namespaces.

        Its indices are noted as taken.
        """

    @abstractmethod
    def replace(self, segment: Segment) -> None:
        """Rewrite the segment that has the same number."""

    @abstractmethod
    def drop(self, segment: Segment) -> None:
        """Delete a segment."""

    @abstractmethod
    def hold(self, number: int, token: str) -> None:
        """Note that a claimant of this process holds a segment that another claimant wrote."""

    @abstractmethod
    def unhold(self, number: int, token: str) -> bool:
        """Delete what ``hold`` has noted; return False if nothing was noted."""

    @abstractmethod
    def holders(self, number: int) -> Iterable[int]:
        """Iterate over the leases of the claimants that ``hold`` has noted."""

    @abstractmethod
    def use(self, namespace: str) -> None:
        """Record that a namespace, by its label, uses the key's shared draw."""

    def begin(self, segment: Segment) -> None:
        """Add the first segment of a new key; this process generates all of it."""
        for index in segment.indices:
            self.pend(index)
            self.listed.add(index)
            self.taken.add(index)
        self.add(segment, len(segment.indices))

    def lease(self, index: int) -> bool:
        """Take the lease of an index without a sample; return False if a live process has it.

        Raises:
            DamagedCache: when the list says that the sample is stored.
        """
        if index not in self.listed:
            self.pend(index)
            self.listed.add(index)
            return True
        if self.pending(index) is None:
            raise DamagedCache(
                f"sample {index} of key {self.name} is listed in the ledger but missing among the samples. "
                "Run `cachepipe verify --repair` to have such samples generated anew, or restore the cache "
                "from a copy"
            )
        return False


class Ledger(ABC):
    """The rows of all keys, inside one transaction."""

    @abstractmethod
    def lease(self) -> int:
        """Return this process's lease; begin one if there is none."""

    @abstractmethod
    def alive(self, lease: int) -> bool:
        """Return True if the process of a lease is alive. Once it was dead, it stays dead."""

    @abstractmethod
    def made_by_others(self, leases: set[int]) -> bool:
        """Return True if one of the leases is that of another live process."""

    @abstractmethod
    def pending_of(self, lease: int) -> Iterable[tuple[KeyRows, int]]:
        """Return what the process of a lease was generating."""

    @abstractmethod
    def end(self, lease: int) -> None:
        """End the lease of a dead process: delete what it was generating and holding."""

    @abstractmethod
    def stamp(self) -> int:
        """Return a stamp that is greater than every stamp seen so far."""

    @abstractmethod
    def author(self) -> tuple[int, int]:
        """Return this process's lease and a new stamp."""

    @abstractmethod
    def prepare(self, claims: Sequence[Claim]) -> Iterable[int]:
        """Read what claims will probably need, if that helps; return the leases of dead processes.

        An engine may look for dead processes now and then. It returns each until ``end`` is called.
        """

    @abstractmethod
    def claimed(self, claim: Claim) -> DrawRows:
        """Return the rows of the draw that claims; store its question if it is new."""

    @abstractmethod
    def draw(self, draw: Draw) -> DrawRows:
        """Return the rows of a draw of a known key; the segments are read at once."""

    @abstractmethod
    def key(self, name: str) -> KeyRows:
        """Return the rows of a key.

        Raises:
            StoreError: when nobody has asked the question.
        """

    @abstractmethod
    def entries(self, keys: Sequence[str]) -> list[Entry | None]:
        """Return all that is held of some questions; None for each that is not known."""

    @abstractmethod
    def adopted(self, entry: Entry) -> KeyRows:
        """Return the rows of an entry's key; store its question if it is new."""

    def inserting(self, draw: Draw) -> DrawRows:
        """Return the rows of a draw of another cache, whose key was adopted; only ``insert`` is called."""
        return self.draw(draw)

    @abstractmethod
    def put(self, samples: Sequence[tuple[str, Sample]]) -> None:
        """Store samples with their keys, durably, at indices that are not listed."""

    @abstractmethod
    def store(self, key: str, sample: Sample) -> bool:
        """Store a sample, durably; return False if there is one at its index."""

    @abstractmethod
    def store_pending(self, samples: Sequence[tuple[str, Sample]]) -> bool:
        """Store samples with their keys, durably, and note that nobody generates them any more.

        Returns:
            False, and nothing has changed, unless this process generates all of them and none is stored.
        """

    @abstractmethod
    def erase(self, samples: Sequence[tuple[KeyRows, int, str]]) -> None:
        """Discard samples, each with its key and the reason; their headers stay, and their content goes."""

    @abstractmethod
    def delete(self, keys: Sequence[KeyRows]) -> list[bool]:
        """Delete all rows of keys that have no draws; return for each whether that was possible now."""

    @abstractmethod
    def removals(self) -> Iterable[dict[str, Any]]:
        """Return the records of what is removed, in any order."""

    @abstractmethod
    def put_removal(self, name: str, document: bytes) -> None:
        """Write the record of what is removed, by its id."""

    @abstractmethod
    def sums(self, run: str, namespace: str) -> RunSums:
        """Return what a run has noted in a namespace, by its label."""

    @abstractmethod
    def put_sums(self, run: str, namespace: str, sums: RunSums) -> None:
        """Write these sums."""

    @abstractmethod
    def purse(self, namespace: str) -> Purse:
        """Return what a namespace, by its label, has spent of its budget."""

    @abstractmethod
    def put_purse(self, namespace: str, purse: Purse) -> None:
        """Write it."""
