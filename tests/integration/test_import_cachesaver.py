"""Folders of CacheSaver 0.0.6 become samples of the requests that are given with them; nothing is unpickled.

``tests/data/cachesaver/cache`` was made by CacheSaver itself; ``make.py`` beside it says how.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from pathlib import Path

import diskcache
import orjson
import pytest
from click.testing import CliRunner
from google.genai import types
from groq.types.chat import ChatCompletion as GroqCompletion

import cachepipe
from cachepipe import OnlineAPI, StoreError
from cachepipe.cli.group import cli
from cachepipe.clients import Anthropic, Gemini, Groq, HuggingFace, OpenAI, Together
from cachepipe.compat.cachesaver.models import openai as compat
from cachepipe.compat.cachesaver.typedefs import Request
from cachepipe.importers import import_cachesaver
from cachepipe.importers.deephash import key_of
from cachepipe.sharing import merge
from cachepipe.stores.verify import verify

pytestmark = pytest.mark.anyio

MADE = Path(__file__).parents[1] / "data" / "cachesaver"
TEXTS = json.loads((MADE / "texts.json").read_text())
SERVER = "http://gpu-7:8000/v1"  # any: CacheSaver does not store it


def said(*texts):
    return [{"role": "user", "content": text} for text in texts]


CITY = {"model": "ngram-1", "messages": said("Name a city."), "temperature": 0.7}
RIVER = {"model": "ngram-1", "messages": said("Name a river."), "max_tokens": 40, "stop": ["x", "y"]}
HI = {"model": "ngram-1", "max_tokens": 30, "messages": said("hi")}
SEA = {"model": "ngram-1", "messages": said("Name a sea."), "max_tokens": 20}
HILL = {"model": "ngram-1", "contents": "Name a hill."}
LANE = {"model": "ngram-1", "messages": said("Name a lane."), "max_tokens": 20}
ORDERS = [
    {"model": "ngram-1", "messages": said(*texts), "max_tokens": 10}
    for texts in (("first", "second"), ("second", "first"))
]
LINES = [
    {"custom_id": "city", "method": "POST", "url": "/v1/chat/completions", "body": {**CITY, "n": 2}},
    {"kwargs": RIVER},
    {"prompt": "Name a lake.", "max_tokens": 20},
    {"kwargs": HI},
    {"kwargs": {**SEA, "timeout": None}},  # not what was passed
    {"kwargs": SEA},
    {"kwargs": HILL},
    {"kwargs": LANE},
]
MODEL = {"model": "ngram-1", "base_url": SERVER}


@pytest.fixture(autouse=True)
def no_urls(monkeypatch):
    """Let the environment name no servers."""
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "TOGETHER_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder that CacheSaver has made."""
    return shutil.copytree(MADE / "cache", tmp_path / "theirs")


@pytest.fixture
def cache(tmp_path):
    """The folder of the cache that gets everything."""
    return tmp_path / "cache"


def file_of(tmp_path, lines):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in lines))
    return path


def replayed(cache, body, count, **options):
    """The texts of some calls, without a server."""
    with OpenAI(cache=cache, mode="replay", base_url=SERVER, **options) as client:
        answers = [client.chat.completions.create(**body) for _ in range(count)]
    return [choice.message.content for answer in answers for choice in answer.choices]


async def test_c10_clients_get_the_samples_from_the_front_as_cachesavers_reruns_do(folder, cache, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    imported = import_cachesaver(folder, file_of(tmp_path, LINES), cache, **MODEL)
    assert (imported.found, imported.taken, imported.counts.samples) == (9, 7, 120)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert replayed(cache, CITY, 3, namespace="one") == TEXTS["city"]
    assert replayed(cache, {**CITY, "n": 3}, 1, namespace="two") == TEXTS["city"]
    assert replayed(cache, RIVER, 2) == TEXTS["river"]
    lake = {"model": "ngram-1", "messages": said("Name a lake."), "max_tokens": 20, "n": 110}
    assert replayed(cache, lake, 1) == TEXTS["lake"]
    with Anthropic(cache=cache, mode="replay") as client:
        assert [client.messages.create(**HI).content[0].text] == TEXTS["hi"]
    with Together(cache=cache, mode="replay") as client:
        assert [client.chat.completions.create(**SEA).choices[0].message.content] == TEXTS["sea"]
    with Gemini(cache=cache, mode="replay") as client:
        answer = client.models.generate_content(**HILL)
    assert ([answer.text], answer.candidates[0].finish_reason) == (TEXTS["hill"], "STOP")
    with HuggingFace(cache=cache, mode="replay") as client:
        answer = client.chat_completion(**LANE, n=2)
    assert [choice.message.content for choice in answer.choices] == TEXTS["lane"]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 46)
    assert verify(cache).problems == {}


