"""CacheSaver's clients of Hugging Face, and what those of local models pass on."""

from __future__ import annotations

import inspect

import pytest

from cachepipe import clients
from cachepipe.compat.cachesaver.models.huggingface import (
    AsyncHuggingFace,
    AsyncInferenceClient,
    HuggingFace,
    InferenceClient,
)
from cachepipe.compat.cachesaver.models.transformers import AsyncHFTransformers, HFTransformers
from cachepipe.compat.cachesaver.typedefs import Metadata
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "Sort a list."}]


async def settled(value):
    return await value if inspect.isawaitable(value) else value


def test_the_sdks_own_names_are_other_names_of_the_same_clients():
    assert InferenceClient is HuggingFace
    assert AsyncInferenceClient is AsyncHuggingFace


@pytest.mark.parametrize("kind", [HuggingFace, AsyncHuggingFace])
async def test_a_new_client_repeats_the_samples_of_the_one_before(kind, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        results = []
        for _ in range(2):
            client = kind(namespace="a", cachedir=tmp_path / "c", base_url=f"{server.url}/v1", api_key="k")
            create = client.chat.completions.create
            first, told = await settled(create(messages=HELLO, n=2, metadata=True))
            fresh = await settled(client.chat_completion(HELLO, n=2))
            assert first.choices != fresh.choices
            again, other = await settled(create(messages=HELLO, namespace="b", metadata=True))
            assert again.choices[0] == first.choices[0]
            assert other == Metadata(n=1, cached=[True], duplicated=[False])
            results.append((first, fresh))
            await settled(client.close())
        assert results[0] == results[1]
        assert told == Metadata(n=2, cached=[True, True], duplicated=[False, True])
        assert server.stats.samples_generated == 4


@pytest.mark.parametrize("kind", [HFTransformers, AsyncHFTransformers])
def test_a_client_of_a_local_model_gets_the_size_of_its_batches(kind, monkeypatch):
    monkeypatch.setitem(vars(clients), kind.__name__, lambda **given: given)
    made = kind(model_name="tiny", namespace="a", cachedir="c", batch_size=8, timeout=0.5).client
    assert made == {"model_name": "tiny", "cache": "c", "namespace": "a", "batch_size": 8, "timeout": 0.5}
