"""Checks a cache completely, in a folder, on a server or in a bundle, and repairs what can be repaired."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cachepipe import sharing
from cachepipe.errors import BundleError, StoreError
from cachepipe.portal import submit
from cachepipe.stores import cache_for, folders, repair
from cachepipe.stores import verify as stored
from cachepipe.stores.bundles.reader import is_bundle
from cachepipe.stores.remote import is_url
from cachepipe.stores.verify import IntegrityReport, Progress, unseen

Counting = Callable[[], contextlib.AbstractContextManager[Callable[[str, int], None]]]
"""Begins to show progress; see `check`."""


class Checked(NamedTuple):
    """What a check has found.

    Attributes:
        report: what is wrong; after a repair, what is still wrong.
        before: what was wrong before the repair; None if nothing was repaired.
    """

    report: IntegrityReport
    before: IntegrityReport | None = None


def verify(cache: str | os.PathLike[str] | None = None, *, repair: bool = False) -> IntegrityReport:
    """Return what is wrong in a cache, as ``cachepipe verify`` does.

    Args:
        cache: a folder, a URL, a bundle, or None for the default folder.
        repair: whether what can be repaired is repaired. Damaged and missing samples are then discarded on
            record, so that they are generated anew when they are asked for.

    Returns:
        What is wrong; after a repair, what is still wrong. ``report.whole`` says whether that is nothing,
        ``report.problems`` is what, by kind, and ``report.counts`` is how much was checked.

    Raises:
        StoreError: when there is no cache, it cannot be read, or a bundle is to be repaired.
    """
    found = cache_for(cache)
    if not isinstance(found, str | os.PathLike):
        raise StoreError(f"a folder, a URL or a bundle can be checked; got {found!r:.200}")
    if is_url(str(found)):
        return check(str(found), repairs=repair).report
    path = folders.expanded(found)
    if not path.exists():
        raise StoreError(f"there is no cache at {path}")
    return check(str(path), repairs=repair).report


def check(
    cache: str,
    *,
    repairs: bool = False,
    rows: Progress = unseen,
    counting: Counting = lambda: contextlib.nullcontext(lambda _doing, _done: None),
) -> Checked:
    """Check a cache that exists, and repair it if asked.

    Args:
        cache: the absolute path of a folder or a bundle, or a URL.
        repairs: whether what can be repaired is repaired.
        rows: shows how far the check of a folder is.
        counting: returns a context manager whose value gets what is being done, and how many questions are
            done, for bundles and servers.

    Raises:
        StoreError: when it cannot be read, or a bundle is to be repaired.
    """
    if is_url(cache):
        return _check_server(cache, counting, repairs=repairs)
    folder = Path(cache)
    if is_bundle(folder):
        if repairs:
            raise StoreError(
                f"{cache} is a bundle, which is only read; get another copy of it if it is damaged"
            )
        return Checked(_check_bundle(folder, rows, counting))
    report = stored.verify(folder, rows)
    if report.whole or not repairs:
        return Checked(report)
    return Checked(repair.repair(folder, rows), report)


def _check_bundle(path: Path, rows: Progress, counting: Counting) -> IntegrityReport:
    """Return what is wrong in a bundle."""
    try:
        with contextlib.ExitStack() as stack:
            with counting() as progress:
                store = stack.enter_context(sharing.unpacked(path, progress=progress))
            return stored.verify(store.folder, rows)
    except BundleError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read
            raise
        report = IntegrityReport()
        report.add("bundle", str(error))
        return report


def _check_server(url: str, counting: Counting, *, repairs: bool) -> Checked:
    """Return what is wrong on a server, and repair it if asked."""
    from cachepipe.stores.remote.repair import write_notes  # noqa: PLC0415 - it needs the server's client
    from cachepipe.stores.remote.urls import open_url  # noqa: PLC0415 - likewise
    from cachepipe.stores.remote.verify import check as check_rows  # noqa: PLC0415 - likewise

    with contextlib.closing(open_url(url, read_only=not repairs)) as store:
        done = itertools.count(1)
        with counting() as progress:
            report = check_rows(store.session, lambda: progress("checking", next(done)))
        if not repairs or report.whole:
            return Checked(report)
        write_notes(store.session, sorted(report.notes))
        submit(repair.discard(store, report)).result()
        submit(repair.list_again(store, report)).result()
        return Checked(check_rows(store.session), report)
