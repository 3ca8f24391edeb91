"""The example of the page about Gemini prints what the page says."""

from __future__ import annotations

import pytest
from pages import DOCS, check_example, examples_of

from cachepipe.testing import MockServer, MockSettings


@pytest.mark.parametrize(("code", "printed"), examples_of((DOCS / "gemini.md").read_text()))
def test_the_example_prints_what_the_page_shows(code, printed, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12)) as server:
        check_example(
            code, printed, tmp_path, GOOGLE_GEMINI_BASE_URL=server.url, GEMINI_API_KEY="k", GOOGLE_API_KEY=""
        )
