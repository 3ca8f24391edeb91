"""A plugin of pytest for google-genai's own tests: puts our client in the place of the SDK's.

`nox -s genai` runs the tests with the SDK's client and with ours, and compares the outcomes. Tests that need
Google's recordings, which are not published, are left out.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET  # of files that pytest has just written

import google.genai
import google.genai.client

from cachepipe.clients import Gemini
from cachepipe.stores import MemoryStore

PLAIN = "GOOGLE_GENAI_SUITE_PLAIN"
"""The environment variable that leaves the SDK's own client in place."""
made: list[int] = []


class CachedByDefault(Gemini):
    """Our client, with a cache of its own."""

    def __init__(self, **options):
        made.append(1)
        super().__init__(**{"cache": MemoryStore(), **options})


if not os.environ.get(PLAIN):
    google.genai.Client = google.genai.client.Client = CachedByDefault


def pytest_collection_modifyitems(items, config):
    """Leave out the tests whose fixture needs recordings."""
    recorded = [item for item in items if "client" in item.fixturenames]
    config.hook.pytest_deselected(items=recorded)
    items[:] = [item for item in items if item not in recorded]


def pytest_terminal_summary(terminalreporter):
    """Say how many cached clients the tests have made."""
    terminalreporter.write_line(f"cached clients: {len(made)}")


def outcomes(report):
    """Return the outcomes of a JUnit report by the names of the tests."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - as above
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.get("classname"), case.get("name")] = (kinds or ["passed"])[0]
    return found


def compare(plain, cached):
    """Return a line about two reports, and whether their outcomes are the same."""
    theirs, ours = outcomes(plain), outcomes(cached)
    differing = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    passed = [sum(kind == "passed" for kind in each.values()) for each in (theirs, ours)]
    line = f"passed: {passed[0]} of {len(theirs)} with the SDK's client, {passed[1]} of {len(ours)} with ours"
    return "\n".join([line, *(f"differs: {'::'.join(map(str, name))}" for name in differing)]), not differing


if __name__ == "__main__":
    told, same = compare(*sys.argv[1:])
    print(told)  # noqa: T201 - it is a script
    sys.exit(not same)
