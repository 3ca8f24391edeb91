"""Replicates are independent repetitions of an experiment within one namespace (C1, C2, C3, C10)."""

from __future__ import annotations

import asyncio
import inspect
import json
import random
from functools import partial

import anthropic
import openai
import pytest
import together

import cachepipe
from cachepipe import (
    Chat,
    MemoryStore,
    OnlineAPI,
    Request,
    Response,
    Services,
    Session,
    clients,
    generate_text_completions,
)
from cachepipe.batch import BatchSettings, run_file
from cachepipe.chat.kept import close_clients
from cachepipe.chat.sessions import DEFAULTS
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer, ScriptedModel


class Counting:
    model = "counting"

    def __init__(self):
        self.made = 0
        self.seen = []

    async def request(self, request):
        self.seen.append(request)
        first, self.made = self.made, self.made + request.n
        return Response([f"sample {number}" for number in range(first, self.made)])


async def ask(folder, model, replicates, namespace="run", **options):
    async with OnlineAPI(model, folder, **options) as pipeline:
        return [
            (await pipeline.request(Request("q", n=2, namespace=namespace, replicate=replicate))).data
            for replicate in replicates
        ]


def test_c1_replicates_of_a_namespace_share_no_sample_and_c2_a_rerun_gives_each_its_own(tmp_path):
    model = Counting()
    got = asyncio.run(ask(tmp_path, model, [None, 1, 2, ""]))
    assert len({sample for data in got for sample in data}) == 8
    assert model.made == 8
    again = asyncio.run(ask(tmp_path, model, ["", "2", "1", None]))
    assert again == got[::-1]
    assert model.made == 8


def test_c3_another_namespace_repeats_each_replicate_in_whatever_order(tmp_path):
    model = Counting()
    got = asyncio.run(ask(tmp_path, model, [1, 2, 3]))
    assert asyncio.run(ask(tmp_path, model, [3, 1, 2], namespace="other")) == [got[2], got[0], got[1]]
    assert asyncio.run(ask(tmp_path, Counting(), [2], namespace="third", mode="replay")) == [got[1]]
    assert model.made == 6


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(5))
async def test_c2_a_replicate_is_replayed_and_c3_repeated_whatever_the_others_do_meanwhile(tmp_path, seed):
    dice, model = random.Random(seed), ScriptedModel()

    async def draws(pipeline, replicate, namespace="a", times=2, n=1):
        asked = [
            Request(question, n=n, namespace=namespace, replicate=replicate)
            for question in range(5)
            for _ in range(times)
        ]
        return [answer.data for answer in await asyncio.gather(*map(pipeline.request, asked))]

    async def among(*others, namespace="a"):
        """What replicate 1 draws in a run, while others draw before and after it, in a random order."""
        async with OnlineAPI(model, tmp_path) as pipeline:
            calls = [lambda: draws(pipeline, 1, namespace)]
            calls += [partial(draws, pipeline, replicate, **how) for replicate, how in others]
            order = dice.sample(range(len(calls)), len(calls))
            got = await asyncio.gather(*(calls[place]() for place in order))
            return got[order.index(0)]

    first = await among((0, {}), (2, {}))
    spent = model.generated
    assert await among() == first
    assert await among(namespace="b") == first
    assert await among((0, {"namespace": "c"}), (2, {"namespace": "c"}), namespace="c") == first
    assert model.generated == spent
    others = (0, {"n": 3}), (2, {"times": 4}), (3, {}), (None, {"n": 2}), (7, {"namespace": "d"})
    assert await among(*others) == first
    assert await among(namespace="c") == first


def test_a_replicate_is_no_part_of_what_is_asked(tmp_path):
    async def keys():
        async with OnlineAPI(Counting(), tmp_path) as pipeline:
            return {pipeline.key(Request("q", replicate=replicate)) for replicate in (None, 1, "x")}

    assert len(asyncio.run(keys())) == 1


@pytest.mark.parametrize("odd", [1.5, True, ["a"], b"a"])
def test_what_names_no_replicate_is_refused_before_anything_is_asked(odd):
    with pytest.raises(TypeError, match="replicate must be"):
        Request("q", replicate=odd)
    with pytest.raises(TypeError, match="replicate must be"), cachepipe.using(replicate=odd):
        pass


def text(answer):
    return answer.choices[0].message.content


ASKED = {"model": "ngram-1", "messages": [{"role": "user", "content": "Cats or dogs?"}]}


