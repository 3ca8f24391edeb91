"""The real SDKs as judges: what is replayed, they read as what was recorded."""

from __future__ import annotations

import anthropic
import httpx
import httpx2
import openai
import orjson
import pytest
import together
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.wire import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

CALLS = [
    {"id": f"call_{i}", "type": "function", "function": {"name": "f", "arguments": '{"city": "New York"}'}}
    for i in "ab"
]
ENTRIES = [
    {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}
    for token in ("Hi", " you")
]


def choice(index=0, content="Hello big world", **more):
    message = {"role": "assistant", "content": content, "refusal": None, **more.pop("message", {})}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": "stop", **more}


def completion(*choices):
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": list(choices),
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
        "system_fingerprint": "fp",
    }


CHATS = {
    "text": completion(choice()),
    "tools": completion(choice(content=None, message={"tool_calls": CALLS}, finish_reason="tool_calls")),
    "logprobs": completion(choice(content="Hi you", logprobs={"content": ENTRIES, "refusal": None})),
    "refusal": completion(choice(content=None, message={"refusal": "I cannot do that"})),
    "several": completion(choice(), choice(1, "Other words"), choice(2, "")),
}
BODY = {"stream": True, "stream_options": {"include_usage": True}}


def answering(module, payload, kind="text/event-stream"):
    def handle(request):
        return module.Response(200, headers={"content-type": kind}, content=payload)

    return module.Client(transport=module.MockTransport(handle))


def openai_client(payload, kind="text/event-stream"):
    return openai.OpenAI(api_key="k", max_retries=0, http_client=answering(httpx2, payload, kind))


