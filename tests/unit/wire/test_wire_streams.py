"""Event streams: recorded as whole answers or not at all, and replayed as what was recorded."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.wire import CHAT, COMPLETIONS, MESSAGES, RESPONSES, BadAnswer, EventReader
from cachepipe.wire.messages import whole_members
from cachepipe.wire.sse import merge, pieces, settled

HEAD = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "system_fingerprint": "fp",
}
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def sse(*values):
    return b"".join(b"data: " + (v if isinstance(v, bytes) else orjson.dumps(v)) + b"\n\n" for v in values)


def typed(*values):
    return b"".join(b"event: " + v["type"].encode() + b"\ndata: " + orjson.dumps(v) + b"\n\n" for v in values)


def chunk(delta, finish=None, index=0, **more):
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}


def recorded(api, stream, size=None, questions=()):
    recorder = api.recorder(questions)
    size = size or len(stream) or 1
    events = []
    for start in range(0, len(stream), size):
        events += recorder.feed(stream[start : start + size])
    events += recorder.close()
    assert b"".join(event.raw for event in events) == stream
    assert sum(event.terminal for event in events) == recorder.complete
    return recorder


# --------------------------------------------------------------------------------------------------
# Events
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_whatever_the_chunks_and_line_ends(end, size):
    lines = [
        b"\xef\xbb\xbfdata: first",
        b"",
        b": a comment",
        b"event: named",
        b"id: 7",
        "data:ä€😀".encode(),
        b"data:  two",
        b"data",
        b"",
        b"",
        b": alone",
        b"",
        b"data: last",
    ]
    stream = end.join(lines)
    reader = EventReader()
    events = []
    for start in range(0, len(stream), size):
        events += reader.feed(stream[start : start + size])
        events += reader.feed(b"")
    assert [(event.name, event.data) for event in events] == [
        ("", b"first"),
        ("named", "ä€😀\n two\n".encode()),
        ("", b""),
        ("", b""),
    ]
    events += reader.close()
    assert (events[-1].name, events[-1].data) == ("", b"last")
    assert b"".join(event.raw for event in events) == stream
    assert reader.close() == []


@given(
    st.lists(st.sampled_from([b"data: x", b"\r", b"\n", b"\r\n", b"\r\r", b"event: e", b": c"])), st.data()
)
def test_the_chunking_of_a_stream_does_not_matter(parts, data):
    stream = b"".join(parts)
    whole = EventReader()
    expected = [event[1:] for event in (*whole.feed(stream), *whole.close()) if event.data]
    reader = EventReader()
    events = []
    rest = stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        events += reader.feed(rest[:size])
        rest = rest[size:]
    events += reader.close()
    assert [event[1:] for event in events if event.data] == expected
    assert b"".join(event.raw for event in events) == stream


@given(st.text())
def test_pieces_joined_are_the_text(text):
    assert "".join(pieces(text)) == text


# --------------------------------------------------------------------------------------------------
# Chat, recorded
# --------------------------------------------------------------------------------------------------

STREAM = sse(
    chunk({"role": "assistant", "content": "", "refusal": None}, logprobs=None),
    chunk({"content": "Hel"}, logprobs=None),
    chunk({"content": "lo 😀"}, logprobs=None),
    chunk({}, "stop", logprobs=None),
    {**HEAD, "choices": [], "usage": USAGE},
    b"[DONE]",
)
WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello 😀", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
    "system_fingerprint": "fp",
}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, None])
def test_a_recorded_stream_is_the_sample_of_the_unstreamed_answer(size):
    assert recorded(CHAT, STREAM, size).samples() == [WHOLE]


def test_a_recorder_tells_when_content_came_and_when_all_came():
    recorder = CHAT.recorder()
    seen = []
    for event in STREAM.split(b"\n\n")[:-1]:
        assert not recorder.complete
        with pytest.raises(BadAnswer, match="has not come to its terminal event"):
            recorder.samples()
        [passed] = recorder.feed(event + b"\n\n")
        seen.append((recorder.started, passed.without_usage, passed.terminal))
    assert [started for started, _, _ in seen] == [False, True, True, True, True, True]
    assert [lean for _, lean, _ in seen] == [None, None, None, None, b"", None]
    assert [terminal for _, _, terminal in seen] == [False] * 5 + [True]
    assert recorder.complete
    [late] = recorder.feed(b"data: {}\n\n")
    assert late.raw == b"data: {}\n\n"
    assert recorder.samples() == [WHOLE]


REPORT = {"input": {"flagged": False}}


@pytest.mark.parametrize(
    ("extra", "lean"),
    [
        ({}, b""),
        ({"system_fingerprint": "fp", "obfuscation": "x" * 9}, b""),
        ({"moderation": None}, b""),
        ({"moderation": REPORT}, sse({**HEAD, "moderation": REPORT, "choices": []})),
    ],
    ids=["usage", "usual", "null", "report"],
)
def test_of_a_chunk_of_usage_what_it_brings_beside_that_is_kept(extra, lean):
    recorder = CHAT.recorder()
    recorder.feed(sse(chunk({"content": "hi"}, "stop"), {**HEAD, "choices": [], "moderation": None}))
    [event] = recorder.feed(sse({**HEAD, **extra, "choices": [], "usage": USAGE}))
    assert event.without_usage == lean
    assert recorder.feed(sse(b"[DONE]"))[0].terminal
    [sample] = recorder.samples()
    assert sample["usage"] == USAGE
    assert sample["moderation"] == extra.get("moderation")
    [ask] = CHAT.split({"stream": True})
    [replayed] = recorded(CHAT, b"".join(CHAT.stream([sample], ask))).samples()
    assert replayed == {**sample, "usage": None}


def test_a_report_that_is_told_again_is_told_anew():
    first, last = {"flagged": False}, {"flagged": True}
    [sample] = recorded(
        CHAT,
        sse(
            {**chunk({"content": "hi"}, "stop"), "moderation": first},
            {**HEAD, "id": "another", "choices": [], "moderation": last},
            {**HEAD, "choices": [], "moderation": None},
            b"[DONE]",
        ),
    ).samples()
    assert (sample["moderation"], sample["id"]) == (last, HEAD["id"])


def test_c7_the_terminal_event_is_known_although_its_last_line_end_is_missing():
    assert recorded(CHAT, STREAM.removesuffix(b"\n\n")).complete
    assert recorded(CHAT, STREAM.removesuffix(b"\n")).complete


@pytest.mark.parametrize("cut", range(1, 6))
def test_c7_a_truncated_stream_is_never_a_sample(cut):
    events = STREAM.split(b"\n\n")
    recorder = recorded(CHAT, b"\n\n".join(events[:cut]) + b"\n\n")
    assert not recorder.complete
    with pytest.raises(BadAnswer, match="ended before its terminal event"):
        recorder.samples()


@given(st.integers(0, len(STREAM) - 3))
def test_c7_no_prefix_of_a_stream_is_complete(length):
    recorder = recorded(CHAT, STREAM[:length])
    assert recorder.complete is (length >= STREAM.index(b"[DONE]") + len(b"[DONE]"))


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": "overloaded", "code": 503}},
        {"type": "error", "code": "server_error", "message": "overloaded"},
        b"{broken",
        b"[1]",
        {"choices": "none"},
        {"choices": [1]},
        {"choices": [{"index": 0, "delta": "x"}]},
        {"choices": [{"index": 0, "message": {"content": "whole"}}]},
        {"choices": [{"index": 0, "delta": {"content": ["parts"]}}]},
        {"choices": [{"index": [1], "delta": {}}]},
        b'{"choices":[{"index":0,"delta":{"x":' + b'{"x":' * 990 + b"1" + b"}" * 990 + b"}}]}",
    ],
    ids=lambda event: str(event)[:50],
)
def test_c8_a_stream_that_is_not_in_order_is_passed_on_and_gives_no_sample(event):
    first, last = STREAM.split(b"\n\n")[1] + b"\n\n", sse(chunk({}, "stop"), b"[DONE]")
    recorder = recorded(CHAT, first + sse(event) + last)
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


def test_a_stream_that_is_not_in_order_has_ended_all_the_same_when_it_says_so():
    """Else whoever reads it would wait for more until the connection is closed."""
    recorder = CHAT.recorder()
    recorder.feed(sse(b"{broken"))
    assert not recorder.ended
    recorder.feed(sse(b"[DONE]"))
    assert recorder.ended
    assert not recorder.complete


def test_c8_a_named_error_event_gives_no_sample():
    stream = STREAM.replace(sse(b"[DONE]"), b"event: error\ndata: {}\n\n" + sse(b"[DONE]"))
    assert isinstance(recorded(CHAT, stream).error, BadAnswer)


@pytest.mark.parametrize("finish", [None, "", "error"])
def test_c7_a_stream_whose_choice_did_not_finish_is_never_a_sample(finish):
    recorder = recorded(CHAT, sse(chunk({"content": "x"}), chunk({}, finish), b"[DONE]"))
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


FINISHED = sse(chunk({"role": "assistant", "content": "ok"}), chunk({}, "stop"))
TEXT_FINISHED = sse({"choices": [{"index": 0, "text": "ok", "finish_reason": "length"}]})


@pytest.mark.parametrize("tail", [b"", sse({**HEAD, "choices": [], "usage": USAGE}), b": bye\n\n", b"data: "])
@pytest.mark.parametrize(("api", "stream"), [(CHAT, FINISHED), (COMPLETIONS, TEXT_FINISHED)])
def test_c7_a_body_that_ended_in_order_is_whole_if_each_choice_says_why_it_ended(api, stream, tail):
    for in_order in (True, False):
        recorder = api.recorder()
        recorder.feed(stream + tail)
        assert not recorder.complete
        recorder.close(in_order=in_order)
        assert recorder.complete == recorder.ended == in_order
    whole = api.recorder()
    whole.feed(stream + tail.removesuffix(b"data: ") + b"data: [DONE]\n\n")
    for recorder in (whole, api.recorder()):
        recorder.feed(b"" if recorder is whole else stream + tail)
        recorder.close(in_order=True)
        assert recorder.samples() == whole.samples()


@pytest.mark.parametrize(
    ("api", "stream"),
    [
        (CHAT, sse(chunk({"content": "a"}, "stop"), chunk({"content": "b"}, None, 1))),
        (CHAT, sse(chunk({"content": "a"}, ""))),
        (CHAT, FINISHED + b'data: {"choices": [{"ind'),
        (CHAT, FINISHED + sse({"error": {"message": "late"}})),
        (CHAT, sse({**HEAD, "choices": []})),
        (COMPLETIONS, sse({"choices": [{"index": 0, "text": "a", "finish_reason": None}]})),
        (
            MESSAGES,
            typed(
                {"type": "message_start", "message": {"content": []}},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            ),
        ),
        (RESPONSES, typed({"type": "response.output_text.delta", "delta": "a"})),
    ],
)
def test_c7_a_body_that_ended_in_order_is_no_sample_without_what_says_that_the_answer_is_whole(api, stream):
    recorder = api.recorder()
    recorder.feed(stream)
    recorder.close(in_order=True)
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


DELTA, STOP = {"content": "ab"}, chunk({}, "stop")
QUIRKS = {
    "perplexity": [
        chunk({"role": "assistant", "content": "a"}, message={"role": "assistant", "content": "a"}),
        {
            **chunk({"role": "assistant", "content": "b"}, "stop", message={"content": "ab"}),
            "object": "chat.completion.done",
            "citations": ["https://a.example"],
            "usage": USAGE,
        },
    ],
    "null beside the delta": [
        chunk({"content": "ab"}, message=None, text=None),
        chunk({}, "stop", message=None),
    ],
    "text beside the delta": [chunk({"content": "a"}, text="a"), chunk({"content": "b"}, "stop", text="b")],
    "an empty message": [
        chunk({"content": "ab"}, message={"role": "assistant", "content": ""}),
        chunk({}, "stop"),
    ],
    "no delta": [chunk({"content": "ab"}), chunk(None, "stop")],
    "no index": [{"choices": [{"delta": {"content": c}, "finish_reason": "stop"}]} for c in "ab"],
    "an empty finish_reason": [
        chunk({"content": "ab"}, ""),
        chunk({}, "stop"),
        chunk({}, ""),
        chunk({}, None),
    ],
    "no choices": [{**HEAD, "choices": None}, chunk({"content": "ab"}, "stop"), {**HEAD, "usage": USAGE}],
    "usage each time": [{**chunk({"content": c}, "stop"), "usage": u} for c, u in (("a", USAGE), ("b", {}))],
    "two deltas at once": [{"choices": [chunk({"content": c}, "stop")["choices"][0] for c in "ab"]}],
    "an empty list of log probabilities": [chunk({"content": "ab"}, "stop", logprobs=[])],
    "a ping": [{"type": "ping"}, chunk({"content": "ab"}, "stop")],
}


@pytest.mark.parametrize("chunks", QUIRKS.values(), ids=QUIRKS)
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_the_habits_of_servers_keep_no_answer_from_being_a_sample(chunks, end):
    lines = [b"\xef\xbb\xbf: OPENROUTER PROCESSING", b""]
    for value in chunks:
        lines += [b"event: chunk", b"data:" + orjson.dumps(value), b"", b": keep-alive", b""]
    stream = end.join([*lines, b"data: [DONE] ", b"", b""])
    [sample] = recorded(CHAT, stream, 7).samples()
    choice = sample["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "ab"}
    assert choice["finish_reason"] == "stop"
    assert sample.get("object") in ("chat.completion", None)
    assert sample["usage"] in (None, USAGE)
    assert not {"text", "delta"} & choice.keys()


@pytest.mark.parametrize(
    ("api", "parts"),
    [
        (CHAT, [{"message": {"content": "ab"}}]),
        (CHAT, [{"delta": {}, "message": {"content": "ab"}}]),
        (CHAT, [{"delta": {"role": "assistant", "content": ""}, "text": "ab"}]),
        (CHAT, [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]),
        (COMPLETIONS, [{"text": "", "delta": {"content": "ab"}}]),
        (COMPLETIONS, [{"message": {"content": "ab"}}]),
    ],
)
def test_c8_content_where_the_sdk_does_not_look_and_choices_without_index_give_no_sample(api, parts):
    stream = sse({**HEAD, "choices": [{**part, "finish_reason": "stop"} for part in parts]}, b"[DONE]")
    assert not recorded(api, stream).complete


def test_a_delta_that_an_unstreamed_answer_has_beside_its_message_is_not_streamed():
    """Perplexity's have one."""
    answer = {**WHOLE, "choices": [{**WHOLE["choices"][0], "delta": {"role": "assistant", "content": "x"}}]}
    [ask] = CHAT.split({"stream": True})
    [sample] = recorded(CHAT, b"".join(CHAT.stream(CHAT.samples(answer), ask))).samples()
    assert sample["choices"][0]["message"] == WHOLE["choices"][0]["message"]


