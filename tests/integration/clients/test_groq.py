"""The clients of Groq: chat, streams, tools, structured output and errors in Groq's own dialect."""

from __future__ import annotations

import asyncio
import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import cachepipe
from cachepipe import MemoryStore, Services
from cachepipe.clients import OpenAI
from cachepipe.flow import Clock
from cachepipe.flow.headers import hints
from cachepipe.providers.info import info
from cachepipe.sdk.internals import ATTRIBUTES, NAMES
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.server import Fault

groq = pytest.importorskip("groq")
from cachepipe.clients import AsyncGroq, Groq  # noqa: E402 - only with the SDK

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WORD = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "word", "schema": WORD}}


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=400)) as running:
        yield running


def of(server, **options):
    return Groq(
        **{"base_url": server.url, "api_key": "k", "cache": MemoryStore(), "max_retries": 0, **options}
    )


def ask(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


def texts(response):
    return [choice.message.content for choice in response.choices]


def read(stream):
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_groq_answers_one_choice_per_call_and_n_is_served_all_the_same(server):
    with (
        groq.Groq(base_url=server.url, api_key="k", max_retries=0) as plain,
        pytest.raises(groq.BadRequestError, match="must be at most 1"),
    ):
        ask(plain, n=3)
    with of(server) as client:
        first = ask(client, n=3)
        assert type(first).__module__ == "groq.types.chat.chat_completion"
        assert len({*texts(first)}) == 3
        assert info(first).cached == (False, False, False)
        assert texts(ask(client.in_namespace("b"), n=3)) == texts(first)
        assert texts(ask(client.in_namespace("b"))) != texts(first)[:1]
    assert (server.stats.requests, server.stats.samples_generated) == (5, 4)


def test_equal_requests_of_many_threads_are_calls_of_one_choice(server):
    with of(server) as client, ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda _: texts(ask(client))[0], range(8)))
        with cachepipe.run():
            assert sorted(texts(ask(client))[0] for _ in range(8)) == sorted(said)
    assert (server.stats.requests, server.stats.samples_generated) == (8, 8)


def test_streamed_and_unstreamed_share_samples_in_groqs_own_form(server):
    with of(server) as client:
        chunks = list(ask(client, stream=True))
        whole = ask(client.in_namespace("b"))
        again = list(ask(client.in_namespace("c"), stream=True))
        assert read(chunks) == read(again) == texts(whole)[0]
        assert whole.x_groq.id == chunks[0].x_groq.id == again[0].x_groq.id
        for last in (chunks[-1], again[-1]):
            assert last.choices[0].finish_reason == "stop"
            assert last.x_groq.usage == whole.usage
        assert whole.usage.queue_time == 0.01
        assert info(whole).as_asked["total_tokens"] == whole.usage.total_tokens > 0
        first = ask(client, temperature=0.5)
        replayed = list(ask(client.in_namespace("b"), temperature=0.5, stream=True))
        assert read(replayed) == texts(first)[0]
        assert replayed[-1].x_groq.usage == first.usage
    assert server.stats.requests == 2


def test_a_stream_that_groq_stops_early_is_not_an_answer():
    from cachepipe.wire import CHAT, BadAnswer  # noqa: PLC0415

    recorder = CHAT.recorder()
    for chunk in (
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "hel"}}]},
        {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "x_groq": {"error": "over capacity"},
        },
    ):
        recorder.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    recorder.feed(b"data: [DONE]\n\n")
    with pytest.raises(BadAnswer, match="stopped early: 'over capacity'"):
        recorder.samples()


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_and_structured_output_are_cached(server, streamed):
    with of(server) as client:
        tools = {"tools": [WEATHER], "tool_choice": "required"}
        if streamed:
            list(ask(client, stream=True, **tools))
            list(ask(client, stream=True, response_format=FORMAT))
        call = ask(client.in_namespace("b"), **tools).choices[0].message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments).keys()) == ("weather", {"city"})
        assert json.loads(texts(ask(client.in_namespace("b"), response_format=FORMAT))[0]).keys() == {"word"}
    assert server.stats.requests == 2


def test_raw_and_streaming_responses_are_the_sdks_own(server):
    with of(server) as client:
        first = ask(client)
        raw = client.in_namespace("b").chat.completions.with_raw_response.create(model="m", messages=HELLO)
        assert raw.parse() == first
        with client.in_namespace("c").chat.completions.with_streaming_response.create(
            model="m", messages=HELLO
        ) as response:
            assert response.parse() == first
        vectors = [
            who.embeddings.create(model="m", input=["a", "b"]) for who in (client, client.in_namespace("b"))
        ]
        assert vectors[0] == vectors[1]
    assert server.stats.requests == 2


def test_errors_are_the_sdks_own_and_never_cached(server):
    with of(server) as client:
        for fault, error in (("rate_limit", groq.RateLimitError), ("unavailable", groq.InternalServerError)):
            with pytest.raises(error) as caught:
                ask(client, extra_headers={"x-mock-fault": fault})
            assert caught.value.response.headers["x-request-id"]
        server.settings = server.settings.updated({"api_key": "other"})
        with pytest.raises(groq.AuthenticationError):
            ask(client)
        server.settings = server.settings.updated({"api_key": None})
        assert info(ask(client)).cached == (False,)
        assert client.models.list().data[0].id == "ngram-1"


