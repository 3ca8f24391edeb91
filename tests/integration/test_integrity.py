"""What is read from a cache is what was written there, or an error (C12)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import sys
import warnings

import forked
import pytest
from profiles import sized

from cachepipe import (
    Batch,
    CachepipeError,
    CachepipeWarning,
    DamagedCache,
    DiskStore,
    LostSamples,
    OnlineAPI,
    Request,
    Response,
    StoreError,
)
from cachepipe.proxy import browse
from cachepipe.stores.verify import verify

PARTS = ("ledger.cache.db", "cache.db")
WORK = [
    Request(f"question {number % 6}", n=1 + number % 3, namespace=name, request_id=str(number // 6))
    for name in (None, "b")
    for number in range(12)
]


class Model:
    model = "m"

    def __init__(self, tag="first"):
        self.tag = tag
        self.made = 0

    async def request(self, request):
        self.made += request.n
        return Response(
            [f"{self.tag} {request.prompt} {self.made - k} " + "word " * 40 for k in range(request.n)]
        )


async def asked(folder, model, mode="read-write", work=WORK, *, at_once=False):
    async with OnlineAPI(model, folder, mode=mode) as pipeline:
        if at_once:
            return [response.data for response in await pipeline.batch_request(Batch(work))]
        return [(await pipeline.request(request)).data for request in work]


def looked_at(folder):
    """Read all that commands and the proxy's page show of a cache."""
    with contextlib.closing(DiskStore(folder, read_only=True)) as store:
        shown = [store.totals(), list(store.namespaces())]
        for info in list(store.keys()):
            question = store.question(info.key)
            shown += [info, question, list(store.discards(info.key)), list(store.draws(info.key))]
            shown += store.samples(info.key)
        for path in ("/namespaces", "/keys"):
            shown.append(browse.answer(store, path, ""))
        return shown


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "cache"
    return folder, asyncio.run(asked(folder, Model()))


