"""Gemini's wire format: URLs, candidates, streams in both forms, usage and embeddings."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import jsontext
from cachepipe.wire import (
    EMBED_CONTENT,
    GENERATE_CONTENT,
    BadAnswer,
    BadRequest,
    MixedAnswer,
    api_for,
    bills_prompt,
    named_scope,
    question_document,
    scope_of,
    token_counts,
)
from cachepipe.wire.base import unmarked
from cachepipe.wire.sse import data_event
from cachepipe.wire.usage import join_usage

BASE = "https://generativelanguage.googleapis.com/v1beta"
URL = f"{BASE}/models/gemini-2.5-flash"
VERTEX = "https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/l/publishers/google/models/g"
ASK = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
USAGE = {
    "promptTokenCount": 5,
    "candidatesTokenCount": 7,
    "thoughtsTokenCount": 3,
    "toolUsePromptTokenCount": 2,
    "cachedContentTokenCount": 4,
    "totalTokenCount": 17,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 5}],
    "candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 7}],
}


def candidate(*parts, index=0, reason="STOP", **fields):
    return {"content": {"parts": [*parts], "role": "model"}, "finishReason": reason, **fields, "index": index}


WHOLE = {
    "candidates": [
        candidate({"text": "so it  goes", "thought": True}, {"text": "say \u2028 hello "}, avgLogprobs=-0.5),
        candidate(
            {"text": "two"},
            {"text": "", "thoughtSignature": "c2ln"},
            {"functionCall": {"name": "f", "args": {"b": 1, "a": [2]}}},
            index=1,
            reason="MAX_TOKENS",
        ),
    ],
    "usageMetadata": USAGE,
    "modelVersion": "gemini-2.5-flash",
    "responseId": "r1",
}


def asked(url, body=ASK):
    api = api_for("POST", url)
    [ask] = api.split(api.received(url, body))
    return ask


def recorded(stream, size, ask=None, *, in_order=True):
    recorder = GENERATE_CONTENT.recorder(ask=ask)
    events = []
    for start in range(0, len(stream), size):
        events += recorder.feed(stream[start : start + size])
    events += recorder.close(in_order=in_order)
    assert not any(event.terminal for event in events[:-1])
    assert recorder.complete is bool(events and events[-1].terminal)
    return recorder, b"".join(event.raw for event in events)


def streamed(whole=WHOLE):
    samples = GENERATE_CONTENT.samples(whole)
    return b"".join(GENERATE_CONTENT.stream(samples, asked(f"{URL}:streamGenerateContent?alt=sse")))


def test_c9_the_methods_and_forms_that_ask_the_same_have_one_scope_and_question():
    urls = [
        f"{URL}:generateContent",
        f"{URL}:streamGenerateContent",
        f"{URL}:streamGenerateContent?alt=sse&key=secret",
        f"{URL}:generateContent?%24alt=json&prettyPrint=false",
    ]
    assert {scope_of(url) for url in urls} == {urls[0]}
    assert {json.dumps(asked(url).question) for url in urls} == {
        json.dumps({"model": "gemini-2.5-flash", **ASK})
    }
    assert [asked(url).stream for url in urls] == [False, True, True, False]
    assert scope_of(f"{URL}:generateContent?fields=candidates") != urls[0]
    assert not asked(f"{URL}:generateContent?alt=proto").cacheable


@pytest.mark.parametrize(
    ("url", "model"),
    [
        (f"{URL}:generateContent", "gemini-2.5-flash"),
        (f"{VERTEX}:generateContent", "g"),
        (f"{BASE}/tunedModels/mine:generateContent", "tunedModels/mine"),
        (f"{BASE}/models/with%20space:generateContent", "with space"),
    ],
)
def test_the_model_is_that_of_the_url_whatever_the_body_says(url, model):
    assert asked(url, {"model": "models/other", **ASK}).question["model"] == model


def test_other_methods_of_models_are_not_cached():
    for method in ("countTokens", "predict", "generateImages", "batchGenerateContent"):
        assert api_for("POST", f"{URL}:{method}") is None
    assert api_for("GET", f"{URL}:generateContent") is None


def test_c9_a_scope_of_ones_own_may_be_a_base_url_or_a_name():
    here = scope_of("http://127.0.0.1:8080/ns/a/v1beta/models/m:generateContent")
    assert named_scope(BASE, here, GENERATE_CONTENT) == (f"{BASE}/models/m:generateContent", None)
    assert named_scope("mine", here, GENERATE_CONTENT) == ("mine", GENERATE_CONTENT)


@pytest.mark.parametrize("config", ["generationConfig", "generation_config"])
@pytest.mark.parametrize("count", ["candidateCount", "candidate_count"])
def test_the_number_of_candidates_is_n_in_either_spelling(config, count):
    ask = asked(f"{URL}:generateContent", {**ASK, config: {count: 3, "temperature": 0}})
    assert (ask.n, ask.question[config]) == (3, {"temperature": 0})
    assert asked(f"{URL}:generateContent", {**ASK, config: {count: 2}}).question.keys() == {
        "model",
        "contents",
    }
    with pytest.raises(BadRequest, match="n must be a whole number"):
        asked(f"{URL}:generateContent", {**ASK, config: {count: 0}})
    assert not asked(f"{URL}:generateContent", {**ASK, config: {"seed": 1}}).mergeable


def test_c4_a_merged_call_asks_for_candidates():
    ask = asked(f"{URL}:streamGenerateContent?key=k", {**ASK, "generation_config": {"top_k": 1}})
    body = GENERATE_CONTENT.merge_body([ask.question], 4, transport=ask.transport)
    assert GENERATE_CONTENT.sent(f"{URL}:streamGenerateContent?key=k", body) == (
        f"{URL}:generateContent?key=k",
        {**ASK, "generation_config": {"top_k": 1, "candidateCount": 4}},
    )


def test_candidates_become_samples_that_share_the_usage_exactly():
    samples = GENERATE_CONTENT.samples(WHOLE)
    assert [sample["candidates"][0]["index"] for sample in samples] == [0, 0]
    ask = asked(f"{URL}:generateContent")
    assert GENERATE_CONTENT.answer(samples, ask) == WHOLE
    usages = [sample["usageMetadata"] for sample in samples]
    assert join_usage(usages, 2) == USAGE
    assert {usage["promptTokenCount"] for usage in usages} == {5}
    counts = token_counts(USAGE)
    assert counts == {
        "prompt_tokens": 7,
        "completion_tokens": 10,
        "total_tokens": 17,
        "cached_tokens": 4,
        "reasoning_tokens": 3,
    }
    assert GENERATE_CONTENT.summary(samples[1])["text"] == 'twof({"b":1,"a":[2]})'
    assert GENERATE_CONTENT.summary(samples[0])["text"] == "say \u2028 hello "


def plain(samples):
    """Samples as the provider would have written them, and with which of them the prompt was billed."""
    return [(unmarked(sample), bills_prompt(sample)) for sample in samples]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_recorded_stream_is_the_whole_answer(size):
    stream = streamed()
    recorder, passed_on = recorded(stream, size)
    assert passed_on == stream
    assert plain(recorder.samples()) == plain(GENERATE_CONTENT.samples(WHOLE))
    crlf = stream.replace(b"\n\n", b"\r\n\r\n")
    assert recorded(crlf, size)[0].samples() == recorder.samples()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_of_events_is_passed_on_as_an_array_to_a_reader_that_wants_one(size):
    ask = asked(f"{URL}:streamGenerateContent")
    recorder, passed_on = recorded(streamed(), size, ask)
    samples = recorder.samples()
    assert plain(samples) == plain(GENERATE_CONTENT.samples(WHOLE))
    assert json.loads(passed_on) == json.loads(b"".join(GENERATE_CONTENT.stream(samples, ask)))
    assert GENERATE_CONTENT.media_type(ask) == "application/json"


def said(*parts):
    return {"role": "model", **({"parts": [*parts]} if parts else {})}


CALL = {"functionCall": {"name": "f", "args": {}}}
CHUNKS = {
    "words": [said({"text": "so it"}), said({"text": " is, I th"}), said({"text": "ink."})],
    "an empty end": [said({"text": "so "}), said({"text": ""})],
    "no content at the end": [said({"text": "so "}), None],
    "no parts at the end": [said({"text": "so "}), said()],
    "several parts": [
        said({"text": "Hm. ", "thought": True}, {"text": "So "}),
        said({"text": "it"}, {"text": " is"}),
        said({"text": "", "thoughtSignature": "s"}, CALL, CALL),
        said({"text": ""}, {"text": "."}),
    ],
    "empty texts": [said({"text": ""}), said({"text": "", "thought": True}), said({"text": ""})],
    "nothing": [None],
    "an odd letter": [said({"text": "\U0001f600 \udc00"}), said({"text": "\u2028"})],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_c2_a_stream_is_replayed_in_the_pieces_in_which_it_came(chunks):
    candidates = [{**({"content": content} if content else {}), "index": 0} for content in chunks]
    candidates[-1]["finishReason"] = "STOP"
    stream = b"".join(data_event({"candidates": [each], "modelVersion": "m"}) for each in candidates)
    recorder, _ = recorded(stream, 10)
    [sample] = recorder.samples()
    ask = asked(f"{URL}:streamGenerateContent?alt=sse")
    replayed = b"".join(GENERATE_CONTENT.stream([sample], ask))
    read = [jsontext.loads(event.removeprefix(b"data: ")) for event in replayed.split(b"\n\n") if event]
    assert [event["candidates"][0] for event in read] == candidates
    assert recorded(replayed, 10_000)[0].samples() == [sample]
    whole = GENERATE_CONTENT.answer_bytes([jsontext.dumps(sample)], ask)
    assert jsontext.loads(whole) == GENERATE_CONTENT.answer([sample], ask) == unmarked(sample)


@pytest.mark.parametrize(
    "pieces",
    [None, 5, [5], [[0]], [[0, 1]], [[0, -1], [0, 9]], [[0, True]], [[0, 99]], [[1, 2]], [[0, None]], ["a"]],
)
def test_c12_pieces_that_are_not_those_of_the_text_are_ignored(pieces):
    [whole] = GENERATE_CONTENT.samples(
        {"candidates": [{"content": said({"text": "so it is"}), "finishReason": "STOP"}]}
    )
    ask = asked(f"{URL}:streamGenerateContent?alt=sse")
    damaged = {"cachepipe": {"pieces": pieces}, **whole}
    assert [*GENERATE_CONTENT.stream([damaged], ask)] == [*GENERATE_CONTENT.stream([whole], ask)]


def test_c7_an_array_that_breaks_off_is_not_closed():
    ask = asked(f"{URL}:streamGenerateContent")
    events = streamed().split(b"\n\n")
    recorder, passed_on = recorded(b"\n\n".join(events[:3]) + b"\n\n", 50, ask, in_order=False)
    assert not recorder.complete
    with pytest.raises(json.JSONDecodeError):
        json.loads(passed_on)


def test_a_large_stream_is_passed_on_in_both_forms_and_not_kept():
    for url in (f"{URL}:streamGenerateContent", f"{URL}:streamGenerateContent?alt=sse"):
        recorder = GENERATE_CONTENT.recorder(ask=asked(url)).within(300)
        passed_on = [event.raw for event in [*recorder.feed(streamed()), *recorder.close(in_order=True)]]
        assert not recorder.complete
        assert b"functionCall" in b"".join(passed_on)
    with pytest.raises(BadAnswer, match="more than 300 bytes"):
        recorder.samples()


STREAM = streamed({**WHOLE, "candidates": WHOLE["candidates"][:1]})


@given(st.integers(0, len(STREAM)) | st.integers(len(STREAM) - 3, len(STREAM)))
def test_c7_no_prefix_of_a_stream_is_complete(length):
    recorder, _ = recorded(STREAM[:length], 100, in_order=False)
    assert recorder.complete is (length == len(STREAM))
    whole, _ = recorded(STREAM[:length], 100)  # its length is known to be right
    assert whole.complete is (length >= len(STREAM) - 2)  # only the blank line may be missing


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}},
        b"{broken",
        b"[1]",
        {"candidates": [{"content": "text"}]},
        {"candidates": [{"content": {"parts": [1]}}]},
        {"promptFeedback": {"blockReason": "SAFETY"}},
        {"candidates": [{"index": 0, "finishReason": "OTHER"}]},
    ],
    ids=str,
)
def test_c8_a_stream_that_is_no_answer_is_passed_on_and_gives_no_sample(event):
    data = event if isinstance(event, bytes) else orjson.dumps(event)
    stream = b"data: " + data + b"\n\n"
    recorder, passed_on = recorded(stream, 9)
    assert passed_on == stream
    with pytest.raises(BadAnswer):
        recorder.samples()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "the prompt was blocked: 'SAFETY'"),
        ({"usageMetadata": USAGE}, "must list its candidates"),
        ({"candidates": []}, "must list its candidates"),
        ({"candidates": [{"content": {"parts": []}}]}, "no finishReason"),
        ({"candidates": [candidate(reason="OTHER")]}, "failed"),
        ({"candidates": ["text"]}, "must hold its content"),
        ({"candidates": [{"content": {"parts": ["x"]}, "finishReason": "STOP"}]}, "must hold its content"),
        ({"error": {"code": 500}}, "is an error"),
        ([{"error": {"code": 500}}], "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_c8_what_is_no_answer_is_refused_in_a_sentence(answer, reason):
    with pytest.raises(BadAnswer, match=reason):
        GENERATE_CONTENT.samples(orjson.dumps(answer))


def test_chunks_with_log_probabilities_and_citations_add_up():
    def piece(text, number, **fields):
        told = {
            "logprobsResult": {"chosenCandidates": [number]},
            "citationMetadata": {"citationSources": [number]},
        }
        return {"candidates": [{"content": {"parts": [{"text": text}]}, **told, **fields}]}

    chunks = [piece("a", 1), piece("b", 2, finishReason="STOP", safetyRatings=[3])]
    stream = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)
    [sample] = recorded(stream, 10)[0].samples()
    [one] = sample["candidates"]
    assert one["content"]["parts"] == [{"text": "ab"}]
    assert one["logprobsResult"] == {"chosenCandidates": [1, 2]}
    assert one["citationMetadata"] == {"citationSources": [1, 2]}


def test_c10_a_batch_of_contents_and_each_alone_are_the_same_questions():
    one, two = ({"parts": [{"text": text}]} for text in ("one", "two"))
    body = {"requests": [{"model": "models/gemini-2.5-flash", "content": each} for each in (one, two)]}
    url = f"{URL}:batchEmbedContents?key=k"
    asks = EMBED_CONTENT.split(EMBED_CONTENT.received(url, body))
    alone = asked(f"{URL}:embedContent", {"content": two})
    assert asks[1].question == alone.question == {"model": "gemini-2.5-flash", "content": two}
    assert scope_of(url) == f"{URL}:embedContent"
    assert EMBED_CONTENT.sent(url, EMBED_CONTENT.received(url, body)) == (url, body)
    merged = EMBED_CONTENT.merge_body([ask.question for ask in asks], transport=alone.transport)
    assert EMBED_CONTENT.sent(f"{URL}:embedContent?key=k", merged) == (url, body)
    only = EMBED_CONTENT.merge_body([alone.question], transport=alone.transport)
    assert EMBED_CONTENT.sent(f"{URL}:embedContent", only) == (f"{URL}:embedContent", {"content": two})
    answer = {"embeddings": [{"values": [1.0]}, {"values": [2.5]}], "usageMetadata": {"promptTokenCount": 2}}
    samples = EMBED_CONTENT.samples(answer, [ask.question for ask in asks])
    assert samples[1] == {"embedding": {"values": [2.5]}, "usageMetadata": {"promptTokenCount": 1}}
    assert EMBED_CONTENT.answer(samples, asks[0]) == answer
    assert json.loads(EMBED_CONTENT.answer_bytes([orjson.dumps(each) for each in samples], asks[0])) == answer
    assert EMBED_CONTENT.answer(samples[1:], alone) == samples[1]
    assert EMBED_CONTENT.plain(samples[1]) == [2.5]


def test_a_batch_keeps_the_name_that_vertex_gives_a_model():
    named = {"model": "publishers/google/models/g", "content": {"parts": [{"text": "one"}]}}
    url = f"{VERTEX}:batchEmbedContents"
    [ask] = EMBED_CONTENT.split(EMBED_CONTENT.received(url, {"requests": [named]}))
    merged = EMBED_CONTENT.merge_body([ask.question], transport=ask.transport)
    assert EMBED_CONTENT.sent(url, merged) == (url, {"requests": [named]})
    other = EMBED_CONTENT.split(EMBED_CONTENT.received(url, {"requests": [{**named, "model": "models/x"}]}))
    assert not other[0].cacheable


@pytest.mark.parametrize("body", [{}, {"requests": []}, {"requests": "x"}, {"requests": [1]}])
def test_a_batch_without_requests_is_refused(body):
    with pytest.raises(BadRequest, match="requests must be a list of objects"):
        EMBED_CONTENT.split(EMBED_CONTENT.received(f"{URL}:batchEmbedContents", body))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"embeddings": [{"values": [1.0]}]}, MixedAnswer),
        ({"embeddings": "x"}, BadAnswer),
        ({"embeddings": [{}, {}]}, BadAnswer),
        ({"embedding": {"values": "x"}}, BadAnswer),
    ],
)
def test_c8_embeddings_of_another_form_are_refused(answer, error):
    with pytest.raises(error):
        EMBED_CONTENT.samples(answer, [{"content": 1}, {"content": 2}])


def test_credentials_of_tools_are_neither_keyed_nor_stored():
    servers = [{"name": "s", "streamableHttpTransport": {"headers": {"Authorization": "Bearer secret"}}}]
    maps = {"authConfig": {"apiKeyConfig": {"apiKeyString": "secret"}}, "enableWidget": True}
    body = {**ASK, "tools": [{"mcpServers": servers}, {"googleMaps": maps}, {"googleSearch": {}}]}
    document = question_document(asked(f"{URL}:generateContent", body))
    assert "secret" not in json.dumps(document)
    assert document["body"]["tools"][2] == {"googleSearch": {}}
    assert document["body"]["tools"][1]["googleMaps"]["enableWidget"] is True
