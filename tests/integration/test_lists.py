"""Lists of questions: the missing items of lines that differ in nothing else travel in one call."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace

import openai
import pytest

from cachepipe import MemoryStore
from cachepipe.batch import BatchSettings, Report
from cachepipe.batch.draws import FileDraws
from cachepipe.batch.lines import parse_line
from cachepipe.models import OpenAIModel
from cachepipe.testing import MockServer
from cachepipe.testing.server import Fault

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server():
    async with MockServer() as running:
        yield running


class Lines:
    """Lines of a batch file, each answered on its own as soon as it comes."""

    def __init__(self, model, **settings):
        self._settings = BatchSettings(**settings)
        self._draws = FileDraws(model, MemoryStore(), self._settings, Report())
        self._count = 0

    async def one(self, endpoint, body, name=None):
        """Answer a line; return the response of each of its questions."""
        self._count += 1
        fields = {"custom_id": name, "url": f"/v1{endpoint}", "body": body}
        line = parse_line(json.dumps(fields).encode(), self._count, self._settings)
        [draw] = self._draws.draws(line)
        _, responses = await self._draws.exchange(draw).answered()
        return responses

    async def each(self, lines):
        """Answer lines that come together; return the responses or the error of each."""
        return await asyncio.gather(*(self.one(*line) for line in lines), return_exceptions=True)


@contextlib.asynccontextmanager
async def lines(server, **settings):
    async with OpenAIModel(base_url=server.base_url, api_key="k", max_retries=0) as model:
        yield Lines(model, **settings)


def script(server, *faults):
    server.settings = replace(server.settings, script=faults)


def inputs(texts, name=None, **fields):
    """One line for each text."""
    return [("/embeddings", {"model": "ngram-1-embedding", "input": text, **fields}, name) for text in texts]


def prompts(count=3, **fields):
    """Lines with prompts that may share a call, each of which begins its answers."""
    common = {"model": "m", "max_tokens": 3, "echo": True, **fields}
    return [("/completions", {**common, "prompt": f"{place}:"}) for place in range(count)]


def cached(answers):
    return [flag for responses in answers for response in responses for flag in response.cached]


def texts(answers):
    return [
        [sample.value["choices"][0]["text"] for sample in response.data]
        for responses in answers
        for response in responses
    ]


async def test_lines_share_a_call_and_only_new_questions_are_asked(server):
    async with lines(server) as file:
        await file.each(inputs("abc"))
        answers = await file.each(inputs("cdeb"))
        assert server.stats.requests == 2
        await file.each(inputs("xy") + inputs("w", dimensions=8))
    assert cached(answers) == [True, False, False, True]
    assert server.stats.requests == 4
    assert server.stats.samples_generated == 8


async def test_the_items_of_lists_share_a_call_with_those_of_other_lines(server):
    async with lines(server) as file:
        await file.each(inputs(["a", ["b", "c"], ["c", "d", "a"]]))
    assert [entry.n for entry in server.stats.log] == [4]


async def test_with_ids_each_line_has_a_call_of_its_own(server):
    async with lines(server, ids=True) as file:
        await file.each(inputs("ab", "x") + inputs("c", "y"))
    assert server.stats.requests == 2


async def test_c9_questions_with_schemas_in_another_order_do_not_share_a_call(server):
    schema = {"type": "object", "properties": {"a": {"type": "null"}, "b": {"maximum": 2**70}}}
    turned = {**schema, "properties": {"b": {"maximum": 2**70}, "a": {"type": "null"}}}
    bodies = [
        {"model": "ngram-1", "prompt": prompt, "max_tokens": 3, "guided_json": asked}
        for prompt, asked in [("x", schema), ("y", turned), ("z", schema)]
    ]
    async with lines(server) as file:
        answers = await file.each([("/completions", body) for body in bodies])
    assert cached(answers) == [False] * 3
    assert server.stats.requests == 2


@pytest.mark.parametrize("status", ["400", "413", "422"])
async def test_a_list_that_is_refused_is_halved_until_each_has_failed_alone(server, status):
    async with lines(server) as file:
        script(server, Fault.parse(status))
        assert cached(await file.each(inputs("abcd"))) == [False] * 4
        assert server.stats.requests == 1 + 2
        script(server, *[Fault.parse(status)] * 7)
        failed = await file.each(inputs("efgh"))
        assert [error.status_code for error in failed] == [int(status)] * 4
        assert server.stats.requests == 3 + 1 + 2 + 4
        script(server, Fault(kind="error"))
        failed = await file.each(inputs("ij"))
        assert [type(error) for error in failed] == [openai.InternalServerError] * 2
    assert server.stats.requests == 10 + 1


async def test_a_shared_call_goes_on_while_anyone_waits_and_is_stopped_when_nobody_does(server):
    server.settings = replace(server.settings, paused=True)
    async with lines(server) as file:
        first, second = (asyncio.create_task(file.one(*line)) for line in inputs("ab"))
        await server.until(lambda stats: stats.in_flight == 1)
        first.cancel()
        await asyncio.wait([first])
        server.settings = replace(server.settings, paused=False)
        assert cached([await second]) == [False]
        server.settings = replace(server.settings, paused=True)
        both = [asyncio.create_task(file.one(*line)) for line in inputs("cd")]
        await server.until(lambda stats: stats.in_flight == 1)
        for task in both:
            task.cancel()
        await server.until(lambda stats: stats.in_flight == 0)
        await asyncio.wait(both)


@pytest.mark.parametrize("keep", range(1, 6))
async def test_c4_a_list_that_is_answered_short_is_asked_one_by_one_and_nothing_is_mixed_up(server, keep):
    """Three choices for two samples of each of three prompts may be one of each, or the first three."""
    script(server, Fault(kind="short", keep=keep))
    async with lines(server, n=2) as file:
        answers = await file.each(prompts())
        begun = [[text[:2] for text in own] for own in texts(answers)]
        assert begun == [["0:", "0:"], ["1:", "1:"], ["2:", "2:"]]
        assert [entry.n for entry in server.stats.log] == [6, 2, 2, 2]
        await file.each(prompts())  # items keep travelling alone
    assert [entry.n for entry in server.stats.log][4:] == [2, 2, 2]


async def test_c8_a_list_that_is_answered_with_nothing_is_asked_for_again(server):
    script(server, Fault(kind="short", keep=0))
    async with lines(server, n=2) as file:
        answers = await file.each(prompts())
    assert [len(own) for own in texts(answers)] == [2, 2, 2]
    assert [entry.n for entry in server.stats.log] == [6, 6]


async def test_who_has_left_before_the_list_is_sent_is_not_asked_for(server):
    async with lines(server) as file:
        tasks = [asyncio.ensure_future(file.one(*line)) for line in prompts()]
        await asyncio.sleep(0)  # they have come, and the list is sent a few turns later
        for task in tasks[1:]:
            task.cancel()
        assert cached([await tasks[0]]) == [False]
    assert [entry.n for entry in server.stats.log] == [1]


async def test_a_list_keeps_no_other_waiting(server):
    server.settings = replace(server.settings, paused=True)
    async with lines(server, ids=True) as file:
        slow = asyncio.gather(*(file.one(*line) for line in inputs("ab", "slow")))
        await server.until(lambda stats: stats.in_flight == 1)
        server.settings = replace(server.settings, paused=False)
        quick = await file.each(inputs("cd", "quick"))
        assert cached(quick) == [False, False]
        assert cached(await slow) == [False, False]
    assert server.stats.requests == 2


async def test_prompts_with_a_seed_do_not_share_a_call_with_other_lines(server):
    async with lines(server, n=2) as file:
        assert [len(own) for own in texts(await file.each(prompts(2)))] == [2, 2]
        assert server.stats.requests == 1
        await file.each(prompts(2, seed=1))
    assert server.stats.requests == 3


async def test_the_answer_to_a_long_list_may_be_larger_than_that_of_one_request(server, monkeypatch):
    monkeypatch.setattr("cachepipe.providers.generation.max_answer", lambda: 300)
    async with lines(server) as file:
        assert cached(await file.each(inputs("abc"))) == [False] * 3
    assert server.stats.requests == 1


async def test_no_item_asks_for_more_samples_than_the_server_gives(server):
    server.settings = replace(server.settings, max_n=2)
    async with OpenAIModel(base_url=server.base_url, api_key="k", max_n=2) as model:
        answers = await Lines(model, n=5).each(prompts(1))
    assert [len(own) for own in texts(answers)] == [5]
    assert sorted(entry.n for entry in server.stats.log) == [1, 4]  # the prompt twice in a list, for 2 each
