"""The clients of Anthropic: draws below the SDK's own layers, which see hits as they see answers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import os
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import anthropic
import pytest
from pydantic import BaseModel

from cachepipe import CacheMiss, MemoryStore, telemetry, using, wire
from cachepipe.clients import Anthropic, AsyncAnthropic
from cachepipe.providers.info import info
from cachepipe.providers.stream_recorder import SyncRecordedStream
from cachepipe.sdk.http import library_of
from cachepipe.sdk.internals import ATTRIBUTES, NAMES
from cachepipe.sdk.wrapping import wrap
from cachepipe.testing.server import Fault

VERSION = tuple(map(int, version("anthropic").split(".")[:2]))
KEY = "sk-ant-made-up-and-never-stored"
ASK = {
    "model": "m",
    "max_tokens": 12,
    "messages": [{"role": "user", "content": "Write a function that sorts a list."}],
}
TOOL = {
    "name": "sort",
    "description": "Sorts.",
    "input_schema": {"type": "object", "properties": {"items": {"type": "string"}}, "required": ["items"]},
}
since_layers = pytest.mark.skipif(
    not hasattr(anthropic.Anthropic, "_attempt_request"), reason="this SDK has no middleware and no tracing"
)
"""What older versions of the SDK lack; the newest one is in the main environment."""


@pytest.fixture(autouse=True)
def _no_credentials_around(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("ANTHROPIC_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path / "none"))


@pytest.fixture
def client(server):
    with Anthropic(base_url=server.url, api_key=KEY, cache=MemoryStore(), max_retries=0) as made:
        yield made


def ask(client, **options):
    return client.messages.create(**{**ASK, **options})


def text(message):
    return "".join(block.text for block in message.content)


def read(stream):
    return "".join(e.delta.text for e in stream if e.type == "content_block_delta")


def stored(client):
    store = client._cachepipe.shared_store.store
    return [sample for info in list(store.keys()) for sample in store.samples(info.key)]


def script(server, *faults):
    server.settings = replace(server.settings, script=faults)


# What a call returns.


def test_they_are_the_sdks_own_classes(client):
    assert isinstance(client, anthropic.Anthropic)
    assert type(ask(client)) is anthropic.types.Message
    assert issubclass(AsyncAnthropic, anthropic.AsyncAnthropic)


def test_a_rerun_in_another_namespace_asks_nothing_and_answers_the_same(server, client):
    first = [ask(client), ask(client), ask(client, system="0.5")]
    again = client.in_namespace("again")
    second = [ask(again), ask(again), ask(again, system="0.5")]
    assert server.stats.requests == 3
    assert first == second
    assert [one.model_dump() for one in first] == [one.model_dump() for one in second]
    assert [one._request_id for one in first] == [one._request_id for one in second]
    assert first[0]._request_id
    assert text(first[0]) != text(first[1])
    assert [info(one).indices for one in second] == [(0,), (1,), (0,)]
    assert [info(one).cached for one in (first[0], second[0])] == [(False,), (True,)]
    assert info(second[0]).as_asked["prompt_tokens"] == first[0].usage.input_tokens


@pytest.mark.parametrize("streamed_first", [True, False])
def test_streamed_and_unstreamed_requests_share_samples(server, client, streamed_first):
    def one(client, stream):
        return read(ask(client, stream=True)) if stream else text(ask(client))

    first = one(client, streamed_first)
    assert first
    for number, stream in enumerate((True, False)):
        assert one(client.in_namespace(f"{number}"), stream) == first
    with client.in_namespace("helper").messages.stream(**ASK) as stream:
        assert stream.get_final_text() == first
        assert stream.get_final_message().usage.output_tokens > 0
        assert info(stream).cached == (True,)
    assert server.stats.requests == 1


def test_a_hit_is_a_stream_as_the_sdk_makes_them(server, client):
    miss = ask(client, stream=True)
    events = list(miss)
    hit = ask(client.in_namespace("b"), stream=True)
    assert type(hit) is type(miss) is anthropic.Stream
    assert hit.response.headers["content-type"].startswith("text/event-stream")
    again = list(hit)
    assert [e.type for e in again][:2] == ["message_start", "content_block_start"]
    assert [e.type for e in (events[-1], again[-1])] == ["message_stop"] * 2
    assert again[0].message.id == events[0].message.id
    assert server.stats.requests == 1


def test_the_stream_helper_records_a_miss_and_replays_it(server, client):
    with client.messages.stream(**ASK) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert len(pieces) > 1
    assert ask(client.in_namespace("b")).model_dump() == {
        **message.model_dump(exclude={"content": {"__all__": {"parsed_output"}}})
    }
    with client.in_namespace("c").messages.stream(**ASK) as stream:
        assert "".join(stream.text_stream) == "".join(pieces)
    assert server.stats.requests == 1


def test_tool_calls_are_kept_whichever_way_they_came(server, client):
    wants = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sort"}}
    message = ask(client, **wants)
    assert message.content[0].type == "tool_use"
    with client.in_namespace("b").messages.stream(**{**ASK, **wants}) as stream:
        assert stream.get_final_message().content[0].input == message.content[0].input
    again = {"system": "Hm.", **wants}
    with client.messages.stream(**{**ASK, **again}) as stream:
        streamed = stream.get_final_message().content[0]
    assert ask(client.in_namespace("b"), **again).content[0].input == streamed.input
    assert server.stats.requests == 2


def test_raw_and_streaming_responses_on_miss_and_hit(server, client):
    raw = client.messages.with_raw_response.create(**ASK)
    hit = client.in_namespace("b").messages.with_raw_response.create(**ASK)
    assert hit.parse() == raw.parse()
    assert hit.request_id == raw.request_id
    assert raw.headers["content-length"]
    assert info(hit).cached == (True,)
    for namespace in ("c", "d"):
        with client.in_namespace(namespace).messages.with_streaming_response.create(**ASK, system="0.1") as r:
            content = r.read() if namespace == "c" else b"".join(r.iter_bytes())
        assert content.startswith(b"{")
    streamed = client.messages.with_raw_response.create(**ASK, stream=True, system="0.1")
    assert read(streamed.parse()) in content.decode()
    assert server.stats.requests == 2


class Sorted(BaseModel):
    items: str
    ascending: bool


@pytest.mark.skipif(not hasattr(anthropic.resources.Messages, "parse"), reason="this SDK does not parse")
@pytest.mark.filterwarnings("default:The 'output_format' parameter is deprecated:DeprecationWarning")
def test_structured_outputs_are_parsed_from_hits_too(server, client):
    first = client.messages.parse(**ASK, output_format=Sorted)
    assert isinstance(first.parsed_output, Sorted)
    again = client.in_namespace("b").messages.parse(**ASK, output_format=Sorted)
    assert again.parsed_output == first.parsed_output
    assert info(again).cached == (True,)
    beta = client.beta.messages.parse(**ASK, output_format=Sorted)
    assert client.in_namespace("b").beta.messages.parse(**ASK, output_format=Sorted) == beta
    with client.in_namespace("c").messages.stream(**ASK, output_format=Sorted) as stream:
        assert stream.get_final_message().parsed_output == first.parsed_output
    assert server.stats.requests <= 2


# Keys.


def test_beta_headers_and_the_version_are_part_of_the_key_and_the_rest_is_not(server, client):
    def beta(**options):
        return client.in_namespace(str(options)).beta.messages.create(**ASK, **options)

    plain = ask(client)
    beta(betas=["one"])
    beta(betas=["one", "two"])
    beta(betas=["one"], metadata={"user_id": "me"})
    assert server.stats.requests == 3
    ask(client.in_namespace("v"), extra_headers={"anthropic-version": "2099-01-01"})
    assert server.stats.requests == 4
    assert ask(client.in_namespace("x"), extra_headers={"x-mine": "1"}, timeout=5) == plain
    assert ask(client.with_options(default_headers={"X-Mine": "1"}).in_namespace("y")) == plain
    assert server.stats.requests == 4
    assert info(plain).key == info(ask(client)).key


def test_extra_body_is_part_of_the_key(server, client):
    ask(client, extra_body={"novel": 1})
    ask(client.in_namespace("b"), extra_body={"novel": 2})
    ask(client.in_namespace("c"), extra_body={"novel": 1})
    assert server.stats.requests == 2


def test_what_is_left_out_or_can_be_read_only_once_is_keyed_and_sent_as_the_sdk_sends_it(server, client):
    plain = ask(client, system="Be brief.")
    left_out = {"stop_sequences": anthropic.NOT_GIVEN, "tools": anthropic.NOT_GIVEN}
    assert ask(client.in_namespace("b"), system="Be brief.", **left_out) == plain
    once = iter(ASK["messages"])
    assert ask(client.in_namespace("c"), system="Be brief.", messages=once) == plain
    with using(mode="bypass"):
        ask(client, messages=iter(ASK["messages"]))
    turns = [*ASK["messages"], {"role": "assistant", "content": plain.content}, *ASK["messages"]]
    blocks = [block.model_dump(mode="json", exclude_unset=True) for block in plain.content]
    dumped = [*ASK["messages"], {"role": "assistant", "content": blocks}, *ASK["messages"]]
    assert ask(client, messages=turns) == ask(client.in_namespace("b"), messages=dumped)
    assert server.stats.requests == 3


def test_what_is_not_cached_passes_untouched(server, client):
    for _ in range(2):
        with contextlib.suppress(anthropic.APIStatusError):
            client.messages.count_tokens(model="m", messages=ASK["messages"])
        with contextlib.suppress(anthropic.APIStatusError):
            client.messages.batches.list()
    client.models.list()
    assert stored(client) == []


def test_no_key_is_stored_and_none_is_needed_to_replay(server, tmp_path):
    with Anthropic(base_url=server.url, api_key=KEY, cache=tmp_path / "c") as client:
        first = ask(client)
    stored = b"".join(path.read_bytes() for path in Path(tmp_path / "c").rglob("*") if path.is_file())
    assert KEY.encode() not in stored
    with Anthropic(base_url=server.url, cache=tmp_path / "c", mode="replay") as client:
        assert ask(client) == first
        with pytest.raises(CacheMiss):
            ask(client)
    assert server.stats.requests == 1


def test_the_constructors_default_for_a_missing_profile_does_not_stop_a_replay(server, monkeypatch, tmp_path):
    monkeypatch.setenv("ANTHROPIC_PROFILE", "nobody")
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    with (
        Anthropic(base_url=server.url, cache=MemoryStore(), mode="replay") as client,
        pytest.raises(CacheMiss),
    ):
        ask(client)


@pytest.mark.skipif(VERSION < (2, 0), reason="this SDK has no such credentials")
@pytest.mark.parametrize("wrapped", [False, True])
def test_credentials_of_the_environment_are_found_as_by_the_sdks_class(monkeypatch, tmp_path, wrapped):
    token = tmp_path / "token"
    token.write_text("t")
    monkeypatch.setenv("ANTHROPIC_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("ANTHROPIC_FEDERATION_RULE_ID", "fdrl_1")
    monkeypatch.setenv("ANTHROPIC_ORGANIZATION_ID", "00000000-0000-0000-0000-000000000000")
    with Anthropic(cache=MemoryStore()) if not wrapped else anthropic.Anthropic() as made:
        client = wrap(made, cache=MemoryStore()) if wrapped else made
        assert client.credentials is not None
        assert client.copy().credentials is client.credentials
        assert client.in_namespace("b")._token_cache is client._token_cache

    class Own(Anthropic):
        pass

    class Plain(anthropic.Anthropic):
        pass

    with Own(cache=MemoryStore()) as own, Plain() as plain:
        assert own.credentials is plain.credentials is None


# Errors, retries, streams that break.


def test_errors_are_the_sdks_own_and_not_cached(server, client):
    script(server, 500, 400)  # 529 has an error of its own, related to others in some versions only
    for kind in (anthropic.InternalServerError, anthropic.BadRequestError):
        with pytest.raises(kind) as caught:
            ask(client)
        assert caught.value.response.request.headers["x-api-key"] if VERSION < (2, 0) else True
        assert caught.value.body["type"] == "error"
    assert text(ask(client))
    assert server.stats.samples_generated == 1
    assert info(ask(client.in_namespace("b"))).indices == (0,)


def test_the_sdks_retries_are_unchanged_on_a_miss(server):
    soon = Fault(kind="rate_limit", retry_after=0.01)
    script(server, soon, soon)
    with Anthropic(base_url=server.url, api_key=KEY, cache=MemoryStore(), max_retries=2) as client:
        raw = client.messages.with_raw_response.create(**ASK)
        assert raw.retries_taken == 2
        assert raw.http_request.headers["x-stainless-retry-count"] == "2"
        assert client.in_namespace("b").messages.with_raw_response.create(**ASK).retries_taken == 0
    assert server.stats.requests == 3


def test_c8_an_error_under_200_is_what_the_sdk_makes_of_it_and_not_cached(server, client):
    script(server, "error_200")
    assert info(ask(client)) is None
    assert stored(client) == []
    assert text(ask(client))


@pytest.mark.parametrize("fault", ["cut", "truncate", "error_200"])
def test_c8_a_stream_that_breaks_is_what_the_sdk_makes_of_it_and_not_stored(server, client, fault):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as plain:
        outcomes = []
        for who in (plain, client):
            script(server, fault)
            try:
                outcomes.append(("end", len(list(ask(who, stream=True)))))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the same
                outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    assert stored(client) == []


def test_c7_the_rest_of_an_abandoned_stream_is_read_and_stored(server, client):
    with ask(client, stream=True) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
    first = ask(client.in_namespace("b"))
    assert text(first).startswith(event.delta.text)
    assert server.stats.requests == 1
    stream = ask(client, stream=True, system="0.2")
    next(iter(stream))
    del stream
    gc.collect()
    assert text(ask(client.in_namespace("b"), system="0.2"))


def test_c1_eight_threads_get_samples_of_their_own(server, client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client), range(24)))
    assert sorted(info(one).indices for one in answers) == [(i,) for i in range(24)]
    assert server.stats.samples_generated == 24


FUTURE = b'event: future\ndata: {"type":"future","note":"to come"}\n\n'


def recorded(server):
    """Return the body of a stream, and the SDK's HTTP library."""
    with anthropic.Anthropic(base_url=server.url, api_key=KEY) as plain:
        body = plain.messages.with_raw_response.create(**ASK, stream=True).http_response.read()
        return body, importlib.import_module(library_of(plain).__name__)


