"""Many workers on one server, in one namespace: workers are killed and stopped, and the server is killed.

When all is over, the work is done once more: what a caller saw comes again, and nothing is bought.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import logging
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import forked
import inside
import pytest
from valkeys import ValkeyCluster, ValkeyNode

from cachepipe import OnlineAPI, Request, StoreError, open_store, prune
from cachepipe.stores.remote.verify import check
from cachepipe.stores.sums import statements
from cachepipe.testing import ScriptedModel
from cachepipe.testing.postgres import PostgresServer

AT_ONCE = 16
LOG = logging.getLogger(__name__)
"""Says what happened when a test fails; the order of the harms follows from the seed."""

WORKER = """
import asyncio, itertools, json, os, sys, warnings
from cachepipe import OnlineAPI, Request, Response, SharedDraw
from cachepipe.errors import FailedOver, FreshIds
url, log, name, namespace, *numbers = sys.argv[1:]
count, questions, at_once = map(int, numbers)
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*confirms samples that no replica has")
warnings.simplefilter("ignore", SharedDraw)  # its predecessor's lease may not have ended yet
warnings.simplefilter("ignore", FreshIds)
warnings.simplefilter("always", FailedOver)

def say(value):  # in one piece, as threads speak too
    sys.stdout.write(json.dumps(value) + "\\n")
    sys.stdout.flush()

warnings.showwarning = lambda message, *_: say(str(message))
serial = itertools.count()
made = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Model:
    cache_scope = "m"
    max_n = 3
    async def request(self, request):
        data = [f"{name}:{namespace}:{os.getpid()}:{next(serial)}" for _ in range(request.n)]
        os.write(made, "".join(f"{one}\\n" for one in data).encode())
        await asyncio.sleep(next(serial) % 11 / 1000)  # it is paid, and on its way
        return Response(data)

async def main():
    async with OnlineAPI(Model(), url) as pipeline:
        free = asyncio.Semaphore(at_once)
        async def one(place):
            async with free:
                prompt, request_id = f"q{place % questions}", f"{name}-{place}"
                answer = await pipeline.request(Request(prompt, request_id=request_id, namespace=namespace))
            say([prompt, request_id, namespace, answer.data])
        await asyncio.gather(*map(one, range(count)))
