"""What a store does, in the contract's own verbs.

A store applies operations, several at a time, each list as one transaction and, for a store
elsewhere, one round trip: **claim** a draw, **commit** samples, **forgo** the lease of samples that
will not come, **leave** a draw. The rest is reading: **recall** a draw that is complete, **glance**
at samples that others generate, and iteration for people who look at a cache.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from cachepipe import forks
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.keys import Question

_ids = itertools.count()
_prefix: tuple[int, str] = (-1, "")


def new_id() -> str:
    """Return a new permanent id: 80 bits drawn at random by this process, and a running number."""
    global _prefix  # noqa: PLW0603 - a forked child draws its own
    if _prefix[0] != forks.count:
        _prefix = (forks.count, secrets.token_hex(10))
    return f"{_prefix[1]}{next(_ids):x}"


State = Literal["stored", "pending", "ours", "free"]


class Sample(NamedTuple):
    """One stored answer of a model.

    Attributes:
        index: its place in the key's sample list.
        id: its permanent id.
        payload: the encoded value (see ``cachepipe.values``).
        header: JSON of its id and stamp, and of the call that made it.
    """

    index: int  # type: ignore[assignment]  # a sample is no sequence that one searches
    id: str
    payload: bytes
    header: bytes

    @property
    def meta(self) -> dict[str, Any]:
        """The header as a mapping: ``id``, ``stamp``, ``call``, ``seconds`` and more."""
        meta: dict[str, Any] = orjson.loads(self.header)
        return meta

    @property
    def at(self) -> float:
        """When it was stored, in seconds since 1970."""
        return float(self.meta["stamp"] / 1e6)


@dataclass(slots=True)
class Claim:
    """Claim ``n`` samples for a draw.

    Attributes:
        draw: whose claim it is.
        n: how many samples, from position 0.
        question: what is asked, stored once per key.
        token: names this claimant among those who may hold the draw at once.
        refresh: replace the draw's samples by new ones.
        user: the namespace's label that uses a shared draw; recorded, takes nothing.
        avoid: indices that the namespace has taken by claims which live in memory.
    """

    draw: Draw
    n: int
    question: Question
    token: str
    refresh: bool = False
    user: str | None = None
    avoid: IntervalSet | None = None


@dataclass(slots=True)
class Grant:
    """What a claim got.

    Attributes:
        indices: the index of each position's sample; ``len(indices) == claim.n``.
        samples: per position, the sample if it exists.
        mine: the indices that the claimant is to generate; the other missing ones are awaited.
        held: the segments of the ledger that the claimant holds until it leaves.
        added: how many positions are new in the ledger.
        fresh_id: True when the namespace had drawn this key before, and not this draw.
        shared: True when another live process made this draw.
        joined: True when others hold the draw too; then the claimant leaves it when it is complete.
    """

    indices: list[int]
    samples: list[Sample | None]
    mine: list[int] = field(default_factory=list)
    held: tuple[int, ...] = ()
    added: int = 0
    fresh_id: bool = False
    shared: bool = False
    joined: bool = False


@dataclass(slots=True)
class Commit:
    """Store one sample.

    Attributes:
        key: the key of its question.
        index: the index that was claimed for it, or None for one that nobody asked for.
        payload: the encoded value.
        meta: what else is recorded: ``call``, ``seconds`` …
        id: the sample's permanent id.
    """

    key: str
    index: int | None
    payload: bytes
    meta: dict[str, Any]
    id: str = field(default_factory=new_id)


class Committed(NamedTuple):
    """Where a sample went.

    Attributes:
        sample: as it is stored now.
        kept: False when its lease was lost and it was stored as an extra, at another index.
    """

    sample: Sample
    kept: bool


@dataclass(slots=True)
class Forgo:
    """Give up the leases of indices that will not be generated here."""

    key: str
    indices: Sequence[int]


@dataclass(slots=True)
class Seize:
    """Take the leases of indices from a live process that has not generated their samples in time.

    What it brings later is kept as an extra.
    """

    key: str
    indices: Sequence[int]


@dataclass(slots=True)
class Leave:
    """End a claimant's hold of a draw; undo the draw when it is incomplete and nobody else holds it.

    Attributes:
        draw: the draw.
        token: who held it.
        held: the segments that it held.
        complete: whether the claimant had what it wanted.
        n: how many samples it was given, when it was complete: these stand.
    """

    draw: Draw
    token: str
    held: tuple[int, ...]
    complete: bool
    n: int = 0


@dataclass(slots=True)
class Discard:
    """Mark a sample as discarded, on record: draws that had it get another at the same position."""

    key: str
    index: int
    why: str


Operation = Claim | Commit | Forgo | Seize | Leave | Discard
Result = Grant | Committed | None


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key of the cache as a listing shows it."""

    key: str
    scope: str | None
    at: float
    samples: int
    pending: int
    namespaces: int


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """What was asked, stored once per key: canonical JSON, its scope, and when."""

    key: str
    scope: str | None
    document: bytes
    at: float


