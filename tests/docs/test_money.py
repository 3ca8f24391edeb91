"""The commands of the page about money print what it shows; figures of tokens and keys may differ."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import forked
import pytest

from cachepipe.testing import MockServer, MockSettings

PAGE = (Path(__file__).parents[2] / "docs" / "money.md").read_text()
URL = "http://localhost:8000/v1"


def example(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


def plain(text):
    """Return the lines of a text without figures and keys, which depend on the machine."""
    text = re.sub(r"k2-[0-9a-f]+|\d[\d.,]*", "#", text)
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture(scope="module")
def server():
    with MockServer.in_thread(MockSettings(seed=1)) as running:
        yield running


def test_the_commands_print_what_the_page_shows(server, tmp_path):
    lines = "".join(map(example, ("plan", "budget", "stats", "explain"))).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    path = f"{forked.programs()}:{os.environ['PATH']}"
    hidden = ("CACHEPIPE_DIR", "OPENAI_BASE_URL")
    done = subprocess.run(
        ["bash", "-c", "\n".join([example("setup"), "exec 2>&1", *commands]).replace(URL, server.base_url)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in hidden} | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    shown = "\n".join(line for line in lines if not line.startswith("$ "))
    assert plain(done.stdout.replace(server.base_url, URL)) == plain(shown)
