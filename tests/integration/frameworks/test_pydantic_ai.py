"""pydantic-ai: its provider takes our client."""

from __future__ import annotations

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def agent(request):
    """A function that makes an agent on a client."""

    def make(client, **options):
        return Agent(request.param("m", provider=OpenAIProvider(openai_client=client)), **options)

    return make


def test_chat(twice, agent):
    async def program(client, _):
        chat = agent(client, instructions="Be brief.")
        first = await chat.run("Write a function.")
        second = await chat.run("And another one.", message_history=first.all_messages())
        return first.output, second.output

    assert all(twice(program))


def test_a_tool_is_called(twice, agent):
    calls = []

    async def program(client, _):
        worker = agent(client)

        @worker.tool_plain
        def weather(city: str) -> str:
            """Tell the weather."""
            calls.append(city)
            return "sunny"

        return (await worker.run("What is the weather?")).output

    assert twice(program)
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_a_tool_then_a_structured_output(twice, agent, server):
    async def program(client, _):
        worker = agent(client, output_type=City)
        worker.tool_plain(weather)
        return (await worker.run("Name a city.")).output

    def weather(place: str) -> str:
        return f"sunny in {place}"

    assert isinstance(twice(program), City)
    assert server.stats.requests == 2


def test_a_structured_output_by_schema(twice, agent):
    async def program(client, _):
        return (await agent(client, output_type=NativeOutput(City)).run("Name a city.")).output

    assert isinstance(twice(program), City)


def test_streams(twice, agent):
    async def program(client, _):
        async with agent(client).run_stream("Write a function.") as result:
            parts = [part async for part in result.stream_text(delta=True, debounce_by=None)]
        async with agent(client, output_type=City).run_stream("Name a city.") as result:
            cities = [city async for city in result.stream_output(debounce_by=None)]
        return "".join(parts), cities[-1]

    text, city = twice(program)
    assert text
    assert isinstance(city, City)
