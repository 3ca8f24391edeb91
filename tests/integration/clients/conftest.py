"""What the tests of clients share."""

from __future__ import annotations

import pytest

from cachepipe.testing import MockServer, MockSettings


@pytest.fixture
def server():
    """A mock server in a thread of its own; its answers are short."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12)) as running:
        yield running
