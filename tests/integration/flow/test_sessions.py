"""Sessions: what is said, what is kept of it, and that a rerun asks nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading

import forked
import openai
import pytest
from pydantic import BaseModel

import cachepipe
from cachepipe import BadAnswer, CacheMiss, MemoryStore, Message, Services, Session, StoreError, using
from cachepipe.chat.sessions import DEFAULTS
from cachepipe.clients import AsyncOpenAI
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.server import Fault

pytestmark = pytest.mark.anyio
SYSTEM = "You are a calculator."
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


@pytest.fixture
async def service(server):
    made = Services.custom(server.base_url, model="m")
    yield made
    await made.close()


class Spy:
    """A client that notes the bodies and passes them on."""

    def __init__(self, client):
        self.bodies, self.chat, self.completions = [], self, self
        self._create = client.chat.completions.create

    async def create(self, **body):
        self.bodies.append(body)
        return await self._create(**body)


@pytest.fixture
async def spy(server):
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        yield Spy(client)


def roles(session):
    return [message.role for message in session.conversation]


async def test_instructions_and_contexts_are_strings_or_mappings(spy):
    session = Session({"you are": "a calculator"}, client=spy)
    await session.initiate({"sum": "x and y"}, context={"x": 7, "y": "ü"})
    await session.initiate("double it", context="the last answer")
    await session.initiate("halve it")
    contents = [[message["content"] for message in body["messages"]] for body in spy.bodies]
    assert contents == [
        ['{"you are": "a calculator"}', '{"instruction": {"sum": "x and y"}, "context": {"x": 7, "y": "ü"}}'],
        ['{"you are": "a calculator"}', '{"instruction": "double it", "context": "the last answer"}'],
        ['{"you are": "a calculator"}', "halve it"],
    ]


async def test_initiate_begins_anew_and_followup_goes_on(spy):
    session = Session(SYSTEM, client=spy)
    first = await session.initiate("one")
    second = await session.followup("two")
    assert [message.text for message in session.conversation] == [SYSTEM, "one", first, "two", second]
    await session.initiate("again")
    assert roles(session) == ["system", "user", "assistant"]
    await session.initiate("otherwise", system="You are a poet.")
    assert session.system == "You are a poet."


async def test_the_defaults_are_sent_but_for_what_says_nothing(spy):
    session = Session(SYSTEM, client=spy)
    assert session.llmconfig == DEFAULTS
    await session.initiate("one")
    sent = {name: value for name, value in spy.bodies[0].items() if name != "messages"}
    assert sent == {
        "model": "gpt-4-1106-preview",
        "frequency_penalty": 0,
        "n": 1,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "temperature": 0.7,
        "top_p": 1,
    }


async def test_a_call_overrides_the_session_and_update_changes_it(spy):
    session = Session(SYSTEM, client=spy, llmconfig={"temperature": 0.1})
    await session.initiate("one", temperature=0.5, stop=["."])
    session.llmconfig.update({"temperature": 0.9, "max_tokens": 4})
    await session.followup("two", top_p=None)
    sent = [
        (body["temperature"], body.get("stop"), body.get("max_tokens"), "top_p" in body)
        for body in spy.bodies
    ]
    assert sent == [(0.5, ["."], None, True), (0.9, None, 4, False)]
    assert DEFAULTS["temperature"] == 0.7


async def test_several_answers_come_as_a_list_and_the_first_is_gone_on_with(spy):
    session = Session(SYSTEM, client=spy)
    answers = await session.initiate("one", n=3)
    assert len(answers) == 3
    assert session.conversation.messages[-1].text == answers[0]


async def test_calls_of_tools_are_returned_and_answered(spy, server):
    session = Session(SYSTEM, client=spy, llmconfig={"tools": [TOOL], "tool_choice": "required"})
    [call] = await session.initiate("add 1")
    assert call["function"]["name"] == "add"
    assert await session.followup(tool_outputs={call["id"]: {"sum": 3}}, tool_choice="none")
    assert roles(session) == ["system", "user", "assistant", "tool", "assistant"]
    assert spy.bodies[1]["messages"][3]["content"] == '{"sum": 3}'
    with pytest.raises(ValueError, match="needs an instruction"):
        await session.followup()


async def test_an_answer_may_be_a_pydantic_model(spy):
    class Sum(BaseModel):
        value: int

    session = Session(SYSTEM, client=spy)
    assert isinstance(await session.initiate("add", response_format=Sum), Sum)
    assert roles(session) == ["system", "user", "assistant"]


async def test_an_answer_that_is_no_such_model_says_where_it_is_kept(answering, server):
    """As of completions; and the key is that of the SDK's own `parse`."""

    class Sum(BaseModel):
        value: int

    store = MemoryStore()
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=store) as client:
        session = Session(client=client, llmconfig={"model": "m"})
        await session.initiate("add", response_format=Sum)
        sent = {"model": "m", "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
        said = [{"role": "user", "content": "add"}]
        with cachepipe.run():
            again = await client.chat.completions.parse(**sent, messages=said, response_format=Sum)
        assert cachepipe.info(again).cached == (True,)
        plain = answering(answer('{"value":', "length"), answer("many"), kind=openai.AsyncOpenAI)
        wrapped = cachepipe.wrap(plain, cache=store)
        for told in (
            r"not a valid Sum \(it was cut off.*sample 0 of key",
            "a valid Sum: 'many'.*sample 1 of key",
        ):
            session = Session(client=wrapped, llmconfig={"model": "m"})
            with pytest.raises(BadAnswer, match=told):
                await session.initiate("subtract", response_format=Sum)
            assert roles(session) == []


async def test_a_structured_answer_may_be_streamed(spy):
    class Sum(BaseModel):
        value: int

    session = Session(SYSTEM, client=spy, llmconfig={"response_format": Sum})
    text = "".join([piece async for piece in await session.initiate("add", stream=True)])
    assert Sum.model_validate_json(text)
    with pytest.raises(TypeError, match="pydantic model's class, or a mapping; got 'json'"):
        await session.followup("add", response_format="json")
    assert len(spy.bodies) == 1


async def test_a_streamed_answer_becomes_part_of_the_conversation_at_its_end(spy):
    session = Session(SYSTEM, client=spy)
    pieces = await session.initiate("one", stream=True)
    with pytest.raises(RuntimeError, match="still being streamed"):
        await session.followup("two")
    text = "".join([piece async for piece in pieces])
    assert text == pieces.text == session.conversation.messages[-1].text
    assert await session.followup("two")
    with pytest.raises(ValueError, match="streams one answer"):
        await session.followup("three", stream=True, n=2)


async def test_a_reader_that_is_cancelled_leaves_a_session_that_goes_on(gated):
    """At once, no matter when the loop of the calls notices."""
    service = Services.custom(f"{gated.url}/v1", model="m")
    session = Session(SYSTEM, service=service, cache=MemoryStore())
    pieces = await session.initiate("one", stream=True)
    assert await anext(pieces) == "sample1"
    reading = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert pieces.ended
    assert roles(session) == ["system"]
    gated.gate.set()
    pieces = await session.initiate("two", stream=True)
    assert [piece async for piece in pieces] == ["sample2", " goes on"]
    await service.close()


async def test_a_stream_may_be_closed_before_and_after_it_is_read(spy):
    session = Session(SYSTEM, client=spy)
    unread = await session.initiate("one", stream=True)
    await unread.aclose()
    assert (unread.ended, unread.text, roles(session)) == (True, "", ["system"])
    pieces = await session.initiate("two", stream=True)
    text = "".join([piece async for piece in pieces])
    await pieces.aclose()
    assert session.conversation.messages[-1].text == text


async def test_the_pieces_of_a_service_may_be_read_without_awaiting(service):
    session = Session(SYSTEM, service=service, cache=MemoryStore())
    pieces = await session.initiate("one", stream=True)
    text = await asyncio.to_thread("".join, pieces)
    assert text == pieces.text == session.conversation.messages[-1].text
    assert await session.followup("two")


async def test_a_session_takes_a_key_and_a_url(server):
    session = Session(base_url=server.base_url, api_key="k", cache=MemoryStore(), llmconfig={"model": "m"})
    assert await session.initiate("one")
    assert session.service.base_url == server.base_url
    await session.service.close()


async def test_a_reader_that_stops_has_heard_what_it_read(spy):
    session = Session(SYSTEM, client=spy)
    pieces = await session.initiate("one", stream=True)
    heard = await anext(pieces)
    await pieces.aclose()
    assert session.conversation.messages[-1].text == heard
    assert [piece async for piece in pieces] == []


def answer(content=None, finish_reason="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


@pytest.mark.parametrize("ending", [[], [{"delta": {"content": "two"}}]], ids=["one piece", "two pieces"])
async def test_a_stream_that_ends_before_its_answer_is_no_answer(answering, ending):
    """As its sample is not stored, it is no part of the conversation."""
    chunks = [{"delta": {"role": "assistant", "content": "one"}}, *ending]
    session = Session(
        SYSTEM, client=answering(chunks, answer("all"), kind=openai.AsyncOpenAI), cache=MemoryStore()
    )
    pieces = await session.initiate("count", stream=True)
    with pytest.raises(BadAnswer, match="ended before the answer did"):
        async for _ in pieces:
            pass
    assert roles(session) == ["system"]
    assert await session.initiate("count") == "all"


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"content": ""}, ""),
        ({"content": None}, ""),
        ({"content": None, "refusal": "I will not."}, "I will not."),
    ],
    ids=["empty", "none", "refusal"],
)
async def test_an_answer_without_text_is_part_of_the_conversation(answering, said, text, streams):
    chunks = [{"delta": {"role": "assistant", **said}}, {"delta": {}, "finish_reason": "stop"}]
    session = Session(
        SYSTEM, client=answering(chunks if streams else answer(**said), kind=openai.AsyncOpenAI)
    )
    answered = await session.initiate("say", stream=streams)
    assert ("".join([piece async for piece in answered]) if streams else answered) == text
    assert session.conversation.messages[1:] == [Message("user", "say"), Message("assistant", text)]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


