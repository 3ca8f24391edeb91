"""Reads a cache folder in a process of its own: ``python -m benchmarks.reader FOLDER``, JSON on its input.

Prints the answers that a replay of all draws gives, and how many rows diskcache counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, NoReturn

import diskcache

from benchmarks import data
from cachepipe import DiskStore, OnlineAPI, Request


class _NoModel:
    cache_scope = "benchmark"

    async def request(self, request: Request) -> NoReturn:
        raise RuntimeError(f"nothing is generated here; {request!r:.80} is not stored")


async def _replayed(folder: str, asked: dict[str, Any]) -> list[Any]:
    store = DiskStore(folder, read_only=True)
    async with OnlineAPI(_NoModel(), store, mode="replay") as pipeline:
        requests = data.requests(asked["questions"], asked["namespace"])
        answers = [(await pipeline.request(request)).data[0] for request in requests]
    drawn = sum(1 for _ in store.draws())
    store.close()
    if drawn != len(answers):
        raise RuntimeError(f"the ledger holds {drawn} draws of {len(answers)}")
    return answers


def main() -> None:
    """Print what the folder holds."""
    folder, asked = sys.argv[1], json.load(sys.stdin)
    answers = asyncio.run(_replayed(folder, asked))
    with diskcache.Cache(folder) as cache:
        rows = len(cache)
    json.dump({"answers": answers, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
