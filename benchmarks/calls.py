"""How many calls within cachepipe does a request take, in how many files; and how much code is there?

    python -m benchmarks.calls                    # a known draw, a new draw and a miss, on two ways in
    python -m benchmarks.calls --list             # their calls, in order
    python -m benchmarks.calls --lines            # lines of code, and how complex the functions are
    python -m benchmarks.calls --root ../before   # the same of another checkout
    python -m benchmarks.calls --json             # the figures as JSON

The ways in are a pipeline (``OnlineAPI`` around a model that answers at once) and the drop-in client (before
``server.py`` in a process of its own), each on a cache in a folder and with one request at a time.

A *call* is a Python function of ``cachepipe/`` that begins, or a coroutine or generator that goes on. A
*switch* is a call in another file than the call before it in the same thread. The figures are medians over
a few requests, after others that warm up. Each question has to get the same answer three times.

*Lines* are lines of code: blank lines, comments and docstrings do not count, nor do ``testing/`` and
generated files (their first line is a comment that says so). *Complexity* of a function is 1, plus 1 for each
branch, loop, handler, ``assert``, ``lambda``, clause of a comprehension, and condition that ``and`` or ``or``
joins to another; nested functions count by themselves. This is more than ruff's C901 counts.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import io
import json
import statistics
import sys
import tempfile
import threading
import tokenize
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from benchmarks.harness import ROOT, expect
from benchmarks.peers import Server

WARM, REPEATS = 5, 5
KINDS = {"known draw": "first", "new draw": "second", "miss": "first"}
"""The kinds of requests, and the namespace that each is asked in."""
COMPLEX = (10, 15)


class Call(NamedTuple):
    """A function that begins or goes on."""

    thread: int
    file: str
    name: str
    line: int


class Trace:
    """Records the calls within a package, in this thread and in those that begin while the trace is open."""

    def __init__(self, package: Path) -> None:
        self._prefix = f"{package}/"
        self._files: dict[CodeType, str] = {}
        self._calls: list[Call] | None = None
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def close(self) -> None:
        """Record no more."""
        threading.setprofile(None)
        sys.setprofile(None)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Record into the list that is yielded while the context is entered."""
        self._calls = calls = []
        try:
            yield calls
        finally:
            self._calls = None

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if self._calls is None or event != "call":
            return
        code = frame.f_code
        if code not in self._files:
            name = code.co_filename
            self._files[code] = name.removeprefix(self._prefix) if name.startswith(self._prefix) else ""
        if file := self._files[code]:
            self._calls.append(Call(threading.get_ident(), file, code.co_qualname, frame.f_lineno))


Ask = Callable[[dict[str, Any], str], Awaitable[str]]
"""Asks a question in a namespace, and returns the answer."""


@contextlib.asynccontextmanager
async def pipeline(folder: Path) -> AsyncIterator[Ask]:
    """Yield what asks a pipeline around a model that answers at once."""
    from benchmarks import data  # noqa: PLC0415 - these import cachepipe, from the root that is measured
    from cachepipe import OnlineAPI, Request, Response  # noqa: PLC0415

    class Model:
        cache_scope = "benchmark"

        async def request(self, request: Request) -> Response:
            return Response([data.answer(request)] * request.n)

    async with OnlineAPI(Model(), folder) as opened:

        async def ask(question: dict[str, Any], namespace: str) -> str:
            response = await opened.request(data.request(question, namespace=namespace))
            answer: str = response.data[0]
            return answer

        yield ask


@contextlib.asynccontextmanager
async def client(folder: Path) -> AsyncIterator[Ask]:
    """Yield what asks the drop-in client."""
    from cachepipe.clients import AsyncOpenAI  # noqa: PLC0415 - from the root that is measured

    with Server() as server:
        opened: Any = AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, cache=folder)
        clients = {namespace: opened.with_options(namespace=namespace) for namespace in KINDS.values()}

        async def ask(question: dict[str, Any], namespace: str) -> str:
            settings = {name: value for name, value in question.items() if name != "prompt"}
            completion = await clients[namespace].chat.completions.create(
                model="mock", messages=question["prompt"], **settings
            )
            answer: str = completion.choices[0].message.content
            return answer

        yield ask
        await opened.close()


async def trace(package: Path) -> dict[str, list[list[Call]]]:
    """Return the calls of a few requests of each kind, by way in and kind."""
    import cachepipe  # noqa: PLC0415 - from the root that is measured
    from benchmarks import data  # noqa: PLC0415 - likewise

    expect(Path(cachepipe.__file__).parent == package, f"cachepipe is imported from {cachepipe.__file__}")
    found: dict[str, list[list[Call]]] = {}
    tracing = Trace(package)
    try:
        for way in (pipeline, client):
            with tempfile.TemporaryDirectory(prefix="cachepipe-calls-") as folder:
                async with way(Path(folder)) as ask:
                    for number in range(WARM + REPEATS):
                        question = data.question(f"{number}", chat=way is client)
                        calls = await _asked(tracing, ask, question)
                        for kind in KINDS if number >= WARM else ():
                            found.setdefault(f"{way.__name__}, {kind}", []).append(calls[kind])
    finally:
        tracing.close()
    return found


