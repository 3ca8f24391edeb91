"""C10 for each known provider: every surface that reaches it by its name gives a question the same key."""

from __future__ import annotations

import asyncio
import json

import anthropic
import groq
import httpx2
import openai
import pytest
import together
from google import genai

import cachepipe
from cachepipe import CacheMiss, MemoryStore, Services, clients
from cachepipe.batch import run_file
from cachepipe.models import AnthropicModel, OpenAIModel, TogetherModel
from cachepipe.providers import presets
from cachepipe.providers.presets import PRESETS
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.sdk.wrapping import wrap

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "m", "messages": HELLO}
LIMITED = {**CHAT, "max_tokens": 9}
SAID = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
BODIES = {"anthropic": LIMITED, "google": SAID}
"""By SDK, the body of the question; else it is a chat."""
PATHS = {"anthropic": "/v1/messages", "google": "/v1/models/m:generateContent"}
"""By SDK, where a proxy and a line of a file have the question; else it is a chat."""
SDKS = {
    "anthropic": anthropic.Anthropic,
    "google": genai.Client,
    "groq": groq.Groq,
    "together": together.Together,
}
MODELS = {"anthropic": lambda: AnthropicModel("m", max_tokens=9), "together": lambda: TogetherModel("m")}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for row in PRESETS.values():
        for name in (row.variable, row.host):
            if name is not None:
                monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(row.key, "hf_k")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)


def call(sdk, client):
    """Make the call of an SDK that asks the question."""
    if sdk == "google":
        return client.models.generate_content(model="m", contents="hello")
    if sdk == "anthropic":
        return client.messages.create(**LIMITED)
    return client.chat.completions.create(**CHAT)


def key_of_call(sdk, client):
    with pytest.raises(CacheMiss) as miss:
        call(sdk, client)
    return miss.value.key


async def key_of_async_call(sdk, client):
    with pytest.raises(CacheMiss) as miss:
        await call(sdk, client.aio if hasattr(client, "aio") else client)
    return miss.value.key


async def key_of_pipeline(model):
    async with cachepipe.OnlineAPI(model, MemoryStore(), mode="replay") as pipeline:
        with pytest.raises(CacheMiss) as miss:
            await pipeline.request(cachepipe.Request("hello"))
    await model.close()
    return miss.value.key


def key_of_run(name, folder, **line):
    lines, out = folder / "in.jsonl", folder / "out.jsonl"
    lines.write_text(json.dumps({"custom_id": "a", "method": "POST", **line}), encoding="utf-8")
    out.unlink(missing_ok=True)
    settings = {"mode": "replay", "cache": MemoryStore(), "base_url": presets.located(name)}
    asyncio.run(run_file(lines, out, **settings))
    said = json.loads(out.read_text(encoding="utf-8"))["error"]["message"]
    return said.partition(" for key ")[2].partition(" ")[0]


@pytest.fixture(scope="module")
def proxy():
    """A replay's proxy in front of all providers; it asks none of them."""
    upstreams = tuple(Upstream.of(name.lower(), name.lower()) for name in PRESETS)
    with running(ProxySettings(upstreams, MemoryStore(), port=0, log="off", replay=True)) as server:
        yield server


def key_of_proxy(proxy, name, path, body):
    upstream = Upstream.of("it", name)
    path = upstream.mount + path if upstream.kind == "openai" else path
    headers = {}
    if upstream.kind == "anthropic":
        headers["anthropic-version"] = anthropic.Anthropic(api_key="-").default_headers["anthropic-version"]
    answer = httpx2.post(f"{proxy.url}/up/{name}{path}", json=body, headers=headers)
    assert "x-cachepipe-key" in answer.headers, answer.text
    return answer.headers["x-cachepipe-key"]


@pytest.mark.parametrize("name", PRESETS)
def test_c10_a_question_to_a_provider_has_one_key_on_every_surface(name, proxy, tmp_path):
    row, lower = PRESETS[name], name.lower()
    body = BODIES.get(row.sdk, CHAT)
    path = PATHS.get(row.sdk, "/chat/completions")
    replay = {"cache": MemoryStore(), "mode": "replay"}
    keys = {}
    keys["client"] = key_of_call(row.sdk, getattr(clients, name)(**replay))
    service = getattr(Services, name)()
    keys["service"] = key_of_call(service.sdk, service.sync_client(**replay))
    if row.sdk != "anthropic":  # `run` takes no files for Anthropic
        keys["run"] = key_of_run(lower, tmp_path, url=path, body=body)
    keys["proxy"] = key_of_proxy(proxy, lower, path, body)
    if row.sdk in SDKS:
        keys["wrapped"] = key_of_call(row.sdk, wrap(SDKS[row.sdk](api_key="hf_k"), **replay))
    if row.protocol == "openai":
        compatible = {"base_url": presets.located(lower), "api_key": "hf_k"}
        keys["compatible"] = key_of_call("openai", wrap(openai.OpenAI(**compatible), **replay))

    async def others():
        keys["async client"] = await key_of_async_call(row.sdk, getattr(clients, f"Async{name}")(**replay))
        keys["async service"] = await key_of_async_call(service.sdk, service.client(**replay))
        if row.protocol == "openai":
            keys["compatible model"] = await key_of_pipeline(OpenAIModel("m", **compatible))
        if row.sdk in MODELS:
            keys["model"] = await key_of_pipeline(MODELS[row.sdk]())

    asyncio.run(others())
    assert set(keys.values()) == {keys["client"]}, "\n".join(f"{key} {where}" for where, key in keys.items())
