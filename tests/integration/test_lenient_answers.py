"""Answers that only a lenient parser reads: stored as they came, and replayed on every surface (C9, C10)."""

from __future__ import annotations

import contextlib
import http.server
import json

import anthropic
import httpx2
import openai
import orjson
import pytest
from click.testing import CliRunner

from cachepipe import AsyncCacher, DiskStore, Request
from cachepipe.batch import run_file
from cachepipe.cli.group import cli
from cachepipe.clients import Anthropic, AsyncOpenAI, OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream

pytestmark = pytest.mark.anyio
LONG = 98765432109876543210987654321
TEXTS = [
    '{"mean": NaN}',
    '{"mean": Infinity, "least": -Infinity}',
    '{"cost": 1e400}',
    f'{{"count": {LONG}}}',
    '{"said": "cut \\ud83d"}',
    '{"said": "\\ude00", "said": "the other half \\udfff"}',
    "[" * 300 + "]" * 300,
]
"""What answers hold besides what the SDKs know."""


def chat(more, content='"hi"'):
    """The text of a chat completion with more fields, not written as any library would."""
    return (
        '{ "id":"c1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":'
        f'{{"role":"assistant","content":{content}}},"finish_reason":"stop","logprobs":null}}],\n'
        f'"usage":{{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}, "more":{more} }}'
    ).encode()


class Provider:
    """A provider that answers each request with the bytes that it is given.

    Attributes:
        url: where it is.
        bodies: what was asked.
        answers: makes the answer of a request's JSON: bytes, or a list of events.
    """

    def __init__(self, url):
        self.url = url
        self.bodies = []
        self.answers = None


@pytest.fixture
def provider(answering_with):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            content = self.rfile.read(int(self.headers["content-length"]))
            made.bodies.append(content)
            answer = made.answers(json.loads(content))
            kind = "application/json" if isinstance(answer, bytes) else "text/event-stream"
            answer = answer if isinstance(answer, bytes) else b"".join(answer)
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with answering_with(Handler) as url:
        made = Provider(url)
        yield made


def asked(content="hello", **more):
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


@contextlib.contextmanager
def proxied(provider, cache):
    upstreams = (Upstream.of("p", f"{provider.url}/v1"),)
    with (
        running(ProxySettings(port=0, log="off", upstreams=upstreams, cache=str(cache))) as server,
        httpx2.Client(timeout=20) as client,
    ):
        yield lambda namespace, body: client.post(
            f"{server.url}/ns/{namespace}/v1/chat/completions",
            json=body,
            headers={"authorization": "Bearer k"},
        )


@pytest.mark.parametrize("text", TEXTS)
def test_c9_a_hit_is_parsed_as_the_sdk_parses_a_miss(provider, tmp_path, text):
    provider.answers = lambda _: chat(text)
    with openai.OpenAI(base_url=f"{provider.url}/v1", api_key="k") as plain:
        expected = repr(plain.chat.completions.create(**asked()).model_extra)
    with OpenAI(base_url=f"{provider.url}/v1", api_key="k", cache=tmp_path, repeat="same") as client:
        for _ in range(3):  # the last ones on the fast path
            assert repr(client.chat.completions.create(**asked()).model_extra) == expected
        raw = client.chat.completions.with_raw_response.create(**asked())
        assert raw.content == chat(text)
    assert len(provider.bodies) == 2


@pytest.mark.parametrize("text", TEXTS)
def test_c9_the_proxy_serves_the_bytes_that_came(provider, tmp_path, text):
    provider.answers = lambda _: chat(text)
    with proxied(provider, tmp_path) as post:
        contents = [post(namespace, asked()).content for namespace in "abc"]
    assert contents == [chat(text)] * 3
    assert len(provider.bodies) == 1


@pytest.mark.parametrize("text", TEXTS)
async def test_c10_such_a_sample_is_a_hit_on_every_surface(provider, tmp_path, text):
    provider.answers = lambda _: chat(text)
    base_url = f"{provider.url}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key="k", cache=tmp_path, namespace="client") as client:
        first = await client.chat.completions.create(**asked("x"))
    with contextlib.closing(DiskStore(tmp_path)) as store:
        async with OpenAIModel("m", base_url=base_url, api_key="k", raw=True) as model:
            cacher = AsyncCacher(model, store)
            response = await cacher.request(Request("x", namespace="core"))
            await cacher.close()
    [sample] = response.data
    assert repr(dict(sample)["more"]) == repr(first.model_extra["more"])
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x"}\n')
    report = await run_file(
        source, target, model="m", base_url=base_url, api_key="k", cache=tmp_path, namespace="run"
    )
    assert report.failed == 0
    [line] = map(orjson.loads, target.read_bytes().splitlines())
    assert line["response"]["body"] == {"raw": chat(text).decode()}
    assert len(provider.bodies) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_c9_what_show_prints_is_valid_json(provider, tmp_path, text):
    provider.answers = lambda _: chat(text, '"half \\ud83d"')
    with OpenAI(base_url=f"{provider.url}/v1", api_key="k", cache=tmp_path) as client:
        client.chat.completions.create(**asked())
    with contextlib.closing(DiskStore(tmp_path, read_only=True)) as store:
        [info] = store.keys()
    told = CliRunner().invoke(cli, ["show", info.key, "--cache", str(tmp_path), "--json"])
    [sample] = orjson.loads(told.stdout)["samples"]
    assert sample["value"] == {"raw": chat(text, '"half \\ud83d"').decode()}
    assert sample["text"] == "half \ufffd"
    assert sample["total_tokens"] == 5


