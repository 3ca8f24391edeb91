"""Copies of caches on real servers: runs of several processes on one machine, kills, forks and restarts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys

import forked
import pytest
from valkeys import ValkeyNode

from cachepipe import OnlineAPI, Request, StoreError, open_store
from cachepipe.runs import Occurrences
from cachepipe.stores.base import Discard
from cachepipe.stores.remote.urls import Asked
from cachepipe.testing import ScriptedModel

WORKER = """
import asyncio, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    cache_scope = "m"

    async def request(self, request):
        return Response([f"{request.prompt} {number}" for number in range(request.n)])

async def main():
    async with OnlineAPI(Model(), sys.argv[1], ordered=False) as pipeline:
        for number in range(int(sys.argv[2]), 400):
            await pipeline.request(Request(f"p{number % 100}"))
            print(number, flush=True)

asyncio.run(main())
"""


@pytest.fixture(params=["valkey", "postgres"])
def url(request):
    return request.getfixturevalue(f"new_{request.param}_url")()


async def answers(url, count=100, model=None):
    async with OnlineAPI(model or ScriptedModel(cache_scope="m"), url, ordered=False) as pipeline:
        return [(await pipeline.request(Request(f"p{number}"))).data for number in range(count)]


def known(store):
    """Return how many of the draws of a store this machine has copies of."""
    Occurrences()
    assert store.session.local.ready()
    draws = [info.draw for info in store.draws()]
    return len(draws), sum(store.session.local.recall(draw, 1) is not None for draw in draws)


@pytest.mark.filterwarnings("ignore::cachepipe.SharedDraw")  # the leases of the killed may not have ended yet
def test_workers_that_are_killed_while_they_copy_leave_a_copy_that_is_right(url):
    for seen in (10, 150, 60):
        worker = forked.Popen(
            [sys.executable, "-c", WORKER, url, str(seen)], stdout=subprocess.PIPE, text=True
        )
        for line in worker.stdout:
            if int(line) >= seen + 120:
                break
        worker.send_signal(signal.SIGKILL)
        worker.stdout.close()
        worker.wait()
    first = asyncio.run(answers(url))
    assert asyncio.run(answers(url)) == first
    store, _ = open_store(url)
    samples = {sample.id for info in store.draws() for sample in store.samples(info.draw.key)}
    for info in store.draws():
        grant = store.recall(info.draw, 1)
        if grant is None:  # its worker was killed before the sample came
            assert store.status([(info.draw.key, index) for index in info.indices]) != ["stored"]
            continue
        assert {sample.id for sample in grant.samples} <= samples
    store.close()


def test_what_one_process_has_drawn_another_one_knows(url):
    asyncio.run(answers(url, 20))
    store, _ = open_store(url)
    assert known(store) == (20, 20)
    key = next(store.keys()).key
    store.write([Discard(key, 0, "it is wrong")])
    assert known(store) == (20, 19)
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_uses_the_copies_of_its_parent(url):
    text = """
import asyncio, os, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    cache_scope = "m"

    async def request(self, request):
        return Response([request.prompt] * request.n)

def ask():
    for number in range(5):
        asyncio.run(pipeline.request(Request(f"p{number}")))

pipeline = OnlineAPI(Model(), sys.argv[1], ordered=False)
ask()
pipeline.store.session.local.follow()
child = os.fork()
if not child:
    ask()
    copies = pipeline.store.session.local
    draws = [info.draw for info in pipeline.store.draws()]
    os._exit(0 if all(copies.recall(draw, 1) for draw in draws) else 1)
assert os.waitpid(child, 0)[1] == 0
ask()
"""
    done = forked.run(
        [sys.executable, "-c", text, url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_copies_do_not_mix_with_a_valkey_server_that_is_restored_from_a_backup(tmp_path):
    server = ValkeyNode(tmp_path / "server")
    url, data = server.url(), tmp_path / "server" / "appendonlydir"
    asyncio.run(answers(url, 3))
    shutil.copytree(data, tmp_path / "backup")
    asyncio.run(answers(url, 6))
    store, _ = open_store(url)
    assert known(store) == (6, 6)
    draws = [info.draw for info in store.draws()]
    server.kill()
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "backup", data)
    server.start()
    assert known(store) == (3, 0)
    assert sum(store.recall(draw, 1) is not None for draw in draws) == 3
    store.close()
    model = ScriptedModel(cache_scope="m")
    assert len(asyncio.run(answers(url, 6, model))) == 6
    assert len(model.calls) == 3
    server.close()


def test_copies_do_not_mix_with_tables_that_are_restored_from_a_backup(new_postgres_url):
    url = new_postgres_url()
    asyncio.run(answers(url, 3))
    store, _ = open_store(url)
    engine = store.session.engine
    for table in ("keys", "ledger", "samples"):
        engine._ask(f"create table SCHEMA.saved_{table} as select * from SCHEMA.{table}")  # noqa: S608 - names are above
    asyncio.run(answers(url, 6))
    store.session.local.follow()
    assert known(store) == (6, 6)
    for table in ("keys", "ledger", "samples"):
        engine._ask(f"truncate SCHEMA.{table}")
        engine._ask(f"insert into SCHEMA.{table} select * from SCHEMA.saved_{table}")  # noqa: S608 - likewise
    assert known(store) == (3, 0)
    store.close()


def test_copies_do_not_mix_with_a_valkey_server_that_takes_the_data_of_another_one(tmp_path):
    servers = [ValkeyNode(tmp_path / name) for name in ("one", "two")]
    first, second = (server.client() for server in servers)
    asyncio.run(answers(servers[0].url(), 3))
    second.replicaof("127.0.0.1", servers[0].port)
    servers[1].wait_until_in_step()
    second.replicaof("NO", "ONE")
    asyncio.run(answers(servers[0].url(), 6))
    store, _ = open_store(servers[0].url())
    assert known(store) == (6, 6)
    first.replicaof("127.0.0.1", servers[1].port)
    servers[0].wait_until_in_step()
    first.replicaof("NO", "ONE")
    assert known(store) == (3, 0)
    store.close()
    for each in (first, second, *servers):
        each.close()


def test_the_url_or_the_environment_says_where_copies_are(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEPIPE_LOCAL", "off")
    assert Asked("valkey://h").local() is None
    assert Asked(f"valkey://h?local={tmp_path}").local() == tmp_path
    monkeypatch.setenv("CACHEPIPE_LOCAL", str(tmp_path))
    assert Asked("valkey://h").local() == tmp_path
    assert Asked("valkey://h?local=off").local() is None
    monkeypatch.delenv("CACHEPIPE_LOCAL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Asked("valkey://h").local() == tmp_path / "cachepipe" / "local"
    with pytest.raises(StoreError, match="local_mb=no"):
        Asked("valkey://h?local_mb=no").number("local_mb", 1)


def test_a_store_without_copies_is_a_store(url):
    without = url + "&local=off"
    store, _ = open_store(without)
    assert store.session.local is None
    assert asyncio.run(answers(without, 5)) == asyncio.run(answers(without, 5))
    store.close()
