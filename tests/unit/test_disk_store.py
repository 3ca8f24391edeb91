"""The store in a folder: what it refuses, who may read it, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import diskcache
import forked
import pytest

from cachepipe import (
    CacheMiss,
    DamagedCache,
    DiskStore,
    EvictionDisabled,
    FormatError,
    OnlineAPI,
    ReadOnlyStore,
    Request,
    Response,
    StoreError,
    UnsafeRow,
    open_store,
)
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.stores import folders, leases
from cachepipe.stores.base import Claim, Commit, ReleaseHold, ReleaseLease

KEY = "k2-" + "a" * 64
QUESTION = Question(KEY, None, b"{}")


class Model:
    def __init__(self, value=None):
        self.calls = 0
        self.value = value

    async def request(self, request):
        self.calls += 1
        data = [f"{request.prompt}#{self.calls}.{i}" for i in range(request.n)]
        return Response(data if self.value is None else [self.value] * request.n)


def asked(folder, *prompts, model=None, mode="read-write", **more):
    """Return what a pipeline that is opened for it answers."""

    async def run():
        async with OnlineAPI(model or Model(), folder, mode=mode) as pipeline:
            return [await pipeline.request(Request(prompt, **more)) for prompt in prompts]

    return asyncio.run(run())


def claim(store, request_id="", n=1, namespace="-"):
    return store.write([Claim(Draw(namespace, KEY, request_id, 0), n, QUESTION, "t")])[0]


def shelf(folder):
    return sqlite3.connect(folder / "cache.db", isolation_level=None)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


# Nothing is unpickled.


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def bomb(tmp_path):
    """A pickle that makes a file when it is loaded."""
    path = tmp_path / "went off"
    yield pickle.dumps(Bomb(path))
    assert not path.exists(), "a pickle of the cache was loaded"


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bomb"))).close()
    assert (tmp_path / "bomb").exists()


@pytest.mark.parametrize("mode", [4, 3, 2, 1], ids=["pickle", "text", "binary", "raw"])
@pytest.mark.parametrize("way", ["recall", "claim", "replay", "pipeline", "status", "samples"])
def test_a_row_that_cachepipe_did_not_write_is_refused_unread(folder, bomb, mode, way):
    asked(folder, "q")
    connection = shelf(folder)
    [(place,)] = connection.execute("SELECT key FROM Cache").fetchall()
    connection.execute("UPDATE Cache SET mode = ?, value = ?", (mode, bomb))
    connection.close()
    key = place.split("/")[0]
    draw = Draw("-", key, "", 0)
    refused = DamagedCache if mode == 1 else UnsafeRow
    with pytest.raises(refused, match=r"restore the cache"):  # noqa: PT012 - one way of six
        if way == "pipeline":
            asked(folder, "q")
        with contextlib.closing(DiskStore(folder)) as store:
            match way:
                case "recall":
                    store.recall(draw, 1)
                case "claim":
                    store.apply_now([Claim(Draw("=x", key, "", 0), 1, Question(key, None, b""), "t")])
                case "replay":
                    store.replay(Draw("=x", key, "", 0), 1, IntervalSet())
                case "status":
                    store.status([(key, 0)])
                case "samples":
                    list(store.samples(key))


def test_an_id_that_is_no_text_is_a_damaged_row(folder):
    asked(folder, "q")
    connection = shelf(folder)
    connection.execute("UPDATE Cache SET value = ?", (b'{"id":"\xff"}\n"x"',))
    connection.close()
    with pytest.raises(DamagedCache, match="restore the cache"):
        asked(folder, "q", mode="replay")


@pytest.mark.parametrize("mode", [4, 3, 2])
def test_bytes_that_look_like_ours_are_refused_in_another_mode(folder, mode):
    """What diskcache would make of them is not for us to try."""
    asked(folder, "q")
    connection = shelf(folder)
    connection.execute("UPDATE Cache SET mode = ?", (mode,))
    connection.close()
    with pytest.raises(UnsafeRow, match=f"mode {mode}"):
        asked(folder, "q")


def test_c7_a_sample_whose_commit_was_cut_short_outlives_the_lease_that_is_given_up(folder):
    """It was put down, and its index was still pending when the ledger could not be written."""
    with contextlib.closing(DiskStore(folder)) as store:
        claim(store)
        with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db", isolation_level=None)) as ledger:
            pending = ledger.execute("SELECT * FROM pending").fetchall()
            store.write([Commit(KEY, 0, b'"x"', {})])
            ledger.executemany("INSERT INTO pending VALUES(?, ?, ?)", pending)
        store.write([ReleaseLease(KEY, [0])])
        assert [sample.payload for sample in store.samples(KEY)] == [b'"x"']
        assert claim(store, namespace="=another", n=2).mine == [1]


def test_a_pickle_in_a_file_of_its_own_is_refused_unread(folder, bomb):
    asked(folder, "q")
    (folder / "x.val").write_bytes(bomb)
    connection = shelf(folder)
    connection.execute("UPDATE Cache SET mode = 4, value = NULL, filename = 'x.val'")
    connection.close()
    with pytest.raises(UnsafeRow):
        asked(folder, "q")


def test_pickled_keys_are_not_looked_at(folder, bomb):
    """diskcache keeps keys that are no plain values as pickles, marked raw = 0."""
    asked(folder, "q")
    connection = shelf(folder)
    [(place,)] = connection.execute("SELECT key FROM Cache").fetchall()
    for key in (place, bomb):
        connection.execute(
            "INSERT INTO Cache(key, raw, store_time, access_time, mode, value, size)"
            " VALUES(?, 0, 0, 0, 4, ?, 0)",
            (key, bomb),
        )
    connection.close()
    assert asked(folder, "q")[0].cached == [True]
    with contextlib.closing(DiskStore(folder)) as store:
        assert store.totals()["samples"] == 1


def test_a_pickle_in_the_ledger_is_not_loaded(folder, bomb):
    asked(folder, "q")
    with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db", isolation_level=None)) as ledger:
        ledger.execute("UPDATE keys SET document = ?", (bomb,))
    assert asked(folder, "q")[0].cached == [True]
    with contextlib.closing(DiskStore(folder)) as store:
        for info in store.keys(""):
            assert store.question(info.key).document == bomb


# The rows are diskcache's own.


def test_diskcache_reads_the_rows_as_bytes(folder):
    [answer] = asked(folder, "q", n=2)
    with diskcache.Cache(str(folder)) as cache:
        assert list(cache) == [f"{answer.key}/0", f"{answer.key}/1"]
        for place, value in zip(cache, answer.data, strict=True):
            header, payload = cache[place].split(b"\n", 1)
            assert json.loads(payload) == value
            assert json.loads(header[header.index(b"{") :])["id"]


def test_diskcache_repairs_nothing_of_ours_away(folder):
    """Its ``check(fix=True)`` deletes files that it does not know."""
    [answer] = asked(folder, "q")
    store = DiskStore(folder)
    claim(store)
    with diskcache.Cache(str(folder)) as cache:
        assert [str(one.message) for one in cache.check(fix=True)] == []
    store.close()
    [again] = asked(folder, "q")
    assert (again.data, again.cached) == (answer.data, [True])


def test_an_eviction_policy_is_set_right_loudly(folder):
    with diskcache.Cache(str(folder), eviction_policy="least-recently-used") as cache:
        cache["theirs"] = 1
        with pytest.warns(EvictionDisabled, match="'least-recently-used'.*now 'none'"):
            store = DiskStore(cache)
        assert (cache.eviction_policy, cache.cull_limit) == ("none", 0)
        assert cache["theirs"] == 1
        store.close()
        assert cache["theirs"] == 1, "closing a store closes no cache that the caller opened"
    with diskcache.Cache(str(folder)) as cache:
        assert (cache.eviction_policy, cache.cull_limit) == ("none", 0)


def test_the_policy_of_a_folder_given_by_its_path_is_set_right_too(folder):
    diskcache.Cache(str(folder)).close()
    with pytest.warns(EvictionDisabled):
        DiskStore(folder).close()
    DiskStore(folder).close()  # once: said and done


def test_nothing_is_lost_above_the_size_limit(folder):
    """Not even by a caller who goes on writing to the cache that is shared with us."""
    with diskcache.Cache(str(folder), size_limit=1000) as cache:
        with pytest.warns(EvictionDisabled):
            store = DiskStore(cache)
        asked(store, *map(str, range(50)))
        for number in range(50):
            cache[number] = "x" * 1000
        cache.cull()
        assert [answer.cached for answer in asked(store, *map(str, range(50)))] == [[True]] * 50
        assert len(cache) == 100
        store.close()


@pytest.mark.parametrize("kind", [diskcache.FanoutCache, diskcache.Deque, diskcache.Index])
def test_other_kinds_of_diskcache_are_refused(tmp_path, kind):
    cache = kind(directory=str(tmp_path / "theirs"))
    with pytest.raises(TypeError, match=kind.__name__):
        open_store(cache)
    (cache if kind is diskcache.FanoutCache else cache.cache).close()


def test_a_lease_lives_until_the_last_store_of_the_process_gives_it_back(tmp_path):
    lease = leases.hold(tmp_path)
    assert leases.hold(tmp_path) is lease
    [path] = (tmp_path / "leases.cache.db").iterdir()
    assert not lease.release()
    assert leases.own(tmp_path) == lease.name
    with path.open("r+") as file:  # as another process opens it
        assert not leases._lock(file.fileno(), wait=False)
    assert lease.release()
    assert leases.own(tmp_path) is None
    assert not leases.alive(tmp_path, lease.name)


def test_a_lease_that_may_not_be_looked_at_counts_as_alive(tmp_path, monkeypatch):
    """It is another user's; to take over what it generates would buy it twice."""

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(leases.os, "open", refuse)
    assert leases.alive(tmp_path, "host-1-0123456789ab")


