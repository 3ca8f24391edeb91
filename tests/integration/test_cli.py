"""The commands that look at a cache, and the demo, as a user meets them."""

import asyncio
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from click.testing import CliRunner

import cachepipe
from cachepipe import Batch, OnlineAPI, Request, Response
from cachepipe.accounting import noted
from cachepipe.cli import demo, inspect
from cachepipe.cli.group import cli
from cachepipe.contract.draws import Draw
from cachepipe.contract.keys import provider_question
from cachepipe.models import OpenAIModel
from cachepipe.stores import DiskStore
from cachepipe.stores.base import Claim, Commit, Discard, ReleaseHold
from cachepipe.testing import MockServer, MockSettings
from cachepipe.values import Codec

HOSTILE = "roll\x1b[31m\x07\nsecond\u202eline\r"
ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


SUMS = ("spent", "billed", "as_asked", "saved", "unreported", "wasted")


class Dice:
    model = "dice"

    def __init__(self):
        self.rolls = 0

    async def request(self, request):
        self.rolls += request.n
        return Response([f"{HOSTILE} {self.rolls - k}" for k in reversed(range(request.n))])


async def fill(folder):
    """Four questions: two drawn by two namespaces, one by none, one for everybody."""
    async with OnlineAPI(Dice(), folder) as pipeline:
        for namespace in ("a", "b"):
            questions = [
                Request(f"question {k}", n=2, request_id=f"r{k}", namespace=namespace) for k in (1, 2)
            ]
            await pipeline.batch_request(Batch(questions))
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{HOSTILE}?"}]
        await pipeline.request(Request(messages))
    async with OnlineAPI(Dice(), folder, repeat="same", scope="other") as pipeline:
        await pipeline.request(Request("the same for all", namespace="c"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled") / "cache"
    asyncio.run(fill(folder))
    return str(folder)


def called(*arguments, code=0):
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    assert not ESCAPES.search(result.output)
    return result


def as_json(*arguments):
    return json.loads(called(*arguments, "--json").stdout)


def listed(*arguments):
    return [json.loads(line) for line in called("ls", *arguments, "--json").stdout.splitlines()]


def process(*arguments, **options):
    return forked.run(
        [sys.executable, "-m", "cachepipe", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **options,
    )


# path


def test_path_prints_the_folder_in_use_and_makes_none(tmp_path):
    folder = tmp_path / "not yet"
    assert called("path", "--cache", str(folder)).stdout == f"{folder}\n"
    assert as_json("path", "--cache", str(folder)) == {
        "path": str(folder),
        "exists": False,
        "named_by": "--cache",
    }
    assert not folder.exists()


# stats


def test_stats_tell_what_each_namespace_paid_and_reused(cache):
    figures = as_json("stats", "--cache", cache, "--scopes")
    counts = ("namespace", "draws", "drawn", "generated", "reused", "reused_share")
    assert [{name: each[name] for name in counts} for each in figures["namespaces"]] == [
        {"namespace": "a", "draws": 2, "drawn": 4, "generated": 4, "reused": 0, "reused_share": 0.0},
        {"namespace": "b", "draws": 2, "drawn": 4, "generated": 0, "reused": 4, "reused_share": 1.0},
        {"namespace": None, "draws": 1, "drawn": 1, "generated": 1, "reused": 0, "reused_share": 0.0},
        {"namespace": "c", "draws": 0, "drawn": 0, "generated": 0, "reused": 0, "reused_share": None},
    ]
    assert figures["shared"] == {"draws": 1, "drawn": 1, "generated": 1}
    totals = {name: figures[name] for name in ("keys", "samples", "pending", "discarded", "draws")}
    assert totals == {"keys": 4, "samples": 6, "pending": 0, "discarded": 0, "draws": 6}
    assert (figures["drawn"], figures["generated"], figures["reused"]) == (9, 5, 4)
    assert figures["reused_share"] == round(4 / 9, 6)
    assert figures["folder"] == cache
    assert figures["bytes"] > 10_000
    assert figures["scopes"] == [
        {"scope": "dice", "keys": 3, "samples": 5, "pending": 0},
        {"scope": "other", "keys": 1, "samples": 1, "pending": 0},
    ]


def test_stats_read_no_keys_unless_scopes_are_wanted(cache, monkeypatch):
    def refuse(self, prefix=""):
        raise AssertionError(prefix)

    monkeypatch.setattr(DiskStore, "keys", refuse)
    assert as_json("stats", "--cache", cache)["scopes"] is None


def test_stats_are_a_table_for_people(cache):
    output = called("stats", "--cache", cache, "--limit", "2").stdout
    assert re.search(r"^reused +4 of 9 samples drawn \(44.4%\)$", output, re.MULTILINE)
    assert re.search(r"^b +2 +4 +0 +4 +100%$", output, re.MULTILINE)
    assert re.search(r"^\(shared\) +1 +1 +1 +- +-$", output, re.MULTILINE)
    assert "and 2 more namespaces; --limit 0 shows all" in output


class Priced(Dice):
    """A model whose answers say what they have used; every second one comes from a model without a price."""

    model = "https://api.openai.com/v1/chat/completions"

    def pack(self, value):
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        name = "gpt-4o" if value.endswith(("1", "3")) else "unheard-of"
        return Codec().encode(value), noted({"model": name, "usage": usage})


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A cache that one run has filled, and two have replayed; a request failed, and one asked for more."""
    folder = str(tmp_path_factory.mktemp("replayed") / "cache")

    async def fill():
        for _ in range(3):
            async with OnlineAPI(Priced(), folder) as pipeline:
                for number in range(3):
                    await pipeline.request(Request(f"question {number}", namespace="exp"))
        async with OnlineAPI(Dice(), folder, scope="own") as pipeline:
            await pipeline.request(Request("unpriced"))

    asyncio.run(fill())
    return folder


def test_c6_stats_tell_what_was_spent_and_what_each_rerun_saved(replayed):
    figures = as_json("stats", "--cache", replayed)
    assert {name: figures[name]["total_tokens"] for name in SUMS} == {
        "spent": 3300,
        "billed": 3300,
        "as_asked": 9900,
        "saved": 6600,
        "unreported": 0,
        "wasted": 0,
    }
    assert figures["requests"] == 10
    assert [figures["spent"][name] for name in ("samples", "unknown", "unpriced")] == [4, 1, 2]
    assert figures["saved"]["cost"] == pytest.approx(2 * figures["billed"]["cost"])
    exp, own = figures["namespaces"]
    assert (exp["namespace"], exp["requests"], exp["saved"]["samples"]) == ("exp", 9, 6)
    assert (own["namespace"], own["spent"]["unknown"], own["saved"]["samples"]) == (None, 1, 0)


def test_c6_stats_of_models_and_runs_add_up(replayed, tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text('{"unheard-of": {"prompt": 1, "completion": 1}, "gpt-4o": {"prompt": 0}}')
    figures = as_json("stats", "--cache", replayed, "--runs", "--prices", str(prices))
    costs = {each["model"]: each["spent"]["cost"] for each in figures["models"]}
    assert costs == {"unheard-of": pytest.approx(0.0011), "gpt-4o": 0.0, None: None}
    runs = figures["runs"]
    assert len(runs) == 4
    for name in SUMS:
        for each in (runs, figures["models"]):
            assert sum(row[name]["total_tokens"] for row in each) == figures[name]["total_tokens"]
    assert [run["saved"]["samples"] for run in runs if run["first"] is None] == [3, 3]
    assert [run["spent"]["samples"] for run in runs if run["first"] is not None] == [3, 1]
    assert as_json("stats", "--cache", replayed)["runs"] is None
    output = called("stats", "--cache", replayed, "--runs").stdout
    assert re.search(r"^run +namespace +first sample +requests +spent", output, re.MULTILINE)
    assert re.search(r"^gpt-4o +[0-9].* https://api.openai.com/v1/chat/completions$", output, re.MULTILINE)


def test_c6_stats_say_unknown_and_not_nothing(replayed):
    output = called("stats", "--cache", replayed).stdout
    assert re.search(r"^saved +6 samples, 6,600 tokens, \$", output, re.MULTILINE)
    assert re.search(r"^exp +9 +3,300 \$", output, re.MULTILINE)
    assert re.search(r"^\(none\) +1 +unknown +unknown +0 +0$", output, re.MULTILINE)


@pytest.mark.parametrize(
    "change",
    [
        "document = CAST(replace(document, '1100', '1200') AS BLOB)",
        "document = replace(document, '1100', '1200')",
        "run = run || 'x'",
        "namespace = namespace || 'x'",
    ],
)
def test_c12_stats_refuse_sums_that_are_not_what_was_written(replayed, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(replayed, folder)
    ledger = sqlite3.connect(folder / "ledger.cache.db")
    with ledger:
        ledger.execute(f"UPDATE sums SET {change}")  # noqa: S608 - of constants
    ledger.close()
    assert "sums of the run" in called("stats", "--cache", str(folder), code=2).stderr


# ls


def test_ls_lists_questions_in_the_order_of_asking(cache):
    found = listed("--cache", cache)
    assert [each["prompt"] for each in found] == [
        "question 1",
        "question 2",
        f"{HOSTILE}?",
        "the same for all",
    ]
    assert [each["samples"] for each in found] == [2, 2, 1, 1]
    assert found[0]["namespaces"] == 2
    assert list(found[0]) == [
        "key",
        "scope",
        "at",
        "samples",
        "pending",
        "namespaces",
        "model",
        "settings",
        "prompt",
    ]
    lines = called("ls", "--cache", cache).stdout.splitlines()
    assert len(lines) == 5, "no settings, no further lines"
    assert lines[1].startswith(found[0]["key"][:15])
    assert lines[3].endswith(r"roll\x1b[31m\x07 second\u202eline ?")


def test_ls_can_be_narrowed(cache):
    everything = [each["key"] for each in listed("--cache", cache)]
    assert [each["key"] for each in listed("--cache", cache, "--limit", "2")] == everything[:2]
    assert [each["key"] for each in listed("--cache", cache, "--scope", "other")] == everything[3:]
    assert [each["key"] for each in listed("--cache", cache, "--namespace", "b")] == everything[:2]
    assert listed("--cache", cache, "--namespace", "b", "--scope", "other") == []
    assert [each["key"] for each in listed("--cache", cache, "--prefix", everything[1][:12])] == everything[
        1:2
    ]
    assert [each["key"] for each in listed("--cache", cache, "--prefix", everything[1][3:12])] == everything[
        1:2
    ]
    both = listed("--cache", cache, "--namespace", "a", "--prefix", everything[1][:12])
    assert [each["key"] for each in both] == everything[1:2]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Questions to two models at two endpoints, some alike but for a setting."""
    folder = str(tmp_path_factory.mktemp("varied") / "cache")
    asked = [
        ("https://one/v1", "m-1", "Cats 100%?", {}),
        ("https://one/v1", "m-1", "Cats 100%?", {"seed": 7}),
        ("https://one/v1", "m-10", 'Say "ÄPFEL"\nplease', {}),
        ("https://one/v10", "m-1", "Cats_100?", {}),
    ]
    store = DiskStore(folder)
    for number, (base, model, text, more) in enumerate(asked):
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        question = provider_question(f"{base}/chat/completions", {"body": body})
        draw = Draw("=a" if number else "=b", question.key, "", 0)
        grant, _ = store.write([Claim(draw, 1, question, "t"), Commit(question.key, 0, b'"x"', {"at": 1})])
        store.write([ReleaseHold(draw, "t", grant.held, complete=True, n=1)])
    store.close()
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--search", "cats 100%"], [0, 1]),
        (["--search", "äpfel"], [2]),
        (["--search", '"ÄPF'], [2]),
        (["--search", 'SAY "'], [2]),
        (["--search", "ats_1"], [3]),
        (["--search", "content"], []),
        (["--search", "user"], []),
        (["--model", "m-1"], [0, 1, 3]),
        (["--model", "m-10"], [2]),
        (["--model", "M-10"], []),
        (["--scope", "https://one/v1"], [0, 1, 2]),
        (["--scope", "https://me:key@ONE:443/v1/"], [0, 1, 2]),
        (["--scope", "https://one/v10/chat/completions"], [3]),
        (["--scope", "https://one"], [0, 1, 2, 3]),
        (["--scope", "https://on"], []),
        (["--namespace", "a", "--model", "m-1", "--search", "cats"], [1, 3]),
        (["--namespace", "b", "--limit", "1"], [0]),
    ],
)
def test_ls_finds_questions_by_text_model_and_endpoint(varied, options, expected):
    everything = [each["key"] for each in listed("--cache", varied)]
    assert [everything.index(each["key"]) for each in listed("--cache", varied, *options)] == expected


def test_ls_tells_questions_apart_that_differ_in_a_setting_only(varied):
    one, other, *_ = listed("--cache", varied)
    assert (one["model"], one["settings"], other["settings"]) == ("m-1", {}, {"seed": 7})
    assert one["prompt"] == other["prompt"]
    lines = called("ls", "--cache", varied, "--limit", "2").stdout.splitlines()
    assert [line.split() for line in lines[2::2]] == [["m-1"], ["m-1", "seed=7"]]


def test_ls_finds_the_questions_of_an_adapter_by_its_model(cache):
    assert len(listed("--cache", cache, "--model", "dice")) == 3


def test_ls_of_nothing_prints_nothing_and_says_so(cache):
    result = called("ls", "--cache", cache, "--prefix", "zz")
    assert result.stdout == ""
    assert result.stderr == f"{cache} has no such question\n"
    assert listed("--cache", cache, "--prefix", "zz") == []


def test_ls_prints_the_first_question_before_it_has_read_the_second(cache, capsys, monkeypatch):
    real = DiskStore.keys

    def keys(self, prefix="", **wanted):
        for place, info in enumerate(real(self, prefix, **wanted)):
            if place == 1:
                assert "question 1" in capsys.readouterr().out
            yield info

    monkeypatch.setattr(DiskStore, "keys", keys)
    monkeypatch.setattr("cachepipe.cli.common._FLUSH", 0.0)
    inspect.ls.main(["--cache", cache], standalone_mode=False)
    assert "question 2" in capsys.readouterr().out


def test_a_cache_that_is_not_there_is_one_sentence_and_exit_code_2(tmp_path):
    for command in (["stats"], ["ls"], ["show", "k2-5f2c"]):
        result = called(*command, "--cache", str(tmp_path / "none"), code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("Error: there is no cache: the folder ")
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_looking_changes_no_table(cache):
    def tables():
        return {name: (Path(cache) / name).read_bytes() for name in ("ledger.cache.db", "cache.db")}

    before = tables()
    for command in (["stats"], ["ls"], ["show", listed("--cache", cache)[0]["key"]]):
        called(*command, "--cache", cache)
    assert tables() == before


# show


def test_show_tells_what_was_asked_its_samples_and_who_drew_which(cache):
    first = listed("--cache", cache)[0]
    shown = as_json("show", first["key"][:14], "--cache", cache)
    assert list(shown) == ["key", "scope", "at", "counts", "question", "draws", "samples", "discarded"]
    assert shown["question"] == {"fields": {"prompt": "question 1"}}
    assert [
        (draw["namespace"], draw["request_id"], draw["indices"], draw["generated"]) for draw in shown["draws"]
    ] == [("a", "r1", [0, 1], 2), ("b", "r1", [0, 1], 0)]
    assert [sample["index"] for sample in shown["samples"]] == [0, 1]
    assert all(sample["value"].startswith(HOSTILE) for sample in shown["samples"])
    assert len({sample["id"] for sample in shown["samples"]}) == 2
    output = called("show", first["key"], "--cache", cache).stdout
    assert "    roll\\x1b[31m\\x07\n    second\\u202eline\\r 1" in output
    assert "  b r1: #0, #1; 0 generated for it" in output


def test_show_writes_messages_by_speaker(cache):
    key = listed("--cache", cache)[2]["key"]
    output = called("show", key[3:20], "--cache", cache).stdout
    assert "  system\n    Be brief.\n  user\n    roll\\x1b[31m\\x07\n" in output
    assert "  no namespace: #0; 1 generated for it" in output


def test_show_names_an_answer_for_everybody(cache):
    key = listed("--cache", cache, "--scope", "other")[0]["key"]
    assert "  shared by all namespaces: #0; 1 generated" in called("show", key, "--cache", cache).stdout
    (draw,) = as_json("show", key, "--cache", cache)["draws"]
    assert (draw["shared"], draw["namespace"]) == (True, None)


def test_show_of_an_ambiguous_prefix_lists_the_candidates(cache):
    result = called("show", "k2", "--cache", cache, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: several keys begin with 'k2'; give more characters:\n")
    for each in listed("--cache", cache):
        assert each["key"] in result.stderr


def test_show_of_an_unknown_key_says_how_to_find_one(cache):
    assert "`cachepipe ls` lists them" in called("show", "zz\x1b", "--cache", cache, code=2).stderr


def test_show_limits_samples_and_says_how_many_more_there_are(tmp_path):
    async def many():
        async with OnlineAPI(Dice(), tmp_path / "many") as pipeline:
            await pipeline.request(Request("often", n=30))

    asyncio.run(many())
    cache = str(tmp_path / "many")
    key = listed("--cache", cache)[0]["key"]
    assert "  and 10 more; --limit 0 shows all" in called("show", key, "--cache", cache).stdout
    assert "more;" not in called("show", key, "--cache", cache, "--limit", "0").stdout
    assert len(as_json("show", key, "--cache", cache)["samples"]) == 30
    assert len(as_json("show", key, "--cache", cache, "--limit", "3")["samples"]) == 3


def test_show_names_the_replicate_of_a_draw(tmp_path):
    cache = str(tmp_path / "cache")

    async def ask():
        async with OnlineAPI(Dice(), cache) as pipeline:
            for replicate in (3, None):
                await pipeline.request(Request("q", namespace="a", request_id="r", replicate=replicate))

    asyncio.run(ask())
    key = listed("--cache", cache)[0]["key"]
    assert [draw["replicate"] for draw in as_json("show", key, "--cache", cache)["draws"]] == [None, "3"]
    output = called("show", key, "--cache", cache).stdout
    assert "  a r (replicate 3): #0; 1 generated for it" in output
    assert "  a r: #1; 1 generated for it" in output


@pytest.mark.parametrize("scope", [None, "my own scope"])
def test_show_gives_a_providers_answer_as_its_text_and_tokens(tmp_path, scope):
    async def ask(base_url):
        model = OpenAIModel("ngram-1", base_url=base_url, api_key="none", max_retries=0)
        async with model, OnlineAPI(model, tmp_path / "cache", scope=scope) as pipeline:
            return await pipeline.request(Request("Write a function.", n=2))

    with MockServer.in_thread(MockSettings(seed=3)) as server:
        texts = asyncio.run(ask(server.base_url)).data
    cache = str(tmp_path / "cache")
    (found,) = listed("--cache", cache)
    assert found["prompt"] == "Write a function."
    shown = as_json("show", found["key"], "--cache", cache)
    assert [sample["text"] for sample in shown["samples"]] == texts
    assert all(sample["completion_tokens"] > 0 for sample in shown["samples"])
    output = called("show", found["key"], "--cache", cache).stdout
    assert "  model ngram-1\n  user\n    Write a function.\n" in output
    assert f"ngram-1  {shown['samples'][0]['completion_tokens']} tokens  stop" in output
    assert texts[1].splitlines()[0] in output


def test_show_gives_values_that_json_has_no_form_for(tmp_path):
    class Odd:
        async def request(self, request):
            return Response([("tuple", b"\x1b", {1: 2.5})])

    async def ask():
        async with OnlineAPI(Odd(), tmp_path / "cache") as pipeline:
            await pipeline.request(Request({"any": ["value"]}))

    asyncio.run(ask())
    cache = str(tmp_path / "cache")
    assert listed("--cache", cache)[0]["prompt"] == '{"any":["value"]}'
    output = called("show", "k2", "--cache", cache).stdout
    assert r"    ('tuple', b'\x1b', {1: 2.5})" in output
    assert as_json("show", "k2", "--cache", cache)["samples"][0]["value"]["\0tuple"][0] == "tuple"


def test_lone_surrogates_and_large_numbers_are_shown_as_they_were_asked(tmp_path):
    async def ask():
        async with OnlineAPI(Dice(), tmp_path / "cache") as pipeline:
            await pipeline.request(Request("half \ud83d of it"))
            await pipeline.request(Request({"large": 2**70}))

    asyncio.run(ask())
    cache = str(tmp_path / "cache")
    half, large = listed("--cache", cache)
    assert (half["prompt"], large["prompt"]) == ("half \ud83d of it", f'{{"large":{2**70}}}')
    assert as_json("show", large["key"], "--cache", cache)["question"] == {
        "fields": {"prompt": {"large": 2**70}}
    }
    assert r"half \ud83d of it" in called("show", half["key"], "--cache", cache).stdout
    assert r"half \ud83d of it" in called("ls", "--cache", cache).stdout


def test_discarded_samples_are_told_with_their_reason_and_runs_of_indices_in_short(tmp_path):
    async def ask():
        store = DiskStore(tmp_path / "cache")
        async with OnlineAPI(Dice(), store) as pipeline:
            asked = Request("much", n=300, namespace="")
            key = (await pipeline.request(asked)).key
            await store.apply([Discard(key, 4, HOSTILE), Discard(key, 299, "empty")])
            with cachepipe.run():
                await pipeline.request(asked)
        store.close()

    asyncio.run(ask())
    cache = str(tmp_path / "cache")
    output = called("show", "k2", "--cache", cache, "--limit", "1").stdout
    assert "300 samples, 2 discarded, drawn by 1 namespace" in output
    assert re.search(r"  #4  discarded \d{4}-.*: roll\\x1b", output)
    assert "  '': #0 to #3, #300, #5 to #298, #301; 302 generated for it" in output
    discarded = as_json("show", "k2", "--cache", cache)["discarded"]
    assert [(each["index"], each["why"]) for each in discarded] == [(4, HOSTILE), (299, "empty")]
    assert re.search(r"^'' +1 +302 ", called("stats", "--cache", cache).stdout, re.MULTILINE)


def test_scopes_beyond_the_limit_are_counted(cache):
    output = called("stats", "--cache", cache, "--scopes", "--limit", "1").stdout
    assert output.endswith("and 1 more scope; --limit 0 shows all\n")


# verify and discard


@pytest.fixture
def copy(cache, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    return folder


def damage(folder, statement, *values):
    with contextlib.closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as shelf:
        shelf.execute(statement, values)


def test_verify_says_that_nothing_is_wrong(copy):
    assert called("verify", "--cache", str(copy)).stdout.splitlines() == [
        f"cache    {copy}",
        "checked  4 questions, 6 samples, 6 draws, 0 discarded",
        "result   nothing is wrong",
    ]
    assert as_json("verify", "--cache", str(copy)) == {
        "folder": str(copy),
        "whole": True,
        "checked": {"questions": 4, "samples": 6, "draws": 6, "discarded": 0},
        "foreign": 0,
        "recent": 0,
        "unfinished": 0,
        "problems": [],
        "repaired": None,
    }


def test_verify_says_what_is_wrong_and_what_to_do_and_repairs_it_on_request(copy):
    damage(copy, "DELETE FROM Cache WHERE rowid = 2")
    shown = called("verify", "--cache", str(copy), code=1).stdout
    assert "the cache is damaged" in shown
    assert re.search(r"a listed sample is not stored +1 +run `cachepipe verify --repair`", shown)
    assert re.search(r"^  k2-[0-9a-f]{64}/1$", shown, re.MULTILINE)
    told = json.loads(called("verify", "--cache", str(copy), "--json", code=1).stdout)
    assert [(each["kind"], each["count"]) for each in told["problems"]] == [("missing", 1)]
    told = as_json("verify", "--cache", str(copy), "--repair")
    assert (told["whole"], told["problems"]) == (True, [])
    assert [each["kind"] for each in told["repaired"]] == ["missing"]
    assert as_json("stats", "--cache", str(copy))["discarded"] == 1
    assert "nothing is wrong" in called("verify", "--cache", str(copy), "--repair").stdout


def test_verify_leaves_files_alone_that_do_not_belong_together(copy, tmp_path):
    asyncio.run(fill(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "cache.db", copy / "cache.db")
    before = (copy / "ledger.cache.db").read_bytes()
    shown = called("verify", "--cache", str(copy), "--repair", code=1).stdout
    assert "Nothing was repaired" in shown
    assert "restore the cache from a copy" in shown
    assert (copy / "ledger.cache.db").read_bytes() == before


def test_verify_says_which_folder_is_no_cache(tmp_path):
    assert "there is no cache" in called("verify", "--cache", str(tmp_path), code=2).stderr


def test_discard_takes_one_sample_back_and_says_how_many_draws_had_it(copy):
    key = listed("--cache", str(copy))[0]["key"]
    told = as_json("discard", f"{key[:12]}/1", "--why", "a refusal", "--cache", str(copy))
    assert told == {"key": key, "discarded": [1], "draws": 2}
    [discard] = as_json("show", key, "--cache", str(copy))["discarded"]
    assert (discard["index"], discard["why"]) == (1, "a refusal")
    again = asyncio.run(draw_again(copy))
    assert again == {"a": [True, False], "b": [True, True]}  # they share the new one
    assert as_json("verify", "--cache", str(copy))["whole"]


async def draw_again(folder):
    async with OnlineAPI(Dice(), folder) as pipeline:
        asks = [Request("question 1", n=2, request_id="r1", namespace=namespace) for namespace in ("a", "b")]
        return {ask.namespace: (await pipeline.request(ask)).cached for ask in asks}


def test_discard_takes_all_samples_of_a_question_back(copy):
    key = listed("--cache", str(copy))[1]["key"]
    shown = called("discard", key, "--why", "truncated", "--cache", str(copy)).stdout
    assert shown == f"discarded 2 samples of {key}, which 2 draws had\n"
    assert as_json("show", key, "--cache", str(copy))["samples"] == []
    assert "discarded 0 samples" in called("discard", key, "--why", "twice", "--cache", str(copy)).stdout


def test_a_damaged_sample_can_be_discarded(copy):
    key = listed("--cache", str(copy))[0]["key"]
    damage(copy, "UPDATE Cache SET value = x'00' WHERE key = ?", f"{key}/0")
    assert "verify --repair" in called("show", key, "--cache", str(copy), code=2).stderr
    called("discard", f"{key}/0", "--why", "damaged", "--cache", str(copy))
    assert as_json("verify", "--cache", str(copy))["whole"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{key}/1"], "Missing option '--why'"),
        (["{key}/9", "--why", "w"], "there is no sample 9 of key"),
        (["{key}/last", "--why", "w"], "a whole number; got 'last'"),
        (["k2-nothing", "--why", "w"], "no key in"),
        (["k2", "--why", "w"], "several keys begin with 'k2'"),
    ],
)
def test_discard_says_what_it_cannot_find(copy, arguments, message):
    key = listed("--cache", str(copy))[0]["key"]
    shown = called("discard", *(each.format(key=key) for each in arguments), "--cache", str(copy), code=2)
    assert message in shown.stderr
    assert as_json("stats", "--cache", str(copy))["discarded"] == 0


# As a process.


@pytest.mark.skipif(os.name == "nt", reason="its shell closes no streams")
@pytest.mark.parametrize("words", [["stats"], ["show", "k2-5f2c"]])
def test_streams_that_are_closed_are_written_to_as_if_nobody_read_them(cache, words):
    command = f'exec "{sys.executable}" -m cachepipe "$@"'
    for closed, told in ((">&-", "stderr"), ("2>&-", "stdout"), ("<&- >&- 2>&-", None)):
        ran = subprocess.run(
            ["sh", "-c", f"{command} {closed}", "sh", *words, "--cache", cache],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == (0 if words == ["stats"] else 2)
        assert "Traceback" not in ran.stderr
        shown = {"stdout": words == ["stats"], "stderr": words != ["stats"]}
        assert (ran.stdout != "", ran.stderr != "") == tuple(
            shown[name] and told == name for name in ("stdout", "stderr")
        )


def test_python_m_is_the_console_script(cache):
    ran = process("ls", "--cache", cache, "--json")
    assert ran.returncode == 0
    assert [json.loads(line) for line in ran.stdout.splitlines()] == listed("--cache", cache)


def test_an_error_of_a_process_is_a_sentence_without_a_traceback(tmp_path):
    ran = process("stats", env={**os.environ, "CACHEPIPE_DIR": str(tmp_path / "none")})
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "(named by CACHEPIPE_DIR) does not exist" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_text_that_the_output_cannot_hold_is_written_out(tmp_path):
    async def ask():
        async with OnlineAPI(Dice(), tmp_path / "cache") as pipeline:
            await pipeline.request(Request("日本語?"))

    asyncio.run(ask())
    ran = process("ls", "--cache", str(tmp_path / "cache"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0
    assert r"\u65e5\u672c\u8a9e?" in ran.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("words", [["ls"], ["stats"], ["path"]])
def test_an_output_that_cannot_be_written_is_one_sentence(cache, words):
    with Path("/dev/full").open("w") as full:
        ran = forked.run(
            [sys.executable, "-m", "cachepipe", *words, "--cache", cache],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (
        2,
        "Error: the output cannot be written: No space left on device\n",
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_goes_away_ends_the_listing_quietly(cache):
    reading, writing = os.pipe()
    os.close(reading)
    ran = forked.run(
        [sys.executable, "-m", "cachepipe", "ls", "--cache", cache],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


# new-run


class Stranger(http.server.BaseHTTPRequestHandler):
    """Answers as servers do that are no proxy of ours."""

    def do_POST(self):
        body = b'{"error": "no such route"}'
        self.send_response(404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_new_run_of_what_is_no_proxy_is_one_sentence(answering_with):
    with answering_with(Stranger) as url:
        place = url.removeprefix("http://")
        result = called("new-run", "--url", f"http://me:secret@{place}", code=2)
    assert result.stderr == f"Error: http://{place} did not begin a run: status 404\n"


# demo


def test_the_demo_keeps_its_promises_by_the_servers_own_counts(tmp_path):
    begun = time.monotonic()
    ran = process("demo", "--json", cwd=tmp_path, env={**os.environ, "http_proxy": "http://127.0.0.1:9"})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert time.monotonic() - begun < 30
    told = json.loads(ran.stdout)
    assert told["held"]
    assert all(promise["held"] for promise in told["promises"])
    first, again, other, changed, more = told["steps"]
    assert (first["calls"], first["hits"]) == (40, 0)
    assert first["samples"] == {"as_asked": 120, "spent": 120, "saved": 0}
    assert first["tokens"]["saved"] == 0  # C6
    for free in (again, other):
        assert (free["calls"], free["samples"]["spent"], free["hits"], free["tokens"]["spent"]) == (
            0,
            0,
            120,
            0,
        )
        assert free["tokens"]["saved"] == first["tokens"]["spent"]
    assert (changed["calls"], changed["samples"]["spent"], told["changed"]) == (1, 3, 1)
    assert (more["samples"], more["hits"]) == ({"as_asked": 200, "spent": 80, "saved": 120}, 120)
    assert told["total"]["samples"]["spent"] == 120 + 3 + 80
    assert list(tmp_path.iterdir()) == []


def test_the_demo_keeps_its_cache_where_it_is_told_and_can_be_shown_again(tmp_path):
    cache = str(tmp_path / "kept")
    for times in (1, 2):
        output = called("demo", "--prompts", "3", "--n", "1", "--cache", cache).stdout
        assert output.count("held  ") == 7
        assert "NOT HELD" not in output
        assert f"The cache is kept: cachepipe stats --cache {cache}" in output
        assert as_json("stats", "--cache", cache)["keys"] == 4 * times


def test_the_demo_refuses_what_would_keep_no_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("cachepipe.stores.disk._why_read_only", lambda _folder: "it is on a CD")
    DiskStore(tmp_path, read_only=False).close()
    refused = called("demo", "--prompts", "1", "--cache", str(tmp_path), code=2)
    assert refused.output == (
        f"Error: the cache {tmp_path} cannot be written: it is on a CD. Name another with --cache\n"
    )
    monkeypatch.setenv("CACHEPIPE_DISABLE", "1")
    assert "CACHEPIPE_DISABLE switches all caches off" in called("demo", "--prompts", "1", code=2).output


def test_the_demo_exits_with_1_when_a_promise_is_broken(monkeypatch):
    async def forgetful(self, name, lines, n, namespace, real=demo._Player.step):
        self._cache = f"{self._scratch}/{name}"  # nothing is remembered from step to step
        return await real(self, name, lines, n, namespace)

    monkeypatch.setattr(demo._Player, "step", forgetful)
    told = json.loads(called("demo", "--prompts", "2", "--n", "1", "--json", code=1).stdout)
    assert not told["held"]
    broken = [promise["promise"] for promise in told["promises"] if not promise["held"]]
    assert "the same run again costs nothing" in broken
    output = called("demo", "--prompts", "2", "--n", "1", code=1).stdout
    assert "NOT HELD  another namespace costs nothing" in output
