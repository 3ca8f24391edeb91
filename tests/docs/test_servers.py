"""The examples of the page about caches on servers, on real servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
URL = "postgresql://lab@db.example:5432/lab?schema=team"


def example(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_the_program_prints_what_the_page_shows(new_postgres_url, tmp_path):
    url = new_postgres_url()
    (tmp_path / "roll.py").write_text(example("program").replace(URL, url))
    lines = example("session").splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands).replace(URL, url)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [line for line in lines if not line.startswith("$ ")]
