"""What the proxy's server makes of HTTP itself: upgrades, old versions, targets, and heads in any pieces."""

from __future__ import annotations

import contextlib
import json
import re
import socket

import pytest

from cachepipe.proxy import http_protocol

CHAT = b"/v1/chat/completions"


def body_of(text):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()


def framed(body, how):
    if how == "chunked":
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
        return b"Transfer-Encoding: chunked\r\n", chunks + b"0\r\n\r\n"
    return b"Content-Length: %d\r\n" % len(body), body


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answers(connection, count):
    """Return the heads and bodies of so many answers, each with a length."""
    data, found = b"", []
    while len(found) < count:
        head, blank, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if blank and head.startswith(b"HTTP/1.1 100"):
            data = rest
        elif blank and length and len(rest) >= int(length[1]):
            found.append((head, rest[: int(length[1])]))
            data = rest[int(length[1]) :]
        else:
            part = connection.recv(65536)
            assert part, (found, data)
            data += part
    return found


UPGRADES = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    b"Upgrade: TLS/1.2, h2c\r\nConnection: keep-alive, upgrade\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",  # no handshake: those are made with GET
    b"Upgrade: h2c\r\n",
]


@pytest.mark.parametrize("how", ["length", "chunked"])
@pytest.mark.parametrize("offer", UPGRADES)
@pytest.mark.parametrize("apart", [False, True])
def test_an_offer_to_upgrade_is_ignored_and_the_body_arrives(behind, how, offer, apart):
    proxy, upstream = behind
    body = body_of(f"{how} {offer} {apart}")
    framing, sent = framed(body, how)
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n" % (CHAT, offer, framing)
    with connected(proxy) as connection:
        if apart:
            connection.sendall(head[:-1])
            connection.sendall(head[-1:])
            for at in range(0, len(sent), 7):
                connection.sendall(sent[at : at + 7])
        else:
            connection.sendall(head + sent)
        (answer, _), *_ = answers(connection, 1)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(upstream.requests[-1].body) == json.loads(body)
    assert not {"upgrade", "http2-settings", "connection-upgrade"} & {
        name for name, _ in upstream.requests[-1].headers
    }


def test_requests_that_offer_an_upgrade_can_be_pipelined_and_expect_100(behind):
    proxy, upstream = behind
    parts = []
    for number, offer in enumerate(
        [UPGRADES[0], b"Expect: 100-continue\r\n" + UPGRADES[0], b"", UPGRADES[1]]
    ):
        framing, sent = framed(body_of(f"pipelined {number}"), "chunked" if number % 2 else "length")
        parts.append(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n%b" % (CHAT, offer, framing, sent))
    parts.append(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % UPGRADES[0])
    with connected(proxy) as connection:
        connection.sendall(b"".join(parts))
        found = answers(connection, 5)
    assert [head[:12] for head, _ in found] == [b"HTTP/1.1 200"] * 5
    said = [json.loads(each.body)["messages"][0]["content"] for each in upstream.requests[:4]]
    assert said == [f"pipelined {number}" for number in range(4)]


def test_an_upgrade_to_websocket_is_told_that_there_is_none(behind, raw):
    for offer in (b"websocket", b"h2c, WebSocket"):
        request = (
            b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n"
        )
        assert raw(behind[0], request % offer, end=False).startswith(b"HTTP/1.1 501")


@pytest.mark.parametrize("path", [CHAT, b"/v1/files", b"/healthz"])
def test_http_1_0_keeps_its_connection_where_it_asks_to(behind, path):
    proxy, _ = behind
    method, body = (b"GET", b"") if path == b"/healthz" else (b"POST", body_of("1.0"))
    request = b"%b %b HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-Length: %d\r\n\r\n%b"
    with connected(proxy) as connection:
        for _ in range(3):
            connection.sendall(request % (method, path, len(body), body))
            ((head, _),) = answers(connection, 1)
            assert b"connection: keep-alive" in head
            assert b"transfer-encoding" not in head


@pytest.mark.parametrize("asks", [b"", b"Connection: close\r\n", b"Connection: close, keep-alive\r\n"])
def test_http_1_0_is_closed_where_it_does_not_ask(behind, raw, asks):
    body = body_of("1.0, once")
    request = b"POST %b HTTP/1.0\r\n%bContent-Length: %d\r\n\r\n%b" % (CHAT, asks, len(body), body)
    answer = raw(behind[0], request, end=False)  # it returns because the server closes
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"connection: ") == 1
    assert b"connection: close" in answer


