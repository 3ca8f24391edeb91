"""Forked processes share their parent's cache."""

from __future__ import annotations

import asyncio
import os
import sys

import forked
import pytest
from click.testing import CliRunner

from cachepipe import OnlineAPI, Request
from cachepipe.cli.group import cli
from cachepipe.testing import ScriptedModel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


def script(text, *arguments):
    """Run a program of its own, so that no thread of the tests is forked."""
    done = forked.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(params=["folder", "valkey", "postgres"])
def cache(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path)
    return request.getfixturevalue(f"new_{request.param}_url")()


FORKED = """
import asyncio, os, signal, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([request.prompt] * request.n)

def ask(prompt):
    return asyncio.run(pipeline.request(Request(prompt))).data

pipeline = OnlineAPI(Model(), sys.argv[1], scope="s")
ask("w")
begun, closed = os.pipe(), os.pipe()
child = os.fork()
if not child:
    ask("c1")
    os.write(begun[1], b"x")
    os.read(closed[0], 1)
    assert ask("c2") == ["c2"]
    os.kill(os.getpid(), signal.SIGKILL)
os.read(begun[0], 1)
asyncio.run(pipeline.close())
os.write(closed[1], b"x")
os.waitpid(child, 0)
"""


def test_c7_samples_of_a_forked_child_survive_its_parent_s_close_and_its_own_kill(cache):
    script(FORKED, cache)
    pipeline = OnlineAPI(ScriptedModel(), cache, scope="s")
    asked = {prompt: pipeline.key(Request(prompt)) for prompt in ("w", "c1", "c2")}
    assert {prompt: len(list(pipeline.store.samples(key))) for prompt, key in asked.items()} == {
        "w": 1,
        "c1": 1,
        "c2": 1,
    }
    asyncio.run(pipeline.close())
    assert CliRunner().invoke(cli, ["verify", "--cache", cache]).exit_code == 0


IN_RUN = """
import asyncio, os, sys
import cachepipe
from cachepipe import OnlineAPI, Request, Response

class Model:
    async def request(self, request):
        return Response([f"x{number}" for number in range(request.n)])

def ask(tag):
    print(tag, *asyncio.run(pipeline.request(Request("p"))).indices, flush=True)

def forked(tag):
    child = os.fork()
    if not child:
        ask(tag)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

pipeline = OnlineAPI(Model(), sys.argv[1])
ask("parent")
forked("child")
with cachepipe.run():
    ask("parent in run")
    forked("child in run")
"""


def test_c2_a_child_forked_inside_a_run_is_another_run(cache):
    assert script(IN_RUN, cache) == ["parent 0", "child 0", "parent in run 0", "child in run 0"]
