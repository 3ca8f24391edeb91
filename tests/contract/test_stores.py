"""The stores that come with cachepipe keep the public store contract, and raise our errors only."""

from __future__ import annotations

import sqlite3

import pytest

pytest.register_assert_rewrite("cachepipe.testing.contract")

from cachepipe import DiskStore, MemoryStore, OnlineAPI, Request, StoreError, open_store  # noqa: E402 - after the rewriting is asked for
from cachepipe.contract.draws import Draw  # noqa: E402 - likewise
from cachepipe.contract.intervals import IntervalSet  # noqa: E402 - likewise
from cachepipe.stores.remote.copies import Copies  # noqa: E402 - likewise
from cachepipe.stores.remote.session import Session  # noqa: E402 - likewise
from cachepipe.stores.remote.store import RemoteStore  # noqa: E402 - likewise
from cachepipe.testing import FaultyStore, MemoryEngine, ScriptedModel, StoreContract  # noqa: E402 - likewise


class TestMemoryStore(StoreContract):
    def make_store(self, tmp_path):
        return MemoryStore()


class TestDiskStore(StoreContract):
    def make_store(self, tmp_path):
        return DiskStore(tmp_path / "cache")


class TestDiskStoreWithFullDurability(StoreContract):
    def make_store(self, tmp_path):
        return DiskStore(tmp_path / "cache", durability="full")


class TestStoreThatIsAlwaysLocked(StoreContract):
    """Every write takes the way that it takes when another process is writing."""

    def make_store(self, tmp_path):
        store = FaultyStore(DiskStore(tmp_path / "cache"))
        store.locked = True
        return store


class TestRemoteStore(StoreContract):
    """The store that machines share, on the smallest engine."""

    def make_store(self, tmp_path):
        return RemoteStore(Session(MemoryEngine()))


class TestRemoteStoreWithCopies(StoreContract):
    """The same with copies on this machine."""

    def make_store(self, tmp_path):
        engine = MemoryEngine()
        return RemoteStore(Session(engine, copies=Copies(tmp_path / "local", engine.identity, 10)))


class TestValkeyStore(StoreContract):
    """The store that machines share, on a real Valkey server, with copies on this machine."""

    @pytest.fixture(autouse=True)
    def url(self, new_valkey_url):
        self.url = new_valkey_url()

    def make_store(self, tmp_path):
        return open_store(self.url)[0]


class TestPostgresStore(StoreContract):
    """The store that machines share, on a real PostgreSQL server."""

    @pytest.fixture(autouse=True)
    def url(self, new_postgres_url):
        self.url = new_postgres_url()

    def make_store(self, tmp_path):
        return open_store(self.url)[0]


READS = {
    "recall": lambda store, key: store.recall(Draw("-", key, "", 0), 1),
    "replay": lambda store, key: store.replay(Draw("-", key, "", 0), 1, IntervalSet()),
    "status": lambda store, key: store.status([(key, 0)]),
}


@pytest.mark.anyio
@pytest.mark.parametrize("read", READS)
async def test_c8_every_read_of_a_closed_store_says_that_it_was_closed(store, read):
    pipeline = OnlineAPI(ScriptedModel(), store)
    await pipeline.request(Request("p"))
    key = pipeline.key(Request("p"))
    READS[read](store, key)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        READS[read](store, key)


@pytest.mark.anyio
@pytest.mark.parametrize("read", READS)
async def test_c8_what_sqlite_says_of_a_damaged_ledger_is_a_store_error(tmp_path, read):
    store = DiskStore(tmp_path)
    pipeline = OnlineAPI(ScriptedModel(), store)
    await pipeline.request(Request("p"))
    with sqlite3.connect(tmp_path / "ledger.cache.db") as connection:
        for table in ("segments", "pending", "draws"):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
    connection.close()
    if read == "status":  # what is stored is told without the ledger
        with pytest.raises(StoreError):
            store.status([("0" * 64, 0)])
    else:
        with pytest.raises(StoreError):
            READS[read](store, pipeline.key(Request("p")))
    store.close()
