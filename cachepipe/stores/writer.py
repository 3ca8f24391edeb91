"""The thread that writes when the loop must not wait: all queued operations as one transaction."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cachepipe.errors import StoreLocked, StoreUnavailable
from cachepipe.stores.base import Operation, Result

LOCK_TIMEOUT = 60.0
"""Seconds to wait for a lock that another process holds."""

_IDLE = 2.0  # seconds without work after which the thread ends

Done = Callable[["list[Result | Exception] | Exception"], None]
_Item = tuple[Sequence[Operation], Done]


class Locked(Exception):  # noqa: N818 - internal: says that a write would have to wait
    """Another connection is writing."""


class Writable(Protocol):
    """A store that the thread writes to."""

    identity: str

    def write(self, operations: Sequence[Any]) -> Sequence[Any]:
        """Apply operations in one transaction, or raise ``Locked``; return each one's result or error."""
        ...

    def tidy(self) -> None:
        """Do maintenance while no caller waits."""
        ...


class Writer:
    """A daemon thread, started at the first write.

    Args:
        store: what it writes to.
        name: the name of the thread.
    """

    def __init__(self, store: Writable, name: str = "cachepipe-writer") -> None:
        self._store = store
        self._name = name
        self._queue: collections.deque[_Item] = collections.deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._woken = False
        self.busy = False
        """Whether operations are queued or being written; later operations must queue behind them."""

    def put(self, operations: Sequence[Operation], done: Done) -> None:
        """Queue operations; ``done`` gets their results, or the error, in the writer's thread."""
        with self._condition:
            self._queue.append((operations, done))
            self.busy = True
            self._start()

    def wake(self) -> None:
        """Wake the thread for maintenance."""
        with self._condition:
            self._woken = True
            self._start()

    def stop(self) -> None:
        """Write what is queued, then end the thread."""
        with self._condition:
            self._stopping = True
            thread = self._thread
            self._condition.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                if not (self._queue or self._stopping or self._woken):
                    self.busy = False
                    self._condition.wait(_IDLE)
                items = list(self._queue)
                self._queue.clear()
                if not (items or self._woken):  # there was nothing to do for too long, or it is to stop
                    self.busy = False
                    self._thread = None  # a later write starts another; a store without references can go
                    return
                self._woken = False
            if items:
                self._write(items)
            with contextlib.suppress(Exception):  # an error of the files shows in the next write
                self._store.tidy()

    def _write(self, items: list[_Item]) -> None:
        try:
            results = self._patiently([operation for operations, _ in items for operation in operations])
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to whoever waits
            if len(items) == 1 or isinstance(error, StoreUnavailable):
                for _, done in items:
                    done(error)
                return
            for item in items:  # one of the operations is invalid: write the others without it
                self._write([item])
            return
        start = 0
        for operations, done in items:
            done(list(results[start : start + len(operations)]))
            start += len(operations)

    def _patiently(self, operations: Sequence[Operation]) -> Sequence[Result | Exception]:
        until = time.monotonic() + LOCK_TIMEOUT
        pause = 0.0005
        while True:
            try:
                return self._store.write(operations)
            except Locked:
                if time.monotonic() > until:
                    raise StoreLocked(
                        f"the cache {self._store.identity} has been locked by another process for "
                        f"{LOCK_TIMEOUT:.0f} s; find the process that writes there, then try again"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 2, 0.02)
