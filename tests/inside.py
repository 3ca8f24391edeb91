"""Looks into stores of any kind where a promise cannot be seen from outside."""

from __future__ import annotations

import collections

from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import PENDING
from cachepipe.stores.remote.store import RemoteStore


def taken(store):
    """Return the sets of what each namespace has taken, by namespace and key."""
    sets = collections.defaultdict(set)
    if isinstance(store, RemoteStore):
        for key, found in store.session.engine.scan(""):
            for name in found:
                if name.startswith(rows.TAKEN):
                    sets[rows.decoded(name[len(rows.TAKEN) :]), key] = indices(key, name, found)
        return sets
    found = store._readable()[0].execute(
        "SELECT n.label, k.key, s.start, s.stop FROM intervals s JOIN keys k ON k.id = s.key"
        " JOIN namespaces n ON n.id = s.owner WHERE s.owner > 0"
    )
    for namespace, key, start, stop in found:
        sets[namespace, key].update(range(start, stop))
    return sets


def indices(key, name, found):
    """Return the indices in a row of a shared store."""
    intervals = rows.load_set(key, name, rows.unpack(key, name, found[name])) if name in found else ()
    return {index for interval in intervals for index in range(*interval)}


def unfinished(store):
    """Return how many samples are pending, and how many claimants hold draws that others began."""
    if isinstance(store, RemoteStore):
        pending = holders = 0
        for key, found in store.session.engine.scan(""):
            for name, row in found.items():
                pending += name.startswith(PENDING)
                if name.startswith(rows.DRAW):
                    holders += len(rows.DrawRow.loads(key, name, rows.unpack(key, name, row)).holders)
        return pending, holders
    counts = "SELECT (SELECT count(*) FROM pending), (SELECT count(*) FROM holders)"
    return store._readable()[0].execute(counts).fetchone()
