"""Stores the messages of conversations between requests: on a Redis or Valkey server, or in a folder.

Each conversation has a random id that cannot be guessed, and expires. Messages are appended, together or one
by one, and never rewritten. So if two requests of one conversation save at once, both are kept, in the same
order for every reader.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio.to_thread

from cachepipe.chat.access import Environment
from cachepipe.chat.conversations import Conversation, Message, Sayable
from cachepipe.errors import StoreError
from cachepipe.stores.folders import check_files, expanded
from cachepipe.stores.mounts import check_local
from cachepipe.stores.remote import is_url, shown

if TYPE_CHECKING:
    from cachepipe.chat.chat import Chat

DAY: Final = 86_400
"""The default number of seconds for which a conversation is kept after its last message."""
PREFIX: Final = "cachepipe:"
"""The default prefix of keys on a server."""
FILE: Final = "histories.cache.db"
"""The file in a folder with the conversations."""

_ID: Final = re.compile(r"[A-Za-z0-9_-]{8,128}")
_PATIENCE: Final = 30.0  # seconds to wait for another process that writes

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS histories(id TEXT PRIMARY KEY, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS histories_expire ON histories(expires);
CREATE TABLE IF NOT EXISTS messages(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, message TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS messages_of ON messages(id);
"""


class Keeper(Protocol):
    """Stores messages."""

    def append(self, name: str, lines: Sequence[str], ttl: int) -> None:
        """Append lines to a name in one step, and keep the name for a number of seconds."""
        ...

    def read(self, name: str) -> list[str]:
        """Return the lines of a name; none if it is unknown or has expired."""
        ...

    def delete(self, name: str) -> None:
        """Delete a name."""
        ...


class History:
    """The messages of a conversation, kept under a random id.

        history = History(state=request.get("state"))  # None begins a new conversation
        chat = history.load(Chat())
        chat.add("user:Italy")
        answer = chat.complete()
        history.save("user:Italy", f"assistant:{answer}")
        return answer, history.id()

    Args:
        environment: settings that override the environment of the process, such as the arguments of a
            serverless action: ``REDIS_URL``, ``REDIS_PREFIX``, ``CACHEPIPE_DIR``, and ``state``.
        state: the id of a conversation to continue.
        url: the server, such as ``redis://…``, ``rediss://…`` or ``valkey://…``; else ``REDIS_URL``.
        prefix: the prefix of all keys; else ``REDIS_PREFIX``, else ``"cachepipe:"``.
        ttl: seconds for which the conversation is kept after its last message.
        cache: without a server, the folder for the conversation; else ``CACHEPIPE_DIR``, else the default
            folder.

    Raises:
        ValueError: for an id, URL, prefix or time that is not valid.
    """

    def __init__(
        self,
        environment: Mapping[str, Any] | None = None,
        /,
        *,
        state: str | None = None,
        url: str | None = None,
        prefix: str | None = None,
        ttl: int = DAY,
        cache: Any = None,
    ) -> None:
        settings = Environment(environment, "History")
        state = state or (environment or {}).get("state") or secrets.token_urlsafe(18)
        if not isinstance(state, str) or not _ID.fullmatch(state):
            raise ValueError(
                "the id of a history has 8 to 128 letters, digits, '-' and '_'; the given id does not"
            )
        if type(ttl) is not int or ttl < 1:
            raise ValueError(f"ttl= is a whole number of seconds, at least 1; got {ttl!r:.100}")
        self._id = state
        self.ttl = ttl
        url = url or settings.found("REDIS_URL")
        self._keeper: Keeper = (
            _on_server(url, prefix, settings) if url else FolderKeeper(_folder(cache, settings))
        )

    def __repr__(self) -> str:
        return f"<History {self._keeper!r}>"  # not its id, with which anyone can read it

    def id(self) -> str:
        """Return the id of the conversation. Anyone who knows it can read the conversation."""
        return self._id

    def save(self, *messages: Sayable) -> None:
        """Append messages in one step: `Message`, mappings, or texts such as ``"user:Hello"``.

        Raises:
            ValueError: for a value that is not a message; then nothing is saved.
            StoreError: when they could not be saved.
        """
        said = [Message.of(message).to_dict() for message in messages]
        # A client may repeat an append if it got no reply; the mark makes sure that a message is read once.
        lines = [json.dumps([secrets.token_hex(8), message]) for message in said]
        if lines:
            self._keeper.append(self._id, lines, self.ttl)

    def conversation(self) -> Conversation:
        """Return the conversation; empty if nothing was saved, or it has expired.

        Raises:
            StoreError: when it could not be read.
        """
        lines = self._keeper.read(self._id)
        try:
            return Conversation(list(dict(map(json.loads, lines)).values()))
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"the name of this history {self._keeper!r} has other content; does another program use its "
                "prefix?"
            ) from error

    def load(self, chat: Chat) -> Chat:
        """Add the stored messages to a chat, and return the chat.

        Raises:
            StoreError: when it could not be read.
        """
        chat.messages.extend(self.conversation().messages)
        return chat

    def delete(self) -> None:
        """Delete the conversation.

        Raises:
            StoreError: when it could not be done.
        """
        self._keeper.delete(self._id)

    async def asave(self, *messages: Sayable) -> None:
        """Do what `save` does, without blocking the loop."""
        await anyio.to_thread.run_sync(self.save, *messages)

    async def aload(self, chat: Chat) -> Chat:
        """Do what `load` does, without blocking the loop."""
        return await anyio.to_thread.run_sync(self.load, chat)


