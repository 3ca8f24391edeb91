"""Chats: what grows, what is streamed, what is left, and tools in between."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import fractions
import functools
import gc
import pickle
import threading
from typing import Annotated

import openai
import pytest
import together
from pydantic import BaseModel, Field, ValidationError

import cachepipe
from cachepipe import Chat, MemoryStore, Message, TokenLogProb, ToolLoopError
from cachepipe.chat import tools
from cachepipe.chat.kept import close_clients
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.portal import in_portal
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
CALL = [Message("user", "Italy")]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=64)) as running:
        for name in ("OLLAMA_HOST", "AUTH", "CACHEPIPE_NAMESPACE", "CACHEPIPE_MODEL", "CACHEPIPE_DISABLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "made-up")
        monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "cache"))
        yield running
        in_portal(close_clients())


def weather(city: Annotated[str, Field(description="Which city")], days: int = 3) -> dict[str, object]:
    """Return the weather of a city."""
    return {"city": city, "days": days, "thread": threading.get_ident()}


# Growing.


async def test_answers_are_added_to_the_messages(server):
    chat = Chat(messages=["system:Be brief."], model="ngram-1")
    chat.add("user:Italy").add({"role": "user", "content": "Rome?"})
    answer = await chat.acomplete()
    assert [message.role for message in chat.messages] == ["system", "user", "user", "assistant"]
    assert chat.messages[-1].content == answer == chat.completions[0].message
    assert chat.complete() == chat.messages[-1].content
    assert len(chat.messages) == 5
    assert repr(chat) == "<Chat 5 messages, model='ngram-1'>"


async def test_a_chat_replays_whole(server):
    def talk():
        chat = Chat(messages=["system:Be brief."])
        said = [chat.add(f"user:{country}").complete() for country in ("Italy", "France")]
        said.append("".join(chat.add("user:Spain").stream()))
        return said, [completion.cached for completion in chat.completions]

    first, flags = await asyncio.to_thread(talk)
    with cachepipe.run():
        again, replayed = await asyncio.to_thread(talk)
    assert (again, flags, replayed) == (first, [False] * 3, [True] * 3)
    assert server.stats.requests == 3


async def test_a_failure_leaves_the_messages_as_they_are(server):
    server.settings = MockSettings(script=(400, "truncate"))
    chat = Chat(messages=CALL)
    with pytest.raises(openai.BadRequestError):
        await chat.acomplete()
    with pytest.raises(Exception, match=r"ended|complete|truncated|finish"):
        _ = [text async for text in chat.stream()]
    assert (chat.messages, chat.completions) == (CALL, [])
    assert await chat.acomplete() == chat.messages[-1].content


async def test_an_answer_may_be_a_model_of_pydantics(server):
    class Capital(BaseModel):
        name: str

    chat = Chat(messages=CALL, response_format=Capital)
    assert type(await chat.acomplete()) is Capital
    spoken = chat.add("user:France").stream()
    text = "".join([part async for part in spoken])
    assert spoken.result == Capital.model_validate_json(text)


async def test_an_answer_that_is_taken_away_is_drawn_anew_and_a_rerun_gets_both(server):
    """C1 and C2; in a run of its own each try is told apart by its request id."""

    async def tries(*request_ids):
        chat, answers = Chat(messages=CALL), []
        for request_id in request_ids:
            with cachepipe.using(request_id=request_id):
                answers.append(await chat.acomplete())
            chat.messages.pop()
        return answers, [completion.index for completion in chat.completions]

    first = await tries(None, None)
    assert first[1] == [0, 1]
    with cachepipe.run():
        assert await tries(None, None) == first
    with cachepipe.run():
        assert (await tries("try 2"))[1] == [2]
    assert server.stats.samples_generated == 3


async def test_a_chat_is_not_pickled_but_may_be_copied(server):
    """It holds a key."""
    chat = Chat(messages=CALL, cache=MemoryStore(), api_key="hidden", base_url=server.base_url)
    with pytest.raises(TypeError, match="holds a key"):
        pickle.dumps(chat)
    twin = copy.deepcopy(chat)
    await asyncio.gather(chat.acomplete(), twin.acomplete())
    assert len(chat.messages) == len(twin.messages) == 2
    assert {chat.completions[0].index, twin.completions[0].index} == {0, 1}


# Streams.


async def test_a_stream_brings_what_complete_does(server):
    """C10, over synchronous and asynchronous iteration."""
    whole = await Chat(messages=CALL, namespace="a").acomplete()
    chat = Chat(messages=CALL, namespace="b")
    spoken = chat.stream()
    assert (spoken.result, repr(spoken)) == (None, "<Spoken under way>")
    parts = [text async for text in spoken]
    assert (spoken.result, repr(spoken)) == (whole, "<Spoken complete>")
    assert "".join(parts) == "".join(Chat(messages=CALL, namespace="c").stream()) == whole
    assert spoken.completion.cached
    assert spoken.completion.usage == chat.completions[0].usage
    assert spoken.completion.usage["completion_tokens"] > 0
    assert server.stats.requests == 1


@pytest.mark.parametrize("own", [None, AsyncOpenAI, OpenAI])
async def test_a_stream_is_the_draw_of_the_block_that_asked_for_it(server, own):
    """C1: wherever it is read; else it would take a sample of another namespace, or of another run."""
    store = MemoryStore()
    options = {"cache": store}
    if own is not None:
        options = {"client": own(base_url=server.base_url, api_key="x", cache=store)}
    chat, once_more = Chat(messages=CALL, **options), Chat(messages=CALL, **options)
    with cachepipe.using(namespace="inner", request_id="one"):
        spoken = chat.stream()
    with cachepipe.run(), cachepipe.using(namespace="inner", request_id="one"):
        replayed = once_more.stream()
    with cachepipe.using(namespace="outer"):
        text = "".join([piece async for piece in spoken])
        assert "".join([piece async for piece in replayed]) == text
    assert (spoken.completion.namespace, spoken.completion.request_id) == ("inner", "one")
    assert replayed.completion.cached
    if own is AsyncOpenAI:
        await options["client"].close()
    elif own is OpenAI:
        options["client"].close()


@pytest.mark.parametrize("streams", [True, False])
def test_a_refusal_is_what_is_answered(answering, streams):
    """As a stream's text, too, it is the text of the message that is added."""
    deltas = [{"role": "assistant", "content": None}, {"refusal": "I will"}, {"refusal": " not."}, {}]
    said = {"role": "assistant", "content": None, "refusal": "I will not."}
    whole = {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]}
    chunks = [{"delta": delta, "finish_reason": None if delta else "stop"} for delta in deltas]
    chat = chat_of(answering(chunks if streams else whole))
    assert ("".join(chat.stream()) if streams else chat.complete()) == "I will not."
    assert chat.messages[1:] == [Message("assistant", "I will not.")]
    assert (chat.completions[0].message, chat.completions[0].refusal) == ("", "I will not.")


