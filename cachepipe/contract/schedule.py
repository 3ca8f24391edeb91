"""In which order answers are handed over, so that reruns of concurrent programs take the same course (C11).

Each answer has a place: the latest stamp of its samples. Of the answers that are ready, the one with the
lowest place comes first. A rerun finds everything stored, so it hands over the answers in the order of their
places. The first run must therefore keep that order too: an answer that becomes ready only after one with a
later place was handed over notes a new place, directly after that one, and the rerun uses the noted place.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_left
from typing import Final, NamedTuple

HOLD_SECONDS: Final = 0.05
"""Seconds that missing samples wait at most for answers that became ready after them."""
CLAIM_SECONDS: Final = 5.0
"""Seconds that answers wait at most for claims and notes under way; a locked store may hold these up."""
QUIET_TURNS: Final = 5
"""Turns of an event loop without requests after which it counts as quiet, if its queue cannot be read."""
MOST_TURNS: Final = 1000
"""Turns of an event loop after which an answer is handed over although the loop has not been quiet."""
RESTLESS_TURNS: Final = 30
"""The same from then on, until the loop has been quiet once."""


class Place(NamedTuple):
    """The place of an answer in the schedule.

    Attributes:
        stamp: the latest stamp of its samples, or of those of the answer that it came after.
        late: 0, or how many answers with noted places are at this stamp up to this one.
    """

    stamp: int
    late: int = 0

    def __str__(self) -> str:
        return f"{self.stamp}+{self.late}"


LAST: Final = Place(sys.maxsize)
"""The place of an answer without stored samples, such as an error: after all answers that are ready."""


def parse_place(written: str) -> Place:
    """Return the place that ``str`` has written.

    Raises:
        ValueError: when the text is not a place.
    """
    stamp, plus, late = written.partition("+")
    if not (plus and stamp.isdecimal() and late.isdecimal()):
        raise ValueError(f"a place is two numbers, such as 17+1; got {written!r:.80}")
    return Place(int(stamp), int(late))


class HandedOver(NamedTuple):
    """An answer that is to be handed over now.

    Attributes:
        arrival: the number of its request.
        note: the place to record, if the answer comes after one with a later place.
    """

    arrival: int
    note: Place | None


class Schedule:
    """The requests in flight on one event loop, and which of their answers comes next.

    Requests are numbered as they arrive. Every request ends with being handed over, or leaves.

    Attributes:
        in_flight: the requests in flight, each with the number of answers handed over before it arrived.
    """

    def __init__(self) -> None:
        self._arrivals = 0
        self.in_flight: dict[int, int] = {}
        self._ready: list[tuple[Place, int]] = []  # a heap
        self._late: set[int] = set()
        self._handed_over = 0
        self._oldest = 1  # the request that arrived first of those in flight, or an earlier one
        # The latest places handed over, each with its number; the places descend, so that the first one
        # from a number on is the latest of all since then.
        self._numbers: list[int] = []
        self._latest: list[tuple[Place, int]] = []

    @property
    def any_ready(self) -> bool:
        """Whether an answer can be handed over."""
        return bool(self._ready)

    def arrive(self) -> int:
        """Return the number of a request that arrives now."""
        self._arrivals += 1
        self.in_flight[self._arrivals] = self._handed_over
        return self._arrivals

    def leave(self, arrival: int) -> None:
        """Note that a request does not want its answer any more, or got it without waiting."""
        self.in_flight.pop(arrival, None)
        self._late.discard(arrival)
        while self._ready and self._ready[0][1] not in self.in_flight:
            heapq.heappop(self._ready)

    def ready(self, arrival: int, place: Place) -> None:
        """Note that the answer of a request in flight can be handed over."""
        heapq.heappush(self._ready, (place, arrival))

    def may_be_late(self, arrival: int) -> bool:
        """Return True if an answer was handed over while a request waited."""
        return bool(self._latest) and self._latest_since(self.in_flight[arrival]) is not None

    def next(self) -> HandedOver | None:
        """Return the ready answer with the lowest place, which is handed over now; None if none is ready."""
        while self._ready:
            place, arrival = heapq.heappop(self._ready)
            if arrival not in self.in_flight:
                continue
            later = self._latest_since(self.in_flight[arrival])
            if later is not None and (place, arrival) < later:  # others may still be in between
                self.ready(arrival, _after(later, arrival))
                self._late.add(arrival)
                continue
            note = place if arrival in self._late else None
            self.leave(arrival)
            self._note(place, arrival)
            return HandedOver(arrival, note)
        return None

    def _latest_since(self, number: int) -> tuple[Place, int] | None:
        """Return the latest place, with its request, among the answers handed over from a number on."""
        at = bisect_left(self._numbers, number)
        return self._latest[at] if at < len(self._latest) else None

    def _note(self, place: Place, arrival: int) -> None:
        """Note what was handed over, as long as a request that had arrived before is in flight."""
        number = self._handed_over
        self._handed_over += 1
        if not self.in_flight:
            self._numbers, self._latest = [], []
            return
        if place == LAST:
            return
        while self._latest and self._latest[-1] <= (place, arrival):
            self._latest.pop()
            self._numbers.pop()
        self._latest.append((place, arrival))
        self._numbers.append(number)
        while self._oldest not in self.in_flight:
            self._oldest += 1
        unused = bisect_left(self._numbers, self.in_flight[self._oldest])
        del self._numbers[:unused], self._latest[:unused]


def _after(other: tuple[Place, int], arrival: int) -> Place:
    """Return the lowest place with which a request comes after another one. Ties go by arrival."""
    place, before = other
    return place._replace(late=place.late + (arrival < before))
