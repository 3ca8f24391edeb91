"""The clients of OpenAI-compatible providers: a row of the table is a client, a service and an upstream."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import stubs
from click.testing import CliRunner

import cachepipe
from cachepipe import MemoryStore, Services, clients, wire
from cachepipe.cli.group import cli
from cachepipe.clients import OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.providers import presets
from cachepipe.providers.info import info
from cachepipe.providers.presets import NO_KEY, PRESETS, Preset
from cachepipe.proxy.settings import BadSettings, Upstream
from cachepipe.testing import MockServer, MockSettings

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
KEY = "sk-mine-0123456789"
ROWS = {
    "Cerebras": ("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", 1),
    "DeepInfra": ("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY", None),
    "DeepSeek": ("https://api.deepseek.com", "DEEPSEEK_API_KEY", 1),
    "Fireworks": ("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", None),
    "LMStudio": ("http://localhost:1234/v1", "LMSTUDIO_API_KEY", 1),
    "Mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY", None),
    "Moonshot": ("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", 5),
    "NVIDIA": ("https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY", None),
    "Ollama": ("http://localhost:11434/v1", "OLLAMA_API_KEY", 1),
    "OpenRouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", None),
    "Perplexity": ("https://api.perplexity.ai", "PERPLEXITY_API_KEY", 1),
    "SGLang": ("http://localhost:30000/v1", "SGLANG_API_KEY", None),
    "SambaNova": ("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY", None),
    "VLLM": ("http://localhost:8000/v1", "VLLM_API_KEY", None),
    "XAI": ("https://api.x.ai/v1", "XAI_API_KEY", None),
}
"""Each provider: its base URL, the variable with its key, and the largest `n` that it honours."""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for row in PRESETS.values():
        for name in (row.key, row.variable, row.host):
            if name is not None:
                monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-theirs")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-not-theirs")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-not-theirs")


@pytest.fixture
def mine(server, monkeypatch):
    """A provider that is nothing but a row of the table, at the mock server."""
    row = Preset("Mine", server.base_url, "MINE_API_KEY", model="m", max_n=2)
    monkeypatch.setitem(PRESETS, "Mine", row)
    monkeypatch.setenv("MINE_API_KEY", KEY)
    monkeypatch.delitem(sys.modules, "cachepipe.clients")
    monkeypatch.setattr(cachepipe, "clients", clients)
    presets.at.cache_clear()
    yield importlib.import_module("cachepipe.clients")
    presets.at.cache_clear()
    for name in ("Mine", "AsyncMine"):
        vars(sys.modules["cachepipe.sdk.presets"]).pop(name, None)


def texts(response):
    return [choice.message.content for choice in response.choices]


def ask(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


def test_the_stub_for_type_checkers_is_that_of_the_table():
    assert stubs.STUB.read_text(encoding="utf-8") == stubs.text(), "run: python tests/stubs.py"


def test_the_cases_below_are_all_rows_of_the_table():
    assert {row.name for row in presets.compatible().values()} == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_client_a_service_and_a_scope(name, monkeypatch):
    url, key, most = ROWS[name]
    row = PRESETS[name]
    monkeypatch.setenv(key, KEY)
    for kind, base in (
        (getattr(clients, name), OpenAI),
        (getattr(clients, f"Async{name}"), clients.AsyncOpenAI),
    ):
        client = kind(cache=MemoryStore())
        assert isinstance(client, base)
        assert (str(client.base_url).rstrip("/"), client.api_key) == (url, KEY)
        assert (client.organization, client.project) == (None, None)
        twin = client.with_options(timeout=5)
        assert type(twin) is kind
        assert (twin.base_url, twin.api_key, twin.organization) == (client.base_url, KEY, None)
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert repr(kind) == f"<class 'cachepipe.clients.{kind.__name__}'>"
        assert inspect.signature(kind) == inspect.signature(base)
    service = getattr(Services, name)()
    assert (service.base_url, service.name, service.client_options()["api_key"]) == (url, name, KEY)
    own = service.sync_client(MemoryStore())
    assert type(own) is getattr(clients, name)
    assert (str(own.base_url).rstrip("/"), own.api_key, own.organization) == (url, KEY, None)
    assert presets.at(f"{url}/chat/completions") is row
    assert OpenAIModel("m", base_url=url, api_key="k").max_n == (most or wire.CHAT.max_n)
    assert Upstream.of("here", name.lower()).url == url


@pytest.mark.parametrize("name", ROWS)
def test_no_other_providers_key_is_ever_sent(name):
    row, kind = PRESETS[name], getattr(clients, name)
    if row.needs_key:
        with pytest.raises(
            openai.OpenAIError, match=f"{name} needs a key: set the environment variable {row.key}"
        ):
            kind(cache=MemoryStore())
        with pytest.raises(ValueError, match=row.key):
            getattr(Services, name)().client_options()
    else:
        assert kind(cache=MemoryStore()).api_key == NO_KEY
        assert getattr(Services, name)().client_options()["api_key"] == NO_KEY
    assert kind(cache=MemoryStore(), mode="replay").api_key == NO_KEY
    assert kind(cache=MemoryStore(), service=Services.custom("http://box/v1", api_key=KEY)).api_key == KEY


def test_the_environment_names_another_server(monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", "http://box:9000/v1/")
    monkeypatch.setenv("OLLAMA_HOST", "box")
    assert str(clients.VLLM(cache=MemoryStore()).base_url) == "http://box:9000/v1/"
    assert str(clients.Ollama(cache=MemoryStore()).base_url) == "http://box:11434/v1/"
    assert str(clients.VLLM(cache=MemoryStore(), base_url="http://other/v1").base_url) == "http://other/v1/"
    assert Services.VLLM().base_url == "http://box:9000/v1"


def test_a_row_made_here_is_enough_for_a_client(mine, server):
    store = MemoryStore()
    with mine.Mine(cache=store) as client:
        first = ask(client, n=5)
        assert server.stats.requests == 3  # it honours n=2
        assert texts(ask(client.in_namespace("b"), n=5)) == texts(first)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
        with ThreadPoolExecutor(8) as pool:
            others = list(pool.map(lambda _: texts(ask(client))[0], range(8)))
        assert len({streamed, *texts(first)}) > 1
    calls = server.stats.requests
    with cachepipe.run(), mine.Mine(cache=store) as client:
        assert texts(ask(client, n=5)) == texts(first)
        assert texts(ask(client)) == [streamed]
        assert sorted(texts(ask(client))[0] for _ in range(8)) == sorted(others)
        assert (
            ask(client.in_namespace("c").with_options(max_retries=0)).choices[0].message.content
            == texts(first)[0]
        )
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, namespace="d") as client:
        assert texts(ask(client, n=5)) == texts(first)
    assert server.stats.requests == calls


@pytest.mark.anyio
async def test_a_row_made_here_is_enough_for_an_async_client(mine, server):
    async with mine.AsyncMine(cache=MemoryStore()) as client:
        both = await asyncio.gather(ask(client), ask(client, temperature=0.5))
        stream = await ask(client.in_namespace("b"), stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(parts) == texts(both[0])[0]
        assert info(await ask(copy.copy(client).in_namespace("c"))).cached == (True,)
    assert server.stats.requests == 2


@pytest.mark.anyio
async def test_a_stream_of_more_choices_than_one_call_brings_is_made_of_several_calls(mine, server):
    async with mine.AsyncMine(cache=MemoryStore()) as client:
        said = {}
        async for chunk in await ask(client, n=5, stream=True):
            for choice in chunk.choices:
                said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
        assert [said[number] for number in range(5)] == texts(await ask(client.in_namespace("b"), n=5))
    assert (server.stats.requests, server.stats.samples_generated) == (3, 5)


def test_a_request_with_a_seed_is_sent_as_it_was_written(mine, server):
    with mine.Mine(cache=MemoryStore()) as client:
        ask(client, n=5, seed=1)
    assert server.stats.requests == 1


def test_a_provider_that_ignores_n_is_asked_for_the_rest_wherever_it_is(monkeypatch):
    with MockServer.in_thread(
        MockSettings(seed=1, max_tokens=4, faults=[{"kind": "short", "keep": 1}])
    ) as server:
        with OpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
            first = ask(client, n=3)
            assert texts(ask(client.in_namespace("b"), n=3)) == texts(first)
        assert (server.stats.requests, server.stats.samples_generated) == (3, 3)


def test_a_row_made_here_is_enough_for_a_service_and_the_commands(mine, server, tmp_path, monkeypatch):
    cache, lines, out = tmp_path / "cache", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    service = Services.Mine(max_tokens=None)
    with service.sync_client(str(cache)) as client:
        first = texts(ask(client, n=2))
    assert service.stats().calls == 1
    lines.write_text(json.dumps({"messages": HELLO, "n": 2}) + "\n", encoding="utf-8")
    command = ["run", str(lines), "-o", str(out), "--cache", str(cache), "--model", "m", "--namespace", "b"]
    done = CliRunner().invoke(cli, [*command, "--base-url", "mine", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(out.read_text(encoding="utf-8"))
    assert [choice["message"]["content"] for choice in told["response"]["body"]["choices"]] == first
    assert server.stats.requests == 1
    monkeypatch.delenv("MINE_API_KEY")
    refused = CliRunner().invoke(cli, [*command, "--base-url", "mine"])
    assert "MINE_API_KEY is not set" in refused.output
    unknown = CliRunner().invoke(cli, [*command, "--base-url", "their"])
    assert "expected a base URL" in unknown.output
    assert "openrouter" in unknown.output


def test_what_openrouter_billed_is_the_price_streamed_or_not(monkeypatch):
    """Its answers say what they have cost, also for models that no table lists."""
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, "cost": 0.00025}
    head = {"id": "gen-1", "created": 1, "model": "someone/new"}
    ending = {"message": {"role": "assistant", "content": "So."}, "finish_reason": "stop", "index": 0}
    whole = {**head, "object": "chat.completion", "choices": [ending], "usage": usage}
    delta = {"index": 0, "delta": {"role": "assistant", "content": "So."}, "finish_reason": "stop"}
    chunks = [{**head, "choices": [delta]}, {**head, "choices": [], "usage": usage}]
    events = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"

    def respond(request):
        if json.loads(request.content).get("stream"):
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=events)
        return httpx.Response(200, json=whole)

    monkeypatch.setenv("OPENROUTER_API_KEY", "k")
    transport = httpx.Client(transport=httpx.MockTransport(respond))
    with clients.OpenRouter(cache=MemoryStore(), http_client=transport) as client:
        first = info(ask(client))
        stream = ask(client, stream=True)
        assert list(stream)
        hit = info(ask(client.in_namespace("b")))
    for billed in (first, info(stream)):
        assert (billed.billed_cost, billed.saved_cost) == (0.00025, 0)
    assert (hit.billed_cost, hit.saved_cost) == (0, 0.00025)


def test_an_upstream_is_named_by_a_url_or_by_a_provider():
    assert Upstream.of("a", "openrouter").mount == "/v1"
    assert Upstream.of("a", "DeepSeek").mount == ""
    groq = Upstream.of("a", "groq")
    assert (groq.url, groq.mount, groq.kind) == ("https://api.groq.com/openai/v1", "/openai/v1", "openai")
    assert Upstream.of("a", "anthropic").kind == "anthropic"
    with pytest.raises(BadSettings, match=r"expected a base URL .*, or one of .*anthropic, .*openrouter"):
        Upstream.of("a", "openruter")


def test_a_wrong_name_or_keyword_says_what_there_is(monkeypatch):
    with pytest.raises(AttributeError, match=r"there is no service 'OpenRuter'; there are OpenAI, .*custom"):
        Services.OpenRuter  # noqa: B018
    with pytest.raises(AttributeError, match="OpenRouter"):
        clients.OpenRuter  # noqa: B018
    assert {"OpenRouter", "custom"} <= {*dir(Services)}
    with pytest.raises(ImportError, match=r"OpenRouter is in cachepipe\.clients"):
        from cachepipe import OpenRouter  # noqa: F401, PLC0415
    with pytest.raises(TypeError, match="OpenRouter takes no cachedir=; use cache="):
        clients.OpenRouter(cachedir="caches/exp")
