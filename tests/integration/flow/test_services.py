"""Services with the real SDKs and a real server: the limits as the server sees them."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import pickle
import threading
from pathlib import Path

import httpx
import openai
import pytest

from cachepipe import CacheMiss, MemoryStore, OnlineAPI, Request, Service, Services, alcall, using, wrap
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.flow import Clock
from cachepipe.models import OpenAIModel
from cachepipe.testing import FakeClock, MockServer, MockSettings
from cachepipe.testing.server import Fault

pytestmark = pytest.mark.anyio
FREE = {"max_requests": None, "max_tokens": None}


class Hurried(Clock):
    """Real time, in which waits for another attempt are over at once."""

    async def sleep(self, seconds):
        await asyncio.sleep(0)


@pytest.fixture
def threaded():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8)) as running:
        yield running


def hello(number=0):
    return {"model": "m", "messages": [{"role": "user", "content": f"Hello {number}"}]}


def text(response):
    return response.choices[0].message.content


def closest(server, count):
    """The shortest time in which so many requests and one more have arrived."""
    times = sorted(entry.time for entry in server.stats.log)
    return min(later - earlier for earlier, later in zip(times, times[count:], strict=False))


async def test_no_sliding_second_has_more_requests_than_allowed_as_the_server_counts(server):
    service = Services.custom(server.base_url, max_requests=5, interval=1, transit=1)
    async with service.client(MemoryStore(), "a") as client:
        await asyncio.gather(*[client.chat.completions.create(**hello(number)) for number in range(13)])
        assert server.stats.requests == 13
        assert closest(server, 5) >= 1.0
        before = service.stats()
        again = client.in_namespace("b")
        await asyncio.gather(*[again.chat.completions.create(**hello(number)) for number in range(13)])
    assert server.stats.requests == 13
    assert service.stats() == before  # hits never come by
    assert before.queue_seconds > 0 < before.call_seconds


async def test_every_surface_of_a_service_shares_its_limits(server):
    service = Service(server.base_url, max_requests=1000, max_tokens=None)
    store = MemoryStore()
    async with (
        service.client(store, "a") as one,
        AsyncOpenAI(cache=store, namespace="b", service=service) as other,
        openai.AsyncOpenAI(base_url=server.base_url, api_key="k") as plain,
        OpenAIModel("m", base_url=server.base_url, api_key="k") as model,
        OnlineAPI(model, store, service=service) as pipeline,
    ):
        await one.chat.completions.create(**hello(1))
        await other.chat.completions.create(**hello(2))
        await wrap(plain, cache=store, service=service).chat.completions.create(**hello(3))
        await pipeline.request(Request("Hello 4"))
        assert text(await other.chat.completions.create(**hello(1))) == text(
            await one.in_namespace("c").chat.completions.create(**hello(1))
        )
    assert service.stats().calls == server.stats.requests == 4
    assert service.stats().tokens == server.stats.tokens_in + server.stats.tokens_out


async def test_calls_without_the_cache_are_limited_as_well(server):
    service = Services.custom(server.base_url, **FREE)
    async with service.client(MemoryStore(), mode="bypass") as client:
        await client.chat.completions.create(**hello())
        await client.models.list()
    assert service.stats().calls == 1  # what generates nothing costs nothing
    assert service.stats().tokens == server.stats.tokens_in + server.stats.tokens_out


async def test_the_service_makes_attempts_again_and_the_sdk_does_not(server):
    server.settings = MockSettings(script=(Fault(kind="rate_limit", retry_after=0.01),) * 3)
    service = Services.custom(server.base_url, **FREE, adaptive=False, clock=Hurried())
    async with service.client(MemoryStore()) as client:
        assert text(await client.chat.completions.create(**hello()))
        stats = service.stats()
        assert (stats.calls, stats.refused, stats.retries, stats.answered) == (4, 3, 3, 1)
        assert server.stats.requests == 4
        server.settings = MockSettings(script=("error",) * 50)
        with pytest.raises(openai.InternalServerError):
            await client.with_options(max_retries=3).chat.completions.create(**hello(1))
        assert server.stats.requests == 4 + 4
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**hello(1))
        assert server.stats.requests == 4 + 4 + 9  # never one number times the other


async def test_an_adapter_leaves_its_attempts_to_the_service(server):
    server.settings = MockSettings(script=("error",) * 50)
    service = Services.custom(server.base_url, **FREE, max_retries=4, adaptive=False, clock=Hurried())
    async with (
        OpenAIModel("m", base_url=server.base_url, api_key="k") as model,
        OnlineAPI(model, MemoryStore(), service=service) as pipeline,
    ):
        with pytest.raises(openai.InternalServerError):
            await pipeline.request(Request("p"))
    assert server.stats.requests == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_cannot_succeed_is_asked_once(server, status):
    server.settings = MockSettings(script=(Fault(kind="status", status=status),) * 9)
    service = Services.custom(server.base_url, **FREE, adaptive=False, clock=Hurried())
    async with service.client(MemoryStore()) as client:
        with pytest.raises(openai.APIStatusError):
            await client.chat.completions.create(**hello())
    assert server.stats.requests == 1


async def test_what_cannot_be_reached_is_tried_again(server):
    server.settings = MockSettings(script=("drop", "drop"))
    service = Services.custom(server.base_url, **FREE, adaptive=False, clock=Hurried())
    async with service.client(MemoryStore()) as client:
        assert text(await client.chat.completions.create(**hello()))
    assert service.stats().overloaded == 2


async def test_a_stream_has_its_slot_until_it_has_ended(server):
    server.settings = MockSettings(stream_delay=0.001)
    service = Services.custom(server.base_url, **FREE, max_concurrency=1)
    async with service.client(MemoryStore()) as client:
        stream = await client.chat.completions.create(**hello(1), stream=True)
        await anext(stream)
        assert service.stats().in_flight == 1
        waiting = asyncio.create_task(client.chat.completions.create(**hello(2)))
        async for _ in stream:
            pass
        await waiting
        assert (service.stats().in_flight, service.stats().calls) == (0, 2)
        assert service.stats().tokens == server.stats.tokens_in + server.stats.tokens_out
        left = await client.chat.completions.create(**hello(3), stream=True)
        await anext(left)
        await left.close()
        await client.chat.completions.create(**hello(4))
    assert service.stats().in_flight == 0


async def test_a_cancelled_call_gives_its_slot_back(server):
    server.settings = MockSettings(paused=True)
    service = Services.custom(server.base_url, **FREE, max_concurrency=1)
    async with service.client(MemoryStore()) as client:
        task = asyncio.create_task(client.chat.completions.create(**hello(1)))
        await server.until(lambda stats: stats.in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.settings = MockSettings()
        await client.chat.completions.create(**hello(2))
    assert service.stats().in_flight == 0


def test_threads_of_synchronous_clients_share_the_limits(threaded):
    service = Services.custom(threaded.base_url, max_requests=5, max_tokens=None, interval=0.5, transit=1)
    with service.sync_client(MemoryStore()) as client:
        numbers = itertools.count()
        asked = [lambda: client.chat.completions.create(**hello(next(numbers)))] * 10
        threads = [threading.Thread(target=ask) for ask in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with using(mode="bypass"):
            client.chat.completions.create(**hello())
    assert threaded.stats.requests == service.stats().calls == 11
    assert closest(threaded, 5) >= 0.5


def test_a_synchronous_call_without_the_cache_is_made_again(threaded):
    threaded.settings = MockSettings(script=("error", "error"))
    service = Services.custom(threaded.base_url, **FREE, adaptive=False, clock=Hurried())
    with service.sync_client(MemoryStore(), mode="bypass") as client:
        assert text(client.chat.completions.create(**hello()))
        threaded.settings = MockSettings(script=(401,))
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**hello())
    assert threaded.stats.requests == 4


class Distant(httpx.AsyncHTTPTransport):
    """Takes ten milliseconds of a clock to send a request, and none to receive the answer."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.in_flight = 0

    async def handle_async_request(self, request):
        await self.clock.sleep(0.01)
        self.in_flight += 1
        try:
            response = await super().handle_async_request(request)
            await response.aread()
        finally:
            self.in_flight -= 1
        return response


