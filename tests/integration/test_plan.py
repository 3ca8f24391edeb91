"""`cachepipe plan` says what `cachepipe run` does, and changes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cachepipe import MemoryStore
from cachepipe.batch import BatchFileError, plan_file
from cachepipe.cli.group import cli

PRICES = {"ngram-1": {"prompt": 1.0, "completion": 2.0, "max_tokens": 500}}


@pytest.fixture(autouse=True)
def prices(environment, monkeypatch, tmp_path):
    """A folder of the test's own with prices."""
    monkeypatch.delenv("CACHEPIPE_DISABLE", raising=False)
    (tmp_path / "prices.json").write_text(json.dumps(PRICES))


def write(*prompts):
    lines = [json.dumps({"custom_id": str(place), "prompt": prompt}) for place, prompt in enumerate(prompts)]
    Path("in.jsonl").write_text("".join(f"{line}\n" for line in lines))


def invoke(command, *words, status=0):
    cache = () if "--cache" in words else ("--cache", "cache")
    done = CliRunner().invoke(cli, [command, "in.jsonl", *cache, *words], prog_name="cachepipe")
    assert "Traceback" not in done.output
    assert done.exit_code == status, (done.output, done.exception)
    return done


def planned(*words):
    return json.loads(invoke("plan", "--model", "ngram-1", "--json", *words).stdout)


def ran(*words):
    done = invoke("run", "-o", "out.jsonl", "--model", "ngram-1", "--json", "-q", *words)
    return json.loads(done.stdout.splitlines()[-1])


