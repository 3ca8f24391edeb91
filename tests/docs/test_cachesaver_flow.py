"""The flow that code written for CacheSaver goes through, with the import root changed."""

import json
import os
import sys

import forked

from cachepipe.testing import MockServer, MockSettings

FLOW = """
import asyncio, json, os, sys, warnings
from dataclasses import dataclass
from typing import Any, List

from diskcache import Cache
from together import AsyncTogether

from cachepipe import EvictionDisabled
from cachepipe.pipelines import OnlineAPI
from cachepipe.typedefs import Batch, BatchRequestModel, Request, Response, SingleRequestModel

warnings.simplefilter("ignore", EvictionDisabled)


class OnlineLLM(SingleRequestModel, BatchRequestModel):
    def __init__(self, client: Any, model: str):
        self.client = client
        self.model = model

    async def request(self, request: Request) -> Response:
        completion = await self.client.chat.completions.create(
            messages=[{"role": "user", "content": request.prompt}],
            model=self.model,
            n=request.n,
            max_tokens=request.max_completion_tokens or None,
            temperature=request.temperature or 1,
            stop=request.stop or None,
            top_p=request.top_p or 1,
            seed=request.seed or None,
            logprobs=request.logprobs or False,
        )
        return Response(data=[choice.message.content for choice in completion.choices])

    async def batch_request(self, batch: Batch) -> List[Response]:
        return await asyncio.gather(*[self.request(request) for request in batch.requests])


@dataclass(frozen=True)
class Request(Request):
    temperature: float = 1
    max_completion_tokens: int = None


def show(response):
    print(json.dumps([response.data, response.cached, response.duplicated]))


async def main():
    client = AsyncTogether(api_key="none", base_url=os.environ["MOCK_URL"])
    model = OnlineLLM(client, model="ngram-1")
    life, pets = "What is the meaning of life?", "Cats or dogs?"
    request1 = Request(prompt=life, n=2, request_id="sth1", namespace="sth", max_completion_tokens=10)
    request2 = Request(prompt=pets, n=1, request_id="sth2", namespace="sth", max_completion_tokens=10)
    cache = Cache("caches/developing")
    pipeline = OnlineAPI(model=model, cache=cache, batch_size=2, timeout=1)
    show(await pipeline.request(request1))
    if sys.argv[1] == "all":
        for response in await pipeline.batch_request(Batch(requests=[request1, request2])):
            show(response)
    await pipeline.cleanup()
    assert cache.get("none") is None  # still open: it is the caller's
    await client.close()


asyncio.run(main())
"""


def test_the_flow_in_three_processes(tmp_path):
    """A new process replays the first request, and its repetition in the run is another draw."""
    with MockServer.in_thread(MockSettings(seed=3)) as server:

        def run(part):
            ran = forked.run(
                [sys.executable, "-c", FLOW, part],
                cwd=tmp_path,
                env={**os.environ, "MOCK_URL": server.url},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (ran.stderr, ran.returncode) == ("", 0)
            return [json.loads(line) for line in ran.stdout.splitlines()]

        [[first, *flags]] = run("one")
        assert flags == [[False, False], [False, True]]
        again, repeated, other = run("all")
        assert again == [first, [True, True], [False, True]]
        assert repeated[1:] == [[False, False], [False, True]]
        assert other[1:] == [[False], [False]]
        assert server.stats.samples_generated == 5
        assert run("all") == [
            [first, [True, True], [False, True]],
            [repeated[0], [True, True], [False, True]],
            [other[0], [True], [False]],
        ]
        assert server.stats.samples_generated == 5
