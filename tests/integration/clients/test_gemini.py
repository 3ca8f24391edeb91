"""Gemini's clients: chats, several candidates, streams, tools, structured output, embeddings and errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import requests  # noqa: F401 - the SDK looks into it, and fails if a first import was interrupted
from google import genai
from google.genai import errors, types
from pydantic import BaseModel

import cachepipe
from cachepipe import BudgetExceeded, CacheMiss, MemoryStore, Services
from cachepipe.clients import AsyncGemini, Gemini
from cachepipe.errors import StageClosed
from cachepipe.providers.info import info
from cachepipe.sdk import internals
from cachepipe.testing import MockSettings

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning"),
]
MODEL = "gemini-2.5-flash"
HELLO = "Write a function that sorts a list."


class Word(BaseModel):
    word: str
    count: int


@pytest.fixture
def make(server):
    """Make a client of the mock server; by default in a new cache."""
    with contextlib.ExitStack() as opened:

        def client(kind=Gemini, *, close=True, **options):
            options.setdefault("cache", MemoryStore())
            http_options = {"base_url": server.url, **options.pop("http_options", {})}
            made = kind(api_key="k", http_options=http_options, **options)
            if close and kind is Gemini:
                opened.callback(made.close)
            return made

        yield client


def ask(client, contents=HELLO, **config):
    return client.models.generate_content(model=MODEL, contents=contents, config=config or None)


def stream(client, contents=HELLO, **config):
    return client.models.generate_content_stream(model=MODEL, contents=contents, config=config or None)


def texts(response):
    return [candidate.content.parts[0].text for candidate in response.candidates]


def joined(chunks):
    return "".join(chunk.text or "" for chunk in chunks)


def test_a_client_is_the_sdks_own_and_a_second_namespace_repeats_the_first(make, server):
    client = make(namespace="a")
    assert isinstance(client, genai.Client)
    assert isinstance(client.aio, genai.client.AsyncClient)
    first = ask(client)
    assert type(first) is types.GenerateContentResponse
    assert info(first).cached == (False,)
    assert info(first).billed["total_tokens"] == first.usage_metadata.total_token_count
    hit = ask(client.in_namespace("b"))
    assert hit.model_dump(exclude={"sdk_http_response"}) == first.model_dump(exclude={"sdk_http_response"})
    assert (info(hit).cached, info(hit).namespace, info(hit).saved) == ((True,), "b", info(first).billed)
    assert ask(client).text != first.text
    assert server.stats.requests == 2


@pytest.mark.parametrize(
    "contents",
    [
        [HELLO],
        types.Part(text=HELLO),
        [types.Part.from_text(text=HELLO)],
        types.Content(role="user", parts=[types.Part(text=HELLO)]),
        [{"role": "user", "parts": [{"text": HELLO}]}],
    ],
    ids=["list", "part", "parts", "content", "dictionary"],
)
def test_c9_contents_in_all_forms_have_one_key(make, server, contents):
    client = make()
    first = ask(client)
    other = ask(client.in_namespace("b"), contents)
    assert info(other).key == info(first).key
    assert other.text == first.text
    assert server.stats.requests == 1


def test_c9_what_the_model_is_shown_counts_and_what_it_is_not_shown_does_not(make):
    client = make()
    picture = types.Part.from_bytes(data=b"\x89PNG", mime_type="image/png")
    uploaded = types.Part.from_uri(file_uri="https://files/abc", mime_type="image/png")
    tool = types.Tool(function_declarations=[{"name": "f", "description": "Add."}])
    asked = [
        ask(client),
        ask(client, [HELLO, picture]),
        ask(client, [HELLO, uploaded]),
        ask(client, temperature=0.5),
        ask(client, system_instruction="Be brief."),
        ask(client, thinking_config={"include_thoughts": True}),
        ask(client, tools=[tool]),
        ask(client, seed=1),
        client.models.generate_content(model="gemini-2.5-pro", contents=HELLO),
    ]
    assert len({info(each).key for each in asked}) == len(asked)
    same = [ask(client, candidate_count=1), ask(client, candidate_count=2), ask(client, service_tier="flex")]
    assert {info(each).key for each in same} == {info(asked[0]).key}


def test_n_candidates_come_in_one_call_and_are_topped_up(make, server):
    client = make()
    two = ask(client, candidate_count=2)
    assert len(set(texts(two))) == 2
    more = ask(client.in_namespace("b"), candidate_count=3)
    assert texts(more)[:2] == texts(two)
    assert info(more).cached == (True, True, False)
    assert [candidate.index for candidate in more.candidates] == [0, 1, 2]
    assert (server.stats.requests, server.stats.samples_generated) == (2, 3)
    usage = more.usage_metadata
    assert usage.total_token_count == usage.prompt_token_count + usage.candidates_token_count


@pytest.mark.parametrize("count", [1, 2])
def test_c10_streams_and_whole_answers_share_samples(make, server, count):
    config = {} if count == 1 else {"candidate_count": count}
    client = make(namespace="a")
    chunks = list(stream(client, **config))
    said = dict.fromkeys(range(count), "")
    for chunk in chunks:
        for candidate in chunk.candidates:
            said[candidate.index] += candidate.content.parts[0].text
    assert texts(ask(client.in_namespace("b"), **config)) == [*said.values()]
    replayed = list(stream(client.in_namespace("c"), **config))
    assert joined(replayed) == "".join(said.values()) or count > 1
    assert replayed[-1].usage_metadata == chunks[-1].usage_metadata
    assert replayed[-1].candidates[0].finish_reason == chunks[-1].candidates[0].finish_reason
    assert info(chunks[0]) == info(chunks[-1])
    assert info(chunks[-1]).cached == (False,) * count
    assert info(replayed[-1]).cached == (True,) * count
    assert server.stats.requests == 1


@pytest.mark.parametrize("library", ["aiohttp", "httpx2"])
async def test_the_asynchronous_half_shares_everything(make, server, library):
    pytest.importorskip(library)
    store = MemoryStore()
    first = ask(make(cache=store, namespace="a"))
    async with contextlib.AsyncExitStack() as opened:
        own = {}
        if library == "httpx2":  # google-genai prefers aiohttp where it is installed
            own["httpx_async_client"] = await opened.enter_async_context(httpx2.AsyncClient())
        client = make(AsyncGemini, cache=store, namespace="b", http_options=own)
        await opened.enter_async_context(client)
        assert isinstance(client, genai.client.AsyncClient)
        assert (await ask(client)).text == first.text
        assert (await ask(client.aio.in_namespace("c"))).text == first.text
        new = [chunk async for chunk in await stream(client)]
        assert info(new[-1]).cached == (False,)
    with make(cache=store, namespace="d", close=False) as client:
        assert [ask(client).text, ask(client).text] == [first.text, joined(new)]
    assert server.stats.requests == 2


async def test_concurrent_equal_requests_travel_in_one_call(make, server):
    async with make(AsyncGemini) as client:
        answers = await asyncio.gather(*(ask(client) for _ in range(5)))
    assert len({answer.text for answer in answers}) == 5
    assert (server.stats.requests, server.stats.samples_generated) == (1, 5)


def test_threads_share_a_client(make, server):
    client = make()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: ask(client, f"{HELLO} {number % 4}"), range(16)))
    assert len({answer.text for answer in answers}) == 16
    assert server.stats.samples_generated == 16


def test_chats_are_cached(make, server):
    client = make(namespace="a")

    def talk(client):
        chat = client.chats.create(model=MODEL)
        said = [chat.send_message("hello").text]
        said.append(joined(chat.send_message_stream("and then?")))
        said.append(chat.send_message("and then?").text)  # its history has the chunks of the stream
        return said, chat.get_history()

    first = talk(client)
    assert talk(client.in_namespace("b")) == first
    assert server.stats.requests == 3


def test_functions_are_called_automatically_and_the_rerun_makes_no_call(make, server):
    server.settings = MockSettings(seed=1, max_tokens=12, uses_tools=True)
    called = []

    def weather(city: str) -> str:
        """Return the weather in a city."""
        called.append(city)
        return "sunny"

    client = make(namespace="a")

    def talk(client):
        chat = client.chats.create(model=MODEL, config={"tools": [weather]})
        return chat.send_message("Zurich?").text, len(chat.get_history())

    first = talk(client)
    assert first[0]
    assert len(called) == 1
    calls = server.stats.requests
    assert calls == 2
    assert talk(client.in_namespace("b")) == first
    assert called == called[:1] * 2
    assert server.stats.requests == calls


def test_structured_output_is_parsed_on_hits_too(make, server):
    client = make(namespace="a")
    config = {"response_mime_type": "application/json", "response_schema": Word}
    first = ask(client, **config)
    assert isinstance(first.parsed, Word)
    hit = ask(client.in_namespace("b"), **config)
    assert isinstance(hit.parsed, Word)
    assert hit.parsed == first.parsed
    assert joined(stream(client.in_namespace("c"), **config)) == first.text
    assert server.stats.requests == 1


def test_thoughts_are_counted_and_kept(make, server):
    client = make(namespace="a")
    config = {"thinking_config": {"include_thoughts": True}}
    first = ask(client, **config)
    assert [bool(part.thought) for part in first.candidates[0].content.parts] == [True, False]
    assert info(first).billed["reasoning_tokens"] == first.usage_metadata.thoughts_token_count > 0
    chunks = list(stream(client.in_namespace("b"), **config))
    assert joined(chunks) == first.text
    assert chunks[-1].usage_metadata.thoughts_token_count == first.usage_metadata.thoughts_token_count
    assert server.stats.requests == 1


def test_each_content_of_a_list_is_embedded_once(make, server):
    client = make()

    def embed(*contents):
        found = client.models.embed_content(model="gemini-embedding-001", contents=[*contents])
        return [embedding.values for embedding in found.embeddings]

    one, two = embed("one", "two")
    assert embed("two", "three", "one") == [two, embed("three")[0], one]
    assert (server.stats.requests, server.stats.samples_generated) == (2, 3)


def test_raw_responses_hold_the_body_of_the_answer(make, server):
    client = make(namespace="a")
    config = types.GenerateContentConfig(should_return_http_response=True)
    raw = client.models.generate_content(model=MODEL, contents=HELLO, config=config)
    hit = client.in_namespace("b").models.generate_content(model=MODEL, contents=HELLO, config=config)
    assert json.loads(hit.sdk_http_response.body) == json.loads(raw.sdk_http_response.body)
    assert info(hit).cached == (True,)
    assert server.stats.requests == 1


def test_other_methods_are_the_sdks_own(make, server):
    client = make()
    assert client.models.count_tokens(model=MODEL, contents=HELLO).total_tokens > 0
    assert client.models.count_tokens(model=MODEL, contents=HELLO).total_tokens > 0
    assert server.stats.requests == 2
    assert client.in_namespace("b").files is not client.files


def test_c8_errors_are_the_sdks_own_and_are_not_cached(make, server):
    client = make()
    server.settings = MockSettings(
        seed=1, max_tokens=12, script=["unavailable", {"kind": "status", "status": 400}]
    )
    with pytest.raises(errors.ServerError) as failed:
        ask(client)
    assert (failed.value.code, failed.value.status) == (503, "UNAVAILABLE")
    with pytest.raises(errors.ClientError):
        list(stream(client))
    assert info(ask(client)).indices == (0,)
    assert server.stats.requests == 3


def test_the_sdks_retries_are_kept(make, server):
    retries = {"attempts": 3, "initial_delay": 0.0, "max_delay": 0.0, "jitter": 0.0}
    client = make(http_options={"retry_options": retries})
    server.settings = MockSettings(seed=1, max_tokens=12, script=["unavailable", "rate_limit"])
    assert info(ask(client)).cached == (False,)
    assert server.stats.requests == 3


def test_a_service_waits_as_long_as_google_says(server, tmp_path):
    server.settings = MockSettings(seed=1, script=[{"kind": "rate_limit", "retry_after": 0.05}])
    service = Services.Gemini(base_url=server.url, api_key="k")
    with service.sync_client(MemoryStore()) as client:
        assert ask(client).text
    assert service.stats().refused == 1
    assert server.stats.requests == 2


def test_c4_a_model_that_gives_one_candidate_is_asked_several_times(make, server):
    server.settings = MockSettings(seed=1, max_tokens=12, max_n=1)

    async def several():
        async with make(AsyncGemini) as client:
            return await asyncio.gather(*(ask(client) for _ in range(3)))

    answers = asyncio.run(several())
    assert len({answer.text for answer in answers}) == 3
    assert server.stats.samples_generated == 3


def blocked(*_):
    return httpx2.Response(200, json={"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": "m"})


def candidate(reason, **fields):
    return lambda *_: httpx2.Response(
        200, json={"candidates": [{"finishReason": reason, **fields}], "modelVersion": "m"}
    )


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (blocked, False),
        (candidate("OTHER"), False),
        (candidate(None, content={"parts": [{"text": "and"}]}), False),
        (candidate("SAFETY"), True),
        (candidate("MAX_TOKENS"), True),
        (candidate("STOP", content={"role": "model"}), True),
        (candidate("MALFORMED_FUNCTION_CALL"), True),
    ],
    ids=["blocked", "other", "unfinished", "safety", "length", "empty", "malformed call"],
)
def test_c8_what_counts_as_an_answer(answer, kept):
    calls = []

    def respond(request):
        calls.append(request)
        return answer(request)

    http = httpx2.Client(transport=httpx2.MockTransport(respond))
    with Gemini(api_key="k", cache=MemoryStore(), http_options={"httpx_client": http}) as client:
        first, again = ask(client), ask(client.in_namespace("b"))
    assert first.model_dump() == again.model_dump() or kept
    assert (info(first) is not None) is kept
    assert len(calls) == (1 if kept else 2)


def test_c7_a_stream_that_breaks_off_is_no_answer(make, server):
    client = make()
    server.settings = MockSettings(seed=1, max_tokens=12, script=["cut"])
    with pytest.raises(httpx2.HTTPError):
        list(stream(client))
    assert info(ask(client)).indices == (0,)
    assert server.stats.requests == 2


def test_c7_a_stream_whose_reader_stops_is_stored(make, server):
    client = make(namespace="a")
    for chunk in stream(client):
        begun = chunk.text
        break
    gc.collect()
    hit = ask(client.in_namespace("b"))
    assert hit.text.startswith(begun)
    assert server.stats.requests == 1


async def test_c7_an_asynchronous_stream_whose_reader_stops_is_stored(make, server):
    async with make(AsyncGemini, namespace="a") as client:
        async for chunk in await stream(client):
            begun = chunk.text
            break
        assert (await ask(client.in_namespace("b"))).text.startswith(begun)
    assert server.stats.requests == 1


def test_time_outs_are_the_sdks_own(make, server):
    server.settings = MockSettings(seed=1, paused=True)
    client = make()
    with pytest.raises(httpx2.TimeoutException):
        ask(client, http_options={"timeout": 50})
    server.settings = MockSettings(seed=1)
    assert info(ask(client)).indices in ((0,), (1,))


async def test_an_asynchronous_call_can_be_cancelled(make, server):
    server.settings = MockSettings(seed=1, paused=True)
    async with make(AsyncGemini) as client:
        task = asyncio.ensure_future(ask(client))
        await asyncio.to_thread(server.wait_until, lambda stats: stats.in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.settings = MockSettings(seed=1)
        assert info(await ask(client)).cached == (False,)


def test_replays_need_no_key_and_say_what_is_missing(make, monkeypatch):
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    store = MemoryStore()
    client = make(cache=store, namespace="a")
    first = ask(client)
    options = {"base_url": client._api_client._http_options.base_url}
    with Gemini(cache=store, namespace="b", mode="replay", http_options=options) as replay:
        assert ask(replay).text == first.text
        with pytest.raises(CacheMiss):
            ask(replay, "something else")
    with pytest.raises(ValueError, match="API key"):
        Gemini(cache=store)


def test_modes_requests_and_replicates_come_from_the_context(make, server):
    client = make(namespace="a")
    first = ask(client)
    with cachepipe.using(mode="bypass"):
        assert info(ask(client)) is None
    with cachepipe.using(namespace="b", request_id="x"):
        assert info(ask(client)).request_id == "x"
    assert ask(client.in_replicate(1)).text != first.text
    assert ask(client.copy(namespace="c", repeat="same")).text == first.text
    assert server.stats.requests == 3


def test_vertex_has_a_scope_of_its_own(make, server):
    store = MemoryStore()
    ask(make(cache=store))
    calls = []

    def respond(request):
        calls.append(request)
        return candidate("STOP", content={"parts": [{"text": "from Vertex"}]})(request)

    http = httpx2.Client(transport=httpx2.MockTransport(respond))
    options = {"httpx_client": http}
    with Gemini(vertexai=True, api_key="k", cache=store, http_options=options) as vertex:
        answer = ask(vertex)
        assert answer.text == "from Vertex"
        assert ask(vertex.in_namespace("b")).text == "from Vertex"
    assert len(calls) == 1
    scopes = {entry.scope for entry in store.keys()}  # noqa: SIM118 - a store is no mapping
    assert any(scope.startswith("https://aiplatform.googleapis.com/") for scope in scopes)
    assert len(scopes) == 2


def test_a_scope_of_ones_own_tells_models_apart(make, server):
    client = make(scope="mine")
    keys = {info(client.models.generate_content(model=model, contents=HELLO)).key for model in ("one", "two")}
    assert len(keys) == 2


def test_a_budget_bounds_calls(make, server):
    prices = cachepipe.Prices({MODEL: {"prompt": 1.0, "completion": 1.0}})
    client = make(budget=cachepipe.Budget(0.0001, prices=prices), namespace="a")
    assert info(ask(client, max_output_tokens=20)).billed_cost > 0
    with pytest.raises(BudgetExceeded):
        ask(client, max_output_tokens=5000)
    assert server.stats.requests == 1


def test_wrapped_clients_keep_their_class_and_their_connections(server):
    class Own(genai.Client):
        pass

    plain = Own(api_key="k", http_options={"base_url": server.url})
    client = cachepipe.wrap(plain, cache=MemoryStore(), namespace="a")
    assert isinstance(client, Own)
    first = ask(client)
    del plain
    gc.collect()
    assert ask(client.in_namespace("b")).text == first.text
    with pytest.raises(TypeError, match="has a cache already"):
        cachepipe.wrap(client)
    with pytest.raises(ValueError, match="in order"):
        cachepipe.wrap(genai.Client(api_key="k"), ordered=True)
    assert ask(client, "another").text
    client.close()
    assert server.stats.requests == 2


async def test_wrapped_asynchronous_clients_share_the_cache(server):
    store = MemoryStore()
    plain = genai.Client(api_key="k", http_options={"base_url": server.url})
    client = cachepipe.wrap(plain.aio, cache=store, ordered=True)
    first = await ask(client)
    assert (await ask(client.in_namespace("b"))).text == first.text
    await client.aclose()
    plain.close()
    assert server.stats.requests == 1


def test_a_client_with_a_replaced_method_is_not_wrapped(server):
    plain = genai.Client(api_key="k", http_options={"base_url": server.url})
    plain.models.generate_content = lambda **_: None
    with pytest.raises(TypeError, match=r"models\.generate_content"):
        cachepipe.wrap(plain, cache=MemoryStore())
    plain.close()


def test_the_order_of_answers_is_for_asynchronous_clients(make):
    with pytest.raises(ValueError, match="synchronous client cannot hand over its answers in order"):
        make(ordered=True, close=False)
    with pytest.raises(TypeError, match="takes no cachedir="):
        make(cachedir="x", close=False)


async def test_the_cache_is_closed_with_the_last_half_that_uses_it(make, server):
    client = make(close=False, namespace="a")
    await ask(client.aio)
    await asyncio.to_thread(ask, client)
    await asyncio.to_thread(client.close)
    assert (await ask(client.aio.in_namespace("b"))).text
    await client.aio.aclose()
    with pytest.raises(StageClosed, match="closed"):
        await ask(client.aio)


def test_the_sdk_has_the_private_names_that_we_use():
    api = genai.Client(api_key="k")._api_client
    for name in (
        *internals.GOOGLE_NAMES,
        "_request_once",
        "_async_request_once",
        "_httpx_client",
        "_http_options",
    ):
        assert hasattr(api, name)


async def test_a_service_limits_uncached_calls_of_both_halves(server):
    service = Services.Gemini(base_url=server.url, api_key="k")
    ask_for = {"model": MODEL, "contents": HELLO}
    client = service.sync_client(MemoryStore(), mode="bypass")
    assert await asyncio.to_thread(lambda: client.models.generate_content(**ask_for).text)
    assert await asyncio.to_thread(lambda: joined(client.models.generate_content_stream(**ask_for)))
    assert (await client.aio.models.count_tokens(**ask_for)).total_tokens
    assert [chunk async for chunk in await client.aio.models.generate_content_stream(**ask_for)]
    await client.aio.aclose()
    await asyncio.to_thread(client.close)
    stats = service.stats()
    assert (stats.calls, stats.in_flight) == (4, 0)
    assert server.stats.requests == 4


async def test_the_course_of_a_program_is_repeated(make, server):
    store = MemoryStore()

    async def course(namespace):
        said = []

        async def one(number):
            said.append((await ask(client, f"{HELLO} {number}")).text)

        async with make(AsyncGemini, cache=store, namespace=namespace, ordered=True) as client:
            await asyncio.gather(*map(one, range(5)))
        return said

    assert await course("a") == await course("b")
    assert server.stats.requests == 5