def test_an_answer_without_a_length_ends_an_http_1_0_connection(behind, raw):
    proxy, upstream = behind
    upstream.answers.append((200, [("content-type", "text/plain"), ("x-open", "1")], [b"all of ", b"it"]))
    request = b"GET /v1/files/1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    answer = raw(proxy, request, end=False)
    assert answer.endswith(b"\r\n\r\nall of it")
    assert b"connection: close" in answer
    assert b"chunked" not in answer


@pytest.mark.parametrize(
    "path",
    [
        b"//v1/chat/completions",
        b"////v1/chat/completions",
        b"/v1//chat/completions",
        b"//ns/a//v1//chat/completions",
        b"/up/recorder//v1/chat/completions",
        b"/up/recorder//ns/b///v1/chat/completions",
    ],
)
def test_base_urls_may_end_in_slashes(behind, path):
    proxy, upstream = behind
    body = body_of(path.decode())
    with connected(proxy) as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)
        )
        ((head, _),) = answers(connection, 1)
    assert head.startswith(b"HTTP/1.1 200")
    assert b"fwd=miss; stored" in head
    assert upstream.requests[-1].target == "/v1/chat/completions"


def test_slashes_inside_a_path_go_on_as_they_came(behind, http):
    proxy, upstream = behind
    http.get(f"{proxy.url}/v1/files//a")
    assert upstream.requests[-1].target == "/v1/files//a"


LIMIT = 65_536


def head_of(size, line):
    """Return a head whose lines have so many bytes, all alike."""
    begun = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    return begun + line * (-(len(begun) - size) // len(line) + 1) + b"\r\n"


@pytest.mark.parametrize("line", [b"X: " + b"a" * 9000 + b"\r\n", b"a:b\r\n", b"X: %b\r\n" % (b"," * 200)])
def test_a_head_above_the_limit_is_refused_however_it_arrives(recorded, raw, line):
    proxy, upstream = recorded
    upstream.requests.clear()
    for size in (LIMIT + 5000, 2 * LIMIT):
        assert raw(proxy, head_of(size, line), end=False).startswith(b"HTTP/1.1 431")
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert b"HTTP/1.1 431" in raw(proxy, first + head_of(LIMIT + 5000, line), end=False)
    target = b"GET /v1/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"%41" * 30_000)
    assert raw(proxy, target, end=False).startswith(b"HTTP/1.1 431")
    assert not upstream.requests


@pytest.mark.parametrize("tail", [b"1;%b", b"0\r\nX: %b"])
def test_what_hides_in_a_chunked_body_has_a_limit(recorded, raw, tail):
    """Extensions of chunks and trailers are kept by no one, but a parser reads them."""
    begun = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(recorded[0], begun + tail % (b"a" * 1_000_000), end=False)
    assert not answer or answer.startswith(b"HTTP/1.1 431")


def test_trailers_do_not_become_headers(behind, raw):
    proxy, upstream = behind
    request = (
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nAuthorization: Bearer k\r\nX-Later: 1\r\n\r\n"
    )
    assert raw(proxy, request, end=False).startswith(b"HTTP/1.1 200")
    assert not {"authorization", "x-later"} & {name for name, _ in upstream.requests[-1].headers}


def test_the_cost_of_a_head_does_not_grow_with_the_pieces_that_it_comes_in(serve, monkeypatch):
    """Bytes are handed to the parser in a few pieces, each as long as all before: so all is linear."""
    fed = []
    feed = http_protocol.HttpProtocol._feed
    monkeypatch.setattr(
        http_protocol.HttpProtocol, "_feed", lambda self, data: (fed.append(len(data)), feed(self, data))
    )
    proxy = serve()
    head = head_of(4000, b"a: " + b"b" * 60 + b"\r\n").replace(b"/v1/models", b"/healthz")
    with connected(proxy) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head:
            connection.sendall(bytes([byte]))
        ((answer, _),) = answers(connection, 1)
    assert answer.startswith(b"HTTP/1.1 200")
    assert sum(fed) == len(head)
    assert len(fed) <= 15


def test_a_head_that_ends_at_any_byte_is_answered(serve):
    """Also when its end is cut in two, and when it follows another request in the same piece."""
    proxy = serve()
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for cut in range(1, 5):
        with connected(proxy) as connection, contextlib.closing(connection):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(one + one[:-cut])
            assert len(answers(connection, 1)) == 1
            connection.sendall(one[-cut:])
            assert len(answers(connection, 1)) == 1
