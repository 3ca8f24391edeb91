"""C6 on every surface: whichever way an answer takes, the cache's sums say what it cost and saved."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from cachepipe import DiskStore, OnlineAPI, Request, info
from cachepipe.accounting import Statement, usage_of
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.contract.draws import label
from cachepipe.models import OpenAIModel
from cachepipe.stores.sums import statements
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8)) as running:
        yield running


def statement(folder, namespace=None):
    store = DiskStore(folder, read_only=True)
    try:
        return statements(store).get(label(namespace), Statement())
    finally:
        store.close()


def tokens(folder, namespace=None):
    accounts = statement(folder, namespace).accounts()
    return {name: account.counts()["total_tokens"] for name, account in accounts.items()}


def chat(client, **options):
    return client.chat.completions.create(model="m", messages=HELLO, **options)


def read(stream):
    return [event for event in stream if event.usage is not None]


def streamed(client):
    return read(chat(client, stream=True, stream_options={"include_usage": True}))


WAYS = {
    "fast path": chat,
    "several samples": lambda client: chat(client, n=3),
    "raw": lambda client: chat(client.with_raw_response),
    "stream": streamed,
    "list": lambda client: client.embeddings.create(model="e", input=["a", "b", "a"]),
    "responses": lambda client: client.responses.create(model="m", input="hello"),
}


@pytest.mark.parametrize("way", WAYS)
def test_c6_a_client_saves_on_each_rerun_what_it_was_billed(server, tmp_path, way):
    for mode in ("read-write", "read-write", "replay"):
        store = DiskStore(tmp_path)
        with OpenAI(base_url=server.base_url, api_key="k", cache=store, mode=mode, namespace="exp") as client:
            WAYS[way](client)
            WAYS[way](client) if way != "list" else None
        store.close()
    found = tokens(tmp_path, "exp")
    assert found["spent"] == found["billed"] == server.stats.tokens_in + server.stats.tokens_out
    assert found["as_asked"] == 3 * found["billed"] or way == "list"
    assert found["saved"] == found["as_asked"] - found["billed"] >= 2 * found["billed"]
    assert found["unreported"] == found["wasted"] == 0


def test_c6_the_sums_are_those_that_info_tells(server, tmp_path):
    told = dict.fromkeys(("as_asked", "billed"), 0)
    with OpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as client:
        for n in (2, 1, 3):
            facts = info(chat(client, n=n))
            for name in told:
                told[name] += getattr(facts, name)["total_tokens"]
        again = client.in_namespace("again")
        saved = info(chat(again, n=2)).saved["total_tokens"]
    assert {name: tokens(tmp_path)[name] for name in told} == told
    assert tokens(tmp_path, "again")["saved"] == saved


def test_c6_a_sample_says_what_the_provider_said_of_its_call(server, tmp_path):
    with OpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as client:
        answer = chat(client, n=2)
        key = info(answer).key
    store = DiskStore(tmp_path)
    samples = list(store.samples(key))
    for place, sample in enumerate(samples):
        meta, value = sample.meta, orjson.loads(sample.payload)
        assert (meta["asked"], meta["sold"]["model"]) == ("m", value["model"])
        assert meta["sold"].get("first", True) is (place == 0)
        assert meta["sold"]["usage"] == [*usage_of(value).counts.values()]
        assert meta.get("fingerprint") == value.get("system_fingerprint")
        assert "url" not in meta["sold"], "the scope says where it was asked"
    assert len({sample.meta["call"] for sample in samples}) == 1
    store.close()


def test_c6_beside_a_scope_of_the_users_own_the_url_is_recorded(server, tmp_path):
    with OpenAI(base_url=server.base_url, api_key="k", cache=tmp_path, scope="shared") as client:
        chat(client)
    [(_, url)] = statement(tmp_path).spent.sold
    assert url == f"{server.base_url}/chat/completions"
    assert [*statement(tmp_path).delivered.billed.sold] == [(_, url)]


async def test_c6_pipelines_and_clients_add_to_the_same_sums(server, tmp_path):
    model = OpenAIModel("m", base_url=server.base_url, api_key="k")
    async with OnlineAPI(model, tmp_path) as pipeline:
        await pipeline.request(Request("hello", n=2))
    await model.close()
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as client:
        await asyncio.gather(chat(client, n=2), chat(client.in_namespace("other")))
    assert server.stats.requests == 1
    found = statement(tmp_path)
    assert found.spent.counts() == found.delivered.billed.counts() == model.spent.counts()
    assert (found.delivered.requests, found.delivered.saved.counts()["samples"]) == (2, 2)
    assert statement(tmp_path, "other").delivered.saved.counts()["samples"] == 1


async def timed_out(client):
    async with asyncio.timeout(None) as limit, await chat(client, stream=True) as stream:
        async for _ in stream:
            limit.reschedule(0)
            await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("known", [False, True], ids=["being generated", "known"])
async def test_c6_a_stream_that_timed_out_counts_once_it_was_read(gated, tmp_path, known):
    options = {"base_url": f"{gated.url}/v1", "api_key": "k", "cache": tmp_path}
    if known:
        gated.gate.set()
        async with AsyncOpenAI(**options) as client:
            assert [event async for event in await chat(client, stream=True)]
    async with AsyncOpenAI(**options) as client:
        with pytest.raises(TimeoutError):
            await timed_out(client)
        gated.gate.set()
        assert [event async for event in await chat(client, stream=True)]
    found = statement(tmp_path)
    assert gated.calls == 1
    assert found.spent.counts()["samples"] == found.delivered.saved.counts()["samples"] == 1
    assert found.delivered.requests == 1 + known
    assert found.accounts()["unreported"].counts()["samples"] == 1 - known
