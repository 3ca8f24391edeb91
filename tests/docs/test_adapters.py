"""The page about adapters: its examples print what it shows, and it names every hook."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, check_example, examples_of

from cachepipe.typedefs import ModelHooks

PAGE = (DOCS / "adapters.md").read_text()
EXAMPLES = examples_of(PAGE)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_prints_what_the_page_shows(code, printed, tmp_path):
    check_example(code, printed, tmp_path)


def test_the_page_names_every_hook_that_is_declared():
    assert PAGE.count("```python") == len(EXAMPLES) == 2
    declared = {name for name in vars(ModelHooks) if not name.startswith("_")} | {*ModelHooks.__annotations__}
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    assert named == declared | {"arrived"}
