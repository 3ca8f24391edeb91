"""Adds what other programs have paid for to a store, by the rules of ``contract/entries.py``.

An imported sample has an id that follows from its content and its place at the source. So an import that is
repeated finds its samples, and two caches with the same import merge without doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson

from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment, addition
from cachepipe.contract.keys import Question, trimmed
from cachepipe.importers.report import Imported
from cachepipe.providers.generation import Kept
from cachepipe.sharing import Progress, add
from cachepipe.stores.base import Store, place_of

RUN: Final = "import"
"""The run of imported samples."""

_MICRO: Final = 1_000_000
_TOGETHER: Final = 500  # questions that are written in one transaction
_BYTES: Final = 8 << 20  # bytes of their samples


def sample_of(kept: Kept, name: str, at: int, origin: int, call: Any = None) -> EntrySample:
    """Return a sample to add.

    It belongs to no namespace's budget, because nothing is spent here.

    Args:
        kept: the sample as it is stored.
        name: its permanent id.
        at: when it was generated, in seconds since 1970.
        origin: its number in its source.
        call: the provider's id of its call.
    """
    # Times of sources are whole seconds; the id orders the samples of one second.
    stamp = at * _MICRO + sum(name.encode()) * 997 % _MICRO
    head = {"id": name, "stamp": stamp}
    about = {"call": call} if isinstance(call, str) and call.isascii() else {}
    facts = orjson.dumps({**head, **about, "run": RUN, "namespace": SHARED})
    header = facts if len(kept.noted) <= len(b"{}") else facts[:-1] + b"," + kept.noted[1:]
    return EntrySample(name, origin, trimmed(header), kept.payload)


class Adder:
    """Adds samples and draws to a store, many questions in one transaction.

    Args:
        store: the store, open for writing.
        imported: gets the figures.
        progress: gets how many requests or entries are done.
    """

    def __init__(self, store: Store, imported: Imported, progress: Progress) -> None:
        self._store = store
        self._imported = imported
        self._progress = progress
        self._entries: dict[str, Entry] = {}
        self._ids: set[str] = set()
        self._size = 0

    def add(self, question: Question, samples: Sequence[EntrySample]) -> None:
        """Add samples of a question; one that was added before counts as repeated."""
        entry = self._entries.get(question.key)
        if entry is None:
            entry = Entry(question.key, question.scope, question.document)
            self._entries[question.key] = entry
        for sample in samples:
            if sample.id in self._ids:
                self._imported.repeated += 1
                continue
            self._ids.add(sample.id)
            self._size += len(sample.payload)
            entry.samples.append(sample)

    def draw(self, question: Question, draw: Draw, samples: Sequence[EntrySample], user: str) -> None:
        """Add a draw of samples that were added.

        Args:
            question: the question.
            draw: the draw; a shared one keeps its first sample, as further ones answer the same.
            samples: its samples.
            user: the label of the namespace that draws.
        """
        entry = self._entries[question.key]
        if draw.shared and user not in entry.users:
            entry.users = sorted([*entry.users, user])
        if draw in entry.draws or not samples:
            return
        names = tuple(sample.id for sample in samples)
        stamp = max(place_of(sample.header).stamp for sample in samples)
        entry.draws[draw] = [EntrySegment(0, names, stamp, len(names), None, 0)]

    def step(self) -> None:
        """Count a request or an entry, and write what has gathered if it is much."""
        self._imported.found += 1
        self._progress("importing", self._imported.found)
        if len(self._entries) >= _TOGETHER or self._size >= _BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        entries, self._entries = self._entries, {}
        self._ids, self._size = set(), 0
        if not entries:
            return
        held = {entry.key: entry for entry in self._store.entries_of(sorted(entries))}
        for key, entry in entries.items():
            self._fit(entry, held.get(key))
        add(self._store, [[entry] for entry in entries.values()], self._imported.counts)

    def _fit(self, entry: Entry, ours: Entry | None) -> None:
        """Change an entry such that it contradicts nothing in the store."""
        if ours is not None:
            # A sample of an earlier import stays as it is; its source may say another time now.
            known = {sample.id: sample for sample in ours.samples}
            entry.samples = [
                sample
                if (there := known.get(sample.id)) is None
                else sample._replace(header=there.header, payload=there.payload, discarded=there.discarded)
                for sample in entry.samples
            ]
        entry.samples.sort(key=lambda sample: (sample.origin, sample.id))
        for draw in addition(ours, entry).different:
            self._imported.drawn_before += 1
            del entry.draws[draw]
