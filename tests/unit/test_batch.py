"""Batch files: what a line means, what is refused before a call, the window, the output, and stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from importlib import import_module

import openai
import orjson
import pytest

from cachepipe import MemoryStore, runs, wire
from cachepipe.batch import BatchFileError, BatchSettings, Stop, files, run_file
from cachepipe.batch.draws import FileDraws
from cachepipe.batch.lines import parse_line
from cachepipe.batch.report import Report
from cachepipe.batch.runner import WINDOW
from cachepipe.errors import BadAnswer, StoreError
from cachepipe.models.openai import OpenAIModel
from cachepipe.providers.exchange import questions_of

pytestmark = pytest.mark.anyio

# The HTTP library that the SDK is built on: httpx2, or httpx before its third version.
http = import_module(
    type(openai.AsyncOpenAI(base_url="http://m", api_key="k").base_url).__module__.partition(".")[0]
)
HI = [{"role": "user", "content": "hi"}]
SECRET = "sk-never-to-be-seen"


class Client(openai.AsyncOpenAI):
    """The SDK's client, its calls answered here: at once, or when the test opens their gate."""

    def __init__(self, answer=None):
        super().__init__(base_url="http://model/v1", api_key=SECRET, http_client=http.AsyncClient())
        self.bodies = []
        self.answer = answer
        self.gates = {}
        self.begun = asyncio.Event()

    async def post(self, path, *, cast_to, body, options=None):
        self.bodies.append(body)
        self.begun.set()
        text = body["messages"][0]["content"] if "messages" in body else None
        if text in self.gates:
            await self.gates[text].wait()
        made = answer_to(body) if self.answer is None else self.answer(path, body)
        if isinstance(made, Exception):
            raise made
        return cast_to(200, content=made if isinstance(made, bytes) else orjson.dumps(made))

    async def asked(self, count):
        while len(self.bodies) < count:
            self.begun.clear()
            await self.begun.wait()


def answer_to(body):
    text = body["messages"][0]["content"]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": f"{text}/{i}"}, "finish_reason": "stop"}
        for i in range(body.get("n", 1))
    ]
    return {"id": "chat-1", "object": "chat.completion", "model": body["model"], "choices": choices}


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def texts(result):
    return [choice["message"]["content"] for choice in result["response"]["body"]["choices"]]


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
async def client():
    async with Client() as made:
        yield made


def nested(levels):
    """The JSON of a list in a list, and so on."""
    return "[" * levels + "]" * levels


def parsed(fields, number=7, **defaults):
    return parse_line(json.dumps(fields).encode(), number, BatchSettings(**{"model": "m", **defaults}))


# What a line means.


def test_a_prompt_is_one_user_message_and_the_other_fields_are_carried():
    line = parsed({"task_id": "T/1", "prompt": "hi", "entry_point": "f", "test": [1]})
    assert (line.custom_id, line.api, line.number) == ("T/1", wire.CHAT, 7)
    assert line.asks[0].question == {"model": "m", "messages": HI}
    assert line.carried == {"task_id": "T/1", "entry_point": "f", "test": [1]}


def test_a_line_s_own_settings_are_asked_and_win_over_the_defaults():
    line = parsed(
        {"messages": HI, "model": "own", "n": 3, "temperature": 0, "stop": ["x"], "top_p": None},
        n=5,
        temperature=1.0,
        max_tokens=9,
        seed=4,
    )
    assert line.asks[0].n == 3
    assert line.asks[0].question == {
        "model": "own",
        "messages": HI,
        "temperature": 0,
        "stop": ["x"],
        "max_tokens": 9,
        "seed": 4,
    }
    assert line.carried == {"model": "own", "n": 3, "temperature": 0, "stop": ["x"], "top_p": None}


def test_a_batch_request_is_its_body_at_its_url():
    body = {"model": "own", "messages": HI, "user": "u", "n": 2, "stream": True}
    line = parsed({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, "tag": 1})
    assert (line.custom_id, line.api, line.carried) == ("a", wire.CHAT, {"tag": 1})
    assert line.asks[0].question == {"model": "own", "messages": HI}
    assert (line.asks[0].n, line.asks[0].transport["user"]) == (2, "u")
    assert line.body == body


@pytest.mark.parametrize(
    ("url", "body", "question"),
    [
        ("/v1/completions", {"prompt": "p"}, {"temperature": 0.5, "max_tokens": 9, "seed": 4}),
        ("/v1/responses", {"input": "p"}, {"temperature": 0.5, "max_output_tokens": 9}),
        ("/v1/embeddings", {"input": "p"}, {}),
        ("/openai/v1/moderations", {"input": "p"}, {}),
    ],
)
def test_defaults_are_sent_where_the_api_has_them(url, body, question):
    line = parsed(
        {"url": url, "body": body}, temperature=0.5, max_tokens=9, max_completion_tokens=8, seed=4, n=1
    )
    assert line.asks[0].question == {**body, "model": "m", **question}


def test_a_limit_of_the_line_s_own_keeps_both_defaults_away():
    own = {"prompt": "hi", "max_completion_tokens": 3}
    question = parsed(own, max_tokens=9, max_completion_tokens=8).asks[0].question
    assert question["max_completion_tokens"] == 3
    assert "max_tokens" not in question
    assert parsed({"prompt": "hi"}, max_completion_tokens=8).asks[0].question["max_completion_tokens"] == 8


