"""The model of the test doubles: a real distribution, exactly known, and samples that follow it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cachepipe.testing import NGramModel
from cachepipe.testing.ngram import (
    END,
    Table,
    default_model,
    embed,
    flatten,
    generator,
    strip_nonces,
    tokenise,
)

HELLO = [{"role": "user", "content": "Write a function that sorts a list of strings."}]
CONTEXTS = [
    "",
    "hello",
    "Given a",
    "user: find the prime factors\nassistant:\n",
    "zzyzx",
    "Return the list \n",
]


@pytest.fixture(scope="module")
def model() -> NGramModel:
    return default_model()


@given(st.text())
def test_tokens_joined_are_the_text(text):
    assert "".join(tokenise(text)) == text


def test_tokens_keep_the_blank_before_a_word():
    assert tokenise("Don't add 12345, my_x!\n") == [
        *("Don't", " add", " 123", "45", ",", " my", "_", "x", "!", "\n"),
    ]


@settings(deadline=None)
@given(
    st.sampled_from(CONTEXTS),
    st.lists(st.sampled_from(["Given", " a", " list", ".", " of", "?!"]), max_size=3),
    st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]),
    st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0]),
)
def test_every_distribution_sums_to_one(context, answer, temperature, top_p):
    table = default_model().distribution(context, answer, temperature=temperature, top_p=top_p)
    assert math.fsum(table.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(probability > 0 for probability in table.values())


def test_the_formula_of_the_module_is_what_the_model_computes():
    model = NGramModel(["the cat sat", "the cat ran", "the dog ran", "a cat sat on the cat"])
    # After "the cat": sat 1, ran 1, END 1; after "cat" alone: sat 2, ran 1, END 1. No topic in the prompt.
    got = model.distribution("", ["the", " cat"])
    assert got == pytest.approx(
        {
            " sat": 0.6 / 3 + 0.4 * 2 / 4,
            " ran": 0.6 / 3 + 0.4 / 4,
            END: 0.6 / 3 + 0.4 / 4,
        }
    )


def test_words_of_the_prompt_make_sentences_with_them_more_likely():
    model = NGramModel(["the cat sat", "the dog ran"])
    neutral = model.distribution("hello", ["the"])
    focused = model.distribution("what does a dog do", ["the"])
    assert neutral == pytest.approx({" cat": 0.5, " dog": 0.5})
    assert focused == pytest.approx({" cat": 1 / 8, " dog": 7 / 8})


def test_an_unknown_word_is_followed_by_a_new_sentence(model):
    openers = model.distribution("")
    assert model.distribution("zzyzx") == pytest.approx({f" {word}": p for word, p in openers.items()})


def test_a_line_break_begins_a_sentence_and_blanks_do_not_count(model):
    assert model.distribution("zzyzx\n") == model.distribution("")
    assert model.distribution("Given a  ") == model.distribution("Given a")


def test_first_tokens_are_spread_over_about_a_dozen_words(model):
    table = model.first_token_distribution(HELLO)
    assert 8 <= len(table) <= 16
    assert min(table.values()) > 0.01
    assert max(table.values()) < 0.3


def test_answers_are_short_and_their_lengths_differ(model):
    random = Random(5)
    lengths = [len(model.sample(flatten(HELLO), random).tokens) for _ in range(500)]
    mean = sum(lengths) / len(lengths)
    assert 15 <= mean <= 40
    assert math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths)) > 5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.8), (1.0, 0.4)])
def test_first_tokens_follow_the_known_distribution(model, temperature, top_p):
    shape = {"temperature": temperature, "top_p": top_p}
    expected = model.first_token_distribution(HELLO, **shape)
    random = Random(11)
    count = 4000
    seen = Counter(model.sample(flatten(HELLO), random, max_tokens=1, **shape).text for _ in range(count))
    assert set(seen) <= set(expected)
    result = chisquare([seen[token] for token in expected], [count * p for p in expected.values()])
    assert result.pvalue > 0.001


def test_log_probabilities_are_those_of_the_distribution_along_the_way(model):
    shape = {"temperature": 0.7, "top_p": 0.9}
    sample = model.sample("Given a list", Random(3), **shape)
    assert len(sample.tokens) > 3
    for place, (token, logprob, table) in enumerate(
        zip(sample.tokens, sample.logprobs, sample.tables, strict=True)
    ):
        expected = model.distribution("Given a list", sample.tokens[:place], **shape)
        assert dict(zip(table.tokens, table.probabilities, strict=True)) == expected
        assert logprob == math.log(expected[token])


def test_temperature_is_a_power_of_the_probabilities(model):
    plain = model.distribution("Given a")
    cold = model.distribution("Given a", temperature=0.5)
    total = math.fsum(p**2 for p in plain.values())
    assert cold == pytest.approx({token: p**2 / total for token, p in plain.items()})


def test_temperature_zero_is_the_most_probable_token(model):
    plain = model.distribution("Given a")
    assert model.distribution("Given a", temperature=0) == {max(plain, key=plain.__getitem__): 1.0}


def test_the_nucleus_is_the_fewest_top_tokens_that_reach_top_p():
    table = Table.of({"a": 5, "b": 3, "c": 2})
    assert table.shaped(1.0, 0.5).tokens == ("a",)
    assert table.shaped(1.0, 0.51).tokens == ("a", "b")
    assert table.shaped(1.0, 0.51).probabilities == pytest.approx((5 / 8, 3 / 8))
    assert table.shaped(1.0, 0.0).tokens == ("a",)


def test_a_tiny_temperature_neither_overflows_nor_divides_by_zero():
    assert Table.of({"a": 2, "b": 1}).shaped(1e-9, 1.0).probabilities == (1.0,)


def test_an_answer_ends_at_the_limit(model):
    sample = model.sample("", Random(1), max_tokens=3)
    assert (len(sample.tokens), sample.finish_reason, sample.stop) == (3, "length", None)


def test_an_answer_is_cut_before_the_first_stop_sequence(model):
    whole = model.sample("", Random(1))
    middle = whole.text[5:9]
    cut = model.sample("", Random(1), stop=["never to be found", middle])
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert (cut.finish_reason, cut.stop) == ("stop", middle)
    assert "".join(cut.tokens).startswith(cut.text)
    assert len("".join(cut.tokens[:-1])) < len(cut.text)
    assert len(cut.tokens) == len(cut.logprobs) == len(cut.tables)


def test_nonces_are_ignored_so_many_prompts_have_one_distribution(model):
    table = model.first_token_distribution(HELLO)
    for number in range(3):
        content = f"[nonce: {number}] {HELLO[0]['content']}"
        assert model.first_token_distribution([{"role": "user", "content": content}]) == table
    assert strip_nonces("a [nonce: x y]b [nonce:1]\nc") == "a b \nc"


def test_a_chat_is_one_line_per_message():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42"},
    ]
    assert flatten(messages) == (
        "system: Be brief.\nuser: Hi[image_url]\nassistant: f({})\ntool: 42\nassistant:\n"
    )
    assert flatten([{"role": "assistant", "content": "Given a"}]) == "assistant: Given a"


def test_the_order_in_which_prompts_come_changes_nothing():
    one, other = NGramModel(), NGramModel()
    first = one.distribution("about strings"), one.distribution("about lists")
    second = other.distribution("about lists"), other.distribution("about strings")
    assert first == second[::-1]


def test_more_prompts_than_it_remembers_change_nothing():
    model = NGramModel()
    before = model.distribution("about strings")
    for number in range(600):
        model.distribution(f"prompt {number}")
    assert model.distribution("about strings") == before


def test_a_seed_and_its_parts_decide_the_numbers():
    same = generator(1, "a", 0).random()
    assert generator(1, "a", 0).random() == same
    others = {generator(*parts).random() for parts in [(1, "a", 1), (1, "b", 0), (2, "a", 0), ("1", "a", 0)]}
    assert same not in others
    assert len(others) == 4


def test_another_process_draws_the_same_sample(model):
    code = (
        "from cachepipe.testing.ngram import default_model, generator;"
        "print(ascii(default_model().sample('sort words', generator(7, 'x'), temperature=0.9).logprobs))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    here = ascii(model.sample("sort words", generator(7, "x"), temperature=0.9).logprobs)
    assert outputs == {f"{here}\n"}


def test_token_ids_are_places_in_the_vocabulary(model):
    size = len(model.vocabulary)
    assert model.decode([0, size, 2 * size + 1]) == model.vocabulary[0] * 2 + model.vocabulary[1]


@pytest.mark.parametrize("dimensions", [1, 8, 256, 3072])
def test_an_embedding_has_length_one_and_depends_on_the_text_alone(dimensions):
    vector = embed("sort a list of words", dimensions)
    assert len(vector) == dimensions
    assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-6)
    assert vector == embed("sort a list of words", dimensions)


def test_texts_that_share_words_lie_closer_together():
    def likeness(one: str, other: str) -> float:
        return sum(a * b for a, b in zip(embed(one), embed(other), strict=True))

    assert likeness("sort a list of words", "sort a list of numbers") > 0.5
    assert likeness("sort a list of words", "prime factors") < 0.3


def test_a_text_without_words_still_has_an_embedding():
    assert list(embed("  ", 3)) == [1.0, 0.0, 0.0]


def test_a_model_needs_something_to_learn_from():
    with pytest.raises(ValueError, match="at least one sentence"):
        NGramModel([""])


def test_its_repr_tells_its_size():
    assert repr(NGramModel(["the cat"])) == "<NGramModel 1 sentences, 2 tokens>"
