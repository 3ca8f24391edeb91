"""The fast path answers as the general one does, and takes everything unusual there."""

from __future__ import annotations

import asyncio
import enum
import functools
import inspect
import json
import uuid

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from profiles import sized

from cachepipe import CacheMiss, MemoryStore
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.context import using
from cachepipe.providers.info import info
from cachepipe.sdk import fast_path
from cachepipe.sdk.http import library_of

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hello"}]
LIBRARY = library_of(openai.AsyncOpenAI(api_key="k"))
is_quick = pytest.mark.skipif(
    not isinstance(inspect.getattr_static(openai.OpenAI, "chat", None), functools.cached_property),
    reason="this SDK makes its resources at once, and all calls go the general way",
)
ABSENT = [openai.NOT_GIVEN, *([openai.omit] if hasattr(openai, "omit") else [])]


@pytest.fixture
def client(server):
    fast_path._fast_class.cache_clear()  # nothing has been learned
    with OpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore(), max_retries=0) as made:
        yield made


@pytest.fixture
def general(monkeypatch):
    """Counts the calls that go the general way."""
    counted = []
    usual = OpenAI.request
    spy = lambda self, *args, **kwargs: counted.append(1) or usual(self, *args, **kwargs)  # noqa: E731
    spy.__module__ = usual.__module__
    monkeypatch.setattr(OpenAI, "request", spy)
    return counted


def ask(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


text = st.text(max_size=8)
number = st.one_of(st.integers(-3, 3), st.floats(-2, 2), st.sampled_from([0.0, 1.0, -0.0]))
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "nobody"]), "content": text}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(st.fixed_dictionaries({"type": text, "text": text}))}
    ),
    st.builds(lambda content: ChatCompletionMessage(role="assistant", content=content), text),
)
arguments = st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=3)},
    optional={
        "temperature": st.one_of(number, st.none(), st.sampled_from(ABSENT)),
        "stop": st.one_of(st.none(), text, st.lists(text, max_size=2), st.tuples(text)),
        "stream": st.sampled_from([False, *ABSENT]),
        "response_format": st.fixed_dictionaries({"type": text}),
        "user": text,
        "seed": st.sampled_from([1, None, *ABSENT]),
        "n": st.sampled_from([1, 2, None]),
        "extra_body": st.one_of(st.none(), st.dictionaries(text, number, max_size=2)),
        "extra_headers": st.sampled_from([None, {"x-own": "1"}, {"OpenAI-Beta": "b"}]),
        "extra_query": st.sampled_from([None, {"a": "b"}]),
        "timeout": st.sampled_from([openai.NOT_GIVEN, None, 3.0]),
    },
)
odd = st.one_of(st.none(), text, number, st.dictionaries(text, text, max_size=1))
choice = st.fixed_dictionaries(
    {
        "index": st.just(0),
        "finish_reason": st.sampled_from(["stop", "length", "a new reason"]),
        "message": st.fixed_dictionaries(
            {"role": st.sampled_from(["assistant", "else"]), "content": st.one_of(text, st.none())},
            optional={
                "tool_calls": st.lists(
                    st.fixed_dictionaries(
                        {
                            "id": text,
                            "type": st.sampled_from(["function", "custom", "other"]),
                            "function": st.fixed_dictionaries({"name": text, "arguments": text}),
                        }
                    ),
                    max_size=2,
                ),
                "refusal": odd,
                "reasoning": odd,
            },
        ),
    },
    optional={
        "logprobs": st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "content": st.lists(
                        st.fixed_dictionaries(
                            {"token": text, "logprob": number, "top_logprobs": st.just([])}
                        ),
                        max_size=2,
                    ),
                    "refusal": st.none(),
                }
            ),
        ),
        "stop_reason": odd,
    },
)
answers = st.fixed_dictionaries(
    {"id": text, "object": st.just("chat.completion"), "model": text},
    optional={
        "created": st.one_of(st.integers(0, 9), st.floats(0, 9)),
        "system_fingerprint": odd,
        "service_tier": st.sampled_from(["default", "golden", None]),
        "usage": st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "prompt_tokens": st.integers(0, 9),
                    "completion_tokens": st.integers(0, 9),
                    "total_tokens": st.integers(0, 9),
                },
                optional={"completion_tokens_details": odd, "cost": number},
            ),
        ),
        "extra": odd,
    },
)


