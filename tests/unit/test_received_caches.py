"""C12: what a cache folder that came from elsewhere may not make its reader do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import sqlite3
import time
from pathlib import Path

import diskcache
import pytest

from cachepipe import DiskStore, OnlineAPI, Request, Response, StoreError, open_store
from cachepipe.chat.history import FILE, FolderKeeper
from cachepipe.stores import folders, leases, tables

FILES = ("cache.db", "ledger.cache.db")


class Model:
    model = "m"

    async def request(self, request):
        return Response(["x"] * request.n)


def asked(folder, prompt):
    async def run():
        async with OnlineAPI(Model(), folder) as pipeline:
            return await pipeline.request(Request(prompt))

    return asyncio.run(run())


@pytest.fixture
def received(tmp_path):
    """A cache folder, to be changed by whoever sends it."""
    asked(tmp_path / "cache", "a")
    return tmp_path / "cache"


@pytest.fixture
def outside(tmp_path):
    """A file beside the folder that nobody touches."""
    path = tmp_path / "outside" / "thesis.txt"
    path.parent.mkdir()
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"
    assert [each.name for each in path.parent.iterdir()] == ["thesis.txt"]


def written(folder, *statements):
    with contextlib.closing(sqlite3.connect(folder, isolation_level=None)) as connection:
        for statement, *values in statements:
            connection.execute(statement, values)


def refused(folder, match="cannot be used"):
    for read_only in (False, True):
        with pytest.raises(StoreError, match=match):
            DiskStore(folder, read_only=read_only)


# Names of leases.


def test_c12_no_name_of_a_lease_reaches_a_file(received, outside):
    names = [
        str(outside),
        "../../outside/thesis.txt",
        f"..{os.sep}cache.db",
        ".",
        "..",
        "",
        "a\0b",
        "host-1-0123456789ab/../../../outside/thesis.txt",
        "x" * 100_000,
        "host-1-0123456789ab\n",
        b"bytes",
        17,
        2.5,
    ]
    ledger = received / "ledger.cache.db"
    written(ledger, *[("INSERT INTO leases VALUES(NULL, ?, 1.0, NULL)", name) for name in names])
    there = sorted(each.name for each in received.iterdir())
    asked(received, "b")
    assert sorted(each.name for each in received.iterdir()) == there
    assert not any(leases.alive(received, name) for name in names)


def test_c12_a_lease_that_is_a_link_belongs_to_nobody_and_is_not_followed(received, outside):
    name = "host-1-0123456789ab"
    (received / "leases.cache.db" / name).symlink_to(outside)
    (received / "leases.cache.db" / "host-2-0123456789ab").mkdir()
    add = "INSERT INTO leases VALUES(NULL, ?, 1.0, NULL)"
    written(received / "ledger.cache.db", (add, name), (add, "host-2-0123456789ab"))
    asked(received, "b")
    assert not leases.alive(received, name)


def test_the_name_of_a_host_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setattr(leases.socket, "gethostname", lambda: "../" * 100)
    lease = leases.hold(tmp_path)
    assert leases.alive(tmp_path, lease.name)
    assert [each.name for each in (tmp_path / "leases.cache.db").iterdir()] == [lease.name]
    lease.release()


# Links.


@pytest.mark.parametrize("ending", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("name", FILES)
def test_c12_a_database_that_is_a_link_is_refused(received, outside, name, ending):
    path = received / f"{name}{ending}"
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    refused(received, "must be a regular file, and is a symbolic link")
    path.unlink()
    path.symlink_to(outside.with_name("not there"))
    refused(received, "must be a regular file")


@pytest.mark.parametrize("name", FILES)
def test_c12_a_database_that_is_no_file_is_refused_and_nobody_waits_for_it(received, name):
    (received / name).unlink()
    os.mkfifo(received / name)
    refused(received, "must be a regular file")


def test_c12_a_folder_of_leases_that_is_a_link_is_refused(received, outside):
    place = received / "leases.cache.db"
    place.rmdir()
    place.symlink_to(outside.parent)
    with pytest.raises(StoreError, match="must be a folder, but is a symbolic link"):
        asked(received, "b")


def test_c12_a_lock_that_is_a_link_makes_no_file(received, outside):
    (received / "lock.cache.db").unlink()
    (received / "lock.cache.db").symlink_to(outside.with_name("new"))
    with pytest.raises(StoreError):
        DiskStore(received)


def test_c12_a_history_that_is_a_link_is_refused(tmp_path, outside):
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / FILE).symlink_to(outside.with_name("new"))
    with pytest.raises(StoreError, match="symbolic link"):
        FolderKeeper(folder).append("a", ["{}"], 60)


def test_links_to_the_folder_and_hard_links_in_it_are_fine(received, tmp_path):
    """People link their caches to another disk, and copy them with ``cp -al``."""
    (tmp_path / "link").symlink_to(received)
    os.link(received / "cache.db", tmp_path / "backup.db")
    assert asked(tmp_path / "link", "a").cached == [True]


@pytest.mark.parametrize("name", FILES)
def test_c12_a_journal_that_names_a_file_to_delete_is_refused(received, outside, name):
    """SQLite deletes the super-journal that a hot journal names, once nothing refers to it."""
    target = str(outside).encode()
    checksum = sum(target) & 0xFFFFFFFF
    record = b"".join(
        [
            (0x40000000 // 4096 + 1).to_bytes(4, "big"),
            target,
            len(target).to_bytes(4, "big"),
            checksum.to_bytes(4, "big"),
            b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7",
        ]
    )
    header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + (0).to_bytes(4, "big") + bytes(4) + (1).to_bytes(4, "big")
    header += (512).to_bytes(4, "big") + (4096).to_bytes(4, "big")
    (received / f"{name}-journal").write_bytes(header.ljust(512, b"\0") + record)
    refused(received, "names another file")


def test_a_journal_whose_transaction_ends_meanwhile_names_no_file(tmp_path, monkeypatch):
    journal = tmp_path / "cache.db-journal"
    journal.write_bytes(b"\0" * 512)
    opened = Path.open

    def ended(path, *how):
        path.unlink()
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", ended)
    folders.check_files(tmp_path, "cache.db")
    assert not journal.exists()


def test_a_journal_of_a_kill_is_rolled_back(received):
    (received / "cache.db-journal").write_bytes(b"")
    (received / "ledger.cache.db-journal").write_bytes(bytes(512))
    assert asked(received, "a").cached == [True]


# What runs inside SQLite.

ENDLESS = "WITH RECURSIVE e(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM e) SELECT count(*) FROM e"
LEDGER = [
    "CREATE TRIGGER t AFTER INSERT ON keys BEGIN DELETE FROM segments; END",
    f"CREATE TRIGGER t AFTER INSERT ON leases BEGIN {ENDLESS}; END",
    "CREATE VIEW v AS SELECT * FROM keys",
    "CREATE TABLE more(x CHECK(length(randomblob(1000000000)) > 0))",
    "CREATE INDEX i ON keys(upper(key))",
]
SHELF = [
    "CREATE TRIGGER t AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
    f"CREATE TRIGGER Settings_count_insert2 AFTER INSERT ON Cache FOR EACH ROW BEGIN {ENDLESS}; END",
    "CREATE INDEX Cache_more ON Cache (upper(key))",
    "CREATE VIEW v AS SELECT * FROM Cache",
    "CREATE VIRTUAL TABLE f USING fts5(x)",
]


@pytest.mark.parametrize(
    ("name", "statement"),
    [("ledger.cache.db", each) for each in LEDGER] + [("cache.db", each) for each in SHELF],
)
def test_c12_what_would_run_inside_a_statement_is_refused(received, name, statement):
    written(received / name, (statement,))
    refused(received, "which cachepipe does not create")


@pytest.mark.parametrize(("name", "table"), [("ledger.cache.db", "meta"), ("cache.db", "Cache")])
def test_c12_a_view_in_place_of_a_table_is_refused_unread(received, name, table):
    view = f"CREATE VIEW {table} AS {ENDLESS}"
    written(received / name, (f"DROP TABLE {table}",), (view,))
    begun = time.process_time()
    refused(received, "which cachepipe does not create")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("name", FILES)
def test_c12_a_trigger_under_a_name_of_sqlites_own_is_refused(received, name):
    table = "Cache" if name == "cache.db" else "keys"
    written(
        received / name,
        (f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN SELECT 1; END",),
        ("PRAGMA writable_schema = 1",),
        ("UPDATE sqlite_master SET sql = replace(sql, ' t ', ' sqlite_t ') WHERE name = 't'",),
        ("UPDATE sqlite_master SET name = 'sqlite_t' WHERE name = 't'",),
    )
    refused(received, "sqlite_t|malformed")


def test_statistics_of_sqlites_own_and_indexes_of_diskcaches_are_fine(tmp_path):
    cache = diskcache.Cache(str(tmp_path), tag_index=True, eviction_policy="least-frequently-used")
    cache["mine"] = 1
    with pytest.warns(match="eviction policy"):
        store = DiskStore(cache)
    store.close()
    cache.close()
    written(tmp_path / "ledger.cache.db", ("ANALYZE",))
    written(tmp_path / "cache.db", ("ANALYZE",))
    asked(tmp_path, "b")


def test_c12_a_ledger_that_lists_more_than_is_stored_is_read_in_the_time_of_what_is(received):
    with contextlib.closing(DiskStore(received)) as store:
        (key,) = [info.key for info in store.keys()]  # noqa: SIM118 - a store is no mapping
        digest = tables.interval_digest("", key, 0, 2**62)
        longer = "UPDATE intervals SET stop = ?, digest = ? WHERE owner = 0"
        written(received / "ledger.cache.db", (longer, 2**62, digest))
        assert [sample.payload for sample in store.samples(key)] == [b'"x"']


# Settings of diskcache.


def test_c12_settings_of_a_received_file_decide_nothing(received):
    """diskcache itself would make them pragmas, and arguments of a class."""
    for key, value in (
        ("sqlite_locking_mode", "exclusive"),
        ("sqlite_journal_mode", "delete"),
        ("disk_compress", 9),
        ("eviction_policy", "x" * 1000),
        ("cull_limit", 10**12),
    ):
        written(received / "cache.db", ("INSERT OR REPLACE INTO Settings VALUES(?, ?)", key, value))
    with pytest.warns(match="eviction policy"):
        assert asked(received, "a").cached == [True]
    with contextlib.closing(sqlite3.connect(received / "cache.db")) as shelf:
        assert dict(shelf.execute("SELECT * FROM Settings"))["eviction_policy"] == "none"
        assert shelf.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_c12_a_file_that_was_half_made_by_somebody_else_is_refused(received):
    written(
        received / "cache.db",
        ("DROP TRIGGER Settings_size_delete",),
        ("INSERT INTO Settings VALUES('sqlite_temp_store_directory', '/nowhere')",),
    )
    with pytest.raises(StoreError, match="settings that diskcache does not have"):
        DiskStore(received)


def test_a_file_that_was_half_made_by_diskcache_is_finished(received):
    written(received / "cache.db", ("DROP TRIGGER Settings_size_delete",))
    assert asked(received, "a").cached == [True]
    with contextlib.closing(sqlite3.connect(received / "cache.db")) as shelf:
        assert shelf.execute("SELECT 1 FROM sqlite_master WHERE name = 'Settings_size_delete'").fetchone()


# Where folders are.


def test_a_user_without_a_home_directory_is_told_to_name_a_folder(tmp_path, monkeypatch):
    """As in ``docker run --user 12345``."""

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "CACHEPIPE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StoreError, match="no home directory"):
        open_store()
    assert not [*tmp_path.iterdir()]


def test_full_durability_waits_until_the_names_of_new_folders_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    sync = folders.sync
    monkeypatch.setattr(folders, "sync", lambda folder: (synced.append(folder), sync(folder)))
    DiskStore(tmp_path / "process").close()
    assert not synced
    DiskStore(tmp_path / "a" / "b" / "cache", durability="full").close()
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "cache"}


@pytest.mark.parametrize("pid", ["9" * 20, "9" * 5000], ids=["long", "too long"])
def test_c12_a_process_is_named_whatever_the_name_of_its_lease_says(pid):
    assert not leases.process(f"{socket.gethostname()}-{pid}-0123456789ab").stopped
    assert leases.process(f"host-7-{pid}").name == "an unknown process"
