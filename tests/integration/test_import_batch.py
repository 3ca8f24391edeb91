"""Results of batches become samples and draws of their requests, with the keys of every surface (C9, C10)."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cachepipe import DiskStore, MemoryStore
from cachepipe.batch import BatchFileError, run_file
from cachepipe.cli.group import cli
from cachepipe.clients import OpenAI
from cachepipe.importers import import_batch
from cachepipe.prices import Prices
from cachepipe.sharing import merge
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.stores.sums import statements
from cachepipe.stores.verify import verify
from cachepipe.testing import MemoryEngine

pytestmark = pytest.mark.anyio

CHAT, EMBEDDINGS, RESPONSES = "/v1/chat/completions", "/v1/embeddings", "/v1/responses"
NOWHERE = {"api_key": "none", "max_retries": 0}


def line(name, prompt, url=CHAT, **more):
    body = {"model": "gpt-4o-mini", **more}
    if url == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["input"] = prompt
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat(*texts, created=1_760_000_000):
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(texts)
    ]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": created,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": choices,
        "usage": usage(10, 5 * len(texts)),
    }


def vectors(*each):
    data = [{"object": "embedding", "index": i, "embedding": list(one)} for i, one in enumerate(each)]
    return {
        "object": "list",
        "data": data,
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


def row(name, body, status=200, error=None, number=0):
    response = {"status_code": status, "request_id": f"req-{name}-{number}", "body": body}
    return {
        "id": f"batch_req_{name}_{number}",
        "custom_id": name,
        "response": None if body is None else response,
        "error": error,
    }


REQUESTS = [
    line("a", "one"),
    line("b", "two", n=2, temperature=0.5),
    line("c", "one"),  # asks what a asks
    line("d", "refused"),
    line("e", "expired"),
    line("f", ["x", "y"], EMBEDDINGS, encoding_format="float"),
    line("g", "lost"),
]
ROWS = [
    row("c", chat("second")),
    row("b", chat("left", "right", created=1_760_000_001)),
    row("a", chat("first")),
    row("f", vectors([0.5, 1.0], [0.25, 2.0])),
]
ERRORS = [
    row("d", {"error": {"code": "content_policy", "message": "Not allowed."}}, 400),
    row("e", None, error={"code": "batch_expired", "message": "It did not run within 24 hours."}),
]
TAKEN = [each for each in REQUESTS if each["custom_id"] in "abcf"]


def written(path, rows):
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in rows))
    return path


@pytest.fixture
def batch(tmp_path):
    """A batch: its requests, its output and its errors."""
    return (
        written(tmp_path / "input.jsonl", REQUESTS),
        [written(tmp_path / "output.jsonl", ROWS), written(tmp_path / "errors.jsonl", ERRORS)],
    )


async def ran(tmp_path, requests, **settings):
    """The results of a run whose server refuses all connections, and how many calls it made."""
    source = written(tmp_path / "again.jsonl", requests)
    report = await run_file(source, tmp_path / "again.out.jsonl", **NOWHERE, **settings)
    rows = [json.loads(text) for text in (tmp_path / "again.out.jsonl").read_text().splitlines()]
    return {each["custom_id"]: each for each in rows}, report


async def test_c10_a_run_of_the_same_file_makes_no_calls_and_gives_each_line_its_result(batch, tmp_path):
    imported = import_batch(*batch, tmp_path / "cache", namespace="exp")
    assert (imported.found, imported.taken, imported.counts.samples, imported.counts.draws) == (7, 4, 6, 5)
    found, report = await ran(
        tmp_path, TAKEN, cache=tmp_path / "cache", namespace="exp", base_url="https://api.openai.com/v1"
    )
    assert (report.calls, report.failed, report.hits) == (0, 0, 6)
    for each in ROWS:
        body = found[each["custom_id"]]["response"]["body"]
        expected = each["response"]["body"]
        assert [c["message"]["content"] for c in body.get("choices", [])] == [
            c["message"]["content"] for c in expected.get("choices", [])
        ]
        assert body.get("data") == expected.get("data")
        assert body["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    assert verify(tmp_path / "cache").problems == {}


async def test_c3_another_namespace_reuses_the_results_without_calls(batch, tmp_path):
    import_batch(*batch, tmp_path / "cache", namespace="exp")
    found, report = await ran(
        tmp_path, TAKEN, cache=tmp_path / "cache", namespace="other", base_url="https://api.openai.com/v1"
    )
    assert (report.calls, report.failed) == (0, 0)
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == "first"
    assert found["c"]["response"]["body"]["choices"][0]["message"]["content"] == "second"


async def test_c10_the_client_gets_the_results(batch, tmp_path):
    import_batch(*batch, tmp_path / "cache")
    with OpenAI(cache=tmp_path / "cache", mode="replay", base_url="https://api.openai.com/v1") as client:
        messages = [{"role": "user", "content": "one"}]
        texts = [
            client.chat.completions.create(model="gpt-4o-mini", messages=messages).choices[0].message.content
            for _ in range(2)
        ]
        vector = client.embeddings.create(model="gpt-4o-mini", input="y").data[0].embedding
    assert texts == ["first", "second"]
    assert vector == [0.25, 2.0]


async def test_what_failed_is_named_with_the_providers_reason(batch, tmp_path):
    left = {each.name: each for each in import_batch(*batch, tmp_path / "cache").left}
    assert {name: each.where for name, each in left.items()} == {"d": "line 4", "e": "line 5", "g": "line 7"}
    assert left["d"].why == "the provider answered 400: content_policy: Not allowed."
    assert left["e"].why == "batch_expired: It did not run within 24 hours."
    assert left["g"].why == "there is no result for it in output.jsonl and errors.jsonl"


async def test_an_import_that_is_repeated_or_goes_on_adds_only_what_is_new(batch, tmp_path):
    requests, (output, _) = batch
    import_batch(requests, [written(tmp_path / "half.jsonl", ROWS[:2])], tmp_path / "cache")
    more = import_batch(requests, [output], tmp_path / "cache")
    assert (more.taken, more.counts.samples, more.counts.draws) == (4, 3, 3)
    again = import_batch(requests, [output], tmp_path / "cache")
    assert (again.taken, again.counts.samples, again.counts.draws, again.counts.same) == (4, 0, 0, 4)
    assert verify(tmp_path / "cache").problems == {}


async def test_two_imports_of_one_batch_merge_without_doubles(batch, tmp_path):
    import_batch(*batch, tmp_path / "one")
    import_batch(*batch, tmp_path / "two")
    assert merge([tmp_path / "one"], tmp_path / "two").samples == 0


async def test_results_that_are_the_same_are_told_from_others_of_the_same_request(batch, tmp_path):
    requests, _ = batch
    rows = [*ROWS, ROWS[2], row("a", chat("another"), number=1)]
    imported = import_batch(requests, [written(tmp_path / "output.jsonl", rows)], tmp_path / "cache")
    assert (imported.repeated, imported.counts.samples, imported.counts.draws) == (1, 7, 5)
    with OpenAI(cache=tmp_path / "cache", mode="replay", base_url="https://api.openai.com/v1") as client:
        messages = [{"role": "user", "content": "one"}]
        texts = {
            client.chat.completions.create(model="gpt-4o-mini", messages=messages).choices[0].message.content
            for _ in range(3)
        }
    assert texts == {"first", "second", "another"}


async def test_what_cannot_be_matched_is_named(tmp_path):
    requests = written(
        tmp_path / "input.jsonl", [line("a", "one"), line("b", "two"), line("b", "three"), {"custom_id": "x"}]
    )
    output = written(tmp_path / "output.jsonl", [row("b", chat("which?")), row("z", chat("whose?"))])
    with output.open("ab") as file:
        file.write(b'{"custom_id": "a", "respo')
    left = [str(each) for each in import_batch(requests, [output], tmp_path / "cache").left]
    assert len(left) == 6
    for told in (
        "output.jsonl line 2 (z): no request has its custom_id",
        "output.jsonl line 3: it is not a result",
        "line 1 (a): there is no result for it",
        "line 2 (b): several lines have its custom_id",
        "line 3 (b): several lines have its custom_id",
        "line 4: it holds no request",
    ):
        assert any(each.startswith(told) for each in left), told


async def test_a_short_result_is_taken_and_named(tmp_path):
    requests = written(tmp_path / "input.jsonl", [line("a", "one", n=3)])
    output = written(tmp_path / "output.jsonl", [row("a", chat("1", "2"))])
    imported = import_batch(requests, [output], tmp_path / "cache")
    assert (imported.taken, imported.counts.samples) == (1, 2)
    assert "2 of 3 samples" in imported.left[0].why


async def test_requests_that_were_drawn_before_keep_their_samples(batch, tmp_path):
    requests, (output, _) = batch
    first = written(tmp_path / "first.jsonl", [row("a", chat("mine"), number=9)])
    import_batch(requests, [first], tmp_path / "cache", namespace="exp")
    imported = import_batch(requests, [output], tmp_path / "cache", namespace="exp")
    assert (imported.drawn_before, imported.taken, imported.counts.samples) == (1, 4, 6)
    found, report = await ran(
        tmp_path,
        REQUESTS[:1],
        cache=tmp_path / "cache",
        namespace="exp",
        base_url="https://api.openai.com/v1",
    )
    assert report.calls == 0
    assert found["a"]["response"]["body"]["choices"][0]["message"]["content"] == "mine"


async def test_another_scope_is_that_of_another_server(batch, tmp_path):
    import_batch(*batch, tmp_path / "cache", base_url="http://gpu-7:8000/v1")
    _, report = await ran(tmp_path, TAKEN, cache=tmp_path / "cache", base_url="http://gpu-7:8000/v1")
    assert (report.calls, report.failed) == (0, 0)


@pytest.mark.parametrize("kind", ["memory", "server"])
async def test_every_kind_of_store_takes_a_batch(batch, tmp_path, kind):
    store = MemoryStore() if kind == "memory" else RemoteStore(Session(MemoryEngine(), renews=False))
    assert import_batch(*batch, store, namespace="exp").counts.samples == 6
    assert import_batch(*batch, store, namespace="exp").counts.same == 4
    _, report = await ran(tmp_path, TAKEN, cache=store, namespace="exp", base_url="https://api.openai.com/v1")
    assert (report.calls, report.failed, report.hits) == (0, 0, 6)
    store.close()


async def test_a_known_provider_needs_no_key_for_an_import(batch, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    assert import_batch(*batch, tmp_path / "cache", base_url="openrouter").taken == 4
    store = DiskStore(tmp_path / "cache", read_only=True)
    assert {info.scope.partition("/api/")[0] for info in store.keys()} == {"https://openrouter.ai"}  # noqa: SIM118 - a store is no mapping
    store.close()


async def test_c6_a_batch_costs_half_and_no_budget_pays_for_it(batch, tmp_path):
    import_batch(*batch, tmp_path / "cache", namespace="exp")
    prices = Prices({"gpt-4o-mini": {"prompt": 1, "completion": 2}, "text-embedding-3-small": {"prompt": 1}})
    store = DiskStore(tmp_path / "cache", read_only=True)
    found = statements(store)
    store.close()
    assert "=exp" not in found
    (spent,) = [each.spent for each in found.values()]
    # Three calls of chat: 30 tokens of prompts at $1, 20 of answers at $2; one of embeddings: 4 at $1.
    assert spent.cost(prices.cost_of_sum)[0] == pytest.approx((30 + 2 * 20 + 4) / 2 / 1e6)
    assert [each.held.counts() == each.spent.counts() for each in found.values()] == [True]


async def test_results_of_run_are_refused(batch, tmp_path):
    requests, _ = batch
    import_batch(*batch, tmp_path / "cache")
    await ran(tmp_path, TAKEN, cache=tmp_path / "cache", base_url="https://api.openai.com/v1")
    with pytest.raises(BatchFileError, match=r"was written by `cachepipe run` \(line 1\)"):
        import_batch(requests, [tmp_path / "again.out.jsonl"], tmp_path / "cache")


def places(value, before=()):
    """The paths of all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield before
    for name, item in items:
        yield from places(item, (*before, name))