def test_functions_are_asked_once_whatever_n():
    line = parsed({"url": "/v1/embeddings", "body": {"input": ["a", "b"]}}, n=5)
    assert [ask.n for ask in line.asks] == [1, 1]
    assert [ask.question["input"] for ask in line.asks] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "custom_id"),
    [
        ({"custom_id": "c", "id": "i", "task_id": "t"}, "c"),
        ({"id": 12, "task_id": "t"}, "12"),
        ({"task_id": "t"}, "t"),
        ({"custom_id": None}, "7"),
        ({}, "7"),
    ],
)
def test_the_id_is_custom_id_or_id_or_task_id_or_the_line_s_number(fields, custom_id):
    assert parsed({"prompt": "hi", **fields}).custom_id == custom_id


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("NaN", "must be a JSON object; got nan"),
        ('{"prompt": "a", "seed": %s}' % ("1" * 4301), "an integer of more than 4,300 digits"),
        ("{}", "holds no request"),
        ('{"question": "q"}', "it has question"),
        ('{"prompt": ["a"]}', "prompt must be a string"),
        ('{"prompt": null}', "prompt must be a string"),
        ('{"messages": []}', "must be a list of messages"),
        ('{"messages": ["hi"]}', "must be a list of messages"),
        ('{"prompt": "a", "custom_id": ["x"]}', "custom_id must be a string"),
        ('{"prompt": "a", "id": true}', "id must be a string"),
        ('{"prompt": "a", "n": 0}', "n must be a whole number"),
        ('{"prompt": "a", "n": "2"}', "n must be a whole number"),
        ('{"url": "/v1/chat/completions"}', "body must be a JSON object"),
        ('{"method": "GET", "url": "/v1/models", "body": {}}', "method must be POST"),
        ('{"url": "/v1/images/generations", "body": {}}', "url must be one of /v1/chat/completions"),
        ('{"url": "http://elsewhere/v1/chat/completions", "body": {}}', "The server is --base-url"),
        ('{"url": "/v1/chat/completions?key=k", "body": {}}', "url must be one of"),
        ('{"url": "/v1/messages", "body": {}}', "url must be one of"),
        ('{"url": "/v1/responses", "body": {"input": "a", "background": true}}', "cannot be run from a file"),
        ('{"url": "/v1/embeddings", "body": {"input": []}}', "cannot be run from a file"),
        (f'{{"prompt": "a", "note": {nested(300)}}}', "it is nested too deeply"),
        (f'{{"url": "/v1/responses", "body": {{"input": {nested(900)}}}}}', "it is nested too deeply"),
    ],
)
def test_a_malformed_line_says_what_was_expected(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_line(text.encode(), 1, BatchSettings(model="m"))


def test_a_line_needs_a_model_and_apis_of_one_answer_refuse_more():
    with pytest.raises(ValueError, match="names no model"):
        parse_line(b'{"prompt": "a"}', 1, BatchSettings())
    with pytest.raises(ValueError, match="gives one answer per request, and n is 5"):
        parsed({"url": "/v1/responses", "body": {"input": "a"}}, n=5)


# What is refused before the first call.


async def test_each_bad_line_is_named_by_its_number_before_any_call(paths, client):
    source, target = paths
    write(
        source, [{"prompt": "a"}, "", "oops", {"id": 1, "prompt": "b"}, {"id": "1", "prompt": "c"}, {"x": 1}]
    )
    with pytest.raises(BatchFileError) as caught:
        await run_file(source, target, client=client, model="m", cache=MemoryStore())
    told = str(caught.value)
    assert "line 3: it is not valid JSON" in told
    assert "line 4: custom_id '1' is already that of line 1" in told
    assert "line 5: custom_id '1' is already that of line 1" in told
    assert "line 6: it holds no request" in told
    assert client.bodies == []
    assert names(source.parent) == ["in.jsonl"]


async def test_a_hopeless_file_is_not_quoted_in_full(paths):
    source, target = paths
    write(source, ["oops"] * 1000)
    with pytest.raises(BatchFileError, match="there may be more") as caught:
        await run_file(source, target, model="m", cache=MemoryStore())
    assert str(caught.value).count("line ") == 10


async def test_a_mark_at_the_start_and_dos_line_ends_are_no_mistake(paths, client):
    source, target = paths
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    assert [(line["custom_id"], texts(line)) for line in read(target)] == [("1", ["a/0"]), ("3", ["b/0"])]


async def test_an_empty_file_has_an_empty_result(paths):
    source, target = paths
    source.write_text("\n")
    report = await run_file(source, target, model="m", cache=MemoryStore())
    assert (report.requests, report.output, target.read_text()) == (0, target, "")


@pytest.mark.parametrize(
    "problem", ["missing", "folder", "pipe", "no folder", "same", "target is a folder", "long name"]
)
async def test_files_that_cannot_be_read_or_written_are_refused(paths, tmp_path, problem):
    source, target = paths
    write(source, [{"prompt": "a"}])
    source, target, complaint = {
        "missing": (tmp_path / "none", target, "none cannot be read: No such file"),
        "folder": (tmp_path, target, "cannot be read: Is a directory"),
        "pipe": (tmp_path / "pipe", target, "is not a regular file"),
        "no folder": (source, tmp_path / "none" / "out", "there is no folder"),
        "same": (source, tmp_path / "." / "in.jsonl", "is also the input"),
        "target is a folder": (source, tmp_path, "is a folder"),
        "long name": (tmp_path / ("x" * 300), target, "xxx cannot be read: File name too long"),
    }[problem]
    if problem == "pipe":
        os.mkfifo(source)
        threading.Thread(target=source.write_text, args=("",), daemon=True).start()
    with pytest.raises(BatchFileError, match=complaint):
        await run_file(source, target, model="m", cache=MemoryStore())


@pytest.mark.parametrize("linked", [False, True])
async def test_results_are_never_written_through_a_file_that_is_the_input(tmp_path, linked):
    source = write(tmp_path / "out.jsonl.partial", [{"prompt": "a"}])
    before = source.read_bytes()
    given = tmp_path / "in.jsonl" if linked else source
    if linked:
        given.symlink_to(source)
    with pytest.raises(BatchFileError, match="which is the input"):
        await run_file(given, tmp_path / "out.jsonl", model="m", cache=MemoryStore())
    assert source.read_bytes() == before


async def test_what_nests_as_deep_as_a_line_may_is_carried_to_its_result(paths, client):
    source, target = paths
    write(source, [f'{{"prompt": "a", "error": {nested(250)}, "note": {nested(251)}}}'])
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    (line,) = read(target)
    assert json.dumps(line["note"]) == nested(251)
    assert json.dumps(line["cachepipe"]["carried"]["error"]) == nested(250)


async def test_the_first_so_many_requests_can_be_run_alone(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, "", {"prompt": "b"}, "oops"])
    report = await run_file(source, target, client=client, model="m", cache=MemoryStore(), limit=2)
    assert [line["custom_id"] for line in read(target)] == ["1", "3"]
    assert report.requests == 2