def test_a_stream_without_any_choice_is_no_sample():
    with pytest.raises(BadAnswer, match="no choice"):
        recorded(CHAT, sse({**HEAD, "choices": []}, b"[DONE]")).samples()


def test_a_stream_without_usage_gives_a_sample_whose_usage_is_none():
    [sample] = recorded(
        CHAT, sse(chunk({"role": "assistant", "content": "x"}), chunk({}, "stop"), b"[DONE]")
    ).samples()
    assert sample["usage"] is None


def test_choices_that_alternate_are_put_together_by_index():
    stream = sse(
        chunk({"role": "assistant", "content": ""}, index=1),
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "b"}, index=1),
        chunk({"content": "a"}),
        {
            **HEAD,
            "choices": [
                chunk({"content": "A"})["choices"][0],
                chunk({"content": "B"}, index=1)["choices"][0],
            ],
        },
        chunk({}, "length", index=1),
        chunk({}, "stop"),
        {**HEAD, "choices": [], "usage": USAGE},
        b"[DONE]",
    )
    samples = recorded(CHAT, stream).samples()
    told = [(s["choices"][0]["message"]["content"], s["choices"][0]["finish_reason"]) for s in samples]
    assert told == [("aA", "stop"), ("bB", "length")]
    assert sum(sample["usage"]["completion_tokens"] for sample in samples) == 4


