"""How long does a process take that imports cachepipe, against one that does nothing?

The floor is ``python -c pass``, from start to exit; controls import ``asyncio`` and ``diskcache``. The
names of the package are resolved when they are used, so what a program that builds a pipeline pays is
an entry of its own. Byte code is compiled beforehand, in the warm-up round.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Entry, Sizes, Table, expect

_FLOOR = "pass"
_PROGRAMS: tuple[tuple[str, str, float | None], ...] = (
    ("control", "import asyncio", None),
    ("control", "import diskcache", None),
    ("subject", "import cachepipe", 6.0),
    ("subject", "from cachepipe import OnlineAPI, Request", None),
)


def _start(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode


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
    del sizes, folder

    def ended(code: int, _: Any) -> None:
        expect(code == 0, f"the process ended with exit code {code}")

    for _, program, _ in _PROGRAMS:
        _imported(program)
    yield [
        Table(
            "a whole process, python -c …",
            [
                Entry(_FLOOR, lambda _: _start(_FLOOR), ended, role="floor"),
                *(
                    Entry(
                        program,
                        lambda _, program=program: _start(program),  # type: ignore[misc]
                        ended,
                        role=role,  # type: ignore[arg-type]
                        against={_FLOOR: goal},
                    )
                    for role, program, goal in _PROGRAMS
                ),
            ],
            "ms",
        )
    ]
