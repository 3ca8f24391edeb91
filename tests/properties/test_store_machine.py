"""Every store against an independent account of what was given, stored and delivered, in random order.

Two processes use one store: claimants join and extend draws, fail, are cancelled, look away, and whole
processes die with what they were generating. What is expected is worked out here from plain sets.
"""

from __future__ import annotations

import collections
import shutil
import tempfile
from pathlib import Path

import inside
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from profiles import sized

from cachepipe import MemoryStore
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.errors import StoreError
from cachepipe.runs import Occurrences
from cachepipe.stores import reading
from cachepipe.stores.base import Claim, Commit, Discard, Drop, Erase, ReleaseHold, ReleaseLease, Withdraw
from cachepipe.stores.remote import session
from cachepipe.stores.remote.copies import Copies
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.local import LocalCopy
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.remote.urls import Asked, Database
from cachepipe.stores.remote.verify import check
from cachepipe.stores.verify import IntegrityReport, check_rows
from cachepipe.testing import MemoryEngine, MortalStore

KEYS = ["k2-a", "k2-b"]
draws = st.builds(
    Draw,
    st.sampled_from([label(None), label("x")]),
    st.sampled_from(KEYS),
    st.sampled_from(["", "r"]),
    st.just(0),
    st.sampled_from([label(None), label(None), label(1)]),
) | st.builds(Draw, st.just(SHARED), st.sampled_from(KEYS), st.just(""), st.just(0), st.just("-"))


class Claimed:
    """A claimant: what it was granted, and what it still has to generate."""

    def __init__(self, process, draw, n, token):
        self.process = process
        self.draw = draw
        self.n = n
        self.token = token
        self.indices = []
        self.mine = set()
        self.held = ()
        self.over = False
        self.before = None  # what had been delivered of the draw that it refreshes


