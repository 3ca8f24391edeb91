"""The extension for notebooks: a cell that is run again gets the samples again that it got before.

    %load_ext cachepipe

Each execution of a cell is a run of its own, and its requests carry the cell in their identity: their default
request id is the id that the cell has in the notebook's file. So cells do not disturb each other, in whatever
order they are run.

Some front ends send no id, or one that the file does not have. Then occurrence numbers tell the cells apart:
an execution gets the numbers that its cell got before in this kernel, and new ones for what is new. So a
kernel that runs all cells in order makes the same draws as a script with these cells, also after an edit.
"""

from __future__ import annotations

import re
import threading
from typing import Any, Final

import orjson

from cachepipe import cells
from cachepipe.cells import Cell
from cachepipe.contract.draws import CELL, Draw, Identity, is_own
from cachepipe.runs import KEPT, Occurrences, Run, Spilling

_LASTING: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""The ids that files of notebooks may have; others, such as VS Code's, do not outlast the front end."""
_LOADS: Final = re.compile(r"^\s*%(re)?load_ext\s+cachepipe\b", re.MULTILINE)


class _Numbers:
    """The occurrence numbers that a cell has got in this kernel, in each store."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._stores: dict[str, Spilling[Identity, list[int]]] = {}

    def of(self, store: str) -> Spilling[Identity, list[int]]:
        """Return the numbers of each identity."""
        with self.lock:
            if store not in self._stores:
                self._stores[store] = Spilling(list, orjson.dumps, orjson.loads, KEPT)
            return self._stores[store]


class _CellOccurrences(Occurrences):
    """Counts for one execution of a cell: it gets its earlier numbers again, then new ones.

    Args:
        kernel: counts for all cells of the kernel.
        numbers: the numbers of the cell.
        lock: protects the numbers.
    """

    def __init__(
        self, kernel: Occurrences, numbers: Spilling[Identity, list[int]], lock: threading.Lock
    ) -> None:
        super().__init__()
        self._kernel, self._numbers, self._numbers_lock = kernel, numbers, lock

    def take(self, identity: Identity) -> int:
        """Return the occurrence number of the next request of this identity."""
        place = super().take(identity)
        if is_own(identity.request_id):
            return place
        with self._numbers_lock:
            numbers = self._numbers[identity]
            while len(numbers) <= place:
                numbers.append(self._kernel.take(identity))
            self._numbers[identity] = numbers
            self._numbers.trim()
            return numbers[place]

    def give_back(self, draw: Draw) -> None:
        """Take back the number of a draw that was not delivered; it stays the cell's."""
        if not is_own(draw.request_id):
            with self._numbers_lock:
                draw = draw._replace(occurrence=self._numbers[draw.identity].index(draw.occurrence))
        super().give_back(draw)


class _Execution(Run):
    """The run of one execution of a cell that is known by its numbers."""

    def __init__(self, kernel: Run, numbers: _Numbers) -> None:
        super().__init__()
        self._kernel, self._numbers = kernel, numbers

    def _made(self, store: str) -> Occurrences:
        return _CellOccurrences(self._kernel.of(store), self._numbers.of(store), self._numbers.lock)


class _Extension:
    """Begins and ends the cells of a shell.

    Args:
        shell: IPython's shell.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._kernel = Run()
        self._known: dict[str, _Numbers] = {}

    def load(self) -> None:
        """Listen to the shell, and begin the cell that loads the extension."""
        self._shell.events.register("pre_run_cell", self._begin)
        self._shell.events.register("post_run_cell", self._end)
        cells.loaded = True
        message = self._message()
        text = message.get("content", {}).get("code") or (cells.inputs() or [""])[-1]
        if text:  # otherwise the configuration of IPython loads it
            cells.begin(self._cell(text, message.get("metadata", {}).get("cellId")))

    def unload(self) -> None:
        """Listen no more."""
        self._shell.events.unregister("pre_run_cell", self._begin)
        self._shell.events.unregister("post_run_cell", self._end)
        cells.end()
        cells.loaded = False

    def _message(self) -> dict[str, Any]:
        """Return the front end's message that the kernel is handling; empty in a terminal."""
        get_parent = getattr(self._shell, "get_parent", None)
        return (get_parent and get_parent()) or {}

    def _begin(self, info: Any) -> None:
        """Begin a cell before the shell runs it; what a cell runs itself, as ``%%capture``, is its own."""
        cell = cells.own()
        if cell is not None:
            cell.depth += 1
        else:
            cells.begin(self._cell(info.raw_cell, getattr(info, "cell_id", None)))

    def _end(self, result: Any) -> None:
        """End a cell after the shell has run it; the context of an asynchronous one is gone by then."""
        if result is not None and not result.info.raw_cell.strip():
            return  # it has not begun
        cell = cells.own()
        if cell is not None:
            cell.depth -= 1
        if cell is None or not cell.depth:
            cells.end()

    def _cell(self, text: str, cell_id: str | None) -> Cell:
        """Return a new execution of the cell with this text, and the id that the front end gives it."""
        if cell_id and _LASTING.fullmatch(cell_id):
            return Cell(f"{CELL}{cell_id}", Run())
        if not cell_id and not self._message().get("content", {}).get("allow_stdin", True):
            # A program executes the notebook from top to bottom, and equal texts are different cells.
            if _LOADS.search(text):
                self._kernel = Run()
            numbers = _Numbers()
        else:
            numbers = self._known.setdefault(cell_id or text, _Numbers())
        return Cell(None, _Execution(self._kernel, numbers))


_loaded: dict[int, _Extension] = {}


def load_ipython_extension(shell: Any) -> None:
    """Make each execution of a cell a run of its own: ``%load_ext cachepipe``."""
    extension = _loaded[id(shell)] = _Extension(shell)
    extension.load()


def unload_ipython_extension(shell: Any) -> None:
    """Undo `load_ipython_extension`: ``%unload_ext cachepipe``."""
    _loaded.pop(id(shell)).unload()
