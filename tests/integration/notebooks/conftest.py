"""Kernels for tests of notebooks."""

from __future__ import annotations

import pytest
from kernels import Kernel


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """A function that returns a context of a kernel."""
    # A path of a socket has at most about 100 characters.
    return lambda: Kernel(tmp_path_factory.mktemp("k"))


@pytest.fixture(scope="session")
def shared_kernel(started):
    with started() as kernel:
        yield kernel


@pytest.fixture
def kernel(shared_kernel, tmp_path):
    """A kernel that several tests use, with the extension newly loaded, and a pipeline on an empty cache."""
    shared_kernel.reader = True
    shared_kernel.begin(tmp_path / "cache")
    yield shared_kernel
    shared_kernel.leave()
