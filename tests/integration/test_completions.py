"""Completions for people who write scripts: what they tell, what they cost, and how they fail."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
import pickle
import pydoc
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import openai
import pytest
from doors import DOORS
from pydantic import BaseModel, Field

import cachepipe
from cachepipe import (
    BadAnswer,
    CacheMiss,
    CompletionsFailed,
    Conversation,
    MemoryStore,
    Message,
    Session,
    StoreError,
    TextCompletion,
    TokenLogProb,
    from_jsonl,
    generate_text_completion,
    generate_text_completion_for_conversation,
    generate_text_completion_for_conversation_sync,
    generate_text_completion_sync,
    generate_text_completions,
    generate_text_completions_for_conversations,
    generate_text_completions_for_conversations_sync,
    generate_text_completions_sync,
    prices,
    terminal,
    to_jsonl,
)
from cachepipe.chat import access
from cachepipe.chat.access import Access, Environment
from cachepipe.chat.kept import close_clients, on_portal
from cachepipe.chat.options import AccessOptions, CompletionOptions, ManyOptions
from cachepipe.clients import AsyncOpenAI, AsyncTogether, OpenAI
from cachepipe.portal import in_portal
from cachepipe.services import LimitOptions, Service, Services
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.ngram import default_model, flatten

pytestmark = pytest.mark.anyio
FRANCE = "What is the capital of France?"


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def server(monkeypatch, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=48)) as running:
        for name in ("OLLAMA_HOST", "AUTH", "CACHEPIPE_NAMESPACE", "CACHEPIPE_MODEL", "CACHEPIPE_DISABLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "made-up")
        monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "cache"))
        yield running
        in_portal(close_clients())


def texts(completions):
    return [completion.message for completion in completions]


# What a completion tells.


async def test_a_completion_tells_what_was_asked_and_answered(server):
    before = time.time() - 1
    completion = await generate_text_completion(FRANCE, model="ngram-1", temperature=0.5)
    assert type(completion) is TextCompletion
    assert completion.conversation == Conversation([Message("user", FRANCE)])
    assert (completion.model, completion.cached, completion.finish_reason) == ("ngram-1", False, "stop")
    assert before < completion.start_time <= completion.end_time <= completion.retrieval_end_time
    assert completion.duration == completion.end_time - completion.start_time
    assert completion.usage["completion_tokens"] == server.stats.tokens_out
    assert completion.usage["total_tokens"] == server.stats.tokens_in + server.stats.tokens_out
    assert completion.to_message() == Message("assistant", completion.message)


async def test_a_cached_completion_keeps_the_times_of_its_generation(server):
    first = await generate_text_completion(FRANCE)
    with cachepipe.run():
        again = await generate_text_completion(FRANCE)
    assert (first.cached, again.cached, server.stats.requests) == (False, True, 1)
    assert (again.message, again.usage) == (first.message, first.usage)
    assert (again.start_time, again.end_time) == (first.start_time, first.end_time)
    assert again.retrieval_start_time >= first.retrieval_end_time
    assert again.retrieval_duration >= 0
    assert (again.key, again.index) == (first.key, 0)


async def test_a_cached_completion_tells_what_its_generation_cost(server, monkeypatch):
    assert (
        await generate_text_completion(FRANCE, model="made-up")
    ).cost is None  # nobody knows what this server takes
    monkeypatch.setattr(prices, "cost_of", lambda counts, model, url: counts["total_tokens"] / 1000)
    with cachepipe.run():
        cached = await generate_text_completion(FRANCE, model="made-up")
    assert cached.cached
    assert cached.cost == cached.usage["total_tokens"] / 1000 > 0


async def test_a_price_is_looked_up_once_somebody_wants_to_know(server, monkeypatch):
    looked = []
    monkeypatch.setattr(prices, "cost_of", lambda *_: looked.append(1) or 0.5)
    made = await generate_text_completion(FRANCE)
    assert looked == []
    assert (pickle.loads(pickle.dumps(made)).cost, made.cost, made.cost) == (0.5, 0.5, 0.5)
    assert len(looked) == 2  # once for each of the two objects
    fresh = await generate_text_completion(FRANCE)
    assert json.loads(to_jsonl([fresh]))["cost"] == 0.5
    assert from_jsonl(to_jsonl([fresh])) == [fresh]


async def test_asking_again_in_one_run_draws_another_sample(server):
    """C1, across calls that each open and close nothing."""
    indices = [(await generate_text_completion(FRANCE)).index for _ in range(3)]
    assert indices == [0, 1, 2]
    same = [await generate_text_completion(FRANCE, repeat="same", namespace="app") for _ in range(2)]
    assert same[0].message == same[1].message
    assert server.stats.samples_generated == 3


def test_a_run_spans_several_loops(server):
    indices = [asyncio.run(generate_text_completion(FRANCE)).index for _ in range(2)]
    assert indices == [0, 1]
    assert server.stats.connections == 1


async def test_bypassed_completions_have_their_own_times_and_no_key(server):
    completion = await generate_text_completion(FRANCE, mode="bypass")
    assert (completion.key, completion.cached) == (None, False)
    assert completion.start_time == completion.retrieval_start_time
    assert completion.usage["total_tokens"] > 0


async def test_replay_needs_no_key_and_calls_nobody(server, monkeypatch):
    first = await generate_text_completion(FRANCE)
    await close_clients()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(openai.OpenAIError, match="api_key"):
        await generate_text_completion(FRANCE)
    replayed = await generate_text_completion(FRANCE, mode="replay")
    assert (replayed.message, replayed.cached) == (first.message, True)
    with cachepipe.using(mode="replay"), pytest.raises(CacheMiss):
        await generate_text_completion("Something else?")
    assert server.stats.requests == 1


# Log probabilities.


async def test_printed_probabilities_are_those_of_the_model(server):
    """What the pretty printer shows agrees with the embedded model's known distribution, token by token."""
    completion = await generate_text_completion(FRANCE, log_probs=True, top_log_probs=10, temperature=0.7)
    printed = completion.to_pretty_log_probs_string(show_probabilities=True)
    pairs = re.findall(r"(.+?)\[([01]\.\d{4})\]", printed, re.DOTALL)
    assert "".join(token for token, _ in pairs) == completion.message
    model, context = default_model(), flatten([{"role": "user", "content": FRANCE}])
    assert len(pairs) > 3
    for place, (token, probability) in enumerate(pairs):
        before = [token for token, _ in pairs[:place]]
        table = model.distribution(context, before, temperature=0.7)
        assert float(probability) == pytest.approx(table[token], abs=5.1e-5)
        best = sorted(table.values(), reverse=True)[:10]
        shown = [top.probability for top in completion.full_token_log_probs[place]]
        assert shown == pytest.approx(best)


