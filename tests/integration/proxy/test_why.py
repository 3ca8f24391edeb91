"""The log of a proxy says why a request is a miss, if it is asked to."""

from __future__ import annotations

import json

import pytest


def ask(http, proxy, text, run="", **headers):
    body = {"model": "ngram-1", "messages": [{"role": "user", "content": text}]}
    return http.post(f"{proxy.url}/ns/x{run}/v1/chat/completions", json=body, headers=headers)


def test_the_log_says_why_requests_are_misses(serve, http, helpers):
    proxy = serve(why=True)
    texts = [
        "What is the time on 2026-01-02?",
        "What is the time on 2026-01-03?",
        "What is the time on 2026-01-02?",
    ]
    for text in texts:
        assert ask(http, proxy, text).status_code == 200
    assert ask(http, proxy, texts[0], "@again").status_code == 200
    helpers.until(lambda: len(proxy.logged) == 4)
    first, second, third, hit = proxy.logged
    assert first["why"] == "the cache holds no similar question"
    assert "another date or time" in second["why"]
    assert "the cache has 1 sample of this question, but other requests" in third["why"]
    assert "for the 2nd time" in third["why"]
    assert (hit["outcome"], "why" in hit) == ("hit", False)


def test_a_replay_says_why_and_nothing_is_said_unasked(serve, http, helpers):
    proxy = serve()
    text = "Say in one word which city is the capital of"
    assert ask(http, proxy, f"{text} France.").status_code == 200
    replaying = serve(why=True, replay=True)
    assert ask(http, replaying, f"{text} Peru.").status_code == 404
    helpers.until(lambda: proxy.logged and replaying.logged)
    assert "why" not in proxy.logged[0]
    assert "differs in messages[0].content" in replaying.logged[0]["why"]


def test_the_page_and_the_metrics_use_given_prices_without_a_budget(serve, http, tmp_path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"ngram-1": {"prompt": 1, "completion": 100}}))
    proxy = serve(prices=str(file))
    usage = ask(http, proxy, "hello").json()["usage"]
    cost = usage["prompt_tokens"] * 1e-6 + usage["completion_tokens"] * 100e-6
    metrics = http.get(f"{proxy.url}/metrics").text
    [line] = [
        line
        for line in metrics.splitlines()
        if line.startswith("cachepipe_proxy_cost_dollars{") and '"spent"' in line
    ]
    assert float(line.rpartition(" ")[2]) == pytest.approx(cost)
    total = http.get(f"{proxy.url}/cachepipe/api/counters").json()["total"]
    assert total["billed"]["cost"] == pytest.approx(cost)


def test_what_a_budget_cannot_count_is_refused(serve, http, upstream):
    proxy = serve(budgets={"x": 5.0})
    before = upstream.stats.requests
    for answer in (
        ask(http, proxy, "hello", **{"x-cachepipe-mode": "bypass"}),
        http.post(f"{proxy.url}/ns/x/v1/audio/speech", json={"model": "ngram-1", "input": "hello"}),
        http.post(
            f"{proxy.url}/ns/x/v1/chat/completions", content=b"\x1f", headers={"content-encoding": "gzip"}
        ),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "not_counted")
    assert upstream.stats.requests == before
    assert http.get(f"{proxy.url}/ns/x/v1/models").status_code == 200
    assert http.post(f"{proxy.url}/ns/y/v1/audio/speech", json={}).status_code == 404
    assert http.post(f"{proxy.url}/ns/x/v1/files", content=b"x").status_code == 404
