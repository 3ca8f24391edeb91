"""How the test command spreads its tests over processes."""

import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def suite(request):
    """The module of what all tests share."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(plugin for plugin in plugins if getattr(plugin, "__file__", "") == str(ROOT / "conftest.py"))


@pytest.fixture
def begun(request, suite, monkeypatch):
    """A function that begins the suite as pytest does, and returns over how many processes it is spread."""
    sources = type(request.config).ArgsSource
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def begin(*, source="TESTPATHS", **given):
        usual = {"keyword": "", "markexpr": "", "collectonly": False, "usepdb": False, "numprocesses": None}
        option = types.SimpleNamespace(**{**usual, **given})
        if option.numprocesses == "no xdist":
            del option.numprocesses
        config = types.SimpleNamespace(option=option, args_source=sources[source], ArgsSource=sources)
        suite.pytest_cmdline_main(config)
        return getattr(option, "numprocesses", None)

    return begin


def test_the_whole_suite_runs_on_all_cores(begun):
    assert begun() == "auto"


@pytest.mark.parametrize(
    "given",
    [
        {"source": "ARGS"},
        {"keyword": "replay"},
        {"markexpr": "slow"},
        {"collectonly": True},
        {"usepdb": True},
    ],
)
def test_a_part_of_it_runs_in_one_process(begun, given):
    assert begun(**given) is None


def test_what_the_command_line_says_holds(begun):
    assert begun(numprocesses=0) == 0
    assert begun(numprocesses="no xdist") is None


def test_the_processes_that_run_the_tests_start_no_others(begun, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert begun() is None


@pytest.mark.parametrize(("cores", "processes"), [(1, 2), (2, 3), (3, 5), (8, 12)])
def test_three_processes_share_two_cores(suite, monkeypatch, cores, processes):
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert suite.pytest_xdist_auto_num_workers() == processes


def test_the_environment_says_how_many_processes_there_are(suite, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "7")
    assert suite.pytest_xdist_auto_num_workers() is None


def test_slow_tests_come_first_in_each_of_several_processes(suite, monkeypatch):
    class Item:
        def __init__(self, name):
            self.name = name

        def get_closest_marker(self, name):
            return self.name if (name, self.name[:4]) == ("slow", "slow") else None

    items = [Item(name) for name in ("a", "slow b", "c", "slow d")]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    suite.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["a", "slow b", "c", "slow d"]
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    suite.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == ["slow b", "slow d", "a", "c"]
