"""The connection on which an event loop asks a server without waiting."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from libvalkey import Reader

from cachepipe.stores.remote.on_loop import LoopConnection

pytestmark = pytest.mark.anyio


class Connected:
    """One end of a pair of sockets, as a connection to a server."""

    def __init__(self, end):
        self.socket = end

    reader = staticmethod(Reader)

    def close(self):
        self.socket.close()


class Peer:
    """The server's end, the connection of the loop, and what its callers were told."""

    def __init__(self, timeout):
        here, self.there = socket.socketpair()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.here = Connected(here)
        self.connects = 0
        self.connection = LoopConnection(asyncio.get_running_loop(), self.connect, timeout)
        self.told = []
        self.changed = asyncio.Event()

    def connect(self):
        self.connects += 1
        return self.here

    async def ready(self):
        async with asyncio.timeout(5):
            while not self.connection.ready:  # noqa: ASYNC110 - a thread connects
                await asyncio.sleep(0.001)

    def hear(self, answers):
        self.told.append(answers)
        self.changed.set()

    async def heard(self, count):
        async with asyncio.timeout(5):
            while len(self.told) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.told


@pytest.fixture
async def peer():
    """A peer whose answers may be late, but are not."""
    found = Peer(timeout=60)
    yield found
    found.connection.close()
    found.there.close()
    found.here.close()


async def test_answers_reach_those_who_asked_in_order_however_they_are_cut(peer):
    assert not peer.connection.ready, "a thread connects first"
    await peer.ready()
    peer.connection.ask(b"one two", 2, peer.hear)
    peer.connection.ask(b" three", 1, peer.hear)
    assert peer.there.recv(100) == b"one two three"
    for piece in (b":1\r", b"\n:2\r\n", b"*1\r\n$1\r\n", b"3\r\n"):
        peer.there.send(piece)
        await asyncio.sleep(0)
    assert await peer.heard(2) == [[1, 2], [[b"3"]]]


async def test_more_than_the_socket_takes_is_sent_as_it_is_read(peer):
    await peer.ready()
    asked = b"x" * (1 << 20)
    received = bytearray()

    def serve():
        while len(received) < len(asked) + 1:
            received.extend(peer.there.recv(1 << 16))
        peer.there.send(b":1\r\n:2\r\n")

    peer.connection.ask(asked, 1, peer.hear)
    peer.connection.ask(b"y", 1, peer.hear)
    thread = threading.Thread(target=serve)
    thread.start()
    assert await peer.heard(2) == [[1], [2]]
    thread.join()
    assert received == asked + b"y"


async def test_an_error_is_no_answer_and_leaves_the_connection(peer):
    await peer.ready()
    peer.connection.ask(b"a b", 2, peer.hear)
    peer.connection.ask(b"c", 1, peer.hear)
    peer.there.send(b":1\r\n-ERR no\r\n:3\r\n")
    assert await peer.heard(2) == [None, [3]]


async def test_a_connection_that_breaks_tells_all_who_asked(peer):
    await peer.ready()
    peer.connection.ask(b"a", 1, peer.hear)
    peer.connection.ask(b"b", 1, peer.hear)
    peer.there.close()
    assert await peer.heard(2) == [None, None]
    assert not peer.connection.ready
    assert peer.connects == 1, "it is not connected again at once"


async def test_a_server_that_is_late_is_not_waited_for():
    peer = Peer(timeout=0.01)
    await peer.ready()
    peer.connection.ask(b"a", 1, peer.hear)
    assert await peer.heard(1) == [None]
    assert peer.here.socket.fileno() == -1, "its answer must not reach the next one who asks"
    peer.there.close()


async def test_a_closed_connection_is_not_connected_again(peer):
    await peer.ready()
    peer.connection.ask(b"a", 1, peer.hear)
    peer.connection.close()
    assert peer.told == [None]
    assert not peer.connection.ready
    assert peer.connects == 1


async def test_a_connection_is_closed_from_another_thread_on_its_loop(peer):
    await peer.ready()
    peer.connection.ask(b"a", 1, peer.hear)
    thread = threading.Thread(target=peer.connection.close)
    thread.start()
    thread.join()
    assert await peer.heard(1) == [None]


async def test_a_loop_that_cannot_watch_sockets_has_no_connection(peer, monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    closed = asyncio.Event()
    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
    monkeypatch.setattr(peer.here, "close", closed.set, raising=False)
    assert not peer.connection.ready
    async with asyncio.timeout(5):
        await closed.wait()
    assert not peer.connection.ready
    monkeypatch.undo()
