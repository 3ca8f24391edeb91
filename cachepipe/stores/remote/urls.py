"""Opens the shared store that a URL names.

Credentials come from the URL. Those of a Valkey server also come from CACHEPIPE_VALKEY_USERNAME and
CACHEPIPE_VALKEY_PASSWORD, or from a file; those of a PostgreSQL server from wherever libpq finds them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import platformdirs

from cachepipe.errors import StoreError
from cachepipe.stores import folders
from cachepipe.stores.remote import SCHEMES, shown
from cachepipe.stores.remote.engine import Engine
from cachepipe.stores.remote.local import copies_in
from cachepipe.stores.remote.session import LEASE, PATIENCE, Session, SessionEnded, patiently
from cachepipe.stores.remote.store import RemoteStore

_TLS: Final = {"ca": "ca_certs", "cert": "certfile", "key": "keyfile"}
"""Options with files of TLS, and what the client calls them."""
_WAITS: Final = ("patience", "lease", "timeout")
_LOCAL: Final = ("local", "local_mb")
_OPTIONS: Final = ("prefix", *_WAITS, *_LOCAL, "password_file", "db", *_TLS)
_LIBPQ: Final = (
    "host",
    "port",
    "user",
    "dbname",
    "passfile",
    "service",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "target_session_attrs",
)
"""Options of libpq that a URL may have."""
_FILES: Final = ("sslrootcert", "sslcert", "sslkey")
"""Those that name a file, except for the authorities of the system."""

MEGABYTES: Final = 1000.0
"""The size of the copies of a store on this machine, unless the URL says otherwise."""
PREFIX: Final = "cachepipe"
"""The beginning of the keys on a server, unless the URL says otherwise."""
OPENING: Final = 5.0
"""The most seconds to wait at opening if there is no sign of a server: its name may be wrong."""
TIMEOUT: Final = 5.0
"""Seconds to wait for an answer of the server."""
_SCHEMA: Final = re.compile(r"(?!pg_)[A-Za-z0-9_-]{1,63}")

_sessions: weakref.WeakValueDictionary[tuple[str, str, int], Session] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # a program that is imported as a client may open a cache too


class _Url:
    """A URL with options.

    Args:
        url: the URL.
        known: the options that it may have.

    Raises:
        StoreError: when it is not valid.
    """

    def __init__(self, url: str, known: Sequence[str]) -> None:
        self.where = shown(url)
        try:
            self.parts = urlsplit(url)
        except ValueError:
            raise self._invalid("has no valid host or port") from None
        self._options = {name: values[-1] for name, values in parse_qs(self.parts.query).items()}
        unknown = sorted({*self._options}.difference(known))
        if unknown:
            raise self._invalid(f"has the unknown option {unknown[0]!r}; known are {', '.join(known)}")

    def _invalid(self, what: str) -> StoreError:
        return StoreError(f"the URL of the cache {self.where} {what}")

    def file(self, name: str) -> str:
        """Return the path of the file that an option names."""
        path = Path(self._options[name]).expanduser()
        if not path.is_file():
            raise self._invalid(f"has {name}={self._options[name]}, and there is no such file")
        return str(path)

    def number(self, name: str, default: float) -> float:
        """Return the number of an option."""
        written = self._options.get(name)
        try:
            number = default if written is None else float(written)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise self._invalid(f"has {name}={written}; it is a number above 0")
        return number

    def local(self) -> Path | None:
        """Return the folder for copies on this machine; None if there are to be none.

        It is ``local=`` in the URL, else ``CACHEPIPE_LOCAL``, else a folder in the user's cache folder.
        """
        written = self._options.get("local") or os.environ.get("CACHEPIPE_LOCAL", "")
        if written == "off":
            return None
        if written:
            return folders.expanded(written)
        return Path(platformdirs.user_cache_dir("cachepipe", appauthor=False)) / "local"


class Asked(_Url):
    """What the URL of a Valkey or Redis server says."""

    def __init__(self, url: str) -> None:
        super().__init__(url, _OPTIONS)
        hosts = self.parts.netloc.rpartition("@")[2].split(",")
        try:
            named = [urlsplit(f"//{host}") for host in hosts]
            self.hosts = [(each.hostname or "localhost", each.port or 6379) for each in named]
        except ValueError:
            raise self._invalid("has no valid host or port") from None
        self.prefix = self._options.get("prefix", PREFIX)
        if not self.prefix or any(sign in self.prefix for sign in "{}"):
            raise self._invalid("has a prefix that is empty or has braces")
        self.scheme = SCHEMES[self.parts.scheme]
        self.cluster = self.parts.scheme.endswith("+cluster")

    def options(self) -> dict[str, Any]:
        """Return the options of the client."""
        timeout = self.number("timeout", TIMEOUT)
        options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        options |= self.credentials()
        if self.scheme == "unix":
            return options | {"unix_socket_path": self.parts.path, "db": self.database()}
        (options["host"], options["port"]), *others = self.hosts
        if others and not self.cluster:
            raise self._invalid("names several hosts, and is not that of a cluster (valkey+cluster://)")
        if self.scheme == "valkeys":
            named = {
                f"ssl_{name}": self.file(option) for option, name in _TLS.items() if option in self._options
            }
            options |= {"ssl": True, "ssl_check_hostname": True, **named}
        return options if self.cluster else options | {"db": self.database()}

    def database(self) -> int:
        """Return the number of the database."""
        path = self.parts.path if self.scheme != "unix" else ""
        written = self._options.get("db") or path.strip("/") or "0"
        if not written.isdigit():
            raise self._invalid(f"names the database {written!r}; it is a number")
        return int(written)

    def credentials(self) -> dict[str, str]:
        """Return the user name and the password, as far as there are any."""
        environment = os.environ
        username = unquote(self.parts.username or "") or environment.get("CACHEPIPE_VALKEY_USERNAME", "")
        password = unquote(self.parts.password or "")
        if not password and (file := self._options.get("password_file")):
            try:
                password = Path(file).expanduser().read_text("utf-8").strip()
            except (OSError, ValueError) as error:
                raise self._invalid(f"names a password file that cannot be read: {error}") from None
        password = password or environment.get("CACHEPIPE_VALKEY_PASSWORD", "")
        given = {"username": username, "password": password}
        return {name: value for name, value in given.items() if value}

    def opener(self, *, create: bool, full: bool) -> Callable[[], Engine]:
        """Return what opens the engine.

        Args:
            create: whether to begin a cache where there is none.
            full: whether samples must survive a crash of the server's machine.
        """
        _check_not_hidden("valkey", self.where)
        from cachepipe.stores.remote import valkey  # noqa: PLC0415 - an extra

        client = valkey.client_of(self.options(), self.hosts if self.cluster else None)
        return lambda: valkey.ValkeyEngine(client, self.where, self.prefix, create=create, full=full)


class Database(_Url):
    """What the URL of a PostgreSQL server says."""

    def __init__(self, url: str) -> None:
        super().__init__(url, ("schema", *_WAITS, *_LOCAL, *_LIBPQ))
        self.schema = self._options.get("schema", PREFIX)
        if not _SCHEMA.fullmatch(self.schema):
            raise self._invalid(
                f"has the schema {self.schema!r}; it is at most 63 ASCII letters, digits, _ and -, and does "
                "not begin with pg_"
            )

    def options(self) -> dict[str, Any]:
        """Return the options of libpq."""
        from psycopg import ProgrammingError, conninfo  # noqa: PLC0415 - an extra

        given = {name: self._options[name] for name in _LIBPQ if name in self._options}
        given |= {name: self.file(name) for name in _FILES if given.get(name, "system") != "system"}
        url = f"postgresql://{self.parts.netloc}{self.parts.path}"
        try:
            options = conninfo.conninfo_to_dict(url, **given)
            ports = str(options.get("port", "5432")).split(",")
        except ProgrammingError:  # what it says may quote the password
            ports = ["unknown"]
        if not all(map(str.isdigit, filter(None, ports))):
            raise self._invalid("is not one that PostgreSQL knows: postgresql://user@host:5432/db") from None
        timeout = self.number("timeout", TIMEOUT)
        return {
            "application_name": "cachepipe",
            **options,
            "connect_timeout": math.ceil(timeout),
            "tcp_user_timeout": math.ceil(timeout * 1000),
        }

    def opener(self, *, create: bool, full: bool) -> Callable[[], Engine]:  # noqa: ARG002 - see below
        """Return what opens the engine.

        Args:
            create: whether to begin a cache where there is none.
            full: whether samples must survive a crash of the server's machine; they do.
        """
        _check_not_hidden("psycopg", self.where)
        from cachepipe.stores.remote.postgres import PostgresEngine  # noqa: PLC0415 - an extra

        options, timeout = self.options(), self.number("timeout", TIMEOUT)
        return lambda: PostgresEngine(options, self.where, self.schema, timeout, create=create)


def _check_not_hidden(package: str, where: str) -> None:
    """Refuse a file that Python would import in place of a client's package."""
    if package in sys.modules and hasattr(sys.modules[package], "__path__"):
        return
    found = importlib.util.find_spec(package)
    if found is not None and found.submodule_search_locations is None:
        raise StoreError(
            f"the cache {where} cannot be opened: {found.origin} hides the package {package}. Give the file "
            "another name"
        )


