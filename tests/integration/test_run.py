"""`cachepipe run` against the mock server, through the real openai client, and in real processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import termios
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import forked
import pytest
from click.testing import CliRunner
from profiles import sized

from cachepipe import DiskStore
from cachepipe.cli.group import cli
from cachepipe.clients import OpenAI
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.server import Fault

HUMANEVAL = files("cachepipe.testing") / "data" / "humaneval.jsonl"
KEY = "sk-never-to-be-seen"
N = 5
PROMPTS = sized(60, 164)
"""How many of HumanEval's prompts most tests take."""
ALL = PROMPTS * N


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1)) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A folder of the test's own, and an API key."""
    for name in ("OPENAI_BASE_URL", "CACHEPIPE_DIR", "CACHEPIPE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)


def options(server, **more):
    """The command's arguments for HumanEval prompts; an option that is None is left out."""
    values = {
        "output": "out.jsonl",
        "model": "ngram-1",
        "base-url": server.base_url,
        "n": N,
        "namespace": "a",
        "concurrency": 8,
        "cache": "cache",
        "limit": None if "requests" in more else PROMPTS,
        "retries": 0,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    source = values.pop("requests", str(HUMANEVAL))
    words = [str(source)]
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += ["-o" if name == "output" else f"--{name}", str(value)]
    return words


def invoke(words):
    """Run the command in this process."""
    done = CliRunner().invoke(cli, ["run", *words], prog_name="cachepipe")
    assert "Traceback" not in done.output
    return done


def called(server, status=0, **more):
    """Run the command in this process; return its figures."""
    done = invoke([*options(server, **more), "--json", "--quiet"])
    assert done.exit_code == status, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])


def refused(server, **more):
    """Run the command in this process, which must refuse to begin; return what it said."""
    done = invoke(options(server, **more))
    assert done.exit_code == 2, done.output
    assert server.stats.requests == 0
    return " ".join(done.stderr.split())


def test_c1_each_replicate_has_samples_of_its_own(server):
    for replicate, generated in ((None, True), (1, True), (2, True), (1, False)):
        figures = called(server, replicate=replicate, limit=2, n=1)
        assert (figures["generated"], figures["hits"]) == ((2, 0) if generated else (0, 2))


