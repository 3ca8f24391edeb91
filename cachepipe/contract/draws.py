"""Who draws: the identity of one request's claim on samples, decided in one place (C1, C2)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import NamedTuple, Protocol

SHARED = "*"
"""The label of the one draw per key that ``repeat="same"`` and functions share, outside all namespaces."""

_NONE = "-"

CELL = "cell:"
"""The beginning of the request ids that cells of notebooks give to requests without one."""
COPY = "#"
"""Stands before the number of a repetition in a list of prompts, at the end of its request id."""


def label(name: str | int | None) -> str:
    """Return how the ledger writes a namespace or a replicate; None and the empty string differ."""
    return _NONE if name is None else f"={name}"


def namespace_of(written: str) -> str | None:
    """Return the namespace or the replicate that a label stands for."""
    return written[1:] if written.startswith("=") else None


def is_own(request_id: str) -> bool:
    """Return True if the caller chose a request id; False for one of a cell, or of a prompt's repetition."""
    return bool(request_id) and not request_id.startswith((CELL, COPY))


class Identity(NamedTuple):
    """What equal requests have in common; a run counts them by it.

    Attributes:
        namespace: the label of the namespace.
        key: the key of the question.
        request_id: the id of the request; a missing one is the empty string.
        replicate: the label of the replicate.
    """

    namespace: str
    key: str
    request_id: str
    replicate: str = _NONE

    def draw(self, occurrence: int) -> Draw:
        """Return the draw that has this occurrence number."""
        return Draw(self.namespace, self.key, self.request_id, occurrence, self.replicate)


class Draw(NamedTuple):
    """The identity of one request's claim on samples.

    Attributes:
        namespace: the label of the namespace (see ``label``).
        key: the key of the question.
        request_id: the id of the request; a missing one is the empty string.
        occurrence: how many requests with the same namespace, key, request id and replicate came before
            it in this run.
        replicate: the label of the replicate.
    """

    namespace: str
    key: str
    request_id: str
    occurrence: int
    replicate: str = _NONE

    @property
    def identity(self) -> Identity:
        """What this draw has in common with its repetitions."""
        return Identity(self.namespace, self.key, self.request_id, self.replicate)

    @property
    def shared(self) -> bool:
        """Whether it is the one draw of its key that all namespaces share."""
        return self.namespace == SHARED


class Claimant(NamedTuple):
    """Who draws, as the caller says it.

    Attributes:
        namespace: the unit within which samples are independent.
        request_id: which draw it is among equal questions of its namespace.
        replicate: which independent repetition of the experiment it belongs to; 3 and "3" are the same.
    """

    namespace: str | None = None
    request_id: str | None = None
    replicate: str | int | None = None


class Claims(Protocol):
    """An object that says who draws: a `Claimant`, or a request."""

    @property
    def namespace(self) -> str | None:
        """The namespace."""
        ...

    @property
    def request_id(self) -> str | None:
        """The request id."""
        ...

    @property
    def replicate(self) -> str | int | None:
        """The replicate."""
        ...


class Counter(Protocol):
    """Counts the occurrences of equal requests: a run, or a request of the proxy that may be a retry."""

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        ...

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw that was not delivered: its retry is the same draw."""
        ...


class Retried(Counter, Protocol):
    """Counts for one request whose reader may be cut off, so that the next such request is its retry."""

    def left(self) -> None:
        """Give back the numbers of the request, unless they have been given back or its draws delivered."""
        ...


class OneRequest:
    """Counts for one request, and gives each of its numbers back at most once.

    If a number is given back while its draw goes on, another request may have the number when the draw ends.

    Args:
        counter: counts the occurrences of equal requests.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._held: set[Draw] = set()

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        number = self._counter.take(identity)
        self._held.add(identity.draw(number))
        return number

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw, unless it was given back before."""
        if draw in self._held:
            self._held.remove(draw)
            self._counter.give_back(draw)

    def left(self) -> None:
        """Give back all numbers of the request."""
        for draw in list(self._held):
            self.give_back(draw)


class Numbered:
    """Gives a request the occurrence numbers that its caller has counted, such as those of a line in a file.

    Args:
        numbers: for each of its questions the key, and the occurrence number.
    """

    def __init__(self, numbers: Iterable[tuple[str, int]]) -> None:
        self._free: dict[str, list[int]] = {}
        for key, number in numbers:
            self._free.setdefault(key, []).append(number)

    def take(self, identity: Identity) -> int:
        """Return the number of the next question with this key."""
        return self._free[identity.key].pop(0)

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw, which this request may make again."""
        insort(self._free[draw.key], draw.occurrence)

    def left(self) -> None:
        """Do nothing: the caller's next run starts counting again."""


def draw_of(key: str, claimant: Claims, counter: Counter, *, shared: bool) -> Draw:
    """Return the identity of a request's draw, with the next occurrence number.

    Args:
        key: the key of its question.
        claimant: who draws.
        counter: counts the occurrences.
        shared: whether all requests for the question share one draw.
    """
    if shared:
        return Draw(SHARED, key, "", 0)
    identity = Identity(label(claimant.namespace), key, claimant.request_id or "", label(claimant.replicate))
    return Draw(identity[0], key, identity[2], counter.take(identity), identity[3])


def give_back(draw: Draw, counter: Counter) -> None:
    """Give the occurrence number of a draw back; a shared draw has none."""
    if draw.namespace != SHARED:
        counter.give_back(draw)
