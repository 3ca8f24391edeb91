"""The runs of a proxy: each decides whether a request is a new draw, or that of an earlier attempt of it.

A run counts equal requests by their order of arrival (`cachepipe.runs`). A client that retries means the draw
that it has not received. It says so with an ``Idempotency-Key``, or with the number of its attempt
(``x-stainless-retry-count``). If a draw fails, or its client leaves before the answer comes, its occurrence
number is given back at once, and the next matching request gets it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cachepipe.contract.draws import Claimant, Draw, Identity, Retried, label
from cachepipe.proxy.http_exchange import NEVER_AGAIN, Refusal
from cachepipe.runs import Occurrences

_KEYS: Final = 50_000  # idempotency keys remembered per run, about 400 bytes each
_LONGEST_KEY: Final = 1000  # characters
_OWED: Final = 10_000
_LABELS: Final = 10_000  # labelled runs, and namespaces with runs of their own, in a server's life


_numbers = itertools.count(1)


class RequestCounts(Retried, Protocol):
    """One request in a run, wherever its run is kept; see `RequestCounter`."""

    @property
    def run(self) -> Any:
        """The run."""
        ...

    @property
    def attaches(self) -> bool:
        """Whether the request may be another attempt of an earlier one."""
        ...

    def delivered(self) -> None:
        """Note that the client has received its answer."""
        ...

    def unanswered(self) -> None:
        """Note that this request ended without an answer: the next matching request gets its draw."""
        ...

    def ended(self) -> None:
        """Note that no part of this request is in flight any more."""
        ...


@dataclass(slots=True)
class _LiveDraw:
    """A draw that requests in flight hold."""

    holders: int = 0
    waiting: int = 0  # holders whose clients have not left
    delivered: bool = False
    given_back: bool = False
    keyed: bool = False

    @property
    def is_open(self) -> bool:
        """Whether a retry without an idempotency key may still attach to the draw."""
        return not (self.delivered or self.given_back or self.keyed)


@dataclass(slots=True)
class IdempotencyEntry:
    """The draws of the requests with one idempotency key.

    Attributes:
        request: the keys of the questions, the request id and the replicate.
        numbers: per identity, the occurrence numbers in order.
        delivered: whether one of the requests has received its answer.
    """

    request: tuple[str, ...]
    numbers: dict[Identity, list[int]] = field(default_factory=dict)
    delivered: bool = False


class ProxyRun:
    """A run of a proxy: its counts, and the draws that requests in flight hold.

    Attributes:
        number: identifies the run in this process.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.counted = Occurrences(one_program=False)
        self.live: dict[Identity, dict[int, _LiveDraw]] = {}
        self.owed: dict[Identity, int] = {}  # numbers given back that no retry has taken
        self.entries: OrderedDict[tuple[str, str], IdempotencyEntry] = OrderedDict()

    def request(
        self, claimant: Claimant, questions: Sequence[str], *, retry: bool = False, key: str | None = None
    ) -> RequestCounter:
        """Return the counter of a request.

        Args:
            claimant: who draws.
            questions: the keys of its questions.
            retry: whether it says that it is a retry.
            key: its idempotency key, if it has one.

        Raises:
            Refusal: see `entry`.
        """
        entry = None if key is None else self.entry(key, claimant, questions)
        return RequestCounter(self, retry=retry, entry=entry)

    def entry(self, key: str, claimant: Claimant, questions: Sequence[str]) -> IdempotencyEntry:
        """Return the entry of an idempotency key.

        Args:
            key: the idempotency key.
            claimant: who draws; each namespace has keys of its own.
            questions: the keys of the request's questions.

        Raises:
            Refusal: when the key is too long, or was used with another request.
        """
        if len(key) > _LONGEST_KEY:
            message = f"an Idempotency-Key has at most {_LONGEST_KEY} characters"
            raise Refusal(400, "bad_idempotency_key", message)
        namespace = label(claimant.namespace)
        request = (*questions, claimant.request_id or "", label(claimant.replicate))
        entry = self.entries.setdefault((namespace, key), IdempotencyEntry(request))
        self.entries.move_to_end((namespace, key))
        if len(self.entries) > _KEYS:
            self.entries.popitem(last=False)
        if entry.request != request:
            raise Refusal(
                422,
                "idempotency_key_reused",
                "this Idempotency-Key was used with another request; each request has its own",
                [NEVER_AGAIN],
            )
        return entry


class ProxyRuns:
    """The current run of each namespace, and the runs that clients label in their paths."""

    def __init__(self) -> None:
        self._default = ProxyRun()
        self._named: dict[str | None, ProxyRun] = {}
        self._labelled: dict[tuple[str | None, str], ProxyRun] = {}

    def run(self, namespace: str | None, name: str | None) -> ProxyRun:
        """Return the run of a request; ``name`` is the label in its path, if there is one.

        Raises:
            Refusal: when too many labels have been used.
        """
        if name is None:
            return self._named.get(namespace) or self._default
        found = self._labelled.get((namespace, name))
        if found is None:
            if len(self._labelled) >= _LABELS:
                message = f"{_LABELS} run labels have been used since the server started; restart it"
                raise Refusal(503, "too_many_runs", message, [NEVER_AGAIN])
            found = self._labelled[namespace, name] = ProxyRun()
        return found

    def begin(self) -> None:
        """Begin a new run of every namespace; labelled runs count on."""
        self._default = ProxyRun()
        self._named.clear()

    def begin_of(self, namespace: str | None) -> None:
        """Begin a new run of one namespace.

        Raises:
            Refusal: when too many namespaces have runs of their own.
        """
        if len(self._named) >= _LABELS and namespace not in self._named:
            message = "too many namespaces have runs of their own; restart the server"
            raise Refusal(503, "too_many_runs", message)
        self._named[namespace] = ProxyRun()


@dataclass(eq=False)
class RequestCounter:
    """One request in a run: counts the occurrences of its draws, or attaches to an earlier attempt.

    Attributes:
        run: the run.
        retry: whether the request says that it is a retry.
        entry: the entry of its idempotency key, if it has one.
    """

    run: ProxyRun
    retry: bool = False
    entry: IdempotencyEntry | None = None
    _held: list[tuple[Identity, int]] = field(default_factory=list)
    _left: bool = False

    @property
    def attaches(self) -> bool:
        """Whether the request may be another attempt of an earlier one."""
        return self.retry or self.entry is not None

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of this request's draw."""
        run, entry = self.run, self.entry
        number = self._joined(identity)
        if number is None:
            number = run.counted.take(identity)
        live = run.live.setdefault(identity, {}).setdefault(number, _LiveDraw())
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
        if self.entry is not None:
            earlier = self.entry.numbers.get(identity, ())
            return next((number for number in earlier if (identity, number) not in self._held), None)
        if not self.retry:
            return None
        if owed := run.owed.pop(identity, 0):  # its number was given back, so it is the next one
            if owed > 1:
                run.owed[identity] = owed - 1
            return None
        undelivered = (
            number
            for number, live in run.live.get(identity, {}).items()
            if live.is_open and (identity, number) not in self._held
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
            if not live.waiting and live.is_open:
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