async def test_tokens_are_coloured_by_their_probability(server, monkeypatch):
    completion = await generate_text_completion(FRANCE, log_probs=True)
    plain = completion.to_pretty_log_probs_string()
    assert plain == completion.message
    coloured = completion.to_pretty_log_probs_string(color=True)
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    sure, unsure = (
        dataclasses.replace(completion, token_log_probs=[TokenLogProb("x", math.log(probability))])
        for probability in (0.99, 0.05)
    )
    assert sure.to_pretty_log_probs_string(color=True) == "\x1b[32mx\x1b[0m"
    assert unsure.to_pretty_log_probs_string(color=True) == "\x1b[31mx\x1b[0m"
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert completion.to_pretty_log_probs_string() == plain


async def test_without_log_probabilities_printing_them_says_what_to_do(server):
    completion = await generate_text_completion(FRANCE)
    assert completion.token_log_probs is completion.full_token_log_probs is None
    with pytest.raises(ValueError, match="log_probs=True"):
        completion.to_pretty_log_probs_string()


async def test_together_takes_log_probabilities_in_its_own_form(server):
    async with AsyncTogether(api_key="made-up", base_url=server.url, cache=MemoryStore()) as client:
        for options in ({"top_log_probs": 3}, {"log_probs": True}):
            completion = await generate_text_completion(FRANCE, client=client, model="m", **options)
            assert "".join(token.token for token in completion.token_log_probs) == completion.message


async def test_alternatives_are_there_exactly_when_they_were_asked_for(server):
    completion = await generate_text_completion(FRANCE, log_probs=True)
    assert completion.token_log_probs
    assert completion.full_token_log_probs is None


