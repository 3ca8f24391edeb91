"""Answers and samples: an answer is cut into samples and put together again without loss."""

from __future__ import annotations

import copy
import json
import random
import struct

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import errors, jsontext
from cachepipe.values import Codec, shown
from cachepipe.wire import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    MODERATIONS,
    RESPONSES,
    BadAnswer,
    bills_prompt,
)
from cachepipe.wire.embeddings import packed, to_base64, to_floats

MESSAGE = {"role": "assistant", "content": "Hello there", "refusal": None, "annotations": []}
CHOICE = {"index": 0, "message": MESSAGE, "logprobs": None, "finish_reason": "stop", "more": {"a": [1]}}
CHAT_ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m-2024",
    "choices": [CHOICE],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    "service_tier": "default",
    "system_fingerprint": "fp_1",
    "unknown": {"x": None},
}
TEXT_ANSWER = {
    "id": "cmpl-1",
    "choices": [{"text": " there", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "object": "text_completion",
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "model": "m",
    "output": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
        }
    ],
    "usage": {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4},
}
ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 1},
}
EMBEDDED = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}],
    "model": "e",
    "usage": {"prompt_tokens": 2, "total_tokens": 2},
}
MODERATED = {
    "id": "modr-1",
    "model": "o",
    "results": [{"flagged": True, "categories": {"violence": True, "hate": False}}],
}
ANSWERS = [
    (CHAT, CHAT_ANSWER, {}),
    (COMPLETIONS, TEXT_ANSWER, {"prompt": "Hi"}),
    (RESPONSES, RESPONSE, {}),
    (MESSAGES, ANTHROPIC, {}),
    (EMBEDDINGS, EMBEDDED, {"input": "Hi"}),
    (MODERATIONS, MODERATED, {"input": "Hi"}),
]


def chat_answer(*texts, usage=None, **envelope):
    choices = [
        {**CHOICE, "index": i, "message": {**MESSAGE, "content": text}} for i, text in enumerate(texts)
    ]
    return {**CHAT_ANSWER, "choices": choices, "usage": usage or CHAT_ANSWER["usage"], **envelope}


def ask_for(api, body=None):
    return api.split(body or {})[0]


@pytest.mark.parametrize(("api", "answer", "body"), ANSWERS, ids=str)
def test_a_lone_sample_is_served_as_the_provider_worded_it_byte_for_byte(api, answer, body):
    raw = orjson.dumps(answer)
    [sample] = api.samples(raw)
    assert api.samples(answer) == [sample]
    assert orjson.dumps(api.answer([sample], ask_for(api, body))) == raw
    assert api.answer_bytes([orjson.dumps(sample)], ask_for(api, body)) == raw


@pytest.mark.parametrize(("api", "answer", "body"), ANSWERS, ids=str)
def test_cutting_and_joining_leave_their_arguments_as_they_are(api, answer, body):
    kept = copy.deepcopy(answer)
    samples = api.samples(answer)
    stored = copy.deepcopy(samples)
    api.answer(samples, ask_for(api, body))
    assert answer == kept
    assert samples == stored


def test_each_choice_is_a_sample_with_its_share_of_the_usage():
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 31,
        "total_tokens": 41,
        "completion_tokens_details": {"reasoning_tokens": 7},
    }
    samples = CHAT.samples(chat_answer("a" * 9, "b" * 99, "c", usage=usage))
    assert [sample["choices"][0]["message"]["content"][0] for sample in samples] == ["a", "b", "c"]
    assert all(sample["choices"][0]["index"] == 0 for sample in samples)
    shares = [sample["usage"]["completion_tokens"] for sample in samples]
    assert sum(shares) == 31
    assert shares[1] > shares[0] >= shares[2]
    assert [bills_prompt(sample) for sample in samples] == [True, False, False]
    assert CHAT.answer(samples, ask_for(CHAT, {"n": 3})) == chat_answer("a" * 9, "b" * 99, "c", usage=usage)


def test_a_sample_of_a_shared_call_served_alone_bears_no_mark():
    second = CHAT.samples(chat_answer("one", "two"))[1]
    alone = CHAT.answer([second], ask_for(CHAT))
    assert list(alone) == list(CHAT_ANSWER)
    assert CHAT.answer_bytes([orjson.dumps(second)], ask_for(CHAT)) == orjson.dumps(alone)
    assert CHAT.answer_bytes([Codec().encode(second)], ask_for(CHAT)) == orjson.dumps(alone)
    again = CHAT.samples(alone)[0]
    assert bills_prompt(again)