@pytest.mark.parametrize("end", [{"delta": None, "finish_reason": "stop"}, {"finish_reason": "stop"}])
def test_a_stream_may_end_without_a_delta(answering, end):
    chat = chat_of(answering([{"delta": {"content": "Rome"}}, end]))
    assert "".join(chat.stream()) == "Rome"


async def test_text_comes_before_the_answer_is_complete(server):
    server.settings = MockSettings(seed=1, stream_delay=0.02)
    spoken = Chat(messages=CALL).stream()
    assert await anext(spoken)
    assert server.stats.in_flight == 1
    await spoken.aclose()


@pytest.mark.parametrize("own", [None, AsyncOpenAI, OpenAI])
async def test_a_reader_that_stops_early_loses_nothing(server, own, tmp_path):
    """C7: what the model has begun is read to its end and stored; the messages stay as they are."""
    server.settings = MockSettings(seed=1, stream_delay=0.01)
    store = MemoryStore()
    options = {"cache": store}
    if own is not None:
        options = {"client": own(base_url=server.base_url, api_key="x", cache=store)}
    chat = Chat(messages=CALL, **options)
    async with chat.stream() as spoken:
        async for _ in spoken:
            break
    assert chat.messages == CALL
    with cachepipe.run():
        again = Chat(messages=CALL, cache=store, base_url=server.base_url, api_key="x")
        assert await again.acomplete()  # it waits for what is read in the background
    assert again.completions[0].cached
    assert server.stats.requests == 1
    if own is AsyncOpenAI:
        await options["client"].close()
    elif own is OpenAI:
        options["client"].close()