def test_what_follows_the_terminal_event_reaches_the_reader(server):
    body, http = recorded(server)

    class Later(http.SyncByteStream):
        def __iter__(self):
            yield body
            yield FUTURE

    transport = http.MockTransport(lambda request: http.Response(200, stream=Later()))
    with (
        http.Client(transport=transport) as connection,
        Anthropic(api_key=KEY, cache=MemoryStore(), max_retries=0, http_client=connection) as client,
        client.messages.with_streaming_response.create(**ASK, stream=True) as response,
    ):
        assert response.read().endswith(FUTURE)
        assert len(stored(client)) == 1


@pytest.mark.anyio
async def test_what_follows_the_terminal_event_reaches_the_asynchronous_reader(server):
    body, http = recorded(server)

    class Later(http.AsyncByteStream):
        async def __aiter__(self):
            yield body
            yield FUTURE

    transport = http.MockTransport(lambda request: http.Response(200, stream=Later()))
    async with (
        http.AsyncClient(transport=transport) as connection,
        AsyncAnthropic(api_key=KEY, cache=MemoryStore(), max_retries=0, http_client=connection) as client,
        client.messages.with_streaming_response.create(**ASK, stream=True) as response,
    ):
        assert (await response.read()).endswith(FUTURE)


@pytest.mark.anyio
async def test_c7_a_stream_that_breaks_after_its_terminal_event_loses_no_sample(server):
    """It was read ahead of its reader, and broke before the cache had asked what it brought."""
    body, http = recorded(server)

    class Broken(http.SyncByteStream):
        def __iter__(self):
            yield body
            raise http.ReadError("lost")

    response = http.Response(200, stream=Broken(), request=http.Request("POST", server.url))
    options = {"hide_usage": False, "awaited": lambda: False, "cut": lambda: None}
    recording = SyncRecordedStream(response, wire.MESSAGES.recorder(), **options)
    recording._read_on()
    await asyncio.to_thread(recording._news.get)
    await asyncio.to_thread(recording._news.get)
    [sample] = await recording.run()
    assert sample["content"]


