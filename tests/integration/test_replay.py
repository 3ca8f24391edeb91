"""`cachepipe replay` runs programs with the real SDKs, without a key or a provider, from a bundle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import forked
import pytest
from offline import close_network

import cachepipe
from cachepipe.clients import Anthropic, OpenAI
from cachepipe.stores.bundles.reader import Bundle
from cachepipe.testing import MockServer, MockSettings

PLAIN = """
import sys
from openai import OpenAI

client = OpenAI()
for prompt in sys.argv[1:]:
    messages = [{"role": "user", "content": prompt}]
    answer = client.chat.completions.create(model="ngram-1", messages=messages)
    print(answer.choices[0].message.content)
"""
OWN = """
import sys
import cachepipe
from cachepipe.clients import OpenAI

with cachepipe.experiment("run-1", cache="caches/mine") as exp, OpenAI() as client:
    for prompt in sys.argv[1:]:
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(model="ngram-1", messages=messages)
        print(answer.choices[0].message.content)
print(len(exp.rows()), "rows")
"""
MESSAGES = """
from anthropic import Anthropic

messages = [{"role": "user", "content": "hi"}]
print(Anthropic().messages.create(model="ngram-1", max_tokens=20, messages=messages).content[0].text)
"""
STOPPED = """
import signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
signal.pause()
"""
PROMPTS = ("a", "a", "b")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle from a server that has ended, and what it answered."""
    folder = tmp_path_factory.mktemp("bundle")
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        options = {"cache": folder / "mine", "namespace": "run-1", "api_key": "x"}
        with OpenAI(base_url=server.base_url, **options) as client:
            texts = [
                client.chat.completions.create(
                    model="ngram-1", messages=[{"role": "user", "content": prompt}]
                )
                for prompt in PROMPTS
            ]
        with Anthropic(base_url=server.base_url.removesuffix("/v1"), **options) as client:
            messages = [{"role": "user", "content": "hi"}]
            text = client.messages.create(model="ngram-1", max_tokens=20, messages=messages).content[0].text
    cachepipe.export(folder / "mine", folder / "paper.cachepipe", namespaces=["run-1"], allow_secrets=True)
    return folder / "paper.cachepipe", [answer.choices[0].message.content for answer in texts], text


@pytest.fixture
def replay(bundle, tmp_path):
    """A function that replays a program in an empty folder, without keys and with the network closed."""
    closed, tried = close_network(tmp_path.with_name(f"{tmp_path.name}-guard"))

    def started(program, *arguments, options=(), files=()):
        hidden = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "CACHEPIPE_DIR")
        command = [
            sys.executable,
            "-m",
            "cachepipe",
            "replay",
            *options,
            bundle[0],
            *files,
            "--",
            *program,
            *arguments,
        ]
        return forked.Popen(
            [*map(str, command)],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name not in hidden} | closed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(program, *arguments, **how):
        process = started([sys.executable, "-c", program], *arguments, **how)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    run.started = started
    yield run
    assert tried.read_text() == ""


def test_a_program_of_a_plain_sdk_gets_the_same_answers(bundle, replay):
    code, out, err = replay(PLAIN, *PROMPTS)
    assert (code, out.split("\n")[:-1]) == (0, "\n".join(bundle[1]).split("\n")), err
    assert "all that was asked is in it" in err


def test_a_program_of_anthropics_sdk_gets_the_same_answers(bundle, replay):
    code, out, err = replay(MESSAGES)
    assert (code, out) == (0, f"{bundle[2]}\n"), err


def test_a_program_with_a_cache_of_its_own_gets_the_same_answers_and_writes_nothing(bundle, replay, tmp_path):
    code, out, err = replay(OWN, *PROMPTS)
    assert (code, out) == (0, "\n".join([*bundle[1], "4 rows\n"])), err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("program", [PLAIN, OWN])
def test_what_the_bundle_lacks_is_told_at_the_end(replay, program, tmp_path):
    code, out, err = replay(program, "something else", options=["--report", "report.json"])
    assert (code, out) == (1, "")
    assert "1 request asked for what " in err
    assert "  ngram-1: something else" in err
    report = json.loads((tmp_path / "report.json").read_text())
    (miss,) = report["misses"]
    told = {name: miss[name] for name in ("namespace", "model", "prompt", "times")}
    assert told == {"namespace": "run-1", "model": "ngram-1", "prompt": "something else", "times": 1}
    assert (report["exit_code"], report["refused"]) == (1, [])


@pytest.mark.parametrize("program", [PLAIN, OWN])
def test_several_bundles_and_folders_answer_together(bundle, replay, program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colleague")
    with MockServer.in_thread(MockSettings(seed=2)) as server:
        options = {"cache": folder / "theirs", "namespace": "run-1", "api_key": "x"}
        with OpenAI(base_url=server.base_url, **options) as client:
            messages = [{"role": "user", "content": "theirs"}]
            answer = client.chat.completions.create(model="ngram-1", messages=messages)
    # Both servers were on this machine, so the second cache is put under the scope of the first.
    cachepipe.export(folder / "theirs", folder / "theirs.cachepipe", allow_secrets=True)
    with contextlib.closing(Bundle(bundle[0])) as paper:
        scope = next(each for each in paper.manifest.scopes if each.endswith("/chat/completions"))
    cachepipe.import_(folder / "theirs.cachepipe", folder / "moved", scope=scope)
    code, out, err = replay(program, "a", "theirs", files=[folder / "moved"])
    lines = out.splitlines()
    assert (code, lines[:2]) == (0, [bundle[1][0], answer.choices[0].message.content]), err
    assert "Replayed from paper.cachepipe, moved: " in err
    if program == OWN:
        assert lines[2] == "5 rows"


def test_a_program_must_follow_the_files(replay):
    process = replay.started([])
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Put -- and the program to run after the files" in err) == (2, True)


def test_keys_of_the_environment_do_not_reach_the_program(replay, monkeypatch):
    monkeypatch.setenv("TOGETHER_API_KEY", "sk-secret")
    code, out, _ = replay("import os; print(os.environ['TOGETHER_API_KEY']); sys = os; os._exit(3)")
    assert (code, "secret" in out) == (3, False)


def test_signals_reach_the_program_and_its_exit_code_is_passed_on(replay):
    process = replay.started([sys.executable, "-c", STOPPED])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_a_program_that_does_not_exist_is_named(replay):
    process = replay.started(["no-such-program"])
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "no-such-program cannot be run" in err) == (127, True)


def test_a_file_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    command = [sys.executable, "-m", "cachepipe", "replay", str(tmp_path / "text"), "--", "true"]
    done = forked.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "is not a bundle" in done.stderr) == (2, True)