def changed(value, place, new):
    """A copy of a JSON value with another part."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


JUNK = [None, 0, -1, 1.5, True, "", "x", "\ud800", [], {}, [1], {"a": 1}, 10**30, float("nan"), [[[]]]]
CHANGES = [(number, place) for number, each in enumerate([*ROWS, *ERRORS]) for place in places(each)]


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(JUNK)), min_size=1, max_size=4))
def test_c8_no_malformed_result_stops_an_import_and_each_is_named(changes):
    rows = [*ROWS, *ERRORS]
    for (number, place), new in changes:
        with suppress(KeyError, IndexError, TypeError, AttributeError):  # an earlier change took the place
            rows[number] = changed(rows[number], place, new)
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        requests = written(Path(folder, "input.jsonl"), REQUESTS)
        results = Path(folder, "output.jsonl")
        results.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        first = import_batch(requests, [results], store)
        again = import_batch(requests, [results], store)
    store.close()
    named = {each.name for each in first.left}
    assert first.taken + len(named & {each["custom_id"] for each in REQUESTS}) >= len(REQUESTS)
    assert (again.counts.samples, again.counts.draws, again.taken) == (0, 0, first.taken)


def command(*arguments):
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


async def test_the_command_imports_a_batch_and_says_what_is_missing(batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ("output.jsonl", "errors.jsonl", "--requests", "input.jsonl", "--cache", "cache")
    code, out, err = command("import", *files, "--namespace", "exp")
    assert (code, err) == (1, "")
    assert "taken  4 of 7" in out
    assert "line 4 (d): the provider answered 400: content_policy: Not allowed." in out
    code, out, _ = command("import", *files, "--namespace", "exp", "--json")
    found = json.loads(out)
    assert (code, found["same"], found["samples"], len(found["left"])) == (1, 4, 0, 3)
    for wrong, told in {
        ("output.jsonl",): "Give the input of the batch: --requests",
        ("cache",): "`cachepipe merge` adds it to another one",
        ("output.jsonl", "--requests", "nothing.jsonl"): "nothing.jsonl cannot be read",
        ("output.jsonl", "--requests", "input.jsonl", "--scope", "a=b"): "give one --scope NEW",
    }.items():
        code, out, err = command("import", *wrong, "--cache", "other")
        assert (code, out) == (2, ""), err
        assert told in err
