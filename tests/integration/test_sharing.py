"""Bundles, merges and copies both ways, between stores of every kind."""

from __future__ import annotations

import json
import sys

import forked
import pytest

from cachepipe import (
    BundleError,
    DiskStore,
    ImportRefused,
    MemoryStore,
    OnlineAPI,
    Request,
    Response,
    StoreError,
)
from cachepipe.errors import SecretsFound
from cachepipe.sharing import export, import_, merge, sync
from cachepipe.stores.base import Adopt, Claim, Commit
from cachepipe.stores.bundles.reader import Bundle
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.transaction import SqlLedger
from cachepipe.stores.verify import verify
from cachepipe.testing import MemoryEngine
from cachepipe.testing.contract import KEY, asked, drawn

pytestmark = pytest.mark.anyio


class Model:
    """Gives each sample a number of its own."""

    cache_scope = "model"
    numbers = iter(range(1_000_000))

    def __init__(self, say="answer"):
        self.say, self.calls = say, 0

    async def request(self, request):
        self.calls += 1
        return Response([f"{self.say} {next(self.numbers)}" for _ in range(request.n)])


async def ask(cache, namespace, *prompts, n=2, model=None, **options):
    """The answers to some prompts, and how many calls they took."""
    model = model or Model()
    async with OnlineAPI(model, cache, **options) as pipeline:
        requests = [Request(prompt, n=n, namespace=namespace) for prompt in prompts]
        found = [(await pipeline.request(request)).data for request in requests]
    return found, model.calls


@pytest.fixture(params=["memory", "disk", "remote"])
def new(request, tmp_path):
    """A function that opens a new store."""
    made = []

    def make():
        kind = request.param
        if kind == "memory":
            made.append(MemoryStore())
        elif kind == "disk":
            made.append(DiskStore(tmp_path / f"store {len(made)}"))
        else:
            made.append(RemoteStore(Session(MemoryEngine(), renews=False)))
        return made[-1]

    yield make
    for store in made:
        store.close()


async def test_an_exported_namespace_replays_from_another_cache(new, tmp_path):
    one, other = new(), new()
    first = await ask(one, "run-1", "a", "b")
    await ask(one, "run-2", "a", "c", n=3)
    manifest = export(one, tmp_path / "x.cachepipe", namespaces=["run-1"])
    assert manifest.counts == {"questions": 2, "samples": 4, "discarded": 0, "draws": 2}
    counts = import_(tmp_path / "x.cachepipe", other)
    assert (counts.new, counts.samples, counts.draws) == (2, 4, 2)
    assert await ask(other, "run-1", "b", "a") == (first[0][::-1], 0)
    again = import_(tmp_path / "x.cachepipe", other)
    assert (again.same, again.samples, again.draws) == (2, 0, 0)


async def test_the_same_slice_gives_the_same_bytes_from_every_cache(new, tmp_path):
    one, memory, disk = new(), MemoryStore(), tmp_path / "folder"
    await ask(one, "run-1", *map(str, range(20)))
    await ask(one, None, "1", n=1)
    export(one, tmp_path / "a.cachepipe")
    import_(tmp_path / "a.cachepipe", memory)
    import_(tmp_path / "a.cachepipe", disk)
    for number, (cache, names) in enumerate([(memory, None), (disk, None), (one, ["run-1", None])]):
        export(cache, tmp_path / f"{number}.cachepipe", namespaces=names)
    content = (tmp_path / "a.cachepipe").read_bytes()
    assert content == (tmp_path / "0.cachepipe").read_bytes() == (tmp_path / "1.cachepipe").read_bytes()
    slices = [Bundle(tmp_path / name) for name in ("a.cachepipe", "2.cachepipe")]
    assert len({bundle.manifest.content for bundle in slices}) == 1
    for bundle in slices:
        bundle.close()
    memory.close()


async def test_two_caches_merged_in_either_order_export_the_same_bytes_and_replay_both(new, tmp_path):
    one, other = new(), new()
    mine = await ask(one, "mine", "a", "b")
    theirs = await ask(other, "theirs", "b", "c")
    for number, caches in enumerate(([one, other], [other, one])):
        folder = tmp_path / f"merged {number}"
        counts = merge(caches, folder)
        assert (counts.questions, counts.samples) == (3, 8)
        assert await ask(folder, "mine", "b", "a") == (mine[0][::-1], 0)
        assert await ask(folder, "theirs", "b", "c") == (theirs[0], 0)
        assert verify(folder).problems == {}
        export(folder, tmp_path / f"{number}.cachepipe")
    assert (tmp_path / "0.cachepipe").read_bytes() == (tmp_path / "1.cachepipe").read_bytes()


