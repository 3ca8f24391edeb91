"""A crowd of threads and of tasks on one cache folder, and its rerun in another process."""

from __future__ import annotations

import json
import sys

import forked
from profiles import sized

from cachepipe.testing import MockServer, MockSettings

CROWD = '''
import asyncio, json, sys, threading
from concurrent.futures import ThreadPoolExecutor
import cachepipe
from cachepipe.clients import AsyncOpenAI, OpenAI

url, folder, calls, *namespaces = sys.argv[1:]
CALLS, THREADS = int(calls), 8
at = {"base_url": url, "api_key": "k", "cache": folder, "max_retries": 0}


def about(number):
    """Every prompt is asked twice, under ids of its own; three of four calls are streamed or want two."""
    content = f"Question {number // 2}: write a function."
    return {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "n": 1 + number % 3 // 2,
        "stream": number % 4 == 0,
    }


def told(chunks):
    texts = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return [texts[index] for index in sorted(texts)]


def texts(answer):
    return [choice.message.content for choice in answer.choices]


def ask(client, number):
    with cachepipe.using(request_id=str(number)):
        answer = client.chat.completions.create(**about(number))
        return told(answer) if number % 4 == 0 else texts(answer)


async def aask(client, number):
    with cachepipe.using(request_id=str(number)):
        answer = await client.chat.completions.create(**about(number))
    return told([chunk async for chunk in answer]) if number % 4 == 0 else texts(answer)


async def loop(namespace):
    async with AsyncOpenAI(**at, namespace=namespace) as client:
        return await asyncio.gather(*(aask(client, number) for number in range(1, CALLS, 2)))


def crowd(namespace):
    clients = [OpenAI(**at, namespace=namespace) for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS + 1) as pool:
        others = pool.submit(asyncio.run, loop(namespace))
        own = list(pool.map(lambda number: ask(clients[number // 2 % THREADS], number), range(0, CALLS, 2)))
        answers = [own, others.result()]
    for client in clients:
        client.close()
    return answers


print(json.dumps([crowd(namespace) for namespace in namespaces]))
'''


def test_a_crowd_of_threads_and_tasks_is_answered_the_same_in_another_process(tmp_path):
    count, folder = sized(80, 200), str(tmp_path / "cache")
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=8)) as server:

        def crowds(*namespaces):
            ran = forked.run(
                [sys.executable, "-c", CROWD, server.base_url, folder, str(count), *namespaces],
                check=False,
                capture_output=True,
                text=True,
                timeout=110,
            )
            assert (ran.returncode, ran.stderr) == (0, "")
            return json.loads(ran.stdout)

        [first] = crowds("first")
        paid = server.stats.samples_generated
        calls = server.stats.requests
        assert crowds("second", "first") == [first, first]
        assert server.stats.requests == calls
    wanted = sum(1 + number % 3 // 2 for number in range(count))
    assert paid == wanted == sum(len(answer) for half in first for answer in half)
