"""Answers of the proxy: the same keys and samples as every other surface, streamed or not (C10)."""

from __future__ import annotations

import asyncio
import importlib
import json

import anthropic
import openai
import pytest

from cachepipe.clients import OpenAI
from cachepipe.providers.info import info
from cachepipe.proxy.settings import Upstream
from cachepipe.testing import MockSettings as Settings


def words(stream):
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_a_miss_is_handed_on_as_it_came_and_a_hit_is_the_same(proxy, upstream, http, asked, helpers):
    first = http.post(helpers.chat_url(proxy, "a"), json=asked)
    assert first.status_code == 200
    assert first.headers["cache-status"] == "cachepipe; fwd=miss; stored"
    assert first.headers["x-cachepipe-cached"] == "false"
    assert first.headers["x-cachepipe-indices"] == "0"
    assert first.headers["x-cachepipe-duplicated"] == "false"
    assert first.headers["x-cachepipe-key"].startswith("k2-")
    again = http.post(helpers.chat_url(proxy, "b"), json=asked)
    assert again.headers["cache-status"] == "cachepipe; hit"
    assert again.headers["x-cachepipe-cached"] == "true"
    assert again.headers["x-request-id"] == first.headers["x-request-id"]
    assert again.content == first.content
    assert upstream.stats.requests == 1


def test_repeats_are_samples_of_their_own(proxy, upstream, http, asked, helpers):
    url = helpers.chat_url(proxy, "a")
    indices = [http.post(url, json=asked).headers["x-cachepipe-indices"] for _ in range(3)]
    assert indices == ["0", "1", "2"]
    more = http.post(helpers.chat_url(proxy, "b"), json={**asked, "n": 5})
    assert more.headers["cache-status"] == "cachepipe; fwd=partial; stored"
    assert more.headers["x-cachepipe-cached"] == "true, true, true, false, false"
    assert more.headers["x-cachepipe-duplicated"] == "false, true, true, true, true"
    assert [choice["index"] for choice in more.json()["choices"]] == [0, 1, 2, 3, 4]
    assert upstream.stats.samples_generated == 5


@pytest.mark.parametrize("streamed_first", [True, False])
def test_what_a_client_stored_is_a_hit_here_and_the_other_way_round(
    serve, upstream, tmp_path, asked, streamed_first
):
    options = {"base_url": upstream.base_url, "api_key": "k", "cache": str(tmp_path / "cache")}
    with OpenAI(namespace="a", **options) as ours:
        if streamed_first:
            stored = words(ours.chat.completions.create(**asked, stream=True))
        else:
            stored = ours.chat.completions.create(**asked).choices[0].message.content
        proxy = serve()
        with openai.OpenAI(base_url=f"{proxy.url}/ns/b/v1", api_key="k", max_retries=0) as plain:
            assert plain.chat.completions.create(**asked).choices[0].message.content == stored
            second = words(plain.chat.completions.create(**asked, stream=True))
        with openai.OpenAI(base_url=f"{proxy.url}/ns/c/v1", api_key="k", max_retries=0) as plain:
            assert words(plain.chat.completions.create(**asked, stream=True)) == stored
        assert upstream.stats.requests == 2
        # The second sample was bought by the proxy, and is a hit for the client.
        own = ours.in_namespace("d").chat.completions.create(**asked, n=2)
        assert [choice.message.content for choice in own.choices] == [stored, second]
        assert info(own).cached == (True, True)
        assert upstream.stats.requests == 2


@pytest.mark.anyio
async def test_the_openai_client_works_on_every_api(proxy, upstream):
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
        completion = await client.completions.create(model="m", prompt=["one", "two"], n=2, max_tokens=5)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        response = await client.responses.create(model="m", input="hello")
        assert response.output_text
        async with client.responses.stream(model="m", input="again") as stream:
            whole = await stream.get_final_response()
        assert whole.output_text
        vectors = await client.embeddings.create(model="e", input=["a", "b", "a"])
        assert vectors.data[0].embedding == vectors.data[2].embedding
        calls = upstream.stats.requests
        raw = await client.embeddings.with_raw_response.create(model="e", input=["b", "a"])
        assert raw.headers["cache-status"] == "cachepipe; hit"
        assert upstream.stats.requests == calls
        assert (await client.models.list()).data
        assert upstream.stats.requests == calls + 1
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/none")


