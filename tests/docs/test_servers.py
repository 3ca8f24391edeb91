"""The examples of the page about caches on servers, on real servers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import forked
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
URL = "postgresql://lab@db.example:5432/lab?schema=team"


def example(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize(
    ("kind", "session", "shown"),
    [("postgres", "session", URL), ("valkey", "valkey", "valkey://cache.example:6379/0?prefix=team")],
)
def test_the_program_prints_what_the_page_shows(request, tmp_path, kind, session, shown):
    url = request.getfixturevalue(f"new_{kind}_url")()
    (tmp_path / "roll.py").write_text(example("program").replace(URL, url))
    lines = example(session).splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands).replace(shown, url)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{forked.programs()}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    printed = [line for line in lines if not line.startswith("$ ")]
    assert done.stdout.splitlines() == [line.replace(shown, url) for line in printed]
