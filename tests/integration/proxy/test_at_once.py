"""A known draw is answered at once where its head was served before, and no other request is."""

from __future__ import annotations

import json
import socket

import pytest

from cachepipe import DiskStore
from cachepipe.contract.draws import label
from cachepipe.proxy import http_protocol
from cachepipe.proxy.head_cache import HeadCache, is_plain
from cachepipe.proxy.head_cache import split_head as begun
from cachepipe.proxy.settings import Upstream
from cachepipe.stores.sums import statements
from cachepipe.testing import MockSettings

HEAD = b"POST /ns/%b/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n%b"


@pytest.fixture
def fast(serve, monkeypatch):
    """A proxy, and the bodies that it has answered at once."""

    def start(**options):
        server = serve(**options)
        proxy, server.at_once = server.proxy, []
        server.gone_on = []
        own = proxy.at_once

        def at_once(meant, content, asker):
            written = own(meant, content, asker)
            (server.at_once if isinstance(written, bytes) else server.gone_on).append(content)
            return written

        proxy.at_once = at_once
        return server

    return start


class Client:
    """A connection that sends bytes as they are, and reads an answer at a time."""

    def __init__(self, server):
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def answer(self):
        status = int(self.file.readline().split(b" ")[1])
        pairs = []
        while (line := self.file.readline()) != b"\r\n":
            name, _, value = line.rstrip(b"\r\n").partition(b": ")
            pairs.append((name.decode(), value.decode()))
        content = self.file.read(int(dict(pairs)["content-length"]))
        return status, dict(pairs), json.loads(content) if content else None

    def ask(self, data):
        self.socket.sendall(data)
        return self.answer()

    def ended(self):
        return self.file.read() == b""


def post(body, namespace=b"a", more=b""):
    content = json.dumps(body).encode()
    return HEAD % (namespace, more) + b"Content-Length: %d\r\n\r\n" % len(content) + content


def held(server):
    """Return what the only connection has of a request whose body is yet to come."""
    return next(iter(server.server_state.connections))._held


def texts(answer):
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_it_answers_what_the_ordinary_way_would(fast, asked):
    server = fast()
    with Client(server) as client:
        _, made, first = client.ask(post(asked, b"a@1"))
        _, whole, again = client.ask(post(asked, b"a@2"))
        assert not server.at_once
        # The body of a third run, whose head is served for the first time by another question.
        client.ask(post({**asked, "seed": 1}, b"a@3"))
        status, quick, third = client.ask(post(asked, b"a@3"))
    assert server.at_once == [json.dumps(asked).encode()]
    assert (status, third) == (200, again) == (200, first)
    del whole["date"], made
    assert quick == whole
    assert (quick["cache-status"], quick["x-cachepipe-indices"]) == ("cachepipe; hit", "0")
    hits = [event for event in server.logged if event["outcome"] == "hit"]
    assert len(hits) == 2
    assert {**hits[0], "at": 0, "ms": 0} == {**hits[1], "at": 0, "ms": 0}
    counted = server.proxy.counters.namespaces["a"]
    assert (counted.requests, counted.hits) == ({"miss": 2, "hit": 2}, 2)
    assert counted.delivered.saved.counts()["total_tokens"] == 2 * first["usage"]["total_tokens"]


def test_each_request_is_the_next_draw(fast, asked, upstream):
    """What is known is answered at once, in the order of the ledger; what is not is generated."""
    server = fast()
    with Client(server) as client:
        drawn = [texts(client.ask(post(asked, b"a@1"))[2]) for _ in range(3)]
        client.ask(post({**asked, "seed": 1}, b"a@2"))
        again = [client.ask(post(asked, b"a@2")) for _ in range(4)]
    assert [texts(answer) for _, _, answer in again[:3]] == drawn
    assert len(server.at_once) == 3
    assert [told["x-cachepipe-indices"] for _, told, _ in again] == ["0", "1", "2", "3"]
    assert [told["x-cachepipe-cached"] for _, told, _ in again] == ["true", "true", "true", "false"]
    assert upstream.stats.requests == 5
    assert len(server.gone_on) == 3


def test_a_new_run_begins_from_the_front(fast, asked, http):
    server = fast()
    with Client(server) as client:
        drawn = [texts(client.ask(post(asked))[2]) for _ in range(2)]
        http.post(f"{server.url}/cachepipe/runs", json={})
        assert [texts(client.ask(post(asked))[2]) for _ in range(2)] == drawn
    assert len(server.at_once) == 2


