"""What `cachepipe verify` finds in a cache, and what it repairs (C12)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3

import diskcache
import pytest

from cachepipe import DamagedCache, DiskStore, FormatError, OnlineAPI, Request, Response
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.keys import provider_question
from cachepipe.stores import tables
from cachepipe.stores.base import Claim, Commit, Discard, Reserve
from cachepipe.stores.disk import connect_to_read
from cachepipe.stores.repair import repair
from cachepipe.stores.verify import verify

LEDGER, SHELF = "ledger.cache.db", "cache.db"


class Model:
    model = "m"

    def __init__(self, tag="first"):
        self.tag = tag
        self.made = 0

    async def request(self, request):
        self.made += request.n
        return Response([f"{self.tag} {request.prompt} {self.made - k}" for k in range(request.n)])


WORK = [
    Request(f"question {number}", n=2, namespace=namespace, request_id=request_id)
    for namespace in (None, "b")
    for number in range(3)
    for request_id in ("x", "y")
]


async def asked(folder, model, work=WORK, mode="read-write"):
    async with OnlineAPI(model, folder, mode=mode) as pipeline:
        return [(await pipeline.request(request)).data for request in work]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "cache"
    return folder, asyncio.run(asked(folder, Model()))


@pytest.fixture
def cache(original, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(original[0], folder)
    return folder


@contextlib.contextmanager
def opened(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def change(path, *statements):
    """Execute statements on a file, each a text, or a pair with its values; return their rows."""
    with opened(path) as connection:
        return [
            connection.execute(*([statement] if isinstance(statement, str) else statement)).fetchall()
            for statement in statements
        ]


def kinds(folder):
    return set(verify(folder).problems)


def files(folder):
    return {name: (folder / name).read_bytes() for name in (LEDGER, SHELF)}


def test_a_whole_cache_has_no_problems_and_all_of_it_is_counted(cache):
    report = verify(cache)
    assert report.whole
    assert report.counts == {"questions": 3, "samples": 12, "draws": 12, "discarded": 0}
    assert (report.foreign, report.recent, report.unfinished) == (0, 0, 0)


def test_a_check_writes_nothing(cache):
    before = files(cache)
    change(cache / SHELF, "DELETE FROM Cache WHERE rowid = 2")
    damaged = files(cache)
    assert not verify(cache).whole
    assert files(cache) == damaged != before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_copy_is_checked(cache):
    cache.chmod(0o500)
    for path in cache.iterdir():
        path.chmod(0o400 if path.is_file() else 0o500)
    try:
        assert verify(cache).whole
    finally:
        cache.chmod(0o700)


def test_a_new_cache_is_whole(tmp_path):
    DiskStore(tmp_path / "cache").close()
    assert verify(tmp_path / "cache").whole


# Each kind of problem. A row of the ledger that was changed to say something else is found by its digest.

DAMAGE = {
    "another request id": (
        LEDGER,
        "UPDATE segments SET request_id = 'z' || request_id WHERE key = 2",
        {"draw"},
    ),
    "other indices": (LEDGER, "UPDATE segments SET indices = '1,0' WHERE key = 2", {"draw"}),
    "indices that are no numbers": (LEDGER, "UPDATE segments SET indices = x'80' WHERE key = 1", {"draw"}),
    "a request id that is no text": (
        LEDGER,
        "UPDATE segments SET request_id = CAST(x'ff' AS TEXT) WHERE request_id = 'x' AND namespace = 1",
        {"draw"},
    ),
    "a stamp": (LEDGER, "UPDATE segments SET stamp = stamp + 1 WHERE key = 3 AND request_id = 'y'", {"draw"}),
    "more delivered than drawn": (LEDGER, "UPDATE segments SET standing = 9 WHERE key = 3", {"draw"}),
    "a draw that is gone": (LEDGER, "DELETE FROM segments WHERE key = 1 AND request_id = 'x'", {"undrawn"}),
    "a draw of no namespace": (
        LEDGER,
        "UPDATE segments SET namespace = 77 WHERE namespace = 2 AND key = 2",
        {"unknown", "undrawn"},
    ),
    "a draw of no question": (LEDGER, "UPDATE segments SET key = 9 WHERE key = 3", {"unknown", "undrawn"}),
    "a longer list": (LEDGER, "UPDATE intervals SET stop = 9 WHERE owner = 0 AND key = 1", {"set"}),
    "a list of another question": (
        LEDGER,
        "UPDATE intervals SET key = 8 WHERE owner = 0 AND key = 1",
        {"unknown", "unlisted"},
    ),
    "a list that is gone": (LEDGER, "DELETE FROM intervals WHERE owner = 0 AND key = 2", {"unlisted"}),
    "a set that is gone": (LEDGER, "DELETE FROM intervals WHERE owner = 2 AND key = 2", {"unassigned"}),
    "a set of no namespace": (
        LEDGER,
        "UPDATE intervals SET owner = 5 WHERE owner = 2",
        {"unknown", "unassigned"},
    ),
    "another question": (
        LEDGER,
        "UPDATE keys SET document = CAST(replace(document, 'question 1', 'question 7') AS BLOB) WHERE id = 2",
        {"question"},
    ),
    "another scope": (LEDGER, "UPDATE keys SET scope = 'n' WHERE id = 3", {"question"}),
    "another key": (
        LEDGER,
        "UPDATE keys SET key = replace(key, 'k2-', 'k2-0') WHERE id = 3",
        {"question", "set", "draw", "stray"},
    ),
    "a question that is gone": (LEDGER, "DELETE FROM keys WHERE id = 1", {"unknown", "stray"}),
    "a name of a namespace": (LEDGER, "UPDATE namespaces SET label = '=c' WHERE id = 2", {"draw", "set"}),
    "a sample that nobody generates": (LEDGER, "INSERT INTO pending VALUES(1, 2, 44)", {"lease"}),
    "a sample that is pending and not listed": (LEDGER, "INSERT INTO pending VALUES(1, 90, 1)", {"lease"}),
    "a discard of a sample": (LEDGER, "INSERT INTO discards VALUES(1, 1, 0.0, 'why')", {"discard"}),
    "a discard of no sample": (LEDGER, "INSERT INTO discards VALUES(1, 100, 0.0, 'why')", {"unknown"}),
    "an earliest namespace": (
        LEDGER,
        "INSERT INTO firsts SELECT key, request_id, 0, replicate, 2 FROM segments WHERE namespace = 1",
        {"first"},
    ),
    "other sums": (LEDGER, "UPDATE sums SET document = replace(document, '1', '2')", {"sums"}),
    "sums of another run": (LEDGER, "UPDATE sums SET run = 'another'", {"sums"}),
    "sums of another namespace": (
        LEDGER,
        "UPDATE sums SET namespace = namespace || CAST(x'ff' AS TEXT)",
        {"sums"},
    ),
    "sums without a stamp": (LEDGER, "UPDATE sums SET stamp = 'x'", {"sums"}),
    "a sample that is gone": (SHELF, "DELETE FROM Cache WHERE rowid = 5", {"missing"}),
    "other bytes of a sample": (
        SHELF,
        "UPDATE Cache SET value = CAST(replace(value, 'first', 'other') AS BLOB) WHERE rowid = 3",
        {"sample"},
    ),
    "a short sample": (SHELF, "UPDATE Cache SET value = x'2b' WHERE rowid = 4", {"sample"}),
    "a pickle": (SHELF, "UPDATE Cache SET mode = 4 WHERE rowid = 6", {"sample"}),
    "a sample in another file": (SHELF, "UPDATE Cache SET filename = '../x' WHERE rowid = 7", {"sample"}),
    "a moved sample": (
        SHELF,
        "UPDATE Cache SET key = replace(key, '/0', '/9') WHERE rowid = 1",
        {"missing", "sample", "unlisted"},
    ),
}


@pytest.mark.parametrize(("part", "statement", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_named(cache, part, statement, expected):
    change(cache / part, statement)
    report = verify(cache)
    assert set(report.problems) == expected
    assert all(problem.count and problem.examples for problem in report.problems.values())


def rewritten(cache, name, changed):
    """Change the bytes of the page at which a table or an index of a file begins."""
    path = cache / (SHELF if name.startswith("Cache") else LEDGER)
    [[(root,)], [(size,)]] = change(
        path, ("SELECT rootpage FROM sqlite_master WHERE name = ?", [name]), "PRAGMA page_size"
    )
    data = bytearray(path.read_bytes())
    page = slice((root - 1) * size, root * size)
    data[page] = changed(bytes(data[page]))
    path.write_bytes(data)


def sample_names(cache):
    [rows] = change(cache / SHELF, "SELECT key FROM Cache ORDER BY rowid")
    return [name for (name,) in rows]


def test_c12_a_sample_that_look_ups_do_not_find_is_found_in_the_table(cache):
    name = sample_names(cache)[4]
    rewritten(cache, "Cache_key_raw", lambda page: page.replace(name.encode(), b"k2-zz" + name.encode()[5:]))
    report = verify(cache)
    assert set(report.problems) == {"index", "hidden", "missing"}
    assert f"sample {name}" in report.problems["hidden"].examples


def test_c12_a_question_that_look_ups_do_not_find_is_found_in_the_table(cache):
    key = key_of(cache, 2)
    rewritten(
        cache, "sqlite_autoindex_keys_1", lambda page: page.replace(key.encode(), b"k2-zz" + key.encode()[5:])
    )
    report = verify(cache)
    assert {"index", "hidden"} <= set(report.problems)
    assert f"question {key}" in report.problems["hidden"].examples
    assert repair(cache).whole


def test_c12_rows_of_the_ledger_that_a_damaged_page_hides_are_noticed(cache):
    rewritten(cache, "segments", lambda page: page[:3] + b"\x00\x02" + page[5:])  # it holds two rows, it says
    assert {"undrawn", "file"} <= kinds(cache)


def test_c1_two_draws_with_one_sample_are_found(cache):
    """All digests fit: only the rows together are wrong."""
    with opened(cache / LEDGER) as ledger:
        key, name = ledger.execute("SELECT id, key FROM keys").fetchone()
        draw = Draw(label("b"), name, "z", 0)
        digest = tables.segment_digest(draw, 0, 0, 1, 5, None)
        row = (key, "z", 0, draw.replicate, 2, 0, 0, 1, 1, None, 0, 5, 1, digest, None)
        ledger.execute(tables.PUT_SEGMENT, row)
    report = verify(cache)
    assert set(report.problems) == {"repeated"}
    assert report.problems["repeated"].examples == [f"{name}/1, namespace 'b'"]


@pytest.mark.parametrize("part", [LEDGER, SHELF])
@pytest.mark.parametrize("how", ["missing", "emptied", "foreign"])
def test_c12_a_part_that_does_not_belong_to_the_rest_is_found_and_not_repaired(cache, tmp_path, part, how):
    match how:
        case "missing":
            (cache / part).unlink()
        case "emptied":
            (cache / part).write_bytes(b"")
        case "foreign":
            asyncio.run(asked(tmp_path / "other", Model()))
            shutil.copy(tmp_path / "other" / part, cache / part)
    assert "parts" in kinds(cache)


def test_what_may_run_inside_a_statement_is_not_read(cache):
    change(cache / LEDGER, "CREATE VIEW evil AS SELECT * FROM keys")
    report = verify(cache)
    assert "evil" in report.problems["file"].examples[0]
    assert report.counts["questions"] == 0


def test_a_cache_of_another_version_is_not_checked(cache):
    change(cache / LEDGER, "UPDATE meta SET value = 99 WHERE name = 'format'")
    with pytest.raises(FormatError, match="reads format"):
        verify(cache)


def test_rows_of_others_in_the_diskcache_are_counted_and_left_alone(cache):
    with diskcache.Cache(str(cache), eviction_policy="none", cull_limit=0) as theirs:
        theirs["theirs"] = {"a": "pickle"}
        theirs[7] = "seven"
    report = verify(cache)
    assert report.whole
    assert report.foreign == 2


# Caches in use, and what killed processes leave.


@pytest.mark.anyio
async def test_c12_a_cache_in_use_is_whole(cache):
    store = DiskStore(cache)
    question = provider_question("s", {"prompt": "new"})
    draw = Draw(label(None), question.key, "", 0)
    [grant] = store.apply_now([Claim(draw, 3, question, "t")])
    assert verify(cache).whole
    store.apply_now([Commit(question.key, grant.indices[1], b'"b"', {})])
    report = verify(cache)
    assert report.whole
    assert report.counts["samples"] == 13
    store.close()


def test_c12_samples_that_a_killed_process_has_not_listed_are_no_damage(cache):
    """The next opening lists them."""
    store = DiskStore(cache)
    question = provider_question("s", {"prompt": "new"})
    [grant] = store.apply_now([Claim(Draw(label(None), question.key, "", 0), 1, question, "t")])
    store.apply_now([Commit(question.key, grant.indices[0], b'"b"', {})])
    folder = cache.with_name("killed")
    shutil.copytree(cache, folder)
    store.close()
    change(folder / LEDGER, "DELETE FROM intervals WHERE key = 4", "DELETE FROM segments WHERE key = 4")
    report = verify(folder)
    assert report.whole
    assert report.recent == 1
    DiskStore(folder).close()
    report = verify(folder)
    assert (report.whole, report.recent) == (True, 0)


def test_positions_that_a_killed_run_left_without_a_sample_are_counted_and_no_damage(cache):
    change(cache / LEDGER, "DELETE FROM intervals WHERE owner = 0 AND key = 2")
    change(cache / SHELF, ("DELETE FROM Cache WHERE key GLOB ?", [f"{key_of(cache, 2)}/*"]))
    report = verify(cache)
    assert report.whole
    assert report.unfinished == 8


def key_of(cache, number):
    [[(key,)]] = change(cache / LEDGER, ("SELECT key FROM keys WHERE id = ?", [number]))
    return key


# Repairs.


def worsen(cache, name):
    statement = "UPDATE Cache SET value = CAST(replace(value, 'first', 'worst') AS BLOB) WHERE key = ?"
    change(cache / SHELF, (statement, [name]))


def discards(cache):
    with contextlib.closing(DiskStore(cache, read_only=True)) as store:
        return {
            info.key: [(one.index, one.why) for one in store.discards(info.key)]
            for info in list(store.keys())
        }


def test_c2_a_damaged_and_a_missing_sample_are_replaced_at_their_positions_after_a_repair(original, cache):
    first, last = f"{key_of(cache, 1)}/0", f"{key_of(cache, 3)}/1"
    worsen(cache, first)
    change(cache / SHELF, ("DELETE FROM Cache WHERE key = ?", [last]))
    with pytest.raises(DamagedCache, match="verify --repair"):
        asyncio.run(asked(cache, Model("again")))
    assert repair(cache).whole
    model = Model("again")
    got = asyncio.run(asked(cache, model))
    right = original[1]
    changed = [
        (request.prompt, position)
        for request, ours, theirs in zip(WORK, right, got, strict=True)
        for position, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if one != other
    ]
    assert changed == [("question 0", 0), ("question 2", 1), ("question 0", 0), ("question 2", 1)]
    assert model.made == 2  # both namespaces share them
    assert asyncio.run(asked(cache, Model("none"), mode="replay")) == got
    recorded = [entry for entries in discards(cache).values() for entry in entries]
    assert recorded == [(0, "cachepipe verify found it damaged"), (1, "cachepipe verify found it missing")]


def test_a_repair_keeps_the_bytes_of_a_damaged_sample(cache):
    change(
        cache / SHELF,
        "UPDATE Cache SET value = CAST(replace(value, 'first', 'worst') AS BLOB) WHERE rowid = 3",
    )
    assert repair(cache).whole
    [[(value,)]] = change(cache / SHELF, "SELECT value FROM Cache WHERE rowid = 3")
    assert b"worst" in value


def test_a_repair_finds_hidden_samples_again(original, cache):
    name = sample_names(cache)[4]
    rewritten(cache, "Cache_key_raw", lambda page: page.replace(name.encode(), b"k2-zz" + name.encode()[5:]))
    assert repair(cache).whole
    assert asyncio.run(asked(cache, Model(), mode="replay")) == original[1]
    assert not any(discards(cache).values())


def test_a_repair_takes_a_lost_name_of_a_sample_from_the_index(original, cache):
    name = sample_names(cache)[4]
    rewritten(cache, "Cache", lambda page: page.replace(name.encode(), b"k2-zz" + name.encode()[5:]))
    assert {"index", "missing"} & kinds(cache)
    assert repair(cache).whole
    assert asyncio.run(asked(cache, Model(), mode="replay")) == original[1]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM intervals WHERE owner = 0 AND key = 2",
        "INSERT INTO pending VALUES(1, 2, 44)",
        "INSERT INTO pending VALUES(1, 90, 44)",
        "INSERT INTO pending SELECT 1, 90, id FROM leases",
        "INSERT INTO firsts SELECT key, request_id, 0, replicate, 2 FROM segments WHERE namespace = 1",
    ],
)
def test_a_repair_of_the_ledger_changes_no_draw(original, cache, statement):
    change(cache / LEDGER, statement)
    assert not verify(cache).whole
    assert repair(cache).whole
    assert asyncio.run(asked(cache, Model(), mode="replay")) == original[1]
    assert not any(discards(cache).values())


def test_a_discard_that_one_file_lacks_is_completed(cache):
    change(cache / LEDGER, "INSERT INTO discards VALUES(1, 1, 0.0, 'a refusal')")
    assert repair(cache).whole
    assert discards(cache)[key_of(cache, 1)] == [(1, "a refusal")]
    with contextlib.closing(DiskStore(cache, read_only=True)) as store:
        assert [sample.index for sample in store.samples(key_of(cache, 1))] == [0, 2, 3]


def test_a_damaged_row_of_the_ledger_stays_and_is_reported(cache):
    change(cache / LEDGER, "UPDATE segments SET indices = '1,0' WHERE key = 2")
    change(cache / SHELF, "DELETE FROM Cache WHERE rowid = 1")
    [rows] = change(cache / LEDGER, "SELECT * FROM segments")
    assert set(repair(cache).problems) == {"draw"}
    assert change(cache / LEDGER, "SELECT * FROM segments") == [rows]


def test_a_repair_leaves_a_list_alone_that_is_longer_than_any_real_one(cache):
    key = key_of(cache, 1)
    with opened(cache / LEDGER) as ledger:
        ledger.execute(
            "UPDATE intervals SET stop = ?, digest = ? WHERE owner = 0 AND key = 1",
            (1 << 60, tables.interval_digest("", key, 0, 1 << 60)),
        )
    report = repair(cache)
    assert set(report.problems) == {"missing"}
    assert report.problems["missing"].count == (1 << 60) - 4
    assert report.problems["missing"].examples == [f"{key}/4 to {(1 << 60) - 1}"]


def test_a_repair_while_a_process_uses_the_cache_is_seen_by_it(original, cache):
    store = DiskStore(cache)
    key = key_of(cache, 1)
    draw = Draw(label(None), key, "x", 0)
    assert store.recall(draw, 2) is not None
    worsen(cache, f"{key}/0")
    assert repair(cache).whole
    assert store.recall(draw, 2) is None
    question = store.question(key)
    [grant] = store.apply_now([Claim(draw, 2, question, "t")])
    assert (grant.indices, grant.mine) == ([4, 1], [4])
    store.apply_now([Commit(key, 4, b'"new"', {}), Discard(key, 1, "a refusal")])
    store.close()
    assert verify(cache).whole


def test_c12_a_damaged_row_of_a_budget_is_found(tmp_path):
    with contextlib.closing(DiskStore(tmp_path)) as store:
        store.apply_now([Reserve("=x", "a call", 5, 100)])
    ledger = sqlite3.connect(tmp_path / "ledger.cache.db", isolation_level=None)
    ledger.execute("UPDATE budgets SET document = '[0,[],[],[]]'")
    ledger.close()
    assert [*verify(tmp_path).problems] == ["sums"]


def test_a_check_takes_few_statements_however_many_questions_there_are(tmp_path, monkeypatch):
    statements = []

    def connect(path):
        connection, how = connect_to_read(path)
        connection.set_trace_callback(statements.append)
        return connection, how

    monkeypatch.setattr("cachepipe.stores.verify.connect_to_read", connect)
    counts = []
    for number in (2, 60):
        asyncio.run(asked(tmp_path / str(number), Model(), [Request(str(each)) for each in range(number)]))
        statements.clear()
        assert verify(tmp_path / str(number)).counts["samples"] == number
        counts.append(len(statements))
    assert counts[0] == counts[1]