class FolderKeeper:
    """Messages in an SQLite file of a folder, which any number of processes may use.

    Args:
        folder: the folder, which is created if it does not exist, private to the user.
        clock: returns the time in seconds since 1970.

    Raises:
        StoreError: when the folder is on a network file system.
    """

    def __init__(self, folder: str | os.PathLike[str], clock: Callable[[], float] = time.time) -> None:
        self.path = expanded(folder) / FILE
        check_local("the histories", self.path.parent, "Name a folder on a local disk, or a server with url=")
        self._clock = clock

    def __repr__(self) -> str:
        return f"in {self.path.parent}"

    @contextlib.contextmanager
    def _opened(self, *, writes: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the file, for one transaction if it writes."""
        try:
            check_files(self.path.parent, self.path.name)
            if not self.path.exists():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):  # the file is never opened twice: see DiskStore
                    os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            ) as connection:
                if not connection.execute("PRAGMA table_info(messages)").fetchall():
                    with contextlib.suppress(sqlite3.OperationalError):  # locked: another one makes the file
                        connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
                if writes:
                    connection.execute("BEGIN IMMEDIATE")
                with connection:
                    yield connection
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the histories in {self.path} cannot be used: {error}") from error

    def append(self, name: str, lines: Sequence[str], ttl: int) -> None:
        """Append lines in one transaction, which also deletes expired lines."""
        now = self._clock()
        with self._opened(writes=True) as connection:
            connection.execute(
                "DELETE FROM messages WHERE id IN (SELECT id FROM histories WHERE expires <= ?)", (now,)
            )
            connection.execute("DELETE FROM histories WHERE expires <= ?", (now,))
            connection.execute("INSERT OR REPLACE INTO histories VALUES(?, ?)", (name, now + ttl))
            connection.executemany(
                "INSERT INTO messages(id, message) VALUES(?, ?)", [(name, line) for line in lines]
            )

    def read(self, name: str) -> list[str]:
        """Return the lines of a name in their order."""
        if not self.path.exists():
            return []
        with self._opened() as connection:
            rows = connection.execute(
                "SELECT message FROM messages JOIN histories USING(id) WHERE id = ? AND expires > ?"
                " ORDER BY number",
                (name, self._clock()),
            )
            return [line for (line,) in rows]

    def delete(self, name: str) -> None:
        """Delete the lines of a name."""
        if self.path.exists():
            with self._opened(writes=True) as connection:
                connection.execute("DELETE FROM messages WHERE id = ?", (name,))
                connection.execute("DELETE FROM histories WHERE id = ?", (name,))


def _on_server(url: str, prefix: str | None, settings: Environment) -> Keeper:
    from cachepipe.chat.server import ServerKeeper  # noqa: PLC0415 - it needs redis

    return ServerKeeper(str(url), str(settings.found("REDIS_PREFIX") or PREFIX if prefix is None else prefix))


def _folder(cache: Any, settings: Environment) -> str:
    """Return the folder of a cache argument."""
    folder = settings.located(getattr(cache, "folder", None) or getattr(cache, "directory", None) or cache)
    if not isinstance(folder, str):
        raise TypeError(f"cache= of a history is a folder, or a cache in one; got {cache!r:.100}")
    if is_url(folder):
        raise StoreError(
            f"a history lies in a folder, or on a Redis server that url= names; got cache={shown(folder)!r}"
        )
    return folder