async def test_a_rate_that_the_server_does_not_tell_is_kept_to_without_an_error():
    """Client and server share a clock that stands still during calls, so a loaded machine changes nothing.

    The rate is small here; ``python -m benchmarks.hidden_rate`` measures how much of it is used.
    """
    clock = FakeClock()
    transport = Distant(clock)
    settings = MockSettings(rate=100.0, burst=20, max_tokens=4)
    async with MockServer(settings, clock=clock.now) as server:
        service = Services.custom(server.base_url, **FREE, clock=clock)
        http_client = httpx.AsyncClient(transport=transport)
        async with service.client(MemoryStore(), http_client=http_client) as client:

            async def ask(number):
                return text(await client.chat.completions.create(**hello(number)))

            calls = asyncio.ensure_future(alcall(range(200), ask))
            while not calls.done():
                await clock.settle()
                if not transport.in_flight and clock.next_due is not None:
                    await clock.advance(clock.next_due - clock.now())
            assert len(calls.result()) == 200
        stats = service.stats()
        refused = server.stats.by_path["/v1/chat/completions"][429]
    assert (stats.answered, stats.refused, stats.calls) == (200, refused, 200 + refused)
    assert 0 < refused < 60
    assert service.flow.limits.learned()["m"]["pace"] < 200


