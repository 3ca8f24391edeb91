"""The proxy among strangers: who is let in, where a request may lead, and what is kept of it."""

from __future__ import annotations

import base64
import json

import httpx2
import pytest

from cachepipe.proxy.server import running
from cachepipe.proxy.settings import BadSettings, ProxySettings, Upstream


def status(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n"
TARGETS = [
    b"http://169.254.169.254/v1/models",
    b"http://127.0.0.1/v1/models",
    b"//evil.example/v1/models",
    b"*",
    b"evil.example:443",
    b"/v1/../admin",
    b"/v1/./models",
    b"/v1/%2e%2e/admin",
    b"/v1/%2E%2e%2fadmin",
    b"/v1/..%2fadmin",
    b"/v1/..%5cadmin",
    b"/v1/%252e%252e/admin",
    b"/v1/%25252e%25252e/admin",
    b"/v1/a\\b",
    b"/v1/a%00b",
    b"/v1/a%0d%0ab",
    b"/v1/a%zz",
    b"/admin",
    b"/v1x/models",
    b"/up/other/v1/models",
    b"/up/http:%2f%2fevil.example/v1/models",
    b"/ns//v1/models",
    b"/ns/a/ns/b/v1/models",
    b"/v1/\xc3\xa4",
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_leads_anywhere_but_to_the_upstreams(recorded, raw, target):
    proxy, recorder = recorded
    request = b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target
    answer = raw(proxy, request, end=False)
    assert status(answer) in (400, 403, 404), answer
    assert not recorder.requests


@pytest.mark.parametrize(
    "request_",
    [
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
        b"TRACE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        GET + b"Host: evil.example\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        GET + b"Origin: https://evil.example\r\nConnection: close\r\n\r\n",
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        GET + b"X: a\x00b\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n Host: localhost\r\n\r\n",
        b"GET /v1/models\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_two_servers_may_read_differently_is_refused(recorded, raw, request_):
    proxy, recorder = recorded
    recorder.requests.clear()
    answer = raw(proxy, request_, end=False)
    assert not answer or 400 <= status(answer) < 600, answer
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert not recorder.requests
    assert httpx2.get(f"{proxy.url}/healthz").status_code == 200


def test_heads_and_bodies_have_limits(serve, recorder, raw):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),), max_body=1000)
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    assert status(raw(proxy, head + b"X: " + b"a" * 100_000)) == 431
    assert status(raw(proxy, head + b"X: y\r\n" * 30_000)) == 431
    url = f"{proxy.url}/v1/chat/completions"
    assert httpx2.post(url, content=b"x" * 1001).status_code == 413
    assert httpx2.post(url, content=(b"x" * 100 for _ in range(11))).status_code == 413
    assert not recorder.requests
    httpx2.post(f"{proxy.url}/v1/files", content=b"x" * 1001)
    assert len(recorder.requests) == 1


def test_connections_have_a_limit(serve, upstream):
    proxy = serve(max_connections=1)
    with httpx2.Client() as one, httpx2.Client() as two:
        assert one.get(f"{proxy.url}/healthz").status_code == 200
        assert two.get(f"{proxy.url}/healthz").status_code == 503


def test_an_address_that_others_reach_demands_a_token():
    upstreams = (Upstream.of("a", "https://a.example/v1"),)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(BadSettings, match="--token-env"):
            ProxySettings(upstreams=upstreams, host=host).checked()
        ProxySettings(upstreams=upstreams, host=host, token="t").checked()
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        ProxySettings(upstreams=upstreams, host=host).checked()


def test_a_token_is_shown_as_the_key_or_beside_it_and_goes_no_further(serve, recorder, asked, helpers):
    proxy = serve(
        upstreams=(
            Upstream.of("keyed", recorder.base_url, api_key="sk-server"),
            Upstream.of("bare", recorder.base_url),
        ),
        token="s3cret",
        host="127.0.0.1",
    )
    url, bare = helpers.chat_url(proxy), f"{proxy.url}/up/bare/v1/chat/completions"

    def ask(url, **headers):
        return httpx2.post(
            url, json=asked, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "s3cre"},
        {"x_cachepipe_token": "s3cret2"},
        {"authorization": "Basic !!"},
    ):
        refused = ask(url, **headers)
        assert refused.status_code == 401
        assert "s3cret" not in refused.text
    assert httpx2.get(f"{proxy.url}/cachepipe/api/counters").status_code == 401
    assert httpx2.get(f"{proxy.url}/metrics").status_code == 401
    assert httpx2.get(f"{proxy.url}/healthz").status_code == 200
    basic = base64.b64encode(b"me:s3cret").decode()
    assert not recorder.requests
    for headers in (
        {"authorization": "Bearer s3cret"},
        {"x_api_key": "s3cret"},
        {"authorization": f"Basic {basic}"},
        {"x_cachepipe_token": "s3cret", "authorization": "Bearer sk-client"},
    ):
        assert ask(url, **headers).status_code == 200
        sent = recorder.requests[-1].headers
        assert [value for name, value in sent if name == "authorization"] == ["Bearer sk-server"]
        assert "s3cret" not in str(sent)
    assert ask(bare, authorization="Bearer s3cret").status_code == 200
    assert "authorization" not in dict(recorder.requests[-1].headers)
    ask(bare, x_cachepipe_token="s3cret", authorization="Bearer sk-client")
    assert dict(recorder.requests[-1].headers)["authorization"] == "Bearer sk-client"
    for headers in (  # shown more than once
        {"x_cachepipe_token": "s3cret", "authorization": "Bearer s3cret"},
        {"x_api_key": "s3cret", "authorization": "Bearer s3cret", "api_key": "sk-client"},
    ):
        assert ask(bare, **headers).status_code == 200
        assert "s3cret" not in str(recorder.requests[-1].headers)


