"""An upstream's limits hold for all its clients; hits wait for nothing."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import httpx2
import pytest

from cachepipe.proxy.settings import BadSettings, ProxySettings, Upstream, from_file
from cachepipe.testing import MockSettings

LATER = (429, [("retry-after-ms", "1")], [b'{"error": {"message": "slower"}}'])


def post(url, body, key="k"):
    return httpx2.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_all_clients_wait_for_each_other_and_hits_do_not(serve, upstream, asked, helpers, stream):
    limited = Upstream.of("mock", upstream.base_url, limits={"max_concurrency": 1})
    proxy = serve(upstreams=(limited,))
    url = helpers.chat_url(proxy)
    first = post(url, asked)
    upstream.settings = MockSettings(paused=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(post, url, {**asked, "seed": seed, "stream": stream}, f"k{seed}") for seed in (1, 2)
        ]
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        until = time.monotonic() + 20
        while limited.flow.limits.stats().waiting != 1 and time.monotonic() < until:
            threading.Event().wait(0.001)
        assert upstream.stats.in_flight == limited.flow.limits.stats().waiting == 1
        again = post(helpers.chat_url(proxy, "b"), asked)
        assert (again.content, again.headers["cache-status"]) == (first.content, "cachepipe; hit")
        upstream.settings = MockSettings()
        assert [each.result().status_code for each in waiting] == [200, 200]
    assert upstream.stats.requests == 3


def test_without_retries_a_refusal_passes_through(serve, recorder, asked, helpers):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url, limits={"max_requests": 100}),))
    recorder.answers.append(LATER)
    refused = post(helpers.chat_url(proxy), asked)
    assert (refused.status_code, refused.headers["retry-after-ms"]) == (429, "1")
    assert refused.content == LATER[2][0]
    assert post(helpers.chat_url(proxy), asked).status_code == 200
    assert len(recorder.requests) == 2


def test_with_retries_a_refused_call_is_made_again(serve, recorder, asked, helpers):
    limits = {"max_retries": 2, "adaptive": False}
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url, limits=limits),))
    recorder.answers += [LATER, LATER]
    assert post(helpers.chat_url(proxy), asked).status_code == 200
    assert len(recorder.requests) == 3


def test_limits_stand_in_the_file(tmp_path):
    path = tmp_path / "proxy.toml"
    path.write_text(
        "[upstreams.a]\nurl = 'https://x/v1'\n[upstreams.a.limits]\nmax_requests = 5\ninterval = 2\n"
        "max_retries = 3\n[upstreams.a.limits.per_model.m]\nmax_requests = 1\n[upstreams.b]\nurl = 'https://y/v1'\n"
    )
    one, other = from_file(path, {}).upstreams
    assert (one.flow.limits.quota.max_requests, one.flow.limits.quota.interval) == (5, 2)
    assert one.flow.limits.per_model["m"].max_requests == 1
    assert one.flow.retries.max_retries == 3
    assert other.flow is None
    assert ProxySettings(upstreams=(one,)).checked()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("limits = 3", "limits are a table"),
        ("limits = {x = 1}", "hold 'x'; known are adaptive"),
        ("limits = {max_requests = 0}", "are not valid"),
        ("limits = {max_requests = 'a'}", "are not valid"),
        ("limits = {interval = -1}", "are not valid"),
        ("limits = {max_retries = -1}", "are not valid"),
        ("limits = {per_model = {m = {x = 1}}}", "are not valid"),
        ("limits = {per_model = 3}", "are not valid"),
    ],
)
def test_limits_that_are_none_are_refused(tmp_path, limits, message):
    path = tmp_path / "proxy.toml"
    path.write_text(f"[upstreams.a]\nurl = 'https://x/v1'\n{limits}\n")
    with pytest.raises(BadSettings, match=message):
        from_file(path, {})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 10_001}),
        ("chat/completions", {"model": "m", "messages": [], "n": 10**12, "stream": True}),
        ("completions", {"model": "m", "prompt": ["a", "b"], "n": 6000}),
        ("completions", {"model": "m", "prompt": "a", "n": 2**40, "best_of": 2**41}),
    ],
)
def test_a_request_for_too_many_samples_is_refused_as_the_provider_would(serve, recorder, path, body):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    with httpx2.Client() as client:
        for _ in range(3):
            answer = client.post(f"{proxy.url}/v1/{path}", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (
                400,
                "invalid_request_error",
                "n_too_large",
            )
            assert "at most 10000 samples" in error["message"]
            assert answer.headers["x-should-retry"] == "false"
    assert not recorder.requests
    assert proxy.proxy.store.totals()["draws"] == 0


def test_the_most_samples_of_a_request_can_be_set(serve, recorder, asked, helpers):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),), max_n=2)
    assert post(helpers.chat_url(proxy), {**asked, "n": 3}).status_code == 400
    assert post(helpers.chat_url(proxy), {**asked, "n": 2}).status_code == 200
    with pytest.raises(BadSettings, match="max_n is at least 1"):
        ProxySettings(upstreams=proxy.proxy.settings.upstreams, max_n=0).checked()


def test_a_list_of_more_inputs_than_are_cached_passes_through(serve, recorder):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    answer = post(f"{proxy.url}/v1/embeddings", {"model": "m", "input": ["a"] * 10_001})
    assert answer.headers["cache-status"] == "cachepipe; fwd=bypass"
    assert len(recorder.requests) == 1
