"""langchain-openai: ChatOpenAI takes our clients, and what of theirs it calls."""

from __future__ import annotations

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    people: int


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"sunny in {city}"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request):
    """A function that makes a model on a pair of clients."""

    def make(client, sync, **options):
        return ChatOpenAI(
            model="m",
            api_key="unused",
            client=sync.chat.completions,
            async_client=client.chat.completions,
            root_client=sync,
            root_async_client=client,
            use_responses_api=request.param,
            **options,
        )

    return make


def test_chat(twice, model):
    async def program(*clients):
        llm = model(*clients)
        return llm.invoke("Write a function.").text, (await llm.ainvoke("Write another.")).text

    assert all(twice(program))


def test_a_tool_is_called(twice, model):
    async def program(*clients):
        llm = model(*clients).bind_tools([weather])
        talk = [HumanMessage("What is the weather?")]
        talk.append(await llm.ainvoke(talk))
        (call,) = talk[-1].tool_calls
        talk.append(ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]))
        return call, (await llm.ainvoke(talk)).text

    call, text = twice(program)
    assert call["name"] == "weather"
    assert text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_outputs(twice, model, method):
    async def program(*clients):
        llm = model(*clients).with_structured_output(City, method=method)
        return llm.invoke("Name a city."), await llm.ainvoke("Name another.")

    assert all(isinstance(city, City) for city in twice(program))


def test_streams(twice, model):
    async def program(*clients):
        llm = model(*clients)
        parts = [part.text for part in llm.stream("Write a function.")]
        others = [part.text async for part in llm.astream("Write another.")]
        calls = [part async for part in llm.bind_tools([weather]).astream("What is the weather?")]
        whole = calls[0]
        for part in calls[1:]:
            whole += part
        return "".join(parts), "".join(others), whole.tool_calls

    text, other, calls = twice(program)
    assert text
    assert other
    assert calls[0]["name"] == "weather"


def test_a_crowd(twice, model):
    async def program(*clients):
        answers = await model(*clients).abatch([f"Write function {i % 5}." for i in range(20)])
        return [answer.text for answer in answers]

    assert len(twice(program)) == 20


def test_embeddings(twice):
    async def program(client, sync):
        made = OpenAIEmbeddings(
            model="m",
            api_key="unused",
            client=sync.embeddings,
            async_client=client.embeddings,
            check_embedding_ctx_length=False,
        )
        return made.embed_query("one"), await made.aembed_documents(["one", "two"])

    one, both = twice(program)
    assert both[0] == one