@pytest.mark.anyio
async def test_c10_a_replicate_is_the_same_draw_on_every_surface(tmp_path):
    """The core, the clients with and without the fast path, the proxy, and batch files."""
    folder = str(tmp_path / "cache")
    with MockServer.in_thread() as server:
        where = {"base_url": server.base_url, "api_key": "k"}
        async with OpenAIModel("ngram-1", **where) as model, OnlineAPI(model, folder) as pipeline:
            requests = [Request("Cats or dogs?", namespace="a", replicate=number) for number in (1, 2)]
            core = [(await pipeline.request(request)).data[0] for request in requests]
        asked = server.stats.requests
        async with AsyncOpenAI(**where, cache=folder, namespace="a") as client:
            for number, expected in ((2, core[1]), (1, core[0])):
                with cachepipe.using(replicate=number):
                    answer = await client.chat.completions.create(**ASKED)
                    assert text(answer) == expected
                    assert cachepipe.info(answer).replicate == number
                with cachepipe.run(), cachepipe.using(replicate=str(number)):
                    raw = await client.chat.completions.with_raw_response.create(**ASKED)
                    assert text(raw.parse()) == expected
        with OpenAI(**where, cache=folder, namespace="a", replicate=1) as client:
            assert text(client.chat.completions.create(**ASKED)) == core[0]
            assert text(client.in_replicate(2).chat.completions.create(**ASKED)) == core[1]
            assert text(client.in_namespace("b").chat.completions.create(**ASKED)) == core[0]
        service = Services.custom(server.base_url, model="ngram-1")
        async with service.client(folder, "b", replicate="2") as client:
            assert text(await client.chat.completions.create(**ASKED)) == core[1]
        async with openai.AsyncOpenAI(**where) as plain:
            client = cachepipe.wrap(plain, cache=folder, namespace="c", replicate=2)
            assert text(await client.chat.completions.create(**ASKED)) == core[1]
        settings = ProxySettings(port=0, upstreams=(Upstream.of("mock", server.base_url),), cache=folder)
        with running(settings, lambda _: None) as proxy:
            told = {"x-cachepipe-namespace": "a", "x-cachepipe-replicate": "2"}
            async with openai.AsyncOpenAI(
                base_url=f"{proxy.url}/v1", api_key="k", default_headers=told
            ) as through:
                assert text(await through.chat.completions.create(**ASKED)) == core[1]
            for place, (namespace, number) in enumerate((("a", 1), ("d", 2))):
                url = f"{proxy.url}/ns/{namespace}@{place}/rep/{number}/v1"
                async with openai.AsyncOpenAI(base_url=url, api_key="k") as through:
                    assert text(await through.chat.completions.create(**ASKED)) == core[number - 1]
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text(json.dumps({"prompt": "Cats or dogs?"}))
        settings = BatchSettings(model="ngram-1", cache=folder, namespace="a", **where)
        for number, expected in ((1, core[0]), ("2", core[1])):
            await run_file(source, target, settings, replicate=number)
            answer = json.loads(target.read_text())["response"]["body"]
            assert answer["choices"][0]["message"]["content"] == expected
        assert server.stats.requests == asked == 2
        await run_file(source, target, settings, replicates=3)
        lines = [json.loads(line)["response"]["body"] for line in target.read_text().splitlines()]
        assert [line["choices"][0]["message"]["content"] for line in lines[1:]] == core
        assert server.stats.requests == 3  # the replicate 0


@pytest.fixture(scope="module")
def server():
    with MockServer.in_thread() as running:
        yield running


