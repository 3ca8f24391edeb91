"""Records streams while they pass: the reader gets the events, and the sample is stored.

A recording reads one piece of the upstream at a time, when its reader asks for more. When the terminal event
arrives, the recording stores the samples and then passes that event on. If the reader stops after some
content, the recording reads the rest in the background. If the reader stops before any content, the recording
cancels the call. If another draw waits for the sample, the recording reads ahead of its reader.

A reader that is cancelled, times out or is interrupted before the terminal event gives its draw back, also
when it reads a replayed stream: its retry is the same draw, and gets the recorded sample. A reader that
closes the stream itself has had its draw (C8).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import queue
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any

from cachepipe import forks, wire
from cachepipe.portal import promised
from cachepipe.providers.responses import BodySource, ends_in_order, hang_up, read_timeout, take_read_timeout

ABANDONED_SECONDS = 120.0
"""Seconds for which the rest of a stream is read after its reader has stopped."""
_DRAINED_SECONDS = 0.1
"""Seconds to wait for the end of a response after its terminal event, so that its connection is reused."""
_UNDONE_SECONDS = 1.0
"""The longest time in seconds that the reader of a broken stream waits until its draw is undone."""
_TURNS = 8  # turns of the loop that a leaving reader waits for the end of the response
_LOOK = 0.05  # seconds between checks whether another draw waits for the sample of a stalled reader


class StreamSource(BodySource):
    """A stream that gives its draw back if its reader is stopped before the end.

    Args:
        cut: gives the draw back.

    Attributes:
        finished: whether the reader has taken the terminal event, and asked for what follows.
    """

    def __init__(self, cut: Callable[[], None]) -> None:
        super().__init__()
        self.finished = False
        self._cut = cut
        self._over = False  # whether the draw was given back, or its reader has had it
        self._handled: BaseException | None = None
        self._reader: tuple[asyncio.Task[Any] | None, int] = (None, 0)

    def _watch(self) -> None:
        """Note the exception that the reader handles while it reads; it is not what stops the reader."""
        self._handled = sys.exception()
        task = _current_task()
        self._reader = task, 0 if task is None else task.cancelling()

    def cut_off(self) -> None:
        """Give the draw back, once; any thread may call this."""
        if not self._over:
            self._over = True
            self._cut()

    def closing(self) -> None:
        """Give the draw back if the response is closed because its reader was stopped.

        The garbage collector may close the response too; this shows nothing about the reader.
        """
        if not self._over:
            if self._is_stopped():
                self.cut_off()
            elif not isinstance(sys.exception(), GeneratorExit):
                self._over = True

    def _is_stopped(self) -> bool:
        """Return True if the reader that closes the stream is being cancelled, timed out or interrupted."""
        error = sys.exception()
        if error not in (None, self._handled) and (
            isinstance(error, TimeoutError) or not isinstance(error, Exception | GeneratorExit)
        ):
            return True
        task = _current_task()
        known, cancels = self._reader
        return task is not None and task.cancelling() > (cancels if task is known else 0)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


class ReplayedStream(StreamSource):
    """A stream that is made of stored samples.

    Args:
        events: its events; the last one ends the stream.
        cut: see `StreamSource`.
    """

    def __init__(self, events: Sequence[bytes], cut: Callable[[], None]) -> None:
        super().__init__(cut)
        self.chunks = events
        self._last = len(events)

    def read(self) -> Iterator[bytes]:
        """Iterate over the events."""
        for place, event in enumerate(self.chunks, 1):
            self._watch()
            self._over = self._over or place == self._last
            yield event
        self.finished = True


class RecordedStream(StreamSource):
    """What synchronous and asynchronous recordings have in common.

    Attributes:
        _expired: the error of the reader's own time-out.
        _until_news: waits until more has come.
        _until_drawn: waits for the draw's end, for a number of seconds or without a limit. So the sample is
            stored before the reader sees the end of the stream, and after a failure the reader's next attempt
            is the same draw.

    Args:
        response: the upstream's response, its body unread.
        recorder: assembles the answer.
        hide_usage: whether to hide the usage chunk, because the reader did not ask for it.
        awaited: returns True if another draw waits for the sample.
        cut: see `StreamSource`.
    """

    _expired: type[Exception]
    _until_news: Callable[[], Any]
    _until_drawn: Callable[..., Any]

    def __init__(
        self,
        response: Any,
        recorder: wire.StreamRecorder,
        *,
        hide_usage: bool,
        awaited: Callable[[], bool],
        cut: Callable[[], None],
    ) -> None:
        super().__init__(cut)
        self.upstream = response
        self.recorder = recorder
        self.draw: asyncio.Future[Any] | None = None
        self._hide_usage = hide_usage
        self._awaited = awaited
        self._events: deque[wire.StreamEvent] = deque()
        self._ended = False
        self._left = False
        self._ahead = False
        self._error: BaseException | None = None
        self._patience = take_read_timeout(response, ABANDONED_SECONDS)

    def watch(self, draw: asyncio.Future[Any]) -> None:
        """Note the draw that needs the samples."""
        self.draw = draw

    def _take(self, events: Sequence[wire.StreamEvent]) -> None:
        """Keep events for the reader, if there is one."""
        if not self._left:
            self._events.extend(events)

    def _shown(self, event: wire.StreamEvent) -> bytes:
        """Return the bytes of an event that the reader gets."""
        self._over = self._over or event.terminal
        lean = event.without_usage
        return lean if self._hide_usage and lean is not None else event.raw

    def _steps(self) -> Iterator[bytes | Callable[[], Any]]:
        """Iterate over what the reader gets, and over the methods with which it waits for more."""
        while True:
            while self._events:
                if self._events[0].terminal:
                    yield self._until_drawn
                ends = False
                shown: list[bytes] = []
                while self._events and not ends and not (shown and self._events[0].terminal):
                    event = self._events.popleft()
                    shown.append(self._shown(event))
                    ends = event.terminal
                if together := b"".join(shown):
                    self._watch()
                    yield together
                self.finished = self.finished or ends
            if self._ended and not self._events:
                break
            yield self._until_news
        if self.recorder.complete:  # the terminal event may be missing
            yield self._until_drawn
        if self._error is not None:
            yield functools.partial(self._until_drawn, _UNDONE_SECONDS)
            raise self._error

    @contextlib.contextmanager
    def _leaving_if_stopped(self) -> Iterator[None]:
        """If the reader is stopped while it waits, give the draw back and read on in the background (C8)."""
        try:
            yield
        except BaseException as error:
            self.cut_off()
            self.leave()
            if isinstance(error, self._expired):
                raise read_timeout(self.upstream) from None
            raise

    @staticmethod
    def _bound(draw: asyncio.Future[Any]) -> None:
        """Limit the time for the rest of an abandoned stream; called on the draw's loop."""
        timer = draw.get_loop().call_later(ABANDONED_SECONDS, draw.cancel)
        draw.add_done_callback(lambda _: timer.cancel())

    def withdraw(self) -> None:
        """Stop reading; the draw is cancelled, on its own loop."""
        if self.draw is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self.draw.get_loop().call_soon_threadsafe(self.draw.cancel)

    def _finish(self) -> list[wire.Sample]:
        """Return the samples.

        Raises:
            BadAnswer: when the stream was not a complete answer.
        """
        error = self._error
        if error is not None and not self.recorder.complete:  # a later error loses no sample
            if isinstance(error, Exception):
                raise error
            raise ConnectionResetError(f"the recording was stopped by {type(error).__name__}") from error
        return self.recorder.samples()


