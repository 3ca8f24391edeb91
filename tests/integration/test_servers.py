"""A cache on a real Valkey server: what it refuses, and what happens when the server is away or full."""

from __future__ import annotations

import asyncio
import re
import signal
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import forked
import pytest
from valkey import exceptions
from valkeys import ValkeyNode

from cachepipe import NotStored, OnlineAPI, Request, StoreError, open_store, run
from cachepipe.batch.settings import BatchSettings
from cachepipe.cache import others
from cachepipe.cli.common import name_of
from cachepipe.errors import RiskyServer, StoreUnreachable
from cachepipe.proxy.settings import ProxySettings
from cachepipe.stores.base import Discard
from cachepipe.stores.remote import checks, session
from cachepipe.stores.remote.checks import Unfit, faults
from cachepipe.stores.remote.engine import Conflict, Read, Swap, Unreachable
from cachepipe.stores.remote.spool import Spool
from cachepipe.stores.remote.valkey import ValkeyEngine
from cachepipe.stores.remote.verify import check
from cachepipe.testing import ScriptedModel

PASSWORD = "hidden-secret-word"


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    """Keep samples apart from those of other tests, and warn as in a process of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "_told", set())


@pytest.fixture
def start(tmp_path):
    """A function that starts a server with settings."""
    servers = []

    def begin(**settings):
        servers.append(ValkeyNode(tmp_path / "server", **settings))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


async def ask(pipeline, *ids, n=1):
    return await asyncio.gather(*(pipeline.request(Request("q", n=n, request_id=i)) for i in ids))


def rewriting(client):
    """Return True while a server writes its append-only file anew, or is about to."""
    info = client.info("persistence")
    return info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]


# Outages.


@pytest.mark.anyio
async def test_c7_a_server_that_is_killed_and_comes_back_costs_nothing(start):
    """Claims and samples wait for it, and the sample keeps its place although the lease has ended."""
    server = start()
    model = ScriptedModel(hold=True, cache_scope="m")
    async with OnlineAPI(model, server.url("&lease=0.2")) as pipeline:
        task = asyncio.create_task(ask(pipeline, "a"))
        await model.begun(1)
        server.kill()
        back = threading.Timer(0.6, server.start)
        back.start()
        model.open()
        [answer] = await task
        [more] = await ask(pipeline, "b")
        back.join()
    assert (answer.indices, answer.cached) == ((0,), [False])
    assert (more.indices, more.cached) == ((1,), [False])
    idle = ScriptedModel(cache_scope="m")
    async with OnlineAPI(idle, server.url()) as pipeline:
        again = await ask(pipeline, "a", "b")
    assert [one.data for one in again] == [answer.data, more.data]
    assert not idle.calls


@pytest.mark.anyio
async def test_c7_a_sample_that_the_server_cannot_take_is_delivered_with_a_warning_and_written_later(start):
    server = start()
    model = ScriptedModel(hold=True, cache_scope="m")
    pipeline = OnlineAPI(model, server.url("&patience=0.3&lease=0.3"))
    task = asyncio.create_task(ask(pipeline, "a"))
    await model.begun(1)
    server.kill()
    model.open()
    with pytest.warns(NotStored, match=r"has not answered for 0\.3 s.*kept in .*samples\.jsonl"):
        [answer] = await task
    spool = pipeline.store._spool
    [path] = spool.folder.glob("*.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1.* has not answered for 0\.3 s"):
        await ask(pipeline, "b")
    await pipeline.close()
    assert spool, "what the server has not taken waits for the next process"
    server.start()
    store, _ = open_store(server.url())
    store.close()
    assert not Spool(store.identity)
    idle = ScriptedModel(cache_scope="m")
    async with OnlineAPI(idle, server.url()) as pipeline:
        [again] = await ask(pipeline, "a")
    assert (again.data, again.indices, again.cached) == (answer.data, (0,), [True])
    assert not idle.calls


@pytest.mark.anyio
async def test_c8_a_server_that_is_full_is_waited_for_and_then_named_in_the_error(start):
    server = start()
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url("&patience=0.3")) as pipeline:
        [before] = await ask(pipeline, "a")
        with server.client() as client:
            client.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="OutOfMemory"):
            await ask(pipeline, "b")
        with server.client() as client:
            client.config_set("maxmemory", 0)
        [after] = await ask(pipeline, "b")
    assert (before.indices, after.indices) == ((0,), (1,))


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
async def test_c8_a_server_that_becomes_a_replica_is_waited_for_and_then_named_in_the_error(start, tmp_path):
    server = start()
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url("&patience=0.3")) as pipeline:
        [before] = await ask(pipeline, "a")
        with server.client() as client:
            client.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreUnreachable, match=r"has not answered for 0\.3 s: .*read only replica"):
            await ask(pipeline, "b")
        with pytest.raises(StoreError, match=r"is a replica, which cannot be written\. Name its primary"):
            open_store(server.url("2&patience=0.3"))
        with server.client() as client:
            client.replicaof("NO", "ONE")
        [after] = await ask(pipeline, "b")
    assert (before.indices, after.indices) == ((0,), (1,))


@pytest.mark.anyio
async def test_c8_a_server_that_is_stopped_is_waited_for_and_then_named_in_the_error(start):
    server = start()
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url("&patience=0.3&timeout=0.1")) as pipeline:
        await ask(pipeline, "a")
        server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnreachable, match=r"has not answered for 0\.3 s: .*[Tt]ime"):
                await ask(pipeline, "b")
        finally:
            server.process.send_signal(signal.SIGCONT)
        [answer] = await ask(pipeline, "b")
    assert answer.indices == (1,)


@pytest.mark.anyio
async def test_c7_a_server_that_reads_its_data_is_waited_for(start, monkeypatch, until):
    monkeypatch.setattr(session, "_PAUSES", (0.02, 0.02))
    server, told = start(), []
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url()) as pipeline:
        await ask(pipeline, "a")
        with server.client() as client:
            client.mset({f"other {number}": "x" * 2000 for number in range(200)})
            client.bgrewriteaof()
            await until(lambda: not rewriting(client))
        engine = type(pipeline.store.session.engine)
        ours = engine._ours
        monkeypatch.setattr(engine, "_ours", lambda self, error: told.append(str(error)) or ours(self, error))
        server.kill()
        server.settings |= {"key-load-delay": "2000", "loading-process-events-interval-bytes": "1024"}
        starting = threading.Thread(target=server.start)
        starting.start()
        [answer] = await ask(pipeline, "new")
        starting.join()
    assert answer.indices == (1,)
    assert any("loading" in one.lower() for one in told), told


@pytest.mark.slow
@pytest.mark.anyio
async def test_c8_a_cluster_that_is_down_is_waited_for_and_then_named_in_the_error(start, until):
    server = start(**{"cluster-enabled": "yes"})
    with server.client() as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        await until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        url = f"valkey+cluster://127.0.0.1:{server.port}?prefix=t&patience=0.3"
        async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
            await ask(pipeline, "a")
            client.execute_command("CLUSTER DELSLOTS", 0)  # others are then not served either
            with pytest.raises(StoreUnreachable, match=r"has not answered for 0\.3 s: .*[Cc]luster.* down"):
                await ask(pipeline, "b")
            client.execute_command("CLUSTER ADDSLOTS", 0)
            [answer] = await ask(pipeline, "b")
    assert answer.indices == (1,)


@pytest.mark.anyio
async def test_c12_a_server_that_was_emptied_is_not_filled_again_in_silence(start):
    server = start()
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url("&lease=0.15")) as pipeline:
        await ask(pipeline, "a")
        with server.client() as client:
            client.flushall()
        session = pipeline.store.session
        while session.renew():  # it has ended with the rest
            pass
        with pytest.raises(StoreError, match="emptied or replaced while it was open"):
            await ask(pipeline, "b")


@pytest.mark.anyio
async def test_a_server_that_has_lost_the_functions_gets_them_again(start):
    server = start()
    async with OnlineAPI(ScriptedModel(cache_scope="m"), server.url()) as pipeline:
        await ask(pipeline, "a")
        with server.client() as client:
            client.function_flush()
        [answer] = await ask(pipeline, "b")
    assert answer.indices == (1,)


@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
def test_a_replica_that_takes_over_names_the_history_that_it_continues(start, tmp_path):
    primary = start()
    replica = ValkeyNode(tmp_path / "replica", replicaof=f"127.0.0.1 {primary.port}")
    store, _ = open_store(primary.url())
    [before] = store.session.engine.servers()
    replica.wait_until_in_step()
    with replica.client() as client:
        client.replicaof("NO", "ONE")
    store.close()
    other, _ = open_store(replica.url())
    [after] = other.session.engine.servers()
    other.close()
    replica.close()
    assert after.before == before.history != after.history


@pytest.mark.anyio
async def test_a_swap_whose_answer_was_lost_is_performed_once(start):
    """A client that sends it again after a time-out gets the answer, and nothing is bought twice."""
    server = start()
    model = ScriptedModel(cache_scope="m")
    async with OnlineAPI(model, server.url("&timeout=0.2")) as pipeline:
        await ask(pipeline, "a")
        with server.client() as client:
            client.execute_command("CLIENT", "PAUSE", 500, "WRITE")
        answers = await ask(pipeline, "b", "c")
    assert [one.cached for one in answers] == [[False], [False]]
    assert sorted(one.indices for one in answers) == [(1,), (2,)]
    assert model.generated == 3


@pytest.mark.anyio
async def test_c4_a_sample_of_another_process_is_noticed_without_polling(start, monkeypatch):
    """Its server says when it has come."""
    monkeypatch.setattr(others, "FIRST", 0.01)
    monkeypatch.setattr(others, "LAST", 3600.0)
    monkeypatch.setattr(others.Look, "_pause", property(lambda _: 3600.0, lambda *_: None), raising=False)
    server = start()
    model = ScriptedModel(hold=True, cache_scope="m")
    there, _ = open_store(server.url("&timeout=4"))
    there.identity = "played by another process"
    listening = threading.Event()
    listen = ValkeyEngine.listen

    def heard(engine, changed):
        return listen(engine, lambda key: (changed(key), listening.set()))

    monkeypatch.setattr(ValkeyEngine, "listen", heard)
    async with (
        OnlineAPI(model, server.url()) as here,
        OnlineAPI(ScriptedModel(cache_scope="m"), there) as other,
    ):
        first = asyncio.create_task(here.request(Request("q", namespace="a")))
        await model.begun(1)
        second = asyncio.create_task(other.request(Request("q", namespace="b")))
        while not listening.is_set():  # until the subscription has begun
            await asyncio.sleep(0.01)
            with server.client() as client:
                client.publish("t:changed", "other")
        model.open()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(first, second)
    assert answers[0].data == answers[1].data
    assert [answer.cached for answer in answers] == [[False], [True]]
    there.close()


def test_a_key_is_read_in_turn_by_one_process_until_it_swaps(start):
    store, _ = open_store(start().url("&local=off"))
    engine = store.session.engine
    read, swap = Read("k", [b"x"]), Swap("k", b"1", fair=True, puts={b"x": b"12345678new"})
    assert engine.read_in_turn(read, 1) == {}
    assert engine.read_in_turn(read, 2) is None
    assert engine.read_in_turn(read, 1) == {}
    assert engine.swap([swap], 1) == [None]
    assert engine.read_in_turn(read, 2) == swap.puts
    assert engine.read_in_turn(read, 1) is None
    store.close()


@pytest.mark.parametrize("kind", ["valkey", "postgres"])
def test_a_swap_returns_the_samples_that_it_wants_or_writes_nothing(request, kind):
    store, _ = open_store(request.getfixturevalue(f"new_{kind}_url")())
    engine = store.session.engine
    samples = {b"s/0": b"+2345678first", b"s/1": b"+2345678second", b"s/2": b"-2345678gone"}
    assert engine.swap([Swap("k", b"1", puts=samples), Swap("other", b"2", puts=samples)], 1) == [None, None]
    wants = [b"s/1", b"s/0"]
    wanted = {name: samples[name] for name in wants}
    good = Swap("k", b"3", puts={b"x": b"12345678new"}, wants=wants)
    lacks = Swap("other", b"4", puts={b"x": b"12345678new"}, wants=[*wants, b"s/3"])
    assert engine.swap([good, lacks], 1) == [wanted, Conflict({}, wait=False)]
    assert engine.swap([good], 1) == [wanted], "as it was performed before"
    discarded = Swap("other", b"5", expected={b"x": None}, puts={b"x": b"12345678new"}, wants=[b"s/2"])
    assert engine.swap([discarded], 1) == [Conflict({}, wait=False)]
    assert engine.read([Read(key, [b"x"]) for key in ("k", "other")]) == [{b"x": b"12345678new"}, {}]
    store.close()


@pytest.mark.anyio
@pytest.mark.parametrize("away", ["no", "restarted", "late"])
async def test_c2_known_draws_are_read_on_the_event_loop_or_else_in_a_thread(start, monkeypatch, away):
    server = start()
    read, reads = ValkeyEngine.read, []
    monkeypatch.setattr(
        ValkeyEngine, "read", lambda engine, found: reads.append(found) or read(engine, found)
    )
    store, _ = open_store(server.url("&timeout=0.2&local=off"))
    async with OnlineAPI(ScriptedModel(cache_scope="m"), store) as pipeline:
        first = await ask(pipeline, "a", "b")
        on_loop = store.session.engine._on_loops.of(asyncio.get_running_loop())
        async with asyncio.timeout(5):
            while not on_loop.ready:  # noqa: ASYNC110 - a thread connects
                await asyncio.sleep(0.001)
        store.session.expects_new = False
        reads.clear()
        if away == "restarted":
            server.kill()
            server.start()
        if away == "late":
            with server.client() as client:
                client.execute_command("CLIENT", "PAUSE", 400, "ALL")
        with run():
            again = await ask(pipeline, "a", "b")
        in_a_thread = any(not read.key.startswith("~") for found in reads for read in found)
    assert [one.data for one in again] == [one.data for one in first]
    assert all(one.cached == [True] for one in again)
    assert in_a_thread == (away != "no")
    store.close()


UNCLOSED = """
import asyncio, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    cache_scope = "m"
    async def request(self, request):
        return Response(["x"] * request.n)

