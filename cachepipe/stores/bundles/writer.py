"""Writes a bundle: equal content gives equal bytes, and the memory does not grow with it.

A thread compresses each chunk while the next one is put together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import BinaryIO, Final

from cachepipe.contract.entries import Entry
from cachepipe.differences import asked_in, loaded
from cachepipe.stores.bundles import container
from cachepipe.stores.bundles.container import Chunk
from cachepipe.stores.bundles.lines import lines_of
from cachepipe.stores.bundles.manifest import Manifest, Tally
from cachepipe.stores.bundles.secrets import Findings

_WAITING: Final = 4  # chunks that wait for the thread


class Writer:
    """Writes a bundle to a file.

    Args:
        file: the file, at its beginning.
        version: the version of cachepipe.
        namespaces: the exported namespaces; None for all.
        findings: collects what looks like a secret; None does not look.
    """

    def __init__(
        self,
        file: BinaryIO,
        version: str,
        namespaces: Collection[str | None] | None = None,
        findings: Findings | None = None,
    ) -> None:
        self._file = file
        self._tally = Tally(version, namespaces)
        self._findings = findings
        self._chunks: list[Chunk] = []
        self._packing: deque[tuple[str, int, Future[bytes]]] = deque()
        self._offset = 0
        self._first = ""
        self._lines: list[bytes] = []
        self._size = 0

    def write(self, entries: Iterable[Entry]) -> Manifest:
        """Write entries in the order of their keys, and the end of the bundle; return the manifest."""
        with ThreadPoolExecutor(1, "cachepipe-bundle") as pool:
            for entry in entries:
                self._add(entry, pool)
            self._end_chunk(pool)
            while self._packing:
                self._write_chunk()
        manifest = self._tally.done(self._chunks)
        packed = container.member(manifest.dumps())
        self._file.write(packed + container.trailer(self._offset, packed))
        return manifest

    def _add(self, entry: Entry, pool: Executor) -> None:
        lines, document, headers = lines_of(entry)
        model = asked_in(document or loaded(entry.document)).get("model")
        self._tally.add(entry, headers, model)
        self._first = self._first or entry.key
        self._lines += lines
        self._size += sum(map(len, lines))
        if self._size >= container.CHUNK:
            self._end_chunk(pool)

    def _end_chunk(self, pool: Executor) -> None:
        if not self._lines:
            return
        content = b"".join(self._lines)
        if self._findings is not None:
            self._findings.scan(content)
        self._tally.add_lines(content)
        self._packing.append((self._first, len(content), pool.submit(container.member, content)))
        self._first, self._lines, self._size = "", [], 0
        if len(self._packing) > _WAITING:
            self._write_chunk()

    def _write_chunk(self) -> None:
        first, size, packing = self._packing.popleft()
        packed = packing.result()
        self._file.write(packed)
        self._chunks.append(container.chunk(first, self._offset, packed, size))
        self._offset += len(packed)
