"""Do the tests of each clause notice when its rule is broken? ``python -m benchmarks.mutations [clauses…]``.

For each clause of the contract, the modules that decide it are broken in a few chosen ways, one at a time, in
a copy of the package. The module's own tests, which do no I/O, then run on the copy. The table shows which
test catches each mutation. It exits with 1 if a mutation survives, or if its text is no longer in the module.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
_PATIENCE = 300  # seconds for the tests of one mutation; a test that does not end fails after 60
_PLUGINS = ("anyio", "_hypothesis_pytestplugin", "pytest_timeout")
_IMPORTED = (
    "asyncio",
    "diskcache",
    "httpx",
    "hypothesis.strategies",
    "openai",
    "orjson",
    "pydantic",
    "sqlite3",
)
"""Modules that each run of the tests needs. They are imported once, and the runs are forks."""
_ALREADY = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"

TESTS = {
    "contract/allotment.py": ("unit/contract/test_allotment.py",),
    "contract/draws.py": ("unit/contract/test_draws.py",),
    "contract/demands.py": ("unit/contract/test_demands.py",),
    "contract/flags.py": ("unit/contract/test_flags.py",),
    "contract/lifecycle.py": ("unit/contract/test_lifecycle.py",),
    "contract/schedule.py": ("unit/contract/test_schedule.py",),
    "contract/undoing.py": ("unit/contract/test_undoing.py",),
    "contract/keys.py": ("unit/test_keys.py",),
    "accounting.py": ("unit/test_accounting.py",),
    "wire/sse.py": ("unit/wire/test_wire_streams.py",),
    "wire/choices.py": ("unit/wire/test_wire_samples.py", "unit/wire/test_wire_streams.py"),
    "wire/chat.py": ("unit/wire/test_wire_samples.py", "unit/wire/test_wire_streams.py"),
    "wire/messages.py": ("unit/wire/test_wire_samples.py", "unit/wire/test_wire_streams.py"),
    "wire/responses.py": ("unit/wire/test_wire_samples.py", "unit/wire/test_wire_streams.py"),
    "wire/embeddings.py": ("unit/wire/test_wire_samples.py",),
    "wire/base.py": ("unit/wire/test_wire_asks.py", "unit/wire/test_wire_samples.py"),
    "stores/tables.py": ("unit/test_digests.py",),
    "bounds.py": ("unit/test_bounds.py",),
}
"""The tests of each module, below ``tests/``. They do no I/O, so that a mutation takes seconds."""


class Mutation(NamedTuple):
    """One way to break a rule.

    Attributes:
        clause: the clause of the contract.
        module: the module, below ``cachepipe/``.
        effect: what goes wrong.
        old: the text to replace; it occurs once in the module.
        new: the text that replaces it.
    """

    clause: str
    module: str
    effect: str
    old: str
    new: str


MUTATIONS = (
    Mutation(
        "C1",
        "contract/allotment.py",
        "a draw does not take what it gets",
        "view.taken.add(index)  #",
        "pass  #",
    ),
    Mutation(
        "C1",
        "contract/allotment.py",
        "a coupled sample is given although it is taken",
        "free = preferred is not None and preferred not in taken",
        "free = preferred is not None",
    ),
    Mutation(
        "C1",
        "contract/draws.py",
        "equal requests are one draw",
        "identity[2], counter.take(identity), identity[3]",
        "identity[2], 0, identity[3]",
    ),
    Mutation(
        "C2",
        "contract/allotment.py",
        "a known draw gets other samples",
        "kept = 0 if refresh else len(indices)",
        "kept = 0",
    ),
    Mutation(
        "C2",
        "contract/allotment.py",
        "a later part ends the draw",
        "start + len(indices) if indices else None]",
        "None]",
    ),
    Mutation(
        "C2",
        "contract/draws.py",
        "the request id does not tell draws apart",
        'claimant.request_id or ""',
        '""',
    ),
    Mutation(
        "C3",
        "contract/allotment.py",
        "new draws follow no other namespace",
        "coupled: Sequence[int] | None = None if couple and not refresh else ()",
        "coupled: Sequence[int] | None = ()",
    ),
    Mutation(
        "C3",
        "contract/allotment.py",
        "every position follows the first one",
        "coupled[position] if",
        "coupled[0] if",
    ),
    Mutation(
        "C3",
        "contract/allotment.py",
        "a free index is skipped",
        "            at = other[1]\n    return None",
        "            at = other[1] + 1\n    return None",
    ),
    Mutation(
        "C4",
        "contract/allotment.py",
        "free samples are not used",
        "index = lowest_listed_free(listed, taken)",
        "index = None",
    ),
    Mutation(
        "C4",
        "contract/demands.py",
        "calls are smaller than the limit",
        "if not room:",
        "if part:",
    ),
    Mutation(
        "C4",
        "contract/demands.py",
        "a call that refused does not lower the limit",
        "min(limit, self.lowered)",
        "max(limit, self.lowered)",
    ),
    Mutation(
        "C5",
        "contract/demands.py",
        "a short answer fills the last slots",
        "slots[got:]",
        "slots[: len(slots) - got]",
    ),
    Mutation(
        "C5",
        "contract/demands.py",
        "samples go to the pieces in reverse",
        "given.append(got)",
        "given.insert(0, got)",
    ),
    Mutation(
        "C5",
        "contract/allotment.py",
        "the last index is generated first",
        "to_generate.append(indices[position])",
        "to_generate.insert(0, indices[position])",
    ),
    Mutation(
        "C5",
        "contract/lifecycle.py",
        "a second grant replaces samples that were generated",
        "elif cached:",
        "else:",
    ),
    Mutation(
        "C6",
        "contract/flags.py",
        "the first sample of a group is duplicated",
        "        if not together:\n            flags[0] = False",
        "        if not together:\n            flags[0] = True",
    ),
    Mutation(
        "C6",
        "accounting.py",
        "as asked counts the prompt with each sample",
        "prompt = prompt and usage.counts is None",
        "prompt = True",
    ),
    Mutation(
        "C6",
        "accounting.py",
        "hits are billed",
        "            if not hit:\n",
        "            if True:\n",
    ),
    Mutation(
        "C6",
        "contract/lifecycle.py",
        "a generated sample is called cached",
        "self.cached[position] = False",
        "self.cached[position] = True",
    ),
    Mutation(
        "C6",
        "contract/lifecycle.py",
        "what was generated for a draw that is left is not counted",
        "return (Waste(self._own()), GiveBack())",
        "return (GiveBack(),)",
    ),
    Mutation(
        "C7",
        "wire/sse.py",
        "a stream that was cut off is a whole answer",
        "if in_order and self._may_lack_terminal:",
        "if self._may_lack_terminal:",
    ),
    Mutation(
        "C7",
        "wire/choices.py",
        "a choice without a finish_reason is whole",
        'if not choice.get("finish_reason"):',
        "if False:",
    ),
    Mutation(
        "C7",
        "wire/sse.py",
        "no event is marked as the terminal one",
        "StreamEvent(event.raw, self.complete,",
        "StreamEvent(event.raw, False,",
    ),
    Mutation(
        "C7",
        "contract/lifecycle.py",
        "a sample that could not be stored is lost",
        "return (FreeLeases([index]),)",
        "return _NOTHING",
    ),
    Mutation(
        "C7",
        "contract/lifecycle.py",
        "a draw whose lease was lost never gets its sample",
        "return lost if self.complete or self.ended else (*lost, *_CLAIM)",
        "return lost",
    ),
    Mutation(
        "C7",
        "contract/lifecycle.py",
        "a draw is delivered before its last sample",
        "        return _NOTHING if self.missing else self._completed()\n\n    def arrived",
        "        return self._completed()\n\n    def arrived",
    ),
    Mutation(
        "C7",
        "contract/lifecycle.py",
        "the lease of a sample that could not be stored stays",
        "return (FreeLeases([index]),)",
        "return _NOTHING",
    ),
    Mutation(
        "C8",
        "contract/lifecycle.py",
        "an error of a first try fails draws that only waited",
        "last and self.retried:",
        "last:",
    ),
    Mutation(
        "C8",
        "contract/lifecycle.py",
        "draws that waited for a failed call try for ever",
        "if error is not None and last and self.retried:",
        "if error is not None and False:",
    ),
    Mutation(
        "C8",
        "contract/lifecycle.py",
        "a failed draw keeps its occurrence number",
        "*stop, GiveBack(), Release",
        "*stop, Release",
    ),
    Mutation(
        "C8",
        "contract/lifecycle.py",
        "a draw that others complete keeps its hold",
        "if self.joined and self.held else _DELIVER",
        "if False else _DELIVER",
    ),
    Mutation(
        "C8",
        "contract/undoing.py",
        "a draw is undone although it has another holder",
        " and not held(segment):",
        ":",
    ),
    Mutation(
        "C8",
        "contract/demands.py",
        "a model is given up after one empty call",
        "empty + 1 >= PATIENCE",
        "empty + 1 >= 1",
    ),
    Mutation(
        "C8",
        "wire/base.py",
        "an error under status 200 is an answer",
        '    if body.get("error"):\n        raise BadAnswer(f"the answer is an error',
        '    if False:\n        raise BadAnswer(f"the answer is an error',
    ),
    Mutation(
        "C8",
        "contract/lifecycle.py",
        "a draw that was left keeps the leases that it is granted",
        "(*self._released(), FreeLeases(mine)) if mine else self._released()",
        "self._released()",
    ),
    Mutation(
        "C9",
        "contract/keys.py",
        "1 and 1.0 have different keys",
        "        return int(value)\n",
        "        return value\n",
    ),
    Mutation(
        "C9",
        "contract/keys.py",
        "the order of keys in a schema does not count",
        "return _Ordered(_mapping(value))",
        "return _mapping(value)",
    ),
    Mutation(
        "C9",
        "wire/base.py",
        "a field that changes the answer is left out",
        '        "stream_options",  #',
        '        "temperature", "stream_options",  #',
    ),
    Mutation(
        "C10",
        "wire/choices.py",
        "a sample keeps its index in the call",
        '{**choice, "index": 0}',
        "{**choice}",
    ),
    Mutation(
        "C10",
        "wire/chat.py",
        "recorded tool calls differ from those of an answer",
        'if name != "index"} for call in calls',
        "if name} for call in calls",
    ),
    Mutation(
        "C10",
        "wire/messages.py",
        "a recorded message counts tokens anew",
        '            _replace(usage, value["usage"])\n',
        "",
    ),
    Mutation(
        "C10",
        "wire/responses.py",
        "a stream's items are lost where its last event lacks them",
        'get("output") in (None, [])',
        'get("output") is self',
    ),
    Mutation(
        "C10",
        "wire/embeddings.py",
        "vectors are stored as they came",
        'packed(result.get("embedding"))',
        'result.get("embedding")',
    ),
    Mutation(
        "C11",
        "contract/schedule.py",
        "a late answer notes no place",
        "note = place if arrival in self._late else None",
        "note = None",
    ),
    Mutation(
        "C11",
        "contract/schedule.py",
        "only the last answer handed over makes others late",
        "while self._latest and self._latest[-1] <= (place, arrival):",
        "while self._latest:",
    ),
    Mutation(
        "C11",
        "contract/schedule.py",
        "an error makes others late",
        "        if place == LAST:\n            return\n",
        "",
    ),
    Mutation(
        "C11",
        "contract/allotment.py",
        "a coupled draw does not inherit a noted place",
        "place = noted_place(others, n) if follows else None",
        "place = None",
    ),
    Mutation(
        "C12",
        "stores/tables.py",
        "a part of a draw may lie at another position",
        "{occurrence} {number} {position} {stamp}",
        "{occurrence} {number} {stamp}",
    ),
    Mutation(
        "C12",
        "stores/tables.py",
        "a damaged sample is served",
        "if value[1:_BODY] != xxh3_64_hexdigest(",
        "if False and value[1:_BODY] != xxh3_64_hexdigest(",
    ),
    Mutation(
        "C12",
        "bounds.py",
        "the prompts of a request do not count",
        "if n * prompts > most:",
        "if n > most:",
    ),
)


def problems() -> list[str]:
    """Return what is wrong with the mutations themselves: texts that do not occur once in their module."""
    found = []
    for mutation in MUTATIONS:
        text = (ROOT / "cachepipe" / mutation.module).read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            found.append(
                f"{mutation.clause} {mutation.module}: {mutation.old!r} must occur once; "
                f"it occurs {text.count(mutation.old)} times"
            )
    return found


def main() -> int:
    """Return the exit code: 1 when a mutation survives."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description=__doc__)
    parser.add_argument("clauses", nargs="*", metavar="clause", help="clauses, such as C4; default: all")
    clauses = {clause.upper() for clause in parser.parse_args().clauses}
    chosen = [mutation for mutation in MUTATIONS if not clauses or mutation.clause in clauses]
    wrong = problems()
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        return 1
    for name in _IMPORTED:
        importlib.import_module(name)
    tests = sorted({TESTS[mutation.module] for mutation in chosen})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        unchanged = [pool.submit(_forked, partial(_failure, ROOT), files) for files in tests]
        caught_by = list(_table(chosen, pool.map(partial(_forked, _failure_with), chosen)))
        failing = [failure for one in unchanged if (failure := one.result()) is not None]
    if failing:
        print(
            f"without a mutation these tests fail; repair them first: {', '.join(failing)}", file=sys.stderr
        )
        return 1
    print(f"{len(chosen) - caught_by.count(None)} of {len(chosen)} mutations are caught")
    return 1 if None in caught_by else 0