def test_a_url_or_an_empty_name_is_no_folder_and_makes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="got 'mysql://host/0'"):
        open_store("mysql://user:secret@host/0")
    with pytest.raises(StoreError, match="got ''"):
        open_store("")
    assert list(tmp_path.iterdir()) == []


def test_c7_a_cache_that_has_lost_its_ledger_is_refused_and_buys_nothing_again(folder):
    """Not only for the price: the commit would find the old samples, and hand those out."""

    async def ask():
        async with OnlineAPI(model, folder) as pipeline:
            return (await pipeline.request(Request("x"))).data

    model = Model("bought")
    bought = asyncio.run(ask())
    ledger = (folder / "ledger.cache.db").read_bytes()
    for side in ("", "-wal", "-shm"):
        (folder / f"ledger.cache.db{side}").unlink(missing_ok=True)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"Restore its ledger\.cache\.db"):
            asyncio.run(ask())
    (folder / "ledger.cache.db").write_bytes(ledger)
    assert asyncio.run(ask()) == bought
    assert model.calls == 1


@pytest.mark.parametrize("cache", [5, object(), {"folder"}, b"folder", [5]])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(TypeError, match=r"takes a folder|folder or a"):
        open_store(cache)


# The folder.


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_the_folder_and_its_files_are_private(folder, umask):
    """Samples may be anybody's words."""
    store = DiskStore(folder)
    claim(store)
    store.apply_now([Commit(KEY, 0, b"x" * 100_000, {})])
    modes = {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in [folder, *folder.rglob("*")]
    }
    assert len(modes) >= 5
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}
    assert modes["."] == 0o700
    assert modes["cache.db"] == modes["ledger.cache.db"] == 0o600
    store.close()


