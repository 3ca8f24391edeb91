"""What does a hit through the proxy cost: POSTs of 2 KB over 32 connections, answers of 1 KB, ledger on?

*Known draws* are a rerun under a new run label in a server that has served the questions before, or that
has just been started; *new draws* the same questions from another namespace, which the ledger has to note.
The floor is the same server, uvicorn with httptools and uvloop, whose application reads the body and answers
with a constant; the controls are the proxy's own ``/healthz``, and a bare asyncio protocol that looks for the
end of the body and answers with a constant: what no HTTP server in Python can do without.

Requests come from a process of their own, which has written them before the clock starts. As it shares the
processors with the server, the time that the server's process spends is taken too: what it would take with a
core of its own. That is the steadier figure. After each round, status, texts, flags, the number of calls
upstream and (of new draws) the ledger are compared with what they should be.

    python -m benchmarks.proxy load     lines of JSON in, requests out, their answers into a file
    python -m benchmarks.proxy floor    prints the ports of the floor and of the bare protocol
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson

from benchmarks import data
from benchmarks.forwarding import Forwarding
from benchmarks.harness import (
    ROOT,
    Count,
    Entry,
    Goals,
    Role,
    Sizes,
    Table,
    Tally,
    Timed,
    equal,
    expect,
    leave_that_core,
)
from benchmarks.peers import Server, environment

CONNECTIONS = 32
_SDK = (  # what openai-python sends beside the host, the key and the length
    "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nAccept: application/json\r\n"
    "Content-Type: application/json\r\nUser-Agent: OpenAI/Python 3.51.0\r\nX-Stainless-Lang: python\r\n"
    "X-Stainless-Package-Version: 3.51.0\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\n"
    "X-Stainless-Runtime: CPython\r\nX-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer none\r\n"
    "X-Stainless-Async: async:asyncio\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
)
_CHAT = "/v1/chat/completions"
_LITELLM = "litellm's proxy, memory cache"


def body(number: int) -> bytes:
    """Return the body of a question: 2 KB."""
    return orjson.dumps(
        {
            "messages": [
                {"role": "system", "content": data.text("system:", 900)},
                {"role": "user", "content": data.text(f"question {number}:", 900)},
            ],
            "model": "mock",
            "temperature": 0.7,
            "max_completion_tokens": 400,
        }
    )


# The process that asks.


class _Connection(asyncio.Protocol):
    """Asks what is next as soon as it has an answer."""

    def __init__(
        self,
        waiting: list[tuple[int, bytes]],
        answers: list[bytes],
        latencies: list[float],
        done: asyncio.Event,
    ) -> None:
        self._waiting, self._answers, self._latencies, self._done = waiting, answers, latencies, done
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self._done.set()

    def next(self) -> None:
        if not self._waiting:
            self._transport.close()
            return
        self._place, asked = self._waiting.pop()
        self._asked = time.perf_counter()
        self._transport.write(asked)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._read = read = self._read + data if self._read else data
        end = read.find(b"\r\n\r\n")
        if end < 0:
            return
        at = read.find(b"content-length: ")
        if len(read) >= end + 4 + int(read[at + 16 : read.find(b"\r\n", at)]):
            self._latencies.append(time.perf_counter() - self._asked)
            self._answers[self._place] = read
            self._read = b""
            self.next()


async def _ask(port: int, asked: Sequence[bytes], connections: int) -> tuple[float, list[bytes], list[float]]:
    """Ask all of it, in order; return the seconds that took, the answers, and the seconds of each."""
    waiting, answers = list(enumerate(asked))[::-1], [b""] * len(asked)
    loop = asyncio.get_running_loop()
    made, ends = [], []
    latencies: list[float] = []
    for _ in range(min(connections, len(asked))):
        ends.append(asyncio.Event())
        there = await loop.create_connection(
            lambda: _Connection(waiting, answers, latencies, ends[-1]), "127.0.0.1", port
        )
        made.append(there[1])
    start = time.perf_counter()
    for each in made:
        each.next()
    for end in ends:
        await end.wait()
    return time.perf_counter() - start, answers, latencies


def _request(port: int, path: str, content: bytes | None, headers: str = "") -> bytes:
    host = f"Host: 127.0.0.1:{port}\r\n{headers}"
    if content is None:
        return f"GET {path} HTTP/1.1\r\n{host}\r\n".encode()
    head = f"POST {path} HTTP/1.1\r\n{host}{_SDK}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _told(answer: bytes) -> dict[str, Any]:
    """Return what is to be checked of an answer."""
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    named = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if named.get("content-encoding") == "gzip":
        content = gzip.decompress(content)
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (KeyError, ValueError):
        text = content.decode("latin-1")[:500]
    kept = {name: named[name] for name in ("cache-status", "x-cachepipe-indices") if name in named}
    return {"status": int(status.split(" ")[1] if status else 0), "text": text, **kept}


def _load() -> None:
    """Ask what the lines of the standard input say, until its end."""
    bodies: dict[int, bytes] = {}
    try:
        from uvloop import run  # noqa: PLC0415 - not there on every system
    except ImportError:
        run = asyncio.run
    for line in sys.stdin:
        told = json.loads(line)
        numbers = range(told["questions"])
        for number in numbers:
            if number not in bodies:
                bodies[number] = body(number)
        asked = [
            _request(told["port"], path, None if told["get"] else bodies[number], told["headers"])
            for path in told["paths"]
            for number in numbers
        ]
        try:
            seconds, answers, latencies = run(_ask(told["port"], asked, told["connections"]))
            done: dict[str, Any] = {"seconds": seconds, "answers": list(map(_told, answers))}
            done["latencies"] = latencies
        except OSError as error:
            done = {"failed": str(error)}
        Path(told["to"]).write_text(json.dumps(done), encoding="utf-8")
        print("done", flush=True)


@dataclass(frozen=True)
class Asked(Timed):
    """What was answered, and the seconds that each answer has taken."""

    latencies: list[float]


class _Load:
    """The process that asks."""

    def __init__(self, folder: Path) -> None:
        self._to = folder / "answers.json"
        self._process = _started([sys.executable, "-m", "benchmarks.proxy", "load"])
        self.pid = self._process.pid
        leave_that_core(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _ended(self._process)

    def ask(
        self,
        port: int,
        paths: Sequence[str],
        questions: int,
        *,
        get: bool = False,
        connections: int = CONNECTIONS,
        headers: str = "",
    ) -> Asked:
        """Ask all questions at each path; the result is what is to be checked of each answer."""
        asked = {"port": port, "paths": paths, "questions": questions, "get": get, "connections": connections}
        asked["headers"] = headers
        self._process.stdin.write(json.dumps({**asked, "to": str(self._to)}) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError("the process that asks has ended")
        told = json.loads(self._to.read_text(encoding="utf-8"))
        if "failed" in told:
            raise RuntimeError(told["failed"])
        return Asked(told["seconds"], told["answers"], told["latencies"])


# The processes that answer.


def _started(command: list[str], **options: Any) -> Any:
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, **options)


def _ended(process: Any) -> None:
    process.stdin.close()
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def cpu_seconds(pid: int) -> float | None:
    """Return how long a process has been on a processor; None where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    try:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9
    except (OSError, ValueError, IndexError):
        return None


