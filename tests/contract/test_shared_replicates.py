"""Replicates in one namespace give true error bars; as namespaces they give none, and a warning (C1, C3)."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import warnings

import pytest

import cachepipe
from cachepipe import OnlineAPI, Request, SharedReplicates
from cachepipe.testing.models import ScriptedModel

pytestmark = pytest.mark.anyio
QUESTIONS = 100
REPLICATES = 10


def chance(number):
    """The probability that the model answers a question correctly."""
    return random.Random(number).random()


def dice(seed):
    """A model that answers correctly with a probability of each question's own."""
    throws = random.Random(seed)
    return ScriptedModel(lambda request: [throws.random() < chance(request.prompt) for _ in range(request.n)])


async def accuracy(pipeline, **who):
    requests = [Request(number, **who) for number in range(QUESTIONS)]
    answers = await asyncio.gather(*map(pipeline.request, requests))
    return statistics.mean(answer.data[0] for answer in answers)


def noticed(caught):
    return [str(one.message) for one in caught if issubclass(one.category, SharedReplicates)]


@pytest.mark.parametrize("seed", range(3))
async def test_c1_replicates_in_one_namespace_vary_as_the_model_does(store, seed):
    truth = math.sqrt(sum(chance(q) * (1 - chance(q)) for q in range(QUESTIONS))) / QUESTIONS
    async with OnlineAPI(dice(seed), store) as pipeline:
        found = [await accuracy(pipeline, namespace="exp", replicate=k) for k in range(REPLICATES)]
    error = 1 / math.sqrt(2 * (REPLICATES - 1))  # the relative sampling error of a standard deviation
    assert abs(statistics.stdev(found) / truth - 1) < 2 * error
    mean = statistics.mean(map(chance, range(QUESTIONS)))
    assert abs(statistics.mean(found) - mean) < 3 * truth / math.sqrt(REPLICATES)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
async def test_c3_ten_namespaces_show_no_error_and_the_warning_says_what_to_write(store, together):
    async with OnlineAPI(dice(0), store) as pipeline:
        asked = [accuracy(pipeline, namespace=f"seed{k}") for k in range(REPLICATES)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = await asyncio.gather(*asked) if together else [await one for one in asked]
    assert statistics.stdev(found) == 0
    (said,) = noticed(caught)
    assert "the namespaces 'seed0', 'seed1' and 'seed2' have drawn the same" in said
    assert "replicate=0, replicate=1" in said
    assert "filterwarnings('ignore', category=cachepipe.SharedReplicates)" in said


async def test_the_warning_points_at_the_user_s_line_and_can_be_made_an_error(store):
    async with OnlineAPI(dice(0), store) as pipeline:
        for name in ("seed0", "seed1"):
            await accuracy(pipeline, namespace=name)
        for number in range(QUESTIONS * 9 // 10 - 1):
            await pipeline.request(Request(number, namespace="seed2"))
        with pytest.warns(SharedReplicates, match="the same 90 samples so far") as caught:
            await pipeline.request(Request(QUESTIONS - 1, namespace="seed2"))
        assert caught[0].filename == __file__
        with cachepipe.run():
            for name in ("seed0", "seed1"):
                await accuracy(pipeline, namespace=name)
            with pytest.raises(SharedReplicates):
                await accuracy(pipeline, namespace="seed2")
        with cachepipe.run():  # the refused draw stands
            assert await accuracy(pipeline, namespace="seed2") == await accuracy(pipeline, namespace="exp")


async def test_namespaces_of_different_runs_are_reruns_and_no_reason_for_a_warning(store):
    for number in range(5):
        async with OnlineAPI(dice(0), store) as pipeline:
            await accuracy(pipeline, namespace=f"run-{number}")
    async with OnlineAPI(dice(0), store) as pipeline:
        for number in range(5):
            with cachepipe.run():
                await accuracy(pipeline, namespace=f"run-{number}")
        await accuracy(pipeline, namespace="run-1")  # again, from the ledger


async def test_replicates_of_several_namespaces_are_no_reason_for_a_warning(store):
    """A comparison with paired replicates: each namespace asks the same."""
    async with OnlineAPI(dice(0), store) as pipeline:
        for number in range(3):
            for k in range(3):
                await accuracy(pipeline, namespace=f"run-{number}", replicate=k)


async def test_a_refresh_shares_nothing_and_is_no_reason_for_a_warning(store):
    async with OnlineAPI(dice(0), store, mode="refresh") as pipeline:
        found = [await accuracy(pipeline, namespace=f"seed{k}") for k in range(4)]
    assert len(set(found)) > 1


async def test_one_sample_per_question_by_declaration_is_no_reason_for_a_warning(store):
    async with OnlineAPI(dice(0), store, repeat="same") as pipeline:
        for k in range(4):
            await accuracy(pipeline, namespace=f"seed{k}")
