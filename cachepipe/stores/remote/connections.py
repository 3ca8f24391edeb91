"""What engines on servers have in common: connections for threads, and a thread that hears of changes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

LISTENS = 1.0
"""Seconds after which a listener looks whether it is still wanted."""


class Connection(Protocol):
    """A connection of a client."""

    def close(self) -> Any:
        """Close it."""
        ...


_C = TypeVar("_C", bound=Connection)


class Connections(Generic[_C]):
    """Open connections; a thread takes one for as long as it asks.

    Args:
        connect: makes a connection.
    """

    def __init__(self, connect: Callable[[], _C]) -> None:
        self._connect = connect
        self._idle: list[_C] = []
        self._closed = False

    def take(self) -> _C:
        """Return a connection that nobody else uses."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def give_back(self, connection: _C) -> None:
        """Keep a connection that is ready for the next command."""
        self._idle.append(connection)
        if self._closed:
            self._close_idle()

    def drop(self, connection: _C) -> None:
        """Close a connection that has failed, and the idle ones: these were probably lost too."""
        connection.close()
        self._close_idle()

    def inherit(self) -> None:
        """Begin again in a forked child; its parent goes on to use the connections."""
        keep_open(self._idle)
        self._idle = []

    def close(self) -> None:
        """Close the idle connections, and those in use when they are given back."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._idle.pop().close()


_inherited: list[Connection] = []
"""Connections of the parent of a forked child: closing them here would say so to the server."""


def keep_open(connections: Iterable[Connection]) -> None:
    """Never close the connections of the parent of a forked child."""
    _inherited.extend(connections)


def listen(hear: Callable[[threading.Event], None], *errors: type[Exception]) -> Callable[[], None]:
    """Call a function in a thread, again and again, until the returned function is called.

    Args:
        hear: listens until the event is set, or until its connection breaks. What it misses meanwhile is
            found by polling.
        errors: what it raises when its connection breaks.
    """
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            with contextlib.suppress(*errors):
                hear(ended)
            ended.wait(LISTENS)

    threading.Thread(target=work, name="cachepipe-listener", daemon=True).start()
    return ended.set
