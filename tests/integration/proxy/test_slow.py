"""Clients that dawdle are let go: over a head, over a body, and between requests."""

from __future__ import annotations

import itertools
import json
import select
import socket
import types

import pytest

from cachepipe.proxy import http_protocol
from cachepipe.proxy import server as servers

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def connect():
    """Connect to a server."""
    made = []

    def connected(server):
        host, port = server.url.removeprefix("http://").split(":")
        made.append(socket.create_connection((host, int(port)), timeout=20))
        return made[-1]

    yield connected
    for each in made:
        each.close()


def rest(connection):
    """Return what comes until the server ends the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("begun", [b"", HEAD])
def test_a_head_comes_in_time(serve, connect, monkeypatch, begun):
    """A connection without a request is one, too."""
    monkeypatch.setattr(http_protocol, "_HEAD_SECONDS", 0.05)
    connection = connect(serve())
    connection.sendall(begun)
    assert rest(connection) == b""


def test_a_head_that_comes_byte_by_byte_is_given_no_more_time(serve, connect, monkeypatch):
    monkeypatch.setattr(http_protocol, "_HEAD_SECONDS", 0.05)
    connection = connect(serve())
    connection.sendall(HEAD + b"X-Slow: ")
    try:
        for _ in itertools.repeat(None):
            if select.select([connection], [], [], 0.005)[0]:
                break
            connection.sendall(b"x")
        assert connection.recv(1) == b""
    except ConnectionError:  # it had sent more when it was let go
        pass


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]
)
def test_a_body_comes_in_time(serve, connect, upstream, framing):
    connection = connect(serve(client_timeout=0.05))
    connection.sendall(HEAD + framing)
    head, _, content = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert json.loads(content)["error"]["code"] == "too_slow"
    assert not upstream.stats.requests


@pytest.mark.parametrize("times", [1, 3])
def test_an_idle_connection_is_closed(serve, connect, monkeypatch, asked, times):
    """Whichever way it was served last: the third request is answered at once."""
    monkeypatch.setattr(servers, "_IDLE_SECONDS", 0.1)
    server = serve()
    content = json.dumps(asked).encode()
    connection = connect(server)
    for _ in range(times):
        server.proxy.runs.begin()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
    assert rest(connection) == b""
    assert not server.server_state.connections


def test_what_is_answered_at_once_keeps_its_connection():
    """The timer is set once, and looks when it goes off whether the connection was used meanwhile."""
    protocol = http_protocol.HttpProtocol.__new__(http_protocol.HttpProtocol)
    set_for, closed = [], []
    protocol.loop = types.SimpleNamespace(
        time=lambda: now, call_later=lambda seconds, _: set_for.append(seconds)
    )
    protocol.transport = types.SimpleNamespace(
        is_closing=lambda: False, close=lambda: closed.append(now), get_write_buffer_size=lambda: 0
    )
    protocol.timeout_keep_alive, protocol._used, protocol._held = 75, 100.0, b""
    now = 120.0
    protocol.timeout_keep_alive_handler()
    now = 175.0
    protocol.timeout_keep_alive_handler()
    assert (set_for, closed) == ([55.0], [175.0])
    protocol._held = HEAD  # a body is on its way
    protocol.timeout_keep_alive_handler()
    assert len(closed) == 1
