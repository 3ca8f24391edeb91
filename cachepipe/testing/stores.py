"""Stores that fail, wait or are locked when a test tells them to, and stores of processes that are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from cachepipe.stores.base import (
    Operation,
    Result,
    Store,
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
        self.identity = store.identity
        self.read_only, self.why_read_only = store.read_only, store.why_read_only
        self.wait_for_others = store.wait_for_others
        # Reading meets no faults.
        self.recall, self.replay, self.status = store.recall, store.replay, store.status
        self.foresee = store.foresee
        self.similar, self.generator, self.question = store.similar, store.generator, store.question
        self.listen, self.look = store.listen, store.look
        self.keys, self.sample, self.samples = store.keys, store.sample, store.samples
        self.draws, self.namespaces = store.draws, store.namespaces
        self.sums, self.bought, self.removals = store.sums, store.bought, store.removals
        self.entry, self.entries, self.entries_of = store.entry, store.entries, store.entries_of

    def __repr__(self) -> str:
        state = ["locked"] * self.locked + ["held"] * (self._gate is not None)
        return f"<FaultyStore {self.store!r} {' '.join([*state, f'{len(self._faults)} faults to come'])}>"

    # What a test says.

    def fail_next(self, error: Exception, on: type[Operation] | None = None, *, times: int = 1) -> None:
        """Make the next transaction with such an operation fail; nothing of it is applied.

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

    def close(self) -> None:
        """Close the wrapped store."""
        self.store.close()
