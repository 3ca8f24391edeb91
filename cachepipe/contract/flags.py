"""Which samples are duplicated: merged into equal requests that are served together (C6)."""

from __future__ import annotations

from typing import NamedTuple

Group = tuple[str, str | None]
"""A key and a namespace."""


class Asker(NamedTuple):
    """Who makes a request: requests that one asker makes one after the other are not served together.

    Attributes:
        task: what runs.
        batch: the batch that it is part of, if any: the requests of a batch are served together.
    """

    task: object
    batch: object = None


def lone(n: int) -> list[bool]:
    """Return the flags ``duplicated`` of a request that is served alone: all but the first are true."""
    flags = [True] * n
    flags[0] = False
    return flags


class Groups:
    """The groups of equal requests that are open now; the caller closes them when they have been served."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[Group, Asker] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def duplicated(self, group: Group, asker: Asker, n: int) -> list[bool]:
        """Return the flags ``duplicated`` of a request for n samples, which joins its group or opens it."""
        flags = [True] * n
        opener = self._open.get(group)
        together = opener is not None and (
            opener.task is not asker.task or opener.batch is asker.batch is not None
        )
        if not together:
            flags[0] = False
            self._open[group] = asker
        return flags

    def close(self, group: Group) -> None:
        """Close a group: the next request of its kind opens another."""
        self._open.pop(group, None)

    def clear(self) -> None:
        """Close all groups."""
        self._open.clear()
