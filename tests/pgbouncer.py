"""PgBouncer for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
"""It comes from the system's packages; None if it is not installed."""


class PgBouncer:
    """A pooler before a server, in transaction mode: each transaction may get another connection."""

    def __init__(self, server):
        with socket.socket() as probe:
            probe.bind((server.host, 0))
            self.port = probe.getsockname()[1]
        self._server = server
        settings = server.folder / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={server.host} port={server.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = {server.host}\nlisten_port = {self.port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\n"
        )
        self._process = subprocess.Popen(
            [PROGRAM, "--quiet", settings],
            cwd=server.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **server.as_user,
        )

    def url(self, more=""):
        """Return the URL of a cache behind the pooler."""
        return self._server.url(more).replace(f":{self._server.port}/", f":{self.port}/")

    def close(self):
        """Stop the pooler."""
        self._process.kill()
        self._process.wait()