@pytest.mark.parametrize(
    ("told", "printed"),
    [
        ({"content": [{"token": "a", "logprob": None}, {"token": "b", "logprob": -0.5}]}, "a[nan]b[0.6065]"),
        ({"content": [{"token": "a"}, {"token": "b", "logprob": 1e-6}]}, "a[nan]b[1.0000]"),
        (
            {"content": [{"token": "a", "logprob": 1000}, {"token": "b", "logprob": -9999}]},
            "a[1.0000]b[0.0000]",
        ),
        ({"tokens": ["a", "b"], "token_logprobs": [None, -0.5]}, "a[nan]b[0.6065]"),
        ({"tokens": ["a", "b"]}, "a[nan]b[nan]"),
        (
            {"content": [{"token": "\x1b", "logprob": 0}, {"token": "\ud83d", "logprob": 0}]},
            "\\x1b[1.0000]\\ud83d[1.0000]",
        ),
    ],
)
def test_what_a_server_tells_oddly_of_its_tokens_loses_no_answer(answering, told, printed):
    message = {"role": "assistant", "content": "ab"}
    choice = {"index": 0, "message": message, "logprobs": told, "finish_reason": "stop"}
    client = answering({"choices": [choice]})
    completion = generate_text_completion_sync(FRANCE, client=client, cache=MemoryStore(), log_probs=True)
    assert completion.message == "ab"
    assert completion.to_pretty_log_probs_string(show_probabilities=True) == printed
    assert len(cachepipe.to_dataframe([completion])) == 1


# Many.


async def test_results_come_in_input_order_and_no_more_than_asked_are_under_way(server):
    server.settings = MockSettings(seed=1, paused=True)
    prompts = [f"Question {place}?" for place in range(9)]
    asked = asyncio.ensure_future(generate_text_completions(prompts, n_parallel=3, show_progress=False))
    await asyncio.to_thread(server.wait_until, lambda stats: stats.in_flight == 3)
    server.settings = MockSettings(seed=1)
    completions = await asked
    assert [completion.conversation.messages[0].content for completion in completions] == prompts
    assert server.stats.max_in_flight == 3


async def test_equal_prompts_are_independent_samples_and_a_rerun_gets_each_again(server):
    prompts = ["Cats?", "Dogs?", "Cats?", "Cats?"]
    first = await generate_text_completions(prompts, show_progress=False)
    with cachepipe.run():
        again = await generate_text_completions(prompts, n_parallel=1, show_progress=False)
    assert sorted(first[place].index for place in (0, 2, 3)) == [0, 1, 2]
    assert texts(again) == texts(first)
    assert all(completion.cached for completion in again)
    assert server.stats.samples_generated == 4


async def test_one_that_fails_loses_no_others(server):
    server.settings = MockSettings(seed=1, script=(None, 400, None))
    prompts = ["One?", "Two?", "Three?"]
    with pytest.raises(CompletionsFailed, match="1 of 3 completions failed") as caught:
        await generate_text_completions(prompts, n_parallel=1, show_progress=False)
    first, error, third = caught.value.results
    assert isinstance(error, openai.BadRequestError)
    assert caught.value.exceptions == (error,)
    with cachepipe.run():
        again = await generate_text_completions(prompts, n_parallel=1, show_progress=False)
    assert (again[0].message, again[2].message) == (first.message, third.message)
    assert [completion.cached for completion in again] == [True, False, True]


async def test_errors_are_returned_in_their_places_when_that_is_asked_for(server):
    server.settings = MockSettings(seed=1, script=(400,))
    results = await generate_text_completions(
        ["One?", "Two?"], n_parallel=1, show_progress=False, return_exceptions=True
    )
    assert [type(result) for result in results] == [openai.BadRequestError, TextCompletion]


async def test_a_group_of_failures_can_be_handled_by_kind(server):
    server.settings = MockSettings(seed=1, script=(400, 404))
    told = []
    try:
        await generate_text_completions(["One?", "Two?"], n_parallel=1, show_progress=False)
    except* openai.NotFoundError as group:
        told.append(group.exceptions)
    except* openai.BadRequestError as group:
        told.append(group.exceptions)
    assert [len(errors) for errors in told] == [1, 1]


async def test_no_prompts_give_no_completions(server):
    assert await generate_text_completions([]) == []
    assert server.stats.requests == 0


async def test_conversations_are_completed_and_left_as_they_are(server):
    conversation = Conversation([Message("system", "Be brief."), Message("user", FRANCE)])
    one = await generate_text_completion_for_conversation(conversation)
    two = await generate_text_completions_for_conversations([conversation, conversation], show_progress=False)
    assert len(conversation) == 2
    conversation.add_message("assistant:Paris.")
    assert len(one.conversation) == 2
    assert sorted([one.index, two[0].index, two[1].index]) == [0, 1, 2]
    assert one.to_pretty_string().count("──") > 3


# Synchronous twins.


