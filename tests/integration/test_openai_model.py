"""The adapter over the real openai client, against the mock server: keys, samples, calls and errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace

import openai
import pytest
import together
from openai.types.chat import ChatCompletionMessage

import cachepipe.models
from cachepipe import (
    BadAnswer,
    Batch,
    CacheMiss,
    DiskStore,
    LocalAPI,
    MemoryStore,
    OnlineAPI,
    Request,
    wire,
)
from cachepipe.clients import AsyncOpenAI
from cachepipe.contract.keys import provider_question
from cachepipe.models import AnthropicModel, OpenAIModel, TogetherModel
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.ngram import embed
from cachepipe.testing.server import Fault

pytestmark = pytest.mark.anyio

KEY = "sk-never-to-be-seen"
BODY = {"model": "ngram-1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@dataclass(frozen=True)
class Asked(Request):
    temperature: float | None = None
    max_tokens: int | None = 5
    seed: int | None = None
    stop: list[str] | None = None


@pytest.fixture
async def server():
    async with MockServer() as running:
        yield running


@contextlib.asynccontextmanager
async def adapter(server, model="ngram-1", **settings):
    settings = {"max_retries": 0, **settings}
    async with OpenAIModel(model, base_url=server.base_url, api_key=KEY, **settings) as made:
        yield made


def script(server, *faults):
    server.settings = replace(server.settings, script=faults)


# What is asked.


async def test_a_string_is_one_user_message_and_the_data_are_texts(server):
    store = MemoryStore()
    async with adapter(server) as model, OnlineAPI(model, store) as pipeline:
        response = await pipeline.request(Asked("hi", n=3, stop=["x"]))
    assert all(isinstance(text, str) and text for text in response.data)
    assert (len(response.data), response.cached) == (3, [False] * 3)
    document = json.loads(store.question(response.key).document)
    assert document == {"body": {**BODY, "stop": ["x"]}}
    assert (server.stats.requests, server.stats.samples_generated) == (1, 3)


async def test_fields_that_are_none_are_not_sent_and_the_request_s_model_wins(server):
    @dataclass(frozen=True)
    class Named(Asked):
        model: str | None = None

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    store = MemoryStore()
    async with adapter(server) as model, OnlineAPI(model, store) as pipeline:
        own = await pipeline.request(Named(messages, model="ngram-2"))
        usual = await pipeline.request(Named(messages))
    assert json.loads(store.question(own.key).document)["body"] == {
        "model": "ngram-2",
        "messages": messages,
        "max_tokens": 5,
    }
    assert json.loads(store.question(usual.key).document)["body"]["model"] == "ngram-1"


async def test_pydantic_messages_are_keyed_and_sent_as_the_fields_that_were_set(server):
    said = ChatCompletionMessage(role="assistant", content="hello")
    plain = {"role": "assistant", "content": "hello"}
    user = {"role": "user", "content": "hi"}
    async with adapter(server) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        first = await pipeline.request(Asked([said, user]))
        same = await pipeline.request(Asked((plain, user), namespace="other"))
    assert (first.key, same.cached) == (same.key, [True])


async def test_c9_the_key_is_of_the_endpoint_s_url_and_the_body(server):
    @dataclass(frozen=True)
    class Detailed(Asked):
        user: str | None = "me"
        stream: bool | None = True

    async with adapter(server, raw=True) as model:
        question = model.question(Detailed("hi", n=2))
        assert question == provider_question(f"{server.base_url}/chat/completions", {"body": BODY})
        assert question == model.question(Asked("hi"))
        assert model.question(Asked("hi"), "elsewhere").scope == "elsewhere"
        seeded = model.question(Asked("hi", seed=1))
        assert not seeded.mergeable
        embedding = model.at("v1/embeddings").question(Request("hi"))
        assert (embedding.scope, embedding.function) == (f"{server.base_url}/v1/embeddings", True)


async def test_c9_best_of_puts_n_into_the_key(server):
    @dataclass(frozen=True)
    class Best(Asked):
        best_of: int | None = 4

    async with adapter(server, raw=True, endpoint="/completions") as model:
        two, three = (model.question(Best("Given", n=n)) for n in (2, 3))
        assert two.key != three.key
        assert not two.mergeable
        async with OnlineAPI(model, MemoryStore()) as pipeline:
            response = await pipeline.request(Best("Given", n=2))
    assert len(response.data) == 2
    assert server.stats.requests == 1


async def test_c9_headers_that_change_the_answer_count_and_credentials_never(server):
    keys = set()
    given = ({}, {"OpenAI-Beta": "x"}, {"openai-beta": "x"}, {"X-Other": "y", "Authorization": "Bearer z"})
    for headers in given:
        async with openai.AsyncOpenAI(
            base_url=server.base_url, api_key=KEY, default_headers=headers
        ) as client:
            model = OpenAIModel("ngram-1", client=client, raw=True)
            keys.add(model.question(Asked("hi")).key)
    assert len(keys) == 2


async def test_c10_whole_samples_and_texts_are_of_the_same_samples(server):
    store = MemoryStore()
    async with adapter(server, raw=True) as whole, adapter(server) as text:
        async with OnlineAPI(text, store) as pipeline:
            texts = (await pipeline.request(Asked("hi", n=3))).data
        async with OnlineAPI(whole, store) as pipeline:
            response = await pipeline.request(Asked(BODY["messages"], n=3, namespace="other"))
    assert response.cached == [True] * 3
    assert [wire.CHAT.summary(sample)["text"] for sample in response.data] == texts
    assert server.stats.requests == 1


async def test_the_scope_is_the_url_that_the_client_calls(server):
    """The mock server knows none of these paths, so its 404 tells where the request went."""
    nowhere = f"{server.url}/nowhere"
    plain = {"base_url": f"{nowhere}/", "api_key": KEY}
    azure = {"api_key": KEY, "api_version": "2024-06-01"}
    clients = [
        openai.AsyncOpenAI(**plain),
        openai.AsyncOpenAI(**plain, default_query={"tier": "a b"}),
        openai.AsyncAzureOpenAI(**azure, azure_endpoint=nowhere),
        openai.AsyncAzureOpenAI(**azure, azure_endpoint=nowhere, azure_deployment="mine"),
        openai.AsyncAzureOpenAI(**azure, base_url=f"{nowhere}/openai/deployments/mine"),
    ]
    for client in clients:
        async with client:
            model = OpenAIModel("ngram-1", client=client)
            with pytest.raises(openai.NotFoundError) as caught:
                await model.request(Asked("hi"))
            called = wire.scope_of(str(caught.value.response.request.url))
            assert model.question(Asked("hi")).scope == called
            assert model.question(Asked("hi"), model.cache_scope).scope == called
            responses = model.at("/responses")
            with pytest.raises(openai.NotFoundError) as caught:
                await responses.request(Asked("hi"))
            assert responses.question(Asked("hi")).scope == wire.scope_of(
                str(caught.value.response.request.url)
            )


async def test_what_cannot_be_asked_is_refused_before_a_call(server):
    @dataclass(frozen=True)
    class Late(Request):
        background: bool | None = True

    async with adapter(server) as model:
        cases = [
            (model, Asked({"a": 1}), TypeError, "a string or a list of messages"),
            (model.at("/embeddings"), Request(["a", "b"]), wire.BadRequest, "asks one question here; got 2"),
            (model.at("/responses"), Late("a"), wire.BadRequest, "cannot be answered from a cache"),
        ]
        for asked, request, kind, complaint in cases:
            with pytest.raises(kind, match=complaint):
                asked.question(request)
            with pytest.raises(kind, match=complaint):
                await asked.request(request)
        with pytest.raises(wire.BadRequest, match="the endpoints are"):
            model.at("/images")
    assert server.stats.requests == 0
    with pytest.raises(TypeError, match="a client has its own"):
        OpenAIModel("m", client=object(), api_key="k")
    with pytest.raises(ValueError, match="max_n"):
        OpenAIModel("m", max_n=0)


# Calls.


async def test_c4_more_than_the_server_gives_in_one_call_is_asked_in_several(server):
    server.settings = replace(server.settings, max_n=4)
    async with adapter(server, max_n=4) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        response = await pipeline.request(Asked("hi", n=10))
        alone = await model.request(Asked("hi", n=9))
    assert len(response.data) == 10
    assert len(alone.data) == 9
    asked = [entry.n for entry in server.stats.log]
    assert (sorted(asked[:3]), sorted(asked[3:])) == ([2, 4, 4], [1, 4, 4])
    assert model.calls == 6


async def test_apis_that_give_one_sample_per_call_are_called_so_many_times(server):
    async with (
        adapter(server, raw=True, endpoint="/responses") as model,
        OnlineAPI(model, MemoryStore()) as pipeline,
    ):
        response = await pipeline.request(Request("hi", n=3))
    assert len({sample["id"] for sample in response.data}) == 3
    assert server.stats.requests == 3


async def test_c7_what_some_of_several_calls_have_brought_is_kept(server):
    store = MemoryStore()
    request = Asked("hi", n=6)
    async with adapter(server, max_n=2) as model:
        script(server, None, Fault(kind="error"), None)
        assert len((await model.request(request)).data) == 4
        script(server, *[Fault(kind="error")] * 3)
        with pytest.raises(openai.InternalServerError):
            await model.request(request)
        async with OnlineAPI(model, store) as pipeline:
            script(server, None, Fault(kind="error"), None)
            with pytest.raises(openai.InternalServerError):
                await pipeline.request(request)
            response = await pipeline.request(request)
    assert response.cached.count(True) == 4


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("400", openai.BadRequestError),
        ("401", openai.AuthenticationError),
        ("rate_limit", openai.RateLimitError),
        ("error", openai.InternalServerError),
        ("drop", openai.APIConnectionError),
        ("cut", openai.APIConnectionError),
        ("error_200", BadAnswer),
        ("malformed", BadAnswer),
    ],
)
async def test_c8_failures_are_the_sdk_s_own_and_are_not_cached(server, fault, kind):
    store = MemoryStore()
    async with adapter(server) as model, OnlineAPI(model, store) as pipeline:
        script(server, Fault.parse(fault))
        with pytest.raises(kind):
            await pipeline.request(Asked("hi"))
        assert (await pipeline.request(Asked("hi"))).cached == [False]
    assert server.stats.requests == 2


async def test_the_sdk_repeats_calls_as_it_always_does(server):
    async with adapter(server, max_retries=2) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        script(server, Fault(kind="unavailable", retry_after=0.001))
        assert len((await pipeline.request(Asked("hi", n=2))).data) == 2
    assert (model.calls, server.stats.requests) == (1, 2)


async def test_c8_a_short_answer_is_asked_for_the_rest(server):
    async with adapter(server) as model, OnlineAPI(model, MemoryStore()) as pipeline:
        script(server, Fault(kind="short", keep=2))
        assert len((await pipeline.request(Asked("hi", n=5))).data) == 5
    assert [entry.n for entry in server.stats.log] == [5, 3]


# Clients, keys and imports.


@pytest.mark.parametrize("kind", [OpenAIModel, TogetherModel, AnthropicModel])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"client": openai.OpenAI(api_key=KEY)}, "client is an asynchronous client"),
        ({"client": "AsyncOpenAI"}, "client is an asynchronous client"),
        ({"model": openai.AsyncOpenAI(api_key=KEY)}, "model is the name of a model"),
        ({"model": 5}, "model is the name of a model"),
    ],
)
def test_a_client_that_cannot_be_awaited_and_a_model_without_a_name_are_refused(kind, given, words):
    with pytest.raises(TypeError, match=words) as caught:
        kind(**given)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("max_n", [0, -1, "3", 2.5, True])
def test_a_limit_that_is_no_number_of_samples_is_refused(max_n):
    with pytest.raises(ValueError, match="a whole number of samples"):
        OpenAIModel("m", max_n=max_n)


async def test_a_client_that_was_passed_in_stays_open_and_one_made_here_is_closed(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY) as client:
        async with OpenAIModel("ngram-1", client=client) as model:
            await model.request(Asked("hi"))
        assert not client.is_closed()
    async with adapter(server) as model:
        await model.request(Asked("hi"))
        [made] = model.connection._by_loop.values()
    assert made.is_closed()
    await model.close()


async def test_the_environment_says_where_and_with_which_key(server, monkeypatch):
    server.settings = replace(server.settings, api_key=KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with OpenAIModel("ngram-1") as model:
        assert len((await model.request(Asked("hi"))).data) == 1
        assert model.cache_scope == f"{server.base_url}/chat/completions"


async def test_an_empty_key_will_do_for_a_server_that_needs_none(server):
    async with OpenAIModel("ngram-1", base_url=server.base_url, api_key="") as model:
        assert len((await model.request(Asked("hi"))).data) == 1


async def test_many_first_calls_at_once_make_one_client(server):
    async with adapter(server) as model:
        answers = await asyncio.gather(*(model.request(Asked("hi")) for _ in range(5)))
    assert [len(answer.data) for answer in answers] == [1] * 5
    assert server.stats.max_connections <= 5


@pytest.fixture
def served_elsewhere():
    with MockServer.in_thread(MockSettings(max_tokens=5)) as running:
        yield running


TOGETHER = int(getattr(together, "__version__", "1").partition(".")[0])
since_2 = pytest.mark.skipif(TOGETHER < 2, reason="this is together 1")


@pytest.mark.parametrize("kind", [OpenAIModel, pytest.param(TogetherModel, marks=since_2), AnthropicModel])
def test_one_model_serves_several_loops_and_opens_again_after_it_was_closed(served_elsewhere, kind):
    versioned = kind is OpenAIModel or (kind is TogetherModel and TOGETHER < 3)
    address = served_elsewhere.base_url if versioned else served_elsewhere.url
    model = kind("m", base_url=address, api_key=KEY, max_retries=0, timeout=10)

    async def answered():
        async with OnlineAPI(model, MemoryStore()) as pipeline:
            return len((await pipeline.request(Asked("hi", n=2))).data)

    with asyncio.Runner() as one, asyncio.Runner() as other:
        for loop in (one, other, one, other):  # each keeps its connections while the other calls
            assert loop.run(answered()) == 2
        one.run(model.close())
        assert other.run(answered()) == one.run(answered()) == 2
        for loop in (one, other):
            loop.run(model.close())
    assert served_elsewhere.stats.samples_delivered == 12
    served_elsewhere.wait_until(lambda stats: stats.connections == 0)


async def test_c1_a_client_with_a_cache_of_its_own_stores_nothing_a_second_time(server):
    store = MemoryStore()
    async with (
        AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=store) as client,
        OnlineAPI(OpenAIModel("ngram-1", client=client), store) as pipeline,
    ):
        first = await asyncio.wait_for(pipeline.request(Asked("hi", n=2)), 10)
        answer = await client.chat.completions.create(**BODY, n=2)  # the next draw of this namespace
        everything = await pipeline.request(Asked("hi", n=4, namespace="b"))
    assert [choice.message.content for choice in answer.choices] == everything.data[2:]
    assert first.data == everything.data[:2]
    assert store.totals()["samples"] == server.stats.samples_generated == 4


async def test_a_client_that_only_replays_makes_no_calls_for_an_adapter(server):
    store = MemoryStore()
    async with adapter(server) as model, OnlineAPI(model, store) as pipeline:
        first = await pipeline.request(Asked("hi"))
    async with (
        AsyncOpenAI(base_url=server.base_url, cache=store, mode="replay") as client,
        OnlineAPI(OpenAIModel("ngram-1", client=client), MemoryStore()) as pipeline,
    ):
        assert (await pipeline.request(Asked("hi"))).data == first.data
        with pytest.raises(CacheMiss):
            await pipeline.request(Asked("another"))
    assert server.stats.requests == 1


async def test_c9_base64_of_another_type_than_floats_is_never_read_as_floats(server):
    @dataclass(frozen=True)
    class Embedded(Request):
        encoding_format: str | None = None
        output_dtype: str | None = None

    async with adapter(server, "e", endpoint="/embeddings") as model, OnlineAPI(model, MemoryStore()) as api:
        with pytest.raises(wire.BadRequest, match="make the OpenAIModel with raw=True"):
            await api.request(Embedded("x", encoding_format="base64", output_dtype="uint8"))
        assert (await api.request(Embedded("x", encoding_format="float", output_dtype="float"))).data
    assert server.stats.requests == 1


async def test_an_embedding_is_a_list_of_numbers_and_a_moderation_its_result(server):
    @dataclass(frozen=True)
    class Embedded(Request):
        encoding_format: str | None = None

    async with adapter(server, "e", endpoint="/embeddings") as model, OnlineAPI(model, MemoryStore()) as api:
        asks = [Embedded("Sort a list"), Embedded("Sort a list", encoding_format="base64")]
        miss, hit = [await api.request(ask) for ask in asks]
    assert miss.data == hit.data == [embed("Sort a list").tolist()]
    assert (miss.cached, hit.cached) == ([False], [True])
    result = {"flagged": True, "categories": {"violence": True}, "category_scores": {"violence": 0.9}}
    async with adapter(server, "m", endpoint="/moderations") as model:
        assert model.present({"id": "modr-1", "model": "m", "results": [result]}) == result


async def test_a_batch_pipeline_takes_it_too(server):
    async with adapter(server) as model, LocalAPI(model, MemoryStore(), batch_size=4) as pipeline:
        responses = await pipeline.batch_request(Batch([Asked("a"), Asked("b", n=2)]))
    assert [len(response.data) for response in responses] == [1, 2]


async def test_neither_key_nor_headers_nor_credentials_of_the_url_reach_the_folder(server, tmp_path):
    base_url = server.base_url.replace("//", "//someone:password1@")
    with DiskStoreAt(tmp_path / "cache") as store:
        headers = {"X-Secret": f"Bearer {KEY}", "OpenAI-Beta": "x"}
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, default_headers=headers) as client:
            model = OpenAIModel("ngram-1", client=client)
            async with OnlineAPI(model, store) as pipeline:
                await pipeline.request(Asked("hi"))
            async with OnlineAPI(model, store, mode="replay") as pipeline:
                with pytest.raises(CacheMiss) as caught:
                    await pipeline.request(Asked("hi", seed=1))
            told = f"{model!r} {pipeline!r} {caught.value}"
    found = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert b"chat/completions" in found
    for secret in (KEY, "password1", "someone", "X-Secret", "Bearer"):
        assert secret.encode() not in found
        assert secret not in told


class DiskStoreAt:
    def __init__(self, folder):
        self.store = DiskStore(folder)

    def __enter__(self):
        return self.store

    def __exit__(self, *_):
        self.store.close()


def test_the_sdk_is_imported_with_the_first_call_and_not_for_a_replay():
    script = """
import asyncio, sys
from cachepipe import CacheMiss, MemoryStore, OnlineAPI, Request
import cachepipe.models
print("openai" in sys.modules, "cachepipe.models.openai" in sys.modules)
from cachepipe.models import OpenAIModel
async def main():
    async with OnlineAPI(OpenAIModel("m"), MemoryStore(), mode="replay") as pipeline:
        try:
            await pipeline.request(Request("hi"))
        except CacheMiss:
            print("openai" in sys.modules)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
    assert set(dir(cachepipe.models)) >= {"OpenAIModel", "AnthropicModel"}
    with pytest.raises(AttributeError, match="has no 'Nothing'"):
        cachepipe.models.Nothing  # noqa: B018 - reading it is the test


async def test_max_n_at_another_endpoint_is_that_api_s(server):
    async with adapter(server, max_n=8) as model:
        assert (model.max_n, model.at("/responses").max_n, model.at("/completions").max_n) == (8, 1, 8)
        twin = model.at("/embeddings")
        assert twin.cache_scope == f"{server.base_url}/embeddings"
        await twin.at("/chat/completions").request(Asked("hi"))
        assert (model.calls, twin.calls) == (1, 1)
    assert MockSettings().max_n == 128