class StoreMachine(RuleBasedStateMachine):
    """Claims, commits, failures, deaths and discards, in any order."""

    claimants = Bundle("claimants")

    @initialize()
    def begin(self):
        self.serial = 0
        self.stored = collections.defaultdict(dict)  # key -> index -> id
        self.discarded = collections.defaultdict(set)
        self.pending = {}  # (key, index) -> process
        self.delivered = {}  # draw -> indices by position
        self.ever = collections.defaultdict(dict)  # (namespace, key) -> index -> draw that received it
        self.replaced = collections.defaultdict(set)  # (namespace, key) -> discarded or refreshed indices
        self.sure = {}  # draw -> what the ledger held when last nobody held the draw and all of it was there
        self.granted_since = collections.defaultdict(list)  # draw -> what its claims were granted since then
        self.open = []
        self.processes = self.start()

    # What differs between stores.

    def start(self):
        self.memory = MemoryStore()
        return [self.memory]

    def teardown(self):
        for process in getattr(self, "processes", ()):
            process.close()

    # The account.

    def listed(self, key):
        return {*self.stored[key], *(index for (name, index) in self.pending if name == key)}

    def ledger(self, key):
        """Return the ledger's draws of a key, by draw."""
        return {info.draw: list(info.indices) for info in self.processes[0].draws(key)}

    def taken(self):
        """Return the store's sets of what each namespace has taken, by namespace and key."""
        return inside.taken(self.processes[0])

    def there(self, key, indices):
        """Tell whether samples are stored, or were and are discarded."""
        return self.stored[key].keys() | self.discarded[key] >= {*indices}

    def complete(self, claimed):
        return bool(claimed.indices) and all(
            index in self.stored[claimed.draw.key] for index in claimed.indices
        )

    def holders(self, draw):
        return [one for one in self.open if one.draw == draw and not one.over]

    def expected(self, draw, n, ledger, listed):
        """Work out which indices a claim gets, from sets (C2, C3, C4)."""
        key = draw.key
        taken = self.taken()[draw.namespace, key] | self.discarded[key]
        usable = listed - self.discarded[key]
        held = ledger.get(draw, [])[:n]
        others = [
            indices
            for other, indices in ledger.items()
            if (other.request_id, other.occurrence, other.replicate)
            == (draw.request_id, draw.occurrence, draw.replicate)
            and other.namespace not in (draw.namespace, SHARED)
        ]
        coupled = others[0] if others and draw.namespace != SHARED else []
        got = []
        for position in range(n):
            index = held[position] if position < len(held) else None
            if index is None or index in self.discarded[key]:
                wish = coupled[position] if position < len(coupled) else None
                free = usable - taken
                if wish in free:
                    index = wish
                elif free:
                    index = min(free)
                elif wish is not None and wish not in taken:
                    index = wish
                else:
                    index = min({*range(200)} - taken - listed)
                taken.add(index)
            got.append(index)
        return got

    def at(self, number):
        return self.processes[number % len(self.processes)]

    def apply(self, process, *operations):
        process._ledger.reaped = 0.0  # the dead are looked for at each claim
        return process.apply_now(operations)

    # What happens.

    @rule(target=claimants, process=st.integers(0, 1), draw=draws, n=st.integers(1, 3), refresh=st.booleans())
    def claim(self, process, draw, n, refresh):
        return self.claims(process, draw, n, refresh=refresh)

    @rule(target=claimants, process=st.integers(0, 1), claimed=claimants, n=st.integers(1, 3))
    def claim_the_same(self, process, claimed, n):
        """Join a draw, ask again for it, or for more of it."""
        return self.claims(process, claimed.draw, n, refresh=False)

    @rule(
        target=claimants,
        process=st.integers(0, 1),
        draw=draws,
        n=st.integers(1, 2),
        extras=st.integers(0, 2),
        which=st.integers(0, 1),
    )
    def claim_more_of_one_that_has_lost_a_sample(self, process, draw, n, extras, which):
        """What replaces it may be stored, while the rest is not."""
        claimed = self.claims(process, draw, n, refresh=False)
        self.commit_all(claimed)
        self.discard_one_of_a_draw(claimed, which)
        for _ in range(extras):
            self.commit_an_extra(process, draw.key)
        return self.claims(process, draw, n + 1, refresh=False)

    def claims(self, process, draw, n, *, refresh):
        process = self.at(process)
        refresh = refresh and self.serial % 2 == 0 and not self.holders(draw)
        self.serial += 1
        claimed = Claimed(process, draw, n, str(self.serial))
        self.bury(draw.key)
        key, ledger, listed = draw.key, self.ledger(draw.key), self.listed(draw.key)
        expected = self.expected(draw, n, ledger, listed)
        [grant] = self.apply(
            process, Claim(draw, n, Question(key, None, b"{}"), claimed.token, refresh=refresh)
        )
        if refresh:
            assert not {*grant.indices} & listed
            assert len({*grant.indices}) == n
            assert not {*grant.indices} & {*self.ever[draw.namespace, key]}
            assert self.ledger(key)[draw] == grant.indices, "the row is replaced as a whole"
            claimed.before = self.delivered.pop(draw, [])
        else:
            assert grant.indices == expected
        self.granted(claimed, grant, ledger)
        return claimed

    def granted(self, claimed, grant, ledger):
        draw, key = claimed.draw, claimed.draw.key
        now = self.ledger(key)[draw]
        self.replaced[draw.namespace, key].update({*ledger.get(draw, [])}.difference(now))
        self.granted_since[draw].append(grant.indices)
        assert [sample and sample.id for sample in grant.samples] == [
            self.stored[key].get(index) for index in grant.indices
        ]
        missing = [index for index in grant.indices if index not in self.stored[key]]
        assert grant.mine == [index for index in missing if (key, index) not in self.pending]
        for index in grant.mine:
            self.pending[key, index] = claimed.process
        claimed.indices = grant.indices
        claimed.mine |= {*grant.mine}
        claimed.held = tuple({*claimed.held, *grant.held})
        if missing:
            assert grant.held
            if claimed not in self.open:
                self.open.append(claimed)
        else:
            self.end_well(claimed)

    def bury(self, key):
        """Do what the next claim of a key does with what the dead were generating."""
        for place, process in list(self.pending.items()):
            if process not in self.processes and self.buries(place[0], key):
                del self.pending[place]

    def buries(self, pending, claimed):
        """Return True if a claim of a key looks after a pending sample of another one: all do."""
        return True

    def end_well(self, claimed):
        """Release what an earlier claim of the claimant holds, and deliver."""
        if claimed.held:
            leave = ReleaseHold(claimed.draw, claimed.token, claimed.held, complete=True, n=claimed.n)
            self.apply(claimed.process, leave)
        claimed.over = True
        self.receives(claimed.draw, claimed.indices)

    def receives(self, draw, indices):
        known = self.delivered.get(draw, [])
        live = [index for index in known[: len(indices)] if index not in self.discarded[draw.key]]
        assert [i for i in indices[: len(known)] if i in live] == live, "C2: a draw got other samples"
        for index in indices:
            owner = self.ever[draw.namespace, draw.key].setdefault(index, draw)
            assert owner == draw, "C1: two draws of a namespace received one sample"
        self.delivered[draw] = indices + known[len(indices) :]

    @rule(claimed=claimants, which=st.integers(0, 2))
    def commit_one(self, claimed, which):
        self.commit(claimed, which)

    def commit(self, claimed, which):
        if claimed.process not in self.processes or not claimed.mine:
            return
        index = sorted(claimed.mine)[which % len(claimed.mine)]
        claimed.mine.discard(index)
        key = claimed.draw.key
        ours = self.pending.get((key, index)) is claimed.process
        alone = (key, index) not in self.pending and index not in {**self.stored[key]} | dict.fromkeys(
            self.discarded[key]
        )
        self.serial += 1
        [result] = self.apply(claimed.process, Commit(key, index, b'"x"', {}, id=f"s{self.serial}"))
        assert result.kept == (ours or alone)
        if result.kept:
            assert result.sample.index == index
            self.pending.pop((key, index), None)
        else:
            assert result.sample.index not in self.listed(key) | self.discarded[key]
        self.stored[key][result.sample.index] = result.sample.id

    @rule(claimed=claimants)
    def commit_all(self, claimed):
        for _ in range(len(claimed.mine)):
            self.commit(claimed, 0)
        self.receive(claimed)

    @rule(process=st.integers(0, 1), key=st.sampled_from(KEYS))
    def commit_an_extra(self, process, key):
        if self.at(process).question(key) is None:
            return  # nobody has asked it
        self.serial += 1
        [result] = self.apply(self.at(process), Commit(key, None, b'"x"', {}, id=f"s{self.serial}"))
        dead = {index for (name, index), process in self.pending.items() if name == key}
        assert result.sample.index not in self.stored[key]
        assert result.sample.index not in dead
        self.stored[key][result.sample.index] = result.sample.id

    @rule(claimed=claimants)
    def receive_all(self, claimed):
        self.receive(claimed)

    def receive(self, claimed):
        """End well, when everything has come."""
        if claimed.over or claimed.process not in self.processes or not self.complete(claimed):
            return
        if any(index in self.discarded[claimed.draw.key] for index in claimed.indices):
            return
        self.end_well(claimed)

    @rule(claimed=claimants)
    def look_again(self, claimed):
        """Claim once more, as one does whose sample will not come from where it was awaited."""
        if claimed.over or claimed.process not in self.processes:
            return
        self.bury(claimed.draw.key)
        ledger = self.ledger(claimed.draw.key)
        [grant] = self.apply(
            claimed.process,
            Claim(claimed.draw, claimed.n, Question(claimed.draw.key, None, b"{}"), claimed.token),
        )
        self.granted(claimed, grant, ledger)

    @rule(claimed=consumes(claimants))
    def fail(self, claimed):
        """Give up: what nobody else holds and nobody has received is free again (C8)."""
        if claimed.over or claimed.process not in self.processes:
            return
        key = claimed.draw.key
        whole = self.there(key, claimed.indices)  # then its part stands, whatever becomes of others
        claimed.over = True
        mine = sorted(claimed.mine)
        had = self.ledger(key).get(claimed.draw, [])
        self.apply(
            claimed.process,
            ReleaseLease(key, mine),
            ReleaseHold(claimed.draw, claimed.token, claimed.held, complete=False),
        )
        for index in mine:
            if self.pending.get((key, index)) is claimed.process:
                del self.pending[key, index]
        left = self.ledger(key).get(claimed.draw, [])
        if claimed.before is not None and left != had:  # the refresh is undone
            now = self.delivered.get(claimed.draw, [])
            self.delivered[claimed.draw] = now + claimed.before[len(now) :]
        if self.there(key, had):
            assert left == had, "once all its samples are stored a draw stands"
        elif not whole and not self.holders(claimed.draw):
            assert self.there(key, left), "an incomplete draw that nobody holds was not undone"
            self.explain(claimed.draw, left)

    def explain(self, draw, left):
        """See that no claim has left a mark unless all that it was granted is stored (C8)."""
        before = self.sure.get(draw, [])
        stands = [indices for indices in self.granted_since[draw] if self.there(draw.key, indices)]
        for position, index in enumerate(left):
            was = [indices[position] for indices in [before, *stands] if position < len(indices)]
            assert index in was, "what a failed claim had added to the draw was not undone"
        self.sure[draw] = left
        del self.granted_since[draw]

    @rule(key=st.sampled_from(KEYS), which=st.integers(0, 9))
    def discard(self, key, which):
        self.discards(key, sorted(self.stored[key]), which)

    @rule(claimed=claimants, which=st.integers(0, 9))
    def discard_one_of_a_draw(self, claimed, which):
        held = self.ledger(claimed.draw.key).get(claimed.draw, [])
        stored = self.stored[claimed.draw.key]
        self.discards(claimed.draw.key, [index for index in held if index in stored], which)

    def discards(self, key, among, which):
        if not among:
            return
        index = among[which % len(among)]
        self.apply(self.at(which), Discard(key, index, "because"))
        self.discarded[key].add(index)
        del self.stored[key][index]

    @rule(
        process=st.integers(0, 1),
        key=st.sampled_from(KEYS),
        namespace=st.sampled_from([label(None), label("x"), SHARED]),
    )
    def withdraw(self, process, key, namespace):
        """Remove all draws of a namespace; while one of them is under way, nothing is removed."""
        process, before = self.at(process), self.ledger(key)
        if process.question(key) is None:
            return
        try:
            self.apply(process, Withdraw(key, [namespace]))
        except StoreError:
            assert self.ledger(key) == before
            return
        left = {draw: indices for draw, indices in before.items() if draw.namespace != namespace}
        assert self.ledger(key) == left
        assert not any(self.holders(draw) for draw in before.keys() - left.keys())
        for account in (self.delivered, self.sure, self.granted_since):
            for draw in [draw for draw in account if (draw.namespace, draw.key) == (namespace, key)]:
                del account[draw]
        for account in (self.ever, self.replaced):
            account.pop((namespace, key), None)

    @rule(
        process=st.integers(0, 1), key=st.sampled_from(KEYS), indices=st.sets(st.integers(0, 6), min_size=1)
    )
    def erase(self, process, key, indices):
        """Delete what no draw has, and nothing else; no other sample gets its index (C1)."""
        process = self.at(process)
        if process.question(key) is None:
            return
        [erased] = self.apply(process, Erase(key, sorted(indices), "because"))
        drawn = {index for held in self.ledger(key).values() for index in held}
        assert not drawn & {*erased.indices}
        for index in erased.indices:
            self.stored[key].pop(index, None)
            self.discarded[key].add(index)

    @rule(process=st.integers(0, 1), key=st.sampled_from(KEYS))
    def drop(self, process, key):
        """Delete a question if nothing is left of it; it then begins anew."""
        process = self.at(process)
        if process.question(key) is None:
            return
        used = self.ledger(key) or self.stored[key] or any(name == key for name, _ in self.pending)
        for _ in range(2):  # a folder may have to note another sample at its checkpoint first
            if process.question(key) is not None:
                self.apply(process, Drop(key, sorted(self.discarded[key])))
        if used:
            assert process.question(key) is not None
            return
        for each in self.processes:
            assert each.question(key) is None
        assert not any(name == key for _, name in self.taken())
        self.discarded.pop(key, None)
        for account in (self.ever, self.replaced):
            for place in [place for place in account if place[1] == key]:
                del account[place]

    @rule(process=st.integers(0, 1), draw=draws, n=st.integers(1, 3))
    def recall(self, process, draw, n):
        grant = self.at(process).recall(draw, n)
        held = self.ledger(draw.key).get(draw, [])
        indices = held[:n]
        # Beyond n too: a draw that is incomplete may yet be undone, so it takes a claim to let it stand.
        whole = len(indices) == n and all(index in self.stored[draw.key] for index in held)
        assert (grant is not None) == whole
        if grant is not None:
            assert grant.indices == indices
            assert [sample.id for sample in grant.samples] == [self.stored[draw.key][i] for i in indices]
            self.receives(draw, indices)

    @rule(process=st.integers(0, 1), draw=draws, n=st.integers(1, 3))
    def replay(self, process, draw, n):
        if any(one not in self.processes for one in self.pending.values()):
            return  # what the dead were generating is looked after by the next claim
        taken = IntervalSet()
        grant = self.at(process).replay(draw, n, taken)
        indices = self.expected(draw, n, self.ledger(draw.key), self.listed(draw.key))
        whole = all(index in self.stored[draw.key] for index in indices)
        assert (grant is not None) == whole
        if grant is not None:
            assert grant.indices == indices
        assert (taken.interval_at(0) is not None) == whole

    @rule(process=st.integers(0, 1), key=st.sampled_from(KEYS))
    def status(self, process, key):
        process = self.at(process)
        for index, state in enumerate(process.status([(key, index) for index in range(12)])):
            generating = self.pending.get((key, index))
            if index in self.stored[key]:
                assert state == "stored"
            elif generating is process:
                assert state == "ours"
            else:
                assert state == ("pending" if generating in self.processes else "free")

    # What holds at any time.

    @invariant()
    def what_was_delivered_is_in_the_ledger(self):
        """C2, but for what was discarded meanwhile."""
        for draw, indices in getattr(self, "delivered", {}).items():
            ledger = self.ledger(draw.key).get(draw, [])
            for position, index in enumerate(indices):
                if index not in self.discarded[draw.key]:
                    assert ledger[position] == index

    @invariant()
    def no_two_draws_of_a_namespace_hold_one_sample(self):
        """C1."""
        for key in KEYS if hasattr(self, "processes") else ():
            seen = collections.Counter(
                (draw.namespace, index) for draw, indices in self.ledger(key).items() for index in indices
            )
            assert set(seen.values()) <= {1}

    @invariant()
    def what_is_taken_is_drawn_or_was(self):
        """C8: nothing else, and C1: nothing less."""
        drawn, received = collections.defaultdict(set), {}
        for key in KEYS if hasattr(self, "processes") else ():
            for draw, indices in self.ledger(key).items():
                drawn[draw.namespace, key].update(indices)
            received |= {place: {*indices} for place, indices in self.ever.items()}
        for place, taken in self.taken().items() if drawn or received else ():
            assert drawn[place] | received.get(place, set()) <= taken
            assert taken <= drawn[place] | self.replaced[place] | self.discarded[place[1]]

    @invariant()
    def a_check_finds_nothing_wrong(self):
        """C12: whatever happened to processes, the rows of both files agree."""
        if hasattr(self, "processes"):
            self.check()

    def check(self):
        report = IntegrityReport()
        check_rows(*self.processes[0]._readable(), report)
        assert report.problems.keys() <= {"question"}, report  # those of this test have made-up keys

    @invariant()
    def the_list_is_what_is_stored(self):
        for key in KEYS if hasattr(self, "processes") else ():
            assert {sample.index: sample.id for sample in self.processes[0].samples(key)} == self.stored[key]


