"""Programs written for CacheSaver, with the import root changed: its clients, keywords and pipelines.

The programs are of the kinds in its tutorial. Each makes a new client to show a restart.
"""

from __future__ import annotations

import asyncio
import inspect
import threading

import anthropic
import openai
import pytest

from cachepipe.compat.cachesaver.models.anthropic import Anthropic, AsyncAnthropic
from cachepipe.compat.cachesaver.models.gemini import AsyncGemini, Gemini
from cachepipe.compat.cachesaver.models.openai import AsyncOpenAI, OpenAI
from cachepipe.compat.cachesaver.models.together import AsyncTogether, Together
from cachepipe.compat.cachesaver.pipelines import LocalAPI, OnlineAPI, OrderedLocalAPI
from cachepipe.compat.cachesaver.typedefs import Batch, Metadata, Request, Response
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio

MODEL = "ngram-1"


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=3)) as running:
        yield running


@pytest.fixture
def given(server, tmp_path):
    """The parameters of a client on the mock server."""
    return {"cachedir": str(tmp_path / "cache"), "api_key": "none", "base_url": server.base_url}


@pytest.fixture
async def new(given):
    """A function that makes a client; all stay open until the test ends, as in notebooks."""
    made = []

    def make(namespace="default", kind=AsyncOpenAI, **more):
        made.append(kind(namespace=namespace, **given | more))
        return made[-1]

    yield make
    for client in made:
        closing = client.close()
        if inspect.isawaitable(closing):
            await closing


def said(prompt):
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}


def text(answer):
    return answer.choices[0].message.content


async def ask(client, prompt, **kwargs):
    return text(await client.chat.completions.create(**said(prompt), **kwargs))


# The flows of its tutorial.


async def test_quick_start_a_new_client_gets_the_first_answer_again(server, new):
    first = await ask(new("quick"), "The capital of France?")
    assert await ask(new("quick"), "The capital of France?") == first
    assert server.stats.requests == 1


async def test_one_client_gets_fresh_answers_to_a_repeated_question(server, new):
    client = new("quick")
    first = [await ask(client, "Cats?"), await ask(client, "Cats?")]
    assert server.stats.requests == 2
    again = new("quick")
    assert [await ask(again, "Cats?"), await ask(again, "Cats?")] == first
    assert server.stats.requests == 2


@pytest.mark.parametrize("namespace", ["v1", "v2"])
async def test_reproducibility_a_rerun_and_another_namespace_make_no_call(server, namespace, new):
    async def classify(namespace):
        client = new(namespace)
        return [await ask(client, f"The sentiment of: {each}") for each in ("good", "bad", "good")]

    first, calls = await classify("v1"), server.stats.requests
    assert await classify(namespace) == first
    assert server.stats.requests == calls == 3


async def test_error_recovery_pays_only_for_what_had_not_arrived(server, new):
    async def work(stop):
        client = new("error")
        found = []
        for number in range(10):
            if number == stop:
                raise RuntimeError("item 6")
            found.append(await ask(client, f"Summarise topic {number}"))
        return found

    with pytest.raises(RuntimeError, match="item 6"):
        await work(6)
    assert server.stats.requests == 6
    assert len(await work(None)) == 10
    assert server.stats.requests == 10


async def test_changes_of_the_logging_cost_nothing(server, new):
    async def work(log):
        client = new("logging")
        for number in range(4):
            log(number, await ask(client, f"Describe {number}"))

    texts, lengths = [], []
    await work(lambda _, said: texts.append(said))
    await work(lambda number, said: lengths.append((number, len(said))))
    assert lengths == [(number, len(said)) for number, said in enumerate(texts)]
    assert server.stats.requests == 4


async def test_two_algorithms_share_what_both_of_them_ask(server, new):
    async def best_of(n, namespace):
        client = new(namespace)
        tries = await asyncio.gather(*[ask(client, "Solve it") for _ in range(n)])
        return max(tries, key=len), tries

    async def refined(namespace):
        client = new(namespace)
        draft = await ask(client, "Solve it")
        return draft, await ask(client, f"Improve: {draft}")

    _, tries = await best_of(3, "best of three")
    draft, _ = await refined("refined")
    assert draft == tries[0]
    assert server.stats.samples_generated == 4  # the second algorithm has paid for its second step only
    assert (await best_of(3, "best of three"))[1] == tries
    await best_of(2, "best of two")
    assert server.stats.samples_generated == 4


