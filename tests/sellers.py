"""A model that sells its samples: each tells the tokens that it has used."""

from __future__ import annotations

import asyncio

from cachepipe import Response
from cachepipe.accounting import noted
from cachepipe.values import Codec

PROMPT, COMPLETION = 10, 3


class Seller:
    """A model whose samples tell what they have used: 10 tokens of prompt a call, 3 of completion each."""

    cache_scope = "https://seller.example/v1/chat/completions"
    max_n = 8

    def __init__(self, gate=None, extra=0, storable=True, error=None):
        self.calls = 0
        self.gate = gate
        self.arrived = asyncio.Event()
        self.extra = extra
        self.storable = storable
        self.error = error

    async def request(self, request):
        self.calls += 1
        self.arrived.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Response([self.sample(place) for place in range(request.n + self.extra)])

    def sample(self, place):
        total = PROMPT + COMPLETION
        usage = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION, "total_tokens": total}
        return {"model": "m-1", "usage": usage, "call": self.calls, "place": place}

    def pack(self, sample):
        if not self.storable:
            raise TypeError("not storable")
        note = noted(sample)
        if sample["place"]:
            note["sold"]["first"] = False
        return Codec().encode(sample), note
