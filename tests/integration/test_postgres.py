"""A cache in a real PostgreSQL database: what it refuses, and what happens when the server fails."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from pgbouncer import PROGRAM, PgBouncer

from cachepipe import OnlineAPI, Request, StoreError, open_store
from cachepipe.errors import FormatError, RiskyServer, StoreUnreachable
from cachepipe.stores.remote import checks
from cachepipe.stores.remote.checks import Unfit, database_faults
from cachepipe.stores.remote.engine import Read, Swap
from cachepipe.stores.remote.urls import Database
from cachepipe.testing import ScriptedModel
from cachepipe.testing.postgres import PostgresServer

PASSWORD = "hidden-secret-word"
SPEED = {"fsync": "off"}  # for what does not concern the disk


@pytest.fixture(autouse=True)
def own_process(tmp_path, monkeypatch):
    """Keep samples apart from those of other tests, and warn as in a process of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checks, "_told", set())


@pytest.fixture
def start():
    """A function that starts a server of this test with settings."""
    servers = []

    def begin(**settings):
        servers.append(PostgresServer(**settings))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def url(new_postgres_url):
    return new_postgres_url()


@pytest.fixture
def engine(url):
    """An engine on a new cache."""
    made = Database(url).opener(create=True, full=False)()
    yield made
    made.close()


def schema_of(url):
    return url.partition("schema=")[2].partition("&")[0]


async def ask(pipeline, *ids, n=1):
    return await asyncio.gather(*(pipeline.request(Request("q", n=n, request_id=i)) for i in ids))


def terminate(server):
    server.ask("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cachepipe'")


# What is lost.


def test_c7_a_commit_waits_for_the_disk_whatever_the_server_is_set_to(start):
    server = start(synchronous_commit="off", wal_writer_delay="10s")
    engine = Database(server.url()).opener(create=True, full=False)()
    assert engine.swap([Swap("k", b"1", puts={b"L": b"12345678x"})], 1) == [None]
    engine.close()
    server.kill()
    server.start()
    engine = Database(server.url()).opener(create=True, full=False)()
    assert engine.rows_of(["k"])[0] == {b"L": b"12345678x"}
    engine.close()


# Outages.


@pytest.mark.anyio
async def test_c7_terminated_connections_cost_nothing(postgres_server, url):
    model = ScriptedModel(hold=True, cache_scope="m")
    async with OnlineAPI(model, url) as pipeline:
        task = asyncio.create_task(ask(pipeline, "a", "b", "c"))
        await model.begun(1)
        terminate(postgres_server)
        model.open()
        answers = await task
        terminate(postgres_server)
        [more] = await ask(pipeline, "d")
    assert sorted(one.indices for one in answers) == [(0,), (1,), (2,)]
    assert more.indices == (3,)
    assert model.generated == 4


def test_the_history_of_a_server_is_its_timeline(url):
    """Another one says that a replica has taken over."""
    store, _ = open_store(url)
    [server] = store.session.engine.servers()
    store.close()
    assert (server.history, server.before) == ("00000001", "00000000")


@pytest.mark.anyio
async def test_a_swap_whose_answer_was_lost_is_performed_once(postgres_server, url):
    """A swap waits for a lock for longer than its client; the server performs it when the lock is free."""
    model = ScriptedModel(cache_scope="m")
    async with OnlineAPI(model, f"{url}&timeout=0.2") as pipeline:
        await ask(pipeline, "a")
        with psycopg.connect(host=postgres_server.host, port=postgres_server.port, user="postgres") as other:
            other.execute(f"select from {schema_of(url)}.keys for update")
            task = asyncio.create_task(ask(pipeline, "b", "c"))
            waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            while (await asyncio.to_thread(postgres_server.ask, waiting))[0][0] < 3:  # sent again twice
                assert not task.done()
        answers = await task
    assert [one.cached for one in answers] == [[False], [False]]
    assert sorted(one.indices for one in answers) == [(1,), (2,)]
    assert model.generated == 3


@pytest.mark.anyio
async def test_c8_a_server_that_is_stopped_is_waited_for_and_then_named_in_the_error(start):
    server = start(**SPEED)
    with pytest.warns(RiskyServer):
        pipeline = OnlineAPI(ScriptedModel(cache_scope="m"), server.url("&timeout=0.2&patience=0.5"))
    await ask(pipeline, "a")
    stopped = server.processes()
    for process in stopped:
        process.suspend()
    with pytest.raises(StoreUnreachable, match=r"has not answered for 0\.5 s: .*timeout"):
        await ask(pipeline, "b")
    for process in stopped:
        process.resume()
    [answer] = await ask(pipeline, "b")
    assert answer.indices == (1,)
    await pipeline.close()


