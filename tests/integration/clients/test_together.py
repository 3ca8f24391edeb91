"""The clients of Together, from version 2 of its package on, and what users of version 1 are told."""

from __future__ import annotations

import sys

import httpx
import pytest
import together

from cachepipe import MemoryStore, clients
from cachepipe.clients import OpenAI
from cachepipe.providers.info import info
from cachepipe.sdk.internals import ATTRIBUTES, NAMES
from cachepipe.sdk.wrapping import wrap

if hasattr(together, "TogetherError"):
    from cachepipe.clients import AsyncTogether, Together

since_2 = pytest.mark.skipif(not hasattr(together, "TogetherError"), reason="this is together 1")
HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]


@pytest.fixture
def address(server):
    """The server as the package wants it: version 2 has `/v1` in the base URL, version 3 in its paths."""
    base = together.Together(api_key="k").base_url
    return server.base_url if base.path.startswith("/v1") else server.url


def texts(response):
    return [choice.message.content for choice in response.choices]


def ask(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


def read(stream):
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_version_1_is_refused_with_what_to_do_instead(monkeypatch):
    monkeypatch.delattr(together, "TogetherError", raising=False)
    monkeypatch.setattr(together, "__version__", "1.5.35", raising=False)
    monkeypatch.delitem(sys.modules, "cachepipe.sdk.together", raising=False)
    monkeypatch.delitem(vars(clients), "AsyncTogether", raising=False)
    with pytest.raises(ImportError, match=r"together>=2.*1\.5\.35.*OpenAI\(base_url="):
        clients.AsyncTogether  # noqa: B018 - it is imported when it is named

    class Old:
        __module__ = "together.client"

    with pytest.raises(TypeError, match="together>=2"):
        wrap(Old())


@since_2
def test_c9_a_client_without_a_base_url_sends_its_calls_where_the_sdk_does_whatever_others_have_sent(
    address, monkeypatch
):
    """The SDK has another server for chats then; the fast path must not take the path that it has learnt."""
    monkeypatch.delenv("TOGETHER_BASE_URL", raising=False)
    with Together(base_url=address, api_key="k", cache=MemoryStore()) as client:
        assert texts(ask(client)) != texts(ask(client))  # the second call is made by the fast path
    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(400, json={"error": {"message": "no"}})

    for kind, options in ((together.Together, {}), (Together, {"cache": MemoryStore()})):
        sender = httpx.Client(transport=httpx.MockTransport(answer))
        client = kind(api_key="k", http_client=sender, max_retries=0, **options)
        with client, pytest.raises(together.BadRequestError):
            ask(client)
    assert asked[0] == asked[1]


@since_2
def test_together_shares_samples_with_openai(server, address):
    store = MemoryStore()
    with Together(base_url=address, api_key="k", cache=store) as client:
        assert isinstance(client, together.Together)
        assert type(first := ask(client, n=2)).__module__.startswith("together.")
        text = client.completions.create(model="m", prompt="Given a")
        assert client.in_namespace("b").completions.create(model="m", prompt="Given a") == text
        assert read(ask(client.in_namespace("b"), n=1, stream=True)) == texts(first)[0]
        raw = client.in_namespace("c").chat.completions.with_raw_response.create(model="m", messages=HELLO)
        assert texts(raw.parse()) == texts(first)[:1]
        streamed = read(ask(client, stream=True, temperature=0.5))
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, namespace="d") as client:
        assert texts(ask(client, n=2)) == texts(first)
        assert texts(ask(client, temperature=0.5)) == [streamed]
    assert server.stats.requests == 3


@since_2
def test_together_replays_without_a_key(address, monkeypatch):
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    store = MemoryStore()
    with Together(base_url=address, api_key="k", cache=store) as client:
        first = ask(client)
    with pytest.raises(together.TogetherError):
        Together(base_url=address, cache=store)
    with Together(base_url=address, cache=store, mode="replay") as client:
        assert ask(client) == first


@since_2
@pytest.mark.anyio
async def test_async_together(server, address):
    async with AsyncTogether(base_url=address, api_key="k", cache=MemoryStore()) as client:
        stream = await ask(client, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert texts(await ask(client.in_namespace("b"))) == [text]
        vectors = [
            (await who.embeddings.create(model="m", input=["a", "b"])).data[1].embedding
            for who in (client, client.in_namespace("b"))
        ]
        assert vectors[0] == vectors[1]
    assert server.stats.requests == 2


@since_2
def test_a_wrapped_client_is_cached(address, server):
    with together.Together(base_url=address, api_key="k") as plain:
        client = wrap(plain, cache=MemoryStore(), namespace="a")
        assert isinstance(client, together.Together)
        first = ask(client, n=2)
        assert texts(ask(client.in_namespace("b"), n=2)) == texts(first)
        assert info(ask(plain)) is None
    assert server.stats.requests == 2


@since_2
@pytest.mark.parametrize("name", ["Together", "AsyncTogether"])
def test_the_sdk_still_has_what_the_clients_stand_on(name):
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    kind = getattr(together, name)
    client = kind(api_key="k")
    for name in NAMES:
        assert callable(getattr(kind, name)), name
    for name in ATTRIBUTES:
        assert hasattr(client, name), name
