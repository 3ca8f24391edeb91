"""Experiments: clients and pipelines of a block share its namespace, cache, mode, budget and replicate."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

import cachepipe
from cachepipe import Budget, BudgetExceeded, CacheMiss, MemoryStore, OnlineAPI, Prices, Request, Response
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.experiments import COLUMNS
from cachepipe.models import OpenAIModel

pytestmark = pytest.mark.usefixtures("environment")

GIVEN = {"ngram-1": {"prompt": 1.0, "completion": 100.0, "max_tokens": 50}}
PRICES = Prices(GIVEN)
CALL = 50 * 100e-6  # what an answer costs at most, in dollars


class Counter:
    """Answers with the number of samples that it was asked for so far."""

    cache_scope = "counter"

    def __init__(self):
        self.count = 0

    async def request(self, request):
        first, self.count = self.count, self.count + request.n
        return Response([*range(first, self.count)])


def ask(client, text="hi", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="ngram-1", messages=messages, **options)


def said(answer):
    return [choice.message.content for choice in answer.choices]


async def drawn(model, *prompts, cache=None, **fields):
    async with OnlineAPI(model, cache) as pipeline:
        answers = await asyncio.gather(*(pipeline.request(Request(each, **fields)) for each in prompts))
    return [answer.data for answer in answers]


def test_a_client_in_the_block_takes_its_cache_and_namespace(server):
    with cachepipe.experiment("run-1", cache="caches/mine"), OpenAI() as client:
        answer = ask(client)
        assert cachepipe.info(answer).namespace == "run-1"
        other = ask(client)
    asked = server.stats.requests
    with OpenAI(cache="caches/mine", namespace="run-1", mode="replay") as client:
        assert [said(ask(client)), said(ask(client))] == [said(answer), said(other)]
    assert server.stats.requests == asked


def test_c2_the_same_block_again_replays(server):
    with cachepipe.experiment("run-1", cache="caches/mine"), OpenAI() as client:
        first = [said(ask(client)), said(ask(client))]
        asked = server.stats.requests
        with cachepipe.experiment("run-1"):  # the outer cache
            assert [said(ask(client)), said(ask(client))] == first
    assert server.stats.requests == asked


@pytest.mark.anyio
async def test_a_pipeline_in_the_block_takes_its_cache_namespace_and_replicate():
    store, model = MemoryStore(), Counter()
    async with cachepipe.experiment("run-1", cache=store, replicate=0):
        assert await drawn(model, "a", "a") == [[0], [1]]
    async with cachepipe.experiment("run-1", cache=store, replicate=1) as exp:
        assert await drawn(model, "a") == [[2]]
        assert await drawn(model, "a", namespace="other", replicate=0) == [[0]]  # its own names stay
        assert await drawn(model, "a", cache=MemoryStore()) == [[3]]  # and so does its own cache
    assert exp.summary().replicates == 2
    with cachepipe.experiment("run-1", cache=store, replicate=0):
        async with OnlineAPI(model) as pipeline:
            batch = await pipeline.batch_request(cachepipe.Batch([Request("a"), Request("a")]))
    assert [answer.data for answer in batch] == [[0], [1]]


@pytest.mark.anyio
async def test_the_flags_of_a_block_go_by_its_namespace():
    async with cachepipe.experiment("run-1", cache=MemoryStore()), OnlineAPI(Counter()) as pipeline:
        own, other = await asyncio.gather(
            pipeline.request(Request("a")), pipeline.request(Request("a", namespace="other"))
        )
    assert [own.duplicated, other.duplicated] == [[False], [False]]


@pytest.mark.anyio
async def test_the_mode_of_a_block_is_that_of_its_pipelines_and_clients(monkeypatch):
    store = MemoryStore()
    monkeypatch.delenv("OPENAI_API_KEY")
    async with cachepipe.experiment("run-1", cache=store, mode="replay"):
        with pytest.raises(CacheMiss):
            await drawn(Counter(), "a")
        async with AsyncOpenAI() as client:  # without a key
            with pytest.raises(CacheMiss):
                await ask(client)


def test_c6_the_budget_of_a_block_stops_its_clients_and_its_summary_tells(server):
    store, budget = MemoryStore(), Budget(3 * CALL, prices=PRICES)
    exp = cachepipe.experiment("run-1", cache=store, budget=budget)
    asked = server.stats.requests
    with exp, OpenAI() as client, pytest.raises(BudgetExceeded):
        [*map(partial(ask, client), map(str, range(100)))]
    bought = server.stats.requests - asked
    summary = exp.summary()
    assert (summary.samples, summary.sums["spent"]["samples"]) == (bought, bought)
    assert 0 < summary.sums["spent"]["cost"] <= summary.budget == pytest.approx(3 * CALL)
    assert summary.sums["billed"]["cost"] == pytest.approx(summary.sums["spent"]["cost"])
    assert f"experiment  run-1\nquestions   {bought}\n" in str(summary)
    assert "<th>spent</th>" in summary._repr_html_()


@pytest.mark.anyio
async def test_a_budget_stops_pipelines_and_chats_of_a_block(server):
    budget = Budget(0, prices=PRICES)
    async with cachepipe.experiment("run-1", cache=MemoryStore(), budget=budget):
        with pytest.raises(BudgetExceeded):
            await drawn(OpenAIModel("ngram-1", base_url=server.base_url, api_key="none"), "a")
        chat = cachepipe.Chat(model="ngram-1").add("user:a")
        with pytest.raises(BudgetExceeded):
            await chat.acomplete()


def test_results_are_rows_in_the_order_of_the_draws():
    exp = cachepipe.experiment("run-1", cache="caches/mine")
    with exp, OpenAI() as client:
        two, one = said(ask(client, "b", n=2)), said(ask(client, "a"))
    rows = exp.rows()
    assert [(row["prompt"], row["position"]) for row in rows] == [("b", 0), ("b", 1), ("a", 0)]
    assert [row["answer"] for row in rows] == [*two, *one]
    assert {row["model"] for row in rows} == {"ngram-1"}
    frame = exp.results("pandas")
    assert [*frame.columns] == [*COLUMNS]
    assert [*frame["answer"]] == [*two, *one]


@pytest.mark.parametrize("layered", [False, True])
def test_an_exported_experiment_replays_and_exports_the_same_bytes(server, tmp_path, layered):
    exp = cachepipe.experiment("run-1", cache="caches/mine")
    with exp, OpenAI() as client:
        first = said(ask(client))
    exp.export("paper.cachepipe", allow_secrets=True)
    asked = server.stats.requests
    cache = ["caches/new", "paper.cachepipe"] if layered else "paper.cachepipe"
    with cachepipe.experiment("run-1", cache=cache) as again, OpenAI() as client:
        assert said(ask(client)) == first
    assert server.stats.requests == asked
    again.export("again.cachepipe", allow_secrets=True)
    assert (tmp_path / "again.cachepipe").read_bytes() == (tmp_path / "paper.cachepipe").read_bytes()
    assert again.rows() == exp.rows()
    assert again.summary().sums["drawn"] == exp.summary().sums["drawn"]


def test_wrong_settings_are_refused_at_once():
    with pytest.raises(TypeError, match="a string"):
        cachepipe.experiment(1)
    with pytest.raises(ValueError, match="mode is one of"):
        cachepipe.experiment("x", mode="fast")
    with pytest.raises(ValueError, match="a budget is a number"):
        cachepipe.experiment("x", budget=-1)
    with cachepipe.experiment("x") as exp, pytest.raises(RuntimeError, match="has begun already"), exp:
        pass
