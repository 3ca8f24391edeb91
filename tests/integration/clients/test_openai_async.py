"""AsyncOpenAI with a cache: the SDK's own client, whose calls are draws."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import json
import pickle
import socket
import typing
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncStream
from pydantic import BaseModel

from cachepipe import CacheMiss, DiskStore, MemoryStore, OnlineAPI, Request
from cachepipe.clients import AsyncOpenAI
from cachepipe.context import using
from cachepipe.models import OpenAIModel
from cachepipe.providers.exchange import Exchange
from cachepipe.providers.info import info
from cachepipe.sdk.http import _eased as eased
from cachepipe.sdk.http import library_of
from cachepipe.sdk.internals import ATTRIBUTES, NAMES
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
KEY = "sk-made-up-and-never-stored"
has_responses = pytest.mark.skipif(not hasattr(openai.types, "responses"), reason="came with openai 1.66")
takes_callable_keys = pytest.mark.skipif(
    not hasattr(openai.OpenAI, "_refresh_api_key"), reason="came with openai 1.106"
)


@pytest.fixture
async def server():
    async with MockServer(MockSettings(seed=1, max_tokens=12)) as running:
        yield running


@pytest.fixture
async def client(server):
    async with AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=MemoryStore(), max_retries=0) as made:
        yield made


def texts(response):
    return [choice.message.content for choice in response.choices]


async def ask(client, **options):
    return await client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


async def read(stream):
    """The content of each choice of a stream, joined."""
    parts = {}
    async for chunk in stream:
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    return [parts[index] for index in sorted(parts)]


async def test_it_is_the_sdks_own_class(client):
    assert isinstance(client, openai.AsyncOpenAI)
    answer = await ask(client)
    assert type(answer) is openai.types.chat.ChatCompletion


async def test_a_rerun_in_another_namespace_asks_nothing_and_answers_the_same(server, client):
    first = [await ask(client), await ask(client, n=3), await ask(client, temperature=0.5)]
    calls = server.stats.requests
    again = client.in_namespace("again")
    second = [await ask(again), await ask(again, n=3), await ask(again, temperature=0.5)]
    assert server.stats.requests == calls == 3
    assert list(map(texts, first)) == list(map(texts, second))
    assert first[0] == second[0]
    assert first[0].model_dump() == second[0].model_dump()


async def test_c1_a_repeated_request_gets_a_fresh_sample(server, client):
    one, two = await ask(client), await ask(client)
    assert server.stats.samples_generated == 2
    assert info(one).indices == (0,)
    assert info(two).indices == (1,)


async def test_repeat_same_gives_the_same_again(server):
    async with AsyncOpenAI(
        base_url=server.base_url, api_key=KEY, cache=MemoryStore(), repeat="same"
    ) as client:
        assert await ask(client) == await ask(client) == await ask(client.in_namespace("other"))
    assert server.stats.samples_generated == 1


async def test_n_is_topped_up_exactly_and_the_choices_renumbered(server, client):
    two = await ask(client, n=2)
    five = await ask(client.in_namespace("b"), n=5)
    assert [entry.n for entry in server.stats.log] == [2, 3]
    assert texts(five)[:2] == texts(two)
    assert [choice.index for choice in five.choices] == [0, 1, 2, 3, 4]
    assert five.usage.total_tokens == five.usage.prompt_tokens + five.usage.completion_tokens
    assert five.usage.prompt_tokens == two.usage.prompt_tokens
    told = info(five)
    assert told.cached == (True, True, False, False, False)
    assert told.as_asked["completion_tokens"] == five.usage.completion_tokens
    assert told.billed["samples"] == 3
    assert told.saved["samples"] == 2
    assert told.saved["completion_tokens"] == two.usage.completion_tokens


async def test_c6_a_lone_request_saves_nothing_and_its_replay_all_of_it(server, client):
    four = await ask(client, n=4)
    first, again = info(four), info(await ask(client.in_namespace("b"), n=4))
    paid = server.stats.tokens_in + server.stats.tokens_out
    assert first.billed["total_tokens"] == first.as_asked["total_tokens"] == four.usage.total_tokens == paid
    assert not any(first.saved.values())
    assert again.saved == again.as_asked == first.as_asked
    assert not any(again.billed.values())


async def test_c6_of_requests_that_share_a_call_one_is_billed_the_prompt(server, client):
    told = [info(answer) for answer in await asyncio.gather(*(ask(client) for _ in range(3)))]
    assert server.stats.requests == 1
    assert [each.billed["prompt_tokens"] for each in told] == [server.stats.tokens_in, 0, 0]
    assert [each.as_asked["prompt_tokens"] for each in told] == [server.stats.tokens_in] * 3
    assert (
        sum(each.billed["total_tokens"] for each in told) == server.stats.tokens_in + server.stats.tokens_out
    )


async def test_concurrent_draws_of_one_question_share_a_call(server, client):
    answers = await asyncio.gather(*(ask(client, n=2) for _ in range(5)))
    assert [entry.n for entry in server.stats.log] == [10]
    assert sorted(index for answer in answers for index in info(answer).indices) == list(range(10))


async def test_copies_with_other_credentials_share_no_call(server, client):
    other = client.with_options(api_key="another")
    await asyncio.gather(ask(client), ask(other))
    assert [entry.n for entry in server.stats.log] == [1, 1]


async def test_c10_a_sample_of_the_pipeline_is_a_hit_here(server):
    store = MemoryStore()
    model = OpenAIModel("m", base_url=server.base_url, api_key=KEY)
    async with model, OnlineAPI(model, cache=store) as pipeline:
        stored = await pipeline.request(Request(HELLO, n=2))
    async with AsyncOpenAI(base_url=server.base_url + "/", api_key="other", cache=store) as client:
        assert texts(await ask(client, n=2)) == stored.data
    assert server.stats.requests == 1


async def test_c10_a_sample_from_here_is_a_hit_of_the_pipeline(server):
    store = MemoryStore()
    async with AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=store) as client:
        answer = texts(await ask(client, n=2))
        streamed = await read(await ask(client.in_namespace("x"), n=3, stream=True))
    model = OpenAIModel("m", base_url=server.base_url, api_key=KEY)
    async with model, OnlineAPI(model, cache=store) as pipeline:
        response = await pipeline.request(Request(HELLO, n=3))
    assert response.data[:2] == answer
    assert response.data == streamed
    assert response.cached == [True] * 3
    assert server.stats.requests == 2


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("first", [True, False])
async def test_streamed_and_unstreamed_requests_share_samples(server, client, n, first):
    async def get(who, stream):
        answer = await ask(who, n=n, stream=stream)
        if stream:
            assert type(answer) is AsyncStream
            assert answer.response.headers["content-type"].startswith("text/event-stream")
        return await read(answer) if stream else texts(answer)

    before = await get(client, first)
    assert await get(client.in_namespace("b"), not first) == before
    assert await get(client.in_namespace("c"), first) == before
    assert server.stats.requests == 1


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_recorded_stream_has_usage_though_its_reader_did_not_ask(server, client, wanted):
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    for who in (client, client.in_namespace("b")):
        chunks = [chunk async for chunk in await ask(who, stream=True, **options)]
        assert any(chunk.usage is not None for chunk in chunks) is wanted
        assert all(chunk.choices for chunk in chunks) is not wanted
    whole = await ask(client.in_namespace("c"))
    assert whole.usage.completion_tokens > 0


async def test_c7_a_streams_sample_is_stored_before_its_end_is_seen(server, client):
    stream = await ask(client, stream=True)
    assert info(stream).complete is False
    async for chunk in stream:
        if chunk.choices[0].finish_reason:
            break
    assert await read(await ask(client.in_namespace("b"), stream=True))  # waits for the sample
    assert server.stats.requests == 1
    await stream.close()


async def test_c7_the_rest_of_an_abandoned_stream_is_read_and_stored(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.01})
    stream = await ask(client, stream=True)
    async for _ in stream:
        break
    await anext(stream)
    await stream.close()
    again = await ask(client.in_namespace("b"))
    assert len(texts(again)[0]) > 0
    assert server.stats.requests == 1
    assert info(again).cached == (True,)


async def test_c7_a_stream_that_nobody_holds_is_read_to_its_end(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.01})
    stream = await ask(client, stream=True)
    await anext(stream)
    await anext(stream)
    del stream
    gc.collect()
    await ask(client.in_namespace("b"))
    assert server.stats.requests == 1


async def test_c7_a_stalled_reader_does_not_block_others(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.005})
    stalled = await ask(client, stream=True)
    await anext(stalled)
    other = texts(await ask(client.in_namespace("b")))
    assert server.stats.requests == 1
    rest = await read(stalled)
    assert other[0].endswith(rest[0])


async def test_c8_a_stream_that_is_cut_is_not_stored(server, client):
    server.settings = server.settings.updated({"script": ("truncate", "cut", "cut")})
    await read(await ask(client, stream=True))
    seen = []
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as plain:
        for who in (plain, client):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - which one depends on the SDK's version
                await read(await ask(who, stream=True))
            seen.append(caught.type)
    assert seen[0] is seen[1]
    assert info(await ask(client)).indices == (0,)
    assert server.stats.requests == 4


async def test_errors_are_the_sdks_own_and_not_cached(server, client):
    server.settings = server.settings.updated({"script": (400, 429, "error", "drop")})
    for kind in (
        openai.BadRequestError,
        openai.RateLimitError,
        openai.InternalServerError,
        openai.APIConnectionError,
    ):
        with pytest.raises(kind):
            await ask(client)
    assert info(await ask(client)).indices == (0,)


async def test_c8_an_error_under_200_is_what_the_sdk_makes_of_it_and_not_cached(server, client):
    server.settings = server.settings.updated({"script": ("error_200",)})
    answer = await ask(client)
    assert answer.choices is None
    assert answer.error["message"]
    assert info(answer) is None
    assert info(await ask(client)).indices == (0,)


async def test_the_sdks_retries_are_unchanged_on_a_miss(server, client):
    server.settings = server.settings.updated({"script": ({"kind": "rate_limit", "retry_after": 0.0}, None)})
    raw = await client.with_options(max_retries=2).chat.completions.with_raw_response.create(
        model="m", messages=HELLO
    )
    assert raw.retries_taken == 1
    assert raw.http_request.headers["x-stainless-retry-count"] == "1"
    assert raw.http_request.headers["authorization"] == f"Bearer {KEY}"
    assert server.stats.requests == 2


async def test_raw_and_streaming_responses_on_miss_and_hit(server, client):
    for who in (client, client.in_namespace("b")):
        raw = await who.chat.completions.with_raw_response.create(model="m", messages=HELLO)
        assert raw.status_code == 200
        assert info(raw).indices == (0,)
        assert (
            raw.parse().choices[0].message.content
            == json.loads(raw.content)["choices"][0]["message"]["content"]
        )
    for who in (client, client.in_namespace("b")):
        async with who.chat.completions.with_streaming_response.create(model="m", messages=HELLO) as response:
            data = b"".join([part async for part in response.iter_bytes()])
            assert json.loads(data)["object"] == "chat.completion"
        async with who.chat.completions.with_streaming_response.create(
            model="m", messages=HELLO, stream=True
        ) as response:
            assert (await read(await response.parse()))[0]
    assert server.stats.requests == 3


async def test_request_ids_of_the_provider_are_kept_on_a_miss(client):
    answer = await ask(client)
    raw = await client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
    assert raw.request_id == raw.headers.get("x-request-id")
    assert hasattr(answer, "_request_id")


class Word(BaseModel):
    word: str


async def test_parse_and_the_stream_helper(server, client):
    for who in (client, client.in_namespace("b")):
        server.settings = server.settings.updated({"max_tokens": 200})
        chat = who.chat if hasattr(who.chat.completions, "parse") else who.beta.chat  # before openai 1.92
        parsed = await chat.completions.parse(model="m", messages=HELLO, response_format=Word)
        assert isinstance(parsed.choices[0].message.parsed, Word)
        async with chat.completions.stream(model="m", messages=HELLO, response_format=Word) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Word)
    assert server.stats.requests == 2


@has_responses
async def test_responses_created_parsed_and_streamed(server, client):
    seen = []
    server.settings = server.settings.updated({"max_tokens": 200})
    for who in (client, client.in_namespace("b")):
        created = await who.responses.create(model="m", input="hello")
        events = [event async for event in await who.responses.create(model="m", input="hello", stream=True)]
        assert events[-1].type in {"response.completed", "response.incomplete"}
        async with who.responses.stream(model="m", input="hi") as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        seen.append((created.output_text, events[-1].response.output_text, final.output_text))
    assert seen[0] == seen[1]
    assert server.stats.requests == 3


@has_responses
async def test_concurrent_responses_are_calls_of_their_own(server, client):
    await asyncio.gather(*(client.responses.create(model="m", input="hello") for _ in range(3)))
    assert server.stats.requests == 3


async def test_completions_have_one_key_per_prompt(server, client):
    both = await client.completions.create(model="m", prompt=["Given a", "Return"], n=2)
    again = await client.in_namespace("b").completions.create(
        model="m", prompt=["Return", "Write", "Given a"], n=2
    )
    assert server.stats.requests == 2
    assert server.stats.samples_generated == 6
    of = [choice.text for choice in again.choices]
    assert of[4:] + of[:2] == [choice.text for choice in both.choices]
    assert [choice.index for choice in again.choices] == list(range(6))
    assert info(again).cached == (True, True, False, False, True, True)


async def test_a_list_that_is_answered_short_is_handed_on_and_not_kept(server, client):
    """Three choices for two samples of each of three prompts may be one of each, or the first three."""
    server.settings = server.settings.updated({"script": ({"kind": "short", "keep": 3},)})
    ask = {"model": "m", "prompt": ["0:", "1:", "2:"], "n": 2, "extra_body": {"echo": True}}
    short = await client.completions.create(**ask)
    assert [choice.text[:2] for choice in short.choices] == ["0:", "0:", "1:"]
    whole = await client.completions.create(**ask)
    assert [choice.text[:2] for choice in whole.choices] == ["0:", "0:", "1:", "1:", "2:", "2:"]
    assert info(whole).cached == (False,) * 6


async def test_embeddings_are_cached_per_item(server, client):
    first = await client.embeddings.create(model="m", input=["a", "b"])
    again = await client.in_namespace("x").embeddings.create(model="m", input=["b", "c", "a", "b"])
    assert server.stats.samples_generated == 3
    assert server.stats.requests == 2
    assert [item.index for item in again.data] == [0, 1, 2, 3]
    assert again.data[0].embedding == again.data[3].embedding == first.data[1].embedding
    assert again.data[2].embedding == first.data[0].embedding
    floats = await client.embeddings.create(model="m", input="a", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(first.data[0].embedding)
    assert server.stats.requests == 2


async def test_c4_a_read_only_cache_answers_the_items_that_it_has(server, tmp_path):
    options = {"base_url": server.base_url, "api_key": KEY, "max_retries": 0}
    async with AsyncOpenAI(**options, cache=tmp_path / "cache") as client:
        await client.embeddings.create(model="m", input=["a"])
    store = DiskStore(tmp_path / "cache", read_only=True)
    async with AsyncOpenAI(**options, cache=store) as client:
        answer = await client.embeddings.create(model="m", input=["a", "b"])
    assert info(answer).cached == (True, False)
    assert server.stats.samples_generated == 2
    store.close()


async def test_a_claim_that_finds_all_samples_leaves_nothing_to_the_garbage_collector(client):
    await ask(client)
    other = client.in_namespace("x")
    gc.collect()
    earlier = {id(one) for one in gc.get_objects() if isinstance(one, Exchange)}  # of other tests
    gc.disable()
    try:
        await ask(other)
        await asyncio.sleep(0)
        left = [one for one in gc.get_objects() if isinstance(one, Exchange) and id(one) not in earlier]
        assert left == []
    finally:
        gc.enable()


async def test_many_missing_items_travel_in_one_call(server, client):
    answer = await client.embeddings.create(model="m", input=[f"text {i}" for i in range(300)])
    assert len(answer.data) == 300
    assert server.stats.requests == 1


async def test_extra_body_is_part_of_the_key_and_transport_fields_are_not(server, client):
    await ask(client)
    await ask(client.in_namespace("b"), user="somebody", extra_headers={"x-irid": "1"})
    assert server.stats.requests == 1
    await ask(client.in_namespace("b"), extra_body={"top_k": 3})
    assert server.stats.requests == 2
    await ask(client.in_namespace("c"), extra_headers={"OpenAI-Beta": "x"})
    await ask(client.in_namespace("c"), extra_query={"api-version": "2"})
    assert server.stats.requests == 4


@has_responses
async def test_what_polls_the_server_is_not_cached(server, client):
    for _ in range(2):
        await client.responses.create(model="m", input="hello", extra_body={"background": True})
    assert server.stats.requests == 2


async def test_what_is_not_cached_passes_untouched(server, client):
    assert [model.id async for model in client.models.list()] == ["ngram-1", "ngram-1-embedding"]
    with using(mode="bypass"):
        await ask(client)
    assert info(await ask(client)).indices == (0,)


async def test_using_sets_namespace_request_id_and_mode(server, client):
    with using(namespace="n", request_id="a"):
        first = await ask(client)
        with using(request_id="b"):
            second = await ask(client)
    assert (info(first).namespace, info(first).request_id) == ("n", "a")
    assert (info(second).namespace, info(second).request_id) == ("n", "b")
    with using(mode="refresh", namespace="n", request_id="a"):
        assert info(await ask(client)).cached == (False,)
    with using(mode="replay", namespace="other", request_id="c"):
        assert info(await ask(client)).cached == (True,)


async def test_using_refuses_what_is_no_namespace_or_mode():
    with pytest.raises(TypeError, match="request_id must be a string"), using(request_id=3):
        pass
    with pytest.raises(ValueError, match="mode is one of"), using(mode="fast"):
        pass


async def test_replay_needs_no_key(server, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    async with AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=tmp_path) as client:
        stored = await ask(client, n=2)
    with pytest.raises(openai.OpenAIError):
        AsyncOpenAI(base_url=server.base_url, cache=tmp_path)
    async with AsyncOpenAI(base_url=server.base_url, cache=tmp_path, mode="replay") as client:
        assert texts(await ask(client, n=2)) == texts(stored)
        streamed = await read(await ask(client.with_options(timeout=3).in_namespace("b"), n=2, stream=True))
        assert streamed == texts(stored)
        with pytest.raises(CacheMiss, match="Something new"):
            await ask(client, messages=[{"role": "user", "content": "Something new"}])
    assert server.stats.requests == 1


@takes_callable_keys
async def test_a_callable_key_is_not_called_on_a_hit(server):
    calls = []

    async def key():
        calls.append(1)
        return KEY

    async with AsyncOpenAI(base_url=server.base_url, api_key=key, cache=MemoryStore()) as client:
        await ask(client)
        await ask(client.in_namespace("b"))
        await read(await ask(client.in_namespace("c"), stream=True))
    assert calls == [1]


async def test_no_key_is_stored(server, tmp_path):
    async with AsyncOpenAI(
        base_url=server.base_url.replace("http://", "http://someone:password@"),
        api_key=KEY,
        organization="org-secret",
        cache=tmp_path / "cache",
    ) as client:
        await ask(client, extra_headers={"x-secret": "secret-header"})
        await read(await ask(client, stream=True, extra_query={"api-key": "secret-query"}))
    files = [path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file()]  # noqa: ASYNC240 - the work is done
    assert any(b"sorts a list" in content for content in files)
    for secret in (KEY, "password", "org-secret", "secret-header", "secret-query"):
        assert not any(secret.encode() in content for content in files), secret


async def test_copies_share_connections_and_cache_and_are_equal_in_ours(client):
    twin = client.copy(timeout=3)
    assert twin._client is client._client
    assert twin._cachepipe == client._cachepipe
    assert twin.with_options(namespace="x")._cachepipe != client._cachepipe
    assert twin.copy(namespace="x").copy()._cachepipe.namespace == "x"
    assert twin.copy(namespace="x").copy(namespace=None)._cachepipe.namespace is None
    other = client.copy(cache=MemoryStore(), mode="refresh")
    assert other._cachepipe.shared_store is not client._cachepipe.shared_store
    assert other._cachepipe.mode == "refresh"


@pytest.mark.parametrize("name", ["__init__", "copy", "with_options"])
async def test_signatures_are_the_sdks_with_ours_last(name):
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (AsyncOpenAI, openai.AsyncOpenAI))
    names = list(ours.parameters)
    assert names[: len(theirs.parameters)] == list(theirs.parameters)
    assert names[len(theirs.parameters) :] == [
        "cache",
        "namespace",
        "mode",
        "scope",
        "repeat",
        "service",
        "replicate",
        "ordered",
        "budget",
    ]
    kinds = {parameter.kind for parameter in ours.parameters.values()} - {
        inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    hints = typing.get_type_hints(getattr(AsyncOpenAI, name))
    assert {"cache", "namespace", "mode", "timeout"} <= set(hints)


async def test_unknown_parameters_are_refused(server):
    with pytest.raises(TypeError, match="colour"):
        AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=MemoryStore(), colour="red")
    with pytest.raises(ValueError, match="mode is one of"):
        AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=MemoryStore(), mode="fast")
    with pytest.raises(TypeError, match="namespace must be a string"):
        AsyncOpenAI(base_url=server.base_url, api_key=KEY, cache=MemoryStore(), namespace=1)


async def test_models_are_copied_and_pickled_as_ever(client):
    answer = await ask(client)
    assert copy.copy(answer) == answer
    assert pickle.loads(pickle.dumps(answer)) == answer
    assert info(copy.copy(answer)) is None


async def test_what_the_caller_changes_meanwhile_changes_nothing(server, client):
    messages = [{"role": "user", "content": "Write"}]
    body = {"model": "m", "messages": messages}
    task = asyncio.create_task(
        client.post("/chat/completions", body=body, cast_to=openai.types.chat.ChatCompletion)
    )
    await asyncio.sleep(0)
    messages[0]["content"] = "Return " * 50
    answer = await task
    same = await client.in_namespace("b").chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Write"}]
    )
    assert same == answer
    assert answer.usage.prompt_tokens < 20


async def test_a_cancelled_call_is_undone(server, client):
    server.settings = server.settings.updated({"paused": True})
    for stream in (False, True):
        task = asyncio.create_task(ask(client, stream=stream))
        await server.until(lambda stats: stats.in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.until(lambda stats: stats.in_flight == 0)
    server.settings = server.settings.updated({"paused": False})
    assert info(await ask(client)).indices == (0,)


async def test_the_calls_run_in_the_callers_context(server, client):
    import contextvars  # noqa: PLC0415 - only here

    variable = contextvars.ContextVar("variable")
    seen = []

    async def hook(request):
        seen.append(variable.get(None))

    client._client.event_hooks["request"].append(hook)
    for value, stream in (("one", False), ("two", True)):
        variable.set(value)
        answer = await ask(client, stream=stream)
        if stream:
            await read(answer)
    assert seen == ["one", "two"]


async def test_the_sdk_still_has_what_the_clients_stand_on(client):
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    for name in NAMES:
        assert callable(getattr(openai.AsyncOpenAI, name)), name
    for name in ATTRIBUTES:
        assert hasattr(client, name), name


async def test_the_request_id_of_a_hit_is_that_of_the_call_which_made_it(server, client):
    first = await ask(client)
    other = await ask(client, temperature=0.1)
    again = client.in_namespace("again")
    assert first._request_id
    assert (await ask(again))._request_id == first._request_id
    assert (await ask(again, n=2))._request_id != first._request_id  # its first sample is another call's
    raw = await again.chat.completions.with_raw_response.create(model="m", messages=HELLO, temperature=0.1)
    assert raw.request_id == other._request_id != first._request_id
    stream = await client.in_namespace("streamed").chat.completions.create(
        model="m", messages=HELLO, stream=True
    )
    assert stream.response.headers["x-request-id"] == first._request_id
    assert server.stats.requests == 3


def answering(*answers):
    """An HTTP client that gives these answers, the last one for ever, and what it was asked."""
    library = library_of(openai.AsyncOpenAI(api_key=KEY))
    asked = []

    def answer(request):
        asked.append(request)
        made = answers[min(len(asked), len(answers)) - 1]
        return made if isinstance(made, library.Response) else library.Response(200, json=made)

    return library.AsyncClient(transport=library.MockTransport(answer)), asked


EMPTY = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": []}


async def test_an_answer_of_nothing_is_handed_on_as_the_sdk_would_and_not_kept():
    http, asked = answering(EMPTY)
    async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
        for _ in range(2):
            assert (await ask(client)).choices == []
        assert len(asked) == 2


async def test_c8_an_answer_that_used_tokens_and_holds_no_choice_is_asked_for_again():
    usage = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "here"}}
    http, asked = answering({**EMPTY, "usage": usage}, {**EMPTY, "usage": usage, "choices": [choice]})
    async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
        assert texts(await ask(client)) == ["here"]
        assert len(asked) == 2
    http, asked = answering({**EMPTY, "usage": usage})
    async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
        answer = await ask(client)
        assert answer.choices == []
        assert info(answer) is None
        assert len(asked) == 3


@pytest.mark.parametrize("wanted", [True, False])
async def test_only_the_usage_is_taken_out_of_a_chunk_that_brings_more(wanted):
    head = {**EMPTY, "object": "chat.completion.chunk"}
    choice = {"index": 0, "delta": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    chunks = [{**head, "choices": [choice]}, {**head, "usage": usage, "report": {"flagged": False}}]
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    library = library_of(openai.AsyncOpenAI(api_key=KEY))
    answer = b"".join([*events, b"data: [DONE]\n\n"])
    http, asked = answering(
        library.Response(200, content=answer, headers={"content-type": "text/event-stream"})
    )
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
        for who in (client, client.in_namespace("b")):
            got = [chunk async for chunk in await ask(who, stream=True, **options)]
            told = [chunk.model_extra["report"] for chunk in got if "report" in chunk.model_extra]
            assert told == [{"flagged": False}]
            assert any(chunk.usage is not None for chunk in got) is wanted
        assert (await ask(client.in_namespace("c"))).usage.total_tokens == 2
    assert len(asked) == 1


@pytest.mark.parametrize(("framed", "paid"), [(True, 1), (False, 2)])
async def test_c7_a_stream_without_done_is_stored_only_if_its_body_ended_in_order(framed, paid):
    chunk = {**EMPTY, "object": "chat.completion.chunk"}
    chunk["choices"] = [{"index": 0, "delta": {"content": "hello"}, "finish_reason": "stop"}]
    library = library_of(openai.AsyncOpenAI(api_key=KEY))
    calls = []

    def answer(request):
        calls.append(request)
        content = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        made = library.Response(200, content=content, headers={"content-type": "text/event-stream"})
        if not framed:
            del made.headers["content-length"]
        return made

    http = library.AsyncClient(transport=library.MockTransport(answer))
    async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
        for who in (client, client.in_namespace("b")):
            async for got in await ask(who, stream=True):
                assert got.choices[0].delta.content in ("hello", "", None)
    assert len(calls) == paid


async def test_a_stream_is_closed_soon_after_its_terminal_event_and_at_once_for_a_leaving_reader():
    chunk = {**EMPTY, "object": "chat.completion.chunk"}
    chunk["choices"] = [{"index": 0, "delta": {"content": "hello"}, "finish_reason": None}]

    async def body(over, *, stall):
        yield b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
        try:
            if stall:
                await asyncio.get_running_loop().create_future()
        finally:
            over.set()

    for stall in (False, True):
        over = asyncio.Event()
        library = library_of(openai.AsyncOpenAI(api_key=KEY))
        upstream = library.Response(
            200, content=body(over, stall=stall), headers={"content-type": "text/event-stream"}
        )
        http, _ = answering(upstream)
        async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
            stream = await ask(client, stream=True)
            async for _ in stream:
                break
            await stream.close()
            await over.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            assert upstream.is_closed


async def test_c6_merged_samples_are_flagged_as_the_pipeline_flags_them(server, client):
    answers = await asyncio.gather(ask(client, n=2), ask(client), ask(client, temperature=0.5))
    assert [info(answer).duplicated for answer in answers] == [(False, True), (True,), (False,)]
    again = client.in_namespace("again")
    assert info(await ask(again, n=2)).duplicated == (False, True)
    assert info(await ask(again)).duplicated == (False,)


async def test_saved_money_is_told_where_the_price_is_known():
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "here"}}
    for model, cost in (("gpt-4o-mini", 1000 * 0.15e-6 + 100 * 0.6e-6), ("of-our-own", None)):
        http, _ = answering({**EMPTY, "model": model, "usage": usage, "choices": [choice]})
        async with AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=http) as client:
            first = info(await ask(client))
            again = info(await ask(client.in_namespace("b")))
        assert first.as_asked_cost == again.as_asked_cost == (None if cost is None else pytest.approx(cost))
        assert first.billed_cost == again.saved_cost == first.as_asked_cost
        assert (first.saved_cost, again.billed_cost) == ((None, 0) if cost is None else (0, 0))
        assert again.saved["total_tokens"] == 1100


@pytest.mark.skipif(library_of(openai.AsyncOpenAI(api_key=KEY)) is httpx, reason="this SDK runs on httpx")
async def test_a_legacy_http_client_is_taken_as_by_the_sdk(server):
    async with AsyncOpenAI(
        base_url=server.base_url, api_key=KEY, cache=MemoryStore(), http_client=httpx.AsyncClient()
    ) as client:
        first, streamed = await ask(client), await read(await ask(client, stream=True))
        again = client.in_namespace("again")
        assert await ask(again) == first
        assert await read(await ask(again, stream=True)) == streamed
        other = client.in_namespace("raw").chat.completions
        raw = await other.with_raw_response.create(model="m", messages=HELLO)
        assert type(raw.http_response) is httpx.Response
        assert raw.parse() == first
    assert server.stats.requests == 2


async def test_c4_concurrent_streams_of_one_question_share_a_call(server, client):
    streamed, usage = {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}
    chunks = []

    async def one(**options):
        read = [chunk async for chunk in await ask(client, **options)]
        chunks.append([chunk.usage for chunk in read if chunk.usage])
        return [
            "".join(c.delta.content or "" for chunk in read for c in chunk.choices if c.index == index)
            for index in range(options.get("n", 1))
        ]

    told = await asyncio.gather(one(**streamed), one(**usage, n=2), ask(client), one(**streamed))
    assert [entry.n for entry in server.stats.log] == [5]
    assert sorted(map(len, chunks)) == [0, 0, 1]
    again = client.in_namespace("again")
    whole = texts(await ask(again, n=5))
    assert [told[0] + told[1] + texts(told[2]) + told[3]] == [whole]
    assert server.stats.requests == 1


async def test_a_stream_of_stored_and_missing_samples_is_one_stream(server, client):
    first = texts(await ask(client, n=2))
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 4}
    chunks = [chunk async for chunk in await ask(client.in_namespace("more"), **options)]
    assert [entry.n for entry in server.stats.log] == [2, 2]
    said = dict.fromkeys(range(4), "")
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert [said[0], said[1]] == first
    assert all(said.values())
    (used,) = [chunk.usage for chunk in chunks if chunk.usage]
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1, 2, 3]
    assert texts(await ask(client.in_namespace("whole"), n=4)) == list(said.values())


async def test_an_idle_connection_that_the_server_has_closed_is_noticed():
    """Idle connections are probed in a way of our own: it must see what the pool's own sees."""
    message = {"role": "assistant", "content": "A"}
    answer = json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
    ).encode()
    closed: list[asyncio.Future[None]] = []

    async def serve(reader, writer):
        end = asyncio.get_running_loop().create_future()
        closed.append(end)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()
        await end
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        async with AsyncOpenAI(base_url=url, api_key=KEY, cache=MemoryStore(), max_retries=0) as client:
            await ask(client)
            [idle] = client._client._transport._pool.connections
            assert idle.is_idle()
            assert not idle.has_expired()
            closed[0].set_result(None)
            while not idle.has_expired():  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0)
            await ask(client)  # on a connection of its own, as without retries the old one would fail it
            assert len(closed) == 2
            closed[1].set_result(None)


