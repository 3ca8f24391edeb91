"""Ids that differ in each run are noticed, and long streaks of hits leave the loop to others."""

from __future__ import annotations

import asyncio
import random
import warnings

import pytest

import cachepipe
from cachepipe import FreshIds, OnlineAPI, Request
from cachepipe.testing.models import ScriptedModel

pytestmark = pytest.mark.anyio


async def ask_all(pipeline, ids, keys=40):
    for number in range(keys):
        for request_id in ids(number):
            await pipeline.request(Request(f"p{number}", request_id=request_id))


def noticed(caught):
    return sum(issubclass(warning.category, FreshIds) for warning in caught)


async def test_ids_that_are_new_in_each_run_are_noticed_once(store):
    """Such as those made from hash(str): every draw is new on a question that was drawn before."""
    dice = random.Random(7)
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await ask_all(pipeline, lambda _: [f"{dice.getrandbits(64):x}"])
            assert noticed(caught) == 0, "nothing was drawn before"
            with cachepipe.run():
                await ask_all(pipeline, lambda _: [f"{dice.getrandbits(64):x}"])
                await ask_all(pipeline, lambda _: [f"{dice.getrandbits(64):x}"])
            assert noticed(caught) == 1
            with cachepipe.run():
                await ask_all(pipeline, lambda _: [f"{dice.getrandbits(64):x}"])
            assert noticed(caught) == 2, "once in each run"


async def test_replicates_within_one_run_are_no_reason_for_a_warning(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await ask_all(pipeline, lambda _: ["r0", "r1", "r2"])
        with cachepipe.run():
            await ask_all(pipeline, lambda _: ["r0", "r1", "r2"])


async def test_one_more_replicate_in_a_rerun_is_no_reason_for_a_warning(store):
    """Three of four draws of that run are hits, so most of its ids are not new."""
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await ask_all(pipeline, lambda _: ["r0", "r1", "r2"])
        with cachepipe.run():
            await ask_all(pipeline, lambda _: ["r0", "r1", "r2", "r3"])


async def test_another_namespace_with_ids_of_its_own_is_no_reason_for_a_warning(store):
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await ask_all(pipeline, lambda _: ["r0"])
        with cachepipe.run():
            for number in range(40):
                await pipeline.request(Request(f"p{number}", request_id="other", namespace="b"))


async def test_hits_one_after_another_do_not_starve_the_loop(store):
    """Somebody else gets a turn now and then, though a hit itself never waits."""
    async with OnlineAPI(ScriptedModel(), store) as pipeline:
        await pipeline.request(Request("p"))
        turns = 0

        async def other():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.create_task(other())
        for _ in range(2000):
            with cachepipe.run():
                await pipeline.request(Request("p"))
        task.cancel()
        await asyncio.wait([task])
    assert turns >= 4
