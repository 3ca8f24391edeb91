"""openai-agents: its models take our client."""

from __future__ import annotations

import agents
import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from pydantic import BaseModel

agents.set_tracing_disabled(disabled=True)


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def agent(request):
    """A function that makes an agent on a client."""

    def make(client, **options):
        return Agent(name="agent", model=request.param(model="m", openai_client=client), **options)

    return make


def test_chat(twice, agent):
    async def program(client, _):
        return (await Runner.run(agent(client, instructions="Be brief."), "Write a function.")).final_output

    assert twice(program)


def test_a_tool_is_called(twice, agent):
    calls = []

    @function_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        calls.append(city)
        return "sunny"

    async def program(client, _):
        return (await Runner.run(agent(client, tools=[weather]), "What is the weather?")).final_output

    assert twice(program)
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_a_structured_output(twice, agent):
    async def program(client, _):
        return (await Runner.run(agent(client, output_type=City), "Name a city.")).final_output

    assert isinstance(twice(program), City)


def test_a_stream(twice, agent):
    @function_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"sunny in {city}"

    async def program(client, _):
        result = Runner.run_streamed(agent(client, tools=[weather]), "What is the weather?")
        kinds = {event.item.type async for event in result.stream_events() if hasattr(event, "item")}
        return sorted(kinds), result.final_output

    kinds, text = twice(program)
    assert kinds == ["message_output_item", "tool_call_item", "tool_call_output_item"]
    assert text
