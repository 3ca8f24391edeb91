"""What is no question passes through untouched, and nothing that is one hop's own goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import socket

import pytest

from cachepipe import outages
from cachepipe.proxy.log import RequestLog
from cachepipe.proxy.settings import Upstream

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    }
).encode()
ANSWERED = [("content-type", "text/plain")]


@pytest.fixture
def passing(behind):
    """The proxy in front of the recorder."""
    return behind[0]


@pytest.fixture
def recorder(behind):
    """The recorder behind it."""
    return behind[1]


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "PUT", "OPTIONS", "POST"])
def test_any_method_and_path_goes_on_as_it_came(passing, recorder, http, method):
    path = "/files/a%2Fb/c~d?purpose=x%20y&x=1&x=2&empty="
    recorder.answers.append((207, [*ANSWERED, ("x-one", "1"), ("set-cookie", "a=b")], [b"some ", b"text"]))
    answer = http.request(
        method, f"{passing.url}/ns/any/v1{path}", content=b"\x00\xff", headers={"x-mine": "2"}
    )
    sent = recorder.requests[-1]
    assert (sent.method, sent.target, sent.body) == (method, f"/v1{path}", b"\x00\xff")
    assert ("x-mine", "2") in sent.headers
    assert ("authorization", "Bearer k-client") in sent.headers
    assert (answer.status_code, answer.content) == (207, b"some text")
    assert (answer.headers["x-one"], answer.headers["set-cookie"]) == ("1", "a=b")
    why = "bypass" if method == "POST" else "method"
    assert answer.headers["cache-status"] == f"cachepipe; fwd={why}"
    assert not list(passing.proxy.store.keys())


def test_uploads_of_any_size_are_streamed(passing, recorder, http):
    piece = bytes(range(256)) * 4096
    digest = hashlib.sha256(piece * 24).hexdigest()
    recorder.answers.append((200, ANSWERED, [piece] * 24))
    answer = http.post(f"{passing.url}/v1/files", content=(piece for _ in range(24)))
    assert hashlib.sha256(recorder.requests[-1].body).hexdigest() == digest
    assert hashlib.sha256(answer.content).hexdigest() == digest


def test_encoded_bodies_are_not_touched(passing, recorder, http):
    """Nor is a question that is packed: it passes through, uncached."""
    recorder.answers.append((200, [("content-encoding", "gzip"), *ANSWERED], [b"not really"]))
    with http.stream("GET", f"{passing.url}/v1/files/x/content") as answer:
        assert b"".join(answer.iter_raw()) == b"not really"
    recorder.answers.append((200, ANSWERED, [b"ok"]))
    packed = http.post(
        f"{passing.url}/v1/chat/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"}
    )
    assert packed.headers["cache-status"] == "cachepipe; fwd=bypass"
    assert ("content-encoding", "gzip") in recorder.requests[-1].headers


def test_head_and_empty_answers(passing, recorder, http):
    recorder.answers.append((200, [*ANSWERED], []))
    assert http.head(f"{passing.url}/v1/models").content == b""
    recorder.answers.append((204, [], []))
    assert http.delete(f"{passing.url}/v1/files/1").status_code == 204


@pytest.mark.parametrize("status", [204, 304])
def test_what_has_no_body_may_tell_the_length_of_one(passing, recorder, http, status):
    recorder.answers.append((status, [("etag", "x"), ("content-length", "5")], []))
    assert http.get(f"{passing.url}/v1/files/x").status_code == status
    assert http.get(f"{passing.url}/v1/files/x").status_code == 200  # by the same connection


def test_hop_by_hop_and_our_own_headers_stay_here(passing, recorder, http, helpers, asked):
    told = {
        "connection": "keep-alive, x-private",
        "x-private": "1",
        "keep-alive": "timeout=5",
        "proxy-authorization": "Basic secret",
        "proxy-connection": "close",
        "te": "trailers",
        "x-cachepipe-namespace": "n",
        "x-cachepipe-request-id": "r",
        "expect": "",
        "x-kept": "yes",
    }
    own = {
        "connection": "x-theirs",
        "x-theirs": "1",
        "keep-alive": "1",
        "x-cachepipe-key": "fake",
        "cache-status": "x",
    }
    for url in (f"{passing.url}/v1/models", helpers.chat_url(passing)):
        pieces = [recorder_answer()]
        recorder.answers.append((200, [("content-type", "application/json"), *own.items()], pieces))
        answer = http.request("GET" if url.endswith("models") else "POST", url, headers=told, json=asked)
        names = {name for name, _ in recorder.requests[-1].headers}
        assert "x-kept" in names
        assert not names & {*told} - {"x-kept", "connection"}
        assert ("host", recorder.url.removeprefix("http://")) in recorder.requests[-1].headers
        assert answer.headers["cache-status"].startswith("cachepipe;")
        assert not {"x-theirs", "keep-alive"} & {*answer.headers}
        assert answer.headers.get("x-cachepipe-key") != "fake"


def recorder_answer():
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
            ],
        }
    ).encode()


def test_cookies_of_one_client_reach_no_other(passing, recorder, http, helpers, asked):
    """Not even through the connection to the upstream, nor with an answer that others get too."""
    recorder.answers.append((200, [("set-cookie", "session=1; Path=/"), *ANSWERED], [b"ok"]))
    http.get(f"{passing.url}/v1/models")
    http.cookies.clear()
    recorder.answers.append((200, [("set-cookie", "session=2; Path=/")], [recorder_answer()]))
    answer = http.post(helpers.chat_url(passing), json=asked)
    assert "cookie" not in dict(recorder.requests[-1].headers)
    assert "set-cookie" not in answer.headers


def test_redirects_are_handed_on_not_followed(passing, recorder, http):
    recorder.answers.append((302, [("location", "http://169.254.169.254/")], [b""]))
    assert http.get(f"{passing.url}/v1/models").status_code == 302
    assert len(recorder.requests) == 1


def test_requests_that_change_a_servers_state_pass_through(passing, recorder, http):
    for body in (
        {"model": "m", "input": "x", "background": True},
        {"model": "m", "input": "x", "conversation": "c"},
    ):
        answer = http.post(f"{passing.url}/v1/responses", json=body)
        assert answer.headers["cache-status"] == "cachepipe; fwd=bypass"
        assert json.loads(recorder.requests[-1].body) == body


def test_an_upstream_that_is_not_there(serve, http, helpers, asked):
    proxy = serve(upstreams=(Upstream.of("none", "http://127.0.0.1:9/v1"),))
    answer = http.post(helpers.chat_url(proxy), json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert (
        "'none' at http://127.0.0.1:9/v1/chat/completions could not be" in answer.json()["error"]["message"]
    )
    assert http.get(f"{proxy.url}/v1/models").status_code == 502
    assert "k-client" not in str(proxy.logged)


def test_an_upstream_that_is_not_there_is_told_once_in_the_log(serve, http, helpers, asked, monkeypatch):
    monkeypatch.setattr(outages, "_down", set())
    proxy = serve(upstreams=(Upstream.of("none", "http://127.0.0.1:9/v1"),))
    written = []
    logger, handler = logging.getLogger("cachepipe"), RequestLog("all", written.append).handler()
    logger.addHandler(handler)
    for _ in range(3):
        assert http.post(helpers.chat_url(proxy), json=asked).status_code == 502
    logger.removeHandler(handler)
    [event] = written
    assert event["level"] == "warning"
    assert event["message"].startswith(
        "the server at http://127.0.0.1:9/v1/chat/completions cannot be reached"
    )


def test_an_upstream_that_lacks_v1_is_told_of_in_the_log(serve, upstream, http, asked):
    proxy = serve(upstreams=(Upstream.of("bare", upstream.url),))
    assert http.post(f"{proxy.url}/chat/completions", json=asked).status_code == 404
    assert f"try {upstream.url}/v1" in proxy.logged[-1]["advice"]


def test_an_upstream_that_takes_too_long(serve, upstream, http, helpers, asked):
    from cachepipe.testing import MockSettings  # noqa: PLC0415 - only here

    upstream.settings = MockSettings(paused=True)
    proxy = serve(timeout=0.05)
    answer = http.post(helpers.chat_url(proxy), json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")


def test_an_upstream_that_breaks_off_in_mid_answer(passing, recorder, http, helpers, asked):
    recorder.answers.append((200, [("content-type", "application/json")], [recorder_answer()[:-9], None]))
    answer = http.post(helpers.chat_url(passing), json=asked)
    assert answer.status_code in (200, 502)
    again = http.post(helpers.chat_url(passing), json=asked)
    assert again.headers["x-cachepipe-cached"] == "false"
    assert again.headers["x-cachepipe-indices"] == "0"
    assert helpers.text_of(again) == ["hello"]


@pytest.mark.parametrize(
    "content",
    [b'{"error": {"message": "under 200"}}', b"<html>", b'{"choices": 1}', b"", b"[]", b'{"choices": []}'],
)
def test_what_is_no_answer_is_handed_on_and_not_cached(passing, recorder, http, helpers, asked, content):
    recorder.answers += [(200, [("content-type", "application/json")], [content])] * 3
    answer = http.post(helpers.chat_url(passing), json=asked)
    assert (answer.status_code, answer.content) == (200, content)
    recorder.answers.clear()
    again = http.post(helpers.chat_url(passing), json=asked)
    assert again.headers["x-cachepipe-indices"] == "0"
    assert again.headers["x-cachepipe-cached"] == "false"


def test_several_upstreams_by_name(serve, recorder, upstream, http):
    proxy = serve(
        upstreams=(
            Upstream.of("first", upstream.base_url),
            Upstream.of("second", recorder.base_url),
            Upstream.of("claude", recorder.url, kind="anthropic", api_key="sk-ant"),
        )
    )
    assert http.get(f"{proxy.url}/v1/models").json()["data"]
    assert not recorder.requests
    http.get(f"{proxy.url}/up/second/v1/models")
    http.get(f"{proxy.url}/ns/a@1/up/second/v1/models")
    http.get(f"{proxy.url}/up/second/ns/a/v1/models")
    assert [sent.target for sent in recorder.requests] == ["/v1/models"] * 3
    http.post(f"{proxy.url}/ns/a/v1/messages/count_tokens", json={})
    assert recorder.requests[-1].target == "/v1/messages/count_tokens"
    assert ("x-api-key", "sk-ant") in recorder.requests[-1].headers
    assert "authorization" not in dict(recorder.requests[-1].headers)
    assert http.get(f"{proxy.url}/up/third/v1/models").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 429])
def test_an_answer_that_is_packed_as_nobody_asked_stays_packed(
    passing, recorder, http, helpers, asked, stream, status
):
    """Nothing here can read it; its client perhaps can, if it is told how."""
    pairs = [("content-type", "application/json"), ("content-encoding", "made-up"), ("retry-after", "7")]
    recorder.answers.append((status, pairs, [b"packed"]))
    with http.stream("POST", helpers.chat_url(passing), json={**asked, "stream": stream}) as answer:
        assert (answer.status_code, b"".join(answer.iter_raw())) == (status, b"packed")
        assert (answer.headers["content-encoding"], answer.headers["retry-after"]) == ("made-up", "7")
    assert http.post(helpers.chat_url(passing), json=asked).headers["cache-status"].endswith("stored")


def test_headers_that_no_server_may_send_are_left_out(passing, recorder, http, helpers, asked):
    """And break no answer, neither the first nor those from the cache."""
    pairs = [("content-type", "application/json"), ("x-odd", "a\x01b"), ("x-request-id", "r\x01")]
    recorder.answers.append((200, pairs, [ANSWER]))
    first = http.post(helpers.chat_url(passing, "a"), json=asked)
    again = http.post(helpers.chat_url(passing, "b"), json=asked)
    assert first.status_code == again.status_code == 200
    assert again.headers["cache-status"] == "cachepipe; hit"
    for answer in (first, again):
        assert not {"x-odd", "x-request-id"} & {*answer.headers}


@pytest.mark.parametrize("status", [600, 999])
def test_what_is_no_status_is_an_upstreams_fault(passing, recorder, http, helpers, asked, status):
    for url, method in ((helpers.chat_url(passing), "POST"), (f"{passing.url}/v1/models", "GET")):
        recorder.answers.append((status, ANSWERED, [b"x"]))
        assert http.request(method, url, json=asked).status_code == 502


def test_a_key_that_is_empty_is_the_providers_to_refuse(passing, recorder, raw, asked):
    recorder.answers.append((401, ANSWERED, [b"no key"]))
    body = json.dumps(asked).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += b"Authorization: Bearer \r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = raw(passing, head + body, end=False)
    assert answer.startswith(b"HTTP/1.1 401")
    assert answer.endswith(b"no key")
    assert dict(recorder.requests[-1].headers)["authorization"] == "Bearer"


def test_an_upstreams_own_key_takes_the_place_of_what_clients_show(serve, recorder, http, helpers, asked):
    upstream = Upstream.of("a", recorder.base_url, api_key="sk-server", key_header="X-Goog-Api-Key")
    shown = {"x-goog-api-key": "sk-client", "api-key": "sk-client"}
    assert http.post(helpers.chat_url(serve(upstreams=(upstream,))), json=asked, headers=shown).is_success
    sent = recorder.requests[-1].headers
    assert [value for name, value in sent if "key" in name or name == "authorization"] == ["sk-server"]


def test_what_is_not_sent_on_makes_no_other_question(passing, recorder, http, helpers, asked):
    one_hop = {"openai-beta": "x", "connection": "openai-beta"}
    http.post(helpers.chat_url(passing, "a"), json=asked, headers=one_hop)
    assert "openai-beta" not in dict(recorder.requests[-1].headers)
    again = http.post(helpers.chat_url(passing, "b"), json=asked)
    assert again.headers["cache-status"] == "cachepipe; hit"


def test_an_answer_that_cannot_be_stored_is_handed_on(passing, recorder, http, helpers, asked):
    deep = ANSWER[:-1] + b',"n":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    recorder.answers.append((200, [("content-type", "application/json")], [deep]))
    answer = http.post(helpers.chat_url(passing), json=asked)
    assert (answer.status_code, answer.content) == (200, deep)
    assert answer.headers["cache-status"] == "cachepipe; fwd=miss"


@pytest.mark.parametrize("body", [b"", b"x" * 1000])
def test_a_call_whose_client_has_gone_is_given_up(serve, body):
    """Where nothing would be kept of it: what a provider has not answered yet, it need not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = serve(upstreams=(Upstream.of("a", f"http://127.0.0.1:{listener.getsockname()[1]}/v1"),))
        host, port = proxy.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            call, _ = listener.accept()
            call.settimeout(20)
            got = b""
            while not got.endswith(b"\r\n\r\n" + body):
                got += call.recv(65536)
        assert call.recv(1) == b""
        call.close()
