"""Imports the results of a batch: OpenAI's batch API, and all who write the same files.

A batch has a file of requests and files of results. Each request gets the key, and its draw the identity,
that ``cachepipe run`` gives them with the same settings. So a run of the same file makes no calls.

The user has paid for the batch already, at half the price of the model. So its samples count as bought at
``…/batches``, which has half prices, and no namespace's budget pays for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Final

import orjson

from cachepipe import jsontext, wire
from cachepipe.batch.draws import FileDraws, LineDraw
from cachepipe.batch.errors import BatchFileError
from cachepipe.batch.files import Ids, numbered
from cachepipe.batch.lines import Line, named, parse_line
from cachepipe.batch.report import Report
from cachepipe.batch.runner import model_of
from cachepipe.batch.settings import BatchSettings
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.entries import EntrySample
from cachepipe.contract.keys import Question
from cachepipe.errors import CachepipeError
from cachepipe.importers.adding import Adder, sample_of
from cachepipe.importers.report import Imported
from cachepipe.models.openai import ENDPOINTS
from cachepipe.providers.generation import packed
from cachepipe.runs import Spilling
from cachepipe.sharing import Cache, Progress, opened
from cachepipe.stores.base import Store

BATCHES: Final = "/batches"
"""Where a batch is bought, below a base URL."""

_OK: Final = 200
_KEPT: Final = 10_000  # ids whose places are in memory
_EARLIEST: Final = (
    1_713_139_200  # 2024-04-15, when the first batch ran: answers without a date count as of it
)
_LATEST: Final = 1 << 33
_DATES: Final = ("created", "created_at")
_NO_ANSWER: Final = "there is no result for it in {}"

_Drawn = tuple[Question, wire.Ask, Draw]


def import_batch(
    requests: str | os.PathLike[str],
    results: Sequence[str | os.PathLike[str]],
    cache: Cache,
    settings: BatchSettings | None = None,
    *,
    progress: Progress = lambda _doing, _done: None,
    **changes: Any,
) -> Imported:
    """Add the results of a batch to a cache, as samples and draws of its requests.

    The import can be repeated, with more results too: nothing is added twice. A failed request is left out,
    and named with its reason.

    Args:
        requests: the file of requests: the input of the batch.
        results: the files of results: the output, and the file of errors if there is one.
        cache: the cache, which is created if it does not exist.
        settings: the settings with which the requests would be run; those that concern the question, the
            ``base_url``, the ``scope``, the ``namespace``, the ``replicate`` and ``ids`` matter.
        progress: gets how many requests are done.
        changes: settings to change; `BatchSettings` lists them.

    Raises:
        BatchFileError: when a file cannot be read, or `run` has written the results.
        StoreError: when the cache cannot be written.
    """
    settings = replace(settings or BatchSettings(), **changes)
    settings = replace(settings, mode="replay")  # which needs no key
    if settings.replicates is not None:
        raise ValueError("a batch is one replicate; name it with replicate=, and leave out replicates=")
    imported = Imported()
    with ExitStack() as stack:
        asked = stack.enter_context(_read(requests))
        rows = _Rows([Path(path) for path in results], stack)
        ids = _requested(asked)
        rows.find(ids, imported)
        store: Store = stack.enter_context(opened(cache, write=True))
        _Import(store, settings, rows, ids, imported, progress).take_all(asked)
    return imported


def _read(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise BatchFileError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error


class _Requested:
    """The ids of the requests: which there are, and which stand for several."""

    def __init__(self) -> None:
        self.places = Ids()
        self.several: set[str] = set()


def _requested(asked: IO[bytes]) -> _Requested:
    """Return the ids of the requests."""
    ids = _Requested()
    for number, text in numbered(asked):
        try:
            _, name = named(jsontext.loads(text), number)
        except (ValueError, AttributeError):
            continue  # it is not a request; the import says so
        if ids.places.add(name, number) is not None:
            ids.several.add(name)
    return ids


class _Rows:
    """The results of a batch by the ids of their requests. Their places are in memory, they themselves not.

    Args:
        paths: the files.
        stack: closes them.
    """

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self.names = " and ".join(path.name for path in paths)
        self._paths = paths
        self._files = [stack.enter_context(_read(path)) for path in paths]
        self._places: Spilling[tuple[str], list[list[int]]] = Spilling(
            list, orjson.dumps, orjson.loads, _KEPT
        )

    def find(self, ids: _Requested, imported: Imported) -> None:
        """Note where each result is; what answers no request is left.

        Raises:
            BatchFileError: when `run` has written one of them.
        """
        for place, (path, file) in enumerate(zip(self._paths, self._files, strict=True)):
            offset = 0
            for number, text in enumerate(file, 1):
                begun, offset = offset, offset + len(text)
                if not text.strip():
                    continue
                where = f"{path.name} line {number}"
                try:
                    row = _row(text)
                except ValueError as error:
                    imported.leave(where, "", f"it is not a result: {error}. Is the file complete?")
                    continue
                if "cachepipe" in row:
                    raise BatchFileError(
                        f"{path} was written by `cachepipe run` (line {number}): its samples are in the "
                        "cache of that run, and an import would double them: use `cachepipe merge`"
                    )
                name = str(row["custom_id"])
                if ids.places.find(name) is None:
                    imported.leave(where, name, "no request has its custom_id, so its question is unknown")
                    continue
                places = self._places[name,]
                places.append([place, begun])
                self._places[name,] = places
                self._places.trim()

    def of(self, name: str) -> Iterator[dict[str, Any]]:
        """Iterate over the results of a request, in the order of the files."""
        for place, offset in self._places[name,]:
            file = self._files[place]
            file.seek(offset)
            yield _row(file.readline())


def _row(text: bytes) -> dict[str, Any]:
    """Return a result.

    Raises:
        ValueError: when it is something else.
    """
    row = jsontext.loads(text)
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str | int):
        raise ValueError("it is not an object with a custom_id")  # noqa: TRY004 - as for invalid JSON
    return row


class _Import:
    """Takes the requests of a batch one after the other, each with its results."""

    def __init__(
        self,
        store: Store,
        settings: BatchSettings,
        rows: _Rows,
        ids: _Requested,
        imported: Imported,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._rows = rows
        self._several = ids.several
        self._imported = imported
        self._adder = Adder(store, imported, progress)
        self._draws = FileDraws(model_of(settings), store, settings, Report())

    def take_all(self, asked: IO[bytes]) -> None:
        """Take all requests of a file."""
        for number, text in numbered(asked, self._settings.limit):
            try:
                line = parse_line(text, number, self._settings)
            except ValueError as error:
                self._imported.leave(f"line {number}", "", str(error))
            else:
                for draw in self._draws.draws(line):
                    self._take(line, draw)
            self._adder.step()
        self._adder.flush()

    def _take(self, line: Line, draw: LineDraw) -> None:
        """Take a request with its results."""
        try:
            if line.refusal is not None:
                raise line.refusal
            if line.custom_id in self._several:
                raise BatchFileError(
                    "several lines have its custom_id, so nobody knows which of them a result answers"
                )
            url, (questions, asks, draws) = self._draws.planned(draw)
            drawn = [*zip(questions, asks, draws, strict=True)]
            got = self._samples(line, url, drawn)
        except CachepipeError as error:
            self._imported.leave(f"line {line.number}", line.custom_id, str(error))
            return
        self._imported.taken += 1
        fewest = min(map(len, got))
        if fewest < line.asks[0].n:
            self._imported.leave(
                f"line {line.number}",
                line.custom_id,
                f"its result has {fewest} of {line.asks[0].n} samples; a run buys the others",
            )

    def _samples(self, line: Line, url: str, drawn: Sequence[_Drawn]) -> list[list[EntrySample]]:
        """Add the samples of a request, and its draws of the first result; return the samples of that.

        Raises:
            CachepipeError: when there is no result that is an answer.
        """
        refused: CachepipeError = BatchFileError(_NO_ANSWER.format(self._rows.names))
        first: list[list[EntrySample]] | None = None
        for row in self._rows.of(line.custom_id):
            try:
                groups = self._groups(line, url, row, drawn)
            except CachepipeError as error:
                refused = error
                continue
            for (question, _, _), samples in zip(drawn, groups, strict=True):
                self._adder.add(question, samples)
            if first is None:
                first = groups
                for (question, ask, draw), samples in zip(drawn, groups, strict=True):
                    self._adder.draw(question, draw, samples[: ask.n], label(self._settings.namespace))
        if first is None:
            raise refused
        return first

    def _groups(
        self, line: Line, url: str, row: dict[str, Any], drawn: Sequence[_Drawn]
    ) -> list[list[EntrySample]]:
        """Return the samples of a result for each question of its request.

        Raises:
            CachepipeError: when the result is not an answer.
        """
        body = _body(row)
        content = jsontext.dumps(body)
        bodies = [ask.question for _, ask, _ in drawn]
        found = line.api.samples(content, bodies if len(bodies) > 1 else ())
        if not found:
            raise wire.BadAnswer("the answer holds no sample")
        n = line.asks[0].n
        groups = wire.by_question(found, len(bodies), n) if len(bodies) > 1 else [found]
        identity = jsontext.dumps([line.custom_id, row.get("id"), body])
        name = hashlib.blake2b(identity, digest_size=12).hexdigest()
        at = next((body[field] for field in _DATES if type(body.get(field)) is int), _EARLIEST)
        at = at if _EARLIEST <= at < _LATEST else _EARLIEST
        entries = []
        for place, (samples, (_, _, draw)) in enumerate(zip(groups, drawn, strict=True)):
            kept = packed(
                samples,
                request=row["response"].get("request_id"),
                asked=line.body.get("model"),
                url=_bought_at(url, line.api),
            )
            entries.append(
                [
                    sample_of(
                        each, f"b{name}-{place}-{number}", at, draw.occurrence * n + number, row.get("id")
                    )
                    for number, each in enumerate(kept)
                ]
            )
        return entries


def _body(row: dict[str, Any]) -> dict[str, Any]:
    """Return the answer in a result.

    Raises:
        BatchFileError: when it is a failure; the message is the provider's.
    """
    response, error = row.get("response"), row.get("error")
    if not isinstance(response, dict):
        raise BatchFileError(_told(error) or "its result has neither a response nor an error")
    body, status = response.get("body"), response.get("status_code")
    if status != _OK or error:
        inner = body.get("error") if isinstance(body, dict) else None
        raise BatchFileError(
            f"the provider answered {status}: {_told(inner) or _told(error) or 'no reason given'}"
        )
    if not isinstance(body, dict):
        raise BatchFileError("its result holds no JSON object")
    return body


def _told(error: Any) -> str:
    """Return what an error object says, on one line."""
    if not isinstance(error, dict):
        return error if isinstance(error, str) else ""
    said = [str(error[name]) for name in ("code", "message") if error.get(name)]
    return " ".join(": ".join(said).split())[:500]


def _bought_at(url: str, api: wire.Api) -> str:
    """Return where a batch with requests to a URL is bought."""
    path, mark, query = url.partition("?")
    return f"{path.removesuffix(ENDPOINTS[api])}{BATCHES}{mark}{query}"