async def test_the_synchronous_twins_work_in_a_thread_whose_loop_runs(server):
    """As in a notebook."""
    conversation = Conversation([Message("user", FRANCE)])
    completions = [
        generate_text_completion_sync(FRANCE),
        generate_text_completion_for_conversation_sync(conversation),
        *generate_text_completions_sync([FRANCE] * 2, show_progress=False),
        *generate_text_completions_for_conversations_sync([conversation], show_progress=False),
    ]
    assert sorted(completion.index for completion in completions) == [0, 1, 2, 3, 4]


def test_the_synchronous_twins_work_in_many_threads(server):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(generate_text_completion_sync(FRANCE).index))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))


async def test_waiting_on_the_loop_that_is_waited_for_is_refused():
    async def wait():
        in_portal(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="await the asynchronous method"):
        await on_portal(wait())


# Clients.


async def test_any_client_will_do(server):
    """C10: what one has asked, all have."""
    store = MemoryStore()
    shared = {"base_url": server.base_url, "api_key": "made-up"}
    async with AsyncOpenAI(cache=store, **shared) as cached:
        first = await generate_text_completion(FRANCE, client=cached, namespace="a")
    with OpenAI(cache=store, **shared) as cached:
        second = await generate_text_completion(FRANCE, client=cached, namespace="b")
        third = generate_text_completion_sync(FRANCE, client=cached, namespace="c")
    async with openai.AsyncOpenAI(**shared) as plain:
        fourth = await generate_text_completion(FRANCE, client=plain, cache=store, namespace="d")
        fifth = await generate_text_completion(FRANCE, client=plain, cache=store, namespace="d")
    with openai.OpenAI(**shared) as plain:
        sixth = generate_text_completion_sync(FRANCE, client=plain, cache=store, namespace="e")
    same = [first, second, third, fourth, sixth]
    assert {completion.message for completion in same} == {first.message}
    assert [completion.index for completion in same] == [0] * 5
    assert fifth.index == 1
    assert server.stats.samples_generated == 2


async def test_an_unknown_client_is_used_as_it_is(server):
    """One of another library, say; it has the cache that it has."""

    class Other:
        def __init__(self, client):
            self.chat = client.chat

    async with AsyncOpenAI(base_url=server.base_url, api_key="x", cache=MemoryStore()) as client:
        other = Other(client)
        completion = await generate_text_completion(FRANCE, client=other, namespace="a", log_probs=True)
        assert (completion.cached, completion.namespace) == (False, "a")
        assert completion.token_log_probs
        for options in ({"cache": MemoryStore()}, {"repeat": "same"}):
            with pytest.raises(TypeError, match="the client has its own cache"):
                await generate_text_completion(FRANCE, client=other, **options)


async def test_a_client_that_was_wrapped_is_let_go(server):
    plain = openai.AsyncOpenAI(base_url=server.base_url, api_key="made-up")
    await generate_text_completion(FRANCE, client=plain, cache=MemoryStore())
    await plain.close()
    gone = weakref.ref(plain)
    del plain
    gc.collect()
    assert gone() is None


async def test_a_service_gives_one_client_for_each_cache(server, tmp_path):
    service = Service(server.base_url, api_key="made-up")
    for _ in range(2):
        await generate_text_completion(FRANCE, service=service, cache=tmp_path)
    [made] = service._lent.clients.values()
    assert (made._cachepipe.mode, made._cachepipe.namespace) == ("read-write", None)
    assert Path(made._cachepipe.shared_store.store.folder) == tmp_path
    assert server.stats.requests == 2


async def test_services_that_come_and_go_are_one_run(server, until):
    """C1: equal questions of one run get samples of their own, whoever asks them."""
    store = MemoryStore()
    for _ in range(2):
        await generate_text_completion(FRANCE, service=Services.OpenAI(), cache=store)
        await Session(service=Services.OpenAI(), cache=store, llmconfig={"model": "m"}).initiate(FRANCE)
        gc.collect()
    assert server.stats.samples_generated == 4
    gone = weakref.ref(store)
    await close_clients()
    del store
    await until(lambda: gc.collect() >= 0 and gone() is None)  # a thread may hold it while it sums


async def test_clients_that_come_and_go_are_one_run(server, tmp_path):
    store = MemoryStore()
    for cache in (tmp_path / "folder", store):
        for _ in range(2):
            with openai.OpenAI() as client:
                await generate_text_completion(FRANCE, client=client, cache=cache)
            del client
            gc.collect()
            await generate_text_completion("The next", cache=cache)
    assert server.stats.samples_generated == 8


