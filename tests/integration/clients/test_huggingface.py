"""Hugging Face's inference clients: every cached task in every way, and what the SDK does besides."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import threading
import warnings
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OverloadedError

import cachepipe
from cachepipe import Budget, CacheMiss, MemoryStore, Services, UnknownCost, wire
from cachepipe.clients import AsyncHuggingFace, AsyncOpenAI, HuggingFace, OpenAI
from cachepipe.providers.info import info
from cachepipe.sdk import internals
from cachepipe.sdk.huggingface import _api_of
from cachepipe.sdk.mixins import OURS
from cachepipe.sdk.wrapping import wrap
from cachepipe.stores.base import Store
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
PIPELINE = "/models/org/tiny/pipeline/feature-extraction"

# The task, where the client asks it, its arguments, and which of these share samples.
WAYS = {
    "chat": ("chat_completion", "/v1", {"messages": HELLO}, "chat"),
    "chat streamed": ("chat_completion", "/v1", {"messages": HELLO, "stream": True}, "chat"),
    "chats": ("chat_completion", "/v1", {"messages": HELLO, "n": 2}, "chats"),
    "tool": (
        "chat_completion",
        "/v1",
        {"messages": HELLO, "tools": [TOOL], "tool_choice": "required"},
        "tool",
    ),
    "tool streamed": (
        "chat_completion",
        "/v1",
        {"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "stream": True},
        "tool",
    ),
    "json": (
        "chat_completion",
        "/v1",
        {
            "messages": HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}},
        },
        "json",
    ),
    "text": ("text_generation", "/models/org/tiny", {"prompt": "Sort"}, "text"),
    "text streamed": ("text_generation", "/models/org/tiny", {"prompt": "Sort", "stream": True}, "text"),
    "details": ("text_generation", "/models/org/tiny", {"prompt": "Sort", "details": True}, "details"),
    "details streamed": (
        "text_generation",
        "/models/org/tiny",
        {"prompt": "Sort", "details": True, "stream": True},
        "details",
    ),
    "grammar": (
        "text_generation",
        "",
        {"prompt": "Sort", "grammar": {"type": "json", "value": SCHEMA}, "max_new_tokens": 20},
        "grammar",
    ),
    "embedding": ("feature_extraction", PIPELINE, {"text": "a"}, "embedding"),
    "embeddings": ("feature_extraction", "/embed", {"text": ["a", "b"]}, "embeddings"),
}
PAIRS = [(one, other) for one in WAYS for other in WAYS if one != other and WAYS[one][3] == WAYS[other][3]]


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def listed(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


async def asked(client, way, **more):
    """The result of a task, of a stream all that came."""
    task, path, arguments, _ = WAYS[way]
    client = client.copy(model=client.model + path)
    made = await settled(getattr(client, task)(**arguments, **more))
    if inspect.isgenerator(made) or inspect.isasyncgen(made):
        return await listed(made)
    return made


def told(result):
    """What a result says, whether it was streamed or not."""
    if isinstance(result, np.ndarray):
        return result.tolist()
    if isinstance(result, str):
        return result
    if hasattr(result, "generated_text"):
        return [result.generated_text, [token.text for token in result.details.tokens]]
    if hasattr(result, "choices"):
        return [_message(choice.message) for choice in result.choices]
    if isinstance(result[0], str):
        return "".join(result)
    if hasattr(result[0], "token"):
        return [result[-1].generated_text, [event.token.text for event in result]]
    deltas = [choice.delta for chunk in result for choice in chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    text = "".join(delta.content or "" for delta in deltas)
    arguments = "".join(call["function"]["arguments"] for call in calls)
    return [(text, [(calls[0]["function"]["name"], json.loads(arguments))] if calls else [])]


def _message(message):
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.tool_calls or ()
    ]
    return (message.content or "", calls)


@pytest.fixture(scope="module")
def running():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=60)) as server:
        yield server


@pytest.fixture
def server(running):
    running.stats.reset()
    running.settings = MockSettings(seed=1, max_tokens=60)
    return running


@pytest.fixture(params=[HuggingFace, AsyncHuggingFace], ids=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture
async def client(server, kind):
    made = kind(server.url, token="hf_secret", cache=MemoryStore())
    yield made
    await settled(made.close())


@pytest.mark.parametrize("way", WAYS)
async def test_a_rerun_says_the_same_and_asks_nothing(server, client, way):
    first = await asked(client, way)
    calls, samples = server.stats.requests, server.stats.samples_generated
    assert told(first)
    assert calls == 1
    with cachepipe.run():
        assert told(await asked(client, way)) == told(first)
    again = await asked(client.in_namespace("b"), way)
    assert told(again) == told(first)
    assert type(again) is type(first)
    assert (server.stats.requests, server.stats.samples_generated) == (calls, samples)
    await asked(client, way)  # the second time in this run: a draw of its own
    function = way.startswith("embedding")
    assert server.stats.samples_generated == (samples if function else 2 * samples)


@pytest.mark.parametrize(("one", "other"), PAIRS)
async def test_streamed_and_unstreamed_share_samples(server, client, one, other):
    first = told(await asked(client, one))
    assert told(await asked(client.in_namespace("b"), other)) == first
    assert server.stats.requests == 1


async def test_a_call_as_openai_writes_it_is_the_same(server, client):
    client = client.copy(model=f"{client.model}/v1")
    first = await settled(client.chat.completions.create(messages=HELLO))
    assert await settled(client.in_namespace("b").chat_completion(HELLO)) == first
    assert server.stats.requests == 1


async def test_a_larger_n_buys_what_lacks(server, client):
    first = told(await asked(client, "chat"))
    [one, *rest] = told(await asked(client.in_namespace("b"), "chat", n=3))
    assert [one] == first
    assert len({text for text, _ in (one, *rest)}) == 3
    assert server.stats.samples_generated == 3


async def test_c10_openai_and_hugging_face_share_chats(server, kind):
    store = MemoryStore()
    client = kind(f"{server.url}/v1", token="hf_secret", cache=store)
    first = await settled(client.chat_completion(HELLO, model="m", temperature=0.5))
    openai = (OpenAI if kind is HuggingFace else AsyncOpenAI)(
        base_url=server.base_url, api_key="k", cache=store, namespace="b"
    )
    again = await settled(openai.chat.completions.create(model="m", messages=HELLO, temperature=0.5))
    assert again.choices[0].message.content == first.choices[0].message.content
    assert server.stats.requests == 1
    await settled(openai.close())
    await settled(client.close())


async def test_texts_of_a_list_are_bought_once(server, client):
    client = client.copy(model=f"{server.url}/embed")
    one = await settled(client.feature_extraction(["a", "b"]))
    other = await settled(client.feature_extraction(["c", "b"]))
    assert one.shape == other.shape
    assert (one[1] == other[1]).all()
    assert server.stats.samples_generated == 3


@pytest.mark.parametrize(
    ("task", "path", "api"),
    [
        ("conversational", "/v1/chat/completions", wire.CHAT),
        ("conversational", "/v2/chat", None),
        ("text-generation", "/v1/completions", wire.COMPLETIONS),
        ("text-generation", "/generate", wire.GENERATE_TEXT),
        ("text-generation", "", wire.TEXT_GENERATION),
        ("feature-extraction", "/models/org/tiny", wire.FEATURE_EXTRACTION),  # not what the path tells
        ("feature-extraction", "/v1/embeddings", wire.EMBEDDINGS),
        ("summarization", "/models/org/tiny", None),
    ],
)
def test_the_task_and_the_url_tell_the_api(task, path, api):
    parameters = SimpleNamespace(task=task, url=f"http://host{path}", data=None)
    assert _api_of(parameters) is api
    parameters.data = b"audio"
    assert _api_of(parameters) is None


async def test_info_tells_where_the_samples_came_from(server, client):
    client = client.copy(model=f"{server.url}/v1")
    answer = await settled(client.chat_completion(HELLO))
    assert info(answer).cached == (False,)
    assert info(answer).billed["completion_tokens"] == answer.usage.completion_tokens
    stream = await settled(client.in_namespace("b").chat_completion(HELLO, stream=True))
    await listed(stream)
    assert info(stream).cached == (True,)
    vector = await settled(client.copy(model=f"{server.url}{PIPELINE}").feature_extraction("a"))
    assert info(vector).cached == (False,)
    assert info(vector).key != info(answer).key


async def test_c8_errors_are_those_of_the_sdk_and_are_not_cached(server, kind, client):
    """The same scripted errors, seen by the SDK's client and by ours; then the answer is bought."""
    seen = []
    plain = (InferenceClient if kind is HuggingFace else AsyncInferenceClient)(server.url, token="hf_secret")
    for who in (plain, client):
        server.settings = MockSettings(script=["rate_limit", "error"], seed=1)
        for _ in range(2):
            with pytest.raises((HfHubHTTPError, OverloadedError)) as caught:
                await settled(who.chat_completion(HELLO))
            seen.append((type(caught.value), caught.value.response.status_code))
        server.settings = MockSettings(script=["rate_limit"], seed=1)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the SDK's own kinds are compared
            await settled(who.text_generation("Sort"))
        seen.append((type(caught.value), str(caught.value)))
    await settled(plain.close())
    assert seen[:3] == seen[3:]
    assert await settled(client.text_generation("Sort"))


