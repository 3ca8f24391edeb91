"""Costs: known, not known, and never an error."""

from __future__ import annotations

import pytest

from cachepipe import prices
from cachepipe.providers.presets import PRESETS

OPENAI = "https://api.openai.com/v1/chat/completions"
LOCAL = "http://127.0.0.1:8080/ns/suite/v1/chat/completions"
COUNTS = {"prompt_tokens": 1000, "cached_tokens": 0, "completion_tokens": 1000}


def test_tokens_cost_what_the_table_says_and_cached_ones_less():
    cost = prices.cost_of(COUNTS, "gpt-4o-mini", OPENAI)
    assert cost == pytest.approx(0.00075)  # 0.15 and 0.60 dollars for a million
    assert 0 < prices.cost_of({**COUNTS, "cached_tokens": 500}, "gpt-4o-mini", OPENAI) < cost


def test_a_batch_costs_half_whoever_gives_the_price():
    batches = "https://api.openai.com/v1/batches"
    given = prices.Prices({"mine": {"prompt": 1, "completion": 3}})
    for model in ("gpt-4o-mini", "mine"):
        for cost in (given.cost_of, given.cost_of_sum):
            assert cost(COUNTS, model, batches) == pytest.approx(cost(COUNTS, model, OPENAI) / 2)
    assert given.cost_of(COUNTS, "no such model", batches) is None


@pytest.mark.parametrize(
    ("counts", "model", "url"),
    [
        (COUNTS, "no such model", OPENAI),
        (COUNTS, None, OPENAI),
        (COUNTS, "", OPENAI),
        (COUNTS, 5, OPENAI),
        (COUNTS, "llama3", LOCAL),
        (COUNTS, "my-gpt-4o", LOCAL),
        (COUNTS, "gpt-4o-mini-mine", LOCAL),
        (COUNTS, "nobody/gpt-4o-mini", LOCAL),
        (COUNTS, "openai/gpt-99", LOCAL),
        (COUNTS, "gpt-oss-20b", LOCAL),  # anyone can serve it, at any price
        (COUNTS, "openai/gpt-oss-120b", LOCAL),
        (COUNTS, "meta-llama/llama-3.3-70b-instruct", LOCAL),
        (COUNTS, "mixtral-8x7b", LOCAL),
        (COUNTS, "gpt-4o-mini", "https://api.together.xyz/v1/chat/completions"),
        ({**COUNTS, "prompt_tokens": -1}, "gpt-4o-mini", OPENAI),
        ({**COUNTS, "cached_tokens": 2000}, "gpt-4o-mini", OPENAI),
    ],
    ids=str,
)
def test_what_cannot_be_priced_is_not_known(counts, model, url):
    """Whatever a server tells: the answer that was paid for can be read all the same."""
    assert prices.cost_of(counts, model, url) is None


@pytest.mark.parametrize("url", [LOCAL, "https://gateway.example/v1/chat/completions"])
@pytest.mark.parametrize(
    ("model", "cost"),
    [
        ("gpt-4o-mini", 0.00075),
        ("gpt-4o-mini-2024-07-18", 0.00075),
        ("openai/gpt-4o-mini", 0.00075),
        ("openrouter/openai/gpt-4o-mini", 0.00075),
        ("anthropic/claude-sonnet-4.5", 0.018),
        ("claude-sonnet-4-5-20250929", 0.018),
        ("gemini/gemini-2.5-flash", 0.0028),
        ("text-embedding-3-small", 0.00002),
    ],
)
def test_behind_another_host_a_provider_s_name_of_a_model_tells_its_price(model, cost, url):
    assert prices.cost_of(COUNTS, model, url) == pytest.approx(cost)


SOLD = {
    "OpenAI": "gpt-4o-mini",
    "Anthropic": "claude-sonnet-4-5",
    "Gemini": "gemini-2.5-flash",
    "Together": "meta-llama/Llama-3.3-70B-Instruct-Turbo",
    "Groq": "llama-3.3-70b-versatile",
    "OpenRouter": "openai/gpt-4o-mini",
    "Cerebras": "llama-3.3-70b",
    "DeepSeek": "deepseek-chat",
    "Fireworks": "accounts/fireworks/models/deepseek-v3p2",
    "Mistral": "mistral-small-latest",
    "Moonshot": "kimi-k2-0905-preview",
    "Perplexity": "sonar",
    "XAI": "grok-3",
}
"""A model of each provider whose prices the table has."""


