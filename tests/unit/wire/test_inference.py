"""Hugging Face's own routes: what they ask, and what their answers and streams hold."""

from __future__ import annotations

import json

import pytest

from cachepipe import wire
from cachepipe.wire import FEATURE_EXTRACTION, GENERATE_TEXT, TEXT_GENERATION, BadAnswer, MixedAnswer

PROMPT = {"inputs": "Sort", "parameters": {"max_new_tokens": 5}}
WITH_DETAILS = {"inputs": "Sort", "parameters": {"max_new_tokens": 5, "details": True}}
TOKENS = [{"id": 7, "text": " a", "logprob": -0.5, "special": False}, {"id": 9, "text": "b", "logprob": -1.0}]
DETAILS = {"finish_reason": "length", "generated_tokens": 2, "seed": None, "prefill": [], "tokens": TOKENS}


def ask(body, api=TEXT_GENERATION):
    [only] = api.split(body)
    return only


def events(samples, body):
    return list(TEXT_GENERATION.stream(samples, ask({**body, "stream": True})))


def parsed(stream):
    return [json.loads(event.removeprefix(b"data: ")) for event in stream]


def recorded(stream):
    recorder = TEXT_GENERATION.recorder()
    passed = [event for chunk in stream for event in recorder.feed(chunk)]
    assert b"".join(event.raw for event in passed) == b"".join(stream)
    assert [event.terminal for event in passed] == [False] * (len(stream) - 1) + [True]
    return recorder.samples()


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/models/gpt2", TEXT_GENERATION),
        ("/hf-inference/models/meta-llama/Llama-3.1-8B", TEXT_GENERATION),
        ("/generate", GENERATE_TEXT),
        ("/generate_stream", GENERATE_TEXT),
        ("/models/a/b/pipeline/feature-extraction", FEATURE_EXTRACTION),
        ("/embed", FEATURE_EXTRACTION),
        ("/models/a/b/v1/chat/completions", wire.CHAT),
        ("/models/a/b/pipeline/sentence-similarity", None),
        ("/api/generate", None),
        ("/api/embed", None),
        ("/models", None),
    ],
)
def test_an_api_is_known_by_its_path(path, api):
    assert wire.api_for("POST", path) is api
    assert wire.api_for("POST", f"https://host.example{path}") is api
    assert wire.api_for("GET", path) is None


def test_both_routes_of_a_server_ask_the_same():
    plain, stream = (wire.scope_of(f"http://h/{path}") for path in ("generate", "generate_stream"))
    assert plain == stream == "http://h/generate"
    body = GENERATE_TEXT.received("http://h/generate_stream?a=1", PROMPT)
    assert ask(body, GENERATE_TEXT).stream
    assert GENERATE_TEXT.sent("http://h/generate?a=1", body) == ("http://h/generate_stream?a=1", PROMPT)
    body = GENERATE_TEXT.received("http://h/generate", {**PROMPT, "stream": True})  # the server ignores it
    assert not ask(body, GENERATE_TEXT).stream
    assert GENERATE_TEXT.sent("http://h/generate_stream", body) == ("http://h/generate", PROMPT)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": ["a", "b"]},
        {"inputs": {"question": "q", "context": "c"}},
        {"inputs": "a", "parameters": {"num_return_sequences": 2}},
    ],
)
def test_what_is_no_single_text_passes_through_uncached(body):
    assert not ask(body).cacheable
    assert ask(body).reason


def test_c9_how_an_answer_travels_does_not_count():
    sent = {**PROMPT, "stream": True, "options": {"wait_for_model": True}}
    assert ask(sent).question == PROMPT
    assert ask(WITH_DETAILS).question != PROMPT
    assert TEXT_GENERATION.merge_body([PROMPT], transport=ask(sent).transport) == {
        **PROMPT,
        "options": {"wait_for_model": True},
    }


@pytest.mark.parametrize("details", [{}, {"details": DETAILS}])
def test_an_answer_is_served_as_the_route_writes_it(details):
    whole = {"generated_text": " ab", **details}
    for api, answer in ((TEXT_GENERATION, [whole]), (GENERATE_TEXT, whole)):
        text = json.dumps(answer).encode()
        samples = api.samples(text)
        assert samples == [whole]
        stored = [json.dumps(samples[0]).encode()]
        assert json.loads(api.answer_bytes(stored, ask(WITH_DETAILS, api))) == answer
        assert json.loads(api.written(api.answer(samples, ask(WITH_DETAILS, api)))) == answer


def test_a_stream_is_made_of_the_tokens_and_gives_the_sample_again():
    stream = events([{"generated_text": " ab", "details": DETAILS}], WITH_DETAILS)
    first, last = parsed(stream)
    assert (first["token"], first["generated_text"], first["details"]) == (TOKENS[0], None, None)
    assert last["generated_text"] == " ab"
    assert last["details"]["finish_reason"] == "length"
    [sample] = recorded(stream)
    [answer] = json.loads(TEXT_GENERATION.written(TEXT_GENERATION.answer([sample], ask(WITH_DETAILS))))
    assert answer == {"generated_text": " ab", "details": {"best_of_sequences": None, **DETAILS}}
    assert TEXT_GENERATION.answer([sample], ask(PROMPT)) == {"generated_text": " ab"}
    assert parsed(events([sample], PROMPT)) == [first, last]