def test_choices_out_of_order_are_sorted_by_index():
    answer = chat_answer("a", "b", "c", "d")
    random.Random(1).shuffle(answer["choices"])
    contents = [sample["choices"][0]["message"]["content"] for sample in CHAT.samples(answer)]
    assert contents == ["a", "b", "c", "d"]


def test_a_lone_choice_is_numbered_zero():
    [sample] = CHAT.samples({**CHAT_ANSWER, "choices": [{**CHOICE, "index": 3}]})
    assert sample == CHAT_ANSWER


def test_choices_without_index_keep_their_order_and_are_numbered_when_joined():
    choices = [{"text": text, "finish_reason": "eos"} for text in "ab"]
    samples = COMPLETIONS.samples({"choices": choices, "object": "text.completion"})
    joined = COMPLETIONS.answer(samples, ask_for(COMPLETIONS, {"n": 2}))
    assert [(choice["index"], choice["text"]) for choice in joined["choices"]] == [(0, "a"), (1, "b")]
    assert "usage" not in joined


def test_samples_of_several_calls_make_one_answer():
    first = CHAT.samples(chat_answer("a", id="one"))
    rest = CHAT.samples(chat_answer("b", "c", id="two"))
    joined = CHAT.answer([*first, *rest], ask_for(CHAT, {"n": 3}))
    assert joined["id"] == "one"
    assert [choice["index"] for choice in joined["choices"]] == [0, 1, 2]
    assert joined["usage"] == {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}
    assert CHAT.answer_bytes(
        list(map(orjson.dumps, [*first, *rest])), ask_for(CHAT, {"n": 3})
    ) == orjson.dumps(joined)


def test_a_usage_that_is_known_in_part_is_not_given_as_the_whole():
    [known] = CHAT.samples(CHAT_ANSWER)
    assert CHAT.answer([known, {**known, "usage": None}], ask_for(CHAT, {"n": 2}))["usage"] is None


def test_an_answer_without_choices_is_short_and_not_bad():
    assert CHAT.samples({**CHAT_ANSWER, "choices": []}) == []
    with pytest.raises(ValueError, match="at least one sample"):
        CHAT.answer([], ask_for(CHAT))


@given(st.data())
def test_samples_of_any_choices_join_to_the_answer_again(data):
    texts = data.draw(st.lists(st.text(max_size=20), min_size=1, max_size=5))
    used = data.draw(st.tuples(st.integers(0, 500), st.integers(0, 500)))
    usage = {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)}
    answer = chat_answer(*texts, usage=usage)
    samples = CHAT.samples(orjson.dumps(answer))
    assert len(samples) == len(texts)
    joined = CHAT.answer(samples, ask_for(CHAT, {"n": len(texts)}))
    assert orjson.dumps(joined) == orjson.dumps(answer)


def prompts_answer(prompts, n):
    choices = [
        {"index": i, "text": f"{i}", "logprobs": None, "finish_reason": "stop"} for i in range(prompts * n)
    ]
    usage = {"prompt_tokens": 70, "completion_tokens": 5, "total_tokens": 75}
    return {**TEXT_ANSWER, "choices": choices, "usage": usage}


def test_a_list_of_prompts_is_cut_by_prompt_and_joined_again():
    body = {"prompt": ["a", "b" * 60, "c"], "n": 2}
    asks = COMPLETIONS.split(body)
    answer = prompts_answer(3, 2)
    samples = COMPLETIONS.samples(answer, [ask.question for ask in asks])
    assert [bills_prompt(sample) for sample in samples] == [True, False] * 3
    assert samples[2]["usage"]["prompt_tokens"] == samples[3]["usage"]["prompt_tokens"] > 50
    assert COMPLETIONS.answer(samples, asks[0]) == answer