class Signal:
    """Wakes one coroutine: a set signal is consumed by the next wait. It costs a fraction of an `Event`.

    Args:
        loop: the event loop.
    """

    __slots__ = ("_loop", "_set", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def awaited(self) -> bool:
        """Whether a coroutine waits."""
        return self._waiter is not None and not self._waiter.done()

    def set(self) -> None:
        """Wake the coroutine that waits, or the next one."""
        waiter = self._waiter
        if waiter is None:
            self._set = True
        elif not waiter.done():
            waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raise an error in the coroutine that waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    async def wait(self) -> None:
        """Wait until the signal is set."""
        if self._set:
            self._set = False
            return
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class AsyncRecordedStream(RecordedStream):
    """A recording on an event loop; `run` is the call that the cache asked for."""

    _expired = TimeoutError

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._loop = asyncio.get_running_loop()
        self._news = Signal(self._loop)  # for the reader: more has come
        self._demand = Signal(self._loop)  # for the recording: the reader wants more
        self._looking: asyncio.TimerHandle | None = None
        self._expiring: asyncio.TimerHandle | None = None
        self._expires = 0.0  # when the time-out of a waiting reader ends, by the loop's clock
        self._onward: AsyncIterator[bytes] | None = None  # of a stream that is too large to be recorded

    async def run(self) -> list[wire.Sample]:
        """Return the samples when the terminal event has come."""
        chunks = self.upstream.aiter_bytes()
        try:
            async for chunk in chunks:
                self._take(self.recorder.feed(chunk))
                self._news.set()
                if self.recorder.overflowed and not self._left:
                    self._onward = chunks
                if self.recorder.ended or self.recorder.overflowed:
                    break
                if self._events and not self._ahead:
                    await self._until_wanted()
            self._take(self.recorder.close(in_order=ends_in_order(self.upstream)))
        except BaseException as error:
            stopped = ConnectionResetError("the call that this stream came from was stopped")
            self._error = error if isinstance(error, Exception) else stopped
            raise
        finally:
            whole = self._error is None and self.recorder.ended
            if not whole or self.recorder.done:
                self._end()
            else:
                self._news.set()
            if whole:
                self._begin(self._drained(chunks))
            elif self._onward is None:
                await self.upstream.aclose()
        return self._finish()

    def _end(self) -> None:
        """Note that no more events come."""
        self._ended = True
        self._news.set()
        for timer in (self._looking, self._expiring):
            if timer is not None:
                timer.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what ends a response in a task."""
        task = self._loop.create_task(work)
        _ends.add(task)
        task.add_done_callback(_ends.discard)

    async def _drained(self, chunks: AsyncIterator[bytes]) -> None:
        """Read what follows the terminal event, for a short time, then close the response.

        If the stream has not said that it is done, the reader gets these events too.
        """
        try:
            with contextlib.suppress(Exception):  # it is of no use any more
                async with asyncio.timeout(_DRAINED_SECONDS):
                    async for chunk in chunks:
                        if not self._ended:
                            self._events.extend(self.recorder.feed(chunk))
                            self._news.set()
        finally:
            self._end()
            await self.upstream.aclose()

    async def aleave(self) -> None:
        """Note that the reader has stopped, and wait a few turns for the end of the response."""
        self.leave()
        task = asyncio.current_task()
        if task is None or not inspect.iscoroutine(task.get_coro()):
            return  # the garbage collector closes the stream, and does not wait
        for _ in range(_TURNS):
            if self.upstream.is_closed:
                break
            await asyncio.sleep(0)

    async def _until_wanted(self) -> None:
        """Wait until the reader has taken all events, or another draw waits for the sample."""
        if self._looking is None:
            self._looking = self._loop.call_later(_LOOK, self._look)
        while self._events and not self._ahead:
            await self._demand.wait()

    def _look(self) -> None:
        """Read ahead of a reader who keeps another draw waiting; this runs at intervals while it may."""
        self._looking = None
        if not self._demand.awaited:
            return
        self._ahead = self._ahead or self._awaited()
        if self._ahead or not self._events:
            self._demand.set()
        else:
            self._looking = self._loop.call_later(_LOOK, self._look)

    async def aread(self) -> AsyncIterator[bytes]:
        """Iterate over the events for the reader."""
        for step in self._steps():
            if isinstance(step, bytes):
                yield step
            else:
                await step()
        if self._onward is not None:
            try:
                async for chunk in self._onward:
                    yield chunk
            finally:
                await self.upstream.aclose()

    async def _until_news(self) -> None:
        self._demand.set()
        if self._patience is not None:
            self._expires = self._loop.time() + self._patience
            if self._expiring is None:
                self._expiring = self._loop.call_at(self._expires, self._expire)
        with self._leaving_if_stopped():
            await self._news.wait()

    def _expire(self) -> None:
        """Stop a reader that has waited for too long; the timer is moved forward only when it fires."""
        self._expiring = None
        if not self._news.awaited:
            return
        if self._loop.time() < self._expires:
            self._expiring = self._loop.call_at(self._expires, self._expire)
        else:
            self._news.fail(TimeoutError())

    async def _until_drawn(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - none is an error
        if self.draw is not None:
            with self._leaving_if_stopped():
                await asyncio.wait([self.draw], timeout=timeout)

    def leave(self) -> None:
        """Read on in the background, or withdraw the call when nothing has come yet."""
        if self._loop.is_closed():
            return
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._leave()
        else:  # such as from the garbage collector
            self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        draw = self.draw
        if self._onward is not None and not self._left:
            self._left = True
            self._begin(self.upstream.aclose())
        if self._left or self._ended or draw is None or draw.done():
            return
        self._left = self._ahead = True
        self._events.clear()
        if not self.recorder.started:
            draw.cancel()
            return
        self._bound(draw)
        self._demand.set()


_ends: set[asyncio.Task[None]] = set()
"""The tasks that end a response."""


class SyncRecordedStream(RecordedStream):
    """A recording for a reader in a thread; another thread reads the upstream, and the draw is on the portal.

    So what stops the reader, such as Ctrl-C or a time-out, does not stop the recording.
    """

    _expired = queue.Empty

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self._stored: concurrent.futures.Future[None] = concurrent.futures.Future()
        promised(self._stored, self._loop)
        self._chunks = self.upstream.iter_bytes()
        self._demand: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each piece to read
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each piece that was read
        self._wanted = True
        self._fork = forks.count
        self._alone = False  # whether the reader reads from the upstream itself
        try:
            threading.Thread(target=self._record, name="cachepipe-stream", daemon=True).start()
        except RuntimeError:  # the interpreter is exiting, and starts no threads
            self._alone = True

    async def run(self) -> list[wire.Sample]:
        """Return the samples when the terminal event has come."""
        try:
            while not self._done.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if self._ahead else _LOOK):
                        await self._done.wait()
                if not self._ahead and not self._done.is_set() and self._awaited():
                    self._read_on()
        finally:
            self._wanted = False
            if not self._done.is_set() and self._left:
                hang_up(self.upstream)
        return self._finish()

    def watch(self, draw: asyncio.Future[Any]) -> None:
        """Note the draw that needs the samples, and notify the reader's thread of its end."""
        super().watch(draw)
        draw.add_done_callback(lambda _: self._stored.set_result(None))

    # In the thread that reads from the upstream.

    def _record(self) -> None:
        while self._goes_on():
            self._pull()
            self._news.put(None)
            if self._left and not self._wanted and not self._ended:
                self._error = TimeoutError("the rest of an abandoned stream took too long")
                self._ended = True
        self._end()
        self._news.put(None)

    def _goes_on(self) -> bool:
        """Return True when somebody wants the next piece, and False when no piece is left."""
        if not self._ended and (not self._ahead or self.recorder.overflowed):  # then only the reader wants it
            self._demand.get()
        return not self._ended

    def _pull(self) -> None:
        """Read one piece."""
        try:
            chunk = next(self._chunks, None)
            if chunk is None:
                events = self.recorder.close(in_order=ends_in_order(self.upstream))
            else:
                events = self.recorder.feed(chunk)
        except BaseException as error:  # noqa: BLE001 - the reader and the draw get it
            if not self._ended:
                self._error = error
                self._end()
            return
        self._take(events)
        over = self.recorder.ended or self.recorder.overflowed
        if chunk is None or self.recorder.done or (over and self._left):
            self._end()
        elif over:  # only the reader wants what may follow
            self._report()

    def _end(self) -> None:
        self._ended = True
        with contextlib.suppress(Exception):  # it is of no use any more
            self.upstream.close()
        self._report()

    def _report(self) -> None:
        self._soon(self._done.set)

    def _soon(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the portal has gone with its process
            self._loop.call_soon_threadsafe(function)

    # In the reader's thread.

    def read(self) -> Iterator[bytes]:
        """Iterate over the events for the reader."""
        for step in self._steps():
            if isinstance(step, bytes):
                yield step
            else:
                step()

    def _until_news(self) -> None:
        if self._alone or self._fork != forks.count:
            self._pull()
            return
        with self._leaving_if_stopped():
            self._demand.put(None)
            self._news.get(timeout=self._patience)

    def _until_drawn(self, timeout: float | None = None) -> None:
        if self._fork == forks.count:
            with self._leaving_if_stopped():
                concurrent.futures.wait([self._stored], timeout)

    def leave(self) -> None:
        """Read on in the background, or withdraw the call when nothing has come yet.

        The garbage collector may call this anywhere, even while the interpreter exits. So it waits for no
        lock, but leaves the rest to the portal.
        """
        if self._left or self._ended or self._fork != forks.count:  # a forked child shares the connection
            return
        self._left = True
        if not sys.is_finalizing():
            self._soon(self._leave)

    def _leave(self) -> None:
        if self._ended:
            return
        self._events.clear()
        if self.recorder.ended or self.recorder.overflowed:
            self._stop()
        elif self.recorder.started:
            self._read_on()
            if self.draw is not None:
                self._bound(self.draw)
        else:
            self._error = ConnectionResetError("the reader of this stream has left before any content came")
            self._stop()
            if self.draw is not None:
                self.draw.cancel()

    def _stop(self) -> None:
        """Make the thread close the response; no other thread can do so while it reads."""
        self._ended = True
        hang_up(self.upstream)
        self._demand.put(None)
        if self._alone:
            self._end()
        self._report()

    def _read_on(self) -> None:
        """Read the rest without waiting for the reader."""
        self._ahead = True
        self._demand.put(None)
