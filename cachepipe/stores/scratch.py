"""Temporary folders that are removed when they are no longer used, also after their process was killed.

A process holds a lock on each of its folders, which the system releases when the process ends, however it
ends. Whoever makes the next folder removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no such locks: what a killed process left stays there
    fcntl = None  # type: ignore[assignment]

_PREFIX: Final = "cachepipe-scratch-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new temporary folder of this user, and remove it afterwards."""
    _remove_left()
    folder, lock = _locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked() -> tuple[Path, int | None]:
    """Return a new folder, and the lock on it; None where there are no such locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = None if fcntl is None else _lock(folder)
        if lock is not None or fcntl is None:
            return folder, lock
        # Another process took it for one that nobody holds, in the moment before it was locked.


def _lock(folder: Path) -> int | None:
    """Return a lock on a folder of this user; None if another process holds it, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), folder.lstat()):
                return descriptor
    except OSError:  # it is locked, or gone
        pass
    os.close(descriptor)
    return None


def _remove_left() -> None:
    """Remove the folders of this user that no process holds."""
    left = () if fcntl is None else Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    for folder in left:
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