def message_of(*deltas):
    stream = sse(
        chunk({"role": "assistant", "content": None}), *map(chunk, deltas), chunk({}, "stop"), b"[DONE]"
    )
    return recorded(CHAT, stream).samples()[0]["choices"][0]["message"]


def test_tool_calls_are_put_together_by_index():
    message = message_of(
        {
            "tool_calls": [
                {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}
            ]
        },
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": ":1}"}},
                {"index": 1, "function": {"arguments": "{}"}},
            ]
        },
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_tool_calls_that_share_an_index_or_have_none_are_told_apart_by_id():
    whole = [{"id": c, "type": "function", "function": {"name": c, "arguments": "{}"}} for c in "ab"]
    assert message_of(*({"tool_calls": [{"index": 0, **call}]} for call in whole))["tool_calls"] == whole
    assert message_of(*({"tool_calls": [call]} for call in whole))["tool_calls"] == whole
    assert message_of({"tool_calls": whole})["tool_calls"] == whole


def calls_of(*lists):
    """The names and arguments of the calls that chunks with these lists make."""
    made = message_of(*({"tool_calls": calls} for calls in lists))["tool_calls"]
    return [(call["function"]["name"], call["function"].get("arguments")) for call in made]


def called(name=None, arguments=None, **more):
    function = {"name": name, "arguments": arguments}
    return {**more, "function": {field: value for field, value in function.items() if value is not None}}


def test_calls_without_index_and_id_are_told_apart_by_name_and_whole_arguments():
    assert calls_of([called("f", "{}")], [called("g", "{}")]) == [("f", "{}"), ("g", "{}")]
    assert calls_of([called("f", '{"a":'), called("f", "{}")]) == [("f", '{"a":'), ("f", "{}")]
    assert calls_of([called("f", "")], [called("g", "")]) == [("f", ""), ("g", "")]
    assert calls_of([called("f", "{}")], [called("f", "{}")]) == [("f", "{}")] * 2
    assert calls_of([called("f", {"a": 1})], [called("f", {"a": 2})]) == [("f", {"a": 1}), ("f", {"a": 2})]


