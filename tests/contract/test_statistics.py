"""Cached samples follow the model's own distribution; caches with two well-known faults do not.

The model is the embedded one, whose distribution is known exactly; a nonce in the prompt, which it
ignores, makes many different questions with one distribution. Seeds are fixed, so nothing is left
to chance.
"""

from __future__ import annotations

import asyncio
import collections

import pytest
from scipy.stats import chisquare

from cachepipe import MemoryStore, OnlineAPI, Request
from cachepipe.cache import drawing
from cachepipe.testing import NGramModel
from cachepipe.testing.models import ScriptedModel
from cachepipe.testing.ngram import END, flatten, generator

pytestmark = pytest.mark.anyio

CHAT = "Write a function that sorts a list of strings."
QUESTIONS = 150
PER_QUESTION = 16
NGRAM = NGramModel()


def prompt(number):
    return flatten([{"role": "user", "content": f"[nonce: {number}] {CHAT}"}])


def truth():
    table = NGRAM.distribution(prompt(0))
    return {"" if token == END else token: probability for token, probability in table.items()}


def first_token_model(**options):
    """Return a model whose samples are first tokens; each call draws from a seed of its own."""
    calls = iter(range(10**9))

    def step(request):
        dice = generator("statistics", request.prompt, next(calls))
        return [NGRAM.sample(request.prompt, dice, max_tokens=1).text for _ in range(request.n)]

    return ScriptedModel(step, cache_scope="ngram", **options)


def p_value(samples):
    """Return how likely samples this far from the model's distribution are, rare tokens put together."""
    expected = truth()
    counts = collections.Counter(samples)
    assert set(counts) <= set(expected), "a sample that the model cannot have made"
    common = [token for token, probability in expected.items() if probability * len(samples) >= 5]
    observed = [counts[token] for token in common]
    shares = [expected[token] * len(samples) for token in common]
    if len(common) < len(expected):
        observed.append(len(samples) - sum(observed))
        shares.append(len(samples) - sum(shares))
    return chisquare(observed, shares).pvalue


async def drawn_one_by_one(pipeline):
    samples = []
    for number in range(QUESTIONS):
        for _ in range(PER_QUESTION):
            samples += (await pipeline.request(Request(prompt(number)))).data
    return samples


async def test_c1_samples_within_a_namespace_follow_the_model(store):
    model = first_token_model()
    async with OnlineAPI(model, store) as pipeline:
        others = [
            asyncio.create_task(pipeline.request(Request(prompt(number), n=3, namespace="other")))
            for number in range(QUESTIONS)
        ]
        await asyncio.gather(*others)
        samples = await drawn_one_by_one(pipeline)
    assert model.generated == QUESTIONS * PER_QUESTION
    assert p_value(samples) > 0.01


async def test_c1_the_test_fails_when_samples_are_reused_within_a_namespace():
    """The mutant is a cache that answers a repeated question with the sample that it has."""
    async with OnlineAPI(first_token_model(), MemoryStore(), repeat="same") as mutant:
        assert p_value(await drawn_one_by_one(mutant)) < 1e-6


def latency(sample):
    """Return when a call ends, in virtual time: the longer the answer, the later."""
    return len(sample)


async def few_of_a_list(store):
    """Fill lists with calls that end shortest answer first; return what a second namespace draws."""
    model = first_token_model(max_n=1, hold=True)
    samples = []
    async with OnlineAPI(model, store) as pipeline:
        for number in range(QUESTIONS * 4):
            task = asyncio.create_task(pipeline.request(Request(prompt(number), n=4, namespace="many")))
            calls = (await model.begun(4 * number + 4))[-4:]
            for call in sorted(calls, key=lambda call: latency(call.step[0])):
                call.release()
                await call.over()
            await task
            samples += (await pipeline.request(Request(prompt(number), namespace="few"))).data
    assert model.generated == QUESTIONS * 16
    return samples


async def test_c5_a_namespace_that_draws_few_sees_the_model_without_bias():
    assert p_value(await few_of_a_list(MemoryStore())) > 0.01


async def test_c5_the_test_fails_on_lists_in_order_of_completion(monkeypatch):
    """The mutant gives each sample that arrives the lowest index that still waits for one."""
    deliver = drawing.DrawDemand.deliver

    def in_order_of_completion(self, slots, values, call):
        open_slots = sorted(self.drawing.state.making)
        deliver(self, open_slots[: len(values)], values, call)

    def store_at_once(self, slots, values, call):
        in_order_of_completion(self, slots, values, call)
        self.drawing.state.making.difference_update(sorted(self.drawing.state.making)[: len(values)])

    monkeypatch.setattr(drawing.DrawDemand, "deliver", store_at_once)
    assert p_value(await few_of_a_list(MemoryStore())) < 1e-6
