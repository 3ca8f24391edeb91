"""DSPy: its engines send their requests through a transport, which an SDK's client with a cache can be.

`dspy.LM` takes no client: it copies its options deeply. An engine it takes as it is, and the native engine
leaves what it sends to a transport of the caller's. Without a line of code, and for every version and litellm
too, there is the proxy's base URL. DSPy's own cache is off: it would give equal samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import dspy
import pytest
from dspy.clients.engines import AsyncLM15Engine, LM15Engine
from dspy.lm15 import RouterConfig

from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream


class _Response:
    """What lm15 takes a response to be, made of one of the SDK's."""

    http_version = "HTTP/1.1"

    def __init__(self, response):
        self.status, self.reason = response.status_code, response.http_response.reason_phrase
        self.headers = list(response.headers.items())
        self._response = response

    def __iter__(self):
        return self._response.iter_bytes()

    def __aiter__(self):
        return self._response.iter_bytes()

    def read(self):
        return self._response.read()

    def iter_lines(self):
        return (line.encode() + b"\n" for line in self._response.iter_lines())


def _asked(request):
    """The request's body as arguments of the SDK; what it has no names for is passed all the same."""
    body = json.loads(request.body)
    known = {name: body.pop(name) for name in ("model", "messages", "stream") if name in body}
    return {**known, "extra_body": body}


class CachedTransport:
    def __init__(self, client):
        self.create = client.chat.completions.with_streaming_response.create

    @contextlib.contextmanager
    def stream(self, request):
        with self.create(**_asked(request)) as response:
            yield _Response(response)


class AsyncCachedTransport(CachedTransport):
    @contextlib.asynccontextmanager
    async def stream(self, request):
        async with self.create(**_asked(request)) as response:
            yield _Response(response)


class Engine(LM15Engine):
    """An engine tells DSPy what the model behind it can do."""

    supports_function_calling = True
    supports_response_schema = True
    supported_params = frozenset({"response_format", "tools", "tool_choice"})


def model(client, sync):
    def config(transport):
        return RouterConfig(transport=transport, api_keys={"openai-chat": "unused"})

    return dspy.LM(
        "openai/m",
        engine=Engine(config(CachedTransport(sync))),
        async_engine=AsyncLM15Engine(config(AsyncCachedTransport(client))),
        cache=False,
    )


class Place(dspy.Signature):
    """Name a city."""

    country: str = dspy.InputField()
    city: str = dspy.OutputField()
    people: int = dspy.OutputField()


@pytest.fixture(autouse=True)
def adapter():
    """The adapter that asks for JSON: the model behind the server knows no other form."""
    with dspy.context(adapter=dspy.JSONAdapter()):
        yield


def test_chat(twice):
    async def program(*clients):
        lm = model(*clients)
        return lm("Write a function."), await lm.acall("Write another.")

    for answers in twice(program):
        assert answers[0]


def test_a_structured_output(twice):
    async def program(*clients):
        with dspy.context(lm=model(*clients)):
            first = dspy.Predict(Place)(country="France")
            second = await dspy.ChainOfThought(Place).acall(country="Spain")
        return first.toDict(), second.toDict()

    first, second = twice(program)
    assert isinstance(first["people"], int)
    assert second["reasoning"]


def test_a_tool_is_called(twice):
    calls = []

    def weather(city: str) -> str:
        """Tell the weather."""
        calls.append(city)
        return "sunny"

    class Ask(dspy.Signature):
        """Answer with a tool."""

        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        outputs: dspy.ToolCalls = dspy.OutputField()

    async def program(*clients):
        native = dspy.JSONAdapter(use_native_function_calling=True)
        with dspy.context(lm=model(*clients), adapter=native):
            made = await dspy.Predict(Ask).acall(question="How is it?", tools=[dspy.Tool(weather)])
        (call,) = made.outputs.tool_calls
        return call.name, call.args, weather(**call.args)

    assert twice(program)[0] == "weather"
    assert calls[0] == calls[1]


def test_a_stream(twice):
    async def program(*clients):
        lm = model(*clients)
        predict = dspy.streamify(
            dspy.Predict(Place),
            stream_listeners=[dspy.streaming.StreamListener(signature_field_name="city")],
        )
        with dspy.context(lm=lm):
            parts = [part async for part in predict(country="France")]
        return "".join(part.chunk for part in parts[:-1]), parts[-1].toDict()

    streamed, whole = twice(program)
    assert whole["city"] in streamed


def test_a_crowd(twice):
    async def program(*clients):
        with dspy.context(lm=model(*clients)):
            made = await asyncio.gather(
                *(dspy.Predict(Place).acall(country=f"country {i % 4}") for i in range(12))
            )
        return [one.toDict() for one in made]

    assert len({one["city"] for one in twice(program)}) > 4


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_by_way_of_the_proxy(server, tmp_path, engine):
    async def program(address):
        lm = dspy.LM("openai/gpt-4o", api_base=address, api_key="k", engine=engine, cache=False)
        json = dspy.JSONAdapter()
        with dspy.context(lm=lm, adapter=json):
            said, first = lm("Write a function."), dspy.Predict(Place)(country="France")
            second = await dspy.Predict(Place).acall(country="Spain")
            parts = dspy.streamify(dspy.Predict(Place))(country="Italy")
            whole = [part async for part in parts][-1]
        return said, first.toDict(), second.toDict(), whole.toDict()

    upstreams = (Upstream.of("mock", server.base_url),)
    with running(ProxySettings(port=0, cache=str(tmp_path), upstreams=upstreams, log="errors")) as proxy:
        first = asyncio.run(program(f"{proxy.url}/ns/first/v1"))
        asked = server.stats.requests
        assert asked >= 4
        assert asyncio.run(program(f"{proxy.url}/ns/again/v1")) == first
    assert server.stats.requests == asked
