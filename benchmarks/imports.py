"""How long does a process take that imports cachepipe, against one that does nothing?

The floor is ``python -c pass``, from start to exit; controls import ``asyncio`` and ``diskcache``. The
names of the package are resolved when they are used, so what a program that builds a pipeline pays is
an entry of its own. A client is compared with the SDK's own; both look up the resource of chat completions.
The warm-up round compiles the byte code.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Entry, Goals, Role, Sizes, Table, expect

_FLOOR = "pass"
_SDK = "from openai import OpenAI; OpenAI(api_key='-').chat.completions"
_CLIENT = "from cachepipe.clients import OpenAI; OpenAI(api_key='-').chat.completions"
_HELP = "import sys; sys.argv[1:] = ['--help']; from cachepipe.cli import main; main()"
_PROGRAMS: tuple[tuple[Role, str, Goals], ...] = (
    ("control", "import asyncio", {_FLOOR: None}),
    ("control", "import diskcache", {_FLOOR: None}),
    ("subject", "import cachepipe", {_FLOOR: 2.0}),
    ("subject", "from cachepipe import OnlineAPI, Request", {_FLOOR: None}),
    ("subject", _HELP, {_FLOOR: 6.0}),
    ("control", _SDK, {_FLOOR: None}),
    ("subject", _CLIENT, {_SDK: 1.05}),
)


def _started(code: str, _: Any) -> int:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    return done.returncode


def _imported(code: str) -> None:
    """Check that a program imports what it says, from where its author thinks."""
    asked = f"{code}\nimport sys\nprint('cachepipe' in sys.modules and sys.modules['cachepipe'].__file__)"
    told = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    wanted = str(ROOT / "cachepipe" / "__init__.py") if "cachepipe" in code else "False"
    expect(told == wanted, f"{code!r} imports another cachepipe than the one beside the benchmarks: {told}")


@contextlib.asynccontextmanager
async def tables(sizes: Sizes, folder: Path) -> AsyncIterator[list[Table]]:
    """Yield one table of whole processes."""
    del sizes
    os.environ["CACHEPIPE_DIR"] = str(folder)  # the client's cache

    def ended(code: int, _: Any) -> None:
        expect(code == 0, f"the process ended with exit code {code}")

    for _, program, _ in _PROGRAMS:
        if program != _HELP:  # which ends the process
            _imported(program)
    yield [
        Table(
            "a whole process, python -c …",
            [
                Entry(_FLOOR, functools.partial(_started, _FLOOR), ended, role="floor"),
                *(
                    Entry(program, functools.partial(_started, program), ended, role=role, against=against)
                    for role, program, against in _PROGRAMS
                ),
            ],
            "ms",
        )
    ]