def test_probes_are_eased_with_tls_too_and_of_the_sdks_own_http_client_only():
    """What stands behind a connection is looked up once; a client that the caller made is left alone."""
    ours, theirs = socket.socketpair()

    class Stream:
        asked = 0

        def get_extra_info(self, info):
            type(self).asked += 1
            return ours if info == "socket" else f"the {info}"

        async def start_tls(self, *arguments):
            assert arguments == ("a context", "a name")
            return Stream()

    with ours, theirs:
        for stream in (eased(Stream()), asyncio.run(eased(Stream()).start_tls("a context", "a name"))):
            Stream.asked = 0
            assert stream.get_extra_info("is_readable") is False
            assert Stream.asked == 0
            assert stream.get_extra_info("server_addr") == "the server_addr"
        theirs.send(b"x")
        assert stream.get_extra_info("is_readable") is True
    assert stream.get_extra_info("is_readable") is True  # closed here

    def is_eased(client):
        return "connect_tcp" in vars(client._client._transport._pool._network_backend)

    made = AsyncOpenAI(api_key=KEY, cache=MemoryStore())
    assert is_eased(made)
    assert is_eased(made.copy())
    assert not is_eased(openai.AsyncOpenAI(api_key=KEY))
    own = openai.DefaultAsyncHttpxClient()
    assert not is_eased(AsyncOpenAI(api_key=KEY, cache=MemoryStore(), http_client=own))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_larger_than_what_is_kept_is_the_callers_alone(
    server, client, monkeypatch, stream, until
):
    monkeypatch.setattr("cachepipe.providers.generation.max_answer", lambda: 300)
    for _ in range(2):
        answer = await ask(client, stream=stream)
        assert len((await read(answer) if stream else texts(answer))[0]) > 20
    store = client._cachepipe.shared_store.store
    await until(lambda: store.totals()["pending"] == 0)  # the recorder gives the draw up
    assert store.totals()["samples"] == 0
    assert server.stats.requests == 2


async def test_the_rest_of_a_stream_that_is_too_large_is_not_read_once_its_reader_left(
    server, client, monkeypatch
):
    monkeypatch.setattr("cachepipe.providers.generation.max_answer", lambda: 300)
    number = 0
    async with await ask(client, stream=True) as stream:
        async for _ in stream:
            number += 1
            if number == 4:
                break
    await asyncio.to_thread(server.wait_until, lambda stats: stats.in_flight == 0)
    assert client._cachepipe.shared_store.store.totals()["draws"] == 0
