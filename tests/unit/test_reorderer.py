"""The reorderer: the natural order of ids, and the batch's own order of answers."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import AsyncBatcher, Batch, BatchMismatch, Request, RequestReorderer, Response, StageClosed
from cachepipe.stages.reorderer import in_order, natural


class Batched:
    def __init__(self):
        self.batches = []

    async def batch_request(self, batch):
        self.batches.append([request.request_id for request in batch.requests])
        return [Response([request.prompt]) for request in batch.requests]


def ordered(*ids):
    return [ids[place] for place in in_order([Request("x", request_id=one) for one in ids])]


@pytest.mark.parametrize(
    "ids",
    [
        ["2", "10"],
        ["a2", "a10"],
        ["sth1", "sth2", "sth12"],
        ["1-2-3", "1-2-10", "1-10-1"],
        [None, "1"],
        ["", "0"],
        ["9", "a"],
        ["a", "a1", "ab"],
        ["x9y1", "x9y11", "x10y2"],
        ["1", str(10**30)],
    ],
    ids=repr,
)
def test_ids_are_in_natural_order_however_they_come(ids):
    for mixed in itertools.permutations(ids):
        assert ordered(*mixed) == ids


def test_equal_ids_keep_the_order_in_which_they_came():
    requests = [Request(str(i), request_id=one) for i, one in enumerate(["b", "a", "b", "a", None, ""])]
    assert [requests[place].prompt for place in in_order(requests)] == ["4", "5", "1", "3", "0", "2"]


@given(st.lists(st.none() | st.text(st.characters(exclude_categories=()), max_size=6), max_size=8))
def test_any_ids_can_be_ordered(ids):
    """Digits of other scripts, superscripts and lone surrogates included."""
    order = in_order([Request("x", request_id=one) for one in ids])
    assert sorted(order) == list(range(len(ids)))


@given(st.lists(st.text("0123456789ab²٣", max_size=5), max_size=6), st.randoms())
def test_the_order_does_not_depend_on_the_order_of_arrival(ids, random):
    mixed = list(ids)
    random.shuffle(mixed)
    assert ordered(*mixed) == ordered(*ids)


@pytest.mark.parametrize("digit", ["²", "٣", "①", "۴"])
def test_digits_of_other_scripts_are_text(digit):
    assert natural(digit) == ((1, 0, digit),)
    assert ordered(digit, "5") == ["5", digit]


def test_two_spellings_of_a_number_have_one_order():
    assert ordered("01", "1") == ordered("1", "01")


def test_the_model_sees_the_sorted_batch_and_callers_their_own_order():
    async def main():
        model = Batched()
        requests = [Request(f"p{one}", request_id=one) for one in ("10", "2", "1", "2")]
        answers = await RequestReorderer(model).batch_request(Batch(requests))
        assert model.batches == [["1", "2", "2", "10"]]
        assert [answer.data for answer in answers] == [["p10"], ["p2"], ["p1"], ["p2"]]

    asyncio.run(main())


def test_errors_stay_in_their_places():
    class Picky(Batched):
        async def batch_request(self, batch):
            answers = await super().batch_request(batch)
            return [KeyError(answer.data[0]) if answer.data == ["p2"] else answer for answer in answers]

    async def main():
        batch = Batch([Request(f"p{one}", request_id=one) for one in ("10", "2", "1")])
        stage = RequestReorderer(Picky())
        results = await stage.batch_request(batch, return_exceptions=True)
        assert [type(result) for result in results] == [Response, KeyError, Response]
        with pytest.raises(KeyError, match="p2"):
            await stage.batch_request(batch)

    asyncio.run(main())


def test_another_number_of_responses_is_an_error():
    class Short:
        async def batch_request(self, batch):
            return []

    async def main():
        with pytest.raises(BatchMismatch):
            await RequestReorderer(Short()).batch_request(Batch([Request("a"), Request("b")]))

    asyncio.run(main())


def test_it_fits_around_a_model_that_has_only_request():
    class Single:
        async def request(self, request):
            return Response([request.prompt] * request.n)

    async def main():
        stage = RequestReorderer(Single())
        assert (await stage.request(Request("a", n=2))).data == ["a", "a"]
        answers = await stage.batch_request(
            Batch([Request("a", request_id="2"), Request("b", request_id="1")])
        )
        assert [answer.data for answer in answers] == [["a"], ["b"]]

    asyncio.run(main())


def test_behind_a_batcher_it_sorts_each_batch():
    async def main():
        model = Batched()
        batcher = AsyncBatcher(RequestReorderer(model), 4, 60)
        ids = ["10", "9", "100", "1"]
        answers = await asyncio.gather(*(batcher.request(Request(one, request_id=one)) for one in ids))
        assert model.batches == [["1", "9", "10", "100"]]
        assert [answer.data for answer in answers] == [[one] for one in ids]

    asyncio.run(main())


def test_a_closed_one_says_so():
    async def main():
        stage = RequestReorderer(Batched())
        await stage.close()
        with pytest.raises(StageClosed):
            await stage.request(Request("a"))
        with pytest.raises(StageClosed):
            await stage.batch_request(Batch([]))

    asyncio.run(main())