async def test_a_time_out_is_that_of_the_sdk_and_the_retry_is_the_same_draw(server, kind, client):
    server.settings = MockSettings(paused=True, seed=1)
    plain = (InferenceClient if kind is HuggingFace else AsyncInferenceClient)(server.url, timeout=0.05)
    seen = []
    for who in (plain, client.copy(timeout=0.05)):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - version 1.0 raises one of the HTTP library
            await settled(who.chat_completion(HELLO))
        seen.append(type(caught.value))
    await settled(plain.close())
    assert seen[0] is seen[1]
    assert "Timeout" in seen[0].__name__
    server.settings = MockSettings(seed=1)
    answer = await settled(client.chat_completion(HELLO))
    assert told(await settled(client.in_namespace("b").chat_completion(HELLO))) == told(answer)


async def test_c7_the_rest_of_a_stream_that_its_reader_leaves_is_stored(server, kind):
    client = kind(f"{server.url}/v1", cache=(store := MemoryStore()))
    stream = await settled(client.chat_completion(HELLO, stream=True))
    if kind is HuggingFace:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        stream.close()
    else:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.aclose()
    await settled(client.close())
    again = kind(f"{server.url}/v1", cache=store, namespace="b")
    assert told(await settled(again.chat_completion(HELLO)))
    assert server.stats.requests == 1
    await settled(again.close())


