"""`rm`, `prune`, `compact` and `discard` as a user meets them, also if they are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cachepipe import OnlineAPI, Request, Response
from cachepipe.cli import inspect, manage
from cachepipe.cli.group import cli
from cachepipe.stores import DiskStore
from cachepipe.stores.repair import repair
from cachepipe.stores.verify import verify


class Count:
    cache_scope = "count"

    def __init__(self):
        self.calls = 0

    async def request(self, request):
        self.calls += request.n
        return Response([f"{self.calls - k}" for k in range(request.n)])


def ask(folder, namespace, n):
    """Return what a program gets, and how much of it was generated."""

    async def main():
        async with OnlineAPI(Count(), folder) as pipeline:
            answer = await pipeline.request(Request("count", n=n, namespace=namespace))
        return answer.data, sum(not cached for cached in answer.cached)

    return asyncio.run(main())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cache"
    ask(folder, "one", 4)
    ask(folder, "two", 2)
    return folder


def called(folder, *arguments, code=0, **more):
    done = CliRunner().invoke(cli, [*arguments, "--cache", str(folder)], **more)
    assert done.exit_code == code, done.output
    return done


def test_what_goes_is_said_and_nothing_goes_without_a_yes(folder):
    done = called(folder, "rm", "--namespace", "one", "--samples", code=2)
    assert "1 draw and 2 samples" in done.stdout
    assert "no terminal to ask on; give --yes" in done.stderr
    assert ask(folder, "one", 4)[1] == 0


@pytest.mark.parametrize(("answer", "code", "generated"), [("n\n", 2, 0), ("y\n", 0, 2)])
def test_a_terminal_is_asked(folder, monkeypatch, answer, code, generated):
    monkeypatch.setattr(manage, "_asks", lambda: True)
    called(folder, "rm", "--namespace", "one", "--samples", code=code, input=answer)
    assert ask(folder, "one", 4)[1] == generated


def test_what_was_removed_is_shown_by_stats(folder):
    before = json.loads(called(folder, "stats", "--json").stdout)
    told = json.loads(called(folder, "rm", "--namespace", "one", "--samples", "--yes", "--json").stdout)
    assert (told["draws"], told["samples"], told["unused"], told["done"]) == (1, 2, 0, True)
    assert told["cost"]["samples"] == 2
    after = json.loads(called(folder, "stats", "--json").stdout)
    [record] = after["removals"]
    assert (record["selected"]["command"], record["draws"], record["samples"]) == ("rm", 1, 2)
    assert {name: after[name] for name in ("spent", "billed", "saved", "unreported")} == {
        name: before[name] for name in ("spent", "billed", "saved", "unreported")
    }
    assert (before["wasted"]["samples"], after["wasted"]["samples"]) == (0, 2)
    assert "rm --namespace one --samples" in called(folder, "stats").stdout
    assert json.loads(called(folder, "verify", "--json").stdout)["whole"]


def test_only_unused_samples_are_pruned_without_draws(folder):
    called(folder, "rm", "--namespace", "one", "--yes")
    before = ask(folder, "two", 2)[0]
    told = json.loads(called(folder, "prune", "--older-than", "0s", "--yes", "--json").stdout)
    assert (told["draws"], told["samples"]) == (0, 2)
    assert ask(folder, "two", 2) == (before, 0)
    assert "has nothing to remove" in called(folder, "prune", "--yes").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rm"], "expected --namespace NAME, or --no-namespace"),
        (["rm", "--namespace", "x", "--no-namespace"], "expected --namespace NAME, or --no-namespace"),
        (["rm", "--namespace", "x"], "no draws of the namespace 'x'"),
        (["rm", "--no-namespace"], "no draws of requests without a namespace"),
        (["prune", "--older-than", "3x"], "such as 30d; got '3x'"),
        (["prune", "--larger-than", "-1"], "such as 10MB; got '-1'"),
        (["prune", "--draws"], "--draws needs at least one of"),
        (["discard", "k2/1", "--index", "2", "--why", "x"], "name two samples"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(folder, arguments, told):
    assert told in called(folder, *arguments, code=2).output


@pytest.mark.parametrize("command", [["rm", "--namespace", "x"], ["prune"], ["compact"]])
def test_a_server_is_refused_before_it_is_asked(command):
    done = CliRunner().invoke(cli, [*command, "--cache", "redis://localhost:1/0"])
    assert done.exit_code == 2
    assert "expected a cache in a folder; got the server" in done.output


def test_discard_takes_the_index_as_an_option(folder):
    told = json.loads(called(folder, "discard", "k2", "--index", "1", "--why", "bad", "--json").stdout)
    assert (told["discarded"], told["draws"]) == ([1], 2)


def test_samples_are_shown_side_by_side_on_a_terminal(folder, monkeypatch):
    assert "\n  #0  " in called(folder, "show", "k2").stdout
    monkeypatch.setattr(inspect, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = called(folder, "show", "k2").stdout.splitlines()
    assert [line.split() for line in lines if "#" in line and "generated" not in line] == [
        ["#0", "#1"],
        ["#2", "#3"],
    ]
    assert max(map(len, lines)) <= 80
    monkeypatch.setenv("COLUMNS", "60")
    assert "\n  #0  " in called(folder, "show", "k2").stdout


def test_compact_says_what_it_gave_back(folder):
    told = json.loads(called(folder, "compact", "--json").stdout)
    assert 0 < told["after"] <= told["before"]
    assert called(folder, "compact").stdout.splitlines()[1].startswith("before")
    assert ask(folder, "two", 2)[1] == 0


KILLED = """
import os, sys
import cachepipe
from cachepipe.stores import transaction
folder, when = sys.argv[1:]
erase = transaction.SqlLedger.erase
def killed(self, samples):
    if when == "after":
        erase(self, samples)
    os._exit(9)
transaction.SqlLedger.erase = killed
cachepipe.forget(folder, "one", samples=True)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_removal_that_is_killed_breaks_no_promise(folder, when):
    before = ask(folder, "two", 2)[0]
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), when], timeout=60, check=False)
    assert done.returncode == 9
    assert ask(folder, "two", 2) == (before, 0)
    assert verify(folder).problems.keys() == ({"discard"} if when == "after" else set())
    assert repair(folder).whole
    called(folder, "prune", "--yes")
    assert ask(folder, "two", 2) == (before, 0)
    with contextlib.closing(DiskStore(folder, read_only=True)) as store:
        assert store.totals()["samples"] == 2
    assert ask(folder, "one", 4)[1] == 2


def test_a_compaction_that_is_killed_leaves_the_cache_as_it_was(folder):
    code = (
        "import os, sys, sqlite3\nimport cachepipe\nfrom cachepipe.stores import disk\n"
        "connect = disk.DiskStore._connect\n"
        "def killed(self, name):\n"
        "    connection = connect(self, name)\n"
        "    connection.set_progress_handler(lambda: os._exit(9), 50)\n"
        "    return connection\n"
        "store = disk.DiskStore(sys.argv[1])\n"
        "disk.DiskStore._connect = killed\n"
        "store.compact()\n"
    )
    before = ask(folder, "two", 2)[0]
    done = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert done.returncode == 9
    assert verify(folder).whole
    assert ask(folder, "two", 2) == (before, 0)
