"""OpenAI's client for Node, from npm, through the proxy: nothing is changed but the base URL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, in a folder where the client is installed."""
    if shutil.which("npm") is None and not os.environ.get("CI"):
        pytest.skip("needs node and npm, which the machine of the continuous integration has")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai@^6"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=110)
    return shutil.copy(PROGRAM, folder)


def test_the_client_for_node_works_and_a_rerun_asks_nothing(program, proxy, upstream):
    def run(label):
        told = {"OPENAI_BASE_URL": f"{proxy.url}/ns/node@{label}/v1", "OPENAI_API_KEY": "k"}
        done = subprocess.run(
            ["node", program],
            env={**os.environ, **told},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = run("1")
    made = upstream.stats.samples_generated
    assert first["status"] == "cachepipe; fwd=miss; stored"
    assert len(first["choices"]) == 2
    assert len(first["repeats"]) == 3
    assert first["embeddings"][0] == first["embeddings"][2] != first["embeddings"][1]
    assert first["errors"] == [["BadRequestError", 400], ["NotFoundError", 404]]
    again = run("2")
    assert again.pop("status") == "cachepipe; hit"
    del first["status"]
    assert again == first
    assert upstream.stats.samples_generated == made == 2 + 1 + 3 + 1 + 2
