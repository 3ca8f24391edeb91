"""`cachepipe explain` says why a request is a hit or a miss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cachepipe import MemoryStore
from cachepipe.batch import BatchFileError, explain_request
from cachepipe.cli.group import cli


@pytest.fixture(autouse=True)
def asked_before(environment):
    """A folder of the test's own with a cache that has answered two equal lines and another."""
    write("Today is 2026-12-01. Hi", "b", "b")
    invoke("run", "in.jsonl", "-o", "out.jsonl", "--namespace", "x", "-q")


def write(*prompts):
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def invoke(command, *words, status=0):
    words = [command, *words, "--model", "ngram-1", "--cache", "c"]
    done = CliRunner().invoke(cli, words, prog_name="cachepipe")
    assert done.exit_code == status, (done.output, done.exception)
    return done


def explained(*words, request=None, namespace="x"):
    if request is not None:
        Path("request.json").write_text(json.dumps(request, indent=1))
        words = ("request.json", *words)
    [found] = json.loads(invoke("explain", *words, "--namespace", namespace, "--json").stdout)
    return found


def test_a_hit_says_who_drew_which_samples(server):
    asked = server.stats.requests
    found = explained("--line", "3", "in.jsonl")
    assert (found["outcome"], found["stored"], found["why"]) == ("hit", 1, "")
    assert found["draw"]["occurrence"] == 1
    drawn = [(each["namespace"], each["occurrence"], each["indices"]) for each in found["drawn"]]
    assert drawn == [("x", 0, [0]), ("x", 1, [1])]
    said = invoke("explain", "--line", "3", "in.jsonl", "--namespace", "x").stdout
    assert said.startswith("hit  k2-")
    assert "2 draws of this question:" in said
    assert "x (time 2): #1; 1 generated for it" in said
    assert server.stats.requests == asked


def test_a_partial_hit_and_a_draw_beyond_the_list_say_what_is_missing():
    found = explained("--n", "3", request={"prompt": "b"})
    assert (found["outcome"], found["stored"]) == ("partial", 1)
    assert "the cache has 2 samples of this question; the request asks for 3" in found["why"]
    write("b", "b", "b")
    found = explained("--line", "3", "in.jsonl")
    assert (found["outcome"], found["draw"]["occurrence"]) == ("miss", 2)
    assert "made without a request_id for the 3rd time, would get a new sample" in found["why"]


@pytest.mark.parametrize(
    ("request_", "words", "kinds"),
    [
        ({"prompt": "Today is 2026-12-02. Hi"}, [], {"messages[0].content": "date"}),
        ({"prompt": "b"}, ["--temperature", "1"], {"temperature": "default"}),
        ({"prompt": "b"}, ["--temperature", "0.5"], {"temperature": None}),
        ({"prompt": "b"}, ["--base-url", "http://other.example/v1"], {"scope": "host"}),
    ],
    ids=["date", "default", "setting", "host"],
)
def test_a_miss_names_the_nearest_question_and_what_kind_of_difference_it_is(request_, words, kinds):
    found = explained(*words, request=request_)
    assert found["outcome"] == "miss"
    assert {each["path"]: each["kind"] for each in found["differences"]} == kinds
    assert found["nearest"].startswith("k2-")


def test_a_reordered_schema_is_recognised():
    def request(*names):
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "q"}], "response_format": form}
        return {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}

    Path("in.jsonl").write_text(json.dumps(request("a", "b")))
    invoke("run", "in.jsonl", "-o", "out.jsonl", "--namespace", "x", "-q")
    found = explained(request=request("b", "a"))
    assert [(each["path"].rpartition(".")[2], each["kind"]) for each in found["differences"]] == [
        ("properties", "order")
    ]
    said = invoke("explain", "request.json", "--namespace", "x").stdout
    assert "properties (the same names in another order)" in said


def test_run_says_beside_a_miss_why_it_is_one():
    write("Today is 2026-12-02. Hi", "b", "b")
    said = invoke("run", "in.jsonl", "-o", "out.jsonl", "--namespace", "x", "-q", "--why").stderr
    [told] = said.splitlines()
    assert re.match(r"line 1 misses k2-\w{12}: the nearest question in the cache, k2-\w{12}, differs", told)
    assert "messages[0].content (another date or time; asked: '…" in told
    assert invoke("run", "in.jsonl", "-o", "out.jsonl", "--namespace", "x", "-q", "--why").stderr == ""


def test_what_is_no_request_is_refused_in_a_sentence():
    with pytest.raises(BatchFileError, match=r"in.jsonl is not one request in JSON.*give --line"):
        explain_request("in.jsonl", model="m", cache=MemoryStore())
    with pytest.raises(BatchFileError, match=r"in.jsonl has no request in line 9"):
        explain_request("in.jsonl", model="m", cache=MemoryStore(), line=9)
    with pytest.raises(BatchFileError, match="cannot be read: No such file"):
        explain_request("none.json", model="m", cache=MemoryStore())
    [found] = explain_request("in.jsonl", model="m", cache=MemoryStore(), line=1)
    assert found.why == "the cache holds no similar question"