FAULTS = {
    "a full disk": (
        """
        create function {0}.full() returns trigger language plpgsql as
        $$ begin raise exception 'no space left' using errcode = '53100'; end $$;
        create trigger full_disk before insert on {0}.ledger for each row execute function {0}.full()
        """,
        "drop function {0}.full cascade",
        "DiskFull: no space left",
    ),
    "a failover to a replica": (
        "alter role team set default_transaction_read_only = on",
        "alter role team reset default_transaction_read_only",
        "ReadOnlySqlTransaction",
    ),
}


@pytest.fixture
def team(postgres_server, url):
    """The URL of a cache for a user who is not an administrator."""
    schema = schema_of(url)
    postgres_server.ask(f"create role team login; create schema {schema} authorization team")
    yield url.replace("user=postgres", "user=team")
    postgres_server.ask(f"drop schema {schema} cascade; drop role team")


@pytest.mark.anyio
@pytest.mark.parametrize("fault", FAULTS)
async def test_c8_what_may_pass_is_waited_for_and_then_named_in_the_error(postgres_server, team, fault):
    begin, end, told = (text.format(schema_of(team)) for text in FAULTS[fault])
    async with OnlineAPI(ScriptedModel(cache_scope="m"), f"{team}&patience=0.3") as pipeline:
        [before] = await ask(pipeline, "a")
        postgres_server.ask(begin)
        terminate(postgres_server)
        with pytest.raises(StoreUnreachable, match=f"has not answered for 0.3 s: {told}"):
            await ask(pipeline, "b")
        postgres_server.ask(end)
        terminate(postgres_server)
        [after] = await ask(pipeline, "b")
    assert (before.indices, after.indices) == ((0,), (1,))


def test_too_many_connections_are_waited_for(postgres_server, team):
    postgres_server.ask("alter role team connection limit 1")
    with (
        psycopg.connect(host=postgres_server.host, port=postgres_server.port, user="team", dbname="postgres"),
        pytest.raises(StoreUnreachable, match="too many connections"),
    ):
        open_store(f"{team}&patience=0.1")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_c1_a_stricter_isolation_of_the_database_costs_retries_only(postgres_server, team, level):
    postgres_server.ask(f"alter role team set default_transaction_isolation = '{level}'")
    stores = [
        open_store(f"{team}&lease=1{number}")[0] for number in range(4)
    ]  # other URLs: as other processes

    def draw(number):
        async def run():
            model = ScriptedModel(cache_scope="m")
            async with OnlineAPI(model, stores[number]) as pipeline:
                answers = [await ask(pipeline, f"{number}-{turn}") for turn in range(8)]
            return [answer.indices[0] for [answer] in answers]

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as threads:
        drawn = [index for indices in threads.map(draw, range(4)) for index in indices]
    for store in stores:
        store.close()
    assert sorted(drawn) == [*range(32)]


@pytest.fixture
def pooler(postgres_server):
    """PgBouncer, which comes from the system's packages."""
    if PROGRAM is None:
        pytest.skip("needs pgbouncer")
    made = PgBouncer(postgres_server)
    yield made
    made.close()


def test_c1_a_pooler_that_gives_each_transaction_another_connection_does_no_harm(pooler):
    """More processes than the pooler has connections draw samples of one key, and replay them."""
    url = pooler.url("-pooled")
    stores = [open_store(f"{url}&lease=1{number}")[0] for number in range(6)]

    def draw(store, mine):
        async def run():
            async with OnlineAPI(ScriptedModel(cache_scope="m"), store) as pipeline:
                return [answer.indices[0] for answer in await ask(pipeline, *mine)]

        return asyncio.run(run())

    names = [[f"{number}-{turn}" for turn in range(8)] for number in range(6)]
    with ThreadPoolExecutor(6) as threads:
        first = [*threads.map(draw, stores, names)]
        again = [*threads.map(draw, stores, names)]
    for store in stores:
        store.close()
    assert sorted(index for indices in first for index in indices) == [*range(48)]
    assert first == again


def test_a_swap_tells_those_who_listen(engine):
    heard, told = [], threading.Event()

    def changed(key):
        heard.append(key)
        told.set()

    end = engine.listen(changed)
    for number in range(400):  # it takes a moment to begin to listen
        engine.swap([Swap("k\udc80ey", b"%d" % number, puts={b"L": b"x"}, wakes=True)], 1)
        if told.wait(0.05):
            break
    end()
    assert {*heard} == {"k\udc80ey"}