def test_a_loop_that_is_left_leaves_nothing_behind(server):
    server.settings = MockSettings(seed=1, stream_delay=0.005)
    chat = Chat(messages=CALL)
    for _ in chat.stream():
        break
    gc.collect()
    server.wait_until(lambda stats: stats.in_flight == 0)
    in_portal(close_clients())
    assert len([thread for thread in threading.enumerate() if thread.name == "cachepipe-stream"]) == 0
    assert Chat(messages=CALL, mode="replay").complete()
    with chat.stream() as spoken:
        next(spoken)
    assert chat.messages == CALL


async def test_a_reader_that_is_cancelled_is_cancelled(server):
    server.settings = MockSettings(seed=1, paused=True)
    chat = Chat(messages=CALL)
    reading = asyncio.ensure_future(chat.acomplete())
    await asyncio.to_thread(server.wait_until, lambda stats: stats.in_flight == 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    server.settings = MockSettings(seed=1)
    assert await chat.acomplete()
    assert len(chat.messages) == 2


# Tools.


async def test_tools_are_called_and_told_until_the_model_answers(server):
    server.settings = MockSettings(seed=1, uses_tools=True)

    async def add(a: int, b: int) -> int:
        """Add."""
        await asyncio.sleep(0)
        return a + b

    loops = []

    async def where() -> str:
        loops.append(asyncio.get_running_loop())
        return "here"

    chat = Chat(messages=CALL, tools=[weather, add, where])
    answer = await chat.acomplete()
    roles = [message.role for message in chat.messages]
    assert roles == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert chat.messages[-1].content == answer
    assert loops == [asyncio.get_running_loop()]
    called = [message.tool_calls[0]["function"]["name"] for message in chat.messages[1:-1:2]]
    assert called == ["weather", "add", "where"]
    assert chat.messages[4].content.isdigit()
    assert [message.tool_call_id for message in chat.messages[2:7:2]] == [
        message.tool_calls[0]["id"] for message in chat.messages[1:6:2]
    ]
    with cachepipe.run():
        streamed = Chat(messages=CALL, tools=[weather, add, where])
        assert "".join([text async for text in streamed.stream()]) == answer
    assert [message.role for message in streamed.messages] == roles


def test_a_tool_of_complete_is_called_in_the_callers_thread(server):
    server.settings = MockSettings(seed=1, uses_tools=True)
    threads = []

    def look() -> str:
        threads.append(threading.get_ident())
        return generate_inside()

    def generate_inside():
        return cachepipe.generate_text_completion_sync("Inside?").message

    async def later() -> str:
        return "later"

    chat = Chat(messages=CALL, tools=[look, later])
    assert chat.complete()
    assert threads == [threading.get_ident()]
    assert "".join(Chat(messages=["user:France"], tools=[look, later]).stream())
    assert threads == [threading.get_ident()] * 2


async def test_a_model_that_does_not_stop_calling_is_stopped(server):
    chat = Chat(messages=CALL, tools=[weather], tool_choice="required", max_rounds=2)
    with pytest.raises(ToolLoopError, match="after 2 rounds; raise max_rounds="):
        await chat.acomplete()
    assert chat.messages == CALL
    assert server.stats.requests == 3


async def test_what_a_tool_raises_reaches_the_caller(server):
    def broken(city: str) -> str:
        raise ValidationError.from_exception_data("own", [])

    server.settings = MockSettings(seed=1, uses_tools=True)
    chat = Chat(messages=CALL, tools=[broken])
    with pytest.raises(ValidationError, match="own"):
        await chat.acomplete()
    assert chat.messages == CALL


class OddError(BaseException):
    """Neither an Exception, nor one of those that stop a loop."""


@pytest.mark.parametrize("error", [SystemExit(5), KeyboardInterrupt(), OddError()])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_may_end_the_program(server, error, asynchronous, streams):
    server.settings = MockSettings(seed=1, uses_tools=True)

    def leaves(city: str) -> str:
        raise error

    async def leaves_later(city: str) -> str:
        await asyncio.sleep(0)
        raise error

    chat = Chat(messages=CALL, tools=[leaves_later if asynchronous else leaves])
    with pytest.raises(type(error)) as caught:
        list(chat.stream()) if streams else chat.complete()
    assert caught.value is error
    assert chat.messages == CALL
    assert Chat(messages=["user:Hello"]).complete()


async def test_a_wrong_call_is_told_to_the_model(server):
    server.settings = MockSettings(seed=1, uses_tools=True)

    def grow(size: Annotated[int, Field(gt=10**9)]) -> str:
        raise AssertionError("never called")

    chat = Chat(messages=CALL, tools=[grow])
    assert await chat.acomplete()
    assert "greater than 1000000000" in chat.messages[2].content


def call_of(name, arguments, **fields):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def calling(*calls):
    """The answer of a model that calls tools."""
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}


