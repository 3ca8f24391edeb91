"""A connection on which one event loop asks a server, without a thread and without waiting.

Whoever asks has another way to ask: a connection that is not ready, breaks or is late is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from cachepipe import forks

Then = Callable[["list[Any] | None"], object]
"""Gets the answers, or None if there will be none."""

_AGAIN: Final = 1.0  # seconds between two tries to connect
_BYTES: Final = 1 << 18  # the most bytes that are read at once


class Connected(Protocol):
    """A connection of a client, ready for commands."""

    @property
    def socket(self) -> Any:
        """Its socket, or None."""
        ...

    def reader(self) -> Any:
        """Return a parser: ``feed`` gets bytes; ``gets`` returns an answer, or False without a whole one."""
        ...

    def close(self) -> Any:
        """Close it."""
        ...


class _Asked(NamedTuple):
    """What the server was asked.

    Attributes:
        answers: how many it will give.
        then: gets them.
        at: when it was asked, in seconds.
    """

    answers: int
    then: Then
    at: float


class LoopConnection:
    """A connection of one event loop. A thread connects it when the loop first asks.

    Args:
        loop: the event loop.
        connect: makes a connection.
        timeout: seconds after which the server is late.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connect: Callable[[], Connected], timeout: float
    ) -> None:
        self._loop = loop
        self._connect = connect
        self._timeout = timeout
        self._fork = forks.count
        self._connected: Connected | None = None
        self._socket: Any = None
        self._parser: Any = None
        self._connecting = False
        self._closed = False
        self._tried = float("-inf")
        self._asked: deque[_Asked] = deque()
        self._answers: list[Any] = []
        self._unsent = b""
        self._late: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LoopConnection {len(self._asked)} asked>"

    @property
    def ready(self) -> bool:
        """Whether the server can be asked; if not, a thread connects."""
        if self._socket is None:
            self._begin()
        return self._socket is not None

    def ask(self, packed: bytes, count: int, then: Then) -> None:
        """Ask a server that is `ready`.

        Args:
            packed: the commands.
            count: the number of commands.
            then: gets the answers, on the loop, or None if the server does not answer.
        """
        self._asked.append(_Asked(count, then, time.monotonic()))
        if self._late is None:
            self._late = self._loop.call_later(self._timeout, self._look_at_clock)
        if self._unsent:
            self._unsent += packed
            return
        self._unsent = packed
        self._send()
        if self._unsent:
            self._loop.add_writer(self._socket, self._send)

    def close(self) -> None:
        """Close the connection. Thread-safe."""
        self._closed = True
        if self._fork != forks.count:
            return
        if not self._loop.is_running() or asyncio._get_running_loop() is self._loop:  # noqa: SLF001 - the documented one raises
            self._drop()
            return
        with contextlib.suppress(
            RuntimeError
        ):  # it was closed meanwhile, and its sockets do not matter to it
            self._loop.call_soon_threadsafe(self._drop)

    # Connecting.

    def _begin(self) -> None:
        now = time.monotonic()
        if self._connecting or self._closed or now < self._tried + _AGAIN:
            return
        self._connecting, self._tried = True, now
        threading.Thread(target=self._work, name="cachepipe-connects", daemon=True).start()

    def _work(self) -> None:
        """Connect, in a thread."""
        connected: Connected | None = None
        with contextlib.suppress(Exception):  # whoever asks in another way gets the error
            connected = self._connect()
        try:
            self._loop.call_soon_threadsafe(self._use, connected)
        except RuntimeError:  # the loop is closed
            if connected is not None:
                connected.close()

    def _use(self, connected: Connected | None) -> None:
        self._connecting = False
        if connected is None:
            return
        if self._closed or not self._listens(connected):
            self._closed = True
            connected.close()

    def _listens(self, connected: Connected) -> bool:
        """Use a connection; return False if the loop cannot hear of what it receives."""
        found = connected.socket
        if found is None or isinstance(found, ssl.SSLSocket):
            return False  # decrypted bytes do not show on the socket
        found.setblocking(False)
        try:
            self._loop.add_reader(found, self._receive)
        except NotImplementedError:  # a loop of Windows
            return False
        self._connected, self._socket, self._parser = connected, found, connected.reader()
        return True

    # Asking.

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._loop.call_soon(self._drop)  # nobody expects answers before it has asked
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _receive(self) -> None:
        if self._fork != forks.count:
            return  # the answers are for the parent of this forked child
        try:
            received = self._socket.recv(_BYTES)
            self._parser.feed(received)
            self._parse()
        except (BlockingIOError, InterruptedError):
            return
        except Exception:  # noqa: BLE001 - the connection broke, or its bytes are not those of a server
            received = b""
        if not received:
            self._drop()

    def _parse(self) -> None:
        answers = self._answers
        while self._asked and (answer := self._parser.gets()) is not False:
            answers.append(answer)
            if len(answers) == self._asked[0].answers:
                self._answers = []
                then, found = self._asked.popleft().then, answers
                answers = self._answers
                failed = any(isinstance(each, Exception) for each in found)
                then(None if failed else found)

    def _look_at_clock(self) -> None:
        """Drop the connection if the server is late."""
        self._late = None
        if not self._asked:
            return
        left = self._asked[0].at + self._timeout - time.monotonic()
        if left <= 0:
            self._drop()
        else:
            self._late = self._loop.call_later(left, self._look_at_clock)

    def _drop(self) -> None:
        """Close the connection; nobody gets answers from it any more."""
        connected, found = self._connected, self._socket
        self._connected = self._socket = None
        self._unsent, self._answers = b"", []
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if found is not None and not self._loop.is_closed():
            self._loop.remove_reader(found)
            self._loop.remove_writer(found)
        if connected is not None:
            connected.close()
        while self._asked:
            self._asked.popleft().then(None)
