"""Batch files: requests in, answers out in the same order, and a rerun that pays for nothing twice.

Input lines are OpenAI's batch requests, or objects with ``prompt`` or ``messages``. The file is read twice:
once to find whatever is wrong with it before the first call is made, once to ask. A line's draw is its key
and its occurrence: how many earlier lines of the file have that key. So a rerun replays what was answered and
asks for the rest only, also when lines were inserted, deleted, moved or given other ids meanwhile.

The output is written beside its place and put there when it is complete. So it is never half a
result, and a run that was killed is resumed by running it again: what it had paid for is in the cache.
Where a line fails whose draw has a result in the earlier output, that result stays.
Memory is bounded: of the input a few lines per request in flight are held, of the ids a digest each,
in a temporary database on disk.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import orjson

from cachepipe import jsontext, loops, outages, prices, runs, wire
from cachepipe.accounting import Account, Delivered, usage_of
from cachepipe.bounds import check_n
from cachepipe.contract.draws import Identity, label
from cachepipe.errors import (
    BadAnswer,
    CacheMiss,
    CachepipeError,
    ShortAnswer,
    StoreError,
    TooManySamples,
    UnkeyableValue,
)
from cachepipe.models.openai import ENDPOINTS, ListModel, OpenAIModel, WireRequest
from cachepipe.stages import AsyncCacher, AsyncDeduplicator
from cachepipe.stores import DiskStore, MemoryStore, default_folder, open_store
from cachepipe.stores.base import Store
from cachepipe.typedefs import Batch, Mode, Repeat, Response

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows, where two runs into one file are not told apart
    fcntl = None  # type: ignore[assignment]

WINDOW: Final = 4
"""How many lines per request in flight are held at most: those that wait for a slower one before them."""

SETTINGS: Final = frozenset(
    {"model", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "stop"}
)
"""The fields of a line with a prompt or messages that are part of what is asked."""

_FLAGS: Final = ("cached", "duplicated", "indices")
_OWN: Final = frozenset({"id", "custom_id", "response", "error", "cachepipe"})
_DEEPEST: Final = 250  # levels of a line
_READ: Final = 256  # lines that are read at once
_WRITE: Final = 1 << 18  # bytes that are written at once
_LOOK: Final = 0.05  # seconds between two looks for a pipe's reader
_NAMED: Final = b'{"id":"batch_req_'  # how a result line begins
_ANSWERED: Final = b',"error":null,"cachepipe":{'  # what the line of an answer holds
_SHOWN: Final = 10  # problems of an input that are told at once
_SECRET: Final = 6  # characters from which on a credential is blotted out


class BatchFileError(CachepipeError):
    """An input that cannot be run, or an output that cannot be written; nothing was asked."""


class _LineError(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What lines that do not say it themselves ask for.

    Attributes:
        model: the model's name.
        n: samples per line.
        temperature: sent where the API has it, if not None.
        max_tokens: sent as ``max_tokens``, or ``max_output_tokens`` where that is its name.
        max_completion_tokens: sent to chat completions, if not None.
        seed: sent to chat completions and completions, if not None.
    """

    model: str | None = None
    n: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None

    def fill(self, api: wire.Api, body: dict[str, Any]) -> None:
        """Add to a body what it lacks."""
        if self.model is not None:
            body.setdefault("model", self.model)
        if api.function:
            return
        if self.temperature is not None:
            body.setdefault("temperature", self.temperature)
        if api is wire.RESPONSES:
            if self.max_tokens is not None:
                body.setdefault("max_output_tokens", self.max_tokens)
            return
        if self.seed is not None:
            body.setdefault("seed", self.seed)
        if "max_tokens" in body or "max_completion_tokens" in body:
            return
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.max_completion_tokens is not None and api is wire.CHAT:
            body["max_completion_tokens"] = self.max_completion_tokens


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch file.

    Attributes:
        number: its line in the file, from 1.
        custom_id: its name, which no other line of the file has.
        named: whether the line gives that name; otherwise it is the line's number.
        api: where it goes.
        asks: the questions of its body.
        carried: fields that are written to its result as they are.
        refusal: why nothing is asked for it, or None.
    """

    number: int
    custom_id: str
    named: bool
    api: wire.Api
    asks: tuple[wire.Ask, ...]
    carried: Mapping[str, Any]
    refusal: TooManySamples | None = None

    def requests(self, namespace: str | None, *, ids: bool = False) -> list[WireRequest]:
        """Return one request per question.

        Args:
            namespace: the namespace that draws the samples.
            ids: whether the name that the line gives is the request id.
        """
        return [
            WireRequest(
                {**ask.question, **ask.transport},
                n=ask.n,
                request_id=self.custom_id if ids and self.named else None,
                namespace=namespace,
                endpoint=ENDPOINTS[self.api],
            )
            for ask in self.asks
        ]


def parse_line(text: bytes, number: int, defaults: Defaults) -> Line:
    """Return the request that a line holds.

    Raises:
        ValueError: when it holds none; the message says what was expected.
    """
    try:
        fields = jsontext.loads(text)
    except json.JSONDecodeError as error:
        raise _LineError(f"it is not valid JSON: {error.msg} (column {error.colno})") from error
    except ValueError as error:
        raise _LineError(str(error)) from error
    if not isinstance(fields, dict):
        raise _LineError(f"it must be a JSON object; got {fields!r:.80}")
    name, custom_id = _custom_id(fields)
    api, body, used = _asked(fields)
    carried = {
        field: value
        for field, value in fields.items()
        if field not in used and (field != name or name == "task_id")
    }
    try:
        orjson.dumps([[fields]])  # as deep as a result holds what is carried along
    except TypeError as error:  # or it holds long integers or lone surrogates
        if _nests_deeper(fields, _DEEPEST):
            raise _LineError(f"it nests too deep; {_DEEPEST} levels can be sent and written") from error
    defaults.fill(api, body)
    if "model" not in body and api is not wire.MODERATIONS:
        raise _LineError("it names no model, and neither does --model")
    n = body.pop("n", None) if api.max_n > 1 else None
    if n is None:
        n = 1 if api.function else defaults.n
    if api.max_n == 1 and n != 1:
        raise _LineError(
            f"{api.name} gives one answer per request, and {n} are wanted; "
            "repeat the line under other custom_ids"
        )
    try:
        asks = api.split({**body, "n": n} if api.max_n > 1 else body)
    except wire.BadRequest as error:
        raise _LineError(str(error)) from error
    if not asks[0].cacheable:
        raise _LineError(f"it cannot be run from a file: {asks[0].reason}")
    refusal = None
    try:
        check_n(asks[0].n, len(asks))
    except TooManySamples as error:  # it is this line's result
        refusal, asks = error, tuple(ask._replace(n=1) for ask in asks)
    named = name is not None
    return Line(number, custom_id if named else str(number), named, api, asks, carried, refusal)


def _nests_deeper(value: Any, levels: int) -> bool:
    """Return True if a JSON value nests more levels deep than these."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return not levels or any(_nests_deeper(item, levels - 1) for item in items)


