"""The stores that come with cachepipe keep the public store contract."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("cachepipe.testing.contract")

from cachepipe import DiskStore, MemoryStore  # noqa: E402 - after the rewriting is asked for
from cachepipe.testing import FaultyStore, StoreContract  # noqa: E402 - likewise


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
