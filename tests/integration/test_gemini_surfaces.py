"""C10 for Gemini: the client, the proxy and `cachepipe run` share samples, and so do streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

import openai
import pytest
from google import genai

from cachepipe import MemoryStore, OnlineAPI, Request, wire
from cachepipe.batch import run_file
from cachepipe.clients import Gemini
from cachepipe.models import GeminiModel
from cachepipe.providers.info import info
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer, MockSettings

MODEL = "gemini-2.5-flash"
PATH = f"/v1/models/{MODEL}"
EMBEDDER = "gemini-embedding-001"


def said(text):
    return {"role": "user", "parts": [{"text": text}]}


ASK = {"contents": [said("hello")]}
LINES = [
    {"custom_id": "a", "url": f"{PATH}:generateContent", "body": ASK},
    {"custom_id": "b", "url": f"{PATH}:streamGenerateContent", "body": ASK},
    *(
        {"custom_id": name, "url": f"/v1/models/{EMBEDDER}:embedContent", "body": {"content": content}}
        for name, content in (("c", said("one")), ("d", said("two")))
    ),
]


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12, api_key="k")) as running_server:
        yield running_server


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """Run lines, and return the answers by the ids of their lines."""
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(lines, **settings):
        source, target = tmp_path / "lines.jsonl", tmp_path / "results.jsonl"
        source.write_text("".join(json.dumps({"method": "POST", **line}) + "\n" for line in lines))
        target.unlink(missing_ok=True)
        settings = {"base_url": server.url, "cache": str(tmp_path / "cache"), **settings}
        report = asyncio.run(run_file(source, target, **settings))
        results = [json.loads(line) for line in target.read_text().splitlines()]
        return report, {each["custom_id"]: each for each in results}

    return run


def text_of(result):
    return result["response"]["body"]["candidates"][0]["content"]["parts"][0]["text"]


def test_c10_the_surfaces_share_samples(server, run, tmp_path):
    folder = str(tmp_path / "cache")
    _, results = run(LINES, namespace="run")
    assert (server.stats.requests, server.stats.samples_generated) == (2, 4)  # a call for each API
    texts = [text_of(results[name]) for name in "ab"]
    vectors = [results[name]["response"]["body"]["embedding"]["values"] for name in "cd"]

    ours = Gemini(api_key="k", http_options={"base_url": server.url}, cache=folder, namespace="client")
    settings = ProxySettings((Upstream.of("google", server.url, kind="gemini"),), folder, port=0, log="off")
    with ours, running(settings) as proxy:
        through = genai.Client(api_key="k", http_options={"base_url": f"{proxy.url}/ns/proxy@1"})
        for client in (ours, through):
            first = client.models.generate_content(model=MODEL, contents="hello")
            chunks = list(client.models.generate_content_stream(model=MODEL, contents="hello"))
            assert [first.text, "".join(chunk.text or "" for chunk in chunks)] == texts
            found = client.models.embed_content(model=EMBEDDER, contents=["two", "one"])
            assert [embedding.values for embedding in found.embeddings] == vectors[::-1]
        through.close()
        assert info(chunks[-1]) is None
    assert server.stats.requests == 2


def test_a_rerun_of_lines_makes_no_call_and_n_is_the_number_of_candidates(server, run):
    report, first = run(LINES, namespace="a", n=3, temperature=0.5)
    assert len(first["a"]["response"]["body"]["candidates"]) == 3
    assert report.failed == 0
    calls = server.stats.requests
    report, again = run(LINES, namespace="a", n=3, temperature=0.5, base_url=f"{server.url}/v1")
    assert report.calls == 0
    assert [each["response"]["body"] for each in again.values()] == [
        each["response"]["body"] for each in first.values()
    ]
    assert server.stats.requests == calls


def test_a_refused_line_has_googles_error(server, run):
    server.settings = MockSettings(seed=1, any_model=False, models=("other",))
    _, results = run(LINES[:1])
    assert results["a"]["error"]["code"] == "NOT_FOUND"
    assert "no model" in results["a"]["error"]["message"]


def test_without_a_base_url_lines_go_to_google(run):
    with pytest.raises(Exception, match="/v1beta/models/MODEL:generateContent"):
        run([{"url": "/v1/models/m:predict", "body": {}}], base_url=None)


@dataclass(frozen=True)
class Asked(Request):
    temperature: float | None = None
    model: str | None = None


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And?"},
]


@pytest.mark.anyio
async def test_c10_an_adapter_and_a_client_share_samples(server):
    store = MemoryStore()
    model = GeminiModel(MODEL, base_url=server.url, api_key="k")
    client = Gemini(api_key="k", http_options={"base_url": server.url}, cache=store, namespace="client")
    async with model, OnlineAPI(model, store) as pipeline:
        plain = (await pipeline.request(Request("hello", n=3))).data
        warm = (await pipeline.request(Asked("hello", temperature=0.5))).data
        long = (await pipeline.request(Request(HISTORY))).data
        assert len({*plain, *warm, *long}) == 5
        assert (server.stats.requests, model.calls) == (3, 3)

        def ask(contents, **config):
            made = client.models.generate_content(model=MODEL, contents=contents, config=config)
            return [candidate.content.parts[0].text for candidate in made.candidates]

        assert await asyncio.to_thread(ask, "hello", candidate_count=3) == plain
        assert await asyncio.to_thread(ask, "hello", temperature=0.5) == warm
        contents = [
            {"role": {"assistant": "model"}.get(each["role"], "user"), "parts": [{"text": each["content"]}]}
            for each in HISTORY[1:]
        ]
        assert await asyncio.to_thread(ask, contents, system_instruction="Be brief.") == long
        assert (await pipeline.request(Request(contents, namespace="b"))).data != long  # without a system
        assert server.stats.requests == 4
        with pytest.raises(wire.BadRequest, match="make another GeminiModel"):
            await pipeline.request(Asked("hello", model="other"))
        with pytest.raises(wire.BadRequest, match="a role and a text"):
            await pipeline.request(Request([{"role": "user", "content": [{"type": "text"}]}]))
        with pytest.raises(TypeError, match="a string, or a list of messages"):
            await pipeline.request(Request(5))
    client.close()


@pytest.mark.anyio
async def test_an_adapter_takes_the_key_and_the_url_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("GEMINI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "not-google-s")
    for name, error in (("k", None), ("wrong", openai.AuthenticationError)):
        monkeypatch.setenv("GEMINI_API_KEY", name)
        async with GeminiModel(MODEL, max_retries=0) as model, OnlineAPI(model, MemoryStore()) as pipeline:
            with contextlib.nullcontext() if error is None else pytest.raises(error):
                assert (await pipeline.request(Request("hello"))).data
