"""What a store does, in the contract's own verbs.

A store applies lists of operations, each list as one transaction and, for a remote store, one round trip:
**claim** a draw, **commit** samples, **release leases** of samples that will not come, **release the hold**
of a draw, **note** what was delivered. The rest is reading: **recall** a draw that is complete, the
**status** of samples that others generate, and iteration for people who look at a cache.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from cachepipe import forks
from cachepipe.accounting import Account, Delivered, RunSums
from cachepipe.contract.budgets import RowCost
from cachepipe.contract.draws import Draw
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.contract.schedule import LAST, Place
from cachepipe.errors import StoreError

_STAMP = b'","stamp":'  # in a header it follows the id
_ORIGIN = b',"origin":'
_ids = itertools.count()
_prefix: tuple[int, str] = (-1, "")


def new_id() -> str:
    """Return a new permanent id: 80 random bits of this process, and a running number."""
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


def place_of(header: bytes) -> Place:
    """Return the place in the schedule of a sample with this header; the last one if it was not stored."""
    start = header.find(_STAMP) + len(_STAMP)
    if start < len(_STAMP):
        return LAST
    return Place(int(header[start : header.find(b",", start)]))


def with_origin(header: bytes, origin: int) -> bytes:
    """Return the header of a sample that another cache has generated at another index, which it notes.

    It stands behind the stamp, as what was sold must come last.
    """
    at = _after_stamp(header)
    return b"%b%b%d%b" % (header[:at], _ORIGIN, origin, header[at:])


def without_origin(header: bytes) -> tuple[bytes, int | None]:
    """Return a header as it was written first, and the index at which the sample was generated, if noted."""
    at = _after_stamp(header)
    end = _end_of_number(header, at + len(_ORIGIN))
    digits = header[at + len(_ORIGIN) : end]
    if not header.startswith(_ORIGIN, at) or not digits.isdigit():
        return header, None
    return header[:at] + header[end:], int(digits)


def _after_stamp(header: bytes) -> int:
    return _end_of_number(header, header.find(_STAMP) + len(_STAMP))


def _end_of_number(header: bytes, start: int) -> int:
    end = header.find(b",", start)
    return end if end >= 0 else len(header) - 1


@dataclass(slots=True)
class Claim:
    """Claim ``n`` samples for a draw.

    Attributes:
        draw: the draw that claims.
        n: how many samples, from position 0.
        question: the question, stored once per key.
        token: identifies this claimant among those who hold the draw at the same time.
        refresh: replace the draw's samples by new ones.
        user: the label of the namespace that uses a shared draw; it is recorded and takes no sample.
        avoid: indices that claims in memory have taken in the namespace.
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
    """The result of a claim.

    Attributes:
        indices: the index of each position's sample; ``len(indices) == claim.n``.
        samples: per position, the sample if it exists.
        mine: the indices that the claimant must generate; it awaits the other missing ones.
        held: the segments of the ledger that the claimant holds until it releases them.
        added: how many positions are new in the ledger.
        fresh_id: True if the namespace had drawn this key before, but not with this draw.
        shared: True if another live process made this draw.
        joined: True if others hold the draw too; the claimant then releases its hold at completion.
        place: the place in the schedule that the draw has noted, if any (C11).
    """

    indices: list[int]
    samples: list[Sample | None]
    mine: list[int] = field(default_factory=list)
    held: tuple[int, ...] = ()
    added: int = 0
    fresh_id: bool = False
    shared: bool = False
    joined: bool = False
    place: Place | None = None


@dataclass(slots=True)
class Ahead:
    """What earlier draws of a plan would take of a key; nothing of it is in the store.

    Attributes:
        listed: indices that they would generate.
        taken: indices that they would take in the namespace.
        held: the indices of the shared draw.
    """

    listed: IntervalSet = field(default_factory=IntervalSet)
    taken: IntervalSet = field(default_factory=IntervalSet)
    held: list[int] = field(default_factory=list)


class Foreseen(NamedTuple):
    """What a claim would get.

    Attributes:
        samples: the samples that are stored.
        generated: how many samples the model would be asked for.
        awaited: the indices of samples that other processes generate, or were generating when they ended.
        known: whether the question is stored.

    The other samples are those that earlier draws of the plan would generate.
    """

    samples: list[Sample]
    generated: int
    awaited: list[int]
    known: bool = True


@dataclass(slots=True)
class Commit:
    """Store one sample.

    Attributes:
        key: the key of its question.
        index: the index that was claimed for it, or None for an extra.
        payload: the encoded value.
        meta: further facts to record: ``call``, ``seconds`` …
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
        sample: the sample as it is stored.
        kept: False if its lease was lost and it was stored as an extra, at another index.
    """

    sample: Sample
    kept: bool


