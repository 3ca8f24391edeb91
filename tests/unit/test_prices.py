"""Costs: known, not known, and never an error."""

from __future__ import annotations

import pytest

from cachepipe import prices

OPENAI = "https://api.openai.com/v1/chat/completions"
COUNTS = {"prompt_tokens": 1000, "cached_tokens": 0, "completion_tokens": 1000}


def test_tokens_cost_what_the_table_says_and_cached_ones_less():
    cost = prices.cost_of(COUNTS, "gpt-4o-mini", OPENAI)
    assert cost == pytest.approx(0.00075)  # 0.15 and 0.60 dollars for a million
    assert 0 < prices.cost_of({**COUNTS, "cached_tokens": 500}, "gpt-4o-mini", OPENAI) < cost


@pytest.mark.parametrize(
    ("counts", "model", "url"),
    [
        (COUNTS, "no such model", OPENAI),
        (COUNTS, None, OPENAI),
        (COUNTS, "", OPENAI),
        (COUNTS, 5, OPENAI),
        (COUNTS, "gpt-4o-mini", "http://127.0.0.1:8000/v1"),
        ({**COUNTS, "prompt_tokens": -1}, "gpt-4o-mini", OPENAI),
        ({**COUNTS, "cached_tokens": 2000}, "gpt-4o-mini", OPENAI),
    ],
    ids=str,
)
def test_what_cannot_be_priced_is_not_known(counts, model, url):
    """Whatever a server tells: the answer that was paid for can be read all the same."""
    assert prices.cost_of(counts, model, url) is None


def test_without_the_table_nothing_is_known(monkeypatch):
    monkeypatch.setattr(prices, "_table", lambda: None)
    assert prices.cost_of(COUNTS, "gpt-4o-mini", OPENAI) is None