class DiskMachine(StoreMachine):
    """The same on disk, with a second process, and with processes that die."""

    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.alive = set()
        self.names = 0
        self.dead = []
        return [self.another(), self.another()]

    def another(self):
        self.names += 1
        return MortalStore(self.folder / "cache", f"process {self.names}", self.alive)

    def kill(self, process):
        self.alive.discard(process.name)
        self.dead.append(process)

    @precondition(lambda self: self.names < 5)
    @rule(which=st.integers(0, 1))
    def die(self, which):
        """A process is gone, with its leases and holds; another one begins."""
        process = self.processes[which]
        self.kill(process)
        self.processes[which] = self.another()
        for claimed in self.open:
            claimed.over = claimed.over or claimed.process is process

    def teardown(self):
        super().teardown()
        for process in getattr(self, "dead", ()):
            process.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class RemoteMachine(DiskMachine):
    """The same on a store that machines share, whose engine is slow to agree and loses answers."""

    def start(self):
        self.folder = None
        self.alive = set()
        self.names, self.dead, self.swaps = 0, [], 0
        self.engine = self.make_engine()
        return [self.another(), self.another()]

    def make_engine(self):
        engine = MemoryEngine()
        engine.before_swap, engine.after_swap = self.before_swap, self.after_swap
        return engine

    def before_swap(self, swaps):
        self.swaps += 1
        if self.swaps % 5 == 0:
            raise Unreachable("the request was lost")
        if self.swaps % 4 == 0:
            for swap in swaps:
                swap.expected[b"L"] = b"as if others had changed it"

    def after_swap(self, swaps):
        if self.swaps % 7 == 0:
            raise Unreachable("the answer was lost")

    def another(self):
        self.names += 1
        session = Session(self.engine, renews=False, lease=1e6, sleep=lambda _: None)
        store = RemoteStore(session)
        store.name = session.lease()
        return store

    def kill(self, process):
        super().kill(process)
        self.engine.close_lease(process.name)

    def apply(self, process, *operations):
        results = process.write(operations)
        assert not any(isinstance(result, Exception) for result in results)
        return results

    def buries(self, pending, claimed):
        """Its rows are read key by key."""
        return pending == claimed

    def check(self):
        report = check(self.processes[0].session)
        assert report.problems.keys() <= {"question"}, report  # those of this test have made-up keys


