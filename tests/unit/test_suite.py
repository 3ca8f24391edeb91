"""How the test command spreads its tests over processes."""

import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def begun(request, monkeypatch):
    """A function that begins the suite as pytest does, and returns over how many processes it is spread."""
    plugins = request.config.pluginmanager.get_plugins()
    suite = next(plugin for plugin in plugins if getattr(plugin, "__file__", "") == str(ROOT / "conftest.py"))
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
