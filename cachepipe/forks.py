"""Counts forks, so that objects which must not cross a fork can detect one without a system call."""

from __future__ import annotations

import os

count = 0
"""The number of forks between this process and the one that first imported this module."""


def _after_fork() -> None:
    global count  # noqa: PLW0603 - this is the place that keeps it
    count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