def test_a_folder_that_diskcache_made_becomes_private(folder, umask):
    diskcache.Cache(str(folder), eviction_policy="none").close()
    DiskStore(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_with_other_things_in_it_keeps_its_mode(tmp_path, umask):
    home = tmp_path / "home"
    home.mkdir(0o755)
    (home / "notes.txt").write_text("mine")
    DiskStore(home).close()
    assert stat.S_IMODE(home.stat().st_mode) == 0o755


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        DiskStore(tmp_path / "file")
    with pytest.raises(StoreError):
        DiskStore(tmp_path / "file" / "below")


def test_a_path_is_a_string_or_a_path_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = DiskStore("~/cache")
    assert store.folder == (tmp_path / "cache").resolve()
    same = DiskStore(tmp_path / "other" / ".." / "cache")
    assert same.identity == store.identity
    store.close()
    same.close()


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CACHEPIPE_DIR", raising=False)
    places = []
    for step in range(3):
        if step == 1:
            (tmp_path / "caches").mkdir()
        if step == 2:
            monkeypatch.setenv("CACHEPIPE_DIR", "named")
        store, ours = open_store()
        assert ours
        places.append(store.folder.relative_to(tmp_path).parts[0])
        store.close()
    assert places == ["xdg", "caches", "named"]


def test_a_newer_format_is_refused(folder):
    DiskStore(folder).close()
    with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db", isolation_level=None)) as ledger:
        ledger.execute("UPDATE meta SET value = 99 WHERE name = 'format'")
    for read_only in (None, True):
        with pytest.raises(FormatError, match=r"format 99.*version that wrote it"):
            DiskStore(folder, read_only=read_only)


@pytest.mark.parametrize("name", ["ledger.cache.db", "cache.db"])
def test_a_damaged_file_is_a_store_error(folder, name):
    asked(folder, *map(str, range(30)))
    path = folder / name
    size = path.stat().st_size
    path.write_bytes(b"no database at all, but long enough to be taken for one".ljust(size, b"!"))
    with pytest.raises(StoreError):
        asked(folder, "0")


@pytest.mark.parametrize("name", ["ledger.cache.db", "cache.db"])
def test_a_file_that_is_damaged_inside_is_a_store_error_and_nobody_hangs(folder, name):
    asked(folder, *map(str, range(200)))
    path = folder / name
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data)):
        data[at] = 0xA5
    path.write_bytes(data)

    async def run():
        async with asyncio.timeout(20):
            async with OnlineAPI(Model(), folder) as pipeline:
                await pipeline.request(Request("0"))

    with pytest.raises(StoreError):
        asyncio.run(run())


