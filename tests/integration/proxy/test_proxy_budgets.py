"""A proxy with a budget for each namespace: what does not fit is refused, and hits are answered."""

from __future__ import annotations

import json


def ask(http, proxy, namespace, text):
    body = {"model": "ngram-1", "messages": [{"role": "user", "content": text}]}
    return http.post(f"{proxy.url}/ns/{namespace}/v1/chat/completions", json=body)


def test_a_call_that_does_not_fit_is_refused_and_hits_are_answered(serve, http, upstream, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"ngram-1": {"prompt": 1, "completion": 100, "max_tokens": 50}}))
    proxy = serve(max_cost=0.006, budgets={"none": 0.0}, prices=str(prices))
    refused = ask(http, proxy, "none", "hi")
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "budget_exceeded")
    assert "the budget of $0 of the namespace 'none'" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert upstream.stats.requests == 0
    answers = [ask(http, proxy, "x", f"question {number}") for number in range(40)]
    paid = [answer for answer in answers if answer.status_code == 200]
    assert 0 < len(paid) < 40
    assert upstream.stats.requests == len(paid)
    assert {answer.status_code for answer in answers} == {200, 402}
    again = ask(http, proxy, "x@again", "question 0")
    assert (again.status_code, again.content) == (200, paid[0].content)


def test_an_unknown_price_is_refused(serve, http, upstream):
    refused = ask(http, serve(max_cost=5.0), "x", "hi")
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "unknown_cost")
    assert upstream.stats.requests == 0