def test_parts_of_a_call_without_index_and_id_go_on_with_the_latest_call():
    parts = [called("f", "", index=0, id="a")], [called(None, '{"x"')], [called(None, ":1}")]
    assert calls_of(*parts) == [("f", '{"x":1}')]
    parts = [called("f", "{}", id="a")], [called("g", "{", id="b")], [called(None, "}", id="b")]
    assert calls_of(*parts) == [("f", "{}"), ("g", "{}")]
    assert calls_of([called("f", "{", index=1, id="a")], [called(None, "}", id="a")]) == [("f", "{}")]


def test_calls_of_the_text_generation_inference_server_are_mappings():
    parts = [{"tool_calls": called("f", text, index=0, id="")} for text in ("{", "}")]
    assert message_of(*parts)["tool_calls"] == [{"id": "", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    "lists",
    [
        ([called("f", "")], [called("f", "")]),
        ([called("f", ""), called("g", "")], [called(None, "{}"), called(None, "{}")]),
    ],
    ids=["once or twice", "whose arguments"],
)
def test_c8_calls_that_cannot_be_told_apart_give_no_sample(lists):
    stream = sse(*(chunk({"tool_calls": calls}) for calls in lists), chunk({}, "tool_calls"), b"[DONE]")
    assert not recorded(CHAT, stream).complete


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("contents", "whole"),
    [
        (["a", "b", [THOUGHT], "c", "d"], ["ab", THOUGHT, "cd"]),
        ([[THOUGHT], "", "a", "b"], [THOUGHT, "ab"]),
        (["", [THOUGHT], [THOUGHT], "a"], [THOUGHT, THOUGHT, "a"]),
        (["a", [], "b"], "ab"),
        (["a", [{"type": "text", "text": "b"}], [THOUGHT]], ["a", {"type": "text", "text": "b"}, THOUGHT]),
    ],
)
def test_a_content_of_text_and_parts_becomes_a_list_of_parts_and_is_replayed_as_it_came(contents, whole):
    stream = sse(*(chunk({"content": content}) for content in contents), chunk({}, "stop"), b"[DONE]")
    [sample] = recorded(CHAT, stream).samples()
    expected = whole
    if isinstance(whole, list):
        expected = [{"type": "text", "text": part} if isinstance(part, str) else part for part in whole]
    assert sample["choices"][0]["message"]["content"] == expected
    [ask] = CHAT.split({"stream": True})
    replayed = b"".join(CHAT.stream([sample], ask))
    assert recorded(CHAT, replayed).samples() == [sample]
    if isinstance(whole, list):
        first = next(delta for delta in contents if delta)
        deltas = [choice["delta"].get("content") for choice in choices_of(replayed)]
        assert type(next(filter(None, deltas))) is type(first)


def choices_of(stream):
    events = EventReader().feed(stream)
    return [c for event in events if event.data[:1] == b"{" for c in orjson.loads(event.data)["choices"]]


@pytest.mark.parametrize("identity", [{}, {"id": ""}])
def test_whole_calls_of_one_index_without_ids_are_calls_of_their_own(identity):
    def call(arguments):
        return {"index": 0, **identity, "function": {"name": "f", "arguments": arguments}}

    whole = message_of({"tool_calls": [call('{"a": 1}')]}, {"tool_calls": [call('{"a": 2}')]})
    assert [made["function"]["arguments"] for made in whole["tool_calls"]] == ['{"a": 1}', '{"a": 2}']
    parts = ["", '{"a": ', '{"b": 1}', "}"]  # a name that is repeated with each part begins no call
    (one,) = message_of(*({"tool_calls": [call(part)]} for part in parts))["tool_calls"]
    assert one["function"] == {"name": "f", "arguments": '{"a": {"b": 1}}'}


def test_entries_of_one_index_are_told_apart_by_type():
    parts = [
        {"index": 0, "type": "reasoning.summary", "summary": "a"},
        {"index": 0, "type": "reasoning.summary", "summary": "b"},
        {"index": 0, "type": "reasoning.encrypted", "data": "D"},
    ]
    assert message_of(*({"reasoning_details": [part]} for part in parts))["reasoning_details"] == [
        {"index": 0, "type": "reasoning.summary", "summary": "ab"},
        {"index": 0, "type": "reasoning.encrypted", "data": "D"},
    ]


def test_token_ids_of_a_choice_are_appended():
    stream = sse(
        chunk({"content": "a"}, token_ids=None),
        chunk({"content": "b"}, token_ids=[1]),
        chunk({"content": "c"}, "stop", token_ids=[2, 3]),
        b"[DONE]",
    )
    [sample] = recorded(CHAT, stream).samples()
    assert sample["choices"][0]["token_ids"] == [1, 2, 3]


def test_identities_that_later_deltas_leave_empty_stay_as_they_were():
    """As servers do that write each field into each chunk."""
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    rest = {"index": 0, "id": "", "type": "", "function": {"name": "", "arguments": "}"}}
    message = message_of({"tool_calls": [call]}, {"role": "", "tool_calls": [rest]})
    assert message["role"] == "assistant"
    whole = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert message["tool_calls"] == [whole]


def test_a_repeated_function_name_is_one_name():
    parts = [
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": a}}]}
        for a in ("{", "}")
    ]
    assert message_of(*parts)["tool_calls"] == [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]


def test_other_fields_of_a_delta_are_merged_by_their_kind():
    message = message_of(
        {"reasoning_content": "think ", "audio": {"id": "au", "transcript": "he"}, "score": 1},
        {
            "reasoning_content": "hard",
            "audio": {"transcript": "y", "data": "AA"},
            "score": 2,
            "refusal": "no",
        },
        {
            "refusal": " way",
            "audio": {"data": "BB", "expires_at": 5},
            "function_call": {"name": "f", "arguments": "{"},
        },
        {"function_call": {"arguments": "}"}, "citations": ["x"]},
        {
            "citations": ["y"],
            "reasoning_details": [{"index": 0, "type": "text", "text": "a", "format": "f-1"}],
        },
        {"reasoning_details": [{"index": 0, "type": "text", "text": "b", "format": "f-1"}]},
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "think hard",
        "audio": {"id": "au", "transcript": "hey", "data": "AABB", "expires_at": 5},
        "score": 2,
        "refusal": "no way",
        "function_call": {"name": "f", "arguments": "{}"},
        "citations": ["x", "y"],
        "reasoning_details": [{"index": 0, "type": "text", "text": "ab", "format": "f-1"}],
    }