@since_layers
def test_spans_are_the_sdks_business(server, monkeypatch):
    """It makes its own, where its user wants any."""
    made = []
    monkeypatch.setattr(telemetry, "wanted", lambda: True)
    monkeypatch.setattr(telemetry, "begin", lambda *about: made.append(about))
    with Anthropic(base_url=server.url, api_key=KEY, cache=MemoryStore()) as client:
        ask(client)
        read(ask(client, stream=True))
    assert made == []


@since_layers
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_application_does_to_a_response_is_as_with_the_sdk(server, stream):
    """A body that was read already, is read the wrong way, or is lost; and the time that a stream took."""
    http = importlib.import_module(library_of(anthropic.Anthropic(api_key="k")).__name__)

    class Lost(http.SyncByteStream):
        def __iter__(self):
            raise http.ReadError("lost")
            yield

    with anthropic.Anthropic(base_url=server.url, api_key=KEY) as plain:
        body = plain.messages.with_raw_response.create(**ASK, stream=stream).http_response.read()
    answers = [http.Response(200, content=body), http.Response(200, stream=Lost())]
    transport = http.MockTransport(lambda request: answers.pop(0))
    with (
        http.Client(transport=transport) as connection,
        Anthropic(api_key=KEY, cache=MemoryStore(), max_retries=0, http_client=connection) as client,
    ):
        if stream:
            read_before = ask(client, stream=True)
            assert read_before.response.is_closed
            assert len(stored(client)) == 1
            assert read(read_before)
        else:
            answers.pop(0)
        with (
            client.messages.with_streaming_response.create(**ASK, stream=stream) as response,
            pytest.raises(http.ReadError, match="lost"),
        ):
            response.read()
        assert len(stored(client)) == stream
    if stream:
        with Anthropic(base_url=server.url, api_key=KEY, cache=MemoryStore()) as client:
            live = ask(client, stream=True)
            with pytest.raises(RuntimeError):
                asyncio.run(live.response.aread())
            assert read(live)
            assert live.response.elapsed.total_seconds() > 0


