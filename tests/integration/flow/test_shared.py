"""Quotas that processes hold together."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys

import forked
import pytest

from cachepipe import Limits, Service
from cachepipe.errors import StoreError
from cachepipe.testing import FakeClock, MockServer, MockSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock():
    return FakeClock(1000.0)


@pytest.fixture
def make(tmp_path, clock):
    """Limits as another process would have them: only the file is shared."""
    made = []

    def limits(*quota, **options):
        options = {"adaptive": False, "transit": 0, "clock": clock, "shared": tmp_path / "shared", **options}
        made.append(Limits(*quota, **options))
        return made[-1]

    yield limits
    for each in made:
        each.close()


async def many(limits, clock, count, let_go, takes=0.0, **how):
    async def call():
        with await limits.enter(**how):
            let_go.append(clock.now())
            if takes:
                await clock.sleep(takes)

    return [asyncio.create_task(call()) for _ in range(count)]


async def test_requests_are_counted_together(make, clock):
    one, other, let_go = make(5, None, 1.0), make(5, None, 1.0), []
    tasks = await many(one, clock, 12, let_go) + await many(other, clock, 12, let_go)
    await clock.advance(10)
    assert all(task.done() for task in tasks)
    assert all(later - earlier >= 1 for earlier, later in zip(let_go, let_go[5:], strict=False))
    assert let_go[-1] <= 1000 + 5.1


async def test_tokens_are_counted_together_and_put_right(make, clock):
    one, other = make(None, 100, 60.0), make(None, 100, 60.0)
    slot = await one.enter(tokens=80)
    task = asyncio.create_task(other.enter(tokens=50))
    await clock.advance(1)
    assert not task.done()
    slot.end(tokens=20)
    await clock.advance(61)
    assert task.done()
    third = asyncio.create_task(one.enter(tokens=50))
    await clock.settle()
    assert third.done()
    for each in (task, third):
        (await each).end()


async def test_concurrency_is_counted_together(make, clock):
    quota = (None, None, 1.0)  # the calls take longer than the interval
    one, other, let_go = make(*quota, max_concurrency=2), make(*quota, max_concurrency=2), []
    tasks = await many(one, clock, 3, let_go, 10) + await many(other, clock, 3, let_go, 10)
    await clock.advance(5)
    assert len(let_go) == 2
    await clock.advance(40)
    assert all(task.done() for task in tasks)


async def test_a_process_with_much_to_do_does_not_keep_every_place(make, clock, monkeypatch):
    """It sees at once when one of its calls has ended, the other only when it looks again."""
    options = {"max_concurrency": 2}
    one, other, let_go, others = make(**options), make(**options), [], []
    (await one.enter()).end()
    (await other.enter()).end()
    other._shared._owner = "other"
    monkeypatch.setattr("cachepipe.flow.shared.leases.alive", lambda folder, name: True)
    await many(one, clock, 100, let_go, 1)
    await clock.settle()
    tasks = await many(other, clock, 5, others, 1)
    await clock.advance(15)
    assert all(task.done() for task in tasks)
    assert len(let_go) >= 20


async def test_slots_of_limits_in_one_process_are_told_apart(make, clock, tmp_path):
    """Of one endpoint twice, and of two: what one gives back or ends is none of the other's."""
    one, same = make(None, 100, 60.0), make(None, 100, 60.0)
    other = make(1, None, 60.0, name="other")
    slots = [await each.enter(tokens=40) for each in (one, same, other)]
    assert len({slot.shared for slot in slots}) == 3
    slots[0].end(tokens=10)
    third = asyncio.create_task(one.enter(tokens=60))
    await clock.advance(1)
    assert not third.done()  # 10 and 40
    one._shared.give_back(slots[1].shared)
    await clock.advance(1)
    assert third.done()
    fourth = asyncio.create_task(other.enter())
    await clock.advance(1)
    assert not fourth.done()
    fourth.cancel()


async def test_an_answer_is_not_lost_where_the_end_of_its_call_cannot_be_written(make, tmp_path):
    limits = make(5, None, 60.0)
    slot = await limits.enter()
    limits._shared._connection.execute("DROP TABLE calls")
    slot.end()
    assert limits._shared.late
    with pytest.raises(StoreError, match="cannot be used: no such table"):
        await limits.enter()
    assert (limits.stats().waiting, limits.stats().in_flight) == (0, 0)


async def test_a_folder_that_is_none_is_an_error_of_ours_and_nobody_waits_on(make, tmp_path):
    (tmp_path / "shared").write_text("a file")
    limits = make(5, None, 60.0)
    for _ in range(2):
        with pytest.raises(StoreError, match="quotas shared in"):
            await limits.enter()
    assert limits.stats().waiting == 0


@pytest.mark.parametrize("status", [429, 503])
async def test_a_pause_that_one_was_asked_for_holds_for_all(make, clock, status):
    class RefusedError(Exception):
        status_code = status
        response = type("Response", (), {"headers": {"retry-after": "30"}})

    one, other, let_go = make(), make(), []
    (await one.enter(model="m")).end(error=RefusedError())
    [task] = await many(other, clock, 1, let_go, model="m")
    await many(other, clock, 1, let_go, model="n")
    await clock.advance(29)
    assert let_go == [1000.0]
    await clock.advance(2)
    assert task.done()


async def test_models_have_shared_quotas_of_their_own(make, clock):
    options = {"per_model": {"slow": {"max_requests": 1, "interval": 10.0}}}
    one, other, let_go = make(**options), make(**options), []
    await many(one, clock, 1, let_go, model="slow")
    await many(other, clock, 1, let_go, model="slow")
    await many(other, clock, 1, let_go, model="quick")
    await clock.advance(9)
    assert let_go == [1000.0, 1000.0]
    await clock.advance(2)
    assert len(let_go) == 3


