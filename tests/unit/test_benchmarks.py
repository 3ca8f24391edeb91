"""The benchmarks work: each gets the right answers, at tiny sizes."""

import ast
import asyncio
import ensurepip
import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree as ET

import forked
import pytest
from profiles import FULL, sized

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return forked.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_benchmarks_get_the_right_answers():
    """Those that start few processes; ``python -m benchmarks --check`` runs all of them."""
    names = ["hit", "growth", *sized([], ["crowd", "ordered"])]
    done = run(*names, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == names


def test_a_name_that_no_benchmark_has_is_refused():
    done = run("hits")
    assert done.returncode == 2
    assert "there is no benchmark hits; there are hit, client, miss" in done.stderr


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


def test_who_should_be_faster_is_compared_the_other_way_round(harness):
    slow, fast = harness.Timed(2.0, 1), harness.Timed(0.5, 1)
    right = lambda result, _: harness.equal([result], [1])  # noqa: E731
    entries = [
        harness.Entry("peer", lambda _: slow, right, role="peer"),
        harness.Entry("ours", lambda _: fast, right, faster={"peer": 3, "absent": 9}),
        harness.Entry("other", lambda _: fast, right, faster={"peer": 5}),
    ]
    measured = asyncio.run(harness.measure(harness.Table("a question", entries), 2))
    told = [
        (ratio["to"], ratio["ratio"], ratio["holds"])
        for each in measured["entries"]
        for ratio in each["ratios"]
    ]
    assert told == [("peer", 4.0, True), ("peer", 4.0, False)]


def test_counts_have_goals_that_are_exact_or_at_most(harness):
    rows = [
        harness.Count("small", lambda: {"MB": 10, "lost": 0}, goals={"lost": 0, "MB": ("≤", 9)}),
        harness.Count("large", lambda: {"MB": 14, "lost": 1}, goals={"lost": 0, "MB": (1.5, "small")}),
    ]
    told = asyncio.run(harness.counted(harness.Tally("a question", ["MB", "lost"], rows)))
    goals = [(goal["column"], goal["holds"]) for entry in told["entries"] for goal in entry["goals"]]
    assert goals == [("lost", True), ("MB", False), ("lost", False), ("MB", True)]


def test_a_peer_that_fails_is_told_and_ends_nothing(harness):
    def fails(*_):
        raise harness.WrongAnswer("it forgot")

    def broken():
        raise RuntimeError("it ended")

    table = a_table(harness, 1)
    table.entries.insert(0, harness.Entry("peer", lambda _: 0, fails, role="peer"))
    table.entries[-1].faster["peer"] = 3
    measured = asyncio.run(harness.measure(table, 2))
    assert [entry["name"] for entry in measured["entries"]] == ["floor", "ours"]
    assert measured["failed"] == {"peer": "it forgot"}
    rows = [harness.Count("peer", broken, "peer"), harness.Count("ours", lambda: {"lost": 0})]
    told = asyncio.run(harness.counted(harness.Tally("a question", ["lost"], rows)))
    assert [entry["name"] for entry in told["entries"]] == ["ours"]
    assert told["failed"] == {"peer": "it ended"}


def run_quickly(command, **options):
    """Run a command; in a new environment, pip runs from its archive, as unpacking it takes seconds."""
    wheels = [*Path(ensurepip.__file__).with_name("_bundled").glob("pip-*.whl")]
    if FULL or "venv" not in command or not wheels:
        return subprocess.run(command, **options)  # noqa: PLW1510 - the options say it
    made = subprocess.run([*command, "--without-pip"], **options)  # noqa: PLW1510 - likewise
    [site] = Path(command[-1]).glob("lib/python*/site-packages")
    (site / "pip.pth").write_text(f"{wheels[0]}\n")
    return made


def test_a_peer_that_cannot_be_installed_is_told_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    peers = importlib.import_module("benchmarks.peers")
    monkeypatch.setenv("CACHEPIPE_BENCHMARKS", str(tmp_path))
    monkeypatch.setattr(peers, "subprocess", types.SimpleNamespace(run=run_quickly))
    monkeypatch.setattr(peers, "REQUIRES", {"cachesaver": (str(tmp_path / "no such package"),)})
    there, missing = peers.available()
    assert there == {}
    assert "no such package" in missing["cachesaver"]
    assert not list(tmp_path.glob("*/installed"))


def test_entries_take_turns_after_a_round_that_warms_up(harness):
    calls = []
    entries = [
        harness.Entry(name, calls.append, lambda *_: None, prepare=lambda number, name=name: (name, number))
        for name in "AB"
    ]
    asyncio.run(harness.measure(harness.Table("turns", entries), 2))
    assert calls == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("A", 2), ("B", 2)]


