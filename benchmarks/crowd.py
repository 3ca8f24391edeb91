"""What do requests suffer from each other: a hit during a slow miss, and fifty beside one that fails?

The slow miss takes a second; 0.2 s after its begin, a question is asked that is stored. Of 51 questions
that are asked at once, the server refuses one with 400. Through drop-in clients, each a process of its own.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.client import asks
from benchmarks.harness import Count, Sizes, Tally, expect
from benchmarks.peers import TITLES, Server, Worker, workers

_AMONG = 51


def _during(worker: Worker, server: Server, folder: Path, times: int) -> dict[str, float]:
    name = worker.name
    [known] = asks(1, 2)
    worker.call("open", folder=str(folder / f"{name}-slow"), base_url=server.base_url, in_flight=1)
    answers = worker.ask([known]).result
    told = []
    for number in range(times):
        slow = {"messages": [{"role": "user", "content": f"[slow] {number}"}], "n": 1}
        if name != "cachepipe":  # counts draws per process, so the same draw is one of a new process
            worker.call("open", folder=str(folder / f"{name}-slow"), base_url=server.base_url, in_flight=1)
        server.reset()
        raced = worker.call("race", slow=slow, known=known, namespace="n")
        expect(raced["texts"] == answers[0], "the hit is another answer")
        expect(server.reset()["calls"] == 1, "the hit was no hit")
        told.append(raced)
    return {
        "hit, ms": round(statistics.median(each["seconds"] for each in told) * 1000, 2),
        "after the miss": sum(not each["during"] for each in told),
    }


def _failing(worker: Worker, server: Server, folder: Path) -> dict[str, int]:
    name = worker.name
    wanted = asks(_AMONG, 2)
    wanted[_AMONG // 2]["messages"][1]["content"] = "[fail]"
    worker.call("open", folder=str(folder / f"{name}-fail"), base_url=server.base_url, in_flight=_AMONG)
    told = worker.call("ask", asks=wanted, namespace="n", in_flight=_AMONG)
    server.reset()
    return {"failed": sum(texts is None for texts in told["texts"])}


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield both cases."""
    names = [*sizes.peers, "cachepipe"]
    times = sizes.pick(5, 1)
    with Server() as server, workers(names) as there:

        def slow(name: str) -> Count:
            most: dict[str, Any] = {} if sizes.check else {"hit, ms": ("≤", 2.0)}
            goals = {**most, "after the miss": 0.0} if name == "cachepipe" else {}
            return Count(
                TITLES[name],
                lambda: _during(there[name], server, folder, times),
                "subject" if goals else "peer",
                goals,
            )

        def failing(name: str) -> Count:
            goals = {"failed": 1.0} if name == "cachepipe" else {}
            return Count(
                TITLES[name],
                lambda: _failing(there[name], server, folder),
                "subject" if goals else "peer",
                dict(goals),
            )

        yield [
            Tally(
                "a hit during a miss that takes a second", ["hit, ms", "after the miss"], [*map(slow, names)]
            ),
            Tally(f"one failure among {_AMONG} at once", ["failed"], [*map(failing, names)]),
        ]