class _Proxy:
    """``cachepipe serve`` in front of the server, with its cache in a folder."""

    def __init__(self, upstream: str, folder: Path, *options: str) -> None:
        self._upstream, self._folder, self._options = upstream, folder, options
        self._process: Any = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        _ended(self._process)

    @property
    def pid(self) -> int:
        """Its process."""
        pid: int = self._process.pid
        return pid

    def start(self) -> None:
        """Start it, or start it again."""
        if self._process is not None:
            _ended(self._process)
        serve = [sys.executable, "-m", "cachepipe", "serve", "--upstream", self._upstream, "--cache"]
        self._process = _started(
            [*serve, str(self._folder), "--port", "0", "--log", "errors", "--json", *self._options]
        )
        told = self._process.stdout.readline()
        expect(bool(told), "cachepipe serve has ended before it listened")
        self.port = int(json.loads(told)["url"].rpartition(":")[2])

    def drawn(self, namespaces: Sequence[str]) -> list[int]:
        """Return how many samples the ledger holds of each namespace, as the proxy tells."""
        listed = _get(f"http://127.0.0.1:{self.port}/cachepipe/api/namespaces")["items"]
        drawn = {each["namespace"]: each["samples"] for each in listed}
        return [drawn.get(namespace, 0) for namespace in namespaces]


