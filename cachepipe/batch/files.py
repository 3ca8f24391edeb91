"""The files of a run: the input, which is read twice, and the output, which appears when it is complete."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import stat
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, Self

from cachepipe import jsontext
from cachepipe.batch.errors import BatchFileError
from cachepipe.batch.lines import Line, parse_line
from cachepipe.batch.settings import BatchSettings, Stop
from cachepipe.runs import Spilling

try:
    import fcntl
except ImportError:  # pragma: no cover - on Windows nothing prevents two runs into one file
    fcntl = None  # type: ignore[assignment]

RESULT: Final = b'{"id":"batch_req_'
"""How a result line begins; the id of its draw follows."""
_ANSWERED: Final = b',"error":null,"cachepipe":{'  # part of the line of an answer
_READ: Final = 256  # lines that are read at once
_WRITE: Final = 1 << 18  # bytes that are written at once
_POLL: Final = 0.05  # seconds between two checks for a pipe's reader
_ADVICE: Final = ". What was paid for is in the cache; solve this and run it again"
_KEPT: Final = 1024  # ids in memory
_NOWHERE: Final = -1
_SHOWN: Final = 10  # problems of an input that one error lists


class Ids:
    """The places of ids in a file. Memory is bounded: all but the newest ids are in a temporary file."""

    def __init__(self) -> None:
        self._places: Spilling[tuple[str], int] = Spilling(lambda: _NOWHERE, int, int, _KEPT)

    def add(self, name: str, place: int) -> int | None:
        """Note an id at its place; return the place that has it already, if any."""
        earlier = self.find(name)
        if earlier is None:
            self._places[name,] = place
            self._places.trim()
        return earlier

    def find(self, name: str) -> int | None:
        """Return the place of an id, if it was noted."""
        place = self._places[name,]
        return None if place == _NOWHERE else place


def numbered(file: IO[bytes], limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterate over the lines of a file that are not blank, with their numbers, from the start.

    Args:
        file: the file.
        limit: the largest number of lines.
    """
    file.seek(0)
    count = 0
    for number, line in enumerate(file, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            yield number, text
            count += 1
            if count == limit:
                return


class InputFile:
    """The batch file, read twice through one open file."""

    def __init__(self, path: Path, settings: BatchSettings) -> None:
        self.path = path
        self._settings = settings
        self._checksum = 0
        self._left = 0
        self._seen = 0
        self._lines: Iterator[tuple[int, bytes]] = iter(())
        self._ahead: deque[tuple[int, bytes]] = deque()

    def __enter__(self) -> Self:
        if str(self.path) == "-":
            raise BatchFileError(
                "the requests are read twice, so they must come from a file; save them to one"
            )
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise BatchFileError(f"{self.path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise BatchFileError(f"{self.path} is not a regular file; it is read twice, so save it to one")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(
        self, stop: Stop, then: Callable[[Line], None] | None = None, *, last: int | None = None
    ) -> int:
        """Return the number of requests to run, after checking all of them. Reads the whole file.

        Args:
            stop: ends it early.
            then: called with each request, until one is not valid.
            last: the number of the last line to check; by default all are.

        Raises:
            BatchFileError: naming each line that is not valid, up to ten of them.
        """
        problems: list[str] = []
        count = checksum = 0
        ids = Ids()
        for number, text in numbered(self._file, self._settings.limit):
            if stop.asked or len(problems) == _SHOWN or (last is not None and number > last):
                break
            count += 1
            checksum = zlib.crc32(text, checksum)
            try:
                line = parse_line(text, number, self._settings)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            custom_id = line.custom_id
            first = ids.add(custom_id, number)
            if first is not None:
                problems.append(
                    f"line {number}: custom_id {custom_id!r:.80} is already that of line {first}; "
                    "each line needs its own"
                )
            if then is not None and not problems:
                then(line)
        if problems:
            more = " (there may be more)" if len(problems) == _SHOWN else ""
            listed = "\n".join(problems)
            raise BatchFileError(f"{self.path} cannot be run, and nothing was asked{more}:\n{listed}")
        self._left, self._checksum = count, checksum
        self._lines = numbered(self._file, self._settings.limit)
        return count

    async def next(self) -> Line | None:
        """Return the next request, or None after the last.

        Raises:
            BatchFileError: when the file has changed since it was checked.
        """
        if self._left and not self._ahead:
            self._ahead.extend(await asyncio.to_thread(self._read))
        if not self._left and not self._checksum:
            return None
        try:
            number, text = self._ahead.popleft()
            line = parse_line(text, number, self._settings)
        except (IndexError, ValueError) as error:
            raise BatchFileError(
                f"{self.path} has changed during the run; run it again: what was paid for is in the cache"
            ) from error
        self._left -= 1
        return line

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


class _EarlierResults:
    """The results of an earlier output by the ids of their draws. The first search reads the file.

    Args:
        path: the earlier output, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._places: Ids | None = None

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the result line with an id, or None. Thread-safe.

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

    def _read(self) -> Ids:
        """Return the place of each result."""
        places, place = Ids(), 0
        with contextlib.suppress(FileNotFoundError):
            self._file = self._path.open("rb")
            for line in self._file:
                if line.startswith(RESULT) and _ANSWERED in line:
                    name = line.removeprefix(RESULT).partition(b'"')[0]
                    places.add(name.decode(errors="replace"), place)
                place += len(line)
        return places

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _result_in(text: bytes) -> dict[str, Any] | None:
    """Return the object of a result line; None for an error, and for anything that no run has written."""
    try:
        line = jsontext.loads(text)
    except ValueError:
        return None
    answered = line.get("error") is None and isinstance(line.get("response"), dict)
    return line if answered and isinstance(line.get("cachepipe"), dict) else None


class OutputFile:
    """The result file: written beside its place, and moved there when it is complete."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        if str(path) == "-":
            raise BatchFileError("the results go to a file, which appears when it is complete; name a file")
        with self._explained():
            # Anything but a regular file, such as a terminal or a pipe, gets the lines as they come.
            self._direct = path.exists() and not path.is_file()
            self._target = path if self._direct else Path(os.path.realpath(path))
            self.partial = self._target.with_name(self._target.name + ".partial")
            self._check(source)
        self._lines: list[bytes] = []
        self._bytes = 0
        self._written = 0
        self._complete = False
        self._pipe: int | None = None
        self._earlier = _EarlierResults(Path(os.devnull) if self._direct else self._target)

    def _check(self, source: Path) -> None:
        path, folder = self.path, self.path.parent
        if path.is_dir():
            raise BatchFileError(f"{path} is a folder; name a file for the results")
        if not folder.is_dir():
            raise BatchFileError(f"there is no folder {folder} for the results; make it first")
        try:
            if not source.exists():
                return
        except OSError:  # opening it raises the error to show
            return
        if path.exists() and path.samefile(source):
            raise BatchFileError(f"{path} is also the input; name another file for the results")
        if self.partial.exists() and self.partial.samefile(source):
            raise BatchFileError(
                f"the results are written to {self.partial} first, which is the input; name another file"
            )

    async def find_reader(self, stop: Stop) -> bool:
        """Wait until somebody reads the output, if it is a named pipe; return False when stopped.

        Opening the pipe in the usual way would wait too, but without reacting to signals.
        """
        while self._direct and self.path.is_fifo():
            try:
                self._pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    break  # opening it the usual way raises the error to show
            else:
                os.set_blocking(self._pipe, True)
                break
            if stop.asked:
                return False
            await asyncio.sleep(_POLL)
        return True

    def __enter__(self) -> Self:
        with self._explained():
            if self._pipe is not None:
                self._file: IO[bytes] = os.fdopen(self._pipe, "wb")
            else:
                self._file = self._target.open("wb") if self._direct else self._alone()
        return self

    def _alone(self) -> IO[bytes]:
        """Open the partial file for this process only, and empty it."""
        while True:
            file = self.partial.open("ab")
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that held it may have moved it to its place since it was opened.
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
        with self._explained(_ADVICE):
            self._file.writelines(lines)
            self._file.flush()
        self._written += len(lines)

    async def earlier(self, name: str) -> dict[str, Any] | None:
        """Return the earlier output's result of a draw, by its id, or None."""
        return await asyncio.to_thread(self._earlier.find, name)

    async def finish(self) -> None:
        """Write the remaining lines, and move the file to its place."""
        await asyncio.to_thread(self._finish)

    def _finish(self) -> None:
        self._write()
        if not self._direct:
            with self._explained(_ADVICE):
                os.fsync(self._file.fileno())
                if self._target.exists():
                    shutil.copymode(self._target, self.partial)
                if os.name == "nt":  # which cannot rename an open file
                    self._file.close()
                self.partial.replace(self._target)
        self._complete = True

    @contextlib.contextmanager
    def _explained(self, advice: str = "") -> Iterator[None]:
        """Raise errors of writing as sentences."""
        try:
            yield
        except OSError as error:
            told = f"the results cannot be written to {self.path}: {error.strerror}{advice}"
            raise BatchFileError(told) from error

    @property
    def left(self) -> Path | None:
        """The file with the lines of an interrupted run, if there are any."""
        return self.partial if not self._direct and self._written + len(self._lines) else None
