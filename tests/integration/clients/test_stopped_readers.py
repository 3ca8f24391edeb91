"""Readers of streams that are cancelled, time out or are interrupted: the retry is the same draw (C8)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time

import anthropic
import openai
import pytest

import cachepipe
from cachepipe import MemoryStore
from cachepipe.clients import Anthropic, AsyncAnthropic, AsyncOpenAI, OpenAI
from cachepipe.providers.info import info
from cachepipe.sdk.http import library_of

HELLO = [{"role": "user", "content": "q"}]
WHOLE = "sample1 goes on"
STOPPED = (TimeoutError, asyncio.CancelledError, openai.APITimeoutError, anthropic.APITimeoutError)


def text_of(event):
    """The text that an event of a stream of either SDK brings, or of what a helper makes of one."""
    if isinstance(event, str):
        return ""
    if choices := getattr(event, "choices", None):
        return choices[0].delta.content or ""
    return getattr(getattr(event, "delta", None), "text", None) or ""


def made(kind, gated, **options):
    url = gated.url if "Anthropic" in kind.__name__ else f"{gated.url}/v1"
    return kind(base_url=url, api_key="k", cache=MemoryStore(), max_retries=0, namespace="n", **options)


def ask(client, **options):
    create = client.messages.create if hasattr(client, "messages") else client.chat.completions.create
    more = {"max_tokens": 9} if hasattr(client, "messages") else {}
    return create(model="m", messages=HELLO, stream=True, **more, **options)


async def read(client):
    """The text of a stream that is read to its end."""
    return "".join([text_of(event) async for event in await ask(client)])


async def cancelled(client):
    begun = asyncio.Event()

    async def reader():
        async for _ in await ask(client):
            begun.set()

    task = asyncio.create_task(reader())
    await begun.wait()
    task.cancel()
    await task


async def timed_out(client):
    async with asyncio.timeout(None) as limit:
        async for _ in await ask(client):
            limit.reschedule(0)


async def waited_for(client):
    stream = await ask(client)
    while True:
        await asyncio.wait_for(anext(stream), 0.05)


async def elsewhere(client):
    """What stops it finds the reader at something else than reading; it closes what it has opened."""
    async with asyncio.timeout(None) as limit, await ask(client) as stream:
        async for _ in stream:
            limit.reschedule(0)
            await asyncio.get_running_loop().create_future()


async def in_a_generator(client):
    async def texts():
        async with await ask(client) as stream:
            async for event in stream:
                yield text_of(event)

    async with asyncio.timeout(None) as limit, contextlib.aclosing(texts()) as parts:
        async for _ in parts:
            limit.reschedule(0)
            await asyncio.get_running_loop().create_future()


async def too_slow(client):
    """The SDK's own time-out."""
    await read(client.with_options(timeout=library_of(client).Timeout(20, read=0.05)))


def with_helper(resource):
    """Return a resource of an SDK; skip the test where this SDK has no helper for streams there."""
    if not hasattr(resource, "stream"):
        pytest.skip("the helper came with openai 1.92")
    return resource


async def with_the_helper(client):
    kind = with_helper(client.messages if hasattr(client, "messages") else client.chat.completions)
    more = {"max_tokens": 9} if hasattr(client, "messages") else {}
    async with asyncio.timeout(None) as limit, kind.stream(model="m", messages=HELLO, **more) as stream:
        async for _ in stream:
            limit.reschedule(0)


async def raw(client):
    create = client.chat.completions.with_streaming_response.create
    async with (
        asyncio.timeout(None) as limit,
        create(model="m", messages=HELLO, stream=True) as response,
    ):
        async for _ in response.iter_lines():
            limit.reschedule(0)


WAYS = [cancelled, timed_out, waited_for, elsewhere, in_a_generator, too_slow, with_the_helper, raw]


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_c8_the_retry_of_a_stopped_reader_is_the_same_draw(gated, turns, way):
    async with made(AsyncOpenAI, gated) as client:
        with pytest.raises((*STOPPED, library_of(client).ReadTimeout)):
            await way(client)
        retry = asyncio.create_task(read(client))
        await turns(50)
        assert not retry.done()
        gated.gate.set()
        assert await retry == WHOLE
        with cachepipe.run():
            assert await read(client) == WHOLE
        assert gated.calls == 1
        assert await read(client) == "sample2 goes on"


@pytest.mark.anyio
@pytest.mark.parametrize("way", [cancelled, elsewhere, with_the_helper, too_slow])
async def test_c8_the_retry_of_a_stopped_reader_of_a_message_is_the_same_draw(gated, way):
    async with made(AsyncAnthropic, gated) as client:
        with pytest.raises((*STOPPED, library_of(client).ReadTimeout)):
            await way(client)
        gated.gate.set()
        assert await read(client) == WHOLE
        with cachepipe.run():
            assert await read(client) == WHOLE
        assert gated.calls == 1


@pytest.mark.anyio
async def test_c8_each_retry_of_a_stopped_reader_is_the_same_draw(gated):
    """Also where a retry is stopped while it waits, and where one that is not streamed ends the matter."""
    async with made(AsyncOpenAI, gated) as client:
        with pytest.raises(TimeoutError):
            await timed_out(client)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(client), 0.01)
        gated.gate.set()
        answer = await client.chat.completions.create(model="m", messages=HELLO)
        assert answer.choices[0].message.content == WHOLE
        assert (info(answer).cached, info(answer).indices) == ((True,), (0,))
        assert gated.calls == 1