@pytest.mark.parametrize("answer", CHATS.values(), ids=CHATS)
def test_openai_accumulates_the_replayed_chunks_into_the_whole_completion(answer):
    [ask] = CHAT.split({**BODY, "n": len(answer["choices"])})
    payload = b"".join(CHAT.stream(CHAT.samples(answer), ask))
    client = openai_client(payload)
    with client.chat.completions.stream(
        model="m", messages=[], stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    told = final.to_dict()
    for number, expected in enumerate(answer["choices"]):
        got = told["choices"][number]
        message = {name: value for name, value in got["message"].items() if name in expected["message"]}
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
            call["function"].pop("parsed_arguments", None)
        assert message == expected["message"]
        assert not any(value for name, value in got["message"].items() if name not in message)
        assert got["finish_reason"] == expected["finish_reason"]
        assert got["logprobs"] == expected["logprobs"]
    assert told["usage"] == answer["usage"]
    assert told["id"] == answer["id"]


def final_of(payload):
    """What openai's own stream helper puts together; None where it cannot."""
    with openai_client(payload).chat.completions.stream(model="m", messages=[]) as stream:
        try:
            [choice] = stream.get_final_completion().to_dict()["choices"]
        except (AttributeError, RuntimeError, TypeError):
            return None
    message = choice["message"]
    calls = [
        (c.get("id"), c["function"]["name"], c["function"]["arguments"])
        for c in message.get("tool_calls") or ()
    ]
    told = [message.get(name) or None for name in ("content", "refusal", "reasoning_content")]
    return told, calls, choice["finish_reason"], (choice.get("logprobs") or {}).get("content")


def read_by(payload):
    """What a reader of the chunks puts together."""
    texts, calls, finish = {}, {}, None
    for chunk in openai_client(payload).chat.completions.create(model="m", messages=[], stream=True):
        for choice in chunk.choices or ():
            finish = choice.finish_reason or finish
            delta = {} if choice.delta is None else choice.delta.to_dict()
            for name in ("content", "refusal", "reasoning_content"):
                texts[name] = texts.get(name, "") + (delta.get(name) or "")
            for call in delta.get("tool_calls") or ():
                made = calls.setdefault(call["index"], ["", "", ""])
                made[0] = call.get("id") or made[0]
                made[1] += call["function"].get("name") or ""
                made[2] += call["function"].get("arguments") or ""
    return texts, calls, finish


def cut(draw, text):
    """A text in pieces."""
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@st.composite
def odd_streams(draw):
    """A stream as one server or another sends it, and the habits that it has."""
    words = st.text('ab {}"é😀\n', max_size=12)
    deltas = []
    for name in draw(st.permutations(["content", "refusal", "reasoning_content"]).map(lambda p: p[:2])):
        deltas += [{name: piece} for piece in cut(draw, draw(words))]
    for index in range(draw(st.integers(0, 2))):
        begun = {
            "index": index,
            "id": f"c{index}",
            "type": "function",
            "function": {"name": "f", "arguments": ""},
        }
        deltas.append({"tool_calls": [begun]})
        parts = cut(draw, orjson.dumps({"x": draw(words)}).decode())
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": part}}]} for part in parts]
    habit = {name: draw(st.booleans()) for name in HABITS}
    if habit["role each time"]:
        deltas = [{"role": "assistant", **delta} for delta in deltas]
    if habit["delta null"]:
        deltas.insert(draw(st.integers(0, len(deltas))), None)
    chunks, said = [], ""
    for delta in [*deltas, {}]:
        said += (delta or {}).get("content") or ""
        more = (
            {"message": {"role": "assistant", "content": said}}
            if habit["message beside"] and delta is not None
            else {}
        )
        finish = "" if habit["empty finish"] else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
        if habit["logprobs"]:
            choice["logprobs"] = {"content": [{"token": "t", "logprob": -1.0, "top_logprobs": []}]}
        chunks.append(
            {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        )
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    if habit["usage"]:
        chunks.append({"choices": None if habit["choices null"] else [], "usage": USAGE})
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    lines = []
    for value in chunks:
        lines += [b": keep-alive", b""] if habit["comments"] else []
        lines += [b"data:" + orjson.dumps(value), b""]
    lines += [] if habit["no DONE"] else [b"data: [DONE]", b""]
    return end.join([*lines, b""])


HABITS = (
    "role each time",
    "delta null",
    "message beside",
    "empty finish",
    "logprobs",
    "usage",
    "choices null",
    "comments",
    "no DONE",
)
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


@given(odd_streams(), st.integers(1, 99))
def test_openai_puts_the_same_together_of_a_stream_and_of_its_replay_whatever_the_habits(stream, size):
    recorder = CHAT.recorder()
    for start in range(0, len(stream), size):
        recorder.feed(stream[start : start + size])
    recorder.close(in_order=True)
    [ask] = CHAT.split({"stream": True})
    replayed = b"".join(CHAT.stream(recorder.samples(), ask))
    assert read_by(replayed) == read_by(stream)
    original = final_of(stream)
    assert original is None or final_of(replayed) == original


@pytest.mark.parametrize("answer", CHATS.values(), ids=CHATS)
def test_every_replayed_chunk_and_answer_is_valid_for_openai(answer):
    [ask] = CHAT.split({**BODY, "n": len(answer["choices"])})
    samples = CHAT.samples(answer)
    for event in list(CHAT.stream(samples, ask))[:-1]:
        openai.types.chat.ChatCompletionChunk.model_validate_json(event.removeprefix(b"data: "))
    joined = CHAT.answer_bytes([orjson.dumps(sample) for sample in samples], ask)
    parsed = openai.types.chat.ChatCompletion.model_validate_json(joined)
    assert parsed == openai.types.chat.ChatCompletion.model_validate(answer)
    for sample in samples:
        alone = CHAT.answer_bytes([orjson.dumps(sample)], ask)
        openai.types.chat.ChatCompletion.model_validate_json(alone)


@pytest.mark.parametrize("name", ["text", "tools", "several"])
def test_together_reads_the_replayed_chunks(name):
    answer = CHATS[name]
    [ask] = CHAT.split({**BODY, "n": len(answer["choices"])})
    payload = b"".join(CHAT.stream(CHAT.samples(answer), ask))
    client = together.Together(api_key="k", max_retries=0, http_client=answering(httpx, payload))
    texts = {}
    for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
        for part in chunk.choices:
            texts[part.index] = texts.get(part.index, "") + (part.delta.content or "")
    assert texts == {c["index"]: c["message"]["content"] or "" for c in answer["choices"]}


def test_openai_reads_the_replayed_chunks_of_completions():
    columns = {
        "tokens": ["a", " b"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": None,
        "text_offset": [0, 1],
    }
    choices = [{"index": 0, "text": "a b", "logprobs": columns, "finish_reason": "stop"}]
    answer = {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": None,
    }
    [ask] = COMPLETIONS.split(BODY)
    client = openai_client(b"".join(COMPLETIONS.stream(COMPLETIONS.samples(answer), ask)))
    chunks = list(client.completions.create(model="m", prompt="", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a b"
    tokens = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens
    ]
    assert tokens == columns["tokens"]
    assert chunks[-1].choices[0].finish_reason == "stop"


PART = {"type": "output_text", "text": "Hi you", "annotations": [], "logprobs": ENTRIES}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "model": "m",
    "output": [
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "I think so"}],
            "content": [{"type": "reasoning_text", "text": "deep thoughts"}],
            "status": "completed",
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [PART]},
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c",
            "name": "f",
            "arguments": '{"city": "New York"}',
            "status": "completed",
        },
        {"type": "custom_tool_call", "id": "ct_1", "call_id": "d", "name": "g", "input": "free text"},
        {"type": "message", "id": "msg_2", "role": "assistant", "status": "completed", "content": []},
    ],
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "usage": {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 3,
    },
}


