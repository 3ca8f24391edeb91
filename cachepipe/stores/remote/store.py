"""A store that many machines share, on any engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.errors import StoreError, StoreUnreachable
from cachepipe.stores import operations
from cachepipe.stores.base import (
    Ahead,
    Claim,
    Commit,
    Foreseen,
    Grant,
    Operation,
    Process,
    Result,
    Settle,
    State,
)
from cachepipe.stores.queued import Queued, error_in
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.book import view
from cachepipe.stores.remote.engine import Read, Unreachable
from cachepipe.stores.remote.failovers import mend
from cachepipe.stores.remote.listing import Listing
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.similar import SimilarQuestions
from cachepipe.stores.remote.spool import Spool
from cachepipe.stores.remote.states import States
from cachepipe.stores.writer import Writer

_T = TypeVar("_T")

_stores: weakref.WeakSet[RemoteStore] = weakref.WeakSet()


class RemoteStore(Queued, Listing):
    """A store that many machines share.

    What is asked on an event loop never waits for the engine: there `recall` finds only what this machine has
    copies of, so that other known draws are claimed, and claims travel together.

    Args:
        session: this process's use of the store.
        read_only: whether nothing is written.
        wait_for_others: seconds to wait for a sample that another live process generates.
    """

    def __init__(
        self,
        session: Session,
        *,
        read_only: bool = False,
        wait_for_others: float | None = None,
    ) -> None:
        self.session = session
        self.identity = session.engine.identity
        self.read_only = read_only
        self.why_read_only = "it was opened with read_only=True" if read_only else ""
        self.wait_for_others = wait_for_others
        session.join(self)
        self._closed = False
        self._writer = Writer(self)
        self._looking = Writer(_Looks(session), "cachepipe-looks")
        self._states = States(session)
        self._similar = SimilarQuestions(session)
        self._spool = Spool(self.identity)
        self._unsettled: list[Settle] = []  # they wait until the samples that are kept here are stored
        _stores.add(self)
        self._opens()
        if not read_only and self._spool:
            self._writer.wake()  # an earlier process could not write them

    def __repr__(self) -> str:
        return f"<RemoteStore {self.where}{' read-only' if self.read_only else ''}>"

    @property
    def where(self) -> str:
        """The URL, without credentials."""
        return self.session.engine.where

    def size(self) -> None:
        """Return None: a server does not know what its parts take."""

    def inherit(self) -> None:
        """Begin again in a forked child."""
        self._writer = Writer(self)
        self._looking = Writer(_Looks(self.session), "cachepipe-looks")
        self._states = States(self.session)
        self._similar = SimilarQuestions(self.session)
        self._unsettled = []  # the parent settles its own

    def _check(self) -> None:
        if self._closed:
            raise StoreError(f"the cache {self.where} was closed; open it again")

    # Applying operations.

    def apply_now(self, operations: Sequence[Operation]) -> list[Result] | None:
        """Apply the operations; on an event loop, or behind others that are queued, return None at once."""
        self._check()
        if self._writer.busy or asyncio._get_running_loop() is not None:  # noqa: SLF001 - the documented one raises
            return None
        results = self.write(operations)
        if self.session.watch.doubted:
            self._writer.wake()
        error = error_in(results)
        if error is not None:
            raise error
        return results  # type: ignore[return-value]  # none is an error

    def apply(self, operations: Sequence[Operation]) -> asyncio.Future[list[Result]]:
        """Apply the operations: claims on the event loop, if that is possible; others in a thread."""
        return self._applied_soon(operations) or super().apply(operations)

    def _applied_soon(self, operations: Sequence[Operation]) -> asyncio.Future[list[Result]] | None:
        """Claim on the event loop; return None if that is not possible now, or if other operations wait."""
        session, local = self.session, self.session.local
        if self._closed or self.read_only or self._writer.busy or {*map(type, operations)} != {Claim}:
            return None
        if local is not None and local.lapsed:
            return None  # the thread asks for changes first
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        done = self._settling(operations, future)

        def claimed(results: list[Any]) -> None:
            left = [place for place, result in enumerate(results) if result is None]
            if not left:
                done(results)
                return

            def rest(found: list[Any] | Exception) -> None:
                given = found if isinstance(found, list) else [found] * len(left)
                for place, result in zip(left, given, strict=True):
                    results[place] = result
                done(results)

            try:
                self._check()
                self._writer.put([operations[place] for place in left], rest)
            except StoreError as error:
                rest(error)

        return future if session.claim_soon(operations, claimed) else None  # type: ignore[arg-type]  # all are claims

    def write(self, operations: Sequence[Operation]) -> list[Result | StoreError]:
        """Apply the operations, those of one key as one transaction, in the calling thread."""
        if self.read_only:
            raise StoreError(f"the cache {self.where} cannot be written: {self.why_read_only}")
        if {*map(type, operations)} == {Settle} and self._spool:
            self._unsettled += operations  # type: ignore[arg-type]  # all are
            return [None] * len(operations)
        try:
            results = self.session.transact(operations)
        except StoreUnreachable as error:
            raise self._spooled(operations, [error] * len(operations)) from error
        if StoreUnreachable not in map(type, results):
            return results
        lost = self._spooled(operations, results)
        return [lost if isinstance(result, StoreUnreachable) else result for result in results]

    def _spooled(
        self, operations: Sequence[Operation], results: Sequence[Result | StoreError]
    ) -> StoreUnreachable:
        """Keep on this machine the samples that the engine did not take, and what settles calls.

        Returns:
            The error.
        """
        pairs = zip(operations, results, strict=True)
        lost = [(operation, result) for operation, result in pairs if isinstance(result, StoreUnreachable)]
        error = lost[0][1] if lost else StoreUnreachable()
        commits = [operation for operation, _ in lost if type(operation) is Commit]
        self._unsettled += [operation for operation, _ in lost if type(operation) is Settle]
        if not commits:
            return error
        try:
            path = self._spool.put(commits, self.session.last_lease)
        except OSError as refused:
            return StoreUnreachable(f"{error}; nor could its samples be kept on this machine: {refused}")
        error = StoreUnreachable(f"{error}. Its samples are kept in {path} until the store answers")
        error.kept = True
        return error

    def reached(self) -> None:
        """Learn that the engine answers again."""
        self._writer.wake()

    def tidy(self) -> None:
        """Write what a failover has lost, and the samples that were kept here, if the engine answers."""
        if self.read_only:
            return
        with contextlib.suppress(Unreachable, StoreError):
            mend(self.session)
        if not (self._spool or self._unsettled):
            return
        with contextlib.suppress(Unreachable, StoreError, OSError):
            self.session.engine.now()
            self._spool.empty(self.session.commit_for, self.ids)
            settles, self._unsettled = self._unsettled, []
            if settles:
                self.write(settles)

    def compact(self) -> tuple[int, int] | None:
        """Give back the space of deleted rows, if the engine does not do so by itself.

        Returns:
            The bytes before and after, or None.

        Raises:
            StoreError: when that is not permitted.
        """
        self._check()
        return self.session.asked(self.session.engine.compact)

    # Reading.

    def recall(self, draw: Draw, n: int) -> Grant | None:
        """Return the first n samples of a draw if all of them are stored, else None.

        On an event loop it returns None at once if this machine has no copy: a claim then reads them,
        together with others.
        """
        self._check()
        waits = asyncio._get_running_loop() is None  # noqa: SLF001 - the documented one raises
        found = self._copied(draw, n, waits=waits)
        if found is not None or not waits:
            return found
        return self.session.recall([(draw, n)])[0]

    def look(self, claims: Sequence[Claim], *, urgent: bool) -> asyncio.Future[list[Grant | bool]] | None:
        """Look what claims would get, on the event loop or in a thread of its own; see ``Store.look``."""
        if not urgent and self.session.expects_new:
            return None  # they must be claimed anyhow
        self._check()
        local = self.session.local
        if local is not None and local.lapsed:
            return None  # a claim asks for changes first, and then perhaps needs nothing else of the engine
        future: asyncio.Future[list[Grant | bool]] = asyncio.get_running_loop().create_future()
        foretold = self.session.foretell(claims)
        if foretold is not None:
            future.set_result([*foretold])
            return future

        def looked(found: list[Grant | bool] | None) -> None:
            if future.done():
                return
            if found is None:
                self._awaited(self._looking, claims).add_done_callback(partial(_pass_on, future))
            else:
                future.set_result(found)

        if self.session.look_soon(claims, looked):
            return future
        return self._awaited(self._looking, claims) if urgent else None

    def _copied(self, draw: Draw, n: int, *, waits: bool) -> Grant | None:
        """Return the samples of a draw from the copies on this machine, if it has them.

        Args:
            draw: the draw.
            n: how many samples.
            waits: whether to ask for changes first, if that is due.
        """
        local = self.session.local
        if local is None or (waits and not local.ready()):
            return None
        return local.recall(draw, n)

    def replay(self, draw: Draw, n: int, taken: IntervalSet) -> Grant | None:
        """Return what a claim would get if all of its samples are stored, else None."""
        self._check()
        found = self._copied(draw, n, waits=True)
        if found is not None:
            for index in found.indices:
                taken.add(index)
            found.shared = False
            return found
        [book] = self.session.books([_all_of(draw)])
        replayed = operations.replay(view(book, draw), draw, n, taken)
        if replayed is not None and self.session.local is not None:
            self.session.local.copy(draw)
        return replayed

    def foresee(self, wanted: Sequence[tuple[Draw, int, Ahead]], *, refresh: bool = False) -> list[Foreseen]:
        """Return what successive claims would get; see ``Store.foresee``."""
        self._check()
        books = self.session.books([_all_of(draw) for draw, _, _ in wanted])
        found: list[Foreseen] = []
        for book, (draw, n, ahead) in zip(books, wanted, strict=True):
            stored = None if book.row(rows.KNOWN) is None else view(book, draw)
            found.append(operations.foresee(stored, draw, n, ahead, refresh=refresh))
        return found

    def status(self, wanted: Sequence[tuple[str, int]]) -> list[State]:
        """Return for each (key, index) whether its sample is stored, generated elsewhere or here, or free.

        On an event loop these are the states that a thread has found; what it has not looked at is pending.
        """
        self._check()
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - the documented one raises
            return self._states.latest(wanted)
        return self._states.now(wanted)

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call a function, in another thread, when a state that was pending has changed."""
        return self._states.listen(changed)

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample, or None."""
        return self._states.generator(key, index)

    def close(self) -> None:
        """Write what is queued, end the lease and close the connections."""
        if self._closed:
            return
        self._writer.stop()
        self._looking.stop()
        self.tidy()
        self._closed = True
        self._states.close()
        self.session.leave(self)


class _Looks:
    """Looks what claims would get, on behalf of a thread.

    Args:
        session: this process's use of the store.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.identity = session.engine.identity

    def write(self, claims: Sequence[Claim]) -> list[Grant | bool]:
        """Return for each claim its grant if the draw is known, else whether a sample may be at hand."""
        return self._session.look(claims)

    def tidy(self) -> None:
        """Do nothing."""


def _pass_on(future: asyncio.Future[_T], done: asyncio.Future[_T]) -> None:
    """Give a future the outcome of another one."""
    if future.done():
        return
    if done.cancelled():
        future.cancel()
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def _all_of(draw: Draw) -> Read:
    """Return what reads a draw, its samples, and what decides which samples it would get."""
    follow = [rows.draw_field(draw), rows.first_field(draw)]
    fields = [rows.KNOWN, rows.LISTED, rows.taken_field(draw.namespace), *follow]
    return Read(draw.key, fields, follow, pending=True)


def _after_fork() -> None:
    for store in list(_stores):
        store.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
