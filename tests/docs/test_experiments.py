"""The walk-through of the page about experiments prints what the page shows, and its program is replayed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cachepipe.testing import MockServer, MockSettings

PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
URL = "http://localhost:8000/v1"


def example(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture
def walk(tmp_path):
    """A function that runs commands in one shell after another, and returns what they print."""
    (tmp_path / "experiment.py").write_text(example("program"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hidden = ("CACHEPIPE_DIR", "OPENAI_BASE_URL", "OPENAI_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"PATH": path}

    def run(url, *commands):
        script = "\n".join(["exec 2>&1", *commands]).replace(URL, url)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return done.stdout.replace(url, URL).splitlines()

    return run


def parts(name):
    lines = example(name).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return commands, [line for line in lines if not line.startswith("$ ")]


@pytest.mark.skipif(shutil.which("jq") is None, reason="the page uses jq to shorten what it prints")
def test_the_walk_through_prints_what_the_page_shows(walk):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        url = server.base_url
        commands, shown = parts("run")
        assert walk(url, example("setup"), *commands) == shown
    commands, shown = parts("replay")  # the provider has ended
    assert walk(url, example("setup"), *commands) == shown
    port = int(url.rpartition(":")[2].partition("/")[0])
    with MockServer.in_thread(MockSettings(seed=1), port=port):
        commands, shown = parts("merge")
        assert walk(url, example("setup"), "cd caches", *commands) == shown