async def test_a_service_limits_what_is_asked_and_names_the_model(server):
    service = Service(
        server.base_url, api_key="made-up", model="ngram-1", max_concurrency=2, max_requests=None
    )
    prompts = [f"Question {place}?" for place in range(6)]
    server.settings = MockSettings(seed=1, latency=0.01)
    first = await generate_text_completions(prompts, service=service, n_parallel=6, show_progress=False)
    assert server.stats.max_in_flight <= 2
    assert {completion.model for completion in first} == {"ngram-1"}
    with cachepipe.run():
        again = generate_text_completions_sync(prompts, service=service, show_progress=False)
    assert texts(again) == texts(first)
    assert server.stats.requests == 6


async def test_a_service_of_another_kind_is_used_in_its_own_way_or_refused(server):
    service = Service(server.base_url, api_key="x", sdk="together")
    completion = await generate_text_completion(FRANCE, service=service, model="m", top_log_probs=2)
    assert len(completion.token_log_probs) > 1
    with pytest.raises(TypeError, match=r"a service of chat completions, with chat\.completions; got"):
        await generate_text_completion(FRANCE, service=Service(server.base_url, api_key="x", sdk="anthropic"))


@pytest.mark.parametrize("name", ["Gemini", "Anthropic", "HuggingFace", "Groq", "Mistral"])
async def test_every_known_provider_answers_completions_and_sessions(server, name):
    url = server.url if name == "Gemini" else server.base_url
    service = getattr(Services, name)(base_url=url, api_key="any", model="m")
    completion = await generate_text_completion(FRANCE, service=service, cache=MemoryStore())
    assert completion.message
    session = Session(service=service, cache=MemoryStore())
    assert await session.initiate(FRANCE)
    assert service.stats().calls == 2
    assert server.stats.by_path == {"/v1/chat/completions": {200: 2}}


@pytest.mark.parametrize("kind", ["HuggingFace", "local"])
async def test_every_client_with_chat_completions_may_be_given(server, kind):
    door = DOORS["HFTransformers" if kind == "local" else kind]
    client, sync = (
        door.made(f"{server.url}/v1", asynchronous=asynchronous, cache=MemoryStore())
        for asynchronous in (True, False)
    )
    model = "counting" if kind == "local" else "m"
    completion = await generate_text_completion(FRANCE, client=client, model=model)
    assert completion.message
    other = await asyncio.to_thread(generate_text_completion_sync, FRANCE, client=sync, model=model)
    assert other.message
    await client.close()
    await asyncio.to_thread(sync.close)
    with pytest.raises(TypeError, match=r"give service=, such as Services.Gemini\(\)"):
        await generate_text_completion(FRANCE, client=object())


async def test_an_asynchronous_client_is_not_for_functions_that_wait(server):
    async with AsyncOpenAI(base_url=server.base_url, api_key="x", cache=MemoryStore()) as client:
        with pytest.raises(TypeError, match="await the asynchronous function"):
            generate_text_completion_sync(FRANCE, client=client)


# Where it is asked.