@pytest.mark.anyio
async def test_anthropics_client_works_and_shares_the_cache(serve, upstream):
    proxy = serve(
        upstreams=(
            Upstream.of("mock", upstream.base_url),
            Upstream.of("other", upstream.url, kind="anthropic"),
        )
    )
    asked = {"model": "m", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
    async with anthropic.AsyncAnthropic(base_url=f"{proxy.url}/ns/a@1", api_key="k", max_retries=0) as client:
        first = await client.messages.create(**asked)
    async with anthropic.AsyncAnthropic(base_url=f"{proxy.url}/ns/a@2", api_key="k", max_retries=0) as client:
        async with client.messages.stream(**asked) as stream:
            again = await stream.get_final_message()
        assert again.content[0].text == first.content[0].text
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(**{**asked, "messages": []})
        assert refused.value.response.headers["cache-status"].startswith(
            "cachepipe; fwd=miss; fwd-status=400"
        )
    assert upstream.stats.samples_generated == 1


@pytest.mark.anyio
async def test_concurrent_equal_requests_are_samples_of_their_own_and_share_calls(proxy, upstream, asked):
    upstream.settings = Settings(paused=True)
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
        tasks = [asyncio.create_task(client.chat.completions.create(**asked)) for _ in range(8)]
        await asyncio.to_thread(upstream.wait_until, lambda stats: stats.in_flight > 0)
        upstream.settings = Settings()
        answers = await asyncio.gather(*tasks)
    assert len({answer.id for answer in answers}) == 8 or len({str(answer.choices) for answer in answers}) > 1
    assert upstream.stats.samples_generated == 8


def test_merging_never_crosses_credentials(proxy, upstream, asked, http, helpers):
    """Each key pays for its own requests, and one that is refused hurts nobody else."""
    upstream.settings = Settings(api_key="good")
    bad = http.post(helpers.chat_url(proxy), json=asked, headers={"authorization": "Bearer bad"})
    good = http.post(helpers.chat_url(proxy), json=asked, headers={"authorization": "Bearer good"})
    assert bad.status_code == 401
    assert good.status_code == 200
    assert good.headers["x-cachepipe-indices"] == "0"


@pytest.mark.parametrize(
    ("fault", "status"),
    [("rate_limit", 429), ("error", 500), ("unavailable", 503), ("400", 400), ("401", 401)],
)
def test_errors_pass_through_and_are_never_cached(serve, upstream, http, asked, helpers, fault, status):
    proxy = serve()
    direct = http.post(f"{upstream.base_url}/chat/completions", json=asked)
    assert direct.status_code == 200
    upstream.settings = Settings(script=(fault, None))
    failed = http.post(helpers.chat_url(proxy), json=asked)
    assert failed.status_code == status
    assert failed.json()["error"]
    if status == 429:
        assert "retry-after" in failed.headers
    assert failed.headers["cache-status"] == f"cachepipe; fwd=miss; fwd-status={status}"
    again = http.post(helpers.chat_url(proxy), json=asked)
    assert again.status_code == 200
    assert again.headers["x-cachepipe-indices"] == "0"
    assert again.headers["x-cachepipe-cached"] == "false"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff\xfe{}", b'{"n": NaN}', b'{"seed": 1e400}', b'"text"', b"", b"{}" * 2]
)
def test_what_cannot_be_understood_is_the_providers_to_refuse(proxy, upstream, http, body, helpers):
    answer = http.post(helpers.chat_url(proxy), content=body, headers={"content-type": "application/json"})
    assert answer.status_code >= 400
    assert answer.headers["cache-status"] == "cachepipe; fwd=bypass"
    assert not list(proxy.proxy.store.keys())


