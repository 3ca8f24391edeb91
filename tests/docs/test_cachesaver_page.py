"""The page for users of CacheSaver: its example prints what it shows, and the names in its table exist."""

from __future__ import annotations

import importlib
import re

import pytest
from pages import DOCS, check_example, examples_of

from cachepipe.testing import MockServer, MockSettings

PAGE = (DOCS / "cachesaver.md").read_text()


@pytest.mark.parametrize(("code", "printed"), examples_of(PAGE))
def test_an_example_prints_what_the_page_shows(code, printed, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        check_example(code, printed, tmp_path, OPENAI_BASE_URL=server.base_url, OPENAI_API_KEY="none")


def test_the_names_that_stay_the_same_are_there():
    rows = re.findall(r"^\| (`.*?) \| the same", PAGE, re.MULTILINE)
    modules = ("models.openai", "pipelines", "caching", "deduplicator", "batching", "reordering", "typedefs")
    there = {
        name
        for module in modules
        for name in vars(importlib.import_module(f"cachepipe.compat.cachesaver.{module}"))
    }
    named = {name for row in rows for name in re.findall(r"\b([A-Z]\w+(?:API|AI|er)|Request)\b", row)}
    assert len(named) == 8
    assert named <= there