@pytest.mark.parametrize(
    ("environment", "key", "url"),
    [
        ({"OPENAI_API_KEY": "k"}, "k", None),
        ({"OPENAI_API_KEY": "k", "OLLAMA_HOST": "o"}, "k", None),
        ({"OLLAMA_HOST": "localhost"}, "ollama", "http://localhost:11434/v1"),
        ({"OLLAMA_HOST": "localhost:1"}, "ollama", "http://localhost:1/v1"),
        ({"OLLAMA_HOST": "https://o.example/"}, "ollama", "https://o.example/v1"),
        ({"OLLAMA_HOST": "o.example", "AUTH": "me:secret"}, "me:secret", "https://me:secret@o.example/v1"),
    ],
)
def test_what_is_not_given_is_found(environment, key, url, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OLLAMA_HOST", "AUTH"):
        monkeypatch.delenv(name, raising=False)
    found = Access({}, Environment(environment))
    assert (found.api_key, found.base_url) == (key, url)
    assert "secret" not in repr(found)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (Access({}).api_key, Access({}).base_url) == (key, url)
    assert Access({"api_key": "own"}).api_key == "own"


async def test_namespaces_come_from_the_argument_then_the_block_then_the_environment(server, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_NAMESPACE", "outside")
    monkeypatch.setenv("CACHEPIPE_MODEL", "ngram-1")
    found = [await generate_text_completion(FRANCE)]
    with cachepipe.using(namespace="block", request_id="q7"):
        found.append(await generate_text_completion(FRANCE))
        found.append(await generate_text_completion(FRANCE, namespace=None, request_id="own"))
    assert [completion.namespace for completion in found] == ["outside", "block", None]
    assert [completion.request_id for completion in found] == [None, "q7", "own"]
    assert {completion.model for completion in found} == {"ngram-1"}


async def test_a_key_is_taken_without_the_line_break_of_its_file(server, monkeypatch):
    """No header takes one, and the error of the HTTP library shows the key."""
    server.settings = MockSettings(seed=1, api_key="made-up")
    monkeypatch.setenv("OPENAI_API_KEY", "made-up\n")
    by_key = {"base_url": server.base_url, "api_key": " made-up\r\n"}
    for options in ({}, by_key, {"service": Services.OpenAI()}, {"service": Service(**by_key)}):
        assert (await generate_text_completion(FRANCE, **options)).message


async def test_the_environment_names_the_namespace_of_a_client_without_a_cache(server, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_NAMESPACE", "environment")
    with openai.OpenAI() as plain:
        completion = await generate_text_completion(FRANCE, client=plain)
    assert completion.namespace == "environment"
    with OpenAI(cache=MemoryStore(), namespace="own") as ours:
        completion = await generate_text_completion(FRANCE, client=ours)
    assert completion.namespace == "own"


async def test_no_credentials_are_stored(server, tmp_path):
    url = server.base_url.replace("://", "://me:hidden-secret@")
    await generate_text_completion(FRANCE, base_url=url, api_key="hidden-secret-key")
    await close_clients()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert b"capital" in stored
    assert b"hidden-secret" not in stored


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"prompts": "one string"}, TypeError, "list of strings"),
        ({"prompts": ["a", 3]}, TypeError, "a prompt is a string; got 3"),
        ({"n_parallel": 0}, ValueError, "n_parallel= is a whole number"),
        ({"n": 3}, TypeError, "n= is not taken here"),
        ({"top_log_probs": 21}, ValueError, "from 0 to 20; got 21"),
        ({"top_log_probs": 2, "log_probs": False}, ValueError, "needs log_probs=True"),
        ({"model": 3}, TypeError, "name of a model"),
        ({"mode": "fast"}, ValueError, "mode is one of"),
        ({"repeat": "never"}, ValueError, "repeat is"),
        ({"response_format": "json"}, TypeError, "pydantic model's class"),
        ({"tools": ["hammer"]}, TypeError, "a tool is a function"),
        ({"client": "x"}, TypeError, "client= takes a client"),
        ({"cache": ""}, StoreError, "a cache is a folder"),
        ({"cache": "mysql://host"}, StoreError, "folder or the URL"),
        (
            {"service": Services.Ollama(), "base_url": "http://x"},
            TypeError,
            "give service= or base_url=, not both",
        ),
        ({"service": "https://x"}, TypeError, "service= takes a Service"),
        ({"namespace": 5}, TypeError, "namespace must be a string"),
        ({"request_id": 5}, TypeError, "request_id must be a string"),
        ({"extra_body": {"n": 3}}, TypeError, "n= is not taken here"),
        ({"extra_body": 5}, TypeError, "extra_body= is a mapping"),
    ],
)
async def test_wrong_options_are_refused_before_anything_is_asked(server, options, error, told):
    with pytest.raises(error, match=told):
        await generate_text_completions(**{"prompts": ["a"], "show_progress": False, **options})
    assert server.stats.requests == 0


def test_what_is_wrong_for_all_is_told_once(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(openai.OpenAIError, match="api_key"):
        generate_text_completions_sync(["One?", "Two?"], show_progress=False)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"choices": []}, "without a choice that has a message; expected one$"),
        ({"error": {"message": "no money"}}, "It says: .*no money"),
        ({"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}, "without a choice"),
        ("<html>Welcome!</html>", "Welcome!.*does base_url end"),
        ({"choices": [{"message": {"content": {"x": 1}}}]}, "a text or a list of parts; got {'x': 1}"),
        ({"choices": [{"message": {"content": 5}}]}, "a text or a list of parts; got 5"),
    ],
    ids=["none", "error", "no message", "a website", "a mapping", "a number"],
)
def test_what_is_no_answer_says_what_it_is(answering, said, told):
    with pytest.raises(BadAnswer, match=told):
        generate_text_completion_sync(FRANCE, client=answering(said), cache=MemoryStore())