# Order, window and memory.


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_lines_are_held_only_a_window_ahead_of_the_slowest_and_written_in_order(
    paths, client, concurrency
):
    source, target = paths
    write(source, [{"prompt": f"p{i}"} for i in range(60)])
    slow = client.gates["p0"] = asyncio.Event()
    window = WINDOW * concurrency
    ended = asyncio.Event()

    def watch(report):
        assert report.in_flight <= concurrency
        if report.done == window - 1:
            ended.set()

    running = asyncio.create_task(
        run_file(
            source,
            target,
            client=client,
            model="m",
            cache=MemoryStore(),
            concurrency=concurrency,
            progress=watch,
        )
    )
    if concurrency > 1:
        await ended.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(client.bodies) == window
    else:
        await client.asked(1)
    assert not target.exists()
    slow.set()
    report = await running
    assert report.most_ahead == (window if concurrency > 1 else report.most_ahead) <= window
    assert [texts(line) for line in read(target)] == [[f"p{i}/0"] for i in range(60)]


async def test_c2_the_occurrences_of_a_large_file_are_counted_in_a_temporary_file(paths, client, monkeypatch):
    counts = []

    class Small(runs.Occurrences):
        def __init__(self, kept=10):
            super().__init__(min(kept, 10))
            counts.append(self._next)

    monkeypatch.setattr(runs, "Occurrences", Small)
    source, target = paths
    lines = [{"prompt": f"p{i % 300}"} for i in range(600)]
    write(source, lines)
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a"}
    await run_file(source, target, **settings)
    assert any(counted.spilled for counted in counts)
    assert all(len(counted) <= 10 + 256 for counted in counts)
    first = [line["cachepipe"]["indices"] for line in read(target)]
    assert first == [[i // 300] for i in range(600)]
    again = await run_file(source, target, **settings)
    assert (again.calls, again.hits) == (0, 600)
    assert [line["cachepipe"]["indices"] for line in read(target)] == first


async def test_c1_a_replay_counts_claims_in_memory_to_its_end(paths, client):
    source, target = paths
    write(source, [{"prompt": "same"} for _ in range(35)])
    store = MemoryStore()
    await run_file(source, target, client=client, model="m", cache=store, namespace="a")
    write(source, [{"id": f"other {i}", "prompt": "same"} for i in range(35)])
    await run_file(
        source, target, client=client, model="m", cache=store, namespace="b", mode="replay", ids=True
    )
    assert sorted(line["cachepipe"]["indices"] for line in read(target)) == [[i] for i in range(35)]


# Whose draw a line is.


async def test_c2_a_line_draws_by_its_question_and_how_many_earlier_lines_ask_it(paths, client):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a"}
    first = [{"id": "x", "prompt": "same"}, {"id": "y", "prompt": "other"}, {"id": "z", "prompt": "same"}]
    write(source, first)
    assert (await run_file(source, target, **settings)).generated == 3
    edited = [{"prompt": "new"}, {"prompt": "same", "note": 1}, {"custom_id": "q", "prompt": "same"}]
    write(source, edited)
    assert (await run_file(source, target, **settings)).generated == 1
    assert [line["cachepipe"]["indices"] for line in read(target)] == [[0], [0], [1]]
    write(source, [*edited, {"prompt": "same"}])
    assert (await run_file(source, target, **settings)).generated == 1


async def test_c2_lines_of_different_n_are_numbered_by_lines(paths, client):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a"}
    write(source, [{"prompt": "same", "n": 2}, {"prompt": "same", "n": 3}])
    assert (await run_file(source, target, **settings)).generated == 5
    first = [line["cachepipe"]["indices"] for line in read(target)]
    write(source, [{"prompt": "same", "n": 4}, {"prompt": "same", "n": 3}])
    assert (await run_file(source, target, **settings)).generated == 2
    again = [line["cachepipe"]["indices"] for line in read(target)]
    assert (again[0][:2], again[1]) == (first[0], first[1])


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_c2_a_line_that_fails_keeps_its_number(paths, client, concurrency):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "concurrency": concurrency}
    write(source, [{"prompt": "same"}] * 3)
    first = api_error(openai.InternalServerError, 500, b"{}")
    answers = iter([first, *[None] * 9])
    client.answer = lambda _, body: next(answers) or answer_to(body)
    failed = await run_file(source, target, **settings)
    stands = {i: line["cachepipe"]["indices"] for i, line in enumerate(read(target)) if not line["error"]}
    assert len(stands) == 3 - failed.failed
    assert failed.failed
    again = await run_file(source, target, **settings)
    assert (again.failed, again.generated, again.hits) == (0, failed.failed, len(stands))
    after = [line["cachepipe"]["indices"] for line in read(target)]
    assert sorted(after) == [[0], [1], [2]]
    assert {i: after[i] for i in stands} == stands


async def test_c2_a_limit_changes_no_draw(paths, client):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore()}
    write(source, [{"prompt": text} for text in "aabab"])
    assert (await run_file(source, target, **settings, limit=3)).generated == 3
    whole = await run_file(source, target, **settings)
    assert (whole.hits, whole.generated) == (3, 2)
    assert [line["cachepipe"]["indices"] for line in read(target)] == [[0], [1], [0], [2], [1]]