def test_a_long_answer_in_small_deltas_is_put_together_in_linear_time():
    acc = {}
    for _ in range(200_000):
        merge(acc, {"content": "word "})
    assert len(settled(acc)["content"]) == 1_000_000


def test_log_probabilities_are_appended():
    def part(token):
        return {"content": [{"token": token, "logprob": -1.0, "top_logprobs": []}], "refusal": None}

    stream = sse(
        chunk({"role": "assistant", "content": ""}, logprobs=None),
        chunk({"content": "a"}, logprobs=part("a")),
        chunk({"content": "b"}, logprobs=part("b")),
        chunk({}, logprobs={"content": None, "refusal": None}),  # what is null takes nothing away
        chunk({}, "stop", logprobs=None),
        b"[DONE]",
    )
    [sample] = recorded(CHAT, stream).samples()
    merged = {"content": [*part("a")["content"], *part("b")["content"]], "refusal": None}
    assert sample["choices"][0]["logprobs"] == merged


def test_log_probabilities_of_together_become_the_lists_of_its_whole_answers():
    stream = sse(
        *(
            chunk(
                {"role": "assistant", "content": t, "token_id": i, "tool_calls": None}, logprobs=-0.5, text=t
            )
            for i, t in enumerate("ab")
        ),
        {**chunk({"content": "", "token_id": 2}, "eos", logprobs=None), "usage": USAGE},
        b"[DONE]",
    )
    [sample] = recorded(CHAT, stream).samples()
    assert sample["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "ab", "tool_calls": None},
        "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.5], "token_ids": [0, 1]},
        "finish_reason": "eos",
    }
    assert sample["usage"] == USAGE


def test_padding_and_first_empty_fields_of_chunks_do_not_reach_the_sample():
    filtered = {
        "id": "",
        "object": "",
        "created": 0,
        "model": "",
        "choices": [],
        "prompt_filter_results": [{"a": 1}],
    }
    offsets = {
        **HEAD,
        "choices": [{"index": 0, "finish_reason": None, "content_filter_results": {"hate": {}}}],
    }
    stream = sse(
        filtered,
        {**chunk({"role": "assistant", "content": "x"}), "obfuscation": "Zm9v"},
        offsets,
        chunk({}, "stop"),
        b"[DONE]",
    )
    [sample] = recorded(CHAT, stream).samples()
    assert (sample["id"], sample["created"], sample["object"]) == ("chatcmpl-1", 1, "chat.completion")
    assert sample["prompt_filter_results"] == [{"a": 1}]
    assert sample["choices"][0]["content_filter_results"] == {"hate": {}}
    assert "obfuscation" not in sample


# --------------------------------------------------------------------------------------------------
# Replayed, and recorded again
# --------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcde", min_size=1), inner, max_size=3)
    ),
    max_leaves=5,
)
extras = st.dictionaries(st.text("xyz", min_size=1, max_size=3), values, max_size=2)
texts = st.text(max_size=30)


@st.composite
def chat_samples(draw):
    message = {"role": "assistant", "content": draw(st.none() | texts)}
    for name in ("refusal", "reasoning", "reasoning_content"):
        if draw(st.booleans()):
            message[name] = draw(st.none() | texts)
    if draw(st.booleans()):
        calls = [
            {"id": f"call_{i}", "type": "function", "function": {"name": "f", "arguments": draw(texts)}}
            for i in range(draw(st.integers(0, 3)))
        ]
        message["tool_calls"] = calls
        if calls and draw(st.booleans()):
            calls.append({"id": "call_c", "type": "custom", "custom": {"name": "g", "input": draw(texts)}})
    if draw(st.booleans()):
        message["function_call"] = {"name": "f", "arguments": draw(texts)}
    if draw(st.booleans()):
        message["audio"] = {"id": "a", "data": "AAAA", "transcript": draw(texts), "expires_at": 3}
    message |= draw(extras)
    tokens = draw(st.lists(st.text(min_size=1, max_size=3), max_size=4))
    entries = [{"token": token, "logprob": -1.0, "bytes": None, "top_logprobs": []} for token in tokens]
    if tokens and draw(st.booleans()):
        message["content"] = "".join(tokens)
    logprobs = draw(
        st.sampled_from([None, {"content": entries, "refusal": None}, {"content": None, "refusal": []}])
    )
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
    if draw(st.booleans()):
        del choice["logprobs"]
    choice |= draw(extras)
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": [choice], "usage": draw(st.none() | st.just(USAGE)), **draw(extras)}


@given(chat_samples(), st.integers(1, 99))
def test_recording_the_stream_of_a_chat_sample_gives_the_sample(sample, size):
    [ask] = CHAT.split({"stream": True, "stream_options": {"include_usage": True}})
    stream = b"".join(CHAT.stream([sample], ask))
    assert recorded(CHAT, stream, size).samples() == [sample]


@st.composite
def text_samples(draw):
    tokens = draw(st.lists(st.text(min_size=1, max_size=3), max_size=4))
    columns = {
        "tokens": tokens,
        "token_logprobs": [-1.0] * len(tokens),
        "top_logprobs": [{token: -1.0, "index": -2.0} for token in tokens],
        "text_offset": list(range(len(tokens))),
    }
    text = "".join(tokens) if draw(st.booleans()) else draw(texts)
    logprobs = draw(st.sampled_from([None, columns, {**columns, "top_logprobs": None}, {"tokens": None}]))
    choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": "stop", **draw(extras)}
    return {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice], "usage": USAGE}


@given(text_samples(), st.integers(1, 99))
def test_recording_the_stream_of_a_completion_gives_the_sample(sample, size):
    [ask] = COMPLETIONS.split({"stream": True, "stream_options": {"include_usage": True}})
    stream = b"".join(COMPLETIONS.stream([sample], ask))
    assert recorded(COMPLETIONS, stream, size).samples() == [sample]


