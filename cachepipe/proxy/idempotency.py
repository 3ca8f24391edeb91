"""Decides which draw a request is: a new one, or the draw of an earlier attempt of the same request.

A run counts equal requests by their order of arrival (`cachepipe.runs`). A client that retries means the draw
that it has not received. It says so with an ``Idempotency-Key``, or with the number of its attempt
(``x-stainless-retry-count``). If a draw fails, or its client leaves before the answer comes, its occurrence
number is given back at once, and the next matching request gets it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from cachepipe.contract.draws import Draw, Identity
from cachepipe.runs import Occurrences, Run

_KEYS: Final = 50_000  # idempotency keys remembered per run, about 400 bytes each
_OWED: Final = 10_000


@dataclass(slots=True)
class _Live:
    """A draw that requests in flight hold."""

    holders: int = 0
    waiting: int = 0  # those of them whose clients have not left
    delivered: bool = False
    given_back: bool = False
    keyed: bool = False


@dataclass(slots=True)
class IdempotencyEntry:
    """The draws of the requests with one idempotency key.

    Attributes:
        questions: the keys of the questions.
        numbers: per identity, the occurrence numbers in order.
        delivered: whether one of the requests has received its answer.
    """

    questions: tuple[str, ...]
    numbers: dict[Identity, list[int]] = field(default_factory=dict)
    delivered: bool = False


class ProxyRun(Run):
    """A run of a proxy: its counts, and the draws that requests in flight hold."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Occurrences()
        self.live: dict[Identity, dict[int, _Live]] = {}
        self.owed: dict[Identity, int] = {}  # numbers given back that no retry has taken yet
        self.entries: OrderedDict[tuple[str, str], IdempotencyEntry] = OrderedDict()

    def of(self, store: str) -> Occurrences:  # noqa: ARG002 - a proxy has one store
        """Return the counts of this run."""
        return self.counted

    def entry(self, label: str, key: str, questions: tuple[str, ...]) -> IdempotencyEntry:
        """Return the entry of an idempotency key, in the namespace with this label."""
        entry = self.entries.get((label, key))
        if entry is None:
            entry = self.entries[label, key] = IdempotencyEntry(questions)
            if len(self.entries) > _KEYS:
                self.entries.popitem(last=False)
        else:
            self.entries.move_to_end((label, key))
        return entry


class RequestCounter:
    """One request in a run: counts the occurrences of its draws, or attaches to an earlier attempt.

    Args:
        run: the run.
        retry: whether the request says that it is a retry.
        entry: the entry of its idempotency key, if it has one.
    """

    def __init__(self, run: ProxyRun, *, retry: bool = False, entry: IdempotencyEntry | None = None) -> None:
        self.run = run
        self.retry = retry
        self.entry = entry
        self._held: list[tuple[Identity, int]] = []
        self._left = False

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of this request's draw."""
        run, entry = self.run, self.entry
        number = self._joined(identity)
        if number is None:
            number = run.counted.take(identity)
        live = run.live.setdefault(identity, {}).setdefault(number, _Live())
        live.holders += 1
        live.waiting += 1
        live.given_back = False
        if entry is not None:
            live.keyed = True
            live.delivered = live.delivered or entry.delivered
            numbers = entry.numbers.setdefault(identity, [])
            if number not in numbers:
                numbers.append(number)
        self._held.append((identity, number))
        return number

    def _joined(self, identity: Identity) -> int | None:
        """Return the occurrence number of an earlier attempt's draw, if this request attaches to one."""
        run = self.run
        mine = [number for held, number in self._held if held == identity]
        if self.entry is not None:
            earlier = self.entry.numbers.get(identity, ())
            return next((number for number in earlier if number not in mine), None)
        if not self.retry:
            return None
        if owed := run.owed.get(identity, 0):  # its number was given back, so it is the next one
            if owed == 1:
                del run.owed[identity]
            else:
                run.owed[identity] = owed - 1
            return None
        undelivered = (
            number
            for number, live in run.live.get(identity, {}).items()
            if number not in mine and not (live.delivered or live.given_back or live.keyed)
        )
        return min(undelivered, default=None)

    def give_back(self, draw: Draw) -> None:
        """Take back the occurrence number of a draw that was undone."""
        identity = draw.identity
        if (identity, draw.occurrence) in self._held:
            self._held.remove((identity, draw.occurrence))
            self._release(identity, draw.occurrence, undone=True)

    def delivered(self) -> None:
        """Note that the client has received its answer."""
        if self.entry is not None:
            self.entry.delivered = True
        for identity, number in self._held:
            self.run.live[identity][number].delivered = True
        self.ended()

    def left(self) -> None:
        """Note that the client has gone while its draw continues: the next matching request gets the draw."""
        if self._left:
            return
        self._left = True
        for identity, number in self._held:
            live = self.run.live[identity][number]
            live.waiting -= 1
            if not live.waiting and not (live.delivered or live.given_back or live.keyed):
                live.given_back = True
                self._return(identity, number)

    def unanswered(self) -> None:
        """Note that this request ended without an answer: the next matching request gets its draw."""
        self.left()
        self.ended()

    def ended(self) -> None:
        """Note that no part of this request is in flight any more."""
        held, self._held = self._held, []
        for identity, number in held:
            self._release(identity, number, undone=False)

    def _release(self, identity: Identity, number: int, *, undone: bool) -> None:
        lives = self.run.live[identity]
        live = lives[number]
        live.holders -= 1
        live.waiting -= not self._left
        if live.holders:
            return
        del lives[number]
        if not lives:
            del self.run.live[identity]
        if undone and not live.delivered and not live.given_back:
            self._return(identity, number)
            if self.entry is not None:
                self.entry.numbers[identity].remove(number)

    def _return(self, identity: Identity, number: int) -> None:
        owed = self.run.owed
        if len(owed) > _OWED:
            owed.clear()
        owed[identity] = owed.get(identity, 0) + 1
        self.run.counted.give_back(identity.draw(number))