def test_the_plot_shows_each_cache_of_the_newest_results_with_peers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    plot = importlib.import_module("benchmarks.plot")

    def result(peers, microseconds):
        entries = [
            {"name": "bare", "role": "control", "median": 9},
            {"name": "a & b", "role": "peer", "median": microseconds},
            {"name": "cachepipe", "role": "subject", "median": 100},
        ]
        table = {"title": "a known draw, cache just opened, 2 messages", "entries": entries}
        return json.dumps({"peers": peers, "benchmarks": {"client": [table]}})

    with pytest.raises(SystemExit, match="no results have peers"):
        plot.draw(tmp_path)
    for date, peers, microseconds in (
        ("1", {"a & b": "1"}, 1000),
        ("2", {"a & b": "1"}, 500),
        ("3", {}, 250),
    ):
        (tmp_path / f"{date}.json").write_text(result(peers, microseconds))
    root = ET.fromstring(plot.draw(tmp_path).read_text())  # noqa: S314 - our own
    told = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert told[1:5] == ["cachepipe", "10,000", "a & b", "2,000"]
    wide, narrow = [float(bar.get("width")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert wide == pytest.approx(5 * narrow)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.report")


def test_the_readme_has_the_goals_of_the_newest_results(report, tmp_path):
    readme = ROOT / "benchmarks" / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    told = report.write_goals(ROOT / "benchmarks" / "results", copy)
    assert re.fullmatch(r"\d+ of [1-9]\d* goals hold, by [\w-]+\.json", told)
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")


def results(ratio, spread=0.1):
    """Return the figures of a run with one table and one tally."""
    compared = {"to": "floor", "kind": "times", "ratio": ratio, "goal": 2.0, "holds": ratio <= 2}
    floor = {"name": "floor", "median": 10.0, "spread": spread, "ratios": []}
    ours = {"name": "ours", "median": 10.0 * ratio, "spread": 0.1, "ratios": [compared]}
    lost = {"column": "lost", "goal": 0, "holds": True}
    return {
        "machine": dict.fromkeys(("date", "python", "cpus", "cpu", "sqlite", "commit", "load"), "?"),
        "rounds": 3,
        "benchmarks": {
            "hit": [{"title": "a draw", "unit": "µs", "entries": [floor, ours]}],
            "spend": [
                {
                    "title": "n",
                    "columns": ["lost"],
                    "entries": [{"name": "ours", "figures": {"lost": 0}, "goals": [lost]}],
                }
            ],
        },
    }


def test_the_goals_of_a_run_are_a_table_with_a_mark_for_noise(report):
    rows = [
        line for line in report.goals(results(3.0, spread=0.3), "1.json").splitlines() if line[:3] == "| `"
    ]
    assert rows == [
        "| `hit`, a draw ~: ≤ 2 x floor | ours | 3.00 (30 and 10 µs) | **missed** |",
        "| `spend`, n: lost = 0 | ours | 0 | holds |",
    ]


def test_ratios_of_two_runs_that_differ_by_more_than_a_fifth_are_told(report, tmp_path, capsys):
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, ratio in zip(paths, (2.0, 2.3, 3.0), strict=True):
        path.write_text(json.dumps(results(ratio)))
    assert report.compare(paths[0], paths[1]) == 0
    assert capsys.readouterr().out == "1 of 1 ratios agree within a fifth\n"
    assert report.compare(paths[0], paths[2]) == 1
    told = capsys.readouterr().out
    assert "2.00     3.00  x 1.50  hit · a draw · ours · floor" in told
    assert "0 of 1 ratios agree" in told


def test_a_noisy_table_is_measured_again_and_the_steadiest_measurement_counts(harness):
    floors = iter([9, 1, 3, 9, 1, 4, 9, 1, 2])  # seconds, three rounds a measurement, of which one warms up
    numbers = []

    def ask(number):
        numbers.append(number)
        return harness.Timed(next(floors), number)

    same = lambda result, number: harness.equal([result], [number])  # noqa: E731
    entries = [
        harness.Entry("floor", ask, same, role="floor", prepare=lambda number: number),
        harness.Entry("ours", lambda _: harness.Timed(1, 0), lambda *_: None, against={"floor": None}),
    ]
    measured = asyncio.run(harness.steadiest(harness.Table("a question", entries), 2))
    assert numbers == [*range(9)]
    assert measured["measured"] == harness.TRIES == 3
    assert measured["entries"][0]["rounds"] == [1e6, 2e6]


def test_a_steady_table_is_measured_once(harness):
    entries = [
        harness.Entry("floor", lambda _: harness.Timed(1, 0), lambda *_: None, role="floor"),
        harness.Entry("ours", lambda _: harness.Timed(1, 0), lambda *_: None, against={"floor": None}),
    ]
    assert asyncio.run(harness.steadiest(harness.Table("a question", entries), 2))["measured"] == 1


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.calls")


def test_the_calls_of_each_kind_of_request_are_counted_on_each_way_in():
    command = [sys.executable, "-m", "benchmarks.calls", "--json"]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    for way in ("pipeline", "client"):
        known, new, miss = (told[f"{way}, {kind}"] for kind in ("known draw", "new draw", "miss"))
        for column in ("calls", "files", "switches"):
            assert 0 < known[column] < new[column] < miss[column]


def test_with_the_schedule_reruns_of_concurrent_programs_make_no_call():
    puzzles = sized(1, 2)
    command = [sys.executable, "-m", "benchmarks.reruns", "--puzzles", str(puzzles)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("reruns make no call and give the same outputs: holds\n")
    assert len(re.findall(rf"^ordered=True,(?=.* 0 calls, {puzzles})", done.stdout, re.MULTILINE)) == 3


def test_calls_are_counted_only_within_the_package_and_switches_only_within_a_thread(calls, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    for name, source in {"one": "def f(): return 1", "two": "def g(f): return [f(), f()]"}.items():
        (package / f"{name}.py").write_text(source)
    spaces = {}
    for name in ("one", "two"):
        path = package / f"{name}.py"
        exec(compile(path.read_text(), str(path), "exec"), spaces)  # noqa: S102 - the module that is traced
    tracing = calls.Trace(package)
    try:
        spaces["g"](spaces["f"])
        with tracing.recording() as seen:
            len(json.dumps(spaces["g"](spaces["f"])))
    finally:
        tracing.close()
    assert [(call.file, call.name) for call in seen] == [("two.py", "g"), ("one.py", "f"), ("one.py", "f")]
    assert calls.counted(seen) == {"calls": 3, "files": 2, "switches": 1}
    elsewhere = calls.Call(-1, "two.py", "g", 1)
    assert calls.counted([seen[0], elsewhere, seen[1], elsewhere])["switches"] == 1


def test_coroutines_that_go_on_are_calls(calls, tmp_path):
    path = tmp_path / "one.py"
    space = {}
    exec(compile("async def f(wait):\n    await wait\n", str(path), "exec"), space)  # noqa: S102 - likewise
    tracing = calls.Trace(tmp_path)
    try:
        with tracing.recording() as seen:
            asyncio.run(space["f"](asyncio.sleep(0)))
    finally:
        tracing.close()
    assert [call.name for call in seen] == ["f", "f"]


SOURCE = '''"""A module
in three lines.
"""

# a comment


def f(a, b):  # another
    """What it does."""
    if a and b:

        text = """two
lines"""
        return [x for x in a if x]
    return lambda: g() if b else text


class C:
    """A class."""

    def g(self):
        def h():
            assert self
        try:
            h()
        except ValueError:
            pass
'''


def test_lines_of_code_are_no_blanks_comments_and_docstrings(calls):
    assert calls.lines_of(SOURCE) == 14


def test_the_complexity_of_a_function_counts_conditions_and_comprehensions(calls, tmp_path):
    (tmp_path / "one.py").write_text(SOURCE)
    (tmp_path / "testing").mkdir()
    (tmp_path / "testing" / "two.py").write_text("def k():\n    return 1\n")
    (tmp_path / "three.py").write_text("# Generated from one.py.\n" + SOURCE)
    measured = calls.size(tmp_path)
    assert (measured["lines"], measured["functions"]) == (14, 4)
    [f, g, h, k] = [
        calls.complexity(node)
        for source in (SOURCE, "def k(): return 1")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    assert (f, g, h, k) == (7, 2, 2, 1)


def test_each_mutation_replaces_one_text_of_a_module_that_has_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    mutations = importlib.import_module("benchmarks.mutations")
    assert mutations.problems() == []
    clauses = [mutation.clause for mutation in mutations.MUTATIONS]
    for clause in ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C12"):
        assert clauses.count(clause) >= 3, clause
    for mutation in mutations.MUTATIONS:
        assert mutation.new != mutation.old
        assert all((ROOT / "tests" / test).exists() for test in mutations.TESTS[mutation.module])


def test_a_mutation_that_no_test_catches_is_reported():
    """The tests of one module run with a mutation that they catch, and with one that changes nothing."""
    lines = (
        "import sys",
        "from benchmarks import mutations as m",
        "harmless = m.Mutation('C6', 'contract/flags.py', 'nothing', 'Close all groups.', 'Close them all.')",
        "m.MUTATIONS = (*(one for one in m.MUTATIONS if one.module == harmless.module), harmless)",
        "sys.exit(m.main())",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    caught, survived, summary = done.stdout.splitlines()
    assert "test_flags.py::test_c6_" in caught
    assert survived.endswith("SURVIVED")
    assert summary == "1 of 2 mutations are caught"
