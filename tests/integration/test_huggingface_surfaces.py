"""C10 for Hugging Face's own routes: client, proxy and `cachepipe run` share samples, and so do streams."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest
from huggingface_hub import InferenceClient

from cachepipe import DiskStore, listings
from cachepipe.batch import run_file
from cachepipe.clients import HuggingFace
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer, MockSettings

PATH = "/models/org/tiny"
PIPELINE = f"{PATH}/pipeline/feature-extraction"
TOKEN = "hf_the-token"


def lines_of(*bodies):
    return [
        {"method": "POST", "custom_id": str(number), "url": path, "body": body}
        for number, (path, body) in enumerate(bodies)
    ]


LINES = lines_of(
    (PATH, {"inputs": "Sort", "parameters": {"details": True}}),
    (PATH, {"inputs": "Hello", "parameters": {}}),
    (PIPELINE, {"inputs": ["one", "two"]}),
    (PIPELINE, {"inputs": "one"}),
    ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
)


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12, api_key=TOKEN)) as running_server:
        yield running_server


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def proxy(server, folder):
    settings = ProxySettings((Upstream.of("hub", server.url),), folder, port=0, log="off")
    with running(settings) as serving:
        yield serving


@pytest.fixture
def run(server, folder, tmp_path, monkeypatch):
    """Run lines, and return the bodies of the answers."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)

    def run(lines, **settings):
        source, target = tmp_path / "lines.jsonl", tmp_path / "results.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        target.unlink(missing_ok=True)
        asyncio.run(run_file(source, target, **{"base_url": server.url, "cache": folder, **settings}))
        results = [json.loads(line) for line in target.read_text().splitlines()]
        return [each["response"] and each["response"]["body"] for each in results]

    return run


def test_c10_the_surfaces_share_samples(server, run, proxy, folder):
    bodies = run(LINES[:4], namespace="run")
    calls = server.stats.requests
    assert calls == 4
    text, hello = bodies[0][0]["generated_text"], bodies[1][0]["generated_text"]
    ours = HuggingFace(server.url, token=TOKEN, cache=folder, namespace="client")
    through = InferenceClient(f"{proxy.url}/ns/proxy@1", token=TOKEN)
    with ours, through:
        for client, base in ((ours, server.url), (through, f"{proxy.url}/ns/proxy@1")):
            first = client.text_generation("Sort", details=True, model=base + PATH)
            assert (first.generated_text, first.details.generated_tokens) == (text, 12)
            assert "".join(client.text_generation("Hello", stream=True, model=base + PATH)) == hello
            vectors = client.feature_extraction(["two", "one"], model=base + PIPELINE)
            assert vectors.tolist()[::-1] == [pytest.approx(vector) for vector in bodies[2]]
            alone = client.feature_extraction("one", model=base + PIPELINE)
            assert alone.tolist() == pytest.approx(bodies[3])
    assert server.stats.requests == calls


def test_c10_a_stream_through_the_proxy_is_a_hit_of_the_client(server, proxy, folder):
    through = InferenceClient(f"{proxy.url}/ns/a@1{PATH}", token=TOKEN)
    events = list(through.text_generation("Sort", stream=True, details=True))
    with HuggingFace(f"{server.url}{PATH}", token=TOKEN, cache=folder, namespace="b") as ours:
        whole = ours.text_generation("Sort", details=True)
        assert whole.generated_text == events[-1].generated_text
        assert [token.text for token in whole.details.tokens] == [event.token.text for event in events]
    assert server.stats.requests == 1


def test_a_server_s_two_routes_share_samples_through_the_proxy(server, proxy):
    headers, body = {"authorization": f"Bearer {TOKEN}"}, {"inputs": "Sort", "parameters": {}}
    with httpx2.Client(headers=headers) as http:
        streamed = http.post(f"{proxy.url}/ns/a@1/generate_stream", json=body)
        whole = http.post(f"{proxy.url}/ns/b@1/generate", json=body)
        listed = http.post(f"{proxy.url}/ns/c@1{PATH}", json=body)  # another URL is another question
        other = http.post(f"{proxy.url}/ns/c@1{PATH}", json={"inputs": {"question": "q"}, "parameters": {}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
    assert whole.json() == {"generated_text": last["generated_text"]}
    assert isinstance(listed.json(), list)
    assert (other.status_code, other.json()["error_type"]) == (400, "invalid_request_error")
    assert [reply.headers["cache-status"].split(";")[1].strip() for reply in (streamed, whole, listed)] == [
        "fwd=miss",
        "hit",
        "fwd=miss",
    ]
    assert server.stats.requests == 3


def test_a_miss_of_a_replay_is_an_error_that_the_sdk_reads(server, folder, run):
    run(LINES[:1])
    settings = ProxySettings((Upstream.of("hub", server.url),), folder, port=0, log="off", replay=True)
    with running(settings) as replaying:
        client = InferenceClient(f"{replaying.url}{PATH}", token="none")
        assert client.text_generation("Sort", details=True)
        with pytest.raises(Exception, match="Run it once without --replay"):
            client.text_generation("another")
    assert server.stats.requests == 1


def test_lines_are_checked_and_filled_in(server, run, folder):
    bodies = run(LINES[:2], max_tokens=3, temperature=0.5, namespace="a")
    assert bodies[0][0]["details"]["generated_tokens"] == 3
    with HuggingFace(f"{server.url}{PATH}", token=TOKEN, cache=folder, namespace="b") as ours:
        hello = ours.text_generation("Hello", max_new_tokens=3, temperature=0.5)
        assert hello == bodies[1][0]["generated_text"]
    assert server.stats.requests == 2
    with pytest.raises(Exception, match="/models/MODEL/pipeline/feature-extraction"):
        run(lines_of(("/models/a/b/c", {"inputs": "x"})))


def test_the_key_of_openai_is_not_sent_to_the_hub(server, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    assert run(LINES[:1])[0]
    monkeypatch.delenv("HF_TOKEN")
    [refused] = run(LINES[1:2])
    assert "none" in json.dumps(refused)  # the server got no key at all


def test_listings_show_the_text_and_the_prompt(server, folder):
    with HuggingFace(server.url, token=TOKEN, cache=folder, namespace="a") as ours:  # a URL without a path
        text = ours.text_generation("Sort")
        ours.feature_extraction(["one"], model=server.url + PIPELINE)
    store = DiskStore(folder)
    shown, keys = {}, store.keys()
    for key in keys:
        [sample] = store.samples(key.key)
        prompt = listings.prompt_in(listings.document_of(store.question(key.key)))
        shown[prompt] = listings.sample_fields(sample, key.scope)["summary"]["text"]
    store.close()
    assert shown == {"Sort": text, '["one"]': "1 by 256 numbers"}
