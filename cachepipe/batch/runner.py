"""Runs a batch file: keeps lines in flight, and writes their results in the order of the input."""

from __future__ import annotations

import asyncio
import collections
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cachepipe import context, loops, runs
from cachepipe.accounting import sold_in, usage_sold
from cachepipe.batch.draws import FileDraws, LineDraw
from cachepipe.batch.errors import Secrets, described
from cachepipe.batch.files import InputFile, OutputFile
from cachepipe.batch.report import Report
from cachepipe.batch.results import answer_line, kept_line, result_line
from cachepipe.batch.settings import BatchSettings
from cachepipe.models.connection import ConnectionSettings
from cachepipe.models.openai import OpenAIModel
from cachepipe.prices import Prices
from cachepipe.providers import presets
from cachepipe.stores import MemoryStore, open_store, switched_off
from cachepipe.stores.base import Store
from cachepipe.stores.sums import wasted_by
from cachepipe.typedefs import Mode, Response

WINDOW: Final = 4
"""The largest number of lines in memory per request in flight; they wait for slower lines before them."""


async def run_file(
    input: str | os.PathLike[str],  # noqa: A002 - the file's part in the matter
    output: str | os.PathLike[str],
    settings: BatchSettings | None = None,
    **changes: Any,
) -> Report:
    """Answer the requests of a file, and write the results to another file in the same order.

    Each call is a run of its own. A line that fails becomes an error line; a rerun asks only for
    these lines again.

    Args:
        input: the batch file.
        output: the file for the results; it appears once all lines have ended.
        settings: the settings of the run.
        changes: settings to change; `BatchSettings` lists them.

    Raises:
        BatchFileError: before anything is asked, when the input cannot be run or the output not written.
        StoreError: when the cache cannot be opened.
    """
    settings = replace(settings or BatchSettings(), **changes)
    settings = replace(settings, mode=context.current().mode_of(settings.mode))
    if settings.mode == "read-write" and switched_off():
        settings = replace(settings, mode="bypass")
    loops.running()  # before anything is opened
    begun = time.perf_counter()
    stop = settings.stop
    results = OutputFile(Path(output), Path(input))
    with InputFile(Path(input), settings) as lines:
        count = await asyncio.to_thread(lines.check, stop)
        report = Report(requests=count * len(settings.each_replicate), prices=settings.prices or Prices())
        if settings.progress is not None and not stop.asked:
            settings.progress(report)
        if stop.asked or not await results.find_reader(stop):
            report.interrupted = True
            return report
        with results:
            model = model_of(settings)
            store, owned = _store(settings.cache, settings.mode, settings.durability)
            draws = FileDraws(model, store, settings, report)
            try:
                try:
                    with runs.run() as run:
                        report.run = run.of(store.identity).name
                        await _Run(lines, results, draws, report, settings).drive()
                finally:
                    await draws.close()
                if settings.mode == "bypass" or report.accounts()["unreported"].counts()["samples"]:
                    # Else each sample was delivered, so its draw holds it, and no row needs to be read.
                    report.wasted = await asyncio.to_thread(wasted_by, store, report.run)
            finally:
                if owned:
                    await asyncio.to_thread(store.close)
                report.seconds = time.perf_counter() - begun
    return report


def model_of(settings: BatchSettings) -> OpenAIModel:
    """Return the model that makes the calls."""
    connection: dict[str, Any] = {
        name: getattr(settings, name) for name in ConnectionSettings.__annotations__
    }
    preset = presets.named(settings.base_url or "")
    if preset is not None:
        connection["base_url"] = preset.base_url
        if settings.api_key is None:  # the SDK would take OpenAI's key
            connection["api_key"] = preset.found_key(needed=settings.mode != "replay")
    return OpenAIModel(settings.model, max_n=settings.max_n, **connection)


def _store(cache: Any, mode: Mode, durability: str) -> tuple[Store, bool]:
    """Return the store, and whether to close it. A replay changes no folder, and a bypass needs none."""
    if mode == "bypass":
        return MemoryStore(), True
    return open_store(cache, durability=durability, read_only=True if mode == "replay" else None)


def _secrets(settings: BatchSettings) -> Secrets:
    """Return the credentials that results must not contain."""
    preset = presets.named(settings.base_url or "")
    kept = [settings.api_key, os.environ.get("OPENAI_API_KEY"), None if preset is None else preset.api_key]
    return Secrets(
        [settings.base_url, os.environ.get("OPENAI_BASE_URL")],
        [*kept, getattr(settings.client, "api_key", None)],
    )