@dataclass(slots=True)
class ReleaseLease:
    """Give up the leases of indices that will not be generated here."""

    key: str
    indices: Sequence[int]


@dataclass(slots=True)
class Seize:
    """Take the leases of indices from a live process that has not generated their samples in time.

    If that process still commits them later, they are stored as extras.
    """

    key: str
    indices: Sequence[int]


@dataclass(slots=True)
class ReleaseHold:
    """End a claimant's hold of a draw; undo the draw when it is incomplete and nobody else holds it.

    Attributes:
        draw: the draw.
        token: the claimant.
        held: the segments that it held.
        complete: whether the claimant received all samples.
        n: how many samples it received, if it was complete: these are never undone.
    """

    draw: Draw
    token: str
    held: tuple[int, ...]
    complete: bool
    n: int = 0


@dataclass(slots=True)
class Discard:
    """Mark a sample as discarded, on record: its draws get another sample at the same position."""

    key: str
    index: int
    why: str


@dataclass(slots=True)
class Withdraw:
    """Remove all draws of a question that some namespaces have made; its samples stay.

    The shared draw is removed if its label is given and no other namespace uses it.

    Attributes:
        key: the key of the question.
        namespaces: the labels of the namespaces.
    """

    key: str
    namespaces: Collection[str]


@dataclass(slots=True)
class Erase:
    """Delete samples that no draw has, on record; their indices and headers stay.

    So no other sample gets their indices, and what they have cost still counts as spent.

    Attributes:
        key: the key of their question.
        indices: their indices; those that a draw has are left alone.
        why: the reason, which is recorded with each.
    """

    key: str
    indices: Sequence[int]
    why: str


class Erased(NamedTuple):
    """The samples that were deleted.

    Attributes:
        indices: their indices.
    """

    indices: Sequence[int]


@dataclass(slots=True)
class Drop:
    """Delete an empty question: one without draws and samples. All notes on it go too.

    Attributes:
        key: the key of the question.
        indices: the indices of its samples, which are all deleted or discarded.
    """

    key: str
    indices: Sequence[int]


class Dropped(NamedTuple):
    """What became of a question.

    Attributes:
        gone: whether it was deleted. If not, it is used, or it is deleted when the operation is repeated.
    """

    gone: bool


class OthersRemove(StoreError):  # noqa: N818 - says what happens
    """Another command removes something from the store."""


@dataclass(slots=True)
class RecordRemoval:
    """Record what a command removes; a later record with the same id replaces it.

    It is refused while another command of a live process removes something: each counts what the samples that
    it deletes have cost, and two would count the same ones.

    Attributes:
        id: identifies the record.
        document: JSON of what is removed, and why; an object.
        running: whether the command goes on; otherwise, nothing is refused.
    """

    id: str
    document: bytes
    running: bool = False


@dataclass(slots=True)
class Note:
    """Add to the sums of what a run has delivered in a namespace (C6).

    Attributes:
        run: the name of the run.
        namespace: the label of the namespace.
        delivered: what is added to the sums.
        unreported: samples that were generated, and neither stored nor delivered.
    """

    run: str
    namespace: str
    delivered: Delivered = field(default_factory=Delivered)
    unreported: Account = field(default_factory=Account)


@dataclass(slots=True)
class AdoptSums:
    """Take what a run has noted in a namespace of another cache, unless the store has a later copy.

    Attributes:
        run: the name of the run.
        namespace: the label of the namespace.
        sums: what it has noted.
    """

    run: str
    namespace: str
    sums: RunSums


@dataclass(slots=True)
class NotePlace:
    """Note the place in the schedule at which a draw was handed over (C11).

    Attributes:
        draw: the draw.
        n: how many samples were handed over, from position 0.
        place: the place.
    """

    draw: Draw
    n: int
    place: Place


@dataclass(slots=True)
class Adopt:
    """Add what another cache holds of a question, if the store does not contradict it.

    Attributes:
        entry: what the other cache holds.
    """

    entry: Entry

    @property
    def key(self) -> str:
        """The key of the question."""
        return self.entry.key


class Adopted(NamedTuple):
    """What was added of an entry.

    Attributes:
        samples: how many samples were new.
        draws: how many draws were new, or became longer.
        different: the draws that contradict those of the store; if there are any, nothing was added.
        altered: the ids of samples that differ from those of the store; likewise.
        new: whether the question was new.
        changed: whether anything was added.
    """

    samples: int = 0
    draws: int = 0
    different: Sequence[Draw] = ()
    altered: Sequence[str] = ()
    new: bool = False
    changed: bool = False


