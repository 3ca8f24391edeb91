"""What do reruns of concurrent programs cost, and do they give the same outputs?

``python -m benchmarks.reruns [--puzzles 3] [--trials 1]``

Three programs search for solutions of the Game of 24, several puzzles at once: a tree of thoughts, a fleet of
agents and a graph of thoughts. Their tasks share memos and pools, so what they ask depends on whose answer
comes first. Each program runs first with random latencies, then again with others: in a new namespace, in
another one with other request ids, and in the same one. The latencies are virtual. The table shows the runs
without and with the schedule (C11).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import operator
import random
import re
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from cachepipe import OnlineAPI, Request, Response
from cachepipe.testing import VirtualTimeLoop

_TURN = 1e-5  # virtual seconds that a turn of the event loop takes
_MOVES: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else 0.0,
}


class Player:
    """A model that plays at random: it moves, and guesses how good a state is."""

    cache_scope = "player"

    def __init__(self, seed: object) -> None:
        self.calls = 0
        self._seed = seed
        self._random = random.Random(str(seed))
        self._asked: Counter[str] = Counter()

    async def request(self, request: Request) -> Response:
        """Return the answers, each after another time."""
        self.calls += 1
        await asyncio.sleep(self._random.uniform(0.05, 2))
        return Response([self._answer(request.prompt) for _ in range(request.n)])

    def _answer(self, prompt: str) -> str:
        self._asked[prompt] += 1
        chance = random.Random(f"{self._seed}/{prompt}/{self._asked[prompt]}")
        task, _, state = prompt.partition(": ")
        if task == "value":
            near = min((abs(float(number) - 24) for number in state.split()), default=24)
            return chance.choices(["sure", "likely", "impossible"], [24 / (1 + near), 4, 4])[0]
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", state)]
        if len(numbers) < 2:
            return state
        left, right = chance.sample(range(len(numbers)), 2)
        made = chance.choice(list(_MOVES.values()))(numbers[left], numbers[right])
        rest = [number for place, number in enumerate(numbers) if place not in (left, right)]
        return " ".join(f"{number:g}" for number in sorted([*rest, round(made, 3)]))


Ask = Callable[..., Awaitable[list[str]]]
Program = Callable[[Ask, str, dict[str, int], random.Random], Awaitable[object]]
_WORTH = {"sure": 20, "likely": 2, "impossible": 0}


async def _value(ask: Ask, state: str, memo: dict[str, int]) -> int:
    """Return the value of a state; the first task that needs it asks the model."""
    if state not in memo:
        memo[state] = sum(_WORTH[word] for word in await ask(f"value: {state}", 3))
    return memo[state]


async def _best(ask: Ask, states: Iterable[str], memo: dict[str, int], count: int) -> list[str]:
    found = sorted(set(states))
    values = await asyncio.gather(*(_value(ask, state, memo) for state in found))
    return [state for _, state in sorted(zip(values, found, strict=True), reverse=True)[:count]]


async def tot_bfs(ask: Ask, puzzle: str, memo: dict[str, int], _: random.Random) -> object:
    """A tree of thoughts, breadth first: the five best states of each depth are expanded."""
    frontier = [puzzle]
    for _depth in range(3):
        moves = await asyncio.gather(*(ask(f"move: {state}", 4) for state in frontier))
        frontier = await _best(ask, itertools.chain(*moves), memo, 5)
    return frontier


async def foa(ask: Ask, puzzle: str, memo: dict[str, int], rng: random.Random) -> object:
    """A fleet of agents, each at its own pace; one in a bad state continues from a good state of the pool."""
    pool = [(0, puzzle)]

    async def agent(number: int) -> str:
        state = puzzle
        for step in range(5):
            [state] = await ask(f"move: {state}", identity=(number, step))
            pool.append((await _value(ask, state, memo), state))
            if " " not in state or pool[-1][0] < 10:
                state = rng.choice(sorted(pool[-6:])[-3:])[1]
        return state

    return [await asyncio.gather(*map(agent, range(5))), max(pool)]


async def got(ask: Ask, puzzle: str, memo: dict[str, int], _: random.Random) -> object:
    """A graph of thoughts: thoughts are generated, the best merged in pairs as they come, and refined."""
    thoughts: asyncio.Queue[str] = asyncio.Queue()

    async def generate(number: int) -> None:
        [state] = await ask(f"move: {puzzle}", identity=(number,))
        await thoughts.put(state)

    async def merge() -> None:
        left, right = await thoughts.get(), await thoughts.get()
        [better] = await _best(ask, [left, right], memo, 1)
        refined = await ask(f"move: {better}", 2)
        [kept] = await _best(ask, [better, *refined], memo, 1)
        await thoughts.put(kept)

    await asyncio.gather(*map(generate, range(8)), *(merge() for _ in range(7)))
    return thoughts.get_nowait()


CONSUMERS: dict[str, Program] = {"tot_bfs": tot_bfs, "foa": foa, "got": got}


@dataclass(frozen=True)
class Ran:
    """A run: the calls that it made, and the output for each puzzle."""

    calls: int
    outputs: list[Any]


@dataclass(frozen=True)
class Setting:
    """How a program is run: with which seed of the model, in which namespace, with which request ids."""

    seed: int
    namespace: str
    salt: str = ""


SETTINGS = {
    "first run": Setting(1, "first"),
    "new namespace": Setting(2, "second"),
    "new, other ids": Setting(3, "third", "other"),
    "same namespace": Setting(4, "first"),
}


async def _run(program: Program, puzzles: list[str], folder: str, setting: Setting, ordered: bool) -> Ran:
    player = Player(setting.seed)
    memo: dict[str, int] = {}
    async with OnlineAPI(player, folder, ordered=ordered) as pipeline:

        async def ask(prompt: str, n: int = 1, identity: tuple[int, ...] = ()) -> list[str]:
            name = f"{setting.salt}{identity}" if identity else None
            request = Request(prompt, n=n, namespace=setting.namespace, request_id=name)
            return list((await pipeline.request(request)).data)

        outputs = await asyncio.gather(
            *(program(ask, puzzle, memo, random.Random(puzzle)) for puzzle in puzzles)
        )
    return Ran(player.calls, outputs)


def measure(program: Program, puzzles: list[str], ordered: bool) -> list[tuple[int, int]]:
    """Return the calls of each run, and how many of its outputs equal the first run's."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS.values():
            with asyncio.Runner(loop_factory=functools.partial(VirtualTimeLoop, _TURN)) as runner:
                runs.append(runner.run(_run(program, puzzles, folder, setting, ordered)))
    return [(ran.calls, sum(map(operator.eq, ran.outputs, runs[0].outputs))) for ran in runs]