def _forked(function: Callable[[Any], str | None], argument: Any) -> str | None:
    """Return what a function returns in a process of its own, which imports cachepipe anew.

    Raises:
        RuntimeError: when the process ends without a result.
    """
    forks = multiprocessing.get_context("fork")
    receiver, sender = forks.Pipe(duplex=False)
    process = forks.Process(target=lambda: sender.send(function(argument)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(_PATIENCE):
            raise RuntimeError(f"the tests of {argument} did not end within {_PATIENCE} seconds")
        result: str | None = receiver.recv()
    finally:
        process.kill()
        process.join()
    return result


def _table(chosen: list[Mutation], caught_by: Any) -> Any:
    """Print a line for each mutation as its tests end, and yield the test that has caught it."""
    for mutation, test in zip(chosen, caught_by, strict=True):
        cells = f"{mutation.clause:<4} {mutation.module:<22} {mutation.effect:<58}"
        print(f"{cells} {test or 'SURVIVED'}", flush=True)
        yield test


def _failure_with(mutation: Mutation) -> str | None:
    """Return the first test that fails on a copy of the package with a mutation, or None."""
    with tempfile.TemporaryDirectory(prefix="cachepipe-mutation-") as folder:
        copy = Path(folder)
        package = shutil.copytree(
            ROOT / "cachepipe", copy / "cachepipe", ignore=shutil.ignore_patterns("__pycache__")
        )
        module = package / mutation.module
        text = module.read_text(encoding="utf-8")
        module.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        return _failure(copy, TESTS[mutation.module])


class _Failures:
    """A plugin of pytest that notes which tests fail."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test that failed."""
        if report.failed:
            self.names.append(report.nodeid.rpartition("/")[2])


def _failure(path: Path, tests: tuple[str, ...]) -> str | None:
    """Run tests on the package in a folder; this process must not have imported it.

    Raises:
        RuntimeError: when the tests cannot be run.
    """
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HYPOTHESIS_PROFILE": "mutations"}
    sys.path.insert(0, str(path))
    sys.dont_write_bytecode = path != ROOT
    os.chdir(ROOT)
    failures = _Failures()
    plugins = [option for name in _PLUGINS for option in ("-p", name)]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest = importlib.import_module("pytest")
        options = ["-x", "-q", "--tb=no", "--timeout=60", "-W", _ALREADY, *plugins]
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[failures])
    imported = sys.modules["cachepipe"].__file__ or ""
    if not imported.startswith(f"{path}{os.sep}") or (code and not failures.names):
        raise RuntimeError(f"the tests {tests} cannot be run on {path}: pytest returns {code}")
    return failures.names[0] if failures.names else None


if __name__ == "__main__":
    sys.exit(main())
