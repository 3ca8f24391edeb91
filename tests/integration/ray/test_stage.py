"""The stage of Ray Data, on two nodes, with a real Valkey server."""

from __future__ import annotations

import json
import os
import random
from importlib.resources import files

import pyarrow as pa
import pytest
import ray

from cachepipe.errors import StoreError
from cachepipe.ray import Rows, Stage, ask, summary

HUMANEVAL = [
    json.loads(line)
    for line in (files("cachepipe.testing") / "data" / "humaneval.jsonl").read_text().splitlines()
]


def asked(dataset, settings, rows, **options):
    """Ask for a dataset; return it with its samples, and its rows by id."""
    answers = ask(dataset, settings, rows, num_cpus=0, **options).materialize()
    return answers, {row[rows.id]: row for row in answers.take_all()}


@pytest.mark.timeout(300)
def test_humaneval_passes_twice_with_a_worker_killed_in_the_first(settings, server):
    rows = Rows(id="task_id", namespace="exp")
    server.kill_at = 40
    first = settings()
    dataset = ray.data.from_items(HUMANEVAL, override_num_blocks=8)
    answers, given = asked(dataset, first, rows, batch_size=8)
    assert len(given) == 164
    assert {row["error"] for row in given.values()} == {None}
    assert len({row["completions"][0] for row in given.values()}) == 164
    assert len(server.killed) == 1
    assert 164 <= server.samples <= 164 + 4 * 8  # which the worker may have in flight
    figures = summary(first, answers).as_dict()
    assert (figures["rows"], figures["failed"]) == (164, 0)
    assert 164 <= figures["spent"]["samples"] <= server.samples
    assert figures["billed"]["samples"] <= figures["spent"]["samples"]

    server.kill_at, before = None, server.calls
    second = settings()
    order = random.Random(1).sample(HUMANEVAL, 164)
    shuffled = ray.data.from_items(order, override_num_blocks=3)
    answers, again = asked(shuffled, second, rows, batch_size=5)
    assert server.calls == before
    assert {name: row["completions"] for name, row in again.items()} == {
        name: row["completions"] for name, row in given.items()
    }
    assert all(row["cached"] == [True] for row in again.values())
    figures = summary(second, answers).as_dict()
    assert (figures["hits"], figures["misses"], figures["requests"]) == (164, 0, 164)
    assert figures["spent"]["samples"] == figures["billed"]["samples"] == 0
    assert figures["saved"]["total_tokens"] == figures["as_asked"]["total_tokens"] == 164 * 15


def test_a_bad_row_is_a_row_with_an_error(settings, server):
    bodies = [
        {"id": "good", "body": {"messages": [{"role": "user", "content": "one"}], "temperature": 0.5}},
        {"id": "refused", "body": {"messages": [{"role": "user", "content": "refuse"}]}},
        {"id": "empty", "body": {}},
        {"id": None, "body": {"messages": [{"role": "user", "content": "two"}]}},
    ]
    dataset = ray.data.from_items([{**row, "body": json.dumps(row["body"])} for row in bodies])
    mine = settings()
    rows = Rows(id="id", body="body", n=2, namespace="exp", prefix="our_")
    answers, found = asked(dataset, mine, rows, workers=1, batch_size=2)
    assert len(found["good"]["our_completions"]) == 2
    assert found["good"]["our_cached"] == [False, False]
    assert found["good"]["our_duplicated"] == [False, True]
    assert found["good"]["our_error"] is None
    assert [found[name]["our_completions"] for name in ("refused", "empty", None)] == [None] * 3
    assert found["refused"]["our_error"].startswith("refused: ")
    assert found["empty"]["our_error"].startswith("bad_request: a body has one of prompt")
    assert found[None]["our_error"].startswith("bad_request: a row's id must not be null")
    assert os.environ["OPENAI_API_KEY"] not in str(found)
    assert {"messages", "model", "temperature", "n"} == set(next(b for b in server.asked if "one" in str(b)))
    sums = summary(mine, answers, prefix="our_")
    assert sums.as_dict()["errors"] == {"refused": 1, "bad_request": 2}
    assert "errors    3 (2 bad_request, 1 refused)" in str(sums)
    assert "billed    2 samples, 20 tokens" in str(sums)


def test_ids_that_occur_twice_are_refused_unless_they_are_meant(settings, server):
    twice = ray.data.from_items(
        [{"id": 1, "prompt": "p"}, {"id": 2, "prompt": "p"}, {"id": 1, "prompt": "p"}]
    )
    rows = Rows(id="id")
    with pytest.raises(ValueError, match="rows 1 and 3 have the same id 1 in the column 'id'"):
        ask(twice, settings(), rows)
    with pytest.raises(ValueError, match="without ids"):
        ask(twice, settings(), Rows())
    answers = ask(twice, settings(), rows, workers=1, duplicates="same", num_cpus=0).take_all()
    given = {row["id"]: row["completions"] for row in answers}
    assert [row["completions"] for row in answers] == [given[row["id"]] for row in answers]
    assert given[1] != given[2]
    assert server.samples == 2


def test_a_folder_is_refused_on_several_nodes(settings, tmp_path):
    mine, dataset = settings(cache=tmp_path), ray.data.from_items([{"id": 1, "prompt": "p"}])
    with pytest.raises(StoreError, match=r"folder of one machine, and this Ray cluster has 2 nodes\. Use a"):
        ask(dataset, mine, Rows(id="id"))
    with pytest.raises(StoreError, match="2 nodes"):
        Stage(mine, Rows(id="id"))


def test_a_column_that_is_missing_or_taken_is_an_error(settings):
    stage = Stage(settings(), Rows(id="id"))
    cases = [
        ({"id": [1]}, ValueError, "no column 'prompt'"),
        ({"id": [1], "prompt": ["p"], "error": [""]}, ValueError, "has a column 'error' already"),
    ]
    for columns, kind, message in cases:
        with pytest.raises(kind, match=message):
            stage(pa.table(columns)).asend(None).send(None)
    with pytest.raises(TypeError, match="batch_format='pyarrow'"):
        stage({}).asend(None).send(None)