@dataclass(slots=True)
class Reserve:
    """Reserve a part of a namespace's budget for a call; amounts are nano-dollars.

    Attributes:
        namespace: the label of the namespace.
        call: identifies the call.
        amount: how much is reserved; 0 only returns the state.
        limit: the budget.
    """

    namespace: str
    call: str
    amount: int
    limit: int


class Reserved(NamedTuple):
    """The state of a budget.

    Attributes:
        granted: whether the amount was reserved.
        spent: what was spent.
        reserved: what calls in flight have reserved.
        lost: whether a process has ended with reservations; nothing is granted until the rows have been
            summed again.
    """

    granted: bool
    spent: int
    reserved: int
    lost: bool


@dataclass(slots=True)
class Settle:
    """Replace the reservation of a call by what it has cost; its samples must be stored before.

    Attributes:
        namespace: the label of the namespace.
        call: identifies the call.
        spent: what it has cost, in nano-dollars.
    """

    namespace: str
    call: str
    spent: int


@dataclass(slots=True)
class BeginSum:
    """Begin to sum up what the rows of a namespace have cost; see `cachepipe.contract.budgets.Purse`.

    Attributes:
        namespace: the label of the namespace.
        name: identifies the sum.
    """

    namespace: str
    name: str


class SumBegun(NamedTuple):
    """What a sum of rows must know.

    Attributes:
        calls: the calls whose rows it must tell apart.
        ended: those of them whose processes have ended.
    """

    calls: Collection[str]
    ended: Collection[str]


class RowSum(NamedTuple):
    """What the rows of a namespace have cost, in nano-dollars.

    Attributes:
        rest: what all rows have cost that are not told apart.
        apart: what the others have cost, by the calls that reserved for them.
    """

    rest: int
    apart: Sequence[RowCost]


@dataclass(slots=True)
class EndSum:
    """Take a sum of the rows of a namespace.

    Attributes:
        namespace: the label of the namespace.
        name: identifies the sum.
        found: the sum; None if the rows could not be summed.
        ended: what `SumBegun` has returned.
    """

    namespace: str
    name: str
    found: RowSum | None = None
    ended: Collection[str] = ()


OfBudget = Reserve | Settle | BeginSum | EndSum
"""The operations on the budget of a namespace."""


Operation = (
    Claim
    | Commit
    | ReleaseLease
    | Seize
    | ReleaseHold
    | Discard
    | Withdraw
    | Erase
    | Drop
    | RecordRemoval
    | Note
    | AdoptSums
    | NotePlace
    | OfBudget
    | Adopt
)
Result = Grant | Committed | Reserved | SumBegun | Adopted | Erased | Dropped | None