async def test_anthropics_clients_are_limited_and_retried_by_their_service(server):
    faults = tuple(Fault(kind="status", status=status, retry_after=0.01) for status in (429, 503))
    server.settings = MockSettings(seed=1, max_tokens=8, script=faults)
    service = Services.Anthropic(
        base_url=server.base_url, api_key="k", max_tokens=None, adaptive=False, clock=Hurried()
    )
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    async with service.client(MemoryStore(), "a") as client:
        answer = await client.messages.create(**asked)
        assert (await client.in_namespace("b").messages.create(**asked)).content == answer.content
    stats = service.stats()
    assert (stats.calls, stats.refused, stats.overloaded, stats.answered) == (3, 1, 1, 1)
    assert server.stats.requests == 3


@pytest.mark.parametrize("how", ["read", "closed"])
@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
async def test_a_stream_without_the_cache_has_its_slot_until_it_has_ended(server, sdk, how):
    service = Services.custom(server.base_url, **FREE, max_concurrency=1, sdk=sdk)
    async with service.client(MemoryStore(), mode="bypass") as client:
        create = client.messages.create if sdk == "anthropic" else client.chat.completions.create
        stream = await create(**hello(1), max_tokens=8, stream=True)
        await anext(stream)
        assert service.stats().in_flight == 1
        waiting = asyncio.create_task(create(**hello(2), max_tokens=8))
        await asyncio.sleep(0)
        assert server.stats.requests == 1
        if how == "read":
            async for _ in stream:
                pass
        else:
            await stream.close()
        await asyncio.wait_for(waiting, 10)
    assert (service.stats().in_flight, service.stats().calls) == (0, 2)


def test_a_synchronous_stream_without_the_cache_has_its_slot_until_it_has_ended(threaded):
    service = Services.custom(threaded.base_url, **FREE, max_concurrency=1)
    with service.sync_client(MemoryStore(), mode="bypass") as client:
        with client.chat.completions.create(**hello(1), stream=True) as stream:
            next(stream)
            assert service.stats().in_flight == 1
        assert service.stats().in_flight == 0
        assert list(client.chat.completions.create(**hello(2), stream=True))
        raw = client.chat.completions.with_raw_response.create(**hello(3))
        assert text(raw.parse())
        assert service.stats().in_flight == 0
        with client.chat.completions.with_streaming_response.create(**hello(4)) as response:
            assert service.stats().in_flight == 1
            assert response.read()
        forgotten = client.chat.completions.create(**hello(5), stream=True)
        assert service.stats().in_flight == 1
        del forgotten
        gc.collect()
    assert (service.stats().in_flight, service.stats().answered) == (0, 5)


