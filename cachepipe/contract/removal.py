"""What goes when draws or unused samples of a question are removed (C1, C2).

All draws that a namespace has made of a question go together, so a draw that stays never shares a sample
with a later one of its namespace. A sample goes only if no draw that stays has it, and no other sample gets
its index.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be removed.

    Attributes:
        draws: whether draws are removed.
        samples: whether samples that no draw has are deleted.
        namespaces: the labels of namespaces: only what they have drawn; None for all.
        before: only draws and samples with a lower stamp.
        above: only questions whose samples take more bytes together.
    """

    draws: bool
    samples: bool
    namespaces: Collection[str] | None = None
    before: int | None = None
    above: int | None = None

    def is_old(self, stamp: int) -> bool:
        """Return True if something with a stamp is old enough."""
        return self.before is None or stamp < self.before


class Step(NamedTuple):
    """What goes of one question.

    Attributes:
        key: the key of the question.
        namespaces: the labels of the namespaces whose draws go.
        draws: how many draws go.
        unused: the selected samples that no draw has then.
        ends: whether nothing of the question is left then, so that it goes too.
    """

    key: str
    namespaces: Sequence[str]
    draws: int
    unused: Sequence[EntrySample]
    ends: bool = False


def step(entry: Entry, selection: Selection) -> Step | None:
    """Return what goes of a question; None if that is nothing.

    Args:
        entry: what the cache holds of it.
        selection: what is to be removed.
    """
    stored = [sample for sample in entry.samples if sample.discarded is None]
    if selection.above is not None and sum(len(sample.payload) for sample in stored) <= selection.above:
        return None
    if selection.namespaces is not None and not _drawn_by(entry, selection.namespaces):
        return None
    namespaces = _namespaces(entry, selection) if selection.draws else []
    gone = {draw: segments for draw, segments in entry.draws.items() if draw.namespace in namespaces}
    left = {draw: segments for draw, segments in entry.draws.items() if draw not in gone}
    held = _held(left)
    had = _held(gone) if selection.draws and selection.namespaces is not None else None
    unused = [
        sample
        for sample in stored
        if sample.id not in held
        and (had is None or sample.id in had)
        and (had is not None or selection.is_old(_stamp(sample)))
    ]
    erased = {sample.id for sample in unused} if selection.samples else set()
    ends = not left and all(sample.id in erased for sample in stored)
    if not namespaces and not erased and not (ends and _is_left_over(entry, selection)):
        return None
    return Step(entry.key, namespaces, len(gone), unused, ends)


def _is_left_over(entry: Entry, selection: Selection) -> bool:
    """Return True if the selection includes an empty question, which a stopped removal has left."""
    old = all(selection.is_old(_stamp(sample)) for sample in entry.samples)
    return selection.samples and selection.namespaces is None and old


def _drawn_by(entry: Entry, namespaces: Collection[str]) -> bool:
    """Return True if one of some namespaces has drawn the question."""
    return any(draw.namespace in namespaces for draw in entry.draws) or any(
        user in namespaces for user in entry.users
    )


def _namespaces(entry: Entry, selection: Selection) -> list[str]:
    """Return the labels of the namespaces whose draws are deleted.

    The label of the shared draw is among them if its last user is deleted.
    """
    newest: dict[str, int] = dict.fromkeys(entry.users, 0)
    for draw, segments in entry.draws.items():
        stamp = max(segment.stamp for segment in segments)
        newest[draw.namespace] = max(stamp, newest.get(draw.namespace, 0))
    shared = newest.pop(SHARED, None)
    wanted = [
        label
        for label, stamp in newest.items()
        if (selection.namespaces is None or label in selection.namespaces)
        and selection.is_old(max(stamp, shared or 0) if label in entry.users else stamp)
    ]
    if shared is not None and selection.is_old(shared):
        users = [user for user in entry.users if user not in wanted]
        if not users and (entry.users or selection.namespaces is None):
            wanted.append(SHARED)
    return sorted(wanted)


def _held(draws: Mapping[Draw, Sequence[EntrySegment]]) -> set[str | None]:
    """Return the ids of the samples in all segments: if a refresh is undone, what it replaced returns."""
    return {name for segments in draws.values() for segment in segments for name in segment.samples}


def _stamp(sample: EntrySample) -> int:
    stamp: int = orjson.loads(sample.header)["stamp"]
    return stamp
