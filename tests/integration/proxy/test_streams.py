"""Streams through the proxy: byte for byte where one call passes through, faithful on replay."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx2
import pytest

from cachepipe.proxy.settings import Upstream
from cachepipe.testing import MockSettings

HEAD = b'{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":'
EVENTS = [
    b": hello\n\ndata: %b" % HEAD
    + b'[{"index":0,"delta":{"role":"assistant","content":"a"},"finish_reason":null}]}\r\n\r\n',
    b"data: %b" % HEAD + b'[{"index":0,"delta":{"content":" b"},"finish_reason":"stop"}]}\n\n',
    b"data: %b" % HEAD + b'[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n',
    b"data: [DONE]\n\n",
]
STREAM = [("content-type", "text/event-stream"), ("x-open", "1"), ("x-ratelimit-remaining", "7")]


@pytest.fixture
def streaming(behind):
    """The proxy in front of the recorder."""
    return behind[0]


@pytest.fixture
def recorder(behind):
    """The recorder behind it."""
    return behind[1]


def test_a_stream_passes_byte_for_byte(streaming, recorder, http, asked, helpers):
    recorder.answers.append((200, STREAM, EVENTS))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = http.post(helpers.chat_url(streaming), json={**asked, **options})
    assert answer.content == b"".join(EVENTS)
    assert answer.headers["x-ratelimit-remaining"] == "7"
    assert answer.headers["cache-status"] == "cachepipe; fwd=miss; stored"
    again = http.post(helpers.chat_url(streaming, "b"), json={**asked, **options})
    assert helpers.text_of(again) == ["a b"]
    assert again.content.endswith(b"data: [DONE]\n\n")
    assert len(recorder.requests) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_live_stream_tells_the_indices_that_it_has_claimed(proxy, http, asked, helpers, n):
    """They are fixed before the call is made; what is stored there afterwards is what it brought."""
    stream = {**asked, "n": n, "stream": True}
    for number in range(2):
        live = http.post(helpers.chat_url(proxy, "a", 1), json=stream)
        assert live.headers["cache-status"] == "cachepipe; fwd=miss; stored"
        indices = range(number * n, number * n + n)
        assert live.headers["x-cachepipe-indices"] == ", ".join(map(str, indices))
        assert live.headers["x-cachepipe-cached"] == ", ".join(["false"] * n)
        key = live.headers["x-cachepipe-key"]
        stored = {sample.index: json.loads(sample.payload) for sample in proxy.proxy.store.samples(key)}
        texts = [stored[index]["choices"][0]["message"]["content"] for index in indices]
        assert texts == helpers.text_of(live)


def test_usage_that_nobody_asked_for_is_taken_out(streaming, recorder, http, asked, helpers):
    recorder.answers.append((200, STREAM, EVENTS))
    answer = http.post(helpers.chat_url(streaming), json={**asked, "stream": True})
    assert answer.content == b"".join(EVENTS[:2] + EVENTS[3:])
    assert json.loads(recorder.requests[-1].body)["stream_options"] == {"include_usage": True}
    whole = http.post(helpers.chat_url(streaming, "b"), json=asked)
    assert whole.json()["usage"]["total_tokens"] == 3


def test_a_server_that_reports_no_usage_is_asked_as_its_client_wrote(
    streaming, recorder, http, asked, helpers
):
    refusal = b'{"error":{"message":"stream_options: unknown"}}'
    recorder.answers += [(422, STREAM, [refusal]), (200, STREAM, EVENTS[:2] + EVENTS[3:])]
    answer = http.post(helpers.chat_url(streaming), json={**asked, "stream": True})
    assert (answer.status_code, answer.content) == (200, b"".join(EVENTS[:2] + EVENTS[3:]))
    assert "stream_options" not in json.loads(recorder.requests[-1].body)
    assert http.post(helpers.chat_url(streaming, "b"), json=asked).headers["cache-status"] == "cachepipe; hit"
    recorder.answers += [(400, STREAM, [b"first"]), (400, STREAM, [b"second"])]
    refused = http.post(helpers.chat_url(streaming, "b"), json={**asked, "stream": True})
    assert (refused.status_code, refused.content) == (400, b"second")


def test_what_is_no_stream_is_not_said_to_be_stored(streaming, recorder, http, asked, helpers):
    recorder.answers.append((200, [("content-type", "application/json")], [b'{"no": "stream"}']))
    answer = http.post(helpers.chat_url(streaming), json={**asked, "stream": True})
    assert (answer.json(), answer.headers["cache-status"]) == ({"no": "stream"}, "cachepipe; fwd=miss")


def test_a_stream_that_breaks_off_is_no_answer_and_ends_broken(streaming, recorder, asked, helpers):
    url = helpers.chat_url(streaming)
    recorder.answers.append((200, [*STREAM, ("transfer-encoding", "chunked")], [b"a\r\n0123", None]))
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.post(url, json={**asked, "stream": True}, timeout=20)
    again = httpx2.post(url, json=asked, timeout=20)
    assert again.headers["x-cachepipe-cached"] == "false"
    assert again.headers["x-cachepipe-indices"] == "0"


@pytest.mark.parametrize(
    "pieces",
    [
        EVENTS[:1],
        [EVENTS[0], b'data: {"error":{"message":"no"}}\n\n'],
        [EVENTS[0], b"data: nonsense\n\n", EVENTS[3]],
        [b"<html>no stream</html>"],
        [b""],
    ],
)
def test_what_is_no_whole_stream_is_handed_on_and_not_cached(
    streaming, recorder, http, asked, helpers, pieces
):
    recorder.answers.append((200, STREAM, pieces))
    url = helpers.chat_url(streaming)
    answer = http.post(url, json={**asked, "stream": True})
    assert answer.content == b"".join(pieces)
    again = http.post(url, json=asked)
    assert again.headers["x-cachepipe-cached"] == "false"
    assert again.headers["x-cachepipe-indices"] == "0"


def test_an_error_before_the_stream_passes_through(streaming, recorder, http, asked, helpers):
    recorder.answers.append(
        (429, [("content-type", "application/json"), ("retry-after", "7")], [b'{"error":1}'])
    )
    answer = http.post(helpers.chat_url(streaming), json={**asked, "stream": True})
    assert (answer.status_code, answer.headers["retry-after"], answer.content) == (429, "7", b'{"error":1}')


def test_a_reader_that_leaves_after_some_content_does_not_lose_the_rest(
    proxy, upstream, http, asked, helpers
):
    url = helpers.chat_url(proxy, "a")
    with http.stream("POST", url, json={**asked, "stream": True}) as answer:
        next(answer.iter_raw(64))
    upstream.wait_until(lambda stats: stats.in_flight == 0)
    other = http.post(helpers.chat_url(proxy, "b"), json=asked)
    assert other.headers["cache-status"] == "cachepipe; hit"
    # What was read was drawn: the next of its kind is another sample.
    assert http.post(url, json=asked).headers["x-cachepipe-indices"] == "1"
    assert upstream.stats.requests == 2


def test_a_reader_that_stalls_holds_nobody_up(serve, upstream, asked, helpers):
    """The stream of a client that does not read is read on for another that waits for the sample."""
    upstream.settings = MockSettings(max_tokens=512)
    proxy = serve()
    request = {**asked, "stream": True}
    with (
        httpx2.Client(timeout=20) as one,
        httpx2.Client(timeout=20) as two,
        one.stream("POST", helpers.chat_url(proxy, "a"), json=request) as stalled,
    ):
        assert stalled.status_code == 200
        answer = two.post(helpers.chat_url(proxy, "b"), json=asked)
        assert answer.headers["x-cachepipe-cached"] == "true"
        assert helpers.text_of(answer)[0]
    assert upstream.stats.requests == 1


def test_several_choices_are_renumbered_when_they_are_put_together(proxy, upstream, http, asked, helpers):
    one = helpers.text_of(http.post(helpers.chat_url(proxy, "a"), json=asked))
    two = http.post(helpers.chat_url(proxy, "b"), json={**asked, "n": 3, "stream": True})
    texts = helpers.text_of(two)
    assert texts[0] == one[0]
    assert len(texts) == 3
    whole = http.post(helpers.chat_url(proxy, "c"), json={**asked, "n": 3})
    assert helpers.text_of(whole) == texts


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
def test_a_client_that_takes_nothing_is_cut_off(serve, recorder, asked, path):
    """Whether its answer is there as a whole or passes through; else the connection would stay for ever."""
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),), client_timeout=0.1)
    recorder.answers.append((200, [("content-type", "text/plain")], [b"x" * (32 << 20)]))
    body = json.dumps(asked).encode()
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert client.recv(1)
        deadline = time.monotonic() + 20
        server = proxy.server_state
        while (server.connections or server.tasks) and time.monotonic() < deadline:
            threading.Event().wait(0.001)
        assert not server.connections
    assert proxy.logged[-1]["outcome"] == ("left" if path == "/v1/files" else "error")


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(serve, recorder, raw, asked):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    recorder.answers.append((200, STREAM, EVENTS))
    body = json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    told, _, content = raw(proxy, head + body, end=False).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in told
    assert content == b"".join(EVENTS)


def test_shutdown_tells_those_whom_it_cannot_wait_for(serve, upstream, asked, helpers):
    upstream.settings = MockSettings(paused=True)
    proxy = serve(shutdown_timeout=0.1)
    answers = []
    with httpx2.Client(timeout=20) as client:
        thread = threading.Thread(
            target=lambda: answers.append(client.post(helpers.chat_url(proxy), json=asked))
        )
        thread.start()
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        proxy.should_exit = True
        thread.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "stopping")


def test_shutdown_finishes_what_is_in_flight(serve, upstream, asked, helpers):
    upstream.settings = MockSettings(paused=True)
    proxy = serve()
    answers = []
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx2.Client(timeout=20))
        thread = threading.Thread(
            target=lambda: answers.append(client.post(helpers.chat_url(proxy), json=asked))
        )
        thread.start()
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        proxy.should_exit = True
        while proxy.proxy.ready:
            threading.Event().wait(0.001)
        upstream.settings = MockSettings()
        thread.join()
    assert answers[0].status_code == 200


def test_servers_in_front_of_the_proxy_are_asked_not_to_hold_events_back(proxy, http, asked, helpers):
    """nginx gathers what comes from behind it, unless this header says otherwise."""
    for run in range(2):
        url = helpers.chat_url(proxy, "a", run)
        assert http.post(url, json={**asked, "stream": True}).headers["x-accel-buffering"] == "no"
        assert "x-accel-buffering" not in http.post(url, json=asked).headers
    other = http.post(f"{proxy.url}/v1/chat/completions", json={**asked, "stream": True, "n": 2})
    assert other.headers["x-accel-buffering"] == "no"
    passed = http.post(
        helpers.chat_url(proxy), json={**asked, "stream": True}, headers={"x-cachepipe-mode": "bypass"}
    )
    assert passed.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("pairs", "pieces", "paid"),
    [
        (STREAM[:1], EVENTS[:3], 1),  # with a length
        (STREAM[:1], EVENTS[:2], 1),
        (STREAM, EVENTS[:3], 2),  # until the connection closes
        (STREAM[:1], EVENTS[:1], 2),
        ([*STREAM[:1], ("content-length", "900")], [*EVENTS[:3], None], 2),  # shorter than it says
    ],
)
def test_c7_a_stream_without_done_is_stored_only_if_its_body_ended_in_order(
    streaming, recorder, http, asked, helpers, pairs, pieces, paid
):
    for namespace in ("a", "b"):
        recorder.answers[:] = [(200, pairs, pieces)]
        with contextlib.suppress(httpx2.RemoteProtocolError):
            answer = http.post(helpers.chat_url(streaming, namespace), json={**asked, "stream": True})
            assert helpers.text_of(answer)[0].startswith("a")
    assert len(recorder.requests) == paid


def test_c8_the_retry_of_a_client_that_left_a_stream_is_the_same_draw(serve, gated, asked, helpers):
    """Whether the retry is streamed, and whether it leaves too."""
    proxy = serve(upstreams=(Upstream.of("gated", f"{gated.url}/v1"),))
    url, stream = helpers.chat_url(proxy, "a"), {**asked, "stream": True}
    with httpx2.stream("POST", url, json=stream, timeout=20) as answer:
        next(answer.iter_raw())
    _until(lambda: proxy.proxy.counters.background == 1)
    for background in (2, 3):
        with socket.create_connection(
            (proxy.proxy.settings.host, int(proxy.url.rpartition(":")[2]))
        ) as retry:
            body = json.dumps(asked).encode()
            head = b"POST /ns/a/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            retry.sendall(head % len(body) + body)
            _until(lambda: proxy.proxy.counters.in_flight == 1)
        _until(lambda background=background: proxy.proxy.counters.background == background)
    gated.gate.set()
    _until(lambda: not proxy.proxy.counters.background)
    retry = httpx2.post(url, json=stream, timeout=20)
    assert (helpers.text_of(retry), retry.headers["x-cachepipe-indices"]) == (["sample1 goes on"], "0")
    assert retry.headers["x-cachepipe-cached"] == "true"
    assert helpers.text_of(httpx2.post(url, json=asked, timeout=20)) == ["sample2 goes on"]
    rerun = httpx2.post(helpers.chat_url(proxy, "a", 1), json=asked, timeout=20)
    assert helpers.text_of(rerun) == ["sample1 goes on"]
    assert gated.calls == 2


def _until(holds):
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert holds()
