"""The walk-through of the page about experiments prints what the page shows, and its program is replayed."""

from __future__ import annotations

import os
import subprocess

import pytest
from offline import close_network
from pages import Page, path_of

from cachepipe.testing import MockServer, MockSettings

PAGE = Page("experiments.md")
URL = "http://localhost:8000/v1"
ELSEWHERE = "python -c 'import socket; socket.create_connection((\"192.0.2.1\", 80))'"


@pytest.fixture
def walk(tmp_path):
    """A function that runs commands in one shell after another, and returns what they print."""
    (tmp_path / "experiment.py").write_text(PAGE.block("example: program"))
    hidden = ("CACHEPIPE_DIR", "OPENAI_BASE_URL", "OPENAI_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "PATH": path_of(tmp_path / "programs")
    }

    def run(url, *commands, **more):
        script = "\n".join(["exec 2>&1", *commands]).replace(URL, url)
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=env | more,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return done.stdout.replace(url, URL).splitlines()

    return run


def test_the_walk_through_prints_what_the_page_shows(walk, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        url = server.base_url
        commands, shown = PAGE.session("run")
        assert walk(url, PAGE.block("example: setup"), *commands) == shown
    commands, shown = PAGE.session("replay")  # the provider has ended, and the network is closed
    closed, tried = close_network(tmp_path / "guard")
    assert walk(url, PAGE.block("example: setup"), *commands, **closed) == shown
    assert tried.read_text() == ""
    assert "ConnectionRefusedError: the network is closed" in walk(url, ELSEWHERE, **closed)[-1]
    assert tried.read_text() == "socket.getaddrinfo 192.0.2.1\n"
    port = int(url.rpartition(":")[2].partition("/")[0])
    with MockServer.in_thread(MockSettings(seed=1), port=port):
        commands, shown = PAGE.session("merge")
        assert walk(url, PAGE.block("example: setup"), "cd caches", *commands) == shown
    commands, shown = PAGE.session("prune")
    assert walk(url, *commands, **closed) == shown
    assert tried.read_text() == "socket.getaddrinfo 192.0.2.1\n"