async def test_the_import_of_the_same_program_under_cachepipe_replays(folder, cache, tmp_path):
    import_cachesaver(folder, file_of(tmp_path, LINES), cache, **MODEL)
    with compat.OpenAI(namespace="one", cachedir=str(cache), mode="replay", base_url=SERVER) as client:
        answer, seen = client.chat.completions.create(**CITY, n=3, metadata=True)
    assert [choice.message.content for choice in answer.choices] == TEXTS["city"]
    assert seen.cached == [True] * 3


async def test_c6_the_usage_that_cachesaver_copies_to_each_sample_counts_once(folder, cache, tmp_path):
    import_cachesaver(folder, file_of(tmp_path, LINES[:1]), cache, **MODEL)
    with OpenAI(cache=cache, mode="replay", base_url=SERVER) as client:
        answer = client.chat.completions.create(**CITY, n=3)
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    store = cachepipe.DiskStore(cache, read_only=True)
    (key,) = [info.key for info in store.keys()]  # noqa: SIM118 - a store is no mapping
    values = [orjson.loads(sample.payload)["usage"] for sample in store.samples(key)]
    store.close()
    assert usage == (10, 77)
    assert sum(each["completion_tokens"] for each in values) == 77


async def test_what_has_no_request_is_named_with_what_it_holds(folder, cache, tmp_path):
    imported = import_cachesaver(folder, file_of(tmp_path, LINES[:1]), cache, **MODEL)
    left = {each.why.split("such as ")[-1].strip('"'): each for each in imported.left}
    assert (imported.taken, len(imported.left)) == (1, 8)
    river = left[" ".join(TEXTS["river"][0].split())[:60]]
    assert (river.name, "no request of requests.jsonl has this key; it has 2 samples" in river.why) == (
        "ngram-1",
        True,
    )


async def test_lines_without_an_entry_are_named(folder, cache, tmp_path):
    lines = [{"prompt": "never asked"}, {"kwargs": {**CITY, "temperature": 1}}, {"custom_id": "no request"}]
    left = [str(each) for each in import_cachesaver(folder, file_of(tmp_path, lines), cache, **MODEL).left]
    assert left[0].startswith("requests.jsonl line 3: it holds no request")
    assert left[1].startswith("requests.jsonl: the folder has no entry for 2 of its requests, such as line 1")


async def test_requests_that_cachesaver_confuses_are_not_taken(folder, cache, tmp_path):
    lines = [{"kwargs": each} for each in ORDERS]
    imported = import_cachesaver(folder, file_of(tmp_path, lines), cache, **MODEL)
    assert imported.taken == 0
    assert any("nobody knows which one its samples answer" in each.why for each in imported.left)
    imported = import_cachesaver(folder, file_of(tmp_path, lines[:1] * 2), cache, **MODEL)
    assert imported.taken == 1
    assert replayed(cache, ORDERS[0], 1) == TEXTS["order"]


async def test_an_import_is_repeated_and_goes_on_when_the_list_has_grown(folder, cache, tmp_path):
    requests = file_of(tmp_path, LINES)
    import_cachesaver(folder, requests, cache, **MODEL)
    again = import_cachesaver(folder, requests, cache, **MODEL)
    assert (again.taken, again.counts.samples, again.counts.same) == (7, 0, 7)
    rows = sqlite3.connect(folder / "cache.db")
    key, data = rows.execute("SELECT key, value FROM Cache WHERE rowid = 2").fetchone()
    rivers = pickle.loads(data)
    rivers.append(rivers[0].model_copy(update={"id": "chatcmpl-third"}, deep=True))
    rivers[2].choices[0].message.content = "The third."
    rows.execute(
        "UPDATE Cache SET value = ?, store_time = store_time + 9 WHERE key = ?", (pickle.dumps(rivers), key)
    )
    rows.commit()
    rows.close()
    more = import_cachesaver(folder, requests, cache, **MODEL)
    assert (more.counts.samples, more.counts.more, more.counts.same) == (1, 1, 6)
    assert replayed(cache, RIVER, 3) == [*TEXTS["river"], "The third."]
    import_cachesaver(folder, requests, tmp_path / "other", **MODEL)
    assert merge([tmp_path / "other"], cache).samples == 0


