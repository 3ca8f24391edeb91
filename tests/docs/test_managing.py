"""The examples of the page about managing a cache print what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from pages import Page, path_of

PAGE = Page("managing.md")


def test_the_examples_print_what_the_page_shows(tmp_path):
    (tmp_path / "roll.py").write_text(PAGE.block("example: program"))
    env = {**os.environ, "PATH": path_of(tmp_path / "programs")}
    for name in ("discard", "rm", "prune", "compact"):
        commands, shown = PAGE.session(name)
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
        assert done.stdout.splitlines() == shown
    ran = subprocess.run(
        [sys.executable, "-c", PAGE.block("example: python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.sub("[0-9]+ bytes", "SIZE bytes", ran.stdout) == PAGE.block("prints: python")