def _custom_id(fields: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the field that names a line, and the name; None and nothing for a line without one."""
    for name in ("custom_id", "id", "task_id"):
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _LineError(f"{name} must be a string; got {value!r:.80}")
        return name, str(value)
    return None, ""


def _asked(fields: Mapping[str, Any]) -> tuple[wire.Api, dict[str, Any], frozenset[str]]:
    """Return where a line's request goes, its body, and the fields that are not carried along."""
    if "url" in fields or "method" in fields:
        body = fields.get("body")
        if not isinstance(body, dict):
            raise _LineError(f"its body must be a JSON object; got {body!r:.80}")
        return _api(fields), dict(body), frozenset({"method", "url", "body"})
    body = {name: value for name, value in fields.items() if name in SETTINGS and value is not None}
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise _LineError(f"messages must be a list of messages; got {messages!r:.80}")
        return wire.CHAT, {**body, "messages": messages}, frozenset({"messages"})
    if "prompt" not in fields:
        raise _LineError(
            "it holds no request: neither prompt, nor messages, nor method, url and body; "
            f"it has {', '.join(sorted(fields)) or 'no fields'}"
        )
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise _LineError(
            f"prompt must be a string; got {prompt!r:.80}. A list of messages goes into messages"
        )
    return wire.CHAT, {**body, "messages": [{"role": "user", "content": prompt}]}, frozenset({"prompt"})


def _api(fields: Mapping[str, Any]) -> wire.Api:
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise _LineError(f"method must be POST; got {method!r:.80}")
    api = (
        wire.api_for("POST", url) if isinstance(url, str) and url.startswith("/") and "?" not in url else None
    )
    if api is None or api not in ENDPOINTS:
        known = ", ".join(f"/v1{endpoint}" for endpoint in ENDPOINTS.values())
        raise _LineError(f"url must be one of {known}; got {url!r:.80}. The server is --base-url")
    return api


@dataclass
class Report:
    """How far a run is, and what it has cost; complete when `run_file` returns it.

    Attributes:
        requests: lines with a request in the input, or as many as were to be run.
        done: those that have ended, failed ones included.
        failed: those whose request failed.
        kept: failed ones whose result in the earlier output stays; the other failed ones became error lines.
        hits: samples that came from the cache, or were generated for another line.
        misses: samples that were generated for the line that got them.
        generated: samples that the model returned.
        unreported: generated samples that no line got: their request failed, or nobody had asked for them.
        delivered: what the answered lines would have cost alone, were billed, and saved, in tokens.
        spent: the tokens of all samples that the model returned.
        calls: calls that were made; repetitions within the SDK are not counted.
        in_flight: lines being answered now.
        most_ahead: the most lines that were held at once, from the one that is written next.
        seconds: how long it took.
        errors: how often each error code came.
        example: the message of the first error.
        interrupted: whether it ended before all lines had.
        output: where the results are, once they are complete.
        partial: where the results of an interrupted run are, up to the first that is missing; None if
            there are none.
    """

    requests: int = 0
    done: int = 0
    failed: int = 0
    kept: int = 0
    hits: int = 0
    misses: int = 0
    generated: int = 0
    unreported: int = 0
    delivered: Delivered = field(default_factory=Delivered)
    spent: Account = field(default_factory=Account)
    calls: int = 0
    in_flight: int = 0
    most_ahead: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    example: str = ""
    interrupted: bool = False
    output: Path | None = None
    partial: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, paths as strings; sums of tokens as `Account.as_dict` does."""
        figures = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("output", "partial"):
            figures[name] = None if figures[name] is None else str(figures[name])
        del figures["in_flight"], figures["delivered"]
        accounts = {"spent": self.spent, **self.delivered.accounts()}
        return {
            **figures,
            **{name: account.as_dict(prices.cost_of_sum) for name, account in accounts.items()},
        }


def _nobody() -> None:
    """Hear nothing."""


class Stop:
    """Asks a run to end. Its methods belong to the run's event loop, such as in a signal handler."""

    def __init__(self) -> None:
        self.asked = self.forced = False
        self.heard: Callable[[], None] = _nobody

    def soon(self) -> None:
        """Begin no new request, and wait for those in flight."""
        self.asked = True
        self.heard()

    def now(self) -> None:
        """Wait for nothing any more."""
        self.asked = self.forced = True
        self.heard()


async def run_file(
    input: str | os.PathLike[str],  # noqa: A002 - the file's part in the matter
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    client: Any = None,
    timeout: float | None = None,  # noqa: ASYNC109 - of the client's attempts, not of this call
    max_retries: int | None = None,
    max_n: int | None = None,
    n: int = 1,
    temperature: float | None = None,
    max_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    seed: int | None = None,
    cache: Any = None,
    namespace: str | None = None,
    mode: Mode = "read-write",
    scope: str | None = None,
    repeat: Repeat = "fresh",
    ids: bool = False,
    durability: str = "process",
    concurrency: int = 16,
    limit: int | None = None,
    progress: Callable[[Report], None] | None = None,
    stop: Stop | None = None,
    grace: float = 60.0,
) -> Report:
    """Return what became of the requests of a file; their answers are in ``output``, in input order.

    Each call is a run of its own. A line that fails becomes an error line, and only those are asked again by
    a rerun.

    Args:
        input: the batch file.
        output: where the results go, once all lines have ended.
        model: the model of lines that name none.
        base_url: where the API is.
        api_key: its key; empty for servers that need none, and not needed in replay mode.
        client: an ``openai.AsyncOpenAI`` to use instead.
        timeout: seconds for one attempt of a call.
        max_retries: how often the SDK repeats a failed call.
        max_n: the most samples that the server gives in one call.
        n: samples per line, for lines that do not say.
        temperature: for lines that do not say.
        max_tokens: for lines that do not say.
        max_completion_tokens: for lines that do not say.
        seed: for lines that do not say.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the experiment; a rerun in the same one replays, another one shares its samples.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: what stands for the endpoint's URL in keys.
        repeat: ``"fresh"``: equal questions of different lines get different samples; ``"same"``:
            they share them.
        ids: whether the ids that lines give are part of what tells their draws apart: a line with a new id
            then gets fresh samples, wherever it is.
        durability: ``"process"`` or ``"full"``, for a cache that is opened here.
        concurrency: lines in flight at most.
        limit: run only so many lines, from the first.
        progress: called with the report when the input has been checked, and whenever a line has ended.
        stop: asks the run to end early.
        grace: seconds that requests in flight have after that.

    Raises:
        BatchFileError: before anything is asked, when the input cannot be run or the output not written.
        StoreError: when the cache cannot be opened.
    """
    check_n(n)
    if concurrency < 1 or n < 1 or (limit is not None and limit < 1):
        raise ValueError("concurrency, n and limit are whole numbers, at least 1")
    loops.running()  # before anything is opened
    defaults = Defaults(
        model=model,
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        max_completion_tokens=max_completion_tokens,
        seed=seed,
    )
    begun = time.perf_counter()
    stop = stop or Stop()
    results = _Output(Path(output), Path(input))
    with _Input(Path(input), defaults, limit) as lines:
        report = Report(requests=await asyncio.to_thread(lines.check, stop))
        if stop.asked:
            report.interrupted = True
            return report
        if progress is not None:
            progress(report)
        if not await results.find_reader(stop):
            report.interrupted = True
            return report
        with results:
            adapter = OpenAIModel(
                model,
                client=client,
                base_url=base_url,
                api_key=api_key,
                timeout=timeout,
                max_retries=max_retries,
                max_n=max_n,
                raw=True,
            )
            store, ours = _store(cache, mode, durability)
            service = _Service(adapter, store, report, namespace, mode, scope, repeat, ids=ids)
            secrets = _Secrets(
                [base_url, os.environ.get("OPENAI_BASE_URL")],
                [api_key, os.environ.get("OPENAI_API_KEY"), getattr(client, "api_key", None)],
            )
            run = _Run(lines, results, service, report, secrets, concurrency, progress)
            try:
                await run.drive(stop, grace)
            finally:
                await service.close()
                if ours:
                    await asyncio.to_thread(store.close)
                report.seconds = time.perf_counter() - begun
    return report


def _store(cache: Any, mode: Mode, durability: str) -> tuple[Store, bool]:
    """Return the store, and whether it is ours to close. A replay changes no folder, a bypass needs none."""
    if mode == "bypass":
        return MemoryStore(), True
    if mode == "replay" and (cache is None or isinstance(cache, str | os.PathLike)):
        return DiskStore(default_folder() if cache is None else cache, read_only=True), True
    return open_store(cache, durability=durability)


class _Ids:
    """Ids with their places in a file, in a file of SQLite's own that is gone when it is closed.

    An id takes its digest's 16 bytes on disk; in memory there are a few pages, however many ids there are.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (digest BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, name: str, place: int) -> int | None:
        """Note an id at its place; return the place that has it already, if any."""
        digest = _digest(name)
        try:
            added = self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, place))
        except sqlite3.Error as error:
            raise BatchFileError(
                f"the ids of the lines cannot be compared: {error}. It is done in a temporary file; set "
                "SQLITE_TMPDIR to a folder with room for it"
            ) from error
        return None if added.rowcount else self._at(digest)

    def find(self, name: str) -> int | None:
        """Return the place of an id, if it was noted."""
        return self._at(_digest(name))

    def _at(self, digest: bytes) -> int | None:
        row = self._database.execute("SELECT place FROM ids WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else int(row[0])

    def close(self) -> None:
        """Forget all of it."""
        self._database.close()


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()


class _Input:
    """The batch file, read twice through one open file."""

    def __init__(self, path: Path, defaults: Defaults, limit: int | None) -> None:
        self.path = path
        self._defaults = defaults
        self._limit = limit
        self._checksum = 0
        self._left = 0
        self._seen = 0
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        self._ahead: collections.deque[tuple[int, bytes]] = collections.deque()

    def __enter__(self) -> Self:
        if str(self.path) == "-":
            raise BatchFileError("the requests are read twice, so they come from a file; save them to one")
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise BatchFileError(f"{self.path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise BatchFileError(f"{self.path} is no regular file; it is read twice, so save it to one")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, stop: Stop) -> int:
        """Return how many requests there are to run, all of them in order. Reads the whole file.

        Raises:
            BatchFileError: naming each line that is not in order, up to ten of them.
        """
        problems: list[str] = []
        count = checksum = 0
        with contextlib.closing(_Ids()) as ids:
            for number, text in self._numbered():
                if stop.asked or len(problems) == _SHOWN:
                    break
                count += 1
                checksum = zlib.crc32(text, checksum)
                try:
                    custom_id = parse_line(text, number, self._defaults).custom_id
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
                    continue
                first = ids.add(custom_id, number)
                if first is not None:
                    problems.append(
                        f"line {number}: custom_id {custom_id!r:.80} is that of line {first} already; "
                        "each line needs one of its own"
                    )
        if problems:
            more = " (there may be more)" if len(problems) == _SHOWN else ""
            told = "\n".join(problems)
            raise BatchFileError(f"{self.path} cannot be run, and nothing was asked{more}:\n{told}")
        self._left, self._checksum = count, checksum
        self._lines = self._numbered()
        return count

    async def next(self) -> Line | None:
        """Return the next request, or None after the last.

        Raises:
            BatchFileError: when the file has changed since it was checked.
        """
        if not self._left:
            if self._checksum:
                raise BatchFileError(self._changed())
            return None
        if not self._ahead:
            self._ahead.extend(await asyncio.to_thread(self._read))
            if not self._ahead:
                raise BatchFileError(self._changed())
        number, text = self._ahead.popleft()
        self._left -= 1
        try:
            return parse_line(text, number, self._defaults)
        except ValueError as error:
            raise BatchFileError(self._changed()) from error

    def _read(self) -> list[tuple[int, bytes]]:
        read = []
        for number, text in self._lines:
            self._seen = zlib.crc32(text, self._seen)
            read.append((number, text))
            if len(read) == min(_READ, self._left):
                break
        if len(read) == self._left and self._seen == self._checksum:
            self._checksum = 0
        return read

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        """Iterate over the lines that are not blank, with their numbers, from the start."""
        self._file.seek(0)
        served = 0
        for number, line in enumerate(self._file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, text
                served += 1
                if served == self._limit:
                    return

    def _changed(self) -> str:
        return f"{self.path} has changed while it was run; run it again, and what was paid for is a hit"


class _Earlier:
    """The results of an earlier output by the ids of their draws. The file is read at the first search.

    Args:
        path: the earlier output, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._places: _Ids | None = None

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the result line with an id, or None. May be called from any thread.

        Raises:
            BatchFileError: when the file cannot be read.
        """
        try:
            with self._lock:
                if self._places is None:
                    self._places = self._read()
                place = self._places.find(name)
                if place is None or self._file is None:
                    return None
                self._file.seek(place)
                return _result_in(self._file.readline())
        except OSError as error:
            raise BatchFileError(
                f"requests failed, and the earlier results in {self._path} cannot be read to keep them: "
                f"{error.strerror}. Name another file for the results"
            ) from error

    def _read(self) -> _Ids:
        """Return where each result is."""
        places, place = _Ids(), 0
        with contextlib.suppress(FileNotFoundError):
            self._file = self._path.open("rb")
            for line in self._file:
                if line.startswith(_NAMED) and _ANSWERED in line:
                    name = line.removeprefix(_NAMED).partition(b'"')[0]
                    places.add(name.decode(errors="replace"), place)
                place += len(line)
        return places

    def close(self) -> None:
        """Forget all of it."""
        if self._file is not None:
            self._file.close()
        if self._places is not None:
            self._places.close()


def _result_in(text: bytes) -> dict[str, Any] | None:
    """Return the object of a result line; None for an error, and for what no run has written."""
    try:
        line = jsontext.loads(text)
    except ValueError:
        return None
    answered = line.get("error") is None and isinstance(line.get("response"), dict)
    return line if answered and isinstance(line.get("cachepipe"), dict) else None


class _Output:
    """The result file: written beside its place, and put there when it is complete."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        if str(path) == "-":
            raise BatchFileError("the results go to a file, which is there when it is complete; name one")
        try:
            # What is no regular file, such as a terminal or a pipe, takes the lines as they come.
            self._direct = path.exists() and not path.is_file()
            self._target = path if self._direct else Path(os.path.realpath(path))
            self.partial = self._target.with_name(self._target.name + ".partial")
            self._check(source)
        except OSError as error:
            raise BatchFileError(f"the results cannot be written to {path}: {error.strerror}") from error
        self._lines: list[bytes] = []
        self._bytes = 0
        self._written = 0
        self._complete = False
        self._pipe: int | None = None
        self._earlier = _Earlier(Path(os.devnull) if self._direct else self._target)

    def _check(self, source: Path) -> None:
        path, folder = self.path, self.path.parent
        if path.is_dir():
            raise BatchFileError(f"{path} is a folder; name a file for the results")
        if not folder.is_dir():
            raise BatchFileError(f"there is no folder {folder} for the results; make it first")
        try:
            if not source.exists():
                return
        except OSError:  # opening it tells what is wrong with it
            return
        if path.exists() and path.samefile(source):
            raise BatchFileError(f"{path} is the input too; name another file for the results")
        if self.partial.exists() and self.partial.samefile(source):
            raise BatchFileError(
                f"the results are written to {self.partial} first, which is the input; name another file"
            )

    async def find_reader(self, stop: Stop) -> bool:
        """Wait until somebody reads the named pipe that the results go to, if they do; False when stopped.

        Opening the pipe as usual would wait too, but deaf to signals.
        """
        while self._direct and self.path.is_fifo():
            try:
                self._pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    break  # opening it in earnest tells what is wrong
            else:
                os.set_blocking(self._pipe, True)
                break
            if stop.asked:
                return False
            await asyncio.sleep(_LOOK)
        return True

    def __enter__(self) -> Self:
        try:
            if self._pipe is not None:
                self._file: IO[bytes] = os.fdopen(self._pipe, "wb")
            else:
                self._file = self._target.open("wb") if self._direct else self._alone()
        except OSError as error:
            raise BatchFileError(f"the results cannot be written to {self.path}: {error.strerror}") from error
        return self

    def _alone(self) -> IO[bytes]:
        """Open the partial file for this process only, and empty it."""
        while True:
            file = self.partial.open("ab")
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have put it in place since it was opened.
                if self.partial.exists() and os.path.samestat(os.fstat(file.fileno()), self.partial.stat()):
                    file.truncate(0)
                    return file
            except BlockingIOError as error:
                file.close()
                raise BatchFileError(
                    f"another run is writing {self.path}; wait for it, or name another file"
                ) from error
            file.close()

    def __exit__(self, *_: object) -> None:
        if not self._complete:
            with contextlib.suppress(BatchFileError):
                self._write()
        with contextlib.suppress(OSError):
            self._file.close()
        self._earlier.close()
        if not self._complete and not self._direct and not self._written:
            self.partial.unlink(missing_ok=True)

    async def add(self, line: bytes) -> None:
        """Take the next line."""
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= _WRITE or self._direct:
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        lines, self._lines, self._bytes = self._lines, [], 0
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        self._written += len(lines)

    async def earlier(self, name: str) -> dict[str, Any] | None:
        """Return the result that the earlier output holds of a draw, by its id, or None."""
        return await asyncio.to_thread(self._earlier.find, name)

    async def finish(self) -> None:
        """Write what is left, and put the file in its place."""
        await asyncio.to_thread(self._finish)

    def _finish(self) -> None:
        self._write()
        if self._direct:
            self._complete = True
            return
        try:
            os.fsync(self._file.fileno())
            if self._target.exists():
                shutil.copymode(self._target, self.partial)
            if os.name == "nt":  # where an open file cannot be renamed
                self._file.close()
            self.partial.replace(self._target)
        except OSError as error:
            raise self._failure(error) from error
        self._complete = True

    def _failure(self, error: OSError) -> BatchFileError:
        return BatchFileError(
            f"the results cannot be written to {self.path}: {error.strerror}. "
            "What was paid for is in the cache; run it again when that is mended"
        )

    @property
    def left(self) -> Path | None:
        """Where the lines of an interrupted run are, if there are any."""
        return self.partial if not self._direct and self._written + len(self._lines) else None


class _Draw(NamedTuple):
    """A line's draw: one request per question, each with its occurrence.

    Attributes:
        line: the line.
        requests: what it asks.
        occurrences: per question, how many earlier lines of the file ask the same.
        id: identifies the draw in results: a digest of the namespace, the questions without their server,
            and the occurrences.
    """

    line: Line
    requests: Sequence[WireRequest]
    occurrences: Sequence[int]
    id: str


class _Service:
    """One pipeline per API, over one store and one client."""

    def __init__(
        self,
        model: OpenAIModel,
        store: Store,
        report: Report,
        namespace: str | None,
        mode: Mode,
        scope: str | None,
        repeat: Repeat,
        *,
        ids: bool,
    ) -> None:
        self._model = model
        self._store = store
        self._namespace = namespace
        self._mode = mode
        self._scope = scope
        self._repeat = repeat
        self._ids = ids
        self._report = report
        report.spent = model.spent
        self._stages: dict[wire.Api, tuple[AsyncDeduplicator, AsyncCacher]] = {}
        # Lines are counted here and not by the run, which gives back the numbers of requests that fail.
        self._counted = runs.Occurrences()

    def _stage(self, api: wire.Api) -> tuple[AsyncDeduplicator, AsyncCacher]:
        stages = self._stages.get(api)
        if stages is None:
            model = self._model.at(ENDPOINTS[api])
            cacher = AsyncCacher(
                model if api.listed is None else ListModel(model),
                self._store,
                mode=self._mode,
                scope=self._scope,
                repeat=self._repeat,
            )
            stages = self._stages[api] = AsyncDeduplicator(cacher), cacher
        return stages

    def draw(self, line: Line) -> _Draw:
        """Return the draw of the next line of the file, and count it."""
        requests = line.requests(self._namespace, ids=self._ids)
        whose, request_id = label(self._namespace), requests[0].request_id or ""
        asked = [self._key(request) for request in requests]
        occurrences = [self._counted.take(Identity(whose, key, request_id)) for key in asked]
        named = jsontext.dumps([whose, request_id, asked, occurrences])
        return _Draw(line, requests, occurrences, hashlib.blake2b(named, digest_size=12).hexdigest())

    def _key(self, request: WireRequest) -> str:
        """Return what counts occurrences of a question; `ask` raises the error of one without a key."""
        try:
            # Without the server: an unreachable address must not cost the results of another one.
            return self._model.question(request, "").key
        except UnkeyableValue:
            return ""

    def keys(self, draw: _Draw) -> list[str]:
        """Return the keys of a line's questions."""
        cacher = self._stage(draw.line.api)[1]
        return [cacher.question(request).key for request in draw.requests]

    async def ask(self, draw: _Draw) -> list[Response]:
        """Return one response per question of a line."""
        if draw.line.refusal is not None:
            raise draw.line.refusal
        stage = self._stage(draw.line.api)[0]
        return await stage.batch_request(Batch(list(draw.requests)), occurrences=draw.occurrences)

    def url(self, request: WireRequest) -> str:
        """Return where a request goes."""
        return self._model.url_of(request)

    def count(self) -> None:
        """Bring the report's figures of calls up to date."""
        self._report.calls = self._model.calls
        stats = [cacher.stats() for _, cacher in self._stages.values()]
        self._report.generated = sum(each.generated for each in stats)
        self._report.unreported = sum(each.unreported for each in stats)

    async def close(self) -> None:
        """Wait for what is in flight, write it, and close the client if it was made here."""
        for stage, _ in self._stages.values():
            await stage.close()
        self.count()
        await self._model.close()


class _Secrets:
    """What must never be written or shown: keys, and the credentials within a URL."""

    def __init__(self, urls: Sequence[str | None], keys: Sequence[str | None]) -> None:
        found = {key for key in keys if isinstance(key, str)}
        for url in urls:
            parts = urlsplit(url or "")
            found |= {part for part in (parts.password, parts.username) if part}
        found |= {unquote(secret) for secret in found}
        self._found = sorted((secret for secret in found if len(secret) >= _SECRET), key=len, reverse=True)

    def blot(self, value: Any) -> Any:
        """Return a JSON value in whose texts each of them is blotted out; numbers stay as they are."""
        if isinstance(value, str):
            for secret in self._found:
                value = value.replace(secret, "***")
        elif isinstance(value, list):
            return [self.blot(item) for item in value]
        elif isinstance(value, dict):
            return {self.blot(name): self.blot(item) for name, item in value.items()}
        return value


class _Run:
    """Keeps as many lines in flight as are wanted, and writes what they bring in the order of the input."""

    def __init__(
        self,
        lines: _Input,
        results: _Output,
        service: _Service,
        report: Report,
        secrets: _Secrets,
        concurrency: int,
        progress: Callable[[Report], None] | None,
    ) -> None:
        self._lines = lines
        self._results = results
        self._service = service
        self._report = report
        self._secrets = secrets
        self._concurrency = concurrency
        self._window = WINDOW * concurrency
        self._progress = progress
        self._ahead: collections.deque[asyncio.Task[bytes]] = collections.deque()
        self._running: set[asyncio.Task[bytes]] = set()
        self._wake = asyncio.Event()
        self._more = True

    async def drive(self, stop: Stop, grace: float) -> None:
        """Ask all lines and write all results, or as many as there are when the run is stopped."""
        stop.heard = self._wake.set
        deadline: asyncio.TimerHandle | None = None
        try:
            with runs.run():
                while self._more or self._ahead:
                    self._wake.clear()
                    await self._begin(stop)
                    await self._write()
                    self._service.count()
                    if stop.forced or (stop.asked and not self._running):
                        break
                    if stop.asked and deadline is None:
                        deadline = asyncio.get_running_loop().call_later(grace, stop.now)
                    if self._running:
                        await self._wake.wait()
        finally:
            if deadline is not None:
                deadline.cancel()
            stop.heard = _nobody
            await self._end()
        if self._more or self._ahead:
            self._report.interrupted = True
            self._report.partial = self._results.left
        else:
            await self._results.finish()
            self._report.output = self._results.path

    async def _begin(self, stop: Stop) -> None:
        """Begin as many lines as may be in flight, none of them too far ahead of the slowest."""
        while len(self._running) < self._concurrency and len(self._ahead) < self._window:
            if not self._more or stop.asked:
                return
            line = await self._lines.next()
            if line is None:
                self._more = False
                return
            self._start(line)

    def _start(self, line: Line) -> None:
        draw = self._service.draw(line)
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
        while self._ahead and self._ahead[0].done():
            await self._results.add(self._ahead.popleft().result())

    async def _end(self) -> None:
        """Let go of what is in flight, and write what has been answered without a gap before it."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while self._ahead and self._ahead[0].done() and not self._ahead[0].cancelled():
            await self._results.add(self._ahead.popleft().result())

    async def _answer(self, draw: _Draw) -> bytes:
        """Return the result of a line; if it failed, its earlier result, or an error line."""
        report = self._report
        try:
            responses = await self._service.ask(draw)
            result = _result(draw, responses)
        except Exception as error:  # noqa: BLE001 - one line's failure takes no other's answer with it
            result = await self._failure(draw, error)
        else:
            for response, request in zip(responses, draw.requests, strict=True):
                cached = response.cached or [False] * len(response.data)
                report.hits += sum(cached)
                report.misses += len(cached) - sum(cached)
                report.delivered.add(list(map(usage_of, response.data)), cached, self._service.url(request))
        report.done += 1
        if self._progress is not None:
            self._progress(report)
        return result

    async def _failure(self, draw: _Draw, error: Exception) -> bytes:
        report = self._report
        code, message, response = self._secrets.blot(list(_told(error)))
        report.failed += 1
        report.errors[code] = report.errors.get(code, 0) + 1
        report.example = report.example or message
        earlier = await self._results.earlier(draw.id)
        if earlier is not None:
            report.kept += 1
            ours = earlier["cachepipe"]
            return _line(draw, ours.get("keys") or [ours.get("key")], earlier["response"], None, ours)
        keys: list[str] = []
        with contextlib.suppress(CachepipeError, TypeError, ValueError):
            keys = self._service.keys(draw)
        return _line(draw, keys, response, {"code": code, "message": message}, {})


def _result(draw: _Draw, responses: Sequence[Response]) -> bytes:
    """Return the result line of an answer."""
    line = draw.line
    samples = [sample for response in responses for sample in response.data]
    body = line.api.answer(samples, line.asks[0])
    identity = body.get("id")
    response = {
        "status_code": 200,
        "request_id": identity if isinstance(identity, str) else "",
        "body": jsontext.shown(body),
    }
    flags: dict[str, Any] = {
        "cached": [flag for response in responses for flag in response.cached or ()],
        "duplicated": [flag for response in responses for flag in response.duplicated or ()],
    }
    keys = [str(response.key) for response in responses]
    flags["indices"] = [index for response in responses for index in response.indices or ()]
    return _line(draw, keys, response, None, flags)


def _line(
    draw: _Draw,
    keys: Sequence[str],
    response: Any,
    error: Mapping[str, str] | None,
    flags: Mapping[str, Any],
) -> bytes:
    """Return a result line as bytes."""
    line = draw.line
    ours: dict[str, Any] = {name: flags.get(name, []) for name in _FLAGS}
    ours["key"] = keys[0] if len(keys) == 1 else None
    if len(keys) > 1:
        ours["keys"] = list(keys)
    carried = line.carried
    if not jsontext.is_strict(carried):
        carried = {name: jsontext.valid(value) for name, value in carried.items()}
    hidden = {name: value for name, value in carried.items() if name in _OWN}
    if hidden:
        ours["carried"] = hidden
    result = {
        "id": f"batch_req_{draw.id}",  # see `_NAMED`
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
        "cachepipe": ours,
        **{name: value for name, value in carried.items() if name not in _OWN},
    }
    return b"%b\n" % jsontext.dumps(result)


_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ShortAnswer, "short_answer"),
    (BadAnswer, "bad_answer"),
    (StoreError, "store_error"),
    (UnkeyableValue, "bad_request"),
)


def _told(error: Exception) -> tuple[str, str, dict[str, Any] | None]:
    """Return an error's code, its message, and the response if the provider gave one."""
    message = _written(str(error)) or type(error).__name__
    status = getattr(error, "status_code", None)
    answer = getattr(error, "response", None)
    if isinstance(status, int) and answer is not None:
        try:
            body = jsontext.read(answer.content)
        except ValueError:
            body = answer.text
        inner = body.get("error") if isinstance(body, dict) else None
        code = inner.get("code") or inner.get("type") if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("message"), str):
            message = f"{inner['message']} {outages.advice_on(error)}".rstrip()
        response = {
            "status_code": status,
            "request_id": answer.headers.get("x-request-id", ""),
            "body": jsontext.shown(body),
        }
        return str(code or f"http_{status}"), message, response
    if isinstance(error, CacheMiss):
        return "cache_miss", f"{error.reason}.", None
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, message, None
    if error.__cause__ is not None and str(error.__cause__) and not outages.is_connection_error(error):
        message = f"{message} {_written(str(error.__cause__))}"
    name = type(error).__name__
    if "Timeout" in name:
        return "timeout", message, None
    return ("connection_error" if "Connection" in name else name), message, None


def _written(text: str) -> str:
    """Return a text that UTF-8 can spell: a path, say, may hold bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()