class _LiteLLM:
    """litellm's proxy with its memory cache, in the environment of its own."""

    def __init__(self, upstream: str, folder: Path) -> None:
        python = environment("litellm")
        settings = folder / "litellm.yaml"
        settings.write_text(  # JSON is YAML
            json.dumps(
                {
                    "model_list": [
                        {
                            "model_name": "mock",
                            "litellm_params": {
                                "model": "openai/mock",
                                "api_base": upstream,
                                "api_key": "none",
                            },
                        }
                    ],
                    "litellm_settings": {
                        "cache": True,
                        "cache_params": {"type": "local"},
                        "num_retries": 0,
                        "telemetry": False,
                    },
                }
            ),
            encoding="utf-8",
        )
        with socket.socket() as there:
            there.bind(("127.0.0.1", 0))
            self.port = there.getsockname()[1]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        command = [str(python.with_name("litellm")), "--config", str(settings), "--host", "127.0.0.1"]
        self._process = _started(
            [*command, "--port", str(self.port), "--num_workers", "1"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_LOG": "ERROR",
                # Without a key of its own it checks none, which is less work.
                "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
            },
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        for _ in range(240):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError, ValueError):
                _get(f"http://127.0.0.1:{self.port}/health/liveliness")
                return self
            time.sleep(0.5)
        self._log.seek(0)
        words = self._log.read()[-1000:].strip()
        self.__exit__()
        raise RuntimeError(f"litellm's proxy does not start: {words}")

    def __exit__(self, *_: object) -> None:
        _ended(self._process)
        self._log.close()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own servers
        return json.load(answer)


class _Constant(asyncio.Protocol):
    """Answers whatever ends a body with a constant."""

    written = b""

    def __init__(self) -> None:
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read = read = self._read + data if self._read else data
        end = read.find(b"\r\n\r\n")
        if end < 0:
            return
        at = max(read.find(b"Content-Length: ", 0, end), read.find(b"content-length: ", 0, end))
        if len(read) >= end + 4 + int(read[at + 16 : read.find(b"\r\n", at)]):
            self._read = b""
            self._transport.write(self.written)  # type: ignore[attr-defined]