# The SDK's layers.


@since_layers
def test_middleware_sees_hits_and_its_changes_are_part_of_the_key(server):
    seen = []

    def middle(request, call_next):
        if request.json and "stop_sequences" not in request.json:
            request = request.copy(body={**request.json, "system": "0.25"})
        response = call_next(request)
        seen.append((request.json["system"], response.http_response.status_code))
        return response

    store = MemoryStore()
    with Anthropic(base_url=server.url, api_key=KEY, cache=store) as client:
        expected = ask(client, system="0.25")
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, middleware=[middle]) as plain:
        for client in (
            Anthropic(base_url=server.url, api_key=KEY, cache=store, namespace="b", middleware=[middle]),
            wrap(plain, cache=store, namespace="c"),
            wrap(plain, cache=store, namespace="d").copy(timeout=3),
        ):
            answer = ask(client)
            assert answer == expected
            assert info(answer).cached == (True,)
    assert seen == [("0.25", 200)] * 3
    assert server.stats.requests == 1


@since_layers
def test_middleware_sees_streams_and_errors_of_misses(server):
    seen = []

    def middle(request, call_next):
        response = call_next(request)
        seen.append((request.retries_taken, response.http_response.status_code))
        return response

    options = {"base_url": server.url, "api_key": KEY, "cache": MemoryStore(), "max_retries": 1}
    script(server, 529)
    with Anthropic(**options, middleware=[middle]) as client:
        first = read(ask(client, stream=True))
        assert text(ask(client.in_namespace("b"))) == first
    assert seen == [(0, 529), (1, 200), (0, 200)]


