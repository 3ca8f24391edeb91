"""The doors of the cache: every client, how it is called in each way, and what its SDK cannot.

The tests of the clients try each cell of this table, and ``tests/stubs.py`` writes it into docs/providers.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from cachepipe import Response, clients, wire
from cachepipe.contract.keys import provider_question
from cachepipe.models.local import AsyncLocalClient, LocalClient
from cachepipe.models.samples import ProviderSamples, fields_of
from cachepipe.providers import presets

KEY = "hf_none-of-anybody"
"""The API key; it is stored nowhere."""
NONE = "no such method"
SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "word", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


class Word(BaseModel):
    word: str


class Way(NamedTuple):
    """One way to ask an SDK.

    Attributes:
        cell: what the documentation says of it.
        method: the path of the method; None if it is a parameter that the SDK does not have.
        arguments: returns the arguments for a prompt; None if the SDK has no such method.
        streamed: the method and the arguments, beside the others, that ask for a stream; None without one.
    """

    cell: str
    method: str
    arguments: Callable[[str], dict[str, Any]] | None = None
    streamed: tuple[str, dict[str, Any]] | None = None


def _messages(prompt):
    return [{"role": "user", "content": prompt}]


def _chat(model="m", **more):
    return lambda prompt: {**({"model": model} if model else {}), "messages": _messages(prompt), **more}


def _openai_ways(chat="chat.completions.create", model="m", cells=()):
    """The ways of the SDKs that are like OpenAI's."""
    streamed = chat, {"stream": True}
    tools = {"tools": [TOOL], "tool_choice": "required"}
    ways = {
        "chat": Way(f"`{chat}`", chat, _chat(model), streamed),
        "`n` above 1": Way("yes", chat, _chat(model, n=2), streamed),
        "tool calls": Way("`tools`", chat, _chat(model, **tools), streamed),
        "structured output": Way("`response_format`", chat, _chat(model, response_format=FORMAT), streamed),
    }
    return {**ways, **dict(cells)}


def _embeddings(model="m"):
    return lambda prompt: {"model": model, "input": [prompt, "river"]}


def _text(prompt):
    return {"model": "m", "prompt": prompt}


_COMPLETIONS = Way(
    "`completions.create`", "completions.create", _text, ("completions.create", {"stream": True})
)
_MODERATIONS = Way("`moderations.create`", "moderations.create")  # the mock server has none
_NO_RESPONSES = Way(NONE, "responses.create")

OPENAI = _openai_ways(
    cells={
        "structured output": Way(
            "`parse`, `stream`, `response_format`",
            "chat.completions.parse",
            _chat(response_format=Word),
            ("chat.completions.stream", {}),
        ),
        "responses": Way(
            "`responses.create`, `parse`, `stream`",
            "responses.create",
            lambda prompt: {"model": "m", "input": prompt},
            ("responses.create", {"stream": True}),
        ),
        "text": _COMPLETIONS,
        "embeddings": Way("`embeddings.create`", "embeddings.create", _embeddings()),
        "moderations": _MODERATIONS,
    }.items()
)
TOGETHER = _openai_ways(
    cells={
        "responses": _NO_RESPONSES,
        "text": _COMPLETIONS,
        "embeddings": Way("`embeddings.create`", "embeddings.create", _embeddings()),
        "moderations": Way(NONE, "moderations.create"),
    }.items()
)
GROQ = _openai_ways(
    cells={
        "`n` above 1": Way("yes, in calls of one", "chat.completions.create", _chat(n=2)),
        "responses": _NO_RESPONSES,
        "text": Way(NONE, "completions.create"),
        "embeddings": Way("`embeddings.create`", "embeddings.create", _embeddings()),
        "moderations": Way(NONE, "moderations.create"),
    }.items()
)
_MESSAGE = "messages.create", {"stream": True}


def _message(**more):
    return lambda prompt: {"model": "m", "max_tokens": 60, "messages": _messages(prompt), **more}


ANTHROPIC = {
    "chat": Way("`messages.create`, `stream`", "messages.create", _message(), _MESSAGE),
    "`n` above 1": Way("no such parameter", "messages.create n"),
    "tool calls": Way(
        "`tools`",
        "messages.create",
        _message(tools=[{"name": "look_up", "input_schema": SCHEMA}], tool_choice={"type": "any"}),
        _MESSAGE,
    ),
    "structured output": Way(
        "`parse`, `stream`",
        "messages.parse",
        _message(output_format=Word),
        ("messages.stream", {}),
    ),
    "responses": _NO_RESPONSES,
    "text": Way("not cached", "completions.create"),
    "embeddings": Way(NONE, "embeddings.create"),
    "moderations": Way(NONE, "moderations.create"),
}
_CONTENT, _CONTENTS = "models.generate_content", ("models.generate_content_stream", {})
_FUNCTION = {"name": "look_up", "parameters_json_schema": SCHEMA}
_ANY = {"function_calling_config": {"mode": "ANY"}}