def _constant() -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers as many as a hit has, and a body as long."""
    choice = {"index": 0, "message": {"role": "assistant", "content": data.text("constant:", 990)}}
    usage = {"prompt_tokens": 200, "completion_tokens": 200, "total_tokens": 400}
    told = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "mock"}
    content = orjson.dumps({**told, "choices": [{**choice, "finish_reason": "stop"}], "usage": usage})
    head = [
        (b"content-type", b"application/json"),
        (b"x-cachepipe-key", b"0" * 64),
        (b"x-cachepipe-duplicated", b"false"),
        (b"x-cachepipe-cached", b"true"),
        (b"x-cachepipe-indices", b"0"),
        (b"cache-status", b"cachepipe; hit"),
        (b"content-length", b"%d" % len(content)),
    ]
    return head, content


async def _application(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    head, content = _CONSTANT
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": content})


async def _serve_constants() -> None:
    import uvicorn  # noqa: PLC0415 - an extra

    head, content = _CONSTANT
    lines = b"".join(b"%b: %b\r\n" % pair for pair in head)
    _Constant.written = b"HTTP/1.1 200 OK\r\n%b\r\n%b" % (lines, content)
    loop = asyncio.get_running_loop()
    bare = await loop.create_server(_Constant, "127.0.0.1", 0)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    settings: dict[str, Any] = {"lifespan": "off", "log_config": None, "timeout_keep_alive": 75}
    server = uvicorn.Server(
        uvicorn.Config(
            _application,
            http="httptools",
            ws="none",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            **settings,
        )
    )
    print(json.dumps([listener.getsockname()[1], bare.sockets[0].getsockname()[1]]), flush=True)
    await server.serve(sockets=[listener])


_CONSTANT = _constant()


class _Floor:
    """The process that answers with a constant."""

    def __init__(self) -> None:
        self._process = _started([sys.executable, "-m", "benchmarks.proxy", "floor"])
        self.port, self.bare_port = json.loads(self._process.stdout.readline() or "[0, 0]")
        expect(bool(self.port), "the floor has ended before it listened")
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _ended(self._process)


# The tables.


class _Measured:
    """One kind of request: what it asks, whom, and what it has taken in each round."""

    def __init__(self, name: str, role: Role, operations: int) -> None:
        self.name, self.role, self.operations = name, role, operations
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def entries(
        self,
        ask: Callable[[Any], Timed],
        pid: Callable[[], int],
        check: Callable[[Any, Any], Any],
        prepare: Callable[[int], Any] = lambda _: None,
        **goals: Goals,
    ) -> list[Entry]:
        """Return the entry that asks, and another that is the time of the server's process meanwhile."""

        def call(prepared: Any) -> Timed:
            before = cpu_seconds(pid())
            timed = ask(prepared)
            after = cpu_seconds(pid())
            self.seconds.append(timed.seconds)
            self.cpu.append(0.0 if before is None or after is None else after - before)
            return timed

        cpu_goals = {
            kind: {_cpu(name): goal for name, goal in compared.items()} for kind, compared in goals.items()
        }
        entry = Entry(self.name, call, check, self.operations, self.role, prepare=prepare, **goals)
        if cpu_seconds(os.getpid()) is None:
            return [entry]
        return [
            entry,
            Entry(
                _cpu(self.name),
                lambda _: Timed(self.cpu[-1], None),
                lambda _got, _prepared: None,
                self.operations,
                self.role,
                **cpu_goals,
            ),
        ]

    def figures(self) -> dict[str, float]:
        """Return how many there are in a second, and in a second of the server's process."""
        times = {"hits/s": self.seconds[1:] or self.seconds, "hits per CPU second": self.cpu[1:] or self.cpu}
        return {
            name: round(self.operations / statistics.median(each))
            for name, each in times.items()
            if any(each)
        }


def _cpu(name: str) -> str:
    return f"{name}: server's CPU"


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table | Tally]]:
    """Yield a table of times, and how many hits that makes in a second."""
    with Server() as upstream, _Load(folder) as load, _Floor() as floor, contextlib.ExitStack() as stack:
        proxy = stack.enter_context(_Proxy(upstream.base_url, folder / "cache"))
        measured = _Hits(upstream, load, floor, proxy, sizes.pick(1000, 40))
        if "litellm" in sizes.peers:
            peer = stack.enter_context(_LiteLLM(upstream.base_url, folder))
            measured.add_peer(peer, sizes.pick(200, 5))
        rows = measured.rows
        goals: dict[str, Any] = {} if sizes.check else {"hits per CPU second": ("≥", 8000.0)}
        if cpu_seconds(os.getpid()) is None:
            goals = {} if sizes.check else {"hits/s": ("≥", 8000.0)}
        forwarding = Forwarding(sizes, folder, load, floor, cpu_seconds, _Proxy)
        yield [
            Table(f"{measured.operations:,} requests over {CONNECTIONS} connections", measured.entries),
            Tally(
                "the same, a second",
                ["hits/s", "hits per CPU second"],
                [
                    Count(row.name, row.figures, row.role, goals if row.role == "subject" else {})
                    for row in rows
                ],
            ),
            *forwarding.tallies(),
        ]


_FLOOR = "uvicorn, a constant"
_PASSES = 2


