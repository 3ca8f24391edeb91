"""The write queue of an event loop, on a store that a test stands in for."""

from __future__ import annotations

import asyncio

import pytest

from cachepipe.cache.write_queue import WriteQueue
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import Question
from cachepipe.errors import StoreUnreachable
from cachepipe.stores.base import Claim

pytestmark = pytest.mark.anyio


class Crowded:
    """A line in which answers wait for claims."""

    is_crowded = True


class Away:
    """A store that does not answer; it has been waited for."""

    def __init__(self):
        self.applied = []

    def apply_now(self, _operations):
        return None

    def recall(self, _draw, _n):
        return None

    def look(self, _claims, *, urgent):
        looked = asyncio.get_running_loop().create_future()
        looked.set_exception(StoreUnreachable("the store has not answered for 30 s"))
        return looked

    def apply(self, operations):
        self.applied += operations
        return asyncio.get_running_loop().create_future()


async def test_a_store_that_does_not_answer_a_look_is_not_waited_for_once_more():
    store, told = Away(), asyncio.get_running_loop().create_future()
    queue = WriteQueue(asyncio.get_running_loop(), store, None, None, Crowded())
    claim = Claim(Draw(label(None), "k", "", 0), 1, Question("k", None, b"{}"), "t")
    queue.put(claim, told.set_result, lacking=lambda: None)
    async with asyncio.timeout(20):
        assert isinstance(await told, StoreUnreachable)
    assert store.applied == []
    assert not queue.writes
