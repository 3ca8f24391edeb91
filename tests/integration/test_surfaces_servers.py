"""C10 on a server: a sample that one surface has stored is a hit on every other."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import cachepipe
from cachepipe.cli.group import cli
from cachepipe.clients import OpenAI
from cachepipe.testing import MockServer

MESSAGES = [{"role": "user", "content": "Which city is the capital of France?"}]


@pytest.fixture
def server():
    with MockServer.in_thread() as started:
        yield started


def asked(client, **more):
    return client.chat.completions.create(model="m", messages=MESSAGES, **more)


def test_c10_a_sample_on_a_server_is_a_hit_on_every_surface(server, new_valkey_url, tmp_path, monkeypatch):
    url, base = new_valkey_url(), server.base_url
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with OpenAI(cache=url, base_url=base, api_key="x", namespace="a") as client:
        first = asked(client)
        assert cachepipe.info(first).cached == (False,)
    with OpenAI(cache=url, base_url=base, api_key="x", namespace="a") as client:
        again = asked(client)
        assert cachepipe.info(again).cached == (True,)
        streamed = asked(client, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert again.choices[0].message.content == first.choices[0].message.content
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": MESSAGES, "model": "m"}) + "\n")
    files = [str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    options = ["--cache", url, "--base-url", base, "--namespace", "b"]
    done = CliRunner().invoke(cli, ["run", *files, *options])
    assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(cli, ["ls", "--json", "--cache", url])
    assert [json.loads(line)["samples"] for line in listed.output.splitlines()] == [2]