async def test_a_changed_algorithm_pays_only_for_its_new_step(server, new):
    async def algorithm(*steps):
        client = new("algorithm")
        return [[await ask(client, f"{step}: {article}") for step in steps] for article in ("A", "B", "C")]

    first = await algorithm("Summarise", "Keywords")
    assert server.stats.requests == 6
    more = await algorithm("Summarise", "Keywords", "Sentiment")
    assert [found[:2] for found in more] == first
    assert server.stats.requests == 9


async def test_parallel_agents_get_their_answers_again_in_another_namespace_too(server, new):
    async def agents(namespace):
        client = new(namespace)
        return await asyncio.gather(*[ask(client, "Continue the story") for _ in range(5)])

    first, samples = await agents("one"), server.stats.samples_generated
    assert len(set(first)) > 1
    assert await agents("one") == first
    assert await agents("two") == first
    assert server.stats.samples_generated == samples == 5


async def test_request_ids_fix_which_agent_gets_which_answer(server, new):
    async def agents(order):
        client = new("order")
        asked = {k: ask(client, "Continue the story", request_id=f"agent-{k}") for k in order}
        return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))

    assert await agents(range(5)) == await agents(reversed(range(5)))
    assert server.stats.samples_generated == 5


async def test_batches_one_by_one_then_in_parallel_then_from_the_cache(server, new):
    prompts = [f"A fact about {number}" for number in range(10)]
    client = new("one by one", batch_size=4, timeout=0.1)
    alone = [await ask(client, prompt) for prompt in prompts]
    await asyncio.gather(*[ask(client, prompt) for prompt in prompts])
    assert server.stats.requests == 20
    client = new("cached", batch_size=4, timeout=0.1)
    assert await asyncio.gather(*[ask(client, prompt) for prompt in prompts]) == alone
    assert server.stats.requests == 20


async def test_a_react_agent_takes_the_same_steps_again(server, new):
    async def agent():
        client = new("react")
        messages = [{"role": "user", "content": "The population of France by that of Belgium?"}]
        for step in range(4):
            answer = await client.chat.completions.create(model=MODEL, messages=messages)
            messages.append({"role": "assistant", "content": text(answer)})
            messages.append({"role": "user", "content": f"Observation: {67 + step}"})
        return messages

    assert await agent() == await agent()
    assert server.stats.requests == 4


async def test_a_tree_of_thoughts_grows_again_for_nothing(server, new):
    async def search():
        client = new("tree")
        states = [""]
        for _ in range(2):
            grown = []
            for state in states:
                thoughts = await asyncio.gather(*[ask(client, f"Go on: {state}") for _ in range(3)])
                grown += [f"{state} {thought}" for thought in thoughts]
            scores = await asyncio.gather(*[ask(client, f"Rate: {state}") for state in grown])
            states = [state for _, state in sorted(zip(scores, grown, strict=True), reverse=True)[:2]]
        return states

    first, samples = await search(), server.stats.samples_generated
    assert await search() == first
    assert server.stats.samples_generated == samples


async def test_two_retrieval_pipelines_share_a_cache_and_keep_their_answers(server, new):
    async def retrieve(query, namespace, rank):
        client = new(namespace)
        chosen = await ask(client, f"Which passages? {query}") if rank else "1, 2"
        return await ask(client, f"Context: {chosen}. Question: {query}")

    async def both():
        queries = ("How tall is it?", "Who made it?")
        return [await retrieve(query, f"rag-{rank}", rank) for query in queries for rank in (False, True)]

    first, calls = await both(), server.stats.requests
    assert await both() == first
    assert server.stats.requests == calls == 6


# Its keywords.


async def test_a_call_with_metadata_returns_flags_per_sample(new):
    for cached in (False, True):
        client = new("n")
        answer, metadata = await client.chat.completions.create(**said("Cats?"), n=2, metadata=True)
        assert len(answer.choices) == 2
        assert metadata == Metadata(2, [cached] * 2, [False, True])


async def test_a_call_may_name_its_namespace(server, new):
    client = new("one")
    assert await ask(client, "Cats?") == await ask(client, "Cats?", namespace="two")
    await ask(client, "Cats?", namespace=None)  # the client's own, as there
    assert server.stats.requests == 2


