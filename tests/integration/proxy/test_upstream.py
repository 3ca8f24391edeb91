"""The connections to upstreams: compressed bodies, uploads that stall, and proxies of the environment."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import zlib

import pytest

from cachepipe.proxy import upstream as upstreams
from cachepipe.proxy.settings import Upstream

TEXT = [("content-type", "text/plain")]


def chat(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    ).encode()


def packed(content, wbits):
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("deflate", packed(chat("raw"), -15)),
        ("deflate", packed(chat("headed"), 15)),
        ("GZIP", packed(chat("upper"), 31)),
        ("gzip", gzip.compress(chat("two")[:9]) + gzip.compress(chat("two")[9:])),
        ("deflate, gzip", gzip.compress(packed(chat("twice"), 15))),
        ("identity", chat("plain")),
    ],
)
def test_a_compressed_answer_is_read_however_it_comes(behind, http, helpers, asked, encoding, content):
    server, recorder = behind
    pieces = [content[place : place + 7] for place in range(0, len(content), 7)]
    recorder.answers.append(
        (200, [("content-type", "application/json"), ("content-encoding", encoding)], pieces)
    )
    question = asked | {"messages": [{"role": "user", "content": repr(content)}]}
    answers = [http.post(helpers.chat_url(server, "a", run), json=question) for run in (1, 2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert helpers.text_of(answers[0]) == helpers.text_of(answers[1])
    assert len(recorder.requests) == 1


@pytest.mark.parametrize("content", [gzip.compress(chat("x"))[:-9], b"not packed", b"\x1f"])
def test_a_damaged_compressed_answer_is_no_answer(behind, http, helpers, asked, content):
    server, recorder = behind
    pairs = [("content-type", "application/json"), ("content-encoding", "gzip")]
    recorder.answers.append((200, pairs, [content]))
    question = asked | {"messages": [{"role": "user", "content": repr(content)}]}
    answer = http.post(helpers.chat_url(server, "a"), json=question)
    assert answer.status_code == 502
    assert "closed the connection" in answer.json()["error"]["message"]


def test_an_upload_that_its_client_stops_sending_is_the_clients_fault(serve, recorder):
    server = serve(upstreams=(Upstream.of("recorder", recorder.base_url),), client_timeout=0.1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"too_slow"' in answer


@pytest.fixture
def deaf():
    """The URL of a server that accepts connections, and reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize("path", ["/v1/files", "/v1/chat/completions"])
def test_an_upstream_that_does_not_read_is_given_up(serve, deaf, http, asked, path):
    server = serve(
        upstreams=(Upstream.of("deaf", deaf),), timeout=0.3, connect_timeout=0.3, max_answer=1 << 26
    )
    body = json.dumps(asked | {"user": "x" * (1 << 24)}).encode()
    answer = http.post(f"{server.url}{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 504
    assert "took too long" in answer.json()["error"]["message"]


def test_a_proxy_of_the_environment_is_used_unless_it_is_excepted(serve, http, asked, helpers, monkeypatch):
    seen = []

    def forward(listener):
        with listener.accept()[0] as connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            seen.append(request)
            body = chat("from the proxy")
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body)
            connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=forward, args=(listener,))
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "localhost,excepted.invalid")
        upstreams._proxy_of.cache_clear()
        assert upstreams._proxy_of("http", "excepted.invalid") is None
        assert upstreams._proxy_of("http", "localhost:8000") is None
        server = serve(upstreams=(Upstream.of("far", "http://far.invalid/v1"),))
        answer = http.post(helpers.chat_url(server), json=asked)
        assert helpers.text_of(answer) == ["from the proxy"]
    upstreams._proxy_of.cache_clear()
    assert seen[0].startswith(b"POST http://far.invalid/v1/chat/completions HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0" in seen[0]
