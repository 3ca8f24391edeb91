"""The questions of a shared store that a question which missed is compared with: at most some of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

from cachepipe.contract.keys import Question
from cachepipe.stores.base import StoredQuestion
from cachepipe.stores.misses import Similar, nearest
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.engine import Read, Rows
from cachepipe.stores.remote.session import RUN, Session

MOST: Final = 5000
"""The most questions that are read."""
SECONDS: Final = 1.0
"""Seconds after which no more of them are read."""
_AGAIN: Final = 60.0  # seconds after which they are read again


class SimilarQuestions:
    """Finds the stored question that differs least from another one. Thread-safe.

    Args:
        session: this process's use of the store.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._similar = Similar()
        self._keys: list[str] = []

    def similar(self, question: Question) -> StoredQuestion | None:
        """Return the stored question that differs least from another one; None if none is similar.

        The same question under another scope of these questions is always found.
        """
        with self._lock:
            if time.monotonic() > self._read_at + _AGAIN:
                self._read()
            names = [self._keys[place] for place in self._similar.ids(question)]
            names += self._similar.elsewhere(question)
        reads = [Read(name, [rows.KNOWN, rows.QUESTION]) for name in dict.fromkeys(names)]
        pages = self._session.asked(lambda: self._session.engine.read(reads)) if reads else []
        found = [
            question_in(read.key, page)
            for read, page in zip(reads, pages, strict=True)
            if rows.KNOWN in page and rows.QUESTION in page
        ]
        return nearest(question, found)

    def _read(self) -> None:
        self._similar, self._keys = Similar(), []
        self._similar.read(self._questions)
        self._read_at = time.monotonic()

    def _questions(self, _after: int, longest: int) -> Iterator[tuple[int, str | None, bytes | None]]:
        """Iterate over the places of some questions, with their scopes and documents."""
        until = time.monotonic() + SECONDS
        for key, found in self._session.engine.scan("", [rows.KNOWN, rows.QUESTION]):
            if key.startswith(RUN) or rows.KNOWN not in found or rows.QUESTION not in found:
                continue
            stored = question_in(key, found)
            document = stored.document if len(stored.document) <= longest else None
            yield len(self._keys), stored.scope, document
            self._keys.append(key)
            if len(self._keys) >= MOST or time.monotonic() > until:
                return


def question_in(key: str, found: Rows) -> StoredQuestion:
    """Return the question of a key.

    Raises:
        DamagedCache: when a row is not what was written.
    """
    scope, at = rows.loads(key, rows.KNOWN, rows.unpack(key, rows.KNOWN, found[rows.KNOWN]))
    return StoredQuestion(key, scope, rows.unpack(key, rows.QUESTION, found[rows.QUESTION]), at)