@pytest.mark.parametrize("name", SOLD)
def test_the_prices_of_a_provider_are_known_at_its_url(name):
    path = {"Anthropic": "messages", "Gemini": f"v1beta/models/{SOLD[name]}:generateContent"}
    url = f"{PRESETS[name].url}/{path.get(name, 'chat/completions')}"
    assert prices.cost_of(COUNTS, SOLD[name], url) > 0


def test_a_date_that_the_table_does_not_list_changes_no_price():
    dated = prices.cost_of(COUNTS, "gpt-5-mini-2031-01-01", OPENAI)
    assert dated == prices.cost_of(COUNTS, "gpt-5-mini", OPENAI) > 0


def test_the_name_of_a_host_that_serves_anyone_s_models_is_known_by_its_url_only():
    assert prices.cost_of(COUNTS, "openai/gpt-oss-20b", "https://openrouter.ai/api/v1/chat/completions") > 0


def test_many_calls_cost_what_small_ones_do_however_long_the_sum_is():
    """A provider that charges more for long prompts does so by calls."""
    counts = {"prompt_tokens": 1_000, "cached_tokens": 0, "completion_tokens": 1_000}
    thousand = {name: 1000 * count for name, count in counts.items()}
    one = prices.cost_of(counts, "claude-sonnet-4-5", OPENAI.replace("openai", "anthropic"))
    assert prices.cost_of_sum(thousand, "claude-sonnet-4-5", LOCAL) == pytest.approx(1000 * one)
    less = {name: -count for name, count in counts.items()}
    assert prices.cost_of_sum(less, "claude-sonnet-4-5", LOCAL) == pytest.approx(-one)
    assert prices.cost_of_sum(counts, "made-up", LOCAL) is None


def test_without_the_table_nothing_is_known(monkeypatch):
    monkeypatch.setattr(prices, "_table", lambda: None)
    prices.unit_prices.cache_clear()
    assert prices.cost_of_sum(COUNTS, "gpt-4o-mini", OPENAI) is None
    prices.unit_prices.cache_clear()
    assert prices.cost_of(COUNTS, "gpt-4o-mini", OPENAI) is None


def test_given_prices_come_before_the_table():
    given = prices.Prices({"mine": {"prompt": 1, "cached": 0.5, "completion": 2, "max_tokens": 100}})
    counts = {"prompt_tokens": 1_000_000, "cached_tokens": 500_000, "completion_tokens": 1_000_000}
    assert given.cost_of_sum(counts, "mine", LOCAL) == pytest.approx(2.75)
    assert given.cost_of_sum(counts, "mine-2026-01-02", LOCAL) == pytest.approx(2.75)
    assert given.max_tokens("mine", LOCAL) == 100
    assert given.cost_of_sum(COUNTS, "gpt-4o-mini", OPENAI) == pytest.approx(0.00075)
    assert given.max_tokens("gpt-4o-mini", OPENAI) == 128_000
    assert given.cost_of_sum(COUNTS, "theirs", LOCAL) is None
    assert given.max_tokens("theirs", LOCAL) is None
    assert given.max_tokens(None, LOCAL) is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ('{"m": 3}', "prompt, cached, completion, max_tokens"),
        ('{"m": {"input": 3}}', "prompt, cached, completion, max_tokens"),
        ('{"m": {"prompt": -1}}', "prompt is a number, at least 0; got -1"),
        ('{"m": {"prompt": true}}', "prompt is a number"),
        ('{"m": {"completion": 1}}', "lack the price of the prompt"),
    ],
)
def test_a_file_of_prices_that_is_not_valid_is_refused_in_a_sentence(tmp_path, written, said):
    path = tmp_path / "prices.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(prices.BadPrices, match=said):
        prices.Prices.load(path)


@pytest.mark.parametrize(
    ("name", "model"),
    {
        "Cerebras": "gpt-oss-120b",
        "DeepSeek": "deepseek-chat",
        "Groq": "llama-3.3-70b-versatile",
        "Mistral": "mistral-small-latest",
        "Moonshot": "kimi-k2-0905-preview",
        "OpenRouter": "openai/gpt-4o-mini",
        "Perplexity": "sonar",
        "XAI": "grok-4",
    }.items(),
)
def test_the_table_of_prices_knows_what_a_provider_sells(name, model):
    assert prices.unit_prices(model, f"{PRESETS[name].url}/chat/completions").completion > 0