def test_tokens_that_a_provider_does_not_count_are_not_known_to_be_none(answering):
    choice = {"index": 0, "message": {"role": "assistant", "content": "Paris"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    client = answering(
        {"choices": [choice]},
        {"choices": [choice], "usage": usage},
        {"choices": [choice], "usage": {"prompt_tokens": "many"}},
    )
    uncounted, counted, odd = (
        generate_text_completion_sync(FRANCE, client=client, cache=MemoryStore()) for _ in range(3)
    )
    assert (uncounted.usage, uncounted.cost) == (odd.usage, odd.cost) == ({}, None)
    assert counted.usage.items() >= usage.items()


def test_tokens_that_are_parts_of_a_character_are_printed_as_the_character(answering):
    """Byte tokens, as a provider tells them: with an escaped name, and their bytes."""
    first, last = "\U0001f642".encode()[:3], "\U0001f642".encode()[3:]
    told = [
        {"token": "Hi ", "bytes": list(b"Hi "), "logprob": 0.0, "top_logprobs": []},
        {"token": "\\xf0\\x9f\\x99", "bytes": list(first), "logprob": math.log(0.95), "top_logprobs": []},
        {"token": "\\x82", "bytes": list(last), "logprob": math.log(0.2), "top_logprobs": []},
        {"token": "\\xf0", "bytes": list(first[:1]), "logprob": math.log(0.5), "top_logprobs": []},
    ]
    message = {"role": "assistant", "content": "Hi \U0001f642"}
    choice = {"index": 0, "message": message, "logprobs": {"content": told}, "finish_reason": "length"}
    client = answering({"choices": [choice]})
    completion = generate_text_completion_sync(FRANCE, client=client, cache=MemoryStore(), log_probs=True)
    assert [token.raw for token in completion.token_log_probs] == [None, first, last, first[:1]]
    assert completion.to_pretty_log_probs_string() == "Hi \U0001f642\\xf0"
    plain = completion.to_pretty_log_probs_string(show_probabilities=True)
    assert plain == "Hi [1.0000]\U0001f642[0.9500][0.2000]\\xf0[0.5000]"
    assert "\x1b[91m\U0001f642" in completion.to_pretty_log_probs_string(
        color=True
    )  # as its least probable part
    assert from_jsonl(to_jsonl([completion]))[0].token_log_probs == completion.token_log_probs


def test_an_answer_may_come_in_parts(answering):
    parts = [
        "odd",
        {"type": "thinking", "thinking": []},
        {"type": "text", "text": "Ro"},
        {"type": "text", "text": "me"},
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    client = answering({"choices": [choice]})
    assert generate_text_completion_sync(FRANCE, client=client, cache=MemoryStore()).message == "Rome"


async def test_a_call_that_its_client_cancels_has_failed(answering):
    """It is an error in its place, and not a result that is missing."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    client = answering(asyncio.CancelledError(), {"choices": [choice]}, kind=openai.AsyncOpenAI)
    options = {"client": client, "cache": MemoryStore(), "n_parallel": 1, "show_progress": False}
    failed, done = await generate_text_completions(["One?", "Two?"], return_exceptions=True, **options)
    assert isinstance(failed, Exception)
    assert done.message == "Yes."


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open is read from /proc")
async def test_who_asks_with_keys_of_their_own_share_the_files_of_a_cache(server, tmp_path):
    """A service that asks with the key of each of its users runs out of no descriptors."""

    def opened():
        files = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                files.append(str(link.readlink()))
        return sum(file.startswith(str(tmp_path / "cache")) for file in files)

    async def ask(number):
        await generate_text_completion(FRANCE, api_key=f"key {number}")
        async with openai.AsyncOpenAI(api_key=f"key {number}") as client:
            await generate_text_completion(FRANCE, client=client)

    await ask(0)
    before = opened()
    assert before > 0
    for number in range(1, 4):
        await ask(number)
    assert opened() < before + before // 2  # a thread that reads for the first time opens some more
    assert server.stats.samples_generated == 8  # one run: each is a draw of its own
    await close_clients()
    assert opened() == 0


@pytest.mark.parametrize("sdk", ["openai", "together"])
async def test_an_option_that_the_sdk_does_not_have_is_refused_once(server, sdk):
    client = getattr(importlib.import_module(sdk), "OpenAI" if sdk == "openai" else "Together")(api_key="x")
    for given in ({}, {"client": client}):
        for complete, asked in (
            (generate_text_completions, [FRANCE] * 3),
            (generate_text_completion, FRANCE),
        ):
            with pytest.raises(TypeError, match=r"no temprature=.* Did you mean temperature=\?.*extra_body="):
                await complete(asked, temprature=1, **given)


async def test_half_a_character_is_refused_with_what_to_do(server):
    for text in ("\ud83d", f"{'x' * 5000} \udc00 {'x' * 5000}"):
        with pytest.raises(ValueError, match=r"half of a character.* mend it") as caught:
            await generate_text_completion(text)
        assert len(str(caught.value)) < 300
        with pytest.raises(ValueError, match="half of a character"):
            await Session(text, service=Services.OpenAI(), cache=MemoryStore()).initiate("x")
        mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert (await generate_text_completion(mended)).message
    with pytest.raises(UnicodeEncodeError, match="ascii"):  # that is another matter
        await generate_text_completion("x", extra_headers={"x-name": "\u00fc"})
    assert server.stats.requests == 2


async def test_what_cannot_be_completed_is_refused(server):
    with pytest.raises(ValueError, match="no messages"):
        await generate_text_completion_for_conversation(Conversation())
    assert server.stats.requests == 0


def test_help_describes_each_option():
    """So nobody looks for them in another file."""
    for shown, kind in (
        (generate_text_completion, CompletionOptions),
        (generate_text_completion_for_conversation_sync, CompletionOptions),
        (generate_text_completions, ManyOptions),
        (generate_text_completions_for_conversations_sync, ManyOptions),
        (cachepipe.Chat, CompletionOptions),
        (Session, AccessOptions),
        (Service, LimitOptions),
    ):
        text = pydoc.render_doc(shown)
        assert [name for name in kind.__annotations__ if f"    {name}: " not in text] == []


# Structures and tools.


async def test_an_answer_is_made_into_a_model_of_pydantics(server):
    completion = await generate_text_completion("Who is it?", response_format=Person)
    assert type(completion.parsed) is Person
    assert Person.model_validate_json(completion.message) == completion.parsed


async def test_a_structured_completion_has_the_key_of_the_sdks_own_parse(server):
    """C10."""
    async with AsyncOpenAI(base_url=server.base_url, api_key="x", cache=MemoryStore()) as client:
        parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
        answer = await parse(
            model="m", messages=[{"role": "user", "content": "Who?"}], response_format=Person
        )
        completion = await generate_text_completion(
            "Who?", model="m", response_format=Person, client=client, namespace="b"
        )
    assert completion.cached
    assert completion.parsed == answer.choices[0].message.parsed


async def test_an_answer_that_does_not_fit_is_kept_and_the_error_says_where(server):
    class Never(BaseModel):
        age: int = Field(gt=10**9)

    with pytest.raises(BadAnswer, match=r"the answer is not a valid Never.*sample 0 of key k2-"):
        await generate_text_completion("Who?", response_format=Never)


async def test_calls_of_tools_are_told(server):
    def weather(city: str) -> str:
        """Return the weather."""
        return city

    completion = await generate_text_completion("Rain?", tools=[weather], tool_choice="required")
    [call] = completion.tool_calls
    assert call["function"]["name"] == "weather"
    assert completion.message == ""
    assert completion.to_message().tool_calls == [call]


async def test_the_default_model_is_said_once_when_it_is_asked(server, caplog, monkeypatch):
    access.say_default.cache_clear()
    monkeypatch.delenv("CACHEPIPE_MODEL", raising=False)
    await generate_text_completion("Hi?", model="m")
    assert caplog.messages == []
    await generate_text_completion("Hi?")
    await generate_text_completion("Ho?")
    [said] = caplog.messages
    assert said == "no model is named, so gpt-4o-mini is asked; model= or CACHEPIPE_MODEL names another"


# The end of the process.


def test_a_script_leaves_nothing_open(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_MODEL", "m")
    code = (
        "import asyncio, cachepipe\n"
        "print(asyncio.run(cachepipe.generate_text_completion('Hi?')).index)\n"
        "print(cachepipe.generate_text_completion_sync('Hi?').index)\n"
        "stream = iter(cachepipe.Chat(messages=['user:Tell me.']).stream())\n"
        "next(stream)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=110,  # the imports alone take a loaded machine half a minute
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("0\n1\n", "", 0)
    replayed = cachepipe.Chat(messages=["user:Tell me."], mode="replay").complete()
    assert replayed  # the stream that was left was read on and stored