def test_a_body_may_come_in_pieces(fast, asked, helpers):
    """As of clients that write the head by itself."""
    server = fast()
    with Client(server) as client:
        first = client.ask(post(asked))
        server.proxy.runs.begin()
        data = post(asked)
        end = data.index(b"\r\n\r\n") + 4
        for stop in (end, end + 9):
            client.socket.sendall(data[len(held(server)) : stop])
            helpers.until(lambda stop=stop: held(server) == data[:stop])
        assert client.ask(data[stop:])[2] == first[2]
    assert len(server.at_once) == 1


@pytest.mark.parametrize("held", [True, False])
def test_a_body_that_does_not_come_is_waited_for_no_longer_than_others(fast, asked, monkeypatch, held):
    monkeypatch.setattr(http_protocol, "_BODY_SECONDS", 0.02)
    server = fast(client_timeout=0.1)
    with Client(server) as client:
        if held:
            client.ask(post(asked))
        status, _, told = client.ask(post(asked)[:-1])
        assert (status, told["error"]["code"]) == (408, "too_slow")
        assert client.ended()


def test_requests_in_one_piece_are_answered_in_order(fast, asked):
    server = fast()
    with Client(server) as client:
        drawn = [client.ask(post(asked, b"a@1"))[2] for _ in range(2)]
        client.ask(post({**asked, "seed": 1}, b"a@2"))
        client.socket.sendall(post(asked, b"a@2") + b"GET /healthz HTTP/1.1\r\n\r\n" + post(asked, b"a@2"))
        answers = [client.answer()[2] for _ in range(3)]
    assert answers == [drawn[0], {"status": "ok"}, drawn[1]]


def test_a_head_is_no_other_head(fast, asked):
    """A token that somebody has shown lets nobody else in; a host, an origin or a path is not guessed."""
    server = fast(token="sesame", hosts=("localhost",))
    right = b"x-cachepipe-token: sesame\r\n"
    with Client(server) as client:
        for _ in range(2):
            assert client.ask(post(asked, more=right))[0] == 200
        assert len(server.proxy.heads) == 1
        for wrong in (b"", b"x-cachepipe-token: sesame2\r\n", b"x-cachepipe-token: Sesame\r\n"):
            assert client.ask(post(asked, more=wrong))[0] == 401
        assert client.ask(post(asked, b"..%2f", more=right))[0] == 400


@pytest.mark.parametrize(
    "more",
    [
        b"Idempotency-Key: 1\r\n",
        b"x-stainless-retry-count: 1\r\n",
        b"x-cachepipe-mode: refresh\r\n",
        b"x-cachepipe-mode: bypass\r\n",
        b"content-encoding: identity\r\n",
        b"connection: close\r\n",
    ],
)
def test_what_concerns_one_request_is_not_kept(fast, asked, more):
    server = fast()
    with Client(server) as client:
        assert client.ask(post(asked, more=more))[0] == 200
    assert not server.proxy.heads


def test_a_stream_is_a_stream(fast, asked):
    server = fast()
    with Client(server) as client:
        client.ask(post(asked, b"a@1"))
        client.ask(post({**asked, "seed": 1}, b"a@2"))
        client.socket.sendall(post({**asked, "stream": True}, b"a@2", b""))
        assert client.file.readline() == b"HTTP/1.1 200 OK\r\n"
    assert not server.at_once


def test_a_stopping_server_answers_what_has_begun_to_come(serve, asked, helpers):
    """The head of a request is there, and its body comes while the server stops."""
    server = serve()
    data = post(asked)
    with Client(server) as client:
        client.ask(data)
        client.socket.sendall(data[:-1])
        helpers.until(lambda: held(server))
        server.should_exit = True
        helpers.until(lambda: not server.proxy.ready)
        assert client.ask(data[-1:])[0] == 200


@pytest.fixture
def under_way(fast, upstream, asked):
    """A proxy, and a connection whose second request, new but for its head, waits for the upstream."""
    server = fast()
    with Client(server) as client:
        client.ask(post(asked))
        upstream.settings = MockSettings(paused=True)
        client.socket.sendall(post({**asked, "seed": 1}))
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        assert len(server.gone_on) == 1
        yield server, client


