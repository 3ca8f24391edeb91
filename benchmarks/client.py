"""What does a hit cost through the drop-in client, with 2 and with 20 messages, against the other caches?

A *known draw* is a rerun in a process that has just opened the cache, a *new draw* the same questions from
another namespace (but for CacheSaver, other caches have no such thing: it is the same as the rerun). *Warm*
is a rerun with everything open already, and its floor what any cache within a process has to do: the SHA-256
of the body as sorted JSON, a dict, and the SDK's object of the stored bytes. The control is the bare client
and a server on the loopback interface that answers at once.

Each is a process of its own, which takes the times; see ``worker.py``. Answers are compared with those that
the server gave when the caches were filled.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.harness import Entry, Goals, Role, Sizes, Table, Timed, equal, expect
from benchmarks.peers import Server, Worker, workers

MESSAGES = (2, 20)


def asks(count: int, messages: int, series: str = "question") -> list[dict[str, Any]]:
    """Return questions of so many messages, about 1 KB each; those of another series are others."""
    return [
        {
            "messages": [
                {"role": "system", "content": data.SYSTEM},
                *(
                    {
                        "role": "user" if place % 2 else "assistant",
                        "content": data.text(f"{series} {number} {place}:", 900 // (messages - 1)),
                    }
                    for place in range(1, messages)
                ),
            ],
            "n": 1,
        }
        for number in range(count)
    ]


class _Asked:
    """One worker with its cache, filled with the answers to the questions."""

    def __init__(self, worker: Worker, server: Server, folder: Path, questions: list[dict[str, Any]]) -> None:
        self.worker, self.server, self.questions = worker, server, questions
        self.where = {"folder": str(folder / worker.name), "base_url": server.base_url, "in_flight": 1}
        worker.call("open", **self.where)
        self.answers = worker.ask(questions).result
        self.server.reset()

    def open(self, _: int) -> None:
        self.worker.call("open", **self.where)

    def right(self, got: list[list[str]], _: Any) -> None:
        told = self.server.reset()  # first, as a wrong answer ends this, and the calls are nobody else's
        equal(got, self.answers)
        expect(not told["calls"], f"{told['calls']} calls were made")

    def entry(
        self, name: str, role: Role, namespace: Callable[[], str], *, warm: bool = False, **goals: Any
    ) -> Entry:
        def call(_: Any) -> Timed:
            return self.worker.ask(self.questions, namespace())

        prepare = (lambda _: None) if warm else self.open
        return Entry(name, call, self.right, len(self.questions), role, prepare=prepare, **goals)


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield a table for a rerun, for new draws and for warm reruns of each number of messages."""
    count = sizes.pick(300, 5)
    with Server() as server, contextlib.ExitStack() as stack:
        found = []
        for messages in MESSAGES[:1] if sizes.check else MESSAGES:
            there = stack.enter_context(workers(["bare", "memory", "cachepipe", *sizes.peers]))
            where = folder / str(messages)
            where.mkdir()
            questions = asks(count, messages)
            found += _tables(messages, there, server, where, questions)
        yield found


_GOALS = {
    2: {"known": {"CacheSaver": 15.0, "dspy": 5.0}, "new": {"CacheSaver": 7.0, "dspy": 5.0}},
    20: {"known": {"CacheSaver": 30.0, "dspy": 5.0}, "new": {"CacheSaver": 18.0, "dspy": 5.0}},
}


def _tables(
    messages: int,
    there: dict[str, Worker],
    server: Server,
    folder: Path,
    questions: list[dict[str, Any]],
) -> list[Table]:
    bare = there["bare"]
    cached = {
        name: _Asked(worker, server, folder, questions) for name, worker in there.items() if name != "bare"
    }
    numbers = itertools.count()

    def control() -> Entry:
        def right(got: list[list[str]], _: Any) -> None:
            told = server.reset()
            expect(told["calls"] == len(got) == len(questions), f"{told['calls']} calls were made")

        def call(_: Any) -> Timed:
            return bare.ask(questions)

        def opened(_: int) -> None:
            bare.call("open", folder="", base_url=server.base_url, in_flight=1)

        return Entry(bare.title, call, right, len(questions), "control", prepare=opened)

    def known() -> str:
        return "n"

    def new() -> str:
        return f"new {next(numbers)}"

    def row(kind: str, namespace: Callable[[], str]) -> list[Entry]:
        faster: Goals = {bare.title: None, **_GOALS[messages][kind]}
        faster |= {each.worker.title: None for each in cached.values() if each.worker.title not in faster}
        faster.pop("cachepipe"), faster.pop("key + dict + SDK object")
        ours = cached["cachepipe"]
        peers = [each for name, each in cached.items() if name not in ("cachepipe", "memory")]
        return [
            control(),
            *(each.entry(each.worker.title, "peer", namespace) for each in peers),
            ours.entry("cachepipe", "subject", namespace, faster=faster),
        ]

    floor = cached["memory"]
    return [
        Table(f"a known draw, cache just opened, {messages} messages", row("known", known)),
        Table(f"a new draw, {messages} messages", row("new", new)),
        Table(
            f"a known draw, warm, {messages} messages",
            [
                floor.entry(floor.worker.title, "floor", known, warm=True),
                cached["cachepipe"].entry(
                    "cachepipe", "subject", known, warm=True, against={floor.worker.title: 2.5}
                ),
            ],
        ),
    ]