@pytest.mark.skipif(
    "open_telemetry" not in inspect.signature(anthropic.Anthropic.__init__).parameters,
    reason="this SDK has no tracing",
)
def test_tracing_has_a_span_for_hits_and_misses(server):
    class Span(trace_api().NonRecordingSpan):
        def __init__(self):
            super().__init__(trace_api().INVALID_SPAN_CONTEXT)
            self.attributes, self.ended = {}, False

        def is_recording(self):
            return True

        def set_attribute(self, key, value):
            self.attributes[key] = value

        def set_attributes(self, attributes):
            self.attributes.update(attributes)

        def end(self, end_time=None):
            self.ended = True

    spans = []

    class Tracer(trace_api().NoOpTracer):
        def start_span(self, name, *arguments, attributes=None, **options):
            spans.append(Span())
            spans[-1].set_attributes(attributes or {})
            return spans[-1]

    class Provider(trace_api().NoOpTracerProvider):
        def get_tracer(self, *arguments, **options):
            return Tracer()

    with Anthropic(
        base_url=server.url,
        api_key=KEY,
        cache=MemoryStore(),
        open_telemetry={"tracer_provider": Provider()},
    ) as client:
        message = ask(client)
        ask(client.in_namespace("b"))
        read(ask(client.in_namespace("c"), stream=True))
    assert len(spans) == 3
    for span in spans:
        assert span.ended
        assert span.attributes["gen_ai.usage.output_tokens"] == message.usage.output_tokens
    assert server.stats.requests == 1