def like(one, other):
    """Whether two objects of the SDK are alike in all that can be seen of them."""
    return (
        type(one) is type(other)
        and one == other
        and repr(one) == repr(other)
        and one.to_dict(warnings=False) == other.to_dict(warnings=False)
        and json.dumps(one.model_dump(warnings=False)) == json.dumps(other.model_dump(warnings=False))
        and one._request_id == other._request_id
        and info(one).key == info(other).key
        and info(one).as_asked == info(other).as_asked
    )


@is_quick
@settings(max_examples=sized(10, 25), deadline=None)
@given(arguments, answers, st.lists(choice, min_size=2, max_size=2))
def test_both_ways_give_one_key_one_body_and_equal_objects(arguments, answer, choices):
    sent = []

    def reply(request):
        sent.append(request.content)
        wanted = json.loads(request.content).get("n") or 1
        numbered = [{**choice, "index": index} for index, choice in enumerate(choices[:wanted])]
        return LIBRARY.Response(200, json={**answer, "choices": numbered}, headers={"x-request-id": "req-1"})

    async def everything():
        http = LIBRARY.AsyncClient(transport=LIBRARY.MockTransport(reply))
        async with AsyncOpenAI(api_key="k", cache=MemoryStore(), http_client=http, max_retries=0) as client:
            quickly = client.chat.completions.create
            own = openai.AsyncOpenAI(api_key="k", http_client=http, max_retries=0).chat.completions.create
            slowly = type(client.chat.completions).__mro__[1].create

            async def outcome(who, *args):
                try:
                    return await who(*args, **{"model": "m", **arguments})
                except Exception as error:  # noqa: BLE001 - compared
                    return error

            first = await outcome(own)
            results = []
            for namespace, call in enumerate((quickly, quickly, quickly)):
                with using(namespace=str(namespace)):
                    results.append(await outcome(call))
            with using(namespace="general"):
                results.append(await outcome(slowly, client.chat.completions))
            with using(mode="bypass"):
                results.append(await outcome(quickly))
            return first, results

    first, results = asyncio.run(everything())
    if isinstance(first, Exception):
        assert {type(result) for result in results} == {type(first)}
        return
    if isinstance(results[0], Exception):  # such as a failed choice: no answer, so each call is its own
        raise results[0]
    assert len(set(sent)) == 1
    if info(results[0]) is not None:
        assert all(like(results[0], other) for other in results[1:-1])
        assert info(results[3]).cached == info(results[1]).cached
        assert all(info(results[1]).cached)
    assert len({json.dumps(one.to_dict(warnings=False)) for one in (first, results[0], results[-1])}) == 1


@is_quick
def test_a_known_and_a_new_draw_take_the_fast_path(server, client, general):
    first = ask(client)
    assert len(general) == 1
    second = ask(client)  # a miss, its shape known
    again = [ask(client.in_namespace("b")) for _ in range(2)]
    assert len(general) == 1
    assert [first, second] == again
    assert [like(one, other) for one, other in zip([first, second], again, strict=True)] == [True, True]
    assert server.stats.requests == 2
    assert len(general) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"extra_headers": {"x": "1"}},
        {"extra_query": {"a": "1"}},
        {"extra_body": {"a": 1}},
        {"timeout": 3.0},
        {"stream": True},
        {"messages": [ChatCompletionMessage(role="assistant", content="x")]},
        {"messages": iter(HELLO)},
    ],
)
def test_what_is_unusual_goes_the_general_way(client, general, options):
    ask(client)
    ask(client, stream=False)
    before = len(general)
    ask(client, **options)
    assert len(general) == before + 1


def test_values_that_are_no_json_go_the_general_way(client, general):
    class Colour(enum.Enum):
        RED = "red"

    ask(client, user="x")
    for value in (Colour.RED, uuid.uuid4()):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever the SDK says
            ask(client, user=value)
        with pytest.raises(caught.type), using(mode="bypass"):
            ask(client, user=value)


def test_raw_and_streaming_responses_go_the_general_way(client, general):
    ask(client)
    before = len(general)
    raw = client.in_namespace("b").chat.completions.with_raw_response.create(model="m", messages=HELLO)
    with client.in_namespace("b").chat.completions.with_streaming_response.create(
        model="m", messages=HELLO
    ) as response:
        assert json.loads(response.read())["choices"]
    assert raw.parse().choices
    assert len(general) == before + 2


def test_errors_are_the_same_both_ways(server, client):
    ask(client)
    for fault, kind in ((400, openai.BadRequestError), (429, openai.RateLimitError)):
        server.settings = server.settings.updated({"script": (fault,)})
        with pytest.raises(kind) as caught:
            ask(client)
        assert caught.value.request.url.path.endswith("/chat/completions")
        assert caught.value.request_id
    assert info(ask(client)).indices == (1,)


