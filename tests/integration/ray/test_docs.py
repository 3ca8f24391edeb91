"""The example of the page about Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cachepipe.testing import MockServer, MockSettings

PAGE = (Path(__file__).parents[3] / "docs" / "ray.md").read_text()


def example(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.timeout(300)
def test_the_program_prints_what_the_page_shows(cluster, new_valkey_url, tmp_path):
    program = example("program").replace("valkey://cache.example:6379/0?prefix=team", new_valkey_url())
    shown = [line for line in example("session").splitlines() if not line.startswith("$ ")]
    assert len(shown) == 2
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        path = tmp_path / "describe.py"
        path.write_text(program.replace("http://model.example:8000/v1", server.base_url))
        for line in shown:
            done = subprocess.run(
                [sys.executable, path],
                env={**os.environ, "RAY_ADDRESS": cluster.address},
                capture_output=True,
                text=True,
                timeout=140,
                check=True,
            )
            assert done.stdout.splitlines()[-1] == line
