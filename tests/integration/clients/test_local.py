"""Clients of local models, on one that counts batches; `frameworks/test_transformers.py` has a real one."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import cachepipe
from cachepipe import CacheMiss, MemoryStore, Response, wire
from cachepipe.contract.keys import provider_question
from cachepipe.models.local import AsyncLocalClient, LocalClient
from cachepipe.models.samples import ProviderSamples, fields_of, listener_of
from cachepipe.providers.info import info

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hi"}]


class Counting(ProviderSamples):
    """Says a number that no other sample has."""

    cache_scope = name = "counting"

    def __init__(self):
        self.batches = []
        self.samples = 0

    def question(self, request, scope=None):
        body = {"prompt": request.prompt, **fields_of(request)}
        if "bad" in body:
            raise wire.BadRequest("bad: no such setting")
        return provider_question(scope or self.cache_scope, {"body": body})

    def present(self, sample):
        return sample

    async def batch_request(self, batch):
        self.batches.append([request.n for request in batch])
        return [Response([self._sample(request, place) for place in range(request.n)]) for request in batch]

    def _sample(self, request, place):
        self.samples += 1
        text = f"This is {self.samples}."
        chat = isinstance(request.prompt, list) and isinstance(request.prompt[0], dict)
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        sample = {
            "id": "local-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": "counting",
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
        }
        return wire.marked(sample) if place else sample


@pytest.fixture
def model():
    return Counting()


@pytest.fixture(params=[LocalClient, AsyncLocalClient], ids=["sync", "async"])
async def client(request, model):
    made = request.param(model, MemoryStore(), batch_size=4)
    yield made
    await settled(made.close())


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def listed(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


def texts(answer):
    return [
        choice.message.content if hasattr(choice, "message") else choice.text for choice in answer.choices
    ]


async def test_a_chat_is_answered_as_by_openais_sdk(client, model):
    chat = await settled(client.chat.completions.create(messages=HELLO, n=2, max_new_tokens=5))
    assert type(chat) is ChatCompletion
    assert texts(chat) == ["This is 1.", "This is 2."]
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (4, 6)
    assert info(chat).cached == (False, False)
    assert info(chat).billed["total_tokens"] == 10
    again = await settled(
        client.in_namespace("b").chat.completions.create(
            messages=HELLO, n=2, max_new_tokens=5, model="counting"
        )
    )
    assert again == chat
    assert info(again).cached == (True, True)
    other = await settled(client.chat.completions.create(messages=HELLO, max_new_tokens=6, temperature=None))
    assert texts(other) == ["This is 3."]
    assert model.batches == [[2], [1]]


async def test_streamed_and_unstreamed_share_samples(client, model):
    stream = await settled(
        client.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert info(stream).cached == (False,)
    chunks = await listed(stream)
    assert {type(chunk) for chunk in chunks} == {ChatCompletionChunk}
    said = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert said == ["This ", "is ", "1."]
    assert chunks[-1].usage.total_tokens == 7
    whole = await settled(client.in_namespace("b").chat.completions.create(messages=HELLO))
    assert texts(whole) == ["This is 1."]
    streams = await settled(client.in_namespace("b").completions.create(prompt="x", stream=True, n=2))
    parts = [choice for part in await listed(streams) for choice in part.choices]
    assert {choice.index for choice in parts} == {0, 1}
    assert model.samples == 3


class Telling(Counting):
    """Tells its samples word by word, and waits after each until a reader has it."""

    def __init__(self):
        super().__init__()
        self.read = threading.Semaphore(0)
        self.fails = False

    async def batch_request(self, batch):
        return await asyncio.to_thread(asyncio.run, self._told(batch))

    async def _told(self, batch):
        responses = await super().batch_request(batch)
        for request, response in zip(batch, responses, strict=True):
            listener = listener_of(request)
            head = {name: response.data[0][name] for name in ("id", "object", "created", "model")}
            if listener is not None and listener.begin(head):
                for place in range(len(response.data)):
                    listener.hear(place, "This ")
                    assert self.read.acquire(timeout=20)
                    if self.fails:
                        raise MemoryError("no room")
                    listener.hear(place, "is ")
        return responses


@pytest.fixture
async def telling(client):
    model = Telling()
    made = type(client)(model, MemoryStore(), batch_size=4)
    yield made
    await settled(made.close())


async def first_of(stream, parts=1):
    """The first parts of a stream; the model goes on when they have been read."""
    return [await anext(stream) if hasattr(stream, "__anext__") else next(stream) for _ in range(parts)]


async def test_words_come_while_they_are_generated_and_the_end_when_the_sample_is_stored(telling):
    stream = await settled(telling.generate("x", stream=True))
    assert await first_of(stream) == ["This "]
    assert telling.pipeline.stats().in_flight == 1
    telling.model.read.release()
    assert await listed(stream) == ["is ", "1."]
    assert telling.pipeline.stats().in_flight == 0
    stream = await settled(
        telling.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    chunks = await first_of(stream, 2)
    assert not info(stream).complete
    telling.model.read.release()
    chunks += await listed(stream)
    assert info(stream).cached == (False,)
    again = await settled(
        telling.in_namespace("b").chat.completions.create(
            messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks == await listed(again)
    assert len(chunks) == 6  # the role, three words, the end and the usage


async def test_several_samples_are_told_by_their_places(telling):
    stream = await settled(telling.completions.create(prompt="x", stream=True, n=2))
    telling.model.read.release(2)
    parts = [choice for part in await listed(stream) for choice in part.choices]
    said = ["".join(part.text for part in parts if part.index == place) for place in (0, 1)]
    assert said == ["This is 1.", "This is 2."]
    assert texts(await settled(telling.in_namespace("b").completions.create(prompt="x", n=2))) == said


async def test_c7_a_reader_who_stops_has_had_its_draw(telling):
    stream = await settled(telling.generate("x", stream=True))
    await first_of(stream)
    closing = stream.aclose() if hasattr(stream, "aclose") else stream.close()
    await settled(closing)
    telling.model.read.release()
    assert await settled(telling.in_namespace("b").generate("x")) == "This is 1."


async def test_c8_a_failure_after_the_first_words_reaches_the_reader(telling):
    telling.model.fails = True
    stream = await settled(telling.generate("x", stream=True))
    await first_of(stream)
    telling.model.read.release()
    with pytest.raises(MemoryError, match="no room"):
        await listed(stream)
    telling.model.fails = False
    assert await settled(telling.generate("x")) == "This is 2."


async def test_equal_streams_in_flight_together_come_when_they_are_whole():
    model = Telling()
    async with AsyncLocalClient(model, MemoryStore(), batch_size=2, timeout=5) as client:
        streams = await asyncio.gather(*(client.generate("x", stream=True) for _ in range(2)))
        assert sorted(["".join(await listed(stream)) for stream in streams]) == ["This is 1.", "This is 2."]
        model.read.release(2)


async def test_c8_a_cancelled_reader_is_undone_and_its_retry_is_the_same_draw():
    model = Telling()
    async with AsyncLocalClient(model, MemoryStore(), namespace="a") as client:

        async def read():
            async for _ in await client.generate("x", stream=True):
                begun.set()

        begun = asyncio.Event()
        task = asyncio.ensure_future(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.read.release()
        first = await client.generate("x")
        with cachepipe.run():
            assert await client.generate("x") == first


async def test_text_is_generated_from_texts_tokens_and_messages(client, model):
    class Encoded(dict):
        pass

    class Array:
        def tolist(self):
            return [[1, 2]]

    one = await settled(client.generate("x"))
    assert one == "This is 1."
    assert await settled(client.in_namespace("b").generate("x", n=2)) == [one, "This is 2."]
    tokens = await settled(client.generate([1, 2]))
    for same in ((1, 2), [[1, 2]], Array(), Encoded(input_ids=Array())):
        with cachepipe.run():
            assert await settled(client.generate(same)) == tokens
    assert await listed(await settled(client.generate("x", stream=True))) == ["This ", "is ", "2."]
    completion = await settled(client.in_namespace("c").completions.create(prompt="x"))
    assert type(completion) is Completion
    assert texts(completion) == [one]
    chat = await settled(client.generate(HELLO))
    assert texts(await settled(client.in_namespace("c").chat.completions.create(messages=HELLO))) == [chat]
    assert model.samples == 4


async def test_calls_in_flight_share_batches(model):
    async with AsyncLocalClient(model, MemoryStore(), batch_size=4, timeout=5) as client:
        await asyncio.gather(*(client.generate(f"prompt {number}") for number in range(8)))
        assert model.batches == [[1] * 4, [1] * 4]
    with LocalClient(model, MemoryStore(), batch_size=3, timeout=5) as sync:
        threads = [threading.Thread(target=sync.generate, args=(f"thread {number}",)) for number in range(3)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert model.batches[2:] == [[1] * 3]


async def test_c1_c2_a_run_repeats_the_draws_of_the_one_before(client, model):
    first = [await settled(client.generate("x")) for _ in range(2)]
    assert len(set(first)) == 2
    with cachepipe.run():
        assert [await settled(client.generate("x")) for _ in range(2)] == first
        with cachepipe.using(namespace="b", request_id="r"):
            chat = await settled(client.completions.create(prompt="x"))
    assert (info(chat).namespace, info(chat).request_id) == ("b", "r")
    assert await settled(client.in_replicate(1).generate("x")) not in first
    assert model.samples == 3


async def test_a_replay_never_asks_the_model(client, model):
    first = await settled(client.generate("x"))
    replay = type(client)(model, client.pipeline.store, mode="replay")
    with cachepipe.run():
        assert await settled(replay.generate("x")) == first
        with pytest.raises(CacheMiss):
            await settled(replay.generate("x"))
    assert model.samples == 1
    await settled(replay.close())


async def test_bad_calls_are_refused_in_a_sentence(client, model):
    with pytest.raises(wire.BadRequest, match="bad: no such setting"):
        await settled(client.generate("x", bad=1))
    with pytest.raises(ValueError, match="this client's model is 'counting', not 'gpt-4'"):
        await settled(client.chat.completions.create(messages=HELLO, model="gpt-4"))
    with pytest.raises(ValueError, match="leave out n"):
        await settled(client.generate("x", n=2, stream=True))
    with pytest.raises(ValueError, match=r"for messages use chat\.completions"):
        await settled(client.completions.create(prompt=HELLO))
    with pytest.raises(TypeError, match=r"namespace: set these with cachepipe\.using"):
        await settled(client.generate("x", namespace="b"))
    assert model.samples == 0


def test_a_synchronous_client_refuses_an_order(model):
    with pytest.raises(ValueError, match="cannot hand over its answers in order"):
        LocalClient(model, MemoryStore(), ordered=True)
