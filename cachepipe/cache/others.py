"""Waits for samples that other processes generate, or other loops of this one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cachepipe.cache.write_queue import WriteQueue, unheard
from cachepipe.errors import StoreError, WaitingForOthers, warn
from cachepipe.stores.base import Process, ReleaseLease, Seize

if TYPE_CHECKING:
    from cachepipe.cache.drawing import Drawing

FIRST, LAST = 0.005, 0.25
"""Seconds between looks; the pauses grow."""
LONG = 10.0
"""Seconds of waiting for another process after which a warning is given."""
ORPHAN_LOOKS = 6
"""After this many looks, a sample that is this process's, but that no loop generates, is taken over."""
_ASK = 1.0  # seconds between two checks of the process that generates a sample


class Look:
    """Looks, at growing intervals, for the samples that one loop's draws await from elsewhere.

    Args:
        queue: the write queue of the loop.
    """

    def __init__(self, queue: WriteQueue) -> None:
        self._queue = queue
        self._pause = FIRST
        self._orphans: dict[tuple[str, int], int] = {}
        self._asked = 0.0
        self._next = queue.loop.call_later(FIRST, self)
        self._deaf = queue.store.listen(self._heard)

    def _heard(self) -> None:
        """Look soon, as something has changed. Thread-safe."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            self._queue.loop.call_soon_threadsafe(self._hurry)

    def _hurry(self) -> None:
        if self._queue.strangers:
            self._next.cancel()
            self()

    def __call__(self) -> None:
        """Look once, and again later while a draw waits."""
        queue = self._queue
        places = self._places()
        try:
            states = queue.store.status([(drawing.question.key, index) for drawing, index in places])
        except StoreError as error:
            for drawing in list(queue.strangers):
                drawing.perform(drawing.state.broken(error))
            self._end()
            return
        now = queue.loop.time()
        asks = now - self._asked >= _ASK
        if asks:
            self._asked = now
        before, self._orphans = self._orphans, {}
        again: dict[Drawing, None] = {}
        for (drawing, index), state in zip(places, states, strict=False):
            try:
                if state == "ours":
                    over = self._is_orphan(drawing, index, before)
                else:
                    over = state != "pending" or _outwaited(drawing, index, now, asks=asks)
                if over:
                    again[drawing] = None
            except Exception as error:  # noqa: BLE001 - such as a warning that was made an error
                drawing.perform(drawing.state.broken(error))
        for drawing in again:
            drawing.unheard()
        if queue.strangers:
            self._pause = min(self._pause * 1.5, LAST)
            self._next = queue.loop.call_later(self._pause, self)
        else:
            self._end()

    def _end(self) -> None:
        """End the notifications."""
        deaf, self._deaf = self._deaf, None
        if deaf is not None:
            deaf()

    def _places(self) -> list[tuple[Drawing, int]]:
        """Return the draws that wait, with each index that no loop of this process has announced."""
        return [
            (drawing, index)
            for drawing in self._queue.strangers
            for index in drawing.state.awaited
            if drawing.cache.in_flight.maker(drawing.question.key, index) is None
        ]

    def _is_orphan(self, drawing: Drawing, index: int, before: dict[tuple[str, int], int]) -> bool:
        """Return True if a sample of this process has not been announced in several looks; release its lease.

        The loop that it was granted to may be about to announce it, or is gone.
        """
        place = (drawing.question.key, index)
        looks = 0 if drawing.cache.in_flight.anyone_claims(place[0]) else before.get(place, 0) + 1
        self._orphans[place] = looks
        if looks >= ORPHAN_LOOKS:
            self._queue.put(ReleaseLease(place[0], [index]), unheard)
        return looks >= ORPHAN_LOOKS


def watch(drawing: Drawing) -> None:
    """Look for the samples that a draw awaits from elsewhere until they come."""
    queue = drawing.queue
    if drawing.waits_since is None:
        drawing.waits_since = queue.loop.time()
    first = not queue.strangers
    queue.strangers[drawing] = None
    if first:
        Look(queue)


def _outwaited(drawing: Drawing, index: int, now: float, *, asks: bool) -> bool:
    """Return True if this process now generates a sample that another process was generating.

    It does so after ``wait_for_others`` seconds, or after 10 s if the other process is stopped; ``asks`` is
    whether to find out about that process in this look.
    """
    waited = now - (drawing.waits_since or 0.0)
    store, key = drawing.cache.store, drawing.question.key
    longest = store.wait_for_others
    late = longest is not None and waited >= longest
    if waited >= LONG and not late and asks:
        process = store.generator(key, index)
        if process is None:
            return False
        late = process.stopped
        _warn_waiting(drawing, process)
    if late:
        drawing.queue.put(Seize(key, [index]), unheard)
    return late


def _warn_waiting(drawing: Drawing, process: Process) -> None:
    if drawing.run is None or not drawing.run.first_time("waits for others"):
        return
    what = (
        "That process is stopped, so the sample is generated here"
        if process.stopped
        else "With wait_for_others=SECONDS the sample is generated here after that time"
    )
    warn(
        f"a request has waited {LONG:.0f} s for a sample of key {drawing.question.key}, which "
        f"{process.name} generates. {what}",
        WaitingForOthers,
    )
