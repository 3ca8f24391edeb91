"""Budgets over real HTTP: calls that do not fit are not made, everything paid is kept, and hits are free."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from click.testing import CliRunner

import cachepipe
from cachepipe import Budget, BudgetExceeded, MemoryStore, OnlineAPI, Prices, UnknownCost
from cachepipe.batch import run_file
from cachepipe.cli.group import cli
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.contract.budgets import Purse, nanos
from cachepipe.flow.budget import Spending
from cachepipe.models import OpenAIModel
from cachepipe.proxy.settings import BadSettings, ProxySettings, Upstream, from_file
from cachepipe.stores import tables
from cachepipe.stores.base import Reserve
from cachepipe.stores.sums import statements
from cachepipe.testing import ScriptedModel

pytestmark = pytest.mark.usefixtures("environment")

GIVEN = {"ngram-1": {"prompt": 1.0, "completion": 100.0, "max_tokens": 50}}
PRICES = Prices(GIVEN)
LOOK = Reserve("=x", "a look", 0, 10**12)
CALL = 50 * 100e-6  # what an answer costs at most, in dollars


async def state_of(store):
    """What is spent and reserved of the budget of the namespace x."""
    return (await store.apply([LOOK]))[0]


def spent(store, namespace="=x"):
    return statements(store)[namespace].spent.cost(PRICES.cost_of_sum)[0]


def ask(client, text="hi", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="ngram-1", messages=messages, **options)


def texts_of(client, count):
    for number in range(count):
        yield ask(client, f"question {number}").choices[0].message.content


def test_c6_a_client_stops_before_the_budget_is_exceeded_and_hits_are_free(server):
    store = MemoryStore()
    client = OpenAI(cache=store, namespace="x", budget=Budget(3 * CALL, prices=PRICES))
    texts = []
    with pytest.raises(BudgetExceeded, match=r"the budget of \$0.015 of the namespace 'x'") as caught:
        texts.extend(texts_of(client, 100))
    assert caught.value.spent == pytest.approx(spent(store))
    assert spent(store) <= 3 * CALL < spent(store) + caught.value.needed
    asked = server.stats.requests
    with cachepipe.run():
        again = [*texts_of(client, len(texts))]
    assert (again, server.stats.requests) == (texts, asked)
    more = OpenAI(cache=store, namespace="x", budget=Budget(10 * CALL, prices=PRICES))
    assert ask(more, "question 1000").choices
    assert ask(client.in_namespace("y"), "question 1001").choices


@pytest.mark.anyio
async def test_info_uses_the_prices_of_the_budget(server):
    store = MemoryStore()
    for budget, given in ((Budget(1.0, prices=PRICES), True), (None, False)):
        async with AsyncOpenAI(cache=store, namespace="x", budget=budget) as client:
            answer = await ask(client)
        facts = cachepipe.info(answer)
        usage = answer.usage
        cost = pytest.approx(usage.prompt_tokens * 1e-6 + usage.completion_tokens * 100e-6)
        assert facts.as_asked_cost == (cost if given else None)
        assert facts.saved_cost == (0 if given else None)
    with OpenAI(cache=store, namespace="x", budget=Budget(1.0, prices=PRICES)) as client:
        assert cachepipe.info(ask(client)).saved_cost == cost


@pytest.mark.anyio
async def test_calls_in_flight_hold_what_they_may_cost_and_others_wait_for_them():
    store = MemoryStore()
    async with AsyncOpenAI(cache=store, namespace="x", budget=Budget(6 * CALL, prices=PRICES)) as client:
        got = await asyncio.gather(*(ask(client, f"q {n}", max_tokens=5) for n in range(40)))
        assert len(got) == 40
        more = (ask(client, f"r {n}", max_tokens=20) for n in range(300))
        answers = await asyncio.gather(*more, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert refused
    assert {type(error) for error in refused} == {BudgetExceeded}
    assert spent(store) <= 6 * CALL


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_is_settled_with_what_it_has_used(stream):
    store = MemoryStore()
    async with AsyncOpenAI(cache=store, namespace="x", budget=Budget(CALL * 2, prices=PRICES)) as client:
        answer = await ask(client, stream=stream)
        if stream:
            assert [event async for event in answer]
        state = await state_of(store)
    assert state.reserved == 0
    assert state.spent / 1e9 == pytest.approx(spent(store))


@pytest.mark.anyio
async def test_what_is_unknown_is_refused_unless_it_is_given():
    async with AsyncOpenAI(cache=MemoryStore(), budget=5) as client:
        with pytest.raises(UnknownCost, match=r"the largest answer of ngram-1 at .* unknown.*--prices FILE"):
            await ask(client)
        with pytest.raises(UnknownCost, match="the price of ngram-1"):
            await ask(client, max_tokens=3)
        with pytest.raises(UnknownCost, match="it is not cached"), cachepipe.using(mode="bypass"):
            await ask(client)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        OpenAI(cache=MemoryStore(), budget=-1)


@pytest.mark.anyio
async def test_a_call_that_fails_costs_nothing(server):
    store = MemoryStore()
    async with AsyncOpenAI(
        cache=store,
        namespace="x",
        budget=Budget(5, prices=PRICES),
        base_url="http://127.0.0.1:9/v1",
        max_retries=0,
    ) as client:
        with pytest.raises(Exception, match="onnection"):
            await ask(client)
    state = await state_of(store)
    assert (state.spent, state.reserved) == (0, 0)


@pytest.mark.anyio
async def test_a_budget_survives_a_kill_whose_reservation_ends_with_its_process(tmp_path):
    store = cachepipe.DiskStore(tmp_path / "cache")
    budget = Budget(2 * CALL, prices=PRICES)
    async with AsyncOpenAI(cache=store, namespace="x", budget=budget) as client:
        await ask(client)
    ledger = sqlite3.connect(tmp_path / "cache" / "ledger.cache.db")
    ledger.execute("INSERT INTO leases(id, name, at) VALUES(77, '0-dead', 0)")
    document = tables.dump_purse(Purse(held={"a call": (77, 10**12)}))
    digest = tables.sums_digest(tables.BUDGET, "=x", document)
    ledger.execute("INSERT OR REPLACE INTO budgets VALUES(?, ?, ?)", ("=x", document, digest))
    ledger.commit()
    ledger.close()
    state = await Spending(store, budget)._asked(LOOK)
    assert state.reserved == 0
    assert state.spent / 1e9 == pytest.approx(spent(store), abs=1e-9)
    store.close()


@pytest.mark.anyio
@pytest.mark.parametrize("engine", ["valkey", "postgres"])
async def test_processes_share_a_budget_on_any_engine(engine, request):
    url = request.getfixturevalue(f"new_{engine}_url")()
    budget = Budget(3 * CALL, prices=PRICES)
    async with (
        AsyncOpenAI(cache=url, namespace="x", budget=budget) as one,
        AsyncOpenAI(cache=url, namespace="x", budget=Budget(3 * CALL, prices=PRICES)) as other,
    ):
        asked = (ask(client, f"q {n}") for n in range(60) for client in (one, other))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers if isinstance(answer, Exception)} == {BudgetExceeded}
        store, owned = cachepipe.open_store(url)
        assert 0 < spent(store) <= 3 * CALL
        if owned:
            store.close()


SPENDERS = """
import asyncio, json, os, sys, traceback
import openai.resources.chat.completions, psycopg, valkey  # once, for all
from cachepipe import Budget, BudgetExceeded, Prices
from cachepipe.clients import AsyncOpenAI

