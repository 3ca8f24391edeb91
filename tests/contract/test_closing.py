"""What closing a pipeline waits for (C7)."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cachepipe import DiskStore, OnlineAPI, Request, Response
from cachepipe.testing import ScriptedModel


def test_c7_closing_on_one_loop_waits_for_requests_on_the_others(tmp_path, turns):
    begun, here = threading.Event(), []

    class Model:
        async def request(self, request):
            gate = asyncio.Event()
            here.append((asyncio.get_running_loop(), gate))
            begun.set()
            await gate.wait()
            return Response(["x"] * request.n)

    pipeline = OnlineAPI(Model(), tmp_path)
    key, answers = pipeline.key(Request("p")), []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(pipeline.request(Request("p")))))

    async def close():
        thread.start()
        assert await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(pipeline.close())
        loop, gate = here[0]
        await turns(5)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(turns(5), loop))
        await turns(5)
        ended = pipeline._cacher._ended
        loop.call_soon_threadsafe(gate.set)
        async with asyncio.timeout(20):
            await closing
        assert not ended, "closed under the other loop's request"

    asyncio.run(close())
    thread.join(20)
    assert [answer.data for answer in answers] == [["x"]]
    store = DiskStore(tmp_path)
    assert [sample.index for sample in store.samples(key)] == [0]
    store.close()


@pytest.mark.anyio
async def test_c7_a_close_that_was_cancelled_can_be_finished(store, turns):
    model = ScriptedModel(hold=True)
    pipeline = OnlineAPI(model, store)
    task = asyncio.create_task(pipeline.request(Request("p")))
    await model.begun(1)
    first = asyncio.create_task(pipeline.close())
    await turns(5)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.create_task(pipeline.close())
    await turns(20)
    assert not second.done(), "returned with a request in flight"
    model.open()
    async with asyncio.timeout(10):
        await second
    assert task.done()
    assert task.result().data == ["p#0"]
