"""The page about adapters: its examples print what it shows, and it names every hook."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cachepipe.typedefs import ModelHooks

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
EXAMPLES = re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), [pytest.param(c, p, id=name) for name, c, p in EXAMPLES])
def test_an_example_prints_what_the_page_shows(code, printed, tmp_path):
    (tmp_path / "caches").mkdir()
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == (printed, "", 0)


def test_the_page_names_every_hook_that_is_declared():
    assert PAGE.count("```python") == len(EXAMPLES) == 2
    declared = {name for name in vars(ModelHooks) if not name.startswith("_")} | {*ModelHooks.__annotations__}
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert named == declared | {"arrived"}