def test_full_durability_waits_for_the_disk_at_each_commit(folder):
    levels = {}
    for durability in ("process", "full"):
        store = DiskStore(folder, durability=durability)
        claim(store, durability)
        levels[durability] = {
            connection.execute("PRAGMA synchronous").fetchone()[0] for connection in store._writing
        }
        store.close()
    assert levels == {"process": {1}, "full": {2}}
    with pytest.raises(ValueError, match="'process' or 'full'"):
        DiskStore(folder, durability="no")


# Read-only.

READER = """
import asyncio, json, os, sys, warnings
from cachepipe import OnlineAPI, Request, Response
import cachepipe.stages, cachepipe.values, concurrent.futures.thread, encodings.idna, platformdirs
os.umask(0)
if os.getuid() == 0:  # nobody else may read where the modules are, so they are imported before
    os.setgid(65534)
    os.setuid(65534)

class Model:
    async def request(self, request):
        return Response(["new"] * request.n)

async def main():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = OnlineAPI(Model(), sys.argv[1])
        answers = [
            await pipeline.request(Request(prompt, namespace=namespace))
            for prompt in ("known", "new")
            for namespace in (None, "x", "x")
        ]
        await pipeline.close()
    print(json.dumps([
        [[a.data[0], a.cached[0]] for a in answers],
        [[w.category.__name__, str(w.message)] for w in caught],
    ]))
asyncio.run(main())
"""

