"""The map of the code in docs/design.md points at files, tests and tables that exist."""

import re
from pathlib import Path

import pytest

from cachepipe.stores.tables import SCHEMA

ROOT = Path(__file__).parents[2]
DESIGN = (ROOT / "docs" / "design.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
ROWS = re.findall(r"^\| \*\*(C\d+)\*\* ([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", DESIGN, re.MULTILINE)
TESTS = re.findall(r"`([\w/]+\.py)::(\w+)`", DESIGN)


def test_each_clause_has_a_module_and_a_test():
    assert [clause for clause, *_ in ROWS] == [f"C{number}" for number in range(1, 13)]
    for clause, _, decided, _, held in ROWS:
        if "not implemented yet" not in decided:
            assert "`" in decided, clause
            assert "::test_" in held, clause


NAMED = {*re.findall(r"`([\w/]+(?:\.py|/))`", DESIGN)} - {"cachepipe/", "tests/"}


@pytest.mark.parametrize("path", sorted(NAMED))
def test_each_file_of_the_map_exists(path):
    assert (ROOT / "cachepipe" / path).exists() or (ROOT / "tests" / path).exists()


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_each_test_of_the_map_exists(path, name):
    assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE)


def test_each_table_of_the_ledger_is_described():
    [described] = re.findall(r"\| table of the ledger \|.*?\n\n", DESIGN, re.DOTALL)
    tables = re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", SCHEMA)
    assert sorted(re.findall(r"^\| `(\w+)` \|", described, re.MULTILINE)) == sorted(tables)


def test_the_glossary_defines_each_word_once_in_a_sentence():
    words = re.findall(r"^\| \*\*([\w ]+)\*\* \| [A-Z][^|]*\. \|$", GLOSSARY, re.MULTILINE)
    assert len(words) == len(set(words)) == GLOSSARY.count("\n| **")
