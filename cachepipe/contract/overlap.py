"""Notices namespaces that look like replicates: they differ only in digits, and draw the same samples.

Ten repetitions of an experiment that are written as ten namespaces share all samples (C3), and so show a
standard error of 0. Comparisons and ablations differ from them in the questions that they ask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from cachepipe.contract.draws import Claimant, Draw, label, namespace_of

ENOUGH: Final = 10
"""The least number of equal draws that three namespaces make."""
SHARE: Final = 0.9
"""The least share of these draws among all draws of the namespaces that differ only in digits."""
MOST: Final = 50_000
"""The number of draws that a run compares, about 150 bytes each; after more it stops."""

_NAMESPACES: Final = 3  # two are a comparison, or a run and its rerun
_DIGITS: Final = re.compile("[0-9]+")
_NO_REPLICATE: Final = label(Claimant().replicate)


class Overlap(NamedTuple):
    """What namespaces that look like replicates have in common.

    Attributes:
        namespaces: three of them.
        samples: the number of samples that three or more of them have drawn so far.
    """

    namespaces: tuple[str, ...]
    samples: int


class _Family:
    """Namespaces that differ only in digits."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.drawn: dict[int, int] = {}  # by the hash of a draw, one bit for each namespace that made it
        self.common = self.samples = 0  # draws that three or more have made, and their samples

    def overlap(self, makers: int, samples: int) -> Overlap | None:
        """Count a draw that a third namespace makes; return the overlap if it is large enough."""
        self.common += 1
        self.samples += samples
        if self.common < ENOUGH or self.common < SHARE * len(self.drawn):
            return None
        names = [name for place, name in enumerate(self.names) if makers >> place & 1]
        return Overlap(tuple(names), self.samples)


class NamespaceOverlap:
    """Compares the draws of one run's namespaces.

    Two draws count as equal if they have the same key, request id, occurrence and last sample: as the same
    request has in each namespace, unless its ``n`` differs or its samples are generated anew. Draws in a
    replicate do not count, because their program knows replicates.

    It needs no lock: a draw may be missed if another thread counts at the same moment, and none is invented.

    Args:
        most: the number of draws and namespaces after which it stops; 0 compares nothing.
    """

    def __init__(self, most: int = MOST) -> None:
        self._left = most
        self._families: dict[str, _Family] = {}  # by the label of a namespace without its digits
        self._places: dict[str, tuple[_Family, int] | None] = {}  # by label, the family and the bit in it

    def add(self, draw: Draw, indices: Sequence[int]) -> Overlap | None:
        """Count a draw; return the overlap when it first shows.

        Args:
            draw: the draw.
            indices: the indices of its samples.
        """
        if self._left <= 0:
            if self._places:
                self._families, self._places = {}, {}
            return None
        try:
            place = self._places[draw[0]]  # by number, in half the time: this is part of every hit
        except KeyError:
            place = self._new(draw.namespace)
        if place is None or draw[4] != _NO_REPLICATE:
            return None
        family, bit = place
        drawn, name = family.drawn, hash((draw[1], draw[2], draw[3], indices[-1]))
        before = drawn.get(name)
        if before is None:
            drawn[name] = bit
            self._left -= 1
            return None
        drawn[name] = makers = before | bit
        if makers == before or makers.bit_count() != _NAMESPACES:
            return None
        overlap = family.overlap(makers, len(indices))
        if overlap is not None:
            self._left = 0
        return overlap

    def _new(self, written: str) -> tuple[_Family, int] | None:
        """Return the family of a namespace that was not seen before, and its bit; None without digits."""
        place = None
        alike, digits = _DIGITS.subn("0", written)
        if digits:
            family = self._families.setdefault(alike, _Family())
            place = family, 1 << len(family.names)
            family.names.append(namespace_of(written) or "")
        self._left -= 1
        return self._places.setdefault(written, place)