async def _asked(tracing: Trace, ask: Ask, question: dict[str, Any]) -> dict[str, list[Call]]:
    """Return the calls of a question's miss, of its new draw in another namespace, and of its rerun."""
    from cachepipe import run  # noqa: PLC0415 - from the root that is measured

    calls, answers = {}, set()
    for kind in reversed(KINDS):
        with run() if kind == "known draw" else contextlib.nullcontext(), tracing.recording() as calls[kind]:
            answers.add(await ask(question, KINDS[kind]))
    expect(len(answers) == 1, f"one question got the answers {answers}")
    return calls


def counted(calls: list[Call]) -> dict[str, int]:
    """Return the figures of one request."""
    last: dict[int, str] = {}
    switches = 0
    for call in calls:
        switches += last.get(call.thread, call.file) != call.file
        last[call.thread] = call.file
    return {"calls": len(calls), "files": len({call.file for call in calls}), "switches": switches}


def medians(found: dict[str, list[list[Call]]]) -> dict[str, dict[str, float]]:
    """Return the figures of each kind."""
    told = {}
    for name, requests in found.items():
        figures = [counted(calls) for calls in requests]
        told[name] = {column: statistics.median(each[column] for each in figures) for column in figures[0]}
    return told


# The size of the code.


def lines_of(source: str) -> int:
    """Return how many lines hold code; blank lines, comments and docstrings do not."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docstrings |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def complexity(function: ast.AST) -> int:
    """Return the complexity of a function, without that of the functions in it."""
    total, left = 1, list(ast.iter_child_nodes(function))
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        total += _branches(node)
        left += ast.iter_child_nodes(node)
    return total


def _branches(node: ast.AST) -> int:
    match node:
        case ast.For() | ast.AsyncFor() | ast.While():
            return 1 + bool(node.orelse)
        case ast.If() | ast.IfExp() | ast.ExceptHandler() | ast.match_case() | ast.Assert() | ast.Lambda():
            return 1
        case ast.Try():
            return bool(node.orelse)
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.comprehension():
            return 1 + len(node.ifs)
    return 0


def size(package: Path) -> dict[str, Any]:
    """Return how many lines of code a package has by folder, and the complexity of its functions."""
    lines: dict[str, int] = {}
    functions: list[tuple[int, str]] = []
    for path in sorted(package.rglob("*.py")):
        place, source = path.relative_to(package), path.read_text(encoding="utf-8")
        generated = source.startswith("#") and "generated" in source.partition("\n")[0].lower()
        if not generated:
            functions += [
                (complexity(node), f"{place}:{node.lineno} {node.name}")
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
        if not generated and place.parts[0] != "testing":
            part = place.parts[0] if len(place.parts) > 1 else "."
            lines[part] = lines.get(part, 0) + lines_of(source)
    functions.sort(reverse=True)
    return {
        "lines": sum(lines.values()),
        "by folder": dict(sorted(lines.items(), key=lambda item: -item[1])),
        "functions": len(functions),
        "above": {limit: sum(found > limit for found, _ in functions) for limit in COMPLEX},
        "complex": [f"{found} {name}" for found, name in functions if found > COMPLEX[1]],
    }


# The command.


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calls", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--list", action="store_true", help="list the calls of one request of each kind")
    parser.add_argument("--lines", action="store_true", help="count lines and complexity instead")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    root = options.root.resolve()
    package = root / "cachepipe"
    if not package.is_dir():
        parser.error(f"--root is a checkout with a folder cachepipe; {root} has none")
    if options.lines:
        measured = size(package)
        print(json.dumps(measured, indent=1) if options.json else _size_table(measured))
        return
    sys.path.insert(0, str(root))
    found = asyncio.run(trace(package))
    if options.json:
        print(json.dumps(medians(found), indent=1))
    elif options.list:
        print(_listing(found))
    else:
        print(_table(medians(found)))


def _table(figures: dict[str, dict[str, float]]) -> str:
    columns = next(iter(figures.values()))
    rows = [f"{'':<24}" + "".join(f"{column:>10}" for column in columns)]
    for name, values in figures.items():
        rows.append(f"{name:<24}" + "".join(f"{value:>10g}" for value in values.values()))
    return "\n".join(rows)


def _listing(found: dict[str, list[list[Call]]]) -> str:
    rows = []
    for name, requests in found.items():
        rows.append(f"\n{name}\n")
        rows += [f"{call.file:<28} {call.name}:{call.line}" for call in requests[-1]]
    return "\n".join(rows)


def _size_table(measured: dict[str, Any]) -> str:
    rows = [f"{part:<24}{count:>10,}" for part, count in measured["by folder"].items()]
    rows.append(f"{'lines of code':<24}{measured['lines']:>10,}")
    rows.append(f"{'functions':<24}{measured['functions']:>10,}")
    for limit, count in measured["above"].items():
        name, share = f"complexity above {limit}", count / measured["functions"]
        rows.append(f"{name:<24}{count:>10,} {share:8.1%}")
    return "\n".join([*rows, *(f"  {name}" for name in measured["complex"])])


if __name__ == "__main__":
    main()
