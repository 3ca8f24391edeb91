"""Runs programs of concurrent tasks on a cache, and compares the course of one run with another's.

A program is an asynchronous function of an `Ask` and a seeded ``random.Random``. It asks, and what it asks
may depend on the answers so far. A `Setting` says how it is run; `play` runs it and returns what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import random
from collections import Counter

import cachepipe
from cachepipe import Batch, OnlineAPI, Request, Response
from cachepipe.testing import ScriptedError, VirtualTimeLoop

TURN = 1e-5  # seconds; a program that polls in each turn would stop the time otherwise
STEP = 0.01
LATENCIES = {
    "random": lambda now, rng: rng.uniform(0.001, 0.1),
    "steps": lambda now, rng: math.ceil(now / STEP + rng.randrange(1, 4)) * STEP - now,  # many end together
    "skewed": lambda now, rng: min(0.01 * rng.expovariate(1) ** 3, 0.2),
    "at once": lambda now, rng: 0,
}
"""Functions that draw the seconds of a call, from the time and a generator of random numbers."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a program is run.

    Attributes:
        seed: of the model's answers, latencies and failures.
        latency: a name from `LATENCIES`.
        namespace: what the program's own namespaces begin with.
        salt: what the request ids that the program makes begin with.
        failures: the share of the model's calls that fail.
        scale: what latencies are multiplied by, for event loops on which time is real.
        until: the virtual time at which the program is stopped, or None.
        ordered: passed to the pipelines; None passes nothing.
    """

    seed: int = 0
    latency: str = "random"
    namespace: str = "first"
    salt: str = ""
    failures: float = 0.0
    scale: float = 1.0
    until: float | None = None
    ordered: bool | None = None


@dataclasses.dataclass
class Course:
    """What happened in a run: who asked what and who received what, in order, the output and the calls."""

    trace: list = dataclasses.field(default_factory=list)
    output: object = None
    calls: int = 0
    seconds: float = 0.0

    def as_json(self):
        """Return the trace and the output; ``difference`` takes them for equal after a trip through JSON."""
        return {"trace": self.trace, "output": self.output}


class Model:
    """Its answers are a function of its seed, the prompt and how often the prompt was asked."""

    def __init__(self, setting, name):
        self.cache_scope = name
        self.calls = 0
        self._setting = setting
        self._random = random.Random(f"{setting.seed}/{setting.latency}/{name}")
        self._asked = Counter()

    async def request(self, request):
        self.calls += 1
        fails = self._random.random() < self._setting.failures
        now = asyncio.get_running_loop().time()
        if seconds := LATENCIES[self._setting.latency](now, self._random):
            await asyncio.sleep(seconds * self._setting.scale)
        if fails:
            raise ScriptedError
        return Response([self._answer(request.prompt) for _ in range(request.n)])

    def _answer(self, prompt):
        """Return a number below 10,000."""
        number = self._asked[repr(prompt)] = self._asked[repr(prompt)] + 1
        digest = hashlib.sha256(
            f"{self._setting.seed}/{self.cache_scope}/{prompt}/{number}".encode()
        ).digest()
        return int.from_bytes(digest[:4], "big") % 10_000


class Ask:
    """What a program asks with. It notes each question and each answer."""

    def __init__(self, pipelines, setting, course):
        self._pipelines = pipelines
        self._setting = setting
        self._trace = course.trace

    async def __call__(self, prompt, **options):
        """Return the first sample."""
        return (await self.many(prompt, **options))[0]

    async def many(self, prompt, n=1, *, who="", model=0, namespace="", request_id=None):
        """Return n samples. A call that fails is repeated, and both count as one question."""
        request = self._request(prompt, n, namespace, request_id)
        self._trace.append(["asks", who, prompt, n])
        while True:
            try:
                response = await self._pipelines[model].request(request)
                break
            except ScriptedError:
                await asyncio.sleep(0)
        self._trace.append(["gets", who, prompt, response.data])
        return response.data

    async def batch(self, prompts, *, who=""):
        """Return the first sample of each answer of a batch. Requests that fail are repeated together."""
        self._trace.append(["asks", who, prompts, 1])
        answers = {}
        while len(answers) < len(prompts):
            wanted = [prompt for prompt in prompts if prompt not in answers]
            batch = Batch([self._request(prompt, 1, "", None) for prompt in wanted])
            responses = await self._pipelines[0].batch_request(batch, return_exceptions=True)
            for prompt, response in zip(wanted, responses, strict=True):
                if not isinstance(response, ScriptedError):
                    answers[prompt] = response.data[0]
        self._trace.append(["gets", who, prompts, [answers[prompt] for prompt in prompts]])
        return [answers[prompt] for prompt in prompts]

    def note(self, *what):
        """Note an event of the program."""
        self._trace.append(["notes", *what])

    def own_id(self, *parts):
        """Return a request id that differs between settings with another salt, and between processes."""
        return f"{self._setting.salt}{hash(parts):x}"

    def _request(self, prompt, n, namespace, request_id):
        return Request(prompt, n=n, namespace=f"{self._setting.namespace}/{namespace}", request_id=request_id)


async def _play(program, cache, setting):
    course = Course()
    models = [Model(setting, f"model {number}") for number in range(2)]
    options = {} if setting.ordered is None else {"ordered": setting.ordered}
    with cachepipe.run():
        async with contextlib.AsyncExitStack() as stack:
            pipelines = [
                await stack.enter_async_context(OnlineAPI(model, cache, **options)) for model in models
            ]
            task = asyncio.create_task(program(Ask(pipelines, setting, course), random.Random(1)))
            done, _ = await asyncio.wait([task], timeout=setting.until)
            if done:
                course.output = await task
            else:
                course.trace = list(course.trace)  # what its tasks note while they end does not count
                tasks = asyncio.all_tasks() - {asyncio.current_task()}
                for each in tasks:
                    each.cancel()
                await asyncio.wait(tasks)
    course.calls = sum(model.calls for model in models)
    course.seconds = asyncio.get_running_loop().time()
    return course


def virtual_loop():
    return VirtualTimeLoop(TURN)


def play(program, cache, setting, *, loop=virtual_loop):
    """Run a program on a cache, and return its course."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_play(program, cache, setting))


def reruns(setting, *, own_ids=False):
    """Return settings whose runs should take the same course as a first run."""
    again = dataclasses.replace(setting, failures=0, seed=setting.seed + 1, until=None)
    settings = {
        "same namespace": again,
        "same namespace, a model at once": dataclasses.replace(again, latency="at once"),
        "new namespace": dataclasses.replace(again, namespace="second"),
        "new namespace, a model at once": dataclasses.replace(again, namespace="third", latency="at once"),
    }
    if own_ids:
        settings["new namespace, other ids"] = dataclasses.replace(again, namespace="fourth", salt="other")
    return settings


def difference(first, again):
    """Return what differs between two courses, from the first place on; an empty string if nothing does."""
    if again.calls:
        return f"the rerun makes {again.calls} calls; " + _parted(first, again)
    return _parted(first, again)


def _parted(first, again):
    for place, (before, now) in enumerate(zip(first.trace, again.trace, strict=False)):
        if before != now:
            return f"at {place}, the first run has {before} and the rerun {now}"
    if len(first.trace) != len(again.trace):
        return f"the first run has {len(first.trace)} events and the rerun {len(again.trace)}"
    outputs = [json.loads(json.dumps(course.output)) for course in (first, again)]
    return (
        "" if outputs[0] == outputs[1] else f"the first run returns {outputs[0]} and the rerun {outputs[1]}"
    )
