"""What a body asks: the question, how many samples, and what is left out of the key."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import Request, errors
from cachepipe.contract.keys import encode, provider_question
from cachepipe.models import OpenAIModel
from cachepipe.providers.exchange import questions_of
from cachepipe.wire import (
    APIS,
    CHAT,
    COMPLETIONS,
    EMBED_CONTENT,
    EMBEDDINGS,
    FEATURE_EXTRACTION,
    GENERATE_CONTENT,
    GENERATE_TEXT,
    MESSAGES,
    MODERATIONS,
    RESPONSES,
    TEXT_GENERATION,
    BadRequest,
    api_for,
    question_document,
    scope_of,
)

CHAT_BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "stop": None}
MINIMAL = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "m", "prompt": "hi"},
    RESPONSES: {"model": "m", "input": "hi"},
    EMBEDDINGS: {"model": "m", "input": "hi"},
    MODERATIONS: {"model": "m", "input": "hi"},
    MESSAGES: {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
    GENERATE_CONTENT: {"model": "m", "contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
    EMBED_CONTENT: {"model": "m", "content": {"parts": [{"text": "hi"}]}},
    TEXT_GENERATION: {"inputs": "hi", "parameters": {}},
    GENERATE_TEXT: {"inputs": "hi", "parameters": {}},
    FEATURE_EXTRACTION: {"inputs": "hi"},
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(["model", "messages", "temperature", "stop", "tools", "x"]) | st.text(
    max_size=5
)


def key_of(api, body):
    return [
        provider_question("s", question_document(ask), as_written=api.as_written).key
        for ask in api.split(body)
    ]


def test_a_chat_body_is_one_question_without_n_and_transport_fields():
    body = {**CHAT_BODY, "n": 3, "stream": True, "stream_options": {"include_usage": True}, "user": "me"}
    [ask] = CHAT.split(body)
    assert ask.question == CHAT_BODY
    assert (ask.n, ask.stream, ask.include_usage) == (3, True, True)
    assert (ask.mergeable, ask.function, ask.cacheable) == (True, False, True)
    assert ask.transport == {"stream": True, "stream_options": {"include_usage": True}, "user": "me"}


@pytest.mark.parametrize("n", [0, -1, True, False, 1.0, 1.5, "2", [1], {}])
@pytest.mark.parametrize("api", [CHAT, COMPLETIONS], ids=str)
def test_a_number_of_samples_that_is_no_positive_integer_is_refused_in_a_sentence(api, n):
    with pytest.raises(BadRequest, match="n must be a whole number of samples, at least 1; got"):
        api.split({**MINIMAL[api], "n": n})


def test_errors_belong_to_both_families():
    assert issubclass(BadRequest, ValueError)
    assert issubclass(BadRequest, errors.CachepipeError)


@pytest.mark.parametrize("api", APIS, ids=str)
@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_that_is_no_object_is_refused(api, body):
    with pytest.raises(BadRequest, match="must be a JSON object"):
        api.split(body)


def test_null_and_absent_n_are_one():
    assert CHAT.split({**CHAT_BODY, "n": None}) == CHAT.split({**CHAT_BODY, "n": 1}) == CHAT.split(CHAT_BODY)


@pytest.mark.parametrize(
    ("extra", "mergeable"),
    [
        ({"seed": 0}, False),
        ({"seed": None}, True),
        ({"best_of": 2}, False),
        ({"best_of": None}, True),
        ({}, True),
    ],
)
@pytest.mark.parametrize("api", [CHAT, COMPLETIONS], ids=str)
def test_c4_a_seed_or_best_of_is_not_merged(api, extra, mergeable):
    [ask] = api.split({**MINIMAL[api], **extra})
    assert ask.mergeable is mergeable
    assert extra.items() <= ask.question.items()


def test_c4_with_best_of_the_number_is_part_of_the_question():
    one, two = (COMPLETIONS.split({"prompt": "p", "best_of": 4, "n": n})[0] for n in (1, 2))
    [absent] = COMPLETIONS.split({"prompt": "p", "best_of": 4})
    assert (one.question["n"], two.question["n"]) == (1, 2)
    assert absent == one
    assert COMPLETIONS.merge_body([two.question], 7) == {"prompt": "p", "best_of": 4, "n": 2}


@pytest.mark.parametrize("api", APIS, ids=str)
@given(data=st.data())
def test_c9_any_change_but_of_transport_fields_and_n_changes_the_question(api, data):
    body = dict(MINIMAL[api])
    name = data.draw(field_names)
    value = data.draw(json_values)
    before = key_of(api, body)
    changed = {**body, name: value}
    if name in api.transport or (name == "n" and api.max_n > 1):
        return
    same = name in body and body[name] == value and type(body[name]) is type(value)
    same = same or (api is RESPONSES and name == "store" and value in (None, True))  # as where it is absent
    listed = name == api.listed and api is not FEATURE_EXTRACTION and value in ([body[name]], (body[name],))
    assert (key_of(api, changed) == before) is (same or listed)


@pytest.mark.parametrize("api", APIS, ids=str)
def test_c9_transport_fields_do_not_change_the_question(api):
    before = key_of(api, MINIMAL[api])
    values = {"encoding_format": "base64"}
    for name in api.transport:
        assert key_of(api, {**MINIMAL[api], name: values.get(name, {"any": 1})}) == before


@pytest.mark.parametrize(
    ("api", "expected"),
    [
        (
            CHAT,
            {"stream", "stream_options", "user", "metadata", "store", "service_tier", "safety_identifier"},
        ),
        (RESPONSES, {"prompt_cache_key", "prompt_cache_retention", "metadata", "stream"}),
        (MESSAGES, {"stream", "metadata", "service_tier"}),
        (EMBEDDINGS, {"user", "encoding_format"}),
    ],
    ids=["chat", "responses", "messages", "embeddings"],
)
def test_the_lists_of_transport_fields_hold_what_the_contract_names(api, expected):
    assert expected <= api.transport


@given(json_values)
def test_c9_null_is_a_value_inside_provider_bodies(value):
    with_null = key_of(CHAT, {**CHAT_BODY, "logit_bias": None})
    assert with_null != key_of(CHAT, CHAT_BODY)
    assert (key_of(CHAT, {**CHAT_BODY, "logit_bias": value}) == with_null) is (value is None)


@pytest.mark.parametrize("api", [RESPONSES, EMBEDDINGS, MESSAGES, MODERATIONS], ids=str)
def test_n_is_a_field_like_any_other_where_the_api_has_none(api):
    [ask] = api.split({**MINIMAL[api], "n": 2})
    assert ask.n == 1
    assert ask.question["n"] == 2


def test_splitting_leaves_the_body_as_it_is():
    for api, body in MINIMAL.items():
        full = {**body, "n": 1, "user": "u", "stream": True, "encoding_format": "float"}
        kept = copy.deepcopy(full)
        api.split(full)
        assert full == kept


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b", "a"], ["a", "b", "a"]),
        (("a", "b"), ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (None, [None]),
    ],
)
@pytest.mark.parametrize(("api", "field"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")], ids=str)
def test_each_item_of_a_list_is_a_question_of_its_own_and_a_token_list_is_one_item(api, field, value, items):
    asks = api.split({"model": "m", field: value})
    assert [ask.question[field] for ask in asks] == items
    assert all(ask.cacheable for ask in asks)


@pytest.mark.parametrize(
    "value", [[], ["a", 1], ["a", [1]], [[1], []], [True], [[1, True]], [1.5], [{"a": 1}]]
)
@pytest.mark.parametrize(("api", "field"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")], ids=str)
def test_a_list_that_cannot_be_told_apart_passes_through_uncached(api, field, value):
    [ask] = api.split({"model": "m", field: value})
    assert ask.question[field] == value
    assert not ask.cacheable
    assert ask.reason


def test_a_list_of_parts_is_one_input_to_a_moderation():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]
    [ask] = MODERATIONS.split({"input": parts})
    assert ask.question == {"input": parts}
    assert ask.cacheable
    assert [ask.question["input"] for ask in MODERATIONS.split({"input": ["a", "b"]})] == ["a", "b"]


def said(*texts, role="model", **fields):
    return {"role": role, "parts": [{"text": text, **fields} for text in texts]}


def test_c9_contents_of_gemini_that_are_told_apart_are_other_questions():
    user = said("hi", role="user")

    def key(*contents):
        return key_of(GENERATE_CONTENT, {"model": "m", "contents": [user, *contents, user]})

    whole, parts, pieces = said("so it is"), said("so ", "it is"), (said("so "), said("it is"))
    keys = [key(whole), key(parts), key(*pieces), key(*pieces, said("")), key(said("so it is", thought=True))]
    assert len({str(each) for each in keys}) == len(keys)


@pytest.mark.parametrize("api", APIS, ids=str)
def test_c1_only_embeddings_and_moderations_are_functions(api):
    functions = (EMBEDDINGS, MODERATIONS, EMBED_CONTENT, FEATURE_EXTRACTION)
    assert all(ask.function is (api in functions) for ask in api.split(MINIMAL[api]))


@pytest.mark.parametrize(
    ("api", "extra"),
    [
        (RESPONSES, {"background": True}),
        (RESPONSES, {"conversation": "conv_1"}),
        (RESPONSES, {"conversation": {"id": "conv_1"}}),
        (RESPONSES, {"prompt_cache_options": {"prewarm": True}}),
        (RESPONSES, {"tools": [{"type": "code_interpreter", "container": "cntr_1"}]}),
        (RESPONSES, {"tools": ({"type": "code_interpreter", "container": "cntr_1"},)}),
        (
            RESPONSES,
            {
                "tools": [
                    {"type": "web_search"},
                    {
                        "type": "shell",
                        "environment": {"type": "container_reference", "container_id": "cntr_1"},
                    },
                ]
            },
        ),
        (MESSAGES, {"container": "container_1"}),
        (MESSAGES, {"container": {"id": "container_1", "skills": []}}),
    ],
)
def test_c8_what_changes_or_polls_server_state_passes_through(api, extra):
    [ask] = api.split({**MINIMAL[api], **extra})
    assert not ask.cacheable
    assert ask.reason


@pytest.mark.parametrize(
    ("api", "extra"),
    [
        (RESPONSES, {"background": False, "conversation": None, "store": True}),
        (RESPONSES, {"previous_response_id": "resp_1"}),
        (RESPONSES, {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
        (RESPONSES, {"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}),
        (MESSAGES, {"container": {"skills": [{"skill_id": "pdf"}]}}),
        (CHAT, {"store": True}),
    ],
)
def test_what_only_refers_to_state_is_cached(api, extra):
    [ask] = api.split({**MINIMAL[api], **extra})
    assert ask.cacheable


def test_the_previous_response_is_part_of_the_question():
    assert key_of(RESPONSES, {"input": "x", "previous_response_id": "a"}) != key_of(
        RESPONSES, {"input": "x", "previous_response_id": "b"}
    )


@pytest.mark.parametrize("wanted", ["float", "base64", None])
def test_embeddings_are_keyed_without_their_encoding(wanted):
    assert key_of(EMBEDDINGS, {"input": "x", "encoding_format": wanted}) == key_of(EMBEDDINGS, {"input": "x"})


def test_an_encoding_that_floats_cannot_give_counts():
    body = {"input": "x", "encoding_format": "ubinary"}
    assert key_of(EMBEDDINGS, body) != key_of(EMBEDDINGS, {"input": "x"})
    [ask] = EMBEDDINGS.split(body)
    assert EMBEDDINGS.merge_body([ask.question], transport=ask.transport) == body


@pytest.mark.parametrize("api", APIS, ids=str)
def test_joining_what_was_split_gives_the_body_again(api):
    plain = MINIMAL[api]
    [ask] = api.split(plain)
    assert api.merge_body([ask.question], ask.n, transport=ask.transport) == plain


@given(st.integers(1, 200))
def test_a_joined_body_asks_for_n_samples_and_splits_into_the_same_question(n):
    [ask] = CHAT.split({**CHAT_BODY, "n": 5, "user": "me", "stream": True})
    body = CHAT.merge_body([ask.question], n, transport=ask.transport)
    assert CHAT.split(body)[0].question == ask.question
    assert CHAT.split(body)[0].n == n
    assert body["user"] == "me"
    assert "stream" not in body
    assert ("n" in body) is (n > 1)


def test_a_joined_stream_asks_for_its_usage_and_keeps_other_options():
    transport = {"stream": False, "stream_options": {"include_obfuscation": False}}
    body = CHAT.merge_body([CHAT_BODY], 2, stream=True, transport=transport)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert MESSAGES.merge_body([{"x": 1}], stream=True) == {"x": 1, "stream": True}


@pytest.mark.parametrize("api", [RESPONSES, EMBEDDINGS, MESSAGES, MODERATIONS], ids=str)
def test_an_api_without_n_gives_one_sample_per_call(api):
    assert api.max_n == 1
    with pytest.raises(ValueError, match="gives one sample"):
        api.merge_body([MINIMAL[api]], 2)


def test_several_questions_share_a_call_where_they_differ_in_their_item_only():
    asks = COMPLETIONS.split({"model": "m", "prompt": ["a", "b", "c"], "n": 2, "user": "u"})
    body = COMPLETIONS.merge_body([asks[0].question, asks[2].question], 2, transport=asks[0].transport)
    assert body == {"model": "m", "prompt": ["a", "c"], "n": 2, "user": "u"}
    with pytest.raises(ValueError, match="differ in 'prompt' only"):
        COMPLETIONS.merge_body([{"model": "m", "prompt": "a"}, {"model": "other", "prompt": "b"}])
    with pytest.raises(ValueError, match="holds one question"):
        CHAT.merge_body([CHAT_BODY, CHAT_BODY])


@pytest.mark.parametrize(
    ("options", "injected"),
    [
        ({}, True),
        ({"stream_options": None}, True),
        ({"stream_options": {"include_usage": False}}, True),
        ({"stream_options": {"include_usage": True}}, False),
        ({"stream_options": "broken"}, False),
    ],
)
def test_usage_is_asked_for_where_the_caller_did_not(options, injected):
    body = {**CHAT_BODY, "stream": True, **options}
    changed, was = CHAT.inject_usage(body)
    assert was is injected
    assert (changed == body) is not injected
    if injected:
        assert changed["stream_options"]["include_usage"] is True
    assert CHAT.inject_usage(CHAT_BODY) == (CHAT_BODY, False)
    assert RESPONSES.inject_usage({"stream": True}) == ({"stream": True}, False)


def test_c9_equal_bodies_to_two_apis_are_two_questions_within_one_scope():
    keys = set()
    for api, url in ((EMBEDDINGS, "embeddings"), (MODERATIONS, "moderations"), (RESPONSES, "responses")):
        [ask] = api.split({"model": "m", "input": "text"})
        at = f"https://api.example/v1/{url}"
        [plain] = questions_of(api, [ask], at, {})
        assert plain == questions_of(api, [ask], at, {}, scope=at)[0]
        assert plain.document == encode({"body": ask.question})
        [scoped] = questions_of(api, [ask], at, {}, scope="mine")
        keys |= {plain.key, scoped.key}
        model = OpenAIModel("m", base_url="https://api.example/v1", endpoint=f"/{url}")
        assert model.question(Request("text"), "mine") == scoped
        assert model.question(Request("text"), at) == plain
    assert len(keys) == 6


def test_headers_that_change_the_answer_are_part_of_the_document_and_others_are_not():
    [ask] = MESSAGES.split(MINIMAL[MESSAGES])
    assert question_document(ask) == question_document(ask, {"x-api-key": "secret"}) == {"body": ask.question}
    headers = {
        "OpenAI-Beta": "x=v1 ",
        "Anthropic-Version": "2023-06-01",
        "anthropic-beta": " a, b",
        "Authorization": "Bearer secret",
        "x-stainless-lang": "python",
    }
    document = question_document(ask, headers)
    expected = {"anthropic-beta": "a, b", "anthropic-version": "2023-06-01", "openai-beta": "x=v1"}
    assert document == {"body": ask.question, "headers": expected}
    assert list(document["headers"]) == sorted(expected)
    assert "secret" not in json.dumps(document)


@pytest.mark.parametrize(
    ("url", "scope"),
    [
        ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
        ("HTTPS://API.OpenAI.com:443/v1//chat/completions/", "https://api.openai.com/v1/chat/completions"),
        ("http://user:pa:ss@Host:80/v1/messages#top", "http://host/v1/messages"),
        ("http://host:443/x", "http://host:443/x"),
        ("https://host:8443/x", "https://host:8443/x"),
        ("https://[2001:DB8::1]:443/x", "https://[2001:db8::1]/x"),
        ("https://host:/x", "https://host/x"),
        ("https://host", "https://host"),
        ("https://host/Case/Counts", "https://host/Case/Counts"),
        ("https://host/v1/messages?beta=true", "https://host/v1/messages?beta=true"),
        (
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1&API-Key=secret",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1",
        ),
        ("https://host/x?key=secret", "https://host/x"),
        ("https://host/x?api%2Dkey=secret&b=2&a=1", "https://host/x?b=2&a=1"),
        ("https://api.together.ai:443/v1/embeddings", "https://api.together.xyz/v1/embeddings"),
        (
            "https://API-inference.together.ai/v1/chat/completions",
            "https://api.together.xyz/v1/chat/completions",
        ),
        ("https://api.together.ai.example.com/v1", "https://api.together.ai.example.com/v1"),
        ("https://api.together.ai:8443/v1", "https://api.together.ai:8443/v1"),
    ],
)
def test_a_scope_is_the_endpoint_in_one_spelling_without_credentials(url, scope):
    assert scope_of(url) == scope
    assert scope_of(scope) == scope


@pytest.mark.parametrize("url", ["/v1/chat/completions", "api.openai.com/v1", "", "https://[broken/x"])
def test_a_scope_needs_a_whole_url(url):
    with pytest.raises(BadRequest, match="the URL of an endpoint"):
        scope_of(url)


@pytest.mark.parametrize(
    ("method", "url", "api"),
    [
        ("POST", "https://api.openai.com/v1/chat/completions", CHAT),
        ("post", "/chat/completions", CHAT),
        ("POST", "chat/completions", CHAT),
        ("POST", "/openai/deployments/d/chat/completions?api-version=2024-06-01", CHAT),
        ("POST", "/v1/completions", COMPLETIONS),
        ("POST", "/v1/responses/", RESPONSES),
        ("POST", "/v1/embeddings", EMBEDDINGS),
        ("POST", "/v1/moderations", MODERATIONS),
        ("POST", "https://api.anthropic.com/v1/messages?beta=true", MESSAGES),
        ("POST", "/messages#x", MESSAGES),
        ("GET", "/v1/chat/completions", None),
        ("GET", "/v1/responses/resp_1", None),
        ("DELETE", "/v1/responses", None),
        ("POST", "/v1/responses/resp_1/cancel", None),
        ("POST", "/v1/responses/input_tokens", None),
        ("POST", "/v1/chat/completions/chatcmpl-1", None),
        ("POST", "/v1/messages/count_tokens", None),
        ("POST", "/v1/messages/batches", None),
        ("POST", "/v1/threads/thread_1/messages", None),
        ("POST", "/v1/fim/completions", None),
        ("POST", "/v1/models", None),
        ("POST", "/", None),
        ("POST", "", None),
    ],
)
def test_an_api_is_known_by_the_end_of_the_path_of_a_creating_request(method, url, api):
    assert api_for(method, url) is api


# Where the order of mapping keys counts (C9).

PROPERTIES = {"reason": {"type": "string"}, "score": {"type": "number", "minimum": 0}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": {"a": {"const": 1}, "b": {"const": 2}}}
CALL = {"query": {"city": "Oslo", "unit": "C"}, "limit": 3}


def turned(value):
    """Return a JSON value with the keys of all of its mappings the other way round."""
    if isinstance(value, dict):
        return {name: turned(value[name]) for name in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


SHOWN = [
    (CHAT, lambda s: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}}),
    (CHAT, lambda s: {"response_format": {"type": "json_schema", "schema": s}}),
    (CHAT, lambda s: {"response_format": {"type": "json_schema", "json_schema": s}}),
    (CHAT, lambda s: {"response_format": {"type": "json", "value": s}}),
    (CHAT, lambda s: {"tools": [{"type": "function", "function": {"name": "f", "parameters": s}}] * 7}),
    (CHAT, lambda s: {"functions": [{"name": "f", "parameters": s}]}),
    (CHAT, lambda s: {"guided_json": s}),
    (CHAT, lambda s: {"structured_outputs": {"json": s}}),
    (CHAT, lambda s: {"nvext": {"guided_json": s}}),
    (CHAT, lambda s: {"grammar": {"type": "json", "value": s}}),
    (TEXT_GENERATION, lambda s: {"parameters": {"grammar": {"type": "json", "value": s}}}),
    (CHAT, lambda s: {"tools": [{"name": "f", "input_schema": s}]}),
    (CHAT, lambda s: {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": s}}]}]}),
    (COMPLETIONS, lambda s: {"guided_json": s}),
    (COMPLETIONS, lambda s: {"json_schema": s}),
    (RESPONSES, lambda s: {"text": {"format": {"type": "json_schema", "name": "x", "schema": s}}}),
    (RESPONSES, lambda s: {"tools": [{"type": "function", "name": "f", "parameters": s}]}),
    (RESPONSES, lambda s: {"tools": [{"type": "namespace", "tools": [{"name": "f", "parameters": s}]}]}),
    (RESPONSES, lambda s: {"input": [{"type": "mcp_list_tools", "tools": [{"input_schema": s}]}]}),
    (MESSAGES, lambda s: {"tools": [{"name": "f", "input_schema": s}]}),
    (MESSAGES, lambda s: {"tools": [{"name": "f", "input_schema": {}, "input_examples": [s, s]}]}),
    (MESSAGES, lambda s: {"output_config": {"format": {"type": "json_schema", "schema": s}}}),
    (MESSAGES, lambda s: {"output_format": {"type": "json_schema", "schema": s}}),
    (MESSAGES, lambda s: {"messages": [{"role": "user", "content": [{"type": "tool_use", "input": s}]}]}),
    (MESSAGES, lambda s: {"messages": [{"content": [{"type": "mcp_tool_use", "input": s}]}] * 9}),
]


@pytest.mark.parametrize(
    "shown", [SCHEMA, CALL, {"schema": {"b": 1, "a": 2}, "x": []}], ids=["schema", "call", "own"]
)
@pytest.mark.parametrize(("api", "body"), SHOWN)
def test_c9_the_order_counts_in_what_the_model_is_shown_as_written(api, body, shown):
    if "schema" in shown and "json_schema" in body(shown).get("response_format", {}):
        return  # taken for the wrapper of a schema
    asked = {**MINIMAL[api], **body(shown)}
    assert key_of(api, {**MINIMAL[api], **body(turned(shown))}) != key_of(api, asked)
    for name in shown:  # a change at any one level is enough
        one = {**shown, name: turned(shown[name])}
        same = json.dumps(one) == json.dumps(shown)
        assert (key_of(api, {**MINIMAL[api], **body(one)}) == key_of(api, asked)) is same
    copied = json.loads(json.dumps(asked))
    assert key_of(api, copied) == key_of(api, asked)


@pytest.mark.parametrize(("api", "body"), SHOWN)
def test_c9_the_order_of_all_other_mappings_does_not_count(api, body):
    """Those around the schema, too."""
    asked = {**MINIMAL[api], **body({"one": 1})}
    assert key_of(api, turned(asked)) == key_of(api, asked)


@pytest.mark.parametrize("api", APIS, ids=str)
@given(body=st.dictionaries(st.sampled_from(["model", "x", "logit_bias", "tool_choice"]), json_values))
def test_c9_the_order_in_a_body_without_schemas_does_not_count(api, body):
    asked = {**MINIMAL[api], **body}
    assert key_of(api, turned(asked)) == key_of(api, asked)


# What an answer can be used for (C9).


@pytest.mark.parametrize("store", [None, True])
def test_c9_a_response_that_is_stored_is_one_question_however_that_is_written(store):
    [ask] = RESPONSES.split({**MINIMAL[RESPONSES], "store": store})
    assert key_of(RESPONSES, {**MINIMAL[RESPONSES], "store": store}) == key_of(RESPONSES, MINIMAL[RESPONSES])
    sent = RESPONSES.merge_body([ask.question], transport=ask.transport)
    assert sent == {**MINIMAL[RESPONSES], "store": store}


def test_c9_a_response_that_is_not_stored_is_another_question_than_one_that_is():
    body = {**MINIMAL[RESPONSES], "store": False}
    [ask] = RESPONSES.split(body)
    assert key_of(RESPONSES, body) != key_of(RESPONSES, MINIMAL[RESPONSES])
    assert RESPONSES.merge_body([ask.question], transport=ask.transport) == body


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS], ids=str)
def test_c9_store_does_not_count_where_no_request_refers_to_an_answer(api):
    assert key_of(api, {**MINIMAL[api], "store": False}) == key_of(api, MINIMAL[api])


@pytest.mark.parametrize(
    "field",
    [
        {"include": ["reasoning.encrypted_content"]},
        {"previous_response_id": "resp_1"},
        {"truncation": "auto"},
        {"service": "x"},
    ],
)
def test_c9_what_later_requests_need_of_a_response_counts(field):
    assert key_of(RESPONSES, {**MINIMAL[RESPONSES], **field}) != key_of(RESPONSES, MINIMAL[RESPONSES])


@pytest.mark.parametrize(
    "field", [{"inference_geo": "eu"}, {"mcp_servers": []}, {"betas": ["x"]}, {"speed": "fast"}]
)
def test_c9_fields_of_messages_count_unless_they_are_listed(field):
    assert key_of(MESSAGES, {**MINIMAL[MESSAGES], **field}) != key_of(MESSAGES, MINIMAL[MESSAGES])


@pytest.mark.parametrize(
    "typed",
    [
        {"output_dtype": "int8"},
        {"output_dtype": "float"},
        {"embedding_types": ["ubinary"]},
        {"endianness": "big"},
    ],
)
def test_c9_the_encoding_of_vectors_counts_beside_an_output_type(typed):
    body = {**MINIMAL[EMBEDDINGS], **typed}
    keys = {str(key_of(EMBEDDINGS, {**body, "encoding_format": form})) for form in ("float", "base64")}
    assert len({*keys, str(key_of(EMBEDDINGS, body))}) == 3


@pytest.mark.parametrize("known", [{}, {"dimensions": 4}, {"user": "me"}, {"input_type": "query"}])
def test_c9_the_encoding_of_vectors_of_floats_does_not_count(known):
    body = {**MINIMAL[EMBEDDINGS], **known}
    for form in ("float", "base64", None):
        assert key_of(EMBEDDINGS, {**body, "encoding_format": form}) == key_of(EMBEDDINGS, body)


TOOLS = {
    "tools": [
        {
            "type": "mcp",
            "server_url": "https://x",
            "authorization": "sk-secret",
            "headers": {"X-Key": "sk-more"},
        },
        {"type": "function", "name": "f"},
    ]
}
SERVERS = {"mcp_servers": [{"type": "url", "url": "https://x", "authorization_token": "sk-secret"}]}


@pytest.mark.parametrize(("api", "extra"), [(RESPONSES, TOOLS), (MESSAGES, SERVERS)])
def test_credentials_within_a_body_are_not_stored_and_count_all_the_same(api, extra):
    def document(fields):
        [ask] = api.split({**MINIMAL[api], **fields})
        return ask, provider_question("s", question_document(ask), as_written=api.as_written)

    ask, question = document(extra)
    assert b"sk-" not in question.document
    assert b"server_url" in question.document or b"https://x" in question.document
    assert ask.question[next(iter(extra))] == extra[next(iter(extra))]  # what is sent is what was written
    _, other = document(json.loads(json.dumps(extra).replace("sk-secret", "sk-other")))
    assert other.key != question.key
    assert document(extra)[1].key == question.key
