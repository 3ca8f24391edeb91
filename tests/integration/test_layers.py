"""A writable cache above folders and bundles that are only read (C1, C2, C3)."""

from __future__ import annotations

import pytest

from cachepipe import CacheMiss, DiskStore, OnlineAPI, Request, Response, StoreError
from cachepipe.errors import LayerIgnored
from cachepipe.sharing import export, slices
from cachepipe.stores import open_store
from cachepipe.stores.verify import verify

pytestmark = pytest.mark.anyio


class Model:
    """Gives each sample a number of its own."""

    cache_scope = "model"
    numbers = iter(range(1_000_000))

    async def request(self, request):
        return Response([next(self.numbers) for _ in range(request.n)])


async def ask(cache, namespace, *prompts, n=2, **options):
    """The answers to some prompts, and how many samples were generated."""
    async with OnlineAPI(Model(), cache, **options) as pipeline:
        found = [await pipeline.request(Request(prompt, n=n, namespace=namespace)) for prompt in prompts]
    return [each.data for each in found], sum(not cached for each in found for cached in each.cached)


@pytest.fixture(params=["bundle", "folder"])
async def lower(request, tmp_path):
    """A cache that is only read, and its answers."""
    answers, _ = await ask(tmp_path / "paper", "paper", "a", "b")
    if request.param == "folder":
        return tmp_path / "paper", answers
    export(tmp_path / "paper", tmp_path / "paper.cachepipe")
    return tmp_path / "paper.cachepipe", answers


async def test_c2_draws_of_the_lower_layer_replay_and_new_samples_go_to_the_upper_one(lower, tmp_path):
    below, answers = lower
    layers = [tmp_path / "mine", below]
    assert await ask(layers, "paper", "b", "a") == (answers[::-1], 0)
    more, generated = await ask(layers, "paper", "a", n=3)
    assert (more[0][:2], generated) == (answers[0], 1)
    assert await ask(tmp_path / "mine", "paper", "a", n=3) == (more, 0)
    assert verify(tmp_path / "mine").problems == {}


async def test_c3_a_new_namespace_is_coupled_to_the_lower_layer_and_c1_holds_over_both(lower, tmp_path):
    below, answers = lower
    layers = [tmp_path / "mine", below]
    async with OnlineAPI(Model(), layers) as pipeline:
        first = await pipeline.request(Request("a", n=2, namespace="mine"))
        second = await pipeline.request(Request("a", n=2, namespace="mine"))
    assert (first.data, first.cached) == (answers[0], [True, True])
    assert second.cached == [False, False]
    assert not {*first.data} & {*second.data}
    assert await ask(layers, "other", "a", n=4) == ([first.data + second.data], 0)


async def test_a_lower_layer_is_not_changed(lower, tmp_path):
    below, _ = lower
    before = below.read_bytes() if below.is_file() else None
    await ask([tmp_path / "mine", below], "mine", "a", "c", n=5)
    if before is None:
        store = DiskStore(below, read_only=True)
        assert store.totals()["samples"] == 4
        store.close()
    else:
        assert below.read_bytes() == before


async def test_replay_reads_all_layers_and_writes_nothing(lower, tmp_path):
    below, answers = lower
    mine, _ = await ask(tmp_path / "mine", "mine", "c")
    layers = [tmp_path / "mine", below]
    assert await ask(layers, "paper", "a", "b", mode="replay") == (answers, 0)
    assert await ask(layers, "mine", "c", mode="replay") == (mine, 0)
    with pytest.raises(CacheMiss):
        await ask(layers, "paper", "a", n=3, mode="replay")
    store = DiskStore(tmp_path / "mine", read_only=True)
    assert store.totals()["keys"] == 1
    store.close()


async def test_a_bundle_alone_is_a_cache_that_is_only_read(lower):
    below, answers = lower
    if below.is_file():
        assert await ask(below, "paper", "a", "b", mode="replay") == (answers, 0)
        assert await ask(below, "paper", "b") == (answers[1:], 0)
        assert (await ask(below, "paper", "new"))[1] == 2


async def test_a_question_in_several_layers_has_all_their_samples(tmp_path):
    one, _ = await ask(tmp_path / "one", "one", "a")
    two, _ = await ask(tmp_path / "two", "two", "a")
    layers = [tmp_path / "mine", tmp_path / "one", tmp_path / "two"]
    found, generated = await ask(layers, "mine", "a", n=4)
    assert (sorted(found[0]), generated) == (sorted(one[0] + two[0]), 0)
    assert await ask(layers, "two", "a") == (two, 0)


async def test_a_layer_that_contradicts_the_upper_one_is_ignored_with_a_warning(lower, tmp_path):
    below, _ = lower
    mine, _ = await ask(tmp_path / "mine", "paper", "a")
    with pytest.warns(LayerIgnored, match="lower layer holds other samples"):
        found = await ask([tmp_path / "mine", below], "paper", "a", n=3)
    assert (found[0][0][:2], found[1]) == (mine[0], 1)


async def test_no_layers_and_missing_layers_are_errors(tmp_path):
    with pytest.raises(StoreError, match="at least one"):
        OnlineAPI(Model(), [])
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        OnlineAPI(Model(), [tmp_path / "mine", tmp_path / "paper.cachepipe"])
    with pytest.raises(StoreError, match="does not exist"):
        OnlineAPI(Model(), [tmp_path / "mine", tmp_path / "nothing"])


async def test_c12_what_a_replay_has_looked_at_is_bounded_and_read_again(lower, tmp_path, monkeypatch):
    monkeypatch.setattr("cachepipe.stores.layers._MOST", 20_000)
    below, answers = lower
    prompts = list(map(str, range(40)))
    more, _ = await ask(tmp_path / "more", "paper", *prompts)
    store, _ = open_store([below, tmp_path / "more"], read_only=True)
    for _ in range(2):
        assert await ask(store, "paper", *prompts, "b", "a", mode="replay") == (more + answers[::-1], 0)
        assert len([*store.keys()]) < 20
    assert len([*store.entries()]) == 42
    store.close()


async def test_experiments_see_all_layers_of_a_replay(lower, tmp_path):
    below, answers = lower
    more, _ = await ask(tmp_path / "more", "paper", "a", "c", n=1)
    store, _ = open_store([tmp_path / "nothing", below, tmp_path / "more"], read_only=True)
    found = [each.key for each in slices(store, ["paper"])]
    store.close()
    assert (len(found), found) == (3, sorted(found))
    assert more != answers
