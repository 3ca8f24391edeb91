"""What `CacheMiss` says: which question the cache holds instead, and what differs."""

import asyncio
import pickle
import sqlite3
import threading

import pytest

import cachepipe
from cachepipe import CacheMiss, OnlineAPI, Request, wire
from cachepipe.contract.keys import provider_question
from cachepipe.stores import misses
from cachepipe.stores.misses import Similar
from cachepipe.testing import ScriptedModel

pytestmark = pytest.mark.anyio


async def stored(store, *requests, scope="https://old/v1/chat/completions"):
    async with OnlineAPI(ScriptedModel(), store, scope=scope) as pipeline:
        for request in requests:
            await pipeline.request(request)


async def missed(store, request, scope="https://old/v1/chat/completions", before=()):
    async with OnlineAPI(ScriptedModel(), store, scope=scope, mode="replay") as replay:
        for other in before:
            await replay.request(other)
        with pytest.raises(CacheMiss) as caught:
            await replay.request(request)
    return caught.value


async def test_the_same_question_under_another_scope_is_named(store):
    await stored(store, Request("p", namespace="a"))
    error = await missed(store, Request("p", namespace="a"), scope="https://new/v1/chat/completions")
    assert "under another scope: 'https://old/v1/chat/completions'" in error.why
    assert error.nearest == next(store.keys()).key
    assert error.why in str(error)


async def test_a_text_that_differs_is_shown_from_where_it_parts(store):
    await stored(store, Request("p"))
    await stored(store, Request("q" * 500))
    error = await missed(store, Request("q" * 499 + "r"))
    assert "differs in prompt (asked: '…qqqqqqqqqqqqr', stored: '…qqqqqqqqqqqqq')" in error.why


async def test_more_samples_than_are_stored_are_told_as_such(store):
    await stored(store, Request("p", n=2, namespace="a"))
    error = await missed(store, Request("p", n=5, namespace="b"))
    assert error.why == "the cache has 2 samples of this question; the request asks for 5"
    assert error.nearest is None


async def test_a_draw_that_its_namespace_never_made_is_told_as_such(store):
    await stored(store, Request("p", namespace="a", request_id="r1"))
    error = await missed(store, Request("p", namespace="a", request_id="r2"))
    assert "the cache has 1 sample of this question" in error.why
    assert "other requests of this namespace have drawn" in error.why
    assert "request_id 'r2'" in error.why


async def test_a_request_that_is_repeated_more_often_than_before_is_told_as_such(store):
    await stored(store, Request("p"))
    error = await missed(store, Request("p"), before=[Request("p")])
    assert "without a request_id for the 2nd time" in error.why


async def test_a_sample_that_is_not_finished_is_told_as_such(store):
    model = ScriptedModel(hold=True)
    writer = OnlineAPI(model, store)
    task = asyncio.create_task(writer.request(Request("p")))
    await model.begun(1)
    with cachepipe.run():
        error = await missed(store, Request("p"), scope=None)
    assert "0 samples of this question and 1 that another process generates" in error.why
    model.open()
    await task
    await writer.close()


async def test_nothing_similar_is_told_as_such(store):
    assert (await missed(store, Request("p"))).why == "the cache holds no similar question"
    await stored(store, Request("q"))
    assert (await missed(store, Request("p"))).why == "the cache holds no similar question"


async def test_the_nearest_of_several_questions_is_named(store):
    text = "Which of the two is the better pet for a family with a small garden, a cat or a dog"
    await stored(
        store, Request(f"{text}, in Norway"), Request(f"{text}?"), Request(f"{text} or none of them")
    )
    error = await missed(store, Request(f"{text}!"))
    assert "stored: '…cat or a dog?'" in error.why


async def test_questions_that_are_stored_after_a_miss_are_found_too(store):
    await missed(store, Request("p"))
    await stored(store, Request("P"))
    assert "differs in prompt" in (await missed(store, Request("p"))).why


async def test_many_misses_read_each_stored_question_once(store, monkeypatch):
    await stored(store, *(Request(f"question {number}") for number in range(30)))
    read = []
    monkeypatch.setattr(misses, "traits", lambda document: read.append(document) or [hash(document)])
    for number in range(20):
        await missed(store, Request(f"another {number}"))
    assert len(read) == 30 + 20, "and each question that was missed"


def test_as_many_questions_are_looked_through_as_the_bounds_say(monkeypatch):
    monkeypatch.setattr(misses, "_QUESTIONS", 10)
    taken = []

    def rows(after, longest):
        for number in range(1000, after, -1):
            taken.append(number)
            yield number, "s", b'{"body":{"prompt":"p%d"}}' % number

    similar = Similar()
    similar.read(rows)
    similar.read(rows)
    assert taken == list(range(1000, 989, -1))
    assert similar.ids(provider_question("s", {"body": {"prompt": "p995"}})) == [995]
    assert similar.ids(provider_question("s", {"body": {"prompt": "p5"}})) == []


async def test_threads_that_miss_at_once_get_their_reasons(store):
    await stored(store, Request("p"))
    question = provider_question("elsewhere", {"fields": {"prompt": "P"}})
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.similar(question))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {near.document for near in found} == {b'{"fields":{"prompt":"p"}}'}


async def test_a_miss_stands_when_the_search_for_its_reason_fails(store, monkeypatch):
    def broken(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(type(store), "similar", broken)
    error = await missed(store, Request("p"))
    assert (error.why, error.nearest) == ("", None)
    assert f"no complete answer for key {error.key} in namespace None. The request" in str(error)


def test_a_miss_can_be_pickled():
    error = CacheMiss("k2-x", "a", None, "why", "k2-y")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.nearest) == (str(error), "k2-y")


# The scope that a user sets.


@pytest.mark.parametrize(
    ("scope", "api", "expected"),
    [
        (None, wire.CHAT, "https://here/v1/chat/completions"),
        ("https://old/v1/chat/completions", wire.CHAT, "https://old/v1/chat/completions"),
        ("https://old/v1", wire.CHAT, "https://old/v1/chat/completions"),
        ("https://Me:secret@OLD:443/v1/", wire.CHAT, "https://old/v1/chat/completions"),
        ("https://old/v1/chat/completions", wire.EMBEDDINGS, "https://old/v1/embeddings"),
        ("https://old/v1/completions", wire.CHAT, "https://old/v1/chat/completions"),
        ("https://old/v1/embeddings?v=1", wire.RESPONSES, "https://old/v1/responses?v=1"),
        ("https://old", wire.MESSAGES, "https://old/v1/messages"),
        ("https://old/v1", wire.MESSAGES, "https://old/v1/messages"),
        ("https://old/v1/messages", wire.CHAT, "https://old/v1/chat/completions"),
    ],
)
def test_c9_a_scope_that_is_a_url_stands_for_the_endpoint_below_it(scope, api, expected):
    endings = {wire.CHAT: "chat/completions", wire.EMBEDDINGS: "embeddings", wire.RESPONSES: "responses"}
    here = f"https://here/v1/{endings.get(api, 'messages')}"
    assert wire.named_scope(scope, here, api) == (expected, None)


def test_c9_a_scope_that_is_a_name_keeps_the_apis_apart():
    for api, named in ((wire.CHAT, None), (wire.EMBEDDINGS, wire.EMBEDDINGS)):  # chat is never named
        assert wire.named_scope("mine", "https://here/v1/x", api) == ("mine", named)
