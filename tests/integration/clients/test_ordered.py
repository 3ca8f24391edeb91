"""Asynchronous clients with ``ordered=True``: answers come in the order of the first run (C11)."""

from __future__ import annotations

import asyncio

import openai
import pytest

from cachepipe import MemoryStore, OnlineAPI, alcall, using, wrap
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.providers.info import info
from cachepipe.testing import MockServer, MockSettings
from cachepipe.typedefs import Request

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server():
    async with MockServer(MockSettings(seed=1, max_tokens=6)) as running:
        yield running


def opened(server, store, **options):
    return AsyncOpenAI(base_url=server.base_url, api_key="k", cache=store, max_retries=0, **options)


def asked(prompt, **more):
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


async def filled(server, store, *prompts):
    async with opened(server, store) as client:
        for prompt in prompts:
            await client.chat.completions.create(**asked(prompt))


class Asking:
    """Asks together, and notes the order of the answers."""

    def __init__(self, client):
        self.client = client
        self.order = []

    async def plain(self, prompt, **more):
        made = await self.client.chat.completions.create(**asked(prompt, **more))
        self.order.append(prompt)
        return made

    async def raw(self, prompt):
        await self.client.chat.completions.with_raw_response.create(**asked(prompt))
        self.order.append(prompt)

    async def streamed(self, prompt):
        async for _ in await self.client.chat.completions.create(**asked(prompt, stream=True)):
            pass
        self.order.append(prompt)

    async def together(self, prompts, how="plain"):
        await asyncio.gather(*(getattr(self, how)(prompt) for prompt in prompts))
        return self.order


@pytest.mark.parametrize("how", ["plain", "raw", "streamed"])
@pytest.mark.parametrize("namespace", [None, "new"])
async def test_hits_come_in_the_order_in_which_their_samples_were_stored(server, how, namespace):
    store = MemoryStore()
    await filled(server, store, *"bca")
    async with opened(server, store, ordered=True, namespace=namespace) as client:
        assert await Asking(client).together("abc", how) == [*"bca"]
        assert await Asking(client.copy()).together("xyz", how)
    assert server.stats.requests == 6
    async with opened(server, store, namespace=namespace) as client:
        assert await Asking(client).together("abc", how) == [*"abc"], "not without the setting"


async def test_the_setting_may_be_that_of_a_block_of_a_copy_or_of_alcall(server):
    store = MemoryStore()
    await filled(server, store, *"bca")
    async with opened(server, store) as client:
        with using(ordered=True):
            assert await Asking(client).together("abc") == [*"bca"]
    async with opened(server, store) as client:
        assert await Asking(client.with_options(ordered=True)).together("abc") == [*"bca"]
    async with opened(server, store, ordered=True) as client:
        with using(ordered=False):
            assert await Asking(client).together("abc") == [*"abc"]
    plain = openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0)
    async with wrap(plain, cache=store, ordered=True) as client:
        assert await Asking(client).together("abc") == [*"bca"]
    async with opened(server, store) as client:
        asking = Asking(client)
        await alcall("abc", asking.plain, ordered=True)
        assert asking.order == [*"bca"]
    assert server.stats.requests == 3


async def test_clients_and_pipelines_on_a_store_share_one_schedule(server):
    store = MemoryStore()
    await filled(server, store, *"bca")
    order = []
    async with (
        opened(server, store, ordered=True) as client,
        OpenAIModel("m", base_url=server.base_url, api_key="k") as model,
        OnlineAPI(model, store) as pipeline,
    ):

        async def ask(prompt):
            await pipeline.request(Request(asked(prompt)["messages"]))
            order.append(prompt)

        asking = Asking(client)
        asking.order = order
        await asyncio.gather(asking.plain("a"), ask("c"), asking.plain("b"))
    assert order == [*"bca"]
    assert server.stats.requests == 3


async def test_a_miss_is_sent_after_the_hits_and_a_cancelled_one_never(server):
    store = MemoryStore()
    await filled(server, store, "hit")
    async with opened(server, store, ordered=True) as client:
        asking = Asking(client)
        tasks = [asyncio.create_task(asking.plain(prompt)) for prompt in ("miss", "hit")]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert asking.order == ["hit"]
        tasks[0].cancel()
        await asyncio.wait(tasks)
        made = await asking.plain("other")
        assert info(made).cached == (False,)
    assert server.stats.requests == 2


async def test_an_error_of_the_provider_reaches_its_caller_and_stops_nobody(server):
    store = MemoryStore()
    await filled(server, store, "hit")
    async with opened(server, store, ordered=True) as client:
        wrong = client.chat.completions.create(**asked("x", temperature=99))
        refused, hit = await asyncio.gather(wrong, Asking(client).plain("hit"), return_exceptions=True)
    assert isinstance(refused, openai.BadRequestError)
    assert info(hit).cached == (True,)


async def test_a_list_has_one_turn(server):
    store = MemoryStore()
    async with opened(server, store, ordered=True) as client:
        first = await client.embeddings.create(model="ngram-1-embedding", input=["a", "b"])
        again = await asyncio.gather(
            *(client.embeddings.create(model="ngram-1-embedding", input=["b", "a"]) for _ in range(3))
        )
    assert [item.embedding for item in again[0].data] == [item.embedding for item in reversed(first.data)]
    assert server.stats.requests == 1


@pytest.mark.parametrize("ordered", [True, 8])
def test_a_synchronous_client_refuses_it_before_anything_is_opened(tmp_path, ordered):
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="synchronous client cannot hand over its answers in order"):
        OpenAI(api_key="k", cache=folder, ordered=ordered)
    with pytest.raises(ValueError, match="synchronous client cannot"):
        wrap(openai.OpenAI(api_key="k"), cache=folder, ordered=ordered)
    assert not folder.exists()
    with OpenAI(api_key="k", cache=MemoryStore()) as client:
        with pytest.raises(ValueError, match="synchronous client cannot"):
            client.copy(ordered=ordered)
        with using(ordered=ordered), pytest.raises(ValueError, match="synchronous client cannot"):
            client.chat.completions.create(**asked("x"))


def test_a_wrong_setting_is_refused():
    with pytest.raises(ValueError, match="ordered is True, False, or a number of turns"):
        AsyncOpenAI(api_key="k", cache=MemoryStore(), ordered="yes")
    with pytest.raises(ValueError, match="ordered is True, False, or a number of turns"), using(ordered=-1):
        pass