class PartlyApplied(StoreError):  # noqa: N818 - names the state
    """Some operations were applied and others were not, since they concern different keys.

    Attributes:
        results: the result of each operation, or the error of one that was not applied.
    """

    def __init__(self, results: Sequence[Result | Exception]) -> None:
        self.results = results
        super().__init__(next(str(result) for result in results if isinstance(result, Exception)))


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key of the cache, for listings."""

    key: str
    scope: str | None
    at: float
    samples: int
    pending: int
    namespaces: int


@dataclass(frozen=True, slots=True)
class StoredQuestion:
    """A question, stored once per key: canonical JSON, its scope, and the time of its first request."""

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
    """A namespace, for listings: its draws, the samples that it drew and those generated for it."""

    namespace: str | None
    draws: int
    samples: int
    generated: int


class Bought(NamedTuple):
    """What a stored sample says about its price.

    Attributes:
        scope: the scope of its question.
        header: JSON of its id and stamp, and of the call that made it; empty if it cannot be read.
        held: whether a namespace holds it.
    """

    scope: str | None
    header: bytes
    held: bool


class Process(NamedTuple):
    """A process that uses a cache.

    Attributes:
        name: its host and process id, for people.
        stopped: whether it is known to be stopped, by a signal or a debugger.
    """

    name: str
    stopped: bool = False


class Store(Protocol):
    """Stores samples, questions and the ledger."""

    identity: str
    """Identifies the cache: two stores of one process with the same identity hold the same cache."""
    read_only: bool
    """Whether nothing can be written; ``why_read_only`` says why."""
    why_read_only: str
    wait_for_others: float | None
    """Seconds to wait for a sample that another live process generates before generating it here; None waits
    as long as that process lives."""

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations in one transaction; return None at once if that would have to wait."""
        ...

    def apply(self, operations: Sequence[Operation]) -> Awaitable[list[Result]]:
        """Apply the operations in one transaction, in order, without blocking the event loop.

        If it returns a future, the operations are already queued, and are applied even if the loop ends.

        Raises:
            StoreError: when they could not be applied; then none was, except that samples may be stored
                already, and a repeated commit with the same id finds them.
        """
        ...

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations in the background; this also works without an event loop."""
        ...

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw if all of them are stored, else None. Only reads."""
        ...

    def look(self, claims: Sequence[Claim], *, urgent: bool) -> asyncio.Future[list[Grant | bool]] | None:
        """Look what claims would get, without waiting for what others write. Only reads.

        Args:
            claims: the claims.
            urgent: whether answers wait for what is found.

        Returns:
            For each claim its grant if the draw is known: then it need not be claimed; else whether a sample
            may be at hand. None if claims do not wait for a server, or if it is better to claim at once.
        """
        ...

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of its samples are stored, else None. Only reads.

        Args:
            draw: the draw that would claim.
            n: how many samples.
            taken: indices that the namespace has taken in addition to those of the ledger.
        """
        ...

    def foresee(self, wanted: Sequence[tuple[Draw, int, Ahead]], *, refresh: bool = False) -> list[Foreseen]:
        """Return what successive claims would get. Only reads.

        Args:
            wanted: for each claim the draw, the number of samples, and what earlier claims of the plan would
                take of its key in its namespace; what this claim would take is added.
            refresh: whether the claims would replace what the ledger holds.
        """
        ...

    def status(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Return for each (key, index) whether its sample is stored, generated elsewhere or here, or free."""
        ...

    def listen(self, changed: Callable[[], None]) -> Callable[[], None] | None:
        """Call a function, in another thread, when a state that was pending may have changed.

        It is a hint: ``status`` is asked at intervals all the same.

        Returns:
            What ends this, or None if the store cannot tell.
        """
        ...

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar."""
        ...

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample, or None."""
        ...

    def keys(self, prefix: str = "", *, newest: bool = False) -> Iterator[KeyInfo]:
        """Iterate over the keys with a prefix, in order of their first request, or newest first."""
        ...

    def question(self, key: str) -> StoredQuestion | None:
        """Return the question of a key."""
        ...

    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key; None if it does not exist or was discarded."""
        ...

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index; discarded ones are left out."""
        ...

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws, in order of creation; ``namespace`` is a label."""
        ...

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces, in order of their first draw."""
        ...

    def sums(self) -> Iterator[AdoptSums]:
        """Iterate over what the runs have noted, as another cache takes it."""
        ...

    def removals(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of what commands have removed, in order of time."""
        ...

    def bought(self) -> Iterator[Bought]:
        """Iterate over all samples, the discarded ones too, as they count in what was spent."""
        ...

    def entry(self, key: str) -> Entry | None:
        """Return all that is held of a question, for another cache; None if it is not known."""
        ...

    def entries_of(self, keys: Sequence[str]) -> Iterator[Entry]:
        """Iterate over the entries of the keys that are known, in their order."""
        ...

    def entries(self, namespaces: Collection[str] | None = None, *, after: str = "") -> Iterator[Entry]:
        """Iterate over the entries of all questions, in the order of their keys.

        Args:
            namespaces: the labels of namespaces; only questions that one of them has drawn.
            after: only keys after this one.
        """
        ...

    def close(self) -> None:
        """Write what is queued and release what the store opened itself. Idempotent."""
        ...


class Listed(Store, Protocol):
    """A store whose content commands list."""

    @property
    def where(self) -> str:
        """Where it is, for people: a folder, or a URL without credentials."""
        ...

    def size(self) -> int | None:
        """Return the number of bytes that it takes, or None if that is not known."""
        ...

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
        ...

    def discards(self, key: str) -> Iterator[DiscardInfo]:
        """Iterate over the samples of a key that were discarded, by index."""
        ...

    def removals(self) -> Iterator[dict[str, Any]]:
        """Iterate over the records of what was removed, in order of time."""
        ...

    def totals(self) -> dict[str, int]:
        """Return how many keys, samples, pending samples, draws, namespaces and discards there are."""
        ...


def new_meta(call: str, seconds: float, run: str, namespace: str) -> dict[str, Any]:
    """Return the facts that are recorded with a sample.

    Args:
        call: the id of the call that brought it.
        seconds: how long the call took.
        run: the name of the run that made the call.
        namespace: the label of the namespace that it was generated for.
    """
    return {"call": call, "seconds": round(seconds, 6), "run": run, "namespace": namespace}
