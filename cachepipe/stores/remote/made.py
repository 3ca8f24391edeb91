"""The draws that a process has made of keys of which their namespaces had no draw before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from cachepipe.contract.draws import Draw

MOST: Final = 100_000
"""The most draws that are counted."""


class MadeDraws:
    """Draws by key and namespace, from the moment on when the namespace had none of the key.

    So a draw that is not among them is new, unless a process that is alive with this one has made it.

    Args:
        most: the most draws that are counted; those that began first are forgotten first.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._draws: OrderedDict[tuple[str, str], set[Draw]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def begin(self, draw: Draw) -> None:
        """Count from now on, as the namespace of a draw has none of its key."""
        with self._lock:
            self._draws.setdefault((draw.key, draw.namespace), set())

    def add(self, draw: Draw) -> None:
        """Count a draw, if its namespace is counted."""
        with self._lock:
            made = self._draws.get((draw.key, draw.namespace))
            if made is None or draw in made:
                return
            made.add(draw)
            self._count += 1
            while self._count > self._most:
                _, forgotten = self._draws.popitem(last=False)
                self._count -= len(forgotten)

    def may_hold(self, draw: Draw) -> bool:
        """Return True if a draw was made, or if its namespace is not counted."""
        made = self._draws.get((draw.key, draw.namespace))
        return made is None or draw in made
