"""Billed, spent, as asked and saved: the sums of the contract's C6."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.accounting import (
    Account,
    Delivered,
    RunSums,
    Usage,
    by_model,
    noted,
    sold_in,
    usage_of,
    usage_sold,
)
from cachepipe.wire import CHAT, reported_cost

URL = "http://model/v1/chat/completions"


def call(prompt, completions, *, model="m", usage=True):
    """The usages of the samples of one call."""
    choices = [
        {"index": i, "message": {"content": "x"}, "finish_reason": "stop", "token_ids": [0] * tokens}
        for i, tokens in enumerate(completions)
    ]
    whole = sum(completions)
    used = {"prompt_tokens": prompt, "completion_tokens": whole, "total_tokens": prompt + whole}
    answer = {"model": model, "choices": choices, "usage": used if usage else None}
    return [usage_of(sample) for sample in CHAT.samples(answer)]


def deliver(*questions):
    """The sums of requests: per question the usages and the flags of its samples."""
    sums = Delivered()
    for usages, cached in questions:
        sums.add(usages, cached, URL)
    return sums


def totals(sums):
    return {name: account.counts()["total_tokens"] for name, account in sums.accounts().items()}


def test_c6_a_lone_request_saves_nothing_whatever_its_n():
    sums = deliver((call(12, [6, 6, 7, 5]), [False] * 4))
    assert totals(sums) == {"as_asked": 36, "billed": 36, "saved": 0}
    assert sums.saved.counts()["samples"] == 0


def test_c6_a_rerun_saves_what_it_replays_at_each_delivery():
    samples = call(10, [1, 2])
    sums = deliver((samples, [False, False]), (samples, [True, True]), (samples[1:], [True]))
    assert totals(sums) == {"as_asked": 13 + 13 + 12, "billed": 13, "saved": 25}


def test_c6_a_partial_hit_is_billed_for_the_new_samples_and_the_prompt_of_their_call():
    sums = deliver(([*call(10, [1, 2, 3]), *call(10, [4, 5])], [True] * 3 + [False] * 2))
    assert totals(sums) == {"as_asked": 25, "billed": 19, "saved": 6}


def test_c6_of_requests_that_share_a_call_one_is_billed_the_prompt():
    first, second, third = call(10, [1, 2, 3])
    sums = deliver(([first], [False]), ([second], [False]), ([third], [False]))
    assert totals(sums) == {"as_asked": 36, "billed": 16, "saved": 20}
    assert totals(deliver(([second], [False]))) == {"as_asked": 12, "billed": 2, "saved": 10}


def test_c6_a_request_that_takes_several_calls_costs_more_than_it_was_asked_for():
    sums = deliver(([*call(10, [1, 1]), *call(10, [1])], [False] * 3))
    assert totals(sums) == {"as_asked": 13, "billed": 23, "saved": -10}


def test_c6_what_reaches_no_request_is_spent():
    account = Account()
    account.spend(call(10, [1, 2, 3]), URL)
    account.spend(call(20, [4]), URL)
    assert account.counts()["total_tokens"] == 40
    assert account.counts()["samples"] == 4


@given(
    st.lists(st.tuples(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=4)), max_size=5)
)
def test_c6_what_calls_bring_is_billed_once_however_it_is_handed_out(calls):
    account, sums = Account(), Delivered()
    for prompt, completions in calls:
        usages = call(prompt, completions)
        account.spend(usages, URL)
        for usage in usages:
            sums.add([usage], [False], URL)
            sums.add([usage], [True], URL)
    assert sums.billed.counts() == account.counts()


def price(counts, model, url):
    return None if model == "free" else (counts["prompt_tokens"] + 2 * counts["completion_tokens"]) / 10


def test_c6_what_has_no_usage_or_price_is_counted_as_unknown():
    sums = deliver(
        (call(10, [1, 2]), [False, False]),
        (call(10, [5], model="free"), [False]),
        (call(10, [5], usage=False), [False]),
        (call(10, [5], usage=False), [True]),
    )
    billed = sums.billed.as_dict(price)
    assert (billed["total_tokens"], billed["samples"], billed["unknown"], billed["unpriced"]) == (28, 4, 1, 2)
    assert billed["cost"] == pytest.approx(1.6)
    saved = sums.saved.as_dict(price)
    assert (saved["samples"], saved["unknown"], saved["unpriced"]) == (1, 1, 1)
    assert saved["cost"] is None  # of the only sample that was saved nothing is known


@pytest.mark.parametrize(
    "usages", [call(1, [1], usage=False), call(1, [1], model="free")], ids=["usage", "price"]
)
def test_c6_unknown_is_never_nothing(usages):
    assert deliver((usages, [False])).billed.cost(price) == (None, 1)


def test_nothing_costs_nothing():
    assert Account().cost(price) == (0.0, 0)


def test_the_prompt_is_taken_from_the_first_sample_that_has_usage():
    sums = deliver(([*call(10, [1], usage=False), *call(10, [2, 3])], [True] * 3))
    assert totals(sums)["as_asked"] == 15


def test_prompt_tokens_that_the_provider_had_cached_count_once_as_well():
    answer = {
        "model": "m",
        "choices": [{"index": i, "message": {"content": "x"}, "finish_reason": "stop"} for i in range(2)],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }
    usages = [usage_of(sample) for sample in CHAT.samples(answer)]
    sums = deliver((usages, [False, False]))
    assert sums.billed.counts()["cached_tokens"] == sums.as_asked.counts()["cached_tokens"] == 8


# What a header says.


def in_header(sample, **more):
    return orjson.dumps({"id": "x", "stamp": 1, "request": '"sold":{}', **noted(sample, **more)})


def sample(**fields):
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return {"model": "m", "usage": usage, **fields}


@pytest.mark.parametrize(
    "fields",
    [{}, {"usage": None}, {"model": None}, {"model": 'a "sold":{"model":"b"}'}, {"model": "名前"}],
    ids=["usual", "no usage", "no model", "misleading", "not ASCII"],
)
def test_c6_a_header_tells_the_usage_of_its_sample(fields):
    assert usage_sold(sold_in(in_header(sample(**fields)))) == usage_of(sample(**fields))


def test_c6_of_samples_of_one_call_the_headers_tell_whose_prompt_was_billed():
    choices = [{"index": i, "message": {"content": "x"}, "finish_reason": "stop"} for i in range(3)]
    samples = CHAT.samples({**sample(), "choices": choices})
    assert [usage_sold(sold_in(in_header(each))).first for each in samples] == [True, False, False]


def test_a_header_tells_tier_fingerprint_and_an_url_beside_the_scope():
    header = in_header(sample(service_tier="flex", system_fingerprint="fp"), url="https://else/v1")
    assert orjson.loads(header)["tier"] == "flex"
    assert orjson.loads(header)["fingerprint"] == "fp"
    assert usage_sold(sold_in(header)).url == "https://else/v1"
    of_anthropic = sample(usage={"input_tokens": 1, "output_tokens": 2, "service_tier": "standard"})
    assert orjson.loads(in_header(of_anthropic))["tier"] == "standard"


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "\ud800"},
        {"model": "m" * 300},
        {"system_fingerprint": "\udfff"},
        {"service_tier": ["a"]},
        {"usage": {"prompt_tokens": 10**30, "completion_tokens": 1}},
        {"usage": {"prompt_tokens": -5, "completion_tokens": 1}},
        {"usage": {"total_tokens": True}},
        {"usage": "much"},
    ],
    ids=["surrogate", "long", "fingerprint", "tier", "large", "negative", "true", "text"],
)
def test_what_servers_say_beyond_reason_is_left_out_of_headers(fields):
    header = in_header(sample(**fields))
    usage = usage_sold(sold_in(header))
    assert (usage.model is None) == ("model" in fields)
    assert (usage.counts is None) == ("usage" in fields)


@pytest.mark.parametrize(
    "sold",
    [
        b"",
        b"{",
        b"[]",
        b'{"usage":[1]}',
        b'{"usage":[1,2,3,4,-5]}',
        b'{"usage":[99999999999999999999,0,0,0,0]}',
        b'{"usage":{"a":1}}',
        b'{"model":5,"url":1,"first":2}',
        b'{"nanos":-5}',
        b'{"nanos":"5"}',
        b'{"nanos":99999999999999999999}',
    ],
)
def test_c6_a_header_that_cannot_be_read_is_unknown_usage(sold):
    usage = usage_sold(sold)
    assert usage == Usage(None, None, first=True)


def test_sums_are_the_same_after_they_were_written():
    sums = deliver((call(10, [1, 2]), [False, True]), (call(10, [5], usage=False), [False]))
    again = RunSums.loads(RunSums(sums, notes=1).dumps()).delivered
    assert again.requests == sums.requests == 2
    assert {name: account.sold for name, account in again.accounts().items()} == {
        name: account.sold for name, account in sums.accounts().items()
    }


def test_c6_a_delivery_that_is_taken_back_is_in_no_sum():
    sums = deliver((call(10, [1, 2]), [False, True]))
    sums.add(call(10, [1, 2]), [False, True], URL, times=-1)
    assert set(totals(sums).values()) == {0}
    assert sums.requests == 0


def test_c6_what_is_delivered_several_times_is_asked_for_as_often():
    sums = deliver()
    sums.add(call(10, [1, 2]), [True, True], URL, times=3)
    assert totals(sums) == {"as_asked": 39, "billed": 0, "saved": 39}


HEADERS = st.sampled_from([None, "m", 'a ","usage":[1,2,3,4,5]}}']).flatmap(
    lambda model: st.builds(
        lambda usage, first, url: orjson.dumps(
            {
                "id": "x",
                "sold": {
                    name: value
                    for name, value in {"model": model, "url": url, "first": first, "usage": usage}.items()
                    if value is not None
                },
            }
        ),
        st.none()
        | st.lists(st.integers(0, 999), min_size=5, max_size=5)
        | st.lists(
            st.sampled_from([0, -1, 1 << 40, 1.5, True, None, "1", [1, 2], {"a": 1}]), min_size=4, max_size=6
        ),
        st.sampled_from([None, False]),
        st.sampled_from([None, URL]),
    )
) | st.sampled_from([b"", b"{}", b'{"id":"x"}', b'"sold":', b'{"sold":{"model":"m","usage":[1,2,3,4,5}}]}}'])


@given(st.lists(HEADERS, max_size=12))
def test_c6_hits_that_are_summed_together_give_the_sums_of_each(headers):
    together, alone = Delivered(), Delivered()
    together.add_hits(headers, URL)
    for header in headers:
        alone.add([usage_sold(sold_in(header))], [True], URL)
    assert together.requests == alone.requests
    assert together.as_asked.sold == alone.as_asked.sold


@given(st.lists(HEADERS, max_size=12))
def test_c6_samples_that_are_summed_together_are_spent_as_each_of_them(headers):
    together, alone = Account(), Account()
    together.add_all(headers, URL)
    alone.spend([usage_sold(sold_in(header)) for header in headers], URL)
    assert together.sold == alone.sold


def priced(cost, tokens=10, **usage):
    """A sample of a provider that says what it has cost."""
    counts = {"prompt_tokens": tokens, "completion_tokens": tokens, "total_tokens": 2 * tokens}
    return {"model": "m", "usage": {**counts, **usage, **({} if cost is None else {"cost": cost})}}


@pytest.mark.parametrize(
    ("usage", "nanos"),
    [
        ({"cost": 0.00014}, 140_000),  # OpenRouter
        ({"cost": 0}, 0),
        ({"cost": {"input_tokens_cost": 0.1, "total_cost": 0.25}}, 250_000_000),  # Perplexity
        ({"estimated_cost": 1e-6}, 1000),  # DeepInfra
        ({"cost_in_usd_ticks": 12345}, 1234),  # xAI
        ({"cost": None}, None),
        ({"cost": True}, None),
        ({"cost": -1}, None),
        ({"cost": float("nan")}, None),
        ({"cost": 1e300}, None),
        ({"cost": {"total_cost": "1"}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_a_provider_says_that_a_call_has_cost_is_read(usage, nanos):
    assert reported_cost(usage) == nanos


def test_c6_what_was_billed_counts_before_prices_of_tokens():
    def price(counts, model, url):
        assert (model, url) == ("m", URL)
        return 1.0 * counts["total_tokens"]

    usages = [usage_of(priced(cost)) for cost in (0.25, 0.5, None)]
    delivered = Delivered()
    delivered.add(usages, [False, True, False], URL)
    assert delivered.billed.cost(price) == (0.25 + 20.0, 0)
    assert delivered.as_asked.cost(price)[0] == pytest.approx(0.25 + 0.5 + 10.0)  # the prompt counts once
    assert delivered.as_asked.counts()["total_tokens"] == 40
    assert Account.loads(delivered.billed.dumps()).cost(price) == (20.25, 0)
    [row] = by_model({"spent": delivered.billed, "saved": delivered.saved}, price)
    assert (row["url"], row["spent"]["samples"], row["spent"]["cost"]) == (URL, 2, 20.25)
    assert row["saved"]["cost"] == pytest.approx(delivered.saved.cost(price)[0])
    headers = [
        orjson.dumps({"at": 1, **noted(priced(cost, tokens))})
        for cost, tokens in ((0.25, 10), (0.25, 30), (0.5, 10), (None, 10))
    ]
    account = Account()
    account.add_all(headers, URL)
    assert account.cost(price) == (1.0 + 20.0, 0)
    assert account.counts()["total_tokens"] == 120