@pytest.mark.parametrize("text", TEXTS)
def test_c9_the_proxys_page_is_given_valid_json(provider, tmp_path, text):
    provider.answers = lambda _: chat(text)
    upstreams = (Upstream.of("p", f"{provider.url}/v1"),)
    with (
        running(ProxySettings(port=0, log="off", upstreams=upstreams, cache=str(tmp_path))) as server,
        httpx2.Client(timeout=20) as client,
    ):
        sent = client.post(
            f"{server.url}/v1/chat/completions", json=asked(), headers={"authorization": "Bearer k"}
        )
        key = sent.headers["x-cachepipe-key"]
        told = orjson.loads(client.get(f"{server.url}/cachepipe/api/keys/{key}/samples").content)
        counted = orjson.loads(client.get(f"{server.url}/cachepipe/api/counters").content)
    assert told["items"][0]["value"] == {"raw": chat(text).decode()}
    assert told["items"][0]["summary"]["text"] == "hi"
    assert counted["total"]["spent"]["total_tokens"] == 5


@pytest.mark.parametrize("wanted", [1, 2])
def test_c9_choices_and_streams_made_of_such_samples_keep_every_value(provider, tmp_path, wanted):
    """Choices are numbered anew, and usage is shared out."""
    choice = (
        '{"index":%d,"message":{"role":"assistant","content":"a\\udfff b"},"finish_reason":"stop",'
        '"logprobs":{"content":[{"token":"a","logprob":-Infinity,"bytes":[%d],"top_logprobs":[]}]}}'
    )
    choices = ",".join(choice % (place, LONG + place) for place in (0, 1))
    provider.answers = lambda _: (
        f'{{"id":"c1","object":"chat.completion","created":1,"model":"m","choices":[{choices}],'
        f'"usage":{{"prompt_tokens":{LONG},"completion_tokens":{LONG},"total_tokens":{2 * LONG}}}}}'
    ).encode()
    with OpenAI(base_url=f"{provider.url}/v1", api_key="k", cache=tmp_path, repeat="same") as client:
        first = client.chat.completions.create(**asked(n=2))
        again = client.chat.completions.create(**asked(n=wanted))
        streamed = list(client.chat.completions.create(**asked(n=wanted, stream=True)))
    assert len(provider.bodies) == 1
    for place in range(wanted):
        assert repr(again.choices[place]) == repr(first.choices[place])
    assert again.usage.prompt_tokens == LONG
    assert again.usage.completion_tokens == (LONG if wanted == 2 else LONG // 2)
    for place in range(wanted):
        parts = [part.choices[0] for part in streamed if part.choices and part.choices[0].index == place]
        assert "".join(part.delta.content or "" for part in parts) == "a\udfff b"
        tokens = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [(entry.logprob, entry.bytes) for entry in tokens] == [(float("-inf"), [LONG + place])]


@pytest.mark.parametrize("first", [True, False], ids=["streamed first", "streamed on replay"])
def test_c9_the_input_of_a_tool_call_keeps_its_values_in_streams(provider, tmp_path, first):
    told = f'{{"wei": {LONG}, "low": -1e999, "name": "\\ud83d"}}'
    message = {
        "id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 4},
    }  # fmt: skip
    block = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    events = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "input_json_delta", "partial_json": part},
            }
            for part in (told[:9], told[9:])
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 4}},
        {"type": "message_stop"},
    ]
    whole = json.dumps({**message, "content": [{**block, "input": 0}], "stop_reason": "tool_use"})
    whole = whole.replace('"input": 0', f'"input": {told}').encode()

    def answer(body):
        if not body.get("stream"):
            return whole
        return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]

    provider.answers = answer
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    with Anthropic(base_url=provider.url, api_key="k", cache=tmp_path, repeat="same") as client:

        def input_of(*, stream):
            if not stream:
                return client.messages.create(**body).content[0].input
            parts = client.messages.create(**body, stream=True)
            deltas = [part.delta for part in parts if part.type == "content_block_delta"]
            return json.loads("".join(delta.partial_json for delta in deltas))

        expected = repr(json.loads(told))
        assert [repr(input_of(stream=stream)) for stream in (first, not first, first)] == [expected] * 3
    assert len(provider.bodies) == 1