def _content(**config):
    return lambda prompt: {"model": "m", "contents": prompt, "config": config or None}


GEMINI = {
    "chat": Way("`generate_content`, `chats`", _CONTENT, _content(), _CONTENTS),
    "`n` above 1": Way("`candidate_count`", _CONTENT, _content(candidate_count=2), _CONTENTS),
    "tool calls": Way(
        "`tools`, functions",
        _CONTENT,
        _content(tools=[{"function_declarations": [_FUNCTION]}], tool_config=_ANY),
        _CONTENTS,
    ),
    "structured output": Way(
        "`response_schema`",
        _CONTENT,
        _content(response_mime_type="application/json", response_schema=Word),
        _CONTENTS,
    ),
    "responses": Way("`interactions`: not cached", "responses.create"),
    "text": Way(NONE, "completions.create"),
    "embeddings": Way(
        "`embed_content`",
        "models.embed_content",
        lambda prompt: {"model": "m", "contents": [prompt, "river"]},
    ),
    "moderations": Way(NONE, "moderations.create"),
}
HUB = {
    **_openai_ways("chat_completion", model=None),
    "responses": _NO_RESPONSES,
    "text": Way(
        "`text_generation`",
        "text_generation",
        lambda prompt: {"prompt": prompt},
        ("text_generation", {"stream": True}),
    ),
    "embeddings": Way(
        "`feature_extraction`", "feature_extraction", lambda prompt: {"text": [prompt, "river"]}
    ),
    "moderations": Way(NONE, "moderations.create"),
}
_LOCAL_CHAT = _openai_ways(model=None)
LOCAL = {
    "chat": _LOCAL_CHAT["chat"],
    "`n` above 1": _LOCAL_CHAT["`n` above 1"],
    "tool calls": Way("no such parameter", "tools"),
    "structured output": Way("no such parameter", "response_format"),
    "responses": _NO_RESPONSES,
    "text": Way(
        "`completions.create`, `generate`",
        "completions.create",
        lambda prompt: {"prompt": prompt},
        ("completions.create", {"stream": True}),
    ),
    "embeddings": Way(NONE, "embeddings.create"),
    "moderations": Way(NONE, "moderations.create"),
}


class Counting(ProviderSamples):
    """Stands for a model on this machine; each sample is a number of its own."""

    cache_scope = name = "counting"

    def __init__(self):
        self.samples = 0

    def question(self, request, scope=None):
        body = {"prompt": request.prompt, **fields_of(request)}
        return provider_question(scope or self.cache_scope, {"body": body})

    def present(self, sample):
        return sample

    async def batch_request(self, batch):
        return [Response([self._sample(request, place) for place in range(request.n)]) for request in batch]

    def _sample(self, request, place):
        self.samples += 1
        text = f"This is {self.samples}."
        chat = not isinstance(request.prompt, str)
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        sample = {
            "id": "local-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": self.name,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
        }
        return wire.marked(sample) if place else sample


@dataclasses.dataclass(frozen=True)
class Door:
    """A client.

    Attributes:
        name: the name of the class in `cachepipe.clients`.
        column: its column in the documentation.
        ways: the ways to ask it.
        sdk: the module of the SDK; None for a model on this machine.
        plain: the name of the SDK's class.
        kind: the kind of upstream with which the proxy serves it.
        place: what follows the server's URL in its base URL.
        mount: the end of its base URL that the proxy's URL has too.
    """

    name: str
    column: str
    ways: Mapping[str, Way]
    sdk: str | None
    plain: str
    kind: str = "openai"
    place: str = "/v1"
    mount: str = "/v1"

    def made(self, url, *, asynchronous, plain=False, timeout=None, **options):
        """Return a client, or one of the SDK's, on a server or proxy with a URL."""
        prefix = "Async" if asynchronous else ""
        if self.sdk is None:
            return (AsyncLocalClient if asynchronous else LocalClient)(Counting(), **options)
        module = importlib.import_module(self.sdk) if plain else clients
        kind = getattr(module, f"{prefix}{self.plain if plain else self.name}", None)
        waits = {} if timeout is None else {"timeout": timeout}
        once = {} if "service" in options else {"max_retries": 0}
        if self.kind == "gemini":
            http = {"base_url": url, **{name: int(1000 * value) for name, value in waits.items()}}
            if plain:
                client = module.Client(api_key=KEY, http_options=http)
                return client.aio if asynchronous else client
            return kind(api_key=KEY, http_options=http, **options)
        if self.sdk == "huggingface_hub":
            return kind(url, token=KEY, **waits, **options)
        if self.plain == "AzureOpenAI":
            azure = {"azure_endpoint": url, "api_version": "v"}
            return kind(**azure, api_key=KEY, **once, **waits, **options)
        return kind(base_url=url, api_key=KEY, **once, **waits, **options)


