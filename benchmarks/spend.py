"""How many calls and samples are paid for, on a first run, on its rerun, with some stored, by four processes?

Figures are counted by the server, so they do not depend on the machine's speed, but for those of several
processes, which race. *Lost* are samples that were paid for and are not in the cache afterwards: a fifth
process asks for as many draws as were paid, and what it gets of the others' samples is not lost.

Caches that have no namespaces or draws are asked the same; dspy is told draws apart by its ``rollout_id``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.client import asks
from benchmarks.harness import Count, Sizes, Tally, expect
from benchmarks.peers import TITLES, Server, Worker, workers

_PROMPTS, _PROCESSES = 100, 4


class _Spend:
    def __init__(self, worker: Worker, server: Server, folder: Path, sizes: Sizes) -> None:
        self.name, self.server, self.folder = worker.name, server, folder
        self.prompts, self.processes_at_once = sizes.pick(_PROMPTS, 4), sizes.pick(_PROCESSES, 2)
        self._worker = worker

    def open(self, worker: Worker, case: str, in_flight: int) -> Worker:
        """Let a process open the cache of a case."""
        worker.call(
            "open",
            folder=str(self.folder / f"{self.name}-{case}"),
            base_url=self.server.base_url,
            in_flight=in_flight,
        )
        return worker

    def run_and_rerun(self) -> dict[str, int]:
        wanted = [{**ask, "id": str(number)} for ask in asks(self.prompts, 2) for number in range(10)]
        figures = {}
        for prefix in ("", "rerun "):
            self.server.reset()
            with Worker(self.name) as worker:
                self.open(worker, "rerun", len(wanted))
                answers = worker.call("ask", asks=wanted, namespace="n", in_flight=len(wanted))
            texts = [each for each in answers["texts"] if each is not None]
            told = self.server.reset()
            expect(all(len(each) == 1 for each in texts), "an ask for one sample brought another number")
            figures |= {f"{prefix}calls": told["calls"], f"{prefix}samples": told["samples"]}
            figures[f"{prefix}distinct"] = len({each[0] for each in texts})
            figures[f"{prefix}failed"] = len(wanted) - len(texts)
        return figures

    def namespaces(self) -> dict[str, int]:
        wanted = [
            {**ask, "id": str(number), "namespace": namespace}
            for namespace in ("a", "b")
            for ask in asks(self.prompts, 2)
            for number in range(5)
        ]
        self.server.reset()
        self.open(self._worker, "namespaces", len(wanted)).ask(wanted, in_flight=len(wanted))
        return self.server.reset()

    def stored(self) -> dict[str, int]:
        worker = self.open(self._worker, "stored", self.prompts)
        worker.ask([{**ask, "n": 3} for ask in asks(self.prompts, 2)], "a", self.prompts)
        self.server.reset()
        texts = worker.ask([{**ask, "n": 5} for ask in asks(self.prompts, 2)], "b", self.prompts).result
        expect(all(len(set(each)) == 5 for each in texts), "an ask for five samples brought fewer")
        return self.server.reset()

    def processes(self) -> dict[str, int]:
        [ask] = asks(1, 2)
        self.server.reset()
        self.server.delay(0.01)
        with contextlib.ExitStack() as stack:
            together = [stack.enter_context(Worker(self.name)) for _ in range(self.processes_at_once)]
            for worker in together:
                self.open(worker, "processes", 10)
            for number, worker in enumerate(together):
                draws = [{**ask, "id": str(place)} for place in range(self.prompts)]
                worker.send("ask", asks=draws, namespace=f"process {number}", in_flight=10)
            answers = [worker.receive() for worker in together]
        self.server.delay(0)
        told = self.server.reset()
        got = {text for answer in answers for texts in answer["texts"] if texts for text in texts}
        failed = sum(len(answer["errors"]) for answer in answers)
        draws = [{**ask, "id": str(place)} for place in range(told["samples"])]
        fifth = self.open(self._worker, "processes", 10)
        again = {texts[0] for texts in fifth.ask(draws, "fifth", 10).result}
        self.server.reset()
        return {"samples": told["samples"], "lost": told["samples"] - len(again & got), "failed": failed}


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Tally]]:
    """Yield a tally for each case."""
    with Server() as server, workers([*sizes.peers, "cachepipe"]) as there:
        *others, ours = [_Spend(worker, server, folder, sizes) for worker in there.values()]
        prompts = ours.prompts

        def rows(method: str, **goals: float) -> list[Count]:
            named = {column.replace("_", " "): goal for column, goal in goals.items()}

            return [
                *(Count(TITLES[each.name], getattr(each, method), "peer") for each in others),
                Count("cachepipe", getattr(ours, method), goals=dict(named)),
            ]

        first = ["calls", "samples", "distinct", "failed"]
        yield [
            Tally(
                f"{prompts} prompts x 10 draws, all at once, and a rerun in another process",
                [*first, *(f"rerun {column}" for column in first)],
                rows(
                    "run_and_rerun",
                    calls=prompts,
                    samples=10 * prompts,
                    distinct=10 * prompts,
                    failed=0,
                    rerun_samples=0,
                    rerun_distinct=10 * prompts,
                ),
            ),
            Tally(
                f"{prompts} prompts x 5 draws in two namespaces at once",
                ["calls", "samples"],
                rows("namespaces", samples=5 * prompts),
            ),
            Tally(
                f"{prompts} requests for 5 samples of which 3 are stored",
                ["calls", "samples"],
                rows("stored", samples=2 * prompts),
            ),
            Tally(
                f"{ours.processes_at_once} processes, a namespace each, draw {prompts} samples of a question",
                ["samples", "lost", "failed"],
                rows("processes", samples=prompts, lost=0, failed=0),
            ),
        ]
