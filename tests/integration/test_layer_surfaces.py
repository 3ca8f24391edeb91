"""Layers on every surface (C10): clients, proxy and commands answer from a bundle below a cache."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

import cachepipe
from cachepipe.cli.group import cli
from cachepipe.cli.serve import remembered
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream, from_file
from cachepipe.sharing import export
from cachepipe.stores import DiskStore

pytestmark = pytest.mark.usefixtures("environment")

OLD, NEW = "Which city is the capital of France?", "Which one is that of Peru?"


def body(text):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


@pytest.fixture(params=["bundle", "folder"])
def paper(request, environment):
    """What is only read, as a command takes it, and its answer to the old question."""
    with OpenAI(cache="paper", namespace="paper") as client:
        answer = client.chat.completions.create(**body(OLD)).choices[0].message.content
    if request.param == "folder":
        return "paper", answer
    export("paper", "paper.cachepipe", allow_secrets=True)
    return "paper.cachepipe", answer


def command(*arguments, code=0):
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == code, done.output
    return done.stdout


def stored():
    """The number of questions in the upper cache."""
    store = DiskStore("mine", read_only=True)
    try:
        return store.totals()["keys"]
    finally:
        store.close()


def test_c10_a_synchronous_client_answers_from_the_lower_layer_and_writes_to_the_upper_one(paper, server):
    below, answer = paper
    before = server.stats.requests
    with OpenAI(cache=["mine", below], namespace="paper") as client:
        old, new = (client.chat.completions.create(**body(text)) for text in (OLD, NEW))
        streamed = client.with_options().chat.completions.create(**body(NEW), stream=True)
        assert [chunk for chunk in streamed if chunk.choices]
    assert (old.choices[0].message.content, server.stats.requests) == (answer, before + 2)
    assert cachepipe.info(old).cached == (True,)
    assert cachepipe.info(new).cached == (False,)
    assert stored() == 2
    with OpenAI(cache="mine", namespace="paper", mode="replay") as client:
        assert client.chat.completions.create(**body(OLD)) == old


@pytest.mark.anyio
async def test_c10_an_asynchronous_client_answers_from_the_lower_layer(paper, server):
    below, answer = paper
    before = server.stats.requests
    async with AsyncOpenAI(cache=["mine", below], namespace="paper") as client:
        old = await client.chat.completions.create(**body(OLD))
        again = await client.chat.completions.create(**body(OLD))
    assert old.choices[0].message.content == answer
    assert [cachepipe.info(each).cached for each in (old, again)] == [(True,), (False,)]
    assert server.stats.requests == before + 1


def test_c10_a_proxy_answers_from_the_lower_layer(paper, server):
    below, answer = paper
    before = server.stats.requests
    upstream = Upstream.of("mock", server.base_url)
    settings = ProxySettings(port=0, upstreams=(upstream,), cache=["mine", below], log="off")
    with running(settings) as proxy, httpx2.Client(base_url=proxy.url) as http:
        old, new, again = (
            http.post(f"/ns/paper{run}/v1/chat/completions", json=body(text))
            for run, text in (("", OLD), ("", NEW), ("@again", OLD))
        )
        where = http.get("/cachepipe").json()["cache"]
    assert old.json()["choices"][0]["message"]["content"] == answer
    assert (new.status_code, again.content) == (200, old.content)
    assert server.stats.requests == before + 1
    assert where.endswith(below)
    assert "mine" in where
    assert stored() == 2


def test_c10_run_plan_and_explain_read_layers(paper, server):
    below, answer = paper
    lines = [json.dumps({"custom_id": text[-6:], **body(text)}) for text in (OLD, NEW)]
    Path("in.jsonl").write_text("\n".join(lines))
    asked = ["in.jsonl", "--namespace", "paper"]
    layers = ["--cache", "mine", "--cache", below]
    before = server.stats.requests
    plan = json.loads(command("plan", *asked, *layers, "--json"))
    assert (plan["hits"], plan["misses"]) == (1, 1)
    [found] = json.loads(command("explain", *asked, "--line", "1", *layers, "--json"))
    assert (found["outcome"], len(found["drawn"])) == ("hit", 1)
    assert server.stats.requests == before
    done = json.loads(command("run", *asked, *layers, "-o", "out.jsonl", "--json", "--quiet"))
    assert (done["hits"], done["misses"], server.stats.requests) == (1, 1, before + 1)
    first, _ = Path("out.jsonl").read_text().splitlines()
    result = json.loads(first)["response"]["body"]
    assert result["choices"][0]["message"]["content"] == answer
    again = json.loads(command("run", *asked, *layers, "--replay", "-o", "again.jsonl", "--json", "--quiet"))
    assert (again["hits"], again["misses"]) == (2, 0)


def test_a_run_replays_from_a_bundle_without_an_upper_cache_or_a_key(paper, monkeypatch):
    below, _ = paper
    monkeypatch.delenv("OPENAI_API_KEY")
    Path("in.jsonl").write_text(json.dumps(body(OLD)))
    asked = ["run", "in.jsonl", "--namespace", "paper", "--replay", "--json", "--quiet", "-o", "out.jsonl"]
    for layers in (["--cache", below], ["--cache", "nothing", "--cache", below]):
        assert json.loads(command(*asked, *layers))["hits"] == 1


def test_the_command_that_continues_names_all_layers(paper):
    below, _ = paper
    Path("in.jsonl").write_text(json.dumps(body(NEW)))
    layers = ["--cache", "mine", "--cache", below]
    done = CliRunner().invoke(cli, ["run", "in.jsonl", "-o", "out.jsonl", "--replay", *layers])
    assert done.exit_code == 1
    assert f"cachepipe run in.jsonl -o out.jsonl --cache mine --cache {below}" in done.output.replace(
        "cli ", "cachepipe "
    )


def test_the_question_under_another_scope_is_found_in_any_layer(paper):
    below, _ = paper
    Path("in.jsonl").write_text(json.dumps(body(OLD)))
    elsewhere = ["--base-url", "http://localhost:9/v1", "--cache", "mine", "--cache", below]
    [found] = json.loads(command("explain", "in.jsonl", *elsewhere, "--json"))
    assert (found["outcome"], found["differences"][0]["kind"]) == ("miss", "host")


def test_a_replaying_proxy_takes_its_upstreams_from_all_layers(paper, server, tmp_path):
    below, _ = paper
    (tmp_path / "proxy.toml").write_text(f'cache = ["nothing", "{below}"]\nreplay = true\n')
    settings = from_file(tmp_path / "proxy.toml")
    assert settings.cache == ["nothing", below]
    [upstream] = remembered(settings.cache)
    assert upstream.url == server.base_url


def test_commands_that_read_open_a_bundle(paper):
    below, _ = paper
    at = ["--cache", below]
    [listed] = [json.loads(line) for line in command("ls", *at, "--json").splitlines()]
    assert (listed["prompt"], listed["samples"]) == (OLD, 1)
    shown = json.loads(command("show", listed["key"][:12], *at, "--json"))
    assert [draw["namespace"] for draw in shown["draws"]] == ["paper"]
    figures = json.loads(command("stats", *at, "--json"))
    assert (figures["folder"].endswith(below), figures["samples"]) == (True, 1)
    checked = json.loads(command("verify", *at, "--json"))
    assert (checked["whole"], checked["checked"]["samples"]) == (True, 1)
    assert json.loads(command("path", *at, "--json"))["exists"] is True
    assert command("export", *at, "-o", "copy.cachepipe", "--allow-secrets")


def test_a_damaged_bundle_is_found_and_not_repaired(server, tmp_path):
    with OpenAI(cache="paper", namespace="paper") as client:
        client.chat.completions.create(**body(OLD))
    export("paper", "paper.cachepipe", allow_secrets=True)
    bundle = tmp_path / "paper.cachepipe"
    content = bytearray(bundle.read_bytes())
    content[40] ^= 1
    bundle.write_bytes(content)
    at = ["--cache", "paper.cachepipe"]
    found = json.loads(command("verify", *at, "--json", code=1))
    assert [problem["kind"] for problem in found["problems"]] == ["bundle"]
    for refused in (["verify", "--repair"], ["discard", "k2", "--why", "x"]):
        done = CliRunner().invoke(cli, [*refused, *at])
        assert (done.exit_code, "is a bundle, which is only read" in done.stderr) == (2, True)
    missing = CliRunner().invoke(cli, ["verify", "--cache", "other.cachepipe"])
    assert (missing.exit_code, "cannot be read: No such file" in missing.stderr) == (2, True)


@pytest.mark.parametrize("name", ["ls", "stats", "verify", "path"])
def test_a_command_without_layers_refuses_two_caches(name):
    done = CliRunner().invoke(cli, [name, "--cache", "a", "--cache", "b"])
    assert (done.exit_code, "takes one cache; got 2: a, b" in done.stderr) == (2, True)