async def test_calls_of_tools_are_what_is_answered_also_beside_an_empty_text(answering):
    said = answer("", "tool_calls", tool_calls=[CALL])
    session = Session(
        client=answering(said, kind=openai.AsyncOpenAI), cache=MemoryStore(), llmconfig={"tools": [TOOL]}
    )
    assert await session.initiate("add") == [CALL]


async def test_a_reader_that_stops_within_a_call_of_a_tool_has_heard_nothing(answering):
    """Half a call would be refused with all that follows it."""
    started = {**CALL, "index": 0, "function": {"name": "add", "arguments": '{"x'}}
    chunks = [{"delta": {"content": "", "tool_calls": [started]}}, {"delta": {"content": "a"}}]
    session = Session(
        SYSTEM,
        client=answering(chunks, kind=openai.AsyncOpenAI),
        cache=MemoryStore(),
        llmconfig={"tools": [TOOL]},
    )
    pieces = await session.initiate("add", stream=True)
    assert await anext(pieces) == "a"
    await pieces.aclose()
    assert session.conversation.messages[-1] == Message("assistant", "a")


async def test_outputs_answer_the_calls_of_tools_that_are_open(answering):
    said = answer(None, "tool_calls", tool_calls=[CALL, {**CALL, "id": "c2"}])
    client = answering(said, answer("Done."), kind=openai.AsyncOpenAI)
    session = Session(client=client, cache=MemoryStore(), llmconfig={"tools": [TOOL], "tool_choice": "auto"})
    with pytest.raises(ValueError, match="no open call of a tool has the id 'c1'; open are none"):
        await session.followup(tool_outputs={"c1": 1})
    await session.initiate("add twice")
    for outputs, told in (
        ({"c1": 1, "c3": 3}, "no open call of a tool has the id 'c3'; open are 'c1', 'c2'"),
        ({"c1": 1}, "give tool_outputs= for 'c2'"),
        (None, "give tool_outputs= for 'c1', 'c2'"),
    ):
        with pytest.raises(ValueError, match=told):
            await session.followup("go on", tool_outputs=outputs)
    with pytest.raises(TypeError, match="mapping of results by the id"):
        await session.followup(tool_outputs=[1, 2])
    assert await session.followup(tool_outputs={"c1": 1, "c2": 2}) == "Done."


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"choices": []}, "without a choice that has a message; expected one$"),
        ({"error": {"message": "no money"}}, "It says: .*no money"),
        ({"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}, "without a choice"),
        ("<html>Welcome!</html>", "Welcome!.*does base_url end"),
    ],
    ids=["none", "error", "no message", "a website"],
)
async def test_what_is_no_answer_says_what_it_is(answering, said, told):
    session = Session(SYSTEM, client=answering(said, kind=openai.AsyncOpenAI), cache=MemoryStore())
    with pytest.raises(BadAnswer, match=told):
        await session.initiate("one")
    assert roles(session) == ["system"]


