"""Explains a miss: which question is stored instead, and what differs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from cachepipe import replaying
from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.keys import Question, digest
from cachepipe.differences import described, differences, traits
from cachepipe.errors import CacheMiss, StoreError
from cachepipe.stores.base import Ahead, Store, StoredQuestion

_QUESTIONS: Final = 100_000  # the newest questions that are looked through
_BYTES: Final = 256 << 20  # of their documents
_LONGEST: Final = 64 << 10  # bytes of a document; longer ones are left out
_EACH: Final = 4  # questions that are remembered for each trait
_SCOPES: Final = 64  # scopes under which the question that was asked is looked for
_COMPARED: Final = 12  # questions that are compared with the one that was asked

Rows = Callable[[int, int], Iterable[tuple[int, str | None, bytes | None]]]
"""A function that returns the id, scope and document of the questions above an id, the newest first; long
documents as None."""


class Similar:
    """The traits of the stored questions, read at the first miss and then as questions come.

    So a hundred thousand misses read each question once.
    """

    def __init__(self) -> None:
        self._scopes: dict[str | None, None] = {}
        self._lock = threading.Lock()
        self._newest = 0
        self._ids: dict[int, tuple[int, ...]] = {}

    def read(self, rows: Rows) -> None:
        """Read the questions that have been stored since the last time."""
        with self._lock:
            newest, count, size = self._newest, 0, 0
            for identifier, scope, document in rows(self._newest, _LONGEST):
                newest = max(newest, identifier)
                self._scopes[scope] = None
                count, size = count + 1, size + len(document or b"")
                if count > _QUESTIONS or size > _BYTES:
                    break
                for trait in () if document is None else traits(document):
                    known = self._ids.get(trait, ())
                    if len(known) < _EACH:
                        self._ids[trait] = (*known, identifier)
            self._newest = newest

    def elsewhere(self, question: Question) -> list[str]:
        """Return the keys of a question under the scopes of the stored questions, at most a few."""
        with self._lock:
            scopes = list(self._scopes)[:_SCOPES]
        return [digest(scope, question.document) for scope in scopes]

    def ids(self, question: Question) -> list[int]:
        """Return the ids of the stored questions that share traits with a question, at most a few."""
        with self._lock:
            found = [one for trait in traits(question.document) for one in self._ids.get(trait, ())]
        return list(dict.fromkeys(found))[:_COMPARED]


def nearest(question: Question, stored: Iterable[StoredQuestion]) -> StoredQuestion | None:
    """Return the stored question that differs least from another; None if there is none."""

    def distance(other: StoredQuestion) -> float:
        found = differences(question.scope, question.document, other.scope, other.document)
        return sum(difference.size for difference in found)

    return min(stored, key=distance, default=None)


def missed(
    store: Store, question: Question, draw: Draw, n: int, request: Any, namespace: str | None
) -> CacheMiss:
    """Return the error for a draw that the cache cannot answer, which says what the cache holds instead.

    Args:
        store: the cache.
        question: what was asked.
        draw: the draw.
        n: how many samples were asked for.
        request: the request as it was asked.
        namespace: the namespace of the request.
    """
    near: StoredQuestion | None = None
    try:
        info = next(store.keys(question.key), None)
        if info is not None:
            why = undrawn(info.samples, info.pending, draw, n)
        else:
            near = store.similar(question)
            why = unlike(question, near)
    except (StoreError, sqlite3.Error):
        why = ""  # the miss stands, whatever the search for its reason comes to
    replaying.note(question.key, namespace, question.document, why)
    return CacheMiss(question.key, namespace, request, why, None if near is None else near.key)


def lacking(
    store: Store, asked: Iterable[tuple[Question, int, Draw]], namespace: str | None
) -> list[tuple[str, str]]:
    """Return the key of each question that lacks samples, and why. Reads the store, and claims nothing.

    Args:
        store: the cache.
        asked: each question of a request, how many samples it wants, and its draw.
        namespace: the namespace of the request.
    """
    found: list[tuple[str, str]] = []
    for question, n, draw in asked:
        [foreseen] = store.foresee([(draw, n, Ahead())])
        if len(foreseen.samples) < n:
            found.append((question.key, missed(store, question, draw, n, None, namespace).why))
    return found


def undrawn(samples: int, pending: int, draw: Draw, n: int) -> str:
    """Return why a stored question has no samples for a draw."""
    has = f"the cache has {_counted(samples, 'sample')} of this question"
    if pending:
        has += f" and {pending} that another process generates or left unfinished"
    if samples < n:
        return f"{has}; the request asks for {n}"
    if draw.namespace == SHARED or not samples:
        return has
    again = f" for the {_ordinal(draw.occurrence + 1)} time" if draw.occurrence else ""
    request_id = f" with request_id {draw.request_id!r}" if draw.request_id else " without a request_id"
    return (
        f"{has}, but other requests of this namespace have drawn too many of them; "
        f"this request, made{request_id}{again}, would get a new sample"
    )


def unlike(question: Question, near: StoredQuestion | None) -> str:
    """Return how the most similar stored question differs from a question."""
    if near is None:
        return "the cache holds no similar question"
    found = differences(question.scope, question.document, near.scope, near.document)
    if [difference.path for difference in found] == ["scope"]:
        return (
            f"the cache holds this question under another scope: {near.scope!r}, and the request has "
            f"{question.scope!r}. Set the scope to {near.scope!r} to use those samples"
        )
    return f"the nearest question in the cache, {near.key[:15]}, differs in {described(found)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"
