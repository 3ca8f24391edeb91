"""The wire layer against a server that was written without it: streams are recorded as whole answers."""

from __future__ import annotations

import http.client
import json

import pytest

from cachepipe.testing import MockServer, MockSettings
from cachepipe.wire import CHAT, COMPLETIONS, MESSAGES, RESPONSES, BadAnswer, api_for, scope_of

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
PARAMETERS = {"type": "object", "properties": {"word": {"type": "string"}}}
FORCED = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}],
    "tool_choice": "required",
}
BASE = {"model": "m", "max_tokens": 12, "seed": 7}
CASES = {
    "chat": (CHAT, "/v1/chat/completions", {**BASE, "messages": HELLO}),
    "chat, three": (CHAT, "/v1/chat/completions", {**BASE, "messages": HELLO, "n": 3}),
    "chat, logprobs": (
        CHAT,
        "/v1/chat/completions",
        {**BASE, "messages": HELLO, "logprobs": True, "top_logprobs": 2},
    ),
    "chat, together's logprobs": (CHAT, "/v1/chat/completions", {**BASE, "messages": HELLO, "logprobs": 1}),
    "chat, tool": (CHAT, "/v1/chat/completions", {**BASE, "messages": HELLO, **FORCED}),
    "completions": (COMPLETIONS, "/v1/completions", {**BASE, "prompt": "Given a", "n": 2, "logprobs": 1}),
    "completions, list": (COMPLETIONS, "/v1/completions", {**BASE, "prompt": ["Given a", "Return"], "n": 2}),
    "responses": (RESPONSES, "/v1/responses", {"model": "m", "seed": 7, "input": "hello"}),
    "responses, cut": (
        RESPONSES,
        "/v1/responses",
        {"model": "m", "seed": 7, "input": "hi", "max_output_tokens": 2},
    ),
    "messages": (MESSAGES, "/v1/messages", {**BASE, "messages": HELLO}),
    "messages, tool": (
        MESSAGES,
        "/v1/messages",
        {
            **BASE,
            "messages": HELLO,
            "tools": [{"name": "f", "input_schema": PARAMETERS}],
            "tool_choice": {"type": "any"},
        },
    ),
}


@pytest.fixture(scope="module")
def server():
    with MockServer.in_thread(MockSettings(seed=1)) as running:
        yield running


def post(server, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse().read()
    finally:
        connection.close()


def record(api, stream, questions):
    recorder = api.recorder(questions)
    for start in range(0, len(stream), 97):
        recorder.feed(stream[start : start + 97])
    recorder.close()
    return recorder


def told(sample):
    """A sample without what differs from call to call: its identities and times."""
    if isinstance(sample, dict):
        return {k: told(v) for k, v in sample.items() if k not in ("id", "call_id", "created", "created_at")}
    return [told(item) for item in sample] if isinstance(sample, list) else sample


@pytest.mark.parametrize(("api", "path", "body"), CASES.values(), ids=CASES)
def test_c10_a_recorded_stream_gives_the_samples_of_the_unstreamed_answer(server, api, path, body):
    assert api_for("POST", server.url + path) is api
    assert scope_of(server.url + path) == server.url + path
    asks = api.split(body)
    questions = [ask.question for ask in asks]
    plain = api.samples(post(server, path, body), questions)
    streamed = record(api, post(server, path, api.inject_usage({**body, "stream": True})[0]), questions)
    assert streamed.started
    assert told(streamed.samples()) == told(plain)
    assert len(plain) == len(asks) * asks[0].n
    replayed = b"".join(api.stream(plain, api.split({**body, **_with_usage(api)})[0]))
    again = record(api, replayed, questions).samples()
    assert api.answer(again, asks[0]) == api.answer(plain, asks[0])


def _with_usage(api):
    return {"stream": True, "stream_options": {"include_usage": True}} if api in (CHAT, COMPLETIONS) else {}


@pytest.mark.parametrize("kind", ["truncate", "error_200", "cut"])
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
def test_c7_c8_a_stream_that_breaks_is_never_a_sample(server, kind, name):
    api, path, body = CASES[name]
    post(server, "/mock/settings", {"script": [{"kind": kind, "after": 2}]})
    try:
        stream = post(server, path, {**body, "stream": True})
    except http.client.IncompleteRead as error:
        stream = error.partial
    recorder = record(api, stream, ())
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


@pytest.mark.parametrize("kind", ["error_200", "malformed"])
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
def test_c8_what_is_no_answer_under_200_is_refused(server, kind, name):
    api, path, body = CASES[name]
    post(server, "/mock/settings", {"script": [{"kind": kind}]})
    with pytest.raises(BadAnswer):
        api.samples(post(server, path, body))


def test_a_short_answer_gives_the_samples_that_came(server):
    api, path, body = CASES["chat, three"]
    for keep in (2, 0):
        post(server, "/mock/settings", {"script": [{"kind": "short", "keep": keep}]})
        assert len(api.samples(post(server, path, body))) == keep