async def test_c2_each_question_of_a_line_is_counted_by_itself(paths, client):
    source, target = paths
    client.answer = lambda _, body: {
        "model": "m",
        "choices": [
            {"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(body["prompt"])
        ]
        if isinstance(body["prompt"], list)
        else [{"index": 0, "text": body["prompt"], "finish_reason": "stop"}],
    }
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a"}

    def ask(prompt):
        return {"url": "/v1/completions", "body": {"prompt": prompt}}

    write(source, [ask(["a", "b"]), ask(["b", "c"])])
    assert (await run_file(source, target, **settings)).generated == 4
    write(source, [ask("c"), ask(["b", "a", "b"])])
    assert (await run_file(source, target, **settings)).generated == 0
    assert [line["cachepipe"]["indices"] for line in read(target)] == [[0], [0, 0, 1]]


async def test_c1_ids_tell_draws_apart_when_asked_to(paths, client):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a", "ids": True}
    write(source, [{"id": "x", "prompt": "same"}, {"id": "y", "prompt": "same"}])
    await run_file(source, target, **settings)
    first = {line["custom_id"]: line["cachepipe"]["indices"] for line in read(target)}
    write(
        source, [{"id": "y", "prompt": "same"}, {"id": "z", "prompt": "same"}, {"id": "x", "prompt": "same"}]
    )
    assert (await run_file(source, target, **settings)).generated == 1
    assert {line["custom_id"]: line["cachepipe"]["indices"] for line in read(target)}.items() >= first.items()


async def test_c1_each_replicate_has_samples_of_its_own_and_replays_them(paths, client):
    source, target = paths
    write(source, [{"prompt": "same"}, {"prompt": "same"}])
    settings = BatchSettings(client=client, model="m", cache=MemoryStore(), namespace="a")
    seen = {}
    for replicate, generated in ((None, 2), (1, 2), ("2", 2), ("1", 0), (2, 0), (None, 0)):
        assert (await run_file(source, target, settings, replicate=replicate)).generated == generated
        indices = [line["cachepipe"]["indices"] for line in read(target)]
        assert seen.setdefault(str(replicate), indices) == indices
    assert sorted(index for indices in seen.values() for [index] in indices) == list(range(6))
    other = await run_file(source, target, settings, namespace="b", replicate=1)
    assert other.generated == 0


def by_replicate(path):
    """The index that each line drew, and its place in the file, by replicate."""
    drawn = {}
    for line in read(path):
        drawn.setdefault(line["cachepipe"]["replicate"], []).append(
            (line["custom_id"], line["cachepipe"]["indices"])
        )
    return drawn


async def test_c1_a_file_is_run_once_per_replicate_and_c2_each_alone_replays_its_own(paths, client):
    source, target = paths
    write(source, [{"prompt": text} for text in ("a", "b", "a")])
    settings = BatchSettings(client=client, model="m", cache=MemoryStore(), namespace="x")
    report = await run_file(source, target, settings, replicates=3)
    assert (report.requests, report.done, report.generated) == (9, 9, 9)
    whole = by_replicate(target)
    assert [line["custom_id"] for line in read(target)] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert list(whole) == [0, 1, 2]
    of_a = [indices for drawn in whole.values() for name, indices in drawn if name != "2"]
    assert sorted(of_a) == [[index] for index in range(6)]
    for replicate in ("1", 2, 0):
        assert (await run_file(source, target, settings, replicate=replicate)).generated == 0
        assert by_replicate(target) == {replicate: whole[int(replicate)]}
    more = await run_file(source, target, settings, replicates=5)
    assert (more.hits, more.generated) == (9, 6)
    assert by_replicate(target).items() >= whole.items()
    assert (await run_file(source, target, settings, namespace="y", replicates=5)).generated == 0
    assert by_replicate(target).items() >= whole.items()


async def test_c4_the_replicates_of_a_line_travel_in_one_call(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "concurrency": 20}
    await run_file(source, target, **settings, replicates=10)
    assert [body["n"] for body in client.bodies] == [10, 10]
    assert [texts(line) for line in read(target)] == [[f"{text}/{i}"] for text in "ab" for i in range(10)]


async def test_c8_a_replicate_that_fails_is_asked_alone_in_the_rerun(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "concurrency": 1, "replicates": 3}

    def answer(_, body):
        fails = len(client.bodies) == 5
        return api_error(openai.InternalServerError, 500, b"{}") if fails else answer_to(body)

    client.answer = answer
    report = await run_file(source, target, **settings)
    assert (report.done, report.failed) == (6, 1)
    [failed] = [line for line in read(target) if line["error"]]
    assert (failed["custom_id"], failed["cachepipe"]["replicate"]) == ("2", 1)
    client.answer = None
    report = await run_file(source, target, **settings)
    assert (report.hits, report.generated) == (5, 1)


async def test_a_run_that_is_stopped_among_replicates_is_resumed(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    stop = Stop()

    def watch(report):
        if report.done == 2:
            stop.soon()

    settings = {"client": client, "model": "m", "cache": MemoryStore(), "concurrency": 1, "replicates": 3}
    report = await run_file(source, target, **settings, stop=stop, progress=watch)
    assert (report.interrupted, report.requests, report.done) == (True, 6, 2)
    assert by_replicate(report.partial) == {0: [("1", [0])], 1: [("1", [1])]}
    report = await run_file(source, target, **settings)
    assert (report.done, report.hits, report.generated) == (6, 2, 4)
    assert not report.interrupted


async def test_an_error_of_one_replicate_keeps_no_result_of_another(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    settings = BatchSettings(client=client, model="m", cache=MemoryStore())
    await run_file(source, target, settings, replicate=1)
    client.answer = lambda *_: api_error(openai.InternalServerError, 500, b"{}")
    report = await run_file(source, target, settings, replicate=2)
    assert (report.failed, report.kept) == (1, 0)


async def test_c2_with_ids_a_line_without_one_draws_by_its_question(paths, client):
    source, target = paths
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "namespace": "a", "ids": True}
    write(source, [{"prompt": "same"}])
    await run_file(source, target, **settings)
    write(source, [{"prompt": "inserted"}, {"prompt": "same"}])
    assert (await run_file(source, target, **settings)).generated == 1


async def test_a_rerun_in_one_process_is_a_replay_whatever_else_is_open(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "a"}])
    store = MemoryStore()
    for calls in (2, 0, 0):
        client.bodies.clear()
        with runs.run():
            report = await run_file(source, target, client=client, model="m", cache=store)
        assert (len(client.bodies), report.calls) == (min(calls, 1), min(calls, 1))


