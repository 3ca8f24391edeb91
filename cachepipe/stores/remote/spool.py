"""Samples that a shared store could not take: they lie in a file of this machine until it can."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

import orjson
import platformdirs
from xxhash import xxh3_64_hexdigest

from cachepipe.errors import NotStored, StoreError, StoreUnreachable, warn
from cachepipe.stores import folders, leases
from cachepipe.stores.base import Commit, Result

_FILE: Final = "samples.jsonl"
_REFUSED: Final = "refused.jsonl"


class Spool:
    """The samples of a store that wait on this machine, in a file that only its user can read.

    Args:
        identity: identifies the store.
    """

    def __init__(self, identity: str) -> None:
        self._identity = identity

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        name = xxh3_64_hexdigest(self._identity.encode())
        return Path(platformdirs.user_cache_dir("cachepipe", appauthor=False)) / "spool" / name

    def __bool__(self) -> bool:
        """Return True if samples may be waiting."""
        with contextlib.suppress(OSError):
            return (self.folder / _FILE).stat().st_size > 0
        return False

    def put(self, commits: Sequence[Commit], lease: int) -> Path:
        """Add samples; return the file.

        Args:
            commits: the samples.
            lease: the lease under which they were generated.

        Raises:
            OSError: when they cannot be written.
        """
        folders.make(self.folder)
        folders.make_private(self.folder)
        with leases.alone(self.folder):
            _append(self.folder / _FILE, b"".join(_line(commit, lease) for commit in commits))
        return self.folder / _FILE

    def empty(
        self, write: Callable[[Commit, int], Result | StoreError], stored: Callable[[str], Collection[str]]
    ) -> None:
        """Write the samples to the store; those that it refuses stay in another file.

        A process that was killed while it emptied the file has stored some of them already, perhaps at other
        indices; they are recognised by their ids.

        Args:
            write: commits a sample that was generated under a lease; returns the result or the error.
            stored: returns the ids of the samples of a key.

        Raises:
            StoreUnreachable: when the store does not answer; the samples stay.
        """
        if not self:
            return
        with leases.alone(self.folder):
            path = self.folder / _FILE
            lines = path.read_bytes().splitlines(keepends=True)
            stored = functools.cache(stored)
            refused = [told for line in lines if (told := _written(write, stored, line)) is not None]
            self._keep(refused)
            path.unlink()

    def _keep(self, refused: Sequence[tuple[bytes, StoreError]]) -> None:
        """Keep samples that the store has refused, as they were paid for."""
        if refused:
            path = self.folder / _REFUSED
            _append(path, b"".join(line for line, _ in refused))
            warn(
                f"{len(refused)} samples that waited for the store were refused: {refused[0][1]}. They are "
                f"kept in {path}",
                NotStored,
            )


def _written(
    write: Callable[[Commit, int], Result | StoreError],
    stored: Callable[[str], Collection[str]],
    line: bytes,
) -> tuple[bytes, StoreError] | None:
    """Write the sample in a line, unless it is stored; return the line and the error if it is refused."""
    read = _read(line)
    if read is None:
        return None
    commit, lease = read
    try:
        result = None if commit.id in stored(commit.key) else write(commit, lease)
    except StoreError as error:
        result = error
    if isinstance(result, StoreUnreachable):
        raise result
    return (line, result) if isinstance(result, StoreError) else None


def _append(path: Path, lines: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | folders.NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _line(commit: Commit, lease: int) -> bytes:
    payload = base64.b64encode(commit.payload).decode()
    return orjson.dumps([lease, commit.key, commit.index, payload, commit.meta, commit.id]) + b"\n"


def _read(line: bytes) -> tuple[Commit, int] | None:
    """Return the sample in a line and its lease; None if the process was killed while it wrote the line."""
    if not line.endswith(b"\n"):
        return None
    try:
        lease, key, index, payload, meta, identifier = orjson.loads(line)
        return Commit(key, index, base64.b64decode(payload), meta, identifier), int(lease)
    except (ValueError, TypeError):
        return None
