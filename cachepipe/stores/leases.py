"""Proof that a process which generates samples is alive: an OS lock on a file of its own.

The operating system releases the lock when the process dies, however it dies, so no clock and no heartbeat
is needed. All stores that one process opens on one folder share its lease.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from cachepipe import forks
from cachepipe.errors import StoreError
from cachepipe.stores.base import Process
from cachepipe.stores.folders import NOFOLLOW

try:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

except ImportError:  # Windows
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True


_FOLDER = "leases.cache.db"
_NAME = re.compile(r"([A-Za-z0-9_.-]{1,100})-([0-9]{1,20})-[0-9a-f]{12}")
_NOT_THERE = frozenset({errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENXIO})
_guard = threading.Lock()
_held: dict[Path, Lease] = {}


class Lease:
    """This process's lease on one cache folder. Get it with ``hold``; end it with ``release``."""

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:100] or "host"
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(6)}"
        self._folder = folder
        place = _place(folder)
        place.mkdir(mode=0o700, exist_ok=True)
        self._path = place / self.name
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o600)
        self.holders = 1
        self.fork = forks.count
        _lock(self._descriptor, wait=True)

    def release(self) -> bool:
        """Give the lease back; the last holder ends it, and gets True."""
        with _guard:
            self.holders -= 1
            if self.holders:
                return False
            if _held.get(self._folder) is self:
                del _held[self._folder]
            self.forget()
            self._path.unlink(missing_ok=True)
            return True

    def deleted(self) -> bool:
        """Return True if the file of the lease was deleted, usually with its folder, and not only moved."""
        return self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0

    def forget(self) -> None:
        """Close the file; in a forked child this leaves the parent's lock alone."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _place(folder: Path) -> Path:
    """Return the folder of a cache's leases."""
    place = folder / _FOLDER
    if place.is_symlink():
        raise StoreError(
            f"the cache {folder} cannot be used: {_FOLDER} must be a folder, but is a symbolic link. "
            "Delete the link"
        )
    return place


def hold(folder: Path) -> Lease:
    """Return this process's lease on a folder; create it if there is none."""
    with _guard:
        lease = _held.get(folder)
        if lease is None:
            lease = _held[folder] = Lease(folder)
        else:
            lease.holders += 1
        return lease


def own(folder: Path) -> str | None:
    """Return the name of this process's lease on a folder, if it has one."""
    with _guard:
        lease = _held.get(folder)
    return None if lease is None else lease.name


def alive(folder: Path, name: str) -> bool:
    """Return True if the process that holds a lease lives.

    The name may come from a received cache: a name that no lease can have belongs to no process.
    """
    if name == own(folder):
        return True
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    path = _place(folder) / name
    try:
        descriptor = os.open(path, os.O_RDWR | NOFOLLOW)
    except PermissionError:
        return True  # another user's process: it may live, and taking over could buy samples twice
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise
    try:
        if not _lock(descriptor, wait=False):
            return True
        path.unlink(missing_ok=True)  # names are never used again
        return False
    finally:
        os.close(descriptor)


def process(name: str) -> Process:
    """Return the process whose lease has this name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return Process("an unknown process")
    host, pid, state = match[1], match[2], ""
    if host == socket.gethostname():
        with contextlib.suppress(OSError):  # it has ended, or the system has no such files
            # The name of the program stands in parentheses, and may hold anything.
            state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
    return Process(f"process {pid} on host {host:.80}", stopped=state in ("T", "t"))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for creating and opening its files; wait for others who hold it."""
    descriptor = os.open(folder / "lock.cache.db", os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o600)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _after_fork() -> None:
    """Drop the parent's leases in a forked child: they are not its own."""
    global _guard  # noqa: PLW0603 - the parent may have held it while forking
    _guard = threading.Lock()
    for lease in _held.values():
        lease.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