WRITER = """
import asyncio, os, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([f"{request.prompt}!"] * request.n)

async def main():
    pipeline = OnlineAPI(Model(), sys.argv[1])
    await pipeline.request(Request("known"))
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


@pytest.fixture
def open_folder():
    """A folder that another user can get at."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    yield top / "cache"
    for path in (top, *top.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(top)


@pytest.mark.parametrize("wal", [False, True], ids=["closed", "killed writer"])
def test_a_folder_that_cannot_be_written_serves_hits_and_says_why_it_cannot_store(open_folder, wal):
    """For real: by a process of a user who may not write."""
    if wal:
        forked.run([sys.executable, "-c", WRITER, str(open_folder)], check=False)
        assert (open_folder / "cache.db-wal").stat().st_size > 0
    else:
        asked(open_folder, "known", model=Model("known!"))
    for path in (open_folder, *open_folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in open_folder.rglob("*"))
    process = forked.run(
        [sys.executable, "-c", READER, str(open_folder)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    answers, warned = json.loads(process.stdout)
    # C1 within the run: the second draw of a namespace does not get the first one's sample.
    assert answers == [
        ["known!", True],
        ["known!", True],
        ["new", False],
        ["new", False],
        ["new", False],
        ["new", False],
    ]
    assert [category for category, _ in warned] == ["ReadOnlyStore"]
    assert "permission" in warned[0][1]
    assert "does not store new samples" in warned[0][1]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in open_folder.rglob("*")) == before


def test_a_store_opened_read_only_writes_nothing_and_does_not_warn(folder):
    asked(folder, "known")
    store = DiskStore(folder, read_only=True)
    assert (store.read_only, store.why_read_only) == (True, "it was opened with read_only=True")
    known, new = asked(store, "known", "new")
    assert (known.cached, new.cached) == ([True], [False])
    with pytest.raises(StoreError, match="cannot be written"):
        claim(store)
    assert "read-only" in repr(store)
    store.close()
    assert asked(folder, "new")[0].cached == [False]


def test_a_read_only_folder_that_is_no_cache_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be read as a cache"):
        DiskStore(tmp_path, read_only=True)


def test_reading_a_folder_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"the folder does not exist\. Check the path"):
        DiskStore(tmp_path / "nowhere", read_only=True)


def test_rows_that_cannot_be_read_are_not_taken_for_missing(folder, tmp_path, monkeypatch):
    """A copy that has a write-ahead log, on a medium where SQLite cannot make the index of that log."""
    with contextlib.closing(DiskStore(folder)) as reading:
        assert reading.totals()["samples"] == 0  # whoever has it open keeps the log
        asked(folder, "q")
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith("-shm"):
                shutil.copy(file, copy)
    for name in ("ledger.cache.db", "cache.db"):
        (copy / f"{name}-shm").symlink_to(copy / "nowhere" / name)
    monkeypatch.setattr(folders, "check_files", lambda *_: None)  # the links stand for the medium
    with pytest.raises(StoreError, match="db-wal holds rows that were not moved"):
        DiskStore(copy, read_only=True)
    for name in ("ledger.cache.db", "cache.db"):
        (copy / f"{name}-shm").unlink()
    with contextlib.closing(DiskStore(copy, read_only=True)) as store:
        assert store.totals()["samples"] == 1


def test_replay_on_an_empty_cache_is_a_miss(folder):
    DiskStore(folder).close()
    with pytest.raises(CacheMiss):
        asked(folder, "q", mode="replay")


# Processes and threads.

CREATOR = """
import sys
from cachepipe import DiskStore
from cachepipe.contract.keys import Question
from cachepipe.contract.draws import Draw
from cachepipe.stores.base import Claim
print("ready", flush=True)
sys.stdin.readline()
store = DiskStore(sys.argv[1])
key = "k2-a"
claim = Claim(Draw("-", key, sys.argv[2], 0), 1, Question(key, None, b""), "t")
while (got := store.apply_now([claim])) is None:
    pass
print(got[0].indices[0], flush=True)
sys.stdin.readline()
"""


def test_eight_processes_make_one_folder_at_once(folder):
    processes = [
        forked.Popen(
            [sys.executable, "-W", "error", "-c", CREATOR, str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        indices = [process.stdout.readline() for process in processes]
        ends = [process.communicate("\n")[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert ends == [""] * 8
    assert sorted(map(int, indices)) == list(range(8))


def test_threads_make_one_folder_at_once(folder):
    stores, start = [], threading.Barrier(8)

    def make():
        start.wait()
        stores.append(DiskStore(folder))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 8
    for store in stores:
        assert not store.read_only
        store.close()


FORK = """
import asyncio, json, os, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([f"{os.getpid()}"] * request.n)

def ask(pipeline, **more):
    return asyncio.run(pipeline.request(Request("q", **more))).data[0]

pipeline = OnlineAPI(Model(), sys.argv[1])
first = ask(pipeline)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, json.dumps([ask(pipeline), ask(pipeline), os.getpid()]).encode())
    os._exit(0)
os.waitpid(child, 0)
theirs = json.loads(os.read(reader, 1000))
ours = [ask(pipeline), ask(pipeline, namespace="later")]
asyncio.run(pipeline.close())
print(json.dumps([first, theirs, ours, os.getpid()]))
"""


def test_a_forked_child_uses_the_store_and_is_another_run(folder):
    """It replays its parent's first draw, and the parent goes on undisturbed."""
    process = forked.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(folder)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    first, (child_first, child_second, child), ours, parent = json.loads(process.stdout)
    assert first == child_first == str(parent)
    assert child_second == str(child)
    assert ours == [str(child), str(parent)], "the second draw of the parent's run is the child's second"
    with contextlib.closing(DiskStore(folder)) as store:
        assert store.totals()["samples"] == 2


FORK_IN_FLIGHT = """
import asyncio, os, sys, threading
from cachepipe import OnlineAPI, Request, Response

asked, gate = threading.Event(), threading.Event()

class Model:
    async def request(self, request):
        asked.set()
        while not gate.is_set():
            await asyncio.sleep(0.001)
        return Response([f"from {os.getpid()}"] * request.n)

pipeline = OnlineAPI(Model(), sys.argv[1])
thread = threading.Thread(target=lambda: asyncio.run(pipeline.request(Request("q"))))
thread.start()
asked.wait()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    async def wait():
        task = asyncio.create_task(pipeline.request(Request("q", namespace="child")))
        while not any(info.draw.namespace == "=child" for info in pipeline.store.draws()):
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        os.write(writer, b"!")
        return await asyncio.wait_for(task, 15)
    answer = asyncio.run(wait())
    os._exit(0 if answer.data == [f"from {os.getppid()}"] and answer.cached == [True] else 1)
os.read(reader, 1)
gate.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_forked_in_mid_call_awaits_the_sample_of_its_parent(folder):
    process = forked.run(
        [sys.executable, "-W", "ignore", "-c", FORK_IN_FLIGHT, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.stdout, process.returncode) == ("0\n", 0), process.stderr


# Sizes.


def test_a_sample_of_five_megabytes_comes_back(folder):
    value = {"text": "é" * 2_000_000, "bytes": bytes(1_000_000)}
    assert asked(folder, "q", model=Model(value))[0].data == [value]
    assert asked(folder, "q")[0].data == [value]


class Counter:
    """Counts the statements and the rows that a store's writing connections see."""

    def __init__(self, store):
        claim(store, "opens the connections")
        self.statements = 0
        self.connections = store._writing
        for connection in self.connections:
            connection.set_trace_callback(self.count)

    def count(self, _statement):
        self.statements += 1

    def of(self, work):
        before = self.statements, sum(connection.total_changes for connection in self.connections)
        work()
        after = self.statements, sum(connection.total_changes for connection in self.connections)
        return after[0] - before[0], after[1] - before[1]


def test_a_list_of_twenty_thousand_samples_appends_like_one_of_ten(folder):
    """In statements and in rows, not in seconds."""
    store = DiskStore(folder)
    counter = Counter(store)

    def append(first, count):
        grants = store.write(
            [
                Claim(Draw("-", KEY, str(number), 0), 1, QUESTION, "t")
                for number in range(first, first + count)
            ]
        )
        store.write([Commit(KEY, grant.mine[0], b"x", {}) for grant in grants])

    append(0, 10)
    small = [counter.of(lambda at=at: append(at, 1)) for at in range(10, 15)]
    append(15, 19_985)
    large = [counter.of(lambda at=at: append(at, 1)) for at in range(20_000, 20_005)]
    store.close()
    assert max(rows for _, rows in large) <= max(rows for _, rows in small)
    assert max(statements for statements, _ in large) <= max(statements for statements, _ in small) + 3 < 40


def test_a_list_with_many_holes_appends_without_scanning_it(folder):
    """The other namespace has drawn every second sample; the lowest free one is found by look-up."""
    store = DiskStore(folder)
    grants = store.apply_now([Claim(Draw("-", KEY, str(n), 0), 1, QUESTION, "t") for n in range(2000)])
    store.apply_now([Commit(KEY, grant.mine[0], b"x", {}) for grant in grants])
    for number in range(1, 2000, 2):
        store.apply_now([Claim(Draw("=y", KEY, str(number), 0), 1, QUESTION, "t")])
    counter = Counter(store)

    def draw(request_id):
        assert store.apply_now([Claim(Draw("=y", KEY, request_id, 0), 1, QUESTION, "t")])[0].mine == []

    statements = [counter.of(lambda i=i: draw(f"new {i}"))[0] for i in range(20)]
    store.close()
    assert max(statements) < 30


def test_what_a_store_maps_into_memory_is_bounded_however_large_its_files_are(folder):
    """A run over a million lines is as large as its resident pages."""
    with contextlib.closing(DiskStore(folder)) as store:
        claim(store)
        connections = [*store._writing, *store._readable()]
        mapped = [connection.execute("PRAGMA mmap_size").fetchone()[0] for connection in connections]
    assert len(mapped) == 4
    assert sum(mapped) <= 64 << 20


def test_the_log_is_moved_into_the_file_in_the_background(folder):
    store = DiskStore(folder)

    async def write():
        for start in range(0, 12_000, 500):
            numbers = range(start, start + 500)
            await store.apply([Claim(Draw("-", KEY, str(number), 0), 1, QUESTION, "t") for number in numbers])

    asyncio.run(write())
    store.close()
    assert (
        not (folder / "ledger.cache.db-wal").exists() or (folder / "ledger.cache.db-wal").stat().st_size == 0
    )
    with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db")) as ledger:
        assert ledger.execute("SELECT count(*) FROM segments").fetchone() == (12_000,)


def test_what_is_queued_is_written_when_the_store_is_closed(folder):
    store = DiskStore(folder)
    for number in range(100):
        store.apply_soon(
            [Claim(Draw("-", KEY, str(number), 0), 1, QUESTION, "t"), Commit(KEY, None, b"x", {})]
        )
    store.close()
    with contextlib.closing(DiskStore(folder)) as again:
        assert again.totals()["draws"] == 100


def test_no_secret_of_the_model_reaches_the_folder(folder):
    model = Model()
    model.api_key = "sk-very-secret"
    asked(folder, "q", model=model)
    assert not any(b"very-secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_opening_and_closing_warns_of_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            DiskStore(folder).close()
    assert issubclass(ReadOnlyStore, UserWarning)


def test_c8_a_crowd_that_fails_together_costs_the_same_per_head(folder):
    """Such as a list of 10,000 equal inputs that the provider refuses: each is a holder of one draw."""
    steps = {}
    for size in (100, 400):
        store = DiskStore(folder / str(size))
        draw = Draw("*", KEY, "", 0)
        grants = store.write([Claim(draw, 1, QUESTION, f"{token}") for token in range(size)])
        counted = [0]
        store._writing[0].set_progress_handler(lambda c=counted: c.__setitem__(0, c[0] + 1), 100)
        held = [
            ReleaseHold(draw, f"{token}", grant.held, complete=False) for token, grant in enumerate(grants)
        ]
        store.write([*held, ReleaseLease(KEY, [0])])
        steps[size] = counted[0]
        assert store.totals()["draws"] == 0
        store.close()
    assert steps[400] < 6 * steps[100]


def test_a_close_moves_the_write_ahead_log_though_others_have_it_open(tmp_path):
    class Large:
        async def request(self, request):
            return Response(["x" * 2000] * request.n)

    stays = OnlineAPI(Large(), tmp_path)
    asyncio.run(stays.request(Request("w")))
    moved = []
    for _ in range(4):

        async def session(tag):
            async with OnlineAPI(Large(), tmp_path) as pipeline:
                requests = (pipeline.request(Request(f"{tag}-{number}")) for number in range(300))
                await asyncio.gather(*requests)

        asyncio.run(session(len(moved)))
        moved.append((tmp_path / "cache.db").stat().st_size)
    asyncio.run(stays.close())
    assert moved[0] > 300 * 2000, "what was written is in the log alone"
    assert moved == sorted(set(moved))


def test_a_folder_opened_twice_is_still_open_for_other_processes(tmp_path):
    """Else another process that ends believes itself the last one, and removes the logs that are in use."""
    store = DiskStore(tmp_path)
    asked(store, "known")
    DiskStore(tmp_path).close()
    code = "import sys, cachepipe; cachepipe.DiskStore(sys.argv[1]).close()"
    forked.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    logs = sorted(path.name for path in tmp_path.glob("*-wal"))
    store.close()
    assert logs == ["cache.db-wal", "ledger.cache.db-wal"]


def traced(store):
    """Return a list that gets every statement which this thread makes on a store from now on."""
    seen = []
    for connection in (*store._writable(), *store._readable()):
        connection.set_trace_callback(seen.append)
    return seen


def test_a_known_draw_takes_one_statement_also_when_its_question_was_not_asked_before(folder):
    asked(folder, "p", "q", namespace="known")
    store = DiskStore(folder)

    async def run():
        async with OnlineAPI(Model(), store) as pipeline:
            await pipeline.request(Request("p", namespace="known"))  # looks at the lease of its draw
            seen = traced(store)
            response = await pipeline.request(Request("q", namespace="known"))
            return response, [*seen]

    response, seen = asyncio.run(run())
    store.close()
    assert response.cached == [True]
    assert [statement.split()[0] for statement in seen] == ["SELECT"]


def test_a_new_draw_of_a_stored_sample_takes_one_look_and_one_transaction_of_two_inserts(folder):
    """Once a run has made several new draws, the next one is claimed without a look."""
    prompts = [f"q{number}" for number in range(6)]
    asked(folder, *prompts, namespace="first")
    store, model = DiskStore(folder), Model()

    async def run():
        async with OnlineAPI(model, store) as pipeline:
            for prompt in prompts[:-1]:
                await pipeline.request(Request(prompt, namespace="second"))
            seen = traced(store)
            return await pipeline.request(Request(prompts[-1], namespace="second")), [*seen]

    response, seen = asyncio.run(run())
    store.close()
    assert response.cached == [True]
    assert model.calls == 0
    kinds = [" ".join(statement.split()[: 3 if "INTO" in statement else 1]) for statement in seen]
    looks = ["BEGIN", "PRAGMA", "SELECT", "SELECT", "SELECT"]  # the key, the draw with its sets, the sample
    assert kinds == [*looks, "INSERT INTO segments", "INSERT INTO intervals", "COMMIT"]


def test_c2_a_known_draw_after_many_new_ones_is_found_also_while_another_process_writes(folder):
    prompts = [f"q{number}" for number in range(8)]
    first = asked(folder, *prompts, namespace="n")
    store, model = DiskStore(folder), Model()

    async def run():
        async with OnlineAPI(model, store) as pipeline:
            for prompt in prompts:
                await pipeline.request(Request(prompt, namespace="other"))
            with contextlib.closing(sqlite3.connect(folder / "ledger.cache.db")) as another:
                another.execute("BEGIN IMMEDIATE")
                return [await pipeline.request(Request(prompt, namespace="n")) for prompt in prompts]

    again = asyncio.run(run())
    store.close()
    assert [response.data for response in again] == [response.data for response in first]
    assert all(response.cached == [True] for response in again)
    assert model.calls == 0