@dataclass(frozen=True, slots=True)
class DrawInfo:
    """A draw as the ledger holds it: its indices by position, and how many were generated for it."""

    draw: Draw
    indices: tuple[int, ...]
    generated: int
    at: float


class DiscardInfo(NamedTuple):
    """A sample that was discarded on record: its index, when (seconds since 1970), and why."""

    index: int  # type: ignore[assignment]  # see Sample
    at: float
    why: str


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """A namespace as a listing shows it: its draws, the samples that it drew and those generated for it."""

    namespace: str | None
    draws: int
    samples: int
    generated: int


class Process(NamedTuple):
    """A process that uses a cache.

    Attributes:
        name: its host and process id, for people.
        stopped: whether it is known to be stopped, by a signal or a debugger.
    """

    name: str
    stopped: bool = False


class Store(Protocol):
    """Where samples, questions and the ledger live."""

    identity: str
    """Names what is stored: two stores in one process with one identity hold the same cache."""
    read_only: bool
    """Whether nothing can be written; ``why_read_only`` says why."""
    why_read_only: str
    wait_for_others: float | None
    """Seconds to wait for a sample that another live process generates before it is generated here; None:
    as long as that process lives."""

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction, or return None at once if that would wait."""
        ...

    def apply(self, operations: Sequence[Operation]) -> Awaitable[list[Result]]:
        """Apply the operations in one transaction, in order, without blocking the event loop.

        If it returns a future, they are on their way by then: nothing is lost with a loop that ends.

        Raises:
            StoreError: when they could not be applied; then none was, but for samples that may lie on
                the shelf already, where a repeated commit of the same id finds them.
        """
        ...

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations without anyone waiting; also works where no event loop runs."""
        ...

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw that the ledger holds whole, else None. Only reads."""
        ...

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of it is stored, else None. Only reads.

        Args:
            draw: whose claim it would be.
            n: how many samples.
            taken: indices that the namespace has taken beside those of the ledger.
        """
        ...

    def glance(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Tell of each (key, index) whether its sample is stored, generated elsewhere or here, or free."""
        ...

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is like it."""
        ...

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample."""
        ...

    def keys(self, prefix: str = "", *, newest: bool = False) -> Iterator[KeyInfo]:
        """Iterate over the keys that start with a prefix, by their first request, or the newest first."""
        ...

    def question(self, key: str) -> StoredQuestion | None:
        """Return what was asked under a key."""
        ...

    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key; None when it is not there, or discarded."""
        ...

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index; discarded ones are left out."""
        ...

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, in order of their making; ``namespace`` is a label."""
        ...

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, in order of their first draw."""
        ...

    def close(self) -> None:
        """Write what is queued and release what the store opened itself. Idempotent."""
        ...


def new_meta(call: str, seconds: float) -> dict[str, Any]:
    """Return what is recorded of a sample beside its value."""
    return {"call": call, "seconds": round(seconds, 6)}
