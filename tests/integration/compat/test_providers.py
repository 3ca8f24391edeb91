"""CacheSaver's clients of Groq, OpenRouter and vLLM, with the import root changed."""

from __future__ import annotations

import importlib

import pytest

from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
KINDS = {"groq": "Groq", "openrouter": "OpenRouter", "vllm": "VLLM"}


@pytest.mark.parametrize(("module", "name"), KINDS.items())
async def test_a_new_client_and_another_namespace_repeat_the_first_without_a_call(module, name, tmp_path):
    pytest.importorskip("groq" if module == "groq" else "openai")
    models = importlib.import_module(f"cachepipe.compat.cachesaver.models.{module}")
    ask = {"model": "m", "messages": [{"role": "user", "content": "Name a colour."}], "n": 2}
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8)) as server:
        given = {
            "cachedir": str(tmp_path / "cache"),
            "base_url": server.url if module == "groq" else server.base_url,
            "api_key": "none",
        }
        said = []
        for namespace in ("a", "a", "b"):
            client = getattr(models, f"Async{name}")(namespace=namespace, batch_size=2, timeout=1, **given)
            answer = await client.chat.completions.create(**ask)
            said.append([choice.message.content for choice in answer.choices])
            await client.close()
        with getattr(models, name)(namespace="c", **given) as client:
            answer = client.chat.completions.create(**ask)
            said.append([choice.message.content for choice in answer.choices])
        assert said == [said[0]] * 4
        assert server.stats.samples_generated == 2
