"""Stores that fail, wait or are locked when a test tells them to, and stores of processes that are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.stores.base import (
    Bought,
    DrawInfo,
    Grant,
    KeyInfo,
    NamespaceInfo,
    Note,
    Operation,
    Process,
    Result,
    Sample,
    State,
    Store,
    StoredQuestion,
)
from cachepipe.stores.disk import DiskStore


class MortalStore(DiskStore):
    """A folder's store as another process opens it, which is played: it dies when its name is taken out.

    Args:
        folder: the folder.
        name: the name of the process's lease.
        alive: the names of the processes that live; the store adds its own.
    """

    def __init__(self, folder: Path | str, name: str, alive: set[str]) -> None:
        self.name = name
        self.alive = alive
        alive.add(name)
        super().__init__(folder)

    def _lease_name(self) -> str:
        return self.name

    def _own_lease_name(self) -> str:
        return self.name

    def _lease_alive(self, name: str) -> bool:
        return name in self.alive


class FaultyStore:
    """Another store's samples and ledger, behind faults that a test switches on and off.

    What was applied is recorded, so that a test can count transactions and see what each held.

    Args:
        store: the store that does the work.

    Attributes:
        locked: while True, ``apply_now`` returns None, as if another process were writing.
        transactions: the operations of each transaction that was applied, in order.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.locked = False
        self.transactions: list[list[Operation]] = []
        self._faults: list[tuple[type[Operation] | None, Exception]] = []
        self._gate: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = ["locked"] * self.locked + ["held"] * (self._gate is not None)
        return f"<FaultyStore {self.store!r} {' '.join([*state, f'{len(self._faults)} faults to come'])}>"

    # What a test says.

    def fail_next(self, error: Exception, on: type[Operation] | None = None, *, times: int = 1) -> None:
        """Let the next transaction that holds such an operation fail whole, and nothing of it be applied.

        Args:
            error: what is raised.
            on: the class of the operation, such as ``Commit``; None is any.
            times: how many transactions fail.
        """
        self._faults += [(on, error)] * times

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be slow: what is applied inside the block waits until the block ends."""
        gate = self._gate = asyncio.Event()
        try:
            yield
        finally:
            self._gate = None
            gate.set()

    # What the stages call.

    @property
    def identity(self) -> str:
        """What is stored: the wrapped store's identity."""
        return self.store.identity

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""
        return self.store.read_only

    @property
    def why_read_only(self) -> str:
        """Why nothing can be written, or an empty string."""
        return self.store.why_read_only

    @property
    def wait_for_others(self) -> float | None:
        """How long to wait for other processes: as long as the wrapped store says."""
        return self.store.wait_for_others

    def _fault(self, operations: Sequence[Operation]) -> None:
        for place, (kind, error) in enumerate(self._faults):
            if kind is None or any(type(operation) is kind for operation in operations):
                del self._faults[place]
                raise error

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations, unless the store is locked or held."""
        if self.locked or self._gate is not None:
            return None
        self._fault(operations)
        results = self.store.apply_now(operations)
        if results is not None:
            self.transactions.append(list(operations))
        return results

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Apply the operations, after the gate when there is one."""
        while self._gate is not None:
            await self._gate.wait()
        self._fault(operations)
        results = await self.store.apply(operations)
        self.transactions.append(list(operations))
        return results

    def apply_soon(self, operations: Sequence[Operation]) -> None:
        """Apply the operations without anyone waiting; faults do not touch them."""
        self.transactions.append(list(operations))
        self.store.apply_soon(operations)

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw that the ledger holds whole, else None."""
        return self.store.recall(draw, n)

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of it is stored, else None."""
        return self.store.replay(draw, n, taken)

    def status(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Tell of each (key, index) whether its sample is stored, being generated, or neither."""
        return self.store.status(wanted)

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one."""
        return self.store.similar(question)

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample."""
        return self.store.generator(key, index)

    def keys(self, prefix: str = "", *, newest: bool = False) -> Iterator[KeyInfo]:
        """Iterate over the keys that start with a prefix."""
        return self.store.keys(prefix, newest=newest)

    def question(self, key: str) -> StoredQuestion | None:
        """Return what was asked under a key."""
        return self.store.question(key)

    def sample(self, key: str, index: int) -> Sample | None:
        """Return one sample of a key."""
        return self.store.sample(key, index)

    def samples(self, key: str) -> Iterator[Sample]:
        """Iterate over the samples of a key by index."""
        return self.store.samples(key)

    def draws(self, key: str | None = None, namespace: str | None = None) -> Iterator[DrawInfo]:
        """Iterate over the ledger's draws."""
        return self.store.draws(key, namespace)

    def namespaces(self) -> Iterator[NamespaceInfo]:
        """Iterate over the namespaces."""
        return self.store.namespaces()

    def sums(self) -> Iterator[Note]:
        """Iterate over the sums of the runs."""
        return self.store.sums()

    def bought(self) -> Iterator[Bought]:
        """Iterate over all samples as they count in what was spent."""
        return self.store.bought()

    def close(self) -> None:
        """Close the wrapped store."""
        self.store.close()