_COMPATIBLE = "OpenAI, Azure, compatible"
_TOGETHERS = "/v1" if importlib.metadata.version("together").startswith("2.") else ""
"""The end of the base URL in version 2 of Together's SDK; version 3 has it in its paths."""
DOORS = {
    door.name: door
    for door in (
        Door("OpenAI", _COMPATIBLE, OPENAI, "openai", "OpenAI"),
        Door("AzureOpenAI", _COMPATIBLE, OPENAI, "openai", "AzureOpenAI", place="", mount=""),
        *(
            Door(name, _COMPATIBLE, OPENAI, "openai", "OpenAI")
            for name in presets.compatible()
            if not name.startswith("Async")
        ),
        Door("Together", "Together", TOGETHER, "together", "Together", place=_TOGETHERS, mount=_TOGETHERS),
        Door("Groq", "Groq", GROQ, "groq", "Groq", place="", mount=""),
        Door("Anthropic", "Anthropic", ANTHROPIC, "anthropic", "Anthropic", "anthropic", "", ""),
        Door("Gemini", "Gemini", GEMINI, "google.genai", "Client", "gemini", "", ""),
        Door("HuggingFace", "Hugging Face", HUB, "huggingface_hub", "InferenceClient", place="", mount=""),
        Door("HFTransformers", "HFTransformers", LOCAL, None, ""),
    )
}
OTHERS = {
    "not cached": dict.fromkeys(
        (_COMPATIBLE, "Together", "Groq", "Anthropic"), "audio, images, files, batches, models"
    )
    | {
        "Gemini": "files, caches, batches, images, videos, live, `interactions`, Vertex's `predict`",
        "Hugging Face": "all other tasks",
        "HFTransformers": "all is cached",
    },
    "raw responses": dict.fromkeys(
        (_COMPATIBLE, "Together", "Groq", "Anthropic"), "`with_raw_response`, `with_streaming_response`"
    )
    | {
        "Gemini": "`should_return_http_response`",
        "Hugging Face": NONE,
        "HFTransformers": "there is no response",
    },
    "copies": dict.fromkeys((_COMPATIBLE, "Together", "Groq", "Anthropic"), "`copy`, `with_options`")
    | {"Gemini": "`copy`", "Hugging Face": "`copy`", "HFTransformers": "`in_namespace`"},
    "time-outs, retries, errors": dict.fromkeys(
        (_COMPATIBLE, "Together", "Groq", "Anthropic", "Gemini", "Hugging Face"), "the SDK's own"
    )
    | {"HFTransformers": "errors of transformers"},
    "`cachepipe.wrap` of a client": {
        _COMPATIBLE: "yes",
        "Together": "version 2 and later",
        "Groq": "yes",
        "Anthropic": "not Bedrock, Vertex",
        "Gemini": "yes, also of its `aio`",
        "Hugging Face": "yes",
        "HFTransformers": "`TransformersModel(model, …)`",
    },
    "through the proxy": dict.fromkeys(
        (_COMPATIBLE, "Together", "Groq", "Anthropic", "Gemini", "Hugging Face"), "yes"
    )
    | {"HFTransformers": "there is no server"},
}
"""The rows of the documentation that are no ways to ask, by column."""


def table():
    """Return the table of the documentation."""
    columns = list(dict.fromkeys(door.column for door in DOORS.values()))
    ways = {door.column: door.ways for door in DOORS.values()}
    rows = [("", columns)]
    rows += [(name, [ways[column][name].cell for column in columns]) for name in OPENAI]
    rows.insert(2, ("streams", ["yes"] * len(columns)))
    rows += [(name, [cells[column] for column in columns]) for name, cells in OTHERS.items()]
    lines = [f"| {' | '.join([name, *cells])} |".replace("|  |", "| |") for name, cells in rows]
    return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])


# Asking.


async def settled(value):
    return await value if inspect.isawaitable(value) else value


async def listed(stream):
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


def found(client, path):
    """Return a method of a client by its path, or None."""
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), client)


async def asked(client, way, prompt, *, stream=False):
    """Ask in one way; return the answer, or the parts of its stream."""
    path, more = way.streamed if stream else (way.method, {})
    answer = await settled(found(client, path)(**way.arguments(prompt), **more))
    if hasattr(answer, "__aenter__") and not hasattr(answer, "response"):  # the manager of a stream
        async with answer as opened:
            return await _helped(opened)
    if hasattr(answer, "__enter__") and not hasattr(answer, "response"):
        with answer as opened:
            return await _helped(opened)
    is_stream = hasattr(answer, "__aiter__") or inspect.isgenerator(answer) or hasattr(answer, "__next__")
    return await listed(answer) if is_stream else answer


