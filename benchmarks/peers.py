"""The processes that benchmarks measure: other caches in environments of their own, and a server to ask.

``python -m benchmarks --peers`` makes what environments it needs, from PyPI, in the user's cache folder
(``CACHEPIPE_BENCHMARKS`` names another): one per peer, as they want different versions of the SDK. What
cannot be installed is reported, with the reason.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import platformdirs

from benchmarks.harness import ROOT, Timed, expect, leave_that_core

REQUIRES = {
    "cachesaver": ("cachesaver",),
    "dspy": ("dspy",),
    "langchain": ("langchain", "langchain-community", "langchain-openai"),
    "inspect": ("inspect-ai", "openai"),
    "litellm": ("litellm[proxy]", "diskcache"),  # its cache imports parts of the proxy
}
"""What pip installs for each peer."""

TITLES = {
    "bare": "bare openai client",
    "memory": "key + dict + SDK object",
    "cachepipe": "cachepipe",
    "cachesaver": "CacheSaver",
    "cachesaver-pipeline": "CacheSaver's pipeline",
    "dspy": "dspy",
    "langchain": "langchain SQLiteCache",
    "inspect": "inspect_ai",
    "litellm": "litellm, disk",
}
"""How tables name the workers."""


class NotInstallable(Exception):  # noqa: N818 - says what it is
    """A peer's environment could not be made."""


def folder() -> Path:
    """Return where the environments are."""
    named = os.environ.get("CACHEPIPE_BENCHMARKS")
    return (
        Path(named) if named else Path(platformdirs.user_cache_dir("cachepipe-benchmarks", appauthor=False))
    )


def environment(name: str) -> Path:
    """Return the Python of a peer's environment, made if there is none.

    Raises:
        NotInstallable: when it cannot be made; the message says why.
    """
    where = folder() / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python = where / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = where / "installed"
    if not done.exists():
        shutil.rmtree(where, ignore_errors=True)
        print(f"making an environment for {name} in {where} …", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", str(where)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIRES[name]],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR")]
                raise NotInstallable((errors or made.stderr.splitlines() or ["no reason given"])[-1])
        done.touch()
    return python


class Worker:
    """A process that uses one cache; see ``worker.py`` for what it does.

    Raises:
        NotInstallable: when its environment cannot be made, or its cache does not start.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.title = TITLES[name]
        peer = name.partition("-")[0]
        python = environment(peer) if peer in REQUIRES else Path(sys.executable)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("worker.py")), name],
            cwd=ROOT,
            env={**os.environ, "OPENAI_API_KEY": "none", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.version = self.call("version")["version"]
        except RuntimeError as error:
            self.close()
            raise NotInstallable(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something; ``receive`` gets the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive says why
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the answer to what was asked."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": f"it ended: {self._last_words()}"}
        if "failed" in answer:
            raise RuntimeError(f"{self.title}: {answer['failed']}")
        return answer

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask for something and return the answer."""
        self.send(do, **arguments)
        return self.receive()

    def ask(self, asks: Sequence[dict[str, Any]], namespace: str = "n", in_flight: int = 1) -> Timed:
        """Ask questions; the result is the texts of each."""
        told = self.call("ask", asks=list(asks), namespace=namespace, in_flight=in_flight)
        expect(not told["errors"], f"{self.title}: {collections.Counter(told['errors']).most_common(1)}")
        return Timed(told["seconds"], told["texts"])

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-1000:].strip()

    def kill(self) -> None:
        """End the process without a chance to write anything."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the process close its cache and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


class Server:
    """The server of ``server.py`` in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        leave_that_core(self._process.pid)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.base_url = f"{self.url}/v1"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def delay(self, seconds: float) -> None:
        """Let answers take so long from now on."""
        self._post("delay", {"seconds": seconds})

    def reset(self) -> dict[str, int]:
        """Return the calls and samples since the last time."""
        return self._post("reset", {})

    def _post(self, path: str, said: dict[str, Any]) -> dict[str, int]:
        body = json.dumps(said).encode()
        asked = urllib.request.Request(f"{self.url}/{path}", body, method="POST")  # noqa: S310 - likewise
        with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310 - our own server
            told: dict[str, int] = json.load(answer)
        return told


def available() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the peers that are there or could be installed, and why the others could not."""
    there, missing = {}, {}
    for name in REQUIRES:
        try:
            with Worker(name) as worker:
                there[name] = worker.version
        except NotInstallable as error:
            missing[name] = str(error)
    return there, missing


@contextlib.contextmanager
def workers(names: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """Start a worker for each name, and end them."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Worker(name)) for name in names}