DONE = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Done."}, "finish_reason": "stop"}]
}


def chat_of(client, *functions):
    return Chat(client=client, cache=MemoryStore(), messages=CALL, tools=functions)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (call_of("stranger", "{}"), "There is no tool 'stranger'; there are: weather."),
        (call_of("weather", "{}"), "The arguments do not fit: city: Missing required argument"),
        (call_of("weather", "{oops"), "The arguments do not fit: Invalid JSON: "),
        (call_of("weather", "3"), "The arguments do not fit: Arguments must be "),
    ],
)
def test_what_the_model_is_told_of_a_wrong_call_is_the_same_with_every_release_of_pydantic(
    answering, call, told
):
    """C2: else what is asked next would not be found again."""
    chat = chat_of(answering(calling(call), DONE), weather)
    assert chat.complete() == "Done."
    assert chat.messages[2].content.startswith(told)
    assert "http" not in chat.messages[2].content


def test_the_call_of_a_tool_that_is_a_mapping_is_left_to_the_caller(answering):
    search = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    calls = [call_of("search", "{}"), call_of("weather", '{"city":"Rome"}', id="c2")]
    chat = chat_of(answering(calling(*calls), DONE), weather, search, {"type": "web"}, {"type": "files"})
    assert chat.complete() == ""
    assert chat.messages[1:] == [Message("assistant", None, tool_calls=calls)]
    for call in calls:
        chat.add(Message("tool", "found", tool_call_id=call["id"]))
    assert chat.complete() == "Done."


@pytest.mark.parametrize("indices", [(0, 0), (None, None), (1, 2)])
def test_calls_that_a_server_numbers_oddly_are_told_apart_in_streams(answering, indices):
    """As the cache tells them apart, so that a replay makes the same calls."""
    calls = [call_of("weather", '{"city":"Rome"}'), call_of("weather", '{"city":"Oslo"}', id="c2")]
    chunks = [
        {"delta": {"tool_calls": [{"index": index, **call}]}, "finish_reason": None}
        for index, call in zip(indices, calls, strict=True)
    ]
    chunks[0]["delta"]["tool_calls"].append({"index": indices[0], "function": {"name": "weather"}})
    end = {"delta": {}, "finish_reason": "tool_calls"}
    done = [{"delta": {"content": "Done."}, "finish_reason": "stop"}]
    chat = chat_of(answering([*chunks, end], done), weather)
    assert "".join(chat.stream()) == "Done."
    assert chat.messages[1].tool_calls == calls
    assert ['"Rome"' in chat.messages[2].content, '"Oslo"' in chat.messages[3].content] == [True, True]


