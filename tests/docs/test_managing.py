"""The examples of the page about managing a cache print what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "managing.md").read_text()


def block(mark):
    return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.skipif(shutil.which("jq") is None, reason="the page uses jq to shorten what it prints")
def test_the_examples_print_what_the_page_shows(tmp_path):
    (tmp_path / "roll.py").write_text(block("example: program"))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("discard", "rm", "prune", "compact"):
        lines = block(f"example: {name}").splitlines()
        commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        done = subprocess.run(
            ["bash", "-ec", "\n".join(commands)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        told = done.stderr.replace("Warning: ", "")
        assert not told, told
        assert done.stdout.splitlines() == [line for line in lines if not line.startswith("$ ")]
    ran = subprocess.run(
        [sys.executable, "-c", block("example: python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.sub("[0-9]+ bytes", "SIZE bytes", ran.stdout) == block("prints: python")
