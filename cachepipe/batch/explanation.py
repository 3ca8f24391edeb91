"""Why a request is a hit or a miss: its key, who drew its samples, and the nearest stored question.

Nothing is asked, and the cache is opened read-only.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cachepipe import jsontext
from cachepipe.batch.draws import FileDraws, LineDraw
from cachepipe.batch.errors import BatchFileError
from cachepipe.batch.files import InputFile
from cachepipe.batch.lines import Line, parse_line
from cachepipe.batch.planner import opened
from cachepipe.batch.report import Report
from cachepipe.batch.runner import model_of
from cachepipe.batch.settings import BatchSettings
from cachepipe.contract.draws import Draw, namespace_of
from cachepipe.contract.keys import Question
from cachepipe.differences import Difference, differences
from cachepipe.errors import UnkeyableValue
from cachepipe.listings import draw_fields
from cachepipe.stores.base import Ahead, DrawInfo, Store, StoredQuestion
from cachepipe.stores.misses import undrawn, unlike

_DRAWS: Final = 1000  # draws of a key that are listed


@dataclass
class Explanation:
    """Why one question of a request is answered from the cache or not.

    Attributes:
        outcome: ``"hit"``, ``"partial"`` or ``"miss"``.
        key: the key of the question.
        scope: its scope.
        draw: who asks: the namespace, the request id, the replicate and the occurrence.
        n: how many samples are asked for.
        stored: how many of them are stored.
        why: why samples are missing; empty for a hit.
        drawn: the draws of the question that the cache holds, with the indices of their samples.
        nearest: the key of the stored question that differs least, if this one is not stored.
        differences: how the two differ.
    """

    outcome: str
    key: str
    scope: str | None
    draw: Draw
    n: int
    stored: int
    why: str = ""
    drawn: list[DrawInfo] = field(default_factory=list)
    nearest: str | None = None
    differences: list[Difference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        draw = self.draw
        return {
            "outcome": self.outcome,
            "key": self.key,
            "scope": self.scope,
            "draw": {
                "namespace": namespace_of(draw.namespace),
                "shared": draw.shared,
                "request_id": draw.request_id,
                "replicate": namespace_of(draw.replicate),
                "occurrence": draw.occurrence,
            },
            "n": self.n,
            "stored": self.stored,
            "why": self.why,
            "drawn": [draw_fields(info) for info in self.drawn],
            "nearest": self.nearest,
            "differences": [difference.as_dict() for difference in self.differences],
        }


def explain_request(
    path: str | os.PathLike[str],
    settings: BatchSettings | None = None,
    *,
    line: int | None = None,
    **changes: Any,
) -> list[Explanation]:
    """Return why a request is a hit or a miss, for each of its questions and each replicate.

    Args:
        path: a file with one request, in the form of a line of a batch file; with ``line``, a batch file.
        settings: the settings of the run.
        line: the number of the line, from 1. Earlier lines that ask the same count, as they do in a run.
        changes: settings to change; `BatchSettings` lists them.

    Raises:
        BatchFileError: when the request cannot be run.
        StoreError: when the cache cannot be opened.
    """
    settings = replace(settings or BatchSettings(), **changes)
    store, owned = opened(settings)
    try:
        draws = FileDraws(model_of(settings), store, settings, Report())
        return [
            explained(store, question, draw, ask.n)
            for one in _drawn(draws, Path(path), settings, line)
            for question, ask, draw in zip(*draws.planned(one)[1], strict=True)
        ]
    except UnkeyableValue as error:
        raise BatchFileError(f"{path} cannot be run: {error}") from error
    finally:
        if owned:
            store.close()


def _drawn(draws: FileDraws, path: Path, settings: BatchSettings, line: int | None) -> list[LineDraw]:
    """Return the draws of a request."""
    if line is None:
        return list(draws.draws(_alone(path, settings)))
    found: list[LineDraw] = []

    def take(one: Line) -> None:
        made = draws.draws(one)
        if one.number <= line:
            each = list(made)
            found[:] = each if one.number == line else []

    with InputFile(path, settings) as lines:
        lines.check(settings.stop, take, last=line)
    if not found:
        raise BatchFileError(f"{path} has no request in line {line}")
    return found


def _alone(path: Path, settings: BatchSettings) -> Line:
    """Return the one request of a file."""
    try:
        request = jsontext.dumps(jsontext.read(path.read_bytes()))
    except OSError as error:
        raise BatchFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BatchFileError(
            f"{path} is not one request in JSON: {error}. For a line of a batch file, give --line"
        ) from error
    try:
        return parse_line(request, 1, settings)
    except ValueError as error:
        raise BatchFileError(f"{path} cannot be run: {error}") from error


def explained(store: Store, question: Question, draw: Draw, n: int) -> Explanation:
    """Return why a question is answered from a cache or not.

    Args:
        store: the cache.
        question: the question.
        draw: who draws.
        n: how many samples.
    """
    [foreseen] = store.foresee([(draw, n, Ahead())])
    stored = len(foreseen.samples)
    outcome = "hit" if stored == n else "partial" if stored else "miss"
    found = Explanation(outcome, question.key, question.scope, draw, n, stored)
    info = next(store.keys(question.key), None)
    if info is not None:
        found.drawn = list(itertools.islice(store.draws(key=question.key), _DRAWS))
        if stored < n:
            found.why = undrawn(info.samples, info.pending, draw, n)
        return found
    near = store.similar(question)
    found.why = unlike(question, near)
    if near is not None:
        found.nearest = near.key
        found.differences = list(_between(question, near))
    return found


def _between(question: Question, near: StoredQuestion) -> Iterator[Difference]:
    yield from differences(question.scope, question.document, near.scope, near.document)