class _Run:
    """Keeps as many lines in flight as are wanted, and writes their results in the order of the input."""

    def __init__(
        self, lines: InputFile, results: OutputFile, draws: FileDraws, report: Report, settings: BatchSettings
    ) -> None:
        self._lines = lines
        self._results = results
        self._draws = draws
        self._report = report
        self._settings = settings
        self._secrets = _secrets(settings)
        self._ahead: collections.deque[asyncio.Task[bytes]] = collections.deque()
        self._running: set[asyncio.Task[bytes]] = set()
        self._wake = asyncio.Event()
        self._line: Iterator[LineDraw] = iter(())  # the draws of a line that have not begun
        self._more = True

    @property
    def _unfinished(self) -> bool:
        return self._more or bool(self._ahead)

    async def drive(self) -> None:
        """Ask all lines and write all results; if the run is stopped, those that are complete."""
        stop = self._settings.stop
        stop.listen(self._wake.set)
        deadline: asyncio.TimerHandle | None = None
        try:
            while self._unfinished:
                self._wake.clear()
                await self._begin()
                await self._write()
                self._draws.count()
                if stop.forced or (stop.asked and not self._running):
                    break
                if stop.asked and deadline is None:
                    deadline = asyncio.get_running_loop().call_later(self._settings.grace, stop.now)
                if self._running:
                    await self._wake.wait()
        finally:
            if deadline is not None:
                deadline.cancel()
            stop.listen()
            await self._end()
        if self._unfinished:
            self._report.interrupted = True
            self._report.partial = self._results.left
        else:
            await self._results.finish()
            self._report.output = self._results.path

    async def _begin(self) -> None:
        """Begin as many lines as may be in flight; no line may be too far ahead of the slowest one."""
        most = self._settings.concurrency
        while len(self._running) < most and len(self._ahead) < WINDOW * most:
            if not self._more or self._settings.stop.asked:
                return
            draw = next(self._line, None)
            if draw is not None:
                self._start(draw)
            elif (line := await self._lines.next()) is not None:
                self._line = self._draws.draws(line)
            else:
                self._more = False
                return

    def _start(self, draw: LineDraw) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(draw))
        self._ahead.append(task)
        self._running.add(task)
        self._report.in_flight = len(self._running)
        self._report.most_ahead = max(self._report.most_ahead, len(self._ahead))
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[bytes]) -> None:
        self._running.discard(task)
        self._report.in_flight = len(self._running)
        self._wake.set()

    async def _write(self) -> None:
        """Write the results up to the first that is missing."""
        while self._ahead and self._ahead[0].done() and not self._ahead[0].cancelled():
            await self._results.add(self._ahead.popleft().result())

    async def _end(self) -> None:
        """Cancel what is in flight, and write what is complete."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._write()

    async def _answer(self, draw: LineDraw) -> bytes:
        """Return the result of a line; if it failed, its earlier result, or an error line."""
        keys: Sequence[str] = ()
        why = None if self._settings.mode in ("refresh", "bypass") else self._settings.why
        try:
            if why is not None:
                for key, reason in await asyncio.to_thread(self._draws.reasons, draw):
                    why(draw.line.number, key, reason)
            exchange = self._draws.exchange(draw)
            keys = exchange.record.keys
            content, responses = await exchange.answered()
            result = answer_line(draw, content, responses)
        except Exception as error:  # noqa: BLE001 - a failure of one line must not affect the others
            result = await self._failure(draw, keys, error)
        else:
            self._count(responses, exchange.url)
        self._report.done += 1
        if self._settings.progress is not None:
            self._settings.progress(self._report)
        return result

    def _count(self, responses: Sequence[Response], url: str) -> None:
        """Count the samples of an answer."""
        for response in responses:
            cached = response.cached or [False] * len(response.data)
            self._report.hits += sum(cached)
            self._report.misses += len(cached) - sum(cached)
            usages = [usage_sold(sold_in(sample.noted)) for sample in response.data]
            self._report.delivered.add(usages, cached, url)

    async def _failure(self, draw: LineDraw, keys: Sequence[str], error: Exception) -> bytes:
        """Return the result of a line that failed."""
        code, message, response = self._secrets.hidden(list(described(error)))
        self._report.fail(code, message)
        earlier = await self._results.earlier(draw.id)
        if earlier is not None:
            self._report.kept += 1
            return kept_line(draw, earlier)
        return result_line(draw, keys, response, {"code": code, "message": message}, {})
