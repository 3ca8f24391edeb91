"""Which draw a request is: namespaces, runs, request ids, and tries of the same request."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from cachepipe.testing import MockSettings


def index(answer):
    assert answer.status_code == 200, answer.text
    return answer.headers["x-cachepipe-indices"]


def test_a_new_run_label_replays_from_the_front(proxy, upstream, http, asked, helpers):
    def epochs(run):
        return [http.post(helpers.chat_url(proxy, "suite", run), json=asked).content for _ in range(3)]

    first = epochs("1")
    assert len(set(first)) == 3
    assert epochs("2") == first
    assert upstream.stats.samples_generated == 3
    # The label stays the same run, which counts on.
    assert index(http.post(helpers.chat_url(proxy, "suite", "1"), json=asked)) == "3"


def test_a_new_run_is_begun_by_a_call_for_all_or_for_one_namespace(proxy, http, asked, helpers):
    def ask(namespace):
        return index(http.post(helpers.chat_url(proxy, namespace), json=asked))

    assert [ask("a"), ask("a"), ask("b"), ask("b")] == ["0", "1", "0", "1"]
    begun = http.post(f"{proxy.url}/cachepipe/runs", json={"namespace": "a"})
    assert (begun.status_code, begun.json()["namespace"]) == (201, "a")
    assert [ask("a"), ask("b")] == ["0", "2"]
    assert http.post(f"{proxy.url}/cachepipe/runs").status_code == 201
    assert [ask("a"), ask("b")] == ["0", "0"]
    assert http.get(f"{proxy.url}/cachepipe/runs").status_code == 405
    assert http.post(f"{proxy.url}/cachepipe/runs", content=b"[]").status_code == 400
    assert http.post(f"{proxy.url}/cachepipe/runs", json={"namespace": 1}).status_code == 400


def test_a_restart_begins_a_new_run(serve, http, asked, helpers):
    first = serve()
    content = [http.post(helpers.chat_url(first, "a"), json=asked).content for _ in range(2)]
    second = serve()
    assert [http.post(helpers.chat_url(second, "a"), json=asked).content for _ in range(2)] == content


def test_namespaces_by_path_and_header(serve, http, asked, helpers):
    proxy = serve(namespace="usual")

    def ask(url, **headers):
        return index(http.post(url, json=asked, headers=headers))

    assert ask(helpers.chat_url(proxy)) == "0"
    assert ask(helpers.chat_url(proxy, "usual")) == "1"
    assert ask(helpers.chat_url(proxy, "n%C3%A4me")) == "0"
    assert ask(helpers.chat_url(proxy), **{"x-cachepipe-namespace": "n\u00e4me".encode()}) == "1"
    assert ask(helpers.chat_url(proxy, "a%40b%2Fc")) == "0"
    assert ask(helpers.chat_url(proxy), **{"x-cachepipe-namespace": "a@b/c"}) == "1"


def test_c1_replicates_by_path_and_header_are_independent_and_c2_a_rerun_of_one_alone_replays_it(
    serve, upstream, http, asked, helpers
):
    proxy = serve(replicate="usual")

    def ask(parts, run="1", **headers):
        url = helpers.chat_url(proxy).replace("/v1/", f"{parts.replace('@', f'@{run}')}/v1/")
        headers = {f"x-cachepipe-{name}": value for name, value in headers.items()}
        return index(http.post(url, json=asked, headers=headers))

    assert [ask("/ns/a@/rep/3"), ask("/ns/a@/rep/4"), ask("/ns/a@/rep/4")] == ["0", "1", "2"]
    assert [ask("/ns/a@/rep/4", "2"), ask("/rep/4/ns/a@", "2"), ask("/ns/a@/rep/3", "2")] == ["1", "2", "0"]
    assert ask("/ns/a@/rep/3", "3", replicate="4") == "1"
    assert ask("/ns/a@", "3", replicate="3") == "0"
    assert [ask("/rep/3"), ask("/ns/b/rep/4"), ask("/ns/b@", "4", replicate="3")] == ["0", "1", "0"]
    assert [ask(""), ask("", replicate="usual"), ask("/rep/usual")] == ["1", "2", "3"]
    assert upstream.stats.samples_generated == 4


def test_request_ids_make_draws_of_their_own(proxy, http, asked, helpers):
    url = helpers.chat_url(proxy, "a")

    def ask(request_id, run_url=url):
        return index(http.post(run_url, json=asked, headers={"x-cachepipe-request-id": request_id}))

    assert [ask("x"), ask("y"), ask("x")] == ["0", "1", "2"]
    again = helpers.chat_url(proxy, "a", "2")
    assert [ask("y", again), ask("x", again), ask("x", again)] == ["1", "0", "2"]


def test_an_idempotency_key_joins_the_draw_that_it_made(proxy, upstream, http, asked, helpers):
    url = helpers.chat_url(proxy, "a")

    def ask(key, url=url, **changes):
        return http.post(url, json={**asked, **changes}, headers={"idempotency-key": key})

    assert [index(ask("one")), index(ask("one")), index(ask("two")), index(ask("one"))] == [
        "0",
        "0",
        "1",
        "0",
    ]
    assert index(ask("one", n=2)) == "0, 2"
    assert index(ask("one", helpers.chat_url(proxy, "b"))) == "0"
    assert index(ask("one", helpers.chat_url(proxy, "a", "2"))) == "0"
    other = ask("one", temperature=0.5)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert index(http.post(url, json=asked)) == "3"
    assert upstream.stats.samples_generated == 4


def test_requests_with_one_idempotency_key_at_once_make_one_draw(proxy, upstream, asked, helpers):
    upstream.settings = MockSettings(paused=True)
    url = helpers.chat_url(proxy, "a")
    with ThreadPoolExecutor(3) as pool:

        def ask():
            headers = {"idempotency-key": "one"}
            return httpx2.post(url, json=asked, headers=headers, timeout=20)

        waiting = [pool.submit(ask) for _ in range(3)]
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        upstream.settings = MockSettings()
        assert {index(each.result()) for each in waiting} == {"0"}
    assert upstream.stats.samples_generated == 1


def test_a_failed_request_gives_its_number_back(proxy, upstream, http, asked, helpers):
    url = helpers.chat_url(proxy, "a")
    upstream.settings = MockSettings(script=("error", None, None))
    for headers in ({}, {"idempotency-key": "k"}):
        upstream.settings = MockSettings(script=("error", None))
        assert http.post(url, json=asked, headers=headers).status_code == 500
        assert index(http.post(url, json=asked, headers=headers)) == ("1" if headers else "0")


def test_a_client_that_times_out_and_tries_again_gets_the_answer_of_its_first_try(
    proxy, upstream, asked, helpers
):
    """Nothing paid is lost: the first call goes on, and the second try joins it."""
    upstream.settings = MockSettings(paused=True)
    retried = threading.Event()

    class Transport(httpx2.HTTPTransport):
        def handle_request(self, request):
            if request.headers["x-stainless-retry-count"] == "1":
                retried.set()
                upstream.settings = MockSettings()
                request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), 20)
            return super().handle_request(request)

    with openai.OpenAI(
        base_url=f"{proxy.url}/ns/a/v1",
        api_key="k",
        timeout=0.3,
        max_retries=2,
        http_client=httpx2.Client(transport=Transport()),
    ) as client:
        raw = client.chat.completions.with_raw_response.create(**asked)
        assert retried.is_set()
        assert raw.headers["x-cachepipe-indices"] == "0"
        assert upstream.stats.samples_generated == 1
        following = client.chat.completions.with_raw_response.create(**asked)
        assert following.headers["x-cachepipe-indices"] == "1"


def test_a_retry_that_overlaps_its_first_try_joins_it(proxy, upstream, asked, helpers):
    """The count of tries joins the oldest draw in flight, even before its client is known to have gone."""
    upstream.settings = MockSettings(paused=True)
    url = helpers.chat_url(proxy, "a")
    with ThreadPoolExecutor(2) as pool:

        def ask(count):
            headers = {"x-stainless-retry-count": count}
            return httpx2.post(url, json=asked, headers=headers, timeout=20)

        first = pool.submit(ask, "0")
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        second = pool.submit(ask, "1")
        proxy_holds = proxy.proxy.counters
        while proxy_holds.in_flight < 2:
            threading.Event().wait(0.001)
        upstream.settings = MockSettings()
        assert index(first.result()) == index(second.result()) == "0"
    assert upstream.stats.samples_generated == 1


def test_a_retry_after_an_error_takes_nobody_elses_sample(proxy, upstream, asked, helpers):
    """Of two equal requests one fails; its next try is a draw of its own, not the other's."""
    url = helpers.chat_url(proxy, "a")
    with ThreadPoolExecutor(2) as pool:

        def ask(count, key):
            headers = {"x-stainless-retry-count": count, "authorization": f"Bearer {key}"}
            return httpx2.post(url, json=asked, headers=headers, timeout=20)

        upstream.settings = MockSettings(script=("error",), paused=True)
        failing = pool.submit(ask, "0", "one")
        upstream.wait_until(lambda stats: stats.in_flight == 1)
        other = pool.submit(ask, "0", "two")
        upstream.wait_until(lambda stats: stats.in_flight == 2)
        upstream.settings = MockSettings()
        assert failing.result().status_code in (200, 500)
        other = other.result()
        again = ask("1", "one")
        assert other.status_code == again.status_code == 200
        assert index(other) != index(again)


@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_loses_nothing(proxy, upstream, http, asked, helpers, streamed):
    """A client goes away in mid-request; what was paid is stored, and the next of its kind gets it."""
    upstream.settings = MockSettings(paused=True)
    url = helpers.chat_url(proxy, "a")
    with pytest.raises(httpx2.TimeoutException):
        http.post(url, json=asked if not streamed else {**asked, "n": 2}, timeout=0.3)
    upstream.wait_until(lambda stats: stats.in_flight == 1)
    helpers.until(lambda: proxy.proxy.counters.background == 1)  # it has seen its client leave
    upstream.settings = MockSettings()
    upstream.wait_until(lambda stats: stats.in_flight == 0)
    answer = http.post(url, json={**asked, "stream": streamed})
    assert answer.headers["x-cachepipe-cached"] == "true"
    assert index(answer) == "0"
    assert upstream.stats.requests == 1