def test_a_service_repeats_what_groq_refuses_and_reads_how_much_is_left(server):
    class Hurried(Clock):
        async def sleep(self, seconds):
            await asyncio.sleep(0)

    script = tuple(Fault(kind="status", status=status, retry_after=0.01) for status in (429, 498, 503))
    server.settings = server.settings.updated({"script": script})
    place = f"{server.url}/openai/v1"
    service = Services.Groq(base_url=place, api_key="k", max_tokens=None, adaptive=False, clock=Hurried())
    with service.sync_client(MemoryStore(), sdk="groq") as client:
        ask(client)
        raw = client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
    stats = service.stats()
    assert (stats.calls, stats.refused, stats.overloaded, stats.answered) == (5, 1, 2, 2)
    assert {hint.kind: hint.remaining for hint in hints(raw.headers)} == {"requests": 14399, "tokens": 17900}


def test_audio_passes_through_uncached(server):
    with of(server) as client:
        for _ in range(2):
            with pytest.raises(groq.NotFoundError):  # the mock server has none
                client.audio.transcriptions.create(file=("a.wav", b"RIFF"), model="whisper-large-v3")
    assert server.stats.requests == 2


def test_a_time_out_is_groqs_and_the_answer_is_kept(server):
    server.settings = server.settings.updated({"latency": 0.4})
    with of(server, timeout=0.05) as client:
        with pytest.raises(groq.APITimeoutError):
            ask(client)
        server.settings = server.settings.updated({"latency": 0})
        assert info(ask(client.with_options(timeout=5))).cached == (False,)


def test_copies_and_wrapped_clients_have_the_sdks_parameters_and_ours(server):
    store = MemoryStore()
    with groq.Groq(base_url=server.url, api_key="k") as plain:
        client = cachepipe.wrap(plain, cache=store)
        assert isinstance(client, groq.Groq)
        first = ask(client, n=2)
        assert info(ask(plain)) is None
        twin = client.with_options(max_retries=5, namespace="b")
        assert (twin.max_retries, texts(ask(twin, n=2))) == (5, texts(first))
    for kind, sdk in ((Groq, groq.Groq), (AsyncGroq, groq.AsyncGroq)):
        for ours, its in ((kind.__init__, sdk.__init__), (kind.copy, sdk.copy)):
            assert {*inspect.signature(its).parameters} < {*inspect.signature(ours).parameters}
    assert server.stats.requests == 3


def test_groq_replays_without_a_key(server, monkeypatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    store = MemoryStore()
    with of(server, cache=store) as client:
        first = ask(client)
    with pytest.raises(groq.GroqError):
        Groq(base_url=server.url, cache=store)
    with Groq(base_url=server.url, cache=store, mode="replay") as client:
        assert ask(client) == first


def test_groq_and_openai_and_a_service_share_samples(server):
    store = MemoryStore()
    service = Services.Groq(base_url=f"{server.url}/openai/v1", api_key="k", max_tokens=None)
    with service.sync_client(store, sdk="groq") as client:
        assert isinstance(client, Groq)
        first = ask(client)
    assert service.stats().calls == 1
    with service.sync_client(store, "b") as client:
        assert isinstance(client, OpenAI)
        assert texts(ask(client)) == texts(first)
    assert server.stats.requests == 1


@pytest.mark.anyio
async def test_async_groq(server):
    async with AsyncGroq(base_url=server.url, api_key="k", cache=MemoryStore()) as client:
        one, two = await asyncio.gather(ask(client, n=2), ask(client, temperature=0.5))
        stream = await ask(client.in_namespace("b"), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == texts(one)[0]
        raw = await client.in_namespace("c").chat.completions.with_raw_response.create(
            model="m", messages=HELLO, temperature=0.5
        )
        assert await raw.parse() == two
        with cachepipe.run():
            assert texts(await ask(client, n=2)) == texts(one)
    assert server.stats.requests == 3


@pytest.mark.parametrize("name", ["Groq", "AsyncGroq"])
def test_the_sdk_still_has_what_the_clients_stand_on(name):
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    kind = getattr(groq, name)
    client = kind(api_key="k")
    for name in NAMES:
        assert callable(getattr(kind, name)), name
    for name in ATTRIBUTES:
        assert hasattr(client, name), name


def test_programs_with_groqs_sdk_are_replayed_at_its_own_upstream():
    from cachepipe.cli.replay import _base_urls  # noqa: PLC0415
    from cachepipe.proxy.settings import Upstream  # noqa: PLC0415

    upstreams = (Upstream.of("a", "https://api.openai.com/v1"), Upstream.of("b", "groq"))
    urls = _base_urls(upstreams, lambda upstream: f"http://proxy/up/{upstream.name}{upstream.mount}")
    assert urls["GROQ_BASE_URL"] == "http://proxy/up/b"
    assert urls["OPENAI_BASE_URL"] == "http://proxy/up/a/v1"
