"""`rm`, `prune`, `compact` and `discard` as a user meets them, also if they are killed."""

from __future__ import annotations

import asyncio
import json
import sys

import forked
import pytest
from click.testing import CliRunner

from cachepipe import OnlineAPI, Request, Response
from cachepipe.cli import inspect, manage
from cachepipe.cli.group import cli
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


def filled(cache):
    ask(cache, "one", 4)
    ask(cache, "two", 2)
    return cache


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path / "cache")


@pytest.fixture(params=["folder", "valkey", "postgres"])
def cache(request, tmp_path):
    """Give a cache in a folder, and on each server."""
    if request.param == "folder":
        return filled(tmp_path / "cache")
    return filled(request.getfixturevalue(f"new_{request.param}_url")())


def called(folder, *arguments, code=0, **more):
    done = CliRunner().invoke(cli, [*arguments, "--cache", str(folder)], **more)
    assert done.exit_code == code, done.output
    return done


def test_what_goes_is_said_and_nothing_goes_without_a_yes(cache):
    done = called(cache, "rm", "--namespace", "one", "--samples", code=2)
    assert "1 draw and 2 samples" in done.stdout
    assert "no terminal to ask on; give --yes" in done.stderr
    assert ask(cache, "one", 4)[1] == 0


@pytest.mark.parametrize(("answer", "code", "generated"), [("n\n", 2, 0), ("y\n", 0, 2)])
def test_a_terminal_is_asked(folder, monkeypatch, answer, code, generated):
    monkeypatch.setattr(manage, "_asks", lambda: True)
    called(folder, "rm", "--namespace", "one", "--samples", code=code, input=answer)
    assert ask(folder, "one", 4)[1] == generated


def test_what_was_removed_is_shown_by_stats(cache):
    before = json.loads(called(cache, "stats", "--json").stdout)
    told = json.loads(called(cache, "rm", "--namespace", "one", "--samples", "--yes", "--json").stdout)
    assert (told["draws"], told["samples"], told["unused"], told["done"]) == (1, 2, 0, True)
    assert told["cost"]["samples"] == 2
    after = json.loads(called(cache, "stats", "--json").stdout)
    [record] = after["removals"]
    assert (record["selected"]["command"], record["draws"], record["samples"]) == ("rm", 1, 2)
    assert {name: after[name] for name in ("spent", "billed", "saved", "unreported")} == {
        name: before[name] for name in ("spent", "billed", "saved", "unreported")
    }
    assert (before["wasted"]["samples"], after["wasted"]["samples"]) == (0, 2)
    assert "rm --namespace one --samples" in called(cache, "stats").stdout
    assert json.loads(called(cache, "verify", "--json").stdout)["whole"]


def test_only_unused_samples_are_pruned_without_draws(cache):
    called(cache, "rm", "--namespace", "one", "--yes")
    before = ask(cache, "two", 2)[0]
    told = json.loads(called(cache, "prune", "--older-than", "0s", "--yes", "--json").stdout)
    assert (told["draws"], told["samples"]) == (0, 2)
    assert ask(cache, "two", 2) == (before, 0)
    assert "has nothing to remove" in called(cache, "prune", "--yes").stdout


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


def test_discard_takes_the_index_as_an_option(cache):
    told = json.loads(called(cache, "discard", "k2", "--index", "1", "--why", "bad", "--json").stdout)
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


def test_compact_says_what_it_gave_back(cache):
    told = json.loads(called(cache, "compact", "--json").stdout)
    shown = called(cache, "compact").stdout
    if str(cache).startswith("valkey"):
        assert (told["before"], told["after"]) == (None, None)
        assert "the server frees at once what is deleted" in shown
    else:
        assert min(told["before"], told["after"]) > 0
        assert shown.splitlines()[1].startswith("before")
    assert ask(cache, "two", 2)[1] == 0


KILLED = """
import os, sys
import cachepipe
from cachepipe.stores import transaction
from cachepipe.stores.base import Erase
from cachepipe.stores.remote.store import RemoteStore
cache, when = sys.argv[1:]
erase, write = transaction.SqlLedger.erase, RemoteStore.write
def killed(self, samples):
    if when == "after":
        erase(self, samples)
    os._exit(9)
def killed_there(self, operations):
    if type(operations[0]) is not Erase:
        return write(self, operations)
    if when == "after":
        write(self, operations)
    os._exit(9)
transaction.SqlLedger.erase, RemoteStore.write = killed, killed_there
cachepipe.forget(cache, "one", samples=True)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_removal_that_is_killed_breaks_no_promise(cache, when):
    before = ask(cache, "two", 2)[0]
    place = f"{cache}&lease=0.3" if isinstance(cache, str) else str(cache)
    done = forked.run([sys.executable, "-c", KILLED, place, when], timeout=60, check=False)
    assert done.returncode == 9
    assert ask(cache, "two", 2) == (before, 0)
    found = json.loads(CliRunner().invoke(cli, ["verify", "--json", "--cache", str(cache)]).stdout)
    in_two_files = when == "after" and not isinstance(cache, str)
    assert [each["kind"] for each in found["problems"]] == ["discard"] * in_two_files
    assert json.loads(called(cache, "verify", "--repair", "--json").stdout)["whole"]
    called(cache, "prune", "--yes")
    assert ask(cache, "two", 2) == (before, 0)
    assert json.loads(called(cache, "stats", "--json").stdout)["samples"] == 2
    assert ask(cache, "one", 4)[1] == 2


KILLED_AT_A_QUESTION = """
import os, sys
import cachepipe
from cachepipe.stores import transaction
def killed(self, name):
    os._exit(9)
transaction.SqlLedger._delete = killed
cachepipe.prune(sys.argv[1], model="count", draws=True)
"""


def test_a_folder_whose_question_was_being_deleted_in_a_kill_is_whole_after_the_next_removal(folder):
    spent = json.loads(called(folder, "stats", "--json").stdout)["spent"]
    done = forked.run([sys.executable, "-c", KILLED_AT_A_QUESTION, str(folder)], timeout=60, check=False)
    assert done.returncode == 9
    told = json.loads(called(folder, "prune", "--yes", "--json").stdout)
    assert told["questions_deleted"] == 1
    after = json.loads(called(folder, "stats", "--json").stdout)
    assert (after["keys"], after["spent"]) == (0, spent)
    assert json.loads(called(folder, "verify", "--json").stdout)["whole"]
    assert ask(folder, "one", 4)[1] == 4


def test_a_question_of_which_nothing_is_left_is_told(cache):
    told = called(cache, "prune", "--draws", "--model", "count", "--yes").stdout
    assert "1 question; deleted too" in told
    assert json.loads(called(cache, "stats", "--json").stdout)["keys"] == 0
    assert "count" not in called(cache, "ls").stdout.replace(str(cache), "")


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
    done = forked.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert done.returncode == 9
    assert verify(folder).whole
    assert ask(folder, "two", 2) == (before, 0)
