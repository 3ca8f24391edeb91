"""Random programs: trees of steps that a few tasks perform on shared state, and their interpreter.

A step is a tuple: its name, then its arguments, which may be lists of steps.
"""

from __future__ import annotations

import asyncio
from collections import deque

from hypothesis import strategies as st

_TOPICS = st.integers(0, 3)


def _leaves():
    return st.one_of(
        st.tuples(st.just("ask"), st.booleans()),  # with a look at the shared state
        st.tuples(st.just("ask"), st.booleans()),
        st.tuples(st.just("samples"), st.integers(1, 4)),
        st.tuples(st.just("memo"), _TOPICS),
        st.tuples(st.just("future"), _TOPICS),
        st.tuples(st.just("turns"), st.integers(1, 20)),  # and a request, which limits how many come in a row
        st.tuples(st.just("push")),
        st.tuples(st.just("pop")),
        st.tuples(st.just("lock")),
        st.tuples(st.just("batch"), st.integers(1, 3)),
        st.tuples(st.just("other model")),
        st.tuples(st.just("other namespace"), _TOPICS),
    )


def _nodes(steps):
    several = st.lists(steps, min_size=1, max_size=3)
    branches = st.lists(several, min_size=2, max_size=3)
    return st.one_of(
        st.tuples(st.just("gather"), branches),
        st.tuples(st.just("race"), branches, st.booleans()),
        st.tuples(st.just("as completed"), branches),
        st.tuples(st.just("spawn"), several),
        st.tuples(st.just("if"), several, several),
        st.tuples(st.just("repeat"), st.integers(2, 3), several),
    )


_STEPS = st.recursive(_leaves(), _nodes, max_leaves=8)
PROGRAMS = st.lists(st.lists(_STEPS, min_size=1, max_size=4), min_size=2, max_size=5).filter(
    lambda tasks: not _shares_a_losers_question(tasks)
)
"""Programs: for each of the tasks that begin at once, its steps."""


def _shares_a_losers_question(steps):
    """Return True if a task that may be cancelled asks what others ask at the same time.

    A new namespace gives a free sample to such a request, which got none in the first run (C3).
    """
    if isinstance(steps, tuple) and steps[0] == "race":
        return "other namespace" in repr(steps)
    return isinstance(steps, list | tuple) and any(map(_shares_a_losers_question, steps))


def may_ask_equal_questions(tasks):
    """Return True if two tasks of a program may ask the same at once."""
    return "other namespace" in repr(tasks)


class Interpreter:
    """Performs a program. It is itself a program for the harness.

    Args:
        tasks: the steps of each task.
    """

    def __init__(self, tasks):
        self._tasks = tasks

    async def __call__(self, ask, rng):
        self._ask = ask
        self._memo, self._futures, self._state = {}, {}, []
        self._pool = deque([1, 2])
        self._lock = asyncio.Lock()
        self._asked = 0
        async with asyncio.TaskGroup() as self._group:
            for number, steps in enumerate(self._tasks):
                self._group.create_task(self._perform(steps, f"{number}", number))
        return [self._state, sorted(self._memo.items()), list(self._pool)]

    async def _perform(self, steps, who, last):
        """Perform steps one after the other; return the last answer."""
        for number, (name, *arguments) in enumerate(steps):
            do = getattr(self, f"do_{name.replace(' ', '_')}")
            last = await do(f"{who}.{number}", last, *arguments)
        return last

    def _branch(self, branches, who, last):
        for number, steps in enumerate(branches):
            yield asyncio.ensure_future(self._perform(steps, f"{who}{'abc'[number]}", last))

    def _learn(self, answer):
        self._state.append(answer)
        return answer

    # Leaves.

    async def do_ask(self, who, last, looks):
        return self._learn(await self._ask(f"{who} after {self._state[-3:] if looks else last}"))

    async def do_samples(self, who, last, n):
        return self._learn(sum(await self._ask.many(f"{who} with {len(self._state)}", n)))

    async def do_memo(self, who, last, topic):
        if topic not in self._memo:
            answer = await self._ask(f"topic {topic}, {who}, {len(self._memo)}")
            self._memo.setdefault(topic, answer)
        return self._memo[topic] + last

    async def do_future(self, who, last, topic):
        """Share the request for a topic. It has a task of its own, which cancelled waiters do not end."""
        if topic not in self._futures:
            self._futures[topic] = self._group.create_task(self._ask(f"{topic} with {self._state[-1:]}"))
        return await asyncio.shield(self._futures[topic])

    async def do_turns(self, who, last, count):
        for _ in range(count):
            await asyncio.sleep(0)
        return await self.do_ask(who, last, looks=True)

    async def do_push(self, who, last):
        self._pool.append(last)
        return last

    async def do_pop(self, who, last):
        return self._pool.popleft() if last % 2 and self._pool else self._pool[-1] if self._pool else last

    async def do_batch(self, who, last, count):
        answers = await self._ask.batch([f"{who}, {number} after {last}" for number in range(count)])
        return self._learn(sum(answers))

    async def do_lock(self, who, last):
        async with self._lock:
            return await self.do_ask(who, last, looks=True)

    async def do_other_model(self, who, last):
        return self._learn(await self._ask(f"{who} reviews {last % 10}", model=1))

    async def do_other_namespace(self, who, last, topic):
        answers = await self._ask.many(f"topic {topic}", 1 + last % 3, who=who, namespace="other")
        return self._learn(answers[-1])

    # Nodes.

    async def do_gather(self, who, last, branches):
        return sum(await asyncio.gather(*self._branch(branches, who, last)))

    async def do_race(self, who, last, branches, waits):
        tasks = list(self._branch(branches, who, last))
        try:
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if waits and pending:
            await asyncio.wait(pending)
        return next(task for task in tasks if task in done).result()

    async def do_as_completed(self, who, last, branches):
        tasks = list(self._branch(branches, who, last))
        try:
            for place, coming in enumerate(asyncio.as_completed(tasks)):
                last = await coming
                if place % 2:
                    last = await self.do_ask(f"{who}/{place}", last, looks=True)
        finally:
            for task in tasks:
                task.cancel()
        return last

    async def do_spawn(self, who, last, steps):
        self._group.create_task(self._perform(steps, f"{who}s", last))
        return last

    async def do_if(self, who, last, odd, even):
        return await self._perform(odd if last % 2 else even, who, last)

    async def do_repeat(self, who, last, times, steps):
        for time in range(times):
            last = await self._perform(steps, f"{who}x{time}", last)
        return last
