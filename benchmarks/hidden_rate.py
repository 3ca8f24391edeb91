"""Calls against a server that answers 429 beyond a rate that it does not tell: how much of it is used.

``python -m benchmarks.hidden_rate [--calls 5000] [--rate 250] [--latency 0.05]``

The server and the client are two processes on the loopback interface. The client is the drop-in one behind a
``Service`` that is told nothing. A first burst, which a rested server lets through, is not counted as rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

from cachepipe import Services, alcall


@dataclass(frozen=True)
class Figures:
    """What was measured; ``rate`` and ``hidden`` are calls per second, ``share`` is one by the other."""

    calls: int
    errors: int
    seconds: float
    rate: float
    hidden: float
    share: float
    refused: int
    refused_share: float
    queue_seconds: float
    call_seconds: float


async def ask(base_url: str, calls: int, rate: float, burst: int, folder: str) -> Figures:
    """Make the calls."""
    service = Services.custom(base_url, max_requests=None, max_tokens=None)
    client = service.client(cache=folder)

    async def one(number: int) -> None:
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": f"{number}"}], max_tokens=4
        )

    began = time.perf_counter()
    results = await alcall(range(calls), one, max_concurrent=500, return_exceptions=True)
    seconds = time.perf_counter() - began
    await client.close()
    stats = service.stats()
    reached = (calls - burst) / seconds
    return Figures(
        calls,
        sum(isinstance(result, BaseException) for result in results),
        round(seconds, 2),
        round(reached, 1),
        rate,
        round(reached / rate, 3),
        stats.refused,
        round(stats.refused / stats.calls, 4),
        round(stats.queue_seconds, 1),
        round(stats.call_seconds, 1),
    )


def measure(calls: int, rate: float, latency: float) -> Figures:
    """Start a server, make the calls, and stop it."""
    burst = max(1, round(rate))
    command = ["mock-server", "--port", "0", "--json", "--seed", "1", "--max-tokens", "4"]
    command += ["--rate", str(rate), "--burst", str(burst), "--latency", str(latency)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-m", "cachepipe", *command], stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            base_url = json.loads(server.stdout.readline())["base_url"]
            return asyncio.run(ask(base_url, calls, rate, burst, folder))
        finally:
            server.terminate()


def main() -> int:
    """Return the exit code: 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hidden_rate")
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=250.0, help="requests per second that are let through")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    options = parser.parse_args()
    figures = measure(options.calls, options.rate, options.latency)
    for name, value in asdict(figures).items():
        print(f"{name:16} {value}")
    held = figures.errors == 0 and figures.share >= 0.9 and figures.refused_share < 0.05
    print("goal: no error, 90 % of the rate, fewer than 5 % refused:", "held" if held else "missed")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
