"""Batch files that are edited at random and run again: what each run costs, per question."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import tempfile
from importlib import import_module
from pathlib import Path

import openai
import orjson
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import MemoryStore
from cachepipe.batch import run_file

# The HTTP library that the SDK is built on: httpx2, or httpx before its third version.
http = import_module(
    type(openai.AsyncOpenAI(base_url="http://m", api_key="k").base_url).__module__.partition(".")[0]
)
N = {"a": 1, "b": 2, "c": 3, "d": 1}
"""The prompts, and how many samples a line with each of them wants."""


class Client(openai.AsyncOpenAI):
    """The SDK's client, its calls answered here; it counts the samples of each prompt."""

    def __init__(self):
        super().__init__(base_url="http://model/v1", api_key="k", http_client=http.AsyncClient())
        self.made = collections.Counter()
        self.failing = frozenset()

    async def post(self, path, *, cast_to, body, options=None):
        prompt, n = body["messages"][0]["content"], body.get("n", 1)
        await asyncio.sleep(0)
        if prompt in self.failing:
            raise openai.APIConnectionError(request=http.Request("POST", "http://model/v1"))
        self.made[prompt] += n
        choices = [
            {"index": i, "message": {"role": "assistant", "content": prompt}, "finish_reason": "stop"}
            for i in range(n)
        ]
        return cast_to(200, content=orjson.dumps({"model": "m", "choices": choices}))


prompts = st.sampled_from(sorted(N))
places = st.integers(0, 20)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), places, prompts),
        st.tuples(st.just("delete"), places, st.none()),
        st.tuples(st.just("move"), places, places),
        st.tuples(st.just("copy"), places, places),
        st.tuples(st.just("change"), places, prompts),
        st.tuples(st.just("renumber"), st.none(), st.sampled_from(["running", "random", "none"])),
    ),
    max_size=4,
)


def edited(lines, edit, ids):
    """Return lines after an edit; a line is its prompt and its id."""
    kind, place, what = edit
    lines = list(lines)
    at = None if place is None else place % (len(lines) + 1)
    if kind == "insert":
        lines.insert(at, (what, None))
    elif kind == "renumber":
        names = {
            "running": [str(number) for number in range(len(lines))],
            "random": [f"id {ids.random()}" for _ in lines],
            "none": [None] * len(lines),
        }[what]
        lines = [(prompt, name) for (prompt, _), name in zip(lines, names, strict=True)]
    elif at < len(lines):
        prompt, name = lines[at]
        if kind != "copy":
            del lines[at]
        if kind == "move":
            lines.insert(what % (len(lines) + 1), (prompt, name))
        elif kind == "copy":
            lines.insert(what % (len(lines) + 1), (prompt, None))
        elif kind == "change":
            lines.insert(at, (what, name))
    return lines


async def _run(client, store, folder, lines, **options):
    """Run the lines, whose ids are made unique; return how many samples of each prompt were generated."""
    seen = set()
    with (folder / "in.jsonl").open("w") as file:
        for number, (prompt, name) in enumerate(lines, 1):
            fields = {"prompt": prompt, "n": N[prompt]}
            if name is not None and name not in seen:
                fields["custom_id"] = name
            else:
                fields["custom_id"] = f"line {number} of {len(lines)}"
            seen.add(fields["custom_id"])
            file.write(json.dumps(fields) + "\n")
    client.made.clear()
    await run_file(
        folder / "in.jsonl", folder / "out.jsonl", client=client, model="m", cache=store, **options
    )
    return dict(client.made)


@given(
    st.lists(prompts, max_size=8),
    st.lists(st.tuples(edits, st.sets(prompts, max_size=1), st.integers(1, 5), st.booleans()), max_size=5),
    st.integers(),
)
def test_c4_edits_of_a_file_cost_what_it_now_draws_beyond_the_list(first, rounds, seed):
    """Also after runs in which calls fail, in another namespace, and whatever the concurrency."""
    ids = random.Random(seed)

    async def play():
        store, listed = MemoryStore(), collections.Counter()
        lines = [(prompt, None) for prompt in first]
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            async with Client() as client:
                for changes, failing, concurrency, elsewhere in [([], (), 3, False), *rounds]:
                    for change in changes:
                        lines = edited(lines, change, ids)
                    options = {
                        "concurrency": concurrency,
                        "namespace": f"ns {ids.random()}" if elsewhere else "a",
                    }
                    client.failing = frozenset(failing)
                    if failing:
                        listed.update(await _run(client, store, folder, lines, **options))
                        client.failing = frozenset()
                    drawn = collections.Counter()
                    for prompt, _ in lines:
                        drawn[prompt] += N[prompt]
                    expected = {
                        prompt: drawn[prompt] - listed[prompt]
                        for prompt in drawn
                        if drawn[prompt] > listed[prompt]
                    }
                    assert await _run(client, store, folder, lines, **options) == expected
                    listed.update(expected)

    asyncio.run(play())


@given(
    st.lists(st.tuples(prompts, st.integers(1, 4)), min_size=1, max_size=6), st.randoms(use_true_random=False)
)
def test_c4_lines_of_any_n_cost_a_new_namespace_only_what_the_list_lacks(lines, shuffled):
    """Within one namespace a draw keeps the samples that it has, also when its line asks for fewer."""

    async def play():
        store, listed = MemoryStore(), collections.Counter()
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            async with Client() as client:
                for namespace in "abc":
                    mine = [(prompt, shuffled.choice([n, n + 1])) for prompt, n in lines]
                    shuffled.shuffle(mine)
                    (folder / "in.jsonl").write_text(
                        "".join(json.dumps({"prompt": prompt, "n": n}) + "\n" for prompt, n in mine)
                    )
                    client.made.clear()
                    await run_file(
                        folder / "in.jsonl",
                        folder / "out.jsonl",
                        client=client,
                        model="m",
                        cache=store,
                        namespace=namespace,
                    )
                    drawn = collections.Counter()
                    for prompt, n in mine:
                        drawn[prompt] += n
                    assert client.made == drawn - listed
                    listed |= drawn

    asyncio.run(play())