class CopyingMachine(RemoteMachine):
    """The same with copies on two machines, where each operation belongs to a run of its own."""

    def another(self):
        self.folder = self.folder or Path(tempfile.mkdtemp())
        store = super().another()
        machine = self.folder / str(self.names % 2)
        copies = Copies(machine, self.engine.identity, 1)
        store.session.local = LocalCopy(self.engine, copies, store.session, follows=False)
        return store

    def at(self, number):
        process = super().at(number)
        self.follow(process)
        return process

    def follow(self, process):
        process.session.local.follow()
        Occurrences()  # a run begins

    def apply(self, process, *operations):
        self.follow(process)
        return super().apply(process, *operations)

    @rule(process=st.integers(0, 1), draw=draws, n=st.integers(1, 3))
    def recall(self, process, draw, n):
        """What was complete once is known, also while the draw is extended."""
        grant = self.at(process).recall(draw, n)
        held = self.ledger(draw.key).get(draw, [])
        stored = self.stored[draw.key]
        if len(held) >= n and all(index in stored for index in held):
            assert grant is not None
        if grant is not None:
            assert grant.indices == held[:n]
            assert [sample.id for sample in grant.samples] == [stored[index] for index in held[:n]]
            self.receives(draw, held[:n])


class ValkeyMachine(RemoteMachine):
    """The same on a real server."""

    new_url = None

    def make_engine(self):
        return Asked(self.new_url()).opener(create=True, full=False)()

    def teardown(self):
        super().teardown()
        if hasattr(self, "engine"):
            self.engine.close()


