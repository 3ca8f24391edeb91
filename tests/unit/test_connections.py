"""Connections of engines, and the threads that use them, when a store is closed."""

from __future__ import annotations

import threading

from cachepipe.stores.remote.connections import Connections
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import MemoryEngine


class Connection:
    """A connection that knows whether it is open."""

    is_open = True

    def close(self):
        self.is_open = False


def test_a_connection_that_is_in_use_when_the_others_are_closed_is_closed_afterwards():
    connections = Connections(Connection)
    used, idle = connections.take(), connections.take()
    connections.give_back(idle)
    connections.close()
    assert (used.is_open, idle.is_open) == (True, False)
    connections.give_back(used)
    assert not used.is_open


def test_a_connection_that_failed_leaves_later_ones_open():
    connections = Connections(Connection)
    connections.drop(connections.take())
    later = connections.take()
    connections.give_back(later)
    assert later.is_open
    assert connections.take() is later


def test_a_closed_store_has_no_thread_that_looks_at_states():
    store = RemoteStore(Session(MemoryEngine(), renews=False))
    states = store._states
    states.latest([("k", 0)])
    thread = states._thread
    store.close()
    assert not thread.is_alive()
    states._heard("k")
    assert states._thread is None
    assert not any(each.name == "cachepipe-states" for each in threading.enumerate())
