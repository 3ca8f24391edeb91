"""Several processes on one cache: each is started for real, and talks over its pipes."""

from __future__ import annotations

import collections
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time

import forked
import inside
import pytest
from profiles import sized

from cachepipe import open_store
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import PENDING

WARNINGS = ["-W", "error", "-W", "ignore:most requests"]  # in one namespace, each worker's ids are new

PRELUDE = """
import asyncio, itertools, json, os, sys, warnings
from cachepipe import OnlineAPI, Request, Response, SharedDraw

serial = itertools.count()

def say(**fields):
    print(json.dumps(fields), flush=True)

def hear():
    return sys.stdin.readline().strip()

async def hear_later():
    return await asyncio.get_running_loop().run_in_executor(None, hear)

class Model:
    model = "m"
    max_n = None
    def __init__(self, *, gated=False):
        self.gated = gated
        self.made = []
        self.calls = 0
    async def request(self, request):
        self.calls += 1
        if self.gated:
            say(asked=request.prompt, n=request.n)
            if await hear_later() == "fail":
                raise ValueError("as told")
        await asyncio.sleep(0)
        data = [f"{os.getpid()}:{next(serial)}" for _ in range(request.n)]
        self.made += data
        return Response(data)

FOLDER, NAME = sys.argv[1:3]
"""


class Worker:
    """A process that runs a script, one line of JSON at a time."""

    def __init__(self, folder, name, body):
        self.process = forked.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore:most requests",
                "-c",
                PRELUDE + body,
                str(folder),
                name,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell(self, text=""):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        """Wait for the process to end by itself, silent and content."""
        _, errors = self.process.communicate()
        assert (self.process.returncode, errors) == (0, "")

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()


@pytest.fixture
def start(cache):
    """Start a worker on the test's cache; whatever is left of it is killed at the end."""
    workers = []

    def begin(name, body):
        workers.append(Worker(cache, name, body))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.close()


@pytest.fixture(params=["folder", "valkey", "postgres"])
def cache(request, tmp_path):
    """A folder or a URL; a lease on the server ends a second after its process."""
    return (
        tmp_path / "cache"
        if request.param == "folder"
        else f"{request.getfixturevalue(f'new_{request.param}_url')()}&lease=1"
    )


def check_ledger(cache):
    """What is taken is what draws hold, and what is listed is stored or being generated."""
    if isinstance(cache, str):
        check_server(cache)
    else:
        check_folder(cache)


def check_server(url):
    store, _ = open_store(url)
    with contextlib.closing(store):
        held = collections.defaultdict(set)
        for info in store.draws():
            assert held[info.draw.namespace, info.draw.key].isdisjoint(info.indices), "C1"
            held[info.draw.namespace, info.draw.key].update(info.indices)
        assert inside.taken(store) == held
        for key, found in store.session.engine.scan(""):
            listed = inside.indices(key, rows.LISTED, found)
            pending = {*rows.indices_in(found, PENDING)}
            stored = {sample.index for sample in store.samples(key)}
            assert listed == stored | pending
            assert not stored & pending


def check_folder(folder):
    ledger = sqlite3.connect(folder / "ledger.cache.db")
    spans = collections.defaultdict(set)
    for owner, key, start, stop in ledger.execute("SELECT owner, key, start, stop FROM intervals"):
        assert spans[owner, key].isdisjoint(range(start, stop))
        spans[owner, key].update(range(start, stop))
    held = collections.defaultdict(set)
    for owner, key, indices in ledger.execute("SELECT namespace, key, indices FROM segments"):
        numbers = {int(index) for index in str(indices).split(",")}
        assert held[owner, key].isdisjoint(numbers), "C1: two draws of a namespace share a sample"
        held[owner, key] |= numbers
    assert {place: taken for place, taken in spans.items() if place[0]} == held
    pending = collections.defaultdict(set)
    for key, index in ledger.execute("SELECT key, sample FROM pending"):
        pending[key].add(index)
    names = dict(ledger.execute("SELECT id, key FROM keys"))
    ledger.close()
    shelf = sqlite3.connect(folder / "cache.db")
    stored = collections.defaultdict(set)
    for (place,) in shelf.execute("SELECT key FROM Cache"):
        key, index = place.split("/")
        stored[key].add(int(index))
    shelf.close()
    for key, name in names.items():
        assert spans[0, key] == stored[name] | pending[key]
        assert not stored[name] & pending[key]


CROWD = """
async def main():
    model = Model()
    pipeline = OnlineAPI(model, FOLDER)
    say(ready=True)
    namespace = hear()
    requests = [
        Request(f"question {i % 25}", request_id=f"{NAME}-{i // 25}", namespace=namespace or NAME)
        for i in range(100)
    ]
    answers = await asyncio.gather(*map(pipeline.request, requests))
    await pipeline.close()
    say(
        made=model.made,
        got=[(r.prompt, r.request_id, a.data, a.cached) for r, a in zip(requests, answers)],
    )
asyncio.run(main())
"""


