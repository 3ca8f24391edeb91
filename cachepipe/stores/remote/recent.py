"""What a process has written to a shared store lately, in case that a failover of its server loses it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import PENDING, SAMPLE, Rows, Swap

SECONDS: Final = 30.0
"""Seconds for which rows are kept."""
BYTES: Final = 16_000_000
"""The most bytes of rows that are kept."""

_OVERHEAD: Final = 300  # bytes that a row takes beside its content
_KEPT: Final = frozenset({rows.KNOWN, rows.QUESTION, rows.DRAW, SAMPLE})


class _Kept(NamedTuple):
    """A row that was written; None for a pending index that was ended.

    Attributes:
        at: when it was written.
        row: the row.
        ids: for a draw, the ids of its samples by index, as far as they were known.
    """

    at: float
    row: bytes | None
    ids: Mapping[int, str]

    @property
    def size(self) -> int:
        """The bytes that it takes."""
        return _OVERHEAD + len(self.row or b"")


@dataclass(slots=True)
class Page:
    """What was written of one key.

    Attributes:
        rows: the rows of its question, draws and samples.
        ids: the ids of samples by index, as the draws were given them.
        ended: the pending indices that were ended.
    """

    rows: Rows = field(default_factory=dict)
    ids: dict[int, str] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


class Recent:
    """The rows that a process has written last, bounded in time and bytes.

    Args:
        seconds: seconds for which rows are kept.
        most: the most bytes of rows that are kept.
        clock: returns a time in seconds.

    Attributes:
        held: whether rows stay however old they are, as some are to be written again.
    """

    def __init__(
        self, seconds: float = SECONDS, most: int = BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.held = False
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[tuple[str, bytes], _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # an event loop and the writer's thread note swaps

    def __len__(self) -> int:
        return len(self._kept)

    def note(self, key: str, swap: Swap, ids: Mapping[int, str]) -> None:
        """Note a swap that was performed.

        Args:
            key: the key.
            swap: the swap.
            ids: the ids of the samples that its operations were shown, by index.
        """
        with self._lock:
            now = self._clock()
            for name, row in swap.puts.items():
                prefix = name[:2]
                if prefix in _KEPT:
                    self._keep(key, name, _Kept(now, row, ids if prefix == rows.DRAW else {}))
                elif prefix == PENDING:
                    self._drop(key, name)
            for name in swap.puts:
                if name.startswith(rows.WHY):  # a discarded sample must not come back
                    self._drop(key, SAMPLE + name[len(rows.WHY) :])
            for name in swap.deletes:
                if name.startswith(PENDING):
                    self._keep(key, name, _Kept(now, None, {}))
                else:
                    self._drop(key, name)
            self._bound(now)

    def _keep(self, key: str, name: bytes, kept: _Kept) -> None:
        self._drop(key, name)
        self._kept[key, name] = kept
        self._bytes += kept.size

    def _drop(self, key: str, name: bytes) -> None:
        kept = self._kept.pop((key, name), None)
        if kept is not None:
            self._bytes -= kept.size

    def _bound(self, now: float) -> None:
        while self._kept:
            (key, name), kept = next(iter(self._kept.items()))
            if self._bytes <= self._most and (self.held or now - kept.at <= self._seconds):
                return
            self._drop(key, name)

    def pages(self, only: Collection[str] | None = None) -> dict[str, Page]:
        """Return what was written of each key, or of some keys."""
        with self._lock:
            self._bound(self._clock())
            found: dict[str, Page] = {}
            for (key, name), kept in self._kept.items():
                if only is not None and key not in only:
                    continue
                page = found.setdefault(key, Page())
                if kept.row is None:
                    page.ended.add(int(name[len(PENDING) :]))
                else:
                    page.rows[name] = kept.row
                    page.ids.update(kept.ids)
            return found
