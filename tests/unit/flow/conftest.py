"""What the unit tests of limits and stages share."""

from __future__ import annotations

import pytest

from cachepipe.testing import FakeClock


@pytest.fixture
def clock():
    """A clock that a test moves by hand."""
    return FakeClock()
