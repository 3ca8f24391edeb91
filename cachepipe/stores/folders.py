"""Folders of caches: where they are, and which files in them are refused (C12).

A folder may come from anyone. So nothing that it holds is used as a path, and no link in it is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cachepipe.errors import StoreError
from cachepipe.stores.remote import is_url, shown

NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
"""A flag for ``os.open``: fail where the path is a symbolic link."""

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # as a path, "//" becomes "/"
_BESIDE: Final = ("", "-wal", "-shm", "-journal")  # what SQLite names its files
_JOURNAL_MAGIC: Final = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"


def expanded(folder: str | os.PathLike[str]) -> Path:
    """Return a folder as an absolute path.

    Raises:
        StoreError: when the path is empty or a URL, or names the home directory of a user who has none.
    """
    name = os.fspath(folder)
    if name == "":
        raise StoreError("a cache is a folder; got ''. Omit it to use the default folder")
    if isinstance(name, str) and _URL.match(name):
        url = _URL.sub(r"\1://", name, count=1)
        if is_url(url):
            raise StoreError(
                f"a folder is expected; got the URL of a server, {shown(url)}. Pass it as a string to "
                "cache=, --cache or open_store"
            )
        raise StoreError(
            f"a cache is a folder or the URL of a server, such as valkey://host:6379; got {shown(url)!r}"
        )
    try:
        return Path(folder).expanduser().resolve()
    except RuntimeError as error:
        raise homeless(f"the cache folder {os.fspath(folder)}") from error


def homeless(what: str) -> StoreError:
    """Return the error for a folder that needs a home directory, for a user who has none."""
    return StoreError(
        f"{what} cannot be opened: this user has no home directory. "
        "Name another folder: cache=, --cache or the environment variable CACHEPIPE_DIR"
    )


def check_files(folder: Path, *names: str) -> None:
    """Refuse databases of a folder, and SQLite's files beside them, that lead to other files.

    Hard links are accepted: no archive and no copy can create one to a file outside the folder, while
    backups and package managers create them inside.

    Raises:
        StoreError: when one is not a regular file, or a journal names a file to delete.
        OSError: when one cannot be examined.
    """
    for name in names:
        for ending in _BESIDE:
            path = folder / f"{name}{ending}"
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(found.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "of another kind"
                raise StoreError(
                    f"the cache {folder} cannot be used: {path.name} must be a regular file, and is {kind}. "
                    "Put the file itself there, or use another folder"
                )
            if ending == "-journal" and _names_a_file(path, found.st_size):
                raise StoreError(
                    f"the cache {folder} cannot be used: {path.name} names another file, which SQLite would "
                    "delete. No version of cachepipe writes such a journal; delete it, or use another folder"
                )


def _names_a_file(journal: Path, size: int) -> bool:
    """Return True if a rollback journal ends with the name of a super-journal."""
    if size < len(_JOURNAL_MAGIC):
        return False
    try:
        with journal.open("rb") as file:
            file.seek(-len(_JOURNAL_MAGIC), os.SEEK_END)
            return file.read() == _JOURNAL_MAGIC
    except FileNotFoundError:  # its transaction has ended meanwhile
        return False


def make(folder: Path) -> Sequence[Path]:
    """Create a folder and its missing parents, private to the user; return those that were created."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return missing


def make_private(folder: Path) -> None:
    """Let only its owner enter a folder, unless it is somebody else's that is shared with this user."""
    if folder.stat().st_mode & 0o077:
        with contextlib.suppress(PermissionError):
            folder.chmod(0o700)


def sync(folder: Path) -> None:
    """Wait until the names of a folder's entries are on the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