async def test_a_held_lock_holds_nobody_up(make, clock, tmp_path):
    limits = make(5, None, 60.0)
    (await limits.enter()).end()
    slot = await limits.enter()
    holder = sqlite3.connect(tmp_path / "shared" / "limits.cache.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    slot.end()  # at once; it is written later
    task = asyncio.create_task(limits.enter())
    await clock.advance(1)
    assert not task.done()
    holder.execute("COMMIT")
    await clock.advance(0.02)
    assert task.done()
    assert holder.execute("SELECT count(*), sum(running) FROM calls").fetchone() == (3, 1)
    holder.close()
    (await task).end()


async def test_another_endpoint_in_the_same_folder_has_quotas_of_its_own(make, clock):
    one, other = make(1, None, 60.0, name="a"), make(1, None, 60.0, name="b")
    (await one.enter()).end()
    (await asyncio.wait_for(other.enter(), 5)).end()


async def test_times_that_cannot_be_are_those_of_before_a_restart(make, clock, tmp_path):
    before = make(1, None, 60.0)
    (await before.enter()).end()
    clock._now = 5.0  # the machine's clock begins anew
    after = make(1, None, 60.0)
    (await asyncio.wait_for(after.enter(), 5)).end()


async def test_a_call_taken_while_another_process_waited_for_the_lock_counts(make, clock):
    """The other has read the time before, so that the call lies in its future."""
    one, other = make(1, None, 60.0), make(1, None, 60.0)
    await clock.advance(5)
    (await one.enter()).end()
    clock._now -= 0.01
    task = asyncio.create_task(other.enter())
    await clock.advance(10)
    assert not task.done()
    task.cancel()


async def test_a_call_counts_from_when_it_is_made_though_its_loop_was_busy(make, clock):
    one, other, let_go = make(1, None, 1.0), make(1, None, 1.0), []
    (await one.enter()).end()
    [task] = await many(one, clock, 1, let_go, takes=100)
    await clock.settle()
    clock._now += 1.0
    with one._lock:
        one._dispatch()  # it is let go, and its loop is busy for three seconds
    clock._now += 3.0
    await clock.settle()
    assert let_go == [1004.0]
    [second] = await many(other, clock, 1, let_go)
    await clock.advance(0.9)
    assert not second.done()
    await clock.advance(0.2)
    assert second.done()
    task.cancel()


async def test_another_interval_for_the_same_endpoint_forgets_nothing(make, clock):
    """Two programs may have set the limits of one endpoint differently; each keeps to its own."""
    hourly, quick = make(2, None, 3600.0), make(5, None, 1.0)
    for _ in range(2):
        (await hourly.enter()).end()
    (await quick.enter()).end()
    await clock.advance(10)
    (await quick.enter()).end()
    task = asyncio.create_task(hourly.enter())
    await clock.advance(3000)
    assert not task.done()
    task.cancel()


async def test_a_file_that_is_none_is_an_error_of_ours(make, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "limits.cache.db").write_bytes(b"no database" * 500)
    with pytest.raises(StoreError, match="quotas shared in"):
        await make(1, None, 1.0).enter()


async def test_the_file_holds_no_key_and_belongs_to_its_owner_alone(tmp_path):
    service = Service("https://user:secret@host/v1", shared=tmp_path / "shared", max_requests=5)
    (await service.flow.limits.enter()).end()
    await service.close()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "shared").rglob("*") if path.is_file())
    assert b"host/v1" in stored
    assert b"secret" not in stored
    assert (tmp_path / "shared" / "limits.cache.db").stat().st_mode & 0o077 == 0


WORKER = """
import asyncio, sys
from cachepipe import Services, alcall, MemoryStore

async def main(url, folder, name, count, limits):
    service = Services.custom(url, shared=folder, **limits)
    client = service.client(MemoryStore(), name)
    print("ready", flush=True)
    async def ask(number):
        messages = [{"role": "user", "content": f"{name} {number}"}]
        await client.chat.completions.create(model="m", messages=messages)
    await alcall(range(count), ask)
    await client.close()
    await service.close()

asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), eval(sys.argv[5])))
"""


def worker(server, folder, name, count, limits):
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        WORKER,
        server.base_url,
        folder,
        name,
        str(count),
        repr(limits),
    ]
    return forked.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_keep_one_limit_as_the_server_counts(tmp_path):
    limits = {"max_requests": 6, "max_tokens": None, "interval": 1, "transit": 10}
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=4)) as server:
        workers = [worker(server, str(tmp_path), name, 6, limits) for name in "abc"]
        assert [each.wait(60) for each in workers] == [0, 0, 0]
        for each in workers:
            each.stdout.close()
        times = sorted(entry.time for entry in server.stats.log)
    assert len(times) == 18
    assert all(later - earlier >= 1 for earlier, later in zip(times, times[6:], strict=False))


def test_calls_of_a_killed_process_are_under_way_no_longer(tmp_path):
    limits = {"max_requests": None, "max_tokens": None, "max_concurrency": 1}
    with MockServer.in_thread(MockSettings(seed=1, paused=True)) as server:
        with worker(server, str(tmp_path), "killed", 1, limits) as killed:
            server.wait_until(lambda stats: stats.in_flight == 1, 30)
            os.kill(killed.pid, signal.SIGKILL)
            killed.wait(30)
        server.settings = MockSettings(seed=1)
        with worker(server, str(tmp_path), "next", 1, limits) as after:
            assert after.wait(60) == 0