async def test_what_a_reader_is_told_by_a_stream_of_togethers(server, answering):
    """Its chunks have one number for the token that they bring."""
    chunks = [
        {"delta": {"role": "assistant", "content": token}, "logprobs": value, "finish_reason": end}
        for token, value, end in (("Ro", -0.5, None), ("me", -1.0, "stop"))
    ]
    client = answering(chunks, kind=together.Together)
    chat = Chat(client=client, cache=MemoryStore(), messages=CALL, model="m", log_probs=True)
    assert "".join(chat.stream()) == "Rome"
    with cachepipe.run():
        again = Chat(client=client, cache=chat._plan.access._cache, messages=CALL, model="m", log_probs=True)
        again.complete()
    for completion in (chat.completions[0], again.completions[0]):
        assert completion.token_log_probs == [TokenLogProb("Ro", -0.5), TokenLogProb("me", -1.0)]


def test_after_what_a_tool_raises_the_model_is_told_nothing(answering):
    def broken() -> str:
        raise OSError("no network")

    spoken = chat_of(answering(calling(call_of("broken", "{}"))), broken)._spoken(streams=False)
    with pytest.raises(OSError, match="no network"):
        next(spoken)
    assert list(spoken) == []
    assert spoken.completion is None


@pytest.mark.parametrize("ends", [StopIteration, StopAsyncIteration])
async def test_a_tool_that_ends_an_iteration_has_failed(answering, ends):
    """A `next()` too many in a tool is an error of the tool, and not an answer that is None."""

    def broken() -> str:
        raise ends

    async def awaited() -> str:
        raise ends

    for tool in (broken, awaited):
        client = answering(*[calling(call_of(tool.__name__, "{}"))] * 2)
        with pytest.raises(RuntimeError, match=f"raised {ends.__name__}"):
            chat_of(client, tool).complete()
        with pytest.raises(RuntimeError, match=f"raised {ends.__name__}"):
            await chat_of(client, tool).acomplete()


async def test_after_what_a_tool_raises_the_model_is_told_nothing_asynchronously(answering):
    async def broken() -> str:
        raise OSError("no network")

    spoken = chat_of(answering(calling(call_of("broken", "{}"))), broken)._spoken(streams=False)
    with pytest.raises(OSError, match="no network"):
        await anext(spoken)
    assert [text async for text in spoken] == []
    assert spoken.completion is None


async def test_a_tool_may_be_asynchronous_behind_a_decorator(answering):
    async def look() -> str:
        return "found"

    @functools.wraps(look)
    def logged() -> str:
        return look()

    for complete in (lambda chat: asyncio.to_thread(chat.complete), lambda chat: chat.acomplete()):
        chat = chat_of(answering(calling(call_of("look", "{}")), DONE), logged)
        assert await complete(chat) == "Done."
        assert chat.messages[2].content == "found"


def test_what_a_model_is_told_of_a_function():
    told = tools.Tool(weather).to_dict()["function"]
    assert (told["name"], told["description"]) == ("weather", "Return the weather of a city.")
    assert told["parameters"]["required"] == ["city"]
    assert told["parameters"]["properties"]["city"]["description"] == "Which city"


