"""C6: the same calls through each surface, whose figures of money and tokens are those of `stats`."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

import cachepipe
from cachepipe import Budget, OnlineAPI, Prices, Request
from cachepipe.cli.group import cli
from cachepipe.clients import OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream

pytestmark = pytest.mark.usefixtures("environment")

GIVEN = {"ngram-1": {"prompt": 1000, "completion": 2000, "max_tokens": 50}}
LINES = [("one", 2), ("two", 1), ("one", 1)]
"""Two questions, and the first one again."""
RUNS = 2
KINDS = ("as_asked", "billed", "saved")
PARTS = ("prompt_tokens", "completion_tokens", "total_tokens", "cost")


@pytest.fixture
def prices():
    Path("prices.json").write_text(json.dumps(GIVEN))
    return Prices(GIVEN)


def body(text, n):
    return {"model": "ngram-1", "messages": [{"role": "user", "content": text}], "n": n}


def invoke(*words):
    done = CliRunner().invoke(cli, [*words, "--prices", "prices.json", "--json"], catch_exceptions=False)
    return json.loads(done.stdout.splitlines()[-1] if words[0] == "run" else done.stdout)


def parts(sums):
    """The tokens and the money of a sum, in hundredths of a cent."""
    return tuple(round(sums[part] * (1e4 if part == "cost" else 1)) for part in PARTS)


def added(each):
    return tuple(map(sum, zip(*each, strict=True)))


def of_stats(cache):
    """What `stats` says of the namespace, of the model, of all, and of each run."""
    figures = invoke("stats", "--runs", "--cache", cache)
    [namespace], [model], runs = figures["namespaces"], figures["models"], figures["runs"]
    assert namespace["namespace"] == "x"
    assert {run["namespace"] for run in runs} == {"x"}
    each = {}
    for kind in ("spent", *KINDS, "unreported", "wasted"):
        each[kind] = parts(namespace[kind])
        by_run = [parts(run[kind]) for run in runs]
        assert each[kind] == parts(model[kind]) == parts(figures[kind]) == added(by_run)
    assert len(runs) == RUNS
    assert each["unreported"] == each["wasted"] == (0, 0, 0, 0)
    assert each["spent"] == each["billed"]
    assert each["saved"] == tuple(a - b for a, b in zip(each["as_asked"], each["billed"], strict=True))
    assert each["saved"][0] > 0
    return each, [{kind: parts(run[kind]) for kind in ("spent", *KINDS, "unreported")} for run in runs]


def of_infos(infos):
    """What `info` says of some answers, together."""
    return {
        kind: added(parts({**getattr(info, kind), "cost": getattr(info, f"{kind}_cost")}) for info in infos)
        for kind in KINDS
    }


def test_c6_a_client_and_its_experiment_say_what_stats_says(prices):
    infos = []
    for _ in range(RUNS):
        experiment = cachepipe.experiment("x", cache="c", budget=Budget(5, prices=prices))
        with experiment, OpenAI() as client:
            infos += [cachepipe.info(client.chat.completions.create(**body(*line))) for line in LINES]
    stats, _ = of_stats("c")
    assert of_infos(infos) == {kind: stats[kind] for kind in KINDS}
    sums = experiment.summary().sums
    for kind in ("spent", "billed", "saved", "wasted"):
        whole = sums[kind] | {"total_tokens": sums[kind]["prompt_tokens"] + sums[kind]["completion_tokens"]}
        assert parts(whole) == stats[kind]


def test_c6_a_run_says_what_stats_says(prices):
    lines = [json.dumps({"prompt": text, "n": n}) for text, n in LINES]
    Path("in.jsonl").write_text("\n".join(lines))
    told = []
    for number in range(RUNS):
        words = ("run", "in.jsonl", "-o", f"{number}.jsonl", "--model", "ngram-1", "--namespace", "x", "-q")
        report = invoke(*words, "--cache", "c")
        told.append({kind: parts(report[kind]) for kind in ("spent", *KINDS, "unreported")})
        [model] = report["models"]
        assert {kind: parts(model[kind]) for kind in told[-1]} == told[-1]
    stats, runs = of_stats("c")
    assert sorted(told, key=str) == sorted(runs, key=str)
    assert {kind: added(one[kind] for one in told) for kind in told[0]} == {
        kind: stats[kind] for kind in told[0]
    }


def test_c6_a_proxy_its_page_and_its_metrics_say_what_stats_says(prices, server):
    mock = Upstream.of("mock", server.base_url)
    settings = ProxySettings(port=0, cache="c", upstreams=(mock,), prices="prices.json")
    with running(settings, lambda _: None) as proxy:
        for run in range(RUNS):
            for line in LINES:
                url = f"{proxy.url}/ns/x@{run}/v1/chat/completions"
                httpx2.post(url, json=body(*line)).raise_for_status()
        counters = httpx2.get(f"{proxy.url}/cachepipe/api/counters").json()
        metrics = httpx2.get(f"{proxy.url}/metrics").text
        whole = httpx2.get(f"{proxy.url}/cachepipe/api/stats").json()
    stats, runs = of_stats("c")
    for kind in ("spent", *KINDS, "unreported", "wasted"):
        [by_namespace], [by_model] = whole["namespaces"], whole["models"]
        assert parts(whole[kind]) == parts(by_namespace[kind]) == parts(by_model[kind]) == stats[kind]
    told = [{kind: parts(run[kind]) for kind in runs[0]} for run in whole["runs"]]
    assert sorted(told, key=str) == sorted(runs, key=str)
    [namespace], total = counters["namespaces"], counters["total"]
    for kind in ("spent", *KINDS, "unreported"):
        assert parts(namespace[kind]) == parts(total[kind]) == parts(total["models"][0][kind]) == stats[kind]
        metric = rf'cachepipe_proxy_cost_dollars{{namespace="x",sum="{kind}"}} (.*)'
        assert round(float(re.search(metric, metrics)[1]) * 1e4) == stats[kind][-1]


@pytest.mark.anyio
async def test_c6_stats_says_of_a_pipeline_what_its_flags_say(prices):
    model, bought = OpenAIModel("ngram-1"), 0
    async with OnlineAPI(model, "c") as pipeline:
        for _ in range(RUNS):
            with cachepipe.run():
                for text, n in LINES:
                    answer = await pipeline.request(Request(text, n=n, namespace="x"))
                    bought += answer.cached.count(False)
    await model.close()
    await asyncio.to_thread(of_stats, "c")
    figures = await asyncio.to_thread(invoke, "stats", "--cache", "c")
    assert figures["billed"]["samples"] == bought


def test_c6_python_says_what_stats_says(prices):
    with OpenAI(cache="c", namespace="x") as client:
        for _ in range(RUNS):
            with cachepipe.run():
                for line in LINES:
                    client.chat.completions.create(**body(*line))
    of_stats("c")
    shown = invoke("stats", "--runs", "--scopes", "--cache", "c")
    assert cachepipe.stats("c", prices=prices, scopes=True) == shown