# Results.


async def test_a_result_is_openai_s_with_flags_and_carried_fields(paths, client):
    source, target = paths
    write(source, [{"task_id": "T/0", "prompt": "a", "response": "gold", "note": {"x": [1]}}])
    settings = {"client": client, "model": "m", "cache": MemoryStore(), "n": 2}
    await run_file(source, target, **settings)
    (line,) = read(target)
    assert list(line)[:5] == ["id", "custom_id", "response", "error", "cachepipe"]
    assert line["id"].startswith("batch_req_")
    assert (line["custom_id"], line["task_id"], line["note"]) == ("T/0", "T/0", {"x": [1]})
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "chat-1")
    assert line["error"] is None
    key = line["cachepipe"]["key"]
    assert key.startswith("k2-")
    assert line["cachepipe"] == {
        "cached": [False, False],
        "duplicated": [False, True],
        "indices": [0, 1],
        "replicate": None,
        "key": key,
        "carried": {"response": "gold"},
    }
    await run_file(source, target, **settings)
    (again,) = read(target)
    assert again["cachepipe"].pop("cached") == [True, True]
    line["cachepipe"].pop("cached")
    assert again == line


def api_error(kind, status, body, headers=()):
    request = http.Request("POST", "http://model/v1")
    response = http.Response(status, content=body, request=request, headers=dict(headers))
    return kind("told", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "code", "message", "status"),
    [
        (
            api_error(openai.BadRequestError, 400, b'{"error":{"message":"too long","code":"long"}}'),
            "long",
            "too long",
            400,
        ),
        (api_error(openai.InternalServerError, 502, b"<html>"), "http_502", "told", 502),
        (
            openai.APITimeoutError(request=http.Request("POST", "http://model")),
            "timeout",
            "Request timed out: http://model has not answered in time, or broke off.",
            None,
        ),
        (
            openai.APIConnectionError(request=http.Request("POST", "http://model")),
            "connection_error",
            "Connection error: http://model has not answered in time, or broke off.",
            None,
        ),
        (BadAnswer("broken"), "bad_answer", "broken", None),
        (StoreError("full"), "store_error", "full", None),
        (RuntimeError(), "RuntimeError", "RuntimeError", None),
        (StoreError("no file \udcff"), "store_error", "no file \\udcff", None),
        (api_error(openai.InternalServerError, 500, nested(254).encode()), "http_500", "told", 500),
    ],
    ids=lambda value: None if isinstance(value, Exception) else str(value)[:20],
)
async def test_c8_whatever_fails_becomes_an_error_line_and_the_others_are_answered(
    paths, client, error, code, message, status
):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "bad"}, {"prompt": "b"}])
    store = MemoryStore()
    client.answer = lambda _, body: error if body["messages"][0]["content"] == "bad" else answer_to(body)
    report = await run_file(source, target, client=client, model="m", cache=store)
    first, bad, last = read(target)
    assert (texts(first), texts(last)) == (["a/0"], ["b/0"])
    assert bad["error"] == {"code": code, "message": message}
    assert (bad["response"] or {}).get("status_code") == status
    assert bad["cachepipe"]["cached"] == []
    assert bad["cachepipe"]["key"].startswith("k2-")
    assert (report.failed, report.errors, report.example, report.output) == (1, {code: 1}, message, target)
    client.answer = None
    client.bodies.clear()
    again = await run_file(source, target, client=client, model="m", cache=store)
    assert [body["messages"][0]["content"] for body in client.bodies] == ["bad"]
    assert (again.failed, again.hits, again.generated) == (0, 2, 1)
    assert texts(read(target)[1]) == ["bad/0"]