def test_a_text_without_details_is_streamed_in_words_with_unknown_ids():
    body = {"inputs": "Sort", "parameters": {"return_full_text": True}}
    values = parsed(events([{"generated_text": "Sort the list"}], body))
    assert [value["token"]["text"] for value in values] == [" ", "the ", "list"]
    assert {value["token"]["id"] for value in values} == {None}
    assert values[-1]["generated_text"] == "Sort the list"
    assert len(parsed(events([{"generated_text": ""}], PROMPT))) == 1


def test_the_usage_is_that_of_the_details_if_the_prompt_was_counted():
    streamed = {"generated_text": "a", "details": {"generated_tokens": 2, "input_length": 3, "tokens": []}}
    assert TEXT_GENERATION.summary(streamed)["total_tokens"] == 5
    assert TEXT_GENERATION.summary({"generated_text": "a", "details": DETAILS})["total_tokens"] is None
    assert TEXT_GENERATION.summary({"generated_text": "a"})["text"] == "a"


@pytest.mark.parametrize(
    "answer",
    [
        b"{",
        b"[]",
        b'{"error": "Model is overloaded", "error_type": "overloaded"}',
        b'[{"generated_text": "a"}, {"generated_text": "b"}]',
        b'[{"summary_text": "a"}]',
        b'{"generated_text": null}',
    ],
)
def test_c8_what_is_no_answer_is_refused_in_a_sentence(answer):
    with pytest.raises(BadAnswer, match="answer"):
        TEXT_GENERATION.samples(answer)


@pytest.mark.parametrize(
    "stream",
    [
        [b'data: {"token": {"text": "a"}, "generated_text": null}\n\n'],
        [b'data: {"error": "overloaded", "error_type": "overloaded"}\n\n'],
        [b'data: {"token": 1, "generated_text": "a"}\n\n'],
    ],
)
def test_c7_a_stream_that_ends_early_or_fails_gives_no_sample(stream):
    recorder = TEXT_GENERATION.recorder()
    for chunk in stream:
        recorder.feed(chunk)
    recorder.close(in_order=True)
    with pytest.raises(BadAnswer):
        recorder.samples()


def test_each_text_of_a_list_is_a_question_and_a_text_alone_is_another():
    asks = FEATURE_EXTRACTION.split({"inputs": ["a", "b"], "normalize": True, "options": {}})
    assert [one.question for one in asks] == [{"inputs": [text], "normalize": True} for text in "ab"]
    assert ask({"inputs": ["a"], "normalize": True}, FEATURE_EXTRACTION).question == asks[0].question
    assert ask({"inputs": "a"}, FEATURE_EXTRACTION).question == {"inputs": "a"}
    tokens = ask({"inputs": [[1, 2], [3]]}, FEATURE_EXTRACTION)
    assert (tokens.cacheable, tokens.question) == (True, {"inputs": [[1, 2], [3]]})
    assert all(one.function for one in (*asks, tokens))
    for body in ({}, {"inputs": []}, {"inputs": None}):
        assert not ask(body, FEATURE_EXTRACTION).cacheable
    merged = FEATURE_EXTRACTION.merge_body([one.question for one in asks])
    assert merged == {"inputs": ["a", "b"], "normalize": True}


def test_embeddings_come_back_in_the_form_of_the_request():
    asks = FEATURE_EXTRACTION.split({"inputs": ["a", "b"]})
    samples = FEATURE_EXTRACTION.samples(b"[[1.5, 2], [3, 4]]", [one.question for one in asks])
    assert samples == [{"embeddings": [[1.5, 2]]}, {"embeddings": [[3, 4]]}]
    stored = [json.dumps(sample).encode() for sample in samples]
    assert json.loads(FEATURE_EXTRACTION.answer_bytes(stored, asks[0])) == [[1.5, 2], [3, 4]]
    assert json.loads(FEATURE_EXTRACTION.answer_bytes(stored[:1], asks[0])) == [[1.5, 2]]
    [alone] = FEATURE_EXTRACTION.samples(b"[1.5, 2]")
    assert json.loads(FEATURE_EXTRACTION.answer_bytes([json.dumps(alone).encode()], asks[0])) == [1.5, 2]
    assert FEATURE_EXTRACTION.summary(samples[0])["text"] == "1 by 2 numbers"
    with pytest.raises(MixedAnswer, match="2 texts were sent"):
        FEATURE_EXTRACTION.samples(b"[[1.5, 2]]", [one.question for one in asks])


@pytest.mark.parametrize("answer", [b"[]", b"[[]]", b'["a"]', b'{"error": "no"}', b"3", b"[[true]]", b"["])
def test_c8_what_is_no_embedding_is_refused(answer):
    with pytest.raises(BadAnswer):
        FEATURE_EXTRACTION.samples(answer)


@pytest.mark.parametrize("scope", [None, "http://h", "tiny"])
def test_c9_a_document_names_the_api_that_its_scope_does_not_tell(scope):
    for api, name in ((TEXT_GENERATION, "text generation"), (FEATURE_EXTRACTION, "feature extraction")):
        found, named = wire.named_scope(scope, "http://h", api)
        assert (found, named.name) == (scope or "http://h", name)
    assert wire.named_scope(None, "http://h/models/a", TEXT_GENERATION) == ("http://h/models/a", None)