async def main(cache, given, usd, url, first, count):
    budget = Budget(usd, prices=Prices(given))
    options = {"api_key": "none", "base_url": url, "max_retries": 0}
    async with AsyncOpenAI(cache=cache, namespace="x", budget=budget, **options) as client:
        asked = [
            client.chat.completions.create(
                model="ngram-1", messages=[{"role": "user", "content": f"question {n}"}], max_tokens=50
            )
            for n in range(first, first + count)
        ]
        found = await asyncio.gather(*asked, return_exceptions=True)
    for one in found:
        if isinstance(one, Exception) and not isinstance(one, BudgetExceeded):
            raise one
    return sum(not isinstance(one, Exception) for one in found)

children = []
for line in sys.stdin:  # each line is a process; an empty one waits for them
    if not line.strip():
        for child in children:
            os.waitpid(child, 0)
        children.clear()
        print(flush=True)
        continue
    if child := os.fork():
        children.append(child)
        print(child, flush=True)
        continue
    code, result = 1, os.open(sys.argv[1] + f"/{os.getpid()}", os.O_CREAT | os.O_WRONLY)
    try:
        os.write(result, b"%d" % asyncio.run(main(*json.loads(line))))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
"""


class Spenders:
    """Processes that ask some questions at once."""

    def __init__(self, folder):
        self._folder = folder
        words = [sys.executable, "-c", SPENDERS, str(folder)]
        self._parent = forked.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, cache, usd, url, first, count):
        """Start a process; return its number."""
        print(json.dumps([cache, GIVEN, usd, url, first, count]), file=self._parent.stdin, flush=True)
        return int(self._parent.stdout.readline())

    def join(self):
        """Wait until all have ended."""
        print(file=self._parent.stdin, flush=True)
        self._parent.stdout.readline()

    def close(self):
        """End the process that starts them."""
        self._parent.communicate()

    def answered(self, process):
        """Return how many questions a process had answered when it ended."""
        return int((self._folder / str(process)).read_text())


@pytest.fixture(scope="module")
def spenders(tmp_path_factory):
    """Starts processes."""
    made = Spenders(tmp_path_factory.mktemp("answered"))
    yield made
    made.close()


@pytest.fixture(params=["disk", "valkey", "postgres"])
def shared_cache(request, tmp_path):
    """A folder, and the URL of a cache on each server, where the lease of a dead process ends soon."""
    if request.param == "disk":
        return str(tmp_path / "cache")
    return request.getfixturevalue(f"new_{request.param}_url")() + "&lease=0.4"


@pytest.mark.anyio
async def test_processes_do_not_overspend_and_go_on_when_one_is_killed_with_reservations(
    shared_cache, server, spenders
):
    limit, asked = 4 * CALL, 12
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        killed = spenders.start(shared_cache, limit, url, 1000, asked)
        calls = [silent.accept()[0] for _ in range(2)]
        running = [spenders.start(shared_cache, limit, server.base_url, first, asked) for first in (0, asked)]
        os.kill(killed, signal.SIGKILL)
        await asyncio.to_thread(spenders.join)
        for call in calls:
            call.close()
    answered = sum(map(spenders.answered, running))
    assert 0 < answered < 2 * asked
    store, _ = cachepipe.open_store(shared_cache)
    assert (store.totals()["samples"], spent(store) <= limit) == (answered, True)
    assert limit - 1.1 * CALL < spent(store), "nothing is counted twice, so no call that fits was refused"
    before = await state_of(store)
    assert (before.reserved, before.spent) == (0, pytest.approx(nanos(spent(store)), abs=answered))
    async with AsyncOpenAI(cache=store, namespace="x", budget=Budget(2 * limit, prices=PRICES)) as client:
        asking = (ask(client, f"question {number}", max_tokens=50) for number in range(2 * asked))
        more = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(not is_error(answer) for answer in more) > answered
    assert limit < spent(store) <= 2 * limit
    store.close()


def test_run_stops_at_max_cost_and_goes_on_with_more(server):
    lines = [json.dumps({"prompt": f"line {number}"}) for number in range(30)]
    Path("in.jsonl").write_text("\n".join(lines))
    Path("prices.json").write_text(json.dumps(GIVEN))
    words = ["run", "in.jsonl", "-o", "out.jsonl", "--model", "ngram-1", "--cache", "c", "--namespace", "x"]
    words += ["--prices", "prices.json", "--json"]
    done = CliRunner().invoke(cli, [*words, "--max-cost", str(3 * CALL)], prog_name="cachepipe")
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, [*figures["errors"]]) == (1, ["budget_exceeded"])
    assert 0 < figures["spent"]["cost"] <= 3 * CALL
    assert "To go on, raise --max-cost above 0.015: cachepipe run in.jsonl" in done.stderr
    again = json.loads(CliRunner().invoke(cli, [*words, "--max-cost", str(3 * CALL)]).stdout.splitlines()[-1])
    assert (again["generated"], again["hits"]) == (0, figures["generated"])
    rest = json.loads(CliRunner().invoke(cli, [*words, "--max-cost", "1"]).stdout.splitlines()[-1])
    assert (rest["failed"], rest["generated"]) == (0, 30 - figures["generated"])


@pytest.mark.anyio
async def test_run_refuses_an_unknown_price_line_by_line():
    await asyncio.to_thread(Path("in.jsonl").write_text, '{"prompt": "a", "max_tokens": 3}\n')
    report = await run_file("in.jsonl", "out.jsonl", model="ngram-1", cache=MemoryStore(), max_cost=1.0)
    assert report.errors == {"unknown_cost": 1}
    assert "the price of ngram-1" in report.example


def test_the_settings_of_a_proxy_hold_budgets(tmp_path):
    (tmp_path / "prices.json").write_text(json.dumps(GIVEN))
    (tmp_path / "proxy.toml").write_text(
        f'max_cost = 5\nprices = "{tmp_path}/prices.json"\n[budgets]\nrun-1 = 0.5\n'
        '[upstreams.one]\nurl = "http://127.0.0.1:1/v1"\n'
    )
    settings = from_file(tmp_path / "proxy.toml").checked()
    assert (settings.budget.limit("run-1"), settings.budget.limit("other")) == (0.5, 5)
    assert settings.budget.most({"model": "ngram-1"}, "http://x") == pytest.approx(CALL)
    upstream = Upstream.of("one", "http://127.0.0.1:1/v1")
    assert ProxySettings(upstreams=(upstream,)).checked().budget is None
    with pytest.raises(BadSettings, match="at least 0; got -1"):
        ProxySettings(upstreams=(upstream,), budgets={"x": -1}).checked()


@pytest.mark.anyio
@pytest.mark.parametrize("batch_size", [1, 4])
async def test_a_pipeline_stops_before_the_budget_is_exceeded(batch_size):
    store, model = MemoryStore(), OpenAIModel("ngram-1")
    options = {"batch_size": batch_size, "timeout": 0.01 if batch_size > 1 else 0.0}
    budget = Budget(6 * CALL, prices=PRICES)
    async with OnlineAPI(model, store, budget=budget, **options) as pipeline:
        requests = [cachepipe.Request(f"question {number}", namespace="x") for number in range(100)]
        answers = await asyncio.gather(*map(pipeline.request, requests), return_exceptions=True)
        paid = [request for request, answer in zip(requests, answers, strict=True) if not is_error(answer)]
        assert {type(answer) for answer in answers if is_error(answer)} == {BudgetExceeded}
        assert 0 < spent(store) <= 6 * CALL
        assert len(paid) == model.calls
    with cachepipe.run():
        async with OnlineAPI(model, store, budget=budget) as pipeline:
            for request in paid:
                assert (await pipeline.request(request)).cached == [True]
    await model.close()


def is_error(answer):
    return isinstance(answer, Exception)


@pytest.mark.anyio
async def test_a_pipeline_refuses_a_model_whose_price_is_unknown():
    async with OnlineAPI(ScriptedModel(), MemoryStore(), budget=1) as pipeline:
        with pytest.raises(UnknownCost, match="is unknown, and a budget is set"):
            await pipeline.request(cachepipe.Request("a"))