async def test_a_cause_is_told_where_the_sdk_only_says_that_it_failed(paths, client):
    source, target = paths
    error = openai.APIConnectionError(request=http.Request("POST", "http://model"))
    error.__cause__ = OSError("no route to it")
    client.answer = lambda *_: error
    write(source, [{"prompt": "a"}])
    report = await run_file(source, target, client=client, model="m", cache=MemoryStore())
    assert report.example == "Connection error: http://model cannot be reached (no route to it)."


async def test_a_key_that_a_server_repeats_is_blotted_out(paths, client, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://someone:pass%2Fword@model/v1")
    source, target = paths
    body = orjson.dumps(
        {"error": {"message": f"wrong key {SECRET} of someone with pass/word", "code": SECRET}}
    )
    client.answer = lambda *_: api_error(openai.AuthenticationError, 401, body)
    write(source, [{"prompt": f"what is {SECRET}?", "note": SECRET}])
    report = await run_file(source, target, client=client, model="m", cache=MemoryStore())
    (line,) = read(target)
    assert line.pop("note") == SECRET  # what the caller wrote is the caller's
    assert SECRET not in json.dumps(line)
    assert line["error"]["message"] == "wrong key *** of *** with ***"
    assert report.example == "wrong key *** of *** with ***"
    assert SECRET not in repr(report)


async def test_numbers_that_hold_the_digits_of_a_password_stay_numbers(paths, client, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://someone:123456@model/v1")
    source, target = paths
    body = {"error": {"message": "not 123456"}, "at": 1234567890, "123456": None}
    client.answer = lambda *_: api_error(openai.AuthenticationError, 401, orjson.dumps(body))
    write(source, [{"prompt": "a"}])
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    (line,) = read(target)
    assert line["response"]["body"] == {"error": {"message": "not ***"}, "at": 1234567890, "***": None}


async def test_moderations_are_functions_of_each_input(paths, client):
    source, target = paths
    client.answer = lambda _, body: {
        "id": "mod",
        "model": "m",
        "results": [{"flagged": text == "bad"} for text in body["input"]],
    }
    line = {"url": "/v1/moderations", "body": {"input": ["good", "bad"]}}
    write(source, [line])
    report = await run_file(source, target, client=client, cache=MemoryStore())
    (result,) = read(target)
    assert [item["flagged"] for item in result["response"]["body"]["results"]] == [False, True]
    assert result["cachepipe"]["key"] is None
    assert len(result["cachepipe"]["keys"]) == 2
    assert (report.calls, report.generated, client.bodies) == (1, 2, [{"input": ["good", "bad"]}])


# Tokens and money.


def counted(body, model="gpt-4o-mini-2024-07-18", completion=1_000):
    """An answer with usage, such as a provider's: a prompt of 2,000 tokens and 1,000 for each sample."""
    n = body.get("n", 1)
    usage = {"prompt_tokens": 2_000, "completion_tokens": n * completion}
    usage["total_tokens"] = sum(usage.values())
    return {**answer_to(body), "model": model, "usage": usage}


async def test_c6_tokens_cost_what_the_model_costs_also_behind_another_host(paths, client):
    source, target = paths
    client.answer = lambda _, body: counted(body)
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    settings = {"client": client, "model": "alias", "cache": MemoryStore(), "n": 3}
    first = (await run_file(source, target, **settings)).as_dict()
    assert first["spent"]["cost"] == pytest.approx(2 * (0.0003 + 3 * 0.0006))  # 0.15 and 0.60 a million
    assert first["saved"]["cost"] == pytest.approx(0)
    again = (await run_file(source, target, **settings)).as_dict()
    assert (again["spent"]["cost"], again["billed"]["cost"]) == (0, 0)
    assert again["saved"]["cost"] == pytest.approx(first["spent"]["cost"])
    assert again["saved"]["total_tokens"] == 10_000


async def test_c6_what_has_no_usage_or_price_is_counted_and_costs_not_nothing(paths, client):
    source, target = paths
    answers = {
        "priced": counted,
        "unpriced": lambda body: counted(body, model="ours"),
        "unknown": answer_to,
    }
    client.answer = lambda _, body: answers[body["messages"][0]["content"]](body)
    write(source, [{"prompt": name} for name in answers])
    spent = (await run_file(source, target, client=client, model="m", cache=MemoryStore())).as_dict()["spent"]
    assert (spent["samples"], spent["unknown"], spent["unpriced"]) == (3, 1, 2)
    assert (spent["total_tokens"], spent["cost"]) == (6_000, pytest.approx(0.0009))
    write(source, [{"prompt": "unknown"}])
    spent = (await run_file(source, target, client=client, model="m", cache=MemoryStore())).as_dict()["spent"]
    assert (spent["total_tokens"], spent["unknown"], spent["cost"]) == (0, 1, None)


async def test_c6_of_lines_with_several_questions_each_prompt_counts_as_asked(paths, client):
    source, target = paths
    client.answer = lambda _, body: {
        "model": "text-embedding-3-small",
        "data": [{"index": i, "embedding": [0.5]} for i in range(len(body["input"]))],
        "usage": {"prompt_tokens": 10 * len(body["input"]), "total_tokens": 10 * len(body["input"])},
    }
    write(source, [{"url": "/v1/embeddings", "body": {"input": ["aa", "bb", "aa"]}}])
    figures = (await run_file(source, target, client=client, model="m", cache=MemoryStore())).as_dict()
    assert figures["as_asked"]["prompt_tokens"] == 30
    assert (figures["billed"]["prompt_tokens"], figures["saved"]["prompt_tokens"]) == (20, 10)
    assert figures["spent"] == figures["billed"]


# The output file.


async def test_an_older_result_stands_until_the_new_one_is_complete(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    target.write_text("older")
    target.chmod(0o640)
    gate = client.gates["b"] = asyncio.Event()
    running = asyncio.create_task(run_file(source, target, client=client, model="m", cache=MemoryStore()))
    await client.asked(2)
    assert target.read_text() == "older"
    with pytest.raises(BatchFileError, match="another run is writing"):
        await run_file(source, target, client=client, model="m", cache=MemoryStore())
    gate.set()
    await running
    assert len(read(target)) == 2
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(source.parent) == ["in.jsonl", "out.jsonl"]


async def test_earlier_results_that_cannot_be_read_are_not_replaced(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    client.answer = lambda *_: api_error(openai.InternalServerError, 500, b"{}")
    with pytest.raises(BatchFileError, match="cannot be read to keep them: Is a directory"):
        await run_file(
            source,
            target,
            client=client,
            model="m",
            cache=MemoryStore(),
            progress=lambda _: target.mkdir(exist_ok=True),
        )
    assert target.is_dir()


async def test_what_a_killed_run_left_behind_is_no_part_of_the_result(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    target.with_name("out.jsonl.partial").write_text("left behind, longer than what will be written" * 100)
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    assert len(read(target)) == 1


async def test_a_link_to_a_result_stays_a_link(paths, client, tmp_path):
    source, target = paths
    (tmp_path / "elsewhere").mkdir()
    target.symlink_to(tmp_path / "elsewhere" / "real.jsonl")
    write(source, [{"prompt": "a"}])
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    assert target.is_symlink()
    assert len(read(tmp_path / "elsewhere" / "real.jsonl")) == 1


async def test_a_link_that_leads_in_a_circle_gives_way_to_the_result(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    target.symlink_to(target)
    await run_file(source, target, client=client, model="m", cache=MemoryStore())
    assert [texts(line) for line in read(target)] == [["a/0"]]


async def test_a_pipe_takes_the_lines_as_they_come(paths, client, tmp_path):
    source, _ = paths
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    pipe, came = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: came.extend(pipe.read_text().splitlines()))
    reader.start()
    await run_file(source, pipe, client=client, model="m", cache=MemoryStore())
    reader.join()
    assert [texts(json.loads(line)) for line in came] == [["a/0"], ["b/0"]]


async def test_a_run_that_waits_for_the_reader_of_a_pipe_can_be_stopped(paths, client, tmp_path, monkeypatch):
    source, _ = paths
    write(source, [{"prompt": "a"}])
    pipe, stop, looked = tmp_path / "pipe", Stop(), asyncio.Event()
    os.mkfifo(pipe)
    usual = os.open

    def watched(path, *rest, **more):
        if path == pipe:
            looked.set()
        return usual(path, *rest, **more)

    monkeypatch.setattr(files.os, "open", watched)
    running = asyncio.create_task(
        run_file(source, pipe, client=client, model="m", cache=MemoryStore(), stop=stop)
    )
    await looked.wait()
    stop.soon()
    report = await running
    assert (report.interrupted, report.requests, report.done, client.bodies) == (True, 1, 0, [])


@pytest.mark.parametrize("change", ["other", "shorter", "broken"])
async def test_an_input_that_changes_meanwhile_is_told_and_makes_no_result(
    paths, client, monkeypatch, change
):
    monkeypatch.setattr(files, "_READ", 1)
    source, target = paths
    write(source, [{"prompt": "a" * 70_000}, {"prompt": "b" * 70_000}])

    def watch(report):
        if report.done == 1:
            text = {"other": {"prompt": "c" * 70_000}, "shorter": None, "broken": "oops" * 20_000}[change]
            write(source, [{"prompt": "a" * 70_000}, *([] if text is None else [text])])

    with pytest.raises(BatchFileError, match="has changed during the run"):
        await run_file(
            source, target, client=client, model="m", cache=MemoryStore(), concurrency=1, progress=watch
        )
    assert not target.exists()


async def test_lines_that_are_added_meanwhile_are_left_for_the_next_run(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])

    def watch(_report):
        write(source, [{"prompt": "a"}, {"prompt": "b"}])

    await run_file(source, target, client=client, model="m", cache=MemoryStore(), progress=watch)
    assert len(read(target)) == 1


# Stopping.


async def test_a_stopped_run_awaits_what_is_in_flight_and_begins_nothing_new(paths, client):
    source, target = paths
    write(source, [{"prompt": f"p{i}"} for i in range(9)])
    gates = [client.gates.setdefault(f"p{i}", asyncio.Event()) for i in range(9)]
    stop, store = Stop(), MemoryStore()
    settings = {"client": client, "model": "m", "cache": store, "concurrency": 3}
    running = asyncio.create_task(run_file(source, target, **settings, stop=stop))
    await client.asked(3)
    stop.soon()
    stop.soon()
    for gate in gates:
        gate.set()
    report = await running
    assert (report.interrupted, report.done, report.output) == (True, 3, None)
    assert len(client.bodies) == 3
    assert [texts(line) for line in read(report.partial)] == [["p0/0"], ["p1/0"], ["p2/0"]]
    assert not target.exists()
    again = await run_file(source, target, **settings)
    assert (again.hits, again.generated) == (3, 6)
    assert len(client.bodies) == 9
    assert len(read(target)) == 9
    assert not report.partial.exists()


@pytest.mark.parametrize("how", ["now", "grace"])
async def test_a_run_that_is_stopped_at_once_waits_for_nothing(paths, client, how):
    source, target = paths
    write(source, [{"prompt": f"p{i}"} for i in range(9)])
    client.gates = {f"p{i}": asyncio.Event() for i in range(1, 9)}
    stop = Stop()
    running = asyncio.create_task(
        run_file(
            source,
            target,
            client=client,
            model="m",
            cache=MemoryStore(),
            concurrency=3,
            stop=stop,
            grace=0 if how == "grace" else 1000,
        )
    )
    await client.asked(4)
    stop.soon() if how == "grace" else stop.now()
    report = await running
    assert (report.interrupted, report.done) == (True, 1)
    assert [texts(line) for line in read(report.partial)] == [["p0/0"]]


async def test_a_run_that_is_stopped_before_its_first_result_leaves_no_file(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    client.gates["a"] = asyncio.Event()
    stop = Stop()
    running = asyncio.create_task(
        run_file(source, target, client=client, model="m", cache=MemoryStore(), stop=stop)
    )
    await client.asked(1)
    stop.now()
    report = await running
    assert (report.interrupted, report.partial, names(source.parent)) == (True, None, ["in.jsonl"])


async def test_a_run_that_is_stopped_while_the_file_is_checked_asks_nothing(paths, client):
    source, target = paths
    write(source, [{"prompt": "a"}])
    stop = Stop()
    stop.soon()
    report = await run_file(source, target, client=client, model="m", cache=MemoryStore(), stop=stop)
    assert (report.interrupted, client.bodies) == (True, [])


async def test_a_cancelled_run_leaves_no_task_behind(paths, client):
    source, target = paths
    write(source, [{"prompt": f"p{i}"} for i in range(5)])
    client.gates = {f"p{i}": asyncio.Event() for i in range(5)}
    before = asyncio.all_tasks()
    running = asyncio.create_task(run_file(source, target, client=client, model="m", cache=MemoryStore()))
    await client.asked(5)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == before


async def test_settings_that_make_no_sense_are_refused(paths):
    source, target = paths
    with pytest.raises(ValueError, match="at least 1"):
        await run_file(source, target, concurrency=0)
    with pytest.raises(ValueError, match="at least 1"):
        await run_file(source, target, limit=0)
    for odd in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="replicates must be a whole number"):
            await run_file(source, target, replicates=odd)
    with pytest.raises(ValueError, match="give only one"):
        await run_file(source, target, replicates=3, replicate=1)
    with pytest.raises(ValueError, match="the same samples in all replicates"):
        await run_file(source, target, replicates=3, repeat="same")


@pytest.mark.parametrize("scope", [None, "mine", "https://old.example/v1"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "n": 2},
        {"url": "/v1/embeddings", "body": {"model": "m", "input": ["a", "b"]}},
    ],
)
async def test_c9_a_line_has_the_keys_of_its_scope(fields, scope):
    model = OpenAIModel("m", base_url="https://api.example/v1", api_key="none")
    settings = BatchSettings(model="m", scope=scope)
    with contextlib.closing(MemoryStore()) as store:
        draws = FileDraws(model, store, settings, Report())
        [draw] = draws.draws(line := parse_line(json.dumps(fields).encode(), 1, settings))
        url, (questions, _, _) = draws.planned(draw)
        assert questions == questions_of(line.api, line.asks, url, {}, scope=scope)
        assert draws.exchange(draw).questions == questions
        await draws.close()
    other = FileDraws(model, store, BatchSettings(model="m", scope="other"), Report())
    assert [each.id for each in other.draws(line)] == [draw.id]  # results are found whatever the scope