async def test_c8_the_retry_of_a_cancelled_stream_is_the_same_draw(server):
    server.settings = MockSettings(stream_delay=0.02, max_tokens=8, seed=1)
    async with AsyncHuggingFace(f"{server.url}/v1", cache=MemoryStore()) as client:
        said, begun = [], asyncio.Event()

        async def read():
            async for chunk in await client.chat_completion(HELLO, stream=True):
                said.append(chunk.choices[0].delta.content or "")
                if said[-1]:
                    begun.set()

        reader = asyncio.create_task(read())
        await begun.wait()
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()
        [(text, _)] = told(await client.chat_completion(HELLO))
    assert text.startswith("".join(said))
    assert server.stats.requests == 1


@pytest.mark.parametrize("fault", ["cut", "truncate", "malformed"])
@pytest.mark.parametrize("way", ["chat streamed", "text streamed"])
async def test_c7_a_broken_stream_is_not_cached(server, client, way, fault):
    server.settings = MockSettings(script=[fault], seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # the SDK has no error of its own for some of these
            await asked(client, way)
    with cachepipe.run():
        assert told(await asked(client, way))
    assert server.stats.requests == 2


async def test_equal_calls_in_flight_are_merged(server):
    async with AsyncHuggingFace(f"{server.url}/v1", cache=MemoryStore()) as client:
        answers = await asyncio.gather(*(client.chat_completion(HELLO) for _ in range(4)))
    assert len({told(answer)[0][0] for answer in answers}) == 4
    assert (server.stats.requests, server.stats.samples_generated) == (1, 4)


async def test_a_client_serves_threads(server):
    with HuggingFace(f"{server.url}/v1", cache=MemoryStore()) as client:
        texts = []

        def work():
            texts.extend(told(client.chat_completion(HELLO))[0][0] for _ in range(3))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        with cachepipe.run():
            again = [told(client.chat_completion(HELLO))[0][0] for _ in range(18)]
    assert sorted(again) == sorted(texts)
    assert server.stats.samples_generated == 18


async def test_ordered_answers_and_a_synchronous_client_that_refuses_them(server):
    async with AsyncHuggingFace(f"{server.url}/v1", cache=MemoryStore(), ordered=True) as client:
        answers = await asyncio.gather(*(client.chat_completion(HELLO, seed=seed) for seed in range(3)))
        with cachepipe.run():
            again = await asyncio.gather(*(client.chat_completion(HELLO, seed=seed) for seed in range(3)))
    assert again == answers
    assert server.stats.requests == 3
    with pytest.raises(ValueError, match="cannot hand over its answers in order"):
        HuggingFace(server.url, cache=MemoryStore(), ordered=True)


async def test_copies_and_namespaces_share_what_they_should(client):
    twin = client.copy(timeout=3, namespace="b", headers={"x-a": "1"})
    assert (twin.timeout, twin.headers, twin._cachepipe.namespace) == (3, {"x-a": "1"}, "b")
    assert (client.timeout, client._cachepipe.namespace) == (None, None)
    assert copy.copy(client)._cachepipe is client._cachepipe
    assert client.in_replicate(3)._cachepipe.replicate == 3
    assert client.copy(cache=MemoryStore())._cachepipe.shared_store is not client._cachepipe.shared_store
    with pytest.raises(TypeError, match=r"copy\(\) takes no max_retries; it takes model"):
        client.copy(max_retries=1)


async def test_a_replay_makes_no_call_and_needs_no_token(server, kind, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    store = MemoryStore()
    client = kind(server.url, token="hf_secret", cache=store)
    first = {way: told(await asked(client, way)) for way in ("chat", "text streamed", "embeddings")}
    await settled(client.close())
    calls = server.stats.requests
    replay = kind(server.url, cache=store, mode="replay")
    assert {way: told(await asked(replay, way)) for way in first} == first
    with pytest.raises(CacheMiss):
        await asked(replay, "chats")
    routed = kind("org/tiny", cache=store, mode="replay")
    with pytest.raises(CacheMiss, match="router"):  # the hub's router would get it
        await settled(routed.chat_completion(HELLO))
    assert server.stats.requests == calls
    await settled(replay.close())
    await settled(routed.close())


async def test_modes_budgets_and_services(server, kind):
    store = MemoryStore()
    bypass = kind(f"{server.url}/v1", cache=store, mode="bypass")
    one, other = [told(await settled(bypass.chat_completion(HELLO))) for _ in range(2)]
    assert one != other
    assert server.stats.requests == 2
    with pytest.raises(UnknownCost, match="was not made"):
        await settled(bypass.copy(budget=Budget(1.0)).chat_completion(HELLO))
    service = Services.OpenAI(base_url=server.base_url, api_key="k")
    server.settings = MockSettings(script=["error"], seed=1)
    limited = kind(f"{server.url}/v1", cache=store, service=service)
    assert told(await settled(limited.chat_completion(HELLO)))  # the service has made it again
    assert server.stats.requests == 4
    for made in (bypass, limited):
        await settled(made.close())
    await service.close()


async def test_the_token_is_in_no_key(server, kind):
    store: Store = MemoryStore()
    keys = set()
    for token in ("hf_one", "hf_two"):
        client = kind(f"{server.url}/v1", token=token, cache=store, headers={"x-any": token})
        keys.add(info(await settled(client.in_namespace(token).chat_completion(HELLO))).key)
        await settled(client.close())
    assert len(keys) == 1
    assert server.stats.requests == 1


async def test_a_wrapped_client_is_cached(server, kind):
    plain = (InferenceClient if kind is HuggingFace else AsyncInferenceClient)(f"{server.url}/v1", timeout=7)
    client = wrap(plain, cache=MemoryStore(), namespace="a")
    assert isinstance(client, type(plain))
    assert client.timeout == 7
    first = await settled(client.chat_completion(HELLO))
    assert await settled(client.in_namespace("b").chat_completion(HELLO)) == first
    assert info(await settled(plain.chat_completion(HELLO))) is None
    assert server.stats.requests == 2
    with pytest.raises(TypeError, match="has a cache already"):
        wrap(client)
    plain._inner_post = lambda *_, **__: None
    with pytest.raises(TypeError, match="the method _inner_post of this one was replaced"):
        wrap(plain, cache=MemoryStore())
    await settled(client.close())


async def test_other_tasks_work_as_in_the_sdk(server, client):
    """The server has no such task; the error is that of the SDK, and nothing is cached."""
    client = client.copy(model=f"{server.url}/nowhere")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="404"):
            await settled(client.summarization("a text"))
    assert server.stats.requests == 2


def test_the_signature_is_that_of_the_sdk_and_ours(kind):
    sdk = InferenceClient if kind is HuggingFace else AsyncInferenceClient
    ours = inspect.signature(kind).parameters
    assert list(inspect.signature(sdk).parameters) == list(ours)[: -len(OURS)]
    assert list(ours)[-len(OURS) :] == list(OURS)
    for name in ("chat_completion", "text_generation", "feature_extraction"):
        assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(sdk, name))
    with pytest.raises(TypeError, match="takes no cachedir="):
        kind("m", cachedir="x")


def test_the_sdk_still_has_what_the_clients_stand_on():
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    for kind in (InferenceClient, AsyncInferenceClient):
        for name in internals.HUB_NAMES:
            assert callable(getattr(kind, name)), name
        assert list(inspect.signature(kind._inner_post).parameters) == [
            "self",
            "request_parameters",
            "stream",
        ]
    assert callable(AsyncInferenceClient._get_async_client)
    fields = huggingface_hub.inference._common.RequestParameters.__dataclass_fields__
    assert set(internals.HUB_FIELDS) <= set(fields)
    assert callable(huggingface_hub.get_session)
