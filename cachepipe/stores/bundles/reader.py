"""Reads bundles: whole, one question after another, or one question by its key."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from cachepipe.contract.entries import Entry
from cachepipe.contract.keys import Question, digest
from cachepipe.errors import BundleError
from cachepipe.prefetch import prefetched
from cachepipe.stores.base import StoredQuestion
from cachepipe.stores.bundles import SUFFIX, container
from cachepipe.stores.bundles.container import Chunk
from cachepipe.stores.bundles.lines import Lines
from cachepipe.stores.bundles.manifest import Manifest, add_counts

_KEPT: Final = 8  # chunks whose entries are kept in memory


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Return True if a path names a bundle: a file, or nothing yet with the name of a bundle."""
    # The functions of os.path, unlike the methods, also answer for a path that cannot be looked at.
    is_named = os.path.splitext(path)[1] == SUFFIX  # noqa: PTH122
    return os.path.isfile(path) or (is_named and not os.path.isdir(path))  # noqa: PTH112, PTH113


class Bundle:
    """A bundle, opened for reading. Thread-safe.

    Args:
        path: the file.

    Raises:
        BundleError: when it is not a bundle, or its manifest is damaged.
        FormatError: when a later version of cachepipe wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._where = str(self.path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise BundleError(f"the bundle {self._where} cannot be read: {error.strerror}") from error
        self._lock = threading.Lock()
        self._lines = Lines(self._where)
        self._entries: OrderedDict[int, dict[str, Entry]] = OrderedDict()
        try:
            content, end = container.read_manifest(self._file, self._where)
            self.manifest = Manifest.loads(content, self._where)
            _check_chunks(self.manifest.chunks, end, self._lines)
        except BaseException:
            self._file.close()
            raise
        self._checked = False  # whether all lines have been read
        self._firsts = [chunk.first for chunk in self.manifest.chunks]
        self.identity = f"bundle:{self.manifest.content}"

    def __repr__(self) -> str:
        return f"<Bundle {self.path} {self.manifest.counts['samples']} samples>"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a question, or None.

        Raises:
            BundleError: when its chunk is damaged.
        """
        place = bisect.bisect_right(self._firsts, key) - 1
        if place < 0:
            return None
        with self._lock:
            found = self._entries.get(place)
            if found is None:
                chunk = self.manifest.chunks[place]
                lines = container.read_chunk(self._file, chunk, self._where)
                found = {entry.key: entry for entry in self._lines.entries(lines)}
                self._entries[place] = found
                if len(self._entries) > _KEPT:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(place)
        return found.get(key)

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the same question under another scope, or None; other questions are not searched for.

        Raises:
            BundleError: when a chunk is damaged.
        """
        for scope in self.manifest.scopes:
            entry = self.entry(digest(scope, question.document))
            if entry is not None and entry.key != question.key:
                return StoredQuestion(entry.key, entry.scope, entry.document, self.manifest.first / 1e6)
        return None

    def entries(self, namespaces: Collection[str] | None = None) -> Iterator[Entry]:
        """Iterate over all entries, in the order of their keys; each line is checked once.

        Args:
            namespaces: the labels of the wanted namespaces, for a store; here all entries are read.

        Raises:
            BundleError: when the bundle is damaged; what came before is what was written.
        """
        del namespaces
        with prefetched(map(self._read, self.manifest.chunks)) as chunks:
            if not self._checked:
                yield from self._check(chunks)
                self._checked = True
                return
            for lines in chunks:
                yield from self._lines.entries(lines, checked=True)

    def _check(self, chunks: Iterable[bytes]) -> Iterator[Entry]:
        """Iterate over all entries; raise an error unless all lines are what cachepipe writes."""
        counts = dict.fromkeys(self.manifest.counts, 0)
        content = hashlib.sha256()
        last = ""
        for lines in chunks:
            content.update(lines)
            for entry in self._lines.entries(lines):
                if not last < entry.key:
                    raise self._lines.refused(ValueError(f"the question {entry.key} is not in order"))
                last = entry.key
                add_counts(counts, entry)
                yield entry
        if counts != self.manifest.counts or content.hexdigest() != self.manifest.content:
            raise self._lines.refused(ValueError("its manifest says something else than its lines"))

    def _read(self, chunk: Chunk) -> bytes:
        """Return the lines of a chunk."""
        with self._lock:
            return container.read_chunk(self._file, chunk, self._where)


def _check_chunks(chunks: list[Chunk], end: int, lines: Lines) -> None:
    """Raise an error unless chunks follow one another from the beginning to the end."""
    offset = 0
    for chunk in chunks:
        if chunk.offset != offset or chunk.length <= 0 or chunk.size <= 0:
            raise lines.refused(ValueError("its chunks do not follow one another"))
        offset += chunk.length
    firsts = [chunk.first for chunk in chunks]
    if offset != end or firsts != sorted({*firsts}):
        raise lines.refused(ValueError("its chunks do not follow one another"))
