"""Answers that are larger than what is kept in memory: they pass through as they come, uncached."""

from __future__ import annotations

import gzip
import json
import threading
import time
import tracemalloc
import zlib

import httpx2
import pytest

from cachepipe.proxy.settings import Upstream

MOST = 100_000


def answer_of(size):
    """Return a chat completion of so many bytes."""
    choice = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    choice["message"]["content"] = "a" * (size - len(json.dumps(body)))
    return json.dumps(body).encode()


def packed(content, encoding):
    if encoding == "gzip":
        return gzip.compress(content)
    return zlib.compress(content) if encoding == "deflate" else content


@pytest.fixture
def behind(serve, recorder):
    return serve(upstreams=(Upstream.of("recorder", recorder.base_url),), max_answer=MOST)


def reply(content, encoding="identity", status=200, kind="application/json"):
    pairs = [("content-type", kind)] + [("content-encoding", encoding)] * (encoding != "identity")
    return status, pairs, [packed(content, encoding)]


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
def test_what_is_larger_than_the_bound_passes_through_whole_and_uncached(
    behind, recorder, asked, helpers, encoding
):
    content = answer_of(MOST + 1)
    for namespace in ("a", "a", "b"):
        recorder.answers.append(reply(content, encoding))
        answer = httpx2.post(helpers.chat_url(behind, namespace), json=asked)
        assert answer.content == content
        assert answer.headers["cache-status"] == "cachepipe; fwd=miss"
    assert len(recorder.requests) == 3
    totals = behind.proxy.store.totals()
    assert (totals["samples"], totals["pending"], totals["draws"]) == (0, 0, 0)
    assert behind.logged[-1]["outcome"] == "passed"


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_what_is_as_large_as_the_bound_is_cached(behind, recorder, asked, helpers, encoding):
    recorder.answers.append(reply(answer_of(MOST), encoding))
    for run in range(2):
        answer = httpx2.post(helpers.chat_url(behind, "a", run), json=asked)
        assert answer.json() == json.loads(answer_of(MOST))
    assert answer.headers["cache-status"] == "cachepipe; hit"
    assert len(recorder.requests) == 1


def test_a_bomb_takes_no_more_memory_than_the_bound(behind, recorder, asked, helpers):
    content = answer_of(60 << 20)
    recorder.answers.append(reply(content, "gzip"))
    url, size = helpers.chat_url(behind), len(content)
    del content
    tracemalloc.start()
    try:
        with httpx2.stream("POST", url, json=asked, timeout=60) as answer:
            assert sum(map(len, answer.iter_raw())) == size
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_for_which_all_is_sent_at_once_has_the_bound_too(behind, recorder, asked, helpers):
    """Such as JSON in answer to a request for events, without a line that ends."""
    content = answer_of(3 * MOST)
    recorder.answers.append(reply(content))
    answer = httpx2.post(helpers.chat_url(behind), json={**asked, "stream": True})
    assert answer.content == content
    assert behind.proxy.store.totals()["samples"] == 0


def test_an_error_that_is_larger_than_the_bound_keeps_its_status(behind, recorder, asked, helpers):
    recorder.answers.append(reply(b"x" * (2 * MOST), "gzip", status=429, kind="text/plain"))
    answer = httpx2.post(helpers.chat_url(behind), json=asked)
    assert answer.status_code == 429
    assert b"is left out" in answer.content


def test_a_list_of_which_some_is_known_cannot_be_completed_by_too_large_an_answer(behind, recorder):
    url = f"{behind.url}/v1/embeddings"

    def embeddings(*lengths):
        data = [
            {"object": "embedding", "index": index, "embedding": "A" * length}
            for index, length in enumerate(lengths)
        ]
        return json.dumps({"object": "list", "data": data, "model": "m", "usage": None}).encode()

    recorder.answers.append(reply(embeddings(8)))
    assert httpx2.post(url, json={"model": "m", "input": ["a"]}).status_code == 200
    recorder.answers.append(reply(embeddings(MOST, 8)))
    refused = httpx2.post(url, json={"model": "m", "input": ["a", "b", "c"]})
    assert refused.status_code == 502
    assert "more than 100000 bytes" in refused.json()["error"]["message"]
    whole = embeddings(MOST, 8)
    recorder.answers.append(reply(whole))
    assert httpx2.post(url, json={"model": "m", "input": ["d", "e"]}).content == whole
    assert not behind.proxy.client.in_flight["recorder"]


# Streams.

HEADS = [("content-type", "text/event-stream"), ("x-open", "1")]


def event(text):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(chunk).encode()


@pytest.mark.parametrize(
    "pieces",
    [
        [event("a" * 1000)] * 200 + [b"data: [DONE]\n\n"],
        [b"data: " + b"x" * 1000] + [b"x" * 1000] * 200,
        [b": comment\n"] * 20_000 + [b"\n"],
    ],
    ids=["events", "a line without end", "an event without end"],
)
def test_a_stream_that_is_larger_than_the_bound_passes_byte_for_byte(
    behind, recorder, asked, helpers, pieces
):
    recorder.answers.append((200, HEADS, pieces))
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    assert httpx2.post(helpers.chat_url(behind), json=body).content == b"".join(pieces)
    helpers.until(lambda: not behind.proxy.store.totals()["draws"])  # it is undone once the stream has ended
    assert len(recorder.requests) == 1


class Endless:
    """Pieces of a body that never ends, until its connection does."""

    def __init__(self):
        self.over = threading.Event()

    def __contains__(self, _):
        return False

    def __iter__(self):
        try:
            while True:
                yield event("a" * 1000)
        finally:
            self.over.set()


def test_a_stream_without_end_is_given_up_once_its_client_has_left(behind, recorder, asked, helpers):
    pieces = Endless()
    recorder.answers.append((200, HEADS, pieces))
    with httpx2.stream("POST", helpers.chat_url(behind), json={**asked, "stream": True}) as answer:
        assert next(answer.iter_raw())
    assert pieces.over.wait(20)
    deadline = time.monotonic() + 20
    while behind.proxy.store.totals()["draws"] and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert behind.proxy.store.totals()["draws"] == 0
    assert not behind.proxy.client.in_flight["recorder"]


def test_a_stream_without_end_is_read_no_faster_than_its_client_takes_it(behind, recorder, asked, helpers):
    pieces = Endless()
    recorder.answers.append((200, HEADS, pieces))
    tracemalloc.start()
    try:
        with httpx2.stream("POST", helpers.chat_url(behind), json={**asked, "stream": True}) as answer:
            size = 0
            for chunk in answer.iter_raw():
                size += len(chunk)
                if size > 20 << 20:
                    break
        assert pieces.over.wait(20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