def trace_api():
    """OpenTelemetry's interface, which the SDKs with layers bring."""
    return pytest.importorskip("opentelemetry.trace")


# Constructors, copies and wrapped clients.


@pytest.mark.parametrize("ours", [Anthropic, AsyncAnthropic])
def test_signatures_are_the_sdks_with_ours_last(ours):
    clients = getattr(anthropic, ours.__name__)
    own = ["cache", "namespace", "mode", "scope", "repeat", "service", "replicate", "ordered", "budget"]
    for name in ("__init__", "copy", "with_options"):
        theirs = list(inspect.signature(getattr(clients, name)).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters) == theirs + own
        with contextlib.suppress(NameError):  # as the newest version's own hints have it
            typing.get_type_hints(getattr(clients, name))
            assert set(own) < set(typing.get_type_hints(getattr(ours, name)))


@pytest.mark.parametrize("ours", [Anthropic, AsyncAnthropic])
def test_type_checkers_see_the_constructor_of_the_newest_sdk(ours):
    """What is written for type checkers is what is made for this version, when it is the newest one."""
    if VERSION < (2, 11):
        return
    written = importlib.import_module(ours.__module__)._Options.__annotations__
    for name in inspect.signature(ours.__init__).parameters:
        if not name.startswith("_token"):
            assert name in written or name == "self", name


def test_copies_share_connections_and_cache(client):
    twin = client.with_options(timeout=7)
    assert type(twin) is Anthropic
    assert twin._client is client._client
    assert twin._cachepipe == client._cachepipe
    assert client.copy(namespace="x")._cachepipe.namespace == "x"