KINDS = {
    clients.AsyncOpenAI: openai.AsyncOpenAI,
    clients.OpenAI: openai.OpenAI,
    clients.AsyncTogether: together.AsyncTogether,
    clients.Together: together.Together,
    clients.AsyncAnthropic: anthropic.AsyncAnthropic,
    clients.Anthropic: anthropic.Anthropic,
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
async def make(server, request):
    """Makes a client of one class, by its constructor or by `wrap`, on one store."""
    ours, sdk = request.param, KINDS[request.param]
    url = server.base_url if issubclass(sdk, openai.OpenAI | openai.AsyncOpenAI) else server.url
    where, cache, made = {"base_url": url, "api_key": "k"}, MemoryStore(), []

    def client(*, wrapped=False, **options):
        options = {"cache": cache, "namespace": "a", **options}
        made.append(cachepipe.wrap(sdk(**where), **options) if wrapped else ours(**where, **options))
        return made[-1]

    yield client
    for each in made:
        await settled(each.close())


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def drawn(client):
    """The index of the sample that a client's first request of a run draws, and the replicate."""
    create = client.messages.create if hasattr(client, "messages") else client.chat.completions.create
    with cachepipe.run():
        about = cachepipe.info(await settled(create(**ASKED, max_tokens=100)))
    return about.indices[0], about.replicate


@pytest.mark.anyio
@pytest.mark.parametrize("wrapped", [False, True], ids=["made", "wrapped"])
async def test_c1_a_replicate_is_an_option_of_every_client_and_of_its_copies(make, wrapped):
    client = make(replicate=1, wrapped=wrapped)
    assert await drawn(client) == (0, 1)
    assert await drawn(client.copy(replicate=2)) == (1, 2)
    assert await drawn(client.with_options(replicate="2")) == (1, "2")
    assert await drawn(client.in_replicate(None)) == (2, None)
    assert await drawn(client.in_namespace("b")) == (0, 1)
    assert await drawn(client.copy(replicate=2).in_namespace("b")) == (1, 2)
    assert await drawn(client.in_replicate(2).copy(timeout=9)) == (1, 2)
    assert await drawn(client.copy(replicate=2).copy(cache=client._cachepipe.shared_store.store)) == (1, 2)
    with cachepipe.using(replicate=2):
        assert await drawn(client) == (1, 2)
        with cachepipe.using(replicate=None):
            assert await drawn(client) == (2, None)
    assert await drawn(make(replicate="1")) == (0, "1")


@pytest.mark.anyio
@pytest.mark.parametrize("odd", [1.5, True, b"a"])
async def test_what_names_no_replicate_is_refused_by_every_client_before_a_cache_is_opened(
    make, odd, tmp_path
):
    for wrapped in (False, True):
        with pytest.raises(TypeError, match="replicate must be a string, a whole number or None"):
            make(replicate=odd, cache=str(tmp_path / "cache"), wrapped=wrapped)
    assert not (tmp_path / "cache").exists()
    for change in ("copy", "with_options"):
        with pytest.raises(TypeError, match="replicate must be"):
            getattr(make(), change)(replicate=odd)
    with pytest.raises(TypeError, match="replicate must be"):
        make().in_replicate(odd)


@pytest.mark.anyio
async def test_c4_the_replicates_of_one_client_travel_in_one_call(server):
    server.stats.reset()
    where = {"base_url": server.base_url, "api_key": "k", "cache": MemoryStore()}
    async with AsyncOpenAI(**where, namespace="a") as client:
        answers = await asyncio.gather(
            *(client.in_replicate(number).chat.completions.create(**ASKED) for number in range(10))
        )
    assert [cachepipe.info(answer).indices for answer in answers] == [(number,) for number in range(10)]
    assert (server.stats.requests, server.stats.samples_generated) == (1, 10)


@pytest.mark.anyio
async def test_c10_conversations_take_a_replicate_as_clients_do(tmp_path):
    """Completions, chats and sessions: an option says which one it is; a block goes before a session's."""
    how = {"cache": str(tmp_path / "cache"), "namespace": "a"}
    with MockServer.in_thread() as server:
        service = Services.custom(server.base_url, model="ngram-1")

        async def said(replicate):
            chat = Chat(service=service, replicate=replicate, messages=ASKED["messages"], **how)
            return await chat.acomplete(), chat.completions[0].replicate

        async def instructed(replicate):
            nothing = dict.fromkeys(name for name in DEFAULTS if name != "model")
            options = {"llmconfig": {**nothing, "model": "ngram-1"}, "replicate": replicate}
            session = Session(service=service, **options, **how)
            return await session.initiate("Cats or dogs?"), session

        async with AsyncOpenAI(base_url=server.base_url, api_key="k", **how) as client:
            expected = []
            for number in (1, 2):
                with cachepipe.using(replicate=number):
                    expected.append(text(await client.chat.completions.create(**ASKED)))
        async with AsyncOpenAI(base_url=server.base_url, api_key="k", replicate=2, **how) as client:
            chat = Chat(client=client, model="ngram-1", messages=ASKED["messages"])
            assert await chat.acomplete() == expected[1]
            with cachepipe.run(), cachepipe.using(replicate=1):
                chat = Chat(client=client, model="ngram-1", messages=ASKED["messages"])
                assert await chat.acomplete() == expected[0]
            chat = Chat(client=client, model="ngram-1", messages=ASKED["messages"], replicate="1")
            with cachepipe.run():
                assert await chat.acomplete() == expected[0]
        with cachepipe.run():
            assert await said(2) == (expected[1], 2)
            assert await said("1") == (expected[0], "1")
        with cachepipe.run():
            answer, session = await instructed(2)
            assert (answer, session.info.replicate) == (expected[1], 2)
            session.save(tmp_path / "session.json")
            assert Session.load(tmp_path / "session.json", service=service, **how).replicate == 2
            with cachepipe.using(replicate=1):
                assert (await instructed(2))[0] == expected[0]
        with cachepipe.run():
            for number in (2, 1):
                options = {"service": service, "replicate": number, "show_progress": False, **how}
                [completion] = await generate_text_completions(["Cats or dogs?"], **options)
                assert (completion.message, completion.replicate) == (expected[number - 1], number)
        assert server.stats.requests == 2
        await close_clients()


@pytest.mark.anyio
async def test_what_names_no_replicate_is_refused_by_conversations_too():
    for make in (Chat, Session):
        with pytest.raises(TypeError, match="replicate must be"):
            make(replicate=1.5)


def test_an_adapter_sends_no_replicate_to_the_provider():
    model = OpenAIModel("ngram-1", base_url="http://localhost:1/v1", api_key="k")
    assert b"replicate" not in model.question(Request("q", replicate=3), None).document