class PostgresMachine(ValkeyMachine):
    """The same on a real PostgreSQL server."""

    def make_engine(self):
        return Database(self.new_url()).opener(create=True, full=False)()


@pytest.fixture(autouse=True, scope="module")
def _servers(new_valkey_url, new_postgres_url):
    ValkeyMachine.new_url = staticmethod(new_valkey_url)
    PostgresMachine.new_url = staticmethod(new_postgres_url)


@pytest.fixture(autouse=True)
def _ask_each_time_who_lives(monkeypatch):
    monkeypatch.setattr(reading, "_ALIVE_FOR", -1.0)
    monkeypatch.setattr(session, "_ALIVE_FOR", -1.0)


TestMemory = StoreMachine.TestCase
TestDisk = DiskMachine.TestCase
TestRemote = RemoteMachine.TestCase
TestCopying = CopyingMachine.TestCase
TestValkey = ValkeyMachine.TestCase
TestPostgres = PostgresMachine.TestCase
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]  # explaining a failure takes longer than finding it
for machine, small, full in (
    (TestMemory, 15, 50),
    (TestDisk, 10, 40),
    (TestRemote, 10, 40),
    (TestCopying, 10, 40),
    (TestValkey, 4, 10),
    (TestPostgres, 2, 5),
):
    machine.settings = settings(
        max_examples=sized(small, full), stateful_step_count=40, deadline=None, phases=PHASES
    )
