"""Batches of which a part is asked for again, in a process that is killed meanwhile (C7)."""

from __future__ import annotations

import json
import signal
import sys

import forked
import pytest

from cachepipe import DiskStore

SCRIPT = """
import asyncio, json, os, signal, sys
from cachepipe import (
    AsyncBatcher, AsyncCacher, AsyncLimiter, AsyncRetrier, LocalAPI, OrderedLocalAPI, Request,
    RequestReorderer, Response, Service
)

kind, folder, failing = sys.argv[1:]
service = Service("https://host/v1")

class TooMany(Exception):
    status_code = 429
    headers = {"retry-after": "500"}

class Model:
    model = "m"
    asked = []

    async def batch_request(self, batch):
        self.asked += [request.prompt for request in batch]
        return [
            TooMany() if request.prompt == failing else Response([request.prompt + " answered"])
            for request in batch
        ]

def by_hand(model):
    retrier = AsyncRetrier(AsyncLimiter(model, limits=service.flow.limits), retries=service.flow.retries)
    return AsyncCacher(AsyncBatcher(RequestReorderer(retrier), 4), folder)

PIPELINES = {
    "local": lambda model: LocalAPI(model, folder, 4, service=service),
    "ordered": lambda model: OrderedLocalAPI(model, folder, 4, 4, service=service),
    "by hand": by_hand,
}

async def main():
    pipeline = PIPELINES[kind](Model())
    prompts = ["p0", "p1", "p2", "p3"]
    ids = ["10", "9", "2", "1"]
    tasks = [
        asyncio.create_task(pipeline.request(Request(prompt, request_id=id)))
        for prompt, id in zip(prompts, ids)
    ]
    await asyncio.wait(
        [task for prompt, task in zip(prompts, tasks) if prompt != failing], timeout=20
    )
    print(json.dumps([task.result()[:2] if task.done() else None for task in tasks]))
    print(json.dumps(sorted(Model.asked)), flush=True)
    if failing:
        os.kill(os.getpid(), signal.SIGKILL)
    await pipeline.close()

asyncio.run(main())
"""


def run(*arguments):
    """Return the responses' data and flags, what the model was asked, and how the process ended."""
    process = forked.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return *map(json.loads, process.stdout.splitlines()), process.returncode, process.stderr


@pytest.mark.parametrize("kind", ["local", "ordered", "by hand"])
def test_a_process_that_is_killed_while_a_part_waits_has_bought_the_rest_for_good(tmp_path, kind):
    folder = tmp_path / "cache"
    responses, asked, ended, said = run(kind, folder, "p2")
    assert responses == [[[f"p{number} answered"], [False]] if number != 2 else None for number in range(4)]
    assert asked == ["p0", "p1", "p2", "p3"]
    assert ended == -signal.SIGKILL
    assert said == "the provider asks for no calls of model m for 500 seconds\n"

    store = DiskStore(folder)
    assert sum(1 for info in store.keys("") for _ in store.samples(info.key)) == 3
    store.close()

    responses, asked, ended, said = run(kind, folder, "")
    assert responses == [[[f"p{number} answered"], [number != 2]] for number in range(4)]
    assert asked == ["p2"]
    assert (ended, said) == (0, "")
