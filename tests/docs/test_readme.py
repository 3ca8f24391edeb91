"""What the README says is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cachepipe.testing import MockServer, MockSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert [name for name, _, _ in EXAMPLES] == [
        "one-import",
        "replicates",
        "completions",
        "two-uses",
        "own-model",
    ]
    assert README.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize(("code", "printed"), [pytest.param(c, p, id=name) for name, c, p in EXAMPLES])
def test_an_example_prints_what_the_readme_shows(code, printed, tmp_path):
    (tmp_path / "caches").mkdir()
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        environment = {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "none"}
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ran.stdout, ran.stderr, ran.returncode) == (printed, "", 0)


def test_every_command_of_the_readme_exists():
    ran = subprocess.run(
        [sys.executable, "-m", "cachepipe", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    [commands] = re.findall(r"## Commands\n\n```sh\n(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"^cachepipe ([\w-]+)", commands, re.MULTILINE))
    assert len(named) >= 7
    assert [name for name in named if not re.search(rf"^\s+{name}\b", ran.stdout, re.MULTILINE)] == []


def test_ci_calls_the_readmes_own_commands():
    script = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert [command for command in commands if command not in script] == []