def crowd(start, namespace):
    workers = [start(f"worker{number}", CROWD) for number in range(4)]
    assert all(worker.hear()["ready"] for worker in workers)
    for worker in workers:
        worker.tell(namespace)
    reports = [worker.hear() for worker in workers]
    for worker in workers:
        worker.end()
    return reports


def test_four_processes_in_one_namespace_share_the_work_and_no_sample(start, cache):
    """C1, C4, C6, C7: 25 questions with 16 draws each cost 400 samples, whoever generates them."""
    reports = crowd(start, "one")
    got = collections.defaultdict(list)
    for report in reports:
        for prompt, _, data, _ in report["got"]:
            got[prompt] += data
    assert all(len(samples) == len(set(samples)) == 16 for samples in got.values())
    made = [sample for report in reports for sample in report["made"]]
    assert len(made) == 400
    assert sorted(made) == sorted(sample for samples in got.values() for sample in samples)
    assert sum(not flag for report in reports for *_, cached in report["got"] for flag in cached) == 400
    check_ledger(cache)
    store, _ = open_store(cache)
    assert store.totals() == {
        "keys": 25,
        "samples": 400,
        "pending": 0,
        "draws": 400,
        "namespaces": 1,
        "discarded": 0,
    }
    store.close()


def test_four_processes_in_namespaces_of_their_own_generate_what_one_needs(start, cache):
    """C4: the samples generated number the largest count that any one namespace has drawn."""
    reports = crowd(start, "")
    made = [sample for report in reports for sample in report["made"]]
    assert len(made) == 100
    for report in reports:
        data = [sample for _, _, samples, _ in report["got"] for sample in samples]
        assert sorted(data) == sorted(made)
    flags = [flag for report in reports for *_, cached in report["got"] for flag in cached]
    assert flags.count(False) == 100
    check_ledger(cache)


def test_a_rerun_in_another_process_is_identical_and_free(start):
    """C2, with nobody else alive."""
    first = crowd(start, "one")
    again = crowd(start, "one")
    assert [report["made"] for report in again] == [[], [], [], []]
    for report, before in zip(again, first, strict=True):
        assert [answer[:3] for answer in report["got"]] == [answer[:3] for answer in before["got"]]
        assert all(all(cached) for *_, cached in report["got"])


LIVE = """
async def main():
    async with OnlineAPI(Model(), FOLDER) as pipeline:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [await pipeline.request(Request("q", n=2, request_id="a", namespace="x")) for _ in "12"]
        say(
            data=[a.data for a in answers],
            cached=[a.cached for a in answers],
            warned=[w.category.__name__ for w in caught],
        )
        await hear_later()
asyncio.run(main())
"""


def test_the_same_draws_of_two_live_processes_share_samples_and_warn(start):
    """C1: shared, and said once in each run that can tell."""
    first = start("first", LIVE)
    one = first.hear()
    assert one["warned"] == []
    second = start("second", LIVE)
    two = second.hear()
    assert two["data"] == one["data"]
    assert two["cached"] == [[True, True], [True, True]]
    assert two["warned"] == ["SharedDraw"]
    for worker in (first, second):
        worker.tell()
        worker.end()
    third = start("third", LIVE)
    three = third.hear()
    assert (three["data"], three["warned"]) == (one["data"], [])
    third.tell()
    third.end()


HOLD = """
async def main():
    model = Model(gated=True)
    model.max_n = 1
    async with OnlineAPI(model, FOLDER) as pipeline:
        answer = await pipeline.request(Request("q", n=int(hear()), request_id="a", namespace=NAME))
        say(data=answer.data, cached=answer.cached)
asyncio.run(main())
"""

WAIT = """
async def main():
    model = Model()
    async with OnlineAPI(model, FOLDER) as pipeline:
        n = int(hear())
        task = asyncio.create_task(
            pipeline.request(Request("q", n=n, request_id="a", namespace=NAME))
        )
        while not any(info.draw.namespace == "=" + NAME for info in pipeline.store.draws()):
            await asyncio.sleep(0)
        say(waiting=not task.done(), calls=model.calls)
        answer = await task
        say(data=answer.data, cached=answer.cached, calls=model.calls, made=model.made)
asyncio.run(main())
"""


def held(start, *, n=1):
    """Return a process that is in the middle of a call for a sample, and one that waits for it."""
    holder = start("holder", HOLD)
    holder.tell(str(n))
    for _ in range(n):
        assert holder.hear()["asked"] == "q"
    waiter = start("waiter", WAIT)
    waiter.tell(str(n))
    assert waiter.hear() == {"waiting": True, "calls": 0}
    return holder, waiter