@pytest.mark.parametrize("kind", [anthropic.AnthropicBedrock, anthropic.AnthropicVertex])
def test_clients_that_rewrite_their_calls_are_not_wrapped(kind):
    settings = {"region": "eu", "project_id": "p", "access_token": "t"}
    if kind is anthropic.AnthropicBedrock:
        settings = {"aws_region": "eu", "aws_access_key": "a", "aws_secret_key": "s"}
    with kind(**settings) as client, pytest.raises(TypeError, match=f"{kind.__name__} cannot be cached"):
        wrap(client, cache=MemoryStore())


@pytest.mark.skipif(not hasattr(anthropic, "AnthropicFoundry"), reason="this SDK has no Foundry")
def test_a_foundry_client_is_wrapped(server):
    with anthropic.AnthropicFoundry(base_url=f"{server.url}/", api_key=KEY) as plain:
        client = wrap(plain, cache=MemoryStore(), namespace="a")
        first = ask(client)
        assert ask(client.in_namespace("b")) == first
        assert ask(client.with_options(timeout=3).in_namespace("c")) == first
    assert server.stats.requests == 1


def test_a_wrapped_client_is_of_its_own_class(server):
    with anthropic.Anthropic(base_url=server.url, api_key=KEY) as plain:
        plain.messages  # noqa: B018 - a resource that calls the plain one
        client = wrap(plain, cache=MemoryStore())
        assert isinstance(client, anthropic.Anthropic)
        first = ask(client)
        assert ask(client.in_namespace("b")) == first
        assert info(ask(plain)) is None
    assert server.stats.requests == 2


@pytest.mark.parametrize("name", ["Anthropic", "AsyncAnthropic"])
def test_the_sdk_still_has_what_the_clients_stand_on(name):
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    kind = getattr(anthropic, name)
    client = kind(api_key="k")
    for name in NAMES:
        assert callable(getattr(kind, name)), name
    for name in ATTRIBUTES:
        assert hasattr(client, name), name
    if VERSION >= (2, 11):
        parameters = inspect.signature(kind._attempt_request).parameters
        assert list(parameters) == ["self", "options", "stream", "retries_taken", "call"]
        assert callable(kind._build_middleware_chain)
        assert anthropic._client._is_base_client.__wrapped__(client)


def test_the_clients_say_what_they_need(monkeypatch):
    import builtins  # noqa: PLC0415 - only here
    import sys  # noqa: PLC0415

    from cachepipe import clients  # noqa: PLC0415 - the test is about its names

    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "anthropic":
            raise ImportError("No module named 'anthropic'")
        return original(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "cachepipe.sdk.anthropic", raising=False)
    monkeypatch.delitem(vars(clients), "Anthropic", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'cachepipe\[anthropic\]'"):
        clients.Anthropic  # noqa: B018 - it is imported when it is named


# On a loop.


@pytest.fixture
async def aclient(server):
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, cache=MemoryStore(), max_retries=0) as made:
        yield made


async def aread(stream):
    return "".join([e.delta.text async for e in stream if e.type == "content_block_delta"])


@pytest.mark.anyio
async def test_async_calls_streams_and_helpers_share_samples(server, aclient):
    first = await ask(aclient)
    assert type(first) is anthropic.types.Message
    assert await ask(aclient.in_namespace("b")) == first
    assert await aread(await ask(aclient.in_namespace("c"), stream=True)) == text(first)
    async with aclient.in_namespace("d").messages.stream(**ASK) as stream:
        assert await stream.get_final_text() == text(first)
    raw = await aclient.in_namespace("e").messages.with_raw_response.create(**ASK)
    parsed = raw.parse()
    assert text(await parsed if inspect.isawaitable(parsed) else parsed) == text(first)
    async with aclient.in_namespace("f").messages.with_streaming_response.create(**ASK) as response:
        assert text(await response.parse()) == text(first)
    beta = await aclient.beta.messages.create(**ASK, betas=["x"])
    assert await aclient.in_namespace("b").beta.messages.create(**ASK, betas=["x"]) == beta
    assert server.stats.requests == 2


