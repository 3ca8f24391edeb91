"""Spans and metrics of calls, as an exporter of OpenTelemetry's gets them."""

from __future__ import annotations

import subprocess
import sys

import openai
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cachepipe import BadAnswer, MemoryStore, OnlineAPI, Request, Services, telemetry
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.models import OpenAIModel
from cachepipe.testing import MockServer, MockSettings

pytestmark = pytest.mark.anyio
ASKED = {"model": "m", "messages": [{"role": "user", "content": "a secret"}]}


@pytest.fixture(scope="module")
def exporter():
    """The program's exporter, installed once as a program does."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    exporter.reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([exporter.reader]))
    return exporter


@pytest.fixture
def spans(exporter):
    exporter.clear()
    exporter.reader.get_metrics_data()
    return exporter.get_finished_spans


def points(exporter, name):
    data = exporter.reader.get_metrics_data()
    found = [
        point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]
    return {tuple(sorted(dict(point.attributes).items())): point for point in found}


async def test_a_call_is_a_span_and_a_hit_is_none(server, spans, exporter):
    async with AsyncOpenAI(base_url=server.base_url, api_key="sk-hidden", cache=MemoryStore()) as client:
        with trace.get_tracer("program").start_as_current_span("work") as parent:
            answer = await client.chat.completions.create(**ASKED, temperature=0.5, n=2, stop=["."])
        await client.in_namespace("b").chat.completions.create(**ASKED, temperature=0.5, n=2, stop=["."])
    span, _work = spans()
    assert span.name == "chat m"
    assert span.kind is trace.SpanKind.CLIENT
    assert span.parent.span_id == parent.get_span_context().span_id
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "server.address": "127.0.0.1",
        "server.port": server.port,
        "gen_ai.request.model": "m",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.stop_sequences": (".",),
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.model": answer.model,
        "gen_ai.response.finish_reasons": tuple(choice.finish_reason for choice in answer.choices),
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.usage.completion_tokens,
    }
    assert "secret" not in span.to_json()
    assert "sk-hidden" not in span.to_json()


async def test_a_stream_is_a_span_from_its_beginning_to_its_end(server, spans):
    server.settings = MockSettings(stream_delay=0.02)
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        stream = await client.chat.completions.create(**ASKED, stream=True)
        await anext(stream)
        assert spans() == ()
        async for _ in stream:
            pass
    [span] = spans()
    assert span.attributes["gen_ai.usage.output_tokens"] > 0
    assert span.attributes["gen_ai.response.finish_reasons"]


async def test_each_attempt_is_a_span_and_tells_its_error(server, spans):
    server.settings = MockSettings(script=("rate_limit", 400))
    service = Services.custom(server.base_url, max_requests=None, adaptive=False)
    service.flow.retries.first = 0
    async with service.client(MemoryStore()) as client:
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**ASKED)
    assert [span.attributes["error.type"] for span in spans()] == ["429", "400"]
    assert not any(span.status.is_ok for span in spans())


async def test_a_synchronous_call_is_a_child_of_its_callers_span(spans):
    with (
        MockServer.in_thread(MockSettings(seed=1)) as server,
        OpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client,
        trace.get_tracer("program").start_as_current_span("work") as parent,
    ):
        client.embeddings.create(model="e", input="text")
    [span] = [span for span in spans() if span.name != "work"]
    assert span.name == "embeddings e"
    assert span.parent.span_id == parent.get_span_context().span_id


async def test_an_adapters_call_is_a_span_as_well(server, spans):
    async with (
        OpenAIModel("m", base_url=server.base_url, api_key="k", max_retries=0) as model,
        OnlineAPI(model, MemoryStore()) as pipeline,
    ):
        await pipeline.request(Request("p"))
        await pipeline.request(Request("p", namespace="b"))
        server.settings = MockSettings(script=(400,))
        with pytest.raises(openai.BadRequestError):
            await pipeline.request(Request("q"))
    first, second = spans()
    assert first.name == second.name == "chat m"
    assert first.attributes["gen_ai.usage.input_tokens"] > 0
    assert first.attributes["server.port"] == server.port
    assert second.attributes["error.type"] == "400"


async def test_an_adapters_call_through_a_cached_client_is_one_span(server, spans):
    async with (
        AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client,
        OnlineAPI(OpenAIModel("m", client=client), MemoryStore()) as pipeline,
    ):
        await pipeline.request(Request("p"))
    assert [span.name for span in spans()] == ["chat m"]


@pytest.mark.parametrize("fault", ["malformed", "error_200"])
async def test_what_is_no_answer_under_a_status_of_success_is_an_error(server, spans, fault):
    server.settings = MockSettings(script=(fault,))
    async with OpenAIModel("m", base_url=server.base_url, api_key="k") as model:
        with pytest.raises(BadAnswer):
            await model.request(Request("p"))
    [span] = spans()
    assert (span.attributes["error.type"], span.status.is_ok) == ("BadAnswer", False)


async def test_an_odd_answer_fails_as_it_does_without_telemetry(spans):
    call = telemetry.begin("chat completions", "http://localhost", {"model": "m"})
    call.end({"choices": [None, {"finish_reason": "stop"}], "usage": {"prompt_tokens": "many"}})
    [span] = spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)


async def test_durations_and_tokens_are_counted(server, spans, exporter):
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        answer = await client.chat.completions.create(**{**ASKED, "model": "counted"})
    tokens = {
        dict(attributes)["gen_ai.token.type"]: point.sum
        for attributes, point in points(exporter, "gen_ai.client.token.usage").items()
        if dict(attributes)["gen_ai.request.model"] == "counted"
    }
    assert tokens == {"input": answer.usage.prompt_tokens, "output": answer.usage.completion_tokens}
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        await client.chat.completions.create(**{**ASKED, "model": "timed"})
    durations = points(exporter, "gen_ai.client.operation.duration")
    [point] = [point for names, point in durations.items() if ("gen_ai.request.model", "timed") in names]
    assert point.count == 1
    assert point.sum > 0


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.openai.com/v1/chat/completions", "openai"),
        ("https://api.anthropic.com/v1/messages", "anthropic"),
        ("https://mine.openai.azure.com/openai/responses", "azure.ai.openai"),
        ("https://fakeanthropic.com/v1/messages", "openai"),
        ("https://api.together.ai/v1/chat/completions", "together_ai"),
        ("https://api.together.xyz/v1/chat/completions", "together_ai"),
        ("https://generativelanguage.googleapis.com/v1beta/openai/chat/completions", "gcp.gemini"),
        ("http://localhost:8000/v1/chat/completions", "openai"),
    ],
)
def test_providers_have_the_names_of_the_conventions(url, provider, spans):
    telemetry.begin("messages", url, {"model": "m"}).end()
    assert spans()[0].attributes["gen_ai.provider.name"] == provider


def test_a_program_without_opentelemetry_does_not_import_it():
    code = (
        "import sys, cachepipe.providers.exchange as e; from cachepipe import telemetry; "
        "assert telemetry.begin('messages', 'https://h/v1', {}) is None; "
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
