"""The examples of the page about managing a cache print what the page says."""

from __future__ import annotations

import re

from pages import Page

PAGE = Page("managing.md")


def test_the_examples_print_what_the_page_shows(tmp_path):
    (tmp_path / "roll.py").write_text(PAGE.block("example: program"))
    PAGE.check(("discard", "rm", "prune", "compact"), tmp_path)
    printed = re.sub("[0-9]+ bytes", "SIZE bytes", PAGE.printed("python", tmp_path))
    assert printed == PAGE.block("prints: python")