def content(folder):
    """Return digests of what files hold; SQLite makes empty logs when it reads."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith("-shm") and path.stat().st_size
    }


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--n", "3"],
        ["--n", "3", "--namespace", "b"],
        ["--replicates", "2"],
        ["--repeat", "same", "--n", "2"],
        ["--ids"],
        ["--refresh"],
        ["--no-cache"],
        ["--max-n", "1", "--n", "2", "--temperature", "0.5"],
        ["--limit", "2"],
    ],
    ids=" ".join,
)
def test_c4_a_plan_buys_what_the_run_buys(words, tmp_path, server):
    write("a", "b", "a")
    ran("--n", "2")
    write("b", "c", "a", "a", "a", "c")
    before, asked = content(tmp_path), server.stats.requests
    plan = planned(*words)
    assert (content(tmp_path), server.stats.requests) == (before, asked)
    figures = ran(*words)
    assert plan["to_buy"] == figures["generated"]
    assert plan["requests"] == figures["requests"]
    assert plan["stored"] + plan["repeated"] == figures["hits"]
    assert plan["hits"] + plan["partial_hits"] + plan["misses"] == plan["requests"]
    assert plan["calls"] >= figures["calls"]
    again = planned(*words)
    fresh = {"--refresh", "--no-cache"}.intersection(words)
    assert again["to_buy"] == (plan["to_buy"] if fresh else 0)


def test_embeddings_count_once_and_need_no_answer(tmp_path):
    body = {"model": "ngram-1", "input": ["x", "y", "x"]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    plan = planned("--prices", "prices.json")
    assert (plan["samples"], plan["to_buy"], plan["repeated"]) == (3, 2, 1)
    assert plan["models"][0]["completion_tokens"] == 0
    assert plan["cost"] == plan["most_cost"] > 0
    assert ran()["generated"] == plan["to_buy"]


def test_a_dry_run_is_the_same_plan_and_writes_no_result(tmp_path, server):
    write("a", "b")
    asked = server.stats.requests
    done = invoke("run", "-o", "out.jsonl", "--model", "ngram-1", "--dry-run", "--json")
    assert json.loads(done.stdout) == planned()
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "cache").exists()
    assert server.stats.requests == asked


def test_stored_answers_say_what_new_ones_will_cost_and_how_long_they_take():
    write("one prompt", "another prompt", "a third prompt", "a fourth prompt")
    plan = planned("--prices", "prices.json")
    [model] = plan["models"]
    assert (model["completion_tokens"], model["cost"]) == (None, None)
    assert model["most_completion_tokens"] == 4 * 500
    assert plan["cost"] is None
    assert plan["most_cost"] == pytest.approx((model["prompt_tokens"] + 2 * 2000) / 1e6)
    assert any("Run some first" in note for note in plan["notes"])
    assert plan["seconds"] is None
    assert planned("--requests-per-minute", "8")["seconds"] == 30
    assert (
        planned("--prices", "prices.json", "--max-tokens", "7")["models"][0]["most_completion_tokens"] == 28
    )
    spent = ran("--limit", "2")["spent"]
    [model] = planned("--prices", "prices.json")["models"]
    assert model["completion_tokens"] == spent["completion_tokens"]
    assert model["prompt_tokens"] == pytest.approx(spent["prompt_tokens"], abs=3)
    plan = planned("--prices", "prices.json")
    assert plan["cost"] == pytest.approx((model["prompt_tokens"] + 2 * model["completion_tokens"]) / 1e6)
    assert plan["seconds"] > 0
    assert plan["notes"] == []


def test_what_is_unknown_is_said_with_how_to_give_it():
    write("a")
    said = " ".join(invoke("plan", "--model", "ngram-1").stderr.split())
    assert "The price of ngram-1 at http://" in said
    assert 'Give prices in a file, --prices FILE: {"MODEL": {"prompt": 0.15' in said
    assert "Give --max-tokens, or max_tokens in the file of --prices" in said
    assert "Give --requests-per-minute or --tokens-per-minute" in said


def test_a_plan_says_why_most_questions_are_new():
    write("a", "b", "c")
    ran()
    plan = planned("--temperature", "0.5")
    [reason] = plan["reasons"]
    assert (reason["share"], plan["new_questions"]) == (1.0, 3)
    assert "differs in temperature (asked: 0.5, stored: nothing)" in reason["why"]
    assert (
        "Why they are new (100% of the new questions that were compared, such as line 1)"
        in invoke("plan", "--model", "ngram-1", "--temperature", "0.5").stdout
    )
    assert planned()["reasons"] == []


def test_a_replay_is_planned_with_its_misses():
    write("a", "b")
    ran("--limit", "1")
    plan = planned("--replay")
    assert (plan["hits"], plan["misses"], plan["to_buy"]) == (1, 1, 1)
    assert "1 stored, 1 missing" in invoke("plan", "--model", "ngram-1", "--replay").stdout


def test_a_file_that_cannot_be_run_cannot_be_planned(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(BatchFileError, match="line 2: prompt must be a string"):
        plan_file("in.jsonl", model="ngram-1", cache=MemoryStore())
    assert "line 2" in invoke("plan", "--model", "ngram-1", status=2).stderr


def test_a_line_that_would_be_refused_is_counted_as_such(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "n": 1000000}\n{"prompt": "a"}\n')
    plan = plan_file("in.jsonl", model="ngram-1", cache=MemoryStore())
    assert (plan.requests, plan.refused, plan.to_buy) == (2, 1, 1)


@pytest.mark.parametrize("engine", ["valkey", "postgres"])
def test_a_plan_of_a_shared_cache_and_of_one_that_is_not_there(engine, request):
    url = request.getfixturevalue(f"new_{engine}_url")()
    write("a", "b", "a")
    assert planned("--cache", url)["to_buy"] == 3
    ran("--cache", url, "--limit", "2")
    plan = planned("--cache", url)
    assert (plan["hits"], plan["to_buy"], plan["new_questions"]) == (2, 1, 0)


def test_a_plan_tells_each_line_that_it_has_read():
    write("a", "b", "c")
    lines = []
    plan_file("in.jsonl", model="ngram-1", cache=MemoryStore(), progress=lines.append)
    assert lines == [1, 2, 3]
