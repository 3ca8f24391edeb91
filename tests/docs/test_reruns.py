"""The example of the page about reruns prints what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import forked

PAGE = (Path(__file__).parents[2] / "docs" / "reruns.md").read_text()


def block(mark, language):
    return re.search(rf"<!-- {mark} -->\n```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_the_example_prints_what_the_page_says(tmp_path):
    ran = forked.run(
        [sys.executable, "-c", block("example: race", "python")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout == block("prints: race", "text")
