"""A process that is stopped, or takes too long, does not block the others in silence (C4)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import warnings

import pytest

from cachepipe import DiskStore, OnlineAPI, Request, Response, WaitingForOthers
from cachepipe.stages import engine
from cachepipe.stores import leases

WORKER = """
import asyncio, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    model = "m"

    async def request(self, request):
        print("asked", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return Response(["theirs"] * request.n)

async def main():
    async with OnlineAPI(Model(), sys.argv[1]) as pipeline:
        response = await pipeline.request(Request("q", namespace="a"))
        print(response.data, response.cached, pipeline.stats().unreported, flush=True)

asyncio.run(main())
"""


class Model:
    model = "m"

    async def request(self, request):
        return Response(["ours"] * request.n)


@pytest.fixture
def worker(tmp_path):
    """Another process that is generating the sample of a question, until it is told to go on."""
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "asked\n"
        yield process
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(engine, "_LONG", 0.0)


async def ask(folder, **options):
    async with OnlineAPI(Model(), folder, **options) as pipeline:
        return await pipeline.request(Request("q", namespace="b"))


def finish(worker):
    worker.stdin.write("\n")
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def test_a_sample_of_a_stopped_process_is_generated_here_and_its_own_is_kept_as_an_extra(worker, tmp_path):
    worker.send_signal(signal.SIGSTOP)
    with pytest.warns(WaitingForOthers, match=rf"process {worker.pid} on host .*stopped") as told:
        response = asyncio.run(ask(tmp_path / "cache"))
    assert (response.data, response.cached) == (["ours"], [False])
    assert len(told) == 1
    worker.send_signal(signal.SIGCONT)
    assert finish(worker) == "['ours'] [True] 1"
    worker.wait()
    with contextlib.closing(DiskStore(tmp_path / "cache")) as store:
        [info] = store.keys()
        assert [sample.payload for sample in store.samples(info.key)] == [b'"ours"', b'"theirs"']


def test_a_sample_that_takes_others_too_long_is_generated_here_if_that_is_wanted(worker, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response = asyncio.run(ask(tmp_path / "cache", wait_for_others=0.0))
    assert (response.data, response.cached) == (["ours"], [False])
    assert finish(worker) == "['ours'] [True] 1"


def test_who_waits_for_a_process_that_runs_is_told_once_and_gets_its_sample(worker, tmp_path, monkeypatch):
    """C4: nothing is bought twice without being asked for."""

    told = []

    def tell(message, *_more, **_options):
        told.append(str(message))
        assert finish(worker) == "['theirs'] [False] 0"

    monkeypatch.setattr(engine, "warn", tell)
    response = asyncio.run(ask(tmp_path / "cache"))
    assert len(told) == 1
    assert "wait_for_others=SECONDS" in told[0]
    assert (response.data, response.cached) == (["theirs"], [True])


def test_wait_for_others_is_a_number_of_seconds(tmp_path):
    for odd in (-1, float("nan")):
        with pytest.raises(ValueError, match="number of seconds"):
            DiskStore(tmp_path, wait_for_others=odd)


def test_the_name_of_a_lease_that_came_with_a_cache_is_only_shown():
    for name in ("", "-", "../../x", "host-12x-ab", "h-99999999999-ab"):
        assert not leases.process(name).stopped
