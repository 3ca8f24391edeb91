"""The door between stages and models: what a model offers is declared, and looked up in one module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cachepipe
from cachepipe import AsyncBatcher, AsyncCacher, AsyncDeduplicator, MemoryStore, Request, Response
from cachepipe.adapting import Hooks, hooks_of
from cachepipe.stage import Stage
from cachepipe.typedefs import ModelHooks

DOOR = "adapting.py"


class Plain:
    """A model with nothing but ``request``."""

    async def request(self, request):
        return Response([request.prompt] * request.n)


def test_only_the_door_looks_up_what_a_model_offers():
    package = Path(cachepipe.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        if path != package / "sdk" / "internals.py"  # it looks up what SDKs have
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"getattr\(.*model|inspect\.signature", line)
    ]
    assert {place.partition(":")[0] for place in found} == {DOOR}


def test_every_hook_is_declared():
    declared = {name for name in vars(ModelHooks) if not name.startswith("_")}
    assert declared == {*Hooks._fields}
    assert set(ModelHooks.__annotations__) == {"max_n", "cut_n", "cache_scope", "model"}


def test_a_plain_model_and_a_stage_without_a_queue_have_the_defaults():
    assert set(hooks_of(Plain())) == {None}
    assert set(hooks_of(Stage(Plain()))) == {None}
    assert hooks_of(AsyncBatcher(Plain())).submit is not None


@pytest.mark.parametrize("name", Hooks._fields)
def test_a_hook_that_is_no_method_is_refused_when_a_stage_is_made(name):
    model = Plain()
    setattr(model, name, "yes")
    with pytest.raises(TypeError, match=rf"{name} of a model is a method .*'yes'"):
        hooks_of(model)


@pytest.mark.anyio
async def test_a_request_learns_which_call_it_has_become():
    """Alone it learns its indices; merged with others it makes the question of the call."""
    learned = []

    class Curious(Request):
        def placed(self, indices):
            learned.append((self.request_id, tuple(indices)))

        def merging(self, n):
            learned.append((self.request_id, n))
            return self.asking(n)

    async with AsyncDeduplicator(AsyncCacher(Plain(), MemoryStore(), scope="m")) as pipeline:
        await pipeline.request(Curious("q", n=2, request_id="a"))
        both = cachepipe.Batch([Curious("q", request_id=name) for name in "bc"])
        await pipeline.batch_request(both)
    assert learned == [("a", (0, 1)), ("b", 2)]
