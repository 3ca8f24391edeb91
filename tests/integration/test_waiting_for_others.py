"""Samples that other processes generate: a process that is stopped or slow blocks nobody in silence (C4)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import warnings

import forked
import pytest

from cachepipe import DiskStore, OnlineAPI, Request, Response, WaitingForOthers
from cachepipe.cache import others
from cachepipe.stores import leases
from cachepipe.testing import ScriptedError, ScriptedModel

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


@contextlib.contextmanager
def working(folder):
    """Another process that is generating the sample of a question, until it is told to go on."""
    command = [sys.executable, "-c", WORKER, str(folder)]
    with forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "asked\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture
def worker(tmp_path):
    with working(tmp_path / "cache") as process:
        yield process


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(others, "LONG", 0.0)


async def ask(folder, **options):
    async with OnlineAPI(Model(), folder, **options) as pipeline:
        return await pipeline.request(Request("q", namespace="b"))


def finish(worker):
    worker.stdin.write("\n")
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def waits(pipeline):
    return any(lane.strangers for lane in pipeline._cacher._cache.open_queues())


@pytest.mark.usefixtures("impatient")
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


@pytest.mark.usefixtures("impatient")
def test_a_sample_that_takes_others_too_long_is_generated_here_if_that_is_wanted(worker, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response = asyncio.run(ask(tmp_path / "cache", wait_for_others=0.0))
    assert (response.data, response.cached) == (["ours"], [False])
    assert finish(worker) == "['ours'] [True] 1"


@pytest.mark.usefixtures("impatient")
def test_who_waits_for_a_process_that_runs_is_told_once_and_gets_its_sample(worker, tmp_path, monkeypatch):
    """C4: nothing is bought twice without being asked for."""

    told = []

    def tell(message, *_more, **_options):
        told.append(str(message))
        assert finish(worker) == "['theirs'] [False] 0"

    monkeypatch.setattr(others, "warn", tell)
    response = asyncio.run(ask(tmp_path / "cache"))
    assert len(told) == 1
    assert "wait_for_others=SECONDS" in told[0]
    assert (response.data, response.cached) == (["theirs"], [True])


@pytest.mark.usefixtures("worker", "impatient")
def test_c8_a_warning_that_was_made_an_error_reaches_who_waits(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WaitingForOthers):
            asyncio.run(asyncio.wait_for(ask(tmp_path / "cache"), 20))


def test_wait_for_others_is_a_number_of_seconds(tmp_path):
    for odd in (-1, float("nan")):
        with pytest.raises(ValueError, match="number of seconds"):
            DiskStore(tmp_path, wait_for_others=odd)


def test_the_name_of_a_lease_that_came_with_a_cache_is_only_shown():
    for name in ("", "-", "../../x", "host-12x-ab", "h-99999999999-ab"):
        assert not leases.process(name).stopped


@pytest.mark.anyio
async def test_c7_closing_waits_for_samples_that_another_process_generates(worker, tmp_path, turns, until):
    pipeline = OnlineAPI(Model(), tmp_path / "cache")
    task = asyncio.create_task(pipeline.request(Request("q", namespace="b")))
    await until(lambda: waits(pipeline))
    closing = asyncio.create_task(pipeline.close())
    await turns(20)
    assert not pipeline._cacher._ended, "closed under a request in flight"
    assert await asyncio.to_thread(finish, worker) == "['theirs'] [False] 0"
    async with asyncio.timeout(20):
        assert (await task).data == ["theirs"]
        await closing


@pytest.mark.anyio
async def test_c8_a_sample_whose_call_failed_here_may_come_from_another_process(tmp_path, until):
    model = ScriptedModel([ScriptedError()])
    async with OnlineAPI(model, tmp_path / "cache", scope="m") as pipeline:
        with pytest.raises(ScriptedError):
            await pipeline.request(Request("q", namespace="b"))
        with working(tmp_path / "cache") as worker:
            task = asyncio.create_task(pipeline.request(Request("q", namespace="b")))
            await until(lambda: waits(pipeline))
            assert await asyncio.to_thread(finish, worker) == "['theirs'] [False] 0"
            async with asyncio.timeout(20):
                assert (await task).data == ["theirs"]
