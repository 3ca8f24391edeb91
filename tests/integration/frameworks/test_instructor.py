"""instructor: `from_openai` takes our clients."""

from __future__ import annotations

import instructor
import pytest
from pydantic import BaseModel

ASK = {"model": "m", "messages": [{"role": "user", "content": "Name a city."}]}


class City(BaseModel):
    name: str
    people: int


def test_chat(twice):
    async def program(client, sync):
        text = await instructor.from_openai(client).chat.completions.create(response_model=None, **ASK)
        other = instructor.from_openai(sync).chat.completions.create(
            response_model=None, temperature=0.5, **ASK
        )
        return text.choices[0].message.content, other.choices[0].message.content

    assert all(twice(program))


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_structured_outputs_by_a_tool_and_by_schema(twice, mode):
    async def program(client, sync):
        first = await instructor.from_openai(client, mode=mode).create(response_model=City, **ASK)
        patched = instructor.from_openai(sync, mode=mode)
        second = patched.create(response_model=City, temperature=0.5, **ASK)
        assert isinstance(first, City)
        assert isinstance(second, City)
        return first.model_dump(), second.model_dump()  # their classes are made for the call

    twice(program)


def test_an_answer_comes_with_its_completion(twice):
    async def program(client, _):
        patched = instructor.from_openai(client)
        city, completion = await patched.create_with_completion(response_model=City, **ASK)
        assert completion.choices[0].message.tool_calls
        return city.model_dump(), completion

    twice(program)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_streams_of_partial_objects(twice, mode):
    async def program(client, sync):
        parts = [
            part
            async for part in instructor.from_openai(client, mode=mode).create_partial(
                response_model=City, **ASK
            )
        ]
        patched = instructor.from_openai(sync, mode=mode)
        others = list(patched.create_partial(response_model=City, temperature=0.5, **ASK))
        return City(**parts[-1].model_dump()), City(**others[-1].model_dump())

    twice(program)