@pytest.mark.anyio
async def test_c6_a_sample_whose_reader_was_stopped_is_reported_by_nobody(gated):
    async with made(AsyncOpenAI, gated) as client:
        with pytest.raises(TimeoutError):
            await timed_out(client)
        gated.gate.set()
        await read(client)
        stats = client._cachepipe.cache("read-write").stats()
        assert (stats.generated, stats.unreported, stats.misses, stats.hits) == (1, 1, 0, 1)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["read-write", "replay"])
async def test_c8_the_retry_of_a_stopped_reader_of_a_replay_is_the_same_draw(gated, mode):
    gated.gate.set()
    async with made(AsyncOpenAI, gated) as client:
        for _ in range(2):
            await read(client)
        with cachepipe.run(), cachepipe.using(mode=mode):
            with pytest.raises(TimeoutError):
                await elsewhere(client)
            assert [await read(client), await read(client)] == [WHOLE, "sample2 goes on"]
        assert gated.calls == 2


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["break", "close", "error"])
async def test_c8_a_reader_that_ends_a_stream_of_its_own_accord_has_had_its_draw(gated, way):
    async with made(AsyncOpenAI, gated) as client:
        with contextlib.suppress(ZeroDivisionError):
            async with await ask(client) as stream:
                async for _ in stream:
                    if way == "error":
                        _ = 1 / 0
                    if way == "close":
                        await stream.close()
                    break
        gated.gate.set()
        assert await read(client) == "sample2 goes on"
        with cachepipe.run():
            assert [await read(client), await read(client)] == [WHOLE, "sample2 goes on"]
        assert gated.calls == 2


@pytest.mark.anyio
async def test_c8_what_was_stopped_before_a_stream_began_does_not_stop_its_reader(gated):
    async def handling():
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0)
        except TimeoutError:
            async with await ask(client) as stream:
                async for _ in stream:
                    break

    async def cleaning_up():
        try:
            await asyncio.Event().wait()
        finally:
            await handling()

    async with made(AsyncOpenAI, gated) as client:
        task = asyncio.create_task(cleaning_up())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        gated.gate.set()
        assert await read(client) == "sample2 goes on"


@pytest.mark.anyio
async def test_c8_a_reader_that_is_stopped_after_the_terminal_event_has_had_its_draw(gated):
    async def read_and_wait():
        async with asyncio.timeout(None) as limit, await ask(client) as stream:
            texts.append("".join([text_of(event) async for event in stream]))
            limit.reschedule(0)
            await asyncio.get_running_loop().create_future()

    gated.gate.set()
    texts = []
    async with made(AsyncOpenAI, gated) as client:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await read_and_wait()
        assert texts == [WHOLE, "sample2 goes on"]


class TooLongError(Exception):
    """What a signal handler of the user's raises."""


@contextlib.contextmanager
def raising(error):
    """Have a signal handler raise an error in the main thread once that waits for a stream's next event."""

    def handler(_number, _frame):
        raise error

    def interrupt():
        while sys._current_frames()[main].f_code.co_name != "_until_news":
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    main = threading.get_ident()
    before = signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", [OpenAI, Anthropic])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError, TooLongError, SystemExit])
def test_c8_the_retry_of_a_reader_that_a_signal_stops_is_the_same_draw(gated, kind, error):
    with made(kind, gated) as client:
        stream = ask(client)
        while not text_of(next(stream)):
            pass
        with raising(error), pytest.raises(error):
            for _ in stream:
                pass
        gated.gate.set()
        assert "".join(map(text_of, ask(client))) == WHOLE
        with cachepipe.run():
            assert "".join(map(text_of, ask(client))) == WHOLE
        assert gated.calls == 1


@pytest.mark.parametrize("kind", [OpenAI, Anthropic])
def test_c8_the_retry_of_a_thread_whose_read_timed_out_is_the_same_draw(gated, kind):
    with made(kind, gated) as client:
        hasty = client.with_options(timeout=library_of(client).Timeout(20, read=0.05))
        with pytest.raises((*STOPPED, library_of(client).ReadTimeout)):
            list(ask(hasty))
        gated.gate.set()
        assert "".join(map(text_of, ask(client))) == WHOLE
        with cachepipe.run():
            assert "".join(map(text_of, ask(client))) == WHOLE
        assert gated.calls == 1


def stopped_raw(client, error):
    with client.chat.completions.with_streaming_response.create(
        model="m", messages=HELLO, stream=True
    ) as response:
        for _ in response.iter_bytes():
            raise error


def stopped_in_the_helper(client, error):
    with with_helper(client.chat.completions).stream(model="m", messages=HELLO) as stream:
        for _ in stream:
            raise error


@pytest.mark.parametrize("way", [stopped_raw, stopped_in_the_helper])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_c8_the_retry_of_a_thread_that_is_stopped_between_two_events_is_the_same_draw(gated, way, error):
    with made(OpenAI, gated) as client:
        with pytest.raises(error):
            way(client, error)
        gated.gate.set()
        assert "".join(map(text_of, ask(client))) == WHOLE
        assert gated.calls == 1


@pytest.mark.parametrize("error", [ValueError, GeneratorExit, None])
def test_c8_a_thread_that_ends_a_stream_of_its_own_accord_has_had_its_draw(gated, error):
    with made(OpenAI, gated) as client:
        with contextlib.suppress(ValueError, GeneratorExit), ask(client) as stream:
            next(stream)
            if error is not None:
                raise error
        gated.gate.set()
        assert "".join(map(text_of, ask(client))) == "sample2 goes on"
