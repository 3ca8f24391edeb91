"""What an importer took, and what it left and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cachepipe.sharing import Counts


class NotTaken(NamedTuple):
    """Something that an importer could not take, or not completely.

    Attributes:
        where: its place: a line of a file, or an entry of a folder.
        name: its ``custom_id``, or its key.
        why: the reason, a sentence without its full stop.
    """

    where: str
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} ({self.name}): {self.why}" if self.name else f"{self.where}: {self.why}"


@dataclass
class Imported:
    """The result of an import.

    Attributes:
        found: how many requests of a batch, or entries of a CacheSaver folder, there were.
        taken: how many of them the cache holds now, at least in part.
        repeated: how many results or samples were the same as another one, and so were not stored again.
        drawn_before: how many requests have drawn other samples in the namespace before. What was imported
            for them is stored too, and goes to later draws.
        counts: what the cache got.
        left: what could not be taken, and why.
    """

    found: int = 0
    taken: int = 0
    repeated: int = 0
    drawn_before: int = 0
    counts: Counts = field(default_factory=Counts)
    left: list[NotTaken] = field(default_factory=list)

    def leave(self, where: str, name: str, why: str) -> None:
        """Note what could not be taken."""
        self.left.append(NotTaken(where, name, why))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, and a list of what was left."""
        figures = {name: getattr(self, name) for name in ("found", "taken", "repeated", "drawn_before")}
        return {**figures, **self.counts.as_dict(), "left": [each._asdict() for each in self.left]}