async def test_calls_without_the_cache_keep_to_what_the_provider_says_is_left():
    async with Recorder(
        "x-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 60s\r\n"
    ) as recorder:
        service = Services.custom(f"http://{recorder.place}/v1", **FREE)
        async with service.client(MemoryStore(), mode="bypass") as client:
            await client.chat.completions.create(**hello(1))
            waiting = asyncio.create_task(client.chat.completions.create(**hello(2)))
            await asyncio.sleep(0)
            assert service.stats().waiting == 1
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    assert len(recorder.heads) == 1


async def test_anthropics_calls_without_the_cache_tell_what_they_have_used(server):
    service = Services.Anthropic(base_url=server.base_url, api_key="k", max_tokens=None)
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
    async with service.client(MemoryStore(), mode="bypass") as client:
        await client.messages.create(**asked)
    assert service.stats().tokens == server.stats.tokens_in + server.stats.tokens_out > 0


# Keys and addresses.

KEY = "sk-nobody-may-see-this"


class Recorder:
    """An HTTP server that notes what comes, and answers as a model would."""

    ANSWER = json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
            ],
        }
    ).encode()

    def __init__(self, headers=""):
        self.headers = headers.encode()

    async def __aenter__(self):
        self.heads = []
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.place = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        length = next(
            int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length")
        )
        await reader.readexactly(length)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n%s"
            b"content-length: %d\r\n\r\n%s" % (self.headers, len(self.ANSWER), self.ANSWER)
        )
        await writer.drain()
        writer.close()


def everything_in(folder):
    return b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("where", ["user:word@", "us%40er:w%3Ard@"])