def test_replicates_run_each_line_once_per_replicate_and_all_of_them_are_counted(server):
    done = invoke([*options(server, replicates=3, limit=2, n=1), "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert (figures["requests"], figures["done"], figures["generated"]) == (6, 6, 6)
    assert re.search(r"^requests +6$", done.stderr, re.MULTILINE)
    whole = results()
    assert [line["cachepipe"]["replicate"] for line in whole] == [0, 1, 2, 0, 1, 2]
    assert called(server, replicate="1", limit=2, n=1)["hits"] == 2
    one = results()
    assert [line["cachepipe"]["replicate"] for line in one] == [1, 1]
    assert [line["response"] for line in one] == [line["response"] for line in whole[1::3]]
    assert called(server, replicates=3, limit=2, n=1, namespace="b")["hits"] == 6
    assert called(server, replicate="01", limit=2, n=1)["hits"] == 0
    assert {line["cachepipe"]["replicate"] for line in results()} == {"01"}


def test_one_replicate_and_their_number_exclude_each_other(server):
    assert "give only one" in refused(server, replicate=1, replicates=3)
    assert "the same samples in all replicates" in refused(server, repeat="same", replicates=3)


@contextlib.contextmanager
def started(words):
    """The command in a process of its own."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # we may ignore it
    begun = f"{heard}; from cachepipe.cli import main; main()"
    command = [sys.executable, "-c", begun, "run", *words]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def said(process, text):
    """Read the process's standard error up to a line that holds a text."""
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text!r}")


def write(name, lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(name).write_text("".join(f"{text}\n" for text in texts))
    return name


def results(name="out.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def names():
    """What the folder of the test holds."""
    return sorted(path.name for path in Path().iterdir())


def contents(folder):
    """The bytes of each file in a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def texts(line):
    return [choice["message"]["content"] for choice in line["response"]["body"]["choices"]]


def stored(folder="cache"):
    """The samples of a cache: per key, their texts by index."""
    store = DiskStore(folder, read_only=True)
    try:
        return {
            info.key: {
                sample.index: json.loads(sample.payload[sample.payload.index(b"{") :])["choices"][0][
                    "message"
                ]["content"]
                for sample in store.samples(info.key)
            }
            for info in store.keys()  # noqa: SIM118 - a store is no mapping
        }
    finally:
        store.close()


def pause(server, *, paused=True):
    server.settings = replace(server.settings, paused=paused)


# The main job.


def test_all_humaneval_prompts_are_answered_once_and_a_new_namespace_costs_nothing(server):
    every = 164 * N
    first = called(server, limit=None)
    assert (first["requests"], first["calls"]) == (164, 164)
    assert first["misses"] == first["generated"] == every
    assert server.stats.samples_generated == every
    lines = results()
    with HUMANEVAL.open() as file:
        prompts = [json.loads(line) for line in file]
    assert [line["custom_id"] for line in lines] == [prompt["task_id"] for prompt in prompts]
    assert [line["entry_point"] for line in lines] == [prompt["entry_point"] for prompt in prompts]
    assert all(line["cachepipe"]["cached"] == [False] * N for line in lines)
    assert all(line["cachepipe"]["duplicated"] == [False, *[True] * (N - 1)] for line in lines)
    for line in lines:
        assert line["error"] is None
        assert [choice["index"] for choice in line["response"]["body"]["choices"]] == list(range(N))
    server.stats.reset()
    second = called(server, limit=None, namespace="b", output="b.jsonl")
    assert (second["calls"], second["generated"], second["hits"]) == (0, 0, every)
    assert server.stats.requests == 0
    again = results("b.jsonl")
    for line in again:
        assert line["cachepipe"].pop("cached") == [True] * N
        del line["id"]
    for line in lines:
        line["cachepipe"].pop("cached")
        del line["id"]
    assert again == lines
    larger = called(server, limit=None, n=7)
    assert (larger["hits"], larger["generated"], server.stats.samples_generated) == (every, 164 * 2, 164 * 2)


@pytest.mark.parametrize("share", sized([0.5], [0.1, 0.5, 0.9]))
def test_c7_a_run_that_was_killed_is_resumed_by_running_it_again(server, share):
    words = options(server)
    with started(words) as process:
        server.wait_until(lambda stats: stats.samples_delivered >= share * ALL, 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = stored()
    assert not Path("out.jsonl").exists()
    figures = called(server)
    assert figures["failed"] == 0
    assert server.stats.samples_generated <= ALL + 8 * N
    assert figures["hits"] >= sum(map(len, before.values())) > 0
    after = {line["cachepipe"]["key"]: texts(line) for line in results()}
    assert len(after) == PROMPTS
    for key, samples in before.items():
        assert {index: after[key][index] for index in samples} == samples
    assert names() == ["cache", "out.jsonl"]
    server.stats.reset()
    assert called(server, namespace="b")["calls"] == server.stats.requests == 0


def test_c7_ctrl_c_ends_in_good_order_keeps_what_is_paid_and_says_how_to_go_on(server):
    with started([*options(server), "--json"]) as process:
        server.wait_until(lambda stats: stats.samples_delivered >= 100, 60)
        pause(server)
        server.wait_until(lambda stats: stats.in_flight == 8)
        process.send_signal(signal.SIGINT)
        assert "waiting up to 60 s for the 8 in flight" in said(process, "Stopping")
        asked = server.stats.requests
        pause(server, paused=False)
        told = process.stderr.read()
        figures = json.loads(process.stdout.read())
        assert process.wait() == figures["exit_status"] == 130
    assert "Traceback" not in told
    assert server.stats.requests == asked
    paid = server.stats.samples_generated
    assert 0 < paid < ALL
    assert paid == figures["generated"] == sum(map(len, stored().values()))
    assert figures["interrupted"]
    assert [line["custom_id"] for line in results(figures["partial"])] == [
        f"HumanEval/{i}" for i in range(figures["done"])
    ]
    assert not Path("out.jsonl").exists()
    command = shlex.split(told.partition("To continue: ")[2])
    assert command == ["cachepipe", "run", *options(server), "--json"]
    done = invoke(command[2:])
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1])["hits"] == paid
    assert server.stats.samples_generated == ALL
    assert len(results()) == PROMPTS


def test_a_second_ctrl_c_waits_for_nothing(server):
    pause(server)
    with started([*options(server), "--quiet"]) as process:
        server.wait_until(lambda stats: stats.in_flight == 8, 60)
        process.send_signal(signal.SIGINT)
        said(process, "Stopping")
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait() == 130
    assert "To continue: cachepipe run" in told
    assert "Traceback" not in told
    assert names() == ["cache"]
    pause(server, paused=False)
    assert called(server)["failed"] == 0


def test_a_termination_is_as_orderly(server):
    pause(server)
    with started(options(server)) as process:
        server.wait_until(lambda stats: stats.in_flight == 8, 60)
        process.send_signal(signal.SIGTERM)
        said(process, "Stopping")
        pause(server, paused=False)
        assert "To continue" in process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM
    assert sum(map(len, stored().values())) == server.stats.samples_generated == 8 * N


@pytest.fixture
def heard_hangups():
    """Let processes hear a hangup that this one may have been told to ignore, by ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.usefixtures("heard_hangups")
def test_a_hangup_is_as_orderly(server):
    pause(server)
    with started(options(server)) as process:
        server.wait_until(lambda stats: stats.in_flight == 8, 60)
        process.send_signal(signal.SIGHUP)
        said(process, "Stopping")
        pause(server, paused=False)
        assert "To continue" in process.stderr.read()
        assert process.wait() == 128 + signal.SIGHUP
    assert sum(map(len, stored().values())) == server.stats.samples_generated == 8 * N
    assert called(server)["hits"] == 8 * N


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.usefixtures("heard_hangups")
def test_c7_what_is_in_flight_when_the_terminal_is_closed_is_kept(server):
    pause(server)
    command = [sys.executable, "-c", "from cachepipe.cli import main; main()", "run", *options(server)]
    ours, theirs = os.openpty()
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - its own terminal
    ) as process:
        os.close(theirs)
        server.wait_until(lambda stats: stats.in_flight == 8, 60)
        os.close(ours)
        pause(server, paused=False)
        assert process.wait(60) == 128 + signal.SIGHUP
    assert sum(map(len, stored().values())) == server.stats.samples_generated > 0


def test_a_run_under_nohup_goes_on_after_a_hangup(server):
    pause(server)
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from cachepipe.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "run", *options(server, limit=3), "--quiet"]
    with forked.Popen(command) as process:
        server.wait_until(lambda stats: stats.in_flight == 3, 60)
        process.send_signal(signal.SIGHUP)
        pause(server, paused=False)
        assert process.wait(60) == 0
    assert len(results()) == 3


def test_the_order_of_the_input_is_kept_whatever_the_order_of_the_answers(server):
    server.settings = replace(server.settings, latency_per_token=0.001)
    figures = called(server, n=2, concurrency=16)
    assert 16 < figures["most_ahead"] <= 64
    assert [line["custom_id"] for line in results()] == [f"HumanEval/{i}" for i in range(PROMPTS)]


# Failures.

FAULTS = {
    "error": ("server_error", 500),
    "rate_limit": ("rate_limit_exceeded", 429),
    "unavailable": ("server_error", 503),
    "drop": ("connection_error", None),
    "cut": ("connection_error", None),
    "truncate": ("connection_error", None),
    "error_200": ("bad_answer", None),
    "malformed": ("bad_answer", None),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_c8_requests_that_fail_become_error_lines_and_a_rerun_asks_only_those(server, kind):
    server.settings = replace(server.settings, script=tuple([None, Fault(kind=kind), None, None] * 5))
    source = write("in.jsonl", [{"id": i, "prompt": f"question {i}"} for i in range(20)])
    figures = called(server, status=1, requests=source, concurrency=1)
    assert (figures["failed"], figures["done"], figures["interrupted"]) == (5, 20, False)
    failed = [line for line in results() if line["error"]]
    code, status = FAULTS[kind]
    assert {line["custom_id"] for line in failed} == {"1", "5", "9", "13", "17"}
    assert {(line["response"] or {}).get("status_code") for line in failed} == {status}
    assert {line["error"]["code"] for line in failed} == set(figures["errors"]) == {code}
    assert all(line["error"]["message"] for line in failed)
    if status is not None:
        assert failed[0]["response"]["request_id"].startswith("req_")
        assert failed[0]["response"]["body"]["error"]["message"] == failed[0]["error"]["message"]
    whole = {line["custom_id"]: texts(line) for line in results() if not line["error"]}
    server.stats.reset()
    again = called(server, requests=source, concurrency=1)
    assert (again["calls"], again["failed"], again["hits"]) == (5, 0, 15 * N)
    assert server.stats.requests == 5
    assert {line["custom_id"]: texts(line) for line in results()}.items() >= whole.items()


def test_failures_are_told_with_the_command_that_asks_only_them(server):
    server.settings = replace(server.settings, script=(Fault(kind="error", message="out of \x1b[31mbeans"),))
    source = write("in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    done = invoke(options(server, requests=source, concurrency=1))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "1 requests failed (1 server_error). The first error was: out of \\x1b[31mbeans" in done.stderr
    command = ["cachepipe", "run", *options(server, requests=source, concurrency=1)]
    assert f"To retry the failed requests: {shlex.join(command)}" in done.stderr


def test_the_sdk_repeats_failed_calls_as_often_as_it_is_told(server):
    faults = (Fault(kind="rate_limit", retry_after=0.001), Fault(kind="unavailable", retry_after=0.001), None)
    server.settings = replace(server.settings, script=faults * 3)
    source = write("in.jsonl", [{"prompt": text} for text in "abc"])
    figures = called(server, requests=source, concurrency=1, retries=2)
    assert (figures["failed"], figures["calls"], server.stats.requests) == (0, 3, 9)


def failing(server):
    """Let the server fail whatever it is asked."""
    server.settings = replace(server.settings, script=(Fault(kind="unavailable"),) * 99)


@pytest.mark.parametrize("how", ["refresh", "other address", "no_cache", "more samples"])
def test_a_failed_run_keeps_the_results_that_are_there_and_says_so(server, how):
    source = write("in.jsonl", [{"id": name, "prompt": f"question {name}", "note": 1} for name in "abc"])
    called(server, requests=source)
    before = results()
    lines = [{"id": f"new {name}", "prompt": f"question {name}", "note": 2} for name in "cab"]
    write("in.jsonl", [{"prompt": "another"}, *lines])
    more = {"refresh": True} if how == "refresh" else {"no_cache": True} if how == "no_cache" else {}
    if how == "more samples":
        more["n"] = N + 1
    with MockServer.in_thread(MockSettings()) as elsewhere:
        asked = elsewhere if how == "other address" else server
        failing(asked)
        for _ in range(2):  # what is kept is kept again
            done = invoke([*options(asked, requests=source, **more), "--json"])
            assert done.exit_code == 1
            assert "3 earlier results were kept in out.jsonl instead of errors." in done.stderr
            figures = json.loads(done.stdout)
            assert (figures["failed"], figures["kept"], figures["hits"]) == (4, 3, 0)
            after = results()
            assert after[0]["error"]["code"]
            assert [line["custom_id"] for line in after[1:]] == ["new c", "new a", "new b"]
            assert [line["note"] for line in after[1:]] == [2, 2, 2]
            for line, old in zip(after[1:], [before[2], before[0], before[1]], strict=True):
                assert (line["response"], line["error"]) == (old["response"], None)
                assert line["cachepipe"] == old["cachepipe"]


@pytest.mark.parametrize(
    "other", [{"namespace": "b"}, {"temperature": 0.5}, {"seed": 1}, {"model": "ngram-2"}]
)
def test_c12_an_earlier_result_of_another_question_or_draw_is_not_kept(server, other):
    source = write("in.jsonl", [{"id": "a", "prompt": "question"}])
    called(server, requests=source)
    failing(server)
    figures = called(server, status=1, requests=source, refresh=True, **other)
    assert (figures["failed"], figures["kept"]) == (1, 0)
    assert results()[0]["response"]["status_code"] == 503


def test_c1_of_lines_that_ask_the_same_each_keeps_its_own_result(server):
    source = write("in.jsonl", [{"id": name, "prompt": "same"} for name in "ab"])
    called(server, requests=source, n=1)
    before = [line["response"] for line in results()]
    failing(server)
    write("in.jsonl", [{"id": name, "prompt": "same"} for name in "bca"])
    assert called(server, status=1, requests=source, n=1, refresh=True)["kept"] == 2
    after = results()
    assert [line["response"] for line in after[:2]] == before
    assert after[2]["error"]


def test_what_is_no_result_of_a_run_is_not_kept(server):
    source = write("in.jsonl", [{"id": "a", "prompt": "question"}])
    called(server, requests=source)
    (line,) = results()
    failing(server)
    for broken in ({**line, "response": None}, {**line, "cachepipe": []}, {**line, "id": "batch_req_0"}):
        Path("out.jsonl").write_text(f"{json.dumps(broken)}\n".replace(": ", ":") + "\x00\n{\n")
        assert called(server, status=1, requests=source, refresh=True)["kept"] == 0


# Input.


def test_what_is_wrong_with_the_input_is_told_by_line_before_any_call(server):
    source = write("bad.jsonl", [{"prompt": "a"}, "{", {"id": "1", "prompt": "b"}, {"prompt": 1}])
    told = refused(server, requests=source)
    assert "line 2: it is not valid JSON" in told
    assert "line 3: custom_id '1' is already that of line 1" in told
    assert "line 4: prompt must be a string" in told
    assert names() == ["bad.jsonl"]
    assert "none.jsonl cannot be read: No such file" in refused(server, requests="none.jsonl")
    assert "there is no folder nowhere" in refused(server, output="nowhere/out.jsonl")
    assert "line 1: it names no model" in refused(server, model=None)


@pytest.mark.parametrize(("requests", "output"), [("-", "out.jsonl"), ("in.jsonl", "-")])
def test_dashes_are_no_files_and_make_none(server, requests, output):
    write("in.jsonl", [{"prompt": "a"}])
    assert "file" in refused(server, requests=requests, output=output)
    assert not Path("-").exists()


def test_a_folder_that_cannot_be_searched_is_an_error_in_a_sentence(server, monkeypatch):
    seen = Path.stat

    def stat(path, **options):
        if path.name == "out.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return seen(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert "cannot be written to out.jsonl: Permission denied" in refused(server)


def test_batch_requests_of_every_api_run_side_by_side(server):
    chat = {"model": "ngram-1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    words = {"model": "e", "input": ["a", "b", "a"], "dimensions": 4}
    bodies = {
        "chat": ("/v1/chat/completions", {**chat, "n": 2, "user": "me", "stream": True}),
        "seeded": ("/v1/chat/completions", {**chat, "seed": 1}),
        "completions": (
            "/v1/completions",
            {"model": "ngram-1", "prompt": ["Given", "Return"], "n": 2, "max_tokens": 3},
        ),
        "responses": ("/v1/responses", {"model": "ngram-1", "input": "hi", "max_output_tokens": 4}),
        "embeddings": ("/v1/embeddings", words),
        "packed": ("/v1/embeddings", {**words, "input": "b", "encoding_format": "base64"}),
    }
    source = write(
        "in.jsonl",
        [
            {"custom_id": name, "method": "POST", "url": url, "body": body}
            for name, (url, body) in bodies.items()
        ],
    )
    first = called(server, requests=source, n=1)
    assert first["failed"] == 0, results()
    lines = {line["custom_id"]: line for line in results()}
    assert list(lines) == list(bodies)
    body = {name: line["response"]["body"] for name, line in lines.items()}
    assert [len(body[name]["choices"]) for name in ("chat", "seeded", "completions")] == [2, 1, 4]
    assert [choice["index"] for choice in body["completions"]["choices"]] == [0, 1, 2, 3]
    assert body["responses"]["status"] in ("completed", "incomplete")
    vectors = [item["embedding"] for item in body["embeddings"]["data"]]
    assert [item["index"] for item in body["embeddings"]["data"]] == [0, 1, 2]
    assert [len(vector) for vector in vectors] == [4, 4, 4]
    assert vectors[0] == vectors[2] != vectors[1]
    assert isinstance(body["packed"]["data"][0]["embedding"], str)
    assert len(lines["embeddings"]["cachepipe"]["keys"]) == 3
    asked = server.stats.requests
    again = called(server, requests=source, n=1, namespace="b")
    assert (again["calls"], server.stats.requests) == (0, asked)
    assert [line["response"] for line in results()] == [line["response"] for line in lines.values()]


def test_c9_one_scope_keeps_the_apis_apart_and_is_the_clients_too(server):
    body = {"model": "ngram-1", "input": "text"}
    lines = [
        {"custom_id": path, "method": "POST", "url": f"/v1/{path}", "body": body}
        for path in ("embeddings", "responses")
    ]
    source = write("in.jsonl", lines)
    called(server, requests=source, n=1, scope="mine")
    answers = {line["custom_id"]: line["response"]["body"] for line in results()}
    assert answers["responses"]["object"] == "response"
    assert answers["embeddings"]["object"] == "list"
    asked = server.stats.requests
    with OpenAI(base_url=server.base_url, cache="cache", scope="mine", namespace="b") as client:
        client.embeddings.create(**body)
        text = client.responses.create(**body).output_text
    assert text == answers["responses"]["output"][0]["content"][0]["text"]
    assert server.stats.requests == asked


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_input_without_requests_says_so(server, content):
    Path("empty.jsonl").write_text(content)
    done = invoke(options(server, requests="empty.jsonl"))
    assert done.exit_code == 0
    assert "empty.jsonl holds no requests: expected a JSON object per line." in done.stderr
    assert results() == []


# Servers that are not there.


def test_an_unreachable_server_is_told_once_and_at_once_and_in_each_line(server):
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        gone = f"http://user:password@127.0.0.1:{port}/v1"
        done = invoke(options(server, limit=3, retries=1, **{"base-url": gone}))
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    first, *others = done.stderr.splitlines()
    assert first.startswith(f"Warning: the server at {url} cannot be reached: Connection refused; the next")
    assert others[0].startswith(f"The first error was: Connection error: {url} cannot be")
    assert sum(line.startswith("Warning") for line in others) == 0
    for line in results():
        assert line["error"]["code"] == "connection_error"
        assert line["error"]["message"] == f"Connection error: {url} cannot be reached (Connection refused)."
    assert "password" not in done.output


def test_a_base_url_without_v1_is_told_of_in_each_line(server):
    done = invoke(options(server, limit=2, **{"base-url": server.url}))
    assert f"base URLs usually end in /v1; try {server.url}/v1" in done.stderr.splitlines()[0]
    assert all("try http" in line["error"]["message"] for line in results())


# Modes and options.


def test_a_replay_through_another_host_says_so_and_takes_what_ls_shows_as_its_scope(server):
    called(server, limit=2)
    elsewhere = server.base_url.replace("127.0.0.1", "localhost")
    done = invoke(options(server, limit=2, replay=True, **{"base-url": elsewhere}))
    stored = f"{server.base_url}/chat/completions"
    assert f"another scope: '{stored}', and the request has '{elsewhere}/chat/completions'" in done.stderr
    shown = json.loads(CliRunner().invoke(cli, ["ls", "--cache", "cache", "--json"]).stdout.splitlines()[0])
    for scope in (shown["scope"], server.base_url, f"{server.base_url}/embeddings"):
        figures = called(server, limit=2, replay=True, scope=scope, **{"base-url": elsewhere})
        assert (figures["hits"], figures["failed"]) == (2 * N, 0)


def test_a_replay_with_another_setting_names_it(server):
    called(server, limit=1)
    called(server, limit=1, replay=True, temperature=0.25, status=1)
    assert "differs in temperature (asked: 0.25, stored: nothing)" in results()[0]["error"]["message"]


def test_replay_needs_neither_key_nor_server_and_a_miss_is_an_error_line(server, monkeypatch):
    called(server, limit=3)
    monkeypatch.delenv("OPENAI_API_KEY")
    asked = server.stats.requests
    assert called(server, limit=3, replay=True)["hits"] == 3 * N
    figures = called(server, status=1, limit=4, mode="replay")
    assert (figures["failed"], figures["errors"], figures["calls"]) == (1, {"cache_miss": 1}, 0)
    line = results()[-1]
    assert (line["error"]["code"], line["response"]) == ("cache_miss", None)
    assert line["cachepipe"]["key"] in line["error"]["message"]
    assert server.stats.requests == asked
    done = invoke(options(server, limit=4, replay=True))
    assert "To generate the missing samples: cachepipe run" in done.stderr
    assert "replay" not in done.stderr.partition("To generate")[2]


def test_a_replay_leaves_the_cache_as_it_was(server):
    called(server, limit=2)
    before = contents("cache")
    assert called(server, limit=2, namespace="b", replay=True)["hits"] == 2 * N
    # SQLite's readers may lay side files beside its databases; of what was there, no byte changes.
    assert contents("cache").items() >= before.items()


def test_replay_without_a_cache_makes_none(server):
    assert "/cache to replay from; name another folder with --cache" in refused(server, replay=True)
    assert names() == []


def test_refresh_generates_anew_and_later_runs_replay_that(server):
    called(server, limit=2)
    old = [texts(line) for line in results()]
    assert called(server, limit=2, refresh=True)["generated"] == 2 * N
    new = [texts(line) for line in results()]
    assert called(server, limit=2)["hits"] == 2 * N
    assert [texts(line) for line in results()] == new
    assert old != new


@pytest.mark.parametrize("how", ["option", "environment"])
def test_without_the_cache_nothing_is_kept(server, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("CACHEPIPE_DISABLE", "1")
    more = {"no_cache": True} if how == "option" else {}
    for _ in range(2):
        assert called(server, limit=2, **more)["generated"] == 2 * N
    assert names() == ["out.jsonl"]


def test_modes_that_contradict_each_other_are_refused(server):
    assert "--replay and --refresh ask for different modes" in refused(server, replay=True, refresh=True)


def test_equal_questions_get_fresh_samples_unless_told_otherwise(server):
    source = write("in.jsonl", [{"prompt": "same"}] * 4)
    assert called(server, requests=source, n=1)["generated"] == 4
    same = called(server, requests=source, n=1, repeat="same", cache="other")
    assert same["generated"] == 1
    assert len({texts(line)[0] for line in results()}) == 1


def test_a_line_s_own_settings_win_over_the_options(server):
    lines = [{"prompt": "a"}, {"prompt": "a", "model": "ngram-2", "n": 2, "temperature": 0, "max_tokens": 3}]
    source = write("in.jsonl", lines)
    called(server, requests=source, n=3, temperature=0.5, max_tokens=4, seed=9)
    store = DiskStore("cache", read_only=True)
    questions = [json.loads(store.question(line["cachepipe"]["key"]).document)["body"] for line in results()]
    store.close()
    message = [{"role": "user", "content": "a"}]
    settings = {"max_tokens": 4, "messages": message, "model": "ngram-1", "seed": 9, "temperature": 0.5}
    assert questions[0] == settings
    assert questions[1] == {**settings, "max_tokens": 3, "model": "ngram-2", "temperature": 0}
    assert [len(texts(line)) for line in results()] == [3, 2]


def test_a_scope_stands_for_the_address(server):
    called(server, limit=1, scope="mine")
    with MockServer.in_thread() as elsewhere:
        assert called(elsewhere, limit=1, scope="mine")["hits"] == N
        assert called(elsewhere, limit=1)["generated"] == N


def test_a_server_that_gives_less_at_once_is_called_more_often(server):
    server.settings = replace(server.settings, max_n=2)
    assert called(server, limit=1, max_n=2)["calls"] == 3
    assert sorted(entry.n for entry in server.stats.log) == [1, 2, 2]


def test_the_key_is_read_from_the_variable_that_is_named(server, monkeypatch):
    server.settings = replace(server.settings, api_key="another-key")
    assert called(server, status=1, limit=1)["failed"] == 1
    assert "The environment variable OTHER is not set" in " ".join(
        invoke(options(server, api_key_env="OTHER")).stderr.split()
    )
    monkeypatch.setenv("OTHER", "another-key")
    assert called(server, limit=1, api_key_env="OTHER")["failed"] == 0


@pytest.mark.parametrize("key", ["", None])
def test_a_server_of_one_s_own_needs_no_key_and_openai_does(server, monkeypatch, key):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert called(server, limit=1)["failed"] == 0
    server.stats.reset()
    if key is None:
        assert "OPENAI_API_KEY is not set" in refused(server, base_url=None)


# What is said, and what never is.


def test_without_a_terminal_there_are_plain_lines_and_a_table_on_standard_error(server, monkeypatch):
    monkeypatch.setattr("cachepipe.cli.run._PLAIN_EVERY", 0.0)
    done = invoke(options(server, limit=20))
    assert done.exit_code == 0
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert any(" of 20 requests, 0 failed; samples: 0 hits, " in line and " s left" in line for line in lines)
    table = dict(line.rsplit(None, 1) for line in lines if line and line[0].islower())
    assert table["requests"] == "20"
    assert (table["calls made"], table["samples generated"]) == ("20", "100")
    assert "\x1b" not in done.stderr
    assert lines[-1] == "The results are in out.jsonl."


def test_quiet_says_nothing_when_all_is_well(server):
    done = invoke([*options(server, limit=2), "--quiet"])
    assert (done.exit_code, done.output) == (0, "")


def on_terminal(server, cache="cache", **environment):
    """Run the command on a pseudo-terminal; return all that it showed."""
    server.settings = replace(server.settings, latency=0.02)
    command = [sys.executable, "-c", "from cachepipe.cli import main; main()", "run"]
    command += options(server, n=1, cache=cache)
    ours, theirs = os.openpty()
    shown = b""
    with forked.Popen(
        command, stderr=theirs, stdout=theirs, env={**os.environ, "TERM": "xterm", **environment}
    ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    return shown


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal_there_is_a_bar(server):
    shown = on_terminal(server, COLUMNS="120")
    assert b"/%d" % PROMPTS in shown
    assert b"0 hits, " in shown
    assert b"/s" in shown
    assert re.search(rb"calls made +%d\b" % PROMPTS, shown)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_narrow_terminal_shows_the_figures_whole_and_a_dumb_one_no_bar(server):
    narrow = on_terminal(server, COLUMNS="40").decode()
    assert re.search(rf"{PROMPTS}/{PROMPTS}\S* \S*samples: 0 hits, {PROMPTS} misses", narrow)
    assert "…" not in narrow
    dumb = on_terminal(server, "another", TERM="dumb")
    assert b"/%d" % PROMPTS not in dumb
    assert re.search(rb"calls made +%d\b" % PROMPTS, dumb)


def test_neither_the_key_nor_credentials_of_the_url_are_written_or_said(server):
    server.settings = replace(
        server.settings, script=(None, Fault(kind="status", status=401, message=f"bad key {KEY}"))
    )
    base_url = server.base_url.replace("//", "//someone:password1@")
    source = write("in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    words = options(server, requests=source, base_url=base_url, concurrency=1)
    done = invoke([*words, "--json"])
    assert done.exit_code == 1, done.output
    written = done.output.encode()
    written += b"".join(contents(".").values())
    assert b"bad key ***" in written
    assert b"chat/completions" in written
    for secret in (KEY, "password1", "someone", "Bearer", "uthorization"):
        assert secret.encode() not in written


@pytest.mark.parametrize("address", ["someone:password1@host/v1", "http://someone:password1@[host/v1"])
def test_an_address_that_cannot_be_read_is_told_without_its_credentials(server, address):
    told = refused(server, base_url=address)
    assert "the URL of an endpoint" in told
    assert "password1" not in told


def test_help_tells_the_exit_codes(server):
    told = " ".join(invoke(["--help"]).output.split())
    assert "0 for success, 1 if requests failed, 2 if nothing could be run, 130 if it was interrupted" in told


def test_a_line_that_asks_for_too_many_samples_fails_alone(server, tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "b", "n": 10**9}, {"prompt": "c"}]
    body = {"model": "m", "prompt": ["a", "b"], "n": 9000}
    lines.append({"method": "POST", "url": "/v1/completions", "body": body})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    called(server, status=1, requests="in.jsonl", n=1)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["error"] is None for result in results] == [True, False, True, False]
    assert "at most 10000 samples; got n = 1000000000" in results[1]["error"]["message"]
    assert "for each of 2 prompts" in results[3]["error"]["message"]
    assert server.stats.requests == 2


# Tokens and money.


def table(done):
    """The figures that a run has printed, by name."""
    lines = [line for line in done.stderr.splitlines() if line and line[0].islower() and "  " in line]
    return {name.strip(): value.strip() for name, value in (line.split("  ", 1) for line in lines)}


def test_c6_the_first_run_saves_nothing_and_a_rerun_all_that_it_replays(server):
    figures = called(server, limit=4)
    paid = server.stats.tokens_in + server.stats.tokens_out
    assert figures["spent"]["total_tokens"] == figures["billed"]["total_tokens"] == paid
    assert figures["as_asked"]["total_tokens"] == paid
    assert (figures["saved"]["total_tokens"], figures["saved"]["samples"]) == (0, 0)
    assert (figures["spent"]["samples"], figures["spent"]["unknown"], figures["unreported"]["samples"]) == (
        4 * N,
        0,
        0,
    )
    again = called(server, limit=4, namespace="b")
    assert again["saved"] == figures["as_asked"]
    assert (again["spent"]["samples"], again["billed"]["samples"]) == (0, 0)
    done = invoke(options(server, limit=4))
    assert table(done)["spent"] == "0 tokens"
    assert table(done)["saved"] == f"{paid:,} tokens"  # nobody knows the price of the built-in model


def test_c6_lines_that_share_a_call_are_billed_its_prompt_once(server):
    source = write("in.jsonl", [{"prompt": "the same question"}] * 3)
    figures = called(server, requests=source, n=2)
    paid = server.stats.tokens_in + server.stats.tokens_out
    assert (figures["calls"], figures["billed"]["total_tokens"], figures["spent"]["total_tokens"]) == (
        1,
        paid,
        paid,
    )
    assert figures["saved"]["total_tokens"] == 2 * server.stats.tokens_in


def test_c6_what_no_line_got_is_spent_and_unreported(server):
    source = write("in.jsonl", [{"prompt": "question"}])
    server.settings = replace(server.settings, script=(None, *[Fault(kind="unavailable")] * 9), max_n=3)
    figures = called(server, status=1, requests=source, n=5, max_n=3)
    made = server.stats.samples_generated  # by whichever of the two calls came first
    assert made in (2, 3)
    assert (figures["hits"], figures["misses"], figures["unreported"]["samples"]) == (0, 0, made)
    assert (figures["spent"]["samples"], figures["billed"]["samples"]) == (made, 0)
    assert figures["spent"]["total_tokens"] == server.stats.tokens_in + server.stats.tokens_out > 0
    told = CliRunner().invoke(cli, ["stats", "--runs", "--cache", "cache", "--json"], catch_exceptions=False)
    [run] = json.loads(told.stdout)["runs"]
    assert run["run"] == figures["run"]
    assert figures["wasted"] == figures["spent"] == run["wasted"]
    server.settings = replace(server.settings, script=())
    again = called(server, requests=source, n=5, max_n=3)  # which uses what was left first
    assert (again["hits"], again["wasted"]["samples"], again["wasted"]["cost"]) == (made, 0, 0)


def test_a_partial_hit_counts_its_samples_and_a_run_says_that_it_counts_samples(server, monkeypatch):
    monkeypatch.setattr("cachepipe.cli.run._PLAIN_EVERY", 0.0)
    called(server, limit=3, n=2)
    done = invoke(options(server, limit=3, n=5))
    shown = table(done)
    assert (shown["requests"], shown["sample hits"], shown["sample misses"]) == ("3", "6", "9")
    assert re.search(
        r"\d of 3 requests, 0 failed; samples: \d hits, \d misses; [\d.]+ requests/s", done.stderr
    )