def test_openai_accumulates_the_replayed_events_of_a_response():
    [ask] = RESPONSES.split({"stream": True})
    payload = b"".join(RESPONSES.stream([RESPONSE], ask))
    snapshots = {}
    with openai_client(payload).responses.stream(model="m", input="x") as stream:
        for event in stream:
            if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
                snapshots[event.type] = event.snapshot
        final = stream.get_final_response()
    assert snapshots == {
        "response.output_text.delta": "Hi you",
        "response.function_call_arguments.delta": '{"city": "New York"}',
    }
    told = final.to_dict()
    for item in told["output"]:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    assert told == RESPONSE


def test_every_replayed_event_of_a_response_is_of_a_kind_that_openai_knows():
    known = openai.resources.responses.responses.ResponseStreamEvent
    [ask] = RESPONSES.split({"stream": True})
    names = {kind.model_fields["type"].annotation.__args__[0]: kind for kind in known.__args__[0].__args__}
    for event in RESPONSES.stream([RESPONSE], ask):
        data = event.partition(b"data: ")[2]
        names[orjson.loads(data)["type"]].model_validate_json(data)


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [
        {"type": "thinking", "thinking": "let me see", "signature": "c2ln"},
        {
            "type": "text",
            "text": "Hello there",
            "citations": [
                {
                    "type": "char_location",
                    "cited_text": "x",
                    "document_index": 0,
                    "document_title": None,
                    "start_char_index": 0,
                    "end_char_index": 1,
                }
            ],
        },
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1, {"b": "ä ö"}], "c": ""}},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 17},
}


@pytest.mark.parametrize("beta", [False, True])
def test_anthropic_accumulates_the_replayed_events_of_a_message(beta):
    [ask] = MESSAGES.split({"stream": True})
    payload = b"".join(MESSAGES.stream([MESSAGE], ask))
    client = anthropic.Anthropic(api_key="k", max_retries=0, http_client=answering(httpx2, payload))
    messages = client.beta.messages if beta else client.messages
    with messages.stream(model="claude", max_tokens=9, messages=[]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Hello there"
    told = final.to_dict()
    assert {**told, "content": None, "usage": None} == {
        **MESSAGE,
        "content": None,
        "usage": None,
        **_null(told),
    }
    assert told["usage"] == MESSAGE["usage"]
    for got, expected in zip(told["content"], MESSAGE["content"], strict=True):
        assert {**got, **expected} == got


def _null(told):
    """What the SDK adds to a message: fields that are null."""
    return {name: None for name, value in told.items() if value is None and name not in MESSAGE}


def test_every_replayed_event_of_a_message_is_valid_for_anthropic():
    [ask] = MESSAGES.split({"stream": True})
    kinds = {
        "message_start": anthropic.types.RawMessageStartEvent,
        "content_block_start": anthropic.types.RawContentBlockStartEvent,
        "content_block_delta": anthropic.types.RawContentBlockDeltaEvent,
        "content_block_stop": anthropic.types.RawContentBlockStopEvent,
        "message_delta": anthropic.types.RawMessageDeltaEvent,
        "message_stop": anthropic.types.RawMessageStopEvent,
    }
    for event in MESSAGES.stream([MESSAGE], ask):
        data = event.partition(b"data: ")[2]
        kinds[orjson.loads(data)["type"]].model_validate_json(data)


@pytest.mark.parametrize("wanted", ["float", "base64"])
def test_openai_reads_replayed_embeddings_in_either_encoding(wanted):
    vectors = [[0.5, -0.25], [1.0, 2.0]]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    upstream = {
        "object": "list",
        "data": data,
        "model": "e",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    [ask, _] = EMBEDDINGS.split({"input": ["a", "b"], "encoding_format": wanted})
    payload = EMBEDDINGS.answer_bytes([orjson.dumps(sample) for sample in EMBEDDINGS.samples(upstream)], ask)
    client = openai_client(payload, "application/json")
    options = {"encoding_format": "float"} if wanted == "float" else {}
    result = client.embeddings.create(model="e", input=["a", "b"], **options)
    assert [item.embedding for item in result.data] == vectors
    assert [item.index for item in result.data] == [0, 1]
    assert result.usage.total_tokens == 4