def open_url(
    url: str,
    *,
    durability: str = "process",
    read_only: bool = False,
    wait_for_others: float | None = None,
) -> RemoteStore:
    """Return the store that a URL names. Stores of one process on equal URLs are one process to others.

    With ``durability="full"``, it warns of a server that may lose samples when its machine crashes.

    Raises:
        StoreError: when the URL is not valid, or the server cannot be used.
    """
    if durability not in ("process", "full"):
        raise ValueError(f"durability is 'process' or 'full'; got {durability!r}")
    name = (url, durability, os.getpid())
    with _lock:
        session = _sessions.get(name)
        if session is not None:
            with contextlib.suppress(SessionEnded):
                return RemoteStore(session, read_only=read_only, wait_for_others=wait_for_others)
        session = _sessions[name] = _session(url, create=not read_only, full=durability == "full")
        return RemoteStore(session, read_only=read_only, wait_for_others=wait_for_others)


def _session(url: str, *, create: bool, full: bool) -> Session:
    asked = Database(url) if SCHEMES[urlsplit(url).scheme] == "postgresql" else Asked(url)
    try:
        opener = asked.opener(create=create, full=full)
    except ImportError as error:
        raise StoreError(f"the cache {asked.where} cannot be opened: {error}") from error
    patience = asked.number("patience", PATIENCE)
    engine = patiently(opener, asked.where, patience, for_nobody=OPENING)
    folder, megabytes = asked.local(), asked.number("local_mb", MEGABYTES)
    copies = None if folder is None else copies_in(folder, engine, megabytes)
    return Session(engine, patience=patience, lease=asked.number("lease", LEASE), copies=copies)


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
