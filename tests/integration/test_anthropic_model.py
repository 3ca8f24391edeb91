"""The adapters over the SDKs of Anthropic and Together: keys and samples shared with the clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, replace

import anthropic
import pytest
import together

from cachepipe import BadAnswer, CacheMiss, MemoryStore, OnlineAPI, Request, wire
from cachepipe.clients import AsyncAnthropic, AsyncTogether, OpenAI
from cachepipe.models import AnthropicModel, OpenAIModel, TogetherModel
from cachepipe.providers.info import info
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
KEY = "sk-never-to-be-seen"
HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]


@dataclass(frozen=True)
class Asked(Request):
    max_tokens: int | None = 12
    system: str | None = None
    temperature: float | None = None


@pytest.fixture(autouse=True)
def _no_credentials_around(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("ANTHROPIC_", "TOGETHER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path / "none"))


@pytest.fixture
async def server():
    async with MockServer(MockSettings(seed=1, max_tokens=12)) as running:
        yield running


@pytest.fixture
def address(server):
    """The server as the together package wants it: version 2 has `/v1` in the base URL, 3 in its paths."""
    base = together.Together(api_key="k").base_url
    return server.base_url if base.path.startswith("/v1") else server.url


@contextlib.asynccontextmanager
async def claude(server, **settings):
    settings = {"api_key": KEY, "max_retries": 0, **settings}
    async with AnthropicModel("m", base_url=server.url, **settings) as model:
        yield model


def client_of(server, **settings):
    return AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0, **settings)


def text(message):
    return "".join(block.text for block in message.content)


# Anthropic.


async def test_c10_samples_are_shared_with_the_client_both_ways(server):
    store = MemoryStore()
    async with claude(server) as model, OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Asked(HELLO, n=2))
        async with client_of(server, cache=store, namespace="b") as client:
            ask = {"model": "m", "max_tokens": 12, "messages": HELLO}
            answers = [await client.messages.create(**ask) for _ in range(3)]
            with_beta = await client.messages.create(**ask, extra_headers={"anthropic-beta": "one"})
        assert [text(answer) for answer in answers][:2] == first.data
        assert [info(answer).cached for answer in answers] == [(True,), (True,), (False,)]
        third = await pipeline.request(Asked(HELLO, n=3, namespace="c"))
        assert third.data == [text(answer) for answer in answers]
        assert third.cached == [True] * 3
        beta = anthropic.AsyncAnthropic(
            base_url=server.url, api_key=KEY, default_headers={"Anthropic-Beta": "one"}
        )
        raw = AnthropicModel("m", client=beta, raw=True)
        async with beta, OnlineAPI(raw, store) as whole:
            sample = (await whole.request(Asked(HELLO))).data[0]
            assert wire.MESSAGES.summary(sample)["text"] == text(with_beta)
        raw = AnthropicModel("m", raw=True, base_url=server.url, api_key=KEY)
        async with raw, OnlineAPI(raw, store) as whole:
            assert (await whole.request(Asked(HELLO))).data[0]["id"] == answers[2].id  # the third draw
    assert server.stats.requests == 4
    assert [entry.path for entry in server.stats.log] == ["/v1/messages"] * 4


async def test_n_is_as_many_calls_at_once_and_topped_up_exactly(server):
    async with claude(server) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        assert model.max_n == 1
        two = await pipeline.request(Asked(HELLO, n=2))
        five = await pipeline.request(Asked(HELLO, n=5, namespace="b"))
        assert five.data[:2] == two.data
        assert five.cached == [True, True, False, False, False]
        assert model.calls == 5
    raw = AnthropicModel("m", raw=True, base_url=server.url, api_key=KEY)
    async with raw, OnlineAPI(raw, MemoryStore()) as pipeline:
        samples = (await pipeline.request(Asked(HELLO, n=3))).data
        spent = raw.spent.counts()
    for name in ("input", "output"):
        total = sum(sample["usage"][f"{name}_tokens"] for sample in samples)
        assert spent[{"input": "prompt_tokens", "output": "completion_tokens"}[name]] == total


async def test_plain_requests_become_bodies(server):
    async with claude(server, max_tokens=7) as model:
        system = [{"role": "system", "content": "Be brief."}, *HELLO]
        split = model.question(Asked(system, max_tokens=None))
        assert split == model.question(Asked(HELLO, max_tokens=7, system="Be brief."))
        assert split.scope == f"{server.url}/v1/messages"
        assert model.question(Asked("Hi")) == model.question(Asked([{"role": "user", "content": "Hi"}]))
        assert model.question(Asked("Hi"), "elsewhere").scope == "elsewhere"
    async with claude(server) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        with pytest.raises(wire.BadRequest, match="max_tokens"):
            await pipeline.request(Asked("Hi", max_tokens=None))
    assert server.stats.requests == 0


async def test_errors_are_the_sdks_own_and_nothing_of_them_is_kept(server):
    store = MemoryStore()
    async with claude(server) as model, OnlineAPI(model, store) as pipeline:
        server.settings = replace(server.settings, script=(500, "error_200", "malformed", "drop"))
        expected = (anthropic.InternalServerError, BadAnswer, BadAnswer, anthropic.APIConnectionError)
        for kind in expected:
            with pytest.raises(kind):
                await pipeline.request(Asked(HELLO))
        assert [sample for key in list(store.keys()) for sample in store.samples(key.key)] == []
        cut = await pipeline.request(Asked(HELLO, max_tokens=1))
        again = await pipeline.request(Asked(HELLO, max_tokens=1, namespace="b"))
    assert again == cut._replace(cached=[True])


async def test_of_several_calls_those_that_came_are_kept(server):
    store = MemoryStore()
    async with claude(server) as model, OnlineAPI(model, store) as pipeline:
        server.settings = replace(server.settings, script=(None, 529, None))
        with pytest.raises(anthropic.APIStatusError):
            await pipeline.request(Asked(HELLO, n=3))
        response = await pipeline.request(Asked(HELLO, n=3))
        assert sorted(response.cached) == [False, True, True]
        assert server.stats.samples_generated == 3


async def test_there_are_replays_without_a_key_and_the_sdks_error_for_a_call(server):
    store = MemoryStore()
    async with claude(server) as model, OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Asked(HELLO))
    model = AnthropicModel("m", base_url=server.url)
    async with model, OnlineAPI(model, store, mode="replay") as pipeline:
        assert (await pipeline.request(Asked(HELLO))).data == first.data
        with pytest.raises(CacheMiss):
            await pipeline.request(Asked("Another"))
    model = AnthropicModel("m", base_url=server.url)
    async with model, OnlineAPI(model, store) as pipeline:
        with pytest.raises((TypeError, anthropic.AnthropicError)):
            await pipeline.request(Asked("Another"))
    assert server.stats.requests == 1


# Together.


@pytest.mark.parametrize("kind", [AnthropicModel, TogetherModel])
def test_a_package_that_is_too_old_is_one_sentence(kind, monkeypatch):
    package = anthropic if kind is AnthropicModel else together
    monkeypatch.delattr(package, "DefaultAsyncHttpxClient")
    with pytest.raises(ImportError, match=f"needs a recent {package.__name__}: pip install -U"):
        kind("m", api_key=KEY)


async def test_c10_together_shares_samples_with_its_client_and_merges_calls(server, address):
    store = MemoryStore()
    model = TogetherModel("m", base_url=address, api_key=KEY)
    async with model, OnlineAPI(model, store) as pipeline:
        responses = await asyncio.gather(*(pipeline.request(Asked(HELLO, n=2)) for _ in range(3)))
        assert [entry.n for entry in server.stats.log] == [6]
        texts = [text for response in responses for text in response.data]
        async with AsyncTogether(base_url=address, api_key="k2", cache=store, namespace="b") as client:
            answer = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=12, n=6)
        assert sorted(choice.message.content for choice in answer.choices) == sorted(texts)
        at_completions = model.at("/completions")
        assert at_completions.endpoint == model.endpoint.replace("/chat", "")
    with OpenAI(base_url=server.base_url, api_key=KEY, cache=store, namespace="c") as client:
        same = client.chat.completions.create(model="m", messages=HELLO, max_tokens=12, n=6)
    assert [c.message.content for c in same.choices] == [c.message.content for c in answer.choices]
    openai = OpenAIModel("m", base_url=server.base_url, api_key=KEY)
    assert openai.question(Asked(HELLO)) == model.question(Asked(HELLO))
    assert server.stats.requests == 1


async def test_together_errors_are_its_own_and_a_replay_needs_no_key(server, address):
    store = MemoryStore()
    model = TogetherModel("m", base_url=address, api_key=KEY, max_retries=0)
    async with model, OnlineAPI(model, store) as pipeline:
        server.settings = replace(server.settings, script=(503,))
        with pytest.raises(together.InternalServerError):
            await pipeline.request(Asked(HELLO))
        first = await pipeline.request(Asked(HELLO))
    async with TogetherModel("m", base_url=address) as model:
        async with OnlineAPI(model, store, mode="replay") as pipeline:
            assert (await pipeline.request(Asked(HELLO))).data == first.data
        async with OnlineAPI(model, store) as pipeline:
            with pytest.raises(together.TogetherError, match="api_key"):
                await pipeline.request(Asked("Another"))
    assert server.stats.requests == 2
    with pytest.raises(TypeError, match="has its own base_url"):
        TogetherModel(client=object(), api_key="k")
