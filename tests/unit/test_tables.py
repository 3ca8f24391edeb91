"""Completions as data frames, as lines of JSON, and side by side."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import pandas as pd
import polars as pl
import pytest
from pydantic import BaseModel

from cachepipe import (
    Conversation,
    Message,
    TextCompletion,
    TokenLogProb,
    from_jsonl,
    side_by_side,
    terminal,
    to_dataframe,
    to_jsonl,
)
from cachepipe.chat.tables import COLUMNS


class Capital(BaseModel):
    name: str


def completion(text, prompt="Italy?", **fields):
    return TextCompletion(
        conversation=Conversation([Message("system", "Be brief."), Message("user", prompt)]),
        model="m",
        message=text,
        start_time=100.0,
        end_time=101.5,
        **fields,
    )


SOME = [
    completion(
        "Rome",
        cached=True,
        usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        cost=0.25,
        token_log_probs=[TokenLogProb("Ro", -1.0), TokenLogProb("me", -0.5)],
        full_token_log_probs=[[TokenLogProb("Ro", -1.0)], []],
        parsed=Capital(name="Rome"),
        key="k2-x",
        index=3,
        namespace="n",
    ),
    ValueError("no \x1b[31mred"),
    completion("Milan\u2028?"),
]


@pytest.mark.parametrize(("library", "kind"), [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
def test_a_data_frame_has_a_row_for_each(library, kind):
    frame = to_dataframe(SOME, library)
    assert type(frame) is kind
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["message"])[0::2] == ["Rome", "Milan\u2028?"]
    assert list(frame["prompt"])[0::2] == ["Italy?", "Italy?"]
    firsts = [next(iter(frame[name])) for name in ("duration", "prompt_tokens", "mean_log_prob")]
    assert firsts == [1.5, 7, -0.75]
    assert list(frame["error"])[1] == "ValueError: no \x1b[31mred"
    assert len(to_dataframe([], library)) == 0


def test_the_library_that_is_there_is_used(monkeypatch):
    assert type(to_dataframe(SOME)) is pd.DataFrame
    real = importlib.util.find_spec
    hidden = {"pandas"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    assert type(to_dataframe(SOME)) is pl.DataFrame
    with pytest.raises(ImportError, match=r"pip install 'cachepipe\[pandas\]'"):
        to_dataframe(SOME, "pandas")
    hidden.add("polars")
    with pytest.raises(ImportError, match="needs pandas or polars"):
        to_dataframe(SOME)
    with pytest.raises(ValueError, match="got 'excel'"):
        to_dataframe(SOME, "excel")


def test_lines_of_json_come_back(tmp_path):
    path = tmp_path / "results.jsonl"
    text = to_jsonl(SOME, path)
    assert path.read_text() == text
    assert len(text.splitlines()) == 3
    first, error, last = from_jsonl(path)
    assert first.parsed == {"name": "Rome"}
    assert first.token_log_probs == SOME[0].token_log_probs
    assert first.full_token_log_probs == SOME[0].full_token_log_probs
    assert (first.conversation, first.duration) == (SOME[0].conversation, 1.5)
    assert error == {"error": "ValueError: no \x1b[31mred"}
    assert last == SOME[2] == from_jsonl(text)[2]


def test_probabilities_that_are_no_numbers_of_json_come_back():
    tokens = [TokenLogProb("a", -math.inf), TokenLogProb("b", math.nan), TokenLogProb("c", -0.5)]
    text = to_jsonl([completion("abc", token_log_probs=tokens, full_token_log_probs=[tokens])])
    assert "Infinity" not in text
    assert "NaN" not in text
    [again] = from_jsonl(text)
    assert repr(again.token_log_probs) == repr(tokens)
    assert repr(again.full_token_log_probs) == repr([tokens])


def test_c9_numbers_that_json_does_not_have_leave_lines_valid():
    class Measured(BaseModel):
        mean: float

    parsed = Measured(mean=math.nan)
    text = to_jsonl([completion("x", parsed=parsed, usage={"prompt_tokens": 2**70})])
    assert json.loads(text, parse_constant=pytest.fail)["parsed"] == {"raw": '{"mean":NaN}'}
    assert json.loads(text)["usage"] == {"prompt_tokens": 2**70}


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_takes_what_has_no_form_in_utf_8_or_is_not_known(library):
    tokens = [TokenLogProb("a", math.nan), TokenLogProb("b", -0.5)]
    frame = to_dataframe([completion("\ud83d\ude00\ud83d", token_log_probs=tokens)], library)
    assert list(frame["message"]) == ["\U0001f600\ufffd"]
    assert list(frame["mean_log_prob"]) == [-0.5]


def test_the_name_of_a_file_is_no_text():
    with pytest.raises(ValueError, match=r"line 1 .* given as a pathlib\.Path"):
        from_jsonl("results.jsonl")


@pytest.mark.parametrize("line", ["{", "3", "{}", '{"conversation": []}'])
def test_a_line_that_is_no_completion_is_named(line):
    with pytest.raises(ValueError, match="line 2 is not a completion"):
        from_jsonl(to_jsonl(SOME[:1]) + line)


def test_samples_stand_beside_each_other_under_their_prompt():
    shown = side_by_side([completion("Rome"), completion("Milan")], width=60)
    lines = shown.splitlines()
    assert lines[0].rstrip() == "Italy?"
    assert {len(line) for line in lines[1:]} == {60}
    assert any(re.search(r"│ Rome\s+│ Milan\s+│", line) for line in lines)


def test_different_prompts_stand_above_each():
    shown = side_by_side([completion("Rome"), completion("Paris", "France?")], labels=["a", "b"], width=60)
    rows = [re.findall(r"[\w?]+", line) for line in shown.splitlines()]
    assert [row for row in rows if row] == [["a", "b"], ["Italy?", "France?"], ["Rome", "Paris"]]


def test_as_many_stand_in_a_row_as_fit():
    shown = side_by_side([completion(str(number)) for number in range(5)], width=50)
    assert shown.count("╭") == 3
    narrow = side_by_side([completion("word " * 20)], width=10)
    assert {len(line) for line in narrow.splitlines()[1:]} == {10}


def test_failures_stand_in_their_places_and_nothing_is_obeyed(monkeypatch):
    shown = side_by_side(SOME, width=90)
    assert "2 failed" in shown
    assert "1 m cached" in shown
    assert not terminal.UNSAFE.search(shown)
    assert "\x1b" in side_by_side(SOME, width=90, color=True)
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in side_by_side(SOME, width=90)


def test_the_width_is_that_of_the_terminal_and_enough(monkeypatch):
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "48")
    assert {len(line) for line in side_by_side(SOME, color=False).splitlines() if "│" in line} == {48}
    with pytest.raises(ValueError, match="at least 10; got 5"):
        side_by_side(SOME, width=5)


def test_labels_are_as_many_as_samples():
    with pytest.raises(ValueError, match="a label for each: 3 are shown, got 1"):
        side_by_side(SOME, labels=["a"])
    assert side_by_side([]) == ""