class _Hits:
    """The entries, and the cache that they look into."""

    def __init__(self, upstream: Server, load: _Load, floor: _Floor, proxy: _Proxy, questions: int) -> None:
        self.upstream, self.load, self.proxy, self.questions = upstream, load, proxy, questions
        self.operations = questions * _PASSES
        self.numbers = itertools.count()
        self.rows: list[_Measured] = []
        self.entries: list[Entry] = []
        filled = load.ask(proxy.port, [f"/ns/known@0{_CHAT}"], questions).result
        expect({each["status"] for each in filled} == {200}, "the cache could not be filled")
        self.texts = [each["text"] for each in filled]
        upstream.reset()
        constant = json.loads(_CONSTANT[1])["choices"][0]["message"]["content"]
        self._constant("bare protocol, a constant", "control", floor, floor.bare_port, _CHAT, constant)
        self._constant(_FLOOR, "floor", floor, floor.port, _CHAT, constant)
        self._constant(
            "the proxy's /healthz", "control", proxy, None, "/healthz", '{"status":"ok"}', get=True
        )
        self._ours()

    def _row(self, name: str, role: Role = "subject", operations: int | None = None) -> _Measured:
        row = _Measured(name, role, operations or self.operations)
        self.rows.append(row)
        return row

    def _constant(
        self, name: str, role: Role, server: Any, port: int | None, path: str, text: str, *, get: bool = False
    ) -> None:
        def ask(_: Any) -> Timed:
            return self.load.ask(port or server.port, [path] * _PASSES, self.questions, get=get)

        def right(got: list[dict[str, Any]], _: Any) -> None:
            equal([(each["status"], each["text"]) for each in got], [(200, text)] * self.operations)

        against = {} if name in (_FLOOR, "bare protocol, a constant") else {_FLOOR: None}
        self.entries += self._row(name, role).entries(ask, lambda: server.pid, right, against=against)

    def _ours(self) -> None:
        def known(_: int) -> list[str]:
            return [f"/ns/known@{next(self.numbers)}" for _ in range(_PASSES)]

        def restarted(number: int) -> list[str]:
            self.proxy.start()
            return known(number)[:1]

        def new(_: int) -> list[str]:
            return [f"/ns/new-{next(self.numbers)}" for _ in range(_PASSES)]

        def ask(places: list[str]) -> Timed:
            return self.load.ask(self.proxy.port, [f"{place}{_CHAT}" for place in places], self.questions)

        def right(got: list[dict[str, Any]], places: list[str]) -> None:
            self.are_hits(got, len(places))
            expect({each["cache-status"] for each in got} == {"cachepipe; hit"}, "an answer was no hit")
            expect({each["x-cachepipe-indices"] for each in got} == {"0"}, "a sample was not the first")

        def noted(got: list[dict[str, Any]], places: list[str]) -> None:
            right(got, places)
            drawn = self.proxy.drawn([place.removeprefix("/ns/") for place in places])
            expect(drawn == [self.questions] * _PASSES, f"the ledger holds {drawn} draws")

        cold = self._row("known draw, server just started", operations=self.questions)
        for row, prepare, check, more in (
            (cold, restarted, right, {}),
            (self._row("known draw"), known, right, {"faster": {_LITELLM: 50.0}}),
            (self._row("new draw"), new, noted, {"faster": {_LITELLM: 50.0}}),
        ):
            self.entries += row.entries(
                ask, lambda: self.proxy.pid, check, prepare, against={_FLOOR: None}, **more
            )

    def add_peer(self, peer: _LiteLLM, questions: int) -> None:
        """Let litellm's proxy answer some of the questions, too."""
        filled = self.load.ask(peer.port, [_CHAT], questions).result
        expect({each["status"] for each in filled} == {200}, f"litellm could not be filled: {filled[0]}")
        time.sleep(1)  # it writes in tasks of its own
        texts = [each["text"] for each in self.load.ask(peer.port, [_CHAT], questions).result]
        self.upstream.reset()

        def ask(_: Any) -> Timed:
            return self.load.ask(peer.port, [_CHAT], questions)

        def right(got: list[dict[str, Any]], _: Any) -> None:
            equal([(each["status"], each["text"]) for each in got], [(200, text) for text in texts])
            self.no_calls()

        row = self._row(_LITELLM, "peer", questions)
        entries = row.entries(ask, lambda: peer.pid, right)
        self.entries[-6:-6] = entries  # before those that are compared with it

    def are_hits(self, got: list[dict[str, Any]], passes: int) -> None:
        """Check the answers to all questions, so many times."""
        equal([(each["status"], each["text"]) for each in got], [(200, text) for text in self.texts] * passes)
        self.no_calls()

    def no_calls(self) -> None:
        """Check that nothing was asked upstream."""
        told = self.upstream.reset()
        expect(not told["calls"], f"{told['calls']} calls were made upstream")


if __name__ == "__main__":
    if sys.argv[1] == "load":
        _load()
    else:
        try:
            from uvloop import run
        except ImportError:
            from asyncio import run
        run(_serve_constants())