async def main():
    await pipeline.request(Request("q", n=2))

pipeline = OnlineAPI(Model(), sys.argv[1])
asyncio.run(main())
"""


def test_c6_what_a_program_has_not_closed_is_written_when_it_ends(start):
    server = start()
    forked.run([sys.executable, "-W", "error", "-c", UNCLOSED, server.url()], check=True, timeout=60)
    store, _ = open_store(server.url(), read_only=True)
    assert [noted.sums.delivered.requests for noted in store.sums()] == [1]
    assert store.totals()["samples"] == 2
    store.close()


# What is refused at opening, or warned of.


def test_a_server_that_deletes_samples_when_it_is_full_is_refused(start):
    server = start(**{"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"})
    with pytest.raises(StoreError, match="CONFIG SET maxmemory-policy noeviction"):
        open_store(server.url())


def test_a_server_that_keeps_samples_in_memory_only_is_warned_of(start):
    server = start(appendonly="no")
    with pytest.warns(RiskyServer, match="CONFIG SET appendonly yes"):
        store, _ = open_store(server.url())
    store.close()
    store, _ = open_store(server.url())  # the warning comes once
    store.close()


@pytest.mark.parametrize(
    ("info", "settings", "told"),
    [
        ({"redis_version": "6.2.1"}, {"appendonly": "yes"}, "Redis 7.0 or later"),
        ({"redis_version": "7.2.4", "role": "slave"}, {"appendonly": "yes"}, "Name its primary"),
    ],
)
def test_a_server_that_cannot_hold_a_cache_is_refused(info, settings, told):
    with pytest.raises(Unfit, match=told):
        list(faults(info, settings))


@pytest.mark.parametrize(
    ("info", "settings", "told"),
    [
        ({}, {}, "does not tell its settings"),
        ({}, {"appendonly": "yes", "appendfsync": "no"}, "appendfsync everysec"),
        ({"connected_slaves": 1}, {"appendonly": "yes"}, "min-replicas-to-write 1"),
    ],
)
def test_a_server_that_may_lose_samples_is_warned_of(info, settings, told):
    [fault] = faults({"redis_version": "8.1.0", **info}, settings)
    assert told in fault


def test_a_server_that_may_lose_the_last_second_is_warned_of_if_nothing_may_be_lost(start):
    server = start(appendfsync="everysec")
    with pytest.warns(RiskyServer, match="CONFIG SET appendfsync always"):
        store, _ = open_store(server.url(), durability="full")
    store.close()
    with pytest.raises(ValueError, match="durability is 'process' or 'full'"):
        open_store(server.url(), durability="none")


@pytest.mark.parametrize(
    ("error", "there"),
    [
        (exceptions.BusyLoadingError("LOADING Valkey is loading the dataset in memory"), True),
        (exceptions.ClusterDownError("CLUSTERDOWN The cluster is down"), True),
        (exceptions.ConnectionError("Error 111 connecting. Connection refused."), False),
    ],
)
def test_a_server_that_says_why_it_cannot_answer_is_there(new_valkey_url, error, there):
    store, _ = open_store(new_valkey_url())
    told = store.session.engine._ours(error)
    store.close()
    assert (type(told), told.there) == (Unreachable, there)


def test_a_server_that_does_not_answer_is_an_error_that_names_it():
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1:1/0.* has not answered for 0\.1 s"):
        open_store(f"valkey://:{PASSWORD}@127.0.0.1:1/0?patience=0.1")


# URLs and credentials.


def test_credentials_come_from_the_url_the_environment_or_a_file_and_are_never_shown(
    start, tmp_path, monkeypatch
):
    server = start()
    with server.client() as client:
        client.config_set("requirepass", PASSWORD)  # now, since the package itself knows none
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    stores = [open_store(server.url(credentials=f":{PASSWORD}@"))[0]]
    stores.append(open_store(server.url(f"&password_file={file}"))[0])
    with pytest.raises(StoreError, match="CACHEPIPE_VALKEY_PASSWORD") as refused:
        open_store(server.url(credentials=":wrong-secret@"))
    monkeypatch.setenv("CACHEPIPE_VALKEY_PASSWORD", PASSWORD)
    stores.append(open_store(server.url())[0])
    settings = [
        kind(cache=server.url(credentials=f":{PASSWORD}@")) for kind in (BatchSettings, ProxySettings)
    ]
    shown = [
        repr(refused.value),
        *map(repr, settings),
        *map(repr, stores),
        *(store.session.engine.where for store in stores),
    ]
    assert not any(secret in text for text in shown for secret in (PASSWORD, "wrong-secret"))
    assert len({store.identity for store in stores}) == 1
    for store in stores:
        store.close()


def test_a_command_names_a_url_without_its_credentials():
    assert name_of("valkey://:secret@host/0?prefix=t") == "valkey://host/0?prefix=t"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("valkey://host:port", "no valid host or port"),
        ("valkey://:secret@host/x", "names the database 'x'"),
        ("valkey://host/0?prefx=a", "unknown option 'prefx'"),
        ("valkey://host/0?prefix={a}", "prefix"),
        ("valkey://host/0?patience=-1", "patience=-1"),
        ("mysql://:secret@host", "a cache is a folder or the URL of a server"),
    ],
)
def test_an_invalid_url_says_what_is_wrong_without_its_credentials(url, told):
    with pytest.raises(StoreError) as refused:
        open_store(url)
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_store_on_a_unix_socket_is_a_store(start, tmp_path):
    path = tmp_path / "socket"
    server = start(unixsocket=str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store, _ = open_store(f"unix://{path}?prefix=t")
    other, _ = open_store(server.url())
    assert store.identity == other.identity
    store.close()
    other.close()


PAGE = (Path(__file__).parents[2] / "docs/servers.md").read_text()
ACL = re.search(r"^ACL SETUSER .*$", PAGE, re.MULTILINE)[0]


@pytest.mark.anyio
@pytest.mark.parametrize("loads", [True, False])
async def test_a_user_of_the_server_needs_the_documented_permissions_only(start, loads):
    """The functions may have been loaded by somebody else."""
    server = start()
    if not loads:
        open_store(server.url("eam-of-the-administrator"))[0].close()
    with server.client() as client:
        client.execute_command(ACL if loads else f"{ACL} -function|load")
    url = server.url("eam", credentials="lab:PASSWORD@")
    async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
        [answer] = await ask(pipeline, "a", n=2)
        store = pipeline.store
        await store.apply([Discard(answer.key, 0, "a test")])
        assert len(list(store.samples(answer.key))) == 1
        assert len(list(store.keys())) == 1
        assert check(store.session).whole
    with server.client() as client:
        denied = {each["object"] for each in client.acl_log()}
    assert denied == (set() if loads else {"function|load"})
    with pytest.raises(StoreError, match="refuses"):
        open_store(url.replace("prefix=team", "prefix=other"))


def test_prefixes_are_caches_of_their_own(start):
    server = start()
    first, second = open_store(server.url())[0], open_store(server.url("wo"))[0]

    async def fill():
        async with OnlineAPI(ScriptedModel(cache_scope="m"), first) as pipeline:
            await ask(pipeline, "a")

    asyncio.run(fill())
    assert len(list(first.keys())) == 1
    assert list(second.keys()) == []
    assert first.identity != second.identity
    first.close()
    second.close()


def test_import_of_cachepipe_loads_no_client():
    code = "import sys, cachepipe; cachepipe.open_store; print('valkey' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