@given(st.lists(chat_samples(), min_size=2, max_size=4))
def test_the_stream_of_several_samples_is_the_stream_of_their_answer(samples):
    [ask] = CHAT.split({"n": len(samples), "stream": True, "stream_options": {"include_usage": True}})
    again = recorded(CHAT, b"".join(CHAT.stream(samples, ask))).samples()
    whole = CHAT.answer(samples, ask)
    assert CHAT.answer(again, ask) == whole


def test_a_list_of_prompts_is_streamed_and_recorded_by_prompt():
    asks = COMPLETIONS.split(
        {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    )
    choices = [{"index": i, "text": f"text {i}", "logprobs": None, "finish_reason": "stop"} for i in range(4)]
    answer = {"id": "c", "object": "text_completion", "choices": choices, "usage": USAGE}
    questions = [ask.question for ask in asks]
    samples = COMPLETIONS.samples(answer, questions)
    stream = b"".join(COMPLETIONS.stream(samples, asks[0]))
    assert recorded(COMPLETIONS, stream, questions=questions).samples() == samples


def test_a_stream_is_the_same_each_time_and_comes_in_words():
    [ask] = CHAT.split({"stream": True})
    sample = {
        **WHOLE,
        "choices": [{**WHOLE["choices"][0], "message": {"role": "assistant", "content": "a b  c\n"}}],
    }
    events = list(CHAT.stream([sample], ask))
    assert events == list(CHAT.stream([sample], ask))
    deltas = [orjson.loads(event[6:])["choices"][0]["delta"] for event in events[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        *({"content": c} for c in ("a ", "b  ", "c\n")),
        {},
    ]
    assert events[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("wanted", [False, True])
def test_the_chunk_of_usage_comes_only_where_it_was_asked_for(wanted):
    [ask] = CHAT.split({"stream": True, "stream_options": {"include_usage": wanted}})
    chunks = [orjson.loads(event[6:]) for event in list(CHAT.stream([WHOLE], ask))[:-1]]
    with_usage = [chunk for chunk in chunks if chunk.get("usage")]
    assert len(with_usage) == wanted
    assert all(("usage" in chunk) is wanted for chunk in chunks)
    assert [chunk["choices"] for chunk in with_usage] == [[]] * wanted
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_fields_of_the_envelope_that_are_not_in_every_chunk_come_once():
    [ask] = CHAT.split({"stream": True})
    chunks = [orjson.loads(event[6:]) for event in list(CHAT.stream([{**WHOLE, "prompt": []}], ask))[:-1]]
    assert ["prompt" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert all(chunk["system_fingerprint"] == "fp" for chunk in chunks)


ODD_NAMES = """
    choices index delta content tool_calls logprobs usage message type response output item output_index
    summary content_block text input arguments citations finish_reason stop_reason id name
    function tokens annotations
"""
ODD_KINDS = """
    response.completed response.output_item.done message_start content_block_start content_block_delta
    message_delta message_stop output_text message function_call reasoning reasoning_text
    thinking text tool_use
"""
names = st.sampled_from(ODD_NAMES.split())
kinds = st.sampled_from(ODD_KINDS.split())
odd_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a"]) | kinds,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS, RESPONSES, MESSAGES], ids=str)
@given(
    st.lists(odd_values | st.dictionaries(names, odd_values).map(lambda v: {**v, "type": "message_start"}))
)
def test_whatever_a_stream_brings_it_is_passed_on_without_an_error(api, events):
    recorder = recorded(api, sse(*events, b"[DONE]") + typed({"type": "message_stop"}))
    assert recorder.complete or isinstance(recorder.error, BadAnswer)


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS, RESPONSES, MESSAGES], ids=str)
@given(
    st.fixed_dictionaries(
        {
            "choices": st.lists(
                st.dictionaries(names, odd_values).map(lambda v: {"message": {}, "text": "", **v}), max_size=3
            )
            | st.builds(lambda v: [{"message": v, "text": "a b"}], st.dictionaries(names, odd_values)),
            "output": st.lists(st.dictionaries(names, odd_values)) | odd_values,
            "content": st.lists(st.dictionaries(names, odd_values)) | odd_values,
            "usage": odd_values,
            "stop_reason": st.just("end_turn"),
        }
    )
)
def test_c8_whatever_an_answer_holds_it_can_be_served_listed_and_streamed_or_is_refused(api, answer):
    [ask] = api.split({"stream": True, "stream_options": {"include_usage": True}})
    try:
        samples = api.samples(answer)
    except BadAnswer:
        return
    for sample in samples:
        assert api.answer([sample], ask)
        assert api.summary(sample)["text"] is not None
        assert list(api.stream([sample], ask))
    if samples:
        assert api.answer(samples, ask)


# --------------------------------------------------------------------------------------------------
# Responses
# --------------------------------------------------------------------------------------------------

PART = {
    "type": "output_text",
    "text": "Hi there",
    "annotations": [{"type": "file_path", "file_id": "f", "index": 0}],
}
ITEMS = [
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "I think"}],
        "content": [{"type": "reasoning_text", "text": "deep thoughts"}],
        "status": "completed",
    },
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [PART, {"type": "refusal", "refusal": "I would rather not"}],
    },
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "c",
        "name": "f",
        "arguments": '{"a": 1}',
        "status": "completed",
    },
    {"type": "custom_tool_call", "id": "ct_1", "call_id": "d", "name": "g", "input": "free text"},
    {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    {"type": "code_interpreter_call", "id": "ci_1", "code": None, "status": "completed"},
]
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "model": "m",
    "output": ITEMS,
    "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
}


def events_of(stream):
    reader = EventReader()
    return [orjson.loads(event.data) for event in reader.feed(stream)]


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_a_response_is_streamed_in_numbered_events_and_recorded_from_the_last(status):
    sample = {**RESPONSE, "status": status}
    [ask] = RESPONSES.split({"stream": True})
    stream = b"".join(RESPONSES.stream([sample], ask))
    events = events_of(stream)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", f"response.{status}")
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None
    recorder = recorded(RESPONSES, stream, 11)
    assert recorder.started
    assert recorder.samples() == [sample]


