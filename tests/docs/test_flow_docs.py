"""The examples of the page about flow control and sessions, from top to bottom, as a notebook runs them."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from pathlib import Path

import forked

import cachepipe
from cachepipe.services import LimitOptions
from cachepipe.testing import MockServer, MockSettings

PAGE = (Path(__file__).parents[2] / "docs" / "flow.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
NOTEBOOK = """
import ast, asyncio, inspect, json, sys, urllib.request

async def run():
    names = {}
    for number, code in enumerate(json.load(sys.stdin)):
        compiled = compile(code, f"example {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(compiled, names)
        if inspect.iscoroutine(result):
            await result
    print(json.dumps([names["step1"], names["step2"], names["outs"]]))

asyncio.run(run())
"""


def notebook(server, folder, examples):
    (folder / "caches").mkdir(exist_ok=True)
    environment = {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "none"}
    ran = forked.run(
        [sys.executable, "-c", NOTEBOOK],
        input=json.dumps(examples),
        cwd=folder,
        env={**environment, "CACHEPIPE_DIR": str(folder / "caches")},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (ran.stderr.partition(";")[0], ran.returncode) == (
        "no model is named, so gpt-4-1106-preview is asked",
        0,
    )
    assert ran.stderr.count("\n") == 1, "once, however many sessions there are"
    return json.loads(ran.stdout)


def test_the_examples_run_and_rerun_without_a_call_and_the_last_keeps_to_its_limit(tmp_path):
    assert len(EXAMPLES) >= 6
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=4)) as server:
        first = notebook(server, tmp_path, EXAMPLES)
        assert [len(out) for out in first[2]] == [2] * 10
        # Two steps of ten scenarios, at the end; equal questions of one run get samples of their own.
        limited = sorted(entry.time for entry in server.stats.log)[-20:]
        assert all(later - earlier >= 1 for earlier, later in zip(limited, limited[5:], strict=False))
        calls = server.stats.requests
        assert calls == 1 + 2 + 20 + 20
        assert notebook(server, tmp_path, EXAMPLES) == first
        assert server.stats.requests == calls


def test_every_name_of_the_table_is_a_parameter():
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)))
    parameters = {*inspect.signature(cachepipe.Service).parameters, *LimitOptions.__annotations__}
    assert len(named) >= 11
    assert [name for name in named if name not in parameters] == []