@pytest.fixture
def copy(original, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(original[0], folder)
    return folder


class Outcome:
    """What a damaged cache answers: every answer is the right one, or there is an error or a warning."""

    def __init__(self, folder, right, mode, *, at_once=False):
        model = Model("again")
        self.error = None
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                got = asyncio.run(asked(folder, model, mode, at_once=at_once))
            except CachepipeError as error:
                self.error = error
                got = []
        self.warned = any(issubclass(one.category, CachepipeWarning) for one in told)
        self.bought = model.made
        self.wrong = [
            (theirs, ours)
            for theirs, ours in zip(got, right, strict=False)
            if any(one not in ours and not one.startswith("again") for one in theirs)
        ]
        self.changed = bool(got) and got != right

    @property
    def silent(self):
        """Whether something was bought again, or is another answer, and nobody was told."""
        return self.error is None and not self.warned and bool(self.bought or self.changed)


@contextlib.contextmanager
def damaged(source, folder, part, data):
    """Copy a cache, with other bytes in one part."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    (folder / part).write_bytes(data)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_cache_is_replayed_as_it_is(original, copy):
    assert asyncio.run(asked(copy, None or Model("again"), "replay")) == original[1]


FLIPS = 50  # per seed


@pytest.mark.parametrize("seed", range(sized(2, 8)))
def test_c12_no_flipped_bit_gives_a_wrong_answer_or_is_bought_again_in_silence(original, tmp_path, seed):
    """But for rows that a flipped key or pointer hides: these are few, and a check finds each of them."""
    source, right = original
    chance = random.Random(seed)
    hidden = 0
    for number in range(FLIPS):
        part = PARTS[number % 2]
        data = bytearray((source / part).read_bytes())
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        data[at] ^= 1 << bit
        with damaged(source, tmp_path / "flipped", part, data) as folder:
            outcomes = [Outcome(folder, right, "replay", at_once=number % 4 < 2)]
            with contextlib.suppress(StoreError):
                looked_at(folder)
        with damaged(source, tmp_path / "flipped", part, data) as folder:
            outcomes.append(Outcome(folder, right, "read-write", at_once=number % 4 >= 2))
        assert not any(outcome.wrong for outcome in outcomes), (part, at, bit)
        if any(outcome.silent for outcome in outcomes):
            hidden += 1
            with damaged(source, tmp_path / "flipped", part, data) as folder:
                assert not verify(folder).whole, (part, at, bit)
    assert hidden <= FLIPS * 0.06


@pytest.mark.parametrize("seed", range(2))
def test_c12_no_truncated_part_gives_a_wrong_answer(original, tmp_path, seed):
    source, right = original
    chance = random.Random(seed)
    for number in range(20):
        part = PARTS[number % 2]
        data = (source / part).read_bytes()
        cut = chance.randrange(len(data))
        for mode in ("replay", "read-write"):
            with damaged(source, tmp_path / "cut", part, data[:cut]) as folder:
                outcome = Outcome(folder, right, mode)
                assert not outcome.wrong
                assert not outcome.silent, (part, cut)
        with damaged(source, tmp_path / "cut", part, data[:cut]) as folder:
            assert not verify(folder).whole, (part, cut)


ODD = {
    "cache.db": [
        "UPDATE Cache SET value = CAST(x'2bff' AS TEXT)",
        "UPDATE Cache SET mode = CAST(x'ff' AS TEXT)",
        "UPDATE cachepipe SET value = 'x' WHERE name = 'stamp'",
    ],
    "ledger.cache.db": [
        "UPDATE segments SET indices = CAST(x'ff' AS TEXT)",
        "UPDATE segments SET indices = 1.5",
        "UPDATE segments SET stamp = 'x' WHERE namespace = 1",
        "UPDATE segments SET position = x'00'",
        "UPDATE segments SET lease = 'q'",
        "UPDATE segments SET generated = 'x'",
        "UPDATE segments SET token = x'ff'",
        "UPDATE intervals SET start = x'01'",
        "UPDATE intervals SET digest = 5",
        "UPDATE keys SET at = x'ff'",
        "UPDATE keys SET scope = CAST(x'ff' AS TEXT)",
        "UPDATE keys SET document = 7",
        "UPDATE namespaces SET label = CAST(x'ff' || id AS TEXT)",
        "UPDATE meta SET value = 'x' WHERE name = 'stamp'",
        "UPDATE meta SET value = x'ff' WHERE name = 'sample'",
        "INSERT INTO discards VALUES(1, 'x', 'y', 5)",
        "INSERT INTO pending VALUES(1, 'x', 'y')",
        "INSERT INTO firsts SELECT key, request_id, 0, replicate, 'x' FROM segments WHERE namespace = 1",
    ],
}


@pytest.mark.parametrize(
    ("part", "statement"), [(part, statement) for part, statements in ODD.items() for statement in statements]
)
def test_c12_a_value_of_the_wrong_type_gives_no_raw_exception_and_a_check_finds_it(
    original, copy, tmp_path, part, statement
):
    with contextlib.closing(sqlite3.connect(copy / part, isolation_level=None)) as file:
        file.execute(statement)
    data = (copy / part).read_bytes()
    for mode in ("replay", "read-write"):
        for at_once in (False, True):
            with damaged(copy, tmp_path / "again", part, data) as folder:
                outcome = Outcome(folder, original[1], mode, at_once=at_once)
            assert not outcome.wrong
            assert not outcome.silent
    with contextlib.suppress(StoreError):
        looked_at(copy)
    assert not verify(copy).whole


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["missing", "emptied", "foreign", "older", "swapped"])
@pytest.mark.parametrize("read_only", [False, True])
def test_c12_a_part_that_does_not_belong_to_the_rest_is_refused(
    original, copy, tmp_path, part, how, read_only
):
    match how:
        case "missing":
            (copy / part).unlink()
        case "emptied":
            (copy / part).write_bytes(b"")
        case "foreign":
            asyncio.run(asked(tmp_path / "other", Model("other")))
            shutil.copy(tmp_path / "other" / part, copy / part)
        case "swapped":
            shutil.copy(copy / PARTS[part == PARTS[0]], copy / part)
        case "older":
            older = (copy / part).read_bytes()
            asyncio.run(asked(copy, Model(), work=[Request("new", n=2)]))
            (copy / part).write_bytes(older)
    with pytest.raises(
        CachepipeError, match=r"cannot be used|cannot be read|lacks|restore|Restore"
    ) as caught:
        DiskStore(copy, read_only=read_only or None)
    assert copy.name in str(caught.value)
    assert not verify(copy).whole


def test_c12_a_listed_sample_that_is_missing_is_an_error_for_those_who_need_it(original, copy):
    with contextlib.closing(sqlite3.connect(copy / "cache.db", isolation_level=None)) as shelf:
        [(name,)] = shelf.execute("SELECT key FROM Cache ORDER BY rowid LIMIT 1").fetchall()
        shelf.execute("DELETE FROM Cache WHERE key = ?", (name,))
    model = Model("again")
    with pytest.raises(DamagedCache, match="missing among the samples"):
        asyncio.run(asked(copy, model, work=WORK[:1]))
    assert model.made == 0
    assert asyncio.run(asked(copy, model, work=WORK[1:2])) == original[1][1:2]


def test_c12_a_row_that_was_moved_to_another_question_is_refused(original, copy):
    with contextlib.closing(sqlite3.connect(copy / "cache.db", isolation_level=None)) as shelf:
        (one, value), (other, _) = shelf.execute("SELECT key, value FROM Cache WHERE key GLOB '*/0' LIMIT 2")
        shelf.execute("UPDATE Cache SET value = ? WHERE key = ?", (value, other))
    with pytest.raises(DamagedCache, match="is damaged"):
        asyncio.run(asked(copy, Model(), "replay"))
    assert one != other


@pytest.mark.parametrize("indices", ["0l1", "7", "", "0,0"])
def test_c12_a_damaged_row_of_the_ledger_is_an_error_with_what_to_do(copy, indices):
    with contextlib.closing(sqlite3.connect(copy / "ledger.cache.db", isolation_level=None)) as ledger:
        ledger.execute("UPDATE segments SET indices = ?", (indices,))
    for mode in ("read-write", "replay"):
        with pytest.raises(DamagedCache, match="cachepipe verify"):
            asyncio.run(asked(copy, Model(), mode))


KILLED = """
import asyncio, os, sys
from cachepipe import OnlineAPI, Request, Response

class Model:
    model = "m"

    async def request(self, request):
        return Response([f"killed {request.prompt}"] * request.n)

async def main():
    pipeline = OnlineAPI(Model(), sys.argv[1])
    for number in range(4):
        await pipeline.request(Request(f"late {number}"))
    os._exit(9)

asyncio.run(main())
"""


def killed(folder):
    process = forked.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert process.returncode == 9


LATE = [Request(f"late {number}") for number in range(4)]


def test_c12_the_tail_lost_with_the_machine_is_told_and_generated_anew(original, copy):
    """The file of the samples lost its last rows; the ledger did not."""
    killed(copy)
    with contextlib.closing(sqlite3.connect(copy / "cache.db", isolation_level=None)) as shelf:
        names = [name for (name,) in shelf.execute("SELECT key FROM Cache ORDER BY rowid DESC LIMIT 2")]
        shelf.executemany("DELETE FROM Cache WHERE key = ?", [(name,) for name in names])
    model = Model("again")
    with pytest.warns(LostSamples, match="lost 2 samples"):
        got = asyncio.run(asked(copy, model, work=LATE))
    assert model.made == 2
    assert [data[0][:5] for data in got] == ["kille", "kille", "again", "again"]
    assert asyncio.run(asked(copy, Model("none"), "replay")) == original[1]


def test_c12_after_a_kill_nothing_is_told_of_a_whole_cache(copy):
    killed(copy)
    model = Model("again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = asyncio.run(asked(copy, model, work=LATE))
    assert model.made == 0
    assert got == [[f"killed {request.prompt}"] for request in LATE]


def test_c12_a_sample_whose_listing_was_lost_with_the_machine_is_used_again(copy):
    """The ledger lost the draw and the listing of a sample; the sample is there."""
    killed(copy)
    with contextlib.closing(sqlite3.connect(copy / "ledger.cache.db", isolation_level=None)) as ledger:
        [(key,)] = ledger.execute("SELECT max(id) FROM keys").fetchall()
        for table in ("segments", "intervals"):
            ledger.execute(f"DELETE FROM {table} WHERE key = ?", (key,))  # noqa: S608 - of constants
    model = Model("again")
    got = asyncio.run(asked(copy, model, work=LATE))
    assert model.made == 0
    assert got == [[f"killed {request.prompt}"] for request in LATE]


def test_c12_a_file_that_a_process_did_not_close_is_checked_when_it_is_opened(copy):
    killed(copy)
    path = copy / "ledger.cache.db"
    with contextlib.closing(sqlite3.connect(path)) as ledger:
        ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        [(root,)] = ledger.execute("SELECT rootpage FROM sqlite_master WHERE name = 'segments'").fetchall()
        [(size,)] = ledger.execute("PRAGMA page_size").fetchall()
    data = bytearray(path.read_bytes())
    data[(root - 1) * size + 3 : (root - 1) * size + 5] = b"\x00\x00"  # the page says that it holds no rows
    path.write_bytes(data)
    with pytest.raises(CachepipeError, match=r"damaged|malformed"):
        DiskStore(copy)


def test_stamps_go_on_where_the_cache_left_off_though_the_clock_was_set_back(copy, monkeypatch):
    """C3: which namespace is the earliest is told by stamps."""
    monkeypatch.setattr("cachepipe.stores.transaction.time.time", lambda: 1000.0)
    asyncio.run(asked(copy, Model(), work=[Request("question 0", namespace="late", request_id="x")]))
    with contextlib.closing(sqlite3.connect(copy / "ledger.cache.db")) as ledger:
        rows = ledger.execute(
            "SELECT n.label FROM segments s JOIN namespaces n ON n.id = s.namespace ORDER BY s.stamp"
        ).fetchall()
    assert rows[-1] == ("=late",)