# What is refused at opening, or warned of.


@pytest.mark.parametrize(
    ("version", "replica", "told"),
    [(120004, False, "has version 12.*PostgreSQL 13 or later"), (150002, True, "Name its primary")],
)
def test_a_server_that_cannot_hold_a_cache_is_refused(version, replica, told):
    with pytest.raises(Unfit, match=told):
        list(database_faults(version, {}, replica=replica, replicas=0))


@pytest.mark.parametrize(
    ("settings", "replicas", "told"),
    [
        ({"fsync": "off"}, 0, "ALTER SYSTEM SET fsync = on"),
        ({"full_page_writes": "off"}, 0, "ALTER SYSTEM SET full_page_writes = on"),
        ({}, 1, "synchronous_standby_names"),
    ],
)
def test_a_server_that_may_lose_samples_is_warned_of(settings, replicas, told):
    [fault] = database_faults(150002, settings, replica=False, replicas=replicas)
    assert told in fault


def test_a_server_that_does_not_answer_is_an_error_that_names_it():
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1:1/db.* has not answered for 0\.1 s"):
        open_store(f"postgresql://me:{PASSWORD}@127.0.0.1:1/db?patience=0.1")


def test_a_user_who_may_not_create_a_schema_is_told_what_to_grant(postgres_server, team):
    with pytest.raises(StoreError, match="GRANT CREATE ON DATABASE"):
        open_store(team.replace(schema_of(team), "another"))


def test_a_user_who_may_only_read_replays(postgres_server, team, url):
    async def request(cache, name, **options):
        async with OnlineAPI(ScriptedModel(cache_scope="m"), cache, **options) as pipeline:
            return await ask(pipeline, name)

    [first] = asyncio.run(request(url, "a"))
    schema = schema_of(url)
    postgres_server.ask(
        f"grant usage on schema {schema} to team; grant select on all tables in schema {schema} to team"
    )
    [again] = asyncio.run(request(team, "a", mode="replay"))
    assert again.data == first.data
    with pytest.raises(StoreError, match="does not permit it"):
        asyncio.run(request(team, "b"))


def test_a_user_with_rights_on_the_tables_works_beside_their_owner(postgres_server, team, url):
    async def request(cache, name):
        async with OnlineAPI(ScriptedModel(cache_scope="m"), cache) as pipeline:
            return await ask(pipeline, name)

    [first] = asyncio.run(request(url, "a"))
    schema = schema_of(url)
    rights = "select, insert, update, delete"
    postgres_server.ask(f"grant usage on schema {schema} to team")
    postgres_server.ask(f"grant {rights} on all tables in schema {schema} to team")
    [second] = asyncio.run(request(team, "b"))
    assert (first.indices, second.indices) == ((0,), (1,))


def test_a_cache_of_a_later_format_is_refused(postgres_server, engine, url):
    postgres_server.ask(f"update {schema_of(url)}.meta set format = 99")  # noqa: S608 - a name of this test
    with pytest.raises(FormatError, match="has format 99"):
        open_store(url)


def test_a_schema_with_other_tables_is_refused_and_left_alone(postgres_server, team):
    schema = schema_of(team)
    postgres_server.ask(f"create table {schema}.keys (mine int); alter table {schema}.keys owner to team")
    with pytest.raises(StoreError, match=r"not those of a cache.*\?schema=NAME"):
        open_store(team)
    tables = postgres_server.ask("select tablename from pg_tables where schemaname = %s", schema)
    assert tables == [("keys",)]


def test_a_new_cache_may_be_opened_by_many_at_once(url):
    opener = Database(url).opener(create=True, full=False)
    with ThreadPoolExecutor(8) as threads:
        engines = [*threads.map(lambda _: opener(), range(8))]
    assert len({engine.identity for engine in engines}) == 1
    for engine in engines:
        engine.close()


def test_a_deleted_cache_is_named(postgres_server, engine, url):
    postgres_server.ask(f"drop schema {schema_of(url)} cascade")
    with pytest.raises(StoreError, match="was deleted or replaced"):
        engine.rows_of(["k"])
    with pytest.raises(StoreError, match="was deleted or replaced"):
        engine.open_lease("me", 1)
    Database(url).opener(create=True, full=False)().close()
    with pytest.raises(StoreError, match="another cache is in its place"):
        engine.open_lease("me", 1)


# Rows.