async def test_a_model_of_ones_own_gets_its_samples_from_python(folder, cache):
    request = Request(args=(), kwargs={"sides": 6}, n=2, request_id="1", namespace="one")
    imported = import_cachesaver(folder, [request], cache, scope="dice")
    assert (imported.taken, imported.counts.samples) == (1, 2)

    class Dice:
        cache_scope = "dice"

        async def request(self, request):
            raise AssertionError

    async with OnlineAPI(Dice(), cache) as pipeline:
        assert (await pipeline.request(request)).data == TEXTS["dice"]


async def test_c10_answers_of_groqs_sdk_are_those_of_groq(folder, cache, tmp_path):
    rows = sqlite3.connect(folder / "cache.db")
    [(data,)] = rows.execute("SELECT value FROM Cache WHERE rowid = 1")
    cities = [GroqCompletion.construct(**each.to_dict()) for each in pickle.loads(data)]
    rows.execute("UPDATE Cache SET value = ? WHERE rowid = 1", (pickle.dumps(cities),))
    rows.commit()
    rows.close()
    assert import_cachesaver(folder, file_of(tmp_path, LINES[:1]), cache, **MODEL).taken == 1
    with Groq(cache=cache, mode="replay") as client:
        texts = [client.chat.completions.create(**CITY).choices[0].message.content for _ in range(3)]
    assert texts == TEXTS["city"]


STRICT = {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}
CONFIG = {"temperature": 0.5, "candidate_count": 2, "safety_settings": [STRICT]}


def candidates(data):
    """The list of a call for two candidates, as CacheSaver keeps it: each with the usage of the call."""
    (answer,) = pickle.loads(data)
    content = types.Content(role="model", parts=[types.Part(text="Ayr", thought_signature=b"\xff\x00")])
    other = types.Candidate(content=content, index=1, finish_reason=types.FinishReason.MAX_TOKENS)
    return pickle.dumps([answer, answer.model_copy(update={"candidates": [other]})])


def with_config(folder):
    """Give the entry of the hill the key of a call with a config, and a second candidate."""
    config = types.GenerateContentConfig(**{**CONFIG, "candidate_count": None})
    rows = sqlite3.connect(folder / "cache.db")
    row = key_of(HILL)
    [(data,)] = rows.execute("SELECT value FROM Cache WHERE key = ?", (row,))
    key = key_of({**HILL, "config": config})
    rows.execute("UPDATE Cache SET key = ?, value = ? WHERE key = ?", (key, candidates(data), row))
    rows.commit()
    rows.close()


@pytest.mark.parametrize("as_file", [True, False])
async def test_c10_a_call_of_gemini_with_a_config_is_found(folder, cache, tmp_path, as_file):
    with_config(folder)
    if as_file:
        requests = file_of(tmp_path, [{"kwargs": {**HILL, "config": CONFIG}}])
    else:
        config = types.GenerateContentConfig(**CONFIG)
        requests = [Request(args=(), kwargs={**HILL, "config": config})]
    imported = import_cachesaver(folder, requests, cache)
    assert (imported.taken, imported.counts.samples) == (1, 2)
    with Gemini(cache=cache, mode="replay") as client:
        answer = client.models.generate_content(**HILL, config=types.GenerateContentConfig(**CONFIG))
    first, second = answer.candidates
    assert [first.content.parts[0].text, second.content.parts[0].text] == [*TEXTS["hill"], "Ayr"]
    assert (second.finish_reason, second.content.parts[0].thought_signature) == ("MAX_TOKENS", b"\xff\x00")


