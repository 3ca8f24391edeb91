"""What can be looked at: health, metrics, counters and the cache, as JSON; and the commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from urllib.parse import quote, urlsplit

import forked
import httpx2
import pytest

from cachepipe.proxy.settings import Upstream


def fetch(proxy, path):
    answer = httpx2.get(f"{proxy.url}{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_counters_by_namespace(proxy, upstream, http, asked, helpers):
    paid = http.post(helpers.chat_url(proxy, "a"), json={**asked, "n": 2}).json()["usage"]
    http.post(helpers.chat_url(proxy, "b"), json={**asked, "n": 3})
    http.get(f"{proxy.url}/ns/b/v1/models")
    counters = fetch(proxy, "/cachepipe/api/counters")
    each = {counts["namespace"]: counts for counts in counters["namespaces"]}
    assert (each["a"]["hits"], each["a"]["misses"], each["b"]["hits"], each["b"]["misses"]) == (0, 2, 2, 1)
    assert each["a"]["requests"] == {"miss": 1}
    assert each["b"]["requests"] == {"partial": 1, "passed": 1}
    assert each["a"]["billed"]["total_tokens"] == each["a"]["spent"]["total_tokens"] == paid["total_tokens"]
    assert each["a"]["saved"]["total_tokens"] == 0  # as it was asked, in one call
    assert each["b"]["saved"]["samples"] == 2
    assert each["b"]["saved"]["total_tokens"] == paid["completion_tokens"]
    assert counters["total"]["spent"] == counters["total"]["billed"]
    assert counters["total"]["misses"] == upstream.stats.samples_generated == 3
    assert counters["upstreams"] == [{"name": "mock", "calls": 3, "in_flight": 0}]
    text = httpx2.get(f"{proxy.url}/metrics").text
    assert 'cachepipe_proxy_samples_total{from="cache",namespace="b"} 2.0' in text
    assert 'cachepipe_proxy_requests_total{namespace="b",outcome="partial"} 1.0' in text
    assert 'cachepipe_proxy_calls_total{upstream="mock"} 3.0' in text


def metrics(proxy):
    lines = [line.rpartition(" ") for line in httpx2.get(f"{proxy.url}/metrics").text.splitlines()]
    return {name: float(value) for name, _, value in lines if name and name[0] != "#"}


@pytest.mark.parametrize("stream", [False, True])
def test_c6_spent_billed_as_asked_and_saved(proxy, upstream, http, asked, helpers, stream):
    for namespace, n in (("a", 4), ("b", 4), ("b", 2)):
        http.post(helpers.chat_url(proxy, namespace), json={**asked, "n": n, "stream": stream}).read()
    counters = fetch(proxy, "/cachepipe/api/counters")
    a, b = ({counts["namespace"]: counts for counts in counters["namespaces"]}[name] for name in "ab")
    log = upstream.stats
    assert counters["total"]["spent"]["total_tokens"] == log.tokens_in + log.tokens_out
    assert a["saved"]["total_tokens"] == 0
    assert a["spent"]["total_tokens"] == a["as_asked"]["total_tokens"] > 0
    assert b["saved"]["total_tokens"] == a["as_asked"]["total_tokens"]
    assert (b["saved"]["samples"], b["billed"]["samples"]) == (4, 2)
    told = metrics(proxy)
    for word in ("spent", "billed", "as_asked", "saved"):
        for kind in ("prompt", "completion"):
            name = f'cachepipe_proxy_tokens_total{{namespace="b",of="{kind}",sum="{word}"}}'
            assert told[name] == b[word][f"{kind}_tokens"]


def test_c6_what_no_request_got_is_spent(serve, recorder, http, asked, helpers):
    """A call that has brought too little, and nothing more came for a request that then failed."""
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    short = {"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    pairs = [("content-type", "application/json")]
    recorder.answers += [(200, pairs, [json.dumps(short).encode()]), (500, pairs, [b'{"error": {}}'])]
    assert http.post(helpers.chat_url(proxy, "a"), json={**asked, "n": 2}).status_code == 500
    total = fetch(proxy, "/cachepipe/api/counters")["total"]
    assert (total["spent"]["total_tokens"], total["spent"]["samples"]) == (10, 1)
    assert (total["billed"]["samples"], total["as_asked"]["samples"], total["misses"]) == (0, 0, 0)


def test_names_cannot_break_the_metrics(proxy, http, asked, helpers):
    for name in (b'a"b\\c', b"\xff\xfe"):
        http.post(helpers.chat_url(proxy), json=asked, headers={"x-cachepipe-namespace": name})
    text = httpx2.get(f"{proxy.url}/metrics").text
    assert '{from="cache",namespace="a\\"b\\\\c"}' in text
    for name in ("(none)", '"(none)"', "(others)", None, "x" * 9000, "x" * 9001):
        http.post(helpers.chat_url(proxy, name and quote(name)), json=asked)
    series = [line.rpartition(" ")[0] for line in httpx2.get(f"{proxy.url}/metrics").text.splitlines()]
    assert len({*series}) == len(series)
    assert max(map(len, series)) < 1000


def test_what_nests_deep_or_is_no_text_is_shown(serve, recorder, http, asked, helpers):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    asked = {**asked, "tools": json.loads('{"a":' * 300 + "1" + "}" * 300)}
    body = json.dumps(asked).replace("hello", "\\ud800")
    key = http.post(helpers.chat_url(proxy), content=body).headers["x-cachepipe-key"]
    shown = fetch(proxy, f"/cachepipe/api/keys/{key}")
    assert shown["document"]["body"]["tools"] == asked["tools"]
    begun = http.post(f"{proxy.url}/cachepipe/runs", content=b'{"namespace": "\\ud800"}')
    assert (begun.status_code, begun.json()["namespace"]) == (201, "\ud800")


def test_the_cache_can_be_browsed_and_searched(proxy, http, helpers):
    def ask(text, namespace, n=1):
        body = {"model": "m", "messages": [{"role": "user", "content": text}], "n": n}
        return http.post(helpers.chat_url(proxy, namespace), json=body).headers["x-cachepipe-key"]

    apples, pears = ask("How many Apples?", "a", 3), ask("how many pears <script>?", "b")
    ask("How many Apples?", "b")
    whole = fetch(proxy, "/cachepipe/api/keys")
    assert [item["key"] for item in whole["items"]] == [pears, apples]
    assert [item["prompt"] for item in whole["items"]] == ["how many pears <script>?", "How many Apples?"]
    assert whole["next"] is None
    first = fetch(proxy, "/cachepipe/api/keys?limit=1")
    assert ([item["key"] for item in first["items"]], first["next"]) == ([pears], pears)
    plums = ask("plums", "b")  # asked meanwhile: it moves nothing
    rest = fetch(proxy, f"/cachepipe/api/keys?limit=1&after={pears}")
    assert ([item["key"] for item in rest["items"]], rest["next"]) == ([apples], None)
    assert fetch(proxy, "/cachepipe/api/keys?limit=1")["items"][0]["key"] == plums
    for query in ("search=apples", "namespace=a", f"prefix={apples[:12]}"):
        assert [item["key"] for item in fetch(proxy, f"/cachepipe/api/keys?{query}")["items"]] == [apples]
    key = fetch(proxy, f"/cachepipe/api/keys/{apples}")
    assert key["document"]["body"]["messages"][0]["content"] == "How many Apples?"
    assert (key["samples"], key["namespaces"]) == (3, 2)
    samples = fetch(proxy, f"/cachepipe/api/keys/{apples}/samples?limit=2")
    assert [sample["index"] for sample in samples["items"]] == [0, 1]
    assert samples["next"] == 2
    rest = fetch(proxy, f"/cachepipe/api/keys/{apples}/samples?from=2")
    assert [sample["index"] for sample in rest["items"]] == [2]
    assert "cachepipe" not in rest["items"][0]["value"]
    summary = samples["items"][0]["summary"]
    assert summary["text"] == samples["items"][0]["value"]["choices"][0]["message"]["content"]
    draws = fetch(proxy, f"/cachepipe/api/keys/{apples}/draws")["items"]
    assert [(draw["namespace"], draw["indices"], draw["generated"]) for draw in draws] == [
        ("a", [0, 1, 2], 3),
        ("b", [0], 0),
    ]
    assert [item["namespace"] for item in fetch(proxy, "/cachepipe/api/namespaces")["items"]] == ["a", "b"]
    status = fetch(proxy, "/cachepipe/api/status")
    assert status["upstreams"][0]["name"] == "mock"
    assert status["mode"] == "read-write"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/cachepipe/api/keys?limit=x", 400),
        ("/cachepipe/api/keys?nonsense=1", 400),
        ("/cachepipe/api/keys?search=%ff", 400),
        ("/cachepipe/api/keys?after=k2-none", 404),
        ("/cachepipe/api/keys/none", 404),
        ("/cachepipe/api/keys/none/samples", 404),
        ("/cachepipe/api/keys/none/draws", 404),
        ("/cachepipe/api/nothing", 404),
        ("/cachepipe/nothing", 404),
    ],
)
def test_what_is_not_there_is_an_error_in_words(recorded, path, status):
    proxy, _ = recorded
    answer = httpx2.get(f"{proxy.url}{path}")
    assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True)
    assert httpx2.delete(f"{proxy.url}/cachepipe/api/keys").status_code == 405


def test_the_log_says_what_became_of_each_request(proxy, http, asked, helpers):
    http.post(helpers.chat_url(proxy, "a/rep/3"), json=asked)
    http.get(f"{proxy.url}/nothing")
    miss, refused = proxy.logged
    assert miss["replicate"] == "3"
    assert (miss["outcome"], miss["status"], miss["namespace"], miss["method"]) == ("miss", 200, "a", "POST")
    assert (refused["outcome"], refused["status"], refused["error"]) == ("refused", 404, "bad_path")


@pytest.fixture
def command(tmp_path):
    """Run `cachepipe`; what is left running is ended."""
    started = []

    def run(*arguments, **environment):
        made = forked.Popen(
            [sys.executable, "-m", "cachepipe", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
        )
        started.append(made)
        return made

    yield run
    for made in started:
        made.kill()
        made.communicate()


def test_a_second_interrupt_waits_for_nothing(command, asked):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        upstream = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        serving = command("serve", "--upstream", upstream, "--cache", "c", "--port", "0", "--json")
        url = urlsplit(json.loads(serving.stdout.readline())["url"])
        body = json.dumps(asked)
        with socket.create_connection((url.hostname, url.port)) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            call, _ = listener.accept()
            with call:
                serving.send_signal(signal.SIGINT)
                refused = 0
                while not refused:  # it still listens
                    with socket.socket() as another:
                        refused = another.connect_ex((url.hostname, url.port))
                serving.send_signal(signal.SIGINT)
                assert serving.wait(timeout=20) == 0


def test_the_commands_serve_and_new_run(command, upstream, asked, tmp_path):
    """From the terminal: serve with a key of one's own, begin a run, stop, and replay without an upstream."""
    serving = command(
        "serve", "--upstream", upstream.base_url, "--cache", "c", "--port", "0", "--json",
        "--api-key-env", "KEY", "--token-env", "TOKEN", KEY="sk-server", TOKEN="t0ken",
    )  # fmt: skip
    told = json.loads(serving.stdout.readline())
    headers = {"authorization": "Bearer t0ken"}

    def ask(base_url):
        return httpx2.post(f"{base_url}/chat/completions", json=asked, headers=headers, timeout=20)

    first, second = ask(told["base_url"]), ask(told["base_url"])
    assert second.headers["x-cachepipe-indices"] == "1"
    begun = command("new-run", "--url", told["url"], "--token-env", "TOKEN", TOKEN="t0ken")
    assert begun.communicate()[0] == "A new run of all namespaces has begun.\n"
    assert ask(told["base_url"]).content == first.content
    wrong = command(
        "new-run", "--url", told["url"], "--namespace", "mistyped", "--token-env", "TOKEN", TOKEN="t0ken"
    )
    assert "has seen the namespace mistyped. Check the name" in wrong.communicate()[1]
    refused = command("new-run", "--url", told["url"])
    assert "x-cachepipe-token" in refused.communicate()[1]
    assert refused.returncode == 2
    serving.send_signal(signal.SIGTERM)
    log = serving.communicate(timeout=20)[1]
    assert serving.returncode == 0
    assert [json.loads(line)["outcome"] for line in log.splitlines()] == ["miss", "miss", "refused"]
    assert "sk-server" not in log
    assert "t0ken" not in log

    upstream_calls = upstream.stats.requests
    replaying = command("serve", "--replay", "--cache", "c", "--port", "0", "--json")
    told = json.loads(replaying.stdout.readline())
    assert [ask(told["base_url"]).content for _ in range(2)] == [first.content, second.content]
    assert ask(told["base_url"]).status_code == 404
    assert upstream.stats.requests == upstream_calls
    replaying.send_signal(signal.SIGINT)
    replaying.communicate(timeout=20)
    assert replaying.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "needs an upstream"),
        (["serve", "--upstream", "nonsense"], "expected a base URL"),
        (["serve", "--upstream", "https://x/v1", "--host", "0.0.0.0"], "--token-env"),
        (["serve", "--upstream", "https://x/v1", "--api-key-env", "NOT_SET"], "NOT_SET is not set"),
        (["serve", "--config", "none.toml"], "cannot be read"),
        (["serve", "--replay", "--cache", "none"], "there is no cache"),
        (
            ["serve", "--upstream", "https://x/v1", "--port", "0", "--url-file", "none/url"],
            "the URL cannot be written to none/url",
        ),
        (["new-run", "--url", "http://127.0.0.1:9"], "no proxy answers"),
    ],
)
def test_what_cannot_be_served_is_said_in_words(arguments, message):
    from click.testing import CliRunner  # noqa: PLC0415 - only here

    from cachepipe.cli.group import cli  # noqa: PLC0415 - likewise

    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_proxy_that_cannot_listen_leaves_the_url_of_another_one(tmp_path):
    from click.testing import CliRunner  # noqa: PLC0415 - only here

    from cachepipe.cli.group import cli  # noqa: PLC0415 - likewise

    file = tmp_path / "url"
    file.write_text("http://other:8080/v1\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = ["--upstream", "https://x/v1", "--port", str(taken.getsockname()[1])]
        result = CliRunner().invoke(cli, ["serve", *arguments, "--url-file", str(file)])
    assert "cannot listen" in result.output
    assert file.read_text() == "http://other:8080/v1\n"


def test_several_upstreams_may_share_a_config(serve, upstream):
    proxy = serve(upstreams=(Upstream.of("a", upstream.base_url), Upstream.of("b", upstream.url)))
    assert httpx2.get(f"{proxy.url}/up/b/v1/models").json()["data"]