async def test_c2_draws_with_other_samples_are_refused_and_nothing_is_changed(new, tmp_path):
    one, other = new(), new()
    await ask(one, "run", "a", "b")
    before = await ask(other, "run", "b")
    export(one, tmp_path / "x.cachepipe")
    with pytest.raises(ImportRefused, match=r"nothing was changed.*namespace 'run' drew other samples"):
        import_(tmp_path / "x.cachepipe", other)
    assert other.totals()["samples"] == 2
    counts = import_(tmp_path / "x.cachepipe", other, scope="their model")
    assert counts.new == 2
    assert await ask(other, "run", "b") == (before[0], 0)


async def test_one_scope_of_several_can_be_changed(tmp_path):
    first = await ask(tmp_path / "a", "run", "a")
    export(tmp_path / "a", tmp_path / "x.cachepipe")
    import_(tmp_path / "x.cachepipe", tmp_path / "b", scope={"model": "served", "other": "none"})

    class Served(Model):
        cache_scope = "served"

    assert await ask(tmp_path / "b", "run", "a", model=Served()) == (first[0], 0)


async def test_caches_that_are_synchronised_hold_the_same(new, tmp_path):
    one, other = new(), DiskStore(tmp_path / "other")
    mine = await ask(one, "mine", "a", "b")
    theirs = await ask(other, "theirs", "b", "c")
    here, there = sync(one, other)
    assert (here.samples, there.samples) == (4, 4)
    for cache in (one, other):
        assert await ask(cache, "mine", "a", "b") == (mine[0], 0)
        assert await ask(cache, "theirs", "b", "c") == (theirs[0], 0)
    longer = await ask(other, "mine", "a", n=4)
    sync(one, other)
    assert await ask(one, "mine", "a", n=4) == (longer[0], 0)
    export(one, tmp_path / "one.cachepipe")
    export(other, tmp_path / "other.cachepipe")
    assert (tmp_path / "one.cachepipe").read_bytes() == (tmp_path / "other.cachepipe").read_bytes()
    other.close()


async def test_a_shared_draw_replays_for_the_namespaces_that_used_it(tmp_path):
    first = await ask(tmp_path / "a", "run", "a", repeat="same")
    await ask(tmp_path / "a", "other", "b", repeat="same")
    manifest = export(tmp_path / "a", tmp_path / "x.cachepipe", namespaces=["run"])
    assert manifest.counts["questions"] == 1
    import_(tmp_path / "x.cachepipe", tmp_path / "b")
    assert await ask(tmp_path / "b", "run", "a", repeat="same", mode="replay") == (first[0], 0)


async def test_an_import_that_was_stopped_can_be_repeated(tmp_path, monkeypatch):
    first = await ask(tmp_path / "a", "run", *map(str, range(30)))
    export(tmp_path / "a", tmp_path / "x.cachepipe")
    monkeypatch.setattr("cachepipe.sharing._BATCH", 7)

    def stop(doing, done):
        if (doing, done) == ("writing", 14):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_(tmp_path / "x.cachepipe", tmp_path / "b", progress=stop)
    counts = import_(tmp_path / "x.cachepipe", tmp_path / "b")
    assert (counts.same, counts.new) == (14, 16)
    assert await ask(tmp_path / "b", "run", *map(str, range(30))) == (first[0], 0)
    assert verify(tmp_path / "b").problems == {}


async def test_c12_nothing_is_written_if_the_last_chunk_is_damaged(tmp_path):
    await ask(tmp_path / "a", "run", *map(str, range(900)), model=Model("long " * 20))
    export(tmp_path / "a", tmp_path / "x.cachepipe")
    content = bytearray((tmp_path / "x.cachepipe").read_bytes())
    bundle = Bundle(tmp_path / "x.cachepipe")
    assert len(bundle.manifest.chunks) > 1
    content[bundle.manifest.chunks[-1].offset + 50] ^= 1
    bundle.close()
    (tmp_path / "x.cachepipe").write_bytes(content)
    with pytest.raises(BundleError, match="is damaged: the chunk at byte"):
        import_(tmp_path / "x.cachepipe", tmp_path / "b")
    store = DiskStore(tmp_path / "b")
    assert store.totals()["keys"] == 0
    store.close()