async def _helped(stream):
    """Return the answer that a helper of an SDK has assembled of a stream."""
    await listed(stream)
    names = ("get_final_completion", "get_final_response", "get_final_message")
    final = next(getattr(stream, name) for name in names if hasattr(stream, name))
    return await settled(final())


def told(answer):
    """Return what an answer says: of each sample, its text, its calls of tools or its vector."""
    if hasattr(answer, "tolist"):
        return answer.tolist()
    if isinstance(answer, str):
        return [answer]
    if isinstance(answer, list):
        return _told_in_parts(answer)
    for name, field in (("embeddings", "values"), ("data", "embedding")):
        if getattr(answer, name, None):
            return [list(getattr(item, field)) for item in getattr(answer, name)]
    if hasattr(answer, "output"):
        return [answer.output_text]
    if hasattr(answer, "candidates"):
        return [_content_of([candidate]) for candidate in answer.candidates]
    if hasattr(answer, "choices"):
        return [_said([getattr(choice, "message", choice)]) for choice in answer.choices]
    return [_blocks(answer.content)]


def _told_in_parts(parts):
    if isinstance(parts[0], str):
        return ["".join(parts)]
    if hasattr(parts[-1], "response") and hasattr(parts[0], "sequence_number"):
        return told(parts[-1].response)
    if hasattr(parts[0], "message"):  # Anthropic's events
        return [_events(parts)]
    by_index = {}
    name = "candidates" if hasattr(parts[0], "candidates") else "choices"
    for choice in (choice for part in parts for choice in getattr(part, name) or ()):
        by_index.setdefault(choice.index or 0, []).append(choice)
    if name == "candidates":
        return [_content_of(by_index[index]) for index in sorted(by_index)]
    return [
        _said([getattr(choice, "delta", None) or choice for choice in by_index[index]])
        for index in sorted(by_index)
    ]


def _said(messages):
    """Return the text of messages or deltas, or the call of a tool in them."""
    calls = [call for message in messages for call in getattr(message, "tool_calls", None) or ()]
    if not calls:
        return "".join(
            getattr(each, "content", None) or getattr(each, "text", None) or "" for each in messages
        )
    functions = [call["function"] if isinstance(call, Mapping) else call.function for call in calls]
    functions = [each if isinstance(each, Mapping) else vars(each) for each in functions]
    return functions[0]["name"], json.loads("".join(each["arguments"] or "" for each in functions))


def _content_of(candidates):
    parts = [part for each in candidates for part in (each.content and each.content.parts) or ()]
    calls = [part.function_call for part in parts if part.function_call]
    return (calls[0].name, calls[0].args) if calls else "".join(part.text or "" for part in parts)


def _blocks(blocks):
    calls = [block for block in blocks if block.type == "tool_use"]
    return (calls[0].name, calls[0].input) if calls else "".join(block.text for block in blocks)


def _events(events):
    names = [
        event.content_block.name for event in events if hasattr(getattr(event, "content_block", 0), "name")
    ]
    deltas = [event.delta for event in events if hasattr(event, "delta")]
    if names:
        return names[0], json.loads("".join(getattr(delta, "partial_json", "") for delta in deltas))
    return "".join(getattr(delta, "text", "") for delta in deltas)


# The same in a new process.


async def said_by_all(url, folder, *names):
    """Ask doors in all ways that their SDKs have, in namespace a; return what they say, as JSON has it."""
    said = {}
    for door in map(DOORS.__getitem__, names):
        client = door.made(url + door.place, asynchronous=False, cache=folder, namespace="a")
        for name, way in door.ways.items():
            for stream in (False, True):
                where = placed(client, way, url)
                if way.arguments is None or found(where, way.method) is None:
                    continue
                if way.streamed or not stream:
                    answer = await asked(where, way, f"{door.name}, {name}", stream=stream)
                    said[f"{door.name}, {name}, {stream}"] = told(answer)
        client.close()
    return json.dumps(said)


def placed(client, way, url):
    """Return a client where its server does a task: at Hugging Face, the URL says which one it is."""
    paths = {"chat_completion": "/v1", "text_generation": "/models/m", "feature_extraction": "/embed"}
    path = paths.get(way.method)
    if path is None:
        return client
    if hasattr(client, "_cachepipe"):
        return client.copy(model=url + path)
    twin = object.__new__(type(client))
    vars(twin).update({**vars(client), "model": url + path})
    return twin


if __name__ == "__main__":
    print(asyncio.run(said_by_all(*sys.argv[1:])))  # noqa: T201 - the test reads it
