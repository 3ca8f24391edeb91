"""Tokens told beforehand, and put right by experience."""

from __future__ import annotations

import sys
import types

import pytest
import tiktoken

from cachepipe.flow.tokens import Estimator, _Counter, estimated

TEXT = "Rate limits hold over every interval, not only on average. " * 20


def letters():
    """A real encoding of tiktoken's, in which each byte is a token, made without a download."""
    ranks = {bytes([number]): number for number in range(256)}
    return tiktoken.Encoding("letters", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})


def test_the_estimate_without_tiktoken_is_near_for_english_and_high_for_other_scripts():
    assert 240 <= estimated(TEXT) <= 300
    assert 6 <= estimated("速度制限を守る") <= 8
    assert estimated("") == 0


def test_tiktoken_counts_where_it_is_given():
    estimator = Estimator(letters())
    body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 10}
    estimate = estimator.estimate(body)
    assert estimate.prompt == 4 + len("user") + len("abc")
    assert estimate.total == estimate.prompt + 10


def test_tiktoken_is_loaded_by_name_and_until_then_it_is_estimated(monkeypatch):
    counter = _Counter("letters")
    fake = types.SimpleNamespace(get_encoding=lambda name: {"letters": letters()}[name])
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    counter._begun = True  # no thread in this test
    assert counter("abcdefgh") == 2
    counter.load()
    assert counter("abcdefgh") == 8


def test_an_encoding_that_cannot_be_had_leaves_the_estimate(monkeypatch):
    def fetch(name):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=fetch))
    counter = _Counter("cl100k_base")
    counter._begun = True
    counter.load()
    assert counter("abcdefgh") == 2


@pytest.mark.parametrize(
    ("body", "completion"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_completion_tokens": 50, "n": 4}, 200),
        ({"max_output_tokens": 30}, 30),
        ({"max_tokens": 10, "n": 2, "best_of": 5}, 50),
    ],
)
def test_what_is_to_come_is_what_the_request_allows(body, completion):
    assert Estimator(None).estimate({"prompt": "x", **body}).completion == completion


def test_without_a_limit_experience_tells_what_is_to_come():
    estimator = Estimator(None)
    body = {"model": "m", "prompt": "x"}
    assert estimator.estimate(body).completion == 256
    for _ in range(100):
        estimator.learn(estimator.estimate(body), 1, 40)
    assert 40 <= estimator.estimate(body).completion <= 45
    assert estimator.estimate({**body, "n": 3}).completion == pytest.approx(
        3 * estimator.estimate(body).completion
    )
    assert estimator.estimate({"model": "other", "prompt": "x"}).completion == 256


def test_prompts_are_put_right_by_their_usage():
    estimator = Estimator(None)
    body = {"model": "m", "prompt": TEXT}
    first = estimator.estimate(body).prompt
    for _ in range(100):
        estimator.learn(estimator.estimate(body), int(first * 1.5), None)
    assert estimator.estimate(body).prompt == pytest.approx(first * 1.5, rel=0.02)


def test_pictures_are_not_counted_by_the_letters_of_their_encoding():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture]}]}
    assert Estimator(None).estimate(body).prompt < 2000


def test_prompts_of_token_numbers_are_counted():
    assert Estimator(None).estimate({"prompt": [1, 2, 3]}).prompt == 3
    assert Estimator(None).estimate({"input": [[1, 2], [3]]}, 0).total == 3


@pytest.mark.parametrize(
    ("body", "completion"),
    [
        ({"prompt": ["one", "two", "three"], "max_tokens": 10}, 30),
        ({"prompt": [[1, 2], [3]], "max_tokens": 10, "n": 2}, 40),
        ({"prompt": [1, 2, 3], "max_tokens": 10}, 10),
        ({"prompt": [], "max_tokens": 10}, 10),
        ({"max_tokens": -1}, 256),
        ({"max_tokens": 0, "max_completion_tokens": None}, 256),
        ({"max_tokens": True}, 256),
        ({"n": -3, "max_tokens": 10}, 10),
    ],
)
def test_what_is_to_come_is_never_less_than_what_may_be_asked_for(body, completion):
    assert Estimator(None).estimate(body).completion == completion


def test_numbers_that_no_provider_takes_are_its_to_refuse():
    assert Estimator(None).estimate({"n": 10**400, "max_tokens": 10**400}).total > 1e9


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "A" * 100_000}},
        {"type": "some_future_kind", "url": "data:image/png;base64," + "A" * 100_000},
    ],
    ids=["video", "unknown"],
)
def test_the_letters_of_a_picture_are_no_tokens(part):
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert Estimator(None).estimate(body).prompt < 2000


def test_a_long_text_is_taken_to_go_on_as_it_begins():
    counter = _Counter("letters")
    sizes = []
    counter._encode = lambda text, **_: sizes.append(len(text)) or range(len(text) // 2)
    assert counter("ab" * 500_000) == 500_000
    assert sizes == [50_000]


def test_a_text_generation_of_hugging_face_is_estimated_by_its_inputs_and_its_own_limit():
    estimate = Estimator(None).estimate({"inputs": "x" * 400, "parameters": {"max_new_tokens": 7}})
    assert (estimate.prompt, estimate.completion) == (100, 7)


def test_geminis_bodies_are_estimated_by_their_contents_and_configuration():
    picture = {"inlineData": {"mimeType": "image/png", "data": "A" * 100_000}}
    contents = [{"role": "user", "parts": [{"text": "words " * 40}, picture]}]
    config = {"candidateCount": 3, "maxOutputTokens": 7}
    estimate = Estimator(None).estimate({"model": "m", "contents": contents, "generationConfig": config})
    assert (estimate.model, estimate.n, estimate.completion) == ("m", 3, 21)
    assert 1000 < estimate.raw < 1200