def test_a_miss_whose_client_leaves_is_there_for_the_next(under_way, asked, upstream, helpers):
    server, client = under_way
    client.socket.shutdown(socket.SHUT_RDWR)
    helpers.until(lambda: server.proxy.counters.background == 1)
    upstream.settings = MockSettings()
    helpers.until(lambda: server.proxy.counters.background == 0)
    with Client(server) as another:
        _, told, _ = another.ask(post({**asked, "seed": 1}))
    assert (told["cache-status"], told["x-cachepipe-indices"]) == ("cachepipe; hit", "0")
    assert upstream.stats.requests == 2


def test_what_comes_during_a_miss_is_answered_after_it(under_way, asked, upstream):
    _, client = under_way
    client.socket.sendall(b"GET /healthz HTTP/1.1\r\n\r\n" + post(asked))
    client.socket.sendall(post(asked))
    upstream.settings = MockSettings()
    told = [client.answer() for _ in range(4)]
    assert [status for status, _, _ in told] == [200] * 4
    assert told[1][2] == {"status": "ok"}
    assert [told[place][1]["x-cachepipe-indices"] for place in (0, 2, 3)] == ["0", "1", "2"]


def test_a_stopping_server_finishes_a_miss(under_way, upstream, helpers):
    server, client = under_way
    server.should_exit = True
    helpers.until(lambda: not server.proxy.ready)
    upstream.settings = MockSettings()
    assert client.answer()[0] == 200
    assert client.ended()


def test_an_error_passes_through_and_is_not_cached(fast, recorder, asked):
    server = fast(upstreams=(Upstream.of("recorder", recorder.base_url),))
    with Client(server) as client:
        client.ask(post(asked))
        recorder.answers.append((429, [("retry-after", "7"), ("x-request-id", "r")], [b'{"error": {}}']))
        status, told, content = client.ask(post({**asked, "seed": 1}))
        assert (status, told["retry-after"], told["x-request-id"], content) == (429, "7", "r", {"error": {}})
        assert told["cache-status"] == "cachepipe; fwd=miss; fwd-status=429"
        assert client.ask(post({**asked, "seed": 1}))[1]["x-cachepipe-cached"] == "false"
    assert len(server.gone_on) == 2
    assert len(recorder.requests) == 3
    shown = [dict(each.headers)["authorization"] for each in recorder.requests]
    assert shown == ["Bearer k"] * 3


@pytest.mark.parametrize(
    ("data", "end", "size"),
    [
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\na: b\r\n\r\nhello", 44, 5),
        (b"POST / HTTP/1.1\r\na: b\r\ncontent-length: 0\r\n\r\n", 44, 0),
    ],
)
def test_a_head_is_told_from_its_length(data, end, size):
    found = begun(data)
    assert found == (b"POST / HTTP/1.1\r\na: b\r\n\r\n", end, size)
    assert is_plain(found.name)


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        b"\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length: 5 \r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length: 5_0\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length:5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nContent-Length: 99999\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_what_is_no_usual_head_goes_the_ordinary_way(data):
    assert begun(data) is None


@pytest.mark.parametrize(
    "name",
    [b"POST / HTTP/1.1\r\na: b\r\n c\r\n\r\n", b"POST / HTTP/1.1\r\na: b\nc: d\r\n\r\n", b"a\rb\r\n\r\n"],
)
def test_what_parsers_may_read_differently_is_not_kept(name):
    assert not is_plain(name)


def test_so_many_heads_are_kept():
    heads = HeadCache()
    for number in range(2000):
        heads.keep(b"%d" % number, number)
    assert len(heads) == 1024
    assert (b"975" in heads, b"976" in heads) == (False, True)


def test_c6_what_is_answered_at_once_is_in_the_sums_of_the_cache(fast, asked, tmp_path):
    server = fast()
    with Client(server) as client:
        for run in range(4):
            client.ask(post({**asked, "seed": run}, b"a@%d" % run))
            client.ask(post(asked, b"a@%d" % run))
    assert len(server.at_once) == 3
    server.proxy.view.shared_store.deliveries.write_now()
    store = DiskStore(tmp_path / "cache", read_only=True)
    found = statements(store)[label("a")]
    store.close()
    assert found.delivered.requests == 8
    assert found.delivered.saved.counts()["samples"] == 3
    assert found.spent.counts() == found.delivered.billed.counts()
