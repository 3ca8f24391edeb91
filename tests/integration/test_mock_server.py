"""The mock server, through the real SDKs and through bare sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace

import anthropic
import forked
import httpx
import openai
import pytest
import together
from click.testing import CliRunner
from scipy.stats import chisquare

from cachepipe.testing import MockServer, MockSettings, NGramModel
from cachepipe.testing.command import mock_server
from cachepipe.testing.ngram import default_model, flatten
from cachepipe.testing.server import FAULTS, Fault
from cachepipe.testing.server.connection import HttpConnection

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]
CHAT = "/v1/chat/completions"
LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "count": {"type": "integer"},
                "unit": {"enum": ["a", "b"]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
            },
            "$defs": {"tag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
        },
    },
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def serving(**settings):
    """A server, and a bare HTTP client that does not retry."""
    async with (
        MockServer(MockSettings(**{"seed": 1, **settings})) as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        yield server, http


@contextlib.asynccontextmanager
async def serving_openai(**settings):
    async with (
        MockServer(MockSettings(**{"seed": 1, **settings})) as server,
        openai.DefaultAsyncHttpxClient() as http,
        openai.AsyncOpenAI(
            base_url=server.base_url, api_key="any", max_retries=0, http_client=http
        ) as client,
    ):
        yield server, client


def chat(**values):
    return {"model": "m", "messages": HELLO, **values}


# -- the SDKs -----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_openai_chat_with_everything_it_may_ask():
    async with serving_openai() as (server, client):
        answer = await client.chat.completions.create(
            **chat(n=3, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0.8, top_p=0.95, user="u")
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint
    assert answer._request_id.startswith("req_")
    for choice in answer.choices:
        tokens = [entry.token for entry in choice.logprobs.content]
        assert "".join(tokens) == choice.message.content
        assert choice.finish_reason == ("length" if len(tokens) == 4 else "stop")
    generated = sum(len(choice.logprobs.content) for choice in answer.choices)
    assert answer.usage.completion_tokens == generated
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + generated
    assert (server.stats.samples_generated, server.stats.samples_delivered) == (3, 3)
    assert (server.stats.tokens_in, server.stats.tokens_out) == (answer.usage.prompt_tokens, generated)


@pytest.mark.anyio
async def test_log_probabilities_are_those_of_the_known_distribution():
    async with serving_openai() as (_, client):
        answer = await client.chat.completions.create(
            **chat(logprobs=True, top_logprobs=5, temperature=0.7, max_tokens=12)
        )
    seen: list[str] = []
    for entry in answer.choices[0].logprobs.content:
        expected = default_model().distribution(flatten(HELLO), seen, temperature=0.7)
        assert entry.logprob == math.log(expected[entry.token])
        assert bytes(entry.bytes).decode() == entry.token
        ranked = sorted(expected.values(), reverse=True)[:5]
        assert [top.logprob for top in entry.top_logprobs] == [math.log(p) for p in ranked]
        assert all(top.logprob == math.log(expected[top.token]) for top in entry.top_logprobs)
        seen.append(entry.token)


@pytest.mark.anyio
async def test_first_tokens_follow_the_known_distribution_over_many_prompts():
    expected = default_model().first_token_distribution(HELLO, temperature=0.9)
    seen: Counter[str] = Counter()
    async with serving_openai() as (_, client):
        for number in range(60):
            nonced = [{"role": "user", "content": f"[nonce: {number}] {HELLO[0]['content']}"}]
            answer = await client.chat.completions.create(
                model="m", messages=nonced, n=50, max_tokens=1, temperature=0.9
            )
            seen.update(choice.message.content for choice in answer.choices)
    assert set(seen) <= set(expected)
    result = chisquare([seen[token] for token in expected], [3000 * p for p in expected.values()])
    assert result.pvalue > 0.001


@pytest.mark.anyio
async def test_openai_stream_is_the_same_answer_in_pieces():
    async with serving_openai() as (server, client):
        whole = await client.chat.completions.create(**chat(seed=4, n=2, logprobs=True))
        stream = await client.chat.completions.create(
            **chat(seed=4, n=2, logprobs=True, stream=True, stream_options={"include_usage": True})
        )
        texts, tokens, ends = ["", ""], [[], []], {}
        chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert server.stats.streams == 1


@pytest.mark.anyio
async def test_a_stream_brings_no_usage_unasked():
    async with serving_openai() as (_, client):
        stream = await client.chat.completions.create(**chat(stream=True))
        chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_sync_openai_client_with_a_server_in_a_thread():
    with (
        MockServer.in_thread(MockSettings(seed=2)) as server,
        openai.OpenAI(base_url=server.base_url, api_key="any") as client,
    ):
        whole = client.chat.completions.create(**chat(seed=1)).choices[0].message.content
        pieces = client.chat.completions.create(**chat(seed=1), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole
        assert [model.id for model in client.models.list()] == list(server.settings.models)
        assert client.models.retrieve("ngram-1").id == "ngram-1"
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            client.models.retrieve("gpt")
        assert server.stats.requests == 5


@pytest.mark.anyio
async def test_legacy_completions_of_several_prompts():
    async with serving_openai() as (_, client):
        answer = await client.completions.create(
            model="m", prompt=["Given a", "Return the"], n=2, max_tokens=3, logprobs=2
        )
        echoed = await client.completions.create(model="m", prompt="Given a", echo=True, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, ["Given a"] * 2 + ["Return the"] * 2, strict=True):
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text
        offsets = [sum(map(len, logprobs.tokens[:place])) for place in range(len(logprobs.tokens))]
        assert logprobs.text_offset == offsets
        for place, token in enumerate(logprobs.tokens):
            expected = default_model().distribution(prompt, logprobs.tokens[:place])
            assert logprobs.token_logprobs[place] == math.log(expected[token])
            assert logprobs.top_logprobs[place][token] == math.log(expected[token])
            assert len(logprobs.top_logprobs[place]) <= 3
    assert answer.usage.prompt_tokens == 4
    assert echoed.choices[0].text.startswith("Given a")


@pytest.mark.anyio
async def test_legacy_completions_of_token_ids_and_as_a_stream():
    vocabulary = default_model().vocabulary
    ids = [vocabulary.index("Given"), vocabulary.index(" a")]
    async with serving_openai() as (_, client):
        by_text = await client.completions.create(model="m", prompt="Given a", seed=3)
        by_ids = await client.completions.create(model="m", prompt=ids, seed=3)
        many = await client.completions.create(model="m", prompt=[ids, ids], seed=3)
        stream = await client.completions.create(
            model="m",
            prompt=["Given a"],
            seed=3,
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = by_text.choices[0].text
    assert by_ids.choices[0].text == text
    assert by_ids.usage == by_text.usage
    assert [choice.text for choice in many.choices] == [text, text]
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "Given a" + text
    assert chunks[-1].usage == by_text.usage


@pytest.mark.anyio
async def test_best_of_returns_the_most_probable_of_those_it_generated():
    async with serving_openai() as (server, client):
        pool = await client.completions.create(
            model="m", prompt="Given a", seed=5, n=6, logprobs=0, max_tokens=5
        )
        best = await client.completions.create(
            model="m", prompt="Given a", seed=5, n=2, best_of=6, logprobs=0, max_tokens=5
        )

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(pool.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == pool.usage.completion_tokens
    assert (server.stats.samples_generated, server.stats.samples_delivered) == (12, 8)


@pytest.mark.anyio
async def test_openai_responses_whole_and_streamed():
    async with serving_openai() as (_, client):
        whole = await client.responses.create(model="m", input="hello", instructions="Be brief.")
        short = await client.responses.create(
            model="m",
            input=[{"role": "user", "content": "hello"}, {"type": "function_call_output", "output": "1"}],
            max_output_tokens=2,
            include=["message.output_text.logprobs"],
        )
        async with client.responses.stream(model="m", input="hello") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
    assert whole.status == "completed"
    assert whole.output_text
    assert whole.usage.input_tokens > 4
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert len(short.output[0].content[0].logprobs) == short.usage.output_tokens == 2
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


@pytest.mark.anyio
async def test_anthropic_messages_whole_and_streamed():
    async with (
        MockServer(MockSettings(seed=1)) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        whole = await client.messages.create(model="m", messages=HELLO, max_tokens=300, system="Be brief.")
        short = await client.messages.create(model="m", messages=HELLO, max_tokens=2)
        stop = await client.messages.create(
            model="m", messages=HELLO, max_tokens=300, stop_sequences=["a", "e", "i", "o", "u"]
        )
        async with client.messages.stream(model="m", messages=HELLO, max_tokens=300) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await client.post("/v1/messages", cast_to=object, body={"model": "m", "messages": HELLO})
    assert (whole.stop_reason, short.stop_reason) == ("end_turn", "max_tokens")
    assert (stop.stop_reason, stop.stop_sequence in "aeiou") == ("stop_sequence", True)
    assert short.usage.output_tokens == 2
    assert final.content[0].text == text
    assert final.usage.output_tokens > 0


def test_the_sync_anthropic_client_gets_errors_in_its_own_shape():
    with (
        MockServer.in_thread(MockSettings(script=[429, 503])) as server,
        anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        ask = {"model": "m", "messages": HELLO, "max_tokens": 5}
        with pytest.raises(anthropic.RateLimitError, match="rate_limit_error"):
            client.messages.create(**ask)
        with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
            client.messages.create(**ask)
        assert client.messages.create(**ask).role == "assistant"


@pytest.mark.anyio
async def test_together_chat_with_its_own_log_probabilities():
    async with (
        MockServer(MockSettings(seed=1)) as server,
        together.AsyncTogether(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(
            model="m", messages=HELLO, n=2, logprobs=1, max_tokens=3
        )
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert "".join(choice.logprobs.tokens) == choice.message.content
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert text


@pytest.mark.anyio
async def test_embeddings_are_a_function_in_either_encoding():
    async with serving_openai() as (server, client):
        asked = {"model": "m", "input": ["sort a list", "prime factors"], "dimensions": 16}
        packed = await client.embeddings.create(**asked)
        plain = await client.embeddings.create(**asked, encoding_format="float")
        single = await client.embeddings.create(model="m", input=[1, 2, 3])
        with pytest.raises(openai.BadRequestError, match="not empty"):
            await client.embeddings.create(model="m", input=["", "a"])
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert [len(item.embedding) for item in plain.data] == [16, 16]
    assert math.hypot(*plain.data[0].embedding) == pytest.approx(1, abs=1e-6)
    assert (len(single.data[0].embedding), single.usage.prompt_tokens) == (256, 3)
    assert server.stats.samples_delivered == 5


@pytest.mark.anyio
@pytest.mark.parametrize("pace", [{}, {"latency": 1e-6}, {"stream_delay": 1e-6}])
async def test_an_answer_is_counted_before_anybody_has_it(pace):
    """Its last bytes are written when the log has it, so a client in another thread finds it there."""
    server = MockServer(MockSettings(seed=1, **pace))
    logged = []

    class Transport(asyncio.Transport):
        def write(self, data):
            logged.append(len(server.stats.log))

        def resume_reading(self):
            finished.set()

        def pause_reading(self):
            pass

        def close(self):
            pass

    finished = asyncio.Event()
    connection = HttpConnection(server._responder, server._traffic)
    connection.connection_made(Transport())
    body = json.dumps(chat(stream=bool(pace.get("stream_delay")), max_tokens=3)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.data_received(head.encode() + body)
    await finished.wait()
    assert logged[-1] == 1
    assert logged[-2:] == [1, 1] or len(logged) == 1


@pytest.mark.anyio
async def test_a_forced_tool_is_called_with_arguments_that_fit_its_schema():
    forced = {"type": "function", "function": {"name": "lookup"}}
    async with serving_openai() as (_, client):
        whole = await client.chat.completions.create(**chat(tools=[LOOKUP], tool_choice=forced, seed=1))
        stream = await client.chat.completions.create(
            **chat(tools=[LOOKUP], tool_choice="required", seed=1, stream=True)
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]
        flat = {"type": "function", **LOOKUP["function"]}
        response = await client.responses.create(model="m", input="hi", tools=[flat], tool_choice="required")
        async with client.responses.stream(
            model="m", input="hi", tools=[flat], tool_choice="required"
        ) as events:
            final = await events.get_final_response()
        free = await client.chat.completions.create(**chat(tools=[LOOKUP]))
        with pytest.raises(openai.BadRequestError, match="one of the tools"):
            await client.chat.completions.create(**chat(tools=[], tool_choice=forced))
    choice = whole.choices[0]
    call = choice.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert (choice.finish_reason, choice.message.content, call.function.name) == (
        "tool_calls",
        None,
        "lookup",
    )
    assert isinstance(arguments["word"], str)
    assert isinstance(arguments["count"], int)
    assert arguments["unit"] in {"a", "b"}
    assert arguments["tags"][0] in {True, False}
    streamed = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert "".join(part.function.arguments for part in streamed) == call.function.arguments
    assert [(part.function.name, part.id is None) for part in streamed[:2]] == [
        ("lookup", False),
        (None, True),
    ]
    assert response.output[0].type == final.output[0].type == "function_call"
    assert set(json.loads(final.output[0].arguments)) == set(arguments)
    assert free.choices[0].message.content


@pytest.mark.anyio
async def test_offered_tools_are_called_once_each_where_that_is_set():
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    tools = [LOOKUP, other]
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    blocks = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in flat]
    async with (
        MockServer(MockSettings(seed=1, uses_tools=True)) as server,
        openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as client,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="any") as claude,
    ):

        async def chats(choice):
            messages, called = list(HELLO), []
            for _ in range(3):
                reply = await client.chat.completions.create(
                    model="m", messages=messages, tools=tools, tool_choice=choice
                )
                messages.append(reply.choices[0].message.model_dump(exclude_none=True))
                if not reply.choices[0].message.tool_calls:
                    return called
                call = reply.choices[0].message.tool_calls[0]
                called.append(call.function.name)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "found"})
            return called

        async def responds():
            items, called = list(HELLO), []
            while True:
                reply = await client.responses.create(model="m", input=items, tools=flat)
                if (call := reply.output[0]).type != "function_call":
                    return called
                called.append(call.name)
                items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "found"}]

        async def claude_says():
            messages, called = list(HELLO), []
            while True:
                reply = await claude.messages.create(model="m", max_tokens=9, messages=messages, tools=blocks)
                if (use := reply.content[0]).type != "tool_use":
                    return called
                called.append(use.name)
                result = {"type": "tool_result", "tool_use_id": use.id, "content": "found"}
                messages += [
                    {"role": "assistant", "content": reply.content},
                    {"role": "user", "content": [result]},
                ]

        assert await chats("auto") == await responds() == await claude_says() == ["lookup", "other"]
        assert await chats("required") == ["lookup", "other", "other"]
        assert await chats("none") == []


@pytest.mark.anyio
async def test_an_anthropic_tool_is_used_when_it_must_be():
    tool = {"name": "lookup", "input_schema": LOOKUP["function"]["parameters"]}
    ask = {"model": "m", "messages": HELLO, "max_tokens": 50, "tools": [tool]}
    async with (
        MockServer(MockSettings(seed=1)) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        whole = await client.messages.create(**ask, tool_choice={"type": "tool", "name": "lookup"})
        async with client.messages.stream(**ask, tool_choice={"type": "any"}) as stream:
            final = await stream.get_final_message()
    for message in (whole, final):
        assert message.stop_reason == "tool_use"
        assert set(message.content[0].input) == {"word", "count", "unit", "tags"}


@pytest.mark.anyio
async def test_a_json_answer_is_json_and_fits_its_schema():
    schema = {"type": "object", "properties": {"steps": {"type": "array", "items": {"type": "string"}}}}
    async with serving_openai() as (_, client):
        plain = await client.chat.completions.create(**chat(response_format={"type": "json_object"}))
        fitted = await client.chat.completions.create(
            **chat(
                response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
                logprobs=True,
                max_tokens=1,
            )
        )
        response = await client.responses.create(
            model="m", input="hi", text={"format": {"type": "json_schema", "name": "s", "schema": schema}}
        )
    assert isinstance(json.loads(plain.choices[0].message.content)["answer"], str)
    assert isinstance(json.loads(fitted.choices[0].message.content)["steps"][0], str)
    assert fitted.choices[0].logprobs is None
    assert fitted.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(response.output_text)["steps"][0], str)


# -- sampling -----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_seed_repeats_each_choice_whatever_n_and_length_are():
    async with serving_openai() as (_, client):

        async def texts(**values):
            answer = await client.chat.completions.create(**chat(**values))
            return [choice.message.content for choice in answer.choices]

        four = await texts(seed=9, n=4)
        assert await texts(seed=9, n=4) == four
        assert await texts(seed=9, n=2) == four[:2]
        assert four[0].startswith((await texts(seed=9, max_tokens=2))[0])
        assert len(set(four)) > 1
        nonced = [{"role": "user", "content": f"[nonce: 1] {HELLO[0]['content']}"}]
        for other in ({"seed": 10}, {"model": "other"}, {"messages": nonced}, {"temperature": 0.99}):
            assert await texts(**{"seed": 9, "n": 4, **other}) != four


@pytest.mark.anyio
async def test_unseeded_requests_get_fresh_samples_and_a_seeded_server_repeats_the_sequence():
    async def sequence(**settings):
        async with serving_openai(**settings) as (_, client):
            answers = [await client.chat.completions.create(**chat()) for _ in range(6)]
            return [answer.choices[0].message.content for answer in answers], [a.id for a in answers]

    texts, ids = await sequence(seed=3)
    assert len(set(texts)) > 1
    assert len(set(ids)) == 6
    assert (texts, ids) == await sequence(seed=3)
    assert texts != (await sequence(seed=4))[0]
    assert texts != (await sequence(seed=None))[0]


@pytest.mark.anyio
async def test_an_answer_stops_before_a_stop_sequence_and_streams_the_same():
    async with serving_openai() as (_, client):
        whole = (await client.chat.completions.create(**chat(seed=2))).choices[0].message.content
        stop = whole[6:9]
        cut = await client.chat.completions.create(**chat(seed=2, stop=[stop, "nowhere"], logprobs=True))
        stream = await client.chat.completions.create(**chat(seed=2, stop=stop, stream=True))
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    choice = cut.choices[0]
    assert choice.message.content == streamed == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert cut.usage.completion_tokens == len(choice.logprobs.content)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_ends_at_its_limit_or_the_servers(name):
    async with serving_openai(max_tokens=3) as (_, client):
        asked = await client.chat.completions.create(**chat(**{name: 2}))
        capped = await client.chat.completions.create(**chat(**{name: 1000}))
    assert (asked.usage.completion_tokens, asked.choices[0].finish_reason) == (2, "length")
    assert capped.usage.completion_tokens <= 3


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HELLO}, "model"),
        (CHAT, {"model": "", "messages": HELLO}, "model"),
        (CHAT, {"model": "m"}, "messages"),
        (CHAT, {"model": "m", "messages": []}, "messages"),
        (CHAT, {"model": "m", "messages": ["hi"]}, "messages[0]"),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
        (CHAT, {"model": "m", "messages": [{"role": 1}]}, "messages[0].role"),
        (CHAT, chat(n=0), "n"),
        (CHAT, chat(n=9), "n"),
        (CHAT, chat(n=True), "n"),
        (CHAT, chat(n="2"), "n"),
        (CHAT, chat(temperature=2.1), "temperature"),
        (CHAT, chat(top_p=-1), "top_p"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(seed=1.5), "seed"),
        (CHAT, chat(stop=["a"] * 5), "stop"),
        (CHAT, chat(stop=1), "stop"),
        (CHAT, chat(stream="yes"), "stream"),
        (CHAT, chat(top_logprobs=2), "logprobs"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (CHAT, chat(response_format="json"), "response_format"),
        ("/v1/completions", {"model": "m", "prompt": []}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"model": "m", "prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ("/v1/completions", {"model": "m", "prompt": "a", "best_of": 2, "stream": True}, "stream"),
        ("/v1/completions", {"model": "m", "prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/responses", {"model": "m"}, "input"),
        ("/v1/embeddings", {"model": "m", "input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"model": "m", "input": "a", "encoding_format": "x"}, "encoding_format"),
    ],
)
async def test_a_bad_request_is_refused_in_a_sentence(path, body, param):
    async with serving(max_n=8) as (server, http):
        reply = await http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith("Expected ")
    assert ", but got " in error["message"]
    assert server.stats.by_path == {path: {400: 1}}


@pytest.mark.anyio
@pytest.mark.parametrize("temperature", [1.5, 9])
async def test_a_temperature_is_refused_by_the_protocol_s_own_limit(temperature):
    async with serving() as (_, http):
        ask = {"model": "m", "max_tokens": 1, "messages": HELLO, "temperature": temperature}
        reply = await http.post("/v1/messages", json=ask)
    assert reply.json()["error"]["message"].startswith(
        "Expected temperature to be a number from 0 to 1, but got"
    )


@pytest.mark.anyio
async def test_what_is_no_json_object_is_refused():
    async with serving() as (_, http):
        for content in (b"{", b"[]", b"", b'{"model": "\xff"}'):
            reply = await http.post(CHAT, content=content)
            assert (reply.status_code, "JSON object" in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.anyio
async def test_paths_and_methods_that_are_not_there():
    async with serving() as (server, http):
        unknown = await http.get("/v2/nothing")
        wrong = await http.get(CHAT)
        head = await http.head(CHAT)
        after = await http.post(CHAT, json=chat())
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert (head.status_code, head.content) == (405, b"")
    assert after.status_code == 200
    assert server.stats.by_path == {"other": {404: 1}, CHAT: {405: 2, 200: 1}}


@pytest.mark.anyio
async def test_a_body_beyond_the_limit_is_refused_with_413_declared_or_not():
    async with serving(max_body=1000) as (server, http):

        async def chunks():
            for _ in range(5):
                yield b" " * 500

        declared = await http.post(CHAT, content=b" " * 5000)
        chunked = await http.post(CHAT, content=chunks())
        fine = await http.post(CHAT, json=chat())
    assert (declared.status_code, chunked.status_code, fine.status_code) == (413, 413, 200)
    assert declared.headers["connection"] == "close"
    assert "at most 1000 bytes" in chunked.json()["error"]["message"]
    assert server.stats.by_path == {CHAT: {413: 2, 200: 1}}


@pytest.mark.anyio
async def test_only_the_right_key_is_let_in_and_no_key_is_ever_shown():
    async with serving(api_key="right") as (server, http):
        replies = [
            await http.post(CHAT, json=chat(), headers=headers)
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer right"},
                {"x-api-key": "right"},
            )
        ]
        shown = await http.get("/mock/settings", headers={"authorization": "bearer right"})
        assert (await http.get("/mock/settings")).status_code == 401
        assert "right" not in repr(server.settings) + repr(server) + repr(server.stats.log)
    assert [reply.status_code for reply in replies] == [401, 401, 200, 200]
    assert "wrong" not in replies[1].text
    assert shown.json()["api_key"] is True


@pytest.mark.anyio
async def test_an_odd_body_gets_an_answer_too(caplog):
    async with serving() as (_, http):
        reply = await http.post(CHAT, json=chat(tools=5, tool_choice="required"))
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "failed on a request" in caplog.text


# -- faults -------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("rate_limit", 429, openai.RateLimitError),
        ("error", 500, openai.InternalServerError),
        ("unavailable", 503, openai.InternalServerError),
        (418, 418, openai.APIStatusError),
    ],
)
async def test_a_fault_with_a_status(fault, status, error):
    async with serving_openai(script=[fault]) as (server, client):
        with pytest.raises(error) as caught:
            await client.chat.completions.create(**chat())
        assert (await client.chat.completions.create(**chat())).choices
    assert caught.value.status_code == status
    assert ("retry-after" in caught.value.response.headers) == (status in {429, 503})
    assert server.stats.samples_generated == 1
    assert server.stats.by_path == {CHAT: {status: 1, 200: 1}}


@pytest.mark.anyio
async def test_retry_after_says_what_it_is_told():
    fault = {"kind": "status", "status": 503, "retry_after": 0.25, "message": "Later."}
    async with serving(script=[fault]) as (_, http):
        reply = await http.post(CHAT, json=chat())
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("1", "250")
    assert reply.json()["error"]["message"] == "Later."


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_dropped_connection_brings_no_byte(stream):
    async with serving_openai(script=["drop"]) as (server, client):
        with pytest.raises(openai.APIConnectionError):
            await client.chat.completions.create(**chat(stream=stream))
        assert await client.chat.completions.create(**chat())
    assert server.stats.by_path == {CHAT: {0: 1, 200: 1}}
    assert server.stats.faults == {"drop": 1}
    assert server.stats.samples_generated == 1


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["cut", "truncate"])
async def test_an_answer_that_breaks_off(kind):
    async with serving(script=[kind]) as (server, http):
        with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
            await http.post(CHAT, json=chat())
        assert (await http.post(CHAT, json=chat())).status_code == 200
    assert (server.stats.samples_generated, server.stats.samples_delivered) == (2, 1)


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_stream_that_breaks_off_or_ends_too_early(path):
    body = chat(prompt="Given", input="hi", stream=True, max_tokens=20)
    async with serving(script=["cut", "truncate", {"kind": "truncate", "after": 1}]) as (server, http):
        received: list[str] = []

        async def collect(reply):
            async for line in reply.aiter_lines():
                received.append(line)  # noqa: PERF401 - what came before the break is wanted

        async with http.stream("POST", path, json=body) as reply:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
                await collect(reply)
        early = await http.post(path, json=body)
        one = await http.post(path, json=body)
        whole = await http.post(path, json=body)
    assert any(line.startswith("data: {") for line in received)
    for reply in (early, one):
        assert reply.status_code == 200
        for terminal in ("[DONE]", '"finish_reason":"', "message_stop", "response.completed"):
            assert terminal not in reply.text
    assert one.text.count("data: ") == 1
    assert any(word in whole.text for word in ("[DONE]", "message_stop", "response.completed"))
    assert (server.stats.samples_generated, server.stats.samples_delivered) == (4, 1)


@pytest.mark.anyio
async def test_a_short_reply_has_fewer_choices_and_they_are_what_it_counts():
    async with serving_openai(script=["short", {"kind": "short", "keep": 1}, "short", "short"]) as (
        server,
        client,
    ):
        one_less = await client.chat.completions.create(**chat(n=4))
        one = await client.chat.completions.create(**chat(n=4, logprobs=True))
        prompts = await client.completions.create(model="m", prompt=["a", "b"], n=2)
        vectors = await client.embeddings.create(model="m", input=["a", "b"])
    assert [len(answer.choices) for answer in (one_less, one, prompts)] == [3, 1, 3]
    assert one.usage.completion_tokens == len(one.choices[0].logprobs.content)
    assert len(vectors.data) == 1
    assert server.stats.samples_generated == server.stats.samples_delivered == 8
    assert [entry.n for entry in server.stats.log] == [4, 4, 4, 2]


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_short_reply_to_a_single_choice_is_empty_in_every_protocol(path, stream):
    body = chat(prompt="Given", input="hi", stream=stream, max_tokens=20)
    async with serving(script=["short"]) as (server, http):
        reply = await http.post(path, json=body)
    assert reply.status_code == 200
    assert server.stats.samples_generated == 0


@pytest.mark.anyio
@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
async def test_an_error_object_under_status_200(path):
    body = chat(input="hi", max_tokens=20)
    async with serving(script=["error_200", "error_200"]) as (server, http):
        whole = await http.post(path, json=body)
        stream = await http.post(path, json={**body, "stream": True})
    assert (whole.status_code, stream.status_code) == (200, 200)
    assert "asked for in the settings" in whole.json()["error"]["message"]
    last = json.loads(stream.text.rstrip().rpartition("data: ")[2])
    assert "error" in last or last["type"] == "error"
    assert "[DONE]" not in stream.text
    assert server.stats.samples_delivered == 0


@pytest.mark.anyio
async def test_the_sdk_raises_an_error_event_in_mid_stream():
    async with serving_openai(script=["error_200"]) as (_, client):
        stream = await client.chat.completions.create(**chat(stream=True))
        with pytest.raises(openai.APIError, match="asked for in the settings"):
            _ = [chunk async for chunk in stream]


@pytest.mark.anyio
async def test_malformed_json_whole_and_in_a_stream():
    async with serving(script=["malformed", "malformed"]) as (server, http):
        whole = await http.post(CHAT, json=chat())
        stream = await http.post(CHAT, json=chat(stream=True))
    assert (whole.status_code, stream.status_code) == (200, 200)
    with pytest.raises(json.JSONDecodeError):
        whole.json()
    broken = 0
    for line in stream.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            try:
                json.loads(line[6:])
            except json.JSONDecodeError:
                broken += 1
    assert broken == 1
    assert server.stats.samples_delivered == 0


@pytest.mark.anyio
async def test_faults_by_chance_strike_at_their_rate_and_repeat_with_the_seed():
    async def outcomes(seed):
        faults = ["503:0.3", {"kind": "error", "probability": 0.5, "path": "embeddings"}]
        async with serving(seed=seed, faults=faults) as (_, http):
            body = chat(max_tokens=1)
            return [(await http.post(CHAT, json=body)).status_code for _ in range(150)]

    first = await outcomes(1)
    assert set(first) == {200, 503}
    assert 25 <= first.count(503) <= 65
    assert first == await outcomes(1) != await outcomes(2)


@pytest.mark.anyio
async def test_a_header_asks_for_a_fault_or_for_none():
    async with serving(faults=["error"]) as (server, http):
        codes = [
            (await http.post(CHAT, json=chat(), headers={"x-mock-fault": value})).status_code
            for value in ("none", "503", '{"kind": "status", "status": 404}', "nonsense", "{")
        ]
    assert codes == [200, 503, 404, 400, 400]
    assert [entry.fault for entry in server.stats.log] == [None, "status", "status", None, None]


@pytest.mark.anyio
async def test_a_script_is_used_up_before_chance_has_its_turn():
    async with serving(script=[None, 503, None], faults=["error"]) as (_, http):
        codes = [(await http.post(CHAT, json=chat())).status_code for _ in range(4)]
    assert codes == [200, 503, 200, 500]


@pytest.mark.anyio
async def test_the_hidden_rate_limit_refuses_what_comes_too_fast():
    now = 100.0
    server = MockServer(MockSettings(rate=2, burst=3), clock=lambda: now)
    async with server, httpx.AsyncClient(base_url=server.url) as http:
        replies = [await http.post(CHAT, json=chat()) for _ in range(4)]
        now += 0.5
        replies += [await http.post(CHAT, json=chat()) for _ in range(2)]
        server.settings = replace(server.settings, rate=None)
        replies += [await http.post(CHAT, json=chat()) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 200, 429, 200, 200]
    refused = replies[3]
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["retry-after-ms"] == "500"
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"] == "0.500s"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "x-ratelimit-limit-requests" not in replies[0].headers


# -- time ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_latency_grows_with_the_longest_choice():
    async with serving() as (server, http):
        headers = {"x-mock-latency": "0.002", "x-mock-latency-per-token": "0.0001"}
        whole = await http.post(CHAT, json=chat(n=3, logprobs=True), headers=headers)
        await http.post(CHAT, json=chat(stream=True, max_tokens=5), headers={"x-mock-stream-delay": "0.001"})
        bad = [
            await http.post(CHAT, json=chat(), headers={"x-mock-latency": value}) for value in ("soon", "-1")
        ]
    lengths = [len(choice["logprobs"]["content"]) for choice in whole.json()["choices"]]
    # The event loop's clock may fire a little early; that is no matter here.
    assert server.stats.log[0].seconds >= 0.9 * (0.002 + 0.0001 * max(lengths))
    assert server.stats.log[1].seconds >= 0.9 * 0.001 * 5
    assert [reply.status_code for reply in bad] == [400, 400]


@pytest.mark.anyio
async def test_a_fault_takes_as_long_as_an_answer():
    async with serving(latency=0.005, script=[503, "drop"]) as (server, http):
        await http.post(CHAT, json=chat())
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(CHAT, json=chat())
    assert all(entry.seconds >= 0.0045 for entry in server.stats.log)


@pytest.mark.anyio
async def test_events_arrive_one_by_one_when_they_are_paced():
    async with serving(stream_delay=0.001) as (_, http):
        async with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=4)) as reply:
            pieces = [piece async for piece in reply.aiter_raw()]
        again = await http.post(CHAT, json=chat(stream=True, max_tokens=4))
    assert len(pieces) > 1
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    assert again.text.endswith("data: [DONE]\n\n")


@pytest.mark.anyio
async def test_a_paused_server_holds_requests_until_it_goes_on():
    async with serving(paused=True) as (server, http):
        waiting = [asyncio.ensure_future(http.post(CHAT, json=chat())) for _ in range(5)]
        await server.until(lambda stats: stats.in_flight == 5)
        # What is not for a model is answered at once, or nobody could let it go on.
        assert (await http.get("/mock/stats")).json()["in_flight"] == 5
        assert (await http.get("/v1/models")).status_code == 200
        assert not any(task.done() for task in waiting)
        await http.post("/mock/settings", json={"paused": False})
        replies = await asyncio.gather(*waiting)
    assert {reply.status_code for reply in replies} == {200}
    assert (server.stats.in_flight, server.stats.max_in_flight) == (0, 6)


@pytest.mark.anyio
async def test_a_client_that_leaves_is_counted_and_gets_nothing():
    async with serving(paused=True) as (server, http):
        task = asyncio.ensure_future(http.post(CHAT, json=chat(n=3)))
        await server.until(lambda stats: stats.in_flight == 1)
        task.cancel()
        await server.until(lambda stats: stats.in_flight == 0)
        assert server.stats.by_path == {CHAT: {499: 1}}
        assert (server.stats.samples_generated, server.stats.samples_delivered) == (3, 0)


def test_a_server_in_a_thread_can_be_paused_from_outside():
    with (
        MockServer.in_thread(MockSettings(paused=True)) as server,
        openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client,
    ):
        texts: list[str] = []

        def ask() -> None:
            texts.append(client.chat.completions.create(**chat()).choices[0].message.content)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        server.wait_until(lambda stats: stats.in_flight == 3)
        assert texts == []
        with pytest.raises(TimeoutError, match="was not met"):
            server.wait_until(lambda stats: stats.in_flight == 4, timeout=0.001)
        server.settings = replace(server.settings, paused=False)
        for thread in threads:
            thread.join()
        assert len(texts) == 3


# -- connections --------------------------------------------------------------------------------------


def wire(body, path=CHAT, method="POST", extra=""):
    payload = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{extra}Content-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


async def read_reply(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status = int(head.split()[1])
    length = next(int(line[16:]) for line in head.splitlines() if line.lower().startswith("content-length: "))
    return status, json.loads(await reader.readexactly(length))


async def close(writer):
    writer.close()
    await writer.wait_closed()


@pytest.mark.anyio
async def test_pipelined_requests_are_answered_in_order():
    async with serving() as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        slow = "x-mock-latency: 0.005\r\n"
        writer.write(
            b"".join(wire(chat(model=f"m{number}"), extra=slow if number % 2 else "") for number in range(10))
            + wire(None, "/v1/models", "GET")
        )
        replies = [await read_reply(reader) for _ in range(11)]
        assert [body["model"] for _, body in replies[:10]] == [f"m{number}" for number in range(10)]
        assert replies[10][1]["object"] == "list"
        assert (server.stats.max_connections, server.stats.max_in_flight) == (1, 1)
        await close(writer)


@pytest.mark.anyio
async def test_a_client_that_sends_far_ahead_is_slowed_down_and_loses_nothing():
    async with serving(paused=True) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        padded = wire(chat(max_tokens=1, user="x" * 60_000))
        writer.write(padded * 60)
        await server.until(lambda stats: stats.in_flight == 1)
        server.settings = replace(server.settings, paused=False)
        statuses = [(await read_reply(reader))[0] for _ in range(60)]
        assert statuses == [200] * 60
        await close(writer)


@pytest.mark.anyio
async def test_a_request_that_comes_in_crumbs_is_understood():
    async with serving() as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for crumb in wire(chat()):
            writer.write(bytes([crumb]))
            await writer.drain()
        assert (await read_reply(reader))[0] == 200
        await close(writer)


@pytest.mark.anyio
async def test_expect_100_continue_is_answered():
    async with serving() as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head, _, body = wire(chat(), extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert (await read_reply(reader))[0] == 200
        await close(writer)


@pytest.mark.anyio
async def test_what_is_not_http_gets_400_and_the_connection_closes():
    async with serving() as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"this is not http\r\n\r\n")
        status, body = await read_reply(reader)
        assert (status, "not HTTP" in body["error"]["message"]) == (400, True)
        await close(writer)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_connection_close_and_http_1_0_are_honoured(stream):
    async with serving() as (server, _):
        for request in (
            wire(chat(stream=stream), extra="Connection: close\r\n"),
            wire(chat(stream=stream)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            reply = await reader.read()
            assert reply.startswith(b"HTTP/1.1 200 ")
            assert (b"data: [DONE]" in reply) == stream
            await close(writer)


@pytest.mark.anyio
async def test_a_thousand_connections_at_once():
    async with serving(paused=True) as (server, _):
        connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(1000)]
        for _, writer in connections:
            writer.write(wire(chat(max_tokens=1)))
        await server.until(lambda stats: stats.in_flight == 1000)
        server.settings = replace(server.settings, paused=False)
        replies = await asyncio.gather(*(read_reply(reader) for reader, _ in connections))
        assert {status for status, _ in replies} == {200}
        assert len({body["id"] for _, body in replies}) == 1000
        assert (server.stats.max_in_flight, server.stats.max_connections) == (1000, 1000)
        assert server.stats.samples_delivered == 1000
        for _, writer in connections:
            await close(writer)


@pytest.mark.anyio
async def test_a_server_that_stops_drops_what_is_in_flight_and_can_start_again():
    server = MockServer(MockSettings(paused=True, seed=1))
    async with httpx.AsyncClient() as http:
        async with server:
            with pytest.raises(RuntimeError, match="listening already"):
                await server.start()
            task = asyncio.ensure_future(http.post(server.base_url + "/chat/completions", json=chat()))
            await server.until(lambda stats: stats.in_flight == 1)
        with pytest.raises(httpx.TransportError):
            await task
        assert (server.stats.in_flight, server.stats.connections) == (0, 0)
        assert "not listening" in repr(server)
        server.settings = MockSettings()
        async with server:
            assert (await http.get(server.base_url + "/models")).status_code == 200


def test_waiting_on_a_server_that_does_not_listen_is_refused():
    with pytest.raises(RuntimeError, match="enter its context"):
        MockServer().wait_until(lambda stats: True)


def test_a_port_that_is_taken_is_reported_where_the_server_was_asked_for():
    with (
        MockServer.in_thread() as server,
        pytest.raises(OSError, match="address already in use"),
        MockServer.in_thread(port=server.port),
    ):
        pass


# -- counters and settings ----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_counters_over_http_and_their_reset():
    async with serving() as (server, http):
        await http.post(CHAT, json=chat(n=2, max_tokens=3))
        await http.post(CHAT, json=chat(stream=True))
        await http.post(CHAT, json={})
        stats = (await http.get("/mock/stats")).json()
        assert stats == server.stats.as_json()
        assert (await http.post("/mock/reset")).json() == {"reset": True}
        empty = (await http.get("/mock/stats")).json()
    assert stats["requests"] == 3
    assert stats["by_path"] == {CHAT: {"200": 2, "400": 1}}
    assert (stats["samples_generated"], stats["samples_delivered"], stats["streams"]) == (3, 3, 1)
    assert stats["tokens_out"] > 3
    assert [(entry["status"], entry["n"], entry["stream"]) for entry in stats["log"]] == [
        (200, 2, False),
        (200, 1, True),
        (400, 1, False),
    ]
    assert (empty["requests"], empty["by_path"], empty["log"], empty["connections"]) == (0, {}, [], 1)


@pytest.mark.anyio
async def test_the_log_is_bounded():
    async with serving(log_size=2) as (server, http):
        for path in ("/a", "/v1/models/b", "/v1/models"):
            await http.get(path)
        assert [entry.path for entry in server.stats.log] == ["/v1/models/{id}", "/v1/models"]
        server.settings = replace(server.settings, log_size=1)
        assert [entry.path for entry in server.stats.log] == ["/v1/models"]


@pytest.mark.anyio
async def test_settings_change_over_http_and_a_script_goes_on_through_other_changes():
    async with serving() as (server, http):
        reply = await http.post("/mock/settings", json={"script": [None, "drop:0.5", 429], "max_n": 2})
        assert reply.json()["max_n"] == 2
        assert server.settings.script == (
            None,
            Fault(kind="drop", probability=0.5),
            Fault(kind="status", status=429),
        )
        assert (await http.post(CHAT, json=chat(n=2))).status_code == 200
        await http.post("/mock/settings", json={"max_n": 1})
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(CHAT, json=chat())
        assert (await http.post(CHAT, json=chat())).status_code == 429
        assert (await http.post(CHAT, json=chat(n=2))).json()["error"]["code"] == "integer_above_max_value"
        assert (await http.get("/mock/settings")).json()["script"][0] is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    "changes",
    [
        {"latncy": 1},
        {"latency": -1},
        {"latency": "1"},
        {"latency": True},
        {"max_n": 0},
        {"rate": 0},
        {"burst": 0},
        {"seed": "x"},
        {"api_key": 1},
        {"paused": 1},
        {"log_size": -1},
        {"faults": "drop"},
        {"faults": ["explode"]},
        {"faults": ["drop:2"]},
        {"faults": ["drop:often"]},
        {"faults": [None]},
        {"faults": [{"kind": "drop", "when": "now"}]},
        {"faults": [{"probability": 0.5}]},
        {"script": [{"kind": "short", "keep": -1}]},
        {"script": [{"kind": "status", "status": 200}]},
        {"script": [{"kind": "status", "retry_after": "1"}]},
        {"script": [{"kind": "drop", "path": 1}]},
        {"script": [1.5]},
    ],
)
async def test_settings_that_are_none_are_refused_in_a_sentence(changes):
    async with serving() as (server, http):
        before = server.settings
        reply = await http.post("/mock/settings", json=changes)
        assert (reply.status_code, server.settings) == (400, before)
        assert len(reply.json()["error"]["message"]) > 20


def test_every_kind_of_fault_has_a_short_form():
    assert [Fault.parse(kind).kind for kind in FAULTS] == list(FAULTS)
    fault = Fault(kind="cut")
    assert Fault.parse(fault) is fault


@pytest.mark.anyio
async def test_another_model_can_answer():
    model = NGramModel(["yes"])
    async with (
        MockServer(model=model) as server,
        openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as client,
    ):
        answer = await client.chat.completions.create(**chat())
    assert answer.choices[0].message.content == "yes"
    assert answer.choices[0].finish_reason == "stop"


# -- the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", ["line", "json"])
def test_the_command_says_when_it_is_ready_and_stops_cleanly(number, form):
    code = "from cachepipe.testing.command import mock_server; mock_server()"
    options = ["--port", "0", "--seed", "1", "--fault", "503:1", *(["--json"] if form == "json" else [])]
    with forked.Popen(
        [sys.executable, "-W", "error", "-c", code, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        url = json.loads(line)["base_url"] if form == "json" else line.split(" on ")[1].strip()
        with httpx.Client() as http:  # a connection that is kept alive must not keep the server alive
            assert http.post(url + "/chat/completions", json=chat()).status_code == 503
            process.send_signal(number)
            assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert form == "json" or line.startswith("mock model server on http://127.0.0.1:")


def test_the_command_refuses_a_fault_that_is_none():
    result = CliRunner().invoke(mock_server, ["--fault", "explode"])
    assert (result.exit_code, "kind is one of" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latency", "nan"], "latency is a number of seconds, 0 or more, not nan"),
        (["--stream-delay", "inf"], "stream_delay is a number of seconds, 0 or more, not inf"),
        (["--rate", "inf"], "rate is a number of requests per second above 0, or None, not inf"),
        (["--burst", "3"], "give --rate as well"),
    ],
)
def test_the_command_refuses_settings_that_are_none_in_a_sentence(options, words):
    result = CliRunner().invoke(mock_server, ["--port", "0", *options])
    assert (result.exit_code, words in result.output) == (2, True)


def test_an_empty_key_is_none(monkeypatch):
    made = []
    monkeypatch.setattr("cachepipe.testing.command.run_server", lambda *given, ready: made.append(given))
    assert CliRunner().invoke(mock_server, ["--api-key", ""]).exit_code == 0
    assert made[0][2].api_key is None


def test_the_command_says_what_to_do_about_a_port_that_is_taken():
    with MockServer.in_thread() as server:
        result = CliRunner().invoke(mock_server, ["--port", str(server.port)])
    assert result.exit_code == 1
    assert "Choose another --port" in result.output


def test_the_package_tells_what_it_has():
    import cachepipe.testing  # noqa: PLC0415

    assert set(cachepipe.testing.__all__) <= set(dir(cachepipe.testing))
    with pytest.raises(AttributeError, match="has no 'Nothing'"):
        _ = cachepipe.testing.Nothing


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_an_unknown_model_is_refused_in_the_words_of_each_api(path, more):
    with MockServer.in_thread(MockSettings(any_model=False)) as server:
        refused = httpx.post(f"{server.url}{path}", json={"model": "gpt-9", **more})
        known = httpx.post(f"{server.url}{path}", json={"model": "ngram-1", **more})
    error = refused.json()["error"]
    assert (refused.status_code, known.status_code) == (404, 200)
    assert "'gpt-9'" in error["message"]
    if path == "/v1/messages":
        assert (refused.json()["type"], error["type"]) == ("error", "not_found_error")
    else:
        assert (error["code"], error["param"]) == ("model_not_found", "model")