async def test_a_call_of_the_hub_without_a_model_is_left(folder, cache):
    rows = sqlite3.connect(folder / "cache.db")
    kwargs = {name: value for name, value in LANE.items() if name != "model"}
    rows.execute("UPDATE Cache SET key = ? WHERE key = ?", (key_of(kwargs), key_of(LANE)))
    rows.commit()
    rows.close()
    imported = import_cachesaver(folder, [Request(args=(), kwargs=kwargs)], cache)
    assert imported.taken == 0
    assert any("names no model" in each.why for each in imported.left)


async def test_tensors_are_left_with_the_reason(folder, cache):
    data = b"\x80\x05]\x94ctorch._utils\n_rebuild_tensor_v2\n)R\x94a."
    rows = sqlite3.connect(folder / "cache.db")
    rows.execute("UPDATE Cache SET value = ? WHERE key = ?", (data, key_of(HILL)))
    rows.commit()
    rows.close()
    left = import_cachesaver(folder, [Request(args=(), kwargs=HILL)], cache).left
    assert any("nobody knows which model wrote these tokens" in each.why for each in left)


async def test_a_folder_that_a_program_has_open_is_read_with_what_is_in_its_log(folder, cache, tmp_path):
    with diskcache.Cache(str(folder)) as theirs:
        theirs[key_of(SEA, ())] = [*theirs[key_of(CITY, ())], *theirs[key_of(RIVER, ())]]
        assert (folder / "cache.db-wal").stat().st_size
        imported = import_cachesaver(folder, file_of(tmp_path, [{"kwargs": SEA}]), cache, **MODEL)
    assert imported.counts.samples == 5


async def test_c12_other_folders_are_refused(cache, tmp_path):
    requests = file_of(tmp_path, LINES)
    with pytest.raises(StoreError, match=r"holds no file cache\.db"):
        import_cachesaver(tmp_path, requests, cache)
    shutil.copytree(MADE / "cache", tmp_path / "trap")
    rows = sqlite3.connect(tmp_path / "trap" / "cache.db")
    rows.execute("CREATE TRIGGER x AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END")
    rows.close()
    with pytest.raises(StoreError, match="holds 'x', which cachepipe does not create"):
        import_cachesaver(tmp_path / "trap", requests, cache)
    cachepipe.DiskStore(tmp_path / "ours").close()
    with pytest.raises(StoreError, match="is a cache of cachepipe"):
        import_cachesaver(tmp_path / "ours", requests, cache)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "UPDATE Cache SET filename = '../../secret' WHERE filename IS NOT NULL",
            "names a file that diskcache",
        ),
        ("UPDATE Cache SET mode = 1 WHERE filename IS NOT NULL", "is not a list of samples"),
        ("UPDATE Cache SET value = 5, filename = NULL WHERE filename IS NOT NULL", "its row is damaged"),
    ],
)
async def test_c12_a_row_that_diskcache_does_not_write_is_left(folder, cache, tmp_path, change, told):
    (tmp_path / "secret").write_bytes(b"\x80\x05]\x94\x8c\x01a\x94a.")
    rows = sqlite3.connect(folder / "cache.db")
    rows.execute(change)
    rows.commit()
    rows.close()
    imported = import_cachesaver(folder, file_of(tmp_path, LINES), cache, **MODEL)
    assert imported.taken == 6
    assert any(told in each.why for each in imported.left)


async def test_c12_links_are_not_followed(folder, cache, tmp_path):
    (file,) = folder.rglob("*.val")
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    imported = import_cachesaver(folder, file_of(tmp_path, LINES), cache, **MODEL)
    assert any("is a link, or no regular file" in each.why for each in imported.left)
    assert imported.taken == 6


async def test_the_command_imports_a_folder_and_says_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, LINES)
    options = ["theirs", "--requests", "requests.jsonl", "--model", "ngram-1", "--base-url", SERVER]
    done = CliRunner().invoke(cli, ["import", *options, "--cache", "cache"])
    assert (done.exit_code, done.stderr) == (1, "")
    assert "taken  7 of 9" in done.stdout
    assert "give its requests to import_cachesaver in Python" not in done.stdout
    done = CliRunner().invoke(cli, ["import", "theirs", "--cache", "cache"])
    assert (done.exit_code, "a folder of CacheSaver with 9 lists of samples" in done.stderr) == (2, True)
    done = CliRunner().invoke(cli, ["import", *options, "--namespace", "x", "--cache", "cache"])
    assert (done.exit_code, "leave out --namespace" in done.stderr) == (2, True)
