"""What the tests of clients share."""

from __future__ import annotations

import ssl

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_certificates():
    """Let no client load the world's certificates, 30 ms each: the servers here speak plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
        yield