def test_numbers_keep_their_digits(serve, recorder, http, asked, helpers):
    """What is keyed is what is sent, and large whole numbers are no floats."""
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    keys = set()
    for seed in (12345678901234567890123, 12345678901234567890124, 18446744073709551616, 1):
        answer = http.post(helpers.chat_url(proxy), json={**asked, "seed": seed, "temperature": 1.0})
        keys.add(answer.headers["x-cachepipe-key"])
        sent = json.loads(recorder.requests[-1].body)
        assert (sent["seed"], repr(sent["temperature"])) == (seed, "1.0")
    assert len(keys) == 4


def test_replay_needs_no_upstream_and_no_key(serve, upstream, http, asked, helpers):
    with_upstream = serve()
    stored = http.post(helpers.chat_url(with_upstream, "a"), json=asked)
    calls = upstream.stats.requests
    offline = serve(replay=True)
    answer = http.post(helpers.chat_url(offline, "a"), json=asked, headers={"authorization": ""})
    assert answer.content == stored.content
    assert answer.headers["cache-status"] == "cachepipe; hit"
    missed = http.post(helpers.chat_url(offline, "a"), json=asked)
    assert missed.status_code == 404
    assert missed.json()["error"]["code"] == "cache_miss"
    assert "the cache has 1 sample of this question, but other requests" in missed.json()["error"]["message"]
    assert missed.headers["x-should-retry"] == "false"
    assert http.get(f"{offline.url}/v1/models").status_code == 404
    colder = http.post(helpers.chat_url(offline, "a"), json={**asked, "top_p": 0.5})
    assert "differs in top_p (asked: 0.5, stored: nothing)" in colder.json()["error"]["message"]
    assert colder.headers["x-cachepipe-nearest"] == stored.headers["x-cachepipe-key"]
    told = {"x-cachepipe-mode": "read-write"}
    assert http.post(helpers.chat_url(offline), json=asked, headers=told).status_code == 400
    assert upstream.stats.requests == calls


@pytest.mark.parametrize("retry", [{"x-stainless-retry-count": "1"}, {"idempotency-key": "k"}])
def test_replay_answers_retries_from_the_cache_only(serve, upstream, http, asked, helpers, retry):
    stored = http.post(helpers.chat_url(serve()), json=asked)
    calls = upstream.stats.requests
    url = helpers.chat_url(serve(replay=True))
    assert http.post(url, json=asked, headers=retry).content == stored.content
    assert http.post(url, json={**asked, "seed": 1}, headers=retry).status_code == (
        404 if "x-stainless-retry-count" in retry else 422
    )
    told = {"x-cachepipe-mode": "replay", "x-stainless-retry-count": "1"}
    assert http.post(helpers.chat_url(serve()), json={**asked, "seed": 1}, headers=told).status_code == 404
    assert upstream.stats.requests == calls


def test_modes_by_header(proxy, upstream, http, asked, helpers):
    url = helpers.chat_url(proxy, "a")

    def ask(mode):
        return http.post(url, json=asked, headers={"x-cachepipe-mode": mode})

    assert ask("replay").status_code == 404
    assert ask("bypass").headers["cache-status"] == "cachepipe; fwd=bypass"
    assert not list(proxy.proxy.store.keys())
    assert ask("read-write").headers["x-cachepipe-indices"] == "0"
    assert ask("nonsense").status_code == 400
    assert upstream.stats.requests == 2


@pytest.mark.parametrize("stop", [True, 5, {"a": 1}, [1, None], [["x"]]])
def test_what_a_field_holds_is_the_providers_to_refuse(recorded, http, asked, helpers, stop):
    """Nothing between here and the provider trips over it, such as what makes spans of calls."""
    importlib.import_module("opentelemetry.trace")  # with it, spans are made
    proxy, recorder = recorded
    recorder.answers[:] = [(400, [("content-type", "application/json")], [b'{"error": "stop"}'])]
    answer = http.post(helpers.chat_url(proxy), json={**asked, "stop": stop})
    assert (answer.status_code, answer.json()) == (400, {"error": "stop"})
