"""What pipelines make of adapters: their keys, how they present samples, their limits."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe import LocalAPI, MemoryStore, OnlineAPI, OrderedLocalAPI, Request, Response
from cachepipe.contract.keys import provider_question

pytestmark = pytest.mark.anyio


class Adapter:
    """A model with a provider's questions and its own way to present samples."""

    cache_scope = "https://api.example/v1/chat"

    def question(self, request, scope):
        body = {"messages": request.prompt, "model": "m"}
        return provider_question(scope or self.cache_scope, {"body": body})

    def present(self, value):
        return ("presented", value)

    async def request(self, request):
        return Response([f"a{number}" for number in range(request.n)])


@pytest.mark.parametrize(
    "make",
    [
        lambda model, store: OnlineAPI(model, store, batch_size=2),
        lambda model, store: OnlineAPI(model, store, in_flight=4),
        lambda model, store: LocalAPI(model, store, batch_size=8),
        OrderedLocalAPI,
    ],
)
async def test_c9_c10_an_adapter_behind_a_batcher_keeps_its_keys_and_presents_its_samples(make):
    store = MemoryStore()
    plain, batched = OnlineAPI(Adapter(), store), make(Adapter(), store)
    assert batched.key(Request("p")) == plain.key(Request("p"))
    async with asyncio.timeout(20):
        assert (await batched.request(Request("p"))).data == [("presented", "a0")]
        await batched.close()
    await plain.close()


@pytest.mark.parametrize("limit", ["4", 2.5])
async def test_c8_an_invalid_limit_of_a_model_is_an_error_not_a_hang(store, limit):
    class Model:
        max_n = limit

        async def request(self, request):
            return Response(["x"] * request.n)

    async def ask():
        async with OnlineAPI(Model(), store) as pipeline:
            await pipeline.request(Request("p"))

    with pytest.raises((TypeError, ValueError), match="max_n"):
        async with asyncio.timeout(5):
            await ask()


async def test_c8_an_adapter_that_cannot_present_a_sample_fails_the_request(store):
    class Model(Adapter):
        def present(self, value):
            raise ZeroDivisionError(value)

    async with asyncio.timeout(5), OnlineAPI(Model(), store) as pipeline:
        with pytest.raises(ZeroDivisionError):
            await pipeline.request(Request("p"))
        assert [sample.index for sample in store.samples(pipeline.key(Request("p")))] == [0]