@pytest.mark.anyio
async def test_async_misses_of_streams_are_recorded(server, aclient):
    async with aclient.messages.stream(**ASK) as stream:
        said = "".join([piece async for piece in stream.text_stream])
    assert text(await ask(aclient.in_namespace("b"))) == said
    stream = await ask(aclient, stream=True, system="0.1")
    async for event in stream:
        if event.type == "content_block_delta":
            break
    await stream.close()
    assert text(await ask(aclient.in_namespace("b"), system="0.1")).startswith(event.delta.text)
    assert server.stats.requests == 2


@pytest.mark.anyio
async def test_async_errors_retries_and_cancelling(server, aclient):
    script(server, 500)
    with pytest.raises(anthropic.InternalServerError):
        await ask(aclient)
    script(server, 529)
    raw = await aclient.with_options(max_retries=1).messages.with_raw_response.create(**ASK)
    assert raw.retries_taken == 1
    server.settings = replace(server.settings, paused=True, script=())
    task = asyncio.ensure_future(ask(aclient, system="0.9"))
    while server.stats.requests < 4:  # noqa: ASYNC110 - the server is in a thread of its own
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.settings = replace(server.settings, paused=False)
    assert info(await ask(aclient, system="0.9")).indices == (0,)


@pytest.mark.anyio
async def test_async_draws_of_one_question_are_calls_of_their_own(server, aclient):
    answers = await asyncio.gather(*(ask(aclient) for _ in range(5)))
    assert sorted(info(one).indices for one in answers) == [(i,) for i in range(5)]
    assert [entry.n for entry in server.stats.log] == [1] * 5


@pytest.mark.anyio
@since_layers
async def test_async_middleware_sees_hits(server):
    seen = []

    async def middle(request, call_next):
        response = await call_next(request)
        seen.append(response.http_response.status_code)
        return response

    plain = anthropic.AsyncAnthropic(base_url=server.url, api_key=KEY, middleware=[middle])
    async with plain:
        client = wrap(plain, cache=MemoryStore())
        first = await ask(client)
        assert await ask(client.in_namespace("b")) == first
    assert seen == [200, 200]
    assert server.stats.requests == 1


@pytest.mark.anyio
@pytest.mark.skipif(not hasattr(anthropic, "beta_async_tool"), reason="this SDK runs no tools")
async def test_a_run_of_tools_is_repeated_without_a_call(server):
    server.settings = replace(server.settings, uses_tools=True)
    called = []

    @anthropic.beta_async_tool
    async def sort(items: str) -> str:
        """Sort.

        Args:
            items: what to sort.
        """
        called.append(items)
        return "sorted"

    finals = []
    async with AsyncAnthropic(base_url=server.url, api_key=KEY, cache=MemoryStore()) as client:
        for namespace in ("a", "b"):
            runner = client.in_namespace(namespace).beta.messages.tool_runner(**ASK, tools=[sort])
            finals.append(await runner.until_done())
    assert finals[0] == finals[1]
    assert len(called) == 2
    assert called[0] == called[1]
    assert server.stats.requests == 2


def test_using_sets_request_id_and_mode(server, client):
    with using(request_id="r", namespace="b"):
        first = ask(client)
    with using(mode="bypass"):
        assert info(ask(client)) is None
    with using(request_id="r", namespace="c"):
        assert ask(client) == first
    assert server.stats.requests == 2


def test_a_folder_is_shared_with_a_rerun(server, tmp_path):
    answers = []
    for _ in range(2):
        with Anthropic(base_url=server.url, api_key=KEY, cache=tmp_path) as client:
            answers.append([ask(client), ask(client), read(ask(client, stream=True))])
    assert answers[0] == answers[1]
    assert server.stats.requests == 3