def test_the_deltas_of_a_response_are_its_texts():
    events = events_of(b"".join(RESPONSES.stream([RESPONSE], RESPONSES.split({})[0])))
    told = {}
    for event in events:
        if event["type"].endswith(".delta"):
            told[event["type"]] = told.get(event["type"], "") + event["delta"]
    assert told == {
        "response.reasoning_summary_text.delta": "I think",
        "response.reasoning_text.delta": "deep thoughts",
        "response.output_text.delta": "Hi there",
        "response.refusal.delta": "I would rather not",
        "response.function_call_arguments.delta": '{"a": 1}',
        "response.custom_tool_call_input.delta": "free text",
    }


@pytest.mark.parametrize(
    "last",
    [
        {"type": "response.failed", "response": {**RESPONSE, "status": "failed"}},
        {"type": "response.completed", "response": {**RESPONSE, "status": "in_progress"}},
        {"type": "response.completed"},
        {"type": "error", "code": "server_error", "message": "no"},
        {"type": "response.output_text.delta", "delta": "x"},
    ],
    ids=str,
)
def test_c8_a_response_that_failed_or_did_not_end_is_never_a_sample(last):
    recorder = recorded(RESPONSES, typed({"type": "response.created", "response": {}}, last))
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


@pytest.mark.parametrize("output", [None, []])
def test_a_terminal_event_without_output_is_completed_by_the_items_before_it(output):
    items = [
        {"type": "response.output_item.done", "output_index": i, "item": item} for i, item in enumerate(ITEMS)
    ]
    last = {"type": "response.completed", "response": {**RESPONSE, "output": output}}
    assert recorded(RESPONSES, typed(*reversed(items), last)).samples() == [RESPONSE]


# --------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------

CITATION = {"type": "char_location", "cited_text": "x", "document_index": 0}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [
        {"type": "thinking", "thinking": "let me see", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "b"},
        {"type": "text", "text": "Hello there", "citations": [CITATION, CITATION]},
        {"type": "text", "text": "", "citations": None},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1, {"b": "ä ö"}]}},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"url": "u"}]},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "container": {"id": "c", "expires_at": "t"},
    "usage": {
        "input_tokens": 3,
        "cache_read_input_tokens": 2,
        "output_tokens": 17,
        "server_tool_use": {"web_search_requests": 1},
        "service_tier": "standard",
    },
}


@pytest.mark.parametrize("size", [1, 13, None])
def test_recording_the_stream_of_a_message_gives_the_sample(size):
    [ask] = MESSAGES.split({"stream": True})
    stream = b"".join(MESSAGES.stream([MESSAGE], ask))
    recorder = recorded(MESSAGES, stream, size)
    assert recorder.started
    assert recorder.samples() == [MESSAGE]


@given(st.dictionaries(st.text("ab", min_size=1), values, max_size=4), texts, extras)
def test_recording_the_stream_of_any_message_gives_the_sample(given_input, text, more):
    blocks = [
        {"type": "text", "text": text},
        {"type": "tool_use", "id": "t", "name": "f", "input": given_input, **more},
    ]
    sample = {**MESSAGE, "content": blocks, **more}
    [ask] = MESSAGES.split({"stream": True})
    assert recorded(MESSAGES, b"".join(MESSAGES.stream([sample], ask)), 17).samples() == [sample]


START = {
    "type": "message_start",
    "message": {
        **MESSAGE,
        "content": [],
        "stop_reason": None,
        "usage": {"input_tokens": 3, "output_tokens": 1},
    },
}
TOOL = {
    "type": "content_block_start",
    "index": 0,
    "content_block": {"type": "tool_use", "id": "t", "input": {}},
}


def json_delta(text):
    return {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "input_json_delta", "partial_json": text},
    }


def message_end(reason, **more):
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 9}, **more},
        {"type": "message_stop"},
    ]


def test_counts_and_fields_told_at_the_end_replace_those_of_the_start():
    ping = {"type": "ping"}
    kept = {"applied_edits": []}
    end = message_end("end_turn", context_management=kept)
    [sample] = recorded(MESSAGES, typed(START, ping, *end)).samples()
    assert sample["usage"] == {"input_tokens": 3, "output_tokens": 9}
    assert sample["stop_reason"] == "end_turn"
    assert sample["context_management"] == kept
    assert sample["container"] == MESSAGE["container"]


def test_the_model_that_took_over_in_mid_stream_is_the_one_that_answered():
    fallback = {"type": "fallback", "from": {"model": "claude"}, "to": {"model": "other"}}
    begin = {"type": "content_block_start", "index": 0, "content_block": fallback}
    assert recorded(MESSAGES, typed(START, begin, *message_end("end_turn"))).samples()[0]["model"] == "other"


def test_counts_in_a_delta_are_not_part_of_its_block():
    begin = {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}}
    delta = {"type": "thinking_delta", "thinking": "x", "estimated_tokens": 5}
    more = {"type": "content_block_delta", "index": 0, "delta": delta}
    [sample] = recorded(MESSAGES, typed(START, begin, more, *message_end("end_turn"))).samples()
    assert sample["content"] == [{"type": "thinking", "thinking": "x"}]


@pytest.mark.parametrize(
    "events",
    [
        [START, TOOL, json_delta('{"a": ')],
        [START, {"type": "error", "error": {"type": "overloaded_error"}}, *message_end("end_turn")],
        [START, TOOL, json_delta('{"a": '), *message_end("tool_use")],
        [START, {"type": "message_stop"}],
        [START, json_delta("{}"), *message_end("end_turn")],
        [{"type": "message_stop"}],
    ],
    ids=range(6),
)
def test_c8_a_message_that_failed_or_did_not_end_is_never_a_sample(events):
    recorder = recorded(MESSAGES, typed(*events))
    assert not recorder.complete
    with pytest.raises(BadAnswer):
        recorder.samples()