@pytest.mark.parametrize("broken", [lambda c: c[:-1], lambda c: [*c[:-1], {**c[-1], "index": 9}]])
def test_choices_that_cannot_be_told_apart_by_prompt_are_refused(broken):
    questions = [ask.question for ask in COMPLETIONS.split({"prompt": ["a", "b"], "n": 2})]
    answer = prompts_answer(2, 2)
    with pytest.raises(BadAnswer, match="cannot be told apart"):
        COMPLETIONS.samples({**answer, "choices": broken(answer["choices"])}, questions)


@pytest.mark.parametrize(
    ("api", "answer"),
    [
        (CHAT, b""),
        (CHAT, b"{"),
        (CHAT, b"[]"),
        (CHAT, b"<html>"),
        (CHAT, {"error": {"message": "no"}}),
        (CHAT, {**CHAT_ANSWER, "error": {"message": "no"}}),
        (CHAT, {"object": "error", "message": "no"}),
        (CHAT, {**CHAT_ANSWER, "choices": None}),
        (CHAT, {**CHAT_ANSWER, "choices": {}}),
        (CHAT, {**CHAT_ANSWER, "choices": ["x"]}),
        (CHAT, {**CHAT_ANSWER, "choices": [{"index": 0, "finish_reason": "stop"}]}),
        (CHAT, {**CHAT_ANSWER, "choices": [{**CHOICE, "message": "hi"}]}),
        (CHAT, {**CHAT_ANSWER, "choices": [{**CHOICE, "finish_reason": "error"}]}),
        (CHAT, {**CHAT_ANSWER, "choices": [{**CHOICE, "error": {"code": 502}}]}),
        (COMPLETIONS, {**TEXT_ANSWER, "choices": [{"text": None}]}),
        (RESPONSES, {**RESPONSE, "status": "failed"}),
        (RESPONSES, {**RESPONSE, "status": "cancelled"}),
        (RESPONSES, {**RESPONSE, "status": "queued"}),
        (RESPONSES, {**RESPONSE, "status": "in_progress"}),
        (RESPONSES, {**RESPONSE, "error": {"code": "server_error"}}),
        (RESPONSES, {**RESPONSE, "output": None}),
        (MESSAGES, {"type": "error", "error": {"type": "overloaded_error"}}),
        (MESSAGES, {**ANTHROPIC, "stop_reason": None}),
        (MESSAGES, {**ANTHROPIC, "content": "Hi"}),
        (EMBEDDINGS, {"data": None}),
        (EMBEDDINGS, {**EMBEDDED, "data": [{"index": 0, "embedding": None}]}),
        (EMBEDDINGS, {**EMBEDDED, "data": [{"index": 1, "embedding": [1.0]}]}),
        (MODERATIONS, {"results": "x"}),
    ],
)
def test_c8_what_is_no_answer_is_refused_in_a_sentence(api, answer):
    with pytest.raises(BadAnswer) as caught:
        api.samples(answer)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, errors.BadAnswer)
    assert len(str(caught.value).split()) > 4


def test_c8_incomplete_by_length_is_an_answer():
    cut = {**RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    assert RESPONSES.samples(cut) == [cut]
    assert MESSAGES.samples({**ANTHROPIC, "stop_reason": "max_tokens"})
    assert COMPLETIONS.samples(TEXT_ANSWER)[0]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("api", [RESPONSES, MESSAGES], ids=str)
def test_an_api_with_one_answer_per_call_joins_one_sample(api):
    with pytest.raises(ValueError, match="holds one sample"):
        api.answer([{}, {}], ask_for(api))


float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(float32s, max_size=9))
def test_floats_and_base64_turn_into_each_other_without_loss(vector):
    text = to_base64(vector)
    assert struct.pack(f"<{len(vector)}f", *to_floats(text)) == struct.pack(f"<{len(vector)}f", *vector)
    assert to_base64(to_floats(text)) == text


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5), max_size=5))
def test_a_vector_is_packed_only_where_nothing_is_lost(vector):
    form = packed(vector)
    assert form == vector or to_floats(form) == vector


@pytest.mark.parametrize("vector", [[1, -2, 127], [0.5, 0], [0.1], [1e300], []])
def test_a_vector_that_is_not_of_32_bit_floats_is_served_as_it_came(vector):
    body = {"input": "x", "encoding_format": "int8"}
    answer = {"data": [{"index": 0, "embedding": vector}], "model": "e"}
    for wanted in (body, {"input": "x"}):
        served = EMBEDDINGS.answer(EMBEDDINGS.samples(answer), ask_for(EMBEDDINGS, wanted))
        assert orjson.dumps(served) == orjson.dumps(answer)