@pytest.mark.parametrize("path", ["/ns/x/healthz", "/ns/x/", "/up/a/readyz", "/up/a/cachepipe/page/page.js"])
def test_an_upstreams_paths_are_not_free_as_the_proxys_own_are(serve, recorder, path):
    proxy = serve(upstreams=(Upstream.of("a", recorder.url, api_key="sk-server"),), token="s3cret")
    for method in ("GET", "POST"):
        assert httpx2.request(method, f"{proxy.url}{path}").status_code == 401
    assert not recorder.requests
    assert httpx2.get(f"{proxy.url}/up/b{path}").status_code == 401
    assert httpx2.get(f"{proxy.url}{path}", headers={"x-api-key": "s3cret"}).status_code == 200
    assert len(recorder.requests) == 1


def test_pages_of_other_sites_may_not_use_it(proxy, http, asked, helpers):
    """Not by a name that their own server made up for this address either."""
    url = helpers.chat_url(proxy)
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
        assert http.post(url, json=asked, headers=headers).status_code == 403
    for headers in ({"host": "localhost:1"}, {"origin": "http://localhost:3000"}, {"host": "[::1]"}):
        assert http.post(url, json=asked, headers=headers).status_code == 200
    image = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}  # browsers name no origin then
    models = f"{proxy.url}/v1/models"
    assert http.get(models, headers=image).status_code == 403
    assert http.get(models, headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert http.get(f"{proxy.url}/", headers=image | {"sec-fetch-mode": "navigate"}).status_code == 200


def test_pages_of_other_sites_cannot_use_a_password_that_a_browser_keeps(serve):
    proxy = serve(token="s3cret")
    url = f"{proxy.url}/cachepipe/runs"
    basic = {"authorization": f"Basic {base64.b64encode(b'me:s3cret').decode()}"}
    for site in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert httpx2.post(url, headers=basic | site).status_code == 403
    for site in ({}, {"origin": proxy.url}, {"host": "a.example", "origin": "https://a.example"}):
        assert httpx2.post(url, headers=basic | site).status_code == 201
    bearer = {"authorization": "Bearer s3cret", "origin": "app://chat"}
    assert httpx2.post(url, headers=bearer).status_code == 201


PAGE = b"<script>fetch('/cachepipe/runs', {method: 'POST'})</script>"
THEIRS = [
    ("content-type", "text/html"),
    ("content-security-policy", "script-src 'unsafe-inline'"),
    ("x-content-type-options", "sniff"),
    ("x-accel-redirect", "/etc/passwd"),
    ("x-accel-buffering", "yes"),
]


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("path", ["/v1/files/1", "/v1/chat/completions"])
def test_what_an_upstream_answers_is_no_page_of_the_proxys(serve, recorder, asked, status, path):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    for stream in (False, True):
        recorder.answers += [(status, THEIRS, [PAGE])]
        answer = httpx2.post(f"{proxy.url}{path}", json={**asked, "stream": stream})
        assert (answer.status_code, answer.content) == (status, PAGE)
        _inert(answer)
        assert not {"x-accel-redirect", "x-accel-buffering"} & {*answer.headers}


def _inert(answer):
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy.split(";")[0] == "sandbox"


def test_what_the_cache_answers_is_no_page_of_the_proxys(serve, recorder, asked, helpers):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    url, models = helpers.chat_url(proxy), f"{proxy.url}/v1/models"
    with httpx2.Client() as client:
        for run in range(4):  # a miss, a hit, one of a known head, and one that is answered at once
            answer = client.post(helpers.chat_url(proxy, "a", run), json=asked)
            _inert(answer)
        for namespace in ("b", "c", "d"):
            again = {"x-cachepipe-namespace": namespace}
            _inert(client.post(url, json={**asked, "stream": True}, headers=again))
            _inert(client.post(url, json=asked, headers=again))
    httpx2.post(f"{proxy.url}/cachepipe/runs")
    with httpx2.Client() as client:
        for _ in range(3):
            _inert(client.post(url, json=asked))
            httpx2.post(f"{proxy.url}/cachepipe/runs")
    for refused in (httpx2.post(url, headers={"host": "evil.example"}), httpx2.get(models)):
        _inert(refused)
    for own in ("/healthz", "/metrics", "/cachepipe/api/keys", "/nothing"):
        _inert(httpx2.get(f"{proxy.url}{own}"))


def test_further_names_may_be_allowed(serve):
    proxy = serve(hosts=("My.Host", "other.example:8080", "fe80::2"))
    for name in ("my.host", "MY.HOST:9", "other.example", "other.example:1", "[fe80::2]:80"):
        assert httpx2.get(f"{proxy.url}/readyz", headers={"host": name}).status_code == 200
    for name in ("host", "example", "", "fe80"):
        assert httpx2.get(f"{proxy.url}/readyz", headers={"host": name}).status_code == 403


def test_no_key_is_kept_or_logged(serve, recorder, tmp_path, asked, helpers):
    secret = "sk-very-secret"
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    headers = {
        "authorization": f"Bearer {secret}",
        "x-api-key": secret,
        "cookie": secret,
        "x-other": secret,
        "idempotency-key": "i-1",
    }
    recorder.answers.append((401, [("x-echo", secret)], [secret.encode()]))
    url = f"{helpers.chat_url(proxy, 'a')}?api-key={secret}"
    assert httpx2.post(url, json=asked, headers=headers).status_code == 401
    assert httpx2.post(url, json=asked, headers=headers).status_code == 200
    httpx2.get(f"{proxy.url}/v1/models?key={secret}", headers=headers)
    httpx2.get(f"{proxy.url}/{secret}", headers=headers)
    shown = [
        httpx2.get(f"{proxy.url}{path}").text
        for path in ("/metrics", "/cachepipe/api/counters", "/cachepipe")
    ]
    proxy.should_exit = True
    assert proxy.logged
    for text in (*shown, json.dumps(proxy.logged)):
        assert secret not in text
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()


def test_a_port_that_is_taken_is_an_error_in_words(proxy, tmp_path):
    port = int(proxy.url.rsplit(":", 1)[1])
    settings = ProxySettings(
        upstreams=proxy.proxy.settings.upstreams, port=port, cache=str(tmp_path / "other")
    )
    with pytest.raises(BadSettings, match="cannot listen on"), running(settings):
        pass