async def test_an_emoji_that_is_streamed_in_two_halves_is_stored_whole(provider, tmp_path):
    def piece(delta, finish="null"):
        return (
            'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
            f'[{{"index":0,"delta":{delta},"finish_reason":{finish}}}]}}\n\n'
        ).encode()

    provider.answers = lambda body: (
        [
            piece('{"content":"a\\ud83d"}'),
            piece('{"content":"\\ude00b"}'),
            piece("{}", '"stop"'),
            b"data: [DONE]\n\n",
        ]
        if body.get("stream")
        else b"{}"
    )
    async with AsyncOpenAI(
        base_url=f"{provider.url}/v1", api_key="k", cache=tmp_path, repeat="same"
    ) as client:
        first = [part async for part in await client.chat.completions.create(**asked(stream=True))]
        halves = "".join(part.choices[0].delta.content or "" for part in first)
        assert halves == "a\ud83d\ude00b"  # as the SDK reads it
        again = await client.chat.completions.create(**asked())
    assert again.choices[0].message.content == "a😀b"


async def test_c9_a_line_with_half_an_emoji_is_run_like_any_other(provider, tmp_path):
    provider.answers = lambda _: chat("null")
    lines = [
        b'{"custom_id": "\\ud83d", "prompt": "half \\ud83d", "note": "\\ude00"}',
        b'{"custom_id": "b", "prompt": "fine", "count": %d}' % LONG,
        b'{"custom_id": "c", "prompt": "x", "seed": NaN, "note": Infinity}',
        b'{"custom_id": "d", "prompt": "x", "seed": -1e999}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    for _ in range(2):
        report = await run_file(
            source,
            target,
            model="m",
            base_url=f"{provider.url}/v1",
            api_key="k",
            cache=tmp_path / "c",
        )
        assert (report.done, report.failed, report.errors) == (4, 2, {"bad_request": 2})
        results = [json.loads(line) for line in target.read_bytes().splitlines()]
        assert [result["custom_id"] for result in results] == ["\ud83d", "b", "c", "d"]
        assert (results[0]["note"], results[1]["count"], results[2]["note"]) == (
            "\ude00",
            LONG,
            {"raw": "Infinity"},
        )
        assert "finite number" in results[2]["error"]["message"]
        assert results[0]["response"]["body"]["choices"][0]["message"]["content"] == "hi"
    said = [json.loads(body)["messages"][0]["content"] for body in provider.bodies]
    assert sorted(said) == ["fine", "half \ud83d"]


@pytest.mark.parametrize("kind", [openai.OpenAI, anthropic.Anthropic])
def test_a_request_with_half_an_emoji_fails_as_with_the_plain_sdk(provider, tmp_path, kind):
    provider.answers = lambda _: chat("null")
    ours = {openai.OpenAI: OpenAI, anthropic.Anthropic: Anthropic}[kind]
    with ours(base_url=f"{provider.url}/v1", api_key="k", cache=tmp_path) as client:
        create = client.chat.completions.create if kind is openai.OpenAI else client.messages.create
        more = {} if kind is openai.OpenAI else {"max_tokens": 5}
        with pytest.raises(UnicodeEncodeError):
            create(**asked("half \ud83d"), **more)
    assert provider.bodies == []


def test_c9_the_proxy_sends_what_it_keys(provider, tmp_path):
    """Of a name that is given twice the last counts; digits and halves of characters are kept."""
    provider.answers = lambda _: chat("null")
    upstreams = (Upstream.of("p", f"{provider.url}/v1"),)
    bodies = [
        b'{"model":"m","model":"n","messages":[],"seed":-0}',
        b'{"model":"n","messages":[],"seed":0}',
        b'{"model":"n","messages":[],"seed":%d}' % LONG,
        b'{"model":"n","messages":[],"seed":%d.0}' % LONG,
        b'{"model":"n","messages":["\\ud83d"]}',
    ]
    with (
        running(ProxySettings(port=0, log="off", upstreams=upstreams, cache=str(tmp_path))) as server,
        httpx2.Client(timeout=20, headers={"authorization": "Bearer k"}) as client,
    ):
        answers = [
            client.post(f"{server.url}/ns/a@{run}/v1/chat/completions", content=body)
            for run, body in enumerate(bodies)
        ]
        keys = [answer.headers["x-cachepipe-key"] for answer in answers]
        long = client.post(f"{server.url}/v1/chat/completions", content=b'{"seed":%s}' % (b"7" * 4301))
    assert keys[0] == keys[1]
    assert len({*keys}) == 4
    assert [json.loads(body) for body in provider.bodies] == [
        json.loads(body) for body in [bodies[0], *bodies[2:]]
    ]
    assert long.status_code == 400
    assert "more than 4,300 digits" in long.json()["error"]["message"]