asyncio.run(main())
"""


class Storm:
    """Workers on a server, and what callers have seen.

    Args:
        server: the server.
        folder: a folder for the log of what the model makes.
        workers: the number of workers.
        count: the number of draws of each worker.
        questions: the number of questions that they share.
        namespaces: the number of namespaces; there are so many workers in each, which make the same draws.
    """

    def __init__(self, server, folder, *, workers, count, questions, namespaces=1):
        self.server = server
        self.log = folder / "made"
        self.workers, self.count, self.questions = workers, count, questions
        self.total = workers * count * namespaces
        self.url = server.url("&lease=1&local=off")  # a copy would hide what the server has lost
        self.lines = queue.Queue()
        self.seen = {}
        self.told = []  # of failovers
        self.most_bought_twice = 0
        self.behind = 0  # answers while a replica got nothing
        self.names = [
            (f"w{number}", f"n{namespace}") for namespace in range(namespaces) for number in range(workers)
        ]
        self.processes = {name: self.start(name) for name in self.names}

    def start(self, name):
        numbers = map(str, (self.count, self.questions, AT_ONCE))
        process = forked.Popen(
            [sys.executable, "-c", WORKER, self.url, str(self.log), *name, *numbers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self.read, args=(name, process), daemon=True).start()
        return process

    def read(self, name, process):
        for line in process.stdout:
            if line.endswith("\n"):
                self.lines.put(json.loads(line))
        errors = process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        self.lines.put((name, process.wait(), errors))

    def hear(self):
        """Take note of the next answer, or of the end of a worker; start it again if it was killed."""
        told = self.lines.get(timeout=60)
        if isinstance(told, str):
            LOG.warning("%s", told)
            self.told.append(told)
            return
        if isinstance(told, list):
            *draw, data = told
            assert self.seen.setdefault(tuple(draw), data) == data, "C2: a draw got other samples"
            return
        name, code, errors = told
        if code == -signal.SIGKILL:
            self.processes[name] = self.start(name)
        else:
            del self.processes[name]
            assert (code, errors) == (0, ""), errors

    def hear_some(self):
        """Hear some more answers."""
        for _ in range(2 * AT_ONCE * len(self.names)):
            if self.processes:
                self.hear()
                self.behind += 1

    def blow(self, kind, dice):
        """Do some harm; each draw that a victim has in flight may be paid twice."""
        name = dice.choice(sorted(self.processes))
        LOG.warning("after %d answers: %s %s", len(self.seen), kind, "" if kind == "server" else name)
        self.most_bought_twice += AT_ONCE * (len(self.names) if kind == "server" else 1)
        match kind:
            case "kill":
                self.processes[name].kill()
            case "stop":
                process = self.processes[name]
                process.send_signal(signal.SIGSTOP)
                threading.Timer(dice.uniform(0.2, 1.5), process.send_signal, [signal.SIGCONT]).start()
            case "server":
                self.server.kill()
                self.server.start()
            case "failover":
                self.server.fail_over(dice.choice(self.server.primaries()))
            case "failover to a replica that is behind":
                self.server.fail_over(dice.choice(self.server.primaries()), self.hear_some)

    def run(self, *kinds, harms, seed):
        """Let the workers finish, with harm of these kinds in turn, at random moments."""
        dice = random.Random(seed)
        kinds = itertools.cycle(kinds[:harms])
        moments = collections.deque(sorted(dice.sample(range(1, self.total), harms)))
        while self.processes:
            self.hear()
            while moments and len(self.seen) >= moments[0] and self.processes:
                moments.popleft()
                self.blow(next(kinds), dice)

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.send_signal(signal.SIGCONT)


SERVERS = {
    "valkey": lambda folder: ValkeyNode(folder / "server"),
    "postgres": lambda _: PostgresServer(),
    "cluster": lambda folder: ValkeyCluster(folder, appendfsync="everysec"),
}


@pytest.fixture
def new_storm(request, tmp_path, monkeypatch):
    """A function that starts workers on a server that writes each sample to its disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    server = SERVERS[request.param](tmp_path)
    storms = []

    def make(**options):
        storms.append(Storm(server, tmp_path, **options))
        return storms[-1]

    yield make
    for storm in storms:
        storm.close()
    server.close()


async def rerun(storm):
    """Ask everything again; return what each request got, and how many samples were bought."""
    model = ScriptedModel(cache_scope="m", max_n=3)
    places = [
        (f"q{place % storm.questions}", f"{name}-{place}", namespace)
        for name, namespace in storm.names
        for place in range(storm.count)
    ]
    got = {}
    async with OnlineAPI(model, storm.url) as pipeline:
        for start in range(0, len(places), 500):
            page = places[start : start + 500]
            requests = [
                Request(prompt, request_id=request_id, namespace=namespace)
                for prompt, request_id, namespace in page
            ]
            answers = await asyncio.gather(*map(pipeline.request, requests))
            got.update(zip(page, answers, strict=True))
    return got, model.generated


def survey(storm):
    """Check every promise after a storm; return how many samples were bought twice."""
    assert len(storm.seen) == storm.total
    got, bought = asyncio.run(rerun(storm))
    assert not bought, "what was answered is bought again"
    assert {place: answer.data for place, answer in got.items()} == storm.seen, "C2 and C7"
    given = collections.Counter((prompt, *answer.data) for (prompt, *_), answer in got.items())
    assert set(given.values()) == {1}, "C1: a sample was drawn twice"
    made = storm.log.read_text().split()
    assert len(made) == len(set(made))
    assert {answer.data[0] for answer in got.values()} <= {*made}
    assert storm.total <= len(made) <= storm.total + storm.most_bought_twice, "C4"
    store, _ = open_store(storm.url)
    with contextlib.closing(store):
        drawn = collections.defaultdict(set)
        for info in store.draws():
            drawn[info.draw.namespace, info.draw.key].update(info.indices)
        assert inside.taken(store) == drawn
        assert not check(store.session).problems
    return len(made) - storm.total


