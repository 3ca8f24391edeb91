"""Every cached method of OpenAI's clients, asked in every way: what one way paid for serves the others."""

from __future__ import annotations

import inspect
from functools import partial, reduce

import openai
import pytest
from pydantic import BaseModel

import cachepipe
from cachepipe import MemoryStore
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.providers.info import info
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Write a function that sorts a list."}]}
INPUT = {"model": "m", "input": "Write a function that sorts a list."}


class Word(BaseModel):
    word: str


# The method, its arguments, and which of these share samples.
WAYS = {
    "chat": ("chat.completions.create", CHAT, "chat"),
    "chat streamed": ("chat.completions.create", {**CHAT, "stream": True}, "chat"),
    "chat helper": ("chat.completions.stream", CHAT, "chat"),
    "chat of two": ("chat.completions.create", {**CHAT, "n": 2}, "chats"),
    "chat of two streamed": ("chat.completions.create", {**CHAT, "n": 2, "stream": True}, "chats"),
    "chat parsed": ("chat.completions.parse", {**CHAT, "response_format": Word}, "parsed"),
    "chat parsed streamed": ("chat.completions.stream", {**CHAT, "response_format": Word}, "parsed"),
    "response": ("responses.create", INPUT, "response"),
    "response streamed": ("responses.create", {**INPUT, "stream": True}, "response"),
    "response helper": ("responses.stream", INPUT, "response"),
    "response parsed": ("responses.parse", {**INPUT, "text_format": Word}, "parsed response"),
    "response parsed streamed": ("responses.stream", {**INPUT, "text_format": Word}, "parsed response"),
    "embedding": ("embeddings.create", {"model": "m", "input": "a"}, "embedding"),
    "embedding in base64": (
        "embeddings.create",
        {"model": "m", "input": ["a", "b"], "encoding_format": "base64"},
        "base64",
    ),
    "embedding of tokens": ("embeddings.create", {"model": "m", "input": [[1, 2], [3]]}, "tokens"),
    "completion": ("completions.create", {"model": "m", "prompt": "def f"}, "completion"),
    "completion streamed": (
        "completions.create",
        {"model": "m", "prompt": "def f", "stream": True},
        "completion",
    ),
    "completions": ("completions.create", {"model": "m", "prompt": ["def f", "def g"], "n": 2}, "list"),
    "completion of tokens": ("completions.create", {"model": "m", "prompt": [1, 2, 3]}, "tokens of one"),
    "completions of tokens": ("completions.create", {"model": "m", "prompt": [[1, 2], [3]]}, "tokens of two"),
}
PAIRS = [(one, other) for one in WAYS for other in WAYS if one != other and WAYS[one][2] == WAYS[other][2]]


def method_of(client, way, wrapper=None):
    """A method of a client with its arguments; skips the test where this SDK has none."""
    path, arguments, _ = WAYS[way]
    *names, last = path.split(".")
    resource = reduce(lambda found, name: getattr(found, name, None), names, client)
    if names[0] == "chat" and not hasattr(resource, last):  # before openai 1.92
        resource = client.beta.chat.completions
    if not hasattr(resource, last):
        pytest.skip(f"this SDK has no {path}")
    return partial(getattr(getattr(resource, wrapper) if wrapper else resource, last), **arguments)


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def listed(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


async def told(answer):
    """What an answer says, however it came."""
    if hasattr(answer, "__aenter__") and not hasattr(answer, "response"):  # the manager of a stream
        async with answer as stream:
            return await told_by_helper(stream)
    if hasattr(answer, "__enter__") and not hasattr(answer, "response"):
        with answer as stream:
            return await told_by_helper(stream)
    if isinstance(answer, openai.Stream | openai.AsyncStream):
        return said_by_chunks(await listed(answer))
    return said(answer)


async def told_by_helper(stream):
    assert await listed(stream)
    final = "get_final_completion" if hasattr(stream, "get_final_completion") else "get_final_response"
    return said(await settled(getattr(stream, final)()))


def said(answer):
    if hasattr(answer, "output"):
        return [answer.output_text, getattr(answer, "output_parsed", None)]
    if hasattr(answer, "data"):
        return [item.embedding for item in answer.data]
    messages = [choice.message if hasattr(choice, "message") else choice for choice in answer.choices]
    return [
        part
        for message in messages
        for part in (getattr(message, "content", None) or message.text, getattr(message, "parsed", None))
    ]


def said_by_chunks(chunks):
    if hasattr(chunks[0], "sequence_number"):
        return said(chunks[-1].response)
    texts = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        part = choice.text if hasattr(choice, "text") else choice.delta.content
        texts[choice.index] = texts.get(choice.index, "") + (part or "")
    return [part for index in sorted(texts) for part in (texts[index], None)]


@pytest.fixture(scope="module")
def running():
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=4000)) as server:
        yield server


@pytest.fixture
def server(running):
    running.stats.reset()
    return running


@pytest.fixture(params=[OpenAI, AsyncOpenAI], ids=["sync", "async"])
async def client(server, request):
    made = request.param(base_url=server.base_url, api_key="k", cache=MemoryStore(), max_retries=0)
    yield made
    await settled(made.close())


@pytest.mark.parametrize("way", WAYS)
async def test_a_rerun_says_the_same_and_asks_nothing(server, client, way):
    first = await told(await settled(method_of(client, way)()))
    calls, samples = server.stats.requests, server.stats.samples_generated
    assert any(first)
    assert calls == 1
    with cachepipe.run():
        assert await told(await settled(method_of(client, way)())) == first
    assert await told(await settled(method_of(client.in_namespace("b"), way)())) == first
    assert (server.stats.requests, server.stats.samples_generated) == (calls, samples)
    await told(await settled(method_of(client, way)()))  # the second time in this run: a draw of its own
    function = way.startswith("embedding")
    assert server.stats.samples_generated == (samples if function else 2 * samples)


@pytest.mark.parametrize(("one", "other"), PAIRS)
async def test_what_one_way_paid_for_serves_another(server, client, one, other):
    first = await told(await settled(method_of(client, one)()))
    again = await told(await settled(method_of(client.in_namespace("b"), other)()))
    assert again[0] == first[0]
    if ("parsed" in one or "helper" in one) == ("parsed" in other or "helper" in other):
        assert again == first
    assert server.stats.requests == 1


@pytest.mark.parametrize("wrapper", ["with_raw_response", "with_streaming_response"])
@pytest.mark.parametrize("way", [way for way in WAYS if "helper" not in way and "parsed" not in way])
async def test_wrapped_responses_are_of_the_same_samples(server, client, way, wrapper):
    async def wrapped(who, *, hit):
        response = await settled(method_of(who, way, wrapper)())
        if wrapper == "with_raw_response":
            assert response.status_code == 200
            assert info(response).complete is (hit or "streamed" not in way)
            return await told(await settled(response.parse()))
        if hasattr(response, "__aenter__"):
            async with response as opened:
                return await told(await settled(opened.parse()))
        with response as opened:
            return await told(opened.parse())

    first = await wrapped(client, hit=False)
    assert any(first)
    assert await wrapped(client.in_namespace("b"), hit=True) == first
    assert await told(await settled(method_of(client.in_namespace("c"), way)())) == first
    assert server.stats.requests == 1