def test_replay_answers_in_the_calling_thread_and_misses_by_name(server, monkeypatch):
    store = MemoryStore()
    with OpenAI(base_url=server.base_url, api_key="k", cache=store) as client:
        first = [ask(client), ask(client, n=2)]

    def refuse(_):
        raise AssertionError("the portal was used")

    with OpenAI(base_url=server.base_url, cache=store, mode="replay", namespace="b", api_key="k") as client:
        monkeypatch.setattr("cachepipe.sdk.calls.submit", refuse)
        assert [ask(client), ask(client, n=2)] == first
        with pytest.raises(CacheMiss):
            ask(client)
        with pytest.raises(CacheMiss):
            ask(client)
        monkeypatch.undo()
    assert server.stats.requests == 2


@is_quick
def test_what_somebody_puts_in_front_of_the_sdk_is_still_called(client, monkeypatch):
    kind = type(client.chat.completions).__mro__[1]
    ask(client)
    usual, seen = kind.create, []

    def traced(self, **arguments):
        seen.append(arguments)
        return usual(self, **arguments)

    monkeypatch.setattr(kind, "create", traced)
    ask(client)
    assert len(seen) == 1
    ask(client.copy())
    assert len(seen) == 2


def test_a_subclass_that_makes_its_calls_itself_is_asked(server):
    seen = []

    class Own(OpenAI):
        def request(self, *arguments, **options):
            seen.append(1)
            return super().request(*arguments, **options)

    with Own(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        for _ in range(3):
            ask(client)
    assert len(seen) == 3


async def test_embeddings_take_the_fast_path_too(server):
    seen = []
    async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client:
        for options in ({}, {}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {}):
            answer = await client.embeddings.create(model="m", input=["a", "b"], **options)
            seen.append([item.embedding for item in answer.data])
            assert [item.index for item in answer.data] == [0, 1]
    assert seen[0] == seen[1] == seen[2] == seen[4]
    assert isinstance(seen[3][0], str)
    assert server.stats.requests == 1
    assert fast_path.observed.get() is None


def test_a_replay_that_misses_one_prompt_of_a_list_claims_nothing(server):
    store = MemoryStore()
    with OpenAI(base_url=server.base_url, api_key="k", cache=store) as client:
        first = client.completions.create(model="m", prompt=["a", "b"])
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, mode="replay", namespace="x") as client:
        with pytest.raises(CacheMiss):
            client.completions.create(model="m", prompt=["a", "b", "c"])
        assert client.completions.create(model="m", prompt=["a", "b"]) == first


def test_c9_what_an_http_client_adds_counts_though_it_changes_later(server):
    """Its owner may change the headers and the query that it sends with every call."""
    store, http = MemoryStore(), openai.DefaultHttpxClient()
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, http_client=http) as client:

        def key(namespace):
            with using(namespace=namespace):
                return info(client.chat.completions.create(model="m", messages=HELLO)).key

        plain = [key("a"), key("b"), key("c")]
        http.headers["OpenAI-Beta"] = "new"
        changed = [key("a"), key("b")]
        http.params = {"api-version": "2"}
        changed += [key("c"), key("d")]
        assert len({*plain}) == 1
        assert len({*changed}) == 2
        assert not {*plain} & {*changed}
        del http.headers["OpenAI-Beta"]
        http.params = {}
        assert key("e") == plain[0]
    assert server.stats.requests == 3


@is_quick
def test_c9_both_ways_tell_apart_schemas_in_another_order(server, client, general):
    def schema(*names):
        return {"type": "object", "properties": {name: {"type": "string"} for name in names}}

    def key_of(*names, way=client):
        shown = {"name": "f", "parameters": schema(*names)}
        answer = ask(way, tools=[{"type": "function", "function": shown}], functions=[shown])
        return info(answer).keys

    first = key_of("why", "answer")
    assert len(general) == 1
    quick_keys = [key_of("answer", "why"), key_of("why", "answer")]
    assert len(general) == 1
    with using(namespace="other"):
        again = client.with_options(timeout=3)
        general_keys = [key_of("answer", "why", way=again), key_of("why", "answer", way=again)]
    assert quick_keys == general_keys == [quick_keys[0], first]
    assert quick_keys[0] != first
    assert server.stats.requests == 3  # one question was asked twice in one namespace