def test_fields_of_any_length_and_any_bytes_are_kept_apart(engine):
    names = [b"d/" + b"x" * 5000 + tail for tail in (b"", b"1", b"\0\xff")] + [b"d/\0", b"", b"d/%s"]
    rows = {name: b"12345678%d" % place for place, name in enumerate(names)}
    assert engine.swap([Swap("k", b"1", expected=dict.fromkeys(names), puts=rows)], 1) == [None]
    assert engine.read([Read("k", names)]) == [rows]
    assert engine.rows_of(["k"])[0] == rows
    assert dict(engine.scan("k")) == {"k": rows}
    [conflict] = engine.swap([Swap("k", b"2", expected=dict.fromkeys(names), puts=rows)], 1)
    assert conflict.rows == rows
    swap = Swap("k", b"3", expected={name: row[:8] for name, row in rows.items()}, deletes=names)
    assert engine.swap([swap], 1) == [None]
    assert engine.rows_of(["k"])[0] == {}


def test_a_scan_reads_page_by_page(engine):
    keys = [f"k{number}" for number in range(230)]
    engine.swap([Swap(key, b"1", puts={b"L": b"x", b"s/0": b"y"}) for key in keys], 1)
    assert [key for key, _ in engine.scan("k")] == sorted(keys)
    assert [key for key, _ in engine.scan("k22")] == sorted(key for key in keys if key.startswith("k22"))
    assert all(rows == {b"L": b"x"} for _, rows in engine.scan(""))


# URLs and credentials.


def test_credentials_come_from_the_url_or_from_where_libpq_finds_them_and_are_never_shown(
    start, tmp_path, monkeypatch
):
    server = start()
    server.ask(f"create role locked login superuser password '{PASSWORD}'")
    rules = server.data / "pg_hba.conf"
    rules.write_text(f"host all locked all scram-sha-256\n{rules.read_text()}")
    server.ask("select pg_reload_conf()")
    file = tmp_path / "pgpass"
    file.write_text(f"*:*:*:locked:{PASSWORD}\n")
    file.chmod(0o600)
    stores = [open_store(server.url(credentials=f"locked:{PASSWORD}@"))[0]]
    stores.append(open_store(server.url(f"&passfile={file}", credentials="locked@"))[0])
    refused = []
    for wrong in (":wrong-secret", ""):
        with pytest.raises(StoreError, match=r"PGPASSWORD or in a \.pgpass file") as error:
            open_store(server.url("&lease=2", credentials=f"locked{wrong}@"))
        refused.append(repr(error.value))
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    stores.append(open_store(server.url("&lease=3", credentials="locked@"))[0])
    shown = [*refused, *map(repr, stores), *(store.session.engine.where for store in stores)]
    assert not any(secret in text for text in shown for secret in (PASSWORD, "wrong-secret"))
    assert len({store.identity for store in stores}) == 1
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://me:secret@host:99x/db", "is not one that PostgreSQL knows"),
        ("postgresql://me:a secret@host/db", "is not one that PostgreSQL knows"),
        ("postgresql://host/db?shema=a", "unknown option 'shema'"),
        ("postgresql://host/db?password=secret", "unknown option 'password'"),
        ("postgresql://host/db?schema=a%22b", "has the schema 'a\"b'"),
        ("postgres://host/db?schema=pg_toast", "has the schema 'pg_toast'"),
        ("postgres://host/db?timeout=0", "timeout=0"),
    ],
)
def test_an_invalid_url_says_what_is_wrong_without_its_credentials(url, told):
    with pytest.raises(StoreError) as refused:
        open_store(url)
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("part", ["database", "user"])
def test_a_database_or_user_that_does_not_exist_is_named_at_once(postgres_server, part):
    url = postgres_server.url(
        **({"database": "nowhere"} if part == "database" else {"credentials": "nobody@"})
    )
    with pytest.raises(
        StoreError, match=f"refuses the connection: .*{'nowhere' if part == 'database' else 'nobody'}"
    ):
        open_store(url)


def test_several_hosts_are_tried_in_turn(postgres_server):
    hosts = f"127.0.0.1:1,127.0.0.1:{postgres_server.port}"
    store, _ = open_store(
        f"postgresql://postgres@{hosts}/postgres?schema=hosts&target_session_attrs=read-write"
    )
    store.close()


def test_schemas_are_caches_of_their_own(new_postgres_url):
    first, second = open_store(new_postgres_url())[0], open_store(new_postgres_url())[0]

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
    code = "import sys, cachepipe; cachepipe.open_store; print('psycopg' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
