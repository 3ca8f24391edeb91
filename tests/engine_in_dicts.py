"""A store in dictionaries: the smallest engine under ``cachepipe.stores.operations``, as an example.

It reads and writes rows and decides nothing. A transaction works on the rows themselves, and a copy of them
takes their place if it fails. Several stores may use the same rows, each as a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections import defaultdict

from cachepipe.accounting import Delivered
from cachepipe.contract.allotment import DISCARDED, indices_of
from cachepipe.contract.draws import SHARED, namespace_of
from cachepipe.contract.intervals import IntervalSet, Union
from cachepipe.errors import StoreError
from cachepipe.stores import operations
from cachepipe.stores.base import Bought, DrawInfo, KeyInfo, NamespaceInfo, Note, Sample, StoredQuestion
from cachepipe.stores.ledger import DrawRows, Ledger


@dataclasses.dataclass
class Tables:
    """The rows of all keys."""

    stamp: int = 0
    questions: dict = dataclasses.field(default_factory=dict)  # key -> StoredQuestion
    samples: dict = dataclasses.field(default_factory=dict)  # key, index -> Sample or DISCARDED
    discards: dict = dataclasses.field(default_factory=dict)  # key, index -> header, reason
    listed: dict = dataclasses.field(default_factory=lambda: defaultdict(IntervalSet))  # key -> set
    taken: dict = dataclasses.field(default_factory=lambda: defaultdict(IntervalSet))  # namespace, key -> set
    pending: dict = dataclasses.field(default_factory=dict)  # key, index -> lease
    segments: dict = dataclasses.field(default_factory=lambda: defaultdict(dict))  # draw -> number -> Segment
    generated: dict = dataclasses.field(default_factory=dict)  # draw, number -> how many
    holders: dict = dataclasses.field(default_factory=dict)  # draw, number, lease, token
    uses: dict = dataclasses.field(default_factory=dict)  # key, namespace
    sums: dict = dataclasses.field(default_factory=dict)  # run, namespace -> Delivered
    unreported: list = dataclasses.field(default_factory=list)

    def copy(self):
        """Return the same rows, which do not change with these."""
        copied = Tables(stamp=self.stamp, unreported=list(self.unreported))
        for name, rows in vars(self).items():
            if isinstance(rows, dict):
                getattr(copied, name).update(
                    (place, type(row)(row) if isinstance(row, dict | IntervalSet) else row)
                    for place, row in rows.items()
                )
        copied.sums = copy.deepcopy(self.sums)
        return copied


class Rows(DrawRows):
    """The rows of a key and, if a draw is given, of the draw."""

    def __init__(self, ledger, name, draw=None, avoid=None):
        tables = ledger.tables
        self._ledger, self._tables, self.name, self._draw = ledger, tables, name, draw
        self.listed = tables.listed[name]
        claimed = any(segments and other.key == name for other, segments in tables.segments.items())
        self.is_new = not self.listed and not claimed
        if draw is not None:
            taken = tables.taken[draw.namespace, name]
            self.taken = taken if avoid is None else Union(taken, avoid)
            self.segments = list(tables.segments.get(draw, {}).values())

    def sample(self, index):
        return self._tables.samples.get((self.name, index))

    def has_row(self, index):
        return (self.name, index) in self._tables.samples

    def pending(self, index):
        return self._tables.pending.get((self.name, index))

    def pend(self, index):
        self._tables.pending[self.name, index] = self._ledger.lease()

    def unpend(self, index):
        del self._tables.pending[self.name, index]

    def discard(self, index, why):
        sample = self.sample(index)
        header = sample.header if isinstance(sample, Sample) else b""
        self._tables.discards.setdefault((self.name, index), (header, why))
        self._tables.samples[self.name, index] = DISCARDED

    def others(self):
        alike = {
            draw.namespace: list(segments.values())
            for draw, segments in self._tables.segments.items()
            if segments and draw._replace(namespace="") == self._draw._replace(namespace="")
        }
        alike.pop(SHARED, None)
        alike.pop(self._draw.namespace, None)
        return min(alike.values(), key=lambda segments: segments[0].stamp, default=())

    def add(self, segment, generated):
        self._tables.segments[self._draw][segment.number] = segment
        self._tables.generated[self._draw, segment.number] = generated

    def replace(self, segment):
        self._tables.segments[self._draw][segment.number] = segment

    def drop(self, segment):
        del self._tables.segments[self._draw][segment.number]
        if not self._tables.segments[self._draw]:
            del self._tables.segments[self._draw]

    def hold(self, number, token):
        self._tables.holders[self._draw, number, self._ledger.lease(), token] = True

    def unhold(self, number, token):
        return self._tables.holders.pop((self._draw, number, self._ledger.lease(), token), False)

    def holders(self, number):
        return [lease for draw, of, lease, _ in self._tables.holders if (draw, of) == (self._draw, number)]

    def use(self, namespace):
        self._tables.uses[self.name, namespace] = True


class DictLedger(Ledger):
    """The rows of all keys, as one process uses them."""

    def __init__(self, tables, lease, living):
        self.tables, self._lease, self._living = tables, lease, living

    def lease(self):
        return self._lease

    def alive(self, lease):
        return lease in self._living

    def made_by_others(self, leases):
        return any(lease != self._lease and lease in self._living for lease in leases)

    def author(self):
        return self._lease, self.stamp()

    def prepare(self, claims):
        leases = {*self.tables.pending.values(), *(lease for _, _, lease, _ in self.tables.holders)}
        return leases - self._living

    def pending_of(self, lease):
        pending = [place for place, other in self.tables.pending.items() if other == lease]
        return [(Rows(self, key), index) for key, index in pending]

    def end(self, lease):
        tables = self.tables
        tables.pending = {place: other for place, other in tables.pending.items() if other != lease}
        tables.holders = {place: True for place in tables.holders if place[2] != lease}

    def stamp(self):
        self.tables.stamp = max(int(time.time() * 1e6), self.tables.stamp + 1)
        return self.tables.stamp

    def claimed(self, claim):
        key, scope, document = claim.question.key, claim.question.scope, claim.question.document
        self.tables.questions.setdefault(key, StoredQuestion(key, scope, document, time.time()))
        return Rows(self, key, claim.draw, claim.avoid)

    def draw(self, draw):
        return Rows(self, draw.key, draw)

    def key(self, name):
        if name not in self.tables.questions:
            raise StoreError(f"the cache knows no key {name}; claim a draw of it first")
        return Rows(self, name)

    def store(self, key, sample):
        return self.tables.samples.setdefault((key, sample.index), sample) is sample

    def store_pending(self, samples):
        places = [(key, sample.index) for key, sample in samples]
        if any(self.tables.pending.get(place) != self._lease for place in places):
            return False
        if len({*places}) < len(places) or not self.tables.samples.keys().isdisjoint(places):
            return False
        for place, (_, sample) in zip(places, samples, strict=True):
            del self.tables.pending[place]
            self.tables.samples[place] = sample
        return True

    def sums(self, run, namespace):
        return self.tables.sums.get((run, namespace), Delivered())

    def put_sums(self, run, namespace, sums):
        self.tables.sums[run, namespace] = sums

    def add_unreported(self, run, namespace, account):
        self.tables.unreported.append(Note(run, namespace, unreported=account))


class Shared:
    """What the processes of one cache share."""

    def __init__(self):
        self.lock = threading.RLock()
        self.tables = Tables()
        self.living = set()
        self.names = 0


class DictStore:
    """A store of one process; ``shared`` is what it shares with others."""

    read_only, why_read_only, wait_for_others = False, "", None

    def __init__(self, shared=None):
        self.shared = shared or Shared()
        self.identity = f"dicts:{id(self.shared):x}"
        self.shared.names += 1
        self.name = self.shared.names
        self.shared.living.add(self.name)
        self._closed = False

    @contextlib.contextmanager
    def _opened(self):
        if self._closed:
            raise StoreError(f"the cache {self.identity} was closed; open it again")
        with self.shared.lock:
            yield DictLedger(self.shared.tables, self.name, self.shared.living)

    def apply_now(self, asked):
        with self._opened() as ledger:
            before = ledger.tables.copy()
            try:
                return operations.perform(ledger, asked)
            except BaseException:
                self.shared.tables = before
                raise

    async def apply(self, asked):
        return self.apply_now(asked)

    def apply_soon(self, asked):
        if not self._closed:
            self.apply_now(asked)

    def recall(self, draw, n):
        with self._opened() as ledger:
            return operations.recall(Rows(ledger, draw.key, draw), n)

    def replay(self, draw, n, taken):
        with self._opened() as ledger:
            return operations.replay(Rows(ledger, draw.key, draw), draw, n, taken)

    def status(self, wanted):
        with self._opened() as ledger:
            return [self._state(ledger, place) for place in wanted]

    def _state(self, ledger, place):
        if isinstance(ledger.tables.samples.get(place), Sample):
            return "stored"
        lease = ledger.tables.pending.get(place)
        return "ours" if lease == self.name else "pending" if lease in self.shared.living else "free"

    def similar(self, question):
        return None

    def generator(self, key, index):
        return None

    def question(self, key):
        with self._opened() as ledger:
            return ledger.tables.questions.get(key)

    def sample(self, key, index):
        return {sample.index: sample for sample in self.samples(key)}.get(index)

    def samples(self, key):
        with self._opened() as ledger:
            found = [sample for (of, _), sample in ledger.tables.samples.items() if of == key]
        return iter(sorted(sample for sample in found if isinstance(sample, Sample)))

    def draws(self, key=None, namespace=None):
        with self._opened() as ledger:
            rows = {draw: dict(segments) for draw, segments in ledger.tables.segments.items()}
            generated = dict(ledger.tables.generated)
        for draw, segments in rows.items():
            if key in (None, draw.key) and namespace in (None, draw.namespace) and segments:
                indices = indices_of(segments.values())
                count = sum(generated[draw, number] for number in segments)
                yield DrawInfo(draw, tuple(indices), count, min(one.stamp for one in segments.values()) / 1e6)

    def keys(self, prefix="", *, newest=False):
        with self._opened() as ledger:
            questions = list(ledger.tables.questions.values())
            pending = [key for key, _ in ledger.tables.pending]
        for each in reversed(questions) if newest else questions:
            if each.key.startswith(prefix):
                spaces = {info.draw.namespace for info in self.draws(each.key)} - {SHARED}
                stored, coming = len(list(self.samples(each.key))), pending.count(each.key)
                yield KeyInfo(each.key, each.scope, each.at, stored, coming, len(spaces))

    def namespaces(self):
        draws = list(self.draws())
        for name in dict.fromkeys(info.draw.namespace for info in draws):
            if name != SHARED:
                own = [info for info in draws if info.draw.namespace == name]
                indices = {(info.draw.key, index) for info in own for index in info.indices}
                generated = sum(info.generated for info in own)
                yield NamespaceInfo(namespace_of(name), len(own), len(indices), generated)

    def sums(self):
        with self._opened() as ledger:
            yield from [Note(*place, delivered) for place, delivered in ledger.tables.sums.items()]
            yield from ledger.tables.unreported

    def bought(self):
        with self._opened() as ledger:
            for (key, index), sample in list(ledger.tables.samples.items()):
                gone = not isinstance(sample, Sample)
                header = ledger.tables.discards[key, index][0] if gone else sample.header
                taken = (of for (_, name), of in ledger.tables.taken.items() if name == key)
                held = not gone and any(index in of for of in taken)
                yield Bought(ledger.tables.questions[key].scope, header, held)

    def close(self):
        self._closed = True
