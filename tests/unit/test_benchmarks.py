"""The benchmarks work: each gets the right answers, at tiny sizes."""

import asyncio
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_benchmark_gets_the_right_answers():
    done = run("--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["hit", "miss", "growth", "imports"]


def test_a_name_that_no_benchmark_has_is_refused():
    done = run("hits")
    assert done.returncode == 2
    assert "there is no benchmark hits; there are hit, miss, growth, imports" in done.stderr


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.harness")


def a_table(harness, got):
    def right(result, _):
        harness.equal([result], [1])

    return harness.Table(
        "a question",
        [
            harness.Entry("floor", lambda _: 1, right, role="floor"),
            harness.Entry("ours", lambda _: got, right, against={"floor": 1e9}),
        ],
    )


def test_a_wrong_answer_is_no_figure(harness):
    with pytest.raises(harness.WrongAnswer, match="ours: result 0 is 2 and should be 1"):
        asyncio.run(harness.measure(a_table(harness, 2), 1))


def test_figures_have_medians_ratios_and_goals(harness):
    measured = asyncio.run(harness.measure(a_table(harness, 1), 3))
    floor, ours = measured["entries"]
    assert (floor["ratios"], len(floor["rounds"]), len(ours["rounds"])) == ([], 3, 3)
    assert [(ratio["to"], ratio["holds"]) for ratio in ours["ratios"]] == [("floor", True)]


def test_entries_take_turns_after_a_round_that_warms_up(harness):
    calls = []
    entries = [
        harness.Entry(name, calls.append, lambda *_: None, prepare=lambda number, name=name: (name, number))
        for name in "AB"
    ]
    asyncio.run(harness.measure(harness.Table("turns", entries), 2))
    assert calls == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("A", 2), ("B", 2)]


def test_the_readme_has_the_figures_of_the_committed_run():
    """Ratios of one table of the README are in the results that it names."""
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    [name] = set(re.findall(r"\(results/([\w.-]+)\)", readme))
    figures = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    measured = {
        (f"{ratio['ratio']:.2f}", "holds" if ratio["holds"] else "**missed**")
        for tables in figures["benchmarks"].values()
        for table in tables
        for entry in table["entries"]
        for ratio in entry["ratios"]
        if ratio["goal"] is not None
    }
    told = re.findall(r"\| ([\d.]+) \| (holds|\*\*missed\*\*) \|", readme)
    assert len(told) >= 10
    assert set(told) <= measured
