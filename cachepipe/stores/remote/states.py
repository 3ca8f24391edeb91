"""The states of samples that other processes generate, looked at in a thread while an event loop waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from cachepipe.errors import StoreError
from cachepipe.stores.base import Process, State
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.book import Book
from cachepipe.stores.remote.engine import Read
from cachepipe.stores.remote.session import Session

Place = tuple[str, int]
"""A key and an index."""

_IDLE = 2.0  # seconds without a question after which the thread ends


class States:
    """The states of samples.

    Args:
        session: this process's use of the store.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._condition = threading.Condition()
        self._wanted: tuple[Place, ...] = ()
        self._awaited: dict[str, list[Place]] = {}  # what was asked last, by key
        self._listeners: list[Callable[[], None]] = []
        self._deaf: Callable[[], None] | None = None
        self._found: dict[Place, State] = {}
        self._makers: dict[Place, Process] = {}
        self._error: StoreError | None = None
        self._thread: threading.Thread | None = None
        self._ended = False

    def now(self, wanted: Sequence[Place]) -> list[State]:
        """Return the states, after one round trip."""
        places: dict[str, list[int]] = {}
        for key, index in wanted:
            places.setdefault(key, []).append(index)
        reads = [
            Read(key, [rows.LISTED, *(rows.numbered(rows.WHY, index) for index in indices)], pending=True)
            for key, indices in places.items()
        ]
        books = {book.name: book for book in self._session.books(reads)} if reads else {}
        self._session.ask_about(lease for book in books.values() for lease in book.generating().values())
        return [self._state(books[key], index) for key, index in wanted]

    def _state(self, book: Book, index: int) -> State:
        self._makers.pop((book.name, index), None)
        lease = book.author(index)
        if lease is not None:
            if self._session.is_own(lease):
                return "ours"
            process = self._session.process(lease)
            if process is None:
                return "free"
            self._makers[book.name, index] = process
            return "pending"
        stored = index in book.indices(rows.LISTED)
        return "stored" if stored and book.row(rows.numbered(rows.WHY, index)) is None else "free"

    def latest(self, wanted: Sequence[Place]) -> list[State]:
        """Return the states that the thread has found, and have it look again.

        Raises:
            StoreError: when it could not look.
        """
        with self._condition:
            found, self._found = self._found, {}
            error, self._error = self._error, None
            self._awaited = {}
            for place in wanted:
                self._awaited.setdefault(place[0], []).append(place)
            self._look(wanted)
        if error is not None:
            raise error
        return [found.get(place, "pending") for place in wanted]

    def _look(self, wanted: Sequence[Place]) -> None:
        """Have the thread look at samples; the caller holds the condition."""
        if self._ended:
            return
        self._wanted += tuple(wanted)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="cachepipe-states", daemon=True)
            self._thread.start()
        self._condition.notify()

    # Notifications.

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call a function, in another thread, when a state that was pending has changed."""
        with self._condition:
            self._listeners.append(changed)
            if self._deaf is None:
                self._deaf = self._session.engine.listen(self._heard) or _nothing
        return partial(self._listeners.remove, changed)

    def _heard(self, key: str) -> None:
        """Learn that rows of a key have changed."""
        with self._condition:
            if key in self._awaited:
                self._look(self._awaited[key])

    def generator(self, key: str, index: int) -> Process | None:
        """Return the process that generates a sample, as it was last found."""
        return self._makers.get((key, index))

    def close(self) -> None:
        """End the threads."""
        with self._condition:
            self._ended = True
            self._wanted = ()
            thread = self._thread
            self._condition.notify()
            if self._deaf is not None:
                self._deaf()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_IDLE)  # it may wait for an engine that does not answer

    def _work(self) -> None:
        while True:
            with self._condition:
                if not (self._wanted or self._ended):
                    self._condition.wait(_IDLE)
                wanted, self._wanted = self._wanted, ()
                if not wanted:
                    self._thread = None
                    return
            found: dict[Place, State] = {}
            error: StoreError | None = None
            try:
                found = dict(zip(wanted, self.now(wanted), strict=True))  # a place may be there twice
            except StoreError as raised:
                error = raised
            with self._condition:
                self._found |= found
                self._error = error
                listeners = list(self._listeners)
            if error is not None or not {"stored", "free"}.isdisjoint(found.values()):
                for changed in listeners:
                    changed()


def _nothing() -> None:
    """Do nothing."""
