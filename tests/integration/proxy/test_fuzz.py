"""Whatever arrives, a proxy neither dies, nor caches nonsense, nor hands one client what is another's."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import sized

from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A proxy for all the examples of this file, and the mock server behind it."""
    with MockServer.in_thread() as upstream:
        options = {
            "cache": str(tmp_path_factory.mktemp("cache")),
            "port": 0,
            "log": "off",
            "max_body": 100_000,
        }
        upstreams = (Upstream.of("mock", upstream.base_url),)
        with running(ProxySettings(upstreams=upstreams, **options)) as server, client:
            yield server


client = httpx2.Client(timeout=20)


def send(server, pieces, *, read=True):
    """Send bytes piece by piece; return what comes back until the connection ends."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
        if read:
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
    return answer


def alive(server):
    """Tell whether the proxy still answers, and holds nothing that belongs to nobody."""
    return client.get(f"{server.url}/healthz").status_code == 200


def stored(server):
    """Return the texts of all answers in the cache, by key."""
    store = server.proxy.store
    keys = [info.key for info in store.keys()]  # noqa: SIM118 - a store is no mapping
    return {key: [json.loads(sample.payload) for sample in store.samples(key)] for key in keys}


HEAD = b"POST /ns/fuzz/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
GOOD = json.dumps({"model": "m", "messages": [{"role": "user", "content": "fuzz"}]}).encode()

noise = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.sampled_from(
            [
                b"GET / HTTP/1.1\r\n",
                HEAD,
                b"Content-Length: 5\r\n",
                b"Content-Length: 99999999999999999999\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Connection: close\r\n",
                b"Expect: 100-continue\r\n",
                b"\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"ffffffffffffffffff\r\n",
                GOOD,
                b"\x00\xff\xfe",
                b"X: " + b"a" * 70_000 + b"\r\n",
            ]
        ),
        max_size=8,
    ).map(b"".join),
)


@settings(max_examples=sized(20, 60))
@given(data=noise, read=st.booleans(), at=st.integers(1, 200))
def test_noise_ends_nothing(stranger, data, read, at):
    answer = send(stranger, [data[:at], data[at:]], read=read)
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert alive(stranger)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["n", "stream", "messages", "seed", "model", "stream_options", "stop", "tools", "best_of", "\0"]
)


@settings(max_examples=sized(20, 60))
@given(
    changes=st.dictionaries(fields, json_values, max_size=4),
    cut=st.integers(0, 3),
    path=st.sampled_from(
        ["chat/completions", "completions", "embeddings", "responses", "messages", "moderations"]
    ),
)
def test_odd_bodies_are_answered_and_only_answers_are_cached(stranger, changes, cut, path):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **changes}).encode()
    body = body[: len(body) - cut]
    answer = client.post(f"{stranger.url}/ns/odd/v1/{path}", content=body)
    assert 200 <= answer.status_code < 600
    assert answer.status_code != 500, answer.text
    if cut:
        assert answer.status_code >= 400
    assert alive(stranger)


@settings(max_examples=sized(10, 30))
@given(
    length=st.integers(0, 2 * len(GOOD)),
    pieces=st.lists(st.integers(0, len(GOOD)), max_size=4).map(sorted),
    leave=st.booleans(),
)
def test_wrong_lengths_and_early_leaving_cache_nothing_but_what_was_asked(stranger, length, pieces, leave):
    head = HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % length
    cuts = [0, *pieces, len(GOOD)]
    parts = [GOOD[start:stop] for start, stop in itertools.pairwise(cuts)]
    answer = send(stranger, [head, *parts], read=not leave)
    if answer and length != len(GOOD):
        assert b"chat.completion" not in answer
    assert alive(stranger)


def test_nothing_but_answers_was_cached(stranger, helpers):
    """Runs after the others of this file; with none of them the cache is empty, and that is true as well."""
    for samples in stored(stranger).values():
        for sample in samples:
            assert {"object", "data"} & {*sample} or {"choices", "output", "content"} & {*sample}
            assert not sample.get("error")
    helpers.until(lambda: not stranger.proxy.counters.in_flight)  # those who left early are noticed late


def test_pipelined_requests_are_answered_in_their_order(stranger):
    one = HEAD.replace(b"fuzz", b"pipe") + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
    answer = send(stranger, [one + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"])
    if answer.count(b"HTTP/1.1 200") == 2:
        assert answer.index(b"chat.completion") < answer.index(b'"status":"ok"')
    assert alive(stranger)


@settings(max_examples=sized(6, 15))
@given(texts=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), min_size=2, max_size=6))
def test_answers_reach_who_asked(stranger, texts):
    """Many clients at once, each with a question of its own, streamed or not."""
    import concurrent.futures  # noqa: PLC0415 - only here

    def ask(place, text):
        body = {"model": f"model-{place}", "messages": [{"role": "user", "content": text}]}
        headers = {"authorization": f"Bearer k{place}"}
        url = f"{stranger.url}/ns/mine/v1/chat/completions"
        answer = client.post(url, json={**body, "stream": place % 2 == 1}, headers=headers)
        return f'"model":"model-{place}"' in answer.text.replace(" ", ""), answer.status_code

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(len(texts)), texts)) == {(True, 200)}
