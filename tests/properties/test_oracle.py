"""The pipeline against a perfect model of the contract, one request after another.

The oracle below is written from the contract's text: dictionaries, sets and linear scans. It says for
every request which samples it gets, which of them are new, and what the model is asked for; the
pipeline has to agree in every detail, on every store.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cachepipe
from cachepipe import CacheMiss, OnlineAPI, Request
from cachepipe.stores.base import Discard
from cachepipe.testing.models import ScriptedError, ScriptedModel

SHARED = object()
NEW = object()


class Oracle:
    """C1 to C4, C6 and the modes for requests that come one after another."""

    def __init__(self):
        self.list = {}  # question -> {index: value}
        self.gone = set()  # (question, index) discarded on record
        self.ledger = {}  # draw -> indices; in the order in which draws were made
        self.taken = {}  # (namespace, question) -> indices
        self.uses = set()
        self.new_run()

    def new_run(self):
        self.asked = {}  # identity without occurrence -> how many requests
        self.claims = {}  # what replays have taken, in this run only

    def draw(self, namespace, question, request_id, repeat):
        if repeat == "same":
            return (SHARED, question, "", 0)
        identity = (namespace, question, request_id or "")
        return (*identity, self.asked.get(identity, 0))

    def count(self, draw):
        if draw[0] is not SHARED:
            self.asked[draw[:3]] = draw[3] + 1

    def earliest_other(self, draw):
        for other, indices in self.ledger.items():
            if other[1:] == draw[1:] and other[0] != draw[0] and other[0] is not SHARED:
                return indices if draw[0] is not SHARED else []
        return []

    def grant(self, draw, n, *, refresh=False, besides=()):
        """Return an index per position, and which of them have no sample yet."""
        question = draw[1]
        samples = self.list.setdefault(question, {})
        held = [] if refresh else self.ledger.get(draw, [])
        coupled = self.earliest_other(draw)
        taken = set(self.taken.get((draw[0], question), ())) | set(besides)
        result, missing = [], []
        for position in range(n):
            if position < len(held) and (question, held[position]) not in self.gone:
                result.append(held[position])
                continue
            free = [
                index
                for index in sorted(samples)
                if index not in taken and (question, index) not in self.gone
            ]
            if refresh or not free:
                index = next(i for i in range(10_000) if i not in samples and i not in taken)
                missing.append(index)
            elif position < len(coupled) and coupled[position] in free:
                index = coupled[position]
            else:
                index = free[0]
            taken.add(index)
            result.append(index)
        return result, missing

    def settle(self, draw, indices, fresh, *, refresh=False):
        """Note what a draw was given; ``fresh`` are the samples that the model made for it."""
        samples = self.list[draw[1]]
        samples.update(fresh)
        row = self.ledger.setdefault(draw, [])
        row[: None if refresh else len(indices)] = indices
        self.taken.setdefault((draw[0], draw[1]), set()).update(indices)

    def keep_extra(self, question, value):
        samples = self.list[question]
        samples[next(i for i in range(10_000) if i not in samples)] = value


NAMESPACES = [None, "", "a", "b"]
IDS = [None, "", "x", "y"]

asks = st.tuples(
    st.just("ask"),
    st.sampled_from(NAMESPACES),
    st.sampled_from("pq"),
    st.sampled_from(IDS),
    st.integers(1, 4),
    st.sampled_from(["read-write"] * 5 + ["refresh"] * 2 + ["bypass"]),
    st.sampled_from(["fresh"] * 3 + ["same"] * 2),
    st.sampled_from(["well"] * 4 + ["fails"] * 2 + ["generous"]),
)
discards = st.tuples(st.just("discard"), st.sampled_from("pq"), st.integers(0, 8))
looks = st.tuples(
    st.just("ask"),
    st.sampled_from(NAMESPACES),
    st.sampled_from("pq"),
    st.sampled_from(IDS),
    st.integers(1, 4),
    st.just("replay"),
    st.sampled_from(["fresh"] * 4 + ["same"]),
    st.just("well"),
)
programs = st.lists(
    st.tuples(
        st.booleans(),
        st.one_of(st.lists(st.one_of(asks, asks, asks, discards), max_size=12), st.lists(looks, max_size=6)),
    ),
    max_size=6,
)


class Bench:
    """A store, a model, the pipelines of all modes, and the oracle beside them."""

    def __init__(self, store):
        self.store = store
        self.oracle = Oracle()
        self.behaviour = "well"
        self.model = ScriptedModel(self.step, cache_scope="m")
        self.pipelines = {}

    def step(self, request):
        match self.behaviour:
            case "fails":
                return ScriptedError()
            case "generous":
                return request.n + 1
        return None

    def pipeline(self, mode, repeat):
        if (mode, repeat) not in self.pipelines:
            self.pipelines[mode, repeat] = OnlineAPI(self.model, self.store, mode=mode, repeat=repeat)
        return self.pipelines[mode, repeat]

    async def close(self):
        for pipeline in self.pipelines.values():
            await pipeline.close()
        self.pipelines.clear()

    async def play(self, program):
        for reopen, steps in program:
            self.oracle.new_run()
            if reopen:
                await self.close()
            with contextlib.nullcontext() if reopen else cachepipe.run():
                for kind, *step in steps:
                    await (self.ask(*step) if kind == "ask" else self.discard(*step))
        await self.close()

    async def ask(self, namespace, question, request_id, n, mode, repeat, behaviour):
        self.behaviour = behaviour
        pipeline = self.pipeline(mode, repeat)
        request = Request(question, n=n, request_id=request_id, namespace=namespace)
        before = len(self.model.calls)
        if mode == "bypass":
            await self.bypass(pipeline, request, before)
            return
        oracle = self.oracle
        draw = oracle.draw(namespace, question, request_id, repeat)
        besides = oracle.claims.setdefault((draw[0], question), set()) if mode == "replay" else ()
        indices, missing = oracle.grant(draw, n, refresh=mode == "refresh", besides=besides)
        if mode == "replay" and missing:
            with pytest.raises(CacheMiss):
                await pipeline.request(request)
            assert len(self.model.calls) == before
            return
        if missing and behaviour == "fails":
            with pytest.raises(ScriptedError):
                await pipeline.request(request)
            assert [call.n for call in self.model.calls[before:]] == [len(missing)]
            self.check_ledger()
            return
        response = await pipeline.request(request)
        calls = self.model.calls[before:]
        assert [call.n for call in calls] == [len(missing)][: len(missing)], "C4: n wanted less k at hand"
        brought = calls[0].samples if calls else []
        if mode == "replay":
            besides.update(indices if draw[0] is not SHARED else ())
        else:
            made = dict(zip(missing, brought, strict=False))
            oracle.settle(draw, indices, made, refresh=mode == "refresh")
            if len(brought) > len(missing):
                oracle.keep_extra(question, brought[-1])
            if repeat == "same":
                oracle.uses.add((question, namespace))
        oracle.count(draw)
        assert list(response.indices) == indices
        assert response.data == [oracle.list[question][index] for index in indices]
        assert response.cached == [index not in missing for index in indices]
        assert response.duplicated == [False] + [True] * (n - 1)

    async def bypass(self, pipeline, request, before):
        if self.behaviour == "fails":
            with pytest.raises(ScriptedError):
                await pipeline.request(request)
            return
        response = await pipeline.request(request)
        assert self.model.asked[before:] == [request.n]
        assert response.data == self.model.calls[-1].samples[: request.n]
        assert response.cached == [False] * request.n
        assert response.indices is None

    async def discard(self, question, which):
        oracle = self.oracle
        there = [index for index in oracle.list.get(question, {}) if (question, index) not in oracle.gone]
        if not there:
            return
        index = there[which % len(there)]
        key = self.pipeline("read-write", "fresh").key(Request(question))
        await self.store.apply([Discard(key, index, "the test says so")])
        oracle.gone.add((question, index))

    def check_ledger(self):
        names = {self.pipeline("read-write", "fresh").key(Request(question)): question for question in "pq"}
        found = {}
        for info in self.store.draws():
            written = info.draw.namespace
            namespace = SHARED if written == "*" else written[1:] if written.startswith("=") else None
            draw = (namespace, names[info.draw.key], info.draw.request_id, info.draw.occurrence)
            found[draw] = list(info.indices)
        assert found == self.oracle.ledger


def ask(n, mode, repeat, behaviour):
    return ("ask", None, "q", None, n, mode, repeat, behaviour)


FAILED_REPLACEMENT = [
    ask(1, "read-write", "fresh", "well"),
    ask(1, "refresh", "same", "well"),
    ("discard", "q", 1),
    ask(2, "read-write", "same", "fails"),
]


@given(program=programs)
@example(program=[(False, FAILED_REPLACEMENT)])
def test_every_request_gets_what_the_contract_says(new_store, program):
    """C1-C4, C6, C8 and the modes: the pipeline and the oracle never differ, nor do their ledgers."""
    store = new_store()

    async def main():
        bench = Bench(store)
        await bench.play(program)
        bench.check_ledger()
        await bench.close()

    try:
        asyncio.run(main())
    finally:
        store.close()