@pytest.mark.parametrize("came", ["float", "base64"])
@pytest.mark.parametrize("wanted", [None, "float", "base64"])
@given(vectors=st.lists(st.lists(float32s, min_size=2, max_size=2), min_size=1, max_size=4))
def test_embeddings_come_in_the_encoding_that_is_asked_for(came, wanted, vectors):
    def answer(encoding):
        encode = to_base64 if encoding == "base64" else list
        data = [{"object": "embedding", "index": i, "embedding": encode(v)} for i, v in enumerate(vectors)]
        return {**EMBEDDED, "data": data, "usage": {"prompt_tokens": 50, "total_tokens": 50}}

    asks = EMBEDDINGS.split(
        {"input": ["x" * (i + 1) for i in range(len(vectors))], "encoding_format": wanted}
    )
    samples = EMBEDDINGS.samples(answer(came), [ask.question for ask in asks])
    assert sum(sample["usage"]["prompt_tokens"] for sample in samples) == 50
    assert all(bills_prompt(sample) for sample in samples)
    assert EMBEDDINGS.answer(samples, asks[0]) == answer(wanted)
    assert orjson.loads(EMBEDDINGS.answer_bytes(list(map(orjson.dumps, samples)), asks[0])) == answer(wanted)


def test_embeddings_out_of_order_go_to_their_inputs():
    data = [{"index": i, "embedding": [float(i)]} for i in (2, 0, 1)]
    samples = EMBEDDINGS.samples({"data": data})
    vectors = [EMBEDDINGS.answer([sample], ask_for(EMBEDDINGS))["data"][0]["embedding"] for sample in samples]
    assert vectors == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("api", [EMBEDDINGS, MODERATIONS], ids=str)
def test_results_that_are_not_one_per_input_are_refused(api):
    answer = EMBEDDED if api is EMBEDDINGS else MODERATED
    with pytest.raises(BadAnswer, match="2 inputs were sent"):
        api.samples(answer, [{"input": "a"}, {"input": "b"}])


def test_functions_have_no_streams():
    for api in (EMBEDDINGS, MODERATIONS):
        with pytest.raises(ValueError, match="no event streams"):
            api.recorder()
        with pytest.raises(ValueError, match="no event streams"):
            api.stream([], ask_for(api))


@pytest.mark.parametrize(
    ("api", "answer", "text", "finish"),
    [
        (CHAT, CHAT_ANSWER, "Hello there", "stop"),
        (COMPLETIONS, TEXT_ANSWER, " there", "length"),
        (RESPONSES, RESPONSE, "Hi", "completed"),
        (MESSAGES, ANTHROPIC, "Hi", "end_turn"),
        (EMBEDDINGS, EMBEDDED, "2 numbers", None),
        (MODERATIONS, MODERATED, "flagged: violence", None),
    ],
)
def test_a_summary_shows_text_finish_model_and_tokens(api, answer, text, finish):
    [sample] = api.samples(answer)
    summary = api.summary(sample)
    assert (summary["text"], summary["finish_reason"], summary["model"]) == (
        text,
        finish,
        answer.get("model"),
    )
    usage = answer.get("usage") or {}
    assert summary["prompt_tokens"] == usage.get("prompt_tokens", usage.get("input_tokens"))