def test_c8_a_tool_call_that_the_limit_of_tokens_cut_off_keeps_its_whole_members():
    stream = typed(START, TOOL, json_delta('{"a": [1, 2], "b": "cu'), *message_end("max_tokens"))
    assert recorded(MESSAGES, stream).samples()[0]["content"][0]["input"] == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("{", {}),
        ('{"a', {}),
        ('{"a": ', {}),
        ('{"a": tr', {}),
        ('{"a": true', {"a": True}),
        ('{"a": 12', {}),
        ('{"a": 12,', {"a": 12}),
        ('{"a": "x\\"', {}),
        ('{"a": "x,{\\\\"', {"a": "x,{\\"}),
        ('{"a": {"b": [1, {"c": 2}', {"a": {"b": [1, {"c": 2}]}}),
    ],
)
def test_of_json_that_was_cut_off_the_whole_members_are_kept(text, value):
    assert whole_members(text) == value


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.data())
def test_any_json_object_that_was_cut_off_gives_a_part_of_it(value, data):
    text = orjson.dumps(value).decode()
    part = whole_members(text[: data.draw(st.integers(1, len(text)))])
    assert part.keys() <= value.keys()
    for name in list(part)[:-1]:
        assert part[name] == value[name]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_recorder_keeps_no_more_than_it_may_and_passes_every_byte_on(size):
    stream = b"".join(
        b'data: {"choices": [{"index": 0, "delta": {"content": "%d"}, "finish_reason": null}]}\r\n\r\n'
        % number
        for number in range(100)
    )
    stream += b"data: [DONE]\n\n"
    recorder = CHAT.recorder().within(2000)
    events = [
        event for at in range(0, len(stream), size) for event in recorder.feed(stream[at : at + size])
    ] + recorder.close()
    assert b"".join(event.raw for event in events) == stream
    assert not any(event.terminal for event in events)
    assert recorder.overflowed
    with pytest.raises(BadAnswer, match="more than 2000 bytes"):
        recorder.samples()


@pytest.mark.parametrize("number", [1, 2])
def test_usage_that_moonshot_sends_in_choices_is_that_of_the_answer(number):
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "cached_tokens": 5}
    chunks = [chunk({"role": "assistant", "content": "Hi"}, index=index) for index in range(number)]
    chunks += [chunk({}, "stop", index=index, usage=usage) for index in range(number)]
    recorder = recorded(CHAT, sse(*chunks, b"[DONE]"))
    samples = recorder.samples()
    whole = CHAT.answer(samples, CHAT.split({"messages": [], "n": number})[0])
    assert whole["usage"] == {**usage, "completion_tokens": 4 * number, "total_tokens": 9 + 4 * number}
    assert [sample["usage"]["completion_tokens"] for sample in samples] == [4] * number
    assert all("usage" not in sample["choices"][0] for sample in samples)


DELTAS = st.sampled_from(
    [
        {"content": "a"},
        {"content": " word"},
        {"content": ""},
        {"content": 'quote " \\ é'},
        {"role": "assistant", "content": "b"},
        {"content": None},
        {"reasoning_content": "why"},
        {"content": "c", "refusal": None},
        {"content": [{"type": "text", "text": "d"}]},
        {},
        {"tool_calls": [{"index": 0, "id": "i", "function": {"name": "f", "arguments": "{}"}}]},
    ]
)
CHOICES = st.fixed_dictionaries(
    {"index": st.sampled_from([0, 0, 0, 1, None]), "delta": DELTAS},
    optional={
        "finish_reason": st.sampled_from([None, None, "stop"]),
        "logprobs": st.sampled_from([None, {"content": [{"token": "a"}]}]),
        "message": st.sampled_from([None, {"content": "m"}]),
    },
)
CHUNKS = st.fixed_dictionaries(
    {"id": st.sampled_from(["1", "1", "2"]), "choices": st.lists(CHOICES, min_size=1, max_size=1)},
    optional={
        "usage": st.sampled_from([None, {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}]),
        "error": st.just({"message": "no"}),
        "obfuscation": st.sampled_from(["", "abc", "defgh"]),
    },
)


def retold(value, number):
    """Return a chunk with other texts."""
    [choice] = value["choices"]
    delta = {
        name: f"{text}{number}" if isinstance(text, str) and name != "role" else text
        for name, text in choice["delta"].items()
    }
    return {**value, "choices": [{**choice, "delta": delta}]}


@given(st.lists(CHUNKS, max_size=12), st.integers(0, 3), st.booleans(), st.booleans())
def test_an_event_that_differs_in_its_text_only_is_read_as_if_it_was_parsed(chunks, repeats, spaced, escaped):
    """Whatever comes before it and after it, and however the server writes its JSON."""
    chunks = [retold(one, number) for one in chunks for number in range(1 + repeats)]
    separators = (", ", ": ") if spaced else (",", ":")
    written = [json.dumps(chunk, separators=separators, ensure_ascii=escaped).encode() for chunk in chunks]
    last = {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    events = [b"data: %b\n\n" % text for text in (*written, json.dumps(last).encode(), b"[DONE]")]
    [ask] = CHAT.split({"model": "m", "messages": [], "stream": True})
    told = []
    for parses in (False, True):
        recorder = CHAT.recorder(ask=ask)
        if parses:
            recorder._continues = lambda _: False
        passed = [each for event in events for each in recorder.feed(event)]
        try:
            samples = recorder.samples()
        except BadAnswer as error:
            samples = str(error)
        told.append((passed, samples, recorder.started, recorder.ended))
    assert told[0] == told[1]


def test_events_that_differ_in_their_text_only_are_not_parsed(monkeypatch):
    """OpenAI adds random letters to each event."""
    [ask] = CHAT.split({"model": "m", "messages": [], "stream": True})
    recorder = CHAT.recorder(ask=ask)
    for number in range(20):
        chunk = {
            "id": "1",
            "choices": [{"index": 0, "delta": {"content": f"é{number}"}, "finish_reason": None}],
            "obfuscation": "x" * (number % 5),
        }
        if number == 1:
            monkeypatch.setattr(recorder, "_take", None)
        recorder.feed(b"data: %b\n\n" % json.dumps(chunk).encode())
    monkeypatch.undo()
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    recorder.feed(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(last).encode())
    [sample] = recorder.samples()
    assert sample["choices"][0]["message"]["content"] == "".join(f"é{number}" for number in range(20))
