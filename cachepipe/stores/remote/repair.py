"""Writes the notes of a shared store anew that other rows can give (C12): see ``cachepipe.stores.repair``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from cachepipe.errors import DamagedCache
from cachepipe.stores.remote import rows
from cachepipe.stores.remote.book import Book
from cachepipe.stores.remote.engine import PENDING, SAMPLE
from cachepipe.stores.remote.rows import FirstRow
from cachepipe.stores.remote.session import Session
from cachepipe.stores.repair import NOTHING_SAYS_WHY


def write_notes(session: Session, keys: Iterable[str]) -> None:
    """Write the notes of keys anew: who is the earliest to draw, what is being generated, what was discarded.

    Args:
        session: this process's use of the store.
        keys: the keys.

    Raises:
        StoreError: when the store cannot be written.
    """
    for key in keys:
        session.edit(key, _write)


def _write(book: Book) -> None:
    names = book.show_all()
    _end_pending(book)
    for name in names:
        if name.startswith(rows.WHY):
            _write_why(book, name)
    try:
        rows.load_change(book.name, book.row(rows.CHANGED))
    except DamagedCache:
        book.announced(0)  # the number follows when the change is announced
    with contextlib.suppress(DamagedCache):  # a damaged draw stays, and is reported
        _write_firsts(book, names)


def _write_why(book: Book, name: bytes) -> None:
    try:
        rows.load_why(book.name, name, book.content(name) or b"")
    except DamagedCache:
        book.put(name, rows.dump_why(book.process.now() / 1e6, NOTHING_SAYS_WHY))


def _end_pending(book: Book) -> None:
    """Free what nobody generates, and list what somebody does."""
    listed = book.indices(rows.LISTED)
    for index in rows.indices_in([name for name in book.known if name.startswith(PENDING)], PENDING):
        name = rows.numbered(PENDING, index)
        if book.row(name) is None:
            continue
        try:
            lease = book.author(index)
        except DamagedCache:
            lease = None
        if lease is not None and book.process.alive(lease):
            listed.add(index)
            continue
        book.delete(name)
        if book.row(rows.numbered(SAMPLE, index)) is None:
            listed.remove(index)
        else:
            listed.add(index)


def _write_firsts(book: Book, names: Iterable[bytes]) -> None:
    begun: dict[bytes, list[tuple[int, str]]] = {name: [] for name in names if name.startswith(rows.FIRST)}
    for draw, row in book.draws().items():
        if not draw.shared and row.segments:
            stamp = min(segment.stamp for segment in row.segments.values())
            begun.setdefault(rows.first_field(draw), []).append((stamp, draw.namespace))
    for name, found in begun.items():
        if found:
            book.put(name, FirstRow.of(found).dumps(name))
        else:
            book.delete(name)