async def test_tools_called_in_a_stream_are_kept(spy):
    session = Session(SYSTEM, client=spy, llmconfig={"tools": [TOOL], "tool_choice": "required"})
    pieces = await session.initiate("add 1", stream=True)
    assert [piece async for piece in pieces] == []
    [call] = session.conversation.messages[-1].tool_calls
    assert call["function"]["name"] == "add"
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert await session.followup(tool_outputs={call["id"]: 3}, tool_choice="none")


async def test_a_call_that_fails_leaves_the_conversation_as_it_was(server, service):
    session = Session(SYSTEM, service=service, cache=MemoryStore())
    await session.initiate("one")
    before = list(session.conversation)
    server.settings = MockSettings(script=(Fault(kind="status", status=400),))
    with pytest.raises(openai.BadRequestError):
        await session.followup("two")
    assert list(session.conversation) == before
    assert await session.followup("two")


async def test_followups_asked_for_at_once_follow_one_another(service):
    session = Session(SYSTEM, service=service, cache=MemoryStore())
    await session.initiate("zero")
    answers = await asyncio.gather(session.followup("one"), session.followup("two"))
    said = [message.text for message in session.conversation]
    assert said[3:] == ["one", answers[0], "two", answers[1]]


async def test_followups_asked_for_in_several_threads_follow_one_another(service):
    """Each thread has a loop of its own; no answer is lost from the conversation."""
    session = Session(SYSTEM, service=service, cache=MemoryStore(), llmconfig={"model": "m"})

    async def ask(number):
        await session.followup(f"question {number}")
        await service.close()

    threads = [threading.Thread(target=asyncio.run, args=(ask(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert roles(session) == ["system", *["user", "assistant"] * 4]


@pytest.mark.parametrize(
    "damage",
    [{"namespace": ...}, {"messages": [{"role": "nobody"}]}, {"messages": 5}, {"llmconfig": 5}],
    ids=str,
)
async def test_a_saved_session_that_is_damaged_is_said_to_be(service, tmp_path, damage):
    path = tmp_path / "session.json"
    Session(SYSTEM, service=service, cache=MemoryStore()).save(path)
    saved = {**json.loads(path.read_text()), **damage}
    path.write_text(json.dumps({name: value for name, value in saved.items() if value is not ...}))
    with pytest.raises(ValueError, match="holds a session that is damaged"):
        Session.load(path, service=service, cache=MemoryStore())


async def test_branches_go_their_own_ways_with_samples_of_their_own(server, service):
    session = Session(SYSTEM, service=service, cache=MemoryStore(), namespace="a")
    await session.initiate("one")
    branch = session.branch()
    branch.llmconfig["temperature"] = 0
    assert session.llmconfig["temperature"] == 0.7
    branch.llmconfig["temperature"] = 0.7
    await session.followup("two")
    await branch.followup("two")
    assert len(session.conversation) == len(branch.conversation) == 5
    assert server.stats.samples_generated == 3  # the same question twice, answered anew
    await branch.followup("three")
    assert len(session.conversation) == 5


async def test_a_saved_session_goes_on_where_it_was(service, tmp_path):
    store, path = MemoryStore(), tmp_path / "session.json"
    session = Session(SYSTEM, service=service, cache=store, namespace="a", llmconfig={"temperature": 0.2})
    await session.initiate({"sum": "ü"}, context={"x": 1})
    session.save(path)
    loaded = Session.load(path, service=service, cache=store)
    assert loaded.conversation == session.conversation
    assert (loaded.namespace, loaded.llmconfig) == ("a", session.llmconfig)
    assert await loaded.followup("two")
    assert Session.load(path, service=service, cache=store, namespace="b").namespace == "b"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError, match="has its system message"):
        Session.load(path, service=service, cache=store, system="another")
    for text in ("{}", "no JSON", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no session"):
            Session.load(path)


async def test_what_a_client_without_a_cache_is_asked_is_cached_too(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "default"))
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k") as client:
        for cache in (None, tmp_path / "named"):
            session = Session(SYSTEM, client=client, cache=cache, llmconfig={"model": "m"})
            first = await session.initiate("one")
            with cachepipe.run():
                again = Session(SYSTEM, client=client, cache=cache, mode="replay", llmconfig={"model": "m"})
                assert await again.initiate("one") == first
    assert {path.name for path in tmp_path.iterdir()} == {"default", "named"}
    assert server.stats.requests == 2


async def test_a_session_tells_what_its_last_answer_was(service):
    store = MemoryStore()

    async def told(**how):
        session = Session(SYSTEM, service=service, cache=store, namespace="a")
        assert session.info is None
        answer = await session.initiate("one", **how)
        if how:
            assert "".join([piece async for piece in answer])
        return session.info

    first = await told()
    assert (first.namespace, first.cached) == ("a", (False,))
    assert first.as_asked["completion_tokens"] > 0
    with cachepipe.run():
        again = await told(stream=True)
    assert (again.cached, again.as_asked, again.billed["total_tokens"]) == ((True,), first.as_asked, 0)


async def test_sessions_of_a_service_share_connections_and_one_run(server, service):
    store = MemoryStore()
    for _ in range(3):
        await Session(SYSTEM, service=service, cache=store).initiate("one")
    assert server.stats.samples_generated == 3  # equal questions of one run get samples of their own
    assert server.stats.max_connections == 1


def test_sessions_of_several_loops_share_connections_and_leave_none_behind():
    """What calls `asyncio.run` again and again leaves nothing to a loop that has ended."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8)) as server:
        store, service = MemoryStore(), Services.custom(server.base_url, model="m")
        for _ in range(3):
            asyncio.run(Session(SYSTEM, service=service, cache=store).initiate("one"))
        assert server.stats.samples_generated == 3
        assert server.stats.max_connections == 1
        del service
        gc.collect()
        server.wait_until(lambda stats: stats.connections == 0)
        for _ in range(3):
            own = Services.custom(server.base_url, model="m")
            asyncio.run(Session(SYSTEM, service=own, cache=store).initiate("two"))
            del own
            gc.collect()
        server.wait_until(lambda stats: stats.connections == 0)


def test_a_stream_that_is_left_at_the_end_of_its_loop_is_stored():
    """C7: the loop that began to read it has ended."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8, stream_delay=0.01)) as server:
        service, store = Services.custom(server.base_url, model="m"), MemoryStore()

        async def heard(most):
            pieces = await Session(SYSTEM, service=service, cache=store).initiate("one", stream=True)
            async for _ in pieces:
                if len(pieces.text) >= most:
                    break
            return pieces.text

        first = asyncio.run(heard(1))
        with cachepipe.run():
            assert asyncio.run(heard(1000)).startswith(first)
        assert server.stats.requests == 1
        asyncio.run(service.close())


async def test_a_block_of_replay_needs_no_key_and_calls_nobody(server, monkeypatch):
    store = MemoryStore()
    with monkeypatch.context() as patched:
        patched.setenv("SOME_KEY", "k")
        service = Services.custom(server.base_url, model="m", key_scheme="SOME_KEY")
        first = await Session(SYSTEM, service=service, cache=store).initiate("one")
        await service.close()
    with cachepipe.run(), using(mode="replay"):
        assert await Session(SYSTEM, service=service, cache=store).initiate("one") == first
        with pytest.raises(CacheMiss):
            await Session(SYSTEM, service=service, cache=store).initiate("two")
    await service.close()
    assert server.stats.requests == 1


async def test_a_folder_is_named_as_everywhere_else(server, service, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    await Session(SYSTEM, service=service, cache="~/mine").initiate("one")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(StoreError, match="got ''"):
        Session(SYSTEM, service=service, cache="")


async def test_a_saved_session_holds_no_headers(service, tmp_path):
    """They may hold a key."""
    config = {"extra_headers": {"Authorization": "hidden"}, "extra_query": {"key": "hidden"}}
    session = Session(SYSTEM, service=service, cache=MemoryStore(), llmconfig=config)
    session.save(tmp_path / "session.json")
    assert "hidden" not in (tmp_path / "session.json").read_text()


async def test_a_block_says_whose_draws_the_calls_of_a_session_are(server, service):
    """As for clients: what `using` sets goes before what a session was made with, but not before a call."""
    store = MemoryStore()

    async def ask(**how):
        session = Session("x", service=service, cache=store, namespace="a", llmconfig={"model": "m"})
        return await session.initiate("hi", **how)

    with using(namespace="b", request_id="1"):
        first = await ask()
    with using(namespace="c", request_id="1"):
        assert await ask() == first
    assert server.stats.requests == 1
    assert {info.draw.namespace for info in store.draws()} == {"=b", "=c"}
    with using(request_id="1"):
        await ask(request_id="2")
    assert {(info.draw.namespace, info.draw.request_id) for info in store.draws()} >= {("=a", "2")}


async def test_a_session_draws_in_the_namespace_of_a_client_with_its_own_cache(server):
    store = MemoryStore()
    where = {"base_url": server.base_url, "api_key": "k", "cache": store}
    async with AsyncOpenAI(**where, namespace="client's", mode="refresh") as client:
        for options in ({}, {"namespace": "own"}):
            session = Session("x", client=client, llmconfig={"model": "m"}, **options)
            await session.initiate("hi")
            assert session.info.cached == (False,)
    assert {info.draw.namespace for info in store.draws()} == {"=client's", "=own"}


async def test_a_session_looks_up_its_namespace_as_completions_do(service, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_NAMESPACE", "environment")
    store = MemoryStore()
    session = Session("x", service=service, cache=store, request_id="first")
    await session.initiate("hi")
    await session.followup("hi", request_id="second")
    assert session.namespace == "environment"
    assert [(info.draw.namespace, info.draw.request_id) for info in store.draws()] == [
        ("=environment", "first"),
        ("=environment", "second"),
    ]


async def test_sessions_that_come_and_go_are_one_run(server, tmp_path):
    for _ in range(3):
        service = Services.custom(server.base_url, model="m")
        await Session(SYSTEM, service=service, cache=tmp_path / "cache").initiate("one")
        await service.close()
    assert server.stats.samples_generated == 3


async def test_what_cannot_be_asked_is_refused_before_anything_is_spent(server):
    service = Services.custom(server.base_url)
    with pytest.raises(ValueError, match="no model is named"):
        await Session(SYSTEM, service=service, cache=MemoryStore()).initiate("one")
    with pytest.raises(TypeError, match="strings or mappings"):
        await Session(SYSTEM, service=service, cache=MemoryStore()).initiate(7)
    with pytest.raises(TypeError, match="write as JSON"):
        await Session(SYSTEM, service=service, cache=MemoryStore()).initiate({"x": object()})
    with pytest.raises(TypeError, match="service= takes a Service"):
        Session(SYSTEM, service="https://host/v1")
    with pytest.raises(TypeError, match="llmconfig is a mapping"):
        Session(SYSTEM, service=service, llmconfig="m")
    with pytest.raises(TypeError, match="not both"):
        Session(SYSTEM, service=service, client=object())
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as cached:
        for client in (cached, Spy(cached)):
            for options in ({"cache": MemoryStore()}, {"mode": "replay"}, {"repeat": "same"}):
                with pytest.raises(TypeError, match="the client has its own cache"):
                    Session(SYSTEM, client=client, **options)
    with openai.OpenAI(base_url=server.base_url, api_key="k") as waits:
        for client in (waits, object(), "client"):
            with pytest.raises(TypeError, match="takes an asynchronous client"):
                Session(SYSTEM, client=client)
    for options in ({"mode": "again"}, {"repeat": "never"}):
        with pytest.raises(ValueError, match=r"got '(again|never)'"):
            Session(SYSTEM, service=service, **options)
    session = Session(SYSTEM, service=service, cache=MemoryStore(), llmconfig={"model": "m"})
    for n in ("2", 0, True):
        with pytest.raises(ValueError, match="n is a whole number, at least 1"):
            await session.initiate("one", n=n)
    for wrong in ({"messages": []}, {"extra_body": {"messages": []}}):
        with pytest.raises(TypeError, match="messages= is not taken here"):
            await session.initiate("one", **wrong)
    with pytest.raises(TypeError, match="n= is given by itself"):
        await session.initiate("one", extra_body={"n": 3})
    with pytest.raises(TypeError, match="extra_body= is a mapping"):
        await session.initiate("one", extra_body=3)
    assert server.stats.requests == 0
    assert repr(Session(SYSTEM, service=service, cache=MemoryStore(), namespace="a")) == (
        f"<Session of 1 messages with None at {service.name}, namespace 'a'>"
    )


TURNS = """
import asyncio, sys
from cachepipe import Services, Session

async def main():
    service = Services.custom(sys.argv[1], model="m")
    session = Session("You are a calculator.", service=service, cache=sys.argv[2], namespace=sys.argv[3])
    print(await session.initiate({"sum": "|x| + |y|"}, context={"x": 7, "y": 3}))
    print(await session.followup("times 2", temperature=0.5))
    async for piece in await session.followup("and again", stream=True):
        print(piece, end="")
    print(await session.followup("all in all", n=2))
    await service.close()

asyncio.run(main())
"""


async def test_a_conversation_of_several_turns_replays_in_another_process_without_a_call(server, tmp_path):
    def run(namespace):
        ran = forked.run(
            [sys.executable, "-W", "error", "-c", TURNS, server.base_url, str(tmp_path / "cache"), namespace],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "CACHEPIPE_DISABLE": ""},
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout

    first = await asyncio.to_thread(run, "a")
    calls = server.stats.requests
    assert await asyncio.to_thread(run, "a") == first
    assert await asyncio.to_thread(run, "b") == first
    assert server.stats.requests == calls == 4