def main() -> int:
    """Return the exit code: 1 when a rerun with the schedule makes calls or gives other outputs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reruns")
    parser.add_argument("--puzzles", type=int, default=3, help="how many are searched at once")
    parser.add_argument("--trials", type=int, default=1)
    options = parser.parse_args()
    lines = resources.files("cachepipe.testing").joinpath("data/game24.jsonl").read_text().splitlines()
    missed = False
    print(f"calls, and outputs that equal the first run's, of {options.puzzles}\n")
    print(f"{'':24}" + "".join(f"{title:>18}" for title in SETTINGS))
    for ordered, name, trial in itertools.product((False, True), CONSUMERS, range(options.trials)):
        begin = 900 + trial * options.puzzles
        puzzles = [json.loads(line)["puzzle"] for line in lines[begin : begin + options.puzzles]]
        figures = measure(CONSUMERS[name], puzzles, ordered)
        missed |= ordered and any(figure != (0, len(puzzles)) for figure in figures[1:])
        cells = "".join(f"{f'{calls} calls, {equal}':>18}" for calls, equal in figures)
        print(f"{f'ordered={ordered}, {name}':24}{cells}", flush=True)
    print(
        "\ngoal: with the schedule, reruns make no call and give the same outputs:",
        "missed" if missed else "holds",
    )
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
