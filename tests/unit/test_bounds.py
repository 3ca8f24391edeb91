"""How much one request may ask for, on every surface, before anything is made for it."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from cachepipe import Request, wire
from cachepipe.bounds import check_n, max_answer, max_n
from cachepipe.errors import CachepipeError, TooManySamples


@pytest.mark.parametrize(
    "n", [10_001, 2**31, 10**9, 10**30, 10**6000], ids=lambda n: f"{n.bit_length()} bits"
)
def test_a_request_for_too_many_samples_is_refused_in_a_sentence(n):
    tracemalloc.start()
    try:
        with pytest.raises(
            TooManySamples, match=r"at most 10000 samples; got n = .* CACHEPIPE_MAX_N"
        ) as error:
            Request("q", n=n)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 300
    assert isinstance(error.value, ValueError)


def test_the_bound_is_the_environments(monkeypatch):
    assert Request("q", n=10_000).n == 10_000
    monkeypatch.setenv("CACHEPIPE_MAX_N", "3")
    assert Request("q", n=3).n == 3
    with pytest.raises(TooManySamples, match="at most 3 samples; got n = 4"):
        Request("q", n=4)
    monkeypatch.setenv("CACHEPIPE_MAX_N", "20000")
    assert Request("q", n=20_000).n == 20_000
    monkeypatch.setenv("CACHEPIPE_MAX_ANSWER", "2")
    assert max_answer() == 2 << 20


@pytest.mark.parametrize("text", ["0", "-1", "many", "1e3", "\u0663", "9" * 20, " 5"])
def test_a_bound_that_is_no_number_is_an_error(monkeypatch, text):
    monkeypatch.setenv("CACHEPIPE_MAX_N", text)
    with pytest.raises(CachepipeError, match="CACHEPIPE_MAX_N is a whole number above 0"):
        max_n()


def test_prompts_count_once_for_each_of_their_samples_but_one_of_each_is_never_too_much():
    check_n(100, prompts=100)
    check_n(1, prompts=1_000_000)
    with pytest.raises(TooManySamples, match="n = 101 for each of 100 prompts"):
        check_n(101, prompts=100)


def test_merging_the_needs_of_many_is_no_request_of_its_own():
    assert Request("q", n=9000).asking(90_000).n == 90_000


LISTS = [
    (wire.EMBEDDINGS, {"model": "m", "input": ["a"] * 10_001}),
    (wire.EMBEDDINGS, {"model": "m", "input": ["a"] * 5000, "filler": "x" * 10_000}),
    (wire.MODERATIONS, {"input": ["a"] * 5000, **{f"f{number}": number for number in range(5000)}}),
    (wire.COMPLETIONS, {"model": "m", "prompt": [[1]] * 8000, "logit_bias": {"1": list(range(1000))}}),
]


@pytest.mark.parametrize(("api", "body"), LISTS)
def test_c12_a_long_list_with_much_around_it_is_not_copied_for_each_item(api, body):
    tracemalloc.start()
    try:
        asks = api.split(body)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert [ask.cacheable for ask in asks] == [False]
    assert "lists too much" in asks[0].reason


def test_usual_lists_are_questions_of_their_own():
    assert len(wire.EMBEDDINGS.split({"model": "m", "input": ["a"] * 10_000, "dimensions": 256})) == 10_000
    assert len(wire.COMPLETIONS.split({"model": "m", "prompt": ["a"] * 1000, "stop": ["x" * 1000]})) == 1000
    assert wire.COMPLETIONS.split({"model": "m", "prompt": "a", "suffix": "x" * (20 << 20)})[0].cacheable


def test_a_claim_of_many_samples_does_not_hold_up_the_loop(tmp_path):
    """It is made in the store's thread; a turn of the loop comes round meanwhile."""
    from cachepipe import OnlineAPI  # noqa: PLC0415 - only here
    from cachepipe.testing import ScriptedModel  # noqa: PLC0415 - likewise

    async def run():
        turns = 0
        async with OnlineAPI(ScriptedModel(), tmp_path) as pipeline:
            for _ in range(2):
                task = asyncio.ensure_future(pipeline.request(Request("q", n=5000, request_id=str(turns))))
                while not task.done():
                    turns += 1
                    await asyncio.sleep(0)
                assert len((await task).data) == 5000
        return turns

    assert asyncio.run(run()) > 20