class Forecast(BaseModel):
    city: str
    days: int = 3


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("as it is", "as it is"),
        ({"a": [1]}, '{"a":[1]}'),
        (
            {1: 10**30, "day": dt.date(2020, 1, 2)},
            '{"1":1000000000000000000000000000000,"day":"2020-01-02"}',
        ),
        ({"b": {"beta", "alpha", "gamma", "delta"}}, '{"b":["alpha","beta","delta","gamma"]}'),
        (Forecast(city="Rome"), '{"city":"Rome","days":3}'),
        ([fractions.Fraction(1, 3)], '["1/3"]'),
        (None, "null"),
    ],
)
def test_what_a_tool_returns_is_told_whole_and_the_same_in_every_process(result, told):
    assert tools.as_text(result) == told


def test_what_has_no_text_of_its_own_is_refused():
    """Its address would make another question of each run."""
    with pytest.raises(ValueError, match=r"returned <object object at .*>, which a model cannot use"):
        tools.as_text({"a": object()})


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ([lambda: 1], TypeError, "a function with a name"),
        ([dict], TypeError, "a function with a name"),
        ([weather, weather], ValueError, "two tools have the name 'weather'"),
        ([weather, tools.Tool(weather).to_dict()], ValueError, "two tools have the name 'weather'"),
        (weather, TypeError, "tools= is a list"),
    ],
)
def test_what_is_no_tool_is_refused(wrong, error, told):
    with pytest.raises(error, match=told):
        tools.as_tools(wrong)


def test_annotations_may_be_strings_of_a_module_that_cannot_be_imported():
    """As in a notebook, or in code that is executed; this file's own are strings too."""
    names = {"__name__": "nowhere"}
    code = (
        "from typing import Annotated as A\nclass C:\n  pass\ndef count(size: 'A[int, 7]' = 1): return size"
    )
    exec(code, names)  # noqa: S102
    tool = tools.Tool(names["count"])
    assert tool.parameters["properties"]["size"]["type"] == "integer"
    assert tool.given('{"size": "3"}')() == 3
    exec("def lost(size: 'Missing'): return size", names)  # noqa: S102
    with pytest.raises(TypeError, match=r"the tool lost have no JSON schema: .*Missing"):
        tools.Tool(names["lost"])


def test_parameters_that_cannot_be_given_by_name_are_refused():
    def first(a, /):
        return a

    with pytest.raises(TypeError, match="cannot be given by name"):
        tools.Tool(first)


# Wrong use.


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (lambda: Chat("user:Hello"), TypeError, "a mapping of settings"),
        (lambda: Chat(max_rounds=-1), ValueError, "max_rounds="),
        (lambda: Chat(n=2), TypeError, "n= is not taken"),
        (lambda: Chat().complete(), ValueError, "no messages"),
        (lambda: Chat().add("Hello"), ValueError, "begins with its role"),
        (lambda: Chat(messages=["Hello"]), ValueError, "begins with its role"),
    ],
)
def test_wrong_use_is_refused(server, wrong, error, told):
    with pytest.raises(error, match=told):
        wrong()
    assert server.stats.requests == 0


def test_settings_may_come_as_a_mapping(server, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    host = server.base_url.removesuffix("/v1")
    chat = Chat(
        {"OLLAMA_HOST": host, "CACHEPIPE_MODEL": "llama3.1:8b", "CACHEPIPE_NAMESPACE": "n", "AUTH": None}
    )
    chat.add("user:Italy")
    assert chat.complete()
    assert (chat.model, chat.completions[0].namespace) == ("llama3.1:8b", "n")


async def test_settings_that_come_as_a_mapping_are_those_of_a_client_without_a_cache_too(server, tmp_path):
    for kind in (openai.OpenAI, openai.AsyncOpenAI):
        folder = tmp_path / kind.__name__
        client = kind()
        chat = Chat({"CACHEPIPE_DIR": str(folder)}, client=client, messages=CALL)
        assert await chat.acomplete()
        assert (folder / "cache.db").exists()
        closing = client.close()
        if closing is not None:
            await closing
