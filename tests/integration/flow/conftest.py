"""What the integration tests of services, sessions and telemetry share."""

from __future__ import annotations

import pytest

from cachepipe.testing import MockServer, MockSettings


@pytest.fixture
async def server():
    """A mock server on the loop of the test; its answers are short."""
    async with MockServer(MockSettings(seed=1, max_tokens=8)) as running:
        yield running
