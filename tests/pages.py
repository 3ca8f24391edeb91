"""Pages of docs/, whose examples tests run in a shell, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest

DOCS = Path(__file__).parents[1] / "docs"
_JQ = """\
import json, sys
import jq
for value in jq.compile(sys.argv[-1]).input_text(sys.stdin.read()):
    print(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
"""


def examples_of(text):
    """Return the examples of a page that print something, as parameters: the code, and what it prints."""
    found = re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    return [pytest.param(code, printed, id=name) for name, code, printed in found]


def check_example(code, printed, folder, **environment):
    """Run an example in a folder; it prints what the page shows, and warns of nothing."""
    (folder / "caches").mkdir()
    ran = forked.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == (printed, "", 0)


class Page:
    """A page of docs/.

    Args:
        name: the name of its file.
    """

    def __init__(self, name):
        self._text = (DOCS / name).read_text(encoding="utf-8")

    def block(self, mark):
        """Return the text of the block of code that follows a comment."""
        return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)^```$", self._text, re.DOTALL | re.MULTILINE)[1]

    def session(self, name):
        """Return the commands of an example, and the lines that they print all together."""
        lines = self.block(f"example: {name}").splitlines()
        commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return commands, [line for line in lines if not line.startswith("$ ")]

    def check(self, names, folder):
        """Run examples in a folder; each prints what the page shows, and nothing else."""
        env = {**os.environ, "PATH": path_of(folder / "programs")}
        for name in names:
            commands, shown = self.session(name)
            done = _ran(["bash", "-ec", "\n".join(commands)], folder, env)
            told = done.stderr.replace("Warning: ", "")
            assert (done.returncode, told) == (0, ""), told
            assert done.stdout.splitlines() == shown

    def printed(self, name, folder):
        """Run a Python example in a folder; return what it prints."""
        command = [sys.executable, "-c", self.block(f"example: {name}")]
        done = forked.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


def _ran(command, folder, env=None):
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def path_of(folder):
    """Return a PATH of this environment's programs, and of a jq in the folder: not every machine has one."""
    folder.mkdir()
    jq = folder / "jq"
    jq.write_text(f"#!{sys.executable}\n{_JQ}")
    jq.chmod(0o755)
    return os.pathsep.join([str(folder), str(forked.programs()), os.environ["PATH"]])