def test_a_sample_that_another_process_generates_is_awaited_not_bought_again(start):
    """C4."""
    holder, waiter = held(start)
    holder.tell("go")
    held_answer, waited = holder.hear(), waiter.hear()
    assert waited["data"] == held_answer["data"]
    assert (held_answer["cached"], waited["cached"], waited["calls"]) == ([False], [True], 0)
    holder.end()
    waiter.end()


@pytest.mark.parametrize("end", ["kill", "fail"])
def test_when_the_other_process_dies_or_fails_the_waiter_generates_the_sample(start, cache, end):
    """C4 and C8: no clock decides, so it takes seconds at most."""
    holder, waiter = held(start)
    begun = time.monotonic()
    if end == "kill":
        holder.kill()
    else:
        holder.tell("fail")
    waited = waiter.hear()
    assert time.monotonic() - begun < 5
    assert waited["data"] == waited["made"]
    assert (waited["cached"], waited["calls"]) == ([False], 1)
    waiter.end()
    check_ledger(cache)


def test_what_a_killed_process_had_stored_is_not_bought_again(start, cache):
    """C7: with one of three samples stored, two are taken over."""
    holder, waiter = held(start, n=3)
    holder.tell("go")
    store, _ = open_store(cache)
    [key] = [info.key for info in store.keys("")]
    while not (stored := [json.loads(sample.payload) for sample in store.samples(key)]):
        pass  # the other process tells nobody when its first sample is down
    store.close()
    holder.kill()
    waited = waiter.hear()
    assert len(stored) == 1
    assert stored[0] in waited["data"]
    assert len(waited["made"]) == 2
    assert sorted(waited["data"]) == sorted(stored + waited["made"])
    assert sorted(waited["cached"]) == [False, False, True]
    waiter.end()
    check_ledger(cache)


@pytest.mark.parametrize("cache", ["folder"], indirect=True)
def test_a_stopped_process_keeps_its_lease(start):
    """A process that is alive but slow loses nothing: the operating system's lock decides."""
    holder, waiter = held(start)
    holder.process.send_signal(signal.SIGSTOP)
    observer = start("observer", WAIT)
    observer.tell("1")
    assert observer.hear() == {"waiting": True, "calls": 0}
    holder.process.send_signal(signal.SIGCONT)
    holder.tell("go")
    answers = [worker.hear()["data"] for worker in (holder, waiter, observer)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("cache", ["valkey", "postgres"], indirect=True)
def test_c6_what_a_stopped_process_brings_late_is_kept_as_an_extra(start, cache):
    """On a server a lease ends by the clock: another process generates the sample, and both are kept."""
    holder, waiter = held(start)
    holder.process.send_signal(signal.SIGSTOP)
    waited = waiter.hear()
    assert (waited["cached"], waited["calls"]) == ([False], 1)
    holder.process.send_signal(signal.SIGCONT)
    holder.tell("go")
    late = holder.hear()
    assert late["data"] == waited["data"], "the draw of both is that of the one who was in time"
    assert late["cached"] == [True]
    store, _ = open_store(cache)
    with contextlib.closing(store):
        [key] = [info.key for info in store.keys("")]
        kept = [json.loads(sample.payload) for sample in store.samples(key)]
    assert kept[:1] == waited["data"]
    assert len(kept) == 2
    check_ledger(cache)


BIG = """
async def main():
    model = Model()
    async with OnlineAPI(model, FOLDER) as pipeline:
        say(ready=True)
        count = int(hear())
        got = 0
        requests = [
            Request(f"question {i % count}", request_id=str(i // count), namespace=NAME)
            for i in range(2 * count)
        ]
        for start in range(0, len(requests), 500):
            answers = await asyncio.gather(*map(pipeline.request, requests[start : start + 500]))
            got += sum(len(answer.data) for answer in answers)
    say(got=got, made=len(model.made), stats=pipeline.stats().as_dict())
asyncio.run(main())
"""


@pytest.mark.slow
def test_two_processes_with_thousands_of_requests_each_lose_nothing(start, cache):
    """C4 and C7: in two namespaces, they generate together what one of them needs."""
    questions = sized(600, 5000)
    workers = [start(name, BIG) for name in ("one", "two")]
    assert all(worker.hear()["ready"] for worker in workers)
    for worker in workers:
        worker.tell(str(questions))
    reports = [worker.hear() for worker in workers]
    for worker in workers:
        worker.end()
    assert [report["got"] for report in reports] == [2 * questions] * 2
    assert sum(report["made"] for report in reports) == 2 * questions
    assert sum(report["stats"]["misses"] for report in reports) == 2 * questions
    check_ledger(cache)
    store, _ = open_store(cache)
    totals = store.totals()
    assert (totals["keys"], totals["samples"], totals["draws"]) == (questions, 2 * questions, 4 * questions)
    store.close()
