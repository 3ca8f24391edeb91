"""The examples of the page about sharing print what the page says."""

from __future__ import annotations

from pages import Page

PAGE = Page("sharing.md")


def test_the_examples_print_what_the_page_shows(tmp_path):
    (tmp_path / "roll.py").write_text(PAGE.block("example: program"))
    PAGE.check(("export", "import", "layers", "commands", "merge"), tmp_path)
    assert PAGE.printed("python", tmp_path) == PAGE.block("prints: python")