SMALL = {"workers": 3, "count": 30, "questions": 6}
WHOLE = {"workers": 8, "count": 2500, "questions": 500}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("new_storm", ["valkey", "postgres"], indirect=True)
@pytest.mark.parametrize("seed", range(1))
def test_c1_c2_c7_workers_and_a_server_that_are_killed_and_stopped(new_storm, seed, full):
    storm = new_storm(**(WHOLE if full else SMALL))
    storm.run("kill", "server", "stop", "kill", harms=32 if full else 3, seed=seed)
    LOG.warning("%d samples bought twice, %d allowed", survey(storm), storm.most_bought_twice)


REMOVES = """
import sys
from cachepipe import StoreError, forget
print("begins", flush=True)
try:
    forget(sys.argv[1], "old", samples=True)
except StoreError as error:
    told = str(error)
    assert "another command is removing" in told or "no draws of the namespace" in told, told
"""


async def draw_all(url, model, namespace, count):
    """Draw a sample of each question; return them."""
    async with OnlineAPI(model, url) as pipeline:
        requests = [Request(f"q{number}", request_id="a", namespace=namespace) for number in range(count)]
        return [answer.data for answer in await asyncio.gather(*map(pipeline.request, requests))]


@pytest.mark.timeout(300)
def test_c1_c2_c6_commands_that_remove_are_killed_beside_others_and_a_worker(new_valkey_url, full):
    """What stays is replayed, and all that was bought counts once, whatever was deleted."""
    url, count, model = new_valkey_url() + "&lease=0.3&local=off", 2000 if full else 200, ScriptedModel()
    dice = random.Random(0)
    asyncio.run(draw_all(url, model, "old", count))
    for _ in range(6 if full else 1):
        commands = [
            subprocess.Popen([sys.executable, "-c", REMOVES, url], stdout=subprocess.PIPE) for _ in range(2)
        ]
        for command in commands:
            assert command.stdout.readline() == b"begins\n"
        kept = asyncio.run(draw_all(url, model, "new", dice.randrange(1, count)))
        commands[0].kill()
        for command in commands:
            command.stdout.close()
            assert command.wait() in (0, -signal.SIGKILL)
    store, _ = open_store(url)
    with contextlib.closing(store):
        for _ in range(2000):  # until the lease of the one that was killed has ended
            with contextlib.suppress(StoreError):
                prune(store)
                break
            time.sleep(0.01)
        assert not check(store.session).problems
        spent = sum(statement.spent.counts()["samples"] for statement in statements(store).values())
        assert spent == model.generated
        assert store.removals()
    bought = model.generated
    assert asyncio.run(draw_all(url, model, "new", len(kept))) == kept
    assert model.generated == bought


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
@pytest.mark.parametrize("new_storm", ["cluster"], indirect=True)
@pytest.mark.parametrize("kind", ["failover", "failover to a replica that is behind"])
def test_failovers_of_a_cluster_lose_the_latest_writes_at_most(new_storm, kind, full):
    """Two namespaces make the same draws. Every request is answered, and what was lost is drawn anew."""
    size = {"workers": 2, "count": 600} if full else {"workers": 1, "count": 400}
    storm = new_storm(**size, questions=30, namespaces=2)
    storm.run(kind, harms=4 if full else 1, seed=0)
    assert len(storm.seen) == storm.total
    got, bought = asyncio.run(rerun(storm))
    given = collections.Counter((prompt, namespace, *one.data) for (prompt, _, namespace), one in got.items())
    assert set(given.values()) == {1}, "C1"
    lost = sum(storm.seen[place] != answer.data for place, answer in got.items())
    shown = collections.Counter(
        (prompt, namespace, *data) for (prompt, _, namespace), data in storm.seen.items()
    )
    twice = shown.total() - len(shown)
    LOG.warning(
        "%d of %d draws lost, %d samples bought again, %d shown twice", lost, storm.total, bought, twice
    )
    behind = storm.behind + AT_ONCE * len(storm.names) * (kind != "failover") * (4 if full else 1)
    assert lost <= behind, "what was confirmed while no replica was in step, and what was in flight"
    assert bought <= lost
    assert any("took over from another one" in told for told in storm.told)
    if kind != "failover":
        assert not all("stored 0 samples and 0 draws again" in told for told in storm.told)
    again, bought = asyncio.run(rerun(storm))
    assert not bought
    assert {place: one.data for place, one in again.items()} == {
        place: one.data for place, one in got.items()
    }, "C2"
