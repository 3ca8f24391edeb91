"""Tokens: what a call used is shared out exactly, and adds up again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.wire import CHAT, usage_totals
from cachepipe.wire.usage import join_usage, shares, split_usage, token_counts

counts = st.integers(0, 10**6)
weights = st.lists(st.integers(1, 1000), min_size=1, max_size=9)


@given(counts, weights)
def test_shares_add_up_and_follow_the_weights(total, given_weights):
    parts = shares(total, given_weights)
    assert sum(parts) == total
    whole = sum(given_weights)
    assert all(
        abs(part - total * weight / whole) < 1.0001 for part, weight in zip(parts, given_weights, strict=True)
    )


@st.composite
def usages(draw):
    prompt, completion = draw(counts), draw(counts)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if draw(st.booleans()):
        usage["completion_tokens_details"] = {
            "reasoning_tokens": draw(counts),
            "audio_tokens": draw(st.none() | counts),
            "more": {"inner_tokens": draw(counts)},
        }
    if draw(st.booleans()):
        usage["prompt_tokens_details"] = {"cached_tokens": draw(counts)}
    if draw(st.booleans()):
        usage["queue_time"] = 0.25
    return usage


@given(usages(), weights)
def test_the_shares_of_one_question_add_up_to_the_call_and_each_carries_the_prompt(usage, given_weights):
    parts = split_usage(usage, given_weights, [1])
    assert join_usage(parts, len(parts)) == usage
    for part in parts:
        assert part["prompt_tokens"] == usage["prompt_tokens"]
        assert part["total_tokens"] == part["prompt_tokens"] + part["completion_tokens"]
        assert part.get("prompt_tokens_details") == usage.get("prompt_tokens_details")
    assert sum(part["completion_tokens"] for part in parts) == usage["completion_tokens"]
    if "completion_tokens_details" in usage:
        inner = [part["completion_tokens_details"]["more"]["inner_tokens"] for part in parts]
        assert sum(inner) == usage["completion_tokens_details"]["more"]["inner_tokens"]


@given(usages(), st.lists(st.integers(1, 99), min_size=1, max_size=5), st.integers(1, 4))
def test_the_shares_of_several_questions_add_up_too(usage, prompts, per):
    parts = split_usage(usage, [1] * (len(prompts) * per), prompts)
    assert join_usage(parts, per) == usage
    firsts = parts[::per]
    assert sum(part["prompt_tokens"] for part in firsts) == usage["prompt_tokens"]


def test_counts_have_one_set_of_names_for_all_providers():
    openai = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    responses = {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 15,
    }
    anthropic = {
        "input_tokens": 4,
        "cache_read_input_tokens": 4,
        "cache_creation_input_tokens": 2,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 3},
    }
    expected = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "cached_tokens": 4,
        "reasoning_tokens": 3,
    }
    assert token_counts(openai) == token_counts(responses) == token_counts(anthropic) == expected
    assert token_counts(None) == token_counts({}) == dict.fromkeys(expected)


def test_the_prompt_of_a_call_is_billed_once_and_counts_logically_for_each_sample():
    choices = [{"index": i, "message": {"content": "x"}, "finish_reason": "stop"} for i in range(3)]
    usage = {"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130}
    samples = [*CHAT.samples({"choices": choices, "usage": usage}), {"choices": choices[:1], "usage": None}]
    logical, billed = usage_totals(samples)
    rest = {"cached_tokens": 0, "reasoning_tokens": 0, "samples": 4, "unknown": 1}
    assert billed == {**usage, **rest}
    assert logical == {"prompt_tokens": 300, "completion_tokens": 30, "total_tokens": 330, **rest}


@given(total=st.integers(0, 30), prompt=st.integers(0, 9), completion=st.integers(0, 9))
def test_a_total_that_is_no_sum_comes_back_as_it_was(total, prompt, completion):
    """Some servers count reasoning in the total only."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    assert join_usage(split_usage(usage, [1, 5, 2], [1]), 3) == usage
