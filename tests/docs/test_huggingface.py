"""The page about Hugging Face: its examples print what it shows."""

from __future__ import annotations

import pytest
from pages import DOCS, check_example, examples_of

from cachepipe.testing import MockServer, MockSettings


@pytest.mark.parametrize(("code", "printed"), examples_of((DOCS / "huggingface.md").read_text()))
def test_an_example_prints_what_the_page_shows(code, printed, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        check_example(code, printed, tmp_path, ENDPOINT=server.url)
        assert server.stats.requests == 4
