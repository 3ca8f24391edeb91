"""Frameworks on top of the clients, each in an environment of its own: `nox -s frameworks`.

What is tested is what their users do: the same program, run again in another namespace.
"""

from __future__ import annotations

import asyncio
import importlib.util

import pytest

from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.testing import MockServer, MockSettings

FRAMEWORKS = ("agents", "dspy", "inspect_ai", "instructor", "langchain_openai", "pydantic_ai", "transformers")
collect_ignore = [f"test_{name}.py" for name in FRAMEWORKS if importlib.util.find_spec(name) is None]


@pytest.fixture
def server():
    """A server whose model calls a tool that it is offered, then talks."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=40, uses_tools=True)) as running:
        yield running


@pytest.fixture
def twice(server, tmp_path):
    """A function that runs a program in two namespaces, each time with new clients on one folder.

    The program is given an asynchronous and a synchronous client. What it returns the first time is returned;
    the second time must return the same and ask the server nothing.
    """

    async def once(program, namespace):
        options = {"base_url": server.base_url, "api_key": "k", "cache": tmp_path, "namespace": namespace}
        with OpenAI(**options) as sync:
            async with AsyncOpenAI(**options) as client:
                return await program(client, sync)

    def run(program):
        first = asyncio.run(once(program, "first"))
        asked = server.stats.requests
        assert asked
        assert asyncio.run(once(program, "again")) == first
        assert server.stats.requests == asked
        return first

    return run