def test_a_summary_of_calls_of_tools_shows_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    [sample] = CHAT.samples(
        {"choices": [{"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    )
    assert CHAT.summary(sample)["text"] == 'f({"a":1})'
    used = {**ANTHROPIC, "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]}
    assert MESSAGES.summary(used)["text"] == 'f({"a":1})'
    item = {"type": "function_call", "name": "f", "arguments": '{"a":1}', "call_id": "c"}
    assert RESPONSES.summary({**RESPONSE, "output": [item]})["text"] == 'f({"a":1})'


# Vectors of other types than floats.


def embedding_answer(*vectors):
    data = [{"object": "embedding", "index": place, "embedding": v} for place, v in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "e", "usage": {"prompt_tokens": 2, "total_tokens": 2}}


@pytest.mark.parametrize(
    ("fields", "vector"),
    [
        ({"output_dtype": "int8", "encoding_format": "float"}, [1, -2, 127]),
        ({"output_dtype": "int8", "encoding_format": "base64"}, "Af5/"),
        ({"output_dtype": "int8", "encoding_format": "base64"}, "Af5/AQ=="),
        ({"output_dtype": "int8"}, [1, -2, 127]),
        ({"output_dtype": "float", "encoding_format": "float"}, [0.5, -2.0]),
        (
            {"output_dtype": "ubinary", "encoding_format": "base64"},
            [3, 4],
        ),  # a server that ignores the format
        ({"embedding_types": ["a"], "encoding_format": "float"}, [[0.5], [1.0]]),
        ({}, [0.5, -2.0]),
        ({"encoding_format": "base64"}, [[0.5], [1.0]]),
        ({"encoding_format": "base64"}, [1e300]),
    ],
)
def test_a_vector_comes_back_as_it_was_asked_for(fields, vector):
    [ask] = EMBEDDINGS.split({"model": "e", "input": "x", **fields})
    [sample] = EMBEDDINGS.samples(embedding_answer(vector))
    assert EMBEDDINGS.answer([sample], ask) == embedding_answer(vector)
    assert orjson.loads(EMBEDDINGS.answer_bytes([orjson.dumps(sample)], ask)) == embedding_answer(vector)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_c9_a_vector_with_infinities_is_written_as_the_sdks_read_it(form):
    packed_vector = to_base64([float("inf"), float("-inf"), 0.5])
    [ask] = EMBEDDINGS.split({"model": "e", "input": "x", "encoding_format": form})
    [sample] = EMBEDDINGS.samples(embedding_answer(packed_vector))
    told = json.loads(EMBEDDINGS.answer_bytes([orjson.dumps(sample)], ask))["data"][0]["embedding"]
    assert told == ([float("inf"), float("-inf"), 0.5] if form == "float" else packed_vector)


# Answers that only a lenient parser reads.


@pytest.mark.parametrize(
    "more", [b"NaN", b"1e999", b"-1000000000000000000000001", b'"\\udead"', b'{"a": Infinity}'], ids=repr
)
@pytest.mark.parametrize(
    ("api", "answer"), [(CHAT, CHAT_ANSWER), (COMPLETIONS, TEXT_ANSWER), (RESPONSES, RESPONSE)], ids=str
)
def test_c9_a_lone_sample_keeps_the_text_of_its_answer(api, answer, more):
    text = json.dumps(answer, indent=2).encode()[:-1] + b', "odd": %b }\n' % more
    [sample] = api.samples(text)
    stored = Codec().encode(sample)
    orjson.loads(stored)
    again = Codec().decode(stored)
    assert repr(dict(again)) == repr(dict(sample)) == repr(json.loads(text))
    [ask] = api.split({"model": "m", "prompt": "x", "messages": [], "input": "x"})
    assert jsontext.dumps(api.answer([again], ask)) == text
    assert shown(stored) == {"raw": text.decode()}


def test_c9_choices_that_are_split_and_joined_keep_their_numbers():
    odd = b"[1.0, 1, -0.0, 1e22, 0.1, 18446744073709551616, 1e-7, NaN]"
    choice = (
        b'{"index":%d,"message":{"role":"assistant","content":"a"},"finish_reason":"stop","odd":' + odd + b"}"
    )
    text = b'{"id":"x","choices":[%b,%b]}' % (choice % 0, choice % 1)
    samples = [Codec().decode(Codec().encode(sample)) for sample in CHAT.samples(text)]
    [ask] = CHAT.split({"model": "m", "messages": [], "n": 2})
    assert repr(json.loads(jsontext.dumps(CHAT.answer(samples, ask)))) == repr(json.loads(text))
    for sample in samples:
        assert repr(sample["choices"][0]["odd"]) == repr(json.loads(odd))


@pytest.mark.parametrize("index", [[1], {}, "1", 1.0, True, None])
def test_c8_embeddings_with_odd_numbers_are_refused(index):
    data = [{"index": 0, "embedding": [0.5]}, {"index": index, "embedding": [1.5]}]
    answer = {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 2, "total_tokens": 2}}
    with pytest.raises(BadAnswer, match="numbered from 0"):
        EMBEDDINGS.samples(answer, [{"input": "a"}, {"input": "b"}])
