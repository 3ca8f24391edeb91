"""What the README says is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import check_example, examples_of

from cachepipe.testing import MockServer, MockSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = examples_of(README)


def test_there_are_examples():
    assert [example.id for example in EXAMPLES] == [
        "one-import",
        "replicates",
        "completions",
        "two-uses",
        "own-model",
    ]
    assert README.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_prints_what_the_readme_shows(code, printed, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        check_example(code, printed, tmp_path, OPENAI_BASE_URL=server.base_url, OPENAI_API_KEY="none")


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
