"""What does the proxy add to a call? Misses, tails, streams, and several worker processes.

The upstream answers with a constant, or streams events, each in a write of its own. Where there are
several processors, the proxy has one for itself. The processor time of its processes is the steadier figure:
``per CPU second`` is what a core of its own would answer. A frame's time is the difference between long and
short streams, so it contains no part of the request.

    python -m benchmarks.forwarding upstream          prints the port of the upstream with streams
    python -m benchmarks.forwarding streams …         reads streams, and prints when their first events came
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks.harness import ROOT, Count, Sizes, Tally, expect, leave_that_core, use_all_cores

CHAT = "/v1/chat/completions"
_GAP = 0.05  # seconds between two frames of a stream
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "mock"}


# The upstream.


def _frame(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    event = b"data: %b\n\n" % orjson.dumps({**_CHUNK, "choices": [choice]})
    return b"%x\r\n%b\r\n" % (len(event), event)


class _Streams(asyncio.Protocol):
    """Answers each request with as many frames as it wants tokens."""

    def __init__(self) -> None:
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, content = self._read.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length: ")
        if end and len(content) >= int(head[at + 16 :].partition(b"\r\n")[0]):
            self._read = b""
            self._transport.write(_HEAD + _frame({"role": "assistant", "content": ""}))
            self._send(0, orjson.loads(content)["max_completion_tokens"])

    def _send(self, number: int, frames: int) -> None:
        if number < frames:
            self._transport.write(_frame({"content": f" word{number}"}))
            asyncio.get_running_loop().call_later(_GAP, self._send, number + 1, frames)
        else:
            self._transport.write(_frame({}, "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def _serve_streams() -> None:
    server = await asyncio.get_running_loop().create_server(_Streams, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# Who reads the streams.


class _Reader(asyncio.Protocol):
    """Reads one stream to its end."""

    def __init__(self, asked: bytes) -> None:
        self._asked = asked
        self._tail = b""
        self.first = 0.0
        self.whole: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._begun = time.perf_counter()
        self._transport.write(self._asked)

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.perf_counter() - self._begun
        self._tail = (self._tail + data)[-32:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            self.whole.set_result(b"data: [DONE]" in self._tail)
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.whole.done():
            self.whole.set_result(False)


async def _read_streams(port: int, namespace: str, streams: int, frames: int, *, alone: bool) -> None:
    """Read streams, all at once or one after the other; print when their first events came."""
    loop = asyncio.get_running_loop()

    async def read(number: int) -> _Reader:
        body = {
            "model": "mock",
            "messages": [{"role": "user", "content": f"{namespace}: stream {number}"}],
            "max_completion_tokens": frames,
            "stream": True,
        }
        content = orjson.dumps(body)
        head = f"POST /ns/{namespace}{CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        asked = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        _, reader = await loop.create_connection(lambda: _Reader(asked), "127.0.0.1", port)
        await reader.whole
        return reader

    if alone:
        readers = [await read(number) for number in range(streams)]
    else:
        readers = await asyncio.gather(*map(read, range(streams)))
    whole = sum(reader.whole.result() for reader in readers)
    print(json.dumps({"whole": whole, "first": [reader.first for reader in readers]}))


def _streams(port: int, namespace: str, streams: int, frames: int, *, alone: bool = False) -> dict[str, Any]:
    """Return how many streams came as a whole, and when the first event of each came."""
    command = [sys.executable, "-m", "benchmarks.forwarding", "streams"]
    arguments = [str(port), namespace, str(streams), str(frames), str(int(alone))]
    done = subprocess.run([*command, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# The figures.


class Forwarding:
    """Measures what the proxy adds.

    Args:
        sizes: how much is done.
        folder: a folder for the caches.
        load: the process that asks.
        floor: an upstream that answers with a constant.
        cpu: returns the processor seconds of a process.
        serve: starts a proxy: takes the URL of its upstream, the folder of its cache and options.
    """

    def __init__(
        self,
        sizes: Sizes,
        folder: Path,
        load: Any,
        floor: Any,
        cpu: Callable[[int], float | None],
        serve: Callable[..., Any],
    ) -> None:
        self._sizes, self._folder, self._load, self._floor = sizes, folder, load, floor
        self._constant = floor.bare_port
        self._cpu, self._serve = cpu, serve
        self._questions = sizes.pick(1000, 20)
        self._rounds = sizes.pick(7, 1)

    def tallies(self) -> list[Tally]:
        """Return what is to be counted."""
        many = ["per CPU second", "p50 ms", "p99 ms", "p99 / p50"]
        tail: dict[str, Any] = {} if self._sizes.check else {"p99 / p50": ("≤", 4.0)}
        goals = {"known draw": 12_000.0, "new draw": 8000.0, "miss": 3000.0}
        if self._sizes.check:
            goals = {}
        added = {} if self._sizes.check else {"added p99 ms": ("≤", 1.5)}
        streamed: dict[str, Any] = {"streams": self._streams_at_once}
        if not self._sizes.check:
            streamed = {**streamed, "µs a frame": ("≤", 20.0), "first event, added ms": ("≤", 0.5)}
        scaled: dict[str, Any] = {} if self._sizes.check else {"times one worker": ("≥", 3.0)}
        rows = [
            Count(
                kind,
                lambda kind=kind: self._crowd(kind),
                "control" if kind == "mode bypass" else "subject",
                {**({"per CPU second": ("≥", goals[kind])} if kind in goals else {}), **tail},
            )
            for kind in ("known draw", "new draw", "miss", "mode bypass")
        ]
        return [
            Tally("through the proxy, 32 connections, an upstream that answers with a constant", many, rows),
            Tally(
                "what the proxy adds to one connection",
                ["added p50 ms", "added p99 ms"],
                [
                    Count(kind, lambda kind=kind: self._alone(kind), goals=added)
                    for kind in ("known draw", "miss")
                ],
            ),
            Tally(
                "streams, all at once",
                ["streams", "µs a frame", "first event, added ms"],
                [Count("streams that are recorded", self._streamed, goals=streamed)],
            ),
            Tally(
                "known draws with a core for each process",
                ["hits/s", "times one worker"],
                [
                    Count(f"{number} workers", lambda number=number: self._scaled(number), goals=goals)
                    for number, goals in ((1, {}), (2, {}), (4, scaled))
                ],
            ),
        ]

    @property
    def _streams_at_once(self) -> int:
        return self._sizes.pick(512, 4)

    @contextlib.contextmanager
    def _proxy(self, name: str, upstream: int, *options: str) -> Iterator[Any]:
        url = f"http://127.0.0.1:{upstream}/v1"
        with self._serve(url, self._folder / name, *options) as proxy:
            for other in (self._load, self._floor):
                leave_that_core(other.pid)
            yield proxy

    def _paths(self, kind: str, number: int) -> list[str]:
        """Return the path of a round: a run that repeats, a new namespace, or further samples of one run."""
        return {
            "known draw": [f"/ns/known@{number}{CHAT}"],
            "new draw": [f"/ns/new-{number}{CHAT}"],
            "miss": [f"/ns/known@all{CHAT}"],
            "mode bypass": [f"/ns/known@all{CHAT}"],
        }[kind]

    def _options(self, kind: str) -> dict[str, Any]:
        return {"headers": "x-cachepipe-mode: bypass\r\n"} if kind == "mode bypass" else {}

    def _crowd(self, kind: str) -> dict[str, float]:
        cpu, p50, p99 = [], [], []
        with self._proxy(f"crowd {kind}", self._constant) as proxy:
            self._load.ask(proxy.port, self._paths("miss", 0), self._questions)
            for number in range(self._rounds + 1):
                before = self._cpu(proxy.pid)
                told = self._load.ask(
                    proxy.port, self._paths(kind, number), self._questions, **self._options(kind)
                )
                after = self._cpu(proxy.pid)
                expect({each["status"] for each in told.result} == {200}, f"a {kind} was not answered")
                if number or self._sizes.check:
                    cpu.append((after or 0.0) - (before or 0.0))
                    p50.append(_percentile(told.latencies, 50) * 1000)
                    p99.append(_percentile(told.latencies, 99) * 1000)
        seconds = statistics.median(cpu) or 1.0
        ratio = statistics.median(late / usual for late, usual in zip(p99, p50, strict=True))
        return {
            "per CPU second": round(self._questions / seconds),
            "p50 ms": round(statistics.median(p50), 3),
            "p99 ms": round(statistics.median(p99), 3),
            "p99 / p50": round(ratio, 2),
        }

    def _alone(self, kind: str) -> dict[str, float]:
        p50, p99 = [], []
        with self._proxy(f"alone {kind}", self._constant) as proxy:
            self._load.ask(proxy.port, self._paths("miss", 0), self._questions)
            for number in range(self._rounds + 1):
                paths = self._paths(kind, number)
                ours = self._load.ask(proxy.port, paths, self._questions, connections=1).latencies
                bare = self._load.ask(self._constant, [CHAT], self._questions, connections=1).latencies
                if number or self._sizes.check:
                    p50.append((_percentile(ours, 50) - _percentile(bare, 50)) * 1000)
                    p99.append((_percentile(ours, 99) - _percentile(bare, 99)) * 1000)
        return {
            "added p50 ms": round(statistics.median(p50), 3),
            "added p99 ms": round(statistics.median(p99), 3),
        }

    def _streamed(self) -> dict[str, float]:
        short, long = self._sizes.pick(20, 2), self._sizes.pick(120, 4)
        streams, frames, added = self._streams_at_once, [], []
        whole = streams
        upstream = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.forwarding", "upstream"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            leave_that_core(upstream.pid)
            port = int(upstream.stdout.readline())  # type: ignore[union-attr]  # it is a pipe
            with self._proxy("streams", port) as proxy:
                for number in range(self._sizes.pick(3, 1)):
                    spent = []
                    for length in (short, long):
                        before = self._cpu(proxy.pid)
                        told = _streams(proxy.port, f"{length}-{number}-{time.time_ns()}", streams, length)
                        spent.append((self._cpu(proxy.pid) or 0.0) - (before or 0.0))
                        whole = min(whole, told["whole"])
                    frames.append((spent[1] - spent[0]) / (streams * (long - short)) * 1e6)
                    first = [
                        _streams(to, f"one-{number}", self._sizes.pick(40, 2), 1, alone=True)["first"]
                        for to in (proxy.port, port)
                    ]
                    added.append((statistics.median(first[0]) - statistics.median(first[1])) * 1000)
        finally:
            upstream.terminate()
            upstream.wait()
            upstream.stdout.close()  # type: ignore[union-attr]  # it is a pipe
        return {
            "streams": whole,
            "µs a frame": round(statistics.median(frames), 1),
            "first event, added ms": round(statistics.median(added), 3),
        }

    _one_worker = 0.0

    def _scaled(self, workers: int) -> dict[str, float]:
        """Return what workers would answer if each process had a core: the busiest one decides."""
        found = []
        with self._serve(
            f"http://127.0.0.1:{self._constant}/v1",
            self._folder / f"{workers} workers",
            "--workers",
            str(workers),
        ) as proxy:
            for pid in (proxy.pid, *_children(proxy.pid)):
                use_all_cores(pid)
            self._load.ask(proxy.port, self._paths("miss", 0), self._questions)
            for number in range(2 * workers):  # until each worker has read most questions once
                self._load.ask(
                    proxy.port, [f"/ns/known@warm-{number}{CHAT}"], self._questions, connections=64
                )
            for number in range(self._rounds + 1):
                pids = [proxy.pid, *_children(proxy.pid)]
                before = [self._cpu(pid) or 0.0 for pid in pids]
                paths = self._paths("known draw", number)
                told = self._load.ask(proxy.port, paths, self._questions, connections=64)
                spent = [(self._cpu(pid) or 0.0) - busy for pid, busy in zip(pids, before, strict=True)]
                expect({each["status"] for each in told.result} == {200}, "a known draw was not answered")
                if number or self._sizes.check:
                    found.append(self._questions / (max(spent) or 1.0))
        rate = statistics.median(found)
        if workers == 1:
            self._one_worker = rate
        return {"hits/s": round(rate), "times one worker": round(rate / self._one_worker, 2)}


def _children(pid: int) -> list[int]:
    """Return the child processes of a process, where the system says."""
    with contextlib.suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split())]
    return []


def _percentile(seconds: list[float], percent: int) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        asyncio.run(_serve_streams())
    else:
        port, namespace, streams, frames, alone = sys.argv[2:]
        asyncio.run(_read_streams(int(port), namespace, int(streams), int(frames), alone=alone == "1"))