@pytest.mark.parametrize("kind", [AsyncAnthropic, Anthropic])
async def test_anthropic_answers_a_call_for_several_with_a_list(server, new, kind):
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "Cats?"}]}

    async def several(**more):
        client = new(kind=kind, base_url=server.base_url.removesuffix("/v1"))
        found = client.messages.create(**body, **more)
        return await found if inspect.isawaitable(found) else found

    [first, *_], metadata = await several(n=3, metadata=True)
    assert metadata == Metadata(3, [False] * 3, metadata.duplicated)
    assert isinstance(first, anthropic.types.Message)
    assert await several() == first
    assert [first, *_] == await several(n=3)
    assert server.stats.requests == 3
    with pytest.raises(ValueError, match="at least 1; got 0"):
        await several(n=0)


@pytest.mark.parametrize("kind", [AsyncGemini, Gemini])
async def test_gemini_answers_a_call_for_several_with_candidates(server, tmp_path, kind):
    body = {"model": MODEL, "contents": "Cats?"}
    http_options = {"base_url": server.base_url.removesuffix("/v1")}

    async def several(**more):
        client = kind(cachedir=str(tmp_path / "g"), api_key="none", http_options=http_options)
        found = client.models.generate_content(**body, **more)
        found = await found if inspect.isawaitable(found) else found
        await client.client.aclose() if kind is AsyncGemini else client.client.close()
        return found

    first, metadata = await several(n=3, config={"temperature": 0.5}, metadata=True)
    assert metadata == Metadata(3, [False] * 3, [False, True, True])
    [again] = (await several(config={"temperature": 0.5})).candidates
    assert again.content == first.candidates[0].content
    with pytest.raises(ValueError, match="at least 1; got 0"):
        await several(n=0)


@pytest.mark.parametrize("kind", [OpenAI, Together])
def test_synchronous_clients_work_in_threads_and_in_a_running_loop(server, given, kind):
    given["base_url"] = server.base_url.removesuffix("/v1") if kind is Together else server.base_url

    def one(found, number):
        with kind(namespace="sync", **given) as client:
            found[number] = text(client.chat.completions.create(**said(f"Cats {number}?")))

    async def in_a_loop():
        found = {}
        one(found, 0)
        return found

    found = asyncio.run(in_a_loop())
    threads = [threading.Thread(target=one, args=(found, number)) for number in (1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == server.stats.requests == 3


async def test_the_sdk_shows_through(server, given, new):
    together = given | {"base_url": server.base_url.removesuffix("/v1")}
    async with AsyncTogether(namespace="t", **together) as client:
        assert text(await client.chat.completions.create(**said("Cats?")))
    client = new(max_retries=0)
    assert client.api_key == "none"
    assert client.max_retries == 0
    models, metadata = await client.models.retrieve(MODEL, metadata=True)
    assert (models.id, metadata) == (MODEL, Metadata(1))
    assert [model.id async for model in client.models.list()] == [MODEL, "ngram-1-embedding"]
    parts = [part async for part in await client.chat.completions.create(**said("Cats?"), stream=True)]
    assert parts
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(AttributeError, match="no attribute '_nothing'"):
        _ = client._nothing
    with pytest.raises(AttributeError, match="completion"):
        _ = client.chat.completion
    assert repr(client) == f"<AsyncOpenAI namespace='default' cachedir={given['cachedir']!r}>"


def test_the_default_folder_is_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert OpenAI(api_key="none").cachedir == "./cache"
    assert (tmp_path / "cache").is_dir()


# Its pipelines.


class Dice:
    """A model that answers with what it was asked, and how often it was asked for anything."""

    model = "dice"

    def __init__(self):
        self.rolled = 0

    async def request(self, request):
        self.rolled += request.n
        return Response([f"{request.kwargs['sides']}: {self.rolled}"] * request.n)

    async def batch_request(self, batch):
        return [await self.request(request) for request in batch.requests]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (OnlineAPI, {"batch_size": 2}),
        (LocalAPI, {"batch_size": 2}),
        (OrderedLocalAPI, {"collection_batch_size": 2, "hardware_batch_size": 2}),
    ],
)
async def test_a_new_pipeline_starts_again(tmp_path, kind, sizes):
    model = Dice()
    requests = [
        Request(args=(), kwargs={"sides": sides}, n=1, request_id=str(number), namespace="d")
        for number, sides in enumerate((6, 6, 20))
    ]
    first = None
    for _ in range(2):  # the first pipeline stays open
        pipeline = kind(
            model=model, cache=str(tmp_path / "c"), timeout=0.01, allow_batch_overflow=True, **sizes
        )
        found = [(await pipeline.request(request)).data for request in requests]
        found += [response.data for response in await pipeline.batch_request(Batch(requests))]
        first = first or found
        assert found == first
        assert model.rolled == 6
    await pipeline.cleanup()