async def test_secrets_are_refused_and_no_file_is_left(tmp_path):
    await ask(tmp_path / "a", "run", "a", model=Model("use sk-abcdef0123456789abcdef"))
    with pytest.raises(SecretsFound, match="an API key") as caught:
        export(tmp_path / "a", tmp_path / "x.cachepipe")
    assert "sk-" not in str(caught.value)
    assert caught.value.count == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    export(tmp_path / "a", tmp_path / "x.cachepipe", allow_secrets=True)


async def test_another_bundle_is_only_replaced_if_that_is_asked_for(tmp_path):
    await ask(tmp_path / "a", "run", "a")
    export(tmp_path / "a", tmp_path / "x.cachepipe")
    export(tmp_path / "a", tmp_path / "x.cachepipe")
    await ask(tmp_path / "a", "run", "b")
    with pytest.raises(StoreError, match="exists and has other content"):
        export(tmp_path / "a", tmp_path / "x.cachepipe")
    export(tmp_path / "a", tmp_path / "x.cachepipe", overwrite=True)


async def test_a_namespace_without_draws_is_an_error(new, tmp_path):
    one = new()
    await ask(one, "run", "a")
    with pytest.raises(StoreError, match="no draws of the namespace 'rum'"):
        export(one, tmp_path / "x.cachepipe", namespaces=["rum"])


async def test_a_draw_that_a_killed_run_left_is_completed_after_an_import(tmp_path):
    store, other = DiskStore(tmp_path / "a"), DiskStore(tmp_path / "b")
    document = asked()
    store.apply_and_wait([Claim(drawn("a"), 2, document, "t"), Commit(KEY, 0, b'"x"', {})])
    other.apply_and_wait([Adopt(store.entry(KEY).sliced())])
    [grant] = other.apply_and_wait([Claim(drawn("a"), 2, document, "t")])
    assert [sample and sample.payload for sample in grant.samples] == [b'"x"', None]
    assert grant.mine == grant.indices[1:]
    store.close()
    other.close()


# The commands.


def run(*arguments, cwd):
    done = forked.run(
        [sys.executable, "-m", "cachepipe", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def test_the_commands_export_import_merge_and_sync(tmp_path):
    await ask(tmp_path / "a", "run", "a", "b")
    await ask(tmp_path / "a", None, "c")
    code, out, err = run(
        "export", "--cache", "a", "--namespace", "run", "-o", "x.cachepipe", "--json", cwd=tmp_path
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["questions"], found["samples"], found["namespaces"]) == (2, 4, ["run"])
    code, out, err = run("import", "x.cachepipe", "--cache", "b", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "added      4 samples and 2 draws" in out
    code, out, _ = run("merge", "a", "x.cachepipe", "-o", "c", "--json", cwd=tmp_path)
    assert (code, json.loads(out)["samples"]) == (0, 6)
    code, out, _ = run("sync", "b", "c", "--json", cwd=tmp_path)
    assert (code, [each["samples"] for each in json.loads(out)]) == (0, [2, 0])
    for wrong, told in {
        ("import", "nothing.cachepipe"): "cannot be read: No such file",
        ("import", "x.cachepipe", "--cache", "x.cachepipe"): "is a bundle, which is only read",
        ("import", "x.cachepipe", "--cache", "b", "--scope", "a", "--scope", "b"): "--scope OLD=NEW",
        ("merge", "nothing", "-o", "d"): "there is no cache",
        ("sync", "a", "a"): "the two are one cache",
        ("export", "--cache", "a", "-o", "b"): "is a folder",
    }.items():
        code, out, err = run(*wrong, cwd=tmp_path)
        assert (code, out) == (2, ""), err
        assert told in err
    assert not (tmp_path / "d").exists()


async def test_a_merge_adds_the_entries_of_different_questions_together(tmp_path, monkeypatch):
    for number, name in enumerate("ab"):
        await ask(tmp_path / name, f"run-{number}", *map(str, range(40)))
    looked = []
    held = SqlLedger.entries
    monkeypatch.setattr(SqlLedger, "entries", lambda self, keys: looked.append(len(keys)) or held(self, keys))
    counts = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (counts.questions, counts.new) == (40, 40)
    assert looked == [40, 40]
