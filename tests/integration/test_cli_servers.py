"""The commands that look at a cache, on real Valkey and PostgreSQL servers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from cachepipe import CacheMiss, OnlineAPI, Request, open_store
from cachepipe.cli.group import cli
from cachepipe.stores.remote.engine import Read, Swap
from cachepipe.stores.remote.rows import FirstRow, pack
from cachepipe.testing import ScriptedModel


@pytest.fixture(params=["valkey", "postgres"])
def url(request):
    """The URL of a cache with two questions, of which two namespaces have drawn one."""
    url = request.getfixturevalue(f"new_{request.param}_url")()

    async def fill():
        async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
            await pipeline.request(Request("first question", n=2, request_id="r", namespace="a"))
            await pipeline.request(Request("first question", n=3, request_id="r", namespace="b"))
            await pipeline.request(Request("second question", namespace="b"))

    asyncio.run(fill())
    return url


@pytest.fixture
def run(url):
    def command(*arguments, code=0):
        done = CliRunner().invoke(cli, [*arguments, "--cache", url])
        assert done.exit_code == code, done.output
        return done.output

    return command


def write(url, key, change):
    """Change the rows of a key, as nothing in the package would: ``change`` gets them and returns them."""
    store, _ = open_store(url)
    engine = store.session.engine
    before = engine.rows_of([key])[0] | engine.read([Read(key, [b"s/0", b"s/1", b"s/2"])])[0]
    after = change(dict(before))
    gone = [name for name in before if name not in after]
    assert engine.swap([Swap(key, b"damage", puts=after, deletes=gone)], 0) == [None]
    store.close()


def lines(output):
    return [json.loads(line) for line in output.splitlines()]


def test_ls_lists_the_questions_of_a_server_in_order_and_by_what_is_wanted(run):
    found = lines(run("ls", "--json"))
    assert [(one["prompt"], one["samples"], one["namespaces"]) for one in found] == [
        ("first question", 3, 2),
        ("second question", 1, 1),
    ]
    for wanted in (["--namespace", "a"], ["--search", "FIRST"], ["--prefix", found[0]["key"]]):
        assert lines(run("ls", "--json", *wanted)) == found[:1]
    assert len(lines(run("ls", "--json", "--scope", "m"))) == 2
    assert lines(run("ls", "--json", "--scope", "other")) == []
    assert "first question" in run("ls")


def test_show_shows_the_samples_and_draws_of_a_question(run):
    key = lines(run("ls", "--json"))[0]["key"]
    [shown] = lines(run("show", key[:12], "--json"))
    assert [sample["index"] for sample in shown["samples"]] == [0, 1, 2]
    assert [draw["indices"] for draw in shown["draws"]] == [[0, 1], [0, 1, 2]]
    assert "drawn by 2 namespaces" in run("show", key)


def test_stats_counts_what_namespaces_drew_and_spent(run):
    [stats] = lines(run("stats", "--json", "--scopes"))
    assert (stats["keys"], stats["samples"], stats["draws"]) == (2, 4, 3)
    assert (stats["drawn"], stats["generated"], stats["reused"]) == (6, 4, 2)
    assert (stats["requests"], stats["spent"]["samples"]) == (3, 4)
    assert stats["bytes"] is None
    assert stats["scopes"] == [{"scope": "m", "keys": 2, "samples": 4, "pending": 0}]
    assert "keys" in run("stats")


@dataclass(frozen=True)
class Warm(Request):
    temperature: float | None = None


def test_a_miss_names_the_nearest_question_of_a_server_and_what_differs(run, url):
    keys = [one["key"] for one in lines(run("ls", "--json"))]

    async def replay():
        async with OnlineAPI(ScriptedModel(cache_scope="m"), url, mode="replay") as pipeline:
            await pipeline.request(Warm("first question", namespace="c", temperature=0.5))

    with pytest.raises(CacheMiss, match="differs in temperature") as caught:
        asyncio.run(replay())
    assert caught.value.nearest == keys[0]

    async def elsewhere():
        async with OnlineAPI(ScriptedModel(cache_scope="other"), url, mode="replay") as pipeline:
            await pipeline.request(Request("second question"))

    with pytest.raises(CacheMiss, match="under another scope: 'm'"):
        asyncio.run(elsewhere())


def test_path_names_the_url_without_its_credentials(run, url):
    assert run("path").strip() == url
    known = url.replace("user=postgres&", "")
    secret = known.replace("://", "://user:secret@")
    done = CliRunner().invoke(cli, ["path", "--json", "--cache", secret])
    assert json.loads(done.output) == {"path": known, "exists": False, "named_by": "--cache"}
    assert json.loads(run("path", "--json"))["exists"] is True


@pytest.mark.parametrize("kind", ["valkey", "postgres"])
def test_a_command_that_reads_begins_no_cache(request, kind):
    url = request.getfixturevalue(f"new_{kind}_url")()
    for command in (["ls"], ["stats"], ["verify"], ["show", "k2-1"], ["ls"]):
        done = CliRunner().invoke(cli, [*command, "--cache", url])
        assert done.exit_code == 2
        assert "there is no cache to read at " in done.output


def test_a_discarded_sample_of_a_server_is_on_record(run):
    key = lines(run("ls", "--json"))[0]["key"]
    run("discard", f"{key}/1", "--why", "a refusal")
    [shown] = lines(run("show", key, "--json"))
    assert [sample["index"] for sample in shown["samples"]] == [0, 2]
    assert [(one["index"], one["why"]) for one in shown["discarded"]] == [(1, "a refusal")]
    assert "nothing is wrong" in run("verify")


def test_c12_verify_finds_what_was_damaged_on_a_server_and_repairs_what_it_can(run, url):
    assert "nothing is wrong" in run("verify")
    key = lines(run("ls", "--json"))[0]["key"]

    def damage(rows):
        rows[b"s/0"] = rows[b"s/1"]  # a sample at another's place
        del rows[b"s/2"]
        return rows

    write(url, key, damage)
    [report] = lines(run("verify", "--json", code=1))
    assert {one["kind"]: one["count"] for one in report["problems"]} == {"sample": 1, "missing": 1}
    assert "nothing is wrong" in run("verify", "--repair")

    async def again():
        async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
            return await pipeline.request(Request("first question", n=2, request_id="r", namespace="a"))

    assert asyncio.run(again()).indices == (3, 1)


def test_c12_verify_finds_samples_that_are_not_listed_and_lists_them_again(run, url):
    key = lines(run("ls", "--json"))[0]["key"]
    write(url, key, lambda rows: rows | {b"L": pack(key, b"L", b"0-1 2-3")})
    [report] = lines(run("verify", "--json", code=1))
    assert {one["kind"]: one["examples"] for one in report["problems"]} == {"unlisted": [f"{key}/1"]}
    assert "nothing is wrong" in run("verify", "--repair")
    [shown] = lines(run("show", key, "--json"))
    assert [sample["index"] for sample in shown["samples"]] == [0, 1, 2]


def test_c12_a_list_that_names_any_number_of_samples_costs_no_time(run, url):
    key = lines(run("ls", "--json"))[0]["key"]
    write(url, key, lambda rows: rows | {b"L": pack(key, b"L", b"0-1000000000000000000")})
    [report] = lines(run("verify", "--json", code=1))
    assert {one["kind"]: one["count"] for one in report["problems"]} == {"missing": 10**18 - 3}
    [shown] = lines(run("show", key, "--json"))
    assert [sample["index"] for sample in shown["samples"]] == [0, 1, 2]
    run("stats")


@pytest.mark.parametrize(
    ("field", "kind"), [("L", "set"), ("k", "question"), ("t/=a", "set"), ("q", "question")]
)
def test_c12_verify_names_each_kind_of_damaged_row(run, url, field, kind):
    key = lines(run("ls", "--json"))[0]["key"]
    row = field.encode()
    write(url, key, lambda rows: rows | {row: rows[row][:-1] + bytes([rows[row][-1] ^ 1])})
    [report] = lines(run("verify", "--json", code=1))
    assert kind in {one["kind"] for one in report["problems"]}


def changed(name, content):
    """Return a damage: a row with another content, and its digest."""
    return lambda key, rows: rows | {name: pack(key, name, content)}


def flipped(prefix):
    """Return a damage: the last byte of the first row with a prefix is another one."""

    def damage(_key, rows):
        name = min(name for name in rows if name.startswith(prefix))
        return rows | {name: rows[name][:-1] + bytes([rows[name][-1] ^ 1])}

    return damage


def drawn_twice(key, rows):
    name = min(name for name in rows if name.startswith(b"d/r\0"))
    other = name.replace(b"d/r\0", b"d/z\0")
    return rows | {other: pack(key, other, rows[name][8:])}


def swapped(key, rows):
    """Return the rows, with the later namespace noted as the earlier one."""
    [name] = [name for name in rows if name.startswith(b"o/")]
    first = FirstRow.loads(key, name, rows[name][8:])
    first.namespaces.reverse()
    return rows | {name: pack(key, name, first.dumps(name))}


def without(prefix):
    return lambda _key, rows: {name: row for name, row in rows.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("damage", "kinds", "repairs"),
    [
        (changed(b"t/=a", b"0-1"), {"unassigned": 1}, False),
        (without(b"t/=a"), {"unassigned": 2}, False),
        (changed(b"t/=a", b"0-3"), {"undrawn": 1}, False),
        (changed(b"t/=none", b"0-1"), {"undrawn": 1}, False),
        (changed(b"t/=a", b"1-2 0-1"), {"set": 1}, False),
        (drawn_twice, {"repeated": 2, "first": 1}, False),
        (flipped(b"d/"), {"draw": 1}, False),
        (flipped(b"o/"), {"first": 1}, True),
        (without(b"o/"), {"first": 1}, True),
        (swapped, {"first": 1}, True),
        (changed(b"p/9", b"7"), {"lease": 1}, True),
        (changed(b"p/9", b"nobody"), {"lease": 2}, True),
        (changed(b"w/1", b'[1,"bad"]'), {"discard": 1}, True),
        (changed(b"w/1", b"{"), {"discard": 2}, True),
        (changed(b"w/9", b'[1,"bad"]'), {"unknown": 1}, False),
        (changed(b"c", b"many"), {"change": 1}, True),
        (changed(b"u/=a", b"{}"), {"draw": 1}, False),
        (changed(b"y/", b"1"), {"unknown": 1}, False),
        (changed(b"q", b"{}"), {"question": 1}, False),
        (without(b"k"), {"question": 1}, False),
        (without((b"k", b"q", b"L", b"d/", b"t/", b"o/", b"c")), {"stray": 1}, False),
    ],
)
def test_c12_verify_checks_each_clause_on_a_server(run, url, damage, kinds, repairs):
    key = lines(run("ls", "--json"))[0]["key"]
    write(url, key, lambda rows: damage(key, rows))
    [report] = lines(run("verify", "--json", code=1))
    assert {one["kind"]: one["count"] for one in report["problems"]} == kinds
    [report] = lines(run("verify", "--json", "--repair", code=0 if repairs else 1))
    assert report["whole"] == repairs
    if repairs:
        assert {one["kind"] for one in report["repaired"]} == kinds.keys()


def test_c3_the_earliest_namespace_is_found_again_after_a_repair(run, url):
    key = lines(run("ls", "--json"))[0]["key"]
    write(url, key, lambda rows: swapped(key, rows))
    run("verify", "--repair")
    store, _ = open_store(url)
    found = store.session.engine.rows_of([key])[0]
    [name] = [name for name in found if name.startswith(b"o/")]
    first = FirstRow.loads(key, name, found[name][8:])
    assert [label for _, label in first.namespaces] == ["=a", "=b"]
    store.close()


def test_c12_verify_counts_what_a_killed_run_left_unfinished(run, url):
    key = lines(run("ls", "--json"))[0]["key"]

    def lose(rows):
        rows[b"L"] = pack(key, b"L", b"0-2")
        del rows[b"s/2"]
        return rows

    write(url, key, lose)
    [report] = lines(run("verify", "--json"))
    assert (report["whole"], report["unfinished"]) == (True, 1)


def test_a_cache_of_the_environment_may_be_a_url(url, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_DIR", url)
    store, owned = open_store()
    assert owned
    assert store.where == url
    store.close()
    done = CliRunner().invoke(cli, ["path", "--json"])
    assert json.loads(done.output) == {"path": url, "exists": True, "named_by": "CACHEPIPE_DIR"}
