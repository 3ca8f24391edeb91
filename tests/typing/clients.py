"""What type-checkers make of the clients; mypy and pyright read it, nothing runs it."""

from __future__ import annotations

from typing import assert_type

import anthropic
import groq
import huggingface_hub
import openai
import together
from anthropic.types import Message
from google import genai
from google.genai import types
from openai.types import CreateEmbeddingResponse
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ParsedChatCompletion,
)
from openai.types.responses import Response
from pydantic import BaseModel

import cachepipe
from cachepipe import clients


class Word(BaseModel):
    word: str


async def stand_in_for_the_sdks() -> None:
    first: openai.AsyncOpenAI = clients.AsyncOpenAI(cache="caches/exp", namespace="run-1", timeout=5)
    azure: openai.AsyncAzureOpenAI = clients.AsyncAzureOpenAI(api_version="v", cache="c", azure_endpoint="e")
    second: together.AsyncTogether = clients.AsyncTogether(cache="caches/exp", mode="replay")
    third: anthropic.AsyncAnthropic = clients.AsyncAnthropic(cache="caches/exp", repeat="same")
    one: openai.OpenAI = clients.OpenAI(cache="caches/exp", scope="s", api_key=lambda: "k")
    two: together.Together = clients.Together(cache="caches/exp")
    three: anthropic.Anthropic = clients.Anthropic(cache="caches/exp")
    fourth: groq.AsyncGroq = clients.AsyncGroq(cache="caches/exp", namespace="run-1", timeout=5)
    fifth: openai.AsyncOpenAI = clients.AsyncOpenRouter(cache="caches/exp", organization="o")
    google: genai.Client = clients.Gemini(cache="caches/exp", api_key="k", http_options={"timeout": 5})
    half: genai.client.AsyncClient = clients.AsyncGemini(cache="caches/exp", ordered=True)
    generated = await half.models.generate_content(model="m", contents="hi")
    assert_type(generated, types.GenerateContentResponse)
    assert_type(google.models.generate_content(model="m", contents="hi"), types.GenerateContentResponse)
    assert_type(clients.Gemini(cache="c").in_namespace("b"), clients.Gemini)
    hub: huggingface_hub.AsyncInferenceClient = clients.AsyncHuggingFace("m", cache="c", provider="together")
    spoken = await hub.chat_completion([{"role": "user", "content": "hi"}])
    assert_type(spoken, huggingface_hub.ChatCompletionOutput)
    assert_type(clients.HuggingFace("m", timeout=5).in_namespace("b"), clients.HuggingFace)
    four: groq.Groq = clients.Groq(cache="caches/exp", api_key="k")
    five: openai.OpenAI = clients.VLLM(cache="caches/exp", base_url="http://box/v1")
    for client in (first, azure, second, third, fourth, fifth):
        await client.close()
    for each in (one, two, three, four, five):
        each.close()


async def keep_the_types_of_answers(client: clients.AsyncOpenAI, claude: clients.AsyncAnthropic) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions
    whole = await chat.create(model="m", messages=messages)
    assert_type(whole, ChatCompletion)
    stream = await chat.create(model="m", messages=messages, stream=True)
    assert_type(stream, openai.AsyncStream[ChatCompletionChunk])
    parsed = await chat.parse(model="m", messages=messages, response_format=Word)
    assert_type(parsed, ParsedChatCompletion[Word])
    assert_type(await client.responses.create(model="m", input="hi"), Response)
    assert_type(await client.embeddings.create(model="m", input="hi"), CreateEmbeddingResponse)
    said = await claude.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
    assert_type(said, Message)


def keep_the_types_of_clients(client: clients.OpenAI, plain: openai.AsyncOpenAI) -> None:
    assert_type(client.in_namespace("run-2").in_replicate(3), clients.OpenAI)
    assert_type(client.copy(namespace="run-2", timeout=5), clients.OpenAI)
    assert_type(clients.XAI().with_options(namespace="run-2"), clients.XAI)
    assert_type(client.with_options(max_retries=0, replicate="3", mode="refresh"), clients.OpenAI)
    assert_type(cachepipe.wrap(plain, cache="caches/exp", namespace="run-1", replicate=3), openai.AsyncOpenAI)
    with client as opened:
        assert_type(opened, clients.OpenAI)


def tell_about_answers(client: clients.OpenAI) -> None:
    with cachepipe.using(namespace="run-2", request_id="a", mode="replay"):
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    told = cachepipe.info(answer)
    if told is not None:
        assert_type(told.cached, tuple[bool, ...])


def refuse_what_is_wrong() -> None:
    clients.OpenAI(cache="caches/exp", mode="reed")  # type: ignore[arg-type]
    clients.OpenAI(caches="caches/exp")  # type: ignore[call-arg]
    clients.Ollama(cachedir="caches/exp")  # type: ignore[call-arg]


def refuse_wrong_names() -> None:
    clients.OpenRuter()  # type: ignore[attr-defined]
    cachepipe.OnlinAPI("m")  # type: ignore[attr-defined]
