"""What the tests of clients share."""

from __future__ import annotations

import ssl

import pytest

from cachepipe.testing import MockServer, MockSettings


@pytest.fixture(scope="session", autouse=True)
def no_certificates():
    """Let no client load the world's certificates, 30 ms each: the servers here speak plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
        yield


@pytest.fixture
def server():
    """A mock server in a thread of its own; its answers are short."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12)) as running:
        yield running