async def test_credentials_in_the_url_work_and_are_seen_nowhere(where, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    async with Recorder() as recorder:
        secret = where.rstrip("@").partition(":")[2]
        service = Services.custom(f"http://{where}{recorder.place}/v1")
        async with service.client(tmp_path / "cache", "a") as client:
            answer = await client.chat.completions.create(**hello())
            assert text(answer) == "yes"
            assert secret not in str(client.base_url)
        plain = Services.custom(f"http://{recorder.place}/v1")
        async with plain.client(tmp_path / "cache", "b") as client:
            assert text(await client.chat.completions.create(**hello())) == "yes"
        [head] = recorder.heads  # the second was a hit: credentials are no part of a key
    expected = {"user:word@": "dXNlcjp3b3Jk", "us%40er:w%3Ard@": "dXNAZXI6dzpyZA=="}[where]
    assert f"authorization: basic {expected.lower()}" in head.lower()
    for seen in (
        repr(service),
        repr(service.flow),
        str(vars(service).get("name")),
        service.base_url,
        caplog.text,
    ):
        assert secret not in seen
        assert expected not in seen
    stored = everything_in(tmp_path)
    assert secret.encode() not in stored
    assert expected.encode() not in stored


async def test_the_key_comes_from_the_variable_named_and_from_no_other(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("MINE", KEY)
    async with Recorder() as recorder:
        url = f"http://{recorder.place}/v1"
        for options in ({"key_scheme": "MINE"}, {"api_key": "sk-given", "key_scheme": "MINE"}, {}):
            async with Services.custom(url, **options).client(MemoryStore()) as client:
                await client.chat.completions.create(**hello())
    keys = [line for head in recorder.heads for line in head.lower().split("\r\n") if "authorization" in line]
    assert keys == ["authorization: bearer " + key for key in (KEY, "sk-given", "none-needed")]


def test_a_missing_key_is_said_before_anything_is_asked_but_no_replay_needs_one(monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-theirs")
    service = Services.OpenRouter()
    with pytest.raises(
        ValueError, match="OpenRouter needs a key: set the environment variable OPENROUTER_API_KEY"
    ):
        service.sync_client(MemoryStore())
    with (
        service.sync_client(MemoryStore(), mode="replay") as client,
        pytest.raises(CacheMiss),
    ):
        client.chat.completions.create(**hello())


def test_the_providers_are_where_they_say(monkeypatch):
    for name in (
        "OPENAI_BASE_URL",
        "TOGETHER_BASE_URL",
        "ANTHROPIC_BASE_URL",
        "OPENROUTER_BASE_URL",
        "OLLAMA_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    makers = (Services.OpenAI, Services.OpenRouter, Services.Together, Services.Anthropic, Services.Ollama)
    assert [make().base_url for make in makers] == [
        "https://api.openai.com/v1",
        "https://openrouter.ai/api/v1",
        "https://api.together.xyz/v1",
        "https://api.anthropic.com/v1",
        "http://localhost:11434/v1",
    ]
    assert (
        Services.Anthropic(api_key=KEY).client_options("anthropic")["base_url"] == "https://api.anthropic.com"
    )
    assert Services.Together(api_key=KEY).client_options("together")["base_url"] == "https://api.together.xyz"
    for host, url in (
        ("10.0.0.1:1234", "http://10.0.0.1:1234/v1"),
        ("box", "http://box:11434/v1"),
        ("https://box/", "https://box/v1"),
        ("https://box/ollama", "https://box/ollama/v1"),
        ("https://box/ollama/v1", "https://box/ollama/v1"),
    ):
        monkeypatch.setenv("OLLAMA_HOST", host)
        assert Services.Ollama().base_url == url
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    assert Services.Anthropic().base_url == "http://127.0.0.1:9/v1"
    quota = Services.OpenAI().flow.limits.quota
    assert (quota.max_requests, quota.max_tokens, quota.interval) == (1000, 100_000, 60)


def test_together_and_others_make_their_own_clients(threaded):
    service = Services.Together(base_url=threaded.base_url, api_key="k", sdk="together")
    with service.sync_client(MemoryStore()) as client:
        assert type(client).__name__ == "Together"
        assert text(client.chat.completions.create(**hello()))
    with service.sync_client(client._cachepipe.shared_store.store, "b", sdk="openai") as client:
        assert isinstance(client, OpenAI)
        assert text(client.chat.completions.create(**hello()))
    assert threaded.stats.requests == service.stats().calls == 1


@pytest.mark.parametrize("url", ["host/v1", "", "ftp://host/v1", "https://user:se cret@[bad/v1"])
def test_an_address_that_is_none_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="base_url must be of the form") as caught:
        Services.custom(url)
    assert "se cret" not in str(caught.value)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="has credentials already"):
        Services.custom("https://user:word@host/v1", api_key=KEY)
    with pytest.raises(ValueError, match="sdk is one of"):
        Services.custom("https://host/v1", sdk="curl")
    for option in ("api_key", "key_scheme", "name", "model"):
        with pytest.raises(TypeError, match=f"{option} is a string or None; got a bytes") as caught:
            Services.custom("https://host/v1", **{option: KEY.encode()})
        assert KEY not in str(caught.value)
    with pytest.raises(TypeError, match="service= takes a Service"):
        OpenAI(api_key="k", cache=MemoryStore(), service="https://host/v1")
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Services.custom("https://host/v1"))
    assert KEY not in repr(Services.custom("https://host/v1", api_key=KEY))


def test_a_service_in_the_readme_style_fits_on_a_line():
    service = Services.custom("https://host/v1", max_requests=5, interval=1)
    assert repr(service) == (
        "<Service host at https://host/v1, 5 requests and 100000 tokens per 1 s; 0 waiting, 0 in flight>"
    )
