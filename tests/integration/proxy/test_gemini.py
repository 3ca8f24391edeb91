"""Gemini through the proxy, in the forms that Google's servers take and give."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from cachepipe.proxy.settings import Upstream
from cachepipe.testing import MockServer, MockSettings

MODEL = "/v1beta/models/gemini-2.5-flash"
ASK = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
KEY = "AIza-the-key"


@pytest.fixture
def upstream():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12, api_key=KEY)) as server:
        yield server


@pytest.fixture(name="http")
def _http():
    with httpx2.Client(timeout=20) as client:
        yield client


@pytest.fixture
def gemini(serve, upstream):
    return serve(upstreams=(Upstream.of("google", upstream.url, kind="gemini"),))


def text_of(answer):
    return "".join(part["text"] for part in answer["candidates"][0]["content"]["parts"])


def streamed(response):
    """The chunks of a stream of events."""
    return [json.loads(line[5:]) for line in response.text.splitlines() if line.startswith("data:")]


def test_c10_streams_in_both_forms_and_whole_answers_share_samples(gemini, upstream, http):
    url, header = f"{gemini.url}/ns/a@1{MODEL}", {"x-goog-api-key": KEY}
    whole = http.post(f"{url}:generateContent", json=ASK, headers=header)
    assert whole.status_code == 200, whole.text
    events = http.post(f"{gemini.url}/ns/b@1{MODEL}:streamGenerateContent?alt=sse", json=ASK, headers=header)
    array = http.post(f"{gemini.url}/ns/c@1{MODEL}:streamGenerateContent", json=ASK, headers=header)
    assert events.headers["content-type"].startswith("text/event-stream")
    assert array.headers["content-type"] == "application/json"
    text = text_of(whole.json())
    assert "".join(map(text_of, streamed(events))) == "".join(map(text_of, array.json())) == text
    usage = whole.json()["usageMetadata"]
    assert streamed(events)[-1]["usageMetadata"] == array.json()[-1]["usageMetadata"] == usage
    assert upstream.stats.requests == 1


@pytest.mark.parametrize("query", ["?alt=sse", ""], ids=["events", "array"])
def test_c10_a_stream_is_recorded_in_either_form(gemini, upstream, http, query):
    header = {"x-goog-api-key": KEY}
    url = f"{gemini.url}/ns/a@1{MODEL}:streamGenerateContent{query}"
    missed = http.post(url, json=ASK, headers=header)
    chunks = streamed(missed) if query else missed.json()
    assert missed.headers["content-type"].startswith("text/event-stream" if query else "application/json")
    assert missed.headers["cache-status"].startswith("cachepipe; fwd=miss")
    hit = http.post(f"{gemini.url}/ns/b@1{MODEL}:generateContent", json=ASK, headers=header)
    assert text_of(hit.json()) == "".join(map(text_of, chunks))
    assert hit.json()["candidates"][0]["finishReason"] == chunks[-1]["candidates"][0]["finishReason"]
    assert upstream.stats.requests == 1


def test_a_key_in_the_query_is_forwarded_and_neither_keyed_nor_stored(gemini, upstream, http, tmp_path):
    first = http.post(f"{gemini.url}/ns/a@1{MODEL}:generateContent?key={KEY}", json=ASK)
    assert first.status_code == 200, first.text
    again = http.post(
        f"{gemini.url}/ns/b@1{MODEL}:generateContent", json=ASK, headers={"x-goog-api-key": KEY}
    )
    assert again.json() == first.json()
    refused = http.post(f"{gemini.url}/ns/c@1{MODEL}:generateContent?key=wrong", json={**ASK, "tools": []})
    assert refused.status_code == 401
    assert refused.json()["error"]["status"] == "UNAUTHENTICATED"
    assert upstream.stats.requests == 2
    stored = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert b"gemini-2.5-flash" in stored
    assert KEY.encode() not in stored
    assert KEY not in json.dumps(gemini.logged)


def test_callers_with_different_keys_in_their_queries_share_no_call(gemini, upstream, http):
    upstream.settings = MockSettings(paused=True)
    with ThreadPoolExecutor(4) as pool:
        url = f"{gemini.url}/ns/a@1{MODEL}:generateContent?key="
        waiting = [pool.submit(http.post, url + key, json=ASK) for key in ("one", "two")]
        upstream.wait_until(lambda stats: stats.in_flight == 2)
        upstream.settings = MockSettings()
        assert [each.result().status_code for each in waiting] == [200, 200]


def test_embeddings_of_a_list_and_alone_share_samples(gemini, upstream, http):
    header = {"x-goog-api-key": KEY}
    contents = [{"parts": [{"text": text}]} for text in ("one", "two")]
    batch = {"requests": [{"model": "models/gemini-2.5-flash", "content": each} for each in contents]}
    both = http.post(f"{gemini.url}{MODEL}:batchEmbedContents", json=batch, headers=header).json()
    alone = http.post(f"{gemini.url}{MODEL}:embedContent", json={"content": contents[1]}, headers=header)
    assert alone.json()["embedding"] == both["embeddings"][1]
    assert upstream.stats.requests == 1
    batch["requests"].append({"model": "models/gemini-2.5-flash", "content": {"parts": [{"text": "three"}]}})
    more = http.post(f"{gemini.url}{MODEL}:batchEmbedContents", json=batch, headers=header).json()
    assert more["embeddings"][:2] == both["embeddings"]
    assert (upstream.stats.requests, upstream.stats.samples_generated) == (2, 3)


def test_other_methods_pass_through(gemini, http):
    counted = http.post(f"{gemini.url}{MODEL}:countTokens?key={KEY}", json=ASK)
    assert counted.json()["totalTokens"] > 0
    assert "fwd" in counted.headers["cache-status"]


def test_a_miss_of_a_replay_is_an_error_in_googles_form(serve, upstream, http):
    serve()
    replay = serve(upstreams=(Upstream.of("google", upstream.url, kind="gemini"),), replay=True)
    missed = http.post(f"{replay.url}{MODEL}:generateContent", json=ASK)
    error = missed.json()["error"]
    assert (missed.status_code, error["code"], error["status"]) == (404, 404, "NOT_FOUND")
    assert error["details"][0]["reason"] == "CACHE_MISS"


def test_gemini_paths_go_to_the_upstream_of_that_kind(serve, upstream, http):
    other = Upstream.of("other", "http://127.0.0.1:1/v1")
    proxy = serve(upstreams=(other, Upstream.of("google", upstream.url, kind="gemini")))
    answer = http.post(f"{proxy.url}{MODEL}:generateContent?key={KEY}", json=ASK)
    assert answer.status_code == 200
    assert Upstream.of("g", "https://generativelanguage.googleapis.com").kind == "gemini"
